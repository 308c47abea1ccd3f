//go:build linux

package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The command runs once all are ready, has its own input and output, and its exit
// code is flowctl's.
func TestCommand(t *testing.T) {
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
func TestCommandDialsTLS(t *testing.T) {
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

func TestCommandRefused(t *testing.T) {
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
func TestCommandOfAFailedRun(t *testing.T) {
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
func TestCommandIsNotRun(t *testing.T) {
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
func TestCommandSignals(t *testing.T) {
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
func TestCommandIgnoresSignals(t *testing.T) {
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
func TestCommandSignalEchoes(t *testing.T) {
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
				time.Sleep(2 * echoTime)
			}
			p.signal(sig)
			p.exit(9)
			p.has(p.stderr, "waiting for the command to end", "command ended", "msg=stopping component=a ")
		})
	}
}

// Two signals in a row may be one to a process. Here their time is given.
func TestCommandSignalEchoesInTime(t *testing.T) {
	t.Parallel()
	s, _ := supervise(t, []map[string]any{sh("a", forever, nil)}, nil)
	cmd := exec.Command("sh", "-c", `trap "" TERM; exec sleep 300`)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	r := &run{sup: s, log: slog.New(slog.NewTextHandler(t.Output(), nil)), guest: &guest{cmd: cmd}, flags: runFlags{stopTimeout: time.Hour}}
	now := time.Now()
	r.signalled(syscall.SIGTERM, now)
	r.signalled(syscall.SIGTERM, now.Add(echoTime-1))
	if s.stopping || r.guest.signals != 1 {
		t.Errorf("after an echo: stopping %t, the command got %d signals, want 1", s.stopping, r.guest.signals)
	}
	r.signalled(syscall.SIGTERM, now.Add(echoTime))
	if !s.stopping || r.guest.deadline != now.Add(time.Hour) {
		t.Errorf("after a second signal: stopping %t, SIGKILL %s after the first, want 1h", s.stopping, r.guest.deadline.Sub(now))
	}
}

// A third signal waits for nothing.
func TestCommandThirdSignal(t *testing.T) {
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
				time.Sleep(2 * echoTime) // sooner it would be the same signal
			}
			p.exit(128 + 9)
		})
	}
}

// Nothing is left of the command either when flowctl is killed, which the harness sees.
func TestCommandOfAKilledFlowctl(t *testing.T) {
	t.Parallel()
	p := start(t, runArgs(writePipeline(t, shell("a", "exec sleep 300")), "--", "sh", "-c", `trap "" TERM INT; echo up; sleep 300 & wait`))
	p.waitOut("up\n")
	p.signal(syscall.SIGKILL)
	<-p.done
}

// By Ctrl-C in a terminal the command is told once, by the terminal.
func TestCommandInATerminal(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("no script(1) here, which makes a terminal")
	}
	dir := t.TempDir()
	heard := filepath.Join(dir, "heard")
	file := writePipeline(t, shell("a", "exec sleep 300"))
	// The shell that script(1) starts must be gone: it is in the foreground too, and some end by the signal.
	command := "exec " + binary(t) + " run " + file + ` -log-dir "" -control-plane-port 0 -- sh -c 'trap "echo once >>` + heard + `" INT; echo up; n=0; while [ $n -lt 20 ]; do n=$((n+1)); sleep 0.05; done; exit 5'`
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
