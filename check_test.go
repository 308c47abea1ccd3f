//go:build linux

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestCheckWarnings(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text := writeFile(t, filepath.Join(dir, "notes"), "not a program\n")
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	program := func(name, text string) string {
		file := writeFile(t, filepath.Join(dir, name), text)
		if err := os.Chmod(file, 0o700); err != nil {
			t.Fatal(err)
		}
		return file
	}
	script := program("script", "#!/no/such/interpreter -x\n")
	crlf, crlfArg, plain := program("crlf", "#!/bin/sh\r\n"), program("crlf-arg", "#!/usr/bin/env sh\r\necho\r\n"), program("plain", "echo hello\n")
	reads := Component{ID: "reads", Command: []string{"sh"}, Inputs: []string{"a"}, InputEventTypes: []string{"x", "y"}}
	for _, tt := range []struct {
		name       string
		components []Component
		want       []string // the warnings without the file's name
	}{
		{"nothing", []Component{shell("a", "true")}, nil},
		{"no such program", []Component{{ID: "a", Command: []string{"no-such-program"}}}, []string{
			`component a: command: cannot run "no-such-program": it is not found in PATH`}},
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
		{"a folder for a secret", []Component{{ID: "a", Command: []string{"sh"}, EnvFiles: map[string]string{"KEY": dir}}}, []string{
			`component a: env_files.KEY: read ` + dir + `: is a directory`}},
		{"a FIFO for a secret", []Component{{ID: "a", Command: []string{"sh"}, EnvFiles: map[string]string{"KEY": fifo, "NONE": "/dev/null"}}}, []string{
			`component a: env_files.KEY: ` + fifo + ` is no plain file, and could keep flowctl waiting`}},
		{"an input that does not say what it puts out", []Component{shell("a", "true"), reads}, nil},
	} {
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
				got = append(got, w.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("-json: %q, want %q", got, tt.want)
			}
		})
	}
}

func TestCheckJSONOfAWrongFile(t *testing.T) {
	t.Parallel()
	file := writeFile(t, filepath.Join(t.TempDir(), "p.json"), "{\n  \"kind\": \"Pipelin\"\n}")
	for _, name := range []string{file, file + ".nothing"} {
		var report checkReport
		code, out, stderr := call(t, "check", "-json", name)
		if err := json.Unmarshal([]byte(out), &report); err != nil || code != exitUsage || stderr != "" || report.OK || len(report.Errors) == 0 {
			t.Fatalf("exit %d, %v\n%s%s", code, err, out, stderr)
		}
		if e := report.Errors[0]; name == file && (e.Line == 0 || e.Column == 0 || !slices.ContainsFunc(report.Errors, func(e checkError) bool { return e.Path == "kind" && e.Line == 2 })) {
			t.Errorf("%+v", report)
		}
	}
}

// The schema knows every field of the model, by the rules that reading has.
func TestSchema(t *testing.T) {
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
	full, err := json.Marshal(Component{
		ID: "a", Type: "t", Labels: map[string]string{"a": "b"}, Command: []string{"c"}, Args: []string{"d"}, Image: "i",
		Volumes: []string{"v"}, Ports: []string{"p"}, User: "u",
		Env: map[string]string{"a": "b"}, EnvFiles: map[string]string{"a": "b"}, Config: map[string]any{"a": 1}, WorkingDir: "/",
		Inputs: []string{"x"}, DependsOn: []string{"x"}, Register: new(false), TLS: true, HealthCheck: "h", HealthInterval: 1, HealthTimeout: 1,
		HealthRetries: 1, RestartPolicy: "no", MaxRestarts: 1, StartTimeout: 1, StopTimeout: 1, StopSignal: "s",
		InputEventTypes: []string{"e"}, OutputEventTypes: []string{"e"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(full, &fields); err != nil {
		t.Fatal(err)
	}
	for name := range fields {
		if c.Properties[name] == nil {
			t.Errorf("field %s is not in the schema", name)
		}
	}
	if len(c.Properties) != len(fields) || !slices.Equal(c.Required, []string{"id"}) || c.Additional == nil || *c.Additional {
		t.Errorf("%d fields in the schema, %d in the model; required %q", len(c.Properties), len(fields), c.Required)
	}
	if !slices.Equal(schema.Required, []string{"apiVersion", "kind", "metadata", "spec"}) || schema.Properties["spec"].Properties["sinks"] == nil || schema.Properties["$schema"].Type != "string" {
		t.Errorf("required %q, properties %v", schema.Required, schema.Properties)
	}
	if _, ok := c.Properties["restart_policy"]["anyOf"]; !ok || c.Properties["health_retries"]["minimum"] != 1.0 {
		t.Errorf("restart_policy %v, health_retries %v", c.Properties["restart_policy"], c.Properties["health_retries"])
	}
}
