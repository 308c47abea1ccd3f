//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// errorRow is one way to fail: the whole of standard error, and the exit code. In args
// and want DIR is a folder of the row's own, in which flowctl runs; what differs from
// run to run is N, T or P in want.
type errorRow struct {
	name    string
	args    string
	prepare setup
	act     func(p *process) // what happens while it runs
	code    int
	want    string
}

// varying is what differs from run to run.
var varying = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile(`\bpid \d+`), "pid N"},
	{regexp.MustCompile(`process \d+`), "process N"},
	{regexp.MustCompile(`ran for [0-9.]+(ms|s)`), "ran for T"},
	{regexp.MustCompile(`no heartbeat for [0-9.]+(ms|s)`), "no heartbeat for T"},
	{regexp.MustCompile(`it registered [0-9.]+(ms|s) ago`), "it registered T ago"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:P"},
	{regexp.MustCompile(`there is none in [^;]+;`), "there is none in RUNS;"},
	{regexp.MustCompile(`failed \d+ times`), "failed N times"},
}

func normalised(text, dir string) string {
	text = strings.ReplaceAll(text, dir, "DIR")
	for _, v := range varying {
		text = v.pattern.ReplaceAllString(text, v.with)
	}
	return text
}

// setup makes what is in DIR, and returns how flowctl is to be started.
type setup func(t *testing.T, dir string) []option

// havePipeline makes DIR/p.json.
func havePipeline(components ...Component) setup {
	return func(t *testing.T, dir string) []option {
		text, err := os.ReadFile(writePipeline(t, components...))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "p.json"), string(text))
		return nil
	}
}

// haveFile makes DIR/name beside a pipeline that would run.
func haveFile(name, text string) setup {
	return both(havePipeline(shell("a", "exec sleep 300")), haveProgram(name, text, 0o600))
}

func haveProgram(name, text string, mode os.FileMode) setup {
	return func(t *testing.T, dir string) []option {
		if err := os.Chmod(writeFile(t, filepath.Join(dir, name), text), mode); err != nil {
			t.Fatal(err)
		}
		return nil
	}
}

func both(first, second setup) setup {
	return func(t *testing.T, dir string) []option { return append(first(t, dir), second(t, dir)...) }
}

// haveMismatch makes a certificate and the key of another.
func haveMismatch(t *testing.T, dir string) []option {
	ca := newCA(t)
	writeFile(t, filepath.Join(dir, "a.pem"), issue(t, ca, nil).cert)
	writeFile(t, filepath.Join(dir, "b.key"), issue(t, ca, nil).key)
	return haveFile("x", "")(t, dir)
}

// haveRun has the pipeline run already, and its file changed after that.
func haveRun(change string) setup {
	return func(t *testing.T, dir string) []option {
		haveFile("x", "")(t, dir)
		runs := withEnv("XDG_RUNTIME_DIR=" + t.TempDir())
		start(t, runArgs("p.json"), inFolder(dir), runs).waitReady()
		if change != "" {
			writeFile(t, filepath.Join(dir, "p.json"), change)
		}
		return []option{runs}
	}
}

// haveLocked has a control plane with DIR/s.json.
func haveLocked(t *testing.T, dir string) []option {
	start(t, strings.Fields("server -control-plane-port 0 -db-path s.json"), inFolder(dir)).waitErr("registry restored")
	return nil
}

// intoFull has standard output on a disk that is full.
func intoFull(t *testing.T, _ string) []option {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { full.Close() })
	return []option{func(p *process) { p.cmd.Stdout = full }}
}

// changed returns c with a field that change sets.
func changed(c Component, change func(c *Component)) Component {
	change(&c)
	return c
}

// reading gives c inputs.
func reading(c Component, inputs ...string) Component {
	c.Inputs = inputs
	return c
}

// plainProgram is a component that knows nothing of flowctl.
func plainProgram(id string, argv ...string) Component {
	return Component{ID: id, Command: argv, Register: new(false)}
}

// onceReady sends the process of component a a signal.
func onceReady(sig syscall.Signal) func(p *process) {
	return func(p *process) {
		p.waitReady()
		p.tell("a", sig)
	}
}

const (
	tryRun   = "Try: flowctl help run\n"
	tryCheck = "flowctl: try: flowctl check p.json shows all programs, folders and files that are missing\n"
	quietRun = "run p.json -control-plane-port 0"
)

var commandErrors = []errorRow{
	{name: "unknown command", args: "start", code: exitUsage, want: "flowctl: unknown command \"start\": it must be one of run, check, list, logs, wait, restart, reload, stop, runs, translate, sandbox, version, help\nTry: flowctl help\n"},
	{name: "a file for a command", args: "p.json", code: exitUsage, want: "flowctl: unknown command \"p.json\": to run a file, write: flowctl run p.json\nTry: flowctl help\n"},
	{name: "help of nothing", args: "help nosuch", code: exitUsage, want: "flowctl: there is no help for \"nosuch\": it must be one of run, check, list, logs, wait, restart, reload, stop, runs, translate, sandbox, version, help\nTry: flowctl help\n"},
	{name: "unknown flag", args: "run -nosuch", code: exitUsage, want: "flowctl: run has no flag -nosuch\n" + tryRun},
	{name: "misspelt flag", args: "run -log-levl x", code: exitUsage, want: "flowctl: run has no flag -log-levl, did you mean -log-level?\n" + tryRun},
	{name: "flag of another command", args: "list -until ready", code: exitUsage, want: "flowctl: list has no flag -until\nTry: flowctl help list\n"},
	{name: "no value", args: "run -heartbeat-ttl", code: exitUsage, want: "flowctl: flag needs an argument: -heartbeat-ttl\n" + tryRun},
	{name: "no number", args: "run -control-plane-port x", code: exitUsage, want: "flowctl: -control-plane-port \"x\": it must be a number from 0 to 65535\n" + tryRun},
	{name: "port", args: "run p.json -control-plane-port 65536", code: exitUsage, want: "flowctl: -control-plane-port \"65536\": it must be a number from 0 to 65535\n" + tryRun},
	{name: "address", args: "run p.json -control-plane-address=", code: exitUsage, want: "flowctl: -control-plane-address \"\": it must be a host or unix:PATH; 0.0.0.0 is all interfaces\n" + tryRun},
	{name: "address with a port", args: "run p.json -control-plane-address 127.0.0.1:9000", code: exitUsage, want: "flowctl: -control-plane-address \"127.0.0.1:P\": it must be a host alone, such as \"127.0.0.1\"; the port is -control-plane-port 9000\n" + tryRun},
	{name: "IPv6 with a port", args: "server -control-plane-address [::1]:9000", code: exitUsage, want: "flowctl: -control-plane-address \"[::1]:9000\": it must be a host alone, such as \"::1\"; the port is -control-plane-port 9000\nTry: flowctl help server\n"},
	{name: "long path of a socket", args: "run p.json -control-plane-address unix:/" + longName, code: exitUsage, want: "flowctl: -control-plane-address \"unix:/" + longName + "\": the path \"/" + longName + "\" has 201 bytes: the kernel allows 107\n" + tryRun},
	{name: "port of a socket file", args: "run p.json -control-plane-address unix:s -control-plane-port 5", code: exitUsage, want: "flowctl: -control-plane-port 5: a socket file, -control-plane-address \"unix:s\", has no port\n" + tryRun},
	{name: "no unit", args: "run p.json -start-timeout 5", code: exitUsage, want: "flowctl: -start-timeout \"5\": it must be a time with a unit, such as 30s\n" + tryRun},
	{name: "too short: start-timeout", args: "run p.json -start-timeout -1s", code: exitUsage, want: "flowctl: -start-timeout \"-1s\": it must be 10ms at least\n" + tryRun},
	{name: "too short: stop-timeout", args: "run p.json -stop-timeout 0s", code: exitUsage, want: "flowctl: -stop-timeout \"0s\": it must be 10ms at least\n" + tryRun},
	{name: "too short: unhealthy-timeout", args: "run p.json -unhealthy-timeout 1ns", code: exitUsage, want: "flowctl: -unhealthy-timeout \"1ns\": it must be 10ms at least\n" + tryRun},
	{name: "too short: heartbeat-ttl", args: "server -heartbeat-ttl 1ms", code: exitUsage, want: "flowctl: -heartbeat-ttl \"1ms\": it must be 10ms at least\nTry: flowctl help server\n"},
	{name: "too short: janitor-interval", args: "server -janitor-interval 1ms", code: exitUsage, want: "flowctl: -janitor-interval \"1ms\": it must be 10ms at least\nTry: flowctl help server\n"},
	{name: "log-format", args: "run p.json -log-format xml", code: exitUsage, want: "flowctl: -log-format \"xml\": it must be auto, text, json or journal\n" + tryRun},
	{name: "log-level", args: "run p.json -log-level loud", code: exitUsage, want: "flowctl: -log-level \"loud\": it must be debug, info, warn or error\n" + tryRun},
	{name: "show-status", args: "run p.json -show-status=maybe", code: exitUsage, want: "flowctl: -show-status \"maybe\": it must be true or false\n" + tryRun},
	{name: "orchestrator", args: "run p.json -orchestrator k8s", code: exitUsage, want: "flowctl: -orchestrator \"k8s\": it must be process or container\n" + tryRun},
	{name: "orchestrator of check", args: "check p.json -orchestrator k8s", code: exitUsage, want: "flowctl: -orchestrator \"k8s\": it must be process or container\nTry: flowctl help check\n"},
	{name: "engine for nothing", args: "run p.json -engine docker", code: exitUsage, want: "flowctl: -engine \"docker\" has no effect without -orchestrator container\n" + tryRun},
	{name: "until", args: "run p.json -until never", code: exitUsage, want: "flowctl: -until \"never\": it must be stopped, ready or done\n" + tryRun},
	{name: "state or none", args: "server -db-path x -no-persistence", code: exitUsage, want: "flowctl: -db-path and -no-persistence contradict each other\nTry: flowctl help server\n"},
	{name: "certificate without key", args: "run p.json -tls-cert x", code: exitUsage, want: "flowctl: -tls-cert \"x\": it needs -tls-key, the file of its private key\n" + tryRun},
	{name: "empty file of TLS", args: "run p.json -tls-cert=", code: exitUsage, want: "flowctl: -tls-cert \"\": it must be a file\n" + tryRun},
	{name: "CA alone", args: "server -tls-ca-cert x", code: exitUsage, want: "flowctl: -tls-ca-cert \"x\": it needs -tls-cert and -tls-key, the control plane's own certificate\nTry: flowctl help server\n"},
	{name: "key without certificate", args: "server -tls-key x", code: exitUsage, want: "flowctl: -tls-key \"x\": it needs -tls-cert, the file of its certificate\nTry: flowctl help server\n"},
	{name: "CA and certificate", args: "server -tls-ca-cert x -tls-cert y", code: exitUsage, want: "flowctl: -tls-cert \"y\": it needs -tls-key, the file of its private key\nTry: flowctl help server\n"},
	{name: "TLS on a socket file", args: "server -tls-cert x -tls-key y -control-plane-address unix:z", code: exitUsage,
		want: "flowctl: -tls-cert \"x\": it must not be given with -control-plane-address \"unix:z\", a socket file that is open to its user alone\nTry: flowctl help server\n"},
	{name: "certificate of list without key", args: "list -tls-cert x", code: exitUsage, want: "flowctl: -tls-cert \"x\": it needs -tls-key, the file of its private key\nTry: flowctl help list\n"},
	{name: "two files", args: "run -f p.json q.json", code: exitUsage, want: "flowctl: two pipeline files are named: \"p.json\" by -f, and \"q.json\"\n" + tryRun},
	{name: "two arguments", args: "check p.json q.json", code: exitUsage, want: "flowctl: check: unexpected argument \"q.json\"\nTry: flowctl help check\n"},
	{name: "two ids", args: "list a b", code: exitUsage, want: "flowctl: list: unexpected argument \"b\"\nTry: flowctl help list\n"},
	{name: "URL for an endpoint", args: "list -e http://127.0.0.1:8080", code: exitUsage, want: "flowctl: -e \"http://127.0.0.1:P\": it must be host:port or unix:PATH\nTry: flowctl help list\n"},
	{name: "no port", args: "list -endpoint localhost", code: exitUsage, want: "flowctl: -endpoint \"localhost\": it must be host:port or unix:PATH\nTry: flowctl help list\n"},
	{name: "no number for a port", args: "list -e unix-abstract:x", code: exitUsage, want: "flowctl: -e \"unix-abstract:x\": it must be host:port or unix:PATH\nTry: flowctl help list\n"},
	{name: "no path", args: "list -e unix://", code: exitUsage, want: "flowctl: -e \"unix://\": it must have a path: unix:PATH\nTry: flowctl help list\n"},
	{name: "no URL for a socket", args: "list -e unix:/a%2fb", code: exitUsage, want: "flowctl: -e \"unix:/a%2fb\": the path \"/a%2fb\" has \"%\" in it: no %, ?, #, comma or control character can be there, since gRPC's libraries read it as a URL\nTry: flowctl help list\n"},
	{name: "zone", args: "run p.json -control-plane-address fe80::1%lo", code: exitUsage, want: "flowctl: -control-plane-address \"fe80::1%lo\": gRPC's libraries do not dial an address with a zone; :: is all interfaces\n" + tryRun},
	{name: "empty endpoint", args: "list -e=", code: exitUsage, want: "flowctl: -e \"\": it must be host:port or unix:PATH\nTry: flowctl help list\n"},
	{name: "empty endpoint of reload", args: "reload -endpoint=", code: exitUsage, want: "flowctl: -endpoint \"\": it must be host:port or unix:PATH\nTry: flowctl help reload\n"},
	{name: "argument of server", args: "server x y", code: exitUsage, want: "flowctl: server: unexpected argument \"y\"\nTry: flowctl help server\n"},
	{name: "argument of version", args: "version 2", code: exitUsage, want: "flowctl: version: unexpected argument \"2\"\nTry: flowctl help version\n"},
	{name: "endpoint and pipeline", args: "reload -e 127.0.0.1:1 demo", code: exitUsage, want: "flowctl: -endpoint \"127.0.0.1:P\" and the pipeline \"demo\": name one of them\nTry: flowctl help reload\n"},
	{name: "guard", args: "guard", code: exitUsage, want: "flowctl: guard: flowctl starts it by itself\nTry: flowctl help\n"},
	{name: "no command", args: "run p.json --", code: exitUsage, want: "flowctl: a command must come after --\n" + tryRun},
	{name: "command and until", args: "run p.json -until done -- true", code: exitUsage, want: "flowctl: -until and a command after -- contradict each other: the run ends with the command\n" + tryRun},
	{name: "command is no program", args: "run p.json -- ./p.json", prepare: haveFile("x", ""), code: exitUsage, want: "flowctl: the command after --: cannot run \"./p.json\": permission denied\n"},
	{name: "no such command", args: "run p.json -- no-such-program", prepare: haveFile("x", ""), code: exitUsage, want: "flowctl: the command after --: cannot run \"no-such-program\": executable file not found in $PATH\n"},
}

var fileErrorRows = []errorRow{
	{name: "none", args: "run", code: exitUsage, want: "flowctl: no pipeline file is named, and there is no flow.json here\n" + tryRun},
	{name: "none, check", args: "check", code: exitUsage, want: "flowctl: no pipeline file is named, and there is no flow.json here\nTry: flowctl help check\n"},
	{name: "others", args: "run", prepare: haveFile("package.json", "{}"), code: exitUsage, want: "flowctl: no pipeline file is named, and there is no flow.json here; what is here: p.json\nTry: flowctl run p.json\n"},
	{name: "others, check", args: "check", prepare: haveFile("a b.json", `{"kind": "Pipeline"}`), code: exitUsage, want: "flowctl: no pipeline file is named, and there is no flow.json here; what is here: a b.json, p.json\nTry: flowctl check 'a b.json'\n"},
	{name: "none but YAML", args: "run", prepare: haveFile("flow.yml", ""), code: exitUsage, want: "flowctl: flow.yml: a pipeline file is JSON; this turns YAML into it: " + yamlCommand("flow.yml", "flow.json") + "\n"},
	{name: "missing", args: "run q.json", code: exitUsage, want: "flowctl: cannot read pipeline file: open q.json: no such file or directory\n"},
	{name: "a folder", args: "check .", code: exitUsage, want: "flowctl: cannot read pipeline file: . is a folder\n"},
	{name: "yaml", args: "run flow.yaml", code: exitUsage, want: "flowctl: flow.yaml: a pipeline file is JSON; this turns YAML into it: " + yamlCommand("flow.yaml", "flow.json") + "\n"},
	{name: "not JSON", args: "run p.json", prepare: haveFile("p.json", "{\n  x\n}"), code: exitUsage, want: "p.json:2:3: invalid character 'x' looking for beginning of object key string\n"},
	{name: "all at once", args: "run p.json", prepare: haveFile("p.json", `{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "x"},
 "spec": {"sources": [{"id": "a", "comand": ["x"]}], "sinks": [{"id": "b", "command": ["x"], "inputs": ["aa"], "stop_timeout": 5, "env": {"K": "${NO_SUCH_NAME}"}}]}}`), code: exitUsage, want: `p.json:2:35: spec.sources[0].comand: unknown field "comand", did you mean "command"?
p.json:2:105: spec.sinks[0].inputs[0]: unknown component "aa", did you mean "a"?
p.json:2:128: spec.sinks[0].stop_timeout: must be a string with a unit, such as "5s", not a number
p.json:2:144: spec.sinks[0].env.K: ${NO_SUCH_NAME} is not set in the environment, write ${NO_SUCH_NAME:-default} for a default, $${NO_SUCH_NAME} for the text itself
`},
	{name: "a cycle", args: "check p.json", prepare: havePipeline(reading(shell("a", "true"), "b"), reading(shell("b", "true"), "a")), code: exitUsage, want: "p.json:1:216: spec.processors[1].inputs[0]: cycle, each waits for the next: a -> b -> a\n"},
	{name: "tls without a certificate", args: "run p.json", prepare: havePipeline(changed(shell("a", "true"), func(c *Component) { c.TLS = true })), code: exitUsage, want: "flowctl: p.json: \"tls\": true of a needs -tls-cert and -tls-key\n"},
	{name: "strict", args: "check -strict p.json", prepare: havePipeline(plainProgram("a", "no-such-program")), code: exitUsage, want: "p.json: warning: component a: command: cannot run \"no-such-program\": it is not found in PATH\nflowctl: p.json has warnings, which -strict does not allow: 1\n"},
}

var longName = strings.Repeat("x", 200)

var planeErrors = []errorRow{
	{name: "not this machine's", args: "run p.json -control-plane-address 192.0.2.1", prepare: haveFile("x", ""), code: exitPlane, want: "flowctl: -control-plane-address \"192.0.2.1\": it is no address of this machine; 0.0.0.0 is all of IPv4 that it has\n"},
	{name: "no folder for a socket", args: "server -no-persistence -control-plane-address unix:/no/such/folder/s", code: exitPlane, want: "flowctl: the control plane cannot listen at -control-plane-address \"unix:/no/such/folder/s\": listen unix /no/such/folder/s: bind: no such file or directory\n"},
	{name: "no certificate", args: "run p.json -tls-cert none.pem -tls-key none.key", prepare: haveFile("x", ""), code: exitPlane, want: "flowctl: -tls-cert \"none.pem\": no such file or directory\n"},
	{name: "certificate is none", args: "run p.json -tls-cert x -tls-key x", prepare: haveFile("x", "hello\n"), code: exitPlane, want: "flowctl: -tls-cert \"x\": it must hold a certificate in PEM\n"},
	{name: "key of another", args: "run p.json -tls-cert a.pem -tls-key b.key", prepare: haveMismatch, code: exitPlane, want: "flowctl: -tls-key \"b.key\": it cannot be used for -tls-cert \"a.pem\": tls: private key does not match public key\n"},
	{name: "state damaged", args: "server -control-plane-port 0 -db-path s.json", prepare: haveFile("s.json", "{"), code: exitPlane, want: "flowctl: state file DIR/s.json is damaged and kept as it is: it ends too early; move it away to begin anew\n"},
	{name: "state foreign", args: "run p.json -control-plane-port 0 -db-path s.json", prepare: haveFile("s.json", `{"a": 1}`), code: exitPlane, want: "flowctl: file DIR/s.json is no state file of flowctl and kept as it is: its \"format\" is \"\" and not \"flowctl-registry/1\"; choose another with -db-path\n"},
	{name: "state locked", args: "server -control-plane-port 0 -db-path s.json", prepare: haveLocked, code: exitPlane, want: "flowctl: state file DIR/s.json is in use by process N: choose another with -db-path, or -no-persistence\n"},
	{name: "already running", args: "run p.json -control-plane-port 0", prepare: haveRun(""), code: exitPlane, want: "flowctl: pipeline \"test\" is already running (pid N, endpoint 127.0.0.1:P)\nTry: flowctl list\n"},
	{name: "no folder for logs", args: quietRun + " -log-dir x/y", prepare: haveFile("x", ""), code: exitUsage, want: "flowctl: -log-dir: mkdir x: not a directory\n"},
	{name: "list: none", args: "list -wait=false", code: exitPlane, want: "flowctl: no pipeline is running: there is none in RUNS; name a control plane with -endpoint host:port\n"},
	{name: "list: nobody there", args: "list -wait=false -e 127.0.0.1:1", code: exitPlane, want: "flowctl: no control plane answers at 127.0.0.1:P: dial tcp 127.0.0.1:P: connect: connection refused\n"},
	{name: "list: nobody comes", args: "list -e 127.0.0.1:1", code: exitPlane, want: "flowctl: no control plane answers at 127.0.0.1:P: nothing came within 2s: dial tcp 127.0.0.1:P: connect: connection refused\n"},
	{name: "list: unknown id", args: "list nosuch", prepare: haveRun(""), code: exitFailed, want: "flowctl: no component \"nosuch\" is in what runs here: there is a\n"},
	{name: "reload: none", args: "reload", code: exitPlane, want: "flowctl: no pipeline is running: there is none in RUNS; name a control plane with -endpoint host:port\n"},
	{name: "reload: unknown", args: "reload nosuch", prepare: haveRun(""), code: exitPlane, want: "flowctl: no pipeline \"nosuch\" is running, only test\n"},
	{name: "reload: wrong file", args: "reload", prepare: haveRun("{}"), code: exitUsage, want: "flowctl: DIR/p.json:1:1: apiVersion: is missing, it must be flowctl/v1\nflowctl: DIR/p.json:1:1: kind: is missing, it must be Pipeline\nflowctl: DIR/p.json:1:1: metadata: is missing\nflowctl: DIR/p.json:1:1: spec: is missing\n"},
}

var runErrors = []errorRow{
	{name: "not found", args: quietRun, prepare: havePipeline(plainProgram("a", "no-such-program"), reading(shell("b", "exec sleep 300"), "a"), reading(shell("c", "exec sleep 300"), "b")), code: exitFailed,
		want: "flowctl: component a failed: cannot run \"no-such-program\": it is not found in PATH\nflowctl: never started, waiting for a: b, c\n" + tryCheck},
	{name: "beside the file", args: quietRun, prepare: both(havePipeline(plainProgram("a", "mine")), haveProgram("mine", "#!/bin/sh\n", 0o700)), code: exitFailed,
		want: "flowctl: component a failed: cannot run \"mine\": it is not found in PATH; the file in its folder is \"./mine\"\n" + tryCheck},
	{name: "not executable", args: quietRun, prepare: both(havePipeline(plainProgram("a", "./mine")), haveProgram("mine", "#!/bin/sh\n", 0o600)), code: exitFailed,
		want: "flowctl: component a failed: cannot run \"DIR/mine\": it is not executable (chmod +x)\n" + tryCheck},
	{name: "wrong interpreter", args: quietRun, prepare: both(havePipeline(plainProgram("a", "./mine")), haveProgram("mine", "#!/no/such\n", 0o700)), code: exitFailed,
		want: "flowctl: component a failed: cannot run \"DIR/mine\": the interpreter that it names, \"/no/such\", does not exist\n" + tryCheck},
	{name: "CRLF", args: quietRun, prepare: both(havePipeline(plainProgram("a", "./mine")), haveProgram("mine", "#!/bin/sh\r\n", 0o700)), code: exitFailed,
		want: "flowctl: component a failed: cannot run \"DIR/mine\": its #! line ends in CRLF, of which the CR counts; remove it from every line: sed -i 's/\\r$//'\n" + tryCheck},
	{name: "no working_dir", args: quietRun, prepare: havePipeline(changed(shell("a", "true"), func(c *Component) { c.WorkingDir = "nowhere" })), code: exitFailed,
		want: "flowctl: component a failed: cannot enter its working_dir \"DIR/nowhere\": no such file or directory\n" + tryCheck},
	{name: "no env_files", args: quietRun, prepare: havePipeline(changed(shell("a", "true"), func(c *Component) { c.EnvFiles = map[string]string{"KEY": "key"} })), code: exitFailed,
		want: "flowctl: component a failed: env_files.KEY: open DIR/key: no such file or directory\n" + tryCheck},
	{name: "ended before ready", args: quietRun, prepare: havePipeline(changed(shell("a", "echo connecting; echo no such host; exit 3"), func(c *Component) { c.Register = nil })), code: exitFailed,
		want: "flowctl: component a failed: exit status 3 before it was ready (pid N, ran for T, not registered)\nflowctl: the last lines of a:\n  connecting\n  no such host\n"},
	{name: "silent", args: quietRun, prepare: havePipeline(changed(shell("a", "exit 3"), func(c *Component) { c.Register = nil })), code: exitFailed,
		want: "flowctl: component a failed: exit status 3 before it was ready (pid N, ran for T, not registered)\nflowctl: try: it printed nothing: run sh by hand, in the folder DIR\n"},
	{name: "done before ready", args: quietRun, prepare: havePipeline(changed(shell("a", "exit 0"), func(c *Component) { c.Register = nil })), code: exitFailed,
		want: "flowctl: component a failed: exit status 0 before it was ready (pid N, ran for T, not registered)\nflowctl: try: if a does not speak to flowctl, give it \"register\": false\n"},
	{name: "ended", args: quietRun, prepare: havePipeline(actor("a", role{Dialect: "v1", OnUSR1: "exit", Code: 7}), reading(actor("b", role{Dialect: "v1"}), "a")), act: onceReady(syscall.SIGUSR1), code: exitFailed,
		want: "flowctl: component a failed: exit status 7 (pid N, ran for T, registered)\nflowctl: the last lines of a:\n  registered\nflowctl: stopped, needing a: b\nflowctl: try: if it may fail and be started again, give it \"restart_policy\": \"on-failure\"\n"},
	{name: "exit 127", args: quietRun, prepare: havePipeline(shell("a", "exit 127")), code: exitFailed,
		want: "flowctl: component a failed: exit status 127 (pid N, ran for T)\nflowctl: try: 127 is how a shell says that a program is not found: PATH is that of its env, else flowctl's, the folder is DIR\n"},
	{name: "exit 126", args: quietRun, prepare: havePipeline(shell("a", "exit 126")), code: exitFailed,
		want: "flowctl: component a failed: exit status 126 (pid N, ran for T)\nflowctl: try: 126 is how a shell says that a file is no program, or not executable (chmod +x)\n"},
	{name: "SIGKILL", args: quietRun, prepare: havePipeline(shell("a", "exec sleep 300")), act: onceReady(syscall.SIGKILL), code: exitFailed,
		want: "flowctl: component a failed: killed by signal 9 (killed) (pid N, ran for T)\nflowctl: try: flowctl did not send it; the kernel does when memory is short: dmesg | grep -i oom, or journalctl -k\n"},
	{name: "SIGSEGV", args: quietRun, prepare: havePipeline(shell("a", "ulimit -c 0; kill -SEGV $$")), code: exitFailed,
		want: "flowctl: component a failed: killed by signal 11 (segmentation fault) (pid N, ran for T)\nflowctl: try: it has crashed: coredumpctl info shows where, if the system keeps core dumps\n"},
	{name: "SIGTERM", args: quietRun, prepare: havePipeline(shell("a", "exec sleep 300")), act: onceReady(syscall.SIGTERM), code: exitFailed,
		want: "flowctl: component a failed: killed by signal 15 (terminated) (pid N, ran for T)\nflowctl: try: flowctl did not send it: something else on this machine has ended it\n"},
	{name: "SIGPIPE", args: quietRun, prepare: havePipeline(shell("a", "kill -PIPE $$")), code: exitFailed,
		want: "flowctl: component a failed: killed by signal 13 (broken pipe) (pid N, ran for T)\nflowctl: try: it wrote to a connection or pipe that nobody reads any more: see what it was connected to\n"},
	{name: "its port in use", args: quietRun, prepare: havePipeline(shell("a", "echo bind: Address already in use; exit 1")), code: exitFailed,
		want: "flowctl: component a failed: exit status 1 (pid N, ran for T)\nflowctl: the last lines of a:\n  bind: Address already in use\nflowctl: try: a port that a wants is taken: ss -ltnp shows who has it; a free one is in its $HEALTH_PORT\n"},
	{name: "its files", args: quietRun, prepare: havePipeline(shell("a", "echo accept: too many open files; exit 1")), code: exitFailed,
		want: "flowctl: component a failed: exit status 1 (pid N, ran for T)\nflowctl: the last lines of a:\n  accept: too many open files\nflowctl: try: raise the limit of open files: ulimit -n 65536, or LimitNOFILE= of a unit\n"},
	{name: "max_restarts", args: quietRun, prepare: havePipeline(changed(shell("a", "echo no; exit 4"), func(c *Component) { c.RestartPolicy, c.MaxRestarts = restartOnFailure, 1 })), code: exitFailed,
		want: "flowctl: component a failed: exit status 4, and max_restarts (1) is used up (pid N, ran for T)\nflowctl: the last lines of a:\n  no\n"},
	{name: "not registered", args: quietRun + " -start-timeout 100ms", prepare: havePipeline(actor("a", role{}), reading(shell("b", "exec sleep 300"), "a")), code: exitNotReady,
		want: "flowctl: component a failed: not ready within its start timeout of 100ms: not registered (pid N, ran for T, not registered)\nflowctl: never started, waiting for a: b\nflowctl: try: if a does not speak to flowctl, give it \"register\": false; if it does, it has to dial $FLOWCTL_ENDPOINT; if it is only slow, give it a longer \"start_timeout\"\n"},
	{name: "check has not passed", args: quietRun + " -start-timeout 2s", prepare: havePipeline(changed(shell("a", "exec sleep 300"), func(c *Component) { c.HealthCheck = "tcp://127.0.0.1:1" })), code: exitNotReady,
		want: "flowctl: component a failed: not ready within its start timeout of 2s: health_check tcp://127.0.0.1:P has not passed yet: dial tcp 127.0.0.1:P: connect: connection refused (pid N, ran for T)\nflowctl: try: ask by hand what its health_check asks, while a runs; if it is only slow, give it a longer \"start_timeout\" or \"health_timeout\"\n"},
	{name: "check is not answered", args: quietRun, prepare: havePipeline(changed(shell("a", "exec sleep 300"), func(c *Component) {
		c.HealthCheck, c.HealthTimeout, c.StartTimeout = "exec:sleep 300", Duration(time.Minute), Duration(200*time.Millisecond)
	})), code: exitNotReady,
		want: "flowctl: component a failed: not ready within its start timeout of 200ms: health_check exec:sleep *** has not been answered yet (pid N, ran for T)\nflowctl: try: ask by hand what its health_check asks, while a runs; if it is only slow, give it a longer \"start_timeout\" or \"health_timeout\"\n"},
	{name: "unhealthy", args: quietRun + " -unhealthy-timeout 100ms", prepare: havePipeline(actor("a", role{Dialect: "v1", OnUSR1: "unhealthy"})), act: onceReady(syscall.SIGUSR1), code: exitFailed,
		want: "flowctl: component a failed: unhealthy for 100ms (-unhealthy-timeout): it declared itself UNHEALTHY (pid N, ran for T, registered)\nflowctl: the last lines of a:\n  registered\nflowctl: try: it is a that says so: look for the reason in its lines, or give it longer with -unhealthy-timeout\n"},
	{name: "silent for too long", args: quietRun + " -unhealthy-timeout 100ms -heartbeat-ttl 200ms", prepare: havePipeline(actor("a", role{Dialect: "v1", Mute: true})), code: exitFailed,
		want: "flowctl: component a failed: unhealthy for 100ms (-unhealthy-timeout): no heartbeat since it registered T ago, the TTL is 200ms (pid N, ran for T, registered)\nflowctl: the last lines of a:\n  registered\nflowctl: try: if a sends no heartbeats, give it a \"health_check\": a pass counts as one\n"},
	{name: "check fails", args: quietRun + " -unhealthy-timeout 100ms", prepare: both(havePipeline(changed(shell("a", "exec sleep 300"), func(c *Component) {
		c.HealthCheck, c.HealthInterval, c.HealthRetries = "exec:test -e here", Duration(20*time.Millisecond), 2
	})), haveProgram("here", "", 0o600)), act: func(p *process) {
		p.waitReady()
		os.Remove(filepath.Join(p.cmd.Dir, "here"))
	}, code: exitFailed,
		want: "flowctl: component a failed: unhealthy for 100ms (-unhealthy-timeout): health_check exec:test *** failed N times running: exit status 1 (pid N, ran for T)\nflowctl: try: ask by hand what its health_check asks, while a runs; if it is only slow, give it a longer \"health_timeout\" or more \"health_retries\", or run with a longer -unhealthy-timeout\n"},
	{name: "full disk", args: quietRun, prepare: both(havePipeline(shell("a", "echo out; exec sleep 300")), intoFull), code: exitFailed, want: "flowctl: standard output cannot be written: write /dev/stdout: no space left on device\n"},
	{name: "command fails", args: quietRun + " -- false", prepare: havePipeline(shell("a", "exec sleep 300")), code: 1, want: "flowctl: the command \"false\" after -- failed: exit status 1\n"},
}

// Each error tells who reads it what is wrong, what was seen, what is allowed or what
// to try; in JSON too, and then all of standard error is JSON.
func TestErrors(t *testing.T) {
	t.Parallel()
	for _, row := range slices.Concat(commandErrors, fileErrorRows, planeErrors, runErrors) {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p, dir := row.start(t, row.args)
			if row.act != nil {
				row.act(p)
			}
			p.exit(row.code)
			lines := slices.DeleteFunc(slices.Collect(strings.Lines(p.stderr.String())), func(line string) bool { return strings.HasPrefix(line, "time=") })
			if got := normalised(strings.Join(lines, ""), dir); got != row.want {
				t.Errorf("got\n%swant\n%s", got, row.want)
			}
			if out := p.stdout.String(); out != "" && !strings.Contains(row.want, "component") {
				t.Errorf("standard output: %q", out)
			}
			if row.code == exitUsage || row.code == exitPlane {
				p.hasNot(p.stderr, "msg=started")
			}
			command, rest, _ := strings.Cut(row.args, " ")
			if row.act != nil || command != "run" && command != "server" || strings.Contains(rest, "-log-format") {
				return
			}
			p, dir = row.start(t, strings.TrimSpace(command+" -log-format json "+rest))
			p.exit(row.code)
			row.checkJSON(t, p, dir)
		})
	}
}

func (row errorRow) start(t *testing.T, args string) (p *process, dir string) {
	dir = t.TempDir()
	options := []option{inFolder(dir)}
	if row.prepare != nil {
		options = append(options, row.prepare(t, dir)...)
	}
	return start(t, strings.Fields(args), options...), dir
}

// checkJSON wants a report last that says what the text does, as README documents it.
func (row errorRow) checkJSON(t *testing.T, p *process, dir string) {
	t.Helper()
	var last string
	for line := range strings.Lines(p.stderr.String()) {
		var log struct{ Time, Level, Msg string }
		if err := json.Unmarshal([]byte(line), &log); err != nil || log.Time == "" || log.Level == "" || log.Msg == "" {
			t.Fatalf("%v: %s\n%s", err, line, p)
		}
		last = line
	}
	var got report
	dec := json.NewDecoder(strings.NewReader(last))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&got); err != nil || got.Msg != "flowctl failed" || got.Level != "ERROR" || got.ExitCode != row.code {
		t.Fatalf("%v: %s", err, last)
	}
	for i := range got.Failures {
		got.Failures[i].expected = strings.Contains(row.want, "registered)") // the one thing that is not in JSON
	}
	var text strings.Builder
	got.writeText(&text)
	if said := normalised(text.String(), dir); said != row.want {
		t.Errorf("the report says\n%swant\n%s%s", said, row.want, last)
	}
}

// The form of errors is known from the command line, however wrong it is.
func TestErrors_FormIsKnownFromAWrongCommandLine(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args string
		json bool
	}{
		{"run -nosuch -log-format json", true},
		{"run -nosuch -log-format=json", true},
		{"server --log-format json x", true},
		{"-log-format json", true},
		{"run -log-format json -log-format text", false},
		{"run log-format json x", false},
		{"run nosuch.json -- x -log-format json", false},
		{"run nosuch.json -log-format", false},
	} {
		code, out, stderr := call(t, strings.Fields(tt.args)...)
		if code != exitUsage || out != "" || json.Valid([]byte(stderr)) != tt.json {
			t.Errorf("%s: exit %d\n%s%s", tt.args, code, out, stderr)
		}
	}
}

// On a terminal a pipeline that is ready says once what to type in another.
func TestRun_TellsCommandsOnATerminalOnce(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("no script(1) here, which makes a terminal")
	}
	const want = `msg="in another terminal" see="flowctl list" reload="flowctl reload"`
	file := writePipeline(t, shell("a", "exec sleep 300"))
	for _, tt := range []struct {
		more  string
		count int
	}{{"-- true", 1}, {"-log-format json -- true", 0}, {"-until ready", 0}} {
		p := start(t, []string{"--version"}) // for its harness alone
		<-p.done
		screen := filepath.Join(t.TempDir(), "screen")
		cmd := exec.Command("script", "-qec", "exec "+flowctlProgram()+" run "+file+` -log-dir "" -control-plane-port 0 `+tt.more, screen)
		cmd.Env = append(p.cmd.Env, "SHELL=/bin/sh")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		if text, err := os.ReadFile(screen); err != nil || strings.Count(string(text), want) != tt.count {
			t.Errorf("%s: %v\n%s", tt.more, err, text)
		}
	}
	p := launch(t, file, "-until", "ready")
	p.exit(exitOK)
	p.hasNot(p.stderr, "in another terminal")
}

// However many fail: each is named, and the report is whole.
func TestErrors_EachOfManyFailuresIsNamed(t *testing.T) {
	t.Parallel()
	const many = 60
	var components []Component
	for i := range many {
		components = append(components, plainProgram(fmt.Sprint("c", i), "no-such-program"))
	}
	file := writePipeline(t, components...)
	p := launch(t, file, "-log-format", "json")
	p.exit(exitFailed)
	lines := slices.Collect(strings.Lines(p.stderr.String()))
	var got report
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &got); err != nil || len(got.Failures) != many {
		t.Errorf("%v, %d failures\n%s", err, len(got.Failures), p)
	}
	p = launch(t, file)
	p.exit(exitFailed)
	text := p.stderr.String()
	if failed, shown := strings.Count(text, "flowctl: component c"), strings.Count(text, "flowctl: try: "); failed != many || shown != mostShown {
		t.Errorf("%d are named, %d shown\n%s", failed, shown, p)
	}
}

// The value of a reference can be a secret: errors name the reference.
func TestCheck_ErrorsShowNoValues(t *testing.T) {
	t.Parallel()
	file := writeFile(t, filepath.Join(t.TempDir(), "flow.json"), `{"apiVersion": "${SECRET}", "kind": "Pipeline", "metadata": {"name": "x${SECRET}"}, "spec": {"sources": [
{"id": "${SECRET}", "command": ["x"], "health_check": "${SECRET}", "health_interval": "${SECRET}", "stop_timeout": "${DAYS:-x}", "env": {"A": "${SECRET}"}},
{"id": "b", "image": "${SECRET}", "ports": ["${SECRET}", "1:${PORT}"], "volumes": ["${SECRET}"], "working_dir": "${SECRET}", "restart_policy": "${SECRET}", "stop_signal": "${SECRET}"},
{"id": "c", "command": ["x"], "health_check": "http://${SECRET}:${PORT}/${SECRET}", "depends_on": ["${SECRET}", "${ONE}", "${ONE}"]},
{"id": "d", "command": ["x"], "health_check": "tcp://${ONE}", "depends_on": ["${ONE}"]}]}}`)
	p := start(t, []string{"check", file}, withEnv("SECRET=- s3cret -", "PORT=98765", "DAYS=4321h", "ONE=s3cret-one"))
	p.exit(exitUsage)
	p.has(p.stderr, `metadata.name: must be a name of letters, digits, dots, _ and -, at most 63, not "x${SECRET}"`,
		`spec.sources[0].health_interval: bad duration "${SECRET}", write it like`, `spec.sources[0].stop_timeout: bad duration "${DAYS:-x}"`,
		`spec.sources[1].image: the value of "${SECRET}" cannot be used here`, `spec.sources[1].working_dir: must be an absolute path in the container, not "${SECRET}"`)
	p.hasNot(p.stderr, "s3cret", "98765", "4321")
}
