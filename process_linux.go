package main

// What Linux alone offers to process.go, in this order: the reaper, which makes flowctl the
// parent of what its components orphan, so that nothing leaves its tree of processes; the
// control group; and the guard, another process, which ends the tree when flowctl itself
// has been killed.

import (
	"bufio"
	"bytes"
	"context"
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
)

const (
	prSetChildSubreaper = 36 // PR_SET_CHILD_SUBREAPER of prctl(2)
	idTypePID           = 1  // P_PID of waitid(2)
	idTypePIDFD         = 3  // P_PIDFD of waitid(2)

	// guardName is what the guard is called, so that who kills flowctl by its name, as
	// pkill does, does not kill the guard as well.
	guardName = "run-guard"

	scanStep      = 20 * time.Millisecond  // between two scans for what nothing tells of
	scanTries     = 5                      // scans in a row that find nothing before the guard believes it
	guardInterval = time.Second            // between two looks of the guard at what flowctl has adopted, when nothing has started lately
	guardGrace    = time.Second            // for a guard that is dismissed to end
	guardProven   = time.Minute            // a guard that has lived so long is replaced at once
	minGuardPause = 100 * time.Millisecond // before a guard that was killed again is replaced: without one there is a risk
	maxGuardPause = 2 * time.Second
)

// reaper starts flowctl's children and waits for them, and for those that flowctl has
// adopted. There is one, as there is one flowctl.
type reaper struct {
	sigchld   chan os.Signal
	closed    chan struct{} // closed to end the reaping of orphans
	reaping   sync.WaitGroup
	reaped    chan struct{} // gets a token when an orphan was reaped
	inherited map[int]bool  // children that this process had before it became flowctl

	mu    sync.Mutex     // guards known; held over each fork and each scan, so that no child is taken for an orphan
	known map[int]string // what flowctl has started, by pid: the component that it leads a group of, "" for helpers
}

func newReaper() *reaper {
	inherited := make(map[int]bool)
	for _, pid := range children() {
		inherited[pid] = true
	}
	return &reaper{
		sigchld: make(chan os.Signal, 1), closed: make(chan struct{}), reaped: make(chan struct{}, 1),
		inherited: inherited, known: make(map[int]string),
	}
}

// adopt makes flowctl the parent of what its descendants orphan, and reaps that
// until close.
func (r *reaper) adopt() error {
	if err := becomeSubreaper(); err != nil {
		return err
	}
	signal.Notify(r.sigchld, syscall.SIGCHLD)
	r.reaping.Go(func() {
		for {
			select {
			case <-r.sigchld:
				r.reapOrphans()
			case <-r.closed:
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
	signal.Stop(r.sigchld)
	close(r.closed)
	r.reaping.Wait()
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

// wait is cmd.Wait.
func (r *reaper) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known[cmd.Process.Pid] == "" {
		delete(r.known, cmd.Process.Pid)
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

// reapOrphans reaps what has ended of the children that flowctl has not started.
func (r *reaper) reapOrphans() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, pid := range children() {
		if _, known := r.known[pid]; known {
			continue
		}
		if reaped, _ := syscall.Wait4(pid, nil, syscall.WNOHANG, nil); reaped == pid {
			select {
			case r.reaped <- struct{}{}:
			default:
			}
		}
	}
}

// hasOrphans tells whether flowctl has children that it has not started itself.
func (r *reaper) hasOrphans() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(children(), func(pid int) bool {
		_, known := r.known[pid]
		return !known && !r.inherited[pid]
	})
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

// awaitExit returns when the process p, a child, has ended, and leaves it a zombie: so its
// id, which is its group's too, stays taken until it is waited for. It waits by a pidfd,
// because a thread for each component would soon be a limit; where there is none, it
// holds a thread.
func awaitExit(p *os.Process) {
	var fd uintptr
	errno := syscall.EBADF
	_ = p.WithHandle(func(handle uintptr) {
		fd, _, errno = syscall.Syscall(syscall.SYS_FCNTL, handle, syscall.F_DUPFD_CLOEXEC, 0)
	})
	if errno == 0 && syscall.SetNonblock(int(fd), true) == nil {
		f := os.NewFile(fd, "pidfd")
		defer f.Close()
		if raw, err := f.SyscallConn(); err == nil && raw.Read(func(fd uintptr) bool { return hasExited(idTypePIDFD, fd) }) == nil {
			return
		}
	}
	hasExited(idTypePID, uintptr(p.Pid))
}

// hasExited tells whether a child is a zombie. Only where id is a pidfd that does not block
// it can tell that it is not (since Linux 5.10): it waits otherwise.
func hasExited(idType int, id uintptr) bool {
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, uintptr(idType), id, 0, syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if errno != syscall.EINTR {
			return errno != syscall.EAGAIN
		}
	}
}

// groupIsEmpty tells whether nothing is left of the process group of c, whose leader has
// been waited for: its members are flowctl's own children by then.
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

// awaitGroup returns when groupIsEmpty is true.
func (c *child) awaitGroup() {
	for {
		if _, err := syscall.Wait4(-c.pid, nil, 0, nil); err != nil && err != syscall.EINTR {
			return
		}
	}
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

// descendants returns all that lives below flowctl, except the guard and what flowctl has
// inherited.
func (l *launcher) descendants() []procInfo {
	all := slices.DeleteFunc(processes(), func(p procInfo) bool { return l.config.reaper.inherited[p.pid] })
	self, guard := os.Getpid(), l.guard.pid() // after the scan: it can have a new one
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
			wait = scanStep // a child that the scan missed, or a zombie that is being reaped
		}
		timer := time.NewTimer(wait)
		select {
		case <-l.config.reaper.reaped:
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
	g := &guardState{run: run, leaders: make(map[int]uint64), adopted: make(map[int]uint64), spared: make(map[int]bool)}
	g.flowctl, _ = strconv.Atoi(flowctl)
	if p, ok := readProcess(g.flowctl); ok && g.flowctl == os.Getppid() {
		g.begun = p.begun
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for scanner := bufio.NewScanner(in); scanner.Scan(); {
			lines <- scanner.Text()
		}
	}()
	if g.watch(lines) {
		return
	}
	g.killRun(cgroup)
	if enginePath != "" {
		removeContainersOf(run, enginePath)
	}
}

// guardState is what the guard knows of its run. A process is known by its pid and by
// when it began.
type guardState struct {
	run     string
	flowctl int    // its pid
	begun   uint64 // when flowctl began: nothing of the run did before
	leaders map[int]uint64
	adopted map[int]uint64 // flowctl's children by adoption, which may have neither mark nor group
	spared  map[int]bool   // children that flowctl had before it was flowctl
}

// watch follows the run until flowctl dismisses the guard, which is true, or dies.
func (g *guardState) watch(lines <-chan string) bool {
	step := scanStep // programs that make daemons do it when they start
	timer := time.NewTimer(step)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			g.noteAdopted()
			if step < guardInterval && 2*step >= guardInterval {
				dropProgram() // nothing has started for a while
			}
			step = min(2*step, guardInterval)
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
				g.leaders[pid] = p.begun
				step = scanStep
				timer.Reset(step)
			case word == "ended":
				delete(g.leaders, pid)
			case word == "spare":
				g.spared[pid] = true
			}
		}
	}
}

// dropProgram gives back the pages of the program that starting has touched, two thirds of
// what the guard has resident: what is needed of them again is read from the file again. It
// passes over mappings that have a page of the guard's own, written to before it was made
// read-only.
func dropProgram() {
	smaps, _ := os.ReadFile("/proc/self/smaps")
	var from, to uintptr
	var mode string
	own := 0 // kB
	for line := range strings.Lines(string(smaps)) {
		fields := strings.Fields(line)
		switch fields[0] {
		default:
			if !strings.HasSuffix(fields[0], ":") { // the first line of a mapping
				_, _ = fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode)
				own = 0
				if len(fields) < 6 || fields[5][0] != '/' {
					own = 1
				}
			}
		case "Anonymous:":
			kB, _ := strconv.Atoi(fields[1])
			own += kB
		case "Swap:":
			kB, _ := strconv.Atoi(fields[1])
			if own += kB; own == 0 && mode[1] != 'w' {
				_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, from, to-from, syscall.MADV_DONTNEED)
			}
		}
	}
}

// noteAdopted notes the children of flowctl's main thread: the kernel makes them
// that thread's when it gives flowctl an orphan (find_new_reaper in kernel/exit.c).
// What was seen once is kept until it ends, because a flowctl that is dying has no
// children any more.
func (g *guardState) noteAdopted() {
	if os.Getppid() != g.flowctl {
		return // it is gone, and its number could be another's
	}
	maps.DeleteFunc(g.adopted, func(pid int, begun uint64) bool {
		p, ok := readProcess(pid)
		return !ok || p.begun != begun
	})
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", g.flowctl))
	for _, field := range strings.Fields(string(data)) {
		pid, _ := strconv.Atoi(field)
		if p, ok := readProcess(pid); ok && p.parent == g.flowctl && pid != os.Getpid() && !g.spared[pid] {
			g.adopted[pid] = p.begun
		}
	}
}

// killRun kills what belongs to the run until nothing is found any more, or the time for
// that is over.
func (g *guardState) killRun(cgroup string) {
	deadline := time.Now().Add(2 * killPatience)
	for quiet := 0; quiet < scanTries && time.Now().Before(deadline); {
		quiet++
		// The tree first, while it stands: the kernel passes over a process whose main
		// thread has ended when it kills a cgroup.
		left := g.processes()
		if cgroup != "" {
			_ = os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0)
		}
		for _, p := range left {
			quiet = 0
			p.send(syscall.SIGKILL)
		}
		time.Sleep(scanStep) // nothing tells of a process that is about to be forked
	}
	if cgroup != "" {
		removeCgroup(cgroup)
	}
}

// processes finds what belongs to the run: what has its mark, the leaders and their
// groups, what flowctl adopted, and all that descends from those.
func (g *guardState) processes() []procInfo {
	all := slices.DeleteFunc(processes(), func(p procInfo) bool { return p.begun < g.begun })
	chosen := make(map[int]bool)
	reused := make(map[int]bool) // was a leader's pid and is someone else's
	for _, p := range all {
		if begun, ok := g.leaders[p.pid]; ok && begun != p.begun {
			reused[p.pid] = true
		}
	}
	for _, p := range all {
		_, leads := g.leaders[p.pid]
		_, led := g.leaders[p.group]
		begun, adopted := g.adopted[p.pid]
		chosen[p.pid] = leads && !reused[p.pid] || led && !reused[p.group] || adopted && begun == p.begun || hasMark(p.pid, g.run)
	}
	withDescendants(all, chosen)
	return slices.DeleteFunc(all, func(p procInfo) bool { return !chosen[p.pid] || p.pid == os.Getpid() })
}

// hasMark tells whether a process was started with run in its environment, or with
// that of a flowctl that itself belongs to run.
func hasMark(pid int, run string) bool {
	env := environ(pid)
	mark := "\x00" + runMark + "=" + run
	return bytes.Contains(env, []byte(mark+"\x00")) || bytes.Contains(env, []byte(mark+"/"))
}

// removeContainersOf removes the containers of run, of which the engine may still be making
// one for a command line that was killed.
func removeContainersOf(run, enginePath string) {
	e, err := findEngine(enginePath)
	if err != nil {
		return
	}
	e.commands, e.env = newReaper(), baseEnv()
	deadline := time.Now().Add(2 * engineTimeout)
	for quiet := 0; quiet < scanTries && time.Now().Before(deadline); quiet++ {
		if names, _ := e.remove(context.Background(), "label="+labelRun+"="+run); len(names) > 0 {
			quiet = 0
		}
		time.Sleep(10 * scanStep) // nothing tells of a container that is about to be made
	}
}
