// The commands that have a running flowctl do something: restart, reload and stop; and logs.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// restartedComponent is what restart -json prints of a component.
type restartedComponent struct {
	ID        string   `json:"id"`
	Ready     bool     `json:"ready"` // or completed
	State     string   `json:"state,omitempty"`
	Cause     string   `json:"cause,omitempty"`      // why it is not ready
	LastLines []string `json:"last_lines,omitempty"` // of one that has failed
}

// restartComponents restarts the components ids of the pipeline that o names, or of the only one. With
// wait it returns an *exitError unless all come to be ready again.
func restartComponents(o listOptions, ids []string, wait bool) error {
	client, err := o.one()
	if err != nil {
		return err
	}
	defer client.conn.Close()
	out, err := operatorv1.NewOperatorClient(client.conn).Restart(context.Background(), &operatorv1.RestartRequest{Ids: ids, Wait: wait}, grpc.WaitForReady(false))
	if err != nil {
		return o.refused(client.endpoint, "restart", err)
	}
	all := restartedOf(out.GetComponents())
	switch {
	case o.json:
		err = writeJSON(os.Stdout, all, true)
	case wait:
		return printRestarted(all)
	default:
		err = printAnswer("restarting " + enumerate(ids) + "\n")
	}
	if err == nil && wait && notReady(all) != nil {
		err = &exitError{code: exitFailed}
	}
	return err
}

func restartedOf(components []*operatorv1.Restarted) (all []restartedComponent) {
	for _, c := range components {
		one := restartedComponent{ID: c.GetId(), Ready: c.GetReady(), State: c.GetState(), Cause: c.GetCause()}
		for _, line := range c.GetLastLines() {
			one.LastLines = append(one.LastLines, strings.TrimSuffix(string(line), "\r"))
		}
		all = append(all, one)
	}
	return all
}

// printRestarted prints which components are ready again. It returns an *exitError that says what has
// happened to the others.
func printRestarted(all []restartedComponent) error {
	var ready []string
	for _, c := range all {
		if c.Ready {
			ready = append(ready, printable(c.ID))
		}
	}
	if len(ready) > 0 {
		if err := printAnswer("restarted " + enumerate(ready) + "\n"); err != nil {
			return err
		}
	}
	return notReady(all)
}

// notReady returns an *exitError that says what has happened to those that are not ready, nil if there are none.
func notReady(all []restartedComponent) error {
	var failed strings.Builder
	for _, c := range all {
		switch {
		case c.Ready:
			continue
		case c.State == procFailed.String():
			fmt.Fprintf(&failed, "component %s failed: %s\n", printable(c.ID), printable(c.Cause))
		default:
			fmt.Fprintf(&failed, "component %s is not ready: %s\n", printable(c.ID), printable(c.Cause))
		}
		if len(c.LastLines) > 0 {
			fmt.Fprintf(&failed, "the last lines of %s:\n", printable(c.ID))
		}
		for _, line := range c.LastLines {
			fmt.Fprintf(&failed, "  %s\n", printable(line))
		}
	}
	if failed.Len() > 0 {
		return &exitError{code: exitFailed, err: errors.New(strings.TrimSuffix(failed.String(), "\n"))}
	}
	return nil
}

// reloadRun reloads the pipeline that o names, or the only one, by file unless that is "". With wait it
// returns an *exitError unless all that this brings comes to be ready.
func reloadRun(o listOptions, file string, wait bool) error {
	client, err := o.one()
	if err != nil {
		return err
	}
	defer client.conn.Close()
	ctx := context.Background()
	if !wait {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, reloadTime)
		defer cancel()
	}
	out, err := operatorv1.NewOperatorClient(client.conn).Reload(ctx, &operatorv1.ReloadRequest{File: file, Wait: wait}, grpc.WaitForReady(false))
	if err != nil {
		return o.refused(client.endpoint, "reload", err)
	}
	brought := restartedOf(out.GetComponents())
	if !o.json {
		return cmp.Or(printAnswer(reloadText(out)+"\n"), notReady(brought))
	}
	err = writeJSON(os.Stdout, reloadAnswer{notNil(out.GetAdded()), notNil(out.GetRemoved()), notNil(out.GetRestarted()), out.GetUnchanged(), notNil(brought)}, true)
	if err == nil && notReady(brought) != nil {
		err = &exitError{code: exitFailed}
	}
	return err
}

// reloadAnswer is what reload -json prints.
type reloadAnswer struct {
	Added      []string             `json:"added"`
	Removed    []string             `json:"removed"`
	Restarted  []string             `json:"restarted"`
	Unchanged  int64                `json:"unchanged"`
	Components []restartedComponent `json:"components"` // how those that were added and restarted are; none with -wait=false
}

// notNil returns list, as JSON shows it: empty where there is nothing in it.
func notNil[T any](list []T) []T {
	return append([]T{}, list...)
}

// stopRun stops the pipeline that o names, or the only one, and returns when its flowctl has ended.
func stopRun(o listOptions) error {
	client, err := o.one()
	if err != nil {
		return err
	}
	defer client.conn.Close()
	var end *os.File
	if client.run.path != "" { // else it runs elsewhere, or this user cannot see
		if end, err = client.run.openEnd(); err != nil {
			return &exitError{code: exitPlane, err: err}
		}
		defer end.Close()
	}
	_, err = operatorv1.NewOperatorClient(client.conn).Stop(context.Background(), &operatorv1.StopRequest{}, grpc.WaitForReady(false))
	if err != nil && !hasEnded(end) { // somebody else can have killed it meanwhile
		return o.refused(client.endpoint, "stop", err)
	}
	if end != nil {
		if err := awaitEnd(end); err != nil {
			return &exitError{code: exitFailed, err: fmt.Errorf("%s is stopping; it cannot be waited for: %v", client.run.Pipeline, err)}
		}
	}
	if o.json {
		return writeJSON(os.Stdout, struct {
			Pipeline string `json:"pipeline,omitempty"`
			Endpoint string `json:"endpoint"`
		}{client.run.Pipeline, client.endpoint}, true)
	}
	return printAnswer("stopped " + printable(cmp.Or(client.run.Pipeline, "the pipeline at "+client.endpoint)) + "\n")
}

// hasEnded tells whether the process whose run file is end has ended. Of nil that is not known.
func hasEnded(end *os.File) bool {
	if end == nil {
		return false
	}
	_, live, err := lockHolder(end)
	return err == nil && !live
}

// logsOptions are the flags and arguments of logs.
type logsOptions struct {
	listOptions
	ids    []string // none for all components
	last   int      // so many lines that have come before
	follow bool
}

// showLogs prints lines of the pipeline that o names, or of the only one: the last, and with o.follow what
// comes until it has stopped, or a signal.
func showLogs(o logsOptions) error {
	client, err := o.one()
	if err != nil {
		return withLogFiles(err, o.ids)
	}
	defer client.conn.Close()
	ctx, cancel := untilSignal(false)
	defer cancel()
	in := &operatorv1.LogsRequest{Ids: o.ids, Last: int64(o.last), Follow: o.follow}
	stream, err := operatorv1.NewOperatorClient(client.conn).Logs(ctx, in, grpc.WaitForReady(false), grpc.MaxCallRecvMsgSize(maxMore))
	var shown *console
	var files string
	for err == nil {
		var out *operatorv1.LogsResponse
		if out, err = stream.Recv(); err != nil {
			break
		}
		if shown == nil {
			shown = o.console(out.GetIds())
			if len(out.GetLogFiles()) > 0 {
				files = "; log files: " + printable(enumerate(out.GetLogFiles()))
			}
		}
		if failed := showPrinted(shown, out); errors.Is(failed, syscall.EPIPE) {
			return nil // its reader has had enough
		} else if failed != nil {
			return &exitError{code: exitFailed, err: failed}
		}
	}
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, io.EOF):
		if o.follow {
			complain(errors.New("the pipeline has stopped" + files))
		}
		return nil
	case shown != nil && status.Code(err) == codes.Unavailable:
		return &exitError{code: exitPlane, err: fmt.Errorf("%v%s", o.ended(client.endpoint, true, err), files)}
	}
	return o.refused(client.endpoint, "show", err)
}

// console returns what shows lines of the components ids as the run itself does.
func (o *logsOptions) console(ids []string) *console {
	format := formatText
	if o.json {
		format = formatJSON
	}
	if slices.Contains(o.ids, ownID) {
		ids = append(ids, ownID)
	}
	for i := range ids {
		ids[i] = printable(ids[i])
	}
	c := newConsole(blockingFile{os.Stdout}.Write, format, time.TimeOnly, useColours(os.Stdout), ids)
	c.terminal = isTerminal(os.Stdout)
	return c
}

// showPrinted writes what a message of logs brings.
func showPrinted(c *console, out *operatorv1.LogsResponse) error {
	c.buf = c.buf[:0]
	if missed, now := out.GetMissed(), time.Now(); missed > 0 && c.json {
		line, err := json.Marshal(struct {
			Time   time.Time `json:"time"`
			Missed int64     `json:"missed"`
		}{now, missed})
		if err != nil {
			return err
		}
		c.buf = append(append(c.buf, line...), '\n')
	} else if missed > 0 {
		c.add(ownID)
		c.appendText(ownID, fmt.Appendf(nil, "%d lines are missed here: they were not read in time\n", missed), now)
	}
	for _, p := range out.GetPrinted() {
		id, at := printable(p.GetId()), p.GetTime().AsTime().Local()
		c.add(id) // a reload may have brought it
		if c.json {
			c.appendJSON(id, p.GetStream(), p.GetLines(), at)
		} else {
			c.appendText(id, p.GetLines(), at)
		}
	}
	_, err := c.write(c.buf)
	return err
}

// withLogFiles adds to err, which says that no pipeline answers, the log files that one has left where they
// are by default.
func withLogFiles(err error, ids []string) error {
	var found []string
	for _, dir := range []string{logsDirectory(), "logs"} {
		if dir == "" {
			continue
		}
		names, _ := filepath.Glob(filepath.Join(dir, "*.log")) // fails for a pattern alone
		for _, name := range names {
			if len(ids) == 0 || slices.Contains(ids, strings.TrimSuffix(filepath.Base(name), ".log")) {
				found = append(found, name)
			}
		}
	}
	if exit, ok := errors.AsType[*exitError](err); ok && len(found) > 0 {
		exit.err = fmt.Errorf("%w\nlog files are left: %s", exit.err, printable(enumerate(found)))
	}
	return err
}
