package main

// The gRPC server of the control plane with both dialects, and its listeners.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// durableService is the name under which grpc.health.v1 tells whether the state file is up to
// date. That it is not does not make the control plane less fit to serve.
const durableService = "flowctl.durable"

// readyService is the name under which grpc.health.v1 tells whether all components of the pipeline are ready.
const readyService = "flowctl.ready"

// planeConfig is what a control plane is made of.
type planeConfig struct {
	listeners         []planeListener // for all; the first is where components are sent
	advertise         string          // what it says of where it is, "" for where it listens
	held              bool            // systemd holds them while flowctl is restarted
	componentListener net.Listener    // without TLS, for components that do not speak it; nil for none
	ttl               time.Duration
	interval          time.Duration // the janitor's, and that of writes of the state file
	forget            time.Duration // what is not of the pipeline and has been stale for so long is forgotten; 0 for never
	members           []member      // the components of the pipeline, nil for a control plane alone
	pipeline          pipelineInfo
	relay             *relay        // nil for a control plane without a pipeline
	store             *store        // open; nil to keep the registry in memory alone
	certs             *certificates // nil without TLS
	identifier        *identifier   // nil: nobody is looked up
	operatorListener  net.Listener  // of operators on this machine; nil for none
	runFile           *runFile      // which has that listener's socket beside it; nil for none
	operators         []string      // the names of others, in their client certificates
	requireIdentity   bool          // a component is only who has a certificate that names it
	requests          runRequests   // nil for a control plane alone
	lines             *lineLog      // the same
	records           string        // the folder with the record of runs, "" for none
	log               *slog.Logger
}

// plane serves a registry over gRPC. It owns the goroutines that do, the janitor, those that look
// at the certificate and the run file, and the one that writes the state file.
type plane struct {
	registry *registry
	server   *grpc.Server
	health   *health.Server
	certs    *certificates      // nil without TLS
	ended    chan struct{}      // closed when stop begins
	cancel   context.CancelFunc // ends the janitor and the writing of the state file
	ready    bool               // all are, as it was told last; its caller's
	done     sync.WaitGroup
}

// newPlane makes the registry, restores it from the state file, and starts to answer on the
// listeners; stop ends what it began. It fails for a state file that cannot be read, and then
// leaves listeners and store to the caller.
func newPlane(c planeConfig) (*plane, error) {
	r := newRegistry(c.ttl, c.interval, cmp.Or(c.advertise, c.listeners[0].endpoint), c.members)
	r.forget, r.keepsOthers = c.forget, r.keepsOthers || c.held
	if c.store != nil {
		if err := c.store.restore(r, c.log); err != nil {
			return nil, err
		}
	}
	r.publishPipeline(c.pipeline)
	return servePlane(r, c), nil
}

// servePlane starts to answer for r.
func servePlane(r *registry, c planeConfig) *plane {
	most := maxConnections
	if c.requests != nil {
		most = maxGuestConnections
	}
	traffic := newTraffic(c.log, most)
	p := &plane{registry: r, health: health.NewServer(), certs: c.certs, ended: make(chan struct{})}
	p.server = grpc.NewServer(planeOptions(peerCredentials{
		TransportCredentials: c.certs.credentials(), identifier: c.identifier, operators: c.operators, pipeline: c.pipeline.name, requireIdentity: c.requireIdentity, log: c.log,
	}, traffic)...)
	services := registrar{p.server, traffic}
	flowctlpb.RegisterControlPlaneServer(services, legacyServer{registry: r, log: c.log, pipelineRuns: &pipelineRuns{
		registry: r, requests: c.requests, metrics: c.relay.runMetrics, records: runsReader{folder: c.records}, disk: newDiskTurn(diskTime),
	}})
	flowctlv1.RegisterControlPlaneServiceServer(services, v1Server{registry: r, log: c.log})
	operatorv1.RegisterOperatorServer(services, newOperatorServer(r, p.ended, c.requests, c.lines, c.relay))
	healthpb.RegisterHealthServer(services, healthServer{p.health})
	for name := range p.server.GetServiceInfo() {
		p.health.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	}
	p.tellHealth(readyService, false)
	p.tellReady(c.pipeline.ready)
	reflection.Register(services)

	var ctx context.Context
	ctx, p.cancel = context.WithCancel(context.Background())
	p.done.Go(func() { r.runJanitor(ctx) })
	p.done.Go(func() { c.certs.watchExpiry(ctx, c.interval) })
	if c.store != nil {
		p.tellDurable(true)
		persister := &persister{registry: r, store: c.store, told: p.tellDurable}
		p.done.Go(func() { persister.run(ctx) })
	}
	for _, lis := range c.listeners {
		p.serve(traffic.limit(lis.Listener), c.log)
	}
	if c.componentListener != nil {
		p.serve(taggedListener{traffic.limit(c.componentListener), forComponents}, c.log)
	}
	serveOperators := func(lis net.Listener) { p.serve(taggedListener{traffic.limit(lis), forOperators}, c.log) }
	if c.operatorListener != nil {
		serveOperators(c.operatorListener)
	}
	p.done.Go(func() { c.runFile.keep(ctx, c.operatorListener, serveOperators, c.log) })
	return p
}

// planeOptions are the options of a control plane's gRPC server.
func planeOptions(creds credentials.TransportCredentials, t *traffic) []grpc.ServerOption {
	return append(t.options(),
		grpc.Creds(creds),
		// Ten thousand idle connections must not cost a gigabyte.
		grpc.ReadBufferSize(4<<10),
		grpc.WriteBufferSize(4<<10),
		// Windows of a fixed size: to let them grow, grpc sends a ping for each message,
		// which costs more than a heartbeat, and a caller could have them grow to 16 MiB.
		grpc.StaticStreamWindowSize(64<<10),
		grpc.StaticConnWindowSize(1<<20),
		grpc.ConnectionTimeout(10*time.Second),
		// A client that pings more often than this is cut off, so it is low: a
		// storm of pings costs less than a component that loses its connection.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	)
}

// serve answers on lis until stop.
func (p *plane) serve(lis net.Listener, log *slog.Logger) {
	p.done.Go(func() {
		err := p.server.Serve(lis)
		if err != nil && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) { // which keep has closed
			log.Error("control plane ended", "err", err)
		}
	})
}

// tellDurable has grpc.health.v1 tell whether the state file is up to date.
func (p *plane) tellDurable(durable bool) { p.tellHealth(durableService, durable) }

// tellReady has grpc.health.v1 tell whether all components of the pipeline are ready. It has one caller at a time.
func (p *plane) tellReady(ready bool) {
	if ready != p.ready {
		p.ready = ready
		p.tellHealth(readyService, ready)
	}
}

func (p *plane) tellHealth(service string, serves bool) {
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if serves {
		status = healthpb.HealthCheckResponse_SERVING
	}
	p.health.SetServingStatus(service, status)
}

// stop answers what is being asked and then ends, within a second: a health watch or an idle
// client would keep it forever. A disk that hangs has the time of one write for the last of
// the state.
func (p *plane) stop() {
	close(p.ended)
	p.health.Shutdown()
	hurry := time.AfterFunc(time.Second, p.server.Stop)
	p.server.GracefulStop()
	hurry.Stop()
	p.cancel()
	over := make(chan struct{})
	go func() {
		p.done.Wait()
		close(over)
	}()
	select {
	case <-over:
	case <-time.After(maxWrite + time.Second): // when it has been said that it hangs
	}
}

// healthServer is grpc.health.v1 for names of a bounded length, as a name that is watched is kept.
type healthServer struct{ *health.Server }

func (h healthServer) Watch(in *healthpb.HealthCheckRequest, stream healthpb.Health_WatchServer) error {
	if err := checkLength("the name of a service", in.GetService(), maxID); err != nil {
		return err
	}
	return h.Server.Watch(in, stream)
}

// legacyServer speaks flowctl.ControlPlane.
type legacyServer struct {
	*pipelineRuns
	registry *registry
	log      *slog.Logger
}

func (l legacyServer) Register(ctx context.Context, in *flowctlpb.ServiceInfo) (*flowctlpb.RegistrationAck, error) {
	from, err := originOf(ctx, cmp.Or(in.GetComponentId(), in.GetServiceId()))
	if err != nil {
		return nil, err
	}
	ack, change, err := l.registry.register(registration{
		id: in.GetServiceId(), componentID: in.GetComponentId(), kind: in.GetServiceType(),
		inputEvents: in.GetInputEventTypes(), outputEvents: in.GetOutputEventTypes(),
		endpoint: in.GetHealthEndpoint(), maxInflight: in.GetMaxInflight(), metadata: in.GetMetadata(),
	}, from, time.Now())
	if err != nil {
		return nil, err
	}
	ack.warn(l.log, from)
	out := &flowctlpb.RegistrationAck{ServiceId: ack.id, TopicNames: ack.topics, ConnectionInfo: ack.connectionInfo}
	return out, l.registry.durable(ctx, change)
}

func (l legacyServer) Heartbeat(ctx context.Context, in *flowctlpb.ServiceHeartbeat) (*emptypb.Empty, error) {
	metrics, err := metricsOf(in.GetMetrics(), func(name string, number float64) metric { return metric{name: name, number: number} })
	return heartbeat(ctx, l.registry, in.GetServiceId(), flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, metrics, err)
}

// warn tells of an endpoint that others do not reach.
func (ack *acknowledgement) warn(log *slog.Logger, from origin) {
	if ack.unreachable != "" {
		log.Warn("an endpoint is on the loopback of another machine: nobody is told of it, and its events are not moved", "id", ack.id, "endpoint", ack.unreachable, "from", from.address,
			"try", "have it register :PORT, which gets the address that it calls from, or an address that others reach")
	}
}

// metricsOf returns the metrics of a heartbeat, none of so many that it would take long to
// look at them.
func metricsOf[V any](in map[string]V, as func(name string, value V) metric) ([]metric, error) {
	if len(in) > maxHeartbeat {
		return nil, status.Errorf(codes.ResourceExhausted, "a heartbeat with %d metrics: at most %d are allowed, and a service has at most %d", len(in), maxHeartbeat, maxEntries)
	}
	metrics := make([]metric, 0, len(in))
	for name, value := range in {
		metrics = append(metrics, as(name, value))
	}
	return metrics, nil
}

// heartbeat is that of both dialects. It counts, and then fails, where failed says why metrics
// were not taken.
func heartbeat(ctx context.Context, r *registry, id string, declared flowctlv1.HealthStatus, metrics []metric, failed error) (*emptypb.Empty, error) {
	from, err := originOf(ctx, id)
	if err != nil {
		return nil, err
	}
	change, err := r.heartbeat(id, from, declared, metrics, time.Now())
	if err = cmp.Or(err, failed); err == nil && change > 0 {
		err = r.durable(ctx, change)
	}
	return &emptypb.Empty{}, err
}

func (l legacyServer) GetServiceStatus(_ context.Context, in *flowctlpb.ServiceInfo) (*flowctlpb.ServiceStatus, error) {
	var out *flowctlpb.ServiceStatus
	err := l.registry.view(in.GetServiceId(), time.Now(), func(s *service, now time.Time) { out = l.statusLocked(s, now) })
	return out, err
}

func (l legacyServer) ListServices(ctx context.Context, _ *emptypb.Empty) (*flowctlpb.ServiceList, error) {
	out := &flowctlpb.ServiceList{}
	err := l.registry.list(ctx, func(s *service, now time.Time) bool {
		if s.registered {
			out.Services = append(out.Services, l.statusLocked(s, now))
		}
		return s.registered
	})
	return out, err
}

func (l legacyServer) statusLocked(s *service, now time.Time) *flowctlpb.ServiceStatus {
	out := &flowctlpb.ServiceStatus{
		ServiceId: s.said.id, ComponentId: cmp.Or(s.said.componentID, s.component()), ServiceType: s.said.kind,
		IsHealthy: l.registry.healthLocked(s, now).condition.ok(), LastHeartbeat: timestamppb.New(s.lastSeen),
	}
	for i := range s.metrics {
		if f, ok := s.metrics[i].float(); ok {
			if out.Metrics == nil {
				out.Metrics = make(map[string]float64)
			}
			out.Metrics[s.metrics[i].name] = f
		}
	}
	return out
}

// v1Server speaks flowctl.v1.ControlPlaneService.
type v1Server struct {
	flowctlv1.UnimplementedControlPlaneServiceServer
	registry *registry
	log      *slog.Logger
}

func (v v1Server) RegisterComponent(ctx context.Context, in *flowctlv1.RegisterRequest) (*flowctlv1.RegisterResponse, error) {
	c := in.GetComponent()
	if c == nil {
		return nil, status.Error(codes.InvalidArgument, "component is missing")
	}
	from, err := originOf(ctx, cmp.Or(in.GetComponentId(), c.GetId()))
	if err != nil {
		return nil, err
	}
	ack, change, err := v.registry.register(registration{
		id: c.GetId(), componentID: in.GetComponentId(), kind: legacyType(c.GetType()),
		name: c.GetName(), description: c.GetDescription(), version: c.GetVersion(),
		inputEvents: c.GetInputEventTypes(), outputEvents: c.GetOutputEventTypes(),
		endpoint: c.GetEndpoint(), v1: true, metadata: c.GetMetadata(),
	}, from, time.Now())
	if err != nil {
		return nil, err
	}
	ack.warn(v.log, from)
	out := &flowctlv1.RegisterResponse{ServiceId: ack.id, AssignedTopics: ack.topics, ConnectionInfo: ack.connectionInfo}
	return out, v.registry.durable(ctx, change)
}

func (v v1Server) UnregisterComponent(ctx context.Context, in *flowctlv1.UnregisterRequest) (*emptypb.Empty, error) {
	from, err := originOf(ctx, in.GetServiceId())
	if err != nil {
		return nil, err
	}
	change, err := v.registry.unregister(in.GetServiceId(), from, time.Now())
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, v.registry.durable(ctx, change)
}

// DiscoverComponents returns what matches, in whatever health: who wants to know more asks
// ListComponents. Errors: RESOURCE_EXHAUSTED past a bound.
func (v v1Server) DiscoverComponents(ctx context.Context, in *flowctlv1.DiscoveryRequest) (*flowctlv1.DiscoveryResponse, error) {
	if n := max(len(in.GetEventTypes()), len(in.GetMetadataFilters())); n > maxEntries {
		return nil, status.Errorf(codes.ResourceExhausted, "a list or map of %d entries: at most %d are allowed", n, maxEntries)
	}
	events := make(map[string]bool)
	for _, event := range in.GetEventTypes() {
		events[event] = true
	}
	out := &flowctlv1.DiscoveryResponse{}
	err := v.registry.list(ctx, func(s *service, _ time.Time) bool {
		if !s.registered || !s.isOf(in.GetType()) || !s.matches(events, in.GetMetadataFilters()) {
			return false
		}
		out.Components = append(out.Components, s.info())
		return true
	})
	return out, err
}

// isOf reports whether s is of a type; all are of UNSPECIFIED.
func (s *service) isOf(t flowctlv1.ComponentType) bool {
	return t == flowctlv1.ComponentType_COMPONENT_TYPE_UNSPECIFIED || t == s.v1Type()
}

// matches reports whether s has all of the metadata, and one of the events, if there are any.
func (s *service) matches(events map[string]bool, metadata map[string]string) bool {
	for key, value := range metadata {
		if has, ok := s.said.metadata[key]; !ok || has != value {
			return false
		}
	}
	listed := func(event string) bool { return events[event] }
	return len(events) == 0 || slices.ContainsFunc(s.said.inputEvents, listed) || slices.ContainsFunc(s.said.outputEvents, listed)
}

func (v v1Server) Heartbeat(ctx context.Context, in *flowctlv1.HeartbeatRequest) (*emptypb.Empty, error) {
	metrics, err := metricsOf(in.GetMetrics(), func(name, text string) metric { return metric{name: name, text: text, isText: true} })
	return heartbeat(ctx, v.registry, in.GetServiceId(), in.GetStatus(), metrics, err)
}

func (v v1Server) GetComponentStatus(_ context.Context, in *flowctlv1.ComponentStatusRequest) (*flowctlv1.ComponentStatusResponse, error) {
	var out *flowctlv1.ComponentStatusResponse
	err := v.registry.view(in.GetServiceId(), time.Now(), func(s *service, now time.Time) { out = v.statusLocked(s, now) })
	return out, err
}

func (v v1Server) ListComponents(ctx context.Context, in *flowctlv1.ListComponentsRequest) (*flowctlv1.ListComponentsResponse, error) {
	out := &flowctlv1.ListComponentsResponse{}
	err := v.registry.list(ctx, func(s *service, now time.Time) bool {
		if !s.registered || !s.isOf(in.GetTypeFilter()) || !in.GetIncludeUnhealthy() && !v.registry.healthLocked(s, now).condition.ok() {
			return false
		}
		out.Components = append(out.Components, v.statusLocked(s, now))
		return true
	})
	return out, err
}

// legacyType is a type of the v1 dialect in the other one, which has one more.
func legacyType(t flowctlv1.ComponentType) flowctlpb.ServiceType {
	if flowctlv1.ComponentType_name[int32(t)] == "" {
		return flowctlpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
	}
	return flowctlpb.ServiceType(t)
}

// v1Type is the type in the v1 dialect, which has no PIPELINE.
func (s *service) v1Type() flowctlv1.ComponentType {
	if s.said.kind == flowctlpb.ServiceType_SERVICE_TYPE_PIPELINE {
		return flowctlv1.ComponentType_COMPONENT_TYPE_UNSPECIFIED
	}
	return flowctlv1.ComponentType(s.said.kind)
}

// info is what s said of itself. It shares lists and maps with s, which are never changed.
func (s *service) info() *flowctlv1.ComponentInfo {
	said := &s.said
	return &flowctlv1.ComponentInfo{
		Id: said.id, Name: said.name, Description: said.description, Version: said.version, Type: s.v1Type(),
		InputEventTypes: said.inputEvents, OutputEventTypes: said.outputEvents,
		Endpoint: s.reach(), Metadata: said.metadata,
	}
}

func (v v1Server) statusLocked(s *service, now time.Time) *flowctlv1.ComponentStatusResponse {
	out := &flowctlv1.ComponentStatusResponse{
		Component: s.info(), Status: s.v1Status(v.registry.healthLocked(s, now).condition),
		LastHeartbeat: timestamppb.New(s.lastSeen), RegisteredAt: timestamppb.New(s.registeredAt),
	}
	if len(s.metrics) > 0 {
		out.Metrics = make(map[string]string)
	}
	for i := range s.metrics {
		out.Metrics[s.metrics[i].name] = s.metrics[i].String()
	}
	return out
}

// v1Status is the condition c in the words of the v1 dialect. What the service itself declared
// is kept where that does not contradict.
func (s *service) v1Status(c condition) flowctlv1.HealthStatus {
	switch c {
	case degraded:
		return flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED
	case unhealthy:
		if s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_STOPPING {
			return s.declared
		}
		return flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY
	}
	if s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_STARTING {
		return s.declared
	}
	return flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY
}

// listenPlane opens the control plane's socket and returns with it the address that
// components are to be given, which wire.md wants without a scheme unless it is a
// unix socket's. The address is a host, or unix:PATH.
func listenPlane(address string, port int) (net.Listener, string, error) {
	if path, ok, err := socketPath(address); err != nil {
		return nil, "", err
	} else if ok {
		return listenUnix(path)
	}
	address = strings.Trim(address, "[]")
	network := "tcp"
	if net.ParseIP(address).To4() != nil {
		network = "tcp4" // else 0.0.0.0 is all of IPv6 too
	}
	lis, err := net.Listen(network, net.JoinHostPort(address, strconv.Itoa(port)))
	if err != nil {
		return nil, "", err
	}
	return lis, tcpEndpoint(lis.Addr().(*net.TCPAddr), address), nil
}

// tcpEndpoint is where processes of this machine reach a listener at addr, which was
// named host.
func tcpEndpoint(addr *net.TCPAddr, host string) string {
	switch {
	case addr.IP.IsUnspecified() && net.ParseIP(host).To4() == nil:
		host = "localhost"
	case addr.IP.IsUnspecified():
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, strconv.Itoa(addr.Port))
}

// listenUnix listens on a socket file of mode 0600. A file that a dead process left is
// replaced, a socket that answers is not. The folder is locked meanwhile: of two that start at
// the same time, one could take the new socket of the other for one that a dead process left.
func listenUnix(path string) (net.Listener, string, error) {
	defer lockFolder(filepath.Dir(path))()
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, "", fmt.Errorf("%q exists and is no socket", path)
		}
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) { // also when its queue is full, or it is not ours to ask
			return nil, "", fmt.Errorf("%q is another's socket, choose another path with -control-plane-address", path)
		}
		os.Remove(path)
	}
	// Nothing else runs yet that could create a file under this mask.
	defer syscall.Umask(syscall.Umask(0o177))
	lis, err := net.Listen("unix", path)
	if err != nil {
		return nil, "", err
	}
	return lis, "unix://" + path, nil
}

// lockTimeout is how long a folder that somebody else has locked is waited for.
const lockTimeout = time.Second

// lockFolder locks a folder against others that do, until unlock is called. One that cannot be
// locked in lockTimeout is left alone: anyone who may read a folder can lock it for as long as they like.
func lockFolder(path string) (unlock func()) {
	dir, err := os.Open(path)
	if err != nil {
		return func() {}
	}
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(time.Millisecond) {
		err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			return func() { dir.Close() }
		}
	}
}

// listenConfig says where the control plane listens.
type listenConfig struct {
	address string // a host, or unix:PATH
	port    int    // 0 takes a free one
	anyPort bool   // a free one serves where port is taken
}

// planeListener is a socket of the control plane, and where processes of this machine reach it.
type planeListener struct {
	net.Listener
	endpoint string
}

// openPlane opens the sockets of the control plane: those that systemd has passed, which is held, else one
// where o says. The first is the one that components can reach most easily.
func openPlane(o listenConfig, tls tlsFlags, log *slog.Logger) (listeners []planeListener, held bool, err error) {
	passed, err := passedListeners()
	for _, lis := range passed {
		endpoint, fault := passedEndpoint(lis.Addr())
		listeners = append(listeners, planeListener{lis, endpoint})
		err = cmp.Or(err, fault)
	}
	if held = len(passed) > 0; err == nil && !held {
		var lis planeListener
		if lis.Listener, lis.endpoint, err = o.listen(log); err == nil {
			listeners = append(listeners, lis)
		}
	}
	if err != nil {
		closeAll(listeners)
		return nil, false, err
	}
	slices.SortStableFunc(listeners, func(a, b planeListener) int { return a.reach() - b.reach() })
	if last := listeners[len(listeners)-1]; last.Addr().Network() == "unix" && tls.cert != "" { // those come last
		closeAll(listeners)
		return nil, false, fmt.Errorf("-tls-cert %q: a control plane on a socket file (%s) has no TLS", tls.cert, last.endpoint)
	}
	for _, lis := range listeners {
		if tcp, ok := lis.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() && tls.cert == "" {
			log.Warn("the control plane listens off the loopback without TLS: who reaches it can register, and speak for what other machines have registered", "endpoint", lis.endpoint)
		}
		log.Info("listening", "endpoint", lis.endpoint)
	}
	return listeners, held, nil
}

// reach is less for a listener that more components of this machine can dial.
func (l planeListener) reach() int {
	switch {
	case strings.HasPrefix(l.endpoint, "127.0.0.1:"):
		return 0
	case l.Addr().Network() == "tcp":
		return 1
	}
	return 2 // the mode of its file may keep some out
}

func closeAll(listeners []planeListener) {
	for _, lis := range listeners {
		lis.Close()
	}
}

// listen listens where o says.
func (o listenConfig) listen(log *slog.Logger) (net.Listener, string, error) {
	lis, endpoint, err := listenPlane(o.address, o.port)
	tcp := !strings.HasPrefix(o.address, "unix:")
	if errors.Is(err, syscall.EADDRINUSE) && o.anyPort && tcp {
		attrs := []any{"port", o.port}
		if pid, name, ok := portHolder(o.address, o.port); ok {
			attrs = append(attrs, "pid", pid, "name", name)
		}
		log.Warn("the default port is taken, a free one serves", attrs...)
		lis, endpoint, err = listenPlane(o.address, 0)
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && tcp:
		by := ""
		if pid, name, ok := portHolder(o.address, o.port); ok {
			by = fmt.Sprintf(" by process %d (%s)", pid, clean(name))
		}
		return nil, "", fmt.Errorf("the control plane cannot listen on %s: the address is in use%s; choose another with -control-plane-port (0 takes a free one)", net.JoinHostPort(o.address, strconv.Itoa(o.port)), by)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, "", fmt.Errorf("-control-plane-address %q: it is no address of this machine; 0.0.0.0 is all of IPv4 that it has", o.address)
	case errors.Is(err, syscall.EACCES) && tcp:
		return nil, "", fmt.Errorf("-control-plane-port %d: a port below 1024 is for root, and for a unit with AmbientCapabilities=CAP_NET_BIND_SERVICE", o.port)
	case err != nil:
		return nil, "", fmt.Errorf("the control plane cannot listen at -control-plane-address %q: %w", o.address, err)
	}
	return lis, endpoint, nil
}

// passedEndpoint is where processes of this machine reach a listener at addr that systemd
// has opened. It fails for a path at which clients do not find it.
func passedEndpoint(addr net.Addr) (string, error) {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcpEndpoint(tcp, tcp.IP.String()), nil
	}
	if name, ok := strings.CutPrefix(addr.String(), "@"); ok {
		return "unix-abstract:" + name, nil
	}
	path, _, err := socketPath("unix:" + addr.String())
	if err != nil {
		err = fmt.Errorf("the socket %q that systemd has passed: %w", planeSocket, err)
	}
	return "unix://" + path, err
}

func logChange(log *slog.Logger, c change) {
	attrs := []any{"id", c.id}
	if c.component != "" {
		attrs = append(attrs, "component", c.component)
	}
	if c.cause != "" {
		attrs = append(attrs, "cause", c.cause)
	}
	level := slog.LevelInfo
	if c.now == unhealthy {
		level = slog.LevelWarn
	}
	log.Log(context.Background(), level, c.now.String(), attrs...)
}

// changeLog logs changes of services that are not of a pipeline, as many as may come: the
// first of them in changeTime each, and of the others how many there were.
type changeLog struct {
	log     *slog.Logger
	most    int       // lines in changeTime
	since   time.Time // when the first came
	lines   int
	omitted map[condition]int
}

const (
	changeTime  = 10 * time.Second
	guestLines  = 20   // of a run, in that time
	serverLines = 1000 // of a control plane alone
)

func (l *changeLog) add(c change, now time.Time) {
	l.flush(now)
	if l.lines == 0 {
		l.since, l.omitted = now, make(map[condition]int)
	}
	if l.lines++; l.lines <= l.most {
		logChange(l.log, c)
	} else {
		l.omitted[c.now]++
	}
}

// due is when to call flush, zero for never.
func (l *changeLog) due() time.Time {
	if len(l.omitted) == 0 {
		return time.Time{}
	}
	return l.since.Add(changeTime)
}

// flush logs how many there were, where changeTime has passed.
func (l *changeLog) flush(now time.Time) {
	if now.Before(l.since.Add(changeTime)) {
		return
	}
	if len(l.omitted) > 0 {
		l.log.Info("more services have changed", "healthy", l.omitted[healthy], "degraded", l.omitted[degraded], "unhealthy", l.omitted[unhealthy], "gone", l.omitted[unregistered])
	}
	l.lines, l.omitted = 0, nil
}
