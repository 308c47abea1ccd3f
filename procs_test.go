package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
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
	for k, v := range more {
		c[k] = v
	}
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

// readyAll starts and heals until nothing waits.
func (m *machine) readyAll() {
	for batch := m.startable(); len(batch) > 0; batch = m.startable() {
		m.startAll()
		m.heal(ids(batch)...)
	}
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

func TestStart_WaitsForInputsAndDependsOn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("b", nil)}, []map[string]any{
		comp("c", map[string]any{"inputs": []string{"a", "b"}}),
		comp("d", map[string]any{"depends_on": []string{"c"}}),
	})
	m.wantStartable("a", "b")
	m.startAll()
	m.wantStartable()
	m.heal("a")
	m.wantStartable()
	m.heal("b")
	m.wantStartable("c")
	m.ail("a", "it declared itself UNHEALTHY")
	m.wantStartable()
	m.heal("a")
	m.startAll()
	m.heal("c")
	m.wantStartable("d")
}

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
	for _, tt := range []struct {
		name   string
		status syscall.WaitStatus
		ready  bool // when it ends
		more   map[string]any
		want   procState
		reason string
	}{
		{"zero when ready", exitStatus(0), true, nil, procCompleted, ""},
		{"zero before ready", exitStatus(0), false, nil, procFailed, "exit status 0 before it was ready"},
		{"non-zero when ready", exitStatus(3), true, nil, procFailed, "exit status 3"},
		{"non-zero before ready", exitStatus(3), false, nil, procFailed, "exit status 3 before it was ready"},
		{"signal", killedBySIGKILL, true, nil, procFailed, "killed by signal 9 (killed)"},
		{"on-failure, zero", exitStatus(0), true, onFailure, procCompleted, ""},
		{"on-failure, zero before ready", exitStatus(0), false, onFailure, procFailed, "exit status 0 before it was ready"},
		{"on-failure, non-zero", exitStatus(3), true, onFailure, procBackoff, ""},
		{"on-failure, non-zero before ready", exitStatus(3), false, onFailure, procBackoff, ""},
		{"always, zero", exitStatus(0), true, always, procBackoff, ""},
		{"always, zero before ready", exitStatus(0), false, always, procBackoff, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, []map[string]any{comp("a", tt.more)}, nil)
			m.startAll()
			if tt.ready {
				m.heal("a")
			}
			m.end("a", tt.status)
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
		m.pass(lived)
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

func TestMaxRestarts_UsedUpIsAFailure(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"restart_policy": "always", "max_restarts": 2})}, nil)
	for range 3 {
		m.readyAll()
		m.end("a", exitStatus(4))
		m.pass(maxBackoff)
	}
	m.want("a", procFailed)
	m.wantFailure("a", failEnded, "exit status 4, and max_restarts (2) is used up")
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
	m.failUnhealthy(got[0], m.now)
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

func TestStop_GoesInDataOrder(t *testing.T) {
	t.Parallel()
	// a → b, and both need d.
	m := newMachine(t, []map[string]any{comp("a", map[string]any{"depends_on": []string{"d"}}), comp("d", nil)}, []map[string]any{
		comp("b", map[string]any{"inputs": []string{"a"}, "depends_on": []string{"d"}, "stop_signal": "SIGINT"}),
	})
	m.readyAll()
	m.beginStop()
	for _, want := range []string{"a", "b", "d"} {
		m.advanceStop(m.now)
		for _, p := range m.procs {
			if !p.over() && (p.state == procStopping) != (p.id() == want) {
				t.Errorf("%s is %s when it is the turn of %s", p.id(), p.state, want)
			}
		}
		m.end(want, exitStatus(1))
		m.want(want, procStopped)
	}
	if !m.over() {
		t.Error("not over although all have ended")
	}
	if want := []string{"a terminated", "b interrupt", "d terminated"}; !slices.Equal(m.fake.sent, want) {
		t.Errorf("signals %q, want %q", m.fake.sent, want)
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

func TestKillAll_SendsSIGKILLToAllThatRun(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("b", nil)}, []map[string]any{comp("c", map[string]any{"inputs": []string{"a"}})})
	m.startAll()
	m.killAll(m.now)
	m.killAll(m.now)
	if want := []string{"a killed", "b killed"}; !slices.Equal(m.fake.sent, want) {
		t.Errorf("signals %q, want %q", m.fake.sent, want)
	}
	m.end("a", killedBySIGKILL)
	m.end("b", killedBySIGKILL)
	if !m.over() || len(m.failures()) != 0 {
		t.Errorf("over %t, failures %s, want true and none", m.over(), describeFailures(m.failures()))
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

func TestReload_StopsWhatChangedAndLeavesTheRest(t *testing.T) {
	t.Parallel()
	changed := func(text string) map[string]any {
		return comp("changed", map[string]any{"depends_on": []string{"kept"}, "env": map[string]string{"V": text}})
	}
	m := newMachine(t, []map[string]any{comp("kept", nil), changed("1")}, []map[string]any{comp("gone", map[string]any{"inputs": []string{"changed"}})})
	m.readyAll()
	kept := m.byID["kept"]
	out := m.reload(parseParts(t, []map[string]any{comp("kept", nil), comp("fresh", map[string]any{"depends_on": []string{"changed"}}), changed("2")}, nil))
	if got, want := fmt.Sprint(out), "{[fresh] [gone] [changed] 1}"; got != want {
		t.Errorf("reloaded %s, want %s", got, want)
	}
	m.wantStartable()
	m.advanceReload(m.now)
	m.want("changed", procStopping)
	m.want("gone", procReady) // it reads from changed
	m.end("changed", exitStatus(0))
	m.advanceReload(m.now)
	m.want("gone", procStopping)
	m.wantStartable("changed")
	m.end("gone", exitStatus(1))
	if got := m.advanceReload(m.now); !slices.Equal(got, []string{"gone"}) {
		t.Errorf("gone for good: %q, want gone", got)
	}
	m.readyAll()
	if got, want := strings.Join(ids(m.procs), " "), "kept fresh changed"; got != want {
		t.Errorf("components %q, want %q", got, want)
	}
	if m.byID["kept"] != kept || kept.state != procReady || kept.restarts != 0 {
		t.Error("what has not changed was touched")
	}
	if f := m.failures(); len(f) != 0 {
		t.Errorf("failures %s, want none", describeFailures(f))
	}
}

func TestReload_WithoutARunningProcessReplacesAtOnce(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}})})
	m.startAll()
	m.reload(parseParts(t, []map[string]any{comp("a", nil)}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}, "type": "x"})}))
	m.advanceReload(m.now)
	m.heal("a")
	m.wantStartable("b")
	if got := m.byID["b"].component.Type; got != "x" {
		t.Errorf("b has the type %q, want that of the new file", got)
	}
}
