package main

// What callers can make the control plane hold, and what keeps it within that. A bound
// for the whole control plane comes first, as a caller can open more connections. Where
// such a bound is reached, the oldest makes room: who does not go on loses to who comes,
// and a component of the pipeline to nobody. docs/architecture.md has the constants as a table.

import (
	"cmp"
	"container/list"
	"context"
	"log/slog"
	"net"
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
	"google.golang.org/protobuf/proto"
)

// For the whole control plane.
const (
	maxConnections  = 16 << 10 // half of the descriptors that the process may open, where that is less
	maxCalls        = 16 << 10 // at a time; another is refused
	maxUnfinished   = 512      // requests of which a part is yet to come, of maxMessage each at most
	maxUnread       = 64 << 20 // bytes of large answers that have not been sent, as they are not read
	maxFollowers    = 256      // streams of changes, and as many of snapshots; another is refused
	maxOtherStreams = 256      // streams of grpc.health.v1 and of reflection
	maxServices     = 128 << 10
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
	maxDirty      = 8 << 10   // changes that wait for one stream; a stream that is further behind gets a new snapshot
	unreadTimeout = time.Second
)

// For one service.
const (
	maxServiceBytes = 16 << 10 // of all that it says of itself, with its metrics
	maxNames        = 16       // ids under which it is known
	maxEntries      = 256      // metrics, metadata entries or event types
	maxID           = 256      // bytes of an id, an event type, and a key of metrics and metadata
	maxText         = 4 << 10  // bytes of any other text
	maxHistory      = 32       // changes of health that are kept
	maxHeartbeat    = 4 << 10  // metrics of a heartbeat, of which maxEntries at most are kept
)

// traffic is what all callers of a control plane take up together. Its methods may be
// called from any goroutine.
type traffic struct {
	log        *slog.Logger
	warned     sync.Map // by bound: when it was last logged that it is reached, in Unix seconds
	calls      atomic.Int64
	unfinished crowd
	unread     crowd         // by bytes
	streams    crowd         // those of maxOtherStreams
	listing    chan struct{} // holds a token while an answer that lists services is made: one at a time

	mu             sync.Mutex // guards open
	open           map[*countedConn]struct{}
	maxConnections int
}

func newTraffic(log *slog.Logger) *traffic {
	t := &traffic{log: log, listing: make(chan struct{}, 1), open: make(map[*countedConn]struct{}), maxConnections: maxConnections}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil {
		t.maxConnections = int(min(uint64(files.Cur)/2, maxConnections))
	}
	t.unfinished = crowd{most: maxUnfinished, full: func() { t.warn("unfinished requests", maxUnfinished) }}
	t.unread = crowd{most: maxUnread, patience: unreadTimeout, full: func() { t.warn("bytes of answers that are not read", maxUnread) }}
	t.streams = crowd{most: maxOtherStreams, full: func() { t.warn("streams of health and reflection", maxOtherStreams) }}
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
	rank    atomic.Int32 // rankSilent, rankCaller or rankComponent
}

// What speaks against closing a connection to make room for another, the least first.
const (
	rankSilent    = iota // no call has come by it
	rankCaller           // it has been used for a call
	rankComponent        // the kernel says that a component of the pipeline is at its other end
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
		l.traffic.warn("connections", l.traffic.maxConnections)
		other.Close()
	}
	return c, nil
}

// add counts c, and returns the connection that has to make room for it, if one has: of
// those with the lowest rank the one that has said nothing for the longest time.
func (t *traffic) add(c *countedConn) (first *countedConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.open) >= t.maxConnections {
		for other := range t.open {
			if first == nil || other.before(first) {
				first = other
			}
		}
		delete(t.open, first)
	}
	t.open[c] = struct{}{}
	return first
}

// before tells whether c makes room before other does.
func (c *countedConn) before(other *countedConn) bool {
	return cmp.Or(cmp.Compare(c.rank.Load(), other.rank.Load()), cmp.Compare(c.heard.Load(), other.heard.Load())) < 0
}

// called notes that a call has come by the connection of ctx, and from whom if that is known.
func called(ctx context.Context) {
	p := peerConnOf(ctx)
	if p == nil {
		return
	}
	rank := int32(rankCaller)
	if found := p.found.Load(); found != nil && found.component != "" {
		rank = rankComponent
	}
	for conn := p.conn; ; {
		switch c := conn.(type) {
		case *countedConn:
			c.rank.Store(rank)
			return
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return
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
	patience time.Duration // how long to wait for room before the oldest has to make it
	full     func()        // is called before that

	mu    sync.Mutex // guards the fields below
	size  int
	queue list.List     // of crowded
	freed chan struct{} // closed at the next leave; nil where nobody waits
}

// crowded is a part of a crowd.
type crowded struct {
	conn net.Conn // nil for none
	size int
}

// enter takes up room for what comes by conn. The caller has to call leave. It fails where
// ctx ends before there is room.
func (c *crowd) enter(ctx context.Context, conn net.Conn, size int) (*list.Element, error) {
	var late <-chan time.Time
	for over := c.patience == 0; ; {
		c.mu.Lock()
		for over && c.size+size > c.most && c.queue.Len() > 0 {
			c.full()
			c.endOldestLocked()
		}
		if c.size+size <= c.most || c.queue.Len() == 0 {
			defer c.mu.Unlock()
			c.size += size
			return c.queue.PushBack(crowded{conn, size}), nil
		}
		if c.freed == nil {
			c.freed = make(chan struct{})
		}
		freed := c.freed
		c.mu.Unlock()
		if late == nil {
			late = time.After(c.patience)
		}
		select {
		case <-freed:
		case <-late:
			over = true
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// endOldestLocked closes the connection of the oldest. What else came by it leaves later.
func (c *crowd) endOldestLocked() {
	oldest := c.queue.Front()
	c.removeLocked(oldest)
	if conn := oldest.Value.(crowded).conn; conn != nil {
		conn.Close()
	}
}

func (c *crowd) leave(e *list.Element) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removeLocked(e)
}

// removeLocked takes e out, if it has not been ended.
func (c *crowd) removeLocked(e *list.Element) {
	if before := c.queue.Len(); c.queue.Remove(e) == nil || c.queue.Len() == before {
		return
	}
	c.size -= e.Value.(crowded).size
	if c.freed != nil {
		close(c.freed)
		c.freed = nil
	}
}

// options are what a gRPC server needs to be within the bounds.
func (t *traffic) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(answerCodec{encoding.GetCodecV2("proto")}),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
	}
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
		if desc.ServiceName != operatorv1.Operator_ServiceDesc.ServiceName { // which has a bound of its own
			handler = r.traffic.bounded(handler)
		}
		s.Handler = func(server any, stream grpc.ServerStream) error { return r.traffic.serve(server, stream, handler) }
		counted.Streams = append(counted.Streams, s)
	}
	for _, m := range desc.Methods {
		unary := func(server any, stream grpc.ServerStream) error { return r.traffic.serveUnary(m, server, stream) }
		counted.Streams = append(counted.Streams, grpc.StreamDesc{
			StreamName: m.MethodName,
			Handler:    func(server any, stream grpc.ServerStream) error { return r.traffic.serve(server, stream, unary) },
		})
	}
	r.Server.RegisterService(&counted, server)
}

// serve serves a call, whose request need not be there yet.
func (t *traffic) serve(server any, stream grpc.ServerStream, handler grpc.StreamHandler) error {
	called(stream.Context()) // a stream may go on for ever
	defer called(stream.Context())
	defer t.calls.Add(-1)
	if t.calls.Add(1) > maxCalls {
		return status.Errorf(codes.ResourceExhausted, "the control plane has %d calls at a time, the most that it takes", maxCalls)
	}
	return handler(server, countedStream{stream, t})
}

// bounded counts the calls of handler among the streams that nothing else bounds.
func (t *traffic) bounded(handler grpc.StreamHandler) grpc.StreamHandler {
	return func(server any, stream grpc.ServerStream) error {
		e, err := t.streams.enter(stream.Context(), connOf(stream.Context()), 1)
		if err != nil {
			return err
		}
		defer t.streams.leave(e)
		return handler(server, stream)
	}
}

// countedStream counts its requests among the unfinished ones.
type countedStream struct {
	grpc.ServerStream
	traffic *traffic
}

func (s countedStream) RecvMsg(request any) error {
	e, err := s.traffic.unfinished.enter(s.Context(), connOf(s.Context()), 1)
	if err != nil {
		return err
	}
	defer s.traffic.unfinished.leave(e)
	return s.ServerStream.RecvMsg(request)
}

// connOf returns the connection that the call of ctx came by, nil if it came by none.
func connOf(ctx context.Context) net.Conn {
	if p := peerConnOf(ctx); p != nil {
		return p.conn
	}
	return nil
}

// listMethods have answers that can be large.
var listMethods = map[string]bool{"ListServices": true, "ListComponents": true, "DiscoverComponents": true, "GetPipeline": true}

// serveUnary serves a call of the unary method m. A large answer is counted until it has been
// sent, or the caller is gone.
func (t *traffic) serveUnary(m grpc.MethodDesc, server any, stream grpc.ServerStream) error {
	ctx := stream.Context()
	made := func() {}
	if listMethods[m.MethodName] {
		select {
		case t.listing <- struct{}{}:
			made = sync.OnceFunc(func() { <-t.listing })
			defer made()
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	out, err := m.Handler(server, ctx, stream.RecvMsg, nil)
	if err != nil {
		return err
	}
	answer := out.(proto.Message)
	size := proto.Size(answer)
	if size <= smallAnswer {
		return stream.SendMsg(answer)
	}
	e, err := t.unread.enter(ctx, connOf(ctx), max(size, leastUnread))
	if err != nil {
		return err
	}
	defer t.unread.leave(e)
	made()
	large := &largeAnswer{answer, make(chan struct{})}
	if err := stream.SendMsg(large); err != nil {
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
