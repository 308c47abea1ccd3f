//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	operatorv1 "github.com/withobsrvr/flowctl/proto/flowctl/operator/v1"
)

// runFiles returns the names of the run files in a folder.
func runFiles(tb testing.TB, folder string) []string {
	tb.Helper()
	names := get(filepath.Glob(filepath.Join(folder, "*"+runSuffix)))(tb)
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
	wantEqual(t, "the second", second.stderr.String(), want)
	first.stop()
	wantEqual(t, "left", runFiles(t, filepath.Join(dir, "flowctl")), nil)
	third := start(t, runArgs(file), runsIn(dir))
	third.waitReady()
	third.signal(syscall.SIGKILL)
	<-third.done
	fourth := start(t, runArgs(file), runsIn(dir)) // while the guard of the third may still be at work
	fourth.waitReady()
	fourth.stop()
	third.awaitGuard()
}

// A user's second run is refused wherever the first has its run file: cron gives no XDG_RUNTIME_DIR, and a
// shell does.
func TestRun_SecondOfAUserIsRefusedInAnyFolder(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be a user without /run/user/UID")
	}
	shared := publicDir(t)
	must(t, os.Chmod(shared, 0o777))
	options := []option{asNobody(65523), withEnv("TMPDIR=" + shared)}
	file := publicPipeline(t, shell("a", "exec sleep 300"))
	first := start(t, runArgs(file), append(options, withEnv("XDG_RUNTIME_DIR="))...)
	first.waitReady()
	second := start(t, runArgs(file), options...)
	second.exit(exitPlane)
	second.has(second.stderr, fmt.Sprintf("flowctl: pipeline \"test\" is already running (pid %d, endpoint %s)\n", first.cmd.Process.Pid, first.endpoint()))
	list := start(t, []string{"list"}, options...)
	list.exit(exitOK)
	list.has(list.stdout, "test: 1 of 1 ready")
	// systemd gives the files of a runtime folder to the next user of a unit.
	must(t, os.Chown(filepath.Join(shared, "flowctl-65523", "pipeline-test.json"), 65524, 65524))
	given := start(t, runArgs(file), options...)
	given.exit(exitPlane)
	given.has(given.stderr, fmt.Sprintf("flowctl: pipeline \"test\" is already running (pid %d,", first.cmd.Process.Pid))
	first.stop()
	third := start(t, append(runArgs(file), "-until", "ready"), options...)
	third.exit(exitOK)
}

// A tmp cleaner, or the end of another unit with the same RuntimeDirectory=, takes run files away.
func TestRun_RemovedRunFileIsMadeAgain(t *testing.T) {
	t.Parallel()
	dir, file := t.TempDir(), sleeper(t)
	folder := filepath.Join(dir, "flowctl")
	p := start(t, runArgs(file), runsIn(dir))
	p.waitReady()
	must(t, os.RemoveAll(folder))
	writeFile(t, folder, "") // in the way of the folder
	p.wait(p.stderr, `msg="the run file was removed, and cannot be made again: `, 1)
	must(t, os.Remove(folder))
	p.wait(p.stderr, `msg="the run file was removed, and is made again"`, 1)
	must(t, os.Remove(filepath.Join(folder, "pipeline-test.sock")))
	eventually(t, "the socket is there again", func() bool {
		info, err := os.Stat(filepath.Join(folder, "pipeline-test.sock"))
		return err == nil && info.Mode().Perm() == 0o600
	})
	second := start(t, runArgs(file), runsIn(dir))
	second.exit(exitPlane)
	stop := start(t, []string{"stop"}, runsIn(dir))
	stop.exit(exitOK)
	p.exit(exitOK)
	p.hasNot(p.stderr, "level=ERROR")
	wantEqual(t, "left", runFiles(t, folder), nil)
	if n := strings.Count(p.stderr.String(), "the run file was removed"); n != 2 {
		t.Errorf("it is told %d times\n%s", n, p)
	}
}

// A run whose file is gone as it ends leaves no socket, and of many that were removed the last stay open.
func TestRun_RemovedRunFileLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := start(t, runArgs(sleeper(t)), runsIn(dir))
	p.waitReady()
	must(t, os.Remove(filepath.Join(dir, "flowctl", "pipeline-test.json")))
	p.stop()
	wantEqual(t, "left", strings.Join(get(filepath.Glob(filepath.Join(dir, "flowctl", "pipeline-*")))(t), " "), "")

	run := get(claimRunIn(dir, runInfo{Pipeline: "removed"}))(t)
	t.Cleanup(run.release)
	for range maxRemoved + 4 {
		must(t, os.Remove(run.path))
		get(run.remake())(t)
	}
	open := 0
	for _, fd := range get(filepath.Glob("/proc/self/fd/*"))(t) {
		if to, _ := os.Readlink(fd); to == run.path+" (deleted)" {
			open++
		}
	}
	wantEqual(t, "removed files that are open", open, maxRemoved)
}

// Runs are found in the folders of units that are templates, and of operators, whose names are not known.
func TestRun_FoldersOfUnitsAreSearched(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command("unshare", "-rm", "mount", "-t", "tmpfs", "none", "/run").CombinedOutput(); err != nil {
		t.Skipf("this system lets us mount nothing: %v: %s", err, out)
	}
	file := sleeper(t)
	for _, folder := range []string{"/run/flowctl-x", "/run/flowctl@x", "/run/flowctl/y", "/run/user/0/flowctl"} {
		script := `unset RUNTIME_DIRECTORY XDG_RUNTIME_DIR; "$0" list; "$0" run "$1" -control-plane-port 0; echo "second: $?"`
		p := start(t, runArgs(file, "--", "sh", "-c", script, flowctlProgram(), file), withEnv("RUNTIME_DIRECTORY="+folder, "XDG_RUNTIME_DIR="),
			afterCommand("mount -t tmpfs none /run && mkdir -p /run/flowctl-x /run/flowctl@x /run/flowctl/y /run/user/0 &&"), func(p *process) {
				p.cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS
				p.cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
				p.cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
			})
		p.exit(exitOK)
		p.has(p.stdout, "test: 1 of 1 ready (pid ", "second: 3\n")
		p.has(p.stderr, `pipeline "test" is already running (pid `)
	}
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
	must(t, os.Mkdir(folder, 0o700))
	left := writeFile(t, filepath.Join(folder, "pipeline-test.json"), fmt.Sprintf(`{"pid": %d, "pipeline": "test", "endpoint": "127.0.0.1:1"}`, os.Getpid()))
	f := get(os.Open(left))(t)
	defer f.Close()
	must(t, syscall.FcntlFlock(f.Fd(), syscall.F_SETLK, &syscall.Flock_t{Type: syscall.F_RDLCK}))
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
	must(t, os.Chown(xdg, 65534, 65534))
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
		must(t, err)
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

// What a socket's path may be, where one is given by a flag; TestErrors has how that is told.
func TestSocketPath(t *testing.T) {
	t.Parallel()
	here := get(os.Getwd())(t)
	full := "/" + strings.Repeat("x", 106)
	for _, tt := range []struct{ address, path, want string }{
		{"127.0.0.1", "", ""},
		{"unix-abstract:x", "", ""},
		{"unix:/s", "/s", ""},
		{"unix:///a b/ü:@s", "/a b/ü:@s", ""},
		{"unix:s", here + "/s", ""},
		{"unix:../s", filepath.Dir(here) + "/s", ""},
		{"unix:" + full, full, ""},
		{"unix:" + full + "x", "", "has 108 bytes: the kernel allows 107"},
		{"unix:", "", "must have a path"},
		{"unix:///", "", "must have a path"},
		{"unix://a/s", "", "must begin with a slash"},
		{"unix:/a/", "", "a folder's"},
		{"unix:/a%b", "", `has "%" in it`},
		{"unix:/a?b", "", `has "?" in it`},
		{"unix:/a#/b", "", `has "#" in it`},
		{"unix:/a,b", "", `has "," in it`},
		{"unix:/a\n", "", `has "\n" in it`},
	} {
		path, ok, err := socketPath(tt.address)
		if path != tt.path || ok != strings.HasPrefix(tt.address, "unix:") || (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %q, %t, %v, want %q and %q", tt.address, path, ok, err, tt.path, tt.want)
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
	must(t, os.Mkdir(folder, 0o700))
	must(t, syscall.Mkfifo(filepath.Join(folder, "pipe.json"), 0o600))
	must(t, os.Symlink("pipe.json", filepath.Join(folder, "link.json")))
	server := start(t, []string{"server", "-control-plane-port", "0"})
	endpoint := server.endpoint()
	// This process must open the file only once: see runfile.go.
	run := get(claimRunIn(folder, runInfo{Pipeline: "slow"}))(t)
	starting := fmt.Sprintf("flowctl: pipeline \"slow\" (pid %d) is starting: its control plane does not listen yet\n", os.Getpid())
	p := start(t, []string{"list", "-wait=false"}, runsIn(dir))
	p.exit(exitPlane)
	p.has(p.stderr, starting)
	if _, err := run.file.WriteAt([]byte(`{"pid": `), 0); err != nil || run.file.Truncate(8) != nil {
		t.Fatal("cannot write half of it:", err)
	}
	p = start(t, []string{"list"}, runsIn(dir))
	must(t, run.publish(endpoint))
	p.exit(exitOK)
	p.has(p.stdout, "nothing is registered")
	p = start(t, []string{"list", "-json"}, runsIn(dir))
	p.exit(exitOK)
	p.has(p.stdout, `"components": []`)
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
	run := get(claimRunIn(folder, runInfo{Pipeline: "slow"}))(t)
	for _, tt := range []struct{ endpoint, want string }{
		{"", fmt.Sprintf("flowctl: pipeline \"slow\" (pid %d) is starting: its control plane does not listen yet\n", os.Getpid())},
		{"a\x7f:80", "flowctl: endpoint \"a\\x7f:80\": "},
	} {
		must(t, run.publish(tt.endpoint))
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

// Whatever the run file of another user names, list goes nowhere but to a control plane that can be
// that of the user's own service, and says why.
func TestList_RunFilesOfOthersAreJudged(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	const other = 65534
	dir := shortDir(t)
	run, err := claimRunIn(dir, runInfo{Pipeline: "theirs"})
	must(t, err)
	t.Cleanup(run.release)
	for _, path := range []string{dir, run.file.Name()} {
		must(t, os.Chown(path, other, other))
	}
	plane := fakePlane{watch: func(_ *operatorv1.WatchRequest, send func(*operatorv1.WatchResponse) error) error {
		send(&operatorv1.WatchResponse{Reset_: true, Complete: true, Pipeline: &operatorv1.Pipeline{Name: "theirs", Status: "fine"}})
		return nil
	}}
	here, pid := plane.serve(t), os.Getpid()
	_, foreign := startAlone(t, []string{"-no-persistence"})
	private := filepath.Join(shortDir(t), "private")
	lis := get(net.ListenUnix("unix", &net.UnixAddr{Name: private}))(t)
	t.Cleanup(func() { lis.Close() })
	must(t, os.Symlink(private, filepath.Join(dir, "link")))
	must(t, os.Mkdir(private+".d", 0o700))
	must(t, os.Symlink(private+".d", filepath.Join(dir, "folder")))
	for _, tt := range []struct {
		name, endpoint string
		pid, owner     int
		out, want      string
	}{
		{"a service", here, pid, other, "theirs: fine", ""},
		{"a service by the name of this machine", strings.Replace(here, "127.0.0.1", "localhost", 1), pid, other, "theirs: fine", ""},
		{"another process", here, 1, other, "", fmt.Sprintf("is ignored: it names process 1, and process %d has its lock", pid)},
		{"another's port", foreign, pid, other, "", fmt.Sprintf("is ignored: it names process %d, and that is not who listens at its endpoint "+foreign, pid)},
		{"another's folder", here, pid, 0, "", "is ignored: it belongs to user 65534, and its folder does not"},
		{"another machine", "192.0.2.1:80", pid, other, "", `is ignored: its endpoint "192.0.2.1:80" is neither an address of this machine nor a socket in its folder`},
		{"a name", "localhost.example:80", pid, other, "", "is ignored: its endpoint"},
		{"a socket elsewhere", "unix://" + private, pid, other, "", "is ignored: its endpoint"},
		{"a socket beside its folder, where anyone can put one", "unix://" + dir + ".sock", pid, other, "", "is ignored: its endpoint"},
		{"a link on the way", "unix://" + dir + "/folder/../private", pid, other, "", "is ignored: its endpoint"},
		{"the name of a port", "127.0.0.1:http", pid, other, "", "is ignored: its endpoint"},
		{"a zone", "[::1%lo]:80", pid, other, "", "is ignored: its endpoint"},
		{"a link to it", "unix://" + filepath.Join(dir, "link"), pid, other, "", "link must not be a link"},
		{"nothing yet", "", pid, other, "", "pipeline \"theirs\" (pid "},
	} {
		run.info.PID = tt.pid
		must(t, run.publish(tt.endpoint))
		must(t, os.Chown(dir, tt.owner, tt.owner))
		p := start(t, []string{"list", "-wait=false"}, withEnv("RUNTIME_DIRECTORY="+dir))
		<-p.done
		if out := p.stdout.String(); !strings.Contains(p.stderr.String(), tt.want) || (out == "") != (tt.out == "") || !strings.Contains(out, tt.out) {
			t.Errorf("%s: want %q and %q\n%s", tt.name, tt.out, tt.want, p)
		}
	}
	must(t, lis.SetDeadline(time.Now().Add(100*time.Millisecond))) // a deadline that has passed takes no connection that waits
	if conn, err := lis.Accept(); err == nil {
		conn.Close()
		t.Error("list came to a socket of this user")
	}
}

// Beside the operators' socket a service's own may be anywhere: nobody goes there.
func TestList_ServiceWhoseSocketIsElsewhere(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	const other = 65534
	dir, private := shortDir(t), filepath.Join(shortDir(t), "private")
	elsewhere := get(net.ListenUnix("unix", &net.UnixAddr{Name: private}))(t)
	t.Cleanup(func() { elsewhere.Close() })
	run := get(claimRunIn(dir, runInfo{Pipeline: "theirs", TLS: true}))(t)
	t.Cleanup(run.release)
	must(t, run.publish("unix://"+private))
	operators := get(net.ListenUnix("unix", &net.UnixAddr{Name: socketOf(run.path)}))(t)
	t.Cleanup(func() { operators.Close() })
	for _, path := range []string{dir, run.path, socketOf(run.path)} {
		must(t, os.Chown(path, other, other))
	}
	ca := newCA(t)
	p := start(t, []string{"list", "-wait=false", "-tls-ca-cert", newFiles(t, issue(t, ca, nil), ca).ca}, withEnv("RUNTIME_DIRECTORY="+dir))
	p.exit(exitPlane)
	p.has(p.stderr, `: its endpoint "unix://`+private+`" is neither an address of this machine nor a socket in its folder`)
	must(t, operators.SetDeadline(time.Now().Add(patience)))
	p = start(t, []string{"list", "-wait=false"}, withEnv("RUNTIME_DIRECTORY="+dir))
	must(t, get(operators.Accept())(t).Close())
	operators.Close()
	p.exit(exitPlane)
	must(t, elsewhere.SetDeadline(time.Now().Add(100*time.Millisecond)))
	if conn, err := elsewhere.Accept(); err == nil {
		conn.Close()
		t.Error("list came to a socket of this user")
	}
}

// claimTheirs puts run files of pipelines into a folder, which become user other's.
func claimTheirs(t *testing.T, dir string, other int, endpoint string, pipelines ...string) {
	t.Helper()
	for _, name := range pipelines {
		run := get(claimRunIn(dir, runInfo{Pipeline: name}))(t)
		t.Cleanup(run.release)
		must(t, run.publish(endpoint))
		must(t, os.Chown(run.file.Name(), other, other))
	}
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Chown(dir, other, other))
}

// Another user can make any number of run files: so many are looked at, and the rest is told.
func TestList_ManyRunFilesOfOthers(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	for _, count := range []int{maxTheirs, maxTheirs + 1} {
		dir := shortDir(t)
		var names []string
		for i := range count {
			names = append(names, fmt.Sprint("p", i))
		}
		claimTheirs(t, dir, 65534, "", names...)
		p := start(t, []string{"list", "-wait=false"}, withEnv("RUNTIME_DIRECTORY="+dir))
		p.exit(exitPlane)
		wantEqual(t, "pipelines", strings.Count(p.stderr.String(), " is starting: "), maxTheirs)
		wantEqual(t, "told", strings.Contains(p.stderr.String(), "flowctl: "+dir+" is another user's and has many files: only 64 run files are looked at\n"), count > maxTheirs)
	}
}

// Who names the endpoint of another's control plane gets none of the calls that are meant for that.
func TestList_EndpointIsNotBorrowed(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	_, endpoint := startAlone(t, []string{"-no-persistence"})
	dir := publicDir(t)
	claimTheirs(t, dir, 65534, endpoint, "theirs")
	socket := filepath.Join(dir, "pipeline-theirs.sock")
	lis := get(net.ListenUnix("unix", &net.UnixAddr{Name: socket}))(t)
	t.Cleanup(func() { lis.Close() })
	must(t, os.Chmod(socket, 0o666))
	for _, option := range []option{asNobody(65525), func(*process) {}} {
		list := start(t, []string{"list", "-endpoint", endpoint}, option, withEnv("RUNTIME_DIRECTORY="+dir))
		list.exit(exitOK)
		list.has(list.stdout, "nothing is registered\n")
	}
	must(t, lis.SetDeadline(time.Now().Add(100*time.Millisecond))) // a deadline that has passed takes no connection that waits
	if conn, err := lis.Accept(); err == nil {
		conn.Close()
		t.Error("list came to the socket of who names the endpoint")
	}
}

// Less TLS than is asked for is none: a run without it is not dialled.
func TestList_NoLessTLSThanAsked(t *testing.T) {
	t.Parallel()
	dir, ca := t.TempDir(), newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	p := start(t, runArgs(sleeper(t)), runsIn(dir))
	p.waitReady()
	list := start(t, []string{"list", "-tls-ca-cert", files.ca}, runsIn(dir))
	list.exit(exitPlane)
	list.has(list.stderr, "flowctl: endpoint \""+p.endpoint()+"\": it has no TLS, which the -tls flags ask for\n")
	p.stop()
	if os.Getuid() != 0 {
		return
	}
	theirs := shortDir(t)
	run := get(claimRunIn(theirs, runInfo{Pipeline: "theirs", TLS: true}))(t)
	t.Cleanup(run.release)
	socket := filepath.Join(theirs, "socket")
	lis := get(net.Listen("unix", socket))(t)
	t.Cleanup(func() { lis.Close() })
	must(t, run.publish("unix://"+socket))
	for _, path := range []string{theirs, run.file.Name()} {
		must(t, os.Chown(path, 65534, 65534))
	}
	start(t, []string{"list", "-tls-ca-cert", files.ca}, withEnv("RUNTIME_DIRECTORY="+theirs))
	conn := get(lis.Accept())(t)
	defer conn.Close()
	first := make([]byte, 1)
	if _, err := conn.Read(first); err != nil || first[0] != 22 { // a handshake, of RFC 8446
		t.Errorf("a socket that says it has TLS gets %q, %v", first, err)
	}
}
