//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// This test binary plays the components of tests: TestMain plays the role that roleVar
// holds.

// roleVar holds a role as JSON.
const roleVar = "TEST_COMPONENT_ROLE"

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
		if r.Events != nil {
			os.Exit(r.Events.play())
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

// A role is what a component does. It says on its output what it has come to, so
// that a test can wait for it: "waiting" for SIGUSR2, "registered", and what
// SIGUSR1 and SIGUSR2 have changed.
type role struct {
	Dialect   string     `json:",omitempty"` // "legacy" or "v1"; without one it does not register
	Anonymous bool       `json:",omitempty"` // it sends no id
	Nameless  bool       `json:",omitempty"` // it sends nothing to know it by, and cannot register unless it is known
	Alias     string     `json:",omitempty"` // it registers as this service
	Gate      bool       `json:",omitempty"` // before it registers or passes a check, it waits for SIGUSR2
	Mute      bool       `json:",omitempty"` // it never heartbeats
	Hidden    bool       `json:",omitempty"` // only root can look into it
	OnUSR1    string     `json:",omitempty"` // "exit", "mute", "unhealthy", "fail" its checks; SIGUSR2 undoes it
	End       string     `json:",omitempty"` // ends with Code: "early", before it registers, or "registered"
	Starts    int        `json:",omitempty"` // so many first starts End so, 0 for all; needs a Journal
	Code      int        `json:",omitempty"`
	Out, Err  []byte     `json:",omitempty"` // printed first
	Long      int        `json:",omitempty"` // after Err, so often longPiece in one line, and a line without its end
	Hoard     int        `json:",omitempty"` // bytes of lines to leave in its pipe, before it ends
	Flood     int        `json:",omitempty"` // numbered lines to print
	Environ   bool       `json:",omitempty"` // print the environment
	Deaf      bool       `json:",omitempty"` // ignore SIGTERM
	Serve     string     `json:",omitempty"` // unix socket; after SIGTERM it lives until its one client has gone
	Dial      string     `json:",omitempty"` // unix socket to connect to
	Check     string     `json:",omitempty"` // "http", "tcp" or "grpc": serve health checks on HEALTH_PORT
	Journal   string     `json:",omitempty"` // file for a line at start, SIGTERM and end
	Floor     bool       `json:",omitempty"` // it is no component: it serves the floor until SIGTERM
	NoNetlink bool       `json:",omitempty"` // it is no component: it becomes its arguments, which get no socket of AF_NETLINK
	Events    *eventRole `json:",omitempty"` // it serves events, and does nothing else
}

const longPiece = "0123456789abcdef"

func (r role) id() string { return os.Getenv("FLOWCTL_COMPONENT_ID") }

// play is main for a component. It returns the exit code.
func (r role) play() int {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2)
	if r.NoNetlink {
		fmt.Fprintln(os.Stderr, withoutNetlink(os.Args[1:]))
		return 2
	}
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
	if r.Hoard > 0 {
		return r.hoard()
	}
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
	check(true)
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

// withoutNetlink becomes a program in which socket(AF_NETLINK) fails as with RestrictAddressFamilies=
// of a unit.
func withoutNetlink(args []string) error {
	runtime.LockOSThread()          // whose filter the program gets
	filter := []syscall.SockFilter{ // over struct seccomp_data of linux/seccomp.h
		{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: 0},
		{Code: syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K, K: syscall.SYS_SOCKET, Jf: 3},
		{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: 16}, // the first argument, on little-endian
		{Code: syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K, K: syscall.AF_NETLINK, Jf: 1},
		{Code: syscall.BPF_RET | syscall.BPF_K, K: 0x00050000 | uint32(syscall.EAFNOSUPPORT)}, // SECCOMP_RET_ERRNO
		{Code: syscall.BPF_RET | syscall.BPF_K, K: 0x7fff0000},                                // SECCOMP_RET_ALLOW
	}
	program := syscall.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	const noNewPrivs, seccompMode = 38, 2 // PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, noNewPrivs, 1, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_SECCOMP, seccompMode, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return errno
	}
	return syscall.Exec(args[0], args, slices.DeleteFunc(os.Environ(), func(entry string) bool { return strings.HasPrefix(entry, roleVar+"=") }))
}

// live is the life of a component that is up.
func (r role) live(signals <-chan os.Signal, served <-chan struct{}, check func(pass bool), alive func(flowctlv1.HealthStatus)) int {
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
				check(true)
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
				check(false)
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

// hoard leaves lines in the pipe that is its standard output.
func (r role) hoard() int {
	const setPipeSize = 1031 // F_SETPIPE_SZ
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, 1, setPipeSize, uintptr(r.Hoard)); errno != 0 {
		fmt.Fprintln(os.Stderr, "F_SETPIPE_SZ:", errno)
		return 77
	}
	var lines []byte
	for i := 0; len(lines) < r.Hoard; i++ {
		lines = fmt.Appendf(lines, "line %09d\n", i)
	}
	os.Stdout.Write(lines)
	return 0
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

// serveCheck serves what a health_check asks. It fails until it is set to pass.
func (r role) serveCheck() func(pass bool) {
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
		return passes.Store
	case "tcp":
		var lis net.Listener
		return func(pass bool) {
			if pass && lis == nil {
				lis = listen()
			} else if !pass && lis != nil {
				lis.Close()
				lis = nil
			}
		}
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
		return set
	}
	return func(bool) {}
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

// actorRole is the value of roleVar for r.
func actorRole(tb testing.TB, r role) string {
	tb.Helper()
	return actor("", r).Env[roleVar]
}
