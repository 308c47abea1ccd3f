//go:build linux

package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
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

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// answering serves HTTP and returns its address.
func answering(t *testing.T, handler http.HandlerFunc) string {
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// httpStatus answers with an HTTP status, and with headers: names and values by turns.
func httpStatus(code int, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
	}
}

// hang does not answer.
func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// silent is the address of a listener whose connections nobody answers.
func silent(t *testing.T) string { return listen(t, "127.0.0.1:0").Addr().String() }

// saying answers each connection with the bytes of answer, and closes it.
func saying(t *testing.T, answer string) string {
	lis := listen(t, "127.0.0.1:0")
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1024))
			_, _ = conn.Write([]byte(answer))
			conn.Close()
		}
	}()
	return lis.Addr().String()
}

// grpcHealth serves gRPC, with grpc.health.v1 or without.
func grpcHealth(t *testing.T, with bool) string {
	lis := listen(t, "127.0.0.1:0")
	server := grpc.NewServer()
	if with {
		state := health.NewServer()
		state.SetServingStatus("down", healthpb.HealthCheckResponse_NOT_SERVING)
		healthpb.RegisterHealthServer(server, state)
	}
	go server.Serve(lis)
	t.Cleanup(server.Stop)
	return lis.Addr().String()
}

// closedPort is an address where nobody listens.
func closedPort(t *testing.T) string { return "127.0.0.1:" + freePort(t) }

const noAnswer = "no answer within 300ms"

// checkAnswers runs a component that is ready only by its check. why is part of the reason why
// it does not get ready, "" where it does.
func checkAnswers(t *testing.T, check, why string) {
	t.Helper()
	c := shell("a", "exec sleep 300")
	c.HealthCheck, c.HealthTimeout, c.HealthInterval = check, Duration(time.Second), Duration(20*time.Millisecond)
	if why == noAnswer {
		c.HealthTimeout = Duration(300 * time.Millisecond)
	}
	if why == "" {
		p := launch(t, writePipeline(t, c))
		p.waitReady()
		p.stop()
		return
	}
	p := launch(t, writePipeline(t, c), "-start-timeout", "2s")
	p.exit(exitNotReady)
	p.hasNot(p.stderr, "msg=ready")
	p.has(p.stderr, "flowctl: component a failed: not ready within its start timeout of 2s: health_check ", why)
}

// The component is ready only by its check: of each kind, with each kind of answer.
func TestHealthCheck_PassesOrSaysWhyNot(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		check func(t *testing.T) string
		why   string // it does not pass; "" for a pass
	}{
		{"http 204", func(t *testing.T) string { return "http://" + answering(t, httpStatus(204)) + "/x?y=z" }, ""},
		{"http redirect", func(t *testing.T) string {
			return "http://" + answering(t, httpStatus(302, "Location", "http://"+closedPort(t)))
		}, ""},
		{"http 404", func(t *testing.T) string { return "http://" + answering(t, httpStatus(404)) }, "HTTP status 404 Not Found"},
		{"http hangs", func(t *testing.T) string { return "http://" + answering(t, hang) }, noAnswer},
		{"http refused", func(t *testing.T) string { return "http://" + closedPort(t) }, "connect: connection refused"},
		{"http hostile", func(t *testing.T) string { return "http://" + saying(t, "HTTP/1.1 500 \xff\x1b[2J\r\n\r\n") }, "HTTP status 500 \uFFFD\uFFFD[2J"},
		{"http endless header", func(t *testing.T) string {
			return "http://" + saying(t, "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", 1<<20))
		}, "server response headers exceeded 65536 bytes"},
		{"https self-signed", func(t *testing.T) string {
			server := httptest.NewTLSServer(httpStatus(200))
			t.Cleanup(server.Close)
			return server.URL
		}, ""},
		{"https of http", func(t *testing.T) string { return "https://" + answering(t, httpStatus(200)) }, "http: server gave HTTP response to HTTPS client"},
		{"https hangs", func(t *testing.T) string { return "https://" + silent(t) }, noAnswer},
		{"tcp", func(t *testing.T) string { return "tcp://" + silent(t) }, ""},
		{"tcp IPv6", func(t *testing.T) string {
			lis, err := net.Listen("tcp", "[::1]:0")
			if err != nil {
				t.Skip(err)
			}
			t.Cleanup(func() { lis.Close() })
			return "tcp://" + lis.Addr().String()
		}, ""},
		{"tcp refused", func(t *testing.T) string { return "tcp://" + closedPort(t) }, "connect: connection refused"},
		{"grpc", func(t *testing.T) string { return "grpc://" + grpcHealth(t, true) }, ""},
		{"grpc not serving", func(t *testing.T) string { return "grpc://" + grpcHealth(t, true) + "/down" }, "its status is NOT_SERVING"},
		{"grpc unknown service", func(t *testing.T) string { return "grpc://" + grpcHealth(t, true) + "/x.Y" }, "NotFound: unknown service"},
		{"grpc without health", func(t *testing.T) string { return "grpc://" + grpcHealth(t, false) }, "Unimplemented: unknown service grpc.health.v1.Health"},
		{"grpc hangs", func(t *testing.T) string { return "grpc://" + silent(t) }, noAnswer},
		{"grpc refused", func(t *testing.T) string { return "grpc://" + closedPort(t) }, "connect: connection refused"},
		{"exec", func(*testing.T) string { return "exec:true" }, ""},
		{"exec quotes", func(*testing.T) string {
			return `exec:sh -c 'test "$1-$2" = "a  b-"' "" "a  b" ''`
		}, ""},
		{"exec fails", func(*testing.T) string {
			return `exec:sh -c 'echo starting; echo "no such \"table\"" >&2; exit 3'`
		}, `exit status 3: no such "table"`},
		{"exec fails in silence", func(*testing.T) string { return "exec:false" }, "exit status 1 "},
		{"exec dies", func(*testing.T) string { return "exec:sh -c 'kill -9 $$$$'" }, "killed by signal 9 (killed)"},
		{"exec hangs", func(*testing.T) string { return "exec:sh -c 'trap \"\" TERM; sleep 300'" }, noAnswer},
		{"exec leaves a daemon with its output", func(*testing.T) string {
			return `exec:sh -c 'rm -f up; setsid sh -c "echo >up; exec sleep 300" & while [ ! -e up ]; do sleep 0.01; done'`
		}, ""},
		{"exec unknown", func(*testing.T) string { return "exec:no-such-program" }, `cannot run "no-such-program": executable file not found in $PATH`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkAnswers(t, tt.check(t), tt.why)
		})
	}
}

// An exec: check finds its program as a component does, by a path from the file's folder or in
// PATH, and runs it in the component's folder and environment.
func TestHealthCheck_RunsItsProgramAsTheComponentDoes(t *testing.T) {
	t.Parallel()
	c := shell("a", "exec sleep 300")
	c.WorkingDir, c.Env = "else where", map[string]string{"SECRET": "42"}
	c.HealthCheck = `exec:./checks/"is up.sh" $HEALTH_PORT`
	file := writePipeline(t, c)
	folder := filepath.Dir(file)
	for _, dir := range []string{"checks", "else where"} {
		if err := os.Mkdir(filepath.Join(folder, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if code, out, stderr := call(t, "check", "-strict", file); code != exitUsage ||
		!strings.Contains(stderr, `warning: component a: health_check: cannot run "`+folder+`/checks/is up.sh": no such file or directory`) {
		t.Errorf("check: exit %d\n%s%s", code, out, stderr)
	}
	writeProgram(t, filepath.Join(folder, "checks", "is up.sh"), "#!/bin/sh\n"+
		`test "$SECRET" = 42 && test "$1" = "$HEALTH_PORT" && test "$1" -gt 0 && test "$PWD" = "`+folder+`/else where"`+"\n")
	if code, out, stderr := call(t, "check", "-strict", file); code != exitOK {
		t.Errorf("check: exit %d\n%s%s", code, out, stderr)
	}
	p := launch(t, file)
	p.waitReady()
	p.stop()
}

// A check can name the port that flowctl has chosen. Its failure shows the port, and no password.
func TestHealthCheck_KnowsTheHealthPort(t *testing.T) {
	t.Parallel()
	for kind, check := range map[string]string{
		"http": "http://me:secret@127.0.0.1:$HEALTH_PORT/", "tcp": "tcp://localhost:$HEALTH_PORT", "grpc": "grpc://127.0.0.1:$${HEALTH_PORT}/data",
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			c := actor("a", role{Check: kind, OnUSR1: "fail", Environ: true})
			c.Register, c.HealthCheck, c.HealthInterval, c.HealthRetries = new(false), check, Duration(50*time.Millisecond), 1
			p := launch(t, writePipeline(t, c))
			p.waitReady()
			p.waitOut(`env "HEALTH_PORT=`)
			port := regexp.MustCompile(`env "HEALTH_PORT=(\d+)"`).FindStringSubmatch(p.stdout.String())[1]
			p.tell("a", syscall.SIGUSR1)
			p.waitErr("msg=unhealthy id=a ")
			p.has(p.stderr, "health_check "+kind+"://", ":"+port, " failed: ")
			p.hasNot(p.stderr, "secret")
			p.stop()
		})
	}
}

// There is a warning for a check that passes by another program, and none by the component's.
func TestHealthCheck_WarnsOfAnotherProgram(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	owner := actor("owner", role{Check: "tcp"})
	owner.Register, owner.HealthCheck, owner.Env["HEALTH_PORT"] = new(false), "tcp://127.0.0.1:$HEALTH_PORT", port
	other := launch(t, writePipeline(t, owner))
	other.waitReady()
	c := shell("a", "exec sleep 300")
	c.HealthCheck = "tcp://localhost:" + port
	p := launch(t, writePipeline(t, c))
	p.waitReady()
	p.has(p.stderr, fmt.Sprintf(`level=WARN msg="health_check passes, but what listens there is not of this component" component=a addr=localhost:%s pid=%d name=`, port, other.pid("owner")))
	p.stop()
	other.stop()
	other.hasNot(other.stderr, "level=WARN")
}

// A pass between failures starts the count of failures in a row again.
func TestHealthCheck_FailuresInARowMakeUnhealthy(t *testing.T) {
	t.Parallel()
	var asked, failing atomic.Int64 // failing: so many to come
	server := answering(t, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		if failing.Add(-1) >= 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	c := shell("a", "exec sleep 300")
	c.HealthCheck, c.HealthInterval, c.HealthRetries = "http://"+server, Duration(30*time.Millisecond), 4
	p := launch(t, writePipeline(t, c))
	p.waitReady()
	for range 3 {
		failing.Store(3)
		before := asked.Load()
		eventually(t, "five more checks", func() bool { return asked.Load() >= before+5 })
	}
	p.hasNot(p.stderr, "msg=unhealthy")
	failing.Store(4)
	p.waitErr(`msg=unhealthy id=a component=a cause="health_check http://` + server + ` failed 4 times running: HTTP status 503 Service Unavailable"`)
	p.waitErr("msg=healthy id=a component=a")
	p.stop()
}

// A component with heartbeats and a check needs both to be well: neither heals the other.
func TestHealthCheck_AndHeartbeatsAreBothNeeded(t *testing.T) {
	t.Parallel()
	var fails atomic.Bool
	server := answering(t, func(w http.ResponseWriter, _ *http.Request) {
		if fails.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	c := actor("a", role{Dialect: "v1", OnUSR1: "unhealthy"})
	c.HealthCheck, c.HealthInterval, c.HealthRetries = "http://"+server, Duration(30*time.Millisecond), 2
	p := launch(t, writePipeline(t, c), "-heartbeat-ttl", "30s", "-unhealthy-timeout", "1s")
	p.waitReady()
	p.tell("a", syscall.SIGUSR1)
	p.waitErr(`msg=unhealthy id=a component=a cause="it declared itself UNHEALTHY"`)
	p.tell("a", syscall.SIGUSR2)
	p.waitErr("msg=healthy id=a component=a")
	fails.Store(true)
	p.waitErr(`msg=unhealthy id=a component=a cause="health_check http://`)
	p.tell("a", syscall.SIGUSR2) // a heartbeat, by which it says that it is healthy
	p.wait(p.stdout, "resumed", 2)
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component a failed: unhealthy for 1s (-unhealthy-timeout): health_check http://"+server+" failed ", " times running: HTTP status 503")
	if n := strings.Count(p.stderr.String(), "msg=healthy id=a"); n != 1 {
		t.Errorf("healed %d times, want 1\n%s", n, p)
	}
}

// close ends a check that waits for an answer, and one whose result nobody takes.
func TestChecks_CloseEndsAll(t *testing.T) {
	t.Parallel()
	s := newChecks(func(int) (string, bool, error) { return "", false, nil }, slog.New(slog.DiscardHandler))
	asked := make(chan bool, 1)
	hanging := answering(t, func(_ http.ResponseWriter, r *http.Request) {
		asked <- true
		<-r.Context().Done()
	})
	s.start(&Component{ID: "waits", HealthCheck: "http://" + hanging, HealthTimeout: Duration(time.Hour)}, new(child))
	passes := new(child)
	s.start(&Component{ID: "passes", HealthCheck: "tcp://" + silent(t)}, passes)
	<-asked
	if got := <-s.results; got.child != passes || got.failing != "" {
		t.Errorf("got %+v, want a pass", got)
	}
	closed := make(chan bool)
	go func() {
		s.close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Fatal("close does not return")
	}
}

// Checks of a new process replace those of the former one.
func TestChecks_StartReplacesTheFormer(t *testing.T) {
	t.Parallel()
	s := newChecks(func(int) (string, bool, error) { return "", false, nil }, slog.New(slog.DiscardHandler))
	defer s.close()
	c := &Component{ID: "a", HealthCheck: "tcp://" + silent(t), HealthInterval: Duration(time.Millisecond)}
	former, next := new(child), new(child)
	s.start(c, former)
	if got := <-s.results; got.child != former {
		t.Fatal("the first result is of another process")
	}
	s.start(c, next)
	for got := range s.results { // one of the former may be on its way
		if got.child == next {
			break
		}
	}
	for range 10 {
		if got := <-s.results; got.child != next {
			t.Error("a result of the former process")
		}
	}
}

// databaseProgram finds a program in PATH, or where Debian keeps PostgreSQL's.
func databaseProgram(t *testing.T, name string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name); len(found) > 0 {
		return found[len(found)-1]
	}
	if os.Getenv("FLOWCTL_DATABASES") == "must" {
		t.Fatalf("no %s here, and FLOWCTL_DATABASES=must", name)
	}
	t.Skipf("no %s here (Debian: postgresql, redis-server)", name)
	return ""
}

// asPostgres is what a command begins with to run as the user postgres: PostgreSQL
// does not run as root.
func asPostgres(t *testing.T) []string {
	if os.Getuid() != 0 {
		return nil
	}
	return []string{databaseProgram(t, "setpriv"), "--reuid=postgres", "--regid=postgres", "--clear-groups"}
}

// newCluster makes an empty database and returns the component that serves it.
func newCluster(t *testing.T, port string) Component {
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	initdb := append(asPostgres(t), databaseProgram(t, "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
	if os.Getuid() == 0 {
		for folder, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o711, dir: 0o777} {
			if err := os.Chmod(folder, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	cmd := exec.Command(initdb[0], initdb[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	return Component{
		ID: "db", Register: new(false), WorkingDir: dir, RestartPolicy: restartOnFailure,
		Command: append(asPostgres(t), databaseProgram(t, "postgres"), "-D", data, "-p", port, "-k", dir, "-h", "127.0.0.1"),
		Env:     map[string]string{"PGHOST": "127.0.0.1", "PGPORT": port},
		// PGPORT is for pg_isready. SIGINT is PostgreSQL's fast shutdown: it waits for no client.
		HealthCheck: "exec:" + databaseProgram(t, "pg_isready") + " -U postgres", HealthInterval: Duration(50 * time.Millisecond), HealthRetries: 2,
		StopSignal: "SIGINT",
	}
}

// Databases become ready by their checks, restart with their data, and shut down in order.
func TestHealthCheck_Databases(t *testing.T) {
	t.Parallel()
	redis, cli, psql := databaseProgram(t, "redis-server"), databaseProgram(t, "redis-cli"), databaseProgram(t, "psql")
	dbPort, cachePort, queuePort := freePort(t), freePort(t), freePort(t)
	db := newCluster(t, dbPort)
	newRedis := func(id, port, check string) Component {
		return Component{
			ID: id, Register: new(false), WorkingDir: t.TempDir(), RestartPolicy: restartOnFailure,
			Command:     []string{redis, "--bind", "127.0.0.1", "--port", port, "--save", "900 1"},
			Env:         map[string]string{"HEALTH_PORT": port},
			HealthCheck: check, HealthInterval: Duration(50 * time.Millisecond), HealthRetries: 2,
		}
	}
	cache := newRedis("cache", cachePort, "exec:"+cli+" -p $HEALTH_PORT ping")
	cache.HealthTimeout = Duration(time.Second)
	queue := newRedis("queue", queuePort, "tcp://127.0.0.1:$HEALTH_PORT")
	store := shell("store", fmt.Sprintf(`set -e
psql() { %s -h 127.0.0.1 -p %s -U postgres -v ON_ERROR_STOP=1 -qtA "$@"; }
psql -c "create table seen (what text)"
psql -c "insert into seen values ('a row')"
%s -p %s set key "a value"
%s -p %s rpush list "an entry"
echo stored
trap 'psql -c "select what from seen" && %s -p %s get key; exit 0' TERM
while :; do sleep 0.05; done`, psql, dbPort, cli, cachePort, cli, queuePort, cli, cachePort))
	store.Inputs, store.DependsOn = []string{"feed"}, []string{"db", "cache", "queue"}
	p := launch(t, writePipeline(t, shell("feed", "exec sleep 300"), store, db, cache, queue))
	p.waitOut(" store | stored\n")
	p.waitReady()
	started := strings.Index(p.stderr.String(), "msg=started component=store ")
	for _, id := range store.DependsOn {
		if ready := strings.Index(p.stderr.String(), "msg=ready component="+id+" "); ready < 0 || ready > started {
			t.Errorf("store was started before %s was ready\n%s", id, p)
		}
	}

	// A database that is killed comes back with its data, to who uses it all the while.
	for _, id := range []string{"db", "queue"} {
		p.tell(id, syscall.SIGKILL)
		p.waitErr("msg=restarting component=" + id + " ")
		p.wait(p.stderr, "msg=ready component="+id+" ", 2)
	}
	// One that does not answer any more, its processes stopped, is unhealthy until it does.
	p.tell("cache", syscall.SIGSTOP)
	p.waitErr(`msg=unhealthy id=cache component=cache cause="health_check exec:` + cli + ` *** failed 2 times running: no answer within 1s"`)
	p.tell("cache", syscall.SIGCONT)
	p.waitErr("msg=healthy id=cache component=cache")

	p.stop()
	p.has(p.stdout, " store | a row\n", " store | a value\n")
	// Nobody was killed in the end: each has shut down, after who needs it, as its own log says.
	log := p.lines("db")
	for _, want := range []string{"database system was not properly shut down", "received fast shutdown request", "database system is shut down"} {
		if !slices.ContainsFunc(log, func(line string) bool { return strings.Contains(line, want) }) {
			t.Errorf("PostgreSQL does not say %q\n%s", want, p)
		}
	}
	for _, id := range []string{"cache", "queue"} {
		if log := strings.Join(p.lines(id), "\n"); !strings.Contains(log, "bye bye") {
			t.Errorf("Redis %s was not shut down in order\n%s", id, p)
		}
	}
	p.has(p.stderr, "msg=ended component=store ", "msg=stopping component=db ", "signal=interrupt", "all components have ended")
	p.hasNot(p.stderr, "sending SIGKILL")
	// What PostgreSQL starts leaves the process group, and outlives the SIGKILL above by a moment; not a stop.
	if _, end, _ := strings.Cut(p.stderr.String(), "stop requested"); strings.Contains(end, "left its process group") {
		t.Errorf("something has outlived a stop\n%s", p)
	}
}

// A check that goes on failing is one cause, and not another at each failure.
func TestHealthCheck_CauseOfFailuresStaysTheSame(t *testing.T) {
	t.Parallel()
	c := &Component{ID: "a", HealthCheck: "tcp://localhost:1", HealthRetries: 2}
	at, later := describeFailing(c, &child{}, 2), describeFailing(c, &child{}, 9)
	if want := "health_check tcp://localhost:1 failed 2 times running"; at != want || later != want {
		t.Errorf("%q, then %q; want %q both times", at, later, want)
	}
}

func TestShownCheck(t *testing.T) {
	t.Parallel()
	for check, want := range map[string]string{
		"http://127.0.0.1:80/ready":                    "http://127.0.0.1:80/ready",
		"https://me:s3cret@h:1/a%20b?token=s3cret&x=1": "https://me:***@h:1/a%20b?token=***&x=***",
		"http://s3cret@h/?s3cret&k=#s3cret":            "http://***@h/?***&k=***",
		"tcp://h:1":                                    "tcp://h:1",
		"grpc://h:1/svc":                               "grpc://h:1/svc",
		"exec:./check":                                 "exec:./check",
		`exec:curl -H "Authorization: s3cret" h`:       "exec:curl ***",
		"http://h:s3cret/":                             "***",
	} {
		if got := shownCheck(check); got != want {
			t.Errorf("%s: %s, want %s", check, got, want)
		}
	}
}

// A secret of a health_check is in no log, report, table or JSON.
func TestHealthCheck_SecretsAreNotShown(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	web, script, deaf := shell("web", "exec sleep 300"), shell("script", "exec sleep 300"), shell("deaf", "exec sleep 300")
	web.HealthCheck = strings.Replace(server.URL, "://", "://me:s3cret@", 1) + "/ready?token=s3cret"
	script.HealthCheck = "exec:false --token s3cret"
	deaf.HealthCheck, deaf.HealthTimeout = "exec:sleep 300 s3cret", Duration(time.Minute)
	p := start(t, runArgs(writePipeline(t, web, script, deaf), "-start-timeout", "3s", "-log-level", "debug"))
	p.waitErr("msg=listening")
	var shown string
	eventually(t, "each cause", func() bool {
		_, table, _ := call(t, "list", "-e", p.endpoint())
		_, asJSON, _ := call(t, "list", "-json", "-e", p.endpoint())
		shown = table + asJSON
		return strings.Contains(shown, "/ready?token=***") && strings.Contains(shown, "exec:false ***") && strings.Contains(shown, "exec:sleep ***")
	})
	p.exit(exitNotReady)
	p.has(p.stderr, "/ready?token=*** has not passed yet: HTTP status 404")
	for _, text := range []string{shown, p.stderr.String(), p.stdout.String()} {
		if strings.Contains(text, "s3cret") {
			t.Errorf("the secret is shown:\n%s", text)
		}
	}
}
