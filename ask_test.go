//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"google.golang.org/grpc/codes"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// ask runs a command that finds by itself what p runs.
func (p *process) ask(args ...string) (code int, stdout, stderr string) {
	p.tb.Helper()
	return start(p.tb, args, beside(p)).finish()
}

// wantAsk fails the test unless ask ends so, with outputs that match.
func (p *process) wantAsk(args []string, code int, stdout, stderr string) {
	p.tb.Helper()
	gotCode, gotOut, gotErr := p.ask(args...)
	if gotCode != code || !regexp.MustCompile(`^(?:`+stdout+`)$`).MatchString(gotOut) || !regexp.MustCompile(`^(?:`+stderr+`)$`).MatchString(gotErr) {
		p.tb.Errorf("%q: exit %d, want %d, %q and %q\n%s%s", args, gotCode, code, stdout, stderr, gotOut, gotErr)
	}
}

// A restart looks up program, PATH and env_files again, touches nothing else, and ends when the component
// is ready again.
func TestRestart_TakesWhatIsThereNow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	must(t, os.Mkdir(first, 0o755))
	must(t, os.Mkdir(second, 0o755))
	program := func(name, version string) {
		writeProgram(t, name+".new", "#!/bin/sh\necho \""+version+" $SECRET\"\nexec sleep 300\n")
		must(t, os.Rename(name+".new", name))
	}
	program(filepath.Join(dir, "built"), "built 1")
	program(filepath.Join(second, "found"), "found 1")
	secret := writeFile(t, filepath.Join(dir, "secret"), "one\n")
	built := Component{ID: "built", Command: []string{filepath.Join(dir, "built")}, Register: new(false), EnvFiles: map[string]string{"SECRET": secret}}
	found := Component{ID: "found", Command: []string{"found"}, Register: new(false)}
	reader := actor("reader", role{Dialect: "v1"})
	reader.Inputs = []string{"built"}
	p := start(t, runArgs(writePipeline(t, built, found, reader)), withEnv("PATH="+first+":"+second+":"+os.Getenv("PATH")))
	p.waitReady()
	before, _ := listed(t, p.endpoint())

	program(filepath.Join(dir, "built"), "built 2")
	program(filepath.Join(first, "found"), "found 2")
	writeFile(t, secret, "two\n")
	p.wantAsk([]string{"restart", "found", "built"}, exitOK, "restarted found, built\n", "")
	p.waitOut("| built 2 two\n")
	p.waitOut("| found 2 \n")
	after, _ := listed(t, p.endpoint())
	for _, id := range []string{"built", "found"} {
		if before[id].PID == after[id].PID {
			t.Errorf("%s has its former process", id)
		}
	}
	if before["reader"].PID != after["reader"].PID {
		t.Error("reader was touched")
	}
	p.wantAsk([]string{"restart", "reader"}, exitOK, "restarted reader\n", "")
	again, _ := listed(t, p.endpoint())
	if r := again["reader"]; r.PID == after["reader"].PID || r.State != "ready" || !r.Healthy {
		t.Errorf("restart has ended, and reader is %+v", r)
	}
	p.stop()
}

// One that has completed is started again.
func TestRestart_OfWhatHasCompleted(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, shell("once", "echo done"), shell("a", "exec sleep 300")))
	p.waitReady()
	p.waitErr("msg=ended component=once ")
	p.wantAsk([]string{"restart", "once"}, exitOK, "restarted once\n", "")
	p.wait(p.stdout, "| done\n", 2)
	p.stop()
}

// A restart of what cannot be ready again says what has happened.
func TestRestart_OfABrokenProgram(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, script string
		register     bool
		json         bool
		want         string // on standard error, or of JSON on standard output
	}{
		{"ends", "echo bad luck >&2\nexit 3\n", false, false,
			"flowctl: component a failed: exit status 3.*\nflowctl: the last lines of a:\nflowctl:   bad luck\n"},
		{"ends before it has registered", "exit 3\n", true, false, "flowctl: component a failed: exit status 3 before it was ready\n"},
		{"cannot be run", "", false, false, "flowctl: component a failed: cannot run .*: it is a folder\n"},
		{"in JSON", "echo bad luck\nexit 3\n", false, true, `"id": "a",\n    "ready": false,\n    "state": "failed",\n    "cause": "exit status 3.*",\n    "last_lines": \[\n      "bad luck"\n    \]`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			program := filepath.Join(t.TempDir(), "program")
			a := actor("a", role{Dialect: "v1"})
			works := strings.Join(a.Command, " ")
			if writeProgram(t, program, "#!/bin/sh\nexec "+works+"\n"); !tt.register {
				a.Register = new(false)
			}
			a.Command = []string{program}
			p := launch(t, writePipeline(t, a, shell("b", "exec sleep 300")))
			p.waitReady()
			must(t, os.Remove(program))
			if tt.script != "" {
				writeProgram(t, program, "#!/bin/sh\n"+tt.script)
			} else {
				must(t, os.Mkdir(program, 0o755))
			}
			args := []string{"restart", "a"}
			if tt.json {
				args = append(args, "-json")
			}
			code, out, stderr := p.ask(args...)
			text := stderr
			if tt.json {
				text = out
			}
			if code != exitFailed || !regexp.MustCompile(tt.want).MatchString(text) {
				t.Errorf("exit %d, want %q\n%s%s", code, tt.want, out, stderr)
			}
			must(t, os.Remove(program))
			writeProgram(t, program, "#!/bin/sh\nexec "+works+"\n")
			p.wantAsk([]string{"restart", "a"}, exitOK, "restarted a\n", "") // the run goes on
			p.hasNot(p.stderr, "msg=stopping component=b ")
			p.stop()
		})
	}
}

// A wrong restart changes nothing.
func TestRestart_Refused(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, shell("ledgers", "exec sleep 300")))
	p.waitReady()
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"restart"}, exitUsage, "flowctl: restart: name the components.*\nTry: flowctl help restart\n"},
		{[]string{"restart", ""}, exitUsage, "flowctl: restart \"\": the argument must be a name.*\n.*\n"},
		{[]string{"restart", "ledgers", "ledger"}, exitUsage, "flowctl: no component \"ledger\" is in the pipeline, did you mean \"ledgers\"\\?\n"},
		{[]string{"restart", "xyz"}, exitUsage, "flowctl: no component \"xyz\" is in the pipeline: there is ledgers\n"},
		{[]string{"restart", "-pipeline", "other", "ledgers"}, exitPlane, "flowctl: no pipeline \"other\" is running, only test\n"},
		{[]string{"restart", "-pipeline", "test", "-e", "127.0.0.1:1", "ledgers"}, exitUsage, "flowctl: -endpoint \"127.0.0.1:1\" and -pipeline \"test\": name one of them\n.*\n"},
		{[]string{"restart", "-e", "127.0.0.1:1", "ledgers"}, exitPlane, "flowctl: no control plane answers at 127.0.0.1:1: .*\n"},
	} {
		p.wantAsk(tt.args, tt.code, "", tt.want)
	}
	p.hasNot(p.stderr, "msg=stopping")
	p.stop()
}

// Without -wait a restart ends at once, with it only when the component is ready; one that has stopped
// slowly is waited for, and the end of the run is an answer.
func TestRestart_Waits(t *testing.T) {
	t.Parallel()
	gated := actor("gated", role{Dialect: "v1", Gate: true})
	slow := shell("slow", `trap "until [ -e `+filepath.Join(t.TempDir(), "never")+` ]; do sleep 0.05; done" TERM; echo up; while :; do sleep 0.05; done`)
	p := launch(t, writePipeline(t, gated, slow))
	p.waitOut("waiting\n")
	p.tell("gated", syscall.SIGUSR2)
	p.waitReady()
	p.waitOut("up\n")
	p.wantAsk([]string{"restart", "gated", "-wait=false"}, exitOK, "restarting gated\n", "")
	p.wait(p.stdout, "waiting\n", 2)
	waiting := start(t, []string{"restart", "gated"}, beside(p))
	p.wait(p.stdout, "waiting\n", 3)
	p.wait(p.stderr, "msg=started component=gated ", 3)
	stopping := start(t, []string{"restart", "slow"}, beside(p))
	p.wait(p.stderr, "msg=stopping component=slow ", 1)
	select {
	case <-waiting.done:
		t.Errorf("it did not wait\n%s", waiting)
	default:
	}
	p.tell("gated", syscall.SIGUSR2)
	waiting.exit(exitOK)
	p.signal(syscall.SIGTERM)
	stopping.exit(exitFailed)
	stopping.has(stopping.stderr, "flowctl: component slow is not ready: the pipeline is stopping\n")
	p.wantAsk([]string{"restart", "slow"}, exitPlane, "", "flowctl: no control plane answers at .*: the pipeline is stopping\n")
	p.signal(syscall.SIGTERM) // kills slow
	p.exit(exitOK)
}

// ended tells whether flowctl has ended, though the test may not have seen that yet.
func (p *process) ended() bool {
	_, rest, _ := strings.Cut(procFile(p.cmd.Process.Pid, "stat"), ") ")
	return rest == "" || rest[0] == 'Z' || rest[0] == 'X'
}

// A stop is in order, and over when flowctl has ended. Another one meanwhile kills nothing.
func TestStop_EndsWithFlowctl(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, shell("slow", `trap "echo draining; sleep 1; echo drained; exit 0" TERM; echo up; while :; do sleep 0.05; done`)))
	p.waitReady()
	p.waitOut("up\n")
	first := start(t, []string{"stop"}, beside(p))
	p.waitOut("draining\n")
	second := start(t, []string{"stop", "-json"}, beside(p))
	for _, stop := range []*process{first, second} {
		stop.exit(exitOK)
		if !p.ended() {
			t.Errorf("stop has ended before flowctl\n%s", stop)
		}
	}
	p.exit(exitOK)
	p.waitOut("drained\n")
	first.has(first.stdout, "stopped test\n")
	second.has(second.stdout, `"pipeline": "test"`)
	p.has(p.stderr, "an operator asks for the end", `msg="stop requested" signal=terminated`)
	p.wantAsk([]string{"stop"}, exitPlane, "", "flowctl: no pipeline is running: .*\n")
}

// What holds flowctl's end up holds stop up, and a flowctl that is killed has ended as well.
func TestStop_OfOneThatIsKilled(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, shell("deaf", `trap "" TERM; echo up; while :; do sleep 0.05; done`)), "-stop-timeout", "1m")
	p.waitReady()
	p.waitOut("up\n")
	stop := start(t, []string{"stop"}, beside(p))
	p.waitErr("msg=stopping component=deaf ")
	select {
	case <-stop.done:
		t.Errorf("it has not waited\n%s", stop)
	default:
	}
	p.signal(syscall.SIGKILL)
	stop.exit(exitOK)
	<-p.done
	p.awaitGuard()
}

// With a command after -- a stop is the SIGTERM that it gets.
func TestStop_GoesToTheCommand(t *testing.T) {
	t.Parallel()
	p := start(t, runArgs(sleeper(t), "--", "sh", "-c", `trap "echo told; exit 7" TERM; echo up; while :; do sleep 0.05; done`))
	p.waitOut("up\n")
	p.wantAsk([]string{"stop"}, exitOK, "stopped test\n", "")
	p.exit(7)
	p.waitOut("told\n")
}

// What operators alone may do is refused to everybody else.
func TestOperators_Alone(t *testing.T) {
	t.Parallel()
	p := launch(t, sleeper(t))
	p.waitReady()
	c := operatorv1.NewOperatorClient(dialPlane(t, p.endpoint()).conn)
	_, err := c.Restart(t.Context(), &operatorv1.RestartRequest{Ids: []string{"a"}})
	wantCode(t, "Restart", err, codes.PermissionDenied)
	_, err = c.Stop(t.Context(), &operatorv1.StopRequest{})
	wantCode(t, "Stop", err, codes.PermissionDenied)
	stream := get(c.Logs(t.Context(), &operatorv1.LogsRequest{Last: 100}))(t)
	_, err = stream.Recv()
	wantCode(t, "Logs", err, codes.PermissionDenied)
	p.wantAsk([]string{"restart", "-e", "unix:/nowhere", "a"}, exitPlane, "", "flowctl: no control plane answers at .*\n")
	p.hasNot(p.stderr, "msg=stopping")
	p.stop()
	_, endpoint := startAlone(t, []string{"-no-persistence"})
	for command, args := range map[string][]string{"restart": {"restart", "a"}, "stop": {"stop"}, "show": {"logs"}} {
		code, _, stderr := call(t, append(args, "-e", endpoint)...)
		if code != exitPlane || !strings.Contains(stderr, "runs no components: there is nothing to "+command) {
			t.Errorf("%s of a control plane alone: exit %d\n%s", args[0], code, stderr)
		}
	}
}

// -pipeline names one of several for each of the commands, list included.
func TestPipelineFlag(t *testing.T) {
	t.Parallel()
	here := runsIn(t.TempDir())
	var all []*process
	for _, name := range []string{"one", "two"} {
		text := string(get(os.ReadFile(sleeper(t)))(t))
		file := writeFile(t, filepath.Join(t.TempDir(), "p.json"), strings.Replace(text, `"name":"test"`, `"name":"`+name+`"`, 1))
		p := start(t, runArgs(file), here)
		p.waitReady()
		all = append(all, p)
	}
	for _, args := range [][]string{{"restart", "a"}, {"reload"}, {"stop"}, {"logs"}} {
		all[0].wantAsk(args, exitPlane, "", "flowctl: 2 pipelines are running: name one of one, two\n")
	}
	all[0].wantAsk([]string{"restart", "a", "-pipeline", "two"}, exitOK, "restarted a\n", "")
	all[0].wantAsk([]string{"reload", "-pipeline", "two"}, exitOK, "reloaded: nothing has changed\n", "")
	all[0].wantAsk([]string{"reload", "two", "-pipeline", "two"}, exitUsage, "", "flowctl: two pipelines are named: .*\n.*\n")
	all[0].wantAsk([]string{"list", "-pipeline", "three"}, exitPlane, "", "flowctl: no pipeline \"three\" is running, only one, two\n")
	code, out, stderr := all[0].ask("list", "-json", "-pipeline", "two")
	var pipelines []listedPipeline
	if err := json.Unmarshal([]byte(out), &pipelines); err != nil || code != exitOK || len(pipelines) != 1 || pipelines[0].Pipeline != "two" {
		t.Errorf("list -pipeline two: %d, %v\n%s%s", code, err, out, stderr)
	}
	all[0].wantAsk([]string{"stop", "-pipeline", "two"}, exitOK, "stopped two\n", "")
	all[1].exit(exitOK)
	all[0].hasNot(all[0].stderr, "msg=stopping", "msg=reloaded")
	all[0].stop()
}

// The supervisor restarts what it is told, in the order of a stop and of a start, and nothing else.
func TestRestart_KeepsTheOrder(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("x", nil)}, []map[string]any{comp("b", map[string]any{"inputs": []string{"a"}})})
	m.readyAll()
	m.ail("x", "no heartbeat")
	must(t, m.restart("b"))
	must(t, m.restart("a"))
	m.advanceReload(m.now)
	m.want("a", procStopping)
	m.want("b", procReady)
	m.end("a", exitStatus(1))
	m.advanceReload(m.now)
	m.want("b", procStopping)
	m.wantStartable()
	m.end("b", exitStatus(0))
	m.advanceReload(m.now)
	m.wantStartable("a")
	m.startAll()
	m.wantStartable()
	m.heal("a")
	m.wantStartable("b")
	m.readyAll()
	m.want("b", procReady)
	if f := m.failures(); len(f) != 0 || m.pending != nil || m.byID["x"].unhealthySince.IsZero() || m.fake.started != 5 {
		t.Errorf("failures %s, pending %v, %d starts", describeFailures(f), m.pending, m.fake.started)
	}
}

// Readers that end because their input is restarted are started again, whatever their exit status is; what
// ends later, or again, does so for another reason.
func TestRestart_ReadersMayEndWithTheirInput(t *testing.T) {
	t.Parallel()
	reads := func(id, input string) map[string]any { return comp(id, map[string]any{"inputs": []string{input}}) }
	m := newMachine(t, []map[string]any{comp("a", nil)}, []map[string]any{reads("b", "a"), reads("c", "a"), reads("d", "a"), reads("e", "a")})
	m.readyAll()
	must(t, m.restart("a"))
	m.advanceReload(m.now)
	m.end("b", exitStatus(1)) // while a stops
	m.advanceReload(m.now)
	m.wantStartable()
	m.end("a", exitStatus(0))
	m.advanceReload(m.now)
	m.end("c", exitStatus(0))
	m.wantStartable("a")
	m.now = m.now.Add(time.Second)
	m.startAll()
	m.heal("a")
	m.pass(9 * time.Second)
	m.wantStartable("b", "c")
	m.end("d", exitStatus(2)) // it has read on
	m.want("d", procBackoff)
	m.readyAll()
	m.pass(2 * time.Second)
	m.readyAll()
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		m.want(id, procReady)
	}
	m.end("d", exitStatus(3))
	m.pass(time.Second)
	m.end("e", exitStatus(4))
	m.pass(signalWindow)
	m.want("d", procFailed)
	m.want("e", procFailed)
	m.end("c", exitStatus(0))
	m.want("c", procCompleted)
}

// A pipeline of programs that end with their input, such as that of README.md, goes on when its source was
// restarted.
func TestRestart_OfWhatOthersRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, syscall.Mkfifo(filepath.Join(dir, "numbers"), 0o600))
	must(t, syscall.Mkfifo(filepath.Join(dir, "doubles"), 0o600))
	count := shell("count", "sleep 1; n=0; while sleep 0.05; do echo $((n += 1)); done >numbers")
	double := shell("double", "while read -r n; do echo $((n * 2)); done <numbers >doubles")
	show := shell("show", "exec cat doubles")
	double.Inputs, show.Inputs = []string{"count"}, []string{"double"}
	count.WorkingDir, double.WorkingDir, show.WorkingDir = dir, dir, dir
	p := launch(t, writePipeline(t, count, double, show))
	p.waitOut("| 4\n")
	p.wantAsk([]string{"restart", "count"}, exitOK, "restarted count\n", "")
	p.wait(p.stdout, "| 4\n", 2)
	for _, id := range []string{"double", "show"} { // one after the other
		p.has(p.stderr, `level=WARN msg="ended after what it reads from was stopped" component=`+id)
	}
	p.stop()
}

// What has ended is replaced at once; what a reload takes out is not in the file any more, and what it
// replaces is restarted once.
func TestRestart_BesideAReload(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("b", nil), comp("c", nil), comp("d", map[string]any{"restart_policy": "always"})}, nil)
	m.readyAll()
	m.end("c", exitStatus(0))
	m.end("d", exitStatus(1))
	m.reload(parseParts(t, []map[string]any{comp("a", map[string]any{"type": "x"}), comp("c", nil), comp("d", map[string]any{"restart_policy": "always"})}, nil), nil)
	if err := m.restart("b"); err == nil || err.Error() != `no component "b" is in the pipeline: there is a, c, d` {
		t.Errorf("restart of one that leaves: %v", err)
	}
	for _, id := range []string{"a", "c", "d"} {
		must(t, m.restart(id))
	}
	m.advanceReload(m.now)
	m.wantStartable()
	m.end("a", exitStatus(0))
	m.end("b", exitStatus(0))
	m.advanceReload(m.now)
	m.wantStartable("a", "c", "d")
	if a := m.byID["a"].component; a.Type != "x" || m.byID["b"] != nil || m.pending != nil {
		t.Errorf("a is %+v, b is %v, pending %v", a, m.byID["b"], m.pending)
	}
	if want := []string{"a terminated", "b terminated"}; !slices.Equal(m.fake.sent, want) {
		t.Errorf("signals %q, want %q", m.fake.sent, want)
	}
	m.pass(time.Hour)
}

// One that has failed is started again, but for a process that outlives SIGKILL.
func TestRestart_OfWhatHasFailed(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil), comp("b", nil)}, nil)
	m.readyAll()
	m.end("a", exitStatus(1))
	m.pass(signalWindow)
	m.want("a", procFailed)
	must(t, m.restart("a"))
	must(t, m.restart("b"))
	m.advanceReload(m.now)
	m.pass(10 * time.Second)
	m.pass(killPatience)
	m.wantFailure("b", failStuck, "pid 2 is still running 5s after SIGKILL")
	if err := m.restart("b"); err == nil || !strings.Contains(err.Error(), "still running 5s after SIGKILL") {
		t.Errorf("restart of what outlives SIGKILL: %v", err)
	}
	m.end("b", killedBySIGKILL)
	must(t, m.restart("b"))
	m.advanceReload(m.now)
	m.wantStartable("a", "b")
}

// withoutTimes are lines as flowctl prints them, without their times.
func withoutTimes(text string) string {
	return regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d `).ReplaceAllString(text, "")
}

// logs shows what flowctl has printed, as flowctl has, and goes on with -f until the pipeline has stopped.
func TestLogs_AsFlowctlPrints(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	up := `trap "echo leaving; exit 0" TERM; echo up; while :; do sleep 0.05; done`
	p := start(t, runArgs(writePipeline(t, shell("a", "seq 1 200; printf 'tail\\r\\n\\033[31mred\\n'; "+up), shell("longer", "exec >&2; echo oops; "+up)), "-log-dir", "kept"), inFolder(dir))
	p.waitReady()
	p.wait(p.stdout, "up\n", 2)
	code, out, stderr := p.ask("logs", "-n", "1000")
	got, want := strings.Split(withoutTimes(out), "\n"), strings.Split(withoutTimes(p.stdout.String()), "\n")
	slices.Sort(got) // the order of different components is nobody's
	slices.Sort(want)
	if code != exitOK || !slices.Equal(got, want) || stderr != "" {
		t.Errorf("exit %d\n%s%swant\n%s", code, out, stderr, p)
	}
	p.wantAsk([]string{"logs", "-n", "3", "a"}, exitOK, `\S+ a      \| tail\n\S+ a      \| \x1b\[31mred\n\S+ a      \| up\n`, "")
	if _, out, _ := p.ask("logs"); strings.Count(out, "\n") != 100 {
		t.Errorf("by default it shows %d lines", strings.Count(out, "\n"))
	}
	p.wantAsk([]string{"logs", "flowctl", "-n", "1"}, exitOK, `\S+ flowctl \| level=INFO msg=.*\n`, "")
	p.wantAsk([]string{"logs", "longer", "-json"}, exitOK,
		`{"time":"\S+","component":"longer","stream":"stderr","line":"oops"}\n{"time":"\S+","component":"longer","stream":"stderr","line":"up"}\n`, "")
	p.wantAsk([]string{"logs", "longr"}, exitUsage, "", "flowctl: no component \"longr\" is in the pipeline, did you mean \"longer\"\\?\n")
	p.wantAsk([]string{"logs", "-n", "-1"}, exitUsage, "", "flowctl: -n \"-1\": it must be a number of lines, 0 at least\n.*\n")

	follow := start(t, []string{"logs", "-f", "-n", "1"}, beside(p))
	one := start(t, []string{"logs", "-f", "-n", "0", "longer", "-json"}, beside(p))
	quit := start(t, []string{"logs", "-f"}, beside(p))
	follow.waitOut("up\n")
	quit.waitOut("up\n")
	quit.signal(syscall.SIGINT)
	quit.exit(exitOK)
	eventually(t, "all follow", func() bool {
		code, out, _ := p.ask("restart", "longer")
		return code == exitOK && out != "" && strings.Contains(one.stdout.String(), `"line":"up"`)
	})
	p.stop()
	for _, f := range []*process{follow, one} {
		f.exit(exitOK)
		f.has(f.stderr, "flowctl: the pipeline has stopped; log files: "+dir+"/kept/")
	}
	follow.has(follow.stdout, "longer | leaving\n", "a      | leaving\n")
	one.hasNot(one.stdout, `"component":"a"`)
	one.has(one.stderr, "log files: "+dir+"/kept/longer.log\n")
}

// Without a running pipeline logs names the log files that are where they are by default.
func TestLogs_NamesTheFilesOfAFormerRun(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := start(t, runArgs(writePipeline(t, shell("a", "echo x"), shell("b", "echo y")), "-log-dir", "logs"), inFolder(dir))
	p.exit(exitOK)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"logs"}, `flowctl: no pipeline is running: .*\nflowctl: log files are left: logs/a.log, logs/b.log\n`},
		{[]string{"logs", "b"}, `flowctl: no pipeline is running: .*\nflowctl: log files are left: logs/b.log\n`},
		{[]string{"logs", "c"}, `flowctl: no pipeline is running: .*\n`},
	} {
		code, out, stderr := start(t, tt.args, inFolder(dir)).finish()
		if code != exitPlane || out != "" || !regexp.MustCompile("^"+tt.want+"$").MatchString(stderr) {
			t.Errorf("%q: exit %d, want %q\n%s%s", tt.args, code, tt.want, out, stderr)
		}
	}
}

// A reader that does not read is told how many lines it has missed, and holds up neither the run nor its
// end.
func TestLogs_SlowReader(t *testing.T) {
	t.Parallel()
	const lines = 2_000_000
	dir := t.TempDir()
	begin, done := filepath.Join(dir, "begin"), filepath.Join(dir, "done")
	null := get(os.OpenFile(os.DevNull, os.O_WRONLY, 0))(t)
	defer null.Close()
	script := fmt.Sprintf("echo waiting; until [ -e %s ]; do sleep 0.02; done; seq 1 %d; touch %s; echo end; exec sleep 300", begin, lines, done)
	p := start(t, runArgs(writePipeline(t, shell("a", script))), stdoutTo(null))
	p.waitReady()
	var outputs [2]*os.File
	var readers [2]*bufio.Scanner
	var slow [2]*process
	for i := range slow {
		r, w, err := os.Pipe()
		must(t, err)
		defer r.Close()
		outputs[i], readers[i], slow[i] = r, bufio.NewScanner(r), start(t, []string{"logs", "-f", "-json"}, beside(p), stdoutTo(w))
		w.Close()
		if !readers[i].Scan() || !strings.Contains(readers[i].Text(), `"waiting"`) {
			t.Fatalf("the first line is %q", readers[i].Text())
		}
	}
	writeFile(t, begin, "")
	eventually(t, "the flood is over", func() bool {
		_, err := os.Stat(done)
		return err == nil
	})
	got, missed, next := 0, 0, 1
	for readers[0].Scan() {
		var line struct {
			Line   string
			Missed int
		}
		must(t, json.Unmarshal(readers[0].Bytes(), &line))
		if line.Line == "end" {
			break
		}
		if n, err := strconv.Atoi(line.Line); line.Missed == 0 && (err != nil || n < next) {
			t.Fatalf("%q after %d", line.Line, next)
		} else if line.Missed == 0 {
			got, next = got+1, n+1
		}
		missed += line.Missed
	}
	t.Logf("%d lines, %d missed", got, missed)
	if got == 0 || missed == 0 || got+missed != lines {
		t.Errorf("%d lines and %d missed, want %d", got, missed, lines)
	}
	begun := time.Now()
	p.stop()
	if took := time.Since(begun); took > 8*time.Second {
		t.Errorf("the end took %s", took)
	}
	for i := range slow {
		outputs[i].Close()
		<-slow[i].done
	}
}

// What a component prints can do nothing to the terminal of who asks for it.
func TestLogs_ShowsNothingRawOnATerminal(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	for _, format := range []string{formatText, formatJSON} {
		c := newConsole(out.Write, format, time.TimeOnly, false, nil)
		c.terminal = true
		must(t, showPrinted(c, &operatorv1.LogsResponse{Missed: 3, Printed: []*operatorv1.Printed{
			{Id: "evil\x1b[2J", Stream: "stdout\x9b", Lines: []byte("hello\x1b]0;x\a\x9b2J\u009b2J\b\x7f\n")}}}))
	}
	for _, r := range out.String() {
		if r != '\n' && unicode.IsControl(r) {
			t.Errorf("%q is in %q", r, out.String())
		}
	}
	if !strings.Contains(out.String(), "flowctl | 3 lines are missed here") || !strings.Contains(out.String(), `"missed":3`) || strings.Count(out.String(), "hello") != 2 {
		t.Errorf("shown: %s", out.String())
	}
}

// A follower of all hears what a reload has brought.
func TestLogs_FollowOverAReload(t *testing.T) {
	t.Parallel()
	a, b := shell("a", "exec sleep 300"), shell("b", "echo new; exec sleep 300")
	file := writePipeline(t, a)
	p := launch(t, file)
	p.waitReady()
	follow := start(t, []string{"logs", "-f"}, beside(p))
	rewrite(t, file, a, b)
	p.reload("reloaded: added b; 1 unchanged\n")
	follow.waitOut(" b | new\n")
	rewrite(t, file, a)
	p.reload("reloaded: removed b; 1 unchanged\n")
	p.waitErr("msg=ended component=b ")
	eventually(t, "b is forgotten", func() bool {
		code, _, _ := p.ask("logs", "b")
		return code == exitUsage
	})
	p.stop()
	follow.exit(exitOK)
}
