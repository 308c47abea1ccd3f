package main

import (
	"cmp"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"reflect"
	"slices"
	"syscall"
	"time"
)

const (
	minBackoff   = time.Second      // before the first restart
	maxBackoff   = 30 * time.Second // restarts never wait longer, but for jitter
	healthyReset = time.Minute      // a component that was ready this long starts over with minBackoff
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
	registered bool                // had its last process registered
	wasReady   bool                // was its last process
	exit       *syscall.WaitStatus // of its last process; nil: it had not ended
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

	registered bool                // its last process has; who owns the supervisor notes it
	exit       *syscall.WaitStatus // of its last process, nil while it runs

	leaving   bool       // the file has changed: it is to be stopped, and then is gone
	successor *Component // takes its place then, nil for none
}

// over tells whether no process runs and none will.
func (p *proc) over() bool {
	return p.state == procCompleted || p.state == procFailed || p.state == procStopped
}

// runs tells whether it has a process that was not asked to end.
func (p *proc) runs() bool { return p.state == procStarting || p.state == procReady }

// procSettings are the run's answers to what the file leaves open.
type procSettings struct {
	startTimeout time.Duration
	stopTimeout  time.Duration
}

// supervisor starts, restarts and stops the processes of a pipeline. One goroutine
// owns it and calls its methods; it is told the time and never asks. What happens
// elsewhere arrives by exited, and next says when a deadline is due. Only componentAt and
// warnOfStranger are called from elsewhere: of its fields they use none that changes.
type supervisor struct {
	settings procSettings
	log      *slog.Logger
	launcher *launcher
	procs    []*proc // in file order
	byID     map[string]*proc
	before   map[string][]stopEdge // by id: what has to stop before it
	stopping bool
	target   *Pipeline // what is to be when all that leaves has gone, nil otherwise
	edition  int       // counts the changes of procs
}

// newSupervisor returns a supervisor of p. The caller runs it until over is true.
func newSupervisor(p *Pipeline, settings procSettings, l *launcher, log *slog.Logger) *supervisor {
	s := &supervisor{settings: settings, log: log, launcher: l, byID: make(map[string]*proc), before: p.stopAfter()}
	for _, c := range p.components() {
		s.procs = append(s.procs, s.newProc(c))
	}
	return s
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
	var err error
	if p.child, err = s.launcher.start(p.Component); err != nil {
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
	return nil
}

// ready notes that p is ready.
func (s *supervisor) ready(p *proc, now time.Time) {
	p.readyAt, p.wasReady, p.healthy, p.readyBy = now, true, true, time.Time{}
	s.transition(p, procReady, time.Time{})
	p.log.Info("ready", "after", now.Sub(p.started).Round(time.Millisecond))
}

// procOf is the proc that ch runs for, nil where SIGKILL did not end it in time.
func (s *supervisor) procOf(ch *child) *proc {
	for _, p := range s.procs {
		if p.child == ch {
			return p
		}
	}
	return nil
}

// exited takes the end of a process in and decides what becomes of its component.
func (s *supervisor) exited(e childEnd, now time.Time) {
	p := s.procOf(e.child)
	p.child, p.ended, p.exit = nil, now, &e.status
	if !s.stopping { // else close sweeps
		s.launcher.endStrays(p.ID)
	}
	reason := describeExit(e.status)
	asked := p.state == procStopping || p.state == procKilled || s.stopping || p.leaving
	wasReady := p.state == procReady
	p.log.Info("ended", "pid", e.child.pid, "reason", reason, "lived", now.Sub(p.started).Round(time.Millisecond))
	if e.lost {
		p.log.Error("the rest of its output is lost: standard output is not read")
	}
	if e.containerErr != nil {
		p.log.Error("cannot remove its container", "err", e.containerErr)
	}
	switch {
	case p.failure != nil:
		s.transition(p, procFailed, time.Time{})
	case asked:
		s.transition(p, procStopped, time.Time{})
	case s.wantsRestart(p, e.status == 0):
		s.backOff(p, wasReady, now)
	case e.status == 0 && wasReady:
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
	var next time.Time
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
	s.launcher.signal(p.child, p.stopSignal())
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
	for _, c := range next.components() {
		listed[c.ID] = true
		if _, err := s.launcher.healthPort(c); err != nil {
			return out, fmt.Errorf("component %s: %v", c.ID, err)
		}
	}
	for _, c := range next.components() {
		switch p := s.byID[c.ID]; {
		case p == nil:
			out.added = append(out.added, c.ID)
			s.procs = append(s.procs, s.newProc(c))
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
		delete(s.byID, p.ID)
		s.edition++
		if s.procs[i] = nil; p.successor != nil {
			s.procs[i] = s.newProc(p.successor)
		} else {
			s.launcher.forget(p.ID)
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
	s.launcher.signal(p.child, syscall.SIGKILL)
	s.transition(p, procKilled, now.Add(p.killPatience()))
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
