//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// largeBytes is about the most that a service may have said.
const largeBytes = maxServiceBytes - 1000

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
	var calls sync.WaitGroup
	for first := range callers {
		c := clients[first%len(clients)]
		calls.Go(func() {
			for i := first; i < services; i += callers {
				if _, err := c.register(t.Context(), "v1", large(fmt.Sprint("large-", i), character)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	calls.Wait()
}

// Each row has more thrown at a control plane than it may hold, by more than one connection
// where a connection has a bound of its own. Who comes after is served.
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
				if _, err := c.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: "large"}); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"lists that are not read", 1000, 4 * 30 * 1000 * largeBytes >> 20, func(t *testing.T, endpoint string) {
			for range 4 {
				u := dialClosed(t, endpoint)
				for range 30 {
					u.call(flowctlv1.ControlPlaneService_ListComponents_FullMethodName, &emptypb.Empty{}, 0)
				}
			}
			c := dialPlane(t, endpoint, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
			out, err := c.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{})
			if err != nil || len(out.GetComponents()) < 1000 {
				t.Errorf("another's list: %d components, %v", len(out.GetComponents()), err)
			}
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
			p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
			registerLarge(t, endpoint, tt.services, "x")
			check := neighbour(t, endpoint)
			before := memory(t, p.cmd.Process.Pid, "VmHWM")
			tt.attack(t, endpoint)
			dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "late"})
			check()
			memoryGrew(t, p, before, tt.thrown)
		})
	}
}

// Streams that have no end of their own keep nobody out: the oldest of them make room.
func TestLimits_EndlessStreamsMakeRoom(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
	check := neighbour(t, endpoint)
	watch := func(c planeClient) grpc.ServerStreamingClient[healthpb.HealthCheckResponse] {
		stream, err := healthpb.NewHealthClient(c.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
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
	if got := len(snapshotOf(t, c)); got != services {
		t.Errorf("%d services in a snapshot, want %d", got, services)
	}
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
	var strangers []net.Conn
	for range 2 * most {
		conn, err := dialRaw(endpoint, preface)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		strangers = append(strangers, conn)
	}
	dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "component"})
	check()
	eventually(t, "room that the first have made", func() bool { return closed(strangers[0]) && closed(strangers[most/2]) })
	if closed(strangers[2*most-1]) {
		t.Error("the last stranger is cut off, too")
	}
	if state := used.conn.GetState(); state != connectivity.Ready {
		t.Errorf("a connection that was in use is %s", state)
	}
	p.waitErr(`msg="the control plane is at a bound, the oldest makes room" bound=connections at_most=150`)
}

// A connection with a lower rank makes room first, and of a rank the one that has been
// silent for longer.
func TestConnections_ComponentsStay(t *testing.T) {
	t.Parallel()
	all := newTraffic(slog.New(slog.DiscardHandler))
	all.maxConnections = 0
	conn := func(rank int32, heard int64) *countedConn {
		c := &countedConn{traffic: all}
		c.rank.Store(rank)
		c.heard.Store(heard)
		return c
	}
	component, caller, former, silent := conn(rankComponent, 1), conn(rankCaller, 3), conn(rankCaller, 2), conn(rankSilent, 4)
	for _, c := range []*countedConn{component, caller, former, silent} {
		all.open[c] = struct{}{}
	}
	for i, want := range []*countedConn{silent, former, caller, component} {
		all.maxConnections = len(all.open)
		newcomer := conn(rankComponent, 5)
		if got := all.add(newcomer); got != want {
			t.Errorf("%d. to make room is %v, want %v", i, got, want)
		}
	}
}

// closed reports whether the other end has closed conn.
func closed(conn net.Conn) bool {
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	_, err := io.Copy(io.Discard, conn)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// Who asks for what has many types holds nobody up: the lists of a request are bounded.
func TestDiscover_LongListIsRefused(t *testing.T) {
	t.Parallel()
	c := startPlane(t, testRegistry())
	types, filters := make([]string, maxEntries+1), make(map[string]string)
	for i := range types {
		types[i] = "t"
		filters[fmt.Sprint(i)] = ""
	}
	for what, in := range map[string]*flowctlv1.DiscoveryRequest{"event types": {EventTypes: types}, "metadata filters": {MetadataFilters: filters}} {
		_, err := c.v1.DiscoverComponents(t.Context(), in)
		wantCode(t, what, err, codes.ResourceExhausted)
	}
	_, err := c.v1.DiscoverComponents(t.Context(), &flowctlv1.DiscoveryRequest{EventTypes: types[:maxEntries]})
	wantCode(t, "as many as are allowed", err, codes.OK)
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
	text, err := os.ReadFile("docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]int{
		"maxConnections": maxConnections, "maxCalls": maxCalls, "maxUnfinished": maxUnfinished, "maxUnread": maxUnread, "maxFollowers": maxFollowers, "maxOtherStreams": maxOtherStreams, "maxServices": maxServices,
		"maxStreams": maxStreams, "maxMessage": maxMessage, "maxHeaders": maxHeaders, "maxAnswer": maxAnswer, "maxPart": maxPart, "maxDirty": maxDirty, "maxHeartbeat": maxHeartbeat,
		"maxServiceBytes": maxServiceBytes, "maxNames": maxNames, "maxEntries": maxEntries, "maxID": maxID, "maxText": maxText, "maxHistory": maxHistory,
	} {
		if !regexp.MustCompile(fmt.Sprintf("(?m)^\\| `%s` \\| %d\\b", name, value)).Match(text) {
			t.Errorf("docs/architecture.md does not say that %s is %d", name, value)
		}
	}
}
