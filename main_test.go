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
	"unicode/utf8"
	"unsafe"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
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

// binary returns flowctl, built once: with the race detector where this test is.
func binary(tb testing.TB) string {
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

// checkServer is what a health_check asks. It fails until it is set to pass.
type checkServer struct {
	set func(pass bool)
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
	p.cmd = exec.Command(binary(tb), args...)
	p.cmd.Env = append(slices.DeleteFunc(os.Environ(), hidden), p.mark,
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

func TestRunStopsOnSignal(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{Dialect: "v1"})))
			p.waitReady()
			p.signal(sig)
			p.exit(exitOK)
			p.has(p.stderr, `msg="stop requested" signal=`+sig.String(), "msg=stopping component=", `msg="all components have ended"`)
		})
	}
}

// A stop that comes while components start is no failure, and to die of the signal
// is as good as to end by it.
func TestRunStopsBeforeReady(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Gate: true}), shell("other", "exec sleep 300")))
	p.waitOut("waiting")
	p.stop()
	p.hasNot(p.stderr, "pipeline ready", "failed")
}

func TestRunCompletes(t *testing.T) {
	t.Parallel()
	for _, until := range []string{untilStopped, untilDone} {
		t.Run(until, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t,
				actor("ledgers", role{Dialect: "legacy", End: "registered"}),
				actor("store", role{Dialect: "v1", End: "registered"}),
				shell("other", "echo done"),
			), "-until", until)
			p.exit(exitOK)
			p.has(p.stdout, "other   | done\n")
			p.hasNot(p.stderr, "flowctl: ")
		})
	}
}

// What ends well as soon as it is ready has completed, however many do so at once.
func TestRunCompletesAtOnce(t *testing.T) {
	t.Parallel()
	var parts []Component
	for i := range 100 {
		parts = append(parts, shell(fmt.Sprintf("c%d", i), ":"))
	}
	for range 2 {
		p := launch(t, writePipeline(t, parts...))
		p.exit(exitOK)
	}
}

func TestRunUntilReady(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	store := actor("store", role{Dialect: "v1", Journal: journal})
	store.Inputs = []string{"ledgers"}
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy", Journal: journal}), store), "-until", "ready")
	p.exit(exitOK)
	p.has(p.stderr, "pipeline ready")
	inOrder(t, readJournal(t, journal), "start ledgers", "start store", "stop ledgers", "stop store")
}

func TestRunFailsAfterReady(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{Dialect: "v1", OnUSR1: "exit", Code: 7})))
	p.waitReady()
	p.tell("store", syscall.SIGUSR1)
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component store failed: exit status 7 (pid ", ", registered)\n", "flowctl: the last lines of store:\n  registered\n")
}

func TestRunFailsBySignal(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"})))
	p.waitReady()
	p.tell("ledgers", syscall.SIGKILL)
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component ledgers failed: killed by signal 9 (killed) (pid ")
}

// The start timeout is the default of 30 s: what has ended is not waited for.
func TestRunFailsFast(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	bad := actor("bad", role{End: "early", Code: 3, Out: []byte("config read\n"), Err: []byte("no such table\nat last words")})
	bad.DependsOn = []string{"good"}
	begun := time.Now()
	p := launch(t, writePipeline(t, actor("good", role{Dialect: "legacy", Journal: journal}), bad))
	p.exit(exitFailed)
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	p.has(p.stdout, " bad  | config read\n")
	p.has(p.stdout, " bad  | no such table\n", " bad  | at last words\n")
	p.has(p.stderr, "flowctl: component bad failed: exit status 3 before it was ready (pid ", ", not registered)\n", "flowctl: the last lines of bad:\n")
	p.has(p.stderr, "flowctl: the last lines of bad:\n", "  no such table\n", "  at last words\n")
	p.hasNot(p.stderr, "component good failed")
	inOrder(t, readJournal(t, journal), "start good", "term good", "stop good")
}

func TestRunFailsUnhealthy(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{Dialect: "v1", OnUSR1: "unhealthy"})), "-unhealthy-timeout", "300ms")
	p.waitReady()
	p.tell("store", syscall.SIGUSR1)
	p.exit(exitFailed)
	p.has(p.stderr, "msg=unhealthy id=store component=store cause=\"it declared itself UNHEALTHY\"",
		"flowctl: component store failed: unhealthy for 300ms (-unhealthy-timeout): it declared itself UNHEALTHY (pid ", ", registered)\n")
}

func TestRunHealsInTime(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("store", role{Dialect: "v1", OnUSR1: "unhealthy"})), "-unhealthy-timeout", "20s")
	p.waitReady()
	p.tell("store", syscall.SIGUSR1)
	p.waitErr(`msg=status ready=0 total=1 unhealthy="store (it declared itself UNHEALTHY)"`)
	if code, out, _ := call(t, "list", "-e", p.endpoint()); code != exitFailed || !regexp.MustCompile(`\nstore +source +ready +\d+ +0 +unhealthy `).MatchString(out) {
		t.Errorf("list: exit %d, want 1\n%s", code, out)
	}
	p.tell("store", syscall.SIGUSR2)
	p.waitErr("msg=healthy id=store component=store")
	if code, out, _ := call(t, "list", "-e", p.endpoint()); code != exitOK {
		t.Errorf("list: exit %d, want 0\n%s", code, out)
	}
	p.stop()
}

func TestRunCannotStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program := writeFile(t, filepath.Join(dir, "program"), "#!/bin/sh\n")
	script := writeFile(t, filepath.Join(dir, "script"), "#!/no/such/interpreter\n")
	if err := os.Chmod(script, 0o700); err != nil {
		t.Fatal(err)
	}
	component := func(dir string, command ...string) Component {
		return Component{ID: "store", Command: command, WorkingDir: dir}
	}
	for _, tt := range []struct {
		name      string
		component Component
		want      string
	}{
		{"not found", component("", "/no/such/program"), `cannot run "/no/such/program": no such file or directory`},
		{"not in PATH", component("", "no-such-program"), `cannot run "no-such-program": it is not found in PATH`},
		{"not executable", component("", program), `cannot run "` + program + `": it is not executable (chmod +x)`},
		{"a folder", component("", dir), `cannot run "` + dir + `": it is a folder`},
		{"no interpreter", component("", script), `cannot run "` + script + `": the interpreter that it names, or its loader, does not exist`},
		{"no working_dir", component("/no/such/folder", "sleep", "300"), `cannot enter its working_dir "/no/such/folder": no such file or directory`},
		{"working_dir is a file", component(program, "sleep", "300"), `cannot enter its working_dir "` + program + `": not a directory`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			other := actor("ledgers", role{Dialect: "legacy"})
			tt.component.Inputs = []string{"ledgers"}
			p := launch(t, writePipeline(t, other, tt.component))
			p.exit(exitFailed)
			p.has(p.stderr, "flowctl: component store failed: "+tt.want+"\n")
			p.has(p.stderr, "msg=ended component=ledgers")
		})
	}
}

func TestCheckAndVersion(t *testing.T) {
	t.Parallel()
	store := actor("store", role{})
	store.Inputs = []string{"a"}
	file := writePipeline(t, shell("a", "exit 9"), store)
	for _, args := range [][]string{{"check", file}, {"check", "-f", file}, {"check", "--f=" + file}} {
		code, out, stderr := call(t, args...)
		if want := file + ": ok: pipeline test, 1 sources, 1 processors, 0 sinks\n"; code != exitOK || out != want || stderr != "" {
			t.Errorf("%q: exit %d\n%s%swant\n%s", args, code, out, stderr, want)
		}
	}
	code, out, stderr := call(t, "version")
	if code != exitOK || stderr != "" || !regexp.MustCompile(`^flowctl \S+ \(go1\.\S+(, commit [0-9a-f]{12}(\+dirty)?)?\)\n$`).MatchString(out) {
		t.Errorf("version: exit %d\n%s%s", code, out, stderr)
	}
}

func TestHelpTexts(t *testing.T) {
	t.Parallel()
	const overview = `flowctl runs a data pipeline: its programs, and their control plane.

Usage:
  flowctl run [flags] [pipeline.json] [-- command args...]
                                        run a pipeline until it ends
  flowctl check [flags] [pipeline.json] read and validate a pipeline file
  flowctl list [flags] [id]             show what is registered, and how it is
  flowctl reload [flags] [pipeline]     take over a changed pipeline file
  flowctl version                       print the version
  flowctl help [command]                explain flowctl, or one command

Examples:
  flowctl -f pipeline.json                   as: flowctl run pipeline.json
  flowctl run pipeline.json -until ready     a smoke test: 0 once all are ready
  flowctl run pipeline.json -- echo ready    run a command once all are ready
  flowctl run pipeline.json -control-plane-port 0 -log-format json
  flowctl check pipeline.json
  flowctl check -schema                      a JSON Schema, for an editor

flowctl help run lists the flags. The pipeline file is explained in README.md.
`
	const list = `list: show what is registered, and how it is

Usage:
  flowctl list [flags] [id]

Examples:
  flowctl list
  flowctl list ledgers -json                 one component, with its history
  flowctl list -watch -e 127.0.0.1:8080

Flags:
`
	for _, tt := range []struct {
		args   string
		want   string
		prefix bool // want is the beginning
	}{
		{"help", overview, false},
		{"-h", overview, false},
		{"--help", overview, false},
		{"help list", list, true},
		{"list -help", list, true},
		{"help version", "version: print the version\n\nUsage:\n  flowctl version\n", false},
		{"help run", "run: run a pipeline ", true},
		{"help check", "check: ", true},
		{"help reload", "reload: ", true},
		{"help server", "server: run the control plane alone\n", true},
	} {
		code, out, stderr := call(t, strings.Fields(tt.args)...)
		if tt.args == "help server" && !strings.Contains(out, "$STATE_DIRECTORY or the user's state folder\n") {
			t.Errorf("it does not say where the state is\n%s", out)
		}
		for line := range strings.Lines(out) {
			if utf8.RuneCountInString(line) > 80+1 {
				t.Errorf("%s: wider than 80 columns: %s", tt.args, line)
			}
		}
		if n := strings.Count(out, "\n"); tt.args == "help" && n > 24 {
			t.Errorf("%s: %d lines", tt.args, n)
		}
		if code != exitOK || stderr != "" || out != tt.want && !(tt.prefix && strings.HasPrefix(out, tt.want)) {
			t.Errorf("%s: exit %d\n%s%swant\n%s", tt.args, code, out, stderr, tt.want)
		}
	}
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
	cmd.Env = append(os.Environ(), lonelyVar+"="+t.Name(), binaryVar+"="+binary(t))
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

// Every example that help shows works as it stands.
func TestHelpExamples(t *testing.T) {
	t.Parallel()
	if !ownNetwork(t) {
		return
	}
	folder := inFolder(filepath.Dir(writePipeline(t, actor("ledgers", role{Dialect: "legacy"}))))
	var examples []string
	for _, c := range commands() {
		for line := range strings.Lines(c.examples) {
			if line, _, _ = strings.Cut(strings.TrimSpace(line), "  "); line != "" {
				examples = append(examples, strings.TrimPrefix(line, "flowctl "))
			}
		}
	}
	if len(examples) < 7 {
		t.Fatalf("only %d examples: %q", len(examples), examples)
	}
	runs := withEnv("XDG_RUNTIME_DIR=" + t.TempDir())
	pipeline := start(t, strings.Fields(examples[0]), folder, runs) // for those of list
	pipeline.waitReady()
	for _, example := range examples[1:] {
		options := []option{folder}
		if strings.HasPrefix(example, "list") || strings.HasPrefix(example, "reload") {
			options = append(options, runs)
		}
		p := start(t, strings.Fields(example), options...)
		switch {
		case strings.HasPrefix(example, "server"):
			p.waitErr("msg=listening endpoint=127.0.0.1:9090\n")
			p.stop()
		case strings.Contains(example, "-watch"):
			p.waitOut("ledgers ready healthy")
			p.stop()
		case strings.HasPrefix(example, "run") && !strings.Contains(example, "-until") && !strings.Contains(example, " -- "):
			p.waitErr("pipeline ready")
			p.stop()
		default:
			p.exit(exitOK)
		}
	}
	pipeline.stop()
}

func TestRunPortTaken(t *testing.T) {
	t.Parallel()
	if !ownNetwork(t) {
		return
	}
	lis, err := net.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	file := writePipeline(t, actor("ledgers", role{Dialect: "legacy"}))
	self, _ := readProcess(os.Getpid())
	want := fmt.Sprintf("flowctl: the control plane cannot listen on 127.0.0.1:8080: the address is in use by process %d (%s); choose another with -control-plane-port (0 takes a free one)\n", self.pid, self.name)
	for _, args := range [][]string{{"run", file, "-control-plane-port", "8080"}, {"server"}} {
		p := start(t, args)
		p.exit(exitPlane)
		p.has(p.stderr, want)
		p.hasNot(p.stderr, "msg=started")
	}
	p := start(t, []string{"run", file})
	p.waitReady()
	p.has(p.stderr, fmt.Sprintf(`level=WARN msg="the default port is taken, a free one serves" port=8080 pid=%d name=%s`, self.pid, self.name))
	p.stop()
}

func TestRunBadAddress(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", "exit 9"))
	for _, tt := range []struct{ address, want string }{
		{"unix:/no/such/folder/s", "flowctl: the control plane cannot listen at -control-plane-address \"unix:/no/such/folder/s\": listen unix /no/such/folder/s: bind: no such file or directory\n"},
		{"unix:/" + strings.Repeat("x", 200), " has 201 bytes: the kernel allows 107\n"},
		{"no such host", "flowctl: the control plane cannot listen at -control-plane-address \"no such host\": "},
	} {
		p := start(t, []string{"run", file, "-control-plane-address", tt.address})
		p.exit(exitPlane)
		p.has(p.stderr, tt.want)
		p.hasNot(p.stderr, "msg=started")
	}
}

func TestRunStartTimeout(t *testing.T) {
	t.Parallel()
	store := actor("store", role{})
	store.StartTimeout = Duration(100 * time.Millisecond)
	for _, tt := range []struct {
		name      string
		component Component
		args      []string
		want      string
	}{
		{"by flag", actor("store", role{}), []string{"-start-timeout", "100ms"}, "100ms"},
		{"by file", store, nil, "100ms"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, tt.component, shell("other", "exec sleep 300")), tt.args...)
			p.exit(exitNotReady)
			p.has(p.stderr, "flowctl: component store failed: not ready within its start timeout of "+tt.want+": not registered (pid ", ", not registered)\n")
			p.hasNot(p.stderr, "component other failed", "pipeline ready")
		})
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

func TestRunNotify(t *testing.T) {
	t.Parallel()
	for name, address := range map[string]string{
		"path":     filepath.Join(shortDir(t), "notify"),
		"abstract": fmt.Sprintf("@flowctl-test-%d-%d", os.Getpid(), marks.Add(1)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := actor("store", role{Dialect: "v1", Gate: true})
			store.Inputs = []string{"ledgers"}
			file := writePipeline(t, actor("ledgers", role{Dialect: "legacy", Gate: true}), store)
			p := start(t, []string{"run", file, "-control-plane-port", "0", "-start-timeout", "25s"}, notifySocket(t, address))
			p.waitOut("ledgers | waiting")
			p.wait(p.notified, "STATUS=0 of 2 ready, waiting for ledgers, store\nEXTEND_TIMEOUT_USEC=", 1)
			p.tell("ledgers", syscall.SIGUSR2)
			p.waitOut("store   | waiting")
			p.wait(p.notified, "STATUS=1 of 2 ready, waiting for store\nEXTEND_TIMEOUT_USEC=", 1)
			p.hasNot(p.notified, "READY=1")
			p.tell("store", syscall.SIGUSR2)
			p.wait(p.notified, "READY=1\n\n", 1)
			p.wait(p.notified, "STATUS=2 of 2 ready\n\n", 1)
			p.stop()
			p.wait(p.notified, "STATUS=stopping, waiting for store\n\n", 1)
			p.has(p.notified, "STOPPING=1\nEXTEND_TIMEOUT_USEC=", "STATUS=stopping, waiting for ledgers, store\n\n")
			if n := strings.Count(p.notified.String(), "READY=1"); n != 1 {
				t.Errorf("READY=1 came %d times\n%s", n, p)
			}
			p.checkExtensions()
		})
	}
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

// Where nobody reads what systemd is told, a run ends all the same.
func TestRunNotifiesNobody(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var components []Component
	for i := range 15 { // more than the kernel queues
		components = append(components, shell(fmt.Sprint("c", i), "exec sleep 300"))
	}
	p := start(t, runArgs(writePipeline(t, components...)), withEnv("NOTIFY_SOCKET="+path))
	for buf := make([]byte, 4096); ; {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(string(buf[:n]), "READY=1") {
			break
		}
	}
	p.stop()
}

func TestRunNotifiesNothingUnready(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{}))
	p := start(t, []string{"run", file, "-control-plane-port", "0", "-start-timeout", "1s"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	p.exit(exitNotReady)
	p.wait(p.notified, "STOPPING=1", 1)
	p.hasNot(p.notified, "READY=1")
	p.checkExtensions()
}

// One is ready, turns unhealthy, and only then the other becomes ready: nothing is
// starting and yet the pipeline is not ready.
func TestRunNotifiesUnhealthyStart(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, actor("ledgers", role{Dialect: "v1", OnUSR1: "unhealthy"}), actor("store", role{Dialect: "v1", Gate: true}))
	p := start(t, []string{"run", file, "-control-plane-port", "0"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	p.waitErr("msg=ready component=ledgers")
	p.waitOut("store   | waiting")
	p.tell("ledgers", syscall.SIGUSR1)
	p.waitErr("msg=unhealthy id=ledgers")
	p.tell("store", syscall.SIGUSR2)
	p.wait(p.notified, "STATUS=1 of 2 ready, unhealthy: ledgers (it declared itself UNHEALTHY)\n", 1)
	p.hasNot(p.notified, "READY=1")
	p.tell("ledgers", syscall.SIGUSR2)
	p.wait(p.notified, "READY=1", 1)
	p.stop()
	p.checkExtensions()
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

func TestRunEnvironment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a := actor("a", role{Environ: true, Dialect: "legacy"})
	b := actor("b", role{Environ: true, Dialect: "legacy", Anonymous: true})
	b.WorkingDir = dir
	b.Config = map[string]any{"network": "testnet", "batch_size": 25, "dry": true, "hosts": []string{"x", "y<z"}, "shared": "config"}
	b.EnvFiles = map[string]string{"SECRET": writeFile(t, filepath.Join(dir, "secret"), "s3cret=\nline\r\n")}
	port := freePort(t)
	maps.Copy(b.Env, map[string]string{
		"SHARED": "env", "COMPONENT_ID": "mine", "SERVICE_ID": "mine too", "HEALTH_PORT": port, "HEALTH_ENDPOINT": "http://elsewhere/",
		"FLOWCTL_HEARTBEAT_INTERVAL": "7777ms", "ENABLE_FLOWCTL": "false", "EMPTY": "", "NETWORK_URL": "${TEST_NETWORK}/$$x",
	})
	p := start(t, []string{"run", writePipeline(t, a, b), "-control-plane-port", "0", "-heartbeat-ttl", "40s"},
		notifySocket(t, filepath.Join(shortDir(t), "notify")),
		withEnv("WATCHDOG_USEC=1000000", "WATCHDOG_PID=1", "LISTEN_FDS=1", "LISTEN_PID=1", "LISTEN_FDNAMES=x", "TEST_NETWORK=net", "SHARED=outside", "COMPONENT_ID=outside", "FLOWCTL_ENDPOINT=outside"))
	p.waitReady()
	endpoint := p.endpoint()
	if !regexp.MustCompile(`^127\.0\.0\.1:\d+$`).MatchString(endpoint) {
		t.Errorf("endpoint %q is no bare host:port", endpoint)
	}
	p.stop()

	environ := func(id string) map[string]string {
		env := make(map[string]string)
		for _, line := range p.lines(id) {
			if quoted, ok := strings.CutPrefix(line, "env "); ok {
				entry, err := strconv.Unquote(quoted)
				if err != nil {
					t.Error(err)
				}
				name, value, _ := strings.Cut(entry, "=")
				if _, twice := env[name]; twice {
					t.Errorf("%s has %s twice", id, name)
				}
				env[name] = value
			}
		}
		return env
	}
	envA, envB := environ("a"), environ("b")
	check := func(id string, env map[string]string, want map[string]string) {
		t.Helper()
		for name, value := range want {
			if got, ok := env[name]; !ok || got != value {
				t.Errorf("%s: %s is %q (set: %t), want %q", id, name, got, ok, value)
			}
		}
		for name := range env {
			if name == "NOTIFY_SOCKET" || strings.HasPrefix(name, "WATCHDOG_") || strings.HasPrefix(name, "LISTEN_") {
				t.Errorf("%s has %s", id, name)
			}
		}
	}
	check("a", envA, map[string]string{
		"ENABLE_FLOWCTL": "true", "FLOWCTL_ENABLED": "true", "FLOWCTL_ENDPOINT": endpoint, "FLOWCTL_HEARTBEAT_INTERVAL": "13333ms",
		"FLOWCTL_COMPONENT_ID": "a", "FLOWCTL_SERVICE_ID": "a", "COMPONENT_ID": "a", "SERVICE_ID": "a",
		"HEALTH_ENDPOINT": "http://localhost:" + envA["HEALTH_PORT"] + "/health", "SHARED": "outside", "PATH": os.Getenv("PATH"),
	})
	if n, err := strconv.Atoi(envA["HEALTH_PORT"]); err != nil || n < 1024 || envA["HEALTH_PORT"] == port {
		t.Errorf("a: HEALTH_PORT is %q", envA["HEALTH_PORT"])
	}
	check("b", envB, map[string]string{
		"ENABLE_FLOWCTL": "true", "FLOWCTL_ENABLED": "true", "FLOWCTL_ENDPOINT": endpoint, "FLOWCTL_HEARTBEAT_INTERVAL": "7777ms",
		"FLOWCTL_COMPONENT_ID": "b", "FLOWCTL_SERVICE_ID": "b", "COMPONENT_ID": "mine", "SERVICE_ID": "mine too",
		"HEALTH_PORT": port, "HEALTH_ENDPOINT": "http://elsewhere/",
		"NETWORK": "testnet", "BATCH_SIZE": "25", "DRY": "true", "HOSTS": `["x","y<z"]`, "SHARED": "env",
		"EMPTY": "", "NETWORK_URL": "net/$x", "SECRET": "s3cret=\nline",
		"PWD": dir,
	})
}

func TestRunStartOrder(t *testing.T) {
	t.Parallel()
	gated := role{Dialect: "legacy", Gate: true}
	processor, sink := actor("processor", gated), actor("sink", gated)
	processor.Inputs = []string{"a", "b"}
	sink.Inputs, sink.DependsOn = []string{"processor"}, []string{"db"}
	db := actor("db", role{Gate: true, Check: "http"})
	db.Register = new(false)
	port := freePort(t)
	db.Env["HEALTH_PORT"], db.HealthCheck, db.HealthInterval = port, "http://127.0.0.1:"+port+"/", Duration(20*time.Millisecond)
	p := launch(t, writePipeline(t, actor("a", gated), actor("b", gated), db, processor, sink))
	// All three wait for us: so they were started together.
	p.waitOut(" a         | waiting\n")
	p.waitOut(" b         | waiting\n")
	p.waitOut(" db        | waiting\n")
	p.tell("a", syscall.SIGUSR2)
	p.waitErr("msg=ready component=a ")
	p.hasNot(p.stderr, "msg=started component=processor")
	p.tell("b", syscall.SIGUSR2)
	p.waitOut(" processor | waiting\n")
	p.tell("processor", syscall.SIGUSR2)
	p.waitErr("msg=ready component=processor ")
	p.hasNot(p.stderr, "msg=started component=sink", "msg=ready component=db")
	p.tell("db", syscall.SIGUSR2)
	p.waitOut(" sink      | waiting\n")
	p.hasNot(p.stderr, "pipeline ready")
	p.tell("sink", syscall.SIGUSR2)
	p.waitReady()
	p.has(p.stderr, "msg=ready component=a ", "msg=ready component=b ", "msg=started component=processor ", "msg=ready component=processor ",
		"msg=ready component=db ", "msg=started component=sink ", "msg=ready component=sink ", "pipeline ready")
	p.stop()
}

func TestRunStopOrder(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	noted := role{Dialect: "legacy", Journal: journal}
	processor, sink, a := actor("processor", noted), actor("sink", noted), actor("a", noted)
	processor.Inputs = []string{"a", "b"}
	sink.Inputs, sink.DependsOn = []string{"processor"}, []string{"db"}
	a.DependsOn = []string{"db"}
	p := launch(t, writePipeline(t, sink, processor, actor("db", noted), a, actor("b", noted)))
	p.waitReady()
	p.stop()
	got := readJournal(t, journal)
	inOrder(t, got, "term a", "stop a", "term processor", "stop processor", "term sink", "stop sink", "term db", "stop db")
	inOrder(t, got, "term b", "stop b", "term processor")
}

// The source ignores SIGTERM. What reads from it is not kept waiting for ever, and
// gets its own time to end.
func TestRunStopsDeaf(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	sink := actor("sink", role{Dialect: "legacy", Journal: journal})
	sink.Inputs = []string{"deaf"}
	p := launch(t, writePipeline(t, actor("deaf", role{Dialect: "v1", Deaf: true, Journal: journal}), sink), "-stop-timeout", "1s")
	p.waitReady()
	p.stop()
	inOrder(t, readJournal(t, journal), "term deaf", "term sink", "stop sink")
	p.has(p.stderr, `msg="still running, sending SIGKILL" component=deaf`, "msg=ended component=deaf", "killed by signal 9")
	p.hasNot(p.stderr, "SIGKILL\" component=sink", "failed")
}

// The source ends only when its reader has gone, as some gRPC servers do: it gets
// its chance within its own stop timeout.
func TestRunStopsSourceThatWaitsForItsReader(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(shortDir(t), "data")
	source, sink := actor("source", role{Dialect: "legacy", Serve: socket}), actor("sink", role{Dialect: "legacy", Dial: socket})
	sink.Inputs = []string{"source"}
	source.StopTimeout = Duration(6 * time.Second)
	p := launch(t, writePipeline(t, source, sink))
	p.waitReady()
	p.stop()
	p.has(p.stderr, "msg=stopping component=source ", "msg=stopping component=sink ", "msg=ended component=sink ", "msg=ended component=source ")
	p.hasNot(p.stderr, "SIGKILL")
}

func TestRunStopSignal(t *testing.T) {
	t.Parallel()
	c := shell("a", `trap 'echo got INT; exit 0' INT; echo up; while :; do read -r x <"$0.fifo" || exit 1; done`)
	fifo := filepath.Join(t.TempDir(), "a")
	if err := syscall.Mkfifo(fifo+".fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	c.Args, c.StopSignal = []string{fifo}, "SIGINT"
	p := launch(t, writePipeline(t, c))
	p.waitOut("up")
	p.stop()
	p.has(p.stderr, "msg=stopping component=a", "signal=interrupt")
	p.has(p.stdout, "a | got INT\n")
}

func TestRunSecondSignalKills(t *testing.T) {
	t.Parallel()
	sink := actor("sink", role{Dialect: "legacy"})
	sink.Inputs = []string{"deaf"}
	p := launch(t, writePipeline(t, actor("deaf", role{Dialect: "v1", Deaf: true}), sink), "-stop-timeout", "1h")
	p.waitReady()
	p.signal(syscall.SIGTERM)
	p.waitOut("| deaf\n")
	p.signal(syscall.SIGINT)
	p.exit(exitOK)
	p.has(p.stderr, `msg="another signal, killing what still runs" signal=interrupt`, "msg=ended component=")
	p.hasNot(p.stderr, "still running")
}

// Nothing of a component's process group is left, however the component ends;
// cleanup looks for it.
func TestRunKillsWholeGroup(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, script string
		stop         bool // else it ends by itself
		code         int
	}{
		{"grandchildren", `sleep 300 & (sleep 300 & sleep 300) & echo up; wait`, true, exitOK},
		{"grandchild ignores SIGTERM", `(trap "" TERM; echo up; sleep 300 & wait; sleep 300) & wait`, true, exitOK},
		{"all ignore SIGTERM", `trap "" TERM; sleep 300 & echo up; wait`, true, exitOK},
		{"leader ends well", `sleep 300 & echo up; exit 0`, false, exitOK},
		{"leader fails", `sleep 300 & echo up; exit 3`, false, exitFailed},
		{"leader kills itself", `sleep 300 & echo up; kill -9 $$`, false, exitFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, shell("a", tt.script)), "-stop-timeout", "500ms")
			p.waitOut("a | up\n")
			if tt.stop {
				p.signal(syscall.SIGTERM)
			}
			p.exit(tt.code)
		})
	}
}

// What a health check leaves behind ends with it too.
func TestRunKillsWhatAHealthCheckLeaves(t *testing.T) {
	t.Parallel()
	script := writeFile(t, filepath.Join(t.TempDir(), "check"), "sleep 300 &\n")
	c := shell("a", "exec sleep 300")
	c.HealthCheck = "exec:sh " + script
	p := launch(t, writePipeline(t, c), "-until", "ready")
	p.exit(exitOK)
}

// A process that left the group holds the output of the component after its end:
// neither the run nor what was written before waits for it.
func TestRunDoesNotWaitForDaemons(t *testing.T) {
	t.Parallel()
	c := shell("a", `setsid sleep 300 & echo last words; exit 0`)
	c.RestartPolicy = "no"
	p := launch(t, writePipeline(t, c))
	p.exit(exitOK)
	p.has(p.stdout, "a | last words\n")
	p.killLeft() // such a one is not ended yet
}

func TestListBothDialects(t *testing.T) {
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

// register registers a service from here.
func register(tb testing.TB, endpoint, id string) {
	tb.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close()
	if _, err := flowctlv1.NewControlPlaneServiceClient(conn).RegisterComponent(tb.Context(), &flowctlv1.RegisterRequest{Component: &flowctlv1.ComponentInfo{Id: id}}, grpc.WaitForReady(true)); err != nil {
		tb.Fatal(err)
	}
}

// A component goes stale by its own fault or because it is stopped, and heals by
// its next heartbeat.
func TestRunStale(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, dialect string
		silence, wake syscall.Signal
	}{
		{"mute", "legacy", syscall.SIGUSR1, syscall.SIGUSR2},
		{"stopped", "v1", syscall.SIGSTOP, syscall.SIGCONT},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{Dialect: tt.dialect, OnUSR1: "mute"})), "-heartbeat-ttl", "2s")
			p.waitReady()
			p.tell("store", tt.silence)
			p.waitErr("msg=unhealthy id=store component=store cause=\"no heartbeat for 2")
			p.waitErr(`msg=status ready=1 total=2 unhealthy="store (no heartbeat for 2`)
			code, out, _ := call(t, "list", "-e", p.endpoint())
			if code != exitFailed || !regexp.MustCompile(`\nstore +source +ready +\d+ +0 +unhealthy `).MatchString(out) {
				t.Errorf("list: exit %d, want 1\n%s", code, out)
			}
			p.tell("store", tt.wake)
			p.waitErr("msg=healthy id=store component=store")
			p.wait(p.stderr, "msg=status ready=2 total=2\n", 2)
			if code, out, _ := call(t, "list", "-e", p.endpoint()); code != exitOK {
				t.Errorf("list: exit %d, want 0\n%s", code, out)
			}
			p.stop()
		})
	}
}

// The type and the labels that the file gives a component are shown as they are.
func TestListShowsTypeAndLabels(t *testing.T) {
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
	if err := json.Unmarshal([]byte(out), &pipelines); err != nil {
		t.Fatal(err)
	}
	if a := pipelines[0].Components[0]; a.TypeInFile != c.Type || !maps.Equal(a.Labels, c.Labels) || strings.Count(out, `"labels"`) != 1 {
		t.Errorf("list -json\n%s", out)
	}
	p.stop()
}

func TestListNothing(t *testing.T) {
	t.Parallel()
	address := "127.0.0.1:" + freePort(t)
	for _, args := range [][]string{{"list", "-e", address, "-wait=false"}, {"list", "-e", address}, {"list", "-e", "unix:/no/such/socket", "-json"}} {
		t.Run(strings.Join(args[3:], " "), func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			p := start(t, args)
			p.exit(exitPlane)
			p.has(p.stderr, "flowctl: no control plane answers at "+args[2]+": ")
			p.hasNot(p.stdout, "\n")
			if took := time.Since(begun); took > 8*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestListEmpty(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"server", "-control-plane-port", "0"})
	endpoint := p.endpoint()
	if code, out, stderr := call(t, "list", "-e", endpoint); code != exitOK || !strings.HasSuffix(out, "\nnothing is registered\n") || stderr != "" {
		t.Errorf("list: exit %d\n%s%s", code, out, stderr)
	}
	if code, out, stderr := call(t, "list", "-e", endpoint, "-json"); code != exitOK || !strings.Contains(out, `"components": []`) || stderr != "" {
		t.Errorf("list -json: exit %d\n%s%s", code, out, stderr)
	}
	p.stop()
}

// A plane that comes up while list looks for it is found. Its socket is there
// first, and cuts off the first attempt: so list has come too early.
func TestListWaits(t *testing.T) {
	t.Parallel()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, []string{"list", "-e", lis.Addr().String()})
	conn, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	server := grpc.NewServer()
	defer server.Stop()
	flowctlpb.RegisterControlPlaneServer(server, latePlane{})
	go server.Serve(lis)
	p.exit(exitOK)
	p.has(p.stdout, "late", "healthy")
}

// latePlane knows only the legacy dialect.
type latePlane struct {
	flowctlpb.UnimplementedControlPlaneServer
}

func (latePlane) ListServices(context.Context, *emptypb.Empty) (*flowctlpb.ServiceList, error) {
	return &flowctlpb.ServiceList{Services: []*flowctlpb.ServiceStatus{{ServiceId: "late", IsHealthy: true}}}, nil
}

func TestServerCommand(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"server", "-control-plane-port", "0", "-heartbeat-ttl", "300ms"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	endpoint := p.endpoint()
	p.wait(p.notified, "READY=1\nSTATUS=listening on "+endpoint+"\n\n", 1)
	register(t, endpoint, "ledgers")
	p.waitErr("msg=healthy id=ledgers")
	p.waitErr("msg=unhealthy id=ledgers cause=\"no heartbeat for ")
	if code, out, _ := call(t, "list", "-e", endpoint); code != exitFailed || !strings.Contains(out, "unhealthy") {
		t.Errorf("list: exit %d\n%s", code, out)
	}
	p.stop()
	p.wait(p.notified, "STOPPING=1", 1)
}

func TestRunOnUnixSocket(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(shortDir(t), "plane")
	file := writePipeline(t, actor("ledgers", role{Dialect: "legacy", Environ: true}), actor("store", role{Dialect: "v1"}))
	run := []string{"run", file, "-control-plane-address", "unix:" + socket}
	p := start(t, run)
	p.waitReady()
	p.waitOut("| env \"FLOWCTL_ENDPOINT=unix://" + socket + "\"\n")
	info, err := os.Stat(socket)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	for _, endpoint := range []string{"unix:" + socket, "unix://" + socket} {
		if code, out, stderr := call(t, "list", "-e", endpoint); code != exitOK || !strings.Contains(out, "ledgers") {
			t.Errorf("list -e %s: exit %d\n%s%s", endpoint, code, out, stderr)
		}
	}
	second := start(t, run)
	second.exit(exitPlane)
	second.has(second.stderr, socket)
	second.hasNot(second.stderr, "8080")
	p.stop()
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// A socket file that a killed flowctl left is no obstacle.
func TestServerReplacesLeftSocket(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(shortDir(t), "plane")
	args := []string{"server", "-control-plane-address", "unix:" + socket}
	p := start(t, args)
	p.waitErr("msg=listening")
	p.signal(syscall.SIGKILL)
	<-p.done
	if _, err := os.Lstat(socket); err != nil {
		t.Fatal(err)
	}
	p = start(t, args)
	p.waitErr("msg=listening")
	p.stop()
}

func TestRunRestarts(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		policy string
		max    int
		role   role
		code   int
		starts int
		want   string
	}{
		{"no, status 0", "no", 0, role{Dialect: "legacy", End: "registered"}, exitOK, 1, "all components have ended"},
		{"no, status 1", "no", 0, role{Dialect: "legacy", End: "registered", Code: 1}, exitFailed, 1, "component a failed: exit status 1"},
		{"on-failure, status 0", "on-failure", 0, role{Dialect: "legacy", End: "registered"}, exitOK, 1, "all components have ended"},
		{"on-failure, then fine", "on-failure", 0, role{Dialect: "legacy", End: "early", Code: 1, Starts: 1}, -1, 2, "msg=restarting component=a"},
		{"on-failure, in vain", "on-failure", 1, role{Dialect: "legacy", End: "early", Code: 4}, exitFailed, 2, "component a failed: exit status 4, and max_restarts (1) is used up"},
		{"always, status 0", "always", 1, role{Dialect: "legacy", End: "registered"}, exitOK, 2, "msg=restarting component=a"},
		{"always, status 1", "always", 1, role{Dialect: "legacy", End: "registered", Code: 1}, exitFailed, 2, "component a failed: exit status 1, and max_restarts (1) is used up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.role.Journal = filepath.Join(t.TempDir(), "journal")
			c := actor("a", tt.role)
			c.RestartPolicy, c.MaxRestarts = tt.policy, tt.max
			p := launch(t, writePipeline(t, c))
			if tt.code < 0 {
				p.waitReady()
				p.stop()
			} else {
				p.exit(tt.code)
			}
			p.has(p.stderr, tt.want)
			if starts := strings.Count(p.stderr.String(), "msg=started component=a"); starts != tt.starts {
				t.Errorf("it was started %d times, want %d\n%s", starts, tt.starts, p)
			}
		})
	}
}

// What an earlier process registered does not make the next one ready.
func TestRunRestartRegistersAnew(t *testing.T) {
	t.Parallel()
	c := actor("a", role{Dialect: "legacy", Gate: true, OnUSR1: "exit", Code: 1})
	c.RestartPolicy = "on-failure"
	file := writePipeline(t, c, actor("b", role{Dialect: "v1"}))
	p := start(t, []string{"run", file, "-control-plane-port", "0"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	p.waitOut("a | waiting\n")
	p.tell("a", syscall.SIGUSR2)
	p.waitReady()
	p.tell("a", syscall.SIGUSR1)
	p.waitErr("msg=restarting component=a")
	p.waitErr("msg=status ready=1 total=2 restarting=a\n")
	p.wait(p.stdout, "a | waiting\n", 2)
	p.wait(p.stderr, "msg=status ready=1 total=2 waiting=", 2)
	code, out, _ := call(t, "list", "-e", p.endpoint())
	if !regexp.MustCompile(`\na +source +starting +\d+ +1 +unregistered `).MatchString(out) || code != exitFailed {
		t.Errorf("list: exit %d\n%s", code, out)
	}
	if n := strings.Count(p.stderr.String(), "msg=ready component=a "); n != 1 {
		t.Errorf("a is ready without having registered\n%s", p)
	}
	p.tell("a", syscall.SIGUSR2)
	p.wait(p.stderr, "msg=ready component=a ", 2)
	p.wait(p.stderr, "msg=status ready=2 total=2\n", 2)
	p.stop()
	p.wait(p.notified, "STATUS=stopping", 1)
	if n := strings.Count(p.notified.String(), "READY=1"); n != 1 {
		t.Errorf("READY=1 came %d times\n%s", n, p)
	}
}

// What was ready once and is not ready now holds up what has not started yet, until it
// is ready again or the run has failed by it.
func TestRunWaitsForWhatIsReadyNow(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, onUSR1  string
		args          []string
		broken, mends string
	}{
		{"restarted", "exit", nil, "msg=restarting component=a ", "msg=ready component=a "},
		{"unhealthy", "unhealthy", nil, "msg=unhealthy id=a ", "msg=healthy id=a "},
		{"never healthy", "unhealthy", []string{"-unhealthy-timeout", "2s"}, "msg=unhealthy id=a ", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := actor("a", role{Dialect: "v1", Gate: true, OnUSR1: tt.onUSR1, Code: 1})
			a.RestartPolicy = "on-failure"
			reader := actor("reader", role{Dialect: "v1"})
			reader.Inputs = []string{"a", "slow"}
			p := launch(t, writePipeline(t, a, actor("slow", role{Dialect: "v1", Gate: true}), reader), tt.args...)
			p.waitOut("a      | waiting\n")
			p.waitOut("slow   | waiting\n")
			p.tell("a", syscall.SIGUSR2)
			p.waitErr("msg=ready component=a ")
			p.tell("a", syscall.SIGUSR1)
			p.waitErr(tt.broken)
			p.tell("slow", syscall.SIGUSR2)
			p.waitErr("msg=ready component=slow ")
			if tt.mends == "" {
				p.exit(exitFailed)
				p.has(p.stderr, "flowctl: component a failed: unhealthy for 2s (-unhealthy-timeout)", "never started, waiting for a: reader")
				return
			}
			if tt.onUSR1 == "exit" {
				p.wait(p.stdout, "a      | waiting\n", 2)
			}
			p.tell("a", syscall.SIGUSR2)
			p.waitReady()
			p.stop()
			p.has(p.stderr, tt.broken, "msg=ready component=slow ", tt.mends, "msg=started component=reader ")
		})
	}
}

// A program that is being replaced when its component is to be started again is tried
// again.
func TestRunRestartOfWhatCannotBeRun(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "program")
	if err := os.Symlink("/bin/sh", program); err != nil {
		t.Fatal(err)
	}
	c := shell("a", "exec sleep 300")
	c.Command[0], c.RestartPolicy = program, "on-failure"
	p := launch(t, writePipeline(t, c))
	p.waitReady()
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	p.tell("a", syscall.SIGKILL)
	p.waitErr(`msg="cannot be started again" component=a err="cannot run \"` + program + `\": no such file or directory"`)
	if _, out, _ := call(t, "list", "a", "-e", p.endpoint()); !strings.Contains(out, "cannot run") {
		t.Errorf("list does not say why\n%s", out)
	}
	if err := os.Symlink("/bin/sh", program); err != nil {
		t.Fatal(err)
	}
	p.wait(p.stderr, "msg=ready component=a ", 2)
	p.stop()
	p.has(p.stderr, "msg=restarting component=a in=1", "restarts=1", "cannot be started again", "msg=restarting component=a in=2", "restarts=2")
}

func TestRunRestartDoesNotSurviveStop(t *testing.T) {
	t.Parallel()
	c := actor("a", role{End: "early", Code: 1})
	c.RestartPolicy = "always"
	p := launch(t, writePipeline(t, c, actor("b", role{Dialect: "v1"})))
	p.waitErr("msg=restarting component=a")
	p.waitErr("msg=ready component=b")
	p.stop()
	again := actor("a", role{Dialect: "legacy", Deaf: true})
	again.RestartPolicy = "always"
	p = launch(t, writePipeline(t, again), "-stop-timeout", "100ms")
	p.waitReady()
	p.stop() // by SIGKILL, which is no reason to restart
	if n := strings.Count(p.stderr.String(), "msg=started component=a"); n != 1 {
		t.Errorf("it was started %d times\n%s", n, p)
	}
}

// A program that knows nothing of flowctl is ready when it runs.
func TestRunUnregistered(t *testing.T) {
	t.Parallel()
	reader := actor("reader", role{Dialect: "legacy"})
	reader.Inputs = []string{"a"}
	p := launch(t, writePipeline(t, shell("a", "exec sleep 300"), reader), "-heartbeat-ttl", "200ms")
	p.waitErr("msg=ready component=a ")
	p.waitErr("msg=ready component=reader ")
	p.stop()
	p.hasNot(p.stderr, "msg=unhealthy id=a ")
}

// Such a program is ready only once its health check passes.
func TestRunHealthChecks(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"http", "tcp", "grpc", "exec"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			port, passes := freePort(t), filepath.Join(t.TempDir(), "passes")
			c := actor("a", role{Gate: true, Check: kind, OnUSR1: "fail"})
			c.Register = new(false)
			c.Env["HEALTH_PORT"] = port
			c.HealthCheck = map[string]string{
				"http": "http://127.0.0.1:" + port + "/health", "tcp": "tcp://127.0.0.1:" + port,
				"grpc": "grpc://127.0.0.1:" + port + "/data", "exec": "exec:test -e " + passes,
			}[kind]
			c.HealthInterval, c.HealthRetries = Duration(50*time.Millisecond), 2
			p := launch(t, writePipeline(t, c))
			p.waitOut("waiting")
			if kind == "http" {
				p.wait(p.stdout, "probed", 8) // and failed
			}
			p.hasNot(p.stderr, "msg=ready", "pipeline ready")
			writeFile(t, passes, "")
			p.tell("a", syscall.SIGUSR2)
			p.waitReady()
			p.tell("a", syscall.SIGUSR1)
			os.Remove(passes)
			p.waitErr(`msg=unhealthy id=a component=a cause="health_check ` + c.HealthCheck + ` failed 2 times running: `)
			if code, out, _ := call(t, "list", "-e", p.endpoint()); code != exitFailed {
				t.Errorf("list: exit %d\n%s", code, out)
			}
			writeFile(t, passes, "")
			p.tell("a", syscall.SIGUSR2)
			p.waitErr("msg=healthy id=a component=a")
			p.stop()
		})
	}
}

// The report of a start that came to nothing says what the check said.
func TestRunHealthCheckNeverPasses(t *testing.T) {
	t.Parallel()
	c := shell("a", "exec sleep 300")
	c.HealthCheck, c.HealthInterval, c.HealthRetries = "exec:false", Duration(20*time.Millisecond), 2
	p := launch(t, writePipeline(t, c), "-start-timeout", "1s")
	p.exit(exitNotReady)
	p.has(p.stderr, "flowctl: component a failed: not ready within its start timeout of 1s: health_check exec:false failed ", " times running: exit status 1 (pid ")
}

// A component that registers and then never heartbeats stays healthy by its check,
// and is unhealthy when that fails or never passed.
func TestRunHealthCheckInsteadOfHeartbeats(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	c := actor("a", role{Dialect: "legacy", Mute: true, Check: "http", OnUSR1: "fail"})
	c.Env["HEALTH_PORT"] = port
	c.HealthCheck, c.HealthInterval = "http://127.0.0.1:"+port+"/", Duration(100*time.Millisecond)
	never := actor("never", role{Dialect: "v1"})
	never.HealthCheck, never.HealthInterval, never.HealthRetries = "tcp://127.0.0.1:1", Duration(100*time.Millisecond), 2
	p := launch(t, writePipeline(t, c, never), "-heartbeat-ttl", "1500ms")
	p.waitErr("msg=ready component=a ")
	// Whether it was ready before depends on how quick it was to register.
	unhealthy := regexp.MustCompile(`(?m)^never +source +(ready|starting) +\d+ +0 +unhealthy `)
	for deadline := time.Now().Add(patience); ; {
		code, out, _ := call(t, "list", "-e", p.endpoint())
		if unhealthy.MatchString(out) && code == exitFailed {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("list: exit %d\n%s%s", code, out, p)
		}
	}
	p.wait(p.stdout, "probed", 25) // at 100ms each, well beyond the TTL
	p.hasNot(p.stderr, "msg=unhealthy id=a ")
	p.tell("a", syscall.SIGUSR1)
	p.waitErr("msg=unhealthy id=a component=a cause=\"health_check ")
	p.stop()
}

// What a component writes comes out as it is, line by line.
func TestRunOutput(t *testing.T) {
	t.Parallel()
	const pieces = 160 << 10 // 2.5 MiB
	out := "plain\n\n  indented\t\ncarriage return\r\nin\rside\nnul \x00 invalid \xff\xfe\xc3( ansi \x1b[31mred\x1b[0m\n"
	p := launch(t, writePipeline(t, actor("a", role{End: "registered", Dialect: "legacy", Out: []byte("out\n"), Err: []byte(out), Long: pieces}), shell("longer-id", "printf 'last\\r\\nwords'")))
	p.exit(exitOK)
	var got []string
	for _, line := range p.lines("a") {
		if line != "out" && line != "registered" {
			got = append(got, line)
		}
	}
	want := []string{"plain", "", "  indented\t", "carriage return", "in\rside", "nul \x00 invalid \xff\xfe\xc3( ansi \x1b[31mred\x1b[0m"}
	if len(got) < len(want)+2 || !slices.Equal(got[:len(want)], want) || got[len(got)-1] != "no newline" {
		t.Fatalf("got %d lines: %.1000q", len(got), got)
	}
	long := got[len(want) : len(got)-1]
	for _, piece := range long {
		if len(piece) > maxLine+minBuffer {
			t.Errorf("a piece of %d bytes", len(piece))
		}
	}
	if strings.Join(long, "") != strings.Repeat(longPiece, pieces) || len(long) > 4 {
		t.Errorf("the long line came in %d pieces, which are not what was written", len(long))
	}
	if got, want := p.lines("longer-id"), []string{"last", "words"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	p.has(p.stdout, " a         | out\n")
	p.hasNot(p.stderr, "plain")
	p.hasNot(p.stdout, "msg=")
	if !strings.HasSuffix(p.stdout.String(), "\n") {
		t.Error("the output does not end with a newline")
	}
}

func TestRunOutputComplete(t *testing.T) {
	t.Parallel()
	const count = 50_000
	var parts []Component
	for _, id := range []string{"a", "b", "c"} {
		parts = append(parts, actor(id, role{Dialect: "legacy", Flood: count, End: "registered"}))
	}
	p := launch(t, writePipeline(t, parts...))
	p.exit(exitOK)
	for _, c := range parts {
		lines := p.lines(c.ID)
		if len(lines) != count+1 {
			t.Errorf("%s: %d lines, want %d", c.ID, len(lines), count+1)
			continue
		}
		for i, line := range lines[:count] {
			if want := fmt.Sprintf("line %d of %s %s", i, c.ID, strings.Repeat("x", i%200)); line != want {
				t.Fatalf("%s: line %d is %q, want %q", c.ID, i, line, want)
			}
		}
	}
	if got := strings.Count(p.stdout.String(), "\n"); got != 3*(count+1) {
		t.Errorf("%d lines in all, want %d", got, 3*(count+1))
	}
}

func TestRunOutputJSON(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: "legacy", Out: []byte("to <out> & \"on\"\r\n"), Err: []byte("to err \xff"), OnUSR1: "exit", Code: 5})), "-log-format", "json")
	p.waitErr(`"msg":"pipeline ready"`)
	pid := regexp.MustCompile(`"msg":"started","component":"a","pid":(\d+)`).FindStringSubmatch(p.stderr.String())
	if pid == nil {
		t.Fatal(p)
	}
	n, _ := strconv.Atoi(pid[1])
	if err := syscall.Kill(n, syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	p.exit(exitFailed)
	got := make(map[string]string)
	for line := range strings.Lines(p.stdout.String()) {
		var l struct {
			Time                    time.Time
			Component, Stream, Line string
		}
		dec := json.NewDecoder(strings.NewReader(line))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&l); err != nil || l.Component != "a" || time.Since(l.Time) > time.Hour {
			t.Errorf("%v: %s", err, line)
		}
		got[l.Line] = l.Stream
	}
	if want := map[string]string{`to <out> & "on"`: "stdout", "registered": "stdout", "to err \ufffd": "stderr"}; !maps.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	var failed map[string]any
	for line := range strings.Lines(p.stderr.String()) {
		var l map[string]any
		if err := json.Unmarshal([]byte(line), &l); err != nil || l["time"] == nil || l["level"] == nil || l["msg"] == nil {
			t.Errorf("%v: %s", err, line)
		}
		failed = l
	}
	if failures, _ := failed["failures"].([]any); len(failures) == 1 {
		failed = failures[0].(map[string]any)
	}
	if failed["component"] != "a" || failed["reason"] != "exit status 5" || failed["registered"] != true || len(failed["last_lines"].([]any)) != 3 {
		t.Errorf("the failure: %v\n%s", failed, p)
	}
}

// Where nobody reads the output any more, as after "flowctl | head", the pipeline
// is stopped, and well.
func TestRunOutputClosed(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	file := writePipeline(t, actor("a", role{Dialect: "legacy", Gate: true, Journal: journal}), actor("b", role{Journal: journal, Dialect: "v1"}))
	p := start(t, []string{"run", file, "-control-plane-port", "0"}, func(p *process) { p.cmd.Stdout = w })
	if n, err := r.Read(make([]byte, 1)); n != 1 || err != nil { // the first line of a or b
		t.Fatal(err)
	}
	r.Close()
	p.waitErr("msg=started component=b")
	p.waitErr("msg=ready component=b")
	deadline := time.Now().Add(patience)
	for !slices.Contains(readJournal(t, journal), "gate a") && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond) // a file has no event for us
	}
	_ = syscall.Kill(p.pid("a"), syscall.SIGUSR2) // now it says that it is registered, if it still lives
	p.exit(exitFailed)
	p.has(p.stderr, `level=ERROR msg="standard output cannot be written, stopping" err="write /dev/stdout: broken pipe"`)
	inOrder(t, readJournal(t, journal), "stop a")
	inOrder(t, readJournal(t, journal), "term b", "stop b")
}

// A flowctl that was started by nohup outlives the terminal.
func TestRunNohup(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, actor("a", role{Dialect: "legacy"}))
	p := start(t, []string{"run", file, "-control-plane-port", "0"}, func(p *process) {
		p.cmd.Args = append([]string{"sh", "-c", `trap "" HUP; exec "$0" "$@"`, p.cmd.Path}, p.cmd.Args[1:]...)
		p.cmd.Path = "/bin/sh"
	})
	p.waitReady()
	p.signal(syscall.SIGHUP)
	// Had it been taken, it would be in front of the next signal.
	if code, out, _ := call(t, "list", "-e", p.endpoint()); code != exitOK {
		t.Errorf("list: exit %d\n%s", code, out)
	}
	p.stop()
	p.has(p.stderr, `msg="stop requested" signal=terminated`)
	p.hasNot(p.stderr, "hangup")
}

// quick builds the component of the benchmarks: small, and quick to start.
func quick(b *testing.B) string {
	b.Helper()
	return build(b, "quick", "./testdata/quick")
}

// BenchmarkReadiness measures from the start of flowctl to READY=1, and in turn with
// it the floor: the same components started at once, all of them, with a server
// that does nothing but count, until the last has registered.
func BenchmarkReadiness(b *testing.B) {
	if raceEnabled() {
		b.Skip("the race detector is not what we measure")
	}
	component := quick(b)
	flowctl := binary(b)
	for _, n := range []int{3, 30, 300} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			var parts []Component
			for i := range n {
				parts = append(parts, Component{ID: fmt.Sprintf("c%d", i), Command: []string{component}})
			}
			file := writePipeline(b, parts...)
			var took, floor []time.Duration
			for range b.N {
				floor = append(floor, measureFloor(b, component, n))
				took = append(took, measureReady(b, flowctl, file))
			}
			slices.Sort(took)
			slices.Sort(floor)
			t, f := took[len(took)/2], floor[len(floor)/2]
			b.ReportMetric(0, "ns/op") // of both together: says nothing
			b.ReportMetric(t.Seconds()*1000, "ms")
			b.ReportMetric(f.Seconds()*1000, "floor-ms")
			b.ReportMetric(float64(t)/float64(f), "x-floor")
			b.ReportMetric((t-f).Seconds()*1000, "extra-ms")
			b.ReportMetric((t.Seconds()-1.3*f.Seconds())*1000, "ms-over-1.3x") // the target is 20 at most
		})
	}
}

// measureReady returns the time from the start of flowctl to READY=1.
func measureReady(b *testing.B, flowctl, file string) time.Duration {
	b.Helper()
	dir := shortDir(b)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(2 * patience))
	cmd := exec.Command(flowctl, "run", file, "-control-plane-port", "0")
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Signal(syscall.SIGTERM)
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		if strings.HasPrefix(string(buf[:n]), "READY=1") {
			took := time.Since(begun)
			go io.Copy(io.Discard, conn) // until conn is closed
			return took
		}
	}
}

// countingPlane takes registrations and does nothing with them.
type countingPlane struct {
	flowctlpb.UnimplementedControlPlaneServer
	registered chan struct{}
}

func (p countingPlane) Register(_ context.Context, in *flowctlpb.ServiceInfo) (*flowctlpb.RegistrationAck, error) {
	p.registered <- struct{}{}
	return &flowctlpb.RegistrationAck{ServiceId: in.GetServiceId()}, nil
}

func measureFloor(b *testing.B, component string, n int) time.Duration {
	b.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	plane := countingPlane{registered: make(chan struct{}, n)}
	server := grpc.NewServer()
	flowctlpb.RegisterControlPlaneServer(server, plane)
	go server.Serve(lis)
	defer server.Stop()
	env := append(os.Environ(), "FLOWCTL_ENDPOINT="+lis.Addr().String(), "FLOWCTL_COMPONENT_ID=c", "HEALTH_PORT=1")
	begun := time.Now()
	for range n {
		cmd := exec.Command(component)
		cmd.Env = env
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
	}
	for range n {
		select {
		case <-plane.registered:
		case <-time.After(2 * patience):
			b.Fatal("not all have registered")
		}
	}
	return time.Since(begun)
}

// BenchmarkFootprint tells how large flowctl is as a file and, with three components
// at rest, in memory.
func BenchmarkFootprint(b *testing.B) {
	component := quick(b)
	flowctl := build(b, "flowctl-stripped", ".", "-trimpath", "-ldflags", "-s -w")
	info, err := os.Stat(flowctl)
	if err != nil {
		b.Fatal(err)
	}
	var parts []Component
	for i := range 3 {
		parts = append(parts, Component{ID: fmt.Sprintf("c%d", i), Command: []string{component}})
	}
	file := writePipeline(b, parts...)
	var most int
	for range b.N {
		p := start(b, []string{"run", file, "-control-plane-port", "0"}, func(p *process) { p.cmd.Path = flowctl })
		p.waitReady()
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		kib, err := strconv.Atoi(regexp.MustCompile(`VmRSS:\s*(\d+) kB`).FindStringSubmatch(string(status))[1])
		if err != nil {
			b.Fatal(err)
		}
		most = max(most, kib)
		p.stop()
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(info.Size())/(1<<20), "MiB-file")
	b.ReportMetric(float64(most)/(1<<10), "MiB-RSS")
}

// TestStopDoesNotWaitForTheLog stops a flowctl whose standard error is a pipe that
// is full and that nobody reads.
func TestStopDoesNotWaitForTheLog(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	_ = w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err == nil {
		_, err = w.Write(make([]byte, 4096))
	}
	file := filepath.Join(t.TempDir(), "pipeline.json")
	text := `{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "mute"}, "spec": {"sources": [{"id": "a", "command": ["sh", "-c", "echo up; exec sleep 1000"], "register": false}]}}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary(t), "-f", file, "-control-plane-port", "0")
	cmd.Stderr = w
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || !strings.HasSuffix(line, "a | up\n") {
		t.Fatalf("standard output: %q, %v", line, err)
	}
	ended := make(chan error, 1)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("flowctl hangs")
	}
}

// TestStoppedFlowctlGivesTime stops flowctl itself past the start timeout of a
// component that registers meanwhile.
func TestStoppedFlowctlGivesTime(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: "v1", Gate: true})), "-start-timeout", "2s", "-until", "ready")
	p.waitOut("| waiting\n")
	component := p.pid("a")
	p.signal(syscall.SIGSTOP)
	time.Sleep(1500 * time.Millisecond) // it is time itself that passes here
	if err := syscall.Kill(component, syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	p.signal(syscall.SIGCONT)
	p.exit(exitOK)
}
