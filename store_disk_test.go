//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// awaitDurable waits until the plane says that its state is on disk, or not, in each
// way that it has to say so. It serves either way.
func (c planeClient) awaitDurable(t testing.TB, p *process, want bool) {
	t.Helper()
	wantStatus := map[bool]healthpb.HealthCheckResponse_ServingStatus{true: healthpb.HealthCheckResponse_SERVING, false: healthpb.HealthCheckResponse_NOT_SERVING}[want]
	check := func(service string) healthpb.HealthCheckResponse_ServingStatus {
		out := get(healthpb.NewHealthClient(c.conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: service}))(t)
		return out.GetStatus()
	}
	eventually(t, fmt.Sprintf("%s is %s\n%s", durableService, wantStatus, p), func() bool { return check(durableService) == wantStatus })
	wantEqual(t, "the plane", check(""), healthpb.HealthCheckResponse_SERVING)
	_, table, _ := call(t, "list", "-e", c.conn.Target())
	_, asJSON, _ := call(t, "list", "-e", c.conn.Target(), "-json")
	if strings.Contains(table, "would not survive a restart: ") == want || strings.Contains(asJSON, `"not_durable": "`) == want {
		t.Errorf("durable %t, list:\n%s%s", want, table, asJSON)
	}
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	disk := smallDisk(t, 0, "64k")
	file := filepath.Join(disk, "state.json")
	p, c := serve(t, file, "-heartbeat-ttl", "1m", "-janitor-interval", "100ms")
	c.mustRegister(t, "v1", registration{id: "before"})
	c.awaitDurable(t, p, true)
	whole := get(os.ReadFile(file))(t)
	other := get(os.Create(filepath.Join(disk, "other")))(t)
	if n, err := io.Copy(other, strings.NewReader(strings.Repeat("x", 64<<10))); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk took %d bytes more: %v", n, err)
	}
	other.Close()
	for i := range 5 {
		c.mustRegister(t, "v1", registration{id: fmt.Sprint("meanwhile-", i)})
	}
	c.awaitDurable(t, p, false)
	wantCode(t, "heartbeat", c.heartbeat(t.Context(), "v1", "meanwhile-4"), codes.OK)
	p.waitErr("msg=healthy id=meanwhile-4")
	if got := get(os.ReadFile(file))(t); len(got) < len(whole) {
		t.Errorf("what was on disk is no more: %q", got)
	}
	get(savedIn(file))(t)
	must(t, os.Remove(other.Name()))
	c.awaitDurable(t, p, true)
	p.has(p.stderr, `level=ERROR msg="the registry's state is not durable, flowctl goes on without" err=`, "no space left on device", `level=INFO msg="the registry's state is durable again" file=`+file)
	for _, once := range []string{"not durable", "durable again"} {
		if n := strings.Count(p.stderr.String(), once); n != 1 {
			t.Errorf("%q is told %d times\n%s", once, n, p)
		}
	}
	p.signal(syscall.SIGKILL)
	<-p.done
	wantSaved(t, file, 6)
}

// A folder or a file system where nothing can be written when flowctl starts is no
// reason not to serve, with what can be read there.
func TestReadOnlyDisk(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"folder", "file system"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			if os.Getuid() != 0 {
				t.Skip("only root can be another user, or mount")
			}
			var file string
			var options []option
			var release func() error
			if what == "folder" {
				dir := publicDir(t)
				file = filepath.Join(dir, "state.json")
				release = func() error { return os.Chmod(dir, 0o777) }
				options = []option{asNobody(65534)}
				writeFile(t, file, string(smallState(t)))
				must(t, os.Chmod(file, 0o644))
			} else {
				disk := smallDisk(t, 0, "64k")
				file = writeFile(t, filepath.Join(disk, "state.json"), string(smallState(t)))
				remount := func(flags uintptr) error { return syscall.Mount("", disk, "", syscall.MS_REMOUNT|flags, "") }
				release = func() error { return remount(0) }
				must(t, remount(syscall.MS_RDONLY))
			}
			p := start(t, []string{"server", "-control-plane-port", "0", "-db-path", file, "-janitor-interval", "100ms"}, options...)
			c := dialPlane(t, p.endpoint())
			c.awaitDurable(t, p, false)
			c.mustRegister(t, "legacy", registration{id: "meanwhile"})
			if got := c.listed(t); len(got) != 3 {
				t.Errorf("listed: %v", got)
			}
			must(t, release())
			c.awaitDurable(t, p, true)
			p.stop()
			wantSaved(t, file, 3)
			if n := strings.Count(p.stderr.String(), "not durable"); n != 1 {
				t.Errorf("it is told %d times\n%s", n, p)
			}
		})
	}
}

// A disk that hangs holds registrations up for maxWrite, all together, and then no
// longer, and flowctl's end for no longer than that either.
func TestDiskThatHangs(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	if err := syscall.Mkfifo(file+".tmp", 0o600); err != nil { // to open it waits for a reader
		t.Fatal(err)
	}
	p, c := serve(t, file)
	begun := time.Now()
	for i := range 3 {
		c.mustRegister(t, "v1", registration{id: fmt.Sprint("service-", i)})
	}
	if took := time.Since(begun); took > 2*maxWrite {
		t.Errorf("registered after %s", took)
	}
	c.awaitDurable(t, p, false)
	p.has(p.stderr, "the disk takes nothing for "+maxWrite.String())
	reader := get(os.Open(file + ".tmp"))(t)
	go func() {
		_, _ = io.Copy(io.Discard, reader) // a FIFO cannot be synced: it fails and is removed
		reader.Close()
	}()
	c.mustRegister(t, "v1", registration{id: "late"})
	c.awaitDurable(t, p, true)
	wantSaved(t, file, 4)
	must(t, syscall.Mkfifo(file+".tmp", 0o600))
	p.stop()
}

// A component that does not register is ready when it runs, however slow the disk.
func TestSlowDiskIsNoFailure(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	must(t, syscall.Mkfifo(file+".tmp", 0o600))
	first, second := shell("first", "true"), shell("second", "true")
	second.Inputs = []string{"first"}
	p := launch(t, writePipeline(t, first, second), "-db-path", file)
	p.waitErr(`msg="all components have ended"`)
	p.exit(exitOK)
}

// savedMetric returns a metric of the only service in a state file, nil for none.
func savedMetric(t *testing.T, path, name string) any {
	t.Helper()
	for _, m := range wantSaved(t, path, 1)[0].Metrics {
		if m.name == name {
			return m.number
		}
	}
	return nil
}

// What changes is told when it is on disk, and what the disk does not take is told
// at once. Nobody waits for longer than a write.
func TestChangesWaitForTheDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		st := get(openStore(stateConfig{file: filepath.Join(dir, "state.json")}, "", slog.New(slog.DiscardHandler)))(t)
		defer st.close()
		r := newRegistry(testTTL, testInterval, "", nil)
		restoreAll(t, r, nil, time.Now())
		mustRegister(t, r, registration{id: "a"}, time.Now())
		wantChanges(t, r, time.Now())
		ctx, cancel := context.WithCancel(t.Context())
		var turns []bool
		var keeping sync.WaitGroup
		writer := &persister{registry: r, store: st, told: func(durable bool) { turns = append(turns, durable) }}
		keeping.Go(func() { writer.run(ctx) })
		synctest.Wait()
		wantChanges(t, r, time.Now(), "a: unregistered > healthy")

		// Metrics are written within an interval, and nobody waits for them.
		if change, err := r.heartbeat("a", origin{}, 0, []metric{{name: "lag", number: 7}}, time.Now()); change != 0 || err != nil {
			t.Fatal(change, err)
		}
		synctest.Wait()
		wantEqual(t, "written at once", savedMetric(t, st.path, "lag"), nil)
		time.Sleep(testInterval + 10*batchPause)
		synctest.Wait()
		wantEqual(t, "written within an interval", savedMetric(t, st.path, "lag"), 7.0)

		// The folder is gone.
		must(t, os.RemoveAll(dir))
		change, err := r.heartbeat("a", origin{}, flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY, nil, time.Now())
		if change == 0 || err != nil {
			t.Fatal(change, err)
		}
		if err := r.durable(t.Context(), change); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		wantChanges(t, r, time.Now(), "a: healthy > unhealthy")
		must(t, os.Mkdir(dir, 0o700))
		time.Sleep(testInterval)
		synctest.Wait()
		wantEqual(t, "it was durable", turns, []bool{false, true})
		mustRegister(t, r, registration{id: "b"}, time.Now())
		cancel()
		keeping.Wait()
		wantSaved(t, st.path, 2)
	})
}

// killsVar is how many times TestServerIsKilled kills, 20 without it.
const killsVar = "FLOWCTL_KILLS"

// fate is what a client knows of a service after the server was killed: how it is by
// the last answer, and how it would be by what was not answered any more.
type fate struct{ sure, maybe string }

// killedClient registers services, changes their health and takes them out, until
// its server is no more.
type killedClient struct {
	name  string
	fates map[string]*fate
	acks  map[string]int // by what was acknowledged
}

func (k *killedClient) run(t *testing.T, c planeClient, random *rand.Rand) {
	ctx := t.Context()
	for {
		id := fmt.Sprint(k.name, "-", random.IntN(30))
		f := k.fates[id]
		if f == nil {
			f = &fate{sure: gone}
			k.fates[id] = f
		}
		what, want := "registration", "healthy"
		var err error
		switch n := random.IntN(10); {
		case f.sure == gone || n < 2:
			_, err = c.register(ctx, dialects[n%2], registration{id: id, endpoint: "http://localhost:1/health", metadata: map[string]string{"client": k.name}})
		case n == 2:
			what, want = "removal", gone
			_, err = c.v1.UnregisterComponent(ctx, &flowctlv1.UnregisterRequest{ServiceId: id})
		default:
			what = "change of health"
			declared := flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY
			switch want = []string{"healthy", "degraded", "unhealthy"}[n%3]; want {
			case "degraded":
				declared = flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED
			case "unhealthy":
				declared = flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY
			}
			if want == f.sure {
				what = "heartbeat"
			}
			_, err = c.v1.Heartbeat(ctx, &flowctlv1.HeartbeatRequest{ServiceId: id, Status: declared, Metrics: map[string]string{"n": strconv.Itoa(n)}})
		}
		if err != nil {
			wantCode(t, what+" of "+id, err, codes.Unavailable) // it was killed
			f.maybe = want
			return
		}
		f.sure = want
		k.acks[what]++
	}
}

// Who kills the server at any moment finds that all that it acknowledged is in its
// file, which is whole each time, and that it goes on from there.
func TestServerIsKilled(t *testing.T) {
	t.Parallel()
	kills := 20
	if text := os.Getenv(killsVar); text != "" {
		var err error
		if kills, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	file := filepath.Join(quickDir(t), "state.json")
	binary := plainFlowctl() // it is quicker, and these are many
	var clients []*killedClient
	for i := range 6 {
		clients = append(clients, &killedClient{fmt.Sprint("client-", i), make(map[string]*fate), make(map[string]int)})
	}
	cut, most := 0, 0
	for range kills {
		p := start(t, []string{"server", "-control-plane-port", "0", "-db-path", file, "-heartbeat-ttl", "1h", "-janitor-interval", "20ms"}, withBinary(binary))
		endpoint := p.endpoint()
		var running sync.WaitGroup
		for _, k := range clients {
			c, random := dialPlane(t, endpoint), rand.New(rand.NewPCG(random.Uint64(), 0))
			running.Go(func() { k.run(t, c, random); c.conn.Close() })
		}
		time.Sleep(time.Duration(random.Int64N(int64(100 * time.Millisecond)))) // any moment
		p.signal(syscall.SIGKILL)
		<-p.done
		running.Wait()
		if _, err := os.Lstat(file + ".tmp"); err == nil {
			cut++
		}
		services := get(savedIn(file))(t)
		most = max(most, len(services))
		health := make(map[string]string)
		for _, s := range services {
			health[s.ID] = s.Health
		}
		for _, k := range clients {
			for id, f := range k.fates {
				got := cmp.Or(health[id], gone)
				if got != f.sure && got != f.maybe {
					t.Errorf("%s is %s, it was acknowledged as %s, and after that as %q without an answer", id, got, f.sure, f.maybe)
				}
				*f = fate{sure: got}
				delete(health, id)
			}
		}
		if len(health) > 0 {
			t.Errorf("nobody has registered %v", health)
		}
	}
	acks := make(map[string]int)
	for _, k := range clients {
		for what, n := range k.acks {
			acks[what] += n
		}
	}
	t.Logf("killed %d times, %d times while it wrote; acknowledged and found again: %v; %d services at most", kills, cut, acks, most)
}

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

// smallDisk is a disk of this size and how it is mounted.
func smallDisk(t testing.TB, flags uintptr, size string) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	must(t, os.Mkdir(disk, 0o700))
	if err := syscall.Mount("tmpfs", disk, "tmpfs", flags, "size="+size); err != nil {
		t.Skip("this system does not let us mount a small disk: ", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
	return disk
}
