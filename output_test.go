//go:build linux

package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What a component writes comes out as it is, line by line.
func TestOutput_BytesArePassedAsTheyAre(t *testing.T) {
	t.Parallel()
	const pieces = 160 << 10 // 2.5 MiB
	out := "plain\n\n  indented\t\ncarriage return\r\nin\rside\nnul \x00 invalid \xff\xfe\xc3( ansi \x1b[31mred\x1b[0m\n"
	p := launch(t, writePipeline(t, actor("a", role{End: "registered", Dialect: "legacy", Out: []byte("out\n"), Err: []byte(out), Long: pieces}), shell("longer-id", "printf 'last\\r\\nwords'")))
	p.exit(exitOK)
	var got []string
	for _, line := range p.lines("a") {
		if line != "out" && line != "registered" {
			got = append(got, line)
		}
	}
	want := []string{"plain", "", "  indented\t", "carriage return", "in\rside", "nul \x00 invalid \xff\xfe\xc3( ansi \x1b[31mred\x1b[0m"}
	if len(got) < len(want)+2 || !slices.Equal(got[:len(want)], want) || got[len(got)-1] != "no newline" {
		t.Fatalf("got %d lines: %.1000q", len(got), got)
	}
	long := got[len(want) : len(got)-1]
	for _, piece := range long {
		if len(piece) > maxLine+minBuffer {
			t.Errorf("a piece of %d bytes", len(piece))
		}
	}
	if strings.Join(long, "") != strings.Repeat(longPiece, pieces) || len(long) > 4 {
		t.Errorf("the long line came in %d pieces, which are not what was written", len(long))
	}
	if got, want := p.lines("longer-id"), []string{"last", "words"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	p.has(p.stdout, " a         | out\n")
	p.hasNot(p.stderr, "plain")
	p.hasNot(p.stdout, "msg=")
	if !strings.HasSuffix(p.stdout.String(), "\n") {
		t.Error("the output does not end with a newline")
	}
}

func TestOutput_OfSeveralIsComplete(t *testing.T) {
	t.Parallel()
	const count = 50_000
	var parts []Component
	for _, id := range []string{"a", "b", "c"} {
		parts = append(parts, actor(id, role{Dialect: "legacy", Flood: count, End: "registered"}))
	}
	p := launch(t, writePipeline(t, parts...))
	p.exit(exitOK)
	for _, c := range parts {
		lines := p.lines(c.ID)
		if len(lines) != count+1 {
			t.Errorf("%s: %d lines, want %d", c.ID, len(lines), count+1)
			continue
		}
		for i, line := range lines[:count] {
			if want := fmt.Sprintf("line %d of %s %s", i, c.ID, strings.Repeat("x", i%200)); line != want {
				t.Fatalf("%s: line %d is %q, want %q", c.ID, i, line, want)
			}
		}
	}
	if got := strings.Count(p.stdout.String(), "\n"); got != 3*(count+1) {
		t.Errorf("%d lines in all, want %d", got, 3*(count+1))
	}
}

func TestOutput_JSON(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, actor("a", role{Dialect: "legacy", Out: []byte("to <out> & \"on\"\r\n"), Err: []byte("to err \xff"), OnUSR1: "exit", Code: 5})), "-log-format", "json")
	p.waitErr(`"msg":"pipeline ready"`)
	pid := regexp.MustCompile(`"msg":"started","component":"a","pid":(\d+)`).FindStringSubmatch(p.stderr.String())
	if pid == nil {
		t.Fatal(p)
	}
	n, _ := strconv.Atoi(pid[1])
	if err := syscall.Kill(n, syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	p.exit(exitFailed)
	got := make(map[string]string)
	for line := range strings.Lines(p.stdout.String()) {
		var l struct {
			Time                    time.Time
			Component, Stream, Line string
		}
		dec := json.NewDecoder(strings.NewReader(line))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&l); err != nil || l.Component != "a" || time.Since(l.Time) > time.Hour {
			t.Errorf("%v: %s", err, line)
		}
		got[l.Line] = l.Stream
	}
	if want := map[string]string{`to <out> & "on"`: "stdout", "registered": "stdout", "to err \ufffd": "stderr"}; !maps.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	var failed map[string]any
	for line := range strings.Lines(p.stderr.String()) {
		var l map[string]any
		if err := json.Unmarshal([]byte(line), &l); err != nil || l["time"] == nil || l["level"] == nil || l["msg"] == nil {
			t.Errorf("%v: %s", err, line)
		}
		failed = l
	}
	if failures, _ := failed["failures"].([]any); len(failures) == 1 {
		failed = failures[0].(map[string]any)
	}
	if failed["component"] != "a" || failed["reason"] != "exit status 5" || failed["registered"] != true || len(failed["last_lines"].([]any)) != 3 {
		t.Errorf("the failure: %v\n%s", failed, p)
	}
}

// Where nobody reads the output any more, as after "flowctl | head", the pipeline
// is stopped, and well.
func TestOutput_ClosedPipeStopsTheRun(t *testing.T) {
	t.Parallel()
	journal := filepath.Join(t.TempDir(), "journal")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	file := writePipeline(t, actor("a", role{Dialect: "legacy", Gate: true, Journal: journal}), actor("b", role{Journal: journal, Dialect: "v1"}))
	p := start(t, []string{"run", file, "-control-plane-port", "0"}, func(p *process) { p.cmd.Stdout = w })
	if n, err := r.Read(make([]byte, 1)); n != 1 || err != nil { // the first line of a or b
		t.Fatal(err)
	}
	r.Close()
	p.waitErr("msg=started component=b")
	p.waitErr("msg=ready component=b")
	deadline := time.Now().Add(patience)
	for !slices.Contains(readJournal(t, journal), "gate a") && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond) // a file has no event for us
	}
	_ = syscall.Kill(p.pid("a"), syscall.SIGUSR2) // now it says that it is registered, if it still lives
	p.exit(exitFailed)
	p.has(p.stderr, `level=ERROR msg="standard output cannot be written, stopping" err="write /dev/stdout: broken pipe"`)
	inOrder(t, readJournal(t, journal), "stop a")
	inOrder(t, readJournal(t, journal), "term b", "stop b")
}

// TestStop_DoesNotWaitForTheLog stops a flowctl whose standard error is a pipe that
// is full and that nobody reads.
func TestStop_DoesNotWaitForTheLog(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	_ = w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err == nil {
		_, err = w.Write(make([]byte, 4096))
	}
	file := filepath.Join(t.TempDir(), "pipeline.json")
	text := `{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "mute"}, "spec": {"sources": [{"id": "a", "command": ["sh", "-c", "echo up; exec sleep 1000"], "register": false}]}}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(flowctlProgram(t), "-f", file, "-control-plane-port", "0")
	cmd.Stderr = w
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || !strings.HasSuffix(line, "a | up\n") {
		t.Fatalf("standard output: %q, %v", line, err)
	}
	ended := make(chan error, 1)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("flowctl hangs")
	}
}

// A tally checks a stream of lines as flowctl prints them, without keeping them: for
// each component a count, and a hash of what it said.
type tally struct {
	mu      sync.Mutex // guards the fields below
	rest    []byte
	lines   map[string]int
	bytes   map[string]int
	sums    map[string]hash.Hash
	strange []string                          // lines without a component
	check   func(id string, line []byte) bool // false for a line that cannot be
}

func newTally(check func(id string, line []byte) bool) *tally {
	return &tally{lines: make(map[string]int), bytes: make(map[string]int), sums: make(map[string]hash.Hash), check: check}
}

func (y *tally) Write(p []byte) (int, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for rest := p; ; {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			y.rest = append(y.rest, rest...)
			return len(p), nil
		}
		line := rest[:i]
		if len(y.rest) > 0 {
			y.rest = append(y.rest, line...)
			line = y.rest
		}
		y.line(line)
		y.rest, rest = y.rest[:0], rest[i+1:]
	}
}

func (y *tally) line(line []byte) {
	head, text, found := bytes.Cut(line, []byte(" | "))
	if !found || len(head) < len("15:04:05 x") || head[2] != ':' || head[5] != ':' || head[8] != ' ' {
		y.strange = append(y.strange, string(line[:min(len(line), 200)]))
		return
	}
	id := string(bytes.TrimRight(head[9:], " "))
	if y.sums[id] == nil {
		y.sums[id] = sha256.New()
	}
	y.lines[id]++
	y.bytes[id] += len(text) + 1
	y.sums[id].Write(text)
	y.sums[id].Write([]byte{'\n'})
	if y.check != nil && !y.check(id, text) {
		y.strange = append(y.strange, string(line[:min(len(line), 200)]))
	}
}

func (y *tally) of(id string) (lines, size int, sum string) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.sums[id] == nil {
		return 0, 0, ""
	}
	return y.lines[id], y.bytes[id], fmt.Sprintf("%.4x", y.sums[id].Sum(nil))
}

func (y *tally) total() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	n := 0
	for _, size := range y.bytes {
		n += size
	}
	return n
}

// clean fails the test for lines that cannot be.
func (y *tally) clean(tb testing.TB) {
	tb.Helper()
	y.mu.Lock()
	defer y.mu.Unlock()
	if len(y.strange) > 0 {
		tb.Errorf("%d strange lines, the first: %q", len(y.strange), y.strange[:min(len(y.strange), 5)])
	}
	if len(y.rest) > 0 {
		tb.Errorf("the output ends in the middle of a line: %.200q", y.rest)
	}
}

// same wants all of a file, in order, from a component.
func (y *tally) same(tb testing.TB, id, file string) {
	tb.Helper()
	lines, size, sum := y.of(id)
	wantLines, wantSize, wantSum := fingerprint(tb, file)
	if lines != wantLines || size != wantSize || sum != wantSum {
		tb.Errorf("%s: %d lines, %d bytes, hash %s; want %d, %d, %s", id, lines, size, sum, wantLines, wantSize, wantSum)
	}
}

// numbered makes a file of lines of width bytes, each with its number and name.
func numbered(tb testing.TB, file, name string, lines, width int) string {
	tb.Helper()
	f, err := os.Create(file)
	if err != nil {
		tb.Fatal(err)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	pad := bytes.Repeat([]byte("abcdefghijklmnopqrstuvwxyz"), width/26+1)
	var line []byte
	for i := range lines {
		line = fmt.Appendf(line[:0], "%s %09d ", name, i)
		line = append(append(line, pad[:width-1-len(line)]...), '\n')
		_, _ = w.Write(line)
	}
	if err := errors.Join(w.Flush(), f.Close()); err != nil {
		tb.Fatal(err)
	}
	return file
}

// fingerprint is what a tally should have of a file.
func fingerprint(tb testing.TB, file string) (lines, size int, sum string) {
	tb.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		tb.Fatal(err)
	}
	hash := sha256.Sum256(data)
	return bytes.Count(data, []byte{'\n'}), len(data), fmt.Sprintf("%.4x", hash[:])
}

// 100 MB of each of two components at the moment of their end are all there.
func TestOutput_BurstAtExitIsComplete(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a := numbered(t, filepath.Join(dir, "a"), "a", 100_000, 1000)
	b := numbered(t, filepath.Join(dir, "b"), "b", 100, 1_000_000)
	y := newTally(nil)
	p := start(t, runArgs(writePipeline(t, shell("a", "exec cat "+a), shell("b", "exec cat "+b+" >&2"))), stdoutTo(y), withBinary(plainFlowctl()))
	p.exit(exitOK)
	y.same(t, "a", a)
	y.same(t, "b", b)
	y.clean(t)
}

// Lines around the longest that is passed on whole, and bytes that are no text.
func TestOutput_OddLinesAreComplete(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		if noise[i] = byte(random.Uint32()); noise[i] == '\r' { // a CR before a newline is dropped
			noise[i] = 0
		}
	}
	noise = append(noise, "\n\n\x00\n\xff\nno newline at the end"...)
	file := func(name string, data []byte) string { return writeFile(t, filepath.Join(dir, name), string(data)) }
	bytesOf := func(n int, b byte) []byte { return append(bytes.Repeat([]byte{b}, n), '\n') }
	for _, tt := range []struct {
		name string
		data []byte
	}{
		{"noise", noise},
		{"around the limit", slices.Concat(bytesOf(maxLine-1, 'a'), bytesOf(maxLine, 'b'), bytesOf(maxLine+1, 'c'), bytesOf(5, 'd'))},
		{"long", slices.Concat(bytesOf(7*maxLine+17, 'e'), []byte("short\n"), bytes.Repeat([]byte("0123456789abcde\r"), 3*maxLine/16), []byte("end"))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t, shell("a", "exec cat '"+file(tt.name, tt.data)+"'")))
			p.exit(exitOK)
			// What is put together of the pieces; lines that are no pieces have to be whole.
			var got []byte
			want := tt.data
			if !bytes.HasSuffix(want, []byte{'\n'}) {
				want = append(slices.Clip(want), '\n')
			}
			for line := range strings.SplitAfterSeq(p.stdout.String(), "\n") {
				if _, text, found := strings.Cut(line, " a | "); found {
					got = append(got, text...)
				} else {
					got = append(got, line...)
				}
			}
			if tt.name != "noise" { // there the cuts of long lines add newlines
				got, want = bytes.ReplaceAll(got, []byte{'\n'}, nil), bytes.ReplaceAll(want, []byte{'\n'}, nil)
			}
			if !bytes.Equal(got, want) {
				i := 0
				for i < min(len(got), len(want)) && got[i] == want[i] {
					i++
				}
				t.Errorf("got %d bytes, want %d; they differ at %d: %.60q, want %.60q", len(got), len(want), i, got[i:min(len(got), i+100)], want[i:min(len(want), i+100)])
			}
			if tt.name == "around the limit" {
				lines := p.lines("a")
				if len(lines) != 5 || len(lines[0]) != maxLine-1 || len(lines[1]) != maxLine {
					t.Errorf("%d lines; a line of %d bytes is to be passed on whole", len(lines), maxLine)
				}
			}
		})
	}
}

// A process that left the component keeps the pipe open: the run goes on at once, and
// what it says until its component ends is heard.
func TestOutput_OpenPipeHoldsNothingUp(t *testing.T) {
	t.Parallel()
	h := newHerd()
	c := shell("a", h.script(`setsid sh -c 'echo from afar; sleep T' & sleep 0.2; echo last words; exit 4`))
	c.RestartPolicy = "on-failure"
	p := launch(t, writePipeline(t, c))
	p.waitErr("msg=ended component=a")
	p.wait(p.stdout, "from afar\n", 1)
	p.wait(p.stdout, "last words\n", 1)
	p.waitErr("msg=restarting component=a")
	p.wait(p.stdout, "last words\n", 2) // it is restarted, too
	h.end(p, syscall.SIGTERM)
}

// Where nobody reads, components wait and flowctl does not grow; when somebody does
// again, however late, all is there.
func TestOutput_SlowReaderLosesNothing(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	a := numbered(t, filepath.Join(dir, "a"), "a", 20_000, 100)
	b := numbered(t, filepath.Join(dir, "b"), "b", 30, 1<<20)
	// They end at once as far as they can, with a stop timeout that is long past when
	// they are read.
	p := start(t, runArgs(writePipeline(t, shell("a", "exec cat "+a), shell("b", "exec cat "+b)), "-stop-timeout", "100ms"), stdoutTo(w), withBinary(plainFlowctl()))
	w.Close()
	time.Sleep(1500 * time.Millisecond) // it is time itself that must not matter
	if high := memory(t, p.cmd.Process.Pid, "VmHWM"); high > 60<<20 {
		t.Errorf("flowctl has grown to %d bytes", high)
	}
	y := newTally(nil)
	buf := make([]byte, 8<<10)
	for y.total() < 200_000 { // slowly first
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = y.Write(buf[:n])
		time.Sleep(time.Millisecond)
	}
	if _, err := io.Copy(y, r); err != nil {
		t.Fatal(err)
	}
	p.exit(exitOK)
	y.same(t, "a", a)
	y.same(t, "b", b)
	y.clean(t)
	p.hasNot(p.stderr, "lost")
}

// 500 MB wait in two components while the reader takes 20 MB, and then they are stopped.
func TestOutput_FloodWaitsForTheReader(t *testing.T) {
	t.Parallel()
	for _, reads := range []bool{true, false} {
		t.Run(map[bool]string{true: "reads", false: "hangs"}[reads], func(t *testing.T) {
			t.Parallel()
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			h := newHerd()
			line := strings.Repeat("0123456789", 1000)
			script := h.script(`: T; yes ` + line + ` | head -c 250000000`)
			p := start(t, runArgs(writePipeline(t, shell("a", script), shell("b", script+" >&2")), "-stop-timeout", "500ms"), stdoutTo(w), withBinary(plainFlowctl()))
			w.Close()
			y := newTally(func(_ string, got []byte) bool { return strings.HasPrefix(line, string(got)) })
			buf := make([]byte, 256<<10)
			for y.total() < 20<<20 {
				n, err := r.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = y.Write(buf[:n])
			}
			if high := memory(t, p.cmd.Process.Pid, "VmHWM"); high > 60<<20 {
				t.Errorf("flowctl has grown to %d bytes", high)
			}
			began := time.Now()
			p.signal(syscall.SIGTERM)
			if reads {
				_, _ = io.Copy(y, r)
				y.clean(t)
			}
			p.exit(exitOK)
			if took := time.Since(began); took > 500*time.Millisecond+killGrace() {
				t.Errorf("the stop took %s", took)
			}
			h.gone(p, 0)
			if lost := strings.Contains(p.stderr.String(), "output is lost"); lost == reads {
				t.Errorf("lost lines are told: %t\n%s", lost, p)
			}
		})
	}
}

// What the pipe of an ended component holds is read, however large that has made it.
func TestOutput_FullPipeOfAnEndedComponentIsRead(t *testing.T) {
	t.Parallel()
	const size = 900 << 10
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := actor("a", role{Hoard: size})
	c.Register = new(false)
	p := start(t, runArgs(writePipeline(t, c)), stdoutTo(w))
	w.Close()
	pid := p.pid("a")
	eventually(t, "the end of the component", func() bool { // or that it cannot, for want of privilege
		_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		return err != nil
	})
	y := newTally(nil)
	if _, err := io.Copy(y, r); err != nil {
		t.Fatal(err)
	}
	<-p.done
	if p.cmd.ProcessState.ExitCode() == exitFailed && strings.Contains(p.stderr.String(), "exit status 77") {
		t.Skip("this system does not let us have a pipe of this size")
	}
	if lines, _, _ := y.of("a"); lines < size/len("line 000000000\n") {
		t.Errorf("%d of %d lines", lines, size/len("line 000000000\n")+1)
	}
	y.clean(t)
}

// A reader that goes away, as head does, ends a run of components that flood.
func TestOutput_ClosedPipeEndsAFlood(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	h := newHerd()
	p := start(t, runArgs(writePipeline(t, shell("a", h.script(`: T; yes`)), shell("b", h.script(daemons+` & exec sleep T`))), "-stop-timeout", "500ms"), stdoutTo(w))
	w.Close()
	p.waitReady()
	h.await(p, 3)
	if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	p.exit(exitFailed)
	h.gone(p, 0)
	p.has(p.stderr, `level=ERROR msg="standard output cannot be written, stopping" err="write /dev/stdout: broken pipe"`)
}

// A watcher looks, for each line that it is given, whether that is in a file already.
type watcher struct {
	tally
	file    string
	missing atomic.Value // the first line that was not
}

func (w *watcher) Write(p []byte) (int, error) {
	n, err := w.tally.Write(p)
	if i := bytes.LastIndexByte(p, '\n'); i >= 0 {
		line := p[bytes.LastIndexByte(p[:i], '\n')+1 : i+1]
		if _, text, found := bytes.Cut(line, []byte(" | ")); found {
			if data, err := os.ReadFile(w.file); err != nil || !bytes.Contains(data[max(0, len(data)-(1<<20)):], append([]byte{' '}, text...)) {
				w.missing.CompareAndSwap(nil, string(line))
			}
		}
	}
	return n, err
}

// logLines returns the lines of log files without their times, which must be such.
func logLines(tb testing.TB, files ...string) []string {
	tb.Helper()
	var lines []string
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			tb.Fatal(err)
		}
		if len(data) > 0 && data[len(data)-1] != '\n' {
			tb.Errorf("%s ends in the middle of a line: %.100q", file, data[max(0, len(data)-100):])
		}
		for line := range strings.Lines(string(data)) {
			stamp, text, _ := strings.Cut(line, " ")
			if at, err := time.Parse("2006-01-02T15:04:05.000Z07:00", stamp); err != nil || time.Since(at).Abs() > time.Hour {
				tb.Fatalf("%s has a line without its time: %q", file, line)
			}
			lines = append(lines, strings.TrimSuffix(text, "\n"))
		}
	}
	return lines
}

// counted checks that lines are "NAME NUMBER ..." with numbers that follow each other.
func counted(tb testing.TB, lines []string, from, to int) {
	tb.Helper()
	if len(lines) != to-from {
		tb.Errorf("%d lines, want %d", len(lines), to-from)
		return
	}
	for i, line := range lines {
		fields := strings.Fields(line)
		if n := -1; len(fields) < 2 {
			tb.Fatalf("line %q", line)
		} else if n, _ = strconv.Atoi(fields[1]); n != from+i {
			tb.Fatalf("line %d is %.60q", from+i, line)
		}
	}
}

// What is on the terminal is in the file, at that moment and after SIGKILL.
func TestLogFile_HasWhatIsShown(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "made", "by", "flowctl")
	h := newHerd()
	w := &watcher{tally: *newTally(nil), file: filepath.Join(dir, "a.log")}
	p := start(t, runArgs(writePipeline(t, shell("a", h.script(`: T; i=0; while :; do echo "line $i"; echo "err $i" >&2; i=$((i+1)); [ $((i%100)) = 0 ] && sleep 0.01; done`))), "-log-dir", dir), stdoutTo(w))
	eventually(t, "some output", func() bool { lines, _, _ := w.of("a"); return lines > 5000 })
	h.end(p, syscall.SIGKILL)
	if missing := w.missing.Load(); missing != nil {
		t.Errorf("was shown and was not in the file: %q", missing)
	}
	shown, _, _ := w.of("a")
	if in := len(logLines(t, w.file)); in < shown {
		t.Errorf("%d lines in the file, %d were shown", in, shown)
	}
}

func TestLogFile_IsRotated(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	logs := filepath.Join(dir, "logs")
	const lines = 30_000
	file := writePipeline(t, shell("a", "exec cat "+numbered(t, filepath.Join(dir, "data"), "a", lines, 1000)), shell("b", "echo b 0"))
	p := start(t, runArgs(file, "-log-dir", logs), withBinary(plainFlowctl()))
	p.exit(exitOK)
	entries, err := os.ReadDir(logs)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || info.Size() > maxLogFile {
			t.Errorf("%s: %v, %d bytes", e.Name(), err, info.Size())
		}
		names = append(names, e.Name())
	}
	if want := []string{"a.log", "a.log.1", "b.log"}; !slices.Equal(names, want) {
		t.Fatalf("files %q, want %q", names, want)
	}
	got := logLines(t, filepath.Join(logs, "a.log.1"), filepath.Join(logs, "a.log"))
	counted(t, got, lines-len(got), lines)
	if rotated, _ := os.Stat(filepath.Join(logs, "a.log.1")); rotated.Size() < maxLogFile*9/10 {
		t.Errorf("it was rotated at %d bytes", rotated.Size())
	}
	// A later run goes on where this one ended.
	p = start(t, runArgs(file, "-log-dir", logs), withBinary(plainFlowctl()))
	p.exit(exitOK)
	if got := logLines(t, filepath.Join(logs, "b.log")); !slices.Equal(got, []string{"b 0", "b 0"}) {
		t.Errorf("after two runs the file has %q", got)
	}
}

// A log file that cannot be rotated has everything and says so seldom.
func TestLogFile_ThatCannotBeRotatedHasAll(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const lines = 40_000
	if err := os.MkdirAll(filepath.Join(dir, "logs", "a.log.1"), 0o700); err != nil {
		t.Fatal(err)
	}
	data := numbered(t, filepath.Join(dir, "data"), "a", lines, 1000)
	y := newTally(nil)
	p := start(t, runArgs(writePipeline(t, shell("a", "exec cat "+data)), "-log-dir", filepath.Join(dir, "logs")), stdoutTo(y), withBinary(plainFlowctl()))
	p.exit(exitOK)
	y.same(t, "a", data)
	counted(t, logLines(t, filepath.Join(dir, "logs", "a.log")), 0, lines)
	if n := strings.Count(p.stderr.String(), "level=ERROR"); n < 1 || n > 4 {
		t.Errorf("%d errors, want one for each 10 MiB at most\n%s", n, p)
	}
}

// A full disk stops nothing, is told, and leaves no part of a line.
func TestLogFile_FullDiskStopsNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=512k"); err != nil {
		t.Skip("this system does not let us mount a small disk: ", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
	writeFile(t, filepath.Join(disk, "other"), strings.Repeat("x", 300<<10))
	first := numbered(t, filepath.Join(dir, "first"), "a", 5_000, 100)
	second := numbered(t, filepath.Join(dir, "second"), "a", 1_000, 100)
	h := newHerd()
	again := filepath.Join(dir, "again")
	y := newTally(nil)
	p := start(t, runArgs(writePipeline(t, shell("a", h.script("cat "+first+"; until [ -e "+again+" ]; do sleep 0.01; done; cat "+second+"; exec sleep T"))), "-log-dir", disk), stdoutTo(y))
	eventually(t, "all that it prints on a full disk", func() bool { lines, _, _ := y.of("a"); return lines == 5_000 })
	if err := os.Remove(filepath.Join(disk, "other")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, again, "")
	eventually(t, "the rest", func() bool { lines, _, _ := y.of("a"); return lines == 6_000 })
	h.end(p, syscall.SIGTERM)
	y.clean(t)
	got := logLines(t, filepath.Join(disk, "a.log"))
	for _, line := range got {
		if len(line) != 99 || !strings.HasPrefix(line, "a 0") {
			t.Fatalf("not a line of it: %q", line)
		}
	}
	if len(got) < 1_000 {
		t.Fatalf("%d lines in the file", len(got))
	}
	counted(t, got[len(got)-1_000:], 0, 1_000)
	if n := strings.Count(p.stderr.String(), "level=ERROR"); n < 1 || n > 3 {
		t.Errorf("the full disk is told %d times\n%s", n, p)
	}
}

func TestLogDir_ThatCannotBeMade(t *testing.T) {
	t.Parallel()
	plainFile := writeFile(t, filepath.Join(t.TempDir(), "file"), "")
	public := publicDir(t)
	for _, tt := range []struct {
		name, dir string
		byFlag    bool
		nobody    bool
		want      string
	}{
		{"a file", plainFile, true, false, "not a directory"},
		{"below a file", filepath.Join(plainFile, "x"), true, false, "not a directory"},
		{"not writable", public, true, true, "permission denied"},
		{"not to be made", filepath.Join(public, "x"), true, true, "permission denied"},
		{"a file, from the environment", plainFile, false, false, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			args := []string{"-until", "done"}
			var options []option
			if tt.byFlag {
				args = append(args, "-log-dir", tt.dir)
			} else {
				options = append(options, withEnv("LOGS_DIRECTORY="+tt.dir))
			}
			if tt.nobody {
				if os.Getuid() != 0 {
					t.Skip("only root can be another user")
				}
				options = append(options, asNobody(65534))
			}
			p := start(t, runArgs(publicPipeline(t, shell("a", "echo out")), args...), options...)
			if tt.byFlag {
				p.exit(exitUsage)
				p.hasNot(p.stderr, "msg=started")
				p.has(p.stderr, "-log-dir", filepath.Dir(tt.dir), tt.want)
				return
			}
			p.exit(exitOK)
			p.has(p.stderr, "level=WARN", tt.dir, tt.want)
			p.has(p.stdout, "a | out\n")
		})
	}
}

func TestLogDir_OfSystemd(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		env  func(dir string) string
		args []string
		want bool
	}{
		{"taken", func(dir string) string { return dir }, nil, true},
		{"the first of several", func(dir string) string { return dir + ":/nonexistent" }, nil, true},
		{"turned off", func(dir string) string { return dir }, []string{"-log-dir", ""}, false},
		{"none", func(string) string { return "" }, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file := writePipeline(t, shell("a", "echo out; echo err >&2"))
			p := start(t, runArgs(file, tt.args...), withEnv("LOGS_DIRECTORY="+tt.env(dir)))
			p.exit(exitOK)
			if entries, _ := os.ReadDir(dir); len(entries) > 0 != tt.want {
				t.Errorf("log files: %v", entries)
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), "logs")); err == nil {
				t.Error("log files beside a pipeline that has no terminal")
			}
			if tt.want {
				if got := logLines(t, filepath.Join(dir, "a.log")); len(got) != 2 || !slices.Contains(got, "out") || !slices.Contains(got, "err") {
					t.Errorf("the file has %q", got)
				}
			}
		})
	}
}

// Another program that shares the terminal, as ssh does, may make it non-blocking:
// that is no end of standard output.
func TestOutput_NonBlockingIsComplete(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	data := numbered(t, filepath.Join(dir, "data"), "a", 10_000, 100)
	set := filepath.Join(dir, "set")
	p := start(t, runArgs(writePipeline(t, shell("a", "until [ -e "+set+" ]; do sleep 0.01; done; exec cat "+data))), stdoutTo(w))
	p.waitReady()
	if err := syscall.SetNonblock(int(w.Fd()), true); err != nil { // flowctl's too: it is one open file
		t.Fatal(err)
	}
	writeFile(t, set, "")
	y := newTally(nil)
	buf := make([]byte, 4096)
	go func() {
		<-p.done
		_ = w.Close() // the last one that holds it
	}()
	for slow := 0; ; slow++ {
		n, err := r.Read(buf)
		if err != nil {
			break
		}
		_, _ = y.Write(buf[:n])
		if slow < 50 {
			time.Sleep(time.Millisecond)
		}
	}
	p.exit(exitOK)
	y.same(t, "a", data)
	y.clean(t)
}

// What was written before close has come through when close returns, which is at once.
func TestLogWriter_CloseDoesNotHang(t *testing.T) {
	t.Parallel()
	for i := range 20_000 {
		var got bytes.Buffer
		l := newLogWriter(&got, formatText, nil, nil)
		_, _ = l.Write([]byte("last\n"))
		began := time.Now()
		l.close()
		if got.String() != "last\n" || time.Since(began) > flushTime/2 {
			t.Fatalf("close %d took %s and has written %q", i, time.Since(began), got.String())
		}
	}
}

// An answer that cannot be written is an error, however short it is.
func TestAnswers_UnwritableOutputIsAnError(t *testing.T) {
	t.Parallel()
	file := sleeper(t)
	run := start(t, runArgs(sleeper(t)))
	run.waitReady()
	for _, args := range []string{
		"version", "--version", "help", "help run", "list -h", "check " + file, "check -json " + file, "check -schema",
		"list -e " + run.endpoint(), "list -json -e " + run.endpoint(), "list -watch -e " + run.endpoint(), "reload -e " + run.endpoint(),
	} {
		t.Run(strings.SplitN(args, "/", 2)[0], func(t *testing.T) {
			p := start(t, strings.Fields(args), intoFull(t, "")...)
			p.exit(exitFailed)
			p.has(p.stderr, "flowctl: write /dev/stdout: no space left on device\n")
		})
	}
	run.stop()
}

// The loop of a run makes components known while nobody reads the output.
func TestConsole_AddDoesNotWaitForTheReader(t *testing.T) {
	t.Parallel()
	writing, read := make(chan struct{}), make(chan struct{})
	c := newConsole(func(b []byte) (int, error) {
		close(writing)
		<-read
		return len(b), nil
	}, formatText, false, []string{"a"})
	var flood sync.WaitGroup
	flood.Go(func() { c.lines("a", "stdout", []byte("held\n")) })
	<-writing
	added := make(chan struct{})
	go func() {
		c.add("b")
		close(added)
	}()
	select {
	case <-added:
	case <-time.After(patience):
		t.Error("add waits for the reader")
	}
	close(read)
	flood.Wait()
	<-added
}
