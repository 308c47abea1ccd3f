//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
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
			select {
			case got <- ev:
			case <-stream.Context().Done():
			}
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

// A source of which one reader has had enough ends when the other leaves the pipeline.
func TestRelay_LastReaderLeaves(t *testing.T) {
	t.Parallel()
	source := servedSource{stream: func(stream grpc.ServerStreamingServer[flowctlv1.Event]) (err error) {
		for err == nil {
			err = stream.Send(&flowctlv1.Event{Id: "7"})
		}
		return err
	}}
	few := servedSink{consume: func(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
		return stream.SendAndClose(&flowctlv1.ConsumeResponse{})
	}}
	got := make(chan *flowctlv1.Event)
	members := []relayMember{
		{id: "a", role: roleSource, endpoint: serveHere(t, source)},
		{id: "few", role: roleSink, endpoint: serveHere(t, few), inputs: []string{"a"}},
		{id: "more", role: roleSink, endpoint: serveHere(t, sinkTo(got)), inputs: []string{"a"}},
	}
	r := startRelay(t)
	r.update(members)
	<-got
	eventually(t, "the end of a reader", func() bool { return r.ended("few") })
	if r.ended("a") {
		t.Error("the source has ended, and a reader wants more")
	}
	r.update(members[:2])
	eventually(t, "the end of the source", func() bool { return r.ended("a") })
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

// eventsVar is how many events TestRelay_Load moves, and has TestRelay_SlowSinkTakesNoMemory take a minute.
const eventsVar = "FLOWCTL_EVENTS"

// endsIn waits longer for the end of flowctl than exit, which looks at how it ended.
func (p *process) endsIn(length time.Duration) {
	p.tb.Helper()
	select {
	case <-p.done:
	case <-time.After(length):
	}
	p.exit(exitOK)
}

// wantWays wants a sink to have got the events that are numbered from 1 to count, of those of types that it
// wants, by each way once and in order.
func wantWays(t *testing.T, file string, count int, types, wants []string, ways ...string) {
	t.Helper()
	got := make(map[string][]byte)
	for line := range bytes.Lines(get(os.ReadFile(file))(t)) {
		way, rest, _ := bytes.Cut(line, []byte(" "))
		got[string(way)] = append(got[string(way)], rest...)
	}
	wantEqual(t, "ways to "+filepath.Base(file), slices.Sorted(maps.Keys(got)), slices.Sorted(slices.Values(ways)))
	var want []byte
	for i := 1; i <= count; i++ {
		if kind := types[i%len(types)]; wants == nil || slices.Contains(wants, kind) {
			want = fmt.Appendf(want, "%s %d\n", kind, i)
		}
	}
	for _, way := range ways {
		if !bytes.Equal(got[way], want) {
			t.Errorf("%s got by %s %d lines, want each of %d once and in order", filepath.Base(file), way, bytes.Count(got[way], []byte("\n")), bytes.Count(want, []byte("\n")))
		}
	}
}

// Each event comes to each sink that wants it, by each way once and in order.
func TestRelay_Load(t *testing.T) {
	t.Parallel()
	count := 50_000
	if text := os.Getenv(eventsVar); text != "" {
		count = get(strconv.Atoi(text))(t)
	}
	types, folder := []string{"even", "odd", "rest"}, t.TempDir()
	file := func(name string) string { return filepath.Join(folder, name) }
	begun := time.Now()
	p := start(t, runArgs(writePipeline(t,
		flowing("a", eventRole{Kind: "source", Count: count, Bytes: 100, Types: types}),
		flowing("b", eventRole{Kind: "processor"}, "a"),
		flowing("c", eventRole{Kind: "processor", Types: []string{"odd", "rest"}}, "a"),
		flowing("all", eventRole{Kind: "sink", File: file("all")}, "b"),
		flowing("odd", eventRole{Kind: "sink", File: file("odd"), Types: []string{"odd"}}, "c", "b"),
		flowing("both", eventRole{Kind: "sink", File: file("both"), Types: []string{"even", "rest", "other"}}, "b", "a"),
	), "-until", untilDone), withBinary(plainFlowctl()))
	p.endsIn(patience + time.Duration(count)*100*time.Microsecond)
	t.Logf("%d events: %.1f s", count, time.Since(begun).Seconds())
	wantWays(t, file("all"), count, types, nil, "a>b")
	wantWays(t, file("odd"), count, types, []string{"odd"}, "a>c", "a>b")
	wantWays(t, file("both"), count, types, []string{"even", "rest"}, "a>b", "a")
	p.hasNot(p.stderr, "lost_at_most")
}

// A sink that takes one event a second has flowctl hold what fits into windows, and nobody lose any.
func TestRelay_SlowSinkTakesNoMemory(t *testing.T) {
	t.Parallel()
	seconds, folder := 10, t.TempDir()
	if os.Getenv(eventsVar) != "" {
		seconds = 60
	}
	slow, fast := filepath.Join(folder, "slow"), filepath.Join(folder, "fast")
	p := start(t, runArgs(writePipeline(t,
		flowing("a", eventRole{Kind: "source", Bytes: 10_000, Types: []string{"x"}}),
		flowing("slow", eventRole{Kind: "sink", File: slow, Each: "1s"}, "a"),
		flowing("fast", eventRole{Kind: "sink", File: fast}, "a"),
	), "-stop-timeout", "1s"), withBinary(plainFlowctl()))
	p.waitReady()
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	lines := func(file string) int {
		data, _ := os.ReadFile(file)
		return bytes.Count(data, []byte("\n"))
	}
	for taken := 1; taken <= seconds; taken++ {
		eventually(t, "another event", func() bool { return lines(slow) >= taken })
	}
	peak := memory(t, p.cmd.Process.Pid, "VmHWM")
	t.Logf("VmRSS %.1f MiB before, %.1f MiB at most; %d events came to the fast sink, %d to the slow one", mib(before), mib(peak), lines(fast), lines(slow))
	if mib(peak-before) >= 64 {
		t.Errorf("memory grew by %.1f MiB", mib(peak-before))
	}
	p.stop()
	for _, file := range []string{slow, fast} {
		wantWays(t, file, lines(file), []string{"x"}, nil, "a")
	}
}

// A graph of 60 components completes: sources, chains, merges of two, and sinks that read from one or two.
func TestRelay_SixtyComponents(t *testing.T) {
	t.Parallel()
	const count = 200
	folder := t.TempDir()
	var all []Component
	ways := make(map[string][]string) // by which events come out of a component, or into a sink
	add := func(kind, id string, from ...string) {
		for _, input := range from {
			for _, way := range ways[input] {
				if kind != "sink" {
					way += ">" + id
				}
				ways[id] = append(ways[id], way)
			}
		}
		all = append(all, flowing(id, eventRole{Kind: kind, Count: count, Types: []string{"x"}, File: filepath.Join(folder, id)}, from...))
	}
	for i := range 10 {
		source, chain := fmt.Sprint("source-", i), fmt.Sprint("chain-", i)
		ways[source] = []string{source}
		add("source", source)
		add("processor", chain+"-a", source)
		add("processor", chain+"-b", chain+"-a")
		add("processor", chain+"-c", chain+"-b")
	}
	for i := range 5 {
		merge := fmt.Sprint("merge-", i)
		add("processor", merge, fmt.Sprintf("chain-%d-c", 2*i), fmt.Sprintf("chain-%d-c", 2*i+1))
		add("sink", fmt.Sprint("one-", i), merge)
		add("sink", fmt.Sprint("same-", i), merge)
		add("sink", fmt.Sprint("two-", i), merge, fmt.Sprint("source-", i))
	}
	p := start(t, runArgs(writePipeline(t, all...)), withBinary(plainFlowctl()))
	p.endsIn(4 * patience)
	for _, c := range all {
		in := 0
		for _, input := range c.Inputs {
			in += count * len(ways[input])
		}
		out := count * len(ways[c.ID])
		if c.Role == roleSink {
			out = 0
			wantWays(t, filepath.Join(folder, c.ID), count, []string{"x"}, nil, ways[c.ID]...)
		}
		p.has(p.stderr, fmt.Sprintf("msg=moved component=%s in=%d out=%d\n", c.ID, in, out))
	}
}
