// The record of runs: which pipelines have run on this machine, and how they ended. The last ones are in
// one file of a folder. Each run locks a byte of a second file for as long as it lives, so that one
// that was killed is known from one that goes on.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

const (
	runsFormat  = "flowctl-runs/1"
	runsName    = "runs.json"
	runsLock    = "runs.lock"            // byte 0 is locked while runs.json is read and replaced, the byte number of a record by its run
	maxRuns     = 100                    // records that are kept
	maxRunsFile = 1 << 20                // bytes
	recordDelay = 300 * time.Millisecond // for a pipeline to be ready, before it is recorded that it starts: all records are written anew, while processors are wanted

	runStarting  = "starting"
	runRunning   = "running"
	runCompleted = "completed" // every component that has to has ended with 0
	runStopped   = "stopped"   // by a request
	runFailed    = "failed"
	runKilled    = "killed" // of one that has no lock and no end; never written
)

// runRecord is one run. docs/commands.md documents the JSON.
type runRecord struct {
	Number   int64      `json:"number"` // of this folder; the byte that the run has locked
	ID       string     `json:"id"`     // FLOWCTL_RUN_ID
	Pipeline string     `json:"pipeline"`
	PID      int        `json:"pid"`
	State    string     `json:"state"`
	Started  time.Time  `json:"started"`
	Ended    *time.Time `json:"ended,omitempty"`
	ExitCode *int       `json:"exit_code,omitempty"` // of one that has ended
	Reason   string     `json:"reason,omitempty"`    // why it failed
}

// runsFile is what runs.json holds.
type runsFile struct {
	Format string      `json:"format"`
	Runs   []runRecord `json:"runs"`
}

// recorder writes the record of this run. A goroutine does that, as a disk may hang. A nil one does nothing.
type recorder struct {
	folder  string
	log     *slog.Logger
	updates chan runRecord
	done    chan struct{} // closed when all is written
}

// openRecorder begins to write records of a run in folder, which is made where it is missing. close ends that.
// It returns nil for the folder "".
func openRecorder(folder string, log *slog.Logger) *recorder {
	if folder == "" {
		return nil
	}
	r := &recorder{folder, log, make(chan runRecord, 3), make(chan struct{})} // starting, running, ended
	go r.run()
	return r
}

// update writes how the run is now. It is called once for each of its states.
func (r *recorder) update(record runRecord) {
	if r != nil {
		r.updates <- record
	}
}

// close returns when all is written, or after maxWrite.
func (r *recorder) close() {
	if r == nil {
		return
	}
	close(r.updates)
	select {
	case <-r.done:
	case <-time.After(maxWrite):
		r.log.Warn("this run may not be recorded to its end: the disk takes nothing", "folder", r.folder)
	}
}

// run writes until close.
func (r *recorder) run() {
	defer close(r.done)
	lock, openErr := openRuns(r.folder)
	number, told := int64(0), false
	for record := range r.updates {
		if record.State == runStarting {
			select {
			case next, ok := <-r.updates:
				if ok {
					record = next
				}
			case <-time.After(recordDelay):
			}
		}
		record.Number = number
		err := openErr
		if err == nil {
			err = changeRuns(r.folder, lock, &record)
		}
		if err == nil {
			number = record.Number
		} else if !told {
			told = true
			r.log.Warn("this run is not recorded as it is", "state", record.State, "folder", r.folder, "err", err)
		}
	}
}

// openRuns makes the folder and opens its lock, which has to stay open.
func openRuns(folder string) (*os.File, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	return os.OpenFile(filepath.Join(folder, runsLock), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
}

// lockByte locks, or gives back, a byte of the lock file.
func lockByte(lock *os.File, command int, kind int16, number int64) error {
	for {
		err := syscall.FcntlFlock(lock.Fd(), command, &syscall.Flock_t{Type: kind, Start: number, Len: 1})
		if err != syscall.EINTR {
			return err
		}
	}
}

// changeRuns puts a record into the file of a folder. A new one, of number 0, gets its number.
func changeRuns(folder string, lock *os.File, record *runRecord) error {
	if err := lockByte(lock, syscall.F_SETLKW, syscall.F_WRLCK, 0); err != nil {
		return err
	}
	defer func() { _ = lockByte(lock, syscall.F_SETLK, syscall.F_UNLCK, 0) }()
	path := filepath.Join(folder, runsName)
	records, err := readRuns(path)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(records, func(r runRecord) bool { return r.Number == record.Number })
	if i < 0 {
		for _, r := range records {
			record.Number = max(record.Number, r.Number)
		}
		record.Number++
		if err := lockByte(lock, syscall.F_SETLK, syscall.F_WRLCK, record.Number); err != nil {
			return err
		}
		records = append(records, *record)
	} else {
		records[i] = *record
	}
	for i := 0; len(records) > maxRuns && i < len(records); {
		if r := records[i]; r.Number != record.Number && !isLocked(lock, r.Number) {
			records = slices.Delete(records, i, i+1)
			continue
		}
		i++
	}
	_, err = replaceFile(path, func(w io.Writer) error { return json.NewEncoder(w).Encode(runsFile{runsFormat, records}) })
	return err
}

// readRuns reads the file of a folder. There are none where it is missing. A damaged one is an error.
func readRuns(path string) ([]runRecord, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRunsFile))
	var file runsFile
	if err == nil {
		err = json.Unmarshal(data, &file)
	}
	if err == nil && file.Format != runsFormat {
		err = fmt.Errorf("it has the format %q, this version reads %q", clip(file.Format), runsFormat)
	}
	if err != nil {
		return nil, fmt.Errorf("%s cannot be read, and is kept as it is: %v", path, err)
	}
	return file.Runs, nil
}

// isLocked tells whether a run holds the byte of its record.
func isLocked(lock *os.File, number int64) bool {
	ask := syscall.Flock_t{Type: syscall.F_WRLCK, Start: number, Len: 1}
	return syscall.FcntlFlock(lock.Fd(), syscall.F_GETLK, &ask) == nil && ask.Type != syscall.F_UNLCK
}

// recordedRuns returns the runs of the folders that there are, the latest last. errs says which cannot be read.
func recordedRuns(folders []string) (records []runRecord, errs []error) {
	records = []runRecord{}
	for _, folder := range folders {
		some, err := readRuns(filepath.Join(folder, runsName))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		lock, _ := openRunsLock(folder)
		markKilled(some, lock)
		lock.Close()
		records = append(records, some...)
	}
	slices.SortStableFunc(records, func(a, b runRecord) int { return a.Started.Compare(b.Started) })
	return records, errs
}

// openRunsLock opens the lock file of a folder, to see which runs live.
func openRunsLock(folder string) (*os.File, error) {
	return os.OpenFile(filepath.Join(folder, runsLock), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
}

// markKilled says which records are of runs that were killed; lock is nil where there is no lock file.
func markKilled(records []runRecord, lock *os.File) {
	for i := range records {
		if records[i].Ended == nil && (lock == nil || !isLocked(lock, records[i].Number)) {
			records[i].State = runKilled
		}
	}
}

// runsReader reads the records of a folder in a process that may have recorded a run there itself, which looks as if
// it was killed. The lock file stays open: the kernel takes all locks that a process has on a file when that closes
// any descriptor of it.
type runsReader struct {
	folder string
	lock   *os.File // nil until it is there

	at   time.Time // when the fields below were read
	runs []runRecord
	err  error
}

// read returns the runs as they are at the time wanted or later, the latest last: those who have waited for their
// turn meanwhile share what was read. One goroutine at a time may call it.
func (r *runsReader) read(wanted time.Time) ([]runRecord, error) {
	if r.at.After(wanted) {
		return r.runs, r.err
	}
	r.at = time.Now()
	r.runs, r.err = readRuns(filepath.Join(r.folder, runsName))
	if !r.isOpen() {
		r.lock.Close() // it was removed, or there was none: nobody looks at its locks
		r.lock, _ = openRunsLock(r.folder)
	}
	markKilled(r.runs, r.lock)
	return r.runs, r.err
}

// isOpen tells whether r.lock is the lock file that the folder has now.
func (r *runsReader) isOpen() bool {
	was, err := r.lock.Stat()
	is, errNow := os.Lstat(filepath.Join(r.folder, runsLock))
	return err == nil && errNow == nil && os.SameFile(was, is)
}
