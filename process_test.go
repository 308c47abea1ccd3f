//go:build linux

package main

import (
	"fmt"
	"log/slog"
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
	for _, sig := range []syscall.Signal{syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGBUS} {
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
				h.signal(pid, syscall.SIGSTOP)
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
	flowctlProgram() // building it is not to be measured
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

// What a member of the group says when the leader has died of the stop signal is heard.
func TestRun_MemberOfTheGroupIsHeardWhileStopping(t *testing.T) {
	t.Parallel()
	c := shell("a", "(trap 'sleep 0.2; echo flushed; exit' TERM; echo up; while :; do sleep 0.05; done) & exec sleep 1000")
	c.StopTimeout = Duration(patience)
	p := launch(t, writePipeline(t, c))
	p.waitOut("a | up\n")
	p.stop()
	p.has(p.stdout, "a | flushed\n")
}

func TestRun_OutputOfAComponentBlocks(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, shell("a", `sed -n 's/^flags:\t//p' /proc/self/fdinfo/1 /proc/self/fdinfo/2`)))
	p.exit(exitOK)
	for i := range 2 {
		if flags, err := strconv.ParseUint(p.lines("a")[i], 8, 64); err != nil || flags&syscall.O_NONBLOCK != 0 {
			t.Errorf("O_NONBLOCK is set on a component's output: %o, %v", flags, err)
		}
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
		line := procFile(pid, "cmdline")
		if procFile(pid, "comm") == "flowctl\n" || strings.Contains(line, "flowctl") { // pkill, killall, pidof, pkill -f
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
	guardPID := func() int {
		l.config.guard.mu.Lock()
		defer l.config.guard.mu.Unlock()
		return l.config.guard.cmd.Process.Pid
	}
	old := guardPID()
	if err := syscall.Kill(old, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	l.run(comp("a", sleeping))
	told := make(chan struct{})
	go func() {
		defer close(told)
		for range 10_000 { // more than the pipe holds
			l.config.guard.tell("started", os.Getpid())
			l.config.guard.tell("ended", os.Getpid())
		}
	}()
	select {
	case <-told:
	case <-time.After(patience):
		t.Fatal("telling the guard waits for it to read")
	}
	eventually(t, "another guard", func() bool { return guardPID() != old })
}

// A component may be a flowctl: it and its guard answer for what it runs.
func TestRun_AsAComponent(t *testing.T) {
	t.Parallel()
	nest := func(t *testing.T, policy string) (p *process, outer, inner herd, pid int) {
		outer, inner = newHerd(), newHerd()
		file := writePipeline(t, shell("leaf", inner.script(daemons+` & exec sleep T`)))
		nested := Component{ID: "nested", Command: []string{flowctlProgram(), "run", file, "-control-plane-port", "0", "-stop-timeout", "500ms"}, Register: new(false), RestartPolicy: policy}
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
			c := actor("a", role{})
			c.Register = new(false)
			c.Env[headlessVar] = "1"
			c.Command = append([]string{"setsid", "-w"}, c.Command...) // in a session of its own, below a/sh
			p := launch(t, writePipeline(t, c), "-stop-timeout", "500ms")
			p.waitOut("a | headless ")
			pid, err := strconv.Atoi(strings.TrimPrefix(p.lines("a")[0], "headless "))
			if err != nil {
				t.Fatal(err)
			}
			headless := handle(t, pid)
			p.signal(sig)
			<-p.done
			if _, ok := ends(t, killGrace(), headless); !ok {
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

// testLauncher is a launcher without a run.
type testLauncher struct {
	*launcher
	t       testing.TB
	running map[*child]bool
}

// newTestLauncher returns a launcher. What still runs at the end of the test is killed and
// waited for.
func newTestLauncher(t testing.TB) *testLauncher {
	t.Helper()
	l := &testLauncher{t: t, running: make(map[*child]bool)}
	log, children := slog.New(slog.NewTextHandler(t.Output(), nil)), newReaper()
	guard, err := startGuard(children, log)
	if err != nil {
		t.Fatal(err)
	}
	l.launcher = newLauncher(launchConfig{
		endpoint: "127.0.0.1:1", heartbeat: 10 * time.Second, reaper: children, guard: guard,
		emit: func(string, string, []byte, int) {}, log: log,
	})
	t.Cleanup(func() {
		for ch := range l.running {
			l.signal(ch, syscall.SIGKILL)
		}
		for len(l.running) > 0 {
			l.end()
		}
		l.config.guard.dismiss() // not close, which ends all descendants, those of other tests too
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

// What has open who starts flowctl is not passed on to components, to their checks and to the guard. The
// command after -- has it under the same numbers.
func TestRun_DescriptorsOfTheCaller(t *testing.T) {
	t.Parallel()
	theirs := writeFile(t, filepath.Join(t.TempDir(), "theirs"), "from the caller\n")
	a := shell("a", `for fd in 7 9; do test ! -e /proc/self/fd/$fd || exit 1; done; exec sleep 300`)
	a.HealthCheck = "exec:sh -c '! test -e /proc/self/fd/7 && ! test -e /proc/self/fd/9'"
	p := start(t, runArgs(writePipeline(t, a), "--", "sh", "-c", "cat <&7; readlink /proc/self/fd/9; ls /proc/self/fd; exec sleep 300"),
		afterCommand("exec 7<"+theirs+" 9>>"+theirs+" &&"))
	p.waitOut("\n9\n")
	p.has(p.stdout, "from the caller\n", theirs+"\n0\n", "\n7\n")
	for _, fd := range []int{7, 9} {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", guardOf(p), fd)); err == nil && to == theirs {
			t.Errorf("the guard has descriptor %d of the caller", fd)
		}
	}
	p.signal(syscall.SIGTERM)
	p.exit(128 + int(syscall.SIGTERM))
}

// Each start of a component tells its number, and all tell the one run.
func TestRestart_IsCounted(t *testing.T) {
	t.Parallel()
	a := shell("a", `echo "attempt $FLOWCTL_ATTEMPT of $FLOWCTL_RUN_ID"; test "$FLOWCTL_ATTEMPT" = 2`)
	a.RestartPolicy = "on-failure"
	p := launch(t, writePipeline(t, a, shell("b", `echo "attempt $FLOWCTL_ATTEMPT of $FLOWCTL_RUN_ID"`)))
	p.exit(exitOK)
	first := p.lines("b")[0]
	wantEqual(t, "a", p.lines("a"), []string{first, strings.Replace(first, "attempt 1", "attempt 2", 1)})
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
		path := writeFile(t, filepath.Join(t.TempDir(), "value"), tt.content)
		got, err := readVariable(path)
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
		c := l.component(comp(id, sleeping))
		port, err := l.healthPort(c)
		if again, _ := l.healthPort(c); err != nil || again != port || slices.Contains(ports, port) {
			t.Fatalf("port %s, then %s, beside %q: %v", port, again, ports, err)
		}
		ports = append(ports, port)
	}
	l.run(comp("a", sleeping))
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

var endings = []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGKILL}

// sleeping is a command for comp.
var sleeping = map[string]any{"command": []string{"sleep", "1000"}}

// headlessVar makes this test binary a process whose main thread has ended: ps shows a
// zombie, and it lives.
const headlessVar = "TEST_COMPONENT_HEADLESS"

// init runs on the main thread, as nothing after it does for sure.
func init() {
	if os.Getenv(headlessVar) == "" {
		return
	}
	ready := make(chan bool)
	go func() {
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
		close(ready)
		fmt.Println("headless", os.Getpid())
		time.Sleep(time.Hour)
	}()
	<-ready
	_, _, _ = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
}
