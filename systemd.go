package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	journald "github.com/coreos/go-systemd/v22/journal"
)

// What systemd gives and is told: readiness, the watchdog, sockets that it has opened, its journal.

// planeSocket is the FileDescriptorName= of the socket that the control plane serves.
const planeSocket = "control-plane"

const (
	notifyTimeout = 5 * time.Second // how long systemd may leave a message unread before flowctl warns of it, or ends
	maxPending    = 64              // messages that wait for systemd to read them; the kernel queues ten more (net.unix.max_dgram_qlen)

	journalTimeout = 10 * time.Second       // how long lines wait for a journal that takes none
	journalRetry   = 100 * time.Millisecond // between tries: nothing tells that the journal is back
	flushTime      = 5 * time.Second        // how long flowctl waits at its end for the last lines of a log
	journalQueue   = 4096                   // records of flowctl's own log that may wait

	// journalPiece is how many bytes of a line one record holds. Package journal hands a
	// longer one over in a file, which journald takes from root alone.
	journalPiece = 64 << 10
)

// planeSocketPassed tells whether systemd has passed that socket (sd_listen_fds(3)).
func planeSocketPassed() bool {
	return os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) &&
		slices.Contains(strings.Split(os.Getenv("LISTEN_FDNAMES"), ":"), planeSocket)
}

// passedListeners returns the sockets that systemd has passed, TCP or Unix listeners, none without any. It
// fails where the control plane cannot serve one: who connects there would wait for ever, as systemd holds
// it. It has to be called before the first child is started.
func passedListeners() (all []net.Listener, err error) {
	for _, f := range activation.Files(true) {
		lis, fault := passedListener(f)
		f.Close() // a listener has its own
		if fault == nil {
			all = append(all, lis)
		}
		err = cmp.Or(err, fault)
	}
	if err == nil {
		return all, nil
	}
	for _, lis := range all {
		lis.Close()
	}
	return nil, err
}

func passedListener(f *os.File) (net.Listener, error) {
	if f.Name() != planeSocket {
		return nil, fmt.Errorf("systemd has passed a socket named %q, which nobody would serve: its FileDescriptorName= must be %s", f.Name(), planeSocket)
	}
	lis, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("a socket named %q that systemd has passed: %v: it must be that of a ListenStream=", planeSocket, err)
	}
	if network := lis.Addr().Network(); network == "tcp" || network == "unix" { // a socket of packets is a UnixListener, too
		return lis, nil
	}
	lis.Close()
	return nil, fmt.Errorf("a socket named %q that systemd has passed is of the network %q: it must be tcp or unix", planeSocket, lis.Addr().Network())
}

// isService tells whether systemd has started this process as a service: only then NOTIFY_SOCKET and the
// watchdog are its own, and SIGHUP asks for a reload. A job of another service (a CI runner, tmux) inherits
// the variables. It is asked first as flowctl starts, since an orphan has another parent later.
var isService = sync.OnceValue(func() bool {
	if pid, told := os.LookupEnv("SYSTEMD_EXEC_PID"); told { // since systemd 248
		return pid == strconv.Itoa(os.Getpid())
	}
	return syscall.Getpgrp() == os.Getpid() && isSystemd(os.Getppid())
})

// isSystemd tells whether a process is systemd, the system's or a user's.
func isSystemd(pid int) bool {
	if pid == 1 { // ProtectProc= can hide its name
		_, err := os.Stat("/run/systemd/system") // sd_booted(3)
		return err == nil
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return err == nil && string(name) == "systemd\n"
}

// asksReload tells a SIGHUP by which systemd asks for a reload from that of a terminal that closes.
func asksReload(sig os.Signal) bool { return sig == syscall.SIGHUP && isService() }

// unitAccess is what may help in a unit where a file or folder cannot be used.
const unitAccess = "the unit's user (DynamicUser=) must be able to read and run it, a secret comes by LoadCredential=; it may write to $STATE_DIRECTORY, and elsewhere by ReadWritePaths="

// accessHint is unitAccess in a unit, for an error of access or of a read-only file system; else "".
func accessHint(err error) string {
	if isService() && (errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS)) {
		return unitAccess
	}
	return ""
}

// errorAttrs are the attributes of the log for err, with its accessHint.
func errorAttrs(err error) []any {
	attrs := []any{"err", err}
	if try := accessHint(err); try != "" {
		attrs = append(attrs, "try", try)
	}
	return attrs
}

// watchdogTicks tells when to feed systemd's watchdog (WatchdogSec= of the unit), nil for never.
func watchdogTicks(log *slog.Logger) <-chan time.Time {
	if !isService() {
		return nil
	}
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("the watchdog of systemd is not fed", "err", err)
	}
	return time.Tick(interval / 2)
}

// extendTimeout asks systemd to wait for d longer, and a margin for the last lines to a slow reader.
func extendTimeout(d time.Duration) string {
	return fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (d + 10*time.Second).Microseconds())
}

// notifier tells systemd how flowctl is (sd_notify(3)). A goroutine writes the messages in order, so
// that a systemd that does not read holds up nobody else. A nil one, without a unit, tells nobody.
type notifier struct {
	log  *slog.Logger
	addr *net.UnixAddr
	done chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex // guards the fields below
	changed sync.Cond
	pending []string
	giveUp  time.Time // when close stops waiting, zero before close
}

// newNotifier starts the notifier of this process, nil for none. close ends it.
func newNotifier(log *slog.Logger) *notifier {
	service, path := isService(), os.Getenv("NOTIFY_SOCKET")
	switch {
	case path == "":
		return nil
	case !service:
		log.Info("NOTIFY_SOCKET is another process's: systemd is told nothing, and SIGHUP stops", "service", os.Getenv("SYSTEMD_EXEC_PID"))
		return nil
	}
	return openNotifier(path, log)
}

// openNotifier starts a notifier for the socket at path.
func openNotifier(path string, log *slog.Logger) *notifier {
	n := &notifier{log: log, addr: &net.UnixAddr{Name: path, Net: "unixgram"}, done: make(chan struct{})}
	n.changed.L = &n.mu
	go n.run()
	return n
}

// send tells systemd states, as one message. It never blocks: old statuses give way to new messages.
func (n *notifier) send(states ...string) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pending = append(n.pending, strings.Join(states, "\n"))
	if len(n.pending) > maxPending {
		i := max(0, slices.IndexFunc(n.pending, isRepeated))
		n.pending = slices.Delete(n.pending, i, i+1)
	}
	n.changed.Signal()
}

// tellFailure tells systemd why flowctl ends, unless it is a command beside the service, as in ExecReload=.
func tellFailure(status string) {
	if os.Getenv("MAINPID") == "" { // systemd.exec(5)
		n := newNotifier(slog.New(slog.DiscardHandler))
		n.send("STATUS=" + status)
		n.close()
	}
}

// isRepeated tells whether a later message will say what this one says.
func isRepeated(message string) bool {
	return strings.HasPrefix(message, "STATUS=") || message == daemon.SdNotifyWatchdog
}

// close returns when systemd has got every message, or after notifyTimeout. Nothing may be sent after it.
func (n *notifier) close() {
	if n == nil {
		return
	}
	n.mu.Lock()
	n.giveUp = time.Now().Add(notifyTimeout)
	n.changed.Signal()
	n.mu.Unlock()
	<-n.done
}

// run writes what is pending until close.
func (n *notifier) run() {
	defer close(n.done)
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		for len(n.pending) == 0 && n.giveUp.IsZero() {
			n.changed.Wait()
		}
		if len(n.pending) == 0 {
			return
		}
		message := n.pending[0]
		n.pending = n.pending[1:]
		n.mu.Unlock()
		err := n.write(message)
		n.mu.Lock()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n.log.Warn("systemd has not read that flowctl is ending", "messages", len(n.pending)+1)
			return
		}
		if err != nil {
			level := slog.LevelWarn
			if isRepeated(message) {
				level = slog.LevelDebug
			}
			n.log.Log(context.Background(), level, "cannot notify systemd", "err", err)
		}
	}
}

// write hands the kernel a message. It fails with os.ErrDeadlineExceeded when close waits no longer.
func (n *notifier) write(message string) error {
	conn, err := net.DialUnix("unixgram", nil, n.addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	for warned := false; ; warned = true {
		n.mu.Lock()
		giveUp := n.giveUp
		n.mu.Unlock()
		_ = conn.SetWriteDeadline(cmp.Or(giveUp, time.Now().Add(notifyTimeout))) // an open connection has deadlines
		if _, err = conn.Write([]byte(message)); !errors.Is(err, os.ErrDeadlineExceeded) || !giveUp.IsZero() {
			return err
		}
		if !warned {
			n.log.Warn("systemd does not read what it is told", "for", notifyTimeout)
		}
	}
}

// journalLog writes to systemd's journal by its native protocol, a record for each line. A slow
// journal slows the components, as a slow reader of standard output does. When it has failed for
// journalTimeout, lines are dropped until it is back; then a record says how many.
type journalLog struct {
	send func(message string, priority journald.Priority, fields map[string]string) error
	base map[string]string // of flowctl's own records; never changes

	dropped      atomic.Int64 // lines
	failingSince atomic.Int64 // Unix time in nanoseconds, 0 while the journal works
	retrying     sync.Mutex   // held by the one who tries again

	records chan journalRecord // of flowctl's own log
	done    chan struct{}      // closed when all records before the last are written
}

type journalRecord struct {
	message  string
	priority journald.Priority
	fields   map[string]string
	reached  chan struct{} // to be closed when all records before are written, of one without a message; else nil
	last     bool          // there is no message, and no record comes after it
}

// openJournal opens the journal for a pipeline, "" for a control plane alone. close ends its goroutine.
func openJournal(pipeline string) *journalLog {
	j := &journalLog{
		send: journald.Send, base: map[string]string{"SYSLOG_IDENTIFIER": "flowctl"},
		records: make(chan journalRecord, journalQueue), done: make(chan struct{}),
	}
	if pipeline != "" {
		j.base["PIPELINE"] = pipeline
	}
	go func() {
		defer close(j.done)
		for r := range j.records {
			switch {
			case r.last:
				return
			case r.reached != nil:
				close(r.reached)
			default:
				j.write(r.message, r.priority, r.fields)
			}
		}
	}()
	return j
}

// close writes what is left of flowctl's own log, for at most flushTime. j may be nil.
func (j *journalLog) close() {
	if j == nil {
		return
	}
	late := time.After(flushTime)
	select {
	case j.records <- journalRecord{last: true}:
	case <-late:
		return
	}
	select {
	case <-j.done:
	case <-late:
	}
}

// await returns when all of flowctl's own log is written, or when ctx ends. j may be nil.
func (j *journalLog) await(ctx context.Context) {
	if j == nil {
		return
	}
	reached := make(chan struct{})
	select {
	case j.records <- journalRecord{reached: reached}:
	case <-ctx.Done():
		return
	}
	select {
	case <-reached:
	case <-ctx.Done():
	}
}

// lines writes lines of a component, each a record.
func (j *journalLog) lines(id, stream string, lines []byte) {
	// journalctl shows the identifier before each line.
	known := map[string]string{"SYSLOG_IDENTIFIER": id, "COMPONENT": id, "PIPELINE": j.base["PIPELINE"]}
	for len(lines) > 0 {
		var line []byte
		line, lines = cutLine(lines)
		line, priority := linePriority(line, stream)
		if len(line) <= journalPiece {
			j.write(string(line), priority, known)
			continue
		}
		pieces := slices.Collect(slices.Chunk(line, journalPiece))
		fields := maps.Clone(known)
		fields["LINE_PIECES"] = strconv.Itoa(len(pieces))
		for i, piece := range pieces {
			fields["LINE_PIECE"] = strconv.Itoa(i + 1)
			j.write(string(piece), priority, fields)
		}
	}
}

// linePriority returns the priority of a line, and the line without the <N> that may name it (sd-daemon(3)).
// The highest is err: the journal shows an emergency on all terminals.
func linePriority(line []byte, stream string) ([]byte, journald.Priority) {
	if len(line) >= 3 && line[0] == '<' && line[1] >= '0' && line[1] <= '7' && line[2] == '>' {
		return line[3:], max(journald.Priority(line[1]-'0'), journald.PriErr)
	}
	if stream == "stderr" {
		return line, journald.PriWarning
	}
	return line, journald.PriInfo
}

// write hands one record to the journal.
func (j *journalLog) write(message string, priority journald.Priority, fields map[string]string) {
	err := j.send(message, priority, fields)
	if err != nil {
		err = j.retry(message, priority, fields)
	}
	if err != nil {
		j.dropped.Add(1)
		return
	}
	j.failingSince.Store(0)
	if n := j.dropped.Swap(0); n > 0 {
		if err := j.send(fmt.Sprintf("%d lines are lost: the journal did not take them", n), journald.PriErr, j.base); err != nil {
			j.dropped.Add(n)
		}
	}
}

// retry tries until journalTimeout after the first failure.
func (j *journalLog) retry(message string, priority journald.Priority, fields map[string]string) error {
	j.retrying.Lock()
	defer j.retrying.Unlock()
	j.failingSince.CompareAndSwap(0, time.Now().UnixNano())
	for {
		err := j.send(message, priority, fields)
		if err == nil || time.Since(time.Unix(0, j.failingSince.Load())) > journalTimeout {
			return err
		}
		time.Sleep(journalRetry)
	}
}

// log writes a record of flowctl's own log. It never blocks: beyond journalQueue they are dropped.
func (j *journalLog) log(r journalRecord) {
	select {
	case j.records <- r:
	default:
		j.dropped.Add(1)
	}
}

// journalEntry is a part of the report of a run that failed; component may be empty.
type journalEntry struct{ message, component, reason string }

// report writes the report of a run that failed.
func (j *journalLog) report(entries []journalEntry) {
	for _, e := range entries {
		fields := maps.Clone(j.base)
		if e.component != "" {
			fields["COMPONENT"], fields["REASON"] = e.component, e.reason
		}
		j.log(journalRecord{message: e.message, priority: journald.PriErr, fields: fields})
	}
}

// journalHandler writes records of slog to the journal. The message is the text with its
// attributes behind it; each attribute is a field as well.
type journalHandler struct {
	journal *journalLog
	level   slog.Level
	attrs   []slog.Attr
}

func (h *journalHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

// WithGroup is there for slog: flowctl's log has no groups.
func (h *journalHandler) WithGroup(string) slog.Handler { return h }

func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &journalHandler{h.journal, h.level, slices.Concat(h.attrs, attrs)}
}

func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	attrs := slices.Clip(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		attrs = append(attrs, a)
		return true
	})
	fields := make(map[string]string)
	for _, a := range attrs {
		fields[fieldName(a.Key)] = a.Value.Resolve().String()
	}
	maps.Copy(fields, h.journal.base)
	// slog writes the attributes after a level and a message, which are cut off.
	var text strings.Builder
	rest := slog.NewRecord(time.Time{}, r.Level, "", 0)
	rest.AddAttrs(attrs...)
	err := slog.NewTextHandler(&text, &slog.HandlerOptions{Level: r.Level, ReplaceAttr: durationText}).Handle(ctx, rest)
	tail := strings.TrimPrefix(text.String(), "level="+r.Level.String()+` msg=""`)
	h.journal.log(journalRecord{message: r.Message + strings.TrimSuffix(tail, "\n"), priority: levelPriority(r.Level), fields: fields})
	return err
}

func levelPriority(level slog.Level) journald.Priority {
	switch {
	case level >= slog.LevelError:
		return journald.PriErr
	case level >= slog.LevelWarn:
		return journald.PriWarning
	case level >= slog.LevelInfo:
		return journald.PriInfo
	}
	return journald.PriDebug
}

// What cannot be in the name of a field, and names that mean something to the journal (systemd.journal-fields(7)).
var (
	notInField    = pattern(`[^A-Z0-9]`)
	reservedField = pattern(`^(_|[0-9]|MESSAGE_|CODE_|SYSLOG_|OBJECT_|COREDUMP_` +
		`|(MESSAGE|PRIORITY|ERRNO|TID|UNIT|USER_UNIT|DOCUMENTATION|INVOCATION_ID|USER_INVOCATION_ID)?$)`)
)

// fieldName returns the name of a field for the attribute key.
func fieldName(key string) string {
	const most = 64
	name := notInField().ReplaceAllString(strings.ToUpper(key), "_")
	if reservedField().MatchString(name) {
		name = "FLOWCTL_" + strings.TrimLeft(name, "_")
	}
	return name[:min(len(name), most)]
}

// journalRuns tells whether there is a journal on this machine.
func journalRuns() bool { return journald.Enabled() }

// isJournal tells whether standard error leads to the journal, or standard output, where f is that.
func isJournal(f *os.File) bool {
	ask := journald.StderrIsJournalStream
	if f == os.Stdout {
		ask = journald.StdoutIsJournalStream
	}
	on, err := ask()
	return err == nil && on && journald.Enabled()
}

// markErrors marks each line of text as an error for the journal (sd-daemon(3)), if stderr is that.
func markErrors(text string) string {
	if isJournal(os.Stderr) {
		return "<3>" + strings.ReplaceAll(text, "\n", "\n<3>")
	}
	return text
}
