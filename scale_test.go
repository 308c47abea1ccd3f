//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// scaleVar makes the tests of bounds run at their size and hold their bounds. noisy is
// how often the time may be taken that a server takes which does nothing, where that is
// more than the bound: machines are shared.
const (
	scaleVar = "FLOWCTL_SCALE"
	noisy    = 2
)

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

// mib is a number of bytes in MiB.
func mib(n int) float64 { return float64(n) / (1 << 20) }

// startAlone starts a control plane alone and returns it with its endpoint.
func startAlone(tb testing.TB, args []string, options ...option) (*process, string) {
	tb.Helper()
	p := start(tb, append([]string{"server", "-control-plane-port", "0"}, args...), options...)
	return p, p.endpoint()
}

// plainBinary returns flowctl as users have it, without the race detector.
func plainBinary(tb testing.TB) string {
	tb.Helper()
	if !raceEnabled() {
		return binary(tb)
	}
	return build(tb, "flowctl-plain", ".")
}

// load is services that heartbeat every ten seconds, over connections that they share.
type load struct {
	clients  []planeClient
	services int
}

func newLoad(t *testing.T, endpoint string, services, conns int) *load {
	t.Helper()
	l := &load{services: services}
	for range conns {
		l.clients = append(l.clients, dialPlane(t, endpoint, grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))) // no ping for each answer
	}
	return l
}

// beat has all of them heartbeat for some time, and returns when all are answered. took
// hears of each answer how long it took from when its call was due, not from when it was
// sent: a plane that holds others up has that in its own figures.
func (l *load) beat(length time.Duration, took func(time.Duration, error)) {
	const callers = 400 // so many that a call that takes long holds no other up
	pause := 10 * time.Second / time.Duration(l.services)
	first := time.Now()
	var calls sync.WaitGroup
	for caller := range callers {
		c := l.clients[caller%len(l.clients)]
		calls.Go(func() {
			for n := caller; time.Duration(n)*pause < length; n += callers {
				due := first.Add(time.Duration(n) * pause)
				if wait := time.Until(due); wait > 0 {
					time.Sleep(wait)
				}
				err := c.heartbeatAs(n % l.services)
				took(time.Since(due), err)
			}
		})
	}
	calls.Wait()
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
	var calls sync.WaitGroup
	const atOnce = 16 // on a connection
	for w := range conns * atOnce {
		calls.Go(func() {
			for i := w; i < services; i += conns * atOnce {
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
	calls.Wait()
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
	program, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	return start(tb, nil, withBinary(program), withEnv(roleVar+"="+actorRole(tb, role{Floor: true})))
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
	p, endpoint := startAlone(t, []string{"-db-path", file}, withBinary(plainBinary(t)))
	pid := p.cmd.Process.Pid
	begun := time.Now()
	registerAll(t, endpoint, services, 100)
	t.Logf("%d registrations: %.1f s; VmRSS %.0f MiB", services, time.Since(begun).Seconds(), mib(memory(t, pid, "VmRSS")))

	plane, floor := newLoad(t, endpoint, services, conns), newLoad(t, startFloorProcess(t).endpoint(), services, conns)
	p99, bound := beatAndList(t, p, endpoint, plane, floor, length)
	for range 2 { // what else this machine does can only make it worse
		if full && p99 > bound {
			p99, bound = beatAndList(t, p, endpoint, plane, floor, length)
		}
	}
	if full && p99 > bound {
		t.Errorf("p99 of a heartbeat is %v, more than %v", p99, bound)
	}
	rss, peak := memory(t, pid, "VmRSS"), memory(t, pid, "VmHWM")
	t.Logf("VmRSS %.0f MiB, VmHWM %.0f MiB, processor %v", mib(rss), mib(peak), processorTime(t, pid))
	if most := 250.0; full && mib(peak) > most {
		t.Errorf("VmHWM is %.0f MiB, more than %.0f", mib(peak), most)
	}
	p.stop()
	if got := countSaved(t, file); got != services {
		t.Errorf("%d services are in the state file, want %d", got, services)
	}
}

// beatAndList has services heartbeat three times so long, and lists them all in the second
// of these. Between, the same load goes to the floor, a server that does nothing: this
// machine may be shared, and what others do to the one they do to the other. It returns
// the p99 of a heartbeat and its bound: mostLate, or where the floor has taken so long
// that this cannot be, noisy times its p99.
func beatAndList(t *testing.T, p *process, endpoint string, plane, floor *load, length time.Duration) (p99, bound time.Duration) {
	t.Helper()
	var phase, total, idle latencies
	var size, count int
	for _, what := range []string{"heartbeats alone", "with list -json", "heartbeats to the end"} {
		var listing sync.WaitGroup
		var read func() (size, components int)
		if what == "with list -json" {
			listing.Go(func() {
				begun := time.Now()
				read = listAll(t, p.cmd.Path, endpoint)
				t.Logf("list -json: %.2f s", time.Since(begun).Seconds())
			})
		}
		plane.beat(length, func(took time.Duration, err error) {
			phase.add(took, err)
			total.add(took, err)
		})
		phase.report(t, what)
		if listing.Wait(); read != nil {
			size, count = read()
			runtime.GC() // so that it is not the floor that waits for it
		}
		floor.beat(length/2, idle.add) // the plane writes what it saw last meanwhile: a hundredth of two processors
	}
	t.Logf("list -json: %.0f MiB", mib(size))
	if count != plane.services {
		t.Errorf("list -json has %d components, want %d", count, plane.services)
	}
	p99, least := total.report(t, "all together"), idle.report(t, "heartbeats that nobody takes in")
	t.Logf("p99 is %.1f times that of a server that does nothing", float64(p99)/float64(least))
	return p99, max(mostLate, noisy*least)
}

// mostLate is the bound of a heartbeat's p99.
const mostLate = 10 * time.Millisecond

func countSaved(tb testing.TB, file string) int {
	tb.Helper()
	services, err := savedIn(file)
	if err != nil {
		tb.Fatal(err)
	}
	return len(services)
}

// silentRegistry holds services that were heard of at the time now, none since.
func silentRegistry(tb testing.TB, services int, ttl time.Duration, now time.Time) *registry {
	tb.Helper()
	r := newRegistry(ttl, time.Hour, "127.0.0.1:8080", nil)
	for i := range services {
		id := fmt.Sprint("service-", i)
		mustRegister(tb, r, registration{id: id, endpoint: "http://host:8080/health", outputEvents: []string{"ledger"}, metadata: map[string]string{"index": id}}, now)
		_, err := r.heartbeat(id, origin{}, 0, now, func(s *service, full error) error {
			return errors.Join(setMetric(s, "events", metric{number: 1}, full), setMetric(s, "lag", metric{number: 2}, full))
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
	return r
}

// longest returns the longest time between two calls of the function that it gives
// to f.
func longest(f func(step func())) (most time.Duration) {
	last := time.Now()
	f(func() {
		now := time.Now()
		most = max(most, now.Sub(last))
		last = now
	})
	return most
}

// TestNoPause has all services of a large registry go stale at once, with everything
// that then goes through all of them, and measures for how long each holds the
// registry's lock.
func TestNoPause(t *testing.T) {
	services, rounds, bound := 5000, 1, 5*time.Second
	if os.Getenv(scaleVar) != "" {
		services, rounds, bound = 100_000, 3, 5*time.Millisecond
	} else {
		t.Parallel()
	}
	const ttl = time.Minute
	best := make(map[string]time.Duration)
	measure := func(what string, f func(step func())) {
		if d := longest(f); best[what] == 0 || d < best[what] {
			best[what] = d
		}
	}
	for range rounds {
		now := time.Now()
		r := silentRegistry(t, services, ttl, now)
		runtime.GC()
		send := func(step func()) func(*operatorv1.WatchResponse) error {
			return func(*operatorv1.WatchResponse) error { step(); return nil }
		}
		w := &follower{registry: r, follows: true}
		_ = w.join()
		measure("snapshot", func(step func()) { w.send = send(step); _ = w.snapshot() })
		pass(r, now.Add(ttl))
		later := now.Add(ttl + 1)
		measure("sweep", func(step func()) {
			for next := later; !next.After(later); step() {
				next = r.sweep(later)
			}
		})
		told := 0
		measure("changes", func(step func()) {
			for len(r.wake) > 0 {
				<-r.wake
				told += len(r.changes(later))
				step()
			}
		})
		measure("follow", func(step func()) { w.send = send(step); _, _ = w.catchUp() })
		measure("save", func(step func()) {
			_, _ = r.save(writerFunc(func(p []byte) (int, error) { step(); return len(p), nil }), "", runtime.Gosched)
		})
		n := 0
		measure("list", func(step func()) {
			r.each(later, func(*service, time.Time) bool {
				if n++; n%batch == 0 {
					step()
				}
				return true
			})
		})
		if told != services || n != services {
			t.Errorf("%d services are told stale and %d listed, want %d", told, n, services)
		}
		w.leave()
		checkedOften(t, r, services, now.Add(ttl+2), best)
	}
	for what, d := range best {
		t.Logf("%s: %v at most", what, d)
		if d > bound {
			t.Errorf("%s holds the lock for %v, more than %v", what, d, bound)
		}
	}
}

// checkedOften has heartbeats come in while everyone is swept, saved and followed.
func checkedOften(t *testing.T, r *registry, services int, now time.Time, best map[string]time.Duration) {
	t.Helper()
	var l latencies
	for i := range services {
		_ = beat(r, fmt.Sprint("service-", i), now)
	}
	pass(r, now.Add(r.ttl))
	later := now.Add(r.ttl + 1)
	w := &follower{registry: r, follows: true, send: func(*operatorv1.WatchResponse) error { return nil }}
	_ = w.join()
	defer w.leave()
	var work sync.WaitGroup
	work.Go(func() {
		for next := later; !next.After(later); {
			next = r.sweep(later)
		}
	})
	work.Go(func() { _, _ = r.save(io.Discard, "", runtime.Gosched) })
	work.Go(func() {
		_ = w.snapshot()
		_, _ = w.catchUp()
	})
	done := make(chan struct{})
	go func() { work.Wait(); close(done) }()
	for i := 0; ; i++ {
		select {
		case <-done:
			count, p50, p99, most, errs := l.take()
			t.Logf("%d heartbeats meanwhile: p50 %v, p99 %v, most %v %v", count, p50, p99, most, errs)
			if best["a heartbeat's p99 meanwhile"] == 0 || p99 < best["a heartbeat's p99 meanwhile"] {
				best["a heartbeat's p99 meanwhile"] = p99
			}
			return
		default:
			begun := time.Now()
			err := beat(r, fmt.Sprint("service-", i%services), later)
			l.add(time.Since(begun), err)
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// BenchmarkHeartbeatGrowth is what a heartbeat costs among a hundred thousand
// services, and with a hundred streams of changes, as a multiple of what it costs
// among a hundred and without.
func BenchmarkHeartbeatGrowth(b *testing.B) {
	now := time.Now()
	few, many, followed := silentRegistry(b, 100, time.Hour, now), silentRegistry(b, 100_000, time.Hour, now), silentRegistry(b, 100, time.Hour, now)
	for range 100 {
		w := &follower{registry: followed, follows: true, send: func(*operatorv1.WatchResponse) error { return nil }}
		_ = w.join()
		if err := w.snapshot(); err != nil {
			b.Fatal(err)
		}
		if _, err := w.catchUp(); err != nil {
			b.Fatal(err)
		}
		defer w.leave()
	}
	ids := make([]string, 100) // the same, so that the processor's caches are not what is measured
	for i := range ids {
		ids[i] = fmt.Sprint("service-", i)
	}
	round := func(r *registry) time.Duration {
		begun := time.Now()
		for i := range 10_000 {
			if err := beat(r, ids[i%100], now); err != nil {
				b.Fatal(err)
			}
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
	report("x-100-followers", following)
}

// TestListTime is how long list takes, from its start to its end, on a pipeline of
// three components.
func TestListTime(t *testing.T) {
	p := start(t, runArgs(writePipeline(t, actor("a", role{Dialect: "legacy"}), actor("b", role{Dialect: "v1"}), actor("c", role{Dialect: "legacy"}))), withBinary(plainBinary(t)))
	p.waitReady()
	best := time.Hour
	for range 10 {
		begun := time.Now()
		if out, err := exec.Command(p.cmd.Path, "list", "-e", p.endpoint()).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		best = min(best, time.Since(begun))
	}
	t.Logf("list: %v", best)
	if bound := 50 * time.Millisecond; best > bound && os.Getenv(scaleVar) != "" {
		t.Errorf("list takes %v, more than %v", best, bound)
	}
	p.stop()
}

// TestStaleOnTime has services fall silent at different moments and wants each told
// of as soon as its time is up, by the subscriber and by a stream.
func TestStaleOnTime(t *testing.T) {
	services, late := 10_000, 10*time.Second // with other tests beside it
	if raceEnabled() {
		services = 2000
	} else if os.Getenv(scaleVar) != "" {
		late = 100 * time.Millisecond
	}
	t.Parallel()
	const ttl = 3 * time.Second
	r := newRegistry(ttl, 10*time.Second, "", nil)
	c := startPlane(t, r)
	stream, err := operatorv1.NewOperatorClient(c.conn).Watch(t.Context(), &operatorv1.WatchRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
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
	for what, in := range map[string]map[string]time.Duration{"subscriber": told, "stream": streamed} {
		var all []time.Duration
		for _, d := range in {
			all = append(all, d)
		}
		slices.Sort(all)
		t.Logf("%s: %d told, %v to %v after their time, half within %v", what, len(all), all[0], all[len(all)-1], all[len(all)/2])
		if all[0] < 0 || all[len(all)-1] > late {
			t.Errorf("%s: told %v to %v after their time, want 0 to %v", what, all[0], all[len(all)-1], late)
		}
	}
}

// TestStoppedPlaneBlamesNobody stops a control plane for three TTLs, while its
// clients go on.
func TestStoppedPlaneBlamesNobody(t *testing.T) {
	t.Parallel()
	const ttl = 2 * time.Second
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
