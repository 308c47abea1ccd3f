//go:build linux

package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Whatever a component does and however flowctl ends, nothing of the run lives on.
func TestRun_NothingOutlivesIt(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, script string
		processes    int
	}{
		{"plain", `exec sleep T`, 1},
		{"deaf", `trap "" TERM INT HUP; while :; do sleep T; done`, 2},
		{"group", `sleep T & (sleep T & (trap "" TERM; sleep T) & sleep T) & wait`, 5},
		{"daemon", daemons + ` & exec sleep T`, 3},
		{"bare daemon", `env -i ` + daemons + ` & exec sleep T`, 3},
		{"daemon of a daemon", daemons + `; setsid sh -c "` + strings.ReplaceAll(daemons, `"`, `\"`) + `; sleep T" & exec sleep T`, 7},
	} {
		for _, sig := range endings {
			t.Run(tt.name+"/"+sig.String(), func(t *testing.T) {
				t.Parallel()
				h := newHerd()
				p := launch(t, writePipeline(t, shell("a", h.script(tt.script))), "-stop-timeout", "500ms")
				p.waitReady()
				h.await(p, tt.processes)
				if sig == syscall.SIGKILL && strings.Contains(tt.script, "env -i") {
					time.Sleep(1200 * time.Millisecond) // the guard looks once a second for what nothing else tells of
				}
				h.end(p, sig)
			})
		}
	}
}

// What flowctl itself may die of besides a signal that asks it to end.
func TestRun_NothingOutlivesACrash(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGBUS} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			p := launch(t, writePipeline(t, shell("a", h.script(daemons+"; exec sleep T"))))
			p.waitReady()
			h.await(p, 3)
			p.signal(sig)
			h.gone(p, killGrace())
		})
	}
}

func TestRun_EndsStoppedProcesses(t *testing.T) {
	t.Parallel()
	for _, sig := range endings {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			// The leader, a member of its group and a daemon, all stopped.
			p := launch(t, writePipeline(t, shell("a", h.script(daemons+`; sleep T & exec sleep T`))), "-stop-timeout", "500ms")
			p.waitReady()
			for pid := range h.await(p, 4) {
				if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			h.end(p, sig)
		})
	}
}

// TestRun_KilledWhileStarting kills flowctl at any moment of its start.
func TestRun_KilledWhileStarting(t *testing.T) {
	t.Parallel()
	component := func(h herd, id string, inputs ...string) Component {
		c := shell(id, h.script(daemons+` & sleep T & exec sleep T`))
		c.Inputs = inputs
		return c
	}
	pipeline := func(h herd) string {
		return writePipeline(t, component(h, "a"), component(h, "b"), component(h, "c", "a"), component(h, "d", "c"))
	}
	flowctlProgram(t) // building it is not to be measured
	h := newHerd()
	began := time.Now()
	p := launch(t, pipeline(h))
	p.waitReady()
	span := max(time.Since(began)*5/4, 60*time.Millisecond)
	p.stop()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d, kills within %s", seed, span)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 24 {
		after := time.Duration(random.Int64N(int64(span)))
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			p := launch(t, pipeline(h))
			time.Sleep(after)
			p.signal(syscall.SIGKILL)
			h.gone(p, killGrace())
		})
	}
}

// TestRun_KilledWhileStopping kills flowctl at any moment of its stop.
func TestRun_KilledWhileStopping(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 12 {
		after := time.Duration(random.Int64N(int64(700 * time.Millisecond)))
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			slow := shell("a", h.script(`trap "sleep 0.2; exit" TERM; sleep T & while :; do sleep 0.05; done`))
			deaf := shell("b", h.script(`trap "" TERM; sleep T & sleep T`))
			last := shell("c", h.script(daemons+`; exec sleep T`))
			deaf.Inputs, last.Inputs = []string{"a"}, []string{"b"}
			p := launch(t, writePipeline(t, slow, deaf, last), "-stop-timeout", "300ms")
			p.waitReady()
			h.await(p, 8)
			p.signal(syscall.SIGTERM)
			time.Sleep(after)
			_ = p.cmd.Process.Kill() // it may have ended
			h.gone(p, killGrace())
		})
	}
}

// Two runs of the same pipeline know nothing of each other.
func TestRun_LeavesAnotherRunAlone(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			var runs [2]*process
			herds := [2]herd{newHerd(), newHerd()}
			for i, h := range herds {
				runs[i] = launch(t, writePipeline(t, shell("a", h.script(daemons+` & sleep T & i=0; while :; do i=$((i+1)); echo "line $i of T"; sleep 0.01; done`))))
				runs[i].waitReady()
				h.await(runs[i], 4)
			}
			const daemonsAndLeader = 4
			before := herds[1].living()
			herds[0].end(runs[0], sig)
			after := herds[1].living()
			leader := runs[1].pid("a")
			for pid := range before {
				if pid != leader && before[pid] == before[leader] {
					continue // a fork of the shell that was to become sleep
				}
				if after[pid] == "" {
					t.Errorf("pid %d (%s) is gone", pid, before[pid])
				}
			}
			if len(after) < daemonsAndLeader {
				t.Errorf("%d processes of the other run live", len(after))
			}
			seen := len(runs[1].lines("a"))
			runs[1].waitOut(fmt.Sprintf("line %d of", seen+20))
			for i, line := range runs[1].lines("a") {
				if want := fmt.Sprintf("line %d of %s", i+1, herds[1]); line != want {
					t.Fatalf("got %q, want %q", line, want)
				}
			}
			runs[1].stop()
		})
	}
}

// A component that floods while it is stopped holds nothing up, and what it says
// last is heard.
func TestRun_FloodWhileStopping(t *testing.T) {
	t.Parallel()
	for _, sig := range endings {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			line := strings.Repeat("0123456789", 10)
			polite := shell("polite", h.script(`: T; stop=; trap stop=1 TERM; while [ -z "$stop" ]; do echo `+line+`; done; i=0; while [ $i -lt 2000 ]; do echo `+line+`; i=$((i+1)); done; echo last words`))
			polite.StopTimeout = Duration(patience) // it needs none of that on an idle machine
			p := start(t, runArgs(writePipeline(t,
				polite,
				shell("deaf", h.script(`: T; trap "" TERM; while :; do echo `+line+`; done`)),
			), "-stop-timeout", "500ms"))
			p.waitReady()
			p.wait(p.stdout, line, 100)
			h.end(p, sig)
			if sig == syscall.SIGKILL {
				return
			}
			p.hasNot(p.stderr, "is lost") // everything was read
			if said := p.lines("polite"); said[len(said)-1] != "last words" {
				t.Errorf("the last words are %q", said[len(said)-1])
			}
			for _, id := range []string{"polite", "deaf"} {
				lines := p.lines(id)
				for _, got := range lines[:len(lines)-1] { // the last of deaf was cut by SIGKILL, if by any
					if got != line {
						t.Fatalf("%s: torn: %q", id, got)
					}
				}
			}
		})
	}
}

func TestGuard_IsReplaced(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t, shell("a", h.script(daemons+` & exec sleep T`)), shell("b", h.script(`exec env -i sleep T`))))
	p.waitReady()
	h.await(p, 4)
	for i := range 3 {
		old := guardOf(p)
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.wait(p.stderr, "the guard was killed", i+1)
		eventually(t, "another guard", func() bool { return guardOf(p) != old })
	}
	// It has been told of what already runs once it has read that.
	time.Sleep(100 * time.Millisecond)
	h.end(p, syscall.SIGKILL)
}

// What a user does in anger reaches the guard too: it must not be known by flowctl's name.
func TestGuard_IsNotKilledByName(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t, shell("a", h.script(daemons+` & exec sleep T`))))
	p.waitReady()
	h.await(p, 3)
	living, _ := childrenOf(p.cmd.Process.Pid)
	for _, pid := range append(living, p.cmd.Process.Pid) {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		name, _, _ := bytes.Cut(line, []byte{0})
		if strings.TrimSpace(string(comm)) == "flowctl" || filepath.Base(string(name)) == "flowctl" { // pkill, killall, pidof
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	h.gone(p, killGrace())
}

// The terminal's signals and SIGTERM do not end the guard, nor does one that is
// stopped hold up the end.
func TestGuard_IgnoresSignals(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t, shell("a", h.script(`trap "" INT; exec sleep T`))))
	p.waitReady()
	h.await(p, 1)
	guard := guardOf(p)
	if sid, _, _ := syscall.Syscall(syscall.SYS_GETSID, uintptr(guard), 0, 0); int(sid) != guard {
		t.Errorf("the guard is of session %d, not of its own", sid)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGTSTP} {
		if err := syscall.Kill(guard, sig); err != nil {
			t.Fatal(err)
		}
	}
	fd := handle(t, guard)
	if err := syscall.Kill(-p.cmd.Process.Pid, syscall.SIGINT); err != nil { // Ctrl-C
		t.Fatal(err)
	}
	p.exit(exitOK)
	h.gone(p, 0)
	if _, ok := ends(t, killGrace(), fd); !ok {
		t.Error("the guard outlives flowctl")
	}
	p.hasNot(p.stderr, "the guard was killed")
}

func TestGuard_StoppedHoldsNothingUp(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t, shell("a", h.script(`exec sleep T`))))
	p.waitReady()
	guard := guardOf(p)
	if err := syscall.Kill(guard, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(guard, syscall.SIGKILL) })
	p.signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = syscall.Kill(guard, syscall.SIGKILL)
		t.Error("flowctl waits for its guard, which is stopped")
	}
	p.exit(exitOK)
}

// The guard gives back what starting took when nothing has started for a while.
func TestGuard_KeepsLittleInMemory(t *testing.T) {
	t.Parallel()
	h := newHerd()
	var components []Component
	for i := range 20 {
		components = append(components, shell(fmt.Sprint("c", i), h.script(daemons+` & exec sleep T`)))
	}
	p := start(t, runArgs(writePipeline(t, components...)), withBinary(plainFlowctl()))
	p.waitReady()
	h.await(p, 60)
	guard := guardOf(p)
	eventually(t, "less than two thirds of what it once had", func() bool { return memory(t, guard, "VmRSS")*3 < memory(t, guard, "VmHWM")*2 })
	t.Logf("the guard: VmRSS %d KiB, VmHWM %d KiB; flowctl: VmRSS %d KiB", memory(t, guard, "VmRSS")>>10, memory(t, guard, "VmHWM")>>10, memory(t, p.cmd.Process.Pid, "VmRSS")>>10)
	h.end(p, syscall.SIGKILL)
}

// Nobody waits for a guard that does not read: it is replaced, and the new one knows what runs.
func TestGuard_NotReadingIsReplaced(t *testing.T) {
	t.Parallel()
	l := newTestLauncher(t)
	old := l.guard.pid()
	if err := syscall.Kill(old, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	l.run(sh("a", forever, nil))
	told := make(chan struct{})
	go func() {
		defer close(told)
		for range 10_000 { // more than the pipe holds
			l.guard.groupStarted(os.Getpid())
			l.guard.groupEnded(os.Getpid())
		}
	}()
	select {
	case <-told:
	case <-time.After(patience):
		t.Fatal("telling the guard waits for it to read")
	}
	eventually(t, "another guard", func() bool { return l.guard.pid() != old })
}

// A component may be a flowctl: it and its guard answer for what it runs.
func TestRun_AsAComponent(t *testing.T) {
	t.Parallel()
	nest := func(t *testing.T, policy string) (p *process, outer, inner herd, pid int) {
		outer, inner = newHerd(), newHerd()
		file := writePipeline(t, shell("leaf", inner.script(daemons+` & exec sleep T`)))
		nested := Component{ID: "nested", Command: []string{flowctlProgram(t), "run", file, "-control-plane-port", "0", "-stop-timeout", "500ms"}, Register: new(false), RestartPolicy: policy}
		nested.Env = map[string]string{"XDG_RUNTIME_DIR": t.TempDir()} // the names are the same
		p = launch(t, writePipeline(t, nested, shell("beside", outer.script(`exec sleep T`))))
		p.waitReady()
		inner.await(p, 3)
		return p, outer, inner, p.pid("nested")
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run("outer "+sig.String(), func(t *testing.T) {
			t.Parallel()
			p, outer, inner, _ := nest(t, "no")
			outer.end(p, sig)
			inner.gone(p, map[syscall.Signal]time.Duration{syscall.SIGKILL: killGrace()}[sig])
		})
	}
	t.Run("inner", func(t *testing.T) {
		t.Parallel()
		p, outer, inner, pid := nest(t, "always")
		first := inner.living()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.waitErr("msg=restarting component=nested")
		deadline := time.Now().Add(killGrace())
		for still := first; len(still) > 0; time.Sleep(5 * time.Millisecond) {
			now := inner.living()
			still = make(map[int]string)
			for pid := range first {
				if now[pid] != "" {
					still[pid] = now[pid]
				}
			}
			if time.Now().After(deadline) {
				t.Errorf("what the inner flowctl ran has outlived it: %v\n%s", still, p)
				break
			}
		}
		if len(outer.living()) != 1 {
			t.Error("what ran beside it is gone")
		}
		p.wait(p.stderr, "msg=started component=nested", 2)
		inner.await(p, 3)
		if p.pid("nested") == pid {
			t.Error("it was not started again")
		}
		p.stop()
		inner.gone(p, 0)
	})
}

// A check is a process of the run too, also one that clears its environment, as
// sudo does.
func TestRun_HealthCheckDoesNotOutliveIt(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			c := shell("a", h.script(`exec sleep T`))
			c.HealthCheck, c.HealthTimeout = "exec:env -i sleep "+string(h), Duration(time.Minute)
			p := launch(t, writePipeline(t, c), "-start-timeout", "1m")
			h.await(p, 2)
			h.end(p, sig)
		})
	}
}

// A process whose main thread has ended looks like a zombie and is none.
func TestRun_EndsProcessWithoutMainThread(t *testing.T) {
	t.Parallel()
	for _, sig := range endings {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			path, gone := fifo(t)
			c := actor("a", role{})
			c.Register = new(false)
			c.Env[headlessVar] = path
			c.Command = append([]string{"setsid", "-w"}, c.Command...) // in a session of its own, below a/sh
			p := launch(t, writePipeline(t, c), "-stop-timeout", "500ms")
			p.waitOut("a | headless\n")
			p.signal(sig)
			<-p.done
			select {
			case <-gone:
			case <-time.After(killGrace()):
				t.Errorf("it lives\n%s", p)
			}
			p.awaitGuard()
		})
	}
}

// flowctl reaps what its components orphan, in its whole life.
func TestRun_LeavesNoZombies(t *testing.T) {
	t.Parallel()
	h := newHerd()
	const orphans = 400
	p := launch(t, writePipeline(t,
		shell("a", h.script(`: T; i=0; while [ $i -lt `+strconv.Itoa(orphans)+` ]; do (true & true &); i=$((i+1)); done; echo done; exec sleep T`)),
		shell("b", h.script(`i=0; while [ $i -lt 50 ]; do (setsid sh -c 'sleep 0.01 & sleep 0.02 &' &); i=$((i+1)); done; echo done; exec sleep T`))))
	p.wait(p.stdout, "| done\n", 2)
	// Those that end right now are zombies for a moment.
	eventually(t, "no zombie below flowctl", func() bool {
		_, zombies := childrenOf(p.cmd.Process.Pid)
		return zombies == 0
	})
	eventually(t, "flowctl has the guard and its two components alone", func() bool {
		living, _ := childrenOf(p.cmd.Process.Pid)
		return len(living) == 3
	})
	h.end(p, syscall.SIGTERM)
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
	case <-time.After(patience):
		t.Fatal("a process of the group still lives")
	}
}

// testLauncher is a launcher without a run.
type testLauncher struct {
	*launcher
	t       testing.TB
	rec     *recorder // what the children print
	running map[*child]bool
}

// newTestLauncher returns a launcher. What still runs at the end of the test is killed and
// waited for.
func newTestLauncher(t testing.TB) *testLauncher {
	t.Helper()
	l := &testLauncher{t: t, rec: &recorder{}, running: make(map[*child]bool)}
	var err error
	l.launcher, err = newLauncher(launchConfig{
		endpoint: "127.0.0.1:1", heartbeat: 10 * time.Second, reaper: newReaper(),
		emit: l.rec.lines, log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for ch := range l.running {
			l.signal(ch, syscall.SIGKILL)
		}
		for len(l.running) > 0 {
			l.end()
		}
		l.guard.dismiss() // not close, which ends all descendants, those of other tests too
		l.cgroup.remove()
	})
	return l
}

// component returns the component that the file would have.
func (l *testLauncher) component(fields map[string]any) *Component {
	l.t.Helper()
	return parseParts(l.t, []map[string]any{fields}, nil).components()[0]
}

func (l *testLauncher) run(fields map[string]any) *child {
	l.t.Helper()
	ch, err := l.start(l.component(fields))
	if err != nil {
		l.t.Fatal(err)
	}
	l.running[ch] = true
	return ch
}

// end waits for the next end of a child.
func (l *testLauncher) end() childEnd {
	l.t.Helper()
	select {
	case end := <-l.exits:
		delete(l.running, end.child)
		return end
	case <-time.After(patience):
		l.t.Fatal("no process ends")
		return childEnd{}
	}
}

func TestLauncher_GroupEndsWithItsLeader(t *testing.T) {
	t.Parallel()
	path, gone := fifo(t)
	l := newTestLauncher(t)
	// The member ignores SIGTERM and holds neither of the pipes.
	l.run(sh("a", "(trap '' TERM; exec 3>"+path+" >/dev/null 2>&1; touch "+path+".up; exec sleep 1000) & until [ -e "+path+".up ]; do sleep 0.01; done; exit 3", nil))
	if end := l.end(); end.status.ExitStatus() != 3 {
		t.Errorf("it ended with %s", describeExit(end.status))
	}
	waitGone(t, gone)
}

func TestLauncher_KillReachesTheGroup(t *testing.T) {
	t.Parallel()
	path, gone := fifo(t)
	l := newTestLauncher(t)
	ch := l.run(sh("a", "trap '' TERM; (exec 3>"+path+"; echo up; sleep 1000) & wait; wait", nil))
	waitForText(t, l.rec, "a/stdout", "up")
	l.signal(ch, syscall.SIGKILL)
	if end := l.end(); end.status.Signal() != syscall.SIGKILL {
		t.Errorf("it ended with %s", describeExit(end.status))
	}
	waitGone(t, gone)
}

func TestLauncher_MemberOfTheGroupIsHeardWhileStopping(t *testing.T) {
	t.Parallel()
	l := newTestLauncher(t)
	// The leader dies of SIGTERM at once, the member says something first.
	ch := l.run(sh("a", "(trap 'sleep 0.2; echo flushed; exit' TERM; echo up; while :; do sleep 0.05; done) & exec sleep 1000", nil))
	waitForText(t, l.rec, "a/stdout", "up")
	l.signal(ch, syscall.SIGTERM)
	l.end()
	if got := l.rec.text("a/stdout"); got != "up\nflushed\n" {
		t.Errorf("output %q, want up and flushed", got)
	}
}

func TestLauncher_DaemonThatHoldsThePipeHoldsNothingUp(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/usr/bin/setsid"); err != nil {
		t.Skip("needs setsid of util-linux")
	}
	path, gone := fifo(t)
	l := newTestLauncher(t)
	l.run(sh("a", "setsid sh -c 'exec 3>"+path+"; touch "+path+".up; exec sleep 1000' & yes 0123456789 | head -n 5000; until [ -e "+path+".up ]; do sleep 0.01; done; printf last", nil))
	if end := l.end(); end.status != 0 || end.lost {
		t.Errorf("it ended with %s, output lost: %t", describeExit(end.status), end.lost)
	}
	if got, want := l.rec.text("a/stdout"), strings.Repeat("0123456789\n", 5000)+"last\n"; got != want {
		t.Errorf("output of %d bytes, want %d", len(got), len(want))
	}
	l.endStrays("a")
	waitGone(t, gone)
}

func TestLauncher_OutputOfAComponentBlocks(t *testing.T) {
	t.Parallel()
	l := newTestLauncher(t)
	l.run(sh("a", "sed -n 's/^flags:.*\\(.\\)....$/\\1/p' /proc/self/fdinfo/1 /proc/self/fdinfo/2", nil))
	l.end()
	// The fifth octal digit from the right is O_NONBLOCK's (04000) neighbourhood.
	for _, digit := range strings.Fields(l.rec.text("a/stdout")) {
		if strings.ContainsAny(digit, "4567") {
			t.Errorf("O_NONBLOCK is set on a component's output: %q", l.rec.text("a/stdout"))
		}
	}
}

// environment starts a component that prints its environment, and returns that.
func (l *testLauncher) environment(id string, more map[string]any) map[string]string {
	l.t.Helper()
	fields := map[string]any{"id": id, "command": []string{"env"}, "register": false}
	maps.Copy(fields, more)
	l.run(fields)
	l.end()
	return parseEnv(strings.Split(l.rec.text(id+"/stdout"), "\n"))
}

func parseEnv(entries []string) map[string]string {
	out := make(map[string]string)
	for _, entry := range entries {
		if name, value, ok := strings.Cut(entry, "="); ok {
			out[name] = value
		}
	}
	return out
}

func TestLauncher_Environment(t *testing.T) {
	t.Setenv("FROM_OUTSIDE", "yes")
	t.Setenv("COMPONENT_ID", "of the user's own")
	l := newTestLauncher(t)
	secret := writeFile(t, filepath.Join(t.TempDir(), "secret"), "hush\n")
	port, err := l.healthPort(l.component(sh("plain", "", nil)))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		id     string
		fields map[string]any
		want   map[string]string
	}{
		{"plain", nil, map[string]string{
			"ENABLE_FLOWCTL": "true", "FLOWCTL_ENABLED": "true", "FLOWCTL_ENDPOINT": "127.0.0.1:1", "FLOWCTL_HEARTBEAT_INTERVAL": "10000ms",
			"FLOWCTL_COMPONENT_ID": "plain", "FLOWCTL_SERVICE_ID": "plain", "COMPONENT_ID": "plain", "SERVICE_ID": "plain", "FLOWCTL_RUN": l.mark,
			"HEALTH_PORT": port, "HEALTH_ENDPOINT": "http://localhost:" + port + "/health", "FROM_OUTSIDE": "yes",
		}},
		{"own", map[string]any{
			"env":       map[string]string{"HEALTH_PORT": "8088", "COMPONENT_ID": "mine", "FLOWCTL_HEARTBEAT_INTERVAL": "2s", "BOTH": "env"},
			"config":    map[string]any{"retries": 3, "both": "config"},
			"env_files": map[string]string{"TOKEN": secret},
		}, map[string]string{
			"HEALTH_PORT": "8088", "HEALTH_ENDPOINT": "http://localhost:8088/health", "COMPONENT_ID": "mine", "SERVICE_ID": "own",
			"FLOWCTL_COMPONENT_ID": "own", "FLOWCTL_HEARTBEAT_INTERVAL": "2s", "RETRIES": "3", "BOTH": "env", "TOKEN": "hush",
		}},
	} {
		got := l.environment(tt.id, tt.fields)
		for name, want := range tt.want {
			if got[name] != want {
				t.Errorf("%s: %s=%q, want %q", tt.id, name, got[name], want)
			}
		}
	}
	if got := parseEnv(l.commandEnv()); got["COMPONENT_ID"] != "of the user's own" || got["FLOWCTL_COMPONENT_ID"] != "" {
		t.Errorf("the command after -- has %q", got)
	}
}

// What is told to flowctl alone is not passed on; what only looks like that is.
func TestLauncher_WordsToFlowctlAreNotPassedOn(t *testing.T) {
	own := []string{
		"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID",
		"FLOWCTL_TLS_CA", "FLOWCTL_TLS_CERT", "FLOWCTL_TLS_KEY",
	}
	for _, name := range own {
		t.Setenv(name, "1")
	}
	t.Setenv("JOURNAL_STREAM", "8:1")
	t.Setenv("LISTEN_ADDR", ":80")
	t.Setenv("WATCHDOG_MODE", "loud")
	t.Setenv("FLOWCTL_TLS_HOME", "/tls")
	l := newTestLauncher(t)
	for who, got := range map[string]map[string]string{"component": l.environment("a", nil), "command": parseEnv(l.commandEnv())} {
		for _, name := range own {
			if value, ok := got[name]; ok {
				t.Errorf("%s: %s=%q is passed on", who, name, value)
			}
		}
		for name, want := range map[string]string{"LISTEN_ADDR": ":80", "WATCHDOG_MODE": "loud", "FLOWCTL_TLS_HOME": "/tls"} {
			if got[name] != want {
				t.Errorf("%s: %s=%q, want %q", who, name, got[name], want)
			}
		}
		// Only the command has flowctl's standard error.
		if _, ok := got["JOURNAL_STREAM"]; ok != (who == "command") {
			t.Errorf("%s: JOURNAL_STREAM is passed on: %t", who, ok)
		}
	}
}

func TestReadEnvFile(t *testing.T) {
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

// A port is one component's alone, and refuses clients until that listens.
func TestLauncher_PortIsHeldUntilItsComponentStarts(t *testing.T) {
	t.Parallel()
	l := newTestLauncher(t)
	var ports []string
	for _, id := range []string{"a", "b"} {
		c := l.component(sh(id, forever, nil))
		port, err := l.healthPort(c)
		if again, _ := l.healthPort(c); err != nil || again != port || slices.Contains(ports, port) {
			t.Fatalf("port %s, then %s, beside %q: %v", port, again, ports, err)
		}
		ports = append(ports, port)
	}
	l.run(sh("a", forever, nil))
	for i, held := range []bool{false, true} {
		if conn, err := net.Dial("tcp", "127.0.0.1:"+ports[i]); err == nil {
			conn.Close()
			t.Errorf("port %s: a client gets through before its component listens", ports[i])
		}
		lis, err := net.Listen("tcp", "127.0.0.1:"+ports[i])
		if err == nil {
			lis.Close()
		}
		if (err != nil) != held {
			t.Errorf("port %s: held is %t, want %t: %v", ports[i], err != nil, held, err)
		}
	}
}

func TestTail_KeepsTheLastLines(t *testing.T) {
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

func TestPump_EmitsWholeLines(t *testing.T) {
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
	out := newConsole(io.Discard.Write, formatText, false, []string{"a"})
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	c := &child{drained: make(chan struct{})}
	c.pumping.Store(1)
	go c.pump("a", "stdout", r, out.lines, nil)
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

var endings = []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGKILL}

const forever = "exec sleep 1000"

// waitForText waits until the recorder has text. It polls: the pump tells nobody.
func waitForText(t testing.TB, rec *recorder, key, text string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(rec.text(key), text); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has %q, want %q in it", key, rec.text(key), text)
		}
	}
}

// headlessVar makes this test binary a process whose main thread has ended: ps shows a
// zombie, and it lives. It holds the FIFO that the variable names.
const headlessVar = "TEST_COMPONENT_HEADLESS"

// init runs on the main thread, as nothing after it does for sure.
func init() {
	path := os.Getenv(headlessVar)
	if path == "" {
		return
	}
	ready := make(chan bool)
	go func() {
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
		if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
			close(ready)
			fmt.Println("headless")
			time.Sleep(time.Hour)
			f.Close()
		}
	}()
	<-ready
	_, _, _ = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
}
