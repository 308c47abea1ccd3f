package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"
)

// fakeStarter starts no process: it gives out pids, and notes signals.
type fakeStarter struct {
	started int
	broken  map[string]error // by id: why it cannot be started
	sent    []string         // "id signal", in order
}

func (f *fakeStarter) start(c *Component) (*child, error) {
	if err := f.broken[c.ID]; err != nil {
		return nil, err
	}
	f.started++
	return &child{component: c, pid: f.started}, nil
}

func (f *fakeStarter) signal(ch *child, sig syscall.Signal) {
	f.sent = append(f.sent, ch.component.ID+" "+sig.String())
}

// comp is a component of a test that does not register. Its program is never run.
func comp(id string, more map[string]any) map[string]any {
	c := map[string]any{"id": id, "command": []string{"/bin/true"}, "register": false}
	if more["oneshot"] != nil {
		delete(c, "register")
	}
	maps.Copy(c, more)
	return c
}

// parseParts returns the pipeline of the given sources and sinks.
func parseParts(t testing.TB, sources, sinks []map[string]any) *Pipeline {
	t.Helper()
	spec := map[string]any{"sources": sources}
	if sinks != nil {
		spec["sinks"] = sinks
	}
	data, err := json.Marshal(map[string]any{
		"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": map[string]any{"name": "test"}, "spec": spec,
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := parsePipeline(data, "test.json", os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// machine is a supervisor whose processes and time a test makes up.
type machine struct {
	*supervisor
	t    *testing.T
	fake *fakeStarter
	now  time.Time
}

func newMachine(t *testing.T, sources, sinks []map[string]any) *machine {
	t.Helper()
	fake := &fakeStarter{broken: make(map[string]error)}
	times := procTimes{start: 30 * time.Second, unhealthy: 30 * time.Second, stop: 10 * time.Second}
	s := newSupervisor(parseParts(t, sources, sinks), times, fake, slog.New(slog.NewTextHandler(t.Output(), nil)))
	return &machine{s, t, fake, time.Now()}
}

// startAll starts all that may start.
func (m *machine) startAll() {
	for _, p := range m.startable() {
		_ = m.start(p, m.now) // what comes of an error is in its state
	}
}

// heal tells the supervisor that the components ids are healthy.
func (m *machine) heal(ids ...string) {
	for _, id := range ids {
		m.tell(m.byID[id], healthInfo{ok: true, registered: true}, m.now)
	}
}

// ail tells the supervisor that the component id is not healthy.
func (m *machine) ail(id, cause string) {
	m.tell(m.byID[id], healthInfo{cause: cause, registered: true}, m.now)
}

// readyAll starts and heals until nothing waits, and until all have shown that they work.
func (m *machine) readyAll() {
	for batch := m.startable(); len(batch) > 0; batch = m.startable() {
		m.startAll()
		m.heal(ids(batch)...)
	}
	m.pass(settleTime)
}

// end ends the process of id.
func (m *machine) end(id string, status syscall.WaitStatus) {
	m.t.Helper()
	p := m.byID[id]
	if p.child == nil {
		m.t.Fatalf("%s has no process that could end", id)
	}
	m.exited(childEnd{child: p.child, status: status}, m.now)
}

// pass lets so much time pass and acts on what is due.
func (m *machine) pass(d time.Duration) {
	m.now = m.now.Add(d)
	m.expire(m.now)
}

// want fails the test unless the component id is in the state.
func (m *machine) want(id string, state procState) {
	m.t.Helper()
	if got := m.byID[id].state; got != state {
		m.t.Errorf("%s is %s, want %s", id, got, state)
	}
}

// wantStartable fails the test unless just ids may start.
func (m *machine) wantStartable(want ...string) {
	m.t.Helper()
	if got := ids(m.startable()); !slices.Equal(got, want) {
		m.t.Errorf("may start: %q, want %q", got, want)
	}
}

// wantFailure fails the test unless id is all that has failed, so.
func (m *machine) wantFailure(id string, kind failKind, reason string) {
	m.t.Helper()
	f := m.failures()
	if len(f) != 1 || f[0].component.ID != id || f[0].kind != kind || f[0].reason != reason {
		m.t.Errorf("failures %s, want %s: %s: %s", describeFailures(f), id, kind, reason)
	}
}

func describeFailures(list []*failure) string {
	var out []string
	for _, f := range list {
		out = append(out, fmt.Sprintf("%s: %s: %s", f.component.ID, f.kind, f.reason))
	}
	return fmt.Sprintf("%q", out)
}

func ids(procs []*proc) []string {
	var out []string
	for _, p := range procs {
		out = append(out, p.id())
	}
	return out
}

// exitStatus is how a process ends that exits with code (wait(2)).
func exitStatus(code int) syscall.WaitStatus { return syscall.WaitStatus(code << 8) }

const killedBySIGKILL = syscall.WaitStatus(syscall.SIGKILL)

func TestStart_TimeoutIsJudgedAtItsDeadline(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("b", map[string]any{"start_timeout": "5s"})}, nil)
	m.startAll()
	if got, want := m.next(m.now), m.now.Add(5*time.Second); !got.Equal(want) {
		t.Errorf("next deadline in %s, want 5s", got.Sub(m.now))
	}
	m.pass(5*time.Second - 1)
	if f := m.failures(); len(f) != 0 {
		t.Errorf("failed just before the deadline: %s", describeFailures(f))
	}
	m.pass(1)
	m.wantFailure("b", failNotReady, "not ready within its start timeout of 5s")
	m.heal("a")
	m.pass(time.Hour)
	if f := m.failures(); len(f) != 1 {
		t.Errorf("a failed although it was ready before its deadline: %s", describeFailures(f))
	}
}

// The time in which flowctl itself was stopped is nobody's fault.
func TestStart_TimeoutIsPutOffByTheTimeStopped(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	m.startAll()
	m.delay(time.Minute)
	m.pass(90*time.Second - 1)
	m.want("a", procStarting)
	if m.byID["a"].failure != nil {
		t.Error("failed before 30s of its own")
	}
	m.pass(1)
	m.wantFailure("a", failNotReady, "not ready within its start timeout of 30s")
}

func TestBackoff_FlowctlStoppedMeanwhileIsNoStartTimeout(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "on-failure", "start_timeout": "5s"})}, nil)
	m.startAll()
	m.end("a", exitStatus(1))
	m.delay(time.Hour)
	m.pass(time.Hour + 2*time.Second)
	m.wantStartable("a")
	if f := m.failures(); len(f) != 0 {
		t.Errorf("failures %s, want none", describeFailures(f))
	}
	m.startAll()
	m.pass(3 * time.Second)
	m.wantFailure("a", failNotReady, "not ready within its start timeout of 5s")
}

func TestExited_BecomesWhatTheTableSays(t *testing.T) {
	t.Parallel()
	onFailure, always := map[string]any{"restart_policy": "on-failure"}, map[string]any{"restart_policy": "always"}
	oneshot := map[string]any{"oneshot": true}
	for _, tt := range []struct {
		name   string
		status syscall.WaitStatus
		ready  bool // when it ends
		more   map[string]any
		want   procState
		reason string
	}{
		{"zero when ready", exitStatus(0), true, nil, procCompleted, ""},
		{"zero before ready", exitStatus(0), false, map[string]any{"register": true}, procFailed, "exit status 0 before it was ready"},
		{"non-zero when ready", exitStatus(3), true, nil, procFailed, "exit status 3"},
		{"non-zero before ready", exitStatus(3), false, nil, procFailed, "exit status 3 before it was ready"},
		{"signal", killedBySIGKILL, true, nil, procFailed, "killed by signal 9 (killed)"},
		{"on-failure, zero", exitStatus(0), true, onFailure, procCompleted, ""},
		{"on-failure, zero before ready", exitStatus(0), false, map[string]any{"register": true, "restart_policy": "on-failure"}, procFailed, "exit status 0 before it was ready"},
		{"on-failure, non-zero", exitStatus(3), true, onFailure, procBackoff, ""},
		{"on-failure, non-zero before ready", exitStatus(3), false, onFailure, procBackoff, ""},
		{"always, zero", exitStatus(0), true, always, procBackoff, ""},
		{"always, zero before ready", exitStatus(0), false, always, procBackoff, ""},
		{"register false, zero before ready", exitStatus(0), false, map[string]any{"register": false}, procCompleted, ""},
		{"oneshot, zero", exitStatus(0), false, oneshot, procCompleted, ""},
		{"oneshot, non-zero", exitStatus(3), false, oneshot, procFailed, "exit status 3 before it was ready"},
		{"oneshot on-failure, non-zero", exitStatus(3), false, map[string]any{"oneshot": true, "restart_policy": "on-failure"}, procBackoff, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, []map[string]any{comp("a", tt.more)}, nil)
			m.startAll()
			if tt.ready {
				m.heal("a")
			}
			m.end("a", tt.status)
			m.pass(signalWindow)
			m.want("a", tt.want)
			if tt.reason != "" {
				m.wantFailure("a", failEnded, tt.reason)
			} else if f := m.failures(); len(f) > 0 {
				t.Errorf("failures %s, want none", describeFailures(f))
			}
		})
	}
}

func TestExited_FailureTellsOfTheLastProcess(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	m.startAll()
	m.heal("a")
	m.byID["a"].child.tail.add([]byte("last words\n"))
	m.pass(7 * time.Second)
	m.end("a", exitStatus(3))
	m.pass(signalWindow)
	f := m.byID["a"].failure
	if f == nil || f.pid != 1 || !f.registered || !f.wasReady || f.lived != 7*time.Second || f.status == nil || *f.status != exitStatus(3) || !slices.Equal(f.tail, []string{"last words"}) {
		t.Errorf("failure %+v, want pid 1, registered, ready, 7s, status 3, its last words", f)
	}
}

func TestBackoff_DoublesAndStartsOverAfterHealth(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "on-failure"})}, nil)
	endAfter := func(lived time.Duration) time.Duration {
		t.Helper()
		m.wantStartable("a")
		m.readyAll()
		m.pass(lived - settleTime)
		m.end("a", exitStatus(1))
		wait := m.byID["a"].deadline.Sub(m.now)
		m.pass(wait - 1)
		m.want("a", procBackoff)
		m.pass(1)
		return wait
	}
	within := func(got, want time.Duration) {
		t.Helper()
		if got < want || got > want+want/10 {
			t.Errorf("restart after %s, want %s and a tenth at most", got, want)
		}
	}
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		within(endAfter(time.Second), want*time.Second)
	}
	within(endAfter(healthyReset-1), maxBackoff)
	within(endAfter(healthyReset), minBackoff)
	if got := m.byID["a"].restarts; got != 9 {
		t.Errorf("restarts %d, want 9", got)
	}
}

func TestBackoff_EndsWithTheStartTimeout(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "on-failure", "start_timeout": "2500ms"})}, nil)
	begun := m.now
	for m.byID["a"].failure == nil && m.now.Before(begun.Add(time.Minute)) {
		if m.startAll(); m.byID["a"].child != nil {
			m.end("a", exitStatus(1))
		}
		m.pass(m.next(m.now).Sub(m.now))
	}
	m.want("a", procFailed)
	m.wantFailure("a", failNotReady, "not ready within its start timeout of 2.5s")
	if got := m.now.Sub(begun); got != 2500*time.Millisecond {
		t.Errorf("failed after %s, want 2.5s", got)
	}
}

func TestOneshot_HoldsUpWhatDependsOnItUntilItHasEnded(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("schema", map[string]any{"oneshot": true, "restart_policy": "on-failure"}), comp("app", map[string]any{"depends_on": []string{"schema"}, "restart_policy": "always"})}, nil)
	m.startAll()
	m.pass(time.Hour) // it has no start timeout
	m.end("schema", exitStatus(1))
	m.pass(2 * time.Second)
	m.wantStartable("schema")
	m.startAll()
	m.wantStartable()
	m.end("schema", exitStatus(0))
	m.wantStartable("app")
	m.readyAll()
	m.end("app", exitStatus(1))
	m.pass(2 * time.Second)
	m.wantStartable("app") // and the schema is not made again

	m = newMachine(t, []map[string]any{comp("schema", map[string]any{"oneshot": true, "start_timeout": "5s"})}, nil)
	m.startAll()
	m.pass(5 * time.Second)
	m.wantFailure("schema", failNotReady, "not ready within its start timeout of 5s")
}

// A signal that flowctl and its components get at the same time is a stop, whoever is seen first.
func TestExited_WithASignalToFlowctlIsAStop(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		status syscall.WaitStatus
		at     time.Duration // of the end, after the signal
		fails  bool
	}{
		{"by the signal, before", syscall.WaitStatus(syscall.SIGTERM), 1 - signalWindow, false},
		{"by the signal, too long before", syscall.WaitStatus(syscall.SIGTERM), -signalWindow, true},
		{"by the signal, later", syscall.WaitStatus(syscall.SIGTERM), time.Hour, false},
		{"as a shell tells of it, later", exitStatus(128 + 15), time.Hour, false},
		{"in its way, before", exitStatus(1), 1 - signalWindow, false},
		{"in its way, just after", exitStatus(1), signalWindow - 1, false},
		{"by itself, later", exitStatus(1), signalWindow, true},
		{"by another signal, later", killedBySIGKILL, signalWindow, true},
		{"with zero, later", exitStatus(0), time.Hour, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, []map[string]any{comp("db", nil), comp("a", map[string]any{"depends_on": []string{"db"}})}, nil)
			m.readyAll()
			stop := func() {
				m.heed(syscall.SIGTERM, m.now)
				if m.failures() == nil {
					m.beginStop()
					m.advanceStop(m.now)
					m.want("a", procStopping) // and db, which a needs, is not told yet
				}
			}
			if tt.at < 0 {
				m.end("db", tt.status)
				m.pass(-tt.at)
				stop()
			} else {
				stop()
				m.now = m.now.Add(tt.at)
				m.end("db", tt.status)
			}
			m.pass(signalWindow)
			if got := m.failures() != nil; got != tt.fails {
				t.Errorf("failures %s, want some: %v", describeFailures(m.failures()), tt.fails)
			}
		})
	}
}

// What ends unasked fails the run also while others stop, unless what it reads from was told to stop.
func TestExited_WhileOthersStop(t *testing.T) {
	t.Parallel()
	read := func(id string) map[string]any { return map[string]any{"inputs": []string{id}} }
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"depends_on": []string{"db", "cache"}}), comp("db", nil), comp("cache", nil)}, []map[string]any{comp("b", read("a"))})
	m.readyAll()
	m.beginStop()
	m.advanceStop(m.now)
	m.pass(time.Second)
	m.end("b", exitStatus(1))
	m.want("b", procStopped)
	m.end("cache", exitStatus(0))
	m.want("cache", procStopped)
	m.end("db", exitStatus(3))
	m.pass(signalWindow)
	m.wantFailure("db", failEnded, "exit status 3")
}

// What reads from something that is restarted may end by it, whatever its policy, and comes back.
func TestExited_WhileItsInputIsRestarted(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "on-failure"})}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}})})
	m.readyAll()
	m.ail("a", "no heartbeat")
	m.treat(m.byID["a"], m.now)
	m.end("b", exitStatus(1))
	m.want("b", procBackoff)
	m.end("a", exitStatus(1))
	m.pass(2 * time.Second)
	m.wantStartable("a", "b")
	m.readyAll()
	m.end("b", exitStatus(1))
	m.pass(signalWindow)
	m.wantFailure("b", failEnded, "exit status 1")
}

func TestUnhealthy_IsRestartedByItsPolicy(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "on-failure"})}, nil)
	a := m.byID["a"]
	ill := func() {
		t.Helper()
		m.ail("a", "hangs")
		m.pass(30 * time.Second)
		for _, p := range m.overdue(m.now) {
			m.treat(p, m.now)
		}
		m.want("a", procStopping)
	}
	restarted := func() {
		t.Helper()
		m.end("a", exitStatus(0))
		m.want("a", procBackoff)
		m.pass(maxBackoff * 2)
		m.startAll()
		m.want("a", procStarting)
	}
	m.readyAll()
	for range 5 { // each of which heals it
		ill()
		restarted()
		m.heal("a")
		m.want("a", procReady)
	}
	ill()
	restarted()
	for range maxTries - 1 {
		m.pass(30 * time.Second) // its start timeout
		m.want("a", procStopping)
		restarted()
	}
	m.tell(a, healthInfo{cause: "not registered"}, m.now)
	m.pass(30 * time.Second)
	m.wantFailure("a", failUnhealthy, "still unhealthy after 3 restarts: not registered")
}

func TestUnhealthy_RestartsHaveAnEnd(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "always"})}, nil)
	m.readyAll()
	m.ail("a", "hangs")
	m.treat(m.byID["a"], m.now)
	m.end("a", killedBySIGKILL)
	for range maxTries {
		m.pass(maxBackoff * 2)
		m.startAll()
		m.end("a", exitStatus(1)) // before it is ready
	}
	m.pass(signalWindow)
	m.wantFailure("a", failEnded, "exit status 1, and 3 restarts have not healed it")

	m = newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "on-failure", "max_restarts": 1})}, nil)
	for range 2 {
		m.pass(2 * time.Second)
		m.readyAll()
		m.ail("a", "hangs")
		m.treat(m.byID["a"], m.now)
		if m.byID["a"].state == procStopping {
			m.end("a", exitStatus(0))
		}
	}
	m.wantFailure("a", failUnhealthy, "unhealthy for 30s (-unhealthy-timeout): hangs, and max_restarts (1) is used up")
}

func TestReady_WhatMerelyRunsSettlesFirst(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"register": false}), comp("b", nil), comp("c", map[string]any{"register": false, "health_check": "tcp://127.0.0.1:1"})}, nil)
	m.startAll()
	m.heal("a", "b", "c")
	if got, want := m.next(m.now), m.now.Add(settleTime); !got.Equal(want) || m.settled(m.now) {
		t.Errorf("next look in %s, want %s", got.Sub(m.now), settleTime)
	}
	if m.pass(settleTime - 1); m.settled(m.now) {
		t.Error("settled before its time")
	}
	if m.pass(1); !m.settled(m.now) || !m.next(m.now).IsZero() {
		t.Error("not settled after its time")
	}
}

// A start that fails is an end like others, where the component was ready once.
func TestMaxRestarts_CountsWhatCannotBeStarted(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "on-failure", "max_restarts": 2})}, nil)
	m.readyAll()
	m.end("a", exitStatus(4))
	m.fake.broken["a"] = errors.New(`cannot run "a"`)
	for _, want := range []procState{procBackoff, procFailed} {
		m.pass(maxBackoff)
		m.startAll()
		m.want("a", want)
	}
	m.wantFailure("a", failStart, `cannot run "a", and max_restarts (2) is used up`)
}

func TestStart_WhatWasNeverReadyFailsAtOnce(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "always"})}, nil)
	m.fake.broken["a"] = errors.New(`cannot run "a"`)
	m.startAll()
	m.want("a", procFailed)
	m.wantFailure("a", failStart, `cannot run "a"`)
}

func TestRestart_IsNotHeldUpByWhatWasReadyOnce(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "always"})},
		[]map[string]any{comp("b", map[string]any{"inputs": []string{"a"}, "restart_policy": "always"})})
	m.readyAll()
	m.end("a", exitStatus(1))
	m.end("b", exitStatus(1))
	m.pass(2 * time.Second)
	m.wantStartable("a", "b")
}

func TestUnhealthy_ClockGoesOnFromOneBadStateToAnother(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	m.readyAll()
	m.ail("a", "no heartbeat for 31s")
	m.pass(20 * time.Second)
	m.ail("a", "it declared itself UNHEALTHY")
	if got, want := m.next(m.now), m.now.Add(10*time.Second); !got.Equal(want) {
		t.Errorf("next look in %s, want 10s", got.Sub(m.now))
	}
	m.pass(10*time.Second - 1)
	if got := m.overdue(m.now); len(got) != 0 {
		t.Errorf("overdue before its time: %q", ids(got))
	}
	m.pass(1)
	got := m.overdue(m.now)
	if !slices.Equal(ids(got), []string{"a"}) {
		t.Fatalf("overdue after 30s: %q, want a", ids(got))
	}
	m.treat(got[0], m.now)
	m.wantFailure("a", failUnhealthy, "unhealthy for 30s (-unhealthy-timeout): it declared itself UNHEALTHY")
}

func TestUnhealthy_HealingEndsTheClock(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	m.readyAll()
	m.ail("a", "no heartbeat")
	m.pass(29 * time.Second)
	m.heal("a")
	m.ail("a", "no heartbeat")
	m.pass(29 * time.Second)
	if got := m.overdue(m.now); len(got) != 0 {
		t.Errorf("overdue: %q, want none: it was healthy in between", ids(got))
	}
	m.delay(time.Minute) // in which flowctl was stopped
	m.pass(time.Minute)
	if got := m.overdue(m.now); len(got) != 0 {
		t.Errorf("overdue: %q, want none: flowctl was stopped meanwhile", ids(got))
	}
}

// One that is unhealthy is not failed for it while the run stops.
func TestUnhealthy_IsNotJudgedInAStop(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}, "stop_timeout": "1h"})})
	m.readyAll()
	m.ail("b", "no heartbeat")
	m.beginStop()
	m.advanceStop(m.now)
	m.pass(time.Minute)
	if got := m.overdue(m.now); len(got) != 0 {
		t.Errorf("overdue: %q, want none", ids(got))
	}
}

func TestStop_ReaderIsReleasedWhenItsInputTakesHalfItsTime(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}})})
	m.readyAll()
	m.beginStop()
	m.advanceStop(m.now)
	if got, want := m.next(m.now), m.now.Add(5*time.Second); !got.Equal(want) {
		t.Errorf("next look in %s, want 5s", got.Sub(m.now))
	}
	m.pass(5*time.Second - 1)
	m.advanceStop(m.now)
	m.want("b", procReady)
	m.pass(1)
	m.advanceStop(m.now)
	m.want("b", procStopping)
	m.pass(5 * time.Second)
	m.want("a", procKilled)
	if want := []string{"a terminated", "b terminated", "a killed"}; !slices.Equal(m.fake.sent, want) {
		t.Errorf("signals %q, want %q", m.fake.sent, want)
	}
}

func TestStop_WhatOutlivesSIGKILLIsLeft(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	m.readyAll()
	m.beginStop()
	m.advanceStop(m.now)
	m.pass(10 * time.Second)
	m.pass(killPatience - 1)
	m.want("a", procKilled)
	m.pass(1)
	m.wantFailure("a", failStuck, "pid 1 is still running 5s after SIGKILL")
	if !m.over() {
		t.Error("still waited for")
	}
	m.end("a", killedBySIGKILL) // after all
	m.want("a", procFailed)
}

func TestStop_StartsNothingAndJudgesNoStart(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("b", map[string]any{"restart_policy": "always"})},
		[]map[string]any{comp("c", map[string]any{"inputs": []string{"a"}})})
	m.startAll()
	m.heal("b")
	m.end("b", exitStatus(1))
	m.beginStop()
	m.want("b", procStopped)
	m.want("c", procStopped)
	m.pass(time.Hour)
	m.wantStartable()
	if f := m.failures(); len(f) != 0 {
		t.Errorf("failures %s, want none", describeFailures(f))
	}
	never, stopped := m.affected(m.byID["a"])
	if !slices.Equal(never, []string{"c"}) || len(stopped) != 0 {
		t.Errorf("never started %q, stopped %q, want c alone, never started", never, stopped)
	}
}

func TestStopBound_IsTheSlowestChain(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"stop_timeout": "1s"}), comp("x", map[string]any{"stop_timeout": "4s"})},
		[]map[string]any{comp("b", map[string]any{"inputs": []string{"a"}, "stop_timeout": "2s"})})
	if got, want := m.stopBound(), 3*time.Second+2*killPatience+sweepGrace+killPatience; got != want {
		t.Errorf("stopBound %s, want %s", got, want)
	}
}

func TestReload_WithoutARunningProcessReplacesAtOnce(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}})})
	m.startAll()
	m.reload(parseParts(t, []map[string]any{comp("a", nil)}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}, "type": "x"})}), nil)
	m.advanceReload(m.now)
	m.heal("a")
	m.wantStartable("b")
	if got := m.byID["b"].component.Type; got != "x" {
		t.Errorf("b has the type %q, want that of the new file", got)
	}
}

// A renamed component, or two that swap ports, want what those have that leave.
func TestReload_StartsWhatIsNewOnceWhatLeavesHasEnded(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"args": []string{"1"}}), comp("b", map[string]any{"args": []string{"2"}}), comp("c", nil), comp("kept", nil)}, nil)
	m.readyAll()
	m.reload(parseParts(t, []map[string]any{comp("a", map[string]any{"args": []string{"2"}}), comp("b", map[string]any{"args": []string{"1"}}), comp("d", nil), comp("kept", nil)}, nil), nil)
	for _, id := range []string{"a", "b", "c"} {
		m.advanceReload(m.now)
		m.wantStartable()
		m.end(id, exitStatus(0))
	}
	if gone := m.advanceReload(m.now); !slices.Equal(gone, []string{"c"}) {
		t.Errorf("gone: %q, want c", gone)
	}
	m.wantStartable("a", "b", "d")
	m.want("kept", procReady)
}

// A component that a reload brings and that never becomes ready fails alone.
func TestReload_WhatItBringsFailsAlone(t *testing.T) {
	t.Parallel()
	kept := comp("kept", nil)
	bring := func(name string, become func(m *machine), reason string, more map[string]any) {
		m := newMachine(t, []map[string]any{kept}, nil)
		m.readyAll()
		m.reload(parseParts(t, []map[string]any{kept, comp("new", more)}, nil), nil)
		m.advanceReload(m.now)
		m.fake.broken["new"] = nil
		if name == "cannot start" {
			m.fake.broken["new"] = errors.New("no such program")
		}
		m.startAll()
		if become != nil {
			become(m)
		}
		m.want("new", procFailed)
		if f := m.byID["new"].failure; f == nil || f.reason != reason {
			t.Errorf("%s: failure %+v, want %q", name, f, reason)
		}
		if f := m.failures(); len(f) > 0 {
			t.Errorf("%s: the run fails: %s", name, describeFailures(f))
		}
		m.want("kept", procReady)

		m.fake.broken["new"] = nil
		m.reload(parseParts(t, []map[string]any{kept, comp("new", more)}, nil), nil) // the same file: it is tried again
		m.advanceReload(m.now)
		m.wantStartable("new")
		m.readyAll()
		m.pass(settleTime + 1)
		m.end("new", exitStatus(1))
		m.pass(signalWindow)
		m.wantFailure("new", failEnded, "exit status 1") // it was ready
	}
	bring("cannot start", nil, "no such program", nil)
	bring("ends", func(m *machine) { m.end("new", exitStatus(2)); m.pass(signalWindow) }, "exit status 2 before it was ready", nil)
	bring("merely runs", func(m *machine) {
		m.heal("new")
		m.pass(settleTime - 1)
		m.end("new", exitStatus(2))
		m.pass(signalWindow)
	}, "exit status 2", nil)
	bring("is not ready", func(m *machine) {
		m.pass(30 * time.Second)
		m.want("new", procStopping)
		m.end("new", exitStatus(0))
	}, "not ready within its start timeout of 30s", map[string]any{"register": true})
}

func TestReload_ComparesEnvFilesByContent(t *testing.T) {
	t.Parallel()
	one, two := digest{1}, digest{2}
	p := parseParts(t, []map[string]any{comp("a", map[string]any{"env_files": map[string]string{"KEY": "/key"}}), comp("b", nil)}, nil)
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"env_files": map[string]string{"KEY": "/key"}}), comp("b", nil)}, nil)
	if got := m.reload(p, map[string]digest{"/key": two}); got.unchanged != 2 {
		t.Errorf("before its start: %+v, want nothing changed", got)
	}
	m.advanceReload(m.now)
	m.readyAll()
	m.byID["a"].last.envFiles = map[string]digest{"/key": one}
	if got := m.reload(p, map[string]digest{"/key": one}); got.unchanged != 2 {
		t.Errorf("the same: %+v, want nothing changed", got)
	}
	if got := m.reload(p, map[string]digest{"/key": two}); !slices.Equal(got.restarted, []string{"a"}) || got.unchanged != 1 {
		t.Errorf("another: %+v, want a restarted", got)
	}
}

// randomParts returns components, each of which waits at most for one that was drawn before it.
func randomParts(random *mathrand.Rand) []map[string]any {
	var out []map[string]any
	for _, i := range random.Perm(8)[:1+random.IntN(7)] {
		more := map[string]any{"type": fmt.Sprint(random.IntN(2))}
		if i < 2 {
			more["oneshot"] = true
		}
		if len(out) > 0 && random.IntN(2) == 0 {
			more["depends_on"] = []string{out[random.IntN(len(out))]["id"].(string)}
		}
		out = append(out, comp(fmt.Sprintf("c%d", i), more))
	}
	random.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// However reloads follow each other, in the end what the last file lists runs, and what no reload
// has changed has the process that it had.
func TestReload_AnySequenceComesToTheLastFile(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	m := newMachine(t, randomParts(random), nil)
	pids, touched := make(map[string]int), make(map[string]bool) // touched by a reload since it was started
	step := func(some bool) {
		m.advanceReload(m.now)
		for _, p := range m.startable() {
			if pids[p.id()] != 0 && !touched[p.id()] {
				t.Fatalf("%s is started again, which no reload has touched", p.id())
			}
			_ = m.start(p, m.now)
			pids[p.id()], touched[p.id()] = p.child.pid, false
		}
		for _, p := range m.procs {
			switch {
			case some && random.IntN(2) == 0:
			case p.state == procStarting && p.component.Oneshot, p.state == procStopping:
				m.end(p.id(), exitStatus(0))
			case p.state == procStarting:
				m.heal(p.id())
			}
		}
	}
	for round := range 300 {
		for range random.IntN(20) {
			step(true)
		}
		parts := randomParts(random)
		changed := m.reload(parseParts(t, parts, nil), nil)
		for _, id := range slices.Concat(changed.added, changed.removed, changed.restarted) {
			touched[id] = true
		}
		if round%3 > 0 {
			continue // another reload before this one is finished
		}
		for range 50 {
			step(false)
		}
		var listed []string
		for _, part := range parts {
			listed = append(listed, part["id"].(string))
		}
		wantEqual(t, fmt.Sprintf("components after round %d", round), fmt.Sprint(ids(m.procs)), fmt.Sprint(listed))
		for _, p := range m.procs {
			if want := map[bool]procState{true: procCompleted, false: procReady}[p.component.Oneshot]; p.state != want {
				t.Fatalf("round %d: %s is %s, want %s", round, p.id(), p.state, want)
			}
		}
		if f := m.failures(); len(f) > 0 {
			t.Fatalf("round %d: failures %s", round, describeFailures(f))
		}
	}
}

// A second reload leaves alone what the first one has not told to stop yet, and what is now as it runs.
func TestReload_SecondOneTakesBack(t *testing.T) {
	t.Parallel()
	file := func(of string) ([]map[string]any, []map[string]any) {
		return []map[string]any{comp("a", map[string]any{"type": of})}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}, "type": of})}
	}
	sources, sinks := file("1")
	m := newMachine(t, sources, sinks)
	m.readyAll()
	sources, sinks = file("2")
	m.reload(parseParts(t, sources, sinks), nil)
	m.advanceReload(m.now)
	m.want("a", procStopping)
	m.want("b", procReady)
	_, sinks = file("1")
	if got := m.reload(parseParts(t, sources, sinks), nil); got.unchanged != 1 || !slices.Equal(got.restarted, []string{"a"}) {
		t.Errorf("%+v, want a alone restarted", got)
	}
	m.end("a", exitStatus(0))
	m.advanceReload(m.now)
	m.readyAll()
	m.want("a", procReady)
	m.want("b", procReady)
	if m.fake.started != 3 {
		t.Errorf("%d starts, want a second one of a alone", m.fake.started)
	}
}

// A job that is done within a second and started again, as always says, works: no start timeout ends it.
func TestReady_ShortJobWorksOnceItHasEndedWell(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "always"})}, nil)
	for range 20 {
		m.startAll()
		m.heal("a")
		m.now = m.now.Add(settleTime / 2)
		m.end("a", exitStatus(0))
		m.want("a", procBackoff)
		m.pass(2 * maxBackoff)
	}
	if f := m.failures(); len(f) > 0 {
		t.Errorf("failures %s, want none", describeFailures(f))
	}
}

// What a reload takes out lets nothing start again that needs it, though it has run for long.
func TestReload_WhatRetiresIsNotLeanedOn(t *testing.T) {
	t.Parallel()
	needs := comp("b", map[string]any{"depends_on": []string{"a"}, "restart_policy": "always"})
	m := newMachine(t, []map[string]any{comp("a", nil), needs}, nil)
	m.readyAll()
	m.end("b", exitStatus(1))
	m.reload(parseParts(t, []map[string]any{comp("a", map[string]any{"type": "x"}), needs}, nil), nil)
	m.advanceReload(m.now)
	m.pass(5 * time.Second)
	m.wantStartable()
	m.end("a", exitStatus(0))
	m.advanceReload(m.now)
	m.wantStartable("a")
}
