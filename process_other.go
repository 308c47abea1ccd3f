//go:build !linux

package main

// What other systems lack of process_linux.go: without a subreaper and /proc, a process that
// has left the group of its component is out of reach, and nothing ends the components of a
// flowctl that was killed.

import (
	"context"
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

func (r *reaper) startLeader(cmd *exec.Cmd, _ started) error { return cmd.Start() }
func (r *reaper) leaderEnded(int)                            {}
func (r *reaper) leaders() map[int]string                    { return nil }
func (r *reaper) settledLeaders() map[int]string             { return nil }
func (r *reaper) leaderOf(string) int                        { return 0 }
func (r *reaper) leads(int, string) bool                     { return false }

// reapGroup cannot know who is left: the group is empty when its output is closed or it was killed.
func (c *child) reapGroup(options int) bool {
	if options == syscall.WNOHANG {
		return false
	}
	select {
	case <-c.drained:
	case <-c.expired:
	}
	return true
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

func (l *launcher) descendants() []procInfo { return nil }
func (l *launcher) markOwner(int) string    { return "" }
func (l *launcher) ownGroups() bool         { return false }
func (l *launcher) cgroupOwner(int) string  { return "" }
func (l *launcher) noteBelow(int)           {}
func (c *child) endRest()                   { c.reapGroup(0) }

// endGroup kills what is left of a process group: who is in it, nothing tells.
func endGroup(_ context.Context, pid int) { _ = syscall.Kill(-pid, syscall.SIGKILL) }

type guard struct{}

func startGuard(*reaper, *slog.Logger) (*guard, error) { return &guard{}, nil }

func (g *guard) know(guardFacts)  {}
func (g *guard) tell(string, int) {}
func (g *guard) awaitBeat() error { return nil }
func (g *guard) dismiss()         {}

func runGuard(in io.Reader) error { return nil }

func (l *launcher) sweep(time.Duration) []procInfo { return nil }
