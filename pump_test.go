//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestTail_KeepsTheLastLines(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 3000)
	for _, tt := range []struct {
		name string
		add  []string
		want []string
	}{
		{"nothing", nil, nil},
		{"one line", []string{"a\n"}, []string{"a"}},
		{"an empty line", []string{"a\n\n"}, []string{"a", ""}},
		{"more than ten", []string{"1\n2\n3\n4\n5\n6\n", "7\n8\n9\n10\n11\n12\n"}, strings.Fields("3 4 5 6 7 8 9 10 11 12")},
		{"cut lines are left out", []string{long + "\n", long + "\n", "end\n"}, []string{long, "end"}},
		{"one line too long", []string{"a\n" + strings.Repeat("y", 2*tailSize) + "\n"}, []string{strings.Repeat("y", tailSize-1)}},
	} {
		var tail tail
		for _, s := range tt.add {
			tail.add([]byte(s))
		}
		if got := tail.lines(); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func FuzzPassLines(f *testing.F) {
	f.Add([]byte("a\nbc\n\nd"), uint8(2))
	f.Add([]byte("\r\n\x00\xff\n"), uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		var got []byte
		buf := make([]byte, 0, 4)
		for rest := in; len(rest) > 0; {
			n := copy(buf[len(buf):min(cap(buf), len(buf)+int(step)+1)], rest)
			rest = rest[n:]
			buf = passLines(buf[:len(buf)+n], func(lines []byte) { got = append(got, lines...) })
			if len(buf) == cap(buf) {
				t.Fatal("no room to read more")
			}
		}
		if got = append(got, buf...); !bytes.Equal(got, in) {
			t.Errorf("got %q, want %q", got, in)
		}
	})
}

// What waits for the end of its line, as a prompt does, is shown as a part of the line, in text and
// in JSON. Log files have whole lines.
func TestOutput_UnfinishedLinesAreShown(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, script, part, rest string }{
		{"a prompt", `printf 'Password: '; await; echo accepted`, "Password: ", "accepted"},
		{"a prompt alone", `printf 'Password: '; await; echo`, "Password: ", ""},
		{"a prompt at the end", `printf 'Password: '; await`, "Password: ", ""},
		{"after a line", `echo first; printf 'second '; await; printf 'line\r\nthird\n'`, "second ", "line"},
		{"half a character", `printf 'caf\303'; await; printf '\251 10%%\r\r\n'`, "caf", "é 10%\r"},
		{"no character", `printf 'caf\351!'; await; echo`, "caf\xe9!", ""},
		{"a CR that ends no line", `printf '10%%\r'; await; printf '20%%\n'`, "10%", "\r20%"},
	} {
		for _, format := range []string{formatText, formatJSON} {
			t.Run(tt.name+" in "+format, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				script := strings.ReplaceAll(tt.script, "await", "until [ -e "+filepath.Join(dir, "go")+" ]; do sleep 0.02; done")
				p := launch(t, writePipeline(t, shell("a", script)), "-log-format", format, "-log-dir", dir)
				part, rest := " a | "+tt.part+"…\n", " a | "+tt.rest+"\n"
				if format == formatJSON {
					quoted := func(text string) string { return `"line":` + string(get(json.Marshal(text))(t)) }
					part, rest = quoted(tt.part)+`,"partial":true}`+"\n", quoted(tt.rest)+"}\n"
				}
				p.waitOut(part)
				if got := logLines(t, filepath.Join(dir, "a.log")); slices.Contains(got, tt.part) {
					t.Errorf("the log file has %q", got)
				}
				writeFile(t, filepath.Join(dir, "go"), "")
				p.exit(exitOK)
				p.has(p.stdout, part, rest)
				if got := logLines(t, filepath.Join(dir, "a.log")); !slices.Contains(got, tt.part+tt.rest) {
					t.Errorf("the log file has %q", got)
				}
			})
		}
	}
}

// A line that goes on without a pause, as dots of progress do, is shown while it does. Its parts are
// the line.
func TestOutput_ALineThatGrowsIsShown(t *testing.T) {
	t.Parallel()
	enough := filepath.Join(t.TempDir(), "enough")
	p := launch(t, writePipeline(t, shell("a", "until [ -e "+enough+" ]; do printf .; sleep 0.3; done; echo end")))
	p.waitOut(" a | .")
	writeFile(t, enough, "")
	p.exit(exitOK)
	lines := p.lines("a")
	for i, got := range lines[:len(lines)-1] {
		var part bool
		if lines[i], part = strings.CutSuffix(got, "…"); !part {
			t.Errorf("%q is not marked as a part", got)
		}
	}
	if line := strings.Join(lines, ""); len(lines) < 2 || strings.Trim(line, ".") != "end" || strings.Count(line, ".") < 3 {
		t.Errorf("the line is %q, in %d parts", line, len(lines))
	}
}

// A full buffer is no pause: such a line comes whole.
func TestOutput_FullBuffersAreNoParts(t *testing.T) {
	t.Parallel()
	fill := "head -c 8192 /dev/zero | tr '\\0' x; "
	p := launch(t, writePipeline(t, shell("a", fill+"sleep 1.5; echo y"), shell("b", "echo first; head -c 8186 /dev/zero | tr '\\0' x; sleep 1.5; echo y")))
	p.exit(exitOK)
	p.has(p.stdout, strings.Repeat("x", 8192)+"y\n")
	p.has(p.stdout, strings.Repeat("x", 8186)+"y\n")
	p.hasNot(p.stdout, "…")
}

// A part can be longer than a piece of a line that is passed on.
func TestPump_PartsOfALongLine(t *testing.T) {
	t.Parallel()
	r, w := openPipe(t)
	var mu sync.Mutex
	var got, whole bytes.Buffer
	var parts []int
	var kept tail
	p := newPump("a", "stdout", r, func(_, _ string, text []byte, shown int) {
		mu.Lock()
		defer mu.Unlock()
		got.Write(text[shown:])
		if parts = append(parts, len(text)); !isPart(text) {
			whole.Write(text)
		}
	}, &kept)
	ended := make(chan struct{})
	go func() { p.run(); close(ended) }()
	for i, text := range []string{strings.Repeat("x", maxLine) + "\r", "y" + strings.Repeat("z", 10), "end\n"} {
		get(w.WriteString(text))(t)
		eventually(t, "what was written", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(parts) > []int{0, 2, 3}[i]
		})
	}
	w.Close()
	<-ended
	if want := strings.Repeat("x", maxLine) + "\n\ryzzzzzzzzzzend\n"; got.String() != want || whole.String() != want {
		t.Errorf("passed on: %d bytes, as whole lines %d, want %d; %d", got.Len(), whole.Len(), len(want), parts)
	}
}
