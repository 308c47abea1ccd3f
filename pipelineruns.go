package main

// The calls of the legacy dialect for runs: they tell of those that flowctl records, and keep records of the
// callers' own.

import (
	"cmp"
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
)

// defaultRuns is how many runs a list has that does not say how many.
const defaultRuns = 10

// pipelineRuns answers the calls for runs.
type pipelineRuns struct {
	flowctlpb.UnimplementedControlPlaneServer
	registry *registry
	requests runRequests                  // nil for a control plane alone
	metrics  func() *flowctlpb.RunMetrics // of the run of this process; nil for none
	records  runsReader
	disk     *diskTurn // of records

	mu     sync.Mutex // guards the field below
	others []knownRun // of callers, in the order of their creation
}

// knownRun is a run that can be asked for. Its message is never changed.
type knownRun struct {
	*flowctlpb.PipelineRun
	keeper runKeeper
	// Of one that a caller keeps here.
	owner string // the user or certificate, "" for whom nobody can tell from others
	size  int    // in bytes, as maxCallerRunBytes counts it
}

// runKeeper is who records a run.
type runKeeper int

const (
	keptByThis    runKeeper = iota // it is the run of this process
	keptByFlowctl                  // of another process
	keptByCaller
)

// over tells whether a run has ended.
func (k *knownRun) over() bool {
	return k.Status != flowctlpb.RunStatus_RUN_STATUS_STARTING && k.Status != flowctlpb.RunStatus_RUN_STATUS_RUNNING
}

// CreatePipelineRun takes in a record of the caller's own. Errors: ALREADY_EXISTS, INVALID_ARGUMENT,
// RESOURCE_EXHAUSTED past a bound.
func (p *pipelineRuns) CreatePipelineRun(ctx context.Context, in *flowctlpb.CreatePipelineRunRequest) (*flowctlpb.PipelineRun, error) {
	if n := len(in.GetComponentIds()); n > maxEntries {
		return nil, status.Errorf(codes.ResourceExhausted, "a list of %d entries: at most %d are allowed", n, maxEntries)
	}
	err := cmp.Or(checkLength("run_id", in.GetRunId(), maxID), checkLength("pipeline_name", in.GetPipelineName(), maxText))
	for _, id := range in.GetComponentIds() {
		err = cmp.Or(err, checkLength("a component id", id, maxID))
	}
	if err == nil && in.GetPipelineName() == "" {
		err = status.Error(codes.InvalidArgument, "pipeline_name is empty")
	}
	if err != nil {
		return nil, err
	}
	from, err := originOf(ctx, "")
	if err != nil {
		return nil, err
	}
	created := knownRun{keeper: keptByCaller, owner: from.owner, PipelineRun: &flowctlpb.PipelineRun{
		RunId: cmp.Or(in.GetRunId(), rand.Text()), PipelineId: in.GetPipelineName(), PipelineName: in.GetPipelineName(),
		Status: flowctlpb.RunStatus_RUN_STATUS_STARTING, StartTime: timestamppb.Now(),
		ConfigYaml: in.GetConfigYaml(), ComponentIds: in.GetComponentIds(), Metrics: &flowctlpb.RunMetrics{},
	}}
	recorded, _ := p.recorded() // who cannot be told of a run there can still create one
	for _, k := range append(p.own(), recorded...) {
		if strings.HasPrefix(k.RunId, created.RunId) { // else who asks for a run of flowctl by a part of its id would get this one
			return nil, status.Errorf(codes.AlreadyExists, "run_id %q is the id of a run of flowctl, or its beginning: %s", clip(created.RunId), k.RunId)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.indexLocked(created.RunId) >= 0 {
		return nil, status.Errorf(codes.AlreadyExists, "run_id %q is that of another run", clip(created.RunId))
	}
	p.others = append(p.others, created)
	p.keepLocked(len(p.others) - 1)
	return created.PipelineRun, nil
}

// UpdatePipelineRun changes what a caller's own record says, as far as the request does. Errors: those of find,
// PERMISSION_DENIED, RESOURCE_EXHAUSTED past a bound.
func (p *pipelineRuns) UpdatePipelineRun(ctx context.Context, in *flowctlpb.UpdatePipelineRunRequest) (*flowctlpb.PipelineRun, error) {
	components := in.GetMetrics().GetComponentMetrics()
	if n := len(components); n > maxEntries {
		return nil, status.Errorf(codes.ResourceExhausted, "a map of %d entries: at most %d are allowed", n, maxEntries)
	}
	err := checkLength("error", in.GetError(), maxText)
	for id := range components {
		err = cmp.Or(err, checkLength("a component id", id, maxID))
	}
	if err == nil && flowctlpb.RunStatus_name[int32(in.GetStatus())] == "" {
		err = status.Errorf(codes.InvalidArgument, "status %d: it must be one of RunStatus", in.GetStatus())
	}
	if err != nil {
		return nil, err
	}
	k, err := p.find(in.GetRunId())
	if err == nil {
		err = k.refuse(originOf(ctx, ""))
	}
	if err != nil {
		return nil, err
	}
	return p.change(k.RunId, func(run *flowctlpb.PipelineRun) {
		run.Status = cmp.Or(in.GetStatus(), run.Status)
		run.Error = cmp.Or(in.GetError(), run.Error)
		if in.GetMetrics() != nil {
			run.Metrics = in.GetMetrics()
		}
	})
}

// GetPipelineRun fails as find does.
func (p *pipelineRuns) GetPipelineRun(ctx context.Context, in *flowctlpb.GetPipelineRunRequest) (*flowctlpb.PipelineRun, error) {
	k, err := p.find(in.GetRunId())
	if err != nil {
		return nil, err
	}
	return shownRuns(ctx, k)[0], nil
}

// ListPipelineRuns has all runs for a limit below 0. Errors: UNAVAILABLE where the records cannot be read.
func (p *pipelineRuns) ListPipelineRuns(ctx context.Context, in *flowctlpb.ListPipelineRunsRequest) (*flowctlpb.ListPipelineRunsResponse, error) {
	runs, err := p.all()
	if err != nil {
		return nil, err
	}
	runs = slices.DeleteFunc(runs, func(k knownRun) bool {
		return in.GetPipelineName() != "" && in.GetPipelineName() != k.PipelineName ||
			in.GetStatus() != flowctlpb.RunStatus_RUN_STATUS_UNKNOWN && in.GetStatus() != k.Status
	})
	if limit := cmp.Or(int(in.GetLimit()), defaultRuns); limit > 0 && limit < len(runs) {
		runs = runs[:limit]
	}
	return &flowctlpb.ListPipelineRunsResponse{Runs: shownRuns(ctx, runs...)}, nil
}

// StopPipelineRun has the run of this process stop, and does not wait for that, or notes that a caller's own run was
// stopped. Errors: those of find, PERMISSION_DENIED, FAILED_PRECONDITION for a run that has ended, or is another flowctl's.
func (p *pipelineRuns) StopPipelineRun(ctx context.Context, in *flowctlpb.StopPipelineRunRequest) (*flowctlpb.PipelineRun, error) {
	k, err := p.find(in.GetRunId())
	switch {
	case err != nil:
		return nil, err
	case k.over():
		return nil, status.Errorf(codes.FailedPrecondition, "run %q has ended: it is %s", clip(k.RunId), strings.ToLower(strings.TrimPrefix(k.Status.String(), "RUN_STATUS_")))
	case k.keeper == keptByFlowctl:
		return nil, status.Errorf(codes.FailedPrecondition, "run %q is another flowctl's: stop it on its machine by flowctl stop -pipeline %s", k.RunId, shellWord(clip(k.PipelineName)))
	case k.keeper == keptByCaller:
		if !byOperator(ctx) {
			err = k.refuse(originOf(ctx, ""))
		}
		if err != nil {
			return nil, err
		}
		return p.change(k.RunId, func(run *flowctlpb.PipelineRun) { run.Status = flowctlpb.RunStatus_RUN_STATUS_STOPPED })
	}
	if err := refuseOthers(ctx, "stop"); err != nil {
		return nil, err
	}
	if err := p.requests.requestStop(ctx, false); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return shownRuns(ctx, p.own()...)[0], nil
}

// refuse fails with PERMISSION_DENIED where the caller, who from is unless that failed, may not change k.
func (k *knownRun) refuse(from origin, failed error) error {
	switch {
	case k.keeper != keptByCaller:
		return status.Errorf(codes.PermissionDenied, "run %q is one of flowctl's own, which flowctl alone records", clip(k.RunId))
	case failed != nil:
		return failed
	case from.believed, k.owner == "", k.owner == from.owner:
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "run %q was created by %s: nobody else can change it", clip(k.RunId), printable(k.owner))
}

// shownRuns are runs as the caller of ctx may see them: a file is for operators, and for who has sent it.
func shownRuns(ctx context.Context, runs ...knownRun) (out []*flowctlpb.PipelineRun) {
	from := sync.OnceValues(func() (origin, error) { return originOf(ctx, "") })
	for _, k := range runs {
		run := k.PipelineRun
		if run.ConfigYaml != "" && !byOperator(ctx) && (k.keeper != keptByCaller || k.refuse(from()) != nil) {
			run = proto.CloneOf(run)
			run.ConfigYaml = ""
		}
		out = append(out, run)
	}
	return out
}

// own is the run of this process; there is none in a control plane alone.
func (p *pipelineRuns) own() []knownRun {
	r := p.registry
	r.mu.Lock()
	info, ids := r.pipeline, make([]string, 0, len(r.members))
	for _, s := range r.members {
		ids = append(ids, s.key())
	}
	r.mu.Unlock()
	if info.name == "" {
		return nil
	}
	run := &flowctlpb.PipelineRun{
		RunId: info.runID, PipelineId: info.name, PipelineName: info.name, Status: flowctlpb.RunStatus_RUN_STATUS_STARTING,
		StartTime: timestamppb.New(info.started), ConfigYaml: info.file, ComponentIds: ids, Metrics: &flowctlpb.RunMetrics{},
	}
	if info.ready {
		run.Status = flowctlpb.RunStatus_RUN_STATUS_RUNNING
	}
	if p.metrics != nil {
		run.Metrics = cmp.Or(p.metrics(), run.Metrics)
	}
	return []knownRun{{PipelineRun: run, keeper: keptByThis}}
}

// recorded are the runs of other processes, the latest last. Errors: UNAVAILABLE.
func (p *pipelineRuns) recorded() (out []knownRun, err error) {
	if p.records.folder == "" {
		return nil, nil
	}
	var records []runRecord
	wanted := time.Now()
	if _, err := p.disk.do(p.records.folder, func() (err error) {
		records, err = p.records.read(wanted)
		return err
	}); err != nil { // records may be set yet
		return nil, status.Errorf(codes.Unavailable, "the record of runs cannot be read: %v", err)
	}
	for i := range records {
		out = append(out, knownRun{PipelineRun: records[i].message(), keeper: keptByFlowctl})
	}
	return out, nil
}

// message is r in the words of the legacy dialect.
func (r *runRecord) message() *flowctlpb.PipelineRun {
	out := &flowctlpb.PipelineRun{
		RunId: r.ID, PipelineId: r.Pipeline, PipelineName: r.Pipeline, Error: r.Reason, StartTime: timestamppb.New(r.Started),
		Status: flowctlpb.RunStatus(flowctlpb.RunStatus_value["RUN_STATUS_"+strings.ToUpper(r.State)]), Metrics: &flowctlpb.RunMetrics{},
	}
	if r.Ended != nil {
		out.EndTime = timestamppb.New(*r.Ended)
	}
	if r.State == runKilled {
		out.Status, out.Error = flowctlpb.RunStatus_RUN_STATUS_FAILED, "its flowctl was killed"
	}
	return out
}

// here are the runs that no disk has to be asked for: that of this process, and those of callers, the latest last.
func (p *pipelineRuns) here() []knownRun {
	own := p.own()
	p.mu.Lock()
	defer p.mu.Unlock()
	return append(own, p.others...)
}

// all are all runs, the latest first. Errors: UNAVAILABLE.
func (p *pipelineRuns) all() ([]knownRun, error) {
	recorded, err := p.recorded()
	if err != nil {
		return nil, err
	}
	here := p.here()
	runs := append(slices.DeleteFunc(recorded, func(k knownRun) bool {
		return slices.ContainsFunc(here, func(h knownRun) bool { return h.keeper == keptByThis && h.RunId == k.RunId })
	}), here...)
	slices.Reverse(runs)
	slices.SortStableFunc(runs, func(a, b knownRun) int { return b.StartTime.AsTime().Compare(a.StartTime.AsTime()) })
	return runs, nil
}

// find finds a run by its id, or by a beginning that no other id has. Errors: NOT_FOUND, INVALID_ARGUMENT for an
// empty id and for the beginning of several, UNAVAILABLE where the records would tell and cannot be read.
func (p *pipelineRuns) find(id string) (knownRun, error) {
	if id == "" {
		return knownRun{}, status.Error(codes.InvalidArgument, "run_id is empty")
	}
	isIt := func(k knownRun) bool { return k.RunId == id }
	here := p.here()
	if i := slices.IndexFunc(here, isIt); i >= 0 {
		return here[i], nil
	}
	runs, err := p.all()
	if err != nil {
		return knownRun{}, err
	}
	if i := slices.IndexFunc(runs, isIt); i >= 0 {
		return runs[i], nil
	}
	var ids []string
	runs = slices.DeleteFunc(runs, func(k knownRun) bool { return !strings.HasPrefix(k.RunId, id) })
	for _, k := range runs {
		ids = append(ids, printable(k.RunId))
	}
	switch len(runs) {
	case 0:
		return knownRun{}, status.Errorf(codes.NotFound, "no run %q is known here: ListPipelineRuns tells which are", clip(id))
	case 1:
		return runs[0], nil
	}
	return knownRun{}, status.Errorf(codes.InvalidArgument, "run_id %q is ambiguous, %d runs begin with it: %s", clip(id), len(runs), enumerate(ids))
}

// indexLocked returns where the caller's record with that id is, -1 for none.
func (p *pipelineRuns) indexLocked(id string) int {
	return slices.IndexFunc(p.others, func(k knownRun) bool { return k.RunId == id })
}

// change puts what f makes of a caller's record in its place. Errors: NOT_FOUND for one that has made room meanwhile.
func (p *pipelineRuns) change(id string, f func(run *flowctlpb.PipelineRun)) (*flowctlpb.PipelineRun, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.indexLocked(id)
	if i < 0 {
		return nil, status.Errorf(codes.NotFound, "run %q has made room for others", clip(id))
	}
	k := p.others[i]
	run := proto.CloneOf(k.PipelineRun)
	f(run)
	k.PipelineRun = run
	switch {
	case !k.over():
		run.EndTime = nil
	case run.EndTime == nil:
		run.EndTime = timestamppb.Now()
	}
	p.others[i] = k
	p.keepLocked(i)
	return run, nil
}

// keepLocked makes room for the record at i, which is new or has changed, where there are too many or too large ones: the
// oldest of the others that has ended gives way, else the oldest.
func (p *pipelineRuns) keepLocked(i int) {
	kept, size := &p.others[i], 0
	kept.size = proto.Size(kept.PipelineRun) + len(kept.owner)
	id := kept.RunId
	for _, k := range p.others {
		size += k.size
	}
	for len(p.others) > maxCallerRuns || size > maxCallerRunBytes {
		first := -1
		for i, k := range p.others {
			if k.RunId != id && (first < 0 || k.over() && !p.others[first].over()) {
				first = i
			}
		}
		size -= p.others[first].size
		p.others = slices.Delete(p.others, first, first+1)
	}
}
