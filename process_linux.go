package main

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// What Linux alone offers: flowctl adopts what its components orphan, so that
// nothing can leave its tree of processes, and /proc shows that tree. The guard,
// another process, ends the tree when flowctl itself has been killed.

const (
	prSetChildSubreaper = 36          // PR_SET_CHILD_SUBREAPER of prctl(2)
	idTypePID           = 1           // P_PID of waitid(2)
	idTypeAll           = 0           // P_ALL of waitid(2)
	guardLook           = time.Second // from one look of the guard at what flowctl has adopted to the next, when no component has started lately
	guardTries          = 5           // scans in a row that find nothing before the guard believes it
	guardStep           = 20 * time.Millisecond
	guardGrace          = time.Second            // for a guard that is dismissed to end
	guardProven         = time.Minute            // a guard that has lived so long is replaced at once
	minGuardPause       = 100 * time.Millisecond // before a guard that was killed again is replaced: without one there is a risk
	maxGuardPause       = 2 * time.Second
)

// reaper starts flowctl's children and waits for them, and for those that flowctl
// has adopted. There is one, as there is one flowctl.
type reaper struct {
	look    chan os.Signal // SIGCHLD, and nudges of wait
	stop    chan struct{}  // closed to end the reaping of orphans
	orphans sync.WaitGroup
	adopted chan struct{} // gets a token when an orphan was reaped

	inherited map[int]bool // children that this process had before it became flowctl

	mu    sync.Mutex     // guards known; held over each fork and each look, so that no child is taken for an orphan
	known map[int]string // what flowctl has started, by pid: the component that it leads a group of, "" for helpers
}

func newReaper() *reaper {
	inherited := make(map[int]bool)
	for _, pid := range children() {
		inherited[pid] = true
	}
	return &reaper{inherited: inherited, known: make(map[int]string), look: make(chan os.Signal, 1), stop: make(chan struct{}), adopted: make(chan struct{}, 1)}
}

// adopt makes flowctl the parent of what its descendants orphan, and reaps that
// until close.
func (r *reaper) adopt() error {
	if err := becomeSubreaper(); err != nil {
		return err
	}
	signal.Notify(r.look, syscall.SIGCHLD)
	r.orphans.Go(func() {
		for {
			select {
			case <-r.look:
				r.reapOrphans()
			case <-r.stop:
				return
			}
		}
	})
	return nil
}

func becomeSubreaper() error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); errno != 0 {
		return fmt.Errorf("cannot become a subreaper: %v", errno)
	}
	return nil
}

func (r *reaper) close() {
	signal.Stop(r.look)
	close(r.stop)
	r.orphans.Wait()
}

// hasOrphans tells whether flowctl has children that it has not started itself.
func (r *reaper) hasOrphans() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(children(), func(pid int) bool { return !r.isKnownLocked(pid) && !r.inherited[pid] })
}

// children are the children of this process, zombies too.
func children() []int {
	var pids []int
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	for _, list := range lists {
		data, _ := os.ReadFile(list)
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func (r *reaper) isKnownLocked(pid int) bool {
	_, known := r.known[pid]
	return known
}

// start is cmd.Start for a helper that wait is going to be called for.
func (r *reaper) start(cmd *exec.Cmd) error { return r.startLeader(cmd, "") }

// startLeader is start for a process of component id, or for the command after --. It is a
// leader until leaderEnded is called.
func (r *reaper) startLeader(cmd *exec.Cmd, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := cmd.Start()
	if err == nil {
		r.known[cmd.Process.Pid] = id
	}
	return err
}

// wait is cmd.Wait. An orphan may have had to wait behind this child.
func (r *reaper) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	r.mu.Lock()
	if r.known[cmd.Process.Pid] == "" {
		delete(r.known, cmd.Process.Pid)
	}
	r.mu.Unlock()
	select {
	case r.look <- syscall.SIGCHLD:
	default:
	}
	return err
}

// leaderEnded notes that nothing is left of the group of pid.
func (r *reaper) leaderEnded(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.known, pid)
}

// leaders returns what startLeader has started and what has not ended, by pid.
func (r *reaper) leaders() map[int]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[int]string)
	for pid, id := range r.known {
		if id != "" {
			out[pid] = id
		}
	}
	return out
}

// reapOrphans reaps all zombies up to one that has its own waiter, who will nudge.
func (r *reaper) reapOrphans() {
	for {
		r.mu.Lock()
		pid := zombieChild()
		orphan := pid > 0 && !r.isKnownLocked(pid)
		if orphan {
			_, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		}
		r.mu.Unlock()
		if !orphan {
			return
		}
		select {
		case r.adopted <- struct{}{}:
		default:
		}
	}
}

// zombieChild returns a child that has ended and leaves it so, 0 if there is none.
func zombieChild() int {
	var info [32]int32 // siginfo_t
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, idTypeAll, 0, uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOHANG|syscall.WNOWAIT, 0, 0)
		switch errno {
		case syscall.EINTR:
		case 0:
			// si_pid follows three ints, at the alignment of a pointer.
			return int(info[2+unsafe.Sizeof(uintptr(0))/4])
		default:
			return 0
		}
	}
}

// awaitExit returns when the process of c has ended, and leaves it a zombie: so its
// id, which is its group's too, stays taken until it is waited for. It waits by a
// pidfd, because a thread for each component would soon be a limit.
func (c *child) awaitExit() {
	defer c.closePidfd()
	if c.pidfd < 0 || syscall.SetNonblock(c.pidfd, true) != nil {
		awaitExit(c.pid)
		return
	}
	f := os.NewFile(uintptr(c.pidfd), "pidfd")
	c.pidfd = -1 // f's now
	defer f.Close()
	raw, err := f.SyscallConn()
	if err == nil {
		err = raw.Read(func(uintptr) bool { return hasExited(c.pid) })
	}
	if err != nil { // the poller does not take it
		awaitExit(c.pid)
	}
}

func (c *child) closePidfd() {
	if c.pidfd >= 0 {
		syscall.Close(c.pidfd)
		c.pidfd = -1
	}
}

// hasExited tells whether the child pid is a zombie.
func hasExited(pid int) bool {
	var info [32]int32 // siginfo_t, all zeros where nothing has ended
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, idTypePID, uintptr(pid), uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOHANG|syscall.WNOWAIT, 0, 0)
		if errno != syscall.EINTR {
			return errno != 0 || info[2+unsafe.Sizeof(uintptr(0))/4] != 0
		}
	}
}

// usePidfd has the process of c start with a pidfd.
func (c *child) usePidfd() {
	c.pidfd = -1
	c.cmd.SysProcAttr.PidFD = &c.pidfd
}

// cgroup is a control group of the run's own, where this system lets flowctl make
// one: nothing that starts in it can leave it, so killing it misses nothing.
type cgroup struct {
	folder *os.File
}

// makeCgroup makes one below flowctl's own, nil where that is not possible or not
// allowed: systemd owns the tree but for what it has delegated.
func makeCgroup(run string) *cgroup {
	own := ownCgroup()
	if own == "" {
		return nil
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil && !delegated(own) {
		return nil
	}
	path := filepath.Join(own, "flowctl-"+filepath.Base(run))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil
	}
	folder, err := os.Open(path)
	if err != nil {
		_ = syscall.Rmdir(path)
		return nil
	}
	g := &cgroup{folder}
	if _, err := os.Stat(filepath.Join(path, "cgroup.kill")); err != nil || !g.works() { // since Linux 5.14
		g.remove()
		return nil
	}
	return g
}

// hold has what starts with attr start in the cgroup.
func (g *cgroup) hold(attr *syscall.SysProcAttr) {
	if g != nil {
		attr.UseCgroupFD, attr.CgroupFD = true, int(g.folder.Fd())
	}
}

// works tries whether a process can be started in the cgroup, which a seccomp filter
// can forbid: a program that does not exist is only missed after that.
func (g *cgroup) works() bool {
	cmd := exec.Command("/proc/self/no-such-program")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	g.hold(cmd.SysProcAttr)
	return errors.Is(cmd.Start(), fs.ErrNotExist)
}

// ownCgroup is the folder of the cgroup that flowctl runs in, "" without cgroup v2.
func ownCgroup() string {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	groups, _ := os.ReadFile("/proc/self/cgroup")
	path, found := "", false
	for line := range strings.Lines(string(groups)) {
		if path, found = strings.CutPrefix(strings.TrimSpace(line), "0::"); found {
			break
		}
	}
	for line := range strings.Lines(string(mounts)) {
		mount, kind, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(mount); found && strings.HasPrefix(kind, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return filepath.Join(fields[4], path)
		}
	}
	return ""
}

// delegated tells whether systemd has left this cgroup to its owner (systemd.resource-control(5)).
func delegated(path string) bool {
	value := make([]byte, 8)
	for _, name := range []string{"trusted.delegate", "user.delegate"} {
		if n, err := syscall.Getxattr(path, name, value); err == nil && n > 0 && value[0] == '1' {
			return true
		}
	}
	return false
}

// path is "" for no cgroup.
func (g *cgroup) path() string {
	if g == nil {
		return ""
	}
	return g.folder.Name()
}

// remove takes the cgroup away, in which nothing lives any more.
func (g *cgroup) remove() {
	if g != nil {
		removeCgroup(g.folder.Name())
		g.folder.Close()
	}
}

// removeCgroup takes an empty cgroup away with those below it, which a flowctl that
// was a component of the run may have left.
func removeCgroup(path string) {
	below, _ := os.ReadDir(path)
	for _, entry := range below {
		if entry.IsDir() {
			removeCgroup(filepath.Join(path, entry.Name()))
		}
	}
	_ = syscall.Rmdir(path)
}

// awaitGroup returns when nothing is left of the process group of c, whose leader
// has been waited for: its members are flowctl's own children by then.
func (c *child) awaitGroup() {
	for {
		if _, err := syscall.Wait4(-c.pid, nil, 0, nil); err != nil && err != syscall.EINTR {
			return
		}
	}
}

// groupIsEmpty tells that of a group whose leader has been waited for.
func (c *child) groupIsEmpty() bool {
	for {
		switch pid, err := syscall.Wait4(-c.pid, nil, syscall.WNOHANG, nil); {
		case err == syscall.EINTR || pid > 0:
		case err != nil:
			return true
		default:
			return false
		}
	}
}

// hasMark tells whether a process was started with run in its environment, or with
// that of a flowctl that itself belongs to run.
func hasMark(pid int, run string) bool {
	env := environ(pid)
	mark := "\x00" + runMark + "=" + run
	return bytes.Contains(env, []byte(mark+"\x00")) || bytes.Contains(env, []byte(mark+"/"))
}

// endStrays kills what component id has started and what has left its process group.
// Their environment tells. It does not wait for their end.
func (l *launcher) endStrays(id string) {
	if !l.config.reaper.hasOrphans() {
		return // what its leader has left is flowctl's child now
	}
	for _, p := range processes() {
		if owner, ok := markedComponent(p.pid, runMark+"="+l.mark); ok && owner == id {
			l.config.log.Warn("ending what left its process group", "component", id, "pid", p.pid, "name", p.name)
			p.send(syscall.SIGKILL)
		}
	}
}

// descendants returns all that lives below flowctl, but for the guard.
func (l *launcher) descendants() []procInfo {
	all := slices.DeleteFunc(processes(), func(p procInfo) bool { return l.config.reaper.inherited[p.pid] })
	self, guard := os.Getpid(), l.guard.pid() // one that is started meanwhile is known by now
	chosen := map[int]bool{self: true}
	withDescendants(all, chosen)
	return slices.DeleteFunc(all, func(p procInfo) bool { return !chosen[p.pid] || p.pid == self || p.pid == guard })
}

// sweep ends all that is left below flowctl when every component is over: first by
// SIGTERM, after grace by SIGKILL. It gives up on what does not die of that.
func (l *launcher) sweep(grace time.Duration) {
	sig, deadline := syscall.SIGTERM, time.Now().Add(grace)
	told := make(map[int]bool)
	for {
		left := l.descendants()
		// A scan of /proc can miss a process whose parent ends meanwhile, but not the
		// child of flowctl's that it becomes.
		if len(left) == 0 && !l.config.reaper.hasOrphans() {
			return
		}
		for _, p := range left {
			if !told[p.pid] {
				l.config.log.Warn("ending what left its component", "pid", p.pid, "name", p.name, "signal", sig.String())
				told[p.pid] = true
				p.send(sig)
			}
		}
		wait := time.Until(deadline)
		if len(left) == 0 {
			wait = guardStep // a child that the scan missed, or a zombie that is being reaped
		}
		timer := time.NewTimer(wait)
		select {
		case <-l.config.reaper.adopted:
		case <-timer.C:
		}
		timer.Stop()
		if time.Now().Before(deadline) {
			continue
		}
		if sig == syscall.SIGKILL {
			l.config.log.Error("still running after SIGKILL", "processes", len(left))
			return
		}
		sig, deadline = syscall.SIGKILL, time.Now().Add(killPatience)
		clear(told)
	}
}

// guard is the process that ends a run whose flowctl was killed. It reads from a
// pipe which leaders of process groups live; the end of that pipe, without a word, is
// the end of flowctl. A guard that is killed is replaced.
type guard struct {
	args      []string // of the process: what it has to know of the run
	reaper    *reaper
	log       *slog.Logger
	dismissed chan struct{} // closed when its end is no accident any more
	keeping   sync.WaitGroup

	mu  sync.Mutex // guards the fields below
	cmd *exec.Cmd
	in  *os.File
}

// guardName is what the guard is called, so that who kills flowctl by its name, as
// pkill does, does not kill the guard as well.
const guardName = "run-guard"

// startGuard starts the guard of run, and replaces it until dismiss is called.
func startGuard(run, cgroup, enginePath string, r *reaper, log *slog.Logger) (*guard, error) {
	g := &guard{args: []string{run, strconv.Itoa(os.Getpid()), cgroup, enginePath}, reaper: r, log: log, dismissed: make(chan struct{})}
	if err := g.start(); err != nil {
		return nil, err
	}
	g.keeping.Go(g.keep)
	return g, nil
}

// start starts the process, in a session of its own, where no terminal reaches it,
// and without a mark in its environment, so that it is no part of a run, its own or
// that which this flowctl may be a component of.
func (g *guard) start() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	defer theirs.Close()
	// The link stays good when the file that flowctl was started from is replaced.
	cmd := exec.Command("/proc/self/exe", append([]string{"guard"}, g.args...)...)
	cmd.Args[0] = guardName
	cmd.Stdin, cmd.Dir = theirs, "/"
	cmd.Env = slices.DeleteFunc(baseEnv(), func(entry string) bool { return strings.HasPrefix(entry, runMark+"=") })
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := g.reaper.start(cmd); err != nil {
		ours.Close()
		return err
	}
	g.cmd, g.in = cmd, ours
	for pid := range g.reaper.inherited {
		g.tellLocked("spare", pid)
	}
	for pid := range g.reaper.leaders() {
		g.tellLocked("started", pid)
	}
	return nil
}

// keep replaces the guard whenever it is killed: at once, or later and later where that
// happens again and again.
func (g *guard) keep() {
	pause := time.Duration(0)
	for {
		began := time.Now()
		_ = g.reaper.wait(g.cmd)
		if time.Since(began) > guardProven {
			pause = 0
		}
		if g.isDismissed(0) {
			return
		}
		g.log.Warn("the guard was killed: until there is another, a flowctl that is killed leaves components behind", "in", pause)
		for {
			if g.isDismissed(pause) {
				return
			}
			pause = min(max(2*pause, minGuardPause), maxGuardPause)
			g.in.Close()
			err := g.start()
			if err == nil {
				break
			}
			g.log.Error("cannot start the guard", "err", err)
		}
		g.log.Info("guarded again")
	}
}

// isDismissed tells whether the guard is dismissed within d.
func (g *guard) isDismissed(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-g.dismissed:
		return true
	case <-timer.C:
	}
	select {
	case <-g.dismissed:
		return true
	default:
		return false
	}
}

func (g *guard) pid() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.cmd.Process.Pid
}

// groupStarted tells the guard that pid leads a process group from now on.
func (g *guard) groupStarted(pid int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tellLocked("started", pid)
}

// groupEnded tells the guard that nothing is left of the group of pid.
func (g *guard) groupEnded(pid int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tellLocked("ended", pid)
}

// tellLocked sends a line, and never waits. A guard that has not read thousands of lines
// is as good as gone: it is killed, so that keep replaces it.
func (g *guard) tellLocked(word string, pid int) {
	line := fmt.Sprintf("%s %d\n", word, pid)
	raw, err := g.in.SyscallConn()
	if err != nil {
		return // it has been closed: the guard was killed
	}
	_ = raw.Write(func(fd uintptr) bool {
		_, err = syscall.Write(int(fd), []byte(line)) // whole or not at all: pipe(7), PIPE_BUF
		return true
	})
	if err == syscall.EAGAIN {
		_ = g.cmd.Process.Kill()
	}
}

// dismiss tells the guard that all is well and waits for its end, which it is made
// to come to.
func (g *guard) dismiss() {
	close(g.dismissed)
	g.mu.Lock()
	g.tellLocked("end", 0)
	g.in.Close()
	timer := time.AfterFunc(guardGrace, func() { _ = g.cmd.Process.Kill() })
	g.mu.Unlock()
	g.keeping.Wait()
	timer.Stop()
}

// runGuard is the guard itself. It returns when it was dismissed, or when nothing of
// the run is left that can be killed.
func runGuard(run, flowctl, cgroup, enginePath string, in io.Reader) {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE, syscall.SIGTSTP)
	_ = os.WriteFile("/proc/self/comm", []byte(guardName), 0)
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(10) // a few kilobytes live here, so collecting costs nothing
	trimMemory()
	w := &ward{run: run, leaders: make(map[int]uint64), adopted: make(map[int]uint64), spared: make(map[int]bool)}
	w.flowctl, _ = strconv.Atoi(flowctl)
	if p, ok := readProcess(w.flowctl); ok && w.flowctl == os.Getppid() {
		w.begun = p.begun
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for scanner := bufio.NewScanner(in); scanner.Scan(); {
			lines <- scanner.Text()
		}
	}()
	if w.watch(lines) {
		return
	}
	deadline := time.Now().Add(2 * killPatience)
	for quiet := 0; quiet < guardTries && time.Now().Before(deadline); {
		quiet++
		// The tree first, while it stands: the kernel passes over a process whose main
		// thread has ended when it kills a cgroup.
		left := w.processes()
		if cgroup != "" {
			_ = os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0)
		}
		for _, p := range left {
			quiet = 0
			p.send(syscall.SIGKILL)
		}
		time.Sleep(guardStep) // nothing tells of a process that is about to be forked
	}
	if cgroup != "" {
		removeCgroup(cgroup)
	}
	if enginePath != "" {
		removeLeft(enginePath, run)
	}
}

// removeLeft removes the containers of run, of which the engine may still be making
// one for a command line that was killed.
func removeLeft(enginePath, run string) {
	e, err := findEngine(enginePath)
	if err != nil {
		return
	}
	e.commands, e.env = newReaper(), baseEnv()
	deadline := time.Now().Add(2 * engineTimeout)
	for quiet := 0; quiet < guardTries && time.Now().Before(deadline); quiet++ {
		if names, _ := e.remove(context.Background(), "label="+labelRun+"="+run); len(names) > 0 {
			quiet = 0
		}
		time.Sleep(10 * guardStep) // nothing tells of a container that is about to be made
	}
}

// ward is what the guard knows of its run. Processes are known by their pid and by
// when they began.
type ward struct {
	run     string
	flowctl int    // its pid
	begun   uint64 // when flowctl began: nothing of the run did before
	leaders map[int]uint64
	adopted map[int]uint64 // flowctl's children by adoption, which may have neither mark nor group
	spared  map[int]bool   // children that flowctl had before it was flowctl
}

// watch follows the run until flowctl dismisses the guard, which is true, or dies.
func (w *ward) watch(lines <-chan string) bool {
	trimmed := false
	step := guardStep // programs that make daemons do it when they start
	timer := time.NewTimer(step)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			w.lookAtAdopted()
			step = min(2*step, guardLook)
			if !trimmed {
				debug.FreeOSMemory()
				trimMemory()
			}
			trimmed = step == guardLook
			timer.Reset(step)
		case line, ok := <-lines:
			word, arg, _ := strings.Cut(line, " ")
			pid, _ := strconv.Atoi(arg)
			switch {
			case !ok:
				return false
			case word == "end":
				return true
			case word == "started":
				p, _ := readProcess(pid)
				w.leaders[pid] = p.begun
				step = guardStep
				timer.Reset(step)
			case word == "ended":
				delete(w.leaders, pid)
			case word == "spare":
				w.spared[pid] = true
			}
		}
	}
}

// lookAtAdopted notes the children of flowctl's main thread: the kernel makes them
// that thread's when it gives flowctl an orphan (find_new_reaper in kernel/exit.c).
// What was seen once is kept until it ends, because a flowctl that is dying has no
// children any more.
func (w *ward) lookAtAdopted() {
	if os.Getppid() != w.flowctl {
		return // it is gone, and its number could be another's
	}
	maps.DeleteFunc(w.adopted, func(pid int, begun uint64) bool {
		p, ok := readProcess(pid)
		return !ok || p.begun != begun
	})
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", w.flowctl))
	for _, field := range strings.Fields(string(data)) {
		pid, _ := strconv.Atoi(field)
		if p, ok := readProcess(pid); ok && p.parent == w.flowctl && pid != os.Getpid() && !w.spared[pid] {
			w.adopted[pid] = p.begun
		}
	}
}

// processes finds what belongs to the run: what has its mark, the leaders and their
// groups, what flowctl adopted, and all that descends from those.
func (w *ward) processes() []procInfo {
	all := slices.DeleteFunc(processes(), func(p procInfo) bool { return p.begun < w.begun })
	chosen := make(map[int]bool)
	foreign := make(map[int]bool) // was a leader's pid and is someone else's
	for _, p := range all {
		if begun, ok := w.leaders[p.pid]; ok && begun != p.begun {
			foreign[p.pid] = true
		}
	}
	for _, p := range all {
		_, led := w.leaders[p.group]
		begun, adopted := w.adopted[p.pid]
		chosen[p.pid] = led && !foreign[p.group] || adopted && begun == p.begun || hasMark(p.pid, w.run)
	}
	withDescendants(all, chosen)
	return slices.DeleteFunc(all, func(p procInfo) bool { return !chosen[p.pid] || p.pid == os.Getpid() })
}

// trimMemory gives back the pages of the program that starting has touched and that
// nobody can have written to, which its ELF header tells: what is needed again is
// read again.
func trimMemory() {
	exe, err := elf.Open("/proc/self/exe")
	if err != nil || exe.Type != elf.ET_EXEC { // else the header does not tell the addresses
		return
	}
	defer exe.Close()
	page := uint64(os.Getpagesize())
	for _, segment := range exe.Progs {
		if segment.Type == elf.PT_LOAD && segment.Flags&elf.PF_W == 0 {
			from := segment.Vaddr &^ (page - 1)
			_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, uintptr(from), uintptr(segment.Vaddr+segment.Filesz-from), syscall.MADV_DONTNEED)
		}
	}
}
