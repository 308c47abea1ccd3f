//go:build linux

package main

import (
	"crypto/x509"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// elsewhere is a component that something else starts.
func elsewhere(id string, change func(c *Component)) Component {
	c := Component{ID: id, Command: []string{"./never-started"}}
	if change != nil {
		change(&c)
	}
	return c
}

// wantReady checks what grpc.health.v1 tells of the pipeline at endpoint.
func wantReady(t *testing.T, endpoint string, want healthpb.HealthCheckResponse_ServingStatus) {
	t.Helper()
	c := healthpb.NewHealthClient(dialPlane(t, endpoint).conn)
	for service, want := range map[string]healthpb.HealthCheckResponse_ServingStatus{readyService: want, "": healthpb.HealthCheckResponse_SERVING} {
		if got := get(c.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service}))(t).GetStatus(); got != want {
			t.Errorf("health of %q: %s, want %s", service, got, want)
		}
	}
}

// What something else starts is of the pipeline all the same: it has the word of the file, is missed, and is known again
// after a restart of the control plane.
func TestServer_Pipeline(t *testing.T) {
	t.Parallel()
	file := writePipeline(t,
		elsewhere("ledgers", func(c *Component) { c.OutputEventTypes, c.Type = []string{"ledger"}, "stellar@v2" }),
		elsewhere("store", func(c *Component) { c.Inputs, c.Role = []string{"ledgers"}, roleSink }),
		elsewhere("migrate", func(c *Component) { c.Oneshot = true }))
	args := []string{"server", file, "-control-plane-port", freePort(t), "-db-path", filepath.Join(t.TempDir(), "state")}
	p := start(t, args)
	p.wantAsk([]string{"list"}, exitFailed, `test: 0 of 2 ready, waiting for ledgers, store .*
ID +TYPE +HEALTH +LAST SEEN +ENDPOINT +METRICS
ledgers +source +unregistered +- +- +-
store +sink +unregistered +- +- +-
ledgers: not registered
store: not registered
`, "")
	wantReady(t, p.endpoint(), healthpb.HealthCheckResponse_NOT_SERVING)
	c := dialPlane(t, p.endpoint())
	c.mustRegister(t, "v1", registration{id: "ledgers", endpoint: "10.0.0.1:9000"})
	if ack := c.mustRegister(t, "legacy", registration{id: "my-store", componentID: "store"}); ack.info["ledgers"] != "10.0.0.1:9000" {
		t.Errorf("store is told %v", ack.info)
	}
	c.mustRegister(t, "v1", registration{id: "guest"})
	p.startWait().ends(exitOK, "ready: ledgers, store\n")
	wantReady(t, p.endpoint(), healthpb.HealthCheckResponse_SERVING)
	p.signal(syscall.SIGKILL)
	<-p.done

	p = start(t, args)
	p.startWait().ends(exitOK, "ready: ledgers, store\n")
	wantReady(t, p.endpoint(), healthpb.HealthCheckResponse_SERVING)
	c = dialPlane(t, p.endpoint())
	must(t, c.heartbeat(t.Context(), "legacy", "my-store"))
	must(t, c.heartbeat(t.Context(), "v1", "ledgers"))
	byID, ids := listed(t, p.endpoint())
	wantEqual(t, "what is registered", strings.Join(ids, " "), "ledgers store guest")
	l := byID["ledgers"]
	wantEqual(t, "ledgers", strings.Join(append(l.OutputEvents, l.Endpoint, l.Type, l.TypeInFile), " "), "ledger 10.0.0.1:9000 source stellar@v2")
	p.wantAsk([]string{"list"}, exitOK, "(?s)test: 2 of 2 ready .*\nstore \\(my-store\\) .*\nguest \\(not in the pipeline\\) .*", "")
	get(c.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: "store"}))(t)
	p.waitErr("msg=status ready=1 total=2 waiting=store\n")
	wantReady(t, p.endpoint(), healthpb.HealthCheckResponse_NOT_SERVING)
	second := start(t, []string{"server", file, "-control-plane-port", "0"}, beside(p))
	second.exit(exitPlane)
	second.has(second.stderr, `flowctl: pipeline "test" is already running (pid `)
	p.stop()
}

// Who has stopped heartbeating is missed, also where a former control plane has heard of it last.
func TestServer_StaleComponent(t *testing.T) {
	t.Parallel()
	args := []string{"server", writePipeline(t, elsewhere("a", nil)), "-control-plane-port", "0", "-db-path", filepath.Join(t.TempDir(), "state")}
	p := start(t, args)
	dialPlane(t, p.endpoint()).mustRegister(t, "v1", registration{id: "a"})
	p.startWait().ends(exitOK, "ready: a\n")
	p.stop()
	p = start(t, append(args, "-heartbeat-ttl", "200ms"))
	p.waitErr("msg=unhealthy id=a component=a cause=")
	p.waitErr(`msg=status ready=0 total=1 unhealthy="a (no heartbeat `)
	wantReady(t, p.endpoint(), healthpb.HealthCheckResponse_NOT_SERVING)
	must(t, dialPlane(t, p.endpoint()).heartbeat(t.Context(), "v1", "a"))
	p.waitErr("msg=healthy id=a component=a\n")
	p.stop()
}

// startCertified starts a control plane of the components a and b. It returns what dials it with a certificate that has a
// common name, and URIs or DNS names.
func startCertified(t *testing.T, more ...string) (p *process, named func(name string, names ...string) planeClient) {
	t.Helper()
	ca := newCA(t)
	args := []string{"server", writePipeline(t, elsewhere("a", nil), elsewhere("b", nil)), "-control-plane-port", "0", "-no-persistence"}
	p = start(t, slices.Concat(args, newFiles(t, issue(t, ca, nil), ca).mutual(), more))
	return p, func(name string, names ...string) planeClient {
		t.Helper()
		cert := issue(t, ca, func(c *x509.Certificate) {
			c.Subject.CommonName = name
			for _, name := range names {
				if strings.Contains(name, "://") {
					c.URIs = append(c.URIs, get(url.Parse(name))(t))
				} else {
					c.DNSNames = append(c.DNSNames, name)
				}
			}
		})
		client, _ := dialTLS(t, p.endpoint(), trust(ca, cert))
		return client
	}
}

// denied wants a registration as id to be refused, by an error with text in it.
func (c planeClient) denied(t *testing.T, id, text string) {
	t.Helper()
	for _, dialect := range dialects {
		_, err := c.register(t.Context(), dialect, registration{id: id})
		if wantCode(t, "a registration as "+id, err, codes.PermissionDenied); !strings.Contains(status.Convert(err).Message(), text) {
			t.Errorf("a registration as %s: %v, want %q in it", id, err, text)
		}
	}
}

// A component with a certificate is that certificate's while it is well, and who comes after it may have another.
func TestServer_ComponentsOfCertificates(t *testing.T) {
	t.Parallel()
	p, named := startCertified(t)
	first, other := named("first"), named("other")
	first.mustRegister(t, "v1", registration{id: "a"})
	other.denied(t, "a", "was registered by certificate CN=first")
	wantCode(t, "a heartbeat by another certificate", other.heartbeat(t.Context(), "v1", "a"), codes.PermissionDenied)
	again := named("first")
	again.mustRegister(t, "v1", registration{id: "a"})
	get(again.v1.UnregisterComponent(t.Context(), &flowctlv1.UnregisterRequest{ServiceId: "a"}))(t)
	other.mustRegister(t, "v1", registration{id: "a"})
	p.stop()
}

// A certificate that names a component is that component's, and no other's.
func TestServer_CertificatesThatNameComponents(t *testing.T) {
	t.Parallel()
	p, named := startCertified(t)
	named("anybody").mustRegister(t, "v1", registration{id: "a"})
	a := named("issued anew", "spiffe://cluster.local/flowctl/test/a")
	a.denied(t, "b", `a certificate that names "a" cannot speak for component b`)
	wantEqual(t, "who sends another id", a.mustRegister(t, "legacy", registration{id: "my-own"}).id, "my-own")
	must(t, a.heartbeat(t.Context(), "legacy", "my-own"))
	must(t, a.heartbeat(t.Context(), "v1", "a"))
	wantCode(t, "who had it without a name in its certificate", named("anybody").heartbeat(t.Context(), "v1", "a"), codes.PermissionDenied)
	b := named("b", "b.test.flowctl")
	wantEqual(t, "who sends no id", b.mustRegister(t, "v1", registration{}).id, "b")
	both := named("both", "a.test.flowctl", "b.test.flowctl", "spiffe://cluster.local/other")
	both.mustRegister(t, "v1", registration{id: "b"})
	both.mustRegister(t, "v1", registration{id: "a"})
	named("x", "spiffe://cluster.local/flowctl/other/a").denied(t, "a", `names "component a of pipeline other" cannot`)
	named("x", "a.other.flowctl").denied(t, "a", `names "component a.other of another pipeline" cannot`)
	p.stop()
}

// With -require-identity a component is only who has such a certificate; what is not of the pipeline needs none.
func TestServer_RequireIdentity(t *testing.T) {
	t.Parallel()
	p, named := startCertified(t, "-require-identity")
	anybody := named("a")
	anybody.denied(t, "a", "only a certificate that names component a can speak for it: by the URI spiffe://ANY/flowctl/PIPELINE/a, or the DNS name a.PIPELINE.flowctl")
	anybody.mustRegister(t, "v1", registration{id: "guest"})
	named("a", "a.test.flowctl").mustRegister(t, "v1", registration{id: "a"})
	wantCode(t, "a heartbeat without", anybody.heartbeat(t.Context(), "v1", "a"), codes.PermissionDenied)
	p.stop()
	if code, _, stderr := call(t, "server", "-require-identity"); code != exitUsage || !strings.Contains(stderr, "-require-identity: it needs -tls-ca-cert") {
		t.Errorf("without a CA: exit %d\n%s", code, stderr)
	}
}

// Events of components that something else starts are moved, and wait hears of their end.
func TestServer_MovesEvents(t *testing.T) {
	t.Parallel()
	const count = 300
	out := filepath.Join(t.TempDir(), "out")
	components := []Component{
		flowing("ledgers", eventRole{Kind: "source", Count: count, Bytes: 100}),
		flowing("store", eventRole{Kind: "sink", File: out}, "ledgers"),
	}
	p := start(t, []string{"server", writePipeline(t, components...), "-control-plane-port", "0", "-no-persistence"})
	done := p.startWait("-until", "done", "-e", p.endpoint())
	for _, c := range components {
		cmd := exec.Command(c.Command[0])
		cmd.Env = append(os.Environ(), roleVar+"="+c.Env[roleVar], "FLOWCTL_ENDPOINT="+p.endpoint(), "FLOWCTL_COMPONENT_ID="+c.ID, "FLOWCTL_HEARTBEAT_INTERVAL=10s")
		must(t, cmd.Start())
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	}
	done.ends(exitOK, "done: ledgers, store\n")
	wantEvents(t, out, "ledgers", "", 1, count)
	// A client that registers again, as many do, does not have all that was moved come once more.
	c := dialPlane(t, p.endpoint())
	info := get(c.v1.GetComponentStatus(t.Context(), &flowctlv1.ComponentStatusRequest{ServiceId: "ledgers"}))(t).GetComponent()
	_ = get(c.v1.RegisterComponent(t.Context(), &flowctlv1.RegisterRequest{Component: info}))(t)
	p.startWait("-until", "done", "-e", p.endpoint(), "ledgers").ends(exitOK, "done: ledgers\n")
	wantEvents(t, out, "ledgers", "", 1, count)
	p.stop()
	wantEvents(t, out, "ledgers", "", 1, count)
	p.has(p.stderr, `msg="pipeline ready" components=2`)
}

func TestServer_WrongFile(t *testing.T) {
	t.Parallel()
	file := writeFile(t, filepath.Join(t.TempDir(), "p.json"), `{"apiVersion":"flowctl/v1"}`)
	for _, args := range [][]string{{file}, {"-f", file}, {"none.json"}} {
		if code, out, stderr := call(t, append([]string{"server"}, args...)...); code != exitUsage || out != "" || !strings.Contains(stderr, filepath.Base(args[len(args)-1])) {
			t.Errorf("server %q: exit %d\n%s%s", args, code, out, stderr)
		}
	}
}

// What a control plane says of itself is what other machines reach, and so is what it says of a component.
func TestServer_Advertise(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"server", writePipeline(t, elsewhere("a", nil), elsewhere("b", func(c *Component) { c.Inputs = []string{"a"} })), "-control-plane-port", "0", "-no-persistence", "-advertise", "plane.example:8080"})
	c := dialPlane(t, p.endpoint())
	ack := c.mustRegister(t, "v1", registration{id: "a", endpoint: ":50051"})
	wantEqual(t, "the control plane", ack.info["control_plane_endpoint"], "plane.example:8080")
	wantEqual(t, "a, as b is told", c.mustRegister(t, "legacy", registration{id: "b"}).info["a"], "127.0.0.1:50051")
	p.wantAsk([]string{"list"}, exitOK, "(?s)test: 2 of 2 ready \\(pid \\d+, plane.example:8080\\)\n.*", "")
	p.stop()
	for _, wrong := range []string{"plane", ":8080", "0.0.0.0:8080", "plane:http"} {
		if code, _, stderr := call(t, "server", "-advertise", wrong); code != exitUsage || !strings.Contains(stderr, `-advertise "`+wrong+`": it must be host:port, of one host`) {
			t.Errorf("-advertise %s: exit %d\n%s", wrong, code, stderr)
		}
	}
}

// In a run, too, a component is then only who has a certificate that names it.
func TestRun_RequireIdentity(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	files := newFiles(t, issue(t, ca, func(c *x509.Certificate) { c.DNSNames = []string{"localhost", "named.test.flowctl"} }), ca)
	named, other := actor("named", role{Dialect: "v1"}), actor("other", role{Dialect: "v1", Gate: true})
	named.TLS, other.TLS = true, true
	p := launch(t, writePipeline(t, named, other), append(files.mutual(), "-require-identity")...)
	p.waitErr("msg=ready component=named ")
	p.waitOut("| waiting\n")
	p.tell("other", syscall.SIGUSR2)
	p.exit(exitFailed)
	p.has(p.stderr, "component other failed: ", "only a certificate that names component other can speak for it")
}
