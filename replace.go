package main

// What a reload or a restart does to components: they retire, and what replaces them starts.

import (
	"fmt"
	"reflect"
	"slices"
	"time"
)

// reloaded is what a reload changes, by id.
type reloaded struct {
	added, removed, restarted []string
	unchanged                 int
}

// reload begins to turn the components into those of next: what is gone or has changed is stopped, then
// what is new or has changed starts, and so does what has failed; the rest is left alone. A reload that
// comes before the last one is finished adds to it. envFiles are the digests of what the env_files of
// next hold, by path.
func (s *supervisor) reload(next *Pipeline, envFiles map[string]digest) reloaded {
	var out reloaded
	listed := make(map[string]bool)
	for _, c := range next.components() {
		listed[c.ID] = true
		switch p := s.byID[c.ID]; {
		case p == nil:
			out.added = append(out.added, c.ID)
			s.procs = append(s.procs, s.bring(c))
		case !p.retiring && p.state != procFailed && reflect.DeepEqual(p.component, c) && p.hasEnvFiles(envFiles):
			out.unchanged++
		case p.mayStay() && reflect.DeepEqual(p.component, c) && p.hasEnvFiles(envFiles):
			out.unchanged++
			p.retiring, p.replacement = false, nil
			if p.wasReady = p.state == procReady; !p.wasReady {
				p.deadline = p.readyBy
			}
		default:
			out.restarted = append(out.restarted, c.ID)
			s.retire(p, c)
		}
	}
	for _, p := range s.procs {
		if !listed[p.id()] {
			out.removed = append(out.removed, p.id())
			s.retire(p, nil)
		}
	}
	s.loaded, s.pending = next, next
	return out
}

// bring makes the proc of c, which a reload or restart has brought.
func (s *supervisor) bring(c *Component) *proc {
	p := s.newProc(c)
	p.brought = true
	return p
}

// hasEnvFiles tells whether the env_files of p hold what its last process was started with.
func (p *proc) hasEnvFiles(now map[string]digest) bool {
	if p.last == nil {
		return true
	}
	for _, path := range p.component.EnvFiles {
		if p.last.envFiles[path] != now[path] {
			return false
		}
	}
	return true
}

// restart has the component id stopped and then replaced by itself, also one that is over. It fails,
// and changes nothing, for an id that the loaded file does not have, and for a process that cannot be ended.
func (s *supervisor) restart(id string) error {
	if err := s.mayRestart(id); err != nil {
		return err
	}
	p := s.byID[id]
	p.failure = nil
	if !p.retiring {
		s.retire(p, p.component)
	}
	s.pending = s.loaded
	return nil
}

// mayRestart fails where restart would.
func (s *supervisor) mayRestart(id string) error {
	p := s.byID[id]
	switch {
	case p == nil || p.retiring && p.replacement == nil:
		return &unknownError{id, s.loaded.ids()}
	case p.failure != nil && p.failure.kind == failStuck && p.child != nil:
		return fmt.Errorf("component %s cannot be restarted: %s", id, p.failure.reason)
	}
	return nil
}

// mayStay tells whether p, which another reload has stopped and taken out, can be left as it is: it was not
// told yet.
func (p *proc) mayStay() bool {
	told := !p.stopSent.IsZero() || p.state == procReady && !p.deadline.IsZero()
	return p.retiring && p.runs() && !told && p.failure == nil && p.replacement != p.component
}

// retire has p stopped and then replaced, by nothing if replacement is nil.
func (s *supervisor) retire(p *proc, replacement *Component) {
	p.retiring, p.replacement = true, replacement
	p.wasReady, p.unhealthySince = false, time.Time{}
	s.cancelStart(p)
}

// advanceReload stops those that retire, in the order of a stop, and replaces those that have ended.
// It returns the ids of which no component is left.
func (s *supervisor) advanceReload(now time.Time) (gone []string) {
	if s.pending == nil || s.stopping {
		return nil
	}
	for _, p := range s.procs {
		if p.retiring {
			s.stopInTurn(p, now)
		}
	}
	return s.finishRetiring()
}

// finishRetiring replaces those that retire, once all of them have ended. It returns the ids of which no
// component is left.
func (s *supervisor) finishRetiring() (gone []string) {
	if len(s.failures()) > 0 || slices.ContainsFunc(s.procs, func(p *proc) bool { return p.retiring && !p.over() }) {
		return nil
	}
	for i, p := range s.procs {
		if !p.retiring {
			continue
		}
		delete(s.byID, p.id())
		s.generation++
		if s.procs[i] = nil; p.replacement != nil {
			s.procs[i] = s.bring(p.replacement)
			s.procs[i].renewed = true
		} else {
			gone = append(gone, p.id())
		}
	}
	s.procs = slices.DeleteFunc(s.procs, func(p *proc) bool { return p == nil })
	s.before = stopOrder(s.pending.components())
	order := make(map[string]int)
	for i, c := range s.pending.components() {
		order[c.ID] = i
	}
	slices.SortFunc(s.procs, func(a, b *proc) int { return order[a.id()] - order[b.id()] })
	s.pending = nil
	return gone
}
