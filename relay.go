package main

// Moving events along the inputs of a pipeline, between components of the v1 dialect: which edges there are,
// when the streams of a component are opened, opened again, and ended.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

const (
	minRetry   = 100 * time.Millisecond // before a stream that broke is opened again
	maxRetry   = 5 * time.Second        // the longest pause
	maxAsk     = time.Minute            // the same before it is known whether a component serves events: it may be no server of gRPC
	illTries   = 3                      // tries in a row in vain, and
	illTime    = 2 * time.Second        // so long since the first, after which a component is ill; so long lasts a stream that is no such try
	drainQuiet = time.Second            // without an event, after which the stream of a source that stops is ended

	relayTick = time.Second      // between two looks at rates and at edges that wait
	longWait  = 10 * time.Second // of a writer, after which it is told
)

// streamState is how far the streams of a component are.
type streamState int

const (
	streamAsking  streamState = iota // whether it serves events
	streamOwn                        // it does not: it moves its own data
	streamAlone                      // it has nobody to move events to or from
	streamWaiting                    // for its readers, to be opened for the first time
	streamOpen                       // or broken, and about to be opened again
	streamEnded                      // after its last event
)

func (s streamState) String() string {
	return [...]string{"asking", "own", "alone", "waiting", "open", "ended"}[s]
}

// relayMember is what the relay is told of a component.
type relayMember struct {
	id       string
	role     Role
	endpoint string    // where it serves; "" while it is not registered through flowctl.v1
	since    time.Time // when its process began, by which another one is known; zero where nobody can tell: many clients register again
	wants    []string  // input event types, none for all
	inputs   []string
	comes    bool              // its first process has yet to register
	params   map[string]string // of StreamEvents
}

// eventNode is a component whose events flowctl moves. One goroutine, in run, has its streams.
type eventNode struct {
	relay   *relay
	log     *slog.Logger
	in, out atomic.Pointer[[]*edge] // replaced under relay.mu, never changed
	filled  chan struct{}           // gets a token when an edge to it has an event, or ends
	changed chan struct{}           // gets a token when something has changed that await waits for
	hurry   chan struct{}           // gets a token when a broken stream is not to wait for its pause
	unsent  *event                  // was taken from an edge and has not been sent
	turn    int                     // which edge it came from
	sent    eventCounts             // by it
	leaves  atomic.Bool             // leaving is not staying: next asks for each event

	// relay.mu guards the fields below.
	member  relayMember
	state   streamState
	runs    bool // its goroutine does
	leaving leaving
	stream  context.Context    // of its streams; nil while there are none
	cancel  context.CancelFunc // ends them
	enough  bool               // its readers have had enough
	tried   time.Time          // since when nothing could be moved, zero while it could
	tries   int                // since then
	told    bool               // that nothing can be moved yet
	cause   string             // why it is ill, "" while it is not
	failed  int64              // events that it could not take, as it said
	lost    int64              // events that were in flight when a stream of it broke, at most
}

// eventCounts counts the events that a component has sent.
type eventCounts struct {
	events   atomic.Int64
	bytes    atomic.Int64
	unwanted atomic.Int64 // events of a type that no reader wants
}

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
	state         string // waiting, open or ended
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

// runMetrics is what the components have moved, as the legacy dialect tells of it.
func (r *relay) runMetrics() *flowctlpb.RunMetrics {
	out := &flowctlpb.RunMetrics{ComponentMetrics: make(map[string]*flowctlpb.ComponentMetrics)}
	for _, n := range r.nodeReports() {
		out.ComponentMetrics[n.id] = &flowctlpb.ComponentMetrics{EventsIn: n.in, EventsOut: n.out, BytesIn: n.inBytes, BytesOut: n.outBytes}
		out.EventsProcessed += n.in
		out.BytesProcessed += n.inBytes
	}
	for _, e := range r.reports(time.Now()) {
		out.EventsPerSecond += e.perSecond
	}
	return out
}

func newRelay(maxEvent int, log *slog.Logger) *relay {
	r := &relay{log: log, maxEvent: maxEvent, wake: make(chan struct{}, 1), nodes: make(map[string]*eventNode), windows: windows{most: maxWindows}}
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
	var returned []*eventNode
	for _, m := range members {
		n := before[m.id]
		if n == nil {
			n = r.newNode(m)
		}
		r.nodes[m.id], r.order = n, append(r.order, n)
		if n.member.since != m.since && m.endpoint != "" {
			returned = append(returned, n)
			if n.state == streamOwn {
				n.state = streamAsking // it may be another program
			}
		}
		n.member = m
		wake(n.changed)
	}
	for id, n := range before {
		if r.nodes[id] == nil {
			n.leaving = leavingOut
			wake(n.changed)
			if n.member.role == roleSource && n.cancel != nil {
				n.cancel()
			}
		}
	}
	r.connectLocked()
	for _, n := range returned { // they look at their neighbours
		r.returnedLocked(n)
	}
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
	n.leaves.Store(false)
	wake(n.hurry)
	if n.state == streamEnded {
		n.state = streamOpen // it has been asked, and goes on by its token
		for _, e := range *n.in.Load() {
			e.reopen(r.nodes[e.from].state == streamEnded)
		}
		for _, e := range *n.out.Load() {
			switch to := r.nodes[e.to]; {
			case to.state != streamEnded:
				e.reopen(false)
			case to.leaving == staying:
				e.reopen(false)
				r.returnedLocked(to)
			}
		}
	}
}

// connectLocked makes the edges that the inputs name, between components that have registered through
// flowctl.v1 and do not move their own data. One that exists stays while its component is away.
func (r *relay) connectLocked() {
	before := make(map[[2]string]*edge)
	for _, e := range r.edges {
		before[[2]string{e.from, e.to}] = e
	}
	r.edges = nil
	in, out := make(map[*eventNode][]*edge), make(map[*eventNode][]*edge)
	for _, to := range r.order {
		for _, id := range to.member.inputs {
			from := r.nodes[id]
			if from == nil || from.state == streamOwn || to.state == streamOwn {
				continue
			}
			key := [2]string{id, to.member.id}
			e := before[key]
			if delete(before, key); e == nil {
				if from.member.endpoint == "" || to.member.endpoint == "" {
					continue
				}
				e = &edge{from: id, to: to.member.id, windows: &r.windows, filled: to.filled, room: make(chan struct{}, 1), closed: from.state == streamEnded}
			}
			if to.member.endpoint != "" { // else it is away
				e.want(to.member.wants)
			}
			r.edges, in[to], out[from] = append(r.edges, e), append(in[to], e), append(out[from], e)
		}
	}
	for _, n := range r.order {
		n.in.Store(new(in[n]))
		n.out.Store(new(out[n]))
		wake(n.filled)
	}
	for _, e := range before {
		e.close()
		dropped := e.refuse()
		if to := r.nodes[e.to]; dropped > 0 && (to == nil || to.state != streamOwn) {
			r.log.Warn("events were not delivered: the edge was taken out", "from", e.from, "to", e.to, "events", dropped)
		}
		if from := r.nodes[e.from]; from != nil && len(out[from]) > 0 { // those that are left may have had enough
			r.enoughLocked(from)
		}
	}
}

// startLocked starts the goroutines of those that have edges and none yet, and of the watch over rates.
func (r *relay) startLocked() {
	for _, n := range r.order {
		if len(*n.in.Load())+len(*n.out.Load()) == 0 {
			continue
		}
		if n.state == streamAlone {
			n.state = streamAsking
		}
		if !n.runs && n.state != streamOwn && n.state != streamEnded {
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
		if n.state == streamOwn || n.state == streamAlone {
			own = append(own, n.member.id)
		}
	}
	for _, e := range r.edges {
		moved = append(moved, e.from+" > "+e.to)
	}
	wake(r.wake)
	text := strings.Join(slices.Concat(moved, []string{""}, own), "\n")
	if !known || text == r.told {
		return
	}
	r.told = text
	if len(moved) > 0 {
		r.log.Info("moving events", "edges", enumerate(moved))
	}
	if len(own) > 0 {
		r.log.Info("these components move their own data", "components", enumerate(own))
	}
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
		n.free()
		dropped = 1
	}
	if n.leaving != leavingOut {
		dropped += r.refuseLocked(n)
	}
	if n.lost += int64(dropped); dropped > 0 {
		n.log.Warn("events were not delivered: it has ended", "events", dropped)
	}
	r.tellLocked()
}

// refuseLocked has nothing more sent to n, and returns how many events were on their way.
func (r *relay) refuseLocked(n *eventNode) (dropped int) {
	for _, e := range *n.in.Load() {
		dropped += e.refuse()
		r.enoughLocked(r.nodes[e.from])
	}
	return dropped
}

// enoughLocked ends the stream of n if all that read from it want no more.
func (r *relay) enoughLocked(n *eventNode) {
	if n == nil || slices.ContainsFunc(*n.out.Load(), func(e *edge) bool { return !e.isRefused() }) {
		return
	}
	n.enough = true
	if n.cancel != nil {
		n.cancel()
	}
}

// leave has the streams of a component end, before its process does: what is on its way to it is sent, where
// who it comes from has ended.
func (r *relay) leave(id string, how leaving) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil || n.leaving >= how {
		return
	}
	was := n.leaving
	n.leaving = how
	n.leaves.Store(true)
	if was == staying && n.stream != nil {
		r.drainLocked(n)
	}
	if was == leavingOut && n.state == streamEnded {
		n.lost += int64(r.refuseLocked(n))
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
			before := n.sent.events.Load()
			select {
			case <-time.After(drainQuiet):
			case <-stream.Done():
				return
			}
			waits := slices.ContainsFunc(*n.out.Load(), func(e *edge) bool {
				_, _, waiting := e.counts()
				return !waiting.IsZero()
			})
			if n.sent.events.Load() == before && !waits {
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
		e.perSecond, e.looked = math.Round(float64(events-e.looked)/seconds), events
		if waiting.IsZero() || e.warned == waiting || now.Sub(waiting) < longWait {
			continue
		}
		e.warned = waiting
		r.nodes[e.from].log.Warn("it waits for a reader that takes no events", "reader", e.to, "for", now.Sub(waiting).Round(time.Second))
	}
}

// reports returns how the edges are between components that are known to serve events, in the order of the file.
func (r *relay) reports(now time.Time) (out []edgeReport) {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.edges {
		state := min(r.nodes[e.from].state, r.nodes[e.to].state)
		if state == streamAsking {
			continue // they may move their own data
		}
		events, bytes, waiting := e.counts()
		report := edgeReport{from: e.from, to: e.to, state: state.String(), events: events, bytes: bytes, perSecond: e.perSecond}
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
		report := nodeReport{id: n.member.id, out: n.sent.events.Load(), outBytes: n.sent.bytes.Load(), unmatched: n.sent.unwanted.Load(), failed: n.failed, lost: n.lost}
		for _, e := range *n.in.Load() {
			events, bytes, _ := e.counts()
			report.in, report.inBytes = report.in+events, report.inBytes+bytes
		}
		out = append(out, report)
	}
	return out
}

// run moves the events of n until its streams have ended or ctx does.
func (n *eventNode) run(ctx context.Context) {
	for {
		err := n.session(ctx)
		if ctx.Err() != nil {
			return
		}
		pause, over := n.judge(err, time.Now())
		if over {
			return
		}
		select {
		case <-time.After(pause):
		case <-n.hurry:
		case <-ctx.Done():
			return
		}
	}
}

// errOwn is of a component whose events flowctl does not move, errLeft of one that has ended.
var (
	errOwn  = errors.New("it moves its own data")
	errLeft = errors.New("its process has ended")
)

// session asks n whether it serves events, opens its stream and moves events. It returns nil when n has ended its
// stream or nobody wants more, and else why that broke.
func (n *eventNode) session(ctx context.Context) error {
	member, err := n.registered(ctx)
	if err != nil {
		return err
	}
	conn, err := dialComponent(member.endpoint, member.role)
	if err != nil {
		return err
	}
	defer conn.conn.Close()
	again, err := n.ask(ctx, conn)
	if err == nil {
		err = n.awaitOthers(ctx)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var overdue *time.Timer
	next := func(ctx context.Context) (*event, bool) {
		ev, ok := n.next(ctx)
		if !ok && ctx.Err() == nil {
			overdue = time.AfterFunc(longWait, func() { n.log.Warn("it has got all its events, and does not end its stream", "for", longWait) })
		}
		return ev, ok
	}
	ends := streamEnds{next: next, sent: n.free, deliver: func(ev event) error { return n.deliver(ctx, ev) }, consumed: n.consumed}
	if member.role == roleSource {
		if ends.request, err = conn.request(ctx, member.params, again); err != nil {
			return err
		}
	}
	stream, err := conn.open(ctx, n.relay.maxEvent)
	if err != nil {
		return err
	}
	n.opening(ctx, cancel)
	lasts := time.AfterFunc(illTime, n.works)
	err = conn.move(ctx, stream, ends)
	lasts.Stop()
	if overdue != nil {
		overdue.Stop()
	}
	if n.closing() {
		return nil
	}
	return err
}

// registered waits until n has registered, and returns what it said.
func (n *eventNode) registered(ctx context.Context) (member relayMember, err error) {
	err = n.await(ctx, func() (bool, error) {
		if member = n.member; n.leaving >= leavingOut {
			return false, errLeft
		}
		return member.endpoint != "" && n.leaving != leavingOnce, nil
	})
	return member, err
}

// await waits until ready, which needs relay.mu, is true or fails.
func (n *eventNode) await(ctx context.Context, ready func() (bool, error)) error {
	for {
		n.relay.mu.Lock()
		ok, err := ready()
		n.relay.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-n.changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ask asks n whether it serves events, which fails with errOwn where it does not. again tells that its stream was
// open before.
func (n *eventNode) ask(ctx context.Context, conn *componentConn) (again bool, err error) {
	err = conn.serves(ctx)
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	switch {
	case n.state != streamAsking:
	case status.Code(err) == codes.Unimplemented:
		n.relay.decideLocked(n, streamOwn)
		err = errOwn
	case err == nil:
		n.relay.decideLocked(n, streamWaiting)
	}
	return n.state == streamOpen, err
}

// awaitOthers waits until the streams of all that read from n are open, and until it is known of one that n reads
// from that it serves events. It fails with errOwn where there is nobody to move events to or from.
func (n *eventNode) awaitOthers(ctx context.Context) error {
	return n.await(ctx, func() (bool, error) {
		in, out := *n.in.Load(), *n.out.Load()
		isSource := n.member.role == roleSource
		switch {
		case n.leaving != staying:
			return false, errLeft
		case n.state != streamWaiting:
			return true, nil
		case isSource && len(out) == 0, !isSource && len(in) == 0:
			n.relay.decideLocked(n, streamAlone)
			return false, errOwn
		}
		serves := isSource || slices.ContainsFunc(in, func(e *edge) bool { return n.relay.nodes[e.from].state != streamAsking })
		return serves && !slices.ContainsFunc(out, func(e *edge) bool { return n.relay.nodes[e.to].state < streamOpen }), nil
	})
}

// opening notes that the streams of n are open.
func (n *eventNode) opening(ctx context.Context, cancel context.CancelFunc) {
	r := n.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.state == streamOpen && n.tries <= 1 {
		n.log.Info("its events are moved again")
	}
	n.state, n.stream, n.cancel = streamOpen, ctx, cancel
	if n.leaving != staying {
		r.drainLocked(n)
	}
	if n.enough {
		cancel()
	}
	r.tellLocked()
}

// closing notes that they are not, and tells whether nobody wants more of n.
func (n *eventNode) closing() (enough bool) {
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	n.stream, n.cancel = nil, nil
	wake(n.relay.wake)
	return n.enough
}

// next waits for the next event of the edges to n, which take turns; it stays the next until it was sent. It is false
// when there will be none: all have ended, or n is about to be stopped and those that have not ended are left alone.
func (n *eventNode) next(ctx context.Context) (*event, bool) {
	for n.unsent == nil {
		leaves := n.leaves.Load()
		in, ended := *n.in.Load(), 0
		for range in {
			n.turn = (n.turn + 1) % len(in)
			e := in[n.turn]
			if leaves && !e.isClosed() {
				ended++
				continue
			}
			ev, ok, over := e.take()
			if ok {
				n.unsent = &ev
				return n.unsent, true
			}
			if over {
				ended++
			}
		}
		if ended == len(in) {
			return nil, false
		}
		select {
		case <-n.filled:
		case <-ctx.Done():
			return nil, false
		}
	}
	return n.unsent, true
}

// free takes note that nobody needs the event of next any more: it was sent.
func (n *eventNode) free() {
	n.unsent.Free()
	n.unsent = nil
}

// deliver puts an event of n to all who want it.
func (n *eventNode) deliver(ctx context.Context, ev event) error {
	if len(*n.out.Load()) == 0 {
		if err := n.await(ctx, n.isReadLocked); err != nil {
			return err
		}
	}
	var kind []byte
	known, wanted := false, false
	for _, e := range *n.out.Load() {
		if wants := e.wants.Load(); wants != nil {
			if !known {
				kind, known = ev.kind(), true
			}
			if !(*wants)[string(kind)] {
				continue
			}
		}
		wanted = true
		if err := e.put(ctx, ev); err != nil {
			return err
		}
	}
	n.sent.events.Add(1)
	n.sent.bytes.Add(int64(ev.Len()))
	if !wanted {
		n.sent.unwanted.Add(1)
	}
	return nil
}

// isReadLocked tells whether events of n can go on: who reads them is known, or nobody will. While a reload has one
// reader replaced by another there is none, for a moment.
func (n *eventNode) isReadLocked() (bool, error) {
	out := *n.out.Load()
	comes := func(m *eventNode) bool { return m.member.comes && slices.Contains(m.member.inputs, n.member.id) }
	return len(out) > 0 || n.member.role != roleSource && !slices.ContainsFunc(n.relay.order, comes), nil
}

// consumed takes in what a sink says of the events that it got.
func (n *eventNode) consumed(out *flowctlv1.ConsumeResponse) {
	if out.GetEventsFailed() > 0 {
		n.log.Warn("events failed", "failed", out.GetEventsFailed(), "consumed", out.GetEventsConsumed(), "errors", said(enumerate(out.GetErrors())))
	}
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	n.failed += out.GetEventsFailed()
}

// works notes that a stream of n lasts.
func (n *eventNode) works() {
	n.relay.mu.Lock()
	defer n.relay.mu.Unlock()
	if n.tries, n.tried = 0, (time.Time{}); n.cause != "" {
		n.cause = ""
		wake(n.relay.wake)
	}
}

// judge decides what follows from the end of a session: the pause before the next, or that this was the last.
func (n *eventNode) judge(err error, now time.Time) (pause time.Duration, over bool) {
	r := n.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	broken, isBroken := errors.AsType[*brokenStream](err)
	leaves := n.leaving != staying && n.member.role == roleSource // it is asked to stop, and decides what it still sends
	if isBroken && !leaves {
		n.lost += int64(broken.inFlight)
	}
	switch {
	case errors.Is(err, errOwn):
		n.runs = n.state == streamAsking // another process of it has come
		return 0, !n.runs
	case isBroken && status.Code(err) == codes.Unimplemented && n.tries == 0 && n.sent.events.Load() == 0:
		dropped := broken.inFlight
		if n.unsent != nil {
			n.free()
			dropped++
		}
		for _, e := range *n.in.Load() {
			dropped += e.refuse()
		}
		n.log.Warn("its events are not moved: it answers GetInfo, but its stream by UNIMPLEMENTED", "not_delivered", upTo(dropped), "err", streamError(err))
		n.runs = false
		r.decideLocked(n, streamOwn)
		return 0, true
	case err == nil && n.leaving != leavingOnce, err != nil && n.leaving >= leavingOut:
		if isBroken && broken.inFlight > 0 && !leaves {
			n.log.Warn("its stream broke as it ended", "in_flight", upTo(broken.inFlight), "err", streamError(err))
		}
		r.endLocked(n)
		return 0, true
	case err == nil:
		return 0, false // registered waits for its next process
	}
	if n.tried.IsZero() {
		n.tried = now
	}
	n.tries++
	longest := maxRetry
	if n.state == streamAsking {
		longest = maxAsk
	}
	pause = min(minRetry<<min(n.tries-1, 10), longest)
	switch {
	case isBroken:
		n.log.Warn("its stream broke", "in_flight", upTo(broken.inFlight), "err", streamError(err), "again_in", pause)
	case n.state == streamAsking && now.Sub(n.tried) >= askTimeout && !n.told:
		n.told = true
		n.log.Warn("its events cannot be moved yet", "endpoint", n.member.endpoint, "err", streamError(err))
	}
	if n.state != streamAsking && n.tries >= illTries && now.Sub(n.tried) >= illTime {
		n.cause = "its events cannot be moved: " + streamError(err)
		wake(r.wake)
	}
	return pause, false
}

// upTo says how many events may be lost.
func upTo(events int) string { return fmt.Sprintf("up to %d events", events) }
