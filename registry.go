package main

import (
	"cmp"
	"context"
	"crypto/rand"
	bin "encoding/binary"
	"fmt"
	"iter"
	"maps"
	"math"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// What a client can make the registry hold. Past a bound it gets RESOURCE_EXHAUSTED.
const (
	maxServices = 1 << 17
	maxIDs      = 16        // ids under which one component is known
	maxEntries  = 256       // metrics, metadata entries or event types of one service
	maxID       = 256       // bytes of an id, and of a key of metrics and metadata
	maxText     = 4096      // bytes of any other text
	maxBytes    = 256 << 20 // of what all services hold, but for what each takes alike
	maxHistory  = 32        // changes of health that are kept of one service
)

// batch is how many services are gone through while the registry is locked: a few
// hundred microseconds of work, so that no heartbeat waits longer.
const batch = 64

// minStall is the shortest time that flowctl must not have run for to count as
// stopped, unless the TTL is short, too: less is a busy machine.
const minStall = time.Second

// metadataComponentID is the metadata key under which some components send the
// id that flowctl gave them.
const metadataComponentID = "component_id"

// condition is what the registry thinks of a service.
type condition uint8

const (
	unregistered condition = iota // never registered, or not since its process started
	healthy
	degraded // by its own word; counts as healthy
	unhealthy
)

func (c condition) String() string {
	return [...]string{"unregistered", "healthy", "degraded", "unhealthy"}[c]
}

// ok tells whether the condition counts as healthy.
func (c condition) ok() bool { return c == healthy || c == degraded }

// member is what the registry knows beforehand of a component of the pipeline.
type member struct {
	id           string
	role         Role
	healthPort   string // HEALTH_PORT, by which one that sends no id is told from the others
	endpoint     string // of the control plane, as the component was given it
	inputs       []string
	inputEvents  []string // used where it registers without them, as outputEvents
	outputEvents []string
	inContainer  bool              // a process that flowctl cannot see may speak for it
	kind         string            // the type that the pipeline file gives it: free text
	labels       map[string]string // of the pipeline file
}

// registration is what a service says of itself when it registers, in the words
// that the two dialects have in common.
type registration struct {
	id           string // its own choice, may be empty
	componentID  string // the component_id field
	kind         flowctlpb.ServiceType
	name         string
	description  string
	version      string
	inputEvents  []string
	outputEvents []string
	endpoint     string
	maxInflight  int32
	metadata     map[string]string
}

// processReport is what a component's process does, in the words of who runs it. The
// registry only passes it on.
type processReport struct {
	state    string
	pid      int // 0 while there is none
	started  time.Time
	restarts int
}

// change tells the subscriber how a service is now. Changes that follow each other
// faster than they are taken are told as one.
type change struct {
	id        string
	component string // "" when not in the pipeline
	now, was  condition
	cause     string // why it is unhealthy
}

// registry holds what has registered. Health is never stored: it is derived from
// what was heard and from the time at which it is asked for, so no answer lags
// behind the janitor. Every method that depends on time takes it as an argument.
type registry struct {
	ttl       time.Duration
	interval  time.Duration // the janitor sleeps no longer
	endpoint  string        // where the plane listens
	stateFile string        // "" for none
	wake      chan struct{} // gets a token when changes wait to be taken
	listing   sync.Mutex    // held while an answer that lists services is made

	mu       sync.Mutex // guards the fields below and all services
	table    *table
	members  int                 // components of the pipeline
	ports    map[string]*service // of the pipeline, by HEALTH_PORT
	services map[string]slot     // by each id that one is known under
	all      []*service          // the pipeline's own first, in file order; what is gone is taken out now and then
	next     int                 // record of the next service
	count    int                 // services that are not in the pipeline
	bytes    int                 // of all services, by size
	live     chain               // services with a heartbeat to come, the longest silent first
	stale    chain               // services without, the longest silent first; none of the pipeline's
	changed  []*service
	observed time.Time     // the latest time that any method was given
	grace    time.Time     // silence before this moment is not held against anyone
	lapsed   time.Duration // in which flowctl was stopped, all times together
	feed     feed
	journal  journal
}

// newRegistry returns a registry that knows members before they register.
func newRegistry(ttl, interval time.Duration, endpoint string, members []member) *registry {
	all := newTable()
	r := &registry{
		ttl: ttl, interval: interval, endpoint: endpoint, members: len(members),
		wake:  make(chan struct{}, 1),
		ports: make(map[string]*service),
		table: all, services: make(map[string]slot),
		live: chain{table: all, kind: amongLive}, stale: chain{table: all, kind: amongStale},
		feed:    newFeed(all),
		journal: journal{written: make(chan struct{})},
	}
	r.setMembersLocked(members)
	return r
}

// setMembers takes over how the pipeline is now. What is new has not registered, and
// what is not in it any more is gone.
func (r *registry) setMembers(members []member, now time.Time) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	for _, gone := range r.setMembersLocked(members) {
		gone.names = gone.names.with(gone.key())
		gone.member = nil
		r.count++ // which removeLocked takes back
		r.removeLocked(gone, now)
	}
}

// setMembersLocked returns the services that were members and are none any more.
func (r *registry) setMembersLocked(members []member) (gone []*service) {
	before := r.all
	r.all, r.members = nil, len(members)
	clear(r.ports)
	listed := make(map[*service]bool)
	for i := range members {
		m := &members[i]
		s := r.service(m.id)
		if s == nil || s.component() != m.id {
			if s != nil {
				r.loseNameLocked(s, m.id, r.observed)
			}
			s = r.makeLocked()
			s.rename(m.id)
			s.member = &membership{}
			r.services[m.id] = s.slot
		}
		now := *s.member // save may look at the one that it was
		now.member = *m
		if s.member = &now; !s.registered {
			s.fillLocked()
			r.weighLocked(s)
		}
		listed[s] = true
		r.all = append(r.all, s)
		r.feed.touch(s)
		if _, twice := r.ports[m.healthPort]; twice {
			r.ports[m.healthPort] = nil // it tells nobody
		} else if m.healthPort != "" {
			r.ports[m.healthPort] = s
		}
	}
	for _, s := range before {
		switch {
		case s.member == nil:
			r.all = append(r.all, s)
		case !listed[s]:
			gone = append(gone, s)
		}
	}
	return gone
}

// newServiceLocked returns a record that no id leads to yet.
func (r *registry) newServiceLocked() *service {
	s := r.makeLocked()
	r.all = append(r.all, s)
	return s
}

// makeLocked returns a record that is not in all either.
func (r *registry) makeLocked() *service {
	s := &service{record: r.next, said: nothing}
	r.table.add(s)
	r.next++
	return s
}

// conditionLocked judges s at the time now; the text says why it is not healthy.
func (r *registry) conditionLocked(s *service, now time.Time) (condition, string) {
	var ended, failing string
	if s.member != nil {
		ended, failing = s.member.ended, s.member.failing
	}
	switch {
	case ended != "":
		return unhealthy, ended
	case !s.registered:
		return unregistered, cmp.Or(failing, "not registered")
	case s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY:
		return unhealthy, "it declared itself UNHEALTHY"
	case s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_STOPPING:
		return unhealthy, "it declared itself STOPPING"
	case failing != "":
		return unhealthy, failing
	case !s.timeless && now.After(r.expiryLocked(s)):
		return unhealthy, fmt.Sprintf("no heartbeat for %s, the TTL is %s", now.Sub(s.lastSeen).Round(time.Millisecond), r.ttl)
	case s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED:
		return degraded, "it declared itself DEGRADED"
	}
	return healthy, ""
}

// expiryLocked is the last moment at which s is not stale unless it is heard of again.
// One that a sweep found stale, and so has no place in live, gets no grace.
func (r *registry) expiryLocked(s *service) time.Time {
	from := s.lastSeen
	if r.live.has(s) && from.Before(r.grace) {
		from = r.grace
	}
	return from.Add(r.ttl)
}

// lockAt locks the registry and notes the time. The janitor does so at least twice in
// stall, so a gap of more than that means that flowctl did not run: heartbeats could
// not be heard, and everyone gets one TTL from now on. It returns the time to go on
// with: who looked at the clock first may come to the lock last, and must not judge by a
// time that has passed. Times keep what they have of the monotonic clock, so that it is
// no matter if the other one is set.
func (r *registry) lockAt(now time.Time) time.Time {
	r.mu.Lock()
	if !r.observed.IsZero() && now.Sub(r.observed) > max(r.stall(), min(minStall, r.ttl/2)) {
		r.grace = now
		r.lapsed += now.Sub(r.observed)
	}
	if now.After(r.observed) {
		r.observed = now
	}
	return r.observed
}

// stopped returns how long flowctl itself was stopped or suspended, all times together.
func (r *registry) stopped(now time.Time) time.Duration {
	r.lockAt(now)
	defer r.mu.Unlock()
	return r.lapsed
}

// stall is the time without a look at the clock that a registry takes for a flowctl that
// was stopped. It is short enough for nobody to go stale in it who heartbeats as told,
// each third of the TTL.
func (r *registry) stall() time.Duration { return min(r.interval, r.ttl/3) }

// noteLocked writes a change of the health of s down, if there is one.
func (r *registry) noteLocked(s *service, now time.Time) {
	if c, cause := r.conditionLocked(s, now); c != s.latest.now {
		s.noteChange(healthChange{now, c, clip(cause)})
		r.weighLocked(s)
		r.changedLocked(s)
	}
}

// changedLocked takes note that s is to be on disk, where there is a store, before
// anyone is told of it as it is now.
func (r *registry) changedLocked(s *service) {
	if !r.journal.hold(s) {
		r.tellLocked(s)
	}
}

// tellLocked lets out that s has changed.
func (r *registry) tellLocked(s *service) {
	r.feed.touch(s)
	if s.queued || s.latest.now == s.told {
		return
	}
	s.queued = true
	r.changed = append(r.changed, s)
	r.wakeLocked()
}

func (r *registry) wakeLocked() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// service is the one that is known under id, nil for none.
func (r *registry) service(id string) *service { return r.table.services[r.services[id]] }

// changes takes what has changed since it was last called, or a part of it and
// leaves a token in wake. There is one caller: it comes when wake has a token.
func (r *registry) changes(now time.Time) []change {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	var out []change
	n := min(len(r.changed), batch)
	for _, s := range r.changed[:n] {
		s.queued = false
		c, cause := r.conditionLocked(s, now)
		if c == s.told {
			continue
		}
		out = append(out, change{id: s.id(), component: s.component(), now: c, was: s.told, cause: cause})
		s.told = c
	}
	if r.changed = r.changed[n:]; len(r.changed) > 0 {
		r.wakeLocked()
	} else {
		r.changed = nil
	}
	return out
}

// condition judges the pipeline's component id at the time now.
func (r *registry) condition(id string, now time.Time) (condition, string) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s := r.service(id)
	if s == nil {
		return unregistered, "not registered"
	}
	return r.conditionLocked(s, now)
}

// strangers returns the ids of what is registered and is none of the pipeline's.
func (r *registry) strangers(now time.Time) (ids []string) {
	r.each(now, func(s *service, _ time.Time) bool {
		if s.member == nil {
			ids = append(ids, printable(s.id()))
		}
		return true
	})
	return ids
}

// report takes what is to be shown of the run as a whole.
func (r *registry) report(info pipelineInfo) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.feed.report(info)
}

// reportProcess takes what the process of component id does.
func (r *registry) reportProcess(id string, p processReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.service(id); s.member.process == nil || *s.member.process != p {
		kept := p // a copy, so that only a change allocates
		s.member.process = &kept
		r.feed.touch(s)
	}
}

// seenLocked notes a sign of life.
func (r *registry) seenLocked(s *service, now time.Time) {
	s.lastSeen, r.journal.heard = now, true
	r.stale.remove(s)
	if s.timeless {
		r.live.remove(s)
	} else {
		r.live.moveToBack(s)
	}
}

// sweep tells of the services that have become stale, or of a part of them, and
// returns when to come again.
func (r *registry) sweep(now time.Time) time.Time {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	wake := now.Add(r.stall() / 2)
	for n := 0; ; n++ {
		s := r.live.front()
		if s == nil {
			break
		}
		if n == batch {
			return now
		}
		if at := r.expiryLocked(s); !now.After(at) {
			if at = at.Add(1); at.Before(wake) {
				wake = at
			}
			break
		}
		r.live.remove(s)
		if s.member == nil {
			r.stale.moveToBack(s)
		}
		r.noteLocked(s, now)
	}
	return wake
}

// runJanitor sweeps until ctx ends, at the earliest next expiry each time and at
// least twice in stall.
func (r *registry) runJanitor(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			timer.Reset(time.Until(r.sweep(time.Now())))
		}
	}
}

// starting makes ready for a new process of component id: whatever an earlier one
// registered no longer counts.
func (r *registry) starting(id string, now time.Time) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s := r.service(id)
	r.resetLocked(s)
	s.told = unregistered
	r.noteLocked(s, now)
}

func (r *registry) resetLocked(s *service) {
	r.unnameAllLocked(s)
	r.live.remove(s)
	s.describeLocked(registration{id: s.member.id})
	s.metrics = nil
	r.weighLocked(s)
	s.registered, s.timeless = false, false
	s.member.ended, s.member.failing = "", ""
	s.declared = flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN
}

// finished notes that the process of component id ended. One that completed is
// no longer registered; with a cause it is unhealthy until a new process registers.
func (r *registry) finished(id, cause string, now time.Time) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s := r.service(id)
	if cause == "" {
		r.resetLocked(s)
	}
	s.member.ended = cause
	r.noteLocked(s, now)
}

// admit registers component id, which does not do it itself. Its process and its
// health check stand for it, so it is never stale.
func (r *registry) admit(id string, now time.Time) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s := r.service(id)
	s.registered, s.timeless, s.since = true, true, now
	s.fillLocked()
	r.weighLocked(s)
	r.seenLocked(s, now)
	r.noteLocked(s, now)
	r.tellLocked(s) // without waiting for the disk: no caller does, and its process may have ended by then
}

// checked notes the outcome of a health check of component id: "" is a pass and
// counts as a heartbeat, anything else says why it fails.
func (r *registry) checked(id, failing string, now time.Time) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s := r.service(id)
	s.member.failing = failing
	if failing == "" && s.registered {
		r.seenLocked(s, now)
	}
	r.noteLocked(s, now)
}

// component is the id of the pipeline's component that s is, "" when it is none.
func (s *service) component() string {
	if s.member == nil {
		return ""
	}
	return s.member.id
}

// describeLocked takes in what s says of itself.
func (s *service) describeLocked(reg registration) {
	s.kind = reg.kind
	s.keepLocked(&details{
		id: reg.id, maxInflight: reg.maxInflight,
		name: reg.name, description: reg.description, version: reg.version, endpoint: reg.endpoint,
		inputEvents: reg.inputEvents, outputEvents: reg.outputEvents, labels: newLabels(reg.metadata),
	})
}

// fillLocked is for when s has become a member.
func (s *service) fillLocked() { s.keepLocked(s.details()) }

// keepLocked lets the pipeline file have its word: its role wins, its event types
// serve where the component sent none.
func (s *service) keepLocked(w *details) {
	if s.member != nil {
		s.kind = flowctlpb.ServiceType(s.member.role) + flowctlpb.ServiceType_SERVICE_TYPE_SOURCE
		if len(w.inputEvents) == 0 {
			w.inputEvents = s.member.inputEvents
		}
		if len(w.outputEvents) == 0 {
			w.outputEvents = s.member.outputEvents
		}
	}
	s.said = w.pack()
}

// identifyLocked finds the component of the pipeline that reg comes from, or nil.
// It fails with PERMISSION_DENIED for one that the kernel knows it is not from.
func (r *registry) identifyLocked(reg *registration, from origin) (*service, error) {
	for _, id := range []string{reg.componentID, reg.metadata[metadataComponentID], reg.id} {
		if s := r.service(id); s != nil && id != "" && s.component() == id {
			return s, s.refuse(from)
		}
	}
	if s := r.service(from.component); s != nil && s.component() == from.component {
		return s, nil
	}
	for _, endpoint := range []string{reg.endpoint, reg.metadata["health_endpoint"]} {
		if s := r.ports[localPort(endpoint)]; s != nil {
			return s, s.refuse(from)
		}
	}
	return nil, nil
}

// refuse fails where s is a component that flowctl started and the kernel knows
// that the caller is not of its process tree.
func (s *service) refuse(from origin) error {
	if s.member == nil || !from.known || from.component == s.member.id || from.unseen && s.member.inContainer {
		return nil
	}
	who := "component " + from.component
	switch from.component {
	case "":
		who = "a process that is no component of this pipeline"
	case commandID:
		who = "the command after --"
	}
	return status.Errorf(codes.PermissionDenied, "%s cannot speak for component %s: only its own processes can", who, s.member.id)
}

// localPort returns the port in a URL or a host:port with or without a path, "" if
// there is none or if it is that of an address beyond the loopback: another machine's
// ports say nothing of a component.
func localPort(endpoint string) string {
	hostport, _, _ := strings.Cut(endpoint, "/")
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		hostport = u.Host
	}
	host, port, err := net.SplitHostPort(hostport)
	if ip := net.ParseIP(host); err != nil || ip != nil && !ip.IsLoopback() && !ip.IsUnspecified() {
		return ""
	}
	return port
}

// recordLocked finds the record for reg, or makes one.
func (r *registry) recordLocked(reg *registration, from origin, now time.Time) (*service, error) {
	if s, err := r.identifyLocked(reg, from); s != nil || err != nil {
		return s, err
	}
	reg.id = cmp.Or(reg.id, reg.componentID, reg.metadata[metadataComponentID])
	if reg.id == "" {
		kind := strings.TrimPrefix(reg.kind.String(), "SERVICE_TYPE_")
		reg.id = strings.ToLower(kind + "-" + rand.Text()[:10])
	}
	for _, id := range []string{reg.id, reg.componentID} { // nameLocked would take both from who has them
		if s := r.service(id); s != nil {
			if err := s.refuse(from); err != nil {
				return nil, err
			}
		}
	}
	if s := r.service(reg.id); s != nil {
		return s, nil
	}
	if r.count >= maxServices && !r.evictLocked(now) {
		return nil, status.Errorf(codes.ResourceExhausted, "the registry is full: it holds %d services, and none of them is stale", maxServices)
	}
	r.count++
	return r.newServiceLocked(), nil
}

// evictLocked makes room: it forgets the service that has been silent for the
// longest time, if one is stale.
func (r *registry) evictLocked(now time.Time) bool {
	s := r.stale.front()
	if s == nil {
		return false
	}
	r.removeLocked(s, now)
	return true
}

// weighLocked takes note of how much s holds, after a change of that.
func (r *registry) weighLocked(s *service) {
	was := s.size
	s.size = int32(s.weight())
	r.bytes += int(s.size - was)
}

// fitLocked makes room for more bytes, or fails with RESOURCE_EXHAUSTED.
func (r *registry) fitLocked(more int, now time.Time) error {
	for r.bytes+more > maxBytes {
		if !r.evictLocked(now) {
			return status.Errorf(codes.ResourceExhausted, "the registry is full: its services hold %d bytes, and none of them is stale", r.bytes)
		}
	}
	return nil
}

// register takes a service in, or in again, and builds the answer by ack while
// nothing can change. The answer's id is the one that the service chose, if it did.
// It returns what durable is to wait for. It fails with PERMISSION_DENIED for one
// that poses as a component of the pipeline, and with RESOURCE_EXHAUSTED past a bound.
func (r *registry) register(reg registration, from origin, now time.Time, ack func(id string, topics []string, info map[string]string)) (uint64, error) {
	if err := reg.check(); err != nil {
		return 0, err
	}
	reg.cleanKind()
	now = r.lockAt(now)
	defer r.mu.Unlock()
	more := reg.size()
	if known := r.service(cmp.Or(reg.id, reg.componentID, reg.metadata[metadataComponentID])); known != nil {
		more -= int(known.size) // it takes the place of what it said before
	}
	if err := r.fitLocked(more, now); err != nil {
		return 0, err
	}
	s, err := r.recordLocked(&reg, from, now)
	if err != nil {
		return 0, err
	}
	reg.id = cmp.Or(reg.id, s.component())
	s.describeLocked(reg)
	r.nameLocked(s, now, reg.id, reg.componentID)
	if r.service(reg.id) != s { // it calls itself by another component's id
		s.rename(s.key())
	}
	s.registered, s.since = true, now // one that has ended stays so until starting
	s.declared, s.metrics = flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, nil
	r.weighLocked(s)
	r.seenLocked(s, now)
	r.noteLocked(s, now)
	r.changedLocked(s)
	ack(reg.id, s.topics(), r.connectionInfoLocked(s))
	return s.durable, nil
}

// nameLocked makes s known under ids. An id of another component of the pipeline
// stays that component's, any other goes to who registered last; a component that
// chose it too is still found by it through its own connections.
func (r *registry) nameLocked(s *service, now time.Time, ids ...string) {
	for _, id := range ids {
		known := r.service(id)
		others := known != nil && known != s && known.component() == id
		if id == "" || id == s.component() || others && s.member == nil {
			continue
		}
		s.names = s.names.without(id)
		if s.names.count() == maxIDs {
			r.unnameLocked(s, s.names.first())
		}
		s.names = s.names.with(id)
		if others {
			continue
		}
		r.services[id] = s.slot
		if known != nil && known != s {
			r.loseNameLocked(known, id, now)
		}
	}
}

// loseNameLocked takes note that id is another's from now on. A component is still
// found by it through its own connections; another service that has no other is gone.
func (r *registry) loseNameLocked(s *service, id string, now time.Time) {
	switch {
	case s.member == nil:
		if r.unnameLocked(s, id); s.names == "" {
			r.removeLocked(s, now)
			return
		}
	case s.id() == id:
		s.rename(s.key())
	}
	r.weighLocked(s)
	r.changedLocked(s)
}

// unnameLocked takes a name from s.
func (r *registry) unnameLocked(s *service, id string) {
	if r.service(id) == s {
		delete(r.services, id)
	}
	s.names = s.names.without(id)
	if s.id() == id && s.names != "" {
		s.rename(s.key())
	}
}

// unnameAllLocked takes all names from s, which goes by the one that it had.
func (r *registry) unnameAllLocked(s *service) {
	for name := range s.names.all() {
		if r.service(name) == s {
			delete(r.services, name)
		}
	}
	s.names = ""
}

// removeLocked takes a service that is not in the pipeline out.
func (r *registry) removeLocked(s *service, now time.Time) {
	r.unnameAllLocked(s)
	r.live.remove(s)
	r.stale.remove(s)
	s.registered = false
	r.count--
	r.noteLocked(s, now)
	s.said, s.metrics, s.earlier = (&details{id: s.id()}).pack(), nil, nil // it stays in all for a while
	r.weighLocked(s)
	r.changedLocked(s)
	if len(r.all) > 2*(r.count+r.members)+batch {
		r.all = slices.DeleteFunc(r.all, func(s *service) bool { return s.member == nil && !s.registered })
	}
}

// topics are the names under which what s puts out is to be found.
func (s *service) topics() []string {
	if s.kind != flowctlpb.ServiceType_SERVICE_TYPE_SOURCE && s.kind != flowctlpb.ServiceType_SERVICE_TYPE_PROCESSOR {
		return nil
	}
	topics := s.details().outputEvents
	for i, event := range topics {
		topics[i] = event + ".v1"
	}
	return topics
}

// connectionInfoLocked tells s where its inputs are, those that have registered,
// and where the control plane is.
func (r *registry) connectionInfoLocked(s *service) map[string]string {
	info := map[string]string{"control_plane_endpoint": r.endpoint}
	if s.member == nil {
		return info
	}
	info["control_plane_endpoint"] = cmp.Or(s.member.endpoint, r.endpoint)
	for _, id := range s.member.inputs {
		if in := r.service(id); in.registered {
			if endpoint := in.details().endpoint; endpoint != "" {
				info[id] = endpoint
			}
		}
	}
	return info
}

// heartbeat notes that the service id lives and runs merge to take in its metrics,
// where it brings some. A declared status other than UNKNOWN is kept until the
// next. The sign of life counts even where a metric is past its bound, and so do
// the other metrics. full says why metrics must not take more room, where they must not.
// Where the health of the service changes, it returns what durable is to wait for,
// else 0. It fails as callerLocked does.
func (r *registry) heartbeat(id string, from origin, declared flowctlv1.HealthStatus, now time.Time, merge func(s *service, full error) error) (change uint64, err error) {
	if id == "" {
		return 0, status.Error(codes.InvalidArgument, "service_id is empty")
	}
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s, err := r.callerLocked(id, from)
	if err != nil {
		return 0, err
	}
	known := s.latest.now
	if declared != s.declared && declared != flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN && flowctlv1.HealthStatus_name[int32(declared)] != "" {
		s.declared = declared
		if !s.held { // else it is told with what waits for the disk
			r.feed.touch(s)
		}
	}
	r.seenLocked(s, now)
	r.noteLocked(s, now)
	if s.latest.now != known {
		change = s.durable
	}
	held := len(s.metrics)
	err = merge(s, r.fitLocked(0, now))
	if len(s.metrics) != held {
		r.weighLocked(s)
	}
	return change, err
}

// callerLocked finds the service that calls itself id. Where two components of the
// pipeline do, the one from which the call comes is meant. It fails with NOT_FOUND for
// an id that nobody is registered under and with PERMISSION_DENIED for who is not it.
func (r *registry) callerLocked(id string, from origin) (*service, error) {
	if own := r.service(from.component); own != nil && own.registered && own.names.has(id) {
		return own, nil
	}
	if s := r.service(id); s != nil {
		if err := s.refuse(from); err != nil {
			return nil, err
		}
	}
	return r.findLocked(id)
}

// findLocked fails with NOT_FOUND for an id that nobody is registered under.
func (r *registry) findLocked(id string) (*service, error) {
	s := r.service(id)
	if s == nil || !s.registered {
		return nil, status.Errorf(codes.NotFound, "no service %q is registered", clip(id))
	}
	return s, nil
}

// unregister takes a service out and returns what durable is to wait for. It fails as
// callerLocked does.
func (r *registry) unregister(id string, from origin, now time.Time) (uint64, error) {
	if id == "" {
		return 0, status.Error(codes.InvalidArgument, "service_id is empty")
	}
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s, err := r.callerLocked(id, from)
	if err != nil {
		return 0, err
	}
	if s.member == nil {
		r.removeLocked(s, now)
		return s.durable, nil
	}
	ended := s.member.ended
	r.resetLocked(s)
	s.member.ended = ended
	r.noteLocked(s, now)
	r.changedLocked(s)
	return s.durable, nil
}

// view calls f with the service id and the time to judge it by, or fails with
// NOT_FOUND. f must not keep it.
func (r *registry) view(id string, now time.Time, f func(s *service, now time.Time)) error {
	if id == "" {
		return status.Error(codes.InvalidArgument, "service_id is empty")
	}
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s, err := r.findLocked(id)
	if err != nil {
		return err
	}
	f(s, now)
	return nil
}

// each calls f with every service, the pipeline's own first, which may not have
// registered, and then in the order of first registration, and the time to judge it by,
// until f returns false. f must not keep it.
func (r *registry) each(now time.Time, f func(s *service, now time.Time) bool) {
	r.mu.Lock()
	all := slices.Clone(r.all)
	r.mu.Unlock()
	for some := range slices.Chunk(all, batch) {
		now = r.lockAt(now)
		more := true
		for _, s := range some {
			if more = !s.registered && s.member == nil || f(s, now); !more {
				break
			}
		}
		if r.mu.Unlock(); !more {
			return
		}
	}
}

// key is the one id of a service that the registry is sure to know it under.
func (s *service) key() string {
	if s.member != nil {
		return s.member.id
	}
	return s.names.first()
}

// check applies the bounds.
func (reg *registration) check() error {
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
	if n := max(len(reg.metadata), len(reg.inputEvents), len(reg.outputEvents)); n > maxEntries {
		return status.Errorf(codes.ResourceExhausted, "a list or map of %d entries: at most %d are allowed", n, maxEntries)
	}
	for _, event := range slices.Concat(reg.inputEvents, reg.outputEvents) {
		if err := checkLength("an event type", event, maxID); err != nil {
			return err
		}
	}
	for k, v := range reg.metadata {
		if err := checkLength("a metadata key", k, maxID); err != nil {
			return err
		}
		if err := checkLength("a metadata value", v, maxText); err != nil {
			return err
		}
	}
	return nil
}

// entrySize is what an entry of a list or a map costs besides its texts, about.
const entrySize = 32

// size is how many bytes reg will hold, at most.
func (reg *registration) size() int {
	id := cmp.Or(reg.id, reg.componentID, reg.metadata[metadataComponentID])
	n := 2*len(id) + len(reg.componentID) + entrySize // as weight has names, and an entry of history
	for _, text := range slices.Concat([]string{reg.id, reg.componentID, reg.name, reg.description, reg.version, reg.endpoint}, reg.inputEvents, reg.outputEvents) {
		n += len(text) + entrySize/2
	}
	for k, v := range reg.metadata {
		n += len(k) + len(v) + entrySize
	}
	return n
}

func checkLength(what, text string, most int) error {
	if len(text) > most {
		return status.Errorf(codes.ResourceExhausted, "%s has %d bytes: at most %d are allowed", clip(what), len(text), most)
	}
	return nil
}

// cleanKind turns a type that this plane does not know into UNSPECIFIED.
func (reg *registration) cleanKind() {
	if flowctlpb.ServiceType_name[int32(reg.kind)] == "" {
		reg.kind = flowctlpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
	}
}

// healthChange is one entry of a service's history.
type healthChange struct {
	at    time.Time
	now   condition
	cause string
}

// service is one record of the registry. registry.mu guards it. There may be a hundred
// thousand, and while the garbage collector follows their pointers, heartbeats wait: so
// it has few, and takes 256 bytes.
type service struct {
	said       packed
	names      names       // ids that it chose, the latest last; one may be another component's by now
	member     *membership // nil: not in the pipeline
	record     int         // tells it from others
	lastSeen   time.Time
	since      time.Time // registered at
	metrics    metrics
	earlier    []healthChange // what history has before latest
	latest     healthChange   // at the zero time: history has nothing of it
	places     [placeKinds]place
	standing   // in what is written and what is told
	slot       slot
	size       int32 // weight, as registry.bytes has it
	kind       flowctlpb.ServiceType
	declared   flowctlv1.HealthStatus
	registered bool
	timeless   bool      // never stale: it has no heartbeat, its process stands for it
	told       condition // what the subscriber knows
	queued     bool      // waits in registry.changed
	held       bool      // is in journal.held
}

// membership is what there is of a service that is a component of the pipeline.
type membership struct {
	member
	process *processReport // nil until there is one
	ended   string         // how its process ended, "" while it lives
	failing string         // why its health check fails, "" while it passes
}

// id is the one that s chose last, if it has it.
func (s *service) id() string {
	said := s.said
	return said.text()
}

func (s *service) rename(id string) {
	others := s.said
	others.text()
	s.said = packed(appendText(nil, id)) + others
}

// history is how the health of s has changed.
func (s *service) history() iter.Seq[healthChange] {
	return func(yield func(healthChange) bool) {
		for _, h := range s.earlier {
			if !yield(h) {
				return
			}
		}
		if !s.latest.at.IsZero() {
			yield(s.latest)
		}
	}
}

// hasHistory is false where history gives nothing.
func (s *service) hasHistory() bool { return len(s.earlier) > 0 || !s.latest.at.IsZero() }

// setHistory is for a service whose health is known to be now.
func (s *service) setHistory(changes []healthChange, now condition) {
	s.earlier, s.latest = changes, healthChange{now: now}
	if last := len(changes) - 1; last >= 0 && changes[last].now == now && !changes[last].at.IsZero() {
		s.earlier, s.latest = slices.Clone(changes[:last]), changes[last]
	}
}

// noteChange makes a change the latest. The first of too many are forgotten.
func (s *service) noteChange(h healthChange) {
	if !s.latest.at.IsZero() {
		s.earlier = append(s.earlier, s.latest)
	}
	s.earlier = slices.Delete(s.earlier, 0, max(0, len(s.earlier)+1-maxHistory))
	s.latest = h
}

// weight is how many bytes s holds that another would not. What is gone is forgotten
// soon.
func (s *service) weight() int {
	if s.member == nil && !s.registered {
		return 0
	}
	n := len(s.said) - len(nothing) + len(s.metrics)
	for name := range s.names.all() {
		n += 2*len(name) + entrySize // registry.services has it, too
	}
	for h := range s.history() {
		n += len(h.cause) + entrySize
	}
	return n
}

// details are what a service says of itself for others to read.
type details struct {
	id                                   string
	name, description, version, endpoint string
	inputEvents, outputEvents            []string
	labels                               labels
	maxInflight                          int32
}

// packed are details one after the other, each text behind its length. There may be a
// hundred thousand services whose details nobody reads: as a string each, and slices of
// such, they were most of what the garbage collector had to follow, again and again,
// while heartbeats waited.
type packed string

func (w *details) pack() packed {
	var b []byte
	number := func(n int) { b = bin.AppendUvarint(b, uint64(n)) }
	text := func(s string) { b = appendText(b, s) }
	for _, s := range []string{w.id, w.name, w.description, w.version, w.endpoint} {
		text(s)
	}
	for _, events := range [][]string{w.inputEvents, w.outputEvents} {
		number(len(events))
		for _, event := range events {
			text(event)
		}
	}
	number(len(w.labels))
	for _, label := range w.labels {
		text(label.name)
		text(label.value)
	}
	number(int(uint32(w.maxInflight)))
	return packed(b)
}

// appendText appends a text behind its length.
func appendText(b []byte, s string) []byte {
	return append(bin.AppendUvarint(b, uint64(len(s))), s...)
}

// number takes a number off the front.
func (p *packed) number() (n int) {
	rest, shift := *p, 0
	for rest[0] >= 0x80 {
		n |= int(rest[0]&0x7f) << shift
		rest, shift = rest[1:], shift+7
	}
	n |= int(rest[0]) << shift
	*p = rest[1:]
	return n
}

// text takes a text off the front.
func (p *packed) text() string {
	n := p.number()
	s := string((*p)[:n])
	*p = (*p)[n:]
	return s
}

// nothing is what a service has said that has not said anything.
var nothing = (&details{}).pack()

// unpack takes p apart into w, whose slices it uses again.
func (p packed) unpack(w *details) {
	for _, s := range []*string{&w.id, &w.name, &w.description, &w.version, &w.endpoint} {
		*s = p.text()
	}
	for _, events := range []*[]string{&w.inputEvents, &w.outputEvents} {
		*events = (*events)[:0]
		for range p.number() {
			*events = append(*events, p.text())
		}
	}
	w.labels = w.labels[:0]
	for range p.number() {
		w.labels = append(w.labels, label{p.text(), p.text()})
	}
	w.maxInflight = int32(uint32(p.number()))
}

// names are ids, packed one after the other: most services have one.
type names packed

// all gives each id.
func (n names) all() iter.Seq[string] {
	return func(yield func(string) bool) {
		for p := packed(n); len(p) > 0; {
			if !yield(p.text()) {
				return
			}
		}
	}
}

func (n names) has(id string) bool {
	for name := range n.all() {
		if name == id {
			return true
		}
	}
	return false
}

func (n names) count() (count int) {
	for range n.all() {
		count++
	}
	return count
}

// first is "" where there is none.
func (n names) first() string {
	for name := range n.all() {
		return name
	}
	return ""
}

// with is n with id at the end.
func (n names) with(id string) names { return names(appendText([]byte(n), id)) }

func (n names) without(id string) (out names) {
	for name := range n.all() {
		if name != id {
			out = out.with(name)
		}
	}
	return out
}

// details are those of s, for the caller to keep.
func (s *service) details() *details {
	w := &details{}
	s.said.unpack(w)
	return w
}

// labels are a service's metadata, by name.
type labels []label

type label struct{ name, value string }

func newLabels(m map[string]string) labels {
	l := make(labels, 0, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		l = append(l, label{name, m[name]})
	}
	return l
}

func (l labels) has(name, value string) bool { return slices.Contains(l, label{name, value}) }

// toMap is nil for none.
func (l labels) toMap() map[string]string {
	if len(l) == 0 {
		return nil
	}
	m := make(map[string]string, len(l))
	for _, label := range l {
		m[label.name] = label.value
	}
	return m
}

// metric is one value as it was sent: a number from the legacy dialect, a text
// from v1.
type metric struct {
	number float64
	text   string
	isText bool
	digits bool // its text is what String makes of number, and not kept
}

// compact is m without a text that its number stands for, as most texts are numbers.
func (m metric) compact() metric {
	if !m.isText || m.text == "" || m.text[0] != '-' && (m.text[0] < '0' || m.text[0] > '9') {
		return m
	}
	f, err := strconv.ParseFloat(m.text, 64)
	var buf [32]byte
	if err != nil || string(strconv.AppendFloat(buf[:0], f, 'g', -1, 64)) != m.text {
		return m
	}
	return metric{number: f, isText: true, digits: true}
}

func (m metric) String() string {
	if m.isText && !m.digits {
		return m.text
	}
	return strconv.FormatFloat(m.number, 'g', -1, 64)
}

// float returns false for a text that is no number.
func (m metric) float() (float64, bool) {
	if !m.isText || m.digits {
		return m.number, true
	}
	f, err := strconv.ParseFloat(m.text, 64)
	return f, err == nil
}

// metrics are values by name, one after the other in the order of their names: the
// name behind its length, and the value behind its own, of which the first byte is its
// kind. It is what packed is, but for values that change all the time.
type metrics []byte

// The kinds of a value in metrics.
const (
	aNumber = iota // then the eight bytes of a float64
	digits         // as that, but it came as a text, which is what String makes of it
	aText
)

// append appends an entry.
func (m metrics) append(name string, v metric) metrics {
	b := appendText(m, name)
	switch {
	case v.isText && !v.digits:
		b = bin.AppendUvarint(b, uint64(1+len(v.text)))
		return append(append(b, aText), v.text...)
	case v.isText:
		b = append(b, 9, digits)
	default:
		b = append(b, 9, aNumber)
	}
	return bin.LittleEndian.AppendUint64(b, math.Float64bits(v.number))
}

// next takes the first entry apart.
func (m metrics) next() (name, value []byte, rest metrics) {
	n, length := bin.Uvarint(m)
	name, m = m[length:length+int(n)], m[length+int(n):]
	n, length = bin.Uvarint(m)
	return name, m[length : length+int(n)], m[length+int(n):]
}

// find returns the value of a metric, nil where there is none of that name.
func (m metrics) find(name string) []byte {
	for len(m) > 0 {
		other, value, rest := m.next()
		if string(other) >= name {
			if string(other) == name {
				return value
			}
			break
		}
		m = rest
	}
	return nil
}

func (m metrics) count() (n int) {
	for ; len(m) > 0; n++ {
		_, _, m = m.next()
	}
	return n
}

// put writes v over a value, if it takes as much room.
func (v metric) put(value []byte) bool {
	text := v.isText && !v.digits
	if text != (value[0] == aText) || text && len(value) != 1+len(v.text) {
		return false
	}
	if text {
		copy(value[1:], v.text)
		return true
	}
	value[0] = aNumber
	if v.digits {
		value[0] = digits
	}
	bin.LittleEndian.PutUint64(value[1:], math.Float64bits(v.number))
	return true
}

// named is a metric with its name.
type named struct {
	name string
	metric
}

// merge is m with changes to it, whose names are in order. It has no spare capacity.
func (m metrics) merge(changes []named) metrics {
	var out metrics
	for _, c := range changes {
		for len(m) > 0 {
			name, _, rest := m.next()
			if string(name) > c.name {
				break
			}
			if string(name) < c.name {
				out = append(out, m[:len(m)-len(rest)]...)
			}
			m = rest
		}
		out = out.append(c.name, c.metric)
	}
	return slices.Concat(out, m)
}

// all gives each metric by name.
func (m metrics) all() iter.Seq2[string, metric] {
	return func(yield func(string, metric) bool) {
		for len(m) > 0 {
			var name, value []byte
			if name, value, m = m.next(); !yield(string(name), metricOf(value)) {
				return
			}
		}
	}
}

func metricOf(value []byte) metric {
	if value[0] == aText {
		return metric{text: string(value[1:]), isText: true}
	}
	return metric{number: math.Float64frombits(bin.LittleEndian.Uint64(value[1:])), isText: value[0] == digits, digits: value[0] == digits}
}

// These are made once because one message can bring a hundred thousand metrics.
var (
	errMetrics     = status.Errorf(codes.ResourceExhausted, "too many metrics: a service has at most %d", maxEntries)
	errMetricName  = status.Errorf(codes.ResourceExhausted, "the name of a metric has more than %d bytes", maxID)
	errMetricValue = status.Errorf(codes.ResourceExhausted, "the value of a metric has more than %d bytes", maxText)
)

// takeMetrics merges in what a heartbeat brings. It takes what it can, and fails for what
// is past a bound, and with full where that is set for what would take more room.
func takeMetrics[V any](s *service, in map[string]V, as func(V) metric, full error) (err error) {
	t := taking{service: s, full: full}
	if len(in) <= maxEntries {
		for name, v := range in {
			err = cmp.Or(t.take(name, as(v)), err)
		}
		t.end()
		return err
	}
	// There may be a hundred thousand, most of which there is no room for: the known ones
	// are looked up in the message, and not each of the message among them.
	for name := range s.metrics.all() {
		if v, ok := in[name]; ok {
			_ = t.take(name, as(v))
		}
	}
	for name, v := range in {
		if len(name) > maxID || s.metrics.find(name) != nil {
			continue
		}
		if err := t.take(name, as(v)); err != nil && (err == errMetrics || err == full) {
			break
		}
	}
	t.end()
	return errMetrics
}

// taking is a heartbeat whose metrics are merged in: most in place, the others together
// at the end.
type taking struct {
	*service
	full    error
	changes []named
	count   int // metrics with the new ones, 0 before the first of these
}

// take changes a metric in place or notes that it will change. It fails, and takes
// nothing, for what is past a bound.
func (t *taking) take(name string, m metric) error {
	switch {
	case len(name) > maxID:
		return errMetricName
	case len(m.text) > maxText:
		return errMetricValue
	}
	m = m.compact()
	value := t.metrics.find(name)
	if value != nil && m.put(value) {
		return nil
	}
	if t.full != nil && (value == nil || 1+len(m.text) > len(value)) {
		return t.full
	}
	if value == nil {
		if t.count == 0 {
			t.count = t.metrics.count()
		}
		if t.count >= maxEntries {
			return errMetrics
		}
		t.count++
	}
	t.changes = append(t.changes, named{name, m})
	return nil
}

// end makes room for what has none in place.
func (t *taking) end() {
	if len(t.changes) > 0 {
		slices.SortFunc(t.changes, func(a, b named) int { return cmp.Compare(a.name, b.name) })
		t.metrics = t.metrics.merge(t.changes)
	}
}

// slot is where a service is found in a table, 0 for none. Chains and the map of ids
// refer to services by slot and not by pointer: to follow these was most of the garbage
// collector's work.
type slot int32

// table has the services that there are, by slot.
type table struct {
	services []*service
	free     []slot
}

func newTable() *table { return &table{services: []*service{nil}} }

// add gives s a slot.
func (t *table) add(s *service) {
	if last := len(t.free) - 1; last >= 0 {
		s.slot, t.free = t.free[last], t.free[:last]
		t.services[s.slot] = s
		return
	}
	s.slot = slot(len(t.services))
	t.services = append(t.services, s)
}

// drop takes the slot of s back, if it has one. Nothing leads there any more.
func (t *table) drop(s *service) {
	if s.slot != 0 {
		t.services[s.slot] = nil
		t.free = append(t.free, s.slot)
		s.slot = 0
	}
}

// A chain is services one behind the other, each of which knows its neighbours.
type chain struct {
	*table
	kind        int // which of the places of its services is that in it
	first, last slot
	length      int
}

// The chains of a registry, in each of which a service has a place.
const (
	amongLive    = iota // in registry.live
	amongStale          // in registry.stale
	amongChanged        // in feed.recent
	placeKinds
)

// place is between which others a service stands, if it does.
type place struct{ prev, next slot }

func (c *chain) front() *service { return c.services[c.first] }

func (c *chain) back() *service { return c.services[c.last] }

func (c *chain) next(s *service) *service { return c.services[s.places[c.kind].next] }

func (c *chain) has(s *service) bool {
	return s.places[c.kind].prev != 0 || c.first == s.slot && s.slot != 0
}

// insert puts s behind at, or first where that is nil. It leaves where it was.
func (c *chain) insert(s, at *service) {
	c.remove(s)
	here := place{next: c.first}
	if at != nil {
		here = place{at.slot, at.places[c.kind].next}
	}
	c.join(here.prev, s.slot)
	c.join(s.slot, here.next)
	c.length++
}

// remove takes s out, if it is in c.
func (c *chain) remove(s *service) {
	if c.has(s) {
		c.join(s.places[c.kind].prev, s.places[c.kind].next)
		s.places[c.kind] = place{}
		c.length--
	}
}

// join makes two neighbours, of which the end of the chain may be one.
func (c *chain) join(prev, next slot) {
	if prev != 0 {
		c.services[prev].places[c.kind].next = next
	} else {
		c.first = next
	}
	if next != 0 {
		c.services[next].places[c.kind].prev = prev
	} else {
		c.last = prev
	}
}

// moveToBack makes s the last.
func (c *chain) moveToBack(s *service) {
	if c.last != s.slot {
		c.insert(s, c.back())
	}
}

// pipelineInfo is what the operator service tells of the pipeline as a whole.
type pipelineInfo struct {
	name    string // "" for a control plane alone
	version string
	started time.Time
	status  string // in one line
	ready   bool
}

// standing is where a service stands in what is written and what is told.
type standing struct {
	durable  uint64 // journal.count at its last change
	revision uint64 // feed.revision when its last change was let out
}

// feed is what has changed, in order, so that any number of streams can each go on
// from where it stands: what one misses costs no memory, because a service stands in
// it once, at its last change. registry.mu guards it.
type feed struct {
	info      pipelineInfo
	revision  uint64
	stirred   uint64    // revision of info, and of whether the registry is durable
	recent    chain     // the one that changed last at the end, and the mark of each follower, behind what it has told
	removed   []removal // the last at the end
	lost      uint64    // removals up to this revision are forgotten
	news      chan struct{}
	followers int // streams that go on
	snapshots int // streams that do not
}

type removal struct {
	record   int
	revision uint64
}

func newFeed(t *table) feed { return feed{recent: chain{table: t, kind: amongChanged}} }

// touch lets out that s has changed.
func (f *feed) touch(s *service) {
	f.announce()
	s.revision = f.revision
	switch {
	case s.member == nil && !s.registered:
		f.recent.remove(s)
		f.remove(removal{s.record, f.revision}) // a snapshot may have told of it before it came here
		f.recent.drop(s)
	default:
		f.recent.moveToBack(s)
	}
}

func (f *feed) remove(r removal) {
	if len(f.removed) == maxRemoved {
		f.lost = f.removed[0].revision
		f.removed = slices.Delete(f.removed, 0, 1)
	}
	f.removed = append(f.removed, r)
}

// report lets out that what is said of the pipeline as a whole has changed.
func (f *feed) report(info pipelineInfo) {
	if info != f.info {
		f.info = info
		f.stir()
	}
}

func (f *feed) stir() {
	f.announce()
	f.stirred = f.revision
}

// announce wakes the streams that wait.
func (f *feed) announce() {
	f.revision++
	if f.news != nil {
		close(f.news)
		f.news = nil
	}
}

// wait returns what is closed at the next change.
func (f *feed) wait() <-chan struct{} {
	if f.news == nil {
		f.news = make(chan struct{})
	}
	return f.news
}

// journal tells how far the registry is on disk. What changes is held back until
// it is, unless there is no store or the disk does not take it.
type journal struct {
	on      bool
	count   uint64        // of all changes
	done    uint64        // so many are on disk
	held    []*service    // changed since, and nobody was told
	dirty   chan struct{} // gets a token when there is something to write
	written chan struct{} // closed and replaced when done or broken have changed
	broken  error         // why the last write failed
	heard   bool          // something was heard of since the last write began
}

// hold counts a change of s and tells whether it is to be kept from others for now.
func (j *journal) hold(s *service) bool {
	if !j.on {
		return false
	}
	j.count++
	s.durable = j.count
	j.wake()
	if j.broken != nil {
		return false
	}
	if !s.held {
		s.held = true
		j.held = append(j.held, s)
	}
	return true
}

// wake has the state file written.
func (j *journal) wake() {
	select {
	case j.dirty <- struct{}{}:
	default:
	}
}

// Of many services is told in no hurry: all at once, it would take the processors from
// the heartbeats for seconds, here and where it is read.
const (
	toldAtOnce = 1024 // services before the first pause
	toldPause  = 3 * time.Millisecond
	maxPart    = 64 << 10 // bytes that the services of a message weigh, but for the last of them
)

const (
	maxFollowers = 256  // streams of changes at a time, and of snapshots
	maxRemoved   = 4096 // removals that are remembered for streams that are behind
)
