//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// planeAddresses calls test for each kind of address that a control plane can have.
func planeAddresses(t *testing.T, test func(t *testing.T, address string)) {
	for _, kind := range []string{"IPv4", "IPv6", "unix"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			switch kind {
			case "IPv4":
				test(t, "127.0.0.1")
			case "IPv6":
				lis, err := net.Listen("tcp", "[::1]:0")
				if err != nil {
					t.Skip("this system has no IPv6: ", err)
				}
				lis.Close()
				test(t, "::1")
			default:
				test(t, "unix:"+filepath.Join(shortDir(t), "plane"))
			}
		})
	}
}

// Copies of one program that send no id are told apart by their processes, however these were
// started and in whatever order they register. If one was taken for another, the pipeline would
// not be ready.
func TestRegister_NamelessComponentIsKnownByItsProcess(t *testing.T) { // not in parallel: another test must not hold it up
	const each = 3 // of two dialects and three ways to be started, on each of three addresses: 54
	program := get(os.Executable())(t)
	planeAddresses(t, func(t *testing.T, address string) {
		var components []Component
		for _, dialect := range dialects {
			for i := range each {
				for way, script := range map[string]string{
					"itself":     "",
					"grandchild": "sh -c '" + program + "; true'; true",
					"orphan":     "(setsid " + program + " &); exec sleep 300",
				} {
					c := actor(fmt.Sprint(dialect, "-", way, "-", i), role{Dialect: dialect, Nameless: true})
					if script != "" {
						c.Command = []string{"sh", "-c", script}
					}
					components = append(components, c)
				}
			}
		}
		rand.Shuffle(len(components), func(i, j int) { components[i], components[j] = components[j], components[i] })
		p := launch(t, writePipeline(t, components...), "-control-plane-address", address, "-start-timeout", "1m")
		p.waitReady()
		matched := 0
		for _, c := range dialPlane(t, p.endpoint()).listed(t) {
			if !c.GetInPipeline() || c.GetHealth() != "healthy" || c.GetServiceId() != "" {
				t.Errorf("%s: in the pipeline %t, %s, as service %q", c.GetId(), c.GetInPipeline(), c.GetHealth(), c.GetServiceId())
				continue
			}
			matched++
		}
		t.Logf("%d of %d matched", matched, len(components))
		if matched != len(components) {
			t.Errorf("not all are matched\n%s", p)
		}
		p.stop()
	})
}

// claims are all the ways to pass oneself off as component id, which has this HEALTH_PORT. alias
// is the service_id that it registered with, "" for none.
func claims(id, alias, healthPort string) map[string]func(ctx context.Context, c planeClient) error {
	out := make(map[string]func(ctx context.Context, c planeClient) error)
	poses := map[string]registration{
		"component_id":                {id: "intruder", componentID: id},
		"component_id, all the same":  {id: id, componentID: id},
		"metadata":                    {id: "intruder", metadata: map[string]string{metadataComponentID: id}},
		"own id":                      {id: id},
		"own id, another's component": {id: id, componentID: "nobody"},
		"health port":                 {id: "intruder", endpoint: "http://localhost:" + healthPort + "/health"},
		"health port in metadata":     {id: "intruder", metadata: map[string]string{"health_endpoint": "http://127.0.0.1:" + healthPort}},
	}
	if alias != "" {
		poses["alias"] = registration{id: alias}
		poses["alias as component_id"] = registration{id: "intruder", componentID: alias}
	}
	for _, dialect := range dialects {
		for what, reg := range poses {
			out[dialect+" registration by "+what] = func(ctx context.Context, c planeClient) error {
				_, err := c.register(ctx, dialect, reg)
				return err
			}
		}
		for _, name := range []string{id, alias} {
			if name != "" {
				out[dialect+" heartbeat as "+name] = func(ctx context.Context, c planeClient) error { return c.heartbeat(ctx, dialect, name) }
				out["unregister "+name] = func(ctx context.Context, c planeClient) error {
					_, err := c.v1.UnregisterComponent(ctx, &flowctlv1.UnregisterRequest{ServiceId: name})
					return err
				}
			}
		}
	}
	return out
}

// This process is of no component, and whatever it claims changes none. Each of its connections
// is looked up.
func TestRegister_ForeignProcessIsRefused(t *testing.T) {
	t.Parallel()
	const connections = 34 // on each of three addresses, before and after the component has registered
	planeAddresses(t, func(t *testing.T, address string) {
		p := launch(t, writePipeline(t, actor("store", role{Dialect: "v1", Alias: "hard-coded", Gate: true, Environ: true})),
			"-control-plane-address", address, "-heartbeat-ttl", "1m", "-start-timeout", "2m")
		p.waitOut("waiting")
		port := regexp.MustCompile(`env "HEALTH_PORT=(\d+)"`).FindStringSubmatch(p.stdout.String())
		if port == nil {
			t.Fatalf("no HEALTH_PORT\n%s", p)
		}
		endpoint, calls, refused := p.endpoint(), 0, 0
		pose := func(alias string) {
			for range connections {
				c := dialPlane(t, endpoint)
				for what, claim := range claims("store", alias, port[1]) {
					calls++
					err := claim(t.Context(), c)
					wantCode(t, what, err, codes.PermissionDenied)
					if status.Code(err) == codes.PermissionDenied {
						refused++
					}
				}
				c.conn.Close()
			}
		}
		pose("")
		if got := dialPlane(t, endpoint).listed(t); len(got) != 1 || got[0].GetHealth() != "unregistered" {
			t.Errorf("listed before it registered: %v", got)
		}
		p.tell("store", syscall.SIGUSR2)
		p.waitReady()
		c := dialPlane(t, endpoint)
		bare := func(l *operatorv1.Component) *operatorv1.Component {
			l.LastSeen, l.Metrics, l.TextMetrics = nil, nil, nil
			return l
		}
		before := bare(c.one(t, "store"))
		pose("hard-coded")
		if after := c.listed(t); len(after) != 1 || !proto.Equal(bare(after[0]), before) {
			t.Errorf("listed before %v\nand after %v", before, after)
		}
		t.Logf("%d of %d calls refused", refused, calls)

		for _, dialect := range dialects {
			wantEqual(t, "registered", c.mustRegister(t, dialect, registration{id: "elsewhere-" + dialect}).id, "elsewhere-"+dialect)
			if l := c.one(t, "elsewhere-"+dialect); l == nil || l.GetInPipeline() {
				t.Errorf("a service of its own: %v", l)
			}
			if got := c.mustRegister(t, dialect, registration{}).id; got == "store" || got == "" {
				t.Errorf("who says nothing is %q", got)
			}
		}
		p.stop()
	})
}

func TestRegister_ComponentCannotSpeakForAnother(t *testing.T) {
	t.Parallel()
	for _, dialect := range dialects {
		t.Run(dialect, func(t *testing.T) {
			t.Parallel()
			liar := actor("store", role{Dialect: dialect, Alias: "ledgers"})
			liar.Inputs = []string{"ledgers"}
			p := launch(t, writePipeline(t, actor("ledgers", role{Dialect: dialect}), liar))
			p.exit(exitFailed)
			p.has(p.stdout, "component store cannot speak for component ledgers")
			p.hasNot(p.stderr, "pipeline ready")
		})
	}
}

// Of two components with the same hard-coded service_id the mute one goes stale, be it the first
// or the last that registered.
func TestHeartbeat_SharedServiceIDIsKnownByItsProcess(t *testing.T) {
	t.Parallel()
	for _, dialect := range dialects {
		for _, mute := range []string{"first", "last"} {
			t.Run(dialect+" "+mute, func(t *testing.T) {
				t.Parallel()
				other := map[string]string{"first": "last", "last": "first"}[mute]
				first, last := actor("first", role{Dialect: dialect, Alias: "stellar", OnUSR1: "mute"}), actor("last", role{Dialect: dialect, Alias: "stellar", OnUSR1: "mute"})
				last.DependsOn = []string{"first"}
				p := launch(t, writePipeline(t, first, last), "-heartbeat-ttl", "3s", "-unhealthy-timeout", "1m")
				p.waitReady()
				p.tell(mute, syscall.SIGUSR1)
				p.waitErr("component=" + mute + ` cause="no heartbeat `)
				p.tell(mute, syscall.SIGUSR2)
				p.waitErr("component=" + mute + "\n")
				p.hasNot(p.stderr, "component="+other+" cause=")
				p.stop()
			})
		}
	}
}

// A control plane alone has no components and refuses nobody.
func TestServer_RefusesNobody(t *testing.T) {
	t.Parallel()
	planeAddresses(t, func(t *testing.T, address string) {
		p := start(t, []string{"server", "-control-plane-port", "0", "-control-plane-address", address})
		endpoint := p.endpoint()
		dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "store", endpoint: "http://localhost:9001/health"})
		for what, claim := range claims("store", "", "9001") {
			if err := claim(t.Context(), dialPlane(t, endpoint)); err != nil && !strings.HasPrefix(what, "unregister") && !strings.Contains(err.Error(), "NotFound") {
				t.Errorf("%s: %v", what, err)
			} else if err != nil {
				dialPlane(t, endpoint).mustRegister(t, "v1", registration{id: "store"})
			}
		}
		p.stop()
	})
}

// recorded returns the bytes that a client sends to register as id, which is refused.
func recorded(tb testing.TB, endpoint, id string) []byte {
	tb.Helper()
	lis := get(net.Listen("tcp", "127.0.0.1:0"))(tb)
	defer lis.Close()
	var sent bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		client, err := lis.Accept()
		if err != nil {
			return
		}
		defer client.Close()
		plane, err := net.Dial("tcp", endpoint)
		if err != nil {
			return
		}
		defer plane.Close()
		go io.Copy(client, plane)
		io.Copy(io.MultiWriter(plane, &sent), client)
	}()
	conn := get(grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy()))(tb)
	in := &flowctlv1.RegisterRequest{Component: &flowctlv1.ComponentInfo{Id: id}}
	_, err := flowctlv1.NewControlPlaneServiceClient(conn).RegisterComponent(tb.Context(), in, grpc.WaitForReady(true))
	wantCode(tb, "registration as "+id, err, codes.PermissionDenied)
	conn.Close()
	<-done
	return sent.Bytes()
}

// A process that sends a claim and closes its connection before it is looked up is refused.
func TestRegister_ClosedConnectionIsRefused(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, Component{ID: "a", Command: []string{"sleep", "300"}}))
	p.waitErr("msg=started component=a ")
	claim := recorded(t, p.endpoint(), "a")
	for range 100 {
		conn := get(net.Dial("tcp", p.endpoint()))(t)
		get(conn.Write(claim))(t)
		conn.Close()
	}
	register(t, p.endpoint(), "another") // and so all before it have been seen, or nearly
	byID, _ := listed(t, p.endpoint())
	if health := byID["a"].Health; health != "unregistered" {
		t.Errorf("a is %s\n%s", health, p)
	}
	p.signal(syscall.SIGTERM)
	p.exit(exitOK)
}

// A component that flowctl may not look into, as it has capabilities, cannot prove to be one. Nor can
// anybody hide behind it.
func TestRegister_UnreadableComponentShieldsNobody(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	const uid, other = 65529, 65528
	program := publicProgram(t)
	own, hidden := actor("own", role{Dialect: "v1"}), actor("hidden", role{Dialect: "v1", Hidden: true})
	own.Command, hidden.Command = []string{program}, []string{"sh", "-c", program + "; exec sleep 300"}
	p := start(t, runArgs(publicPipeline(t, own, hidden)), asNobody(uid))
	p.waitOut("own    | registered")
	p.waitOut("flowctl cannot tell whether a process of component hidden calls: a process that flowctl may not look into can hold its socket")
	endpoint := p.endpoint()
	pose := func(uid int, r role) string {
		cmd := exec.Command(program)
		cmd.Dir = "/"
		cmd.Env = append(slices.Clone(p.cmd.Env), "FLOWCTL_ENDPOINT="+endpoint, "FLOWCTL_COMPONENT_ID=own", roleVar+"="+actorRole(t, r))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: 65534}}
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	ends := role{Dialect: "v1", End: "registered"}
	for _, uid := range []int{uid, other} {
		if out := pose(uid, ends); !strings.Contains(out, "PermissionDenied") {
			t.Errorf("a foreign process of user %d: %s", uid, out)
		}
	}
	endsHidden := ends
	endsHidden.Hidden = true
	if out := pose(other, endsHidden); !strings.Contains(out, "PermissionDenied") {
		t.Errorf("a foreign process that is hidden itself: %s", out)
	}
	p.stop()
}

// Where /proc shows a user only the processes that it may look into, by hidepid= of proc(5) or
// ProtectProc= of a unit, nobody can prove to be a component that it does not show.
func TestRegister_ComponentThatProcHidesIsRefused(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user, and mount")
	}
	const uid = 65527
	program := publicProgram(t)
	own, hidden := actor("own", role{Dialect: "v1"}), actor("hidden", role{Dialect: "v1", Hidden: true})
	own.Command, hidden.Command = []string{program}, []string{program}
	p := start(t, runArgs(publicPipeline(t, own, hidden)), asNobody(uid), func(p *process) {
		p.cmd.SysProcAttr.Credential = nil
		hide := exec.Command("unshare", "-m", "sh", "-c", `mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid "$0" --regid 65534 --clear-groups "$@"`, strconv.Itoa(uid))
		p.cmd.Path, p.cmd.Args = hide.Path, append(hide.Args, p.cmd.Args...)
	})
	p.exit(1)
	p.has(p.stdout, "flowctl cannot tell whether a process of component hidden calls: /proc hides processes (hidepid=)")
}

// A connection is of the component whose process holds its other end, whatever wraps it.
func TestIdentifyPeer_FindsTheHolder(t *testing.T) {
	t.Parallel()
	pair := connectPair(t, "tcp4", "127.0.0.1", "")
	cmd := handOver(t, pair.client, nil)
	pair.client.Close()
	lis := get(net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(shortDir(t), "plane"), Net: "unix"}))(t)
	defer lis.Close()
	client := get(net.DialUnix("unix", nil, lis.Addr().(*net.UnixAddr)))(t) // by this process
	defer client.Close()
	accepted := get(lis.Accept())(t)
	defer accepted.Close()
	i := &identifier{processes: fakeProcesses{cmd.Process.Pid: "a"}}
	owner := fmt.Sprint("user ", os.Getuid())
	ofA := origin{component: "a", leader: cmd.Process.Pid, owner: owner}
	for name, tt := range map[string]struct {
		conn net.Conn
		want origin
	}{
		"TCP":              {pair.server, ofA},
		"wrapped":          {taggedConn{pair.server, forComponents}, ofA},
		"unix":             {accepted, origin{owner: owner}},
		"wrapped, of unix": {taggedConn{accepted, forComponents}, origin{owner: owner}},
	} {
		for _, claimedID := range []string{"", "a", "b"} {
			eventually(t, name+": identified, claimed to be "+claimedID, func() bool { // not at once for the reason of awaitNone
				from, err := i.identifyPeer(tt.conn, claimedID)
				return err == nil && from == tt.want
			})
		}
	}
}

// fakeProcesses are the leaders of a run, by pid.
type fakeProcesses map[int]string

func (f fakeProcesses) leaders() map[int]string        { return f }
func (f fakeProcesses) settledLeaders() map[int]string { return f }
func (f fakeProcesses) leads(pid int, id string) bool  { return f[pid] == id }
func (f fakeProcesses) leaderOf(id string) int {
	for pid, of := range f {
		if of == id {
			return pid
		}
	}
	return 0
}
func (f fakeProcesses) ownGroups() bool                        { return false }
func (f fakeProcesses) markOwner(int) string                   { return "" }
func (f fakeProcesses) cgroupOwner(int) string                 { return "" }
func (f fakeProcesses) containers() (runningContainers, error) { return runningContainers{}, nil }

// On the listener of components there is no TLS, and who is not known to be of one is refused.
func TestComponentListener_RefusesForeignProcesses(t *testing.T) {
	t.Parallel()
	lis := taggedListener{listen(t, "127.0.0.1:0"), forComponents}
	client, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	raw, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	var creds credentials.TransportCredentials = peerCredentials{
		TransportCredentials: credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12}), identifier: &identifier{processes: fakeProcesses{}}, log: slog.New(slog.DiscardHandler),
	}
	if _, _, err := creds.Clone().ServerHandshake(raw); err == nil || !strings.Contains(err.Error(), "has to use TLS") {
		t.Errorf("this process, which is of no component: %v", err)
	}
}

func TestRegister_CommandCannotSpeakForAComponent(t *testing.T) {
	t.Parallel()
	a := actor("a", role{Dialect: "v1"})
	poser := roleVar + "=" + actorRole(t, role{Dialect: "v1", End: "registered"})
	p := start(t, runArgs(writePipeline(t, a), "--", "env", "FLOWCTL_COMPONENT_ID=a", poser, a.Command[0]))
	p.exit(99)
	p.has(p.stderr, "the command after -- cannot speak for component a")
}

// A process in a pid namespace of its own, as in a container, is no component for that.
func TestRegister_ForeignPIDNamespaceIsRefused(t *testing.T) {
	t.Parallel()
	a := actor("a", role{Dialect: "v1"})
	p := launch(t, writePipeline(t, a))
	p.waitReady()
	cmd := exec.Command("unshare", "--user", "--map-root-user", "--pid", "--fork", a.Command[0])
	cmd.Env = append(slices.Clone(p.cmd.Env), "FLOWCTL_ENDPOINT="+p.endpoint(), "FLOWCTL_COMPONENT_ID=a", roleVar+"="+actorRole(t, role{Dialect: "v1", End: "registered"}))
	out, err := cmd.CombinedOutput()
	if err != nil && bytes.Contains(out, []byte("unshare:")) {
		t.Skip("this system does not let us have a pid namespace: ", string(out))
	}
	if !bytes.Contains(out, []byte("PermissionDenied")) {
		t.Errorf("%v\n%s", err, out)
	}
	p.stop()
}

// publicProgram is this test's program, where every user can run it.
func publicProgram(tb testing.TB) string {
	tb.Helper()
	self := get(os.Executable())(tb)
	data := get(os.ReadFile(self))(tb)
	program := writeFile(tb, filepath.Join(publicDir(tb), "actor"), string(data))
	must(tb, os.Chmod(program, 0o755))
	return program
}

// What a component has left to flowctl speaks for no other: neither by the environment that it
// gives itself, nor by hiding from /proc.
func TestRegister_OrphanCannotPose(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	program := publicProgram(t)
	b := actor("b", role{Dialect: "v1"})
	b.Command = []string{program}
	ends := role{Dialect: "v1", End: "registered"}
	hides := ends
	hides.Hidden = true
	evil := "(setsid env FLOWCTL_COMPONENT_ID=b " + roleVar + "='" + actorRole(t, ends) + "' " + program + " &); sleep 1; " +
		"FLOWCTL_COMPONENT_ID=b " + roleVar + "='" + actorRole(t, hides) + "' " + program + "; exec sleep 300"
	c := shell("evil", evil)
	c.DependsOn = []string{"b"}
	p := start(t, runArgs(publicPipeline(t, b, c)), asNobody(65526))
	p.waitOut("component evil cannot speak for component b")
	p.waitOut("flowctl cannot tell whether a process of component b calls: a process that flowctl may not look into")
	p.hasNot(p.stdout, "evil | registered")
	p.stop()
}

// A component may be called as the command after -- is written.
func TestRegister_ComponentCalledAsTheCommand(t *testing.T) {
	t.Parallel()
	a := actor("--", role{Dialect: "v1"})
	poser := roleVar + "=" + actorRole(t, role{Dialect: "v1", End: "registered"})
	p := start(t, runArgs(writePipeline(t, a), "--", "env", "FLOWCTL_COMPONENT_ID=--", poser, a.Command[0]))
	p.exit(99)
	p.has(p.stderr, "msg=ready component=--", "the command after -- cannot speak for component --")
}

// Nobody is believed because others hold all ports while flowctl starts.
func TestIdentifier_PortsThatOthersHold(t *testing.T) {
	t.Parallel()
	if !ownNetwork(t) {
		return
	}
	must(t, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40019"), 0))
	var held []net.Listener
	for lis, err := net.Listen("tcp", "127.0.0.1:0"); err == nil; lis, err = net.Listen("tcp", "127.0.0.1:0") {
		held = append(held, lis)
	}
	a := actor("a", role{Dialect: "v1", Gate: true})
	a.Env["HEALTH_PORT"] = "1" // else flowctl could not give it one
	p := start(t, []string{"run", writePipeline(t, a), "-control-plane-port", "8080"})
	p.waitOut("waiting")
	for _, lis := range held {
		lis.Close()
	}
	c := dialPlane(t, p.endpoint())
	for what, claim := range claims("a", "", "1") {
		wantCode(t, what, claim(t.Context(), c), codes.PermissionDenied)
	}
	must(t, c.conn.Close())
	p.tell("a", syscall.SIGUSR2)
	p.waitReady()
	p.stop()
}

// privateListener starts a run with mutual TLS and returns where it listens without TLS.
func privateListener(t *testing.T, components []Component, options ...option) (*process, string) {
	t.Helper()
	ca := newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	p := start(t, runArgs(writePipeline(t, components...), files.mutual()...), options...)
	p.waitErr("listening for components, without TLS")
	return p, regexp.MustCompile(`without TLS" endpoint=(\S+)`).FindStringSubmatch(p.stderr.String())[1]
}

// Beside TLS nobody but components gets in without it: no process of this user, of another one or
// of another pid namespace, whatever it says.
func TestComponentListener_IsForComponentsAlone(t *testing.T) {
	t.Parallel()
	p, private := privateListener(t, []Component{actor("a", role{Dialect: "v1"}), actor("b", role{Dialect: "legacy", Nameless: true})})
	p.waitReady()
	for what, claim := range claims("a", "", "1") {
		wantCode(t, what, claim(t.Context(), dialPlane(t, private)), codes.Unavailable)
	}
	program := publicProgram(t)
	for name, as := range map[string]struct {
		command []string
		root    bool
	}{
		"another user":                          {[]string{"setpriv", "--reuid=65525", "--regid=65525", "--clear-groups"}, true},
		"another pid namespace":                 {[]string{"unshare", "--user", "--map-root-user", "--pid", "--fork"}, false},
		"another user in another pid namespace": {[]string{"unshare", "--pid", "--fork", "setpriv", "--reuid=65525", "--regid=65525", "--clear-groups"}, true},
	} {
		if as.root && os.Getuid() != 0 {
			continue
		}
		cmd := exec.Command(as.command[0], append(as.command[1:], program)...)
		cmd.Dir = "/"
		cmd.Env = append(slices.Clone(p.cmd.Env), "FLOWCTL_ENDPOINT="+private, "FLOWCTL_COMPONENT_ID=a", "FLOWCTL_RUN=a", roleVar+"="+actorRole(t, role{Dialect: "v1", End: "registered"}))
		if out, _ := cmd.CombinedOutput(); !bytes.Contains(out, []byte("Unavailable")) && !bytes.Contains(out, []byte("unshare:")) {
			t.Errorf("%s: %s", name, out)
		}
	}
	p.stop()
}

// That others have taken flowctl's descriptors lets nobody in, and keeps no component out.
func TestComponentListener_WithoutDescriptors(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("prlimit"); err != nil {
		t.Skip("no prlimit(1) here")
	}
	a, on := actor("a", role{Dialect: "v1"}), filepath.Join(t.TempDir(), "on")
	// It calls again where it is refused, as when flowctl itself takes a descriptor meanwhile.
	a.Command = []string{"sh", "-c", "echo waiting; until [ -e " + on + " ]; do sleep 0.02; done; until " + a.Command[0] + "; do sleep 0.05; done"}
	p, private := privateListener(t, []Component{a})
	p.waitOut("waiting")
	pid := p.cmd.Process.Pid
	leave := func(free int) { // so many descriptors to flowctl
		taken := make(map[string]bool)
		for _, entry := range get(os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)))(t) {
			taken[entry.Name()] = true
		}
		limit := 0 // the number of the first that it does not get
		for ; taken[strconv.Itoa(limit)] || free > 0; limit++ {
			if !taken[strconv.Itoa(limit)] {
				free--
			}
		}
		if out, err := exec.Command("prlimit", "--pid", strconv.Itoa(pid), fmt.Sprintf("--nofile=%d:", limit)).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	poses := func(patience time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		c := dialPlane(t, private)
		defer c.conn.Close() // else it goes on to call
		_, err := c.register(ctx, "v1", registration{id: "stranger"})
		return err
	}
	wantCode(t, "this process", poses(patience), codes.Unavailable) // from then on it has its spare ones
	open := func() int { return len(get(os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)))(t)) }
	before := open()
	for free := range 5 {
		leave(free)
		if poses(100*time.Millisecond) == nil { // or it is not accepted
			t.Errorf("this process is let in where %d descriptors are free", free)
		}
	}
	leave(50)
	wantCode(t, "this process", poses(patience), codes.Unavailable) // and who came before is gone
	eventually(t, "descriptors as before", func() bool { return open() == before })
	leave(1) // for its connection
	writeFile(t, on, "")
	p.waitReady()
	p.stop()
}
