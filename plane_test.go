//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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

// What registers in one dialect is seen in both. It is long because it is a table.
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
