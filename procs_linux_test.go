//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestRun_StartsInDataOrder(t *testing.T) {
	t.Parallel()
	gated := role{Dialect: "legacy", Gate: true}
	processor, sink := actor("processor", gated), actor("sink", gated)
	processor.Inputs = []string{"a", "b"}
	sink.Inputs, sink.DependsOn = []string{"processor"}, []string{"db"}
	db := actor("db", role{Gate: true, Check: "http"})
	db.Register = new(false)
	port := freePort(t)
	db.Env["HEALTH_PORT"], db.HealthCheck, db.HealthInterval = port, "http://127.0.0.1:"+port+"/", Duration(20*time.Millisecond)
	p := launch(t, writePipeline(t, actor("a", gated), actor("b", gated), db, processor, sink))
	// All three wait for us: so they were started together.
	p.waitOut(" a         | waiting\n")
	p.waitOut(" b         | waiting\n")
	p.waitOut(" db        | waiting\n")
	p.tell("a", syscall.SIGUSR2)
	p.waitErr("msg=ready component=a ")
	p.hasNot(p.stderr, "msg=started component=processor")
	p.tell("b", syscall.SIGUSR2)
	p.waitOut(" processor | waiting\n")
	p.tell("processor", syscall.SIGUSR2)
	p.waitErr("msg=ready component=processor ")
	p.hasNot(p.stderr, "msg=started component=sink", "msg=ready component=db")
	p.tell("db", syscall.SIGUSR2)
	p.waitOut(" sink      | waiting\n")
	p.hasNot(p.stderr, "pipeline ready")
	p.tell("sink", syscall.SIGUSR2)
	p.waitReady()
	p.has(p.stderr, "msg=ready component=a ", "msg=ready component=b ", "msg=started component=processor ", "msg=ready component=processor ",
		"msg=ready component=db ", "msg=started component=sink ", "msg=ready component=sink ", "pipeline ready")
	p.stop()
}

func TestRun_StopsInDataOrder(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	noted := role{Dialect: "legacy", Journal: journal}
	processor, sink, a := actor("processor", noted), actor("sink", noted), actor("a", noted)
	processor.Inputs = []string{"a", "b"}
	sink.Inputs, sink.DependsOn = []string{"processor"}, []string{"db"}
	a.DependsOn = []string{"db"}
	p := launch(t, writePipeline(t, sink, processor, actor("db", noted), a, actor("b", noted)))
	p.waitReady()
	p.stop()
	got := readJournal(t, journal)
	inOrder(t, got, "term a", "stop a", "term processor", "stop processor", "term sink", "stop sink", "term db", "stop db")
	inOrder(t, got, "term b", "stop b", "term processor")
}

// The source ignores SIGTERM. Its reader is stopped after half the source's stop timeout, and
// has a stop timeout of its own.
func TestRun_KillsWhatIgnoresItsStopSignal(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	sink := actor("sink", role{Dialect: "legacy", Journal: journal})
	sink.Inputs = []string{"deaf"}
	p := launch(t, writePipeline(t, actor("deaf", role{Dialect: "v1", Deaf: true, Journal: journal}), sink), "-stop-timeout", "1s")
	p.waitReady()
	p.stop()
	inOrder(t, readJournal(t, journal), "term deaf", "term sink", "stop sink")
	p.has(p.stderr, `msg="still running, sending SIGKILL" component=deaf`, "msg=ended component=deaf", "killed by signal 9")
	p.hasNot(p.stderr, "SIGKILL\" component=sink", "failed")
}

// The source ends only when its reader has gone, as some gRPC servers do. The reader is stopped
// early enough for the source to end within its stop timeout.
func TestRun_SourceThatWaitsForItsReaderCanEnd(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(shortDir(t), "data")
	source, sink := actor("source", role{Dialect: "legacy", Serve: socket}), actor("sink", role{Dialect: "legacy", Dial: socket})
	sink.Inputs = []string{"source"}
	source.StopTimeout = Duration(6 * time.Second)
	p := launch(t, writePipeline(t, source, sink))
	p.waitReady()
	p.stop()
	p.has(p.stderr, "msg=stopping component=source ", "msg=stopping component=sink ", "msg=ended component=source ")
	p.has(p.stderr, "msg=ended component=sink ")
	p.hasNot(p.stderr, "SIGKILL")
}

func TestRun_SendsTheStopSignalOfTheFile(t *testing.T) {
	t.Parallel()
	c := shell("a", `trap 'echo got INT; exit 0' INT; echo up; while :; do sleep 0.02; done`)
	c.StopSignal = "SIGINT"
	p := launch(t, writePipeline(t, c))
	p.waitOut("up")
	p.stop()
	p.has(p.stderr, "msg=stopping component=a", "signal=interrupt")
	p.has(p.stdout, "a | got INT\n")
}

// A component that was ready and is not ready now keeps its readers from starting, until it is
// ready again or the run has failed.
func TestRun_WaitsForWhatIsReadyNow(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, onUSR1  string
		args          []string
		broken, mends string
	}{
		{"restarted", "exit", nil, "msg=restarting component=a ", "msg=ready component=a "},
		{"unhealthy", "unhealthy", nil, "msg=unhealthy id=a ", "msg=healthy id=a "},
		{"never healthy", "unhealthy", []string{"-unhealthy-timeout", "2s"}, "msg=unhealthy id=a ", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := actor("a", role{Dialect: "v1", Gate: true, OnUSR1: tt.onUSR1, Code: 1})
			if tt.mends != "" {
				a.RestartPolicy = "on-failure"
			}
			reader := actor("reader", role{Dialect: "v1"})
			reader.Inputs = []string{"a", "slow"}
			p := launch(t, writePipeline(t, a, actor("slow", role{Dialect: "v1", Gate: true}), reader), tt.args...)
			p.waitOut("a      | waiting\n")
			p.waitOut("slow   | waiting\n")
			p.tell("a", syscall.SIGUSR2)
			p.waitErr("msg=ready component=a ")
			p.tell("a", syscall.SIGUSR1)
			p.waitErr(tt.broken)
			p.tell("slow", syscall.SIGUSR2)
			p.waitErr("msg=ready component=slow ")
			if tt.mends == "" {
				p.exit(exitFailed)
				p.has(p.stderr, "flowctl: component a failed: unhealthy for 2s (-unhealthy-timeout)", "never started, waiting for a: reader")
				return
			}
			if tt.onUSR1 == "exit" {
				p.wait(p.stdout, "a      | waiting\n", 2)
			}
			p.tell("a", syscall.SIGUSR2)
			p.waitReady()
			p.stop()
			p.has(p.stderr, tt.broken, "msg=ready component=slow ", tt.mends, "msg=started component=reader ")
		})
	}
}

func TestRestart_ByPolicy(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		policy string
		max    int
		role   role
		code   int
		starts int
		want   string
	}{
		{"no, status 0", "no", 0, role{Dialect: "legacy", End: "registered"}, exitOK, 1, "all components have ended"},
		{"no, status 1", "no", 0, role{Dialect: "legacy", End: "registered", Code: 1}, exitFailed, 1, "component a failed: exit status 1"},
		{"on-failure, status 0", "on-failure", 0, role{Dialect: "legacy", End: "registered"}, exitOK, 1, "all components have ended"},
		{"on-failure, then fine", "on-failure", 0, role{Dialect: "legacy", End: "early", Code: 1, Starts: 1}, -1, 2, "msg=restarting component=a"},
		{"on-failure, in vain", "on-failure", 1, role{Dialect: "legacy", End: "early", Code: 4}, exitFailed, 2, "component a failed: exit status 4, and max_restarts (1) is used up"},
		{"always, status 0", "always", 1, role{Dialect: "legacy", End: "registered"}, exitOK, 2, "msg=restarting component=a"},
		{"always, status 1", "always", 1, role{Dialect: "legacy", End: "registered", Code: 1}, exitFailed, 2, "component a failed: exit status 1, and max_restarts (1) is used up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.role.Journal = filepath.Join(t.TempDir(), "journal")
			c := actor("a", tt.role)
			c.RestartPolicy, c.MaxRestarts = tt.policy, tt.max
			p := launch(t, writePipeline(t, c))
			if tt.code < 0 {
				p.waitReady()
				p.stop()
			} else {
				p.exit(tt.code)
			}
			p.has(p.stderr, tt.want)
			if starts := strings.Count(p.stderr.String(), "msg=started component=a"); starts != tt.starts {
				t.Errorf("it was started %d times, want %d\n%s", starts, tt.starts, p)
			}
		})
	}
}

// The registration of an earlier process does not make the next one ready.
func TestRestart_HasToRegisterAgain(t *testing.T) {
	t.Parallel()
	c := actor("a", role{Dialect: "legacy", Gate: true, OnUSR1: "exit", Code: 1})
	c.RestartPolicy = "on-failure"
	file := writePipeline(t, c, actor("b", role{Dialect: "v1"}))
	p := start(t, []string{"run", file, "-control-plane-port", "0"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	p.waitOut("a | waiting\n")
	p.tell("a", syscall.SIGUSR2)
	p.waitReady()
	p.tell("a", syscall.SIGUSR1)
	p.waitErr("msg=restarting component=a")
	p.waitErr("msg=status ready=1 total=2 restarting=a\n")
	p.wait(p.stdout, "a | waiting\n", 2)
	p.wait(p.stderr, "msg=status ready=1 total=2 waiting=a\n", 1)
	code, out, _ := call(t, "list", "-e", p.endpoint())
	if !regexp.MustCompile(`\na +source +starting +\d+ +1 +unregistered `).MatchString(out) || code != exitFailed {
		t.Errorf("list: exit %d\n%s", code, out)
	}
	if n := strings.Count(p.stderr.String(), "msg=ready component=a "); n != 1 {
		t.Errorf("a is ready without having registered\n%s", p)
	}
	p.tell("a", syscall.SIGUSR2)
	p.wait(p.stderr, "msg=ready component=a ", 2)
	p.wait(p.stderr, "msg=status ready=2 total=2\n", 2)
	p.stop()
	p.wait(p.notified, "STATUS=stopping", 1)
	if n := strings.Count(p.notified.String(), "READY=1"); n != 1 {
		t.Errorf("READY=1 came %d times\n%s", n, p)
	}
}

// If the program is missing when its component is to be started again, flowctl tries again
// later.
func TestRestart_ProgramThatIsBeingReplacedIsTriedAgain(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "program")
	if err := os.Symlink("/bin/sh", program); err != nil {
		t.Fatal(err)
	}
	c := shell("a", "exec sleep 300")
	c.Command[0], c.RestartPolicy = program, "on-failure"
	p := launch(t, writePipeline(t, c))
	p.waitReady()
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	p.tell("a", syscall.SIGKILL)
	p.waitErr(`msg="cannot be started again" component=a err="cannot run \"` + program + `\": no such file or directory"`)
	if _, out, _ := call(t, "list", "a", "-e", p.endpoint()); !strings.Contains(out, "cannot run") {
		t.Errorf("list does not say why\n%s", out)
	}
	if err := os.Symlink("/bin/sh", program); err != nil {
		t.Fatal(err)
	}
	p.wait(p.stderr, "msg=ready component=a ", 2)
	p.stop()
	p.has(p.stderr, "msg=restarting component=a in=1", "restarts=1", "cannot be started again", "msg=restarting component=a in=2", "restarts=2")
}

// A stop does not wait for the end of a pause between restarts.
func TestRestart_EndsWithAStop(t *testing.T) {
	t.Parallel()
	c := actor("a", role{End: "early", Code: 1})
	c.RestartPolicy = "always"
	p := launch(t, writePipeline(t, c, actor("b", role{Dialect: "v1"})))
	p.waitErr("msg=ready component=b")
	p.waitErr("msg=restarting component=a in=4")
	p.waitErr("restarting=a")
	began := time.Now()
	p.stop()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the stop took %s", took)
	}
	if n := strings.Count(p.stderr.String(), "msg=started component=a"); n != 3 {
		t.Errorf("it was started %d times, want 3\n%s", n, p)
	}
	again := actor("a", role{Dialect: "legacy", Deaf: true})
	again.RestartPolicy = "always"
	p = launch(t, writePipeline(t, again), "-stop-timeout", "100ms")
	p.waitReady()
	p.stop() // by SIGKILL, which is no reason to restart
	if n := strings.Count(p.stderr.String(), "msg=started component=a"); n != 1 {
		t.Errorf("it was started %d times\n%s", n, p)
	}
}

// The reader of a component that is restarted goes on.
func TestRestart_ReadersGoOn(t *testing.T) {
	t.Parallel()
	a := actor("a", role{Dialect: "legacy", OnUSR1: "exit", Code: 1})
	a.RestartPolicy = "on-failure"
	b := actor("b", role{Dialect: "v1"})
	b.Inputs = []string{"a"}
	p := launch(t, writePipeline(t, a, b))
	p.waitReady()
	components, _ := listed(t, p.endpoint())
	before := components["a"]
	first, reader := p.pid("a"), p.pid("b")
	p.tell("a", syscall.SIGUSR1)
	p.waitErr("msg=restarting component=a")
	if components, _ = listed(t, p.endpoint()); before.Health != "healthy" || components["a"].Health == "healthy" {
		t.Errorf("its health was %q and is %q while it is restarted", before.Health, components["a"].Health)
	}
	p.wait(p.stderr, "msg=ready component=a ", 2)
	components, _ = listed(t, p.endpoint())
	if after := components["a"]; after.Health != "healthy" || !after.Registered.After(*before.Registered) {
		t.Errorf("it was %+v and is %+v, want it healthy, and registered again", before, after)
	}
	if p.pid("a") == first || p.pid("b") != reader || strings.Count(p.stderr.String(), "msg=started component=b") != 1 {
		t.Errorf("want another process of a and the same of b\n%s", p)
	}
	p.stop()
}

// It is not parallel, because it counts what this process has.
func TestRestart_LeaksNothing(t *testing.T) {
	program := filepath.Join(t.TempDir(), "leak"+strconv.Itoa(os.Getpid()%10000000)) // its zombies have this name
	if err := os.Symlink("/bin/sh", program); err != nil {
		t.Fatal(err)
	}
	l := newTestLauncher(t)
	c := map[string]any{"id": "a", "command": []string{program, "-c", "echo out; echo err >&2; exit 1"}, "register": false, "restart_policy": "always"}
	s := newSupervisor(parseParts(t, []map[string]any{c}, nil), procTimes{start: 30 * time.Second}, l.launcher, l.config.log)
	p, now := s.byID["a"], time.Now()
	once := func() {
		for _, p := range s.startable() {
			s.start(p, now)
			s.ready(p, now)
			now = now.Add(settleTime)
			end := l.end()
			s.exited(end, now)
			now = p.deadline
			s.expire(now)
		}
	}
	count := func() (files, goroutines, zombies int) {
		entries, _ := os.ReadDir("/proc/self/fd")
		for _, pid := range allPIDs() {
			if procFile(pid, "comm") == filepath.Base(program)+"\n" {
				zombies++
			}
		}
		return len(entries), runtime.NumGoroutine(), zombies
	}
	for range 10 {
		once()
	}
	files, goroutines, _ := count()
	for range 1000 {
		once()
	}
	if p.state != procWaiting || p.restarts != 1010 {
		t.Fatalf("state %s after %d restarts", p.state, p.restarts)
	}
	// The goroutines of the last process may need a moment.
	eventually(t, "as few descriptors, goroutines and zombies as before", func() bool {
		f, g, z := count()
		return f <= files && g <= goroutines && z == 0
	})
}

// It is not parallel, because it measures.
func TestRun_EndsSoonAfterItsLastComponent(t *testing.T) {
	const many = 300
	h := newHerd()
	var components []Component
	for i := range many {
		components = append(components, Component{ID: fmt.Sprintf("c%03d", i), Command: []string{"sleep", string(h)}, Register: new(false)})
	}
	p := start(t, runArgs(writePipeline(t, components...)), withBinary(plainFlowctl()))
	p.waitReady()
	var fds []int
	for pid := range h.await(p, many) {
		fds = append(fds, handle(t, pid))
	}
	if len(fds) != many {
		t.Fatalf("%d processes", len(fds))
	}
	fds = append(fds, handle(t, p.cmd.Process.Pid))
	p.signal(syscall.SIGTERM)
	times, ok := ends(t, patience, fds...)
	if !ok {
		t.Fatalf("not all have ended\n%s", p)
	}
	last := slices.MaxFunc(times[:many], time.Time.Compare)
	first := slices.MinFunc(times[:many], time.Time.Compare)
	after := times[many].Sub(last)
	t.Logf("%d components ended within %s, flowctl %s after the last", many, last.Sub(first), after)
	if after > 300*time.Millisecond+last.Sub(first) { // which is longer on a busy machine
		t.Errorf("flowctl ended %s after the last of them, which ended %s after the first", after, last.Sub(first))
	}
	p.exit(exitOK)
	h.gone(p, 0)
}
