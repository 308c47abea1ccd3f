package main

// What translate makes of a pipeline for Docker Compose: one project, in JSON, which is YAML too.

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// composeFile is a project. Each $ in it is doubled, but for variables that are secrets.
type composeFile struct {
	Name     string                    `json:"name"`
	Services map[string]composeService `json:"services"`
	Configs  map[string]object         `json:"configs"`
	Volumes  map[string]object         `json:"volumes"`
}

type composeService struct {
	Image           string            `json:"image"`
	Command         []string          `json:"command,omitempty"`
	Environment     map[string]string `json:"environment,omitempty"`
	User            string            `json:"user,omitempty"`
	WorkingDir      string            `json:"working_dir,omitempty"`
	Volumes         []object          `json:"volumes,omitempty"`
	Tmpfs           []string          `json:"tmpfs,omitempty"`
	Configs         []object          `json:"configs,omitempty"`
	Ports           []string          `json:"ports,omitempty"`
	DependsOn       map[string]object `json:"depends_on,omitempty"`
	Healthcheck     object            `json:"healthcheck,omitempty"`
	Restart         string            `json:"restart"`
	StopGracePeriod string            `json:"stop_grace_period,omitempty"`
	StopSignal      string            `json:"stop_signal,omitempty"`
	ReadOnly        bool              `json:"read_only,omitempty"`
	CapDrop         []string          `json:"cap_drop,omitempty"`
	SecurityOpt     []string          `json:"security_opt,omitempty"`
}

// What a service has to be for another one to start.
const (
	composeHealthy   = "service_healthy"
	composeCompleted = "service_completed_successfully"

	waitSuffix = "-wait" // of what waits before a component starts, after its id

	composeState = "flowctl-state"
)

var composeName = pattern(`^[a-z0-9][a-z0-9_-]*$`)

func checkForCompose(t *translation, f findings) {
	if name := &t.p.Metadata.Name; !composeName().MatchString(strings.ToLower(*name)) {
		f.wrong(name, "cannot be a name of compose, which has letters, digits, _ and -, and begins with one of the first two: %s", quote(*name))
	}
	checkCollisions(f, t.p.components(), func(id string) string { return strings.ToLower(variableOf(id)) })
}

func checkComponentForCompose(t *translation, f findings, c *Component) {
	if of, ok := strings.CutSuffix(c.ID, waitSuffix); ok && slices.Contains(t.p.ids(), of) {
		f.wrong(&c.ID, "%s is what flowctl calls something of its own there: choose another", quote(c.ID))
	}
	for i, volume := range c.Volumes {
		if host, _, isPath := volumeHost(volume); !isPath && host == composeState {
			f.wrongEntry(&c.Volumes, i, "%s is the volume of the control plane there: choose another", quote(host))
		}
	}
}

// composePlane is where the control plane listens.
var composePlane = planeName + ":" + strconv.Itoa(planePort)

func toCompose(t *translation) any {
	out := composeFile{
		Name: strings.ToLower(t.p.Metadata.Name), Services: map[string]composeService{planeName: t.composePlane()},
		Configs: map[string]object{"pipeline": {"content": doubleDollars(t.planeFile(t.isKnownToCompose))}},
		Volumes: map[string]object{composeState: {}},
	}
	for _, c := range t.p.components() {
		t.composeComponent(c, out.Services)
		for _, volume := range c.Volumes {
			if host, _, isPath := volumeHost(volume); !isPath {
				out.Volumes[host] = object{}
			}
		}
	}
	if t.canEnd() {
		done := t.composeOwn(doneArgs(composePlane)...)
		done.DependsOn = composeAfter(composeCompleted, t.oneshots()...)
		maps.Copy(done.DependsOn, composeAfter(composeHealthy, planeName))
		out.Services[doneName] = done
		t.advice = append(t.advice, "# This waits until all events have been moved, where flowctl moves them, once the project is up:", "docker compose wait "+doneName)
	}
	if len(t.advice) > 0 {
		t.advice = append([]string{"# With the output as compose.json, and COMPOSE_FILE=compose.json:"}, t.advice...)
	}
	return out
}

// isKnownToCompose tells whether c is in the file of the control plane: compose itself waits for a oneshot, but a pipeline
// needs a component.
func (t *translation) isKnownToCompose(c *Component) bool {
	return !c.Oneshot || len(t.oneshots()) == len(t.p.ids())
}

// composePlane returns the control plane. Its health is that it answers itself.
func (t *translation) composePlane() composeService {
	s := t.composeOwn(serverArgs("-advertise", composePlane)...)
	s.Environment = map[string]string{"XDG_RUNTIME_DIR": "/tmp"}
	s.Tmpfs = []string{"/tmp"}
	s.Configs = []object{{"source": "pipeline", "target": planeFilePath}}
	s.Volumes = []object{{"type": "volume", "source": composeState, "target": planeState}}
	s.Restart = "unless-stopped"
	s.Healthcheck = object{
		"test": append([]string{"CMD", imageProgram, "wait", "-timeout", "5s"}, waitArgs("127.0.0.1:" + strconv.Itoa(planePort))[1:]...), "interval": "2s", "timeout": "10s", "retries": 30,
	}
	return s
}

// composeOwn returns a service of flowctl itself, with no more rights than it needs.
func (t *translation) composeOwn(args ...string) composeService {
	return composeService{
		Image: doubleDollars(t.image), Command: doubleInAll(args), Restart: restartNo,
		ReadOnly: true, CapDrop: []string{"ALL"}, SecurityOpt: []string{"no-new-privileges:true"},
	}
}

// composeAfter is that a service waits until others are so.
func composeAfter(condition string, ids ...string) map[string]object {
	out := make(map[string]object)
	for _, id := range ids {
		out[id] = object{"condition": condition}
	}
	return out
}

// oneshots returns the ids of those.
func (t *translation) oneshots() []string {
	return t.p.idsWhere(func(c *Component) bool { return c.Oneshot })
}

// composeComponent adds c to services, with what waits for others before it.
func (t *translation) composeComponent(c *Component, services map[string]composeService) {
	oneshots, waits := []string{}, []string{}
	for _, id := range t.waitsFor(c) {
		if slices.Contains(t.oneshots(), id) {
			oneshots = append(oneshots, id)
		} else {
			waits = append(waits, id)
		}
	}
	own := t.composeService(c)
	own.DependsOn = composeAfter(composeCompleted, oneshots...)
	if len(waits) > 0 {
		wait := t.composeOwn(waitArgs(composePlane, waits...)...)
		wait.DependsOn = composeAfter(composeHealthy, planeName)
		services[c.ID+waitSuffix] = wait
		maps.Copy(own.DependsOn, composeAfter(composeCompleted, c.ID+waitSuffix))
	} else {
		maps.Copy(own.DependsOn, composeAfter(composeHealthy, planeName))
	}
	services[c.ID] = own
	if c.RestartPolicy == restartAlways && c.MaxRestarts > 0 {
		t.warn(c, "max_restarts", "is lost: compose starts it again for ever")
	}
	switch {
	case c.StartTimeout != 0 && own.Healthcheck == nil:
		t.warn(c, "start_timeout", "is lost: compose does not know when it has started")
	case c.HealthCheck != "" && c.registers() && own.Healthcheck != nil:
		t.warn(c, "health_check", "is made by compose alone: it is no heartbeat for the control plane")
	case c.HealthCheck != "" && c.registers():
		t.warn(c, "health_check", "is lost: compose makes none but exec:, in the container itself")
	}
}

// composeService returns c itself.
func (t *translation) composeService(c *Component) composeService {
	s := composeService{
		Image: doubleDollars(c.Image), Command: doubleInAll(c.Args), Environment: doubleInValues(t.variables(c, composePlane)), User: doubleDollars(c.User),
		WorkingDir: doubleDollars(c.WorkingDir), Ports: c.Ports, Restart: restartNo, StopGracePeriod: strconv.Itoa(c.stopSeconds()) + "s", StopSignal: c.StopSignal,
	}
	switch {
	case c.RestartPolicy == restartOnFailure && c.MaxRestarts > 0:
		s.Restart = fmt.Sprintf("%s:%d", restartOnFailure, c.MaxRestarts)
	case c.RestartPolicy != "":
		s.Restart = c.RestartPolicy
	}
	for _, volume := range c.Volumes {
		host, rest, isPath := volumeHost(volume)
		path, options, _ := strings.Cut(rest, ":")
		mount := object{"type": "volume", "source": doubleDollars(host), "target": doubleDollars(path)}
		if isPath {
			mount["type"] = "bind"
		}
		if slices.Contains(strings.Split(options, ","), "ro") {
			mount["read_only"] = true
		}
		s.Volumes = append(s.Volumes, mount)
	}
	for _, name := range slices.Sorted(maps.Keys(c.EnvFiles)) {
		variable := secretVariable(c.ID, name)
		s.Environment[name] = "${" + variable + ":?}"
		t.advice = append(t.advice, fmt.Sprintf(`export %s="$(cat %s)"`, variable, shellWord(c.EnvFiles[name])))
	}
	if len(c.HealthCommand) > 0 {
		s.Healthcheck = object{
			"test": append([]string{"CMD"}, doubleInAll(c.HealthCommand)...), "interval": c.healthInterval().String(), "timeout": c.healthTimeout().String(), "retries": c.healthRetries(),
			"start_period": (time.Duration(c.startSeconds()) * time.Second).String(),
		}
	}
	return s
}

// secretVariable is the variable from which compose takes the secret name of a component.
func secretVariable(id, name string) string { return "SECRET_" + variableOf(id) + "_" + name }

// variableOf is id as a part of a variable.
func variableOf(id string) string { return strings.NewReplacer(".", "_", "-", "_").Replace(id) }
