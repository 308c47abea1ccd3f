//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// eventRole is a component of the v1 dialect that serves events. It says on its output what it has come to.
type eventRole struct {
	Kind     string   // source, processor or sink
	Count    int      `json:",omitempty"` // events of a source, 0 for no end
	Bytes    int      `json:",omitempty"` // of the payload of each
	Types    []string `json:",omitempty"` // of events, in turn; for the others, what they want
	State    string   `json:",omitempty"` // file in which a source keeps what it has sent, to resume by
	File     string   `json:",omitempty"` // in which a sink writes a line for each event: where it came by, type and id
	Each     string   `json:",omitempty"` // how long a reader takes for an event
	Enough   int      `json:",omitempty"` // events after which a reader ends its stream
	Fail     int      `json:",omitempty"` // events that a sink says have failed
	Refuse   bool     `json:",omitempty"` // to stream
	Unserved bool     `json:",omitempty"` // it moves its own data: GetInfo is UNIMPLEMENTED
	Hollow   bool     `json:",omitempty"` // it answers GetInfo, and its stream is UNIMPLEMENTED
	Late     string   `json:",omitempty"` // how long after its registration it listens
	Holds    bool     `json:",omitempty"` // a sink does not end its stream
	Linger   bool     `json:",omitempty"` // after SIGTERM it waits for the end of its streams
}

// events serves the role over gRPC.
type events struct {
	flowctlv1.UnimplementedSourceServiceServer
	flowctlv1.UnimplementedProcessorServiceServer
	flowctlv1.UnimplementedConsumerServiceServer
	role  *eventRole
	stop  chan struct{} // closed by SIGTERM
	state *os.File
}

func (r *eventRole) play() int {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	if err := r.serve(signals); err != nil {
		fmt.Fprintln(os.Stderr, "events:", err)
		return 1
	}
	return 0
}

func (r *eventRole) serve(signals <-chan os.Signal) error {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(256 << 20))
	e := &events{role: r, stop: make(chan struct{})}
	if r.State != "" {
		if e.state, err = os.OpenFile(r.State, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return err
		}
	}
	switch {
	case r.Unserved:
	case r.Kind == "source":
		flowctlv1.RegisterSourceServiceServer(server, sourceEvents{events: e})
	case r.Kind == "processor":
		flowctlv1.RegisterProcessorServiceServer(server, processorEvents{events: e})
	default:
		flowctlv1.RegisterConsumerServiceServer(server, sinkEvents{events: e})
	}
	late, _ := time.ParseDuration(r.Late)
	var serving sync.WaitGroup
	serving.Go(func() {
		time.Sleep(late) // a server that needs its time
		_ = server.Serve(lis)
	})
	alive, err := r.register(lis.Addr().String())
	if err != nil {
		return err
	}
	interval, err := time.ParseDuration(os.Getenv("FLOWCTL_HEARTBEAT_INTERVAL"))
	if err != nil {
		return err
	}
	ticker := time.NewTicker(interval)
	for {
		select {
		case <-ticker.C:
			alive()
		case <-signals:
			switch {
			case r.Linger:
				fmt.Println("lingers")
				server.GracefulStop()
			case r.Kind == "source":
				close(e.stop)
				server.GracefulStop() // it ends its streams itself, and loses nothing that it has sent
			default:
				server.Stop()
			}
			serving.Wait()
			return nil
		}
	}
}

// register registers through flowctl.v1, and returns what sends a heartbeat.
func (r *eventRole) register(endpoint string) (alive func(), err error) {
	conn, err := grpc.NewClient(os.Getenv("FLOWCTL_ENDPOINT"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return nil, err
	}
	id := os.Getenv("FLOWCTL_COMPONENT_ID")
	client := flowctlv1.NewControlPlaneServiceClient(conn)
	kinds := map[string]flowctlv1.ComponentType{"source": 1, "processor": 2, "sink": 3}
	info := &flowctlv1.ComponentInfo{Id: id, Type: kinds[r.Kind], Endpoint: endpoint}
	if r.Kind != "source" {
		info.InputEventTypes = r.Types
	}
	if _, err := client.RegisterComponent(context.Background(), &flowctlv1.RegisterRequest{Component: info, ComponentId: id}); err != nil {
		return nil, err
	}
	return func() { _, _ = client.Heartbeat(context.Background(), &flowctlv1.HeartbeatRequest{ServiceId: id}) }, nil
}

func (e *events) info() (*flowctlv1.ComponentInfo, error) {
	return &flowctlv1.ComponentInfo{Id: os.Getenv("FLOWCTL_COMPONENT_ID")}, nil
}

// take takes its time for an event, and tells whether this was enough.
func (e *events) take(ctx context.Context, n int) (enough bool) {
	if each, _ := time.ParseDuration(e.role.Each); each > 0 {
		select {
		case <-time.After(each):
		case <-e.stop:
		case <-ctx.Done():
		}
	}
	return n == e.role.Enough
}

type sourceEvents struct {
	flowctlv1.UnimplementedSourceServiceServer
	*events
}

func (s sourceEvents) GetInfo(context.Context, *emptypb.Empty) (*flowctlv1.ComponentInfo, error) {
	return s.info()
}

func (s sourceEvents) GetState(context.Context, *flowctlv1.StateRequest) (*flowctlv1.StateResponse, error) {
	if s.state == nil {
		return nil, status.Error(codes.Unimplemented, "no state")
	}
	return &flowctlv1.StateResponse{ResumeToken: strconv.Itoa(s.stored())}, nil
}

// stored is the number of the last event that was sent, by any process of it.
func (s sourceEvents) stored() int {
	data := make([]byte, 20)
	n, _ := s.state.ReadAt(data, 0)
	number, _ := strconv.Atoi(strings.TrimSpace(string(data[:n])))
	return number
}

func (s sourceEvents) StreamEvents(in *flowctlv1.StreamRequest, stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
	fmt.Printf("streams resume=%v token=%q params=%v\n", in.GetResume(), in.GetResumeToken(), in.GetParams())
	if s.role.Refuse {
		return status.Error(codes.FailedPrecondition, "it has no ledger to begin with")
	}
	payload := make([]byte, s.role.Bytes)
	first, _ := strconv.Atoi(in.GetResumeToken())
	for i := first + 1; s.role.Count == 0 || i <= s.role.Count; i++ {
		ev := &flowctlv1.Event{Id: strconv.Itoa(i), Payload: payload, SourceComponentId: os.Getenv("FLOWCTL_COMPONENT_ID")}
		if types := s.role.Types; len(types) > 0 {
			ev.Type = types[i%len(types)]
		}
		if s.state != nil {
			if _, err := s.state.WriteAt(fmt.Appendf(nil, "%-19d\n", i), 0); err != nil {
				return err
			}
		}
		if err := stream.Send(ev); err != nil {
			return err
		}
		s.take(stream.Context(), i)
		select {
		case <-s.stop:
			return nil
		default:
		}
	}
	return nil
}

type processorEvents struct {
	flowctlv1.UnimplementedProcessorServiceServer
	*events
}

func (p processorEvents) GetInfo(context.Context, *emptypb.Empty) (*flowctlv1.ComponentInfo, error) {
	return p.info()
}

// Process passes events on, and notes in each that it has.
func (p processorEvents) Process(stream grpc.BidiStreamingServer[flowctlv1.Event, flowctlv1.Event]) error {
	fmt.Println("processes")
	for n := 1; ; n++ {
		ev, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if p.role.Bytes > 0 {
			ev.Payload = make([]byte, p.role.Bytes)
		}
		ev.SourceComponentId += ">" + os.Getenv("FLOWCTL_COMPONENT_ID")
		if err := stream.Send(ev); err != nil {
			return err
		}
		if p.take(stream.Context(), n) {
			return nil
		}
	}
}

type sinkEvents struct {
	flowctlv1.UnimplementedConsumerServiceServer
	*events
}

func (s sinkEvents) GetInfo(context.Context, *emptypb.Empty) (*flowctlv1.ComponentInfo, error) {
	return s.info()
}

func (s sinkEvents) Consume(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
	if s.role.Hollow {
		return s.UnimplementedConsumerServiceServer.Consume(stream)
	}
	fmt.Println("consumes")
	out := io.Discard
	if s.role.File != "" {
		f, err := os.OpenFile(s.role.File, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		out = f
	}
	for n := 1; ; n++ {
		ev, err := stream.Recv()
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if err == nil {
			if _, err := fmt.Fprintf(out, "%s %s %s\n", ev.GetSourceComponentId(), ev.GetType(), ev.GetId()); err != nil {
				return err
			}
		}
		if err != nil && s.role.Holds {
			<-stream.Context().Done()
			return stream.Context().Err()
		}
		if err != nil || s.take(stream.Context(), n) {
			fmt.Println("consumed", n)
			answer := &flowctlv1.ConsumeResponse{EventsConsumed: int64(n), EventsFailed: int64(s.role.Fail)}
			for range s.role.Fail {
				answer.Errors = append(answer.Errors, "row is too long")
			}
			return stream.SendAndClose(answer)
		}
	}
}
