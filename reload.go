package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// reloadPatience is how long the command reload waits for an answer. flowctl reads a
// file and answers, so more is a disk or a control plane that hangs.
const reloadPatience = 30 * time.Second

// reloadRequest asks the loop for a reload.
type reloadRequest struct {
	answer chan reloadAnswer // holds one, so that the loop never waits
}

type reloadAnswer struct {
	reloaded reloaded
	err      error
}

// requestReload has the loop reload the pipeline file. It is called by the operator
// service.
func (r *run) requestReload(ctx context.Context) (reloaded, error) {
	request := reloadRequest{make(chan reloadAnswer, 1)}
	select {
	case r.reloads <- request:
	case <-r.over:
		return reloaded{}, errStopping
	case <-ctx.Done():
		return reloaded{}, ctx.Err()
	}
	answer := <-request.answer
	return answer.reloaded, answer.err
}

var errStopping = errors.New("the pipeline is stopping")

// reload reads the pipeline file again and begins what has changed in it. What is
// wrong is an error, after which everything is as before.
func (r *run) reload() (reloaded, error) {
	if r.sup.stopping {
		return reloaded{}, errStopping
	}
	if r.ready { // before that systemd waits for READY=1 alone
		notify(r.log, daemon.SdNotifyReloading, daemon.SdNotifyMonotonicUsec())
		defer notify(r.log, daemon.SdNotifyReady)
	}
	out, err := r.applyFile()
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			r.log.Error("cannot reload", "err", strings.TrimSuffix(line, "\n"))
		}
		return out, err
	}
	r.log.Info("reloaded", "file", r.flags.file, "added", enumerate(out.added), "removed", enumerate(out.removed), "restarted", enumerate(out.restarted), "unchanged", out.unchanged)
	return out, nil
}

func (r *run) applyFile() (reloaded, error) {
	if info, err := os.Stat(r.flags.file); err == nil && !info.Mode().IsRegular() {
		return reloaded{}, fmt.Errorf("%s is no plain file, and cannot be read again", r.flags.file) // to open a FIFO would hold the loop
	}
	p, err := r.flags.read()
	if err != nil {
		return reloaded{}, err
	}
	if p.Metadata.Name != r.about.name {
		return reloaded{}, fmt.Errorf("%s: metadata.name is %q now: a pipeline keeps its name, %q, while it runs", r.flags.file, p.Metadata.Name, r.about.name)
	}
	if ids := p.speakTLS(false); r.flags.tls.cert != "" && !r.entrance && len(ids) > 0 {
		return reloaded{}, fmt.Errorf("%s: %s would need a listener without TLS, which there is not: restart flowctl, or set \"tls\": true", r.flags.file, enumerate(ids))
	}
	if err := cmp.Or(r.sup.settings.checkReach(p), r.flags.engine.checkNew(p, r.sup.procs)); err != nil {
		return reloaded{}, err
	}
	if r.files != nil {
		for _, c := range p.components() {
			if err := r.files.add(c.ID); err != nil {
				return reloaded{}, err
			}
		}
	}
	for _, c := range p.components() {
		if r.console.add(c.ID); r.journal != nil {
			r.journal.add(c.ID)
		}
	}
	out, err := r.sup.reload(p)
	for _, p := range r.sup.procs {
		if p.leaving {
			delete(r.unhealthy, p.ID)
		}
	}
	return out, err
}

// syncMembers tells the registry which components there are, when that has changed.
func (r *run) syncMembers(now time.Time) {
	if r.edition == r.sup.edition {
		return
	}
	r.edition = r.sup.edition
	r.registry.setMembers(r.sup.members(), now)
	for id := range r.conditions {
		if r.sup.byID[id] == nil {
			delete(r.conditions, id)
			delete(r.unhealthy, id)
		}
	}
}

// members is what the registry is to know of the components.
func (s *supervisor) members() []member {
	var out []member
	for _, p := range s.procs {
		out = append(out, member{p.Component, s.ports[p.ID].number})
	}
	return out
}

// underSystemd tells whether sig is the SIGHUP that asks a service for a reload, and
// not that of a terminal that closes, which ends a run.
func underSystemd(sig os.Signal) bool {
	service := os.Getenv("NOTIFY_SOCKET") != "" || os.Getenv("SYSTEMD_EXEC_PID") == strconv.Itoa(os.Getpid())
	return sig == syscall.SIGHUP && service
}

func reloadCommand(args []string) error {
	var o listOptions
	fs := flag.NewFlagSet("reload", flag.ContinueOnError)
	o.define(fs)
	rest, err := parseFlags(fs, args, 1)
	if err != nil {
		return err
	}
	if err := o.check(fs, rest); err != nil {
		return err
	}
	o.wait = true
	name := ""
	if len(rest) > 0 {
		name = rest[0]
	}
	if name != "" && o.endpoint != "" {
		return &usageError{"reload", fmt.Errorf("-endpoint %q and the pipeline %q: name one of them", o.endpoint, name)}
	}
	runs, _, err := o.runs(true)
	if err == nil && o.endpoint == "" {
		runs, err = choosePipeline(runs, name)
	}
	if err != nil {
		return &exitError{exitPlane, err}
	}
	clients, errs := o.connect(runs)
	if len(errs) > 0 {
		return &exitError{exitPlane, errors.Join(errs...)}
	}
	client := clients[0]
	defer client.close()
	ctx, cancel := context.WithTimeout(context.Background(), reloadPatience)
	defer cancel()
	out, err := operatorv1.NewOperatorClient(client.conn).Reload(ctx, &operatorv1.ReloadRequest{}, grpc.WaitForReady(false))
	switch status.Code(err) {
	case codes.OK:
	case codes.FailedPrecondition:
		return &exitError{exitUsage, errors.New(status.Convert(err).Message())}
	case codes.Unimplemented:
		return &exitError{exitPlane, fmt.Errorf("the control plane at %s has no pipeline to reload", client.endpoint)}
	default:
		return &exitError{exitPlane, o.noAnswer(client.endpoint, err)}
	}
	fmt.Println(reloadText(out))
	return nil
}

// choosePipeline returns the one of runs that is the pipeline of that name, or without
// a name, in ExecReload= of a unit, its main process (systemd.exec(5)), or the only one.
func choosePipeline(runs []runInfo, name string) ([]runInfo, error) {
	runs = slices.DeleteFunc(runs, func(r runInfo) bool { return r.Pipeline == "" })
	main, _ := strconv.Atoi(os.Getenv("MAINPID"))
	var names []string
	for i, run := range runs {
		names = append(names, run.Pipeline)
		if name == run.Pipeline || name == "" && run.PID == main {
			return runs[i : i+1], nil
		}
	}
	switch {
	case name == "" && main != 0:
		return nil, fmt.Errorf("process %d, the unit's (MAINPID), is no pipeline that runs here", main)
	case len(runs) == 0:
		return nil, errors.New("no pipeline is running here")
	case name != "":
		return nil, fmt.Errorf("no pipeline %q is running, only %s", name, enumerate(names))
	case len(runs) > 1:
		return nil, fmt.Errorf("%d pipelines are running: name one of %s", len(names), enumerate(names))
	}
	return runs, nil
}

// reloadText says what a reload has come to.
func reloadText(out *operatorv1.ReloadResponse) string {
	var parts []string
	for _, p := range []struct {
		what string
		ids  []string
	}{{"added", out.GetAdded()}, {"removed", out.GetRemoved()}, {"restarted", out.GetRestarted()}} {
		if len(p.ids) > 0 {
			parts = append(parts, p.what+" "+clean(enumerate(p.ids)))
		}
	}
	if len(parts) == 0 {
		return "reloaded: nothing has changed"
	}
	return fmt.Sprintf("reloaded: %s; %d unchanged", strings.Join(parts, ", "), out.GetUnchanged())
}
