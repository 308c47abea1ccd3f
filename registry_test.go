//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A full registry makes room for a new service by the one that has been silent for
// the longest time, and never by one that lives. Whoever it knows may register again.
func TestFullRegistryForgetsTheSilent(t *testing.T) {
	t.Parallel()
	r, now := testRegistry(), testEpoch
	for i := range maxGuests {
		mustRegister(t, r, registration{id: fmt.Sprint("service-", i)}, now)
	}
	const silent = 1000
	now = now.Add(testInterval)
	for i := silent; i < maxGuests; i++ {
		must(t, beat(r, fmt.Sprint("service-", i), now))
	}
	now = testEpoch.Add(testPatience + 1)
	pass(r, now)
	for i := range silent {
		mustRegister(t, r, registration{id: fmt.Sprint("new-", i)}, now)
		wantCode(t, "the longest silent", r.view(fmt.Sprint("service-", i), now, func(*service, time.Time) {}), codes.NotFound)
		if i < silent-1 {
			wantCode(t, "the next", r.view(fmt.Sprint("service-", i+1), now, func(*service, time.Time) {}), codes.OK)
		}
	}
	_, _, err := r.register(registration{id: "one-more"}, origin{believed: true}, now)
	wantCode(t, "one more", err, codes.ResourceExhausted)
	wantCode(t, "heartbeat of the one refused", beat(r, "one-more", now), codes.NotFound)
	for i := silent; i < maxGuests; i++ {
		wantCode(t, "a live one", beat(r, fmt.Sprint("service-", i), now), codes.OK)
	}
	mustRegister(t, r, registration{id: "new-0"}, now)
	mustRegister(t, r, registration{id: "own", componentID: "store"}, now)
	get(r.unregister("new-0", origin{believed: true}, now))(t)
	mustRegister(t, r, registration{id: "one-more"}, now)
}

func TestSweep_ForgetsWhatHasBeenStaleForLong(t *testing.T) {
	t.Parallel()
	r := testRegistry()
	r.forget = time.Hour
	mustRegister(t, r, registration{id: "own", componentID: "store"}, testEpoch)
	for _, id := range []string{"gone", "back"} {
		mustRegister(t, r, registration{id: id}, testEpoch)
	}
	stale := testEpoch.Add(testPatience + 1)
	pass(r, stale)
	wantChanges(t, r, stale, "own: unregistered > unhealthy", "gone: unregistered > unhealthy", "back: unregistered > unhealthy")
	now := stale.Add(time.Hour - 1)
	pass(r, now)
	wantChanges(t, r, now)
	must(t, beat(r, "back", now))
	now = now.Add(testPatience)
	pass(r, now)
	wantChanges(t, r, now, "back: unhealthy > healthy", "gone: unhealthy > unregistered")
	wantCode(t, "heartbeat of the one forgotten", beat(r, "gone", now), codes.NotFound)
	wantCode(t, "heartbeat of a component", beat(r, "own", now), codes.OK)
	if r.forget = 0; r.otherCount != 1 {
		t.Errorf("%d others, want back alone", r.otherCount)
	}
}

// testEpoch is the time at which the tests that pass the time begin, and also a
// bubble's.
var testEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// testRegistry knows the pipeline ledgers (9001) → transfers (9002) → store (9003),
// where store reads from ledgers too.
func testRegistry() *registry {
	return newRegistry(testTTL, testInterval, "127.0.0.1:8080", testMembers())
}

func testMembers() []member {
	return []member{
		{id: "ledgers", role: roleSource, outputEvents: []string{"ledger"}, healthPort: "9001"},
		{id: "transfers", role: roleProcessor, inputs: []string{"ledgers"}, inputEvents: []string{"ledger"}, outputEvents: []string{"transfer"}, healthPort: "9002"},
		{id: "store", role: roleSink, inputs: []string{"transfers", "ledgers"}, inputEvents: []string{"transfer"}, healthPort: "9003"},
	}
}

// mustRegister registers directly, at the time now, and returns the id.
func mustRegister(t testing.TB, r *registry, reg registration, now time.Time) string {
	t.Helper()
	ack, _, err := r.register(reg, origin{believed: true}, now)
	if err != nil {
		t.Fatalf("registration %+v: %v", reg, err)
	}
	return ack.id
}

// beat is a heartbeat without a status and metrics.
func beat(r *registry, id string, now time.Time) error {
	_, err := r.heartbeat(id, origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, nil, now)
	return err
}

// takeChanges returns what changes tells as "id: was > now".
func takeChanges(r *registry, now time.Time) []string {
	var out []string
	for _, c := range r.changes(now) {
		out = append(out, fmt.Sprintf("%s: %v > %v", c.id, c.was, c.now))
	}
	return out
}

func wantChanges(t testing.TB, r *registry, now time.Time, want ...string) {
	t.Helper()
	if got := takeChanges(r, now); !slices.Equal(got, want) {
		t.Errorf("changes at %v: got %q, want %q", now.Sub(testEpoch), got, want)
	}
}

func TestDeclaredStatusIsKeptUntilTheNext(t *testing.T) {
	t.Parallel()
	const (
		unknown   = flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN
		starting  = flowctlv1.HealthStatus_HEALTH_STATUS_STARTING
		healthy   = flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY
		degraded  = flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED
		unhealthy = flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY
		stopping  = flowctlv1.HealthStatus_HEALTH_STATUS_STOPPING
	)
	for _, test := range []struct {
		name   string
		beats  []flowctlv1.HealthStatus
		want   flowctlv1.HealthStatus
		wantOK bool
	}{
		{"none", nil, healthy, true},
		{"unknown means alive", []flowctlv1.HealthStatus{unknown}, healthy, true},
		{"starting", []flowctlv1.HealthStatus{starting, unknown}, starting, true},
		{"degraded", []flowctlv1.HealthStatus{degraded, unknown}, degraded, true},
		{"unhealthy", []flowctlv1.HealthStatus{unhealthy, unknown}, unhealthy, false},
		{"stopping", []flowctlv1.HealthStatus{stopping, unknown}, stopping, false},
		{"healed by its own word", []flowctlv1.HealthStatus{unhealthy, healthy}, healthy, true},
		{"worse by its own word", []flowctlv1.HealthStatus{starting, healthy, degraded, stopping}, stopping, false},
		{"status that does not exist", []flowctlv1.HealthStatus{degraded, 99, -1}, degraded, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := startPlane(t, testRegistry())
			c.mustRegister(t, "v1", registration{id: "store"})
			for _, declared := range test.beats {
				get(c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: "store", Status: declared}))(t)
			}
			wantCode(t, "legacy heartbeat, which has no status", c.heartbeat(t.Context(), "legacy", "store"), codes.OK)
			legacy, v1 := c.mustStatus(t, "store")
			if legacy.GetIsHealthy() != test.wantOK || v1.GetStatus() != test.want {
				t.Errorf("got %v, %v, want %v, %v", legacy.GetIsHealthy(), v1.GetStatus(), test.wantOK, test.want)
			}
			c.mustRegister(t, "legacy", registration{id: "store"})
			_, v1 = c.mustStatus(t, "store")
			wantEqual(t, "after another registration", v1.GetStatus(), healthy)
		})
	}
}

func TestRepeatedRegistrations(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		regs   []registration
		listed []string          // ids of ListServices
		known  map[string]string // id → the id of the record that it leads to
		gone   []string
	}{{
		name: "same id", regs: []registration{{id: "x"}, {id: "x"}},
		listed: []string{"x"}, known: map[string]string{"x": "x"},
	}, {
		name: "component under two ids", regs: []registration{{id: "one", componentID: "store"}, {id: "two", componentID: "store"}},
		listed: []string{"two"}, known: map[string]string{"store": "two", "one": "two", "two": "two"},
	}, {
		name: "component without an id after one with", regs: []registration{{id: "one", componentID: "store"}, {componentID: "store"}},
		listed: []string{"store"}, known: map[string]string{"store": "store", "one": "store"},
	}, {
		name: "component by the id of its own that it chose before", regs: []registration{{id: "one", componentID: "store"}, {id: "one"}},
		listed: []string{"one"}, known: map[string]string{"store": "one", "one": "one"},
	}, {
		name: "id moves from a foreign service to a component", regs: []registration{{id: "x"}, {id: "x", componentID: "store"}},
		listed: []string{"x"}, known: map[string]string{"x": "x", "store": "x"},
	}, {
		name: "id moves from one component to another", regs: []registration{{id: "x", componentID: "ledgers"}, {id: "x", componentID: "store"}},
		listed: []string{"ledgers", "x"}, known: map[string]string{"ledgers": "ledgers", "x": "x", "store": "x"},
	}, {
		name: "foreign service that loses one of two ids keeps the other", regs: []registration{{id: "x", componentID: "y"}, {id: "x", componentID: "store"}},
		listed: []string{"x", "y"}, known: map[string]string{"x": "x", "store": "x", "y": "y"},
	}, {
		name: "component that calls itself by another's id", regs: []registration{{id: "ledgers"}, {id: "ledgers", componentID: "store"}},
		listed: []string{"ledgers", "store"}, known: map[string]string{"ledgers": "ledgers", "store": "store"},
	}, {
		name: "component that calls itself by the id of one that has not registered", regs: []registration{{id: "ledgers", componentID: "store"}},
		listed: []string{"store"}, known: map[string]string{"store": "store"}, gone: []string{"ledgers"},
	}, {
		name: "components first, in file order", regs: []registration{{id: "b"}, {id: "store"}, {id: "a"}, {id: "ledgers"}, {id: "b"}},
		listed: []string{"ledgers", "store", "b", "a"}, known: map[string]string{"a": "a"},
	}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r, now := testRegistry(), testEpoch
			for _, reg := range test.regs {
				wantEqual(t, "the id that it chose", mustRegister(t, r, reg, now), cmp.Or(reg.id, reg.componentID))
				checkRegistry(t, r, now)
			}
			wantEqual(t, "listed", listedIDs(t, r), test.listed)
			for id, want := range test.known {
				wantCode(t, "heartbeat as "+id, beat(r, id, now), codes.OK)
				r.view(id, now, func(s *service, _ time.Time) {
					if s.said.id != want {
						t.Errorf("%q leads to %q, want %q", id, s.said.id, want)
					}
				})
			}
			for _, id := range test.gone {
				wantCode(t, "heartbeat as "+id, beat(r, id, now), codes.NotFound)
			}
		})
	}
}

func TestServiceIsKnownUnderItsLatestIDs(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, componentID string }{{"component", "store"}, {"foreign service", ""}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r, now := testRegistry(), testEpoch
			id := func(n int) string { return fmt.Sprintf("id-%d", n) }
			mustRegister(t, r, registration{id: id(0), componentID: cmp.Or(test.componentID, id(1))}, now)
			for n := 1; n < 3*maxNames; n++ {
				// The id of the last registration leads a foreign service to its record.
				mustRegister(t, r, registration{id: id(n - 1), componentID: cmp.Or(test.componentID, id(n))}, now)
				mustRegister(t, r, registration{id: id(n), componentID: test.componentID}, now)
				checkRegistry(t, r, now)
				wantCode(t, "heartbeat as "+id(n), beat(r, id(n), now), codes.OK)
			}
			wantCode(t, "heartbeat under the first id of many", beat(r, id(0), now), codes.NotFound)
			wantEqual(t, "services listed", len(listedIDs(t, r)), 1)
		})
	}
}

// An id that was just returned must not be the one that is dropped for a new one.
func TestReturnedIDIsKnownWhenIDsAreFull(t *testing.T) {
	t.Parallel()
	r, now := testRegistry(), testEpoch
	for n := range maxNames {
		mustRegister(t, r, registration{id: fmt.Sprintf("id-%d", n), componentID: "store"}, now)
	}
	mustRegister(t, r, registration{id: "id-0", componentID: "new"}, now)
	checkRegistry(t, r, now)
	for _, id := range []string{"id-0", "new", "store"} {
		wantCode(t, "heartbeat as "+id, beat(r, id, now), codes.OK)
	}
}

// The real janitor, on the clock of a bubble, tells of each change once.
func TestJanitorTellsOfEachChangeOnce(t *testing.T) {
	t.Parallel()
	for _, ttl := range []time.Duration{testTTL, testInterval / 2} {
		synctest.Test(t, func(t *testing.T) { janitorTells(t, ttl) })
	}
}

func janitorTells(t *testing.T, ttl time.Duration) {
	r := newRegistry(ttl, testInterval, "", testMembers())
	ttl = r.patience()
	ctx, cancel := context.WithCancel(context.Background())
	var janitor sync.WaitGroup
	janitor.Go(func() { r.runJanitor(ctx) })
	defer janitor.Wait()
	defer cancel()
	// told waits for d to pass and checks what the subscriber hears, and that it
	// is woken for that and for nothing else.
	told := func(d time.Duration, want ...string) {
		t.Helper()
		time.Sleep(d)
		synctest.Wait()
		woken := false
		select {
		case <-r.wake:
			woken = true
		default:
		}
		if woken != (len(want) > 0) {
			t.Errorf("%v after the start: woken is %v, want changes %q", time.Since(testEpoch), woken, want)
		}
		wantChanges(t, r, time.Now(), want...)
	}

	told(time.Hour)
	mustRegister(t, r, registration{id: "store"}, time.Now())
	told(0, "store: unregistered > healthy")
	told(ttl)
	told(1, "store: healthy > unhealthy")
	told(3 * ttl)
	must(t, beat(r, "store", time.Now()))
	told(0, "store: unhealthy > healthy")
	for range 10 {
		time.Sleep(ttl / 3)
		must(t, beat(r, "store", time.Now()))
	}
	told(ttl)
	time.Sleep(time.Nanosecond) // stale and healed before the subscriber comes
	synctest.Wait()
	must(t, beat(r, "store", time.Now()))
	if len(r.wake) == 1 {
		<-r.wake
	} else {
		t.Error("what was stale, and healed, wakes nobody")
	}
	told(ttl)
	mustRegister(t, r, registration{id: "x"}, time.Now())
	told(1, "x: unregistered > healthy", "store: healthy > unhealthy")
	told(ttl, "x: healthy > unhealthy")
	told(time.Hour)
}

// changeStep is done at a time after testEpoch. From one step to the next a sweep
// comes every half interval, as from the janitor, unless flowctl does not run.
type changeStep struct {
	at      time.Duration
	do      func(r *registry, now time.Time) // nil: a sweep
	want    []string                         // what changes tells then
	stopped bool                             // flowctl did not run since the last step
}

// The run is told of each change once. It is long because it is a table.
func TestChanges(t *testing.T) {
	t.Parallel()
	reg := func(id, componentID string) func(*registry, time.Time) {
		return func(r *registry, now time.Time) {
			r.register(registration{id: id, componentID: componentID}, origin{believed: true}, now)
		}
	}
	beats := func(id string, declared flowctlv1.HealthStatus) func(*registry, time.Time) {
		return func(r *registry, now time.Time) { r.heartbeat(id, origin{believed: true}, declared, nil, now) }
	}
	alive := beats("store", flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN)
	both := func(first, second func(*registry, time.Time)) func(*registry, time.Time) {
		return func(r *registry, now time.Time) { first(r, now); second(r, now) }
	}
	starting := func(r *registry, now time.Time) { r.starting("store", now) }
	admit := func(r *registry, now time.Time) { r.markReady("store", now) }
	finished := func(cause string) func(*registry, time.Time) {
		return func(r *registry, now time.Time) { r.finished("store", cause, now) }
	}
	checked := func(failing string) func(*registry, time.Time) {
		return func(r *registry, now time.Time) { r.checked("store", failing, now) }
	}
	unregister := func(id string) func(*registry, time.Time) {
		return func(r *registry, now time.Time) { r.unregister(id, origin{believed: true}, now) }
	}
	const ttl = testPatience
	var (
		registered   = []string{"store: unregistered > healthy"}
		failed       = []string{"store: healthy > unhealthy"}
		healed       = []string{"store: unhealthy > healthy"}
		unregistered = []string{"store: healthy > unregistered"}
	)
	for _, test := range []struct {
		name  string
		steps []changeStep
	}{
		{"stale and healed", []changeStep{
			{0, reg("store", ""), registered, false}, {ttl, nil, nil, false}, {ttl + 1, nil, failed, false}, {ttl + 2, nil, nil, false}, {2 * ttl, alive, healed, false}, {3 * ttl, nil, nil, false}, {3*ttl + 1, nil, failed, false},
		}},
		{"another registration heals", []changeStep{{0, reg("store", ""), registered, false}, {2 * ttl, nil, failed, false}, {2*ttl + 1, reg("store", ""), healed, false}}},
		{"another registration tells nothing", []changeStep{{0, reg("store", ""), registered, false}, {1, reg("other", "store"), nil, false}}},
		{"declared", []changeStep{
			{0, reg("store", ""), registered, false},
			{1, beats("store", flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED), []string{"store: healthy > degraded"}, false},
			{2, alive, nil, false},
			{3, beats("store", flowctlv1.HealthStatus_HEALTH_STATUS_STOPPING), []string{"store: degraded > unhealthy"}, false},
			{4, beats("store", flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY), nil, false},
			{5, beats("store", flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY), healed, false},
		}},
		{"degraded goes stale", []changeStep{
			{0, both(reg("store", ""), beats("store", flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED)), []string{"store: unregistered > degraded"}, false},
			{ttl + 1, nil, []string{"store: degraded > unhealthy"}, false}, {2 * ttl, alive, []string{"store: unhealthy > degraded"}, false},
		}},
		{"a flap is not told", []changeStep{
			{0, reg("store", ""), registered, false}, {1, both(checked("refused"), checked("")), nil, false}, {2, both(unregister("store"), reg("store", "")), nil, false}, {3, both(reg("x", ""), unregister("x")), nil, false},
		}},
		{"a process that fails is unhealthy whatever it sent", []changeStep{
			{0, reg("store", ""), registered, false}, {1, finished("exit status 1"), failed, false}, {2, alive, nil, false}, {3 * ttl, nil, nil, false}, {3*ttl + 1, starting, nil, false}, {3*ttl + 2, reg("store", ""), registered, false},
		}},
		{"a process that fails before it registers", []changeStep{{0, finished("exit status 1"), []string{"store: unregistered > unhealthy"}, false}, {1, starting, nil, false}, {2, reg("store", ""), registered, false}}},
		{"a process that completes is not registered", []changeStep{{0, reg("store", ""), registered, false}, {1, finished(""), unregistered, false}, {2, alive, nil, false}, {3 * ttl, nil, nil, false}}},
		{"an old registration does not count for a new process", []changeStep{
			{0, reg("own", "store"), []string{"own: unregistered > healthy"}, false}, {1, starting, nil, false}, {2, beats("own", 0), nil, false}, {3, alive, nil, false}, {3 * ttl, nil, nil, false}, {3*ttl + 1, reg("store", ""), registered, false},
		}},
		{"what was not yet told of an old process is not told", []changeStep{{0, both(reg("store", ""), starting), nil, false}, {1, both(finished("exit status 1"), starting), nil, false}}},
		{"an admitted one is never stale", []changeStep{{0, admit, registered, false}, {10 * ttl, nil, nil, false}, {10*ttl + 1, alive, nil, false}, {20 * ttl, checked("refused"), failed, false}, {20*ttl + 1, checked(""), healed, false}}},
		{"one that registers and is then admitted is never stale", []changeStep{{0, both(reg("store", ""), admit), registered, false}, {10 * ttl, nil, nil, false}}},
		{"one that is admitted holds nobody's staleness up", []changeStep{
			{0, both(reg("store", ""), reg("ledgers", "")), []string{"store: unregistered > healthy", "ledgers: unregistered > healthy"}, false},
			{1, admit, nil, false}, {ttl - 1, alive, nil, false}, {ttl + 1, alive, []string{"ledgers: healthy > unhealthy"}, false},
		}},
		{"one that goes on holds nobody's staleness up", []changeStep{
			{0, both(reg("store", ""), reg("ledgers", "")), []string{"store: unregistered > healthy", "ledgers: unregistered > healthy"}, false},
			{ttl - 1, alive, nil, false}, {ttl + 1, alive, []string{"ledgers: healthy > unhealthy"}, false},
		}},
		{"a process must register anew after it was admitted", []changeStep{{0, admit, registered, false}, {1, starting, nil, false}, {2, reg("store", ""), registered, false}, {3 + ttl, nil, failed, false}}},
		{"a check that passes is a heartbeat", []changeStep{{0, reg("store", ""), registered, false}, {ttl, checked(""), nil, false}, {2 * ttl, nil, nil, false}, {2*ttl + 1, nil, failed, false}, {3 * ttl, checked(""), healed, false}}},
		{"a check that fails", []changeStep{{0, reg("store", ""), registered, false}, {1, checked("refused"), failed, false}, {2, alive, nil, false}, {3, checked("timeout"), nil, false}, {4, checked(""), healed, false}}},
		{"a check does not register", []changeStep{{0, checked(""), nil, false}, {1, checked("refused"), nil, false}, {2, reg("store", ""), []string{"store: unregistered > unhealthy"}, false}, {3, checked(""), healed, false}}},
		{"a component deregisters", []changeStep{{0, reg("store", ""), registered, false}, {1, unregister("store"), unregistered, false}, {2 * ttl, nil, nil, false}, {2*ttl + 1, reg("store", ""), registered, false}}},
		{"a foreign service deregisters", []changeStep{{0, reg("x", ""), []string{"x: unregistered > healthy"}, false}, {1, unregister("x"), []string{"x: healthy > unregistered"}, false}, {2 * ttl, nil, nil, false}}},
		{"a foreign service's only id moves to a component", []changeStep{
			{0, reg("x", ""), []string{"x: unregistered > healthy"}, false}, {1, reg("x", "store"), []string{"x: healthy > unregistered", "x: unregistered > healthy"}, false}, {2 + ttl, nil, []string{"x: healthy > unhealthy"}, false},
		}},
		{"grace after a stop", []changeStep{
			{0, reg("store", ""), registered, false}, {time.Hour, nil, nil, true}, {time.Hour + ttl, nil, nil, false}, {time.Hour + ttl + 1, nil, failed, false},
		}},
		{"a stop of one interval is no stop", []changeStep{{0, reg("store", ""), registered, false}, {ttl - testInterval + 1, nil, nil, false}, {ttl + 1, nil, failed, true}}},
		{"a stop of more than one interval is", []changeStep{{0, reg("store", ""), registered, false}, {ttl - testInterval, nil, nil, false}, {ttl + 1, nil, nil, true}, {2*ttl + 1, nil, nil, false}, {2*ttl + 2, nil, failed, false}}},
		{"one that was stale before a stop stays so", []changeStep{{0, reg("store", ""), registered, false}, {ttl + 1, nil, failed, false}, {time.Hour, nil, nil, true}, {time.Hour + 2*ttl, alive, healed, false}, {2 * time.Hour, nil, failed, false}}},
		{"one that is first heard of after a stop has its own TTL", []changeStep{{0, nil, nil, false}, {time.Hour, reg("store", ""), registered, true}, {time.Hour + ttl, nil, nil, false}, {time.Hour + ttl + 1, nil, failed, false}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r, last := testRegistry(), time.Duration(0)
			for _, step := range test.steps {
				for at := last + testInterval/2; at < step.at && !step.stopped; at += testInterval / 2 {
					r.sweep(testEpoch.Add(at))
				}
				now := testEpoch.Add(step.at)
				r.sweep(now)
				if step.do != nil {
					step.do(r, now)
				}
				wantChanges(t, r, now, step.want...)
				checkRegistry(t, r, now)
				checkTold(t, r, now)
				last = step.at
			}
		})
	}
}

func TestNewProcessInheritsNothing(t *testing.T) {
	t.Parallel()
	r, now := testRegistry(), time.Now()
	mustRegister(t, r, registration{id: "ledgers", endpoint: "h:1", version: "1", outputEvents: []string{"a"}}, now)
	get(r.heartbeat("ledgers", origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY, []metric{{name: "events", number: 1}}, now))(t)
	r.checked("ledgers", "connection refused", now)
	r.starting("ledgers", now)
	ack, _, err := r.register(registration{id: "transfers"}, origin{believed: true}, now)
	if err != nil || ack.connectionInfo["ledgers"] != "" {
		t.Errorf("connection_info: got %q, %v, with the endpoint of the old process", ack.connectionInfo, err)
	}
	r.markReady("ledgers", now)
	got, err := v1Server{registry: r}.GetComponentStatus(t.Context(), &flowctlv1.ComponentStatusRequest{ServiceId: "ledgers"})
	wantCode(t, "status", err, codes.OK)
	got.LastHeartbeat, got.RegisteredAt = nil, nil
	wantProto(t, "status", got, &flowctlv1.ComponentStatusResponse{
		Status:    flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY,
		Component: &flowctlv1.ComponentInfo{Id: "ledgers", Type: flowctlv1.ComponentType_COMPONENT_TYPE_SOURCE, OutputEventTypes: []string{"ledger"}},
	})
}

// No method takes an id that there is none of, or of what is no component, for more.
func TestRegistry_UnknownIDIsNoPanic(t *testing.T) {
	t.Parallel()
	r, now := testRegistry(), testEpoch
	mustRegister(t, r, registration{id: "other"}, now)
	before := shown(r, now)
	for _, id := range []string{"nobody", "", "other"} {
		r.starting(id, now)
		r.finished(id, "exit status 1", now)
		r.finished(id, "", now)
		r.checked(id, "refused", now)
		r.checked(id, "", now)
		r.markReady(id, now)
		r.publishProcess(id, processReport{state: "ready"})
		r.condition(id, now)
	}
	nobody, _, _ := r.condition("nobody", now)
	wantEqual(t, "a component that does not exist", nobody, unregistered)
	sameShown(t, shown(r, now), before)
	gone := testMembers()
	gone[2].inputs = []string{"ledgers", "removed"} // of a component that has gone
	r.setMembers(gone[1:], now)
	ack, _, err := r.register(registration{id: "store"}, origin{believed: true}, now)
	if err != nil || len(ack.connectionInfo) != 1 {
		t.Errorf("a component whose inputs are gone: %v, %v", ack.connectionInfo, err)
	}
}

// A component is told the endpoint of the control plane that it was given: in a network of
// its own another one than its neighbours.
func TestRegister_EndpointThatTheComponentWasGiven(t *testing.T) {
	t.Parallel()
	members := testMembers()
	members[0].endpoint, members[1].endpoint = "172.17.0.1:8080", "127.0.0.1:9000"
	r := newRegistry(testTTL, testInterval, "127.0.0.1:8080", members)
	for id, want := range map[string]string{"ledgers": "172.17.0.1:8080", "transfers": "127.0.0.1:9000", "store": "127.0.0.1:8080", "other": "127.0.0.1:8080"} {
		ack, _, err := r.register(registration{id: id}, origin{believed: true}, testEpoch)
		if err != nil || ack.connectionInfo["control_plane_endpoint"] != want {
			t.Errorf("%s is told %v, %v, want %s", id, ack.connectionInfo, err, want)
		}
	}
}

// TestHealthIsJudgedWhenAsked asks before any sweep could have noticed.
func TestHealthIsJudgedWhenAsked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(time.Second, time.Hour, "", []member{{id: "store", role: roleSink}})
		legacy, v1 := legacyServer{registry: r}, v1Server{registry: r}
		mustRegister(t, r, registration{id: "store"}, time.Now())
		for _, test := range []struct {
			after time.Duration
			want  bool
		}{{r.patience(), true}, {1, false}} {
			for at := time.Now().Add(test.after); time.Now().Before(at); {
				time.Sleep(min(time.Until(at), r.maxGap()/2))
				r.unmatchedServices(time.Now()) // flowctl looks at the clock, it was not stopped
			}
			want := map[bool]flowctlv1.HealthStatus{true: flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY, false: flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY}[test.want]
			one, _ := legacy.GetServiceStatus(t.Context(), &flowctlpb.ServiceInfo{ServiceId: "store"})
			all, _ := legacy.ListServices(t.Context(), nil)
			oneV1, _ := v1.GetComponentStatus(t.Context(), &flowctlv1.ComponentStatusRequest{ServiceId: "store"})
			healthyV1, _ := v1.ListComponents(t.Context(), nil)
			allV1, _ := v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{IncludeUnhealthy: true})
			condition, _, cause := r.condition("store", time.Now())
			for what, got := range map[string]bool{
				"GetServiceStatus": one.GetIsHealthy(), "ListServices": all.GetServices()[0].GetIsHealthy(),
				"GetComponentStatus": oneV1.GetStatus() == flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY, "ListComponents": len(healthyV1.GetComponents()) == 1,
				"ListComponents with the unhealthy": allV1.GetComponents()[0].GetStatus() == want == test.want, "condition": condition.ok(),
			} {
				if got != test.want {
					t.Errorf("%v later, %s: got healthy %v (%s), want %v", test.after, what, got, cause, test.want)
				}
			}
		}
	})
}

// TestChangeIsNotLostToAnOlderTime has a subscriber that took the time just before
// the janitor did, and the lock just after.
func TestChangeIsNotLostToAnOlderTime(t *testing.T) {
	t.Parallel()
	r := newRegistry(testTTL, time.Hour, "", nil)
	mustRegister(t, r, registration{id: "x"}, testEpoch)
	wantChanges(t, r, testEpoch, "x: unregistered > healthy")
	pass(r, testEpoch.Add(testPatience+1))
	got := append(takeChanges(r, testEpoch.Add(testPatience)), takeChanges(r, testEpoch.Add(testPatience+2))...)
	wantEqual(t, "changes", got, []string{"x: healthy > unhealthy"})
}

// The registry's times are of the monotonic clock, so that it is no matter if the other
// one is set back: nothing would be stale for as long.
func TestTimesAreMonotonic(t *testing.T) {
	t.Parallel()
	r := testRegistry()
	mustRegister(t, r, registration{id: "store"}, time.Now())
	r.sweep(time.Now())
	for what, at := range map[string]time.Time{"observed": r.lastNow, "last seen": r.byID["store"].lastSeen} {
		if !strings.Contains(at.String(), " m=") {
			t.Errorf("%s: %v", what, at)
		}
	}
}

// pass is time that passes until at with a janitor that does its work.
func pass(r *registry, at time.Time) {
	for r.lastNow.Before(at) {
		next := r.lastNow.Add(r.maxGap() / 2)
		if next.After(at) {
			next = at
		}
		sweepAll(r, next)
	}
}

// checkRegistry checks what must hold of r at any time, of what a caller can see: a list has
// each service once, who is listed is known by its id and answers a heartbeat's checks, and
// an answer for one says what the list says.
func checkRegistry(t testing.TB, r *registry, now time.Time) {
	t.Helper()
	legacy, v1 := legacyServer{registry: r}, v1Server{registry: r}
	var list []*flowctlpb.ServiceStatus
	var listV1 []*flowctlv1.ComponentStatusResponse
	var inPipeline []string
	_ = r.each(context.Background(), now, func(s *service, now time.Time) bool { // as the lists of both dialects, but at the time now
		if s.registered {
			list, listV1 = append(list, legacy.statusLocked(s, now)), append(listV1, v1.statusLocked(s, now))
			inPipeline = append(inPipeline, s.component())
		}
		return true
	})
	seen, components := make(map[string]bool), make(map[string]bool)
	others, all := 0, make(map[string]*operatorv1.Component)
	for id, c := range shown(r, now) {
		all[cmp.Or(c.GetServiceId(), id)] = c
	}
	for i, s := range list {
		id := s.GetServiceId()
		if seen[id] || id == "" || len(id) > maxID {
			t.Errorf("service %q is listed twice, or has no id", id)
		}
		seen[id] = true
		switch component := inPipeline[i]; {
		case component == "":
			others++
		case others > 0 || components[component]:
			t.Errorf("component %q is listed twice, or after what is not of the pipeline", component)
		default:
			components[component] = true
		}
		wantEqual(t, "the list of the other dialect", listV1[i].GetComponent().GetId(), id)
		var one *flowctlpb.ServiceStatus
		err := r.view(id, now, func(s *service, now time.Time) { one = legacy.statusLocked(s, now) })
		if err != nil || one.GetIsHealthy() != s.GetIsHealthy() || one.GetServiceId() != id {
			t.Errorf("service %q: asked for alone %v, %v, in the list %v", id, one, err, s)
		}
		c := all[id]
		if ok := c.GetHealth() == "healthy" || c.GetHealth() == "degraded"; c == nil || ok != s.GetIsHealthy() || (c.GetHealth() != "healthy") != (c.GetCause() != "") {
			t.Errorf("service %q: the operator service shows %v, the list %v", id, c, s)
		}
		if n := len(c.GetHistory()); n > maxHistory {
			t.Errorf("service %q has a history of %d", id, n)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.otherCount != others || len(r.bySeq) != others+len(r.members) {
		t.Errorf("%d services that are not of the pipeline are counted, %d are listed, and %d records kept", r.otherCount, others, len(r.bySeq))
	}
	for _, s := range r.bySeq {
		if h := r.healthLocked(s, now); s.registered && !s.noTTL && s.live == nil && h.condition.ok() {
			t.Errorf("service %q is %v, but nothing will tell of its expiry", s.said.id, h.condition)
		}
	}
}

// checkTold checks, after a sweep and changes at the time now, that the subscriber
// knows how everyone is.
func checkTold(t testing.TB, r *registry, now time.Time) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.byID {
		if is := r.healthLocked(s, now).condition; s.notified != is {
			t.Errorf("service %q is %v, the subscriber believes %v", s.said.id, is, s.notified)
		}
	}
}

// sweepAll sweeps until there is nothing to do at the time now.
func sweepAll(r *registry, now time.Time) time.Time {
	for {
		if next := r.sweep(now); next.After(now) {
			return next
		}
	}
}

func FuzzRegistry(f *testing.F) {
	f.Add([]byte{0, 0, 0, 16, 0, 7, 11, 0, 0})
	f.Add([]byte{0, 4, 0, 0, 0x24, 1, 6, 0, 6, 1, 0, 0, 12, 0, 0})
	f.Add([]byte{0, 0, 0, 8, 0, 0, 0, 1, 0, 3, 0, 4, 11, 0, 4, 3, 0, 6, 12, 0, 0})
	f.Add([]byte("register, heartbeat, unregister and whatever the fuzzer makes of it"))
	components := []string{"ledgers", "transfers", "store"}
	names := append(slices.Clone(components), "x", "y", "z", "", "w")
	times := []time.Duration{0, 0, 1, time.Second, testInterval / 2, testInterval, testInterval + 1, testPatience - testInterval, testPatience, testPatience + 1, 3 * testPatience, -1, -time.Second}
	endpoints := []string{"", "http://localhost:9001/health", "localhost:9003", "http://[", "h:1"}
	causes := []string{"", "exit status 1"}
	f.Fuzz(func(t *testing.T, in []byte) {
		r, now := testRegistry(), testEpoch
		told := make(map[string]condition) // of the components
		for n := 0; len(in) >= 3 && n < 400 && !t.Failed(); n, in = n+1, in[3:] {
			a, b := int(in[1]), int(in[1])>>4
			id, other, component := names[a%8], names[b%8], components[a%3]
			now = now.Add(max(times[int(in[2])%len(times)], 0))
			at := now.Add(min(times[int(in[2])%len(times)], 0)) // who came first to look at the clock is not always first to take the lock
			switch op := in[0] % 14; op {
			case 0, 1:
				reg := registration{id: id, componentID: other, kind: flowctlpb.ServiceType(in[2] % 8), endpoint: endpoints[int(in[2])%len(endpoints)]}
				if op == 1 {
					reg.componentID, reg.metadata = "", map[string]string{metadataComponentID: other}
				}
				got := mustRegister(t, r, reg, at)
				if got == "" || reg.id != "" && got != reg.id {
					t.Errorf("registration %+v: got id %q", reg, got)
				}
			case 2, 3:
				_, err := r.heartbeat(id, origin{believed: true}, flowctlv1.HealthStatus(b%7), []metric{{name: other, number: 1}}, at)
				if code := status.Code(err); code != codes.OK && code != codes.NotFound && (code != codes.InvalidArgument || id != "") {
					t.Errorf("heartbeat as %q: %v", id, err)
				}
			case 4:
				r.unregister(id, origin{believed: true}, at)
			case 5:
				r.starting(component, at)
				told[component] = unregistered
			case 6:
				r.finished(component, causes[b%2], at)
			case 7:
				r.markReady(component, at)
			case 8:
				r.checked(component, causes[b%2], at)
			case 9:
				if next := sweepAll(r, at); next.Sub(at) > testInterval {
					t.Errorf("sweep: come again in %v, want within %v", next.Sub(at), testInterval)
				}
			case 10:
				r.condition(id, at)
			default:
				sweepAll(r, now)
				for more := true; more; more = len(r.changed) > 0 {
					for _, c := range r.changes(at) {
						if c.was == c.now || c.component != "" && told[c.component] != c.was {
							t.Errorf("told %+v after %v", c, told[c.component])
						}
						if c.component != "" {
							told[c.component] = c.now
						}
					}
				}
				checkTold(t, r, now)
			}
			checkRegistry(t, r, now)
		}
	})
}

// What is not of the pipeline is spoken for by who has registered it, and taken over only when
// it is stale.
func TestHeartbeat_OnlyTheOwnerSpeaksForAService(t *testing.T) {
	t.Parallel()
	alice, eve := origin{owner: "user 1000", conn: 1}, origin{owner: "user 1001", conn: 2}
	remote := origin{unknown: "it calls from 10.1.2.3"}
	r, now := testRegistry(), testEpoch
	for from, id := range map[origin]string{alice: "alices", remote: "remotes"} {
		get(first(r.register(registration{id: id}, from, now)))(t)
	}
	calls := func(id string, from origin) map[string]error {
		_, _, registered := r.register(registration{id: id}, from, now)
		_, beat := r.heartbeat(id, from, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, nil, now)
		return map[string]error{"register": registered, "heartbeat": beat, "unregister": second(r.unregister(id, from, now))}
	}
	for _, from := range []origin{eve, remote} {
		for what, err := range calls("alices", from) {
			wantCode(t, what+" of alice's by "+cmp.Or(from.owner, "another machine"), err, codes.PermissionDenied)
		}
	}
	for what, err := range calls("remotes", alice) { // nobody can tell who has registered it
		wantCode(t, what+" of another machine's by alice", err, codes.OK)
	}
	now = now.Add(testPatience + 1)
	pass(r, now)
	get(first(r.register(registration{id: "alices"}, eve, now)))(t)
	wantCode(t, "heartbeat of the former owner", second(r.heartbeat("alices", alice, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, nil, now)), codes.PermissionDenied)
}

// A guest keeps its id as long as it is not stale, and keeps no component from registering by it.
func TestRegister_NoComponentTakesAGuestsID(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	program := publicProgram(t)
	var components []Component
	for _, dialect := range dialects {
		c := actor(dialect, role{Dialect: dialect, Alias: "guest", Gate: true})
		c.Command = []string{program}
		components = append(components, c)
	}
	p := start(t, runArgs(publicPipeline(t, components...)), asNobody(65524))
	c := dialPlane(t, p.endpoint())
	c.mustRegister(t, "v1", registration{id: "guest", endpoint: "127.0.0.1:1"})
	p.wait(p.stdout, "| waiting\n", len(dialects))
	for _, dialect := range dialects {
		p.tell(dialect, syscall.SIGUSR2)
	}
	p.waitReady()
	must(t, c.heartbeat(t.Context(), "v1", "guest"))
	shown := make(map[string]string)
	for _, l := range c.listed(t) {
		shown[l.GetId()] = l.GetHealth() + " " + l.GetServiceId()
	}
	wantEqual(t, "listed", shown, map[string]string{"legacy": "healthy ", "v1": "healthy ", "guest": "healthy "})
	p.stop()
}

// first and second drop what a test does not look at.
func first(_ acknowledgement, n uint64, err error) (uint64, error) { return n, err }

func second(_ uint64, err error) error { return err }

// A process that ends does not unregister the one that has taken its place.
func TestUnregister_FormerConnectionTakesNothing(t *testing.T) {
	t.Parallel()
	r := testRegistry()
	before, after, other := origin{owner: "user 1", conn: 1}, origin{owner: "user 1", conn: 2}, origin{owner: "user 1", conn: 3}
	for _, from := range []origin{before, after} {
		get(first(r.register(registration{id: "x"}, from, testEpoch)))(t)
	}
	wantCode(t, "by the former connection", second(r.unregister("x", before, testEpoch)), codes.NotFound)
	must(t, beat(r, "x", testEpoch))
	must(t, second(r.unregister("x", other, testEpoch)))
	get(first(r.register(registration{id: "x"}, before, testEpoch)))(t)
	must(t, second(r.unregister("x", before, testEpoch)))
}

// Guests of a run take no more than their share, and its components always have room.
func TestRegister_GuestsHaveABound(t *testing.T) {
	t.Parallel()
	r, text := testRegistry(), strings.Repeat("x", maxText)
	full, n := error(nil), 0
	for ; full == nil; n++ {
		_, _, full = r.register(registration{id: fmt.Sprint("guest-", n), description: text, name: text, version: text}, origin{believed: true}, testEpoch)
	}
	wantCode(t, "one too many", full, codes.ResourceExhausted)
	if want := maxGuestBytes / (3 * maxText); n < want-want/100 || n > want+1 {
		t.Errorf("%d guests, want about %d", n, want)
	}
	wantCode(t, "metrics of a guest", beatWith(r, "guest-0", metric{name: "n", text: text, isText: true}), codes.ResourceExhausted)
	for _, id := range []string{"ledgers", "transfers", "store"} {
		mustRegister(t, r, registration{id: id, description: text}, testEpoch)
		must(t, beatWith(r, id, metric{name: "n", text: text, isText: true}))
	}
	for i := range n - 1 {
		must(t, second(r.unregister(fmt.Sprint("guest-", i), origin{believed: true}, testEpoch)))
	}
	if r.otherBytes != 0 {
		t.Errorf("%d bytes are counted when all have gone", r.otherBytes)
	}
}

func beatWith(r *registry, id string, metrics ...metric) error {
	return second(r.heartbeat(id, origin{believed: true}, flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, metrics, testEpoch))
}

// Of one that never sends a heartbeat that is said: it is not that its heartbeats stopped.
func TestHealth_OneThatNeverBeats(t *testing.T) {
	t.Parallel()
	r, late := testRegistry(), testEpoch.Add(testPatience+1)
	mustRegister(t, r, registration{id: "store"}, testEpoch)
	cause := func(now time.Time) string { pass(r, now); return shown(r, now)["store"].GetCause() }
	wantEqual(t, "of one that has sent none", cause(late), "no heartbeat since it registered 33s ago, the TTL is 30s")
	must(t, beat(r, "store", late))
	wantEqual(t, "of one in time", cause(late.Add(testPatience)), "")
	wantEqual(t, "of one that has stopped", cause(late.Add(testPatience+1)), "no heartbeat for 33s, the TTL is 30s")
	mustRegister(t, r, registration{id: "store"}, late.Add(time.Hour))
	wantEqual(t, "after it has registered anew", cause(late.Add(time.Hour+testPatience+1)), "no heartbeat since it registered 33s ago, the TTL is 30s")
}

// An endpoint without a host is at the address from which its service calls. One on the loopback of another machine is kept
// and told to nobody.
func TestRegister_EndpointsOfOtherMachines(t *testing.T) {
	t.Parallel()
	const far = "203.0.113.7" // RFC 5737: no machine has it
	for _, tt := range []struct {
		endpoint, from, want string
		unreachable          bool
	}{
		{":50051", far, far + ":50051", false},
		{"0.0.0.0:50051", far, far + ":50051", false},
		{"[::]:50051", "2001:db8::1", "[2001:db8::1]:50051", false},
		{"http://:9001/health", far, "http://" + far + ":9001/health", false},
		{":50051", "127.0.0.1", "127.0.0.1:50051", false},
		{":50051", "", ":50051", false},
		{"store.example:50051", far, "store.example:50051", false},
		{"localhost:50051", "127.0.0.1", "localhost:50051", false},
		{"localhost:50051", far, "localhost:50051", true},
		{"http://127.0.0.1:9001/health", far, "http://127.0.0.1:9001/health", true},
		{"[::1]:50051", "2001:db8::1", "[::1]:50051", true},
		{"unix:///run/a", far, "unix:///run/a", false},
		{"nonsense", far, "nonsense", false},
		{"", far, "", false},
	} {
		if got, unreachable := completed(tt.endpoint, tt.from); got != tt.want || unreachable != tt.unreachable {
			t.Errorf("%q from %q: got %q, unreachable %v, want %q, %v", tt.endpoint, tt.from, got, unreachable, tt.want, tt.unreachable)
		}
	}

	members := []member{{id: "a", healthPort: "9001", elsewhere: true}, {id: "b", inputs: []string{"a"}, elsewhere: true}}
	r := newRegistry(testTTL, testInterval, "127.0.0.1:8080", members)
	registered := func(endpoint, from string) acknowledgement {
		t.Helper()
		ack, _, err := r.register(registration{id: "a", endpoint: endpoint, v1: true}, origin{address: from}, testEpoch)
		must(t, err)
		return ack
	}
	told := func() string {
		ack, _, err := r.register(registration{id: "b"}, origin{address: far}, testEpoch)
		must(t, err)
		return ack.connectionInfo["a"]
	}
	wantEqual(t, "the warning", registered("localhost:50051", far).unreachable, "localhost:50051")
	wantEqual(t, "the second warning", registered("localhost:50051", far).unreachable, "")
	wantEqual(t, "what is told", told(), "")
	wantEqual(t, "what is moved", len(r.served()), 0)
	wantEqual(t, "the warning", registered(":50051", far).unreachable, "")
	wantEqual(t, "what is told", told(), far+":50051")
	wantEqual(t, "what is moved", r.served()["a"].endpoint, far+":50051")
	ack, _, err := r.register(registration{endpoint: "http://:9001/health"}, origin{address: far}, testEpoch)
	if err != nil || ack.id != "a" {
		t.Errorf("by its HEALTH_PORT %q registers: %v", ack.id, err)
	}
}
