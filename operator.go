package main

// The operator service: all that flowctl knows of a pipeline, streams of its changes, and
// requests to the run.

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// Many services are told of in no hurry: all at once, it would take the processors from the
// heartbeats for seconds, here and where it is read.
const (
	toldAtOnce = 1024 // services before the first pause
	toldPause  = 3 * time.Millisecond
)

// heartbeatPeriod is how often a stream that wants to hear of heartbeats does.
const heartbeatPeriod = time.Second

// runRequests is what the operator service may ask of the run.
type runRequests interface {
	// requestReload has the run take over its pipeline file as it is now, or file unless that is "". With
	// wait it returns when what that brings is ready or has failed. It fails, and changes nothing, for a
	// wrong file, and with errStopping once the run stops.
	requestReload(ctx context.Context, file string, wait bool) (reloadResult, error)

	// requestRestart has the run restart components, and returns how they are at once, or with wait
	// when all are ready again or have failed. It fails, and restarts nothing, with an *unknownError,
	// with errStopping, and for what cannot be restarted.
	requestRestart(ctx context.Context, ids []string, wait bool) ([]restartResult, error)

	// requestStop asks for the end of the run. With wait it returns when all components have ended.
	requestStop(ctx context.Context, wait bool) error
}

// reloadResult is what a reload has changed, by id.
type reloadResult struct {
	added, removed, restarted []string
	unchanged                 int
	brought                   []restartResult // how what was added and restarted is
}

// restartResult is how a component is after its restart.
type restartResult struct {
	id    string
	ready bool     // or completed
	state string   // of its process; "" for one that a reload has taken out
	cause string   // why it is not ready
	tail  []string // the last lines of one that has failed
}

var errStopping = errors.New("the pipeline is stopping")

// operatorServer speaks flowctl.operator.v1.
type operatorServer struct {
	operatorv1.UnimplementedOperatorServer
	registry *registry
	ended    <-chan struct{} // closed when the control plane stops
	requests runRequests     // nil for a control plane alone
	lines    *lineLog        // the same
	relay    *relay          // the same

	// registry.mu guards the fields below.
	streams map[*changeStream]struct{}
	open    map[streamKind]int
}

// newOperatorServer returns a server whose streams hear of the changes of r.
func newOperatorServer(r *registry, ended <-chan struct{}, requests runRequests, lines *lineLog, relay *relay) *operatorServer {
	o := &operatorServer{registry: r, ended: ended, requests: requests, lines: lines, relay: relay, streams: make(map[*changeStream]struct{}), open: make(map[streamKind]int)}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publish = o.publishLocked
	return o
}

// publishLocked has every stream tell of the service seq, or by 0 of the pipeline as a whole.
func (o *operatorServer) publishLocked(seq int64) {
	for w := range o.streams {
		if w.dirty[seq] = struct{}{}; len(w.dirty) > maxDirty {
			w.behind, w.dirty = true, make(map[int64]struct{})
		}
		wake(w.wake)
	}
}

func (o *operatorServer) GetPipeline(ctx context.Context, _ *operatorv1.GetPipelineRequest) (*operatorv1.Pipeline, error) {
	r := o.registry
	r.mu.Lock()
	out := o.pipelineLocked()
	r.mu.Unlock()
	err := r.list(ctx, func(s *service, now time.Time) bool {
		out.Components = append(out.Components, r.componentLocked(s, now))
		return true
	})
	return out, err
}

func (o *operatorServer) Reload(ctx context.Context, in *operatorv1.ReloadRequest) (*operatorv1.ReloadResponse, error) {
	if err := o.checkOperator(ctx, "reload"); err != nil {
		return nil, err
	}
	if file := in.GetFile(); file != "" && !filepath.IsAbs(file) {
		return nil, status.Errorf(codes.InvalidArgument, "file must be an absolute path, not %s", quote(file))
	}
	out, err := o.requests.requestReload(ctx, in.GetFile(), in.GetWait())
	switch {
	case ctx.Err() != nil:
		return nil, status.FromContextError(ctx.Err()).Err()
	case errors.Is(err, errStopping):
		return nil, status.Error(codes.Unavailable, err.Error())
	case err != nil:
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &operatorv1.ReloadResponse{Added: out.added, Removed: out.removed, Restarted: out.restarted, Unchanged: int64(out.unchanged), Components: restartedComponents(out.brought)}, nil
}

func restartedComponents(results []restartResult) (out []*operatorv1.Restarted) {
	for _, r := range results {
		c := &operatorv1.Restarted{Id: r.id, Ready: r.ready, State: r.state, Cause: r.cause}
		for _, line := range r.tail {
			c.LastLines = append(c.LastLines, []byte(line))
		}
		out = append(out, c)
	}
	return out
}

func (o *operatorServer) Restart(ctx context.Context, in *operatorv1.RestartRequest) (*operatorv1.RestartResponse, error) {
	if err := o.checkOperator(ctx, "restart"); err != nil {
		return nil, err
	}
	if len(in.GetIds()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "ids is empty: it must name the components to restart")
	}
	results, err := o.requests.requestRestart(ctx, in.GetIds(), in.GetWait())
	_, unknown := errors.AsType[*unknownError](err)
	switch {
	case unknown:
		return nil, status.Error(codes.NotFound, err.Error())
	case errors.Is(err, errStopping):
		return nil, status.Error(codes.Unavailable, err.Error())
	case ctx.Err() != nil:
		return nil, status.FromContextError(ctx.Err()).Err()
	case err != nil:
		return nil, status.Error(codes.Aborted, err.Error())
	}
	return &operatorv1.RestartResponse{Components: restartedComponents(results)}, nil
}

func (o *operatorServer) Stop(ctx context.Context, _ *operatorv1.StopRequest) (*operatorv1.StopResponse, error) {
	if err := o.checkOperator(ctx, "stop"); err != nil {
		return nil, err
	}
	if err := o.requests.requestStop(ctx, true); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return &operatorv1.StopResponse{}, nil
}

func (o *operatorServer) Logs(in *operatorv1.LogsRequest, stream grpc.ServerStreamingServer[operatorv1.LogsResponse]) error {
	ctx := stream.Context()
	if err := o.checkOperator(ctx, "logs"); err != nil {
		return err
	}
	conn, rank := called(ctx)
	kind := streamKind{in.GetFollow(), rank}
	if err := o.enter(kind); err != nil {
		return err
	}
	defer o.leave(kind)
	reader, kept, err := o.lines.follow(in.GetIds(), in.GetLast())
	if err != nil {
		return status.Error(codes.NotFound, err.Error())
	}
	defer reader.leave()
	first := &operatorv1.LogsResponse{Ids: o.lines.known(), LogFiles: o.lines.files(in.GetIds())}
	if err := cmp.Or(stream.Send(first), sendKept(ctx, conn, kept, stream.Send)); err != nil {
		return err
	}
	for over := !in.GetFollow(); !over; {
		select {
		case <-reader.wake:
		case <-o.ended: // what has come until now is sent
			over = true
		case <-ctx.Done():
			return nil
		}
		for parts, missed := reader.take(maxPart); len(parts) > 0 || missed > 0; parts, missed = reader.take(maxPart) {
			if err := stream.Send(&operatorv1.LogsResponse{Missed: missed, Printed: printed(parts)}); err != nil {
				return err
			}
		}
	}
	return nil
}

// sendKept sends parts, which count as unread until then.
func sendKept(ctx context.Context, conn *countedConn, parts []*linePart, send func(*operatorv1.LogsResponse) error) error {
	size := 0
	for _, p := range parts {
		size += len(p.text) + partCost
	}
	if conn != nil && size > 0 {
		_, rank := called(ctx)
		unread := &conn.traffic.shares[rank].unread
		e, err := unread.enter(ctx, conn, max(size, leastUnread))
		if err != nil {
			return err
		}
		defer unread.leave(e)
	}
	for len(parts) > 0 {
		n, size := 0, 0
		for ; n < len(parts) && size < maxPart; n++ {
			size += len(parts[n].text)
		}
		if err := send(&operatorv1.LogsResponse{Printed: printed(parts[:n])}); err != nil {
			return err
		}
		parts = parts[n:]
	}
	return nil
}

// printed is parts as a message has them.
func printed(parts []*linePart) []*operatorv1.Printed {
	var out []*operatorv1.Printed
	for _, p := range parts {
		out = append(out, &operatorv1.Printed{Time: timestamppb.New(p.at), Id: p.id, Stream: p.stream, Lines: p.text})
	}
	return out
}

// checkOperator fails unless there is a run, and an operator makes the call of ctx. command is what they
// would type.
func (o *operatorServer) checkOperator(ctx context.Context, command string) error {
	if o.requests == nil {
		return status.Error(codes.Unimplemented, "a control plane alone has no pipeline")
	}
	return refuseOthers(ctx, command)
}

// refuseOthers fails unless an operator makes the call of ctx. command is what they would type.
func refuseOthers(ctx context.Context, command string) error {
	if !byOperator(ctx) {
		return status.Errorf(codes.PermissionDenied, "only an operator may do that: user %d or root on this machine by flowctl %s, and not from a component, or a client certificate with a name of -operators", os.Geteuid(), command)
	}
	return nil
}

// pipelineLocked is the pipeline as a whole, with its edges. It needs registry.mu.
func (o *operatorServer) pipelineLocked() *operatorv1.Pipeline {
	r := o.registry
	p := &r.pipeline
	out := &operatorv1.Pipeline{
		Name: p.name, Version: p.version, Pid: int64(os.Getpid()), Started: timestamppb.New(p.started),
		Endpoint: r.endpoint, Status: p.status, Ready: p.ready, StateFile: r.stateFile,
	}
	if r.persistence.err != nil {
		out.NotDurable = r.persistence.err.Error()
	}
	edges := o.relay.reports(time.Now())
	for _, e := range edges[:min(len(edges), maxEdges)] {
		out.Edges = append(out.Edges, &operatorv1.Edge{From: e.from, To: e.to, State: e.state, Events: e.events, Bytes: e.bytes, EventsPerSecond: e.perSecond, WaitingSeconds: e.waiting.Seconds()})
	}
	return out
}

// memberSnapshot is how a component of the pipeline is, for the footer.
type memberSnapshot struct {
	health   string
	lastSeen time.Time      // zero while it has not registered
	metrics  map[string]any // float64 or string
}

// memberSnapshots returns one for each component of the pipeline, by its id.
func (r *registry) memberSnapshots(now time.Time) map[string]memberSnapshot {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	out := make(map[string]memberSnapshot, len(r.members))
	for _, s := range r.members {
		m := memberSnapshot{health: r.healthLocked(s, now).condition.String(), metrics: make(map[string]any, len(s.metrics))}
		if s.registered {
			m.lastSeen = s.lastSeen
		}
		for i := range s.metrics {
			if f, ok := s.metrics[i].float(); ok {
				m.metrics[s.metrics[i].name] = f
			} else {
				m.metrics[s.metrics[i].name] = s.metrics[i].text
			}
		}
		out[s.key()] = m
	}
	return out
}

// componentLocked is all that there is to show of s. It shares lists and maps with s, which
// are never changed.
func (r *registry) componentLocked(s *service, now time.Time) *operatorv1.Component {
	h, said := r.healthLocked(s, now), &s.said
	out := &operatorv1.Component{
		Record: s.seq, Id: s.key(), InPipeline: s.member != nil, Type: typeName(said.kind),
		Name: said.name, Description: said.description, Version: said.version,
		InputEventTypes: said.inputEvents, OutputEventTypes: said.outputEvents,
		Endpoint: said.endpoint, Metadata: said.metadata,
		Health: h.condition.String(), Cause: r.cause(h, now), Declared: statusName(s.declared),
	}
	if said.id != out.Id {
		out.ServiceId = said.id
	}
	if s.registered {
		out.RegisteredAt, out.LastSeen = timestamppb.New(s.registeredAt), timestamppb.New(s.lastSeen)
	}
	for i := range s.metrics {
		m := &s.metrics[i]
		if f, ok := m.float(); ok {
			if out.Metrics == nil {
				out.Metrics = make(map[string]float64)
			}
			out.Metrics[m.name] = f
			continue
		}
		if out.TextMetrics == nil {
			out.TextMetrics = make(map[string]string)
		}
		out.TextMetrics[m.name] = m.text
	}
	for _, h := range s.history {
		out.History = append(out.History, &operatorv1.Change{Time: timestamppb.New(h.at), Health: h.condition.String(), Cause: h.cause})
	}
	if s.member == nil {
		return out
	}
	out.Type, out.TypeInFile, out.Labels = s.member.role.String(), s.member.kind, s.member.labels
	if p := s.member.process; p != (processReport{}) {
		out.Process = &operatorv1.Process{State: p.state, Pid: int64(p.pid), Restarts: int64(p.restarts)}
		if !p.started.IsZero() {
			out.Process.Started = timestamppb.New(p.started)
		}
	}
	return out
}

// partSize is about how many bytes of a message componentLocked makes of s.
func (s *service) partSize() int {
	return s.bytes + recordSize*(1+len(s.history)) + 8*(len(s.metrics)+len(s.said.metadata))
}

// streamKind is what streams of changes and of lines are counted by.
type streamKind struct {
	follows bool  // after the first snapshot
	rank    int32 // of who has asked for it
}

// changeStream is one stream of changes. It holds at most one message, and of what has changed
// only which services those are: what a slow reader misses is not kept, it gets the services
// as they are when it gets to them.
type changeStream struct {
	operator *operatorServer
	send     func(*operatorv1.WatchResponse) error
	pause    time.Duration // between messages, where there are many
	kind     streamKind
	beat     time.Time     // when heartbeats were told of last
	wake     chan struct{} // gets a token when something is dirty

	// registry.mu guards the fields below.
	dirty  map[int64]struct{} // services that have changed since they were told of, by seq; 0 is the pipeline as a whole
	behind bool               // more has changed than dirty may hold
}

func (o *operatorServer) Watch(in *operatorv1.WatchRequest, stream grpc.ServerStreamingServer[operatorv1.WatchResponse]) error {
	_, rank := called(stream.Context())
	w, err := o.join(stream.Send, streamKind{in.GetFollow(), rank})
	if err != nil {
		return err
	}
	defer w.leave()
	if err := w.snapshot(); err != nil || !in.GetFollow() {
		return err
	}
	var beat <-chan time.Time
	if in.GetHeartbeats() {
		ticker := time.NewTicker(heartbeatPeriod)
		defer ticker.Stop()
		beat = ticker.C
	}
	for {
		select {
		case <-w.wake:
			err = w.catchUp()
		case now := <-beat:
			err = w.tellHeartbeats(now)
		case <-o.ended: // how all was at the end is told
			return w.catchUp()
		case <-stream.Context().Done():
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// join adds a stream. Errors: RESOURCE_EXHAUSTED where there are as many as there can be.
// Those that want no more than a snapshot are not kept out by others that go on, and nobody by
// who is trusted less.
func (o *operatorServer) join(send func(*operatorv1.WatchResponse) error, kind streamKind) (*changeStream, error) {
	if err := o.enter(kind); err != nil {
		return nil, err
	}
	o.registry.mu.Lock()
	defer o.registry.mu.Unlock()
	w := &changeStream{operator: o, send: send, kind: kind, pause: toldPause, wake: make(chan struct{}, 1), dirty: make(map[int64]struct{})}
	o.streams[w] = struct{}{}
	return w, nil
}

func (w *changeStream) leave() {
	w.operator.leave(w.kind)
	w.operator.registry.mu.Lock()
	defer w.operator.registry.mu.Unlock()
	delete(w.operator.streams, w)
}

// enter counts a stream, of changes or of lines, until leave. Errors: RESOURCE_EXHAUSTED where there are
// as many as there can be.
func (o *operatorServer) enter(kind streamKind) error {
	o.registry.mu.Lock()
	defer o.registry.mu.Unlock()
	if o.open[kind] >= maxFollowers {
		return status.Errorf(codes.ResourceExhausted, "%d streams are open, the most that there can be", maxFollowers)
	}
	o.open[kind]++
	return nil
}

func (o *operatorServer) leave(kind streamKind) {
	o.registry.mu.Lock()
	defer o.registry.mu.Unlock()
	o.open[kind]--
}

// snapshot sends everything.
func (w *changeStream) snapshot() error {
	r := w.operator.registry
	r.mu.Lock()
	w.behind, w.dirty, w.beat = false, make(map[int64]struct{}), r.lastNow
	out := &operatorv1.WatchResponse{Pipeline: w.operator.pipelineLocked(), Reset_: true}
	all := slices.Concat(r.members, r.others)
	r.mu.Unlock()
	out, err := w.tell(out, seqsOf(all), time.Time{})
	if err != nil {
		return err
	}
	out.Complete = true
	return w.send(out)
}

// seqsOf needs no lock, as a service keeps its seq.
func seqsOf(services []*service) []int64 {
	seqs := make([]int64, len(services))
	for i, s := range services {
		seqs[i] = s.seq
	}
	return seqs
}

// catchUp sends what has changed until nothing has.
func (w *changeStream) catchUp() error {
	for {
		seqs, behind := w.take()
		switch {
		case behind:
			w.pause = 0 // more changes meanwhile than dirty may hold: with pauses it might never be up to date
			if err := w.snapshot(); err != nil {
				return err
			}
		case len(seqs) == 0:
			return nil
		default:
			if err := w.tellAll(seqs, time.Time{}); err != nil {
				return err
			}
		}
	}
}

// take returns what has changed, in the order of seq.
func (w *changeStream) take() (seqs []int64, behind bool) {
	w.operator.registry.mu.Lock()
	dirty, behind := w.dirty, w.behind
	w.dirty = make(map[int64]struct{})
	w.operator.registry.mu.Unlock()
	return slices.Sorted(maps.Keys(dirty)), behind
}

// tellAll is tell with its last message.
func (w *changeStream) tellAll(seqs []int64, since time.Time) error {
	out, err := w.tell(&operatorv1.WatchResponse{}, seqs, since)
	if err == nil && (out.Pipeline != nil || len(out.Components)+len(out.Removed) > 0) {
		err = w.send(out)
	}
	return err
}

// tell sends those of the services seqs that were heard of after since as they are now,
// beginning in out. It returns the message that is to be sent next, which may be empty.
func (w *changeStream) tell(out *operatorv1.WatchResponse, seqs []int64, since time.Time) (*operatorv1.WatchResponse, error) {
	told := 0
	for {
		seqs = w.fill(out, seqs, since)
		if told += len(out.Components); len(seqs) == 0 {
			return out, nil
		}
		if out.Reset_ || len(out.Components)+len(out.Removed) > 0 {
			if err := w.send(out); err != nil {
				return nil, err
			}
			out = &operatorv1.WatchResponse{}
		}
		if told > toldAtOnce {
			time.Sleep(w.pause) // a stream that ends meanwhile fails the next send
		}
	}
}

// fill puts services into out, as many as fit a message, and returns the others.
func (w *changeStream) fill(out *operatorv1.WatchResponse, seqs []int64, since time.Time) []int64 {
	r := w.operator.registry
	now := r.lockAt(time.Now())
	defer r.mu.Unlock()
	size := 0
	for i, seq := range seqs {
		s := r.bySeq[seq]
		switch {
		case i == batch:
			return seqs[i:]
		case seq == 0:
			out.Pipeline = w.operator.pipelineLocked()
		case s == nil:
			out.Removed = append(out.Removed, seq)
		case !s.lastSeen.After(since) && !since.IsZero():
		default:
			if size += s.partSize(); size > maxPart && len(out.Components) > 0 {
				return seqs[i:]
			}
			out.Components = append(out.Components, r.componentLocked(s, now))
		}
	}
	return nil
}

// tellHeartbeats sends the services that were heard of since it last did. Changes do not
// wait for it.
func (w *changeStream) tellHeartbeats(now time.Time) error {
	r := w.operator.registry
	r.mu.Lock()
	all := slices.Concat(r.members, r.others)
	if len(r.members) > 0 {
		w.dirty[0] = struct{}{} // its edges move events
	}
	r.mu.Unlock()
	since := w.beat
	w.beat = now
	for some := range slices.Chunk(seqsOf(all), toldAtOnce) {
		if err := cmp.Or(w.tellAll(some, since), w.catchUp()); err != nil {
			return err
		}
		if len(all) > toldAtOnce {
			time.Sleep(w.pause)
		}
	}
	return nil
}
