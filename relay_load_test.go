//go:build linux

package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// servedSource and servedSink are components in this process.
type servedSource struct {
	flowctlv1.UnimplementedSourceServiceServer
	stream func(grpc.ServerStreamingServer[flowctlv1.Event]) error
}

func (servedSource) GetInfo(context.Context, *emptypb.Empty) (*flowctlv1.ComponentInfo, error) {
	return &flowctlv1.ComponentInfo{}, nil
}

func (s servedSource) StreamEvents(_ *flowctlv1.StreamRequest, stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
	return s.stream(stream)
}

type servedSink struct {
	flowctlv1.UnimplementedConsumerServiceServer
	consume func(grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error
}

func (servedSink) GetInfo(context.Context, *emptypb.Empty) (*flowctlv1.ComponentInfo, error) {
	return &flowctlv1.ComponentInfo{}, nil
}

func (s servedSink) Consume(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
	return s.consume(stream)
}

// sinkTo is a sink that passes on what it gets.
func sinkTo(got chan<- *flowctlv1.Event) servedSink {
	return servedSink{consume: func(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
		for {
			ev, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return stream.SendAndClose(&flowctlv1.ConsumeResponse{})
			} else if err != nil {
				return err
			}
			got <- ev
		}
	}}
}

// sourceOfOne is a source of one event.
var sourceOfOne = servedSource{stream: func(stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
	return stream.Send(&flowctlv1.Event{Id: "7"})
}}

// serveHere serves a source or a sink until the test ends, and returns where.
func serveHere(tb testing.TB, component any) string {
	tb.Helper()
	server := grpc.NewServer()
	switch c := component.(type) {
	case servedSource:
		flowctlv1.RegisterSourceServiceServer(server, c)
	case servedSink:
		flowctlv1.RegisterConsumerServiceServer(server, c)
	}
	lis := get(net.Listen("tcp", "127.0.0.1:0"))(tb)
	go server.Serve(lis)
	tb.Cleanup(server.Stop)
	return lis.Addr().String()
}

// startRelay returns a relay that ends with the test.
func startRelay(tb testing.TB) *relay {
	r := newRelay(maxEvent, slog.New(slog.DiscardHandler))
	tb.Cleanup(r.close)
	return r
}

// A source that had ended and is started again moves events again, to a sink that has ended, too.
func TestRelay_EndedComponentsReturn(t *testing.T) {
	t.Parallel()
	got := make(chan *flowctlv1.Event, 1)
	source := serveHere(t, sourceOfOne)
	members := []relayMember{
		{id: "a", role: roleSource, endpoint: source, since: time.Unix(1, 0)},
		{id: "store", role: roleSink, endpoint: serveHere(t, sinkTo(got)), since: time.Unix(1, 0), inputs: []string{"a"}},
	}
	r := startRelay(t)
	for i := range 3 {
		members[0].since = time.Unix(int64(i), 0)
		r.update(members)
		if ev := <-got; ev.GetId() != "7" {
			t.Errorf("event %q came", ev.GetId())
		}
		eventually(t, "the end of all streams", func() bool { return r.ended("a") && r.ended("store") })
	}
}

// A component that had ended returns as what it read from leaves the pipeline.
func TestRelay_ReturnsWithoutItsInput(t *testing.T) {
	t.Parallel()
	got := make(chan *flowctlv1.Event, 1)
	source := serveHere(t, sourceOfOne)
	sink := relayMember{id: "store", role: roleSink, endpoint: serveHere(t, sinkTo(got)), inputs: []string{"a"}}
	r := startRelay(t)
	r.update([]relayMember{{id: "a", role: roleSource, endpoint: source}, sink})
	<-got
	eventually(t, "the end of all streams", func() bool { return r.ended("store") })
	sink.inputs, sink.since = []string{"b"}, time.Unix(1, 0)
	r.update([]relayMember{{id: "b", role: roleSource, endpoint: source}, sink})
	<-got
	eventually(t, "the end of all streams", func() bool { return r.ended("b") && r.ended("store") })
}

// Who comes to read from a component that has ended gets nothing, and ends.
func TestRelay_LateReaderEnds(t *testing.T) {
	t.Parallel()
	got := make(chan *flowctlv1.Event, 1)
	source := serveHere(t, sourceOfOne)
	sink := serveHere(t, sinkTo(got))
	members := []relayMember{{id: "a", role: roleSource, endpoint: source}, {id: "store", role: roleSink, endpoint: sink, inputs: []string{"a"}}}
	r := startRelay(t)
	r.update(members)
	<-got
	eventually(t, "the end of all streams", func() bool { return r.ended("a") })
	r.update(append(members, relayMember{id: "late", role: roleSink, endpoint: sink, inputs: []string{"a"}}))
	eventually(t, "the end of the late reader's stream", func() bool { return r.ended("late") })
}

// Nothing is left of streams that broke and were opened again.
func TestRelay_ReconnectsLeaveNothing(t *testing.T) { // not beside others: it counts what this process has
	const most = 1000
	for _, role := range []Role{roleSource, roleSink} {
		t.Run(role.String(), func(t *testing.T) {
			broke := make(chan struct{})
			serve := func(ctx context.Context, as Role) error {
				if as != role {
					<-ctx.Done()
					return nil
				}
				select {
				case broke <- struct{}{}:
				case <-ctx.Done():
				}
				return status.Error(codes.Unavailable, "it breaks")
			}
			source := servedSource{stream: func(stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
				return serve(stream.Context(), roleSource)
			}}
			sink := servedSink{consume: func(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
				return serve(stream.Context(), roleSink)
			}}
			members := []relayMember{{id: "a", role: roleSource, endpoint: serveHere(t, source)}, {id: "store", role: roleSink, endpoint: serveHere(t, sink), inputs: []string{"a"}}}
			r := startRelay(t)
			var goroutines, files, heap int
			for i := range most {
				r.update(members)
				<-broke
				for j := range members {
					if members[j].role == role {
						members[j].since = time.Unix(int64(i), 0) // another process: its stream is opened at once
					}
				}
				if i == 100 {
					goroutines, files, heap = held(t)
				}
			}
			eventually(t, "no more goroutines and descriptors than a connection has", func() bool {
				g, f, _ := held(t)
				return g <= goroutines+20 && f <= files+5
			})
			if _, _, now := held(t); now-heap > 2<<20 {
				t.Errorf("the heap grew by %.1f MiB", mib(now-heap))
			}
		})
	}
}

// held returns how many goroutines and descriptors this process has, and the bytes of its heap.
func held(tb testing.TB) (goroutines, files, heap int) {
	tb.Helper()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return runtime.NumGoroutine(), len(get(os.ReadDir("/proc/self/fd"))(tb)), int(stats.HeapAlloc)
}
