package main

// Signals to flowctl that ask for an end, each heeded once.

import (
	"os"
	"os/signal"
	"syscall"
	"time"
)

// repeatTime is how long after a signal the same one is taken for the same request.
const repeatTime = 50 * time.Millisecond

// catchSignals returns the signals that ask for an end. SIGHUP stays ignored where flowctl was started
// so, by nohup; SIGINT and SIGQUIT do not, which a script's shell ignores for what it starts in the
// background, and children would inherit that. Without SIGPIPE a closed standard output is an error of a write.
func catchSignals() <-chan os.Signal {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(signals, syscall.SIGHUP)
	}
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	return signals
}

// heededSignal is the last signal that the run heeded before its stop.
type heededSignal struct {
	sig os.Signal // nil for none, or for whichever may have ended the command
	at  time.Time
}

// isRepeated tells whether sig is the request that was heeded, come by another way: a shell
// and the kernel both tell of a terminal that is closed, timeout(1) tells the group and its
// child, and a terminal tells flowctl and the command that ends by it.
func (h heededSignal) isRepeated(sig os.Signal, now time.Time) bool {
	if h.sig == nil {
		return !h.at.IsZero() && now.Sub(h.at) < repeatTime
	}
	if sig == syscall.SIGHUP {
		return h.sig != nil && !isInterrupt(h.sig)
	}
	return sig == h.sig && now.Sub(h.at) < repeatTime
}
