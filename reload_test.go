//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestReload_ChangesWhatTheFileChanged(t *testing.T) {
	t.Parallel()
	kept, changed, gone := actor("kept", role{Dialect: "v1"}), actor("changed", role{Dialect: "legacy"}), actor("gone", role{Dialect: "v1"})
	changed.Inputs, gone.Inputs = []string{"kept"}, []string{"changed"}
	file := writePipeline(t, kept, changed, gone)
	p := launch(t, file)
	p.waitReady()
	before, _ := listed(t, p.endpoint())

	if code, out, stderr := call(t, "reload", "-e", p.endpoint()); code != exitOK || out != "reloaded: nothing has changed\n" || stderr != "" {
		t.Errorf("reload of the same file: exit %d\n%s%s", code, out, stderr)
	}
	changed.Env["HEALTH_PORT"] = freePort(t)
	fresh := actor("fresh-and-longer", role{Dialect: "v1", Anonymous: true})
	fresh.Inputs = []string{"changed"}
	rewrite(t, file, kept, fresh, changed)
	code, out, stderr := call(t, "reload", "-e", p.endpoint())
	if want := "reloaded: added fresh-and-longer, removed gone, restarted changed; 1 unchanged\n"; code != exitOK || out != want || stderr != "" {
		t.Fatalf("reload: exit %d, want %q\n%s%s", code, want, out, stderr)
	}
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
		if code, out, stderr := call(t, "reload", "-e", p.endpoint()); code != exitUsage || out != "" || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d, want %q\n%s%s", tt.name, code, tt.want, out, stderr)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := call(t, "reload", "-e", p.endpoint()); code != exitUsage || !strings.Contains(stderr, "no such file or directory") {
		t.Errorf("no file: exit %d\n%s", code, stderr)
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
	p.has(p.stderr, "has no pipeline to reload\n")
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

// A stop during a reload stops all components, the old and the new.
func TestReload_StopMeanwhileStopsAll(t *testing.T) {
	t.Parallel()
	stubborn := shell("stubborn", `trap "" TERM; echo up; while :; do sleep 1; done`)
	reader := shell("reader", "exec sleep 300")
	reader.DependsOn = []string{"stubborn"}
	file := writePipeline(t, stubborn, reader)
	p := launch(t, file, "-stop-timeout", "1s")
	p.waitReady()
	p.waitOut("up")
	rewrite(t, file, shell("new", "exec sleep 300"))
	if code, out, stderr := call(t, "reload", "-e", p.endpoint()); code != exitOK {
		t.Fatalf("exit %d\n%s%s", code, out, stderr)
	}
	p.waitErr("msg=stopping component=stubborn ")
	p.signal(syscall.SIGTERM)
	p.exit(exitOK)
	p.has(p.stderr, "still running, sending SIGKILL", "component=stubborn")
}

// A second reload that comes before the first is finished replaces its goal.
func TestReload_SecondOneAddsToTheFirst(t *testing.T) {
	t.Parallel()
	slow := shell("slow", `trap "sleep 0.5; exit 0" TERM; echo up; while :; do sleep 0.05; done`)
	stay := shell("stay", "exec sleep 300")
	file := writePipeline(t, slow, stay)
	p := launch(t, file)
	p.waitReady()
	p.waitOut("up")
	reload := func(want string) {
		t.Helper()
		if code, out, stderr := call(t, "reload", "-e", p.endpoint()); code != exitOK || out != want {
			t.Fatalf("exit %d\n%s%s", code, out, stderr)
		}
	}
	rewrite(t, file, stay)
	reload("reloaded: removed slow; 1 unchanged\n")
	rewrite(t, file, slow, stay)
	reload("reloaded: restarted slow; 1 unchanged\n")
	p.wait(p.stderr, "msg=started component=slow ", 2)
	p.wait(p.stdout, "up", 2)
	_, ids := listed(t, p.endpoint())
	if want := []string{"slow", "stay"}; !slices.Equal(ids, want) {
		t.Errorf("listed: %q, want %q", ids, want)
	}
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
	if code, out, stderr := call(t, "reload", "-e", p.endpoint()); code != exitOK {
		t.Fatalf("exit %d\n%s%s", code, out, stderr)
	}
	p.waitErr("msg=ready component=zeta ")
	p.wait(p.stderr, "msg=status ready=2 total=2", 1)
	byID, ids := listed(t, p.endpoint())
	if !byID["a"].Healthy || !byID["zeta"].Healthy || len(ids) != 2 {
		t.Errorf("listed: %+v", byID)
	}
	p.hasNot(p.stderr, "msg=unregistered")
	p.stop()
}

// Components that a reload has added stop in the order of the new file, even if the reload is
// not finished.
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
	if code, out, stderr := call(t, "reload", "-e", p.endpoint()); code != exitOK {
		t.Fatalf("exit %d\n%s%s", code, out, stderr)
	}
	p.waitErr("msg=ready component=reader ")
	p.signal(syscall.SIGTERM)
	p.exit(exitOK)
	p.has(p.stderr, "msg=stopping component=source ", "msg=ended component=source ", "msg=stopping component=reader ")
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
	if code, out, stderr := call(t, "reload", "-e", p.endpoint()); code != exitOK {
		t.Fatalf("exit %d\n%s%s", code, out, stderr)
	}
	p.waitErr("msg=ready component=after ")
	p.has(p.stderr, "msg=ended component=late ", "msg=started component=late ", "msg=ready component=late ", "msg=started component=after ")
	p.stop()
}

func TestReload_FIFOIsRefused(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", "exec sleep 300"))
	p := launch(t, file)
	p.waitReady()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := call(t, "reload", "-e", p.endpoint()); code != exitUsage || !strings.Contains(stderr, "is no plain file, and cannot be read again") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	p.stop()
}

// A reload looks for new images at the engine. While that hangs the loop goes on: it takes
// in ends and heartbeats, and a signal ends the run.
func TestReload_HangingEngineHoldsNothingUp(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	hang, asked := filepath.Join(folder, "hang"), filepath.Join(folder, "asked")
	engine := writeFile(t, filepath.Join(folder, "engine"), `#!/bin/sh
case $1 in
image) [ -e `+hang+` ] && { touch `+asked+`; exec sleep 300; } ;;
inspect) echo true ;;
run) echo $$ >`+folder+`/pid; exec sleep 300 ;;
kill) kill -s ${3#SIG} $(cat `+folder+`/pid) ;;
esac
exit 0
`)
	if err := os.Chmod(engine, 0o755); err != nil {
		t.Fatal(err)
	}
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
	reload := start(t, []string{"reload", "-e", p.endpoint()})
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
	q := &reloads{file: "pipeline.json", read: read, fits: func(*Pipeline) error { return nil }}
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
		request.answer <- reloadAnswer{}
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
			_, err := q.requestReload(t.Context())
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

// rewrite replaces the pipeline file of a run by one with other components.
func rewrite(tb testing.TB, file string, components ...Component) {
	tb.Helper()
	data, err := os.ReadFile(writePipeline(tb, components...))
	if err != nil {
		tb.Fatal(err)
	}
	writeFile(tb, file, string(data))
}
