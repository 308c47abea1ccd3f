package main

// A control plane whose components something else starts, or that has no pipeline: what it opens, and its loop.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// serverConfig says how a control plane runs without processes.
type serverConfig struct {
	planeFlags
	version  string    // of flowctl
	pipeline *Pipeline // nil for none
	maxEvent int       // bytes of one event that is moved
	state    stateConfig
	records  string // the folder with the record of runs, "" for none
}

// server is a control plane without processes. Its loop owns it.
type server struct {
	pipeline *Pipeline    // nil for none
	info     pipelineInfo // what is shown of it as a whole
	plane    *plane
	relay    *relay // nil without a pipeline
	systemd  *notifier
	log      *slog.Logger
}

// runServer runs a control plane until a signal. It returns an *exitError where it cannot start.
func runServer(o serverConfig) error {
	s := &server{pipeline: o.pipeline, info: pipelineInfo{version: o.version, started: time.Now(), status: "control plane alone", ready: true}}
	if p := o.pipeline; p != nil {
		s.info.name, s.info.file, s.info.ready, s.info.status = p.Metadata.Name, p.Text, false, "starting"
	}
	out := openOutputs(outputConfig{pipeline: s.info.name, format: o.format, level: o.logLevel})
	defer out.close()
	s.log = out.log
	s.systemd = newNotifier(s.log)
	defer s.systemd.close()
	signals := catchSignals()
	certs, err := openCertificates(o.tls, s.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	listeners, held, err := openPlane(o.listen, o.tls, s.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	defer closeAll(listeners) // once more, if a control plane has served them
	// Another one without a pipeline may run at another address.
	file, err := claimRun(runInfo{Pipeline: s.info.name, Endpoint: listeners[0].endpoint, TLS: certs != nil})
	if _, running := errors.AsType[*runningError](err); running && s.pipeline != nil {
		return &exitError{exitPlane, err, "flowctl list"}
	} else if err != nil {
		s.log.Warn("list cannot find this control plane by itself", "err", err)
	}
	defer file.release()
	st, err := openStore(o.state, s.info.name, s.log)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	if s.pipeline != nil {
		s.relay = newRelay(o.maxEvent, s.log)
		defer s.relay.close()
	}
	s.plane, err = newPlane(planeConfig{
		listeners: listeners, advertise: o.advertise, requireIdentity: o.requireIdentity, held: held, ttl: o.ttl, interval: o.interval, forget: o.forget, members: s.members(), pipeline: s.info, relay: s.relay,
		store: st, certs: certs, runFile: file, identifier: newIdentifier(nil, s.log), records: o.records, log: s.log,
	})
	if err != nil {
		st.close()
		return &exitError{code: exitPlane, err: err}
	}
	defer s.plane.stop()
	s.systemd.send(daemon.SdNotifyReady, "STATUS=listening on "+listeners[0].endpoint)
	s.loop(signals)
	return nil
}

// components returns those of the pipeline that can be known to be ready: of a oneshot nobody tells how it has ended.
func (s *server) components() (all []*Component) {
	if s.pipeline == nil {
		return nil
	}
	for _, c := range s.pipeline.components() {
		if !c.Oneshot {
			all = append(all, c)
		}
	}
	return all
}

// members returns what the control plane has to know of the components.
func (s *server) members() (out []member) {
	for _, c := range s.components() {
		out = append(out, member{
			id: c.ID, role: c.Role, healthPort: fileEnv(c, "HEALTH_PORT"), inputs: c.Inputs,
			inputEvents: c.InputEventTypes, outputEvents: c.OutputEventTypes, kind: c.Type, labels: c.Labels, elsewhere: true,
		})
	}
	return out
}

// loop runs until a signal asks for the end.
func (s *server) loop(signals <-chan os.Signal) {
	registry, feed, changed := s.plane.registry, watchdogTicks(s.log), changeLog{log: s.log, most: serverLines}
	var moved <-chan struct{}
	if s.relay != nil {
		moved = s.relay.wake
	}
	for s.showStatus(time.Now()); ; s.showStatus(time.Now()) {
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
			s.move()
		case <-moved:
			for _, c := range s.components() {
				registry.moved(c.ID, s.relay.cause(c.ID), time.Now())
			}
		case <-s.plane.certs.expiryTold():
		case now := <-due:
			changed.flush(now)
		case now := <-feed:
			registry.condition("", now) // if the registry hangs, so does this, and systemd hears no more
			s.systemd.send(daemon.SdNotifyWatchdog)
		case sig := <-signals:
			if asksReload(sig) {
				continue // who changes the file restarts it
			}
			s.log.Info("stopping", "signal", sig.String())
			s.systemd.send(daemon.SdNotifyStopping)
			return
		}
	}
}

// showStatus tells people and systemd how all are, if that has changed.
func (s *server) showStatus(now time.Time) {
	expiry, endpoint := s.plane.certs.expiryText(), s.plane.registry.endpoint
	status, forSystemd := "control plane alone", "listening on "+endpoint
	if expiry != "" {
		status, forSystemd = status+"; the certificate "+expiry, forSystemd+"; the certificate "+expiry
	}
	if s.pipeline != nil {
		o := s.overview(expiry, now)
		status, forSystemd = o.String(), o.String()
		s.plane.tellReady(o.ready == o.total)
		if status != s.info.status {
			s.log.Info("status", o.attrs()...)
		}
		if o.ready == o.total && !s.info.ready {
			s.info.ready = true
			s.log.Info("pipeline ready", "components", o.total, "endpoint", endpoint, "after", now.Sub(s.info.started).Round(time.Millisecond))
			s.move()
		}
	}
	if status != s.info.status {
		s.info.status = status
		s.systemd.send("STATUS=" + forSystemd)
	}
	s.plane.registry.publishPipeline(s.info)
}

// overview sums up how the components are now.
func (s *server) overview(certificate string, now time.Time) overview {
	o, registry := overview{certificate: certificate}, s.plane.registry
	_ = registry.each(context.Background(), now, func(c *service, now time.Time) bool { // which fails only with its context
		if c.member == nil {
			return false // those of the pipeline come first
		}
		o.total++
		switch h := registry.healthLocked(c, now); {
		case h.condition.ok():
			o.ready++
		case h.condition == unregistered:
			o.waiting = append(o.waiting, c.key())
		default:
			o.unhealthy = append(o.unhealthy, fmt.Sprintf("%s (%s)", c.key(), registry.cause(h, now)))
		}
		return true
	})
	return o
}

// move tells the relay how components are now, once all have been ready.
func (s *server) move() {
	if s.pipeline == nil || !s.info.ready || s.pipeline.Spec.Relay == relayOff {
		return
	}
	var members []relayMember
	served := s.plane.registry.served()
	for _, c := range s.components() {
		if c.Role != roleService {
			members = append(members, c.relayMember(served[c.ID]))
		}
	}
	s.relay.update(members)
}
