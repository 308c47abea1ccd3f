//go:build linux

package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// predecessor asks what the command line of flowctl's predecessor asks of a control plane. As that does, it takes
// it for granted that a run has metrics and an id of eight bytes at least.
type predecessor struct{ planeClient }

// services is status and list.
func (c predecessor) services(ctx context.Context) (lines []string, err error) {
	out, err := c.legacy.ListServices(ctx, &emptypb.Empty{})
	for _, s := range out.GetServices() {
		lines = append(lines, fmt.Sprintf("%s %s %t", s.ServiceId, s.ServiceType, s.IsHealthy))
	}
	return lines, err
}

// processors is processors list, and with events processors find.
func (c predecessor) processors(ctx context.Context, events ...string) (ids []string, err error) {
	out, err := c.v1.DiscoverComponents(ctx, &flowctlv1.DiscoveryRequest{Type: flowctlv1.ComponentType_COMPONENT_TYPE_PROCESSOR, EventTypes: events})
	for _, p := range out.GetComponents() {
		ids = append(ids, p.Id)
	}
	return ids, err
}

// processor is processors show.
func (c predecessor) processor(ctx context.Context, id string) (string, error) {
	out, err := c.v1.GetComponentStatus(ctx, &flowctlv1.ComponentStatusRequest{ServiceId: id})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s %s %t", out.Component.Id, out.Component.Type, out.Status, out.LastHeartbeat.AsTime().After(out.RegisteredAt.AsTime().Add(-time.Second))), nil
}

// runs is pipelines list, active and runs.
func (c predecessor) runs(ctx context.Context, in *flowctlpb.ListPipelineRunsRequest) (lines []string, err error) {
	out, err := c.legacy.ListPipelineRuns(ctx, in)
	for _, r := range out.GetRuns() {
		lines = append(lines, runLine(r))
	}
	return lines, err
}

func runLine(r *flowctlpb.PipelineRun) string {
	ended := ""
	if r.EndTime != nil {
		ended = " ended"
	}
	if r.StartTime.AsTime().Before(time.Now().Add(-time.Hour)) {
		ended += " long ago"
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s %d%s %s", r.PipelineName, r.Status, r.Metrics.EventsProcessed, ended, r.Error))
}

// run is pipelines run-info. An id that is not known is tried as a prefix.
func (c predecessor) run(ctx context.Context, id string) (*flowctlpb.PipelineRun, error) {
	return c.legacy.GetPipelineRun(ctx, &flowctlpb.GetPipelineRunRequest{RunId: id})
}

func (c predecessor) stop(ctx context.Context, id string) (*flowctlpb.PipelineRun, error) {
	return c.legacy.StopPipelineRun(ctx, &flowctlpb.StopPipelineRunRequest{RunId: id})
}

// dialOperators connects to the operators' socket of the pipeline that p runs, by a path that is not too long for one.
func dialOperators(t *testing.T, p *process) predecessor {
	t.Helper()
	folder := ""
	for _, entry := range p.cmd.Env {
		if dir, ok := strings.CutPrefix(entry, "XDG_RUNTIME_DIR="); ok {
			folder = filepath.Join(dir, "flowctl")
		}
	}
	sockets := get(filepath.Glob(filepath.Join(folder, "*"+socketSuffix)))(t)
	if len(sockets) != 1 {
		t.Fatalf("the sockets of %s: %q", folder, sockets)
	}
	return predecessor{dialPlane(t, "unix:"+sockets[0])}
}

// recordedFolder is the state folder of a user who has run pipelines: one failed, one was killed, one runs.
func recordedFolder(t *testing.T) (home string, living *process) {
	t.Helper()
	home = t.TempDir()
	in := withEnv("XDG_STATE_HOME=" + home)
	failed := start(t, runArgs(writePipeline(t, shell("a", "exit 7"))), in)
	failed.exit(exitFailed)
	killed := start(t, runArgs(sleeper(t)), in)
	killed.waitReady()
	awaitRunning(t, home, 2)
	killed.signal(syscall.SIGKILL)
	<-killed.done
	killed.awaitGuard()
	living = start(t, runArgs(writePipeline(t,
		actor("ledgers", role{Dialect: "v1"}),
		Component{ID: "transfers", Command: actor("", role{}).Command, Env: actor("", role{Dialect: "legacy"}).Env, Inputs: []string{"ledgers"}, InputEventTypes: []string{"ledger"}, OutputEventTypes: []string{"transfer"}},
	)), in, runsIn(publicDir(t)))
	living.waitReady()
	awaitRunning(t, home, 3)
	return home, living
}

// awaitRunning waits until so many runs are recorded, and the last of them as running.
func awaitRunning(t *testing.T, home string, runs int) {
	t.Helper()
	eventually(t, "it is recorded as running", func() bool {
		all := runsOf(t, home)
		return len(all) == runs && all[runs-1].State == runRunning
	})
}

// asksForRuns checks what it is told of the runs of recordedFolder, and of that one which goes on: its components, and its file.
func (c predecessor) asksForRuns(t *testing.T, id, members, file string) {
	all := []string{"test RUN_STATUS_RUNNING 0", "test RUN_STATUS_FAILED 0 its flowctl was killed", "test RUN_STATUS_FAILED 0 ended a: exit status 7"}
	for _, tt := range []struct {
		in   *flowctlpb.ListPipelineRunsRequest
		want []string
	}{
		{&flowctlpb.ListPipelineRunsRequest{Limit: 1000}, all},
		{&flowctlpb.ListPipelineRunsRequest{Limit: -1}, all},
		{&flowctlpb.ListPipelineRunsRequest{PipelineName: "test"}, all},
		{&flowctlpb.ListPipelineRunsRequest{PipelineName: "test", Limit: 2}, all[:2]},
		{&flowctlpb.ListPipelineRunsRequest{PipelineName: "tes"}, nil},
		{&flowctlpb.ListPipelineRunsRequest{Status: flowctlpb.RunStatus_RUN_STATUS_RUNNING, Limit: 100}, all[:1]},
		{&flowctlpb.ListPipelineRunsRequest{Status: flowctlpb.RunStatus_RUN_STATUS_STOPPED}, nil},
	} {
		wantEqual(t, fmt.Sprintf("runs %v", tt.in), fmt.Sprintf("%q", get(c.runs(t.Context(), tt.in))(t)), fmt.Sprintf("%q", tt.want))
	}
	for _, short := range []string{id, id[:8]} {
		run := get(c.run(t.Context(), short))(t)
		wantEqual(t, "run-info "+short, fmt.Sprint(run.RunId, run.PipelineId, " ", runLine(run)), id+"test "+all[0])
		wantEqual(t, "its components", fmt.Sprint(run.ComponentIds), members)
		wantEqual(t, "its file", run.ConfigYaml, file)
	}
	for id, want := range map[string]codes.Code{"": codes.InvalidArgument, "none of these": codes.NotFound, strings.Repeat("x", maxMessage/2): codes.NotFound} {
		_, err := c.run(t.Context(), id)
		wantCode(t, fmt.Sprintf("run-info %.10q", id), err, want)
	}
}

// TestPipelineRuns_PredecessorsCommands asks all that the predecessor's command line asks, of a run and of a control plane alone
// beside it.
func TestPipelineRuns_PredecessorsCommands(t *testing.T) {
	t.Parallel()
	home, p := recordedFolder(t)
	_, alone := startAlone(t, nil, withEnv("XDG_STATE_HOME="+home))
	ctx := t.Context()
	id := runsOf(t, home)[2].ID
	clients := map[string]predecessor{"the run": {dialPlane(t, p.endpoint())}, "its operators' socket": dialOperators(t, p), "a control plane alone": {dialPlane(t, alone)}}
	for name, c := range clients {
		members, file := "[ledgers transfers]", ""
		switch name {
		case "its operators' socket":
			file = string(get(os.ReadFile(p.cmd.Args[2]))(t))
		case "a control plane alone":
			members = "[]"
		}
		t.Run(name, func(t *testing.T) { c.asksForRuns(t, id, members, file) })
		if name == "a control plane alone" {
			continue
		}
		wantEqual(t, name+": status", fmt.Sprint(get(c.services(ctx))(t)), "[ledgers SERVICE_TYPE_SOURCE true transfers SERVICE_TYPE_PROCESSOR true]")
		wantEqual(t, name+": processors list", fmt.Sprint(get(c.processors(ctx))(t)), "[transfers]")
		wantEqual(t, name+": processors find", fmt.Sprint(get(c.processors(ctx, "transfer"))(t), get(c.processors(ctx, "ledgers"))(t)), "[transfers] []")
		wantEqual(t, name+": processors show", get(c.processor(ctx, "transfers"))(t), "transfers COMPONENT_TYPE_PROCESSOR HEALTH_STATUS_HEALTHY true")
	}
	var polls sync.WaitGroup // the dashboard, in many terminals
	for _, c := range clients {
		for range 5 {
			polls.Go(func() {
				for range 10 {
					_, errServices := c.services(ctx)
					_, errRuns := c.runs(ctx, &flowctlpb.ListPipelineRunsRequest{Limit: 5})
					_, errRun := c.run(ctx, id)
					if err := cmp.Or(errServices, errRuns, errRun); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	polls.Wait()
	if last := runsOf(t, home)[2]; last.State != runRunning { // whoever has read the records has not taken its lock
		t.Errorf("after all that flowctl runs shows it as %s", last.State)
	}
	for name, want := range map[string]struct {
		code codes.Code
		text string
	}{
		"the run":               {codes.PermissionDenied, "only an operator may do that: user"},
		"a control plane alone": {codes.FailedPrecondition, "flowctl stop -pipeline test"},
	} {
		_, err := clients[name].stop(ctx, id[:8])
		wantCode(t, "stop at "+name, err, want.code)
		if !strings.Contains(status.Convert(err).Message(), want.text) {
			t.Errorf("stop at %s says %v, not %q", name, err, want.text)
		}
	}
	_, err := clients["its operators' socket"].stop(ctx, runsOf(t, home)[0].ID)
	wantCode(t, "stop of one that has ended", err, codes.FailedPrecondition)
	stopping := get(clients["its operators' socket"].stop(ctx, id[:8]))(t)
	wantEqual(t, "stop", runLine(stopping), "test RUN_STATUS_RUNNING 0")
	p.exit(exitOK)
	stopped := get(clients["a control plane alone"].run(ctx, id))(t)
	wantEqual(t, "after the stop", runLine(stopped), "test RUN_STATUS_STOPPED 0 ended")
}

// A run is starting until it is ready, its file is the one that it has taken over last, and it is known
// without a record of runs, too.
func TestPipelineRuns_OfThisProcess(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", "exec sleep 300"), Component{ID: "gate", Command: actor("", role{}).Command, Env: actor("", role{Dialect: "v1", Gate: true}).Env})
	p := start(t, runArgs(file, "-no-persistence"), runsIn(publicDir(t)))
	c := predecessor{dialPlane(t, p.endpoint())}
	p.waitOut("waiting\n")
	one := func() *flowctlpb.PipelineRun {
		t.Helper()
		out := get(c.legacy.ListPipelineRuns(t.Context(), &flowctlpb.ListPipelineRunsRequest{}))(t)
		if len(out.Runs) != 1 {
			t.Fatalf("the runs are %v", out.Runs)
		}
		return out.Runs[0]
	}
	wantEqual(t, "before it is ready", runLine(one()), "test RUN_STATUS_STARTING 0")
	p.tell("gate", syscall.SIGUSR2)
	p.waitReady()
	eventually(t, "it is running", func() bool { return runLine(one()) == "test RUN_STATUS_RUNNING 0" })
	operator := dialOperators(t, p)
	rewrite(t, file, shell("a", "exec sleep 300"), shell("b", "exec sleep 300"))
	if code, out, stderr := start(t, []string{"reload", "-pipeline", "test"}, beside(p)).finish(); code != exitOK {
		t.Fatalf("reload: %d, %s%s", code, out, stderr)
	}
	run := get(operator.run(t.Context(), one().RunId))(t)
	wantEqual(t, "the file after a reload", run.ConfigYaml, string(get(os.ReadFile(file))(t)))
	wantEqual(t, "the components", fmt.Sprint(run.ComponentIds), "[a b]")
	p.stop()
}

// A record that cannot be read keeps nobody from the run of this process, and a lock file that was replaced is noticed.
func TestPipelineRuns_RecordsThatAreOfNoUse(t *testing.T) {
	t.Parallel()
	home, p := recordedFolder(t)
	_, alone := startAlone(t, nil, withEnv("XDG_STATE_HOME="+home))
	folder, server := filepath.Join(home, "flowctl"), predecessor{dialPlane(t, alone)}
	get(server.runs(t.Context(), &flowctlpb.ListPipelineRunsRequest{}))(t)
	must(t, os.RemoveAll(folder))
	get(server.runs(t.Context(), &flowctlpb.ListPipelineRunsRequest{}))(t)
	next := start(t, runArgs(sleeper(t)), withEnv("XDG_STATE_HOME="+home))
	next.waitReady()
	awaitRunning(t, home, 1)
	wantEqual(t, "after the folder was removed", fmt.Sprint(get(server.runs(t.Context(), &flowctlpb.ListPipelineRunsRequest{}))(t)), "[test RUN_STATUS_RUNNING 0]")

	operator := dialOperators(t, p)
	own := get(operator.runs(t.Context(), &flowctlpb.ListPipelineRunsRequest{Limit: -1}))(t)
	wantEqual(t, "what the run knows", len(own), 2)
	id := ""
	for _, r := range get(operator.legacy.ListPipelineRuns(t.Context(), &flowctlpb.ListPipelineRunsRequest{}))(t).Runs {
		if len(r.ComponentIds) > 0 {
			id = r.RunId
		}
	}
	writeFile(t, filepath.Join(folder, runsName), `[{"number": 1, "id"`)
	for what, call := range map[string]func() error{
		"a list":            func() error { _, err := operator.runs(t.Context(), &flowctlpb.ListPipelineRunsRequest{}); return err },
		"a part of an id":   func() error { _, err := operator.run(t.Context(), id[:8]); return err },
		"one without a run": func() error { _, err := server.run(t.Context(), "other"); return err },
	} {
		err := call()
		wantCode(t, what, err, codes.Unavailable)
		if !strings.Contains(fmt.Sprint(err), "is kept as it is") {
			t.Errorf("%s: %v", what, err)
		}
	}
	get(operator.run(t.Context(), id))(t)
	get(server.legacy.CreatePipelineRun(t.Context(), &flowctlpb.CreatePipelineRunRequest{PipelineName: "theirs"}))(t)
	get(operator.stop(t.Context(), id))(t)
	p.exit(exitOK)
}

// runWithCallers starts a run, whose callers have certificates. as dials it with that of a name; ops is an operator's.
func runWithCallers(t *testing.T) (home string, p *process, as func(name string) predecessor) {
	t.Helper()
	ca := newCA(t)
	named := func(name string) *testCert {
		return issue(t, ca, func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames = name, []string{"localhost"} })
	}
	home = t.TempDir()
	p = start(t, runArgs(sleeper(t), append(newFiles(t, named("plane"), ca).mutual(), "-operators", "ops")...), withEnv("XDG_STATE_HOME="+home))
	p.waitReady()
	awaitRunning(t, home, 1)
	return home, p, func(name string) predecessor {
		client, _ := dialTLS(t, p.endpoint(), trust(ca, named(name)))
		return predecessor{client}
	}
}

// create and update give the errors of CreatePipelineRun and UpdatePipelineRun.
func (c predecessor) create(t *testing.T, in *flowctlpb.CreatePipelineRunRequest) error {
	_, err := c.legacy.CreatePipelineRun(t.Context(), in)
	return err
}

func (c predecessor) update(t *testing.T, in *flowctlpb.UpdatePipelineRunRequest) error {
	_, err := c.legacy.UpdatePipelineRun(t.Context(), in)
	return err
}

// Nobody changes another one's record, or flowctl's, or passes a bound.
func TestPipelineRuns_CallersAreRefused(t *testing.T) {
	t.Parallel()
	_, p, as := runWithCallers(t)
	alice, eve, ops := as("alice"), as("eve"), as("ops")
	flowctls := get(eve.legacy.ListPipelineRuns(t.Context(), &flowctlpb.ListPipelineRunsRequest{}))(t).Runs[0].RunId
	must(t, alice.create(t, &flowctlpb.CreatePipelineRunRequest{RunId: "alices-first", PipelineName: "hers"}))
	long := strings.Repeat("x", maxText+1)
	for _, tt := range []struct {
		what string
		err  error
		want codes.Code
	}{
		{"her id", eve.create(t, &flowctlpb.CreatePipelineRunRequest{RunId: "alices-first", PipelineName: "x"}), codes.AlreadyExists},
		{"the id of flowctl's", eve.create(t, &flowctlpb.CreatePipelineRunRequest{RunId: flowctls, PipelineName: "x"}), codes.AlreadyExists},
		{"its beginning", eve.create(t, &flowctlpb.CreatePipelineRunRequest{RunId: flowctls[:8], PipelineName: "x"}), codes.AlreadyExists},
		{"no name", eve.create(t, &flowctlpb.CreatePipelineRunRequest{RunId: "nameless"}), codes.InvalidArgument},
		{"a long id", eve.create(t, &flowctlpb.CreatePipelineRunRequest{RunId: long[:maxID+1], PipelineName: "x"}), codes.ResourceExhausted},
		{"a long name", eve.create(t, &flowctlpb.CreatePipelineRunRequest{PipelineName: long}), codes.ResourceExhausted},
		{"a long component", eve.create(t, &flowctlpb.CreatePipelineRunRequest{PipelineName: "x", ComponentIds: []string{long[:maxID+1]}}), codes.ResourceExhausted},
		{"many components", eve.create(t, &flowctlpb.CreatePipelineRunRequest{PipelineName: "x", ComponentIds: make([]string, maxEntries+1)}), codes.ResourceExhausted},
		{"an update of hers", eve.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "alices-first", Status: flowctlpb.RunStatus_RUN_STATUS_FAILED}), codes.PermissionDenied},
		{"an operator's update of hers", ops.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "alices-first"}), codes.PermissionDenied},
		{"an update of flowctl's", eve.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: flowctls}), codes.PermissionDenied},
		{"an operator's update of flowctl's", ops.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: flowctls}), codes.PermissionDenied},
		{"an update of none", eve.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "none"}), codes.NotFound},
		{"an update without an id", eve.update(t, &flowctlpb.UpdatePipelineRunRequest{}), codes.InvalidArgument},
		{"a status that there is not", alice.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "alices-first", Status: 77}), codes.InvalidArgument},
		{"a long error", alice.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "alices-first", Error: long}), codes.ResourceExhausted},
		{"many metrics", alice.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "alices-first", Metrics: &flowctlpb.RunMetrics{ComponentMetrics: manyMetrics()}}), codes.ResourceExhausted},
	} {
		wantCode(t, tt.what, tt.err, tt.want)
	}
	_, err := eve.stop(t.Context(), "alices-first")
	wantCode(t, "a stop of hers", err, codes.PermissionDenied)
	wantEqual(t, "hers", fmt.Sprint(get(alice.runs(t.Context(), &flowctlpb.ListPipelineRunsRequest{PipelineName: "hers"}))(t)), "[hers RUN_STATUS_STARTING 0]")
	p.stop()
}

// Callers keep records of their own runs, which nobody else changes, and which change none of flowctl's.
func TestPipelineRuns_OfCallers(t *testing.T) {
	t.Parallel()
	home, p, as := runWithCallers(t)
	alice, eve, ops := as("alice"), as("eve"), as("ops")
	ctx := t.Context()
	flowctls := get(eve.legacy.ListPipelineRuns(ctx, &flowctlpb.ListPipelineRunsRequest{}))(t).Runs[0].RunId
	made := get(alice.legacy.CreatePipelineRun(ctx, &flowctlpb.CreatePipelineRunRequest{RunId: "alices-first", PipelineName: "hers", ConfigYaml: "a: b", ComponentIds: []string{"x", "y"}}))(t)
	wantEqual(t, "what was created", fmt.Sprint(made.RunId, made.PipelineId, runLine(made), made.ConfigYaml, made.ComponentIds), "alices-firsthershers RUN_STATUS_STARTING 0a: b[x y]")
	if nameless := get(alice.legacy.CreatePipelineRun(ctx, &flowctlpb.CreatePipelineRunRequest{PipelineName: "hers"}))(t); len(nameless.RunId) < 8 {
		t.Errorf("without an id it gets %q", nameless.RunId)
	}
	must(t, alice.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "alices-f", Status: flowctlpb.RunStatus_RUN_STATUS_RUNNING, Metrics: &flowctlpb.RunMetrics{EventsProcessed: 7}}))
	must(t, alice.update(t, &flowctlpb.UpdatePipelineRunRequest{RunId: "alices-first", Error: "slow"}))
	for name, c := range map[string]predecessor{"alice": alice, "eve": eve, "ops": ops} {
		run := get(c.run(ctx, "alices-f"))(t)
		wantEqual(t, "hers, as "+name+" sees it", runLine(run), "hers RUN_STATUS_RUNNING 7 slow")
		wantEqual(t, name+" sees its file", run.ConfigYaml != "", name != "eve")
		wantEqual(t, name+" sees that of flowctl's", get(c.run(ctx, flowctls))(t).ConfigYaml != "", name == "ops")
	}
	must(t, alice.create(t, &flowctlpb.CreatePipelineRunRequest{RunId: "alices-second", PipelineName: "hers"}))
	_, err := eve.run(ctx, "alices-")
	wantCode(t, "the beginning of two", err, codes.InvalidArgument)
	if !strings.Contains(fmt.Sprint(err), "ambiguous, 2 runs begin with it: alices-second, alices-first") {
		t.Error(err)
	}
	wantEqual(t, "stopped", runLine(get(alice.stop(ctx, "alices-first"))(t)), "hers RUN_STATUS_STOPPED 7 ended slow")
	wantEqual(t, "stopped by an operator", runLine(get(ops.stop(ctx, "alices-second"))(t)), "hers RUN_STATUS_STOPPED 0 ended")
	_, err = alice.stop(ctx, "alices-first")
	wantCode(t, "a stop of what has ended", err, codes.FailedPrecondition)
	if all := runsOf(t, home); len(all) != 1 || all[0].ID != flowctls || all[0].State != runRunning {
		t.Errorf("flowctl's own record: %+v", all)
	}
	wantEqual(t, "flowctl's own", runLine(get(ops.stop(ctx, flowctls))(t)), "test RUN_STATUS_RUNNING 0")
	p.exit(exitOK)
}

func manyMetrics() map[string]*flowctlpb.ComponentMetrics {
	out := make(map[string]*flowctlpb.ComponentMetrics)
	for i := range maxEntries + 1 {
		out[fmt.Sprint(i)] = &flowctlpb.ComponentMetrics{}
	}
	return out
}

// Of callers' records the oldest that has ended makes room, else the oldest, by their number and by their size.
func TestPipelineRuns_CallersHaveBounds(t *testing.T) {
	t.Parallel()
	c := predecessor{startPlane(t, testRegistry())}
	create := func(id, file string) {
		t.Helper()
		get(c.legacy.CreatePipelineRun(t.Context(), &flowctlpb.CreatePipelineRunRequest{RunId: id, PipelineName: "p", ConfigYaml: file}))(t)
	}
	ids := func() (ids []string) {
		t.Helper()
		for _, r := range get(c.legacy.ListPipelineRuns(t.Context(), &flowctlpb.ListPipelineRunsRequest{Limit: -1}))(t).Runs {
			ids = append(ids, r.RunId)
		}
		slices.Reverse(ids)
		return ids
	}
	for i := range maxCallerRuns {
		create(fmt.Sprintf("run-%03d", i), "")
	}
	get(c.stop(t.Context(), "run-002"))(t)
	create("one-more", "")
	create("another", "")
	got := ids()
	wantEqual(t, "records", len(got), maxCallerRuns)
	wantEqual(t, "the first and the last", fmt.Sprint(got[:3], got[maxCallerRuns-2:]), "[run-001 run-003 run-004] [one-more another]")
	if n := len(get(c.runs(t.Context(), &flowctlpb.ListPipelineRunsRequest{}))(t)); n != defaultRuns {
		t.Errorf("a list without a limit has %d", n)
	}

	const large = 100 << 10
	for i := range 12 {
		create(fmt.Sprint("large-", i), strings.Repeat("x", large))
	}
	wantEqual(t, "large ones", fmt.Sprint(ids()), fmt.Sprint([]string{"large-2", "large-3", "large-4", "large-5", "large-6", "large-7", "large-8", "large-9", "large-10", "large-11"}))
	text := strings.Repeat("x", maxID-3)
	metrics := manyMetrics()
	clear(metrics)
	for i := range maxEntries {
		metrics[fmt.Sprintf("%03d%s", i, text)] = &flowctlpb.ComponentMetrics{}
	}
	get(c.legacy.UpdatePipelineRun(t.Context(), &flowctlpb.UpdatePipelineRunRequest{RunId: "large-2", Metrics: &flowctlpb.RunMetrics{ComponentMetrics: metrics}}))(t)
	wantEqual(t, "once one grows", fmt.Sprint(ids()[:2]), "[large-2 large-4]")
}
