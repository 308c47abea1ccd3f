// Flowctl runs a data pipeline: the programs that its file names, and the gRPC
// control plane that they register with, in one process.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate --template proto/buf.gen.yaml

// version is set at link time: -ldflags "-X main.version=v1.2.3".
var version string

// command is one of flowctl's commands. Its run defines its flags in fs, and gets its arguments.
type command struct {
	name, args, summary, examples string
	hidden                        bool
	run                           func(fs *flag.FlagSet, args []string) error
}

// commands returns them in the order of help. It is a function because help needs them all.
func commands() []command {
	return []command{
		{name: "run", args: "[flags] [pipeline.json] [-- command args...]", summary: "run a pipeline until it ends", run: runCommand, examples: `
  flowctl -f pipeline.json                   as: flowctl run pipeline.json
  flowctl run pipeline.json -until ready     a smoke test: 0 once all are ready
  flowctl run pipeline.json -- echo ready    run a command once all are ready
  flowctl run pipeline.json -control-plane-port 0 -log-format json
`},
		{name: "check", args: "[flags] [pipeline.json]", summary: "read and validate a pipeline file", run: checkCommand, examples: `
  flowctl check pipeline.json
  flowctl check -schema                      a JSON Schema, for an editor
`},
		{name: "list", args: "[flags] [id]", summary: "show what is registered, and how it is", run: listCommand, examples: `
  flowctl list
  flowctl list ledgers -json                 one component, with its history
  flowctl list -watch -e 127.0.0.1:8080
`},
		{name: "logs", args: "[flags] [id...]", summary: "show what components print", run: logsCommand, examples: `
  flowctl logs -n 20 ledgers
  flowctl logs -f                            go on with what comes
  flowctl logs flowctl -json                 flowctl's own log
`},
		{name: "wait", args: "[flags] [id...]", summary: "wait until components are ready, or done", run: waitCommand, examples: `
  flowctl wait -timeout 1m                   all that the pipeline here has
  flowctl wait -e 127.0.0.1:8080 ledgers     one, once a control plane answers there
`},
		{name: "restart", args: "[flags] id...", summary: "stop components, and start them again", run: restartCommand, examples: `
  flowctl restart ledgers                    say, its program was built anew
  flowctl restart ledgers -wait=false        do not wait until it is ready again
`},
		{name: "reload", args: "[flags] [pipeline]", summary: "take over a changed pipeline file", run: reloadCommand, examples: `
  flowctl reload
`},
		{name: "stop", args: "[flags]", summary: "stop a running pipeline", run: stopCommand, examples: `
  flowctl stop                               wait until it has stopped

A unit of systemd with Restart=always is started again: use systemctl stop.
`},
		{name: "runs", args: "[flags]", summary: "show the last runs, and how they ended", run: runsCommand, examples: `
  flowctl runs
`},
		{name: "translate", args: "-to kubernetes|compose [flags] [pipeline.json]", summary: "write the manifests of another engine", run: translateCommand, examples: `
  flowctl translate -to kubernetes pipeline.json >manifest.json
  flowctl translate -to compose pipeline.json -image flowctl:v1
`},
		{name: "sandbox", args: "[flags] [pipeline.json]", summary: "run the services of a pipeline alone", run: sandboxCommand, examples: `
  flowctl sandbox pipeline.json              until Ctrl-C; flowctl run uses them meanwhile
`},
		{name: "apply", args: "[-f FILE] [flags] [pipeline]", summary: "reload, by a file that may be another one", hidden: true, run: applyCommand},
		{name: "server", args: "[flags] [pipeline.json]", summary: "run the control plane alone", hidden: true, run: serverCommand, examples: `
  flowctl server -control-plane-port 9090
  flowctl server pipeline.json               of components started elsewhere
`},
		{name: "guard", summary: "end what is left of a run whose flowctl was killed", hidden: true, run: guardCommand},
		{name: "version", summary: "print the version", run: versionCommand},
		{name: "help", args: "[command]", summary: "explain flowctl, or one command", run: helpCommand},
	}
}

// The main thread is kept for the main goroutine, which waits for no disk: the kernel gives a signal to
// that thread first, and no other would get it while it waits for one.
func init() { runtime.LockOSThread() }

func main() {
	// A crash ends by SIGABRT: its usual exit status, 2, is that of a wrong command
	// line, after which flowctl.service is not started again.
	debug.SetTraceback("crash")
	os.Exit(exitCode(dispatch(os.Args[1:])))
}

// exitCode reports err on standard error, as text or in JSON, and returns its code.
func exitCode(asJSON bool, err error) int {
	if err == nil {
		return exitOK
	}
	report, say := newReport(err)
	report.Try = cmp.Or(report.Try, accessHint(err))
	if say {
		tellFailure(report.status())
	}
	switch {
	case !say:
	case asJSON:
		_ = writeJSON(os.Stderr, report, false) // there is nobody to tell
	default:
		var text strings.Builder
		report.writeText(&text)
		fmt.Fprintln(os.Stderr, markErrors(strings.TrimSuffix(text.String(), "\n")))
	}
	return report.ExitCode
}

// dispatch runs the command that args name, else run. With asJSON its error is to be JSON, as its log is.
func dispatch(args []string) (asJSON bool, err error) {
	name := "run"
	if len(args) > 0 {
		switch first := args[0]; {
		case slices.Contains([]string{"-h", "-help", "--help"}, first):
			name, args = "help", nil
		case slices.Contains([]string{"-version", "--version"}, first):
			name, args = "version", nil
		case !strings.HasPrefix(first, "-"):
			name, args = first, args[1:]
		}
	}
	for _, c := range commands() {
		if c.name == name {
			fs := flag.NewFlagSet(name, flag.ContinueOnError)
			err := c.run(fs, args)
			format := fs.Lookup("log-format")
			return format != nil && format.Value.String() == formatJSON, err
		}
	}
	if strings.HasSuffix(name, ".json") {
		return false, usageErrorf("", "unknown command %q: to run a file, write: flowctl run %s", name, name)
	}
	return false, usageErrorf("", "unknown command %q: it must be one of %s", name, strings.Join(shownCommands(), ", "))
}

// shownCommands returns the names of the commands that help lists.
func shownCommands() []string {
	var names []string
	for _, c := range commands() {
		if !c.hidden {
			names = append(names, c.name)
		}
	}
	return names
}

func runCommand(fs *flag.FlagSet, args []string) error { return startRun(fs, args, false) }

func sandboxCommand(fs *flag.FlagSet, args []string) error { return startRun(fs, args, true) }

// startRun runs what the command line asks for; in a sandbox the services alone.
func startRun(fs *flag.FlagSet, args []string, sandbox bool) error {
	config := runConfig{version: versionName(), sandbox: sandbox}
	var orchestrator, engineName string
	config.define(fs)
	fs.StringVar(&config.file, "f", "flow.json", "pipeline `file`")
	defineEnvFiles(fs, &config.envFiles)
	defineOrchestrator(fs, &orchestrator)
	fs.StringVar(&engineName, "engine", "", "`program` that runs containers (default docker, else podman)")
	defineDuration(fs, &config.times.start, "start-timeout", 30*time.Second, "from a component's start until it is ready")
	defineDuration(fs, &config.times.unhealthy, "unhealthy-timeout", 30*time.Second, "how long a component may stay unhealthy")
	defineDuration(fs, &config.times.stop, "stop-timeout", 10*time.Second, "from the stop signal to SIGKILL")
	defineBool(fs, &config.showStatus, "show-status", true, "keep a status below the log; =false for none")
	fs.StringVar(&config.logDir, "log-dir", "", "log each component to `dir`/ID.log; \"\" for none (on a terminal: logs beside the pipeline file)")
	operators := fs.String("operators", "", "who has a client certificate with one of these `names`, a,b, is an operator: may reload, restart, stop, see logs")
	defineChoice(fs, &config.until, "until", untilStopped, "run until `event`: stopped, ready or done", untilStopped, untilReady, untilDone)
	defineDuration(fs, &config.timeout, "timeout", 0, "`time` that the whole run may take, a command after -- included (default none)")
	defineMaxEvent(fs, &config.maxEvent)
	defineBool(fs, &config.watch, "watch", false, "reload, or restart a component, when its files have changed; what fails waits for that")
	dashed := slices.Index(args, "--")
	if dashed >= 0 {
		args, config.command = args[:dashed], args[dashed+1:]
	}
	rest, err := parseFlags(fs, args, 1)
	if err != nil {
		return err
	}
	if dashed >= 0 && len(config.command) == 0 {
		return usageErrorf("run", "a command must come after --")
	}
	if len(config.command) > 0 && config.until != untilStopped {
		return usageErrorf("run", "-until and a command after -- contradict each other: the run ends with the command")
	}
	if config.watch && (len(config.command) > 0 || config.until != untilStopped) {
		return usageErrorf(fs.Name(), "-watch goes on until it is stopped: -until and a command after -- contradict it")
	}
	if err := config.check(fs); err != nil {
		return err
	}
	if *operators != "" && config.tls.ca == "" {
		return usageErrorf("run", "-operators %q: it needs -tls-ca-cert, the CA of their certificates", *operators)
	}
	config.operators = slices.DeleteFunc(strings.Split(*operators, ","), func(name string) bool { return name == "" })
	if engineName != "" && orchestrator != orchestrateContainers {
		return usageErrorf("run", "-engine %q has no effect without -orchestrator container", engineName)
	}
	if config.file, err = fileArgument(fs, config.file, rest); err != nil {
		return err
	}
	if orchestrator == orchestrateContainers {
		if config.engine, err = findEngine(engineName); err != nil {
			return &exitError{code: exitUsage, err: err}
		}
	}
	config.listen.anyPort = !given(fs, "control-plane-port")
	if !given(fs, "log-dir") {
		config.logDir, config.logDirOptional = defaultLogDir(config.file), true
	}
	p, err := config.read()
	if err != nil {
		return &exitError{code: exitFor(err), err: err}
	}
	if err = config.useSandbox(p); err != nil {
		return err
	}
	if config.state, err = config.planeFlags.state(url.PathEscape(p.Metadata.Name), false); err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	config.records = config.planeFlags.records()
	return runPipeline(p, config)
}

// useSandbox has a run of p use the services of a sandbox, once they are ready, if there is one.
func (c *runConfig) useSandbox(p *Pipeline) error {
	if c.sandbox || len(p.Spec.Services) == 0 {
		return nil
	}
	box := findSandbox(p.Metadata.Name)
	if box.PID == 0 {
		return nil
	}
	if err := awaitReady(box, c.tls); err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	if err := p.dropServices(); err != nil {
		return &exitError{code: exitUsage, err: fmt.Errorf("%s: %v", c.file, err)}
	}
	c.servicesOf = box.PID
	return nil
}

func defineEnvFiles(fs *flag.FlagSet, files *[]string) {
	fs.Func("env-file", "`file` of NAME=value lines, for references in the pipeline file and for components; of several the last wins", func(file string) error {
		*files = append(*files, file)
		return nil
	})
}

// defineOrchestrator defines the flag that says whether there may be containers.
func defineOrchestrator(fs *flag.FlagSet, value *string) {
	defineChoice(fs, value, "orchestrator", orchestrateProcesses, "`kind` of component that is run: process, or container for those with an image, too", orchestrateProcesses, orchestrateContainers)
}

func defineMaxEvent(fs *flag.FlagSet, value *int) {
	define(fs, value, "max-event-bytes", maxEvent, "`bytes` that one event may have which flowctl moves", parseBytes)
}

// defineTTL defines the flag for how long a heartbeat counts.
func defineTTL(fs *flag.FlagSet, value *time.Duration) {
	defineDuration(fs, value, "heartbeat-ttl", 30*time.Second, "who does not heartbeat for so long, and a tenth longer, is stale")
}

// defaultLogDir returns the folder for log files that systemd gives, else, on a terminal, logs beside
// the pipeline file; "" for none.
func defaultLogDir(file string) string {
	logs := logsDirectory()
	if logs == "" && isTerminal(os.Stdout) {
		return filepath.Join(folderOf(file), "logs")
	}
	return logs
}

// fileArgument returns the pipeline file: the one that either -f or the argument names, - for standard
// input, else the default of -f, or what the predecessor took; one has to exist.
func fileArgument(fs *flag.FlagSet, file string, rest []string) (string, error) {
	set := given(fs, "f")
	if len(rest) > 0 && set {
		return "", usageErrorf(fs.Name(), "two pipeline files are named: %q by -f, and %q", file, rest[0])
	}
	if len(rest) > 0 {
		file, set = rest[0], true
	}
	if file == "-" {
		return standardInput, nil
	}
	if set {
		return file, nil
	}
	for _, name := range append([]string{file}, yamlDefaults...) {
		if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
			return name, nil
		}
	}
	none, others := "no pipeline file is named, and there is no "+file+" here", pipelineFiles(".")
	if len(others) == 0 {
		return "", usageErrorf(fs.Name(), "%s", none)
	}
	return "", &exitError{exitUsage, fmt.Errorf("%s; what is here: %s", none, enumerate(others)), "flowctl " + fs.Name() + " " + shellWord(others[0])}
}

func checkCommand(fs *flag.FlagSet, args []string) error {
	var asJSON, strict, schema bool
	var orchestrator string
	var ttl time.Duration
	named := fs.String("f", "flow.json", "pipeline `file`")
	defineBool(fs, &asJSON, "json", false, "print JSON")
	var envFiles []string
	defineEnvFiles(fs, &envFiles)
	defineOrchestrator(fs, &orchestrator)
	defineTTL(fs, &ttl)
	defineBool(fs, &strict, "strict", false, "end with 2 where there are warnings, too")
	defineBool(fs, &schema, "schema", false, "print a JSON Schema of pipeline files, for editors, and check nothing")
	rest, err := parseFlags(fs, args, 1)
	if err != nil {
		return err
	}
	if schema {
		return writeJSON(os.Stdout, pipelineSchema(), true)
	}
	file, err := fileArgument(fs, *named, rest)
	if err != nil {
		return err
	}
	env, err := readVariables(envFiles)
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	p, err := readPipeline(file, orOfUnit(env.lookup))
	report := checkReport{File: file, Errors: []fileError{}, Warnings: []warning{}}
	switch found, listed := errors.AsType[*fileErrors](err); {
	case listed:
		report.Errors, report.More = found.list, found.more
		report.Warnings = append(report.Warnings, found.warnings...)
	case err != nil:
		report.Errors = append(report.Errors, fileError{Message: err.Error()})
	default:
		report.Pipeline, report.Warnings = p.Metadata.Name, p.warnings(orchestrator, ttl)
	}
	report.OK = err == nil && !(strict && len(report.Warnings) > 0)
	if asJSON {
		if err := writeJSON(os.Stdout, report, true); err != nil || report.OK {
			return err
		}
		return &exitError{code: exitUsage}
	}
	for _, w := range report.Warnings {
		fmt.Fprintf(os.Stderr, "%s: warning: %v\n", file, w)
	}
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	if !report.OK {
		return &exitError{code: exitUsage, err: fmt.Errorf("%s has warnings, which -strict does not allow: %d", file, len(report.Warnings))}
	}
	services := ""
	if n := len(p.Spec.Services); n > 0 {
		services = fmt.Sprintf(", %d services", n)
	}
	return printAnswer(fmt.Sprintf("%s: ok: pipeline %s, %d sources, %d processors, %d sinks%s\n", file, p.Metadata.Name, len(p.Spec.Sources), len(p.Spec.Processors), len(p.Spec.Sinks), services))
}

// translators are the engines that translate knows, by the name that -to has for them.
var translators = map[string]translator{
	"kubernetes": {checkForKubernetes, checkComponentForKubernetes, toKubernetes, (*translation).kubeName},
	"compose":    {checkForCompose, checkComponentForCompose, toCompose, func(_ *translation, id string) string { return id }},
}

func translateCommand(fs *flag.FlagSet, args []string) error {
	var t translation
	var to string
	var envFiles []string
	named := fs.String("f", "flow.json", "pipeline `file`")
	defineChoice(fs, &to, "to", "", "the other `engine`: kubernetes or compose", slices.Sorted(maps.Keys(translators))...)
	fs.StringVar(&t.image, "image", "ghcr.io/withobsrvr/flowctl:"+imageTag(versionName()), "`image` of flowctl itself")
	defineEnvFiles(fs, &envFiles)
	rest, err := parseFlags(fs, args, 1)
	switch {
	case err != nil:
		return err
	case to == "":
		return usageErrorf(fs.Name(), "-to is missing: it must be compose or kubernetes")
	}
	if err := checkImage(t.image); err != nil {
		return usageErrorf(fs.Name(), "-image %v", err)
	}
	file, err := fileArgument(fs, *named, rest)
	if err != nil {
		return err
	}
	env, err := readVariables(envFiles)
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	t.translator = translators[to]
	if err := t.read(file, orOfUnit(env.lookup)); err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	manifest := t.translate(&t)
	t.say(os.Stderr, file)
	return writeJSON(os.Stdout, manifest, true)
}

func listCommand(fs *flag.FlagSet, args []string) error {
	var o listOptions
	defineBool(fs, &o.watch, "watch", false, "go on, and show each change")
	defineBool(fs, &o.wait, "wait", true, "wait up to 2s for one that is starting; =false not to")
	rest, err := parseAskFlags(fs, &o, args, 1)
	if err != nil {
		return err
	}
	o.id = strings.Join(rest, "")
	return listRuns(o)
}

func reloadCommand(fs *flag.FlagSet, args []string) error {
	var o listOptions
	var wait bool
	defineBool(fs, &wait, "wait", true, "wait until what is new or has changed is ready; =false not to")
	rest, err := parseAskFlags(fs, &o, args, 1)
	switch {
	case err != nil:
		return err
	case len(rest) > 0 && o.endpoint != "":
		return usageErrorf("reload", "-endpoint %q and the pipeline %q: name one of them", o.endpoint, rest[0])
	case len(rest) > 0 && o.pipeline != "":
		return usageErrorf("reload", "two pipelines are named: %q by -pipeline, and %q", o.pipeline, rest[0])
	case len(rest) > 0:
		o.pipeline = rest[0]
	}
	return reloadRun(o, "", wait)
}

func applyCommand(fs *flag.FlagSet, args []string) error {
	var o listOptions
	file := fs.String("f", "", "pipeline `file`, which stays that of the run; \"\" for the one that it has")
	rest, err := parseAskFlags(fs, &o, args, 1)
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		o.pipeline = rest[0]
	}
	if *file != "" {
		if *file, err = filepath.Abs(*file); err != nil {
			return &exitError{code: exitUsage, err: err}
		}
	}
	return reloadRun(o, *file, true)
}

func logsCommand(fs *flag.FlagSet, args []string) error {
	var o logsOptions
	defineBool(fs, &o.follow, "f", false, "go on with the lines that come")
	define(fs, &o.last, "n", 100, "begin with the last `lines`", func(text string) (int, error) {
		last, err := strconv.ParseUint(text, 10, 31)
		if err != nil {
			err = errors.New("it must be a number of lines, 0 at least")
		}
		return int(last), err
	})
	var err error
	if o.ids, err = parseAskFlags(fs, &o.listOptions, args, anyNumber); err != nil {
		return err
	}
	return showLogs(o)
}

func restartCommand(fs *flag.FlagSet, args []string) error {
	var o listOptions
	var wait bool
	defineBool(fs, &wait, "wait", true, "wait until they are ready again; =false not to")
	ids, err := parseAskFlags(fs, &o, args, anyNumber)
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		return usageErrorf("restart", "restart: name the components; flowctl stop ends them all")
	}
	return restartComponents(o, ids, wait)
}

func stopCommand(fs *flag.FlagSet, args []string) error {
	var o listOptions
	if _, err := parseAskFlags(fs, &o, args, 0); err != nil {
		return err
	}
	return stopRun(o)
}

func runsCommand(fs *flag.FlagSet, args []string) error {
	var asJSON bool
	defineBool(fs, &asJSON, "json", false, "print JSON")
	if _, err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	var folders []string
	if folder, err := stateFolder(); err == nil {
		folders = append(folders, folder)
	}
	if os.Geteuid() == 0 {
		units, _ := filepath.Glob("/var/lib/flowctl*") // fails only for a wrong pattern
		folders = append(folders, units...)
	}
	slices.Sort(folders)
	records, errs := recordedRuns(slices.Compact(folders))
	var err error
	switch {
	case asJSON:
		err = writeJSON(os.Stdout, records, true)
	case len(records) > 0 || len(errs) == 0:
		err = writeRuns(os.Stdout, records, time.Now())
	}
	if err == nil && len(errs) > 0 {
		err = &exitError{code: exitPlane, err: errors.Join(errs...)}
	}
	return err
}

func waitCommand(fs *flag.FlagSet, args []string) error {
	var o waitOptions
	defineChoice(fs, &o.until, "until", untilReady, "wait until they are `what`: ready, or done (completed, or all their events moved); up: until the control plane answers", untilUp, untilReady, untilDone)
	defineDuration(fs, &o.timeout, "timeout", 0, "end with 4 after this `time` (default none)")
	var err error
	if o.ids, err = parseAskFlags(fs, &o.listOptions, args, anyNumber); err != nil {
		return err
	}
	if o.until == untilUp && len(o.ids) > 0 {
		return usageErrorf(fs.Name(), "-until up waits for the control plane alone, not for %s", quote(o.ids[0]))
	}
	return waitFor(o)
}

// parseAskFlags parses args by fs, with the flags that say which running flowctl to ask, and returns the
// arguments, most at most. An empty one is refused: a script whose variable is not set must not get
// something else.
func parseAskFlags(fs *flag.FlagSet, o *listOptions, args []string, most int) ([]string, error) {
	fs.StringVar(&o.endpoint, "endpoint", "", "`host:port` of the control plane, or unix:PATH (default: those of the pipelines that run here)")
	fs.StringVar(&o.endpoint, "e", "", "short for -endpoint")
	fs.StringVar(&o.pipeline, "pipeline", "", "`name` of the pipeline, where several run here")
	defineBool(fs, &o.json, "json", false, "print JSON")
	defineTLS(fs, &o.tls, "client certificate in `file`, PEM", "dial TLS, and trust the CA in `file`, PEM")
	fs.StringVar(&o.tls.serverName, "tls-server-name", "", "dial TLS, and expect this `name` in the certificate of the control plane, not that of -endpoint")
	rest, err := parseFlags(fs, args, most)
	if err != nil {
		return nil, err
	}
	if err := checkTLS(fs, o.tls); err != nil {
		return nil, err
	}
	for _, name := range []string{"endpoint", "e"} {
		if _, err := parseEndpoint(o.endpoint); given(fs, name) && err != nil {
			return nil, usageErrorf(fs.Name(), "-%s %q: %v", name, o.endpoint, err)
		}
	}
	switch {
	case given(fs, "tls-server-name") && o.tls.serverName == "":
		return nil, usageErrorf(fs.Name(), "-tls-server-name \"\": it must be a name")
	case given(fs, "pipeline") && o.pipeline == "":
		return nil, usageErrorf(fs.Name(), "-pipeline \"\": it must be a name")
	case o.pipeline != "" && o.endpoint != "":
		return nil, usageErrorf(fs.Name(), "-endpoint %q and -pipeline %q: name one of them", o.endpoint, o.pipeline)
	case slices.Contains(rest, ""):
		return nil, usageErrorf(fs.Name(), "%s \"\": the argument must be a name, or be left out", fs.Name())
	}
	return rest, nil
}

func serverCommand(fs *flag.FlagSet, args []string) error {
	o := serverConfig{version: versionName()}
	o.define(fs)
	file := fs.String("f", "", "pipeline `file`, whose components something else starts (default none)")
	defineMaxEvent(fs, &o.maxEvent)
	rest, err := parseFlags(fs, args, 1)
	if err != nil {
		return err
	}
	if err := o.check(fs); err != nil {
		return err
	}
	state := "registry"
	if len(rest) > 0 || given(fs, "f") {
		if *file, err = fileArgument(fs, *file, rest); err != nil {
			return err
		}
		if o.pipeline, err = readPipeline(*file, os.LookupEnv); err != nil {
			return &exitError{code: exitFor(err), err: err}
		}
		state = url.PathEscape(o.pipeline.Metadata.Name) + ".server"
	}
	if o.state, err = o.planeFlags.state(state, true); err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	o.records = o.planeFlags.records()
	return runServer(o)
}

// guardCommand runs the guard that flowctl starts beside itself.
func guardCommand(*flag.FlagSet, []string) error { return runGuard(os.Stdin) }

func versionCommand(fs *flag.FlagSet, args []string) error {
	if _, err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	commit := ""
	if info, ok := debug.ReadBuildInfo(); ok { // without vcs settings after go install of a version
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				commit = ", commit " + s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				commit += "+dirty" // vcs.modified comes after vcs.revision
			}
		}
	}
	return printAnswer(fmt.Sprintf("flowctl %s (%s%s)\n", versionName(), runtime.Version(), commit))
}

// versionName returns version, or else the one that the Go command built in.
func versionName() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return cmp.Or(version, info.Main.Version)
	}
	return version
}

func (o *planeFlags) define(fs *flag.FlagSet) {
	fs.StringVar(&o.listen.address, "control-plane-address", "127.0.0.1", "control plane's `host`, or unix:PATH")
	define(fs, &o.listen.port, "control-plane-port", 8080, "control plane's `port`, 0 for a free one", func(text string) (int, error) {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			err = errors.New("it must be a number from 0 to 65535")
		}
		return int(port), err
	})
	define(fs, &o.advertise, "advertise", "", "`host:port` at which other machines reach the control plane, as it is to tell them", func(text string) (string, error) {
		host, port, err := net.SplitHostPort(text)
		if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || host == "" || net.ParseIP(host).IsUnspecified() {
			return "", errors.New("it must be host:port, of one host")
		}
		return text, nil
	})
	defineTTL(fs, &o.ttl)
	defineDuration(fs, &o.interval, "janitor-interval", 10*time.Second, "look for stale services at least this often")
	defineDuration(fs, &o.forget, "forget-after", 24*time.Hour, "forget a service that is not of the pipeline and has been stale for so long")
	define(fs, &o.logLevel, "log-level", slog.LevelInfo, "log from `level` up: debug, info, warn, error", func(text string) (level slog.Level, err error) {
		if level.UnmarshalText([]byte(text)) != nil {
			err = errors.New("it must be debug, info, warn or error")
		}
		return level, err
	})
	defineChoice(fs, &o.format, "log-format", formatAuto, "log as `form`: text, json, journal or auto", formatAuto, formatText, formatJSON, formatJournal)
	place := "memory"
	if fs.Name() == "server" {
		place = "the user's state folder"
	}
	fs.StringVar(&o.dbPath, "db-path", "", "keep the registry's state in `file`, not in $STATE_DIRECTORY or "+place)
	defineBool(fs, &o.noState, "no-persistence", false, "keep the registry's state in memory only")
	defineBool(fs, &o.requireIdentity, "require-identity", false, "a component of the pipeline is only who has a client certificate that names it")
	defineTLS(fs, &o.tls, "serve TLS with the certificate in `file`, PEM", "require client certificates, by the CA in `file`")
}

// check fails for flags that are wrong together, or that this machine cannot have.
func (o *planeFlags) check(fs *flag.FlagSet) error {
	wrong := func(format string, args ...any) error { return usageErrorf(fs.Name(), format, args...) }
	address, port := o.listen.address, o.listen.port
	_, socket, err := socketPath(address)
	switch {
	case address == "":
		return wrong("-control-plane-address %q: it must be a host or unix:PATH; 0.0.0.0 is all interfaces", address)
	case err != nil:
		return wrong("-control-plane-address %q: %v", address, err)
	case !socket && strings.Contains(address, "%"):
		return wrong("-control-plane-address %q: gRPC's libraries do not dial an address with a zone; :: is all interfaces", address)
	}
	if host, port, err := net.SplitHostPort(address); err == nil && !socket {
		return wrong("-control-plane-address %q: it must be a host alone, such as %q; the port is -control-plane-port %s", address, host, port)
	}
	if given(fs, "control-plane-port") && port != 0 && socket {
		return wrong("-control-plane-port %d: a socket file, -control-plane-address %q, has no port", port, address)
	}
	if err := checkLogFormat(o.format); err != nil {
		return wrong("%v", err)
	}
	for _, name := range []string{"control-plane-port", "control-plane-address"} {
		if given(fs, name) && planeSocketPassed() {
			return wrong("-%s %s: systemd has passed a socket named %s, which is where the control plane listens: leave out one or the other", name, fs.Lookup(name).Value, planeSocket)
		}
	}
	if o.dbPath != "" && o.noState {
		return wrong("-db-path and -no-persistence contradict each other")
	}
	if o.tls.ca != "" && o.tls.cert == "" && o.tls.key == "" {
		return wrong("-tls-ca-cert %q: it needs -tls-cert and -tls-key, the control plane's own certificate", o.tls.ca)
	}
	if o.requireIdentity && o.tls.ca == "" {
		return wrong("-require-identity: it needs -tls-ca-cert, the CA of the components' certificates")
	}
	if o.tls.cert != "" && socket {
		// Beside TLS there is a listener for the components, which every user of the
		// machine can reach; a socket file of mode 0600 is its user's alone.
		return wrong("-tls-cert %q: it must not be given with -control-plane-address %q, a socket file that is open to its user alone", o.tls.cert, address)
	}
	return checkTLS(fs, o.tls)
}

// state returns where the registry's state is kept: in the file of -db-path, else in name.json in the
// folder that systemd gives, else in memory, or, alone, in name.json in the user's state folder.
func (o *planeFlags) state(name string, alone bool) (stateConfig, error) {
	given := unitState() != ""
	switch {
	case o.noState:
		return stateConfig{}, nil
	case o.dbPath != "":
		return stateConfig{file: o.dbPath}, nil
	case !given && !alone:
		return stateConfig{}, nil
	}
	folder, err := stateFolder()
	if err != nil {
		return stateConfig{}, fmt.Errorf("no place for the registry's state: %v: name a file with -db-path, or choose -no-persistence", err)
	}
	return stateConfig{file: filepath.Join(folder, name+".json"), own: !given}, nil
}

// records returns the folder with the record of runs, "" for none.
func (o *planeFlags) records() string {
	if o.noState {
		return ""
	}
	folder, _ := stateFolder() // a user without a home has none, and is warned
	return folder
}

// unitState is the folder for state that systemd has made for this service, "" for none.
func unitState() string {
	folder, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":")
	return folder
}

// stateFolder is unitState, else the user's folder for state, which need not be there.
func stateFolder() (string, error) {
	if folder := unitState(); folder != "" {
		return folder, nil
	}
	base := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(base) { // the XDG specification: ignore a relative path
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		base = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(base, "flowctl"), nil
}

// defineTLS defines the flags of TLS. What cert and ca are for depends on the command.
func defineTLS(fs *flag.FlagSet, to *tlsFlags, cert, ca string) {
	fs.StringVar(&to.cert, "tls-cert", "", cert)
	fs.StringVar(&to.key, "tls-key", "", "private key of -tls-cert, a PEM `file`")
	fs.StringVar(&to.ca, "tls-ca-cert", "", ca)
}

// checkTLS fails for flags of TLS that are wrong together, or empty: a script whose variable is not set
// must not get a control plane without TLS.
func checkTLS(fs *flag.FlagSet, o tlsFlags) error {
	for _, name := range []string{"tls-key", "tls-cert", "tls-ca-cert"} {
		if given(fs, name) && fs.Lookup(name).Value.String() == "" {
			return usageErrorf(fs.Name(), "-%s \"\": it must be a file", name)
		}
	}
	switch {
	case o.cert != "" && o.key == "":
		return usageErrorf(fs.Name(), "-tls-cert %q: it needs -tls-key, the file of its private key", o.cert)
	case o.key != "" && o.cert == "":
		return usageErrorf(fs.Name(), "-tls-key %q: it needs -tls-cert, the file of its certificate", o.key)
	}
	return nil
}

const anyNumber = math.MaxInt // of arguments

// parseFlags parses args by fs and returns the arguments that are no flags, most at most; flags may
// stand before, between and after them. It returns the first error, but parses all args, so that
// dispatch knows -log-format. -h prints the help, and is an exitError of code 0.
func parseFlags(fs *flag.FlagSet, args []string, most int) (rest []string, err error) {
	fs.SetOutput(io.Discard)
	for len(args) > 0 {
		parseErr := fs.Parse(args)
		parsed := len(args) - fs.NArg()
		switch {
		case errors.Is(parseErr, flag.ErrHelp):
			var text strings.Builder
			printHelp(&text, fs)
			return nil, cmp.Or(printAnswer(text.String()), error(&exitError{code: exitOK}))
		case parseErr != nil:
			parsed = max(parsed, 1) // Parse stops before an argument such as ---x
			err = cmp.Or(err, explainFlag(fs, args[parsed-1], parseErr))
		case fs.NArg() > 0:
			rest = append(rest, fs.Arg(0))
			parsed++
		}
		args = args[parsed:]
	}
	fs.Visit(func(f *flag.Flag) {
		if o, ok := f.Value.(interface{ problem() error }); ok && o.problem() != nil {
			err = cmp.Or(err, usageErrorf(fs.Name(), "-%s %v", f.Name, o.problem()))
		}
	})
	if err == nil && len(rest) > most {
		err = usageErrorf(fs.Name(), "%s: unexpected argument %q", fs.Name(), rest[most])
	}
	return rest, err
}

// explainFlag returns the error for arg, which is no flag of fs, or lacks its value, which err says.
func explainFlag(fs *flag.FlagSet, arg string, err error) error {
	name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
	if name == "" || fs.Lookup(name) != nil {
		return usageErrorf(fs.Name(), "%v", err)
	}
	var known []string
	fs.VisitAll(func(f *flag.Flag) { known = append(known, f.Name) })
	if near := nearest(name, known); near != "" {
		return usageErrorf(fs.Name(), "%s has no flag -%s, did you mean -%s?", fs.Name(), name, near)
	}
	return usageErrorf(fs.Name(), "%s has no flag -%s", fs.Name(), name)
}

// given tells whether the command line sets the flag of that name.
func given(fs *flag.FlagSet, name string) bool {
	found := false
	fs.Visit(func(f *flag.Flag) { found = found || f.Name == name })
	return found
}

func helpCommand(_ *flag.FlagSet, args []string) error {
	if len(args) == 0 || args[0] == "help" {
		var text strings.Builder
		printOverview(&text)
		return printAnswer(text.String())
	}
	for _, c := range commands() {
		if c.name == args[0] {
			return c.run(flag.NewFlagSet(c.name, flag.ContinueOnError), []string{"-h"})
		}
	}
	return usageErrorf("", "there is no help for %q: it must be one of %s", args[0], strings.Join(shownCommands(), ", "))
}

func printOverview(w io.Writer) {
	fmt.Fprint(w, "flowctl runs a data pipeline: its programs, and their control plane.\n\nUsage:\n")
	for _, c := range commands() {
		if usage := strings.TrimSpace("flowctl " + c.name + " " + c.args); c.hidden {
		} else if len(usage) > usageWidth {
			fmt.Fprintf(w, "  %s\n  %-*s %s\n", usage, usageWidth, "", c.summary)
		} else {
			fmt.Fprintf(w, "  %-*s %s\n", usageWidth, usage, c.summary)
		}
	}
	fmt.Fprintf(w, "\nExamples:\n%s%s", strings.TrimPrefix(commands()[0].examples, "\n"), strings.TrimPrefix(commands()[1].examples, "\n"))
	fmt.Fprint(w, "\nflowctl help run lists the flags; docs/pipeline-file.md explains the file.\n")
}

// Widths of help, in columns.
const (
	helpWidth  = 80 // of a line
	usageWidth = 37 // of a command and its arguments
	flagWidth  = 27 // of a flag and the kind of its value
)

func printHelp(w io.Writer, fs *flag.FlagSet) {
	for _, c := range commands() {
		if c.name != fs.Name() {
			continue
		}
		fmt.Fprintf(w, "%s: %s\n\nUsage:\n  %s\n", c.name, c.summary, strings.TrimSpace("flowctl "+c.name+" "+c.args))
		if c.examples != "" {
			fmt.Fprintf(w, "\nExamples:%s", c.examples)
		}
	}
	heading := "\nFlags:\n"
	fs.VisitAll(func(f *flag.Flag) {
		fmt.Fprint(w, heading)
		heading = ""
		printFlag(w, f)
	})
}

// printFlag explains a flag, in one line where it fits.
func printFlag(w io.Writer, f *flag.Flag) {
	kind, usage := flag.UnquoteUsage(f)
	if kind == "value" { // the usage of every other flag names the kind of its value
		kind = "duration"
	}
	switch f.DefValue {
	case "", "false", "true": // the usage of a flag that is on by default says so
	default:
		usage += " (" + strings.ToLower(f.DefValue) + ")"
	}
	line := fmt.Sprintf("  %-*s", flagWidth, strings.TrimSpace("-"+f.Name+" "+kind))
	for word := range strings.FieldsSeq(usage) {
		if utf8.RuneCountInString(line)+1+len(word) > helpWidth {
			fmt.Fprintln(w, line)
			line = strings.Repeat(" ", flagWidth+2)
		}
		line += " " + word
	}
	fmt.Fprintln(w, line)
}
