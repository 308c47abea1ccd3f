package main

import (
	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"

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

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

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

// listRuns shows what is registered at the control planes that o names, and follows it
// with o.watch.
func listRuns(o listOptions) error {
	runs, starting, err := o.runs(false)
	if err != nil {
		return &exitError{code: exitPlane, err: err}
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
		return &exitError{code: exitPlane, err: errors.Join(absent...)}
	case !o.watch:
		return listPlanes(clients, absent, o)
	}
	for _, err := range absent {
		fmt.Fprintln(os.Stderr, complaint("flowctl: "+printable(err.Error())))
	}
	return watchPlanes(clients, o)
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
	endpoint string
	conn     *grpc.ClientConn
	pipeline listedPipeline             // as it was told last, without its components
	records  map[int64]*listedComponent // as they were told last
	order    []int64                    // of records, as they were told first
	missing  map[int64]bool             // records that the snapshot which is coming has not told of yet
	complete bool                       // a snapshot has come whole
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
	if _, known := c.records[l.record]; !known {
		c.order = append(c.order, l.record)
	}
	c.records[l.record] = l
}

// listPipeline is a pipeline as list shows it, without its components.
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
	out.Components = make([]*listedComponent, 0, len(c.records))
	for _, record := range c.order {
		if l := c.records[record]; id == "" || l.is(id) {
			out.Components = append(out.Components, l)
		}
	}
	slices.SortStableFunc(out.Components, func(a, b *listedComponent) int { return a.rank() - b.rank() })
	return out, id == "" || len(out.Components) > 0
}

// listPlanes asks all at once and shows what they answer. It returns an *exitError
// where something is not healthy or one does not answer; absent are errors of those
// that cannot be asked.
func listPlanes(clients []*listClient, absent []error, o listOptions) error {
	errs := make([]error, len(clients))
	var asked sync.WaitGroup
	for i, c := range clients {
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
		return &exitError{code: exitPlane, err: errors.Join(failed...)}
	}
	if o.id != "" && len(pipelines) == 0 {
		return &exitError{code: exitFailed, err: errors.Join(append(failed, o.unknown(clients))...)}
	}
	if err := o.show(os.Stdout, pipelines); err != nil {
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

// show prints pipelines in the form that was asked for.
func (o *listOptions) show(w io.Writer, pipelines []listedPipeline) error {
	if o.json {
		return writeJSON(w, pipelines, true)
	}
	return showPipelines(w, pipelines, o.id)
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
	if screen && canBeSuspended() {
		signal.Notify(stops, syscall.SIGTSTP, syscall.SIGCONT)
	}
	ticker := time.NewTicker(redrawTime)
	defer ticker.Stop()
	var ends []error
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case sig := <-stops:
			if v.suspended = sig == syscall.SIGTSTP; v.suspended {
				err = v.suspend()
			}
		case n := <-arrived:
			if n.out != nil {
				err = v.show(n.client.take(n.out))
				break
			}
			ends = append(ends, n.err)
			last := len(ends) == len(clients)
			if err = v.showEnd(n.client, n.err, last); last && err == nil {
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
	clients    []*listClient
	options    listOptions
	screen     bool
	entered    bool // the alternate screen is on
	suspended  bool // by Ctrl-Z, until SIGCONT
	background bool // was suspended, and nothing has been drawn since
	out        *os.File
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
	if v.screen {
		_ = v.leave()
		_ = v.options.show(v.out, v.pipelines())
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

// draw draws what has changed, or after a second how old it is by now. What does not
// fit on the terminal is left out.
func (v *watchView) draw(now time.Time) error {
	if !v.screen || !v.changed && now.Sub(v.drawn) < time.Second {
		return nil
	}
	pipelines := v.pipelines()
	if len(pipelines) == 0 && !v.entered || v.suspended || v.background && !inForeground(v.out) {
		return nil // there is nothing to draw, or the terminal is another's
	}
	v.changed, v.drawn, v.background = false, now, false
	var text strings.Builder
	if err := v.options.show(&text, pipelines); err != nil {
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

// reloadPatience is how long the command reload waits for an answer. flowctl reads a
// file and answers, so more is a disk or a control plane that hangs.
const reloadPatience = 30 * time.Second

// reloadRun has a running pipeline read its file again: the one that o.endpoint or name
// says, else the only one.
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
	defer client.close()
	ctx, cancel := context.WithTimeout(context.Background(), reloadPatience)
	defer cancel()
	out, err := operatorv1.NewOperatorClient(client.conn).Reload(ctx, &operatorv1.ReloadRequest{}, grpc.WaitForReady(false))
	switch status.Code(err) {
	case codes.OK:
	case codes.FailedPrecondition:
		return &exitError{code: exitUsage, err: errors.New(status.Convert(err).Message())}
	case codes.Unimplemented:
		return &exitError{code: exitPlane, err: fmt.Errorf("the control plane at %s has no pipeline to reload", client.endpoint)}
	default:
		return &exitError{code: exitPlane, err: o.noAnswer(client.endpoint, err)}
	}
	return printAnswer(reloadText(out) + "\n")
}

// choosePipeline returns the one of runs that is the pipeline of that name, or without
// a name, in ExecReload= of a unit, its main process (systemd.exec(5)), or the only one.
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

// reloadText says what a reload has come to.
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
