package main

// The state file of the registry: its format, its lock, and the goroutine that writes it.

import (
	"bufio"
	"bytes"
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
	"syscall"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/status"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// stateFormat is the first field of a state file. Another number is for a change that this
// version could not read.
const stateFormat = "flowctl-registry/1"

// maxWrite is how long a disk may take nothing of the state file before the registry goes on
// without it. Clients wait as long, of which some give up a heartbeat after 2 s.
const maxWrite = 1500 * time.Millisecond

// maxGather is the longest that a write waits for changes to share it. After one that took
// long many come at once: those that have waited for it.
const maxGather = 100 * time.Millisecond

// batchPause is how long a write for which nobody waits rests after each batch: without, it
// would take a processor from the heartbeats for a second.
const batchPause = 3 * time.Millisecond

// durable returns when so many changes are on disk, or cannot be brought there.
func (r *registry) durable(ctx context.Context, changes uint64) error {
	for {
		r.mu.Lock()
		p := &r.persistence
		over := !p.on || p.err != nil || p.onDisk >= changes
		written := p.written
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

// finishWrite takes the outcome of a write that has the first changes in it, and tells of
// what waited for it. It reports whether the registry has become durable, or ceased to be.
func (r *registry) finishWrite(changes uint64, err error) (turned bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := &r.persistence
	turned = (err == nil) != (p.err == nil)
	p.err = err
	if err == nil {
		p.onDisk = max(p.onDisk, changes)
	}
	if turned {
		r.publish(0)
	}
	pending := p.pending
	p.pending = nil
	close(p.written)
	p.written = make(chan struct{})
	for some := range slices.Chunk(pending, batch) {
		for _, s := range some {
			if err == nil && s.changeNumber > p.onDisk {
				p.pending = append(p.pending, s)
				continue
			}
			s.isPending = false
			r.notifyLocked(s)
		}
		r.mu.Unlock() // there may be a hundred thousand
		r.mu.Lock()
	}
	return turned
}

// isBehind reports whether the state file lacks something, though nobody waits for it.
func (r *registry) isBehind() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := &r.persistence
	return p.heard || p.err != nil || p.onDisk < p.changes
}

// persister writes a registry to its state file.
type persister struct {
	registry *registry
	store    *store
	told     func(durable bool) // hears whether the registry is durable, when that changes
	took     time.Duration      // the last write for which somebody waited
}

// run writes whenever the registry has changed, and every interval for the sake of what was
// heard of last, until ctx ends, and then a last time. Changes that come while it writes
// share the next write.
func (p *persister) run(ctx context.Context) {
	ticker := time.NewTicker(p.registry.interval)
	defer ticker.Stop()
	for last := false; !last; {
		urgent := true // somebody waits for it
		select {
		case <-ctx.Done():
			last = true
		case <-p.registry.persistence.dirty:
			p.gather(ctx)
		case <-ticker.C:
			if !p.registry.isBehind() {
				continue
			}
			urgent = false
		}
		begun := time.Now()
		if p.write(ctx, urgent); urgent {
			p.took = time.Since(begun)
		}
	}
}

// gather waits for a part of what the last write took.
func (p *persister) gather(ctx context.Context) {
	select {
	case <-time.After(min(p.took/4, maxGather)):
	case <-ctx.Done():
	}
}

// write writes once. It says that the disk hangs while it does, and returns when it no longer does.
func (p *persister) write(ctx context.Context, urgent bool) {
	var changes uint64
	done, goesOn := make(chan error, 1), make(chan struct{}, 1)
	rest := func() {
		wake(goesOn)
		if !urgent {
			urgent = p.rest(ctx)
		}
		runtime.Gosched() // heartbeats first
	}
	go func() {
		done <- p.store.write(func(w io.Writer) (err error) {
			changes, err = p.registry.save(w, p.store.pipeline, rest)
			return err
		})
	}()
	hangs := time.NewTimer(maxWrite)
	defer hangs.Stop()
	for {
		select {
		case err := <-done:
			p.finish(changes, err)
			return
		case <-goesOn:
			hangs.Reset(maxWrite)
		case <-hangs.C:
			p.finish(0, fmt.Errorf("%s: the disk takes nothing for %s", p.store.path, maxWrite))
		}
	}
}

// rest waits for batchPause. It returns true at once where somebody waits for the next write.
func (p *persister) rest(ctx context.Context) (urgent bool) {
	select {
	case <-time.After(batchPause):
		return false
	case <-p.registry.persistence.dirty:
		wake(p.registry.persistence.dirty) // what has changed meanwhile may not be in this write
	case <-ctx.Done():
	}
	return true
}

// finish takes the outcome of a write, and says when the registry is no longer durable, or is again.
func (p *persister) finish(changes uint64, err error) {
	if !p.registry.finishWrite(changes, err) {
		return
	}
	if p.told(err == nil); err != nil {
		p.store.log.Error("the registry's state is not durable, flowctl goes on without", errorAttrs(err)...)
	} else {
		p.store.log.Info("the registry's state is durable again", "file", p.store.path)
	}
}

// savedService is a service in the state file: one line of it.
type savedService struct {
	ID           string        `json:"id"`
	Component    string        `json:"component,omitempty"`    // of the pipeline
	ComponentID  string        `json:"component_id,omitempty"` // as it sent it
	Names        []string      `json:"names,omitempty"`
	Type         string        `json:"type,omitempty"`
	Name         string        `json:"name,omitempty"`
	Description  string        `json:"description,omitempty"`
	Version      string        `json:"version,omitempty"`
	InputEvents  []string      `json:"input_event_types,omitempty"`
	OutputEvents []string      `json:"output_event_types,omitempty"`
	Endpoint     string        `json:"endpoint,omitempty"`
	Unreachable  bool          `json:"unreachable,omitempty"` // that is on the loopback of another machine
	V1           bool          `json:"v1,omitempty"`          // it registered through flowctl.v1
	MaxInflight  int32         `json:"max_inflight,omitempty"`
	Metadata     savedTexts    `json:"metadata,omitempty"`
	Owner        string        `json:"registered_by,omitempty"` // a user or a certificate
	Registered   time.Time     `json:"registered_at,omitzero"`  // zero: it is not
	LastSeen     time.Time     `json:"last_seen,omitzero"`
	Declared     string        `json:"declared,omitempty"`
	Metrics      savedMetrics  `json:"metrics,omitempty"`
	Health       string        `json:"health"` // of a condition
	History      []savedChange `json:"history,omitempty"`
}

type savedChange struct {
	Time   time.Time `json:"time"`
	Health string    `json:"health"`
	Cause  string    `json:"cause,omitempty"`
}

// savedTexts are written without reflection, which takes several times as long.
type savedTexts map[string]string

func (s savedTexts) MarshalJSON() ([]byte, error) {
	out := append(make([]byte, 0, 64*len(s)+2), '{')
	for i, name := range slices.Sorted(maps.Keys(s)) {
		if i > 0 {
			out = append(out, ',')
		}
		out = appendQuoted(append(appendQuoted(out, name), ':'), s[name])
	}
	return append(out, '}'), nil
}

// savedMetrics are an object of numbers and texts. An infinite number is a text, of which
// both dialects make the same.
type savedMetrics []metric

func (s savedMetrics) MarshalJSON() ([]byte, error) {
	out := append(make([]byte, 0, 32*len(s)+2), '{')
	for i := range s {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(appendQuoted(out, s[i].name), ':')
		if s[i].isText || math.IsInf(s[i].number, 0) || math.IsNaN(s[i].number) {
			out = appendQuoted(out, s[i].String())
		} else {
			out = strconv.AppendFloat(out, s[i].number, 'g', -1, 64)
		}
	}
	return append(out, '}'), nil
}

// appendQuoted appends a text as JSON has it.
func appendQuoted(out []byte, text string) []byte {
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(text) // which fails for no text
			return append(out, quoted...)
		}
	}
	return append(append(append(out, '"'), text...), '"')
}

func (s *savedMetrics) UnmarshalJSON(text []byte) error {
	var in map[string]any
	if err := json.Unmarshal(text, &in); err != nil {
		return err
	}
	*s = nil
	for _, name := range slices.Sorted(maps.Keys(in)) {
		switch value := in[name].(type) {
		case float64:
			*s = append(*s, metric{name: name, number: value})
		case string:
			*s = append(*s, metric{name: name, text: value, isText: true})
		default:
			return fmt.Errorf("metric %q: it must be a number or a text", clip(name))
		}
	}
	return nil
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

// set makes out the record of s, in the room that it has.
func (out *savedService) set(s *service) {
	metrics, history := append(out.Metrics[:0], s.metrics...), out.History[:0]
	for _, h := range s.history {
		history = append(history, savedChange{h.at.UTC(), h.condition.String(), h.cause})
	}
	said := &s.said
	*out = savedService{
		ID: said.id, Component: s.component(), ComponentID: said.componentID, Names: s.names, Type: typeName(said.kind),
		Name: said.name, Description: said.description, Version: said.version,
		InputEvents: said.inputEvents, OutputEvents: said.outputEvents,
		Endpoint: said.endpoint, Unreachable: said.unreachable, V1: said.v1, MaxInflight: said.maxInflight, Metadata: said.metadata, Owner: s.owner,
		LastSeen: s.lastSeen.UTC(), Declared: statusName(s.declared), Metrics: metrics,
		Health: s.noted.condition.String(), History: history,
	}
	if s.registered {
		out.Registered = s.registeredAt.UTC()
	}
}

// save writes the text of the state file of a pipeline, and returns how many changes are in
// it. It calls rest after each batch of services. The registry is locked only while a batch
// is copied.
func (r *registry) save(w io.Writer, pipeline string, rest func()) (uint64, error) {
	r.mu.Lock()
	changes := r.persistence.changes
	r.persistence.heard = false
	all := slices.Clone(r.members)
	if r.keepsOthers {
		all = append(all, r.others...)
	}
	r.mu.Unlock()
	owner, err := json.Marshal(pipeline)
	if err == nil {
		_, err = fmt.Fprintf(w, `{"format":%q,"pipeline":%s,"services":[`, stateFormat, owner)
	}
	if err != nil {
		return 0, err
	}
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	records, separator := make([]savedService, batch), "\n"
	for some := range slices.Chunk(all, batch) {
		n := 0
		r.mu.Lock()
		for _, s := range some {
			if s.registered || s.member != nil && len(s.history) > 0 {
				records[n].set(s)
				n++
			}
		}
		r.mu.Unlock()
		text.Reset()
		for i := range records[:n] {
			text.WriteString(separator)
			if err := encoder.Encode(&records[i]); err != nil {
				return 0, err
			}
			text.Truncate(text.Len() - 1) // the newline
			separator = ",\n"
		}
		rest()
		if _, err := w.Write(text.Bytes()); err != nil {
			return 0, err
		}
	}
	_, err = io.WriteString(w, "\n]}\n")
	return changes, err
}

// restore takes in what an earlier flowctl knew, and from now on lets changes wait until they
// are on disk. Everyone gets one TTL to be heard of again. Of the components of a run only the
// history goes on: what registered with an earlier one does not count. It returns how many
// services are known again, and of how many that is not so. Where state fails, so does it,
// and the registry is of no use.
func (r *registry) restore(state iter.Seq2[savedService, error], now time.Time) (restored, dropped int, err error) {
	now = r.lockAt(now)
	defer r.mu.Unlock()
	r.persistence.on = true
	wake(r.persistence.dirty) // whether the disk takes it is to be known early
	r.graceFrom = now
	var back []*service
	for in, err := range state {
		if err != nil {
			return 0, 0, err
		}
		switch member := r.memberLocked(in.Component); {
		case member != nil && member.isElsewhere() && !in.Registered.IsZero():
			r.takeOverLocked(member, in, in.names(), now)
			back = append(back, member)
			restored++
		case member != nil:
			if member.history = in.history(); len(member.history) > 0 {
				member.noted.condition = member.history[len(member.history)-1].condition
			}
			if r.noteLocked(member, now) {
				r.changedLocked(member)
			}
			restored++
		case in.Component != "" && len(r.members) > 0, !r.keepsOthers:
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
		r.requeueLocked(s, now)
	}
	return restored, dropped, nil
}

// requeueLocked puts a restored service among the live or the stale ones. It is not told of
// where it is as it was.
func (r *registry) requeueLocked(s *service, now time.Time) {
	if s.noted.condition.ok() || s.lastSeen.Add(r.patience()).After(now) {
		s.live = r.live.PushBack(s)
	} else if s.member == nil {
		s.stale, s.staleSince = r.stale.PushBack(s), s.lastSeen.Add(r.patience())
	}
	s.notified = s.noted.condition
	if r.noteLocked(s, now) {
		r.changedLocked(s)
	}
}

// history is how the health of a saved service has changed.
func (in *savedService) history() []healthChange {
	var out []healthChange
	for _, h := range in.History[max(0, len(in.History)-maxHistory):] {
		out = append(out, healthChange{h.Time, conditionNamed(h.Health), h.Cause})
	}
	return out
}

// names are the ids that lead to a saved service, the latest last.
func (in *savedService) names() []string {
	names := in.Names
	if !slices.Contains(names, in.ID) {
		names = append(names, in.ID) // of a component, or where there are none
	}
	return names[max(0, len(names)-maxNames):]
}

// restoreLocked makes a record of what was saved, nil if no id leads to it.
func (r *registry) restoreLocked(in savedService, now time.Time) *service {
	names := slices.DeleteFunc(in.names(), func(name string) bool { return name == "" || r.byID[name] != nil })
	if len(names) == 0 {
		return nil
	}
	s := r.addOtherLocked()
	r.takeOverLocked(s, in, names, now)
	return s
}

// takeOverLocked makes s what was saved. Those of names that lead to no other lead to it.
func (r *registry) takeOverLocked(s *service, in savedService, names []string, now time.Time) {
	for _, name := range names {
		if r.byID[name] == nil && name != "" {
			s.names = append(s.names, name)
			r.byID[name] = s
		}
	}
	s.describe(registration{
		id: in.ID, componentID: in.ComponentID, kind: flowctlpb.ServiceType(flowctlpb.ServiceType_value["SERVICE_TYPE_"+strings.ToUpper(in.Type)]),
		name: in.Name, description: in.Description, version: in.Version,
		inputEvents: in.InputEvents, outputEvents: in.OutputEvents,
		endpoint: in.Endpoint, unreachable: in.Unreachable, v1: in.V1, maxInflight: in.MaxInflight, metadata: in.Metadata,
	})
	if r.byID[in.ID] != s {
		s.said.id = s.key()
	}
	s.registered, s.registeredAt = true, in.Registered
	// The age counts, not the time: that is of a clock that may be set back, and then nobody
	// would be stale for long. A time to come is one before it was.
	seen := in.LastSeen
	if seen.IsZero() {
		seen = in.Registered
	}
	s.lastSeen = now.Add(-max(0, now.Sub(seen)))
	s.declared = flowctlv1.HealthStatus(flowctlv1.HealthStatus_value["HEALTH_STATUS_"+strings.ToUpper(in.Declared)])
	for _, m := range in.Metrics {
		s.bytes += m.size()
	}
	s.metrics, s.owner = slices.Clone(in.Metrics), in.Owner
	r.countLocked(s)
	s.history = in.history()
	s.noted.condition = conditionNamed(in.Health)
	r.publish(s.seq)
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

// stateConfig says where the registry's state is kept.
type stateConfig struct {
	file string // "" for memory
	own  bool   // its folder is flowctl's own, which is made
}

// openStore locks the state file of a pipeline, which read then reads. It returns nil where there
// is to be none, and fails where another process has it. A disk that cannot be written is not
// a reason to fail: write says so.
func openStore(config stateConfig, pipeline string, log *slog.Logger) (*store, error) {
	if config.file == "" {
		return nil, nil
	}
	path, err := filepath.Abs(resolve(config.file))
	if err != nil {
		return nil, err
	}
	st := &store{path: path, pipeline: pipeline, own: config.own, log: log}
	if st.seen, err = os.Stat(path); err == nil && !st.seen.Mode().IsRegular() {
		return nil, fmt.Errorf("state file %s: it must be a plain file", path)
	}
	var locked *lockedError
	if err := st.acquire(); errors.As(err, &locked) || errors.Is(err, fs.ErrNotExist) && !config.own {
		return nil, err
	}
	if st.seen, err = os.Stat(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) && !st.outOfReach() {
		st.close()
		return nil, fmt.Errorf("state file: %w", err)
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
			return fmt.Errorf("no place for the registry's state: %w: name a file with -db-path, or choose -no-persistence", err)
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
		return fmt.Errorf("cannot lock %s: %w", path, err)
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
			yield(savedService{}, fmt.Errorf("state file: %w", err))
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
	format, owner := "", ""
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
			if err = dec.Decode(&owner); err == nil {
				if err := checkOwner(path, owner, pipeline); err != nil {
					return err
				}
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
	return cmp.Or(checkFormat(path, format), checkOwner(path, owner, pipeline))
}

// checkOwner fails for a state file that is another pipeline's, or a control plane's alone,
// of which the name is "". Those of the first version do not say it.
func checkOwner(path, owner, pipeline string) error {
	whose := "a control plane alone"
	if owner != "" {
		whose = fmt.Sprintf("pipeline %q", clip(owner))
	}
	if owner != pipeline {
		return fmt.Errorf("state file %s is that of %s and kept as it is: choose another with -db-path", path, whose)
	}
	return nil
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
	written, err := replaceFile(st.path, save)
	if written != nil {
		st.seen = written
	}
	return err
}

// replaceFile replaces the file at path by one of mode 0600 with what save writes, and returns how it is, nil
// where the former one is still there. When there is no error, the new one outlives a crash of the machine.
func replaceFile(path string, save func(io.Writer) error) (os.FileInfo, error) {
	tmp := path + ".tmp"
	f, err := openTemporary(tmp)
	if err != nil {
		return nil, err
	}
	w := bufio.NewWriterSize(f, 16<<10)
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
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return nil, err
	}
	return written, syncFolder(filepath.Dir(path))
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
