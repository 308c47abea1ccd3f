//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// largeBytes is about the most that a service may have said.
const largeBytes = maxServiceBytes - 1000

// atOnce calls do so many times at once, and returns when all have returned.
func atOnce(times int, do func(i int)) {
	var calls sync.WaitGroup
	for i := range times {
		calls.Go(func() { do(i) })
	}
	calls.Wait()
}

// large is a registration of largeBytes of one character.
func large(id, character string) registration {
	metadata := make(map[string]string)
	for left := largeBytes; left > 0; left -= 4000 {
		metadata[fmt.Sprint("key-", left)] = strings.Repeat(character, min(left, 4000))
	}
	return registration{id: id, metadata: metadata}
}

// registerLarge registers services that are as large as they can be.
func registerLarge(t *testing.T, endpoint string, services int, character string) {
	t.Helper()
	const callers = 200 // so that they share writes of a state file
	clients := []planeClient{dialPlane(t, endpoint), dialPlane(t, endpoint), dialPlane(t, endpoint), dialPlane(t, endpoint)}
	atOnce(callers, func(first int) {
		for i := first; i < services; i += callers {
			if _, err := clients[first%len(clients)].register(t.Context(), "v1", large(fmt.Sprint("large-", i), character)); err != nil {
				t.Error(err)
				return
			}
		}
	})
}

// besiege throws so many MiB by attack at a control plane alone, which has services of
// largeBytes. It has to hold at most half of that, and to serve a neighbour all the while,
// and who comes after.
func besiege(t *testing.T, services int, thrown float64, attack func(p *process, endpoint string)) {
	t.Helper()
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
	registerLarge(t, endpoint, services, "x")
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmHWM")
	attack(p, endpoint)
	dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "late"})
	check()
	memoryGrew(t, p, before, thrown)
}

// Each row has more thrown at a control plane than it may hold, by more than one connection
// where a connection has a bound of its own. It is long because it is a table.
func TestLimits_HoldForTheWholePlane(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		services int     // of largeBytes that are there
		thrown   float64 // MiB
		attack   func(t *testing.T, endpoint string)
	}{
		{"headers", 0, 50 * 400_000 * 32 >> 20, func(t *testing.T, endpoint string) {
			u := dialClosed(t, endpoint)
			fields := "\x40\x01a\x00" + strings.Repeat("\xbe", 400_000) // each a field of one byte, by the table
			for range 50 {
				u.call(flowctlpb.ControlPlane_Heartbeat_FullMethodName, &emptypb.Empty{}, 1, fields)
			}
		}},
		{"requests that are never whole", 0, 40 * maxStreams * maxMessage >> 20, func(t *testing.T, endpoint string) {
			id := strings.Repeat("x", maxMessage-1000)
			for range 40 {
				u := dialClosed(t, endpoint)
				for range maxStreams {
					u.call(flowctlpb.ControlPlane_Heartbeat_FullMethodName, &flowctlpb.ServiceHeartbeat{ServiceId: id}, 100)
				}
			}
		}},
		{"services that come and go", 0, 4000 * largeBytes >> 20, func(t *testing.T, endpoint string) {
			c := dialPlane(t, endpoint)
			for range 4000 {
				c.mustRegister(t, "v1", large("large", "x"))
				get(c.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: "large"}))(t)
			}
		}},
		{"a million names of metrics", 0, 200, func(t *testing.T, endpoint string) {
			c := dialPlane(t, endpoint)
			const services, each = 50, 2000
			for n := range 1_000_000 / each {
				id, metrics := fmt.Sprint("s", n%services), make(map[string]string)
				for i := range each {
					metrics[fmt.Sprintf("metric-%d-%d", n, i)] = "1"
				}
				if n < services {
					c.mustRegister(t, "v1", registration{id: id})
				}
				_, err := c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: id, Metrics: metrics})
				wantCode(t, "heartbeat", err, codes.ResourceExhausted)
			}
			_, v1 := c.mustStatus(t, "s0")
			wantEqual(t, "metrics that are kept", len(v1.GetMetrics()), maxEntries)
		}},
		{"lists that are not read", 1000, 4 * 30 * 1000 * largeBytes >> 20, func(t *testing.T, endpoint string) {
			for range 4 {
				u := dialClosed(t, endpoint)
				for range 30 {
					u.call(flowctlv1.ControlPlaneService_ListComponents_FullMethodName, &emptypb.Empty{}, 0)
				}
			}
			c := dialPlane(t, endpoint, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
			eventually(t, "another's list", func() bool { // on a busy machine it may not be read within unreadTimeout
				out, err := c.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{})
				return err == nil && len(out.GetComponents()) >= 1000
			})
			if code, out, stderr := call(t, "list", "-e", endpoint); code != exitOK {
				t.Errorf("list, which is told in parts: exit %d\n%.1000s%s", code, out, stderr)
			}
		}},
		{"snapshots that are not read", 1000, maxStreams * 1000 * largeBytes >> 20, func(t *testing.T, endpoint string) {
			u := dialClosed(t, endpoint)
			for range maxStreams {
				u.call(operatorv1.Operator_Watch_FullMethodName, &operatorv1.WatchRequest{Follow: true}, 0)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			besiege(t, tt.services, tt.thrown, func(_ *process, endpoint string) { tt.attack(t, endpoint) })
		})
	}
}

// Strangers that have filled the registry of a run keep none of its components out, nor its list
// from its owner. They are not written, as the next run would not take them back.
func TestLimits_StrangersFillARun(t *testing.T) {
	t.Parallel()
	state := filepath.Join(t.TempDir(), "state.json")
	a := actor("a", role{Dialect: "v1"})
	a.RestartPolicy = "on-failure"
	p := start(t, runArgs(writePipeline(t, a), "-db-path", state, "-heartbeat-ttl", "10m"), withBinary(plainFlowctl()))
	p.waitReady()
	endpoint := p.endpoint()
	var strangers atomic.Int64
	atOnce(100, func(int) { // so many share writes of the state file
		c := dialPlane(t, endpoint)
		for i := strangers.Add(1); i < 2*maxGuestBytes/largeBytes; i = strangers.Add(1) {
			if _, err := c.register(t.Context(), "v1", large(fmt.Sprint("stranger-", i), "x")); err != nil {
				wantCode(t, "what has no room", err, codes.ResourceExhausted)
				return
			}
		}
		t.Error("there is room for ever more strangers")
	})
	p.tell("a", syscall.SIGKILL)
	p.wait(p.stderr, "msg=ready component=a ", 2)
	if code, out, stderr := call(t, "list", "-e", endpoint); code != exitOK || !strings.Contains(out, "\na ") {
		t.Errorf("list: exit %d\n%.500s%s", code, out, stderr)
	}
	if peak := memory(t, p.cmd.Process.Pid, "VmHWM"); peak > 200<<20 {
		t.Errorf("it held %.0f MiB", mib(peak))
	}
	p.stop()
	if size := get(os.Stat(state))(t).Size(); size > 4*maxServiceBytes {
		t.Errorf("the state file of one component has %d bytes", size)
	}
}

// Streams that have no end of their own keep nobody out: the oldest of them make room.
func TestLimits_EndlessStreamsMakeRoom(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
	check := neighbour(t, endpoint)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	watch := func(c planeClient) grpc.ServerStreamingClient[healthpb.HealthCheckResponse] {
		stream := get(healthpb.NewHealthClient(c.conn).Watch(ctx, &healthpb.HealthCheckRequest{}))(t)
		get(stream.Recv())(t)
		return stream
	}
	first := watch(dialPlane(t, endpoint))
	for n := 0; n < maxOtherStreams; n += maxStreams / 2 {
		c := dialPlane(t, endpoint)
		for range maxStreams / 2 {
			watch(c)
		}
	}
	_, err := first.Recv()
	wantCode(t, "the oldest", err, codes.Unavailable)
	watch(dialPlane(t, endpoint))
	check()
}

// A name of grpc.health.v1 that is watched is kept, so it has a bound.
func TestHealthWatch_LongNameIsRefused(t *testing.T) {
	t.Parallel()
	c := startPlane(t, testRegistry())
	stream, err := healthpb.NewHealthClient(c.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{Service: strings.Repeat("x", maxID+1)})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, "a long name", err, codes.ResourceExhausted)
}

// Who does not take the answers that it asks for, as they are too large for its client,
// keeps nobody else from theirs.
func TestList_AnswersThatAreAbandoned(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
	c, other := dialPlane(t, endpoint), dialPlane(t, endpoint, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	registerLarge(t, endpoint, 700, "x")
	for range 20 { // of 10 MiB each
		if _, err := c.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{}); err == nil || !strings.Contains(err.Error(), "larger than max") {
			t.Fatal(err)
		}
	}
	if out, err := other.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{}); err != nil || len(out.GetComponents()) != 700 {
		t.Errorf("another's list: %d components, %v", len(out.GetComponents()), err)
	}
}

// An answer that is too large is refused, and the services are told of in parts.
func TestList_AnswerPastItsBoundIsRefused(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
	services := maxAnswer/largeBytes + 1
	registerLarge(t, endpoint, services, "x")
	c := dialPlane(t, endpoint, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(2*maxAnswer)))
	_, err := c.v1.DiscoverComponents(t.Context(), &flowctlv1.DiscoveryRequest{})
	wantCode(t, "all of them", err, codes.ResourceExhausted)
	wantEqual(t, "services in a snapshot", len(snapshotOf(t, c)), services)
}

// Strangers that hold all connections that there can be keep nobody out: the one of them
// that has been silent for the longest time makes room, and no connection that is in use.
func TestConnections_TheSilentMakeRoom(t *testing.T) {
	t.Parallel()
	const most = 150
	p, endpoint := startAlone(t, []string{"-no-persistence"}, limited(fmt.Sprint("-n ", 2*most)))
	check := neighbour(t, endpoint)
	used := dialPlane(t, endpoint)
	used.mustRegister(t, "v1", registration{id: "used"}) // and then says nothing for longer than all strangers
	watching := dialPlane(t, endpoint)
	must(t, watching.follow(t.Context()))
	var strangers []net.Conn
	for range 2 * most {
		conn := get(dialRaw(endpoint, preface))(t)
		defer conn.Close()
		strangers = append(strangers, conn)
	}
	dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "component"})
	check()
	eventually(t, "room that the first have made", func() bool { return closed(strangers[0]) && closed(strangers[most/2]) })
	if closed(strangers[2*most-1]) {
		t.Error("the last stranger is cut off, too")
	}
	for what, c := range map[string]planeClient{"was in use": used, "has a stream": watching} {
		if state := c.conn.GetState(); state != connectivity.Ready {
			t.Errorf("a connection that %s is %s", what, state)
		}
	}
	p.waitErr(`msg="the control plane is at a bound, the oldest makes room" bound=connections at_most=150`)
}

// A connection with a lower rank makes room first, and of a rank the one that has been
// silent for longer.
func TestConnections_ComponentsStay(t *testing.T) {
	t.Parallel()
	all := newTraffic(slog.New(slog.DiscardHandler), maxConnections)
	conn := func(rank int32, heard int64) *countedConn {
		c := &countedConn{traffic: all}
		c.rank.Store(rank)
		c.heard.Store(heard)
		return c
	}
	component, caller, former, silent := conn(rankOwn, 1), conn(rankCaller, 3), conn(rankCaller, 2), conn(rankSilent, 4)
	for _, c := range []*countedConn{component, caller, former, silent} {
		all.open[c] = struct{}{}
	}
	for i, want := range []*countedConn{silent, former, caller, component} {
		all.maxConnections, all.withStrangers = len(all.open), len(all.open)
		newcomer := conn(rankOwn, 5)
		if got := all.add(newcomer); got != want {
			t.Errorf("%d. to make room is %v, want %v", i, got, want)
		}
	}
	all.maxConnections++ // as in a run: where all are flowctl's own there may be more
	if got := all.add(conn(rankOwn, 6)); got != nil {
		t.Errorf("%v makes room for flowctl's own where there are no strangers", got)
	}
	caller = conn(rankCaller, 7)
	all.maxConnections += 2
	if got := all.add(caller); got != nil {
		t.Errorf("%v makes room for a stranger", got)
	}
	if got := all.add(conn(rankOwn, 8)); got != caller {
		t.Errorf("%v makes room, want the stranger", got)
	}
}

// What strangers make a run hold is bounded, however they do it.
func TestConnections_StrangersOfARunAreFew(t *testing.T) {
	t.Parallel()
	p := start(t, runArgs(writePipeline(t, actor("a", role{Dialect: "v1"}))), withBinary(plainFlowctl()))
	p.waitReady()
	var last net.Conn
	for range 2 * maxGuestConnections {
		last = dialStranger(t, p.endpoint())
		get(io.WriteString(last, preface))(t)
	}
	eventually(t, "room that the first have made", func() bool {
		return !closed(last) && len(get(os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)))(t)) < maxGuestConnections+200
	})
	if peak := memory(t, p.cmd.Process.Pid, "VmHWM"); peak > 100<<20 {
		t.Errorf("it held %.0f MiB", mib(peak))
	}
	if code, out, stderr := call(t, "list", "-e", p.endpoint()); code != exitOK {
		t.Errorf("list: exit %d\n%s%s", code, out, stderr)
	}
	p.stop()
}

// dialStranger connects as a user who is not flowctl's: a socket is of the file system user of the
// thread that has made it.
func dialStranger(t *testing.T, endpoint string) net.Conn {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	syscall.RawSyscall(syscall.SYS_SETFSUID, 65520, 0, 0)
	conn, err := net.Dial("tcp", endpoint)
	syscall.RawSyscall(syscall.SYS_SETFSUID, 0, 0, 0)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Whatever strangers take up, flowctl's own do not wait for them, and make no room for them.
func TestLimits_StrangersHaveTheirOwn(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
	registerLarge(t, endpoint, 100, "x")
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	check := neighbour(t, endpoint)
	own := dialPlane(t, endpoint)
	watch := get(healthpb.NewHealthClient(own.conn).Watch(ctx, &healthpb.HealthCheckRequest{}))(t)
	get(watch.Recv())(t)
	half := dialClosed(t, endpoint)
	half.call(flowctlpb.ControlPlane_Heartbeat_FullMethodName, &emptypb.Empty{}, 100)
	for method, more := range map[string]int{
		healthpb.Health_Watch_FullMethodName:                        0,
		flowctlpb.ControlPlane_Heartbeat_FullMethodName:             100,
		flowctlv1.ControlPlaneService_ListComponents_FullMethodName: 0,
	} {
		for range 8 {
			u := speakClosed(dialStranger(t, endpoint))
			for range maxStreams {
				u.call(method, &emptypb.Empty{}, more)
			}
		}
	}
	for range 3 {
		begun := time.Now()
		get(own.v1.ListComponents(ctx, &flowctlv1.ListComponentsRequest{}))(t)
		if d := time.Since(begun); d > patience {
			t.Errorf("flowctl's own has a list after %v", d)
		}
	}
	check()
	if state := own.conn.GetState(); state != connectivity.Ready {
		t.Errorf("a connection with a stream is %s", state)
	}
	if closed(half.conn) {
		t.Error("a connection with an unfinished request is cut off")
	}
}

// A connection of flowctl's own by which no call has come yet stays where strangers come.
func TestConnections_FreshOnesOfItsOwnStay(t *testing.T) {
	t.Parallel()
	const most = 50
	_, endpoint := startAlone(t, []string{"-no-persistence"}, limited(fmt.Sprint("-n ", 2*most)))
	own := get(dialRaw(endpoint, preface))(t)
	defer own.Close()
	for range 2 * most {
		u := speakClosed(dialStranger(t, endpoint))
		u.call(flowctlpb.ControlPlane_Heartbeat_FullMethodName, &emptypb.Empty{}, 0)
	}
	dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "component"})
	if closed(own) {
		t.Error("it is cut off")
	}
}

// What a text counts is what it takes in the state file.
func TestTextSize_IsThatOfJSON(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "plain", "\x00\x01\n\x7f", `"\`, "<a&b>", "é\u2028\U0001f600"} {
		if n, most := len(get(json.Marshal(text))(t)), textSize(text); n >= most || most > 2*n+1 {
			t.Errorf("%q has %d bytes in JSON and counts %d", text, n, most)
		}
	}
	r := newRegistry(testTTL, testInterval, "", nil)
	_, _, err := r.register(large("large", "\x01"), origin{believed: true}, testEpoch)
	wantCode(t, "a registration that is large in JSON", err, codes.ResourceExhausted)
}

// closed reports whether the other end has closed conn.
func closed(conn net.Conn) bool {
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	_, err := io.Copy(io.Discard, conn)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// A list that nobody waits for any more is given up.
func TestList_EndsWithItsCaller(t *testing.T) {
	t.Parallel()
	r := newRegistry(testTTL, testInterval, "", nil)
	for i := range 10 * batch {
		mustRegister(t, r, registration{id: fmt.Sprint(i)}, testEpoch)
	}
	ctx, cancel := context.WithCancel(t.Context())
	seen := 0
	err := r.list(ctx, func(*service, time.Time) bool {
		seen++
		cancel()
		return true
	})
	wantCode(t, "the list", err, codes.Canceled)
	if seen > batch {
		t.Errorf("%d services were looked at after the caller had gone", seen)
	}
}

// docs/architecture.md has each bound with its value.
func TestLimitsAreDocumented(t *testing.T) {
	t.Parallel()
	text := get(os.ReadFile("docs/architecture.md"))(t)
	for name, value := range map[string]int{
		"maxConnections": maxConnections, "maxGuestConnections": maxGuestConnections, "maxCalls": maxCalls, "maxLists": maxLists, "maxUnfinished": maxUnfinished, "maxUnread": maxUnread, "maxFollowers": maxFollowers, "maxOtherStreams": maxOtherStreams, "maxServices": maxServices, "maxOtherBytes": maxOtherBytes, "maxGuests": maxGuests, "maxGuestBytes": maxGuestBytes, "maxCallerRuns": maxCallerRuns, "maxCallerRunBytes": maxCallerRunBytes, "maxFormer": maxFormer,
		"maxStreams": maxStreams, "maxMessage": maxMessage, "maxHeaders": maxHeaders, "maxAnswer": maxAnswer, "maxPart": maxPart, "maxEdges": maxEdges, "maxDirty": maxDirty, "maxWindow": maxWindow, "maxWindows": maxWindows, "maxEvent": maxEvent, "maxHeartbeat": maxHeartbeat,
		"maxServiceBytes": maxServiceBytes, "maxNames": maxNames, "maxEntries": maxEntries, "maxID": maxID, "maxText": maxText, "maxHistory": maxHistory,
	} {
		if !regexp.MustCompile(fmt.Sprintf("(?m)^\\| `%s` \\| %d\\b", name, value)).Match(text) {
			t.Errorf("docs/architecture.md does not say that %s is %d", name, value)
		}
	}
}

// neighbour registers a service at endpoint that heartbeats on, every few
// milliseconds, by a connection of its own. The function that it returns ends that, and
// checks that each was answered.
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
			within, cancel := context.WithTimeout(t.Context(), patience)
			_, err := c.legacy.Heartbeat(within, &flowctlpb.ServiceHeartbeat{ServiceId: "neighbour", Metrics: map[string]float64{"n": 1}})
			cancel()
			l.add(time.Since(begun), err)
			time.Sleep(2 * time.Millisecond) // its interval
		}
	})
	return func() {
		t.Helper()
		cancel()
		beats.Wait()
		l.report(t, "a neighbour's heartbeats")
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
	besiege(t, 0, float64(count)*0.4, func(p *process, endpoint string) {
		before, begun := memory(t, p.cmd.Process.Pid, "VmRSS"), time.Now()
		atOnce(50, func(int) {
			for range count / 50 {
				conn, err := dialRaw(endpoint, preface)
				if err != nil {
					t.Error(err)
					return
				}
				t.Cleanup(func() { conn.Close() })
			}
		})
		t.Logf("%d connections in %v, %.1f KiB each", count, time.Since(begun), float64(memory(t, p.cmd.Process.Pid, "VmRSS")-before)/1024/float64(count))
	})
}

// What never says anything is not kept for long.
func TestHalfOpenConnections(t *testing.T) {
	t.Parallel()
	besiege(t, 0, 200, func(_ *process, endpoint string) {
		var ends sync.WaitGroup
		for i := range 200 {
			hello := []string{"", "PRI * HTTP", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", preface[:24]}[i%4]
			conn := get(net.Dial("tcp", endpoint))(t)
			t.Cleanup(func() { conn.Close() })
			get(io.WriteString(conn, hello))(t)
			ends.Go(func() {
				_ = conn.SetReadDeadline(time.Now().Add(2 * patience))
				if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a connection that said %q is still open", hello)
				}
			})
		}
		ends.Wait()
	})
}

func TestConnectionStorm(t *testing.T) {
	t.Parallel()
	besiege(t, 0, 320, func(_ *process, endpoint string) {
		atOnce(16, func(i int) {
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
	})
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
	const legacy, v1 = "/flowctl.ControlPlane/", "/flowctl.v1.ControlPlaneService/"
	field := func(number byte, text string) []byte { // a string, or a message
		n := len(text)
		return append([]byte{number<<3 | 2, byte(n) | 0x80, byte(n>>7) | 0x80, byte(n >> 14)}, text...)
	}
	nearly := strings.Repeat("x", maxMessage-64)
	tests := []struct {
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
	}
	besiege(t, 0, 640, func(_ *process, endpoint string) {
		for _, test := range tests {
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
	})
}

// closedWindow is an HTTP/2 connection over which calls are made whose answers the client
// lets nothing come of: its window is closed (RFC 9113 section 6.9.2).
type closedWindow struct {
	conn   net.Conn
	stream uint32
}

func dialClosed(t *testing.T, endpoint string) *closedWindow {
	t.Helper()
	conn := get(net.Dial("tcp", endpoint))(t)
	t.Cleanup(func() { conn.Close() })
	return speakClosed(conn)
}

func speakClosed(conn net.Conn) *closedWindow {
	u := &closedWindow{conn: conn, stream: 1}
	u.write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00"))
	go io.Copy(io.Discard, conn) // what is said beside the answers
	return u
}

// write may fail: a server may end the connection of who does such things.
func (u *closedWindow) write(frames string) { _, _ = io.WriteString(u.conn, frames) }

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
	rest := string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)+more))) + string(message)
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

func frame(kind, flags byte, stream uint32, payload string) string {
	head := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags}
	return string(binary.BigEndian.AppendUint32(head, stream)) + payload
}

// wireMethods are what FuzzWire calls, the last of which there is not.
var wireMethods = []string{
	"flowctl.ControlPlane/Register", "flowctl.ControlPlane/Heartbeat", "flowctl.ControlPlane/GetServiceStatus", "flowctl.ControlPlane/ListServices",
	"flowctl.v1.ControlPlaneService/RegisterComponent", "flowctl.v1.ControlPlaneService/UnregisterComponent", "flowctl.v1.ControlPlaneService/DiscoverComponents",
	"flowctl.v1.ControlPlaneService/Heartbeat", "flowctl.v1.ControlPlaneService/GetComponentStatus", "flowctl.v1.ControlPlaneService/ListComponents",
	"flowctl.operator.v1.Operator/GetPipeline", "flowctl.operator.v1.Operator/Watch", "grpc.health.v1.Health/Check",
	"flowctl.ControlPlane/CreatePipelineRun", "flowctl.ControlPlane/UpdatePipelineRun", "flowctl.ControlPlane/GetPipelineRun", "flowctl.ControlPlane/ListPipelineRuns", "flowctl.ControlPlane/StopPipelineRun",
	"flowctl.ControlPlane/Nothing",
}

// wireMessage makes a message of the kind that wireMethods[method] takes.
func wireMessage(method int, a, b byte, text string) proto.Message {
	ids := []string{"ledgers", "transfers", "store", "x", "y", "z", "", strings.Repeat("l", maxID+1)}
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
	case 13:
		return &flowctlpb.CreatePipelineRunRequest{RunId: id, PipelineName: other, ConfigYaml: text, ComponentIds: []string{text}}
	case 14:
		return &flowctlpb.UpdatePipelineRunRequest{RunId: id, Status: flowctlpb.RunStatus(int8(b) % 8), Error: text, Metrics: &flowctlpb.RunMetrics{ComponentMetrics: map[string]*flowctlpb.ComponentMetrics{text: nil}}}
	case 15:
		return &flowctlpb.GetPipelineRunRequest{RunId: id}
	case 16:
		return &flowctlpb.ListPipelineRunsRequest{PipelineName: other, Status: flowctlpb.RunStatus(int8(a) % 8), Limit: int32(int8(b))}
	case 17:
		return &flowctlpb.StopPipelineRunRequest{RunId: id}
	}
	return &emptypb.Empty{}
}

// FuzzWire makes calls of its input, with messages that are what they should be and
// with any bytes.
func FuzzWire(f *testing.F) {
	for i := range wireMethods {
		f.Add([]byte{byte(i), 0, 0, 3, 0, byte(i), 1, 3, 4, 't', 'e', 'x', 't', byte(i), 2, 0, 0, 3, 0x0a, 1, 'x'})
	}
	f.Add([]byte{0, 1, 3, 3, 0, 7, 1, 3, 3, 1, 'm', 11, 1, 0, 0, 0, 5, 1, 3, 0, 0, 9, 1, 0, 0, 0})
	f.Add([]byte{4, 2, 0, 0, 4, 0x0a, 2, 0x0a, 0xff, 4, 2, 0, 0, 3, 0x12, 1, 0x80, 1, 2, 0, 0, 2, 0xff, 0xff})
	f.Add([]byte{13, 0, 3, 4, 1, 'x', 13, 0, 3, 4, 0, 14, 0, 3, 4, 1, 'e', 15, 0, 3, 0, 0, 16, 0, 0, 255, 0, 17, 0, 3, 0, 0, 17, 0, 3, 0, 0, 13, 2, 0, 0, 2, 0x12, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := testRegistry()
		lis := bufconn.Listen(64 << 10)
		p := servePlane(r, planeConfig{listeners: []planeListener{{Listener: lis}}, log: slog.New(slog.DiscardHandler)})
		defer p.stop()
		conn, err := grpc.NewClient("passthrough:///wire", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		must(t, err)
		defer conn.Close()
		for n := 0; len(in) >= 5 && n < 50 && !t.Failed(); n++ {
			method, raw, a, b := int(in[0])%len(wireMethods), in[1]%3 == 2, in[2], in[3]
			length := min(int(in[4]), len(in)-5)
			data := in[5 : 5+length]
			in = in[5+length:]
			if !raw {
				if data, err = proto.Marshal(wireMessage(method, a, b, string(data))); err != nil {
					continue // a text that is not UTF-8
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			if path := "/" + wireMethods[method]; strings.HasSuffix(path, "/Watch") {
				err = watchRaw(ctx, conn, path, data)
			} else {
				err = conn.Invoke(ctx, path, &data, new([]byte), grpc.ForceCodec(rawCodec{}))
			}
			cancel()
			switch code := status.Code(err); code {
			case codes.OK, codes.InvalidArgument, codes.NotFound, codes.ResourceExhausted:
			case codes.AlreadyExists, codes.FailedPrecondition:
				if !strings.Contains(wireMethods[method], "PipelineRun") {
					t.Errorf("%s(%q): %v", wireMethods[method], data, err)
				}
			case codes.Internal:
				if !raw {
					t.Errorf("%s(%q): %v", wireMethods[method], data, err)
				}
			case codes.Unimplemented:
				if method != len(wireMethods)-1 {
					t.Errorf("%s: %v", wireMethods[method], err)
				}
			default:
				t.Errorf("%s(%q): %v", wireMethods[method], data, err)
			}
		}
		checkRegistry(t, r, time.Now())
	})
}

// While file descriptors have run out, open connections go on. New ones get in once there is
// room.
func TestServer_RecoversFromNoDescriptors(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	p, endpoint := startAlone(t, []string{"-db-path", file, "-janitor-interval", "100ms"}, limited("-n 64"))
	check := neighbour(t, endpoint)
	old := dialPlane(t, endpoint)
	old.mustRegister(t, "legacy", registration{id: "before"})
	var conns []net.Conn
	for range 200 {
		conn := get(net.Dial("tcp", endpoint))(t)
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
	wantSaved(t, file, 4)
}

// silentRegistry holds services that were heard of at the time now, none since.
func silentRegistry(tb testing.TB, services int, ttl time.Duration, now time.Time) *registry {
	tb.Helper()
	r := newRegistry(ttl, time.Hour, "127.0.0.1:8080", nil)
	for i := range services {
		id := fmt.Sprint("service-", i)
		mustRegister(tb, r, registration{id: id, endpoint: "http://host:8080/health", outputEvents: []string{"ledger"}, metadata: map[string]string{"index": id}}, now)
		get(r.heartbeat(id, origin{believed: true}, 0, []metric{{name: "events", number: 1}, {name: "lag", number: 2}}, now))(tb)
	}
	return r
}

// longest returns the longest time between two calls of the function that it gives to f.
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
// registry's lock: a bounded number of services. It prints the time. It is long because it
// is one list of all that takes the lock.
func TestNoPause(t *testing.T) {
	services, rounds, full := 5000, 1, os.Getenv(scaleVar) != ""
	if full {
		services, rounds = 100_000, 3
	} else {
		t.Parallel()
	}
	// few checks how many services were gone through in one go.
	few := func(what string, n int) {
		if n > batch {
			t.Errorf("%s: %d services in one go, more than %d", what, n, batch)
		}
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
			return func(out *operatorv1.WatchResponse) error {
				few("a stream", len(out.GetComponents()))
				step()
				return nil
			}
		}
		o := newOperatorServer(r, nil, nil, nil, nil)
		w := get(o.join(nil, streamKind{follows: true}))(t)
		w.pause = 0
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
				n := len(r.changes(later))
				few("changes", n)
				told += n
				step()
			}
		})
		measure("follow", func(step func()) { w.send = send(step); _ = w.catchUp() })
		measure("save", func(step func()) {
			_, _ = r.save(writerFunc(func(p []byte) (int, error) {
				few("a write of the state", bytes.Count(p, []byte(`"id":`)))
				step()
				return len(p), nil
			}), "", runtime.Gosched)
		})
		n := 0
		measure("list", func(step func()) {
			_ = r.each(t.Context(), later, func(*service, time.Time) bool {
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
	}
	for what, d := range best {
		t.Logf("%s: %v at most", what, d)
	}
}
