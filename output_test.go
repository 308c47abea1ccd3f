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
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// What a component writes comes out as it is, line by line. What is longer than the longest
// line that is passed on whole comes in pieces.
func TestOutput_LinesComeOutAsTheyAre(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		if noise[i] = byte(random.Uint32()); noise[i] == '\r' { // a CR before a newline is dropped
			noise[i] = 0
		}
	}
	piece, returns := strings.Repeat("z", maxLine), strings.Repeat("0123456789abcde\r", 3*maxLine/16)
	odd := "  indented\t\nNUL \x00 invalid \xff\xfe\xc3( ANSI \x1b[31mred\x1b[0m\n"
	rows := []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"lines", "a\nb\n", "a\nb\n"},
		{"unterminated", "a\nb", "a\nb\n"},
		{"CR", "a\r\nin\rside\nb\r", "a\nin\rside\nb\n"},
		{"empty lines", "\n\n", "\n\n"},
		{"no text", odd, odd},
		{"noise", string(noise), string(noise) + "\n"},
		{"longer than the first buffer", strings.Repeat("q", 3*minBuffer) + "\nr\n", strings.Repeat("q", 3*minBuffer) + "\nr\n"},
		{"one byte below a piece", piece[1:] + "\n", piece[1:] + "\n"},
		{"a piece and CRLF", piece + "\r\nnext\r\n" + piece + "\r\n" + piece[1:] + "\r\n", piece + "\nnext\n" + piece + "\n" + piece[1:] + "\n"},
		{"a piece and CR", piece + "\rx\n" + piece + "\r\r\n" + piece + "\r", piece + "\n\rx\n" + piece + "\n\r\n" + piece + "\n"},
		{"a byte above a piece", "a\n" + piece + "y\n" + piece + "y\n", "a\n" + piece + "\ny\n" + piece + "\ny\n"},
		{"longer than a piece", piece + piece + "tail\nnext\n", piece + "\n" + piece + "\ntail\nnext\n"},
		{"a CR at the end of a piece", returns + "end",
			returns[:maxLine-1] + "\n" + returns[maxLine-1:2*maxLine-1] + "\n" + returns[2*maxLine-1:3*maxLine-1] + "\n\rend\n"},
	}
	dir := t.TempDir()
	var components []Component
	for i, row := range rows {
		file := writeFile(t, filepath.Join(dir, row.name), row.in)
		components = append(components, shell(fmt.Sprint("c", i), fmt.Sprintf("exec cat %q >&%d", file, 1+i%2)))
	}
	p := launch(t, writePipeline(t, components...))
	p.exit(exitOK)
	for i, row := range rows {
		var got strings.Builder
		for _, line := range p.lines(components[i].ID) {
			got.WriteString(line + "\n")
		}
		if got.String() != row.want {
			t.Errorf("%s: got %d bytes %.40q, want %d bytes %.40q", row.name, got.Len(), got.String(), len(row.want), row.want)
		}
	}
	p.has(p.stdout, " c1  | a\n")
	p.hasNot(p.stdout, "msg=")
	p.hasNot(p.stderr, "indented")
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

// openPipe returns the ends of a pipe, which the test need not close.
func openPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// isFull tells whether a write to the pipe w would wait.
func isFull(t *testing.T, w *os.File) (full bool) {
	t.Helper()
	conn := get(w.SyscallConn())(t)
	must(t, conn.Control(func(fd uintptr) {
		var set syscall.FdSet
		set.Bits[fd/64] |= 1 << (fd % 64)
		n, err := syscall.Select(int(fd)+1, nil, &set, nil, new(syscall.Timeval))
		full = n == 0 && err == nil
	}))
	return full
}

// fillPipe writes to a pipe until it is full.
func fillPipe(w *os.File) {
	_ = w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err := error(nil); err == nil; {
		_, err = w.Write(make([]byte, 4096))
	}
}

// TestStop_DoesNotWaitForTheLog stops a flowctl whose standard error is a pipe that
// is full and that nobody reads.
func TestStop_DoesNotWaitForTheLog(t *testing.T) {
	t.Parallel()
	_, w := openPipe(t)
	fillPipe(w)
	p := start(t, runArgs(writePipeline(t, shell("a", "echo up; exec sleep 1000"))), func(p *process) { p.cmd.Stderr = w })
	p.waitOut("a | up\n")
	p.stop()
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

// A process that left the component keeps the pipe open: the run goes on at once, and
// what it says until its component ends is heard.
func TestOutput_OpenPipeHoldsNothingUp(t *testing.T) {
	t.Parallel()
	h := newHerd()
	c := shell("a", h.script(`setsid sh -c 'echo from afar; sleep T' & sleep 0.2; yes 0123456789 | head -n 5000; echo last words; exit 4`))
	c.RestartPolicy = "on-failure"
	p := launch(t, writePipeline(t, c))
	p.waitErr("msg=ended component=a")
	p.wait(p.stdout, "from afar\n", 1)
	p.wait(p.stdout, "last words\n", 1)
	p.wait(p.stdout, " | 0123456789\n", 5000)
	p.waitErr("msg=restarting component=a")
	p.wait(p.stdout, "last words\n", 2) // it is restarted, too
	h.end(p, syscall.SIGTERM)
}

// Where nobody reads, components wait and flowctl does not grow; when somebody does
// again, however late, all is there.
func TestOutput_SlowReaderLosesNothing(t *testing.T) {
	t.Parallel()
	r, w := openPipe(t)
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
			r, w := openPipe(t)
			h := newHerd()
			line := strings.Repeat("0123456789", 1000)
			script := h.script(`: T; yes ` + line + ` | head -c 250000000`)
			p := start(t, runArgs(writePipeline(t, shell("a", script), shell("b", script+" >&2")), "-stop-timeout", "500ms"), stdoutTo(w), withBinary(plainFlowctl()))
			if reads {
				w.Close()
			}
			y := newTally(func(_ string, got []byte) bool { return strings.HasPrefix(line, string(got)) })
			buf := make([]byte, 256<<10)
			for y.total() < 20<<20 {
				n, err := r.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = y.Write(buf[:n])
			}
			if !reads {
				eventually(t, "a full pipe", func() bool { return isFull(t, w) })
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
	r, w := openPipe(t)
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

// Where nobody reads the output any more, as after "flowctl | head", the pipeline is stopped,
// and well, even one that floods.
func TestOutput_ClosedPipeStopsTheRun(t *testing.T) {
	t.Parallel()
	r, w := openPipe(t)
	h := newHerd()
	asked := filepath.Join(t.TempDir(), "asked")
	b := shell("b", h.script(daemons+` & trap "touch `+asked+`; exit" TERM; sleep T & wait`))
	p := start(t, runArgs(writePipeline(t, shell("a", h.script(`: T; yes`)), b), "-stop-timeout", "500ms"), stdoutTo(w))
	w.Close()
	p.waitReady()
	h.await(p, 4)
	if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	p.exit(exitFailed)
	h.gone(p, 0)
	p.has(p.stderr, `level=ERROR msg="standard output cannot be written, stopping" err="write /dev/stdout: broken pipe"`)
	if _, err := os.Stat(asked); err != nil {
		t.Errorf("b was not asked to end: %v\n%s", err, p)
	}
}

// -log-format auto is decided for each stream: what leads to the journal gets records there, and
// the other stream text.
func TestOutput_AutoFormatIsOfEachStream(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can put a journal in place of the machine's")
	}
	const fromA, fromFlowctl = "COMPONENT=a\n", "pipeline ready"
	for _, tt := range []struct {
		name    string
		journal string // the descriptor of flowctl that leads there
		command bool
		want    map[string]string // where lines of the component, and of flowctl, are
	}{
		{"neither", "0", false, map[string]string{" a | up\n": "stdout", "msg=\"pipeline ready\"": "stderr"}},
		{"standard output", "1", false, map[string]string{fromA: "journal", "msg=\"pipeline ready\"": "stderr"}},
		{"standard error", "2", false, map[string]string{" a | up\n": "stdout", fromFlowctl: "journal"}},
		{"standard output and a command", "1", true, map[string]string{" a | up\n": "stderr", "msg=\"pipeline ready\"": "stderr"}},
		{"standard error and a command", "2", true, map[string]string{fromA: "journal", fromFlowctl: "journal"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir, records := shortDir(t), newTranscript()
			conn := get(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "socket"), Net: "unixgram"}))(t)
			t.Cleanup(func() { conn.Close() })
			go func() {
				buf := make([]byte, 64<<10)
				for {
					n, err := conn.Read(buf)
					if err != nil {
						return
					}
					records.Write(append(buf[:n], '\n'))
				}
			}()
			args := runArgs(writePipeline(t, shell("a", "echo up; sleep 1")))
			if tt.command {
				args = append(args, "--", "sleep", "0.5")
			}
			mount := "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind " + dir + " /run/systemd/journal"
			p := start(t, args, afterCommand(mount+" && export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/$$/fd/"+tt.journal+") &&"), func(p *process) {
				p.cmd.Args = append([]string{"unshare", "-m", p.cmd.Path}, p.cmd.Args[1:]...)
				p.cmd.Path = get(exec.LookPath("unshare"))(t)
			})
			if code, _, stderr := p.finish(); code != exitOK {
				if strings.Contains(stderr, "unshare:") || strings.Contains(stderr, "mount:") {
					t.Skip("this system does not let us have mounts of our own: " + stderr)
				}
				t.Fatalf("exit %d\n%s", code, p)
			}
			places := map[string]*transcript{"stdout": p.stdout, "stderr": p.stderr, "journal": records}
			for want, where := range tt.want {
				places[where].contains(want, 1, nil) // the last records are read after the end
				for name, place := range places {
					if got := strings.Contains(place.String(), want); got != (name == where) {
						t.Errorf("%q is in the %s: %t\n%s\n--- journal\n%s", want, name, got, p, records)
					}
				}
			}
		})
	}
}

// Another program that shares the terminal, as ssh does, may make it non-blocking:
// that is no end of standard output.
func TestOutput_NonBlockingIsComplete(t *testing.T) {
	t.Parallel()
	r, w := openPipe(t)
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
		"list -e " + run.endpoint(), "list -json -e " + run.endpoint(), "list -watch -e " + run.endpoint(), "reload",
	} {
		t.Run(strings.SplitN(args, "/", 2)[0], func(t *testing.T) {
			p := start(t, strings.Fields(args), append(intoFull(t, ""), beside(run))...)
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
	}, formatText, time.TimeOnly, false, []string{"a"})
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

// What is read on another day has dates: files that are appended to, and JSON.
func TestOutput_AppendedHasDates(t *testing.T) {
	t.Parallel()
	const date, clock = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d`, `\d\d:\d\d:\d\d`
	for _, tt := range []struct {
		flags        int
		format, want string // want is of each line
	}{
		{os.O_APPEND, "auto", `(time=` + date + ` level=.*|` + date + ` a \| out)\n`},
		{os.O_TRUNC, "auto", `(time=` + clock + ` level=.*|` + clock + ` a \| out)\n`},
		{os.O_TRUNC, "json", `\{"time":"` + date + `\..*\}\n`},
	} {
		path := filepath.Join(t.TempDir(), "log")
		f := get(os.OpenFile(path, os.O_CREATE|os.O_WRONLY|tt.flags, 0o600))(t)
		p := start(t, runArgs(writePipeline(t, shell("a", "echo out")), "-log-format", tt.format), func(p *process) { p.cmd.Stdout, p.cmd.Stderr = f, f })
		p.exit(exitOK)
		must(t, f.Close())
		text := get(os.ReadFile(path))(t)
		if !regexp.MustCompile(`^(`+tt.want+`)+$`).Match(text) || !bytes.Contains(text, []byte("out")) {
			t.Errorf("%s: %s", tt.format, text)
		}
	}
}

// Each stream of a unit gets what the unit asks for: a file text, with dates, and the journal records.
func testUnitStreams(t *testing.T, l *lab) {
	const date = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d`
	for _, tt := range []struct{ name, streams, file, inJournal, notInJournal string }{
		{"lines-in-file", "StandardOutput=append:/var/log/lines-in-file.txt\nStandardError=journal\n", date + ` a \| out`, "flowctl", "a"},
		{"log-in-file", "StandardOutput=journal\nStandardError=append:/var/log/log-in-file.txt\n", `(time=` + date + ` level=.*\n)+time=` + date + ` .*msg="pipeline ready" .*`, "a", "flowctl"},
	} {
		u := l.install(t, tt.name, []Component{shell("a", "echo out; exec sleep 1000")}, "-control-plane-port 0", tt.streams)
		u.start()
		u.logged("", "SYSLOG_IDENTIFIER="+tt.inJournal, "_TRANSPORT=journal", "PIPELINE="+tt.name)
		text := ""
		u.eventually(func() bool {
			text = l.run(t, "cat", "/var/log/"+tt.name+".txt")
			return regexp.MustCompile(`^` + tt.file + `$`).MatchString(text)
		}, func() string { return fmt.Sprintf("%s has %q", tt.name, text) })
		if got := u.journal("SYSLOG_IDENTIFIER="+tt.notInJournal, "PIPELINE="+tt.name); len(got) > 0 {
			t.Errorf("in the journal too: %v", got)
		}
	}
}
