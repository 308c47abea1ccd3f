// The commands that ask a running flowctl: list, list -watch and reload. They find it by
// its run file or are given its endpoint, and speak gRPC to it.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

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

const (
	answerTime = 2 * time.Second        // for an answer, and for a pipeline that is just starting
	reloadTime = 30 * time.Second       // for the answer to a reload: flowctl reads a file, so more is a disk that hangs
	redrawTime = 250 * time.Millisecond // between two redraws of list -watch, at least

	enterScreen = "\x1b[?1049h\x1b[?25l" // the alternate screen, without a cursor
	leaveScreen = "\x1b[?25h\x1b[?1049l"
)

// listOptions are the flags of list and reload, and the argument of list.
type listOptions struct {
	endpoint string // "" for those of the pipelines that run here
	json     bool
	watch    bool
	wait     bool
	tls      tlsFlags
	id       string // of the one component to show, "" for all
}

// listRuns shows what is registered at the control planes that o names, once or, with
// o.watch, until a signal. It returns an *exitError where something is not healthy, or a
// control plane does not answer.
func listRuns(o listOptions) error {
	runs, starting, err := o.runs(false)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	clients, unusable := o.connect(runs)
	defer func() {
		for _, c := range clients {
			c.conn.Close()
		}
	}()
	unasked := append(starting, unusable...)
	switch {
	case len(clients) == 0:
		return &exitError{code: exitPlane, err: errors.Join(unasked...)}
	case !o.watch:
		return listOnce(clients, unasked, o)
	}
	for _, err := range unasked {
		fmt.Fprintln(os.Stderr, markErrors("flowctl: "+printable(err.Error())))
	}
	return listChanges(clients, o)
}

// reloadRun has a running pipeline read its file again: the one at o.endpoint, or the
// one called name, or the only one.
func reloadRun(o listOptions, name string) error {
	o.wait = true
	runs, _, err := o.runs(true)
	if err == nil && o.endpoint == "" {
		runs, err = choosePipeline(runs, name)
	}
	if err != nil {
		return &exitError{code: exitPlane, err: err}
	}
	clients, errs := o.connect(runs)
	if len(errs) > 0 {
		return &exitError{code: exitPlane, err: errors.Join(errs...)}
	}
	client := clients[0]
	defer client.conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), reloadTime)
	defer cancel()
	out, err := operatorv1.NewOperatorClient(client.conn).Reload(ctx, &operatorv1.ReloadRequest{}, grpc.WaitForReady(false))
	switch status.Code(err) {
	case codes.OK:
		return printAnswer(reloadText(out) + "\n")
	case codes.FailedPrecondition:
		return &exitError{code: exitUsage, err: errors.New(printableLines(status.Convert(err).Message()))}
	case codes.Unimplemented:
		return &exitError{code: exitPlane, err: fmt.Errorf("the control plane at %s has no pipeline to reload", client.endpoint)}
	}
	return &exitError{code: exitPlane, err: o.noAnswer(client.endpoint, err)}
}

// choosePipeline returns the one of runs that is the pipeline of that name. Without a
// name that is, in ExecReload= of a unit, its main process (systemd.exec(5)), else the
// only one.
func choosePipeline(runs []runInfo, name string) ([]runInfo, error) {
	runs = slices.DeleteFunc(runs, func(r runInfo) bool { return r.Pipeline == "" })
	main, _ := strconv.Atoi(os.Getenv("MAINPID"))
	var names []string
	for i, run := range runs {
		names = append(names, run.Pipeline)
		if name == run.Pipeline || name == "" && run.PID == main {
			return runs[i : i+1], nil
		}
	}
	switch {
	case name == "" && main != 0:
		return nil, fmt.Errorf("process %d, the unit's (MAINPID), is no pipeline that runs here", main)
	case len(runs) == 0:
		return nil, errors.New("no pipeline is running here")
	case name != "":
		return nil, fmt.Errorf("no pipeline %q is running, only %s", name, enumerate(names))
	case len(runs) > 1:
		return nil, fmt.Errorf("%d pipelines are running: name one of %s", len(names), enumerate(names))
	}
	return runs, nil
}

// reloadText says what a reload has changed.
func reloadText(out *operatorv1.ReloadResponse) string {
	var parts []string
	for _, p := range []struct {
		what string
		ids  []string
	}{{"added", out.GetAdded()}, {"removed", out.GetRemoved()}, {"restarted", out.GetRestarted()}} {
		if len(p.ids) > 0 {
			parts = append(parts, p.what+" "+clean(enumerate(p.ids)))
		}
	}
	if len(parts) == 0 {
		return "reloaded: nothing has changed"
	}
	return fmt.Sprintf("reloaded: %s; %d unchanged", strings.Join(parts, ", "), out.GetUnchanged())
}

// dialable tells whether endpoint is host:port or unix:PATH. The other schemes of grpc
// are refused.
func dialable(endpoint string) bool {
	if path, ok := strings.CutPrefix(endpoint, "unix:"); ok {
		return strings.Trim(path, "/") != ""
	}
	_, port, err := net.SplitHostPort(endpoint)
	_, portErr := strconv.ParseUint(port, 10, 16)
	return err == nil && portErr == nil
}

// runs returns the control planes to ask, and an error for each that does not listen
// yet. With o.wait those are waited for where nothing else runs, or with all.
func (o *listOptions) runs(all bool) ([]runInfo, []error, error) {
	if o.endpoint != "" {
		return []runInfo{{Endpoint: o.endpoint, TLS: o.tls != (tlsFlags{})}}, nil, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	return awaitRuns(ctx, o.wait, all)
}

// connect returns a client for each of runs, or an error. It does not dial yet.
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
		conn, err := newConn(run.Endpoint, with, o.wait)
		if err != nil {
			errs = append(errs, fmt.Errorf("endpoint %q: %v", run.Endpoint, err))
			continue
		}
		clients = append(clients, &listClient{
			endpoint: run.Endpoint, conn: conn, records: make(map[int64]*listedComponent),
			pipeline: listedPipeline{Pipeline: run.Pipeline, Endpoint: run.Endpoint},
		})
	}
	return clients, errs
}

// newConn returns a connection to the control plane at endpoint. With wait its calls go
// on trying to connect until their context ends.
func newConn(endpoint string, creds credentials.TransportCredentials, wait bool) (*grpc.ClientConn, error) {
	return grpc.NewClient(endpoint,
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(),
		// A stream may have nothing to send for hours: this notices a machine that is gone.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(wait), grpc.MaxCallRecvMsgSize(1<<30)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))
}

// listOnce asks all clients at once and prints their answers. unasked are errors of
// control planes that have no client.
func listOnce(clients []*listClient, unasked []error, o listOptions) error {
	errs := make([]error, len(clients))
	var asked sync.WaitGroup
	for i, c := range clients {
		asked.Go(func() {
			errs[i] = c.follow(context.Background(), &operatorv1.WatchRequest{}, func(out *operatorv1.WatchResponse) { c.take(out) })
		})
	}
	asked.Wait()
	var pipelines []listedPipeline
	failed := unasked
	for i, c := range clients {
		if errs[i] != nil {
			failed = append(failed, o.noAnswer(c.endpoint, errs[i]))
		} else if p, ok := c.listed(o.id); ok {
			pipelines = append(pipelines, p)
		}
	}
	if len(failed) == len(unasked)+len(clients) {
		return &exitError{code: exitPlane, err: errors.Join(failed...)}
	}
	if o.id != "" && len(pipelines) == 0 {
		return &exitError{code: exitFailed, err: errors.Join(append(failed, o.unknown(clients))...)}
	}
	if err := o.print(os.Stdout, pipelines); err != nil {
		return err
	}
	unhealthy := func(p listedPipeline) bool {
		return slices.ContainsFunc(p.Components, func(l *listedComponent) bool { return !l.Healthy })
	}
	if len(failed) > 0 || slices.ContainsFunc(pipelines, unhealthy) {
		return &exitError{code: exitFailed, err: errors.Join(failed...)}
	}
	return nil
}

// print writes pipelines in the form that was asked for.
func (o *listOptions) print(w io.Writer, pipelines []listedPipeline) error {
	if o.json {
		return writeJSON(w, pipelines, true)
	}
	return writePipelines(w, pipelines, o.id)
}

// unknown is the error for an id that no component has.
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

// noAnswer is the error for a call that failed: nobody listens at endpoint, or who does
// refuses.
func (o *listOptions) noAnswer(endpoint string, err error) error {
	answer := status.Convert(err)
	switch answer.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled: // a client's grpc makes these itself
		return fmt.Errorf("no control plane answers at %s: %s%s", endpoint, dialReason(answer.Message()), o.tls.hint(endpoint))
	}
	return fmt.Errorf("the control plane at %s refuses: %s", endpoint, printable(answer.Message()))
}

// ended is the error for a stream of changes that has ended. With came it had sent
// something.
func (o *listOptions) ended(endpoint string, came bool, err error) error {
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

// dialReason leaves of grpc's message only the error of the kernel or of TLS. Their
// errors are not wrapped by a status: its text is all that there is.
func dialReason(text string) string {
	if quoted, ok := strings.CutPrefix(text, "connection error: desc = "); ok {
		if desc, err := strconv.Unquote(quoted); err == nil {
			text = desc
		}
	}
	text = strings.TrimPrefix(text, "transport: ")
	return printable(strings.TrimPrefix(text, "Error while dialing: "))
}

var (
	errLegacy = errors.New("the control plane has no operator service")
	errSilent = fmt.Errorf("nothing came within %s", answerTime)
)

// listClient asks one control plane, and keeps what it has answered.
type listClient struct {
	endpoint string
	conn     *grpc.ClientConn
	pipeline listedPipeline             // without its components
	records  map[int64]*listedComponent // by the number that the control plane gives a component
	order    []int64                    // of records, as they came
	missing  map[int64]bool             // of records, while a snapshot comes: not in it so far
	complete bool                       // a snapshot has come whole
}

// follow passes each message of a stream of changes to take until the stream ends: that
// is after the first snapshot, unless in.Follow is set. The first message has to come
// within answerTime, and without in.Follow each of them.
func (c *listClient) follow(ctx context.Context, in *operatorv1.WatchRequest, take func(*operatorv1.WatchResponse)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(answerTime, func() { cancel(errSilent) })
	defer silence.Stop()
	err := c.receive(ctx, in, func(out *operatorv1.WatchResponse) {
		if silence.Stop(); !in.GetFollow() {
			silence.Reset(answerTime)
		}
		take(out)
	})
	if err == nil || context.Cause(ctx) != errSilent {
		return err
	}
	why := errSilent.Error()
	// Why no attempt to connect has succeeded, grpc says only in this text.
	if _, latest, ok := strings.Cut(status.Convert(err).Message(), "latest balancer error: "); ok {
		why += ": " + dialReason(latest)
	}
	return status.Error(codes.DeadlineExceeded, why)
}

// receive is follow without a limit of time. A control plane without an operator service
// is asked in the legacy dialect, and one that has no stream left for a single message.
func (c *listClient) receive(ctx context.Context, in *operatorv1.WatchRequest, take func(*operatorv1.WatchResponse)) error {
	operator := operatorv1.NewOperatorClient(c.conn)
	stream, err := operator.Watch(ctx, in)
	for err == nil {
		var out *operatorv1.WatchResponse
		if out, err = stream.Recv(); err == nil {
			take(out)
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
		take(&operatorv1.WatchResponse{Pipeline: p, Components: p.GetComponents(), Reset_: true, Complete: true})
		return nil
	}
	return err
}

// take keeps what a message brings, and returns what is new in it.
func (c *listClient) take(out *operatorv1.WatchResponse) []listedEvent {
	var events []listedEvent
	event := func() *listedEvent {
		events = append(events, listedEvent{Time: time.Now(), Pipeline: c.pipeline.Pipeline, Endpoint: c.pipeline.Endpoint})
		return &events[len(events)-1]
	}
	if out.GetReset_() {
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
		delete(c.missing, in.GetRecord())
		c.put(in.GetRecord(), component)
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

func (c *listClient) put(record int64, l *listedComponent) {
	if _, known := c.records[record]; !known {
		c.order = append(c.order, record)
	}
	c.records[record] = l
}

// listed returns the pipeline with its components, those of the file first. With an id
// it has only those of that id, and ok is false where there is none.
func (c *listClient) listed(id string) (p listedPipeline, ok bool) {
	p = c.pipeline
	p.Components = make([]*listedComponent, 0, len(c.records))
	for _, record := range c.order {
		if l := c.records[record]; id == "" || l.is(id) {
			p.Components = append(p.Components, l)
		}
	}
	slices.SortStableFunc(p.Components, func(a, b *listedComponent) int { return a.rank() - b.rank() })
	return p, id == "" || len(p.Components) > 0
}

// listPipeline converts a pipeline, without its components.
func listPipeline(p *operatorv1.Pipeline) listedPipeline {
	return listedPipeline{
		Pipeline: p.GetName(), Endpoint: p.GetEndpoint(), PID: p.GetPid(), Version: p.GetVersion(), Started: listTime(p.GetStarted()),
		Status: p.GetStatus(), Ready: p.GetReady(), StateFile: p.GetStateFile(), NotDurable: p.GetNotDurable(),
	}
}

func listComponent(c *operatorv1.Component) *listedComponent {
	p := c.GetProcess()
	l := &listedComponent{
		ID: c.GetId(), InPipeline: c.GetInPipeline(), ServiceID: c.GetServiceId(), Type: c.GetType(),
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

// listTime is nil for a time that was not sent, or that RFC 3339 cannot write.
func listTime(t *timestamppb.Timestamp) *time.Time {
	if !t.IsValid() {
		return nil
	}
	return new(t.AsTime())
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
			ID: s.GetServiceId(), InPipeline: s.GetComponentId() != "",
			Type: typeName(s.GetServiceType()), Health: health.String(),
			Healthy: s.GetIsHealthy(), LastSeen: listTime(s.GetLastHeartbeat()),
		}
		if id := s.GetComponentId(); id != "" && id != component.ID {
			component.ID, component.ServiceID = id, component.ID
		}
		for name, f := range s.GetMetrics() {
			component.setMetric(name, f)
		}
		c.put(int64(i), component)
	}
	return nil
}

// arrival is a message of one control plane, or the end of its stream.
type arrival struct {
	client *listClient
	out    *operatorv1.WatchResponse // nil at the end
	err    error                     // why it ended
}

// listChanges shows the changes of all clients until a signal comes, or until all
// streams have ended, which is an *exitError.
func listChanges(clients []*listClient, o listOptions) error {
	v := &watchView{clients: clients, options: o, out: os.Stdout, onScreen: !o.json && isTerminal(os.Stdout) && os.Getenv("TERM") != "dumb"}
	ctx, stop := untilSignal(v.onScreen)
	arrivals := make(chan arrival)
	var streams sync.WaitGroup
	defer streams.Wait()
	defer stop()
	for _, c := range clients {
		streams.Go(func() { c.send(ctx, o, v.onScreen, arrivals) })
	}
	defer v.end()
	suspends := make(chan os.Signal, 2)
	if v.onScreen && canBeSuspended() {
		signal.Notify(suspends, syscall.SIGTSTP, syscall.SIGCONT)
	}
	ticker := time.NewTicker(redrawTime)
	defer ticker.Stop()
	var ends []error
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case sig := <-suspends:
			if v.suspended = sig == syscall.SIGTSTP; v.suspended {
				err = v.suspend()
			}
		case a := <-arrivals:
			if a.out != nil {
				err = v.show(a.client.take(a.out))
				break
			}
			ends = append(ends, a.err)
			last := len(ends) == len(clients)
			if err = v.showEnd(a.client, a.err, last); last && err == nil {
				return &exitError{code: exitPlane, err: errors.Join(ends...)}
			}
		case now := <-ticker.C:
			err = v.draw(now)
		}
		if err != nil {
			return &exitError{code: exitFailed, err: err}
		}
	}
}

// send sends each message of the stream of c, and why it ended, to arrivals until ctx ends.
func (c *listClient) send(ctx context.Context, o listOptions, heartbeats bool, arrivals chan<- arrival) {
	send := func(a arrival) {
		select {
		case arrivals <- a:
		case <-ctx.Done():
		}
	}
	came := false
	err := c.follow(ctx, &operatorv1.WatchRequest{Follow: true, Heartbeats: heartbeats}, func(out *operatorv1.WatchResponse) {
		came = true
		send(arrival{client: c, out: out})
	})
	send(arrival{client: c, err: o.ended(c.endpoint, came, err)})
}

// untilSignal returns a context that ends by the first signal that asks for an end. The
// second one ends flowctl at once, which a reader that does not read may hold up.
func untilSignal(onScreen bool) (context.Context, context.CancelFunc) {
	ends := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		ends = append(ends, syscall.SIGHUP)
	}
	if onScreen {
		ends = append(ends, syscall.SIGQUIT)
	}
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // a closed standard output is to be an error of a write
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// watchView is what list -watch shows: on a terminal the tables, redrawn in place,
// elsewhere each change.
type watchView struct {
	clients    []*listClient
	options    listOptions
	out        *os.File
	onScreen   bool
	entered    bool // the alternate screen is on
	suspended  bool // by Ctrl-Z, until SIGCONT
	background bool // was suspended, and nothing was drawn since
	changed    bool
	drawn      time.Time
}

// suspend leaves the terminal to the shell that Ctrl-Z brings back, and stops flowctl.
func (v *watchView) suspend() error {
	v.background, v.changed = true, true
	err := v.leave()
	stopSelf()
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
	if v.onScreen {
		_ = v.leave()
		_ = v.options.print(v.out, v.pipelines())
	}
}

// pipelines are those that are known whole, and those whose stream has ended.
func (v *watchView) pipelines() []listedPipeline {
	var out []listedPipeline
	for _, c := range v.clients {
		if p, ok := c.listed(v.options.id); ok && c.complete || p.ended != "" {
			out = append(out, p)
		}
	}
	return out
}

// show writes events, or has the next draw show them.
func (v *watchView) show(events []listedEvent) error {
	v.changed = true
	if v.onScreen {
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

// showEnd shows that the stream of c has ended. Of the last one the tables stay as they
// are, because the error of list says the rest.
func (v *watchView) showEnd(c *listClient, err error, last bool) error {
	e := listedEvent{Time: time.Now(), Pipeline: c.pipeline.Pipeline, Endpoint: c.pipeline.Endpoint, Ended: err.Error()}
	switch {
	case v.options.json:
		return e.write(v.out, true)
	case last:
		return nil
	case v.onScreen:
		c.pipeline.ended, v.changed = firstLine(e.Ended), true
		return nil
	}
	return e.write(v.out, false)
}

// draw draws the tables if something has changed, else once a second, because they show
// ages. What does not fit on the terminal is left out.
func (v *watchView) draw(now time.Time) error {
	if !v.onScreen || !v.changed && now.Sub(v.drawn) < time.Second {
		return nil
	}
	pipelines := v.pipelines()
	if len(pipelines) == 0 && !v.entered || v.suspended || v.background && !inForeground(v.out) {
		return nil // there is nothing to draw, or the terminal is another's
	}
	v.changed, v.drawn, v.background = false, now, false
	var text strings.Builder
	if err := v.options.print(&text, pipelines); err != nil {
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
