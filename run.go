package main

// A run of a pipeline, where the processes and the control plane meet: runPipeline opens what it
// needs; its loop takes in what happens and decides what follows from it.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// garbageLimit is the memory in bytes from which the garbage collector comes more and more often. What is in
// use stays below it: see the bounds in limits.go.
const garbageLimit = 144 << 20

// Events that -until can name.
const (
	untilStopped = "stopped"
	untilReady   = "ready"
	untilDone    = "done"
	untilUp      = "up"
)

// run is one run of a pipeline. One goroutine, in loop, owns it: everything that happens reaches it as
// an event, and it alone decides. It never waits for another process.
type run struct {
	config   runConfig
	once     bool // the file cannot be read again; asked before the loop, which waits for no disk
	log      *slog.Logger
	out      *outputs
	systemd  *notifier
	watchdog <-chan time.Time // systemd's: when to feed it, nil for none
	info     pipelineInfo     // what is shown of the run as a whole
	launcher *launcher
	sup      *supervisor
	checks   *checks
	moving   *moving
	plane    *plane
	wrapped  *wrapped // nil for none
	warner   *warner
	reloads  *reloads
	watcher  *fileWatcher // nil for none
	restarts *restarts
	recorder *recorder // nil for none

	stopped time.Duration // how long flowctl itself was stopped, that sup knows
	heeded  heededSignal
	others  changeLog  // of what is not of the pipeline
	code    int        // the exit code, once a stop has begun
	err     error      // why the code is not 0; nil where a component is the reason
	left    []procInfo // what SIGKILL has not ended
	closers []func()   // to be called when the run is over or cannot begin, the last first
}

// runPipeline runs p and returns an *exitError for everything but success.
func runPipeline(p *Pipeline, config runConfig) error {
	limitMemory()
	r := &run{config: config, once: fromStandardInput(config.file), info: pipelineInfo{name: p.Metadata.Name, version: config.version, started: time.Now(), file: p.Text}}
	defer r.close()
	r.out = openOutputs(outputConfig{pipeline: r.info.name, ids: p.ids(), format: config.format, level: config.logLevel, footer: config.showStatus, command: len(config.command) > 0})
	r.closeLater(r.out.close)
	r.log = r.out.log
	claimed, err := r.guarded()
	if err != nil {
		return err
	}
	r.warner = newWarner(config.engine, config.ttl, r.log)
	r.others = changeLog{log: r.log, most: guestLines}
	r.systemd = newNotifier(r.log)
	r.closeLater(r.systemd.close)
	r.watchdog = watchdogTicks(r.log)
	if config.servicesOf != 0 {
		r.log.Info("the services are those of the sandbox that runs", "pid", config.servicesOf)
	}
	signals := catchSignals()
	if r.wrapped, err = newWrapped(config.command); err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	if err := r.claim(&claimed); err != nil {
		return err
	}
	r.warner.warn(p)
	sig, err := r.prepareEngine(signals, p)
	if err != nil {
		return err
	}
	if sig != nil {
		if code, err := r.cutShort(sig); err != nil {
			return &exitError{code: code, err: err}
		}
		return nil
	}
	if err := r.open(p, claimed); err != nil {
		return err
	}
	r.loop(signals)
	r.moving.relay.close()
	r.wrapped.close()
	r.reloads.close()
	r.checks.close()
	r.left = r.launcher.close()
	r.plane.stop()
	return r.end()
}

// limitMemory has the garbage collector come more and more often from garbageLimit on, unless its own
// variable says otherwise.
func limitMemory() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(garbageLimit)
	}
}

// limitGarbage has the garbage collector come sooner, unless its own variable says otherwise: callers make
// the control plane hold much for a moment, and the rest of a run takes little. It is called once the
// pipeline is ready, because a start has nothing to collect.
func limitGarbage() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
}

func (r *run) closeLater(f func()) { r.closers = append(r.closers, f) }

func (r *run) close() {
	for _, f := range slices.Backward(r.closers) {
		f()
	}
}

// claimed is what a run has before anything happens that others could see.
type claimed struct {
	file      *runFile // nil for none
	children  *reaper
	guard     *guard
	inherited []int // descriptors that flowctl was started with
}

// guarded makes flowctl the parent of what its descendants orphan, and starts the guard. That comes first: the
// guard takes the longest until it is there.
func (r *run) guarded() (claimed, error) {
	children := newReaper()
	if err := children.adopt(); err != nil {
		r.log.Warn("processes that leave their process group cannot be ended", "err", err)
	}
	r.closeLater(children.close)
	inherited, err := holdBack()
	if err != nil {
		r.log.Warn("components may get descriptors of who has started flowctl", "err", err)
	}
	guard, err := startGuard(children, r.log)
	if err != nil {
		return claimed{}, &exitError{code: exitFailed, err: fmt.Errorf("cannot start the guard, which ends the components of a flowctl that is killed: %v", err)}
	}
	r.closeLater(guard.dismiss)
	return claimed{children: children, guard: guard, inherited: inherited}, nil
}

// claim claims the name of the pipeline.
func (r *run) claim(claimed *claimed) error {
	file, err := claimRun(runInfo{Pipeline: r.info.name, TLS: r.config.tls.cert != ""})
	if _, running := errors.AsType[*runningError](err); running {
		return &exitError{exitPlane, err, "flowctl list"}
	} else if err != nil {
		r.log.Warn("list cannot find this run by itself, and a second one would not be refused", "err", err)
	}
	r.closeLater(file.release)
	if engine := r.config.engine; engine != nil {
		engine.commands, engine.env, engine.pipeline, engine.ownerLabel = claimed.children, baseEnv(), r.info.name, file.ownerLabel()
	}
	claimed.file = file
	return nil
}

// open opens what the loop needs: listeners, launcher, supervisor and control plane.
func (r *run) open(p *Pipeline, claimed claimed) error {
	certs, err := openCertificates(r.config.tls, r.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	listeners, held, err := openPlane(r.config.listen, r.config.tls, r.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	r.closeLater(func() { closeAll(listeners) }) // once more, if a control plane has served them
	endpoint := listeners[0].endpoint
	operators, err := claimed.file.listen()
	if err != nil {
		r.log.Warn("operators have no socket here", "err", err)
	} else {
		r.closeLater(func() { operators.Close() })
	}
	if err := claimed.file.publish(endpoint); err != nil { // not before: who finds the endpoint looks for that socket
		r.log.Warn("list cannot find this run by itself", "err", err)
	}
	access, err := openComponentAccess(certs, endpoint, p.speakTLS(true), p.speakTLS(false), r.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	if access.listener != nil {
		r.closeLater(func() { access.listener.Close() })
	}
	launch := launchConfig{
		endpoint: access.endpoint, tlsEndpoint: endpoint, containerEndpoint: inContainers(listeners), tlsEnv: access.tlsEnv, heartbeat: r.config.ttl / 3, commandEnv: r.config.variables.environ(),
		engine: r.config.engine, reaper: claimed.children, guard: claimed.guard, inherited: claimed.inherited, emit: r.out.emit, flush: r.out.flush, log: r.log,
	}
	identify, err := r.openProcesses(p, launch)
	if err != nil {
		return err
	}
	again, err := r.config.absolute()
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	r.reloads = &reloads{watch: r.watch(again.envFiles), file: again.file, envFiles: again.envFiles, read: again.readFile, refresh: r.out.refresh, warner: r.warner, engine: r.config.engine, fits: func(next *Pipeline) error {
		if ids := next.speakTLS(false); certs != nil && access.listener == nil && len(ids) > 0 {
			return fmt.Errorf("%s: %s would need a listener without TLS, which there is not: restart flowctl, or set \"tls\": true", r.config.file, enumerate(ids))
		}
		return launch.checkReach(next)
	}}
	r.reloads.start(p)
	st, err := openStore(r.config.state, r.info.name, r.log)
	if err == nil {
		r.plane, err = newPlane(planeConfig{
			listeners: listeners, advertise: r.config.advertise, held: held, componentListener: access.listener, ttl: r.config.ttl, interval: r.config.interval, forget: r.config.forget,
			members: r.members(), pipeline: r.info, relay: r.moving.relay, store: st, certs: certs, identifier: identify,
			operatorListener: operators, runFile: claimed.file, operators: r.config.operators, requireIdentity: r.config.requireIdentity, requests: r.reloads, lines: r.out.lines, records: r.config.records, log: r.log,
		})
	}
	if err != nil {
		st.close()
		r.launcher.close()
		return &exitError{code: exitPlane, err: err}
	}
	if err := claimed.guard.awaitBeat(); err != nil {
		r.plane.stop()
		r.launcher.close()
		return &exitError{code: exitFailed, err: err}
	}
	r.moving.registry, r.moving.generation = r.plane.registry, r.sup.generation
	r.openRecorder()
	return nil
}

// openRecorder begins the record of the run.
func (r *run) openRecorder() {
	if r.config.records == "" && !r.config.noState {
		r.log.Warn("this run is not recorded: this user has no folder for state", "try", "set XDG_STATE_HOME or HOME; -no-persistence is for a run without a record")
	}
	r.recorder = openRecorder(r.config.records, r.log)
	r.closeLater(r.recorder.close)
	r.record(runStarting, "")
}

// record records how the run is now.
func (r *run) record(state, reason string) {
	record := runRecord{ID: r.info.runID, Pipeline: r.info.name, PID: os.Getpid(), State: state, Started: r.info.started, Reason: reason}
	if state != runStarting && state != runRunning {
		record.Ended, record.ExitCode = new(time.Now()), &r.code
	}
	r.recorder.update(record)
}

// openProcesses makes the launcher, the supervisor, the checks and the identifier.
func (r *run) openProcesses(p *Pipeline, launch launchConfig) (*identifier, error) {
	if err := launch.checkReach(p); err != nil {
		return nil, &exitError{code: exitUsage, err: err}
	}
	if r.config.logDir != "" {
		var err error
		r.out.files, err = openLogFiles(r.config.logDir, p.ids(), r.log)
		switch {
		case err != nil && r.config.logDirOptional, errors.Is(err, errNotOurs): // who has put the folder there ends no run
			r.log.Warn("no log files", errorAttrs(err)...)
		case err != nil:
			return nil, &exitError{code: exitFor(err), err: fmt.Errorf("-log-dir: %w", err)}
		default:
			r.out.lines.path = r.out.files.path
		}
	}
	r.launcher = newLauncher(launch)
	for _, id := range p.ids() {
		r.launcher.cgroup.part(id) // while the guard begins
	}
	r.info.runID = runID(r.launcher.mark)
	if err := r.reservePorts(p); err != nil {
		r.launcher.close()
		return nil, &exitError{code: exitFailed, err: err}
	}
	r.sup = newSupervisor(p, r.config.times, r.launcher, r.log)
	r.sup.watching = r.config.watch
	r.moving = &moving{relay: newRelay(r.config.maxEvent, r.log), sup: r.sup}
	r.sup.streams = r.moving.relay
	r.restarts = &restarts{sup: r.sup, log: r.log}
	identify := newIdentifier(r.launcher, r.log)
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

// prepareEngine has the engine remove what killed runs have left and pull missing images, which may
// take minutes. It returns early, with the signal, when one asks for an end.
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
	var timeout <-chan time.Time
	if r.config.timeout > 0 {
		timeout = time.After(time.Until(r.info.started.Add(r.config.timeout)))
	}
	for {
		select {
		case err := <-done:
			if err != nil { // it can pass by itself
				return nil, &exitError{code: exitPlane, err: err}
			}
			return nil, nil
		case <-timeout:
			cancel()
			<-done
			return nil, &exitError{code: exitFailed, err: fmt.Errorf("-timeout %s is over: images are not here yet: %s", r.config.timeout, enumerate(p.images()))}
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
	broken := r.out.console.broken
	for {
		r.takeSignals(signals) // before an end is judged, which the same signal may have caused
		now := time.Now()
		r.advance(now)
		if r.sup.over() && !r.wrapped.runs() && r.wrapped.prepared() == nil {
			r.log.Info("all components have ended", "after", now.Sub(r.info.started).Round(time.Millisecond))
			return
		}
		var timer <-chan time.Time
		if due := earliest(earliest(r.sup.next(now), r.timeoutAt()), earliest(r.wrapped.due(), r.others.due())); !due.IsZero() {
			timer = time.After(time.Until(due))
		}
		select {
		case sig := <-signals:
			r.signalled(sig, time.Now())
		case <-r.plane.registry.wake:
		case <-r.moving.relay.wake:
			r.moving.take(time.Now())
		case <-r.plane.certs.expiryTold():
		case e := <-r.launcher.exits:
			r.exited(e, time.Now())
		case result := <-r.checks.results:
			r.checked(result, time.Now())
		case <-r.wrapped.prepared():
			r.startCommand(time.Now())
		case status := <-r.wrapped.end():
			r.commandEnded(status, time.Now())
		case request := <-r.reloads.requests:
			request.result, request.err = r.reload(request)
			if request.brought != nil && request.err == nil {
				r.restarts.await(request.brought, slices.Concat(request.result.added, request.result.restarted))
			}
			close(request.done)
		case c := <-r.watcher.requests():
			r.changed(c)
		case request := <-r.reloads.restarts:
			r.restarts.begin(request)
		case <-r.reloads.stops:
			if !r.sup.stopping { // a second signal would kill
				r.log.Info("an operator asks for the end")
				r.signalled(syscall.SIGTERM, time.Now())
				r.heeded = heededSignal{at: time.Now()} // no signal came: the first is yet to stop in order
			}
		case <-broken:
			broken = nil
			name, err := r.out.console.name, r.out.console.err
			r.log.Error(name+" cannot be written, stopping", "err", err)
			r.stop(exitFailed, fmt.Errorf("%s cannot be written: %v", name, err), time.Now())
		case <-r.watchdog:
			r.takeChanges(time.Now()) // which needs the registry: if that hangs, systemd hears no more
			r.systemd.send(daemon.SdNotifyWatchdog)
		case <-r.out.screen.due():
		case <-timer:
		}
	}
}

// takeSignals takes in the signals that have come.
func (r *run) takeSignals(signals <-chan os.Signal) {
	for {
		select {
		case sig := <-signals:
			r.signalled(sig, time.Now())
		default:
			return
		}
	}
}

// advance does all that the state of things asks for at the time now.
func (r *run) advance(now time.Time) {
	r.takeChanges(now)
	r.sup.expire(now)
	r.expireCommand(now)
	for _, id := range r.sup.advanceReload(now) {
		r.launcher.forget(id)
		r.out.forget(id)
	}
	if r.moving.generation != r.sup.generation {
		r.moving.generation = r.sup.generation
		r.plane.registry.setMembers(r.members(), now)
		r.moving.update()
	}
	r.expireUnhealthy(now)
	r.expireTimeout(now)
	for _, p := range r.sup.startable() {
		r.start(p)
	}
	r.explainFailures(now)
	if failures := r.sup.failures(); len(failures) > 0 && !r.sup.stopping {
		r.failed(failures, now)
	}
	if !r.info.ready && !r.sup.stopping {
		r.checkReady(now)
	}
	if r.info.ready && !r.sup.stopping && !r.wrapped.runs() && r.wrapped.prepared() == nil && r.sup.worked(r.moving.relay.ended) {
		r.log.Info("all components have completed, stopping what still runs")
		r.sup.complete = true
		r.stop(exitOK, nil, now)
	}
	if r.sup.stopping {
		r.sup.advanceStop(now)
	}
	r.showStatus()
	r.restarts.answer(now)
	r.out.screen.update(now, func() []string { return r.footerRows(now) })
}

// start starts p. The registry hears of it first: a quick component registers before start returns.
func (r *run) start(p *proc) {
	c, registry := p.component, r.plane.registry
	registry.starting(c.ID, time.Now())
	err := r.sup.start(p, time.Now())
	switch {
	case err != nil:
		registry.finished(c.ID, err.Error(), time.Now())
	case c.HealthCheck != "" || c.readyOnceRunning():
		if c.HealthCheck != "" && !c.registers() {
			registry.checked(c.ID, "health_check "+shownCheck(p.child.fill(c.HealthCheck))+" has not been answered yet", time.Now())
		}
		r.checks.start(c, p.child)
	case c.Oneshot:
		registry.checked(c.ID, "it has not ended yet, and is ready once it has", time.Now())
	case !c.registers():
		registry.markReady(c.ID, time.Now())
	}
}

// checked takes in the result of a health check.
func (r *run) checked(result checkResult, now time.Time) {
	p := r.sup.byID[result.child.component.ID]
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
	r.others.flush(now)
	changes := r.plane.registry.changes(now)
	if slices.ContainsFunc(changes, func(c change) bool { return c.component != "" }) {
		defer r.moving.update()
	}
	for _, c := range changes {
		p := r.sup.byID[c.component]
		switch {
		case p == nil:
			r.others.add(c, now)
		case p.state == procReady && !p.retiring:
			logChange(r.log, c)
		}
		if p != nil {
			r.sup.tell(p, healthOf(c.now, c.cause), now)
		}
	}
}

// putOff puts timeouts off by the time in which flowctl itself was stopped since the last call: it has
// yet to hear what its components did meanwhile. It comes before anything that sets a timeout.
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
var hints = map[why]hint{whyUnregistered: hintRegister, whyCheck: hintCheck, whyDeclared: hintDeclared, whySilent: hintHeartbeat, whyMute: hintMute, whyStream: hintStream}

// expireUnhealthy restarts or fails what has been unhealthy for too long and, asked now, still is.
func (r *run) expireUnhealthy(now time.Time) {
	for _, p := range r.sup.overdue(now) {
		c, why, cause := r.plane.registry.condition(p.id(), now)
		r.sup.tell(p, healthOf(c, cause), now)
		if !p.health.ok {
			if r.sup.treat(p, now); p.failure != nil {
				p.failure.hint = hints[why]
			}
		}
	}
}

// timeoutAt is when -timeout is over, zero for never.
func (r *run) timeoutAt() time.Time {
	if r.config.timeout == 0 || r.sup.stopping {
		return time.Time{}
	}
	return r.info.started.Add(r.config.timeout)
}

// expireTimeout stops a run that takes longer than -timeout.
func (r *run) expireTimeout(now time.Time) {
	at := r.timeoutAt()
	if at.IsZero() || now.Before(at) {
		return
	}
	what := "it was not stopped"
	switch o := overviewOf(r.sup, r.plane.certs.expiryText()); {
	case r.wrapped.runs():
		what = fmt.Sprintf("the command %q after -- had not ended", r.wrapped.argv[0])
	case !r.info.ready:
		what = o.String()
	case r.config.until == untilDone:
		what = "not completed: " + enumerate(o.left)
	}
	err := fmt.Errorf("-timeout %s is over: %s", r.config.timeout, what)
	r.log.Error("the run takes too long, stopping", "err", err)
	r.stop(exitFailed, err, now)
}

// exited takes in the end of a process, after what the process did before, such as registering.
func (r *run) exited(e childEnd, now time.Time) {
	p := r.sup.byID[e.child.component.ID]
	if p.component.readyOnceRunning() && e.status.Exited() && e.status.ExitStatus() == 0 {
		r.checked(checkResult{child: e.child}, now) // it has run, though it was over before that was seen
	}
	r.takeChanges(now)
	r.checks.stop(p.id())
	r.sup.exited(e, now)
	cause := ""
	if p.state != procCompleted {
		cause = "its process ended: " + describeExit(e.status)
	}
	r.plane.registry.finished(p.id(), cause, now)
	r.moving.leave(p)
	r.moving.update()
}

// explainFailures adds to new failures what the control plane knows of them, and tells of those with
// which the run goes on.
func (r *run) explainFailures(now time.Time) {
	for _, p := range r.sup.procs {
		f := p.failure
		if f == nil || f.explained {
			continue
		}
		f.explained = true
		if f.kind == failNotReady && !f.component.Oneshot {
			c, why, cause := r.plane.registry.condition(f.component.ID, now)
			f.reason, f.hint = f.reason+": "+cause, hints[why]
			if others := r.plane.registry.unmatchedServices(now); c == unregistered && f.component.registers() && len(others) > 0 {
				f.reason += "; registered, and none of the pipeline's: " + enumerate(others)
				f.hint = hintUnmatched
			}
		}
		if p.brought && !r.sup.stopping {
			p.log.Error("what a reload or restart brought has failed, the others go on", "reason", f.reason)
		}
	}
}

// failed ends the run because of failures. The first decides the exit code.
func (r *run) failed(failures []*failure, now time.Time) {
	code := exitFailed
	if failures[0].kind == failNotReady {
		code = exitNotReady
	}
	r.stop(code, nil, now)
}

// signalled takes in a signal. The first is for the command, if there is one; the next begins the
// stop, and another one kills.
func (r *run) signalled(sig os.Signal, now time.Time) {
	if asksReload(sig) {
		r.reloads.requestBySignal()
		return
	}
	r.sup.heed(sig.(syscall.Signal), now)
	switch {
	case sig == syscall.SIGHUP && r.sup.stopping, r.heeded.isRepeated(sig, now):
		return
	case r.sup.stopping && r.heeded.sig == nil:
		r.log.Info("it is stopping already; another signal kills", "signal", sig.String())
		r.heeded = heededSignal{sig, now}
		return
	case r.sup.stopping:
		r.log.Warn("another signal, killing what still runs", "signal", sig.String())
		r.sup.killAll(now)
		r.wrapped.stop(now, 0)
		return
	}
	r.heeded = heededSignal{sig, now}
	if r.wrapped.runs() && r.wrapped.forward(sig, now, r.config.times.stop) {
		attrs := []any{"signal", sig.String(), "pid", r.wrapped.pid}
		if !r.wrapped.due().IsZero() {
			attrs = append(attrs, "at_most", r.config.times.stop)
		}
		r.log.Info("waiting for the command to end", attrs...)
		return
	}
	r.log.Info("stop requested", "signal", sig.String(), "at_most", r.sup.stopBound())
	code, err := r.cutShort(sig)
	r.stop(code, err, now)
}

// cutShort returns flowctl's exit code, and the reason, for a signal that ends the run. Before what
// -until or the command after -- waits for it is no success.
func (r *run) cutShort(sig os.Signal) (int, error) {
	number, _ := sig.(syscall.Signal)
	code, until := 128+int(number), r.config.until
	switch {
	case r.wrapped != nil && r.wrapped.pid == 0:
		return code, fmt.Errorf("the command %q after -- was not run: signal %d (%s) came first", r.wrapped.argv[0], number, sig)
	case until == untilDone, until == untilReady && !r.info.ready:
		return code, fmt.Errorf("-until %s was not reached: signal %d (%s) came first", until, number, sig)
	}
	return exitOK, nil
}

// stop begins the end of the run, with the exit code and the error of the first reason.
func (r *run) stop(code int, err error, now time.Time) {
	if r.sup.stopping {
		return
	}
	r.code, r.err = code, err
	r.wrapped.stop(now, r.config.times.stop)
	r.sup.beginStop()
	r.moving.take(now)
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
	if status.Signaled() {
		r.sup.heed(status.Signal(), now)
	}
	r.stop(code, err, now)
}

// expireCommand kills a command that has not ended in time, and gives up one that outlives that.
func (r *run) expireCommand(now time.Time) {
	err := r.wrapped.expire(now, r.log)
	if err == nil {
		return
	}
	r.log.Error("the command cannot be ended", "err", err)
	r.stop(exitFailed, err, now)
	if r.code == exitOK {
		r.code, r.err = exitFailed, err
	}
}

// checkReady tells systemd and people when all components are ready, and prepares the start of the command.
func (r *run) checkReady(now time.Time) {
	if o := overviewOf(r.sup, r.plane.certs.expiryText()); o.ready < o.total || !r.sup.settled(now) {
		return
	}
	r.info.ready = true
	limitGarbage()
	r.log.Info("pipeline ready", "components", len(r.sup.procs), "endpoint", r.plane.registry.endpoint, "after", now.Sub(r.info.started).Round(time.Millisecond))
	r.showStatus() // who is told that all are ready finds it so when asking
	r.plane.registry.publishPipeline(r.info)
	r.record(runRunning, "")
	r.systemd.send(daemon.SdNotifyReady)
	r.moving.begun = r.config.until != untilReady // which ends now: no event is moved
	r.moving.update()
	if r.config.sandbox {
		r.tellServices()
	}
	if r.config.until == untilReady {
		r.stop(exitOK, nil, now)
	} else if r.out.format == formatText && isTerminal(os.Stderr) {
		r.log.Info("in another terminal", usefulCommands(!r.once)...)
	}
	if r.wrapped != nil {
		r.settle()
	}
}

// settle has all written that was said and printed so far, and then the command started: the terminal,
// and standard output, are the command's from then on.
func (r *run) settle() {
	var children []*child
	for _, p := range r.sup.procs {
		if p.child != nil {
			children = append(children, p.child)
		}
	}
	r.wrapped.prepare(func(ctx context.Context) {
		for _, ch := range children {
			ch.catchUp(ctx)
		}
		r.out.settle(ctx)
	})
}

// startCommand starts the command after --.
func (r *run) startCommand(now time.Time) {
	if err := r.wrapped.start(r.launcher); err != nil {
		r.log.Error("the command did not start", "err", err)
		r.stop(exitFor(err), err, now)
	}
}

// tellServices tells what others can connect to, as far as the file says.
func (r *run) tellServices() {
	for _, p := range r.sup.procs {
		if p.child == nil {
			continue // a oneshot
		}
		attrs := []any{"health_port", p.child.healthPort}
		if c := p.component; len(c.Ports) > 0 {
			attrs = []any{"ports", enumerate(c.Ports)}
		} else if c.HealthCheck != "" && len(c.HealthCommand) == 0 {
			attrs = []any{"at", shownCheck(p.child.fill(c.HealthCheck))}
		}
		p.log.Info("service", attrs...)
	}
}

// showStatus tells people and systemd how the run is, if that has changed.
func (r *run) showStatus() {
	for _, p := range r.sup.procs {
		r.plane.registry.publishProcess(p.id(), processOf(p))
	}
	o := overviewOf(r.sup, r.plane.certs.expiryText())
	r.plane.tellReady(r.info.ready && o.ready == o.total && !o.stopping)
	status := o.String()
	if status == r.info.status || r.sup.over() {
		return
	}
	r.info.status = status
	r.plane.registry.publishPipeline(r.info)
	if r.config.showStatus && !r.out.screen.shows() {
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
	f := footer{pipeline: r.info.name, endpoint: registry.endpoint, status: r.info.status, rates: r.moving.rates()}
	snapshots := registry.memberSnapshots(now)
	for _, p := range r.sup.procs {
		f.components = append(f.components, footerComponent{p.id(), processOf(p), snapshots[p.id()]})
	}
	return f.rows(now)
}

// watch returns what has the files of a pipeline and of -env-file looked at, with -watch.
func (r *run) watch(envFiles []string) func(file string, p *Pipeline) {
	if r.config.watch {
		r.watcher = newWatcher()
		r.closeLater(r.watcher.close)
	}
	return func(file string, p *Pipeline) {
		files := slices.DeleteFunc(append([]string{file}, envFiles...), fromStandardInput)
		r.watcher.look(watched{files, p.components()})
	}
}

// changed takes in that files have changed.
func (r *run) changed(c fileChange) {
	if c.reload {
		r.log.Info("files have changed, reloading")
		r.reloads.requestBySignal()
	}
	for _, id := range c.ids {
		if r.sup.mayRestart(id) == nil && !r.sup.stopping {
			r.log.Info("its files have changed, restarting", "component", id)
			_ = r.sup.restart(id) // it may
		}
	}
}

// reload begins to turn what runs into the pipeline of request. On an error nothing has changed.
func (r *run) reload(request *reloadRequest) (out reloadResult, err error) {
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
	r.info.file = request.pipeline.Text
	r.plane.registry.publishPipeline(r.info)
	changed := r.sup.reload(request.pipeline, request.envFiles)
	r.moving.update() // spec.relay may be another
	out = reloadResult{added: changed.added, removed: changed.removed, restarted: changed.restarted, unchanged: changed.unchanged}
	r.log.Info("reloaded", "file", request.file, "added", enumerate(out.added), "removed", enumerate(out.removed), "restarted", enumerate(out.restarted), "unchanged", out.unchanged)
	return out, nil
}

// makeRoom reserves ports for the components of p that are new and makes them known to what
// their lines go to. On an error the ports are given back.
func (r *run) makeRoom(p *Pipeline) error {
	if err := r.reservePorts(p); err != nil {
		for _, id := range p.ids() {
			if r.sup.byID[id] == nil {
				r.launcher.forget(id)
			}
		}
		return err
	}
	r.out.add(p.ids())
	return nil
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
			inputEvents: c.InputEventTypes, outputEvents: c.OutputEventTypes, kind: c.Type, labels: c.Labels,
		})
	}
	return out
}

// end prints the failure report, if something failed, and then returns an *exitError.
func (r *run) end() error {
	r.out.screen.remove()
	if failed := r.moving.tell(r.log); failed > 0 && r.config.until == untilDone && r.code == exitOK {
		r.code, r.err = exitFailed, fmt.Errorf("%d events failed: see the log", failed)
	}
	if len(r.left) > 0 {
		r.err = errors.Join(r.err, fmt.Errorf("still running after SIGKILL: %s", namesOf(r.left)))
	}
	failed := slices.ContainsFunc(r.sup.procs, func(p *proc) bool { return p.failure != nil })
	if (failed || len(r.left) > 0) && r.code == exitOK {
		r.code = exitFailed // found while stopping, or brought by a reload
	}
	if r.code == exitOK {
		state := runCompleted
		if slices.ContainsFunc(r.sup.procs, func(p *proc) bool { return p.state != procCompleted }) {
			state = runStopped
		}
		r.record(state, "")
		return nil
	}
	report := r.report()
	r.record(runFailed, report.reason())
	r.out.report(report.forms())
	r.systemd.send("STATUS=" + report.status())
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
	if r.err != nil && len(out.Failures) == 0 || len(r.left) > 0 {
		out.Error = r.err.Error()
	}
	return out
}

// describe returns what the failure report says about p, which failed.
func (r *run) describe(p *proc) failedComponent {
	f, file := p.failure, r.config.file
	if r.once {
		file = ""
	}
	out := failedComponent{
		Component: f.component.ID, Kind: f.kind, Reason: f.reason, PID: f.pid, Registered: f.registered, Restarts: p.restarts,
		LastLines: []string{}, expected: f.component.registers(), Try: f.try(file, isService()),
	}
	if f.pid != 0 {
		out.Lived = f.lived.Round(time.Millisecond).String()
	}
	for _, line := range f.tail {
		out.LastLines = append(out.LastLines, strings.TrimSuffix(line, "\r"))
	}
	if r.out.files != nil {
		out.LogFile = r.out.files.path(f.component.ID)
	}
	out.NeverStarted, out.Stopped = r.sup.affected(p)
	return out
}
