//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc/codes"
)

// textOf is what r would write to its state file.
func textOf(t testing.TB, r *registry) []byte {
	t.Helper()
	var text bytes.Buffer
	get(r.save(&text, "", func() {}))(t)
	return text.Bytes()
}

// savedIn is what a state file has, of whatever pipeline.
func savedIn(path string) (services []savedService, err error) {
	st := &store{path: path}
	if text, err := os.ReadFile(path); err == nil {
		var owner struct{ Pipeline string }
		_ = json.Unmarshal(text, &owner)
		st.pipeline = owner.Pipeline
	}
	for in, err := range st.read() {
		if err != nil {
			return nil, err
		}
		services = append(services, in)
	}
	return services, nil
}

// wantSaved checks how many services a state file has, and returns them.
func wantSaved(tb testing.TB, path string, want int) []savedService {
	tb.Helper()
	services := get(savedIn(path))(tb)
	if len(services) != want {
		tb.Fatalf("%d services are saved, want %d: %v", len(services), want, services)
	}
	return services
}

// wantText checks what is in a file.
func wantText(tb testing.TB, path, want string) {
	tb.Helper()
	if got := string(get(os.ReadFile(path))(tb)); got != want {
		tb.Errorf("%s: got %q, want %q", path, got, want)
	}
}

// restored is a registry of a control plane alone that took over what text says.
func restored(t testing.TB, text []byte, now time.Time) *registry {
	t.Helper()
	r := newRegistry(testTTL, testInterval, "127.0.0.1:8080", nil)
	restoreAll(t, r, get(savedIn(writeFile(t, filepath.Join(t.TempDir(), "registry.json"), string(text))))(t), now)
	return r
}

// shown is all that r has to show of its services.
func shown(r *registry, now time.Time) map[string]*operatorv1.Component {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string]*operatorv1.Component)
	for _, s := range r.bySeq {
		c := r.componentLocked(s, now)
		c.Record = 0
		out[c.GetId()] = c
	}
	return out
}

func sameShown(t testing.TB, got, want map[string]*operatorv1.Component) {
	t.Helper()
	wantEqual(t, "services", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	for id, w := range want {
		wantProto(t, id, got[id], w)
	}
}

// A control plane that is started again knows what it knew, in the order in which it
// knew it, and writes what it read.
func TestRestoreIsWhatWasSaved(t *testing.T) {
	t.Parallel()
	r, now := newRegistry(testTTL, testInterval, "", nil), testEpoch
	r.sweep(now)
	at := func(d time.Duration) time.Time {
		now = testEpoch.Add(d)
		pass(r, now)
		return now
	}
	mustRegister(t, r, registration{
		id: "full", componentID: "component", kind: flowctlpb.ServiceType_SERVICE_TYPE_SINK, name: "Name", description: "a\nb\x00\u2028<&>", version: "v1",
		inputEvents: []string{"in"}, outputEvents: []string{"out", "out2"}, endpoint: "http://localhost:1/health", maxInflight: -3,
		metadata: map[string]string{"": "empty", "ünï": "\"quoted\""},
	}, at(0))
	mustRegister(t, r, registration{id: "old"}, at(time.Second))
	mustRegister(t, r, registration{id: "new", componentID: "old"}, at(2*time.Second)) // takes the name of old
	mustRegister(t, r, registration{id: "stale"}, at(3*time.Second))
	for i := range maxNames + 2 {
		mustRegister(t, r, registration{id: "names", componentID: fmt.Sprint("name-", i)}, at(4*time.Second))
	}
	for id, declared := range map[string]flowctlv1.HealthStatus{"component": flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED, "new": flowctlv1.HealthStatus_HEALTH_STATUS_STOPPING, "names": flowctlv1.HealthStatus_HEALTH_STATUS_STARTING} {
		metrics := []metric{{name: "n", number: 1e21}, {name: "inf", text: "+Inf", isText: true}, {name: "text", text: "x", isText: true}, {name: "number", text: "1.50", isText: true}}
		get(r.heartbeat(id, origin{believed: true}, declared, metrics, at(40*time.Second)))(t)
	}
	at(41 * time.Second)
	text := textOf(t, r)
	again := restored(t, text, now)
	checkRegistry(t, again, now)
	sameShown(t, shown(again, now), shown(r, now))
	wantEqual(t, "written again", string(textOf(t, again)), string(text))
	wantEqual(t, "listed", listedIDs(t, again), listedIDs(t, r))
	for id := range r.byID {
		wantCode(t, "heartbeat as "+id, beat(again, id, now), codes.OK)
	}
	wantChanges(t, again, now) // all that heartbeats have healed is held until it is on disk
	again.finishWrite(again.persistence.changes, nil)
	wantChanges(t, again, now, "stale: unhealthy > healthy")
}

// A healthy one has one TTL from the start of the new control plane to be heard of,
// a stale one is stale from the first moment, whatever the time between.
func TestRestoreGivesOneTTL(t *testing.T) {
	t.Parallel()
	r := newRegistry(testTTL, testInterval, "", nil)
	mustRegister(t, r, registration{id: "stale"}, testEpoch)
	late := testEpoch.Add(testPatience - time.Second)
	pass(r, late)
	mustRegister(t, r, registration{id: "healthy"}, late)
	pass(r, testEpoch.Add(testPatience+time.Nanosecond))
	text := textOf(t, r)
	for _, after := range []time.Duration{0, time.Second, time.Hour, 1000 * time.Hour, -time.Hour} { // the last is a clock that was set back
		t.Run(after.String(), func(t *testing.T) {
			now := testEpoch.Add(testPatience + time.Nanosecond).Add(after)
			r := restored(t, text, now)
			r.finishWrite(r.persistence.changes, nil)
			checkRegistry(t, r, now)
			health := func(at time.Duration, want string) {
				t.Helper()
				pass(r, now.Add(at))
				r.finishWrite(r.persistence.changes, nil)
				if got := shown(r, now.Add(at)); fmt.Sprint(got["healthy"].GetHealth(), " ", got["stale"].GetHealth()) != want {
					t.Errorf("after %s: %v, want %s", at, got, want)
				}
			}
			if after < 0 {
				health(testPatience, "healthy healthy") // it was seen but now, by this clock
				health(testPatience+time.Nanosecond, "unhealthy unhealthy")
				return
			}
			health(0, "healthy unhealthy")
			health(testPatience-time.Millisecond, "healthy unhealthy")
			wantChanges(t, r, now.Add(testPatience-time.Millisecond))
			health(testPatience+time.Nanosecond, "unhealthy unhealthy")
			wantChanges(t, r, now.Add(testPatience+time.Nanosecond), "healthy: healthy > unhealthy")
			must(t, beat(r, "stale", now.Add(testPatience+time.Second)))
			health(testPatience+time.Second, "unhealthy healthy")
			checkRegistry(t, r, now.Add(testPatience+time.Second))
		})
	}
}

// While the state is written, the pipeline may change: the race detector looks on.
func TestSavedDuringReload(t *testing.T) {
	t.Parallel()
	r, now := testRegistry(), time.Now()
	for _, m := range testMembers() {
		mustRegister(t, r, registration{id: m.id}, now)
	}
	var saved sync.WaitGroup
	saved.Go(func() {
		for range 200 {
			_, _ = r.save(io.Discard, "test", runtime.Gosched)
		}
	})
	for range 200 {
		r.setMembers(testMembers(), now)
	}
	saved.Wait()
	checkRegistry(t, r, now)
}

// The file in testdata is of the first version that wrote one, and every later one
// is to read it so.
func TestOldStateFileIsRead(t *testing.T) {
	t.Parallel()
	text := get(os.ReadFile("testdata/registry-1.json"))(t)
	now := time.Date(2026, 1, 2, 4, 0, 10, 0, time.UTC)
	r := restored(t, text, now)
	r.finishWrite(r.persistence.changes, nil)
	checkRegistry(t, r, now)
	var got []string
	ids := []string{"stellar-source", "silent", "leaving", "pipeline-1", "bare"}
	for _, l := range ids {
		if err := r.view(l, now, func(s *service, _ time.Time) {
			h, w, metrics := r.healthLocked(s, now), &s.said, make(map[string]string)
			for i := range s.metrics {
				metrics[s.metrics[i].name] = s.metrics[i].String()
			}
			got = append(got, fmt.Sprintf("%s %q %s %q %q %q %q %q %q %d %v %s %s %s %v %s (%s) %d", w.id, s.names, typeName(w.kind), w.name, w.description, w.version, w.inputEvents,
				w.outputEvents, w.endpoint, w.maxInflight, w.metadata, s.registeredAt.Format(time.RFC3339Nano), s.lastSeen.Format(time.RFC3339), statusName(s.declared), metrics, h.condition, r.cause(h, now), len(s.history)))
		}); err != nil {
			t.Error(err)
		}
	}
	want := []string{
		`stellar-source ["old-name" "stellar-source" "ledgers"] source "Ledgers" "reads ledgers" "1.2.3" ["xdr"] ["ledger" "ledger.<raw>"] "http://10.0.0.5:8088/health" 64 map[network:testnet zone:ü] 2026-01-02T03:04:05.000000006Z 2026-01-02T04:00:00Z degraded map[lag:2.5 rate:NaN state:catching up] degraded (it declared itself DEGRADED) 2`,
		`silent ["silent"] processor "" "" "" [] [] "" 0 map[] 2026-01-02T01:00:00Z 2026-01-02T02:00:00Z unknown map[] unhealthy (no heartbeat for 2h0m10s, the TTL is 30s) 2`,
		`leaving ["leaving"] sink "" "" "" [] [] "" 0 map[] 2026-01-02T03:00:00Z 2026-01-02T04:00:05Z stopping map[events:9007199254740991] unhealthy (it declared itself STOPPING) 1`,
		`pipeline-1 ["store-alias" "pipeline-1"] pipeline "" "" "" [] [] "" 0 map[] 2026-01-02T03:00:00Z 2026-01-02T03:59:59Z healthy map[] healthy () 0`,
		`bare ["bare"] unspecified "" "" "" [] [] "" 0 map[] 2026-01-02T03:59:50Z 2026-01-02T03:59:50Z unknown map[] healthy () 1`,
	}
	wantEqual(t, "services", strings.Join(got, "\n"), strings.Join(want, "\n"))
	wantEqual(t, "listed", listedIDs(t, r), ids)
	wantChanges(t, r, now, "bare: unregistered > healthy")
	last := r.byID["stellar-source"].history[1]
	if last.cause != "it declared itself DEGRADED" || last.condition != degraded || !last.at.Equal(time.Date(2026, 1, 2, 3, 30, 0, 0, time.UTC)) {
		t.Errorf("history: %v", last)
	}
	for _, id := range []string{"old-name", "ledgers", "stellar-source", "store-alias"} {
		wantCode(t, "heartbeat as "+id, beat(r, id, now), codes.OK)
	}
}

// A run takes over what its components have gone through, and nothing else: nobody
// counts as registered who has not registered with it.
func TestRunTakesOverHistory(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	once := func(what ...Component) (*process, []*operatorv1.Component) {
		p := launch(t, writePipeline(t, what...), "-db-path", file, "-heartbeat-ttl", "1m")
		p.waitReady()
		c := dialPlane(t, p.endpoint())
		c.mustRegister(t, "v1", registration{id: "elsewhere"})
		return p, c.listed(t)
	}
	p, _ := once(actor("ledgers", role{Dialect: "legacy"}), actor("other", role{Dialect: "v1"}))
	p.hasNot(p.stderr, "not taken over")
	p.stop()

	// other is another's now, and elsewhere was never one of them.
	gated := actor("ledgers", role{Dialect: "v1", Gate: true})
	p = launch(t, writePipeline(t, gated, shell("third", "exec sleep 300")), "-db-path", file)
	p.waitOut("waiting")
	p.has(p.stderr, `msg="services of an earlier run are not taken over" services=1 file=`+file, `msg="registry restored" services=1`)
	c := dialPlane(t, p.endpoint())
	listed := c.listed(t)
	if len(listed) != 2 || listed[0].GetHealth() != "unregistered" || listed[0].GetRegisteredAt() != nil {
		t.Errorf("listed: %v", listed)
	}
	wantCode(t, "heartbeat as one that has not registered", c.heartbeat(t.Context(), "legacy", "elsewhere"), codes.NotFound)
	p.tell("ledgers", syscall.SIGUSR2)
	p.waitReady()
	var history []string
	for _, h := range c.one(t, "ledgers").GetHistory() {
		history = append(history, h.GetHealth())
	}
	// What a run notes when it stops a component is its own affair.
	if n := len(history); n < 3 || history[0] != "healthy" || history[n-2] != "unregistered" || history[n-1] != "healthy" {
		t.Errorf("history over two runs: %q", history)
	}
	p.stop()
}

// Where systemd holds the sockets of a run, what is not of the pipeline is known again, as who had registered
// it. A component never is.
func TestRestore_WhatCalledByAHeldSocket(t *testing.T) {
	t.Parallel()
	mine, another := origin{owner: "user 1000", conn: 1}, origin{owner: "user 1001", conn: 2}
	for held, want := range map[bool]codes.Code{true: codes.OK, false: codes.NotFound} {
		r, now := testRegistry(), testEpoch
		r.keepsOthers = held
		mustRegister(t, r, registration{id: "store"}, now)
		_, _, err := r.register(registration{id: "guest"}, mine, now)
		must(t, err)
		again := testRegistry()
		again.keepsOthers = held
		restoreAll(t, again, get(savedIn(writeFile(t, filepath.Join(t.TempDir(), "state.json"), string(textOf(t, r)))))(t), now)
		_, err = again.heartbeat("guest", mine, 0, nil, now)
		wantCode(t, "a heartbeat of its user", err, want)
		if _, err = again.heartbeat("guest", another, 0, nil, now); held {
			wantCode(t, "a heartbeat of another", err, codes.PermissionDenied)
		}
		wantCode(t, "a heartbeat of a component", beat(again, "store", now), codes.NotFound)
	}
}

// serve starts a control plane alone, with its state in file, and returns it with a
// client.
func serve(t testing.TB, file string, args ...string) (*process, planeClient) {
	t.Helper()
	p := start(t, append([]string{"server", "-control-plane-port", "0", "-db-path", file}, args...))
	return p, dialPlane(t, p.endpoint())
}

// A service that only heartbeats, and never registers again, does not notice that
// the control plane was started again.
func TestRegistryOutlivesServer(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "state.json")
			p, c := serve(t, file, "-heartbeat-ttl", "1m", "-janitor-interval", "50ms")
			reg := registration{kind: flowctlpb.ServiceType_SERVICE_TYPE_SOURCE, endpoint: "http://localhost:1/health", outputEvents: []string{"ledger"}, metadata: map[string]string{"network": "testnet"}}
			for _, dialect := range dialects {
				reg.id, reg.componentID = dialect, dialect+"-alias"
				c.mustRegister(t, dialect, reg)
				if data, err := os.ReadFile(file); err != nil || !bytes.Contains(data, []byte(`"id":"`+dialect+`"`)) {
					t.Errorf("acknowledged and not in the file (%v): %s", err, data)
				}
			}
			c.mustRegister(t, "v1", registration{id: "gone"})
			get(c.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: "gone"}))(t)
			for _, declared := range []flowctlv1.HealthStatus{flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY, flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED} {
				get(c.v1.Heartbeat(t.Context(), &flowctlv1.HeartbeatRequest{ServiceId: "v1-alias", Status: declared, Metrics: map[string]string{"state": "late"}}))(t)
				if data, err := os.ReadFile(file); err != nil || !bytes.Contains(data, []byte(`"declared":"`+statusName(declared)+`"`)) {
					t.Errorf("acknowledged and not in the file (%v): %s", err, data)
				}
			}
			get(c.legacy.Heartbeat(t.Context(), &flowctlpb.ServiceHeartbeat{ServiceId: "legacy-alias", Metrics: map[string]float64{"lag": 2.5}}))(t)
			if sig == syscall.SIGKILL {
				eventually(t, "the metrics in the file", func() bool {
					data, err := os.ReadFile(file)
					return err == nil && bytes.Contains(data, []byte(`"lag":2.5`)) && bytes.Contains(data, []byte(`"state":"late"`))
				})
			}
			before := c.listed(t)
			p.signal(sig)
			<-p.done

			p, c = serve(t, file, "-heartbeat-ttl", "1m")
			p.waitErr(`msg="registry restored" services=2 file=` + file)
			after := c.listed(t)
			if len(after) != 2 || len(before) != 2 {
				t.Fatalf("before %v\nafter %v", before, after)
			}
			for i := range after {
				before[i].Record, after[i].Record = 0, 0
				wantProto(t, after[i].GetId(), after[i], before[i])
			}
			for _, id := range []string{"legacy", "legacy-alias", "v1", "v1-alias"} {
				for _, dialect := range dialects {
					wantCode(t, dialect+" heartbeat as "+id, c.heartbeat(t.Context(), dialect, id), codes.OK)
				}
			}
			wantCode(t, "heartbeat of what was unregistered", c.heartbeat(t.Context(), "v1", "gone"), codes.NotFound)
			if got := c.one(t, "v1"); got.GetHealth() != "degraded" || len(got.GetHistory()) != 3 {
				t.Errorf("after a heartbeat without a status: %v", got)
			}
			p.hasNot(p.stderr, "level=WARN", "level=ERROR", "msg=healthy", "msg=unhealthy")
			p.stop()
		})
	}
}

func TestStateFileOptions(t *testing.T) {
	t.Parallel()
	state, xdg, home := t.TempDir(), t.TempDir(), t.TempDir()
	pipeline := writePipeline(t, shell("a", "true"))
	for _, tt := range []struct {
		name string
		args []string
		env  []string
		want string
	}{
		{"server under systemd", []string{"server"}, []string{"STATE_DIRECTORY=" + state + ":/elsewhere"}, state + "/registry.json"},
		{"server", []string{"server"}, []string{"XDG_STATE_HOME=" + xdg}, xdg + "/flowctl/registry.json"},
		{"server at home", []string{"server"}, []string{"XDG_STATE_HOME=", "HOME=" + home}, home + "/.local/state/flowctl/registry.json"},
		{"server with a relative place", []string{"server"}, []string{"XDG_STATE_HOME=relative", "HOME=" + home + "/2"}, home + "/2/.local/state/flowctl/registry.json"},
		{"server in memory", []string{"server", "-no-persistence"}, []string{"STATE_DIRECTORY=" + state}, ""},
		{"run under systemd", []string{"run", pipeline}, []string{"STATE_DIRECTORY=" + t.TempDir()}, "/test.json"},
		{"run", []string{"run", pipeline}, []string{"XDG_STATE_HOME=" + xdg}, ""},
		{"run in memory", []string{"run", pipeline, "-no-persistence"}, []string{"STATE_DIRECTORY=" + state}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, append(tt.args, "-control-plane-port", "0"), withEnv(tt.env...))
			if p.endpoint(); tt.args[0] == "server" {
				c := dialPlane(t, p.endpoint())
				c.mustRegister(t, "v1", registration{id: "a"})
				p.stop()
			}
			p.exit(exitOK)
			if tt.want == "" {
				p.hasNot(p.stderr, "registry restored")
				return
			}
			p.has(p.stderr, `msg="registry restored"`, tt.want+"\n")
			_, place, _ := strings.Cut(p.stderr.String(), "services=0 file=")
			place, _, _ = strings.Cut(place, "\n")
			info, err := os.Stat(place)
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("%v, %v", info, err)
			}
		})
	}
}

// smallState is a state file with two services.
func smallState(t testing.TB) []byte {
	t.Helper()
	r := newRegistry(testTTL, testInterval, "", nil)
	mustRegister(t, r, registration{id: "a", metadata: map[string]string{"k": "v"}}, testEpoch)
	mustRegister(t, r, registration{id: "b"}, testEpoch)
	return textOf(t, r)
}

// A file that was cut off anywhere is refused, and so is anything else, and nothing
// of it is changed.
func TestDamagedStateFileIsKept(t *testing.T) {
	t.Parallel()
	whole := smallState(t)
	damaged := map[string]string{
		"garbage":                "\x00\x01\xffgarbage",
		"empty":                  "",
		"blank":                  " \n",
		"null":                   "null",
		"a list":                 "[]",
		"a number":               "1",
		"something else":         `{"apiVersion": "flowctl/v1", "kind": "Pipeline"}`,
		"another format":         `{"format": "else/1", "services": []}`,
		"format is a number":     `{"format": 1, "services": []}`,
		"newer":                  `{"format": "flowctl-registry/2", "services": {"a": 1}}`,
		"two files in one":       string(whole) + string(whole),
		"garbage after it":       string(whole) + "x",
		"services of a type":     `{"format": "flowctl-registry/1", "services": {}}`,
		"unknown health":         `{"format": "flowctl-registry/1", "services": [{"id": "a", "health": "fine"}]}`,
		"time that is none":      `{"format": "flowctl-registry/1", "services": [{"id": "a", "last_seen": "yesterday"}]}`,
		"a year that JSON lacks": `{"format": "flowctl-registry/1", "services": [{"id": "a", "registered_at": "9999-12-31T23:59:59-23:59"}]}`,
		"no UTF-8":               "{\"format\": \"flowctl-registry/1\", \"services\": [{\"id\": \"a\xff\"}]}",
		"blocks of zeros":        string(whole[:100]) + strings.Repeat("\x00", len(whole)-100),
		"as after a power cut":   strings.Repeat("\x00", len(whole)),
		"cut off in the middle":  string(whole[:len(whole)/2]),
		"cut off by one bracket": string(whole[:len(whole)-2]),
	}
	for n := range len(whole) - 1 { // without the last newline it is whole
		damaged[fmt.Sprint("first ", n, " bytes")] = string(whole[:n])
	}
	dir := t.TempDir()
	for name, text := range damaged {
		file := writeFile(t, filepath.Join(dir, "state.json"), text)
		services, err := savedIn(file)
		if err == nil {
			t.Errorf("%s: read as %v", name, services)
		} else if !strings.Contains(err.Error(), file) {
			t.Errorf("%s: the error does not name the file: %v", name, err)
		}
		wantText(t, file, text)
	}
	for _, name := range []string{"garbage", "empty", "something else", "newer", "cut off in the middle"} {
		for _, command := range []string{"server", "run"} {
			t.Run(name+" "+command, func(t *testing.T) {
				t.Parallel()
				file := writeFile(t, filepath.Join(t.TempDir(), "state.json"), damaged[name])
				args := []string{"server", "-control-plane-port", "0", "-db-path", file}
				if command == "run" {
					args = append([]string{"run", writePipeline(t, shell("a", "echo it runs"))}, args[1:]...)
				}
				p := start(t, args)
				p.exit(exitPlane)
				p.has(p.stderr, "flowctl: ", file)
				p.hasNot(p.stdout, "it runs")
				wantText(t, file, damaged[name])
			})
		}
	}
}

func TestStateFileThatCannotBeRead(t *testing.T) {
	t.Parallel()
	dir := publicDir(t)
	must(t, os.Chmod(dir, 0o777))
	secret := writeFile(t, filepath.Join(dir, "secret.json"), string(smallState(t)))
	folder := filepath.Join(dir, "folder")
	must(t, os.Mkdir(folder, 0o755))
	loop := filepath.Join(dir, "loop")
	must(t, os.Symlink(loop, loop))
	for _, file := range []string{secret, folder, loop, filepath.Join(dir, "missing", "state.json")} {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			var options []option
			if file == secret {
				if os.Getuid() != 0 {
					t.Skip("only root can be another user")
				}
				options = append(options, asNobody(65534))
			}
			p := start(t, []string{"server", "-control-plane-port", "0", "-db-path", file}, options...)
			p.exit(exitPlane)
			p.has(p.stderr, "flowctl: ", file)
		})
	}
}

// One file belongs to one process, by whatever name it is called.
func TestStateFileIsOfOneProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, link := filepath.Join(dir, "state.json"), filepath.Join(dir, "link")
	must(t, os.Symlink("state.json", link))
	first, c := serve(t, link) // a link to what is not there yet
	c.mustRegister(t, "v1", registration{id: "a"})
	for _, name := range []string{file, link} {
		second := start(t, []string{"server", "-control-plane-port", "0", "-db-path", name})
		second.exit(exitPlane)
		second.has(second.stderr, file, "process "+strconv.Itoa(first.cmd.Process.Pid)+":")
	}
	first.signal(syscall.SIGKILL)
	<-first.done
	writeFile(t, file+".tmp", "left by a crash")
	p, c := serve(t, link)
	if len(c.listed(t)) != 1 {
		t.Errorf("the service is gone\n%s", p)
	}
	c.mustRegister(t, "v1", registration{id: "b"})
	p.stop()
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link: %v, %v", info, err)
	}
	wantSaved(t, file, 2)
	if _, err := os.Lstat(file + ".tmp"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
}

// A lock that somebody removes, as what cleans temporary folders may, does not let two
// control planes write one file: the one that finds it so says that it is not durable.
func TestStateFileWhoseLockIsRemoved(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	first, c := serve(t, file, "-janitor-interval", "100ms")
	c.mustRegister(t, "v1", registration{id: "a"})
	first.signal(syscall.SIGSTOP) // else it may lock the file again at once
	must(t, os.Remove(file+".lock"))
	second, other := serve(t, file)
	other.mustRegister(t, "v1", registration{id: "b"})
	first.signal(syscall.SIGCONT)
	c.mustRegister(t, "v1", registration{id: "c"})
	c.awaitDurable(t, first, false)
	second.signal(syscall.SIGKILL)
	<-second.done
	eventually(t, "that the lock can be had again is not enough", func() bool {
		_, table, _ := call(t, "list", "-e", c.conn.Target())
		return strings.Contains(table, "written by another process")
	})
	first.stop()
	if services := wantSaved(t, file, 2); services[1].ID != "b" {
		t.Errorf("saved: %v", services)
	}
}

// What the temporary file's or the lock's name leads to is another's.
func TestStateFileBesideLinks(t *testing.T) {
	t.Parallel()
	for name, link := range map[string]func(from, to string) error{"symbolic": os.Symlink, "hard": os.Link} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file, victim := filepath.Join(dir, "state.json"), writeFile(t, filepath.Join(dir, "victim"), "precious")
			must(t, link(victim, file+".tmp"))
			p, c := serve(t, file)
			c.mustRegister(t, "v1", registration{id: "a"})
			p.stop()
			must(t, errors.Join(os.Remove(file+".lock"), link(victim, file+".lock")))
			p, c = serve(t, file)
			c.awaitDurable(t, p, false)
			p.has(p.stderr, file+".lock must be a plain file of its own")
			p.stop()
			wantText(t, victim, "precious")
		})
	}
}

// A state file that does not say that it is of a pipeline, as one of the first version, is that
// of a control plane alone. A run leaves it as it is, and that of another pipeline too.
func TestStateFile_OfAnotherIsKept(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, text, owner string }{
		{"of a control plane", string(smallState(t)), "a control plane alone"},
		{"of the first version", string(get(os.ReadFile("testdata/registry-1.json"))(t)), "a control plane alone"},
		{"null", `{"format": "flowctl-registry/1", "pipeline": null, "services": []}`, "a control plane alone"},
		{"after the services", `{"format": "flowctl-registry/1", "services": [], "pipeline": "another"}`, `pipeline "another"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			file := writeFile(t, filepath.Join(t.TempDir(), "state.json"), tt.text)
			p := launch(t, writePipeline(t, shell("a", "echo it runs")), "-db-path", file)
			p.exit(exitPlane)
			p.has(p.stderr, file+" is that of "+tt.owner+" and kept as it is")
			wantText(t, file, tt.text)
		})
	}
}

// A restored service is judged by how long ago it was heard of, on the monotonic clock: that
// the other clock is set back then does not make it live.
func TestRestore_AgeIsOfTheMonotonicClock(t *testing.T) {
	t.Parallel()
	now := time.Now()
	r := newRegistry(testTTL, testInterval, "", nil)
	seen := now.Add(-time.Hour).Round(0) // as a state file has it, without that clock
	restoreAll(t, r, []savedService{{ID: "x", Registered: seen, LastSeen: seen, Health: "unhealthy"}}, now)
	_ = r.view("x", now, func(s *service, _ time.Time) {
		if !strings.Contains(s.lastSeen.String(), " m=") || now.Sub(s.lastSeen).Round(time.Second) != time.Hour {
			t.Errorf("last seen at %v, which was an hour ago", s.lastSeen)
		}
	})
	if c, _, _ := r.condition("x", now); c != unhealthy {
		t.Errorf("it is %v", c)
	}
}

// Where the usual folder cannot be made or entered, a control plane serves and says so.
func TestServerWithoutAFolder(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	for name, prepare := range map[string]func(home string) error{
		"to be made":    func(home string) error { return os.Chmod(home, 0o755) },
		"to be entered": func(home string) error { return os.Chmod(home, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			home := publicDir(t)
			must(t, prepare(home))
			p := start(t, []string{"server", "-control-plane-port", "0", "-janitor-interval", "100ms"}, asNobody(65534), withEnv("XDG_STATE_HOME="+home))
			c := dialPlane(t, p.endpoint())
			c.mustRegister(t, "v1", registration{id: "a"})
			c.awaitDurable(t, p, false)
			p.has(p.stderr, "no place for the registry's state")
			must(t, os.Chmod(home, 0o777))
			c.awaitDurable(t, p, true)
			p.stop()
			wantSaved(t, filepath.Join(home, "flowctl", "registry.json"), 1)
		})
	}
}

// What has nothing to say is not written again and again.
func TestIdleServerWritesNothing(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	p, c := serve(t, file, "-janitor-interval", "50ms", "-heartbeat-ttl", "1m")
	c.mustRegister(t, "v1", registration{id: "a"})
	last := func() os.FileInfo { return get(os.Stat(file))(t) }
	var settled os.FileInfo
	eventually(t, "the last write", func() bool {
		before := last()
		time.Sleep(200 * time.Millisecond) // four intervals
		settled = last()
		return os.SameFile(before, settled)
	})
	must(t, c.heartbeat(t.Context(), "v1", "a"))
	eventually(t, "a heartbeat on disk", func() bool { return !os.SameFile(settled, last()) })
	p.stop()
}

// To write services that are large holds nobody up, nor does it take a multiple of their size
// in the file.
func TestPersist_LargeServices(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state.json")
	p, endpoint := startAlone(t, []string{"-db-path", file, "-janitor-interval", "200ms"}, withBinary(plainFlowctl()))
	before := memory(t, p.cmd.Process.Pid, "VmRSS")
	registerLarge(t, endpoint, 1000, "x")
	check := neighbour(t, endpoint)
	written := func() os.FileInfo { return get(os.Stat(file))(t) }
	for range 3 {
		before := written().ModTime()
		eventually(t, "another write", func() bool { return written().ModTime().After(before) })
	}
	check()
	memoryGrew(t, p, before, 2*4*mib(int(written().Size())))
	p.stop()
}

// gone is the health, in a test's list, of what is not registered.
const gone = "gone"
