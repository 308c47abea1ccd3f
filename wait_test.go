//go:build linux

package main

import (
	"strings"
	"syscall"
	"testing"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// wait starts flowctl wait beside p.
func (p *process) startWait(args ...string) *process {
	p.tb.Helper()
	return start(p.tb, append([]string{"wait"}, args...), beside(p))
}

// ends checks how a command has ended.
func (p *process) ends(code int, stdout string) {
	p.tb.Helper()
	p.exit(code)
	if got := p.stdout.String(); got != stdout {
		p.tb.Errorf("it prints %q, want %q\n%s", got, stdout, p)
	}
}

func TestWait_Ready(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("late", role{Dialect: "v1", Gate: true}), shell("quick", "exec sleep 300")))
	all, late := p.startWait(), p.startWait("late", "-json")
	short := p.startWait("-timeout", "2s", "late")
	all.waitErr("flowctl: waiting for late\n")
	late.waitErr("flowctl: waiting for late\n")
	p.startWait("quick").ends(exitOK, "ready: quick\n")
	short.exit(exitNotReady)
	short.has(short.stderr, "flowctl: -timeout 2s is over: waiting for late (not registered)\n")
	both := p.startWait("-until", "up", "quick")
	both.exit(exitUsage)
	both.has(both.stderr, "flowctl: -until up waits for the control plane alone, not for \"quick\"\nTry: flowctl help wait\n")
	unknown := p.startWait("-e", p.endpoint(), "quick", "fast")
	unknown.exit(exitUsage)
	unknown.has(unknown.stderr, "flowctl: no component \"fast\" is in pipeline test: there is late, quick\nTry: flowctl help wait\n")
	p.waitOut("| waiting\n")
	wantReady(t, p.endpoint(), healthpb.HealthCheckResponse_NOT_SERVING)
	p.tell("late", syscall.SIGUSR2)
	all.ends(exitOK, "ready: late, quick\n")
	wantReady(t, p.endpoint(), healthpb.HealthCheckResponse_SERVING)
	late.ends(exitOK, "{\n  \"pipeline\": \"test\",\n  \"endpoint\": \""+p.endpoint()+"\",\n  \"until\": \"ready\",\n  \"components\": [\n    \"late\"\n  ]\n}\n")
	p.stop()
}

// A run that ends when all have completed says so before it is gone.
func TestWait_Done(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: "legacy", OnUSR1: "exit"}), shell("b", "exit 0")))
	p.waitReady()
	all, one := p.startWait("-until", "done"), p.startWait("-until", "done", "a", "-pipeline", "test")
	all.waitErr("flowctl: waiting for a\n")
	one.waitErr("flowctl: waiting for a\n")
	p.startWait("-until", "done", "b").ends(exitOK, "done: b\n")
	p.tell("a", syscall.SIGUSR1)
	all.ends(exitOK, "done: a, b\n")
	one.ends(exitOK, "done: a\n")
	p.exit(exitOK)
}

// A control plane that is not there yet is waited for, and one that goes, and at one without a pipeline any id.
func TestWait_ForAControlPlane(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	server := []string{"server", "-no-persistence", "-control-plane-port", port}
	w := start(t, []string{"wait", "-e", "localhost:" + port, "later"})
	up := start(t, []string{"wait", "-e", "localhost:" + port, "-until", "up"})
	up.waitErr("flowctl: waiting: ")
	p := start(t, server)
	up.ends(exitOK, "up\n")
	w.waitErr("flowctl: waiting for later\n")
	p.stop()
	w.waitErr("flowctl: waiting: the control plane at localhost:" + port + " has stopped\n")
	p = start(t, server)
	register(t, p.endpoint(), "another")
	p.startWait("-timeout", "1m").ends(exitOK, "ready: another\n")
	register(t, p.endpoint(), "later")
	w.ends(exitOK, "ready: later\n")
	p.stop()
}

// Without -endpoint the one that runs here is waited for.
func TestWait_ForARunHere(t *testing.T) {
	t.Parallel()
	here := runsIn(t.TempDir())
	w := start(t, []string{"wait"}, here)
	w.waitErr("flowctl: waiting: no pipeline runs here yet\n")
	p := start(t, runArgs(sleeper(t)), here)
	w.ends(exitOK, "ready: a\n")
	other := start(t, []string{"server", "-no-persistence", "-control-plane-port", "0"}, here)
	other.endpoint()
	if code, _, stderr := start(t, []string{"wait"}, here).finish(); code != exitPlane || !strings.Contains(stderr, "2 control planes run here: name one by -pipeline or -endpoint: ") {
		t.Errorf("of two: exit %d\n%s", code, stderr)
	}
	if code, _, stderr := start(t, []string{"wait", "-pipeline", "none", "-timeout", "10ms"}, here).finish(); code != exitNotReady || !strings.Contains(stderr, "no pipeline \"none\" runs here yet") {
		t.Errorf("of none: exit %d\n%s", code, stderr)
	}
	p.stop()
	other.stop()
}
