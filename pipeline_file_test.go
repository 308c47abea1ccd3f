package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unicode"
	"unicode/utf8"
)

// Line 1 of every file that specFile makes.
const pipelineHead = `{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "p"}, "spec": {`

func specFile(lists string) string { return pipelineHead + "\n" + lists + "\n}}" }

// componentFile makes a file whose one component, on line 2, has these fields beside its id.
func componentFile(fields string) string {
	return specFile(`"processors": [{"id": "a", ` + fields + `}]`)
}

// commandFile is componentFile with a command; the fields begin in column 46.
func commandFile(fields string) string { return componentFile(`"command": ["x"], ` + fields) }

var pipelineVars = map[string]string{
	"HOME": "/home/me", "EMPTY": "", "ID": "ledgers", "WAIT": "5s", "REF": "${HOME} $$ ${", "NUL": "a\x00b", "BAD": "\xff",
	"BIG": strings.Repeat("x", 100_000), "PORT": "8080",
}

func pipelineEnv(name string) (string, bool) {
	value, ok := pipelineVars[name]
	return value, ok
}

// A row without want is a file that is right.
type pipelineRow struct {
	name, in string
	want     []string // the lines of the error, after "p.json:"
}

// fileRows are about the syntax, fields and types, and references to the environment.
var fileRows = []pipelineRow{
	// Syntax.
	{"empty file", "", []string{`1:1: the file is empty`}},
	{"only space", " \n\t", []string{`1:1: the file is empty`}},
	{"byte order mark", "\ufeff{}", []string{`1:1: the file begins with a byte order mark, save it as UTF-8 without one`}},
	{"latin-1", "{\n \"k\xe9y\": 1}", []string{`2:4: the file is not UTF-8`}},
	{"comment", `{
  // a comment
}`, []string{
		`2:3: invalid character '/' looking for beginning of object key string: JSON has no comments`,
	}},
	{"hash comment", `{}
# end`, []string{
		`2:1: invalid character '#' after top-level value: JSON has no comments`,
	}},
	{"trailing comma in a list", "{\"spec\": [1, 2, ]}", []string{`1:17: invalid character ']' looking for beginning of value: remove the comma before it`}},
	{"trailing comma in an object", `{"kind": "Pipeline",
}`, []string{
		`2:1: invalid character '}' looking for beginning of object key string: remove the comma before it`,
	}},
	{"single quotes", `{'kind': 1}`, []string{`1:2: invalid character '\'' looking for beginning of object key string: strings are in "double quotes"`}},
	{"curly quotes", `{“kind”: 1}`, []string{`1:2: invalid character '“' looking for beginning of object key string: strings are in "double quotes"`}},
	{"missing comma", `{"a": 1
 "b": 2}`, []string{
		`2:2: invalid character '"' after object key:value pair: is a comma missing?`,
	}},
	{"missing comma in a list", `["é", "é" "c"]`, []string{`1:11: invalid character '"' after array element: is a comma missing?`}},
	{"text after the end", `{}
{}`, []string{
		`2:1: invalid character '{' after top-level value: the file must be one object`,
	}},
	{"cut off", `{"kind": "Pipeline",
`, []string{
		`2:1: unexpected end of file: a closing bracket or quote is missing`,
	}},
	{"line break in a string", `{"kind": "a
b"}`, []string{
		`1:12: invalid character '\n' in string literal`,
	}},
	{"slash in a number", `{"a": 1/2}`, []string{`1:8: invalid character '/' after object key:value pair: JSON has no comments`}},
	{"escape character", "{\x1b[31m}", []string{`1:2: invalid character '\x1b' looking for beginning of object key string`}},
	{"yaml in a json file", "apiVersion: flowctl/v1\n", []string{
		`1:1: invalid character 'a' looking for beginning of value: a pipeline file is JSON and begins with {`,
	}},
	{"deeper than encoding/json goes", strings.Repeat("[", 10_001) + strings.Repeat("]", 10_001), []string{
		`1:10001: invalid character '[' exceeded max depth`,
	}},
	{"deep", strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000), []string{`1:102: more than 100 levels of lists and objects`}},
	{"too deep by one", commandFile(`"config": {"a": ` + strings.Repeat("[", 97) + strings.Repeat("]", 97) + `}`), []string{
		`2:158: more than 100 levels of lists and objects`,
	}},
	{"as deep as allowed", commandFile(`"config": {"a": ` + strings.Repeat("[", 95) + strings.Repeat("]", 95) + `}`), nil},
	{"larger than 4 MiB", strings.Repeat(" ", maxFileSize+1), []string{`1:1: the file is larger than 4 MiB`}},
	{"as large as allowed", specFile(`"sources": [{"id": "a", "command": ["x"]}]`) + strings.Repeat(" ", maxFileSize-len(specFile(`"sources": [{"id": "a", "command": ["x"]}]`))), nil},

	// Fields and types.
	{"not an object", `[]`, []string{`1:1: must be an object, not a list`}},
	{"null", `null`, []string{`1:1: must be an object, not null`}},
	{"nothing given", `{}`, []string{
		`1:1: apiVersion: is missing, it must be flowctl/v1`,
		`1:1: kind: is missing, it must be Pipeline`,
		`1:1: metadata: is missing`,
		`1:1: spec: is missing`,
	}},
	{"everything of a wrong type", `{"apiVersion": 1, "kind": true, "metadata": [], "spec": "x"}`, []string{
		`1:16: apiVersion: must be a string, not a number: write "1"`,
		`1:27: kind: must be a string, not true or false: write "true"`,
		`1:45: metadata: must be an object, not a list`,
		`1:57: spec: must be an object, not a string`,
	}},
	{"wrong version and kind", `{"apiVersion": "flowctl/v2", "kind": "Pipe", "metadata": {"name": "p", "labels": {"a": "b"}}, "spec": {"sinks": [{"id": "a", "command": ["x"]}]}}`, []string{
		`1:16: apiVersion: must be flowctl/v1, not "flowctl/v2"`,
		`1:38: kind: must be Pipeline, not "Pipe"`,
	}},
	{"empty version and kind", `{"apiVersion": "", "kind": "", "metadata": {"name": "", "labels": null}, "spec": {"sources": []}}`, []string{
		`1:16: apiVersion: must be flowctl/v1`,
		`1:28: kind: must be Pipeline`,
		`1:53: metadata.name: must be a name of letters, digits, dots, _ and -`,
		`1:67: metadata.labels: must be an object, not null`,
		`1:82: spec: needs at least one component in sources, processors, sinks or services`,
	}},
	{"bad name", `{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "a b"}, "spec": {"sinks": [{"id": "a", "command": ["x"]}]}}`, []string{
		`1:71: metadata.name: must be a name of letters, digits, dots, _ and -, at most 63, not "a b"`,
	}},
	{"no components", specFile(`"sources": [], "description": "d"`), []string{`1:85: spec: needs at least one component in sources, processors, sinks or services`}},
	{"lists of a wrong type", specFile(`"sources": {"id": "a"}, "processors": null, "sinks": ["a"]`), []string{
		`2:12: spec.sources: must be a list, not an object`,
		`2:39: spec.processors: must be a list, not null`,
		`2:55: spec.sinks[0]: must be an object, not a string`,
	}},
	{"misspelt list", specFile(`"source": [{"id": "a"}]`), []string{`2:1: spec.source: unknown field "source", did you mean "sources"?`}},
	{"misspelt fields", specFile(`"sources": [{"id": "a", "comand": ["x"], "argz": 1, "depends-on": [], "dependsOn": [], "restartPolicy": "no", "ENV": {}}]`), []string{
		`2:25: spec.sources[0].comand: unknown field "comand", did you mean "command"?`,
		`2:42: spec.sources[0].argz: unknown field "argz", did you mean "args"?`,
		`2:53: spec.sources[0]["depends-on"]: unknown field "depends-on", did you mean "depends_on"?`,
		`2:71: spec.sources[0].dependsOn: unknown field "dependsOn", did you mean "depends_on"?`,
		`2:88: spec.sources[0].restartPolicy: unknown field "restartPolicy", did you mean "restart_policy"?`,
		`2:111: spec.sources[0].ENV: unknown field "ENV", did you mean "env"?`,
	}},
	{"misspelt at the top", `{"api_version": "flowctl/v1", "Kind": "Pipeline", "meta": 1, "specs": {}}`, []string{
		`1:1: metadata: is missing`,
		`1:2: api_version: unknown field "api_version", did you mean "apiVersion"?`,
		`1:31: Kind: unknown field "Kind", did you mean "kind"?`,
		`1:51: meta: unknown field "meta"`,
		`1:62: specs: unknown field "specs", did you mean "spec"?`,
	}},
	{"fields of other levels", specFile(`"name": "x", "command": [], "inputs": [], "labels": {}, "sources": [{"name": "a", "command": ["x"], "kind": "b", "description": "c"}]`), []string{
		`2:1: spec.name: unknown field "name", it belongs in metadata`,
		`2:14: spec.command: unknown field "command", it belongs in a component`,
		`2:29: spec.inputs: unknown field "inputs", it belongs in a component`,
		`2:43: spec.labels: unknown field "labels", it belongs in metadata or in a component`,
		`2:70: spec.sources[0].name: unknown field "name", did you mean "id"?`,
		`2:101: spec.sources[0].kind: unknown field "kind", it belongs at the top level`,
		`2:114: spec.sources[0].description: unknown field "description", it belongs in spec`,
	}},
	{"nothing like it", commandFile(`"-": 1, "": 2, "xyzzy": 3, "web site": 4, "\u001b[31m": 5`), []string{
		`2:46: spec.processors[0]["-"]: unknown field "-"`,
		`2:54: spec.processors[0][""]: unknown field ""`,
		`2:61: spec.processors[0].xyzzy: unknown field "xyzzy"`,
		`2:73: spec.processors[0]["web site"]: unknown field "web site"`,
		`2:88: spec.processors[0]["\x1b[31m"]: unknown field "\x1b[31m"`,
	}},
	{"long field", commandFile(`"` + strings.Repeat("é", 81) + `": 1`), []string{
		`2:46: spec.processors[0]["éééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééé…"]: unknown field "éééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééééé…"`,
	}},
	{"misspelt beside the right one", commandFile(`"comand": ["y"]`), []string{
		`2:46: spec.processors[0].comand: unknown field "comand", did you mean "command"?`,
	}},
	{"wrong id field spares the references", specFile(`"sources": [{"Id": "a", "command": ["x"]}], "sinks": [{"id": "b", "command": ["x"], "inputs": ["a"]}]`), []string{
		`2:14: spec.sources[0].Id: unknown field "Id", did you mean "id"?`,
	}},
	{"wrong types", commandFile(`"args": 1, "env": {"PORT": 8080, "ON": true, "L": [], "a b": null}, "labels": "x", "register": "yes", "type": {}, "health_retries": "3", "max_restarts": [], "working_dir": 5, "inputs": {}, "restart_policy": null`), []string{
		`2:54: spec.processors[0].args: must be a list of strings, not a number`,
		`2:73: spec.processors[0].env.PORT: must be a string, not a number: write "8080"`,
		`2:85: spec.processors[0].env.ON: must be a string, not true or false: write "true"`,
		`2:96: spec.processors[0].env.L: must be a string, not a list`,
		`2:100: spec.processors[0].env["a b"]: "a b" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:107: spec.processors[0].env["a b"]: must be a string, not null`,
		`2:124: spec.processors[0].labels: must be an object, not a string`,
		`2:141: spec.processors[0].register: must be true or false, not a string`,
		`2:156: spec.processors[0].type: must be a string, not an object`,
		`2:178: spec.processors[0].health_retries: must be a number, not a string`,
		`2:199: spec.processors[0].max_restarts: must be a number, not a list`,
		`2:218: spec.processors[0].working_dir: must be a string, not a number: write "5"`,
		`2:231: spec.processors[0].inputs: must be a list of strings, not an object`,
		`2:253: spec.processors[0].restart_policy: must be a string, not null`,
	}},
	{"tls as a string", commandFile(`"tls": "true"`), []string{`2:53: spec.processors[0].tls: must be true or false, not a string`}},
	{"list as a string", componentFile(`"command": "./bin/source -v", "args": "", "inputs": "a"`), []string{
		`2:39: spec.processors[0].command: must be a list of strings, such as ["./bin/source", "-v"]`,
		`2:66: spec.processors[0].args: must be a list of strings, such as ["..."]`,
		`2:80: spec.processors[0].inputs: must be a list of strings, such as ["a"]`,
	}},
	{"command line as a string", specFile(`"sources": [{"id": "a", "command": "cat a.txt | sort >b"}, {"id": "b", "command": "cd x && ./y"}, {"id": "c", "command": "X=1 ./y"}, {"id": "d", "command": "./y $HOME"},
 {"id": "e", "command": "./y 'a b' ${HOME}"}, {"id": "f", "command": ["x"], "args": "a | b"}]`), []string{
		`2:36: spec.sources[0].command: must be a list of strings, such as ["sh", "-c", "cat a.txt | sort >b"]`,
		`2:83: spec.sources[1].command: must be a list of strings, such as ["sh", "-c", "cd x && ./y"]`,
		`2:122: spec.sources[2].command: must be a list of strings, such as ["sh", "-c", "X=1 ./y"]`,
		`2:157: spec.sources[3].command: must be a list of strings, such as ["sh", "-c", "./y $HOME"]`,
		`3:25: spec.sources[4].command: must be a list of strings, such as ["./y", "a b", "${HOME}"]`,
		`3:85: spec.sources[5].args: must be a list of strings, such as ["a", "|", "b"]`,
	}},
	{"a script as a string", specFile(`"sources": [{"id": "a", "command": ["sh", "-c"], "args": "while read x; do\n echo \"$x\"; done"}]`), []string{
		`2:58: spec.sources[0].args: must be a list of strings, such as ["while read x; do\n echo \"$x\"; done"]`,
	}},
	{"fields of other tools", componentFile(`"Cmd": [], "environment": {}, "restart": "always", "healthcheck": {}, "depends": [], "WorkingDirectory": "", "stop_grace_period": "", "KillSignal": "", "startretries": 1, "secrets": {}, "replicas": 2`), []string{
		`2:28: spec.processors[0].Cmd: unknown field "Cmd", did you mean "command"?`,
		`2:39: spec.processors[0].environment: unknown field "environment", did you mean "env"?`,
		`2:58: spec.processors[0].restart: unknown field "restart", did you mean "restart_policy"?`,
		`2:79: spec.processors[0].healthcheck: unknown field "healthcheck", did you mean "health_check"?`,
		`2:98: spec.processors[0].depends: unknown field "depends", did you mean "depends_on"?`,
		`2:113: spec.processors[0].WorkingDirectory: unknown field "WorkingDirectory", did you mean "working_dir"?`,
		`2:137: spec.processors[0].stop_grace_period: unknown field "stop_grace_period", did you mean "stop_timeout"?`,
		`2:162: spec.processors[0].KillSignal: unknown field "KillSignal", did you mean "stop_signal"?`,
		`2:180: spec.processors[0].startretries: unknown field "startretries", did you mean "max_restarts"?`,
		`2:199: spec.processors[0].secrets: unknown field "secrets", did you mean "env_files"?`,
		`2:214: spec.processors[0].replicas: unknown field "replicas": each copy is a component of its own`,
	}},
	{"names of the predecessor", strings.Replace(specFile(`"pipelines": [], "flow": [], "sinks": [{"id": "a", "binary": "x", "params": {}, "replicas": 2}, {"id": "b", "image": "i", "ports": [{"containerPort": 80}, {"containerPort": 80, "hostPort": 8080, "protocol": "TCP"}, {"containerPort": 53, "protocol": "UDP"}, {}],
 "volumes": [{"name": "data", "mountPath": "/data"}, {"host_path": "/srv", "container_path": "/data", "readonly": true}, {"name": "data"}]}]`), `"kind"`, `"tls": {}, "log_level": "debug", "kind"`, 1), []string{
		`1:30: tls: unknown field "tls": -tls-cert, -tls-key and -tls-ca-cert take its place`,
		`1:41: log_level: unknown field "log_level": -log-level takes its place`,
		`2:1: spec.pipelines: unknown field "pipelines": what is in it belongs in sources, processors, sinks or services`,
		`2:18: spec.flow: unknown field "flow": the inputs of each component take its place`,
		`2:52: spec.sinks[0].binary: unknown field "binary", did you mean "command"?`,
		`2:67: spec.sinks[0].params: unknown field "params", did you mean "config"?`,
		`2:81: spec.sinks[0].replicas: unknown field "replicas": each copy is a component of its own`,
		`2:133: spec.sinks[1].ports[0]: must be a string, not an object: write "80:80"`,
		`2:156: spec.sinks[1].ports[1]: must be a string, not an object: write "8080:80"`,
		`2:216: spec.sinks[1].ports[2]: must be a string, not an object: write "53:53/udp"`,
		`2:258: spec.sinks[1].ports[3]: must be a string, not an object`,
		`3:14: spec.sinks[1].volumes[0]: must be a string, not an object: write "data:/data"`,
		`3:54: spec.sinks[1].volumes[1]: must be a string, not an object: write "/srv:/data:ro"`,
		`3:122: spec.sinks[1].volumes[2]: must be a string, not an object`,
	}},
	{"downloads", specFile(`"sources": [{"id": "a", "type": "src@v1.0.0"}, {"id": "b", "type": "my-org/src@${VERSION:-v2}"}, {"id": "c", "type": "x"}, {"id": "d", "type": "@v1"}, {"id": "e", "type": 1}]`), []string{
		`2:33: spec.sources[0].type: "src@v1.0.0" names a download, and flowctl makes none: write the program as command, such as ["./bin/src"], or its image, such as "docker.io/withobsrvr/src:v1.0.0"`,
		`2:68: spec.sources[1].type: "my-org/src@${VERSION:-v2}" names a download, and flowctl makes none: write the program as command, such as ["./bin/src"], or its image, such as "docker.io/my-org/src:${VERSION:-v2}"`,
		`2:98: spec.sources[2].command: is missing`,
		`2:124: spec.sources[3].command: is missing`,
		`2:152: spec.sources[4].command: is missing`,
		`2:172: spec.sources[4].type: must be a string, not a number: write "1"`,
	}},
	{"wrong elements", componentFile(`"command": ["x", 1, null], "args": [["y"]]`), []string{
		`2:45: spec.processors[0].command[1]: must be a string, not a number: write "1"`,
		`2:48: spec.processors[0].command[2]: must be a string, not null`,
		`2:64: spec.processors[0].args[0]: must be a string, not a list`,
	}},
	{"beside oneshot", commandFile(`"oneshot": true, "register": false, "health_check": "exec:x", "restart_policy": "always"`), []string{
		`2:75: spec.processors[0].register: cannot be given beside oneshot, which is ready once it has ended with 0`,
		`2:98: spec.processors[0].health_check: cannot be given beside oneshot, which is ready once it has ended with 0`,
		`2:126: spec.processors[0].restart_policy: must be no or on-failure beside oneshot, which ends once it is ready`,
	}},
	{"services", specFile(`"sources": [{"id": "a", "command": ["x"], "depends_on": ["s"]}], "services": [{"id": "s", "command": ["x"]}, {"id": "t", "command": ["x"], "depends_on": ["s"], "register": true}]`), nil},
	{"services alone", specFile(`"services": [{"id": "s", "command": ["x"]}]`), nil},
	{"wrong services", specFile(`"sources": [{"id": "a", "command": ["x"]}], "sinks": [{"id": "b", "command": ["x"], "inputs": ["s"]}], "services": [{"id": "s", "command": ["x"], "inputs": ["a"]}, {"id": "t", "command": ["x"], "depends_on": ["a"]}]`), []string{
		`2:96: spec.sinks[0].inputs[0]: "s" is a service, which all wait for: name it in depends_on, or nowhere`,
		`2:157: spec.services[0].inputs: a service has no inputs, name what it needs in depends_on`,
		`2:210: spec.services[1].depends_on[0]: "a" is no service, and waits for all services: a service can only depend on other services`,
	}},
	{"oneshot", commandFile(`"oneshot": true, "restart_policy": "on-failure", "start_timeout": "1m"`), nil},
	{"numbers", commandFile(`"health_check": "exec:x", "health_retries": 1.5, "restart_policy": "always", "max_restarts": 1e3`), []string{
		`2:90: spec.processors[0].health_retries: must be a whole number such as 3, not 1.5`,
		`2:139: spec.processors[0].max_restarts: must be a whole number such as 3, not 1e3`,
	}},
	{"large number", commandFile(`"restart_policy": "always", "max_restarts": 99999999999999999999`), []string{
		`2:90: spec.processors[0].max_restarts: 99999999999999999999 is out of range`,
	}},
	{"small numbers", commandFile(`"health_check": "exec:x", "health_retries": 0, "restart_policy": "always", "max_restarts": -1`), []string{
		`2:90: spec.processors[0].health_retries: must be at least 1`,
		`2:137: spec.processors[0].max_restarts: must be at least 0`,
	}},
	{"duplicate keys", `{"apiVersion": "flowctl/v1", "kind": "Pipeline",
"metadata": {"name": "p"},
"spec": {"sinks": [{"id": "a",
"command": ["x"], "env": {"A": "1", "A": "2"},
 "id": "b"}]},
"kind": 1}`, []string{
		`4:37: spec.sinks[0].env.A: duplicate key, first on line 4`,
		`5:2: spec.sinks[0].id: duplicate key, first on line 3`,
		`6:1: kind: duplicate key, first on line 1`,
	}},
	{"duplicate key deep in config", commandFile(`"config": {"a": [{"b c": {"x": 1, "x": 2}}]}`), []string{
		`2:80: spec.processors[0].config.a[0]["b c"].x: duplicate key, first on line 2`,
	}},
	{"all that can be given", specFile(`"description": "d", "sources": [{"id": "a.b_c-D", "command": ["x"], "args": [], "env": {"A": ""}, "register": false}],
		"sinks": [{"id": "s", "type": "", "labels": {"": "x"}, "command": ["./x", ""], "args": ["-v", ""], "env": {"A": "1", "FLOWCTL_HEARTBEAT_INTERVAL": "5s", "NOTIFY_SOCKET": "@x"},
		"env_files": {"B": "b"}, "config": {"a": 1, "b": true, "c": "x", "C2": [1, null, {"x y": {}}], "d": {}, "e": 1.50E+1}, "working_dir": "w", "inputs": ["a.b_c-D"], "depends_on": ["a.b_c-D"],
		"register": true, "tls": true, "health_check": "http://localhost:8080/health", "health_interval": "1m30s", "health_timeout": "1ms", "health_retries": 1, "restart_policy": "on-failure", "max_restarts": 0,
		"start_timeout": "24h", "stop_timeout": "1.5s", "stop_signal": "SIGINT", "input_event_types": ["e"], "output_event_types": ["f"]}]`), nil},

	// The environment.
	{"references that are right", specFile(`"sources": [{"id": "${ID}", "command": ["sh", "-c", "echo $HOME $$ $$$$ $ $1"], "working_dir": "${HOME}", "start_timeout": "${WAIT}"}], "sinks": [{"id": "b", "command": ["x"], "inputs": ["ledgers"]}]`), nil},
	{"not set", commandFile(`"type": "${NOPE} and ${NOTHING}", "config": {"a": {"b": ["${NOPE}"]}}`), []string{
		`2:54: spec.processors[0].type: ${NOPE} is not set in the environment, write ${NOPE:-default} for a default, $${NOPE} for the text itself`,
		`2:54: spec.processors[0].type: ${NOTHING} is not set in the environment, write ${NOTHING:-default} for a default, $${NOTHING} for the text itself`,
		`2:103: spec.processors[0].config.a.b[0]: ${NOPE} is not set in the environment, write ${NOPE:-default} for a default, $${NOPE} for the text itself`,
	}},
	{"not set in what others need", specFile(`"sources": [{"id": "${NOPE}", "command": ["${NOPE}"]}], "sinks": [{"id": "b", "command": ["x"], "inputs": ["a"], "restart_policy": "${NOPE}", "max_restarts": 1, "health_check": "${NOPE}", "health_retries": 2, "stop_timeout": "${NOPE}"}]`), []string{
		`2:20: spec.sources[0].id: ${NOPE} is not set in the environment, write ${NOPE:-default} for a default, $${NOPE} for the text itself`,
		`2:43: spec.sources[0].command[0]: ${NOPE} is not set in the environment, write ${NOPE:-default} for a default, $${NOPE} for the text itself`,
		`2:132: spec.sinks[0].restart_policy: ${NOPE} is not set in the environment, write ${NOPE:-default} for a default, $${NOPE} for the text itself`,
		`2:178: spec.sinks[0].health_check: ${NOPE} is not set in the environment, write ${NOPE:-default} for a default, $${NOPE} for the text itself`,
		`2:226: spec.sinks[0].stop_timeout: ${NOPE} is not set in the environment, write ${NOPE:-default} for a default, $${NOPE} for the text itself`,
	}},
	{"message", commandFile(`"type": "${NOPE:?give it a \u001b[31mtype} ${EMPTY:?}"`), []string{
		`2:54: spec.processors[0].type: ${NOPE} is not set or empty: "give it a \x1b[31mtype"`,
		`2:54: spec.processors[0].type: ${EMPTY} is not set or empty`,
	}},
	{"empty where a value is needed", commandFile(`"working_dir": "${EMPTY}", "stop_signal": "${NOPE:-}"`), []string{
		`2:61: spec.processors[0].working_dir: must not be empty`,
		`2:88: spec.processors[0].stop_signal: must be SIGTERM or SIGINT or SIGQUIT or SIGHUP or SIGUSR1 or SIGUSR2 or SIGKILL`,
	}},
	{"not closed", commandFile(`"type": "${HOME"`), []string{`2:54: spec.processors[0].type: "${HOME" has no closing }, write $${ for the text itself`}},
	{"bad references", commandFile(`"args": ["${}", "${1A}", "${A B}", "${HOME-x}", "${HOME:+x}", "${HOME:}", "${ HOME}", "${NOPE:-${HOME}}", "${\u001b}"]`), []string{
		`2:55: spec.processors[0].args[0]: "${}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:62: spec.processors[0].args[1]: "${1A}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:71: spec.processors[0].args[2]: "${A B}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:81: spec.processors[0].args[3]: "${HOME-x}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:94: spec.processors[0].args[4]: "${HOME:+x}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:108: spec.processors[0].args[5]: "${HOME:}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:120: spec.processors[0].args[6]: "${ HOME}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:132: spec.processors[0].args[7]: "${NOPE:-${HOME}" holds another reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
		`2:152: spec.processors[0].args[8]: "${\x1b}" is not a reference, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself`,
	}},
	{"number from the environment", commandFile(`"health_check": "http://localhost:${PORT}", "health_retries": "${PORT}"`), []string{
		`2:108: spec.processors[0].health_retries: must be a number, not a string`,
	}},
	{"not in keys", commandFile(`"env": {"${HOME}": "x"}`), []string{
		`2:54: spec.processors[0].env["${HOME}"]: "${HOME}" is no name for a variable: use letters, digits and _, with no digit first`,
	}},
	{"more than 4 MiB from the environment", commandFile(`"args": ["` + strings.Repeat("${BIG}", 42) + `", "${BIG}"], "inputs": ["${ID}"]`), []string{
		`2:55: spec.processors[0].args[0]: the environment adds more than 4 MiB to the file`,
	}},

	// Many at once.
	{"several", `{
  "apiVersion": "v1",
  "kind": "Pipeline",
  "metadata": {"name": "ttp"},
  "spec": {
    "sources": [
      {"id": "s", "comand": ["./s"], "start_timeout": "5 s"}
    ],
    "sinks": [
	{"id": "t", "command": ["x"], "env": {"K": 1}, "inputs": ["S"]}
    ]
  }
}`, []string{
		`2:17: apiVersion: must be flowctl/v1, not "v1"`,
		`7:19: spec.sources[0].comand: unknown field "comand", did you mean "command"?`,
		`7:55: spec.sources[0].start_timeout: bad duration "5 s", write it like "500ms", "5s" or "1m30s"`,
		`10:45: spec.sinks[0].env.K: must be a string, not a number: write "1"`,
		`10:60: spec.sinks[0].inputs[0]: unknown component "S", did you mean "s"?`,
	}},
}

func TestParsePipeline(t *testing.T) {
	t.Parallel()
	for _, row := range slices.Concat(fileRows, ruleRows) {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p, err := parsePipeline([]byte(row.in), "p.json", pipelineEnv)
			if (p == nil) != (err != nil) {
				t.Fatalf("pipeline %v with error %v", p, err)
			}
			var got []string
			if err != nil {
				if !errors.As(err, new(*fileErrors)) {
					t.Errorf("error is a %T", err)
				}
				got = strings.Split(err.Error(), "\n")
			}
			want := make([]string, len(row.want))
			for i, line := range row.want {
				want[i] = "p.json:" + line
			}
			if strings.Join(got, "\n") != strings.Join(want, "\n") {
				t.Errorf("%s\ngot:\n%s\nwant:\n%s", row.in, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

func mustParsePipeline(t testing.TB, in string) *Pipeline {
	t.Helper()
	p, err := parsePipeline([]byte(in), "p.json", pipelineEnv)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestParsePipeline_ManyErrorsAreCounted(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ errors, shown, more int }{{100, 100, 0}, {101, 100, 1}, {3000, 100, 2900}} {
		fields := `"f": 1`
		for i := 1; i < tt.errors; i++ {
			fields += fmt.Sprintf(", \"zz%d\": 1", i)
		}
		_, err := parsePipeline([]byte(commandFile(fields)), "p.json", pipelineEnv)
		lines := strings.Split(err.Error(), "\n")
		if want := `p.json:2:46: spec.processors[0].f: unknown field "f"`; lines[0] != want {
			t.Errorf("first line %q, want %q", lines[0], want)
		}
		last := ""
		if tt.more > 0 {
			last = fmt.Sprintf("p.json: and %d more errors", tt.more)
			if lines[len(lines)-1] != last {
				t.Errorf("last line %q, want %q", lines[len(lines)-1], last)
			}
			lines = lines[:len(lines)-1]
		}
		if len(lines) != tt.shown {
			t.Errorf("%d errors shown, want %d", len(lines), tt.shown)
		}
	}
}

// No file may cost much, whatever is in it.
func TestParsePipeline_HostileFileCostsLittle(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes seconds under -race")
	}
	fill := func(before, unit, after string) string {
		return before + strings.Repeat(unit, (1<<20-len(before)-len(after))/len(unit)) + after
	}
	var components, vars strings.Builder
	for i := range 50_000 {
		fmt.Fprintf(&vars, "\"V%d\": \"\",\n", i)
	}
	for i := range 999 {
		fmt.Fprintf(&components, `{"id": "component%d", "command": ["x"]},`, i)
	}
	for name, in := range map[string]string{
		"lists":            fill(`{"spec": [`, `[],`, `0]}`),
		"components":       fill(pipelineHead+`"sources": [`, `{},`, `{}]}}`),
		"duplicate keys":   fill(`{`, `"a":0,`, `"a":0}`),
		"unknown fields":   fill(`{`, `"apiVersionn":0,`, `"a":0}`),
		"lines":            fill(`{`, "\"a\":0,\n", `"a":0}`),
		"unset references": fill(pipelineHead+`"description": "`, "${N}", `"}}`),
		"variables twice":  commandFile(`"env": {` + vars.String() + `"A": ""}, "env_files": {` + vars.String() + `"A": ""}`),
		"many variables":   commandFile(`"env": {` + vars.String() + `"A-": ""}`),
		"big references":   fill(pipelineHead+`"description": "`, "${BIG}", `"}}`),
		"unknown inputs":   fill(pipelineHead+`"sinks": [`+components.String()+`{"id": "z", "command": ["x"], "inputs": ["a"`, `,"componemt"`, `]}]}}`),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := parsePipeline([]byte(in), "p.json", pipelineEnv); err == nil {
				t.Error("no error")
			} else if len(err.Error()) > 64<<10 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestParsePipeline_References(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":                           "",
		"plain":                      "plain",
		"${HOME}":                    "/home/me",
		"a${HOME}b${ID}c":            "a/home/mebledgersc",
		"${EMPTY}":                   "",
		"${EMPTY:-x}":                "x",
		"${NOPE:-x}":                 "x",
		"${NOPE:-}":                  "",
		"${NOPE:-a:-b:?c $$ $x '{ }": "a:-b:?c $$ $x '{ ",
		"${HOME:-x}":                 "/home/me",
		"${HOME:?x}":                 "/home/me",
		"${NOPE:-}}":                 "}",
		"${NOPE:-\n}":                "\n",
		"$$":                         "$",
		"$$$":                        "$$",
		"$$$$":                       "$$",
		"$${HOME}":                   "${HOME}",
		"$$${HOME}":                  "$/home/me",
		"$HOME $1 $ $( $":            "$HOME $1 $ $( $",
		"${REF}":                     "${HOME} $$ ${",
		"${BAD}":                     "\xff",
		"}${HOME}}":                  "}/home/me}",
	} {
		text, _ := json.Marshal(in)
		p := mustParsePipeline(t, specFile(`"description": `+string(text)+`, "sinks": [{"id": "a", "command": ["x"], "config": {"k": {"$": `+string(text)+`}}}]`))
		if p.Spec.Description != want {
			t.Errorf("%q gives %q, want %q", in, p.Spec.Description, want)
		}
		if got := p.Spec.Sinks[0].Config["k"]; !reflect.DeepEqual(got, map[string]any{"$": want}) {
			t.Errorf("%q in config gives %q, want %q", in, got, want)
		}
	}
}

func TestReadPipeline(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "flow.json")
	in := specFile(`"sources": [{"id": "a", "command": ["./bin/x", "./arg"], "working_dir": "w/../v", "env_files": {"A": "a", "B": "/b"}},
		{"id": "b", "command": ["x"], "args": ["./arg"]}, {"id": "c", "command": ["/x/y"], "working_dir": "/w"},
		{"id": "d", "image": "i:1", "args": ["./arg"], "volumes": ["../e:/e:ro", "f/g:/f", "/h:/h", "i:/i"], "ports": ["80:80", "[::1]:1:2/udp"]}]`)
	if err := os.WriteFile(file, []byte(in), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := readPipeline(file, pipelineEnv)
	if err != nil {
		t.Fatal(err)
	}
	want := []Component{
		{ID: "a", Command: []string{dir + "/bin/x", "./arg"}, WorkingDir: dir + "/v", EnvFiles: map[string]string{"A": dir + "/a", "B": "/b"}},
		{ID: "b", Command: []string{"x"}, Args: []string{"./arg"}, WorkingDir: dir},
		{ID: "c", Command: []string{"/x/y"}, WorkingDir: "/w"},
		{ID: "d", Image: "i:1", Args: []string{"./arg"}, Volumes: []string{filepath.Dir(dir) + "/e:/e:ro", dir + "/f/g:/f", "/h:/h", "i:/i"}, Ports: []string{"80:80", "[::1]:1:2/udp"}},
	}
	if !reflect.DeepEqual(p.Spec.Sources, want) {
		t.Errorf("got  %+v\nwant %+v", p.Spec.Sources, want)
	}
}

// The folder of a relative path, and of a pipe, is found from the working directory.
func TestReadPipeline_RelativePathsAndPipes(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	in := []byte(specFile(`"sources": [{"id": "a", "command": ["./x"]}]`))
	if err := errors.Join(os.Mkdir("sub", 0o700), os.WriteFile("sub/flow.json", in, 0o600), syscall.Mkfifo("pipe", 0o600)); err != nil {
		t.Fatal(err)
	}
	go func() { _ = os.WriteFile("pipe", in, 0) }()
	for path, want := range map[string]string{"sub/flow.json": dir + "/sub/x", "pipe": dir + "/x"} {
		p, err := readPipeline(path, pipelineEnv)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Spec.Sources[0].Command[0]; got != want {
			t.Errorf("%s: command %s, want %s", path, got, want)
		}
	}
}

// What has a variable without braces is noted where that was hardly meant.
func TestParsePipeline_NotesUnfilledVariables(t *testing.T) {
	t.Parallel()
	const write, shell = "write ${HOME}, or $$HOME for the text itself", `have one read it, by ["sh", "-c", "..."], or write $$DATA for the text itself`
	for in, want := range map[string][]warning{
		`"command": ["./x", "$HOME/a"]`:                                                                 {{"a", "command[1]", "$HOME stays as it is, because no shell reads it: " + write}},
		`"command": ["$HOME/x"], "args": ["$$HOME", "-c", "$HOME"]`:                                     {{"a", "command[0]", "$HOME stays as it is, because no shell reads it: " + write}, {"a", "args[2]", "$HOME stays as it is, because no shell reads it: " + write}},
		`"command": ["x"], "env": {"PATH": "/b:$HOME/b"}`:                                               {{"a", "env.PATH", "$HOME stays as it is, because no shell reads it: " + write}},
		`"command": ["x", "$DATA"], "env": {"DATA": "/d"}`:                                              {{"a", "command[1]", "$DATA stays as it is, because no shell reads it: " + shell}},
		`"command": ["x", "$DATA"], "config": {"data": "/d"}`:                                           {{"a", "command[1]", "$DATA stays as it is, because no shell reads it: " + shell}},
		`"command": ["x"], "working_dir": "$HOME/w"`:                                                    {{"a", "working_dir", "$HOME stays as it is, because no shell reads it: " + write}},
		`"command": ["x"], "health_check": "exec:y $HOME"`:                                              {{"a", "health_check", "$HOME stays as it is, because no shell reads it: " + write}},
		`"command": ["x"], "health_check": "exec:sh -c 'y $HOME'"`:                                      nil,
		`"command": ["x"], "health_check": "http://localhost:$HEALTH_PORT/"`:                            nil,
		`"command": ["sh", "-c", "ls $HOME"], "args": ["$HOME"]`:                                        nil,
		`"command": ["env", "A=1", "/bin/bash", "-e", "-uc", "ls $HOME"]`:                               nil,
		`"command": ["x", "$HEALTH_PORT", "$FLOWCTL_ENDPOINT", "$$HOME", "${HOME}", "$NF", "$1", "a$"]`: nil,
	} {
		p := mustParsePipeline(t, componentFile(in))
		if !reflect.DeepEqual(p.Notes, want) {
			t.Errorf("%s: got %+v\nwant %+v", in, p.Notes, want)
		}
	}
}

func TestReadPipeline_Errors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const python = "a pipeline file is JSON; this turns YAML into it: python3 -c 'import json, sys, yaml; " +
		"json.dump(yaml.safe_load(sys.stdin.buffer), sys.stdout, indent=2, default=str)'"
	if err := os.WriteFile(dir+"/broken.json", []byte("{}}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir + "/none.json":   "cannot read pipeline file: open " + dir + "/none.json: no such file or directory",
		dir:                  "cannot read pipeline file: " + dir + " is a folder",
		dir + "/broken.json": dir + "/broken.json:1:3: invalid character '}' after top-level value: the file must be one object",
		"/dev/zero":          "/dev/zero:1:1: the file is larger than 4 MiB",
		"/dev/null":          "/dev/null:1:1: the file is empty",
		"flow.yaml":          "flow.yaml: " + python + " < flow.yaml > flow.json",
		"a/b.v2.YML":         "a/b.v2.YML: " + python + " < a/b.v2.YML > a/b.v2.json",
		"my 'x' flow.yaml":   "my 'x' flow.yaml: " + python + ` < 'my '\''x'\'' flow.yaml' > 'my '\''x'\'' flow.json'`,
	} {
		p, err := readPipeline(path, pipelineEnv)
		if p != nil || err == nil || err.Error() != want {
			t.Errorf("%s: got %v\nwant %s", path, err, want)
		}
	}
	if _, err := readPipeline(dir+"/none.json", pipelineEnv); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v is not fs.ErrNotExist", err)
	}
}

func TestReadPipeline_CommandForYAMLWorks(t *testing.T) {
	t.Parallel()
	if err := exec.Command("python3", "-c", "import yaml").Run(); err != nil {
		t.Skip("no python3 with yaml here")
	}
	dir := t.TempDir() + "/it's $HOME"
	from, to := dir+"/my flow.yaml", dir+"/my flow.json"
	in := "apiVersion: flowctl/v1\nkind: Pipeline\nmetadata: {name: p}\nspec:\n  description: é\n  sinks:\n  - id: a\n    command: [x]\n"
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(from, []byte(in), 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err := readPipeline(from, pipelineEnv)
	_, command, _ := strings.Cut(err.Error(), "into it: ")
	if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	if _, err := readPipeline(to, pipelineEnv); err != nil {
		t.Error(err)
	}
}

// escapeDollars makes $ of the strings in a JSON text $$, so that it is read as it is.
func escapeDollars(t testing.TB, data []byte) []byte {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var value any
	if err := dec.Decode(&value); err != nil {
		t.Fatal(err)
	}
	var escape func(any) any
	escape = func(value any) any {
		switch v := value.(type) {
		case string:
			return strings.ReplaceAll(v, "$", "$$")
		case []any:
			for i := range v {
				v[i] = escape(v[i])
			}
		case map[string]any:
			for key := range v {
				v[key] = escape(v[key])
			}
		}
		return value
	}
	data, err := json.Marshal(escape(value))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// An error means no pipeline, and a pipeline that is written down again reads as the same.
func FuzzPipeline(f *testing.F) {
	for _, row := range slices.Concat(fileRows, ruleRows) {
		if len(row.in) < 4096 {
			f.Add(row.in)
		}
	}
	for check := range checkErrors {
		f.Add(commandFile(`"health_check": "` + check + `"`))
	}
	env := func(name string) (string, bool) {
		value, ok := pipelineEnv(name)
		return strings.ToValidUTF8(value, "?"), ok
	}
	f.Fuzz(func(t *testing.T, in string) {
		p, err := parsePipeline([]byte(in), "p.json", env)
		if err != nil {
			if p != nil {
				t.Error("a pipeline and an error")
			}
			for _, c := range err.Error() {
				if c != '\n' && !unicode.IsPrint(c) {
					t.Errorf("error shows %q", c)
				}
			}
			return
		}
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parsePipeline(escapeDollars(t, data), "again.json", env)
		if err != nil {
			t.Fatalf("%s\n%v", data, err)
		}
		if p.Notes = nil; !reflect.DeepEqual(p, again) { // of dollars, which are escaped now
			t.Errorf("got  %+v\nwant %+v", again, p)
		}
		stopOrder(p.components())
		for _, c := range p.components() {
			c.waitsFor()
			c.configEnv()
		}
	})
}

// schemaAllows evaluates the keywords that the schema uses for a value without parts.
func schemaAllows(t *testing.T, schema map[string]any, value any) bool {
	t.Helper()
	text, isText := value.(string)
	number, isNumber := value.(float64)
	for keyword, want := range schema {
		ok := true
		switch keyword {
		case "type":
			ok = want == "string" && isText || want == "integer" && isNumber && number == float64(int64(number))
		case "pattern":
			ok = !isText || regexp.MustCompile(want.(string)).MatchString(text)
		case "enum":
			ok = slices.Contains(want.([]any), value)
		case "minLength":
			ok = !isText || utf8.RuneCountInString(text) >= int(want.(float64))
		case "minimum":
			ok = !isNumber || number >= want.(float64)
		case "maximum":
			ok = !isNumber || number <= want.(float64)
		case "not":
			ok = !schemaAllows(t, want.(map[string]any), value)
		case "anyOf":
			ok = slices.ContainsFunc(want.([]any), func(s any) bool { return schemaAllows(t, s.(map[string]any), value) })
		default:
			t.Fatalf("unknown keyword %s", keyword)
		}
		if !ok {
			return false
		}
	}
	return true
}

// schemaRow are values of a field for the schema and for reading.
type schemaRow struct {
	field, beside string // another field that it needs
	takes         []string
	refuses       []string
	lax           []string // reading refuses them, the schema does not
}

var schemaRows = []schemaRow{
	{"id", `"command": ["x"], `,
		[]string{"a", "A.b_c-9", ".a", "a.", "...", "..a", "-", strings.Repeat("x", 63), "${ID}", "x${EMPTY}"},
		[]string{"", ".", "..", "a b", "a/b", "é", "a\n", "$ID", "a$$b", strings.Repeat("x", 64)},
		[]string{"${HOME}", "${NOPE}", "${", "$${ID}"}},
	{"start_timeout", `"command": ["x"], `,
		[]string{"5s", ".5s", "5.s", "0.5s", "5.0s", "+5s", "+.5s", "1h30m", "1h30m.5s", "1.5h30m", "500ms", "1ms", "24h", "1000us", "1000µs", "1000μs", "1000000ns", "007s", "${WAIT}", "${NOPE:-1s}"},
		[]string{"", "5", "0", "-5s", "-.5s", "--5s", "++5s", "s", ".s", "+", ".", "5 s", " 5s", "5s ", "5s\n", "1e3s", "1,5s", "5S", "1d", "1h-30m", "5ss", "5s30", "$WAIT", "٣s", "Inf"},
		[]string{"0s", "+0s", "1us", "24h1ns", "25h", "99999999999999999999h", "${HOME}"}},
	{"stop_signal", `"command": ["x"], `, []string{"SIGTERM", "SIGKILL", "${NOPE:-SIGINT}"}, []string{"", "TERM", "sigterm", "15", "SIGTERM ", "$SIG"}, []string{"${HOME}"}},
	{"restart_policy", `"command": ["x"], `, []string{"no", "on-failure", "always", "${NOPE:-no}"}, []string{"", "No", "never", "on-failure\n"}, []string{"${HOME}"}},
	{"working_dir", `"command": ["x"], `, []string{"/a", "a", ".", "~a", "a~/", "a/~", "${HOME}", " "}, []string{"", "~", "~/", "~/a", "~/${ID}"}, []string{"${EMPTY}", "~${EMPTY}"}},
	{"user", `"image": "i", `, []string{"0", "a:b", "${ID}"}, []string{""}, []string{"${EMPTY}"}},
	{"image", "", []string{"redis:7", "a/b@sha256:0", "x-", "${ID}:1", "${NOPE:-a}"}, []string{"", "-x", "--privileged", "a b", " a", "a\n", "a\tb", "-"}, []string{"-${ID}", "a ${ID}", "${EMPTY}"}},
	{"volumes", `"image": "i", `,
		[]string{"./a:/b", "/a:/b:ro", "name:/b", "a:/", "a:/b:", "${HOME}:/b", "~a:/b", "a b:/c d"},
		[]string{"", "a", ":/b", "a:b", "./a:b", "~:/b", "~/a:/b", "a:/b:ro:z", "a::/b"},
		[]string{"${HOME}", "${EMPTY}:/b", "${HOME}:b", "${ID}:/b:ro:z"}},
	{"ports", `"image": "i", `,
		[]string{"80:80", "127.0.0.1:8080:80", "[::1]:1:2", "53:53/udp", "53:53/tcp", "1:1/sctp", "080:080", "65535:65535", "${PORT}:80"},
		[]string{"", "80", ":80", "80:", "a:80", "80:80/", "80:80/icmp", "80:80/UDP", "::1:80:80", "x:80:80", " 80:80", "80:80\n", "-1:80", "+80:80", "80-81:80-81"},
		[]string{"0:80", "80:0", "65536:80", "80:99999999999999999999", "${HOME}:80"}},
	{"health_check", `"command": ["x"], `,
		[]string{"http://h", "http://h/", "https://[::1]:443/x?y=z#f", "http://u@h", "http://h:$HEALTH_PORT/x", "http://h:$${HEALTH_PORT}/x", "http://$HEALTH_PORT", "tcp://h:1", "tcp://[::1]:65535",
			"tcp://h:$HEALTH_PORT", "grpc://h:1", "grpc://h:1/", "grpc://h:1/a.B/c", "grpc://h:$HEALTH_PORT/s", "/", "/health", "exec:x", "exec: x y", "exec:'a b' \"c\"", "exec:\nx", "exec:\n\nx", "exec:$x", "http://${ID}:1/"},
		[]string{"", "h", "h:80", "health", "http:", "http:h", "http://", "http:///x", "http://?x", "HTTP://h", "ftp://h", " http://h", "tcp:h:1", "tcp://", "tcp://h", "tcp://:1/", "tcp://h/:1", "grpc://h", "grpc://h:", "grpc://h/s", "exec", "exec:", "Exec:x"},
		[]string{"http://:80", "http://h:0", "http://h:65536", "http://h:$PORT/", "http://a b/", "http://h/%zz", "tcp://h:1/x", "tcp://u@h:1", "tcp://h:1?x", "grpc://h:1?x", "grpc://h:0", "exec: ", "exec:\n", "exec:''", "exec:'x", "${HOME}"}},
	{"env_files", `"command": ["x"], `, []string{"a", "/a", "${HOME}/a"}, []string{"", "~", "~/a"}, nil},
	{"output_event_types", `"command": ["x"], `, []string{"a", " ", "é"}, []string{""}, []string{"${EMPTY}"}},
	{"health_interval", `"command": ["x"], "health_check": "exec:x", `, []string{".5s"}, []string{"5"}, []string{"0s"}},
	{"type", `"command": ["x"], `, []string{"", "anything", "${HOME}"}, nil, []string{"${NOPE}", "a\x00"}},
	{"health_retries", `"command": ["x"], "health_check": "exec:x", `, []string{"1", "3", "2147483647"}, []string{"0", "-1", "1.5", "2147483648"}, nil},
	{"max_restarts", `"command": ["x"], "restart_policy": "always", `, []string{"0", "1", "2147483647"}, []string{"-1", "2147483648"}, nil},
}

// The schema allows each value that reading takes, and refuses those that reading refuses,
// except for the lax ones, of which the comment of pipelineSchema tells. Whole numbers are
// the same to both, but for 1.0 and 1e3.
func TestSchema_AgreesWithReading(t *testing.T) {
	t.Parallel()
	var schema struct {
		Defs struct {
			Component struct{ Properties map[string]map[string]any }
		} `json:"$defs"`
	}
	data, err := json.Marshal(pipelineSchema())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &schema); err != nil {
		t.Fatal(err)
	}
	for _, tt := range schemaRows {
		test := func(value string, taken, allowed bool) {
			quoted, _ := json.Marshal(value)
			given, property := string(quoted), schema.Defs.Component.Properties[tt.field]
			judged := any(value)
			switch property["type"] {
			case "integer":
				given = value
				judged, _ = strconv.ParseFloat(value, 64)
			case "array":
				given, property = "["+given+"]", property["items"].(map[string]any)
			case "object":
				given, property = `{"A": `+given+"}", property["additionalProperties"].(map[string]any)
			}
			in := specFile(fmt.Sprintf(`"sources": [{"id": "x", %s"%s": %s}]`, tt.beside, tt.field, given))
			if tt.field == "id" {
				in = specFile(fmt.Sprintf(`"sources": [{%s"id": %s}]`, tt.beside, given))
			}
			if _, err := parsePipeline([]byte(in), "p.json", pipelineEnv); (err == nil) != taken {
				t.Errorf("%s %q: reading it, %v", tt.field, value, err)
			}
			if got := schemaAllows(t, property, judged); got != allowed {
				t.Errorf("%s %q: the schema allows it: %t", tt.field, value, got)
			}
		}
		for _, value := range tt.takes {
			test(value, true, true)
		}
		for _, value := range tt.refuses {
			test(value, false, false)
		}
		for _, value := range tt.lax {
			test(value, false, true)
		}
	}
}
