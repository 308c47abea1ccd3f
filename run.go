package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// stallTime is how late a deadline has to be noticed to tell that flowctl itself was
// stopped.
const stallTime = 100 * time.Millisecond

// echoTime is how long after the first signal the same one is still the first.
const echoTime = 50 * time.Millisecond

// run is one run of a pipeline. One goroutine, in loop, owns it: everything that
// happens reaches it as an event, and it alone decides.
type run struct {
	flags       runFlags
	log         *slog.Logger
	stderr      *logWriter
	cleanups    []func() // of what was opened, in that order
	file        *runFile
	certs       *certificates // nil without TLS
	endpoint    string        // where the plane listens
	registry    *registry
	children    *reaper
	sup         *supervisor
	console     *console
	screen      *screen   // nil where there is no footer
	shown       time.Time // when it was given a footer last
	stale       bool      // showFooter has passed one over, which is due footerTime after shown
	about       about
	files       *logFiles   // nil for none
	entrance    bool        // there is a listener without TLS, or no TLS
	edition     int         // of sup, which the registry knows
	guest       *guest      // nil for none
	journal     *journalLog // nil where the log is not in the journal
	reloads     chan reloadRequest
	over        chan struct{}        // closed when loop has returned
	watchdog    time.Duration        // how often systemd wants to hear that flowctl turns, 0 for never
	watchdogFed time.Time            // when it heard that last
	conditions  map[string]change    // by component: what the registry last told
	unhealthy   map[string]time.Time // by component: since when
	signal      os.Signal            // the last that was heeded before the stop, at signalAt
	signalAt    time.Time
	ready       bool // once and for all
	code        int
	blame       error // for code, where no component is
	verdicts    chan verdict
	watches     map[string]context.CancelFunc // by component: ends its health checks
	watching    sync.WaitGroup
}

// logFiles opens the folder for the components' lines, nil for none. That one which
// nobody asked for cannot be opened is only a warning.
func (o *runFlags) logFiles(ids []string, log *slog.Logger) (*logFiles, error) {
	dir := o.logDir
	switch logs, _, _ := strings.Cut(os.Getenv("LOGS_DIRECTORY"), ":"); {
	case o.logDirSet:
	case logs != "":
		dir = logs
	case isTerminal(os.Stdout):
		dir = filepath.Join(filepath.Dir(o.file), "logs")
	}
	if dir == "" {
		return nil, nil
	}
	files, err := openLogFiles(dir, ids, log)
	switch {
	case err == nil:
		return files, nil
	case o.logDirSet:
		return nil, fmt.Errorf("-log-dir: %v", err)
	}
	log.Warn("no log files", "err", err)
	return nil, nil
}

// runPipeline runs p and returns an *exitError for everything but success.
func runPipeline(p *Pipeline, o runFlags) error {
	r := &run{
		flags: o, about: about{name: p.Metadata.Name, version: versionName(), started: time.Now()},
		conditions: make(map[string]change), unhealthy: make(map[string]time.Time),
		verdicts: make(chan verdict), watches: make(map[string]context.CancelFunc),
		reloads: make(chan reloadRequest), over: make(chan struct{}),
	}
	defer r.cleanUp()
	var ids []string
	for _, c := range p.components() {
		ids = append(ids, c.ID)
	}
	r.openLog(ids)
	r.watchdog = watchdogInterval(r.log)
	signals := catchSignals()
	if stopped, err := r.prepare(p, signals); err != nil || stopped {
		return err
	}
	lis, way, err := r.listen(p)
	if err != nil {
		return &exitError{exitPlane, err}
	}
	settings := procSettings{
		startTimeout: o.startTimeout, stopTimeout: o.stopTimeout, heartbeat: o.ttl / 3, endpoint: way.endpoint,
		tlsEnv: way.tlsEnv, gateway: gatewayEndpoint(lis.Addr(), r.endpoint), engine: r.flags.engine, flush: r.console.flush,
	}
	if err := r.supervise(p, ids, settings); err != nil {
		return err
	}
	st, err := o.openState(r.registry, &r.about, false, r.log)
	if err != nil {
		r.sup.close()
		return &exitError{exitPlane, err}
	}
	r.registry.given = way.endpoint
	r.registry.report(r.about)
	plane := servePlane(lis, r.registry, planeSettings{store: st, trace: r.trace, certs: r.certs, private: way.private, reload: r.requestReload}, r.log)
	r.loop(signals)
	close(r.over)
	for _, end := range r.watches {
		end()
	}
	r.watching.Wait()
	r.sup.close()
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

// openLog opens flowctl's own log and what the lines of the components ids go to.
func (r *run) openLog(ids []string) {
	var stdout io.Writer
	r.stderr, stdout, r.screen = openOutputs(r.flags)
	r.atEnd(r.stderr.close)
	r.log = newLogger(r.stderr, r.flags.format, r.flags.logLevel)
	if r.flags.format == formatJournal {
		r.journal = openJournal(r.about.name, ids)
		r.atEnd(r.journal.close)
		r.log = slog.New(r.journal.handler(r.flags.logLevel))
	}
	r.console = newConsole(stdout, r.flags.format, useColours(os.Stdout), ids)
}

// prepare does what comes before anything that others could see: it claims the name of
// the pipeline, and has the engine get the images. A signal that comes meanwhile ends
// the run.
func (r *run) prepare(p *Pipeline, signals <-chan os.Signal) (stopped bool, err error) {
	if r.guest, err = newGuest(r.flags.command); err != nil {
		return false, &exitError{exitUsage, err}
	}
	r.file, err = claimRun(runInfo{Pipeline: r.about.name, TLS: r.flags.tls.cert != ""})
	if running := (*runningError)(nil); errors.As(err, &running) {
		return false, &exitError{exitPlane, &hintedError{err, "flowctl list"}}
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
		engine.reaper, engine.pipeline, engine.claim = r.children, r.about.name, r.file.claim()
	}
	sig, err := r.flags.engine.prepareUntil(signals, p, r.log)
	if err != nil {
		return false, &exitError{exitUsage, err}
	}
	if code, err := r.guest.unrun(sig); err != nil {
		return true, &exitError{code, err}
	}
	return sig != nil, nil
}

// listen opens the control plane's listeners: where the flags say, and where the
// components come in.
func (r *run) listen(p *Pipeline) (lis net.Listener, way entrance, err error) {
	if r.certs, err = openCertificates(r.flags.tls, r.log); err != nil {
		return nil, way, err
	}
	if lis, r.endpoint, err = openPlane(r.flags.planeFlags, r.log); err != nil {
		return nil, way, err
	}
	r.atEnd(func() { lis.Close() }) // again, where a control plane has served
	if err := r.file.publish(r.endpoint); err != nil {
		r.log.Warn("list cannot find this run by itself", "err", err)
	}
	if way, err = openEntrance(p, r.certs, r.endpoint, r.log); err != nil {
		return nil, way, err
	}
	if way.private != nil {
		r.atEnd(func() { way.private.Close() })
	}
	r.entrance = r.certs == nil || way.private != nil
	return lis, way, nil
}

// supervise makes the supervisor, and the registry that knows its components.
func (r *run) supervise(p *Pipeline, ids []string, settings procSettings) (err error) {
	if err := settings.checkReach(p); err != nil {
		return &exitError{exitUsage, err}
	}
	if r.files, err = r.flags.logFiles(ids, r.log); err != nil {
		return &exitError{exitUsage, err}
	}
	if r.files != nil {
		r.atEnd(r.files.close)
	}
	if r.sup, err = newSupervisor(p, settings, r.emit, r.log, r.children); err != nil {
		return &exitError{exitFailed, err}
	}
	r.registry, r.edition = newRegistry(r.flags.ttl, r.flags.interval, r.endpoint, r.sup.members()), r.sup.edition
	return nil
}

// emit is the emitter of all components. It writes the files first, so that what is shown
// is in them.
func (r *run) emit(id, stream string, lines []byte) {
	if r.files != nil {
		r.files.lines(id, stream, lines)
	}
	if r.journal != nil {
		r.journal.lines(id, stream, lines)
	} else {
		r.console.lines(id, stream, lines)
	}
}

// end says what has failed, last of all, and returns an *exitError unless nothing has.
func (r *run) end() error {
	r.screen.dismiss()
	if len(r.sup.failures()) > 0 && r.code == exitOK {
		r.code = exitFailed // found while stopping: a process that survived SIGKILL
	}
	if r.code == exitOK {
		return nil
	}
	switch report := r.report(); {
	case r.journal != nil:
		r.journal.report(report)
	case r.flags.format == formatJSON:
		report.writeJSON(r.stderr)
	default:
		var text bytes.Buffer // a line at a time could be lost by half
		report.writeText(&text)
		_, _ = text.WriteTo(r.stderr)
	}
	return &exitError{code: r.code}
}

// trace tells the control plane of which component a caller is.
func (r *run) trace(conn net.Conn, claim string) origin {
	id, known, hidden := r.sup.componentAt(conn, claim)
	return origin{id, known, hidden}
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
	broken := r.console.broken
	var due time.Time // when there is something to do although nothing happens
	var guestEnded <-chan *os.ProcessState
	if r.guest != nil {
		guestEnded = r.guest.ended
	}
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
		case sig := <-r.screen.events():
			r.screen.signalled(sig)
		case <-r.footerDue(): // a timer of its own: that timer is late is how flowctl knows that it was stopped
		case <-r.registry.wake:
		case e := <-r.sup.exits:
			r.exited(e, time.Now())
		case <-r.sup.guardGone():
			r.sup.guardLost(time.Now())
		case v := <-r.verdicts:
			r.checked(v, time.Now())
		case state := <-guestEnded:
			r.guestEnded(state, time.Now())
		case request := <-r.reloads:
			out, err := r.reload()
			request.answer <- reloadAnswer{out, err}
		case <-broken:
			broken = nil
			r.log.Error("standard output cannot be written, stopping", "err", r.console.err)
			r.blame = fmt.Errorf("standard output cannot be written: %v", r.console.err)
			r.stop(exitFailed, time.Now())
		case <-timer.C:
		}
	}
}

// guestEnded ends the run by the exit code of its command.
func (r *run) guestEnded(state *os.ProcessState, now time.Time) {
	r.guest.over = true
	r.log.Info("command ended", "reason", describeExit(state))
	code := r.guest.code(state)
	if code != exitOK && !r.sup.stopping {
		r.blame = fmt.Errorf("the command %q after -- failed: %s", r.guest.argv[0], describeExit(state))
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
		notify(r.log, daemon.SdNotifyWatchdog)
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
	r.showFooter(now)
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
		var ctx context.Context
		ctx, r.watches[p.ID] = context.WithCancel(context.Background())
		child := p.child
		r.watching.Go(func() { watch(ctx, r.sup, p.Component, child, r.verdicts) })
	case !p.registers():
		r.registry.admit(p.ID, time.Now())
	}
}

// checked takes the verdict of a component's health check in.
func (r *run) checked(v verdict, now time.Time) {
	p := r.sup.byID[v.id]
	if p == nil || p.child != v.child {
		return
	}
	if !p.registers() && p.state == procStarting && v.failing == "" {
		r.registry.admit(p.ID, now)
	}
	r.registry.checked(p.ID, v.failing, now)
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
func (r *run) exited(e exit, now time.Time) {
	id := e.proc.ID
	if e.proc.readyOnceRunning() && e.state.Success() {
		r.checked(verdict{child: e.child, id: id}, now) // it has run, if it was over before that was seen
	}
	r.takeChanges(now)
	if end := r.watches[id]; end != nil {
		end()
		delete(r.watches, id)
	}
	r.sup.exited(e, now)
	cause := ""
	if e.proc.state != procCompleted {
		cause = "its process ended: " + describeExit(e.state)
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
	notify(r.log, daemon.SdNotifyStopping, extendTimeout(r.sup.stopBound()))
}

// extendTimeout asks systemd for patience. The margin is for flowctl's own work, of
// which the longest is to write the last lines of its log to who reads them slowly.
func extendTimeout(d time.Duration) string {
	return fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (d + 10*time.Second).Microseconds())
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
	notify(r.log, daemon.SdNotifyReady)
	if r.flags.until == untilReady {
		r.stop(exitOK, now)
	} else if r.flags.format == formatText && isTerminal(os.Stderr) {
		r.log.Info("in another terminal", r.commands()...)
	}
	if r.guest == nil {
		return
	}
	r.screen.dismiss() // the terminal is the command's now
	if err := r.guest.start(r.sup); err != nil {
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
	if r.flags.showStatus && !r.screen.shows() {
		r.log.Info("status", o.attrs()...)
	}
	states := []string{"STATUS=" + status}
	if at := r.patience(); !r.ready && !r.sup.stopping && at.After(time.Now()) {
		states = append(states, extendTimeout(time.Until(at)))
	}
	notify(r.log, states...)
}

// showFooter gives the screen a new footer, unless the last is too young.
func (r *run) showFooter(now time.Time) {
	if r.screen == nil {
		return
	}
	if r.stale = now.Sub(r.shown) < footerTime; r.stale {
		return
	}
	r.shown = now
	own := r.registry.own(now)
	shown := listPipeline(own)
	for _, c := range own.GetComponents() {
		shown.Components = append(shown.Components, listComponent(c))
	}
	r.screen.show(shown.footerRows(now))
}

// footerDue gets the time when showFooter has something to do although nothing happens.
func (r *run) footerDue() <-chan time.Time {
	wait := uptimeTime
	switch {
	case r.screen == nil:
		return nil
	case r.stale:
		wait = footerTime
	}
	return time.After(time.Until(r.shown.Add(wait)))
}
