package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
	"unsafe"
)

const (
	footerTime = 250 * time.Millisecond // the footer changes no more often
	uptimeTime = time.Second            // it is drawn anew so often although nothing happens
	eraseTime  = time.Second            // for a terminal to take what is to be on it before others use it
)

// screen is a terminal with a footer below the lines: all that flowctl shows on it
// passes through lines, a logWriter that writes to the screen.
//
// The footer begins with an empty row, and the cursor rests at its start. What is to
// be erased before the next lines is always what is below the cursor, so neither the
// width of lines, nor what a terminal makes of them when it is resized, nor what the
// user types in a line needs to be known. Where Enter has taken the cursor away, it is
// brought back to where it was saved; but Enter pressed so often between two redraws
// that the terminal scrolls the footer leaves a copy of it among the lines. A terminal
// may be narrower by now than it was when it was asked, so rows are written with
// autowrap off (DECAWM), and on again by the same write(2): that is all that is ever
// changed of it, and there is nothing to restore, however flowctl ends.
type screen struct {
	f       *os.File
	lines   *logWriter
	signals chan os.Signal // SIGWINCH and SIGTSTP, which the owner hands to signalled

	mu        sync.Mutex // guards the fields below
	rows      []string   // of the footer, in full; folded, it is the first
	suspended bool
	gone      bool // for good

	// Only Write, which lines calls, uses what follows.
	buf           []byte
	drawn         []byte // the footer as it is on the terminal, nil for none
	width, height int    // of the terminal then
	typed         int    // bytes that nobody had read then
}

// openOutputs returns where the log of a run goes, where the lines of its components
// go, and the screen that both are on. That is nil where the status goes into the log:
// it is not to be shown otherwise, standard error is no terminal that can have a
// footer, or standard output is another one, or a pipe.
func openOutputs(o runFlags) (stderr *logWriter, stdout io.Writer, s *screen) {
	out, _ := os.Stdout.Stat()
	err, _ := os.Stderr.Stat()
	piped := !isTerminal(os.Stdout)
	maybeHere := out.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 // of tee, say: what it gets can come to this terminal
	if !o.showStatus || o.format != formatText || !isTerminal(os.Stderr) || os.Getenv("TERM") == "dumb" || maybeHere || !piped && !os.SameFile(out, err) {
		return newLogWriter(patient{os.Stderr}, o.format), patient{os.Stdout}, nil
	}
	s = &screen{f: os.Stderr, signals: make(chan os.Signal, 4)}
	s.lines = newLogWriter(s, o.format)
	signal.Notify(s.signals, syscall.SIGWINCH)
	if !signal.Ignored(syscall.SIGTSTP) {
		signal.Notify(s.signals, syscall.SIGTSTP)
	}
	if piped {
		return s.lines, patient{os.Stdout}, s
	}
	return s.lines, waiting{s.lines}, s
}

// events is nil, which never has any, for no screen.
func (s *screen) events() <-chan os.Signal {
	if s == nil {
		return nil
	}
	return s.signals
}

// shows tells whether the footer is there to be read. A flowctl in the background has
// none: the terminal is another's.
func (s *screen) shows() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.suspended && !s.gone && inForeground(s.f)
}

// show has rows for a footer from now on.
func (s *screen) show(rows []string) {
	s.mu.Lock()
	s.rows = rows
	s.mu.Unlock()
	s.lines.poke()
}

// dismiss erases the footer for good, and returns when that is done or eraseTime is over.
func (s *screen) dismiss() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
	s.lines.flush(eraseTime)
}

// signalled acts on a signal. By SIGTSTP, of Ctrl-Z, flowctl stops: it returns when
// it runs again.
func (s *screen) signalled(sig os.Signal) {
	if sig == syscall.SIGTSTP {
		s.suspend(true)
		s.lines.flush(eraseTime)
		stopSelf()
		s.suspend(false)
	}
	s.lines.poke()
}

func (s *screen) suspend(suspended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.suspended = suspended
}

// Write writes whole lines, and the footer below them, by one write(2).
func (s *screen) Write(lines []byte) (int, error) {
	width, height := terminalSize(s.f)
	footer, ours := s.footer(width, height)
	if !ours {
		s.drawn = nil // it is not ours to erase any more
	}
	typed, resized := unread(s.f), width != s.width || height != s.height
	if len(lines) == 0 && bytes.Equal(footer, s.drawn) && (footer == nil || typed == s.typed && !resized) {
		return 0, nil
	}
	out := s.buf[:0]
	if s.drawn != nil {
		if typed != s.typed && !resized {
			out = append(out, "\x1b8"...)
		}
		if len(lines) > 0 || footer == nil {
			out = append(out, "\r \x1b[J\r"...) // not from its corner: tmux would take what is erased into its history
		} else {
			out = append(out, "\r\x1b[K"...) // the rest is written over, which does not flicker
		}
	}
	out = appendTame(out, lines)
	out = append(out, footer...)
	s.buf, s.drawn, s.width, s.height, s.typed = out, footer, width, height, typed
	if cap(s.buf) > 2*maxLine {
		s.buf = nil
	}
	if _, err := (patient{s.f}).Write(out); err != nil {
		return 0, err
	}
	return len(lines), nil
}

// footer is what draws it from the start of an empty row, where the cursor then is
// again, and saved. It has no newlines, at which the kernel would split it. Where it
// would take more than half of the terminal it is folded to its first row. It is nil
// for none, and ours is false where the terminal is another's now.
func (s *screen) footer(width, height int) (footer []byte, ours bool) {
	if !inForeground(s.f) {
		return nil, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	rows := s.rows
	if 1+len(rows) > height/2 {
		rows = rows[:min(1, len(rows))]
	}
	if s.suspended || s.gone || len(rows) == 0 || height < 3 {
		return nil, true
	}
	footer = append(footer, "\x1b[?7l"...)
	for _, row := range rows {
		footer = append(append(append(footer, "\x1bE"...), cut(row, width-1)...), "\x1b[K"...)
	}
	return fmt.Appendf(footer, "\x1b[J\x1b[?7h\x1b[%dA\r\x1b7", len(rows)), true
}

// footerRows are the rows of a footer: how the pipeline is, a head, and a row for each
// component.
func (p *listedPipeline) footerRows(now time.Time) []string {
	var table strings.Builder
	tw := tabwriter.NewWriter(&table, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tSTATE\tHEALTH\tPID\tUPTIME\tLAST SEEN\tRESTARTS\tMETRICS")
	for _, l := range p.Components {
		uptime := "-"
		if l.PID != 0 && l.Started != nil {
			uptime = max(now.Sub(*l.Started), 0).Round(time.Second).String()
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", clean(l.ID), clean(l.State), clean(l.Health), dash(l.PID != 0, l.PID),
			uptime, dash(l.LastSeen != nil, l.age(now)), l.Restarts, l.metricsText())
	}
	_ = tw.Flush() // a Builder always takes it
	head := fmt.Sprintf("%s (%s): %s", clean(p.Pipeline), clean(p.Endpoint), printable(p.Status))
	return append([]string{head}, strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n")...)
}

// inForeground tells whether flowctl is in the foreground process group of its
// terminal f, which reads from it and gets its signals (tty_ioctl(4)).
func inForeground(f *os.File) bool {
	var group int32
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), syscall.TIOCGPGRP, uintptr(unsafe.Pointer(&group)))
	return errno == 0 && int(group) == syscall.Getpgrp()
}

// unread is how many bytes of whole lines were typed on terminal f and not read.
func unread(f *os.File) int {
	var n int32
	_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), ioctlUnread, uintptr(unsafe.Pointer(&n))) // it fails for no terminal
	return int(n)
}

// appendTame appends lines without what would move the cursor or change the terminal,
// and ends a colour with the line that left it on. Sequences are those of ECMA-48.
func appendTame(out, lines []byte) []byte {
	lit := false // by a colour, or what else SGR can do
	for len(lines) > 0 {
		plain := 0
		for plain < len(lines) && !wild[lines[plain]] && (!lit || lines[plain] != '\n') {
			plain++
		}
		out, lines = append(out, lines[:plain]...), lines[plain:]
		if len(lines) == 0 {
			break
		}
		if lines[0] == '\n' {
			out, lines, lit = append(out, "\x1b[0m\n"...), lines[1:], false
			continue
		}
		n, sgr := sequence(lines)
		if sgr {
			out = append(out, lines[:n]...)
			lit = !bytes.Equal(lines[:n], []byte("\x1b[0m")) && !bytes.Equal(lines[:n], []byte("\x1b[m"))
		} else if n == 0 {
			out, n = append(out, lines[0]), 1
		}
		lines = lines[n:]
	}
	return out
}

// wild are the bytes with which something begins that is not text: ESC, SO, SI, and
// the first of two that are a control character of the second set in UTF-8.
var wild = [256]bool{0x1b: true, 0x0e: true, 0x0f: true, 0xc2: true}

// sequence is how many of the bytes at the start of text, which is wild, are no text.
// Of a sequence that has no end in its line that is only how it begins.
func sequence(text []byte) (n int, sgr bool) {
	text, _, _ = bytes.Cut(text, []byte{'\n'})
	kind := byte(0)
	switch {
	case text[0] == 0x0e || text[0] == 0x0f:
		return 1, false
	case len(text) < 2:
		if text[0] == 0x1b {
			return 1, false
		}
		return 0, false
	case text[0] == 0x1b:
		kind = text[1]
	case text[1] >= 0x80 && text[1] < 0xa0:
		kind = text[1] - 0x40 // ESC and this mean the same
	default:
		return 0, false
	}
	switch kind {
	case '[':
		n, sgr = controlSequence(text[2:])
		return 2 + n, sgr && text[0] == 0x1b
	case ']', 'P', 'X', '^', '_':
		return 2 + controlString(text[2:], kind == ']'), false
	}
	if text[0] != 0x1b {
		return 2, false
	}
	n = 1
	for n < len(text) && text[n] >= 0x20 && text[n] < 0x30 {
		n++
	}
	if n < len(text) && text[n] >= 0x30 && text[n] < 0x7f {
		n++
	}
	return n, false
}

// controlSequence is the length of what follows CSI, as far as it is well formed, and
// whether it is SGR: parameters of digits, and m.
func controlSequence(text []byte) (n int, sgr bool) {
	for n < len(text) && (text[n] >= '0' && text[n] <= '9' || text[n] == ';' || text[n] == ':') {
		n++
	}
	if n < len(text) && text[n] == 'm' {
		return n + 1, true
	}
	for n < len(text) && text[n] >= 0x20 && text[n] < 0x40 {
		n++
	}
	if n < len(text) && text[n] >= 0x40 && text[n] < 0x7f {
		n++
	}
	return n, false
}

// controlString is the length of what follows OSC, DCS or the like up to its end, 0
// where that is missing. BEL ends one too, if bell is true.
func controlString(text []byte, bell bool) int {
	for i, b := range text {
		switch {
		case b == '\a' && bell:
			return i + 1
		case b == 0x1b && i+1 < len(text) && text[i+1] == '\\', b == 0xc2 && i+1 < len(text) && text[i+1] == 0x9c:
			return i + 2
		case b == 0x1b:
			return 0
		}
	}
	return 0
}
