//go:build !linux

package main

import (
	"io"
	"os/exec"
	"syscall"
	"time"
)

// What this system's kernel lacks: no subreaper and no /proc, so a process that
// left its component's process group is out of reach, and nothing ends the
// components of a flowctl that was killed.

type reaper struct{}

func newReaper() *reaper                    { return &reaper{} }
func (r *reaper) adopt() error              { return nil }
func (r *reaper) close()                    {}
func (r *reaper) start(cmd *exec.Cmd) error { return cmd.Start() }
func (r *reaper) wait(cmd *exec.Cmd) error  { return cmd.Wait() }

// awaitGroup returns when the output of the group is closed, or when it has been
// killed: who is left in it cannot be known.
func (c *child) awaitGroup() {
	select {
	case <-c.drained:
	case <-c.expired:
	}
}

// awaitExit returns when the process of c has ended, and leaves it a zombie: so its
// id, which is its group's too, stays taken until it is waited for.
func (c *child) awaitExit() { awaitExit(c.pid) }

func (c *child) usePidfd() {}

type cgroup struct{}

func makeCgroup(string) *cgroup             { return nil }
func (g *cgroup) hold(*syscall.SysProcAttr) {}
func (g *cgroup) remove()                   {}

func (c *child) groupIsEmpty() bool { return false }

func (s *supervisor) strays(string) []procInfo { return nil }
func (s *supervisor) descendants() []procInfo  { return nil }
func (s *supervisor) sweep(time.Duration)      {}

type guard struct{}

func startGuard(string, *cgroup, *engine, *reaper) (*guard, error) { return &guard{}, nil }
func (g *guard) ended() <-chan struct{}                            { return nil }
func (g *guard) restart() error                                    { return nil }
func (g *guard) lead(int)                                          {}
func (g *guard) leave(int)                                         {}
func (g *guard) dismiss()                                          {}

func runGuard(string, string, string, string, io.Reader) {}
