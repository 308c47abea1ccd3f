//go:build !linux

package main

// What other systems lack of process_linux.go: without a subreaper and /proc, a process that
// has left the group of its component is out of reach, and nothing ends the components of a
// flowctl that was killed.

import (
	"io"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"
	"unsafe"
)

type reaper struct{}

func newReaper() *reaper                    { return &reaper{} }
func (r *reaper) adopt() error              { return nil }
func (r *reaper) close()                    {}
func (r *reaper) start(cmd *exec.Cmd) error { return cmd.Start() }
func (r *reaper) wait(cmd *exec.Cmd) error  { return cmd.Wait() }

func (r *reaper) startLeader(cmd *exec.Cmd, _ string) error { return cmd.Start() }
func (r *reaper) leaderEnded(int)                           {}
func (r *reaper) leaders() map[int]string                   { return nil }

// awaitGroup returns when the output of the group is closed, or when it was killed: who is left
// in it cannot be known.
func (c *child) awaitGroup() {
	select {
	case <-c.drained:
	case <-c.expired:
	}
}

// awaitExit returns when the child p has ended, and leaves it a zombie: its pid, which is its
// group's id, is nobody else's until it is waited for. It holds a thread.
func awaitExit(p *os.Process) {
	const idTypePID = 1 // P_PID of waitid(2)
	var info [128]byte  // siginfo_t, which some kernels insist on
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, idTypePID, uintptr(p.Pid), uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if err != syscall.EINTR {
			return
		}
	}
}

type cgroup struct{}

func makeCgroup(string) *cgroup             { return nil }
func (g *cgroup) hold(*syscall.SysProcAttr) {}
func (g *cgroup) path() string              { return "" }
func (g *cgroup) remove()                   {}

func (c *child) groupIsEmpty() bool { return false }

func (l *launcher) descendants() []procInfo { return nil }
func (l *launcher) endStrays(string)        {}
func (l *launcher) sweep(time.Duration)     {}

type guard struct{}

func startGuard(run, cgroup, enginePath string, r *reaper, log *slog.Logger) (*guard, error) {
	return &guard{}, nil
}
func (g *guard) groupStarted(int) {}
func (g *guard) groupEnded(int)   {}
func (g *guard) dismiss()         {}

func runGuard(run, flowctl, cgroup, enginePath string, in io.Reader) {}
