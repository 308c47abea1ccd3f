//go:build linux

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Programs that know nothing of flowctl: a PostgreSQL and two Redis, as Debian has
// them, and a processor that needs them. FLOWCTL_DATABASES=must fails where they are
// not installed.

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

func TestDatabases(t *testing.T) {
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
	p.waitErr(`msg=unhealthy id=cache component=cache cause="health_check exec:` + cli + ` -p ` + cachePort + ` ping failed 2 times running: no answer within 1s"`)
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
	p.hasNot(p.stderr, "sending SIGKILL", "left its process group")
}
