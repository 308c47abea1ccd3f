package main

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ruleRows are about values, and what refers to what; TestParsePipeline reads them.
var ruleRows = []pipelineRow{
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
	{"no command", componentFile(`"args": ["x"]`), []string{`2:16: spec.processors[0].command: is missing`}},
	{"empty command", componentFile(`"command": []`), []string{`2:39: spec.processors[0].command: must not be empty`}},
	{"empty program", componentFile(`"command": ["", ""]`), []string{`2:40: spec.processors[0].command[0]: must not be empty`}},
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
	{"image and command", commandFile(`"image": "alpine:3"`), []string{`2:55: spec.processors[0].image: cannot be given beside command: what a container is to run goes into args, after the entrypoint of its image`}},
	{"empty image", componentFile(`"image": ""`), []string{`2:37: spec.processors[0].image: must not be empty`}},
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
	{"variables", commandFile(`"env": {"": "", "1A": "", "A-B": "", "FLOWCTL_ENDPOINT": "x", "flowctl_x": "", "A B": "", "É": ""}, "env_files": {"A.B": "f", "FLOWCTL_X": "f"}, "config": {"log-level": 1, "log.level": 2, "flowctl_endpoint": 3, "ſ": 4}`), []string{
		`2:54: spec.processors[0].env[""]: "" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:62: spec.processors[0].env["1A"]: "1A" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:72: spec.processors[0].env["A-B"]: "A-B" is no name for a variable: use letters, digits and _, with no digit first, such as "A_B"`,
		`2:125: spec.processors[0].env["A B"]: "A B" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:136: spec.processors[0].env["É"]: "É" is no name for a variable: use letters, digits and _, with no digit first`,
		`2:160: spec.processors[0].env_files["A.B"]: "A.B" is no name for a variable: use letters, digits and _, with no digit first, such as "A_B"`,
		`2:202: spec.processors[0].config["log-level"]: "log-level" is no name for a variable: use letters, digits and _, with no digit first, such as "log_level"`,
		`2:218: spec.processors[0].config["log.level"]: "log.level" is no name for a variable: use letters, digits and _, with no digit first, such as "log_level"`,
		`2:257: spec.processors[0].config["ſ"]: "ſ" is no name for a variable: use letters, digits and _, with no digit first`,
	}},
	{"variables twice", commandFile(`"env": {"A": "1", "a": "2"}, "env_files": {"B": "b", "A": "a"}, "config": {"a": 1, "b": 2, "c": 3, "C": 4}`), []string{
		`2:99: spec.processors[0].env_files.A: A is set by env already`,
		`2:137: spec.processors[0].config.c: C is set by C already`,
	}},
	{"config null", commandFile(`"config": {"a": null, "b": [null]}`), []string{`2:62: spec.processors[0].config.a: must not be null`}},

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
	{"too many components", specFile(`"sources": [` + strings.Repeat("{},", 1000) + `{}]`), []string{`1:85: spec: 1001 components, at most 1000 are allowed`}},
	{"too many services", specFile(`"services": [` + strings.Repeat("{},", 1000) + `{}]`), []string{`1:85: spec: 1001 components, at most 1000 are allowed`}},
}

// checkErrors are values of health_check, and what is wrong with them.
var checkErrors = map[string]string{
	`ftp://h`:         `must begin with http://, https://, tcp://, grpc:// or exec:, not "ftp://h"`,
	`localhost:80`:    `must begin with http://, https://, tcp://, grpc:// or exec:, not "localhost:80"`,
	`http:h`:          `must begin with http://, https://, tcp://, grpc:// or exec:, not "http:h"`,
	`HTTP://h`:        `must begin with http://, https://, tcp://, grpc:// or exec:, not "HTTP://h"`,
	`http://`:         `"http://" has no host`,
	`http://:80`:      `"http://:80" has no host`,
	`http://h:0`:      `port 0 is not from 1 to 65535`,
	`http://h:65536`:  `port 65536 is not from 1 to 65535`,
	`http://h:$PORT/`: `bad URL: invalid port ":$PORT" after host`,
	`exec:'x`:         `has no closing '`,
	`exec:'' x`:       `exec: needs a command after it`,
	`http://a b/`:     `bad URL: invalid character " " in host name`,
	`tcp://h`:         `"tcp://h" has no port`,
	`tcp://h:1/x`:     `must be tcp://host:port, not "tcp://h:1/x"`,
	`tcp://u@h:1`:     `must be tcp://host:port, not "tcp://u@h:1"`,
	`grpc://h`:        `"grpc://h" has no port`,
	`grpc://h:1?x`:    `must be grpc://host:port or grpc://host:port/service, not "grpc://h:1?x"`,
	`exec:`:           `exec: needs a command after it`,
	`exec:  `:         `exec: needs a command after it`,
	`http://h/%zz`:    `bad URL: invalid URL escape "%zz"`,
	`http://\u0007`:   `bad URL: net/url: invalid control character in URL`,
}

func TestParsePipeline_HealthChecks(t *testing.T) {
	t.Parallel()
	for check, want := range checkErrors {
		_, err := parsePipeline([]byte(commandFile(`"health_check": "`+check+`"`)), "p.json", pipelineEnv)
		if want = "p.json:2:62: spec.processors[0].health_check: " + want; err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", check, err, want)
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
	}, nil, ""}
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
		if got := stopOrder(p.components()); !reflect.DeepEqual(got, tt.want) {
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

func TestStopAfter_HasNoCycle(t *testing.T) {
	t.Parallel()
	p := denselyWired()
	edges := stopOrder(p.components())
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
