package main

import (
	"cmp"
	bin "encoding/binary"
	"iter"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

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

func (c *chain) front() *service          { return c.services[c.first] }
func (c *chain) back() *service           { return c.services[c.last] }
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
