//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
)

// The tests of this file run the built program and look at it from outside: its
// exit code, its two outputs, its control plane and its processes. The components
// are this test binary, told by roleVar what to be.
const (
	roleVar   = "TEST_COMPONENT_ROLE"  // a role as JSON
	markVar   = "TEST_FLOWCTL_MARK"    // tells the processes of one flowctl from all others
	binaryVar = "TEST_FLOWCTL_BINARY"  // the built flowctl, for a test that runs again in ownNetwork
	lonelyVar = "TEST_FLOWCTL_NETWORK" // the test that runs in a network of its own

	patience = 30 * time.Second // for what should come within milliseconds, on a loaded machine
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "guard" {
		main() // started by a supervisor of this process
	}
	if err := becomeSubreaper(); err != nil {
		panic(err)
	}
	if text, ok := os.LookupEnv(roleVar); ok {
		var r role
		if err := json.Unmarshal([]byte(text), &r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		os.Exit(r.play())
	}
	// Not those of the machine, for a flowctl that is told of no other.
	os.Unsetenv("RUNTIME_DIRECTORY")
	os.Setenv("XDG_RUNTIME_DIR", buildFolder())
	// A signal that this program was started to ignore, as in the background of a
	// script, would stay ignored in flowctl. One that is caught does not.
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGHUP} {
		if signal.Ignored(sig) {
			signal.Notify(make(chan os.Signal, 1), sig)
		}
	}
	// Most of these tests wait for others most of the time.
	flag.Parse()
	parallel := flag.Lookup("test.parallel").Value
	if parallel.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		_ = parallel.Set(strconv.Itoa(3 * runtime.GOMAXPROCS(0)))
	}
	code := m.Run()
	os.RemoveAll(buildFolder())
	os.Exit(code)
}

var buildFolder = sync.OnceValue(func() string {
	folder, err := os.MkdirTemp("", "flowctl-test-")
	if err != nil {
		panic(err)
	}
	return folder
})

// build builds a package of this module with the flags given and returns the file.
func build(tb testing.TB, name, pkg string, flags ...string) string {
	tb.Helper()
	file := filepath.Join(buildFolder(), name)
	if out, err := exec.Command("go", slices.Concat([]string{"build", "-o", file}, flags, []string{pkg})...).CombinedOutput(); err != nil {
		tb.Fatalf("go build: %v\n%s", err, out)
	}
	return file
}

var built struct {
	sync.Once
	file string
}

// flowctlProgram returns flowctl, built once: with the race detector where this test is.
func flowctlProgram(tb testing.TB) string {
	tb.Helper()
	if file := os.Getenv(binaryVar); file != "" {
		return file
	}
	built.Do(func() {
		var flags []string
		if raceEnabled() {
			flags = []string{"-race"}
		}
		built.file = build(tb, "flowctl", ".", flags...)
	})
	if built.file == "" {
		tb.Fatal("flowctl could not be built")
	}
	return built.file
}

func raceEnabled() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// A role is what a component does. It says on its output what it has come to, so
// that a test can wait for it: "waiting" for SIGUSR2, "registered", and what
// SIGUSR1 and SIGUSR2 have changed.
type role struct {
	Dialect   string `json:",omitempty"` // "legacy" or "v1"; without one it does not register
	Anonymous bool   `json:",omitempty"` // it sends no id
	Nameless  bool   `json:",omitempty"` // it sends nothing to know it by, and cannot register unless it is known
	Alias     string `json:",omitempty"` // it registers as this service
	Gate      bool   `json:",omitempty"` // before it registers or passes a check, it waits for SIGUSR2
	Mute      bool   `json:",omitempty"` // it never heartbeats
	Hidden    bool   `json:",omitempty"` // only root can look into it
	OnUSR1    string `json:",omitempty"` // "exit", "mute", "unhealthy", "fail" its checks; SIGUSR2 undoes it
	End       string `json:",omitempty"` // ends with Code: "early", before it registers, or "registered"
	Starts    int    `json:",omitempty"` // so many first starts End so, 0 for all; needs a Journal
	Code      int    `json:",omitempty"`
	Out, Err  []byte `json:",omitempty"` // printed first
	Long      int    `json:",omitempty"` // after Err, so often longPiece in one line, and a line without its end
	Flood     int    `json:",omitempty"` // numbered lines to print
	Environ   bool   `json:",omitempty"` // print the environment
	Deaf      bool   `json:",omitempty"` // ignore SIGTERM
	Serve     string `json:",omitempty"` // unix socket; after SIGTERM it lives until its one client has gone
	Dial      string `json:",omitempty"` // unix socket to connect to
	Check     string `json:",omitempty"` // "http", "tcp" or "grpc": serve health checks on HEALTH_PORT
	Journal   string `json:",omitempty"` // file for a line at start, SIGTERM and end
	Floor     bool   `json:",omitempty"` // it is no component: it serves the floor until SIGTERM
}

const longPiece = "0123456789abcdef"

func (r role) id() string { return os.Getenv("FLOWCTL_COMPONENT_ID") }

// play is main for a component. It returns the exit code.
func (r role) play() int {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2)
	if r.Floor {
		server, endpoint, err := serveFloor()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Fprintf(os.Stderr, "msg=listening endpoint=%s\n", endpoint) // as flowctl logs it
		<-signals
		server.Stop()
		return 0
	}
	r.note("start")
	if r.Hidden {
		_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_DUMPABLE, 0, 0)
	}
	os.Stdout.Write(r.Out)
	os.Stderr.Write(r.Err)
	if r.Long > 0 {
		fmt.Fprint(os.Stderr, strings.Repeat(longPiece, r.Long), "\nno newline")
	}
	r.flood()
	if r.Environ {
		for _, entry := range os.Environ() {
			fmt.Printf("env %q\n", entry)
		}
	}
	served := r.stream()
	check := r.serveCheck()
	if r.Gate {
		fmt.Println("waiting")
		r.note("gate")
		for sig := range signals {
			if sig == syscall.SIGTERM && !r.Deaf {
				return r.end()
			}
			if sig == syscall.SIGUSR2 {
				break
			}
		}
	}
	if r.ends("early") {
		return r.Code
	}
	check.set(true)
	alive := func(flowctlv1.HealthStatus) {}
	if r.Dialect != "" {
		var err error
		if alive, err = r.register(); err != nil {
			fmt.Fprintln(os.Stderr, "cannot register:", err)
			return 99
		}
		fmt.Println("registered")
	}
	if r.ends("registered") {
		return r.Code
	}
	return r.live(signals, served, check, alive)
}

// live is the life of a component that is up.
func (r role) live(signals <-chan os.Signal, served <-chan struct{}, check *checkServer, alive func(flowctlv1.HealthStatus)) int {
	interval, err := time.ParseDuration(os.Getenv("FLOWCTL_HEARTBEAT_INTERVAL"))
	if err != nil {
		interval = time.Hour
	}
	ticker := time.NewTicker(interval)
	mute := r.Mute
	for {
		select {
		case <-ticker.C:
			if !mute {
				alive(flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN)
			}
		case sig := <-signals:
			switch {
			case sig == syscall.SIGUSR2:
				mute = r.Mute
				check.set(true)
				alive(flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY)
				fmt.Println("resumed")
			case sig == syscall.SIGTERM && r.Deaf:
				r.note("term")
				fmt.Println("deaf")
			case sig == syscall.SIGTERM:
				r.note("term")
				<-served
				return r.end()
			case r.OnUSR1 == "exit":
				return r.Code
			case r.OnUSR1 == "mute":
				mute = true
			case r.OnUSR1 == "unhealthy":
				alive(flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY)
			case r.OnUSR1 == "fail":
				check.set(false)
			}
		}
	}
}

func (r role) end() int {
	r.note("stop")
	return 0
}

// note appends a line to the journal, which is in the order of what happened.
func (r role) note(what string) {
	if r.Journal == "" {
		return
	}
	f, err := os.OpenFile(r.Journal, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(f, "%s %s\n", what, r.id())
	f.Close()
}

// ends tells whether this start is to end at the point that when names.
func (r role) ends(when string) bool {
	if r.End != when {
		return false
	}
	if r.Starts == 0 {
		return true
	}
	data, _ := os.ReadFile(r.Journal)
	starts := 0
	for line := range strings.Lines(string(data)) {
		if line == "start "+r.id()+"\n" {
			starts++
		}
	}
	return starts <= r.Starts
}

func (r role) flood() {
	out := bufio.NewWriter(os.Stdout)
	for i := range r.Flood {
		fmt.Fprintf(out, "line %d of %s %s\n", i, r.id(), strings.Repeat("x", i%200))
	}
	out.Flush()
}

// stream opens the data stream to another component. The channel is closed when
// nobody reads from this one.
func (r role) stream() <-chan struct{} {
	gone := make(chan struct{})
	if r.Dial != "" {
		if _, err := net.Dial("unix", r.Dial); err != nil {
			panic(err)
		}
	}
	if r.Serve == "" {
		close(gone)
		return gone
	}
	lis, err := net.Listen("unix", r.Serve)
	if err != nil {
		panic(err)
	}
	go func() {
		conn, err := lis.Accept()
		if err == nil {
			_, _ = io.Copy(io.Discard, conn)
		}
		close(gone)
	}()
	return gone
}

func (r role) serveCheck() *checkServer {
	address := net.JoinHostPort("127.0.0.1", os.Getenv("HEALTH_PORT"))
	listen := func() net.Listener {
		lis, err := net.Listen("tcp", address)
		if err != nil {
			panic(err)
		}
		return lis
	}
	var passes atomic.Bool
	switch r.Check {
	case "http":
		go http.Serve(listen(), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Println("probed")
			if !passes.Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		}))
		return &checkServer{passes.Store}
	case "tcp":
		var lis net.Listener
		return &checkServer{func(pass bool) {
			if pass && lis == nil {
				lis = listen()
			} else if !pass && lis != nil {
				lis.Close()
				lis = nil
			}
		}}
	case "grpc":
		state := health.NewServer()
		server := grpc.NewServer()
		healthpb.RegisterHealthServer(server, state)
		set := func(pass bool) {
			state.SetServingStatus("data", map[bool]healthpb.HealthCheckResponse_ServingStatus{
				true: healthpb.HealthCheckResponse_SERVING, false: healthpb.HealthCheckResponse_NOT_SERVING,
			}[pass])
		}
		set(false)
		go server.Serve(listen())
		return &checkServer{set}
	}
	return &checkServer{func(bool) {}}
}

// register registers by r's dialect and returns what sends a heartbeat.
func (r role) register() (func(flowctlv1.HealthStatus), error) {
	creds, err := componentCredentials()
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(os.Getenv("FLOWCTL_ENDPOINT"), grpc.WithTransportCredentials(creds), grpc.WithNoProxy())
	if err != nil {
		return nil, err
	}
	told := func(info map[string]string) {
		if r.Environ {
			fmt.Println("control plane", info["control_plane_endpoint"])
		}
	}
	id := r.id()
	if r.Alias != "" {
		id = r.Alias
	}
	endpoint := os.Getenv("HEALTH_ENDPOINT")
	if r.Anonymous {
		id, endpoint = "", "http://localhost:"+os.Getenv("HEALTH_PORT")+"/health"
	}
	if r.Nameless {
		id, endpoint = "", ""
	}
	known := func(id string, err error) error {
		if r.Nameless && err == nil && id != r.id() {
			return fmt.Errorf("it is taken for %q", id)
		}
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if r.Dialect == "v1" {
		client := flowctlv1.NewControlPlaneServiceClient(conn)
		ack, err := client.RegisterComponent(ctx, &flowctlv1.RegisterRequest{Component: &flowctlv1.ComponentInfo{Id: id, Endpoint: endpoint}})
		told(ack.GetConnectionInfo())
		return func(status flowctlv1.HealthStatus) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			_, _ = client.Heartbeat(ctx, &flowctlv1.HeartbeatRequest{ServiceId: ack.GetServiceId(), Status: status, Metrics: map[string]string{"lag": "3"}})
		}, known(ack.GetServiceId(), err)
	}
	client := flowctlpb.NewControlPlaneClient(conn)
	ack, err := client.Register(ctx, &flowctlpb.ServiceInfo{ServiceId: id, HealthEndpoint: endpoint})
	told(ack.GetConnectionInfo())
	return func(flowctlv1.HealthStatus) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_, _ = client.Heartbeat(ctx, &flowctlpb.ServiceHeartbeat{ServiceId: ack.GetServiceId(), Metrics: map[string]float64{"records": 7}})
	}, known(ack.GetServiceId(), err)
}

// checkServer is what a health_check asks. It fails until it is set to pass.
type checkServer struct {
	set func(pass bool)
}

// actor returns a component that plays r. The caller sets what else it is to have.
func actor(id string, r role) Component {
	program, err := os.Executable()
	if err != nil {
		panic(err)
	}
	text, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	return Component{ID: id, Command: []string{program}, Env: map[string]string{roleVar: string(text)}}
}

// shell returns a component that runs a script and knows nothing of flowctl.
func shell(id, script string) Component {
	return Component{ID: id, Command: []string{"sh", "-c", strings.ReplaceAll(script, "$", "$$")}, Register: new(false)}
}

// writePipeline writes a pipeline file: what has no inputs is a source, all else a
// processor.
func writePipeline(tb testing.TB, components ...Component) string {
	tb.Helper()
	p := Pipeline{APIVersion: "flowctl/v1", Kind: "Pipeline", Metadata: Metadata{Name: "test"}}
	for _, c := range components {
		if len(c.Inputs) == 0 {
			p.Spec.Sources = append(p.Spec.Sources, c)
		} else {
			p.Spec.Processors = append(p.Spec.Processors, c)
		}
	}
	data, err := json.Marshal(p)
	if err != nil {
		tb.Fatal(err)
	}
	return writeFile(tb, filepath.Join(tb.TempDir(), "pipeline.json"), string(data))
}

func writeFile(tb testing.TB, name, text string) string {
	tb.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	return name
}

// A transcript keeps what is written to it and lets others wait for more.
type transcript struct {
	mu    sync.Mutex // guards the fields below
	data  []byte
	grown chan struct{} // closed at the next write
}

func newTranscript() *transcript { return &transcript{grown: make(chan struct{})} }

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.data = append(t.data, p...)
	close(t.grown)
	t.grown = make(chan struct{})
	return len(p), nil
}

// text returns what was written so far, and a channel that is closed when there is more.
func (t *transcript) text() (string, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.data), t.grown
}

func (t *transcript) String() string {
	text, _ := t.text()
	return text
}

// contains waits until it has want count times, done is closed, or the deadline.
func (t *transcript) contains(want string, count int, done <-chan struct{}) bool {
	deadline := time.After(patience)
	for {
		text, grown := t.text()
		if strings.Count(text, want) >= count {
			return true
		}
		select {
		case <-grown:
		case <-done:
			return strings.Count(t.String(), want) >= count
		case <-deadline:
			return false
		}
	}
}

// process is a flowctl that was started, with all that it prints.
type process struct {
	tb             testing.TB
	cmd            *exec.Cmd
	mark           string
	stdout, stderr *transcript
	notified       *transcript // the datagrams of sd_notify, each ended by an empty line
	done           chan struct{}
}

// option changes how flowctl is started.
type option func(p *process)

func inFolder(dir string) option { return func(p *process) { p.cmd.Dir = dir } }

func withEnv(entries ...string) option {
	return func(p *process) { p.cmd.Env = append(p.cmd.Env, entries...) }
}

var marks atomic.Int64

// start starts flowctl with args. At the end of the test it is killed if need be,
// and none of its processes may be left.
func start(tb testing.TB, args []string, options ...option) *process {
	tb.Helper()
	p := &process{
		tb: tb, mark: fmt.Sprintf("%s=%d.%d", markVar, os.Getpid(), marks.Add(1)),
		stdout: newTranscript(), stderr: newTranscript(), notified: newTranscript(), done: make(chan struct{}),
	}
	p.cmd = exec.Command(flowctlProgram(tb), args...)
	p.cmd.Env = append(baseEnv(), p.mark,
		"GORACE=atexit_sleep_ms=0",      // else each process takes a second to end
		"XDG_RUNTIME_DIR="+tb.TempDir(), // pipelines of the same name run side by side
		"XDG_STATE_HOME="+tb.TempDir())
	p.cmd.Stdout, p.cmd.Stderr = p.stdout, p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = 5 * time.Second // where something that it started holds its output
	for _, o := range options {
		o(p)
	}
	if err := p.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // the exit code is in ProcessState
		close(p.done)
	}()
	tb.Cleanup(p.cleanup)
	return p
}

// launch starts flowctl with a pipeline on a free port.
func launch(tb testing.TB, file string, args ...string) *process {
	tb.Helper()
	return start(tb, append([]string{"run", file, "-control-plane-port", "0"}, args...))
}

func (p *process) cleanup() {
	select {
	case <-p.done:
		if left := p.left(); len(left) > 0 {
			p.tb.Errorf("flowctl left processes behind: %v\n%s", left, p)
		}
	default:
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
	p.killLeft()
	if text := p.stderr.String(); strings.Contains(text, "DATA RACE") {
		p.tb.Errorf("the race detector has found something:\n%s", text)
	}
}

// killLeft ends what flowctl started and has not ended.
func (p *process) killLeft() {
	for _, pid := range marked(p.mark) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// left returns what runs of the processes that flowctl started. One that was sent
// SIGKILL has a moment to go, and the guard of a flowctl that was killed looks for a
// while longer; survive_test.go is the one to time that.
func (p *process) left() []string {
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids := marked(p.mark)
		if len(pids) == 0 || time.Now().After(deadline) {
			var left []string
			for _, pid := range pids {
				line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				left = append(left, fmt.Sprintf("%d %q", pid, bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
			}
			return left
		}
		time.Sleep(5 * time.Millisecond) // the end of someone else's child is no event for us
	}
}

// String is all that there is to see, for the message of a test that fails.
func (p *process) String() string {
	clip := func(s string) string {
		const most = 8 << 10
		if len(s) > most {
			return s[:most/2] + "\n[...]\n" + s[len(s)-most/2:]
		}
		return s
	}
	return fmt.Sprintf("--- flowctl %s\n--- stdout\n%s\n--- stderr\n%s\n--- notified\n%s",
		strings.Join(p.cmd.Args[1:], " "), clip(p.stdout.String()), clip(p.stderr.String()), clip(p.notified.String()))
}

// waitOut and its like wait for a text that flowctl prints, or prints count times.
func (p *process) waitOut(want string) { p.tb.Helper(); p.wait(p.stdout, want, 1) }

func (p *process) waitErr(want string) { p.tb.Helper(); p.wait(p.stderr, want, 1) }

func (p *process) wait(in *transcript, want string, count int) {
	p.tb.Helper()
	done := p.done
	if in == p.notified {
		done = nil // the last datagrams are read after the end
	}
	if !in.contains(want, count, done) {
		p.tb.Fatalf("%q did not come %d times\n%s", want, count, p)
	}
}

func (p *process) waitReady() { p.tb.Helper(); p.waitErr(`msg="pipeline ready"`) }

// exit waits for the end of flowctl and checks its exit code.
func (p *process) exit(want int) {
	p.tb.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.tb.Fatalf("flowctl still runs\n%s", p)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != want {
		p.tb.Fatalf("flowctl: %v, want exit status %d\n%s", p.cmd.ProcessState, want, p)
	}
}

// stop ends flowctl as a user would and wants it to end well.
func (p *process) stop() {
	p.tb.Helper()
	p.signal(syscall.SIGTERM)
	p.exit(exitOK)
}

func (p *process) signal(sig syscall.Signal) {
	p.tb.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.tb.Fatalf("cannot send %s: %v\n%s", sig, err, p)
	}
}

// tell signals the process that component id has now.
func (p *process) tell(id string, sig syscall.Signal) {
	p.tb.Helper()
	if err := syscall.Kill(p.pid(id), sig); err != nil {
		p.tb.Fatalf("cannot send %s to %s: %v\n%s", sig, id, err, p)
	}
}

// pid is the latest process of component id.
func (p *process) pid(id string) int {
	p.tb.Helper()
	p.waitErr("msg=started component=" + id + " ")
	all := regexp.MustCompile(`msg=started component=`+regexp.QuoteMeta(id)+` pid=(\d+)`).FindAllStringSubmatch(p.stderr.String(), -1)
	pid, err := strconv.Atoi(all[len(all)-1][1])
	if err != nil {
		p.tb.Fatal(err)
	}
	return pid
}

// endpoint is where the control plane listens.
func (p *process) endpoint() string {
	p.tb.Helper()
	line := regexp.MustCompile(`msg=listening endpoint=(\S+)\n`)
	p.waitErr("msg=listening endpoint=")
	return line.FindStringSubmatch(p.stderr.String())[1]
}

// has checks that the texts are in got, in this order.
func (p *process) has(got *transcript, texts ...string) {
	p.tb.Helper()
	rest := got.String()
	for _, want := range texts {
		_, after, found := strings.Cut(rest, want)
		if !found {
			p.tb.Errorf("%q is missing, or not where it should be\n%s", want, p)
			return
		}
		rest = after
	}
}

func (p *process) hasNot(got *transcript, texts ...string) {
	p.tb.Helper()
	for _, text := range texts {
		if strings.Contains(got.String(), text) {
			p.tb.Errorf("%q should not be there\n%s", text, p)
		}
	}
}

// lines are the lines of component id on standard output, without what flowctl
// puts before them.
func (p *process) lines(id string) []string {
	var lines []string
	for line := range strings.Lines(p.stdout.String()) {
		head, text, found := strings.Cut(line, " | ")
		if stamp, name, _ := strings.Cut(head, " "); found && len(stamp) == len(time.TimeOnly) && strings.TrimRight(name, " ") == id {
			lines = append(lines, strings.TrimSuffix(text, "\n"))
		}
	}
	return lines
}

// checkExtensions checks that systemd was asked for a time that makes sense.
func (p *process) checkExtensions() {
	p.tb.Helper()
	for _, m := range regexp.MustCompile(`EXTEND_TIMEOUT_USEC=(.*)`).FindAllStringSubmatch(p.notified.String(), -1) {
		if usec, err := strconv.Atoi(m[1]); err != nil || usec < 1e6 || usec > 3600e6 {
			p.tb.Errorf("%s is not between a second and an hour\n%s", m[0], p)
		}
	}
}

// awaitGuard gives the guard of a flowctl that was killed the time that it has to end;
// that it has ended is checked at the end of each test.
func (p *process) awaitGuard() {
	for deadline := time.Now().Add(afterlife()); len(marked(p.mark)) > 0 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
	}
}

// told is what component id, once it has registered, was told of the control plane:
// its variables, and the address that it got when it registered.
func (p *process) told(id string) map[string]string {
	p.tb.Helper()
	told := make(map[string]string)
	for _, line := range p.lines(id) {
		if quoted, ok := strings.CutPrefix(line, "env "); ok {
			entry, err := strconv.Unquote(quoted)
			if err != nil {
				p.tb.Error(err)
			}
			name, value, _ := strings.Cut(entry, "=")
			told[name] = value
		} else if address, ok := strings.CutPrefix(line, "control plane "); ok {
			told["connection_info"] = address
		}
	}
	return told
}

// marked returns the processes that have mark in their environment.
func marked(mark string) []int {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		env, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if slices.Contains(strings.Split(string(env), "\x00"), mark) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// call runs flowctl to its end.
func call(tb testing.TB, args ...string) (code int, stdout, stderr string) {
	tb.Helper()
	p := start(tb, args)
	select {
	case <-p.done:
	case <-time.After(patience):
		tb.Fatalf("flowctl still runs\n%s", p)
	}
	return p.cmd.ProcessState.ExitCode(), p.stdout.String(), p.stderr.String()
}

// freePort returns a port that is free now and that no one gets who does not ask
// for it by number: it is below those that the kernel gives away.
func freePort(tb testing.TB) string {
	tb.Helper()
	for range 1000 {
		port := strconv.Itoa(20000 + rand.IntN(12000))
		if lis, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			lis.Close()
			return port
		}
	}
	tb.Fatal("no port is free")
	return ""
}

// readJournal returns what components have noted so far.
func readJournal(tb testing.TB, file string) []string {
	tb.Helper()
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		tb.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

// inOrder checks that each entry of want is in got, after the one before it.
func inOrder(tb testing.TB, got []string, want ...string) {
	tb.Helper()
	rest := got
	for _, w := range want {
		i := slices.Index(rest, w)
		if i < 0 {
			tb.Errorf("got the order %q, want %q", got, want)
			return
		}
		rest = rest[i+1:]
	}
}

// notifySocket lets p tell systemd, which is the test.
func notifySocket(tb testing.TB, address string) option {
	return func(p *process) {
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 4096)
			for {
				n, err := conn.Read(buf)
				if err != nil {
					return
				}
				p.notified.Write(append(bytes.Clone(buf[:n]), "\n\n"...))
			}
		}()
		p.cmd.Env = append(p.cmd.Env, "NOTIFY_SOCKET="+address)
	}
}

// shortDir is a folder whose name leaves room for a socket's: the kernel takes 107 bytes.
func shortDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "f")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// ownNetwork runs the test that calls it again in a network of its own, where no
// port is taken, and returns true there.
func ownNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv(lonelyVar) == t.Name() {
		raiseLoopback(t)
		return true
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run=^"+regexp.QuoteMeta(t.Name())+"$", "-test.v")
	cmd.Env = append(os.Environ(), lonelyVar+"="+t.Name(), binaryVar+"="+flowctlProgram(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EINVAL):
		t.Skip("this system does not let us have a network of our own:", err)
	case err != nil:
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func raiseLoopback(t *testing.T) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	request := struct { // ifreq of netdevice(7)
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: syscall.IFF_UP}
	copy(request.name[:], "lo")
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		t.Fatal("cannot raise the loopback:", errno)
	}
}

// afterlife is how long the processes of a run may outlive a flowctl that was killed,
// and twice that with the race detector, which makes the guard several times slower.
var afterlife = sync.OnceValue(func() time.Duration {
	if raceEnabled() {
		return 4 * time.Second
	}
	return 2 * time.Second
})

// A herd is the token of the processes of one test. It serves sleep(1) as a number.
type herd string

var herds atomic.Int64

func newHerd() herd {
	return herd(fmt.Sprintf("3600.%07d%05d", os.Getpid(), herds.Add(1)))
}

// script puts the token in the place of each T.
func (h herd) script(text string) string {
	return regexp.MustCompile(`\bT\b`).ReplaceAllString(text, string(h))
}

// living returns the processes of the herd with their command lines.
func (h herd) living() map[int]string {
	found := make(map[int]string)
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		line, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if bytes.Contains(line, []byte(h)) {
			found[pid] = string(bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
		}
	}
	return found
}

// signal signals a process if it still is one of the herd.
func (h herd) signal(pid int, sig syscall.Signal) {
	process, err := os.FindProcess(pid) // by a pidfd, which cannot come to mean another process
	if err != nil {
		return
	}
	defer process.Release()
	if line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); bytes.Contains(line, []byte(h)) {
		_ = process.Signal(sig)
	}
}

// await waits until n processes of the herd live. Nobody tells us of those.
func (h herd) await(p *process, n int) map[int]string {
	p.tb.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		living := h.living()
		if len(living) >= n {
			return living
		}
		if time.Now().After(deadline) {
			p.tb.Fatalf("%d processes live, want %d: %v\n%s", len(living), n, living, p)
		}
	}
}

// gone wants the herd to be gone so long after flowctl's end. What is left is killed.
func (h herd) gone(p *process, within time.Duration) {
	p.tb.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.tb.Fatalf("flowctl still runs\n%s", p)
	}
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		living := h.living()
		if len(living) == 0 {
			p.awaitGuard()
			return
		}
		if time.Now().After(deadline) {
			p.tb.Errorf("%s after the end of flowctl these live: %v\n%s", within, living, p)
			for pid := range living {
				h.signal(pid, syscall.SIGKILL)
			}
			return
		}
	}
}

// end ends flowctl by a signal and checks that nothing of the herd is left: at once
// where flowctl was asked, and soon where it was killed.
func (h herd) end(p *process, sig syscall.Signal) {
	p.tb.Helper()
	pid := guardOf(p)
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	guard := handle(p.tb, pid)
	p.signal(sig)
	within := afterlife()
	if sig != syscall.SIGKILL {
		p.exit(exitOK)
		within = 0
	}
	h.gone(p, within)
	if _, ok := ends(p.tb, afterlife(), guard); !ok {
		p.tb.Errorf("the guard outlives flowctl\n%s", p)
	}
	for arg := range strings.SplitSeq(string(line), "\x00") {
		if _, err := os.Stat(arg); err == nil && strings.HasPrefix(arg, "/sys/fs/cgroup/") {
			p.tb.Errorf("the control group %s is left\n%s", arg, p)
		}
	}
}

// eventually waits for something that nobody tells of.
func eventually(tb testing.TB, what string, done func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("in vain waited for: %s", what)
		}
	}
}

// childrenOf returns the children of a process that live, and how many do not.
func childrenOf(pid int) (living []int, zombies int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		_, rest, found := bytes.Cut(data, []byte(") "))
		fields := strings.Fields(string(rest))
		if err != nil || !found || len(fields) < 2 || fields[1] != strconv.Itoa(pid) {
			continue
		}
		if child, err := strconv.Atoi(e.Name()); err == nil && fields[0] != "Z" {
			living = append(living, child)
		} else if err == nil {
			zombies++
		}
	}
	return living, zombies
}

// guardOf returns the process that flowctl runs beside its components, which takes
// its name as soon as it ignores signals.
func guardOf(p *process) int {
	p.tb.Helper()
	var guard int
	eventually(p.tb, "a guard", func() bool {
		living, _ := childrenOf(p.cmd.Process.Pid)
		for _, pid := range living {
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) == guardName+"\n" {
				guard = pid
				return true
			}
		}
		return false
	})
	return guard
}

// handle is a pidfd: it names a process also when that is not ours, and is readable
// when the process has ended.
func handle(tb testing.TB, pid int) int {
	tb.Helper()
	const pidfdOpen = 434 // in every architecture
	fd, _, errno := syscall.Syscall(pidfdOpen, uintptr(pid), 0, 0)
	if errno != 0 {
		tb.Fatalf("pidfd_open %d: %v", pid, errno)
	}
	tb.Cleanup(func() { syscall.Close(int(fd)) })
	return int(fd)
}

// ends returns when each of the processes has ended, and whether all have in time.
func ends(tb testing.TB, within time.Duration, fds ...int) ([]time.Time, bool) {
	tb.Helper()
	ep, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	defer syscall.Close(ep)
	for i, fd := range fds {
		if err := syscall.EpollCtl(ep, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLONESHOT, Fd: int32(i)}); err != nil {
			tb.Fatal(err)
		}
	}
	times := make([]time.Time, len(fds))
	events := make([]syscall.EpollEvent, 64)
	deadline := time.Now().Add(within)
	for left := len(fds); left > 0; {
		wait := time.Until(deadline)
		if wait <= 0 {
			return times, false
		}
		n, err := syscall.EpollWait(ep, events, int(wait.Milliseconds())+1)
		if err != nil && err != syscall.EINTR {
			tb.Fatal(err)
		}
		now := time.Now()
		for _, e := range events[:max(n, 0)] {
			times[e.Fd] = now
			left--
		}
	}
	return times, true
}

// plain returns flowctl without the race detector, for what is measured.
var plain = sync.OnceValue(func() string {
	file := filepath.Join(buildFolder(), "flowctl-plain")
	if out, err := exec.Command("go", "build", "-o", file, ".").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("go build: %v\n%s", err, out))
	}
	return file
})

func withBinary(file string) option {
	return func(p *process) { p.cmd.Path, p.cmd.Args[0] = file, file }
}

func stdoutTo(w io.Writer) option { return func(p *process) { p.cmd.Stdout = w } }

// runArgs are the arguments of a run on a free port.
func runArgs(file string, more ...string) []string {
	return append([]string{"run", file, "-control-plane-port", "0"}, more...)
}

// memory returns a figure of /proc/PID/status in bytes, such as VmRSS.
func memory(tb testing.TB, pid int, key string) int {
	tb.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		tb.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + key + `:\s+(\d+) kB$`).FindSubmatch(status)
	if m == nil {
		tb.Fatalf("no %s in\n%s", key, status)
	}
	n, _ := strconv.Atoi(string(m[1]))
	return n << 10
}

var endings = []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGKILL}

// daemons are a script that starts two daemons as daemon(3) would make them, which
// ignore what they can.
const daemons = `setsid sh -c 'trap "" TERM INT HUP; cd /; exec 0<&- 1>&- 2>&-; sleep T & sleep T &'`

// oddVar makes this test binary one of these components.
const oddVar = "TEST_COMPONENT_ODDITY"

func init() {
	kind, arg, _ := strings.Cut(os.Getenv(oddVar), " ")
	switch kind {
	case "headless":
		// A process whose main thread has ended: ps shows a zombie, and it lives. It
		// holds the FIFO arg.
		ready := make(chan bool)
		go func() {
			signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
			if f, err := os.OpenFile(arg, os.O_WRONLY, 0); err == nil {
				close(ready)
				fmt.Println("headless")
				time.Sleep(time.Hour)
				f.Close()
			}
		}()
		<-ready
		_, _, _ = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	case "hoard":
		// It leaves arg bytes of lines in its pipe.
		size, _ := strconv.Atoi(arg)
		if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, 1, 1031 /* F_SETPIPE_SZ */, uintptr(size)); errno != 0 {
			fmt.Fprintln(os.Stderr, "F_SETPIPE_SZ:", errno)
			os.Exit(77)
		}
		var lines []byte
		for i := 0; len(lines) < size; i++ {
			lines = fmt.Appendf(lines, "line %09d\n", i)
		}
		os.Stdout.Write(lines)
		os.Exit(0)
	}
}

func odd(id, what string) Component {
	program, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return Component{ID: id, Command: []string{program}, Env: map[string]string{oddVar: what}, Register: new(false)}
}

// processesNamed returns the processes, zombies too, that have this name in the kernel.
func processesNamed(name string) []int {
	var pids []int
	comms, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, file := range comms {
		if text, _ := os.ReadFile(file); strings.TrimSpace(string(text)) == name {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// asNobody runs flowctl as a user without rights, with a run folder of its own: one
// that is another user's would not be used, but one that all runs of this user share.
func asNobody(uid int) option {
	return func(p *process) {
		p.tb.Helper()
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: 65534}
		runs := filepath.Join(publicDir(p.tb), "runs")
		if err := os.Mkdir(runs, 0o700); err != nil {
			p.tb.Fatal(err)
		}
		if err := os.Chown(runs, uid, 65534); err != nil {
			p.tb.Fatal(err)
		}
		p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+runs)
	}
}

// publicDir is a folder that every user can read.
func publicDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "flowctl-public-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{dir, buildFolder()} {
		if err := os.Chmod(d, 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	return dir
}

// publicPipeline is writePipeline for every user.
func publicPipeline(tb testing.TB, components ...Component) string {
	tb.Helper()
	data, err := os.ReadFile(writePipeline(tb, components...))
	if err != nil {
		tb.Fatal(err)
	}
	file := writeFile(tb, filepath.Join(publicDir(tb), "pipeline.json"), string(data))
	if err := os.Chmod(file, 0o644); err != nil {
		tb.Fatal(err)
	}
	return file
}

// limited runs flowctl under a limit that the shell's ulimit sets.
func limited(limit string) option {
	return func(p *process) {
		p.cmd.Args = append([]string{"sh", "-c", "ulimit " + limit + ` && exec "$0" "$@"`, p.cmd.Path}, p.cmd.Args[1:]...)
		p.cmd.Path = "/bin/sh"
	}
}

// memoryGrew tells what a process has come to hold since it held before, and fails
// where it ever was more than most MiB more.
func memoryGrew(t *testing.T, p *process, before int, most float64) {
	t.Helper()
	rss, peak := memory(t, p.cmd.Process.Pid, "VmRSS"), memory(t, p.cmd.Process.Pid, "VmHWM")
	t.Logf("VmRSS %.1f MiB before, %.1f MiB after, %.1f MiB at most", mib(before), mib(rss), mib(peak))
	if mib(peak-before) > most {
		t.Errorf("memory grew by %.1f MiB, more than %.0f", mib(peak-before), most)
	}
}

// rewrite replaces the pipeline file of a run by one with other components.
func rewrite(tb testing.TB, file string, components ...Component) {
	tb.Helper()
	data, err := os.ReadFile(writePipeline(tb, components...))
	if err != nil {
		tb.Fatal(err)
	}
	writeFile(tb, file, string(data))
}

// listed returns the components of the one pipeline at endpoint, by id, and their ids
// in order.
func listed(tb testing.TB, endpoint string) (map[string]listedComponent, []string) {
	tb.Helper()
	_, out, stderr := call(tb, "list", "-e", endpoint, "-json")
	var pipelines []listedPipeline
	if err := json.Unmarshal([]byte(out), &pipelines); err != nil || len(pipelines) != 1 {
		tb.Fatalf("list: %v\n%s%s", err, out, stderr)
	}
	byID, ids := make(map[string]listedComponent), []string(nil)
	for _, c := range pipelines[0].Components {
		byID[c.ID] = *c
		ids = append(ids, c.ID)
	}
	return byID, ids
}

// gone is the health of what is not registered.
const gone = "gone"

// quickDir is a folder in memory, where there is one: a write takes no time there, and
// a process that is killed loses neither more nor less.
func quickDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "flowctl-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// actorRole is the value of roleVar for r.
func actorRole(tb testing.TB, r role) string {
	tb.Helper()
	return actor("", r).Env[roleVar]
}

// publicProgram is this test's program, where every user can run it.
func publicProgram(tb testing.TB) string {
	tb.Helper()
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		tb.Fatal(err)
	}
	program := writeFile(tb, filepath.Join(publicDir(tb), "actor"), string(data))
	if err := os.Chmod(program, 0o755); err != nil {
		tb.Fatal(err)
	}
	return program
}

// smallDisk is a disk of this size and how it is mounted.
func smallDisk(t testing.TB, flags uintptr, size string) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", flags, "size="+size); err != nil {
		t.Skip("this system does not let us mount a small disk: ", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
	return disk
}

// mib is a number of bytes in MiB.
func mib(n int) float64 { return float64(n) / (1 << 20) }

// plainBinary returns flowctl as users have it, without the race detector.
func plainBinary(tb testing.TB) string {
	tb.Helper()
	if !raceEnabled() {
		return flowctlProgram(tb)
	}
	return build(tb, "flowctl-plain", ".")
}

// runsIn makes flowctl keep its run file in the folder flowctl of dir.
func runsIn(dir string) option { return withEnv("XDG_RUNTIME_DIR=" + dir) }

func runOf(file string) []string { return []string{"run", file, "-control-plane-port", "0"} }

// sleeper is a pipeline that runs until it is stopped.
func sleeper(t *testing.T) string { return writePipeline(t, shell("a", "exec sleep 300")) }

// listen listens until the test ends.
func listen(t *testing.T, address string) net.Listener {
	lis, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lis.Close() })
	return lis
}

// recorder is an emitter that keeps everything.
type recorder struct {
	mu  sync.Mutex
	got map[string][]byte // by id/stream
}

func (r *recorder) lines(id, stream string, lines []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.got == nil {
		r.got = make(map[string][]byte)
	}
	r.got[id+"/"+stream] = append(r.got[id+"/"+stream], lines...)
}

func (r *recorder) text(key string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.got[key])
}

// waitForText waits until the recorder has text. It polls: the pump tells nobody.
func waitForText(t testing.TB, rec *recorder, key, text string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(rec.text(key), text); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has %q, want %q in it", key, rec.text(key), text)
		}
	}
}

const forever = "exec sleep 1000"

// sh is a component that runs a shell script and does not register.
func sh(id, script string, more map[string]any) map[string]any {
	c := map[string]any{"id": id, "command": []string{"sh", "-c", strings.ReplaceAll(script, "$", "$$")}, "register": false}
	maps.Copy(c, more)
	return c
}

// supervise returns a supervisor that starts real processes, its launcher, and what those
// print. What still runs at the end of the test is killed and waited for.
func supervise(t testing.TB, sources, sinks []map[string]any) (*supervisor, *launcher, *recorder) {
	t.Helper()
	rec, log := &recorder{}, slog.New(slog.NewTextHandler(t.Output(), nil))
	l, err := newLauncher(launchConfig{heartbeat: 10 * time.Second, endpoint: "127.0.0.1:1", reaper: newReaper(), emit: rec.lines, log: log})
	if err != nil {
		t.Fatal(err)
	}
	s := newSupervisor(parseParts(t, sources, sinks), procTimes{start: 30 * time.Second, unhealthy: 30 * time.Second, stop: 10 * time.Second}, l, log)
	t.Cleanup(func() {
		s.killAll(time.Now())
		for !s.over() {
			s.exited(<-l.exits, time.Now())
		}
		l.guard.dismiss() // not close, which ends all descendants, those of other tests too
		l.cgroup.remove()
	})
	return s, l, rec
}

// nextExit takes in the next end of a process, as the loop of a run does.
func nextExit(t testing.TB, s *supervisor, l *launcher, now time.Time) {
	t.Helper()
	select {
	case e := <-l.exits:
		l.endStrays(e.child.component.ID)
		s.exited(e, now)
	case <-time.After(20 * time.Second):
		t.Fatal("no process ended within 20s")
	}
}
