//go:build linux

package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The tests of this file are about what flowctl leaves behind, which is nothing, and
// what it loses of its components' output, which is nothing either. Processes are
// told by a token in their command lines: flowctl knows nothing of it.

// afterlife is how long the processes of a run may outlive a flowctl that was killed,
// and twice that with the race detector, which makes the guard several times slower.
var afterlife = sync.OnceValue(func() time.Duration {
	if raceEnabled() {
		return 4 * time.Second
	}
	return 2 * time.Second
})

// A herd is the token of the processes of one test. It serves sleep(1) as a number.
type herd string

var herds atomic.Int64

func newHerd() herd {
	return herd(fmt.Sprintf("3600.%07d%05d", os.Getpid(), herds.Add(1)))
}

// script puts the token in the place of each T.
func (h herd) script(text string) string {
	return regexp.MustCompile(`\bT\b`).ReplaceAllString(text, string(h))
}

// living returns the processes of the herd with their command lines.
func (h herd) living() map[int]string {
	found := make(map[int]string)
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		line, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if bytes.Contains(line, []byte(h)) {
			found[pid] = string(bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
		}
	}
	return found
}

// signal signals a process if it still is one of the herd.
func (h herd) signal(pid int, sig syscall.Signal) {
	process, err := os.FindProcess(pid) // by a pidfd, which cannot come to mean another process
	if err != nil {
		return
	}
	defer process.Release()
	if line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); bytes.Contains(line, []byte(h)) {
		_ = process.Signal(sig)
	}
}

// await waits until n processes of the herd live. Nobody tells us of those.
func (h herd) await(p *process, n int) map[int]string {
	p.tb.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		living := h.living()
		if len(living) >= n {
			return living
		}
		if time.Now().After(deadline) {
			p.tb.Fatalf("%d processes live, want %d: %v\n%s", len(living), n, living, p)
		}
	}
}

// gone wants the herd to be gone so long after flowctl's end. What is left is killed.
func (h herd) gone(p *process, within time.Duration) {
	p.tb.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.tb.Fatalf("flowctl still runs\n%s", p)
	}
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		living := h.living()
		if len(living) == 0 {
			p.awaitGuard()
			return
		}
		if time.Now().After(deadline) {
			p.tb.Errorf("%s after the end of flowctl these live: %v\n%s", within, living, p)
			for pid := range living {
				h.signal(pid, syscall.SIGKILL)
			}
			return
		}
	}
}

// awaitGuard gives the guard of a flowctl that was killed the time that it has to end;
// that it has ended is checked at the end of each test.
func (p *process) awaitGuard() {
	for deadline := time.Now().Add(afterlife()); len(marked(p.mark)) > 0 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
	}
}

// eventually waits for something that nobody tells of.
func eventually(tb testing.TB, what string, done func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("in vain waited for: %s", what)
		}
	}
}

// childrenOf returns the children of a process that live, and how many do not.
func childrenOf(pid int) (living []int, zombies int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		_, rest, found := bytes.Cut(data, []byte(") "))
		fields := strings.Fields(string(rest))
		if err != nil || !found || len(fields) < 2 || fields[1] != strconv.Itoa(pid) {
			continue
		}
		if child, err := strconv.Atoi(e.Name()); err == nil && fields[0] != "Z" {
			living = append(living, child)
		} else if err == nil {
			zombies++
		}
	}
	return living, zombies
}

// guardOf returns the process that flowctl runs beside its components, which takes
// its name as soon as it ignores signals.
func guardOf(p *process) int {
	p.tb.Helper()
	var guard int
	eventually(p.tb, "a guard", func() bool {
		living, _ := childrenOf(p.cmd.Process.Pid)
		for _, pid := range living {
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) == guardName+"\n" {
				guard = pid
				return true
			}
		}
		return false
	})
	return guard
}

// handle is a pidfd: it names a process also when that is not ours, and is readable
// when the process has ended.
func handle(tb testing.TB, pid int) int {
	tb.Helper()
	const pidfdOpen = 434 // in every architecture
	fd, _, errno := syscall.Syscall(pidfdOpen, uintptr(pid), 0, 0)
	if errno != 0 {
		tb.Fatalf("pidfd_open %d: %v", pid, errno)
	}
	tb.Cleanup(func() { syscall.Close(int(fd)) })
	return int(fd)
}

// ends returns when each of the processes has ended, and whether all have in time.
func ends(tb testing.TB, within time.Duration, fds ...int) ([]time.Time, bool) {
	tb.Helper()
	ep, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	defer syscall.Close(ep)
	for i, fd := range fds {
		if err := syscall.EpollCtl(ep, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLONESHOT, Fd: int32(i)}); err != nil {
			tb.Fatal(err)
		}
	}
	times := make([]time.Time, len(fds))
	events := make([]syscall.EpollEvent, 64)
	deadline := time.Now().Add(within)
	for left := len(fds); left > 0; {
		wait := time.Until(deadline)
		if wait <= 0 {
			return times, false
		}
		n, err := syscall.EpollWait(ep, events, int(wait.Milliseconds())+1)
		if err != nil && err != syscall.EINTR {
			tb.Fatal(err)
		}
		now := time.Now()
		for _, e := range events[:max(n, 0)] {
			times[e.Fd] = now
			left--
		}
	}
	return times, true
}

// plain returns flowctl without the race detector, for what is measured.
var plain = sync.OnceValue(func() string {
	file := filepath.Join(buildFolder(), "flowctl-plain")
	if out, err := exec.Command("go", "build", "-o", file, ".").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("go build: %v\n%s", err, out))
	}
	return file
})

func withBinary(file string) option {
	return func(p *process) { p.cmd.Path, p.cmd.Args[0] = file, file }
}

func stdoutTo(w io.Writer) option { return func(p *process) { p.cmd.Stdout = w } }

// runArgs are the arguments of a run on a free port.
func runArgs(file string, more ...string) []string {
	return append([]string{"run", file, "-control-plane-port", "0"}, more...)
}

// memory returns a figure of /proc/PID/status in bytes, such as VmRSS.
func memory(tb testing.TB, pid int, key string) int {
	tb.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		tb.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + key + `:\s+(\d+) kB$`).FindSubmatch(status)
	if m == nil {
		tb.Fatalf("no %s in\n%s", key, status)
	}
	n, _ := strconv.Atoi(string(m[1]))
	return n << 10
}

var endings = []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGKILL}

// end ends flowctl by a signal and checks that nothing of the herd is left: at once
// where flowctl was asked, and soon where it was killed.
func (h herd) end(p *process, sig syscall.Signal) {
	p.tb.Helper()
	pid := guardOf(p)
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	guard := handle(p.tb, pid)
	p.signal(sig)
	within := afterlife()
	if sig != syscall.SIGKILL {
		p.exit(exitOK)
		within = 0
	}
	h.gone(p, within)
	if _, ok := ends(p.tb, afterlife(), guard); !ok {
		p.tb.Errorf("the guard outlives flowctl\n%s", p)
	}
	for arg := range strings.SplitSeq(string(line), "\x00") {
		if _, err := os.Stat(arg); err == nil && strings.HasPrefix(arg, "/sys/fs/cgroup/") {
			p.tb.Errorf("the control group %s is left\n%s", arg, p)
		}
	}
}

// daemons are a script that starts two daemons as daemon(3) would make them, which
// ignore what they can.
const daemons = `setsid sh -c 'trap "" TERM INT HUP; cd /; exec 0<&- 1>&- 2>&-; sleep T & sleep T &'`

// Whatever a component does and however flowctl ends, nothing of the run lives on.
func TestNothingOutlivesFlowctl(t *testing.T) {
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
func TestNothingOutlivesACrash(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGBUS} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			p := launch(t, writePipeline(t, shell("a", h.script(daemons+"; exec sleep T"))))
			p.waitReady()
			h.await(p, 3)
			p.signal(sig)
			h.gone(p, afterlife())
		})
	}
}

func TestStoppedComponentIsEnded(t *testing.T) {
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

// TestKilledWhileStarting kills flowctl at any moment of its start.
func TestKilledWhileStarting(t *testing.T) {
	t.Parallel()
	component := func(h herd, id string, inputs ...string) Component {
		c := shell(id, h.script(daemons+` & sleep T & exec sleep T`))
		c.Inputs = inputs
		return c
	}
	pipeline := func(h herd) string {
		return writePipeline(t, component(h, "a"), component(h, "b"), component(h, "c", "a"), component(h, "d", "c"))
	}
	binary(t) // building it is not to be measured
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
			h.gone(p, afterlife())
		})
	}
}

// TestKilledWhileStopping kills flowctl at any moment of its stop.
func TestKilledWhileStopping(t *testing.T) {
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
			h.gone(p, afterlife())
		})
	}
}

// Two runs of the same pipeline know nothing of each other.
func TestOneRunOfTwoIsEnded(t *testing.T) {
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
func TestFloodWhileStopping(t *testing.T) {
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

func TestGuardIsReplaced(t *testing.T) {
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
func TestKilledByName(t *testing.T) {
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
	h.gone(p, afterlife())
}

// The terminal's signals and SIGTERM do not end the guard, nor does one that is
// stopped hold up the end.
func TestGuardIsOutOfReach(t *testing.T) {
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
	if _, ok := ends(t, afterlife(), fd); !ok {
		t.Error("the guard outlives flowctl")
	}
	p.hasNot(p.stderr, "the guard was killed")
}

func TestStoppedGuardHoldsNothingUp(t *testing.T) {
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

func TestGuardIsSmall(t *testing.T) {
	t.Parallel()
	h := newHerd()
	var components []Component
	for i := range 20 {
		components = append(components, shell(fmt.Sprint("c", i), h.script(daemons+` & exec sleep T`)))
	}
	p := start(t, runArgs(writePipeline(t, components...)), withBinary(plain()))
	p.waitReady()
	h.await(p, 60)
	guard := guardOf(p)
	// It gives back what starting took when nothing has started for a while.
	eventually(t, "a guard of less than 10 MiB", func() bool { return memory(t, guard, "VmRSS") < 10<<20 })
	var most int
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); time.Sleep(20 * time.Millisecond) { // it looks around meanwhile
		most = max(most, memory(t, guard, "VmRSS"))
	}
	t.Logf("the guard: VmRSS %d KiB at most, VmHWM %d KiB; flowctl: VmRSS %d KiB", most>>10, memory(t, guard, "VmHWM")>>10, memory(t, p.cmd.Process.Pid, "VmRSS")>>10)
	if most >= 10<<20 {
		t.Errorf("the guard has %d bytes resident", most)
	}
	h.end(p, syscall.SIGKILL)
}

// A component may be a flowctl: it and its guard answer for what it runs.
func TestNestedRuns(t *testing.T) {
	t.Parallel()
	nest := func(t *testing.T, policy string) (p *process, outer, inner herd, pid int) {
		outer, inner = newHerd(), newHerd()
		file := writePipeline(t, shell("leaf", inner.script(daemons+` & exec sleep T`)))
		nested := Component{ID: "nested", Command: []string{binary(t), "run", file, "-control-plane-port", "0", "-stop-timeout", "500ms"}, Register: new(false), RestartPolicy: policy}
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
			inner.gone(p, map[syscall.Signal]time.Duration{syscall.SIGKILL: afterlife()}[sig])
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
		deadline := time.Now().Add(afterlife())
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
func TestHealthCheckDoesNotOutliveFlowctl(t *testing.T) {
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

// oddVar makes this test binary one of these components.
const oddVar = "TEST_COMPONENT_ODDITY"

func init() {
	kind, arg, _ := strings.Cut(os.Getenv(oddVar), " ")
	switch kind {
	case "headless":
		// A process whose main thread has ended: ps shows a zombie, and it lives. It
		// holds the FIFO arg.
		ready := make(chan bool)
		go func() {
			signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
			if f, err := os.OpenFile(arg, os.O_WRONLY, 0); err == nil {
				close(ready)
				fmt.Println("headless")
				time.Sleep(time.Hour)
				f.Close()
			}
		}()
		<-ready
		_, _, _ = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	case "hoard":
		// It leaves arg bytes of lines in its pipe.
		size, _ := strconv.Atoi(arg)
		if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, 1, 1031 /* F_SETPIPE_SZ */, uintptr(size)); errno != 0 {
			fmt.Fprintln(os.Stderr, "F_SETPIPE_SZ:", errno)
			os.Exit(77)
		}
		var lines []byte
		for i := 0; len(lines) < size; i++ {
			lines = fmt.Appendf(lines, "line %09d\n", i)
		}
		os.Stdout.Write(lines)
		os.Exit(0)
	}
}

func odd(id, what string) Component {
	program, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return Component{ID: id, Command: []string{program}, Env: map[string]string{oddVar: what}, Register: new(false)}
}

// A process whose main thread has ended looks like a zombie and is none.
func TestProcessWithoutMainThreadIsEnded(t *testing.T) {
	t.Parallel()
	for _, sig := range endings {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			path, gone := fifo(t)
			c := odd("a", "headless "+path)
			c.Command = append([]string{"setsid", "-w"}, c.Command...) // in a session of its own, below a/sh
			p := launch(t, writePipeline(t, c), "-stop-timeout", "500ms")
			p.waitOut("a | headless\n")
			p.signal(sig)
			<-p.done
			select {
			case <-gone:
			case <-time.After(afterlife()):
				t.Errorf("it lives\n%s", p)
			}
			p.awaitGuard()
		})
	}
}

// flowctl reaps what its components orphan, in its whole life.
func TestNoZombies(t *testing.T) {
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

// A component that always fails is started less and less often, which is seen; a stop
// finds it in its pause and is over at once.
func TestRestartsAreFewAndEndWithTheRun(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t,
		func() Component {
			c := shell("a", h.script(`: T; exit 3`))
			c.RestartPolicy = "always"
			return c
		}(), shell("b", h.script(`exec sleep T`))))
	p.wait(p.stderr, "msg=restarting component=a", 3)
	var waits []time.Duration
	for _, m := range regexp.MustCompile(`msg=restarting component=a in=(\S+) restarts=\d+\n`).FindAllStringSubmatch(p.stderr.String(), -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			t.Fatal(err)
		}
		waits = append(waits, d)
	}
	for i, want := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
		if waits[i] < want || waits[i] > want+want/10 {
			t.Errorf("pause %d is %s, want %s and a tenth at most", i, waits[i], want)
		}
	}
	p.waitErr("restarting=a")
	began := time.Now()
	p.stop()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the stop took %s", took)
	}
	h.gone(p, 0)
	if n := strings.Count(p.stderr.String(), "msg=started component=a"); n != 3 {
		t.Errorf("it was started %d times, want 3\n%s", n, p)
	}
}

// What reads from a component that is restarted goes on, and can see how that is.
func TestReaderOfARestartedComponentGoesOn(t *testing.T) {
	t.Parallel()
	a := actor("a", role{Dialect: "legacy", OnUSR1: "exit", Code: 1})
	a.RestartPolicy = "on-failure"
	b := actor("b", role{Dialect: "v1"})
	b.Inputs = []string{"a"}
	p := launch(t, writePipeline(t, a, b))
	p.waitReady()
	health := func() (string, time.Time) {
		_, out, _ := call(t, "list", "-e", p.endpoint(), "-json")
		var pipelines []listedPipeline
		if err := json.Unmarshal([]byte(out), &pipelines); err != nil || len(pipelines) != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		for _, r := range pipelines[0].Components {
			if r.ID == "a" && r.Registered != nil {
				return r.Health, *r.Registered
			}
		}
		return "", time.Time{}
	}
	before, registered := health()
	first, reader := p.pid("a"), p.pid("b")
	p.tell("a", syscall.SIGUSR1)
	p.waitErr("msg=restarting component=a")
	if during, _ := health(); before != "healthy" || during == before {
		t.Errorf("its health was %q and is %q while it is restarted", before, during)
	}
	p.wait(p.stderr, "msg=ready component=a ", 2)
	after, again := health()
	if after != "healthy" || !again.After(registered) {
		t.Errorf("it is %q and was registered at %s, then at %s", after, registered, again)
	}
	if p.pid("a") == first || p.pid("b") != reader || strings.Count(p.stderr.String(), "msg=started component=b") != 1 {
		t.Errorf("want another process of a and the same of b\n%s", p)
	}
	p.stop()
}

// TestNothingLeaksOverManyRestarts is of one process, and so not parallel: it counts
// what this process has.
func TestNothingLeaksOverManyRestarts(t *testing.T) {
	program := filepath.Join(t.TempDir(), "leak"+strconv.Itoa(os.Getpid()%10000000)) // its zombies have this name
	if err := os.Symlink("/bin/sh", program); err != nil {
		t.Fatal(err)
	}
	s, _ := supervise(t, []map[string]any{{"id": "a", "command": []string{program, "-c", "echo out; echo err >&2; exit 1"}, "register": false, "restart_policy": "always"}}, nil)
	p, now := s.byID["a"], time.Now()
	once := func() {
		for _, p := range s.startable() {
			s.start(p, now)
			s.ready(p, now)
			nextExit(t, s, now)
			now = p.deadline
			s.expire(now)
		}
	}
	count := func() (files, goroutines, zombies int) {
		entries, _ := os.ReadDir("/proc/self/fd")
		return len(entries), runtime.NumGoroutine(), len(processesNamed(filepath.Base(program)))
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

// processesNamed returns the processes, zombies too, that have this name in the kernel.
func processesNamed(name string) []int {
	var pids []int
	comms, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, file := range comms {
		if text, _ := os.ReadFile(file); strings.TrimSpace(string(text)) == name {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// A tally checks a stream of lines as flowctl prints them, without keeping them: for
// each component a count, and a hash of what it said.
type tally struct {
	mu      sync.Mutex // guards the fields below
	rest    []byte
	lines   map[string]int
	bytes   map[string]int
	sums    map[string]hash.Hash
	strange []string                          // lines without a component
	check   func(id string, line []byte) bool // false for a line that cannot be
}

func newTally(check func(id string, line []byte) bool) *tally {
	return &tally{lines: make(map[string]int), bytes: make(map[string]int), sums: make(map[string]hash.Hash), check: check}
}

func (y *tally) Write(p []byte) (int, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for rest := p; ; {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			y.rest = append(y.rest, rest...)
			return len(p), nil
		}
		line := rest[:i]
		if len(y.rest) > 0 {
			y.rest = append(y.rest, line...)
			line = y.rest
		}
		y.line(line)
		y.rest, rest = y.rest[:0], rest[i+1:]
	}
}

func (y *tally) line(line []byte) {
	head, text, found := bytes.Cut(line, []byte(" | "))
	if !found || len(head) < len("15:04:05 x") || head[2] != ':' || head[5] != ':' || head[8] != ' ' {
		y.strange = append(y.strange, string(line[:min(len(line), 200)]))
		return
	}
	id := string(bytes.TrimRight(head[9:], " "))
	if y.sums[id] == nil {
		y.sums[id] = sha256.New()
	}
	y.lines[id]++
	y.bytes[id] += len(text) + 1
	y.sums[id].Write(text)
	y.sums[id].Write([]byte{'\n'})
	if y.check != nil && !y.check(id, text) {
		y.strange = append(y.strange, string(line[:min(len(line), 200)]))
	}
}

func (y *tally) of(id string) (lines, size int, sum string) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.sums[id] == nil {
		return 0, 0, ""
	}
	return y.lines[id], y.bytes[id], fmt.Sprintf("%.4x", y.sums[id].Sum(nil))
}

func (y *tally) total() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	n := 0
	for _, size := range y.bytes {
		n += size
	}
	return n
}

// clean fails the test for lines that cannot be.
func (y *tally) clean(tb testing.TB) {
	tb.Helper()
	y.mu.Lock()
	defer y.mu.Unlock()
	if len(y.strange) > 0 {
		tb.Errorf("%d strange lines, the first: %q", len(y.strange), y.strange[:min(len(y.strange), 5)])
	}
	if len(y.rest) > 0 {
		tb.Errorf("the output ends in the middle of a line: %.200q", y.rest)
	}
}

// numbered makes a file of lines of width bytes, each with its number and name.
func numbered(tb testing.TB, file, name string, lines, width int) string {
	tb.Helper()
	f, err := os.Create(file)
	if err != nil {
		tb.Fatal(err)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	pad := bytes.Repeat([]byte("abcdefghijklmnopqrstuvwxyz"), width/26+1)
	var line []byte
	for i := range lines {
		line = fmt.Appendf(line[:0], "%s %09d ", name, i)
		line = append(append(line, pad[:width-1-len(line)]...), '\n')
		_, _ = w.Write(line)
	}
	if err := errors.Join(w.Flush(), f.Close()); err != nil {
		tb.Fatal(err)
	}
	return file
}

// fingerprint is what a tally should have of a file.
func fingerprint(tb testing.TB, file string) (lines, size int, sum string) {
	tb.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		tb.Fatal(err)
	}
	hash := sha256.Sum256(data)
	return bytes.Count(data, []byte{'\n'}), len(data), fmt.Sprintf("%.4x", hash[:])
}

// same wants all of a file, in order, from a component.
func (y *tally) same(tb testing.TB, id, file string) {
	tb.Helper()
	lines, size, sum := y.of(id)
	wantLines, wantSize, wantSum := fingerprint(tb, file)
	if lines != wantLines || size != wantSize || sum != wantSum {
		tb.Errorf("%s: %d lines, %d bytes, hash %s; want %d, %d, %s", id, lines, size, sum, wantLines, wantSize, wantSum)
	}
}

// 100 MB of each of two components at the moment of their end are all there.
func TestBurstAtExitIsComplete(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a := numbered(t, filepath.Join(dir, "a"), "a", 100_000, 1000)
	b := numbered(t, filepath.Join(dir, "b"), "b", 100, 1_000_000)
	y := newTally(nil)
	p := start(t, runArgs(writePipeline(t, shell("a", "exec cat "+a), shell("b", "exec cat "+b+" >&2"))), stdoutTo(y), withBinary(plain()))
	p.exit(exitOK)
	y.same(t, "a", a)
	y.same(t, "b", b)
	y.clean(t)
}

// Lines around the longest that is passed on whole, and bytes that are no text.
func TestOddLinesAreComplete(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		if noise[i] = byte(random.Uint32()); noise[i] == '\r' { // a CR before a newline is dropped
			noise[i] = 0
		}
	}
	noise = append(noise, "\n\n\x00\n\xff\nno newline at the end"...)
	file := func(name string, data []byte) string { return writeFile(t, filepath.Join(dir, name), string(data)) }
	bytesOf := func(n int, b byte) []byte { return append(bytes.Repeat([]byte{b}, n), '\n') }
	for _, tt := range []struct {
		name string
		data []byte
	}{
		{"noise", noise},
		{"around the limit", slices.Concat(bytesOf(maxLine-1, 'a'), bytesOf(maxLine, 'b'), bytesOf(maxLine+1, 'c'), bytesOf(5, 'd'))},
		{"long", slices.Concat(bytesOf(7*maxLine+17, 'e'), []byte("short\n"), bytes.Repeat([]byte("0123456789abcde\r"), 3*maxLine/16), []byte("end"))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, shell("a", "exec cat '"+file(tt.name, tt.data)+"'")))
			p.exit(exitOK)
			// What is put together of the pieces; lines that are no pieces have to be whole.
			var got []byte
			want := tt.data
			if !bytes.HasSuffix(want, []byte{'\n'}) {
				want = append(slices.Clip(want), '\n')
			}
			for line := range strings.SplitAfterSeq(p.stdout.String(), "\n") {
				if _, text, found := strings.Cut(line, " a | "); found {
					got = append(got, text...)
				} else {
					got = append(got, line...)
				}
			}
			if tt.name != "noise" { // there the cuts of long lines add newlines
				got, want = bytes.ReplaceAll(got, []byte{'\n'}, nil), bytes.ReplaceAll(want, []byte{'\n'}, nil)
			}
			if !bytes.Equal(got, want) {
				i := 0
				for i < min(len(got), len(want)) && got[i] == want[i] {
					i++
				}
				t.Errorf("got %d bytes, want %d; they differ at %d: %.60q, want %.60q", len(got), len(want), i, got[i:min(len(got), i+100)], want[i:min(len(want), i+100)])
			}
			if tt.name == "around the limit" {
				lines := p.lines("a")
				if len(lines) != 5 || len(lines[0]) != maxLine-1 || len(lines[1]) != maxLine {
					t.Errorf("%d lines; a line of %d bytes is to be passed on whole", len(lines), maxLine)
				}
			}
		})
	}
}

// A process that left the component keeps the pipe open: the run goes on at once, and
// what it says until its component ends is heard.
func TestOpenPipeHoldsNothingUp(t *testing.T) {
	t.Parallel()
	h := newHerd()
	c := shell("a", h.script(`setsid sh -c 'echo from afar; sleep T' & sleep 0.2; echo last words; exit 4`))
	c.RestartPolicy = "on-failure"
	p := launch(t, writePipeline(t, c))
	p.waitErr("msg=ended component=a")
	p.wait(p.stdout, "from afar\n", 1)
	p.wait(p.stdout, "last words\n", 1)
	p.waitErr("msg=restarting component=a")
	p.wait(p.stdout, "last words\n", 2) // it is restarted, too
	h.end(p, syscall.SIGTERM)
}

// Where nobody reads, components wait and flowctl does not grow; when somebody does
// again, however late, all is there.
func TestSlowReaderLosesNothing(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	a := numbered(t, filepath.Join(dir, "a"), "a", 20_000, 100)
	b := numbered(t, filepath.Join(dir, "b"), "b", 30, 1<<20)
	// They end at once as far as they can, with a stop timeout that is long past when
	// they are read.
	p := start(t, runArgs(writePipeline(t, shell("a", "exec cat "+a), shell("b", "exec cat "+b)), "-stop-timeout", "100ms"), stdoutTo(w), withBinary(plain()))
	w.Close()
	time.Sleep(1500 * time.Millisecond) // it is time itself that must not matter
	if high := memory(t, p.cmd.Process.Pid, "VmHWM"); high > 60<<20 {
		t.Errorf("flowctl has grown to %d bytes", high)
	}
	y := newTally(nil)
	buf := make([]byte, 8<<10)
	for y.total() < 200_000 { // slowly first
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = y.Write(buf[:n])
		time.Sleep(time.Millisecond)
	}
	if _, err := io.Copy(y, r); err != nil {
		t.Fatal(err)
	}
	p.exit(exitOK)
	y.same(t, "a", a)
	y.same(t, "b", b)
	y.clean(t)
	p.hasNot(p.stderr, "lost")
}

// 500 MB wait in two components while the reader takes 20 MB, and then they are stopped.
func TestFloodWaitsForTheReader(t *testing.T) {
	t.Parallel()
	for _, reads := range []bool{true, false} {
		t.Run(map[bool]string{true: "reads", false: "hangs"}[reads], func(t *testing.T) {
			t.Parallel()
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			h := newHerd()
			line := strings.Repeat("0123456789", 1000)
			script := h.script(`: T; yes ` + line + ` | head -c 250000000`)
			p := start(t, runArgs(writePipeline(t, shell("a", script), shell("b", script+" >&2")), "-stop-timeout", "500ms"), stdoutTo(w), withBinary(plain()))
			w.Close()
			y := newTally(func(_ string, got []byte) bool { return strings.HasPrefix(line, string(got)) })
			buf := make([]byte, 256<<10)
			for y.total() < 20<<20 {
				n, err := r.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = y.Write(buf[:n])
			}
			if high := memory(t, p.cmd.Process.Pid, "VmHWM"); high > 60<<20 {
				t.Errorf("flowctl has grown to %d bytes", high)
			}
			began := time.Now()
			p.signal(syscall.SIGTERM)
			if reads {
				_, _ = io.Copy(y, r)
				y.clean(t)
			}
			p.exit(exitOK)
			if took := time.Since(began); took > 500*time.Millisecond+afterlife() {
				t.Errorf("the stop took %s", took)
			}
			h.gone(p, 0)
			if lost := strings.Contains(p.stderr.String(), "output is lost"); lost == reads {
				t.Errorf("lost lines are told: %t\n%s", lost, p)
			}
		})
	}
}

// What the pipe of an ended component holds is read, however large that has made it.
func TestFullPipeOfAnEndedComponentIsRead(t *testing.T) {
	t.Parallel()
	const size = 900 << 10
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := odd("a", "hoard "+strconv.Itoa(size))
	p := start(t, runArgs(writePipeline(t, c)), stdoutTo(w))
	w.Close()
	pid := p.pid("a")
	eventually(t, "the end of the component", func() bool { // or that it cannot, for want of privilege
		_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		return err != nil
	})
	y := newTally(nil)
	if _, err := io.Copy(y, r); err != nil {
		t.Fatal(err)
	}
	<-p.done
	if p.cmd.ProcessState.ExitCode() == exitFailed && strings.Contains(p.stderr.String(), "exit status 77") {
		t.Skip("this system does not let us have a pipe of this size")
	}
	if lines, _, _ := y.of("a"); lines < size/len("line 000000000\n") {
		t.Errorf("%d of %d lines", lines, size/len("line 000000000\n")+1)
	}
	y.clean(t)
}

// A reader that goes away, as head does, ends a run of components that flood.
func TestClosedOutputEndsAFlood(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	h := newHerd()
	p := start(t, runArgs(writePipeline(t, shell("a", h.script(`: T; yes`)), shell("b", h.script(daemons+` & exec sleep T`))), "-stop-timeout", "500ms"), stdoutTo(w))
	w.Close()
	p.waitReady()
	h.await(p, 3)
	if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	p.exit(exitFailed)
	h.gone(p, 0)
	p.has(p.stderr, `level=ERROR msg="standard output cannot be written, stopping" err="write /dev/stdout: broken pipe"`)
}

// A watcher looks, for each line that it is given, whether that is in a file already.
type watcher struct {
	tally
	file    string
	missing atomic.Value // the first line that was not
}

func (w *watcher) Write(p []byte) (int, error) {
	n, err := w.tally.Write(p)
	if i := bytes.LastIndexByte(p, '\n'); i >= 0 {
		line := p[bytes.LastIndexByte(p[:i], '\n')+1 : i+1]
		if _, text, found := bytes.Cut(line, []byte(" | ")); found {
			if data, err := os.ReadFile(w.file); err != nil || !bytes.Contains(data[max(0, len(data)-(1<<20)):], append([]byte{' '}, text...)) {
				w.missing.CompareAndSwap(nil, string(line))
			}
		}
	}
	return n, err
}

// logLines returns the lines of log files without their times, which must be such.
func logLines(tb testing.TB, files ...string) []string {
	tb.Helper()
	var lines []string
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			tb.Fatal(err)
		}
		if len(data) > 0 && data[len(data)-1] != '\n' {
			tb.Errorf("%s ends in the middle of a line: %.100q", file, data[max(0, len(data)-100):])
		}
		for line := range strings.Lines(string(data)) {
			stamp, text, _ := strings.Cut(line, " ")
			if at, err := time.Parse("2006-01-02T15:04:05.000Z07:00", stamp); err != nil || time.Since(at).Abs() > time.Hour {
				tb.Fatalf("%s has a line without its time: %q", file, line)
			}
			lines = append(lines, strings.TrimSuffix(text, "\n"))
		}
	}
	return lines
}

// counted checks that lines are "NAME NUMBER ..." with numbers that follow each other.
func counted(tb testing.TB, lines []string, from, to int) {
	tb.Helper()
	if len(lines) != to-from {
		tb.Errorf("%d lines, want %d", len(lines), to-from)
		return
	}
	for i, line := range lines {
		fields := strings.Fields(line)
		if n := -1; len(fields) < 2 {
			tb.Fatalf("line %q", line)
		} else if n, _ = strconv.Atoi(fields[1]); n != from+i {
			tb.Fatalf("line %d is %.60q", from+i, line)
		}
	}
}

// What is on the terminal is in the file, at that moment and after SIGKILL.
func TestLogFileHasWhatIsShown(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "made", "by", "flowctl")
	h := newHerd()
	w := &watcher{tally: *newTally(nil), file: filepath.Join(dir, "a.log")}
	p := start(t, runArgs(writePipeline(t, shell("a", h.script(`: T; i=0; while :; do echo "line $i"; echo "err $i" >&2; i=$((i+1)); [ $((i%100)) = 0 ] && sleep 0.01; done`))), "-log-dir", dir), stdoutTo(w))
	eventually(t, "some output", func() bool { lines, _, _ := w.of("a"); return lines > 5000 })
	h.end(p, syscall.SIGKILL)
	if missing := w.missing.Load(); missing != nil {
		t.Errorf("was shown and was not in the file: %q", missing)
	}
	shown, _, _ := w.of("a")
	if in := len(logLines(t, w.file)); in < shown {
		t.Errorf("%d lines in the file, %d were shown", in, shown)
	}
}

func TestLogFileIsRotated(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	logs := filepath.Join(dir, "logs")
	const lines = 30_000
	file := writePipeline(t, shell("a", "exec cat "+numbered(t, filepath.Join(dir, "data"), "a", lines, 1000)), shell("b", "echo b 0"))
	p := start(t, runArgs(file, "-log-dir", logs), withBinary(plain()))
	p.exit(exitOK)
	entries, err := os.ReadDir(logs)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || info.Size() > maxLogFile {
			t.Errorf("%s: %v, %d bytes", e.Name(), err, info.Size())
		}
		names = append(names, e.Name())
	}
	if want := []string{"a.log", "a.log.1", "b.log"}; !slices.Equal(names, want) {
		t.Fatalf("files %q, want %q", names, want)
	}
	got := logLines(t, filepath.Join(logs, "a.log.1"), filepath.Join(logs, "a.log"))
	counted(t, got, lines-len(got), lines)
	if rotated, _ := os.Stat(filepath.Join(logs, "a.log.1")); rotated.Size() < maxLogFile*9/10 {
		t.Errorf("it was rotated at %d bytes", rotated.Size())
	}
	// A later run goes on where this one ended.
	p = start(t, runArgs(file, "-log-dir", logs), withBinary(plain()))
	p.exit(exitOK)
	if got := logLines(t, filepath.Join(logs, "b.log")); !slices.Equal(got, []string{"b 0", "b 0"}) {
		t.Errorf("after two runs the file has %q", got)
	}
}

// A log file that cannot be rotated has everything and says so seldom.
func TestLogFileThatCannotBeRotated(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const lines = 40_000
	if err := os.MkdirAll(filepath.Join(dir, "logs", "a.log.1"), 0o700); err != nil {
		t.Fatal(err)
	}
	data := numbered(t, filepath.Join(dir, "data"), "a", lines, 1000)
	y := newTally(nil)
	p := start(t, runArgs(writePipeline(t, shell("a", "exec cat "+data)), "-log-dir", filepath.Join(dir, "logs")), stdoutTo(y), withBinary(plain()))
	p.exit(exitOK)
	y.same(t, "a", data)
	counted(t, logLines(t, filepath.Join(dir, "logs", "a.log")), 0, lines)
	if n := strings.Count(p.stderr.String(), "level=ERROR"); n < 1 || n > 4 {
		t.Errorf("%d errors, want one for each 10 MiB at most\n%s", n, p)
	}
}

// A full disk stops nothing, is told, and leaves no part of a line.
func TestLogFileOnAFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=512k"); err != nil {
		t.Skip("this system does not let us mount a small disk: ", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
	writeFile(t, filepath.Join(disk, "other"), strings.Repeat("x", 300<<10))
	first := numbered(t, filepath.Join(dir, "first"), "a", 5_000, 100)
	second := numbered(t, filepath.Join(dir, "second"), "a", 1_000, 100)
	h := newHerd()
	again := filepath.Join(dir, "again")
	y := newTally(nil)
	p := start(t, runArgs(writePipeline(t, shell("a", h.script("cat "+first+"; until [ -e "+again+" ]; do sleep 0.01; done; cat "+second+"; exec sleep T"))), "-log-dir", disk), stdoutTo(y))
	eventually(t, "all that it prints on a full disk", func() bool { lines, _, _ := y.of("a"); return lines == 5_000 })
	if err := os.Remove(filepath.Join(disk, "other")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, again, "")
	eventually(t, "the rest", func() bool { lines, _, _ := y.of("a"); return lines == 6_000 })
	h.end(p, syscall.SIGTERM)
	y.clean(t)
	got := logLines(t, filepath.Join(disk, "a.log"))
	for _, line := range got {
		if len(line) != 99 || !strings.HasPrefix(line, "a 0") {
			t.Fatalf("not a line of it: %q", line)
		}
	}
	if len(got) < 1_000 {
		t.Fatalf("%d lines in the file", len(got))
	}
	counted(t, got[len(got)-1_000:], 0, 1_000)
	if n := strings.Count(p.stderr.String(), "level=ERROR"); n < 1 || n > 3 {
		t.Errorf("the full disk is told %d times\n%s", n, p)
	}
}

// asNobody runs flowctl as a user without rights, with a run folder of its own: one
// that is another user's would not be used, but one that all runs of this user share.
func asNobody(uid int) option {
	return func(p *process) {
		p.tb.Helper()
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: 65534}
		runs := filepath.Join(publicDir(p.tb), "runs")
		if err := os.Mkdir(runs, 0o700); err != nil {
			p.tb.Fatal(err)
		}
		if err := os.Chown(runs, uid, 65534); err != nil {
			p.tb.Fatal(err)
		}
		p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+runs)
	}
}

// publicDir is a folder that every user can read.
func publicDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "flowctl-public-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{dir, buildFolder()} {
		if err := os.Chmod(d, 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	return dir
}

// publicPipeline is writePipeline for every user.
func publicPipeline(tb testing.TB, components ...Component) string {
	tb.Helper()
	data, err := os.ReadFile(writePipeline(tb, components...))
	if err != nil {
		tb.Fatal(err)
	}
	file := writeFile(tb, filepath.Join(publicDir(tb), "pipeline.json"), string(data))
	if err := os.Chmod(file, 0o644); err != nil {
		tb.Fatal(err)
	}
	return file
}

func TestLogDirThatCannotBe(t *testing.T) {
	t.Parallel()
	plainFile := writeFile(t, filepath.Join(t.TempDir(), "file"), "")
	public := publicDir(t)
	for _, tt := range []struct {
		name, dir string
		byFlag    bool
		nobody    bool
		want      string
	}{
		{"a file", plainFile, true, false, "not a directory"},
		{"below a file", filepath.Join(plainFile, "x"), true, false, "not a directory"},
		{"not writable", public, true, true, "permission denied"},
		{"not to be made", filepath.Join(public, "x"), true, true, "permission denied"},
		{"a file, from the environment", plainFile, false, false, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			args := []string{"-until", "done"}
			var options []option
			if tt.byFlag {
				args = append(args, "-log-dir", tt.dir)
			} else {
				options = append(options, withEnv("LOGS_DIRECTORY="+tt.dir))
			}
			if tt.nobody {
				if os.Getuid() != 0 {
					t.Skip("only root can be another user")
				}
				options = append(options, asNobody(65534))
			}
			p := start(t, runArgs(publicPipeline(t, shell("a", "echo out")), args...), options...)
			if tt.byFlag {
				p.exit(exitUsage)
				p.hasNot(p.stderr, "msg=started")
				p.has(p.stderr, "-log-dir", filepath.Dir(tt.dir), tt.want)
				return
			}
			p.exit(exitOK)
			p.has(p.stderr, "level=WARN", tt.dir, tt.want)
			p.has(p.stdout, "a | out\n")
		})
	}
}

func TestLogDirOfSystemd(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		env  func(dir string) string
		args []string
		want bool
	}{
		{"taken", func(dir string) string { return dir }, nil, true},
		{"the first of several", func(dir string) string { return dir + ":/nonexistent" }, nil, true},
		{"turned off", func(dir string) string { return dir }, []string{"-log-dir", ""}, false},
		{"none", func(string) string { return "" }, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file := writePipeline(t, shell("a", "echo out; echo err >&2"))
			p := start(t, runArgs(file, tt.args...), withEnv("LOGS_DIRECTORY="+tt.env(dir)))
			p.exit(exitOK)
			if entries, _ := os.ReadDir(dir); len(entries) > 0 != tt.want {
				t.Errorf("log files: %v", entries)
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), "logs")); err == nil {
				t.Error("log files beside a pipeline that has no terminal")
			}
			if tt.want {
				if got := logLines(t, filepath.Join(dir, "a.log")); len(got) != 2 || !slices.Contains(got, "out") || !slices.Contains(got, "err") {
					t.Errorf("the file has %q", got)
				}
			}
		})
	}
}

// Why a component cannot be started is told with its id and the path.
func TestWhyItCannotStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := writeFile(t, filepath.Join(dir, name), text)
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	busy := file("busy", "", 0o700)
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(busy, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	if _, err := w.Write(program); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, want string }{
		{"no #! line", file("script", "echo hello\n", 0o700), "it is no program of this machine, and has no #! line"},
		{"no program", file("noise", "\x7fELF\x00garbage", 0o700), "it is no program of this machine, and has no #! line"},
		{"nothing", file("empty", "", 0o700), "it is no program of this machine, and has no #! line"},
		{"being written", busy, "text file busy"},
		{"interpreter is no program", file("odd", "#!"+file("inner", "echo\n", 0o600)+"\n", 0o700), "permission denied"},
		{"loop", func() string {
			path := filepath.Join(dir, "loop")
			if err := os.Symlink(path, path); err != nil {
				t.Fatal(err)
			}
			return path
		}(), "too many levels of symbolic links"},
		{"name too long", "/" + strings.Repeat("x", 300), "file name too long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, Component{ID: "store", Command: []string{tt.path}, Register: new(false)}))
			p.exit(exitFailed)
			p.has(p.stderr, "flowctl: component store failed: cannot run ", strconv.Quote(tt.path), tt.want)
		})
	}
}

// limited runs flowctl under a limit that the shell's ulimit sets.
func limited(limit string) option {
	return func(p *process) {
		p.cmd.Args = append([]string{"sh", "-c", "ulimit " + limit + ` && exec "$0" "$@"`, p.cmd.Path}, p.cmd.Args[1:]...)
		p.cmd.Path = "/bin/sh"
	}
}

func TestTooManyOpenFiles(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		port string
		want string
	}{
		{"for a process", "1", `cannot run "sleep": the limit of open files is reached (ulimit -n, or LimitNOFILE= of a unit)`},
		{"for a port", "", "too many open files"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			var components []Component
			for i := range 100 { // more than the limit by far, whatever flowctl itself has open
				c := Component{ID: fmt.Sprint("c", i), Command: []string{"sleep", string(h)}, Register: new(false)}
				if tt.port != "" {
					c.Env = map[string]string{"HEALTH_PORT": tt.port}
				}
				components = append(components, c)
			}
			p := start(t, runArgs(writePipeline(t, components...), "-stop-timeout", "500ms"), limited("-n 48"))
			p.exit(exitFailed)
			h.gone(p, 0)
			p.has(p.stderr, "component c", tt.want)
		})
	}
}

func TestTooManyProcesses(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs a user without other processes")
	}
	h := newHerd()
	var components []Component
	for i := range 100 {
		components = append(components, Component{ID: fmt.Sprint("c", i), Command: []string{"sleep", string(h)}, Register: new(false)})
	}
	uid := 300_000 + int(herds.Load())<<16 + os.Getpid() // the threads of all its processes count
	p := start(t, runArgs(publicPipeline(t, components...)), withBinary(plain()), limited("-u 80 2>/dev/null || ulimit -p 80"), asNobody(uid))
	p.exit(exitFailed)
	h.gone(p, 0)
	p.has(p.stderr, "flowctl: component c", ` failed: cannot run "sleep": the limit of processes is reached (ulimit -u, or TasksMax= of a unit)`)
}

// TestManyEndTogether is not parallel: it measures.
func TestManyEndTogether(t *testing.T) {
	const many = 300
	h := newHerd()
	var components []Component
	for i := range many {
		components = append(components, Component{ID: fmt.Sprintf("c%03d", i), Command: []string{"sleep", string(h)}, Register: new(false)})
	}
	p := start(t, runArgs(writePipeline(t, components...)), withBinary(plain()))
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
	if after > 300*time.Millisecond {
		t.Errorf("flowctl ended %s after the last of them", after)
	}
	p.exit(exitOK)
	h.gone(p, 0)
}

// chaosVar is how long TestChaos takes, 5s without it.
const chaosVar = "FLOWCTL_CHAOS"

// mischief is what a component of TestChaos may do; F floods, T is the herd.
var mischief = []string{
	`exit 1`,
	`exit 0`,
	`kill -9 $$`,
	`kill -SEGV $$`,
	`sleep 0.3`,
	`F 2000`,
	`F 20000 >&2`,
	`F 500 & F 500 & wait`,
	`printf unfinished; exit 5`,
	`sleep T & (sleep T & sleep T) &`,
	`(trap "" TERM INT HUP; sleep T) &`,
	`trap "" TERM`,
	`i=0; while [ $i -lt 30 ]; do (sleep 0.0$i & true &); i=$((i+1)); done`,
	daemons + ` &`,
	`env -i ` + daemons + ` &`,
	`setsid sh -c 'f=0; while [ $f -lt 3000 ]; do echo "FLOOD"; f=$((f+1)); done; sleep T' &`,
	`kill -STOP $$`,
	`exec sleep 0.5`,
}

// shellSays is what a shell says of a process of its own that a signal has ended.
var shellSays = regexp.MustCompile(`^(Killed|Terminated|Interrupt|Segmentation fault)( \(core dumped\))?$`)

// Components crash, hang, ignore signals, flood, fork and make daemons at random, and
// something kills and stops what it meets, the guard too. One component counts, and
// none of its lines is missing.
func TestChaos(t *testing.T) {
	t.Parallel()
	length := 5 * time.Second
	if text := os.Getenv(chaosVar); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("FLOWCTL_CHAOS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("FLOWCTL_CHAOS_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	h := newHerd()
	const flood = "flood 0123456789 0123456789 0123456789 0123456789 0123456789"
	counter := shell("counter", `i=0; stop=; trap stop=1 TERM; while [ -z "$stop" ]; do i=$((i+1)); echo "count $i"; done; echo "total $i"`)
	components := []Component{counter}
	for i := range 16 {
		// What a start does depends on how many there were.
		script := `: T; F() { f=0; while [ $f -lt $1 ]; do echo "` + flood + `"; f=$((f+1)); done; }` + "\n"
		file := filepath.Join(t.TempDir(), "starts")
		script += `n=$(cat ` + file + ` 2>/dev/null || echo 0); echo $((n+1)) >` + file + "; case $((n%8)) in\n"
		for n := range 8 {
			script += fmt.Sprint(n, ") ")
			for range 1 + random.IntN(5) {
				script += mischief[random.IntN(len(mischief))] + "\n"
			}
			if random.IntN(2) == 0 {
				script += "exec sleep T\n" // until something kills it
			}
			script += ";;\n"
		}
		c := shell(fmt.Sprint("c", i), h.script(strings.ReplaceAll(script, "FLOOD", flood))+"esac")
		c.RestartPolicy = "always"
		if i > 8 {
			c.Inputs = []string{fmt.Sprint("c", random.IntN(5))}
		}
		components = append(components, c)
	}
	count, total := 0, -1
	y := newTally(func(id string, line []byte) bool {
		if id != "counter" {
			text := strings.TrimPrefix(string(line), "unfinished") // another process may have gone on
			return text == flood || text == "" || shellSays.MatchString(text)
		}
		count++
		if rest, found := bytes.CutPrefix(line, []byte("total ")); found {
			count--
			total, _ = strconv.Atoi(string(rest))
			return true
		}
		n, err := strconv.Atoi(string(bytes.TrimPrefix(line, []byte("count "))))
		return err == nil && n == count
	})
	p := start(t, runArgs(writePipeline(t, components...), "-stop-timeout", "500ms"), stdoutTo(y))
	deed := []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGCONT, syscall.SIGTERM, syscall.SIGINT, syscall.SIGSEGV}
	deeds := 0
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Duration(random.IntN(40)) * time.Millisecond) {
		living := h.living()
		if len(living) > 0 {
			pids := slices.Sorted(maps.Keys(living))
			h.signal(pids[random.IntN(len(pids))], deed[random.IntN(len(deed))])
			deeds++
		}
		if random.IntN(100) == 0 {
			_ = syscall.Kill(guardOf(p), syscall.SIGKILL)
		}
	}
	select {
	case <-p.done:
		t.Fatalf("flowctl has ended\n%s", p)
	default:
	}
	h.end(p, syscall.SIGTERM)
	y.clean(t)
	lines, _, _ := y.of("counter")
	if total < 0 || count != total {
		t.Errorf("%d lines of the counter, which says that it printed %d", count, total)
	}
	t.Logf("%d lines counted, %d bytes in all, %d deeds, %d starts", lines, y.total(), deeds, strings.Count(p.stderr.String(), "msg=started"))
}

// processorTime is what a process that has ended and was not waited for has used
// itself, without its children.
func processorTime(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		tb.Fatal(err)
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	const tick = 10 * time.Millisecond // USER_HZ is 100 everywhere
	return time.Duration(user+system) * tick
}

// BenchmarkThroughput is how fast lines of four components come through flowctl into
// a file, none lost and none torn, and in turn what cat does with the same: the floor.
func BenchmarkThroughput(b *testing.B) {
	flowctl := plain()
	for _, bb := range []struct {
		name         string
		lines, width int
	}{
		{"short", 250_000, 100},
		{"long", 100, 100_000},
	} {
		b.Run(bb.name, func(b *testing.B) {
			dir := b.TempDir()
			var components []Component
			var files []string
			size := 0
			for _, id := range []string{"a", "b", "c", "d"} {
				file := numbered(b, filepath.Join(dir, id), id, bb.lines, bb.width)
				components = append(components, Component{ID: id, Command: []string{"cat", file}, Register: new(false)})
				files = append(files, file)
				size += bb.lines * bb.width
			}
			pipeline := writePipeline(b, components...)
			var took, floor, used time.Duration
			b.SetBytes(int64(size))
			for b.Loop() {
				out, err := os.Create(filepath.Join(dir, "out"))
				if err != nil {
					b.Fatal(err)
				}
				cmd := exec.Command(flowctl, runArgs(pipeline, "-log-level", "error", "-show-status=false")...)
				cmd.Stdout, cmd.Stderr = out, os.Stderr
				began := time.Now()
				if err := cmd.Start(); err != nil {
					b.Fatal(err)
				}
				awaitExit(cmd.Process.Pid)
				took += time.Since(began)
				used += processorTime(b, cmd.Process.Pid)
				if err := cmd.Wait(); err != nil {
					b.Fatal(err)
				}
				out.Close()
				y := newTally(nil)
				data, err := os.ReadFile(out.Name())
				if err != nil {
					b.Fatal(err)
				}
				_, _ = y.Write(data)
				for i, c := range components {
					y.same(b, c.ID, files[i])
				}
				y.clean(b)
				if b.Failed() {
					return
				}
				began = time.Now()
				if out, err := exec.Command("sh", append([]string{"-c", `for f in "$@"; do cat "$f" & done | cat >"$0"`, out.Name()}, files...)...).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				floor += time.Since(began)
			}
			mega := float64(size) * float64(b.N) / 1e6
			b.ReportMetric(mega/took.Seconds(), "MB/s")
			b.ReportMetric(used.Seconds()/(mega/1000), "cpu-s/GB")
			b.ReportMetric(mega/floor.Seconds(), "floor-MB/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// Another program that shares the terminal, as ssh does, may make it non-blocking:
// that is no end of standard output.
func TestNonBlockingOutputIsComplete(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	data := numbered(t, filepath.Join(dir, "data"), "a", 10_000, 100)
	set := filepath.Join(dir, "set")
	p := start(t, runArgs(writePipeline(t, shell("a", "until [ -e "+set+" ]; do sleep 0.01; done; exec cat "+data))), stdoutTo(w))
	p.waitReady()
	if err := syscall.SetNonblock(int(w.Fd()), true); err != nil { // flowctl's too: it is one open file
		t.Fatal(err)
	}
	writeFile(t, set, "")
	y := newTally(nil)
	buf := make([]byte, 4096)
	go func() {
		<-p.done
		_ = w.Close() // the last one that holds it
	}()
	for slow := 0; ; slow++ {
		n, err := r.Read(buf)
		if err != nil {
			break
		}
		_, _ = y.Write(buf[:n])
		if slow < 50 {
			time.Sleep(time.Millisecond)
		}
	}
	p.exit(exitOK)
	y.same(t, "a", data)
	y.clean(t)
}
