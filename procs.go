package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

const (
	minBackoff   = time.Second             // before the first restart
	maxBackoff   = 30 * time.Second        // restarts never wait longer, but for jitter
	maxGuardWait = 2 * time.Second         // before a guard that was killed is replaced: without one there is a risk
	healthyReset = time.Minute             // a component that was ready this long starts over with minBackoff
	sweepGrace   = time.Second             // from SIGTERM to SIGKILL for what has left its component when the run ends
	outputGrace  = 1500 * time.Millisecond // for the output of a process that got SIGKILL to be taken
	killPatience = 5 * time.Second         // from SIGKILL until flowctl no longer waits: only a process stuck in the kernel lives that long

	minBuffer = 16 << 10 // of an output pump; it grows while a line does not fit
	pipeSize  = 64 << 10 // what a pipe holds, pipe(7): the pump of one that is found full grows to it
	maxLine   = 1 << 20  // a longer line is passed on in pieces
	tailSize  = 4 << 10  // bytes of a component's last output that are kept for a report
)

// procState is where a component is in its life. Only supervisor.transition changes it.
type procState int

const (
	procWaiting   procState = iota // for what it waits on, or to be started again
	procStarting                   // its process runs and is not ready yet
	procReady                      // it was ready once; how it is now the registry knows
	procBackoff                    // ended; to be started again at deadline
	procStopping                   // got its stop signal, gets SIGKILL at deadline
	procKilled                     // got SIGKILL
	procCompleted                  // ended by itself, as it should
	procFailed                     // ended by itself or not ready in time, and is not started again
	procStopped                    // ended because it was asked to, or never started
)

func (s procState) String() string {
	return [...]string{"waiting", "starting", "ready", "backoff", "stopping", "killed", "completed", "failed", "stopped"}[s]
}

// failKind is what a component failed by, as a report has it.
type failKind string

const (
	failStart     failKind = "start"     // it could not be started
	failEnded     failKind = "ended"     // its process ended unasked
	failNotReady  failKind = "not_ready" // within its start timeout
	failUnhealthy failKind = "unhealthy" // for too long
	failStuck     failKind = "stuck"     // its process outlived SIGKILL
)

// failure is what has to be said of a component that failed.
type failure struct {
	component  *Component
	kind       failKind
	reason     string
	lived      time.Duration // of its last process; 0: it never ran
	pid        int
	registered bool             // had its last process registered
	wasReady   bool             // was its last process
	exit       *os.ProcessState // of its last process; nil: it had not ended
	tail       []string
}

// proc is one component and the process that runs it now, if one does.
type proc struct {
	*Component
	log      *slog.Logger
	state    procState
	deadline time.Time // when the state has lasted too long; zero: never
	readyBy  time.Time // when it has to be ready: counted from its first start until it was ready once, then from each start
	child    *child    // nil when none runs
	last     *child    // its last process, that which runs now included; nil if none was started
	started  time.Time
	ended    time.Time // zero while it runs
	stopSent time.Time
	readyAt  time.Time
	wasReady bool // with any of its processes: what waits for it may be started again
	healthy  bool // while procReady; who owns the supervisor notes it
	attempts int  // restarts since it was last in health for healthyReset
	restarts int
	failure  *failure

	registered bool             // its last process has; who owns the supervisor notes it
	exit       *os.ProcessState // of its last process, nil while it runs

	leaving   bool       // the file has changed: it is to be stopped, and then is gone
	successor *Component // takes its place then, nil for none
}

// over tells whether no process runs and none will.
func (p *proc) over() bool {
	return p.state == procCompleted || p.state == procFailed || p.state == procStopped
}

// runs tells whether it has a process that was not asked to end.
func (p *proc) runs() bool { return p.state == procStarting || p.state == procReady }

// emitter takes whole lines of a component: each ends with a newline. It must not
// keep them. It is called from the pumps, one call at a time per stream.
type emitter func(id, stream string, lines []byte)

// procSettings are the run's answers to what the file leaves open, and what every
// component's environment tells it.
type procSettings struct {
	startTimeout time.Duration
	stopTimeout  time.Duration
	heartbeat    time.Duration // FLOWCTL_HEARTBEAT_INTERVAL
	endpoint     string        // FLOWCTL_ENDPOINT
	tlsEnv       []string      // of components with "tls": true, that one included
	flush        func()        // returns when what was emitted has been written; nil where emit returns no sooner
	gateway      string        // FLOWCTL_ENDPOINT of containers that are not on the host's network; "" for out of reach
	engine       *engine       // of components with an image, nil for none
}

// runMark is the variable by which the guard, and flowctl itself, know the processes
// of a run wherever they have gone. Its value is the run's; that of a flowctl which is
// itself a component begins with the outer one's and a slash.
const runMark = "FLOWCTL_RUN"

// supervisor starts, restarts and stops the processes of a pipeline. One goroutine
// owns it and calls its methods; it is told the time and never asks. What happens
// elsewhere arrives in exits, and next says when a deadline is due. Only componentAt and
// warnOfStranger are called from elsewhere: of its fields they use none that changes, but
// for leaders and those that lock themselves.
type supervisor struct {
	settings procSettings
	log      *slog.Logger
	emit     emitter
	exits    chan exit
	procs    []*proc // in file order
	byID     map[string]*proc
	before   map[string][]stopEdge // by id: what has to stop before it
	ports    map[string]*reservedPort
	stopping bool
	target   *Pipeline // what is to be when all that leaves has gone, nil otherwise
	edition  int       // counts the changes of procs
	run      string    // unique: what runMark is set to
	reaper   *reaper
	cgroup   *cgroup // nil for none
	leaders  leaders

	boxed int // starts of containers

	guard      *guard
	guardBegun time.Time     // when it was started last
	guardDue   time.Time     // when it is to be replaced, zero while it lives
	guardWait  time.Duration // before it is replaced the next time
}

// leaders are the processes that supervisor has started and that lead a group now, and
// the command after --, for who asks from elsewhere which component a process is of.
type leaders struct {
	mu    sync.RWMutex // guards byPID; held over each start, so that no process can ask before it is known
	byPID map[int]string
}

// start starts cmd, a leader of component id or the command itself.
func (l *leaders) start(id string, r *reaper, cmd *exec.Cmd) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := r.start(cmd)
	if err == nil {
		l.byPID[cmd.Process.Pid] = id
	}
	return err
}

func (l *leaders) ended(pid int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.byPID, pid)
}

// now returns a copy.
func (l *leaders) now() map[int]string {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return maps.Clone(l.byPID)
}

// exit is the end of one process: it was waited for, its group is gone and its
// output has been passed on.
type exit struct {
	proc  *proc
	child *child
	state *os.ProcessState
	lost  bool  // nobody took the rest of its output
	left  error // its container may be there still
}

// reserveThreads makes the runtime start threads before the components can use up
// what the system allows: one that it cannot start later is the end of flowctl, and
// not an error that could be told.
func reserveThreads() {
	const spare = 8
	var ready, done sync.WaitGroup
	ready.Add(spare)
	for range spare {
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			ready.Wait() // each holds its thread until all have one
		})
	}
	done.Wait()
}

// newSupervisor starts the guard and reserves a port for each component. The caller
// runs it until over is true and then calls close.
func newSupervisor(p *Pipeline, settings procSettings, emit emitter, log *slog.Logger, r *reaper) (*supervisor, error) {
	s := &supervisor{
		reaper:   r,
		settings: settings, log: log, emit: emit, run: strings.TrimPrefix(os.Getenv(runMark)+"/"+rand.Text(), "/"),
		exits: make(chan exit), byID: make(map[string]*proc),
		before: p.stopAfter(), ports: make(map[string]*reservedPort),
		leaders: leaders{byPID: make(map[int]string)},
	}
	for _, c := range p.components() {
		s.procs = append(s.procs, s.newProc(c))
		port, err := reservePort(c)
		if err != nil {
			s.releasePorts()
			return nil, fmt.Errorf("component %s: %v", c.ID, err)
		}
		s.ports[c.ID] = port
	}
	reserveThreads()
	s.cgroup = makeCgroup(s.run)
	var err error
	if settings.engine != nil {
		settings.engine.join(s.run)
	}
	if s.guard, err = startGuard(s.run, s.cgroup, settings.engine, r); err != nil {
		s.cgroup.remove()
		s.releasePorts()
		return nil, fmt.Errorf("cannot start the guard, which ends the components of a flowctl that is killed: %v", err)
	}
	return s, nil
}

// close ends what has left its component, and the guard. Every component is over.
func (s *supervisor) close() {
	s.sweep(sweepGrace)
	if s.boxed > 0 {
		s.removeContainers()
	}
	s.guard.dismiss()
	s.cgroup.remove()
}

// guardGone is closed when the guard has ended, and nil while it is to be replaced.
func (s *supervisor) guardGone() <-chan struct{} {
	if !s.guardDue.IsZero() {
		return nil
	}
	return s.guard.ended()
}

// guardLost plans to replace the guard, which was killed: at once, or later and later
// where that happens again and again.
func (s *supervisor) guardLost(now time.Time) {
	if now.Sub(s.guardBegun) > healthyReset {
		s.guardWait = 0
	}
	s.guardDue = now.Add(s.guardWait)
	s.log.Warn("the guard was killed: until there is another, a flowctl that is killed leaves components behind", "in", s.guardWait)
	s.guardWait = min(max(2*s.guardWait, minBackoff/10), maxGuardWait)
}

func (s *supervisor) replaceGuard(now time.Time) {
	s.guardDue, s.guardBegun = time.Time{}, now
	if err := s.guard.restart(); err != nil {
		s.log.Error("cannot start the guard", "err", err)
		s.guardDue = now.Add(s.guardWait)
		return
	}
	s.log.Info("guarded again")
}

// transition is the one place that changes a component's state.
func (s *supervisor) transition(p *proc, to procState, deadline time.Time) {
	p.log.Debug("state", "from", p.state, "to", to)
	p.state, p.deadline = to, deadline
}

// startable returns what may start now: what waits and has all it waits for.
func (s *supervisor) startable() []*proc {
	if s.stopping {
		return nil
	}
	var out []*proc
	for _, p := range s.procs {
		if p.state == procWaiting && !p.leaving && !slices.ContainsFunc(p.waitsFor(), func(id string) bool { return !p.mayFollow(s.byID[id]) }) {
			out = append(out, p)
		}
	}
	return out
}

// mayFollow tells whether p, which waits for first, may start. For its first process
// first has to be ready now. One that is started again is not held up: its process would
// have gone on, too, whatever became of first.
func (p *proc) mayFollow(first *proc) bool {
	if p.started.IsZero() {
		return !first.leaving && (first.state == procCompleted || first.state == procReady && first.healthy)
	}
	return first.wasReady
}

// start starts the process of p. Where that fails, for the reason that it returns, p
// has failed. One that was ready once has ended once more: a file that is just replaced
// can be run a moment later.
func (s *supervisor) start(p *proc, now time.Time) error {
	if p.readyBy.IsZero() || p.wasReady || !now.Before(p.readyBy) { // of which the last has waited for others
		p.readyBy = now.Add(s.startTimeout(p))
	}
	p.started = now
	s.ports[p.ID].release()
	var err error
	if p.child, err = s.spawn(p.Component); err != nil {
		if p.wasReady && s.wantsRestart(p, false) {
			p.log.Error("cannot be started again", "err", err)
			s.backOff(p, false, now)
			return err
		}
		p.last = nil // what is to be said is of this start
		s.fail(p, failStart, p.ifUsedUp(err.Error()), now)
		s.transition(p, procFailed, time.Time{})
		return err
	}
	p.last, p.ended, p.registered, p.exit = p.child, time.Time{}, false, nil
	s.transition(p, procStarting, p.readyBy)
	p.log.Info("started", "pid", p.child.pid)
	go func(child *child) { // loop waits for exits, but for one that SIGKILL does not end
		state, lost, left := child.reap()
		s.exits <- exit{p, child, state, lost, left}
	}(p.child)
	return nil
}

// ready notes that p is ready.
func (s *supervisor) ready(p *proc, now time.Time) {
	p.readyAt, p.wasReady, p.healthy, p.readyBy = now, true, true, time.Time{}
	s.transition(p, procReady, time.Time{})
	p.log.Info("ready", "after", now.Sub(p.started).Round(time.Millisecond))
}

// exited takes the end of a process in and decides what becomes of its component.
func (s *supervisor) exited(e exit, now time.Time) {
	p := e.proc
	p.child, p.ended, p.exit = nil, now, e.state
	s.leaders.ended(e.child.pid)
	if !s.stopping { // else close sweeps
		for _, stray := range s.strays(p.ID) {
			p.log.Warn("ending what left its process group", "pid", stray.pid, "name", stray.name)
			stray.send(syscall.SIGKILL)
		}
	}
	reason := describeExit(e.state)
	asked := p.state == procStopping || p.state == procKilled || s.stopping || p.leaving
	wasReady := p.state == procReady
	p.log.Info("ended", "pid", e.child.pid, "reason", reason, "lived", now.Sub(p.started).Round(time.Millisecond))
	if e.lost {
		p.log.Error("the rest of its output is lost: standard output is not read")
	}
	if e.left != nil {
		p.log.Error("cannot remove its container", "err", e.left)
	}
	switch {
	case p.failure != nil:
		s.transition(p, procFailed, time.Time{})
	case asked:
		s.transition(p, procStopped, time.Time{})
	case s.wantsRestart(p, e.state.Success()):
		s.backOff(p, wasReady, now)
	case e.state.Success() && wasReady:
		s.transition(p, procCompleted, time.Time{})
	default:
		s.failEnded(p, reason, wasReady, now)
	}
}

func (s *supervisor) failEnded(p *proc, reason string, wasReady bool, now time.Time) {
	if !wasReady && !p.usedUp() {
		reason += " before it was ready"
	}
	s.fail(p, failEnded, p.ifUsedUp(reason), now)
	s.transition(p, procFailed, time.Time{})
}

func (p *proc) usedUp() bool { return p.MaxRestarts > 0 && p.attempts >= p.MaxRestarts }

// ifUsedUp adds to the reason of a failure why p is not started again in spite of it.
func (p *proc) ifUsedUp(reason string) string {
	if p.usedUp() {
		return fmt.Sprintf("%s, and max_restarts (%d) is used up", reason, p.MaxRestarts)
	}
	return reason
}

// wantsRestart tells whether p's policy has it started again.
func (s *supervisor) wantsRestart(p *proc, success bool) bool {
	if p.usedUp() {
		return false
	}
	return p.RestartPolicy == restartAlways || p.RestartPolicy == restartOnFailure && !success
}

// backOff plans the next start of p. Jitter of a tenth keeps components that failed
// together from coming back together.
func (s *supervisor) backOff(p *proc, wasReady bool, now time.Time) {
	if wasReady && now.Sub(p.readyAt) >= healthyReset {
		p.attempts = 0
	}
	wait := min(minBackoff<<min(p.attempts, 10), maxBackoff)
	wait += mathrand.N(wait / 10)
	p.attempts++
	p.restarts++
	if p.wasReady {
		p.readyBy = time.Time{}
	}
	s.transition(p, procBackoff, earliest(now.Add(wait), p.readyBy))
	p.log.Warn("restarting", "in", wait.Round(time.Millisecond), "restarts", p.restarts)
}

// fail notes why p failed. The first reason stays.
func (s *supervisor) fail(p *proc, kind failKind, reason string, now time.Time) {
	if p.failure != nil {
		return
	}
	f := &failure{component: p.Component, kind: kind, reason: reason}
	if p.last != nil {
		f.pid, f.registered, f.tail = p.last.pid, p.registered, p.last.tail.lines()
		f.lived, f.exit = cmp.Or(p.ended, now).Sub(p.started), p.exit
		f.wasReady = p.readyAt.After(p.started)
	}
	p.failure = f
}

// failures returns those that failed, in file order.
func (s *supervisor) failures() []*failure {
	var out []*failure
	for _, p := range s.procs {
		if p.failure != nil {
			out = append(out, p.failure)
		}
	}
	return out
}

// affected returns what needs p, whatever is in between: what was never started, and
// what was stopped although it ran. All are over.
func (s *supervisor) affected(p *proc) (never, stopped []string) {
	never, stopped = []string{}, []string{} // empty in JSON, not null
	needs := map[string]bool{p.ID: true}
	for more := true; more; {
		more = false
		for _, q := range s.procs {
			if !needs[q.ID] && slices.ContainsFunc(q.waitsFor(), func(id string) bool { return needs[id] }) {
				needs[q.ID], more = true, true
			}
		}
	}
	for _, q := range s.procs {
		switch {
		case !needs[q.ID] || q.state != procStopped:
		case q.last == nil:
			never = append(never, q.ID)
		default:
			stopped = append(stopped, q.ID)
		}
	}
	return never, stopped
}

// over tells whether nothing runs and nothing will.
func (s *supervisor) over() bool {
	return !slices.ContainsFunc(s.procs, func(p *proc) bool { return !p.over() })
}

// next is the earliest moment at which expire has something to do, zero for none.
func (s *supervisor) next(now time.Time) time.Time {
	next := s.guardDue
	for _, p := range s.procs {
		next = earliest(next, p.deadline)
		if nudge := s.nudge(p); p.state == procStopping && nudge.After(now) {
			next = earliest(next, nudge)
		}
	}
	return next
}

// earliest is the earlier of two times, where the zero time is never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// lastReadyBy is by when all that has started is ready or failed, or, where it was
// ready before, has been started again.
func (s *supervisor) lastReadyBy() time.Time {
	var last time.Time
	for _, p := range s.procs {
		for _, at := range []time.Time{p.readyBy, p.deadline} {
			if at.After(last) {
				last = at
			}
		}
	}
	return last
}

// delay gives those that are starting so much more time.
func (s *supervisor) delay(d time.Duration) {
	for _, p := range s.procs {
		if p.state == procStarting && !p.deadline.IsZero() {
			p.readyBy = p.readyBy.Add(d)
			p.deadline = p.readyBy
		}
	}
}

// expire acts on the deadlines that are due. A deadline belongs to a state, so one
// that comes late, when the state has changed, does not exist any more.
func (s *supervisor) expire(now time.Time) {
	if !s.guardDue.IsZero() && !now.Before(s.guardDue) {
		s.replaceGuard(now)
	}
	for _, p := range s.procs {
		due := !p.deadline.IsZero() && !now.Before(p.deadline)
		switch {
		case !due:
		case p.state == procStarting:
			s.failNotReady(p, now)
			p.deadline = time.Time{}
		case p.state == procBackoff && !p.readyBy.IsZero() && !now.Before(p.readyBy):
			s.failNotReady(p, now)
			s.transition(p, procFailed, time.Time{})
		case p.state == procBackoff:
			s.transition(p, procWaiting, time.Time{})
		case p.state == procStopping:
			if !p.child.isReaped() {
				p.log.Warn("still running, sending SIGKILL", "pid", p.child.pid, "stop_timeout", s.stopTimeout(p))
			}
			s.kill(p, now)
		case p.state == procKilled:
			s.fail(p, failStuck, fmt.Sprintf("pid %d is still running %s after SIGKILL", p.child.pid, p.killPatience()), now)
			s.transition(p, procFailed, time.Time{})
		}
	}
}

func (s *supervisor) failNotReady(p *proc, now time.Time) {
	s.fail(p, failNotReady, fmt.Sprintf("not ready within its start timeout of %s", s.startTimeout(p)), now)
}

// beginStop starts nothing from now on. What has no process is stopped by that.
func (s *supervisor) beginStop() {
	s.stopping = true
	s.releasePorts()
	if s.target != nil { // the order is neither that of the old file nor of the new
		var all []*Component
		for _, p := range s.procs {
			all = append(all, p.Component)
		}
		s.before = stopOrder(all)
	}
	for _, p := range s.procs {
		s.abandon(p)
	}
}

// abandon has p not started any more, and no deadline for it to be ready.
func (s *supervisor) abandon(p *proc) {
	switch p.state {
	case procWaiting, procBackoff:
		s.transition(p, procStopped, time.Time{})
	case procStarting:
		p.deadline = time.Time{}
	}
}

// advanceStop stops those whose turn it is.
func (s *supervisor) advanceStop(now time.Time) {
	for _, p := range s.procs {
		s.stopInTurn(p, now)
	}
}

// stopInTurn sends p its stop signal, if it runs and everything that has to stop before
// it has ended. Of an input half its stop timeout is enough, because some servers end
// only once their reader has closed the stream.
func (s *supervisor) stopInTurn(p *proc, now time.Time) {
	if !p.runs() || slices.ContainsFunc(s.before[p.ID], func(e stopEdge) bool { return s.holds(e, now) }) {
		return
	}
	p.log.Info("stopping", "pid", p.child.pid, "signal", p.stopSignal().String())
	p.stopSent = now
	p.child.signal(p.stopSignal())
	s.transition(p, procStopping, now.Add(s.stopTimeout(p)))
}

// holds tells whether one that is to stop, too, keeps another from being stopped.
func (s *supervisor) holds(e stopEdge, now time.Time) bool {
	first := s.byID[e.id]
	if first == nil || first.over() || !first.leaving && !s.stopping {
		return false
	}
	nudge := s.nudge(first)
	return !e.input || nudge.IsZero() || now.Before(nudge)
}

// nudge is when those that read from p are stopped although p has not ended.
func (s *supervisor) nudge(p *proc) time.Time {
	if p.stopSent.IsZero() {
		return time.Time{}
	}
	return p.stopSent.Add(s.stopTimeout(p) / 2)
}

// stopBound is the longest that a stop can take from its beginning: the slowest
// chain of those that have to stop one after the other, and then what they left.
func (s *supervisor) stopBound() time.Duration {
	memo := make(map[string]time.Duration)
	var bound func(id string) time.Duration
	bound = func(id string) time.Duration {
		if d, ok := memo[id]; ok || s.byID[id] == nil {
			return d
		}
		var longest time.Duration
		for _, e := range s.before[id] {
			longest = max(longest, bound(e.id))
		}
		memo[id] = longest + s.stopTimeout(s.byID[id]) + s.byID[id].killPatience()
		return memo[id]
	}
	var longest time.Duration
	for id := range s.byID {
		longest = max(longest, bound(id))
	}
	return longest + sweepGrace + killPatience
}

// reloaded is what a change of the pipeline file comes to, by id.
type reloaded struct {
	added, removed, restarted []string
	unchanged                 int
}

// reload takes over the pipeline file as it is now: what is new in it starts, what
// has changed is stopped and then started anew, what is not in it any more is
// stopped, and the rest is left alone. It fails, and changes nothing, where no port
// can be found for what is new. A reload before all that leaves has gone is added to
// the one before.
func (s *supervisor) reload(next *Pipeline) (reloaded, error) {
	var out reloaded
	listed := make(map[string]bool)
	ports := make(map[string]*reservedPort)
	for _, c := range next.components() {
		listed[c.ID] = true
		if s.byID[c.ID] != nil {
			continue
		}
		port, err := reservePort(c)
		if err != nil {
			for _, port := range ports {
				port.release()
			}
			return out, fmt.Errorf("component %s: %v", c.ID, err)
		}
		ports[c.ID] = port
	}
	for _, c := range next.components() {
		switch p := s.byID[c.ID]; {
		case p == nil:
			out.added = append(out.added, c.ID)
			s.procs = append(s.procs, s.newProc(c))
			s.ports[c.ID] = ports[c.ID]
		case !p.leaving && reflect.DeepEqual(p.Component, c):
			out.unchanged++
		default:
			out.restarted = append(out.restarted, c.ID)
			s.leave(p, c)
		}
	}
	for _, p := range s.procs {
		if !listed[p.ID] {
			out.removed = append(out.removed, p.ID)
			s.leave(p, nil)
		}
	}
	s.target = next
	s.settle()
	return out, nil
}

func (s *supervisor) newProc(c *Component) *proc {
	p := &proc{Component: c, log: s.log.With("component", c.ID)}
	s.byID[c.ID] = p
	s.edition++
	return p
}

// leave has p stopped, and successor take its place. What waits for it waits for that.
func (s *supervisor) leave(p *proc, successor *Component) {
	p.leaving, p.successor, p.wasReady = true, successor, false
	s.abandon(p)
}

// advanceLeave stops those that leave, in the order of a stop, and lets go of those that
// have ended.
func (s *supervisor) advanceLeave(now time.Time) {
	if s.target == nil || s.stopping {
		return
	}
	for _, p := range s.procs {
		if p.leaving {
			s.stopInTurn(p, now)
		}
	}
	s.settle()
}

// settle lets those that leave and are over go. After the last of them, everything is
// as the file has it.
func (s *supervisor) settle() {
	for i, p := range s.procs {
		if !p.leaving || !p.over() || p.failure != nil {
			continue
		}
		s.ports[p.ID].release()
		delete(s.ports, p.ID)
		delete(s.byID, p.ID)
		s.edition++
		if s.procs[i] = nil; p.successor != nil {
			s.procs[i] = s.newProc(p.successor)
			port, err := reservePort(p.successor)
			if err != nil {
				s.fail(s.procs[i], failStart, err.Error(), time.Time{})
				s.transition(s.procs[i], procFailed, time.Time{})
				port = new(reservedPort)
			}
			s.ports[p.ID] = port
		}
	}
	s.procs = slices.DeleteFunc(s.procs, func(p *proc) bool { return p == nil })
	if slices.ContainsFunc(s.procs, func(p *proc) bool { return p.leaving }) {
		return
	}
	s.before = s.target.stopAfter()
	order := make(map[string]int)
	for i, c := range s.target.components() {
		order[c.ID] = i
	}
	slices.SortFunc(s.procs, func(a, b *proc) int { return order[a.ID] - order[b.ID] })
	s.target = nil
}

// killAll sends SIGKILL to all that still run.
func (s *supervisor) killAll(now time.Time) {
	s.beginStop()
	for _, p := range s.procs {
		if !p.over() && p.state != procKilled {
			s.kill(p, now)
		}
	}
}

func (s *supervisor) kill(p *proc, now time.Time) {
	p.child.kill()
	s.transition(p, procKilled, now.Add(p.killPatience()))
}

// killPatience is longer for a container, which its engine has to kill.
func (p *proc) killPatience() time.Duration {
	if p.Image != "" {
		return killPatience + 2*engineTimeout
	}
	return killPatience
}

func (s *supervisor) startTimeout(p *proc) time.Duration {
	if p.StartTimeout > 0 {
		return time.Duration(p.StartTimeout)
	}
	return s.settings.startTimeout
}

func (s *supervisor) stopTimeout(p *proc) time.Duration {
	if p.StopTimeout > 0 {
		return time.Duration(p.StopTimeout)
	}
	return s.settings.stopTimeout
}

// child is one process and the group that it leads. Its pumps and its reaper run
// beside the supervisor; what they share is named below.
type child struct {
	cmd       *exec.Cmd
	container *container // nil for none
	reaper    *reaper
	guard     *guard
	cgroup    *cgroup
	pidfd     int // -1 for none; Linux
	pid       int
	outputs   []*os.File    // read ends of its output
	drained   chan struct{} // closed when no output will come any more
	expired   chan struct{} // closed when what is left of the group gets SIGKILL
	pumping   atomic.Int32  // pumps that still run
	tail      tail

	healthPort string // HEALTH_PORT of its component

	mu     sync.Mutex // guards the fields below
	asked  bool       // a signal to stop was sent
	killed bool
	reaped bool // nothing is left of the group, so its id may be someone else's now
}

// spawn starts c as the leader of a process group of its own, its output read by
// pumps that hand it on.
func (s *supervisor) spawn(c *Component) (*child, error) {
	cmd, box, err := s.command(c)
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ch := &child{cmd: cmd, container: box, healthPort: s.ports[c.ID].number, reaper: s.reaper, guard: s.guard, cgroup: s.cgroup, drained: make(chan struct{}), expired: make(chan struct{})}
	ch.cgroup.hold(cmd.SysProcAttr)
	ch.usePidfd()
	var theirs []*os.File
	defer func() {
		for _, w := range theirs {
			w.Close()
		}
	}()
	for range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			ch.closeOutputs()
			return nil, describeStart(cmd, err)
		}
		ch.outputs, theirs = append(ch.outputs, r), append(theirs, w)
	}
	cmd.Stdout, cmd.Stderr = theirs[0], theirs[1]
	if err := s.leaders.start(c.ID, s.reaper, cmd); err != nil {
		ch.closeOutputs()
		return nil, describeStart(cmd, err)
	}
	ch.pid = cmd.Process.Pid
	s.guard.lead(ch.pid)
	ch.pumping.Store(2)
	go ch.pump(c.ID, "stdout", ch.outputs[0], s.emit, s.settings.flush)
	go ch.pump(c.ID, "stderr", ch.outputs[1], s.emit, s.settings.flush)
	return ch, nil
}

// command is what runs c: its program, or the engine's command line, of which box is
// the container.
func (s *supervisor) command(c *Component) (cmd *exec.Cmd, box *container, err error) {
	given, err := s.given(c)
	if err != nil {
		return nil, nil, err
	}
	if c.Image != "" {
		s.boxed++
		cmd, box = s.settings.engine.container(c, given, s.boxed)
		return cmd, box, nil
	}
	cmd = exec.Command(c.Command[0], slices.Concat(c.Command[1:], c.Args)...)
	cmd.Dir = c.WorkingDir
	cmd.Env = slices.Concat(slices.DeleteFunc(os.Environ(), hidden), []string{"PWD=" + c.WorkingDir}, given)
	return cmd, nil, nil
}

func (c *child) closeOutputs() {
	for _, r := range c.outputs {
		r.Close()
	}
}

// describeStart says what keeps cmd from being started.
func describeStart(cmd *exec.Cmd, err error) error {
	dir, dirErr := os.Stat(cmp.Or(cmd.Dir, "."))
	if dirErr == nil && !dir.IsDir() {
		dirErr = syscall.ENOTDIR
	}
	if dirErr != nil {
		return fmt.Errorf("cannot enter its working_dir %q: %v", cmd.Dir, cause(dirErr))
	}
	if err := syscall.Access(cmp.Or(cmd.Dir, "."), 1); err != nil { // X_OK
		return fmt.Errorf("cannot enter its working_dir %q: %v", cmd.Dir, err)
	}
	return describeProgram(cmd.Args[0], cmd.Dir, err)
}

// describeProgram says what is wrong with a program that is to run in the folder dir.
func describeProgram(program, dir string, err error) error {
	file, fileErr := os.Stat(program)
	why := cause(err).Error()
	switch err := cause(err); {
	case errors.Is(err, exec.ErrNotFound):
		why = "it is not found in PATH"
		if _, err := os.Stat(filepath.Join(dir, program)); err == nil {
			why += fmt.Sprintf("; the file in its folder is %q", "./"+program)
		}
	case errors.Is(err, fs.ErrNotExist) && fileErr == nil:
		if why = "the interpreter that it names, or its loader, does not exist"; scriptFault(program) == crlfLine {
			why = crlfLine
		}
	case errors.Is(err, fs.ErrPermission) && fileErr == nil && file.IsDir():
		why = "it is a folder"
	case errors.Is(err, fs.ErrPermission) && fileErr == nil && file.Mode()&0o111 != 0:
		why = "permission denied, to it or to the interpreter that it names"
	case errors.Is(err, fs.ErrPermission) && fileErr == nil:
		why = "it is not executable (chmod +x)"
	case errors.Is(err, syscall.EAGAIN):
		why = "the limit of processes is reached (ulimit -u, or TasksMax= of a unit)"
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		why = "the limit of open files is reached (ulimit -n, or LimitNOFILE= of a unit)"
	case errors.Is(err, syscall.ENOEXEC):
		why = noProgram
	}
	return fmt.Errorf("cannot run %q: %s", program, why)
}

// cause drops what os and exec put before the reason: the path is named already.
func cause(err error) error {
	var path *fs.PathError
	var lookup *exec.Error
	var call *os.SyscallError
	switch {
	case errors.As(err, &call):
		return call.Err
	case errors.As(err, &path):
		return path.Err
	case errors.As(err, &lookup):
		return lookup.Err
	}
	return err
}

// signal sends sig, a request to end, to the group, and SIGCONT, because a process
// that was stopped hears of no other.
func (c *child) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = true
	switch {
	case c.reaped:
	case c.container != nil:
		c.container.signal(sig)
	default:
		_ = syscall.Kill(-c.pid, sig) // fails only for a group that is already gone
		_ = syscall.Kill(-c.pid, syscall.SIGCONT)
	}
}

// kill sends SIGKILL to the group.
func (c *child) kill() {
	c.signal(syscall.SIGKILL)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.killed {
		c.killed = true
		close(c.expired)
	}
}

// reap waits for the process and returns how it ended, once: then the group is
// gone and its output has been handed on, or is lost because nobody has taken it
// when SIGKILL is due. A process that ended unasked leaves a group that nobody wants.
// One that was asked to end may have members that still write their last lines, so
// they get the time until SIGKILL is due.
func (c *child) reap() (state *os.ProcessState, lost bool, left error) {
	left = c.awaitEnd()
	c.mu.Lock()
	if !c.asked {
		_ = syscall.Kill(-c.pid, syscall.SIGKILL)
	}
	_ = c.reaper.wait(c.cmd) // how it ended is in ProcessState
	c.reaped = c.groupIsEmpty()
	empty := c.reaped
	c.mu.Unlock()
	if !empty {
		c.awaitGroup()
		c.mu.Lock()
		c.reaped = true
		c.mu.Unlock()
	}
	c.guard.leave(c.pid)

	// A process that left the group may hold the pipes open: what is in them now is
	// all that was written before the end, and nothing more is waited for.
	for _, r := range c.outputs {
		_ = r.SetReadDeadline(time.Unix(1, 0))
	}
	select {
	case <-c.drained:
	case <-c.expired: // maybe a moment ago, by the SIGKILL that made this end
		timer := time.NewTimer(outputGrace)
		defer timer.Stop()
		select {
		case <-c.drained:
		case <-timer.C:
			lost = true
		}
	}
	return c.cmd.ProcessState, lost, left
}

// isReaped tells whether nothing is left of the group.
func (c *child) isReaped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reaped
}

// awaitExit returns when the process pid, a child, has ended, and leaves it a
// zombie. It holds a thread.
func awaitExit(pid int) {
	const idTypePID = 1 // P_PID of waitid(2)
	var info [128]byte  // siginfo_t, which the kernel insists on
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, idTypePID, uintptr(pid), uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if err != syscall.EINTR {
			return
		}
	}
}

// pump hands on what comes from r in whole lines until it ends, or, after reap has
// set a deadline, until nothing is left in the pipe, and that is written.
func (c *child) pump(id, stream string, r *os.File, emit emitter, flush func()) {
	defer func() {
		r.Close()
		if flush != nil {
			flush()
		}
		if c.pumping.Add(-1) == 0 {
			close(c.drained)
		}
	}()
	pass := func(lines []byte) {
		c.tail.add(lines)
		emit(id, stream, lines)
	}
	read := r.Read
	buf := make([]byte, 0, minBuffer)
	for {
		room := min(cap(buf), max(len(buf), maxLine)+1) - len(buf) // no more of a line than tells whether it is too long
		n, err := read(buf[len(buf) : len(buf)+room])
		buf = passLines(buf[:len(buf)+n], pass)
		if n == room && cap(buf) < pipeSize {
			buf = slices.Grow(buf, pipeSize-len(buf))
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			read = leftover(r)
		case err != nil:
			if len(buf) > 0 {
				pass(append(buf, '\n'))
			}
			return
		}
	}
}

// passLines passes the whole lines of buf, or the first maxLine bytes of one that
// is longer, and returns the rest with room to read more. A CR that comes next may be
// of the end of the line, which the byte after it shows.
func passLines(buf []byte, pass func([]byte)) []byte {
	if i := bytes.LastIndexByte(buf, '\n'); i >= 0 {
		pass(buf[:i+1])
		buf = buf[:copy(buf, buf[i+1:])]
	}
	switch {
	case len(buf) > maxLine && (len(buf) > maxLine+1 || buf[maxLine] != '\r'):
		n := maxLine
		if buf[n-1] == '\r' { // which would be taken for the end of a line
			n--
		}
		pass(append(slices.Clip(buf[:n]), '\n'))
		buf = buf[:copy(buf, buf[n:])]
	case len(buf) == cap(buf):
		grown := make([]byte, len(buf), min(2*cap(buf), maxLine+2))
		copy(grown, buf)
		buf = grown
	}
	return buf
}

// leftover reads what a pipe holds and ends where a reader would have to wait. It
// reads no more than a pipe can hold, so that a writer that lives on cannot keep it.
func leftover(r *os.File) func([]byte) (int, error) {
	_ = r.SetReadDeadline(time.Time{})
	left := 16 << 20 // pipe(7): a pipe holds 1 MiB at most, unless root has enlarged it
	return func(p []byte) (n int, err error) {
		raw, err := r.SyscallConn()
		if err != nil || left <= 0 {
			return 0, io.EOF
		}
		rawErr := raw.Read(func(fd uintptr) bool {
			n, err = syscall.Read(int(fd), p)
			return true
		})
		if rawErr != nil || err != nil || n <= 0 {
			return 0, io.EOF
		}
		left -= n
		return n, nil
	}
}

// tail keeps the end of what a process printed.
type tail struct {
	mu  sync.Mutex
	buf []byte
	cut bool // something came before
}

func (t *tail) add(lines []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(lines); n > tailSize {
		lines, t.cut, t.buf = lines[n-tailSize:], true, t.buf[:0]
	}
	if over := len(t.buf) + len(lines) - tailSize; over > 0 {
		t.buf, t.cut = t.buf[:copy(t.buf, t.buf[over:])], true
	}
	t.buf = append(t.buf, lines...)
}

// Write is add, for the output of a command.
func (t *tail) Write(p []byte) (int, error) {
	t.add(p)
	return len(p), nil
}

// lines returns the last lines, ten at most.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSuffix(string(t.buf), "\n"), "\n")
	if len(t.buf) == 0 {
		return nil
	}
	if t.cut && len(lines) > 1 {
		lines = lines[1:]
	}
	return lines[max(0, len(lines)-10):]
}

// describeExit says how a process ended.
func describeExit(state *os.ProcessState) string {
	status, ok := state.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		return fmt.Sprintf("exit status %d", state.ExitCode())
	}
	text := fmt.Sprintf("killed by signal %d (%s)", status.Signal(), status.Signal())
	if status.CoreDump() {
		text += ", core dumped"
	}
	return text
}

// reservedPort holds a port until the component that is to listen on it starts.
type reservedPort struct {
	number string
	hold   net.Listener // nil when released, or when the file names the port
}

// reservePort takes the port that the file gives c as HEALTH_PORT, else a free one.
func reservePort(c *Component) (*reservedPort, error) {
	if number := fileEnv(c, "HEALTH_PORT"); number != "" {
		return &reservedPort{number: number}, nil
	}
	hold, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("cannot find a free port for its HEALTH_PORT: %v", err)
	}
	return &reservedPort{number: strconv.Itoa(hold.Addr().(*net.TCPAddr).Port), hold: hold}, nil
}

func (p *reservedPort) release() {
	if p.hold != nil {
		p.hold.Close()
		p.hold = nil
	}
}

func (s *supervisor) releasePorts() {
	for _, port := range s.ports {
		port.release()
	}
}

// fileEnv is what the file itself sets name to.
func fileEnv(c *Component, name string) string {
	if v, ok := c.Env[name]; ok {
		return v
	}
	return c.configEnv()[name]
}

// given is the environment that c is given: what flowctl gives, then what the file
// gives, and last what the file cannot change. It fails where a file of env_files
// cannot be read. To this a process has flowctl's own, and a container its image's.
func (s *supervisor) given(c *Component) ([]string, error) {
	var env []string
	set := func(name, value string) { env = append(env, name+"="+value) }
	port := s.ports[c.ID].number
	set("COMPONENT_ID", c.ID)
	set("SERVICE_ID", c.ID)
	set("HEALTH_PORT", port)
	set("HEALTH_ENDPOINT", "http://"+net.JoinHostPort("localhost", port)+"/health")
	set("FLOWCTL_HEARTBEAT_INTERVAL", strconv.FormatInt(s.settings.heartbeat.Milliseconds(), 10)+"ms")
	for name, value := range c.configEnv() {
		set(name, value)
	}
	for name, value := range c.Env {
		set(name, value)
	}
	for name, path := range c.EnvFiles {
		value, err := readEnvFile(path)
		if err != nil {
			return nil, fmt.Errorf("env_files.%s: %v", name, err)
		}
		set(name, value)
	}
	set("ENABLE_FLOWCTL", "true")
	set("FLOWCTL_ENABLED", "true")
	set("FLOWCTL_ENDPOINT", s.settings.endpoint)
	if c.TLS {
		env = append(env, s.settings.tlsEnv...)
	}
	if len(c.Ports) > 0 {
		set("FLOWCTL_ENDPOINT", cmp.Or(s.settings.gateway, s.settings.endpoint))
	}
	set("FLOWCTL_COMPONENT_ID", c.ID)
	set("FLOWCTL_SERVICE_ID", c.ID)
	set(runMark, s.run)
	return env, nil
}

// hidden tells whether a variable is a word to flowctl alone: systemd's, as a child
// that heard it would speak for flowctl (sd_notify(3), sd_listen_fds(3)), or that of
// an outer flowctl, whose files of TLS are not this one's.
func hidden(entry string) bool {
	name, _, _ := strings.Cut(entry, "=")
	return name == "NOTIFY_SOCKET" || name == "JOURNAL_STREAM" || strings.HasPrefix(name, "WATCHDOG_") || strings.HasPrefix(name, "LISTEN_") || strings.HasPrefix(name, "FLOWCTL_TLS_")
}

// readEnvFile returns the content of a file as the value of a variable, without the
// newline that editors put at its end. What could keep flowctl waiting, as a FIFO does,
// is an error.
func readEnvFile(path string) (string, error) {
	const most = 128 << 10                                         // execve(2): MAX_ARG_STRLEN
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // to open a FIFO would wait for a writer
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() && !info.IsDir() && path != os.DevNull { // to read a folder is an error
		return "", fmt.Errorf("%s is no plain file, and could keep flowctl waiting", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return "", err
	}
	if len(data) > most {
		return "", fmt.Errorf("%s is larger than %d bytes, the most that a variable can hold", path, most)
	}
	if bytes.IndexByte(data, 0) >= 0 {
		return "", fmt.Errorf("%s holds a NUL byte, which no variable can", path)
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r"), nil
}
