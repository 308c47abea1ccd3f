// The command wait: it follows a control plane until that answers, or components are ready, or done.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

const (
	findPause  = 200 * time.Millisecond // between two looks for a pipeline that is yet to start here
	retryPause = 100 * time.Millisecond // between two streams, where the control plane ends them at once
)

// waitOptions are the flags and arguments of wait.
type waitOptions struct {
	listOptions
	ids     []string // none for all
	until   string   // untilUp, untilReady or untilDone
	timeout time.Duration
}

// waiter is one wait. Streams of one control plane after another tell it how components are.
type waiter struct {
	waitOptions
	reached bool
	seen    listedPipeline // of which that is so
	waited  []string       // ids of its components that were waited for
	missing string         // what is waited for
	told    string         // what a person was told of that
}

// waitFor returns once the components that o names are ready, or done, or the control plane is up. Control planes that are not there yet
// are waited for, also those that go. It returns an *exitError where that cannot come, or when the time is over.
func waitFor(o waitOptions) error {
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if o.timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, o.timeout)
	}
	defer cancel()
	w := &waiter{waitOptions: o}
	w.wait = true
	for {
		err := w.follow(ctx)
		switch fatal, isFatal := errors.AsType[*exitError](err); {
		case w.reached:
			return w.print()
		case isFatal:
			return fatal
		case ctx.Err() != nil:
			return &exitError{code: exitNotReady, err: fmt.Errorf("-timeout %s is over: %s", o.timeout, cmp.Or(w.missing, err.Error()))}
		}
		w.tell(err.Error(), "waiting: "+firstLine(err.Error()))
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
		}
	}
}

// follow follows one control plane until what is waited for has come, and w.reached is set, or its stream ends. It
// returns an *exitError where another stream would not help.
func (w *waiter) follow(ctx context.Context) error {
	run, err := w.find(ctx)
	if err != nil {
		return err
	}
	clients, errs := w.connect([]runInfo{run})
	if len(errs) > 0 {
		return &exitError{code: exitPlane, err: errs[0]}
	}
	c := clients[0]
	defer c.conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	came := false
	in := &operatorv1.WatchRequest{Follow: true, Heartbeats: w.until == untilDone} // by which edges are told of
	err = c.follow(ctx, in, func(out *operatorv1.WatchResponse) {
		came = true
		if c.take(out); !c.complete || context.Cause(ctx) != nil {
			return
		}
		if err := w.judge(c); err != nil || w.reached {
			cancel(err)
		}
	})
	if fatal, ok := errors.AsType[*exitError](context.Cause(ctx)); ok {
		return fatal
	}
	switch status.Code(err) {
	case codes.Unimplemented:
		return &exitError{code: exitPlane, err: fmt.Errorf("the control plane at %s has no operator service, which wait needs", c.endpoint)}
	case codes.OK, codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted:
		return w.ended(c.endpoint, came, err)
	}
	return &exitError{code: exitPlane, err: w.ended(c.endpoint, came, err)}
}

// find returns the control plane to ask: that of -endpoint, which may not listen yet, else the one that runs here.
// Several are an *exitError.
func (w *waiter) find(ctx context.Context) (runInfo, error) {
	if w.endpoint != "" {
		runs, _, err := w.runs(false)
		if err != nil {
			return runInfo{}, &exitError{code: exitPlane, err: err}
		}
		return runs[0], nil
	}
	nobody := "no pipeline runs here yet"
	if w.pipeline != "" {
		nobody = fmt.Sprintf("no pipeline %q runs here yet", clip(w.pipeline))
	}
	for {
		found, _, err := findRuns()
		if err != nil {
			return runInfo{}, &exitError{code: exitPlane, err: err}
		}
		found = slices.DeleteFunc(found, func(r runInfo) bool { return w.pipeline != "" && r.Pipeline != w.pipeline })
		if own := slices.DeleteFunc(slices.Clone(found), func(r runInfo) bool { return r.ofAnother() }); len(own) > 0 {
			found = own
		}
		if len(found) > 1 {
			var names []string
			for _, r := range found {
				names = append(names, printable(cmp.Or(r.Pipeline, r.Endpoint)))
			}
			return runInfo{}, &exitError{code: exitPlane, err: fmt.Errorf("%d control planes run here: name one by -pipeline or -endpoint: %s", len(found), enumerate(names))}
		}
		if len(found) == 1 && found[0].Endpoint != "" {
			return found[0], nil
		}
		w.tell(nobody, "waiting: "+nobody)
		select {
		case <-time.After(findPause):
		case <-ctx.Done():
			return runInfo{}, errors.New(nobody)
		}
	}
}

// tell keeps what is waited for, and tells a person what of it is new.
func (w *waiter) tell(missing, short string) {
	if w.missing = missing; short != w.told {
		w.told = short
		complain(errors.New(short))
	}
}

// judge looks whether what c has been told is what is waited for. It returns an *exitError for an id that the
// pipeline does not have.
func (w *waiter) judge(c *listClient) error {
	all, _ := c.listed("")
	if w.until == untilUp {
		w.seen, w.reached = all, true
		return nil
	}
	ended := endedIn(all.Edges)
	var ids, missing, why []string
	lacks := func(id, cause string) {
		missing, why = append(missing, printable(id)), append(why, printable(id+" ("+cause+")"))
	}
	for _, id := range w.ids {
		if slices.ContainsFunc(all.Components, func(l *listedComponent) bool { return l.isOf(&all) && l.is(id) }) {
			continue
		}
		if all.Pipeline != "" {
			return usageErrorf("wait", "no component %q is in pipeline %s: there is %s", clip(id), clean(all.Pipeline), enumerate(all.ids()))
		}
		lacks(id, "not registered")
	}
	for _, l := range all.Components {
		if !l.isOf(&all) || len(w.ids) > 0 && !slices.ContainsFunc(w.ids, l.is) || len(w.ids) == 0 && w.until == untilDone && l.Type == roleService.String() {
			continue
		}
		ids = append(ids, l.ID)
		if w.until == untilReady && !l.isReady() || w.until == untilDone && l.State != procCompleted.String() && !ended[l.ID] {
			lacks(l.ID, cmp.Or(l.Cause, l.State, l.Health))
		}
	}
	if len(w.ids) == 0 && len(missing) == 0 && w.until == untilReady && !all.Ready { // programs that do not register are to run for a while
		lacks(strings.TrimSpace("pipeline "+all.Pipeline), all.Status)
	}
	if w.seen, w.waited, w.reached = all, ids, len(missing) == 0; !w.reached {
		w.tell("waiting for "+enumerate(why), "waiting for "+enumerate(missing))
	}
	return nil
}

// isOf tells whether l counts in p: in a pipeline, what is of that.
func (l *listedComponent) isOf(p *listedPipeline) bool { return l.InPipeline || p.Pipeline == "" }

// ids returns those of the components that count in p, fit to be shown.
func (p *listedPipeline) ids() (ids []string) {
	for _, l := range p.Components {
		if l.isOf(p) {
			ids = append(ids, printable(l.ID))
		}
	}
	return ids
}

// isReady tells whether what waits for l could start now.
func (l *listedComponent) isReady() bool {
	return l.Healthy && slices.Contains([]string{"", procReady.String(), procCompleted.String()}, l.State)
}

// endedIn tells of each component along whose inputs flowctl moves events whether all those have ended.
func endedIn(edges []listedEdge) map[string]bool {
	ended := make(map[string]bool)
	for _, e := range edges {
		for _, id := range []string{e.From, e.To} {
			before, known := ended[id]
			ended[id] = (before || !known) && e.State == streamEnded.String()
		}
	}
	return ended
}

// print prints what was waited for.
func (w *waiter) print() error {
	if w.json {
		return writeJSON(os.Stdout, struct {
			Pipeline   string   `json:"pipeline,omitempty"`
			Endpoint   string   `json:"endpoint"`
			Until      string   `json:"until"`
			Components []string `json:"components"`
		}{w.seen.Pipeline, w.seen.Endpoint, w.until, notNil(w.waited)}, true)
	}
	var ids []string
	for _, id := range w.waited {
		ids = append(ids, printable(id))
	}
	return printAnswer(strings.TrimSuffix(w.until+": "+enumerate(ids), ": ") + "\n")
}
