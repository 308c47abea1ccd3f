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
	"syscall"
	"testing"
	"time"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	testTTL      = 30 * time.Second
	testPatience = testTTL + testTTL/10
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
	must(t, err)
	p := servePlane(r, planeConfig{listeners: []planeListener{{Listener: lis}}, log: slog.New(slog.DiscardHandler)})
	t.Cleanup(p.stop)
	return dialPlane(t, endpoint)
}

func dialPlane(t testing.TB, endpoint string, options ...grpc.DialOption) planeClient {
	t.Helper()
	conn := get(grpc.NewClient(endpoint, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...))(t)
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
	must(t, err)
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
	list := get(legacyServer{registry: r}.ListServices(t.Context(), nil))(t)
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
				get(c.legacy.Heartbeat(t.Context(), &flowctlpb.ServiceHeartbeat{ServiceId: id, Metrics: metrics}))(t)
			}
			for _, metrics := range test.v1 {
				get(c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: id, Metrics: metrics}))(t)
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
		{"too many event types", v1 + "DiscoverComponents", &flowctlv1.DiscoveryRequest{EventTypes: slices.Repeat([]string{"t"}, maxEntries+1)}, codes.ResourceExhausted},
		{"too many filters", v1 + "DiscoverComponents", &flowctlv1.DiscoveryRequest{MetadataFilters: entries(maxEntries+1, "")}, codes.ResourceExhausted},
		{"as many as are allowed", v1 + "DiscoverComponents", &flowctlv1.DiscoveryRequest{EventTypes: slices.Repeat([]string{"t"}, maxEntries)}, codes.OK},
		{"unknown service of gRPC", "/flowctl.v2.ControlPlane/Register", &emptypb.Empty{}, codes.Unimplemented},
	} {
		t.Run(test.name+test.method, func(t *testing.T) {
			t.Parallel()
			wantCode(t, "error", c.conn.Invoke(t.Context(), test.method, test.in, &emptypb.Empty{}), test.want)
		})
	}
}

func TestListsAndFilters(t *testing.T) {
	t.Parallel()
	c := startPlane(t, testRegistry())
	c.mustRegister(t, "legacy", registration{id: "ledgers", metadata: map[string]string{"net": "test", "zone": "a"}})
	c.mustRegister(t, "v1", registration{id: "store", metadata: map[string]string{"net": "test", "zone": "b"}})
	c.mustRegister(t, "v1", registration{id: "x", kind: flowctlpb.ServiceType_SERVICE_TYPE_SOURCE, outputEvents: []string{"price"}, metadata: map[string]string{"net": "main", "empty": ""}})
	c.mustRegister(t, "legacy", registration{id: "ui", kind: flowctlpb.ServiceType_SERVICE_TYPE_PIPELINE})
	for _, id := range []string{"store", "x"} {
		get(c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: id, Status: flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY}))(t)
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
			wantEqual(t, "found", strings.Join(got, " "), test.want)
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
			get(c.v1.UnregisterComponent(t.Context(), in))(t)
			_, err := c.v1.UnregisterComponent(t.Context(), in)
			wantCode(t, "another deregistration", err, codes.NotFound)
			for _, id := range []string{test.reg.id, cmp.Or(test.reg.componentID, test.reg.id)} {
				wantCode(t, "heartbeat as "+id, c.heartbeat(t.Context(), "legacy", id), codes.NotFound)
			}
			wantEqual(t, "listed", listedIDs(t, r), nil)
			c.mustRegister(t, "v1", test.reg)
			wantCode(t, "heartbeat after another registration", c.heartbeat(t.Context(), "legacy", test.as), codes.OK)
		})
	}
}

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

	stream := get(reflectionpb.NewServerReflectionClient(c.conn).ServerReflectionInfo(t.Context()))(t)
	must(t, stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}))
	in := get(stream.Recv())(t)
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
	must(t, err)
	p := servePlane(testRegistry(), planeConfig{listeners: []planeListener{{Listener: lis}}, log: slog.New(slog.DiscardHandler)})
	watch := get(healthpb.NewHealthClient(dialPlane(t, endpoint).conn).Watch(t.Context(), &healthpb.HealthCheckRequest{}))(t)
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

func TestStopIsNoError(t *testing.T) {
	t.Parallel()
	log := newTranscript()
	for range 50 { // stop comes before the first accept as well as after it
		lis, _, err := listenPlane("127.0.0.1", 0)
		must(t, err)
		servePlane(testRegistry(), planeConfig{listeners: []planeListener{{Listener: lis}}, log: slog.New(slog.NewTextHandler(log, nil))}).stop()
	}
	wantEqual(t, "logged", log.String(), "")
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
			wantEqual(t, "endpoint", endpoint, net.JoinHostPort(test.host, fmt.Sprint(lis.Addr().(*net.TCPAddr).Port)))
			get(net.Dial("tcp", endpoint))(t).Close()
			_, err = net.Dial("tcp", net.JoinHostPort("::1", fmt.Sprint(lis.Addr().(*net.TCPAddr).Port)))
			if test.address == "0.0.0.0" && err == nil {
				t.Error("it listens at all of IPv6 too")
			}
		})
	}
}

func TestPortInUse(t *testing.T) {
	t.Parallel()
	lis, _, err := listenPlane("127.0.0.1", 0)
	must(t, err)
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
		{"live socket is refused", func(t *testing.T, path string) {
			lis := get(net.Listen("unix", path))(t)
			t.Cleanup(func() { lis.Close() })
		}, "another's socket"},
		{"live socket whose queue is full is refused", func(t *testing.T, path string) { fullSocket(t, path) }, "another's socket"},
		{"plain file is not deleted", func(t *testing.T, path string) {
			must(t, os.WriteFile(path, []byte("precious"), 0o644))
		}, "is no socket"},
		{"link to a socket's place is not followed", func(t *testing.T, path string) {
			must(t, os.Symlink(path+".elsewhere", path))
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
			must(t, err)
			wantEqual(t, "endpoint", endpoint, "unix://"+path)
			if info, err := os.Stat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
				t.Errorf("got mode %v, %v, want %v", info.Mode(), err, os.ModeSocket|0o600)
			}
			p := servePlane(testRegistry(), planeConfig{listeners: []planeListener{{Listener: lis}}, log: slog.New(slog.DiscardHandler)})
			defer p.stop()
			dialPlane(t, endpoint).mustRegister(t, "legacy", registration{id: "store"})
		})
	}
}

// Of those that start at the same time where a dead process has left a socket, one listens,
// and is reached there.
func TestListenUnix_OneOfManyReplacesALeftSocket(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "s")
		left := get(net.ListenUnix("unix", &net.UnixAddr{Name: path}))(t)
		left.SetUnlinkOnClose(false)
		left.Close()
		listeners := make(chan net.Listener, 8)
		atOnce(cap(listeners), func(int) {
			if lis, _, err := listenPlane("unix:"+path, 0); err == nil {
				listeners <- lis
			} else if !strings.Contains(err.Error(), "another's socket") {
				t.Error(err)
			}
		})
		if n := len(listeners); n != 1 {
			t.Fatalf("%d listen, want 1", n)
		}
		conn := get(net.Dial("unix", path))(t)
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
	must(t, err)
	for range 10 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			return
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Skip("the kernel's queue is never full")
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
	get(os.Lstat(socket))(t)
	p = start(t, args)
	p.waitErr("msg=listening")
	p.stop()
}

// listed returns what the control plane has to show of its components, in its order.
func (c planeClient) listed(tb testing.TB) []*operatorv1.Component {
	tb.Helper()
	out := get(operatorv1.NewOperatorClient(c.conn).GetPipeline(tb.Context(), &operatorv1.GetPipelineRequest{}))(tb)
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

// Many that come and go are summed up.
func TestChangeLog_SumsUp(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	l, now := changeLog{log: slog.New(slog.NewTextHandler(&out, nil)), most: guestLines}, testEpoch
	for i := range guestLines + 30 {
		l.add(change{id: fmt.Sprint("x-", i), now: []condition{healthy, unregistered, unhealthy}[i%3]}, now)
		now = now.Add(time.Millisecond)
	}
	if n := strings.Count(out.String(), "\n"); n != guestLines || l.due() != testEpoch.Add(changeTime) {
		t.Errorf("%d lines, and the sum is due at %s\n%s", n, l.due(), out.String())
	}
	l.flush(l.due())
	if want := `msg="more services have changed" healthy=10 degraded=0 unhealthy=10 gone=10`; !strings.Contains(out.String(), want) || !l.due().IsZero() {
		t.Errorf("want %s\n%s", want, out.String())
	}
	l.add(change{id: "later", now: healthy}, now.Add(changeTime))
	if !strings.Contains(out.String(), "id=later") || !l.due().IsZero() {
		t.Errorf("one that comes later\n%s", out.String())
	}
}
