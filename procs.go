package main

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"
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

// supervisor starts, restarts and stops the processes of a pipeline. One goroutine
// owns it and calls its methods; it is told the time and never asks. What happens
// elsewhere arrives in exits, and next says when a deadline is due.
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

// exit is the end of one process: it was waited for, its group is gone and its
// output has been passed on.
type exit struct {
	proc  *proc
	child *child
	state *os.ProcessState
	lost  bool  // nobody took the rest of its output
	left  error // its container may be there still
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
