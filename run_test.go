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

// The command runs once all are ready, has its own input and output, and its exit
// code is flowctl's.
func TestCommand_ItsExitCodeIsFlowctls(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, actor("a", role{Dialect: "v1"}))
	for _, tt := range []struct {
		name   string
		script string
		code   int
	}{
		{"succeeds", `read line; echo "got $line from $FLOWCTL_ENDPOINT"; echo told >&2`, 0},
		{"fails", "exit 42", 42},
		{"is killed", "kill -KILL $$", 128 + 9},
		{"dies of a signal", "kill -TERM $$", 128 + 15},
		{"has an exit code of flowctl's own", "exit 4", 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			input := func(p *process) { p.cmd.Stdin = strings.NewReader("input\n") }
			p := start(t, runArgs(file, "--", "sh", "-c", tt.script), input)
			p.exit(tt.code)
			p.has(p.stderr, `msg="pipeline ready"`, `msg="command ended"`, "msg=stopping component=a ", `msg="all components have ended"`)
			if tt.code == 0 {
				p.has(p.stdout, "got input from "+p.endpoint()+"\n")
				p.has(p.stderr, "told\n")
			}
		})
	}
}

// Where the endpoint speaks TLS alone, the command gets what it takes to dial it.
func TestCommand_GetsWhatDialingTLSTakes(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	secure := shell("a", "exec sleep 300")
	secure.TLS = true
	for _, tt := range []struct {
		components []Component
		tls        bool
	}{{[]Component{secure}, true}, {[]Component{secure, shell("b", "exec sleep 300")}, false}} {
		p := start(t, append(runArgs(writePipeline(t, tt.components...), files.mutual()...), "--", "sh", "-c", `echo "$FLOWCTL_ENDPOINT ${FLOWCTL_TLS_CA-} ${FLOWCTL_TLS_CERT-} ${FLOWCTL_TLS_KEY-}"`))
		p.exit(exitOK)
		if want := fmt.Sprintln(p.endpoint(), files.ca, files.cert, files.key); strings.Contains(p.stdout.String(), want) != tt.tls || strings.Contains(p.stdout.String(), files.key) != tt.tls {
			t.Errorf("the command does not print %q, or should not\n%s", want, p)
		}
	}
}

func TestCommand_WrongOnesAreRefused(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", "exec sleep 300"))
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--"}, "flowctl: a command must come after --\n"},
		{[]string{"--", "no-such-program"}, "flowctl: the command after --: cannot run \"no-such-program\": executable file not found in $PATH\n"},
		{[]string{"--", file}, "flowctl: the command after --: cannot run " + `"` + file + `": permission denied` + "\n"},
		{[]string{"-until", "done", "--", "true"}, "flowctl: -until and a command after -- contradict each other: the run ends with the command\n"},
	} {
		p := start(t, runArgs(file, tt.args...))
		p.exit(exitUsage)
		p.has(p.stderr, tt.want)
		p.hasNot(p.stderr, "msg=started")
	}
}

// When a component fails, the command is asked to end and the exit code is the
// component's.
func TestCommand_IsStoppedWhenAComponentFails(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, script string }{
		{"heeds", `trap "echo asked; exit 7" TERM; echo up; while :; do sleep 0.05; done`},
		{"ignores", `trap "echo asked" TERM; echo up; while :; do sleep 0.05; done`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(writePipeline(t, actor("a", role{Dialect: "v1", OnUSR1: "exit", Code: 3})), "-stop-timeout", "500ms", "--", "sh", "-c", tt.script))
			p.waitOut("up\n")
			p.tell("a", syscall.SIGUSR1)
			p.exit(exitFailed)
			p.has(p.stdout, "asked\n")
			p.has(p.stderr, "flowctl: component a failed: exit status 3")
		})
	}
}

// A pipeline that has not become ready runs no command.
func TestCommand_IsNotRunBeforeReady(t *testing.T) {
	t.Parallel()
	p := start(t, runArgs(writePipeline(t, actor("a", role{})), "-start-timeout", "100ms", "--", "echo", "ran"))
	p.exit(exitNotReady)
	p.hasNot(p.stdout, "ran")

	// A signal ends the run well, but a script must not take that for the command's success.
	p = start(t, runArgs(writePipeline(t, actor("a", role{})), "--", "echo", "ran"))
	p.waitErr("msg=started component=a")
	p.signal(syscall.SIGTERM)
	p.exit(128 + 15)
	p.hasNot(p.stdout, "ran")
	p.has(p.stderr, `flowctl: the command "echo" after -- was not run: signal 15 (terminated) came first`)
}

// The command is the first to get a signal, and the run goes on until it has ended;
// a second signal does not wait for it.
func TestCommand_FirstSignalIsItsOwn(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", `trap "echo stopped; exit 0" TERM; while :; do sleep 0.05; done`))
	p := start(t, runArgs(file, "--", "sh", "-c", `trap "echo asked; sleep 0.3; echo done; exit 9" INT; echo up; while :; do sleep 0.05; done`))
	p.waitOut("up\n")
	p.signal(syscall.SIGINT)
	p.exit(9)
	p.has(p.stdout, "asked\n", "done\n", "stopped\n")

	p = start(t, runArgs(file, "-stop-timeout", "500ms", "--", "sh", "-c", `trap "" INT; trap "echo asked" TERM; echo up; while :; do sleep 0.05; done`))
	p.waitOut("up\n")
	p.signal(syscall.SIGINT)
	p.waitErr("waiting for the command to end")
	p.signal(syscall.SIGTERM)
	p.exit(128 + 9)
	p.has(p.stdout, "asked\n")
}

// Who sends a signal that may be the only one gets an end of what ignores it. A person
// who presses Ctrl-C can press it again, and so is waited for.
func TestCommand_IsKilledWhenItIgnoresSIGTERM(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", "exec sleep 300"))
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(file, "-stop-timeout", "300ms", "--", "sh", "-c", `trap "" TERM HUP; echo up; while :; do sleep 0.05; done`))
			p.waitOut("up\n")
			p.signal(sig)
			p.exit(128 + 9)
			p.has(p.stderr, "waiting for the command to end", "at_most=300ms", "the command still runs, sending SIGKILL", "command ended", "msg=stopping component=a ",
				`flowctl: the command "sh" after -- failed: killed by signal 9 (killed)`)
		})
	}
	t.Run("interrupt", func(t *testing.T) {
		t.Parallel()
		p := start(t, runArgs(file, "-stop-timeout", "100ms", "--", "sh", "-c", `trap "" INT; echo up; sleep 0.4; exit 9`))
		p.waitOut("up\n")
		p.signal(syscall.SIGINT)
		p.exit(9)
	})
}

// A signal that comes twice by two ways is one: the pipeline goes on until the command
// has ended.
func TestCommand_SignalByTwoWaysIsOne(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", "exec sleep 300"))
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(file, "--", "sh", "-c", `trap "asked=1" INT TERM HUP; echo up; while [ -z "$asked" ]; do sleep 0.02; done; sleep 0.3; exit 9`))
			p.waitOut("up\n")
			p.signal(sig)
			if sig == syscall.SIGHUP { // a shell may tell of it much later than the kernel
				p.waitErr("waiting for the command to end")
				time.Sleep(2 * repeatTime)
			}
			p.signal(sig)
			p.exit(9)
			p.has(p.stderr, "waiting for the command to end", "command ended", "msg=stopping component=a ")
		})
	}
}

// Two signals in a row may be one to a process. Here their time is given.
func TestHeededSignal_IsRepeated(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, tt := range []struct {
		heeded, next os.Signal
		after        time.Duration
		want         bool
	}{
		{nil, syscall.SIGTERM, 0, false},
		{syscall.SIGTERM, syscall.SIGTERM, repeatTime - 1, true},
		{syscall.SIGTERM, syscall.SIGTERM, repeatTime, false},
		{syscall.SIGTERM, syscall.SIGINT, 0, false},
		{syscall.SIGHUP, syscall.SIGHUP, time.Hour, true}, // a shell may tell of it much later than the kernel
		{syscall.SIGTERM, syscall.SIGHUP, time.Hour, true},
		{syscall.SIGINT, syscall.SIGHUP, 0, false},
		{nil, syscall.SIGHUP, 0, false},
	} {
		if got := (heededSignal{tt.heeded, now}).isRepeated(tt.next, now.Add(tt.after)); got != tt.want {
			t.Errorf("%v, and after %s %v: repeated is %t, want %t", tt.heeded, tt.after, tt.next, got, tt.want)
		}
	}
}

// Only a flowctl that was stopped gives its components time: a start timeout is judged on a
// busy machine too, where each look of the loop comes 150 ms late.
func TestRun_LateWakeUpsPutNoStartTimeoutOff(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	r := &run{sup: m.supervisor, log: m.log, plane: &plane{registry: newRegistry(30*time.Second, 10*time.Second, "127.0.0.1:1", nil)}}
	m.startAll()
	begun := m.now
	look := func(wait time.Duration) {
		m.now = m.now.Add(wait)
		r.putOff(m.now)
		m.expire(m.now)
	}
	look(0)
	for m.byID["a"].failure == nil && m.now.Sub(begun) < time.Minute {
		look(time.Second/2 + 150*time.Millisecond)
	}
	if got := m.now.Sub(begun); got < 30*time.Second || got > 31*time.Second {
		t.Errorf("failed after %s, want 30s or at the look after that", got)
	}
}

func TestRun_StoppedFlowctlPutsStartTimeoutsOffByThatTime(t *testing.T) {
	t.Parallel()
	m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
	r := &run{sup: m.supervisor, log: m.log, plane: &plane{registry: newRegistry(30*time.Second, 10*time.Second, "127.0.0.1:1", nil)}}
	m.startAll()
	r.putOff(m.now)
	for _, step := range []struct {
		wait   time.Duration
		failed bool
	}{
		{9 * time.Second, false}, // less than the janitor's interval: a busy machine
		{time.Hour, false},       // stopped
		{9 * time.Second, false},
		{9 * time.Second, false},
		{3*time.Second - 1, false},
		{1, true}, // 30s without the hour
	} {
		m.now = m.now.Add(step.wait)
		r.putOff(m.now)
		m.expire(m.now)
		if got := m.byID["a"].failure != nil; got != step.failed {
			t.Errorf("failed is %t, want %t, at %+v", got, step.failed, step)
		}
	}
}

// A command that outlives SIGKILL does not keep flowctl, which says so and fails.
func TestRun_CommandThatOutlivesSIGKILLIsLeft(t *testing.T) {
	t.Parallel()
	for _, signals := range []int{1, 2} { // the first is for the command, the second stops the pipeline too
		m := newMachine(t, []map[string]any{comp("a", nil)}, nil)
		m.readyAll()
		var sent []os.Signal
		r := &run{sup: m.supervisor, wrapped: deafCommand(&sent), log: m.log, config: runConfig{stopTimeout: 10 * time.Second}}
		for i := range signals {
			r.signalled(syscall.SIGTERM, m.now.Add(time.Duration(i)*time.Second))
		}
		r.expireCommand(m.now.Add(10 * time.Second))
		if want := syscall.SIGKILL; sent[len(sent)-1] != want {
			t.Errorf("%d signals: the command got %v, want %s last", signals, sent, want)
		}
		r.expireCommand(m.now.Add(10*time.Second + killPatience))
		if want := `the command "deaf" after --: pid 7 is still running 5s after SIGKILL`; r.code != exitFailed || r.err == nil || r.err.Error() != want {
			t.Errorf("%d signals: code %d, error %v; want 1, %s", signals, r.code, r.err, want)
		}
		if !m.stopping || r.wrapped.runs() {
			t.Errorf("%d signals: the pipeline stops: %t, the command is waited for: %t; want true, false", signals, m.stopping, r.wrapped.runs())
		}
	}
}

// A third signal waits for nothing.
func TestCommand_ThirdSignalKills(t *testing.T) {
	t.Parallel()
	deaf := shell("a", `trap "" TERM; echo deaf; while :; do sleep 0.05; done`)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(writePipeline(t, deaf), "-stop-timeout", "1h", "--", "sh", "-c", `trap "" INT TERM; echo up; while :; do sleep 0.05; done`))
			p.waitOut("deaf\n")
			p.waitOut("up\n")
			for _, heard := range []string{"waiting for the command to end", "stop requested", "another signal, killing what still runs"} {
				p.signal(sig)
				p.waitErr(heard)
				time.Sleep(2 * repeatTime) // sooner it would be the same signal
			}
			p.exit(128 + 9)
		})
	}
}

// Nothing is left of the command either when flowctl is killed, which the harness sees.
func TestCommand_DoesNotOutliveAKilledFlowctl(t *testing.T) {
	t.Parallel()
	p := start(t, runArgs(writePipeline(t, shell("a", "exec sleep 300")), "--", "sh", "-c", `trap "" TERM INT; echo up; sleep 300 & wait`))
	p.waitOut("up\n")
	p.signal(syscall.SIGKILL)
	<-p.done
}

// By Ctrl-C in a terminal the command is told once, by the terminal.
func TestCommand_IsToldOnceByATerminal(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("no script(1) here, which makes a terminal")
	}
	dir := t.TempDir()
	heard := filepath.Join(dir, "heard")
	file := writePipeline(t, shell("a", "exec sleep 300"))
	// The shell that script(1) starts must be gone: it is in the foreground too, and some end by the signal.
	command := "exec " + flowctlProgram(t) + " run " + file + ` -log-dir "" -control-plane-port 0 -- sh -c 'trap "echo once >>` + heard + `" INT; echo up; n=0; while [ $n -lt 20 ]; do n=$((n+1)); sleep 0.05; done; exit 5'`
	in, keys, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	defer keys.Close()
	p := start(t, []string{"--version"}) // for its harness alone
	<-p.done
	screen := newTranscript()
	cmd := exec.Command("script", "-qec", command, "/dev/null")
	cmd.Env, cmd.Stdin, cmd.Stdout = p.cmd.Env, in, screen
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if !screen.contains("up", 1, nil) {
		t.Fatalf("the command does not run:\n%s", screen)
	}
	if _, err := keys.Write([]byte{3}); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 5 {
		t.Errorf("exit %d, want 5\n%s", code, screen)
	}
	if text, err := os.ReadFile(heard); err != nil || string(text) != "once\n" {
		t.Errorf("the command heard %q, %v\n%s", text, err, screen)
	}
}

// A flowctl that is itself a component of another one has the id of that component in its
// environment. Its command is not taken for what its own component of that id has left.
func TestCommand_OfANestedFlowctlIsNoStray(t *testing.T) {
	t.Parallel()
	up := filepath.Join(t.TempDir(), "up")
	// Once the command runs, a leaves an orphan and ends; what it has left is looked for then.
	a := shell("a", `if [ -e `+up+`.once ]; then exec sleep 300; fi; until [ -e `+up+` ]; do sleep 0.02; done; touch `+up+`.once; setsid sh -c 'touch `+up+`.left; exec sleep 300' & until [ -e `+up+`.left ]; do sleep 0.02; done; exit 1`)
	a.RestartPolicy = "on-failure"
	p := start(t, runArgs(writePipeline(t, a), "--", "sh", "-c", `touch `+up+`; until [ -e `+up+`.go ]; do sleep 0.02; done; exit 5`),
		withEnv("FLOWCTL_COMPONENT_ID=a", "FLOWCTL_RUN=outer"))
	p.wait(p.stderr, "msg=ready component=a ", 2)
	p.has(p.stderr, "ending what left its process group")
	writeFile(t, up+".go", "")
	p.exit(5)
}

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

// Without -endpoint the one pipeline is meant that runs here, or that is named, or
// whose process systemd names.
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
	one := start(t, runOf(writePipeline(t, shell("a", "exec sleep 300"))), here)
	one.waitReady()
	p = reload(exitOK)
	p.has(p.stdout, "reloaded: nothing has changed\n")
	text, err := os.ReadFile(writePipeline(t, shell("a", "exec sleep 300")))
	if err != nil {
		t.Fatal(err)
	}
	two := start(t, runOf(writeFile(t, filepath.Join(t.TempDir(), "two.json"), strings.Replace(string(text), `"name":"test"`, `"name":"two"`, 1))), here)
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

// SIGHUP reloads under systemd, which is told, and ends a run elsewhere.
func TestReload_BySIGHUPUnderSystemd(t *testing.T) {
	t.Parallel()
	a, b := shell("a", "exec sleep 300"), shell("b", "exec sleep 300")
	file := writePipeline(t, a)
	p := start(t, runOf(file), notifySocket(t, filepath.Join(shortDir(t), "notify")))
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

// What is asked to stop while a reload is under way stops as a whole.
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

// A second reload before the first is done changes where that leads to.
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

// A component keeps its registration when the reload adds one that has an id by which
// it called itself.
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

// What the reload has added stops in the order of the new file, also before the reload
// is done.
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

// A component that waits to be started anew by a reload holds up what waits for it,
// although its former process becomes ready on the way out.
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

// A flowctl that was stopped itself gives those that start more time, and none to those
// that are stopping.
func TestRun_StoppedFlowctlStopsOnTime(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: ""}), shell("b", `trap "" TERM; echo up; while :; do sleep 0.02; done`)), "-start-timeout", "20s", "-stop-timeout", "2s")
	p.waitOut("up\n")
	p.signal(syscall.SIGTERM)
	p.waitErr("msg=stopping component=b ")
	p.signal(syscall.SIGSTOP)
	time.Sleep(300 * time.Millisecond) // as long as it is to be stopped
	p.signal(syscall.SIGCONT)
	p.exit(exitOK)
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
