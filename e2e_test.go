//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestRun_StopsOnSignal(t *testing.T) {
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

// A stop while components start is no failure, and a component may die of the stop signal.
func TestRun_StopBeforeReadyIsNoFailure(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Gate: true}), shell("other", "exec sleep 300")))
	p.waitOut("waiting")
	p.stop()
	p.hasNot(p.stderr, "pipeline ready", "failed")
}

func TestRun_EndsWhenAllHaveCompleted(t *testing.T) {
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

// A component that ends with 0 as soon as it is ready has completed, even if a hundred do so
// at once.
func TestRun_ManyMayCompleteAtOnce(t *testing.T) {
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

func TestRun_UntilReady(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	store := actor("store", role{Dialect: "v1", Journal: journal})
	store.Inputs = []string{"ledgers"}
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy", Journal: journal}), store), "-until", "ready")
	p.exit(exitOK)
	p.has(p.stderr, "pipeline ready")
	inOrder(t, readJournal(t, journal), "start ledgers", "start store", "stop ledgers", "stop store")
}

func TestRun_FailsWhenAComponentEndsUnasked(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{Dialect: "v1", OnUSR1: "exit", Code: 7})))
	p.waitReady()
	p.tell("store", syscall.SIGUSR1)
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component store failed: exit status 7 (pid ", ", registered)\n", "flowctl: the last lines of store:\n  registered\n")
}

func TestRun_FailsWhenAComponentIsKilled(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"})))
	p.waitReady()
	p.tell("ledgers", syscall.SIGKILL)
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component ledgers failed: killed by signal 9 (killed) (pid ")
}

// A component that ends before it is ready fails at once: the start timeout of 30 s is not
// waited for.
func TestRun_EndBeforeReadyFailsAtOnce(t *testing.T) {
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

func TestRun_FailsWhenAComponentStaysUnhealthy(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{Dialect: "v1", OnUSR1: "unhealthy"})), "-unhealthy-timeout", "300ms")
	p.waitReady()
	p.tell("store", syscall.SIGUSR1)
	p.exit(exitFailed)
	p.has(p.stderr, "msg=unhealthy id=store component=store cause=\"it declared itself UNHEALTHY\"",
		"flowctl: component store failed: unhealthy for 300ms (-unhealthy-timeout): it declared itself UNHEALTHY (pid ", ", registered)\n")
}

func TestRun_ComponentThatHealsInTimeIsNoFailure(t *testing.T) {
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

func TestRun_SaysWhyAComponentCannotStart(t *testing.T) {
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

func TestRun_PortIsTaken(t *testing.T) {
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

func TestRun_BadAddressIsRefused(t *testing.T) {
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

func TestRun_StartTimeoutOfFlagAndFile(t *testing.T) {
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

// environ returns the environment that component id printed, by its role's Environ.
func (p *process) environ(id string) map[string]string {
	p.tb.Helper()
	env := make(map[string]string)
	for _, line := range p.lines(id) {
		quoted, ok := strings.CutPrefix(line, "env ")
		if !ok {
			continue
		}
		entry, err := strconv.Unquote(quoted)
		if err != nil {
			p.tb.Error(err)
		}
		name, value, _ := strings.Cut(entry, "=")
		if _, twice := env[name]; twice {
			p.tb.Errorf("%s has %s twice", id, name)
		}
		env[name] = value
	}
	return env
}

func TestRun_EnvironmentOfComponents(t *testing.T) {
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

	envA, envB := p.environ("a"), p.environ("b")
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

func TestRun_SecondSignalKills(t *testing.T) {
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

// Nothing of a component's process group is left, however the component ends. The harness
// fails for processes that are left.
func TestRun_EndsWholeProcessGroups(t *testing.T) {
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

// Processes that a health check leaves behind are ended with it.
func TestRun_EndsWhatAHealthCheckLeaves(t *testing.T) {
	t.Parallel()
	script := writeFile(t, filepath.Join(t.TempDir(), "check"), "sleep 300 &\n")
	c := shell("a", "exec sleep 300")
	c.HealthCheck = "exec:sh " + script
	p := launch(t, writePipeline(t, c), "-until", "ready")
	p.exit(exitOK)
}

// A process that left the group keeps the output of the component open after its end. The run
// does not wait for it, and shows what was written before.
func TestRun_DoesNotWaitForDaemons(t *testing.T) {
	t.Parallel()
	c := shell("a", `setsid sleep 300 & echo last words; exit 0`)
	c.RestartPolicy = "no"
	p := launch(t, writePipeline(t, c))
	p.exit(exitOK)
	p.has(p.stdout, "a | last words\n")
	p.killLeft() // such a one is not ended yet
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

// A component that falls silent, or that a signal has stopped, is stale until its next
// heartbeat.
func TestRun_SilentComponentIsStaleAndHeals(t *testing.T) {
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

func TestRun_ListensOnAUnixSocket(t *testing.T) {
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

// A component with "register": false is ready when it runs.
func TestRun_UnregisteredComponentIsReadyWhenItRuns(t *testing.T) {
	t.Parallel()
	reader := actor("reader", role{Dialect: "legacy"})
	reader.Inputs = []string{"a"}
	p := launch(t, writePipeline(t, shell("a", "exec sleep 300"), reader), "-heartbeat-ttl", "200ms")
	p.waitErr("msg=ready component=a ")
	p.waitErr("msg=ready component=reader ")
	p.stop()
	p.hasNot(p.stderr, "msg=unhealthy id=a ")
}

// A component with "register": false and a health check is ready once that passes.
func TestRun_UnregisteredComponentIsReadyWhenItsCheckPasses(t *testing.T) {
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

// The report of a component that was not ready in time says why its health check failed.
func TestRun_ReportSaysWhatTheHealthCheckSaid(t *testing.T) {
	t.Parallel()
	c := shell("a", "exec sleep 300")
	c.HealthCheck, c.HealthInterval, c.HealthRetries = "exec:false", Duration(20*time.Millisecond), 2
	p := launch(t, writePipeline(t, c), "-start-timeout", "1s")
	p.exit(exitNotReady)
	p.has(p.stderr, "flowctl: component a failed: not ready within its start timeout of 1s: health_check exec:false failed ", " times running: exit status 1 (pid ")
}

// A component that registers and then never heartbeats stays healthy by its check,
// and is unhealthy when that fails or never passed.
func TestRun_HealthCheckStandsForHeartbeats(t *testing.T) {
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

// A flowctl that was started by nohup outlives the terminal.
func TestRun_NohupIgnoresSIGHUP(t *testing.T) {
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

// flowctl itself is stopped past the start timeout of a component that registers meanwhile.
func TestRun_StoppedFlowctlPutsStartTimeoutsOff(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: "v1", Gate: true})), "-start-timeout", "2s", "-janitor-interval", "1s", "-until", "ready")
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

// chaosVar is how long TestChaos takes, 5s without it.
const chaosVar = "FLOWCTL_CHAOS"

// mischief is what a component of TestChaos may do; F floods, T is the herd.
var mischief = []string{
	`exit 1`,
	`exit 0`,
	`kill -9 $$`,
	`kill -SEGV $$`,
	`sleep 0.3`,
	`F 2000`,
	`F 20000 >&2`,
	`F 500 & F 500 & wait`,
	`printf unfinished; exit 5`,
	`sleep T & (sleep T & sleep T) &`,
	`(trap "" TERM INT HUP; sleep T) &`,
	`trap "" TERM`,
	`i=0; while [ $i -lt 30 ]; do (sleep 0.0$i & true &); i=$((i+1)); done`,
	daemons + ` &`,
	`env -i ` + daemons + ` &`,
	`setsid sh -c 'f=0; while [ $f -lt 3000 ]; do echo "FLOOD"; f=$((f+1)); done; sleep T' &`,
	`kill -STOP $$`,
	`exec sleep 0.5`,
}

// shellSays matches what a shell prints about a child that a signal has ended.
var shellSays = regexp.MustCompile(`^(Killed|Terminated|Interrupt|Segmentation fault)( \(core dumped\))?$`)

// flood is the line that components of TestChaos print again and again.
const flood = "flood 0123456789 0123456789 0123456789 0123456789 0123456789"

// chaosComponents returns a component that counts, and others that do mischief.
func chaosComponents(t *testing.T, random *rand.Rand, h herd) []Component {
	counter := shell("counter", `i=0; stop=; trap stop=1 TERM; while [ -z "$stop" ]; do i=$((i+1)); echo "count $i"; done; echo "total $i"`)
	components := []Component{counter}
	for i := range 16 {
		// What a start does depends on how many there were.
		script := `: T; F() { f=0; while [ $f -lt $1 ]; do echo "` + flood + `"; f=$((f+1)); done; }` + "\n"
		file := filepath.Join(t.TempDir(), "starts")
		script += `n=$(cat ` + file + ` 2>/dev/null || echo 0); echo $((n+1)) >` + file + "; case $((n%8)) in\n"
		for n := range 8 {
			script += fmt.Sprint(n, ") ")
			for range 1 + random.IntN(5) {
				script += mischief[random.IntN(len(mischief))] + "\n"
			}
			if random.IntN(2) == 0 {
				script += "exec sleep T\n" // until something kills it
			}
			script += ";;\n"
		}
		c := shell(fmt.Sprint("c", i), h.script(strings.ReplaceAll(script, "FLOOD", flood))+"esac")
		c.RestartPolicy = "always"
		if i > 8 {
			c.Inputs = []string{fmt.Sprint("c", random.IntN(5))}
		}
		components = append(components, c)
	}
	return components
}

// Components crash, hang, ignore signals, flood, fork and make daemons at random, and random
// processes of theirs and the guard get signals. One component counts: none of its lines is
// missing.
func TestChaos(t *testing.T) {
	t.Parallel()
	length := 5 * time.Second
	if text := os.Getenv(chaosVar); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("FLOWCTL_CHAOS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("FLOWCTL_CHAOS_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	h := newHerd()
	components := chaosComponents(t, random, h)
	count, total := 0, -1
	y := newTally(func(id string, line []byte) bool {
		if id != "counter" {
			text := strings.TrimPrefix(string(line), "unfinished") // another process may have gone on
			return text == flood || text == "" || shellSays.MatchString(text)
		}
		count++
		if rest, found := bytes.CutPrefix(line, []byte("total ")); found {
			count--
			total, _ = strconv.Atoi(string(rest))
			return true
		}
		n, err := strconv.Atoi(string(bytes.TrimPrefix(line, []byte("count "))))
		return err == nil && n == count
	})
	p := start(t, runArgs(writePipeline(t, components...), "-stop-timeout", "500ms"), stdoutTo(y))
	deed := []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGCONT, syscall.SIGTERM, syscall.SIGINT, syscall.SIGSEGV}
	deeds := 0
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Duration(random.IntN(40)) * time.Millisecond) {
		living := h.living()
		if len(living) > 0 {
			pids := slices.Sorted(maps.Keys(living))
			h.signal(pids[random.IntN(len(pids))], deed[random.IntN(len(deed))])
			deeds++
		}
		if random.IntN(100) == 0 {
			_ = syscall.Kill(guardOf(p), syscall.SIGKILL)
		}
	}
	select {
	case <-p.done:
		t.Fatalf("flowctl has ended\n%s", p)
	default:
	}
	h.end(p, syscall.SIGTERM)
	y.clean(t)
	lines, _, _ := y.of("counter")
	if total < 0 || count != total {
		t.Errorf("%d lines of the counter, which says that it printed %d", count, total)
	}
	t.Logf("%d lines counted, %d bytes in all, %d deeds, %d starts", lines, y.total(), deeds, strings.Count(p.stderr.String(), "msg=started"))
}

// The report says why a component cannot be started, with its id and the path.
func TestRun_SaysWhyAProgramCannotRun(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := writeFile(t, filepath.Join(dir, name), text)
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	busy := file("busy", "", 0o700)
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(busy, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	if _, err := w.Write(program); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, want string }{
		{"no #! line", file("script", "echo hello\n", 0o700), "it is no program of this machine, and has no #! line"},
		{"no program", file("noise", "\x7fELF\x00garbage", 0o700), "it is no program of this machine, and has no #! line"},
		{"nothing", file("empty", "", 0o700), "it is no program of this machine, and has no #! line"},
		{"being written", busy, "text file busy"},
		{"interpreter is no program", file("odd", "#!"+file("inner", "echo\n", 0o600)+"\n", 0o700), "permission denied"},
		{"loop", func() string {
			path := filepath.Join(dir, "loop")
			if err := os.Symlink(path, path); err != nil {
				t.Fatal(err)
			}
			return path
		}(), "too many levels of symbolic links"},
		{"name too long", "/" + strings.Repeat("x", 300), "file name too long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, Component{ID: "store", Command: []string{tt.path}, Register: new(false)}))
			p.exit(exitFailed)
			p.has(p.stderr, "flowctl: component store failed: cannot run ", strconv.Quote(tt.path), tt.want)
		})
	}
}

func TestRun_SaysThatOpenFilesRunOut(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		port string
		want string
	}{
		{"for a process", "1", `cannot run "sleep": the limit of open files is reached (ulimit -n, or LimitNOFILE= of a unit)`},
		{"for a port", "", "too many open files"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHerd()
			var components []Component
			for i := range 100 { // more than the limit by far, whatever flowctl itself has open
				c := Component{ID: fmt.Sprint("c", i), Command: []string{"sleep", string(h)}, Register: new(false)}
				if tt.port != "" {
					c.Env = map[string]string{"HEALTH_PORT": tt.port}
				}
				components = append(components, c)
			}
			p := start(t, runArgs(writePipeline(t, components...), "-stop-timeout", "500ms"), limited("-n 48"))
			p.exit(exitFailed)
			h.gone(p, 0)
			p.has(p.stderr, "component c", tt.want)
			if tt.port != "" {
				p.has(p.stderr, "try: raise the limit of open files")
			}
		})
	}
}

func TestRun_SaysThatProcessesRunOut(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs a user without other processes")
	}
	h := newHerd()
	var components []Component
	for i := range 100 {
		components = append(components, Component{ID: fmt.Sprint("c", i), Command: []string{"sleep", string(h)}, Register: new(false)})
	}
	uid := 300_000 + int(herds.Load())<<16 + os.Getpid() // the threads of all its processes count
	p := start(t, runArgs(publicPipeline(t, components...)), withBinary(plainFlowctl()), limited("-u 80 2>/dev/null || ulimit -p 80"), asNobody(uid))
	p.exit(exitFailed)
	h.gone(p, 0)
	p.has(p.stderr, "flowctl: component c", ` failed: cannot run "sleep": the limit of processes is reached (ulimit -u, or TasksMax= of a unit)`, "try: raise the limit of processes")
}
