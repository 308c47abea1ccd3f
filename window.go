package main

// What is on its way from one component to the next: events as bytes, the windows of edges, and how much of
// what was sent a component has taken.

import (
	"context"
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// event is a message as it was received. Its bytes lie in a buffer that is used again once all have freed it who
// hold it: each holder of an event that passes it on and keeps it takes a reference. One that is forgotten is garbage.
type event struct{ mem.Buffer }

// eventBuffers are buffers of 2 KiB to 64 MiB, each twice as large as the one before.
var eventBuffers = sync.OnceValue(func() mem.BufferPool {
	pool, err := mem.NewBinaryTieredBufferPool(11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26)
	if err != nil {
		panic(err) // of the numbers above
	}
	return pool
})

// eventCost is what an event takes in a window beside its bytes: its place in the queue, and its buffer's head.
const eventCost = 64 // bytes

// newEvent returns an event with those bytes, which are no longer the caller's.
func newEvent(data []byte) event { return event{mem.SliceBuffer(data)} }

// eventTypeField is the number of the field type of a flowctl.v1.Event.
const eventTypeField = 2

// kind returns the type of an event, nil for none and for what is no event. It is part of the event.
func (ev event) kind() (kind []byte) {
	for rest := ev.ReadOnlyData(); len(rest) > 0; {
		number, wire, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return nil
		}
		rest = rest[n:]
		if n = protowire.ConsumeFieldValue(number, wire, rest); n < 0 {
			return nil
		}
		if number == eventTypeField && wire == protowire.BytesType {
			kind, _ = protowire.ConsumeBytes(rest) // the last one counts, as everywhere in protobuf
		}
		rest = rest[n:]
	}
	return kind
}

// eventCodec passes messages on as bytes.
type eventCodec struct{}

func (eventCodec) Name() string { return "proto" }

func (eventCodec) Marshal(v any) (mem.BufferSlice, error) {
	ev := v.(event)
	ev.Ref() // grpc frees it
	return mem.BufferSlice{ev.Buffer}, nil
}

func (eventCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if mem.IsBelowBufferPoolingThreshold(data.Len()) { // a buffer so small would not be used again
		*v.(*event) = newEvent(data.Materialize())
		return nil
	}
	buffer := eventBuffers().Get(data.Len())
	data.CopyTo(*buffer)
	*v.(*event) = event{mem.NewBuffer(buffer, eventBuffers())}
	return nil
}

// windows are those of all edges. Its mutex guards them.
type windows struct {
	most  int // bytes in all of them, set once
	mu    sync.Mutex
	used  int     // bytes in all of them
	short []*edge // whose writers wait because all windows together are full
}

// edge leads the events of one component to another that reads them. It has one writer and one reader.
type edge struct {
	from, to string
	windows  *windows
	filled   chan struct{}                   // gets a token when the reader finds an event, or the end
	room     chan struct{}                   // gets a token when the writer may try again
	wants    atomic.Pointer[map[string]bool] // event types; nil for all

	// relay.mu guards these.
	looked    int64     // events at the last look at rates
	perSecond float64   // then
	warned    time.Time // of the wait that was told of

	// windows.mu guards the fields below.
	queue   []event // those from head on
	head    int
	bytes   int       // in queue, with eventCost for each
	events  int64     // that the reader was sent
	moved   int64     // bytes of those
	waiting time.Time // since when the writer waits, zero while it does not
	closed  bool      // nothing more will be put
	refused bool      // the reader wants no more
}

// want has the reader get events of those types alone, of all where there are none.
func (e *edge) want(kinds []string) {
	if len(kinds) == 0 {
		e.wants.Store(nil)
		return
	}
	wants := make(map[string]bool)
	for _, kind := range kinds {
		wants[kind] = true
	}
	e.wants.Store(&wants)
}

// put waits for room and puts ev, of which it takes a reference, unless the reader wants no more. An edge that is empty takes one
// event however large, and however full the others are: else what is between them could wait for ever.
func (e *edge) put(ctx context.Context, ev event) error {
	w, size := e.windows, ev.Len()+eventCost
	for {
		w.mu.Lock()
		switch {
		case e.refused:
			e.waiting = time.Time{}
			w.mu.Unlock()
			return nil
		case e.head == len(e.queue) || e.bytes+size <= maxWindow && w.used+size <= w.most:
			ev.Ref()
			e.compactLocked()
			e.queue = append(e.queue, ev)
			e.bytes += size
			w.used += size
			e.waiting = time.Time{}
			w.mu.Unlock()
			wake(e.filled)
			return nil
		case e.bytes+size <= maxWindow:
			w.short = append(w.short, e)
		}
		if e.waiting.IsZero() {
			e.waiting = time.Now()
		}
		w.mu.Unlock()
		select {
		case <-e.room:
		case <-ctx.Done():
			w.mu.Lock()
			e.waiting = time.Time{}
			w.mu.Unlock()
			return ctx.Err()
		}
	}
}

// compactLocked makes room in a full queue of the places that take has left: one of a reader that is always behind
// is never empty, and would grow for ever.
func (e *edge) compactLocked() {
	if len(e.queue) < cap(e.queue) || e.head <= len(e.queue)/2 {
		return
	}
	n := copy(e.queue, e.queue[e.head:])
	clear(e.queue[n:])
	e.queue, e.head = e.queue[:n], 0
}

// take returns the next event, which the caller frees. Without one it tells whether none will come.
func (e *edge) take() (ev event, ok, over bool) {
	w := e.windows
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.head == len(e.queue) {
		return event{}, false, e.closed || e.refused
	}
	ev, e.queue[e.head] = e.queue[e.head], event{}
	if e.head++; e.head == len(e.queue) {
		e.queue, e.head = e.queue[:0], 0
	}
	e.freeLocked(ev.Len() + eventCost)
	e.events++
	e.moved += int64(ev.Len())
	return ev, true, false
}

// freeLocked takes so many bytes out of the window of e. The writer is woken when half of it is free, so that
// the two do not take turns for each event.
func (e *edge) freeLocked(bytes int) {
	w := e.windows
	e.bytes -= bytes
	w.used -= bytes
	if e.bytes <= maxWindow/2 {
		wake(e.room)
	}
	for _, other := range w.short {
		wake(other.room)
	}
	w.short = w.short[:0]
}

// close has the reader's stream end after the last event.
func (e *edge) close() {
	e.windows.mu.Lock()
	e.closed = true
	e.windows.mu.Unlock()
	wake(e.filled)
}

// refuse has nothing more put, and returns how many events were on their way.
func (e *edge) refuse() (dropped int) {
	e.windows.mu.Lock()
	dropped = len(e.queue) - e.head
	for _, ev := range e.queue[e.head:] {
		ev.Free()
	}
	e.refused, e.queue, e.head = true, nil, 0
	e.freeLocked(e.bytes)
	e.windows.mu.Unlock()
	return dropped
}

// reopen has e carry events again, unless it is closed.
func (e *edge) reopen(closed bool) {
	e.windows.mu.Lock()
	defer e.windows.mu.Unlock()
	e.closed, e.refused = closed, false
}

// isClosed tells whether nothing more will be put.
func (e *edge) isClosed() bool {
	e.windows.mu.Lock()
	defer e.windows.mu.Unlock()
	return e.closed
}

// isRefused tells whether the reader wants no more.
func (e *edge) isRefused() bool {
	e.windows.mu.Lock()
	defer e.windows.mu.Unlock()
	return e.refused
}

// counts returns how much the reader was sent, and since when the writer waits for room, zero while it does not.
func (e *edge) counts() (events, bytes int64, waiting time.Time) {
	e.windows.mu.Lock()
	defer e.windows.mu.Unlock()
	return e.events, e.moved, e.waiting
}

// flight is what was sent on a stream and may not have been taken. One goroutine at a time uses it.
type flight struct {
	conn  *windowConn
	ends  []int64 // where each event that is not taken ends, in bytes of the stream
	sent  int64   // bytes
	count int     // events
}

// note notes that a message of so many bytes was sent.
func (f *flight) note(bytes int) {
	const prefix = 5 // of a message of gRPC
	f.land()
	f.sent += int64(bytes + prefix)
	f.count++
	f.ends = append(f.ends, f.sent)
}

// land drops what has been taken.
func (f *flight) land() {
	taken, n := f.conn.taken.Load(), 0
	for n < len(f.ends) && f.ends[n] <= taken {
		n++
	}
	f.ends = f.ends[n:]
}

// events returns how many events may be lost with the stream: those not taken, and the one that the component
// was about to handle.
func (f *flight) events() int {
	f.land()
	return min(len(f.ends)+1, f.count)
}

// windowConn is a connection of HTTP/2 that counts how many bytes of streams the peer has taken: grpc does not
// tell. They are those of WINDOW_UPDATE frames (RFC 9113, 6.9), which come as an application reads.
type windowConn struct {
	net.Conn
	taken atomic.Int64
	frame [13]byte // the head of the frame that comes, and the payload of a WINDOW_UPDATE
	have  int      // bytes of it that have come
	skip  int      // bytes of a payload that are yet to come
}

func (c *windowConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.scan(b[:n])
	return n, err
}

// scan goes through what has come.
func (c *windowConn) scan(b []byte) {
	const head, windowUpdate = 9, 8
	for len(b) > 0 {
		if c.skip > 0 {
			n := min(c.skip, len(b))
			c.skip, b = c.skip-n, b[n:]
			continue
		}
		want := head
		if c.have >= head {
			want = len(c.frame)
		}
		n := copy(c.frame[c.have:want], b)
		c.have, b = c.have+n, b[n:]
		switch length := int(c.frame[0])<<16 | int(c.frame[1])<<8 | int(c.frame[2]); {
		case c.have < want:
		case want == len(c.frame):
			if stream := binary.BigEndian.Uint32(c.frame[5:]); stream != 0 {
				c.taken.Add(int64(binary.BigEndian.Uint32(c.frame[head:]) & 0x7fffffff))
			}
			c.have = 0
		case c.frame[3] != windowUpdate || length != len(c.frame)-head:
			c.have, c.skip = 0, length
		}
	}
}
