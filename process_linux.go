package main

// What process.go has on Linux alone: the reaper, by which flowctl becomes the parent of what its
// components orphan; the search for what has left its component; the control group; the guard, a
// process that ends all of them when flowctl itself was killed.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
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

	// guardName is another than flowctl's, so that pkill does not kill the guard as well, with
	// -f either: all else that the guard knows it is told by its pipe.
	guardName = "run-guard"

	scanStep      = 20 * time.Millisecond  // between two scans for processes that no event tells of
	scanTries     = 5                      // scans in a row that find nothing, after which the guard takes the run for ended
	guardInterval = time.Second            // at most between two looks of the guard at what flowctl has adopted; it is scanStep after a start
	guardSilence  = 5                      // guardIntervals without a sign of life, after which a guard is continued, and then killed
	guardGrace    = time.Second            // for a guard that is dismissed to end
	guardProven   = time.Minute            // a guard that has lived so long is replaced at once
	minGuardPause = 100 * time.Millisecond // before a guard that was killed again is replaced: without one there is a risk
	maxGuardPause = 2 * time.Second
)

// reaper starts flowctl's children, and reaps orphans that it has adopted. A process has one.
type reaper struct {
	sigchld   chan os.Signal
	closed    chan struct{} // closed to end the reaping of orphans
	reaping   sync.WaitGroup
	reaped    chan struct{} // gets a token when an orphan was reaped
	inherited map[int]bool  // children that this process had before it became flowctl
	adopts    bool          // adopt was called: other children that were not started here are orphans of components

	starting sync.Mutex // held while a child starts and while orphans are looked for, so that no child is taken for one
	mu       sync.Mutex // guards the fields below; nobody who holds it waits
	known    map[int]started
	below    map[int]seenBelow // what was seen below those of known, by pid
}

// seenBelow is a process that was seen below another.
type seenBelow struct {
	begun  uint64 // tells it from a later one with its pid
	leader int    // below which known process, 0 for none
}

func newReaper() *reaper {
	inherited := make(map[int]bool)
	for _, pid := range childPIDs(os.Getpid()) {
		inherited[pid] = true
	}
	return &reaper{
		sigchld: make(chan os.Signal, 1), closed: make(chan struct{}), reaped: make(chan struct{}, 1),
		inherited: inherited, known: make(map[int]started), below: make(map[int]seenBelow),
	}
}

// adopt makes flowctl the parent of what its descendants orphan, and reaps that until close.
func (r *reaper) adopt() error {
	if err := becomeSubreaper(); err != nil {
		return err
	}
	r.adopts = true
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

// start starts a helper, such as the guard or an engine's command. The caller calls wait.
func (r *reaper) start(cmd *exec.Cmd) error { return r.startLeader(cmd, started{}) }

// startLeader starts a process, of a component unless what is none. The caller waits for it and
// calls leaderEnded.
func (r *reaper) startLeader(cmd *exec.Cmd, what started) (err error) {
	r.starting.Lock()
	defer r.starting.Unlock()
	if what.id == "" {
		err = cmd.Start()
	} else {
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL // where there is no guard any more either
		onStarter(func() { err = cmd.Start() })
	}
	if err == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.known[cmd.Process.Pid] = what
	}
	return err
}

// onStarter calls f on a thread that never ends: a parent-death signal is sent when the thread
// ends that has started the process (go.dev/issue/27505).
func onStarter(f func()) {
	done := make(chan struct{})
	starts() <- func() { f(); close(done) }
	<-done
}

var starts = sync.OnceValue(func() chan<- func() {
	calls := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range calls {
			f()
		}
	}()
	return calls
})

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
	maps.DeleteFunc(r.below, func(_ int, seen seenBelow) bool { return seen.leader == pid })
}

// noteBelow notes that process pid was seen below a leader, or, where that is none, that it has ended.
func (r *reaper) noteBelow(pid int, seen seenBelow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.known[seen.leader]; known {
		r.below[pid] = seen
	} else {
		delete(r.below, pid)
	}
}

// leftBy returns the component that has left a process of which nothing else tells whose it is: that
// below which it was seen, or whose output is its own. It is "" where neither tells.
func (r *reaper) leftBy(p procInfo) string {
	var outputs [2]string // not all that it has open: it may have opened very much
	for i := range outputs {
		outputs[i], _ = os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", p.pid, i+1))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if seen := r.below[p.pid]; seen.begun == p.begun {
		return r.known[seen.leader].id
	}
	of := ""
	for _, what := range r.known {
		switch {
		case !slices.Contains(what.outputs, outputs[0]) && !slices.Contains(what.outputs, outputs[1]):
		case of != "" && of != what.id:
			return "" // it has opened another component's
		default:
			of = what.id
		}
	}
	return of
}

// leaders returns, by pid, the component of each process of startLeader that has not ended.
func (r *reaper) leaders() map[int]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[int]string)
	for pid, what := range r.known {
		if what.id != "" {
			out[pid] = what.id
		}
	}
	return out
}

// settledLeaders returns leaders once what is being started is among them.
func (r *reaper) settledLeaders() map[int]string {
	r.starting.Lock()
	defer r.starting.Unlock()
	return r.leaders()
}

// leaderOf returns the process of startLeader that is component id, 0 for none.
func (r *reaper) leaderOf(id string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	for pid, what := range r.known {
		if what.id == id && !what.beside {
			return pid
		}
	}
	return 0
}

// helpers returns the pids of the processes of start that have not been waited for.
func (r *reaper) helpers() map[int]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[int]bool)
	for pid, what := range r.known {
		if what.id == "" {
			out[pid] = true
		}
	}
	return out
}

// leads tells whether leaders has pid, of component id.
func (r *reaper) leads(pid int, id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known[pid].id == id
}

// isKnown tells whether flowctl has started process pid and not waited for it.
func (r *reaper) isKnown(pid int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, known := r.known[pid]
	return known
}

// reapOrphans reaps the orphans that have ended.
func (r *reaper) reapOrphans() {
	r.starting.Lock()
	defer r.starting.Unlock()
	for _, pid := range childPIDs(os.Getpid()) {
		if r.isKnown(pid) {
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

// orphans returns the pids of what flowctl has adopted, zombies included.
func (r *reaper) orphans() []int {
	r.starting.Lock()
	defer r.starting.Unlock()
	return slices.DeleteFunc(adoptedBy(os.Getpid()), func(pid int) bool { return r.isKnown(pid) || r.inherited[pid] })
}

// stopOrphans stops the orphans that are to be, as fast as it can: one that forks and ends at
// once is in no list of processes for long.
func (r *reaper) stopOrphans(which func(procInfo) bool) {
	const most = 2000 // looks
	r.starting.Lock()
	defer r.starting.Unlock()
	seen := make(map[int]bool) // none of them is waited for from then on, so its pid is its own
	for i, more := 0, true; more && i < most; i++ {
		more = false
		for _, pid := range adoptedBy(os.Getpid()) {
			if r.isKnown(pid) || r.inherited[pid] || seen[pid] {
				continue
			}
			more = true
			if reaped, _ := syscall.Wait4(pid, nil, syscall.WNOHANG, nil); reaped == pid {
				continue
			}
			seen[pid] = true
			if p, ok := readProcess(pid); ok && which(p) {
				_ = syscall.Kill(pid, syscall.SIGSTOP)
			}
		}
	}
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

// reapGroup reaps the group of c and tells whether it is empty: at once with WNOHANG, else when it is.
// The leader has been waited for, so all members are flowctl's own children.
func (c *child) reapGroup(options int) bool {
	for {
		if pid, err := syscall.Wait4(-c.pid, nil, options, nil); pid <= 0 && err != syscall.EINTR {
			return err != nil
		}
	}
}

// endRest ends what is left of c, whose first process was waited for. Its group has got the stop signal;
// what has left that gets it now. What lives on gets SIGKILL with the group. It returns when nothing
// lives any more, or of what has left the group a moment after SIGKILL.
func (c *child) endRest() {
	l := c.launcher
	strayOf := sync.OnceValue(func() func(procInfo) bool { return l.strayOf(c) }) // most leave nothing
	told := make(map[int]uint64)                                                  // when each began that got the stop signal
	isStray := func(p procInfo) bool { return told[p.pid] == p.begun || strayOf()(p) }
	find := func() ([]procInfo, bool) {
		left := l.orphanedTrees(isStray)
		return left, len(left) == 0
	}
	for killed := false; ; {
		left, none := find()
		c.mu.Lock()
		c.reaped = c.reapGroup(syscall.WNOHANG)
		empty := c.reaped
		c.mu.Unlock()
		if none && empty {
			return
		}
		away := slices.DeleteFunc(slices.Clone(left), func(p procInfo) bool { return p.group == c.pid || told[p.pid] == p.begun })
		if len(away) > 0 && !killed {
			l.config.log.Warn("ending what left its process group", "component", c.component.ID, "processes", namesOf(away))
		}
		for _, p := range away {
			told[p.pid] = p.begun
			p.send(c.component.stopSignal())
			p.send(syscall.SIGCONT)
		}
		if killed {
			c.reapGroup(0)
			return
		}
		select {
		case <-time.After(scanStep):
		case <-c.expired:
			left, _ = find()
			endAll(l.cgroup.retirePart(c.component.ID), left, find, func() { l.config.reaper.stopOrphans(isStray) }, 0)
			killed = true
		}
	}
}

// orphanedTrees returns the processes that are so of those that flowctl has adopted, and below them,
// each with all that is below it. What is below a process that flowctl has started, and which runs, is
// none of them.
func (l *launcher) orphanedTrees(are func(procInfo) bool) (out []procInfo) {
	var add func(pid, with int) // with: its parent, where that is one of them, else 0
	add = func(pid, with int) {
		p, ok := readProcess(pid)
		if ok && !p.zombie && (p.parent == with || are(p)) {
			with, out = pid, append(out, p)
		} else {
			with = 0
		}
		for _, child := range childPIDs(pid) {
			add(child, with)
		}
	}
	for _, pid := range l.config.reaper.orphans() {
		add(pid, 0)
	}
	return out
}

// endGroup ends what is left of a process group whose leader was waited for, and which has got SIGTERM.
// It gets SIGKILL after leftGrace, or when ctx ends.
func endGroup(ctx context.Context, pid int) {
	for grace := time.After(leftGrace); ; {
		if n, err := syscall.Wait4(-pid, nil, syscall.WNOHANG, nil); n <= 0 && err != nil && err != syscall.EINTR {
			return // there is none
		}
		select {
		case <-time.After(scanStep):
			continue
		case <-grace:
		case <-ctx.Done():
		}
		_ = syscall.Kill(-pid, syscall.SIGKILL)
		return
	}
}

// noteBelow notes what is below a leader, which lives: once that has ended nothing tells of it but, where
// there are any, control groups. The loop waits for it, so it notes some hundred processes at most.
func (l *launcher) noteBelow(leader int) {
	if l.ownGroups() {
		return
	}
	most := 300
	eachBelow(leader, &most, func(p procInfo) bool {
		l.config.reaper.noteBelow(p.pid, seenBelow{p.begun, leader})
		return true
	})
}

// strayOf returns what tells whether ch, which has ended, has left a process: by its session, its
// control group, its secret, its output, and by what was seen below it. What has none of these of any
// component is its own if it is older than all others that run; else it is left to the end of the run.
func (l *launcher) strayOf(ch *child) func(procInfo) bool {
	id, leaders := ch.component.ID, l.leaders()
	firstOther := sync.OnceValue(func() uint64 { // when the first of the others that run began
		first := uint64(math.MaxUint64)
		for pid, of := range leaders {
			if p, ok := readProcess(pid); ok && of != id {
				first = min(first, p.begun)
			}
		}
		return first
	})
	return func(p procInfo) bool {
		group := l.cgroupOwner(p.pid)
		switch {
		case p.session == ch.pid, group == id, l.hasMark(p.pid, id):
			return true
		case !l.config.reaper.adopts, p.parent != os.Getpid(), group != "", leaders[p.session] != "", hasMark(p.pid, l.mark):
			return false // it goes with its parent, or is another's
		}
		if of := l.config.reaper.leftBy(p); of != "" {
			return of == id
		}
		first := firstOther()
		l.mu.Lock()
		defer l.mu.Unlock()
		if p.begun >= first && l.doubted[p.pid] != p.begun {
			l.doubted[p.pid] = p.begun
			l.config.log.Warn("which component has left a process cannot be told: it is ended with the run", "ended", id, "process", namesOf([]procInfo{p}))
		}
		return p.begun < first
	}
}

// hasMark tells whether a process was started with the secret of component id, or by a flowctl
// that was.
func (l *launcher) hasMark(pid int, id string) bool { return hasMark(pid, l.markOf(id)) }

// markOwner returns the component, or commandID, whose secret a process was started with, "" for none.
func (l *launcher) markOwner(pid int) string {
	env := environ(pid)
	for _, id := range l.leaders() {
		if isMarked(env, l.markOf(id)) {
			return id
		}
	}
	return ""
}

// cgroupOwner returns the component in whose control group a process is, "" for none.
func (l *launcher) cgroupOwner(pid int) string {
	rest, ok := strings.CutPrefix(processCgroup(pid), l.cgroup.path()+"/"+partPrefix)
	if l.cgroup == nil || !ok {
		return ""
	}
	part, _, _ := strings.Cut(rest, "/")
	_, id, _ := strings.Cut(part, "-")
	return id
}

// ownGroups tells whether components have control groups of their own that only root may join: where
// flowctl's own user may, a component could move to that of another.
func (l *launcher) ownGroups() bool {
	var info syscall.Stat_t
	return l.cgroup != nil && syscall.Stat(l.cgroup.path(), &info) == nil && info.Uid == 0
}

// descendants returns all processes below flowctl, except its helpers and those that flowctl
// has inherited.
func (l *launcher) descendants() []procInfo {
	all := slices.DeleteFunc(processes(), func(p procInfo) bool { return l.config.reaper.inherited[p.pid] })
	self, helpers := os.Getpid(), l.config.reaper.helpers() // read after the scan, which may have found a new guard
	chosen := map[int]bool{self: true}
	withDescendants(all, chosen)
	return slices.DeleteFunc(all, func(p procInfo) bool { return !chosen[p.pid] || p.pid == self || helpers[p.pid] })
}

// sweep ends all that is left below flowctl when no component runs any more: by SIGTERM, and
// after grace by SIGKILL. It returns what lives on in spite of that.
func (l *launcher) sweep(grace time.Duration) []procInfo {
	const most = 10 // processes that the log tells of, at least: some start others all the time
	find := func() (left []procInfo, over bool) {
		left = l.descendants()
		// A scan of /proc can miss a process whose parent ends meanwhile, but not the
		// child of flowctl's that it becomes.
		return left, len(left) == 0 && len(l.config.reaper.orphans()) == 0
	}
	told := make(map[int]uint64) // when each began that got SIGTERM
	var left []procInfo
	for deadline := time.Now().Add(grace); ; {
		var over bool
		if left, over = find(); over {
			return nil
		}
		fresh := slices.DeleteFunc(slices.Clone(left), func(p procInfo) bool { return told[p.pid] == p.begun })
		if len(fresh) > 0 && len(told) < most {
			l.config.log.Warn("ending what left its component", "processes", namesOf(fresh))
		}
		wait := time.Until(deadline)
		if wait <= 0 { // also where so much runs that a look takes that long
			break
		}
		for _, p := range fresh {
			told[p.pid] = p.begun
			p.send(syscall.SIGTERM)
		}
		if len(left) == 0 {
			wait = scanStep // a child that the scan missed, or a zombie that is being reaped
		}
		select {
		case <-l.config.reaper.reaped:
		case <-time.After(wait):
		}
	}
	left = endAll(l.cgroup.path(), left, find, func() { l.config.reaper.stopOrphans(func(procInfo) bool { return true }) }, killPatience)
	if len(left) > 0 {
		l.config.log.Error("still running after SIGKILL", "processes", namesOf(left))
	}
	return left
}

// endAll kills left and what find returns, until find says that this is over or until no fewer
// live for as long as patience, and returns what is left then. First all is stopped, until nothing
// new appears: to kill one of many at the limit of processes makes room for another. catch stops
// what forks and ends sooner than find can tell of it. cgroup is "" for none. Without patience it
// does not wait.
func endAll(cgroup string, left []procInfo, find func() ([]procInfo, bool), catch func(), patience time.Duration) []procInfo {
	const rounds = 20 // of stopping: who can sends SIGCONT
	deadline, fewest := time.Now().Add(patience), math.MaxInt
	for {
		seen, over := make(map[int]procInfo), false
		for round := range rounds {
			if cgroup != "" {
				_ = os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0)
			}
			before := len(seen)
			for _, p := range left {
				if seen[p.pid].begun != p.begun {
					seen[p.pid] = p
					p.send(syscall.SIGSTOP)
				}
			}
			if round > 0 && len(seen) == before {
				break
			}
			catch()
			left, over = find()
		}
		if over {
			return nil
		}
		for _, p := range seen {
			p.send(syscall.SIGKILL)
		}
		switch now := time.Now(); {
		case patience == 0:
			return left
		case len(left) < fewest: // many need their time to end
			deadline, fewest = now.Add(patience), len(left)
		case now.After(deadline):
			return left
		}
		time.Sleep(scanStep) // nothing tells of their ends
	}
}

// guard is the guard as flowctl sees it: a process that ends the run when flowctl was killed.
// It reads from a pipe which process groups there are; when the pipe ends without the line
// "end", flowctl was killed. A guard that is killed itself, or lastingly stopped, is replaced.
type guard struct {
	reaper    *reaper
	log       *slog.Logger
	dismissed context.Context // ends when the guard is to end
	end       context.CancelFunc
	keeping   sync.WaitGroup
	beating   chan struct{} // closed by the first beat

	mu    sync.Mutex // guards the fields below; nobody who holds it waits
	facts guardFacts // without a run until know is called
	cmd   *exec.Cmd
	in    *os.File      // the pipe; it does not block
	beats *os.File      // gets a line from it each guardInterval, and for what it sees below leaders
	lines *bufio.Reader // reads beats
}

// startGuard starts the guard of a run, and replaces it until dismiss is called.
func startGuard(r *reaper, log *slog.Logger) (*guard, error) {
	g := &guard{reaper: r, log: log, beating: make(chan struct{})}
	g.dismissed, g.end = context.WithCancel(context.Background())
	if err := g.start(); err != nil {
		return nil, err
	}
	g.keeping.Go(g.keep)
	return g, nil
}

// know tells the guard which run it guards, before that starts anything.
func (g *guard) know(facts guardFacts) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.facts = facts
	g.briefLocked()
}

// briefLocked tells a guard all that the one before it knew.
func (g *guard) briefLocked() {
	if g.facts.Run == "" {
		return
	}
	facts, _ := json.Marshal(g.facts) // of strings and numbers, which cannot fail
	g.writeLocked(string(facts) + "\n")
	for pid := range g.reaper.inherited {
		g.tellLocked("spare", pid)
	}
	for pid := range g.reaper.leaders() {
		g.tellLocked("started", pid)
	}
}

// awaitBeat returns when the guard has its threads, which components could use up. It fails if
// that takes longer than a guard may be silent.
func (g *guard) awaitBeat() error {
	select {
	case <-g.beating:
		return nil
	case <-time.After(2 * guardSilence * guardInterval):
		return errors.New("the guard gives no sign of life")
	}
}

// start starts the process, unless the guard is dismissed. It has a session of its own, where no
// terminal reaches it, and no mark: it belongs to no run, not to that of an outer flowctl either.
func (g *guard) start() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.dismissed.Err(); err != nil {
		return err
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	defer theirs.Close()
	beats, beating, err := os.Pipe()
	if err != nil {
		ours.Close()
		return err
	}
	defer beating.Close()
	cmd := exec.Command("/proc/self/exe", "guard") // a link that stays good when the file of the program is replaced
	cmd.Args[0] = guardName
	cmd.Stdin, cmd.Stdout, cmd.Dir = theirs, beating, "/"
	cmd.Env = baseEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := g.reaper.start(cmd); err != nil {
		ours.Close()
		beats.Close()
		return err
	}
	g.cmd, g.in, g.beats, g.lines = cmd, ours, beats, bufio.NewReaderSize(beats, 128)
	g.briefLocked()
	return nil
}

// beat waits for the guard's next sign of life, and is false if it has ended. The seconds are
// counted one by one, so that a flowctl that was stopped itself does not count that time. One
// that was stopped is continued, and killed if it is silent after that.
func (g *guard) beat() bool {
	line := ""
	for silent := 1; ; silent++ {
		_ = g.beats.SetReadDeadline(time.Now().Add(guardInterval))
		part, err := g.lines.ReadString('\n')
		line += part // time may run out within one
		switch {
		case !errors.Is(err, os.ErrDeadlineExceeded):
			var pid int
			var seen seenBelow
			if n, _ := fmt.Sscan(line, &pid, &seen.begun, &seen.leader); n == 3 {
				g.reaper.noteBelow(pid, seen)
			}
			return err == nil
		case silent == guardSilence:
			g.log.Warn("the guard is silent: it is continued, in case that it was stopped", "pid", g.cmd.Process.Pid)
			_ = g.cmd.Process.Signal(syscall.SIGCONT)
		case silent == 2*guardSilence:
			_ = g.cmd.Process.Kill()
		}
	}
}

// keep replaces a guard that has ended: at once the first time, then after a pause that grows.
func (g *guard) keep() {
	pause := time.Duration(0)
	var first sync.Once
	for {
		began := time.Now()
		for g.beat() { // keep alone starts another one, so these fields do not change meanwhile
			first.Do(func() { close(g.beating) })
		}
		_ = g.reaper.wait(g.cmd)
		if time.Since(began) > guardProven {
			pause = 0
		}
		if g.dismissed.Err() != nil {
			g.beats.Close()
			return
		}
		g.log.Warn("the guard was killed: until there is another, a flowctl that is killed leaves components behind", "in", pause)
		for {
			select {
			case <-g.dismissed.Done():
				return
			case <-time.After(pause):
			}
			pause = min(max(2*pause, minGuardPause), maxGuardPause)
			g.in.Close()
			g.beats.Close()
			err := g.start()
			if err == nil {
				break
			}
			if g.dismissed.Err() != nil {
				return
			}
			g.log.Error("cannot start the guard", "err", err)
		}
		g.log.Info("guarded again")
	}
}

// tell tells the guard that the process group pid has "started", or that nothing is left of it
// ("ended"). It never waits: a guard that does not read a full pipe is killed, and keep replaces it.
func (g *guard) tell(word string, pid int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tellLocked(word, pid)
}

func (g *guard) tellLocked(word string, pid int) { g.writeLocked(fmt.Sprintf("%s %d\n", word, pid)) }

func (g *guard) writeLocked(line string) {
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
	g.end()
	g.mu.Lock()
	g.tellLocked("end", 0)
	g.in.Close()
	timer := time.AfterFunc(guardGrace, func() { _ = g.cmd.Process.Kill() })
	g.mu.Unlock()
	g.keeping.Wait()
	timer.Stop()
}

// runGuard is the process of the guard. It returns when it was dismissed, or when flowctl was killed and
// nothing is left of the run that can be killed. It fails if no flowctl has started it.
func runGuard(in io.Reader) error {
	if os.Args[0] != guardName {
		return usageErrorf("", "guard: flowctl starts it by itself")
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE, syscall.SIGTSTP)
	_ = os.WriteFile("/proc/self/comm", []byte(guardName), 0)
	runtime.GOMAXPROCS(1)
	reserveThreads(4)                  // components may have used up all when it is needed
	_, _ = os.FindProcess(os.Getpid()) // its first call starts a process, to see whether pidfds work
	_ = syscall.SetNonblock(1, true)   // who reads there may be stopped
	tellAlive()
	g := &guardState{leaders: make(map[int]uint64), below: make(map[int]seenBelow), spared: make(map[int]bool)}
	scanner := bufio.NewScanner(in)
	if !scanner.Scan() || json.Unmarshal(scanner.Bytes(), &g.guardFacts) != nil || g.Run == "" {
		return nil // flowctl ended before it started anything
	}
	if p, ok := readProcess(g.Flowctl); ok && g.Flowctl == os.Getppid() {
		g.begun = p.begun
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for scanner.Scan() {
			lines <- scanner.Text()
		}
	}()
	if g.watch(lines) {
		return nil
	}
	g.killRun()
	if g.EnginePath != "" {
		if e, err := findEngine(g.EnginePath); err == nil {
			e.commands, e.env = newReaper(), baseEnv()
			e.removeUntilGone(labelRun+"="+g.Run, 10*scanStep, scanTries)
		}
	}
	return nil
}

// guardState is what the guard knows of its run. The maps are by pid; their values say when
// the process began, which tells it from a later one with its pid.
type guardState struct {
	guardFacts
	begun   uint64            // when flowctl began: what began before is not of the run
	leaders map[int]uint64    // of process groups, and the command after --
	below   map[int]seenBelow // what was seen below flowctl: it may have neither the mark nor a leader when flowctl has died; with a leader where flowctl was told
	spared  map[int]bool      // children that flowctl has inherited
}

// watch takes in what flowctl tells: true when it dismisses the guard, false when it was killed.
func (g *guardState) watch(lines <-chan string) bool {
	step := scanStep // a program that makes a daemon does so when it starts
	timer, beat := time.NewTimer(step), time.NewTicker(guardInterval)
	defer timer.Stop()
	defer beat.Stop()
	for {
		select {
		case <-beat.C:
			tellAlive()
		case <-timer.C:
			g.noteBelow()
			if step < guardInterval && 2*step >= guardInterval {
				debug.SetGCPercent(10) // a few kilobytes live here, so collecting costs nothing
				dropProgram()          // nothing has started for a while
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

// noteBelow notes what is below flowctl: one that is dying has no children any more. It tells flowctl
// what a leader has below it that has left its session, and when that has ended.
func (g *guardState) noteBelow() {
	if os.Getppid() != g.Flowctl {
		return // flowctl has died, and its pid could be another process's
	}
	maps.DeleteFunc(g.below, func(pid int, seen seenBelow) bool {
		p, ok := readProcess(pid)
		gone := !ok || p.begun != seen.begun
		return gone && (seen.leader == 0 || tellSeen(pid, seenBelow{}))
	})
	leader := 0
	most := math.MaxInt
	eachBelow(g.Flowctl, &most, func(p procInfo) bool {
		if p.parent == g.Flowctl {
			leader = 0
			if g.leaders[p.pid] == p.begun {
				leader = p.pid
			}
		}
		if os.Getppid() != g.Flowctl || p.pid == os.Getpid() || g.spared[p.pid] {
			return false
		}
		seen := g.below[p.pid]
		if seen.begun != p.begun {
			seen = seenBelow{begun: p.begun}
		}
		if now := (seenBelow{p.begun, leader}); seen.leader == 0 && leader != 0 && p.session != leader && tellSeen(p.pid, now) {
			seen = now
		}
		g.below[p.pid] = seen
		return true
	})
}

// tellAlive is the guard's beat.
func tellAlive() { _, _ = syscall.Write(1, []byte(".\n")) }

// tellSeen tells flowctl of what was seen. It fails where flowctl does not read: it may be stopped.
func tellSeen(pid int, seen seenBelow) bool {
	_, err := syscall.Write(1, fmt.Appendf(nil, "%d %d %d\n", pid, seen.begun, seen.leader))
	return err == nil
}

// killRun kills what is of the run until nothing is found, and removes its control group.
func (g *guardState) killRun() {
	quiet := 0
	endAll(g.Cgroup, nil, func() (left []procInfo, over bool) {
		if left, quiet = g.processes(), quiet+1; len(left) > 0 {
			quiet = 0
		}
		return left, quiet > scanTries // nothing tells of a process that is about to be forked
	}, func() {}, 2*killPatience)
	removeCgroup(g.Cgroup)
}

// processes returns what belongs to the run: the leaders and their groups, what was seen below
// flowctl, what has the mark, and all descendants of those.
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
		seen, below := g.below[p.pid]
		chosen[p.pid] = leads && !reused[p.pid] || led && !reused[p.group] || below && seen.begun == p.begun || hasMark(p.pid, g.Run)
	}
	withDescendants(all, chosen)
	return slices.DeleteFunc(all, func(p procInfo) bool { return !chosen[p.pid] || p.pid == os.Getpid() })
}

// hasMark tells whether a process was started with that value of runMark, or by a flowctl that was.
func hasMark(pid int, mark string) bool { return isMarked(environ(pid), mark) }

func isMarked(env []byte, mark string) bool {
	entry := "\x00" + runMark + "=" + mark
	return bytes.Contains(env, []byte(entry+"\x00")) || bytes.Contains(env, []byte(entry+"/"))
}
