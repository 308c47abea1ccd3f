package main

// A stream by which flowctl moves the events of one component: out of a source, through a processor, or into a
// sink.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
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
	askTimeout = 5 * time.Second // for an answer of GetInfo and GetState
	recvWindow = 256 << 10       // bytes of a stream that flowctl has not read yet
	peerBuffer = 64 << 10        // bytes that the sender of a stream holds back, as grpc does
)

// componentConn is a connection to a component that serves events, which opens itself when it is used.
type componentConn struct {
	role Role
	conn *grpc.ClientConn
	peer *windowConn
}

// streamEnds is what the stream of a component connects.
type streamEnds struct {
	request  *event                                   // what a source is asked; nil for the others, which get events
	next     func(ctx context.Context) (*event, bool) // waits for the next event to send; false where none will come
	sent     func()                                   // the last one was sent
	deliver  func(event) error                        // takes one that has come; it is freed after that
	consumed func(*flowctlv1.ConsumeResponse)         // takes what a sink says
}

// dialComponent returns a connection to the endpoint that a component has registered.
func dialComponent(endpoint string, role Role) (*componentConn, error) {
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
	return &componentConn{role, conn, peer}, err
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

// serves asks by GetInfo whether the component serves events: UNIMPLEMENTED says that it does not.
func (c *componentConn) serves(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	switch c.role {
	case roleSource:
		_, err = flowctlv1.NewSourceServiceClient(c.conn).GetInfo(ctx, &emptypb.Empty{})
	case roleProcessor:
		_, err = flowctlv1.NewProcessorServiceClient(c.conn).GetInfo(ctx, &emptypb.Empty{})
	case roleSink:
		_, err = flowctlv1.NewConsumerServiceClient(c.conn).GetInfo(ctx, &emptypb.Empty{})
	}
	return err
}

// request returns what StreamEvents is to be asked. To go on after a break the source is asked for its token.
func (c *componentConn) request(ctx context.Context, params map[string]string, again bool) (*event, error) {
	request := &flowctlv1.StreamRequest{Params: params}
	if again {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		state, err := flowctlv1.NewSourceServiceClient(c.conn).GetState(ctx, &flowctlv1.StateRequest{})
		if err != nil && status.Code(err) != codes.Unimplemented {
			return nil, fmt.Errorf("GetState: %w", err)
		}
		request.ResumeToken = state.GetResumeToken()
		request.Resume = request.ResumeToken != ""
	}
	data, err := proto.Marshal(request)
	return new(newEvent(data)), err
}

// streamMethods are the methods that move events, by role.
var streamMethods = [...]string{
	roleSource:    flowctlv1.SourceService_StreamEvents_FullMethodName,
	roleProcessor: flowctlv1.ProcessorService_Process_FullMethodName,
	roleSink:      flowctlv1.ConsumerService_Consume_FullMethodName,
}

// open opens the stream. An event of more than so many bytes breaks it.
func (c *componentConn) open(ctx context.Context, maxEvent int) (grpc.ClientStream, error) {
	c.peer.taken.Store(0)
	return c.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: c.role != roleSource, ServerStreams: c.role != roleSink},
		streamMethods[c.role], grpc.ForceCodecV2(eventCodec{}), grpc.MaxCallRecvMsgSize(maxEvent), grpc.MaxCallSendMsgSize(maxEvent))
}

// move moves events by an open stream until it ends, which ctx has it do too. It returns nil when the component
// has ended it with OK, the error of deliver, or a *brokenStream.
func (c *componentConn) move(ctx context.Context, stream grpc.ClientStream, ends streamEnds) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sent := &flight{conn: c.peer}
	var sending sync.WaitGroup
	sending.Go(func() { send(ctx, stream, ends, sent) })
	mean, err := c.receive(stream, ends)
	cancel()
	sending.Wait()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return &brokenStream{err, c.inFlight(sent, mean)}
}

// send sends what a source is asked, or all that comes, and then ends that side of the stream. Where it fails,
// receive does too, and says why.
func send(ctx context.Context, stream grpc.ClientStream, ends streamEnds, flight *flight) {
	if ends.request != nil {
		_ = stream.SendMsg(*ends.request)
		_ = stream.CloseSend()
		return
	}
	for {
		ev, ok := ends.next(ctx)
		if !ok {
			_ = stream.CloseSend()
			return
		}
		if stream.SendMsg(*ev) != nil {
			return
		}
		flight.note(ev.Len())
		ends.sent()
	}
}

// receive takes what comes until the stream ends, by io.EOF where it ends with OK, and returns the mean size of
// events in bytes.
func (c *componentConn) receive(stream grpc.ClientStream, ends streamEnds) (mean int, err error) {
	count, bytes := 0, 0
	for {
		var ev event
		if err = stream.RecvMsg(&ev); err != nil {
			break
		}
		if c.role == roleSink {
			var answer flowctlv1.ConsumeResponse
			if err = proto.Unmarshal(ev.ReadOnlyData(), &answer); err != nil {
				return 0, fmt.Errorf("its ConsumeResponse cannot be read: %w", err)
			}
			ends.consumed(&answer)
			return 0, io.EOF
		}
		count, bytes = count+1, bytes+ev.Len()
		err = ends.deliver(ev)
		if ev.Free(); err != nil {
			break
		}
	}
	return bytes / max(count, 1), err
}

// brokenStream is a stream that did not end with OK, with so many events in flight at most.
type brokenStream struct {
	err      error
	inFlight int
}

func (b *brokenStream) Error() string { return b.err.Error() }
func (b *brokenStream) Unwrap() error { return b.err }

// inFlight returns how many events may be lost with the stream. What a component has sent and flowctl has not
// received is no more than fits into the window and its buffer, by the mean size of those before, in bytes.
func (c *componentConn) inFlight(sent *flight, mean int) int {
	n := sent.events()
	if c.role != roleSink && mean > 0 {
		n += (recvWindow+peerBuffer)/mean + 1
	}
	if c.role == roleProcessor {
		n = min(n, sent.count)
	}
	return n
}

// streamError is err in the words of the component, where it has some.
func streamError(err error) string {
	answered, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err)
	if !ok {
		return printable(err.Error())
	}
	s := answered.GRPCStatus()
	text := said(fmt.Sprintf("%s: %s", s.Code(), s.Message()))
	if s.Code() == codes.ResourceExhausted { // grpc says so of an event that is too large, too
		text += " (see -max-event-bytes)"
	}
	return text
}

// said is a text of a component, fit to be shown and no longer than one that it registers with.
func said(text string) string { return printable(text[:min(len(text), maxText)]) }
