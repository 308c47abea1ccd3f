// How a running flowctl is found, by its run file or its endpoint, and asked by gRPC: list and
// list -watch. ask.go has the other commands.

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
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

const (
	wholeTime  = 20 * time.Second       // for all of a list that is not to go on
	maxHeld    = 256 << 20              // bytes that a list may take here, twice what a registry lets others say in it
	maxMore    = 1 << 20                // bytes of one message of it, which have maxPart or one component
	answerTime = 2 * time.Second        // for an answer, and for a pipeline that is just starting
	reloadTime = 30 * time.Second       // for the answer to a reload: flowctl reads a file, so more is a disk that hangs
	redrawTime = 250 * time.Millisecond // between two redraws of list -watch, at least

	enterScreen = "\x1b[?1049h\x1b[?25l" // the alternate screen, without a cursor
	leaveScreen = "\x1b[?25h\x1b[?1049l"
)

// listOptions are the flags of the commands that ask a running flowctl, and the argument of list.
type listOptions struct {
	endpoint string // "" for those of the pipelines that run here
	pipeline string // the name of one of those, "" for the only one, or for list all
	json     bool
	watch    bool
	wait     bool
	tls      tlsFlags
	id       string // of the one component to show, "" for all
}

// listRuns shows what is registered at the control planes that o names, once or with o.watch. It
// returns an *exitError where something is not healthy, or a control plane does not answer.
func listRuns(o listOptions) error {
	var runs []runInfo
	var starting []error
	var err error
	if o.pipeline != "" {
		runs, err = o.chosen()
	} else {
		runs, starting, err = o.runs(false)
	}
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
		complain(err)
	}
	return listChanges(clients, o)
}

// complain tells of an error with which the command goes on.
func complain(err error) { fmt.Fprintln(os.Stderr, markErrors("flowctl: "+printable(err.Error()))) }

// one returns a client of the pipeline that o names, or of the only one, or else an *exitError. The
// caller has to close its connection.
func (o *listOptions) one() (*listClient, error) {
	o.wait = true
	runs, err := o.chosen()
	if err != nil {
		return nil, &exitError{code: exitPlane, err: err}
	}
	clients, errs := o.connect(runs)
	if len(errs) > 0 {
		return nil, &exitError{code: exitPlane, err: errors.Join(errs...)}
	}
	return clients[0], nil
}

// chosen returns the one control plane to ask.
func (o *listOptions) chosen() ([]runInfo, error) {
	runs, starting, err := o.runs(true)
	if err != nil || o.endpoint != "" {
		return runs, err
	}
	if runs, err = choosePipeline(runs, o.pipeline); err != nil {
		return nil, errors.Join(append([]error{err}, starting...)...)
	}
	return runs, nil
}

// refused is the *exitError for err, with which the control plane at endpoint has answered a command
// for operators, or has not.
func (o *listOptions) refused(endpoint, command string, err error) error {
	said := errors.New(printableLines(status.Convert(err).Message()))
	switch status.Code(err) {
	case codes.FailedPrecondition, codes.NotFound, codes.InvalidArgument:
		return &exitError{code: exitUsage, err: said}
	case codes.Aborted:
		return &exitError{code: exitFailed, err: said}
	case codes.Unimplemented:
		return &exitError{code: exitPlane, err: fmt.Errorf("the control plane at %s runs no components: there is nothing to %s", endpoint, command)}
	case codes.PermissionDenied:
		return &exitError{code: exitPlane, err: said}
	}
	return &exitError{code: exitPlane, err: o.noAnswer(endpoint, err)}
}

// choosePipeline returns the one of runs that is the pipeline of that name. Without a name that is, in
// ExecReload= of a unit, its main process (systemd.exec(5)), else the only one.
func choosePipeline(runs []runInfo, name string) ([]runInfo, error) {
	runs = slices.DeleteFunc(runs, func(r runInfo) bool { return r.Pipeline == "" })
	main, _ := strconv.Atoi(os.Getenv("MAINPID"))
	var names []string
	var found []runInfo
	for _, run := range runs {
		names = append(names, run.Pipeline)
		if name != "" && name == run.Pipeline || name == "" && run.PID == main {
			found = append(found, run)
		}
	}
	if own := slices.DeleteFunc(slices.Clone(found), func(r runInfo) bool { return r.ofAnother() }); len(own) > 0 {
		found = own
	}
	switch {
	case len(found) == 1:
		return found, nil
	case len(found) > 1:
		var endpoints []string
		for _, run := range found {
			endpoints = append(endpoints, run.Endpoint)
		}
		return nil, fmt.Errorf("%d pipelines %q are running: name one by -endpoint: %s", len(found), name, enumerate(endpoints))
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

// parseEndpoint returns endpoint, which must be host:port or unix:PATH and not another scheme of gRPC, as
// a control plane tells its own.
func parseEndpoint(endpoint string) (string, error) {
	if path, ok, err := socketPath(endpoint); ok {
		return "unix://" + path, err
	}
	_, port, err := net.SplitHostPort(endpoint)
	if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil {
		return "", errors.New("it must be host:port or unix:PATH")
	}
	return endpoint, nil
}

// runs returns the control planes to ask, and an error for each that does not listen yet. With o.wait
// those are waited for where nothing else runs, or with all.
func (o *listOptions) runs(all bool) ([]runInfo, []error, error) {
	if o.endpoint != "" {
		told, err := parseEndpoint(o.endpoint)
		if err != nil {
			return nil, nil, err
		}
		run := runInfo{Endpoint: o.endpoint, TLS: o.tls != (tlsFlags{})}
		if known, _, err := findRuns(); err == nil && o.tls == (tlsFlags{}) {
			for _, here := range known {
				if here.Endpoint == told && !here.ofAnother() { // who may have named it for the calls to come there
					run.path = here.path
				}
			}
		}
		return []runInfo{run}, nil, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	return awaitRuns(ctx, o.wait, all, complain)
}

// connect returns a client for each of runs, or an error. It does not dial yet.
func (o *listOptions) connect(runs []runInfo) (clients []*listClient, errs []error) {
	creds, err := o.tls.clientCredentials()
	if err != nil {
		return nil, []error{err}
	}
	for _, run := range runs {
		err := error(nil)
		var conn *grpc.ClientConn
		if o.tls != (tlsFlags{}) && !run.TLS {
			err = errors.New("it has no TLS, which the -tls flags ask for")
		} else {
			conn, err = run.connect(creds, o.wait, o.tls != (tlsFlags{}))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("endpoint %q: %v", run.Endpoint, err))
			continue
		}
		clients = append(clients, &listClient{
			endpoint: run.Endpoint, run: run, conn: conn, records: make(map[int64]*listedComponent), weights: make(map[int64]int),
			pipeline: listedPipeline{Pipeline: run.Pipeline, Endpoint: run.Endpoint},
		})
	}
	return clients, errs
}

// awaitReady returns when the pipeline of run is ready. It fails where that has ended or does not answer.
func awaitReady(run runInfo, tls tlsFlags) error {
	o := listOptions{wait: true, tls: tls}
	clients, errs := o.connect([]runInfo{run})
	if len(errs) > 0 {
		return errs[0]
	}
	defer clients[0].conn.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := operatorv1.NewOperatorClient(clients[0].conn).Watch(ctx, &operatorv1.WatchRequest{Follow: true})
	for told := false; err == nil; {
		var out *operatorv1.WatchResponse
		if out, err = stream.Recv(); err != nil {
			break
		}
		switch p := out.GetPipeline(); {
		case p.GetReady():
			return nil
		case p != nil && !told:
			told = true
			complain(fmt.Errorf("waiting for the services of %s, pid %d: %s", run.Pipeline, run.PID, p.GetStatus()))
		}
	}
	return fmt.Errorf("the sandbox %s, pid %d, is not ready: %s", run.Pipeline, run.PID, status.Convert(err).Message())
}

// connect returns a connection to the control plane of run: by its operators' socket where
// this user may use that, else to its endpoint, as with byTLS for a run of another user. With wait its calls go on
// trying to connect until their context ends.
func (run *runInfo) connect(creds credentials.TransportCredentials, wait, byTLS bool) (*grpc.ClientConn, error) {
	socket, ok := run.socket()
	ok = ok && run.ofAnother() // who could have put a link there
	operators := (!byTLS || !run.ofAnother()) && run.hasOperators()
	if operators {
		socket, ok = socketOf(run.path), true
	} else if run.ofAnother() {
		if err := run.judgeEndpoint(); err != nil {
			return nil, err
		}
	}
	if operators || !run.TLS {
		creds = insecure.NewCredentials()
	}
	if !ok {
		return newConn(run.Endpoint, creds, wait)
	}
	dial := func(ctx context.Context, _ string) (net.Conn, error) { return dialSocket(ctx, socket) }
	return newConn("passthrough:///localhost", creds, wait, grpc.WithContextDialer(dial))
}

// newConn returns a connection to the control plane at endpoint, as connect does.
func newConn(endpoint string, creds credentials.TransportCredentials, wait bool, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient(endpoint, append(more,
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(), // which is a TXT record: where DNS does not answer, its look-up takes longer than an answer may
		// A stream may have nothing to send for hours: this notices a machine that is gone.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(wait)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))...)
}

// listOnce asks all clients at once and prints their answers. unasked are errors without a client.
func listOnce(clients []*listClient, unasked []error, o listOptions) error {
	errs := make([]error, len(clients))
	var asked sync.WaitGroup
	for i, c := range clients {
		asked.Go(func() {
			err := c.follow(context.Background(), &operatorv1.WatchRequest{}, func(out *operatorv1.WatchResponse) { c.take(out) })
			if err != nil {
				errs[i] = o.noAnswer(c.endpoint, err) // which may take its time, too
			}
		})
	}
	asked.Wait()
	var pipelines []listedPipeline
	failed := unasked
	for i, c := range clients {
		if errs[i] != nil {
			failed = append(failed, errs[i])
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
	unhealthy := func(p listedPipeline) bool { // beside a pipeline, only what was asked for counts of what is not of it
		return slices.ContainsFunc(p.Components, func(l *listedComponent) bool {
			return !l.Healthy && (l.InPipeline || p.Pipeline == "" || o.id != "")
		})
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

// noAnswer is the error for a call that failed: nobody answers at endpoint, or refuses.
func (o *listOptions) noAnswer(endpoint string, err error) error {
	if errors.Is(err, errTooMuch) {
		return fmt.Errorf("the control plane at %s %v", endpoint, err)
	}
	answer := status.Convert(err)
	switch answer.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled: // a client's grpc makes these itself
		return fmt.Errorf("no control plane answers at %s: %s%s", endpoint, dialReason(answer.Message()), o.tls.hint(endpoint))
	case codes.Unimplemented:
		return fmt.Errorf("the control plane at %s has no operator service, which list needs", endpoint)
	}
	return fmt.Errorf("the control plane at %s refuses: %s", endpoint, printable(answer.Message()))
}

// ended is the error for a stream of changes that has ended. With came it had sent something.
func (o *listOptions) ended(endpoint string, came bool, err error) error {
	switch {
	case status.Code(err) == codes.Unimplemented:
		return fmt.Errorf("the control plane at %s has no operator service, which -watch needs", endpoint)
	case err == nil:
		return fmt.Errorf("the control plane at %s has stopped", endpoint)
	case came && status.Code(err) == codes.Unavailable:
		return fmt.Errorf("the control plane at %s is gone: %s", endpoint, dialReason(status.Convert(err).Message()))
	}
	return o.noAnswer(endpoint, err)
}

// latestAttempt comes before why no attempt to connect has succeeded: grpc says it only in this text.
const latestAttempt = "latest balancer error: "

// dialReason leaves of grpc's message only the error of the kernel or of TLS: there is only the text.
func dialReason(text string) string {
	if _, latest, ok := strings.Cut(text, latestAttempt); ok {
		text = latest
	}
	if quoted, ok := strings.CutPrefix(text, "connection error: desc = "); ok {
		if desc, err := strconv.Unquote(quoted); err == nil {
			text = desc
		}
	}
	text = strings.TrimPrefix(text, "transport: ")
	return printable(strings.TrimPrefix(text, "Error while dialing: "))
}

var (
	errSilent  = fmt.Errorf("nothing came within %s", answerTime)
	errEndless = fmt.Errorf("its list has not ended within %s", wholeTime)
	errTooMuch = fmt.Errorf("lists more than a registry holds: %d services, %d MiB", maxServices, maxHeld>>20)
)

// listClient asks one control plane, and keeps what it has answered.
type listClient struct {
	endpoint string
	run      runInfo // its path is "" where it has no run file here
	conn     *grpc.ClientConn
	pipeline listedPipeline             // without its components
	records  map[int64]*listedComponent // by the number that the control plane gives a component
	order    []int64                    // of records, as they came
	missing  map[int64]bool             // of records, while a snapshot comes: not in it so far
	complete bool                       // a snapshot has come whole
	weights  map[int64]int              // bytes that each of records takes, about
	weight   int                        // of all
	full     atomic.Bool                // more than maxHeld, or than a registry can have
}

// follow passes each message of a stream of changes to take until the stream ends: that
// is after the first snapshot, unless in.Follow is set. The first message has to come
// within answerTime, and without in.Follow each of them.
func (c *listClient) follow(ctx context.Context, in *operatorv1.WatchRequest, take func(*operatorv1.WatchResponse)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(answerTime, func() { cancel(errSilent) })
	defer silence.Stop()
	if !in.GetFollow() {
		defer time.AfterFunc(wholeTime, func() { cancel(errEndless) }).Stop()
	}
	err := c.receive(ctx, in, func(out *operatorv1.WatchResponse) {
		if silence.Stop(); !in.GetFollow() {
			silence.Reset(answerTime)
		}
		take(out)
	})
	cut := context.Cause(ctx)
	if err == nil || cut != errSilent && cut != errEndless {
		return err
	}
	why := cut.Error()
	if text := status.Convert(err).Message(); strings.Contains(text, latestAttempt) {
		why += ": " + dialReason(text)
	}
	return status.Error(codes.DeadlineExceeded, why)
}

// receive is follow without a limit of time. Where no stream is left it asks for a single message.
func (c *listClient) receive(ctx context.Context, in *operatorv1.WatchRequest, take func(*operatorv1.WatchResponse)) error {
	operator := operatorv1.NewOperatorClient(c.conn)
	stream, err := operator.Watch(ctx, in, grpc.MaxCallRecvMsgSize(maxMore))
	for err == nil {
		var out *operatorv1.WatchResponse
		if out, err = stream.Recv(); err == nil {
			if take(out); c.full.Load() {
				err = errTooMuch
			}
		}
	}
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case status.Code(err) == codes.ResourceExhausted && !in.GetFollow():
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
		if c.records[in.GetRecord()] == nil {
			c.order = append(c.order, in.GetRecord())
		}
		c.records[in.GetRecord()] = component
		c.weigh(in.GetRecord(), componentWeight(in))
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
			c.weigh(record, 0)
			delete(c.weights, record)
		}
	}
	if len(gone) > 0 {
		c.order = slices.DeleteFunc(c.order, func(r int64) bool { return c.records[r] == nil })
	}
	return events
}

// weigh notes how many bytes a record takes now.
func (c *listClient) weigh(record int64, bytes int) {
	c.weight += bytes - c.weights[record]
	c.weights[record] = bytes
	if c.weight > maxHeld || len(c.records) > maxServices+maxComponents {
		c.full.Store(true)
	}
}

// componentWeight is about what a component takes here: its texts, itself, and each entry in it.
func componentWeight(c *operatorv1.Component) int {
	entries := len(c.GetHistory()) + len(c.GetMetadata()) + len(c.GetLabels()) + len(c.GetMetrics()) + len(c.GetTextMetrics()) +
		len(c.GetInputEventTypes()) + len(c.GetOutputEventTypes())
	return proto.Size(c) + 512 + 100*entries
}

// listed returns the pipeline with its components, those of the file first, or with those of an id
// alone. ok is false where there is none of that id.
func (c *listClient) listed(id string) (p listedPipeline, ok bool) {
	p = c.pipeline
	p.Components = make([]*listedComponent, 0, len(c.records))
	for _, inPipeline := range []bool{true, false} {
		for _, record := range c.order {
			if l := c.records[record]; l.InPipeline == inPipeline && (id == "" || l.is(id)) {
				p.Components = append(p.Components, l)
			}
		}
	}
	return p, id == "" || len(p.Components) > 0
}

// listPipeline converts a pipeline, without its components.
func listPipeline(p *operatorv1.Pipeline) listedPipeline {
	return listedPipeline{
		Pipeline: p.GetName(), Endpoint: p.GetEndpoint(), PID: p.GetPid(), Version: p.GetVersion(), Started: listTime(p.GetStarted()),
		Status: p.GetStatus(), Ready: p.GetReady(), StateFile: p.GetStateFile(), NotDurable: p.GetNotDurable(), Edges: listEdges(p.GetEdges()),
	}
}

func listEdges(edges []*operatorv1.Edge) (out []listedEdge) {
	for _, e := range edges {
		out = append(out, listedEdge{e.GetFrom(), e.GetTo(), e.GetState(), e.GetEvents(), e.GetBytes(), e.GetEventsPerSecond(), e.GetWaitingSeconds()})
	}
	return out
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

// arrival is a message of one control plane, or the end of its stream.
type arrival struct {
	client *listClient
	out    *operatorv1.WatchResponse // nil at the end
	err    error                     // why it ended
}

// listChanges shows the changes of all clients until a signal, or the end of all streams, an *exitError.
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
	redraw := time.Tick(redrawTime)
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
		case now := <-redraw:
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

// untilSignal returns a context that ends by the first signal that asks for an end. The second ends
// flowctl at once, which a reader that does not read may hold up.
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

// watchView is what list -watch shows: tables on a terminal, redrawn in place, elsewhere each change.
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

// showEnd shows that the stream of c has ended. Of the last one the error of list tells.
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
