package main

// Requests to take over the pipeline file as it is now. The file is read, and the engine is
// asked for new images, in the goroutine of who asks, because that may take long; the loop
// gets the pipeline.

import (
	"context"
	"fmt"
	"os"
	"sync"
)

// reloads prepares requests for a reload and hands them to the loop.
type reloads struct {
	file   string                    // the pipeline file
	name   string                    // of the pipeline
	read   func() (*Pipeline, error) // reads the file
	fits   func(p *Pipeline) error   // fails for a pipeline that this run cannot take over
	engine *engine                   // nil for none

	requests chan reloadRequest // to the loop, which answers each
	turn     chan struct{}      // has room for the one request that is worked on, so that an older file never comes last
	loaded   *Pipeline          // what the loop took over last; who has the turn may use it

	ctx     context.Context // ends with the loop
	end     context.CancelFunc
	signals sync.WaitGroup // requests that came as a signal
}

// reloadRequest hands the loop a pipeline, or the reason why there is none.
type reloadRequest struct {
	pipeline *Pipeline
	err      error
	answer   chan reloadAnswer // has room for it, so that the loop never waits
}

type reloadAnswer struct {
	result reloadResult
	err    error
}

// start makes q ready for requests, where p is what runs now.
func (q *reloads) start(p *Pipeline) {
	q.name, q.loaded = p.Metadata.Name, p
	q.requests, q.turn = make(chan reloadRequest), make(chan struct{}, 1)
	q.ctx, q.end = context.WithCancel(context.Background())
}

// close refuses requests from now on, and waits for those that came as a signal.
func (q *reloads) close() {
	q.end()
	q.signals.Wait()
}

// requestBySignal is requestReload for a signal, whose sender waits for no answer: the loop
// logs what comes of it.
func (q *reloads) requestBySignal() {
	q.signals.Go(func() { _, _ = q.requestReload(q.ctx) })
}

// requestReload has the loop take over the pipeline file, and returns what that changes. An
// error says what is wrong with the file, or is errStopping.
func (q *reloads) requestReload(ctx context.Context) (reloadResult, error) {
	select {
	case q.turn <- struct{}{}:
		defer func() { <-q.turn }()
	case <-ctx.Done():
		return reloadResult{}, ctx.Err()
	case <-q.ctx.Done():
		return reloadResult{}, errStopping
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(q.ctx, cancel)()
	request := reloadRequest{answer: make(chan reloadAnswer, 1)}
	request.pipeline, request.err = q.prepare(ctx)
	switch {
	case q.ctx.Err() != nil:
		return reloadResult{}, errStopping
	case ctx.Err() != nil: // who has asked has gone
		return reloadResult{}, ctx.Err()
	}
	select {
	case q.requests <- request:
	case <-q.ctx.Done():
		return reloadResult{}, errStopping
	}
	answer := <-request.answer
	if answer.err == nil {
		q.loaded = request.pipeline
	}
	return answer.result, answer.err
}

// prepare reads the pipeline file and checks that it can take the place of what runs.
func (q *reloads) prepare(ctx context.Context) (*Pipeline, error) {
	if info, err := os.Stat(q.file); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no plain file, and cannot be read again", q.file)
	}
	p, err := q.read()
	if err != nil {
		return nil, err
	}
	if p.Metadata.Name != q.name {
		return nil, fmt.Errorf("%s: metadata.name is %q now: a pipeline keeps its name, %q, while it runs", q.file, p.Metadata.Name, q.name)
	}
	if err := q.fits(p); err != nil {
		return nil, err
	}
	used := make(map[string]bool) // what runs does not wait for a pull
	for _, image := range q.loaded.images() {
		used[image] = true
	}
	return p, q.engine.checkNew(ctx, p, used)
}
