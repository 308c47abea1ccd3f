package main

import (
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// deafCommand is a wrapped command that runs and takes no notice of signals, which it
// adds to sent.
func deafCommand(sent *[]os.Signal) *wrapped {
	return &wrapped{argv: []string{"deaf"}, pid: 7, signal: func(sig os.Signal) error {
		*sent = append(*sent, sig)
		return nil
	}}
}

func TestWrapped_IsKilledAndThenGivenUp(t *testing.T) {
	t.Parallel()
	var sent []os.Signal
	w, now, log := deafCommand(&sent), time.Now(), slog.New(slog.NewTextHandler(t.Output(), nil))
	w.stop(now, 10*time.Second)
	for _, step := range []struct {
		after time.Duration
		want  []os.Signal
		over  bool
	}{
		{10*time.Second - 1, []os.Signal{syscall.SIGTERM}, false},
		{10 * time.Second, []os.Signal{syscall.SIGTERM, syscall.SIGKILL}, false},
		{10*time.Second + killPatience - 1, []os.Signal{syscall.SIGTERM, syscall.SIGKILL}, false},
		{10*time.Second + killPatience, []os.Signal{syscall.SIGTERM, syscall.SIGKILL}, true},
	} {
		err := w.expire(now.Add(step.after), log)
		if !slices.Equal(sent, step.want) || w.runs() == step.over || (err != nil) != step.over {
			t.Fatalf("after %s: signals %v, want %v; waited for: %t, want %t; error %v", step.after, sent, step.want, w.runs(), !step.over, err)
		}
		if want := `the command "deaf" after --: pid 7 is still running 5s after SIGKILL`; step.over && err.Error() != want {
			t.Errorf("error %q, want %q", err, want)
		}
	}
	if !w.due().IsZero() || w.end() != nil {
		t.Error("a command that was given up is still waited for")
	}
}

func TestWrapped_GetsTheFirstSignalAlone(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		sig   syscall.Signal
		bound bool // SIGKILL follows
	}{
		{syscall.SIGINT, false}, // who sends it can send another
		{syscall.SIGTERM, true},
		{syscall.SIGHUP, true},
	} {
		var sent []os.Signal
		w, now := deafCommand(&sent), time.Now()
		if !w.forward(tt.sig, now, time.Minute) || w.forward(tt.sig, now, time.Minute) {
			t.Errorf("%s: want the first forwarded and the second not", tt.sig)
		}
		if got := w.due(); tt.bound != got.Equal(now.Add(time.Minute)) || !tt.bound && !got.IsZero() {
			t.Errorf("%s: SIGKILL at %v", tt.sig, got)
		}
		if !slices.Equal(sent, []os.Signal{tt.sig}) && tt.sig != syscall.SIGINT { // in a terminal that sends it
			t.Errorf("%s: it got %v", tt.sig, sent)
		}
	}
}

func TestWrapped_ExitCodeIsThatOfAShell(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		status syscall.WaitStatus
		code   int
		reason string
	}{
		{exitStatus(0), 0, ""},
		{exitStatus(42), 42, "exit status 42"},
		{syscall.WaitStatus(syscall.SIGTERM), 128 + 15, "killed by signal 15 (terminated)"},
	} {
		code, err := deafCommand(new([]os.Signal)).exited(tt.status)
		if code != tt.code || (err == nil) != (tt.reason == "") || err != nil && !strings.HasSuffix(err.Error(), tt.reason) {
			t.Errorf("status %d: code %d, error %v; want %d, %q", tt.status, code, err, tt.code, tt.reason)
		}
	}
	if code, err := (&wrapped{argv: []string{"x"}}).notRun(syscall.SIGTERM); code != 128+15 || err == nil {
		t.Errorf("not run: code %d, error %v; want 143 and one", code, err)
	}
	if code, err := (*wrapped)(nil).notRun(syscall.SIGTERM); code != exitOK || err != nil {
		t.Errorf("no command: code %d, error %v; want 0 and none", code, err)
	}
}
