// That nothing outlives flowctl, whatever a component does to get away.

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// init makes this test binary a bomb when its first argument says so: it forks until the limit
// of processes, and again when another has ended, each in a session of its own. It ends after
// 30 seconds.
func init() {
	if len(os.Args) < 2 || os.Args[1] != "bomb" {
		return
	}
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	runtime.LockOSThread()
	var now syscall.Timespec
	pause := syscall.NsecToTimespec(int64(time.Millisecond))
	clock := func() int64 {
		_, _, _ = syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, 1, uintptr(unsafe.Pointer(&now)), 0)
		return now.Sec
	}
	for end := clock() + 30; clock() < end; { // without the runtime, of which a child of fork has nothing
		switch pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0); {
		case errno != 0:
			_, _, _ = syscall.RawSyscall(syscall.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
		case pid == 0:
			_, _, _ = syscall.RawSyscall(syscall.SYS_SETSID, 0, 0, 0)
		}
	}
	syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
}

// bombed runs a bomb as a user who may have no more than 100 processes, and returns when it
// has so many.
func bombed(t *testing.T) (*process, herd) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs a user without other processes")
	}
	h := newHerd()
	bomb := Component{ID: "a", Command: []string{publicProgram(t), "bomb", string(h)}, Register: new(false), StopTimeout: Duration(500 * time.Millisecond)}
	uid := 300_000 + int(herds.Load())<<16 + os.Getpid()
	p := start(t, runArgs(publicPipeline(t, bomb)), withBinary(plainFlowctl()), limited("-u 100 2>/dev/null || ulimit -p 100"), asNobody(uid))
	p.waitReady()
	h.await(p, 50)
	return p, h
}

// What forks whenever another has ended cannot be killed one by one.
func TestRun_EndsWhatForksAtItsLimit(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			p, h := bombed(t)
			began := time.Now()
			p.signal(sig)
			if sig == syscall.SIGTERM {
				p.exit(exitOK)
			}
			h.gone(p, map[syscall.Signal]time.Duration{syscall.SIGKILL: 10 * time.Second}[sig])
			p.hasNot(p.stderr, "the guard was killed") // it had its threads before
			t.Logf("after %s", time.Since(began))
		})
	}
}

// What even SIGKILL does not end is told, with its pid, and is no success.
func TestRun_TellsWhatOutlivesIt(t *testing.T) {
	t.Parallel()
	setpriv, err := exec.LookPath("setpriv")
	if os.Getuid() != 0 || err != nil {
		t.Skip("needs root, and setpriv of util-linux")
	}
	root := filepath.Join(publicDir(t), "root")
	if out, err := exec.Command("cp", setpriv, root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Chmod(root, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	h := newHerd()
	a := shell("a", h.script(`setsid `+root+` --reuid=0 --clear-groups sleep T & exec sleep 300`))
	p := start(t, runArgs(publicPipeline(t, a)), asNobody(65529))
	p.waitReady()
	var pid int
	eventually(t, "a process of root's", func() bool {
		for of, line := range h.living() {
			if status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", of)); strings.HasPrefix(line, "sleep") && strings.Contains(string(status), "\nUid:\t0\t0\t") {
				pid = of
			}
		}
		return pid != 0
	})
	defer h.signal(pid, syscall.SIGKILL)
	p.signal(syscall.SIGTERM)
	p.exit(exitFailed)
	p.has(p.stderr, fmt.Sprintf("flowctl: still running after SIGKILL: %d (sleep)\n", pid))
	h.signal(pid, syscall.SIGKILL)
}

// What left its component is known by its control group although it emptied its environment. What
// another component has left in the same way lives on.
func TestRestart_EndsWhatHidBefore(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	hidden, beside, h := newHerd(), newHerd(), newHerd()
	a := shell("a", hidden.script(`[ -e up ] || env -i setsid sh -c "touch up; sleep T & exec sleep T" & until [ -e up ]; do sleep 0.02; done; exec sleep `)+string(h))
	a.WorkingDir, a.RestartPolicy = t.TempDir(), "always"
	p := launch(t, writePipeline(t, a, shell("b", beside.script(`env -i setsid sleep T & exec sleep T`))))
	p.waitReady()
	hidden.asleep(t, 2)
	beside.asleep(t, 2)
	h.asleep(t, 1)
	p.tell("a", syscall.SIGKILL)
	p.waitErr(`msg="ending what left its process group" component=a `)
	eventually(t, "the end of what a has left", func() bool { return len(hidden.living()) == 0 })
	p.wait(p.stderr, "msg=ready component=a ", 2)
	h.asleep(t, 1)
	if left := beside.living(); len(left) != 2 {
		t.Errorf("of b there is %v\n%s", left, p)
	}
	p.tell("a", syscall.SIGKILL) // what is started into a control group that was killed lives
	p.wait(p.stderr, "msg=ready component=a ", 3)
	h.asleep(t, 1)
	p.stop()
	beside.gone(p, 0)
	p.hasNot(p.stderr, "cannot be told")
}

// asleep waits until n of the herd are sleep(1), which their command lines are at last.
func (h herd) asleep(t *testing.T, n int) (pids []int) {
	t.Helper()
	eventually(t, fmt.Sprint(n, " processes"), func() bool {
		pids = nil
		for pid, line := range h.living() {
			if strings.HasPrefix(line, "sleep ") {
				pids = append(pids, pid)
			}
		}
		return len(pids) == n
	})
	return pids
}

// A worker that left its session and emptied its environment, and which nothing but its output or a look below its component
// tells of without a control group, is asked to end in the turn of its component, although an older one runs.
func TestStop_AHiddenWorkerInTheTurnOfItsComponent(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	for name, hides := range map[string]string{"by its output": `(env -i setsid WORKER &);`, "by a look": `env -i setsid WORKER >/dev/null 2>&1 &`} {
		for user, options := range map[string][]option{"root": nil, "another user": {asNobody(65522)}} {
			t.Run(name+"/"+user, func(t *testing.T) {
				t.Parallel()
				journal := writeFile(t, filepath.Join(publicDir(t), "journal"), "")
				must(t, os.Chmod(journal, 0o666))
				worker := `sh -c 'trap "echo worker asked >>` + journal + `; exit 0" TERM; echo worker up >>` + journal + `; sleep 300 & wait'`
				a := shell("a", strings.ReplaceAll(hides, "WORKER", worker)+` exec sleep 300`)
				b := shell("b", `trap 'echo b asked >>`+journal+`; exit 0' TERM; sleep 300 & wait`)
				a.DependsOn, a.RestartPolicy = []string{"b"}, "always"
				file := publicPipeline(t, a, b)
				p := start(t, runArgs(file), options...)
				want := "worker up\n"
				await := func(more string) {
					t.Helper()
					want += more
					eventually(t, fmt.Sprintf("%q in the journal", want), func() bool { return string(get(os.ReadFile(journal))(t)) == want })
				}
				ask := func(args ...string) {
					t.Helper()
					sameUser := func(q *process) { q.cmd.SysProcAttr.Credential = p.cmd.SysProcAttr.Credential }
					if code, _, stderr := start(t, args, beside(p), sameUser).finish(); code != exitOK {
						t.Fatalf("%s: exit %d: %s\n%s", args, code, stderr, p)
					}
				}
				change := func(components ...Component) {
					t.Helper()
					must(t, os.WriteFile(file, get(os.ReadFile(writePipeline(t, components...)))(t), 0o600))
					ask("reload", "-pipeline", "test")
				}
				p.waitReady()
				await("")
				ask("restart", "-pipeline", "test", "a")
				await("worker asked\nworker up\n")
				if name == "by its output" {
					p.tell("a", syscall.SIGKILL)
					await("worker asked\nworker up\n")
				}
				change(b)
				await("worker asked\n")
				change(a, b)
				await("worker up\n")
				p.stop()
				await("worker asked\nb asked\n")
				p.hasNot(p.stderr, "cannot be told", "ending what left its component")
			})
		}
	}
}

// For a component that crashes flowctl knows such a worker by the guard, which has looked before.
func TestGuard_TellsWhatLeftItsSession(t *testing.T) {
	t.Parallel()
	l, h := newTestLauncher(t), newHerd()
	l.run(map[string]any{"id": "a", "command": []string{"sh", "-c", h.script("env -i setsid sleep T >/dev/null 2>&1 & wait; exec sleep 300")}})
	worker, ok := readProcess(h.asleep(t, 1)[0])
	defer h.signal(worker.pid, syscall.SIGKILL)
	eventually(t, "a note of the worker", func() bool { return ok && l.config.reaper.leftBy(worker) == "a" })
	h.signal(worker.pid, syscall.SIGKILL)
	eventually(t, "its end, noted", func() bool { return l.config.reaper.leftBy(worker) == "" })
}

// Without a control group, what has emptied its environment and left its session is ended with its component if nothing else can have started it,
// and else with the run.
func TestRestart_DoubtIsTold(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	for _, alone := range []bool{true, false} {
		t.Run(fmt.Sprint("alone ", alone), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			// It leaves its session when it is an orphan, and holds no output open: nothing tells whose it is.
			a := shell("a", h.script(`sh -c 'env -i sh -c "while kill -0 $$; do sleep 0.02; done; exec setsid sleep T" >/dev/null 2>&1 &'; exec sleep 300`))
			a.RestartPolicy = "always"
			components := []Component{a}
			if !alone {
				components[0].DependsOn = []string{"b"}
				components = append(components, shell("b", "exec sleep 300"))
			}
			p := start(t, runArgs(publicPipeline(t, components...)), asNobody(65527))
			p.waitReady()
			first := h.asleep(t, 1)[0]
			p.tell("a", syscall.SIGKILL)
			if alone {
				p.waitErr(fmt.Sprintf(`msg="ending what left its process group" component=a processes="%d (sleep)"`, first))
				eventually(t, "its end", func() bool { return h.living()[first] == "" })
			} else {
				p.waitErr(fmt.Sprintf(`msg="which component has left a process cannot be told: it is ended with the run" ended=a process="%d (sleep)"`, first))
			}
			p.wait(p.stderr, "msg=ready component=a ", 2)
			if lives := h.living()[first] != ""; lives == alone {
				t.Errorf("it lives: %t\n%s", lives, p)
			}
			p.stop()
			h.gone(p, 0)
		})
	}
}

// A guard that is stopped is no guard.
func TestGuard_StoppedIsContinued(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t, shell("a", h.script(daemons+` & exec sleep T`))))
	p.waitReady()
	h.await(p, 3)
	must(t, syscall.Kill(guardOf(p), syscall.SIGSTOP))
	p.waitErr(`msg="the guard is silent: it is continued`)
	h.end(p, syscall.SIGKILL)
	p.hasNot(p.stderr, "the guard was killed")
}

// A flowctl that was stopped for longer takes its guard for none that is silent.
func TestGuard_IsNotSilentWhileFlowctlIsStopped(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, shell("a", `exec sleep 300`)))
	p.waitReady()
	guard := guardOf(p)
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT} {
		for _, pid := range []int{guard, p.cmd.Process.Pid} {
			if err := syscall.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep((guardSilence + 2) * guardInterval) // longer than a guard may be silent
	}
	p.stop()
	p.hasNot(p.stderr, "the guard is silent")
}

// Without a guard a component's first process ends with flowctl all the same.
func TestGuard_StoppedAndFlowctlKilled(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t, shell("a", h.script(daemons+` & exec sleep T`)), shell("b", `exec sleep 300`)))
	p.waitReady()
	h.await(p, 3)
	guard, leaders := guardOf(p), []int{handle(t, p.pid("a")), handle(t, p.pid("b"))}
	if err := syscall.Kill(guard, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p.signal(syscall.SIGKILL)
	if _, ok := ends(t, killGrace(), leaders...); !ok {
		t.Error("a component lives")
	}
	if err := syscall.Kill(guard, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	h.gone(p, killGrace())
}

// A component's identity ends with its own process, not with that of a check of it.
func TestLauncher_NoCheckIsALeader(t *testing.T) {
	t.Parallel()
	l := newTestLauncher(t)
	ch := l.run(map[string]any{"id": "a", "command": []string{"sleep", "300"}})
	ctx, cancel := context.WithCancel(t.Context())
	var checks sync.WaitGroup
	for range 8 {
		checks.Go(func() {
			other := &child{component: ch.component, launcher: ch.launcher, cmd: ch.cmd} // a child has one check at a time
			_, _, _ = other.run(ctx, []string{"sleep", "300"})
			other.endBeside(ctx)
		})
	}
	eventually(t, "checks", func() bool { return len(l.leaders()) == 9 })
	for range 100 {
		if got := l.leaderOf("a"); got != ch.pid {
			t.Fatalf("the leader is %d, want %d", got, ch.pid)
		}
	}
	cancel()
	checks.Wait()
}

// What a component has besides its first process gets the stop signal, too, in its turn, with the time
// that is left, and what it prints then is passed on.
func TestStop_TheWholeTreeOfAComponent(t *testing.T) {
	t.Parallel()
	worker := func(name, takes string) string {
		return `sh -c 'trap "echo ` + name + ` ends; sleep ` + takes + `; echo ` + name + ` has ended; exit 0" TERM; echo ` + name + ` up; while :; do sleep 0.02; done'`
	}
	a := shell("a", "setsid "+worker("away", "0.5")+" & "+worker("beside", "0.3")+" & trap 'exit 0' TERM; while :; do sleep 0.02; done")
	b := shell("b", "trap 'echo told; exit 0' TERM; while :; do sleep 0.02; done")
	a.DependsOn = []string{"b"}
	p := launch(t, writePipeline(t, a, b))
	p.waitOut("away up")
	p.waitOut("beside up")
	p.waitReady()
	p.stop()
	p.has(p.stdout, "a | away ends\n", "a | away has ended\n", "b | told\n")
	p.has(p.stdout, "a | beside has ended\n", "b | told\n")
	p.hasNot(p.stderr, "SIGKILL")

	// What does not end in time gets SIGKILL when the component's time is over.
	a = shell("a", `setsid sh -c 'trap "" TERM; echo deaf; while :; do sleep 0.02; done' & trap 'exit 0' TERM; while :; do sleep 0.02; done`)
	p = launch(t, writePipeline(t, a), "-stop-timeout", "1s")
	p.waitOut("deaf")
	p.waitReady()
	p.stop()
	p.has(p.stderr, `msg="ending what left its process group" component=a `, "msg=ended component=a ", `msg="all components have ended"`)
}

// What a component leaves that ends by itself gets the stop signal and a second.
func TestExit_WhatIsLeftIsAskedFirst(t *testing.T) {
	t.Parallel()
	up := filepath.Join(t.TempDir(), "up")
	must(t, syscall.Mkfifo(up, 0o600))
	left := `sh -c 'trap "echo $0 asked; exit 0" TERM; echo $0 up >` + up + `; while :; do sleep 0.02; done' `
	a := shell("a", "exec 3<>"+up+"; "+left+"sibling & setsid "+left+"daemon & read one <&3; read other <&3; exit 3")
	a.RestartPolicy, a.MaxRestarts = "on-failure", 1
	p := launch(t, writePipeline(t, a))
	p.exit(exitFailed)
	for _, who := range []string{"sibling", "daemon"} {
		if got := strings.Count(p.stdout.String(), "a | "+who+" asked\n"); got != 2 {
			t.Errorf("%s was asked %d times, want at each of 2 ends\n%s", who, got, p)
		}
	}

	begun := time.Now()
	p = launch(t, writePipeline(t, shell("a", `trap '' TERM; sleep 300 & sleep 0.3; exit 3`)))
	p.exit(exitFailed)
	if took := time.Since(begun); took > patience/2 {
		t.Errorf("it took %s", took)
	}
}

// A check is judged when it ends, whoever holds its output open, and what it leaves is asked to end.
func TestHealthCheck_IsJudgedWhenItEnds(t *testing.T) {
	t.Parallel()
	mark := filepath.Join(t.TempDir(), "asked")
	check := writeProgram(t, filepath.Join(t.TempDir(), "check"), `#!/bin/sh
setsid sleep 300 &
mkfifo "$0.$$"
sh -c 'trap "echo asked >>'`+mark+`'; exit 0" TERM; echo up >"$0"; while :; do sleep 0.02; done' "$0.$$" &
read up <"$0.$$"
echo it is well
exit $CODE
`)
	a := shell("a", "exec sleep 300")
	a.Env = map[string]string{"CODE": "0"}
	a.HealthCheck, a.HealthInterval, a.HealthTimeout = "exec:"+check, Duration(200*time.Millisecond), Duration(800*time.Millisecond)
	p := launch(t, writePipeline(t, a))
	p.waitReady()
	eventually(t, "what the check leaves", func() bool { _, err := os.Stat(mark); return err == nil })
	p.stop()
	p.hasNot(p.stderr, "no answer within")

	a.Env["CODE"] = "5"
	p = launch(t, writePipeline(t, a), "-start-timeout", "2s")
	p.exit(exitNotReady)
	p.has(p.stderr, "exit status 5: it is well")
}

// On a busy machine a component can call before flowctl has noted that it was started: it is known all the same.
func TestIdentifier_WaitsForAStart(t *testing.T) {
	t.Parallel()
	l := newTestLauncher(t)
	reaper := l.config.reaper
	reaper.starting.Lock() // as startLeader has it
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		reaper.leaderEnded(cmd.Process.Pid)
	})
	from := make(chan origin)
	go func() {
		o, _ := newIdentifier(l.launcher, l.config.log).originOf(cmd.Process.Pid)
		from <- o
	}()
	select {
	case o := <-from:
		reaper.starting.Unlock()
		t.Fatalf("it is %+v before its start is over", o)
	case <-time.After(100 * time.Millisecond):
	}
	reaper.mu.Lock()
	reaper.known[cmd.Process.Pid] = started{id: "a"}
	reaper.mu.Unlock()
	reaper.starting.Unlock()
	if o := <-from; o.component != "a" || o.leader != cmd.Process.Pid {
		t.Errorf("it is %+v", o)
	}
}
