//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// The tests of this file do to a control plane what nobody should, and look at how
// those fare who do nothing wrong meanwhile.

// neighbour registers a service at endpoint that heartbeats on, every few
// milliseconds, by a connection of its own. The function that it returns ends that,
// and checks that none of it failed or took long.
func neighbour(t *testing.T, endpoint string) (check func()) {
	t.Helper()
	c := dialPlane(t, endpoint)
	c.mustRegister(t, "legacy", registration{id: "neighbour"})
	var l latencies
	var beats sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	beats.Go(func() {
		for ctx.Err() == nil {
			begun := time.Now()
			_, err := c.legacy.Heartbeat(t.Context(), &flowctlpb.ServiceHeartbeat{ServiceId: "neighbour", Metrics: map[string]float64{"n": 1}})
			l.add(time.Since(begun), err)
			time.Sleep(2 * time.Millisecond) // its interval
		}
	})
	return func() {
		t.Helper()
		cancel()
		beats.Wait()
		count, p50, p99, most, errs := l.take()
		t.Logf("a neighbour's %d heartbeats: p50 %v, p99 %v, most %v", count, p50, p99, most)
		if len(errs) > 0 || p99 > 2*time.Second {
			t.Errorf("a neighbour's heartbeats: p99 %v, %v", p99, errs)
		}
	}
}

// memoryGrew tells what a process has come to hold since it held before, and fails
// where it ever was more than most MiB more.
func memoryGrew(t *testing.T, p *process, before int, most float64) {
	t.Helper()
	rss, peak := memory(t, p.cmd.Process.Pid, "VmRSS"), memory(t, p.cmd.Process.Pid, "VmHWM")
	t.Logf("VmRSS %.1f MiB before, %.1f MiB after, %.1f MiB at most", mib(before), mib(rss), mib(peak))
	if mib(peak-before) > most {
		t.Errorf("memory grew by %.1f MiB, more than %.0f", mib(peak-before), most)
	}
}

// preface is how an HTTP/2 connection begins, with empty SETTINGS.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// dialRaw connects and says hello. It waits for an answer where there is to be one.
func dialRaw(endpoint, hello string) (net.Conn, error) {
	conn, err := net.Dial("tcp", endpoint)
	if err != nil || hello == "" {
		return conn, err
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err = io.WriteString(conn, hello); err == nil {
		_, err = conn.Read(make([]byte, 9))
	}
	if err != nil {
		conn.Close()
	}
	_ = conn.SetDeadline(time.Time{})
	return conn, err
}

func TestIdleConnections(t *testing.T) {
	count := 1000
	if os.Getenv(scaleVar) != "" {
		count = 10_000
	} else {
		t.Parallel()
	}
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	begun := time.Now()
	var dials sync.WaitGroup
	for range 50 {
		dials.Go(func() {
			for range count / 50 {
				conn, err := dialRaw(endpoint, preface)
				if err != nil {
					t.Error(err)
					return
				}
				t.Cleanup(func() { conn.Close() })
			}
		})
	}
	dials.Wait()
	t.Logf("%d connections in %v, %.1f KiB each", count, time.Since(begun), float64(memory(t, p.cmd.Process.Pid, "VmRSS")-before)/1024/float64(count))
	dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "late"})
	check()
	memoryGrew(t, p, before, float64(count)*0.1)
}

// What never says anything is not kept for long.
func TestHalfOpenConnections(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	var ends sync.WaitGroup
	for i := range 200 {
		hello := []string{"", "PRI * HTTP", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", preface[:24]}[i%4]
		conn, err := net.Dial("tcp", endpoint)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, hello); err != nil {
			t.Fatal(err)
		}
		ends.Go(func() {
			_ = conn.SetReadDeadline(time.Now().Add(2 * patience))
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("a connection that said %q is still open", hello)
			}
		})
	}
	ends.Wait()
	check()
	memoryGrew(t, p, before, 50)
}

func TestConnectionStorm(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	var storm sync.WaitGroup
	for i := range 16 {
		storm.Go(func() {
			for n := range 200 {
				conn, err := dialRaw(endpoint, []string{"", preface}[(i+n)%2])
				if err != nil {
					t.Error(err)
					return
				}
				_ = conn.(*net.TCPConn).SetLinger(0) // no port is left waiting
				conn.Close()
			}
		})
	}
	storm.Wait()
	check()
	memoryGrew(t, p, before, 50)
}

// rawCodec sends and takes messages as they are on the wire.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawCodec) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = slices.Clone(data)
	return nil
}

func TestOversizedAndMalformedMessages(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	const legacy, v1 = "/flowctl.ControlPlane/", "/flowctl.v1.ControlPlaneService/"
	field := func(number byte, text string) []byte { // a string, or a message
		n := len(text)
		return append([]byte{number<<3 | 2, byte(n) | 0x80, byte(n>>7) | 0x80, byte(n >> 14)}, text...)
	}
	nearly := strings.Repeat("x", maxMessage-64)
	for _, test := range []struct {
		name, method string
		in           []byte
		want         codes.Code
	}{
		{"above the bound", legacy + "Register", make([]byte, maxMessage+1), codes.ResourceExhausted},
		{"far above the bound", v1 + "Heartbeat", make([]byte, 64*maxMessage), codes.ResourceExhausted},
		{"id of a mebibyte", legacy + "Register", field(1, nearly), codes.ResourceExhausted},
		{"id of a mebibyte", v1 + "RegisterComponent", field(1, string(field(1, nearly[64:]))), codes.ResourceExhausted},
		{"id of a mebibyte", legacy + "Heartbeat", field(1, nearly), codes.NotFound},
		{"id of a mebibyte", v1 + "UnregisterComponent", field(1, nearly), codes.NotFound},
		{"id that is not UTF-8", legacy + "Register", field(1, "\xff\xfe"), codes.Internal},
		{"id that is not UTF-8", legacy + "Heartbeat", field(1, "neighbour\xc0"), codes.Internal},
		{"id that is not UTF-8", v1 + "RegisterComponent", field(1, string(field(1, "\xed\xa0\x80"))), codes.Internal},
		{"cut off", legacy + "Register", []byte{1<<3 | 2, 100, 'x'}, codes.Internal},
		{"endless number", v1 + "Heartbeat", []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, codes.Internal},
		{"unknown method", legacy + "Nothing", nil, codes.Unimplemented},
	} {
		t.Run(test.name+" "+filepath.Base(test.method), func(t *testing.T) {
			c := dialPlane(t, endpoint)
			for range 10 {
				err := c.conn.Invoke(t.Context(), test.method, &test.in, new([]byte), grpc.ForceCodec(rawCodec{}), grpc.MaxCallSendMsgSize(1<<30))
				wantCode(t, test.method, err, test.want)
				if message := status.Convert(err).Message(); len(message) > 4096 {
					t.Errorf("the error has %d bytes", len(message))
				}
			}
		})
	}
	check()
	memoryGrew(t, p, before, 100)
}

// TestManyMetricNames sends a million names of metrics in all.
func TestManyMetricNames(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	c := dialPlane(t, endpoint)
	const services, each = 50, 2000
	for s := range services {
		id := fmt.Sprint("s", s)
		c.mustRegister(t, "v1", registration{id: id})
		for n := range 1_000_000 / services / each {
			metrics := make(map[string]string, each)
			for i := range each {
				metrics[fmt.Sprintf("metric-%d-%d-%d", s, n, i)] = "1"
			}
			_, err := c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: id, Metrics: metrics})
			wantCode(t, "heartbeat", err, codes.ResourceExhausted)
		}
	}
	if _, v1 := c.mustStatus(t, "s0"); len(v1.GetMetrics()) != maxEntries {
		t.Errorf("%d metrics are kept, want %d", len(v1.GetMetrics()), maxEntries)
	}
	check()
	memoryGrew(t, p, before, 60)
}

// Nothing that a component says can do anything to a terminal.
func TestNothingRawIsShown(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence", "-heartbeat-ttl", "200ms", "-janitor-interval", "50ms", "-log-level", "debug"})
	watch := start(t, []string{"list", "-watch", "-e", endpoint})
	watch.waitOut("control plane alone")
	evil := "a\x1b[31m\x1b]0;x\a\r\n\t\b\x7f\u009b2J\u202e\u2028z"
	c := dialPlane(t, endpoint)
	for i, dialect := range dialects {
		c.mustRegister(t, dialect, registration{
			id: fmt.Sprint(evil, i), componentID: "c" + evil, name: evil, description: evil + "\x00", version: evil, endpoint: evil,
			inputEvents: []string{evil}, outputEvents: []string{evil}, metadata: map[string]string{evil: evil},
		})
	}
	send := func(status flowctlv1.HealthStatus) {
		_, err := c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: evil + "1", Metrics: map[string]string{evil: evil}, Status: status})
		wantCode(t, "heartbeat", err, codes.OK)
	}
	send(flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY)
	send(flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY)
	p.waitErr("no heartbeat for") // stale
	watch.waitOut("no heartbeat for")
	send(flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN)
	_, table, tableErr := call(t, "list", "-e", endpoint)
	_, details, detailsErr := call(t, "list", "-e", endpoint, evil+"1")
	_, nobody, nobodyErr := call(t, "list", "-e", endpoint, "nobody"+evil)
	_, err := c.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: evil + "1"})
	wantCode(t, "deregistration", err, codes.OK)
	watch.waitOut("removed")
	watch.signal(syscall.SIGINT)
	<-watch.done
	p.stop()
	if !strings.Contains(table, "\ufffd[31m") || !strings.Contains(details, "description:") {
		t.Errorf("the list does not show it:\n%s\n%s%s", table, details, detailsErr)
	}
	for what, text := range map[string]string{
		"table": table + tableErr, "details": details + detailsErr, "error": nobody + nobodyErr,
		"watch": watch.stdout.String() + watch.stderr.String(), "log": p.stdout.String() + p.stderr.String(),
	} {
		for _, r := range text {
			if r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == '\u2028') || !utf8.ValidString(text) {
				t.Errorf("%s: %q is in %q", what, r, text)
				break
			}
		}
	}
}

// watchedView is what a stream of changes has told: components by record.
type watchedView map[int64]*operatorv1.Component

func (v watchedView) take(out *operatorv1.WatchResponse) {
	if out.GetReset_() {
		clear(v)
	}
	for _, c := range out.GetComponents() {
		v[c.GetRecord()] = c
	}
	for _, record := range out.GetRemoved() {
		delete(v, record)
	}
}

// differs is the first difference of two views but for what no change is told of:
// signs of life and metrics.
func (v watchedView) differs(from watchedView) string {
	if len(v) != len(from) {
		return fmt.Sprintf("%d components, want %d", len(v), len(from))
	}
	for record, want := range from {
		got := v[record]
		if got == nil {
			return fmt.Sprintf("record %d is missing, want %v", record, want)
		}
		got, want := proto.CloneOf(got), proto.CloneOf(want)
		for _, c := range []*operatorv1.Component{got, want} {
			c.LastSeen, c.Metrics, c.TextMetrics = nil, nil, nil
		}
		if !proto.Equal(got, want) {
			return fmt.Sprintf("record %d:\n got %v\nwant %v", record, got, want)
		}
	}
	return ""
}

// snapshotOf is all that a control plane has now.
func snapshotOf(t *testing.T, c planeClient) watchedView {
	t.Helper()
	stream, err := operatorv1.NewOperatorClient(c.conn).Watch(t.Context(), &operatorv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	v := make(watchedView)
	for {
		out, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return v
		}
		if err != nil {
			t.Fatal(err)
		}
		v.take(out)
	}
}

// reaches reads a stream until it has told what want says.
func (v watchedView) reaches(t *testing.T, stream grpc.ServerStreamingClient[operatorv1.WatchResponse], want watchedView) {
	stuck := time.AfterFunc(patience, func() { t.Errorf("a follower does not get there") })
	defer stuck.Stop()
	for v.differs(want) != "" {
		out, err := stream.Recv()
		if err != nil {
			t.Errorf("%v: %s", err, v.differs(want))
			return
		}
		v.take(out)
	}
}

// Whoever follows, fast or slowly, comes to see what is.
func TestFollowersSeeWhatIs(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := newRegistry(time.Hour, time.Hour, "", testMembers())
	c := startPlane(t, r)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	var changes, followers sync.WaitGroup
	over := make(chan struct{})
	var want watchedView
	for i := range 12 {
		own := dialPlane(t, c.conn.Target())
		stream, err := operatorv1.NewOperatorClient(own.conn).Watch(ctx, &operatorv1.WatchRequest{Follow: true, Heartbeats: i%3 == 0})
		if err != nil {
			t.Fatal(err)
		}
		followers.Go(func() {
			v, random := make(watchedView), rand.New(rand.NewPCG(seed, uint64(i)))
			for reading := i%4 != 3; reading; { // the others begin when all is over
				out, err := stream.Recv()
				if err != nil {
					t.Error(err)
					return
				}
				v.take(out)
				if i%4 == 2 {
					time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond) // a slow reader
				}
				reading = !slices.ContainsFunc(out.GetComponents(), func(c *operatorv1.Component) bool { return c.GetId() == "last" })
			}
			<-over
			v.reaches(t, stream, want)
		})
	}
	for i := range 8 {
		changes.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(100+i)))
			for range 1500 {
				now := time.Now()
				id := fmt.Sprint("service-", random.IntN(400))
				switch component := testMembers()[random.IntN(3)].ID; random.IntN(12) {
				case 0, 1, 2, 3:
					mustRegister(t, r, registration{id: id, version: fmt.Sprint(random.Int())}, now)
				case 4, 5, 6:
					_, _ = r.heartbeat(id, origin{}, flowctlv1.HealthStatus(random.IntN(6)), now, func(*service, error) error { return nil })
				case 7, 8, 9:
					_, _ = r.unregister(id, origin{}, now)
				case 10:
					r.finished(component, []string{"", "exit status 1"}[random.IntN(2)], now)
				case 11:
					r.starting(component, now)
					r.admit(component, now)
				}
			}
			for n := range 700 { // more removals than are remembered
				id := fmt.Sprint("passing-", i, "-", n)
				mustRegister(t, r, registration{id: id}, time.Now())
				_, _ = r.unregister(id, origin{}, time.Now())
			}
		})
	}
	changes.Wait()
	mustRegister(t, r, registration{id: "last"}, time.Now())
	checkRegistry(t, r, time.Now())
	want = snapshotOf(t, c)
	close(over)
	followers.Wait()
}

// What is not read costs no memory, and is caught up with.
func TestFollowersThatDoNotRead(t *testing.T) {
	changes := 10_000
	if os.Getenv(scaleVar) != "" {
		changes = 100_000
	} else {
		t.Parallel()
	}
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	c := dialPlane(t, endpoint)
	const services = 500
	text := strings.Repeat("x", 1000) // so that a snapshot is more than what lies on the way
	for i := range services {
		c.mustRegister(t, "v1", registration{id: fmt.Sprint("service-", i), description: text})
	}
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	var streams []grpc.ServerStreamingClient[operatorv1.WatchResponse]
	for range 16 {
		stream, err := operatorv1.NewOperatorClient(dialPlane(t, endpoint).conn).Watch(t.Context(), &operatorv1.WatchRequest{Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, stream)
	}
	var calls sync.WaitGroup
	for w := range 20 {
		own := dialPlane(t, endpoint)
		calls.Go(func() {
			for n := w; n < changes; n += 20 {
				status := []flowctlv1.HealthStatus{flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY, flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY}[n/services%2]
				_, err := own.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: fmt.Sprint("service-", n%services), Status: status})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	calls.Wait()
	check()
	memoryGrew(t, p, before, 40)
	want := snapshotOf(t, c)
	for _, stream := range streams {
		make(watchedView).reaches(t, stream, want)
	}
}

func TestTooManyFollowers(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	check := neighbour(t, endpoint)
	var c planeClient
	watch := func() (context.CancelFunc, error) {
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		stream, err := operatorv1.NewOperatorClient(c.conn).Watch(ctx, &operatorv1.WatchRequest{Follow: true})
		if err == nil {
			_, err = stream.Recv()
		}
		return cancel, err
	}
	var cancel context.CancelFunc
	for n := range maxFollowers {
		if n%(maxCalls/2) == 0 {
			c = dialPlane(t, endpoint) // which has so many calls at most
		}
		var err error
		if cancel, err = watch(); err != nil {
			t.Fatal(err)
		}
	}
	_, err := watch()
	wantCode(t, "one too many", err, codes.ResourceExhausted)
	if code, out, stderr := call(t, "list", "-e", endpoint); code != exitOK || !strings.Contains(out, "neighbour") {
		t.Errorf("list beside them: exit %d\n%s%s", code, out, stderr)
	}
	cancel()
	eventually(t, "room for another", func() bool {
		_, err := watch()
		return err == nil
	})
	check()
}

// closedWindow is an HTTP/2 connection over which calls are made whose answers the client
// lets nothing come of: its window is closed (RFC 9113 section 6.9.2).
type closedWindow struct {
	conn   net.Conn
	stream uint32
}

func dialClosed(t *testing.T, endpoint string) *closedWindow {
	t.Helper()
	conn, err := net.Dial("tcp", endpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	u := &closedWindow{conn: conn, stream: 1}
	u.write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00"))
	go io.Copy(io.Discard, conn) // what is said beside the answers
	return u
}

// write may fail: a server may end the connection of who does such things.
func (u *closedWindow) write(frames string) { _, _ = io.WriteString(u.conn, frames) }

func frame(kind, flags byte, stream uint32, payload string) string {
	head := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags}
	return string(binary32(head, stream)) + payload
}

func binary32(b []byte, n uint32) []byte {
	return append(b, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

// call begins a call with a message, of which more bytes are announced than come.
func (u *closedWindow) call(method string, in proto.Message, more int, headers ...string) {
	message, _ := proto.Marshal(in)
	text := func(s string) string { return string(byte(len(s))) + s } // below 127 bytes
	block := "\x83\x86\x04" + text(method) + "\x01" + text("x") + "\x0f\x10" + text("application/grpc") + "\x00" + text("te") + text("trailers")
	const flagEnd, flagEndHeaders, most = 1, 4, 16 << 10
	kind := byte(1) // HEADERS, then CONTINUATION
	for rest := block + strings.Join(headers, ""); ; kind = 9 {
		if len(rest) <= most {
			u.write(frame(kind, flagEndHeaders, u.stream, rest))
			break
		}
		u.write(frame(kind, 0, u.stream, rest[:most]))
		rest = rest[most:]
	}
	rest := string(binary32([]byte{0}, uint32(len(message)+more))) + string(message)
	for ; len(rest) > most; rest = rest[most:] {
		u.write(frame(0, 0, u.stream, rest[:most]))
	}
	flags := byte(flagEnd)
	if more > 0 {
		flags = 0
	}
	u.write(frame(0, flags, u.stream, rest))
	u.stream += 2
}

// large is a registration with metadata of about so many bytes.
func large(id string, bytes int) registration {
	metadata := make(map[string]string)
	for i := range bytes / 4000 {
		metadata[fmt.Sprint("key-", i)] = strings.Repeat("x", 4000)
	}
	return registration{id: id, metadata: metadata}
}

// Each of these took gigabytes.
func TestWhatIsNotBounded(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		large  int // services of half a mebibyte that are there
		most   float64
		attack func(t *testing.T, endpoint string)
	}{
		{"headers", 0, 40, func(t *testing.T, endpoint string) {
			u := dialClosed(t, endpoint)
			fields := "\x40\x01a\x00" + strings.Repeat("\xbe", 400_000) // each a field of one byte, by the table
			for range 50 {
				u.call(flowctlpb.ControlPlane_Heartbeat_FullMethodName, &emptypb.Empty{}, 1, fields)
			}
		}},
		{"requests that are never whole", 0, 250, func(t *testing.T, endpoint string) {
			u := dialClosed(t, endpoint)
			for range 4 * maxCalls {
				u.call(flowctlpb.ControlPlane_Heartbeat_FullMethodName, &flowctlpb.ServiceHeartbeat{ServiceId: strings.Repeat("x", maxMessage-1000)}, 100)
			}
		}},
		{"services that come and go", 0, 100, func(t *testing.T, endpoint string) {
			c := dialPlane(t, endpoint)
			for i := range 200 {
				c.mustRegister(t, "v1", registration{id: fmt.Sprint("small-", i)})
			}
			for range 200 {
				c.mustRegister(t, "v1", large("large", 1<<20-1<<15))
				if _, err := c.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: "large"}); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"lists that are not read", 30, 300, func(t *testing.T, endpoint string) {
			for range 4 {
				u := dialClosed(t, endpoint)
				for range 30 {
					u.call(flowctlv1.ControlPlaneService_ListComponents_FullMethodName, &emptypb.Empty{}, 0)
				}
			}
			c := dialPlane(t, endpoint)
			eventually(t, "a list is refused", func() bool {
				_, err := c.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{})
				return status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "have not been read")
			})
		}},
		{"snapshots that are not read", 60, 220, func(t *testing.T, endpoint string) {
			u := dialClosed(t, endpoint)
			for range maxCalls {
				u.call(operatorv1.Operator_Watch_FullMethodName, &operatorv1.WatchRequest{Follow: true}, 0)
			}
		}},
		{"names of health that are watched", 0, 40, func(t *testing.T, endpoint string) {
			stream, err := healthpb.NewHealthClient(dialPlane(t, endpoint).conn).Watch(t.Context(), &healthpb.HealthCheckRequest{Service: strings.Repeat("x", maxID+1)})
			if err == nil {
				_, err = stream.Recv()
			}
			wantCode(t, "a long name", err, codes.ResourceExhausted)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
			c := dialPlane(t, endpoint)
			for i := range tt.large {
				c.mustRegister(t, "v1", large(fmt.Sprint("large-", i), 1<<19))
			}
			check := neighbour(t, endpoint)
			before := memory(t, p.cmd.Process.Pid, "VmHWM")
			tt.attack(t, endpoint)
			dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "late"})
			check()
			memoryGrew(t, p, before, tt.most)
		})
	}
}

// Who does not take the answers that it asks for, as they are too large for its client,
// keeps nobody else from theirs.
func TestListsThatAreAbandoned(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	c, other := dialPlane(t, endpoint), dialPlane(t, endpoint, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	for i := range 20 {
		c.mustRegister(t, "v1", large(fmt.Sprint("large-", i), 1<<19))
	}
	for range 20 { // of 10 MiB each
		if _, err := c.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{}); !strings.Contains(err.Error(), "larger than max") {
			t.Fatal(err)
		}
	}
	if out, err := other.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{}); err != nil || len(out.GetComponents()) != 20 {
		t.Errorf("another's list: %d components, %v", len(out.GetComponents()), err)
	}
}

// Lists are answered again when those who have not read theirs are gone.
func TestListAfterThoseWhoDoNotRead(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainBinary(t)))
	c := dialPlane(t, endpoint)
	for i := range 30 {
		c.mustRegister(t, "v1", large(fmt.Sprint("large-", i), 1<<19))
	}
	refused := func() bool {
		_, err := c.legacy.ListServices(t.Context(), &emptypb.Empty{})
		return status.Code(err) == codes.ResourceExhausted
	}
	u := dialClosed(t, endpoint)
	for range 30 {
		u.call(flowctlv1.ControlPlaneService_ListComponents_FullMethodName, &emptypb.Empty{}, 0)
	}
	eventually(t, "lists are refused", refused)
	if code, out, stderr := call(t, "list", "-e", endpoint); code != exitOK {
		t.Errorf("list, which is told in pieces: exit %d\n%s%s", code, out, stderr)
	}
	u.conn.Close()
	eventually(t, "lists are answered", func() bool { return !refused() })
}

// Where file descriptors run out, those who are connected go on, and others get in
// when there is room.
func TestNoMoreDescriptors(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	p, endpoint := startAlone(t, []string{"-db-path", file, "-janitor-interval", "100ms"}, limited("-n 64"))
	check := neighbour(t, endpoint)
	old := dialPlane(t, endpoint)
	old.mustRegister(t, "legacy", registration{id: "before"})
	var conns []net.Conn
	for range 200 {
		conn, err := net.Dial("tcp", endpoint)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	old.mustRegister(t, "v1", registration{id: "while"})
	for _, conn := range conns {
		conn.Close()
	}
	dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "after"})
	check()
	p.stop()
	p.hasNot(p.stderr, "control plane ended")
	if got := countSaved(t, file); got != 4 {
		t.Errorf("%d services are saved, want 4", got)
	}
}

// A full registry makes room for a new service by the one that has been silent for
// the longest time, and never by one that lives.
func TestFullRegistryForgetsTheSilent(t *testing.T) {
	t.Parallel()
	r, now := newRegistry(testTTL, testInterval, "", nil), testEpoch
	for i := range maxServices {
		mustRegister(t, r, registration{id: fmt.Sprint("service-", i)}, now)
	}
	const silent = 1000
	now = now.Add(testInterval)
	for i := silent; i < maxServices; i++ {
		if err := beat(r, fmt.Sprint("service-", i), now); err != nil {
			t.Fatal(err)
		}
	}
	for now = now.Add(testInterval); !now.After(testEpoch.Add(testTTL)); now = now.Add(testInterval / 2) {
		r.sweep(now)
	}
	for r.sweep(now).Equal(now) {
	}
	for i := range silent {
		mustRegister(t, r, registration{id: fmt.Sprint("new-", i)}, now)
		wantCode(t, "the longest silent", r.view(fmt.Sprint("service-", i), now, func(*service, time.Time) {}), codes.NotFound)
		if i < silent-1 {
			wantCode(t, "the next", r.view(fmt.Sprint("service-", i+1), now, func(*service, time.Time) {}), codes.OK)
		}
	}
	_, err := r.register(registration{id: "one-more"}, origin{}, now, func(string, []string, map[string]string) {})
	wantCode(t, "one more", err, codes.ResourceExhausted)
	for i := silent; i < maxServices; i++ {
		wantCode(t, "a live one", beat(r, fmt.Sprint("service-", i), now), codes.OK)
	}
}

func TestFullOfBytes(t *testing.T) {
	t.Parallel()
	r, now := newRegistry(testTTL, testInterval, "", nil), testEpoch
	large := strings.Repeat("x", maxText)
	mustRegister(t, r, registration{id: "neighbour"}, now)
	metrics := make(map[string]string)
	for i := range maxEntries {
		metrics[fmt.Sprint(i)] = large
	}
	fill := func(id string) error {
		_, err := r.heartbeat(id, origin{}, 0, now, func(s *service, full error) error {
			return takeMetrics(s, metrics, func(text string) metric { return metric{text: text, isText: true} }, full)
		})
		return err
	}
	n := 0
	var err error
	for ; err == nil && n < 1000; n++ {
		id := fmt.Sprint("large-", n)
		if _, err = r.register(registration{id: id}, origin{}, now, func(string, []string, map[string]string) {}); err == nil {
			err = fill(id)
		}
	}
	wantCode(t, "the last", err, codes.ResourceExhausted)
	if r.bytes > maxBytes+2*maxMessage {
		t.Errorf("%d bytes are held, %d are allowed", r.bytes, maxBytes)
	}
	wantCode(t, "a neighbour's heartbeat", beat(r, "neighbour", now), codes.OK)
	if _, err := r.register(registration{id: "large-0"}, origin{}, now, func(string, []string, map[string]string) {}); err != nil {
		t.Errorf("the same again: %v", err)
	}
	wantCode(t, "what there is room for again", fill("large-0"), codes.OK)
	_, err = r.register(registration{id: "new", description: large}, origin{}, now, func(string, []string, map[string]string) {})
	wantCode(t, "a new service", err, codes.ResourceExhausted)
	for range 5 {
		now = now.Add(testInterval)
		wantCode(t, "a neighbour's heartbeat", beat(r, "neighbour", now), codes.OK)
		for r.sweep(now).Equal(now) {
		}
	}
	mustRegister(t, r, registration{id: "new", description: large}, now)
	wantCode(t, "the longest silent", r.view("large-1", now, func(*service, time.Time) {}), codes.NotFound)
	checkRegistry(t, r, now)
}

// FuzzWire makes calls of its input, with messages that are what they should be and
// with any bytes.
func FuzzWire(f *testing.F) {
	methods := []string{
		"flowctl.ControlPlane/Register", "flowctl.ControlPlane/Heartbeat", "flowctl.ControlPlane/GetServiceStatus", "flowctl.ControlPlane/ListServices",
		"flowctl.v1.ControlPlaneService/RegisterComponent", "flowctl.v1.ControlPlaneService/UnregisterComponent", "flowctl.v1.ControlPlaneService/DiscoverComponents",
		"flowctl.v1.ControlPlaneService/Heartbeat", "flowctl.v1.ControlPlaneService/GetComponentStatus", "flowctl.v1.ControlPlaneService/ListComponents",
		"flowctl.operator.v1.Operator/GetPipeline", "flowctl.operator.v1.Operator/Watch", "grpc.health.v1.Health/Check", "flowctl.ControlPlane/Nothing",
	}
	ids := []string{"ledgers", "transfers", "store", "x", "y", "z", "", strings.Repeat("l", maxID+1)}
	// message makes one of the kind that method takes.
	message := func(method int, a, b byte, text string) proto.Message {
		id, other := ids[a%8], ids[b%8]
		texts := map[string]string{text: other, metadataComponentID: other}
		switch method {
		case 0, 2:
			return &flowctlpb.ServiceInfo{ServiceId: id, ComponentId: other, ServiceType: flowctlpb.ServiceType(int8(a)), HealthEndpoint: text, MaxInflight: int32(b), Metadata: texts, InputEventTypes: []string{text}, OutputEventTypes: []string{text}}
		case 1:
			return &flowctlpb.ServiceHeartbeat{ServiceId: id, Metrics: map[string]float64{text: float64(a), other: math.Inf(int(b) - 128)}}
		case 4:
			return &flowctlv1.RegisterRequest{ComponentId: other, Component: &flowctlv1.ComponentInfo{Id: id, Name: text, Type: flowctlv1.ComponentType(int8(a)), Endpoint: text, Metadata: texts}}
		case 5:
			return &flowctlv1.UnregisterRequest{ServiceId: id}
		case 6:
			return &flowctlv1.DiscoveryRequest{Type: flowctlv1.ComponentType(b % 5), EventTypes: []string{text}}
		case 7:
			return &flowctlv1.HeartbeatRequest{ServiceId: id, Status: flowctlv1.HealthStatus(int8(b) % 8), Metrics: texts}
		case 8:
			return &flowctlv1.ComponentStatusRequest{ServiceId: id}
		case 9:
			return &flowctlv1.ListComponentsRequest{TypeFilter: flowctlv1.ComponentType(a % 5), IncludeUnhealthy: b%2 == 0}
		case 11:
			return &operatorv1.WatchRequest{Follow: a%2 == 0, Heartbeats: b%2 == 0}
		}
		return &emptypb.Empty{}
	}
	for i := range methods {
		f.Add([]byte{byte(i), 0, 0, 3, 0, byte(i), 1, 3, 4, 't', 'e', 'x', 't', byte(i), 2, 0, 0, 3, 0x0a, 1, 'x'})
	}
	f.Add([]byte{0, 1, 3, 3, 0, 7, 1, 3, 3, 1, 'm', 11, 1, 0, 0, 0, 5, 1, 3, 0, 0, 9, 1, 0, 0, 0})
	f.Add([]byte{4, 2, 0, 0, 4, 0x0a, 2, 0x0a, 0xff, 4, 2, 0, 0, 3, 0x12, 1, 0x80, 1, 2, 0, 0, 2, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := testRegistry()
		lis := bufconn.Listen(64 << 10)
		p := servePlane(lis, r, planeSettings{}, slog.New(slog.DiscardHandler))
		defer p.stop()
		conn, err := grpc.NewClient("passthrough:///wire", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for n := 0; len(in) >= 5 && n < 50 && !t.Failed(); n++ {
			method, raw, a, b := int(in[0])%len(methods), in[1]%3 == 2, in[2], in[3]
			length := min(int(in[4]), len(in)-5)
			data := in[5 : 5+length]
			in = in[5+length:]
			if !raw {
				if data, err = proto.Marshal(message(method, a, b, string(data))); err != nil {
					continue // a text that is not UTF-8
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			if path := "/" + methods[method]; strings.HasSuffix(path, "/Watch") {
				err = watchRaw(ctx, conn, path, data)
			} else {
				err = conn.Invoke(ctx, path, &data, new([]byte), grpc.ForceCodec(rawCodec{}))
			}
			cancel()
			switch code := status.Code(err); code {
			case codes.OK, codes.InvalidArgument, codes.NotFound, codes.ResourceExhausted:
			case codes.Internal:
				if !raw {
					t.Errorf("%s(%q): %v", methods[method], data, err)
				}
			case codes.Unimplemented:
				if method != len(methods)-1 {
					t.Errorf("%s: %v", methods[method], err)
				}
			default:
				t.Errorf("%s(%q): %v", methods[method], data, err)
			}
		}
		checkRegistry(t, r, time.Now())
	})
}

// watchRaw reads a stream of changes up to the end of the first snapshot.
func watchRaw(ctx context.Context, conn *grpc.ClientConn, method string, data []byte) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method, grpc.ForceCodec(rawCodec{}))
	if err != nil {
		return err
	}
	if err := errors.Join(stream.SendMsg(&data), stream.CloseSend()); err != nil {
		return err
	}
	for {
		var got []byte
		if err := stream.RecvMsg(&got); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		out := &operatorv1.WatchResponse{}
		if err := proto.Unmarshal(got, out); err != nil || out.GetComplete() {
			return err
		}
	}
}
