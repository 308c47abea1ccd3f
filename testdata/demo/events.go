package main

import (
	"bufio"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// Types of events, by which flowctl knows who reads them.
const (
	lineType = "line"
	wordType = "word"
)

// maxEvent, in bytes, is the largest event that flowctl moves if it is not told
// otherwise. gRPC's own limit is 4 MiB.
const maxEvent = 64 << 20

// passive is a component that serves one of the services of events.proto and
// waits to be called. It goes on when its stream has ended: flowctl ends it.
type passive struct {
	flowctlv1.UnimplementedSourceServiceServer
	flowctlv1.UnimplementedProcessorServiceServer
	flowctlv1.UnimplementedConsumerServiceServer
	*membership
	info *flowctlv1.ComponentInfo
	stop context.Context // done when the component is asked to end
}

// serve listens, registers and serves what register adds, until stop is done.
func (p *passive) serve(stop context.Context, info *flowctlv1.ComponentInfo, register func(*grpc.Server)) error {
	listener, endpoint, err := listen()
	if err != nil {
		return err
	}
	defer listener.Close()
	p.stop, p.info = stop, info
	info.Endpoint = endpoint
	if p.membership, err = join(info); err != nil {
		return err
	}
	defer p.leave()
	server := grpc.NewServer(grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(maxEvent))
	register(server)
	context.AfterFunc(stop, func() {
		defer time.AfterFunc(inputGrace, server.Stop).Stop()
		server.GracefulStop()
	})
	// It returns when no stream is left, and with an error if stop came first.
	if err := server.Serve(listener); err != grpc.ErrServerStopped {
		return err
	}
	return nil
}

// GetInfo is how flowctl finds out which of the services this is.
func (p *passive) GetInfo(context.Context, *emptypb.Empty) (*flowctlv1.ComponentInfo, error) {
	return p.info, nil
}

// send hands on an event of a source; gRPC's flow control blocks it while its
// reader is behind. A source that is asked to end breaks its stream, because OK
// would mean that there is no more.
func (p *passive) send(stream grpc.ServerStreamingServer[flowctlv1.Event], event *flowctlv1.Event) error {
	if p.stop.Err() != nil {
		return status.Error(codes.Unavailable, "asked to end before the last event")
	}
	if err := stream.Send(event); err != nil {
		return err
	}
	p.records.Add(1)
	return nil
}

// each calls f for each event that comes, until the stream has ended.
func (p *passive) each(stream interface {
	Recv() (*flowctlv1.Event, error)
}, f func(*flowctlv1.Event) error) error {
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := f(event); err != nil {
			return err
		}
		p.records.Add(1)
	}
}

// lineSource makes an event of each line of a file. The number of a line is the
// id of its event; that of the last one which was sent is the token to resume by.
type lineSource struct {
	passive
	path  string
	last  atomic.Int64
	state *os.File // has last for the next process, nil for none
}

// lines reads the file that FILE names; STATE may name one for the token.
func lines(stop context.Context, args []string) error {
	parse(flag.NewFlagSet("demo lines", flag.ExitOnError), args)
	s := &lineSource{path: os.Getenv("FILE")}
	if _, err := os.Stat(s.path); err != nil {
		return fmt.Errorf("FILE: %w", err)
	}
	if path := os.Getenv("STATE"); path != "" {
		state, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
		if err != nil {
			return fmt.Errorf("STATE: %w", err)
		}
		defer state.Close()
		var last int64
		if _, err := fmt.Fscan(state, &last); err != nil && err != io.EOF {
			return fmt.Errorf("STATE: %s has no number of a line: %w", path, err)
		}
		s.state = state
		s.last.Store(last)
	}
	info := &flowctlv1.ComponentInfo{
		Type:             flowctlv1.ComponentType_COMPONENT_TYPE_SOURCE,
		OutputEventTypes: []string{lineType},
	}
	return s.serve(stop, info, func(server *grpc.Server) { flowctlv1.RegisterSourceServiceServer(server, s) })
}

// StreamEvents ends with OK after the last line.
func (s *lineSource) StreamEvents(request *flowctlv1.StreamRequest, stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
	done := int64(0) // the lines that are not to be sent again
	if request.Resume && request.ResumeToken != "" {
		n, err := strconv.ParseInt(request.ResumeToken, 10, 64)
		if err != nil || n < 0 {
			return status.Errorf(codes.InvalidArgument, "resume_token is %q, not the number of a line", request.ResumeToken)
		}
		done = n
	}
	file, err := os.Open(s.path)
	if err != nil {
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	defer file.Close()
	if err := s.remember(done); err != nil { // a token of before is none of this stream
		return err
	}
	scanner := bufio.NewScanner(file)
	scanner.Buffer(nil, maxLine)
	for number := int64(1); scanner.Scan(); number++ {
		if number <= done {
			continue
		}
		event := &flowctlv1.Event{
			Id:                strconv.FormatInt(number, 10),
			Type:              lineType,
			Payload:           []byte(scanner.Text()),
			ContentType:       "text/plain",
			SourceComponentId: s.info.Id,
			Timestamp:         timestamppb.Now(),
		}
		if err := s.send(stream, event); err != nil {
			return err
		}
		if err := s.remember(number); err != nil {
			return err
		}
	}
	if err := scanner.Err(); err != nil {
		return status.Errorf(codes.DataLoss, "%s: %v", s.path, err)
	}
	return nil
}

// remember keeps the number of the last line that was sent.
func (s *lineSource) remember(number int64) error {
	s.last.Store(number)
	if s.state == nil {
		return nil
	}
	_, err := s.state.WriteAt(fmt.Appendf(nil, "%-19d\n", number), 0) // as wide as any
	return err
}

// GetState is asked when a stream has broken.
func (s *lineSource) GetState(context.Context, *flowctlv1.StateRequest) (*flowctlv1.StateResponse, error) {
	return &flowctlv1.StateResponse{ResumeToken: strconv.FormatInt(s.last.Load(), 10)}, nil
}

// splitter makes an event of each word of a line.
type splitter struct{ passive }

func words(stop context.Context, args []string) error {
	parse(flag.NewFlagSet("demo words", flag.ExitOnError), args)
	s := &splitter{}
	info := &flowctlv1.ComponentInfo{
		Type:             flowctlv1.ComponentType_COMPONENT_TYPE_PROCESSOR,
		InputEventTypes:  []string{lineType},
		OutputEventTypes: []string{wordType},
	}
	return s.serve(stop, info, func(server *grpc.Server) { flowctlv1.RegisterProcessorServiceServer(server, s) })
}

// Process ends after the last word of the last line.
func (s *splitter) Process(stream grpc.BidiStreamingServer[flowctlv1.Event, flowctlv1.Event]) error {
	return s.each(stream, func(line *flowctlv1.Event) error {
		notLetter := func(r rune) bool { return !unicode.IsLetter(r) }
		for i, word := range strings.FieldsFunc(strings.ToLower(string(line.Payload)), notLetter) {
			event := &flowctlv1.Event{
				Id:                fmt.Sprintf("%s.%d", line.Id, i+1),
				Type:              wordType,
				Payload:           []byte(word),
				ContentType:       line.ContentType,
				SourceComponentId: s.info.Id,
				Timestamp:         line.Timestamp,
			}
			if err := stream.Send(event); err != nil {
				return err
			}
		}
		return nil
	})
}

// tallier counts how often each word has come.
type tallier struct {
	passive
	out string

	mu     sync.Mutex
	counts map[string]int // kept from stream to stream: one that broke is opened again
}

// tally writes its counts to the file that OUT names.
func tally(stop context.Context, args []string) error {
	parse(flag.NewFlagSet("demo tally", flag.ExitOnError), args)
	s := &tallier{out: os.Getenv("OUT"), counts: make(map[string]int)}
	if err := os.WriteFile(s.out, nil, 0o666); err != nil {
		return fmt.Errorf("OUT: %w", err)
	}
	info := &flowctlv1.ComponentInfo{
		Type:            flowctlv1.ComponentType_COMPONENT_TYPE_CONSUMER,
		InputEventTypes: []string{wordType},
	}
	return s.serve(stop, info, func(server *grpc.Server) { flowctlv1.RegisterConsumerServiceServer(server, s) })
}

// Consume writes the counts once its stream has ended, and answers then.
func (s *tallier) Consume(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
	response := &flowctlv1.ConsumeResponse{}
	err := s.each(stream, func(event *flowctlv1.Event) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.counts[string(event.Payload)]++
		response.EventsConsumed++
		return nil
	})
	if err == nil {
		err = s.write()
	}
	if err != nil {
		return err
	}
	return stream.SendAndClose(response)
}

// write puts the most frequent words first.
func (s *tallier) write() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	words := slices.SortedFunc(maps.Keys(s.counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(s.counts[b], s.counts[a]), cmp.Compare(a, b))
	})
	var text strings.Builder
	for _, word := range words {
		fmt.Fprintln(&text, s.counts[word], word)
	}
	return os.WriteFile(s.out, []byte(text.String()), 0o666)
}
