package main

// Requests of operators to the loop. One is to take over the pipeline file as it is now: who asks reads
// the file, and asks the engine for new images, because that may take long; the loop gets the pipeline.

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"time"
)

const reloadDiskTime = 5 * time.Second // to read the pipeline file: it may be large, and the end of flowctl waits for it

// reloads prepares requests for a reload, and hands these and others to the loop.
type reloads struct {
	file     string                               // the pipeline file; who has the turn may use it
	envFiles []string                             // of -env-file
	read     func(file string) (*Pipeline, error) // reads a pipeline file
	fits     func(p *Pipeline) error              // fails for a pipeline that this run cannot take over
	refresh  func()                               // opens log files anew that others have removed or renamed
	warner   *warner
	engine   *engine // nil for none

	disk     *diskTurn                      // of file
	requests chan *reloadRequest            // to the loop, which answers each
	restarts chan *restartRequest           // the same
	stops    chan struct{}                  // the same, where the answer is the end of ctx
	watch    func(file string, p *Pipeline) // has the files of what was loaded looked at
	turn     chan struct{}                  // has room for the one request that is worked on, so that an older file never comes last
	loaded   *Pipeline                      // what the loop took over last; who has the turn may use it

	ctx     context.Context // ends with the loop
	end     context.CancelFunc
	signals sync.WaitGroup // requests that came as a signal
}

// reloadRequest hands the loop a pipeline, or the reason why there is none. The loop answers by
// result and err, and then closes done.
type reloadRequest struct {
	file     string // that was read
	pipeline *Pipeline
	envFiles map[string]digest // what the env_files of pipeline hold, by path
	result   reloadResult
	err      error
	done     chan struct{}
	brought  *restartRequest // is answered when what was added and restarted is ready or has failed; nil to wait for nothing
}

// restartRequest asks the loop to restart components, or, with reload, to tell when those that a reload has
// brought are ready. The loop answers by results or err, and then closes done.
type restartRequest struct {
	ids     []string
	wait    bool // until all are ready again or have failed
	reload  bool // and until all that a reload stops has ended; await sets it
	results []restartResult
	err     error
	done    chan struct{}
}

// start makes q ready for requests, where p is what runs now.
func (q *reloads) start(p *Pipeline) {
	q.disk = newDiskTurn(reloadDiskTime)
	q.loaded = p
	q.watch(q.file, p)
	q.requests, q.turn, q.restarts = make(chan *reloadRequest), make(chan struct{}, 1), make(chan *restartRequest)
	q.stops = make(chan struct{})
	q.ctx, q.end = context.WithCancel(context.Background())
}

// close refuses requests from now on, and waits for those that came as a signal.
func (q *reloads) close() {
	q.end()
	q.signals.Wait()
}

// requestBySignal is requestReload for a signal: the loop logs what comes of it.
func (q *reloads) requestBySignal() {
	q.signals.Go(func() { _, _ = q.requestReload(q.ctx, "", false) })
}

// requestReload has the loop take over the pipeline file, or file unless that is "", and returns what that
// changes; with wait when that is ready or has failed. An error says what is wrong with the file, or is
// errStopping.
func (q *reloads) requestReload(ctx context.Context, file string, wait bool) (reloadResult, error) {
	request := &reloadRequest{done: make(chan struct{})}
	if wait {
		request.brought = &restartRequest{wait: true, done: make(chan struct{})}
	}
	if err := q.take(ctx, file, request); err != nil || !wait {
		return request.result, err
	}
	select {
	case <-request.brought.done:
		request.result.brought = request.brought.results
		return request.result, nil
	case <-ctx.Done():
		return reloadResult{}, ctx.Err()
	}
}

// take has the loop take over a file by request, in its turn.
func (q *reloads) take(ctx context.Context, file string, request *reloadRequest) error {
	select {
	case q.turn <- struct{}{}:
		defer func() { <-q.turn }()
	case <-ctx.Done():
		return ctx.Err()
	case <-q.ctx.Done():
		return errStopping
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(q.ctx, cancel)()
	q.refresh()
	request.file = cmp.Or(file, q.file)
	request.err = q.prepare(ctx, request)
	switch {
	case q.ctx.Err() != nil:
		return errStopping
	case ctx.Err() != nil: // who has asked has gone
		return ctx.Err()
	}
	select {
	case q.requests <- request:
	case <-q.ctx.Done():
		return errStopping
	}
	<-request.done
	if request.err == nil {
		q.file, q.loaded = request.file, request.pipeline
		q.watch(q.file, q.loaded)
	}
	return request.err
}

// requestRestart has the loop restart the components ids, and returns how they are: at once, or with
// wait when all are ready again or have failed. An error is an *unknownError, errStopping, or says what
// cannot be restarted; then nothing is.
func (q *reloads) requestRestart(ctx context.Context, ids []string, wait bool) ([]restartResult, error) {
	request := &restartRequest{ids: ids, wait: wait, done: make(chan struct{})}
	select {
	case q.restarts <- request:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-q.ctx.Done():
		return nil, errStopping
	}
	select {
	case <-request.done:
		return request.results, request.err
	case <-ctx.Done(): // who has asked has gone
		return nil, ctx.Err()
	}
}

// requestStop asks the loop for the end of the run. With wait it returns when that has come.
func (q *reloads) requestStop(ctx context.Context, wait bool) error {
	stops := q.stops
	for {
		select {
		case stops <- struct{}{}:
			if !wait {
				return nil
			}
			stops = nil
		case <-ctx.Done():
			return ctx.Err()
		case <-q.ctx.Done():
			return nil
		}
	}
}

// prepare reads the pipeline file and its env_files into request, and checks that the pipeline can take
// the place of what runs.
func (q *reloads) prepare(ctx context.Context, request *reloadRequest) error {
	var p *Pipeline
	_, err := q.disk.do(request.file, func() (err error) {
		for _, file := range append([]string{request.file}, q.envFiles...) {
			if fromStandardInput(file) {
				return fmt.Errorf("%s is no plain file, and cannot be read again", file)
			}
		}
		p, err = q.read(request.file)
		return err
	})
	if err != nil { // p may be set yet
		return err
	}
	if now, is := p.Metadata.Name, q.loaded.Metadata.Name; now != is {
		return fmt.Errorf("%s: metadata.name is %q now: a pipeline keeps its name, %q, while it runs", request.file, now, is)
	}
	if err := q.fits(p); err != nil {
		return err
	}
	request.pipeline, request.envFiles = p, make(map[string]digest)
	for _, c := range p.components() {
		for name, path := range c.EnvFiles {
			if _, read := request.envFiles[path]; read {
				continue
			}
			value, err := readEnvFile(q.disk, path)
			if err != nil {
				return fmt.Errorf("%s: component %s: env_files.%s: %v", request.file, c.ID, name, err)
			}
			request.envFiles[path] = sha256.Sum256([]byte(value))
		}
	}
	if err := q.engine.checkNew(ctx, p, q.loaded.images()); err != nil { // what runs does not wait for a pull
		return err
	}
	q.warner.warn(p)
	return nil
}
