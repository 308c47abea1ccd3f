// Where lines go: to the console, to log files, to the journal, to a terminal with a
// footer. The loop of a run has one outputs for all of them; logfiles.go has the log files.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// The forms of the log, as -log-format names them.
const (
	formatAuto    = "auto"
	formatText    = "text"
	formatJSON    = "json"
	formatJournal = "journal"
)

const (
	maxLine   = 1 << 20  // bytes of a line of a component that are kept together: a longer one is passed on in pieces
	maxQueued = 1 << 20  // bytes of flowctl's own log that wait to be written; more is dropped
	maxAhead  = 64 << 10 // queued bytes from which on components wait
	maxKept   = 2 << 20  // bytes of a buffer that is kept for the next lines

	footerTime = 250 * time.Millisecond // between two changes of the footer, at least
	uptimeTime = time.Second            // between two changes of the footer, at most: it shows uptimes
	eraseTime  = time.Second            // for a terminal to take the erased footer before others use it
)

// outputConfig says where the lines of a run go.
type outputConfig struct {
	pipeline string   // its name, "" for a control plane alone
	ids      []string // of its components
	format   string   // of -log-format
	level    slog.Level
	footer   bool // a footer is wanted, where there is a terminal for it
	command  bool // standard output is that of a command: the lines of components go to standard error
}

// outputs are all the places that lines go to. The methods emit, flush, settle, refresh and log may
// be called by any goroutine, the others by the one that owns the run.
type outputs struct {
	log        *slog.Logger // flowctl's own; it never blocks
	format     string       // of the log
	stderr     *logWriter
	console    *console
	queued     bool        // what the console writes is queued in stderr
	screen     *screen     // nil for no footer
	journal    *journalLog // nil where nothing goes to the journal
	journalled bool        // the lines of components go to the journal, not to the console
	files      *logFiles   // nil for none; set before the first component is started
	lines      *lineLog    // nil for a control plane alone
}

// openOutputs opens all but the log files. The caller has to close it.
func openOutputs(c outputConfig) *outputs {
	lines, name := os.Stdout, "standard output"
	if c.command {
		lines, name = os.Stderr, "standard error"
	}
	o, linesFormat := &outputs{format: formatOf(os.Stderr, c.format)}, formatOf(lines, c.format)
	if c.footer && o.format == formatText {
		o.screen = openScreen(lines)
	}
	if o.screen == nil {
		o.stderr = newLogWriter(blockingFile{os.Stderr}, o.format, nil, nil)
	} else {
		o.stderr = o.screen.lines
	}
	write := blockingFile{lines}.Write
	if o.queued = c.command || o.screen != nil && o.screen.shared; o.queued {
		write = o.stderr.writeWaiting
	}
	o.log = newLogger(o.stderr, o.format, stampOf(os.Stderr), c.level)
	o.journalled = linesFormat == formatJournal
	if o.journalled || o.format == formatJournal {
		o.journal = openJournal(c.pipeline)
	}
	if o.format == formatJournal {
		o.log = slog.New(&journalHandler{journal: o.journal, level: c.level})
	}
	o.console = newConsole(write, linesFormat, stampOf(lines), useColours(lines), c.ids)
	o.console.name, o.console.terminal = name, isTerminal(lines)
	if c.pipeline != "" {
		o.lines = newLineLog(c.ids)
		o.log = slog.New(slog.NewMultiHandler(o.log.Handler(), o.lines.handler(c.level)))
	}
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

// add makes the components ids known, by a reload.
func (o *outputs) add(ids []string) {
	for _, id := range ids {
		if o.files != nil {
			o.files.add(id)
		}
		o.console.add(id)
		o.lines.addID(id)
	}
}

// forget gives up what is kept open for a component that has left.
func (o *outputs) forget(id string) {
	if o.files != nil {
		o.files.forget(id)
	}
	o.lines.removeID(id)
}

// refresh opens log files anew that others have removed or renamed.
func (o *outputs) refresh() {
	if o.files != nil {
		o.files.look()
	}
}

// emit is the emitter of a run. Whole lines go to the log files first: what is shown is in them. A
// part of a line is only shown.
func (o *outputs) emit(id, stream string, text []byte, shown int) {
	whole := !isPart(text)
	if o.files != nil && whole {
		o.files.lines(id, text)
	}
	if whole {
		o.lines.add(id, stream, text)
	}
	switch {
	case !o.journalled:
		o.console.lines(id, stream, text[shown:])
	case whole:
		o.journal.lines(id, stream, text)
	}
}

// flush returns when all lines that were emitted are written, however long that takes.
func (o *outputs) flush() {
	if o.queued {
		o.stderr.await(context.Background())
	}
}

// settle returns when everything that was logged and emitted is written, with the footer erased for
// good, or when ctx ends.
func (o *outputs) settle(ctx context.Context) {
	o.screen.retire()
	o.stderr.await(ctx)
	o.journal.await(ctx)
}

// report writes the report of a run that failed, in the form that is wanted.
func (o *outputs) report(text, json []byte, journal []journalEntry) {
	switch {
	case o.format == formatJournal:
		o.journal.report(journal)
	case o.format == formatJSON:
		_, _ = o.stderr.Write(json)
	default:
		if isTerminal(os.Stderr) {
			text = appendSanitized(nil, text)
		}
		_, _ = o.stderr.Write(text) // at once, because a line at a time could be lost by half
	}
}

// newLogger returns flowctl's own log, in text with times by the layout stamp.
func newLogger(w io.Writer, format, stamp string, level slog.Level) *slog.Logger {
	readable := func(groups []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey && len(groups) == 0 && format != formatJSON && a.Value.Kind() == slog.KindTime {
			a.Value = slog.StringValue(a.Value.Time().Format(stamp))
		}
		return durationText(groups, a)
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: readable}
	if format == formatJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// checkLogFormat fails for a journal that is not there.
func checkLogFormat(format string) error {
	if format == formatJournal && !journalRuns() {
		return errors.New("-log-format journal: there is no journal on this machine (/run/systemd/journal/socket): choose auto, text or json")
	}
	return nil
}

// formatOf returns the form of what goes to f: auto stands for what that leads to.
func formatOf(f *os.File, format string) string {
	switch {
	case format != formatAuto:
		return format
	case isJournal(f):
		return formatJournal
	}
	return formatText
}

// stampOf returns the layout of the times of text that goes to f. A file that is appended to
// (StandardOutput=append: of a unit, >> of a shell) is read on another day, so it gets dates.
func stampOf(f *os.File) string {
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, f.Fd(), syscall.F_GETFL, 0)
		if errno == 0 && flags&syscall.O_APPEND != 0 {
			return "2006-01-02T15:04:05"
		}
	}
	return time.TimeOnly
}

// printAnswer writes what a command was asked for. An answer that is not read is no success.
func printAnswer(text string) error {
	_, err := io.WriteString(os.Stdout, text)
	return err
}

// palette are the colours of components on a terminal, readable on black and white.
var palette = []string{"36", "33", "32", "35", "34", "96", "93", "92", "95", "94"}

// console writes the lines of components to one output, whole and one component's at a time. After
// its first error it drops what it gets, so that components can be stopped.
type console struct {
	write    func([]byte) (int, error)
	name     string // of what write writes to
	json     bool
	stamp    string // the layout of the times of text
	colours  bool
	terminal bool          // lines are shown as a terminal may have them
	broken   chan struct{} // closed after the first error

	mu    sync.Mutex      // guards heads; never held during write, so that add does not wait for a reader
	heads map[string]head // by id
	width int             // of the longest id that was known at first

	writing sync.Mutex // guards the fields below; held during write, so that a slow reader slows components
	buf     []byte
	err     error // does not change after the first
}

// head is what stands before and after the time of a line.
type head struct{ before, after string }

func newConsole(write func([]byte) (int, error), format, stamp string, colours bool, ids []string) *console {
	c := &console{write: write, json: format == formatJSON, stamp: stamp, colours: colours, heads: make(map[string]head), broken: make(chan struct{})}
	for _, id := range ids {
		c.width = max(c.width, len(id))
	}
	for _, id := range ids {
		c.add(id)
	}
	return c
}

// add makes id known, in the next colour.
func (c *console) add(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.heads[id]; known {
		return
	}
	h := head{after: fmt.Sprintf(" %-*s | ", c.width, id)}
	if c.colours {
		h.before = "\x1b[" + palette[len(c.heads)%len(palette)] + "m"
		h.after += "\x1b[0m"
	}
	c.heads[id] = h
}

// lines writes whole lines, or, if there is no newline at the end, a part of one.
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
	stamp := now.AppendFormat(make([]byte, 0, len(time.RFC3339)), c.stamp)
	part := isPart(lines)
	c.mu.Lock()
	h := c.heads[id]
	c.mu.Unlock()
	for len(lines) > 0 {
		var line []byte
		line, lines = cutLine(lines)
		c.buf = append(c.buf, h.before...)
		c.buf = append(c.buf, stamp...)
		c.buf = append(c.buf, h.after...)
		if c.terminal {
			c.buf = appendSanitized(c.buf, line)
		} else {
			c.buf = append(c.buf, line...)
		}
		if part {
			c.buf = append(c.buf, "…"...)
		}
		c.buf = append(c.buf, '\n')
	}
}

func (c *console) appendJSON(id, stream string, lines []byte, now time.Time) {
	part := isPart(lines)
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
			Partial   bool      `json:"partial,omitempty"`
		}{now, id, stream, string(line), part})
	}
	if c.buf = out.Bytes(); c.terminal {
		c.buf = escapeJSON(c.buf)
	}
}

// isPart tells whether text of a component is a part of a line, not whole ones.
func isPart(text []byte) bool { return len(text) == 0 || text[len(text)-1] != '\n' }

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

// writeWaiting takes whole lines, once fewer than maxAhead bytes are queued. It fails after w has.
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
		newLogger(out, formatJSON, "", slog.LevelInfo).Error(text, "lines", l.lost)
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

// await returns when all that is queued was written, or never will be, or when ctx ends.
func (l *logWriter) await(ctx context.Context) {
	l.mu.Lock()
	if l.written == nil {
		l.written = make(chan struct{})
	}
	written := l.written
	l.mu.Unlock()
	l.wake()
	select {
	case <-written:
	case <-l.ended:
	case <-ctx.Done():
	}
}

// close writes what is left, unless that takes longer than flushTime.
func (l *logWriter) close() {
	l.mu.Lock()
	l.closed = true
	l.taken.Broadcast()
	l.mu.Unlock()
	l.wake()
	select {
	case <-l.ended:
	case <-time.After(flushTime):
	}
}

// screen is a terminal with a footer below the lines. All that flowctl shows on it passes
// through lines, a logWriter that writes to the screen. Where there is none it is nil: its
// methods for the owner of the run, shows, update, due, retire and remove, do nothing then.
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
// terminal that can have a footer, or the lines of components go to another terminal, or standard
// output is a pipe.
func openScreen(lines *os.File) *screen {
	out, outErr := os.Stdout.Stat()
	stderr, stderrErr := os.Stderr.Stat()
	if outErr != nil || stderrErr != nil || !isTerminal(os.Stderr) || os.Getenv("TERM") == "dumb" {
		return nil
	}
	shared := isTerminal(lines)
	maybeHere := out.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 // of tee, say: what it gets can come to this terminal
	if maybeHere || shared && lines == os.Stdout && !os.SameFile(out, stderr) {
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

// shows tells whether the footer can be seen: in the background the terminal is another's.
func (s *screen) shows() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.gone && inForeground(s.f)
}

// update shows rows as the footer, or has due say when the last are old enough for that.
func (s *screen) update(now time.Time, rows func() []string) {
	if s == nil {
		return
	}
	if s.overdue = now.Sub(s.updated) < footerTime; s.overdue {
		return
	}
	s.updated = now
	latest := rows()
	s.mu.Lock()
	s.rows = latest
	s.mu.Unlock()
	s.lines.wake()
}

// due tells when update is to be called although nothing has happened, nil for never.
func (s *screen) due() <-chan time.Time {
	if s == nil {
		return nil
	}
	wait := uptimeTime
	if s.overdue {
		wait = footerTime
	}
	return time.After(time.Until(s.updated.Add(wait)))
}

// retire has the footer erased for good by the next write.
func (s *screen) retire() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
}

// remove erases the footer for good, and returns when that is done or eraseTime is over.
func (s *screen) remove() {
	if s == nil {
		return
	}
	s.retire()
	ctx, cancel := context.WithTimeout(context.Background(), eraseTime)
	defer cancel()
	s.lines.await(ctx)
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
	out = append(append(out, lines...), footer...)
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
var controls = pattern(`(\x1b\[[0-9:;]*m)` +
	`|(?:\x1b\[|\x{9b})[ -?]*[@-~]?` + // CSI
	`|(?:\x1b\]|\x{9d})[^\x07\x1b\x{80}-\x{9f}]*(?:\x07|\x1b\\|\x{9c})` + // OSC
	`|(?:\x1b[PX^_]|[\x{90}\x{98}\x{9e}\x{9f}])[^\x1b\x{80}-\x{9f}]*(?:\x1b\\|\x{9c})` + // DCS, SOS, PM, APC
	`|\x1b[ -/]*[0-~]?` + // all others of ESC
	`|[\x00-\x08\x0b-\x1f\x7f\x{80}-\x{9f}]`) // all other control characters but tab

// appendSanitized appends lines as a terminal may have them: text, tabs, and colours that end
// with their line. Of a line that was written over, as progress bars are by CR, it is what was
// written last. Bytes that are no UTF-8 become a mark, so that no two of them can be brought
// together to a control character.
func appendSanitized(out, lines []byte) []byte {
	if !hasControls(lines) {
		return append(out, lines...)
	}
	for line := range bytes.Lines(lines) {
		line, ended := bytes.CutSuffix(line, []byte("\n"))
		line = bytes.TrimRight(line, "\r")
		line = bytes.ToValidUTF8(line[bytes.LastIndexByte(line, '\r')+1:], []byte("\uFFFD"))
		kept := controls().ReplaceAll(line, []byte("$1"))
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

// hasControls tells whether lines may hold what appendSanitized changes. C2 is the first byte of
// the C1 control characters.
func hasControls(lines []byte) bool {
	for _, b := range lines {
		if b < ' ' && b != '\t' && b != '\n' || b == 0x7f || b == 0xc2 {
			return true
		}
	}
	return !utf8.Valid(lines)
}
