// Wired moves the events of a source to a processor and on to a sink, and does no
// more than receive and send: what flowctl's relay is measured against. The
// components are those of ../flood.json, for instance; flowctl list has their
// endpoints.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

const maxEvent = 64 << 20 // bytes

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: wired SOURCE PROCESSOR SINK, each HOST:PORT")
		os.Exit(2)
	}
	start := time.Now()
	events, err := move([3]string(os.Args[1:]))
	if err != nil {
		fmt.Fprintln(os.Stderr, "wired:", err)
		os.Exit(1)
	}
	fmt.Printf("%d events in %.3f s\n", events, time.Since(start).Seconds())
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	fmt.Printf("%d allocations\n", stats.Mallocs)
}

// move returns how many events the sink says it has got.
func move(addresses [3]string) (int64, error) {
	var conns [3]*grpc.ClientConn
	for i, address := range addresses {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxEvent)))
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		conns[i] = conn
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	sink, err := flowctlv1.NewConsumerServiceClient(conns[2]).Consume(ctx)
	if err != nil {
		return 0, err
	}
	processor, err := flowctlv1.NewProcessorServiceClient(conns[1]).Process(ctx)
	if err != nil {
		return 0, err
	}
	source, err := flowctlv1.NewSourceServiceClient(conns[0]).StreamEvents(ctx, &flowctlv1.StreamRequest{})
	if err != nil {
		return 0, err
	}
	go func() {
		if err := pass(source, processor); err != nil && err != io.EOF {
			cancel(fmt.Errorf("from the source: %w", err))
		}
	}()
	err = pass(processor, sink)
	var response *flowctlv1.ConsumeResponse
	if err == nil || err == io.EOF {
		response, err = sink.CloseAndRecv() // also tells why a sink took no more
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return response.GetEventsConsumed(), err
}

// pass sends on what it receives, then ends what it sends. io.EOF says that the
// reader has ended its stream, which tells why when it is read.
func pass(from interface {
	Recv() (*flowctlv1.Event, error)
}, to interface {
	Send(*flowctlv1.Event) error
	CloseSend() error
}) error {
	for {
		event, err := from.Recv()
		if err == io.EOF {
			return to.CloseSend()
		} else if err != nil {
			return err
		}
		if err := to.Send(event); err != nil {
			return err
		}
	}
}
