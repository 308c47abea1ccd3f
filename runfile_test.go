//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runFiles returns the names of the run files in a folder.
func runFiles(tb testing.TB, folder string) []string {
	tb.Helper()
	names, err := filepath.Glob(filepath.Join(folder, "*"+runSuffix))
	if err != nil {
		tb.Fatal(err)
	}
	for i := range names {
		names[i] = filepath.Base(names[i])
	}
	return names
}

func TestRun_SecondOfAPipelineIsRefused(t *testing.T) {
	t.Parallel()
	dir, file := t.TempDir(), sleeper(t)
	first := start(t, runArgs(file), runsIn(dir))
	first.waitReady()
	data, err := os.ReadFile(filepath.Join(dir, "flowctl", "pipeline-test.json"))
	var info runInfo
	if err == nil {
		err = json.Unmarshal(data, &info)
	}
	if err != nil || info.PID != first.cmd.Process.Pid || info.Pipeline != "test" || info.Endpoint != first.endpoint() || time.Since(info.Started) > patience {
		t.Errorf("the run file: %s, %v", data, err)
	}
	second := start(t, runArgs(file), runsIn(dir))
	second.exit(exitPlane)
	want := fmt.Sprintf("flowctl: pipeline \"test\" is already running (pid %d, endpoint %s)\nTry: flowctl list\n", first.cmd.Process.Pid, first.endpoint())
	if got := second.stderr.String(); got != want {
		t.Errorf("the second prints %q, want %q", got, want)
	}
	first.stop()
	if left := runFiles(t, filepath.Join(dir, "flowctl")); left != nil {
		t.Errorf("left: %q", left)
	}
	third := start(t, runArgs(file), runsIn(dir))
	third.waitReady()
	third.signal(syscall.SIGKILL)
	<-third.done
	fourth := start(t, runArgs(file), runsIn(dir)) // while the guard of the third may still be at work
	fourth.waitReady()
	fourth.stop()
	third.awaitGuard()
}

// Of many that start at once one runs, also after one that was killed, and while list cleans up.
func TestRun_OneOfManyAtOnce(t *testing.T) {
	t.Parallel()
	dir, file := t.TempDir(), sleeper(t)
	for round := range 4 {
		ended := make(chan *process)
		var all []*process
		for range 6 {
			p := start(t, runArgs(file), runsIn(dir))
			all = append(all, p)
			go func() {
				<-p.done
				ended <- p
			}()
			list := start(t, []string{"list", "-wait=false"}, runsIn(dir))
			defer func() { <-list.done }()
		}
		refused := make(map[*process]bool)
		for range len(all) - 1 {
			p := <-ended
			p.exit(exitPlane)
			p.has(p.stderr, `pipeline "test" is already running (pid `)
			refused[p] = true
		}
		for _, p := range all {
			if !refused[p] {
				p.waitReady()
				p.signal(syscall.SIGKILL)
				<-ended
				p.awaitGuard()
			}
		}
		if t.Failed() {
			t.Fatal("round", round)
		}
	}
}

// A process that reads the file of a dead one, and locks it, keeps nobody from running.
func TestRun_LockOfAReaderRefusesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	folder := filepath.Join(dir, "flowctl")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	left := writeFile(t, filepath.Join(folder, "pipeline-test.json"), fmt.Sprintf(`{"pid": %d, "pipeline": "test", "endpoint": "127.0.0.1:1"}`, os.Getpid()))
	f, err := os.Open(left)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_SETLK, &syscall.Flock_t{Type: syscall.F_RDLCK}); err != nil {
		t.Fatal(err)
	}
	p := start(t, runArgs(sleeper(t)), runsIn(dir))
	p.waitReady()
	p.stop()
}

func TestRun_WarnsWithoutARunFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "flowctl"), "no folder")
	for _, entry := range []string{"XDG_RUNTIME_DIR=" + dir, "RUNTIME_DIRECTORY=/proc/flowctl"} {
		p := start(t, append(runArgs(sleeper(t)), "-until", "ready"), withEnv(entry))
		p.exit(exitOK)
		p.has(p.stderr, `level=WARN msg="list cannot find this run by itself, and a second one would not be refused" err="`, "flowctl")
	}
}

func TestRunFolder_IsThatOfTheUnit(t *testing.T) {
	t.Parallel()
	xdg, first, second := t.TempDir(), t.TempDir(), t.TempDir()
	p := start(t, runArgs(sleeper(t)), runsIn(xdg), withEnv("RUNTIME_DIRECTORY="+first+":"+second))
	p.waitReady()
	if got := runFiles(t, first); len(got) != 1 {
		t.Errorf("in the first folder of RUNTIME_DIRECTORY: %q", got)
	}
	p.stop()
	if os.Getuid() != 0 {
		return
	}
	// Who has become another user by su(1) may still have the first one's folder.
	if err := os.Chown(xdg, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	p = start(t, []string{"list", "-wait=false"}, runsIn(xdg))
	<-p.done
	p.hasNot(p.stderr, xdg)
}

func TestRunFolder_OfAnotherUserIsNotTrusted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good, open, link, theirs := filepath.Join(dir, "good"), filepath.Join(dir, "open"), filepath.Join(dir, "link"), filepath.Join(dir, "theirs")
	for _, err := range []error{
		os.Mkdir(good, 0o700), os.Mkdir(open, 0o700), os.Chmod(open, 0o770), os.Symlink(good, link), os.Mkdir(theirs, 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	bad := []string{open, link}
	if os.Chown(theirs, 65534, 65534) == nil {
		bad = append(bad, theirs)
	}
	if err := checkPrivate(good); err != nil {
		t.Error(err)
	}
	for _, folder := range bad {
		if err := checkPrivate(folder); err == nil || !strings.Contains(err.Error(), folder) {
			t.Errorf("%s: %v", folder, err)
		}
	}
}

func TestRunFile_EachHasAValidName(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for _, info := range []runInfo{
		{Pipeline: "a"}, {Pipeline: "A.b_c-d"}, {Pipeline: "../a"}, {Pipeline: "a/b"}, {Pipeline: "a%2Fb"}, {Pipeline: "a\x00\n ü"}, {Pipeline: ".."},
		{Pipeline: strings.Repeat("x", 300)}, {Pipeline: strings.Repeat("x", 301)}, {Pipeline: strings.Repeat("x", 63)},
		{Endpoint: "127.0.0.1:8080"}, {Endpoint: "[::1]:8080"}, {Endpoint: "unix:///tmp/" + strings.Repeat("é", 50)}, {Endpoint: "unix:///tmp/s"},
	} {
		name := info.fileName()
		if len(name) > 255 || seen[name] || !regexp.MustCompile(`^(pipeline|server)-[!-~]+\.json$`).MatchString(name) || strings.Contains(name, "/") {
			t.Errorf("%+v: %q", info, name)
		}
		seen[name] = true
	}
}

func TestList_FindsWhatRuns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	list := func(args ...string) *process { return start(t, append([]string{"list"}, args...), runsIn(dir)) }
	for _, args := range [][]string{{"-wait=false"}, nil} {
		p := list(args...)
		p.exit(exitPlane)
		p.has(p.stderr, "flowctl: no pipeline is running: there is none in "+filepath.Join(dir, "flowctl"), "; name a control plane with -endpoint host:port\n")
	}

	early := list()
	one := start(t, runArgs(writePipeline(t, actor("ledgers", role{Dialect: "v1"}))), runsIn(dir))
	one.waitOut("registered")
	<-early.done // it may have come before the registration
	early.hasNot(early.stderr, "no control plane", "no pipeline")
	one.waitReady()
	p := list()
	p.exit(exitOK)
	p.has(p.stdout, "test: 1 of 1 ready (pid ", ", "+one.endpoint()+")\nID ", "ledgers ")

	two := start(t, []string{"server", "-control-plane-port", "0"}, runsIn(dir))
	two.waitErr("msg=listening")
	eventually(t, "two run files", func() bool { return len(runFiles(t, filepath.Join(dir, "flowctl"))) == 2 })
	p = list()
	p.exit(exitOK)
	p.has(p.stdout, "control plane alone (pid ", ", "+two.endpoint()+")\n", "\n\ntest: 1 of 1 ready (pid ", ", "+one.endpoint()+")\n", "ledgers ")
	two.signal(syscall.SIGKILL)
	<-two.done
	p = list("-json")
	p.exit(exitOK)
	p.has(p.stdout, `"id": "ledgers"`)
	if got := runFiles(t, filepath.Join(dir, "flowctl")); len(got) != 1 {
		t.Errorf("what the dead left is there: %q", got)
	}
	one.stop()
}

// A run file that is not complete, or that has no endpoint, is of a pipeline that is starting.
// Other files in the folder are ignored.
func TestList_WaitsForAnEndpoint(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	folder := filepath.Join(dir, "flowctl")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(folder, "pipe.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("pipe.json", filepath.Join(folder, "link.json")); err != nil {
		t.Fatal(err)
	}
	server := start(t, []string{"server", "-control-plane-port", "0"})
	endpoint := server.endpoint()
	// This process must open the file only once: see runfile.go.
	run, err := claimRunIn(folder, runInfo{Pipeline: "slow"})
	if err != nil {
		t.Fatal(err)
	}
	starting := fmt.Sprintf("flowctl: pipeline \"slow\" (pid %d) is starting: its control plane does not listen yet\n", os.Getpid())
	p := start(t, []string{"list", "-wait=false"}, runsIn(dir))
	p.exit(exitPlane)
	p.has(p.stderr, starting)
	if _, err := run.file.WriteAt([]byte(`{"pid": `), 0); err != nil || run.file.Truncate(8) != nil {
		t.Fatal("cannot write half of it:", err)
	}
	p = start(t, []string{"list"}, runsIn(dir))
	if err := run.publish(endpoint); err != nil {
		t.Fatal(err)
	}
	p.exit(exitOK)
	p.has(p.stdout, "nothing is registered")
	run.release()
	if left := runFiles(t, folder); len(left) != 2 {
		t.Errorf("left: %q", left)
	}
	server.stop()
}

// A run that is starting, or whose run file is wrong, is told and holds up no other.
func TestList_StartingRunHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server := start(t, []string{"server", "-control-plane-port", "0"}, runsIn(dir))
	server.waitErr("msg=listening")
	folder := filepath.Join(dir, "flowctl")
	eventually(t, "a run file", func() bool { return len(runFiles(t, folder)) == 1 })
	run, err := claimRunIn(folder, runInfo{Pipeline: "slow"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ endpoint, want string }{
		{"", fmt.Sprintf("flowctl: pipeline \"slow\" (pid %d) is starting: its control plane does not listen yet\n", os.Getpid())},
		{"a\x7f:80", "flowctl: endpoint \"a\\x7f:80\": "},
	} {
		if err := run.publish(tt.endpoint); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		p := start(t, []string{"list"}, runsIn(dir))
		p.exit(exitFailed)
		p.has(p.stdout, "control plane alone (pid ", "nothing is registered\n")
		p.has(p.stderr, tt.want)
		if took := time.Since(begun); took > answerTime {
			t.Errorf("it took %s", took)
		}
		p = start(t, []string{"list", "-watch"}, runsIn(dir))
		p.waitOut("control plane alone")
		p.waitErr(tt.want)
		p.stop()
	}
	run.release()
	server.stop()
}
