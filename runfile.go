// Run files: which pipelines run on this machine. Each run keeps one for as long as it lives
// and holds a lock on it. The kernel drops the lock however the process ends, so a file
// without a lock is ignored, whatever pid it names.
//
// The locks are those of fcntl(2), not of flock(2): a reader can ask whether one is held
// without taking it, and who may only read the file cannot take it. But a process loses its
// lock when it closes any file of the same inode. So a run opens its own file once, and no
// other command has one.

package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	folderLock = "lock"   // the file whose lock is held while a run file is added or removed
	runSuffix  = ".json"  // of run files
	maxRunName = 150      // bytes of the name of a run file; a hash replaces the rest
	maxRunFile = 64 << 10 // bytes that are read of a run file
	runsTick   = 20 * time.Millisecond
)

// runInfo is what a run file says.
type runInfo struct {
	PID      int       `json:"pid"`
	Pipeline string    `json:"pipeline,omitempty"` // its name, "" for a control plane alone
	Endpoint string    `json:"endpoint,omitempty"` // "" until the control plane listens
	Started  time.Time `json:"started"`
	TLS      bool      `json:"tls,omitempty"` // at Endpoint
}

// runFile is the run file of this process. Methods of a nil one do nothing.
type runFile struct {
	file *os.File
	info runInfo
}

// runningError tells that another process runs the pipeline.
type runningError struct {
	wanted runInfo
	by     runInfo // its PID is 0 where the file could not be read
}

func (e *runningError) Error() string {
	text := fmt.Sprintf("pipeline %q is already running", e.wanted.Pipeline)
	if e.wanted.Pipeline == "" {
		text = fmt.Sprintf("a control plane at %s is already running", e.wanted.Endpoint)
	}
	switch {
	case e.by.PID == 0:
		return text
	case e.by.Endpoint == "":
		return fmt.Sprintf("%s (pid %d, starting)", text, e.by.PID)
	}
	return fmt.Sprintf("%s (pid %d, endpoint %s)", text, e.by.PID, e.by.Endpoint)
}

// claimRun makes this process the one that runs the pipeline of info, or the control plane at
// its endpoint, and writes info to a run file. It fails with a *runningError if another process
// runs that already. Any other error is of the folder. A process may have one run file.
func claimRun(info runInfo) (*runFile, error) {
	folder := runFolder()
	if err := makeRunFolder(folder); err != nil {
		return nil, err
	}
	return claimRunIn(folder, info)
}

// claimRunIn is claimRun in a folder that is there.
func claimRunIn(folder string, info runInfo) (*runFile, error) {
	info.PID, info.Started = os.Getpid(), time.Now()
	lock, err := lockRuns(folder)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	path := filepath.Join(folder, info.fileName())
	if by, live, err := readRun(path); live {
		return nil, &runningError{info, by}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// A file that a dead process has left may still be open elsewhere: it is not used again.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	r := &runFile{f, info}
	err = lockFile(f, syscall.F_SETLK)
	if err == nil {
		err = r.write()
	}
	if err == nil {
		err = f.Chmod(0o644) // not before it is locked; who may read it depends on the folder
	}
	if err != nil {
		os.Remove(path)
		f.Close()
		return nil, err
	}
	return r, nil
}

// ownerLabel names the run file, and so the run that holds it, among those of all users and
// machines that share a container engine. It is "" where there is no run file.
func (r *runFile) ownerLabel() string {
	if r == nil {
		return ""
	}
	host, _ := os.Hostname()
	machine, _ := os.ReadFile("/etc/machine-id") // machine-id(5), Linux
	return fmt.Sprintf("%s:%s:%s", host, strings.TrimSpace(string(machine)), r.file.Name())
}

// publish writes into the file where the control plane listens.
func (r *runFile) publish(endpoint string) error {
	if r == nil {
		return nil
	}
	r.info.Endpoint = endpoint
	return r.write()
}

// write writes the file in place, because the lock is on it. A reader of half of it takes the
// run for one that is starting.
func (r *runFile) write() error {
	data, err := json.Marshal(r.info)
	if err != nil {
		return err
	}
	if _, err := r.file.WriteAt(append(data, '\n'), 0); err != nil {
		return err
	}
	return r.file.Truncate(int64(len(data) + 1))
}

// release removes the file and gives up its lock.
func (r *runFile) release() {
	if r == nil {
		return
	}
	defer r.file.Close()
	lock, err := lockRuns(filepath.Dir(r.file.Name()))
	if err != nil {
		return // the folder is gone, or else the file stays without a lock
	}
	defer lock.Close()
	ours, err := r.file.Stat()
	if err != nil {
		return
	}
	if there, err := os.Lstat(r.file.Name()); err == nil && os.SameFile(ours, there) {
		os.Remove(r.file.Name())
	}
}

// findRuns returns what runs, sorted by name, and removes the files that dead processes have
// left in this user's folders. A process that has a run file must not call it.
func findRuns() ([]runInfo, error) {
	var runs []runInfo
	for _, folder := range runFolders() {
		entries, err := os.ReadDir(folder)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return nil, err
		}
		for _, entry := range entries {
			if !strings.HasSuffix(entry.Name(), runSuffix) {
				continue
			}
			info, live, err := readRun(filepath.Join(folder, entry.Name()))
			switch {
			case live:
				runs = append(runs, info)
			case err == nil:
				removeStale(folder, entry.Name())
			}
		}
	}
	slices.SortStableFunc(runs, func(a, b runInfo) int {
		return cmp.Or(cmp.Compare(a.Pipeline, b.Pipeline), cmp.Compare(a.Endpoint, b.Endpoint))
	})
	return runs, nil
}

// awaitRuns returns the runs whose control plane listens, at least one, and an error for each
// that is starting. With wait it waits, until ctx ends, for the first that listens, with all
// for all of them.
func awaitRuns(ctx context.Context, wait, all bool) (runs []runInfo, starting []error, err error) {
	ticker := time.NewTicker(runsTick)
	defer ticker.Stop()
	for {
		found, err := findRuns()
		if err != nil {
			return nil, nil, err
		}
		runs, starting = nil, nil
		for _, r := range found {
			if r.Endpoint != "" {
				runs = append(runs, r)
				continue
			}
			starting = append(starting, fmt.Errorf("pipeline %q (pid %d) is starting: its control plane does not listen yet", r.Pipeline, r.PID))
		}
		if wait && (len(runs) == 0 || all && len(starting) > 0) {
			select {
			case <-ticker.C:
				continue
			case <-ctx.Done():
			}
		}
		switch {
		case len(found) == 0:
			return nil, nil, fmt.Errorf("no pipeline is running: there is none in %s; name a control plane with -endpoint host:port", strings.Join(runFolders(), ", "))
		case len(runs) == 0:
			return nil, nil, errors.Join(starting...)
		}
		return runs, starting, nil
	}
}

// readRun reads a run file and tells whether its process lives. The info of a process that
// lives is zero while its file is not complete.
func readRun(path string) (info runInfo, live bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) // does not wait if it is a FIFO
	if err != nil {
		return runInfo{}, false, err
	}
	defer f.Close()
	if stat, err := f.Stat(); err != nil || !stat.Mode().IsRegular() {
		return runInfo{}, false, cmp.Or(err, fmt.Errorf("%s is no regular file", path))
	}
	if live, err = isLocked(f); err != nil || !live {
		return runInfo{}, false, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRunFile))
	if err != nil || json.Unmarshal(data, &info) != nil {
		return runInfo{}, true, err
	}
	return info, true, nil
}

// removeStale removes a file that a dead process has left. It does nothing in a folder of
// another user, and while another process has the lock of the folder.
func removeStale(folder, name string) {
	if !owned(folder) {
		return
	}
	lock, err := os.OpenFile(filepath.Join(folder, folderLock), os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer lock.Close()
	if lockFile(lock, syscall.F_SETLK) != nil {
		return
	}
	path := filepath.Join(folder, name)
	if _, live, err := readRun(path); err == nil && !live { // else a new run has it
		os.Remove(path)
	}
}

// lockRuns waits for the lock of a folder and returns the file to close to give it back. Each
// holder has it for a few system calls only.
func lockRuns(folder string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(folder, folderLock), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(f, syscall.F_SETLKW); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot lock %s: %v", f.Name(), err)
	}
	return f, nil
}

// lockFile locks all of f for writing: with F_SETLK at once or not at all, with F_SETLKW it
// waits.
func lockFile(f *os.File, command int) error {
	for {
		err := syscall.FcntlFlock(f.Fd(), command, &syscall.Flock_t{Type: syscall.F_WRLCK})
		if err != syscall.EINTR {
			return err
		}
	}
}

// isLocked tells whether another process holds the lock of f.
func isLocked(f *os.File) (bool, error) {
	ask := syscall.Flock_t{Type: syscall.F_RDLCK} // a lock for reading would have to wait for one for writing
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &ask); err != nil {
		return false, fmt.Errorf("cannot see whether %s is locked: %v", f.Name(), err)
	}
	return ask.Type != syscall.F_UNLCK, nil
}

// fileName returns the name of the run file, a valid one for any name of a pipeline.
func (i runInfo) fileName() string {
	name := "pipeline-" + url.PathEscape(i.Pipeline)
	if i.Pipeline == "" {
		name = "server-" + url.PathEscape(i.Endpoint)
	}
	if len(name) > maxRunName {
		name = fmt.Sprintf("%s-%x", name[:maxRunName-65], sha256.Sum256([]byte(name)))
	}
	return name + runSuffix
}

// runFolder is where this process keeps its run file.
func runFolder() string {
	if folder, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":"); folder != "" {
		return filepath.Clean(folder) // made by systemd
	}
	if folder := os.Getenv("XDG_RUNTIME_DIR"); owned(folder) { // not owned after su(1)
		return filepath.Join(folder, "flowctl")
	}
	shared := sharedRuns()
	if _, err := os.Stat(shared); os.Geteuid() == 0 && (owned(shared) || errors.Is(err, fs.ErrNotExist)) {
		return shared
	}
	return temporaryRuns()
}

// runFolders are the folders where run files of this user may be, and those of services that
// all users may see.
func runFolders() []string {
	var folders []string
	for _, folder := range []string{runFolder(), sharedRuns(), temporaryRuns()} {
		if !slices.Contains(folders, folder) && (folder != temporaryRuns() || checkPrivate(folder) == nil) {
			folders = append(folders, folder)
		}
	}
	return folders
}

// sharedRuns is the folder of root, and of a unit with RuntimeDirectory=flowctl.
func sharedRuns() string {
	if runtime.GOOS == "darwin" {
		return "/var/run/flowctl" // there is no /run
	}
	return "/run/flowctl"
}

// temporaryRuns is the folder of a user who has no other.
func temporaryRuns() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("flowctl-%d", os.Geteuid()))
}

// makeRunFolder makes a folder for run files, if it is not there.
func makeRunFolder(folder string) error {
	mode := fs.FileMode(0o700)
	if folder == sharedRuns() {
		mode = 0o755
	}
	if err := os.Mkdir(folder, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if folder == temporaryRuns() {
		return checkPrivate(folder)
	}
	return nil
}

// checkPrivate fails for a folder that another user owns or can read or write: in the temporary
// directory anyone can make one.
func checkPrivate(folder string) error {
	info, err := os.Lstat(folder)
	if err != nil {
		return err
	}
	if !info.IsDir() || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not a folder of this user alone: its owner must be %d and its mode 0700, not %s", folder, os.Geteuid(), info.Mode())
	}
	return nil
}

// owned tells whether this user owns a folder.
func owned(folder string) bool {
	info, err := os.Stat(folder)
	return err == nil && info.IsDir() && info.Sys().(*syscall.Stat_t).Uid == uint32(os.Geteuid())
}
