//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

func TestCheckAndVersion(t *testing.T) {
	t.Parallel()
	store := actor("store", role{})
	store.Inputs = []string{"a"}
	file := writePipeline(t, shell("a", "exit 9"), store)
	for _, args := range [][]string{{"check", file}, {"check", "-f", file}, {"check", "--f=" + file}} {
		code, out, stderr := call(t, args...)
		if want := file + ": ok: pipeline test, 1 sources, 1 processors, 0 sinks\n"; code != exitOK || out != want || stderr != "" {
			t.Errorf("%q: exit %d\n%s%swant\n%s", args, code, out, stderr, want)
		}
	}
	code, out, stderr := call(t, "version")
	if code != exitOK || stderr != "" || !regexp.MustCompile(`^flowctl \S+ \(go1\.\S+(, commit [0-9a-f]{12}(\+dirty)?)?\)\n$`).MatchString(out) {
		t.Errorf("version: exit %d\n%s%s", code, out, stderr)
	}
}

// What help list begins with.
const helpOfList = `list: show what is registered, and how it is

Usage:
  flowctl list [flags] [id]

Examples:
  flowctl list
  flowctl list ledgers -json                 one component, with its history
  flowctl list -watch -e 127.0.0.1:8080

Flags:
`

func TestHelp_Texts(t *testing.T) {
	t.Parallel()
	const overview = `flowctl runs a data pipeline: its programs, and their control plane.

Usage:
  flowctl run [flags] [pipeline.json] [-- command args...]
                                        run a pipeline until it ends
  flowctl check [flags] [pipeline.json] read and validate a pipeline file
  flowctl list [flags] [id]             show what is registered, and how it is
  flowctl logs [flags] [id...]          show what components print
  flowctl wait [flags] [id...]          wait until components are ready, or done
  flowctl restart [flags] id...         stop components, and start them again
  flowctl reload [flags] [pipeline]     take over a changed pipeline file
  flowctl stop [flags]                  stop a running pipeline
  flowctl runs [flags]                  show the last runs, and how they ended
  flowctl translate -to kubernetes|compose [flags] [pipeline.json]
                                        write the manifests of another engine
  flowctl sandbox [flags] [pipeline.json]
                                        run the services of a pipeline alone
  flowctl version                       print the version
  flowctl help [command]                explain flowctl, or one command

Examples:
  flowctl -f pipeline.json                   as: flowctl run pipeline.json
  flowctl run pipeline.json -until ready     a smoke test: 0 once all are ready
  flowctl run pipeline.json -- echo ready    run a command once all are ready
  flowctl run pipeline.json -control-plane-port 0 -log-format json
  flowctl check pipeline.json
  flowctl check -schema                      a JSON Schema, for an editor

flowctl help run lists the flags; docs/pipeline-file.md explains the file.
`
	for _, tt := range []struct {
		args   string
		want   string
		prefix bool // want is the beginning
	}{
		{"help", overview, false}, {"-h", overview, false}, {"--help", overview, false},
		{"help list", helpOfList, true}, {"list -help", helpOfList, true},
		{"help version", "version: print the version\n\nUsage:\n  flowctl version\n", false},
		{"help run", "run: run a pipeline ", true}, {"help check", "check: ", true},
		{"help logs", "logs: ", true}, {"help restart", "restart: ", true}, {"help reload", "reload: ", true}, {"help stop", "stop: ", true}, {"help translate", "translate: ", true}, {"help server", "server: run the control plane alone\n", true},
	} {
		code, out, stderr := call(t, strings.Fields(tt.args)...)
		if tt.args == "help server" && !strings.Contains(out, "$STATE_DIRECTORY or the user's state folder\n") {
			t.Errorf("it does not say where the state is\n%s", out)
		}
		for line := range strings.Lines(out) {
			if utf8.RuneCountInString(line) > 80+1 {
				t.Errorf("%s: wider than 80 columns: %s", tt.args, line)
			}
		}
		if n := strings.Count(out, "\n"); tt.args == "help" && n > 30 {
			t.Errorf("%s: %d lines", tt.args, n)
		}
		if code != exitOK || stderr != "" || out != tt.want && !(tt.prefix && strings.HasPrefix(out, tt.want)) {
			t.Errorf("%s: exit %d\n%s%swant\n%s", tt.args, code, out, stderr, tt.want)
		}
	}
}

// Every example that help shows works as it stands.
func TestHelp_ExamplesWork(t *testing.T) {
	t.Parallel()
	if !ownNetwork(t) {
		return
	}
	folder := inFolder(filepath.Dir(writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), serviceOf("db"))))
	var examples []string
	for _, c := range commands() {
		for line := range strings.Lines(c.examples) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), "  ")
			line, _, _ = strings.Cut(line, " >")
			if line, ok := strings.CutPrefix(line, "flowctl "); ok {
				examples = append(examples, line)
			}
		}
	}
	if len(examples) < 7 {
		t.Fatalf("only %d examples: %q", len(examples), examples)
	}
	runs := withEnv("XDG_RUNTIME_DIR=" + t.TempDir())
	ofImages := inFolder(filepath.Dir(writePipeline(t, Component{ID: "a", Image: "a:1"})))
	pipeline := start(t, strings.Fields(examples[0]), folder, runs) // for those of list
	pipeline.waitReady()
	for _, example := range examples[1:] {
		options := []option{folder}
		if name, _, _ := strings.Cut(example, " "); slices.Contains([]string{"list", "logs", "wait", "restart", "reload", "stop"}, name) {
			options = append(options, runs)
		}
		if strings.HasPrefix(example, "translate") {
			options = append(options, ofImages)
		}
		p := start(t, strings.Fields(example), options...)
		switch {
		case example == "logs -f":
			p.waitOut("| registered")
			p.stop()
		case example == "stop":
			p.exit(exitOK)
			pipeline.exit(exitOK)
		case strings.HasPrefix(example, "server"):
			p.waitErr("msg=listening endpoint=127.0.0.1:")
			p.stop()
		case strings.Contains(example, "-watch"):
			p.waitOut("ledgers ready healthy")
			p.stop()
		case strings.HasPrefix(example, "sandbox"), strings.HasPrefix(example, "run ") && !strings.Contains(example, "-until") && !strings.Contains(example, " -- "):
			p.waitErr("pipeline ready")
			p.stop()
		default:
			p.exit(exitOK)
		}
	}
	pipeline.exit(exitOK) // by the example of stop
}

func TestServer_TellsChangesAndSystemd(t *testing.T) { // not in parallel: another test must not hold it up
	p := start(t, []string{"server", "-control-plane-port", "0", "-heartbeat-ttl", "300ms"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	endpoint := p.endpoint()
	p.wait(p.notified, "READY=1\nSTATUS=listening on "+endpoint+"\n\n", 1)
	register(t, endpoint, "ledgers")
	p.waitErr("msg=healthy id=ledgers")
	p.waitErr("msg=unhealthy id=ledgers cause=\"no heartbeat since it registered ")
	if code, out, _ := call(t, "list", "-e", endpoint); code != exitFailed || !strings.Contains(out, "unhealthy") {
		t.Errorf("list: exit %d\n%s", code, out)
	}
	p.stop()
	p.wait(p.notified, "STOPPING=1", 1)
}

// warningRow is a pipeline, and what check warns of in it.
type warningRow struct {
	name       string
	components []Component
	want       []string // the warnings without the file's name
}

// warningRows returns rows whose files are in dir.
// It is long because it is a table.
func warningRows(t *testing.T, dir string) []warningRow {
	text := writeFile(t, filepath.Join(dir, "notes"), "not a program\n")
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	program := func(name, text string) string { return writeProgram(t, filepath.Join(dir, name), text) }
	script := program("script", "#!/no/such/interpreter -x\n")
	crlf, crlfArg, plain := program("crlf", "#!/bin/sh\r\n"), program("crlf-arg", "#!/usr/bin/env sh\r\necho\r\n"), program("plain", "echo hello\n")
	reads := Component{ID: "reads", Command: []string{"sh"}, Inputs: []string{"a"}, InputEventTypes: []string{"x", "y"}}
	return []warningRow{
		{"nothing", []Component{shell("a", "true")}, nil},
		{"no such program", []Component{{ID: "a", Command: []string{"no-such-program"}}}, []string{
			`component a: command: cannot run "no-such-program": it is not found in PATH`}},
		{"a command line in a list", []Component{{ID: "a", Command: []string{"python3 -m http.server"}}, {ID: "b", Command: []string{"cat x | grep y"}}}, []string{
			`component a: command: cannot run "python3 -m http.server": it is not found in PATH; no shell reads it, so a command line is a list: ["python3", "-m", "http.server"]`,
			`component b: command: cannot run "cat x | grep y": it is not found in PATH; no shell reads it, so a command line is a list: ["sh", "-c", "cat x | grep y"]`}},
		{"a pipe in a check", []Component{{ID: "a", Command: []string{"sh"}, HealthCheck: "exec:true | true"}}, []string{
			`component a: health_check: no shell reads it, and "|" is an argument: write exec:sh -c '...'`}},
		{"no such file", []Component{{ID: "a", Command: []string{dir + "/nothing"}}}, []string{
			`component a: command: cannot run "` + dir + `/nothing": no such file or directory`}},
		{"not executable", []Component{{ID: "a", Command: []string{text}}}, []string{
			`component a: command: cannot run "` + text + `": it is not executable (chmod +x)`}},
		{"no interpreter", []Component{{ID: "a", Command: []string{script}}}, []string{
			`component a: command: cannot run "` + script + `": the interpreter that it names, "/no/such/interpreter", does not exist`}},
		{"CRLF, no #! line", []Component{{ID: "a", Command: []string{crlf}}, {ID: "b", Command: []string{crlfArg}}, {ID: "c", Command: []string{plain}}, {ID: "d", Command: []string{program("empty", "")}},
			{ID: "e", Command: []string{program("right", "#! /bin/sh -e\necho\r\n")}}, {ID: "f", Command: []string{program("binary", "\x7fELF\x00")}}}, []string{
			`component a: command: cannot run "` + crlf + `": its #! line ends in CRLF, of which the CR counts; remove it from every line: sed -i 's/\r$//'`,
			`component b: command: cannot run "` + crlfArg + `": its #! line ends in CRLF, of which the CR counts; remove it from every line: sed -i 's/\r$//'`,
			`component c: command: cannot run "` + plain + `": it is no program of this machine, and has no #! line`,
			`component d: command: cannot run "` + dir + `/empty": it is no program of this machine, and has no #! line`}},
		{"beside the file", []Component{{ID: "a", Command: []string{"notes"}, WorkingDir: dir}}, []string{
			`component a: command: cannot run "notes": it is not found in PATH; the file in its folder is "./notes"`}},
		{"health_check", []Component{
			{ID: "a", Command: []string{"sh"}, HealthCheck: "exec:no-such-program x"},
			{ID: "b", Command: []string{"sh"}, HealthCheck: "exec:" + script + " x"}}, []string{
			`component a: health_check: cannot run "no-such-program": executable file not found in $PATH`}},
		{"folders and files", []Component{{ID: "a", Command: []string{"sh"}, WorkingDir: text, EnvFiles: map[string]string{"KEY": dir + "/key"}}}, []string{
			`component a: working_dir: "` + text + `" is no folder`,
			`component a: env_files.KEY: open ` + dir + `/key: no such file or directory`}},
		{"no folder", []Component{{ID: "a", Command: []string{"sh"}, WorkingDir: dir + "/nowhere"}}, []string{
			`component a: working_dir: stat ` + dir + `/nowhere: no such file or directory`}},
		{"a port for two", []Component{
			{ID: "a", Command: []string{"sh"}, Env: map[string]string{"HEALTH_PORT": "9001"}},
			{ID: "b", Command: []string{"sh"}, Config: map[string]any{"health_port": "9001"}}}, []string{
			`component b: env.HEALTH_PORT: port 9001 is that of component a too`}},
		{"an event nobody puts out", []Component{{ID: "a", Command: []string{"sh"}, OutputEventTypes: []string{"x"}}, reads}, []string{
			`component reads: input_event_types: no input of it puts out "y"`}},
		{"images", []Component{{ID: "a", Image: "i:1", WorkingDir: "/nowhere", Volumes: []string{dir + "/none:/x", "name:/y"}}}, []string{
			`component a: image: needs -orchestrator container`,
			`component a: volumes[0]: stat ` + dir + `/none: no such file or directory`}},
		{"a port published twice", []Component{{ID: "a", Image: "i:1", Ports: []string{"8080:80"}}, {ID: "b", Image: "i:1", Ports: []string{"8080:80/udp", "8080:81/tcp"}}}, []string{
			`component a: image: needs -orchestrator container`,
			`component b: image: needs -orchestrator container`,
			`component b: ports[1]: port 8080 is that of component a too`}},
		{"variables that flowctl sets", []Component{
			{ID: "a", Command: []string{"sh"}, Env: map[string]string{"FLOWCTL_ENDPOINT": "x", "FLOWCTL_LOG": "x", "FLOWCTL_TLS_CA": "x", "FLOWCTL_HEARTBEAT_INTERVAL": "5s"}, Config: map[string]any{"enable_flowctl": true}},
			{ID: "b", Command: []string{"sh"}, TLS: true, Env: map[string]string{"FLOWCTL_TLS_CA": "x", "FLOWCTL_HEARTBEAT_INTERVAL": "5000"}}}, []string{
			`component a: config.enable_flowctl: flowctl sets it, and ignores what the file gives`,
			`component a: env.FLOWCTL_ENDPOINT: flowctl sets it, and ignores what the file gives`,
			`component b: env.FLOWCTL_HEARTBEAT_INTERVAL: "5000" is no time with a unit, such as 5s: FLOWCTL_HEARTBEAT_INTERVAL_MS does not follow it`,
			`component b: env.FLOWCTL_TLS_CA: flowctl sets it, and ignores what the file gives`}},
		{"rare checks", []Component{
			{ID: "a", Command: []string{"sh"}, HealthCheck: "tcp://h:1", HealthInterval: Duration(31 * time.Second)},
			{ID: "b", Command: []string{"sh"}, HealthCheck: "tcp://h:1", HealthInterval: Duration(30 * time.Second)}}, []string{
			`component a: health_interval: a check each 31s is too rare for a heartbeat TTL of 30s: it is stale in between, unless it sends heartbeats`}},
		{"variables that nothing fills in", []Component{{ID: "a", Command: []string{"sh", "$PATH"}}}, []string{
			`component a: command[1]: $PATH stays as it is, because no shell reads it: write ${PATH}, or $$PATH for the text itself`}},
		{"a folder for a secret", []Component{{ID: "a", Command: []string{"sh"}, EnvFiles: map[string]string{"KEY": dir}}}, []string{
			`component a: env_files.KEY: read ` + dir + `: is a directory`}},
		{"a FIFO for a secret", []Component{{ID: "a", Command: []string{"sh"}, EnvFiles: map[string]string{"KEY": fifo, "NONE": "/dev/null"}}}, []string{
			`component a: env_files.KEY: ` + fifo + ` is no plain file, and could keep flowctl waiting`}},
		{"an input that does not say what it puts out", []Component{shell("a", "true"), reads}, nil},
	}
}

func TestCheck_Warnings(t *testing.T) {
	t.Parallel()
	for _, tt := range warningRows(t, t.TempDir()) {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			file := writePipeline(t, tt.components...)
			var want strings.Builder
			for _, w := range tt.want {
				want.WriteString(file + ": warning: " + w + "\n")
			}
			code, out, stderr := call(t, "check", file)
			if code != exitOK || stderr != want.String() || !strings.HasPrefix(out, file+": ok: ") {
				t.Errorf("exit %d\n%s%swant\n%s", code, out, stderr, want.String())
			}
			code, _, _ = call(t, "check", "-strict", file)
			if strict := map[bool]int{true: exitOK, false: exitUsage}[tt.want == nil]; code != strict {
				t.Errorf("-strict: exit %d, want %d", code, strict)
			}
			var report checkReport
			code, out, stderr = call(t, "check", file, "-json")
			if err := json.Unmarshal([]byte(out), &report); err != nil || code != exitOK || stderr != "" || !report.OK || report.Pipeline != "test" {
				t.Fatalf("-json: exit %d, %v\n%s%s", code, err, out, stderr)
			}
			var got []string
			for _, w := range report.Warnings {
				got = append(got, "component "+w.Component+": "+w.Field+": "+w.Message)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("-json: %q, want %q", got, tt.want)
			}
		})
	}
}

// A file for a unit is checked by hand: of systemd's variables check takes what flowctl.service gives, and run none.
func TestCheck_FileOfAUnit(t *testing.T) {
	t.Parallel()
	c := Component{ID: "a", Command: []string{"sh", "${LOGS_DIRECTORY:-here}", "${STATE_DIRECTORY:?no}/x"}, EnvFiles: map[string]string{"TOKEN": "${CREDENTIALS_DIRECTORY}/token"}}
	file := writePipeline(t, c)
	code, _, stderr := call(t, "check", file)
	const taken = ": warning: component a: %s: ${%s} is not set here: it is taken to be %s, as in flowctl.service\n"
	wantEqual(t, "check", stderr, fmt.Sprintf(file+taken+file+taken, "command[2]", "STATE_DIRECTORY", "/var/lib/flowctl", "env_files.TOKEN", "CREDENTIALS_DIRECTORY", "/run/credentials/flowctl.service"))
	wantEqual(t, "exit code", code, exitOK)
	p := launch(t, file)
	p.exit(exitUsage)
	p.has(p.stderr, "${STATE_DIRECTORY} is not set or empty: \"no\"", "${CREDENTIALS_DIRECTORY} is not set in the environment")
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "token"), "x")
	check := start(t, []string{"check", file}, withEnv("STATE_DIRECTORY="+dir, "CREDENTIALS_DIRECTORY="+dir))
	check.exit(exitOK)
	wantEqual(t, "check with the variables", check.stderr.String(), "")
}

// The TTL of the run decides which checks are too rare.
func TestCheck_KnowsTheTTL(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, Component{ID: "a", Command: []string{"sh"}, HealthCheck: "tcp://h:1"})
	_, _, stderr := call(t, "check", file, "-heartbeat-ttl", "4s")
	wantEqual(t, "check", stderr, file+": warning: component a: health_interval: a check each 5s is too rare for a heartbeat TTL of 4s: it is stale in between, unless it sends heartbeats\n")
}

// What check warns of is said at the start of a run, and at a reload what is new.
func TestRun_WarnsOnce(t *testing.T) {
	t.Parallel()
	program := func(id string) Component {
		return changed(shell(id, "exec sleep 300"), func(c *Component) { c.Env = map[string]string{"HEALTH_PORT": "9001"} })
	}
	warning := func(id, other string) string {
		return fmt.Sprintf(`level=WARN msg="check warns" component=%s field=env.HEALTH_PORT reason="port 9001 is that of component %s too"`, id, other)
	}
	file := writePipeline(t, program("a"), program("b"))
	p := launch(t, file)
	p.waitReady()
	p.has(p.stderr, warning("b", "a"), "msg=started component=a")
	must(t, os.Rename(writePipeline(t, program("a"), program("b"), program("c")), file))
	if code, _, stderr := p.callReload(); code != exitOK {
		t.Errorf("reload: exit %d\n%s", code, stderr)
	}
	p.waitErr("msg=started component=c")
	p.stop()
	for _, text := range []string{warning("b", "a"), warning("c", "b")} {
		wantEqual(t, text, strings.Count(p.stderr.String(), text), 1)
	}
}

// A pipeline comes from standard input by -: a pipe, a file, a socket. Its paths are those of the folder.
func TestRun_FileFromStandardInput(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeProgram(t, filepath.Join(dir, "mine"), "#!/bin/sh\necho mine\n")
	data := get(os.ReadFile(writePipeline(t, plainProgram("a", "./mine"))))(t)
	pair := get(syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0))(t)
	socket, other := os.NewFile(uintptr(pair[0]), "socket"), os.NewFile(uintptr(pair[1]), "other")
	defer socket.Close()
	get(other.Write(data))(t)
	other.Close()
	plain := get(os.Open(writeFile(t, filepath.Join(dir, "p.json"), string(data))))(t)
	defer plain.Close()
	for name, in := range map[string]io.Reader{"pipe": bytes.NewReader(data), "socket": socket, "file": plain} {
		p := start(t, []string{"run", "-f", "-", "-control-plane-port", "0"}, inFolder(dir), func(p *process) { p.cmd.Stdin = in })
		p.exit(exitOK)
		wantEqual(t, name, p.lines("a"), []string{"mine"})
	}
	check := start(t, []string{"check", "-"}, inFolder(dir), func(p *process) { p.cmd.Stdin = strings.NewReader("{") })
	check.exit(exitUsage)
	check.has(check.stderr, "/dev/stdin:1:2: unexpected end of file")
}

func TestCheck_JSONOfAWrongFile(t *testing.T) {
	t.Parallel()
	file := writeFile(t, filepath.Join(t.TempDir(), "p.json"), "{\n  \"kind\": \"Pipelin\"\n}")
	for _, name := range []string{file, file + ".nothing"} {
		var report checkReport
		code, out, stderr := call(t, "check", "-json", name)
		if err := json.Unmarshal([]byte(out), &report); err != nil || code != exitUsage || stderr != "" || report.OK || len(report.Errors) == 0 {
			t.Fatalf("exit %d, %v\n%s%s", code, err, out, stderr)
		}
		if e := report.Errors[0]; name == file && (e.Line == 0 || e.Column == 0 || !slices.ContainsFunc(report.Errors, func(e fileError) bool { return e.Path == "kind" && e.Line == 2 })) {
			t.Errorf("%+v", report)
		}
	}
}

// The schema knows every field of the model, by the rules that reading has.
func TestSchema_KnowsEveryField(t *testing.T) {
	t.Parallel()
	code, out, stderr := call(t, "check", "-schema")
	var schema struct {
		Schema     string `json:"$schema"`
		Required   []string
		Properties map[string]struct {
			Type       any
			Properties map[string]any
		}
		Defs map[string]struct {
			Required   []string
			Additional *bool `json:"additionalProperties"`
			Properties map[string]map[string]any
		} `json:"$defs"`
	}
	if err := json.Unmarshal([]byte(out), &schema); err != nil || code != exitOK || stderr != "" {
		t.Fatalf("exit %d, %v\n%s%s", code, err, out, stderr)
	}
	c := schema.Defs["Component"]
	fields := 0
	for field := range reflect.TypeFor[Component]().Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		fields++
		if c.Properties[name] == nil {
			t.Errorf("field %s is not in the schema", name)
		}
	}
	fields += len(formerFields[reflect.TypeFor[Component]()])
	if len(c.Properties) != fields || !slices.Equal(c.Required, []string{"id"}) || c.Additional == nil || *c.Additional {
		t.Errorf("%d fields in the schema, %d in the model; required %q", len(c.Properties), fields, c.Required)
	}
	if !slices.Equal(schema.Required, []string{"apiVersion", "kind", "metadata", "spec"}) || schema.Properties["spec"].Properties["sinks"] == nil || schema.Properties["$schema"].Type != "string" {
		t.Errorf("required %q, properties %v", schema.Required, schema.Properties)
	}
	if _, ok := c.Properties["restart_policy"]["anyOf"]; !ok || c.Properties["health_retries"]["minimum"] != 1.0 {
		t.Errorf("restart_policy %v, health_retries %v", c.Properties["restart_policy"], c.Properties["health_retries"])
	}
}
