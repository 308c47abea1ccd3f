package main

// Requests to restart components, from when the loop takes them until it answers.

import (
	"cmp"
	"log/slog"
	"slices"
	"time"
)

// restarts are the requests that wait for an answer. The loop of the run owns them.
type restarts struct {
	sup     *supervisor
	log     *slog.Logger
	waiting []*restartRequest
}

// begin begins to restart the components of request. On an error nothing has changed.
func (r *restarts) begin(request *restartRequest) {
	if r.sup.stopping {
		request.err = errStopping
	}
	for _, id := range request.ids {
		request.err = cmp.Or(request.err, r.sup.mayRestart(id))
	}
	if request.err != nil {
		close(request.done)
		return
	}
	r.log.Info("restart requested", "components", enumerate(request.ids))
	for _, id := range request.ids {
		_ = r.sup.restart(id) // it may
	}
	r.waiting = append(r.waiting, request)
}

// await answers request when the components ids are ready or have failed, and what leaves has ended.
func (r *restarts) await(request *restartRequest, ids []string) {
	request.ids, request.reload = ids, true
	r.waiting = append(r.waiting, request)
}

// answer answers the requests whose components are all ready again or have failed, and in a run that stops
// all.
func (r *restarts) answer(now time.Time) {
	r.waiting = slices.DeleteFunc(r.waiting, func(request *restartRequest) bool {
		if request.reload && r.sup.pending != nil && !r.sup.stopping {
			return false
		}
		var results []restartResult
		for _, id := range request.ids {
			result, settled := r.outcome(id, now)
			if !settled && request.wait && !r.sup.stopping {
				return false
			}
			results = append(results, result)
		}
		request.results = results
		close(request.done)
		return true
	})
}

// outcome returns how the component id is after its restart, and whether that is what became of it. One
// that merely runs has to live for a moment: a program that dies at its start was never ready.
func (r *restarts) outcome(id string, now time.Time) (out restartResult, settled bool) {
	p := r.sup.byID[id]
	if p == nil {
		return restartResult{id: id, cause: "a reload has taken it out"}, true
	}
	out = restartResult{id: id, state: p.state.String(), cause: "it is " + p.state.String()}
	switch {
	case p.failure != nil:
		out.cause, out.tail = p.failure.reason, p.failure.tail
		return out, true
	case p.retiring:
		out.cause = "its former process has not ended"
	case r.sup.failedBefore(p) != "":
		out.cause = "it waits for " + r.sup.failedBefore(p) + ", which has failed"
		return out, true
	case p.state == procCompleted, p.state == procReady && p.health.ok && !now.Before(p.settledAt()):
		out.ready, out.cause = true, ""
		return out, true
	case p.state == procReady:
		out.cause = p.health.cause
	case p.state == procBackoff && p.status != nil:
		out.cause = "it is started again: " + describeExit(*p.status)
	}
	if r.sup.stopping {
		out.cause = "the pipeline is stopping"
	}
	return out, false
}
