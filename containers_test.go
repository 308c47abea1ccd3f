//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// boxImage holds testdata/box, and nothing else.
const boxImage = "flowctl-box:test"

// engineLab is a container engine of the test's own. It takes half a minute, so
// FLOWCTL_ENGINE=must asks for it, and makes it a failure that there is none.
type engineLab struct {
	program string
	env     []string
}

func (l *engineLab) missing(t *testing.T, why string) {
	t.Helper()
	t.Fatal("FLOWCTL_ENGINE=must, and there is no engine: " + why)
}

func wantEngine(t *testing.T) {
	t.Helper()
	if os.Getenv("FLOWCTL_ENGINE") != "must" {
		t.Skip("FLOWCTL_ENGINE=must tests on a real container engine")
	}
}

// openDocker starts a dockerd, which needs neither a network of its own nor iptables.
func openDocker(t *testing.T) *engineLab {
	t.Helper()
	l := &engineLab{program: "docker"}
	if os.Geteuid() != 0 {
		l.missing(t, "dockerd needs root")
	}
	for _, program := range []string{"docker", "dockerd"} {
		if _, err := exec.LookPath(program); err != nil {
			l.missing(t, err.Error())
		}
	}
	folder := engineFolder(t)
	socket := "unix://" + folder + "/docker.sock"
	l.env = []string{"DOCKER_HOST=" + socket, "DOCKER_CONFIG=" + folder}
	cmd := exec.Command("dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs", "--group=65534",
		"--data-root", folder+"/data", "--exec-root", folder+"/exec", "-H", socket, "-p", folder+"/pid")
	said := newTranscript()
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
	})
	if !said.contains("API listen on", 1, ended) {
		l.missing(t, "dockerd: "+said.String())
	}
	l.load(t, "import", "-", boxImage)
	return l
}

// openPodman makes a podman that keeps everything in a folder, and that asks for no
// more than a machine without CAP_SYS_RESOURCE has.
func openPodman(t *testing.T) *engineLab {
	t.Helper()
	l := &engineLab{}
	if os.Geteuid() != 0 {
		l.missing(t, "this podman needs root")
	}
	if _, err := exec.LookPath("podman"); err != nil {
		l.missing(t, err.Error())
	}
	folder := engineFolder(t)
	writeFile(t, folder+"/containers.conf", "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n")
	l.program = writeProgram(t, folder+"/podman", fmt.Sprintf(`#!/bin/sh
export CONTAINERS_CONF=%[1]s/containers.conf
exec podman --root %[1]s/root --runroot %[1]s/run --tmpdir %[1]s/tmp --storage-driver vfs --cgroup-manager cgroupfs --events-backend file "$@"
`, folder))
	l.load(t, "import", "-", boxImage)
	return l
}

// engineFolder has a path short enough for sockets. What an engine leaves mounted in
// it goes with it.
func engineFolder(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "flowctl-engine-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, _ := os.ReadFile("/proc/self/mounts")
		for line := range strings.Lines(string(mounts)) {
			if path := strings.Fields(line)[1]; strings.HasPrefix(path, folder+"/") {
				_ = syscall.Unmount(path, syscall.MNT_DETACH)
			}
		}
		if err := os.RemoveAll(folder); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	return folder
}

// load makes the image.
func (l *engineLab) load(t *testing.T, args ...string) {
	t.Helper()
	folder := t.TempDir()
	compile := exec.Command("go", "build", "-o", folder+"/box", "./testdata/box")
	compile.Env = append(os.Environ(), "CGO_ENABLED=0") // the image has no libraries
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	tar := exec.Command("tar", "-C", folder, "-c", "box")
	image, err := tar.Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := l.command(args...)
	cmd.Stdin = bytes.NewReader(image)
	if out, err := cmd.CombinedOutput(); err != nil {
		l.missing(t, fmt.Sprintf("it does not take the image: %v\n%s", err, out))
	}
	if out, err := l.command("run", "--rm", "--network=host", "--log-driver=none", boxImage, "/box", "exists", "/box").CombinedOutput(); err != nil {
		l.missing(t, fmt.Sprintf("it runs no containers here: %v\n%s", err, out))
	}
}

func (l *engineLab) command(args ...string) *exec.Cmd {
	cmd := exec.Command(l.program, args...)
	cmd.Env = append(os.Environ(), l.env...)
	return cmd
}

// box is a component that runs testdata/box and knows nothing of flowctl.
func box(id string, args ...string) Component {
	return Component{ID: id, Image: boxImage, Args: append([]string{"/box"}, args...), Register: new(false)}
}

// launch starts flowctl with a pipeline of that name.
func (l *engineLab) launch(t *testing.T, name string, components []Component, args ...string) *process {
	t.Helper()
	return l.start(t, l.write(t, name, components...), args)
}

func (l *engineLab) start(t *testing.T, file string, args []string, options ...option) *process {
	t.Helper()
	return start(t, slices.Concat([]string{"run", file, "-control-plane-port", "0", "-orchestrator", "container", "-engine", l.program}, args),
		append([]option{withEnv(l.env...)}, options...)...)
}

func (l *engineLab) write(t *testing.T, name string, components ...Component) string {
	t.Helper()
	p := Pipeline{APIVersion: "flowctl/v1", Kind: "Pipeline", Metadata: Metadata{Name: name}, Spec: Spec{Sources: components}}
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, filepath.Join(t.TempDir(), "pipeline.json"), string(data))
}

// containers are those of a pipeline, whatever their state.
func (l *engineLab) containers(t *testing.T, pipeline string) []string {
	t.Helper()
	out, err := l.command("ps", "--all", "--filter", "label="+labelPipeline+"="+pipeline, "--format", "{{.Names}}").Output()
	if err != nil {
		t.Fatalf("%v: %s", err, err.(*exec.ExitError).Stderr)
	}
	return strings.Fields(string(out))
}

func (l *engineLab) none(t *testing.T, pipeline string) {
	t.Helper()
	if left := l.containers(t, pipeline); len(left) > 0 {
		t.Errorf("containers are left: %q", left)
	}
}

func TestDocker(t *testing.T) {
	wantEngine(t)
	l := openDocker(t)
	t.Run("containers", func(t *testing.T) {
		l.testAll(t)
		t.Run("refused", l.testRefusedSocket)
		t.Run("as another user", l.testOtherUser)
	})
}

func TestPodman(t *testing.T) {
	wantEngine(t)
	l := openPodman(t)
	t.Run("containers", l.testAll)
}

// testAll is what has to be so with every engine.
func (l *engineLab) testAll(t *testing.T) {
	for name, test := range map[string]func(*testing.T){
		"registers": l.testRegisters, "tls": l.testTLS, "stops": l.testStops, "stops early": l.testStopsEarly, "is deaf": l.testDeaf, "second signal": l.testSecondSignal,
		"flowctl is killed": l.testKilled, "all is killed": l.testAllKilled, "its command line is killed": l.testCommandLineKilled,
		"environment": l.testEnvironment, "health": l.testHealth, "no image": l.testNoImage, "reload": l.testReload, "fails": l.testFails,
		"does not start": l.testDoesNotStart, "completes": l.testCompletes,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

// stubEngine is a program that notes how it is called, and whose containers are
// sleeping processes that take their third signal.
func stubEngine(t *testing.T) (program, notes string) {
	t.Helper()
	folder := t.TempDir()
	program, notes = filepath.Join(folder, "engine"), filepath.Join(folder, "notes")
	writeProgram(t, program, fmt.Sprintf(`#!/bin/sh
cd %q
case $1 in
run) for arg; do echo "arg $arg" >>notes; done; sed 's/^/env /' >>notes; echo $$ >pid; echo up; exec sleep 300 ;;
kill) echo "signal $3" >>notes; [ $(grep -c signal notes) -gt 2 ] && kill -s ${3#SIG} $(cat pid) ;;
esac
`, folder))
	return program, notes
}

// With ports a container has a network of its own.
func TestContainer_WithPortsHasItsOwnNetwork(t *testing.T) {
	t.Parallel()
	engine, notes := stubEngine(t)
	l := &engineLab{program: engine}
	store := box("store", "live")
	store.Ports, store.Env = []string{"127.0.0.1:8080:80"}, map[string]string{"A": "b c"}
	p := l.launch(t, "ports", []Component{store}, "-control-plane-address", "0.0.0.0")
	p.waitOut("up")
	_, port, _ := strings.Cut(p.endpoint(), ":")
	p.stop()
	p.has(p.stderr, `reason="killed by signal 15 (terminated)"`)
	got := readJournal(t, notes)
	inOrder(t, got, "arg run", "arg --rm", "arg --label=flowctl.pipeline=ports", "arg --label=flowctl.component=store", "arg --add-host=host.docker.internal:host-gateway",
		"arg --publish=127.0.0.1:8080:80", "arg --env-file=/dev/stdin", "arg "+boxImage, "arg /box", "arg live", "env A=b c", "env FLOWCTL_ENDPOINT=host.docker.internal:"+port)
	inOrder(t, got, "signal SIGTERM", "signal SIGTERM", "signal SIGTERM") // one that comes too early is sent again
	if slices.Contains(got, "arg --network=host") {
		t.Errorf("it is on the host's network: %q", got)
	}
	store.Register = nil
	p = l.launch(t, "ports", []Component{store})
	p.exit(exitUsage)
	p.has(p.stderr, `flowctl: store: ports take a container off the host's network, from where it cannot register at 127.0.0.1:`,
		`: leave out ports, or set "register": false, or give -control-plane-address 0.0.0.0`)
	p.hasNot(p.stderr, "msg=started")
}

// One whose end comes before it is seen to run has run if it ended well.
func TestContainer_EndsBeforeItIsSeen(t *testing.T) {
	t.Parallel()
	for status, want := range map[string]int{"0": exitOK, "127": exitFailed} {
		engine := writeProgram(t, filepath.Join(t.TempDir(), "engine"), "#!/bin/sh\ncase $1 in run) exit "+status+" ;; inspect) echo no such object >&2; exit 1 ;; esac\n")
		p := (&engineLab{program: engine}).launch(t, "unseen", []Component{box("store", "live")}, "-until", "ready")
		p.exit(want)
		if ready := strings.Contains(p.stderr.String(), "msg=ready"); ready != (want == exitOK) {
			t.Errorf("exit status %s: ready is %t\n%s", status, ready, p)
		}
	}
}

func TestEngine_ImageNeedsOne(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, box("store", "live"), shell("ledgers", "echo started"))
	p := launch(t, file)
	p.exit(exitUsage)
	if want := "flowctl: " + file + ": what has an image needs -orchestrator container: store\n"; p.stderr.String() != want {
		t.Errorf("got\n%swant\n%s", p.stderr, want)
	}
	p = start(t, []string{"run", file, "-orchestrator", "container"}, withEnv("PATH="+t.TempDir()))
	p.exit(exitUsage)
	if want := "flowctl: " + file + ": what has an image needs a container engine: store: neither docker nor podman is in PATH: install one, or name another engine with -engine\n"; p.stderr.String() != want {
		t.Errorf("got\n%swant\n%s", p.stderr, want)
	}
}

// Without an image nothing needs the engine: it may be missing, or not answer.
func TestEngine_NoImageNeedsNone(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, Component{ID: "ledgers", Command: []string{"/bin/sleep", "300"}, Register: new(false)})
	missing := start(t, append(runArgs(file), "-orchestrator", "container"), withEnv("PATH="+t.TempDir()))
	deaf := writeProgram(t, filepath.Join(t.TempDir(), "engine"), "#!/bin/sh\nsleep 300\n")
	silent := start(t, append(runArgs(file), "-orchestrator", "container", "-engine", deaf))
	for _, p := range []*process{missing, silent} {
		p.waitReady()
		p.stop()
	}
}

// A container's processes can call before the engine says that it runs.
func TestEngine_ContainerIsSeenLate(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ early, late, want string }{
		{"created 0 store", "running 77 store 10.0.0.9", "<nil>"},
		{"", "running 77 store 10.0.0.9", "<nil>"}, // it is removed between the two questions
		{"created 0 store", "created 0 store", "engine is starting the container of store"},
	} {
		folder := t.TempDir()
		program := writeProgram(t, filepath.Join(folder, "engine"), fmt.Sprintf(`#!/bin/sh
[ $1 = ps ] && echo a-1 && exit
if mkdir %[1]s/early 2>/dev/null; then said=%[2]q; else said=%[3]q; fi
echo "$said"
[ "$said" ]
`, folder, tt.early, tt.late))
		e, err := findEngine(program)
		if err != nil {
			t.Fatal(err)
		}
		e.name, e.commands, e.env = "engine", newReaper(), baseEnv()
		got, err := e.running()
		if text := fmt.Sprint(err); text != tt.want {
			t.Errorf("%q, then %q: %v, want %q", tt.early, tt.late, err, tt.want)
		}
		if err == nil && (got.byPID[77] != "store" || got.byAddr["10.0.0.9"] != "store") {
			t.Errorf("%q, then %q: %+v", tt.early, tt.late, got)
		}
	}
}

// An engine that does not remove a container is asked again, less and less often.
func TestEngine_RemoveWaitsBetweenTries(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	program := writeProgram(t, filepath.Join(folder, "engine"), fmt.Sprintf("#!/bin/sh\necho $1 >>%s/notes\n[ $1 = ps ] && echo stuck\n[ $1 != rm ]\n", folder))
	e, err := findEngine(program)
	if err != nil {
		t.Fatal(err)
	}
	e.commands, e.env = newReaper(), baseEnv()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if names, err := e.remove(ctx, "label=a"); !slices.Equal(names, []string{"stuck"}) || err == nil {
		t.Errorf("removed %q: %v", names, err)
	}
	if tries := strings.Count(strings.Join(readJournal(t, folder+"/notes"), " "), "rm"); tries < 2 || tries > 6 {
		t.Errorf("%d tries within two seconds, want a few", tries)
	}
}

// A signal waits neither for the engine nor for what a container's command line leaves
// open: here a process that has its standard input, and does not read it.
func TestContainer_SignalDoesNotWait(t *testing.T) {
	t.Parallel()
	program := writeProgram(t, filepath.Join(t.TempDir(), "engine"), "#!/bin/sh\n[ $1 = run ] || exit 0\nexec 3<&0\nsetsid sleep 300 <&3 >/dev/null 2>&1 &\n")
	e, err := findEngine(program)
	if err != nil {
		t.Fatal(err)
	}
	l := newTestLauncher(t)
	e.commands, e.env, l.config.engine = l.config.reaper, append(baseEnv(), runMark+"="+l.mark), e
	ch := l.run(map[string]any{"id": "a", "image": "i", "register": false, "env": map[string]string{
		"A": strings.Repeat("a", 30<<10), "B": strings.Repeat("b", 30<<10), "C": strings.Repeat("c", 30<<10)}}) // more than a pipe holds
	longest := time.Duration(0)
	for len(l.running) > 0 {
		began := time.Now()
		l.signal(ch, syscall.SIGTERM)
		longest = max(longest, time.Since(began))
		select {
		case end := <-l.exits:
			delete(l.running, end.child)
		case <-time.After(time.Millisecond):
		}
	}
	if longest > outputGrace/2 {
		t.Errorf("a signal took %s", longest)
	}
}

// A pull that takes long ends by a signal, and nothing has started.
func TestEngine_StopWhilePulling(t *testing.T) {
	t.Parallel()
	engine := writeProgram(t, filepath.Join(t.TempDir(), "engine"), "#!/bin/sh\ncase $1 in image) exit 1 ;; pull) echo layers; exec sleep 300 ;; esac\n")
	p := (&engineLab{program: engine}).launch(t, "pulls", []Component{box("store", "live")})
	p.waitErr("msg=pulling image=" + boxImage + " said=layers")
	p.stop()
	p.hasNot(p.stderr, "msg=listening", "msg=started")
}

// A container is known by the mark in its environment, and nobody else passes for it.
func (l *engineLab) testRegisters(t *testing.T) {
	store := box("store", "register")
	store.Register = nil
	p := l.launch(t, "registers", []Component{store, actor("ledgers", role{Dialect: "v1"})})
	p.waitReady()
	c := dialPlane(t, p.endpoint())
	_, err := c.register(t.Context(), "legacy", registration{id: "store"})
	wantCode(t, "registering as a container", err, codes.PermissionDenied)
	out, err := l.command(append([]string{"inspect", "--format", `{{range $k, $v := .Config.Labels}}{{$k}}={{$v}} {{end}}`}, l.containers(t, "registers")...)...).Output()
	if text := string(out); err != nil || !strings.Contains(text, "flowctl.component=store ") || !strings.Contains(text, "flowctl.pipeline=registers ") || !strings.Contains(text, "flowctl.run=") {
		t.Errorf("labels %q: %v", out, err)
	}
	p.stop()
	socket := filepath.Join(engineFolder(t), "plane")
	p = l.launch(t, "registers", []Component{store}, "-control-plane-address", "unix:"+socket)
	p.waitReady()
	p.stop()
	l.none(t, "registers")
}

// One with "tls": true is given the files, too.
func (l *engineLab) testTLS(t *testing.T) {
	files := newFiles(t, issue(t, nil, nil), newCA(t))
	store := box("store", "describe", files.cert)
	store.TLS = true
	p := l.launch(t, "tls", []Component{store}, files.flags()...)
	p.waitOut("up describe")
	p.stop()
	p.has(p.stdout, "-----BEGIN CERTIFICATE-----", fmt.Sprintf("env %q\n", "FLOWCTL_TLS_CERT="+files.cert))
	l.none(t, "tls")
}

func (l *engineLab) testStops(t *testing.T) {
	for _, tt := range []struct{ sig, got string }{{"SIGTERM", "got terminated"}, {"SIGUSR1", "got user defined signal 1"}, {"SIGKILL", ""}} {
		name := "stops-" + tt.sig
		store := box("store", "live")
		store.StopSignal = tt.sig
		p := l.launch(t, name, []Component{store})
		p.waitReady()
		p.waitOut("up live")
		p.stop()
		p.has(p.stdout, tt.got)
		p.hasNot(p.stderr, "SIGKILL", "level=ERROR", "containers whose")
		l.none(t, name)
	}
}

// A stop may come while the engine makes the container, or starts it.
func (l *engineLab) testStopsEarly(t *testing.T) {
	p := l.launch(t, "early", []Component{box("store", "live")})
	p.waitErr("msg=started")
	p.stop()
	p.hasNot(p.stderr, "level=ERROR")
	l.none(t, "early")
}

func (l *engineLab) testDeaf(t *testing.T) {
	p := l.launch(t, "deaf", []Component{box("store", "deaf")}, "-stop-timeout", "300ms")
	p.waitOut("up deaf")
	p.stop()
	p.has(p.stderr, "still running, sending SIGKILL", "msg=ended component=store", `reason="exit status 137"`)
	l.none(t, "deaf")
}

func (l *engineLab) testSecondSignal(t *testing.T) {
	p := l.launch(t, "second", []Component{box("store", "deaf"), box("other", "deaf")}, "-stop-timeout", "1h")
	p.wait(p.stdout, "up deaf", 2)
	p.signal(syscall.SIGINT)
	p.waitErr("msg=stopping component=other")
	time.Sleep(2 * repeatTime) // sooner it would be the same signal
	p.signal(syscall.SIGINT)
	p.exit(exitOK)
	l.none(t, "second")
}

// The guard of a flowctl that is killed ends the containers, also one that is just
// being made.
func (l *engineLab) testKilled(t *testing.T) {
	p := l.launch(t, "killed", []Component{box("store", "deaf"), box("other", "live")})
	p.waitOut("up deaf")
	p.signal(syscall.SIGKILL)
	<-p.done
	eventually(t, "the end of the containers", func() bool { return len(l.containers(t, "killed")) == 0 })
}

// What even the guard has not ended the next run removes, but nothing of another's.
func (l *engineLab) testAllKilled(t *testing.T) {
	runs := t.TempDir()
	file := l.write(t, "all-killed", box("store", "deaf"))
	crash := func(folder string) {
		p := l.start(t, file, nil, withEnv("XDG_RUNTIME_DIR="+folder))
		p.waitOut("up deaf")
		guard := guardOf(p)
		if err := syscall.Kill(guard, syscall.SIGSTOP); err != nil { // one that ends is replaced
			t.Fatal(err)
		}
		p.signal(syscall.SIGKILL)
		<-p.done
		if err := syscall.Kill(guard, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.killLeft()
	}
	crash(runs)
	old := l.containers(t, "all-killed")
	crash(t.TempDir()) // which is like the run of another user
	others := slices.DeleteFunc(l.containers(t, "all-killed"), func(name string) bool { return slices.Contains(old, name) })
	if len(old) != 1 || len(others) != 1 {
		t.Fatalf("%q and %q are left, want one each", old, others)
	}
	p := l.start(t, file, []string{"-stop-timeout", "100ms"}, withEnv("XDG_RUNTIME_DIR="+runs))
	p.waitOut("up deaf")
	p.has(p.stderr, "removed containers that a killed run has left", "containers="+old[0])
	p.stop()
	if left := l.containers(t, "all-killed"); !slices.Equal(left, others) {
		t.Errorf("%q are left, want %q", left, others)
	}
	if out, err := l.command("rm", "-f", others[0]).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// A restart is a new container, and the old one is gone before it.
func (l *engineLab) testCommandLineKilled(t *testing.T) {
	store := box("store", "deaf")
	store.RestartPolicy = restartAlways
	p := l.launch(t, "cli", []Component{store}, "-stop-timeout", "100ms")
	p.waitOut("up deaf")
	old := l.containers(t, "cli")
	p.tell("store", syscall.SIGKILL)
	p.wait(p.stdout, "up deaf", 2)
	if now := l.containers(t, "cli"); len(old) != 1 || len(now) != 1 || now[0] == old[0] {
		t.Errorf("the containers were %q, and are %q", old, now)
	}
	p.stop()
	l.none(t, "cli")
}

func (l *engineLab) testEnvironment(t *testing.T) {
	folder := t.TempDir()
	writeFile(t, filepath.Join(folder, "in.txt"), "hello")
	secret := writeFile(t, filepath.Join(t.TempDir(), "secret"), "hush-hush\n")
	env := map[string]string{
		"PATH": "/nowhere", "HOME": "/root/none", "DOCKER_HOST": "unix:///none", "CONTAINER_HOST": "unix:///none", "LD_PRELOAD": "/none.so",
		"EMPTY": "", "ODD": ` "a" 'b' #c $$d \n  `, "LINES": "one\ntwo\r\n\n", "LONG": strings.Repeat("0123456789", 8000), "HASH": "#x", "UMLAUT": "ä",
	}
	store := box("store", "describe", "in.txt")
	store.Env, store.EnvFiles, store.WorkingDir, store.User = env, map[string]string{"TOKEN": secret}, "/data", "12:34"
	store.Volumes = []string{"./data:/data:ro"}
	file := l.write(t, "environment", store)
	if err := os.Rename(folder, filepath.Join(filepath.Dir(file), "data")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(filepath.Dir(file), "data", "in.txt"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(filepath.Dir(file), "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := l.start(t, file, nil, withEnv("FROM_OUTSIDE=1"))
	p.waitOut("up describe")
	argv := procFile(p.pid("store"), "cmdline")
	if strings.Contains(argv, "hush-hush") || !strings.Contains(argv, "--network=host") {
		t.Errorf("the command line is %q", argv)
	}
	p.stop()
	p.has(p.stdout, `uid 12, folder /data, file "hello", <nil>`)
	env["ODD"] = strings.ReplaceAll(env["ODD"], "$$", "$")
	for name, value := range env {
		p.has(p.stdout, fmt.Sprintf("env %q\n", name+"="+value))
	}
	p.has(p.stdout, `env "FLOWCTL_COMPONENT_ID=store"`)
	p.has(p.stdout, `env "TOKEN=hush-hush"`)
	p.hasNot(p.stdout, "FROM_OUTSIDE", "XDG_RUNTIME_DIR", markVar)
	l.none(t, "environment")
}

// An exec: check runs in the container, one by the network as for a process.
func (l *engineLab) testHealth(t *testing.T) {
	serve := box("serve", "serve")
	port := freePort(t)
	serve.Env, serve.HealthCheck = map[string]string{"HEALTH_PORT": port}, "http://127.0.0.1:"+port+"/"
	folder := t.TempDir()
	live := box("live", "live")
	live.HealthCheck, live.HealthInterval, live.Volumes = "exec:/box exists /folder/up", Duration(50*time.Millisecond), []string{folder + ":/folder"}
	p := l.launch(t, "health", []Component{serve, live})
	p.waitErr("msg=ready component=serve")
	p.waitOut("up live")
	p.hasNot(p.stderr, "msg=ready component=live")
	writeFile(t, filepath.Join(folder, "up"), "")
	p.waitErr("msg=ready component=live")
	p.stop()
	l.none(t, "health")
}

func (l *engineLab) testNoImage(t *testing.T) {
	file := l.write(t, "no-image", shell("ledgers", "echo started"),
		Component{ID: "a", Image: "127.0.0.1:1/none:1"}, Component{ID: "b", Image: "127.0.0.1:1/other:1"}, Component{ID: "c", Image: "127.0.0.1:1/none:1"})
	p := l.start(t, file, nil)
	p.exit(exitPlane) // it can pass by itself
	p.has(p.stderr, "msg=pulling image=127.0.0.1:1/none:1", `a, c: image "127.0.0.1:1/none:1" is not here and cannot be pulled: `, `b: image "127.0.0.1:1/other:1" is not here and cannot be pulled: `)
	p.hasNot(p.stderr, "msg=started", "msg=listening")
}

func (l *engineLab) testReload(t *testing.T) {
	file := l.write(t, "reload", box("store", "live"))
	runs := withEnv("XDG_RUNTIME_DIR=" + t.TempDir())
	p := l.start(t, file, nil, runs)
	p.waitReady()
	reload := func(c ...Component) *process {
		data, err := os.ReadFile(l.write(t, "reload", c...))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, file, string(data))
		return start(t, []string{"reload", "reload"}, runs)
	}
	refused := reload(box("store", "live"), Component{ID: "a", Image: "127.0.0.1:1/none:1"})
	refused.exit(exitUsage)
	refused.has(refused.stderr, `a: image "127.0.0.1:1/none:1" cannot be used: `, " pull 127.0.0.1:1/none:1)")
	reload(box("store", "live"), box("a", "live")).exit(exitOK)
	p.wait(p.stdout, "up live", 2)
	p.stop()
	l.none(t, "reload")
}

func (l *engineLab) testFails(t *testing.T) {
	p := l.launch(t, "fails", []Component{box("store", "exit", "7")})
	p.exit(exitFailed)
	p.has(p.stderr, "flowctl: component store failed: exit status 7")
	l.none(t, "fails")
}

// The engine's command line runs before it is known whether the container will.
func (l *engineLab) testDoesNotStart(t *testing.T) {
	missing, nobody := box("store", "live"), box("store", "live")
	missing.Args = []string{"/nonesuch"}
	nobody.User = "nosuchuser"
	for _, store := range []Component{missing, nobody} {
		ledgers := shell("ledgers", "exec sleep 300")
		ledgers.DependsOn = []string{"store"}
		p := l.launch(t, "nonesuch", []Component{store, ledgers}, "-until", "ready")
		p.exit(exitFailed)
		p.has(p.stderr, "flowctl: component store failed: exit status 12", " before it was ready")
		p.hasNot(p.stderr, "msg=ready", "msg=started component=ledgers")
		l.none(t, "nonesuch")
	}
}

// One that is over before it is seen to run has run, and what waits for it starts.
func (l *engineLab) testCompletes(t *testing.T) {
	ledgers := shell("ledgers", "echo started")
	ledgers.DependsOn = []string{"store"}
	p := l.launch(t, "completes", []Component{box("store", "exit", "0"), ledgers})
	p.exit(exitOK)
	p.has(p.stderr, "msg=ready component=store", "msg=started component=ledgers")
	l.none(t, "completes")
}

func (l *engineLab) testRefusedSocket(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		option option
		want   string
	}{
		{withEnv("DOCKER_HOST=unix:///no/such.sock"), "unix:///no/such.sock"},
		{func(p *process) { asNobody(65531)(p); p.cmd.SysProcAttr.Credential.Gid = 65531 }, "run flowctl as a user who may use that socket"},
	} {
		p := l.start(t, publicPipeline(t, box("store", "live")), nil, tt.option)
		p.exit(exitPlane)
		p.has(p.stderr, "flowctl: the container engine docker cannot be used: ", tt.want)
		p.hasNot(p.stderr, "msg=started", "msg=listening")
	}
}

// A flowctl that is not root cannot look into a container, whose id has to do then.
func (l *engineLab) testOtherUser(t *testing.T) {
	t.Parallel()
	store := box("store", "register", "store")
	store.Register = nil
	p := l.start(t, publicPipeline(t, store, shell("ledgers", "exec sleep 300")), nil, asNobody(65530))
	p.waitReady()
	p.signal(syscall.SIGKILL)
	<-p.done
	eventually(t, "the end of the container", func() bool {
		out, err := l.command("ps", "--all", "--quiet", "--filter", "label="+labelOwner, "--filter", "name=flowctl-test-store").Output()
		return err == nil && len(out) == 0
	})
}

// Of what docker says the reason is told, and not the long URL before it.
func TestContainers_EngineThatIsNotOurs(t *testing.T) {
	t.Parallel()
	docker := writeProgram(t, filepath.Join(t.TempDir(), "docker"), `#!/bin/sh
echo 'permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: Get "http://%2Fvar%2Frun%2Fdocker.sock/v1.47/containers/json?all=1": dial unix /var/run/docker.sock: connect: permission denied' >&2; exit 1
`)
	p := launch(t, writePipeline(t, Component{ID: "a", Image: "demo:1"}), "-orchestrator", "container", "-engine", docker)
	p.exit(exitPlane)
	p.has(p.stderr, "socket at unix:///var/run/docker.sock: dial unix /var/run/docker.sock: connect: permission denied (run flowctl as")
}
