package main

// One service of the registry: what it said of itself, its metrics, and what is allowed.

import (
	"cmp"
	"container/list"
	"math"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
)

// metadataComponentID is the metadata key under which some components send the id that
// flowctl gave them.
const metadataComponentID = "component_id"

// condition is what the registry thinks of a service.
type condition uint8

const (
	unregistered condition = iota // not registered since its process started
	healthy
	degraded // by its own word; counts as healthy
	unhealthy
)

func (c condition) String() string {
	return [...]string{"unregistered", "healthy", "degraded", "unhealthy"}[c]
}

// ok reports whether the condition counts as healthy.
func (c condition) ok() bool { return c == healthy || c == degraded }

// serviceHealth is how a service is, as the registry derives it. Two that are equal give no
// reason to tell anyone of a change.
type serviceHealth struct {
	condition condition
	why       why
	reason    string    // why it is not healthy, in words; "" for one that is stale
	silent    time.Time // when a stale one was heard of last, else zero
}

// why is what a condition that is not healthy comes from.
type why uint8

const (
	whyNone         why = iota
	whyUnregistered     // it has not registered
	whyEnded            // its process has ended
	whyDeclared         // it has declared itself so
	whyCheck            // its health check does not pass
	whySilent           // its heartbeats have stopped
	whyMute             // it has sent none since it registered
	whyStream           // its events cannot be moved
)

var notRegistered = serviceHealth{why: whyUnregistered, reason: "not registered"}

// member is what the registry knows beforehand of a component of the pipeline.
type member struct {
	id           string
	role         Role
	healthPort   string // HEALTH_PORT, by which one that sends no id is told from the others
	endpoint     string // of the control plane, as the component was given it
	inputs       []string
	inputEvents  []string // used where it registers without them, as outputEvents
	outputEvents []string
	kind         string            // the type that the pipeline file gives it: free text
	labels       map[string]string // of the pipeline file
	elsewhere    bool              // something else starts it: who registers as it is believed, as for what is not of the pipeline
}

// registration is what a service says of itself when it registers, in the words that the
// two dialects have in common. Its lists and its map are never changed.
type registration struct {
	id           string // its own choice, may be empty
	componentID  string // the component_id field, which may be none of the pipeline's
	kind         flowctlpb.ServiceType
	name         string
	description  string
	version      string
	inputEvents  []string
	outputEvents []string
	endpoint     string
	unreachable  bool // endpoint is on the loopback of another machine
	v1           bool // it registered through flowctl.v1, so it may serve events at endpoint
	maxInflight  int32
	metadata     map[string]string
}

// metric is a value as it was sent last: a number by the legacy dialect, a text by v1.
type metric struct {
	name   string
	number float64
	text   string
	isText bool
}

// healthChange is one entry of a service's history.
type healthChange struct {
	at        time.Time
	condition condition
	cause     string
}

// processReport is what the process of a component does, in the words of who runs it.
type processReport struct {
	state    string
	pid      int // 0 while there is none
	started  time.Time
	restarts int
}

// service is one record of the registry. registry.mu guards it.
type service struct {
	seq          int64        // tells it from others for as long as the registry lives
	said         registration // what it said last, with what the pipeline file adds; id is the one that it goes by
	names        []string     // ids that it chose, the latest last; one may lead to another component by now
	member       *memberState // nil: not of the pipeline
	owner        string       // the user or certificate that registered it, "" for whom nobody can tell from others; not of the pipeline
	conn         int64        // the connection by which it registered last
	formerConns  []int64      // those of former registrations, maxFormer at most
	registered   bool
	noTTL        bool // never stale: it has no heartbeat, its process stands for it
	registeredAt time.Time
	lastSeen     time.Time
	declared     flowctlv1.HealthStatus
	metrics      []metric // in the order of their names
	bytes        int      // of what it said, and of its metrics
	counted      int      // of these, in registry.otherBytes
	history      []healthChange
	noted        serviceHealth // as it was judged last for history
	notified     condition     // that the run was told of last
	inChanged    bool          // waits in registry.changed
	changeNumber uint64        // of its last change, as persistence counts them
	isPending    bool          // waits in persistence.pending
	live, stale  *list.Element // in the registry's lists of that name
	staleSince   time.Time     // of one in stale
}

// memberState is what there is of a component of the pipeline beyond its registration.
type memberState struct {
	member
	process processReport // its zero value until there is one
	ended   string        // how its process ended, "" while it lives
	failing string        // why its health check fails, "" while it passes
	stuck   string        // why its events cannot be moved, "" while they can
}

// check applies the bounds.
func (reg *registration) check() error {
	if n := max(len(reg.metadata), len(reg.inputEvents), len(reg.outputEvents)); n > maxEntries {
		return status.Errorf(codes.ResourceExhausted, "a list or map of %d entries: at most %d are allowed", n, maxEntries)
	}
	for _, f := range []struct {
		what, text string
		max        int
	}{
		{"the id", reg.id, maxID}, {"component_id", reg.componentID, maxID},
		{"component_id in metadata", reg.metadata[metadataComponentID], maxID}, {"name", reg.name, maxText},
		{"description", reg.description, maxText}, {"version", reg.version, maxText}, {"the endpoint", reg.endpoint, maxText},
	} {
		if err := checkLength(f.what, f.text, f.max); err != nil {
			return err
		}
	}
	for _, event := range slices.Concat(reg.inputEvents, reg.outputEvents) {
		if err := checkLength("an event type", event, maxID); err != nil {
			return err
		}
	}
	for k, v := range reg.metadata {
		if err := cmp.Or(checkLength("a metadata key", k, maxID), checkLength("a metadata value", v, maxText)); err != nil {
			return err
		}
	}
	if n := reg.size(); n > maxServiceBytes {
		return status.Errorf(codes.ResourceExhausted, "the registration has %d bytes of text, as JSON has it: at most %d are allowed", n, maxServiceBytes)
	}
	return nil
}

// size is how many bytes the texts of reg take in the state file.
func (reg *registration) size() int {
	n := textSize(reg.id, reg.componentID, reg.name, reg.description, reg.version, reg.endpoint) + textSize(reg.inputEvents...) + textSize(reg.outputEvents...)
	for k, v := range reg.metadata {
		n += textSize(k, v)
	}
	return n
}

// textSize is how many bytes texts take in JSON, in about: each has two quotes and a comma
// or colon, and some characters are escaped, as \u003c is.
func textSize(texts ...string) (n int) {
	for _, text := range texts {
		n += len(text) + 3
		for i := range len(text) {
			switch c := text[i]; {
			case c < ' ', c == '<', c == '>', c == '&':
				n += 5
			case c == '"', c == '\\', c > '~':
				n++
			}
		}
	}
	return n
}

func checkLength(what, text string, most int) error {
	if len(text) > most {
		return status.Errorf(codes.ResourceExhausted, "%s has %d bytes: at most %d are allowed", clip(what), len(text), most)
	}
	return nil
}

// isElsewhere reports whether something else than flowctl starts s.
func (s *service) isElsewhere() bool { return s.member == nil || s.member.elsewhere }

// refuse fails with PERMISSION_DENIED where the caller may not speak for s: only who is proven
// to be of a component that flowctl started may speak for it, and for any other service the
// user or certificate that registered it. A component that something else starts is anybody's
// again once it is stale or has unregistered. A certificate that names a component is proof, for it and
// against all others.
func (s *service) refuse(from origin) error {
	switch {
	case s.member == nil:
	case from.certified == s.member.id:
		return nil
	case from.certified != "" && s.member.elsewhere:
		return status.Errorf(codes.PermissionDenied, "a certificate that names %s cannot speak for component %s", quote(from.certified), s.member.id)
	case from.required:
		return status.Errorf(codes.PermissionDenied, "only a certificate that names component %s can speak for it: by the URI spiffe://ANY/flowctl/PIPELINE/%s, or the DNS name %s.PIPELINE.flowctl", s.member.id, s.member.id, s.member.id)
	}
	switch {
	case from.believed:
		return nil
	case s.isElsewhere() && s.owner != "" && s.owner != from.owner && (s.member == nil || s.live != nil):
		return status.Errorf(codes.PermissionDenied, "service %q was registered by %s: nobody else can speak for it", clip(s.said.id), printable(s.owner))
	case s.isElsewhere() || from.component == s.member.id:
		return nil
	}
	who := "component " + from.component
	switch {
	case from.unknown != "":
		return status.Errorf(codes.PermissionDenied, "flowctl cannot tell whether a process of component %s calls: %s", s.member.id, from.unknown)
	case from.component == "":
		who = "a process that is no component of this pipeline"
	case from.component == commandID:
		who = commandID
	}
	return status.Errorf(codes.PermissionDenied, "%s cannot speak for component %s: only its own processes can", who, s.member.id)
}

// registerBy notes who registers s, and by which connection.
func (s *service) registerBy(from origin) {
	s.owner = from.owner
	if from.conn == s.conn {
		return
	}
	if s.conn != 0 {
		s.formerConns = append(s.formerConns, s.conn)
		s.formerConns = s.formerConns[max(0, len(s.formerConns)-maxFormer):]
	}
	s.conn = from.conn
	s.formerConns = slices.DeleteFunc(s.formerConns, func(conn int64) bool { return conn == s.conn })
}

// localPort returns the port in a URL or a host:port with or without a path, "" if there is
// none or if the host is not this machine: the ports of others say nothing of a component.
func localPort(endpoint string) string {
	hostport, _, _ := strings.Cut(endpoint, "/")
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		hostport = u.Host
	}
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return ""
	}
	own, _ := os.Hostname()
	switch strings.ToLower(host) {
	case "", "localhost", strings.ToLower(own), "host.docker.internal", "host.containers.internal": // the last two are this machine's names in a container
		return port
	}
	if ip := net.ParseIP(host); ip != nil && (ip.IsLoopback() || ip.IsUnspecified()) {
		return port
	}
	return ""
}

// completed returns an endpoint of a service that calls from address: one that names no host, or all of its machine, gets that.
// It is unreachable where it is on the loopback of another machine.
func completed(endpoint, address string) (whole string, unreachable bool) {
	before, hostport, after := "", endpoint, ""
	if i := strings.Index(endpoint, "://"); i >= 0 {
		before, hostport = endpoint[:i+3], endpoint[i+3:]
	}
	if i := strings.IndexAny(hostport, "/?#"); i >= 0 {
		hostport, after = hostport[:i], hostport[i:]
	}
	host, port, err := net.SplitHostPort(hostport)
	if err != nil || address == "" {
		return endpoint, false
	}
	ip := net.ParseIP(host)
	switch {
	case host == "", ip != nil && ip.IsUnspecified():
		return before + net.JoinHostPort(address, port) + after, false
	case strings.EqualFold(host, "localhost"), ip != nil && ip.IsLoopback():
		return endpoint, !isOwnAddress(net.ParseIP(address))
	}
	return endpoint, false
}

// reach is where others reach s, "" where they cannot.
func (s *service) reach() string {
	if s.said.unreachable {
		return ""
	}
	return s.said.endpoint
}

// component is the id of the component of the pipeline that s is, "" when it is none.
func (s *service) component() string {
	if s.member == nil {
		return ""
	}
	return s.member.id
}

// key is the one id of a service that the registry is sure to know it under.
func (s *service) key() string {
	switch {
	case s.member != nil:
		return s.member.id
	case len(s.names) > 0:
		return s.names[0]
	}
	return s.said.id
}

// gone reports whether the registry has forgotten s.
func (s *service) gone() bool { return s.member == nil && !s.registered }

// describe takes in what s says of itself. The pipeline file has its word: its role wins,
// its event types serve where the component sent none.
func (s *service) describe(reg registration) {
	s.bytes = reg.size()
	if s.member != nil {
		reg.kind = flowctlpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
		if s.member.role != roleService {
			reg.kind = flowctlpb.ServiceType(s.member.role) + flowctlpb.ServiceType_SERVICE_TYPE_SOURCE
		}
		if len(reg.inputEvents) == 0 {
			reg.inputEvents = s.member.inputEvents
		}
		if len(reg.outputEvents) == 0 {
			reg.outputEvents = s.member.outputEvents
		}
	}
	s.said = reg
}

// without returns names without id, in a list of its own where it differs.
func without(names []string, id string) []string {
	if i := slices.Index(names, id); i >= 0 {
		return slices.Concat(names[:i], names[i+1:])
	}
	return names
}

// topics are the names under which what s puts out is to be found.
func (s *service) topics() []string {
	if s.said.kind != flowctlpb.ServiceType_SERVICE_TYPE_SOURCE && s.said.kind != flowctlpb.ServiceType_SERVICE_TYPE_PROCESSOR {
		return nil
	}
	var topics []string
	for _, event := range s.said.outputEvents {
		topics = append(topics, event+".v1")
	}
	return topics
}

var (
	errNoServiceID     = status.Error(codes.InvalidArgument, "service_id is empty")
	errRegistryFull    = status.Error(codes.ResourceExhausted, "the registry is full: it has no room for metrics of what is not of the pipeline")
	errTooManyMetrics  = status.Errorf(codes.ResourceExhausted, "too many metrics: a service has %d at most", maxEntries)
	errMetricsTooLarge = status.Errorf(codes.ResourceExhausted, "what the service said and its metrics have more than %d bytes", maxServiceBytes)
)

// merge takes metrics in by their names. It takes what it can, and fails for the first that
// is past a bound.
func (s *service) merge(metrics []metric) (failed error) {
	if len(s.metrics) == 0 && len(metrics) <= maxEntries {
		s.metrics = slices.Grow(s.metrics, len(metrics))
	}
	for _, m := range metrics {
		i, known := slices.BinarySearchFunc(s.metrics, m.name, func(has metric, name string) int { return strings.Compare(has.name, name) })
		more := m.size()
		if known {
			more -= s.metrics[i].size()
		}
		switch err := m.check(); {
		case err != nil:
			failed = cmp.Or(failed, err)
		case !known && len(s.metrics) == maxEntries:
			failed = cmp.Or(failed, errTooManyMetrics)
		case more > 0 && s.bytes+more > maxServiceBytes:
			failed = cmp.Or(failed, errMetricsTooLarge)
		case known:
			s.bytes += more
			m.name, s.metrics[i] = s.metrics[i].name, m
		default:
			s.bytes += more
			s.metrics = slices.Insert(s.metrics, i, m)
		}
	}
	return failed
}

// numberSize is the most that a number takes in JSON.
const numberSize = 24

// size is how many bytes m takes in the state file.
func (m *metric) size() int {
	if m.isText {
		return textSize(m.name, m.text)
	}
	return textSize(m.name) + numberSize
}

func (m *metric) check() error {
	return cmp.Or(checkLength("the name of a metric", m.name, maxID), checkLength("the value of a metric", m.text, maxText))
}

func (m *metric) String() string {
	if m.isText {
		return m.text
	}
	if m.number == math.Trunc(m.number) && math.Abs(m.number) < 1<<53 { // a count: 58123456, not 5.8123456e+07
		return strconv.FormatFloat(m.number, 'f', -1, 64)
	}
	return strconv.FormatFloat(m.number, 'g', -1, 64)
}

// float returns false for a text that is no number.
func (m *metric) float() (float64, bool) {
	if !m.isText {
		return m.number, true
	}
	f, err := strconv.ParseFloat(m.text, 64)
	return f, err == nil
}
