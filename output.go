// Where lines go: to the console, to log files, to the journal, to a terminal with a
// footer. The loop of a run has one outputs for all of them.

package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"
)

// The forms of the log, as -log-format names them.
const (
	formatAuto    = "auto"
	formatText    = "text"
	formatJSON    = "json"
	formatJournal = "journal"
)

const (
	maxLine    = 1 << 20  // bytes of a line of a component that are kept together: a longer one is passed on in pieces
	maxQueued  = 1 << 20  // bytes of flowctl's own log that wait to be written; more is dropped
	maxAhead   = 64 << 10 // queued bytes from which on components wait
	maxKept    = 2 << 20  // bytes of a buffer that is kept for the next lines
	maxLogFile = 10 << 20 // bytes of a log file before it is rotated

	footerTime = 250 * time.Millisecond // between two changes of the footer, at least
	uptimeTime = time.Second            // between two changes of the footer, at most: it shows uptimes
	eraseTime  = time.Second            // for a terminal to take the erased footer before others use it
)

// outputConfig says where the lines of a run go.
type outputConfig struct {
	pipeline string   // its name, "" for a control plane alone
	ids      []string // of its components
	format   string   // formatText, formatJSON or formatJournal
	level    slog.Level
	footer   bool // a footer is wanted, where there is a terminal for it
}

// outputs are all the places that lines go to. The methods emit, flush and log may be
// called by any goroutine, the others by the one that owns the run.
type outputs struct {
	log    *slog.Logger  // flowctl's own; it never blocks
	broken chan struct{} // closed when standard output cannot be written; brokenErr says why

	format  string
	stderr  *logWriter
	console *console
	screen  *screen     // nil for no footer
	journal *journalLog // nil where the log is not in the journal
	files   *logFiles   // nil for none
}

// runReport is the report of a run that failed, in each of its forms.
type runReport struct {
	text, json []byte // whole lines
	journal    []journalEntry
}

// openOutputs opens all but the log files. The caller has to close it.
func openOutputs(c outputConfig) *outputs {
	o := &outputs{format: c.format}
	if c.footer && c.format == formatText {
		o.screen = openScreen()
	}
	write := blockingFile{os.Stdout}.Write
	if o.screen == nil {
		o.stderr = newLogWriter(blockingFile{os.Stderr}, c.format, nil, nil)
	} else if o.stderr = o.screen.lines; o.screen.shared {
		write = o.stderr.writeWaiting
	}
	o.log = newLogger(o.stderr, c.format, c.level)
	if c.format == formatJournal {
		o.journal = openJournal(c.pipeline, c.ids)
		o.log = slog.New(o.journal.handler(c.level))
	}
	o.console = newConsole(write, c.format, useColours(os.Stdout), c.ids)
	o.broken = o.console.broken
	return o
}

// close writes what is left, for at most flushTime each, and closes all.
func (o *outputs) close() {
	if o.files != nil {
		o.files.close()
	}
	o.journal.close()
	o.stderr.close()
	o.screen.close()
}

// openFiles has the lines of each of the components ids kept in a file in dir. It has to
// be called before the first of them is started.
func (o *outputs) openFiles(dir string, ids []string) (err error) {
	o.files, err = openLogFiles(dir, ids, o.log)
	return err
}

// add makes the components ids known, by a reload. Its error is that of a log file; the
// console and the journal do not know them then.
func (o *outputs) add(ids []string) error {
	if o.files != nil {
		for _, id := range ids {
			if err := o.files.add(id); err != nil {
				return err
			}
		}
	}
	for _, id := range ids {
		o.console.add(id)
		if o.journal != nil {
			o.journal.add(id)
		}
	}
	return nil
}

// emit passes lines of a component on. The log files come first, so that what is shown
// is in them.
func (o *outputs) emit(id, stream string, lines []byte) {
	if o.files != nil {
		o.files.lines(id, stream, lines)
	}
	if o.journal != nil {
		o.journal.lines(id, stream, lines)
	} else {
		o.console.lines(id, stream, lines)
	}
}

// flush returns when all lines that were emitted are written, however long that takes.
func (o *outputs) flush() {
	if o.screen != nil && o.screen.shared {
		o.stderr.await()
	}
}

// brokenErr is why standard output cannot be written. It is for when broken is closed:
// before that it may wait for a write.
func (o *outputs) brokenErr() error {
	o.console.mu.Lock()
	defer o.console.mu.Unlock()
	return o.console.err
}

// logFile is where the lines of a component are kept, "" for nowhere.
func (o *outputs) logFile(id string) string {
	if o.files == nil {
		return ""
	}
	return o.files.path(id)
}

// report writes the report of a run that failed.
func (o *outputs) report(r runReport) {
	switch {
	case o.journal != nil:
		o.journal.report(r.journal)
	case o.format == formatJSON:
		_, _ = o.stderr.Write(r.json)
	default:
		_, _ = o.stderr.Write(r.text) // at once, because a line at a time could be lost by half
	}
}

// showsFooter tells whether a footer can be seen. A flowctl in the background shows none,
// because the terminal is another's.
func (o *outputs) showsFooter() bool { return o.screen != nil && o.screen.shows() }

// updateFooter shows rows as the footer, unless the last are younger than footerTime. In
// that case footerDue says when to call it again.
func (o *outputs) updateFooter(now time.Time, rows func() []string) {
	if s := o.screen; s != nil {
		if s.overdue = now.Sub(s.updated) < footerTime; !s.overdue {
			s.updated = now
			s.show(rows())
		}
	}
}

// footerDue returns a channel that gets the time when updateFooter is to be called although
// nothing has happened. It is nil without a footer.
func (o *outputs) footerDue() <-chan time.Time {
	if o.screen == nil {
		return nil
	}
	wait := uptimeTime
	if o.screen.overdue {
		wait = footerTime
	}
	return time.After(time.Until(o.screen.updated.Add(wait)))
}

// removeFooter erases the footer for good. It returns when that is done, or eraseTime
// is over.
func (o *outputs) removeFooter() {
	if o.screen != nil {
		o.screen.remove()
	}
}

// newLogger returns flowctl's own log. Durations are shown as Go writes them, such
// as 1.5s, in JSON too.
func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	readable := func(groups []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey && len(groups) == 0 && format != formatJSON && a.Value.Kind() == slog.KindTime {
			a.Value = slog.StringValue(a.Value.Time().Format(time.TimeOnly))
		}
		return durationText(groups, a)
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: readable}
	if format == formatJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// resolveFormat returns the format that auto stands for here: the journal's, if standard
// error leads to the journal, else text. It fails for a journal that is not there.
func resolveFormat(format string) (string, error) {
	switch {
	case format == formatAuto && stderrIsJournal():
		return formatJournal, nil
	case format == formatAuto:
		return formatText, nil
	case format == formatJournal && !journalRuns():
		return "", errors.New("-log-format journal: there is no journal on this machine (/run/systemd/journal/socket): choose auto, text or json")
	}
	return format, nil
}

// printAnswer writes to standard output what a command was asked for. Its error is that
// of the command: an answer that is not read is no success.
func printAnswer(text string) error {
	_, err := io.WriteString(os.Stdout, text)
	return err
}

// palette are the colours of components on a terminal, readable on black and white.
var palette = []string{"36", "33", "32", "35", "34", "96", "93", "92", "95", "94"}

// console writes the lines of components to one output, whole and one component's
// at a time. Its first error is kept: from then on it drops what it gets, so that
// components can be stopped.
type console struct {
	write   func([]byte) (int, error)
	json    bool
	colours bool
	broken  chan struct{} // closed after the first error

	mu     sync.Mutex        // guards heads and colour; never held during write, so that add does not wait for a reader
	heads  map[string]string // by id: what stands between the time and the line
	colour map[string]string // by id: the escape code, empty without colours
	width  int               // of the longest id that was known at first

	writing sync.Mutex // guards the fields below; held during write, so that a slow reader slows components
	buf     []byte
	err     error
}

func newConsole(write func([]byte) (int, error), format string, colours bool, ids []string) *console {
	c := &console{write: write, json: format == formatJSON, colours: colours, heads: make(map[string]string), colour: make(map[string]string), broken: make(chan struct{})}
	for _, id := range ids {
		c.width = max(c.width, len(id))
	}
	for _, id := range ids {
		c.add(id)
	}
	return c
}

// add makes id known, in the next colour. The lines of one that is longer than those
// before stand out to the right.
func (c *console) add(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.heads[id] != "" {
		return
	}
	if c.colours {
		c.colour[id] = "\x1b[" + palette[len(c.heads)%len(palette)] + "m"
	}
	c.heads[id] = fmt.Sprintf(" %-*s | ", c.width, id)
}

// lines writes lines of a component.
func (c *console) lines(id, stream string, lines []byte) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.err != nil {
		return
	}
	c.buf = c.buf[:0]
	if c.json {
		c.appendJSON(id, stream, lines, time.Now())
	} else {
		c.appendText(id, lines, time.Now())
	}
	if _, err := c.write(c.buf); err != nil {
		c.err = err
		close(c.broken)
	}
	if cap(c.buf) > maxKept {
		c.buf = nil
	}
}

func (c *console) appendText(id string, lines []byte, now time.Time) {
	stamp := now.AppendFormat(make([]byte, 0, len(time.TimeOnly)), time.TimeOnly)
	c.mu.Lock()
	head, colour := c.heads[id], c.colour[id]
	c.mu.Unlock()
	for len(lines) > 0 {
		var line []byte
		line, lines = cutLine(lines)
		c.buf = append(c.buf, colour...)
		c.buf = append(c.buf, stamp...)
		c.buf = append(c.buf, head...)
		if colour != "" {
			c.buf = append(c.buf, "\x1b[0m"...)
		}
		c.buf = append(append(c.buf, line...), '\n')
	}
}

func (c *console) appendJSON(id, stream string, lines []byte, now time.Time) {
	out := bytes.NewBuffer(c.buf)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	for len(lines) > 0 {
		var line []byte
		line, lines = cutLine(lines)
		// Strings and a time always encode.
		_ = enc.Encode(struct {
			Time      time.Time `json:"time"`
			Component string    `json:"component"`
			Stream    string    `json:"stream"`
			Line      string    `json:"line"`
		}{now, id, stream, string(line)})
	}
	c.buf = out.Bytes()
}

// blockingFile writes to a file as if it had never been set to be non-blocking. Any
// program that shares a terminal with flowctl can do that to it (ssh and node do).
type blockingFile struct{ f *os.File }

func (b blockingFile) Write(p []byte) (written int, err error) {
	for {
		n, err := b.f.Write(p[written:])
		written += n
		if !errors.Is(err, syscall.EAGAIN) {
			return written, err
		}
		if err := syscall.SetNonblock(int(b.f.Fd()), false); err != nil {
			return written, err
		}
	}
}

// logWriter passes lines on to w in the background, because who logs must not wait for
// a terminal that is held or a pipe that nobody reads. It is written to in two ways:
// Write, for flowctl's own log, never waits, and drops lines past maxQueued bytes and
// says so; writeWaiting, for the lines of components, waits and drops nothing.
type logWriter struct {
	w         io.Writer
	json      bool             // its lines are JSON, and so is what it says itself
	wakeup    chan struct{}    // gets a token when there is something to do
	signals   <-chan os.Signal // nil for none
	signalled func(os.Signal)  // called between two writes
	ended     chan struct{}    // closed when run has returned

	mu      sync.Mutex // guards the fields below
	queue   []byte
	own     int           // bytes of queue that came by Write
	taken   sync.Cond     // signalled when queue was taken, or will not be
	written chan struct{} // closed when what is queued now was written, nil when nobody waits for that
	lost    int           // lines
	err     error         // the first of w
	closed  bool
}

func newLogWriter(w io.Writer, format string, signals <-chan os.Signal, signalled func(os.Signal)) *logWriter {
	l := &logWriter{w: w, json: format == formatJSON, wakeup: make(chan struct{}, 1), signals: signals, signalled: signalled, ended: make(chan struct{})}
	l.taken.L = &l.mu
	go l.run()
	return l
}

// Write takes whole lines. It never blocks and never fails.
func (l *logWriter) Write(lines []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.own+len(lines) > maxQueued {
		l.lost++
	} else {
		l.queue, l.own = append(l.queue, lines...), l.own+len(lines)
	}
	l.wake()
	return len(lines), nil
}

// writeWaiting takes whole lines, after waiting while maxAhead bytes are queued. It
// fails after w has.
func (l *logWriter) writeWaiting(lines []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) >= maxAhead && l.err == nil && !l.closed {
		l.taken.Wait()
	}
	switch {
	case l.err != nil:
		return 0, l.err
	case l.closed:
		return 0, os.ErrClosed
	}
	l.queue = append(l.queue, lines...)
	l.wake()
	return len(lines), nil
}

// wake has w written to, with no lines if there are none.
func (l *logWriter) wake() {
	select {
	case l.wakeup <- struct{}{}:
	default:
	}
}

func (l *logWriter) run() {
	defer close(l.ended)
	var lines []byte
	for closed := false; !closed; {
		select {
		case <-l.wakeup:
		case sig := <-l.signals:
			l.signalled(sig)
		}
		l.mu.Lock()
		lines, l.queue, l.own = l.queue, lines[:0], 0
		if l.lost > 0 {
			lines = l.appendLost(lines)
		}
		written := l.written
		l.lost, l.written, closed = 0, nil, l.closed
		l.taken.Broadcast()
		l.mu.Unlock()
		if _, err := l.w.Write(lines); err != nil {
			l.fail(err)
		}
		if cap(lines) > maxKept {
			lines = nil
		}
		if written != nil {
			close(written)
		}
	}
}

// appendLost appends how many lines were dropped, in the form of the others.
func (l *logWriter) appendLost(lines []byte) []byte {
	text := fmt.Sprintf("%d lines of this log are lost: standard error was not read", l.lost)
	if l.json {
		out := bytes.NewBuffer(lines)
		newLogger(out, formatJSON, slog.LevelInfo).Error(text, "lines", l.lost)
		return out.Bytes()
	}
	return fmt.Appendf(lines, "flowctl: %s\n", text)
}

// fail keeps err for writeWaiting. Write has nobody to tell.
func (l *logWriter) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = cmp.Or(l.err, err)
	l.taken.Broadcast()
}

// pending returns a channel that is closed when all that is queued now was written.
func (l *logWriter) pending() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.written == nil {
		l.written = make(chan struct{})
	}
	l.wake()
	return l.written
}

// await returns when all that is queued was written, or never will be.
func (l *logWriter) await() {
	select {
	case <-l.pending():
	case <-l.ended:
	}
}

// flush is await for at most so long.
func (l *logWriter) flush(most time.Duration) {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-l.pending():
	case <-l.ended:
	case <-timer.C:
	}
}

// close writes what is left, unless that takes longer than flushTime.
func (l *logWriter) close() {
	l.mu.Lock()
	l.closed = true
	l.taken.Broadcast()
	l.mu.Unlock()
	l.wake()
	timer := time.NewTimer(flushTime)
	defer timer.Stop()
	select {
	case <-l.ended:
	case <-timer.C:
	}
}

// screen is a terminal with a footer below the lines. All that flowctl shows on it
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
	shared  bool           // the lines of components are on it, too
	signals chan os.Signal // SIGWINCH, SIGCONT and SIGTSTP, for the goroutine of lines

	// Only the owner of the run uses these.
	updated time.Time // when it was given rows last
	overdue bool      // there would have been others, but updated was too young

	mu   sync.Mutex // guards the fields below
	rows []string   // of the footer, in full; folded, it is the first
	gone bool       // for good

	// Only the goroutine of lines uses these.
	suspended     bool // by Ctrl-Z
	buf           []byte
	drawn         []byte // the footer as it is on the terminal, nil for none
	width, height int    // of the terminal then
	typed         int    // bytes that nobody had read then
}

// openScreen returns the screen on standard error. It is nil where standard error is no
// terminal that can have a footer, or standard output is another terminal, or a pipe.
func openScreen() *screen {
	out, outErr := os.Stdout.Stat()
	stderr, stderrErr := os.Stderr.Stat()
	if outErr != nil || stderrErr != nil || !isTerminal(os.Stderr) || os.Getenv("TERM") == "dumb" {
		return nil
	}
	shared := isTerminal(os.Stdout)
	maybeHere := out.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 // of tee, say: what it gets can come to this terminal
	if maybeHere || shared && !os.SameFile(out, stderr) {
		return nil
	}
	s := &screen{f: os.Stderr, shared: shared, signals: make(chan os.Signal, 4)}
	signal.Notify(s.signals, syscall.SIGWINCH, syscall.SIGCONT)
	if canBeSuspended() {
		signal.Notify(s.signals, syscall.SIGTSTP)
	}
	s.lines = newLogWriter(s, formatText, s.signals, s.signalled)
	return s
}

func (s *screen) close() {
	if s != nil {
		signal.Stop(s.signals)
	}
}

// shows tells whether the footer is there to be read.
func (s *screen) shows() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.gone && inForeground(s.f)
}

// show has rows for a footer from now on.
func (s *screen) show(rows []string) {
	s.mu.Lock()
	s.rows = rows
	s.mu.Unlock()
	s.lines.wake()
}

// remove erases the footer for good, and returns when that is done or eraseTime is over.
func (s *screen) remove() {
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
	s.lines.flush(eraseTime)
}

// signalled acts on a signal; the redraw follows. After Ctrl-Z the terminal is the
// shell's, so the footer is erased before flowctl stops, and when it goes on there is
// none to erase: what is below the cursor is not flowctl's any more.
func (s *screen) signalled(sig os.Signal) {
	switch sig {
	case syscall.SIGTSTP:
		s.suspended = true
		_, _ = s.Write(nil)
		stopSelf()
	case syscall.SIGCONT:
		s.suspended, s.drawn = false, nil
	}
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
	out = appendSanitized(out, lines)
	out = append(out, footer...)
	s.buf, s.drawn, s.width, s.height, s.typed = out, footer, width, height, typed
	if cap(s.buf) > maxKept {
		s.buf = nil
	}
	if _, err := (blockingFile{s.f}).Write(out); err != nil {
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

// controls are the sequences of ECMA-48 within a line, as bytes of UTF-8. Group 1 is
// one that only sets colours and the like (SGR). A sequence without its end is matched
// as far as it goes, but for a control string, of which it is only the beginning.
var controls = regexp.MustCompile(`(\x1b\[[0-9:;]*m)` +
	`|(?:\x1b\[|\x{9b})[ -?]*[@-~]?` + // CSI
	`|(?:\x1b\]|\x{9d})[^\x07\x1b\x{80}-\x{9f}]*(?:\x07|\x1b\\|\x{9c})` + // OSC
	`|(?:\x1b[PX^_]|[\x{90}\x{98}\x{9e}\x{9f}])[^\x1b\x{80}-\x{9f}]*(?:\x1b\\|\x{9c})` + // DCS, SOS, PM, APC
	`|\x1b[ -/]*[0-~]?` + // all others of ESC
	`|[\x0e\x0f\x{80}-\x{9f}]`) // SO, SI, C1

var c1 = regexp.MustCompile(`[\x{80}-\x{9f}]`)

// appendSanitized appends lines without what would move the cursor or change the
// terminal, and ends a colour with the line that left it on.
func appendSanitized(out, lines []byte) []byte {
	if !hasControls(lines) {
		return append(out, lines...)
	}
	for line := range bytes.Lines(lines) {
		if !hasControls(line) {
			out = append(out, line...)
			continue
		}
		line, ended := bytes.CutSuffix(line, []byte("\n"))
		kept := controls.ReplaceAll(line, []byte("$1"))
		if c1.Match(kept) { // of bytes that were apart, and no UTF-8
			kept = controls.ReplaceAll(bytes.ToValidUTF8(line, []byte("\uFFFD")), []byte("$1"))
		}
		out = append(out, kept...)
		if last := bytes.LastIndexByte(kept, '\x1b'); last >= 0 && !bytes.HasPrefix(kept[last:], []byte("\x1b[0m")) && !bytes.HasPrefix(kept[last:], []byte("\x1b[m")) {
			out = append(out, "\x1b[0m"...)
		}
		if ended {
			out = append(out, '\n')
		}
	}
	return out
}

// hasControls tells whether something in lines may match controls: each begins with
// ESC, SO, SI, or the first byte of a C1 control character.
func hasControls(lines []byte) bool {
	for _, b := range []byte{'\x1b', '\x0e', '\x0f', '\xc2'} {
		if bytes.IndexByte(lines, b) >= 0 {
			return true
		}
	}
	return false
}

// logFiles keeps the lines of each component in a file of its own below a folder,
// written before they are shown, so that what is on the terminal is in the file.
type logFiles struct {
	dir string
	log *slog.Logger

	mu   sync.RWMutex // guards byID
	byID map[string]*logFile
}

// logFile is DIR/ID.log. Past maxLogFile bytes it becomes DIR/ID.log.1 and a new one
// is begun.
type logFile struct {
	path string

	mu     sync.Mutex // guards the fields below
	f      *os.File   // nil when it could not be opened
	size   int64
	most   int64 // the size at which it is to be rotated
	buf    []byte
	broken bool // the last write failed, and that was logged
	closed bool

	missing int // lines that could not be written
}

// openLogFiles makes the folder and opens a file for each of ids.
func openLogFiles(dir string, ids []string, log *slog.Logger) (*logFiles, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	l := &logFiles{dir: dir, log: log, byID: make(map[string]*logFile)}
	for _, id := range ids {
		if err := l.add(id); err != nil {
			l.close()
			return nil, err
		}
	}
	return l, nil
}

func (l *logFiles) path(id string) string { return filepath.Join(l.dir, id+".log") }

// add opens the file of id, if that has not been done.
func (l *logFiles) add(id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byID[id] != nil {
		return nil
	}
	f := &logFile{path: l.path(id)}
	if err := f.open(); err != nil {
		return err
	}
	l.byID[id] = f
	return nil
}

// lines is an emitter. A file that cannot be written is reported once and tried
// again with the next lines: a full disk must not stop a pipeline.
func (l *logFiles) lines(id, _ string, lines []byte) {
	l.mu.RLock()
	file := l.byID[id]
	l.mu.RUnlock()
	file.mu.Lock()
	defer file.mu.Unlock()
	if file.closed {
		return // the run is over, and these lines were given up
	}
	err := file.write(lines, time.Now())
	switch {
	case err != nil && !file.broken:
		l.log.Error("trouble with a log file", "component", id, "err", err)
	case err == nil && file.missing > 0:
		l.log.Warn("log file is written again", "component", id, "missing_lines", file.missing)
		file.missing = 0
	}
	file.broken = err != nil
}

// close closes the files.
func (l *logFiles) close() {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, f := range l.byID {
		f.mu.Lock()
		if f.closed = true; f.f != nil {
			f.f.Close()
		}
		f.mu.Unlock()
	}
}

// write appends lines, each with the time. What could not be written whole is taken
// back, so that no later line is glued to a part of it. That a file cannot be
// rotated is an error, and the lines are in it all the same.
func (f *logFile) write(lines []byte, now time.Time) error {
	stamp := now.AppendFormat(make([]byte, 0, 32), "2006-01-02T15:04:05.000Z07:00 ")
	f.buf = f.buf[:0]
	for len(lines) > 0 {
		var line []byte
		line, lines = cutLine(lines)
		f.buf = append(append(append(f.buf, stamp...), line...), '\n')
	}
	var rotated error
	if f.f != nil && f.size > 0 && f.size+int64(len(f.buf)) > f.most {
		rotated = f.rotate()
	}
	if f.f == nil {
		if err := f.open(); err != nil {
			f.missing += bytes.Count(f.buf, []byte{'\n'})
			return err
		}
	}
	if n, err := f.f.Write(f.buf); err != nil {
		if n > 0 {
			_ = f.f.Truncate(f.size)
		}
		f.missing += bytes.Count(f.buf, []byte{'\n'})
		return err
	}
	f.size += int64(len(f.buf))
	if cap(f.buf) > maxKept {
		f.buf = nil
	}
	return rotated
}

// rotate moves the file away. Where that fails it is tried again after as much more.
func (f *logFile) rotate() error {
	if err := os.Rename(f.path, f.path+".1"); err != nil {
		f.most = f.size + maxLogFile
		return err
	}
	f.f.Close() // every write has been checked
	f.f = nil
	return nil
}

func (f *logFile) open() error {
	// Not to wait for the reader of a pipe that stands in its place.
	file, err := os.OpenFile(f.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY|syscall.O_NONBLOCK, 0o644)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return err
	}
	f.f, f.size, f.most = file, info.Size(), maxLogFile
	return nil
}
