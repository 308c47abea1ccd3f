package main

// The streams by which flowctl moves the events of one component: out of a source, through a processor, into
// a sink. They are opened again when they break.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

const (
	minRetry   = 100 * time.Millisecond // before a stream that broke is opened again
	maxRetry   = 5 * time.Second        // the longest pause
	illTries   = 3                      // tries in a row by which nothing was moved, and
	illTime    = 2 * time.Second        // so long since the first: the component is ill
	askTimeout = 5 * time.Second        // for an answer of GetInfo and GetState
	drainQuiet = time.Second            // without an event, after which the stream of a source that stops is ended
	recvWindow = 256 << 10              // bytes of a stream that flowctl has not read yet
	peerBuffer = 64 << 10               // bytes that the sender of a stream holds back, as grpc does
)

// streamState is how far the streams of a component are.
type streamState int

const (
	streamAsking  streamState = iota // whether it serves events
	streamOwn                        // it does not: it moves its own data
	streamWaiting                    // for its readers, to be opened for the first time
	streamOpen                       // or broken, and about to be opened again
	streamEnded                      // after its last event
)

func (s streamState) String() string {
	return [...]string{"asking", "own", "waiting", "open", "ended"}[s]
}

// relayMember is what the relay is told of a component.
type relayMember struct {
	id       string
	role     Role
	endpoint string    // where it serves; "" while it is not registered through flowctl.v1
	since    time.Time // of that registration: another one is another process's
	wants    []string  // input event types, none for all
	inputs   []string
	params   map[string]string // of StreamEvents
}

// leaving says what becomes of a component's process, of its own will or not.
type leaving int

const (
	staying     leaving = iota
	leavingOnce         // it is about to be stopped and started again
	leavingEver         // it is about to end, or has ended, and is not started again
)

// eventNode is a component whose events flowctl moves. One goroutine, in run, has its streams.
type eventNode struct {
	relay    *relay
	log      *slog.Logger
	in, out  atomic.Pointer[[]*edge] // replaced under relay.mu, never changed
	filled   chan struct{}           // gets a token when an edge to it has an event, or ends
	changed  chan struct{}           // gets a token when something has changed that await waits for
	hurry    chan struct{}           // gets a token when a broken stream is not to wait for its pause
	unsent   *event                  // was taken from an edge and could not be sent
	received atomic.Int64            // events that it has sent
	bytes    atomic.Int64            // of those
	unwanted atomic.Int64            // of those, of a type that no reader wants

	// relay.mu guards the fields below.
	member  relayMember
	state   streamState
	runs    bool // its goroutine does
	leaving leaving
	stream  context.Context    // of its streams; nil while there are none
	cancel  context.CancelFunc // ends them
	enough  bool               // its readers have had enough
	tried   time.Time          // since when nothing could be moved, zero while it could
	tries   int                // since then
	told    bool               // that nothing can be moved yet
	cause   string             // why it is ill, "" while it is not
	failed  int64              // events that it could not take, as it said
	lost    int64              // events that were in flight when a stream of it broke, at most
}

// run moves the events of n until its streams have ended or ctx does.
func (n *eventNode) run(ctx context.Context) {
	for {
		err := n.session(ctx)
		if ctx.Err() != nil {
			return
		}
		pause, over := n.judge(err, time.Now())
		if over {
			return
		}
		select {
		case <-time.After(pause):
		case <-n.hurry:
		case <-ctx.Done():
			return
		}
	}
}

// session asks n whether it serves events, opens its streams and moves events. It returns nil when n has ended
// its stream, and else why that broke.
func (n *eventNode) session(ctx context.Context) error {
	member, err := n.registered(ctx)
	if err != nil {
		return err
	}
	conn, peer, err := dialComponent(member.endpoint)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := n.ask(ctx, conn, member.role); err != nil {
		return err
	}
	if err := n.awaitOthers(ctx); err != nil {
		return err
	}
	request, err := n.request(ctx, conn, &member)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	peer.taken.Store(0)
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: member.role != roleSource, ServerStreams: member.role != roleSink},
		streamMethods[member.role], grpc.ForceCodecV2(eventCodec{}), grpc.MaxCallRecvMsgSize(n.relay.maxEvent), grpc.MaxCallSendMsgSize(n.relay.maxEvent))
	if err != nil {
		return err
	}
	n.opening(ctx, cancel)
	defer n.closing()
	flight := &flight{conn: peer}
	lasts := time.AfterFunc(illTime, n.works)
	defer lasts.Stop()
	var sending sync.WaitGroup
	sending.Go(func() { n.send(ctx, stream, request, flight) })
	mean, err := n.receive(ctx, stream, member.role)
	cancel()
	sending.Wait()
	if err == nil {
		return nil
	}
	return &brokenStream{err, inFlight(member.role, flight, mean)}
}

// errOwn is of a component whose events flowctl does not move, errLeft of one that has ended.
var (
	errOwn  = errors.New("it moves its own data")
	errLeft = errors.New("its process has ended")
)

// streamMethods are the methods that move events, by role.
var streamMethods = [...]string{
	roleSource:    flowctlv1.SourceService_StreamEvents_FullMethodName,
	roleProcessor: flowctlv1.ProcessorService_Process_FullMethodName,
	roleSink:      flowctlv1.ConsumerService_Consume_FullMethodName,
}

// brokenStream is a stream that did not end with OK, with so many events in flight at most.
type brokenStream struct {
	err      error
	inFlight int
}

func (b *brokenStream) Error() string { return b.err.Error() }
func (b *brokenStream) Unwrap() error { return b.err }

// inFlight returns how many events may be lost with a stream. What a component has sent and flowctl has not
// received is no more than fits into the window and its buffer, by the mean size of those before, in bytes.
func inFlight(role Role, sent *flight, mean int) int {
	n := sent.events()
	if role != roleSink && mean > 0 {
		n += (recvWindow+peerBuffer)/mean + 1
	}
	if role == roleProcessor {
		n = min(n, sent.count)
	}
	return n
}

// dialComponent returns a connection to endpoint, which opens itself when it is used.
func dialComponent(endpoint string) (*grpc.ClientConn, *windowConn, error) {
	peer := &windowConn{}
	dial := func(ctx context.Context, addr string) (net.Conn, error) {
		network := "tcp"
		if path, ok := strings.CutPrefix(addr, "unix:"); ok {
			network, addr = "unix", strings.TrimPrefix(path, "//")
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		if peer.Conn != nil {
			conn.Close()
			return nil, errors.New("its connection has ended") // what was taken is counted for one
		}
		peer.Conn = conn
		return peer, nil
	}
	conn, err := grpc.NewClient("passthrough:///"+componentAddress(endpoint), grpc.WithContextDialer(dial), grpc.WithNoProxy(), grpc.WithDisableRetry(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStaticStreamWindowSize(recvWindow), grpc.WithStaticConnWindowSize(2*recvWindow))
	return conn, peer, err
}

// componentAddress returns the address of the endpoint that a component has registered. One that names no
// host, or all of its machine, is on this machine.
func componentAddress(endpoint string) string {
	for _, scheme := range []string{"http://", "grpc://", "tcp://", "dns:///"} {
		endpoint = strings.TrimPrefix(endpoint, scheme)
	}
	host, port, err := net.SplitHostPort(endpoint)
	if err == nil && slices.Contains([]string{"", "0.0.0.0", "::"}, host) {
		return net.JoinHostPort("localhost", port)
	}
	return endpoint
}

// registered waits until n has registered, and returns what it said.
func (n *eventNode) registered(ctx context.Context) (member relayMember, err error) {
	err = n.await(ctx, func() (bool, error) {
		if member = n.member; n.leaving == leavingEver {
			return false, errLeft
		}
		return member.endpoint != "" && n.leaving != leavingOnce, nil
	})
	return member, err
}

// await waits until ready, which needs relay.mu, is true or fails.
func (n *eventNode) await(ctx context.Context, ready func() (bool, error)) error {
	for {
		n.relay.mu.Lock()
		ok, err := ready()
		n.relay.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-n.changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ask asks n by GetInfo whether it serves events. It fails with errOwn where n does not.
func (n *eventNode) ask(ctx context.Context, conn *grpc.ClientConn, role Role) (err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	switch role {
	case roleSource:
		_, err = flowctlv1.NewSourceServiceClient(conn).GetInfo(ctx, &emptypb.Empty{})
	case roleProcessor:
		_, err = flowctlv1.NewProcessorServiceClient(conn).GetInfo(ctx, &emptypb.Empty{})
	case roleSink:
		_, err = flowctlv1.NewConsumerServiceClient(conn).GetInfo(ctx, &emptypb.Empty{})
	}
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	switch {
	case n.state != streamAsking:
		return err
	case status.Code(err) == codes.Unimplemented:
		n.relay.decideLocked(n, streamOwn)
		return errOwn
	case err == nil:
		n.relay.decideLocked(n, streamWaiting)
	}
	return err
}

// awaitOthers waits until the streams of all that read from n are open, and until it is known of one that n reads
// from that it serves events. It fails with errOwn where there is nobody to move events to or from.
func (n *eventNode) awaitOthers(ctx context.Context) error {
	return n.await(ctx, func() (bool, error) {
		in, out := *n.in.Load(), *n.out.Load()
		isSource := n.member.role == roleSource
		switch {
		case n.leaving != staying:
			return false, errLeft
		case n.state != streamWaiting:
			return true, nil
		case isSource && len(out) == 0, !isSource && len(in) == 0:
			n.relay.decideLocked(n, streamOwn)
			return false, errOwn
		}
		serves := isSource || slices.ContainsFunc(in, func(e *edge) bool { return e.from.state != streamAsking })
		return serves && !slices.ContainsFunc(out, func(e *edge) bool { return e.to.state < streamOpen }), nil
	})
}

// request returns what StreamEvents is asked, nil for other roles. After a break the source is asked for its token.
func (n *eventNode) request(ctx context.Context, conn *grpc.ClientConn, member *relayMember) (*event, error) {
	if member.role != roleSource {
		return nil, nil
	}
	request := &flowctlv1.StreamRequest{Params: member.params}
	n.relay.mu.Lock()
	again := n.state == streamOpen
	n.relay.mu.Unlock()
	if again {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		state, err := flowctlv1.NewSourceServiceClient(conn).GetState(ctx, &flowctlv1.StateRequest{})
		if err != nil && status.Code(err) != codes.Unimplemented {
			return nil, fmt.Errorf("GetState: %w", err)
		}
		request.ResumeToken = state.GetResumeToken()
		request.Resume = request.ResumeToken != ""
	}
	data, err := proto.Marshal(request)
	return (*event)(&data), err
}

// opening notes that the streams of n are open.
func (n *eventNode) opening(ctx context.Context, cancel context.CancelFunc) {
	r := n.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.state == streamOpen && n.tries <= 1 {
		n.log.Info("its events are moved again")
	}
	n.state, n.stream, n.cancel = streamOpen, ctx, cancel
	if n.leaving != staying {
		r.drainLocked(n)
	}
	if n.enough {
		cancel()
	}
	r.tellLocked()
}

// closing notes that they are not.
func (n *eventNode) closing() {
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	n.stream, n.cancel = nil, nil
	wake(n.relay.wake)
}

// send sends what StreamEvents is asked, or the events of all edges that lead to n, and then ends that side of the stream.
func (n *eventNode) send(ctx context.Context, stream grpc.ClientStream, request *event, flight *flight) {
	if request != nil {
		_ = stream.SendMsg(request) // where it fails, so does receive
		_ = stream.CloseSend()
		return
	}
	for turn := 0; ; turn++ {
		if n.unsent == nil {
			ev, ok := n.next(ctx, turn)
			if !ok {
				_ = stream.CloseSend()
				return
			}
			n.unsent = &ev
		}
		if stream.SendMsg(n.unsent) != nil {
			return
		}
		flight.note(len(*n.unsent))
		n.unsent = nil
	}
}

// next waits for the next event of the edges to n, which take turns. It is false when there will be none: all
// have ended, or n is about to be stopped and those that have not ended are left alone.
func (n *eventNode) next(ctx context.Context, turn int) (event, bool) {
	for {
		leaves := n.isLeaving()
		in, ended := *n.in.Load(), 0
		for i := range in {
			e := in[(turn+i)%len(in)]
			if leaves && !e.isClosed() {
				ended++
				continue
			}
			ev, ok, over := e.take()
			if ok {
				return ev, true
			}
			if over {
				ended++
			}
		}
		if ended == len(in) {
			return nil, false
		}
		select {
		case <-n.filled:
		case <-ctx.Done():
			return nil, false
		}
	}
}

// receive takes what n sends until its stream ends, and returns the mean size of its events in bytes. It returns
// nil for an end with OK, and where nobody wants more.
func (n *eventNode) receive(ctx context.Context, stream grpc.ClientStream, role Role) (mean int, err error) {
	count, bytes := 0, 0
	for {
		var ev event
		err := stream.RecvMsg(&ev)
		if err == nil && role == roleSink {
			n.consumed(ev)
			return 0, nil
		}
		if err == nil {
			count, bytes = count+1, bytes+len(ev)
			err = n.deliver(ctx, ev)
		}
		if err != nil {
			if errors.Is(err, io.EOF) || n.hasEnough() {
				err = nil
			}
			return bytes / max(count, 1), err
		}
	}
}

// deliver puts an event of n to all who want it.
func (n *eventNode) deliver(ctx context.Context, ev event) error {
	var kind []byte
	known, wanted := false, false
	for _, e := range *n.out.Load() {
		if wants := e.wants.Load(); wants != nil {
			if !known {
				kind, known = ev.kind(), true
			}
			if !(*wants)[string(kind)] {
				continue
			}
		}
		wanted = true
		if err := e.put(ctx, ev); err != nil {
			return err
		}
	}
	n.received.Add(1)
	n.bytes.Add(int64(len(ev)))
	if !wanted {
		n.unwanted.Add(1)
	}
	return nil
}

// consumed takes in what a sink says of the events that it got.
func (n *eventNode) consumed(answer event) {
	var out flowctlv1.ConsumeResponse
	if err := proto.Unmarshal(answer, &out); err != nil {
		n.log.Warn("its ConsumeResponse cannot be read", "err", err)
		return
	}
	if out.GetEventsFailed() > 0 {
		n.log.Warn("events failed", "failed", out.GetEventsFailed(), "consumed", out.GetEventsConsumed(), "errors", printable(enumerate(out.GetErrors())))
	}
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	n.failed += out.GetEventsFailed()
}

// works notes that a stream of n lasts.
func (n *eventNode) works() {
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	if n.tries, n.tried = 0, (time.Time{}); n.cause != "" {
		n.cause = ""
		wake(n.relay.wake)
	}
}

func (n *eventNode) isLeaving() bool {
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	return n.leaving != staying
}

func (n *eventNode) hasEnough() bool {
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	return n.enough
}

// judge decides what follows from the end of a session: the pause before the next, or that this was the last.
func (n *eventNode) judge(err error, now time.Time) (pause time.Duration, over bool) {
	r := n.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	broken, isBroken := errors.AsType[*brokenStream](err)
	if isBroken {
		n.lost += int64(broken.inFlight)
	}
	switch {
	case errors.Is(err, errOwn):
		return 0, true
	case err == nil && n.leaving != leavingOnce, err != nil && n.leaving == leavingEver:
		if level := slog.LevelWarn; isBroken && broken.inFlight > 0 {
			if n.member.role == roleSource { // it is asked to stop, and decides what it still sends
				level = slog.LevelInfo
			}
			n.log.Log(r.ctx, level, "its stream broke as it ended", "in_flight", upTo(broken.inFlight), "err", streamError(err))
		}
		r.endLocked(n)
		return 0, true
	case err == nil:
		return 0, false // registered waits for its next process
	}
	if n.tried.IsZero() {
		n.tried = now
	}
	n.tries++
	pause = min(minRetry<<min(n.tries-1, 10), maxRetry)
	switch {
	case isBroken:
		n.log.Warn("its stream broke", "in_flight", upTo(broken.inFlight), "err", streamError(err), "again_in", pause)
	case n.state == streamAsking && now.Sub(n.tried) >= askTimeout && !n.told:
		n.told = true
		n.log.Warn("its events cannot be moved yet", "endpoint", n.member.endpoint, "err", streamError(err))
	}
	if n.state != streamAsking && n.tries >= illTries && now.Sub(n.tried) >= illTime {
		n.cause = "its events cannot be moved: " + streamError(err)
		wake(r.wake)
	}
	return pause, false
}

// upTo says how many events may be lost.
func upTo(events int) string { return fmt.Sprintf("up to %d events", events) }

// streamError is err in the words of the component, where it has some.
func streamError(err error) string {
	said, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err)
	if !ok {
		return printable(err.Error())
	}
	s := said.GRPCStatus()
	text := fmt.Sprintf("%s: %s", s.Code(), s.Message())
	if s.Code() == codes.ResourceExhausted { // grpc says so of an event that is too large, too
		text += " (see -max-event-bytes)"
	}
	return printable(text)
}
