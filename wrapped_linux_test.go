//go:build linux

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The command runs once all components are ready. It has flowctl's standard input and output,
// and its exit code is flowctl's.
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

// If the endpoint speaks TLS only, the command gets the TLS files in its environment.
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

// When a component fails, the command gets SIGTERM, and the exit code is the component's.
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

// A pipeline that never becomes ready does not run the command.
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

// The first signal goes to the command, and the run goes on until it has ended. The second
// stops the pipeline and the command.
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

// A command that ignores SIGTERM or SIGHUP is killed, because no other signal may come. One
// that ignores SIGINT is not: a person who presses Ctrl-C can press it again.
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

// A signal that comes by two ways is one signal: the pipeline goes on until the command has
// ended.
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

// A third signal kills the command and the components.
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

// The harness fails for processes that are left, the command's too.
func TestCommand_DoesNotOutliveAKilledFlowctl(t *testing.T) {
	t.Parallel()
	p := start(t, runArgs(writePipeline(t, shell("a", "exec sleep 300")), "--", "sh", "-c", `trap "" TERM INT; echo up; sleep 300 & wait`))
	p.waitOut("up\n")
	p.signal(syscall.SIGKILL)
	<-p.done
}

// Ctrl-C in a terminal reaches the command once: the terminal sends it, and flowctl does not.
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

// A flowctl that is a component of another one has the id of that component in its
// environment. If a component of its own has the same id, the command is not taken for a
// process of that component.
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
