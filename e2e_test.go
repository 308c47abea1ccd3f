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
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT} {
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

// A program that dies as it starts is never ready, also where nothing tells of it but that it runs.
func TestRun_DyingProgramIsNotReady(t *testing.T) {
	t.Parallel()
	for _, script := range []string{"exit 3", "sleep 0.3; exit 3"} {
		for _, end := range [][]string{{"-until", "ready"}, {"--", "echo", "it went on"}} {
			t.Run(script+" "+end[0], func(t *testing.T) {
				t.Parallel()
				waits := shell("waits", "exec sleep 300")
				waits.DependsOn = []string{"dies"}
				p := launch(t, writePipeline(t, shell("dies", script), waits), end...)
				p.exit(exitFailed)
				p.has(p.stderr, "flowctl: component dies failed: exit status 3")
				p.hasNot(p.stdout, "it went on")
			})
		}
	}
	p := launch(t, writePipeline(t, shell("ends", "exit 0"), shell("stays", "exec sleep 300")), "-until", "ready")
	p.exit(exitOK)
	p.has(p.stderr, "msg=ended component=ends ", `msg="pipeline ready"`)
}

// A signal before what -until waits for is no success.
func TestRun_SignalBeforeWhatItWaitsFor(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args string
		sig  syscall.Signal
		gate bool // it is not ready when the signal comes
		code int
	}{
		{"-until ready", syscall.SIGTERM, true, 143},
		{"-until ready", syscall.SIGINT, true, 130},
		{"-until done", syscall.SIGHUP, false, 129},
		{"-until done", syscall.SIGINT, true, 130},
		{"-until stopped", syscall.SIGTERM, true, exitOK},
	} {
		t.Run(tt.args+" "+tt.sig.String(), func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, actor("a", role{Dialect: "v1", Gate: tt.gate})), strings.Fields(tt.args)...)
			if tt.gate {
				p.waitOut("a | waiting\n")
			} else {
				p.waitReady()
			}
			p.signal(tt.sig)
			p.exit(tt.code)
			if tt.code != exitOK {
				p.has(p.stderr, fmt.Sprintf("flowctl: %s was not reached: signal %d (%s) came first\n", tt.args, tt.sig, tt.sig))
			}
		})
	}
}

// A signal that is sent to flowctl and to its components is a stop, in any order. systemd does that with
// KillMode=control-group.
func TestRun_SignalToAllIsAStop(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{-10 * time.Millisecond, 0, 10 * time.Millisecond, 100 * time.Millisecond} { // of the components
		t.Run(ahead.String(), func(t *testing.T) {
			t.Parallel()
			uses := shell("uses", "trap 'sleep 1; exit 0' TERM; echo up; while :; do sleep 0.02; done")
			uses.DependsOn = []string{"dies", "tells"}
			p := launch(t, writePipeline(t, uses, shell("dies", "exec sleep 300"), shell("tells", "trap 'exit 7' TERM; echo up; while :; do sleep 0.02; done")))
			p.waitOut("uses  | up\n")
			p.waitOut("tells | up\n")
			if ahead < 0 {
				p.signal(syscall.SIGTERM)
				time.Sleep(-ahead)
			}
			p.tell("dies", syscall.SIGTERM)
			p.tell("tells", syscall.SIGTERM)
			if ahead >= 0 {
				time.Sleep(ahead)
				p.signal(syscall.SIGTERM)
			}
			p.exit(exitOK)
			p.has(p.stderr, "msg=ended component=dies ")
			p.has(p.stderr, "msg=ended component=tells ", `reason="exit status 7"`)
		})
	}
}

func TestRun_EndWhileOthersStopFails(t *testing.T) {
	t.Parallel()
	uses := shell("uses", "trap 'sleep 3; exit 0' TERM; echo up; while :; do sleep 0.02; done")
	uses.DependsOn = []string{"used"}
	p := launch(t, writePipeline(t, uses, shell("used", "trap 'exit 5' USR1; echo up; while :; do sleep 0.02; done")))
	p.waitReady()
	p.signal(syscall.SIGTERM)
	p.waitErr("msg=stopping component=uses ")
	time.Sleep(2 * signalWindow) // after which nobody takes it for an answer to the same signal
	p.tell("used", syscall.SIGUSR1)
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component used failed: exit status 5")
}

// serviceOf returns a program that serves until it is told to stop, and says when it does.
func serviceOf(id string) Component {
	c := shell(id, "trap 'echo stops; exit 0' TERM; echo up; while :; do sleep 0.02; done")
	c.Role, c.Register = roleService, nil
	return c
}

func TestServices_AreLeanedOn(t *testing.T) {
	t.Parallel()
	schema := shell("schema", "sleep 0.2; echo made")
	schema.Role, schema.Register, schema.Oneshot, schema.DependsOn = roleService, nil, true, []string{"db"}
	a, b := shell("a", "echo reads; sleep 0.5; echo is done"), shell("b", "echo prints")
	b.Inputs = []string{"a"}
	p := launch(t, writePipeline(t, serviceOf("db"), schema, a, b))
	p.exit(exitOK)
	p.has(p.stdout, "schema | made\n", "a      | reads\n", "a      | is done\n", "db     | stops\n")
	p.has(p.stderr, "all components have completed, stopping what still runs", "msg=ended component=db ")
	p.hasNot(p.stderr, "failed")

	p = launch(t, writePipeline(t, serviceOf("db"), shell("a", "trap 'echo stops; exit 0' TERM; echo up; while :; do sleep 0.02; done")))
	p.waitReady()
	if list, _ := listed(t, p.endpoint()); list["db"].Type != "service" || list["db"].Health != "healthy" {
		t.Errorf("listed: %+v", list["db"])
	}
	p.stop()
	p.has(p.stdout, "a  | stops\n", "db | stops\n")

	dies := serviceOf("dies")
	dies.Command = []string{"/bin/sh", "-c", "exit 4"}
	p = launch(t, writePipeline(t, dies, shell("a", "exec sleep 300")))
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component dies failed: exit status 4")
}

// Services that a sandbox runs are used by a run of the same pipeline.
func TestSandbox(t *testing.T) {
	t.Parallel()
	here := runsIn(t.TempDir())
	db := serviceOf("db")
	db.HealthCheck, db.HealthInterval = "exec:test -e go", Duration(50*time.Millisecond)
	a := shell("a", "echo runs; exec sleep 300")
	a.DependsOn = []string{"db"}
	file := writePipeline(t, db, a)
	box := start(t, []string{"sandbox", file, "-control-plane-port", "0"}, here)
	box.waitErr("msg=started component=db ") // and is not ready yet
	early := start(t, append(runArgs(file), "-until", "ready"), here)
	early.waitErr(fmt.Sprintf("flowctl: waiting for the services of test-sandbox, pid %d: ", box.cmd.Process.Pid))
	writeFile(t, filepath.Join(filepath.Dir(file), "go"), "")
	early.exit(exitOK)
	early.has(early.stderr, `msg="the services are those of the sandbox that runs"`)
	box.waitReady()
	box.waitErr("msg=service component=db health_port=")
	p := start(t, runArgs(file), here)
	p.waitErr(fmt.Sprintf(`msg="the services are those of the sandbox that runs" pid=%d`, box.cmd.Process.Pid))
	p.waitReady()
	p.hasNot(p.stdout, "db")
	p.stop()
	box.stop()
	box.hasNot(box.stdout, "runs")

	p = start(t, runArgs(file), here)
	p.waitReady()
	p.has(p.stdout, "db | up\n", "a  | runs\n")
	p.stop()
	p = start(t, []string{"sandbox", writePipeline(t, shell("a", "exec sleep 300")), "-control-plane-port", "0"}, here)
	p.exit(exitUsage)
	p.has(p.stderr, "has no services that a sandbox could run\n")
}

func TestRun_Oneshot(t *testing.T) {
	t.Parallel()
	schema, app := shell("schema", "until [ -e go ]; do sleep 0.02; done; echo made"), shell("app", "echo up; exec sleep 300")
	schema.Oneshot, schema.Register, app.DependsOn = true, nil, []string{"schema"}
	file := writePipeline(t, schema, app)
	p := launch(t, file)
	eventually(t, "it runs, and is not healthy", func() bool {
		list, _ := listed(t, p.endpoint())
		return !list["schema"].Healthy && list["schema"].Cause == "it has not ended yet, and is ready once it has"
	})
	writeFile(t, filepath.Join(filepath.Dir(file), "go"), "")
	p.waitReady()
	p.has(p.stdout, "schema | made\n", "app    | up\n")
	list, _ := listed(t, p.endpoint())
	if got := list["schema"]; !got.Healthy || got.State != procCompleted.String() {
		t.Errorf("when it has ended: %+v", got)
	}
	p.reload("reloaded: nothing has changed\n")
	schema.Command = []string{"/bin/sh", "-c", "echo made anew"}
	rewrite(t, file, schema, app)
	p.reload("reloaded: restarted schema; 1 unchanged\n")
	p.waitOut("made anew")
	p.stop()

	schema.Command = []string{"/bin/sh", "-c", "exit 4"}
	p = launch(t, writePipeline(t, schema, app))
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component schema failed: exit status 4 before it was ready", "never started, waiting for schema: app\n")
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
	p.has(p.stderr, "flowctl: component bad failed: exit status 3 before it was ready (pid ", "flowctl: the last lines of bad:\n", "  no such table\n", "  at last words\n")
	p.hasNot(p.stderr, "component good failed")
	inOrder(t, readJournal(t, journal), "start good", "term good", "stop good")
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
		"FLOWCTL_HEARTBEAT_INTERVAL": "7777ms", "EMPTY": "", "NETWORK_URL": "${TEST_NETWORK}/$$x", "FLOWCTL_LOG": "loud", "PYTHONUNBUFFERED": "",
	})
	command := filepath.Join(dir, "command")
	p := start(t, runArgs(writePipeline(t, a, b), "-heartbeat-ttl", "40s", "--", "sh", "-c", "env >"+command),
		notifySocket(t, filepath.Join(shortDir(t), "notify")),
		withEnv("WATCHDOG_USEC=1000000", "WATCHDOG_PID=1", "LISTEN_FDS=1", "LISTEN_PID=1", "LISTEN_FDNAMES=x", "LISTEN_PIDFDID=1",
			"FLOWCTL_TLS_CA=x", "FLOWCTL_TLS_CERT=x", "FLOWCTL_TLS_KEY=x", "JOURNAL_STREAM=8:1", "LISTEN_ADDR=:80", "WATCHDOG_MODE=loud", "FLOWCTL_TLS_HOME=/tls",
			"TEST_NETWORK=net", "SHARED=outside", "COMPONENT_ID=outside", "FLOWCTL_ENDPOINT=outside",
			"FLOWCTL_ATTEMPT=9", "FLOWCTL_RUN_ID=outside", "FLOWCTL_HEARTBEAT_INTERVAL_MS=9", "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY=a.example"))
	p.exit(exitOK)
	endpoint := p.endpoint()
	if !regexp.MustCompile(`^127\.0\.0\.1:\d+$`).MatchString(endpoint) {
		t.Errorf("endpoint %q is no bare host:port", endpoint)
	}
	envA, envB, envCommand := p.told("a"), p.told("b"), make(map[string]string)
	for _, line := range readJournal(t, command) {
		name, value, _ := strings.Cut(line, "=")
		envCommand[name] = value
	}
	runID := envA["FLOWCTL_RUN_ID"]
	if !regexp.MustCompile(`^[A-Z2-7]{26}$`).MatchString(runID) {
		t.Errorf("the id of the run is %q", runID)
	}
	check := func(id string, env, want map[string]string, not ...string) {
		t.Helper()
		maps.Copy(want, map[string]string{"FLOWCTL_RUN_ID": runID, "no_proxy": "a.example,127.0.0.1", "NO_PROXY": "a.example,127.0.0.1", "no_grpc_proxy": "a.example,127.0.0.1"})
		maps.Copy(want, map[string]string{"LISTEN_ADDR": ":80", "WATCHDOG_MODE": "loud", "FLOWCTL_TLS_HOME": "/tls"})
		for name, value := range want {
			if got, ok := env[name]; !ok || got != value {
				t.Errorf("%s: %s is %q (set: %t), want %q", id, name, got, ok, value)
			}
		}
		// What is told to flowctl alone.
		for _, name := range append(not, "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID",
			"FLOWCTL_TLS_CA", "FLOWCTL_TLS_CERT", "FLOWCTL_TLS_KEY") {
			if value, ok := env[name]; ok {
				t.Errorf("%s: %s=%q is passed on", id, name, value)
			}
		}
	}
	// Only the command has flowctl's standard error, of which JOURNAL_STREAM tells.
	check("the command", envCommand, map[string]string{"FLOWCTL_ENDPOINT": endpoint, "COMPONENT_ID": "outside", "JOURNAL_STREAM": "8:1"}, "FLOWCTL_COMPONENT_ID", "FLOWCTL_ATTEMPT", "FLOWCTL_HEARTBEAT_INTERVAL_MS")
	check("a", envA, map[string]string{
		"ENABLE_FLOWCTL": "true", "FLOWCTL_ENABLED": "true", "FLOWCTL_ENDPOINT": endpoint, "FLOWCTL_HEARTBEAT_INTERVAL": "13333ms", "FLOWCTL_HEARTBEAT_INTERVAL_MS": "13333", "FLOWCTL_ATTEMPT": "1", "PYTHONUNBUFFERED": "1",
		"FLOWCTL_COMPONENT_ID": "a", "FLOWCTL_SERVICE_ID": "a", "COMPONENT_ID": "a", "SERVICE_ID": "a",
		"HEALTH_ENDPOINT": "http://localhost:" + envA["HEALTH_PORT"] + "/health", "SHARED": "outside", "PATH": os.Getenv("PATH"),
	}, "JOURNAL_STREAM")
	if n, err := strconv.Atoi(envA["HEALTH_PORT"]); err != nil || n < 1024 || envA["HEALTH_PORT"] == port {
		t.Errorf("a: HEALTH_PORT is %q", envA["HEALTH_PORT"])
	}
	check("b", envB, map[string]string{
		"ENABLE_FLOWCTL": "true", "FLOWCTL_ENABLED": "true", "FLOWCTL_ENDPOINT": endpoint, "FLOWCTL_HEARTBEAT_INTERVAL": "7777ms", "FLOWCTL_HEARTBEAT_INTERVAL_MS": "7777", "FLOWCTL_ATTEMPT": "1", "PYTHONUNBUFFERED": "", "FLOWCTL_LOG": "loud",
		"FLOWCTL_COMPONENT_ID": "b", "FLOWCTL_SERVICE_ID": "b", "COMPONENT_ID": "mine", "SERVICE_ID": "mine too",
		"HEALTH_PORT": port, "HEALTH_ENDPOINT": "http://elsewhere/",
		"NETWORK": "testnet", "BATCH_SIZE": "25", "DRY": "true", "HOSTS": `["x","y<z"]`, "SHARED": "env",
		"EMPTY": "", "NETWORK_URL": "net/$x", "SECRET": "s3cret=\nline",
		"PWD": dir,
	}, "JOURNAL_STREAM")
}

// What the file gives for flowctl's own variables is ignored, and told.
func TestRun_OwnVariablesAreNotTheFiles(t *testing.T) {
	t.Parallel()
	a := shell("a", "env")
	a.Env = make(map[string]string)
	for _, name := range fixedVars {
		a.Env[name] = "of the file"
	}
	p := launch(t, writePipeline(t, a))
	p.exit(exitOK)
	p.hasNot(p.stdout, "of the file")
	p.has(p.stdout, "| FLOWCTL_COMPONENT_ID=a\n")
	for _, name := range fixedVars {
		if warning := fmt.Sprintf(`level=WARN msg="check warns" component=a field=env.%s reason="flowctl sets it, and ignores what the file gives"`, name); !strings.Contains(p.stderr.String(), warning) {
			t.Errorf("%s is missing\n%s", warning, p)
		}
	}
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
		{"leader fails, member is deaf", `(trap "" TERM; exec >&- 2>&-; touch "$0" && exec sleep 300) & until [ -e "$0" ]; do sleep 0.01; done; echo up; exit 3`, false, exitFailed},
		{"daemon holds the output", `setsid sleep 300 & echo up; exit 0`, false, exitOK},
		{"leader kills itself", `sleep 300 & echo up; kill -9 $$`, false, exitFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := shell("a", tt.script)
			c.Args = []string{filepath.Join(t.TempDir(), "member")}
			p := launch(t, writePipeline(t, c), "-stop-timeout", "500ms")
			p.waitOut("a | up\n")
			if tt.stop {
				p.signal(syscall.SIGTERM)
			}
			p.exit(tt.code)
		})
	}
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

// A component that falls silent, that a signal has stopped, or that says that it is unhealthy
// heals by its next heartbeat.
func TestRun_UnhealthyComponentHeals(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name          string
		role          role
		silence, wake syscall.Signal
		cause         string
	}{
		{"mute", role{Dialect: "legacy", OnUSR1: "mute"}, syscall.SIGUSR1, syscall.SIGUSR2, "no heartbeat "},
		{"stopped", role{Dialect: "v1"}, syscall.SIGSTOP, syscall.SIGCONT, "no heartbeat "},
		{"unhealthy", role{Dialect: "v1", OnUSR1: "unhealthy"}, syscall.SIGUSR1, syscall.SIGUSR2, "it declared itself UNHEALTHY"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", tt.role)), "-heartbeat-ttl", "2s")
			p.waitReady()
			p.tell("store", tt.silence)
			p.waitErr(`msg=unhealthy id=store component=store cause="` + tt.cause)
			p.waitErr(`msg=status ready=1 total=2 unhealthy="store (` + tt.cause)
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
		if code, _, stderr := start(t, []string{"reload", "-e", endpoint}, beside(p)).finish(); code != exitOK { // by the operators' socket
			t.Errorf("reload -e %s: exit %d\n%s", endpoint, code, stderr)
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
			p.waitErr(`msg=unhealthy id=a component=a cause="health_check ` + shownCheck(c.HealthCheck) + ` failed 2 times running: `)
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
	p := start(t, runArgs(file), afterCommand(`trap "" HUP;`))
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
	p := launch(t, writePipeline(t, actor("a", role{Dialect: "v1", Gate: true})), "-start-timeout", "8s", "-janitor-interval", "1s", "-until", "ready")
	p.waitOut("| waiting\n")
	component := p.pid("a")
	p.signal(syscall.SIGSTOP)
	time.Sleep(8 * time.Second) // it is time itself that passes here
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
	p := start(t, runArgs(writePipeline(t, components...), "-stop-timeout", "500ms", "-start-timeout", "10m"), stdoutTo(y)) // nothing lives for a second here
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
	file := func(name, text string) string { return writeProgram(t, filepath.Join(dir, name), text) }
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	busy, loop := file("busy", string(program)), filepath.Join(dir, "loop")
	w, err := os.OpenFile(busy, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, want string }{
		{"no #! line", file("script", "echo hello\n"), "it is no program of this machine, and has no #! line"},
		{"no program", file("noise", "\x7fELF\x00garbage"), "it is no program of this machine, and has no #! line"},
		{"nothing", file("empty", ""), "it is no program of this machine, and has no #! line"},
		{"being written", busy, "text file busy"},
		{"not there", "/no/such/program", "no such file or directory"},
		{"a folder", dir, "it is a folder"},
		{"interpreter is no program", file("odd", "#!"+writeFile(t, filepath.Join(dir, "inner"), "echo\n")+"\n"), "permission denied"},
		{"loop", loop, "too many levels of symbolic links"},
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

// A program that has died counts for nothing, also while something of it is left, or another program answers
// its check.
func TestRun_DeadLeaderIsNotReady(t *testing.T) {
	t.Parallel()
	lis := get(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer lis.Close()
	taken := shell("a", "exit 7")
	taken.HealthCheck = "tcp://" + lis.Addr().String()
	for name, a := range map[string]Component{"sibling": shell("a", "(trap '' TERM; exec sleep 30) & sleep 0.5; exit 7"), "taken port": taken} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, a), "-until", "ready")
			p.exit(exitFailed)
			p.has(p.stderr, "flowctl: component a failed: exit status 7")
		})
	}
}

// One that dies again and again was never ready: its start timeout ends that.
func TestRun_DyingProgramHasItsStartTimeout(t *testing.T) {
	t.Parallel()
	a := shell("a", "exit 1")
	a.RestartPolicy = restartOnFailure
	p := launch(t, writePipeline(t, a), "-until", "ready", "-start-timeout", "2s")
	p.exit(exitNotReady)
	p.has(p.stderr, "flowctl: component a failed: not ready within its start timeout of 2s")
}

// The first signal stops in order, also where the run stops already.
func TestRun_FirstSignalInAStopKillsNothing(t *testing.T) {
	t.Parallel()
	sink := shell("sink", "trap 'sleep 1.5; echo flushed; exit 0' TERM; echo up; while :; do sleep 0.02; done")
	source := shell("source", "trap 'exit 1' USR1; echo up; while :; do sleep 0.02; done")
	sink.DependsOn = []string{"source"}
	p := launch(t, writePipeline(t, source, sink))
	p.waitReady()
	p.tell("source", syscall.SIGUSR1)
	p.waitErr("msg=stopping component=sink ")
	p.signal(syscall.SIGTERM)
	p.exit(exitFailed)
	p.has(p.stdout, "sink   | flushed\n")
	p.hasNot(p.stderr, "killing what still runs")
}
