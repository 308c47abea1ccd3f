package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hangDisk has everything that is looked for in a folder wait for an answer, until the end of
// the test: a file system whose server says nothing.
func hangDisk(t *testing.T, folder string) {
	t.Helper()
	fd, err := syscall.Open("/dev/fuse", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err == nil {
		err = syscall.Mount("hangs", folder, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40755,user_id=0,group_id=0", fd))
	}
	if err != nil {
		t.Skip("this system does not let us mount a disk that hangs: ", err)
	}
	t.Cleanup(func() {
		_ = syscall.Unmount(folder, syscall.MNT_DETACH)
		syscall.Close(fd)
	})
}

// A disk of the log files that hangs keeps neither lines from the output, nor a reload, nor the end.
func TestLogFile_DiskThatHangsStopsNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	logs, on := filepath.Join(dir, "logs"), filepath.Join(dir, "on")
	lines := numbered(t, filepath.Join(dir, "data"), "a", 20_000, 1000) // more than a log file
	wait := "until [ -e " + on + " ]; do sleep 0.01; done; "
	a, b := shell("a", wait+"cat "+lines+"; exec sleep 300"), shell("b", wait+"echo from b; exec sleep 300")
	y := newTally(nil)
	file := writePipeline(t, a, b)
	p := start(t, runArgs(file, "-log-dir", logs), stdoutTo(y))
	p.waitReady()
	hangDisk(t, logs)
	writeFile(t, on, "")
	eventually(t, "all that a prints", func() bool { n, _, _ := y.of("a"); return n == 20_000 })
	p.waitErr(`msg="trouble with a log file" component=a err="` + filepath.Join(logs, "a.log") + ": no answer from the disk for 1.5s")
	if err := os.Rename(writePipeline(t, a, b, shell("c", "echo from c; exec sleep 300")), file); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := p.callReload(); code != exitOK || stdout != "reloaded: added c; 2 unchanged\n" {
		t.Errorf("reload: %d, %s%s", code, stdout, stderr)
	}
	eventually(t, "what c prints", func() bool { n, _, _ := y.of("c"); return n == 1 })
	begun := time.Now()
	p.stop()
	if took := time.Since(begun); took > 3*diskTime {
		t.Errorf("the end took %s", took)
	}
	y.same(t, "a", filepath.Join(dir, "data"))
}

// It is told at the start.
func TestLogDir_OfADiskThatHangs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	hangDisk(t, dir)
	logs, file := filepath.Join(dir, "logs"), writePipeline(t, shell("a", "echo out"))
	p := start(t, runArgs(file, "-log-dir", logs))
	p.exit(exitPlane) // it may answer later
	p.has(p.stderr, "flowctl: -log-dir: "+logs+": no answer from the disk for 1.5s\n")
	p = start(t, runArgs(file), withEnv("LOGS_DIRECTORY="+logs))
	p.exit(exitOK)
	p.has(p.stderr, `level=WARN msg="no log files" err="`+logs+": no answer")
	p.has(p.stdout, " a | out\n")
}

// What stands in the place of a log file is named, and neither followed nor waited for.
func TestLogFile_OnlyPlainFilesAreWritten(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		place func(path, other string) error
		want  string
	}{
		{"a link", func(path, other string) error { return os.Symlink(other, path) }, "is a link, a pipe or a socket: "},
		{"another name", func(path, other string) error { return os.Link(other, path) }, "is -rw------- with 2 names: "},
		{"a pipe", func(path, _ string) error { return syscall.Mkfifo(path, 0o600) }, "is a link, a pipe or a socket: "},
		{"a pipe that is not read on", func(path, _ string) error {
			err := syscall.Mkfifo(path, 0o600)
			if err == nil {
				_, err = syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
			}
			return err
		}, "is a link, a pipe or a socket: "},
	} {
		for _, early := range []bool{true, false} { // or while flowctl runs
			t.Run(fmt.Sprint(tt.name, early), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				logs, on := filepath.Join(dir, "logs"), filepath.Join(dir, "on")
				path, other := filepath.Join(logs, "a.log"), writeFile(t, filepath.Join(dir, "other"), "precious\n")
				if err := os.Chmod(other, 0o600); err != nil {
					t.Fatal(err)
				}
				place := func() {
					_ = os.MkdirAll(logs, 0o700)
					_ = os.Remove(path)
					if err := tt.place(path, other); err != nil {
						t.Fatal(err)
					}
				}
				if early {
					place()
				}
				const lines = 20_000
				y := newTally(nil)
				data := numbered(t, filepath.Join(dir, "data"), "a", lines, 1000)
				p := start(t, runArgs(writePipeline(t, shell("a", "until [ -e "+on+" ]; do sleep 0.01; done; cat "+data+"; exec sleep 300")), "-log-dir", logs), stdoutTo(y))
				p.waitReady()
				if !early {
					place()
				}
				writeFile(t, on, "")
				eventually(t, "all that it prints", func() bool { n, _, _ := y.of("a"); return n == lines })
				if early {
					p.has(p.stderr, `msg="trouble with a log file" component=a err="`+path+" "+tt.want+"a log file must be a plain file without another name")
				}
				p.stop()
				if text, err := os.ReadFile(other); err != nil || string(text) != "precious\n" {
					t.Errorf("what it leads to is now %d bytes, %v", len(text), err)
				}
			})
		}
	}
}

// What components print is not for all.
func TestLogFile_IsOfThisUserAlone(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		bySystemd bool
		want      string
	}{{false, "drwx------ -rw-------"}, {true, "drwxr-xr-x -rw-r--r--"}} {
		dir := filepath.Join(t.TempDir(), "logs")
		option := withEnv("LOGS_DIRECTORY=")
		if tt.bySystemd {
			option = withEnv("LOGS_DIRECTORY=" + dir)
		}
		p := start(t, runArgs(writePipeline(t, shell("a", "echo out")), "-log-dir", dir), option)
		p.exit(exitOK)
		var modes []string
		for _, path := range []string{dir, filepath.Join(dir, "a.log")} {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			modes = append(modes, info.Mode().String())
		}
		if got := strings.Join(modes, " "); got != tt.want {
			t.Errorf("by systemd %t: modes %s, want %s", tt.bySystemd, got, tt.want)
		}
	}
}

// What another user has put in the place of a folder or file, to read it or to lead flowctl
// elsewhere, is refused. What was this user's is read by nobody else from then on.
func TestLogFile_NothingOfAnotherUserIsWritten(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	const other = 65534
	notOurs := " belongs to user 65534: a folder of log files, or a link to one, must belong to flowctl's user or to root"
	for _, tt := range []struct {
		name           string
		folder, link   int // who has it, -1: there is none
		file           int
		want, wantFile string
	}{
		{"a folder", other, -1, other, " (drwxr-xr-x)" + notOurs, ""},
		{"a link", 0, other, -1, " (Lrwxrwxrwx)" + notOurs, ""},
		{"a link of this user", 0, 0, -1, "", ""},
		{"a file", 0, -1, other, "", "/a.log belongs to user 65534: a log file must be a plain file without another name, of flowctl's user or of root"},
		{"a file that others can read", 0, -1, 0, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			logs, folder := filepath.Join(dir, "logs"), filepath.Join(dir, "logs")
			if tt.link >= 0 {
				folder = filepath.Join(dir, "elsewhere")
				must(t, os.Symlink(folder, logs))
				must(t, os.Lchown(logs, tt.link, tt.link))
			}
			must(t, os.Mkdir(folder, 0o755))
			must(t, os.Chown(folder, tt.folder, tt.folder))
			path := filepath.Join(folder, "a.log")
			if tt.file >= 0 {
				writeFile(t, path, "")
				must(t, os.Chmod(path, 0o644))
				must(t, os.Chown(path, tt.file, tt.file))
			}
			pipeline := writePipeline(t, shell("a", "echo out"))
			p := start(t, runArgs(pipeline, "-log-dir", logs))
			byDefault := start(t, runArgs(pipeline), withEnv("LOGS_DIRECTORY="+logs), runsIn(t.TempDir()))
			byDefault.exit(exitOK)
			<-p.done
			info, err := os.Stat(path)
			switch {
			case tt.want != "":
				for _, p := range []*process{p, byDefault} {
					p.exit(exitOK)
					p.has(p.stderr, `level=WARN msg="no log files" err="`+logs+tt.want)
				}
			case tt.wantFile != "":
				p.exit(exitOK)
				p.has(p.stderr, `msg="trouble with a log file" component=a err="`+logs+tt.wantFile)
			default:
				p.exit(exitOK)
				if err != nil || info.Size() == 0 || tt.file >= 0 && info.Mode() != 0o600 {
					t.Errorf("the file: %v, %v", info, err)
				}
				return
			}
			if err == nil && info.Size() > 0 {
				t.Errorf("%d bytes are in %s", info.Size(), path)
			}
		})
	}
}

// A disk that hangs below what flowctl reads is told, and stops neither the others nor the end.
func TestRun_FilesOnADiskThatHangs(t *testing.T) {
	t.Parallel()
	t.Run("stopped", func(t *testing.T) { t.Parallel(); filesOnADiskThatHangs(t, (*process).stop) })
	t.Run("failed", func(t *testing.T) {
		t.Parallel()
		filesOnADiskThatHangs(t, func(p *process) {
			p.tell("b", syscall.SIGKILL)
			p.exit(exitFailed)
		})
	})
}

// filesOnADiskThatHangs runs a pipeline on such a disk, and ends it.
func filesOnADiskThatHangs(t *testing.T, end func(*process)) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	secret := writeFile(t, filepath.Join(disk, "secret"), "x")
	a := shell("a", "exec sleep 300")
	a.EnvFiles, a.RestartPolicy = map[string]string{"SECRET": secret}, restartAlways
	data, err := os.ReadFile(writePipeline(t, a, shell("b", "exec sleep 300")))
	if err != nil {
		t.Fatal(err)
	}
	file := writeFile(t, filepath.Join(disk, "flow.json"), string(data))
	p := start(t, runArgs(file))
	p.waitReady()
	hangDisk(t, disk)
	p.tell("a", syscall.SIGKILL)
	p.waitErr(`msg="cannot be started again" component=a err="env_files.SECRET: ` + secret + ": no answer from the disk for 1.5s")
	code, _, stderr := p.callReload()
	if want := file + ": no answer from the disk for 5s\n"; code != exitUsage || !strings.HasSuffix(stderr, want) {
		t.Errorf("reload: %d, %s, want %s", code, stderr, want)
	}
	end(p)
}
