//go:build linux

package main

import (
	"bufio"
	"context"
	bin "encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
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

	"google.golang.org/protobuf/proto"

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

// heartbeatOf is a heartbeat with three metrics in the dialect of service i.
func heartbeatOf(i int) proto.Message {
	id := fmt.Sprint("service-", i)
	if i%2 == 0 {
		return &flowctlpb.ServiceHeartbeat{ServiceId: id, Metrics: map[string]float64{"events": float64(i), "errors": 2, "lag": 3}}
	}
	return &flowctlv1.HeartbeatRequest{ServiceId: id, Metrics: map[string]string{"events": strconv.Itoa(i), "errors": "2", "lag": "3"}}
}

// A beater sends heartbeats over one connection and takes their answers, with the
// HTTP/2 that this needs and nothing else (RFC 9113 sections 4 and 6, RFC 7541
// section 6). A client of grpc-go costs as much as the server that it measures, and
// services that heartbeat have machines of their own.
type beater struct {
	conn net.Conn

	mu     sync.Mutex           // guards what follows
	block  []byte               // the header block of the next call
	again  []byte               // and of each further one, by the server's table of headers
	stream uint32               // of the last call
	open   map[uint32]time.Time // when each call without an answer was due
	out    []byte
	last   bool // no further call begins
}

// frameHeader is the length of an HTTP/2 frame's header.
const frameHeader = 9

// The types and flags of the frames that a beater sends or looks at.
const (
	frameData, frameHeaders, frameReset, frameSettings, framePing, frameGoAway, frameWindow = 0, 1, 3, 4, 6, 7, 8

	flagEnd, flagAck, flagEndHeaders = 1, 1, 4
)

// appendFrame appends a frame with its payload.
func appendFrame(b []byte, kind, flags byte, stream uint32, payload ...byte) []byte {
	b = append(b, byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload)), kind, flags)
	return append(bin.BigEndian.AppendUint32(b, stream), payload...)
}

// newBeater connects to the plane at endpoint, to call its method.
func newBeater(endpoint, method string) (*beater, error) {
	conn, err := net.Dial("tcp", endpoint)
	if err != nil {
		return nil, err
	}
	text := func(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) } // below 127 bytes
	block := []byte{0x83, 0x86}                                                              // :method POST, :scheme http
	block = text(append(block, 0x44), method)                                                // :path, and the server remembers it
	block = text(append(block, 0x41), endpoint)                                              // :authority
	block = text(append(block, 0x5f), "application/grpc")                                    // content-type
	block = text(text(append(block, 0x40), "te"), "trailers")
	const everything = 1<<31 - 1 - 1<<16 // the window for answers: they are counted, not held
	hello := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	hello = appendFrame(hello, frameSettings, 0, 0)
	hello = appendFrame(hello, frameWindow, 0, 0, bin.BigEndian.AppendUint32(nil, everything)...)
	if _, err := conn.Write(hello); err != nil {
		conn.Close()
		return nil, err
	}
	return &beater{
		conn: conn, block: block, open: make(map[uint32]time.Time), stream: 1<<32 - 1,
		again: []byte{0x83, 0x86, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62}, // the newest is 62
	}, nil
}

// send begins a call that was due at the time due.
func (b *beater) send(due time.Time, in proto.Message) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stream += 2
	b.out = appendFrame(b.out[:0], frameHeaders, flagEndHeaders, b.stream, b.block...)
	b.block = b.again
	message := len(b.out) + frameHeader
	var err error
	b.out, err = proto.MarshalOptions{}.MarshalAppend(append(b.out, make([]byte, frameHeader+5)...), in)
	if err != nil {
		return err
	}
	size := len(b.out) - message
	appendFrame(b.out[:message-frameHeader], frameData, flagEnd, b.stream)
	b.out[message-frameHeader+1], b.out[message-frameHeader+2] = byte(size>>8), byte(size)
	bin.BigEndian.PutUint32(b.out[message+1:], uint32(size-5))
	b.open[b.stream] = due
	_, err = b.conn.Write(b.out)
	return err
}

// finish says that no further call begins. It is for whoever calls send.
func (b *beater) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last = true; len(b.open) == 0 {
		b.conn.Close()
	}
}

// receive has ended called with each answer, to the last one after finish.
func (b *beater) receive(ended func(due time.Time, err error)) error {
	in := bufio.NewReader(b.conn)
	answered := make(map[uint32]bool)
	for {
		head, err := in.Peek(frameHeader)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		size, kind, flags := int(head[0])<<16|int(head[1])<<8|int(head[2]), head[3], head[4]
		stream := bin.BigEndian.Uint32(head[5:])
		frame, err := in.Peek(frameHeader + size) // those of a plane are far smaller than in's room
		if err != nil {
			return err
		}
		var reply []byte
		switch {
		case kind == frameSettings && flags&flagAck == 0:
			reply = appendFrame(nil, frameSettings, flagAck, 0)
		case kind == framePing && flags&flagAck == 0:
			reply = appendFrame(nil, framePing, flagAck, 0, frame[frameHeader:]...)
		case kind == frameGoAway:
			return fmt.Errorf("the plane says GOAWAY: %q", frame)
		case kind == frameData:
			answered[stream] = true
		case kind == frameReset || kind == frameHeaders && flags&flagEnd != 0:
			err := error(nil)
			if !answered[stream] { // grpc-go answers with nothing but trailers what has failed
				err = fmt.Errorf("no answer but %q", frame)
			}
			delete(answered, stream)
			b.mu.Lock()
			due := b.open[stream]
			delete(b.open, stream)
			over := b.last && len(b.open) == 0
			b.mu.Unlock()
			if ended(due, err); over {
				return nil
			}
		}
		if _, err := in.Discard(frameHeader + size); err != nil {
			return err
		}
		if reply != nil {
			b.mu.Lock()
			_, err = b.conn.Write(reply)
			b.mu.Unlock()
			if err != nil {
				return err
			}
		}
	}
}

// heartbeats has each of the services heartbeat every ten seconds over conns
// connections until ctx ends, and returns when all are answered. ended hears of each
// answer with the time when its call was due: what is late counts from then on, so a
// plane that holds others up has that in its own figures.
func heartbeats(ctx context.Context, t *testing.T, endpoint string, services, conns int, ended func(due time.Time, err error)) {
	var answers sync.WaitGroup
	defer answers.Wait()
	beaters := make([]*beater, conns)
	for i := range beaters {
		method := []string{flowctlpb.ControlPlane_Heartbeat_FullMethodName, flowctlv1.ControlPlaneService_Heartbeat_FullMethodName}[i%2]
		b, err := newBeater(endpoint, method)
		if err != nil {
			t.Error(err)
			return
		}
		beaters[i] = b
		defer b.finish()
		answers.Go(func() {
			defer b.conn.Close()
			if err := b.receive(ended); err != nil {
				t.Error(err)
			}
		})
	}
	first, pause := time.Now(), 10*time.Second/time.Duration(services)
	for n := 0; ctx.Err() == nil; n++ {
		due := first.Add(time.Duration(n) * pause)
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait)
		}
		if err := beaters[n%conns].send(due, heartbeatOf(n%services)); err != nil {
			t.Errorf("heartbeat %d: %v", n, err)
			return
		}
	}
}

// registerAll registers services over conns connections.
func registerAll(t *testing.T, endpoint string, services, conns int) {
	t.Helper()
	clients := make([]planeClient, conns)
	for i := range clients {
		clients[i] = dialPlane(t, endpoint)
	}
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
}

// listAll runs list -json, and returns what looks at its output: bytes and components.
// To read it costs a second, which is not for when others are measured.
func listAll(t *testing.T, binary, endpoint string) func() (size, components int) {
	t.Helper()
	answer, err := os.Create(filepath.Join(t.TempDir(), "list.json"))
	if err != nil {
		t.Fatal(err)
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
	begun := time.Now()
	registerAll(t, endpoint, services, conns)
	registered := time.Since(begun)
	t.Logf("%d registrations: %.1f s; VmRSS %.0f MiB", services, registered.Seconds(), mib(memory(t, pid, "VmRSS")))

	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var all, whileWritten, total latencies
	var writing atomic.Bool
	var load sync.WaitGroup
	load.Go(func() {
		for ctx.Err() == nil {
			_, err := os.Stat(file + ".tmp")
			writing.Store(err == nil)
			time.Sleep(time.Millisecond) // a look at the disk, not a wait
		}
	})
	load.Go(func() {
		heartbeats(ctx, t, endpoint, services, conns, func(due time.Time, err error) {
			took := time.Since(due)
			total.add(took, err)
			if all.add(took, err); writing.Load() {
				whileWritten.add(took, err)
			}
		})
	})
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
	list := listAll(t, p.cmd.Path, endpoint)
	took := time.Since(begun)
	worst = max(worst, report("with list -json", &all))
	<-ctx.Done()
	load.Wait()
	worst = max(worst, report("heartbeats to the end", &all))
	worst = max(worst, report("while the state is written, in all", &whileWritten), report("all together", &total))
	out, count := list()
	if count != services {
		t.Errorf("list -json has %d components, want %d", count, services)
	}
	t.Logf("list -json: %.2f s, %.0f MiB", took.Seconds(), mib(out))
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
