package main

// Who is registered with the control plane and how healthy it is, the janitor, and who is
// told of changes.

import (
	"cmp"
	"container/list"
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// batch is how many services are gone through while the registry is locked: less than a
// millisecond of work, so that no heartbeat waits longer.
const batch = 64

// minGap is the shortest time without a look at the clock that counts as a stop of flowctl,
// unless the TTL is short, too: less is a busy machine.
const minGap = time.Second

// acknowledgement is what a service is told that has registered.
type acknowledgement struct {
	id             string // the one that it chose, if it did
	topics         []string
	connectionInfo map[string]string
	unreachable    string // its endpoint, where a person is to be told that others do not reach it
}

// pipelineInfo is what the operator service tells of the pipeline as a whole.
type pipelineInfo struct {
	name    string // "" for a control plane alone
	version string
	started time.Time
	status  string // in one line
	ready   bool
	runID   string
	file    string // the pipeline file, as it was read
}

// change tells the run how a service is now. Changes that follow each other faster than
// they are taken are told as one.
type change struct {
	id        string
	component string // "" when it is not of the pipeline
	now, was  condition
	cause     string // why it is not healthy
}

// registry holds what has registered. Health is never stored but derived from what was
// heard and from the time at which it is asked for, so no answer waits for the janitor.
// Every method that depends on time takes it as an argument. Methods whose names end in
// Locked, and all methods of services, need mu; the others take it.
type registry struct {
	ttl         time.Duration
	interval    time.Duration   // the janitor sleeps no longer
	forget      time.Duration   // what is not of the pipeline and has been stale for so long is taken out; 0 for never
	endpoint    string          // where the plane is, as it tells
	stateFile   string          // "" for none
	keepsOthers bool            // the state file has what is not of the pipeline, too
	wake        chan struct{}   // gets a token when there are changes to take
	publish     func(seq int64) // hears of a change of a service or of its end, and by 0 of one of the pipeline as a whole; mu is held

	mu          sync.Mutex          // guards the fields below, and all services
	members     []*service          // components of the pipeline, in the order of the file
	others      []*service          // in the order of first registration; what is gone is taken out now and then
	guests                          // sums of others
	byID        map[string]*service // by each id that one is known under
	bySeq       map[int64]*service
	byPort      map[string]*service // members by HEALTH_PORT; nil for a port of several
	lastSeq     int64
	live        list.List     // services with a heartbeat to come, the longest silent first
	stale       list.List     // others without one, the longest silent first
	changed     []*service    // to be told of by changes
	lastNow     time.Time     // the latest time that any method was given
	graceFrom   time.Time     // silence before this moment is not held against anyone
	lost        time.Duration // in which flowctl did not run, all in all
	pipeline    pipelineInfo
	persistence persistence
}

// guests sums up the services that are not of the pipeline. registry.mu guards it.
type guests struct {
	otherCount int       // of those that are not gone
	otherBytes int       // of what those say of themselves
	warned     time.Time // until then nobody is told again that an endpoint of one cannot be reached
}

// persistence is how far the registry is on disk. Who is told of changes has to wait
// until they are, unless there is no state file or the disk does not take it. registry.mu
// guards it.
type persistence struct {
	on      bool
	changes uint64        // how many there were
	onDisk  uint64        // how many of them are in the state file
	pending []*service    // have changed since, and nobody was told
	dirty   chan struct{} // gets a token when there is something to write
	written chan struct{} // closed and replaced when onDisk or err have changed
	err     error         // why the last write failed
	heard   bool          // something was heard of since the last write began
}

// newRegistry returns a registry that knows members before they register.
func newRegistry(ttl, interval time.Duration, endpoint string, members []member) *registry {
	r := &registry{
		ttl: ttl, interval: interval, endpoint: endpoint, keepsOthers: !slices.ContainsFunc(members, func(m member) bool { return !m.elsewhere }),
		wake: make(chan struct{}, 1), publish: func(int64) {},
		byID: make(map[string]*service), bySeq: make(map[int64]*service), byPort: make(map[string]*service),
		persistence: persistence{dirty: make(chan struct{}, 1), written: make(chan struct{})},
	}
	r.setMembersLocked(members, time.Time{})
	return r
}

// lockAt locks the registry and notes the time. The janitor does so at least twice in
// maxGap, so a longer gap means that flowctl did not run: heartbeats could not be heard,
// and everyone gets one TTL from now on. It returns the time to go on with: who looked at
// the clock first may come to the lock last, and must not judge by a time that has passed.
// Times keep their reading of the monotonic clock, so it does not matter if the other one is set.
func (r *registry) lockAt(now time.Time) time.Time {
	r.mu.Lock()
	gap := now.Sub(r.lastNow)
	if !r.lastNow.IsZero() && gap > max(r.maxGap(), min(minGap, r.ttl/2)) {
		r.graceFrom = now
		r.lost += gap
	}
	if now.After(r.lastNow) {
		r.lastNow = now
	}
	return r.lastNow
}

// patience is how long nothing may be heard of a service: a tenth more than the TTL, as many clients
// heartbeat once in exactly that.
func (r *registry) patience() time.Duration { return r.ttl + r.ttl/10 }

// maxGap is the longest time without a look at the clock in which flowctl runs. It is short
// enough for nobody to go stale in it who heartbeats as told, each third of the TTL.
func (r *registry) maxGap() time.Duration { return min(r.interval, r.ttl/3) }

// stopped returns how long flowctl has not run so far, because it was stopped or the
// machine suspended. Deadlines of others are to be put off by what that grows.
func (r *registry) stopped(now time.Time) time.Duration {
	r.lockAt(now)
	defer r.mu.Unlock()
	return r.lost
}

// register takes a service in, or in again. It returns the number of the change that has
// to be on disk before the caller is answered. Errors: PERMISSION_DENIED for one that poses
// as a component of the pipeline, RESOURCE_EXHAUSTED past a bound.
func (r *registry) register(reg registration, from origin, now time.Time) (acknowledgement, uint64, error) {
	if err := reg.check(); err != nil {
		return acknowledgement{}, 0, err
	}
	if flowctlpb.ServiceType_name[int32(reg.kind)] == "" {
		reg.kind = flowctlpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
	}
	endpoint, unreachable := completed(reg.endpoint, from.address)
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s, err := r.recordLocked(&reg, from, now) // by what it said: a HEALTH_PORT is in that
	if err != nil {
		return acknowledgement{}, 0, err
	}
	reg.id = cmp.Or(reg.id, s.component())
	reg.endpoint, reg.unreachable = endpoint, unreachable
	ack := acknowledgement{id: reg.id, unreachable: r.warnLocked(s, &reg, now)}
	s.registerBy(from)
	s.describe(reg)
	r.countLocked(s)
	r.nameLocked(s, from, now, reg.id, reg.componentID)
	if r.byID[reg.id] != s { // it calls itself by another's id
		s.said.id = s.key()
	}
	s.registered, s.registeredAt = true, now // one that has ended stays so until starting
	s.declared, s.metrics = flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN, nil
	r.seenLocked(s, now)
	r.noteLocked(s, now)
	r.changedLocked(s)
	if s.member != nil && s.member.elsewhere { // its endpoint can be another one, though it is as healthy as before
		wake(r.wake)
	}
	ack.topics, ack.connectionInfo = s.topics(), r.connectionInfoLocked(s)
	return ack, s.changeNumber, nil
}

// warnLocked returns the endpoint of reg, by which s registers, if a person is to be told that others do not reach it: once for
// each component, and for what is not of the pipeline once a minute.
func (r *registry) warnLocked(s *service, reg *registration, now time.Time) string {
	if !reg.unreachable || s.said.unreachable && s.said.endpoint == reg.endpoint || s.member == nil && now.Before(r.warned) {
		return ""
	}
	if s.member == nil {
		r.warned = now.Add(time.Minute)
	}
	return reg.endpoint
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
		if s := r.byID[id]; s != nil && (s.member != nil || s.stale == nil) {
			if err := s.refuse(from); err != nil {
				return nil, err
			}
		}
	}
	s := r.byID[reg.id]
	if err := r.makeRoomLocked(s, reg.size(), now); err != nil || s != nil {
		return s, err
	}
	return r.addOtherLocked(), nil
}

// makeRoomLocked makes room for a service that is not of the pipeline, nil for a new one, and
// so many bytes of text: those that have been stale for the longest time give way. Errors:
// RESOURCE_EXHAUSTED.
func (r *registry) makeRoomLocked(s *service, size int, now time.Time) error {
	most, mostBytes := r.mostOthers()
	for {
		count, bytes := r.otherCount+1, r.otherBytes+size
		if s != nil {
			count, bytes = count-1, bytes-s.counted
		}
		silent := r.stale.Front()
		if silent != nil && silent.Value == s {
			silent = silent.Next()
		}
		switch {
		case count <= most && bytes <= mostBytes:
			return nil
		case silent == nil:
			return status.Errorf(codes.ResourceExhausted, "the registry is full: what is not of a pipeline has at most %d services and %d bytes, and none of them is stale", most, mostBytes)
		}
		r.removeLocked(silent.Value.(*service), now)
	}
}

// mostOthers returns how many services there may be that are not of the pipeline, and how many
// bytes they may have together.
func (r *registry) mostOthers() (count, bytes int) {
	if len(r.members) > 0 {
		return maxGuests, maxGuestBytes
	}
	return maxServices, maxOtherBytes
}

// countLocked takes the size of s into that of all that are not of the pipeline.
func (r *registry) countLocked(s *service) {
	if s.member == nil {
		r.otherBytes += s.bytes - s.counted
		s.counted = s.bytes
	}
}

// addOtherLocked makes a record of a service that is not of the pipeline. No id leads to it.
func (r *registry) addOtherLocked() *service {
	s := r.newServiceLocked()
	r.others = append(r.others, s)
	r.otherCount++
	return s
}

func (r *registry) newServiceLocked() *service {
	r.lastSeq++
	s := &service{seq: r.lastSeq, noted: notRegistered}
	r.bySeq[s.seq] = s
	return s
}

// identifyLocked finds the component of the pipeline that reg comes from, or nil. Errors:
// PERMISSION_DENIED where the caller is known not to be of it.
func (r *registry) identifyLocked(reg *registration, from origin) (*service, error) {
	for _, id := range []string{reg.componentID, reg.metadata[metadataComponentID], reg.id} {
		if s := r.memberLocked(id); s != nil {
			return s, s.refuse(from)
		}
	}
	if s := r.memberLocked(from.component); s != nil {
		return s, s.refuse(from)
	}
	if s := r.memberLocked(from.certified); s != nil {
		return s, nil
	}
	for _, endpoint := range []string{reg.endpoint, reg.metadata["health_endpoint"]} {
		if s := r.byPort[localPort(endpoint)]; s != nil {
			return s, s.refuse(from)
		}
	}
	return nil, nil
}

// memberLocked returns the component of the pipeline with that id in the file, nil for none.
func (r *registry) memberLocked(id string) *service {
	if s := r.byID[id]; s != nil && s.component() == id && id != "" {
		return s
	}
	return nil
}

// nameLocked makes s known under ids. An id of another component of the pipeline stays that
// component's, and one of a guest that is not stale and is not the caller's stays that guest's:
// nobody can take it, nor keep a component from registering by having it. Any other goes to who
// registered last. A component that chose it too is still found by it through its own connections.
func (r *registry) nameLocked(s *service, from origin, now time.Time, ids ...string) {
	for _, id := range ids {
		known := r.byID[id]
		others := known != nil && known != s &&
			(known.component() == id || known.member == nil && known.stale == nil && known.refuse(from) != nil)
		if id == "" || id == s.component() || others && s.member == nil {
			continue
		}
		s.names = without(s.names, id)
		if len(s.names) == maxNames {
			r.unnameLocked(s, s.names[0])
		}
		s.names = append(s.names, id)
		if others {
			continue
		}
		r.byID[id] = s
		if known != nil && known != s {
			r.loseNameLocked(known, id, now)
		}
	}
}

// loseNameLocked takes note that id is another's from now on. A component is still found by
// it through its own connections; another service that has no other id is gone.
func (r *registry) loseNameLocked(s *service, id string, now time.Time) {
	switch {
	case s.member == nil:
		if r.unnameLocked(s, id); len(s.names) == 0 {
			r.removeLocked(s, now)
			return
		}
	case s.said.id == id:
		s.said.id = s.key()
	}
	r.changedLocked(s)
}

// unnameLocked takes an id from s.
func (r *registry) unnameLocked(s *service, id string) {
	if r.byID[id] == s {
		delete(r.byID, id)
	}
	s.names = without(s.names, id)
	if s.said.id == id {
		s.said.id = s.key()
	}
}

// connectionInfoLocked tells s where its inputs are, those that have registered, and where
// the control plane is.
func (r *registry) connectionInfoLocked(s *service) map[string]string {
	info := map[string]string{"control_plane_endpoint": r.endpoint}
	if s.member == nil {
		return info
	}
	info["control_plane_endpoint"] = cmp.Or(s.member.endpoint, r.endpoint)
	for _, id := range s.member.inputs {
		if in := r.memberLocked(id); in != nil && in.registered && in.reach() != "" {
			info[id] = in.reach()
		}
	}
	return info
}

// heartbeat records a sign of life of the service id. It returns the number of the change
// that has to be on disk before the caller is answered, 0 for none. Status UNKNOWN keeps
// what was declared. A metric past a bound is refused; the sign of life and the other
// metrics count all the same. Errors: INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED,
// RESOURCE_EXHAUSTED.
func (r *registry) heartbeat(id string, from origin, declared flowctlv1.HealthStatus, metrics []metric, now time.Time) (uint64, error) {
	if id == "" {
		return 0, errNoServiceID
	}
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s, err := r.callerLocked(id, from)
	if err != nil {
		return 0, err
	}
	newWord := declared != s.declared && declared != flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN && flowctlv1.HealthStatus_name[int32(declared)] != ""
	if newWord {
		s.declared = declared
	}
	r.seenLocked(s, now)
	number := uint64(0)
	if r.noteLocked(s, now) {
		r.changedLocked(s)
		number = s.changeNumber
	} else if newWord && !s.isPending {
		r.publish(s.seq)
	}
	return number, r.mergeLocked(s, metrics)
}

// mergeLocked takes metrics in, where there is room. Errors: RESOURCE_EXHAUSTED.
func (r *registry) mergeLocked(s *service, metrics []metric) error {
	if _, most := r.mostOthers(); s.member == nil && r.otherBytes+maxServiceBytes-s.counted > most && len(metrics) > 0 {
		return errRegistryFull
	}
	err := s.merge(metrics)
	r.countLocked(s)
	return err
}

// callerLocked finds the service that calls itself id. Where two components of the pipeline
// do, the one from which the call comes is meant. Errors: NOT_FOUND, PERMISSION_DENIED.
func (r *registry) callerLocked(id string, from origin) (*service, error) {
	if own := r.byID[cmp.Or(from.component, from.certified)]; own != nil && own.registered && slices.Contains(own.names, id) {
		return own, nil
	}
	if s := r.byID[id]; s != nil {
		if err := s.refuse(from); err != nil {
			return nil, err
		}
	}
	return r.findLocked(id)
}

// findLocked fails with NOT_FOUND for an id that nobody is registered under.
func (r *registry) findLocked(id string) (*service, error) {
	s := r.byID[id]
	if s == nil || !s.registered {
		return nil, status.Errorf(codes.NotFound, "no service %q is registered", clip(id))
	}
	return s, nil
}

// unregister takes a service out. It returns the number of the change that has to be on
// disk before the caller is answered. Errors: INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED.
func (r *registry) unregister(id string, from origin, now time.Time) (uint64, error) {
	if id == "" {
		return 0, errNoServiceID
	}
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s, err := r.callerLocked(id, from)
	if err != nil {
		return 0, err
	}
	if slices.Contains(s.formerConns, from.conn) {
		return 0, status.Errorf(codes.NotFound, "service %q has registered anew since, by another connection", clip(id))
	}
	if s.member == nil {
		r.removeLocked(s, now)
		return s.changeNumber, nil
	}
	ended := s.member.ended
	r.resetLocked(s)
	s.member.ended = ended
	r.noteLocked(s, now)
	r.changedLocked(s)
	return s.changeNumber, nil
}

// removeLocked takes out a service that is not of the pipeline.
func (r *registry) removeLocked(s *service, now time.Time) {
	r.otherCount--
	r.otherBytes -= s.counted
	r.forgetLocked(s, now)
	if len(r.others) > 2*r.otherCount+batch {
		r.others = slices.DeleteFunc(r.others, (*service).gone)
	}
}

// forgetLocked takes out a service, and tells of its end.
func (r *registry) forgetLocked(s *service, now time.Time) {
	r.unnameAllLocked(s)
	r.unqueueLocked(s)
	delete(r.bySeq, s.seq)
	s.registered, s.member = false, nil
	s.said, s.metrics, s.history = registration{id: s.said.id}, nil, nil
	r.noteLocked(s, now)
	r.changedLocked(s)
}

// unnameAllLocked takes all ids that s chose from it. It goes by the one that it had.
func (r *registry) unnameAllLocked(s *service) {
	for _, name := range s.names {
		if r.byID[name] == s && name != s.component() {
			delete(r.byID, name)
		}
	}
	s.names = nil
}

func (r *registry) unqueueLocked(s *service) {
	if s.live != nil {
		r.live.Remove(s.live)
	}
	if s.stale != nil {
		r.stale.Remove(s.stale)
	}
	s.live, s.stale = nil, nil
}

// seenLocked notes a sign of life.
func (r *registry) seenLocked(s *service, now time.Time) {
	s.lastSeen, r.persistence.heard = now, true
	switch {
	case s.live != nil && !s.noTTL:
		r.live.MoveToBack(s.live)
	case s.noTTL:
		r.unqueueLocked(s)
	default:
		r.unqueueLocked(s)
		s.live = r.live.PushBack(s)
	}
}

// healthLocked judges s at the time now.
func (r *registry) healthLocked(s *service, now time.Time) serviceHealth {
	var ended, failing, stuck string
	if s.member != nil {
		ended, failing, stuck = s.member.ended, s.member.failing, s.member.stuck
	}
	switch {
	case ended != "":
		return serviceHealth{condition: unhealthy, why: whyEnded, reason: ended}
	case !s.registered && failing != "":
		return serviceHealth{why: whyCheck, reason: failing}
	case !s.registered:
		return notRegistered
	case s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_UNHEALTHY:
		return serviceHealth{condition: unhealthy, why: whyDeclared, reason: "it declared itself UNHEALTHY"}
	case s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_STOPPING:
		return serviceHealth{condition: unhealthy, why: whyDeclared, reason: "it declared itself STOPPING"}
	case failing != "":
		return serviceHealth{condition: unhealthy, why: whyCheck, reason: failing}
	case stuck != "":
		return serviceHealth{condition: unhealthy, why: whyStream, reason: stuck}
	case !s.noTTL && now.After(r.expiryLocked(s)):
		if s.lastSeen.Equal(s.registeredAt) {
			return serviceHealth{condition: unhealthy, why: whyMute, silent: s.lastSeen}
		}
		return serviceHealth{condition: unhealthy, why: whySilent, silent: s.lastSeen}
	case s.declared == flowctlv1.HealthStatus_HEALTH_STATUS_DEGRADED:
		return serviceHealth{condition: degraded, why: whyDeclared, reason: "it declared itself DEGRADED"}
	}
	return serviceHealth{condition: healthy}
}

// cause says why h is not healthy, "" for what is.
func (r *registry) cause(h serviceHealth, now time.Time) string {
	if h.silent.IsZero() {
		return h.reason
	}
	silence := now.Sub(h.silent).Round(time.Millisecond)
	if h.why == whyMute {
		return fmt.Sprintf("no heartbeat since it registered %s ago, the TTL is %s", silence, r.ttl)
	}
	return fmt.Sprintf("no heartbeat for %s, the TTL is %s", silence, r.ttl)
}

// expiryLocked is the last moment at which s is not stale unless it is heard of again. One
// that a sweep found stale, and so is not among the live, gets no grace.
func (r *registry) expiryLocked(s *service) time.Time {
	from := s.lastSeen
	if s.live != nil && from.Before(r.graceFrom) {
		from = r.graceFrom
	}
	return from.Add(r.patience())
}

// noteLocked takes a change of the condition of s into its history, and reports whether there
// was one. Another cause of the same condition is told to the streams of changes alone: the
// text of a health check that fails can be another one each time.
func (r *registry) noteLocked(s *service, now time.Time) bool {
	h, was := r.healthLocked(s, now), s.noted
	if s.noted = h; h.condition != was.condition {
		s.history = append(s.history, healthChange{now, h.condition, clip(r.cause(h, now))})
		s.history = slices.Delete(s.history, 0, max(0, len(s.history)-maxHistory))
		return true
	}
	if h != was && !s.isPending { // else it is told with what waits for the disk
		r.publish(s.seq)
	}
	return false
}

// changedLocked counts a change of s. Where there is a state file it is to be on disk
// before anyone is told.
func (r *registry) changedLocked(s *service) {
	p := &r.persistence
	if p.on {
		p.changes++
		s.changeNumber = p.changes
		wake(p.dirty)
	}
	switch {
	case !p.on || p.err != nil:
		r.notifyLocked(s)
	case !s.isPending:
		s.isPending = true
		p.pending = append(p.pending, s)
	}
}

// notifyLocked tells the streams of changes, and the run, that s has changed.
func (r *registry) notifyLocked(s *service) {
	r.publish(s.seq)
	if s.inChanged || s.noted.condition == s.notified {
		return
	}
	s.inChanged = true
	r.changed = append(r.changed, s)
	wake(r.wake)
}

// wake leaves a token in c, which has room for one.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// changes takes what has changed since it was last called, or a part of it and leaves a
// token in wake. There is one caller: it comes when wake has a token.
func (r *registry) changes(now time.Time) []change {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	var out []change
	n := min(len(r.changed), batch)
	for _, s := range r.changed[:n] {
		s.inChanged = false
		h := r.healthLocked(s, now)
		if h.condition == s.notified {
			continue
		}
		out = append(out, change{s.said.id, s.component(), h.condition, s.notified, r.cause(h, now)})
		s.notified = h.condition
	}
	if r.changed = r.changed[n:]; len(r.changed) > 0 {
		wake(r.wake)
	} else {
		r.changed = nil
	}
	return out
}

// condition judges the service id at the time now, and says why it is not healthy.
func (r *registry) condition(id string, now time.Time) (condition, why, string) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	h := notRegistered
	if s := r.byID[id]; s != nil {
		h = r.healthLocked(s, now)
	}
	return h.condition, h.why, r.cause(h, now)
}

// unmatchedServices returns the ids of what is registered and is not of the pipeline.
func (r *registry) unmatchedServices(now time.Time) (ids []string) {
	_ = r.each(context.Background(), now, func(s *service, _ time.Time) bool {
		if s.member == nil {
			ids = append(ids, printable(s.said.id))
		}
		return true
	})
	return ids
}

// view calls f with the service id and the time to judge it by. f must not keep it. Errors:
// INVALID_ARGUMENT, NOT_FOUND.
func (r *registry) view(id string, now time.Time, f func(s *service, now time.Time)) error {
	if id == "" {
		return errNoServiceID
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

// each calls f with every service, the components of the pipeline first, which may not have
// registered, and then the others in the order of first registration, and with the time to
// judge it by, until f returns false or ctx ends, which is its error. f must not keep it.
func (r *registry) each(ctx context.Context, now time.Time, f func(s *service, now time.Time) bool) error {
	r.mu.Lock()
	all := slices.Concat(r.members, r.others)
	r.mu.Unlock()
	for some := range slices.Chunk(all, batch) {
		if err := ctx.Err(); err != nil {
			return status.FromContextError(err).Err()
		}
		now = r.lockAt(now)
		more := true
		for _, s := range some {
			if more = s.gone() || f(s, now); !more {
				break
			}
		}
		if r.mu.Unlock(); !more {
			return nil
		}
	}
	return nil
}

// recordSize is what a service takes in an answer besides its texts, about.
const recordSize = 64

// list is each for an answer that lists services: f puts those in that belong there, and
// reports which. Errors: RESOURCE_EXHAUSTED where the answer would be too large, and those of ctx.
func (r *registry) list(ctx context.Context, f func(s *service, now time.Time) bool) error {
	size := 0
	err := r.each(ctx, time.Now(), func(s *service, now time.Time) bool {
		if f(s, now) {
			size += s.bytes + recordSize
		}
		return size <= maxAnswer
	})
	if err == nil && size > maxAnswer {
		err = status.Errorf(codes.ResourceExhausted, "the services are too many for one message of at most %d bytes: call flowctl.operator.v1.Operator/Watch", maxAnswer)
	}
	return err
}

// sweep notes which services have become stale, and takes out those that have been for too long, or a part
// of them, and returns when to come again.
func (r *registry) sweep(now time.Time) time.Time {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	next := now.Add(r.maxGap() / 2)
	for n := 0; r.live.Len() > 0; n++ {
		if n == batch {
			return now
		}
		s := r.live.Front().Value.(*service)
		if at := r.expiryLocked(s); !now.After(at) {
			if at = at.Add(1); at.Before(next) {
				next = at
			}
			break
		}
		r.unqueueLocked(s)
		if s.member == nil {
			s.stale, s.staleSince = r.stale.PushBack(s), now
		}
		if r.noteLocked(s, now) {
			r.changedLocked(s)
		}
	}
	for n := 0; r.forget > 0 && r.stale.Len() > 0; n++ {
		s := r.stale.Front().Value.(*service)
		at := s.staleSince.Add(r.forget)
		switch {
		case now.Before(at) && at.Before(next):
			return at
		case now.Before(at):
			return next
		case n == batch:
			return now
		}
		r.removeLocked(s, now)
	}
	return next
}

// runJanitor sweeps until ctx ends, at the earliest next expiry each time and at least twice
// in maxGap.
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

// setMembers takes over how the pipeline is now. What is new has not registered, and what
// is not in it any more is gone.
func (r *registry) setMembers(members []member, now time.Time) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	r.setMembersLocked(members, now)
}

func (r *registry) setMembersLocked(members []member, now time.Time) {
	before := r.members
	r.members = nil
	clear(r.byPort)
	listed := make(map[*service]bool)
	for _, m := range members {
		s := r.memberLocked(m.id)
		if s == nil {
			if other := r.byID[m.id]; other != nil {
				r.loseNameLocked(other, m.id, now)
			}
			s = r.newServiceLocked()
			s.member = &memberState{}
			r.byID[m.id] = s
		}
		if s.member.member = m; !s.registered {
			s.describe(registration{id: m.id})
		}
		listed[s] = true
		r.members = append(r.members, s)
		r.publish(s.seq)
		if _, twice := r.byPort[m.healthPort]; twice {
			r.byPort[m.healthPort] = nil // it tells nobody
		} else if m.healthPort != "" {
			r.byPort[m.healthPort] = s
		}
	}
	for _, s := range before {
		if !listed[s] {
			delete(r.byID, s.member.id)
			r.forgetLocked(s, now)
		}
	}
}

// starting makes ready for a new process of component id: whatever an earlier one
// registered no longer counts.
func (r *registry) starting(id string, now time.Time) {
	r.updateMember(id, now, func(s *service) {
		r.resetLocked(s)
		s.notified = unregistered
	})
}

// finished notes that the process of component id ended. One that completed is no longer
// registered; with a cause it is unhealthy until a new process registers.
func (r *registry) finished(id, cause string, now time.Time) {
	r.updateMember(id, now, func(s *service) {
		if cause == "" {
			r.resetLocked(s)
		}
		s.member.ended = cause
	})
}

// checked notes the outcome of a health check of component id: "" is a pass and counts as a
// heartbeat, anything else says why it fails.
func (r *registry) checked(id, failing string, now time.Time) {
	r.updateMember(id, now, func(s *service) {
		s.member.failing = failing
		if failing == "" && s.registered {
			r.seenLocked(s, r.lastNow)
		}
	})
}

// moved notes that events of component id are moved, or, with a cause, why not.
func (r *registry) moved(id, cause string, now time.Time) {
	r.updateMember(id, now, func(s *service) { s.member.stuck = cause })
}

// served is where a component serves its events, and which types it wants.
type served struct {
	endpoint string
	wants    []string
}

// served returns the components that have registered through flowctl.v1 and whose processes have not ended, by id.
func (r *registry) served() map[string]served {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string]served)
	for _, s := range r.members {
		if s.registered && s.said.v1 && s.reach() != "" && s.member.ended == "" {
			out[s.key()] = served{s.reach(), s.said.inputEvents}
		}
	}
	return out
}

// markReady registers component id, which does not do it itself. Its process and its health
// check stand for it, so it is never stale. Nobody waits until that is on disk, as its
// process may have ended by then.
func (r *registry) markReady(id string, now time.Time) {
	r.updateMember(id, now, func(s *service) {
		s.registered, s.noTTL, s.registeredAt = true, true, r.lastNow
		r.seenLocked(s, r.lastNow)
		if r.noteLocked(s, r.lastNow) {
			r.changedLocked(s)
		}
		r.notifyLocked(s)
	})
}

// updateMember calls f with the component id, if there is one, and tells of what that has
// changed.
func (r *registry) updateMember(id string, now time.Time, f func(s *service)) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	s := r.memberLocked(id)
	if s == nil {
		return
	}
	f(s)
	if r.noteLocked(s, now) {
		r.changedLocked(s)
	}
}

// resetLocked forgets what a component has registered, and how its process did.
func (r *registry) resetLocked(s *service) {
	r.unnameAllLocked(s)
	r.unqueueLocked(s)
	s.describe(registration{id: s.member.id})
	s.metrics, s.registered, s.noTTL = nil, false, false
	s.member.ended, s.member.failing, s.member.stuck = "", "", ""
	s.declared = flowctlv1.HealthStatus_HEALTH_STATUS_UNKNOWN
}

// publishPipeline takes what is to be shown of the pipeline as a whole.
func (r *registry) publishPipeline(info pipelineInfo) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if info != r.pipeline {
		r.pipeline = info
		r.publish(0)
	}
}

// publishProcess takes what the process of component id does.
func (r *registry) publishProcess(id string, p processReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.memberLocked(id); s != nil && s.member.process != p {
		s.member.process = p
		r.publish(s.seq)
	}
}
