//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

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

// openLogs returns what flowctl has open below dir.
func openLogs(tb testing.TB, p *process, dir string) []string {
	tb.Helper()
	var names []string
	for _, fd := range get(os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)))(tb) {
		name, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", p.cmd.Process.Pid, fd.Name()))
		if strings.HasPrefix(name, dir+"/") {
			names = append(names, name)
		}
	}
	return names
}

// A log file that others have removed or renamed is opened anew: soon, before the next lines, and
// before a reload is answered.
func TestLogFile_IsOpenedAnew(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		move func(dir, file string) error
		old  string // where the former lines are, below the folder of dir; "" for nowhere
	}{
		{"removed", func(_, file string) error { return os.Remove(file) }, ""},
		{"renamed", func(_, file string) error { return os.Rename(file, file+".old") }, "logs/a.log.old"},
		{"folder removed", func(dir, _ string) error {
			return errors.Join(os.Rename(dir, dir+".old"), os.RemoveAll(dir+".old"))
		}, ""},
		{"folder renamed", func(dir, _ string) error { return os.Rename(dir, dir+".old") }, "logs.old/a.log"},
		{"replaced", func(_, file string) error {
			return errors.Join(os.WriteFile(file+".new", nil, 0o600), os.Rename(file+".new", file))
		}, ""},
		{"shortened", func(_, file string) error { return os.Truncate(file, 0) }, ""},
	} {
		for _, next := range []string{"silence", "lines", "reload"} {
			t.Run(tt.name+" and "+next, func(t *testing.T) {
				t.Parallel()
				top := t.TempDir()
				dir, on := filepath.Join(top, "logs"), filepath.Join(top, "on")
				file := filepath.Join(dir, "a.log")
				p := launch(t, writePipeline(t, shell("a", "echo before; until [ -e "+on+" ]; do sleep 0.01; done; echo after; exec sleep 300")), "-log-dir", dir)
				p.waitOut("before\n")
				must(t, tt.move(dir, file))
				switch next {
				case "silence":
					eventually(t, "the file", func() bool {
						_, err := os.Stat(file)
						return err == nil && slices.Equal(openLogs(t, p, top), []string{file})
					})
				case "reload":
					if code, _, stderr := p.callReload(); code != exitOK {
						t.Errorf("reload: %d, %s", code, stderr)
					}
					if _, err := os.Stat(file); err != nil || !slices.Equal(openLogs(t, p, top), []string{file}) {
						t.Errorf("after the reload: %v, open are %q", err, openLogs(t, p, top))
					}
				}
				writeFile(t, on, "")
				p.waitOut("after\n")
				if got := logLines(t, file); !slices.Equal(got, []string{"after"}) {
					t.Errorf("the file has %q", got)
				}
				if tt.old != "" {
					if got := logLines(t, filepath.Join(top, tt.old)); !slices.Equal(got, []string{"before"}) {
						t.Errorf("the former file has %q", got)
					}
				}
				p.stop()
				p.hasNot(p.stderr, "level=ERROR", "level=WARN")
			})
		}
	}
}

// A file that others have made shorter is rotated by what is in it.
func TestLogFile_RotatedByItsSize(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	dir, on := filepath.Join(top, "logs"), filepath.Join(top, "on")
	data := numbered(t, filepath.Join(top, "data"), "a", 6_000, 1000)
	p := start(t, runArgs(writePipeline(t, shell("a", "cat "+data+"; until [ -e "+on+" ]; do sleep 0.01; done; exec cat "+data)), "-log-dir", dir))
	p.wait(p.stdout, "a 000005999", 1)
	must(t, os.Truncate(filepath.Join(dir, "a.log"), 0))
	writeFile(t, on, "")
	p.exit(exitOK)
	counted(t, logLines(t, filepath.Join(dir, "a.log")), 0, 6_000)
	if _, err := os.Stat(filepath.Join(dir, "a.log.1")); err == nil {
		t.Error("it was rotated")
	}
}

// A component that a reload has taken out leaves no open file, and one that comes again goes on
// with the file.
func TestLogFile_OfAComponentThatLeaves(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "logs")
	a, b := shell("a", "echo up; exec sleep 300"), shell("b", "exec sleep 300")
	file := writePipeline(t, a, b)
	p := launch(t, file, "-log-dir", dir)
	p.waitOut(" a | up\n")
	p.waitReady()
	rewrite(t, file, b)
	p.reload("reloaded: removed a; 1 unchanged\n")
	eventually(t, "that only b has a log file open", func() bool {
		return slices.Equal(openLogs(t, p, dir), []string{filepath.Join(dir, "b.log")})
	})
	rewrite(t, file, a, b)
	p.reload("reloaded: added a; 1 unchanged\n")
	p.wait(p.stdout, " a | up\n", 2)
	if got := logLines(t, filepath.Join(dir, "a.log")); !slices.Equal(got, []string{"up", "up"}) {
		t.Errorf("the file has %q", got)
	}
	p.stop()
}
