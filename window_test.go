//go:build linux

package main

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc/mem"
)

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

// newEdges returns edges of one bound.
func newEdges(w *windows, count int) (edges []*edge) {
	for i := range count {
		edges = append(edges, &edge{from: "a", to: fmt.Sprint(i), windows: w, filled: make(chan struct{}, 1), room: make(chan struct{}, 1)})
	}
	return edges
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
