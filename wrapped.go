package main

// The command after --: its start, its signals and its end.

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// wrapped is the command after --, for which a run makes its pipeline ready. It is no
// component: its input, output and signals are its own, and its end is that of the run.
// The loop of the run owns it. A nil one stands for a run without a command.
type wrapped struct {
	argv []string

	ready  chan struct{}             // closed when it can be started; nil before prepare
	cancel context.CancelFunc        // ends what prepare has begun
	pid    int                       // 0 before its start
	signal func(os.Signal) error     // sends it a signal
	ended  <-chan syscall.WaitStatus // gets its end, once; nil before its start
	over   bool                      // it has ended, was not started or outlived SIGKILL

	forwarded int       // signals that it was sent, or got from the terminal
	killed    bool      // it was sent SIGKILL
	deadline  time.Time // when it gets SIGKILL; if killed, when it is given up; zero for never
}

// newWrapped returns the command argv, nil for none. It fails at once if there is no such program.
func newWrapped(argv []string) (*wrapped, error) {
	if len(argv) == 0 {
		return nil, nil
	}
	if _, err := exec.LookPath(argv[0]); err != nil {
		return nil, fmt.Errorf("the command after --: cannot run %q: %v", argv[0], cause(err))
	}
	return &wrapped{argv: argv}, nil
}

// prepare begins what has to be done before the start, which prepared tells the end of. close ends it.
func (w *wrapped) prepare(f func(context.Context)) {
	ready := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	w.ready, w.cancel = ready, cancel
	go func() {
		f(ctx)
		close(ready)
	}()
}

// prepared returns the channel that tells when the command can be started, nil while it is not to be.
func (w *wrapped) prepared() <-chan struct{} {
	if w == nil || w.pid != 0 || w.over {
		return nil
	}
	return w.ready
}

// close waits for what prepare has begun, and ends it.
func (w *wrapped) close() {
	if w != nil && w.ready != nil {
		w.cancel()
		<-w.ready
	}
}

// start starts the command in flowctl's own process group: a terminal's signals reach it.
func (w *wrapped) start(l *launcher) error {
	cmd := exec.Command(w.argv[0], w.argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	ended, err := l.startCommand(commandID, cmd)
	if err != nil {
		w.over = true
		return fmt.Errorf("the command after --: cannot run %q: %w", w.argv[0], cause(err))
	}
	w.pid, w.signal, w.ended = cmd.Process.Pid, cmd.Process.Signal, ended
	return nil
}

func (w *wrapped) runs() bool { return w != nil && w.pid != 0 && !w.over }

// end returns the channel that gets the end of the command, nil while it does not run.
func (w *wrapped) end() <-chan syscall.WaitStatus {
	if !w.runs() {
		return nil
	}
	return w.ended
}

// due is when expire has something to do, zero for never.
func (w *wrapped) due() time.Time {
	if !w.runs() {
		return time.Time{}
	}
	return w.deadline
}

// exited returns the exit code that flowctl has for the end of the command, as a shell has, and an
// error unless that is 0.
func (w *wrapped) exited(status syscall.WaitStatus) (int, error) {
	w.over = true
	code := status.ExitStatus()
	if status.Signaled() {
		code = 128 + int(status.Signal())
	}
	if code == exitOK {
		return code, nil
	}
	return code, fmt.Errorf("the command %q after -- failed: %s", w.argv[0], describeExit(status))
}

// isInterrupt tells whether sig is one that a person sends by a key, and can send again: Ctrl-C or Ctrl-\.
func isInterrupt(sig os.Signal) bool { return sig == syscall.SIGINT || sig == syscall.SIGQUIT }

// forward hands on the first signal that flowctl gets, unless the terminal has sent it to both, and
// returns false for later ones: they stop the pipeline. Who interrupts can wait and do it again;
// any other signal may be all that comes, so SIGKILL follows it after limit.
func (w *wrapped) forward(sig os.Signal, now time.Time, limit time.Duration) bool {
	if w.forwarded++; w.forwarded > 1 {
		return false
	}
	if !isInterrupt(sig) {
		w.deadline = now.Add(limit)
	}
	if !isInterrupt(sig) || !takesInterrupts() {
		_ = w.signal(sig) // an error says that it has ended, of which ended tells
	}
	return true
}

// stop asks the command to end, because the pipeline does. SIGKILL follows after limit. A command that
// does not run yet is not started any more.
func (w *wrapped) stop(now time.Time, limit time.Duration) {
	if w != nil && w.pid == 0 {
		w.over = true
	}
	if w.runs() && !w.killed {
		_ = w.signal(syscall.SIGTERM)
		w.deadline = earliest(w.deadline, now.Add(limit))
	}
}

// expire sends SIGKILL to a command that has not ended in time. It returns an error once for one that
// outlives that, which is waited for no longer.
func (w *wrapped) expire(now time.Time, log *slog.Logger) error {
	at := w.due()
	switch {
	case at.IsZero() || now.Before(at):
		return nil
	case w.killed:
		w.over = true
		return fmt.Errorf("the command %q after --: %s", w.argv[0], describeStuck(w.pid, killPatience))
	}
	log.Warn("the command still runs, sending SIGKILL", "pid", w.pid)
	w.killed, w.deadline = true, now.Add(killPatience)
	_ = w.signal(syscall.SIGKILL)
	return nil
}
