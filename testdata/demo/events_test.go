package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

func dial(t *testing.T, endpoint string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// serves starts a passive role, and returns a connection to it. end asks it to
// end, which it has to do with nil.
func (p *plane) serves(t *testing.T, id string, role func(context.Context, []string) error) (conn *grpc.ClientConn, end func()) {
	t.Helper()
	stop, cancel := context.WithCancel(t.Context())
	ended := p.run(t, stop, id, role)
	return dial(t, p.endpoint), func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// received returns the events of a stream as "id payload", up to its end.
func received(t *testing.T, stream interface {
	Recv() (*flowctlv1.Event, error)
}) (got []string, err error) {
	t.Helper()
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			return got, nil
		} else if err != nil {
			return got, err
		}
		got = append(got, event.Id+" "+string(event.Payload))
	}
}

func event(typ, id, payload string) *flowctlv1.Event {
	return &flowctlv1.Event{Type: typ, Id: id, Payload: []byte(payload)}
}

func TestGetInfo(t *testing.T) {
	p, dir := startPlane(t), t.TempDir()
	t.Setenv("FILE", os.DevNull)
	t.Setenv("OUT", filepath.Join(dir, "out"))
	get := func(id string, role func(context.Context, []string) error, ask func(*grpc.ClientConn) (*flowctlv1.ComponentInfo, error)) {
		conn, end := p.serves(t, id, role)
		defer end()
		info, err := ask(conn)
		if err != nil || info.Id != id || info.Endpoint != p.endpoint {
			t.Errorf("%s: got %v, %v", id, info, err)
		}
	}
	get("a", lines, func(c *grpc.ClientConn) (*flowctlv1.ComponentInfo, error) {
		return flowctlv1.NewSourceServiceClient(c).GetInfo(t.Context(), &emptypb.Empty{})
	})
	get("b", words, func(c *grpc.ClientConn) (*flowctlv1.ComponentInfo, error) {
		return flowctlv1.NewProcessorServiceClient(c).GetInfo(t.Context(), &emptypb.Empty{})
	})
	get("c", tally, func(c *grpc.ClientConn) (*flowctlv1.ComponentInfo, error) {
		return flowctlv1.NewConsumerServiceClient(c).GetInfo(t.Context(), &emptypb.Empty{})
	})
}

// One process, of whose streams each begins where its request says.
func TestLines(t *testing.T) {
	file := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(file, []byte("a\n\nc \xff\nd"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FILE", file)
	conn, end := startPlane(t).serves(t, "lines", lines)
	defer end()
	source := flowctlv1.NewSourceServiceClient(conn)
	all := []string{"1 a", "2 ", "3 c \xff", "4 d"}
	for _, test := range []struct {
		request   *flowctlv1.StreamRequest
		want      []string
		wantCode  codes.Code
		wantToken string // afterwards
	}{
		{request: &flowctlv1.StreamRequest{}, want: all, wantToken: "4"},
		{request: &flowctlv1.StreamRequest{Resume: true, ResumeToken: "2"}, want: all[2:], wantToken: "4"},
		{request: &flowctlv1.StreamRequest{Resume: true, ResumeToken: "4"}, wantToken: "4"},
		{request: &flowctlv1.StreamRequest{Resume: true}, want: all, wantToken: "4"},
		{request: &flowctlv1.StreamRequest{ResumeToken: "2"}, want: all, wantToken: "4"},
		{request: &flowctlv1.StreamRequest{Resume: true, ResumeToken: "two"}, wantCode: codes.InvalidArgument, wantToken: "4"},
	} {
		stream, err := source.StreamEvents(t.Context(), test.request)
		if err != nil {
			t.Fatal(err)
		}
		got, err := received(t, stream)
		if !slices.Equal(got, test.want) || status.Code(err) != test.wantCode {
			t.Errorf("%v: got %q, %v, want %q, %v", test.request, got, err, test.want, test.wantCode)
		}
		state, err := source.GetState(t.Context(), &flowctlv1.StateRequest{})
		if err != nil || state.ResumeToken != test.wantToken {
			t.Errorf("%v: the token is %q, %v, want %q", test.request, state.GetResumeToken(), err, test.wantToken)
		}
	}
}

// A source that is asked to end in the middle of its file says so, and the next
// process goes on from there.
func TestLinesResume(t *testing.T) {
	var all []string
	for range 2000 {
		all = append(all, strings.Repeat("x", 10_000))
	}
	dir := t.TempDir()
	t.Setenv("FILE", filepath.Join(dir, "in"))
	t.Setenv("STATE", filepath.Join(dir, "state"))
	if err := os.WriteFile(os.Getenv("FILE"), []byte(strings.Join(all, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	p, sent := startPlane(t), 0
	for _, want := range []codes.Code{codes.Unavailable, codes.OK} {
		stop, cancel := context.WithCancel(t.Context())
		ended := p.run(t, stop, "lines", lines)
		source := flowctlv1.NewSourceServiceClient(dial(t, p.endpoint))
		state, err := source.GetState(t.Context(), &flowctlv1.StateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		stream, err := source.StreamEvents(t.Context(), &flowctlv1.StreamRequest{Resume: true, ResumeToken: state.ResumeToken})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		if want != codes.OK {
			cancel() // while it waits for its reader
		}
		got, err := received(t, stream)
		sent += 1 + len(got)
		if status.Code(err) != want {
			t.Errorf("after %d lines: %v, want %v", sent, err, want)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if sent != len(all) {
		t.Errorf("got %d lines of %d", sent, len(all))
	}
}

func TestWords(t *testing.T) {
	conn, end := startPlane(t).serves(t, "words", words)
	defer end()
	for range 2 { // it goes on when a stream has ended
		stream, err := flowctlv1.NewProcessorServiceClient(conn).Process(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(stream.Send(event(lineType, "7", "Life is, like LIFE:\té")), stream.Send(event(lineType, "8", " -")), stream.CloseSend())
		if err != nil {
			t.Fatal(err)
		}
		got, err := received(t, stream)
		if want := []string{"7.1 life", "7.2 is", "7.3 like", "7.4 life", "7.5 é"}; err != nil || !slices.Equal(got, want) {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
}

// What came by a stream that broke counts in the next one, too.
func TestTally(t *testing.T) {
	p, out := startPlane(t), filepath.Join(t.TempDir(), "out")
	t.Setenv("OUT", out)
	conn, end := p.serves(t, "tally", tally)
	defer end()
	sink := flowctlv1.NewConsumerServiceClient(conn)
	send := func(ctx context.Context, words ...string) grpc.ClientStreamingClient[flowctlv1.Event, flowctlv1.ConsumeResponse] {
		stream, err := sink.Consume(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range words {
			if err := stream.Send(event(wordType, "", word)); err != nil {
				t.Fatal(err)
			}
		}
		return stream
	}
	breaks, cancel := context.WithCancel(t.Context())
	send(breaks, "b", "c")
	for beat := range p.beats {
		if beat.Metrics["records"] == "2" {
			break
		}
	}
	cancel()
	response, err := send(t.Context(), "a", "b").CloseAndRecv()
	if err != nil || response.EventsConsumed != 2 || response.EventsFailed != 0 {
		t.Errorf("got %v, %v", response, err)
	}
	got, err := os.ReadFile(out)
	if want := "2 b\n1 a\n1 c\n"; err != nil || string(got) != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

func TestFlood(t *testing.T) {
	p := startPlane(t)
	t.Setenv("EVENTS", "3")
	t.Setenv("EVENT_BYTES", "5000000") // above gRPC's own limit
	conn, end := p.serves(t, "flood", flood)
	defer end()
	source, err := flowctlv1.NewSourceServiceClient(conn).StreamEvents(t.Context(), &flowctlv1.StreamRequest{}, grpc.MaxCallRecvMsgSize(maxEvent))
	if err != nil {
		t.Fatal(err)
	}
	conn, end = p.serves(t, "pass", pass)
	defer end()
	processor, err := flowctlv1.NewProcessorServiceClient(conn).Process(t.Context(), grpc.MaxCallRecvMsgSize(maxEvent))
	if err != nil {
		t.Fatal(err)
	}
	conn, end = p.serves(t, "count", count)
	defer end()
	sink, err := flowctlv1.NewConsumerServiceClient(conn).Consume(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		event, err := source.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if err := processor.Send(event); err != nil {
			t.Fatal(err)
		}
		if event, err = processor.Recv(); err != nil {
			t.Fatal(err)
		}
		if err := sink.Send(event); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := source.Recv(); err != io.EOF {
		t.Errorf("the source has more: %v", err)
	}
	if err := processor.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := processor.Recv(); err != io.EOF {
		t.Errorf("the processor has more: %v", err)
	}
	response, err := sink.CloseAndRecv()
	if err != nil || response.EventsConsumed != 3 {
		t.Errorf("got %v, %v", response, err)
	}
}

// Without the file that it needs a role does not register.
func TestPassiveErrors(t *testing.T) {
	for name, role := range map[string]func(context.Context, []string) error{"FILE": lines, "OUT": tally, "EVENTS": flood} {
		t.Setenv(name, "/nonexistent/file")
		if err := role(t.Context(), nil); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "/nonexistent/file") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
