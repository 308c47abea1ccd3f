package main

import (
	"context"
	"errors"
	"iter"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// after returns some of the services that have changed since w was last told, the
// first to change first, and the records that were removed; w is then told. It is
// false where removals have been forgotten.
func (f *feed) after(w *follower) (changed []*service, removed []int64, ok bool) {
	if w.revision < f.lost {
		return nil, nil, false
	}
	told, last := w.revision, &w.mark
	for s := f.recent.next(&w.mark); s != nil && len(changed) < batch; s = f.recent.next(s) {
		if s.record != followerMark {
			changed = append(changed, s)
			w.revision = s.revision
		}
		last = s
	}
	if last == f.recent.back() {
		w.revision = f.revision
	}
	if last != &w.mark {
		f.recent.insert(&w.mark, last)
	}
	for i := len(f.removed) - 1; i >= 0 && f.removed[i].revision > told; i-- {
		if f.removed[i].revision <= w.revision {
			removed = append(removed, int64(f.removed[i].record))
		}
	}
	return changed, removed, true
}

// operatorServer speaks flowctl.operator.v1.
type operatorServer struct {
	operatorv1.UnimplementedOperatorServer
	*registry
	ended    <-chan struct{} // closed when the control plane stops
	requests runRequests     // nil for a control plane alone
}

// runRequests is what the operator service may ask of the run.
type runRequests interface {
	// requestReload has the run take over its pipeline file as it is now. It fails, and
	// changes nothing, for a wrong file, and with errStopping once the run stops.
	requestReload(ctx context.Context) (reloadResult, error)
}

// reloadResult is what a reload has changed, by id.
type reloadResult struct {
	added, removed, restarted []string
	unchanged                 int
}

var errStopping = errors.New("the pipeline is stopping")

func (o operatorServer) GetPipeline(ctx context.Context, _ *operatorv1.GetPipelineRequest) (*operatorv1.Pipeline, error) {
	o.mu.Lock()
	out := o.pipelineLocked()
	o.mu.Unlock()
	err := o.list(ctx, func(s *service, now time.Time) bool {
		out.Components = append(out.Components, o.componentLocked(s, now))
		return true
	})
	return out, err
}

func (o operatorServer) Reload(ctx context.Context, _ *operatorv1.ReloadRequest) (*operatorv1.ReloadResponse, error) {
	if o.requests == nil {
		return nil, status.Error(codes.Unimplemented, "a control plane alone has no pipeline file")
	}
	out, err := o.requests.requestReload(ctx)
	switch {
	case errors.Is(err, errStopping):
		return nil, status.Error(codes.Unavailable, err.Error())
	case err != nil:
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &operatorv1.ReloadResponse{Added: out.added, Removed: out.removed, Restarted: out.restarted, Unchanged: int64(out.unchanged)}, nil
}

func (r *registry) pipelineLocked() *operatorv1.Pipeline {
	a := &r.feed.info
	out := &operatorv1.Pipeline{
		Name: a.name, Version: a.version, Pid: int64(os.Getpid()), Started: timestamppb.New(a.started),
		Endpoint: r.endpoint, Status: a.status, Ready: a.ready, StateFile: r.stateFile,
	}
	if r.journal.broken != nil {
		out.NotDurable = r.journal.broken.Error()
	}
	return out
}

// own is the pipeline with its own components.
func (r *registry) own(now time.Time) *operatorv1.Pipeline {
	r.mu.Lock()
	out := r.pipelineLocked()
	members := slices.Clone(r.all[:r.members])
	r.mu.Unlock()
	for components := range r.components(members, time.Time{}, now) {
		out.Components = append(out.Components, components...)
	}
	return out
}

// components gives what those of all have to show that were heard of after since, in
// parts that fit a message, and without those that are gone.
func (r *registry) components(all []*service, since, now time.Time) iter.Seq[[]*operatorv1.Component] {
	return func(yield func([]*operatorv1.Component) bool) {
		for len(all) > 0 {
			var part []*operatorv1.Component
			for size := 0; len(all) > 0 && len(part) < batch && size < maxPart; {
				now, n := r.lockAt(now), 0
				for ; n < min(batch, len(all)) && len(part) < batch && size < maxPart; n++ {
					if s := all[n]; (s.registered || s.member != nil) && (since.IsZero() || s.lastSeen.After(since)) {
						part = append(part, r.componentLocked(s, now))
						size += int(s.size)
					}
				}
				r.mu.Unlock()
				all = all[n:]
			}
			if len(part) > 0 && !yield(part) {
				return
			}
		}
	}
}

func (r *registry) componentLocked(s *service, now time.Time) *operatorv1.Component {
	c, cause := r.conditionLocked(s, now)
	w := s.details()
	out := &operatorv1.Component{
		Record: int64(s.record), Id: s.key(), InPipeline: s.member != nil, Type: typeName(s.kind),
		Name: w.name, Description: w.description, Version: w.version,
		InputEventTypes: w.inputEvents, OutputEventTypes: w.outputEvents,
		Endpoint: w.endpoint, Metadata: w.labels.toMap(),
		Health: c.String(), Cause: cause, Declared: statusName(s.declared),
	}
	if w.id != out.Id {
		out.ServiceId = w.id
	}
	if s.registered {
		out.RegisteredAt, out.LastSeen = timestamppb.New(s.since), timestamppb.New(s.lastSeen)
	}
	if s.member != nil {
		out.TypeInFile, out.Labels = s.member.kind, s.member.labels
	}
	for name, m := range s.metrics.all() {
		if f, ok := m.float(); ok {
			if out.Metrics == nil {
				out.Metrics = make(map[string]float64)
			}
			out.Metrics[name] = f
			continue
		}
		if out.TextMetrics == nil {
			out.TextMetrics = make(map[string]string)
		}
		out.TextMetrics[name] = m.text
	}
	for h := range s.history() {
		out.History = append(out.History, &operatorv1.Change{Time: timestamppb.New(h.at), Health: h.now.String(), Cause: h.cause})
	}
	if s.member != nil && s.member.process != nil {
		p := s.member.process
		out.Process = &operatorv1.Process{State: p.state, Pid: int64(p.pid), Restarts: int64(p.restarts)}
		if !p.started.IsZero() {
			out.Process.Started = timestamppb.New(p.started)
		}
	}
	return out
}

// Watch holds at most one message for each stream, and what a slow reader misses is
// not kept: it gets the services that have changed as they are when it gets to them.
func (o operatorServer) Watch(in *operatorv1.WatchRequest, stream grpc.ServerStreamingServer[operatorv1.WatchResponse]) error {
	w := &follower{registry: o.registry, send: stream.Send, pause: toldPause, follows: in.GetFollow()}
	if err := w.join(); err != nil {
		return err
	}
	defer w.leave()
	if err := w.snapshot(); err != nil || !in.GetFollow() {
		return err
	}
	var beat <-chan time.Time
	if in.GetHeartbeats() {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		beat = ticker.C
	}
	for {
		news, err := w.catchUp()
		if err != nil {
			return err
		}
		select {
		case <-news:
		case now := <-beat:
			if err := w.heard(now); err != nil {
				return err
			}
		case <-o.ended:
			return nil
		case <-stream.Context().Done():
			return nil
		}
	}
}

// followerMark is the record of what is no service but a follower's mark.
const followerMark = -1

// follower is one stream of changes.
type follower struct {
	*registry
	send     func(*operatorv1.WatchResponse) error
	pause    time.Duration // between messages, where there are many
	follows  bool          // after the first snapshot
	revision uint64        // what it has told of
	mark     service       // stands in feed.recent behind that, and for no service
	beat     time.Time     // when heartbeats were told last
}

// join fails with RESOURCE_EXHAUSTED where there are as many as there can be. Those who
// want no more than a snapshot are not kept out by others who go on.
func (w *follower) join() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	count := &w.feed.snapshots
	if w.follows {
		count = &w.feed.followers
	}
	if *count >= maxFollowers {
		return status.Errorf(codes.ResourceExhausted, "%d streams are open, the most that there can be", maxFollowers)
	}
	*count++
	return nil
}

// leave ends the part of w in the feed.
func (w *follower) leave() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.follows {
		w.feed.followers--
	} else {
		w.feed.snapshots--
	}
	w.feed.recent.remove(&w.mark)
	w.table.drop(&w.mark)
}

// snapshot sends everything.
func (w *follower) snapshot() error {
	w.mu.Lock()
	w.revision, w.beat = w.feed.revision, w.observed
	if w.mark.slot == 0 {
		w.mark.record = followerMark
		w.table.add(&w.mark)
	}
	w.feed.recent.moveToBack(&w.mark)
	out := &operatorv1.WatchResponse{Pipeline: w.pipelineLocked(), Reset_: true}
	all := slices.Clone(w.all)
	w.mu.Unlock()
	out, err := w.tell(out, all)
	if err != nil {
		return err
	}
	out.Complete = true
	return w.send(out)
}

// tell sends all, the first of them in out, and returns the message that is to be sent
// next: out, if there were none.
func (w *follower) tell(out *operatorv1.WatchResponse, all []*service) (*operatorv1.WatchResponse, error) {
	told := 0
	for out.Components = range w.components(all, time.Time{}, time.Now()) {
		told += len(out.Components)
		if err := w.send(out); err != nil {
			return nil, err
		}
		out = &operatorv1.WatchResponse{}
		if told > toldAtOnce {
			time.Sleep(w.pause) // a stream that ends meanwhile fails the next send
		}
	}
	return out, nil
}

// catchUp sends what has changed, and returns what is closed at the next change.
func (w *follower) catchUp() (<-chan struct{}, error) {
	for {
		w.mu.Lock()
		if w.revision == w.feed.revision {
			defer w.mu.Unlock()
			return w.feed.wait(), nil
		}
		told := w.revision
		changed, removed, ok := w.feed.after(w)
		out := &operatorv1.WatchResponse{Removed: removed}
		if w.feed.stirred > told {
			out.Pipeline = w.pipelineLocked()
		}
		w.mu.Unlock()
		if !ok {
			w.pause = 0 // more is removed meanwhile than is remembered: with pauses it might never be up to date
			if err := w.snapshot(); err != nil {
				return nil, err
			}
			continue
		}
		out, err := w.tell(out, changed)
		if err != nil {
			return nil, err
		}
		if out.Pipeline != nil || len(out.Removed) > 0 {
			if err := w.send(out); err != nil {
				return nil, err
			}
		}
	}
}

// heard sends the services that were heard of since it last did.
func (w *follower) heard(now time.Time) error {
	w.mu.Lock()
	since, all := w.beat, slices.Clone(w.all)
	w.beat = now
	w.mu.Unlock()
	told := 0
	for part := range w.components(all, since, now) {
		if err := w.send(&operatorv1.WatchResponse{Components: part}); err != nil {
			return err
		}
		if _, err := w.catchUp(); err != nil { // changes do not wait for heartbeats
			return err
		}
		if told += len(part); told > toldAtOnce {
			time.Sleep(w.pause)
		}
	}
	return nil
}

const (
	maxAnswer      = 64 << 20        // bytes of an answer that lists services
	maxUnread      = 64 << 20        // bytes of answers that may wait to be read
	answerPatience = 5 * time.Second // for others to be read
)

// What a connection can make the control plane hold.
const (
	maxMessage = 1 << 20 // bytes
	maxCalls   = 128     // at a time
)

// bufferPool has the memory of messages, in buffers of at most twice their size: of
// grpc's own sizes the one after 32 KiB is 1 MiB, and a follower that does not read holds
// several. It counts the buffers beyond maxMessage, which are of answers: grpc takes one
// whole, and keeps it until its reader's window lets it go, or the connection ends.
type bufferPool struct {
	mem.BufferPool
	large atomic.Int64 // bytes that are in use, or have not been collected since

	mu        sync.Mutex    // guards the fields below
	freed     chan struct{} // closed and replaced when some have been
	collected time.Time     // when await had them collected last
}

func (p *bufferPool) Get(length int) *[]byte {
	if length <= maxMessage {
		return p.BufferPool.Get(length)
	}
	buf := new(make([]byte, length))
	p.large.Add(int64(length))
	runtime.AddCleanup(buf, func(length int) {
		p.large.Add(int64(-length))
		p.mu.Lock()
		defer p.mu.Unlock()
		close(p.freed)
		p.freed = make(chan struct{})
	}, length)
	return buf
}

func (p *bufferPool) Put(buf *[]byte) {
	if cap(*buf) <= maxMessage { // grpc does not put back what it has when a connection ends
		p.BufferPool.Put(buf)
	}
}

// full tells whether there is no room for another answer.
func (p *bufferPool) full() bool { return p.large.Load() > maxUnread }

// await returns when there may be room for another answer, or when ctx ends.
func (p *bufferPool) await(ctx context.Context) {
	p.mu.Lock()
	freed, collect := p.freed, time.Since(p.collected) > time.Second
	if collect {
		p.collected = time.Now()
	}
	p.mu.Unlock()
	if collect {
		runtime.GC() // what has been read is only to be collected
	}
	if p.full() {
		select {
		case <-freed:
		case <-ctx.Done():
		}
	}
}

// messages is grpc's default pool: messages are encoded into that one alone, whatever the
// options of a server are, and it may be set by init only.
var messages = &bufferPool{
	BufferPool: mem.NewTieredBufferPool(256, 4<<10, 16<<10, 32<<10, 64<<10, 128<<10, 256<<10, 512<<10, maxMessage),
	freed:      make(chan struct{}),
}

func init() { experimental.SetDefaultBufferPool(messages) }

// list makes an answer that lists services: f puts those in that are to be in it, and
// tells which. It fails with RESOURCE_EXHAUSTED where that would be too large, or for
// answerPatience too much of earlier answers has not been read.
func (r *registry) list(ctx context.Context, f func(s *service, now time.Time) bool) error {
	within, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	for r.listing.Lock(); messages.full() && r.isLarge(); r.listing.Lock() {
		r.listing.Unlock()
		if messages.await(within); within.Err() != nil {
			return status.Errorf(codes.ResourceExhausted, "%d bytes of earlier answers have not been read, at most %d may be", messages.large.Load(), maxUnread)
		}
	}
	defer r.listing.Unlock()
	size := 0
	r.each(time.Now(), func(s *service, now time.Time) bool {
		if f(s, now) {
			size += int(s.size) + recordSize
		}
		return size <= maxAnswer
	})
	if size > maxAnswer {
		return status.Errorf(codes.ResourceExhausted, "the services are too many for one message of at most %d bytes: call flowctl.operator.v1.Operator/Watch", maxAnswer)
	}
	return nil
}

// isLarge tells whether all services may be too much for a small message.
func (r *registry) isLarge() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes+len(r.all)*recordSize > maxMessage
}

// recordSize is what a service takes in an answer besides what it weighs, about.
const recordSize = 64
