//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
)

// floorServer and floorV1Server do nothing: what a call to them costs is gRPC's part.
type floorServer struct {
	flowctlpb.UnimplementedControlPlaneServer
}

type floorV1Server struct {
	flowctlv1.UnimplementedControlPlaneServiceServer
}

func (floorV1Server) Heartbeat(context.Context, *flowctlv1.HeartbeatRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (floorServer) Heartbeat(context.Context, *flowctlpb.ServiceHeartbeat) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// serveFloor serves the floor's servers with the options of a plane.
func serveFloor() (server *grpc.Server, endpoint string, err error) {
	lis, endpoint, err := listenPlane("127.0.0.1", 0)
	if err != nil {
		return nil, "", err
	}
	server = grpc.NewServer(planeOptions(insecure.NewCredentials(), newTraffic(slog.New(slog.DiscardHandler), maxConnections))...)
	flowctlpb.RegisterControlPlaneServer(server, floorServer{})
	flowctlv1.RegisterControlPlaneServiceServer(server, floorV1Server{})
	go server.Serve(lis)
	return server, endpoint, nil
}

func startFloor(tb testing.TB) string {
	tb.Helper()
	server, endpoint, err := serveFloor()
	must(tb, err)
	tb.Cleanup(server.Stop)
	return endpoint
}

const benchmarkConns = 8

// connect opens the benchmark's connections to endpoint, one service on each.
func connect(b *testing.B, endpoint string) []planeClient {
	b.Helper()
	clients := make([]planeClient, benchmarkConns)
	for i := range clients {
		clients[i] = dialPlane(b, endpoint)
		must(b, heartbeatOnce(b.Context(), clients[i], i))
	}
	return clients
}

func connectPlane(b *testing.B, c planeClient) []planeClient {
	b.Helper()
	for i := range benchmarkConns {
		c.mustRegister(b, "legacy", registration{id: fmt.Sprint("service-", i)})
	}
	return connect(b, c.conn.Target())
}

// startKeptPlane is startPlane with a state file that is written each second, and
// twenty times a second for one of many services that registers again.
func startKeptPlane(b *testing.B) planeClient {
	b.Helper()
	st := get(openStore(stateConfig{file: filepath.Join(b.TempDir(), "state.json")}, "", slog.New(slog.DiscardHandler)))(b)
	r := newRegistry(testTTL, time.Second, "", nil)
	restoreAll(b, r, nil, time.Now())
	lis, endpoint, err := listenPlane("127.0.0.1", 0)
	must(b, err)
	p := servePlane(r, planeConfig{listeners: []planeListener{{Listener: lis}}, store: st, log: slog.New(slog.DiscardHandler)})
	c := dialPlane(b, endpoint)
	done := make(chan struct{})
	var registering sync.WaitGroup
	registering.Go(func() {
		ticker := time.NewTicker(50 * time.Millisecond)
		defer ticker.Stop()
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-ticker.C:
				if _, err := c.register(context.Background(), "legacy", registration{id: fmt.Sprint("other-", i%100)}); err != nil {
					b.Error(err)
				}
			}
		}
	})
	b.Cleanup(func() {
		close(done)
		registering.Wait()
		p.stop()
		st.close()
	})
	return c
}

func heartbeatOnce(ctx context.Context, c planeClient, i int) error {
	_, err := c.legacy.Heartbeat(ctx, &flowctlpb.ServiceHeartbeat{
		ServiceId: fmt.Sprint("service-", i), Metrics: map[string]float64{"events": 1, "errors": 2, "lag": 3},
	})
	return err
}

// BenchmarkHeartbeatRatio takes turns in short rounds, so that what else the machine
// does weighs on both alike. The ratio is that of the rates: 1 would be a plane that
// costs nothing. One operation is a round of both.
func BenchmarkHeartbeatRatio(b *testing.B) {
	b.Run("memory", func(b *testing.B) {
		measureRatio(b, connectPlane(b, startPlane(b, newRegistry(testTTL, testInterval, "", nil))), connect(b, startFloor(b)))
	})
	b.Run("file", func(b *testing.B) {
		measureRatio(b, connectPlane(b, startKeptPlane(b)), connect(b, startFloor(b)))
	})
}

func measureRatio(b *testing.B, plane, floor []planeClient) {
	const calls = 100
	round := func(clients []planeClient) time.Duration {
		begun := time.Now()
		atOnce(len(clients), func(i int) {
			for range calls {
				if err := heartbeatOnce(b.Context(), clients[i], i); err != nil {
					b.Error(err)
					return
				}
			}
		})
		return time.Since(begun)
	}
	round(plane)
	round(floor)
	var ratios []float64
	var all time.Duration
	for n := 0; b.Loop(); n++ {
		var ofPlane, ofFloor time.Duration
		if n%2 == 0 {
			ofPlane, ofFloor = round(plane), round(floor)
		} else {
			ofFloor, ofPlane = round(floor), round(plane)
		}
		ratios = append(ratios, float64(ofFloor)/float64(ofPlane))
		all += ofPlane
	}
	slices.Sort(ratios)
	ratio := ratios[len(ratios)/2]
	b.ReportMetric(float64(len(ratios)*calls*len(plane))/all.Seconds(), "heartbeats/s")
	b.ReportMetric(ratio, "ratio")
	if least := 0.9; len(ratios) >= 100 && ratio < least { // of fewer rounds, one that was disturbed counts too much
		b.Errorf("the ratio is %.3f, less than %v", ratio, least)
	}
}

// quick builds the component of the benchmarks: small, and quick to start.
func quick(b *testing.B) string {
	b.Helper()
	return build("quick", "./testdata/quick")
}

// BenchmarkReadiness measures from the start of flowctl to READY=1, and in turn with
// it the floor: the same components started at once, all of them, with a server
// that does nothing but count, until the last has registered.
func BenchmarkReadiness(b *testing.B) {
	if raceEnabled() {
		b.Skip("the race detector is not what we measure")
	}
	component := quick(b)
	flowctl := flowctlProgram()
	for _, n := range []int{3, 30, 300} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			var parts []Component
			for i := range n {
				parts = append(parts, Component{ID: fmt.Sprintf("c%d", i), Command: []string{component}})
			}
			file := writePipeline(b, parts...)
			var took, floor []time.Duration
			for range b.N {
				floor = append(floor, measureFloor(b, component, n))
				took = append(took, measureReady(b, flowctl, file))
			}
			slices.Sort(took)
			slices.Sort(floor)
			t, f := took[len(took)/2], floor[len(floor)/2]
			b.ReportMetric(0, "ns/op") // of both together: says nothing
			b.ReportMetric(t.Seconds()*1000, "ms")
			b.ReportMetric(f.Seconds()*1000, "floor-ms")
			b.ReportMetric(float64(t)/float64(f), "x-floor")
			b.ReportMetric((t-f).Seconds()*1000, "extra-ms")
			b.ReportMetric((t.Seconds()-1.3*f.Seconds())*1000, "ms-over-1.3x") // the target is 20 at most
		})
	}
}

// measureReady returns the time from the start of flowctl to READY=1.
func measureReady(b *testing.B, flowctl, file string) time.Duration {
	b.Helper()
	var begun time.Time
	p := start(b, runArgs(file), withBinary(flowctl), notifySocket(b, filepath.Join(shortDir(b), "notify")), func(p *process) {
		p.cmd.Stdout, p.cmd.Stderr = nil, nil // what reads them would be measured too
		begun = time.Now()
	})
	p.wait(p.notified, "READY=1", 1)
	took := time.Since(begun)
	p.stop()
	return took
}

// countingPlane takes registrations and does nothing with them.
type countingPlane struct {
	flowctlpb.UnimplementedControlPlaneServer
	registered chan struct{}
}

func (p countingPlane) Register(_ context.Context, in *flowctlpb.ServiceInfo) (*flowctlpb.RegistrationAck, error) {
	p.registered <- struct{}{}
	return &flowctlpb.RegistrationAck{ServiceId: in.GetServiceId()}, nil
}

func measureFloor(b *testing.B, component string, n int) time.Duration {
	b.Helper()
	lis := get(net.Listen("tcp", "127.0.0.1:0"))(b)
	plane := countingPlane{registered: make(chan struct{}, n)}
	server := grpc.NewServer()
	flowctlpb.RegisterControlPlaneServer(server, plane)
	go server.Serve(lis)
	defer server.Stop()
	env := append(os.Environ(), "FLOWCTL_ENDPOINT="+lis.Addr().String(), "FLOWCTL_COMPONENT_ID=c", "HEALTH_PORT=1")
	begun := time.Now()
	for range n {
		cmd := exec.Command(component)
		cmd.Env = env
		must(b, cmd.Start())
		defer cmd.Wait()
		defer cmd.Process.Kill()
	}
	for range n {
		select {
		case <-plane.registered:
		case <-time.After(2 * patience):
			b.Fatal("not all have registered")
		}
	}
	return time.Since(begun)
}

// BenchmarkFootprint tells how large flowctl is as a file and, with three components
// at rest, in memory, alone and with its guard.
func BenchmarkFootprint(b *testing.B) {
	component := quick(b)
	b.Setenv("CGO_ENABLED", "0") // as .ci/package builds it
	flowctl := build("flowctl-stripped", ".", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w")
	info := get(os.Stat(flowctl))(b)
	var parts []Component
	for i := range 3 {
		parts = append(parts, Component{ID: fmt.Sprintf("c%d", i), Command: []string{component}})
	}
	file := writePipeline(b, parts...)
	var alone, both int
	for range b.N {
		p := start(b, []string{"run", file, "-control-plane-port", "0"}, func(p *process) { p.cmd.Path = flowctl })
		p.waitReady()
		guard := guardOf(p)
		eventually(b, "a guard at rest", func() bool { return memory(b, guard, "VmRSS")*3 < memory(b, guard, "VmHWM")*2 })
		rss := memory(b, p.cmd.Process.Pid, "VmRSS")
		alone, both = max(alone, rss), max(both, rss+memory(b, guard, "VmRSS"))
		p.stop()
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(info.Size())/(1<<20), "MiB-file")
	b.ReportMetric(mib(alone), "MiB-RSS")
	b.ReportMetric(mib(both), "MiB-RSS-with-guard")
}

// processorTime is what a process that has ended and was not waited for has used
// itself, without its children.
func processorTime(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	data := get(os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)))(tb)
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	const tick = 10 * time.Millisecond // USER_HZ is 100 everywhere
	return time.Duration(user+system) * tick
}

// BenchmarkThroughput is how fast lines of four components come through flowctl into
// a file, none lost and none torn, and in turn what cat does with the same: the floor.
func BenchmarkThroughput(b *testing.B) {
	flowctl := plainFlowctl()
	for _, bb := range []struct {
		name         string
		lines, width int
	}{
		{"short", 250_000, 100},
		{"long", 100, 100_000},
	} {
		b.Run(bb.name, func(b *testing.B) {
			dir := b.TempDir()
			var components []Component
			var files []string
			size := 0
			for _, id := range []string{"a", "b", "c", "d"} {
				file := numbered(b, filepath.Join(dir, id), id, bb.lines, bb.width)
				components = append(components, Component{ID: id, Command: []string{"cat", file}, Register: new(false)})
				files = append(files, file)
				size += bb.lines * bb.width
			}
			pipeline := writePipeline(b, components...)
			var took, floor, used time.Duration
			b.SetBytes(int64(size))
			for b.Loop() {
				out := get(os.Create(filepath.Join(dir, "out")))(b)
				cmd := exec.Command(flowctl, runArgs(pipeline, "-log-level", "error", "-show-status=false")...)
				cmd.Stdout, cmd.Stderr = out, os.Stderr
				began := time.Now()
				must(b, cmd.Start())
				awaitExit(cmd.Process)
				took += time.Since(began)
				used += processorTime(b, cmd.Process.Pid)
				must(b, cmd.Wait())
				out.Close()
				y := newTally(nil)
				data := get(os.ReadFile(out.Name()))(b)
				_, _ = y.Write(data)
				for i, c := range components {
					y.same(b, c.ID, files[i])
				}
				y.clean(b)
				if b.Failed() {
					return
				}
				began = time.Now()
				if out, err := exec.Command("sh", append([]string{"-c", `for f in "$@"; do cat "$f" & done | cat >"$0"`, out.Name()}, files...)...).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				floor += time.Since(began)
			}
			mega := float64(size) * float64(b.N) / 1e6
			b.ReportMetric(mega/took.Seconds(), "MB/s")
			b.ReportMetric(used.Seconds()/(mega/1000), "cpu-s/GB")
			b.ReportMetric(mega/floor.Seconds(), "floor-MB/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkEvents is how fast events come from a source through a processor to a sink, and what that costs the
// relay, as a multiple of what testdata/wired does, which receives and sends and no more. They take turns with the
// same components, and with all of a run. One operation is a round of all three. The times are those of the sink.
func BenchmarkEvents(b *testing.B) {
	if raceEnabled() {
		b.Skip("the race detector is not what we measure")
	}
	for _, bb := range []struct {
		name         string
		events, size int
	}{
		{"1KiB", 50_000, 1 << 10},
		{"1MiB", 200, 1 << 20},
	} {
		b.Run(bb.name, func(b *testing.B) { measureEvents(b, newFlood(b, bb.events, bb.size)) })
	}
}

func measureEvents(b *testing.B, f *floodRun) {
	var relayed, wired, whole moved
	var ratios, wholeRatios []float64
	for n := 0; b.Loop(); n++ {
		var r, w moved
		if n%2 == 0 {
			r, w = f.relay(b), f.wire(b)
		} else {
			w, r = f.wire(b), f.relay(b)
		}
		c := f.run(b)
		relayed, wired, whole = relayed.plus(r), wired.plus(w), whole.plus(c)
		ratios = append(ratios, w.seconds/r.seconds)
		wholeRatios = append(wholeRatios, w.seconds/c.seconds)
	}
	slices.Sort(ratios)
	slices.Sort(wholeRatios)
	ratio, events := ratios[len(ratios)/2], float64(f.events*len(ratios))
	b.ReportMetric(0, "ns/op") // of all three: says nothing
	b.ReportMetric(events/relayed.seconds, "events/s")
	b.ReportMetric(events/wired.seconds, "wired-events/s")
	b.ReportMetric(events/whole.seconds, "flowctl-events/s")
	b.ReportMetric(ratio, "ratio")
	b.ReportMetric(wholeRatios[len(wholeRatios)/2], "flowctl-ratio")
	b.ReportMetric(relayed.processor/events*1e6, "cpu-s/M")
	b.ReportMetric(wired.processor/events*1e6, "wired-cpu-s/M")
	b.ReportMetric(relayed.allocations/events, "allocs/event")
	b.ReportMetric(wired.allocations/events, "wired-allocs/event")
	if least := 0.9; len(ratios) >= 5 && ratio < least { // of fewer rounds, one that was disturbed counts too much
		b.Errorf("the ratio is %.3f, less than %v", ratio, least)
	}
}

// floodRun is testdata/flood.json, whose components wait for who moves their events.
type floodRun struct {
	events    int
	text      string // of the pipeline file
	env       option
	wired     string   // program
	p         *process // flowctl that has started the components and moves nothing
	endpoints [3]string
	count     int // lines of the sink
}

// moved is what it took to move all events once.
type moved struct{ seconds, processor, allocations float64 }

func (m moved) plus(o moved) moved {
	return moved{m.seconds + o.seconds, m.processor + o.processor, m.allocations + o.allocations}
}

func newFlood(b *testing.B, events, size int) *floodRun {
	b.Helper()
	text := strings.ReplaceAll(string(get(os.ReadFile("testdata/flood.json"))(b)), "../bin/demo", build("demo", "./testdata/demo"))
	f := &floodRun{events: events, text: text, env: withEnv(fmt.Sprint("EVENTS=", events), fmt.Sprint("EVENT_BYTES=", size)), wired: build("wired", "./testdata/wired")}
	f.p = f.start(b, strings.Replace(text, `"spec": {`, `"spec": {"relay": "off",`, 1))
	f.p.waitReady()
	byID, _ := listed(b, f.p.endpoint())
	for i, id := range []string{"flood", "pass", "count"} {
		f.endpoints[i] = byID[id].Endpoint
	}
	return f
}

func (f *floodRun) start(b *testing.B, text string) *process {
	file := writeFile(b, filepath.Join(b.TempDir(), "flood.json"), text)
	return start(b, runArgs(file), withBinary(plainFlowctl()), f.env)
}

// taken returns what the sink says of the count-th time that it has got all.
func (f *floodRun) taken(b *testing.B, p *process, count int) (seconds float64) {
	b.Helper()
	p.wait(p.stdout, " events in ", count)
	line := p.lines("count")[count-1]
	var events int
	if _, err := fmt.Sscanf(line, "%d events in %f s", &events, &seconds); err != nil || events != f.events {
		b.Fatalf("the sink says %q, want %d events", line, f.events)
	}
	return seconds
}

// relay has the relay of this process move the events.
func (f *floodRun) relay(b *testing.B) moved {
	b.Helper()
	var before, after runtime.MemStats
	var begun, ended syscall.Rusage
	runtime.ReadMemStats(&before)
	must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &begun))
	r := newRelay(maxEvent, slog.New(slog.DiscardHandler))
	r.update([]relayMember{
		{id: "flood", role: roleSource, endpoint: f.endpoints[0]},
		{id: "pass", role: roleProcessor, endpoint: f.endpoints[1], wants: []string{"flood"}, inputs: []string{"flood"}},
		{id: "count", role: roleSink, endpoint: f.endpoints[2], wants: []string{"flood"}, inputs: []string{"pass"}},
	})
	for !r.ended("count") {
		<-r.wake
	}
	r.close()
	must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &ended))
	runtime.ReadMemStats(&after)
	used := ended.Utime.Nano() + ended.Stime.Nano() - begun.Utime.Nano() - begun.Stime.Nano()
	f.count++
	return moved{f.taken(b, f.p, f.count), time.Duration(used).Seconds(), float64(after.Mallocs - before.Mallocs)}
}

// wire has testdata/wired move the events.
func (f *floodRun) wire(b *testing.B) moved {
	b.Helper()
	cmd := exec.Command(f.wired, f.endpoints[:]...)
	cmd.Stderr = os.Stderr
	out := get(cmd.Output())(b)
	_, last, _ := strings.Cut(string(out), "\n")
	var allocations float64
	if _, err := fmt.Sscanf(last, "%f allocations", &allocations); err != nil {
		b.Fatalf("wired says %q", out)
	}
	f.count++
	return moved{f.taken(b, f.p, f.count), (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), allocations}
}

// run has all of flowctl run the pipeline.
func (f *floodRun) run(b *testing.B) moved {
	b.Helper()
	p := f.start(b, f.text)
	p.exit(exitOK)
	return moved{seconds: f.taken(b, p, 1)}
}

// scaleVar makes the tests of bounds run at their size and hold their bounds.
const scaleVar = "FLOWCTL_SCALE"

// latencies are how long calls took.
type latencies struct {
	mu   sync.Mutex // guards all
	all  []time.Duration
	errs map[string]int
}

func (l *latencies) add(d time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, d)
	if err != nil {
		if l.errs == nil {
			l.errs = make(map[string]int)
		}
		l.errs[err.Error()]++
	}
}

// take returns what was added since it was last called.
func (l *latencies) take() (count int, p50, p99, most time.Duration, errs map[string]int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all, errs := l.all, l.errs
	l.all, l.errs = nil, nil
	if len(all) == 0 {
		return 0, 0, 0, 0, errs
	}
	slices.Sort(all)
	return len(all), all[len(all)/2], all[len(all)*99/100], all[len(all)-1], errs
}

// report logs what was added since it was last called and returns its p99. Errors fail t.
func (l *latencies) report(t *testing.T, what string) time.Duration {
	t.Helper()
	count, p50, p99, most, errs := l.take()
	t.Logf("%s: %d, p50 %.2f ms, p99 %.2f ms, most %.1f ms", what, count, p50.Seconds()*1000, p99.Seconds()*1000, most.Seconds()*1000)
	if len(errs) > 0 {
		t.Errorf("%s: %v", what, errs)
	}
	return p99
}

// startAlone starts a control plane alone and returns it with its endpoint.
func startAlone(tb testing.TB, args []string, options ...option) (*process, string) {
	tb.Helper()
	p := start(tb, append([]string{"server", "-control-plane-port", "0"}, args...), options...)
	return p, p.endpoint()
}

// load is services that heartbeat every ten seconds, over connections that they share.
type load struct {
	clients  []planeClient
	services int
	pause    time.Duration // from one heartbeat to the next
}

func newLoad(t *testing.T, endpoint string, services, conns int) *load {
	t.Helper()
	l := &load{services: services, pause: 10 * time.Second / time.Duration(services)}
	for range conns {
		l.clients = append(l.clients, dialPlane(t, endpoint, grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))) // no ping for each answer
	}
	return l
}

// beat has all of them heartbeat for some time, and returns when all are answered. took
// hears of each answer how long it took from when its call was due, not from when it was
// sent: a plane that holds others up has that in its own figures.
func (l *load) beat(length time.Duration, took func(time.Duration, error)) {
	first := time.Now()
	atOnce(callers, func(caller int) {
		c := l.clients[caller%len(l.clients)]
		for n := caller; time.Duration(n)*l.pause < length; n += callers {
			due := first.Add(time.Duration(n) * l.pause)
			if wait := time.Until(due); wait > 0 {
				time.Sleep(wait)
			}
			err := c.heartbeatAs(n % l.services)
			took(time.Since(due), err)
		}
	})
}

// callers are so many that a call that takes long holds no other up.
const callers = 400

// most returns how many heartbeats a second there can be at most, of callers that each send
// the next when the last is answered.
func (l *load) most(length time.Duration) float64 {
	var sent atomic.Int64
	begun := time.Now()
	atOnce(callers, func(caller int) {
		c := l.clients[caller%len(l.clients)]
		for n := caller; time.Since(begun) < length; n += callers {
			_ = c.heartbeatAs(n % l.services) // what fails is seen by beat
			sent.Add(1)
		}
	})
	return float64(sent.Load()) / time.Since(begun).Seconds()
}

// heartbeatAs sends a heartbeat with three metrics in the dialect of service i.
func (c planeClient) heartbeatAs(i int) (err error) {
	id := fmt.Sprint("service-", i)
	if i%2 == 0 {
		_, err = c.legacy.Heartbeat(context.Background(), &flowctlpb.ServiceHeartbeat{ServiceId: id, Metrics: map[string]float64{"events": float64(i), "errors": 2, "lag": 3}})
	} else {
		_, err = c.v1.Heartbeat(context.Background(), &flowctlv1.HeartbeatRequest{ServiceId: id, Metrics: map[string]string{"events": strconv.Itoa(i), "errors": "2", "lag": "3"}})
	}
	return err
}

// registerAll registers services over conns connections.
func registerAll(t *testing.T, endpoint string, services, conns int) {
	t.Helper()
	clients := make([]planeClient, conns)
	for i := range clients {
		clients[i] = dialPlane(t, endpoint)
	}
	const callers = 16 // on a connection
	atOnce(conns*callers, func(w int) {
		for i := w; i < services; i += conns * callers {
			reg := registration{
				id: fmt.Sprint("service-", i), kind: 1, endpoint: fmt.Sprintf("http://host-%d:8080/health", i),
				outputEvents: []string{"ledger"}, metadata: map[string]string{"network": "testnet", "index": strconv.Itoa(i)},
			}
			if _, err := clients[i%conns].register(t.Context(), dialects[i%2], reg); err != nil {
				t.Errorf("service %d: %v", i, err)
			}
		}
	})
}

// listAll runs list -json, and returns what looks at its output: bytes and components.
// To read it costs a second, which is not for when others are measured.
func listAll(t *testing.T, binary, endpoint string) func() (size, components int) {
	t.Helper()
	answer, err := os.Create(filepath.Join(t.TempDir(), "list.json"))
	if err != nil {
		t.Error(err)
	}
	defer answer.Close()
	list := exec.Command(binary, "list", "-json", "-e", endpoint)
	list.Stdout, list.Stderr = answer, os.Stderr
	if err := list.Run(); err != nil {
		t.Errorf("list -json: %v", err)
	}
	return func() (size, components int) {
		text, err := os.ReadFile(answer.Name())
		var pipelines []listedPipeline
		if err == nil {
			err = json.Unmarshal(text, &pipelines)
		}
		if err != nil || len(pipelines) != 1 {
			t.Fatalf("list -json: %v, %d pipelines", err, len(pipelines))
		}
		return len(text), len(pipelines[0].Components)
	}
}

// startFloorProcess has the floor in a process of its own, as a plane is.
func startFloorProcess(tb testing.TB) *process {
	tb.Helper()
	return start(tb, nil, withBinary(get(os.Executable())(tb)), withEnv(roleVar+"="+actorRole(tb, role{Floor: true})))
}

// TestScale has many services heartbeat every ten seconds, while their state is
// written and listed, and looks at what a heartbeat takes and what the server costs.
func TestScale(t *testing.T) {
	services, conns, length, full := 2000, 16, time.Second, os.Getenv(scaleVar) != ""
	if full && raceEnabled() {
		t.Skip("the bounds are for programs without the race detector")
	}
	if full {
		services, length = 100_000, 12*time.Second
		defer debug.SetGCPercent(debug.SetGCPercent(1000)) // the server is what is measured
	} else {
		t.Parallel()
	}
	file := filepath.Join(t.TempDir(), "state.json")
	p, endpoint := startAlone(t, []string{"-db-path", file, "-heartbeat-ttl", "5m"}, withBinary(plainFlowctl())) // no heartbeat comes before all have registered
	pid := p.cmd.Process.Pid
	begun := time.Now()
	registerAll(t, endpoint, services, 100)
	t.Logf("%d registrations: %.1f s; VmRSS %.0f MiB", services, time.Since(begun).Seconds(), mib(memory(t, pid, "VmRSS")))

	plane, floor := newLoad(t, endpoint, services, conns), newLoad(t, startFloorProcess(t).endpoint(), services, conns)
	// Each beats every ten seconds, unless that is more than a third of what this machine can
	// do now, which may be shared: past that it is the queue for a processor that is measured.
	if full {
		most := floor.most(2 * time.Second)
		plane.pause = max(plane.pause, time.Duration(3/most*float64(time.Second)))
		floor.pause = plane.pause
		t.Logf("a server that does nothing answers %.0f heartbeats a second at most; the load is %.0f a second", most, float64(time.Second)/float64(plane.pause))
	}
	p99, bound := beatAndList(t, p, endpoint, plane, floor, length)
	for range 2 { // what else this machine does can only make it worse
		if full && p99 > bound {
			p99, bound = beatAndList(t, p, endpoint, plane, floor, length)
		}
	}
	if full && p99 > bound {
		t.Errorf("p99 of a heartbeat is %v, more than %v, which is %d times that of a server that does nothing", p99, bound, mostFloors)
	}
	rss, peak := memory(t, pid, "VmRSS"), memory(t, pid, "VmHWM")
	t.Logf("VmRSS %.0f MiB, VmHWM %.0f MiB, processor %v", mib(rss), mib(peak), processorTime(t, pid))
	p.stop()
	wantSaved(t, file, services)
}

// beatAndList has services heartbeat three times so long, and lists them all in the second
// of these. Between, the same load goes to the floor, a server that does nothing: this
// machine may be shared, and what others do to the one they do to the other. It returns
// the p99 of a heartbeat and its bound, mostFloors times that of the floor.
func beatAndList(t *testing.T, p *process, endpoint string, plane, floor *load, length time.Duration) (p99, bound time.Duration) {
	t.Helper()
	var phase, total, idle latencies
	var size, count int
	for _, what := range []string{"heartbeats alone", "with list -json", "heartbeats to the end"} {
		var listing sync.WaitGroup
		var read func() (size, components int)
		list := func() {
			if what == "with list -json" {
				listing.Go(func() {
					begun := time.Now()
					read = listAll(t, p.cmd.Path, endpoint)
					t.Logf("list -json: %.2f s", time.Since(begun).Seconds())
				})
			}
		}
		list()
		plane.beat(length, func(took time.Duration, err error) {
			phase.add(took, err)
			total.add(took, err)
		})
		phase.report(t, what)
		if listing.Wait(); read != nil {
			size, count = read()
			runtime.GC() // so that it is not the floor that waits for it
		}
		list() // what the list takes of the machine it takes from the floor, too
		floor.beat(length/2, idle.add)
		listing.Wait()
	}
	t.Logf("list -json: %.0f MiB", mib(size))
	if count != plane.services {
		t.Errorf("list -json has %d components, want %d", count, plane.services)
	}
	p99, least := total.report(t, "all together"), idle.report(t, "heartbeats that nobody takes in")
	t.Logf("p99 is %.1f times that of a server that does nothing", float64(p99)/float64(least))
	return p99, mostFloors * least
}

// mostFloors is the bound of a heartbeat's p99, as a multiple of the floor's in the same run.
const mostFloors = 4

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// BenchmarkHeartbeatGrowth is what a heartbeat costs among a hundred thousand
// services, and with a hundred streams of changes, as a multiple of what it costs
// among a hundred and without.
func BenchmarkHeartbeatGrowth(b *testing.B) {
	now := time.Now()
	few, many, followed := silentRegistry(b, 100, time.Hour, now), silentRegistry(b, 100_000, time.Hour, now), silentRegistry(b, 100, time.Hour, now)
	o := newOperatorServer(followed, nil, nil, nil, nil)
	for range maxFollowers {
		w := get(o.join(func(*operatorv1.WatchResponse) error { return nil }, streamKind{follows: true}))(b)
		must(b, cmp.Or(w.snapshot(), w.catchUp()))
		defer w.leave()
	}
	ids := make([]string, 100) // the same, so that the processor's caches are not what is measured
	for i := range ids {
		ids[i] = fmt.Sprint("service-", i)
	}
	round := func(r *registry) time.Duration {
		begun := time.Now()
		for i := range 10_000 {
			must(b, beat(r, ids[i%100], now))
		}
		return time.Since(begun)
	}
	var growth, following []float64
	for b.Loop() {
		one, all, told := round(few), round(many), round(followed)
		growth = append(growth, float64(all)/float64(one))
		following = append(following, float64(told)/float64(one))
	}
	report := func(what string, times []float64) {
		slices.Sort(times)
		median := times[len(times)/2]
		b.ReportMetric(median, what)
		if most := 1.5; len(times) >= 20 && median > most { // of fewer rounds, one that was disturbed counts too much
			b.Errorf("%s is %.2f, more than %v", what, median, most)
		}
	}
	report("x-100k-services", growth)
	report("x-64-followers", following)
}

// TestStaleOnTime has services fall silent at different moments and wants each told
// of as soon as its time is up, by the subscriber and by a stream.
func TestStaleOnTime(t *testing.T) {
	const ttl = 3 * time.Second
	services := 10_000
	if raceEnabled() {
		services = 2000
	}
	t.Parallel()
	r := newRegistry(ttl, 10*time.Second, "", nil)
	c := startPlane(t, r)
	stream := get(operatorv1.NewOperatorClient(c.conn).Watch(t.Context(), &operatorv1.WatchRequest{Follow: true}))(t)
	var mu sync.Mutex // guards the maps
	silent := make(map[string]time.Time)
	told, streamed := make(map[string]time.Duration), make(map[string]time.Duration)
	note := func(in map[string]time.Duration, id string) int {
		mu.Lock()
		defer mu.Unlock()
		if _, twice := in[id]; twice {
			t.Errorf("%s is told stale twice", id)
		}
		in[id] = time.Since(silent[id]) - ttl
		return len(in)
	}
	var listeners sync.WaitGroup
	listeners.Go(func() {
		for range r.wake {
			for _, ch := range r.changes(time.Now()) {
				if ch.now == unhealthy && note(told, ch.id) == services {
					return
				}
			}
		}
	})
	listeners.Go(func() {
		for {
			out, err := stream.Recv()
			if err != nil {
				t.Error(err)
				return
			}
			for _, s := range out.GetComponents() {
				if s.GetHealth() == unhealthy.String() && note(streamed, s.GetId()) == services {
					return
				}
			}
		}
	})
	for i := range services { // in about a second and a half
		id := fmt.Sprint("service-", i)
		mu.Lock()
		silent[id] = time.Now()
		mu.Unlock()
		mustRegister(t, r, registration{id: id}, time.Now())
		if i%(services/150) == 0 {
			time.Sleep(10 * time.Millisecond) // different moments are what is wanted
		}
	}
	listeners.Wait()
	reportLateness(t, "subscriber", told, 3*ttl)
	reportLateness(t, "stream", streamed, 3*ttl)
}

// reportLateness prints how long after their time services were told of, and fails for one
// that was told of before it, or more than most after it.
func reportLateness(t *testing.T, what string, in map[string]time.Duration, most time.Duration) {
	t.Helper()
	all := slices.Sorted(maps.Values(in))
	t.Logf("%s: %d told, %v to %v after their time, half within %v", what, len(all), all[0], all[len(all)-1], all[len(all)/2])
	if all[0] < 0 || all[len(all)-1] > most {
		t.Errorf("%s: told %v to %v after their time, want 0 to %v", what, all[0], all[len(all)-1], most)
	}
}

// TestStoppedPlaneBlamesNobody stops a control plane for three TTLs, while its
// clients go on.
func TestStoppedPlaneBlamesNobody(t *testing.T) {
	t.Parallel()
	const ttl = 5 * time.Second // a busy machine keeps no heartbeat for so long
	p, endpoint := startAlone(t, []string{"-no-persistence", "-heartbeat-ttl", ttl.String()})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var beats sync.WaitGroup
	for i := range 20 {
		c := dialPlane(t, endpoint)
		id := fmt.Sprint("service-", i)
		c.mustRegister(t, dialects[i%2], registration{id: id})
		beats.Go(func() {
			for ctx.Err() == nil {
				within, cancel := context.WithTimeout(ctx, ttl/2)
				_ = c.heartbeat(within, dialects[i%2], id) // one that is lost is lost
				cancel()
				time.Sleep(ttl / 10) // its interval
			}
		})
	}
	dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "silent"})
	p.signal(syscall.SIGSTOP)
	time.Sleep(3 * ttl) // it is time itself that passes
	p.signal(syscall.SIGCONT)
	p.waitErr("msg=unhealthy id=silent") // a TTL later
	time.Sleep(ttl)
	cancel()
	beats.Wait()
	p.hasNot(p.stderr, "unhealthy id=service-")
}
