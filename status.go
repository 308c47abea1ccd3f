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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
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

// isTerminal takes any character device but /dev/null for one.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	null, nullErr := os.Stat(os.DevNull)
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && (nullErr != nil || !os.SameFile(info, null))
}

// useColours tells whether f is a terminal whose user wants colours (no-color.org).
func useColours(f *os.File) bool {
	return isTerminal(f) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
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

// overview is how a run is at a moment.
type overview struct {
	ready, total int
	waiting      []string // not ready yet
	unhealthy    []string // were ready and are not healthy, with the cause
	restarting   []string
	stopping     bool
	left         []string // still running while stopping
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

// part is what an overview has to say besides the counts.
type part struct {
	key, what string
	ids       []string
}

func (o overview) parts() []part {
	if o.stopping {
		return []part{{"stopping", "stopping", o.left}}
	}
	parts := []part{{"waiting", "waiting for", o.waiting}, {"restarting", "restarting", o.restarting}, {"unhealthy", "unhealthy:", o.unhealthy}}
	return slices.DeleteFunc(parts, func(p part) bool { return len(p.ids) == 0 })
}

// String says it in one line, as systemd's STATUS= wants it.
func (o overview) String() string {
	if o.stopping {
		return "stopping, waiting for " + enumerate(o.left)
	}
	text := fmt.Sprintf("%d of %d ready", o.ready, o.total)
	for _, p := range o.parts() {
		text += ", " + p.what + " " + enumerate(p.ids)
	}
	return text
}

// attrs says it as the log wants it.
func (o overview) attrs() []any {
	var attrs []any
	if !o.stopping {
		attrs = append(attrs, "ready", o.ready, "total", o.total)
	}
	for _, p := range o.parts() {
		attrs = append(attrs, p.key, enumerate(p.ids))
	}
	return attrs
}

// enumerate lists a few of many.
func enumerate(ids []string) string {
	const most = 5
	if len(ids) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:most], ", "), len(ids)-most)
	}
	return strings.Join(ids, ", ")
}

// clean is printable for a table: a long text is cut.
func clean(text string) string {
	const most = 60
	text = printable(text)
	if utf8.RuneCountInString(text) > most {
		text = string([]rune(text)[:most-3]) + "..."
	}
	return text
}

// printable makes text that a component chose fit to be shown: control characters
// and bytes that are no UTF-8 become a mark.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == utf8.RuneError || r == '\u2028' || r == '\u2029' {
			return '\uFFFD'
		}
		return r
	}, text)
}
