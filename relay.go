package main

// Moving events along the inputs of a pipeline, between components of the v1 dialect: which edges there are,
// and how they are. stream.go has the streams, window.go what is on its way.

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	relayTick = time.Second      // between two looks at rates and at edges that wait
	longWait  = 10 * time.Second // of a writer, after which it is told
)

// relay moves events between components that registered through flowctl.v1 and serve them. Its methods may be
// called from any goroutine. It owns the goroutines of its nodes.
type relay struct {
	log      *slog.Logger
	maxEvent int           // bytes
	wake     chan struct{} // gets a token when causes, ended or holds may have changed
	windows  windows
	ctx      context.Context
	end      context.CancelFunc
	done     sync.WaitGroup

	mu      sync.Mutex // guards the fields below, and what the nodes say that it guards
	nodes   map[string]*eventNode
	order   []*eventNode // in the order of the file
	edges   []*edge
	told    string // of which edges are moved, and who moves its own data
	ticking bool
}

// edgeReport is how an edge is.
type edgeReport struct {
	from, to      string
	state         string // asking, waiting, open or ended
	events, bytes int64
	perSecond     float64
	waiting       time.Duration // how long its writer has waited for its reader
}

// nodeReport is what a component has moved.
type nodeReport struct {
	id                string
	in, out           int64 // events
	inBytes, outBytes int64
	unmatched         int64 // of those that it has sent: no reader wanted their type
	failed            int64 // of those that it got, as it said
	lost              int64 // at most: in flight when a stream broke, or not delivered
}

func newRelay(maxEvent int, log *slog.Logger) *relay {
	r := &relay{log: log, maxEvent: maxEvent, wake: make(chan struct{}, 1), nodes: make(map[string]*eventNode)}
	r.ctx, r.end = context.WithCancel(context.Background())
	return r
}

// close ends all streams.
func (r *relay) close() {
	if r == nil {
		return
	}
	r.end()
	r.done.Wait()
}

// update takes over how the components of the pipeline are now, in the order of the file. Those that serve
// events and are connected by inputs get their streams.
func (r *relay) update(members []relayMember) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.nodes
	r.nodes, r.order = make(map[string]*eventNode), nil
	for _, m := range members {
		n := before[m.id]
		if n == nil {
			n = r.newNode(m)
		}
		r.nodes[m.id], r.order = n, append(r.order, n)
		again := n.member.since != m.since && m.endpoint != ""
		if n.member = m; again {
			r.returnedLocked(n)
		}
		wake(n.changed)
	}
	for id, n := range before {
		if r.nodes[id] == nil {
			n.leaving = leavingEver
			wake(n.changed)
		}
	}
	r.connectLocked()
	r.startLocked()
	r.tellLocked()
}

func (r *relay) newNode(m relayMember) *eventNode {
	n := &eventNode{relay: r, log: r.log.With("component", m.id), filled: make(chan struct{}, 1), changed: make(chan struct{}, 1), hurry: make(chan struct{}, 1), member: m}
	n.in.Store(new([]*edge))
	n.out.Store(new([]*edge))
	return n
}

// returnedLocked has a new process of n go on, also where the streams of n have ended.
func (r *relay) returnedLocked(n *eventNode) {
	n.leaving, n.enough, n.tries, n.tried, n.cause = staying, false, 0, time.Time{}, ""
	wake(n.hurry)
	if n.state == streamEnded {
		n.state, n.runs = streamOpen, false // it has been asked, and goes on by its token
		for _, e := range slices.Concat(*n.in.Load(), *n.out.Load()) {
			e.reopen(e.from.state == streamEnded)
		}
		for _, e := range *n.out.Load() {
			if e.to.state == streamEnded && e.to.leaving == staying {
				r.returnedLocked(e.to)
			}
		}
	}
}

// connectLocked makes the edges that the inputs name, between components that have registered through
// flowctl.v1 and do not move their own data. One that exists stays while its component is away.
func (r *relay) connectLocked() {
	before := make(map[[2]string]*edge)
	for _, e := range r.edges {
		before[[2]string{e.from.member.id, e.to.member.id}] = e
	}
	r.edges = nil
	in, out := make(map[*eventNode][]*edge), make(map[*eventNode][]*edge)
	for _, to := range r.order {
		for _, id := range to.member.inputs {
			from := r.nodes[id]
			if from == nil || from.state == streamOwn || to.state == streamOwn {
				continue
			}
			e := before[[2]string{id, to.member.id}]
			if e == nil || e.from != from || e.to != to {
				if from.member.endpoint == "" || to.member.endpoint == "" {
					continue
				}
				e = &edge{from: from, to: to, windows: &r.windows, room: make(chan struct{}, 1)}
			}
			e.want(to.member.wants)
			r.edges, in[to], out[from] = append(r.edges, e), append(in[to], e), append(out[from], e)
		}
	}
	for _, e := range before {
		if !slices.Contains(r.edges, e) {
			e.close()
			e.refuse()
		}
	}
	for _, n := range r.order {
		n.in.Store(new(in[n]))
		n.out.Store(new(out[n]))
		wake(n.filled)
	}
}

// startLocked starts the goroutines of those that have edges and none yet, and of the watch over rates.
func (r *relay) startLocked() {
	for _, n := range r.order {
		if !n.runs && n.state != streamOwn && n.state != streamEnded && len(*n.in.Load())+len(*n.out.Load()) > 0 {
			n.runs = true
			r.done.Go(func() { n.run(r.ctx) })
		}
	}
	if !r.ticking && len(r.edges) > 0 {
		r.ticking = true
		r.done.Go(r.tick)
	}
}

// decideLocked takes in whether n serves events.
func (r *relay) decideLocked(n *eventNode, state streamState) {
	if n.state = state; state == streamOwn {
		r.connectLocked()
	}
	r.tellLocked()
}

// tellLocked has everybody look at how the others are. It says which edges are moved, once that is known of all.
func (r *relay) tellLocked() {
	known := true
	var own, moved []string
	for _, n := range r.order {
		wake(n.changed)
		known = known && !(n.runs && n.state == streamAsking)
		if n.state == streamOwn {
			own = append(own, n.member.id)
		}
	}
	for _, e := range r.edges {
		moved = append(moved, e.from.member.id+" > "+e.to.member.id)
	}
	wake(r.wake)
	text := strings.Join(slices.Concat(moved, []string{""}, own), "\n")
	if !known || text == r.told {
		return
	}
	r.told = text
	r.log.Info("events", "moved", cmp.Or(enumerate(moved), "-"), "moved_by_themselves", cmp.Or(enumerate(own), "-"))
}

// endLocked has the streams of n ended for good: who reads from it gets the rest, and who is read by it alone
// has nobody to send to.
func (r *relay) endLocked(n *eventNode) {
	n.state, n.runs, n.cause = streamEnded, false, ""
	for _, e := range *n.out.Load() {
		e.close()
	}
	dropped := 0
	if n.unsent != nil {
		n.unsent, dropped = nil, 1
	}
	for _, e := range *n.in.Load() {
		dropped += e.refuse()
		r.enoughLocked(e.from)
	}
	if n.lost += int64(dropped); dropped > 0 {
		n.log.Warn("events were not delivered: it has ended", "events", dropped)
	}
	r.tellLocked()
}

// enoughLocked ends the stream of n if all that read from it want no more.
func (r *relay) enoughLocked(n *eventNode) {
	if slices.ContainsFunc(*n.out.Load(), func(e *edge) bool { return !e.isRefused() }) {
		return
	}
	n.enough = true
	if n.cancel != nil {
		n.cancel()
	}
}

// leave has the streams of a component end, before its process does: what is on its way to it is sent, where
// who it comes from has ended. With again another process takes its place.
func (r *relay) leave(id string, again bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil || n.leaving == leavingEver {
		return
	}
	was := n.leaving
	if n.leaving = leavingEver; again {
		n.leaving = leavingOnce
	}
	if was == staying && n.stream != nil {
		r.drainLocked(n)
	}
	wake(n.changed)
	wake(n.hurry)
	wake(n.filled)
}

// drainLocked ends the stream of a source that stops once it has sent nothing for drainQuiet: some servers end
// only when their clients do. Those of others end by themselves, after their last event.
func (r *relay) drainLocked(n *eventNode) {
	if n.member.role != roleSource {
		return
	}
	stream, cancel := n.stream, n.cancel
	r.done.Go(func() {
		for {
			before := n.received.Load()
			select {
			case <-time.After(drainQuiet):
			case <-stream.Done():
				return
			}
			waits := slices.ContainsFunc(*n.out.Load(), func(e *edge) bool {
				_, _, waiting := e.counts()
				return !waiting.IsZero()
			})
			if n.received.Load() == before && !waits {
				r.mu.Lock()
				n.enough = n.stream == stream // nothing is on its way, so this is no break
				r.mu.Unlock()
				cancel()
				return
			}
		}
	})
}

// holds tells whether a component has open streams, so that it should not end yet.
func (r *relay) holds(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	return n != nil && n.stream != nil
}

// ended tells whether all events of a component have been moved.
func (r *relay) ended(id string) bool {
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	return n != nil && n.state == streamEnded
}

// cause says why the events of a component cannot be moved, "" where they can.
func (r *relay) cause(id string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[id]; n != nil {
		return n.cause
	}
	return ""
}

// tick looks at rates, and tells of writers that wait for long.
func (r *relay) tick() {
	ticker := time.NewTicker(relayTick)
	defer ticker.Stop()
	last := time.Now()
	for {
		select {
		case now := <-ticker.C:
			r.look(now, now.Sub(last).Seconds())
			last = now
		case <-r.ctx.Done():
			return
		}
	}
}

// look takes the rates of the last seconds.
func (r *relay) look(now time.Time, seconds float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.edges {
		events, _, waiting := e.counts()
		e.perSecond, e.looked = float64(events-e.looked)/seconds, events
		if waiting.IsZero() || e.warned == waiting || now.Sub(waiting) < longWait {
			continue
		}
		e.warned = waiting
		e.from.log.Warn("it waits for a reader that takes no events", "reader", e.to.member.id, "for", now.Sub(waiting).Round(time.Second))
	}
}

// reports returns how the edges are, in the order of the file.
func (r *relay) reports(now time.Time) (out []edgeReport) {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.edges {
		events, bytes, waiting := e.counts()
		report := edgeReport{from: e.from.member.id, to: e.to.member.id, state: min(e.from.state, e.to.state).String(), events: events, bytes: bytes, perSecond: e.perSecond}
		if !waiting.IsZero() {
			report.waiting = now.Sub(waiting)
		}
		out = append(out, report)
	}
	return out
}

// nodeReports returns what each component has moved, in the order of the file.
func (r *relay) nodeReports() (out []nodeReport) {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.order {
		if n.state < streamWaiting {
			continue
		}
		report := nodeReport{id: n.member.id, out: n.received.Load(), outBytes: n.bytes.Load(), unmatched: n.unwanted.Load(), failed: n.failed, lost: n.lost}
		for _, e := range *n.in.Load() {
			events, bytes, _ := e.counts()
			report.in, report.inBytes = report.in+events, report.inBytes+bytes
		}
		out = append(out, report)
	}
	return out
}
