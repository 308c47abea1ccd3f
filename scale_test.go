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
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// scaleVar makes TestScale one of a hundred thousand services, for a minute, that
// fails for gross misses of its bounds: gross is how often a bound may be missed,
// because machines are shared.
const (
	scaleVar = "FLOWCTL_SCALE"
	gross    = 3
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

// heartbeatAs sends a heartbeat with three metrics in the dialect of service i.
func (c planeClient) heartbeatAs(ctx context.Context, i int) error {
	id := fmt.Sprint("service-", i)
	var err error
	if i%2 == 0 {
		_, err = c.legacy.Heartbeat(ctx, &flowctlpb.ServiceHeartbeat{ServiceId: id, Metrics: map[string]float64{"events": float64(i), "errors": 2, "lag": 3}})
	} else {
		_, err = c.v1.Heartbeat(ctx, &flowctlv1.HeartbeatRequest{ServiceId: id, Metrics: map[string]string{"events": strconv.Itoa(i), "errors": "2", "lag": "3"}})
	}
	return err
}

// TestScale has many services heartbeat every ten seconds, while their state is
// written and listed, and looks at what a heartbeat takes and what the server costs.
func TestScale(t *testing.T) {
	services, conns, length, full := 2000, 20, 3*time.Second, os.Getenv(scaleVar) != ""
	if full {
		services, conns, length = 100_000, 100, 35*time.Second
		defer debug.SetGCPercent(debug.SetGCPercent(400)) // the server is what is measured
	} else {
		t.Parallel()
	}
	started, machineBefore, ownBefore := time.Now(), machineTime(t), processorTime(t, os.Getpid())
	file := filepath.Join(t.TempDir(), "state.json")
	p, endpoint := startAlone(t, []string{"-db-path", file}, withBinary(plainBinary(t)))
	pid := p.cmd.Process.Pid
	clients := make([]planeClient, conns)
	for i := range clients { // which cost as little as a client in Go can: the server is what is measured
		clients[i] = dialPlane(t, endpoint, grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	}

	begun := time.Now()
	var calls sync.WaitGroup
	const atOnce = 64 // on a connection
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
	registered := time.Since(begun)
	t.Logf("%d registrations: %.1f s; VmRSS %.0f MiB", services, registered.Seconds(), mib(memory(t, pid, "VmRSS")))

	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var all, whileWritten latencies
	var writing atomic.Bool
	var load sync.WaitGroup
	load.Go(func() {
		for ctx.Err() == nil {
			_, err := os.Stat(file + ".tmp")
			writing.Store(err == nil)
			time.Sleep(time.Millisecond) // a look at the disk, not a wait
		}
	})
	// Few enough that this process is not what is measured, and enough for a call that
	// takes long to hold no other up.
	const workers = 4 // of a connection
	pause := 10 * time.Second / time.Duration(services) * time.Duration(conns) * workers
	for w := range conns * workers {
		c := clients[w%conns]
		load.Go(func() {
			next := time.Now().Add(pause * time.Duration(w) / time.Duration(conns*workers))
			for i := w; ctx.Err() == nil; i = (i + conns*workers) % services {
				if wait := time.Until(next); wait > 0 {
					time.Sleep(wait)
				}
				next = next.Add(pause)
				during := writing.Load()
				begun := time.Now()
				err := c.heartbeatAs(t.Context(), i)
				took := time.Since(begun)
				all.add(took, err)
				if during && writing.Load() {
					whileWritten.add(took, err)
				}
			}
		})
	}
	time.Sleep(length / 3) // the load is what is measured
	report := func(what string, l *latencies) time.Duration {
		count, p50, p99, most, errs := l.take()
		t.Logf("%s: %d heartbeats, p50 %.2f ms, p99 %.2f ms, most %.1f ms", what, count, p50.Seconds()*1000, p99.Seconds()*1000, most.Seconds()*1000)
		if len(errs) > 0 {
			t.Errorf("%s: %v", what, errs)
		}
		return p99
	}
	worst := report("heartbeats alone", &all)
	begun = time.Now()
	out, err := exec.Command(p.cmd.Path, "list", "-json", "-e", endpoint).Output()
	took := time.Since(begun)
	var pipelines []listedPipeline
	if err == nil {
		err = json.Unmarshal(out, &pipelines)
	}
	if err != nil || len(pipelines) != 1 || len(pipelines[0].Components) != services {
		t.Errorf("list -json: %v, %d bytes; want %d components", err, len(out), services)
		if exit, ok := err.(*exec.ExitError); ok {
			t.Logf("%s", exit.Stderr)
		}
	}
	worst = max(worst, report("with list -json", &all))
	t.Logf("list -json: %.2f s, %.0f MiB", took.Seconds(), mib(len(out)))
	out, pipelines = nil, nil
	runtime.GC()
	<-ctx.Done()
	load.Wait()
	worst = max(worst, report("heartbeats to the end", &all))
	worst = max(worst, report("while the state is written, in all", &whileWritten))
	rss, peak := memory(t, pid, "VmRSS"), memory(t, pid, "VmHWM")
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("VmRSS %.0f MiB, VmHWM %.0f MiB, state file %.0f MiB, processor %v", mib(rss), mib(peak), mib(int(info.Size())), processorTime(t, pid))
	share := float64(machineTime(t)-machineBefore-processorTime(t, os.Getpid())+ownBefore-processorTime(t, pid)) / float64(time.Since(started)) / float64(runtime.NumCPU())
	t.Logf("others have %.0f %% of the machine", 100*share)
	if bound := 10 * time.Millisecond * gross; full && worst > bound && share < 0.1 {
		t.Errorf("p99 of a heartbeat is %s, more than %s", worst, bound)
	}
	if bound := 250 * gross; full && mib(rss) > float64(bound) {
		t.Errorf("VmRSS is %.0f MiB, more than %d", mib(rss), bound)
	}
	p.stop()
	if got := countSaved(t, file); got != services {
		t.Errorf("%d services are in the state file, want %d", got, services)
	}
}

// machineTime is what all processes of the machine have used, list among the others.
func machineTime(tb testing.TB) time.Duration {
	tb.Helper()
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		tb.Fatal(err)
	}
	var user, nice, system, idle, wait, irq, softirq, steal int
	if _, err := fmt.Sscanf(string(data), "cpu %d %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &wait, &irq, &softirq, &steal); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(user+nice+system+irq+softirq+steal) * 10 * time.Millisecond // as in processorTime
}

func countSaved(tb testing.TB, file string) int {
	tb.Helper()
	services, err := readState(file)
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
			return errors.Join(s.setMetric("events", metric{number: 1}, full), s.setMetric("lag", metric{number: 2}, full))
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
		services, rounds, bound = 100_000, 3, gross*5*time.Millisecond
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
		w := &follower{registry: r}
		r.feed.followers++
		measure("snapshot", func(step func()) { w.send = send(step); _ = w.snapshot() })
		later := now.Add(2 * ttl)
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
			_, _ = r.save(writerFunc(func(p []byte) (int, error) { step(); return len(p), nil }), runtime.Gosched)
		})
		n := 0
		measure("list", func(step func()) {
			r.each(later, func(*service) {
				if n++; n%batch == 0 {
					step()
				}
			})
		})
		if told != services || n != services {
			t.Errorf("%d services are told stale and %d listed, want %d", told, n, services)
		}
		w.leave()
		checkedOften(t, r, services, now.Add(3*ttl), best)
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
	later := now.Add(2 * r.ttl)
	w := &follower{registry: r, send: func(*operatorv1.WatchResponse) error { return nil }}
	r.mu.Lock()
	r.feed.followers++
	r.mu.Unlock()
	defer w.leave()
	var work sync.WaitGroup
	work.Go(func() {
		for next := later; !next.After(later); {
			next = r.sweep(later)
		}
	})
	work.Go(func() { _, _ = r.save(io.Discard, runtime.Gosched) })
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
		w := &follower{registry: followed, send: func(*operatorv1.WatchResponse) error { return nil }}
		followed.feed.followers++
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
	slices.Sort(growth)
	slices.Sort(following)
	b.ReportMetric(growth[len(growth)/2], "x-100k-services")
	b.ReportMetric(following[len(following)/2], "x-100-followers")
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
	if bound := 50 * time.Millisecond * 2 * gross; best > bound {
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
		late = gross * 100 * time.Millisecond
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
	p, endpoint := startAlone(t, []string{"-no-persistence", "-heartbeat-ttl", ttl.String(), "-janitor-interval", "500ms"})
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
