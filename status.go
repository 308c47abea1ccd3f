// How things are, in words: the status and the footer of a run, what list prints, the
// report of a failure. Values come in, text goes out; nothing here asks anyone.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

const (
	reportMsg    = "flowctl failed" // the msg of a report, which sets it apart from the log
	mostShown    = 5                // failed components that are shown in full: a later one rarely has more to tell
	maxStatus    = 300              // characters of why a run failed, in a line
	durableAgain = "what is registered would survive a restart again"
)

// overview is how a run is at a moment.
type overview struct {
	ready, total int
	waiting      []string // not ready yet
	unhealthy    []string // were ready and are unhealthy now, with the cause
	restarting   []string
	failed       []string // brought by a reload: another failure ends the run
	stopping     bool
	left         []string // still running while stopping
	certificate  string   // when that of the control plane expires, "" where that is far
}

// part is a group of components in an overview.
type part struct {
	key, what string
	ids       []string
}

func (o overview) parts() []part {
	if o.stopping {
		return []part{{"stopping", "stopping", o.left}}
	}
	parts := []part{{"waiting", "waiting for", o.waiting}, {"restarting", "restarting", o.restarting}, {"failed", "failed:", o.failed}, {"unhealthy", "unhealthy:", o.unhealthy}}
	return slices.DeleteFunc(parts, func(p part) bool { return len(p.ids) == 0 })
}

// String is the overview in a line, as systemd's STATUS= wants it.
func (o overview) String() string {
	if o.stopping {
		return "stopping, waiting for " + enumerate(o.left)
	}
	text := fmt.Sprintf("%d of %d ready", o.ready, o.total)
	for _, p := range o.parts() {
		text += ", " + p.what + " " + enumerate(p.ids)
	}
	if o.certificate != "" {
		text += "; the certificate " + o.certificate
	}
	return text
}

// attrs is the overview as attributes of the log.
func (o overview) attrs() []any {
	var attrs []any
	if !o.stopping {
		attrs = append(attrs, "ready", o.ready, "total", o.total)
	}
	for _, p := range o.parts() {
		attrs = append(attrs, p.key, enumerate(p.ids))
	}
	if o.certificate != "" {
		attrs = append(attrs, "certificate", o.certificate)
	}
	return attrs
}

// overviewOf sums up how the components are. certificate is that of an overview.
func overviewOf(sup *supervisor, certificate string) overview {
	o := overview{total: len(sup.procs), stopping: sup.stopping, certificate: certificate}
	for _, p := range sup.procs {
		switch {
		case p.state == procCompleted || p.state == procReady && p.health.ok:
			o.ready++
		case p.state == procReady:
			o.unhealthy = append(o.unhealthy, fmt.Sprintf("%s (%s)", p.id(), p.health.cause))
		case p.state == procBackoff:
			o.restarting = append(o.restarting, p.id())
		case p.state == procFailed:
			o.failed = append(o.failed, p.id())
		default:
			o.waiting = append(o.waiting, p.id())
		}
		if !p.over() {
			o.left = append(o.left, p.id())
		}
	}
	return o
}

// usefulCommands returns, as attributes of the log, what a person may want to run beside the pipeline.
func usefulCommands(reload bool) []any {
	out := []any{"see", "flowctl list"}
	if reload {
		out = append(out, "reload", "flowctl reload")
	}
	return out
}

// footer is what the status below the log of a run shows.
type footer struct {
	pipeline, endpoint string
	status             string // an overview in a line
	components         []footerComponent
	rates              map[string]string // of events, by component; nil where flowctl moves none
}

type footerComponent struct {
	id string
	processReport
	memberSnapshot
}

// processOf returns what the registry shows of the process of p.
func processOf(p *proc) processReport {
	out := processReport{state: p.state.String(), restarts: p.restarts}
	if p.child != nil {
		out.pid, out.started = p.child.pid, p.started
	}
	return out
}

// rows are the lines of the footer: the pipeline, and a table of its components.
func (f footer) rows(now time.Time) []string {
	var table strings.Builder
	tw := newColumns(&table)
	events := func(text string) string {
		if f.rates == nil {
			return ""
		}
		return cmp.Or(text, "-") + "\t"
	}
	fmt.Fprintln(tw, "ID\tSTATE\tHEALTH\tPID\tUPTIME\tLAST SEEN\tRESTARTS\t"+events("EVENTS/S")+"METRICS")
	for _, c := range f.components {
		uptime := max(now.Sub(c.started), 0).Round(time.Second)
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s%s\n", clean(c.id), clean(c.state), clean(c.health), dash(c.pid != 0, c.pid),
			dash(c.pid != 0, uptime), dash(!c.lastSeen.IsZero(), ago(now.Sub(c.lastSeen))), c.restarts, events(f.rates[c.id]), shortMetrics(c.metrics))
	}
	_ = tw.Flush() // a Builder always takes it
	head := fmt.Sprintf("%s (%s): %s", clean(f.pipeline), clean(f.endpoint), printable(f.status))
	return append([]string{head}, strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n")...)
}

// newColumns returns a writer that aligns the cells of a table, which end with tabs.
func newColumns(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 8, 2, ' ', 0) }

// writeRuns writes a table of recorded runs.
func writeRuns(w io.Writer, records []runRecord, now time.Time) error {
	if len(records) == 0 {
		_, err := fmt.Fprintln(w, "no runs are recorded")
		return err
	}
	tw := newColumns(w)
	fmt.Fprintln(tw, strings.Join([]string{"STARTED", "PIPELINE", "STATE", "TOOK", "EXIT", "REASON"}, "\t"))
	for _, r := range records {
		end, took, code := now, "-", "-"
		if r.Ended != nil {
			end = *r.Ended
		}
		if r.ExitCode != nil {
			code = fmt.Sprint(*r.ExitCode)
		}
		if r.State != runKilled {
			took = end.Sub(r.Started).Round(time.Second).String()
		}
		fmt.Fprintln(tw, strings.Join([]string{r.Started.Local().Format(time.DateTime), clean(r.Pipeline), clean(r.State), took, code, cmp.Or(printable(r.Reason), "-")}, "\t"))
	}
	return tw.Flush()
}

// shortMetrics shows the first few metrics by name.
func shortMetrics(metrics map[string]any) string { return cmp.Or(enumerate(metricTexts(metrics)), "-") }

func metricTexts(metrics map[string]any) []string {
	var parts []string
	for name, value := range metrics {
		if f, ok := value.(float64); ok {
			value = fmt.Sprintf("%.6g", f)
		}
		parts = append(parts, clean(fmt.Sprintf("%s=%v", name, value)))
	}
	slices.Sort(parts)
	return parts
}

// report says what has failed, to a person or as a JSON object of docs/commands.md.
type report struct {
	Time     time.Time         `json:"time"`
	Level    string            `json:"level"`
	Msg      string            `json:"msg"` // reportMsg
	ExitCode int               `json:"exit_code"`
	Pipeline string            `json:"pipeline,omitempty"`
	Error    string            `json:"error,omitempty"` // where it is not a component that failed
	Try      string            `json:"try,omitempty"`
	File     string            `json:"file,omitempty"` // where Errors are
	Errors   []fileError       `json:"errors,omitempty"`
	More     int               `json:"more_errors,omitempty"` // besides Errors
	Failures []failedComponent `json:"failures,omitempty"`    // in file order
}

// failedComponent is a component that failed, in a report.
type failedComponent struct {
	Component    string   `json:"component"`
	Kind         failKind `json:"kind"`
	Reason       string   `json:"reason"`
	PID          int      `json:"pid,omitempty"`   // of its last process
	Lived        string   `json:"lived,omitempty"` // that process
	Registered   bool     `json:"registered"`      // that process
	Restarts     int      `json:"restarts"`
	LastLines    []string `json:"last_lines"`
	LogFile      string   `json:"log_file,omitempty"`
	NeverStarted []string `json:"never_started"` // because they wait for it
	Stopped      []string `json:"stopped"`       // because they need it
	Try          string   `json:"try,omitempty"`

	expected bool // to register
}

// newReport is the report of an error that ends flowctl. say is false for an exit code alone.
func newReport(err error) (out report, say bool) {
	out, say = report{Time: time.Now(), Level: "ERROR", Msg: reportMsg, ExitCode: exitFailed, Error: err.Error()}, true
	if exit, ok := errors.AsType[*exitError](err); ok {
		out.ExitCode, out.Try, say = exit.code, exit.try, exit.err != nil
	}
	if file, ok := errors.AsType[*fileErrors](err); ok {
		out.ExitCode, out.File, out.Errors, out.More = exitUsage, file.name, file.list, file.more
	}
	return out, say
}

// status is the report in a line, as systemd's STATUS= wants it.
func (r report) status() string { return "failed: " + r.reason() }

// reason says in a line why the run failed.
func (r report) reason() string {
	text := cmp.Or(r.Error, fmt.Sprintf("exit status %d", r.ExitCode))
	if len(r.Failures) > 0 {
		text = r.Failures[0].Component + ": " + r.Failures[0].Reason
		if more := len(r.Failures) - 1; more > 0 {
			text += fmt.Sprintf("; and %d more failed", more)
		}
	}
	text = firstLine(text)
	if short := cut(text, maxStatus); short != text {
		return short + "…"
	}
	return text
}

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

// writeText writes a line about the failure, and in full all that is known of it.
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

// forms is the report as text, as a line of JSON and for the journal.
func (r report) forms() (asText, asJSON []byte, journal []journalEntry) {
	var text, line bytes.Buffer
	r.writeText(&text)
	_ = writeJSON(&line, r, false) // a Buffer always takes it
	if r.Error != "" {
		journal = append(journal, journalEntry{message: r.Error})
	}
	for _, f := range r.Failures {
		var text strings.Builder
		f.writeText(&text, true)
		message := strings.ReplaceAll("\n"+strings.TrimSuffix(text.String(), "\n"), "\nflowctl: ", "\n")[1:]
		journal = append(journal, journalEntry{message, f.Component, f.Reason})
	}
	return text.Bytes(), line.Bytes(), journal
}

// hintTexts say what may help against a failure. %s is the id of the component.
var hintTexts = map[hint]string{
	hintOpenFiles: "raise the limit of open files: ulimit -n 65536, or LimitNOFILE= of a unit",
	hintProcesses: "raise the limit of processes: ulimit -u unlimited, or TasksMax= of a unit",
	hintAccess:    unitAccess,
	hintRegister:  "if %s does not speak to flowctl, give it \"register\": false; if it does, it has to dial $FLOWCTL_ENDPOINT; if it is only slow, give it a longer \"start_timeout\"",
	hintUnmatched: "if one of these is %s, have it register by the id that is in its $FLOWCTL_COMPONENT_ID",
	hintCheck:     "ask by hand what its health_check asks, while %s runs; if it is only slow, give it a longer ",
	hintHeartbeat: "see what %s did for so long; if it is to be silent that long, run with a longer -heartbeat-ttl",
	hintMute:      "if %s sends no heartbeats, give it a \"health_check\": a pass counts as one",
	hintStream:    "it refuses the stream by which flowctl moves its events, or breaks it: look for the reason in its lines; \"relay\": \"off\" in spec is for a pipeline that moves its own",
	hintDeclared:  "it is %s that says so: look for the reason in its lines, or give it longer with -unhealthy-timeout",
}

// lastWords are errors of the kernel that end programs of many kinds. They print them in
// their own lines, in lower case or not, and that is the only way to learn of them.
var lastWords = []struct {
	text, try string
	unit      bool // only where flowctl is a unit of systemd
}{
	{text: "address already in use", try: "a port that %s wants is taken: ss -ltnp shows who has it; a free one is in its $HEALTH_PORT"},
	{text: "too many open files", try: hintTexts[hintOpenFiles]},
	{text: "no space left on device", try: "make room: df -h shows which disk is full"},
	{text: "bind: permission denied", try: "a port below 1024 is for root, and for a unit with AmbientCapabilities=CAP_NET_BIND_SERVICE"},
	{text: ": permission denied\n", try: unitAccess, unit: true}, // of a file: a database says more after it
	{text: "read-only file system", try: unitAccess, unit: true},
}

// try is what may help against f, "" where there is only to read its last lines. file is
// the pipeline file, "" for one that cannot be read again; unit tells whether flowctl is a unit of systemd.
func (f *failure) try(file string, unit bool) string {
	text := hintTexts[f.hint]
	if f.hint == hintCheck && f.kind == failUnhealthy {
		text += "\"health_timeout\" or more \"health_retries\", or run with a longer -unhealthy-timeout"
	} else if f.hint == hintCheck {
		text += "\"start_timeout\" or \"health_timeout\""
	}
	lines := strings.ToLower(strings.Join(f.tail[max(0, len(f.tail)-3):], "\n")) + "\n" // what came before may have been mended
	for _, w := range lastWords {
		if (unit || !w.unit) && strings.Contains(lines, w.text) {
			text = w.try
			break
		}
	}
	switch {
	case text != "":
		return strings.ReplaceAll(text, "%s", f.component.ID)
	case f.kind == failStart && file != "":
		return "flowctl check " + shellWord(file) + " shows all programs, folders and files that are missing"
	case f.kind == failStuck:
		return "only a process that hangs in the kernel outlives SIGKILL, mostly by a disk or a network file system: see dmesg"
	case f.status != nil:
		return f.tryExit()
	}
	return ""
}

// tryExit is what may help where a process has ended.
func (f *failure) tryExit() string {
	c := f.component
	status := *f.status
	switch {
	case status.Signaled():
		return trySignal(status.Signal())
	case c.Image != "":
		return f.tryContainer(status.ExitStatus())
	case status.ExitStatus() == 127:
		return "127 is how a shell says that a program is not found: PATH is that of its env, else flowctl's, the folder is " + shellWord(c.WorkingDir)
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

// tryContainer is tryExit for an engine, which ends as the container did, or by a code of its own
// (docker-run(1), podman-run(1)).
func (f *failure) tryContainer(code int) string {
	switch {
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

// trySignal is what may help where flowctl has not sent the signal that ended a process.
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

// listedPipeline is a control plane in what list prints. docs/commands.md documents the JSON.
type listedPipeline struct {
	Pipeline   string             `json:"pipeline"` // "" for a control plane alone
	Endpoint   string             `json:"endpoint"`
	PID        int64              `json:"pid,omitempty"`
	Version    string             `json:"version,omitempty"`
	Started    *time.Time         `json:"started,omitempty"`
	Status     string             `json:"status,omitempty"`
	Ready      bool               `json:"ready"`
	StateFile  string             `json:"state_file,omitempty"`
	NotDurable string             `json:"not_durable,omitempty"`
	Components []*listedComponent `json:"components"`
	Edges      []listedEdge       `json:"edges,omitempty"`

	ended string // why list -watch hears no more of it, "" while it does
}

// listedComponent is one component in what list prints.
type listedComponent struct {
	ID           string            `json:"id"`
	InPipeline   bool              `json:"in_pipeline"`
	ServiceID    string            `json:"service_id,omitempty"`
	Type         string            `json:"type"`
	TypeInFile   string            `json:"type_in_file,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	Name         string            `json:"name,omitempty"`
	Description  string            `json:"description,omitempty"`
	Version      string            `json:"version,omitempty"`
	InputEvents  []string          `json:"input_event_types,omitempty"`
	OutputEvents []string          `json:"output_event_types,omitempty"`
	Endpoint     string            `json:"endpoint,omitempty"`
	Metadata     map[string]string `json:"metadata,omitempty"`
	Health       string            `json:"health"`
	Healthy      bool              `json:"healthy"`
	Cause        string            `json:"cause,omitempty"`
	Declared     string            `json:"declared,omitempty"`
	Registered   *time.Time        `json:"registered_at,omitempty"`
	LastSeen     *time.Time        `json:"last_seen,omitempty"`
	State        string            `json:"state,omitempty"`
	PID          int64             `json:"pid,omitempty"`
	Started      *time.Time        `json:"started,omitempty"`
	Restarts     int64             `json:"restarts"`
	Metrics      map[string]any    `json:"metrics,omitempty"`
	History      []listedChange    `json:"history,omitempty"`
}

// listedEdge is one along which flowctl moves events.
type listedEdge struct {
	From           string  `json:"from"`
	To             string  `json:"to"`
	State          string  `json:"state"`
	Events         int64   `json:"events"`
	Bytes          int64   `json:"bytes"`
	PerSecond      float64 `json:"events_per_second"`
	WaitingSeconds float64 `json:"waiting_seconds"`
}

// listedChange is one change of health.
type listedChange struct {
	Time   time.Time `json:"time"`
	Health string    `json:"health"`
	Cause  string    `json:"cause,omitempty"`
}

// listedEvent is a change in list -watch. One of Component, Removed, Status and Ended is set.
type listedEvent struct {
	Time       time.Time        `json:"time"`
	Pipeline   string           `json:"pipeline"`
	Endpoint   string           `json:"endpoint"`
	Component  *listedComponent `json:"component,omitempty"`
	Removed    string           `json:"removed,omitempty"`
	Status     string           `json:"status,omitempty"`
	Ready      *bool            `json:"ready,omitempty"` // beside Status
	NotDurable string           `json:"not_durable,omitempty"`
	Ended      string           `json:"ended,omitempty"` // why the stream has ended

	durability string // NotDurable in words, where it has changed
}

// writePipelines writes a table of each pipeline or, with an id, all that is known of that.
func writePipelines(w io.Writer, pipelines []listedPipeline, id string) error {
	now := time.Now()
	out := bufio.NewWriter(w) // keeps the first error, for Flush
	for i, p := range pipelines {
		if i > 0 {
			fmt.Fprintln(out)
		}
		if p.ended != "" {
			fmt.Fprintf(out, "%s | %s\n", clean(cmp.Or(p.Pipeline, p.Endpoint)), p.ended)
			continue
		}
		if id == "" {
			p.writeTable(out, now)
			continue
		}
		for _, l := range p.Components {
			l.writeDetails(out, &p, now)
		}
	}
	return out.Flush()
}

// writeTable writes a pipeline, with a row for each component.
func (p *listedPipeline) writeTable(w *bufio.Writer, now time.Time) {
	if p.Status != "" {
		fmt.Fprintf(w, "%s (pid %d, %s)\n", strings.TrimPrefix(clean(p.Pipeline)+": "+printable(p.Status), ": "), p.PID, clean(p.Endpoint))
	}
	if p.NotDurable != "" {
		fmt.Fprintln(w, p.durability())
	}
	if len(p.Components) == 0 {
		fmt.Fprintln(w, "nothing is registered")
		return
	}
	ofPipeline := slices.ContainsFunc(p.Components, func(l *listedComponent) bool { return l.State != "" })
	tw := newColumns(w)
	columns := []string{"ID", "TYPE", "STATE", "PID", "RESTARTS", "HEALTH", "LAST SEEN", "ENDPOINT", "METRICS"}
	row := func(cells []string) {
		if !ofPipeline {
			cells = slices.Delete(cells, 2, 5)
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	row(columns)
	for _, l := range p.Components {
		row([]string{
			l.title(p.Pipeline != ""), clean(l.Type), cmp.Or(clean(l.State), "-"), dash(l.PID != 0, l.PID), dash(l.State != "", l.Restarts),
			clean(l.Health), dash(l.LastSeen != nil, l.age(now)), cmp.Or(clean(l.Endpoint), "-"), shortMetrics(l.Metrics),
		})
	}
	_ = tw.Flush() // w keeps the error
	for _, l := range p.Components {
		if l.Cause != "" && !l.Healthy {
			fmt.Fprintf(w, "%s: %s\n", clean(l.ID), printable(l.Cause))
		}
	}
	p.writeEdges(w)
}

// writeEdges writes a table of the edges along which flowctl moves events, if there are any.
func (p *listedPipeline) writeEdges(w *bufio.Writer) {
	if len(p.Edges) == 0 {
		return
	}
	fmt.Fprintln(w)
	tw := newColumns(w)
	fmt.Fprintln(tw, "FROM\tTO\tSTATE\tEVENTS\tEVENTS/S\tBYTES\tWAITING")
	for _, e := range p.Edges {
		waiting := time.Duration(e.WaitingSeconds * float64(time.Second)).Round(100 * time.Millisecond)
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%.0f\t%d\t%s\n", clean(e.From), clean(e.To), clean(e.State), e.Events, e.PerSecond, e.Bytes, dash(waiting > 0, waiting))
	}
	_ = tw.Flush() // w keeps the error
}

// durability says what is wrong with the state file, "" if nothing is.
func (p *listedPipeline) durability() string {
	if p.NotDurable == "" {
		return ""
	}
	return "what is registered would not survive a restart: " + printable(p.NotDurable)
}

func (l *listedComponent) writeDetails(w *bufio.Writer, p *listedPipeline, now time.Time) {
	tw := newColumns(w)
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(tw, "%s:\t%s\n", name, value)
		}
	}
	list := func(values []string) string {
		return printable(strings.Join(values, ", "))
	}
	pairs := func(values map[string]string) string {
		var out []string
		for _, key := range slices.Sorted(maps.Keys(values)) {
			out = append(out, key+"="+values[key])
		}
		return list(out)
	}
	line("id", clean(l.ID))
	line("service id", clean(l.ServiceID))
	pipeline := clean(p.Pipeline)
	if !l.InPipeline && pipeline != "" {
		pipeline += " (not in its file)"
	}
	line("pipeline", pipeline)
	line("type", clean(l.Type))
	line("type in file", printable(l.TypeInFile))
	line("labels", pairs(l.Labels))
	line("name", clean(l.Name))
	line("description", printable(l.Description))
	line("version", clean(l.Version))
	if l.State != "" {
		text := fmt.Sprintf("%s, restarts %d", clean(l.State), l.Restarts)
		if l.Started != nil {
			text += fmt.Sprintf(", pid %d, started %s", l.PID, ago(now.Sub(*l.Started)))
		}
		line("state", text)
	}
	line("health", strings.TrimSuffix(clean(l.Health)+": "+printable(l.Cause), ": "))
	line("declared", clean(l.Declared))
	if l.Registered != nil {
		line("registered", ago(now.Sub(*l.Registered)))
	}
	line("last seen", l.age(now))
	line("endpoint", printable(l.Endpoint))
	line("reads", list(l.InputEvents))
	line("writes", list(l.OutputEvents))
	line("metadata", pairs(l.Metadata))
	line("metrics", strings.Join(metricTexts(l.Metrics), ", "))
	_ = tw.Flush() // w keeps the error
	if len(l.History) > 0 {
		fmt.Fprintln(w, "history:")
	}
	for _, h := range l.History {
		fmt.Fprintf(w, "  %s  %s\n", h.Time.Local().Format(time.DateTime), strings.TrimSuffix(clean(h.Health)+": "+printable(h.Cause), ": "))
	}
}

func (l *listedComponent) is(id string) bool { return l.ID == id || l.ServiceID == id }

// setMetric keeps a metric. A number that JSON does not have, such as infinity, becomes a text.
func (l *listedComponent) setMetric(name string, value any) {
	if l.Metrics == nil {
		l.Metrics = make(map[string]any)
	}
	if f, ok := value.(float64); ok && (math.IsInf(f, 0) || math.IsNaN(f)) {
		value = fmt.Sprint(f)
	}
	l.Metrics[name] = value
}

// title is the id and, in a list of a pipeline, whether it is none of its components.
func (l *listedComponent) title(ofPipeline bool) string {
	switch {
	case ofPipeline && !l.InPipeline:
		return clean(l.ID) + " (not in the pipeline)"
	case l.ServiceID != "":
		return clean(l.ID) + " (" + clean(l.ServiceID) + ")"
	}
	return clean(l.ID)
}

func (l *listedComponent) age(now time.Time) string {
	if l.LastSeen == nil {
		return ""
	}
	return ago(now.Sub(*l.LastSeen))
}

func (e *listedEvent) write(w io.Writer, asJSON bool) error {
	if asJSON {
		return writeJSON(w, e, false)
	}
	what := clean(e.Removed) + " removed"
	switch c := e.Component; {
	case e.Ended != "":
		what = firstLine(e.Ended)
	case c != nil:
		what = strings.TrimSuffix(strings.Join(strings.Fields(fmt.Sprintf("%s %s %s: %s", clean(c.ID), clean(c.State), clean(c.Health), printable(c.Cause))), " "), ":")
	case e.Ready != nil:
		what = strings.TrimSuffix(printable(e.Status)+"; "+e.durability, "; ")
	}
	_, err := fmt.Fprintf(w, "%s %s | %s\n", e.Time.Format(time.TimeOnly), clean(cmp.Or(e.Pipeline, e.Endpoint)), what)
	return err
}

// firstLine is an error without its hint.
func firstLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	return printable(text)
}
