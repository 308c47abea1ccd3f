package main

// What is right in a pipeline file and would hardly work on this machine now: what check warns of, and
// run at its start.

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// checkReport is what check -json prints.
type checkReport struct {
	File     string      `json:"file"`
	OK       bool        `json:"ok"` // no errors; with -strict no warnings either
	Pipeline string      `json:"pipeline,omitempty"`
	Errors   []fileError `json:"errors"`
	Warnings []warning   `json:"warnings"`
	More     int         `json:"more_errors,omitempty"` // that are not in Errors
}

// warner tells the log of a run what check warns of.
type warner struct {
	log          *slog.Logger
	orchestrator string
	ttl          time.Duration
	told         map[warning]bool
}

func newWarner(engine *engine, ttl time.Duration, log *slog.Logger) *warner {
	w := &warner{log: log, orchestrator: orchestrateProcesses, ttl: ttl, told: make(map[warning]bool)}
	if engine != nil {
		w.orchestrator = orchestrateContainers
	}
	return w
}

// warn tells what check warns of in p and was not told before. It does not wait for a disk that hangs.
func (w *warner) warn(p *Pipeline) {
	var found []warning
	_, err := newDiskTurn(diskTime).do("the programs and folders of the pipeline", func() error {
		found = p.warnings(w.orchestrator, w.ttl)
		return nil
	})
	if err != nil { // found may be set yet
		w.log.Warn("the pipeline is not checked", "err", err)
		return
	}
	for _, f := range found {
		if !w.told[f] {
			w.told[f] = true
			log := w.log
			if f.Component != "" {
				log = log.With("component", f.Component)
			}
			log.Warn("check warns", "field", f.Field, "reason", f.Message)
		}
	}
}

// unitFolders are the folders that a unit of systemd has in its environment, as flowctl.service gives them.
var unitFolders = map[string]string{
	"STATE_DIRECTORY": "/var/lib/flowctl", "RUNTIME_DIRECTORY": "/run/flowctl", "LOGS_DIRECTORY": "/var/log/flowctl",
	"CACHE_DIRECTORY": "/var/cache/flowctl", "CONFIGURATION_DIRECTORY": "/etc/flowctl", "CREDENTIALS_DIRECTORY": "/run/credentials/flowctl.service",
}

// orOfUnit looks variables up by lookup. Of those that it does not have the folders of a unit have a value: a
// server's file is to be checked by hand.
func orOfUnit(lookup func(string) (string, bool)) func(string) (string, bool) {
	return func(name string) (string, bool) {
		value, ok := lookup(name)
		if !ok {
			value = unitFolders[name]
		}
		return value, ok
	}
}

// warnings returns what reading p has noted; then which programs, folders and files of p do not exist
// or cannot be used, what it gives in vain, two components with the same port, and events that are read
// and not put out.
func (p *Pipeline) warnings(orchestrator string, ttl time.Duration) []warning {
	out := append([]warning{}, p.Notes...) // empty in JSON, not null
	ports := make(map[string]string)       // component by port
	for _, c := range p.components() {
		warn := func(field, format string, args ...any) {
			noted := func(w warning) bool { return w.Component == c.ID && w.Field == field } // that says why
			if !slices.ContainsFunc(p.Notes, noted) {
				out = append(out, warning{c.ID, field, fmt.Sprintf(format, args...)})
			}
		}
		var unread []warning
		own, _ := c.variables(func(name, path string) (string, error) {
			value, err := readEnvFile(newDiskTurn(diskTime), path)
			if err != nil {
				unread = append(unread, warning{c.ID, "env_files." + name, err.Error()})
			}
			return value, nil
		})
		vars := own
		if c.Image == "" {
			vars = envMap(baseEnv())
			maps.Copy(vars, own)
			c.commandWarnings(vars["PATH"], warn)
		} else {
			c.imageWarnings(orchestrator, warn)
		}
		for _, w := range unread {
			warn(w.Field, "%s", w.Message)
		}
		c.variableWarnings(own, vars, warn)
		if every := c.healthInterval(); c.HealthCheck != "" && every > ttl {
			warn("health_interval", "a check each %s is too rare for a heartbeat TTL of %s: it is stale in between, unless it sends heartbeats", every, ttl)
		}
		take := func(field, port string) {
			if other, taken := ports[port]; taken {
				warn(field, "port %s is that of component %s too", port, other)
			}
			ports[port] = c.ID
		}
		if port := fileEnv(c, "HEALTH_PORT"); port != "" {
			take("env.HEALTH_PORT", port)
		}
		for i, port := range c.Ports {
			take(fmt.Sprintf("ports[%d]", i), publishedPort(port))
		}
		for _, event := range p.unheardEvents(c) {
			warn("input_event_types", "no input of it puts out %q", event)
		}
	}
	return out
}

// shellOperators mean nothing where no shell reads them.
var shellOperators = []string{"|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1"}

// commandWarnings is about the folder and the programs of c, where its PATH is path.
func (c *Component) commandWarnings(path string, warn func(field, format string, args ...any)) {
	if dir, err := os.Stat(c.WorkingDir); err != nil {
		warn("working_dir", "%v", err)
	} else if !dir.IsDir() {
		warn("working_dir", "%q is no folder", c.WorkingDir)
	}
	find := func(name string) (string, error) {
		file, err := findProgram(name, path, c.WorkingDir)
		if err == nil {
			_, err = exec.LookPath(file)
		}
		return file, err
	}
	if file, err := find(c.Command[0]); err != nil {
		warn("command", "%v", describeProgram(c.Command[0], file, c.WorkingDir, err))
	} else if fault := programFault(file); fault != "" {
		warn("command", "cannot run %q: %s", c.Command[0], fault)
	}
	c.argumentWarnings("command", c.Command[1:], 1, warn)
	c.argumentWarnings("args", c.Args, 0, warn)
	if i := slices.IndexFunc(c.HealthCommand, func(arg string) bool { return slices.Contains(shellOperators, arg) }); i > 0 {
		warn("health_check", "no shell reads it, and %s is an argument: write exec:sh -c '...'", quote(c.HealthCommand[i]))
	}
	if len(c.HealthCommand) > 0 {
		if _, err := find(c.HealthCommand[0]); err != nil {
			warn("health_check", "cannot run %q: %v", c.HealthCommand[0], cause(err))
		}
	}
}

// argumentWarnings is about arguments that are paths of the folder where flowctl was started, and not of the one
// that c runs in. The first of them is the one at index first of field.
func (c *Component) argumentWarnings(field string, args []string, first int, warn func(field, format string, args ...any)) {
	for i, arg := range args {
		if !strings.Contains(arg, "/") || filepath.IsAbs(arg) {
			continue
		}
		if _, err := os.Stat(filepath.Join(c.WorkingDir, arg)); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if right := pathFrom(c.WorkingDir, arg); right != "" {
			warn(fmt.Sprintf("%s[%d]", field, first+i), "%s exists in the folder that flowctl was started in, but the component runs in %q: write %s",
				quote(arg), c.WorkingDir, quote(right))
		}
	}
}

// variableWarnings is about what the file sets for c, own, and about the size of all that c gets.
func (c *Component) variableWarnings(own, vars map[string]string, warn func(field, format string, args ...any)) {
	for _, name := range slices.Sorted(maps.Keys(own)) {
		switch {
		case slices.Contains(fixedVars, name), c.TLS && slices.Contains(tlsVars, name):
			warn(c.fieldOf(name), "flowctl sets it, and ignores what the file gives")
		case name == heartbeatVar:
			if _, err := time.ParseDuration(own[name]); err != nil {
				warn(c.fieldOf(name), "%s is no time with a unit, such as 5s: FLOWCTL_HEARTBEAT_INTERVAL_MS does not follow it", quote(own[name]))
			}
		}
	}
	var env []string
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		env = append(env, name+"="+vars[name])
	}
	if fault := sizeFault(slices.Concat(c.Command, c.Args), env); fault != "" {
		warn("command", "cannot be run: %s", fault)
	}
}

// fieldOf returns the field of the file that sets a variable of c.
func (c *Component) fieldOf(name string) string {
	if _, ok := c.Env[name]; ok {
		return "env." + name
	}
	if _, ok := c.EnvFiles[name]; ok {
		return "env_files." + name
	}
	for _, key := range slices.Sorted(maps.Keys(c.Config)) {
		if strings.ToUpper(key) == name {
			return "config." + key
		}
	}
	return "env"
}

func (c *Component) imageWarnings(orchestrator string, warn func(field, format string, args ...any)) {
	if orchestrator != orchestrateContainers {
		warn("image", "needs -orchestrator container")
	}
	for i, volume := range c.Volumes {
		if host, _, isPath := volumeHost(volume); !isPath {
			continue
		} else if _, err := os.Stat(host); err != nil {
			warn(fmt.Sprintf("volumes[%d]", i), "%v", err)
		}
	}
}
