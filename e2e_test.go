//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
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

// A component that always fails is started less and less often, which is seen; a stop
// finds it in its pause and is over at once.
func TestRestartsAreFewAndEndWithTheRun(t *testing.T) {
	t.Parallel()
	h := newHerd()
	p := launch(t, writePipeline(t,
		func() Component {
			c := shell("a", h.script(`: T; exit 3`))
			c.RestartPolicy = "always"
			return c
		}(), shell("b", h.script(`exec sleep T`))))
	p.wait(p.stderr, "msg=restarting component=a", 3)
	var waits []time.Duration
	for _, m := range regexp.MustCompile(`msg=restarting component=a in=(\S+) restarts=\d+\n`).FindAllStringSubmatch(p.stderr.String(), -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			t.Fatal(err)
		}
		waits = append(waits, d)
	}
	for i, want := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
		if waits[i] < want || waits[i] > want+want/10 {
			t.Errorf("pause %d is %s, want %s and a tenth at most", i, waits[i], want)
		}
	}
	p.waitErr("restarting=a")
	began := time.Now()
	p.stop()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the stop took %s", took)
	}
	h.gone(p, 0)
	if n := strings.Count(p.stderr.String(), "msg=started component=a"); n != 3 {
		t.Errorf("it was started %d times, want 3\n%s", n, p)
	}
}

// What reads from a component that is restarted goes on, and can see how that is.
func TestReaderOfARestartedComponentGoesOn(t *testing.T) {
	t.Parallel()
	a := actor("a", role{Dialect: "legacy", OnUSR1: "exit", Code: 1})
	a.RestartPolicy = "on-failure"
	b := actor("b", role{Dialect: "v1"})
	b.Inputs = []string{"a"}
	p := launch(t, writePipeline(t, a, b))
	p.waitReady()
	health := func() (string, time.Time) {
		_, out, _ := call(t, "list", "-e", p.endpoint(), "-json")
		var pipelines []listedPipeline
		if err := json.Unmarshal([]byte(out), &pipelines); err != nil || len(pipelines) != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		for _, r := range pipelines[0].Components {
			if r.ID == "a" && r.Registered != nil {
				return r.Health, *r.Registered
			}
		}
		return "", time.Time{}
	}
	before, registered := health()
	first, reader := p.pid("a"), p.pid("b")
	p.tell("a", syscall.SIGUSR1)
	p.waitErr("msg=restarting component=a")
	if during, _ := health(); before != "healthy" || during == before {
		t.Errorf("its health was %q and is %q while it is restarted", before, during)
	}
	p.wait(p.stderr, "msg=ready component=a ", 2)
	after, again := health()
	if after != "healthy" || !again.After(registered) {
		t.Errorf("it is %q and was registered at %s, then at %s", after, registered, again)
	}
	if p.pid("a") == first || p.pid("b") != reader || strings.Count(p.stderr.String(), "msg=started component=b") != 1 {
		t.Errorf("want another process of a and the same of b\n%s", p)
	}
	p.stop()
}

// TestNothingLeaksOverManyRestarts is of one process, and so not parallel: it counts
// what this process has.
func TestNothingLeaksOverManyRestarts(t *testing.T) {
	program := filepath.Join(t.TempDir(), "leak"+strconv.Itoa(os.Getpid()%10000000)) // its zombies have this name
	if err := os.Symlink("/bin/sh", program); err != nil {
		t.Fatal(err)
	}
	s, _ := supervise(t, []map[string]any{{"id": "a", "command": []string{program, "-c", "echo out; echo err >&2; exit 1"}, "register": false, "restart_policy": "always"}}, nil)
	p, now := s.byID["a"], time.Now()
	once := func() {
		for _, p := range s.startable() {
			s.start(p, now)
			s.ready(p, now)
			nextExit(t, s, now)
			now = p.deadline
			s.expire(now)
		}
	}
	count := func() (files, goroutines, zombies int) {
		entries, _ := os.ReadDir("/proc/self/fd")
		return len(entries), runtime.NumGoroutine(), len(processesNamed(filepath.Base(program)))
	}
	for range 10 {
		once()
	}
	files, goroutines, _ := count()
	for range 1000 {
		once()
	}
	if p.state != procWaiting || p.restarts != 1010 {
		t.Fatalf("state %s after %d restarts", p.state, p.restarts)
	}
	// The goroutines of the last process may need a moment.
	eventually(t, "as few descriptors, goroutines and zombies as before", func() bool {
		f, g, z := count()
		return f <= files && g <= goroutines && z == 0
	})
}

// TestManyEndTogether is not parallel: it measures.
func TestManyEndTogether(t *testing.T) {
	const many = 300
	h := newHerd()
	var components []Component
	for i := range many {
		components = append(components, Component{ID: fmt.Sprintf("c%03d", i), Command: []string{"sleep", string(h)}, Register: new(false)})
	}
	p := start(t, runArgs(writePipeline(t, components...)), withBinary(plain()))
	p.waitReady()
	var fds []int
	for pid := range h.await(p, many) {
		fds = append(fds, handle(t, pid))
	}
	if len(fds) != many {
		t.Fatalf("%d processes", len(fds))
	}
	fds = append(fds, handle(t, p.cmd.Process.Pid))
	p.signal(syscall.SIGTERM)
	times, ok := ends(t, patience, fds...)
	if !ok {
		t.Fatalf("not all have ended\n%s", p)
	}
	last := slices.MaxFunc(times[:many], time.Time.Compare)
	first := slices.MinFunc(times[:many], time.Time.Compare)
	after := times[many].Sub(last)
	t.Logf("%d components ended within %s, flowctl %s after the last", many, last.Sub(first), after)
	if after > 300*time.Millisecond {
		t.Errorf("flowctl ended %s after the last of them", after)
	}
	p.exit(exitOK)
	h.gone(p, 0)
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

// shellSays is what a shell says of a process of its own that a signal has ended.
var shellSays = regexp.MustCompile(`^(Killed|Terminated|Interrupt|Segmentation fault)( \(core dumped\))?$`)

// Components crash, hang, ignore signals, flood, fork and make daemons at random, and
// something kills and stops what it meets, the guard too. One component counts, and
// none of its lines is missing.
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
	const flood = "flood 0123456789 0123456789 0123456789 0123456789 0123456789"
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

// Why a component cannot be started is told with its id and the path.
func TestWhyItCannotStart(t *testing.T) {
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

func TestTooManyOpenFiles(t *testing.T) {
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
		})
	}
}

func TestTooManyProcesses(t *testing.T) {
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
	p := start(t, runArgs(publicPipeline(t, components...)), withBinary(plain()), limited("-u 80 2>/dev/null || ulimit -p 80"), asNobody(uid))
	p.exit(exitFailed)
	h.gone(p, 0)
	p.has(p.stderr, "flowctl: component c", ` failed: cannot run "sleep": the limit of processes is reached (ulimit -u, or TasksMax= of a unit)`)
}
