package main

// The command line of a container engine, docker or podman: what flowctl asks of it, and the
// containers that it runs.
//
// A container is run by a command line in the foreground, `docker run`, whose output and exit
// status are those of the container. The life of the container is its own: it goes on when the
// command line is killed, so it is removed by its name, and by its labels where flowctl itself
// was killed. Signals go by `docker kill`, because docker and podman lose those that their
// command line gets while it starts the container.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
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

const (
	orchestrateProcesses  = "process"
	orchestrateContainers = "container"

	labelPipeline  = "flowctl.pipeline"
	labelComponent = "flowctl.component"
	labelRun       = "flowctl.run"   // the mark of the run
	labelOwner     = "flowctl.claim" // a run file on a machine: the flowctl that holds it may remove the container

	engineTimeout = 10 * time.Second       // for an answer of the engine, pulls excepted
	startTold     = 2 * time.Second        // for the engine to say that a container runs that it has started
	askAgain      = 100 * time.Millisecond // after what did not work, before the engine is asked again

	// hostAlias is the name of the machine in a container that is not on its network.
	hostAlias = "host.docker.internal"
)

// commandRunner starts the engine's command lines and waits for them.
type commandRunner interface {
	start(cmd *exec.Cmd) error
	wait(cmd *exec.Cmd) error
}

// engine is a container engine. A nil one stands for a run without containers. Its fields are
// set before components start and do not change then.
type engine struct {
	name       string // as it was looked for
	path       string // of its program, "" where it is missing
	missing    error  // why there is none, which is an error only for a pipeline with images
	commands   commandRunner
	env        []string // of its command lines
	pipeline   string
	run        string // the mark of the run
	ownerLabel string // "" for none: then nobody knows what a killed run has left
}

// container is the container of a component. It has its name before it is made.
type container struct {
	engine *engine
	name   string
	env    string // of the component, for the standard input of the command line
}

// findEngine returns the engine that is called name, or with "" docker, else podman. It fails
// where name is no program. Where there is neither docker nor podman, checkImages fails.
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
			return &engine{name: name, path: path}, nil
		}
	}
	if name == "" {
		return &engine{missing: errors.New("neither docker nor podman is in PATH: install one, or name another engine with -engine")}, nil
	}
	return nil, fmt.Errorf("-engine %q: cannot run it: %v", name, cause(err))
}

// checkImages fails where p has images and there is no engine to run them.
func (e *engine) checkImages(p *Pipeline) error {
	ids := p.idsWhere(func(c *Component) bool { return c.Image != "" })
	switch {
	case len(ids) == 0:
		return nil
	case e == nil:
		return fmt.Errorf("what has an image needs -orchestrator container: %s", enumerate(ids))
	case e.missing != nil:
		return fmt.Errorf("what has an image needs a container engine: %s: %v", enumerate(ids), e.missing)
	}
	return nil
}

// removeAbandoned removes the containers that killed runs of this pipeline have left, and
// returns their names. It fails where the engine does not answer.
func (e *engine) removeAbandoned(ctx context.Context) (names []string, err error) {
	filter := "label=" + labelOwner + "=" + e.ownerLabel
	if e.ownerLabel == "" {
		filter = "label=" + labelRun + "=" // none: this only tells whether the engine answers
	}
	if names, err = e.remove(ctx, filter); err != nil {
		err = e.noAnswer(err)
	}
	return names, err
}

// pullMissing pulls the images of p that the engine does not have, and says at once which cannot be
// pulled. It calls progress for each image, first with "" and then with each line of the engine.
func (e *engine) pullMissing(ctx context.Context, p *Pipeline, progress func(image, said string)) error {
	var problems []error
	for _, image := range p.images() {
		if _, err := e.ask(ctx, "image", "inspect", image); err == nil {
			continue
		}
		if err := e.pull(ctx, image, progress); err != nil {
			problems = append(problems, fmt.Errorf("%s: image %q is not here and cannot be pulled: %v", enumerate(p.usersOf(image)), image, err))
		}
	}
	return errors.Join(problems...)
}

// checkNew fails for images of p that the engine does not have, those in use excepted: a
// pipeline that runs does not wait for a pull. It waits for the engine, at most engineTimeout.
func (e *engine) checkNew(ctx context.Context, p *Pipeline, used []string) error {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	var problems []error
	for _, image := range p.images() {
		if slices.Contains(used, image) {
			continue
		}
		if _, err := e.ask(ctx, "image", "inspect", image); err != nil {
			problems = append(problems, fmt.Errorf("%s: image %q cannot be used: %v (try: %s pull %[2]s)", enumerate(p.usersOf(image)), image, err, e.name))
		}
	}
	return errors.Join(problems...)
}

// containerEndpoint returns where a container that is not on the host's network reaches a
// control plane that listens at addr and is known as endpoint; "" for nowhere.
func containerEndpoint(addr net.Addr, endpoint string) string {
	tcp, ok := addr.(*net.TCPAddr)
	switch {
	case !ok:
		return endpoint // a socket file, which is mounted in the container
	case tcp.IP.IsLoopback():
		return ""
	case tcp.IP.IsUnspecified():
		return net.JoinHostPort(hostAlias, strconv.Itoa(tcp.Port))
	}
	return endpoint
}

// runID returns the id of the run whose mark this is: what an outer flowctl has put before it is left
// out. It is no secret; those of the components come after the mark.
func runID(mark string) string { return mark[strings.LastIndexByte(mark, '/')+1:] }

// container returns the command line that runs c, and its container. No two starts have one number.
func (e *engine) container(c *Component, env []string, number int) (*exec.Cmd, *container) {
	name := fmt.Sprintf("flowctl-%s-%s-%d-%s", e.pipeline, c.ID, number, strings.ToLower(runID(e.run)))
	// What is printed goes to flowctl alone, and a missing image is not fetched now.
	args := []string{"run", "--rm", "--name=" + name, "--pull=never", "--log-driver=none"}
	for _, label := range [][2]string{{labelPipeline, e.pipeline}, {labelComponent, c.ID}, {labelRun, e.run}, {labelOwner, e.ownerLabel}} {
		args = append(args, "--label="+label[0]+"="+label[1])
	}
	vars, file, byName := splitEnv(env)
	args = append(args, c.containerOptions(vars)...)
	cmd := exec.Command(e.path)
	cmd.Args[0] = e.name
	cmd.Env = slices.Clone(e.env)
	for _, name := range byName {
		args = append(args, "--env="+name)
		cmd.Env = append(cmd.Env, name+"="+vars[name])
	}
	cmd.Args = slices.Concat(cmd.Args, args, []string{"--env-file=/dev/stdin", c.Image}, c.Args)
	return cmd, &container{e, name, file}
}

// tlsVars are those of flowctl's own variables that a component with "tls": true alone has. They name files.
var tlsVars = []string{"FLOWCTL_TLS_CA", "FLOWCTL_TLS_CERT", "FLOWCTL_TLS_KEY"}

// containerOptions returns the options of ENGINE run that the pipeline file decides on. vars
// is the environment: the files that flowctl names in it are mounted at the same place.
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
	for _, name := range tlsVars {
		if path := vars[name]; c.TLS && path != "" {
			args = append(args, "--volume="+path+":"+path+":ro")
		}
	}
	if path, ok := strings.CutPrefix(vars["FLOWCTL_ENDPOINT"], "unix://"); ok {
		args = append(args, "--volume="+path+":"+path)
	}
	return args
}

// splitEnv returns the environment env as a map, and as a file for --env-file: all users can read
// arguments, and in the command line's own environment PATH or DOCKER_HOST would affect the engine.
// byName are those that the file cannot hold, such as a line break: they go by the latter after all.
func splitEnv(env []string) (vars map[string]string, file string, byName []string) {
	const most = 32 << 10 // a line of 64 KiB is too long for docker (bufio.Scanner)
	vars = envMap(env)
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

// running returns the containers of the run that run now. Engines say late that one runs, when its
// processes may have called already: it waits for one that is being started, and fails where
// that takes longer than startTold.
func (e *engine) running() (runningContainers, error) {
	for begin := time.Now(); ; time.Sleep(askAgain) {
		out, starting, err := e.list()
		if err == nil && starting != "" {
			err = fmt.Errorf("%s is starting the container of %s", e.name, starting)
		}
		if err == nil || time.Since(begin) > startTold {
			return out, err
		}
	}
}

// list returns the containers of the run that run, and the component of one that is being started, "" for none.
// It fails where one of them is removed meanwhile.
func (e *engine) list() (out runningContainers, starting string, err error) {
	names, err := e.ask(context.Background(), "ps", "--all", "--filter", "label="+labelRun+"="+e.run, "--format", "{{.Names}}")
	if err != nil || names == "" {
		return out, "", err
	}
	const format = `{{.State.Status}} {{.State.Pid}} {{index .Config.Labels "` + labelComponent + `"}}{{range .NetworkSettings.Networks}} {{.IPAddress}}{{end}}`
	lines, err := e.ask(context.Background(), slices.Concat([]string{"inspect", "--format", format}, strings.Fields(names))...)
	out = runningContainers{byPID: make(map[int]string), byAddr: make(map[string]string)}
	for line := range strings.Lines(lines) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		state, id := fields[0], fields[2]
		pid, _ := strconv.Atoi(fields[1])
		switch {
		case pid > 0:
			out.byPID[pid] = id
			for _, addr := range fields[3:] {
				out.byAddr[addr] = id
			}
		case state == "created":
			starting = id
		}
	}
	return out, starting, err
}

// inside returns the command that runs argv in the container, or argv where ctr is nil.
func (ctr *container) inside(argv []string) []string {
	if ctr == nil {
		return argv
	}
	return slices.Concat([]string{ctr.engine.path, "exec", ctr.name}, argv)
}

// checkRuns fails unless the container runs.
func (ctr *container) checkRuns(ctx context.Context) error {
	out, err := ctr.engine.ask(ctx, "inspect", "--format", "{{.State.Running}}", ctr.name)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil && strings.TrimSpace(out) != "true":
		return errors.New("not started")
	}
	return err
}

// signal has the engine send sig to the container. It fails while that does not run.
func (ctr *container) signal(sig syscall.Signal) error {
	_, err := ctr.engine.ask(context.Background(), "kill", "--signal", stopSignalNames[slices.Index(stopSignals, sig)], ctr.name)
	return err
}

// remove removes the container, if there is one.
func (ctr *container) remove() error {
	if _, err := ctr.engine.remove(context.Background(), "name="+ctr.name); err != nil {
		return fmt.Errorf("container %s may be left: %v", ctr.name, err)
	}
	return nil
}

// remove removes the containers that match filter, of ENGINE ps, and returns their names. It
// fails where some are still there after engineTimeout.
func (e *engine) remove(ctx context.Context, filter string) (names []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	for pause := time.Duration(0); ; pause = max(2*pause, askAgain) {
		out, listErr := e.ask(ctx, "ps", "--all", "--filter", filter, "--format", "{{.Names}}")
		left := strings.Fields(out)
		switch {
		case listErr != nil:
			return names, cmp.Or(err, listErr)
		case len(left) == 0:
			return names, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return names, cmp.Or(err, fmt.Errorf("%s rm has not removed %s", e.name, enumerate(left)))
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

// noAnswer returns err, of an engine that cannot be used, with what to do about it.
func (e *engine) noAnswer(err error) error {
	advice := "start it: systemctl start docker; DOCKER_HOST names another"
	switch {
	case strings.Contains(err.Error(), "permission denied"):
		advice = "run flowctl as a user who may use that socket, such as one of the group docker"
	case filepath.Base(e.path) != "docker":
		advice = "try: " + e.name + " ps"
	}
	said := requestURL().ReplaceAllString(err.Error(), "")
	return fmt.Errorf("the container engine %s cannot be used: %s (%s)", e.name, said, advice)
}

// requestURL is how docker has asked its daemon. It is long, and the reason comes after it.
var requestURL = pattern(`(Get|Head|Post) "http[^"]*": `)

// pull pulls an image, however long that takes. The engine's last line is the reason of a failure.
func (e *engine) pull(ctx context.Context, image string, progress func(image, said string)) error {
	progress(image, "")
	r, w := io.Pipe()
	cmd := e.command(ctx, "pull", image)
	cmd.Stdout, cmd.Stderr = w, w
	if err := e.commands.start(cmd); err != nil {
		return cause(err)
	}
	last := ""
	var reading sync.WaitGroup
	reading.Go(func() {
		for scanner := bufio.NewScanner(r); scanner.Scan(); {
			if last = scanner.Text(); last != "" {
				progress(image, last)
			}
		}
		_, _ = io.Copy(io.Discard, r) // the rest after a line that was too long
	})
	err := e.commands.wait(cmd)
	w.Close()
	reading.Wait()
	if err != nil && last != "" {
		return errors.New(last)
	}
	return err
}

// ask runs a command of the engine and returns what it prints. It fails with what the engine
// says, or that it did not answer within engineTimeout.
func (e *engine) ask(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := e.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := e.commands.start(cmd)
	if err == nil {
		err = e.commands.wait(cmd)
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

// command returns a command of the engine, in a process group that Ctrl-C does not reach.
func (e *engine) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, e.path, args...)
	cmd.Args[0], cmd.Env = e.name, e.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// removeUntilGone removes the containers with label until there were none so many times in a row, with a
// pause between: the engine may still be making one, of which nothing tells.
func (e *engine) removeUntilGone(label string, pause time.Duration, tries int) {
	deadline := time.Now().Add(2 * engineTimeout)
	for quiet := 0; quiet < tries && time.Now().Before(deadline); quiet++ {
		if names, _ := e.remove(context.Background(), "label="+label); len(names) > 0 {
			quiet = 0
		}
		time.Sleep(pause)
	}
}
