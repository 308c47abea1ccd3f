package main

// The control plane alone: what it opens, and its loop without a run.

import (
	"log/slog"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// serverConfig says how a control plane runs alone.
type serverConfig struct {
	planeFlags
	version string // of flowctl
	state   stateConfig
	records string // the folder with the record of runs, "" for none
}

// runServer runs a control plane alone until a signal. It returns an *exitError where it cannot start.
func runServer(o serverConfig) error {
	out := openOutputs(outputConfig{format: o.format, level: o.logLevel})
	defer out.close()
	log := out.log
	systemd := newNotifier(log)
	defer systemd.close()
	signals := catchSignals()
	certs, err := openCertificates(o.tls, log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	listeners, held, err := openPlane(o.listen, o.tls, log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	defer closeAll(listeners) // once more, if a control plane has served them
	endpoint := listeners[0].endpoint
	// Another control plane may run with the same name at another address.
	file, err := claimRun(runInfo{Endpoint: endpoint, TLS: certs != nil})
	if err != nil {
		log.Warn("list cannot find this control plane by itself", "err", err)
	}
	defer file.release()
	st, err := openStore(o.state, "", log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	alone := pipelineInfo{version: o.version, started: time.Now(), status: "control plane alone", ready: true}
	plane, err := newPlane(planeConfig{
		listeners: listeners, held: held, ttl: o.ttl, interval: o.interval, forget: o.forget, store: st, certs: certs, runFile: file, identifier: newIdentifier(nil, log), records: o.records, log: log,
		pipeline: alone,
	})
	if err != nil {
		st.close()
		return &exitError{code: exitPlane, err: err}
	}
	defer plane.stop()
	systemd.send(daemon.SdNotifyReady, "STATUS=listening on "+endpoint)
	watchAlone(plane, alone, signals, systemd, log)
	return nil
}

// watchAlone is the loop of a control plane alone, which alone describes, until a signal asks for the end.
func watchAlone(plane *plane, alone pipelineInfo, signals <-chan os.Signal, systemd *notifier, log *slog.Logger) {
	registry, feed, changed := plane.registry, watchdogTicks(log), changeLog{log: log, most: serverLines}
	for {
		var due <-chan time.Time
		if at := changed.due(); !at.IsZero() {
			due = time.After(time.Until(at))
		}
		select {
		case <-registry.wake:
			now := time.Now()
			for _, c := range registry.changes(now) {
				changed.add(c, now)
			}
		case <-plane.certs.expiryTold():
			info, more := alone, ""
			if expiry := plane.certs.expiryText(); expiry != "" {
				more = "; the certificate " + expiry
			}
			info.status += more
			registry.publishPipeline(info)
			systemd.send("STATUS=listening on " + registry.endpoint + more)
		case now := <-due:
			changed.flush(now)
		case now := <-feed:
			registry.condition("", now) // if the registry hangs, so does this, and systemd hears no more
			systemd.send(daemon.SdNotifyWatchdog)
		case sig := <-signals:
			if asksReload(sig) {
				continue // it has no file to reload
			}
			log.Info("stopping", "signal", sig.String())
			systemd.send(daemon.SdNotifyStopping)
			return
		}
	}
}
