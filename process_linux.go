package main

// What process.go has on Linux alone, in this order: the reaper, by which flowctl becomes the
// parent of what its components orphan, so that nothing leaves its tree of processes; the
// search for what has left its component; the control group; the guard, a process that ends
// the tree when flowctl itself was killed.

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

	scanStep      = 20 * time.Millisecond  // between two scans for processes that no event tells of
	scanTries     = 5                      // scans in a row that find nothing, after which the guard takes the run for ended
	guardInterval = time.Second            // at most between two looks of the guard at what flowctl has adopted; it is scanStep after a start
	guardGrace    = time.Second            // for a guard that is dismissed to end
	guardProven   = time.Minute            // a guard that has lived so long is replaced at once
	minGuardPause = 100 * time.Millisecond // before a guard that was killed again is replaced: without one there is a risk
	maxGuardPause = 2 * time.Second
)

// reaper starts flowctl's children, and reaps those that flowctl has adopted: orphans. A
// process has one.
type reaper struct {
	sigchld   chan os.Signal
	closed    chan struct{} // closed to end the reaping of orphans
	reaping   sync.WaitGroup
	reaped    chan struct{} // gets a token when an orphan was reaped
	inherited map[int]bool  // children that this process had before it became flowctl

	mu    sync.Mutex     // guards known; held while a child starts and while orphans are looked for, so that no child is taken for one
	known map[int]string // the processes that flowctl has started, by pid: of which component, "" for helpers
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

// adopt makes flowctl the parent of what its descendants orphan, and reaps that until close.
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

// start starts a helper, such as the guard or a command of a container engine. The caller
// calls wait.
func (r *reaper) start(cmd *exec.Cmd) error { return r.startLeader(cmd, "") }

// startLeader starts a process of component id, or the command after --. The caller waits for
// it and calls leaderEnded.
func (r *reaper) startLeader(cmd *exec.Cmd, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := cmd.Start()
	if err == nil {
		r.known[cmd.Process.Pid] = id
	}
	return err
}

// wait waits for a helper.
func (r *reaper) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	r.leaderEnded(cmd.Process.Pid)
	return err
}

// leaderEnded notes that pid was waited for and that nothing is left of its group.
func (r *reaper) leaderEnded(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.known, pid)
}

// leaders returns the component of each process that startLeader has started and that has
// not ended, by pid.
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

// reapOrphans reaps the orphans that have ended.
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

// hasOrphans tells whether flowctl has orphans, zombies included.
func (r *reaper) hasOrphans() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(children(), func(pid int) bool {
		_, known := r.known[pid]
		return !known && !r.inherited[pid]
	})
}

// children returns the children of this process, zombies included.
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

// awaitExit returns when the child p has ended, and leaves it a zombie: its pid, which is its
// group's id, is nobody else's until it is waited for. It waits by a pidfd and the runtime's
// poller, because a thread for each component would soon be a limit. Without a pidfd (before
// Linux 5.4) it holds a thread.
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

// hasExited returns true when the child id is a zombie. It returns false for one that runs if id
// is a pidfd that does not block (since Linux 5.10), and else waits for its end.
func hasExited(idType int, id uintptr) bool {
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, uintptr(idType), id, 0, syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if errno != syscall.EINTR {
			return errno != syscall.EAGAIN
		}
	}
}

// groupIsEmpty tells whether nothing is left of the process group of c. The leader has been
// waited for, so all members are flowctl's own children.
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

// endStrays kills the processes that have left the group of component id, which has ended.
// They are known by their environment. It does not wait for their end.
func (l *launcher) endStrays(id string) {
	if !l.config.reaper.hasOrphans() {
		return // there are none: they would be orphans now
	}
	for _, p := range processes() {
		if owner, ok := markedComponent(p.pid, runMark+"="+l.mark); ok && owner == id {
			l.config.log.Warn("ending what left its process group", "component", id, "pid", p.pid, "name", p.name)
			p.send(syscall.SIGKILL)
		}
	}
}

// descendants returns all processes below flowctl, except the guard and those that flowctl
// has inherited.
func (l *launcher) descendants() []procInfo {
	all := slices.DeleteFunc(processes(), func(p procInfo) bool { return l.config.reaper.inherited[p.pid] })
	self, guard := os.Getpid(), l.guard.pid() // read after the scan, which may have found a new guard
	chosen := map[int]bool{self: true}
	withDescendants(all, chosen)
	return slices.DeleteFunc(all, func(p procInfo) bool { return !chosen[p.pid] || p.pid == self || p.pid == guard })
}

// sweep ends all that is left below flowctl when no component runs any more: by SIGTERM, and
// after grace by SIGKILL. It gives up on what lives on after killPatience.
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

// cgroup is the control group of the run, where the system lets flowctl make one. Nothing that
// starts in it leaves it, so killing it misses nothing. A nil one stands for none.
type cgroup struct {
	folder *os.File
}

// makeCgroup makes a control group below flowctl's own. It returns nil where that is not
// possible or not allowed: systemd owns the tree except for what it has delegated.
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

// ownCgroup returns the folder of the control group that flowctl runs in, "" without cgroup v2.
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

// delegated tells whether systemd has left a control group to its owner (Delegate= of
// systemd.resource-control(5)).
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
	if g != nil {
		removeCgroup(g.folder.Name())
		g.folder.Close()
	}
}

// removeCgroup removes an empty control group and those below it: a flowctl that was a
// component of the run may have left some.
func removeCgroup(path string) {
	below, _ := os.ReadDir(path)
	for _, entry := range below {
		if entry.IsDir() {
			removeCgroup(filepath.Join(path, entry.Name()))
		}
	}
	_ = syscall.Rmdir(path)
}

// guard is the guard as flowctl sees it: a process that ends the run when flowctl was killed.
// It reads from a pipe which process groups there are; when the pipe ends without the line
// "end", flowctl was killed. A guard that is killed itself is replaced.
type guard struct {
	args      []string // of the process
	reaper    *reaper
	log       *slog.Logger
	dismissed chan struct{} // closed when the guard is to end
	keeping   sync.WaitGroup

	mu  sync.Mutex // guards the fields below; nobody who holds it waits
	cmd *exec.Cmd
	in  *os.File // the pipe; it does not block
}

// startGuard starts the guard of the run with that mark, and replaces it until dismiss is
// called. cgroup and enginePath are "" for none.
func startGuard(run, cgroup, enginePath string, r *reaper, log *slog.Logger) (*guard, error) {
	g := &guard{args: []string{run, strconv.Itoa(os.Getpid()), cgroup, enginePath}, reaper: r, log: log, dismissed: make(chan struct{})}
	if err := g.start(); err != nil {
		return nil, err
	}
	g.keeping.Go(g.keep)
	return g, nil
}

var errDismissed = errors.New("the guard is dismissed")

// start starts the process. It has a session of its own, where no terminal reaches it, and no
// mark in its environment, so that it belongs to no run: neither to this one nor to that of
// an outer flowctl.
func (g *guard) start() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.isDismissed(0) {
		return errDismissed
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	defer theirs.Close()
	// This link stays good when the file of the program is replaced.
	cmd := exec.Command("/proc/self/exe", append([]string{"guard"}, g.args...)...)
	cmd.Args[0] = guardName
	cmd.Stdin, cmd.Dir = theirs, "/"
	cmd.Env = baseEnv()
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

// keep waits for the guard and replaces it when it was killed: at once the first time, then
// after a pause that grows.
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
			if err == errDismissed {
				return
			}
			if err == nil {
				break
			}
			g.log.Error("cannot start the guard", "err", err)
		}
		g.log.Info("guarded again")
	}
}

// isDismissed returns true when the guard is dismissed, and false after d.
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

// groupStarted tells the guard that the process group pid has started.
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

// tellLocked writes a line to the guard, and never waits. A guard that does not read until the
// pipe is full is killed, so that keep replaces it.
func (g *guard) tellLocked(word string, pid int) {
	line := fmt.Sprintf("%s %d\n", word, pid)
	raw, err := g.in.SyscallConn()
	if err != nil {
		return // closed, because the guard was killed: the next one gets it by start
	}
	_ = raw.Write(func(fd uintptr) bool {
		_, err = syscall.Write(int(fd), []byte(line)) // whole or not at all: pipe(7), PIPE_BUF
		return true
	})
	if err == syscall.EAGAIN {
		_ = g.cmd.Process.Kill()
	}
}

// dismiss tells the guard to end, and waits for that. After guardGrace it kills it.
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

// runGuard is the process of the guard. It returns when it was dismissed, or when flowctl was
// killed and nothing is left of the run that can be killed.
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

// guardState is what the guard knows of its run. The maps are by pid; their values say when
// the process began, which tells it from a later one with its pid.
type guardState struct {
	run     string         // its mark
	flowctl int            // pid
	begun   uint64         // when flowctl began: what began before is not of the run
	leaders map[int]uint64 // of process groups, and the command after --
	adopted map[int]uint64 // orphans of flowctl: they may have neither the mark nor a leader
	spared  map[int]bool   // children that flowctl has inherited
}

// watch takes in what flowctl tells. It returns true when flowctl dismisses the guard, and
// false when flowctl was killed.
func (g *guardState) watch(lines <-chan string) bool {
	step := scanStep // a program that makes a daemon does so when it starts
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

// dropProgram gives back the memory of the program itself, most of what the guard has resident
// after its start: what is needed again is read from the file again. A mapping in which some
// page has been written to, before it was made read-only, stays as it is.
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

// noteAdopted notes the children of flowctl's main thread, which is the one that gets the
// orphans (find_new_reaper in the kernel's exit.c). They are noted until they end, because a
// flowctl that is dying has no children any more.
func (g *guardState) noteAdopted() {
	if os.Getppid() != g.flowctl {
		return // flowctl has died, and its pid could be another process's
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

// killRun kills what belongs to the run until nothing is found any more, for at most twice
// killPatience, and removes its control group.
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

// processes returns what belongs to the run: the leaders and their groups, what flowctl has
// adopted, what has the mark, and all descendants of those.
func (g *guardState) processes() []procInfo {
	all := slices.DeleteFunc(processes(), func(p procInfo) bool { return p.begun < g.begun })
	chosen := make(map[int]bool)
	reused := make(map[int]bool) // pids of leaders that are other processes now
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

// hasMark tells whether a process has the mark of run in its environment, or that of a flowctl
// which is a component of run.
func hasMark(pid int, run string) bool {
	env := environ(pid)
	mark := "\x00" + runMark + "=" + run
	return bytes.Contains(env, []byte(mark+"\x00")) || bytes.Contains(env, []byte(mark+"/"))
}

// removeContainersOf removes the containers of run. It looks again for a while, because the
// engine may still be making one for a command line that was killed.
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
