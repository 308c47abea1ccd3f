//go:build linux

package main

import (
	"os"
	"slices"
	"syscall"
	"testing"
	"time"
)

// The kernel merges signals that come in a row, so a process cannot test this. Here the times
// are given.
func TestHeededSignal_IsRepeated(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, tt := range []struct {
		heeded, next os.Signal
		after        time.Duration
		want         bool
	}{
		{nil, syscall.SIGTERM, repeatTime - 1, true}, // the command has just ended, maybe by the same
		{nil, syscall.SIGTERM, repeatTime, false},
		{syscall.SIGTERM, syscall.SIGTERM, repeatTime - 1, true},
		{syscall.SIGTERM, syscall.SIGTERM, repeatTime, false},
		{syscall.SIGTERM, syscall.SIGINT, 0, false},
		{syscall.SIGHUP, syscall.SIGHUP, time.Hour, true}, // a shell may tell of it much later than the kernel
		{syscall.SIGTERM, syscall.SIGHUP, time.Hour, true},
		{syscall.SIGINT, syscall.SIGHUP, 0, false},
		{syscall.SIGQUIT, syscall.SIGHUP, 0, false},
		{syscall.SIGQUIT, syscall.SIGQUIT, repeatTime - 1, true},
		{nil, syscall.SIGHUP, repeatTime, false},
	} {
		if got := (heededSignal{tt.heeded, now}).isRepeated(tt.next, now.Add(tt.after)); got != tt.want {
			t.Errorf("%v, and after %s %v: repeated is %t, want %t", tt.heeded, tt.after, tt.next, got, tt.want)
		}
	}
	if (heededSignal{}).isRepeated(syscall.SIGTERM, now) {
		t.Error("the first signal counts as repeated")
	}
}

// On a busy machine, where the loop wakes up 150 ms late every time, start timeouts are judged
// all the same: late is not stopped.
func TestRun_LateWakeUpsPutNoStartTimeoutOff(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	r := &run{sup: m.supervisor, log: m.log, plane: &plane{registry: newRegistry(30*time.Second, 10*time.Second, "127.0.0.1:1", nil)}}
	m.startAll()
	begun := m.now
	look := func(wait time.Duration) {
		m.now = m.now.Add(wait)
		r.putOff(m.now)
		m.expire(m.now)
	}
	look(0)
	for m.byID["a"].failure == nil && m.now.Sub(begun) < time.Minute {
		look(time.Second/2 + 150*time.Millisecond)
	}
	if got := m.now.Sub(begun); got < 30*time.Second || got > 30*time.Second+secondLook+2*time.Second {
		t.Errorf("failed after %s, want 30s, a second look, and what each is late", got)
	}
}

// A timeout that was over while flowctl itself did not run is judged when there was time to
// hear of what has happened meanwhile.
func TestRun_TimeoutNoticedLateIsLookedAtAgain(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("b", nil)}, nil)
	m.startAll()
	m.tell(m.byID["b"], healthInfo{ok: true}, m.now)
	m.tell(m.byID["b"], healthInfo{}, m.now)
	m.now = m.now.Add(33 * time.Second)
	m.expire(m.now)
	if got := m.overdue(m.now); len(got) > 0 || m.byID["a"].failure != nil {
		t.Fatalf("judged at once: %v, %v", got, m.byID["a"].failure)
	}
	if got, want := m.next(m.now), m.now.Add(secondLook); !got.Equal(want) {
		t.Errorf("looked at again in %s, want %s", got.Sub(m.now), secondLook)
	}
	m.now = m.now.Add(secondLook + time.Second)
	m.expire(m.now)
	if got := m.overdue(m.now); len(got) != 1 || m.byID["a"].failure == nil {
		t.Errorf("not judged by the second look: %v, %v", got, m.byID["a"].failure)
	}
}

func TestRun_StoppedFlowctlPutsStartTimeoutsOffByThatTime(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	r := &run{sup: m.supervisor, log: m.log, plane: &plane{registry: newRegistry(30*time.Second, 10*time.Second, "127.0.0.1:1", nil)}}
	m.startAll()
	r.putOff(m.now)
	for _, step := range []struct {
		wait   time.Duration
		failed bool
	}{
		{9 * time.Second, false}, // less than the janitor's interval: a busy machine
		{time.Hour, false},       // stopped
		{9 * time.Second, false},
		{9 * time.Second, false},
		{3*time.Second - 1, false},
		{1, true}, // 30s without the hour
	} {
		m.now = m.now.Add(step.wait)
		r.putOff(m.now)
		m.expire(m.now)
		if got := m.byID["a"].failure != nil; got != step.failed {
			t.Errorf("failed is %t, want %t, at %+v", got, step.failed, step)
		}
	}
}

// deafCommand is a wrapped command that runs and takes no notice of signals, which it
// adds to sent.
func deafCommand(sent *[]os.Signal) *wrapped {
	return &wrapped{argv: []string{"deaf"}, pid: 7, signal: func(sig os.Signal) error {
		*sent = append(*sent, sig)
		return nil
	}}
}

// A command that outlives SIGKILL does not keep flowctl, which says so and fails.
func TestRun_CommandThatOutlivesSIGKILLIsLeft(t *testing.T) {
	t.Parallel()
	for _, signals := range []int{1, 2} { // the first is for the command, the second stops the pipeline too
		m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
		m.readyAll()
		var sent []os.Signal
		r := &run{sup: m.supervisor, wrapped: deafCommand(&sent), log: m.log, config: runConfig{times: procTimes{stop: 10 * time.Second}}}
		for i := range signals {
			r.signalled(syscall.SIGTERM, m.now.Add(time.Duration(i)*time.Second))
		}
		for _, at := range []time.Duration{10*time.Second - 1, 10 * time.Second, 10*time.Second + killPatience - 1} {
			r.expireCommand(m.now.Add(at))
			if killed := slices.Contains(sent, os.Signal(syscall.SIGKILL)); killed != (at >= 10*time.Second) || r.err != nil {
				t.Errorf("%d signals: after %s the command got %v, error %v", signals, at, sent, r.err)
			}
		}
		r.expireCommand(m.now.Add(10*time.Second + killPatience))
		if want := `the command "deaf" after --: pid 7 is still running 5s after SIGKILL`; r.code != exitFailed || r.err == nil || r.err.Error() != want {
			t.Errorf("%d signals: code %d, error %v; want 1, %s", signals, r.code, r.err, want)
		}
		if !m.stopping || r.wrapped.runs() {
			t.Errorf("%d signals: the pipeline stops: %t, the command is waited for: %t; want true, false", signals, m.stopping, r.wrapped.runs())
		}
	}
}

// Time in which flowctl itself was stopped puts off start timeouts, but no stop timeouts.
func TestRun_StoppedFlowctlStopsOnTime(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: ""}), shell("b", `trap "" TERM; echo up; while :; do sleep 0.02; done`)), "-start-timeout", "20s", "-stop-timeout", "2s")
	p.waitOut("up\n")
	p.signal(syscall.SIGTERM)
	p.waitErr("msg=stopping component=b ")
	p.signal(syscall.SIGSTOP)
	time.Sleep(300 * time.Millisecond) // as long as it is to be stopped
	p.signal(syscall.SIGCONT)
	p.exit(exitOK)
}

// What is heard when flowctl goes on is judged from then on.
func TestRun_StoppedFlowctlPutsOffNoTimeoutThatBeginsAfterwards(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	registry := newRegistry(30*time.Second, 10*time.Second, "127.0.0.1:1", []member{{id: "a"}})
	r := &run{sup: m.supervisor, log: m.log, plane: &plane{registry: registry}}
	registry.starting("a", m.now)
	m.startAll()
	registry.markReady("a", m.now)
	r.takeChanges(m.now)
	m.want("a", procReady)
	m.now = m.now.Add(time.Hour)
	registry.checked("a", "health_check failed", m.now)
	r.takeChanges(m.now)
	if got, want := m.next(m.now), m.now.Add(30*time.Second); !got.Equal(want) {
		t.Errorf("a fails in %s, want 30s", got.Sub(m.now))
	}
}
