package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"
)

// guest is the command after --, which a pipeline that is ready is run for. It is no
// component: its input, output and signals are its own, and its end is that of the run.
type guest struct {
	argv  []string
	ended chan *os.ProcessState // gets how it ended, once

	cmd      *exec.Cmd // nil before it is started
	over     bool
	signals  int       // that it was sent, or got from the terminal
	deadline time.Time // when it gets SIGKILL, zero for never
}

// newGuest fails where there is no such program: that is not to be found out when a
// pipeline has been started for it.
func newGuest(argv []string) (*guest, error) {
	if len(argv) == 0 {
		return nil, nil
	}
	if _, err := exec.LookPath(argv[0]); err != nil {
		return nil, fmt.Errorf("the command after --: cannot run %q: %v", argv[0], cause(err))
	}
	return &guest{argv: argv, ended: make(chan *os.ProcessState)}, nil
}

// start starts the command in flowctl's own process group, so that a terminal's
// signals reach it. It is known by the mark of the run, like whatever it starts.
func (g *guest) start(s *supervisor) error {
	g.cmd = exec.Command(g.argv[0], g.argv[1:]...)
	g.cmd.Stdin, g.cmd.Stdout, g.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	endpoint := "FLOWCTL_ENDPOINT=" + s.settings.endpoint
	g.cmd.Env = append(slices.DeleteFunc(os.Environ(), hidden), endpoint, runMark+"="+s.run)
	if slices.Contains(s.settings.tlsEnv, endpoint) { // there is none without TLS
		g.cmd.Env = append(g.cmd.Env, s.settings.tlsEnv...)
	}
	if err := s.leaders.start(guestID, s.reaper, g.cmd); err != nil {
		g.over = true
		return fmt.Errorf("the command after --: cannot run %q: %v", g.argv[0], cause(err))
	}
	go func() { // loop waits for it, but for one that SIGKILL does not end
		_ = s.reaper.wait(g.cmd) // how it ended is in its state
		s.leaders.ended(g.cmd.Process.Pid)
		g.ended <- g.cmd.ProcessState
	}()
	return nil
}

// runs is false for no guest, too.
func (g *guest) runs() bool { return g != nil && g.cmd != nil && !g.over }

// unrun is the exit code of flowctl, and why, for a sig that ends the run before the
// command was started: 0 would say that it has succeeded. Without a command it is 0.
func (g *guest) unrun(sig os.Signal) (int, error) {
	number, ok := sig.(syscall.Signal)
	if g == nil || g.cmd != nil || !ok {
		return exitOK, nil
	}
	return 128 + int(number), fmt.Errorf("the command %q after -- was not run: signal %d (%s) came first", g.argv[0], number, sig)
}

// code is the exit code of flowctl for the end of the command, as a shell has it.
func (g *guest) code(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

// pass hands a signal on that flowctl got, unless the terminal has sent it to both.
// It is false for the second, after which there is no more waiting. Who sends SIGINT
// can wait for the end, and send another; any other signal may be all that comes, and
// SIGKILL follows it.
func (g *guest) pass(sig os.Signal, now time.Time, patience time.Duration) bool {
	if g.signals++; g.signals > 1 {
		return false
	}
	if sig != syscall.SIGINT {
		g.deadline = now.Add(patience)
	}
	if sig != syscall.SIGINT || !takesInterrupts() {
		_ = g.cmd.Process.Signal(sig)
	}
	return true
}

// end asks the command to end, because the pipeline does.
func (g *guest) end(now time.Time, patience time.Duration) {
	if g.runs() {
		_ = g.cmd.Process.Signal(syscall.SIGTERM)
		g.deadline = earliest(g.deadline, now.Add(patience))
	}
}

// expire kills the command when it was asked to end for long enough.
func (g *guest) expire(now time.Time, log *slog.Logger) {
	if g.runs() && !g.deadline.IsZero() && !now.Before(g.deadline) {
		log.Warn("the command still runs, sending SIGKILL", "pid", g.cmd.Process.Pid)
		g.deadline = time.Time{}
		_ = g.cmd.Process.Kill()
	}
}

// takesInterrupts tells whether Ctrl-C in flowctl's terminal reaches it, and so what
// is in its process group.
func takesInterrupts() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	return inForeground(tty)
}
