//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// What tests share: they run the built program and look at it from outside, at its exit
// code, its two outputs, its control plane and its processes. Components are roles of this
// test binary (roles_test.go), or scripts.
const (
	markVar    = "TEST_FLOWCTL_MARK"    // tells the processes of one flowctl from all others
	binaryVar  = "TEST_FLOWCTL_BINARY"  // the built flowctl, for a test that runs again in ownNetwork
	networkVar = "TEST_FLOWCTL_NETWORK" // the test that runs in a network of its own

	patience = 30 * time.Second // for what should come within milliseconds, on a loaded machine
)

var buildFolder = sync.OnceValue(func() string {
	folder, err := os.MkdirTemp("", "flowctl-test-")
	if err != nil {
		panic(err)
	}
	return folder
})

// build builds a package of this module with the flags given and returns the file.
func build(name, pkg string, flags ...string) string {
	file := filepath.Join(buildFolder(), name)
	if out, err := exec.Command("go", slices.Concat([]string{"build", "-o", file}, flags, []string{pkg})...).CombinedOutput(); err != nil {
		panic(fmt.Sprintf("go build: %v\n%s", err, out))
	}
	return file
}

// flowctlProgram returns flowctl, built once: with the race detector where this test is.
var flowctlProgram = sync.OnceValue(func() string {
	if file := os.Getenv(binaryVar); file != "" {
		return file
	}
	if raceEnabled() {
		return build("flowctl", ".", "-race")
	}
	return build("flowctl", ".")
})

// plainFlowctl returns flowctl without the race detector, for what is measured.
var plainFlowctl = sync.OnceValue(func() string { return build("flowctl-plain", ".") })

func raceEnabled() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// shell returns a component that runs a script and knows nothing of flowctl.
func shell(id, script string) Component {
	return Component{ID: id, Command: []string{"sh", "-c", strings.ReplaceAll(script, "$", "$$")}, Register: new(false)}
}

// writePipeline writes a pipeline file: what has no inputs is a source, what has the role of a sink one, all
// else a processor.
func writePipeline(tb testing.TB, components ...Component) string {
	tb.Helper()
	p := Pipeline{APIVersion: "flowctl/v1", Kind: "Pipeline", Metadata: Metadata{Name: "test"}}
	for _, c := range components {
		switch {
		case c.Role == roleService:
			p.Spec.Services = append(p.Spec.Services, c)
		case c.Role == roleSink:
			p.Spec.Sinks = append(p.Spec.Sinks, c)
		case len(c.Inputs) == 0:
			p.Spec.Sources = append(p.Spec.Sources, c)
		default:
			p.Spec.Processors = append(p.Spec.Processors, c)
		}
	}
	return writeFile(tb, filepath.Join(tb.TempDir(), "pipeline.json"), string(get(json.Marshal(p))(tb)))
}

// writeProgram writes a file that can be run.
func writeProgram(tb testing.TB, name, text string) string {
	tb.Helper()
	if err := os.Chmod(writeFile(tb, name, text), 0o755); err != nil {
		tb.Fatal(err)
	}
	return name
}

func writeFile(tb testing.TB, name, text string) string {
	tb.Helper()
	must(tb, os.WriteFile(name, []byte(text), 0o600))
	return name
}

// must ends the test where there is an error.
func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// get returns what a call has returned, and ends the test where that is an error:
// get(os.ReadFile(name))(t).
func get[T any](value T, err error) func(testing.TB) T {
	return func(tb testing.TB) T {
		tb.Helper()
		must(tb, err)
		return value
	}
}

// A transcript keeps what is written to it and lets others wait for more.
type transcript struct {
	mu    sync.Mutex // guards the fields below
	data  []byte
	grown chan struct{} // closed at the next write
}

func newTranscript() *transcript { return &transcript{grown: make(chan struct{})} }

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.data = append(t.data, p...)
	close(t.grown)
	t.grown = make(chan struct{})
	return len(p), nil
}

// text returns what was written so far, and a channel that is closed when there is more.
func (t *transcript) text() (string, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.data), t.grown
}

func (t *transcript) String() string {
	text, _ := t.text()
	return text
}

// contains waits until it has want count times, done is closed, or the deadline.
func (t *transcript) contains(want string, count int, done <-chan struct{}) bool {
	deadline := time.After(patience)
	for {
		text, grown := t.text()
		if strings.Count(text, want) >= count {
			return true
		}
		select {
		case <-grown:
		case <-done:
			return strings.Count(t.String(), want) >= count
		case <-deadline:
			return false
		}
	}
}

// process is a flowctl that was started, with all that it prints.
type process struct {
	tb             testing.TB
	cmd            *exec.Cmd
	mark           string
	stdout, stderr *transcript
	notified       *transcript // the datagrams of sd_notify, each ended by an empty line
	done           chan struct{}
}

// option changes how flowctl is started.
type option func(p *process)

func inFolder(dir string) option { return func(p *process) { p.cmd.Dir = dir } }

func withEnv(entries ...string) option {
	return func(p *process) { p.cmd.Env = append(p.cmd.Env, entries...) }
}

var marks atomic.Int64

// start starts flowctl with args. At the end of the test it is killed if need be,
// and none of its processes may be left.
func start(tb testing.TB, args []string, options ...option) *process {
	tb.Helper()
	p := &process{
		tb: tb, mark: fmt.Sprintf("%s=%d.%d", markVar, os.Getpid(), marks.Add(1)),
		stdout: newTranscript(), stderr: newTranscript(), notified: newTranscript(), done: make(chan struct{}),
	}
	p.cmd = exec.Command(flowctlProgram(), args...)
	p.cmd.Env = append(baseEnv(), p.mark,
		noRaceSleep,
		"XDG_RUNTIME_DIR="+tb.TempDir(), // pipelines of the same name run side by side
		"XDG_STATE_HOME="+tb.TempDir())
	p.cmd.Stdout, p.cmd.Stderr = p.stdout, p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = 5 * time.Second // where something that it started holds its output
	for _, o := range options {
		o(p)
	}
	must(tb, p.cmd.Start())
	go func() {
		_ = p.cmd.Wait() // the exit code is in ProcessState
		close(p.done)
	}()
	tb.Cleanup(p.cleanup)
	return p
}

// launch starts flowctl with a pipeline on a free port.
func launch(tb testing.TB, file string, args ...string) *process {
	tb.Helper()
	return start(tb, runArgs(file, args...))
}

func (p *process) cleanup() {
	select {
	case <-p.done:
		if left := p.left(); len(left) > 0 {
			p.tb.Errorf("flowctl left processes behind: %v\n%s", left, p)
		}
	default:
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
	p.killLeft()
	if text := p.stderr.String(); strings.Contains(text, "DATA RACE") {
		p.tb.Errorf("the race detector has found something:\n%s", text)
	}
}

// killLeft ends what flowctl started and has not ended.
func (p *process) killLeft() {
	for _, pid := range marked(p.mark) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// left returns the processes that flowctl started and that still run. One that was sent
// SIGKILL has a moment to go, and the guard of a flowctl that was killed looks for a
// while longer; process_test.go times that.
func (p *process) left() []string {
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids := marked(p.mark)
		if len(pids) == 0 || time.Now().After(deadline) {
			var left []string
			for _, pid := range pids {
				left = append(left, fmt.Sprintf("%d %q", pid, procFile(pid, "cmdline")))
			}
			return left
		}
		time.Sleep(5 * time.Millisecond) // the end of someone else's child is no event for us
	}
}

// String is all that there is to see, for the message of a test that fails.
func (p *process) String() string {
	clip := func(s string) string {
		const most = 8 << 10
		if len(s) > most {
			return s[:most/2] + "\n[...]\n" + s[len(s)-most/2:]
		}
		return s
	}
	return fmt.Sprintf("--- flowctl %s\n--- stdout\n%s\n--- stderr\n%s\n--- notified\n%s",
		strings.Join(p.cmd.Args[1:], " "), clip(p.stdout.String()), clip(p.stderr.String()), clip(p.notified.String()))
}

// waitOut and its like wait for a text that flowctl prints, or prints count times.
func (p *process) waitOut(want string) { p.tb.Helper(); p.wait(p.stdout, want, 1) }

func (p *process) waitErr(want string) { p.tb.Helper(); p.wait(p.stderr, want, 1) }

func (p *process) wait(in *transcript, want string, count int) {
	p.tb.Helper()
	done := p.done
	if in == p.notified {
		done = nil // the last datagrams are read after the end
	}
	if !in.contains(want, count, done) {
		p.tb.Fatalf("%q did not come %d times\n%s", want, count, p)
	}
}

func (p *process) waitReady() { p.tb.Helper(); p.waitErr(`msg="pipeline ready"`) }

// exit waits for the end of flowctl and checks its exit code.
func (p *process) exit(want int) {
	p.tb.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.tb.Fatalf("flowctl still runs\n%s", p)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != want {
		p.tb.Fatalf("flowctl: %v, want exit status %d\n%s", p.cmd.ProcessState, want, p)
	}
}

// stop ends flowctl as a user would and wants it to end well.
func (p *process) stop() {
	p.tb.Helper()
	p.signal(syscall.SIGTERM)
	p.exit(exitOK)
}

func (p *process) signal(sig syscall.Signal) {
	p.tb.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.tb.Fatalf("cannot send %s: %v\n%s", sig, err, p)
	}
}

// tell signals the process that component id has now.
func (p *process) tell(id string, sig syscall.Signal) {
	p.tb.Helper()
	if err := syscall.Kill(p.pid(id), sig); err != nil {
		p.tb.Fatalf("cannot send %s to %s: %v\n%s", sig, id, err, p)
	}
}

// pid is the latest process of component id.
func (p *process) pid(id string) int {
	p.tb.Helper()
	p.waitErr("msg=started component=" + id + " ")
	all := regexp.MustCompile(`msg=started component=`+regexp.QuoteMeta(id)+` pid=(\d+)`).FindAllStringSubmatch(p.stderr.String(), -1)
	pid, err := strconv.Atoi(all[len(all)-1][1])
	if err != nil {
		p.tb.Fatal(err)
	}
	return pid
}

// endpoint is where the control plane listens.
func (p *process) endpoint() string {
	p.tb.Helper()
	line := regexp.MustCompile(`msg=listening endpoint=(\S+)\n`)
	p.waitErr("msg=listening endpoint=")
	return line.FindStringSubmatch(p.stderr.String())[1]
}

// has checks that the texts are in got, in this order.
func (p *process) has(got *transcript, texts ...string) {
	p.tb.Helper()
	rest := got.String()
	for _, want := range texts {
		_, after, found := strings.Cut(rest, want)
		if !found {
			p.tb.Errorf("%q is missing, or not where it should be\n%s", want, p)
			return
		}
		rest = after
	}
}

func (p *process) hasNot(got *transcript, texts ...string) {
	p.tb.Helper()
	for _, text := range texts {
		if strings.Contains(got.String(), text) {
			p.tb.Errorf("%q should not be there\n%s", text, p)
		}
	}
}

// lines are the lines of component id on standard output, or on standard error where a command
// has standard output, without what flowctl puts before them.
func (p *process) lines(id string) []string {
	out, lines := p.stdout, []string(nil)
	if slices.Contains(p.cmd.Args, "--") {
		out = p.stderr
	}
	for line := range strings.Lines(out.String()) {
		head, text, found := strings.Cut(line, " | ")
		if stamp, name, _ := strings.Cut(head, " "); found && len(stamp) == len(time.TimeOnly) && strings.TrimRight(name, " ") == id {
			lines = append(lines, strings.TrimSuffix(text, "\n"))
		}
	}
	return lines
}

// checkExtensions checks that systemd was asked for a time that makes sense.
func (p *process) checkExtensions() {
	p.tb.Helper()
	for _, m := range regexp.MustCompile(`EXTEND_TIMEOUT_USEC=(.*)`).FindAllStringSubmatch(p.notified.String(), -1) {
		if usec, err := strconv.Atoi(m[1]); err != nil || usec < 1e6 || usec > 3600e6 {
			p.tb.Errorf("%s is not between a second and an hour\n%s", m[0], p)
		}
	}
}

// awaitGuard gives the guard of a flowctl that was killed the time that it has to end;
// that it has ended is checked at the end of each test.
func (p *process) awaitGuard() {
	for deadline := time.Now().Add(killGrace()); len(marked(p.mark)) > 0 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
	}
}

// told is what component id was told: its variables, by its role's Environ, and the address
// of the control plane that it got when it registered.
func (p *process) told(id string) map[string]string {
	p.tb.Helper()
	told := make(map[string]string)
	for _, line := range p.lines(id) {
		if quoted, ok := strings.CutPrefix(line, "env "); ok {
			entry, err := strconv.Unquote(quoted)
			if err != nil {
				p.tb.Error(err)
			}
			name, value, _ := strings.Cut(entry, "=")
			if _, twice := told[name]; twice {
				p.tb.Errorf("%s has %s twice", id, name)
			}
			told[name] = value
		} else if address, ok := strings.CutPrefix(line, "control plane "); ok {
			told["connection_info"] = address
		}
	}
	return told
}

// allPIDs are those of the processes that run on this machine.
func allPIDs() []int {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// procFile returns a file of /proc/PID, nothing for a process that has gone.
func procFile(pid int, name string) string {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	return string(data)
}

// marked returns the processes that have mark in their environment.
func marked(mark string) []int {
	return slices.DeleteFunc(allPIDs(), func(pid int) bool {
		return !slices.Contains(strings.Split(procFile(pid, "environ"), "\x00"), mark)
	})
}

// call runs flowctl to its end.
func call(tb testing.TB, args ...string) (code int, stdout, stderr string) {
	tb.Helper()
	return start(tb, args).finish()
}

// finish waits for the end of flowctl.
func (p *process) finish() (code int, stdout, stderr string) {
	p.tb.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.tb.Fatalf("flowctl still runs\n%s", p)
	}
	return p.cmd.ProcessState.ExitCode(), p.stdout.String(), p.stderr.String()
}

// beside has a command find what p runs.
func beside(p *process) option {
	for _, entry := range slices.Backward(p.cmd.Env) {
		if strings.HasPrefix(entry, "XDG_RUNTIME_DIR=") {
			return withEnv(entry)
		}
	}
	return withEnv()
}

// callReload runs flowctl reload for the pipeline that p runs.
func (p *process) callReload() (code int, stdout, stderr string) {
	p.tb.Helper()
	return start(p.tb, []string{"reload"}, beside(p)).finish()
}

// freePort returns a port that is free now and that no one gets who does not ask
// for it by number: it is below those that the kernel gives away.
func freePort(tb testing.TB) string {
	tb.Helper()
	for range 1000 {
		port := strconv.Itoa(20000 + rand.IntN(12000))
		if lis, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			lis.Close()
			return port
		}
	}
	tb.Fatal("no port is free")
	return ""
}

// readJournal returns what components have noted so far.
func readJournal(tb testing.TB, file string) []string {
	tb.Helper()
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		tb.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

// inOrder checks that each entry of want is in got, after the one before it.
func inOrder(tb testing.TB, got []string, want ...string) {
	tb.Helper()
	rest := got
	for _, w := range want {
		i := slices.Index(rest, w)
		if i < 0 {
			tb.Errorf("got the order %q, want %q", got, want)
			return
		}
		rest = rest[i+1:]
	}
}

// notifySocket lets p tell systemd, which is the test.
func notifySocket(tb testing.TB, address string) option {
	tell := notifySocketOf(tb, address)
	return func(p *process) {
		tell(p)
		asService(p)
	}
}

// asService has flowctl be told that systemd has started it.
func asService(p *process) { afterCommand("export SYSTEMD_EXEC_PID=$$;")(p) }

// notifySocketOf gives p the socket that another process tells systemd by.
func notifySocketOf(tb testing.TB, address string) option {
	return func(p *process) {
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 4096)
			for {
				n, err := conn.Read(buf)
				if err != nil {
					return
				}
				p.notified.Write(append(bytes.Clone(buf[:n]), "\n\n"...))
			}
		}()
		p.cmd.Env = append(p.cmd.Env, "NOTIFY_SOCKET="+address)
	}
}

// shortDir is a folder whose name leaves room for a socket's: the kernel takes 107 bytes.
func shortDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "f")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// ownNetwork runs the test that calls it again in a network of its own, where no
// port is taken, and returns true there.
func ownNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv(networkVar) == t.Name() {
		raiseLoopback(t)
		return true
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run=^"+regexp.QuoteMeta(t.Name())+"$", "-test.v")
	cmd.Env = append(os.Environ(), networkVar+"="+t.Name(), binaryVar+"="+flowctlProgram())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EINVAL):
		t.Skip("this system does not let us have a network of our own:", err)
	case err != nil:
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func raiseLoopback(t *testing.T) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	request := struct { // ifreq of netdevice(7)
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: syscall.IFF_UP}
	copy(request.name[:], "lo")
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		t.Fatal("cannot raise the loopback:", errno)
	}
}

// killGrace is how long the processes of a run may outlive a flowctl that was killed,
// and twice that with the race detector, which makes the guard several times slower.
var killGrace = sync.OnceValue(func() time.Duration {
	if raceEnabled() {
		return 4 * time.Second
	}
	return 2 * time.Second
})

// herd marks the processes of one test: a number that only their command lines have, and
// that sleep(1) takes for a time.
type herd string

var herds atomic.Int64

func newHerd() herd {
	return herd(fmt.Sprintf("3600.%07d%05d", os.Getpid(), herds.Add(1)))
}

// script puts the number in the place of each T.
func (h herd) script(text string) string {
	return regexp.MustCompile(`\bT\b`).ReplaceAllString(text, string(h))
}

// living returns the processes of the herd with their command lines.
func (h herd) living() map[int]string {
	found := make(map[int]string)
	for _, pid := range allPIDs() {
		if line := procFile(pid, "cmdline"); pid != os.Getpid() && strings.Contains(line, string(h)) {
			found[pid] = strings.ReplaceAll(line, "\x00", " ")
		}
	}
	return found
}

// signal signals a process if it still is one of the herd.
func (h herd) signal(pid int, sig syscall.Signal) {
	process, err := os.FindProcess(pid) // by a pidfd, which cannot come to mean another process
	if err != nil {
		return
	}
	defer process.Release()
	if strings.Contains(procFile(pid, "cmdline"), string(h)) {
		_ = process.Signal(sig)
	}
}

// await polls until n processes of the herd live.
func (h herd) await(p *process, n int) map[int]string {
	p.tb.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		living := h.living()
		if len(living) >= n {
			return living
		}
		if time.Now().After(deadline) {
			p.tb.Fatalf("%d processes live, want %d: %v\n%s", len(living), n, living, p)
		}
	}
}

// gone wants the herd to be gone so long after flowctl's end. What is left is killed.
func (h herd) gone(p *process, within time.Duration) {
	p.tb.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.tb.Fatalf("flowctl still runs\n%s", p)
	}
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		living := h.living()
		if len(living) == 0 {
			p.awaitGuard()
			return
		}
		if time.Now().After(deadline) {
			p.tb.Errorf("%s after the end of flowctl these live: %v\n%s", within, living, p)
			for pid := range living {
				h.signal(pid, syscall.SIGKILL)
			}
			return
		}
	}
}

// end ends flowctl by a signal and checks that nothing of the herd is left: at once
// where flowctl was asked, and soon where it was killed.
func (h herd) end(p *process, sig syscall.Signal) {
	p.tb.Helper()
	pid := guardOf(p)
	guard := handle(p.tb, pid)
	folder := regexp.MustCompile(`^.*/flowctl-[^/]*`)
	var groups []string
	for pid := range h.living() {
		groups = append(groups, folder.FindString(processCgroup(pid)))
	}
	p.signal(sig)
	within := killGrace()
	if sig != syscall.SIGKILL {
		p.exit(exitOK)
		within = 0
	}
	h.gone(p, within)
	if _, ok := ends(p.tb, killGrace(), guard); !ok {
		p.tb.Errorf("the guard outlives flowctl\n%s", p)
	}
	for _, group := range groups {
		if _, err := os.Stat(group); group != "" && err == nil {
			p.tb.Errorf("the control group %s is left\n%s", group, p)
		}
	}
}

// eventually polls until done returns true: what it waits for sends no event.
func eventually(tb testing.TB, what string, done func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("in vain waited for: %s", what)
		}
	}
}

// childrenOf returns the children of a process that live, and how many do not.
func childrenOf(pid int) (living []int, zombies int) {
	for _, child := range allPIDs() {
		_, rest, _ := strings.Cut(procFile(child, "stat"), ") ")
		fields := strings.Fields(rest)
		switch {
		case len(fields) < 2 || fields[1] != strconv.Itoa(pid):
		case fields[0] == "Z":
			zombies++
		default:
			living = append(living, child)
		}
	}
	return living, zombies
}

// guardOf returns the process that flowctl runs beside its components, which takes
// its name as soon as it ignores signals.
func guardOf(p *process) int {
	p.tb.Helper()
	var guard int
	eventually(p.tb, "a guard", func() bool {
		living, _ := childrenOf(p.cmd.Process.Pid)
		if i := slices.IndexFunc(living, func(pid int) bool { return procFile(pid, "comm") == guardName+"\n" }); i >= 0 {
			guard = living[i]
		}
		return guard != 0
	})
	return guard
}

// handle is a pidfd: it names a process also when that is not ours, and is readable
// when the process has ended.
func handle(tb testing.TB, pid int) int {
	tb.Helper()
	const pidfdOpen = 434 // in every architecture
	fd, _, errno := syscall.Syscall(pidfdOpen, uintptr(pid), 0, 0)
	if errno != 0 {
		tb.Fatalf("pidfd_open %d: %v", pid, errno)
	}
	tb.Cleanup(func() { syscall.Close(int(fd)) })
	return int(fd)
}

// ends returns when each of the processes has ended, and whether all have in time.
func ends(tb testing.TB, within time.Duration, fds ...int) ([]time.Time, bool) {
	tb.Helper()
	ep, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	defer syscall.Close(ep)
	for i, fd := range fds {
		if err := syscall.EpollCtl(ep, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLONESHOT, Fd: int32(i)}); err != nil {
			tb.Fatal(err)
		}
	}
	times := make([]time.Time, len(fds))
	events := make([]syscall.EpollEvent, 64)
	deadline := time.Now().Add(within)
	for left := len(fds); left > 0; {
		wait := time.Until(deadline)
		if wait <= 0 {
			return times, false
		}
		n, err := syscall.EpollWait(ep, events, int(wait.Milliseconds())+1)
		if err != nil && err != syscall.EINTR {
			tb.Fatal(err)
		}
		now := time.Now()
		for _, e := range events[:max(n, 0)] {
			times[e.Fd] = now
			left--
		}
	}
	return times, true
}

func withBinary(file string) option {
	return func(p *process) { p.cmd.Path, p.cmd.Args[0] = file, file }
}

func stdoutTo(w io.Writer) option { return func(p *process) { p.cmd.Stdout = w } }

// runArgs are the arguments of a run on a free port.
func runArgs(file string, more ...string) []string {
	return append([]string{"run", file, "-control-plane-port", "0"}, more...)
}

// memory returns a figure of /proc/PID/status in bytes, such as VmRSS.
func memory(tb testing.TB, pid int, key string) int {
	tb.Helper()
	n, ok := memoryOf(pid, key)
	if !ok {
		tb.Fatalf("no %s of process %d in\n%s", key, pid, procFile(pid, "status"))
	}
	return n
}

// memoryOf is memory for a process that may have ended.
func memoryOf(pid int, key string) (int, bool) {
	m := regexp.MustCompile(`(?m)^` + key + `:\s+(\d+) kB$`).FindStringSubmatch(procFile(pid, "status"))
	if m == nil {
		return 0, false
	}
	n, _ := strconv.Atoi(m[1])
	return n << 10, true
}

// daemons are a script that starts two daemons as daemon(3) would make them, which
// ignore what they can.
const daemons = `setsid sh -c 'trap "" TERM INT HUP; cd /; exec 0<&- 1>&- 2>&-; sleep T & sleep T &'`

// asNobody runs flowctl as a user without rights, with a run folder of its own: one
// that is another user's would not be used, but one that all runs of this user share.
func asNobody(uid int) option {
	return func(p *process) {
		p.tb.Helper()
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: 65534}
		runs := filepath.Join(publicDir(p.tb), "runs")
		if err := os.Mkdir(runs, 0o700); err != nil {
			p.tb.Fatal(err)
		}
		if err := os.Chown(runs, uid, 65534); err != nil {
			p.tb.Fatal(err)
		}
		p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+runs)
	}
}

// publicDir is a folder that every user can read.
func publicDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "flowctl-public-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{dir, buildFolder()} {
		if err := os.Chmod(d, 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	return dir
}

// publicPipeline is writePipeline for every user.
func publicPipeline(tb testing.TB, components ...Component) string {
	tb.Helper()
	data, err := os.ReadFile(writePipeline(tb, components...))
	if err != nil {
		tb.Fatal(err)
	}
	file := writeFile(tb, filepath.Join(publicDir(tb), "pipeline.json"), string(data))
	if err := os.Chmod(file, 0o644); err != nil {
		tb.Fatal(err)
	}
	return file
}

// limited runs flowctl under a limit that the shell's ulimit sets.
func limited(limit string) option { return afterCommand("ulimit " + limit + " &&") }

// afterCommand runs flowctl in a shell in which a command came before.
func afterCommand(command string) option {
	return func(p *process) {
		p.cmd.Args = append([]string{"sh", "-c", command + ` exec "$0" "$@"`, p.cmd.Path}, p.cmd.Args[1:]...)
		p.cmd.Path = "/bin/sh"
	}
}

// memoryGrew tells what a process has come to hold since it held before, and fails where it
// ever was more than half of the thrown MiB that others have had it hold, if it had no bound.
func memoryGrew(t *testing.T, p *process, before int, thrown float64) {
	t.Helper()
	rss, peak := memory(t, p.cmd.Process.Pid, "VmRSS"), memory(t, p.cmd.Process.Pid, "VmHWM")
	t.Logf("VmRSS %.1f MiB before, %.1f MiB after, %.1f MiB at most; %.0f MiB were thrown at it", mib(before), mib(rss), mib(peak), thrown)
	if mib(peak-before) > thrown/2 {
		t.Errorf("memory grew by %.1f MiB, more than half of %.0f", mib(peak-before), thrown)
	}
}

// listed returns the components of the one pipeline at endpoint, by id, and their ids
// in order.
func listed(tb testing.TB, endpoint string) (map[string]listedComponent, []string) {
	tb.Helper()
	_, out, stderr := call(tb, "list", "-e", endpoint, "-json")
	var pipelines []listedPipeline
	if err := json.Unmarshal([]byte(out), &pipelines); err != nil || len(pipelines) != 1 {
		tb.Fatalf("list: %v\n%s%s", err, out, stderr)
	}
	byID, ids := make(map[string]listedComponent), []string(nil)
	for _, c := range pipelines[0].Components {
		byID[c.ID] = *c
		ids = append(ids, c.ID)
	}
	return byID, ids
}

// mib is a number of bytes in MiB.
func mib(n int) float64 { return float64(n) / (1 << 20) }

// runsIn makes flowctl keep its run file in the folder flowctl of dir.
func runsIn(dir string) option { return withEnv("XDG_RUNTIME_DIR=" + dir) }

// sleeper is a pipeline that runs until it is stopped.
func sleeper(t *testing.T) string { return writePipeline(t, shell("a", "exec sleep 300")) }

// listen listens until the test ends.
func listen(t *testing.T, address string) net.Listener {
	lis, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lis.Close() })
	return lis
}
