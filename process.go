package main

// How the process of a component is started and seen to its end: its environment, port,
// process group, signals and output. process_linux.go has what only Linux can do: the
// reaper, the control group and the guard.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
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
)

const (
	sweepGrace   = time.Second             // from SIGTERM to SIGKILL for what has left its component when the run ends
	outputGrace  = 1500 * time.Millisecond // for the output of a process that got SIGKILL to be taken
	killPatience = 5 * time.Second         // from SIGKILL until flowctl no longer waits: only a process stuck in the kernel lives that long

	minBuffer = 16 << 10 // bytes of an output pump; it grows while a line does not fit
	pipeSize  = 64 << 10 // bytes that a pipe holds, pipe(7): the pump of one that is found full grows to it
	tailSize  = 4 << 10  // bytes of a component's last output that are kept for a report
)

// runMark is the variable by which flowctl and its guard recognise the processes of a
// run. Its value is the run's; that of a flowctl which is itself a component begins with
// the outer one's and a slash.
const runMark = "FLOWCTL_RUN"

// emitter takes whole lines that a component has printed: each ends with a newline. It must
// not keep the bytes. The pumps call it, one call at a time per stream.
type emitter func(id, stream string, lines []byte)

// launchConfig is what the processes of a run have in common.
type launchConfig struct {
	endpoint          string        // FLOWCTL_ENDPOINT of components without "tls": true
	tlsEndpoint       string        // FLOWCTL_ENDPOINT of components with "tls": true
	containerEndpoint string        // FLOWCTL_ENDPOINT of containers that are not on the host's network; "" where they cannot reach the plane
	tlsEnv            []string      // of components with "tls": true, FLOWCTL_ENDPOINT included
	heartbeat         time.Duration // FLOWCTL_HEARTBEAT_INTERVAL
	engine            *engine       // of components with an image, nil for none
	reaper            *reaper
	emit              emitter
	flush             func() // returns when what was emitted has been written; nil where emit returns no sooner
	log               *slog.Logger
}

// launcher starts the processes of a run: components, their health checks, and the
// command after --. One goroutine, the loop of the run, calls its methods; leaders,
// descendants and the methods of a child may be called from any.
type launcher struct {
	config launchConfig
	mark   string        // the value of runMark
	exits  chan childEnd // gets the end of each component's process, once
	closed chan struct{}
	cgroup *cgroup // nil for none
	guard  *guard

	ports           map[string]*reservedPort // by component
	containerStarts int                      // numbers the containers of the run
}

// childEnd is how a component's process has ended, when nothing is left of its group and
// its output has been passed on.
type childEnd struct {
	child        *child
	status       syscall.WaitStatus
	lost         bool  // nobody took the rest of its output
	containerErr error // why its container may still be there
}

// newLauncher returns a launcher with its guard. The caller calls close when no component
// runs any more.
func newLauncher(config launchConfig) (*launcher, error) {
	l := &launcher{
		config: config, mark: strings.TrimPrefix(os.Getenv(runMark)+"/"+rand.Text(), "/"),
		exits: make(chan childEnd), closed: make(chan struct{}), ports: make(map[string]*reservedPort),
	}
	reserveThreads()
	l.cgroup = makeCgroup(l.mark)
	enginePath := ""
	if config.engine != nil {
		config.engine.run, config.engine.env = l.mark, append(baseEnv(), runMark+"="+l.mark)
		enginePath = config.engine.path
	}
	var err error
	if l.guard, err = startGuard(l.mark, l.cgroup.path(), enginePath, config.reaper, config.log); err != nil {
		l.cgroup.remove()
		return nil, fmt.Errorf("cannot start the guard, which ends the components of a flowctl that is killed: %v", err)
	}
	return l, nil
}

// close ends what components have left behind, and the guard. Of the launcher's goroutines
// only those go on that wait for a process which SIGKILL has not ended.
func (l *launcher) close() {
	l.sweep(sweepGrace)
	if l.containerStarts > 0 {
		l.removeContainers()
	}
	l.guard.dismiss()
	l.cgroup.remove()
	for _, port := range l.ports {
		port.release()
	}
	close(l.closed)
}

// removeContainers removes containers of the run that are still there: an engine may have
// made one after its command line was killed.
func (l *launcher) removeContainers() {
	names, err := l.config.engine.remove(context.Background(), "label="+labelRun+"="+l.mark)
	if len(names) > 0 {
		l.config.log.Warn("removed containers whose command line was killed", "containers", enumerate(names))
	}
	if err != nil {
		l.config.log.Error("containers may be left", "err", err)
	}
}

// reserveThreads has the runtime start threads before components can use up what the system
// allows: one that it cannot start later is the end of flowctl, not an error that could be
// told.
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

// leaders returns the component that each process belongs to which the launcher has started
// and which has not ended, by pid.
func (l *launcher) leaders() map[int]string { return l.config.reaper.leaders() }

// start starts the process of c as the leader of a process group of its own. Its output
// goes to emit, its end to exits.
func (l *launcher) start(c *Component) (*child, error) {
	port, err := l.healthPort(c)
	if err != nil {
		return nil, err
	}
	cmd, ctr, err := l.command(c, port)
	if err != nil {
		return nil, err
	}
	l.ports[c.ID].release()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	l.cgroup.hold(cmd.SysProcAttr)
	ch := &child{
		component: c, healthPort: port, launcher: l, cmd: cmd, container: ctr, signals: make(chan syscall.Signal, 1),
		drained: make(chan struct{}), expired: make(chan struct{}),
	}
	if err := l.startPiped(ch); err != nil {
		return nil, describeStart(cmd, err)
	}
	ch.pid = cmd.Process.Pid
	ch.pumping.Store(2)
	go ch.pump(c.ID, "stdout", ch.outputs[0], l.config.emit, l.config.flush)
	go ch.pump(c.ID, "stderr", ch.outputs[1], l.config.emit, l.config.flush)
	go func() {
		end := ch.reap()
		select {
		case l.exits <- end:
		case <-l.closed:
		}
	}()
	return ch, nil
}

// startPiped starts the command of ch with its output in pipes, and for a container its
// standard input as well.
func (l *launcher) startPiped(ch *child) (err error) {
	var theirs []*os.File
	defer func() {
		for _, w := range theirs {
			w.Close()
		}
		if err != nil {
			for _, r := range ch.outputs {
				r.Close()
			}
		}
	}()
	for range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		ch.outputs, theirs = append(ch.outputs, r), append(theirs, w)
	}
	ch.cmd.Stdout, ch.cmd.Stderr = theirs[0], theirs[1]
	if ch.container != nil {
		if ch.stdin, err = ch.cmd.StdinPipe(); err != nil {
			return err
		}
	}
	return l.startLeader(ch.cmd, ch.component.ID)
}

// signal sends sig to the process group of ch, or to its container. It never waits.
func (l *launcher) signal(ch *child, sig syscall.Signal) {
	if sig == syscall.SIGKILL {
		ch.kill()
	} else {
		ch.signal(sig)
	}
}

// startCommand starts the command after --, which leaders has under id, with the
// environment of commandEnv. ended gets its end, once.
func (l *launcher) startCommand(id string, cmd *exec.Cmd) (ended <-chan syscall.WaitStatus, err error) {
	cmd.Env = l.commandEnv()
	if err := l.startLeader(cmd, id); err != nil {
		return nil, err
	}
	statuses := make(chan syscall.WaitStatus, 1)
	go func() {
		_ = cmd.Wait() // how it ended is in its state
		l.leaderEnded(cmd.Process.Pid)
		statuses <- waitStatus(cmd)
	}()
	return statuses, nil
}

// startLeader starts cmd, a process of component id, and tells the guard of it.
func (l *launcher) startLeader(cmd *exec.Cmd, id string) error {
	if err := l.config.reaper.startLeader(cmd, id); err != nil {
		return err
	}
	l.guard.groupStarted(cmd.Process.Pid)
	return nil
}

// leaderEnded notes that nothing is left of the group of pid, which was waited for.
func (l *launcher) leaderEnded(pid int) {
	l.config.reaper.leaderEnded(pid)
	l.guard.groupEnded(pid)
}

// command returns the command that runs c: its program, or the command line of the engine,
// and then its container.
func (l *launcher) command(c *Component, port string) (cmd *exec.Cmd, ctr *container, err error) {
	env, err := l.componentEnv(c, port)
	if err != nil {
		return nil, nil, err
	}
	if c.Image != "" {
		l.containerStarts++
		cmd, ctr = l.config.engine.container(c, env, l.containerStarts)
		return cmd, ctr, nil
	}
	cmd = exec.Command(c.Command[0], slices.Concat(c.Command[1:], c.Args)...)
	cmd.Dir = c.WorkingDir
	// JOURNAL_STREAM tells of flowctl's standard error, which is not that of the component.
	base := slices.DeleteFunc(baseEnv(), func(entry string) bool { return strings.HasPrefix(entry, "JOURNAL_STREAM=") })
	cmd.Env = slices.Concat(base, []string{"PWD=" + c.WorkingDir}, env)
	return cmd, nil, nil
}

// componentEnv returns the variables that c is given, of which the last of a name counts:
// flowctl's, then those of the file, then those that the file cannot change. A process has
// baseEnv besides, and a container the environment of its image. It fails where a file of
// env_files cannot be read.
func (l *launcher) componentEnv(c *Component, port string) ([]string, error) {
	var env []string
	set := func(name, value string) { env = append(env, name+"="+value) }
	set("COMPONENT_ID", c.ID)
	set("SERVICE_ID", c.ID)
	set("HEALTH_PORT", port)
	set("HEALTH_ENDPOINT", "http://"+net.JoinHostPort("localhost", port)+"/health")
	set("FLOWCTL_HEARTBEAT_INTERVAL", strconv.FormatInt(l.config.heartbeat.Milliseconds(), 10)+"ms")
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
	if c.TLS {
		env = append(env, l.config.tlsEnv...)
	}
	set("FLOWCTL_ENDPOINT", l.config.endpointOf(c))
	set("FLOWCTL_COMPONENT_ID", c.ID)
	set("FLOWCTL_SERVICE_ID", c.ID)
	set(runMark, l.mark)
	return env, nil
}

// endpointOf returns the FLOWCTL_ENDPOINT that c is given.
func (c *launchConfig) endpointOf(comp *Component) string {
	switch {
	case len(comp.Ports) > 0:
		return cmp.Or(c.containerEndpoint, c.endpoint)
	case comp.TLS:
		return c.tlsEndpoint
	}
	return c.endpoint
}

// commandEnv returns the environment of the command after --.
func (l *launcher) commandEnv() []string {
	endpoint := "FLOWCTL_ENDPOINT=" + l.config.endpoint
	env := append(baseEnv(), endpoint, runMark+"="+l.mark)
	if slices.Contains(l.config.tlsEnv, endpoint) { // else the endpoint has no TLS
		env = append(env, l.config.tlsEnv...)
	}
	return env
}

// ownVars are never passed on. They are what systemd tells a service, with which a child
// would speak for flowctl (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)), and what
// an outer flowctl has told this one as its component.
var ownVars = []string{
	"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID",
	"ENABLE_FLOWCTL", "FLOWCTL_ENABLED", "FLOWCTL_ENDPOINT", "FLOWCTL_COMPONENT_ID", "FLOWCTL_SERVICE_ID", "FLOWCTL_HEARTBEAT_INTERVAL",
	"FLOWCTL_TLS_CA", "FLOWCTL_TLS_CERT", "FLOWCTL_TLS_KEY", runMark,
}

// componentVars are what flowctl tells its components under names that can also be a user's
// own: only where flowctl is a component itself they are not passed on.
var componentVars = []string{"COMPONENT_ID", "SERVICE_ID", "HEALTH_PORT", "HEALTH_ENDPOINT"}

// baseEnv returns what flowctl passes on of its own environment: to components, to the
// command after --, to the engine and to the guard.
func baseEnv() []string {
	isComponent := os.Getenv(runMark) != ""
	return slices.DeleteFunc(os.Environ(), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.Contains(ownVars, name) || isComponent && slices.Contains(componentVars, name)
	})
}

// fileEnv returns what the file sets name to for c, "" for nothing.
func fileEnv(c *Component, name string) string {
	if v, ok := c.Env[name]; ok {
		return v
	}
	return c.configEnv()[name]
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

// checkReach fails for components of p that could not register: a container with ports has a
// network of its own, and the control plane cannot be reached from there on its loopback.
func (c *launchConfig) checkReach(p *Pipeline) error {
	var ids []string
	for _, comp := range p.components() {
		loopback := !comp.TLS && len(c.tlsEnv) > 0 // its listener is there alone
		if len(comp.Ports) > 0 && comp.registers() && (loopback || c.containerEndpoint == "") {
			ids = append(ids, comp.ID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	advice := "-control-plane-address 0.0.0.0"
	if len(c.tlsEnv) > 0 {
		advice += ` and "tls": true`
	}
	return fmt.Errorf(`%s: ports take a container off the host's network, from where it cannot register at %s: leave out ports, or set "register": false, or give %s`, enumerate(ids), c.endpoint, advice)
}

// reservedPort is a port for one component alone.
type reservedPort struct {
	number string
	hold   *os.File // a socket that is bound to it until its component starts, then nil
}

// healthPort returns the HEALTH_PORT of c: that of the file, else one that is reserved for
// its id at the first call and stays the same.
func (l *launcher) healthPort(c *Component) (string, error) {
	if number := fileEnv(c, "HEALTH_PORT"); number != "" {
		return number, nil
	}
	if port := l.ports[c.ID]; port != nil {
		return port.number, nil
	}
	taken := make(map[string]bool) // the kernel takes those that were released for free until their components listen
	for _, port := range l.ports {
		taken[port.number] = true
	}
	for {
		port, err := bindPort()
		if err != nil {
			return "", fmt.Errorf("cannot find a free port for its HEALTH_PORT: %w", err)
		}
		if !taken[port.number] {
			l.ports[c.ID] = port
			return port.number, nil
		}
		defer port.release() // held until then, so that the next is another
	}
}

// forget gives up the port of a component that the file does not have any more.
func (l *launcher) forget(id string) {
	l.ports[id].release()
	delete(l.ports, id)
}

// bindPort binds a free port and does not listen on it: the kernel gives it to nobody else,
// and a client that connects too early is refused, where a listener would let it hang.
func bindPort() (*reservedPort, error) {
	syscall.ForkLock.RLock()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	hold := os.NewFile(uintptr(fd), "port")
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		hold.Close()
		return nil, os.NewSyscallError("bind", err)
	}
	addr, err := syscall.Getsockname(fd)
	if err != nil {
		hold.Close()
		return nil, os.NewSyscallError("getsockname", err)
	}
	return &reservedPort{strconv.Itoa(addr.(*syscall.SockaddrInet4).Port), hold}, nil
}

// release gives the port free for its component. It may be called again, and of nil.
func (p *reservedPort) release() {
	if p != nil && p.hold != nil {
		p.hold.Close()
		p.hold = nil
	}
}

// child is a component's process and the group that it leads. Two pumps read its output and
// one goroutine, in reap, waits for its end.
type child struct {
	component  *Component
	healthPort string
	launcher   *launcher
	cmd        *exec.Cmd
	pid        int
	container  *container          // nil for none; then cmd is its engine's command line
	stdin      io.WriteCloser      // of that command line, which reads the container's environment from it
	signals    chan syscall.Signal // for a container: a signal that it has yet to be sent
	outputs    []*os.File          // read ends of its output
	pumping    atomic.Int32        // pumps that still run
	drained    chan struct{}       // closed when no output will come any more
	expired    chan struct{}       // closed by kill
	tail       tail

	mu     sync.Mutex // guards the fields below; nobody who holds it waits
	asked  bool       // a signal to end was sent
	killed bool
	reaped bool // nothing is left of the group, so its id may be someone else's now
}

// signal sends sig, a request to end, to the group, and SIGCONT, because a stopped process
// takes no other signal.
func (c *child) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = true
	switch {
	case c.reaped:
	case c.container != nil && sig == syscall.SIGKILL: // tendContainer hears of it by expired
	case c.container != nil:
		select {
		case c.signals <- sig:
		default:
		}
	default:
		_ = syscall.Kill(-c.pid, sig) // fails only for a group that is already gone
		_ = syscall.Kill(-c.pid, syscall.SIGCONT)
	}
}

// kill sends SIGKILL to the group. From then on reap waits for no output that is not taken.
func (c *child) kill() {
	c.signal(syscall.SIGKILL)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.killed {
		c.killed = true
		close(c.expired)
	}
}

// isReaped tells whether nothing is left of the group.
func (c *child) isReaped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reaped
}

// killPatience returns how long flowctl waits for the end of c after SIGKILL: longer for a
// container, which its engine has to kill.
func (c *Component) killPatience() time.Duration {
	if c.Image != "" {
		return killPatience + 2*engineTimeout
	}
	return killPatience
}

// reap waits for the process and returns how it ended, once nothing is left of its group and
// its output has been emitted, or is lost because nobody takes it although kill was called.
// Where the process has ended by itself, the rest of its group is killed. Where it was asked
// to end, the others may still write their last lines: they have until kill is called.
func (c *child) reap() childEnd {
	end := childEnd{child: c, containerErr: c.awaitEnd()}
	c.mu.Lock()
	if !c.asked {
		_ = syscall.Kill(-c.pid, syscall.SIGKILL)
	}
	_ = c.cmd.Wait() // does not block: it is a zombie, and no goroutine copies for it
	c.reaped = c.groupIsEmpty()
	empty := c.reaped
	c.mu.Unlock()
	if !empty {
		c.awaitGroup()
		c.mu.Lock()
		c.reaped = true
		c.mu.Unlock()
	}
	c.launcher.leaderEnded(c.pid)

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
			end.lost = true
		}
	}
	end.status = waitStatus(c.cmd)
	return end
}

// awaitEnd returns when the process has ended, and leaves it a zombie. It also sees to it that
// its container is gone, and fails where that may be left.
func (c *child) awaitEnd() error {
	if c.container == nil {
		awaitExit(c.cmd.Process)
		return nil
	}
	ended := make(chan struct{})
	var beside sync.WaitGroup
	beside.Go(func() { c.tendContainer(ended) })
	beside.Go(func() {
		_, _ = io.WriteString(c.stdin, c.container.env) // fails for a command line that ends early
		c.stdin.Close()
	})
	awaitExit(c.cmd.Process)
	close(ended)
	c.stdin.Close() // ends the writing, too, where another process holds the other end and does not read
	beside.Wait()
	return c.container.remove()
}

// tendContainer sends the container its signals, and removes it when it is to be killed,
// until its command line has ended. Until then that is not waited for, so its pid is its own.
func (c *child) tendContainer(ended <-chan struct{}) {
	ctr := c.container
	var again <-chan time.Time
	for asked := syscall.Signal(0); ; {
		select {
		case <-ended:
			return
		case <-c.expired:
			_ = ctr.remove() // awaitEnd tries again
			select {
			case <-ended: // with the container, and with its last lines
			case <-time.After(outputGrace):
				_ = syscall.Kill(-c.pid, syscall.SIGKILL)
			}
			return
		case asked = <-c.signals:
		case <-again:
		}
		again = nil
		if err := ctr.signal(asked); err != nil {
			again = time.After(askAgain) // the container does not run yet, or not any more
		}
	}
}

// run runs a command beside c: in its environment, folder and control group, or in its
// container. The command leads a process group of its own, which is killed when ctx
// ends, and of which nothing is left when run returns. lines are the last that it printed.
func (c *child) run(ctx context.Context, argv []string) (status syscall.WaitStatus, lines []string, err error) {
	argv = c.container.inside(argv)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env, cmd.Dir = c.cmd.Env, c.cmd.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.launcher.cgroup.hold(cmd.SysProcAttr)
	var printed tail
	cmd.Stdout, cmd.Stderr = &printed, &printed
	cmd.WaitDelay = outputGrace // where what has left the group holds its output
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := c.launcher.startLeader(cmd, c.component.ID); err != nil {
		return 0, nil, fmt.Errorf("cannot run %q: %v", argv[0], cause(err))
	}
	awaitExit(cmd.Process)
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	_ = cmd.Wait() // how it ended is in its state
	c.launcher.leaderEnded(cmd.Process.Pid)
	return waitStatus(cmd), printed.lines(), nil
}

// pump emits what comes from r, in whole lines, until r ends. After reap has set a deadline
// it ends when the pipe is empty, because a process that lives on may hold the other end.
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
	passOn := func(lines []byte) {
		c.tail.add(lines)
		emit(id, stream, lines)
	}
	read := r.Read
	buf := make([]byte, 0, minBuffer)
	for {
		room := min(cap(buf), max(len(buf), maxLine)+1) - len(buf) // no more of a line than tells whether it is too long
		n, err := read(buf[len(buf) : len(buf)+room])
		buf = passLines(buf[:len(buf)+n], passOn)
		if n == room && cap(buf) < pipeSize {
			buf = slices.Grow(buf, pipeSize-len(buf))
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			read = readLeftover(r)
		case err != nil:
			if len(buf) > 0 {
				passOn(append(buf, '\n'))
			}
			return
		}
	}
}

// passLines calls passOn with the whole lines of buf, or with the first maxLine bytes of a
// line that is longer, and returns the rest with room to read more. A CR behind maxLine bytes
// is waited with until the next byte shows whether it belongs to the end of the line.
func passLines(buf []byte, passOn func([]byte)) []byte {
	if i := bytes.LastIndexByte(buf, '\n'); i >= 0 {
		passOn(buf[:i+1])
		buf = buf[:copy(buf, buf[i+1:])]
	}
	switch {
	case len(buf) > maxLine && (len(buf) > maxLine+1 || buf[maxLine] != '\r'):
		n := maxLine
		if buf[n-1] == '\r' { // which would be taken for the end of a line
			n--
		}
		passOn(append(slices.Clip(buf[:n]), '\n'))
		buf = buf[:copy(buf, buf[n:])]
	case len(buf) == cap(buf):
		grown := make([]byte, len(buf), min(2*cap(buf), maxLine+2))
		copy(grown, buf)
		buf = grown
	}
	return buf
}

// readLeftover returns a function that reads what a pipe holds, with EOF where a reader would
// have to wait. It reads no more than a pipe can hold, so that a writer cannot go on for ever.
func readLeftover(r *os.File) func([]byte) (int, error) {
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

// tail keeps the last tailSize bytes that a process has printed.
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

// describeStart returns err, of starting cmd, in the words of the pipeline file.
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

// describeProgram returns err, of running a program in the folder dir, with what to do about it.
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
	return &startError{fmt.Sprintf("cannot run %q: %s", program, why), err}
}

// startError is why a process could not be started: in words for who reads it, and the
// error of the system call.
type startError struct {
	text string
	err  error
}

func (e *startError) Error() string { return e.text }
func (e *startError) Unwrap() error { return e.err }

// Faults of scripts.
const (
	noProgram = "it is no program of this machine, and has no #! line"
	crlfLine  = `its #! line ends in CRLF, of which the CR counts; remove it from every line: sed -i 's/\r$//'`
)

// scriptFault says what keeps an executable file from being run, "" for nothing: its #! line
// (execve(2)), or that it is a text without one.
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

// waitStatus returns how cmd has ended, which was waited for.
func waitStatus(cmd *exec.Cmd) syscall.WaitStatus {
	status, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	return status
}

// describeExit says how a process ended.
func describeExit(status syscall.WaitStatus) string {
	if !status.Signaled() {
		return fmt.Sprintf("exit status %d", status.ExitStatus())
	}
	text := fmt.Sprintf("killed by signal %d (%s)", status.Signal(), status.Signal())
	if status.CoreDump() {
		text += ", core dumped"
	}
	return text
}
