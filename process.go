package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// emitter takes whole lines of a component: each ends with a newline. It must not
// keep them. It is called from the pumps, one call at a time per stream.
type emitter func(id, stream string, lines []byte)

// runMark is the variable by which the guard, and flowctl itself, know the processes
// of a run wherever they have gone. Its value is the run's; that of a flowctl which is
// itself a component begins with the outer one's and a slash.
const runMark = "FLOWCTL_RUN"

// child is one process and the group that it leads. Its pumps and its reaper run
// beside the supervisor; what they share is named below.
type child struct {
	cmd       *exec.Cmd
	container *container // nil for none
	reaper    *reaper
	guard     *guard
	cgroup    *cgroup
	pidfd     int // -1 for none; Linux
	pid       int
	outputs   []*os.File    // read ends of its output
	drained   chan struct{} // closed when no output will come any more
	expired   chan struct{} // closed when what is left of the group gets SIGKILL
	pumping   atomic.Int32  // pumps that still run
	tail      tail

	healthPort string // HEALTH_PORT of its component

	mu     sync.Mutex // guards the fields below
	asked  bool       // a signal to stop was sent
	killed bool
	reaped bool // nothing is left of the group, so its id may be someone else's now
}

func (c *child) closeOutputs() {
	for _, r := range c.outputs {
		r.Close()
	}
}

// signal sends sig, a request to end, to the group, and SIGCONT, because a process
// that was stopped hears of no other.
func (c *child) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = true
	switch {
	case c.reaped:
	case c.container != nil:
		c.container.signal(sig)
	default:
		_ = syscall.Kill(-c.pid, sig) // fails only for a group that is already gone
		_ = syscall.Kill(-c.pid, syscall.SIGCONT)
	}
}

// kill sends SIGKILL to the group.
func (c *child) kill() {
	c.signal(syscall.SIGKILL)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.killed {
		c.killed = true
		close(c.expired)
	}
}

// reap waits for the process and returns how it ended, once: then the group is
// gone and its output has been handed on, or is lost because nobody has taken it
// when SIGKILL is due. A process that ended unasked leaves a group that nobody wants.
// One that was asked to end may have members that still write their last lines, so
// they get the time until SIGKILL is due.
func (c *child) reap() (state *os.ProcessState, lost bool, left error) {
	left = c.awaitEnd()
	c.mu.Lock()
	if !c.asked {
		_ = syscall.Kill(-c.pid, syscall.SIGKILL)
	}
	_ = c.reaper.wait(c.cmd) // how it ended is in ProcessState
	c.reaped = c.groupIsEmpty()
	empty := c.reaped
	c.mu.Unlock()
	if !empty {
		c.awaitGroup()
		c.mu.Lock()
		c.reaped = true
		c.mu.Unlock()
	}
	c.guard.leave(c.pid)

	// A process that left the group may hold the pipes open: what is in them now is
	// all that was written before the end, and nothing more is waited for.
	for _, r := range c.outputs {
		_ = r.SetReadDeadline(time.Unix(1, 0))
	}
	select {
	case <-c.drained:
	case <-c.expired: // maybe a moment ago, by the SIGKILL that made this end
		timer := time.NewTimer(outputGrace)
		defer timer.Stop()
		select {
		case <-c.drained:
		case <-timer.C:
			lost = true
		}
	}
	return c.cmd.ProcessState, lost, left
}

// isReaped tells whether nothing is left of the group.
func (c *child) isReaped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reaped
}

// pump hands on what comes from r in whole lines until it ends, or, after reap has
// set a deadline, until nothing is left in the pipe, and that is written.
func (c *child) pump(id, stream string, r *os.File, emit emitter, flush func()) {
	defer func() {
		r.Close()
		if flush != nil {
			flush()
		}
		if c.pumping.Add(-1) == 0 {
			close(c.drained)
		}
	}()
	pass := func(lines []byte) {
		c.tail.add(lines)
		emit(id, stream, lines)
	}
	read := r.Read
	buf := make([]byte, 0, minBuffer)
	for {
		room := min(cap(buf), max(len(buf), maxLine)+1) - len(buf) // no more of a line than tells whether it is too long
		n, err := read(buf[len(buf) : len(buf)+room])
		buf = passLines(buf[:len(buf)+n], pass)
		if n == room && cap(buf) < pipeSize {
			buf = slices.Grow(buf, pipeSize-len(buf))
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			read = leftover(r)
		case err != nil:
			if len(buf) > 0 {
				pass(append(buf, '\n'))
			}
			return
		}
	}
}

// spawn starts c as the leader of a process group of its own, its output read by
// pumps that hand it on.
func (s *supervisor) spawn(c *Component) (*child, error) {
	cmd, box, err := s.command(c)
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ch := &child{cmd: cmd, container: box, healthPort: s.ports[c.ID].number, reaper: s.reaper, guard: s.guard, cgroup: s.cgroup, drained: make(chan struct{}), expired: make(chan struct{})}
	ch.cgroup.hold(cmd.SysProcAttr)
	ch.usePidfd()
	var theirs []*os.File
	defer func() {
		for _, w := range theirs {
			w.Close()
		}
	}()
	for range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			ch.closeOutputs()
			return nil, describeStart(cmd, err)
		}
		ch.outputs, theirs = append(ch.outputs, r), append(theirs, w)
	}
	cmd.Stdout, cmd.Stderr = theirs[0], theirs[1]
	if err := s.leaders.start(c.ID, s.reaper, cmd); err != nil {
		ch.closeOutputs()
		return nil, describeStart(cmd, err)
	}
	ch.pid = cmd.Process.Pid
	s.guard.lead(ch.pid)
	ch.pumping.Store(2)
	go ch.pump(c.ID, "stdout", ch.outputs[0], s.emit, s.settings.flush)
	go ch.pump(c.ID, "stderr", ch.outputs[1], s.emit, s.settings.flush)
	return ch, nil
}

// command is what runs c: its program, or the engine's command line, of which box is
// the container.
func (s *supervisor) command(c *Component) (cmd *exec.Cmd, box *container, err error) {
	given, err := s.given(c)
	if err != nil {
		return nil, nil, err
	}
	if c.Image != "" {
		s.boxed++
		cmd, box = s.settings.engine.container(c, given, s.boxed)
		return cmd, box, nil
	}
	cmd = exec.Command(c.Command[0], slices.Concat(c.Command[1:], c.Args)...)
	cmd.Dir = c.WorkingDir
	cmd.Env = slices.Concat(slices.DeleteFunc(os.Environ(), hidden), []string{"PWD=" + c.WorkingDir}, given)
	return cmd, nil, nil
}

// describeStart says what keeps cmd from being started.
func describeStart(cmd *exec.Cmd, err error) error {
	dir, dirErr := os.Stat(cmp.Or(cmd.Dir, "."))
	if dirErr == nil && !dir.IsDir() {
		dirErr = syscall.ENOTDIR
	}
	if dirErr != nil {
		return fmt.Errorf("cannot enter its working_dir %q: %v", cmd.Dir, cause(dirErr))
	}
	if err := syscall.Access(cmp.Or(cmd.Dir, "."), 1); err != nil { // X_OK
		return fmt.Errorf("cannot enter its working_dir %q: %v", cmd.Dir, err)
	}
	return describeProgram(cmd.Args[0], cmd.Dir, err)
}

// describeProgram says what is wrong with a program that is to run in the folder dir.
func describeProgram(program, dir string, err error) error {
	file, fileErr := os.Stat(program)
	why := cause(err).Error()
	switch err := cause(err); {
	case errors.Is(err, exec.ErrNotFound):
		why = "it is not found in PATH"
		if _, err := os.Stat(filepath.Join(dir, program)); err == nil {
			why += fmt.Sprintf("; the file in its folder is %q", "./"+program)
		}
	case errors.Is(err, fs.ErrNotExist) && fileErr == nil:
		if why = "the interpreter that it names, or its loader, does not exist"; scriptFault(program) == crlfLine {
			why = crlfLine
		}
	case errors.Is(err, fs.ErrPermission) && fileErr == nil && file.IsDir():
		why = "it is a folder"
	case errors.Is(err, fs.ErrPermission) && fileErr == nil && file.Mode()&0o111 != 0:
		why = "permission denied, to it or to the interpreter that it names"
	case errors.Is(err, fs.ErrPermission) && fileErr == nil:
		why = "it is not executable (chmod +x)"
	case errors.Is(err, syscall.EAGAIN):
		why = "the limit of processes is reached (ulimit -u, or TasksMax= of a unit)"
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		why = "the limit of open files is reached (ulimit -n, or LimitNOFILE= of a unit)"
	case errors.Is(err, syscall.ENOEXEC):
		why = noProgram
	}
	return fmt.Errorf("cannot run %q: %s", program, why)
}

// awaitExit returns when the process pid, a child, has ended, and leaves it a
// zombie. It holds a thread.
func awaitExit(pid int) {
	const idTypePID = 1 // P_PID of waitid(2)
	var info [128]byte  // siginfo_t, which the kernel insists on
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, idTypePID, uintptr(pid), uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if err != syscall.EINTR {
			return
		}
	}
}

// passLines passes the whole lines of buf, or the first maxLine bytes of one that
// is longer, and returns the rest with room to read more. A CR that comes next may be
// of the end of the line, which the byte after it shows.
func passLines(buf []byte, pass func([]byte)) []byte {
	if i := bytes.LastIndexByte(buf, '\n'); i >= 0 {
		pass(buf[:i+1])
		buf = buf[:copy(buf, buf[i+1:])]
	}
	switch {
	case len(buf) > maxLine && (len(buf) > maxLine+1 || buf[maxLine] != '\r'):
		n := maxLine
		if buf[n-1] == '\r' { // which would be taken for the end of a line
			n--
		}
		pass(append(slices.Clip(buf[:n]), '\n'))
		buf = buf[:copy(buf, buf[n:])]
	case len(buf) == cap(buf):
		grown := make([]byte, len(buf), min(2*cap(buf), maxLine+2))
		copy(grown, buf)
		buf = grown
	}
	return buf
}

// leftover reads what a pipe holds and ends where a reader would have to wait. It
// reads no more than a pipe can hold, so that a writer that lives on cannot keep it.
func leftover(r *os.File) func([]byte) (int, error) {
	_ = r.SetReadDeadline(time.Time{})
	left := 16 << 20 // pipe(7): a pipe holds 1 MiB at most, unless root has enlarged it
	return func(p []byte) (n int, err error) {
		raw, err := r.SyscallConn()
		if err != nil || left <= 0 {
			return 0, io.EOF
		}
		rawErr := raw.Read(func(fd uintptr) bool {
			n, err = syscall.Read(int(fd), p)
			return true
		})
		if rawErr != nil || err != nil || n <= 0 {
			return 0, io.EOF
		}
		left -= n
		return n, nil
	}
}

// tail keeps the end of what a process printed.
type tail struct {
	mu  sync.Mutex
	buf []byte
	cut bool // something came before
}

func (t *tail) add(lines []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(lines); n > tailSize {
		lines, t.cut, t.buf = lines[n-tailSize:], true, t.buf[:0]
	}
	if over := len(t.buf) + len(lines) - tailSize; over > 0 {
		t.buf, t.cut = t.buf[:copy(t.buf, t.buf[over:])], true
	}
	t.buf = append(t.buf, lines...)
}

// Write is add, for the output of a command.
func (t *tail) Write(p []byte) (int, error) {
	t.add(p)
	return len(p), nil
}

// lines returns the last lines, ten at most.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSuffix(string(t.buf), "\n"), "\n")
	if len(t.buf) == 0 {
		return nil
	}
	if t.cut && len(lines) > 1 {
		lines = lines[1:]
	}
	return lines[max(0, len(lines)-10):]
}

// describeExit says how a process ended.
func describeExit(state *os.ProcessState) string {
	status, ok := state.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		return fmt.Sprintf("exit status %d", state.ExitCode())
	}
	text := fmt.Sprintf("killed by signal %d (%s)", status.Signal(), status.Signal())
	if status.CoreDump() {
		text += ", core dumped"
	}
	return text
}

// reservedPort holds a port until the component that is to listen on it starts.
type reservedPort struct {
	number string
	hold   net.Listener // nil when released, or when the file names the port
}

// reservePort takes the port that the file gives c as HEALTH_PORT, else a free one.
func reservePort(c *Component) (*reservedPort, error) {
	if number := fileEnv(c, "HEALTH_PORT"); number != "" {
		return &reservedPort{number: number}, nil
	}
	hold, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("cannot find a free port for its HEALTH_PORT: %v", err)
	}
	return &reservedPort{number: strconv.Itoa(hold.Addr().(*net.TCPAddr).Port), hold: hold}, nil
}

func (p *reservedPort) release() {
	if p.hold != nil {
		p.hold.Close()
		p.hold = nil
	}
}

func (s *supervisor) releasePorts() {
	for _, port := range s.ports {
		port.release()
	}
}

// fileEnv is what the file itself sets name to.
func fileEnv(c *Component, name string) string {
	if v, ok := c.Env[name]; ok {
		return v
	}
	return c.configEnv()[name]
}

// given is the environment that c is given: what flowctl gives, then what the file
// gives, and last what the file cannot change. It fails where a file of env_files
// cannot be read. To this a process has flowctl's own, and a container its image's.
func (s *supervisor) given(c *Component) ([]string, error) {
	var env []string
	set := func(name, value string) { env = append(env, name+"="+value) }
	port := s.ports[c.ID].number
	set("COMPONENT_ID", c.ID)
	set("SERVICE_ID", c.ID)
	set("HEALTH_PORT", port)
	set("HEALTH_ENDPOINT", "http://"+net.JoinHostPort("localhost", port)+"/health")
	set("FLOWCTL_HEARTBEAT_INTERVAL", strconv.FormatInt(s.settings.heartbeat.Milliseconds(), 10)+"ms")
	for name, value := range c.configEnv() {
		set(name, value)
	}
	for name, value := range c.Env {
		set(name, value)
	}
	for name, path := range c.EnvFiles {
		value, err := readEnvFile(path)
		if err != nil {
			return nil, fmt.Errorf("env_files.%s: %v", name, err)
		}
		set(name, value)
	}
	set("ENABLE_FLOWCTL", "true")
	set("FLOWCTL_ENABLED", "true")
	set("FLOWCTL_ENDPOINT", s.settings.endpoint)
	if c.TLS {
		env = append(env, s.settings.tlsEnv...)
	}
	if len(c.Ports) > 0 {
		set("FLOWCTL_ENDPOINT", cmp.Or(s.settings.gateway, s.settings.endpoint))
	}
	set("FLOWCTL_COMPONENT_ID", c.ID)
	set("FLOWCTL_SERVICE_ID", c.ID)
	set(runMark, s.run)
	return env, nil
}

// hidden tells whether a variable is a word to flowctl alone: systemd's, as a child
// that heard it would speak for flowctl (sd_notify(3), sd_listen_fds(3)), or that of
// an outer flowctl, whose files of TLS are not this one's.
func hidden(entry string) bool {
	name, _, _ := strings.Cut(entry, "=")
	return name == "NOTIFY_SOCKET" || name == "JOURNAL_STREAM" || strings.HasPrefix(name, "WATCHDOG_") || strings.HasPrefix(name, "LISTEN_") || strings.HasPrefix(name, "FLOWCTL_TLS_")
}

// readEnvFile returns the content of a file as the value of a variable, without the
// newline that editors put at its end. What could keep flowctl waiting, as a FIFO does,
// is an error.
func readEnvFile(path string) (string, error) {
	const most = 128 << 10                                         // execve(2): MAX_ARG_STRLEN
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // to open a FIFO would wait for a writer
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() && !info.IsDir() && path != os.DevNull { // to read a folder is an error
		return "", fmt.Errorf("%s is no plain file, and could keep flowctl waiting", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return "", err
	}
	if len(data) > most {
		return "", fmt.Errorf("%s is larger than %d bytes, the most that a variable can hold", path, most)
	}
	if bytes.IndexByte(data, 0) >= 0 {
		return "", fmt.Errorf("%s holds a NUL byte, which no variable can", path)
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r"), nil
}

// reserveThreads makes the runtime start threads before the components can use up
// what the system allows: one that it cannot start later is the end of flowctl, and
// not an error that could be told.
func reserveThreads() {
	const spare = 8
	var ready, done sync.WaitGroup
	ready.Add(spare)
	for range spare {
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			ready.Wait() // each holds its thread until all have one
		})
	}
	done.Wait()
}

// What is wrong with scripts that look right.
const (
	noProgram = "it is no program of this machine, and has no #! line"
	crlfLine  = `its #! line ends in CRLF, of which the CR counts; remove it from every line: sed -i 's/\r$//'`
)

// scriptFault says what keeps a program from being run although it is executable, ""
// for nothing: its #! line (execve(2)), or that it is a text without one.
func scriptFault(program string) string {
	f, err := os.Open(program)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head) // a shorter file is as good
	line, ok := strings.CutPrefix(string(head[:n]), "#!")
	if !ok && !strings.Contains(line, "\x00") {
		return noProgram
	}
	line, _, _ = strings.Cut(line, "\n")
	words := strings.Fields(line)
	if !ok || len(words) == 0 {
		return ""
	}
	if strings.HasSuffix(line, "\r") {
		return crlfLine
	}
	if _, err := os.Stat(words[0]); err != nil {
		return fmt.Sprintf("the interpreter that it names, %q, does not exist", words[0])
	}
	return ""
}

// leaders are the processes that supervisor has started and that lead a group now, and
// the command after --, for who asks from elsewhere which component a process is of.
type leaders struct {
	mu    sync.RWMutex // guards byPID; held over each start, so that no process can ask before it is known
	byPID map[int]string
}

// start starts cmd, a leader of component id or the command itself.
func (l *leaders) start(id string, r *reaper, cmd *exec.Cmd) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := r.start(cmd)
	if err == nil {
		l.byPID[cmd.Process.Pid] = id
	}
	return err
}

func (l *leaders) ended(pid int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.byPID, pid)
}

// now returns a copy.
func (l *leaders) now() map[int]string {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return maps.Clone(l.byPID)
}

// run runs a command beside the child: in its environment, folder and control group, or in
// its container. The command leads a process group of its own, which is killed when ctx
// ends, and of which nothing is left when run returns. lines are the last that it printed.
func (c *child) run(ctx context.Context, argv []string) (state *os.ProcessState, lines []string, err error) {
	argv = c.container.inside(argv)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env, cmd.Dir = c.cmd.Env, c.cmd.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.cgroup.hold(cmd.SysProcAttr)
	var printed tail
	cmd.Stdout, cmd.Stderr = &printed, &printed
	cmd.WaitDelay = outputGrace // where what has left the group holds its output
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := c.reaper.start(cmd); err != nil {
		return nil, nil, fmt.Errorf("cannot run %q: %v", argv[0], cause(err))
	}
	c.guard.lead(cmd.Process.Pid)
	awaitExit(cmd.Process.Pid)
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	_ = c.reaper.wait(cmd) // how it ended is in its state
	c.guard.leave(cmd.Process.Pid)
	return cmd.ProcessState, printed.lines(), nil
}
