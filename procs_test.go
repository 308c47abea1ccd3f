package main

import (
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// recorder is an emitter that keeps everything.
type recorder struct {
	mu  sync.Mutex
	got map[string][]byte // by id/stream
}

func (r *recorder) lines(id, stream string, lines []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.got == nil {
		r.got = make(map[string][]byte)
	}
	r.got[id+"/"+stream] = append(r.got[id+"/"+stream], lines...)
}

func (r *recorder) text(key string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.got[key])
}

// sh is a component that runs a shell script and does not register.
func sh(id, script string, more map[string]any) map[string]any {
	c := map[string]any{"id": id, "command": []string{"sh", "-c", strings.ReplaceAll(script, "$", "$$")}, "register": false}
	for k, v := range more {
		c[k] = v
	}
	return c
}

// supervise returns a supervisor of the given sources and sinks, and what they
// print. What still runs at the end of the test is killed and waited for.
func supervise(t testing.TB, sources, sinks []map[string]any) (*supervisor, *recorder) {
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
	rec := &recorder{}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	l, err := newLauncher(launchConfig{heartbeat: 10 * time.Second, endpoint: "127.0.0.1:1", reaper: newReaper(), emit: rec.lines, log: log})
	if err != nil {
		t.Fatal(err)
	}
	s := newSupervisor(p, procSettings{startTimeout: 30 * time.Second, stopTimeout: 10 * time.Second}, l, log)
	t.Cleanup(func() {
		s.killAll(time.Now())
		for !s.over() {
			s.exited(<-l.exits, time.Now())
		}
		l.guard.dismiss() // not close, which ends all descendants, those of other tests too
		l.cgroup.remove()
	})
	return s, rec
}

// startAll starts what may start, and calls it ready, until nothing waits.
func startAll(s *supervisor, now time.Time) {
	for batch := s.startable(); len(batch) > 0; batch = s.startable() {
		for _, p := range batch {
			if s.start(p, now); p.runs() {
				s.ready(p, now)
			}
		}
	}
}

// nextExit takes in the next end of a process.
func nextExit(t testing.TB, s *supervisor, now time.Time) *proc {
	t.Helper()
	select {
	case e := <-s.launcher.exits:
		p := s.procOf(e.child)
		s.exited(e, now)
		return p
	case <-time.After(20 * time.Second):
		t.Fatal("no process ended within 20s")
		return nil
	}
}

func ids(procs []*proc) string {
	var out []string
	for _, p := range procs {
		out = append(out, p.ID)
	}
	return strings.Join(out, " ")
}

const forever = "exec sleep 1000"

func TestStartWaitsForInputsAndDependsOn(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", forever, nil), sh("b", forever, nil)}, []map[string]any{
		sh("c", forever, map[string]any{"inputs": []string{"a", "b"}}),
		sh("d", forever, map[string]any{"depends_on": []string{"c"}}),
	})
	now := time.Now()
	if got := ids(s.startable()); got != "a b" {
		t.Errorf("startable at first: %q, want a b", got)
	}
	for _, p := range s.startable() {
		s.start(p, now)
	}
	if got := ids(s.startable()); got != "" {
		t.Errorf("startable while a and b are starting: %q, want none", got)
	}
	s.ready(s.byID["a"], now)
	if got := ids(s.startable()); got != "" {
		t.Errorf("startable with a ready: %q, want none", got)
	}
	s.ready(s.byID["b"], now)
	if got := ids(s.startable()); got != "c" {
		t.Errorf("startable with a and b ready: %q, want c", got)
	}
}

func TestStartTimeoutIsJudgedAtItsDeadline(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", forever, nil), sh("b", forever, map[string]any{"start_timeout": "5s"})}, nil)
	now := time.Now()
	for _, p := range s.startable() {
		s.start(p, now)
	}
	if got, want := s.next(now), now.Add(5*time.Second); !got.Equal(want) {
		t.Errorf("next deadline in %s, want 5s", got.Sub(now))
	}
	s.expire(now.Add(5*time.Second - 1))
	if f := s.failures(); len(f) != 0 {
		t.Errorf("failed just before the deadline: %v", f[0].reason)
	}
	s.expire(now.Add(5 * time.Second))
	if f := s.failures(); len(f) != 1 || f[0].component.ID != "b" || f[0].kind != failNotReady {
		t.Errorf("failures at the deadline: %+v, want b, not ready", f)
	}
	s.ready(s.byID["a"], now)
	s.expire(now.Add(time.Hour))
	if f := s.failures(); len(f) != 1 {
		t.Errorf("a failed although it was ready before its deadline")
	}
}

func TestEndsOfAProcess(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, script string
		ready        bool // when it ends
		more         map[string]any
		want         procState
		reason       string
	}{
		{"zero when ready", "exit 0", true, nil, procCompleted, ""},
		{"zero before ready", "exit 0", false, nil, procFailed, "exit status 0 before it was ready"},
		{"non-zero when ready", "exit 3", true, nil, procFailed, "exit status 3"},
		{"non-zero before ready", "exit 3", false, nil, procFailed, "exit status 3 before it was ready"},
		{"signal", "kill -9 $$", true, nil, procFailed, "killed by signal 9 (killed)"},
		{"on-failure, zero", "exit 0", true, map[string]any{"restart_policy": "on-failure"}, procCompleted, ""},
		{"on-failure, non-zero", "exit 3", true, map[string]any{"restart_policy": "on-failure"}, procBackoff, ""},
		{"on-failure, non-zero before ready", "exit 3", false, map[string]any{"restart_policy": "on-failure"}, procBackoff, ""},
		{"always, zero", "exit 0", true, map[string]any{"restart_policy": "always"}, procBackoff, ""},
		{"no such program", "", true, map[string]any{"command": []string{"/does/not/exist"}}, procFailed, `cannot run "/does/not/exist": no such file or directory`},
		{"no such bare name", "", true, map[string]any{"command": []string{"no-such-program"}}, procFailed, `cannot run "no-such-program": it is not found in PATH`},
		{"not executable", "", true, map[string]any{"command": []string{"/etc/passwd"}}, procFailed, `cannot run "/etc/passwd": it is not executable (chmod +x)`},
		{"working_dir", "", true, map[string]any{"working_dir": "/does/not/exist"}, procFailed, `cannot enter its working_dir "/does/not/exist": no such file or directory`},
		{"env_files", "", true, map[string]any{"env_files": map[string]string{"KEY": "/does/not/exist"}}, procFailed, `env_files.KEY: open /does/not/exist: no such file or directory`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, _ := supervise(t, []map[string]any{sh("a", tt.script, tt.more)}, nil)
			p, now := s.byID["a"], time.Now()
			s.start(p, now)
			if p.state != procFailed {
				if tt.ready {
					s.ready(p, now)
				}
				nextExit(t, s, now)
			}
			if p.state != tt.want {
				t.Errorf("state %s, want %s", p.state, tt.want)
			}
			reason := ""
			if p.failure != nil {
				reason = p.failure.reason
			}
			if reason != tt.reason {
				t.Errorf("reason %q, want %q", reason, tt.reason)
			}
		})
	}
}

func TestInterpreterMissing(t *testing.T) {
	t.Parallel()
	script := filepath.Join(t.TempDir(), "script")
	// Written by a process of its own: while this one has the file open to write, a
	// fork elsewhere in it would make execve fail with ETXTBSY (go.dev/issue/22315).
	if err := exec.Command("sh", "-c", "echo '#!/no/such/interpreter' >\"$0\" && chmod 755 \"$0\"", script).Run(); err != nil {
		t.Fatal(err)
	}
	s, _ := supervise(t, []map[string]any{sh("a", "", map[string]any{"command": []string{script}})}, nil)
	s.start(s.byID["a"], time.Now())
	f := s.failures()
	if want := "the interpreter that it names, or its loader, does not exist"; len(f) != 1 || !strings.Contains(f[0].reason, want) {
		t.Errorf("failures %+v, want one with %q", f, want)
	}
}

func TestBackoffDoublesAndStartsOverAfterHealth(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", "exit 1", map[string]any{"restart_policy": "on-failure"})}, nil)
	p, now := s.byID["a"], time.Now()
	end := func(lived time.Duration) time.Duration {
		t.Helper()
		if got := ids(s.startable()); got != "a" {
			t.Fatalf("startable %q in state %s, want a", got, p.state)
		}
		s.start(p, now)
		s.ready(p, now)
		now = now.Add(lived)
		nextExit(t, s, now)
		wait := p.deadline.Sub(now)
		s.expire(p.deadline.Add(-1))
		if p.state != procBackoff {
			t.Fatalf("state %s before the backoff is over", p.state)
		}
		now = p.deadline
		s.expire(now)
		return wait
	}
	within := func(got, want time.Duration) {
		t.Helper()
		if got < want || got > want+want/10 {
			t.Errorf("restart after %s, want %s and a tenth at most", got, want)
		}
	}
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		within(end(time.Second), want*time.Second)
	}
	within(end(healthyReset-1), maxBackoff)
	within(end(healthyReset), minBackoff)
	if p.restarts != 9 {
		t.Errorf("restarts %d, want 9", p.restarts)
	}
}

func TestMaxRestarts(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", "echo $RANDOM bad; exit 4", map[string]any{"restart_policy": "always", "max_restarts": 2})}, nil)
	p, now := s.byID["a"], time.Now()
	for range 3 {
		s.start(p, now)
		s.ready(p, now)
		nextExit(t, s, now)
		now = p.deadline
		s.expire(now)
	}
	if want := "exit status 4, and max_restarts (2) is used up"; p.state != procFailed || p.failure.reason != want {
		t.Errorf("state %s, failure %+v, want failed with %q", p.state, p.failure, want)
	}
}

// A start that fails is an end like others, where the component was ready once.
func TestMaxRestartsOfWhatCannotBeStarted(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", "exit 4", map[string]any{"restart_policy": "on-failure", "max_restarts": 2})}, nil)
	p, now := s.byID["a"], time.Now()
	s.start(p, now)
	s.ready(p, now)
	nextExit(t, s, now)
	p.Command[0] = "/does/not/exist"
	for _, want := range []procState{procBackoff, procFailed} {
		now = p.deadline
		s.expire(now)
		for _, p := range s.startable() {
			s.start(p, now)
		}
		if p.state != want {
			t.Fatalf("state %s after %d restarts, want %s", p.state, p.restarts, want)
		}
	}
	if want := `cannot run "/does/not/exist": no such file or directory, and max_restarts (2) is used up`; p.failure.kind != failStart || p.failure.reason != want {
		t.Errorf("failure %+v, want %q", p.failure, want)
	}
}

func TestBackoffEndsWithTheStartTimeout(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", "exit 1", map[string]any{"restart_policy": "on-failure", "start_timeout": "2500ms"})}, nil)
	p, now := s.byID["a"], time.Now()
	for limit := now.Add(time.Minute); p.failure == nil && now.Before(limit); {
		for _, p := range s.startable() {
			s.start(p, now)
			nextExit(t, s, now)
		}
		now = s.next(now)
		s.expire(now)
	}
	if p.state != procFailed || p.failure.kind != failNotReady {
		t.Errorf("state %s, failure %+v, want failed and not ready", p.state, p.failure)
	}
}

func TestStopGoesInDataOrder(t *testing.T) {
	t.Parallel()
	// a → b → c, and all need d.
	needs := map[string]any{"depends_on": []string{"d"}}
	s, _ := supervise(t, []map[string]any{sh("a", forever, needs), sh("d", forever, nil)}, []map[string]any{
		sh("b", forever, map[string]any{"inputs": []string{"a"}, "depends_on": []string{"d"}}),
	})
	now := time.Now()
	startAll(s, now)
	s.beginStop()
	for _, want := range []string{"a", "b", "d"} {
		s.advanceStop(now)
		var stopping []string
		for _, p := range s.procs {
			if p.state == procStopping {
				stopping = append(stopping, p.ID)
			}
		}
		if got := strings.Join(stopping, " "); got != want {
			t.Fatalf("stopping %q, want %q", got, want)
		}
		nextExit(t, s, now)
	}
	if !s.over() {
		t.Error("not over although all have ended")
	}
}

func TestReaderIsStoppedWhenItsInputTakesHalfItsTime(t *testing.T) {
	t.Parallel()
	stubborn := "trap '' TERM; echo up; while :; do sleep 1000; done"
	s, rec := supervise(t, []map[string]any{sh("a", stubborn, nil)}, []map[string]any{sh("b", forever, map[string]any{"inputs": []string{"a"}})})
	now := time.Now()
	startAll(s, now)
	waitForText(t, rec, "a/stdout", "up")
	s.beginStop()
	s.advanceStop(now)
	if got, want := s.next(now), now.Add(5*time.Second); !got.Equal(want) {
		t.Errorf("next look in %s, want 5s", got.Sub(now))
	}
	s.advanceStop(now.Add(5*time.Second - 1))
	if got := s.byID["b"].state; got != procReady {
		t.Errorf("b is %s before half of a's stop timeout, want ready", got)
	}
	s.advanceStop(now.Add(5 * time.Second))
	if got := s.byID["b"].state; got != procStopping {
		t.Errorf("b is %s after half of a's stop timeout, want stopping", got)
	}
	s.expire(now.Add(10 * time.Second))
	if got := s.byID["a"].state; got != procKilled {
		t.Errorf("a is %s after its stop timeout, want killed", got)
	}
}

// waitForText waits until the recorder has text. It polls: the pump tells nobody.
func waitForText(t testing.TB, rec *recorder, key, text string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(rec.text(key), text); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has %q, want %q in it", key, rec.text(key), text)
		}
	}
}

func TestStopBoundIsTheSlowestChain(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", forever, map[string]any{"stop_timeout": "1s"}), sh("x", forever, map[string]any{"stop_timeout": "4s"})},
		[]map[string]any{sh("b", forever, map[string]any{"inputs": []string{"a"}, "stop_timeout": "2s"})})
	if got, want := s.stopBound(), 3*time.Second+2*killPatience+sweepGrace+killPatience; got != want {
		t.Errorf("stopBound %s, want %s", got, want)
	}
}
