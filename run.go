package main

// A run of a pipeline: runPipeline opens what it needs, one thing after the other; its loop
// takes in what happens and decides what follows from it. It is where the processes and the
// control plane meet.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// repeatTime is how long after a signal the same one is taken for the same request.
const repeatTime = 50 * time.Millisecond

// Events that -until can name.
const (
	untilStopped = "stopped"
	untilReady   = "ready"
	untilDone    = "done"
)

// runConfig says how a pipeline is run.
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

// run is one run of a pipeline. One goroutine, in loop, owns it: everything that happens
// reaches it as an event, and it alone decides. It never waits for another process.
type run struct {
	config   runConfig
	log      *slog.Logger
	out      *outputs
	systemd  *notifier
	watchdog watchdog
	info     pipelineInfo // what is shown of the run as a whole
	launcher *launcher
	sup      *supervisor
	checks   *checks
	plane    *plane
	wrapped  *wrapped // nil for none
	reloads  *reloads

	generation int           // of sup's components, that the registry knows
	stopped    time.Duration // how long flowctl itself was stopped, that sup knows
	heeded     heededSignal
	code       int   // the exit code, once a stop has begun
	err        error // why the code is not 0; nil where a component is the reason
}

// runPipeline runs p and returns an *exitError for everything but success.
func runPipeline(p *Pipeline, config runConfig) error {
	var opened cleanups
	defer opened.run()
	r := &run{config: config, info: pipelineInfo{name: p.Metadata.Name, version: config.version, started: time.Now()}}
	r.out = openOutputs(outputConfig{pipeline: r.info.name, ids: p.ids(), format: config.format, level: config.logLevel, footer: config.showStatus})
	opened.add(r.out.close)
	r.log = r.out.log
	r.systemd = newNotifier(r.log)
	opened.add(r.systemd.close)
	r.watchdog.interval = watchdogInterval(r.log)
	signals := catchSignals()
	var err error
	if r.wrapped, err = newWrapped(config.command); err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	file, children, err := r.claim(&opened)
	if err != nil {
		return err
	}
	sig, err := r.prepareEngine(signals, p)
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	if sig != nil {
		if code, err := r.wrapped.notRun(sig); err != nil {
			return &exitError{code: code, err: err}
		}
		return nil
	}
	if err := r.open(p, file, children, &opened); err != nil {
		return err
	}
	r.loop(signals)
	r.reloads.close()
	r.checks.close()
	r.launcher.close()
	r.plane.stop()
	return r.end()
}

// cleanups are to be called when a run is over or cannot begin.
type cleanups []func()

func (c *cleanups) add(f func()) { *c = append(*c, f) }

// run calls them, the last first.
func (c *cleanups) run() {
	for _, f := range slices.Backward(*c) {
		f()
	}
}

// claim claims the name of the pipeline and makes flowctl the parent of what its
// descendants orphan, before anything happens that others could see.
func (r *run) claim(opened *cleanups) (*runFile, *reaper, error) {
	file, err := claimRun(runInfo{Pipeline: r.info.name, TLS: r.config.tls.cert != ""})
	if running := (*runningError)(nil); errors.As(err, &running) {
		return nil, nil, &exitError{exitPlane, err, "flowctl list"}
	} else if err != nil {
		r.log.Warn("list cannot find this run by itself, and a second one would not be refused", "err", err)
	}
	opened.add(file.release)
	children := newReaper()
	if err := children.adopt(); err != nil {
		r.log.Warn("processes that leave their process group cannot be ended", "err", err)
	}
	opened.add(children.close)
	if engine := r.config.engine; engine != nil {
		engine.commands, engine.env, engine.pipeline, engine.ownerLabel = children, baseEnv(), r.info.name, file.ownerLabel()
	}
	return file, children, nil
}

// open opens what the loop needs: the control plane's listeners, the launcher and the
// supervisor, and the control plane.
func (r *run) open(p *Pipeline, file *runFile, children *reaper, opened *cleanups) error {
	certs, err := openCertificates(r.config.tls, r.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	lis, endpoint, err := openPlane(r.config.listen, r.config.tls, r.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	opened.add(func() { lis.Close() }) // once more, if a control plane has served it
	if err := file.publish(endpoint); err != nil {
		r.log.Warn("list cannot find this run by itself", "err", err)
	}
	access, err := openComponentAccess(certs, endpoint, p.speakTLS(true), p.speakTLS(false), r.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	if access.listener != nil {
		opened.add(func() { access.listener.Close() })
	}
	launch := launchConfig{
		endpoint: access.endpoint, tlsEndpoint: endpoint, containerEndpoint: containerEndpoint(lis.Addr(), endpoint), tlsEnv: access.tlsEnv, heartbeat: r.config.ttl / 3,
		engine: r.config.engine, reaper: children, emit: r.out.emit, flush: r.out.flush, log: r.log,
	}
	identify, err := r.openProcesses(p, launch)
	if err != nil {
		return err
	}
	r.reloads = &reloads{file: r.config.file, read: r.config.read, engine: r.config.engine, fits: func(next *Pipeline) error {
		if ids := next.speakTLS(false); certs != nil && access.listener == nil && len(ids) > 0 {
			return fmt.Errorf("%s: %s would need a listener without TLS, which there is not: restart flowctl, or set \"tls\": true", r.config.file, enumerate(ids))
		}
		return launch.checkReach(next)
	}}
	r.reloads.start(p)
	st, err := openState(r.config.state, r.info.name, r.log)
	if err == nil {
		r.plane, err = newPlane(planeConfig{
			listener: lis, endpoint: endpoint, componentListener: access.listener, ttl: r.config.ttl, interval: r.config.interval,
			members: r.members(), pipeline: r.info, store: st, certs: certs, peer: identify.identifyPeer, requests: r.reloads, log: r.log,
		})
	}
	if err != nil {
		st.close()
		r.launcher.close()
		return &exitError{code: exitPlane, err: err}
	}
	r.generation = r.sup.generation
	return nil
}

// openProcesses makes the launcher, the supervisor, the checks and the identifier.
func (r *run) openProcesses(p *Pipeline, launch launchConfig) (*identifier, error) {
	if err := launch.checkReach(p); err != nil {
		return nil, &exitError{code: exitUsage, err: err}
	}
	if r.config.logDir != "" {
		err := r.out.openFiles(r.config.logDir, p.ids())
		switch {
		case err != nil && r.config.logDirOptional:
			r.log.Warn("no log files", "err", err)
		case err != nil:
			return nil, &exitError{code: exitUsage, err: fmt.Errorf("-log-dir: %v", err)}
		}
	}
	var err error
	if r.launcher, err = newLauncher(launch); err != nil {
		return nil, &exitError{code: exitFailed, err: err}
	}
	if err := r.reservePorts(p); err != nil {
		r.launcher.close()
		return nil, &exitError{code: exitFailed, err: err}
	}
	times := procTimes{start: r.config.startTimeout, unhealthy: r.config.unhealthyTimeout, stop: r.config.stopTimeout}
	r.sup = newSupervisor(p, times, r.launcher, r.log)
	identify := &identifier{
		leaders: r.launcher.leaders, descendants: r.launcher.descendants,
		mark: runMark + "=" + r.launcher.mark, containers: launch.engine.usable(),
	}
	r.checks = newChecks(identify.componentOf, r.log)
	return identify, nil
}

// reservePorts reserves a port for each component of p that has none yet.
func (r *run) reservePorts(p *Pipeline) error {
	for _, c := range p.components() {
		if _, err := r.launcher.healthPort(c); err != nil {
			return fmt.Errorf("component %s: %v", c.ID, err)
		}
	}
	return nil
}

// prepareEngine has the engine remove what killed runs have left and pull the images that
// are missing, which may take minutes. It returns early, with the signal, when one asks for
// an end.
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
		removed, err := r.config.engine.removeAbandoned(ctx)
		if len(removed) > 0 {
			r.log.Warn("removed containers that a killed run has left", "containers", enumerate(removed))
		}
		if err == nil {
			err = r.config.engine.pullMissing(ctx, p, progress)
		}
		done <- err
	}()
	for {
		select {
		case err := <-done:
			return nil, err
		case sig := <-signals:
			if asksReload(sig) {
				continue // it asks for a reload, and the file has just been read
			}
			r.log.Info("stop requested", "signal", sig.String())
			cancel()
			<-done
			return sig, nil
		}
	}
}

// loop runs until every component is over, and the wrapped command too.
func (r *run) loop(signals <-chan os.Signal) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	broken := r.out.broken
	for {
		now := time.Now()
		r.advance(now)
		if r.sup.over() && !r.wrapped.runs() {
			r.log.Info("all components have ended", "after", now.Sub(r.info.started).Round(time.Millisecond))
			return
		}
		if due := r.next(now); due.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(due))
		}
		select {
		case sig := <-signals:
			r.signalled(sig, time.Now())
		case <-r.plane.registry.wake:
		case e := <-r.launcher.exits:
			r.exited(e, time.Now())
		case result := <-r.checks.results:
			r.checked(result, time.Now())
		case status := <-r.wrapped.end():
			r.commandEnded(status, time.Now())
		case request := <-r.reloads.requests:
			result, err := r.reload(request)
			request.answer <- reloadAnswer{result, err}
		case <-broken:
			broken = nil
			err := fmt.Errorf("standard output cannot be written: %v", r.out.brokenErr())
			r.log.Error("standard output cannot be written, stopping", "err", r.out.brokenErr())
			r.stopBy(exitFailed, err, time.Now())
		case <-r.out.footerDue():
		case <-timer.C:
		}
	}
}

// next is when loop has to look again although nothing happens, zero for never.
func (r *run) next(now time.Time) time.Time {
	return earliest(r.sup.next(now), earliest(r.wrapped.due(), r.watchdog.due()))
}

// advance does all that the state of things asks for at the time now.
func (r *run) advance(now time.Time) {
	r.takeChanges(now) // which needs the registry: if that hangs, systemd hears no more
	if r.watchdog.feed(now) {
		r.systemd.send(daemon.SdNotifyWatchdog)
	}
	r.sup.expire(now)
	r.expireCommand(now)
	for _, id := range r.sup.advanceReload(now) {
		r.launcher.forget(id)
	}
	r.syncMembers(now)
	r.expireUnhealthy(now)
	for _, p := range r.sup.startable() {
		r.start(p)
	}
	if failures := r.sup.failures(); len(failures) > 0 && !r.sup.stopping {
		r.failed(failures, now)
	}
	if !r.info.ready && !r.sup.stopping {
		r.checkReady(now)
	}
	if r.sup.stopping {
		r.sup.advanceStop(now)
	}
	r.showStatus()
	r.out.updateFooter(now, func() []string { return r.footerRows(now) })
}

// watchdog is systemd's: it wants to hear at least once in interval that the loop turns.
type watchdog struct {
	interval time.Duration // 0 for none
	fed      time.Time
}

// due is when it is to be fed again, zero for never.
func (w *watchdog) due() time.Time {
	if w.interval == 0 {
		return time.Time{}
	}
	return w.fed.Add(w.interval / 2)
}

// feed tells whether it is to be fed at the time now, and notes that it is.
func (w *watchdog) feed(now time.Time) bool {
	if w.interval == 0 || now.Before(w.due()) {
		return false
	}
	w.fed = now
	return true
}

// start starts p. The registry hears of it first, because a quick component could register
// before start returns.
func (r *run) start(p *proc) {
	c, registry := p.component, r.plane.registry
	registry.starting(c.ID, time.Now())
	err := r.sup.start(p, time.Now())
	switch {
	case err != nil:
		registry.finished(c.ID, err.Error(), time.Now())
	case c.HealthCheck != "" || c.readyOnceRunning():
		if c.HealthCheck != "" && !c.registers() {
			registry.checked(c.ID, "health_check "+c.HealthCheck+" has not been answered yet", time.Now())
		}
		r.checks.start(c, p.child)
	case !c.registers():
		registry.markReady(c.ID, time.Now())
	}
}

// checked takes in the result of a health check.
func (r *run) checked(result checkResult, now time.Time) {
	p := r.sup.byID[result.id]
	if p == nil || p.child != result.child {
		return // it is of a process that has ended
	}
	if !p.component.registers() && p.state == procStarting && result.failing == "" {
		r.plane.registry.markReady(p.id(), now)
	}
	r.plane.registry.checked(p.id(), result.failing, now)
}

// takeChanges takes in what the registry tells of services.
func (r *run) takeChanges(now time.Time) {
	r.putOff(now)
	for _, c := range r.plane.registry.changes(now) {
		p := r.sup.byID[c.component]
		if p == nil || p.state == procReady && !p.retiring {
			logChange(r.log, c)
		}
		if p != nil {
			r.sup.tell(p, healthOf(c.now, c.cause), now)
		}
	}
}

// putOff puts start and unhealthy timeouts off by the time in which flowctl itself was
// stopped since the last call: it has yet to hear what its components did meanwhile. It comes
// before anything that sets a timeout from now on.
func (r *run) putOff(now time.Time) {
	stopped := r.plane.registry.stopped(now)
	if d := stopped - r.stopped; d > 0 {
		r.log.Warn("flowctl itself was stopped or suspended: components get that time", "for", d.Round(time.Millisecond))
		r.sup.delay(d)
		r.stopped = stopped
	}
}

// healthOf is the health of a component of which the registry says c, because of cause.
func healthOf(c condition, cause string) healthInfo {
	return healthInfo{ok: c.ok(), registered: c != unregistered, cause: cause}
}

// hints are what may help where the registry says why a component is not healthy.
var hints = map[why]hint{whyUnregistered: hintRegister, whyCheck: hintCheck, whyDeclared: hintDeclared, whySilent: hintHeartbeat}

// expireUnhealthy fails the components that have been unhealthy for too long and, asked now,
// still are.
func (r *run) expireUnhealthy(now time.Time) {
	for _, p := range r.sup.overdue(now) {
		c, why, cause := r.plane.registry.condition(p.id(), now)
		r.sup.tell(p, healthOf(c, cause), now)
		if !p.health.ok {
			r.sup.failUnhealthy(p, now)
			p.failure.hint = hints[why]
		}
	}
}

// exited takes in the end of a process. What the process did before that, such as registering,
// is taken in first.
func (r *run) exited(e childEnd, now time.Time) {
	p := r.sup.byID[e.child.component.ID]
	if p.component.readyOnceRunning() && e.status.Exited() && e.status.ExitStatus() == 0 {
		r.checked(checkResult{child: e.child, id: p.id()}, now) // it has run, though it was over before that was seen
	}
	r.takeChanges(now)
	r.checks.stop(p.id())
	if !r.sup.stopping { // else the launcher ends what is left when it is closed
		r.launcher.endStrays(p.id())
	}
	r.sup.exited(e, now)
	cause := ""
	if p.state != procCompleted {
		cause = "its process ended: " + describeExit(e.status)
	}
	r.plane.registry.finished(p.id(), cause, now)
}

// failed ends the run because of failures. The first decides the exit code.
func (r *run) failed(failures []*failure, now time.Time) {
	for _, f := range failures {
		if f.kind == failNotReady {
			c, why, cause := r.plane.registry.condition(f.component.ID, now)
			f.reason, f.hint = f.reason+": "+cause, hints[why]
			if others := r.plane.registry.unmatchedServices(now); c == unregistered && f.component.registers() && len(others) > 0 {
				f.reason += "; registered, and none of the pipeline's: " + enumerate(others)
				f.hint = hintUnmatched
			}
		}
	}
	code := exitFailed
	if failures[0].kind == failNotReady {
		code = exitNotReady
	}
	r.stop(code, now)
}

// signalled takes in a signal. The first begins the stop, or is for the command if there is
// one, of which the second begins the stop; the next one kills.
func (r *run) signalled(sig os.Signal, now time.Time) {
	switch {
	case asksReload(sig):
		r.reloads.requestBySignal()
		return
	case sig == syscall.SIGHUP && r.sup.stopping, r.heeded.isRepeated(sig, now):
		return
	case r.sup.stopping:
		r.log.Warn("another signal, killing what still runs", "signal", sig.String())
		r.sup.killAll(now)
		r.wrapped.stop(now, 0)
		return
	}
	r.heeded = heededSignal{sig, now}
	if r.wrapped.runs() && r.wrapped.forward(sig, now, r.config.stopTimeout) {
		attrs := []any{"signal", sig.String(), "pid", r.wrapped.pid}
		if !r.wrapped.due().IsZero() {
			attrs = append(attrs, "at_most", r.config.stopTimeout)
		}
		r.log.Info("waiting for the command to end", attrs...)
		return
	}
	r.log.Info("stop requested", "signal", sig.String(), "at_most", r.sup.stopBound())
	code, err := r.wrapped.notRun(sig)
	r.stopBy(code, err, now)
}

// heededSignal is the last signal that the run heeded before its stop.
type heededSignal struct {
	sig os.Signal // nil for none, or for whichever may have ended the command
	at  time.Time
}

// isRepeated tells whether sig is the request that was heeded, come by another way: a shell
// and the kernel both tell of a terminal that is closed, timeout(1) tells the group and its
// child, and a terminal tells flowctl and the command that ends by it.
func (h heededSignal) isRepeated(sig os.Signal, now time.Time) bool {
	if h.sig == nil {
		return !h.at.IsZero() && now.Sub(h.at) < repeatTime
	}
	if sig == syscall.SIGHUP {
		return h.sig != nil && h.sig != syscall.SIGINT
	}
	return sig == h.sig && now.Sub(h.at) < repeatTime
}

// stopBy is stop for a reason that is not in a component.
func (r *run) stopBy(code int, err error, now time.Time) {
	if !r.sup.stopping {
		r.err = err
	}
	r.stop(code, now)
}

// stop begins the end of the run, with the exit code that the first reason gives.
func (r *run) stop(code int, now time.Time) {
	if r.sup.stopping {
		return
	}
	r.code = code
	r.wrapped.stop(now, r.config.stopTimeout)
	r.sup.beginStop()
	r.systemd.send(daemon.SdNotifyStopping, extendTimeout(r.sup.stopBound()))
}

// commandEnded ends the run by the exit code of its command.
func (r *run) commandEnded(status syscall.WaitStatus, now time.Time) {
	code, err := r.wrapped.exited(status)
	r.log.Info("command ended", "reason", describeExit(status))
	if r.sup.stopping { // it was asked to end
		if r.code == exitOK {
			r.code, r.err = code, err
		}
		return
	}
	r.heeded = heededSignal{at: now} // one that ended the command may be about to arrive here too
	r.stopBy(code, err, now)
}

// expireCommand kills a command that has not ended in time, and goes on without one that
// outlives that.
func (r *run) expireCommand(now time.Time) {
	err := r.wrapped.expire(now, r.log)
	if err == nil {
		return
	}
	r.log.Error("the command cannot be ended", "err", err)
	r.stopBy(exitFailed, err, now)
	if r.code == exitOK {
		r.code, r.err = exitFailed, err
	}
}

// checkReady tells systemd and people when all components are ready, and starts the command.
func (r *run) checkReady(now time.Time) {
	if o := r.overview(); o.ready < o.total {
		return
	}
	r.info.ready = true
	r.log.Info("pipeline ready", "components", len(r.sup.procs), "endpoint", r.plane.registry.endpoint, "after", now.Sub(r.info.started).Round(time.Millisecond))
	r.showStatus() // who is told that all are ready finds it so when asking
	r.systemd.send(daemon.SdNotifyReady)
	if r.config.until == untilReady {
		r.stop(exitOK, now)
	} else if r.config.format == formatText && isTerminal(os.Stderr) {
		r.log.Info("in another terminal", r.commands()...)
	}
	if r.wrapped == nil {
		return
	}
	r.out.removeFooter() // the terminal is the command's now
	if err := r.wrapped.start(r.launcher); err != nil {
		r.log.Error("the command did not start", "err", err)
		r.stopBy(exitUsage, err, now)
	}
}

// commands returns, as attributes of the log, the commands that a person may want while the
// pipeline runs.
func (r *run) commands() []any {
	with := ""
	if r.config.tls.cert != "" {
		with = " -tls-ca-cert FILE"
		if r.config.tls.ca != "" {
			with += " -tls-cert FILE -tls-key FILE"
		}
	}
	out := []any{"see", "flowctl list" + with}
	if !fromStandardInput(r.config.file) {
		out = append(out, "reload", "flowctl reload"+with)
	}
	return out
}

// overview sums up how the components are.
func (r *run) overview() overview {
	o := overview{total: len(r.sup.procs), stopping: r.sup.stopping}
	for _, p := range r.sup.procs {
		switch {
		case p.state == procCompleted || p.state == procReady && p.health.ok:
			o.ready++
		case p.state == procReady:
			o.unhealthy = append(o.unhealthy, fmt.Sprintf("%s (%s)", p.id(), p.health.cause))
		case p.state == procBackoff:
			o.restarting = append(o.restarting, p.id())
		default:
			o.waiting = append(o.waiting, p.id())
		}
		if !p.over() {
			o.left = append(o.left, p.id())
		}
	}
	return o
}

// showStatus tells people and systemd how the run is, if that has changed.
func (r *run) showStatus() {
	for _, p := range r.sup.procs {
		r.plane.registry.publishProcess(p.id(), processOf(p))
	}
	o := r.overview()
	status := o.String()
	if status == r.info.status || len(o.left) == 0 {
		return
	}
	r.info.status = status
	r.plane.registry.publishPipeline(r.info)
	if r.config.showStatus && !r.out.showsFooter() {
		r.log.Info("status", o.attrs()...)
	}
	states := []string{"STATUS=" + status}
	if at := r.sup.readyDeadline(); !r.info.ready && !r.sup.stopping && at.After(time.Now()) {
		states = append(states, extendTimeout(time.Until(at)))
	}
	r.systemd.send(states...)
}

// footerRows are the rows of the footer.
func (r *run) footerRows(now time.Time) []string {
	registry := r.plane.registry
	f := footer{pipeline: r.info.name, endpoint: registry.endpoint, status: r.info.status}
	snapshots := registry.memberSnapshots(now)
	for _, p := range r.sup.procs {
		s := snapshots[p.id()]
		row := footerComponent{id: p.id(), state: p.state.String(), health: s.health, lastSeen: s.lastSeen, restarts: p.restarts, metrics: s.metrics}
		if p.child != nil {
			row.pid, row.started = p.child.pid, p.started
		}
		f.components = append(f.components, row)
	}
	return f.rows(now)
}

// processOf returns what the registry shows of the process of p.
func processOf(p *proc) processReport {
	out := processReport{state: p.state.String(), restarts: p.restarts}
	if p.child != nil {
		out.pid, out.started = p.child.pid, p.started
	}
	return out
}

// syncMembers tells the registry which components there are, when that has changed.
func (r *run) syncMembers(now time.Time) {
	if r.generation == r.sup.generation {
		return
	}
	r.generation = r.sup.generation
	r.plane.registry.setMembers(r.members(), now)
}

// reload begins to turn what runs into the pipeline of request. On an error everything is as it
// was.
func (r *run) reload(request reloadRequest) (out reloadResult, err error) {
	if r.sup.stopping {
		return out, errStopping
	}
	if r.info.ready { // before that systemd waits for READY=1 alone
		r.systemd.send(daemon.SdNotifyReloading, daemon.SdNotifyMonotonicUsec())
		defer r.systemd.send(daemon.SdNotifyReady)
	}
	if err = request.err; err == nil {
		err = r.makeRoom(request.pipeline)
	}
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			r.log.Error("cannot reload", "err", strings.TrimSuffix(line, "\n"))
		}
		return out, err
	}
	changed := r.sup.reload(request.pipeline)
	out = reloadResult(changed)
	r.log.Info("reloaded", "file", r.config.file, "added", enumerate(out.added), "removed", enumerate(out.removed), "restarted", enumerate(out.restarted), "unchanged", out.unchanged)
	return out, nil
}

// makeRoom reserves ports for the components of p that are new and opens what their lines go
// to. On an error the ports are given back.
func (r *run) makeRoom(p *Pipeline) error {
	err := r.reservePorts(p)
	if err == nil {
		err = r.out.add(p.ids())
	}
	if err != nil {
		for _, id := range p.ids() {
			if r.sup.byID[id] == nil {
				r.launcher.forget(id)
			}
		}
	}
	return err
}

// members returns what the control plane has to know of the components.
func (r *run) members() []member {
	var out []member
	for _, p := range r.sup.procs {
		c := p.component
		port, err := r.launcher.healthPort(c)
		if err != nil {
			p.log.Warn("it has no HEALTH_PORT yet", "err", err) // to start it fails if there is none then
		}
		out = append(out, member{
			id: c.ID, role: c.Role, healthPort: port, endpoint: r.launcher.config.endpointOf(c), inputs: c.Inputs,
			inputEvents: c.InputEventTypes, outputEvents: c.OutputEventTypes, inContainer: c.Image != "", kind: c.Type, labels: c.Labels,
		})
	}
	return out
}

// end prints the failure report, if something failed, and then returns an *exitError.
func (r *run) end() error {
	r.out.removeFooter()
	if len(r.sup.failures()) > 0 && r.code == exitOK {
		r.code = exitFailed // found while stopping: a process that outlived SIGKILL
	}
	if r.code == exitOK {
		return nil
	}
	r.out.report(r.report().forms())
	return &exitError{code: r.code}
}

// report returns the failure report of a run that has ended.
func (r *run) report() report {
	out := report{Time: time.Now(), Level: "ERROR", Msg: reportMsg, ExitCode: r.code, Pipeline: r.info.name}
	for _, p := range r.sup.procs {
		if p.failure != nil {
			out.Failures = append(out.Failures, r.describe(p))
		}
	}
	if len(out.Failures) == 0 && r.err != nil {
		out.Error = r.err.Error()
	}
	return out
}

// describe returns what the failure report says about p, which failed.
func (r *run) describe(p *proc) failedComponent {
	f, file := p.failure, r.config.file
	if fromStandardInput(file) {
		file = ""
	}
	out := failedComponent{
		Component: f.component.ID, Kind: f.kind, Reason: f.reason, PID: f.pid, Registered: f.registered, Restarts: p.restarts,
		LastLines: []string{}, expected: f.component.registers(), Try: f.try(file),
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
