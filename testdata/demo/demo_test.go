package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"github.com/withobsrvr/flowctl/testdata/demo/feed"
)

// plane registers whatever comes; each component's input is the one before it.
type plane struct {
	flowctlv1.UnimplementedControlPlaneServiceServer
	registered chan *flowctlv1.ComponentInfo
	beats      chan *flowctlv1.HeartbeatRequest // those that a test waits for
	endpoint   string                           // of the last one; only one component registers at a time
}

func (p *plane) RegisterComponent(_ context.Context, r *flowctlv1.RegisterRequest) (*flowctlv1.RegisterResponse, error) {
	info := map[string]string{"control_plane_endpoint": "unused"}
	if p.endpoint != "" {
		info["input"] = p.endpoint
	}
	p.endpoint = r.Component.Endpoint
	p.registered <- r.Component
	return &flowctlv1.RegisterResponse{ServiceId: r.ComponentId, ConnectionInfo: info}, nil
}

func (p *plane) Heartbeat(_ context.Context, r *flowctlv1.HeartbeatRequest) (*emptypb.Empty, error) {
	select {
	case p.beats <- r:
	default:
	}
	return &emptypb.Empty{}, nil
}

func startPlane(t *testing.T) *plane {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &plane{registered: make(chan *flowctlv1.ComponentInfo, 1), beats: make(chan *flowctlv1.HeartbeatRequest)}
	server := grpc.NewServer()
	flowctlv1.RegisterControlPlaneServiceServer(server, p)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	t.Setenv("ENABLE_FLOWCTL", "true")
	t.Setenv("FLOWCTL_ENDPOINT", listener.Addr().String())
	t.Setenv("FLOWCTL_HEARTBEAT_INTERVAL", "1ms")
	return p
}

// run starts role in the background, and returns once it has registered.
func (p *plane) run(t *testing.T, stop context.Context, id string, role func(context.Context, []string) error, args ...string) <-chan error {
	t.Helper()
	t.Setenv("FLOWCTL_COMPONENT_ID", id)
	ended := make(chan error, 1)
	go func() { ended <- role(stop, args) }()
	select {
	case <-p.registered:
	case err := <-ended:
		t.Fatalf("%s ended before it registered: %v", id, err)
	}
	return ended
}

func TestPipeline(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	tests := []struct {
		name, file string
		want       []string
		wantErr    string // of the source; the others' contain it
	}{
		{name: "empty file"},
		{name: "one line", file: "a\n", want: []string{"a"}},
		{name: "no newline at the end", file: "a\nb", want: []string{"a", "b"}},
		{name: "blank lines", file: "\n\na\n", want: []string{"", "", "a"}},
		{name: "odd bytes", file: "a\r\n<&>\t\u2028\x00\"\\é\n", want: []string{"a\r", "<&>\t\u2028\x00\"\\é"}},
		{name: "longest line", file: long + "\n" + long, want: []string{long, long}},
		{name: "line too long", file: "a\n" + long + "x\nb\n", want: []string{"a"}, wantErr: "line 2 is longer than 1048576 bytes"},
		{name: "not UTF-8", file: "a\nb\xff\n", want: []string{"a"}, wantErr: "line 2 is not valid UTF-8"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
			if err := os.WriteFile(in, []byte(test.file), 0o600); err != nil {
				t.Fatal(err)
			}
			p, stop := startPlane(t), t.Context()
			ended := []<-chan error{
				p.run(t, stop, "counters", source, "-file", in),
				p.run(t, stop, "rates", processor),
				p.run(t, stop, "printer", sink, "-out", out),
			}
			for i, ended := range ended {
				err := <-ended
				if (err == nil) != (test.wantErr == "") || err != nil && !strings.Contains(err.Error(), test.wantErr) {
					t.Errorf("component %d ended with %v, want %q", i, err, test.wantErr)
				}
			}
			if got := readOut(t, out); !slices.Equal(got, test.want) {
				t.Errorf("got %.100q, want %.100q", got, test.want)
			}
		})
	}
}

// readOut returns the lines in the sink's file, and checks what is around them.
func readOut(t *testing.T, path string) (lines []string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(data) {
		var record struct {
			Sequence int
			Line     *string
			Counters map[string]float64
		}
		if err := json.Unmarshal(line, &record); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, *record.Line)
		if n := len(lines); record.Sequence != n || record.Counters[lineCount] != float64(n) {
			t.Fatalf("line %d has sequence %d and counters %v", n, record.Sequence, record.Counters)
		}
	}
	return lines
}

// A stop in the middle of a file loses nothing of what was read until then.
// With PORT a component can be reached from other machines, and registers no host.
func TestPort(t *testing.T) {
	for name, role := range map[string]func(context.Context, []string) error{"dials": source, "serves": words} {
		for _, port := range []string{"0", ":0"} {
			t.Setenv("PORT", port)
			stop, end := context.WithCancel(t.Context())
			p := startPlane(t)
			ended := p.run(t, stop, name, role)
			if _, port, err := net.SplitHostPort(p.endpoint); err != nil || port == "0" || p.endpoint != ":"+port {
				t.Errorf("%s with PORT=%s: endpoint %q", name, port, p.endpoint)
			}
			if conn, err := net.Dial("tcp", p.endpoint); err != nil {
				t.Error(err)
			} else {
				conn.Close()
			}
			end()
			if err := <-ended; err != nil {
				t.Errorf("%s with PORT=%s: %v", name, port, err)
			}
		}
	}
}

func TestStopDrains(t *testing.T) {
	var all []string
	for i := range 300_000 {
		all = append(all, fmt.Sprint("line ", i))
	}
	in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(in, []byte(strings.Join(all, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	p := startPlane(t)
	stop, cancel := context.WithCancel(t.Context())
	ended := []<-chan error{
		p.run(t, stop, "counters", source, "-file", in),
		p.run(t, stop, "rates", processor),
		p.run(t, stop, "printer", sink, "-out", out),
	}
	time.AfterFunc(100*time.Millisecond, cancel)
	for i, ended := range ended {
		if err := <-ended; err != nil {
			t.Errorf("component %d: %v", i, err)
		}
	}
	got := readOut(t, out)
	if !slices.Equal(got, all[:min(len(got), len(all))]) {
		t.Errorf("got %d lines that are not the first of the file", len(got))
	}
}

// Without a reader nothing is read, so there is nothing to wait for.
func TestStopBeforeReader(t *testing.T) {
	p := startPlane(t)
	stop, cancel := context.WithCancel(t.Context())
	first := p.run(t, stop, "counters", source, "-file", os.DevNull)
	second := p.run(t, stop, "rates", processor)
	cancel()
	if err := <-first; err != nil {
		t.Errorf("source: %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("processor: %v", err)
	}
}

func TestErrors(t *testing.T) {
	p := startPlane(t)
	if err := <-p.run(t, t.Context(), "printer", sink); err == nil || !strings.Contains(err.Error(), "names 0 inputs") {
		t.Errorf("sink without an input: %v", err)
	}
	if err := source(t.Context(), []string{"-file", "/nonexistent"}); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("source without its file: %v", err)
	}

	stop, cancel := context.WithCancel(t.Context())
	ended := p.run(t, stop, "counters", source, "-file", os.DevNull)
	one, err := open(stop, p.endpoint, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one.next(); err != nil {
		t.Fatal(err)
	}
	two, err := open(stop, p.endpoint, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer two.close()
	if _, err := two.next(); err == nil || !strings.Contains(err.Error(), "ResourceExhausted") {
		t.Errorf("second reader: %v", err)
	}
	one.close()
	if err := <-ended; err == nil || !strings.Contains(err.Error(), errReaderGone.Error()) {
		t.Errorf("source whose reader went without an acknowledgement: %v", err)
	}
	cancel()
}

func TestRates(t *testing.T) {
	start := time.Unix(1_000_000, 0)
	var m meter
	for _, step := range []struct {
		at    time.Duration // since start
		value float64
		want  map[string]float64
	}{
		{0, 100, nil},
		{0, 200, nil},
		{rateWindow - 1, 300, nil},
		{time.Second, 400, map[string]float64{"n": 300}},
		{time.Second + 1, 1e9, map[string]float64{"n": 300}}, // the rate of before
		{3 * time.Second, 600, map[string]float64{"n": 100}},
		{4 * time.Second, 10, map[string]float64{}},                      // reset
		{time.Second, 20, map[string]float64{}},                          // clock set back
		{time.Second + rateWindow, 30, map[string]float64{"n": 10 / .1}}, // measured from there
	} {
		record := &feed.Record{Time: timestamppb.New(start.Add(step.at)), Counters: map[string]float64{"n": step.value}}
		if got := m.rates(record); !reflect.DeepEqual(got, step.want) {
			t.Errorf("at %v: got %v, want %v", step.at, got, step.want)
		}
	}
}

func TestMachineCounters(t *testing.T) {
	proc := t.TempDir()
	if _, err := machineCounters(proc); err == nil {
		t.Error("no error without stat")
	}
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(proc, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(proc, "net"), 0o700); err != nil {
		t.Fatal(err)
	}
	write("stat", "cpu  1 2 3 40 50 6 7 8 900 900\ncpu0 1 2 3 4 5 6 7 8 9 9\nctxt 11\nbtime 5\nprocesses 12\n")
	write("net/dev", "Inter-|   Receive  |  Transmit\n face |bytes packets |bytes packets\n"+
		"    lo: 99 1 0 0 0 0 0 0 99 1 0 0 0 0 0 0\n  eth0: 100 1 0 0 0 0 0 0 10 1 0 0 0 0 0 0\n wlan0:200 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n")
	got, err := machineCounters(proc)
	want := map[string]float64{cpuBusy: 27, cpuIdle: 90, switches: 11, forks: 12, netInput: 300, netOutput: 30}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	write("stat", "ctxt many\n")
	if _, err := machineCounters(proc); err == nil {
		t.Error("no error for a counter that is no number")
	}
}
