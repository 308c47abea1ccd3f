package main

// The last lines of each component, and of flowctl's own log, kept in memory for who asks later, and
// passed on to who follows. Nobody who prints waits for a reader.

import (
	"bytes"
	"cmp"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	keptBytes   = 64 << 10 // of lines that are kept of a component
	keptInAll   = 9 << 20  // of those of all components, with what keeping them costs; a quarter more is room for what comes
	recentBytes = 4 << 20  // of the lines of all that wait for those who follow, with the same
	partBytes   = 4 << 10  // of lines that wait for those who follow, and are dropped, together; a longer line is alone
	partCost    = 128      // bytes that it costs to keep what was printed at once, about

	ownID = "flowctl" // stands for flowctl's own log where the id of a component would stand
)

// lineLog keeps the last lines of a run. Its methods may be called by any goroutine.
type lineLog struct {
	path func(id string) string // the log file of a component; nil where there is none. Set before the first reader

	mu      sync.Mutex // guards the fields below; held for a copy in memory at most
	ids     []string   // of the components, in the order in which they came to be known
	kept    map[string]*keptLines
	seq     int64
	recent  partQueue // of all, for those who follow
	readers map[*lineReader]struct{}
}

// keptLines are the last lines of a component. They take no new memory once there is enough.
type keptLines struct {
	text  []byte     // of the parts, one after the other, from start on
	start int        // what is before it was dropped
	parts []keptPart // each ends with a newline
	count int64      // of the lines that came while somebody followed any
}

// keptPart is what a component has printed at once, or the end of that.
type keptPart struct {
	seq    int64
	at     time.Time
	stream string
	size   int // bytes
}

func (k *keptLines) size() int { return len(k.text) - k.start }

// cost is how many bytes it takes, about.
func (k *keptLines) cost() int { return k.size() + len(k.parts)*partCost }

// push adds a part, which is within the bounds of trim, and has the oldest lines make room for it.
func (k *keptLines) push(p keptPart, text []byte, share int) {
	k.trim(keptBytes-len(text), share-len(text)-partCost)
	if live := k.text[k.start:]; len(k.text)+len(text) > cap(k.text) {
		need := len(live) + len(text)
		to := k.text[:0]
		if need > cap(k.text)*4/5 { // else it would be moved too often
			to = make([]byte, 0, min(max(2*cap(k.text), need*5/4), keptBytes*5/4))
		}
		k.text, k.start = append(to, live...), 0
	}
	k.text, k.parts = append(k.text, text...), append(k.parts, p)
}

// trim drops the oldest lines until no more than text bytes of text are left, and no more than cost in all.
func (k *keptLines) trim(text, cost int) {
	for len(k.parts) > 0 {
		p, over := &k.parts[0], max(k.size()-text, k.cost()-cost)
		if over <= 0 {
			return
		}
		if over < p.size { // as many of its lines as it takes
			over += bytes.IndexByte(k.text[k.start+over-1:k.start+p.size], '\n')
		}
		if over >= p.size {
			k.start += p.size
			k.parts = k.parts[1:]
			continue
		}
		p.size -= over
		k.start += over
	}
}

// last returns the parts with the last lines, the newest first. They share no memory with k.
func (k *keptLines) last(id string, lines int64) []*linePart {
	var out []*linePart
	end := len(k.text)
	for _, p := range slices.Backward(k.parts) {
		if lines <= 0 {
			break
		}
		text := bytes.Clone(k.text[end-p.size : end])
		count := int64(bytes.Count(text, newline))
		out = append(out, &linePart{seq: p.seq, id: id, stream: p.stream, at: p.at, count: count, text: text})
		end -= p.size
		lines -= count
	}
	return out
}

// linePart is some lines that a component has printed at once. It never changes.
type linePart struct {
	seq        int64 // numbers the parts of all
	id, stream string
	at         time.Time
	first      int64 // of those that wait for who follows: the number of its first line among those of the component, from 0
	count      int64 // lines
	text       []byte
}

// partQueue is parts in their order.
type partQueue struct {
	parts []*linePart
	bytes int // of their text
}

// push adds p, and drops the oldest beyond recentBytes.
func (q *partQueue) push(p *linePart) {
	q.parts, q.bytes = append(q.parts, p), q.bytes+len(p.text)
	for q.cost() > recentBytes {
		q.bytes -= len(q.parts[0].text)
		q.parts[0] = nil // what is behind the slice keeps it else
		q.parts = q.parts[1:]
	}
}

// cost is how many bytes it takes, about.
func (q *partQueue) cost() int { return q.bytes + len(q.parts)*partCost }

var newline = []byte{'\n'}

func newLineLog(ids []string) *lineLog {
	l := &lineLog{kept: map[string]*keptLines{ownID: {}}, readers: make(map[*lineReader]struct{})}
	for _, id := range ids {
		l.addID(id)
	}
	return l
}

// addID makes a component known.
func (l *lineLog) addID(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Contains(l.ids, id) {
		l.ids = append(l.ids, id)
	}
	if l.kept[id] == nil {
		l.kept[id] = &keptLines{}
	}
	for _, k := range l.kept {
		if k.trim(keptBytes, l.shareLocked()); cap(k.text) > 2*l.shareLocked() {
			k.text, k.start = bytes.Clone(k.text[k.start:]), 0
		}
	}
}

// removeID forgets a component, which prints no more.
func (l *lineLog) removeID(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ids = slices.DeleteFunc(l.ids, func(known string) bool { return known == id })
	if id != ownID {
		delete(l.kept, id)
	}
	for r := range l.readers {
		if r.all {
			delete(r.taken, id)
		}
	}
}

// shareLocked is what it may cost to keep the lines of one component.
func (l *lineLog) shareLocked() int { return keptInAll / len(l.kept) }

// known returns the components.
func (l *lineLog) known() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.ids)
}

// files returns the log files of ids, of all components for none.
func (l *lineLog) files(ids []string) []string {
	if l.path == nil {
		return nil
	}
	if len(ids) == 0 {
		ids = l.known()
	}
	var out []string
	for _, id := range ids {
		if path, err := filepath.Abs(l.path(id)); id != ownID && err == nil { // who asks may be in another folder
			out = append(out, path)
		}
	}
	return out
}

// add takes in whole lines, which it copies.
func (l *lineLog) add(id, stream string, lines []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.kept[id]
	if k == nil || len(lines) == 0 {
		return
	}
	now, share := time.Now(), l.shareLocked()
	most := min(keptBytes, share-partCost)
	end := lines
	if over := len(lines) - most; over > 0 {
		if cut := over + bytes.IndexByte(lines[over-1:], '\n'); cut < len(lines) {
			end = lines[cut:]
		} else { // a line that is longer
			end = lines[over:]
		}
	}
	k.push(keptPart{seq: l.seq + 1, at: now, stream: stream, size: len(end)}, end, share)
	if len(l.readers) == 0 {
		l.seq++
		return
	}
	for len(lines) > 0 {
		text := lines[:cmp.Or(bytes.LastIndexByte(lines[:min(partBytes, len(lines))], '\n')+1, bytes.IndexByte(lines, '\n')+1, len(lines))]
		lines = lines[len(text):]
		l.seq++
		p := &linePart{seq: l.seq, id: id, stream: stream, at: now, first: k.count, count: int64(bytes.Count(text, newline))}
		p.text = bytes.Clone(text[max(0, len(text)-most):])
		l.recent.push(p)
		k.count += p.count
	}
	for r := range l.readers {
		if !r.wantsLocked(id) {
			continue
		}
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

// lineReader follows the lines of some components, or of all.
type lineReader struct {
	log  *lineLog
	all  bool          // all components, also those that a reload adds
	wake chan struct{} // gets a token when there are lines

	// log.mu guards the fields below.
	next   int64            // the first part that it has not taken
	taken  map[string]int64 // by component: how many of its lines it has taken or missed
	behind bool             // it has missed some
}

// wantsLocked tells whether r is for the lines of id.
func (r *lineReader) wantsLocked(id string) bool {
	_, named := r.taken[id]
	return named || r.all && id != ownID
}

// follow returns a reader of the lines of ids, of all components for none, that come from now on, and what
// is kept of the last lines before that. Who calls it has to call leave. It fails with an *unknownError.
func (l *lineLog) follow(ids []string, last int64) (*lineReader, []*linePart, error) {
	r := &lineReader{log: l, all: len(ids) == 0, wake: make(chan struct{}, 1), taken: make(map[string]int64)}
	before, err := r.join(ids, last)
	if err != nil {
		return nil, nil, err
	}
	slices.SortFunc(before, func(a, b *linePart) int { return cmp.Compare(a.seq, b.seq) })
	return r, lastLines(before, last), nil
}

// join makes r known, and returns what is kept of the last lines of each of ids, in no order.
func (r *lineReader) join(ids []string, last int64) (before []*linePart, err error) {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.all {
		ids = l.ids
	}
	for _, id := range ids {
		k := l.kept[id]
		if k == nil {
			return nil, &unknownError{id, append(slices.Clone(l.ids), ownID)}
		}
		if _, twice := r.taken[id]; !twice {
			before = append(before, k.last(id, last)...)
		}
		r.taken[id] = k.count
	}
	r.next = l.seq + 1
	l.readers[r] = struct{}{}
	return before, nil
}

// lastLines returns the last parts with so many lines.
func lastLines(parts []*linePart, last int64) []*linePart {
	for i, p := range slices.Backward(parts) {
		switch {
		case last <= 0:
			return parts[i+1:]
		case last < p.count:
			cut := *p
			for range p.count - last {
				_, cut.text, _ = bytes.Cut(cut.text, newline)
			}
			parts[i] = &cut
			return parts[i:]
		}
		last -= p.count
	}
	return parts
}

// leave ends the following.
func (r *lineReader) leave() {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if delete(r.log.readers, r); len(r.log.readers) == 0 {
		r.log.recent = partQueue{}
	}
}

// take returns lines that have come, of about most bytes, and how many before them were missed. It
// returns neither when there are none.
func (r *lineReader) take(most int) (parts []*linePart, missed int64) {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	recent := l.recent.parts
	r.behind = r.behind || len(recent) > 0 && recent[0].seq > r.next
	from, _ := slices.BinarySearchFunc(recent, r.next, func(p *linePart, seq int64) int { return cmp.Compare(p.seq, seq) })
	size := 0
	for _, p := range recent[from:] {
		if size >= most {
			return parts, missed
		}
		r.next = p.seq + 1
		if !r.wantsLocked(p.id) {
			continue
		}
		missed += max(0, p.first-r.taken[p.id])
		r.taken[p.id] = p.first + p.count
		parts, size = append(parts, p), size+len(p.text)
	}
	if r.behind { // of some nothing may have come since
		r.behind = false
		for id, k := range l.kept {
			if r.wantsLocked(id) {
				missed += max(0, k.count-r.taken[id])
				r.taken[id] = k.count
			}
		}
	}
	return parts, missed
}

// handler returns a handler of flowctl's own log, whose records become lines of ownID.
func (l *lineLog) handler(level slog.Level) slog.Handler {
	untimed := func(groups []string, a slog.Attr) slog.Attr { // a line has its time already
		if a.Key == slog.TimeKey && len(groups) == 0 {
			return slog.Attr{}
		}
		return durationText(groups, a)
	}
	return slog.NewTextHandler(ownWriter{l}, &slog.HandlerOptions{Level: level, ReplaceAttr: untimed})
}

// ownWriter takes lines of flowctl's own log.
type ownWriter struct{ lines *lineLog }

func (w ownWriter) Write(line []byte) (int, error) {
	w.lines.add(ownID, "stderr", line)
	return len(line), nil
}
