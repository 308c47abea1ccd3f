package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"github.com/withobsrvr/flowctl/testdata/demo/feed"
)

// A component that is asked to stop goes on until its input has ended, so that
// nothing in flight is lost, but not for ever: flowctl kills after 10 s. What
// still waits for input when inputGrace has passed ends its own feed; what waits
// for a reader, or reads at the far end, has until outputGrace.
const (
	inputGrace  = 5 * time.Second
	outputGrace = 8 * time.Second
)

// closeGrace is how long a reader has to take the status that ends its stream.
const closeGrace = 2 * time.Second

var (
	errStopped    = errors.New("did not end in time after the request to stop")
	errReaderGone = errors.New("the reader is gone")
)

// graceful returns a context that is cancelled, with errStopped as its cause,
// once grace has passed since stop was done.
func graceful(stop context.Context, grace time.Duration) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	context.AfterFunc(stop, func() { time.AfterFunc(grace, func() { cancel(errStopped) }) })
	return ctx, cancel
}

type feedStream = grpc.BidiStreamingServer[feed.Ack, feed.Record]

// outlet hands a component's records to its one reader.
type outlet struct {
	feed.UnimplementedFeedServer
	taken   atomic.Bool     // by a reader, or by a stop that came before any
	streams chan feedStream // the reader's, lent to the main goroutine
	closed  chan struct{}   // the main goroutine is done with it, with err
	err     error

	stream feedStream
	ctx    context.Context // see graceful
}

// serve listens, registers info with that endpoint and waits for the reader,
// then runs the component's work: only a pipeline that is complete reads
// anything, so one that is stopped while it starts has nothing in flight. It
// returns nil without work if stop is done before a reader comes.
func serve(stop context.Context, info *flowctlv1.ComponentInfo, work func(*membership, *outlet) error) (err error) {
	listener, endpoint, err := listen()
	if err != nil {
		return err
	}
	out := &outlet{streams: make(chan feedStream, 1), closed: make(chan struct{})}
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	feed.RegisterFeedServer(server, out)
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); err != nil && err != grpc.ErrServerStopped {
			fmt.Fprintf(os.Stderr, "feed: %v\n", err)
		}
	})
	defer func() {
		out.err = err
		close(out.closed)
		defer time.AfterFunc(closeGrace, server.Stop).Stop()
		server.GracefulStop()
		serving.Wait()
	}()

	info.Endpoint = endpoint
	member, err := join(info)
	if err != nil {
		return err
	}
	defer member.leave()
	select {
	case out.stream = <-out.streams:
	case <-stop.Done():
		if out.taken.CompareAndSwap(false, true) {
			return nil
		}
		out.stream = <-out.streams
	}
	out.ctx, _ = graceful(stop, outputGrace)
	context.AfterFunc(out.ctx, server.Stop)
	return work(member, out)
}

// Read serves the first reader that comes and refuses all others.
func (o *outlet) Read(stream feedStream) error {
	if !o.taken.CompareAndSwap(false, true) {
		return status.Error(codes.ResourceExhausted, "this feed has had its reader")
	}
	o.streams <- stream
	<-o.closed
	if o.err != nil {
		return status.Error(codes.Aborted, o.err.Error())
	}
	return nil
}

// send hands a record on; gRPC's flow control blocks it while the reader is
// behind. For the last one it returns nil only when the reader has acknowledged
// it, and with it all that was sent before. An error says that the reader is
// gone or, after a request to stop, too slow.
func (o *outlet) send(record *feed.Record) error {
	err := o.stream.Send(record)
	for err == nil && record.End {
		_, err = o.stream.Recv()
	}
	switch {
	case err == nil, err == io.EOF && record.End:
		return nil
	case o.ctx.Err() != nil:
		return fmt.Errorf("record %d: %w", record.Sequence, context.Cause(o.ctx))
	}
	return fmt.Errorf("record %d: %w: %w", record.Sequence, errReaderGone, err)
}

// inlet reads the records of the component before this one.
type inlet struct {
	endpoint string
	conn     *grpc.ClientConn
	stream   grpc.BidiStreamingClient[feed.Ack, feed.Record]
	ctx      context.Context // the stream's
	cancel   context.CancelCauseFunc
	last     *feed.Record
}

// open is open below, for the one input of a component.
func (m *membership) open(stop context.Context, grace time.Duration) (*inlet, error) {
	endpoint, err := onlyInput(m.connections)
	if err != nil {
		return nil, err
	}
	return open(stop, endpoint, grace)
}

// open connects to the outlet at endpoint, which must end within grace of a
// request to stop. The caller must close the inlet.
func open(stop context.Context, endpoint string, grace time.Duration) (*inlet, error) {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("input %q: %w", endpoint, err)
	}
	in := &inlet{endpoint: endpoint, conn: conn, last: &feed.Record{}}
	in.ctx, in.cancel = graceful(stop, grace)
	if in.stream, err = feed.NewFeedClient(conn).Read(in.ctx); err != nil {
		in.close()
		return nil, fmt.Errorf("input %q: %w", endpoint, err)
	}
	return in, nil
}

// next returns the next record. The last one has End set: the input's own, or
// one in its place if the input has not ended in time after a request to stop.
// Whatever else ends the stream is an error, and so is a gap in it.
func (in *inlet) next() (*feed.Record, error) {
	record, err := in.stream.Recv()
	switch cause := context.Cause(in.ctx); {
	case err == nil && record.Sequence != in.last.Sequence+1:
		return nil, fmt.Errorf("input %q: record %d follows record %d", in.endpoint, record.Sequence, in.last.Sequence)
	case err == nil:
	case cause == errStopped:
		fmt.Fprintf(os.Stderr, "input %q: %v\n", in.endpoint, cause)
		record = &feed.Record{Sequence: in.last.Sequence + 1, Time: timestamppb.Now(), Counters: in.last.Counters, End: true}
	case cause != nil:
		return nil, cause
	case err == io.EOF:
		return nil, fmt.Errorf("input %q: no end after record %d", in.endpoint, in.last.Sequence)
	default:
		return nil, fmt.Errorf("input %q: after record %d: %w", in.endpoint, in.last.Sequence, err)
	}
	in.last = record
	return record, nil
}

// acknowledge tells the server that all has arrived where it should. It waits
// for the answer, because closing the connection at once could lose the message;
// what the answer is changes nothing here.
func (in *inlet) acknowledge() {
	_ = in.stream.CloseSend()
	_, _ = in.stream.Recv()
}

func (in *inlet) close() {
	in.cancel(nil)
	_ = in.conn.Close()
}
