package main

// What other tools and the predecessor write in a pipeline file, and what takes its place.

import (
	"cmp"
	"fmt"
	"reflect"
	"strings"
)

// yamlDefaults are the files that the predecessor's run takes, and people name like ours. To read one is an error that
// shows yamlCommand.
var yamlDefaults = []string{"flow.yml", "flow.yaml"}

// yamlCommand returns the shell command that turns a YAML file into JSON.
func yamlCommand(from, to string) string {
	return "python3 -c 'import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin.buffer), sys.stdout, indent=2, default=str)' < " +
		shellWord(from) + " > " + shellWord(to)
}

// foreignFields are fields of other tools (compose, systemd, supervisord, Kubernetes), in lower case
// without _ and -, each after the one that takes its place in a component.
var foreignFields = map[string][]string{
	"id":             {"name", "containername"},
	"command":        {"binary", "cmd", "entrypoint", "exec", "execstart", "program", "run", "script"},
	"env":            {"environment", "environ", "envs", "envvars", "variables", "vars"},
	"env_files":      {"environmentfile", "environmentfiles", "envfrom", "secret", "secrets", "credentials", "loadcredential"},
	"config":         {"parameters", "params", "settings"},
	"working_dir":    {"cwd", "chdir", "dir", "directory", "workdir", "workingdirectory"},
	"inputs":         {"from", "reads", "upstream", "upstreams"},
	"depends_on":     {"after", "bindsto", "depends", "dependencies", "links", "needs", "requires", "wants"},
	"restart_policy": {"autorestart", "restart"},
	"max_restarts":   {"maxretries", "startlimitburst", "startretries"},
	"start_timeout":  {"startperiod", "startsecs", "timeoutstartsec"},
	"stop_timeout":   {"killtimeout", "shutdowntimeout", "stopgraceperiod", "stopwaitsecs", "terminationgraceperiodseconds", "timeoutstopsec"},
	"stop_signal":    {"killsignal", "shutdownsignal"},
	"health_check":   {"check", "health", "livenessprobe", "probe", "readiness", "readinessprobe", "startupprobe"},
	"volumes":        {"mounts", "volumemounts"},
	"ports":          {"expose", "publish"},
}

const eachCopy = ": each copy is a component of its own"

// foreignHints say what to do about fields, written as in foreignFields, whose place no single field takes.
var foreignHints = map[reflect.Type]map[string]string{
	reflect.TypeFor[Pipeline]():  {"tls": ": -tls-cert, -tls-key and -tls-ca-cert take its place", "loglevel": ": -log-level takes its place"},
	reflect.TypeFor[Spec]():      {"flow": ": the inputs of each component take its place", "pipelines": ": what is in it belongs in sources, processors, sinks or services"},
	reflect.TypeFor[Component](): {"instances": eachCopy, "numprocs": eachCopy, "replicas": eachCopy, "scale": eachCopy},
}

// formerFields are fields of the predecessor's files that had no effect when it ran them. Each is a
// warning, which says what takes its place.
var formerFields = map[reflect.Type]map[string]string{
	reflect.TypeFor[Metadata](): {
		"annotations": "has no effect: metadata.labels takes its place",
		"description": "has no effect: spec.description takes its place",
		"namespace":   "has no effect: a pipeline is known by its metadata.name alone",
	},
	reflect.TypeFor[Spec](): {
		"config": "has no effect: the config of each component that needs it takes its place",
		"driver": "has no effect: -orchestrator takes its place, which is process or container",
	},
	reflect.TypeFor[Component](): {
		"health_endpoint": "has no effect: health_check takes its place",
		"health_port":     "has no effect: env.HEALTH_PORT takes its place, and without it flowctl chooses a free port",
		"replicas":        "has no effect, one of it runs" + eachCopy,
		"resources":       "has no effect: limit the whole pipeline, such as by MemoryMax= and CPUQuota= of its unit",
	},
}

// wholeHealthCheck says what to write for a health_check that is a path, where the file gives the port or "".
func wholeHealthCheck(path, port string) string {
	path, _, _ = strings.Cut(path, "?") // which may be secret
	return fmt.Sprintf("has no effect, because it is a path: write the whole address, such as %s",
		quote("http://localhost:"+cmp.Or(port, "$HEALTH_PORT")+path))
}

// downloadName matches a type that named a program which the predecessor downloaded.
var downloadName = pattern(`^((?:[\w.-]+/)*)([\w.-]+)@([^\s@]+)$`)

// insteadOfDownload says what to write in the place of a type that names a download, "" for any other.
func insteadOfDownload(name string) string {
	m := downloadName().FindStringSubmatch(name)
	if m == nil {
		return ""
	}
	image := "docker.io/" + cmp.Or(m[1], "withobsrvr/") + m[2] + ":" + m[3]
	return fmt.Sprintf("%s names a download, and flowctl makes none: write the program as command, such as [%s], or its image, such as %s",
		quote(name), quote("./bin/"+m[2]), quote(image))
}

// entryOf returns the entry of ports or volumes that an object of the predecessor stands for, "" for none. Its
// members are told by of, "" for one that it does not have.
func entryOf(field string, of func(name string) string) string {
	var outside, inside, rest string
	switch field {
	case "ports":
		inside = of("containerPort")
		outside = cmp.Or(of("hostPort"), inside)
		if protocol := strings.ToLower(of("protocol")); protocol != "" && protocol != "tcp" {
			rest = "/" + protocol
		}
	case "volumes":
		inside = cmp.Or(of("container_path"), of("mountPath"))
		outside = cmp.Or(of("host_path"), of("hostPath"), of("name"))
		if of("readonly") == "true" {
			rest = ":ro"
		}
	}
	if outside == "" || inside == "" {
		return ""
	}
	return outside + ":" + inside + rest
}

// shellSyntax matches what only a shell would understand.
var shellSyntax = pattern("[|<>;`]|&&|\\$[A-Za-z_(]|^\\s*\\w+=")

// listOf returns the strings, quoted, of the list that a text means: of a command, by a shell where it needs one.
func listOf(text string, command bool) string {
	list, err := words(text)
	switch {
	case command && shellSyntax().MatchString(text):
		list = []string{"sh", "-c", text}
	case err != nil || len(list) == 0 || len(list) > 10:
		list = []string{"..."}
	}
	for i := range list {
		list[i] = quote(list[i])
	}
	return strings.Join(list, ", ")
}
