//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Of several runs of one name this user's own is meant, and of several such none.
func TestChoosePipeline_OfOneName(t *testing.T) {
	t.Parallel()
	own := func(endpoint string) runInfo {
		return runInfo{Pipeline: "p", Endpoint: endpoint, owner: uint32(os.Geteuid())}
	}
	theirs := runInfo{Pipeline: "p", Endpoint: "theirs", owner: 65533}
	for _, tt := range []struct {
		runs []runInfo
		want string
	}{
		{[]runInfo{theirs}, "theirs"},
		{[]runInfo{theirs, own("a")}, "a"},
		{[]runInfo{own("a"), theirs, own("b")}, `2 pipelines "p" are running: name one by -endpoint: a, b`},
		{[]runInfo{theirs, theirs}, `2 pipelines "p" are running: name one by -endpoint: theirs, theirs`},
	} {
		runs, err := choosePipeline(tt.runs, "p")
		got := fmt.Sprint(err)
		if err == nil {
			got = runs[0].Endpoint
		}
		wantEqual(t, fmt.Sprint(tt.runs), got, tt.want)
	}
}

// Nothing that a component says can do anything to a terminal.
func TestList_ShowsNothingRaw(t *testing.T) {
	t.Parallel()
	p, endpoint := startAlone(t, []string{"-no-persistence", "-heartbeat-ttl", "200ms", "-janitor-interval", "50ms", "-log-level", "debug"})
	watch := start(t, []string{"list", "-watch", "-e", endpoint})
	watch.waitOut("control plane alone")
	evil := "a\x1b[31m\x1b]0;x\a\r\n\t\b\x7f\u009b2J\u202e\u2028z"
	c := dialPlane(t, endpoint)
	for i, dialect := range dialects {
		c.mustRegister(t, dialect, registration{
			id: fmt.Sprint(evil, i), componentID: "c" + evil, name: evil, description: evil + "\x00", version: evil, endpoint: evil,
			inputEvents: []string{evil}, outputEvents: []string{evil}, metadata: map[string]string{evil: evil},
		})
	}
	send := func(status flowctlv1.HealthStatus) {
		get(c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: evil + "1", Metrics: map[string]string{evil: evil}, Status: status}))(t)
	}
	send(flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY)
	send(flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY)
	p.waitErr("no heartbeat since it registered") // stale
	watch.waitOut("no heartbeat since it registered")
	send(flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN)
	_, table, tableErr := call(t, "list", "-e", endpoint)
	_, details, detailsErr := call(t, "list", "-e", endpoint, evil+"1")
	_, nobody, nobodyErr := call(t, "list", "-e", endpoint, "nobody"+evil)
	get(c.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: evil + "1"}))(t)
	watch.waitOut("removed")
	watch.signal(syscall.SIGINT)
	<-watch.done
	p.stop()
	if !strings.Contains(table, "\ufffd[31m") || !strings.Contains(details, "description:") {
		t.Errorf("the list does not show it:\n%s\n%s%s", table, details, detailsErr)
	}
	for what, text := range map[string]string{
		"table": table + tableErr, "details": details + detailsErr, "error": nobody + nobodyErr,
		"watch": watch.stdout.String() + watch.stderr.String(), "log": p.stdout.String() + p.stderr.String(),
	} {
		for _, r := range text {
			if r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == '\u2028') || !utf8.ValidString(text) {
				t.Errorf("%s: %q is in %q", what, r, text)
				break
			}
		}
	}
}

// fakePlane answers as a test wants it to.
type fakePlane struct {
	operatorv1.UnimplementedOperatorServer
	watch func(in *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error
	get   func() (*operatorv1.Pipeline, error)
}

func (p fakePlane) Watch(in *operatorv1.WatchRequest, stream grpc.ServerStreamingServer[operatorv1.WatchResponse]) error {
	err := p.watch(in, stream.Send)
	if err == nil && in.GetFollow() {
		<-stream.Context().Done()
	}
	return err
}

func (p fakePlane) GetPipeline(context.Context, *operatorv1.GetPipelineRequest) (*operatorv1.Pipeline, error) {
	return p.get()
}

// serve returns where p listens until the test is over.
func (p fakePlane) serve(t *testing.T) string {
	t.Helper()
	lis := get(net.Listen("tcp", "127.0.0.1:0"))(t)
	server := grpc.NewServer()
	operatorv1.RegisterOperatorServer(server, p)
	go server.Serve(lis)
	t.Cleanup(server.Stop)
	return lis.Addr().String()
}

// What a control plane answers is not taken for silence, and a list without a stream
// is one all the same.
func TestList_RefusalIsNoSilence(t *testing.T) {
	t.Parallel()
	refuse := func(code codes.Code, why string) func(*operatorv1.WatchRequest, func(*operatorv1.WatchResponse) error) error {
		return func(*operatorv1.WatchRequest, func(*operatorv1.WatchResponse) error) error {
			return status.Error(code, why)
		}
	}
	full := refuse(codes.ResourceExhausted, "no stream is left")
	one := func() (*operatorv1.Pipeline, error) {
		return &operatorv1.Pipeline{Name: "p", Status: "fine", Components: []*operatorv1.Component{{Record: 1, Id: "ledgers", Health: "healthy"}}}, nil
	}
	half := func(in *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		p, _ := one()
		send(&operatorv1.WatchResponse{Reset_: true, Pipeline: p, Components: p.GetComponents()})
		return status.Error(codes.Internal, "a bug")
	}
	many := func() (*operatorv1.Pipeline, error) { return nil, status.Error(codes.ResourceExhausted, "too many") }
	for _, tt := range []struct {
		name     string
		plane    fakePlane
		flags    string
		code     int
		out, err string // the error begins after the address
	}{
		{"denied", fakePlane{watch: refuse(codes.PermissionDenied, "not\x1b[31m you")}, "", exitPlane, "", "refuses: not\ufffd[31m you"},
		{"broken", fakePlane{watch: refuse(codes.Internal, "a bug")}, "-json", exitPlane, "", "refuses: a bug"},
		{"broken in the middle", fakePlane{watch: half}, "-json", exitPlane, "", "refuses: a bug"},
		{"another's", fakePlane{watch: refuse(codes.Unimplemented, "")}, "", exitPlane, "", "has no operator service, which list needs"},
		{"watched, another's", fakePlane{watch: refuse(codes.Unimplemented, "")}, "-watch", exitPlane, "", "has no operator service, which -watch needs"},
		{"full", fakePlane{watch: full, get: one}, "", exitOK, "p: fine (pid 0, )\nID ", ""},
		{"full, in JSON", fakePlane{watch: full, get: one}, "-json", exitOK, `"id": "ledgers"`, ""},
		{"full of many", fakePlane{watch: full, get: many}, "", exitPlane, "", "refuses: no stream is left"},
		{"watched when full", fakePlane{watch: full, get: one}, "-watch", exitPlane, "", "refuses: no stream is left"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			endpoint := tt.plane.serve(t)
			code, out, stderr := call(t, append([]string{"list", "-e", endpoint}, strings.Fields(tt.flags)...)...)
			want := ""
			if tt.err != "" {
				want = "flowctl: the control plane at " + endpoint + " " + tt.err + "\n"
			}
			if code != tt.code || stderr != want || !strings.Contains(out, tt.out) || (out == "") != (tt.out == "") {
				t.Errorf("exit %d, want %d, and %q\n%s%s", code, tt.code, want, stderr, out)
			}
		})
	}
}

// Where no control plane answers, list says so in a moment and why, whether it is to
// go on or not.
func TestList_SaysWhyNobodyAnswers(t *testing.T) { // not in parallel: another test must not hold it up
	files := newFiles(t, issue(t, newCA(t), nil), newCA(t))
	_, secure := startAlone(t, append(files.mutual(), "-no-persistence"))
	stopped, endpoint := startAlone(t, []string{"-no-persistence"})
	stopped.signal(syscall.SIGSTOP)
	for _, tt := range []struct {
		name     string
		endpoint string
		flags    []string
		want     []string
	}{
		{"nobody", "127.0.0.1:1", nil, []string{"nothing came within 2s: dial tcp 127.0.0.1:1: connect: connection refused\n"}},
		{"no file", "unix:/no/such", nil, []string{"nothing came within 2s: dial unix /no/such: connect: no such file or directory\n"}},
		{"stopped", endpoint, nil, []string{"nothing came within 2s"}},
		{"TLS", secure, nil, []string{"nothing came within 2s: error reading server preface", "\nflowctl: hint: it speaks TLS"}},
		{"another CA", secure, files.mutual(), []string{"nothing came within 2s: authentication handshake failed: tls: failed to verify certificate"}},
		{"another certificate", secure, append(files.flags(), "-tls-ca-cert", files.cert), []string{"nothing came within 2s: ", "\nflowctl: hint: it does not take the certificate of -tls-cert: tls: unknown certificate authority\n"}},
	} {
		for _, mode := range []string{"", "-json", "-watch", "-watch -json"} {
			t.Run(tt.name+" "+mode, func(t *testing.T) {
				t.Parallel()
				begun := time.Now()
				p := start(t, slices.Concat([]string{"list", "-e", tt.endpoint}, strings.Fields(mode), tt.flags))
				p.exit(exitPlane)
				if took := time.Since(begun); took > 8*time.Second {
					t.Errorf("it took %s", took)
				}
				if mode != "-watch -json" {
					p.hasNot(p.stdout, "\n")
				}
				p.has(p.stderr, append([]string{"flowctl: no control plane answers at " + tt.endpoint + ": "}, tt.want...)...)
			})
		}
	}
}

// A control plane that is named by a host of /etc/hosts is asked without DNS, which may not answer.
func TestNewConn_AsksNoDNS(t *testing.T) { // not in parallel: the resolver is that of the process
	before := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = before })
	var asked atomic.Int64
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		asked.Add(1)
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	_, port, _ := net.SplitHostPort(fakePlane{get: func() (*operatorv1.Pipeline, error) { return &operatorv1.Pipeline{}, nil }}.serve(t))
	conn := get(newConn("localhost:"+port, insecure.NewCredentials(), false))(t)
	defer conn.Close()
	_, err := operatorv1.NewOperatorClient(conn).GetPipeline(t.Context(), &operatorv1.GetPipelineRequest{})
	if asked.Load() > 0 || err != nil {
		t.Errorf("DNS was asked %d times, and the answer is: %v", asked.Load(), err)
	}
}

// What a script's unset variable leaves empty is not left out.
func TestList_EmptyArgumentIsRefused(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"list", "reload"} {
		want := "flowctl: " + command + " \"\": the argument must be a name, or be left out\nTry: flowctl help " + command + "\n"
		if code, out, stderr := call(t, command, ""); code != exitUsage || out != "" || stderr != want {
			t.Errorf("exit %d\n%s%s", code, out, stderr)
		}
	}
}

// What list prints as JSON is that whatever a control plane sends, and does nothing to
// a terminal.
func TestList_JSONCannotControlATerminal(t *testing.T) {
	t.Parallel()
	const hostile = "a\x7f\u009b2J\u202e\U000e0001\x1b\u2028é🚀"
	never := &timestamppb.Timestamp{Seconds: 1 << 40}
	endpoint := fakePlane{watch: func(in *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		send(&operatorv1.WatchResponse{Reset_: true, Pipeline: &operatorv1.Pipeline{Name: hostile, Status: hostile, Started: never}, Complete: true, Components: []*operatorv1.Component{{
			Id: hostile, Metadata: map[string]string{hostile: hostile}, RegisteredAt: never, LastSeen: never, Metrics: map[string]float64{"x": math.NaN()},
			Process: &operatorv1.Process{Started: never}, History: []*operatorv1.Change{{Time: never, Cause: hostile}},
		}}})
		return nil
	}}.serve(t)
	watch := start(t, []string{"list", "-e", endpoint, "-watch", "-json"})
	watch.waitOut(`"component":`)
	watch.stop()
	_, whole, _ := call(t, "list", "-e", endpoint, "-json")
	_, one, _ := call(t, "list", "-e", endpoint, "-json", hostile)
	for what, text := range map[string]string{"whole": whole, "one": one, "watch": watch.stdout.String()} {
		if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r)) }) {
			t.Errorf("%s: %q", what, text)
		}
		for dec := json.NewDecoder(strings.NewReader(text)); dec.More(); {
			var got any
			if err := dec.Decode(&got); err != nil || strings.Contains(fmt.Sprint(got), "e0001") || !strings.Contains(fmt.Sprint(got), hostile) {
				t.Errorf("%s: %v\n%s", what, err, text)
				break
			}
		}
	}
}

// watchEvents are what list -watch -json has printed, in short.
func watchEvents(t *testing.T, text string) []string {
	t.Helper()
	var out []string
	for dec := json.NewDecoder(strings.NewReader(text)); dec.More(); {
		var e listedEvent
		if err := dec.Decode(&e); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		switch {
		case e.Component != nil:
			out = append(out, e.Component.ID)
		case e.Ready != nil:
			out = append(out, strings.TrimSpace(fmt.Sprintf("%s %t %s", e.Status, *e.Ready, e.NotDurable)))
		default:
			out = append(out, e.Pipeline+e.Removed+e.Ended)
		}
	}
	return out
}

// What is gone when a stream begins anew is told as removed.
func TestWatch_SnapshotRemovesWhatIsGone(t *testing.T) {
	t.Parallel()
	endpoint := fakePlane{watch: func(in *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		for _, ids := range []string{"abc", "cbd", "c"} {
			out := &operatorv1.WatchResponse{Reset_: true}
			for _, id := range ids {
				out.Components = []*operatorv1.Component{{Record: int64(id), Id: string(id)}}
				send(out)
				out = &operatorv1.WatchResponse{}
			}
			out.Complete = true
			send(out)
		}
		send(&operatorv1.WatchResponse{Pipeline: &operatorv1.Pipeline{Status: "end"}})
		return nil
	}}.serve(t)
	p := start(t, []string{"list", "-watch", "-json", "-e", endpoint})
	p.waitOut(`"status":"end"`)
	p.stop()
	wantEqual(t, "events", watchEvents(t, p.stdout.String()), append(strings.Fields("a b c c b d a c b d"), "end false"))
}

// A state file that is not up to date is told when that changes.
func TestWatch_TellsOfAStateFileThatIsNotWritten(t *testing.T) {
	t.Parallel()
	endpoint := fakePlane{watch: func(in *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		send(&operatorv1.WatchResponse{Reset_: true, Complete: true, Pipeline: &operatorv1.Pipeline{Name: "p", Status: "one"}})
		send(&operatorv1.WatchResponse{Pipeline: &operatorv1.Pipeline{Name: "p", Status: "two", Ready: true, NotDurable: "full"}})
		send(&operatorv1.WatchResponse{Pipeline: &operatorv1.Pipeline{Name: "p", Status: "three", Ready: true, NotDurable: "full"}})
		send(&operatorv1.WatchResponse{Pipeline: &operatorv1.Pipeline{Name: "p", Status: "four"}})
		return nil
	}}.serve(t)
	p := start(t, []string{"list", "-watch", "-json", "-e", endpoint})
	p.waitOut(`"status":"four"`)
	p.stop()
	wantEqual(t, "events", watchEvents(t, p.stdout.String()), []string{"one false", "two true full", "three true full", "four false"})
	p = start(t, []string{"list", "-watch", "-e", endpoint})
	p.waitOut("four")
	p.stop()
	p.has(p.stdout, " p | one\n", " p | two; what is registered would not survive a restart: full\n", " p | three\n", " p | four; what is registered would survive a restart again\n")
}

// runBesideServer starts a run and a control plane alone, which list finds in dir.
func runBesideServer(t *testing.T) (dir string, run, server *process) {
	dir = t.TempDir()
	run = start(t, runArgs(sleeper(t)), runsIn(dir))
	server, _ = startAlone(t, []string{"-no-persistence"}, runsIn(dir))
	run.waitReady()
	eventually(t, "two run files", func() bool { return len(runFiles(t, filepath.Join(dir, "flowctl"))) == 2 })
	return dir, run, server
}

// That one of several has ended is shown where it happens, and the others go on.
func TestWatch_OneOfSeveralEnds(t *testing.T) {
	t.Parallel()
	dir, run, server := runBesideServer(t)
	text := start(t, []string{"list", "-watch"}, runsIn(dir))
	inJSON := start(t, []string{"list", "-watch", "-json"}, runsIn(dir))
	for _, p := range []*process{text, inJSON} {
		p.waitOut("1 of 1 ready")
		p.waitOut("control plane alone")
	}
	stopped := "the control plane at " + run.endpoint() + " has stopped"
	run.stop()
	text.waitOut(" test | " + stopped + "\n")
	inJSON.waitOut(`"pipeline":"test","endpoint":"` + run.endpoint() + `","ended":"` + stopped + `"}` + "\n")
	register(t, server.endpoint(), "later")
	text.waitOut("| later healthy\n")
	inJSON.waitOut(`"id":"later"`)
	server.signal(syscall.SIGKILL)
	for _, p := range []*process{text, inJSON} {
		p.exit(exitPlane)
		p.has(p.stderr, "flowctl: "+stopped+"\nflowctl: the control plane at "+server.endpoint()+" is gone: ")
	}
	inJSON.has(inJSON.stdout, `"pipeline":"","endpoint":"`+server.endpoint()+`","ended":"the control plane at `+server.endpoint()+" is gone: ")
}

// A control plane that hangs while it is watched is noticed.
func TestWatch_HangingPlaneIsNoticed(t *testing.T) {
	t.Parallel()
	server, endpoint := startAlone(t, []string{"-no-persistence"})
	p := start(t, []string{"list", "-watch", "-e", endpoint})
	p.waitOut("control plane alone")
	server.signal(syscall.SIGSTOP)
	p.exit(exitPlane)
	p.has(p.stderr, "flowctl: the control plane at "+endpoint+" is gone: ")
}

// A signal ends a watch, and the second one that waits for a reader.
func TestWatch_SignalEndsItThoughNobodyReads(t *testing.T) {
	t.Parallel()
	endpoint := fakePlane{watch: func(in *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		send(&operatorv1.WatchResponse{Pipeline: &operatorv1.Pipeline{Status: strings.Repeat("x", 1<<19)}}) // more than a pipe holds
		return nil
	}}.serve(t)
	for _, reads := range []bool{true, false} {
		out, in, err := os.Pipe()
		must(t, err)
		defer out.Close()
		p := start(t, []string{"list", "-watch", "-e", endpoint}, func(p *process) { p.cmd.Stdout = in })
		in.Close()
		eventually(t, "a line that is not written whole", func() bool { return unread(out) > 0 })
		p.signal(syscall.SIGTERM)
		if reads {
			go io.Copy(io.Discard, out)
			p.exit(exitOK)
			continue
		}
		eventually(t, "its end", func() bool {
			_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may not have taken the first yet
			select {
			case <-p.done:
				return true
			default:
				return false
			}
		})
		if state := p.cmd.ProcessState.Sys().(syscall.WaitStatus); state.Signal() != syscall.SIGTERM {
			t.Errorf("it ended with %v\n%s", p.cmd.ProcessState, p)
		}
	}
}

// openList is openTerminal for a list instead of a run.
func openList(t *testing.T, width, height int, args string) *terminal {
	t.Helper()
	c := openTerminal(t, width, height, nil)
	writeFile(t, filepath.Join(c.dir, "run"), "#!/bin/sh\nexec "+flowctlProgram()+" list "+args+"\n")
	return c
}

// On a terminal a row is a row, whatever is in it, and Ctrl-Z and Ctrl-\ leave the
// terminal as it was.
func TestWatch_Screen(t *testing.T) {
	t.Parallel()
	endpoint := fakePlane{watch: func(in *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		send(&operatorv1.WatchResponse{Reset_: true, Complete: true, Pipeline: &operatorv1.Pipeline{Name: "p", Status: "fine"}, Components: []*operatorv1.Component{
			{Record: 1, Id: "wide", Endpoint: strings.Repeat("宽", 60), Health: "healthy"}, {Record: 2, Id: "after", Health: "healthy"},
		}})
		return nil
	}}.serve(t)
	c := openList(t, 60, 12, "-watch -e "+endpoint)
	table := regexp.MustCompile(`^p: fine \(pid 0, \)\nID .*\nwide .*\nafter .*$`)
	shown := func(text string) bool { return table.MatchString(text) }
	c.run()
	c.until("a table", shown)
	modes := c.modes()
	c.keys("C-z")
	c.shows("$ ./run", "[1] + Stopped (signal)           ./run", "$")
	c.restored()
	c.keys("bg", "Enter")
	time.Sleep(1500 * time.Millisecond) // it is time itself that passes here
	c.shows("$ ./run", "[1] + Stopped (signal)           ./run", "$ bg", "[1] ./run", "$")
	c.keys("fg", "Enter")
	c.until("the table again", shown)
	if again := c.modes(); again != modes {
		t.Errorf("the modes were\n%s\nand then\n%s", modes, again)
	}
	c.keys("C-\\")
	c.until("the shell, below the last state", func(text string) bool {
		return strings.Contains(text, "\np: fine (pid 0, )\n") && strings.HasSuffix(text, "\n$")
	})
	c.restored()
	c.keys("clear; TERM=dumb ./run", "Enter")
	c.until("lines", func(text string) bool {
		return strings.Contains(text, "15:04:05 p | fine\n15:04:05 p | wide healthy\n")
	})
	c.restored()
	c.keys("C-c")
}

// Nothing is drawn of a control plane that has not told all, and one that has ended
// is not shown as if it had not.
func TestWatch_ScreenOfSeveral(t *testing.T) {
	t.Parallel()
	nobody := openList(t, 140, 20, "-watch -e 127.0.0.1:1")
	nobody.run()
	nobody.shows("$ ./run", "flowctl: no control plane answers at 127.0.0.1:8080: nothing came within 2s: dial tcp 127.0.0.1:8080: connect: connection refused", "$")
	nobody.restored()

	dir, run, server := runBesideServer(t)
	c := openList(t, 100, 20, "-watch")
	c.keys("XDG_RUNTIME_DIR="+dir+" ./run", "Enter")
	c.until("both", func(text string) bool {
		return strings.HasPrefix(text, "control plane alone (pid ") && strings.Contains(text, "\nnothing is registered\n\ntest: 1 of 1 ready (pid ")
	})
	run.stop()
	c.until("one", func(text string) bool {
		return strings.HasPrefix(text, "control plane alone (pid ") && strings.HasSuffix(text, "\nnothing is registered\n\ntest | the control plane at 127.0.0.1:8080 has stopped")
	})
	server.stop()
	c.until("the errors, below the last state", func(text string) bool {
		const stopped = "the control plane at 127.0.0.1:8080 has stopped\n"
		return strings.HasSuffix(text, "\nnothing is registered\n\ntest | "+stopped+"flowctl: "+stopped+"flowctl: "+stopped+"$")
	})
	c.restored()
}

func TestList_BothDialects(t *testing.T) {
	t.Parallel()
	legacy, v1, nameless := actor("ledgers", role{Dialect: "legacy"}), actor("transfers", role{Dialect: "v1"}), actor("store", role{Dialect: "legacy", Anonymous: true})
	namelessV1 := actor("sink-2", role{Dialect: "v1", Anonymous: true})
	v1.Inputs, nameless.Inputs, namelessV1.Inputs = []string{"ledgers"}, []string{"transfers"}, []string{"transfers"}
	p := launch(t, writePipeline(t, legacy, v1, nameless, namelessV1), "-heartbeat-ttl", "3s")
	p.waitReady()
	endpoint := p.endpoint()
	register(t, endpoint, "elsewhere")

	code, out, stderr := call(t, "list", "-e", endpoint)
	want := regexp.MustCompile(`^test: 4 of 4 ready \(pid \d+, ` + regexp.QuoteMeta(endpoint) + `\)
ID +TYPE +STATE +PID +RESTARTS +HEALTH +LAST SEEN +ENDPOINT +METRICS
ledgers +source +ready +\d+ +0 +healthy +\S+ ago +http://localhost:\d+/health +\S.*
transfers +processor +ready +\d+ +0 +healthy +\S+ ago +http://localhost:\d+/health +\S.*
store +processor +ready +\d+ +0 +healthy +\S+ ago +http://localhost:\d+/health +\S.*
sink-2 +processor +ready +\d+ +0 +healthy +\S+ ago +http://localhost:\d+/health +\S.*
elsewhere \(not in the pipeline\) +unspecified +- +- +- +healthy +\S+ ago +- +-
$`)
	if code != exitOK || stderr != "" || !want.MatchString(out) {
		t.Errorf("list: exit %d\n%s%s", code, stderr, out)
	}

	code, out, stderr = call(t, "list", "-endpoint", endpoint, "-json")
	var pipelines []listedPipeline
	if err := json.Unmarshal([]byte(out), &pipelines); err != nil || len(pipelines) != 1 || code != exitOK || stderr != "" {
		t.Fatalf("list -json: exit %d, %v\n%s%s", code, err, stderr, out)
	}
	var got []string
	for _, r := range pipelines[0].Components {
		got = append(got, fmt.Sprintf("%s %t %s %s %t", r.ID, r.InPipeline, r.Type, r.Health, r.Healthy))
		if r.LastSeen.IsZero() || r.Registered.IsZero() {
			t.Errorf("%s: seen %v, registered %v", r.ID, r.LastSeen, r.Registered)
		}
	}
	if want := []string{
		"ledgers true source healthy true", "transfers true processor healthy true", "store true processor healthy true",
		"sink-2 true processor healthy true", "elsewhere false unspecified healthy true",
	}; !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	p.stop()
}

// The type and the labels that the file gives a component are shown as they are.
func TestList_TypeAndLabels(t *testing.T) {
	t.Parallel()
	c := actor("a", role{Dialect: "v1"})
	c.Type, c.Labels = "kafka reader", map[string]string{"team": "data", "tier": "1\x1b[31m"}
	p := launch(t, writePipeline(t, c, shell("b", "exec sleep 300")))
	p.waitReady()
	code, out, stderr := call(t, "list", "a", "-e", p.endpoint())
	if want := regexp.MustCompile(`\ntype: +source\ntype in file: +kafka reader\nlabels: +team=data, tier=1\S*\[31m\n`); code != exitOK || stderr != "" || !want.MatchString(out) || strings.Contains(out, "\x1b") {
		t.Errorf("exit %d\n%s%q", code, stderr, out)
	}
	var pipelines []listedPipeline
	_, out, _ = call(t, "list", "-json", "-e", p.endpoint())
	must(t, json.Unmarshal([]byte(out), &pipelines))
	if a := pipelines[0].Components[0]; a.TypeInFile != c.Type || !maps.Equal(a.Labels, c.Labels) || strings.Count(out, `"labels"`) != 1 {
		t.Errorf("list -json\n%s", out)
	}
	p.stop()
}

// A plane that comes up while list looks for it is found. Its socket is there
// first, and cuts off the first attempt: so list has come too early.
func TestList_WaitsForAPlaneThatStarts(t *testing.T) {
	t.Parallel()
	lis := get(net.Listen("tcp", "127.0.0.1:0"))(t)
	p := start(t, []string{"list", "-e", lis.Addr().String()})
	conn := get(lis.Accept())(t)
	conn.Close()
	server := grpc.NewServer()
	defer server.Stop()
	operatorv1.RegisterOperatorServer(server, fakePlane{watch: func(_ *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		send(&operatorv1.WatchResponse{Components: []*operatorv1.Component{{Record: 1, Id: "late", Health: "healthy"}}, Reset_: true, Complete: true})
		return nil
	}})
	go server.Serve(lis)
	p.exit(exitOK)
	p.has(p.stdout, "late", "healthy")
}

// List takes but a few times as long as a program that only says its version.
func TestListTime(t *testing.T) {
	p := start(t, runArgs(writePipeline(t, actor("a", role{Dialect: "legacy"}), actor("b", role{Dialect: "v1"}), actor("c", role{Dialect: "legacy"}))), withBinary(plainFlowctl()))
	p.waitReady()
	best := func(args ...string) time.Duration {
		least := time.Hour
		for range 10 {
			begun := time.Now()
			if out, err := exec.Command(p.cmd.Path, args...).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			least = min(least, time.Since(begun))
		}
		return least
	}
	list, floor := best("list", "-e", p.endpoint()), best("version")
	t.Logf("list: %v, version: %v", list, floor)
	if most := 10 * floor; list > most && os.Getenv(scaleVar) != "" {
		t.Errorf("list takes %v, more than %v", list, most)
	}
	p.stop()
}

// A list that has no end, or that is more than a registry can be, is an error, and takes no more
// memory than the largest list.
func TestList_HasAnEnd(t *testing.T) { // not in parallel: another test must not hold it up
	endless := func(pause time.Duration, text string, each int) fakePlane {
		return fakePlane{watch: func(_ *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
			send(&operatorv1.WatchResponse{Reset_: true, Pipeline: &operatorv1.Pipeline{Name: "p", Status: "fine"}})
			for i := int64(0); i < 1<<20; {
				out := &operatorv1.WatchResponse{}
				for range each {
					i++
					out.Components = append(out.Components, &operatorv1.Component{Record: i, Id: "a", Description: text})
				}
				if send(out) != nil {
					return nil // list has ended
				}
				time.Sleep(pause)
			}
			return nil
		}, get: func() (*operatorv1.Pipeline, error) { return nil, status.Error(codes.ResourceExhausted, "too many") }}
	}
	for _, tt := range []struct {
		name  string
		plane fakePlane
		flags string
		want  string
	}{
		{"many", endless(0, "", 500), "", "the control plane at %s lists more than a registry holds: 131072 services, 256 MiB\n"},
		{"many, watched", endless(0, "", 500), "-watch", "the control plane at %s lists more than a registry holds: 131072 services, 256 MiB\n"},
		{"large", endless(0, strings.Repeat("x", 512<<10), 1), "-json", "the control plane at %s lists more than a registry holds: 131072 services, 256 MiB\n"},
		{"a large part", endless(0, strings.Repeat("x", 2<<20), 1), "", "the control plane at %s refuses: grpc: received message larger than max (20"},
		{"slow", endless(200*time.Millisecond, "", 1), "", "no control plane answers at %s: its list has not ended within 20s\n"},
	} {
		t.Run(tt.name, func(t *testing.T) { // one at a time: the others would slow it down
			endpoint := tt.plane.serve(t)
			p := start(t, append([]string{"list", "-e", endpoint}, strings.Fields(tt.flags)...), stdoutTo(io.Discard), withBinary(plainFlowctl()))
			most := 0
			for ended := false; !ended; {
				select {
				case <-p.done:
					ended = true
				case <-time.After(10 * time.Millisecond):
					now, _ := memoryOf(p.cmd.Process.Pid, "VmHWM")
					most = max(most, now)
				}
			}
			p.exit(exitPlane)
			p.has(p.stderr, "flowctl: "+fmt.Sprintf(tt.want, endpoint))
			if t.Logf("%.0f MiB", mib(most)); most > 1<<30 {
				t.Errorf("it took %.0f MiB", mib(most))
			}
		})
	}
}

// Beside a pipeline, what others have registered does not make list fail: unless it is asked for.
func TestList_StrangersDoNotCountBesideAPipeline(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: "v1"})), "-heartbeat-ttl", "3s")
	p.waitReady()
	dialPlane(t, p.endpoint()).mustRegister(t, "v1", registration{id: "stranger"})
	p.waitErr("msg=unhealthy id=stranger ")
	for args, want := range map[string]int{"": exitOK, " a": exitOK, " stranger": exitFailed} {
		if code, out, stderr := call(t, strings.Fields("list -e "+p.endpoint()+args)...); code != want {
			t.Errorf("list%s: exit %d, want %d\n%s%s", args, code, want, out, stderr)
		}
	}
	p.stop()
}
