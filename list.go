package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
	"unsafe"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// listedPipeline is one element of what list -json prints. README documents it.
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
	texts      [][]byte           // or each of them as JSON
	unhealthy  bool               // one of texts is
	ended      string             // why nothing more comes of it, "" while it does
}

// listedComponent is one component in what list prints.
type listedComponent struct {
	record       int64
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

// listedChange is one change of health.
type listedChange struct {
	Time   time.Time `json:"time"`
	Health string    `json:"health"`
	Cause  string    `json:"cause,omitempty"`
}

// listedEvent is what list -watch -json prints for each change: one of Component,
// Removed, Status and Ended is there.
type listedEvent struct {
	Time       time.Time        `json:"time"`
	Pipeline   string           `json:"pipeline"`
	Endpoint   string           `json:"endpoint"`
	Component  *listedComponent `json:"component,omitempty"`
	Removed    string           `json:"removed,omitempty"`
	Status     string           `json:"status,omitempty"`
	Ready      *bool            `json:"ready,omitempty"` // beside Status
	NotDurable string           `json:"not_durable,omitempty"`
	Ended      string           `json:"ended,omitempty"` // why nothing more comes
	durability string           // what is to be said of NotDurable, if that has changed
}

// listOptions are the flags of list, and its argument.
type listOptions struct {
	endpoint string // "" for those of the pipelines that run here
	json     bool
	watch    bool
	wait     bool
	tls      tlsFlags
	id       string // of the one component to show, "" for all
}

// listPatience is how long list waits for an answer, and for a pipeline that is just
// starting.
const listPatience = 2 * time.Second

func listCommand(args []string) error {
	runtime.GOMAXPROCS(1) // the others are for those that are listed
	var o listOptions
	fs := flag.NewFlagSet("list", flag.ContinueOnError)
	o.define(fs)
	fs.BoolVar(&o.json, "json", false, "print JSON")
	fs.BoolVar(&o.watch, "watch", false, "go on, and show each change")
	fs.BoolVar(&o.wait, "wait", true, "wait up to 2s for one that is starting; =false not to")
	rest, err := parseFlags(fs, args, 1)
	if err != nil {
		return err
	}
	if err := o.check(fs, rest); err != nil {
		return err
	}
	if len(rest) > 0 {
		o.id = rest[0]
	}
	runs, starting, err := o.runs(false)
	if err != nil {
		return &exitError{exitPlane, err}
	}
	clients, unusable := o.connect(runs)
	defer func() {
		for _, c := range clients {
			c.close()
		}
	}()
	absent := append(starting, unusable...)
	switch {
	case len(clients) == 0:
		return &exitError{exitPlane, errors.Join(absent...)}
	case !o.watch:
		return listPlanes(clients, absent, o)
	}
	for _, err := range absent {
		fmt.Fprintln(os.Stderr, complaint("flowctl: "+printable(err.Error())))
	}
	return watchPlanes(clients, o)
}

// define defines the flags that say which control plane to ask, and how.
func (o *listOptions) define(fs *flag.FlagSet) {
	fs.StringVar(&o.endpoint, "endpoint", "", "`host:port` of the control plane, or unix:PATH (default: those of the pipelines that run here)")
	fs.StringVar(&o.endpoint, "e", "", "short for -endpoint")
	o.tls.define(fs, "client certificate in `file`, PEM", "dial TLS, and trust the CA in `file`, PEM")
}

// check looks at the flags and the argument alone. What is given and empty is refused,
// because a script whose variable is not set must not get something else.
func (o *listOptions) check(fs *flag.FlagSet, rest []string) error {
	if err := o.tls.check(fs); err != nil {
		return err
	}
	var err error
	fs.Visit(func(set *flag.Flag) {
		if endpoint := set.Value.String(); (set.Name == "endpoint" || set.Name == "e") && !dialable(endpoint) {
			err = fmt.Errorf("-%s %q: it must be host:port or unix:PATH", set.Name, endpoint)
		}
	})
	if err == nil && len(rest) > 0 && rest[0] == "" {
		err = fmt.Errorf("%s \"\": the argument must be a name, or be left out", fs.Name())
	}
	if err != nil {
		return &usageError{fs.Name(), err}
	}
	return nil
}

// dialable is false for an endpoint that could not be one, and for schemes of grpc's.
func dialable(endpoint string) bool {
	if path, ok := strings.CutPrefix(endpoint, "unix:"); ok {
		return strings.Trim(path, "/") != ""
	}
	_, port, err := net.SplitHostPort(endpoint)
	_, portErr := strconv.ParseUint(port, 10, 16)
	return err == nil && portErr == nil
}

// runs are the control planes that are to be asked, and an error for each that does
// not listen yet. Those are waited for if nothing else runs, or if all are wanted.
func (o *listOptions) runs(all bool) ([]runInfo, []error, error) {
	if o.endpoint != "" {
		return []runInfo{{Endpoint: o.endpoint, TLS: o.tls != (tlsFlags{})}}, nil, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), listPatience)
	defer cancel()
	return awaitRuns(ctx, o.wait, all)
}

// connect returns a client for each of runs, or the error why there can be none.
func (o *listOptions) connect(runs []runInfo) (clients []*listClient, errs []error) {
	creds, err := o.tls.clientCredentials()
	if err != nil {
		return nil, []error{err}
	}
	for _, run := range runs {
		with := creds
		if !run.TLS {
			with = insecure.NewCredentials()
		}
		c, err := newListClient(run.Endpoint, with, o.wait)
		if err != nil {
			errs = append(errs, fmt.Errorf("endpoint %q: %v", run.Endpoint, err))
			continue
		}
		c.pipeline = listedPipeline{Pipeline: run.Pipeline, Endpoint: run.Endpoint}
		clients = append(clients, c)
	}
	return clients, errs
}

var (
	errLegacy = errors.New("no operator service") // which the control plane does not have
	errSilent = fmt.Errorf("nothing came within %s", listPatience)
)

// listClient asks one control plane.
type listClient struct {
	endpoint  string
	conn      *grpc.ClientConn
	pipeline  listedPipeline             // as it was told last, without its components
	records   map[int64]*listedComponent // as they were told last
	order     []int64                    // of records, as they were told first
	missing   map[int64]bool             // records that the snapshot which is coming has not told of yet
	complete  bool                       // a snapshot has come whole
	asJSON    bool                       // components are only to be printed, and kept as that
	texts     [2][][]byte                // of those, by rank
	room      []byte                     // for one of those
	unhealthy bool                       // one of those is
}

// newListClient makes a client of the control plane at endpoint. With wait its calls
// go on trying to connect until their context ends.
func newListClient(endpoint string, creds credentials.TransportCredentials, wait bool) (*listClient, error) {
	conn, err := grpc.NewClient(endpoint,
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(),
		// One that hangs, or a machine that is gone, ends a stream that has nothing else to tell.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(wait), grpc.MaxCallRecvMsgSize(1<<30)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))
	if err != nil {
		return nil, err
	}
	return &listClient{endpoint: endpoint, conn: conn, records: make(map[int64]*listedComponent)}, nil
}

func (c *listClient) close() { c.conn.Close() }

// follow hands each message of a stream of changes to told until the stream ends:
// after the first snapshot, unless it is to go on. Its first message, and where it is
// not to go on each, has to come within listPatience.
func (c *listClient) follow(ctx context.Context, in *operatorv1.WatchRequest, told func(*operatorv1.WatchResponse)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(listPatience, func() { cancel(errSilent) })
	defer silence.Stop()
	err := c.receive(ctx, in, func(out *operatorv1.WatchResponse) {
		if silence.Stop(); !in.GetFollow() {
			silence.Reset(listPatience)
		}
		told(out)
	})
	if err == nil || context.Cause(ctx) != errSilent {
		return err
	}
	why := errSilent.Error()
	if _, latest, ok := strings.Cut(status.Convert(err).Message(), "latest balancer error: "); ok { // grpc's, while it tries to connect
		why += ": " + dialReason(latest)
	}
	return status.Error(codes.DeadlineExceeded, why)
}

// receive is follow without a limit of time. Of a plane without an operator service
// the legacy dialect gives what it can, once, and one that has no stream left gives
// all in one message.
func (c *listClient) receive(ctx context.Context, in *operatorv1.WatchRequest, told func(*operatorv1.WatchResponse)) error {
	operator := operatorv1.NewOperatorClient(c.conn)
	stream, err := operator.Watch(ctx, in)
	for err == nil {
		var out *operatorv1.WatchResponse
		if out, err = stream.Recv(); err == nil {
			told(out)
		}
	}
	switch code := status.Code(err); {
	case errors.Is(err, io.EOF):
		return nil
	case code == codes.Unimplemented && in.GetFollow():
		return errLegacy
	case code == codes.Unimplemented:
		return c.fetchLegacy(ctx)
	case code == codes.ResourceExhausted && !in.GetFollow():
		p, failed := operator.GetPipeline(ctx, &operatorv1.GetPipelineRequest{})
		if failed != nil {
			return err
		}
		told(&operatorv1.WatchResponse{Pipeline: p, Components: p.GetComponents(), Reset_: true, Complete: true})
		return nil
	}
	return err
}

// take takes a message in and returns what is new in it.
func (c *listClient) take(out *operatorv1.WatchResponse) []listedEvent {
	var events []listedEvent
	event := func() *listedEvent {
		events = append(events, listedEvent{Time: time.Now(), Pipeline: c.pipeline.Pipeline, Endpoint: c.pipeline.Endpoint})
		return &events[len(events)-1]
	}
	if out.GetReset_() {
		c.texts, c.unhealthy = [2][][]byte{}, false
		c.missing = make(map[int64]bool, len(c.records))
		for record := range c.records {
			c.missing[record] = true
		}
	}
	if p := out.GetPipeline(); p != nil {
		before := c.pipeline.NotDurable
		c.pipeline = listPipeline(p)
		e := event()
		e.Status, e.Ready, e.NotDurable = c.pipeline.Status, &p.Ready, c.pipeline.NotDurable
		if e.NotDurable != before {
			e.durability = cmp.Or(c.pipeline.durability(), durableAgain)
		}
	}
	for _, in := range out.GetComponents() {
		component := listComponent(in)
		delete(c.missing, component.record)
		c.put(component)
		event().Component = component
	}
	gone := slices.Clone(out.GetRemoved())
	if out.GetComplete() {
		for _, record := range c.order {
			if c.missing[record] {
				gone = append(gone, record)
			}
		}
		c.missing, c.complete = nil, true
	}
	for _, record := range gone {
		if l, known := c.records[record]; known { // else it came and went between two messages
			event().Removed = l.ID
			delete(c.records, record)
		}
	}
	if len(gone) > 0 {
		c.order = slices.DeleteFunc(c.order, func(r int64) bool { return c.records[r] == nil })
	}
	return events
}

func (c *listClient) put(l *listedComponent) {
	if c.asJSON {
		c.room = appendJSON(c.room[:0], l, 3)
		c.texts[l.rank()] = append(c.texts[l.rank()], bytes.Clone(c.room))
		c.unhealthy = c.unhealthy || !l.Healthy
		return
	}
	if _, known := c.records[l.record]; !known {
		c.order = append(c.order, l.record)
	}
	c.records[l.record] = l
}

// fetchLegacy asks a control plane that has no operator service.
func (c *listClient) fetchLegacy(ctx context.Context) error {
	services, err := flowctlpb.NewControlPlaneClient(c.conn).ListServices(ctx, &emptypb.Empty{})
	if err != nil {
		return err
	}
	c.pipeline = listedPipeline{Endpoint: c.endpoint}
	for i, s := range services.GetServices() {
		health := unhealthy
		if s.GetIsHealthy() {
			health = healthy
		}
		component := &listedComponent{
			record: int64(i), ID: s.GetServiceId(), InPipeline: s.GetComponentId() != "",
			Type: typeName(s.GetServiceType()), Health: health.String(),
			Healthy: s.GetIsHealthy(), LastSeen: listTime(s.GetLastHeartbeat()),
		}
		if id := s.GetComponentId(); id != "" && id != component.ID {
			component.ID, component.ServiceID = id, component.ID
		}
		for name, f := range s.GetMetrics() {
			component.setMetric(name, f)
		}
		c.put(component)
	}
	return nil
}

// listed is the pipeline as it was told last, what is in its file first; with an id,
// only those that have it. It is false where that id was asked for and is not there.
func (c *listClient) listed(id string) (listedPipeline, bool) {
	out := c.pipeline
	out.texts, out.unhealthy = slices.Concat(c.texts[0], c.texts[1]), c.unhealthy
	out.Components = make([]*listedComponent, 0, len(c.records))
	for _, record := range c.order {
		if l := c.records[record]; id == "" || l.is(id) {
			out.Components = append(out.Components, l)
		}
	}
	slices.SortStableFunc(out.Components, func(a, b *listedComponent) int { return a.rank() - b.rank() })
	return out, id == "" || len(out.Components) > 0
}

// rank puts what is in the pipeline first.
func (l *listedComponent) rank() int {
	if l.InPipeline {
		return 0
	}
	return 1
}

func (l *listedComponent) is(id string) bool { return l.ID == id || l.ServiceID == id }

func listPipeline(p *operatorv1.Pipeline) listedPipeline {
	return listedPipeline{
		Pipeline: p.GetName(), Endpoint: p.GetEndpoint(), PID: p.GetPid(), Version: p.GetVersion(), Started: listTime(p.GetStarted()),
		Status: p.GetStatus(), Ready: p.GetReady(), StateFile: p.GetStateFile(), NotDurable: p.GetNotDurable(),
	}
}

func listComponent(c *operatorv1.Component) *listedComponent {
	p := c.GetProcess()
	l := &listedComponent{
		record: c.GetRecord(), ID: c.GetId(), InPipeline: c.GetInPipeline(), ServiceID: c.GetServiceId(), Type: c.GetType(),
		TypeInFile: c.GetTypeInFile(), Labels: c.GetLabels(),
		Name: c.GetName(), Description: c.GetDescription(), Version: c.GetVersion(),
		InputEvents: c.GetInputEventTypes(), OutputEvents: c.GetOutputEventTypes(),
		Endpoint: c.GetEndpoint(), Metadata: c.GetMetadata(), Health: c.GetHealth(), Cause: c.GetCause(), Declared: c.GetDeclared(),
		Healthy:    c.GetHealth() == healthy.String() || c.GetHealth() == degraded.String() || p.GetState() == procCompleted.String(),
		Registered: listTime(c.GetRegisteredAt()), LastSeen: listTime(c.GetLastSeen()),
		State: p.GetState(), PID: p.GetPid(), Started: listTime(p.GetStarted()), Restarts: p.GetRestarts(),
	}
	for name, f := range c.GetMetrics() {
		l.setMetric(name, f)
	}
	for name, text := range c.GetTextMetrics() {
		l.setMetric(name, text)
	}
	for _, h := range c.GetHistory() {
		at := cmp.Or(listTime(h.GetTime()), new(time.Time{}))
		l.History = append(l.History, listedChange{*at, h.GetHealth(), h.GetCause()})
	}
	return l
}

// listTime is nil for a time that was not sent, or that RFC 3339 has no words for.
func listTime(t *timestamppb.Timestamp) *time.Time {
	if !t.IsValid() {
		return nil
	}
	return new(t.AsTime())
}

// setMetric keeps a number as a number unless JSON has none such, as for infinity.
func (l *listedComponent) setMetric(name string, value any) {
	if l.Metrics == nil {
		l.Metrics = make(map[string]any)
	}
	if f, ok := value.(float64); ok && (math.IsInf(f, 0) || math.IsNaN(f)) {
		value = fmt.Sprint(f)
	}
	l.Metrics[name] = value
}

// writeTable shows a pipeline to a person.
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
	starts := slices.ContainsFunc(p.Components, func(l *listedComponent) bool { return l.State != "" })
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	columns := []string{"ID", "TYPE", "STATE", "PID", "RESTARTS", "HEALTH", "LAST SEEN", "ENDPOINT", "METRICS"}
	row := func(cells []string) {
		if !starts {
			cells = slices.Delete(cells, 2, 5)
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	row(columns)
	for _, l := range p.Components {
		row([]string{
			l.title(starts), clean(l.Type), cmp.Or(clean(l.State), "-"), dash(l.PID != 0, l.PID), dash(l.State != "", l.Restarts),
			clean(l.Health), dash(l.LastSeen != nil, l.age(now)), cmp.Or(clean(l.Endpoint), "-"), l.metricsText(),
		})
	}
	_ = tw.Flush() // w keeps the error
	for _, l := range p.Components {
		if l.Cause != "" && !l.Healthy {
			fmt.Fprintf(w, "%s: %s\n", clean(l.ID), printable(l.Cause))
		}
	}
}

const durableAgain = "what is registered would survive a restart again"

// durability says what is wrong with the state file, "" for nothing.
func (p *listedPipeline) durability() string {
	if p.NotDurable == "" {
		return ""
	}
	return "what is registered would not survive a restart: " + printable(p.NotDurable)
}

// title is the id with what else there is to know of it: starts tells that the list
// is of a pipeline.
func (l *listedComponent) title(starts bool) string {
	switch {
	case starts && !l.InPipeline:
		return clean(l.ID) + " (not in the pipeline)"
	case l.ServiceID != "":
		return clean(l.ID) + " (" + clean(l.ServiceID) + ")"
	}
	return clean(l.ID)
}

func dash(ok bool, value any) string {
	if !ok {
		return "-"
	}
	return fmt.Sprint(value)
}

func (l *listedComponent) age(now time.Time) string {
	if l.LastSeen == nil {
		return ""
	}
	return ago(now.Sub(*l.LastSeen))
}

func ago(d time.Duration) string {
	if d < 10*time.Second {
		return max(d, 0).Round(100*time.Millisecond).String() + " ago"
	}
	return d.Round(time.Second).String() + " ago"
}

// metricsText shows the first few metrics by name.
func (l *listedComponent) metricsText() string {
	return cmp.Or(enumerate(l.metricTexts()), "-")
}

func (l *listedComponent) metricTexts() []string {
	var parts []string
	for name, value := range l.Metrics {
		if f, ok := value.(float64); ok {
			value = fmt.Sprintf("%.6g", f)
		}
		parts = append(parts, clean(fmt.Sprintf("%s=%v", name, value)))
	}
	slices.Sort(parts)
	return parts
}

// writeDetails shows all that is known of a component to a person.
func (l *listedComponent) writeDetails(w *bufio.Writer, p *listedPipeline, now time.Time) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(tw, "%s:\t%s\n", name, value)
		}
	}
	list := func(values []string) string {
		for i := range values {
			values[i] = printable(values[i])
		}
		return strings.Join(values, ", ")
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
	line("metrics", strings.Join(l.metricTexts(), ", "))
	_ = tw.Flush() // w keeps the error
	if len(l.History) > 0 {
		fmt.Fprintln(w, "history:")
	}
	for _, h := range l.History {
		fmt.Fprintf(w, "  %s  %s\n", h.Time.Local().Format(time.DateTime), strings.TrimSuffix(clean(h.Health)+": "+printable(h.Cause), ": "))
	}
}

// oneLine is the depth of what is not to be indented.
const oneLine = -1

// appendJSON appends v as list prints it, so many levels deep. There must be nothing in
// it that JSON does not know, or it panics: half an array is worse than none. What could
// do something to a terminal is escaped.
func appendJSON(b []byte, v any, depth int) []byte {
	text := bytes.NewBuffer(b)
	enc := json.NewEncoder(text)
	enc.SetEscapeHTML(false)
	if depth != oneLine {
		enc.SetIndent(strings.Repeat("  ", depth), "  ")
	}
	if err := enc.Encode(v); err != nil {
		panic(err)
	}
	return escapeJSON(bytes.TrimSuffix(text.Bytes(), []byte("\n")))
}

// escapeJSON escapes the control and format characters that JSON leaves as they are.
// They can be in strings alone.
func escapeJSON(text []byte) []byte {
	wild := func(r rune) bool { return r >= 0x7f && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r)) }
	if i := slices.IndexFunc(text, func(b byte) bool { return b >= 0x7f }); i < 0 || !bytes.ContainsFunc(text[i:], wild) {
		return text
	}
	var out []byte
	for _, r := range string(text) {
		high, low := utf16.EncodeRune(r)
		switch {
		case !wild(r):
			out = utf8.AppendRune(out, r)
		case high == unicode.ReplacementChar: // it needs no pair
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		}
	}
	return out
}

// writeJSON shows pipelines, of which there is one at least, to a program: one array.
// The components are the last member of each, and not made into one text first: there
// may be a hundred thousand.
func writeJSON(w io.Writer, pipelines []listedPipeline) error {
	out := bufio.NewWriter(w)
	between := "[\n  "
	for _, p := range pipelines {
		texts := p.texts
		for _, l := range p.Components {
			texts = append(texts, appendJSON(nil, l, 3))
		}
		p.Components = []*listedComponent{}
		out.WriteString(between)
		out.Write(bytes.TrimSuffix(appendJSON(nil, p, 1), []byte("]\n  }")))
		before, after := "\n      ", ""
		for _, text := range texts {
			out.WriteString(before)
			out.Write(text)
			before, after = ",\n      ", "\n    "
		}
		out.WriteString(after + "]\n  }")
		between = ",\n  "
	}
	out.WriteString("\n]\n")
	return out.Flush()
}

// listPlanes asks all at once and shows what they answer. It returns an *exitError
// where something is not healthy or one does not answer; absent are errors of those
// that cannot be asked.
func listPlanes(clients []*listClient, absent []error, o listOptions) error {
	errs := make([]error, len(clients))
	var asked sync.WaitGroup
	for i, c := range clients {
		c.asJSON = o.json && o.id == ""
		asked.Go(func() {
			errs[i] = c.follow(context.Background(), &operatorv1.WatchRequest{}, func(out *operatorv1.WatchResponse) { c.take(out) })
		})
	}
	asked.Wait()
	var pipelines []listedPipeline
	failed := absent
	for i, c := range clients {
		if errs[i] != nil {
			failed = append(failed, o.noAnswer(c.endpoint, errs[i]))
		} else if p, ok := c.listed(o.id); ok {
			pipelines = append(pipelines, p)
		}
	}
	if len(failed) == len(absent)+len(clients) {
		return &exitError{exitPlane, errors.Join(failed...)}
	}
	if o.id != "" && len(pipelines) == 0 {
		return &exitError{exitFailed, errors.Join(append(failed, o.unknown(clients))...)}
	}
	if err := showPipelines(os.Stdout, pipelines, o); err != nil {
		return err
	}
	unhealthy := func(p listedPipeline) bool {
		return p.unhealthy || slices.ContainsFunc(p.Components, func(l *listedComponent) bool { return !l.Healthy })
	}
	if len(failed) > 0 || slices.ContainsFunc(pipelines, unhealthy) {
		return &exitError{exitFailed, errors.Join(failed...)}
	}
	return nil
}

// unknown says that there is no component with the id that was asked for.
func (o *listOptions) unknown(clients []*listClient) error {
	var ids []string
	for _, c := range clients {
		for _, record := range c.order {
			ids = append(ids, printable(c.records[record].ID))
		}
	}
	if len(ids) == 0 {
		return fmt.Errorf("no component %q is registered, and no other", clip(o.id))
	}
	return fmt.Errorf("no component %q is in what runs here: there is %s", clip(o.id), enumerate(ids))
}

// noAnswer says that no control plane answers, in the words of who typed the address,
// or that one answers with an error.
func (o *listOptions) noAnswer(endpoint string, err error) error {
	answer := status.Convert(err)
	switch answer.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled: // which grpc says itself, too
		return fmt.Errorf("no control plane answers at %s: %s%s", endpoint, dialReason(answer.Message()), o.tls.hint(endpoint))
	}
	return fmt.Errorf("the control plane at %s refuses: %s", endpoint, printable(answer.Message()))
}

// dialReason takes grpc's words away that are around the kernel's, or those of TLS.
func dialReason(text string) string {
	if quoted, ok := strings.CutPrefix(text, "connection error: desc = "); ok {
		if desc, err := strconv.Unquote(quoted); err == nil {
			text = desc
		}
	}
	text = strings.TrimPrefix(text, "transport: ")
	return printable(strings.TrimPrefix(text, "Error while dialing: "))
}

// showPipelines prints them as o wants it.
func showPipelines(w io.Writer, pipelines []listedPipeline, o listOptions) error {
	if o.json {
		return writeJSON(w, pipelines)
	}
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
		if o.id == "" {
			p.writeTable(out, now)
			continue
		}
		for _, l := range p.Components {
			l.writeDetails(out, &p, now)
		}
	}
	return out.Flush()
}

// redrawTime is how often list -watch draws at most.
const redrawTime = 250 * time.Millisecond

const (
	enterScreen = "\x1b[?1049h\x1b[?25l" // the alternate screen, without a cursor
	leaveScreen = "\x1b[?25h\x1b[?1049l"
)

// news is what one control plane has sent, or the end of its stream.
type news struct {
	client *listClient
	out    *operatorv1.WatchResponse // nil at the end
	err    error                     // why it ended
}

// watchPlanes shows the changes of all clients until a signal comes, or until all
// streams have ended, which is an *exitError.
func watchPlanes(clients []*listClient, o listOptions) error {
	screen := !o.json && isTerminal(os.Stdout) && os.Getenv("TERM") != "dumb"
	ctx, stop := untilSignal(screen)
	arrived := make(chan news)
	var streams sync.WaitGroup
	defer streams.Wait()
	defer stop()
	for _, c := range clients {
		streams.Go(func() {
			send := func(n news) {
				select {
				case arrived <- n:
				case <-ctx.Done():
				}
			}
			came := false
			err := c.follow(ctx, &operatorv1.WatchRequest{Follow: true, Heartbeats: screen}, func(out *operatorv1.WatchResponse) {
				came = true
				send(news{c, out, nil})
			})
			send(news{c, nil, o.watchEnd(c.endpoint, came, err)})
		})
	}
	v := &watchView{clients: clients, options: o, screen: screen, out: os.Stdout}
	defer v.end()
	stops := make(chan os.Signal, 1)
	if screen && !signal.Ignored(syscall.SIGTSTP) {
		signal.Notify(stops, syscall.SIGTSTP)
	}
	ticker := time.NewTicker(redrawTime)
	defer ticker.Stop()
	var ends []error
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-stops:
			err = v.suspend()
		case n := <-arrived:
			if n.out != nil {
				err = v.show(n.client.take(n.out))
				break
			}
			ends = append(ends, n.err)
			last := len(ends) == len(clients)
			if err = v.showEnd(n.client, n.err, last); last && err == nil {
				return &exitError{exitPlane, errors.Join(ends...)}
			}
		case now := <-ticker.C:
			err = v.draw(now)
		}
		if err != nil {
			return &exitError{exitFailed, err}
		}
	}
}

// untilSignal returns a context that ends by the first signal that asks for an end. The
// second ends flowctl at once, which may be held up by who does not read its output.
func untilSignal(screen bool) (context.Context, context.CancelFunc) {
	ends := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		ends = append(ends, syscall.SIGHUP)
	}
	if screen {
		ends = append(ends, syscall.SIGQUIT)
	}
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // a closed standard output is to be an error of a write
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// watchEnd says why a stream of changes has ended, of which something came, or nothing.
func (o *listOptions) watchEnd(endpoint string, came bool, err error) error {
	switch {
	case errors.Is(err, errLegacy):
		return fmt.Errorf("the control plane at %s has no operator service, which -watch needs", endpoint)
	case err == nil:
		return fmt.Errorf("the control plane at %s has stopped", endpoint)
	case came && status.Code(err) == codes.Unavailable:
		return fmt.Errorf("the control plane at %s is gone: %s", endpoint, dialReason(status.Convert(err).Message()))
	}
	return o.noAnswer(endpoint, err)
}

// watchView is what list -watch shows: on a terminal the tables, redrawn in place,
// elsewhere each change.
type watchView struct {
	clients []*listClient
	options listOptions
	screen  bool
	entered bool // the alternate screen is on
	stopped bool // by Ctrl-Z, and nothing has been drawn since
	out     *os.File
	changed bool
	drawn   time.Time
}

// suspend leaves the terminal to the shell that Ctrl-Z brings back. It returns when
// flowctl goes on.
func (v *watchView) suspend() error {
	err := v.leave()
	stopSelf()
	v.stopped, v.changed = true, true
	return err
}

func (v *watchView) leave() error {
	if !v.entered {
		return nil
	}
	v.entered = false
	_, err := io.WriteString(v.out, leaveScreen)
	return err
}

// end leaves the last state on the terminal.
func (v *watchView) end() {
	if v.screen {
		_ = v.leave()
		_ = showPipelines(v.out, v.pipelines(), v.options)
	}
}

// pipelines are those that are known whole, and those of which nothing more comes.
func (v *watchView) pipelines() []listedPipeline {
	var out []listedPipeline
	for _, c := range v.clients {
		if p, ok := c.listed(v.options.id); ok && c.complete || p.ended != "" {
			out = append(out, p)
		}
	}
	return out
}

// show takes in what has changed.
func (v *watchView) show(events []listedEvent) error {
	v.changed = true
	if v.screen {
		return nil
	}
	for i := range events {
		e := &events[i]
		if id := v.options.id; id != "" && e.Removed != id && (e.Component == nil || !e.Component.is(id)) {
			continue
		}
		if err := e.write(v.out, v.options.json); err != nil {
			return err
		}
	}
	return nil
}

// showEnd shows that nothing more comes of a client. Of the last one the last state is
// left as it is, and the error of list says the rest.
func (v *watchView) showEnd(c *listClient, err error, last bool) error {
	e := listedEvent{Time: time.Now(), Pipeline: c.pipeline.Pipeline, Endpoint: c.pipeline.Endpoint, Ended: err.Error()}
	switch {
	case v.options.json:
		return e.write(v.out, true)
	case last:
		return nil
	case v.screen:
		c.pipeline.ended, v.changed = firstLine(e.Ended), true
		return nil
	}
	return e.write(v.out, false)
}

// write prints one line.
func (e *listedEvent) write(w io.Writer, asJSON bool) error {
	if asJSON {
		_, err := w.Write(append(appendJSON(nil, e, oneLine), '\n'))
		return err
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

// firstLine leaves out the hint of an error.
func firstLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	return printable(text)
}

// draw draws what has changed, or after a second how old it is by now. What does not
// fit on the terminal is left out.
func (v *watchView) draw(now time.Time) error {
	if !v.screen || !v.changed && now.Sub(v.drawn) < time.Second {
		return nil
	}
	pipelines := v.pipelines()
	if len(pipelines) == 0 && !v.entered || v.stopped && !inForeground(v.out) {
		return nil // there is nothing to draw, or the terminal is another's
	}
	v.changed, v.drawn, v.stopped = false, now, false
	var text strings.Builder
	if err := showPipelines(&text, pipelines, v.options); err != nil {
		return err
	}
	width, height := terminalSize(v.out)
	frame := "\x1b[?7l\x1b[H" // without autowrap: there are characters of two columns
	if !v.entered {
		frame = enterScreen + frame
		v.entered = true
	}
	for i, line := range strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n") {
		if i == height {
			break
		}
		if i > 0 {
			frame += "\r\n"
		}
		frame += cut(line, width) + "\x1b[K"
	}
	_, err := io.WriteString(v.out, frame+"\x1b[J\x1b[?7h")
	return err
}

// cut shortens a line to width characters.
func cut(line string, width int) string {
	count := 0
	for i := range line {
		if count == width {
			return line[:i]
		}
		count++
	}
	return line
}

// terminalSize is 80 by 24 where the terminal does not tell.
func terminalSize(f *os.File) (width, height int) {
	var size struct{ Rows, Columns, X, Y uint16 }
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
	if errno != 0 || size.Rows == 0 || size.Columns == 0 {
		return 80, 24
	}
	return int(size.Columns), int(size.Rows)
}
