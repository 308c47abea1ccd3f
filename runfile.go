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
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	folderLock   = "lock"   // the file whose lock is held while a run file is added or removed
	runSuffix    = ".json"  // of run files
	socketSuffix = ".sock"  // in its place: of the operators' socket of a run
	maxRunName   = 80       // bytes of the name of a run file; a hash replaces the rest
	maxRunFile   = 64 << 10 // bytes that are read of a run file
	maxTheirs    = 64       // run files that are looked at in a folder of another user, who can make any number
	maxFolders   = 16       // folders that are looked at in such a folder
	maxScanned   = 4096     // names of files that are read in such a folder
	maxRemoved   = 16       // run files that were removed and stay open
	maxListener  = 2048     // a control plane opens its listener with a lower descriptor
	runsTick     = 20 * time.Millisecond
	keepTick     = 2 * time.Second // a run looks so often whether its run file is there
)

// runInfo is what a run file says.
type runInfo struct {
	PID      int       `json:"pid"`
	Pipeline string    `json:"pipeline,omitempty"` // its name, "" for a control plane alone
	Endpoint string    `json:"endpoint,omitempty"` // "" until the control plane listens
	Started  time.Time `json:"started"`
	TLS      bool      `json:"tls,omitempty"` // at Endpoint

	path   string // of the run file that was read
	owner  uint32 // of the file
	holder int    // process that has its lock, 0 where that is not seen here
}

// runFile is the run file of this process. Methods of a nil one do nothing.
type runFile struct {
	path   string
	file   *os.File
	info   runInfo
	former []*os.File // the last that were removed: who waits for the end of this process has one open, and waits for its lock
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

// claimRun makes this process the one of its user that runs the pipeline of info, or the control plane
// at its endpoint, and writes info to a run file. It fails with a *runningError if another process
// runs that already. Any other error is of the folder. A process may have one run file.
func claimRun(info runInfo) (*runFile, error) {
	folder := runFolder()
	if err := makeRunFolder(folder); err != nil {
		return nil, err
	}
	folders, _ := runFolders()
	folders = slices.DeleteFunc(folders, func(other string) bool { return other == folder })
	for _, other := range slices.Sorted(slices.Values(append(folders, folder))) { // in one order, so that no two wait for each other
		if other != folder && !owned(other) {
			continue
		}
		if lock, err := lockRuns(other); err == nil {
			defer lock.Close()
		}
	}
	for _, other := range folders {
		if by, live, _ := readRun(filepath.Join(other, info.fileName())); live && by.isOwn() {
			return nil, &runningError{info, by}
		}
	}
	return claimRunIn(folder, info)
}

// isOwn tells whether this user runs i. systemd gives a folder, and the run files that are in it, to the
// user of a unit, so the process that has the lock counts as well as the owner of the file.
func (i *runInfo) isOwn() bool {
	if i.owner == uint32(os.Geteuid()) {
		return true
	}
	process, err := os.Stat(fmt.Sprintf("/proc/%d", i.holder))
	return i.holder != 0 && err == nil && ownerOf(process) == uint32(os.Geteuid())
}

// claimRunIn is claimRun in a folder that is there.
func claimRunIn(folder string, info runInfo) (*runFile, error) {
	if info.PID = os.Getpid(); info.Started.IsZero() {
		info.Started = time.Now()
	}
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
	r := &runFile{path: path, file: f, info: info}
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
	return fmt.Sprintf("%s:%s:%s", host, strings.TrimSpace(string(machine)), r.path)
}

// publish writes into the file where the control plane listens.
func (r *runFile) publish(endpoint string) error {
	if r == nil {
		return nil
	}
	r.info.Endpoint = endpoint
	return r.write()
}

// write writes the file in place: the lock is on it. Half of it reads as a run that is starting.
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

// release removes the file. Its lock stays until this process has ended, for awaitEnd.
func (r *runFile) release() {
	if r == nil {
		return
	}
	lock, err := lockRuns(filepath.Dir(r.path))
	if err != nil {
		return // the folder is gone, or else the file stays, without a lock once this process has ended
	}
	defer lock.Close()
	if _, err := os.Lstat(r.path); r.isThere() || errors.Is(err, fs.ErrNotExist) { // else it is another run's
		os.Remove(r.path)
		os.Remove(socketOf(r.path))
	}
}

// isThere tells whether the run file was not removed.
func (r *runFile) isThere() bool {
	ours, err := r.file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(r.path)
	return err == nil && os.SameFile(ours, there)
}

// keep makes the run file again when it was removed, by a tmp cleaner say, until ctx ends. Where operators is
// the listener of its socket, serve gets the one of a new socket. Nobody else may use r meanwhile.
func (r *runFile) keep(ctx context.Context, operators net.Listener, serve func(net.Listener), log *slog.Logger) {
	if r == nil {
		return
	}
	tick := time.NewTicker(keepTick)
	defer tick.Stop()
	for told := ""; ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		remade, err := r.remake()
		if _, gone := os.Lstat(socketOf(r.path)); err == nil && operators != nil && gone != nil {
			var next net.Listener
			if next, err = r.listen(); err == nil {
				operators.Close() // nobody can find it any more
				operators = next
				serve(next)
			}
		}
		switch {
		case err != nil && err.Error() != told:
			told = err.Error()
			log.Warn("the run file was removed, and cannot be made again: list cannot find this run by itself, and a second one would not be refused", "file", r.path, "err", err)
		case err == nil && remade:
			told = ""
			log.Warn("the run file was removed, and is made again", "file", r.path)
		}
	}
}

// remake makes the run file again if it was removed.
func (r *runFile) remake() (remade bool, err error) {
	if r.isThere() {
		return false, nil
	}
	folder := filepath.Dir(r.path)
	if err := makeRunFolder(folder); err != nil {
		return false, err
	}
	next, err := claimRunIn(folder, r.info)
	if err != nil {
		return false, err
	}
	if len(r.former) == maxRemoved {
		r.former[0].Close()
		r.former = slices.Delete(r.former, 0, 1)
	}
	r.former = append(r.former, r.file)
	r.file = next.file
	return true, nil
}

// findRuns returns what runs, sorted by name, and why run files of other users are ignored. It removes
// the files that dead processes have left in this user's folders. A process that has a run file must
// not call it.
func findRuns() (runs []runInfo, ignored []error, err error) {
	folders, ignored := runFolders()
	for _, folder := range folders {
		names, more, err := runNames(folder)
		if err != nil {
			return nil, nil, err
		}
		if more {
			ignored = append(ignored, fmt.Errorf("%s is another user's and has many files: only %d run files are looked at", folder, len(names)))
		}
		for _, name := range names {
			info, live, err := readRun(filepath.Join(folder, name))
			switch {
			case live && info.ofAnother():
				if err := info.judge(); err != nil {
					ignored = append(ignored, fmt.Errorf("%s is ignored: %v", info.path, err))
					continue
				}
				fallthrough
			case live:
				runs = append(runs, info)
			case err == nil:
				removeStale(folder, name)
			}
		}
	}
	slices.SortStableFunc(runs, func(a, b runInfo) int {
		return cmp.Or(cmp.Compare(a.Pipeline, b.Pipeline), cmp.Compare(a.Endpoint, b.Endpoint))
	})
	return runs, ignored, nil
}

// findSandbox returns the sandbox of this user's that runs the services of a pipeline. Its pid is 0 for none.
func findSandbox(pipeline string) runInfo {
	runs, _, _ := findRuns() // what cannot be read is no sandbox of ours
	for _, run := range runs {
		if run.Pipeline == pipeline+sandboxSuffix && !run.ofAnother() {
			return run
		}
	}
	return runInfo{}
}

// runNames returns the names of the run files in a folder, sorted. With more it has left some out.
func runNames(folder string) (names []string, more bool, err error) {
	dir, err := os.Open(folder)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, false, nil
	} else if err != nil {
		return nil, false, err
	}
	defer dir.Close()
	info, err := dir.Stat()
	if err != nil {
		return nil, false, err
	}
	most := 0 // all
	if ofAnother(ownerOf(info)) {
		most = maxScanned
	}
	all, err := dir.Readdirnames(most)
	if err != nil && err != io.EOF {
		return nil, false, err
	}
	names = slices.DeleteFunc(slices.Clone(all), func(name string) bool { return !strings.HasSuffix(name, runSuffix) })
	slices.Sort(names)
	if most > 0 && (len(all) == most || len(names) > maxTheirs) {
		return names[:min(len(names), maxTheirs)], true, nil
	}
	return names, false, nil
}

// ofAnother tells whether neither this user nor root has written the file.
func (i *runInfo) ofAnother() bool { return ofAnother(i.owner) }

// judge fails unless the run file of another user can be that of a service: in a folder of the same
// user, and of the process that it names, whose control plane is on this machine. Whoever reads it
// connects there with their own rights.
func (i *runInfo) judge() error {
	folder := filepath.Dir(i.path)
	stat, err := os.Stat(folder)
	if err != nil {
		return err
	}
	switch {
	case ownerOf(stat) != i.owner:
		return fmt.Errorf("it belongs to user %d, and its folder does not", i.owner)
	case i.PID <= 0 || i.holder != 0 && i.PID != i.holder:
		return fmt.Errorf("it names process %d, and process %d has its lock", i.PID, i.holder)
	case i.fileName() != filepath.Base(i.path) || i.Pipeline != "" && checkName(i.Pipeline) != nil:
		return fmt.Errorf("it is not that of pipeline %s", quote(i.Pipeline))
	case i.Endpoint == "": // it is starting
		return nil
	case strings.HasPrefix(i.Endpoint, "unix") && i.hasOperators(): // connect goes to that, and nowhere else
		return nil
	}
	return i.judgeEndpoint()
}

// hasOperators tells whether this user may use the operators' socket, which is in the folder of the run file.
func (i *runInfo) hasOperators() bool {
	return i.path != "" && syscall.Access(socketOf(i.path), 2) == nil // W_OK
}

// judgeEndpoint fails where the endpoint that a run file of another user names can be anybody's.
func (i *runInfo) judgeEndpoint() error {
	folder := filepath.Dir(i.path)
	addr, _ := netip.ParseAddrPort(strings.Replace(i.Endpoint, "localhost:", "127.0.0.1:", 1)) // other names of hosts and ports may lead anywhere
	socket, isSocket := i.socket()
	switch {
	case isSocket && socket != filepath.Join(folder, filepath.Base(socket)) && !i.besideFolder(socket), // a ".." may follow a link
		!isSocket && !isOwnAddress(net.ParseIP(addr.Addr().String())): // nil for one with a zone
		return fmt.Errorf("its endpoint %s is neither an address of this machine nor a socket in its folder", quote(i.Endpoint))
	case isSocket:
		return nil
	}
	if inode, ok := listenerInode(addr); ok && os.Geteuid() == 0 && !holdsListener(i.PID, inode) { // only root can see that
		return fmt.Errorf("it names process %d, and that is not who listens at its endpoint %s", i.PID, i.Endpoint)
	}
	return nil
}

// besideFolder tells whether socket is that of flowctl@.socket: systemd holds it beside the folder of the
// run file, in one in which no other user can put another's in its place.
func (i *runInfo) besideFolder(socket string) bool {
	folder := filepath.Dir(i.path)
	parent, err := os.Stat(filepath.Dir(folder))
	return socket == folder+socketSuffix && err == nil && !ofAnother(ownerOf(parent)) && parent.Mode().Perm()&0o022 == 0
}

// holdsListener tells whether process pid has the socket with this inode open. It looks at so many
// descriptors only: a process of another user may have any number.
func holdsListener(pid int, inode uint64) bool {
	link := fmt.Sprintf("socket:[%d]", inode)
	for fd := range maxListener {
		if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); to == link {
			return true
		}
	}
	return false
}

// socketPath returns the absolute path that address names, which is unix:PATH or unix:///PATH, and false for
// any other address. It fails for a path that the kernel does not take for a socket, and for one that gRPC's
// libraries do not dial: they read an endpoint as a URL, and some of them as a list.
func socketPath(address string) (path string, ok bool, err error) {
	given, ok := strings.CutPrefix(address, "unix:")
	if !ok {
		return "", false, nil
	}
	switch rest, isURL := strings.CutPrefix(given, "//"); {
	case strings.Trim(given, "/") == "":
		return "", true, errors.New("it must have a path: unix:PATH")
	case isURL && rest[0] != '/':
		return "", true, errors.New("the path after unix:// must begin with a slash")
	case strings.HasSuffix(given, "/"):
		return "", true, errors.New("it must be a socket's path, and what ends in a slash is a folder's")
	}
	if path, err = filepath.Abs(given); err != nil {
		return "", true, err
	}
	const most = len(syscall.RawSockaddrUnix{}.Path) - 1
	switch i := strings.IndexFunc(path, func(r rune) bool {
		return strings.ContainsRune("%?#,", r) || unicode.IsControl(r) || r == utf8.RuneError
	}); {
	case i >= 0:
		return "", true, fmt.Errorf("the path %q has %q in it: no %%, ?, #, comma or control character can be there, since gRPC's libraries read it as a URL", path, path[i:i+1])
	case len(path) > most:
		return "", true, fmt.Errorf("the path %q has %d bytes: the kernel allows %d", path, len(path), most)
	}
	return path, true, nil
}

// socket returns the path of a control plane that listens at one.
func (i *runInfo) socket() (path string, ok bool) {
	path, ok = strings.CutPrefix(i.Endpoint, "unix:")
	return strings.TrimPrefix(path, "//"), ok
}

// awaitRuns returns the runs whose control plane listens, at least one, and an error for each that is
// starting. With wait it waits, until ctx ends, for the first that listens, with all for all. warn hears
// which files are ignored.
func awaitRuns(ctx context.Context, wait, all bool, warn func(error)) (runs []runInfo, starting []error, err error) {
	for {
		found, ignored, err := findRuns()
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
			case <-time.After(runsTick):
				continue
			case <-ctx.Done():
			}
		}
		for _, err := range ignored {
			warn(err)
		}
		folders, _ := runFolders()
		switch {
		case len(found) == 0:
			return nil, nil, fmt.Errorf("no pipeline is running: there is none in %s; name a control plane with -endpoint host:port", strings.Join(folders, ", "))
		case len(runs) == 0:
			return nil, nil, errors.Join(starting...)
		}
		return runs, starting, nil
	}
}

// openEnd returns the run file of i, by which awaitEnd hears of the end of its process.
func (i *runInfo) openEnd() (*os.File, error) {
	return os.OpenFile(i.path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
}

// awaitEnd returns when the process whose run file f is has ended: then nobody holds its lock.
func awaitEnd(f *os.File) error {
	for {
		err := syscall.FcntlFlock(f.Fd(), syscall.F_SETLKW, &syscall.Flock_t{Type: syscall.F_RDLCK})
		if err != syscall.EINTR {
			return err
		}
	}
}

// readRun reads a run file and tells whether its process lives. The info of a process that
// lives says nothing while its file is not complete.
func readRun(path string) (info runInfo, live bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) // does not wait if it is a FIFO
	if err != nil {
		return runInfo{}, false, err
	}
	defer f.Close()
	stat, err := f.Stat()
	if err != nil || !stat.Mode().IsRegular() {
		return runInfo{}, false, cmp.Or(err, fmt.Errorf("%s is no regular file", path))
	}
	holder, live, err := lockHolder(f)
	if err != nil || !live {
		return runInfo{}, false, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRunFile))
	if err != nil || json.Unmarshal(data, &info) != nil {
		info = runInfo{}
	}
	info.path, info.owner, info.holder = path, ownerOf(stat), holder
	return info, true, err
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
		os.Remove(socketOf(path))
	}
}

// socketOf returns the path of the operators' socket of a run file.
func socketOf(path string) string { return strings.TrimSuffix(path, runSuffix) + socketSuffix }

// listen listens on the operators' socket, which has its name once it has the mode 0600.
func (r *runFile) listen() (net.Listener, error) {
	if r == nil {
		return nil, errors.New("there is no run file")
	}
	path := socketOf(r.path)
	folder, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	short, done, err := shortPath(folder)
	if err != nil {
		return nil, err
	}
	defer done()
	made := filepath.Join(short, fmt.Sprintf("%d%s", os.Getpid(), socketSuffix))
	if err := os.Remove(made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, cause(err)
	}
	lis.SetUnlinkOnClose(false) // release removes it
	err = os.Chmod(made, 0o600)
	if err == nil {
		err = os.Rename(made, path)
	}
	if err != nil {
		lis.Close()
		return nil, err
	}
	return lis, nil
}

// dialSocket connects to the socket at path. What is there but a socket, such as a link to another
// one, is refused.
func dialSocket(ctx context.Context, path string) (net.Conn, error) {
	short, done, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	return new(net.Dialer).DialContext(ctx, "unix", short)
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

// lockFile locks f for writing: with F_SETLK at once or not at all, with F_SETLKW it waits.
func lockFile(f *os.File, command int) error {
	for {
		err := syscall.FcntlFlock(f.Fd(), command, &syscall.Flock_t{Type: syscall.F_WRLCK})
		if err != syscall.EINTR {
			return err
		}
	}
}

// lockHolder returns the process that holds the lock of f, 0 where it is in a pid namespace that is
// not seen here.
func lockHolder(f *os.File) (pid int, locked bool, err error) {
	ask := syscall.Flock_t{Type: syscall.F_RDLCK} // a lock for reading would have to wait for one for writing
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &ask); err != nil {
		return 0, false, fmt.Errorf("cannot see whether %s is locked: %v", f.Name(), err)
	}
	return int(ask.Pid), ask.Type != syscall.F_UNLCK, nil
}

// fileName returns the name of the run file, a valid one for any name of a pipeline.
func (i runInfo) fileName() string {
	name := "pipeline-" + url.PathEscape(i.Pipeline)
	if i.Pipeline == "" {
		name = "server-" + url.PathEscape(i.Endpoint)
	}
	if len(name) > maxRunName {
		hash := sha256.Sum256([]byte(name))
		name = fmt.Sprintf("%s-%x", name[:maxRunName-33], hash[:16])
	}
	return name + runSuffix
}

// runFolder is where this process keeps its run file.
func runFolder() string {
	if folder := unitRuns(); folder != "" {
		return folder
	}
	if folder := os.Getenv("XDG_RUNTIME_DIR"); owned(folder) { // not owned after su(1)
		return filepath.Join(folder, "flowctl")
	}
	shared := sharedRuns()
	if _, err := os.Stat(shared); os.Geteuid() == 0 && (owned(shared) || errors.Is(err, fs.ErrNotExist)) {
		return shared
	}
	if folder := userRuns(); folder != "" {
		return folder
	}
	return temporaryRuns()
}

// runFolders are where runs of this user may be, and services that all users may see. ignored says
// which are left out.
func runFolders() (folders []string, ignored []error) {
	add := func(more ...string) {
		for _, folder := range more {
			if folder != "" && !slices.Contains(folders, folder) {
				folders = append(folders, folder)
			}
		}
	}
	shared := sharedRuns()
	add(runFolder(), userRuns(), shared)
	if checkPrivate(temporaryRuns()) == nil {
		add(temporaryRuns())
	}
	for _, of := range []struct{ parent, prefix string }{
		{filepath.Dir(shared), filepath.Base(shared) + "-"}, // of an instance of flowctl@.service, and of a copy of flowctl.service
		{filepath.Dir(shared), filepath.Base(shared) + "@"}, // of an instance of such a copy
		{shared, ""}, // of an operator
	} {
		more, err := foldersIn(of.parent, of.prefix)
		add(more...)
		if err != nil {
			ignored = append(ignored, err)
		}
	}
	return folders, ignored
}

// foldersIn returns the folders in parent whose names begin with prefix. A link counts where root has made
// it, as systemd does for DynamicUser=. It fails where another user has made so many that some are left out.
func foldersIn(parent, prefix string) (folders []string, err error) {
	dir, err := os.Open(parent)
	if err != nil {
		return nil, nil // there are none
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(maxScanned)
	slices.Sort(names)
	for _, name := range names {
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		path := filepath.Join(parent, name)
		info, err := os.Lstat(path)
		if err == nil && info.Mode()&fs.ModeSymlink != 0 && ownerOf(info) == 0 {
			info, err = os.Stat(path)
		}
		if err == nil && info.IsDir() {
			folders = append(folders, path)
		}
	}
	if info, err := dir.Stat(); err == nil && ofAnother(ownerOf(info)) && len(folders) > maxFolders {
		return folders[:maxFolders], fmt.Errorf("%s is another user's and has many folders: only %d are looked at", parent, maxFolders)
	}
	return folders, nil
}

// unitRuns is the folder that systemd has made for this service, "" for none.
func unitRuns() string {
	folder, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":")
	if folder == "" {
		return ""
	}
	return filepath.Clean(folder)
}

// userRuns is the folder of a user who is logged in, or was: cron does not say where it is. It is ""
// for none.
func userRuns() string {
	for _, base := range []string{os.Getenv("XDG_RUNTIME_DIR"), fmt.Sprintf("/run/user/%d", os.Geteuid())} {
		if owned(base) { // not owned after su(1)
			return filepath.Join(base, "flowctl")
		}
	}
	return ""
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

// checkPrivate fails for a folder that is not this user's alone: in /tmp anyone can make one.
func checkPrivate(folder string) error {
	info, err := os.Lstat(folder)
	if err != nil {
		return err
	}
	if !info.IsDir() || ownerOf(info) != uint32(os.Geteuid()) || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not a folder of this user alone: its owner must be %d and its mode 0700, not %s", folder, os.Geteuid(), info.Mode())
	}
	return nil
}

// owned tells whether this user owns a folder.
func owned(folder string) bool {
	info, err := os.Stat(folder)
	return err == nil && info.IsDir() && ownerOf(info) == uint32(os.Geteuid())
}
