package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// stallTime is how late a deadline has to be noticed to tell that flowctl itself was
// stopped.
const stallTime = 100 * time.Millisecond

// echoTime is how long after the first signal the same one is still the first.
const echoTime = 50 * time.Millisecond

// The events that end a run by themselves (-until).
const (
	untilStopped = "stopped" // none
	untilReady   = "ready"
	untilDone    = "done"
)

// runConfig is how a pipeline is run.
type runConfig struct {
	file             string // the pipeline file
	version          string // of flowctl
	listen           listenConfig
	tls              tlsFlags
	ttl              time.Duration // of a heartbeat
	interval         time.Duration // of the janitor
	state            stateConfig
	format           string // of the log, never formatAuto
	logLevel         slog.Level
	logDir           string // one file per component, "" for none
	logDirOptional   bool   // it is only a warning that logDir cannot be used
	showStatus       bool
	startTimeout     time.Duration
	unhealthyTimeout time.Duration
	stopTimeout      time.Duration
	until            string
	engine           *engine  // nil for none
	command          []string // after --
}

// read reads the pipeline file. It fails also for a pipeline that cannot be run in this way.
func (c *runConfig) read() (*Pipeline, error) {
	p, err := readPipeline(c.file, os.LookupEnv)
	if err != nil {
		return nil, err
	}
	if err := cmp.Or(c.tls.checkComponents(p.speakTLS(true)), c.engine.checkImages(p)); err != nil {
		return nil, fmt.Errorf("%s: %v", c.file, err)
	}
	return p, nil
}

// run is one run of a pipeline. One goroutine, in loop, owns it: everything that
// happens reaches it as an event, and it alone decides.
type run struct {
	flags       runConfig
	log         *slog.Logger
	out         *outputs
	cleanups    []func() // of what was opened, in that order
	file        *runFile
	certs       *certificates // nil without TLS
	endpoint    string        // where the plane listens
	registry    *registry
	children    *reaper
	launcher    *launcher
	sup         *supervisor
	about       pipelineInfo
	entrance    bool   // there is a listener without TLS, or no TLS
	edition     int    // of sup, which the registry knows
	guest       *guest // nil for none
	reloads     chan reloadRequest
	over        chan struct{} // closed when loop has returned
	systemd     *notifier
	watchdog    time.Duration        // how often systemd wants to hear that flowctl turns, 0 for never
	watchdogFed time.Time            // when it heard that last
	conditions  map[string]change    // by component: what the registry last told
	unhealthy   map[string]time.Time // by component: since when
	signal      os.Signal            // the last that was heeded before the stop, at signalAt
	signalAt    time.Time
	ready       bool // once and for all
	code        int
	blame       error // for code, where no component is
	identifier  *identifier
	checks      *checks
}

// runPipeline runs p and returns an *exitError for everything but success.
func runPipeline(p *Pipeline, o runConfig) error {
	r := &run{
		flags: o, about: pipelineInfo{name: p.Metadata.Name, version: o.version, started: time.Now()},
		conditions: make(map[string]change), unhealthy: make(map[string]time.Time),
		reloads: make(chan reloadRequest), over: make(chan struct{}),
	}
	defer r.cleanUp()
	var ids []string
	for _, c := range p.components() {
		ids = append(ids, c.ID)
	}
	r.out = openOutputs(outputConfig{pipeline: r.about.name, ids: ids, format: o.format, level: o.logLevel, footer: o.showStatus})
	r.atEnd(r.out.close)
	r.log = r.out.log
	r.systemd = newNotifier(r.log)
	r.atEnd(r.systemd.close)
	r.watchdog = watchdogInterval(r.log)
	signals := catchSignals()
	if stopped, err := r.prepare(p, signals); err != nil || stopped {
		return err
	}
	lis, access, err := r.listen(p)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	launch := launchConfig{
		endpoint: access.endpoint, containerEndpoint: containerEndpoint(lis.Addr(), r.endpoint), tlsEnv: access.tlsEnv, heartbeat: o.ttl / 3,
		engine: o.engine, reaper: r.children, emit: r.out.emit, flush: r.out.flush, log: r.log,
	}
	if err := r.supervise(p, ids, launch); err != nil {
		return err
	}
	st, err := openState(o.state, r.about.name, r.log)
	if err != nil {
		r.launcher.close()
		return &exitError{code: exitPlane, err: err}
	}
	plane, err := newPlane(planeConfig{
		listener: lis, endpoint: r.endpoint, componentListener: access.listener, ttl: o.ttl, interval: o.interval,
		members: r.members(), pipeline: r.about, store: st, certs: r.certs, peer: r.identifier.identifyPeer, requests: r, log: r.log,
	})
	if err != nil {
		st.close()
		r.launcher.close()
		return &exitError{code: exitPlane, err: err}
	}
	r.registry, r.edition = plane.registry, r.sup.edition
	r.loop(signals)
	close(r.over)
	r.checks.close()
	r.launcher.close()
	plane.stop()
	return r.end()
}

// atEnd has f called when the run is over, or cannot begin, before what was given
// earlier.
func (r *run) atEnd(f func()) { r.cleanups = append(r.cleanups, f) }

func (r *run) cleanUp() {
	for _, f := range slices.Backward(r.cleanups) {
		f()
	}
}

// prepare does what comes before anything that others could see: it claims the name of
// the pipeline, and has the engine get the images. A signal that comes meanwhile ends
// the run.
func (r *run) prepare(p *Pipeline, signals <-chan os.Signal) (stopped bool, err error) {
	if r.guest, err = newGuest(r.flags.command); err != nil {
		return false, &exitError{code: exitUsage, err: err}
	}
	r.file, err = claimRun(runInfo{Pipeline: r.about.name, TLS: r.flags.tls.cert != ""})
	if running := (*runningError)(nil); errors.As(err, &running) {
		return false, &exitError{exitPlane, err, "flowctl list"}
	} else if err != nil {
		r.log.Warn("list cannot find this run by itself, and a second one would not be refused", "err", err)
	}
	r.atEnd(r.file.release)
	r.children = newReaper()
	if err := r.children.adopt(); err != nil {
		r.log.Warn("processes that leave their process group cannot be ended", "err", err)
	}
	r.atEnd(r.children.close)
	if engine := r.flags.engine; engine != nil {
		engine.commands, engine.env, engine.pipeline, engine.ownerLabel = r.children, baseEnv(), r.about.name, r.file.ownerLabel()
	}
	sig, err := r.prepareEngine(signals, p)
	if err != nil {
		return false, &exitError{code: exitUsage, err: err}
	}
	if code, err := r.guest.unrun(sig); err != nil {
		return true, &exitError{code: code, err: err}
	}
	return sig != nil, nil
}

// prepareEngine has the engine remove what killed runs have left and pull the images that
// are missing, which may take minutes, until a signal asks for an end. It returns that,
// nil for none. Without images it does nothing.
func (r *run) prepareEngine(signals <-chan os.Signal, p *Pipeline) (os.Signal, error) {
	if len(p.images()) == 0 {
		return nil, nil
	}
	progress := func(image, said string) {
		attrs := []any{"image", image}
		if said != "" {
			attrs = append(attrs, "said", said)
		}
		r.log.Info("pulling", attrs...)
		r.systemd.send("STATUS=pulling "+image, extendTimeout(time.Minute))
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		removed, err := r.flags.engine.removeAbandoned(ctx)
		if len(removed) > 0 {
			r.log.Warn("removed containers that a killed run has left", "containers", enumerate(removed))
		}
		if err == nil {
			err = r.flags.engine.pullMissing(ctx, p, progress)
		}
		done <- err
	}()
	for {
		select {
		case err := <-done:
			return nil, err
		case sig := <-signals:
			if underSystemd(sig) {
				continue // it asks for a reload, and the file has just been read
			}
			r.log.Info("stop requested", "signal", sig.String())
			cancel()
			<-done
			return sig, nil
		}
	}
}

// listen opens the control plane's listeners: where the flags say, and where the
// components come in.
func (r *run) listen(p *Pipeline) (lis net.Listener, access componentAccess, err error) {
	if r.certs, err = openCertificates(r.flags.tls, r.log); err != nil {
		return nil, access, err
	}
	if lis, r.endpoint, err = openPlane(r.flags.listen, r.flags.tls, r.log); err != nil {
		return nil, access, err
	}
	r.atEnd(func() { lis.Close() }) // again, where a control plane has served
	if err := r.file.publish(r.endpoint); err != nil {
		r.log.Warn("list cannot find this run by itself", "err", err)
	}
	if access, err = openComponentAccess(r.certs, r.endpoint, p.speakTLS(true), p.speakTLS(false), r.log); err != nil {
		return nil, access, err
	}
	if access.listener != nil {
		r.atEnd(func() { access.listener.Close() })
	}
	r.entrance = r.certs == nil || access.listener != nil
	return lis, access, nil
}

// supervise makes the launcher, the supervisor, and the registry that knows its components.
func (r *run) supervise(p *Pipeline, ids []string, launch launchConfig) (err error) {
	if err := launch.checkReach(p); err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	if r.flags.logDir != "" {
		err := r.out.openFiles(r.flags.logDir, ids)
		switch {
		case err != nil && r.flags.logDirOptional:
			r.log.Warn("no log files", "err", err)
		case err != nil:
			return &exitError{code: exitUsage, err: fmt.Errorf("-log-dir: %v", err)}
		}
	}
	if r.launcher, err = newLauncher(launch); err != nil {
		return &exitError{code: exitFailed, err: err}
	}
	for _, c := range p.components() {
		if _, err := r.launcher.healthPort(c); err != nil {
			r.launcher.close()
			return &exitError{code: exitFailed, err: fmt.Errorf("component %s: %v", c.ID, err)}
		}
	}
	r.sup = newSupervisor(p, procSettings{r.flags.startTimeout, r.flags.stopTimeout}, r.launcher, r.log)
	r.identifier = &identifier{
		leaders: r.launcher.leaders, descendants: r.launcher.descendants,
		mark: runMark + "=" + r.launcher.mark, containers: launch.engine.usable(),
	}
	r.checks = newChecks(r.identifier.componentOf, r.log)
	return nil
}

// end says what has failed, last of all, and returns an *exitError unless nothing has.
func (r *run) end() error {
	r.out.removeFooter()
	if len(r.sup.failures()) > 0 && r.code == exitOK {
		r.code = exitFailed // found while stopping: a process that survived SIGKILL
	}
	if r.code == exitOK {
		return nil
	}
	r.out.report(r.report().forms())
	return &exitError{code: r.code}
}

// report is what the registry passes on of a component's process.
func (p *proc) report() processReport {
	out := processReport{state: p.state.String(), restarts: p.restarts}
	if p.child != nil {
		out.pid, out.started = p.child.pid, p.started
	}
	return out
}

// loop runs until every component is over.
func (r *run) loop(signals <-chan os.Signal) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	broken := r.out.broken
	var due time.Time // when there is something to do although nothing happens
	for {
		now := time.Now()
		if late := now.Sub(due); !due.IsZero() && late > stallTime {
			r.delay(late + time.Second)
		}
		r.advance(now)
		if r.sup.over() && !r.guest.runs() {
			r.log.Info("all components have ended", "after", now.Sub(r.about.started).Round(time.Millisecond))
			return
		}
		if due = r.next(now); due.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(due))
		}
		select {
		case sig := <-signals:
			r.signalled(sig, time.Now())
		case <-r.out.footerDue(): // a timer of its own: that timer is late is how flowctl knows that it was stopped
		case <-r.registry.wake:
		case e := <-r.launcher.exits:
			r.exited(e, time.Now())
		case result := <-r.checks.results:
			r.checked(result, time.Now())
		case status := <-r.guest.endings():
			r.guestEnded(status, time.Now())
		case request := <-r.reloads:
			out, err := r.reload()
			request.answer <- reloadAnswer{out, err}
		case <-broken:
			broken = nil
			r.log.Error("standard output cannot be written, stopping", "err", r.out.brokenErr())
			r.blame = fmt.Errorf("standard output cannot be written: %v", r.out.brokenErr())
			r.stop(exitFailed, time.Now())
		case <-timer.C:
		}
	}
}

// guestEnded ends the run by the exit code of its command.
func (r *run) guestEnded(status syscall.WaitStatus, now time.Time) {
	r.guest.over = true
	r.log.Info("command ended", "reason", describeExit(status))
	code := exitCodeOf(status)
	if code != exitOK && !r.sup.stopping {
		r.blame = fmt.Errorf("the command %q after -- failed: %s", r.guest.argv[0], describeExit(status))
	}
	if r.stop(code, now); r.code == exitOK {
		r.code = code // which was asked to end
	}
}

// delay makes up for time in which flowctl did not run, being stopped itself: what
// its components did meanwhile it has yet to hear.
func (r *run) delay(d time.Duration) {
	r.sup.delay(d)
	for id, since := range r.unhealthy {
		r.unhealthy[id] = since.Add(d)
	}
}

// next is when loop has to look again although nothing happens.
func (r *run) next(now time.Time) time.Time {
	next := r.sup.next(now)
	if r.guest.runs() {
		next = earliest(next, r.guest.deadline)
	}
	if r.watchdog > 0 {
		next = earliest(next, r.watchdogFed.Add(r.watchdog/2))
	}
	if r.sup.stopping {
		return next
	}
	for _, since := range r.unhealthy {
		next = earliest(next, since.Add(r.flags.unhealthyTimeout))
	}
	return next
}

// advance does all that the state of things asks for at the time now.
func (r *run) advance(now time.Time) {
	r.takeChanges(now) // which needs the registry: if that hangs, systemd hears no more
	if r.watchdog > 0 && now.Sub(r.watchdogFed) >= r.watchdog/2 {
		r.watchdogFed = now
		r.systemd.send(daemon.SdNotifyWatchdog)
	}
	r.sup.expire(now)
	r.guest.expire(now, r.log)
	r.sup.advanceLeave(now)
	r.syncMembers(now)
	r.expireUnhealthy(now)
	for _, p := range r.sup.startable() {
		r.start(p)
	}
	if failures := r.sup.failures(); len(failures) > 0 && !r.sup.stopping {
		r.failed(failures, now)
	}
	if !r.ready && !r.sup.stopping {
		r.checkReady(now)
	}
	if r.sup.stopping {
		r.sup.advanceStop(now)
	}
	r.showStatus()
	r.out.updateFooter(now, func() []string { return r.footerRows(now) })
}

// failed ends the run because of failures. The first decides the exit code.
func (r *run) failed(failures []*failure, now time.Time) {
	for _, f := range failures {
		if f.kind == failNotReady {
			c, cause := r.registry.condition(f.component.ID, now)
			f.reason += ": " + cause
			if others := r.registry.strangers(now); c == unregistered && f.component.registers() && len(others) > 0 {
				f.reason += "; registered, and none of the pipeline's: " + enumerate(others)
			}
		}
	}
	code := exitFailed
	if failures[0].kind == failNotReady {
		code = exitNotReady
	}
	r.stop(code, now)
}

// start starts p. The registry hears of it first, because a quick component could
// register before start returns.
func (r *run) start(p *proc) {
	r.registry.starting(p.ID, time.Now())
	delete(r.conditions, p.ID)
	err := r.sup.start(p, time.Now())
	switch {
	case err != nil:
		r.registry.finished(p.ID, err.Error(), time.Now())
	case p.HealthCheck != "" || p.readyOnceRunning():
		if p.HealthCheck != "" && !p.registers() {
			r.registry.checked(p.ID, "health_check "+p.HealthCheck+" has not been answered yet", time.Now())
		}
		r.checks.start(p.Component, p.child)
	case !p.registers():
		r.registry.admit(p.ID, time.Now())
	}
}

// checked takes in what the health checks of a component come to.
func (r *run) checked(result checkResult, now time.Time) {
	p := r.sup.byID[result.id]
	if p == nil || p.child != result.child {
		return
	}
	if !p.registers() && p.state == procStarting && result.failing == "" {
		r.registry.admit(p.ID, now)
	}
	r.registry.checked(p.ID, result.failing, now)
}

func (r *run) takeChanges(now time.Time) {
	for _, c := range r.registry.changes(now) {
		r.changed(c, now)
	}
}

// changed takes in what the registry tells of a service.
func (r *run) changed(c change, now time.Time) {
	p := r.sup.byID[c.component]
	if p == nil {
		logChange(r.log, c)
		return
	}
	r.conditions[p.ID] = c
	p.registered = p.registered || p.child != nil && c.now != unregistered
	switch {
	case p.leaving: // what becomes of it now is no one's concern
	case p.state == procStarting && c.now.ok():
		r.sup.ready(p, now)
	case p.state != procReady:
	case c.now.ok():
		p.healthy = true
		delete(r.unhealthy, p.ID)
		logChange(r.log, c)
	default:
		p.healthy = false
		r.unhealthy[p.ID] = now
		logChange(r.log, c)
	}
}

// expireUnhealthy fails the components that were unhealthy for too long and, asked
// now, still are.
func (r *run) expireUnhealthy(now time.Time) {
	for id, since := range r.unhealthy {
		if now.Sub(since) < r.flags.unhealthyTimeout {
			continue
		}
		delete(r.unhealthy, id)
		if c, cause := r.registry.condition(id, now); !c.ok() {
			r.sup.fail(r.sup.byID[id], failUnhealthy, fmt.Sprintf("unhealthy for %s (-unhealthy-timeout): %s", r.flags.unhealthyTimeout, cause), now)
		}
	}
}

// exited takes the end of a process in, after what the process did before it ended.
func (r *run) exited(e childEnd, now time.Time) {
	id, p := e.child.component.ID, r.sup.procOf(e.child)
	if p == nil {
		return // SIGKILL has ended it at last
	}
	if p.readyOnceRunning() && e.status == 0 {
		r.checked(checkResult{child: e.child, id: id}, now) // it has run, if it was over before that was seen
	}
	r.takeChanges(now)
	r.checks.stop(id)
	r.sup.exited(e, now)
	cause := ""
	if p.state != procCompleted {
		cause = "its process ended: " + describeExit(e.status)
	}
	r.registry.finished(id, cause, now)
	delete(r.unhealthy, id)
}

// signalled begins the stop, and with a second signal ends it. Where there is a
// command, it gets the first one, and the stop begins by the second.
func (r *run) signalled(sig os.Signal, now time.Time) {
	switch {
	case underSystemd(sig):
		_, _ = r.reload() // has said what is wrong, or it stops anyway
		return
	case r.echoes(sig, now):
		return
	case r.sup.stopping:
		r.log.Warn("another signal, killing what still runs", "signal", sig.String())
		r.sup.killAll(now)
		r.guest.end(now, 0)
		return
	}
	r.signal, r.signalAt = sig, now
	if r.guest.runs() && r.guest.pass(sig, now, r.flags.stopTimeout) {
		attrs := []any{"signal", sig.String(), "pid", r.guest.cmd.Process.Pid}
		if !r.guest.deadline.IsZero() {
			attrs = append(attrs, "at_most", r.flags.stopTimeout)
		}
		r.log.Info("waiting for the command to end", attrs...)
		return
	}
	r.log.Info("stop requested", "signal", sig.String(), "at_most", r.sup.stopBound())
	code, blame := r.guest.unrun(sig)
	if blame != nil {
		r.blame = blame
	}
	r.stop(code, now)
}

// echoes tells whether sig is a request that was heard before, by another way: a shell
// and the kernel both tell of a terminal that is closed, timeout(1) tells the group and
// its child.
func (r *run) echoes(sig os.Signal, now time.Time) bool {
	if sig == syscall.SIGHUP {
		return r.sup.stopping || r.signal != nil && r.signal != syscall.SIGINT
	}
	return sig == r.signal && now.Sub(r.signalAt) < echoTime
}

// stop begins the end of the run, with the exit code that the first reason gives.
func (r *run) stop(code int, now time.Time) {
	if r.sup.stopping {
		return
	}
	r.code = code
	r.guest.end(now, r.flags.stopTimeout)
	r.sup.beginStop()
	r.systemd.send(daemon.SdNotifyStopping, extendTimeout(r.sup.stopBound()))
}

// patience is by when what keeps the pipeline from being ready has ended one way or
// the other.
func (r *run) patience() time.Time {
	last := r.sup.lastReadyBy()
	for _, since := range r.unhealthy {
		if at := since.Add(r.flags.unhealthyTimeout); at.After(last) {
			last = at
		}
	}
	return last
}

// checkReady tells the world when all components are ready.
func (r *run) checkReady(now time.Time) {
	if o := r.overview(); o.ready < o.total {
		return
	}
	r.ready, r.about.ready = true, true
	r.log.Info("pipeline ready", "components", len(r.sup.procs), "endpoint", r.registry.endpoint, "after", now.Sub(r.about.started).Round(time.Millisecond))
	r.showStatus() // who is told that all are ready finds it so when asking
	r.systemd.send(daemon.SdNotifyReady)
	if r.flags.until == untilReady {
		r.stop(exitOK, now)
	} else if r.flags.format == formatText && isTerminal(os.Stderr) {
		r.log.Info("in another terminal", r.commands()...)
	}
	if r.guest == nil {
		return
	}
	r.out.removeFooter() // the terminal is the command's now
	if err := r.guest.start(r.launcher); err != nil {
		r.log.Error("the command did not start", "err", err)
		r.blame = err
		r.stop(exitUsage, now)
	}
}

// commands are those that a person may want while the pipeline runs, as attributes.
func (r *run) commands() []any {
	with := ""
	if r.flags.tls.cert != "" {
		with = " -tls-ca-cert FILE"
		if r.flags.tls.ca != "" {
			with += " -tls-cert FILE -tls-key FILE"
		}
	}
	out := []any{"see", "flowctl list" + with}
	if !fromStandardInput(r.flags.file) {
		out = append(out, "reload", "flowctl reload"+with)
	}
	return out
}

// overview sums up how the components are.
func (r *run) overview() overview {
	o := overview{total: len(r.sup.procs), stopping: r.sup.stopping}
	for _, p := range r.sup.procs {
		c, told := r.conditions[p.ID]
		switch {
		case p.state == procCompleted || p.state == procReady && told && c.now.ok():
			o.ready++
		case p.state == procReady:
			o.unhealthy = append(o.unhealthy, fmt.Sprintf("%s (%s)", p.ID, c.cause))
		case p.state == procBackoff:
			o.restarting = append(o.restarting, p.ID)
		default:
			o.waiting = append(o.waiting, p.ID)
		}
		if !p.over() {
			o.left = append(o.left, p.ID)
		}
	}
	return o
}

// showStatus tells people and systemd how the run is, if that has changed.
func (r *run) showStatus() {
	for _, p := range r.sup.procs {
		r.registry.reportProcess(p.ID, p.report())
	}
	o := r.overview()
	status := o.String()
	if status == r.about.status || len(o.left) == 0 {
		return
	}
	r.about.status = status
	r.registry.report(r.about)
	if r.flags.showStatus && !r.out.showsFooter() {
		r.log.Info("status", o.attrs()...)
	}
	states := []string{"STATUS=" + status}
	if at := r.patience(); !r.ready && !r.sup.stopping && at.After(time.Now()) {
		states = append(states, extendTimeout(time.Until(at)))
	}
	r.systemd.send(states...)
}

// footerRows are the rows of the footer.
func (r *run) footerRows(now time.Time) []string {
	f := footer{pipeline: r.about.name, endpoint: r.endpoint, status: r.about.status}
	seen := make(map[string]*operatorv1.Component)
	for _, c := range r.registry.own(now).GetComponents() {
		seen[c.GetId()] = c
	}
	for _, p := range r.sup.procs {
		c := seen[p.ID]
		row := footerComponent{id: p.ID, state: p.state.String(), health: c.GetHealth(), restarts: p.restarts, metrics: make(map[string]any)}
		for name, value := range c.GetMetrics() {
			row.metrics[name] = value
		}
		for name, value := range c.GetTextMetrics() {
			row.metrics[name] = value
		}
		if c.GetLastSeen().IsValid() {
			row.lastSeen = c.GetLastSeen().AsTime()
		}
		if p.child != nil {
			row.pid, row.started = p.child.pid, p.started
		}
		f.components = append(f.components, row)
	}
	return f.rows(now)
}

// guest is the command after --, which a pipeline that is ready is run for. It is no
// component: its input, output and signals are its own, and its end is that of the run.
type guest struct {
	argv []string

	cmd      *exec.Cmd                 // nil before it is started
	ended    <-chan syscall.WaitStatus // gets how it ended, once
	over     bool
	signals  int       // that it was sent, or got from the terminal
	deadline time.Time // when it gets SIGKILL, zero for never
}

// newGuest fails where there is no such program: that is not to be found out when a
// pipeline has been started for it.
func newGuest(argv []string) (*guest, error) {
	if len(argv) == 0 {
		return nil, nil
	}
	if _, err := exec.LookPath(argv[0]); err != nil {
		return nil, fmt.Errorf("the command after --: cannot run %q: %v", argv[0], cause(err))
	}
	return &guest{argv: argv}, nil
}

// start starts the command in flowctl's own process group, so that a terminal's
// signals reach it. It is known by the mark of the run, like whatever it starts.
func (g *guest) start(l *launcher) (err error) {
	g.cmd = exec.Command(g.argv[0], g.argv[1:]...)
	g.cmd.Stdin, g.cmd.Stdout, g.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if g.ended, err = l.startCommand(commandID, g.cmd); err != nil {
		g.over = true
		return fmt.Errorf("the command after --: cannot run %q: %v", g.argv[0], cause(err))
	}
	return nil
}

// endings gets how it ended, nil for no guest and one that does not run.
func (g *guest) endings() <-chan syscall.WaitStatus {
	if g == nil {
		return nil
	}
	return g.ended
}

// runs is false for no guest, too.
func (g *guest) runs() bool { return g != nil && g.cmd != nil && !g.over }

// unrun is the exit code of flowctl, and why, for a sig that ends the run before the
// command was started: 0 would say that it has succeeded. Without a command it is 0.
func (g *guest) unrun(sig os.Signal) (int, error) {
	number, ok := sig.(syscall.Signal)
	if g == nil || g.cmd != nil || !ok {
		return exitOK, nil
	}
	return 128 + int(number), fmt.Errorf("the command %q after -- was not run: signal %d (%s) came first", g.argv[0], number, sig)
}

// exitCodeOf is the exit code of flowctl for the end of the command, as a shell has it.
func exitCodeOf(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// pass hands a signal on that flowctl got, unless the terminal has sent it to both.
// It is false for the second, after which there is no more waiting. Who sends SIGINT
// can wait for the end, and send another; any other signal may be all that comes, and
// SIGKILL follows it.
func (g *guest) pass(sig os.Signal, now time.Time, patience time.Duration) bool {
	if g.signals++; g.signals > 1 {
		return false
	}
	if sig != syscall.SIGINT {
		g.deadline = now.Add(patience)
	}
	if sig != syscall.SIGINT || !takesInterrupts() {
		_ = g.cmd.Process.Signal(sig)
	}
	return true
}

// end asks the command to end, because the pipeline does.
func (g *guest) end(now time.Time, patience time.Duration) {
	if g.runs() {
		_ = g.cmd.Process.Signal(syscall.SIGTERM)
		g.deadline = earliest(g.deadline, now.Add(patience))
	}
}

// expire kills the command when it was asked to end for long enough.
func (g *guest) expire(now time.Time, log *slog.Logger) {
	if g.runs() && !g.deadline.IsZero() && !now.Before(g.deadline) {
		log.Warn("the command still runs, sending SIGKILL", "pid", g.cmd.Process.Pid)
		g.deadline = time.Time{}
		_ = g.cmd.Process.Kill()
	}
}

// reloadRequest asks the loop for a reload.
type reloadRequest struct {
	answer chan reloadAnswer // holds one, so that the loop never waits
}

type reloadAnswer struct {
	reloaded reloaded
	err      error
}

// requestReload has the loop reload the pipeline file. It is called by the operator
// service.
func (r *run) requestReload(ctx context.Context) (reloadResult, error) {
	request := reloadRequest{make(chan reloadAnswer, 1)}
	select {
	case r.reloads <- request:
	case <-r.over:
		return reloadResult{}, errStopping
	case <-ctx.Done():
		return reloadResult{}, ctx.Err()
	}
	answer := <-request.answer
	return reloadResult(answer.reloaded), answer.err
}

// reload reads the pipeline file again and begins what has changed in it. What is
// wrong is an error, after which everything is as before.
func (r *run) reload() (reloaded, error) {
	if r.sup.stopping {
		return reloaded{}, errStopping
	}
	if r.ready { // before that systemd waits for READY=1 alone
		r.systemd.send(daemon.SdNotifyReloading, daemon.SdNotifyMonotonicUsec())
		defer r.systemd.send(daemon.SdNotifyReady)
	}
	out, err := r.applyFile()
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			r.log.Error("cannot reload", "err", strings.TrimSuffix(line, "\n"))
		}
		return out, err
	}
	r.log.Info("reloaded", "file", r.flags.file, "added", enumerate(out.added), "removed", enumerate(out.removed), "restarted", enumerate(out.restarted), "unchanged", out.unchanged)
	return out, nil
}

func (r *run) applyFile() (reloaded, error) {
	if info, err := os.Stat(r.flags.file); err == nil && !info.Mode().IsRegular() {
		return reloaded{}, fmt.Errorf("%s is no plain file, and cannot be read again", r.flags.file) // to open a FIFO would hold the loop
	}
	p, err := r.flags.read()
	if err != nil {
		return reloaded{}, err
	}
	if p.Metadata.Name != r.about.name {
		return reloaded{}, fmt.Errorf("%s: metadata.name is %q now: a pipeline keeps its name, %q, while it runs", r.flags.file, p.Metadata.Name, r.about.name)
	}
	if ids := p.speakTLS(false); r.flags.tls.cert != "" && !r.entrance && len(ids) > 0 {
		return reloaded{}, fmt.Errorf("%s: %s would need a listener without TLS, which there is not: restart flowctl, or set \"tls\": true", r.flags.file, enumerate(ids))
	}
	used := make(map[string]bool)
	for _, p := range r.sup.procs {
		used[p.Image] = true
	}
	if err := cmp.Or(r.launcher.config.checkReach(p), r.flags.engine.checkNew(context.Background(), p, used)); err != nil {
		return reloaded{}, err
	}
	var ids []string
	for _, c := range p.components() {
		ids = append(ids, c.ID)
	}
	if err := r.out.add(ids); err != nil {
		return reloaded{}, err
	}
	out, err := r.sup.reload(p)
	for _, p := range r.sup.procs {
		if p.leaving {
			delete(r.unhealthy, p.ID)
		}
	}
	return out, err
}

// syncMembers tells the registry which components there are, when that has changed.
func (r *run) syncMembers(now time.Time) {
	if r.edition == r.sup.edition {
		return
	}
	r.edition = r.sup.edition
	r.registry.setMembers(r.members(), now)
	for id := range r.conditions {
		if r.sup.byID[id] == nil {
			delete(r.conditions, id)
			delete(r.unhealthy, id)
		}
	}
}

// members is what the control plane is to know of the components.
func (r *run) members() []member {
	var out []member
	for _, p := range r.sup.procs {
		endpoint := r.launcher.config.endpoint
		if p.TLS {
			endpoint = r.endpoint
		}
		if len(p.Ports) > 0 {
			endpoint = cmp.Or(r.launcher.config.containerEndpoint, r.launcher.config.endpoint)
		}
		port, _ := r.launcher.healthPort(p.Component) // it is reserved
		out = append(out, member{
			id: p.ID, role: p.Role, healthPort: port, endpoint: endpoint, inputs: p.Inputs,
			inputEvents: p.InputEventTypes, outputEvents: p.OutputEventTypes, inContainer: p.Image != "", kind: p.Type, labels: p.Labels,
		})
	}
	return out
}

// report is what there is to say of a run that has ended, now that all are over.
func (r *run) report() report {
	out := report{Time: time.Now(), Level: "ERROR", Msg: reportMsg, ExitCode: r.code, Pipeline: r.about.name}
	for _, p := range r.sup.procs {
		if p.failure != nil {
			out.Failures = append(out.Failures, r.describe(p))
		}
	}
	if len(out.Failures) == 0 && r.blame != nil {
		out.Error = r.blame.Error()
	}
	return out
}

// describe says what has to be said of p, which failed.
func (r *run) describe(p *proc) failedComponent {
	f := p.failure
	out := failedComponent{
		Component: f.component.ID, Kind: f.kind, Reason: f.reason, PID: f.pid, Registered: f.registered, Restarts: p.restarts,
		LastLines: []string{}, expected: f.component.registers(), Try: f.try(r.flags.file),
	}
	if f.pid != 0 {
		out.Lived = f.lived.Round(time.Millisecond).String()
	}
	for _, line := range f.tail {
		out.LastLines = append(out.LastLines, strings.TrimSuffix(line, "\r"))
	}
	out.LogFile = r.out.logFile(f.component.ID)
	out.NeverStarted, out.Stopped = r.sup.affected(p)
	return out
}

// catchSignals returns the signals that ask for an end. SIGHUP stays ignored where
// flowctl was started so, by nohup; SIGINT does not, which a script's shell ignores
// for whatever it starts in the background, and children would inherit that. SIGPIPE
// is caught so that a closed standard output is an error of a write and not the end.
func catchSignals() <-chan os.Signal {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(signals, syscall.SIGHUP)
	}
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	return signals
}

// fromStandardInput tells whether the pipeline file cannot be read a second time.
func fromStandardInput(file string) bool {
	info, err := os.Stat(file)
	return err == nil && !info.Mode().IsRegular()
}
