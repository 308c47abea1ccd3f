//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

const (
	testTTL      = 30 * time.Second
	testInterval = 10 * time.Second
)

// planeClient speaks both dialects over one connection.
type planeClient struct {
	conn   *grpc.ClientConn
	legacy flowctlpb.ControlPlaneClient
	v1     flowctlv1.ControlPlaneServiceClient
}

// startPlane serves r on a free port of the loopback until the test ends.
func startPlane(t testing.TB, r *registry) planeClient {
	t.Helper()
	lis, endpoint, err := listenPlane("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	p := servePlane(r, planeConfig{listener: lis, log: slog.New(slog.DiscardHandler)})
	t.Cleanup(p.stop)
	return dialPlane(t, endpoint)
}

func dialPlane(t testing.TB, endpoint string, options ...grpc.DialOption) planeClient {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return planeClient{conn, flowctlpb.NewControlPlaneClient(conn), flowctlv1.NewControlPlaneServiceClient(conn)}
}

// dialects are the names of the tests that run in both.
var dialects = []string{"legacy", "v1"}

// testAck is what both dialects answer to a registration.
type testAck struct {
	id     string
	topics []string
	info   map[string]string
}

// register sends what reg says in the words of the dialect.
func (c planeClient) register(ctx context.Context, dialect string, reg registration) (testAck, error) {
	if dialect == "legacy" {
		ack, err := c.legacy.Register(ctx, &flowctlpb.ServiceInfo{
			ServiceId: reg.id, ComponentId: reg.componentID, ServiceType: reg.kind, HealthEndpoint: reg.endpoint, MaxInflight: reg.maxInflight,
			InputEventTypes: reg.inputEvents, OutputEventTypes: reg.outputEvents, Metadata: reg.metadata,
		})
		return testAck{ack.GetServiceId(), ack.GetTopicNames(), ack.GetConnectionInfo()}, err
	}
	ack, err := c.v1.RegisterComponent(ctx, &flowctlv1.RegisterRequest{ComponentId: reg.componentID, Component: &flowctlv1.ComponentInfo{
		Id: reg.id, Type: flowctlv1.ComponentType(reg.kind), Endpoint: reg.endpoint, Name: reg.name, Description: reg.description, Version: reg.version,
		InputEventTypes: reg.inputEvents, OutputEventTypes: reg.outputEvents, Metadata: reg.metadata,
	}})
	return testAck{ack.GetServiceId(), ack.GetAssignedTopics(), ack.GetConnectionInfo()}, err
}

func (c planeClient) mustRegister(t testing.TB, dialect string, reg registration) testAck {
	t.Helper()
	ack, err := c.register(t.Context(), dialect, reg)
	if err != nil {
		t.Fatalf("%s registration %+v: %v", dialect, reg, err)
	}
	return ack
}

func (c planeClient) heartbeat(ctx context.Context, dialect, id string) error {
	var err error
	if dialect == "legacy" {
		_, err = c.legacy.Heartbeat(ctx, &flowctlpb.ServiceHeartbeat{ServiceId: id})
	} else {
		_, err = c.v1.Heartbeat(ctx, &flowctlv1.HeartbeatRequest{ServiceId: id})
	}
	return err
}

func (c planeClient) mustStatus(t testing.TB, id string) (*flowctlpb.ServiceStatus, *flowctlv1.ComponentStatusResponse) {
	t.Helper()
	legacy, err := c.legacy.GetServiceStatus(t.Context(), &flowctlpb.ServiceInfo{ServiceId: id})
	if err != nil {
		t.Fatalf("GetServiceStatus(%q): %v", id, err)
	}
	v1, err := c.v1.GetComponentStatus(t.Context(), &flowctlv1.ComponentStatusRequest{ServiceId: id})
	if err != nil {
		t.Fatalf("GetComponentStatus(%q): %v", id, err)
	}
	return legacy, v1
}

// restoreAll has r take over services.
func restoreAll(t testing.TB, r *registry, services []savedService, now time.Time) {
	t.Helper()
	_, _, err := r.restore(func(yield func(savedService, error) bool) {
		for _, in := range services {
			if !yield(in, nil) {
				return
			}
		}
	}, now)
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: got %v (%v), want %v", what, got, err, want)
	}
}

func wantProto(t testing.TB, what string, got, want proto.Message) {
	t.Helper()
	if !proto.Equal(got, want) {
		t.Errorf("%s:\n got %v\nwant %v", what, got, want)
	}
}

// listedIDs are the ids that ListServices gives, in its order.
func listedIDs(t testing.TB, r *registry) []string {
	t.Helper()
	list, err := legacyServer{registry: r}.ListServices(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, s := range list.GetServices() {
		out = append(out, s.GetServiceId())
	}
	return out
}

// Protocol

func TestServiceIsSeenThroughBothDialects(t *testing.T) {
	t.Parallel()
	var (
		sink     = flowctlpb.ServiceType_SERVICE_TYPE_SINK
		consumer = flowctlv1.ComponentType_COMPONENT_TYPE_CONSUMER
		healthy  = flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY
	)
	for _, test := range []struct {
		name    string
		dialect string
		reg     registration
		legacy  []map[string]float64 // metrics of heartbeats, sent first
		v1      []map[string]string
		want    *flowctlpb.ServiceStatus
		wantV1  *flowctlv1.ComponentStatusResponse
	}{{
		name: "legacy sink is a consumer", dialect: "legacy",
		reg:    registration{id: "x", kind: sink, endpoint: "h:1", inputEvents: []string{"a"}, metadata: map[string]string{"k": "v"}},
		want:   &flowctlpb.ServiceStatus{ServiceId: "x", ServiceType: sink, IsHealthy: true},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "x", Type: consumer, Endpoint: "h:1", InputEventTypes: []string{"a"}, Metadata: map[string]string{"k": "v"}}},
	}, {
		name: "v1 consumer is a sink", dialect: "v1",
		reg:    registration{id: "x", kind: sink, name: "n", description: "d", version: "1", outputEvents: []string{"b"}},
		want:   &flowctlpb.ServiceStatus{ServiceId: "x", ServiceType: sink, IsHealthy: true},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "x", Type: consumer, Name: "n", Description: "d", Version: "1", OutputEventTypes: []string{"b"}}},
	}, {
		name: "legacy type PIPELINE is unspecified in v1", dialect: "legacy",
		reg:    registration{id: "x", kind: flowctlpb.ServiceType_SERVICE_TYPE_PIPELINE},
		want:   &flowctlpb.ServiceStatus{ServiceId: "x", ServiceType: flowctlpb.ServiceType_SERVICE_TYPE_PIPELINE, IsHealthy: true},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "x"}},
	}, {
		name: "unknown type is unspecified in both", dialect: "v1",
		reg:    registration{id: "x", kind: 77},
		want:   &flowctlpb.ServiceStatus{ServiceId: "x", IsHealthy: true},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "x"}},
	}, {
		name: "component of the pipeline", dialect: "legacy",
		reg:    registration{componentID: "store"},
		want:   &flowctlpb.ServiceStatus{ServiceId: "store", ComponentId: "store", ServiceType: sink, IsHealthy: true},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "store", Type: consumer, InputEventTypes: []string{"transfer"}}},
	}, {
		name: "metrics merge key by key", dialect: "legacy",
		reg:    registration{id: "x"},
		legacy: []map[string]float64{{"a": 1, "b": 2}, {"b": 3.5, "c": 1e100}},
		v1:     []map[string]string{{"a": "10"}, {"d": "4"}},
		want:   &flowctlpb.ServiceStatus{ServiceId: "x", IsHealthy: true, Metrics: map[string]float64{"a": 10, "b": 3.5, "c": 1e100, "d": 4}},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "x"}, Metrics: map[string]string{"a": "10", "b": "3.5", "c": "1e+100", "d": "4"}},
	}, {
		name: "v1 metric that is no number only in v1", dialect: "v1",
		reg:    registration{id: "x"},
		v1:     []map[string]string{{"a": "7", "state": "catching up", "none": "", "huge": "1e999"}},
		want:   &flowctlpb.ServiceStatus{ServiceId: "x", IsHealthy: true, Metrics: map[string]float64{"a": 7}},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "x"}, Metrics: map[string]string{"a": "7", "state": "catching up", "none": "", "huge": "1e999"}},
	}, {
		name: "NaN and Inf", dialect: "legacy",
		reg:    registration{id: "x"},
		legacy: []map[string]float64{{"n": math.NaN(), "p": math.Inf(1), "m": math.Inf(-1), "z": math.Copysign(0, -1)}},
		want:   &flowctlpb.ServiceStatus{ServiceId: "x", IsHealthy: true, Metrics: map[string]float64{"n": math.NaN(), "p": math.Inf(1), "m": math.Inf(-1), "z": math.Copysign(0, -1)}},
		wantV1: &flowctlv1.ComponentStatusResponse{Status: healthy, Component: &flowctlv1.ComponentInfo{Id: "x"}, Metrics: map[string]string{"n": "NaN", "p": "+Inf", "m": "-Inf", "z": "-0"}},
	}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := startPlane(t, testRegistry())
			before := time.Now()
			id := c.mustRegister(t, test.dialect, test.reg).id
			for _, metrics := range test.legacy {
				_, err := c.legacy.Heartbeat(t.Context(), &flowctlpb.ServiceHeartbeat{ServiceId: id, Metrics: metrics})
				wantCode(t, "legacy heartbeat", err, codes.OK)
			}
			for _, metrics := range test.v1 {
				_, err := c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: id, Metrics: metrics})
				wantCode(t, "v1 heartbeat", err, codes.OK)
			}
			got, gotV1 := c.mustStatus(t, id)
			for what, at := range map[string]time.Time{
				"last_heartbeat": got.GetLastHeartbeat().AsTime(), "v1 last_heartbeat": gotV1.GetLastHeartbeat().AsTime(), "registered_at": gotV1.GetRegisteredAt().AsTime(),
			} {
				if at.Before(before.Round(0)) || at.After(time.Now().Round(0)) {
					t.Errorf("%s: got %v, want between %v and now", what, at, before)
				}
			}
			got.LastHeartbeat, gotV1.LastHeartbeat, gotV1.RegisteredAt = nil, nil, nil
			wantProto(t, "legacy status", got, test.want)
			wantProto(t, "v1 status", gotV1, test.wantV1)
		})
	}
}

func TestErrorsAreStatusCodes(t *testing.T) {
	t.Parallel()
	c := startPlane(t, testRegistry())
	const legacy, v1 = "/flowctl.ControlPlane/", "/flowctl.v1.ControlPlaneService/"
	long := strings.Repeat("x", maxID+1)
	for _, test := range []struct {
		name   string
		method string
		in     proto.Message
		want   codes.Code
	}{
		{"empty message", legacy + "Register", &flowctlpb.ServiceInfo{}, codes.OK},
		{"empty message", legacy + "Heartbeat", &flowctlpb.ServiceHeartbeat{}, codes.InvalidArgument},
		{"empty message", legacy + "GetServiceStatus", &flowctlpb.ServiceInfo{}, codes.InvalidArgument},
		{"empty message", legacy + "ListServices", &emptypb.Empty{}, codes.OK},
		{"empty message", v1 + "RegisterComponent", &flowctlv1.RegisterRequest{}, codes.InvalidArgument},
		{"empty message", v1 + "UnregisterComponent", &flowctlv1.UnregisterRequest{}, codes.InvalidArgument},
		{"empty message", v1 + "DiscoverComponents", &flowctlv1.DiscoveryRequest{}, codes.OK},
		{"empty message", v1 + "Heartbeat", &flowctlv1.HeartbeatRequest{}, codes.InvalidArgument},
		{"empty message", v1 + "GetComponentStatus", &flowctlv1.ComponentStatusRequest{}, codes.InvalidArgument},
		{"empty message", v1 + "ListComponents", &flowctlv1.ListComponentsRequest{}, codes.OK},
		{"no component", v1 + "RegisterComponent", &flowctlv1.RegisterRequest{ComponentId: "store"}, codes.InvalidArgument},
		{"empty component", v1 + "RegisterComponent", &flowctlv1.RegisterRequest{Component: &flowctlv1.ComponentInfo{}}, codes.OK},
		{"unknown service", legacy + "Heartbeat", &flowctlpb.ServiceHeartbeat{ServiceId: "nobody"}, codes.NotFound},
		{"unknown service", legacy + "GetServiceStatus", &flowctlpb.ServiceInfo{ServiceId: "nobody"}, codes.NotFound},
		{"unknown service", v1 + "Heartbeat", &flowctlv1.HeartbeatRequest{ServiceId: "nobody"}, codes.NotFound},
		{"unknown service", v1 + "GetComponentStatus", &flowctlv1.ComponentStatusRequest{ServiceId: "nobody"}, codes.NotFound},
		{"unknown service", v1 + "UnregisterComponent", &flowctlv1.UnregisterRequest{ServiceId: "nobody"}, codes.NotFound},
		{"unknown service, long id", v1 + "Heartbeat", &flowctlv1.HeartbeatRequest{ServiceId: long}, codes.NotFound},
		{"component that has not registered", legacy + "Heartbeat", &flowctlpb.ServiceHeartbeat{ServiceId: "store"}, codes.NotFound},
		{"component that has not registered", legacy + "GetServiceStatus", &flowctlpb.ServiceInfo{ServiceId: "store"}, codes.NotFound},
		{"component that has not registered", v1 + "Heartbeat", &flowctlv1.HeartbeatRequest{ServiceId: "store"}, codes.NotFound},
		{"component that has not registered", v1 + "UnregisterComponent", &flowctlv1.UnregisterRequest{ServiceId: "store"}, codes.NotFound},
		{"message above the bound", legacy + "Register", &flowctlpb.ServiceInfo{ServiceId: strings.Repeat("x", maxMessage)}, codes.ResourceExhausted},
		{"message above the bound", v1 + "Heartbeat", &flowctlv1.HeartbeatRequest{ServiceId: strings.Repeat("x", maxMessage)}, codes.ResourceExhausted},
		{"unknown method", legacy + "Nothing", &emptypb.Empty{}, codes.Unimplemented},
		{"unknown service of gRPC", "/flowctl.v2.ControlPlane/Register", &emptypb.Empty{}, codes.Unimplemented},
	} {
		t.Run(test.name+test.method, func(t *testing.T) {
			t.Parallel()
			wantCode(t, "error", c.conn.Invoke(t.Context(), test.method, test.in, &emptypb.Empty{}), test.want)
		})
	}
}

// A handler must stand what no client of protobuf can send.
func TestHandlersStandNilMessages(t *testing.T) {
	t.Parallel()
	r, ctx := testRegistry(), t.Context()
	legacy, v1 := legacyServer{registry: r}, v1Server{registry: r}
	legacy.Register(ctx, nil)
	legacy.Heartbeat(ctx, nil)
	legacy.GetServiceStatus(ctx, nil)
	legacy.ListServices(ctx, nil)
	v1.RegisterComponent(ctx, nil)
	v1.UnregisterComponent(ctx, nil)
	v1.DiscoverComponents(ctx, nil)
	v1.Heartbeat(ctx, nil)
	v1.GetComponentStatus(ctx, nil)
	v1.ListComponents(ctx, nil)
}

// Identity

// Changes of health

// Bounds

// Lists

func TestListsAndFilters(t *testing.T) {
	t.Parallel()
	c := startPlane(t, testRegistry())
	c.mustRegister(t, "legacy", registration{id: "ledgers", metadata: map[string]string{"net": "test", "zone": "a"}})
	c.mustRegister(t, "v1", registration{id: "store", metadata: map[string]string{"net": "test", "zone": "b"}})
	c.mustRegister(t, "v1", registration{id: "x", kind: flowctlpb.ServiceType_SERVICE_TYPE_SOURCE, outputEvents: []string{"price"}, metadata: map[string]string{"net": "main", "empty": ""}})
	c.mustRegister(t, "legacy", registration{id: "ui", kind: flowctlpb.ServiceType_SERVICE_TYPE_PIPELINE})
	for _, id := range []string{"store", "x"} {
		_, err := c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: id, Status: flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY})
		wantCode(t, "heartbeat", err, codes.OK)
	}
	const (
		source   = flowctlv1.ComponentType_COMPONENT_TYPE_SOURCE
		consumer = flowctlv1.ComponentType_COMPONENT_TYPE_CONSUMER
	)
	events := func(types ...string) *flowctlv1.DiscoveryRequest {
		return &flowctlv1.DiscoveryRequest{EventTypes: types}
	}
	metadata := func(pairs map[string]string) *flowctlv1.DiscoveryRequest {
		return &flowctlv1.DiscoveryRequest{MetadataFilters: pairs}
	}
	for _, test := range []struct {
		name string
		in   proto.Message
		want string
	}{
		{"discover all", &flowctlv1.DiscoveryRequest{}, "ledgers store x ui"},
		{"discover sources", &flowctlv1.DiscoveryRequest{Type: source}, "ledgers x"},
		{"discover consumers", &flowctlv1.DiscoveryRequest{Type: consumer}, "store"},
		{"discover a type that does not exist", &flowctlv1.DiscoveryRequest{Type: 9}, ""},
		{"discover by output", events("price"), "x"},
		{"discover by input", events("transfer"), "store"},
		{"discover by any of two", events("price", "ledger"), "ledgers x"},
		{"discover by what nobody has", events("nothing"), ""},
		{"discover by metadata", metadata(map[string]string{"net": "test"}), "ledgers store"},
		{"discover by all metadata", metadata(map[string]string{"net": "test", "zone": "b"}), "store"},
		{"discover by an empty value", metadata(map[string]string{"empty": ""}), "x"},
		{"discover by a key that nobody has", metadata(map[string]string{"none": ""}), ""},
		{"discover by all at once", &flowctlv1.DiscoveryRequest{Type: source, EventTypes: []string{"price", "ledger"}, MetadataFilters: map[string]string{"net": "main"}}, "x"},
		{"list", &flowctlv1.ListComponentsRequest{}, "ledgers ui"},
		{"list with the unhealthy", &flowctlv1.ListComponentsRequest{IncludeUnhealthy: true}, "ledgers store x ui"},
		{"list sources", &flowctlv1.ListComponentsRequest{TypeFilter: source}, "ledgers"},
		{"list sources with the unhealthy", &flowctlv1.ListComponentsRequest{TypeFilter: source, IncludeUnhealthy: true}, "ledgers x"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			switch in := test.in.(type) {
			case *flowctlv1.DiscoveryRequest:
				out, err := c.v1.DiscoverComponents(t.Context(), in)
				wantCode(t, "error", err, codes.OK)
				for _, info := range out.GetComponents() {
					got = append(got, info.GetId())
				}
			case *flowctlv1.ListComponentsRequest:
				out, err := c.v1.ListComponents(t.Context(), in)
				wantCode(t, "error", err, codes.OK)
				for _, s := range out.GetComponents() {
					got = append(got, s.GetComponent().GetId())
				}
			}
			if got := strings.Join(got, " "); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestUnregister(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		reg  registration
		as   string // the id that it deregisters under
	}{
		{"foreign service", registration{id: "x"}, "x"},
		{"foreign service under another id", registration{id: "x", componentID: "y"}, "y"},
		{"component", registration{id: "store"}, "store"},
		{"component by its own id", registration{id: "x", componentID: "store"}, "x"},
		{"component by the file's id", registration{id: "x", componentID: "store"}, "store"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := testRegistry()
			c := startPlane(t, r)
			c.mustRegister(t, "v1", test.reg)
			in := &flowctlv1.UnregisterRequest{ServiceId: test.as}
			_, err := c.v1.UnregisterComponent(t.Context(), in)
			wantCode(t, "deregistration", err, codes.OK)
			_, err = c.v1.UnregisterComponent(t.Context(), in)
			wantCode(t, "another deregistration", err, codes.NotFound)
			for _, id := range []string{test.reg.id, cmp.Or(test.reg.componentID, test.reg.id)} {
				wantCode(t, "heartbeat as "+id, c.heartbeat(t.Context(), "legacy", id), codes.NotFound)
			}
			if got := listedIDs(t, r); got != nil {
				t.Errorf("listed: got %q, want none", got)
			}
			c.mustRegister(t, "v1", test.reg)
			wantCode(t, "heartbeat after another registration", c.heartbeat(t.Context(), "legacy", test.as), codes.OK)
		})
	}
}

// Serving

func TestHealthServiceAndReflection(t *testing.T) {
	t.Parallel()
	c := startPlane(t, testRegistry())
	for name, want := range map[string]codes.Code{
		"": codes.OK, "flowctl.ControlPlane": codes.OK, "flowctl.v1.ControlPlaneService": codes.OK, "flowctl.v2": codes.NotFound,
	} {
		got, err := healthpb.NewHealthClient(c.conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: name})
		wantCode(t, "check of "+name, err, want)
		if err == nil && got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("check of %q: got %v, want SERVING", name, got.GetStatus())
		}
	}

	stream, err := reflectionpb.NewServerReflectionClient(c.conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	in, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range in.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	for _, want := range []string{"flowctl.ControlPlane", "flowctl.v1.ControlPlaneService", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("reflection: got %q, want %q among them", names, want)
		}
	}
}

// A health watch is a stream without an end: stop must not wait for it.
func TestStopEndsAnOpenStream(t *testing.T) {
	t.Parallel()
	lis, endpoint, err := listenPlane("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	p := servePlane(testRegistry(), planeConfig{listener: lis, log: slog.New(slog.DiscardHandler)})
	watch, err := healthpb.NewHealthClient(dialPlane(t, endpoint).conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		if got, err := watch.Recv(); err != nil || got.GetStatus() != want {
			t.Fatalf("watch: got %v, %v, want %v", got.GetStatus(), err, want)
		}
		if want == healthpb.HealthCheckResponse_SERVING {
			go p.stop()
		}
	}
	if _, err := watch.Recv(); err == nil {
		t.Error("the watch goes on after stop")
	}
	p.done.Wait()
}

// logRecorder keeps what is logged.
type logRecorder struct {
	mu  sync.Mutex
	out strings.Builder
}

func (l *logRecorder) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out.Write(line)
}

func TestStopIsNoError(t *testing.T) {
	t.Parallel()
	var log logRecorder
	for range 50 { // stop comes before the first accept as well as after it
		lis, _, err := listenPlane("127.0.0.1", 0)
		if err != nil {
			t.Fatal(err)
		}
		servePlane(testRegistry(), planeConfig{listener: lis, log: slog.New(slog.NewTextHandler(&log, nil))}).stop()
	}
	if got := log.out.String(); got != "" {
		t.Errorf("logged: got %s, want nothing", got)
	}
}

func TestEndpointIsOneThatComponentsCanDial(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ address, host string }{
		{"127.0.0.1", "127.0.0.1"}, {"localhost", "localhost"}, {"0.0.0.0", "127.0.0.1"}, {"::1", "::1"}, {"::", "localhost"}, {"", "localhost"},
	} {
		t.Run("address "+test.address, func(t *testing.T) {
			t.Parallel()
			lis, endpoint, err := listenPlane(test.address, 0)
			if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
				t.Skip("no IPv6:", err)
			} else if err != nil {
				t.Fatal(err)
			}
			defer lis.Close()
			if want := net.JoinHostPort(test.host, fmt.Sprint(lis.Addr().(*net.TCPAddr).Port)); endpoint != want {
				t.Errorf("got %q, want %q", endpoint, want)
			}
			conn, err := net.Dial("tcp", endpoint)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
		})
	}
}

// An address of IPv4 is one, and 0.0.0.0 not all of IPv6 too.
func TestAddressOfIPv4IsNoMore(t *testing.T) {
	t.Parallel()
	lis, _, err := listenPlane("0.0.0.0", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	conn, err := net.Dial("tcp", net.JoinHostPort("::1", fmt.Sprint(lis.Addr().(*net.TCPAddr).Port)))
	if err == nil {
		conn.Close()
		t.Errorf("it listens at %s", conn.RemoteAddr())
	}
}

func TestPortInUse(t *testing.T) {
	t.Parallel()
	lis, _, err := listenPlane("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	if _, _, err := listenPlane("127.0.0.1", lis.Addr().(*net.TCPAddr).Port); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want %v", err, syscall.EADDRINUSE)
	}
}

// TestUnixSocket is not parallel: listenPlane changes the process's umask.
func TestUnixSocket(t *testing.T) {
	for _, test := range []struct {
		name   string
		before func(t *testing.T, path string) // what is at path
		want   string                          // part of the error
	}{
		{"new", func(*testing.T, string) {}, ""},
		{"stale socket is replaced", func(t *testing.T, path string) {
			lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
			if err != nil {
				t.Fatal(err)
			}
			lis.SetUnlinkOnClose(false)
			lis.Close()
		}, ""},
		{"live socket is refused", func(t *testing.T, path string) {
			lis, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { lis.Close() })
		}, "another's socket"},
		{"live socket whose queue is full is refused", func(t *testing.T, path string) { fullSocket(t, path) }, "another's socket"},
		{"plain file is not deleted", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("precious"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, "is no socket"},
		{"link to a socket's place is not followed", func(t *testing.T, path string) {
			if err := os.Symlink(path+".elsewhere", path); err != nil {
				t.Fatal(err)
			}
		}, "is no socket"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			test.before(t, path)
			was, _ := os.Lstat(path)
			lis, endpoint, err := listenPlane("unix:"+path, 8080)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Fatalf("got %v, want an error with %q", err, test.want)
				}
				if is, err := os.Lstat(path); err != nil || !os.SameFile(was, is) {
					t.Errorf("what was in its place: got %v, %v, want it untouched", is, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := "unix://" + path; endpoint != want {
				t.Errorf("endpoint: got %q, want %q", endpoint, want)
			}
			if info, err := os.Stat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
				t.Errorf("got mode %v, %v, want %v", info.Mode(), err, os.ModeSocket|0o600)
			}
			p := servePlane(testRegistry(), planeConfig{listener: lis, log: slog.New(slog.DiscardHandler)})
			defer p.stop()
			dialPlane(t, endpoint).mustRegister(t, "legacy", registration{id: "store"})
		})
	}
	t.Run("path too long", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), strings.Repeat("x", 108))
		if _, _, err := listenPlane("unix:"+path, 0); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("has %d bytes", len(path))) {
			t.Errorf("got %v, want an error that names the length", err)
		}
	})
}

// Of those that start at the same time where a dead process has left a socket, one listens,
// and is reached there.
func TestListenUnix_OneOfManyReplacesALeftSocket(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "s")
		left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		left.SetUnlinkOnClose(false)
		left.Close()
		var starts sync.WaitGroup
		listeners := make(chan net.Listener, 8)
		for range cap(listeners) {
			starts.Go(func() {
				if lis, _, err := listenPlane("unix:"+path, 0); err == nil {
					listeners <- lis
				} else if !strings.Contains(err.Error(), "another's socket") {
					t.Error(err)
				}
			})
		}
		starts.Wait()
		if n := len(listeners); n != 1 {
			t.Fatalf("%d listen, want 1", n)
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		(<-listeners).Close()
	}
}

// fullSocket listens on path and never accepts, with a queue that has no room.
func fullSocket(t *testing.T, path string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		t.Cleanup(func() { syscall.Close(fd) })
		err = errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0))
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			return
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Skip("the kernel's queue is never full")
}

// Everything at once

// TestManyClientsAtOnce is for the race detector.
func TestManyClientsAtOnce(t *testing.T) {
	t.Parallel()
	r := newRegistry(time.Millisecond, time.Minute, "", testMembers())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients, subscriber sync.WaitGroup
	var heard atomic.Int64
	subscriber.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-r.wake:
				heard.Add(int64(len(r.changes(time.Now()))))
			}
		}
	})
	first := startPlane(t, r)
	for i := range 8 {
		c := first
		if i%2 == 1 {
			c = dialPlane(t, first.conn.Target())
		}
		clients.Go(func() { hammer(t, ctx, c, r, i) })
	}
	clients.Wait()
	cancel()
	subscriber.Wait()
	if heard.Load() == 0 {
		t.Error("the subscriber heard of no change")
	}
	checkRegistry(t, r, time.Now())
}

// Benchmarks

// What is said on a connection is not looked up again.
func TestOneLookupForEachConnection(t *testing.T) {
	t.Parallel()
	lis, endpoint, err := listenPlane("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	var lookups atomic.Int64
	identify := func(net.Conn, string) origin {
		lookups.Add(1)
		return origin{component: "store", known: true}
	}
	p := servePlane(testRegistry(), planeConfig{listener: lis, peer: identify, log: slog.New(slog.DiscardHandler)})
	t.Cleanup(p.stop)
	for n := range int64(3) {
		c := dialPlane(t, endpoint)
		if _, err := c.legacy.ListServices(t.Context(), nil); err != nil || lookups.Load() != n {
			t.Errorf("%d lookups for %d connections and one on which nothing was said: %v", lookups.Load(), n, err)
		}
		if got := c.mustRegister(t, "legacy", registration{}).id; got != "store" {
			t.Errorf("registered as %q", got)
		}
		var calls sync.WaitGroup
		for i := range 10 {
			calls.Go(func() {
				for range 100 {
					wantCode(t, "heartbeat", c.heartbeat(t.Context(), dialects[i%2], "store"), codes.OK)
				}
			})
		}
		calls.Wait()
		if lookups.Load() != n+1 {
			t.Errorf("%d lookups for %d connections", lookups.Load(), n+1)
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
		count, p50, p99, most, errs := l.take()
		t.Logf("a neighbour's %d heartbeats: p50 %v, p99 %v, most %v", count, p50, p99, most)
		if len(errs) > 0 {
			t.Errorf("a neighbour's heartbeats: %v", errs)
		}
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
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
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
	memoryGrew(t, p, before, float64(count)*0.4)
}

// What never says anything is not kept for long.
func TestHalfOpenConnections(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
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
	memoryGrew(t, p, before, 200)
}

func TestConnectionStorm(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
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
	memoryGrew(t, p, before, 320)
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
	p, endpoint := startAlone(t, []string{"-no-persistence"}, withBinary(plainFlowctl()))
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
	memoryGrew(t, p, before, 640)
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
		p := servePlane(r, planeConfig{listener: lis, log: slog.New(slog.DiscardHandler)})
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

// A socket file that a killed flowctl left is no obstacle.
func TestServerReplacesLeftSocket(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(shortDir(t), "plane")
	args := []string{"server", "-control-plane-address", "unix:" + socket}
	p := start(t, args)
	p.waitErr("msg=listening")
	p.signal(syscall.SIGKILL)
	<-p.done
	if _, err := os.Lstat(socket); err != nil {
		t.Fatal(err)
	}
	p = start(t, args)
	p.waitErr("msg=listening")
	p.stop()
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

// listed returns what the control plane has to show of its components, in its order.
func (c planeClient) listed(tb testing.TB) []*operatorv1.Component {
	tb.Helper()
	out, err := operatorv1.NewOperatorClient(c.conn).GetPipeline(tb.Context(), &operatorv1.GetPipelineRequest{})
	if err != nil {
		tb.Fatal(err)
	}
	return out.GetComponents()
}

// one returns the component id as it is listed, nil where it is not.
func (c planeClient) one(tb testing.TB, id string) *operatorv1.Component {
	tb.Helper()
	for _, l := range c.listed(tb) {
		if l.GetId() == id {
			return l
		}
	}
	return nil
}
