//go:build linux

package main

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"
)

// numberedLines are lines with the numbers from first on.
func numberedLines(first, count int) []byte {
	var out []byte
	for n := first; n < first+count; n++ {
		out = fmt.Appendf(out, "line %d\n", n)
	}
	return out
}

// lastOf returns the last lines of ids that l keeps.
func lastOf(t *testing.T, l *lineLog, last int64, ids ...string) []string {
	t.Helper()
	r, parts, err := l.follow(ids, last)
	must(t, err)
	defer r.leave()
	var out []string
	for _, p := range parts {
		for line := range bytes.Lines(p.text) {
			out = append(out, p.id+" "+strings.TrimSuffix(string(line), "\n"))
		}
	}
	return out
}

func TestLines_LastOnesInOrder(t *testing.T) {
	t.Parallel()
	l := newLineLog([]string{"a", "b", "quiet"})
	l.add("a", "stdout", []byte("1\n2\n3\n"))
	l.add("b", "stderr", []byte("4\n5\n"))
	l.add("a", "stdout", []byte("6\n"))
	l.add(ownID, "stderr", []byte("own\n"))
	l.add("unknown", "stdout", []byte("lost\n"))
	for _, tt := range []struct {
		last int64
		ids  []string
		want string
	}{
		{100, nil, "a 1,a 2,a 3,b 4,b 5,a 6"},
		{4, nil, "a 3,b 4,b 5,a 6"},
		{3, nil, "b 4,b 5,a 6"},
		{0, nil, ""},
		{2, []string{"a"}, "a 3,a 6"},
		{9, []string{"a", "a"}, "a 1,a 2,a 3,a 6"},
		{9, []string{"quiet"}, ""},
		{2, []string{"flowctl", "a"}, "a 6,flowctl own"},
	} {
		if got := strings.Join(lastOf(t, l, tt.last, tt.ids...), ","); got != tt.want {
			t.Errorf("the last %d of %q: %s, want %s", tt.last, tt.ids, got, tt.want)
		}
	}
	if _, _, err := l.follow([]string{"a", "quite"}, 1); err == nil || err.Error() != `no component "quite" is in the pipeline, did you mean "quiet"?` {
		t.Errorf("an unknown id: %v", err)
	}
}

// Of each component the last 64 KiB are kept, whoever else prints, by lines of any length and in
// batches of any size.
func TestLines_KeptOfAComponent(t *testing.T) {
	t.Parallel()
	const all = 200_000
	for _, batch := range []int{1, 7, 1000, all} {
		l := newLineLog([]string{"a", "b"})
		l.add("b", "stdout", []byte("only\n"))
		for n := 0; n < all; n += batch {
			l.add("a", "stdout", numberedLines(n, min(batch, all-n)))
		}
		got := lastOf(t, l, all, "a")
		size := len(got) * len("line 199999\n")
		if first := fmt.Sprint("a line ", all-len(got)); got[0] != first || got[len(got)-1] != fmt.Sprint("a line ", all-1) || size > keptBytes || size < keptBytes-20 {
			t.Errorf("batches of %d: %d bytes from %q, want %q, to %q", batch, size, got[0], first, got[len(got)-1])
		}
		if got := lastOf(t, l, all, "b"); !slices.Equal(got, []string{"b only"}) {
			t.Errorf("b: %q", got)
		}
	}
	l := newLineLog([]string{"a"})
	long := strings.Repeat("x", maxLine) + "end"
	l.add("a", "stdout", []byte("before\n"+long+"\n"))
	if got := lastOf(t, l, 9, "a"); len(got) != 1 || got[0] != "a "+long[len(long)-keptBytes+1:] {
		t.Errorf("of a long line %d bytes, %d lines", len(got[0]), len(got))
	}
	l.add("a", "stdout", []byte("after\n"))
	if got := lastOf(t, l, 9, "a"); got[len(got)-1] != "a after" {
		t.Errorf("after a long line: %d lines", len(got))
	}
}

// However many components there are, and whatever they print, it is 16 MiB in all.
func TestLines_KeptInAll(t *testing.T) {
	t.Parallel()
	var ids []string
	for n := range 1000 {
		ids = append(ids, fmt.Sprint("c", n))
	}
	much, long := numberedLines(0, 20_000), append(bytes.Repeat([]byte("x"), 2*keptBytes), '\n')
	for what, print := range map[string]func(l *lineLog, id string){
		"empty lines": func(l *lineLog, id string) {
			for range 300 {
				l.add(id, "stdout", []byte("\n"))
			}
		},
		"long lines": func(l *lineLog, id string) { l.add(id, "stdout", long) },
		"much":       func(l *lineLog, id string) { l.add(id, "stdout", much) },
	} {
		l := newLineLog(ids[:10])
		for _, id := range ids[:10] {
			print(l, id)
		}
		for _, id := range ids[10:] { // by a reload
			l.addID(id)
		}
		r, _, err := l.follow(nil, 0) // who does not read
		must(t, err)
		for _, id := range ids {
			print(l, id)
		}
		total := l.recent.cost()
		for id, k := range l.kept {
			if total += cap(k.text) + cap(k.parts)*int(unsafe.Sizeof(keptPart{})); id != ownID && len(k.parts) == 0 {
				t.Errorf("%s: nothing is kept of %s", what, id)
			}
		}
		if total > 16<<20 {
			t.Errorf("%s: %.1f MiB are kept", what, mib(total))
		}
		if r.leave(); len(l.recent.parts) > 0 {
			t.Errorf("%s: %d parts wait for nobody", what, len(l.recent.parts))
		}
	}
}

// A reader gets each line or hears that it has missed it, however slow it is, and only of those that it
// wants.
func TestLines_MissedOnesAreCounted(t *testing.T) {
	t.Parallel()
	l := newLineLog([]string{"a", "b", "c"})
	one, _, err := l.follow([]string{"a", "b"}, 0)
	must(t, err)
	all, _, err := l.follow(nil, 0)
	must(t, err)
	own, _, err := l.follow([]string{ownID}, 0)
	must(t, err)
	l.add("b", "stdout", numberedLines(0, 10)) // of which nothing will be left
	const many = 1_000_000
	for n := 0; n < many; n += 1000 {
		l.add("c", "stdout", numberedLines(n, 1000))
	}
	l.add("a", "stdout", numberedLines(0, 5))
	l.addID("late")
	l.add("late", "stdout", numberedLines(0, 3))
	for _, tt := range []struct {
		name      string
		r         *lineReader
		got, lost int64
	}{{"two", one, 5, 10}, {"all", all, -1, many + 18}, {"own", own, 0, 0}} {
		got, lost := int64(0), int64(0)
		for parts, missed := tt.r.take(maxPart); len(parts) > 0 || missed > 0; parts, missed = tt.r.take(maxPart) {
			lost += missed
			for _, p := range parts {
				got += p.count
			}
		}
		if tt.got < 0 {
			lost, tt.got = lost+got, got
		}
		if got != tt.got || lost != tt.lost || got == 0 && tt.name != "own" {
			t.Errorf("%s: %d lines and %d missed, want %d and %d", tt.name, got, lost, tt.got, tt.lost)
		}
		tt.r.leave()
	}
}

// The lines of each component come in their order, once each, to readers that come and go.
func TestLines_ReadersBesideWriters(t *testing.T) {
	t.Parallel()
	const writers, lines = 4, 50_000
	var ids []string
	for n := range writers {
		ids = append(ids, fmt.Sprint("c", n))
	}
	l := newLineLog(ids)
	var writing, reading sync.WaitGroup
	over := make(chan struct{})
	for i := range 6 {
		r, _, err := l.follow(nil, 0)
		must(t, err)
		reading.Go(func() {
			defer r.leave()
			next := make(map[string]int)
			total, missed := int64(0), int64(0)
			read := func() {
				for parts, lost := r.take(1 << i); len(parts) > 0 || lost > 0; parts, lost = r.take(1 << i) {
					missed += lost
					for _, p := range parts {
						total += p.count
						for line := range bytes.Lines(p.text) {
							n, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(string(line), "line ")))
							if err != nil || n < next[p.id] {
								t.Errorf("%s: %q after %d", p.id, line, next[p.id])
								return
							}
							next[p.id] = n + 1
						}
					}
				}
			}
			for going := true; going; read() {
				select {
				case <-r.wake:
				case <-over:
					going = false
				}
			}
			if total+missed != writers*lines {
				t.Errorf("%d lines and %d missed, want %d", total, missed, writers*lines)
			}
		})
	}
	for _, id := range ids {
		writing.Go(func() {
			for n := 0; n < lines; n += 50 {
				l.add(id, "stdout", numberedLines(n, 50))
			}
		})
	}
	for range 100 {
		lastOf(t, l, 1000)
	}
	writing.Wait()
	close(over)
	reading.Wait()
}
