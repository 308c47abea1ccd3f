//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"io"
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

// Standard output is the command's alone. What components print is on standard error, in the same form.
func TestCommand_HasStandardOutputAlone(t *testing.T) {
	t.Parallel()
	chatty := shell("a", "while :; do echo chatter; sleep 0.05; done")
	for format, want := range map[string]string{formatText: " a | chatter\n", formatJSON: `"component":"a","stream":"stdout","line":"chatter"}` + "\n"} {
		p := start(t, runArgs(writePipeline(t, chatty), "-log-format", format, "--", "sh", "-c", "sleep 0.2; echo answer"))
		p.exit(exitOK)
		if got := p.stdout.String(); got != "answer\n" {
			t.Errorf("standard output is %q", got)
		}
		p.has(p.stderr, want)
		for line := range strings.Lines(p.stderr.String()) {
			if format == formatJSON && !json.Valid([]byte(line)) {
				t.Errorf("no JSON: %q", line)
			}
		}
	}
}

// Where nobody reads standard error any more, the run ends, as it does without a command for standard output.
func TestCommand_ClosedStandardErrorStopsTheRun(t *testing.T) {
	t.Parallel()
	r, w := openPipe(t)
	p := start(t, runArgs(writePipeline(t, shell("a", "while :; do echo chatter; sleep 0.05; done")), "--", "sleep", "300"), func(p *process) { p.cmd.Stderr = w })
	w.Close()
	r.Close()
	p.exit(exitFailed)
}

// slowWriter takes a while for each write.
type slowWriter struct{ to *transcript }

func (w slowWriter) Write(p []byte) (int, error) {
	time.Sleep(20 * time.Millisecond)
	return w.to.Write(p)
}

// The command starts when all that was printed and said before is written, however slowly that is read.
func TestCommand_StartsAfterAllLines(t *testing.T) {
	t.Parallel()
	const lines = 20_000
	for _, format := range []string{formatText, formatJSON} {
		a := actor("a", role{Dialect: "v1", Flood: lines})
		p := start(t, runArgs(writePipeline(t, a, shell("b", "echo gone")), "-log-format", format, "--", "sh", "-c", "echo the command >&2"), func(p *process) { p.cmd.Stderr = slowWriter{p.stderr} })
		p.exit(exitOK)
		before, _, _ := strings.Cut(p.stderr.String(), "the command\n")
		for want, count := range map[string]int{"pipeline ready": 1, "gone": 1, " of a ": lines} {
			if got := strings.Count(before, want); got != count {
				t.Errorf("%s: before the command %q came %d times, want %d", format, want, got, count)
			}
		}
	}
}

// What components print at their end is not lost either, where standard error is read late.
func TestCommand_LateReaderGetsAllLines(t *testing.T) {
	t.Parallel()
	const lines = 1_200
	r, w := openPipe(t)
	data := numbered(t, filepath.Join(t.TempDir(), "data"), "a", lines, 100) // more than a pipe holds, and fewer bytes than flowctl may queue beside it
	p := start(t, runArgs(writePipeline(t, shell("a", "trap 'cat "+data+"; exit' TERM; echo up; while :; do sleep 0.02; done")), "--", "echo", "ran"), func(p *process) { p.cmd.Stderr = w })
	w.Close()
	p.waitOut("ran\n")
	time.Sleep(flushTime + time.Second) // it is time itself that must not matter
	text := get(io.ReadAll(r))(t)
	p.exit(exitOK)
	if got := strings.Count(string(text), " a | a 0"); got != lines {
		t.Errorf("%d lines, want %d", got, lines)
	}
}

// A pipeline that has completed before all is written runs its command, too.
func TestCommand_OfAPipelineThatHasCompleted(t *testing.T) {
	t.Parallel()
	a := actor("a", role{Dialect: "v1", Flood: 5_000, End: "registered"})
	p := start(t, runArgs(writePipeline(t, a), "--", "echo", "ran"), func(p *process) { p.cmd.Stderr = slowWriter{p.stderr} })
	p.exit(exitOK)
	p.has(p.stdout, "ran\n")
	p.has(p.stderr, " a | registered\n", "command ended")
}

// While nobody reads what comes before the command, a signal ends the run without it.
func TestCommand_SignalBeforeAllIsWritten(t *testing.T) {
	t.Parallel()
	_, w := openPipe(t)
	fillPipe(w)
	p := start(t, runArgs(writePipeline(t, shell("a", "exec sleep 300")), "--", "echo", "ran"), func(p *process) { p.cmd.Stderr = w })
	eventually(t, "a pipeline that is ready", func() bool {
		code, _, _ := start(t, []string{"list"}, beside(p)).finish()
		return code == exitOK
	})
	p.signal(syscall.SIGTERM)
	p.exit(128 + int(syscall.SIGTERM))
	p.hasNot(p.stdout, "ran")
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
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT} {
		p := start(t, runArgs(file, "--", "sh", "-c", `trap "echo asked; sleep 0.3; echo done; exit 9" INT QUIT; echo up; while :; do sleep 0.05; done`))
		p.waitOut("up\n")
		p.signal(sig)
		p.exit(9)
		p.has(p.stdout, "asked\n", "done\n")
		p.has(p.stderr, "command ended", "a | stopped\n")
	}

	p := start(t, runArgs(file, "-stop-timeout", "500ms", "--", "sh", "-c", `trap "" INT; trap "echo asked" TERM; echo up; while :; do sleep 0.05; done`))
	p.waitOut("up\n")
	p.signal(syscall.SIGINT)
	p.waitErr("waiting for the command to end")
	p.signal(syscall.SIGTERM)
	p.exit(128 + 9)
	p.has(p.stdout, "asked\n")
}

// A command that ignores SIGTERM or SIGHUP is killed, because no other signal may come. One
// that ignores SIGINT or SIGQUIT is not: a person who presses Ctrl-C can press it again.
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
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(file, "-stop-timeout", "100ms", "--", "sh", "-c", `trap "" INT QUIT; echo up; sleep 0.4; exit 9`))
			p.waitOut("up\n")
			p.signal(sig)
			p.exit(9)
		})
	}
}

// A signal that comes by two ways is one signal: the pipeline goes on until the command has
// ended.
func TestCommand_SignalByTwoWaysIsOne(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, shell("a", "exec sleep 300"))
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(file, "--", "sh", "-c", `trap "asked=1" INT TERM HUP QUIT; echo up; while [ -z "$asked" ]; do sleep 0.02; done; sleep 0.3; exit 9`))
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
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(writePipeline(t, deaf), "-stop-timeout", "1h", "--", "sh", "-c", `trap "" INT TERM QUIT; echo up; while :; do sleep 0.05; done`))
			p.waitErr("deaf\n")
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
	command := "exec " + flowctlProgram() + " run " + file + ` -log-dir "" -control-plane-port 0 -- sh -c 'trap "echo once >>` + heard + `" INT; echo up; n=0; while [ $n -lt 20 ]; do n=$((n+1)); sleep 0.05; done; exit 5'`
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
