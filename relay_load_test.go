//go:build linux

package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
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
	got chan<- *flowctlv1.Event
}

func (servedSink) GetInfo(context.Context, *emptypb.Empty) (*flowctlv1.ComponentInfo, error) {
	return &flowctlv1.ComponentInfo{}, nil
}

func (s servedSink) Consume(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
	for {
		ev, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&flowctlv1.ConsumeResponse{})
		} else if err != nil {
			return err
		}
		s.got <- ev
	}
}

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
	source := serveHere(t, servedSource{stream: func(stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
		return stream.Send(&flowctlv1.Event{Id: "7"})
	}})
	members := []relayMember{
		{id: "a", role: roleSource, endpoint: source, since: time.Unix(1, 0)},
		{id: "store", role: roleSink, endpoint: serveHere(t, servedSink{got: got}), since: time.Unix(1, 0), inputs: []string{"a"}},
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
	source := serveHere(t, servedSource{stream: func(stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
		return stream.Send(&flowctlv1.Event{Id: "7"})
	}})
	sink := relayMember{id: "store", role: roleSink, endpoint: serveHere(t, servedSink{got: got}), inputs: []string{"a"}}
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
	source := serveHere(t, servedSource{stream: func(stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
		return stream.Send(&flowctlv1.Event{Id: "7"})
	}})
	sink := serveHere(t, servedSink{got: got})
	members := []relayMember{{id: "a", role: roleSource, endpoint: source}, {id: "store", role: roleSink, endpoint: sink, inputs: []string{"a"}}}
	r := startRelay(t)
	r.update(members)
	<-got
	eventually(t, "the end of all streams", func() bool { return r.ended("a") })
	r.update(append(members, relayMember{id: "late", role: roleSink, endpoint: sink, inputs: []string{"a"}}))
	eventually(t, "the end of the late reader's stream", func() bool { return r.ended("late") })
}
