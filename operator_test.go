//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
)

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

// snapshotOf is all that a control plane has now.
func snapshotOf(t *testing.T, c planeClient) watchedView {
	t.Helper()
	stream := get(operatorv1.NewOperatorClient(c.conn).Watch(t.Context(), &operatorv1.WatchRequest{}))(t)
	v := make(watchedView)
	for {
		out, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return v
		}
		must(t, err)
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
	ctx, cancel := context.WithTimeout(t.Context(), 10*patience)
	defer cancel()
	var changes, followers sync.WaitGroup
	over := make(chan struct{})
	var want watchedView
	for i := range 12 {
		own := dialPlane(t, c.conn.Target())
		stream := get(operatorv1.NewOperatorClient(own.conn).Watch(ctx, &operatorv1.WatchRequest{Follow: true, Heartbeats: i%3 == 0}))(t)
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
			for range 300 {
				now := time.Now()
				id := fmt.Sprint("service-", random.IntN(400))
				switch component := testMembers()[random.IntN(3)].id; random.IntN(13) {
				case 0, 1, 2, 3:
					mustRegister(t, r, registration{id: id, version: fmt.Sprint(random.Int())}, now)
				case 4, 5, 6:
					_, _ = r.heartbeat(id, origin{believed: true}, flowctlv1.HealthStatus(random.IntN(6)), nil, now)
				case 7, 8, 9:
					_, _ = r.unregister(id, origin{believed: true}, now)
				case 10:
					r.finished(component, []string{"", "exit status 1"}[random.IntN(2)], now)
				case 11:
					r.starting(component, now)
					r.markReady(component, now)
				case 12:
					r.checked(component, "", now)
					r.changes(now)
					c.readAll(t, id)
				}
			}
			for n := range 700 { // more removals than are remembered
				id := fmt.Sprint("passing-", i, "-", n)
				mustRegister(t, r, registration{id: id}, time.Now())
				_, _ = r.unregister(id, origin{believed: true}, time.Now())
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

// readAll asks for all that there is, and for one service that may not be there.
func (c planeClient) readAll(t *testing.T, id string) {
	t.Helper()
	get(c.legacy.ListServices(t.Context(), &emptypb.Empty{}))(t)
	get(c.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{IncludeUnhealthy: true}))(t)
	get(c.v1.DiscoverComponents(t.Context(), &flowctlv1.DiscoveryRequest{EventTypes: []string{"e"}}))(t)
	_, err := c.legacy.GetServiceStatus(t.Context(), &flowctlpb.ServiceInfo{ServiceId: id})
	_, errV1 := c.v1.GetComponentStatus(t.Context(), &flowctlv1.ComponentStatusRequest{ServiceId: id})
	for _, err := range []error{err, errV1} {
		if code := status.Code(err); code != codes.OK && code != codes.NotFound {
			t.Error(err)
		}
	}
}

// What is not read costs no memory, and is caught up with.
func TestFollowersThatDoNotRead(t *testing.T) {
	changes := 2_000
	if os.Getenv(scaleVar) != "" {
		changes = 100_000
	} else {
		t.Parallel()
	}
	p, endpoint := startAlone(t, []string{"-no-persistence", "-heartbeat-ttl", "1h"}, withBinary(plainFlowctl()))
	c := dialPlane(t, endpoint)
	ctx, cancel := context.WithTimeout(t.Context(), 10*patience)
	defer cancel()
	const services = 500
	text := strings.Repeat("x", 1000) // so that a snapshot is more than what lies on the way
	for i := range services {
		c.mustRegister(t, "v1", registration{id: fmt.Sprint("service-", i), description: text})
	}
	check := neighbour(t, endpoint)
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	var streams []grpc.ServerStreamingClient[operatorv1.WatchResponse]
	for range 16 {
		stream := get(operatorv1.NewOperatorClient(dialPlane(t, endpoint).conn).Watch(ctx, &operatorv1.WatchRequest{Follow: true}))(t)
		streams = append(streams, stream)
	}
	atOnce(20, func(w int) {
		own := dialPlane(t, endpoint)
		for n := w; n < changes; n += 20 {
			status := []flowctlv1.HealthStatus{flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY, flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY}[n/services%2]
			_, err := own.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: fmt.Sprint("service-", n%services), Status: status})
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	check()
	memoryGrew(t, p, before, float64(16*changes)/1000) // MiB: of what all of them were not told
	want := snapshotOf(t, c)
	for _, stream := range streams {
		make(watchedView).reaches(t, stream, want)
	}
}

// follow begins a stream of changes, which is open when its first message has come.
func (c planeClient) follow(ctx context.Context) error {
	stream, err := operatorv1.NewOperatorClient(c.conn).Watch(ctx, &operatorv1.WatchRequest{Follow: true})
	if err == nil {
		_, err = stream.Recv()
	}
	return err
}

func TestTooManyFollowers(t *testing.T) {
	t.Parallel()
	_, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
	check := neighbour(t, endpoint)
	var c planeClient
	watch := func() (context.CancelFunc, error) {
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		return cancel, c.follow(ctx)
	}
	var cancel context.CancelFunc
	for n := range maxFollowers {
		if n%(maxStreams/2) == 0 {
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

// A follower that was told of a service before it was on disk is told of its end.
func TestFollowerOfWhatIsNotOnDisk(t *testing.T) {
	t.Parallel()
	r := newRegistry(testTTL, testInterval, "", nil)
	restoreAll(t, r, nil, testEpoch)
	mustRegister(t, r, registration{id: "ghost"}, testEpoch)
	tell := follow(t, r)
	get(r.unregister("ghost", origin{believed: true}, testEpoch))(t)
	r.finishWrite(get(r.save(io.Discard, "", func() {}))(t), nil)
	if _, removed := tell(); len(removed) != 1 {
		t.Errorf("told of the end of %v", removed)
	}
}

// follow returns what a stream of changes of r tells at a call of tell, which is in the order of
// the services. What was there before is not told.
func follow(t *testing.T, r *registry) (tell func() (components []*operatorv1.Component, removed []int64)) {
	t.Helper()
	var components []*operatorv1.Component
	var removed []int64
	w, err := newOperatorServer(r, nil, nil, nil, nil).join(func(out *operatorv1.WatchResponse) error {
		components, removed = append(components, out.GetComponents()...), append(removed, out.GetRemoved()...)
		return nil
	}, streamKind{follows: true})
	must(t, err)
	must(t, w.snapshot())
	t.Cleanup(w.leave)
	return func() ([]*operatorv1.Component, []int64) {
		components, removed = nil, nil
		must(t, w.catchUp())
		return components, removed
	}
}

// A stream hears of another cause of the same condition; the run does not.
func TestWatch_ChangedCauseIsTold(t *testing.T) {
	t.Parallel()
	r, now := testRegistry(), testEpoch
	mustRegister(t, r, registration{id: "store"}, now)
	r.checked("store", "connection refused", now)
	wantChanges(t, r, now, "store: unregistered > unhealthy")
	tell := follow(t, r)
	for _, step := range []struct {
		do   func()
		want string
	}{
		{func() { r.checked("store", "timeout", now) }, "timeout"},
		{func() {
			_, _ = r.heartbeat("store", origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_STOPPING, nil, now)
		}, "it declared itself STOPPING"},
		{func() { r.finished("store", "exit status 1", now) }, "exit status 1"},
	} {
		step.do()
		if got, _ := tell(); len(got) != 1 || got[0].GetCause() != step.want || got[0].GetHealth() != "unhealthy" {
			t.Errorf("told %v, want the cause %q", got, step.want)
		}
		wantChanges(t, r, now)
	}
	r.checked("store", "timeout", now) // which is not what it is unhealthy for any more
	if got, _ := tell(); len(got) > 0 {
		t.Errorf("told %v where nothing has changed", got)
	}
}

// Where there is no state file each change is published once.
func TestRegistry_EachChangeIsPublishedOnce(t *testing.T) {
	t.Parallel()
	r, now := testRegistry(), testEpoch
	published := 0
	r.publish = func(int64) { published++ }
	for i, do := range []func(){
		func() { mustRegister(t, r, registration{id: "x"}, now) },
		func() { get(r.unregister("x", origin{believed: true}, now))(t) },
		func() { mustRegister(t, r, registration{id: "store"}, now) },
		func() { get(r.unregister("store", origin{believed: true}, now))(t) },
	} {
		published = 0
		if do(); published != 1 {
			t.Errorf("change %d is published %d times", i, published)
		}
	}
}

// Who asks a run of their own does so by the operators' socket, also with the flags of TLS that other runs need.
func TestOperator_SocketBesideTLSFlags(t *testing.T) {
	t.Parallel()
	dir, ca := t.TempDir(), newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	p := start(t, runArgs(sleeper(t), files.mutual()...), runsIn(dir))
	p.waitReady()
	reload := start(t, []string{"reload", "-tls-ca-cert", files.ca}, runsIn(dir)) // without a certificate of a client
	reload.exit(exitOK)
	p.stop()
}
