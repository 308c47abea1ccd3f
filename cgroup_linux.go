package main

// The control group of a run, and those of its components in it.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
)

// cgroup is the control group of the run, where the system lets flowctl make one. Nothing that
// starts in it leaves it, so killing it misses nothing. A nil one stands for none.
type cgroup struct {
	folder *os.File

	mu    sync.Mutex         // guards the fields below
	parts map[string]*cgroup // by component
	made  int                // parts
}

// makeCgroup makes a control group below flowctl's own. It returns nil where that is not
// possible or not allowed: systemd owns the tree except for what it has delegated.
func makeCgroup(run string) *cgroup {
	own := processCgroup(os.Getpid())
	if own == "" {
		return nil
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil && !delegated(own) {
		return nil
	}
	g := newCgroup(filepath.Join(own, "flowctl-"+filepath.Base(run)))
	if g == nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(g.path(), "cgroup.kill")); err != nil || !g.works() { // since Linux 5.14
		g.remove()
		return nil
	}
	return g
}

// partPrefix begins the name of a component's control group, which goes on with a number, a dash
// and its id. No file of the kernel's is called so.
const partPrefix = "component-"

// newCgroup makes the control group with that folder, nil where it cannot.
func newCgroup(path string) *cgroup {
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil
	}
	folder, err := os.Open(path)
	if err != nil {
		_ = syscall.Rmdir(path)
		return nil
	}
	return &cgroup{folder: folder, parts: make(map[string]*cgroup)}
}

// part returns the control group of component id, below g, or g where there can be none.
func (g *cgroup) part(id string) *cgroup {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.parts[id] == nil {
		if part := newCgroup(filepath.Join(g.path(), fmt.Sprintf("%s%d-%s", partPrefix, g.made, id))); part != nil {
			g.made++
			g.parts[id] = part
		} else {
			return g
		}
	}
	return g.parts[id]
}

// removePart removes the control group of a component, in which nothing lives any more.
func (g *cgroup) removePart(id string) { removeCgroup(g.retirePart(id)) }

// retirePart returns the folder of a component's control group, "" for none, and has the next
// process of the component start in another one: what is started into a control group that was
// killed is killed, too (seen with Linux 6.18). Its folder goes with that of the run.
func (g *cgroup) retirePart(id string) string {
	if g == nil {
		return ""
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.parts[id] == nil {
		return ""
	}
	part := g.parts[id]
	delete(g.parts, id)
	part.folder.Close()
	return part.path()
}

// hold has what is started with attr start in the cgroup.
func (g *cgroup) hold(attr *syscall.SysProcAttr) {
	if g != nil {
		attr.UseCgroupFD, attr.CgroupFD = true, int(g.folder.Fd())
	}
}

// works tells whether a process can be started in the cgroup, which a seccomp filter can
// forbid. It tries with a program that does not exist: the kernel notices that later.
func (g *cgroup) works() bool {
	cmd := exec.Command("/proc/self/no-such-program")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	g.hold(cmd.SysProcAttr)
	return errors.Is(cmd.Start(), fs.ErrNotExist)
}

// delegated tells whether systemd has left a control group to its owner (Delegate= of the unit).
func delegated(path string) bool {
	value := make([]byte, 8)
	for _, name := range []string{"trusted.delegate", "user.delegate"} {
		if n, err := syscall.Getxattr(path, name, value); err == nil && n > 0 && value[0] == '1' {
			return true
		}
	}
	return false
}

// path returns the folder, "" for no cgroup.
func (g *cgroup) path() string {
	if g == nil {
		return ""
	}
	return g.folder.Name()
}

// remove removes the cgroup, in which nothing lives any more.
func (g *cgroup) remove() {
	if g == nil {
		return
	}
	for id := range g.parts {
		g.retirePart(id)
	}
	removeCgroup(g.folder.Name())
	g.folder.Close()
}

// removeCgroup removes an empty control group and those that a flowctl has left below it.
func removeCgroup(path string) {
	if path == "" {
		return
	}
	below, _ := os.ReadDir(path)
	for _, entry := range below {
		if entry.IsDir() {
			removeCgroup(filepath.Join(path, entry.Name()))
		}
	}
	_ = syscall.Rmdir(path)
}
