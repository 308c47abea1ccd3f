package main

// What callers can make the control plane hold, and what keeps it within that. A bound
// for the whole control plane comes first, as a caller can open more connections. Strangers,
// flowctl's own with the components, and operators each have such bounds to themselves, so
// that nobody waits for who is trusted less. Where one is reached, the oldest of the same makes
// room: who does not go on loses to who comes. docs/architecture.md has the constants as a table.

import (
	"cmp"
	"container/list"
	"context"
	"log/slog"
	"net"
	"path"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"
)

// For the whole control plane. Those from maxCalls to maxOtherStreams hold for each share.
const (
	maxConnections  = 16 << 10  // half of the descriptors that the process may open, where that is less
	maxCalls        = 2 << 10   // at a time; another is refused
	maxLists        = 128       // that wait for their turn, as one is made at a time; another is refused
	maxUnfinished   = 512       // requests of which a part is yet to come, of maxMessage each at most
	maxUnread       = 16 << 20  // bytes of large answers that have not been sent, as they are not read; the last may go beyond
	maxFollowers    = 64        // streams of changes, and as many of snapshots; another is refused
	maxOtherStreams = 256       // streams of grpc.health.v1 and of reflection
	maxServices     = 128 << 10 // that are not of the pipeline
	maxOtherBytes   = 48 << 20  // of all that those say of themselves, with their metrics: a write of the state file takes less than a second
)

// For the records that callers keep of runs of their own.
const (
	maxCallerRuns     = 256
	maxCallerRunBytes = 1 << 20 // of all as messages, with who keeps them; each is a few of maxMessage at most
)

// For a run, where what is not of the pipeline is a guest.
const (
	maxGuestConnections = 1 << 10 // connections, while one of them is a stranger's
	maxGuests           = 4 << 10
	maxGuestBytes       = 16 << 20
)

// For one connection, message or answer.
const (
	maxStreams    = 128       // calls of a connection at a time
	maxMessage    = 128 << 10 // bytes of a request
	maxHeaders    = 16 << 10  // bytes of the headers of a call
	maxAnswer     = 32 << 20  // bytes of an answer that lists services
	smallAnswer   = 4 << 10   // bytes up to which an answer is not counted in maxUnread
	leastUnread   = 64 << 10  // bytes for which any other is counted, so that they are not many either
	maxPart       = 24 << 10  // bytes of a message of a stream of changes; grpc has buffers of 32 KiB and then of 1 MiB
	maxEdges      = 4 << 10   // edges along which events are moved, in what list is told of a pipeline
	maxDirty      = 8 << 10   // changes that wait for one stream; a stream that is further behind gets a new snapshot
	unreadTimeout = time.Second
	refusalPause  = 50 * time.Millisecond
)

// For events that flowctl moves.
const (
	maxWindow  = 1 << 20   // bytes of events between two components, or one event
	maxWindows = 256 << 20 // bytes of all those; beyond it one event for an edge that has none
	maxEvent   = 64 << 20  // bytes of one event, without -max-event-bytes
)

// For one service.
const (
	maxServiceBytes = 16 << 10 // of all that it says of itself, with its metrics
	maxNames        = 16       // ids under which it is known
	maxFormer       = 8        // connections by which it registered before
	maxEntries      = 256      // metrics, metadata entries or event types
	maxID           = 256      // bytes of an id, an event type, and a key of metrics and metadata
	maxText         = 4 << 10  // bytes of any other text
	maxHistory      = 32       // changes of health that are kept
	maxHeartbeat    = 4 << 10  // metrics of a heartbeat, of which maxEntries at most are kept
)

// traffic is what all callers of a control plane take up together. Its methods may be
// called from any goroutine.
type traffic struct {
	log    *slog.Logger
	warned sync.Map // by bound: when it was last logged that it is reached, in Unix seconds
	shares [rankOperator + 1]*share

	mu             sync.Mutex // guards open
	open           map[*countedConn]struct{}
	maxConnections int
	withStrangers  int // the same, while one of them is a stranger's
}

// share is what the callers of one rank take up together.
type share struct {
	calls      atomic.Int64
	lists      atomic.Int64  // that wait for their turn
	listing    chan struct{} // holds a token while an answer that lists services is made: one at a time
	unfinished crowd
	unread     crowd // by bytes
	streams    crowd // those of maxOtherStreams
}

// newTraffic counts what callers take up. With strangers among them there are most connections.
func newTraffic(log *slog.Logger, most int) *traffic {
	t := &traffic{log: log, open: make(map[*countedConn]struct{}), maxConnections: maxConnections}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil {
		t.maxConnections = int(min(uint64(files.Cur)/2, maxConnections))
	}
	t.withStrangers = min(most, t.maxConnections)
	crowdOf := func(what string, most int, patience time.Duration) crowd {
		return crowd{most: most, patience: patience, full: func() { t.warn(what, most) }, freed: make(chan struct{})}
	}
	for rank := range t.shares {
		t.shares[rank] = &share{
			listing:    make(chan struct{}, 1),
			unfinished: crowdOf("unfinished requests", maxUnfinished, 0),
			unread:     crowdOf("bytes of answers that are not read", maxUnread, unreadTimeout),
			streams:    crowdOf("streams of health and reflection", maxOtherStreams, 0),
		}
	}
	return t
}

// warn logs that the bound of what is reached, once a minute at most of each.
func (t *traffic) warn(what string, most int) {
	now := time.Now().Unix()
	last, _ := t.warned.LoadOrStore(what, int64(0))
	if now-last.(int64) >= 60 && t.warned.CompareAndSwap(what, last, now) {
		t.log.Warn("the control plane is at a bound, the oldest makes room", "bound", what, "at_most", most)
	}
}

// limit returns lis with its connections counted.
func (t *traffic) limit(lis net.Listener) net.Listener { return countedListener{lis, t} }

type countedListener struct {
	net.Listener
	traffic *traffic
}

// countedConn is a connection that traffic counts until it is closed.
type countedConn struct {
	net.Conn
	traffic *traffic
	heard   atomic.Int64 // when something was read last, in Unix nanoseconds
	rank    atomic.Int32 // rankSilent to rankOperator
}

// Whose a connection is, and so what speaks against closing it to make room for another, the
// least first.
const (
	rankSilent    = iota // no call has come by it
	rankCaller           // a stranger's
	rankOwnSilent        // as rankOwn, but no call has come by it
	rankOwn              // the kernel says that flowctl's own user, root or a component of the pipeline is at its other end
	rankOperator         // who may do everything
)

// Accept closes the connection that has to make room where there are too many.
func (l countedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &countedConn{Conn: conn, traffic: l.traffic}
	c.heard.Store(time.Now().UnixNano())
	if other := l.traffic.add(c); other != nil {
		l.traffic.warn("connections", l.traffic.withStrangers)
		other.Close()
	}
	return c, nil
}

// add counts c, and returns the connection that has to make room for it, if one has: of
// those with the lowest rank the one that has said nothing for the longest time. The kernel is
// asked whose that is, where no call has come by it yet.
func (t *traffic) add(c *countedConn) (first *countedConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.open) >= t.withStrangers {
		first = nil
		for other := range t.open {
			if first == nil || other.before(first) {
				first = other
			}
		}
		if first.rank.Load() == rankSilent && isOwnUser(first.Conn) {
			first.raise(rankOwnSilent)
			continue
		}
		if first.rank.Load() >= rankOwnSilent && len(t.open) < t.maxConnections {
			first = nil
		}
		delete(t.open, first)
		break
	}
	t.open[c] = struct{}{}
	return first
}

// before tells whether c makes room before other does.
func (c *countedConn) before(other *countedConn) bool {
	return cmp.Or(cmp.Compare(c.rank.Load(), other.rank.Load()), cmp.Compare(c.heard.Load(), other.heard.Load())) < 0
}

// raise gives c that rank, unless it has a higher one.
func (c *countedConn) raise(rank int32) {
	for has := c.rank.Load(); has < rank && !c.rank.CompareAndSwap(has, rank); {
		has = c.rank.Load()
	}
}

// called notes that a call has come by the connection of ctx, and returns that connection, nil
// for none, with its rank. The kernel is asked at its first call.
func called(ctx context.Context) (*countedConn, int32) {
	p := peerConnOf(ctx)
	if p == nil {
		return nil, rankCaller
	}
	c := countedConnOf(p.conn)
	if c == nil {
		return nil, rankCaller
	}
	switch rank, found := c.rank.Load(), p.found.Load(); {
	case p.operator:
		c.raise(rankOperator)
	case found != nil && found.component != "", rank == rankOwnSilent, rank == rankSilent && isOwnUser(c.Conn):
		c.raise(rankOwn)
	case rank == rankSilent:
		c.raise(rankCaller)
	}
	return c, c.rank.Load()
}

// countedConnOf returns the counted one of the connections that conn is made of, nil for none.
func countedConnOf(conn net.Conn) *countedConn {
	for {
		switch c := conn.(type) {
		case *countedConn:
			return c
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.heard.Store(time.Now().UnixNano())
	return n, err
}

func (c *countedConn) Close() error {
	c.traffic.mu.Lock()
	delete(c.traffic.open, c)
	c.traffic.mu.Unlock()
	return c.Conn.Close()
}

// NetConn returns the connection that is counted.
func (c *countedConn) NetConn() net.Conn { return c.Conn }

// crowd is what takes up room until its connection goes on, the oldest first.
type crowd struct {
	most     int           // in all
	patience time.Duration // how long the oldest has before it makes room
	full     func()        // is called when it does

	mu     sync.Mutex // guards the fields below
	size   int
	queued int           // the size of those in queue
	queue  list.List     // of *crowded whose connections have not been closed
	freed  chan struct{} // closed, and made anew, when there is room again
}

// crowded is a part of a crowd.
type crowded struct {
	conn  *countedConn // nil for none
	size  int
	since time.Time
	place *list.Element // nil once conn has been closed to make room
}

// enter takes up room for what comes by conn, when there is some. The caller has to call leave.
// It fails where ctx ends before.
func (c *crowd) enter(ctx context.Context, conn *countedConn, size int) (*crowded, error) {
	for {
		if err := c.wait(ctx); err != nil {
			return nil, err
		}
		c.mu.Lock()
		if c.size < c.most {
			defer c.mu.Unlock()
			e := &crowded{conn: conn, size: size, since: time.Now()}
			e.place = c.queue.PushBack(e)
			c.size, c.queued = c.size+size, c.queued+size
			return e, nil
		}
		c.mu.Unlock()
	}
}

func (c *crowd) leave(e *crowded) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removeLocked(e)
	if c.size -= e.size; c.size < c.most && c.size+e.size >= c.most {
		close(c.freed)
		c.freed = make(chan struct{})
	}
}

// removeLocked takes e out of the queue. What it takes up is freed by leave.
func (c *crowd) removeLocked(e *crowded) {
	if e.place != nil {
		c.queue.Remove(e.place)
		e.place, c.queued = nil, c.queued-e.size
	}
}

// wait returns when there is room. It fails where ctx ends before.
func (c *crowd) wait(ctx context.Context) error {
	for {
		freed, again := c.room()
		if freed == nil {
			return nil
		}
		select {
		case <-freed:
		case <-again:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// room returns nil where there is room. Else it has the oldest make some, if their time is up,
// and returns what is closed once there is, and what tells when to call again.
func (c *crowd) room() (freed chan struct{}, again <-chan time.Time) {
	var ended []*countedConn
	defer func() { // not under the lock, as it takes a while
		for _, conn := range ended {
			c.full()
			if conn != nil {
				conn.Close()
			}
		}
	}()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.size >= c.most && c.queued >= c.most {
		oldest := c.queue.Front().Value.(*crowded)
		if left := c.patience - time.Since(oldest.since); left > 0 {
			again = time.After(left)
			break
		}
		ended = append(ended, oldest.conn)
		for place := c.queue.Front(); place != nil; { // all that came by it, as it ends now
			e := place.Value.(*crowded)
			place = place.Next()
			if e.conn == oldest.conn {
				c.removeLocked(e)
			}
		}
	}
	if c.size >= c.most {
		freed = c.freed
	}
	return freed, again
}

// options are what a gRPC server needs to be within the bounds.
func (t *traffic) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(answerCodec{encoding.GetCodecV2("proto")}),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.InTapHandle(t.slow),
	}
}

// slow has the connection by which a call comes that will be refused read no further for a
// while: many would ask again at once. No stream has been made for that call yet.
func (t *traffic) slow(ctx context.Context, call *tap.Info) (context.Context, error) {
	conn, rank := called(ctx)
	if conn != nil && rank < rankOwn {
		runtime.Gosched() // so that the calls that came before are counted
	}
	s := t.shares[rank]
	if s.calls.Load() >= maxCalls || s.lists.Load() >= maxLists && listMethods[path.Base(call.FullMethodName)] {
		time.Sleep(refusalPause)
	}
	return ctx, nil
}

// registrar registers services whose calls are counted, each from its headers to its end,
// whatever becomes of its request. So it serves unary methods as streams of one message each
// way, which is the same on the wire.
type registrar struct {
	*grpc.Server
	traffic *traffic
}

func (r registrar) RegisterService(desc *grpc.ServiceDesc, server any) {
	counted := *desc
	counted.Methods, counted.Streams = nil, nil
	for _, s := range desc.Streams {
		handler := s.Handler
		s.Handler = func(server any, stream grpc.ServerStream) error {
			return r.traffic.serve(stream, func(stream countedStream) error {
				if desc.ServiceName == operatorv1.Operator_ServiceDesc.ServiceName { // which has a bound of its own
					return handler(server, stream)
				}
				e, err := stream.share.streams.enter(stream.Context(), stream.conn, 1)
				if err != nil {
					return err
				}
				defer stream.share.streams.leave(e)
				return handler(server, stream)
			})
		}
		counted.Streams = append(counted.Streams, s)
	}
	for _, m := range desc.Methods {
		counted.Streams = append(counted.Streams, grpc.StreamDesc{
			StreamName: m.MethodName,
			Handler: func(server any, stream grpc.ServerStream) error {
				return r.traffic.serve(stream, func(stream countedStream) error { return stream.serveUnary(m, server) })
			},
		})
	}
	r.Server.RegisterService(&counted, server)
}

// serve serves a call, whose request need not be there yet.
func (t *traffic) serve(stream grpc.ServerStream, handler func(countedStream) error) error {
	ctx := stream.Context()
	conn, rank := called(ctx) // a stream may go on for ever
	defer called(ctx)
	s := t.shares[rank]
	defer s.calls.Add(-1)
	if s.calls.Add(1) > maxCalls {
		return status.Errorf(codes.ResourceExhausted, "the control plane has %d calls at a time, the most that it takes", maxCalls)
	}
	return handler(countedStream{stream, conn, s})
}

// countedStream counts its requests among the unfinished ones.
type countedStream struct {
	grpc.ServerStream
	conn  *countedConn // nil for none
	share *share
}

func (s countedStream) RecvMsg(request any) error {
	e, err := s.share.unfinished.enter(s.Context(), s.conn, 1)
	if err != nil {
		return err
	}
	defer s.share.unfinished.leave(e)
	return s.ServerStream.RecvMsg(request)
}

// listMethods have answers that can be large.
var listMethods = map[string]bool{"ListServices": true, "ListComponents": true, "DiscoverComponents": true, "GetPipeline": true, "ListPipelineRuns": true}

// turn waits until a list can be made. The caller has to call done when it has been. Errors:
// RESOURCE_EXHAUSTED where too many wait, and those of ctx.
func (s *share) turn(ctx context.Context) (done func(), err error) {
	defer s.lists.Add(-1)
	if s.lists.Add(1) > maxLists {
		return nil, status.Errorf(codes.ResourceExhausted, "%d lists wait to be made, the most that can", maxLists)
	}
	for {
		if err := s.unread.wait(ctx); err != nil {
			return nil, err
		}
		select {
		case s.listing <- struct{}{}:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		if freed, _ := s.unread.room(); freed == nil {
			return sync.OnceFunc(func() { <-s.listing }), nil
		}
		<-s.listing // somebody else was faster
	}
}

// serveUnary serves a call of the unary method m. A large answer is counted until it has been
// sent, or the caller is gone.
func (s countedStream) serveUnary(m grpc.MethodDesc, server any) error {
	ctx, made := s.Context(), func() {}
	if listMethods[m.MethodName] {
		var err error
		if made, err = s.share.turn(ctx); err != nil {
			return err
		}
		defer made()
	}
	out, err := m.Handler(server, ctx, s.RecvMsg, nil)
	if err != nil {
		return err
	}
	answer := out.(proto.Message)
	size := proto.Size(answer)
	if size <= smallAnswer {
		return s.SendMsg(answer)
	}
	e, err := s.share.unread.enter(ctx, s.conn, max(size, leastUnread))
	if err != nil {
		return err
	}
	defer s.share.unread.leave(e)
	made()
	large := &largeAnswer{answer, make(chan struct{})}
	if err := s.SendMsg(large); err != nil {
		return err
	}
	select {
	case <-large.sent:
	case <-ctx.Done():
	}
	return nil
}

// largeAnswer is an answer that tells when grpc has sent it.
type largeAnswer struct {
	proto.Message
	sent chan struct{} // closed then
}

// answerCodec is grpc's codec of protobuf for large answers too.
type answerCodec struct{ encoding.CodecV2 }

func (c answerCodec) Marshal(message any) (mem.BufferSlice, error) {
	large, ok := message.(*largeAnswer)
	if !ok {
		return c.CodecV2.Marshal(message)
	}
	data, err := proto.Marshal(large.Message)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.NewBuffer(&data, sentPool{large.sent})}, nil
}

// sentPool is the pool of one buffer, which grpc puts back when it has sent it.
type sentPool struct{ sent chan struct{} }

func (p sentPool) Get(length int) *[]byte { return new(make([]byte, length)) }

func (p sentPool) Put(*[]byte) { close(p.sent) }
