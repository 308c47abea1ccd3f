package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/status"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// stateFormat is the first field of a state file. Another number is for a change
// that this version could not read.
const stateFormat = "flowctl-registry/1"

// maxWrite is how long a disk may take nothing of the state file before the registry goes
// on without it. Clients wait as long, of which some give up a heartbeat after 2 s.
const maxWrite = 1500 * time.Millisecond

// batchPause is how long a write for which nobody waits rests after each batch.
const batchPause = 3 * time.Millisecond

// durable returns when so many changes are on disk, or cannot be brought there.
func (r *registry) durable(ctx context.Context, count uint64) error {
	for {
		r.mu.Lock()
		over := !r.journal.on || r.journal.broken != nil || r.journal.done >= count
		written := r.journal.written
		r.mu.Unlock()
		if over {
			return nil
		}
		select {
		case <-written:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// settle takes the outcome of a write of all changes up to count, lets out what
// waited for it and tells whether the registry has become durable, or ceased to be.
func (r *registry) settle(count uint64, err error) (turned bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	j := &r.journal
	turned = (err == nil) != (j.broken == nil)
	j.broken = err
	if err == nil {
		j.done = max(j.done, count)
	}
	if turned {
		r.feed.stir()
	}
	held := j.held
	j.held = nil
	close(j.written)
	j.written = make(chan struct{})
	for some := range slices.Chunk(held, batch) {
		for _, s := range some {
			if err == nil && s.durable > j.done {
				j.held = append(j.held, s)
				continue
			}
			s.held = false
			r.tellLocked(s)
		}
		r.mu.Unlock() // there may be a hundred thousand
		r.mu.Lock()
	}
	return turned
}

// keep writes the registry to st whenever it has changed, and every interval for the
// sake of what was seen last, until ctx ends, and then a last time. Changes that come
// while it writes share the next write. told hears whether the registry is durable,
// when that has changed.
func (r *registry) keep(ctx context.Context, st *store, told func(durable bool)) {
	ticker := time.NewTicker(r.interval)
	defer ticker.Stop()
	settle := func(count uint64, err error) {
		if !r.settle(count, err) {
			return
		}
		if told(err == nil); err != nil {
			st.log.Error("the registry's state is not durable, flowctl goes on without", "err", err)
		} else {
			st.log.Info("the registry's state is durable again", "file", st.path)
		}
	}
	for last := false; !last; {
		urgent := true // somebody waits for it
		select {
		case <-ctx.Done():
			last = true
		case <-r.journal.dirty:
		case <-ticker.C:
			if !r.toWrite() {
				continue
			}
			urgent = false
		}
		var count uint64
		var mu sync.Mutex // guards over
		over := false
		slow := time.AfterFunc(maxWrite, func() {
			mu.Lock()
			defer mu.Unlock()
			if !over {
				settle(0, fmt.Errorf("%s: the disk takes nothing for %s", st.path, maxWrite))
			}
		})
		more := false // has changed while it was written, and may not be in it
		pause := func() {
			slow.Reset(maxWrite)
			if urgent {
				runtime.Gosched() // heartbeats first
				return
			}
			// What was seen last is written in no hurry: all at once, it would take a
			// processor from the heartbeats for a second.
			timer := time.NewTimer(batchPause)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-r.journal.dirty:
				urgent, more = true, true
			case <-ctx.Done():
				urgent = true
			}
		}
		err := st.write(func(w io.Writer) (err error) {
			count, err = r.save(w, st.pipeline, pause)
			return err
		})
		slow.Stop()
		mu.Lock()
		over = true
		mu.Unlock()
		settle(count, err)
		if more {
			r.journal.wake()
		}
	}
}

// toWrite tells whether the state file is behind, though nobody waits for it.
func (r *registry) toWrite() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.journal.heard || r.journal.broken != nil || r.journal.done < r.journal.count
}

// savedService is a service in the state file: one line of it.
type savedService struct {
	ID           string            `json:"id"`
	Component    string            `json:"component,omitempty"` // of the pipeline
	Names        []string          `json:"names,omitempty"`
	Type         string            `json:"type,omitempty"`
	Name         string            `json:"name,omitempty"`
	Description  string            `json:"description,omitempty"`
	Version      string            `json:"version,omitempty"`
	InputEvents  []string          `json:"input_event_types,omitempty"`
	OutputEvents []string          `json:"output_event_types,omitempty"`
	Endpoint     string            `json:"endpoint,omitempty"`
	MaxInflight  int32             `json:"max_inflight,omitempty"`
	Metadata     map[string]string `json:"metadata,omitempty"`
	Registered   time.Time         `json:"registered_at,omitzero"` // zero: it is not
	LastSeen     time.Time         `json:"last_seen,omitzero"`
	Declared     string            `json:"declared,omitempty"`
	Metrics      map[string]any    `json:"metrics,omitempty"` // float64 or string
	Health       string            `json:"health"`            // of a condition
	History      []savedChange     `json:"history,omitempty"`
}

type savedChange struct {
	Time   time.Time `json:"time"`
	Health string    `json:"health"`
	Cause  string    `json:"cause,omitempty"`
}

// conditionNamed is the condition that String calls so, unregistered for another name.
func conditionNamed(name string) condition {
	for c := unregistered; c <= unhealthy; c++ {
		if c.String() == name {
			return c
		}
	}
	return unregistered
}

// savedMetrics is the reverse of jsonLine.metrics. An infinite number comes back as a
// text, of which both dialects make the same.
func savedMetrics(in map[string]any) (out metrics) {
	for _, name := range slices.Sorted(maps.Keys(in)) {
		switch v := in[name].(type) {
		case float64:
			out = out.append(name, metric{number: v})
		case string:
			out = out.append(name, metric{text: v, isText: true}.compact())
		}
	}
	return slices.Clip(out)
}

// check fails for what no flowctl has written.
func (in *savedService) check() error {
	healths, times := []string{in.Health}, []time.Time{in.Registered, in.LastSeen}
	for _, h := range in.History {
		healths, times = append(healths, h.Health), append(times, h.Time)
	}
	for _, at := range times {
		if year := at.UTC().Year(); year > 9999 || year < 0 {
			return fmt.Errorf("service %q: the year %d: it must be between 0 and 9999 in UTC", clip(in.ID), year)
		}
	}
	for _, health := range healths {
		if health != "" && conditionNamed(health).String() != health {
			return fmt.Errorf("service %q: health %q: it must be unregistered, healthy, degraded or unhealthy", clip(in.ID), clip(health))
		}
	}
	for name, value := range in.Metrics {
		switch value.(type) {
		case float64, string:
		default:
			return fmt.Errorf("service %q: metric %q: it must be a number or a text", clip(in.ID), clip(name))
		}
	}
	return nil
}

// typeName and statusName are the enums in the words of list and of the state file.
func typeName(t flowctlpb.ServiceType) string {
	if name, ok := typeNames[int32(t)]; ok {
		return name
	}
	return t.String() // from another control plane: its number
}

func statusName(s flowctlv1.HealthStatus) string { return statusNames[int32(s)] }

var (
	typeNames   = lowered(flowctlpb.ServiceType_name, "SERVICE_TYPE_")
	statusNames = lowered(flowctlv1.HealthStatus_name, "HEALTH_STATUS_")
)

// lowered is an enum's names without what they have in common.
func lowered(names map[int32]string, prefix string) map[int32]string {
	out := make(map[int32]string, len(names))
	for number, name := range names {
		out[number] = strings.ToLower(strings.TrimPrefix(name, prefix))
	}
	return out
}

// A jsonLine is an object of the state file, to which members are appended. All
// services are written every interval: by way of a savedService, encoding/json and its
// maps, that was more than half of all that a busy plane allocated, and the garbage
// collector's work is what its heartbeats wait for.
type jsonLine []byte

// next begins another element or member.
func (l *jsonLine) next() {
	if last := (*l)[len(*l)-1]; last != '{' && last != '[' {
		*l = append(*l, ',')
	}
}

func (l *jsonLine) key(name string) {
	l.next()
	l.quote(name)
	*l = append(*l, ':')
}

func (l *jsonLine) open(name string, bracket byte) {
	l.key(name)
	*l = append(*l, bracket)
}

func (l *jsonLine) close(bracket byte) { *l = append(*l, bracket) }

// quote appends a text as encoding/json does.
func (l *jsonLine) quote(text string) {
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(text) // which fails for no text
			*l = append(*l, quoted...)
			return
		}
	}
	*l = append(append(append(*l, '"'), text...), '"')
}

// text appends a member, unless it is empty. So do the methods that follow.
func (l *jsonLine) text(name, text string) {
	if text != "" {
		l.key(name)
		l.quote(text)
	}
}

func (l *jsonLine) time(name string, t time.Time) {
	if !t.IsZero() {
		l.key(name)
		*l = append(t.UTC().AppendFormat(append(*l, '"'), time.RFC3339Nano), '"')
	}
}

func (l *jsonLine) texts(name string, texts iter.Seq[string]) {
	some := false
	for text := range texts {
		if !some {
			l.open(name, '[')
			some = true
		}
		l.next()
		l.quote(text)
	}
	if some {
		l.close(']')
	}
}

func (l *jsonLine) labels(name string, labels labels) {
	if len(labels) == 0 {
		return
	}
	l.open(name, '{')
	for _, label := range labels {
		l.key(label.name)
		l.quote(label.value)
	}
	l.close('}')
}

// metrics has a number where JSON has it, else a text.
func (l *jsonLine) metrics(name string, metrics metrics) {
	if len(metrics) == 0 {
		return
	}
	l.open(name, '{')
	for name, m := range metrics.all() {
		l.key(name)
		if m.isText || math.IsInf(m.number, 0) || math.IsNaN(m.number) {
			l.quote(m.String())
		} else {
			*l = strconv.AppendFloat(*l, m.number, 'g', -1, 64)
		}
	}
	l.close('}')
}

func (l *jsonLine) history(name string, s *service) {
	if !s.hasHistory() {
		return
	}
	l.open(name, '[')
	for h := range s.history() {
		l.next()
		*l = append(*l, '{')
		l.time("time", h.at)
		l.text("health", h.now.String())
		l.text("cause", h.cause)
		l.close('}')
	}
	l.close(']')
}

// copyTo makes out what appendSaved needs of s, in the room that it has.
func (s *service) copyTo(out *service) {
	metrics, earlier := out.metrics[:0], out.earlier[:0]
	*out = *s
	out.metrics, out.earlier = append(metrics, s.metrics...), append(earlier, s.earlier...)
}

// appendSaved appends s as the state file has it, to be read as a savedService. w is room
// for its details.
func (s *service) appendSaved(b []byte, w *details) []byte {
	s.said.unpack(w)
	l := jsonLine(append(b, '{'))
	l.key("id")
	l.quote(w.id)
	l.text("component", s.component())
	l.texts("names", s.names.all())
	l.text("type", typeName(s.kind))
	l.text("name", w.name)
	l.text("description", w.description)
	l.text("version", w.version)
	l.texts("input_event_types", slices.Values(w.inputEvents))
	l.texts("output_event_types", slices.Values(w.outputEvents))
	l.text("endpoint", w.endpoint)
	if w.maxInflight != 0 {
		l.key("max_inflight")
		l = strconv.AppendInt(l, int64(w.maxInflight), 10)
	}
	l.labels("metadata", w.labels)
	if s.registered {
		l.time("registered_at", s.since)
	}
	l.time("last_seen", s.lastSeen)
	l.text("declared", statusName(s.declared))
	l.metrics("metrics", s.metrics)
	l.text("health", s.latest.now.String())
	l.history("history", s)
	return append(l, '}')
}

// save writes the state file's text, of a registry whose pipeline has that name, and
// returns how many changes are in it. It calls pause after each batch of services.
func (r *registry) save(w io.Writer, pipeline string, pause func()) (uint64, error) {
	r.mu.Lock()
	count := r.journal.count
	r.journal.heard = false
	all := slices.Clone(r.all)
	r.mu.Unlock()
	head := jsonLine("{")
	head.text("format", stateFormat)
	head.key("pipeline")
	head.quote(pipeline)
	head.open("services", '[')
	if _, err := w.Write(head); err != nil {
		return 0, err
	}
	var text []byte
	var room details
	copies, separator := make([]service, batch), "\n"
	for len(all) > 0 {
		n, taken, weight := 0, 0, 0
		r.mu.Lock()
		for ; n < min(batch, len(all)) && weight < maxPart; n++ {
			if s := all[n]; s.registered || s.member != nil && s.hasHistory() {
				s.copyTo(&copies[taken]) // to make text of it takes longer
				taken++
				weight += int(s.size)
			}
		}
		r.mu.Unlock()
		all, text = all[n:], text[:0]
		for i := range copies[:taken] {
			text = copies[i].appendSaved(append(text, separator...), &room)
			separator = ",\n"
		}
		pause()
		if _, err := w.Write(text); err != nil {
			return 0, err
		}
	}
	_, err := io.WriteString(w, "\n]}\n")
	return count, err
}

// restore takes in what an earlier flowctl knew, and from now on holds changes back
// until they are on disk. Everyone gets one TTL to be heard of again. Of a pipeline's
// run only the history goes on: what registered with an earlier one does not count. It
// returns how many services are known again, and of how many that is not so. Where state
// fails, so does it, and the registry is of no use.
func (r *registry) restore(state iter.Seq2[savedService, error], now time.Time) (restored, dropped int, err error) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	r.journal.on, r.journal.dirty = true, make(chan struct{}, 1)
	r.journal.dirty <- struct{}{} // whether the disk takes it is to be known early
	r.grace = now
	var back []*service
	for in, err := range state {
		if err != nil {
			return 0, 0, err
		}
		member := r.service(in.Component)
		switch {
		case in.Component != "" && member != nil && member.member != nil:
			if changes := in.changes(); len(changes) > 0 {
				member.setHistory(changes, changes[len(changes)-1].now)
			}
			r.weighLocked(member)
			r.noteLocked(member, now)
			restored++
		case r.members > 0:
			dropped++
		case !in.Registered.IsZero():
			if s := r.restoreLocked(in, now); s != nil {
				back = append(back, s)
				restored++
			}
		}
	}
	slices.SortStableFunc(back, func(a, b *service) int { return a.lastSeen.Compare(b.lastSeen) })
	for _, s := range back {
		if s.latest.now.ok() || s.lastSeen.Add(r.ttl).After(now) {
			r.live.moveToBack(s)
		} else {
			r.stale.moveToBack(s)
		}
		r.noteLocked(s, now)
	}
	return restored, dropped, nil
}

func (in *savedService) changes() []healthChange {
	var out []healthChange
	for _, h := range in.History[max(0, len(in.History)-maxHistory):] {
		out = append(out, healthChange{h.Time, conditionNamed(h.Health), h.Cause})
	}
	return out
}

// restoreLocked makes a record of what was saved, nil if no id leads to it. Its place
// among the live or the stale is for the caller to find.
func (r *registry) restoreLocked(in savedService, now time.Time) *service {
	if !slices.Contains(in.Names, in.ID) {
		in.Names = append(in.Names, in.ID) // of a component, or where there are none
	}
	var names []string
	for _, name := range in.Names[max(0, len(in.Names)-maxIDs):] {
		if r.service(name) == nil && name != "" {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	if in.LastSeen.IsZero() {
		in.LastSeen = in.Registered
	}
	if in.LastSeen.After(now) {
		in.LastSeen = now // the clock was set back: it would not be stale for long
	}
	s := r.newServiceLocked()
	reg := registration{
		id: in.ID, kind: flowctlpb.ServiceType(flowctlpb.ServiceType_value["SERVICE_TYPE_"+strings.ToUpper(in.Type)]),
		name: in.Name, description: in.Description, version: in.Version,
		inputEvents: in.InputEvents, outputEvents: in.OutputEvents,
		endpoint: in.Endpoint, maxInflight: in.MaxInflight, metadata: in.Metadata,
	}
	s.describeLocked(reg)
	for _, name := range names {
		if r.service(name) == nil {
			r.services[name] = s.slot
			s.names = s.names.with(name)
		}
	}
	if r.service(in.ID) != s {
		s.rename(s.key())
	}
	s.registered, s.since, s.lastSeen = true, in.Registered, in.LastSeen
	s.declared = flowctlv1.HealthStatus(flowctlv1.HealthStatus_value["HEALTH_STATUS_"+strings.ToUpper(in.Declared)])
	s.metrics = savedMetrics(in.Metrics)
	s.setHistory(in.changes(), conditionNamed(in.Health))
	s.told = s.latest.now
	r.weighLocked(s)
	r.count++
	r.feed.touch(s)
	return s
}

// store is the state file. It is locked by a file beside it, because it is itself
// replaced at each write.
type store struct {
	path     string
	pipeline string // whose it is, "" for a control plane alone
	own      bool   // its folder is made where it is missing
	log      *slog.Logger
	lock     *os.File    // nil until it could be had
	seen     os.FileInfo // of the file as it was read or written last, nil for none
}

// openStore locks the state file at path, which read then reads. It fails where another
// process has it. A disk that cannot be written is not a reason to fail: write says so.
func openStore(path, pipeline string, own bool, log *slog.Logger) (*store, error) {
	path, err := filepath.Abs(resolve(path))
	if err != nil {
		return nil, err
	}
	st := &store{path: path, pipeline: pipeline, own: own, log: log}
	if st.seen, err = os.Stat(path); err == nil && !st.seen.Mode().IsRegular() {
		return nil, fmt.Errorf("state file %s: it must be a plain file", path)
	}
	var locked *lockedError
	if err := st.acquire(); errors.As(err, &locked) || errors.Is(err, fs.ErrNotExist) && !own {
		return nil, err
	}
	if st.seen, err = os.Stat(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) && !st.outOfReach() {
		st.close()
		return nil, fmt.Errorf("state file: %v", err)
	}
	return st, nil
}

// restore has r take over what is in the file.
func (st *store) restore(r *registry, log *slog.Logger) error {
	restored, dropped, err := r.restore(st.read(), time.Now())
	if err != nil {
		return err
	}
	r.stateFile = st.path
	if dropped > 0 {
		log.Info("services of an earlier run are not taken over", "services", dropped, "file", st.path)
	}
	log.Info("registry restored", "services", restored, "file", st.path)
	return nil
}

// resolve returns the file that path leads to, not to replace a link. There need not
// be one yet.
func resolve(path string) string {
	for range 40 { // as the kernel
		if target, err := filepath.EvalSymlinks(path); err == nil {
			return target
		}
		target, err := os.Readlink(path)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
	}
	return path
}

// lockedError says that another process holds the state file; pid is "" where that is
// not known.
type lockedError struct{ path, pid string }

func (e *lockedError) Error() string {
	by := "another process"
	if e.pid != "" {
		by = "process " + e.pid
	}
	return fmt.Sprintf("state file %s is in use by %s: choose another with -db-path, or -no-persistence", e.path, by)
}

// acquire locks the state file, if that has not been done or the lock was removed. It
// fails with a *lockedError where another process has locked it.
func (st *store) acquire() error {
	path := st.path + ".lock"
	if st.lock != nil {
		mine, err := st.lock.Stat()
		there, thereErr := os.Lstat(path)
		if err == nil && thereErr == nil && os.SameFile(mine, there) {
			return nil
		}
		st.close()
	}
	if st.own {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("no place for the registry's state: %v: name a file with -db-path, or choose -no-persistence", err)
		}
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil && !errors.Is(err, syscall.ELOOP) {
		return fmt.Errorf("cannot lock state file %s: %w", st.path, err)
	}
	if info, statErr := f.Stat(); err != nil || statErr != nil || !soleFile(info) {
		f.Close()
		return fmt.Errorf("cannot lock state file %s: %s must be a plain file of its own", st.path, path)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return &lockedError{st.path, strings.TrimSpace(string(pid))}
		}
		return fmt.Errorf("cannot lock %s: %v", path, err)
	}
	st.lock = f
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintln(f, os.Getpid()) // only for the message above
	}
	return nil
}

// soleFile tells whether a file is a plain one that has no other name.
func soleFile(info os.FileInfo) bool {
	return info.Mode().IsRegular() && info.Sys().(*syscall.Stat_t).Nlink == 1
}

// close unlocks the file, as the end of the process does: who serves a registry leaves it
// to that, because a disk that hangs may still be writing.
func (st *store) close() {
	if st != nil && st.lock != nil {
		st.lock.Close()
		st.lock = nil
	}
}

// outOfReach tells whether the usual folder cannot be made or entered. What is in it, if
// something is, is not to be had, which is no reason not to serve.
func (st *store) outOfReach() bool { return st.own && st.lock == nil }

// read gives the services in the state file, none where there is no file, or an error
// last: where it is not one that this version and this pipeline can read. Such a file is
// never overwritten.
func (st *store) read() iter.Seq2[savedService, error] {
	return func(yield func(savedService, error) bool) {
		f, err := os.Open(st.path)
		if errors.Is(err, fs.ErrNotExist) || err != nil && st.outOfReach() {
			return
		}
		if err != nil {
			yield(savedService{}, fmt.Errorf("state file: %v", err))
			return
		}
		defer f.Close()
		stopped := false
		err = readState(f, st.path, st.pipeline, func(in savedService) bool {
			stopped = !yield(in, nil)
			return !stopped
		})
		if err != nil && !stopped {
			yield(savedService{}, err)
		}
	}
}

// readState gives take each service in the text of a state file, one at a time: there may
// be a hundred thousand. It ends when take returns false.
func readState(f io.Reader, path, pipeline string, take func(savedService) bool) error {
	damaged := func(err error) error {
		if errors.Is(err, io.EOF) {
			err = errors.New("it ends too early")
		}
		return fmt.Errorf("state file %s is damaged and kept as it is: %v; move it away to begin anew", path, err)
	}
	dec := json.NewDecoder(bufio.NewReaderSize(f, 64<<10))
	if start, err := dec.Token(); err != nil || start != json.Delim('{') {
		return damaged(cmp.Or(err, errors.New("it must be an object")))
	}
	format := ""
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return damaged(err)
		}
		switch key {
		case "format":
			if err = dec.Decode(&format); err == nil {
				err = checkFormat(path, format)
				if err != nil {
					return err
				}
			}
		case "pipeline":
			var owner string
			if err = dec.Decode(&owner); err == nil && owner != pipeline {
				return fmt.Errorf("state file %s is that of %s and kept as it is: choose another with -db-path", path, ownerName(owner))
			}
		case "services":
			if format == "" {
				return checkFormat(path, format)
			}
			err = readServices(dec, take)
		default:
			var other json.RawMessage // of a later version with the same format
			err = dec.Decode(&other)
		}
		if err != nil {
			return damaged(err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return damaged(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return damaged(errors.New("something follows the object"))
	}
	return checkFormat(path, format)
}

func ownerName(pipeline string) string {
	if pipeline == "" {
		return "a control plane alone"
	}
	return fmt.Sprintf("pipeline %q", clip(pipeline))
}

// checkFormat fails for the format of a file that is not for this version.
func checkFormat(path, format string) error {
	version, ours := strings.CutPrefix(format, "flowctl-registry/")
	switch {
	case !ours:
		return fmt.Errorf("file %s is no state file of flowctl and kept as it is: its \"format\" is %q and not %q; choose another with -db-path", path, clip(format), stateFormat)
	case format != stateFormat:
		return fmt.Errorf("state file %s has format %q, this version reads %q: it is kept as it is", path, clip(version), strings.TrimPrefix(stateFormat, "flowctl-registry/"))
	}
	return nil
}

// readServices reads the array of services.
func readServices(dec *json.Decoder, take func(savedService) bool) error {
	start, err := dec.Token()
	if err != nil || start == nil {
		return err // null is none
	}
	if start != json.Delim('[') {
		return errors.New("services must be an array")
	}
	for dec.More() {
		var text json.RawMessage
		if err := dec.Decode(&text); err != nil {
			return err
		}
		if !utf8.Valid(text) {
			return errors.New("a service is not UTF-8")
		}
		var in savedService
		if err := json.Unmarshal(text, &in); err != nil {
			return err
		}
		if err := in.check(); err != nil {
			return err
		}
		if !take(in) {
			return nil
		}
	}
	_, err = dec.Token()
	return err
}

// write replaces the state file by what save writes. When it returns without an
// error that is what will be read, whatever happens to the machine. It fails where
// another process has written the file.
func (st *store) write(save func(io.Writer) error) error {
	had := st.lock
	if err := st.acquire(); err != nil {
		return err
	}
	if st.lock != had {
		if err := st.checkUnchanged(); err != nil {
			st.close()
			return err
		}
	}
	tmp := st.path + ".tmp"
	f, err := openTemporary(tmp)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 256<<10)
	err = save(w)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	written, statErr := f.Stat()
	if closed := f.Close(); err == nil {
		err = cmp.Or(closed, statErr)
	}
	if err == nil {
		err = os.Rename(tmp, st.path)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	st.seen = written
	return syncFolder(filepath.Dir(st.path))
}

// checkUnchanged fails where the file is not as it was read or written last: for a time
// this process had no lock on it.
func (st *store) checkUnchanged() error {
	there, err := os.Stat(st.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.seen != nil && os.SameFile(there, st.seen) && there.ModTime().Equal(st.seen.ModTime()) {
		return nil
	}
	return cmp.Or(err, fmt.Errorf("state file %s was written by another process and is kept as it is: restart flowctl to take it over", st.path))
}

// openTemporary opens a file to write from its beginning, of mode 0600. What another name
// leads to as well is left alone.
func openTemporary(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err == nil {
		info, err := f.Stat()
		if err == nil && !info.Mode().IsRegular() {
			return f, nil // cannot be synced, which is then said
		}
		if err == nil && soleFile(info) && f.Truncate(0) == nil && f.Chmod(0o600) == nil {
			return f, nil
		}
		f.Close()
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
}

// syncFolder makes a rename in a folder last.
func syncFolder(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
