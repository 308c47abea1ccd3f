//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// field returns a field of bytes as protobuf has it.
func field(number protowire.Number, value string) []byte {
	return protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), value)
}

func TestEvent_Kind(t *testing.T) {
	t.Parallel()
	id, kind := field(1, "7"), field(eventTypeField, "ledger")
	unknown := protowire.AppendVarint(protowire.AppendTag(nil, 900, protowire.VarintType), 1<<40)
	group := slices.Concat(protowire.AppendTag(nil, eventTypeField, protowire.StartGroupType), field(eventTypeField, "inner"), protowire.AppendTag(nil, eventTypeField, protowire.EndGroupType))
	number := protowire.AppendVarint(protowire.AppendTag(nil, eventTypeField, protowire.VarintType), 3)
	for _, tt := range []struct {
		name string
		data []byte
		want string
	}{
		{"nothing", nil, ""},
		{"no type", slices.Concat(id, field(3, "payload")), ""},
		{"an empty type", slices.Concat(id, field(eventTypeField, "")), ""},
		{"first", slices.Concat(kind, id), "ledger"},
		{"last", slices.Concat(id, field(3, "payload"), field(7, "text/plain"), kind), "ledger"},
		{"twice: the last one counts", slices.Concat(field(eventTypeField, "other"), id, kind), "ledger"},
		{"twice: the last one is empty", slices.Concat(kind, field(eventTypeField, "")), ""},
		{"among unknown fields", slices.Concat(unknown, kind, unknown), "ledger"},
		{"a payload that looks like one", slices.Concat(kind, field(3, string(field(eventTypeField, "other")))), "ledger"},
		{"a group of that number", slices.Concat(kind, group), "ledger"},
		{"a varint of that number", slices.Concat(kind, number), "ledger"},
		{"cut in its value", kind[:len(kind)-1], ""},
		{"cut in its length", kind[:1], ""},
		{"cut in a field after it", slices.Concat(kind, field(3, "payload")[:4]), ""},
		{"a group that does not end", slices.Concat(kind, group[:len(group)-1]), ""},
		{"a group that did not begin", slices.Concat(kind, group[len(group)-1:]), ""},
		{"field 0", slices.Concat(kind, []byte{0, 1}), ""},
		{"an overlong tag", slices.Concat(kind, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}), ""},
	} {
		if got := string(newEvent(tt.data).kind()); got != tt.want {
			t.Errorf("%s: the type is %q, want %q", tt.name, got, tt.want)
		}
	}
}

// FuzzEventKind wants the type that protobuf finds, in all that is an event for it.
func FuzzEventKind(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(slices.Concat(field(eventTypeField, "a"), field(1, "7"), field(eventTypeField, "b")))
	f.Add(get(proto.Marshal(&flowctlv1.Event{Id: "7", Type: "ledger", Payload: []byte("x"), Metadata: map[string]string{"a": "b"}, StellarCursor: &flowctlv1.StellarCursor{LedgerSequence: 3}}))(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		kind := newEvent(data).kind()
		var want flowctlv1.Event
		if proto.Unmarshal(data, &want) == nil && string(kind) != want.GetType() {
			t.Errorf("the type of %x is %q, want %q", data, kind, want.GetType())
		}
	})
}

// What an event takes of memory is what it has, or little more.
func TestEvent_TakesWhatItNeeds(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 10, 100, 1000, 1024, 1025, 5000, 1 << 20, 64 << 20} {
		var ev event
		must(t, eventCodec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(make([]byte, size/2)), mem.SliceBuffer(make([]byte, size-size/2))}, &ev))
		if has := cap(ev.ReadOnlyData()); ev.Len() != size || has > 2*size {
			t.Errorf("an event of %d bytes has %d, and room for %d", size, ev.Len(), has)
		}
		ev.Free()
	}
}

func TestWindowConn_ScanOfFramesThatAreCut(t *testing.T) {
	t.Parallel()
	const data, settings, ping, update = 0, 4, 6, 8
	seen := []byte(strings.Join([]string{
		frame(settings, 0, 0, strings.Repeat("s", 12)),
		frame(settings, 1, 0, ""),
		frame(update, 0, 0, "\x00\x01\x00\x00"), // of the connection
		frame(update, 0, 1, "\x00\x00\x00\x07"),
		frame(data, 0, 1, frame(update, 0, 1, "\x00\x00\x00\x64")), // is no frame
		frame(update, 0, 3, "\x80\x00\x01\x00"),                    // a reserved bit
		frame(update, 0, 3, "\x00\x00\x00\x01\x02"),                // too long: the stream will break
		frame(ping, 0, 0, "12345678"),
		frame(data, 0, 1, strings.Repeat("x", 300)),
		frame(update, 0, 5, "\x7f\xff\xff\xff"),
	}, ""))
	const want = 7 + 256 + 0x7fffffff
	for cut := range len(seen) + 1 {
		c := &windowConn{}
		c.scan(seen[:cut])
		c.scan(seen[cut:])
		if got := c.taken.Load(); got != want {
			t.Errorf("cut after %d bytes: %d taken, want %d", cut, got, want)
		}
	}
	for _, size := range []int{1, 2, 3, 7} {
		c := &windowConn{}
		for part := range slices.Chunk(seen, size) {
			c.scan(part)
		}
		if got := c.taken.Load(); got != want {
			t.Errorf("in parts of %d bytes: %d taken, want %d", size, got, want)
		}
	}
}

func TestFlight(t *testing.T) {
	t.Parallel()
	f := &flight{conn: &windowConn{}}
	for _, step := range []struct {
		send, take int // bytes
		want       int // events in flight
	}{
		{want: 0},
		{send: 95, want: 1},             // 100 on the stream
		{send: 95, want: 2},             //
		{take: 99, want: 2},             // a part of the first
		{take: 1, want: 2},              // the second, and the first may not have been handled
		{take: 100, want: 1},            // both are taken, one may not have been handled
		{send: 0, want: 2},              // of no bytes: 5 on the stream
		{send: 995, take: 6, want: 2},   //
		{send: 95, take: 5000, want: 1}, // all, and more than was sent
	} {
		if step.send > 0 || step.want > 0 && step.take == 0 {
			f.note(step.send)
		}
		f.conn.taken.Add(int64(step.take))
		if got := f.events(); got != step.want {
			t.Errorf("after %+v: %d events in flight, want %d", step, got, step.want)
		}
	}
}

// newEdges returns edges of one bound.
func newEdges(w *windows, count int) (edges []*edge) {
	for i := range count {
		edges = append(edges, &edge{from: "a", to: fmt.Sprint(i), windows: w, filled: make(chan struct{}, 1), room: make(chan struct{}, 1)})
	}
	return edges
}

// putAll puts events of that many bytes into an edge, which share their memory, and closes it.
func putAll(t *testing.T, e *edge, count int, data []byte) {
	for range count {
		if err := e.put(t.Context(), newEvent(data)); err != nil {
			t.Error(err)
		}
	}
	e.close()
}

// takeAll takes events until no more come.
func (e *edge) takeAll() (count int) {
	for {
		switch _, ok, over := e.take(); {
		case ok:
			count++
		case over:
			return count
		default:
			<-e.filled
		}
	}
}

// Windows that nobody reads hold no more than their bounds, and are read in any order without a deadlock.
func TestWindows_Bounds(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name               string
		most, edges        int
		count, size, least int // events for each edge, bytes of each, and of all that are held
	}{
		{"each is full", maxWindows, 40, 200, 10_000, 39 << 20},
		{"tiny events", maxWindows, 40, 50_000, 0, 39 << 20},
		{"each has an event that is larger", maxWindows, 20, 3, 8 << 20, 160 << 20},
		{"all are full", maxWindows, 400, 50, 100_000, maxWindows - 200_000},
		{"all are full of large events", maxWindows, 100, 3, 10 << 20, 1000 << 20},
		{"nearly no room at all", 1000, 40, 20, 300, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := &windows{most: tt.most}
				edges, data := newEdges(w, tt.edges), make([]byte, tt.size)
				for _, e := range edges {
					go putAll(t, e, tt.count, data)
				}
				synctest.Wait()
				size, held := tt.size+eventCost, 0
				for _, e := range edges {
					if held += e.bytes; e.bytes > max(maxWindow, size) {
						t.Errorf("an edge holds %d bytes", e.bytes)
					}
				}
				if held != w.used || held < tt.least || held > tt.most+tt.edges*size {
					t.Errorf("all edges hold %d bytes and count %d, want %d to %d", held, w.used, tt.least, tt.most+tt.edges*size)
				}
				for _, i := range rand.Perm(len(edges)) {
					if got := edges[i].takeAll(); got != tt.count {
						t.Errorf("%d events came, want %d", got, tt.count)
					}
				}
				if w.used != 0 {
					t.Errorf("%d bytes are counted when nothing is held", w.used)
				}
			})
		})
	}
}

// Events come through a chain of edges whose bound has room for three of them, and past its side edges that
// nobody reads for a while.
func TestWindows_ChainAtTheBound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const length, count, size = 40, 1000, 100
		w := &windows{most: 3 * (size + eventCost)}
		chain, full := newEdges(w, length), newEdges(w, 10)
		for _, e := range full {
			go putAll(t, e, count, make([]byte, size))
		}
		synctest.Wait()
		go func() {
			for i := range count {
				_ = chain[0].put(t.Context(), newEvent(binary.BigEndian.AppendUint64(nil, uint64(i))))
			}
			chain[0].close()
		}()
		for i, from := range chain[:length-1] {
			go func() {
				for {
					if ev, ok, over := from.take(); ok {
						_ = chain[i+1].put(t.Context(), ev)
					} else if over {
						chain[i+1].close()
						return
					} else {
						<-from.filled
					}
				}
			}()
		}
		last := chain[length-1]
		for want := 0; ; {
			ev, ok, over := last.take()
			if ok {
				if got := int(binary.BigEndian.Uint64(ev.ReadOnlyData())); got != want {
					t.Fatalf("event %d came, want %d", got, want)
				}
				want++
			} else if over {
				if want != count {
					t.Errorf("%d events came, want %d", want, count)
				}
				break
			} else {
				<-last.filled
			}
		}
		var reading sync.WaitGroup
		for _, e := range full {
			reading.Go(func() {
				if got := e.takeAll(); got != count {
					t.Errorf("%d events came by a side edge, want %d", got, count)
				}
			})
		}
		reading.Wait()
	})
}

// An edge whose reader is always behind does not keep the places of what it has taken.
func TestEdge_ReaderThatIsAlwaysBehind(t *testing.T) {
	t.Parallel()
	e := newEdges(&windows{most: maxWindows}, 1)[0]
	for i := range 100_000 {
		must(t, e.put(t.Context(), newEvent([]byte{1})))
		if i >= 10 {
			e.take()
		}
	}
	if room := cap(e.queue); room > 100 {
		t.Errorf("the queue of 10 events has %d places", room)
	}
}

// A writer that gives up does not count as one that waits.
func TestEdge_WriterThatGivesUp(t *testing.T) {
	t.Parallel()
	e := newEdges(&windows{most: maxWindows}, 1)[0]
	must(t, e.put(t.Context(), newEvent(make([]byte, maxWindow))))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := e.put(ctx, newEvent([]byte{1}))
	if _, _, waiting := e.counts(); err == nil || !waiting.IsZero() {
		t.Errorf("put: %v, and it waits since %v", err, waiting)
	}
}
