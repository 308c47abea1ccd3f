package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
)

// checkReport is what check -json prints.
type checkReport struct {
	File     string       `json:"file"`
	OK       bool         `json:"ok"` // no errors; with -strict no warnings either
	Pipeline string       `json:"pipeline,omitempty"`
	Errors   []checkError `json:"errors"`
	Warnings []warning    `json:"warnings"`
	More     int          `json:"more_errors,omitempty"` // that are not in Errors
}

type checkError struct {
	Line    int    `json:"line,omitempty"` // 0 where the file could not be read
	Column  int    `json:"column,omitempty"`
	Path    string `json:"path,omitempty"`
	Message string `json:"message"`
}

// warning is what is right in the file and will fail when it runs here and now.
type warning struct {
	Component string `json:"component"`
	Field     string `json:"field"`
	Message   string `json:"message"`
}

func (w warning) String() string {
	return fmt.Sprintf("component %s: %s: %s", w.Component, w.Field, w.Message)
}

func checkCommand(args []string) error {
	fs := flag.NewFlagSet("check", flag.ContinueOnError)
	named := fs.String("f", "flow.json", "pipeline `file`")
	asJSON := fs.Bool("json", false, "print JSON")
	var orchestrator string
	defineOrchestrator(fs, &orchestrator)
	strict := fs.Bool("strict", false, "end with 2 where there are warnings, too")
	schema := fs.Bool("schema", false, "print a JSON Schema of pipeline files, for editors, and check nothing")
	rest, err := parseFlags(fs, args, 1)
	if err != nil {
		return err
	}
	if *schema {
		return printJSON(os.Stdout, pipelineSchema())
	}
	if err := checkOrchestrator(fs, orchestrator); err != nil {
		return err
	}
	file, err := fileArgument(fs, *named, rest)
	if err != nil {
		return err
	}
	p, err := readPipeline(file, os.LookupEnv)
	report := newCheckReport(file, p, err, orchestrator)
	report.OK = err == nil && !(*strict && len(report.Warnings) > 0)
	if *asJSON {
		if err := printJSON(os.Stdout, report); err != nil {
			return err
		}
		err = nil
	}
	switch {
	case err != nil:
		return &exitError{exitUsage, err}
	case *asJSON && !report.OK:
		return &exitError{code: exitUsage}
	case *asJSON:
		return nil
	}
	for _, w := range report.Warnings {
		fmt.Fprintf(os.Stderr, "%s: warning: %s\n", file, w)
	}
	if !report.OK {
		return &exitError{exitUsage, fmt.Errorf("%s has warnings, which -strict does not allow: %d", file, len(report.Warnings))}
	}
	fmt.Printf("%s: ok: pipeline %s, %d sources, %d processors, %d sinks\n", file, p.Metadata.Name, len(p.Spec.Sources), len(p.Spec.Processors), len(p.Spec.Sinks))
	return nil
}

func printJSON(w io.Writer, value any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(value)
}

// newCheckReport says what readPipeline found in file, and what there is to warn of.
func newCheckReport(file string, p *Pipeline, err error, orchestrator string) checkReport {
	out := checkReport{File: file, Errors: []checkError{}, Warnings: []warning{}}
	var found *fileErrors
	switch {
	case errors.As(err, &found):
		out.Errors, out.More = found.entries(), found.more
	case err != nil:
		out.Errors = append(out.Errors, checkError{Message: err.Error()})
	default:
		out.Pipeline, out.Warnings = p.Metadata.Name, p.warnings(orchestrator)
	}
	return out
}

// warnings looks at what the file names: programs, folders, files, ports and events.
func (p *Pipeline) warnings(orchestrator string) []warning {
	out := []warning{}
	ports := make(map[string]string) // the component that has it
	for _, c := range p.components() {
		warn := func(field, format string, args ...any) {
			out = append(out, warning{c.ID, field, fmt.Sprintf(format, args...)})
		}
		if c.Image == "" {
			c.commandWarnings(warn)
		} else {
			c.imageWarnings(orchestrator, warn)
		}
		for _, name := range slices.Sorted(maps.Keys(c.EnvFiles)) {
			if _, err := readEnvFile(c.EnvFiles[name]); err != nil {
				warn("env_files."+name, "%v", err)
			}
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
		for _, event := range p.unheard(c) {
			warn("input_event_types", "no input of it puts out %q", event)
		}
	}
	return out
}

// publishedPort is what an entry of ports takes of the host: without the port of the
// container, and TCP not named.
func publishedPort(entry string) string {
	entry, protocol, _ := strings.Cut(entry, "/")
	port := entry[:strings.LastIndexByte(entry, ':')] // checkPort has found it right
	if protocol != "" && protocol != "tcp" {
		port += "/" + protocol
	}
	return port
}

func (c *Component) commandWarnings(warn func(field, format string, args ...any)) {
	if dir, err := os.Stat(c.WorkingDir); err != nil {
		warn("working_dir", "%v", err)
	} else if !dir.IsDir() {
		warn("working_dir", "%q is no folder", c.WorkingDir)
	}
	if program, err := exec.LookPath(c.Command[0]); err != nil {
		warn("command", "%v", describeProgram(c.Command[0], c.WorkingDir, err))
	} else if !filepath.IsAbs(program) {
		warn("command", "%q is found in PATH as %q, which depends on the folder that flowctl is started in", c.Command[0], program)
	} else if fault := scriptFault(program); fault != "" {
		warn("command", "cannot run %q: %s", c.Command[0], fault)
	}
	if len(c.HealthCommand) > 0 {
		if _, err := exec.LookPath(c.HealthCommand[0]); err != nil {
			warn("health_check", "cannot run %q: %v", c.HealthCommand[0], cause(err))
		}
	}
}

// What is wrong with scripts that look right.
const (
	noProgram = "it is no program of this machine, and has no #! line"
	crlfLine  = `its #! line ends in CRLF, of which the CR counts; remove it from every line: sed -i 's/\r$//'`
)

// scriptFault says what keeps a program from being run although it is executable, ""
// for nothing: its #! line (execve(2)), or that it is a text without one.
func scriptFault(program string) string {
	f, err := os.Open(program)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head) // a shorter file is as good
	line, ok := strings.CutPrefix(string(head[:n]), "#!")
	if !ok && !strings.Contains(line, "\x00") {
		return noProgram
	}
	line, _, _ = strings.Cut(line, "\n")
	words := strings.Fields(line)
	if !ok || len(words) == 0 {
		return ""
	}
	if strings.HasSuffix(line, "\r") {
		return crlfLine
	}
	if _, err := os.Stat(words[0]); err != nil {
		return fmt.Sprintf("the interpreter that it names, %q, does not exist", words[0])
	}
	return ""
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

// unheard returns the events that c reads and none of its inputs puts out, where they
// all say what they do put out.
func (p *Pipeline) unheard(c *Component) []string {
	heard := make(map[string]bool)
	for _, in := range p.components() {
		if !slices.Contains(c.Inputs, in.ID) {
			continue
		}
		if len(in.OutputEventTypes) == 0 {
			return nil
		}
		for _, event := range in.OutputEventTypes {
			heard[event] = true
		}
	}
	if len(c.Inputs) == 0 {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(c.InputEventTypes), func(event string) bool { return heard[event] })
}

// pipelineSchema is the JSON Schema (draft 2020-12) of a pipeline file, made from the
// model. It is laxer than reading is: what depends on other fields it cannot say.
func pipelineSchema() map[string]any {
	out := typeSchema(reflect.TypeFor[Pipeline](), "")
	out["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	out["title"] = "flowctl pipeline"
	out["$defs"] = map[string]any{"Component": structSchema(reflect.TypeFor[Component]())}
	return out
}

// anyReference matches a string that holds a ${...}, of which a schema knows nothing.
const anyReference = `\$\{`

// typeSchema is the schema of a value of type t that keeps to rule, as in the tag
// check of the model.
func typeSchema(t reflect.Type, rule string) map[string]any {
	switch {
	case t == reflect.TypeFor[Duration]():
		return map[string]any{"type": "string", "pattern": `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$|` + anyReference}
	case t == reflect.TypeFor[Component]():
		return map[string]any{"$ref": "#/$defs/Component"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return typeSchema(t.Elem(), rule)
	case reflect.Struct:
		return structSchema(t)
	case reflect.Slice:
		return map[string]any{"type": "array", "items": typeSchema(t.Elem(), rule)}
	case reflect.Map:
		out := map[string]any{"type": "object"}
		if t.Elem().Kind() != reflect.Interface {
			out["additionalProperties"] = typeSchema(t.Elem(), rule)
		}
		return out
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int:
		return map[string]any{"type": "integer", "minimum": map[string]int{"from1": 1}[rule]}
	}
	return textSchema(rule)
}

func structSchema(t reflect.Type) map[string]any {
	properties, required := make(map[string]any), []string{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		properties[name] = typeSchema(f.Type, f.Tag.Get("check"))
		if options != "omitempty" {
			required = append(required, name)
		}
	}
	return map[string]any{"type": "object", "properties": properties, "required": required, "additionalProperties": false}
}

// textSchema is that of a string.
func textSchema(rule string) map[string]any {
	out := map[string]any{"type": "string"}
	allow := func(values ...string) {
		out["anyOf"] = []any{map[string]any{"enum": values}, map[string]any{"pattern": anyReference}}
	}
	switch rule {
	case "version":
		allow("flowctl/v1")
	case "kind":
		allow("Pipeline")
	case "policy":
		allow(restartNo, restartOnFailure, restartAlways)
	case "signal":
		allow(stopSignalNames...)
	case "name":
		out["pattern"] = namePattern.String() + "|" + anyReference
	case "health":
		out["pattern"] = `^((https?|tcp|grpc)://|exec:)|` + anyReference
	case "volume":
		out["pattern"] = `^[^:]+:/|` + anyReference
	case "port":
		out["pattern"] = portPattern.String() + "|" + anyReference
	case "filled", "path", "image":
		out["minLength"] = 1
	}
	return out
}
