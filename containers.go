package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// A container is a process of its engine's command line: `docker run` in the
// foreground, whose output and exit status are those of the container. Its life is
// not: a container outlives a command line that is killed, so it is removed by its
// name, and by its labels where flowctl itself was killed. Nor are its signals: docker
// and podman pass on what they get, but lose it while they start the container, so
// signals go by ENGINE kill.

const (
	orchestrateProcesses  = "process"
	orchestrateContainers = "container"

	labelPipeline  = "flowctl.pipeline"
	labelComponent = "flowctl.component"
	labelRun       = "flowctl.run"   // what runMark is set to
	labelClaim     = "flowctl.claim" // which run file on which machine: whoever holds that may remove what has it

	engineTimeout = 10 * time.Second // for what an engine does at once, if it answers at all

	signalAgain = 100 * time.Millisecond // until a signal is sent again to a container that does not run yet

	// hostAlias is the machine as a container sees it that is not on its network.
	hostAlias = "host.docker.internal"
)

// engine is the command line of docker, or of what is used like it. A nil one has no
// containers. It is complete when the supervisor is made, and does not change then.
type engine struct {
	name       string // as it was looked for
	path       string
	env        []string // of its command line: flowctl's own
	reaper     *reaper
	pipeline   string
	ownerLabel string // "" for none: nobody knows then what a dead run has left
	run        string
}

// findEngine returns the engine that is called name, or with "" docker, else podman.
func findEngine(name string) (*engine, error) {
	names := []string{"docker", "podman"}
	if name != "" {
		names = []string{name}
	}
	var err error
	for _, name := range names {
		var path string
		if path, err = exec.LookPath(name); err == nil {
			path, err = filepath.Abs(path)
		}
		if err == nil {
			return &engine{name: name, path: path, env: slices.DeleteFunc(os.Environ(), hidden)}, nil
		}
	}
	if name == "" {
		return nil, errors.New("-orchestrator container: neither docker nor podman is in PATH: install one, or name another engine with -engine")
	}
	return nil, fmt.Errorf("-engine %q: cannot run it: %v", name, cause(err))
}

// join has all that e runs from now on be of run.
func (e *engine) join(run string) {
	e.run, e.env = run, append(slices.Clip(e.env), runMark+"="+run)
}

// checkImages fails where p needs an engine and there is none.
func (e *engine) checkImages(p *Pipeline) error {
	var ids []string
	for _, c := range p.components() {
		if c.Image != "" && e == nil {
			ids = append(ids, c.ID)
		}
	}
	if len(ids) > 0 {
		return fmt.Errorf("what has an image needs -orchestrator container: %s", enumerate(ids))
	}
	return nil
}

// command is one of the engine's command line, in a process group of its own: a
// terminal's Ctrl-C is for flowctl.
func (e *engine) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, e.path, args...)
	cmd.Args[0], cmd.Env = e.name, e.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// ask runs a command and returns what it prints. Its error is what the engine says.
func (e *engine) ask(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := e.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := e.reaper.start(cmd)
	if err == nil {
		err = e.reaper.wait(cmd)
	}
	said := strings.TrimSpace(errs.String())
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("%s %s: no answer within %s", e.name, args[0], engineTimeout)
	case err != nil && said != "":
		err = errors.New(said)
	case err != nil:
		err = fmt.Errorf("%s %s: %v", e.name, args[0], cause(err))
	}
	return out.String(), err
}

// remove removes the containers that filter, of ENGINE ps, is true for, and returns
// their names. Others may remove them meanwhile.
func (e *engine) remove(ctx context.Context, filter string) (names []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	for {
		out, listErr := e.ask(ctx, "ps", "--all", "--filter", filter, "--format", "{{.Names}}")
		left := strings.Fields(out)
		switch {
		case listErr != nil:
			return names, cmp.Or(err, listErr)
		case len(left) == 0:
			return names, nil
		case ctx.Err() != nil:
			return names, err
		}
		for _, name := range left {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		// Without this podman would have each wait for what ignores SIGTERM.
		_, _ = e.ask(ctx, slices.Concat([]string{"kill"}, left)...)
		_, err = e.ask(ctx, slices.Concat([]string{"rm", "--force", "--volumes"}, left)...)
	}
}

// prepare makes sure, before anything starts, that the containers of p can be run:
// the engine answers, nothing is left of a run that was killed, and the images are
// there. It says all at once what is not so.
func (e *engine) prepare(ctx context.Context, p *Pipeline, log *slog.Logger) error {
	filter := "label=" + labelClaim + "=" + e.ownerLabel
	if e.ownerLabel == "" {
		filter = "label=" + labelRun + "=" // none: this only tells whether the engine answers
	}
	left, err := e.remove(ctx, filter)
	if len(left) > 0 {
		log.Warn("removed containers that a killed run has left", "containers", enumerate(left))
	}
	if err != nil {
		return e.noAnswer(err)
	}
	var problems []error
	for _, image := range p.images() {
		if e.findImage(ctx, image) == nil {
			continue
		}
		log.Info("pulling", "image", image)
		if err := e.pull(ctx, image, log); err != nil {
			problems = append(problems, fmt.Errorf("%s: image %q is not here and cannot be pulled: %v", enumerate(p.usersOf(image)), image, err))
		}
	}
	return errors.Join(problems...)
}

// prepareUntil is prepare, which may take minutes, until a signal asks for an end. It
// returns that, nil for none.
func (e *engine) prepareUntil(signals <-chan os.Signal, p *Pipeline, log *slog.Logger) (os.Signal, error) {
	if e == nil {
		return nil, nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- e.prepare(ctx, p, log) }()
	for {
		select {
		case err := <-done:
			return nil, err
		case sig := <-signals:
			if underSystemd(sig) {
				continue // it asks for a reload, and the file has just been read
			}
			log.Info("stop requested", "signal", sig.String())
			cancel()
			<-done
			return sig, nil
		}
	}
}

// noAnswer says what to do about an engine that cannot be used. It names its socket
// itself.
func (e *engine) noAnswer(err error) error {
	advice := "start it: systemctl start docker; DOCKER_HOST names another"
	switch {
	case strings.Contains(err.Error(), "permission denied"):
		advice = "run flowctl as a user who may use that socket, such as one of the group docker"
	case filepath.Base(e.path) != "docker":
		advice = "try: " + e.name + " ps"
	}
	return fmt.Errorf("the container engine %s cannot be used: %v (%s)", e.name, err, advice)
}

func (e *engine) findImage(ctx context.Context, image string) error {
	_, err := e.ask(ctx, "image", "inspect", image)
	return err
}

// pull fetches an image, which takes as long as it takes. What the engine says
// meanwhile is logged, its last line is the reason of a failure.
func (e *engine) pull(ctx context.Context, image string, log *slog.Logger) error {
	patience := func() { notify(log, "STATUS=pulling "+image, extendTimeout(time.Minute)) }
	patience()
	r, w := io.Pipe()
	cmd := e.command(ctx, "pull", image)
	cmd.Stdout, cmd.Stderr = w, w
	if err := e.reaper.start(cmd); err != nil {
		return cause(err)
	}
	last := ""
	var reading sync.WaitGroup
	reading.Go(func() {
		for scanner := bufio.NewScanner(r); scanner.Scan(); {
			if last = scanner.Text(); last != "" {
				log.Info("pulling", "image", image, "said", last)
				patience()
			}
		}
		_, _ = io.Copy(io.Discard, r) // the rest after a line that was too long
	})
	err := e.reaper.wait(cmd)
	w.Close()
	reading.Wait()
	if err != nil && last != "" {
		return errors.New(last)
	}
	return err
}

// checkNew fails for images of p that the engine does not have, of those that are not
// in use: what runs does not wait for a pull.
func (e *engine) checkNew(p *Pipeline, used []*proc) error {
	ctx, cancel := context.WithTimeout(context.Background(), engineTimeout)
	defer cancel()
	var problems []error
	for _, image := range p.images() {
		if slices.ContainsFunc(used, func(p *proc) bool { return p.Image == image }) {
			continue
		}
		if err := e.findImage(ctx, image); err != nil {
			problems = append(problems, fmt.Errorf("%s: image %q cannot be used: %v (try: %s pull %[2]s)", enumerate(p.usersOf(image)), image, err, e.name))
		}
	}
	return errors.Join(problems...)
}

// gatewayEndpoint is where a container that is not on the host's network reaches a
// control plane at addr, whose own endpoint is given; "" where it cannot.
func gatewayEndpoint(addr net.Addr, endpoint string) string {
	tcp, ok := addr.(*net.TCPAddr)
	switch {
	case !ok:
		return endpoint // a socket file, which it is given
	case tcp.IP.IsLoopback():
		return ""
	case tcp.IP.IsUnspecified():
		return net.JoinHostPort(hostAlias, strconv.Itoa(tcp.Port))
	}
	return endpoint
}

// checkReach fails for components that could not register: those with ports are not
// on the host's network, and the loopback of theirs is not that of the control plane.
func (s *procSettings) checkReach(p *Pipeline) error {
	var ids []string
	for _, c := range p.components() {
		private := !c.TLS && len(s.tlsEnv) > 0 // a listener on the loopback
		if len(c.Ports) > 0 && c.registers() && (private || s.gateway == "") {
			ids = append(ids, c.ID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	advice := "-control-plane-address 0.0.0.0"
	if len(s.tlsEnv) > 0 {
		advice += ` and "tls": true`
	}
	return fmt.Errorf(`%s: ports take a container off the host's network, from where it cannot register at %s: leave out ports, or set "register": false, or give %s`, enumerate(ids), s.endpoint, advice)
}

// container is the container that a child is the command line of.
type container struct {
	engine *engine
	name   string
	asked  chan syscall.Signal // the signal by which it is to end
	doomed chan struct{}       // closed when it is to be killed
	doom   func()              // closes doomed
}

// container returns the command that runs c, with the variables given, and what there
// is to know of its container. Number tells apart the starts of a run.
func (e *engine) container(c *Component, given []string, number int) (*exec.Cmd, *container) {
	run := e.run[strings.LastIndexByte(e.run, '/')+1:]
	box := &container{engine: e, asked: make(chan syscall.Signal, 1), doomed: make(chan struct{})}
	box.name = fmt.Sprintf("flowctl-%s-%s-%d-%s", e.pipeline, c.ID, number, strings.ToLower(run))
	box.doom = sync.OnceFunc(func() { close(box.doomed) })
	// What is printed goes to flowctl alone, and a missing image is not fetched now.
	args := []string{"run", "--rm", "--name=" + box.name, "--pull=never", "--log-driver=none"}
	for _, label := range [][2]string{{labelPipeline, e.pipeline}, {labelComponent, c.ID}, {labelRun, e.run}, {labelClaim, e.ownerLabel}} {
		args = append(args, "--label="+label[0]+"="+label[1])
	}
	vars, file, byName := splitEnv(given)
	args = append(args, c.containerOptions(vars)...)
	cmd := exec.Command(e.path)
	cmd.Args[0] = e.name
	cmd.Env = slices.Concat(e.env, []string{"FLOWCTL_COMPONENT_ID=" + c.ID})
	for _, name := range byName {
		args = append(args, "--env="+name)
		cmd.Env = append(cmd.Env, name+"="+vars[name])
	}
	cmd.Args = slices.Concat(cmd.Args, args, []string{"--env-file=/dev/stdin", c.Image}, c.Args)
	cmd.Stdin, cmd.WaitDelay = strings.NewReader(file), outputGrace
	return cmd, box
}

// containerOptions are those of ENGINE run that the file decides on. Files that vars
// name, and flowctl has set, are at the same place in the container.
func (c *Component) containerOptions(vars map[string]string) []string {
	args := []string{"--network=host"}
	if len(c.Ports) > 0 {
		args[0] = "--add-host=" + hostAlias + ":host-gateway"
	}
	for _, port := range c.Ports {
		args = append(args, "--publish="+port)
	}
	for _, volume := range c.Volumes {
		args = append(args, "--volume="+volume)
	}
	if c.WorkingDir != "" {
		args = append(args, "--workdir="+c.WorkingDir)
	}
	if c.User != "" {
		args = append(args, "--user="+c.User)
	}
	for _, name := range []string{"FLOWCTL_TLS_CA", "FLOWCTL_TLS_CERT", "FLOWCTL_TLS_KEY"} {
		if path := vars[name]; path != "" {
			args = append(args, "--volume="+path+":"+path+":ro")
		}
	}
	if path, ok := strings.CutPrefix(vars["FLOWCTL_ENDPOINT"], "unix://"); ok {
		args = append(args, "--volume="+path+":"+path)
	}
	return args
}

// splitEnv says how each variable gets into a container. In the arguments of the
// command line all users could read it, and in its environment one such as PATH or
// DOCKER_HOST would be taken for its own, so they go by a file, its standard input.
// What such a file cannot hold, a value with a line break, goes by name: by the
// command line's environment after all, in which nothing of its own looks like that.
func splitEnv(given []string) (vars map[string]string, file string, byName []string) {
	const most = 32 << 10 // a line of 64 KiB is too long for docker (bufio.Scanner)
	vars = make(map[string]string)
	for _, entry := range given {
		name, value, _ := strings.Cut(entry, "=")
		vars[name] = value
	}
	var lines strings.Builder
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		if value := vars[name]; strings.ContainsAny(value, "\r\n") || !utf8.ValidString(value) || len(value) > most {
			byName = append(byName, name)
		} else {
			lines.WriteString(name + "=" + value + "\n")
		}
	}
	return vars, lines.String(), byName
}

// inside is the command that runs argv in the container, and argv itself without one.
func (b *container) inside(argv []string) []string {
	if b == nil {
		return argv
	}
	return slices.Concat([]string{b.engine.path, "exec", b.name}, argv)
}

// checkRuns fails unless the container runs.
func (b *container) checkRuns(ctx context.Context) error {
	out, err := b.engine.ask(ctx, "inspect", "--format", "{{.State.Running}}", b.name)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil && strings.TrimSpace(out) != "true":
		return errors.New("not started")
	}
	return err
}

// remove removes the container, if it is still there.
func (b *container) remove() error {
	if _, err := b.engine.remove(context.Background(), "name="+b.name); err != nil {
		return fmt.Errorf("container %s may be left: %v", b.name, err)
	}
	return nil
}

// signal asks the container to end, once, or kills it. It does not wait.
func (b *container) signal(sig syscall.Signal) {
	if sig == syscall.SIGKILL {
		b.doom()
		return
	}
	select {
	case b.asked <- sig:
	default:
	}
}

// awaitEnd is awaitExit, and for a container also sees to it that it is gone. The
// error is that it may not be.
func (c *child) awaitEnd() error {
	if c.container == nil {
		c.awaitExit()
		return nil
	}
	ended := make(chan struct{})
	var ending sync.WaitGroup
	ending.Go(func() { c.endContainer(ended) })
	c.awaitExit()
	close(ended)
	ending.Wait()
	return c.container.remove()
}

// endContainer passes on what signal is called for, until the command line of the
// container has ended. That is not waited for before, so its id is its own here.
func (c *child) endContainer(ended <-chan struct{}) {
	b := c.container
	var again <-chan time.Time
	for asked := syscall.Signal(0); ; {
		select {
		case <-ended:
			return
		case <-b.doomed:
			_ = b.remove() // awaitEnd tries it again
			select {
			case <-ended: // by that, and the last lines are passed on
			case <-time.After(outputGrace):
				_ = syscall.Kill(-c.pid, syscall.SIGKILL)
			}
			return
		case asked = <-b.asked:
		case <-again:
		}
		again = nil
		if _, err := b.engine.ask(context.Background(), "kill", "--signal", stopSignalNames[slices.Index(stopSignals, asked)], b.name); err != nil {
			again = time.After(signalAgain) // it does not run yet, or not any more
		}
	}
}

// removeContainers removes those of the run, all of whose command lines have ended: an
// engine may have made one after that was killed.
func (s *supervisor) removeContainers() {
	names, err := s.settings.engine.remove(context.Background(), "label="+labelRun+"="+s.run)
	if len(names) > 0 {
		s.log.Warn("removed containers whose command line was killed", "containers", enumerate(names))
	}
	if err != nil {
		s.log.Error("containers may be left", "err", err)
	}
}
