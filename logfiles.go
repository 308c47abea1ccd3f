// The log files of components, one for each; and how calls are made that a disk can keep for ever.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxLogFile = 10 << 20 // bytes of a log file before it is rotated

	lookTime = 500 * time.Millisecond  // between two looks at whether the log files are where they were
	diskTime = 1500 * time.Millisecond // for a disk to answer: a busy one does, one that hangs is not waited for
)

// diskTurn is for calls that a disk can keep for ever (NFS, FUSE, /proc/kmsg): one at a time is made,
// in a goroutine of its own.
type diskTurn struct {
	taken chan struct{} // has room for one
	most  time.Duration // that a call is waited for
	hangs atomic.Bool   // the call that has it was given up
}

func newDiskTurn(most time.Duration) *diskTurn {
	return &diskTurn{taken: make(chan struct{}, 1), most: most}
}

// do calls f, which uses the file or folder of that name, and waits for it for t.most, the turn
// included. After that the goroutine of f is given up, because nothing can end it, and
// until it has returned all calls fail at once.
func (t *diskTurn) do(name string, f func() error) (called bool, err error) {
	hangs := fmt.Errorf("%s: %w for %s", name, errNoAnswer, t.most)
	if t.hangs.Load() {
		return false, hangs
	}
	timer := time.NewTimer(t.most)
	defer timer.Stop()
	select {
	case t.taken <- struct{}{}:
	case <-timer.C:
		return false, hangs
	}
	done := make(chan error, 1)
	go func() {
		done <- f()
		t.hangs.Store(false)
		<-t.taken
	}()
	select {
	case err := <-done:
		return true, err
	case <-timer.C:
	}
	t.hangs.Store(true)
	select {
	case err := <-done: // just now, so nobody else says that it hangs no more
		t.hangs.Store(false)
		return true, err
	default:
		return true, hangs
	}
}

// logFiles keeps the lines of each component in a file of its own below a folder,
// written before they are shown, so that what is on the terminal is in the file. Only a disk
// that hangs is not waited for.
type logFiles struct {
	dir    string
	mode   os.FileMode // of new files
	log    *slog.Logger
	turn   *diskTurn     // of who uses all files
	wakeup chan struct{} // gets a token when there is something to close
	ending chan struct{} // closed by close
	ended  chan struct{} // closed when watch has returned

	mu   sync.RWMutex // guards the fields below
	byID map[string]*logFile
	left []*logFile // of components that have left, to be closed
}

// logFile is DIR/ID.log. Past maxLogFile bytes it becomes DIR/ID.log.1, and a new one begins.
type logFile struct {
	path    string
	mode    os.FileMode
	log     *slog.Logger
	broken  atomic.Bool                 // the last write failed, and that was logged
	missing atomic.Int64                // lines that could not be written
	opened  atomic.Pointer[os.FileInfo] // what f is, nil where f is

	turn   *diskTurn // of who uses the fields below
	f      *os.File  // nil when it could not be opened
	size   int64
	most   int64 // the size at which it is to be rotated
	closed bool
}

// logsDirectory is the folder for log files that systemd has made, "" for none.
func logsDirectory() string {
	logs, _, _ := strings.Cut(os.Getenv("LOGS_DIRECTORY"), ":")
	return logs
}

// ownerOf returns the user that a file belongs to.
func ownerOf(info os.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// ofAnother tells whether uid is neither flowctl's own user nor root.
func ofAnother(uid uint32) bool { return uid != 0 && uid != uint32(os.Geteuid()) }

// errNotOurs is of a folder in which another user could read log files.
var errNotOurs = errors.New("a folder of log files, or a link to one, must belong to flowctl's user or to root")

// openLogFolder opens a folder of log files. That of another user, who could read them, is refused, and
// so is a link of one, who could lead flowctl elsewhere.
func openLogFolder(dir string) (*os.Root, error) {
	there, err := os.Lstat(filepath.Clean(dir))
	if err != nil {
		return nil, err
	}
	folder, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	here, err := folder.Stat(".")
	if err == nil {
		for _, info := range []os.FileInfo{there, here} {
			if ofAnother(ownerOf(info)) {
				err = fmt.Errorf("%s (%s) belongs to user %d: %w", dir, info.Mode(), ownerOf(info), errNotOurs)
			}
		}
		if there.IsDir() && !os.SameFile(there, here) {
			err = fmt.Errorf("%s was replaced while it was opened", dir)
		}
	}
	if err != nil {
		folder.Close()
		return nil, err
	}
	return folder, nil
}

// openLogFiles makes the folder and opens a file for each of ids. What they print may hold
// secrets, so only this user can read them, but in a folder of systemd, which decides that.
// close ends the goroutine that watches them.
func openLogFiles(dir string, ids []string, log *slog.Logger) (*logFiles, error) {
	l := &logFiles{
		dir: dir, mode: 0o600, log: log, turn: newDiskTurn(diskTime), byID: make(map[string]*logFile),
		wakeup: make(chan struct{}, 1), ending: make(chan struct{}), ended: make(chan struct{}),
	}
	if filepath.Clean(dir) == logsDirectory() {
		l.mode = 0o644
	}
	for _, id := range ids {
		l.add(id)
	}
	_, err := l.turn.do(dir, func() (err error) {
		for _, id := range ids {
			if err == nil {
				err = l.byID[id].open()
			}
			if errors.Is(err, errNotPlain) {
				l.byID[id].report(err)
				err = nil
			}
		}
		if err != nil {
			l.closeAll()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	go l.watch()
	return l, nil
}

func (l *logFiles) path(id string) string { return filepath.Join(l.dir, id+".log") }

// add makes id known, if it is not. Its file is opened with its first lines.
func (l *logFiles) add(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byID[id] == nil {
		l.byID[id] = &logFile{path: l.path(id), mode: l.mode, log: l.log.With("component", id), turn: newDiskTurn(diskTime)}
	}
}

// forget has the file of a component closed that has left. It does not wait for that.
func (l *logFiles) forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.byID[id]; f != nil {
		l.left = append(l.left, f)
		delete(l.byID, id)
	}
	select {
	case l.wakeup <- struct{}{}:
	default:
	}
}

// watch looks after the files until close.
func (l *logFiles) watch() {
	defer close(l.ended)
	tick := time.NewTicker(lookTime)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-l.wakeup:
		case <-l.ending:
			return
		}
		l.look()
	}
}

// look opens the files anew that others have removed or renamed, and closes those of components that
// have left. A disk that hangs is told by the next lines.
func (l *logFiles) look() {
	_, _ = l.turn.do(l.dir, func() error {
		l.mu.Lock()
		files, left := maps.Clone(l.byID), l.left
		l.left = nil
		l.mu.Unlock()
		for _, f := range left {
			f.close()
		}
		for _, f := range files {
			if _, ok := f.inPlace(); ok || f.opened.Load() == nil { // one that could not be opened is tried again with the next lines
				continue
			}
			_, err := f.turn.do(f.path, func() error {
				if f.closed || f.keep() {
					return nil
				}
				return f.open()
			})
			if err != nil {
				f.report(err)
			}
		}
		return nil
	})
}

// lines writes lines of a component. A file that cannot be written is reported once and tried
// again with the next lines: a full disk must not stop a pipeline.
func (l *logFiles) lines(id string, lines []byte) {
	l.mu.RLock()
	file := l.byID[id]
	l.mu.RUnlock()
	if file == nil {
		return // it has left, and that the rest of its output is lost was told
	}
	count := bytes.Count(lines, []byte{'\n'})
	stamp := time.Now().AppendFormat(make([]byte, 0, 32), "2006-01-02T15:04:05.000Z07:00 ")
	stamped := make([]byte, 0, len(lines)+count*len(stamp))
	for len(lines) > 0 {
		var line []byte
		line, lines = cutLine(lines)
		stamped = append(append(append(stamped, stamp...), line...), '\n')
	}
	called, err := file.turn.do(file.path, func() error { return file.write(stamped) })
	if !called {
		file.missing.Add(int64(count))
	}
	file.report(err)
}

// close closes the files. Lines that come later are given up: the run is over.
func (l *logFiles) close() {
	close(l.ending)
	<-l.ended
	_, _ = l.turn.do(l.dir, func() error {
		l.closeAll()
		return nil
	})
}

func (l *logFiles) closeAll() {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, f := range l.left {
		f.close()
	}
	for _, f := range l.byID {
		f.close()
	}
}

// report says what has become of the last write.
func (f *logFile) report(err error) {
	switch {
	case err != nil && !f.broken.Swap(true):
		f.log.Error("trouble with a log file", "err", err)
	case err == nil && f.broken.Swap(false):
		if missing := f.missing.Swap(0); missing > 0 {
			f.log.Warn("log file is written again", "missing_lines", missing)
		}
	}
}

// close closes the file for good.
func (f *logFile) close() {
	_, _ = f.turn.do(f.path, func() error {
		f.closed = true
		f.drop()
		return nil
	})
}

// drop closes what is open, so that the next lines open the file anew. Every write has been checked.
func (f *logFile) drop() {
	f.f.Close()
	f.f = nil
	f.opened.Store(nil)
}

// inPlace tells whether path still leads to what is open, and how large that is.
func (f *logFile) inPlace() (size int64, ok bool) {
	opened := f.opened.Load()
	if opened == nil {
		return 0, false
	}
	there, err := os.Lstat(f.path)
	if err != nil || !os.SameFile(there, *opened) {
		return 0, false
	}
	return there.Size(), true
}

// keep tells whether an open file can be written on. Where others have removed or renamed it, or its
// folder, nobody would see that, so it is closed. They may have made it shorter, too.
func (f *logFile) keep() bool {
	size, ok := f.inPlace()
	if ok {
		f.size = size
	} else if f.f != nil {
		f.log.Info("log file was removed or renamed, opening it anew", "file", f.path)
		f.drop()
	}
	return ok
}

// write appends stamped lines. What could not be written whole is taken
// back, so that no later line is glued to a part of it. That a file cannot be
// rotated is an error, and the lines are in it all the same.
func (f *logFile) write(lines []byte) error {
	if f.closed {
		return nil
	}
	var rotated error
	if f.keep() && f.size > 0 && f.size+int64(len(lines)) > f.most {
		rotated = f.rotate()
	}
	if f.f == nil {
		if err := f.open(); err != nil {
			f.missing.Add(int64(bytes.Count(lines, []byte{'\n'})))
			return err
		}
	}
	if n, err := f.f.Write(lines); err != nil {
		if n > 0 {
			_ = f.f.Truncate(f.size)
		}
		f.missing.Add(int64(bytes.Count(lines, []byte{'\n'})))
		return err
	}
	return rotated
}

// rotate moves the file away. Where that fails it is tried again after as much more.
func (f *logFile) rotate() error {
	folder, err := openLogFolder(filepath.Dir(f.path))
	if err == nil {
		defer folder.Close()
		err = folder.Rename(filepath.Base(f.path), filepath.Base(f.path)+".1")
	}
	if err != nil {
		f.most = f.size + maxLogFile
		return fmt.Errorf("%s: %w", filepath.Dir(f.path), err)
	}
	f.drop()
	return nil
}

// errNotPlain is of what somebody else may have put in the place of a log file, to have flowctl
// write elsewhere, or wait.
var errNotPlain = errors.New("a log file must be a plain file without another name")

// open opens the file, and makes its folder if there is none.
func (f *logFile) open() error {
	dir := filepath.Dir(f.path)
	folder, err := openLogFolder(dir)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) { // of which MkdirAll says more
		if err = os.MkdirAll(dir, f.mode|f.mode>>2&0o111); err == nil { // who may read a file may look for it
			folder, err = openLogFolder(dir)
		}
	}
	if err != nil {
		return err
	}
	defer folder.Close()
	name, flags := filepath.Base(f.path), os.O_APPEND|os.O_WRONLY|syscall.O_NONBLOCK // not to wait for the reader of a pipe
	there, err := folder.Lstat(name)
	if errors.Is(err, os.ErrNotExist) {
		flags |= os.O_CREATE | os.O_EXCL
	} else if err == nil && !there.Mode().IsRegular() && !there.IsDir() {
		return fmt.Errorf("%s is a link, a pipe or a socket: %w", f.path, errNotPlain)
	}
	file, err := folder.OpenFile(name, flags, f.mode)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	info, err := file.Stat()
	if err == nil {
		err = f.check(info, there)
	}
	if err == nil && info.Mode().Perm()&^f.mode != 0 && ownerOf(info) == uint32(os.Geteuid()) {
		_ = file.Chmod(f.mode) // there are file systems without modes
	}
	if err != nil {
		file.Close()
		return err
	}
	f.f, f.size, f.most = file, info.Size(), maxLogFile
	f.opened.Store(&info)
	return nil
}

// check fails for a file that is not the one that was there, nil for none, or is more than that.
func (f *logFile) check(info, there os.FileInfo) error {
	switch names := info.Sys().(*syscall.Stat_t).Nlink; {
	case !info.Mode().IsRegular() || names > 1:
		return fmt.Errorf("%s is %s with %d names: %w", f.path, info.Mode(), names, errNotPlain)
	case there != nil && !os.SameFile(info, there):
		return fmt.Errorf("%s was replaced while it was opened: %w", f.path, errNotPlain)
	case ofAnother(ownerOf(info)):
		return fmt.Errorf("%s belongs to user %d: %w, of flowctl's user or of root", f.path, ownerOf(info), errNotPlain)
	}
	return nil
}
