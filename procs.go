package main

// The supervisor decides which component starts, restarts and stops when. It is a state machine: it
// is told what happens and at what time, and starts and signals processes by a starter.

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"syscall"
	"time"
)

const (
	minBackoff   = time.Second      // before the first restart
	maxBackoff   = 30 * time.Second // the longest pause before a restart, without its jitter
	healthyReset = time.Minute      // a component that was ready this long starts over with minBackoff
	maxTries     = 3                // restarts in a row of one that is unhealthy

	settleTime   = time.Second            // that one which is ready by running alone must live, before the pipeline is ready
	signalWindow = 500 * time.Millisecond // between an end and a signal to flowctl that are taken for one signal to all

	noticedLate = 100 * time.Millisecond // a timeout that is noticed later than this may be one in which flowctl did not run
	secondLook  = time.Second            // until such a timeout is judged
)

// starter starts the processes of components and signals their groups. It does not wait for any.
type starter interface {
	start(c *Component) (*child, error)
	signal(ch *child, sig syscall.Signal)
}

// eventStreams are the streams by which flowctl moves the events of components.
type eventStreams interface {
	// leave has the streams of component id end, whose process is about to.
	leave(id string, how leaving)
	// holds tells whether it has streams that have not ended.
	holds(id string) bool
}

// procState is where a component is in its life. Only supervisor.transition changes it.
type procState int

const (
	procWaiting   procState = iota // for what it waits on, or to be started again
	procStarting                   // its process runs and was not ready yet
	procReady                      // its process was ready once; how it is now is in health
	procEnded                      // its process ended as it should not; that is judged at deadline
	procBackoff                    // its process ended; it is started again at deadline
	procStopping                   // it got its stop signal, and gets SIGKILL at deadline
	procKilled                     // it got SIGKILL; at deadline it counts as stuck
	procCompleted                  // it ended by itself, as it should
	procFailed                     // it failed and is not started again
	procStopped                    // it ended because it was asked to, or never started
)

func (s procState) String() string {
	return [...]string{"waiting", "starting", "ready", "ended", "backoff", "stopping", "killed", "completed", "failed", "stopped"}[s]
}

// failKind says by what a component failed. Reports print it.
type failKind string

const (
	failStart     failKind = "start"     // it could not be started
	failEnded     failKind = "ended"     // its process ended unasked
	failNotReady  failKind = "not_ready" // it was not ready within its start timeout
	failUnhealthy failKind = "unhealthy" // it was unhealthy for too long
	failStuck     failKind = "stuck"     // its process outlived SIGKILL
)

// hint says what may help against a failure. Reports have the words for it.
type hint int

const (
	hintNone      hint = iota
	hintOpenFiles      // the limit of open files is reached
	hintProcesses      // the limit of processes is reached
	hintAccess         // in a unit: a file or folder cannot be used
	hintRegister       // it has not registered
	hintUnmatched      // nor has it, but something registered that is not in the pipeline
	hintCheck          // its health_check does not pass
	hintHeartbeat      // its heartbeats stopped
	hintMute           // it has never sent one
	hintDeclared       // it has declared itself unhealthy
	hintStream         // its events cannot be moved
)

// failure tells why a component failed, and how its last process was then.
type failure struct {
	component  *Component
	kind       failKind
	reason     string
	hint       hint
	lived      time.Duration       // 0: no process was started
	pid        int                 // 0: no process was started
	registered bool                // the process had registered
	wasReady   bool                // the process had been ready
	status     *syscall.WaitStatus // nil: the process had not ended
	tail       []string            // its last lines
	explained  bool                // reason has what the control plane knows
}

// healthInfo is how a component is, as the control plane told it last.
type healthInfo struct {
	ok         bool
	registered bool   // its last process has registered
	cause      string // why it is not ok
}

// proc is a component in the hands of the supervisor.
type proc struct {
	component *Component
	log       *slog.Logger
	state     procState
	deadline  time.Time // when the state has lasted too long; zero: never
	readyBy   time.Time // end of its start timeout: counted from its first start until it was ready once, then from each start

	child    *child              // the process that runs now, nil for none
	last     *child              // the last process, also while it runs; nil: none was started
	status   *syscall.WaitStatus // how the last process ended, nil while it runs
	started  time.Time           // of the last process
	ended    time.Time           // of the last process, zero while it runs
	readyAt  time.Time           // when a process of it was ready last
	stopSent time.Time           // when it got its stop signal
	wasReady bool                // one of its processes was ready: what waits for it may be started again

	health         healthInfo
	unhealthySince time.Time // zero unless the state is procReady and health is not ok
	lookedAgain    bool      // at its start or unhealthy timeout, see lookAgain

	attempts int  // restarts since it was last ready for healthyReset
	tries    int  // restarts because it was unhealthy, since it was last healthy
	ill      bool // it is asked to end because it is unhealthy, and then started again
	restarts int
	failure  *failure // nil unless it failed

	retiring    bool       // a reload has it stopped and taken out
	replacement *Component // takes its place then, nil for none
	brought     bool       // a reload or restart has brought it, and it has not worked since: if it fails, the run goes on
	renewed     bool       // it is such a replacement
}

func (p *proc) id() string { return p.component.ID }

// over tells whether no process runs and none will.
func (p *proc) over() bool {
	return p.state == procCompleted || p.state == procFailed || p.state == procStopped
}

// isGone tells whether p has ended and no process takes its place.
func (p *proc) isGone() bool { return p.over() && p.replacement == nil }

// wasReadyNow tells whether its last process was ready.
func (p *proc) wasReadyNow() bool { return !p.readyAt.IsZero() && !p.readyAt.Before(p.started) }

// runs tells whether it has a process that was not asked to end.
func (p *proc) runs() bool { return p.state == procStarting || p.state == procReady }

// procTimes are a run's answers to what the pipeline file leaves open.
type procTimes struct {
	start     time.Duration // from the start of a component until it is ready
	unhealthy time.Duration // how long a component may stay unhealthy
	stop      time.Duration // from the stop signal to SIGKILL
}

// supervisor starts, restarts and stops the components of a pipeline. One goroutine calls its methods.
// It is told the time and never asks; next says when a deadline is due.
type supervisor struct {
	times      procTimes
	log        *slog.Logger
	starter    starter
	streams    eventStreams // nil for none
	procs      []*proc      // in file order
	byID       map[string]*proc
	before     map[string][]stopEdge // by id: what has to stop before it
	stopping   bool
	watching   bool           // what fails waits for a change of its files, and ends no run
	complete   bool           // stopping because all but services have completed
	signal     syscall.Signal // that asked flowctl last to stop, 0 for none
	signalled  time.Time      // when
	loaded     *Pipeline      // what was asked for last
	pending    *Pipeline      // what a reload leads to once all that retire have ended; nil for none
	generation int            // counts the changes of procs
}

func newSupervisor(p *Pipeline, times procTimes, st starter, log *slog.Logger) *supervisor {
	s := &supervisor{times: times, log: log, starter: st, loaded: p, byID: make(map[string]*proc), before: stopOrder(p.components())}
	for _, c := range p.components() {
		s.procs = append(s.procs, s.newProc(c))
	}
	return s
}

func (s *supervisor) newProc(c *Component) *proc {
	p := &proc{component: c, log: s.log.With("component", c.ID)}
	s.byID[c.ID] = p
	s.generation++
	return p
}

// startable returns what may start now, in file order. What a reload brings may want a port of what it stops.
func (s *supervisor) startable() []*proc {
	if s.stopping {
		return nil
	}
	var out []*proc
	services := s.services()
	for _, p := range s.procs {
		if p.state == procWaiting && !p.retiring && !(p.brought && s.pending != nil) && !slices.ContainsFunc(p.waitsFor(services), func(id string) bool { return !p.mayFollow(s.byID[id]) }) {
			out = append(out, p)
		}
	}
	return out
}

// services returns the ids of the services.
func (s *supervisor) services() (ids []string) {
	for _, p := range s.procs {
		if p.component.Role == roleService {
			ids = append(ids, p.id())
		}
	}
	return ids
}

// waitsFor returns the ids of what has to be ready before p starts: what it names, and the services.
func (p *proc) waitsFor(services []string) []string {
	if p.component.Role == roleService {
		return p.component.waitsFor()
	}
	return append(p.component.waitsFor(), services...)
}

// failedBefore returns what has failed of what p, which was not started, waits for, directly or not, "" for nothing.
func (s *supervisor) failedBefore(p *proc) string {
	services, seen := s.services(), make(map[string]bool)
	for queue := []*proc{p}; len(queue) > 0; queue = queue[1:] {
		if queue[0].failure != nil {
			return queue[0].id()
		}
		if queue[0].state != procWaiting {
			continue
		}
		for _, id := range queue[0].waitsFor(services) {
			if first := s.byID[id]; first != nil && !seen[id] {
				seen[id] = true
				queue = append(queue, first)
			}
		}
	}
	return ""
}

// mayFollow tells whether p, which waits for first, may start. Its first process needs first to be
// ready now. A restart needs only that first was ready once: its former process would have gone on.
func (p *proc) mayFollow(first *proc) bool {
	if p.started.IsZero() {
		return !first.retiring && (first.state == procCompleted || first.state == procReady && first.health.ok)
	}
	return first.wasReady
}

// start starts the process of p. On an error p has failed; but if p was ready once, the error counts
// as one more end of its process: a program that is being replaced can be run a moment later.
func (s *supervisor) start(p *proc, now time.Time) error {
	switch {
	case p.component.Oneshot && p.component.StartTimeout == 0:
		p.readyBy = time.Time{}
	case p.readyBy.IsZero() || p.wasReady || !now.Before(p.readyBy): // it may be past where p waited for others
		p.readyBy = now.Add(s.startTimeout(p))
	}
	p.started, p.health, p.stopSent, p.ill = now, healthInfo{}, time.Time{}, false
	child, err := s.starter.start(p.component)
	if err != nil {
		if p.wasReady && p.wantsRestart(false) {
			p.log.Error("cannot be started again", "err", err)
			s.backOff(p, false, now)
			return err
		}
		p.last = nil // the failure is of this start
		s.fail(p, failStart, p.withUsedUp(err.Error()), now)
		p.failure.hint = startHint(err)
		s.transition(p, procFailed, time.Time{})
		return err
	}
	p.child, p.last, p.status, p.ended = child, child, nil, time.Time{}
	s.transition(p, procStarting, p.readyBy)
	p.log.Info("started", "pid", child.pid)
	return nil
}

// startHint is the hint for a process that could not be started because of err.
func startHint(err error) hint {
	switch {
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return hintOpenFiles
	case errors.Is(err, syscall.EAGAIN):
		return hintProcesses
	case accessHint(err) != "":
		return hintAccess
	}
	return hintNone
}

// tell takes in how p is now. The first time that its process is healthy it is ready.
func (s *supervisor) tell(p *proc, h healthInfo, now time.Time) {
	h.registered = p.health.registered || h.registered && p.child != nil
	p.health = h
	switch {
	case p.retiring: // what waits for it waits for its replacement
	case p.state == procStarting && h.ok:
		s.ready(p, now)
	case p.state != procReady:
	case h.ok:
		p.unhealthySince = time.Time{}
	case p.unhealthySince.IsZero():
		p.unhealthySince, p.lookedAgain = now, false
	}
}

func (s *supervisor) ready(p *proc, now time.Time) {
	p.readyAt, p.tries = now, 0
	s.transition(p, procReady, time.Time{})
	p.settle(now)
	p.log.Info("ready", "after", now.Sub(p.started).Round(time.Millisecond))
}

// settle notes that p, which is ready, has shown that it works, once it has.
func (p *proc) settle(now time.Time) {
	if p.state == procReady && !p.retiring && !now.Before(p.settledAt()) {
		p.wasReady, p.readyBy, p.brought = true, time.Time{}, false
	}
}

// exited takes in the end of a process and decides what becomes of its component.
func (s *supervisor) exited(e childEnd, now time.Time) {
	p := s.byID[e.child.component.ID]
	p.child, p.ended, p.status = nil, now, &e.status
	p.log.Info("ended", "pid", e.child.pid, "reason", describeExit(e.status), "lived", now.Sub(p.started).Round(time.Millisecond))
	if e.lost {
		p.log.Error("the rest of its output is lost: standard output is not read")
	}
	if e.containerErr != nil {
		p.log.Error("cannot remove its container", "err", e.containerErr)
	}
	success := e.status.Exited() && e.status.ExitStatus() == 0
	wasReady := p.state == procReady
	if p.settle(now); success && wasReady {
		p.settle(p.settledAt()) // a job that is soon done works, too
	}
	switch {
	case p.failure != nil:
		s.transition(p, procFailed, time.Time{})
	case p.ill && !s.stopping && !p.retiring:
		s.backOff(p, false, now)
	case s.complete && !p.retiring && !(e.unasked && !success):
		s.transition(p, procCompleted, time.Time{})
	case !e.unasked && (p.state == procStopping || p.state == procKilled), p.retiring, s.stopping && (success || s.isBySignal(e.status, now)):
		s.transition(p, procStopped, time.Time{})
	case s.inputStops(p, now) && !(success && s.stopping):
		p.log.Warn("ended after what it reads from was stopped", "reason", describeExit(e.status))
		if s.stopping {
			s.transition(p, procStopped, time.Time{})
		} else {
			s.backOff(p, wasReady, now)
		}
	case !s.stopping && p.wantsRestart(success) && (p.tries < maxTries || wasReady):
		if p.tries > 0 {
			p.tries++
		}
		s.backOff(p, wasReady, now)
	case !s.stopping && s.isBySignal(e.status, now):
		s.transition(p, procStopped, time.Time{})
	case success && (wasReady || !p.component.registers()):
		p.wasReady, p.brought = true, false
		s.transition(p, procCompleted, time.Time{})
	default:
		s.transition(p, procEnded, now.Add(signalWindow))
	}
}

// heed takes in a signal to flowctl that asks for a stop: what ended just before, or does so just
// after, may have got it as well. Such an end is a stop.
func (s *supervisor) heed(sig syscall.Signal, now time.Time) {
	s.signal, s.signalled = sig, now
	for _, p := range s.procs {
		if p.state == procEnded {
			s.transition(p, procStopped, time.Time{})
		}
	}
}

// isBySignal tells whether a process that ended with status can have got the signal that flowctl got.
func (s *supervisor) isBySignal(status syscall.WaitStatus, now time.Time) bool {
	if s.signal == 0 {
		return false
	}
	same := status.Signaled() && status.Signal() == s.signal || status.ExitStatus() == 128+int(s.signal)
	return same && s.stopping || now.Sub(s.signalled) < signalWindow
}

// inputStops tells whether something that p reads from, directly or not, was told to stop and does not
// run again, or was replaced since p was started: p may end by what it reads then, as it likes, and has as
// long for that as for a stop.
func (s *supervisor) inputStops(p *proc, now time.Time) bool {
	ids, seen := slices.Clone(p.component.Inputs), make(map[string]bool)
	for i := 0; i < len(ids); i++ {
		q := s.byID[ids[i]]
		if q == nil || seen[q.id()] {
			continue
		}
		if !q.stopSent.IsZero() || q.renewed && (q.started.IsZero() || p.started.Before(q.started) && now.Sub(q.started) < s.stopTimeout(p)) {
			return true
		}
		seen[q.id()] = true
		ids = append(ids, q.component.Inputs...)
	}
	return false
}

// judge fails p, which ended as it should not.
func (s *supervisor) judge(p *proc, now time.Time) {
	reason := describeExit(*p.status)
	switch {
	case p.tries >= maxTries:
		reason = fmt.Sprintf("%s, and %d restarts have not healed it", reason, p.tries)
	case !p.wasReadyNow() && !p.usedUp():
		reason += " before it was ready"
	}
	s.fail(p, failEnded, p.withUsedUp(reason), now)
	s.transition(p, procFailed, time.Time{})
}

// wantsRestart tells whether the restart policy of p has it started again after an end.
func (p *proc) wantsRestart(success bool) bool {
	if p.usedUp() {
		return false
	}
	return p.component.RestartPolicy == restartAlways || p.component.RestartPolicy == restartOnFailure && !success
}

func (p *proc) usedUp() bool {
	return p.component.MaxRestarts > 0 && p.attempts >= p.component.MaxRestarts
}

// withUsedUp adds to the reason of a failure that the restarts of p are used up, if so.
func (p *proc) withUsedUp(reason string) string {
	if p.usedUp() {
		return fmt.Sprintf("%s, and max_restarts (%d) is used up", reason, p.component.MaxRestarts)
	}
	return reason
}

// backOff plans the next start of p. A jitter keeps what failed together from coming back together.
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

// next is when expire, overdue or a stop has something to do, zero for never.
func (s *supervisor) next(now time.Time) time.Time {
	var next time.Time
	for _, p := range s.procs {
		next = earliest(next, p.deadline)
		if at := s.releaseReadersAt(p); p.state == procStopping && at.After(now) {
			next = earliest(next, at)
		}
		if at := p.settledAt(); at.After(now) && !s.stopping {
			next = earliest(next, at)
		}
		if !p.unhealthySince.IsZero() && !s.stopping {
			next = earliest(next, p.unhealthySince.Add(s.times.unhealthy))
		}
	}
	return next
}

// settledAt is when p, of which its own word does not tell that it works, has run for settleTime. Zero: no need to wait.
func (p *proc) settledAt() time.Time {
	switch c := p.component; {
	case p.state != procReady || c.registers() || p.wasReady:
		return time.Time{}
	case c.HealthCheck != "":
		return p.started.Add(settleTime) // a program that somebody else runs may have passed it
	}
	return p.readyAt.Add(settleTime)
}

// settled tells whether all have run for long enough to be called ready.
func (s *supervisor) settled(now time.Time) bool {
	return !slices.ContainsFunc(s.procs, func(p *proc) bool { return now.Before(p.settledAt()) || p.child != nil && p.child.hasEnded() })
}

// earliest is the earlier of two times, of which the zero time stands for never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// readyDeadline is when all that is not ready is ready or has failed, or has been started again.
func (s *supervisor) readyDeadline() time.Time {
	var last time.Time
	for _, p := range s.procs {
		times := []time.Time{p.readyBy, p.deadline}
		if !p.unhealthySince.IsZero() {
			times = append(times, p.unhealthySince.Add(s.times.unhealthy))
		}
		for _, at := range times {
			if at.After(last) {
				last = at
			}
		}
	}
	return last
}

// delay puts off start and unhealthy timeouts by the time in which flowctl itself was stopped.
func (s *supervisor) delay(d time.Duration) {
	for _, p := range s.procs {
		if !p.readyBy.IsZero() {
			p.readyBy = p.readyBy.Add(d)
			if (p.state == procStarting || p.state == procBackoff) && !p.deadline.IsZero() {
				p.deadline = p.deadline.Add(d)
			}
		}
		if !p.unhealthySince.IsZero() {
			p.unhealthySince = p.unhealthySince.Add(d)
		}
	}
}

// expire acts on the deadlines that are due. A deadline belongs to a state and goes with it.
func (s *supervisor) expire(now time.Time) {
	for _, p := range s.procs {
		p.settle(now)
		if p.deadline.IsZero() || now.Before(p.deadline) {
			continue
		}
		switch p.state {
		case procStarting:
			if p.lookAgain(p.deadline, now) {
				p.readyBy = now.Add(secondLook)
				p.deadline = p.readyBy
				continue
			}
			if p.tries > 0 {
				s.treat(p, now)
				continue
			}
			if s.failNotReady(p, now); p.brought {
				s.tellStop(p, now)
				continue
			}
			p.deadline = time.Time{}
		case procEnded:
			s.judge(p, now)
		case procBackoff:
			if !p.readyBy.IsZero() && !now.Before(p.readyBy) {
				s.failNotReady(p, now)
				s.transition(p, procFailed, time.Time{})
			} else {
				s.transition(p, procWaiting, time.Time{})
			}
		case procStopping:
			if !p.child.isReaped() {
				p.log.Warn("still running, sending SIGKILL", "pid", p.child.pid, "stop_timeout", s.stopTimeout(p))
			}
			s.kill(p, now)
		case procKilled:
			s.fail(p, failStuck, describeStuck(p.child.pid, p.component.killPatience()), now)
			s.transition(p, procFailed, time.Time{})
		}
	}
}

// lookAgain tells whether p, whose timeout was over at the time at, is to be judged a moment later:
// where that is noticed late flowctl may not have run, and has yet to hear what p did meanwhile.
// It is true once for each timeout, so that a busy machine puts none off again and again.
func (p *proc) lookAgain(at, now time.Time) bool {
	if p.lookedAgain || now.Sub(at) <= noticedLate {
		return false
	}
	p.lookedAgain = true
	return true
}

// describeStuck says that the process pid has outlived SIGKILL by d.
func describeStuck(pid int, d time.Duration) string {
	return fmt.Sprintf("pid %d is still running %s after SIGKILL", pid, d)
}

// overdue returns those that have been unhealthy for too long.
func (s *supervisor) overdue(now time.Time) []*proc {
	var out []*proc
	for _, p := range s.procs {
		at := p.unhealthySince.Add(s.times.unhealthy)
		switch {
		case s.stopping || p.unhealthySince.IsZero() || now.Before(at):
		case p.lookAgain(at, now):
			p.unhealthySince = now.Add(secondLook - s.times.unhealthy)
		default:
			out = append(out, p)
		}
	}
	return out
}

// treat has p, which is unhealthy, stopped and started again. It fails p where its policy does not
// allow that, or that has not healed it often enough.
func (s *supervisor) treat(p *proc, now time.Time) {
	if !p.unhealthySince.IsZero() && p.unhealthySince.Sub(p.readyAt) >= healthyReset {
		p.attempts = 0
	}
	cause := cmp.Or(p.health.cause, fmt.Sprintf("not ready within its start timeout of %s", s.startTimeout(p)))
	if p.tries < maxTries && p.wantsRestart(false) {
		p.tries++
		p.ill = true
		p.log.Warn("unhealthy, restarting", "cause", cause, "try", p.tries)
		s.tellStop(p, now)
		return
	}
	reason := fmt.Sprintf("unhealthy for %s (-unhealthy-timeout)", s.times.unhealthy)
	if p.tries > 0 {
		reason = fmt.Sprintf("still unhealthy after %d restarts", p.tries)
	}
	if s.fail(p, failUnhealthy, p.withUsedUp(reason+": "+cause), now); p.brought {
		s.tellStop(p, now)
		return
	}
	p.deadline = time.Time{}
}

func (s *supervisor) failNotReady(p *proc, now time.Time) {
	s.fail(p, failNotReady, fmt.Sprintf("not ready within its start timeout of %s", s.startTimeout(p)), now)
}

// fail notes why p failed. The first reason stays.
func (s *supervisor) fail(p *proc, kind failKind, reason string, now time.Time) {
	if p.failure != nil {
		return
	}
	f := &failure{component: p.component, kind: kind, reason: reason}
	if p.last != nil {
		f.pid, f.registered, f.tail = p.last.pid, p.health.registered, p.last.tail.lines()
		f.lived, f.status = cmp.Or(p.ended, now).Sub(p.started), p.status
		f.wasReady = p.wasReadyNow()
	}
	p.failure = f
	p.brought = p.brought || s.watching
	if kind == failStuck {
		p.brought = false
	}
}

// failures returns the failures that end the run, in file order.
func (s *supervisor) failures() []*failure {
	var out []*failure
	for _, p := range s.procs {
		if p.failure != nil && !p.brought {
			out = append(out, p.failure)
		}
	}
	return out
}

// affected returns what needs p, directly or not, in a run that is over: what was never started, and
// what was stopped although it ran.
func (s *supervisor) affected(p *proc) (never, stopped []string) {
	never, stopped = []string{}, []string{} // empty in JSON, not null
	needs, services := map[string]bool{p.id(): true}, s.services()
	for more := true; more; {
		more = false
		for _, q := range s.procs {
			if !needs[q.id()] && slices.ContainsFunc(q.waitsFor(services), func(id string) bool { return needs[id] }) {
				needs[q.id()], more = true, true
			}
		}
	}
	for _, q := range s.procs {
		switch {
		case !needs[q.id()] || q.state != procStopped:
		case q.last == nil:
			never = append(never, q.id())
		default:
			stopped = append(stopped, q.id())
		}
	}
	return never, stopped
}

// worked tells whether nothing but services, and what has ended by the word of ended, runs or will, and
// something of that does.
func (s *supervisor) worked(ended func(id string) bool) bool {
	done, run := false, false
	for _, p := range s.procs {
		switch {
		case p.over():
			done = done || p.component.Role != roleService
		case p.component.Role == roleService:
			run = true
		case !ended(p.id()):
			return false
		default:
			done, run = true, true
		}
	}
	return done && run
}

// over tells whether nothing runs and nothing will.
func (s *supervisor) over() bool {
	if s.watching && !s.stopping && slices.ContainsFunc(s.procs, func(p *proc) bool { return p.failure != nil }) {
		return false // it waits for a change
	}
	return !slices.ContainsFunc(s.procs, func(p *proc) bool { return !p.over() })
}

// beginStop ends all starts. What has a process is stopped in its turn by advanceStop.
func (s *supervisor) beginStop() {
	s.stopping = true
	if s.pending != nil { // the order is neither that of the old file nor of the new
		var all []*Component
		for _, p := range s.procs {
			all = append(all, p.component)
		}
		s.before = stopOrder(all)
	}
	for _, p := range s.procs {
		s.cancelStart(p)
	}
}

// cancelStart has p not started any more, and its start timeout not judged.
func (s *supervisor) cancelStart(p *proc) {
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

// stopInTurn sends p its stop signal if it runs and nothing that has to stop before it blocks it.
func (s *supervisor) stopInTurn(p *proc, now time.Time) {
	if !p.runs() || slices.ContainsFunc(s.before[p.id()], func(e stopEdge) bool { return s.blocks(e, now) }) {
		return
	}
	if !s.drains(p, now) {
		s.tellStop(p, now)
	}
}

// drains has the streams of p end, which is about to be stopped, and tells whether to wait for that: what is
// on its way is moved first. It may take half of the stop timeout.
func (s *supervisor) drains(p *proc, now time.Time) bool {
	if s.streams == nil || p.state != procReady || p.component.Role == roleSource || !s.streams.holds(p.id()) {
		return false
	}
	if p.deadline.IsZero() {
		p.deadline = now.Add(s.stopTimeout(p) / 2)
		s.streams.leave(p.id(), s.leaving(p))
	}
	return now.Before(p.deadline)
}

// leaving says what becomes of p, which ends or has ended. What fails and ends no run may come again by a reload.
func (s *supervisor) leaving(p *proc) leaving {
	switch {
	case s.stopping:
		return leavingEver
	case p.retiring && p.replacement == nil:
		return leavingOut
	case p.retiring || p.ill || p.failure != nil:
		return leavingOnce
	}
	return leavingEver
}

// tellStop sends p, which runs, its stop signal.
func (s *supervisor) tellStop(p *proc, now time.Time) {
	sig := p.component.stopSignal()
	p.log.Info("stopping", "pid", p.child.pid, "signal", sig.String())
	p.stopSent = now
	if s.streams != nil {
		s.streams.leave(p.id(), s.leaving(p))
	}
	s.starter.signal(p.child, sig)
	s.transition(p, procStopping, now.Add(s.stopTimeout(p)))
}

// blocks tells whether the component that e names keeps another from being stopped: it is to stop as
// well and has not ended. An input blocks its readers only until releaseReadersAt.
func (s *supervisor) blocks(e stopEdge, now time.Time) bool {
	first := s.byID[e.id]
	if first == nil || first.over() || !first.retiring && !s.stopping {
		return false
	}
	release := s.releaseReadersAt(first)
	return !e.input || release.IsZero() || now.Before(release)
}

// releaseReadersAt is when those that read from p are stopped although p has not ended, because some
// servers end only once their reader has closed the stream. It is zero before the stop signal.
func (s *supervisor) releaseReadersAt(p *proc) time.Time {
	if p.stopSent.IsZero() {
		return time.Time{}
	}
	return p.stopSent.Add(s.stopTimeout(p) / 2)
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
	s.starter.signal(p.child, syscall.SIGKILL)
	s.transition(p, procKilled, now.Add(p.component.killPatience()))
}

// stopBound is the longest that a stop can take: the slowest chain of components that
// stop one after the other, and then what they left behind.
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
		p := s.byID[id]
		memo[id] = longest + s.stopTimeout(p) + p.component.killPatience()
		if s.streams != nil && s.streams.holds(id) {
			memo[id] += s.stopTimeout(p) / 2 // see drains
		}
		return memo[id]
	}
	var longest time.Duration
	for id := range s.byID {
		longest = max(longest, bound(id))
	}
	return longest + sweepGrace + killPatience
}

// transition is the one place that changes a component's state.
func (s *supervisor) transition(p *proc, to procState, deadline time.Time) {
	p.log.Debug("state", "from", p.state, "to", to)
	p.state, p.deadline, p.lookedAgain = to, deadline, false
	if to != procReady {
		p.unhealthySince = time.Time{}
	}
}

func (s *supervisor) startTimeout(p *proc) time.Duration {
	return cmp.Or(time.Duration(p.component.StartTimeout), s.times.start)
}

func (s *supervisor) stopTimeout(p *proc) time.Duration {
	return cmp.Or(time.Duration(p.component.StopTimeout), s.times.stop)
}
