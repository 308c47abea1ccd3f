package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// What a flowctl that fails says last: why, what that did to others, and what to try.

// report is that, and in JSON its form. README documents the keys.
type report struct {
	Time     time.Time         `json:"time"`
	Level    string            `json:"level"`
	Msg      string            `json:"msg"` // reportMsg, by which it is told from the log
	ExitCode int               `json:"exit_code"`
	Pipeline string            `json:"pipeline,omitempty"`
	Error    string            `json:"error,omitempty"` // that no component is to blame for
	Try      string            `json:"try,omitempty"`
	File     string            `json:"file,omitempty"` // in which Errors are
	Errors   []checkError      `json:"errors,omitempty"`
	More     int               `json:"more_errors,omitempty"` // that are not in Errors
	Failures []failedComponent `json:"failures,omitempty"`    // in file order
}

const reportMsg = "flowctl failed"

// failedComponent is one that failed, in a report.
type failedComponent struct {
	Component    string   `json:"component"`
	Kind         failKind `json:"kind"`
	Reason       string   `json:"reason"`
	PID          int      `json:"pid,omitempty"` // of its last process, as what follows is
	Lived        string   `json:"lived,omitempty"`
	Registered   bool     `json:"registered"`
	Restarts     int      `json:"restarts"`
	LastLines    []string `json:"last_lines"`
	LogFile      string   `json:"log_file,omitempty"`
	NeverStarted []string `json:"never_started"` // because they wait for it
	Stopped      []string `json:"stopped"`       // although they ran, because they need it
	Try          string   `json:"try,omitempty"`

	expected bool // to register
}

// newReport says how err ends flowctl. It has nothing to say where its exit code is
// the answer, or all has been said.
func newReport(err error) (out report, say bool) {
	out = report{Time: time.Now(), Level: "ERROR", Msg: reportMsg, ExitCode: exitFailed}
	var exit *exitError
	var usage *usageError
	var file *fileErrors
	var tried *hintedError
	if errors.As(err, &exit) {
		out.ExitCode = exit.code
	}
	switch {
	case exit != nil && exit.err == nil:
		return out, false
	case errors.As(err, &file):
		out.ExitCode, out.File, out.More = exitUsage, file.name, file.more
		out.Errors = file.entries()
	case errors.As(err, &usage):
		out.ExitCode, out.Try = exitUsage, strings.TrimSpace("flowctl help "+usage.command)
	}
	if errors.As(err, &tried) {
		out.Try = tried.try
	}
	out.Error = err.Error()
	return out, true
}

// hintedError is an error that a command may help against.
type hintedError struct {
	err error
	try string
}

func (e *hintedError) Unwrap() error { return e.err }

func (e *hintedError) Error() string { return e.err.Error() }

// writeText says it to people.
func (r report) writeText(w io.Writer) {
	switch {
	case len(r.Errors) > 0:
		fmt.Fprintln(w, r.Error) // each line begins with its place, as editors want it
	case r.Error != "":
		fmt.Fprintln(w, "flowctl: "+strings.ReplaceAll(r.Error, "\n", "\nflowctl: "))
	}
	if r.Try != "" {
		fmt.Fprintln(w, "Try: "+r.Try)
	}
	for i, f := range r.Failures {
		f.writeText(w, i < mostShown)
	}
}

// mostShown is how many failed components are shown in full in a text. What fails
// after so many others rarely has more to tell.
const mostShown = 5

func (f failedComponent) writeText(w io.Writer, full bool) {
	fmt.Fprintf(w, "flowctl: component %s failed: %s%s\n", f.Component, f.Reason, f.circumstances())
	if !full {
		return
	}
	if len(f.LastLines) > 0 {
		where := ""
		if f.LogFile != "" {
			where = " (all are in " + f.LogFile + ")"
		}
		fmt.Fprintf(w, "flowctl: the last lines of %s%s:\n", f.Component, where)
	}
	for _, line := range f.LastLines {
		fmt.Fprintf(w, "  %s\n", line)
	}
	if len(f.NeverStarted) > 0 {
		fmt.Fprintf(w, "flowctl: never started, waiting for %s: %s\n", f.Component, enumerate(f.NeverStarted))
	}
	if len(f.Stopped) > 0 {
		fmt.Fprintf(w, "flowctl: stopped, needing %s: %s\n", f.Component, enumerate(f.Stopped))
	}
	if f.Try != "" {
		fmt.Fprintf(w, "flowctl: try: %s\n", f.Try)
	}
}

func (f failedComponent) circumstances() string {
	if f.PID == 0 {
		return ""
	}
	text := fmt.Sprintf(" (pid %d, ran for %s", f.PID, f.Lived)
	if f.expected {
		if text += ", "; !f.Registered {
			text += "not "
		}
		text += "registered"
	}
	return text + ")"
}

// writeJSON writes it in a line.
func (r report) writeJSON(w io.Writer) {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(r) // texts, numbers and a time always encode, and there is nowhere to say that it is not written
}

// report is what there is to say of a run that has ended, now that all are over.
func (r *run) report() report {
	out := report{Time: time.Now(), Level: "ERROR", Msg: reportMsg, ExitCode: r.code, Pipeline: r.about.name}
	for _, p := range r.sup.procs {
		if p.failure != nil {
			out.Failures = append(out.Failures, r.describe(p))
		}
	}
	if len(out.Failures) == 0 && r.blame != nil {
		out.Error = r.blame.Error()
	}
	return out
}

// describe says what has to be said of p, which failed.
func (r *run) describe(p *proc) failedComponent {
	f := p.failure
	out := failedComponent{
		Component: f.component.ID, Kind: f.kind, Reason: f.reason, PID: f.pid, Registered: f.registered, Restarts: p.restarts,
		LastLines: []string{}, expected: f.component.registers(), Try: f.try(r.flags.file),
	}
	if f.pid != 0 {
		out.Lived = f.lived.Round(time.Millisecond).String()
	}
	for _, line := range f.tail {
		out.LastLines = append(out.LastLines, strings.TrimSuffix(line, "\r"))
	}
	if r.files != nil {
		out.LogFile = filepath.Join(r.files.dir, f.component.ID+".log")
	}
	out.NeverStarted, out.Stopped = r.sup.affected(p)
	return out
}

// symptoms are texts by which the reason of a failure, or a component's last lines,
// show what to try. The first that fits is taken; %s is the component's id.
var symptoms = []struct {
	inLines bool
	text    string // in lower case
	try     string
}{
	{false, "limit of open files", "raise the limit of open files: ulimit -n 65536, or LimitNOFILE= of a unit"},
	{false, "limit of processes", "raise the limit of processes: ulimit -u unlimited, or TasksMax= of a unit"},
	{true, "address already in use", "a port that %s wants is taken: ss -ltnp shows who has it; a free one is in its $HEALTH_PORT"},
	{true, "too many open files", "raise the limit of open files: ulimit -n 65536, or LimitNOFILE= of a unit"},
	{true, "no space left on device", "make room: df -h shows which disk is full"},
	{false, "none of the pipeline's", "if one of these is %s, have it register by the id that is in its $FLOWCTL_COMPONENT_ID"},
	{false, "(-unhealthy-timeout): health_check", "ask by hand what its health_check asks, while %s runs; if it is only slow, give it a longer \"health_timeout\" or more \"health_retries\", or run with a longer -unhealthy-timeout"},
	{false, "health_check", "ask by hand what its health_check asks, while %s runs; if it is only slow, give it a longer \"start_timeout\" or \"health_timeout\""},
	{false, "not registered", "if %s does not speak to flowctl, give it \"register\": false; if it does, it has to dial $FLOWCTL_ENDPOINT; if it is only slow, give it a longer \"start_timeout\""},
	{false, "no heartbeat for", "see what %s did for so long; if it is to be silent that long, run with a longer -heartbeat-ttl"},
	{false, "declared itself", "it is %s that says so: look for the reason in its lines, or give it longer with -unhealthy-timeout"},
}

// try is what may help against f, "" where its last lines are all there is.
func (f *failure) try(file string) string {
	c, lines := f.component, strings.ToLower(strings.Join(f.tail[max(0, len(f.tail)-3):], "\n")) // what came before may have been mended
	for _, s := range symptoms {
		in := f.reason
		if s.inLines {
			in = lines
		}
		if strings.Contains(in, s.text) {
			return strings.ReplaceAll(s.try, "%s", c.ID)
		}
	}
	switch {
	case f.kind == failStart && fromStandardInput(file):
		return ""
	case f.kind == failStart:
		return "flowctl check " + shellWord(file) + " shows all programs, folders and files that are missing"
	case f.kind == failStuck:
		return "only a process that hangs in the kernel outlives SIGKILL, mostly by a disk or a network file system: see dmesg"
	case f.exit != nil:
		return f.tryExit()
	}
	return ""
}

// fromStandardInput tells whether the pipeline file cannot be read a second time.
func fromStandardInput(file string) bool {
	info, err := os.Stat(file)
	return err == nil && !info.Mode().IsRegular()
}

// tryExit is what may help where a process has ended.
func (f *failure) tryExit() string {
	c := f.component
	status, _ := f.exit.Sys().(syscall.WaitStatus)
	switch {
	case c.Image != "":
		return f.tryContainer(status)
	case status.Signaled():
		return trySignal(status.Signal())
	case status.ExitStatus() == 127:
		return "127 is how a shell says that a program is not found: PATH is that of flowctl, the folder is " + shellWord(c.WorkingDir)
	case status.ExitStatus() == 126:
		return "126 is how a shell says that a file is no program, or not executable (chmod +x)"
	case status.ExitStatus() == 0 && !f.registered && c.registers():
		return fmt.Sprintf("if %s does not speak to flowctl, give it \"register\": false", c.ID)
	case len(f.tail) == 0:
		return "it printed nothing: run " + shellWord(c.Command[0]) + " by hand, in the folder " + shellWord(c.WorkingDir)
	case f.wasReady && c.RestartPolicy != restartOnFailure && c.RestartPolicy != restartAlways:
		return "if it may fail and be started again, give it \"restart_policy\": \"on-failure\""
	}
	return ""
}

// tryContainer is tryExit for the engine's command line, which ends as the container
// did, or by a code of its own (docker-run(1), podman-run(1)).
func (f *failure) tryContainer(status syscall.WaitStatus) string {
	switch code := status.ExitStatus(); {
	case status.Signaled():
		return trySignal(status.Signal())
	case code == 125:
		return "the engine has refused to run the container: its lines say why"
	case code == 126 || code == 127:
		return "the image " + shellWord(f.component.Image) + " has no such program, or it is not executable: see \"args\" and the image's entrypoint"
	case code > 128:
		return trySignal(syscall.Signal(code - 128))
	case len(f.tail) == 0:
		return "it printed nothing: run the image " + shellWord(f.component.Image) + " by hand"
	}
	return ""
}

// trySignal is what may help where flowctl has not sent the signal that ended a
// process.
func trySignal(sig syscall.Signal) string {
	switch sig {
	case syscall.SIGKILL:
		return "flowctl did not send it; the kernel does when memory is short: dmesg | grep -i oom, or journalctl -k"
	case syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGILL, syscall.SIGFPE, syscall.SIGABRT, syscall.SIGTRAP, syscall.SIGSYS:
		return "it has crashed: coredumpctl info shows where, if the system keeps core dumps"
	case syscall.SIGPIPE:
		return "it wrote to a connection or pipe that nobody reads any more: see what it was connected to"
	}
	return "flowctl did not send it: something else on this machine has ended it"
}
