package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
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
	s, err := newSupervisor(p, procSettings{startTimeout: 30 * time.Second, stopTimeout: 10 * time.Second, heartbeat: 10 * time.Second, endpoint: "127.0.0.1:1"},
		rec.lines, slog.New(slog.NewTextHandler(t.Output(), nil)), newReaper())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.killAll(time.Now())
		for !s.over() {
			s.exited(<-s.exits, time.Now())
		}
		s.guard.dismiss() // not close, which ends all descendants, those of other tests too
		s.cgroup.remove()
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
	case e := <-s.exits:
		s.exited(e, now)
		return e.proc
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

// fifo returns a path for a process to hold open and a channel that is closed when
// the last process that does has ended.
func fifo(t *testing.T) (string, <-chan struct{}) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		f, err := os.Open(path) // waits for the first writer
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		_, _ = io.Copy(io.Discard, f)
	}()
	return path, gone
}

func waitGone(t *testing.T, gone <-chan struct{}) {
	t.Helper()
	select {
	case <-gone:
	case <-time.After(20 * time.Second):
		t.Fatal("a process of the group still lives")
	}
}

func TestGroupIsGoneWhenItsLeaderEnds(t *testing.T) {
	t.Parallel()
	path, gone := fifo(t)
	// The member ignores SIGTERM and holds neither of the pipes.
	s, _ := supervise(t, []map[string]any{sh("a", "(trap '' TERM; exec 3>"+path+" >/dev/null 2>&1; touch "+path+".up; exec sleep 1000) & until [ -e "+path+".up ]; do sleep 0.01; done; exit 3", nil)}, nil)
	p := s.byID["a"]
	s.start(p, time.Now())
	nextExit(t, s, time.Now())
	waitGone(t, gone)
}

func TestKillReachesTheGroup(t *testing.T) {
	t.Parallel()
	path, gone := fifo(t)
	s, rec := supervise(t, []map[string]any{sh("a", "trap '' TERM; (exec 3>"+path+"; echo up; sleep 1000) & wait; wait", nil)}, nil)
	p := s.byID["a"]
	s.start(p, time.Now())
	waitForText(t, rec, "a/stdout", "up")
	s.killAll(time.Now())
	nextExit(t, s, time.Now())
	if p.state != procStopped {
		t.Errorf("state %s, want stopped", p.state)
	}
	waitGone(t, gone)
}

func TestMemberThatStillWritesWhileStoppingIsHeard(t *testing.T) {
	t.Parallel()
	// The leader dies of SIGTERM at once, the member says something first.
	s, rec := supervise(t, []map[string]any{sh("a", "(trap 'sleep 0.2; echo flushed; exit' TERM; echo up; while :; do sleep 0.05; done) & exec sleep 1000", nil)}, nil)
	p := s.byID["a"]
	s.start(p, time.Now())
	s.ready(p, time.Now())
	waitForText(t, rec, "a/stdout", "up")
	s.beginStop()
	s.advanceStop(time.Now())
	nextExit(t, s, time.Now())
	if got := rec.text("a/stdout"); got != "up\nflushed\n" {
		t.Errorf("output %q, want up and flushed", got)
	}
}

func TestDaemonThatHoldsThePipeHoldsNothingUp(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/usr/bin/setsid"); err != nil {
		t.Skip("needs setsid of util-linux")
	}
	path, gone := fifo(t)
	s, rec := supervise(t, []map[string]any{sh("a", "setsid sh -c 'exec 3>"+path+"; touch "+path+".up; exec sleep 1000' & yes 0123456789 | head -n 5000; until [ -e "+path+".up ]; do sleep 0.01; done; printf last", nil)}, nil)
	p := s.byID["a"]
	s.start(p, time.Now())
	s.ready(p, time.Now())
	nextExit(t, s, time.Now())
	if p.state != procCompleted {
		t.Errorf("state %s, want completed", p.state)
	}
	if got, want := rec.text("a/stdout"), strings.Repeat("0123456789\n", 5000)+"last\n"; got != want {
		t.Errorf("output of %d bytes, want %d", len(got), len(want))
	}
	waitGone(t, gone)
}

func TestChildOutputBlocks(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc/self/fdinfo")
	}
	s, rec := supervise(t, []map[string]any{sh("a", "sed -n 's/^flags:.*\\(.\\)....$/\\1/p' /proc/self/fdinfo/1 /proc/self/fdinfo/2", nil)}, nil)
	s.start(s.byID["a"], time.Now())
	nextExit(t, s, time.Now())
	// The fifth octal digit from the right is O_NONBLOCK's (04000) neighbourhood.
	for _, digit := range strings.Fields(rec.text("a/stdout")) {
		if strings.ContainsAny(digit, "4567") {
			t.Errorf("O_NONBLOCK is set on a component's output: %q", rec.text("a/stdout"))
		}
	}
}

func TestNothingLeaksOverManyProcesses(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("counts /proc/self/fd")
	}
	s, _ := supervise(t, []map[string]any{sh("a", "exit 1", map[string]any{"restart_policy": "always"})}, nil)
	p, now := s.byID["a"], time.Now()
	count := func() (int, int) {
		files, _ := os.ReadDir("/proc/self/fd")
		return len(files), runtime.NumGoroutine()
	}
	once := func() {
		s.start(p, now)
		s.ready(p, now)
		nextExit(t, s, now)
		now = p.deadline
		s.expire(now)
	}
	once()
	files, goroutines := count()
	for range 100 {
		once()
	}
	// Other tests of this process may come and go by a few.
	if f, g := count(); f > files+20 || g > goroutines+20 {
		t.Errorf("after 100 processes: %d descriptors and %d goroutines, before %d and %d", f, g, files, goroutines)
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/x")
	t.Setenv("WATCHDOG_USEC", "1")
	t.Setenv("WATCHDOG_PID", "1")
	t.Setenv("LISTEN_FDS", "1")
	t.Setenv("FROM_OUTSIDE", "yes")
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("hush\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ := supervise(t, []map[string]any{
		sh("plain", "", nil),
		sh("own", "", map[string]any{
			"env":       map[string]string{"HEALTH_PORT": "8088", "COMPONENT_ID": "mine", "FLOWCTL_HEARTBEAT_INTERVAL": "2s", "BOTH": "env"},
			"config":    map[string]any{"retries": 3, "both": "config"},
			"env_files": map[string]string{"TOKEN": secret},
		}),
	}, nil)
	for _, tt := range []struct {
		id   string
		want map[string]string
	}{
		{"plain", map[string]string{
			"ENABLE_FLOWCTL": "true", "FLOWCTL_ENABLED": "true", "FLOWCTL_ENDPOINT": "127.0.0.1:1", "FLOWCTL_HEARTBEAT_INTERVAL": "10000ms",
			"FLOWCTL_COMPONENT_ID": "plain", "FLOWCTL_SERVICE_ID": "plain", "COMPONENT_ID": "plain", "SERVICE_ID": "plain",
			"HEALTH_PORT": s.ports["plain"].number, "HEALTH_ENDPOINT": "http://localhost:" + s.ports["plain"].number + "/health", "FROM_OUTSIDE": "yes",
		}},
		{"own", map[string]string{
			"HEALTH_PORT": "8088", "HEALTH_ENDPOINT": "http://localhost:8088/health", "COMPONENT_ID": "mine", "SERVICE_ID": "own",
			"FLOWCTL_COMPONENT_ID": "own", "FLOWCTL_HEARTBEAT_INTERVAL": "2s", "RETRIES": "3", "BOTH": "env", "TOKEN": "hush",
		}},
	} {
		cmd, _, err := s.command(s.byID[tt.id].Component)
		if err != nil {
			t.Fatal(err)
		}
		got := make(map[string]string)
		for _, entry := range cmd.Env {
			name, value, _ := strings.Cut(entry, "=")
			got[name] = value // the last one wins, as in exec.Cmd
		}
		for name, want := range tt.want {
			if got[name] != want {
				t.Errorf("%s: %s=%q, want %q", tt.id, name, got[name], want)
			}
		}
		for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS"} {
			if value, ok := got[name]; ok {
				t.Errorf("%s: %s=%q is passed on", tt.id, name, value)
			}
		}
	}
}

func TestEnvFileIsAValue(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ content, want, err string }{
		{"", "", ""},
		{"a b\n", "a b", ""},
		{"a\r\n", "a", ""},
		{"a\n\n", "a\n", ""},
		{"a\x00b", "", "holds a NUL byte, which no variable can"},
		{strings.Repeat("x", 128<<10+1), "", "is larger than 131072 bytes, the most that a variable can hold"},
	} {
		path := filepath.Join(t.TempDir(), "value")
		if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readEnvFile(path)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && err.Error() != path+" "+tt.err {
			t.Errorf("%.20q: got %q, %v; want %q, %s", tt.content, got, err, tt.want, tt.err)
		}
	}
}

func TestPortIsHeldUntilItsComponentStarts(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", forever, nil), sh("b", forever, nil)}, nil)
	if a, b := s.ports["a"], s.ports["b"]; a.number == b.number || a.hold == nil || b.hold == nil {
		t.Fatalf("ports %+v and %+v, want two, both held", a, b)
	}
	s.start(s.byID["a"], time.Now())
	if s.ports["a"].hold != nil || s.ports["b"].hold == nil {
		t.Error("want a's port released and b's held")
	}
}

func TestTailKeepsTheLastLines(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 3000)
	for _, tt := range []struct {
		name string
		add  []string
		want []string
	}{
		{"nothing", nil, nil},
		{"one line", []string{"a\n"}, []string{"a"}},
		{"an empty line", []string{"a\n\n"}, []string{"a", ""}},
		{"more than ten", []string{"1\n2\n3\n4\n5\n6\n", "7\n8\n9\n10\n11\n12\n"}, strings.Fields("3 4 5 6 7 8 9 10 11 12")},
		{"cut lines are left out", []string{long + "\n", long + "\n", "end\n"}, []string{long, "end"}},
		{"one line too long", []string{"a\n" + strings.Repeat("y", 2*tailSize) + "\n"}, []string{strings.Repeat("y", tailSize-1)}},
	} {
		var tail tail
		for _, s := range tt.add {
			tail.add([]byte(s))
		}
		if got := tail.lines(); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// pumpAll runs a pump over what write writes and returns what it handed on.
func pumpAll(t testing.TB, write func(io.Writer)) []byte {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := &child{drained: make(chan struct{})}
	c.pumping.Store(1)
	var got []byte
	go c.pump("a", "stdout", r, func(_, _ string, lines []byte) {
		if len(lines) == 0 || lines[len(lines)-1] != '\n' {
			t.Errorf("handed on %.20q, not whole lines", lines)
		}
		got = append(got, lines...)
	}, nil)
	write(w)
	w.Close()
	<-c.drained
	return got
}

func TestPumpHandsOnWholeLines(t *testing.T) {
	t.Parallel()
	piece := strings.Repeat("z", maxLine)
	for _, tt := range []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"lines", "a\nb\n", "a\nb\n"},
		{"unterminated", "a\nb", "a\nb\n"},
		{"empty lines", "\n\n", "\n\n"},
		{"NUL and no UTF-8", "a\x00b\xff\n", "a\x00b\xff\n"},
		{"longer than the first buffer", strings.Repeat("q", 3*minBuffer) + "\nr\n", strings.Repeat("q", 3*minBuffer) + "\nr\n"},
		{"one byte below a piece", piece[1:] + "\n", piece[1:] + "\n"},
		{"a piece and CRLF", piece + "\r\nnext\r\n" + piece + "\r\n" + piece[1:] + "\r\n", piece + "\r\nnext\r\n" + piece + "\r\n" + piece[1:] + "\r\n"},
		{"a piece and CR", piece + "\rx\n" + piece + "\r\r\n" + piece + "\r", piece + "\n\rx\n" + piece + "\n\r\r\n" + piece + "\r\n"},
		{"a byte above a piece", "a\n" + piece + "y\n" + piece + "y\n", "a\n" + piece + "\ny\n" + piece + "\ny\n"},
		{"longer than a piece", piece + piece + "tail\nnext\n", piece + "\n" + piece + "\ntail\nnext\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := pumpAll(t, func(w io.Writer) { _, _ = io.WriteString(w, tt.in) })
			if string(got) != tt.want {
				t.Errorf("got %d bytes %.40q, want %d bytes %.40q", len(got), got, len(tt.want), tt.want)
			}
		})
	}
}

func FuzzPassLines(f *testing.F) {
	f.Add([]byte("a\nbc\n\nd"), uint8(2))
	f.Add([]byte("\r\n\x00\xff\n"), uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		var got []byte
		buf := make([]byte, 0, 4)
		for rest := in; len(rest) > 0; {
			n := copy(buf[len(buf):min(cap(buf), len(buf)+int(step)+1)], rest)
			rest = rest[n:]
			buf = passLines(buf[:len(buf)+n], func(lines []byte) { got = append(got, lines...) })
			if len(buf) == cap(buf) {
				t.Fatal("no room to read more")
			}
		}
		if got = append(got, buf...); !bytes.Equal(got, in) {
			t.Errorf("got %q, want %q", got, in)
		}
	})
}

// BenchmarkPump is what a line costs from the pipe to the console's writer.
func BenchmarkPump(b *testing.B) {
	lines := []byte(strings.Repeat(strings.Repeat("x", 99)+"\n", 600))
	out := newConsole(io.Discard, formatText, false, []string{"a"})
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	c := &child{drained: make(chan struct{})}
	c.pumping.Store(1)
	go c.pump("a", "stdout", r, out.lines, out.flush)
	b.SetBytes(int64(len(lines)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := w.Write(lines); err != nil {
			b.Fatal(err)
		}
	}
	w.Close()
	<-c.drained
}
