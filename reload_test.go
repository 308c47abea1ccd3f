//go:build linux

package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

func TestReload_ChangesWhatTheFileChanged(t *testing.T) {
	t.Parallel()
	kept, changed, gone := actor("kept", role{Dialect: "v1"}), actor("changed", role{Dialect: "legacy"}), actor("gone", role{Dialect: "v1"})
	changed.Inputs, gone.Inputs = []string{"kept"}, []string{"changed"}
	file := writePipeline(t, kept, changed, gone)
	p := launch(t, file)
	p.waitReady()
	before, _ := listed(t, p.endpoint())

	p.reload("reloaded: nothing has changed\n")
	changed.Env["HEALTH_PORT"] = freePort(t)
	fresh := actor("fresh-and-longer", role{Dialect: "v1", Anonymous: true})
	fresh.Inputs = []string{"changed"}
	rewrite(t, file, kept, fresh, changed)
	p.reload("reloaded: added fresh-and-longer, removed gone, restarted changed; 1 unchanged\n")
	p.waitErr("msg=ready component=fresh-and-longer ")
	p.wait(p.stderr, "msg=status ready=3 total=3", 2)
	after, ids := listed(t, p.endpoint())
	if want := []string{"kept", "fresh-and-longer", "changed"}; !slices.Equal(ids, want) {
		t.Errorf("listed: %q, want %q", ids, want)
	}
	if b, a := before["kept"], after["kept"]; a.PID != b.PID || !a.Registered.Equal(*b.Registered) || a.Restarts != 0 {
		t.Errorf("what has not changed was touched: before %+v, after %+v", b, a)
	}
	if b, a := before["changed"], after["changed"]; a.PID == b.PID || a.Registered.Equal(*b.Registered) || !strings.HasSuffix(a.Endpoint, ":"+changed.Env["HEALTH_PORT"]+"/health") {
		t.Errorf("what has changed was not restarted: before %+v, after %+v", b, a)
	}
	// What read from the changed one is stopped after it, what is new starts after it.
	p.has(p.stderr,
		"msg=stopping component=changed ", "msg=ended component=changed ", "msg=stopping component=gone ",
		"msg=ready component=changed ", "msg=started component=fresh-and-longer ")
	p.hasNot(p.stderr, "component failed")
	p.stop()
}

func TestReload_WrongFileChangesNothing(t *testing.T) {
	t.Parallel()
	a, b := actor("a", role{Dialect: "v1"}), shell("b", "exec sleep 300")
	file := writePipeline(t, a, b)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, file)
	p.waitReady()
	for _, tt := range []struct{ name, text, want string }{
		{"broken", "{", "flowctl: " + file + ":1:"},
		{"wrong", strings.Replace(string(good), `"command"`, `"comand"`, 1), `did you mean "command"?`},
		{"renamed", strings.Replace(string(good), `"name":"test"`, `"name":"other"`, 1), `metadata.name is "other" now: a pipeline keeps its name, "test", while it runs`},
		{"TLS", strings.Replace(string(good), `"command"`, `"tls": true, "command"`, 1), `"tls": true of a needs -tls-cert and -tls-key`},
	} {
		writeFile(t, file, tt.text)
		if code, out, stderr := p.callReload(); code != exitUsage || out != "" || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d, want %q\n%s%s", tt.name, code, tt.want, out, stderr)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := p.callReload(); code != exitUsage || !strings.Contains(stderr, "no such file or directory") {
		t.Errorf("no file: exit %d\n%s", code, stderr)
	}
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := p.callReload(); code != exitUsage || !strings.Contains(stderr, "is no plain file, and cannot be read again") {
		t.Errorf("a FIFO: exit %d\n%s", code, stderr)
	}
	p.has(p.stderr, "level=ERROR msg=\"cannot reload\"")
	p.hasNot(p.stderr, "msg=stopping")
	p.stop()
}

// Without -endpoint reload takes the only pipeline that runs, or the one that is named, or the
// one whose process is $MAINPID.
func TestReload_FindsTheRunningPipeline(t *testing.T) {
	t.Parallel()
	here := runsIn(t.TempDir())
	reload := func(want int, args ...string) *process {
		p := start(t, append([]string{"reload"}, args...), here)
		p.exit(want)
		return p
	}
	p := reload(exitPlane)
	p.has(p.stderr, "flowctl: no pipeline is running: ")
	server := start(t, []string{"server", "-control-plane-port", "0"}, here)
	server.waitErr("msg=listening")
	p = reload(exitPlane)
	p.has(p.stderr, "flowctl: no pipeline is running here\n")
	p = reload(exitPlane, "-e", server.endpoint())
	p.has(p.stderr, "runs no components: there is nothing to reload\n")
	one := start(t, runArgs(writePipeline(t, shell("a", "exec sleep 300"))), here)
	one.waitReady()
	p = reload(exitOK)
	p.has(p.stdout, "reloaded: nothing has changed\n")
	text, err := os.ReadFile(writePipeline(t, shell("a", "exec sleep 300")))
	if err != nil {
		t.Fatal(err)
	}
	two := start(t, runArgs(writeFile(t, filepath.Join(t.TempDir(), "two.json"), strings.Replace(string(text), `"name":"test"`, `"name":"two"`, 1))), here)
	two.waitReady()
	p = reload(exitPlane)
	p.has(p.stderr, "flowctl: 2 pipelines are running: name one of test, two\n")
	p = reload(exitPlane, "three")
	p.has(p.stderr, "flowctl: no pipeline \"three\" is running, only test, two\n")
	reload(exitOK, "two")
	two.waitErr("msg=reloaded ")
	p = start(t, []string{"reload"}, here, withEnv(fmt.Sprintf("MAINPID=%d", two.cmd.Process.Pid)))
	p.exit(exitOK)
	two.wait(two.stderr, "msg=reloaded ", 2)
	one.stop()
	two.stop()
	server.stop()
}

// Under systemd SIGHUP reloads, and systemd is told. Elsewhere SIGHUP ends the run.
func TestReload_BySIGHUPUnderSystemd(t *testing.T) {
	t.Parallel()
	a, b := shell("a", "exec sleep 300"), shell("b", "exec sleep 300")
	file := writePipeline(t, a)
	p := start(t, runArgs(file), notifySocket(t, filepath.Join(shortDir(t), "notify")))
	p.waitReady()
	rewrite(t, file, a, b)
	p.signal(syscall.SIGHUP)
	p.waitErr("msg=ready component=b ")
	p.wait(p.notified, "STATUS=2 of 2 ready", 1)
	p.has(p.notified, "READY=1\n", "RELOADING=1\nMONOTONIC_USEC=", "READY=1\n")
	writeFile(t, file, "{}")
	p.signal(syscall.SIGHUP)
	p.waitErr("msg=\"cannot reload\"")
	p.wait(p.notified, "READY=1\n", 3)
	p.stop()

	p = launch(t, writePipeline(t, a))
	p.waitReady()
	p.signal(syscall.SIGHUP)
	p.exit(exitOK)
}

// A second reload that comes before the first is finished replaces its goal.
func TestReload_SecondOneAddsToTheFirst(t *testing.T) {
	t.Parallel()
	slow := shell("slow", `trap "sleep 3; exit 0" TERM; echo up; while :; do sleep 0.05; done`)
	stay := shell("stay", "exec sleep 300")
	file := writePipeline(t, slow, stay)
	p := launch(t, file)
	p.waitReady()
	p.waitOut("up")
	rewrite(t, file, stay)
	if code, out, stderr := start(t, []string{"reload", "-wait=false"}, beside(p)).finish(); code != exitOK || out != "reloaded: removed slow; 1 unchanged\n" {
		t.Errorf("reload: exit %d\n%s%s", code, out, stderr)
	}
	rewrite(t, file, slow, stay)
	p.reload("reloaded: restarted slow; 1 unchanged\n")
	p.wait(p.stderr, "msg=started component=slow ", 2)
	p.wait(p.stdout, "up", 2)
	_, ids := listed(t, p.endpoint())
	if want := []string{"slow", "stay"}; !slices.Equal(ids, want) {
		t.Errorf("listed: %q, want %q", ids, want)
	}
	p.stop()
}

// What a reload starts can have what it stops has left: a port, by another id.
func TestReload_NewComponentsComeAfterWhatLeaves(t *testing.T) {
	t.Parallel()
	serve := func(id string) Component {
		return shell(id, `mkdir lock || exit 1; trap "sleep 0.5; rmdir lock; exit 0" TERM; while :; do sleep 0.02; done`)
	}
	stay := shell("stay", "exec sleep 300")
	file := writePipeline(t, serve("before"), stay)
	p := launch(t, file)
	p.waitReady()
	rewrite(t, file, serve("after"), stay)
	p.reload("reloaded: added after, removed before; 1 unchanged\n")
	p.waitErr("msg=ready component=after ")
	p.has(p.stderr, "msg=ended component=before ", "msg=started component=after ")
	p.stop()
}

func TestReload_WhatItBroughtFailsAlone(t *testing.T) {
	t.Parallel()
	stay, bad := shell("stay", "exec sleep 300"), actor("bad", role{End: "early", Code: 3})
	file := writePipeline(t, stay)
	p := launch(t, file)
	p.waitReady()
	rewrite(t, file, stay, bad)
	if code, out, stderr := p.callReload(); code != exitFailed || out != "reloaded: added bad; 1 unchanged\n" || stderr != "flowctl: component bad failed: exit status 3 before it was ready\n" {
		t.Errorf("reload: exit %d\n%s%s", code, out, stderr)
	}
	p.waitErr(`msg="what a reload or restart brought has failed, the others go on" component=bad reason="exit status 3 before it was ready"`)
	p.waitErr("failed=bad")
	if list, _ := listed(t, p.endpoint()); list["bad"].State != procFailed.String() || list["bad"].Healthy || !list["stay"].Healthy {
		t.Errorf("listed: %+v", list)
	}
	rewrite(t, file, stay)
	p.reload("reloaded: removed bad; 1 unchanged\n")
	p.stop()
}

func TestReload_EnvFileWithAnotherContentIsAChange(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("other", "exec sleep 300"))
	key := writeFile(t, filepath.Join(filepath.Dir(file), "key"), "one\n")
	has := shell("has", "echo key $KEY; exec sleep 300")
	has.EnvFiles = map[string]string{"KEY": key}
	rewrite(t, file, has, shell("other", "exec sleep 300"))
	p := launch(t, file)
	p.waitOut("has   | key one\n")
	writeFile(t, key, "one") // the newline is none of it
	p.reload("reloaded: nothing has changed\n")
	writeFile(t, key, "two")
	p.reload("reloaded: restarted has; 1 unchanged\n")
	p.waitOut("has   | key two\n")
	must(t, os.Remove(key))
	if code, _, stderr := p.callReload(); code != exitUsage || !strings.Contains(stderr, "component has: env_files.KEY: open "+key) {
		t.Errorf("no such file: exit %d\n%s", code, stderr)
	}
	p.stop()
}

// A release is a folder, to which a link leads: after the link was changed the file is the new one.
func TestReload_ReadsThePathAndNotTheFolderOfTheStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	current := filepath.Join(dir, "current")
	for i, id := range []string{"one", "two"} {
		release := filepath.Join(dir, id)
		must(t, os.Rename(filepath.Dir(writePipeline(t, shell("version-"+id, "cat version; exec sleep 300"))), release))
		writeFile(t, filepath.Join(release, "version"), fmt.Sprintln("release", i+1))
	}
	must(t, os.Symlink("one", current))
	p := start(t, runArgs("pipeline.json"), inFolder(current), withEnv("PWD="+current))
	p.waitOut("release 1")
	must(t, os.Remove(current))
	must(t, os.Symlink("two", current))
	p.reload("reloaded: added version-two, removed version-one; 0 unchanged\n")
	p.waitOut("release 2")
	p.stop()
}

// A component that registered under another id keeps its registration when a reload adds a
// component of that id.
func TestReload_NewComponentMayHaveAnAliasAsItsID(t *testing.T) {
	t.Parallel()
	a := actor("a", role{Dialect: "legacy", Alias: "zeta"})
	file := writePipeline(t, a)
	p := launch(t, file)
	p.waitReady()
	rewrite(t, file, a, actor("zeta", role{Dialect: "v1"}))
	p.reload("reloaded: ")
	p.waitErr("msg=ready component=zeta ")
	p.wait(p.stderr, "msg=status ready=2 total=2", 1)
	byID, ids := listed(t, p.endpoint())
	if !byID["a"].Healthy || !byID["zeta"].Healthy || len(ids) != 2 {
		t.Errorf("listed: %+v", byID)
	}
	p.hasNot(p.stderr, "msg=unregistered")
	p.stop()
}

// A stop during a reload stops all components, and those that the reload has added in the order
// of the new file.
func TestReload_StopMeanwhileKeepsTheOrder(t *testing.T) {
	t.Parallel()
	slow := shell("slow", `trap "" TERM; echo up; while :; do sleep 0.05; done`)
	source, reader := shell("source", `trap "sleep 0.3; exit 0" TERM; while :; do sleep 0.02; done`), shell("reader", "exec sleep 300")
	reader.Inputs = []string{"source"}
	file := writePipeline(t, slow)
	p := launch(t, file, "-stop-timeout", "3s")
	p.waitReady()
	p.waitOut("up\n")
	rewrite(t, file, source, reader)
	p.reload("reloaded: ")
	p.waitErr("msg=ready component=reader ")
	p.stop()
	p.has(p.stderr, "msg=stopping component=source ", "msg=ended component=source ", "msg=stopping component=reader ")
	p.has(p.stderr, "still running, sending SIGKILL", "component=slow")
}

// While a component is being replaced its readers wait for the new process, even if the old
// one becomes ready while it stops.
func TestReload_RetiringComponentIsNotReady(t *testing.T) {
	t.Parallel()
	late := actor("late", role{Dialect: "v1"})
	stubborn := shell("stubborn", `trap "sleep 0.5; exit 0" TERM; echo up; while :; do sleep 0.02; done`)
	late.Inputs = []string{"stubborn"}
	file := writePipeline(t, stubborn, late)
	p := launch(t, file)
	p.waitReady()
	p.waitOut("up\n")
	late.Env["CHANGED"], stubborn.Env = "1", map[string]string{"CHANGED": "1"}
	after := shell("after", "exec sleep 300")
	after.Inputs = []string{"late"}
	rewrite(t, file, stubborn, late, after)
	p.reload("reloaded: ")
	p.waitErr("msg=ready component=after ")
	p.has(p.stderr, "msg=ended component=late ", "msg=started component=late ", "msg=ready component=late ", "msg=started component=after ")
	p.stop()
}

// A reload looks for new images at the engine. While that hangs the loop goes on: it takes
// in ends and heartbeats, and a signal ends the run.
func TestReload_HangingEngineHoldsNothingUp(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	hang, asked := filepath.Join(folder, "hang"), filepath.Join(folder, "asked")
	engine := writeProgram(t, filepath.Join(folder, "engine"), `#!/bin/sh
case $1 in
image) [ -e `+hang+` ] && { touch `+asked+`; exec sleep 300; } ;;
inspect) echo true ;;
run) echo $$ >`+folder+`/pid; exec sleep 300 ;;
kill) kill -s ${3#SIG} $(cat `+folder+`/pid) ;;
esac
exit 0
`)
	store, a := box("store", "live"), actor("a", role{Dialect: "v1", OnUSR1: "exit", Code: 1})
	a.RestartPolicy = "on-failure"
	l := &engineLab{program: engine}
	file := l.write(t, "hangs", store, a)
	p := l.start(t, file, nil)
	p.waitReady()
	writeFile(t, hang, "")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file, strings.Replace(string(text), boxImage, "new:1", 1))
	reload := start(t, []string{"reload"}, beside(p))
	eventually(t, "the engine is asked for the image", func() bool {
		_, err := os.Stat(asked)
		return err == nil
	})
	p.tell("a", syscall.SIGUSR1)
	p.wait(p.stderr, "msg=ready component=a ", 2)
	p.stop()
	reload.exit(exitPlane)
	reload.has(reload.stderr, "the pipeline is stopping")
	p.hasNot(p.stderr, "cannot reload")
}

// fakeReloads are reloads whose file is what read returns.
func fakeReloads(t *testing.T, read func() (*Pipeline, error)) *reloads {
	t.Helper()
	q := &reloads{file: "pipeline.json", read: func(string) (*Pipeline, error) { return read() }, refresh: func() {}, watch: func(string, *Pipeline) {}, warner: newWarner(nil, time.Minute, slog.New(slog.DiscardHandler)), fits: func(*Pipeline) error { return nil }}
	q.start(parseParts(t, []map[string]any{comp("a", nil)}, nil))
	return q
}

// A request that comes while another one reads the file reads it later, so that the loop never
// gets an older file after a newer one.
func TestReload_RequestsComeInTheOrderOfTheirFiles(t *testing.T) {
	t.Parallel()
	reading, proceed := make(chan int), make(chan struct{})
	reads := 0 // which are one at a time: else the race detector tells
	q := fakeReloads(t, func() (*Pipeline, error) {
		reads++
		reading <- reads
		<-proceed
		return parseParts(t, []map[string]any{comp("a", map[string]any{"type": strconv.Itoa(reads)})}, nil), nil
	})
	defer q.close()
	for range 2 {
		q.requestBySignal()
	}
	for want := 1; want <= 2; want++ {
		if got := <-reading; got != want {
			t.Fatalf("read %d begins, want %d", got, want)
		}
		proceed <- struct{}{}
		request := <-q.requests
		if got := request.pipeline.Spec.Sources[0].Type; got != strconv.Itoa(want) {
			t.Errorf("the loop gets read %s, want %d", got, want)
		}
		close(request.done)
	}
}

// The end of the run is not held up by requests, wherever they are, and they hear of it.
func TestReload_RequestsEndWithTheRun(t *testing.T) {
	t.Parallel()
	reading, proceed := make(chan struct{}, 1), make(chan struct{})
	q := fakeReloads(t, func() (*Pipeline, error) {
		reading <- struct{}{}
		<-proceed
		return nil, errors.New("too late")
	})
	errs := make(chan error)
	for range 2 { // one reads the file, the other one waits for its turn
		go func() {
			_, err := q.requestReload(t.Context(), "", false)
			errs <- err
		}()
	}
	<-reading
	q.close()
	close(proceed)
	for range 2 {
		if err := <-errs; !errors.Is(err, errStopping) {
			t.Errorf("got %v, want %v", err, errStopping)
		}
	}
}

// reload has a run read its file again, which is to go well and to tell what begins so.
func (p *process) reload(want string) {
	p.tb.Helper()
	if code, out, stderr := p.callReload(); code != exitOK || !strings.HasPrefix(out, want) || stderr != "" {
		p.tb.Fatalf("reload: exit %d, want %q\n%s%s", code, want, out, stderr)
	}
}

// rewrite replaces the pipeline file of a run by one with other components.
func rewrite(tb testing.TB, file string, components ...Component) {
	tb.Helper()
	data, err := os.ReadFile(writePipeline(tb, components...))
	if err != nil {
		tb.Fatal(err)
	}
	writeFile(tb, file, string(data))
}

// Who may reload is the user of flowctl on its socket, from no component, and whoever has a
// certificate with a name of -operators.
func TestReload_OperatorsAlone(t *testing.T) {
	t.Parallel()
	const denied = "only an operator may do that: "
	reload := flowctlProgram() + " reload"
	file := writePipeline(t, shell("a", "until [ -e "+filepath.Join(t.TempDir(), "never")+" ]; do "+reload+" 2>&1; echo code $?; sleep 300; done"))
	p := start(t, runArgs(file, "--", "sh", "-c", reload+" && exec sleep 300"))
	p.waitOut("reloaded: nothing has changed") // by the command after --
	p.waitErr("| flowctl: " + denied)          // by a component
	p.waitErr("| code 3")
	_, err := operatorv1.NewOperatorClient(dialPlane(t, p.endpoint()).conn).Reload(t.Context(), &operatorv1.ReloadRequest{})
	wantCode(t, "over TCP", err, codes.PermissionDenied)
	if code, out, stderr := p.callReload(); code != exitOK || stderr != "" {
		t.Errorf("by its user: %d, %s%s", code, out, stderr)
	}
	p.signal(syscall.SIGTERM)
	p.exit(128 + int(syscall.SIGTERM)) // of the command

	ca := newCA(t)
	named := func(name string) *testCert {
		return issue(t, ca, func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames = "", []string{"localhost", name} })
	}
	files := newFiles(t, named("plane.example"), ca)
	over := start(t, runArgs(file, append(files.mutual(), "-operators", "ops.example,others.example")...))
	over.waitReady()
	for name, want := range map[string]codes.Code{"ops.example": codes.OK, "others.example": codes.OK, "ops.example.com": codes.PermissionDenied} {
		client, _ := dialTLS(t, over.endpoint(), trust(ca, named(name)))
		_, err := operatorv1.NewOperatorClient(client.conn).Reload(t.Context(), &operatorv1.ReloadRequest{})
		wantCode(t, "with the certificate of "+name, err, want)
	}
	over.stop()
}

// Of those who reach the operators' socket, whatever its mode, flowctl's own user and root are
// operators; no other user is, nor who is in another pid namespace.
func TestReload_WhoIsAnOperator(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	const uid, other = 65524, 65523
	orphan := `(setsid env -i XDG_RUNTIME_DIR="$XDG_RUNTIME_DIR" sh -c '(sleep 0.5; ` + flowctlProgram() + ` reload 2>&1) &' &); exec sleep 300`
	p := start(t, runArgs(publicPipeline(t, shell("a", orphan))), asNobody(uid))
	p.waitReady()
	p.waitOut("| flowctl: only an operator may do that: ") // which flowctl has adopted, and cannot tell of whom
	folder := filepath.Join(strings.TrimPrefix(p.cmd.Env[len(p.cmd.Env)-1], "XDG_RUNTIME_DIR="), "flowctl")
	must(t, os.Chmod(filepath.Dir(folder), 0o755))
	must(t, os.Chmod(folder, 0o755))
	for _, tt := range []struct {
		name     string
		uid      int
		command  []string
		anyone   bool // the socket has a mode for all
		operates bool
	}{
		{"its user", uid, nil, false, true},
		{"root", 0, nil, false, true},
		{"another user", other, nil, false, false},
		{"another user, by the socket", other, nil, true, false},
		{"its user, of another pid namespace", uid, []string{"unshare", "--pid", "--fork"}, false, false},
		{"root, of another pid namespace", 0, []string{"unshare", "--pid", "--fork"}, false, false},
	} {
		if tt.anyone {
			must(t, os.Chmod(filepath.Join(folder, "pipeline-test.sock"), 0o666))
		}
		command := slices.Concat(tt.command, []string{"setpriv", fmt.Sprint("--reuid=", tt.uid), "--regid=65534", "--clear-groups", flowctlProgram(), "reload"})
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Env = append(slices.Clone(p.cmd.Env), "RUNTIME_DIRECTORY="+folder)
		out, err := cmd.CombinedOutput()
		switch want := map[bool]string{true: "reloaded: ", false: "flowctl: only an operator may do that: "}[tt.operates]; {
		case strings.Contains(string(out), "unshare failed"):
			t.Logf("%s: %s", tt.name, out)
		case !strings.HasPrefix(string(out), want) || (err == nil) != tt.operates:
			t.Errorf("%s: %v, want %q\n%s", tt.name, err, want, out)
		}
	}
	p.stop()
}

// A reload is answered when what it brings is ready, also by another file, which stays that of the run.
func TestReload_WaitsForWhatItBrings(t *testing.T) {
	t.Parallel()
	stay := shell("stay", "exec sleep 300")
	slow, waits := actor("slow", role{Dialect: "v1", Gate: true}), shell("waits", "exec sleep 300")
	waits.DependsOn = []string{"slow"}
	file := writePipeline(t, stay)
	p := launch(t, file)
	p.waitReady()
	rewrite(t, file, stay, slow, waits)
	reload := start(t, []string{"reload"}, beside(p))
	p.waitOut(" | waiting\n")
	if code, out, stderr := start(t, []string{"reload", "-wait=false"}, beside(p)).finish(); code != exitOK || out != "reloaded: nothing has changed\n" {
		t.Errorf("reload -wait=false: exit %d\n%s%s", code, out, stderr)
	}
	select {
	case <-reload.done:
		t.Errorf("it did not wait\n%s", reload)
	default:
	}
	p.tell("slow", syscall.SIGUSR2)
	reload.exit(exitOK)
	reload.has(reload.stdout, "reloaded: added slow, waits; 1 unchanged\n")
	if list, _ := listed(t, p.endpoint()); !list["waits"].Healthy {
		t.Errorf("it is answered before all are ready: %+v", list)
	}

	slow = actor("slow", role{End: "early", Code: 3})
	other := writePipeline(t, stay, slow, waits)
	code, out, stderr := start(t, []string{"apply", "-f", other}, beside(p)).finish()
	if want := "flowctl: component slow failed: exit status 3 before it was ready\nflowctl: component waits is not ready: it waits for slow, which has failed\n"; code != exitFailed || stderr != want {
		t.Errorf("apply: exit %d\n%s%s", code, out, stderr)
	}
	rewrite(t, other, stay)
	if code, out, stderr := start(t, []string{"reload", "-json"}, beside(p)).finish(); code != exitOK || !strings.Contains(out, `"removed": [`) {
		t.Errorf("reload -json: exit %d\n%s%s", code, out, stderr)
	}
	p.waitErr("msg=reloaded file=" + other)
	p.stop()
}

// Random reloads of real processes: ids, orders, commands, env_files and oneshots. After each what the file
// lists runs, and what has not changed has the process that it had.
func TestReload_RandomRounds(t *testing.T) {
	t.Parallel()
	rounds, _ := strconv.Atoi(os.Getenv("FLOWCTL_RELOADS"))
	rounds = max(rounds, 10)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	dir := t.TempDir()
	draw := func() (components []Component, made map[string]string) { // made: all that a component is made of, by id
		made = make(map[string]string)
		components, made["stays"] = append(components, shell("stays", "exec sleep 9000")), ""
		locks := random.Perm(3) // which only one can have at a time
		for _, i := range random.Perm(6)[:1+random.IntN(6)] {
			id, version, secret := fmt.Sprintf("c%d", i), random.IntN(2), fmt.Sprint(random.IntN(2))
			c := shell(id, fmt.Sprintf(": %d; exec sleep 9000", version))
			switch {
			case i < len(locks):
				lock := filepath.Join(dir, fmt.Sprintf("lock%d", locks[i]))
				c = shell(id, fmt.Sprintf("mkdir %s || exit 9; trap 'sleep 0.%d; rmdir %[1]s; exit 0' TERM; : %d; while :; do sleep 0.02; done", lock, random.IntN(2), version))
			case i == 5:
				c = shell(id, fmt.Sprintf("echo %d", version))
				c.Oneshot, c.Register = true, nil
			}
			c.EnvFiles = map[string]string{"SECRET": writeFile(t, filepath.Join(dir, id), secret)}
			if random.IntN(2) == 0 {
				c.DependsOn = []string{components[random.IntN(len(components))].ID}
			}
			components = append(components, c)
			made[id] = fmt.Sprint(c.Command, c.DependsOn, secret)
		}
		random.Shuffle(len(components), func(i, j int) { components[i], components[j] = components[j], components[i] })
		return components, made
	}
	components, made := draw()
	file := writePipeline(t, components...)
	p := launch(t, file)
	p.waitReady()
	before, _ := listed(t, p.endpoint())
	for round := range rounds {
		next, now := draw()
		rewrite(t, file, next...)
		if code, out, stderr := p.callReload(); code != exitOK {
			t.Fatalf("round %d: exit %d\n%s%s\n%s", round, code, out, stderr, p)
		}
		after, ids := listed(t, p.endpoint())
		var want []string
		for _, c := range next {
			want = append(want, c.ID)
			was, is := before[c.ID], after[c.ID]
			if !is.Healthy {
				t.Errorf("round %d: %s is %s: %s", round, c.ID, is.State, is.Cause)
			}
			if was.ID != "" && made[c.ID] == now[c.ID] && was.PID != is.PID {
				t.Errorf("round %d: %s, which has not changed, had pid %d and has %d", round, c.ID, was.PID, is.PID)
			}
		}
		wantEqual(t, fmt.Sprintf("components after round %d", round), fmt.Sprint(ids), fmt.Sprint(want))
		before, made = after, now
	}
	p.stop()
	p.hasNot(p.stderr, "failed")
}

// What a reload takes out has ended when it is answered.
func TestReload_WaitsForWhatLeaves(t *testing.T) {
	t.Parallel()
	slow, stay := shell("slow", "trap 'sleep 1; exit 0' TERM; echo up; while :; do sleep 0.02; done"), shell("stay", "exec sleep 300")
	file := writePipeline(t, slow, stay)
	p := launch(t, file)
	p.waitReady()
	rewrite(t, file, stay)
	p.reload("reloaded: removed slow; 1 unchanged\n")
	p.waitErr("msg=ended component=slow ") // the log may come after the answer
	if _, ids := listed(t, p.endpoint()); !slices.Equal(ids, []string{"stay"}) {
		t.Errorf("listed: %q", ids)
	}
	p.stop()
}

// What a reload has added and taken out again leaves no descriptor and no open log file.
func TestReload_LeavesNothingBehind(t *testing.T) {
	t.Parallel()
	stay := shell("stay", "exec sleep 300")
	file := writePipeline(t, stay)
	p := launch(t, file, "-log-dir", t.TempDir())
	p.waitReady()
	open := func() int { return len(get(os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)))(t)) }
	round := func() {
		many := []Component{stay}
		for i := range 60 {
			many = append(many, shell(fmt.Sprintf("c%d", i), "echo up; exec sleep 300"))
		}
		rewrite(t, file, many...)
		p.reload("reloaded: added ")
		rewrite(t, file, stay)
		p.reload("reloaded: removed ")
	}
	round()
	before := open()
	round()
	eventually(t, fmt.Sprintf("the %d descriptors that were open before", before), func() bool { return open() <= before })
	p.stop()
}
