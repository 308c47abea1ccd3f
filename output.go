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
	"sync"
	"syscall"
	"time"
)

// The forms of the log, as -log-format names them.
const (
	formatAuto = "auto"
	formatText = "text"
	formatJSON = "json"

	formatJournal = "journal"
)

// newLogger returns flowctl's own log. Durations are shown as Go writes them, such
// as 1.5s, in JSON too.
func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: readable(format)}
	if format == formatJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// readable has slog write attributes for people in the format given.
func readable(format string) func(groups []string, a slog.Attr) slog.Attr {
	return func(groups []string, a slog.Attr) slog.Attr {
		switch {
		case a.Value.Kind() == slog.KindDuration:
			a.Value = slog.StringValue(a.Value.Duration().String())
		case a.Key == slog.TimeKey && len(groups) == 0 && format != formatJSON && a.Value.Kind() == slog.KindTime:
			a.Value = slog.StringValue(a.Value.Time().Format(time.TimeOnly))
		}
		return a
	}
}

// patient writes to a file as if it had never been set to be non-blocking, which any
// program can do to a terminal that it shares with flowctl (ssh and node are known to).
type patient struct{ f *os.File }

func (p patient) Write(b []byte) (written int, err error) {
	for {
		n, err := p.f.Write(b[written:])
		written += n
		if !errors.Is(err, syscall.EAGAIN) {
			return written, err
		}
		if err := syscall.SetNonblock(int(p.f.Fd()), false); err != nil {
			return written, err
		}
	}
}

// logWriter hands what it is given to another writer, in the background: whoever
// logs must not wait for a terminal that is held or a pipe that nobody reads, least
// of all while it stops a pipeline. Past maxQueued bytes it drops lines and says so.
type logWriter struct {
	w    io.Writer
	json bool          // its lines are JSON, and so must be what it says itself
	more chan struct{} // gets a token when there is something to do

	mu      sync.Mutex // guards the fields below
	queue   []byte
	own     int           // bytes of queue that are of the log, and not of components
	room    sync.Cond     // signalled when queue has been taken, or nothing will be
	written chan struct{} // closed when what is queued now has been written, nil when nobody waits for that
	lost    int           // lines
	err     error         // the first of w
	closed  bool
}

const (
	maxQueued  = 1 << 20
	maxWaiting = 64 << 10        // queued bytes from which on those wait that can
	flushTime  = 5 * time.Second // for the last lines, when flowctl ends
)

func newLogWriter(w io.Writer, format string) *logWriter {
	l := &logWriter{w: w, json: format == formatJSON, more: make(chan struct{}, 1)}
	l.room.L = &l.mu
	go l.run()
	return l
}

// Write takes one line. It never blocks and never fails.
func (l *logWriter) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.own+len(line) > maxQueued {
		l.lost++
	} else {
		l.queue, l.own = append(l.queue, line...), l.own+len(line)
	}
	l.poke()
	return len(line), nil
}

// awaitLocked returns what is closed when all that is queued has been written.
func (l *logWriter) awaitLocked() <-chan struct{} {
	if l.written == nil {
		l.written = make(chan struct{})
	}
	l.poke()
	return l.written
}

// poke has w written to, though there may be no lines.
func (l *logWriter) poke() {
	select {
	case l.more <- struct{}{}:
	default:
	}
}

func (l *logWriter) run() {
	var lines []byte
	for closed := false; !closed; {
		<-l.more
		l.mu.Lock()
		lines, l.queue, l.own = l.queue, lines[:0], 0
		if l.lost > 0 {
			lines = l.appendLost(lines)
		}
		written := l.written
		l.lost, l.written, closed = 0, nil, l.closed
		l.room.Broadcast()
		l.mu.Unlock()
		if _, err := l.w.Write(lines); err != nil {
			l.fail(err)
		}
		if written != nil {
			close(written)
		}
	}
}

// fail notes err for those that wait: to those that do not, there is nothing to say.
func (l *logWriter) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = cmp.Or(l.err, err)
	l.room.Broadcast()
}

// flush returns when all that is queued has been written, or after most.
func (l *logWriter) flush(most time.Duration) {
	l.mu.Lock()
	written := l.awaitLocked()
	l.mu.Unlock()
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-written:
	case <-timer.C:
	}
}

// appendLost appends that lines are lost, which a reader of JSON has to understand too.
func (l *logWriter) appendLost(lines []byte) []byte {
	text := fmt.Sprintf("%d lines of this log are lost: standard error was not read", l.lost)
	if l.json {
		out := bytes.NewBuffer(lines)
		newLogger(out, formatJSON, slog.LevelInfo).Error(text, "lines", l.lost)
		return out.Bytes()
	}
	return fmt.Appendf(lines, "flowctl: %s\n", text)
}

// close writes what is left, unless that takes longer than flushTime.
func (l *logWriter) close() {
	l.mu.Lock()
	l.closed = true
	l.room.Broadcast()
	l.mu.Unlock()
	l.flush(flushTime)
}

// waiting is how components write to a logWriter: none of their lines is dropped, and
// they wait while many are queued. It fails after w has.
type waiting struct{ *logWriter }

func (l waiting) Write(lines []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) >= maxWaiting && l.err == nil && !l.closed {
		l.room.Wait()
	}
	switch {
	case l.err != nil:
		return 0, l.err
	case l.closed:
		return 0, os.ErrClosed
	}
	l.queue = append(l.queue, lines...)
	l.poke()
	return len(lines), nil
}

// await returns when all that is queued has been written, or never will be.
func (l waiting) await() {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return
	}
	written := l.awaitLocked()
	l.mu.Unlock()
	<-written
}

// palette are the colours of components on a terminal, readable on black and white.
var palette = []string{"36", "33", "32", "35", "34", "96", "93", "92", "95", "94"}

// console writes the lines of components to one output, whole and one component's
// at a time. Its first error is kept: from then on it drops what it gets, so that
// components can be stopped, and broken is closed.
type console struct {
	json    bool
	colours bool
	broken  chan struct{}

	mu     sync.Mutex        // guards the fields below; held while w is written, so that a slow reader slows components
	heads  map[string]string // by id: what stands between the time and the line
	colour map[string]string // by id: the escape code, empty without colours
	width  int               // of the longest id
	w      io.Writer
	buf    []byte
	err    error
}

// newConsole returns a console for the components ids.
func newConsole(w io.Writer, format string, colours bool, ids []string) *console {
	c := &console{w: w, json: format == formatJSON, colours: colours, heads: make(map[string]string), colour: make(map[string]string), broken: make(chan struct{})}
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
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.buf = c.buf[:0]
	if c.json {
		c.appendJSON(id, stream, lines, time.Now())
	} else {
		c.appendText(id, lines, time.Now())
	}
	if _, err := c.w.Write(c.buf); err != nil {
		c.err = err
		close(c.broken)
	}
	if cap(c.buf) > 2*maxLine {
		c.buf = nil
	}
}

// flush returns when the lines that it was given are written, however long that takes.
func (c *console) flush() {
	if w, ok := c.w.(waiting); ok {
		w.await()
	}
}

func (c *console) appendText(id string, lines []byte, now time.Time) {
	stamp := now.AppendFormat(make([]byte, 0, len(time.TimeOnly)), time.TimeOnly)
	head, colour := c.heads[id], c.colour[id]
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

// cutLine takes the first line off lines, without its newline and a CR before that.
func cutLine(lines []byte) (line, rest []byte) {
	line, rest, _ = bytes.Cut(lines, []byte{'\n'})
	return bytes.TrimSuffix(line, []byte{'\r'}), rest
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
	broken bool // the last write failed, which has been said
	closed bool

	missing int // lines that could not be written
}

const maxLogFile = 10 << 20

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

// add opens the file of id, if that has not been done.
func (l *logFiles) add(id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byID[id] != nil {
		return nil
	}
	f := &logFile{path: filepath.Join(l.dir, id+".log")}
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
	if cap(f.buf) > 2*maxLine {
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
func openOutputs(format string, showStatus bool) (stderr *logWriter, stdout io.Writer, s *screen) {
	out, _ := os.Stdout.Stat()
	err, _ := os.Stderr.Stat()
	piped := !isTerminal(os.Stdout)
	maybeHere := out.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0 // of tee, say: what it gets can come to this terminal
	if !showStatus || format != formatText || !isTerminal(os.Stderr) || os.Getenv("TERM") == "dumb" || maybeHere || !piped && !os.SameFile(out, err) {
		return newLogWriter(patient{os.Stderr}, format), patient{os.Stdout}, nil
	}
	s = &screen{f: os.Stderr, signals: make(chan os.Signal, 4)}
	s.lines = newLogWriter(s, format)
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
