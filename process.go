package main

// How the process of a component is started and seen to its end: its environment, port, process
// group, signals and output. process_linux.go has the reaper, the control group and the guard.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"os"
	"os/exec"
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
	leftGrace    = time.Second             // from the stop signal to SIGKILL for what a process leaves that ends by itself
	outputGrace  = 1500 * time.Millisecond // for the output of a process that got SIGKILL to be taken
	killPatience = 5 * time.Second         // from SIGKILL until flowctl no longer waits: only a process stuck in the kernel lives that long
)

// runMark is the variable by which flowctl and its guard recognise the processes of a run. Its
// value is the run's, a slash, and the secret of the component. That of a flowctl which is
// itself a component begins with the outer one's and a slash.
const runMark = "FLOWCTL_RUN"

// launchConfig is what the processes of a run have in common.
type launchConfig struct {
	endpoint          string        // FLOWCTL_ENDPOINT of components without "tls": true
	tlsEndpoint       string        // FLOWCTL_ENDPOINT of components with "tls": true
	containerEndpoint string        // FLOWCTL_ENDPOINT of containers that are not on the host's network; "" where they cannot reach the plane
	tlsEnv            []string      // of components with "tls": true, FLOWCTL_ENDPOINT included
	heartbeat         time.Duration // FLOWCTL_HEARTBEAT_INTERVAL
	commandEnv        []string      // of the command after --, below flowctl's own environment
	engine            *engine       // of components with an image, nil for none
	reaper            *reaper
	guard             *guard
	inherited         []int // descriptors that flowctl was started with, for the command after -- alone
	emit              emitter
	flush             func() // returns when what was emitted has been written; nil where emit returns no sooner
	log               *slog.Logger
}

// guardFacts are the first line that a guard is told, in JSON.
type guardFacts struct {
	Run        string // the mark of the run
	Flowctl    int    // pid
	Cgroup     string // folder of the run's control group, "" for none
	EnginePath string // "" for none
}

// launcher starts the processes of a run: components, their health checks, and the
// command after --. One goroutine, the loop of the run, calls its methods; descendants
// and the methods of a child may be called from any.
type launcher struct {
	config launchConfig
	mark   string        // of the run, which begins each value of runMark
	secret []byte        // what the marks of its components are made of
	exits  chan childEnd // gets the end of each component's process, once
	closed chan struct{}
	cgroup *cgroup // nil for none

	attempts        map[string]int           // starts of a component, by its id
	ports           map[string]*reservedPort // by component
	envFiles        map[string]*diskTurn     // by path
	containerStarts atomic.Int64             // numbers the containers of the run

	mu      sync.Mutex     // guards doubted
	doubted map[int]uint64 // processes of which nobody can tell who left them, by pid: when they began
}

// childEnd is how a component's process has ended, with its group and its output.
type childEnd struct {
	child        *child
	status       syscall.WaitStatus
	unasked      bool  // its first process ended by itself, also where it was told to stop before the rest had ended
	lost         bool  // nobody took the rest of its output
	containerErr error // why its container may still be there
}

// newLauncher returns a launcher, of which the guard knows from then on. It is closed when no component runs any more.
func newLauncher(config launchConfig) *launcher {
	l := &launcher{
		config: config, mark: strings.TrimPrefix(os.Getenv(runMark)+"/"+rand.Text(), "/"), secret: []byte(rand.Text()),
		exits: make(chan childEnd), closed: make(chan struct{}), attempts: make(map[string]int), ports: make(map[string]*reservedPort), envFiles: make(map[string]*diskTurn), doubted: make(map[int]uint64),
	}
	reserveThreads(8)
	l.cgroup = makeCgroup(l.mark)
	enginePath := ""
	if config.engine != nil {
		config.engine.run, config.engine.env = l.mark, append(baseEnv(), runMark+"="+l.mark)
		enginePath = config.engine.path
	}
	config.guard.know(guardFacts{l.mark, os.Getpid(), l.cgroup.path(), enginePath})
	return l
}

// close ends what components have left behind, and the guard. It returns what SIGKILL has not
// ended. Of the launcher's goroutines only those go on that wait for such a process.
func (l *launcher) close() (left []procInfo) {
	left = l.sweep(sweepGrace)
	if l.containerStarts.Load() > 0 {
		l.removeContainers()
	}
	l.config.guard.dismiss()
	l.cgroup.remove()
	for _, port := range l.ports {
		port.release()
	}
	close(l.closed)
	return left
}

// removeContainers removes containers that an engine has made after its command line was killed.
func (l *launcher) removeContainers() {
	names, err := l.config.engine.remove(context.Background(), "label="+labelRun+"="+l.mark)
	if len(names) > 0 {
		l.config.log.Warn("removed containers whose command line was killed", "containers", enumerate(names))
	}
	if err != nil {
		l.config.log.Error("containers may be left", "err", err)
	}
}

// reserveThreads has the runtime start threads before components can use up what the system allows:
// one that it cannot start later is the end of flowctl, not an error that could be told.
func reserveThreads(spare int) {
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

// started is what flowctl has started a process for.
type started struct {
	id      string   // of a component, or commandID; "" for a helper
	beside  bool     // it is not the component, but a check of it
	outputs []string // the pipes that are its output, as /proc names them
}

// markOf returns the value of runMark that the processes of component id are started with. Nobody can make it of those of others.
func (l *launcher) markOf(id string) string {
	mac := hmac.New(sha256.New, l.secret)
	mac.Write([]byte(id))
	return l.mark + "/" + hex.EncodeToString(mac.Sum(nil))
}

// leaders returns the component that each process belongs to which the launcher has started
// and which has not ended, by pid.
func (l *launcher) leaders() map[int]string { return l.config.reaper.leaders() }

// settledLeaders returns leaders, with what is being started.
func (l *launcher) settledLeaders() map[int]string { return l.config.reaper.settledLeaders() }

// leads tells whether leaders has pid, of component id.
func (l *launcher) leads(pid int, id string) bool { return l.config.reaper.leads(pid, id) }

// leaderOf returns the process that the launcher has started as component id, 0 for none.
func (l *launcher) leaderOf(id string) int { return l.config.reaper.leaderOf(id) }

// containers returns the containers of the run, as the engine knows them now.
func (l *launcher) containers() (runningContainers, error) {
	if l.containerStarts.Load() == 0 {
		return runningContainers{}, nil
	}
	return l.config.engine.running()
}

// start starts the process of c as the leader of a session of its own, which no other process
// can join, and so of a process group. Its output
// goes to emit, its end to exits.
func (l *launcher) start(c *Component) (*child, error) {
	port, err := l.healthPort(c)
	if err != nil {
		return nil, err
	}
	cmd, ctr, files, err := l.command(c, port)
	if err != nil {
		return nil, err
	}
	l.ports[c.ID].release()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	l.cgroup.part(c.ID).hold(cmd.SysProcAttr)
	ch := &child{
		component: c, healthPort: port, envFiles: files, launcher: l, cmd: cmd, container: ctr, signals: make(chan syscall.Signal, 1),
		drained: make(chan struct{}), expired: make(chan struct{}),
	}
	if err := l.startPiped(ch); err != nil {
		return nil, describeStart(cmd, err)
	}
	l.attempts[c.ID]++
	ch.pid = cmd.Process.Pid
	ch.pumping.Store(2)
	for i, stream := range []string{"stdout", "stderr"} {
		p := newPump(c.ID, stream, ch.outputs[i], l.config.emit, &ch.tail)
		ch.pumps = append(ch.pumps, p)
		go ch.pump(p)
	}
	go func() {
		end := ch.reap()
		select {
		case l.exits <- end:
		case <-l.closed:
		}
	}()
	return ch, nil
}

// startPiped starts ch with its output in pipes, and a container with its standard input as well.
func (l *launcher) startPiped(ch *child) (err error) {
	var theirs []*os.File
	var names []string
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
		info, err := r.Stat()
		if err != nil {
			return err
		}
		names = append(names, fmt.Sprintf("pipe:[%d]", info.Sys().(*syscall.Stat_t).Ino))
	}
	ch.cmd.Stdout, ch.cmd.Stderr = theirs[0], theirs[1]
	if ch.container != nil {
		if ch.stdin, err = ch.cmd.StdinPipe(); err != nil {
			return err
		}
	}
	return l.startLeader(ch.cmd, started{id: ch.component.ID, outputs: names})
}

// signal sends sig to the process group of ch, or to its container. It never waits.
func (l *launcher) signal(ch *child, sig syscall.Signal) { ch.signal(sig) }

// startCommand starts the command after --, which leaders has under id. ended gets its end, once.
func (l *launcher) startCommand(id string, cmd *exec.Cmd) (ended <-chan syscall.WaitStatus, err error) {
	cmd.Env = l.commandEnv(id)
	for _, fd := range l.config.inherited { // it keeps its number
		if more := fd - 2 - len(cmd.ExtraFiles); more > 0 {
			cmd.ExtraFiles = append(cmd.ExtraFiles, make([]*os.File, more)...)
		}
		cmd.ExtraFiles[fd-3] = os.NewFile(uintptr(fd), "inherited")
	}
	if err := l.startLeader(cmd, started{id: id}); err != nil {
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

// startLeader starts cmd, a process of a component, and tells the guard of it.
func (l *launcher) startLeader(cmd *exec.Cmd, what started) error {
	if err := l.config.reaper.startLeader(cmd, what); err != nil {
		return err
	}
	l.config.guard.tell("started", cmd.Process.Pid)
	return nil
}

func (l *launcher) leaderEnded(pid int) {
	l.config.reaper.leaderEnded(pid)
	l.config.guard.tell("ended", pid)
}

// holdBack has no child get the descriptors above 2 that flowctl was started with, and returns them.
// What flowctl itself opens no child gets.
func holdBack() (inherited []int, err error) {
	folder := "/dev/fd"
	if runtime.GOOS == "linux" {
		folder = "/proc/self/fd" // a small /dev may lack the link
	}
	dir, err := os.Open(folder)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	syscall.ForkLock.Lock() // some calls open first, and mark then
	defer syscall.ForkLock.Unlock()
	for _, name := range names {
		fd, notNumber := strconv.Atoi(name)
		if notNumber != nil || fd <= 2 {
			continue
		}
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		if errno == 0 && flags&syscall.FD_CLOEXEC == 0 {
			syscall.CloseOnExec(fd)
			inherited = append(inherited, fd)
		}
	}
	return inherited, err
}

// command returns the command that runs c: its program, or an engine's and then the container. files are
// the digests of its env_files, by path. A program that is not found is the error of its start.
func (l *launcher) command(c *Component, port string) (cmd *exec.Cmd, ctr *container, files map[string]digest, err error) {
	if c.Image != "" {
		env, files, err := l.componentEnv(c, nil, port)
		if err != nil {
			return nil, nil, nil, err
		}
		cmd, ctr = l.config.engine.container(c, env, int(l.containerStarts.Add(1)))
		cmd.Env = append(cmd.Env, runMark+"="+l.markOf(c.ID)) // what the command line leaves behind is known by it
		return cmd, ctr, files, nil
	}
	// JOURNAL_STREAM tells of flowctl's standard error, which is not that of the component.
	base := slices.DeleteFunc(baseEnv(), func(entry string) bool { return strings.HasPrefix(entry, "JOURNAL_STREAM=") })
	env, files, err := l.componentEnv(c, append(base, "PWD="+c.WorkingDir), port)
	if err != nil {
		return nil, nil, nil, err
	}
	program, err := findProgram(c.Command[0], envMap(env)["PATH"], c.WorkingDir)
	return &exec.Cmd{Path: program, Args: slices.Concat(c.Command, c.Args), Dir: c.WorkingDir, Env: env, Err: err}, nil, files, nil
}

// componentEnv returns the environment of c, whose start comes next: what flowctl gives unless it is
// set, base, the variables of the file, and those that nobody can change. The last of a name counts.
// files are the digests of its env_files, by path. It fails where one cannot be read.
func (l *launcher) componentEnv(c *Component, base []string, port string) (env []string, files map[string]digest, err error) {
	env, files = append([]string{"PYTHONUNBUFFERED=1"}, base...), make(map[string]digest)
	set := func(name, value string) { env = append(env, name+"="+value) }
	set("COMPONENT_ID", c.ID)
	set("SERVICE_ID", c.ID)
	set("HEALTH_PORT", port)
	set("HEALTH_ENDPOINT", "http://"+net.JoinHostPort("localhost", port)+"/health")
	interval := l.config.heartbeat
	set("FLOWCTL_HEARTBEAT_INTERVAL", strconv.FormatInt(interval.Milliseconds(), 10)+"ms")
	own, err := c.variables(func(_, path string) (string, error) {
		if l.envFiles[path] == nil {
			l.envFiles[path] = newDiskTurn(diskTime)
		}
		value, err := readEnvFile(l.envFiles[path], path)
		files[path] = sha256.Sum256([]byte(value))
		return value, err
	})
	if err != nil {
		return nil, nil, err
	}
	for name, value := range own {
		set(name, value)
	}
	if d, err := time.ParseDuration(own[heartbeatVar]); err == nil {
		interval = d
	}
	set("FLOWCTL_HEARTBEAT_INTERVAL_MS", strconv.FormatInt(interval.Milliseconds(), 10))
	set("FLOWCTL_RUN_ID", runID(l.mark))
	set("FLOWCTL_ATTEMPT", strconv.Itoa(l.attempts[c.ID]+1))
	set("ENABLE_FLOWCTL", "true")
	set("FLOWCTL_ENABLED", "true")
	if c.TLS {
		env = append(env, l.config.tlsEnv...)
	}
	set("FLOWCTL_ENDPOINT", l.config.endpointOf(c))
	set("FLOWCTL_COMPONENT_ID", c.ID)
	set("FLOWCTL_SERVICE_ID", c.ID)
	set(runMark, l.markOf(c.ID))
	return append(env, pastProxy(env, l.config.endpointOf(c))...), files, nil
}

// variables returns what the file sets for c, by name. read reads the file of env_files for a variable.
func (c *Component) variables(read func(name, path string) (string, error)) (map[string]string, error) {
	vars := c.configEnv()
	maps.Copy(vars, c.Env)
	for _, name := range slices.Sorted(maps.Keys(c.EnvFiles)) {
		value, err := read(name, c.EnvFiles[name])
		if err != nil {
			return nil, fmt.Errorf("env_files.%s: %w", name, err)
		}
		vars[name] = value
	}
	return vars, nil
}

// pastProxy returns variables by which a client with the environment env asks no proxy for the host of
// endpoint, none where it has no proxy. Clients read different ones, and each only one of them.
func pastProxy(env []string, endpoint string) (out []string) {
	vars := envMap(env)
	host, _, err := net.SplitHostPort(endpoint)
	if err != nil || strings.HasPrefix(endpoint, "unix:") || !slices.ContainsFunc([]string{"http_proxy", "https_proxy", "grpc_proxy"}, func(name string) bool {
		return vars[name] != "" || vars[strings.ToUpper(name)] != ""
	}) {
		return nil
	}
	for _, name := range []string{"no_proxy", "NO_PROXY", "no_grpc_proxy"} {
		hosts := cmp.Or(vars[name], vars["no_proxy"], vars["NO_PROXY"])
		list := strings.FieldsFunc(hosts, func(r rune) bool { return r == ',' || r == ' ' })
		switch {
		case len(list) == 0:
			hosts = host
		case !slices.Contains(list, host) && !slices.Contains(list, "*"):
			hosts += "," + host
		}
		out = append(out, name+"="+hosts)
	}
	return out
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

// commandEnv returns the environment of the command after --, which leaders has under id.
func (l *launcher) commandEnv(id string) []string {
	endpoint := "FLOWCTL_ENDPOINT=" + l.config.endpoint
	env := append(slices.Concat(l.config.commandEnv, baseEnv()), endpoint, "FLOWCTL_RUN_ID="+runID(l.mark), runMark+"="+l.markOf(id))
	if slices.Contains(l.config.tlsEnv, endpoint) { // else the endpoint has no TLS
		env = append(env, l.config.tlsEnv...)
	}
	return append(env, pastProxy(env, l.config.endpoint)...)
}

// heartbeatVar is the one of flowctl's own variables that the file can change.
const heartbeatVar = "FLOWCTL_HEARTBEAT_INTERVAL"

// fixedVars are flowctl's own variables in the environment of its components. What the file gives
// under their names counts for nothing.
var fixedVars = []string{
	"ENABLE_FLOWCTL", "FLOWCTL_ENABLED", "FLOWCTL_ENDPOINT", "FLOWCTL_COMPONENT_ID", "FLOWCTL_SERVICE_ID",
	"FLOWCTL_HEARTBEAT_INTERVAL_MS", "FLOWCTL_RUN_ID", "FLOWCTL_ATTEMPT", runMark,
}

// systemdVars are what systemd tells a service, with which a child would speak for flowctl
// (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)).
var systemdVars = []string{"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"}

// ownVars are never passed on: what is told to flowctl alone, by systemd, or by an outer flowctl to
// this one as its component.
var ownVars = slices.Concat(systemdVars, fixedVars, tlsVars, []string{heartbeatVar})

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

// digest is by what the content of an env_file is compared: flowctl keeps no secret longer than it must.
type digest = [sha256.Size]byte

// readEnvFile returns the content of a file as the value of a variable, without the
// newline that editors put at its end. What could keep flowctl waiting, as a FIFO does or a
// disk that hangs, is an error.
func readEnvFile(disk *diskTurn, path string) (string, error) {
	var value string
	_, err := disk.do(path, func() (err error) {
		value, err = readVariable(path)
		return err
	})
	if err != nil { // value may be set yet
		return "", err
	}
	return value, nil
}

func readVariable(path string) (string, error) {
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

// checkReach fails for components of p that could not register: from the network of its own that a
// container with ports has, the control plane cannot be reached on its loopback.
func (c *launchConfig) checkReach(p *Pipeline) error {
	ids := p.idsWhere(func(comp *Component) bool {
		loopback := !comp.TLS && len(c.tlsEnv) > 0 // its listener is there alone
		return len(comp.Ports) > 0 && comp.registers() && (loopback || c.containerEndpoint == "")
	})
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

// healthPort returns the HEALTH_PORT of c: that of the file, else one that stays reserved for its id.
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

// forget gives up the port, the control group and the count of starts of a component that the file
// does not have any more.
func (l *launcher) forget(id string) {
	l.cgroup.removePart(id)
	l.ports[id].release()
	delete(l.ports, id)
	delete(l.attempts, id)
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
	var addr syscall.Sockaddr
	if err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err == nil {
		addr, err = syscall.Getsockname(fd)
	}
	if err != nil {
		hold.Close()
		return nil, os.NewSyscallError("bind", err)
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

// child is a component's process and its group. Two pumps read its output, and reap awaits its end.
type child struct {
	component  *Component
	healthPort string
	envFiles   map[string]digest // what it got of env_files, by path
	launcher   *launcher
	cmd        *exec.Cmd
	pid        int
	container  *container          // nil for none; then cmd is its engine's command line
	stdin      io.WriteCloser      // of that command line, which reads the container's environment from it
	signals    chan syscall.Signal // for a container: a signal that it has yet to be sent
	outputs    []*os.File          // read ends of its output
	pumps      []*pump             // that read them
	pumping    atomic.Int32        // pumps that still run
	drained    chan struct{}       // closed when no output will come any more
	expired    chan struct{}       // closed by SIGKILL
	tail       tail
	beside     int // process group of the last command of run, 0 for none; who calls run owns it

	mu     sync.Mutex // guards the fields below; nobody who holds it waits
	asked  bool       // a signal to end was sent
	ended  bool       // the first process has ended
	killed bool       // that was SIGKILL
	reaped bool       // nothing is left of the group, so its id may be someone else's now
}

// signal sends sig, a request to end, to the group, and SIGCONT, because a stopped process takes no
// other signal. From SIGKILL on reap waits for no output that is not taken.
func (c *child) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.asked && !c.ended { // so its pid is its own
		c.launcher.noteBelow(c.pid)
	}
	c.asked = true
	if sig == syscall.SIGKILL && !c.killed {
		c.killed = true
		close(c.expired)
	}
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

// hasEnded tells whether its first process has ended, although something may be left of it.
func (c *child) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// isReaped tells whether nothing is left of the group.
func (c *child) isReaped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reaped
}

// killPatience is how long flowctl waits for the end of c after SIGKILL: longer for a container.
func (c *Component) killPatience() time.Duration {
	if c.Image != "" {
		return killPatience + 2*engineTimeout
	}
	return killPatience
}

// reap waits for the process and returns how it ended, once nothing is left of it and its output
// has been emitted, or is lost because nobody takes it although it got SIGKILL. What the process
// has left behind may still write its last lines. Where it was asked to end, that has until SIGKILL,
// else leftGrace.
func (c *child) reap() childEnd {
	end := childEnd{child: c, containerErr: c.awaitEnd()}
	kill := time.AfterFunc(math.MaxInt64, func() { c.signal(syscall.SIGKILL) })
	c.mu.Lock()
	c.ended, end.unasked = true, !c.asked
	if !c.asked {
		_ = syscall.Kill(-c.pid, c.component.stopSignal())
		_ = syscall.Kill(-c.pid, syscall.SIGCONT)
		kill.Reset(leftGrace)
	}
	_ = c.cmd.Wait() // does not block: it is a zombie, and no goroutine copies for it
	c.reaped = c.reapGroup(syscall.WNOHANG)
	c.mu.Unlock()
	c.endRest()
	kill.Stop()
	c.mu.Lock()
	c.reaped = true
	c.mu.Unlock()
	c.launcher.leaderEnded(c.pid)

	// What outlives SIGKILL, or is another's, may hold the pipes open: what is in them now
	// is passed on, and nothing more is waited for.
	for _, p := range c.pumps {
		p.wake(&p.ended)
	}
	select {
	case <-c.drained:
	case <-c.expired: // maybe a moment ago, by the SIGKILL that made this end
		select {
		case <-c.drained:
		case <-time.After(outputGrace):
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
// ends. lines are the last that it printed. Its end counts, whoever holds its output open. The caller
// calls endBeside then.
func (c *child) run(ctx context.Context, argv []string) (status syscall.WaitStatus, lines []string, err error) {
	argv = c.container.inside(argv)
	program, err := findProgram(argv[0], envMap(c.cmd.Env)["PATH"], c.cmd.Dir)
	if err != nil {
		return 0, nil, fmt.Errorf("cannot run %q: %v", argv[0], cause(err))
	}
	cmd := exec.CommandContext(ctx, program)
	cmd.Args, cmd.Env, cmd.Dir = argv, c.cmd.Env, c.cmd.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	c.launcher.cgroup.hold(cmd.SysProcAttr)
	r, w, err := os.Pipe()
	if err != nil {
		return 0, nil, fmt.Errorf("cannot run %q: %v", argv[0], err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err = c.launcher.startLeader(cmd, started{id: c.component.ID, beside: true})
	w.Close()
	if err != nil {
		r.Close()
		return 0, nil, fmt.Errorf("cannot run %q: %v", argv[0], cause(err))
	}
	var printed tail
	output := newPump(c.component.ID, "", r, func(string, string, []byte, int) {}, &printed)
	read := make(chan struct{})
	go func() {
		output.run()
		close(read)
	}()
	awaitExit(cmd.Process)
	output.wake(&output.ended) // what others print from now on is none of it
	<-read
	pid := cmd.Process.Pid
	_ = syscall.Kill(-pid, syscall.SIGTERM)
	_ = syscall.Kill(-pid, syscall.SIGCONT)
	_ = cmd.Wait() // how it ended is in its state
	c.beside = pid
	return waitStatus(cmd), printed.lines(), nil
}

// endBeside ends what the last command of run has left of its process group: that got SIGTERM, and gets
// SIGKILL after leftGrace, or when ctx ends.
func (c *child) endBeside(ctx context.Context) {
	if c.beside != 0 {
		endGroup(ctx, c.beside)
		c.launcher.leaderEnded(c.beside)
		c.beside = 0
	}
}

// pump runs p to the end of its output.
func (c *child) pump(p *pump) {
	p.run()
	if flush := c.launcher.config.flush; flush != nil {
		flush()
	}
	if c.pumping.Add(-1) == 0 {
		close(c.drained)
	}
}

// catchUp returns when all was passed on that c had printed when it was called, or when ctx ends. It
// may be called once.
func (c *child) catchUp(ctx context.Context) {
	for _, p := range c.pumps {
		p.wake(&p.asked)
	}
	for _, p := range c.pumps {
		select {
		case <-p.caughtUp:
		case <-ctx.Done():
			return
		}
	}
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
