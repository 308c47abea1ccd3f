package main

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
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// A request that is never whole holds what has come of it. maxBegun of a connection may
// take their time, any further call ends after maxCallTime.
const (
	maxBegun    = 16
	maxCallTime = 30 * time.Second
)

// legacyServer speaks flowctl.ControlPlane.
type legacyServer struct {
	flowctlpb.UnimplementedControlPlaneServer
	*registry
}

func (l legacyServer) Register(ctx context.Context, in *flowctlpb.ServiceInfo) (*flowctlpb.RegistrationAck, error) {
	out := &flowctlpb.RegistrationAck{}
	change, err := l.register(registration{
		id: in.GetServiceId(), componentID: in.GetComponentId(), kind: in.GetServiceType(),
		inputEvents: in.GetInputEventTypes(), outputEvents: in.GetOutputEventTypes(),
		endpoint: in.GetHealthEndpoint(), maxInflight: in.GetMaxInflight(), metadata: in.GetMetadata(),
	}, originOf(ctx, cmp.Or(in.GetComponentId(), in.GetServiceId())), time.Now(), func(id string, topics []string, info map[string]string) {
		out.ServiceId, out.TopicNames, out.ConnectionInfo = id, topics, info
	})
	if err != nil {
		return nil, err
	}
	return out, l.durable(ctx, change)
}

func (l legacyServer) Heartbeat(ctx context.Context, in *flowctlpb.ServiceHeartbeat) (*emptypb.Empty, error) {
	change, err := l.heartbeat(in.GetServiceId(), originOf(ctx, in.GetServiceId()), flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, time.Now(), func(s *service, full error) error {
		return takeMetrics(s, in.GetMetrics(), func(number float64) metric { return metric{number: number} }, full)
	})
	if change > 0 && err == nil {
		err = l.durable(ctx, change)
	}
	return &emptypb.Empty{}, err
}

func (l legacyServer) GetServiceStatus(_ context.Context, in *flowctlpb.ServiceInfo) (*flowctlpb.ServiceStatus, error) {
	var out *flowctlpb.ServiceStatus
	err := l.view(in.GetServiceId(), time.Now(), func(s *service, now time.Time) { out = l.statusLocked(s, now) })
	return out, err
}

func (l legacyServer) ListServices(ctx context.Context, _ *emptypb.Empty) (*flowctlpb.ServiceList, error) {
	out := &flowctlpb.ServiceList{}
	err := l.list(ctx, func(s *service, now time.Time) bool {
		if s.registered {
			out.Services = append(out.Services, l.statusLocked(s, now))
		}
		return s.registered
	})
	return out, err
}

func (l legacyServer) statusLocked(s *service, now time.Time) *flowctlpb.ServiceStatus {
	c, _ := l.conditionLocked(s, now)
	out := &flowctlpb.ServiceStatus{
		ServiceId: s.id(), ComponentId: s.component(), ServiceType: s.kind,
		IsHealthy: c.ok(), LastHeartbeat: timestamppb.New(s.lastSeen),
	}
	for name, m := range s.metrics.all() {
		if f, ok := m.float(); ok {
			if out.Metrics == nil {
				out.Metrics = make(map[string]float64)
			}
			out.Metrics[name] = f
		}
	}
	return out
}

// v1Server speaks flowctl.v1.ControlPlaneService.
type v1Server struct {
	flowctlv1.UnimplementedControlPlaneServiceServer
	*registry
}

func (v v1Server) RegisterComponent(ctx context.Context, in *flowctlv1.RegisterRequest) (*flowctlv1.RegisterResponse, error) {
	c := in.GetComponent()
	if c == nil {
		return nil, status.Error(codes.InvalidArgument, "component is missing")
	}
	out := &flowctlv1.RegisterResponse{}
	change, err := v.register(registration{
		id: c.GetId(), componentID: in.GetComponentId(), kind: legacyType(c.GetType()),
		name: c.GetName(), description: c.GetDescription(), version: c.GetVersion(),
		inputEvents: c.GetInputEventTypes(), outputEvents: c.GetOutputEventTypes(),
		endpoint: c.GetEndpoint(), metadata: c.GetMetadata(),
	}, originOf(ctx, cmp.Or(in.GetComponentId(), c.GetId())), time.Now(), func(id string, topics []string, info map[string]string) {
		out.ServiceId, out.AssignedTopics, out.ConnectionInfo = id, topics, info
	})
	if err != nil {
		return nil, err
	}
	return out, v.durable(ctx, change)
}

func (v v1Server) UnregisterComponent(ctx context.Context, in *flowctlv1.UnregisterRequest) (*emptypb.Empty, error) {
	change, err := v.unregister(in.GetServiceId(), originOf(ctx, in.GetServiceId()), time.Now())
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, v.durable(ctx, change)
}

// DiscoverComponents returns what matches, in whatever health: who wants to know
// more asks ListComponents.
func (v v1Server) DiscoverComponents(ctx context.Context, in *flowctlv1.DiscoveryRequest) (*flowctlv1.DiscoveryResponse, error) {
	out := &flowctlv1.DiscoveryResponse{}
	err := v.list(ctx, func(s *service, _ time.Time) bool {
		if !s.registered || !s.matches(in) {
			return false
		}
		out.Components = append(out.Components, s.info())
		return true
	})
	return out, err
}

func (s *service) matches(in *flowctlv1.DiscoveryRequest) bool {
	if in.GetType() != flowctlv1.ComponentType_COMPONENT_TYPE_UNSPECIFIED && in.GetType() != s.v1Type() {
		return false
	}
	w := s.details()
	for key, value := range in.GetMetadataFilters() {
		if !w.labels.has(key, value) {
			return false
		}
	}
	return len(in.GetEventTypes()) == 0 || slices.ContainsFunc(in.GetEventTypes(), func(event string) bool {
		return slices.Contains(w.inputEvents, event) || slices.Contains(w.outputEvents, event)
	})
}

func (v v1Server) Heartbeat(ctx context.Context, in *flowctlv1.HeartbeatRequest) (*emptypb.Empty, error) {
	change, err := v.heartbeat(in.GetServiceId(), originOf(ctx, in.GetServiceId()), in.GetStatus(), time.Now(), func(s *service, full error) error {
		return takeMetrics(s, in.GetMetrics(), func(text string) metric { return metric{text: text, isText: true} }, full)
	})
	if change > 0 && err == nil {
		err = v.durable(ctx, change)
	}
	return &emptypb.Empty{}, err
}

func (v v1Server) GetComponentStatus(_ context.Context, in *flowctlv1.ComponentStatusRequest) (*flowctlv1.ComponentStatusResponse, error) {
	var out *flowctlv1.ComponentStatusResponse
	err := v.view(in.GetServiceId(), time.Now(), func(s *service, now time.Time) { out = v.statusLocked(s, now) })
	return out, err
}

func (v v1Server) ListComponents(ctx context.Context, in *flowctlv1.ListComponentsRequest) (*flowctlv1.ListComponentsResponse, error) {
	out := &flowctlv1.ListComponentsResponse{}
	err := v.list(ctx, func(s *service, now time.Time) bool {
		if !s.registered || in.GetTypeFilter() != flowctlv1.ComponentType_COMPONENT_TYPE_UNSPECIFIED && in.GetTypeFilter() != s.v1Type() {
			return false
		}
		if c, _ := v.conditionLocked(s, now); !c.ok() && !in.GetIncludeUnhealthy() {
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
	if s.kind == flowctlpb.ServiceType_SERVICE_TYPE_PIPELINE {
		return flowctlv1.ComponentType_COMPONENT_TYPE_UNSPECIFIED
	}
	return flowctlv1.ComponentType(s.kind)
}

func (s *service) info() *flowctlv1.ComponentInfo {
	w := s.details()
	return &flowctlv1.ComponentInfo{
		Id: w.id, Name: w.name, Description: w.description, Version: w.version, Type: s.v1Type(),
		InputEventTypes: w.inputEvents, OutputEventTypes: w.outputEvents,
		Endpoint: w.endpoint, Metadata: w.labels.toMap(),
	}
}

func (v v1Server) statusLocked(s *service, now time.Time) *flowctlv1.ComponentStatusResponse {
	c, _ := v.conditionLocked(s, now)
	out := &flowctlv1.ComponentStatusResponse{
		Component: s.info(), Status: s.v1Status(c),
		LastHeartbeat: timestamppb.New(s.lastSeen), RegisteredAt: timestamppb.New(s.since),
	}
	if len(s.metrics) > 0 {
		out.Metrics = make(map[string]string)
	}
	for name, m := range s.metrics.all() {
		out.Metrics[name] = m.String()
	}
	return out
}

// v1Status is the condition c in the words of the v1 dialect, which keeps what the
// service itself declared where that does not contradict.
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
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
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

// listenUnix listens on a socket file of mode 0600. A file that a dead process left
// is replaced, a socket that answers is not.
func listenUnix(path string) (net.Listener, string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, "", err
	}
	const most = len(syscall.RawSockaddrUnix{}.Path) - 1
	if len(path) > most {
		return nil, "", fmt.Errorf("socket path %q has %d bytes: the kernel allows %d", path, len(path), most)
	}
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

// plane serves a registry over gRPC and runs its janitor.
type plane struct {
	registry *registry
	server   *grpc.Server
	health   *health.Server
	ended    chan struct{}      // closed when stop begins
	janitor  context.CancelFunc // ends the janitor and the keeper
	done     sync.WaitGroup
}

// durableService is the name under which grpc.health.v1 tells whether the state file
// is up to date. That it is not does not make the control plane less fit to serve.
const durableService = "flowctl.durable"

// planeConfig is what a control plane is made of.
type planeConfig struct {
	listener          net.Listener
	endpoint          string       // where listener is reached
	componentListener net.Listener // without TLS, for components that do not speak it; nil for none
	ttl               time.Duration
	interval          time.Duration // the janitor's, and that of writes of the state file
	members           []member      // the components of the pipeline, nil for a control plane alone
	pipeline          pipelineInfo
	store             *store                                       // open; nil to keep the registry in memory alone
	certs             *certificates                                // nil without TLS
	peer              func(conn net.Conn, claimedID string) origin // nil: nobody is asked who calls
	requests          runRequests                                  // nil for a control plane alone
	log               *slog.Logger
}

// limitCall gives a call its maxCallTime, if its connection has many whose requests are
// not whole. Those that go on by nature are not meant.
func limitCall(ctx context.Context, call *tap.Info) (context.Context, error) {
	switch call.FullMethodName {
	case operatorv1.Operator_Watch_FullMethodName, healthpb.Health_Watch_FullMethodName,
		reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName, reflectionalphapb.ServerReflection_ServerReflectionInfo_FullMethodName:
		return ctx, nil
	}
	if caller := peerConnOf(ctx); caller == nil || caller.begun.Add(1) <= maxBegun {
		return ctx, nil // a timer is a tenth of what a heartbeat allocates
	}
	ctx, cancel := context.WithTimeout(ctx, maxCallTime)
	_ = cancel // grpc ends what ctx is made from with the call
	return ctx, nil
}

// wholeCall takes note that the request of a call is whole.
func wholeCall(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if caller := peerConnOf(ctx); caller != nil {
		caller.begun.Add(-1)
	}
	return handler(ctx, request)
}

// healthServer is grpc.health.v1 for names that a service can have: one that is watched
// is kept, whatever it is.
type healthServer struct{ *health.Server }

func (h healthServer) Watch(in *healthpb.HealthCheckRequest, stream healthpb.Health_WatchServer) error {
	if err := checkLength("the name of a service", in.GetService(), maxID); err != nil {
		return err
	}
	return h.Server.Watch(in, stream)
}

// planeOptions are the options of a control plane's gRPC server.
func planeOptions(creds credentials.TransportCredentials) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(creds),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(16 << 10), // grpc's 16 MiB are 10 GB for two hundred calls
		grpc.InTapHandle(limitCall),
		grpc.UnaryInterceptor(wholeCall),
		// Ten thousand idle connections must not cost a gigabyte.
		grpc.ReadBufferSize(4 << 10),
		grpc.WriteBufferSize(4 << 10),
		grpc.MaxConcurrentStreams(maxCalls),
		// Windows of a fixed size: to let them grow, grpc sends a ping for each message,
		// which is more than a heartbeat costs, and a stranger could have them grow to 16 MiB.
		grpc.StaticStreamWindowSize(64 << 10),
		grpc.StaticConnWindowSize(1 << 20),
		// Goroutines that are there already have the stack that a call needs: to grow
		// one for each took 8 % of the time under load, when all of a few were busy.
		grpc.NumStreamWorkers(64),
		grpc.ConnectionTimeout(10 * time.Second),
		// A client that pings more often than this is cut off, so it is low: a
		// storm of pings costs less than a component that loses its connection.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	}
}

// newPlane makes the registry, restores it from the state file, and starts to answer on
// the listeners; stop ends what it began. It fails for a state file that cannot be read,
// and then leaves listeners and store to the caller.
func newPlane(c planeConfig) (*plane, error) {
	r := newRegistry(c.ttl, c.interval, c.endpoint, c.members)
	if c.store != nil {
		if err := c.store.restore(r, c.log); err != nil {
			return nil, err
		}
	}
	r.report(c.pipeline)
	return servePlane(r, c), nil
}

// servePlane starts to answer for r.
func servePlane(r *registry, c planeConfig) *plane {
	creds := peerCredentials{c.certs.credentials(), c.peer, c.log}
	p := &plane{registry: r, health: health.NewServer(), ended: make(chan struct{}), server: grpc.NewServer(planeOptions(creds)...)}
	flowctlpb.RegisterControlPlaneServer(p.server, legacyServer{registry: r})
	flowctlv1.RegisterControlPlaneServiceServer(p.server, v1Server{registry: r})
	operatorv1.RegisterOperatorServer(p.server, operatorServer{registry: r, ended: p.ended, requests: c.requests})
	healthpb.RegisterHealthServer(p.server, healthServer{p.health})
	for name := range p.server.GetServiceInfo() {
		p.health.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	}
	reflection.Register(p.server)

	var ctx context.Context
	ctx, p.janitor = context.WithCancel(context.Background())
	p.done.Go(func() { r.runJanitor(ctx) })
	if c.store != nil {
		durable := func(is bool) {
			status := healthpb.HealthCheckResponse_NOT_SERVING
			if is {
				status = healthpb.HealthCheckResponse_SERVING
			}
			p.health.SetServingStatus(durableService, status)
		}
		durable(true)
		p.done.Go(func() { r.keep(ctx, c.store, durable) })
	}
	p.serve(c.listener, c.log)
	if c.componentListener != nil {
		p.serve(componentListener{c.componentListener}, c.log)
	}
	return p
}

// serve answers on lis, too, until stop.
func (p *plane) serve(lis net.Listener, log *slog.Logger) {
	p.done.Go(func() {
		if err := p.server.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			log.Error("control plane ended", "err", err)
		}
	})
}

// stop answers what is being asked and then ends, within a second: a health watch
// or an idle client would keep it forever. A disk that hangs has the time of one write
// for the last of the state.
func (p *plane) stop() {
	close(p.ended)
	p.health.Shutdown()
	hurry := time.AfterFunc(time.Second, p.server.Stop)
	p.server.GracefulStop()
	hurry.Stop()
	p.janitor()
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

// listenConfig says where the control plane listens.
type listenConfig struct {
	address string // a host, or unix:PATH
	port    int    // 0 takes a free one
	anyPort bool   // a free one serves where port is taken
}

// openPlane listens where o says.
func openPlane(o listenConfig, tls tlsFlags, log *slog.Logger) (net.Listener, string, error) {
	lis, err := passedListener(log)
	endpoint := ""
	if lis != nil {
		endpoint = passedEndpoint(lis.Addr())
	} else if err == nil {
		lis, endpoint, err = listenPlane(o.address, o.port)
	}
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
		return nil, "", fmt.Errorf("the control plane cannot listen at -control-plane-address %q: %v", o.address, err)
	}
	if _, ok := lis.(*net.UnixListener); ok && tls.cert != "" {
		lis.Close()
		return nil, "", fmt.Errorf("-tls-cert %q: a control plane on a socket file (%s) has no TLS", tls.cert, endpoint)
	}
	if tcp, ok := lis.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() && tls.cert == "" {
		log.Warn("the control plane listens off the loopback without TLS: who reaches it can register", "endpoint", endpoint)
	}
	log.Info("listening", "endpoint", endpoint)
	return lis, endpoint, nil
}

// passedEndpoint is where processes of this machine reach a listener at addr that systemd
// has opened.
func passedEndpoint(addr net.Addr) string {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcpEndpoint(tcp, tcp.IP.String())
	}
	path := addr.String()
	if name, ok := strings.CutPrefix(path, "@"); ok {
		return "unix-abstract:" + name
	}
	return "unix://" + path
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

// stateConfig says where the registry's state is kept.
type stateConfig struct {
	file string // "" for memory
	own  bool   // its folder is flowctl's own, which is made
}

// openState opens the state file of a pipeline, "" for a control plane alone. It returns
// nil where there is to be none.
func openState(config stateConfig, pipeline string, log *slog.Logger) (*store, error) {
	if config.file == "" {
		return nil, nil
	}
	return openStore(config.file, pipeline, config.own, log)
}
