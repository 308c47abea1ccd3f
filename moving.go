package main

// Where the events that flowctl moves meet the components of a run: which of them serve events, and what becomes
// of those whose events cannot be moved.

import (
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"time"
)

// moving tells the relay of the components of a run. The loop calls its methods. nil moves nothing.
type moving struct {
	relay      *relay
	sup        *supervisor
	registry   *registry
	generation int  // of sup's components, that the registry knows
	begun      bool // all components have been ready
}

// update tells the relay how components are now, once all have been ready.
func (m *moving) update() {
	if m == nil || !m.begun {
		return
	}
	var members []relayMember
	if m.sup.loaded.Spec.Relay != relayOff {
		served := m.registry.served()
		for _, p := range m.sup.procs {
			c := p.component
			if c.Role == roleService {
				continue
			}
			member := c.relayMember(served[c.ID])
			if member.comes = c.registers() && !p.over() && !p.health.registered; member.endpoint != "" {
				member.since = p.started
			}
			members = append(members, member)
		}
	}
	m.relay.update(members)
}

// take takes in what has happened to streams, and tells the relay of components that have ended for good.
func (m *moving) take(now time.Time) {
	if m == nil {
		return
	}
	for _, p := range m.sup.procs {
		m.registry.moved(p.id(), m.relay.cause(p.id()), now)
		m.leave(p)
	}
}

// leave tells the relay of p if it has ended for good.
func (m *moving) leave(p *proc) {
	if p.isGone() || p.over() && m.sup.stopping {
		m.relay.leave(p.id(), m.sup.leaving(p))
	}
}

// relayMember is what the relay is told of c, which serves so.
func (c *Component) relayMember(at served) relayMember {
	m := relayMember{id: c.ID, role: c.Role, endpoint: at.endpoint, wants: at.wants, inputs: c.Inputs}
	if c.Role == roleSource {
		m.params = c.streamParams()
	}
	return m
}

// streamParams returns what a source is asked to stream: what the predecessor passed of its environment, and
// stream_params, which win.
func (c *Component) streamParams() map[string]string {
	params := make(map[string]string)
	for _, name := range []string{"START_LEDGER", "END_LEDGER"} {
		if value := fileEnv(c, name); value != "" {
			params[strings.ToLower(name)] = value
		}
	}
	maps.Copy(params, c.StreamParams)
	return params
}

// rates says how many events a second each component gets and sends, nil where flowctl moves none.
func (m *moving) rates() map[string]string {
	in, out := make(map[string]float64), make(map[string]float64)
	for _, e := range m.relay.reports(time.Time{}) {
		in[e.to] += e.perSecond
		out[e.from] = max(out[e.from], e.perSecond) // of several readers: what it sends comes to each
	}
	if len(in) == 0 {
		return nil
	}
	rates := make(map[string]string)
	for _, p := range m.sup.procs {
		var parts []string
		if rate, reads := in[p.id()]; reads {
			parts = append(parts, fmt.Sprintf("%.0f in", rate))
		}
		if rate, sends := out[p.id()]; sends {
			parts = append(parts, fmt.Sprintf("%.0f out", rate))
		}
		rates[p.id()] = strings.Join(parts, ", ")
	}
	return rates
}

// tell logs what each component has moved, and returns how many events failed.
func (m *moving) tell(log *slog.Logger) (failed int64) {
	for _, n := range m.relay.nodeReports() {
		attrs := []any{"component", n.id, "in", n.in, "out", n.out}
		if n.unmatched > 0 {
			attrs = append(attrs, "unmatched", n.unmatched)
		}
		if n.failed > 0 {
			attrs = append(attrs, "failed", n.failed)
		}
		if n.lost > 0 {
			attrs = append(attrs, "lost_at_most", n.lost)
		}
		log.Info("moved", attrs...)
		failed += n.failed
	}
	return failed
}
