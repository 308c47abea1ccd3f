//go:build linux

package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc/codes"
)

// What a service says and its metrics are bounded together, and who is at the bound goes on.
func TestRegister_TextsAreBoundedTogether(t *testing.T) {
	t.Parallel()
	r, now := newRegistry(testTTL, testInterval, "", nil), testEpoch
	_, _, err := r.register(registration{id: "large", description: strings.Repeat("x", maxText), metadata: textEntries(maxServiceBytes)}, origin{believed: true}, now)
	wantCode(t, "a registration past the bound", err, codes.ResourceExhausted)
	mustRegister(t, r, registration{id: "large", metadata: textEntries(maxServiceBytes - 1000)}, now)
	var metrics []metric
	for i := range 30 {
		metrics = append(metrics, metric{name: fmt.Sprintf("metric-%02d", i), text: strings.Repeat("x", 85), isText: true}) // 100 bytes each in JSON
	}
	_, err = r.heartbeat("large", origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, metrics, now.Add(testTTL))
	wantCode(t, "metrics past the bound", err, codes.ResourceExhausted)
	if c := shown(r, now.Add(testTTL))["large"]; len(c.GetTextMetrics()) < 9 || len(c.GetTextMetrics()) > 10 || !c.GetLastSeen().AsTime().Equal(now.Add(testTTL)) {
		t.Errorf("%d metrics are kept, want 9 or 10; last seen at %v", len(c.GetTextMetrics()), c.GetLastSeen().AsTime())
	}
	for range 3 { // values that take the room of their own
		get(r.heartbeat("large", origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, metrics[:9], now.Add(testTTL)))(t)
	}
	mustRegister(t, r, registration{id: "large", metadata: textEntries(maxServiceBytes - 1000)}, now.Add(testTTL))
	get(r.heartbeat("large", origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, metrics[20:29], now.Add(testTTL)))(t)
}

// textEntries is metadata of about so many bytes in JSON, not one more.
func textEntries(bytes int) map[string]string {
	out := make(map[string]string)
	for bytes > 9 {
		n := min(bytes-9, 1000)
		out[fmt.Sprintf("%03d", len(out))] = strings.Repeat("x", n)
		bytes -= n + 9
	}
	return out
}

func TestPipelineFileHasItsWord(t *testing.T) {
	t.Parallel()
	const (
		source, processor, sink = flowctlpb.ServiceType_SERVICE_TYPE_SOURCE, flowctlpb.ServiceType_SERVICE_TYPE_PROCESSOR, flowctlpb.ServiceType_SERVICE_TYPE_SINK
		consumerOfNode          = flowctlpb.ServiceType_SERVICE_TYPE_PIPELINE
	)
	ledgers := registration{id: "ledgers", endpoint: "h:1"}
	for _, test := range []struct {
		name   string
		before []registration
		reg    registration
		kind   flowctlpb.ServiceType
		in     []string
		out    []string
		topics []string
		input  string // the endpoint of ledgers that it is told
	}{
		{"event types of the file", nil, ledgers, source, nil, []string{"ledger"}, []string{"ledger.v1"}, ""},
		{"event types that it sent", nil, registration{id: "ledgers", outputEvents: []string{"a", "b"}}, source, nil, []string{"a", "b"}, []string{"a.v1", "b.v1"}, ""},
		{"input event types that it sent", nil, registration{id: "store", inputEvents: []string{"a"}}, sink, []string{"a"}, nil, nil, ""},
		{"a source that calls itself a sink", nil, registration{id: "ledgers", kind: sink}, source, nil, []string{"ledger"}, []string{"ledger.v1"}, ""},
		{"a sink that calls itself a pipeline", nil, registration{id: "store", kind: consumerOfNode}, sink, []string{"transfer"}, nil, nil, ""},
		{"a sink with output events has no topics", nil, registration{id: "store", outputEvents: []string{"a"}}, sink, []string{"transfer"}, []string{"a"}, nil, ""},
		{"an input that has registered", []registration{ledgers}, registration{id: "transfers"}, processor, []string{"ledger"}, []string{"transfer"}, []string{"transfer.v1"}, "h:1"},
		{"one input of two", []registration{ledgers}, registration{id: "store"}, sink, []string{"transfer"}, nil, nil, "h:1"},
		{"an input without an endpoint", []registration{{id: "ledgers"}}, registration{id: "transfers"}, processor, []string{"ledger"}, []string{"transfer"}, []string{"transfer.v1"}, ""},
		{"an input under an id of its own", []registration{{id: "own", componentID: "ledgers", endpoint: "h:2"}}, registration{id: "transfers"}, processor, []string{"ledger"}, []string{"transfer"}, []string{"transfer.v1"}, "h:2"},
		{"a foreign processor", []registration{ledgers}, registration{id: "x", kind: processor, inputEvents: []string{"ledger"}, outputEvents: []string{"c"}}, processor, []string{"ledger"}, []string{"c"}, []string{"c.v1"}, ""},
		{"a foreign service of no type has no topics", nil, registration{id: "x", outputEvents: []string{"c"}}, 0, nil, []string{"c"}, nil, ""},
	} {
		for _, dialect := range dialects {
			t.Run(test.name+"/"+dialect, func(t *testing.T) {
				t.Parallel()
				c := startPlane(t, testRegistry())
				for _, reg := range test.before {
					c.mustRegister(t, dialect, reg)
				}
				ack := c.mustRegister(t, dialect, test.reg)
				info := map[string]string{"control_plane_endpoint": "127.0.0.1:8080"}
				if test.input != "" {
					info["ledgers"] = test.input
				}
				if !slices.Equal(ack.topics, test.topics) || !maps.Equal(ack.info, info) {
					t.Errorf("got topics %q, connection_info %q, want %q, %q", ack.topics, ack.info, test.topics, info)
				}
				legacy, v1 := c.mustStatus(t, test.reg.id)
				in, out := v1.GetComponent().GetInputEventTypes(), v1.GetComponent().GetOutputEventTypes()
				if legacy.GetServiceType() != test.kind || !slices.Equal(in, test.in) || !slices.Equal(out, test.out) {
					t.Errorf("got %v, in %q, out %q, want %v, %q, %q", legacy.GetServiceType(), in, out, test.kind, test.in, test.out)
				}
			})
		}
	}
}

// entries are n of them, of one value.
func entries(n int, value string) map[string]string {
	m := make(map[string]string)
	for i := range n {
		m[fmt.Sprint(i)] = value
	}
	return m
}

func TestRegistrationPastABoundIsRefused(t *testing.T) {
	t.Parallel()
	text := func(n int) string { return strings.Repeat("x", n) }
	many := func(n int) []string { return slices.Repeat([]string{"x"}, n) }
	for _, test := range []struct {
		name string
		reg  func(over int) registration // one past the bound by over
		v1   bool                        // not in the legacy dialect
	}{
		{"id", func(over int) registration { return registration{id: text(maxID + over)} }, false},
		{"component_id", func(over int) registration { return registration{componentID: text(maxID + over)} }, false},
		{"component_id in metadata", func(over int) registration {
			return registration{metadata: map[string]string{metadataComponentID: text(maxID + over)}}
		}, false},
		{"endpoint", func(over int) registration { return registration{endpoint: text(maxText + over)} }, false},
		{"input event types", func(over int) registration { return registration{inputEvents: many(maxEntries + over)} }, false},
		{"output event types", func(over int) registration { return registration{outputEvents: many(maxEntries + over)} }, false},
		{"input event type", func(over int) registration { return registration{inputEvents: []string{text(maxID + over)}} }, false},
		{"output event type", func(over int) registration { return registration{outputEvents: []string{text(maxID + over)}} }, false},
		{"metadata", func(over int) registration { return registration{metadata: entries(maxEntries+over, "")} }, false},
		{"metadata key", func(over int) registration { return registration{metadata: map[string]string{text(maxID + over): ""}} }, false},
		{"metadata value", func(over int) registration {
			return registration{metadata: map[string]string{"k": text(maxText + over)}}
		}, false},
		{"name", func(over int) registration { return registration{name: text(maxText + over)} }, true},
		{"description", func(over int) registration { return registration{description: text(maxText + over)} }, true},
		{"version", func(over int) registration { return registration{version: text(maxText + over)} }, true},
	} {
		for _, dialect := range dialects {
			if test.v1 && dialect != "v1" {
				continue
			}
			t.Run(test.name+"/"+dialect, func(t *testing.T) {
				t.Parallel()
				r := testRegistry()
				c := startPlane(t, r)
				c.mustRegister(t, dialect, registration{id: "store"})
				_, err := c.register(t.Context(), dialect, test.reg(1))
				wantCode(t, "past the bound", err, codes.ResourceExhausted)
				wantEqual(t, "listed", listedIDs(t, r), []string{"store"})
				c.mustRegister(t, dialect, test.reg(0))
			})
		}
	}
}

func TestHeartbeatPastABoundIsASignOfLife(t *testing.T) {
	t.Parallel()
	with := func(m map[string]string, name, value string) map[string]string { m[name] = value; return m }
	for _, test := range []struct {
		name    string
		metrics map[string]string // of the heartbeat past the bound
		kept    int               // metrics of it that were taken
	}{
		{"one metric too many", with(entries(maxEntries, "2"), "new", "2"), maxEntries},
		{"only new metrics", with(map[string]string{}, "new", "2"), 0},
		{"name too long", with(entries(maxEntries, "2"), strings.Repeat("x", maxID+1), "2"), maxEntries},
		{"value too long", with(entries(maxEntries, "2"), "7", strings.Repeat("2", maxText+1)), maxEntries - 1},
	} {
		for _, dialect := range dialects {
			if dialect == "legacy" && test.name == "value too long" {
				continue
			}
			t.Run(test.name+"/"+dialect, func(t *testing.T) {
				t.Parallel()
				r := newRegistry(testTTL, time.Hour, "", nil)
				c := startPlane(t, r)
				c.mustRegister(t, dialect, registration{id: "x"})
				c.mustRegister(t, dialect, registration{id: "other"})
				get(c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: "x", Metrics: entries(maxEntries, "1")}))(t)
				setLastSeen(r, "x", time.Now().Add(-2*testTTL))
				var err error
				if dialect == "legacy" {
					numbers := make(map[string]float64)
					for name := range test.metrics {
						numbers[name] = 2
					}
					_, err = c.legacy.Heartbeat(t.Context(), &flowctlpb.ServiceHeartbeat{ServiceId: "x", Metrics: numbers})
				} else {
					_, err = c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: "x", Metrics: test.metrics})
				}
				wantCode(t, "heartbeat past the bound", err, codes.ResourceExhausted)
				legacy, v1 := c.mustStatus(t, "x")
				taken := 0
				for _, value := range v1.GetMetrics() {
					if value == "2" {
						taken++
					}
				}
				if !legacy.GetIsHealthy() || len(v1.GetMetrics()) != maxEntries || taken != test.kept {
					t.Errorf("got healthy %v, %d metrics of which %d are new, want true, %d, %d", legacy.GetIsHealthy(), len(v1.GetMetrics()), taken, maxEntries, test.kept)
				}
				wantCode(t, "heartbeat of another service", c.heartbeat(t.Context(), dialect, "other"), codes.OK)
			})
		}
	}
}

// Metrics come and change, from numbers to texts and back, and each is shown as it was sent
// last, however it came.
func TestHeartbeat_MetricsAreShownAsSent(t *testing.T) {
	t.Parallel()
	values := []metric{
		{number: 0}, {number: math.Copysign(0, -1)}, {number: 1e21}, {number: math.Inf(1)}, {number: math.NaN()}, {number: 0.1},
		{isText: true}, {text: "0", isText: true}, {text: "-0", isText: true}, {text: "1.50", isText: true}, {text: "1e+21", isText: true}, {text: "1e999", isText: true},
		{text: "-", isText: true}, {text: "9 apples", isText: true}, {text: "NaN", isText: true}, {text: strings.Repeat("ü", 10), isText: true},
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		r := newRegistry(testTTL, testInterval, "", nil)
		mustRegister(t, r, registration{id: "x"}, testEpoch)
		v1, want := v1Server{registry: r}, make(map[string]string)
		for range 100 {
			var in []metric
			room := 200 - len(want)
			for range random.IntN(8) {
				m := values[random.IntN(len(values))]
				m.name = strings.Repeat("n", random.IntN(40)) + fmt.Sprint(random.IntN(5))
				if _, known := want[m.name]; !known && room == 0 {
					continue // TestHeartbeat_PastABoundIsASignOfLife has those
				} else if !known {
					room--
				}
				want[m.name] = m.String()
				in = append(in, m)
			}
			get(r.heartbeat("x", origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, in, testEpoch))(t)
			got, err := v1.GetComponentStatus(t.Context(), &flowctlv1.ComponentStatusRequest{ServiceId: "x"})
			if err != nil || len(got.GetMetrics()) != len(want) || len(want) > 0 && !maps.Equal(got.GetMetrics(), want) {
				t.Fatalf("after %v: got %v, %v, want %v", in, got.GetMetrics(), err, want)
			}
		}
	}
}

// setLastSeen lets time pass for one service.
func setLastSeen(r *registry, id string, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.byID[id]
	s.lastSeen = at
	r.live.MoveToFront(s.live)
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	named := func(id string) map[string]string { return map[string]string{metadataComponentID: id} }
	for _, test := range []struct {
		name      string
		reg       registration
		want      string // the id returned; "" is a generated one
		component string // "" is a foreign service
	}{
		{"component_id", registration{componentID: "store"}, "store", "store"},
		{"component_id with an own id", registration{id: "own", componentID: "store"}, "own", "store"},
		{"component_id before metadata", registration{componentID: "store", metadata: named("ledgers")}, "store", "store"},
		{"component_id before port", registration{componentID: "store", endpoint: "http://localhost:9001/health"}, "store", "store"},
		{"metadata", registration{metadata: named("store")}, "store", "store"},
		{"metadata with an own id", registration{id: "own", metadata: named("store")}, "own", "store"},
		{"metadata where component_id is foreign", registration{id: "own", componentID: "nobody", metadata: named("store")}, "own", "store"},
		{"metadata before port", registration{metadata: named("store"), endpoint: "http://localhost:9001/health"}, "store", "store"},
		{"own id", registration{id: "store"}, "store", "store"},
		{"own id where the others are foreign", registration{id: "store", componentID: "nobody", metadata: named("neither")}, "store", "store"},
		{"own id before port", registration{id: "store", endpoint: "http://localhost:9001/health"}, "store", "store"},
		{"port", registration{endpoint: "http://localhost:9003/health"}, "store", "store"},
		{"port with an own id", registration{id: "own", endpoint: "http://localhost:9003/health"}, "own", "store"},
		{"port in metadata", registration{metadata: map[string]string{"health_endpoint": "http://localhost:9003/health"}}, "store", "store"},
		{"port of an address", registration{endpoint: "http://127.0.0.1:9003"}, "store", "store"},
		{"port of an IPv6 address", registration{endpoint: "https://[::1]:9003/health?full=1"}, "store", "store"},
		{"port of host:port", registration{endpoint: "localhost:9003"}, "store", "store"},
		{"port of address:port", registration{endpoint: "127.0.0.1:9003"}, "store", "store"},
		{"port of [address]:port", registration{endpoint: "[::1]:9003"}, "store", "store"},
		{"port alone", registration{endpoint: ":9003"}, "store", "store"},
		{"port of host:port/path", registration{endpoint: "localhost:9003/health"}, "store", "store"},
		{"port of address:port/path", registration{endpoint: "127.0.0.1:9003/health"}, "store", "store"},
		{"port of //host:port", registration{endpoint: "//localhost:9003/health"}, "store", "store"},
		{"foreign own id", registration{id: "own"}, "own", ""},
		{"foreign component_id", registration{componentID: "own"}, "own", ""},
		{"foreign metadata", registration{metadata: named("own")}, "own", ""},
		{"foreign own id before component_id", registration{id: "own", componentID: "other"}, "own", ""},
		{"foreign port", registration{id: "own", endpoint: "http://localhost:9004/health"}, "own", ""},
		{"foreign, no identity", registration{}, "", ""},
		{"foreign, no port", registration{endpoint: "http://localhost/9003"}, "", ""},
		{"foreign, broken endpoint", registration{endpoint: "http://[::1:9003%zz"}, "", ""},
		{"foreign, empty port", registration{endpoint: "http://localhost:/"}, "", ""},
	} {
		for _, dialect := range dialects {
			t.Run(test.name+"/"+dialect, func(t *testing.T) {
				t.Parallel()
				c := startPlane(t, testRegistry())
				got := c.mustRegister(t, dialect, test.reg).id
				switch {
				case got == "":
					t.Fatal("got an empty id")
				case test.want == "":
					if again := c.mustRegister(t, dialect, test.reg).id; again == got {
						t.Errorf("two services that say nothing of themselves both got the id %q", got)
					}
				case got != test.want:
					t.Errorf("got id %q, want %q", got, test.want)
				}
				for _, id := range []string{got, cmp.Or(test.component, got), cmp.Or(test.reg.componentID, got)} {
					legacy, v1 := c.mustStatus(t, id)
					if legacy.GetComponentId() != cmp.Or(test.reg.componentID, test.component) || legacy.GetServiceId() != got || v1.GetComponent().GetId() != got {
						t.Errorf("status of %q: got id %q, v1 id %q, component %q, want %q, %[5]q, %q", id, legacy.GetServiceId(), v1.GetComponent().GetId(), legacy.GetComponentId(), got, cmp.Or(test.reg.componentID, test.component))
					}
					for _, in := range dialects {
						wantCode(t, in+" heartbeat as "+id, c.heartbeat(t.Context(), in, id), codes.OK)
					}
				}
			})
		}
	}
}

// Whoever calls itself by the id of another component of the pipeline goes on to be
// known by it on its own connections, also when that component comes later.
func TestHeartbeat_ServiceIDOfAnotherComponent(t *testing.T) {
	t.Parallel()
	r := testRegistry()
	own, other := origin{component: "ledgers"}, origin{component: "store"}
	for from, reg := range map[origin]registration{own: {id: "store", componentID: "ledgers"}, other: {id: "store"}} {
		_, _, err := r.register(reg, from, testEpoch)
		must(t, err)
	}
	for from, want := range map[origin]codes.Code{own: codes.OK, other: codes.OK, {}: codes.PermissionDenied} {
		_, err := r.heartbeat("store", from, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, nil, testEpoch)
		wantCode(t, "heartbeat as store from "+from.component, err, want)
	}
}

// A port that two components have tells neither, nor does that of another machine.
func TestRegister_HealthPortThatTellsNothing(t *testing.T) {
	t.Parallel()
	r := newRegistry(testTTL, testInterval, "", []member{
		{id: "a", healthPort: "9001"}, {id: "b", healthPort: "9001"}, {id: "c", healthPort: "9002"},
	})
	for endpoint, want := range map[string]string{
		"http://localhost:9001/health": "x", "http://10.1.2.3:9002/health": "x", "10.1.2.3:9002": "x",
		"http://localhost:9002/health": "c", "http://[::1]:9002/health": "c", "host.docker.internal:9002": "c", "LOCALHOST:9002": "c",
		"http://example.com:9002/health": "x", "other-machine:9002": "x", "localhost.example.com:9002": "x",
	} {
		mustRegister(t, r, registration{id: "x", endpoint: endpoint}, testEpoch)
		if _, _, taken := r.condition("c", testEpoch); (taken == "") != (want == "c") {
			t.Errorf("%s: c is %q", endpoint, taken)
		}
		r.starting("c", testEpoch)
	}
}

// A number that is whole is shown whole in the other dialect.
func TestMetric_WholeNumbersAreShownWhole(t *testing.T) {
	t.Parallel()
	for number, want := range map[float64]string{58123456: "58123456", -3: "-3", 0: "0", 1.5: "1.5", 1 << 52: "4503599627370496", 1e300: "1e+300", math.Inf(1): "+Inf"} {
		if got := (&metric{number: number}).String(); got != want {
			t.Errorf("%v is shown as %s, want %s", number, got, want)
		}
	}
	if got := (&metric{number: math.NaN()}).String(); got != "NaN" {
		t.Error(got)
	}
}
