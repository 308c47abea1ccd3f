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
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
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

var pipelineRows = []pipelineRow{
	// Syntax.
	{"empty file", "", []string{
		`1:1: the file is empty`,
	}},
	{"only space", " \n\t", []string{
		`1:1: the file is empty`,
	}},
	{"byte order mark", "\ufeff{}", []string{
		`1:1: the file begins with a byte order mark, save it as UTF-8 without one`,
	}},
	{"latin-1", "{\n \"k\xe9y\": 1}", []string{
		`2:4: the file is not UTF-8`,
	}},
	{"comment", `{
  // a comment
}`, []string{
		`2:3: invalid character '/' looking for beginning of object key string: JSON has no comments`,
	}},
	{"hash comment", `{}
# end`, []string{
		`2:1: invalid character '#' after top-level value: JSON has no comments`,
	}},
	{"trailing comma in a list", "{\"spec\": [1, 2, ]}", []string{
		`1:17: invalid character ']' looking for beginning of value: remove the comma before it`,
	}},
	{"trailing comma in an object", `{"kind": "Pipeline",
}`, []string{
		`2:1: invalid character '}' looking for beginning of object key string: remove the comma before it`,
	}},
	{"single quotes", `{'kind': 1}`, []string{
		`1:2: invalid character '\'' looking for beginning of object key string: strings are in "double quotes"`,
	}},
	{"curly quotes", `{“kind”: 1}`, []string{
		`1:2: invalid character '“' looking for beginning of object key string: strings are in "double quotes"`,
	}},
	{"missing comma", `{"a": 1
 "b": 2}`, []string{
		`2:2: invalid character '"' after object key:value pair: is a comma missing?`,
	}},
	{"missing comma in a list", `["é", "é" "c"]`, []string{
		`1:11: invalid character '"' after array element: is a comma missing?`,
	}},
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
	{"slash in a number", `{"a": 1/2}`, []string{
		`1:8: invalid character '/' after object key:value pair: JSON has no comments`,
	}},
	{"escape character", "{\x1b[31m}", []string{
		`1:2: invalid character '\x1b' looking for beginning of object key string`,
	}},
	{"yaml in a json file", "apiVersion: flowctl/v1\n", []string{
		`1:1: invalid character 'a' looking for beginning of value: a pipeline file is JSON and begins with {`,
	}},
	{"deeper than encoding/json goes", strings.Repeat("[", 10_001) + strings.Repeat("]", 10_001), []string{
		`1:10001: invalid character '[' exceeded max depth`,
	}},
	{"deep", strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000), []string{
		`1:102: more than 100 levels of lists and objects`,
	}},
	{"too deep by one", commandFile(`"config": {"a": ` + strings.Repeat("[", 97) + strings.Repeat("]", 97) + `}`), []string{
		`2:158: more than 100 levels of lists and objects`,
	}},
	{"as deep as allowed", commandFile(`"config": {"a": ` + strings.Repeat("[", 95) + strings.Repeat("]", 95) + `}`), nil},
	{"larger than 4 MiB", strings.Repeat(" ", maxFileSize+1), []string{
		`1:1: the file is larger than 4 MiB`,
	}},
	{"as large as allowed", specFile(`"sources": [{"id": "a", "command": ["x"]}]`) + strings.Repeat(" ", maxFileSize-len(specFile(`"sources": [{"id": "a", "command": ["x"]}]`))), nil},

	// Fields and types.
	{"not an object", `[]`, []string{
		`1:1: must be an object, not a list`,
	}},
	{"null", `null`, []string{
		`1:1: must be an object, not null`,
	}},
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
		`1:82: spec: needs at least one component in sources, processors or sinks`,
	}},
	{"bad name", `{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "a b"}, "spec": {"sinks": [{"id": "a", "command": ["x"]}]}}`, []string{
		`1:71: metadata.name: must be a name of letters, digits, dots, _ and -, at most 63, not "a b"`,
	}},
	{"no components", specFile(`"sources": [], "description": "d"`), []string{
		`1:85: spec: needs at least one component in sources, processors or sinks`,
	}},
	{"lists of a wrong type", specFile(`"sources": {"id": "a"}, "processors": null, "sinks": ["a"]`), []string{
		`2:12: spec.sources: must be a list, not an object`,
		`2:39: spec.processors: must be a list, not null`,
		`2:55: spec.sinks[0]: must be an object, not a string`,
	}},
	{"misspelt list", specFile(`"source": [{"id": "a"}]`), []string{
		`2:1: spec.source: unknown field "source", did you mean "sources"?`,
	}},
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
	{"tls as a string", commandFile(`"tls": "true"`), []string{
		`2:53: spec.processors[0].tls: must be true or false, not a string`,
	}},
	{"list as a string", componentFile(`"command": "./bin/source -v", "args": "", "inputs": "a"`), []string{
		`2:39: spec.processors[0].command: must be a list of strings, such as ["./bin/source", "-v"]`,
		`2:66: spec.processors[0].args: must be a list of strings, such as ["..."]`,
		`2:80: spec.processors[0].inputs: must be a list of strings, such as ["a"]`,
	}},
	{"wrong elements", componentFile(`"command": ["x", 1, null], "args": [["y"]]`), []string{
		`2:45: spec.processors[0].command[1]: must be a string, not a number: write "1"`,
		`2:48: spec.processors[0].command[2]: must be a string, not null`,
		`2:64: spec.processors[0].args[0]: must be a string, not a list`,
	}},
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

	// Values.
	{"ids", specFile(`"sources": [{"id": "", "command": ["x"]}, {"id": "a/b", "command": ["x"]}, {"id": "..", "command": ["x"]}, {"command": ["x"]}, {"id": "` + strings.Repeat("a", 64) + `", "command": ["x"]}]`), []string{
		`2:20: spec.sources[0].id: must be a name of letters, digits, dots, _ and -`,
		`2:50: spec.sources[1].id: must be a name of letters, digits, dots, _ and -, at most 63, not "a/b"`,
		`2:83: spec.sources[2].id: must be a name of letters, digits, dots, _ and -, at most 63, not ".."`,
		`2:108: spec.sources[3].id: is missing, it must be a name of letters, digits, dots, _ and -`,
		`2:135: spec.sources[4].id: must be a name of letters, digits, dots, _ and -, at most 63, not "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"`,
	}},
	{"unsafe id", specFile(`"sources": [{"id": "\u001b[2J\u202e", "command": ["x"]}]`), []string{
		`2:20: spec.sources[0].id: must be a name of letters, digits, dots, _ and -, at most 63, not "\x1b[2J\u202e"`,
	}},
	{"duplicate ids", `{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "p"}, "spec": {
"sources": [{"id": "a", "command": ["x"]}],
"sinks": [{"id": "a", "command": ["x"]},
 {"id": "a", "command": ["x"]}]}}`, []string{
		`3:18: spec.sinks[0].id: duplicate id "a", first on line 2`,
		`4:9: spec.sinks[1].id: duplicate id "a", first on line 2`,
	}},
	{"no command", componentFile(`"args": ["x"]`), []string{
		`2:16: spec.processors[0].command: is missing`,
	}},
	{"empty command", componentFile(`"command": []`), []string{
		`2:39: spec.processors[0].command: must not be empty`,
	}},
	{"empty program", componentFile(`"command": ["", ""]`), []string{
		`2:40: spec.processors[0].command[0]: must not be empty`,
	}},
	{"bad image", componentFile(`"image": "--privileged"`), []string{
		`2:37: spec.processors[0].image: must be the name of an image such as redis:7, not "--privileged"`,
	}},
	{"image", componentFile(`"image": "alpine:3", "working_dir": "data", "user": "",
 "volumes": ["x", "./a:b", "~/a:/b", "a:/b:ro:z"],
 "ports": ["80", "0:80", "8080:65536", "x:1:1"]`), []string{
		`2:64: spec.processors[0].working_dir: must be an absolute path in the container, not "data"`,
		`2:80: spec.processors[0].user: must not be empty`,
		`3:14: spec.processors[0].volumes[0]: must be like ./folder:/path, /folder:/path:ro or name:/path, not "x"`,
		`3:19: spec.processors[0].volumes[1]: must be like ./folder:/path, /folder:/path:ro or name:/path, not "./a:b"`,
		`3:28: spec.processors[0].volumes[2]: ~ is not the home folder here, write ${HOME}`,
		`3:38: spec.processors[0].volumes[3]: must be like ./folder:/path, /folder:/path:ro or name:/path, not "a:/b:ro:z"`,
		`4:12: spec.processors[0].ports[0]: must be like 8080:80, 127.0.0.1:8080:80 or 5353:53/udp, not "80"`,
		`4:18: spec.processors[0].ports[1]: port 0 is not from 1 to 65535`,
		`4:26: spec.processors[0].ports[2]: port 65536 is not from 1 to 65535`,
		`4:40: spec.processors[0].ports[3]: must be like 8080:80, 127.0.0.1:8080:80 or 5353:53/udp, not "x:1:1"`,
	}},
	{"a container's fields", commandFile(`"user": "0", "ports": ["80:80"], "volumes": ["a:/a"]`), []string{
		`2:54: spec.processors[0].user: has no effect without image`,
		`2:68: spec.processors[0].ports: has no effect without image`,
		`2:90: spec.processors[0].volumes: has no effect without image`,
	}},
	{"image and command", commandFile(`"image": "alpine:3"`), []string{
		`2:55: spec.processors[0].image: cannot be given beside command`,
	}},
	{"empty image", componentFile(`"image": ""`), []string{
		`2:37: spec.processors[0].image: must not be empty`,
	}},
	{"empty values", commandFile(`"working_dir": "", "health_check": "", "restart_policy": "", "stop_signal": "", "start_timeout": "", "input_event_types": [""], "output_event_types": ["a", ""], "env_files": {"A": ""}`), []string{
		`2:61: spec.processors[0].working_dir: must not be empty`,
		`2:81: spec.processors[0].health_check: must begin with http://, https://, tcp://, grpc:// or exec:, not ""`,
		`2:103: spec.processors[0].restart_policy: must be no or on-failure or always`,
		`2:122: spec.processors[0].stop_signal: must be SIGTERM or SIGINT or SIGQUIT or SIGHUP or SIGUSR1 or SIGUSR2 or SIGKILL`,
		`2:143: spec.processors[0].start_timeout: bad duration "", write it like "500ms", "5s" or "1m30s"`,
		`2:169: spec.processors[0].input_event_types[0]: must not be empty`,
		`2:202: spec.processors[0].output_event_types[1]: must not be empty`,
		`2:226: spec.processors[0].env_files.A: must not be empty`,
	}},
	{"home folder", componentFile(`"command": ["~/bin/x"], "working_dir": "~", "env_files": {"A": "~/a"}`), []string{
		`2:40: spec.processors[0].command[0]: ~ is not the home folder here, write ${HOME}`,
		`2:67: spec.processors[0].working_dir: ~ is not the home folder here, write ${HOME}`,
		`2:91: spec.processors[0].env_files.A: ~ is not the home folder here, write ${HOME}`,
	}},
	{"NUL", componentFile(`"command": ["x", "a\u0000"], "env": {"A": "\u0000"}, "config": {"b": ["\u0000"]}, "type": "${NUL}"`), []string{
		`2:45: spec.processors[0].command[1]: must not contain a NUL character`,
		`2:70: spec.processors[0].env.A: must not contain a NUL character`,
		`2:98: spec.processors[0].config.b[0]: must not contain a NUL character`,
		`2:118: spec.processors[0].type: must not contain a NUL character`,
	}},
	{"durations", commandFile(`"start_timeout": 5, "stop_timeout": "5", "health_check": "tcp://h:1", "health_interval": "0s", "health_timeout": "-1s"`), []string{
		`2:63: spec.processors[0].start_timeout: must be a string with a unit, such as "5s", not a number`,
		`2:82: spec.processors[0].stop_timeout: bad duration "5", write it like "500ms", "5s" or "1m30s"`,
		`2:135: spec.processors[0].health_interval: must be from 1ms to 24h, not "0s"`,
		`2:159: spec.processors[0].health_timeout: must be from 1ms to 24h, not "-1s"`,
	}},
	{"long duration", commandFile(`"start_timeout": "24h0m1s", "stop_timeout": "99999999999h"`), []string{
		`2:63: spec.processors[0].start_timeout: must be from 1ms to 24h, not "24h0m1s"`,
		`2:90: spec.processors[0].stop_timeout: bad duration "99999999999h", write it like "500ms", "5s" or "1m30s"`,
	}},
	{"policy", commandFile(`"restart_policy": "never", "max_restarts": 3`), []string{
		`2:64: spec.processors[0].restart_policy: must be no or on-failure or always, not "never"`,
	}},
	{"max_restarts without policy", commandFile(`"max_restarts": 3`), []string{
		`2:62: spec.processors[0].max_restarts: has no effect unless restart_policy is on-failure or always`,
	}},
	{"max_restarts with policy no", commandFile(`"max_restarts": 0, "restart_policy": "no"`), []string{
		`2:62: spec.processors[0].max_restarts: has no effect unless restart_policy is on-failure or always`,
	}},
	{"signals", specFile(`"sources": [{"id": "a", "command": ["x"], "stop_signal": "TERM"}, {"id": "b", "command": ["x"], "stop_signal": "15"}, {"id": "c", "command": ["x"], "stop_signal": "SIGKILL"}]`), []string{
		`2:58: spec.sources[0].stop_signal: must be SIGTERM or SIGINT or SIGQUIT or SIGHUP or SIGUSR1 or SIGUSR2 or SIGKILL, not "TERM"`,
		`2:112: spec.sources[1].stop_signal: must be SIGTERM or SIGINT or SIGQUIT or SIGHUP or SIGUSR1 or SIGUSR2 or SIGKILL, not "15"`,
	}},
	{"health fields without a check", commandFile(`"health_interval": "5s", "health_timeout": "2s", "health_retries": 3`), []string{
		`2:65: spec.processors[0].health_interval: has no effect without health_check`,
		`2:89: spec.processors[0].health_timeout: has no effect without health_check`,
		`2:113: spec.processors[0].health_retries: has no effect without health_check`,
	}},
	{"check http://localhost", commandFile(`"health_check": "http://localhost"`), nil},
	{"check https://[::1]:443/x?y=z", commandFile(`"health_check": "https://[::1]:443/x?y=z"`), nil},
	{"check tcp://db:5432", commandFile(`"health_check": "tcp://db:5432"`), nil},
	{"check grpc://h:1", commandFile(`"health_check": "grpc://h:1"`), nil},
	{"check grpc://h:1/a.B/c", commandFile(`"health_check": "grpc://h:1/a.B/c"`), nil},
	{"check exec:pg_isready -q", commandFile(`"health_check": "exec:pg_isready -q"`), nil},
	{"check exec:/bin/x", commandFile(`"health_check": "exec:/bin/x"`), nil},
	{"check ftp://h", commandFile(`"health_check": "ftp://h"`), []string{
		`2:62: spec.processors[0].health_check: must begin with http://, https://, tcp://, grpc:// or exec:, not "ftp://h"`,
	}},
	{"check localhost:80", commandFile(`"health_check": "localhost:80"`), []string{
		`2:62: spec.processors[0].health_check: must begin with http://, https://, tcp://, grpc:// or exec:, not "localhost:80"`,
	}},
	{"check http:h", commandFile(`"health_check": "http:h"`), []string{
		`2:62: spec.processors[0].health_check: must begin with http://, https://, tcp://, grpc:// or exec:, not "http:h"`,
	}},
	{"check HTTP://h", commandFile(`"health_check": "HTTP://h"`), []string{
		`2:62: spec.processors[0].health_check: must begin with http://, https://, tcp://, grpc:// or exec:, not "HTTP://h"`,
	}},
	{"check http://", commandFile(`"health_check": "http://"`), []string{
		`2:62: spec.processors[0].health_check: "http://" has no host`,
	}},
	{"check http://:80", commandFile(`"health_check": "http://:80"`), []string{
		`2:62: spec.processors[0].health_check: "http://:80" has no host`,
	}},
	{"check http://h:0", commandFile(`"health_check": "http://h:0"`), []string{
		`2:62: spec.processors[0].health_check: port 0 is not from 1 to 65535`,
	}},
	{"check http://h:65536", commandFile(`"health_check": "http://h:65536"`), []string{
		`2:62: spec.processors[0].health_check: port 65536 is not from 1 to 65535`,
	}},
	{"check http://h:$HEALTH_PORT/", commandFile(`"health_check": "http://h:$HEALTH_PORT/"`), nil},
	{"check grpc://h:$${HEALTH_PORT}/s", commandFile(`"health_check": "grpc://h:$${HEALTH_PORT}/s"`), nil},
	{"check http://h:$PORT/", commandFile(`"health_check": "http://h:$PORT/"`), []string{
		`2:62: spec.processors[0].health_check: bad URL: invalid port ":$PORT" after host`,
	}},
	{"check exec:'x", commandFile(`"health_check": "exec:'x"`), []string{
		`2:62: spec.processors[0].health_check: has no closing '`,
	}},
	{"check exec:''", commandFile(`"health_check": "exec:'' x"`), []string{
		`2:62: spec.processors[0].health_check: exec: needs a command after it`,
	}},
	{"check http://a b/", commandFile(`"health_check": "http://a b/"`), []string{
		`2:62: spec.processors[0].health_check: bad URL: invalid character " " in host name`,
	}},
	{"check tcp://h", commandFile(`"health_check": "tcp://h"`), []string{
		`2:62: spec.processors[0].health_check: "tcp://h" has no port`,
	}},
	{"check tcp://h:1/x", commandFile(`"health_check": "tcp://h:1/x"`), []string{
		`2:62: spec.processors[0].health_check: must be tcp://host:port, not "tcp://h:1/x"`,
	}},
	{"check tcp://u@h:1", commandFile(`"health_check": "tcp://u@h:1"`), []string{
		`2:62: spec.processors[0].health_check: must be tcp://host:port, not "tcp://u@h:1"`,
	}},
	{"check grpc://h", commandFile(`"health_check": "grpc://h"`), []string{
		`2:62: spec.processors[0].health_check: "grpc://h" has no port`,
	}},
	{"check grpc://h:1?x", commandFile(`"health_check": "grpc://h:1?x"`), []string{
		`2:62: spec.processors[0].health_check: must be grpc://host:port or grpc://host:port/service, not "grpc://h:1?x"`,
	}},
	{"check exec:", commandFile(`"health_check": "exec:"`), []string{
		`2:62: spec.processors[0].health_check: exec: needs a command after it`,
	}},
	{"check exec:  ", commandFile(`"health_check": "exec:  "`), []string{
		`2:62: spec.processors[0].health_check: exec: needs a command after it`,
	}},
	{"check http://h/%zz", commandFile(`"health_check": "http://h/%zz"`), []string{
		`2:62: spec.processors[0].health_check: bad URL: invalid URL escape "%zz"`,
	}},
	{"check http:///u0007", commandFile(`"health_check": "http://\u0007"`), []string{
		`2:62: spec.processors[0].health_check: bad URL: net/url: invalid control character in URL`,
	}},
	{"variables", commandFile(`"env": {"": "", "1A": "", "A-B": "", "FLOWCTL_ENDPOINT": "x", "flowctl_x": "", "A B": "", "É": ""}, "env_files": {"A.B": "f", "FLOWCTL_X": "f"}, "config": {"log-level": 1, "log.level": 2, "flowctl_endpoint": 3, "ſ": 4}`), []string{
		`2:54: spec.processors[0].env[""]: "" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:62: spec.processors[0].env["1A"]: "1A" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:72: spec.processors[0].env["A-B"]: "A-B" is no name for a variable: use letters, digits and _, with no digit first, such as "A_B"`,
		`2:83: spec.processors[0].env.FLOWCTL_ENDPOINT: FLOWCTL_ENDPOINT is set by flowctl`,
		`2:125: spec.processors[0].env["A B"]: "A B" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:136: spec.processors[0].env["É"]: "É" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:160: spec.processors[0].env_files["A.B"]: "A.B" is no name for a variable: use letters, digits and _, with no digit first, such as "A_B"`,
		`2:172: spec.processors[0].env_files.FLOWCTL_X: FLOWCTL_X is set by flowctl`,
		`2:202: spec.processors[0].config["log-level"]: "log-level" is no name for a variable: use letters, digits and _, with no digit first, such as "log_level"`,
		`2:218: spec.processors[0].config["log.level"]: "log.level" is no name for a variable: use letters, digits and _, with no digit first, such as "log_level"`,
		`2:234: spec.processors[0].config.flowctl_endpoint: FLOWCTL_ENDPOINT is set by flowctl`,
		`2:257: spec.processors[0].config["ſ"]: "ſ" is no name for a variable: use letters, digits and _, with no digit first`,
	}},
	{"variables twice", commandFile(`"env": {"A": "1", "a": "2"}, "env_files": {"B": "b", "A": "a"}, "config": {"a": 1, "b": 2, "c": 3, "C": 4}`), []string{
		`2:99: spec.processors[0].env_files.A: A is set by env already`,
		`2:137: spec.processors[0].config.c: C is set by C already`,
	}},
	{"config null", commandFile(`"config": {"a": null, "b": [null]}`), []string{
		`2:62: spec.processors[0].config.a: must not be null`,
	}},

	// What refers to what.
	{"source with inputs", specFile(`"sources": [{"id": "a", "command": ["x"], "inputs": ["b"]}, {"id": "b", "command": ["x"], "inputs": []}]`), []string{
		`2:53: spec.sources[0].inputs: a source has no inputs`,
	}},
	{"unknown components", specFile(`"sources": [{"id": "ledgers", "command": ["x"]}], "sinks": [{"id": "b", "command": ["x"], "inputs": ["Ledgers", "legders", "zzz", ""], "depends_on": ["\u001b"]}]`), []string{
		`2:102: spec.sinks[0].inputs[0]: unknown component "Ledgers", did you mean "ledgers"?`,
		`2:113: spec.sinks[0].inputs[1]: unknown component "legders", did you mean "ledgers"?`,
		`2:124: spec.sinks[0].inputs[2]: unknown component "zzz"`,
		`2:131: spec.sinks[0].inputs[3]: unknown component ""`,
		`2:151: spec.sinks[0].depends_on[0]: unknown component "\x1b"`,
	}},
	{"itself", commandFile(`"inputs": ["a"], "depends_on": ["a"]`), []string{
		`2:57: spec.processors[0].inputs[0]: "a" is this component itself`,
		`2:78: spec.processors[0].depends_on[0]: "a" is this component itself`,
	}},
	{"twice", specFile(`"sources": [{"id": "a", "command": ["x"]}], "sinks": [{"id": "b", "command": ["x"], "inputs": ["a", "a"], "depends_on": ["a", "a"]}]`), []string{
		`2:101: spec.sinks[0].inputs[1]: "a" is listed twice`,
		`2:127: spec.sinks[0].depends_on[1]: "a" is listed twice`,
	}},
	{"sink as input", specFile(`"sources": [{"id": "c", "command": ["x"], "depends_on": ["a"]}], "sinks": [{"id": "a", "command": ["x"]}, {"id": "b", "command": ["x"], "inputs": ["a"]}]`), []string{
		`2:148: spec.sinks[1].inputs[0]: "a" is a sink, which has no output`,
	}},
	{"cycle", specFile(`"processors": [{"id": "a", "command": ["x"], "inputs": ["b"]}, {"id": "b", "command": ["x"], "inputs": ["c"]}, {"id": "c", "command": ["x"], "inputs": ["a"]}]`), []string{
		`2:153: spec.processors[2].inputs[0]: cycle, each waits for the next: a -> b -> c -> a`,
	}},
	{"cycle by depends_on", specFile(`"sources": [{"id": "a", "command": ["x"], "depends_on": ["c"]}], "processors": [{"id": "b", "command": ["x"], "inputs": ["a"]}], "sinks": [{"id": "c", "command": ["x"], "inputs": ["b"]}]`), []string{
		`2:122: spec.processors[0].inputs[0]: cycle, each waits for the next: a -> c -> b -> a`,
	}},
	{"two cycles and a tail", specFile(`"processors": [{"id": "t", "command": ["x"], "inputs": ["a"]}, {"id": "a", "command": ["x"], "inputs": ["b"]}, {"id": "b", "command": ["x"], "inputs": ["a", "c"]}, {"id": "c", "command": ["x"], "depends_on": ["a"]}, {"id": "d", "command": ["x"], "inputs": ["e"]}, {"id": "e", "command": ["x"], "inputs": ["d"]}]`), []string{
		`2:153: spec.processors[2].inputs[0]: cycle, each waits for the next: a -> b -> a`,
		`2:210: spec.processors[3].depends_on[0]: cycle, each waits for the next: a -> b -> c -> a`,
		`2:306: spec.processors[5].inputs[0]: cycle, each waits for the next: d -> e -> d`,
	}},
	{"too many components", specFile(`"sources": [` + strings.Repeat("{},", 1000) + `{}]`), []string{
		`1:85: spec: 1001 components, at most 1000 are allowed`,
	}},

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
	{"not closed", commandFile(`"type": "${HOME"`), []string{
		`2:54: spec.processors[0].type: "${HOME" has no closing }, write $${ for the text itself`,
	}},
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
	for _, row := range pipelineRows {
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

func TestManyErrors(t *testing.T) {
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
func TestHostileFiles(t *testing.T) {
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

func TestReferences(t *testing.T) {
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

func TestModel(t *testing.T) {
	t.Parallel()
	p := mustParsePipeline(t, `{"$schema": "../flowctl.json", "apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "ttp", "labels": {"team": "data"}}, "spec": {
		"sinks": [{"id": "store", "command": ["./sink", "-v"], "register": false, "health_check": "tcp://db:5432", "stop_signal": "SIGINT",
			"tls": true, "config": {"batch": 1.50, "Url": "http://a?b&c", "dry_run": true, "tables": ["<a>", {"z": 1, "b": null}]}}],
		"sources": [{"id": "ledgers", "command": ["source"], "start_timeout": "1m30s", "health_check": "exec:x", "health_interval": "1s",
			"health_timeout": "100ms", "health_retries": 1}],
		"processors": []}}`)
	source, sink := &p.Spec.Sources[0], &p.Spec.Sinks[0]
	want := &Pipeline{"../flowctl.json", "flowctl/v1", "Pipeline", Metadata{"ttp", map[string]string{"team": "data"}}, Spec{
		Sources: []Component{{ID: "ledgers", Command: []string{"source"}, StartTimeout: Duration(90 * time.Second), HealthCheck: "exec:x",
			HealthInterval: Duration(time.Second), HealthTimeout: Duration(100 * time.Millisecond), HealthRetries: 1, Role: roleSource}},
		Sinks: []Component{{ID: "store", Command: []string{"./sink", "-v"}, Register: new(false), TLS: true, HealthCheck: "tcp://db:5432", StopSignal: "SIGINT",
			Config: map[string]any{"batch": json.Number("1.50"), "Url": "http://a?b&c", "dry_run": true, "tables": []any{"<a>", map[string]any{"z": json.Number("1"), "b": nil}}}, Role: roleSink}},
	}}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got  %+v\nwant %+v", p, want)
	}
	if got := p.components(); len(got) != 2 || got[0] != source || got[1] != sink {
		t.Errorf("components %v, want the source and the sink of the pipeline", got)
	}
	wantEnv := map[string]string{"BATCH": "1.50", "URL": "http://a?b&c", "DRY_RUN": "true", "TABLES": `["<a>",{"b":null,"z":1}]`}
	if got := sink.configEnv(); !reflect.DeepEqual(got, wantEnv) {
		t.Errorf("configEnv %q, want %q", got, wantEnv)
	}
	for _, tt := range []struct {
		c         *Component
		role      string
		registers bool
		interval  time.Duration
		timeout   time.Duration
		retries   int
		signal    syscall.Signal
	}{
		{source, "source", true, time.Second, 100 * time.Millisecond, 1, syscall.SIGTERM},
		{sink, "sink", false, 5 * time.Second, 2 * time.Second, 3, syscall.SIGINT},
		{&Component{Role: roleProcessor, Register: new(true)}, "processor", true, 5 * time.Second, 2 * time.Second, 3, syscall.SIGTERM},
	} {
		if tt.c.Role.String() != tt.role || tt.c.registers() != tt.registers || tt.c.healthInterval() != tt.interval ||
			tt.c.healthTimeout() != tt.timeout || tt.c.healthRetries() != tt.retries || tt.c.stopSignal() != tt.signal {
			t.Errorf("%+v: %v %v %v %v %v %v, want %+v", tt.c, tt.c.Role, tt.c.registers(), tt.c.healthInterval(), tt.c.healthTimeout(),
				tt.c.healthRetries(), tt.c.stopSignal(), tt)
		}
	}
}

func TestWaitsFor(t *testing.T) {
	t.Parallel()
	c := &Component{Inputs: []string{"b", "a"}, DependsOn: []string{"c", "a", "d"}}
	if got, want := c.waitsFor(), []string{"b", "a", "c", "d"}; !reflect.DeepEqual(got, want) {
		t.Errorf("waitsFor %q, want %q", got, want)
	}
	if got, want := c.Inputs, []string{"b", "a"}; !reflect.DeepEqual(got, want) {
		t.Errorf("Inputs became %q, want %q", got, want)
	}
}

func TestStopAfter(t *testing.T) {
	t.Parallel()
	type edges = map[string][]stopEdge
	for _, tt := range []struct {
		name       string
		components []Component
		want       edges
	}{
		{"alone", []Component{{ID: "a"}}, edges{}},
		{"a chain", []Component{{ID: "c", Inputs: []string{"b"}}, {ID: "b", Inputs: []string{"a"}}, {ID: "a"}},
			edges{"b": {{"a", true}}, "c": {{"b", true}}}},
		{"depended on", []Component{{ID: "db"}, {ID: "a", DependsOn: []string{"db"}}, {ID: "b", DependsOn: []string{"db"}, Inputs: []string{"a"}}},
			edges{"db": {{"a", false}, {"b", false}}, "b": {{"a", true}}}},
		{"both to one", []Component{{ID: "a"}, {ID: "x", Inputs: []string{"a"}, DependsOn: []string{"a"}}},
			edges{"a": {{"x", false}}}},
		{"a contradiction: the first input stays", []Component{{ID: "d"}, {ID: "a", Inputs: []string{"d"}}, {ID: "x", Inputs: []string{"a"}, DependsOn: []string{"d"}}},
			edges{"a": {{"d", true}}, "d": {{"x", false}}}},
		{"a contradiction in another order", []Component{{ID: "d"}, {ID: "x", Inputs: []string{"a"}, DependsOn: []string{"d"}}, {ID: "a", Inputs: []string{"d"}}},
			edges{"x": {{"a", true}}, "d": {{"x", false}}}},
		{"a long contradiction", []Component{{ID: "a"}, {ID: "b", Inputs: []string{"a"}}, {ID: "c", DependsOn: []string{"b"}}, {ID: "d", DependsOn: []string{"c"}, Inputs: []string{"a", "b"}}},
			edges{"b": {{"c", false}, {"a", true}}, "c": {{"d", false}}, "d": {{"a", true}}}},
	} {
		p := &Pipeline{Spec: Spec{Processors: tt.components}}
		if got := p.stopAfter(); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// Every component reads from the 250 before it and depends on the 250 before those.
func denselyWired() *Pipeline {
	p := new(Pipeline)
	for i := range maxComponents {
		c := Component{ID: fmt.Sprint(i)}
		for j := max(0, i-250); j < i; j++ {
			c.Inputs = append(c.Inputs, fmt.Sprint(j))
		}
		for j := max(0, i-500); j < i-250; j++ {
			c.DependsOn = append(c.DependsOn, fmt.Sprint(j))
		}
		p.Spec.Processors = append(p.Spec.Processors, c)
	}
	return p
}

func TestStopAfterHasNoCycle(t *testing.T) {
	t.Parallel()
	p := denselyWired()
	edges := p.stopAfter()
	state := make(map[string]int)
	var visit func(id string)
	visit = func(id string) {
		state[id] = 1
		for _, edge := range edges[id] {
			if state[edge.id] == 1 {
				t.Fatalf("%s stops before itself", id)
			}
			if state[edge.id] == 0 {
				visit(edge.id)
			}
		}
		state[id] = 2
	}
	depended, kept := 0, 0
	for _, c := range p.components() {
		if state[c.ID] == 0 {
			visit(c.ID)
		}
		depended += len(c.DependsOn)
		for _, edge := range edges[c.ID] {
			if !edge.input {
				kept++
			}
		}
	}
	if kept != depended {
		t.Errorf("%d of %d depends_on edges kept", kept, depended)
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
func TestReadPipelineFromHere(t *testing.T) {
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

func TestReadPipelineErrors(t *testing.T) {
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

func TestYAMLCommand(t *testing.T) {
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
	for _, row := range pipelineRows {
		if len(row.in) < 4096 {
			f.Add(row.in)
		}
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
				if c != '\n' && !isShown(c) {
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
		if !reflect.DeepEqual(p, again) {
			t.Errorf("got  %+v\nwant %+v", again, p)
		}
		p.stopAfter()
		for _, c := range p.components() {
			c.waitsFor()
			c.configEnv()
		}
	})
}

func isShown(c rune) bool { return c == ' ' || unicode.IsPrint(c) }

func BenchmarkParse(b *testing.B) {
	components := make([]string, maxComponents)
	for i := range components {
		components[i] = fmt.Sprintf(`{"id": "c%d", "command": ["./bin/x", "-v"], "env": {"HOME": "${HOME}"}, "config": {"batch": 100}, "depends_on": ["c%d"],
			"restart_policy": "always", "start_timeout": "10s"}`, i, max(0, i-1))
	}
	components[0] = `{"id": "c0", "command": ["x"]}`
	in := []byte(specFile(`"processors": [` + strings.Join(components, ",\n") + `]`))
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		if _, err := parsePipeline(in, "p.json", pipelineEnv); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStopAfter(b *testing.B) {
	p := denselyWired()
	for b.Loop() {
		p.stopAfter()
	}
}
