//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	journald "github.com/coreos/go-systemd/v22/journal"
)

// The tests of TestSystemd run flowctl.service on a real systemd, the PID 1 of
// namespaces of its own (testdata/systemd-lab). FLOWCTL_SYSTEMD=must makes it a failure
// that there can be none.

// lab is a systemd that runs until the end of the test. Each unit of it is a copy of
// flowctl.service with a pipeline of its own.
type lab struct {
	init   string // the pid of its PID 1
	folder string // at /lab
}

func openLab(t *testing.T) *lab {
	t.Helper()
	folder := t.TempDir()
	must(t, os.Chmod(folder, 0o755))
	self := get(os.Executable())(t)
	for name, from := range map[string]string{"flowctl": flowctlProgram(), "actor": self} {
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(folder, name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// Its command lives until its standard input ends, with this process at the latest.
	cmd := exec.Command("testdata/systemd-lab", "-b", folder+":/lab", "sh", "-c", "echo $LAB_INIT; exec cat")
	var said bytes.Buffer
	cmd.Stderr = &said
	in := get(cmd.StdinPipe())(t)
	out := get(cmd.StdoutPipe())(t)
	must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		_ = cmd.Wait()
		if os.Getenv("FLOWCTL_SYSTEMD") == "must" {
			t.Fatalf("FLOWCTL_SYSTEMD=must, and there is no systemd: %s", &said)
		}
		t.Skipf("no systemd to test on: %s", &said)
	}
	t.Cleanup(func() {
		in.Close()
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("systemd-lab: %v\n%s", err, &said)
		}
	})
	l := &lab{init: strings.TrimSpace(line), folder: folder}
	l.run(t, "systemctl", "set-environment", noRaceSleep)
	return l
}

const noRaceSleep = "GORACE=atexit_sleep_ms=0" // else each process with the race detector takes a second to end

// command is one that runs in the lab.
func (l *lab) command(args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"-t", l.init, "-m", "-p", "-C", "-u", "-i", "-n", "-r", "-w", "--"}, args...)...)
	cmd.Env = append(os.Environ(), noRaceSleep)
	return cmd
}

// try runs a command in the lab and returns what it prints, without spaces around.
func (l *lab) try(args ...string) (string, error) {
	cmd := l.command(args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, &out, &errs)
	}
	return strings.TrimSpace(out.String()), err
}

func (l *lab) run(t *testing.T, args ...string) string {
	t.Helper()
	out := get(l.try(args...))(t)
	return out
}

// write writes a file of the lab below /.
func (l *lab) write(t *testing.T, path, text string) {
	t.Helper()
	cmd := l.command("sh", "-c", `mkdir -p "$(dirname "$0")" && cat >"$0"`, path)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", path, err, out)
	}
}

// unit is a service of the lab.
type unit struct {
	*lab
	t    *testing.T
	name string
}

// dropIn is for all units here: where flowctl and its pipeline are. Folders of its own each has
// as a copy of flowctl.service.
const dropIn = `[Service]
ExecStart=
ExecStart=/lab/flowctl run /etc/flowctl/%[1]s.json %[2]s
ExecReload=
ExecReload=/lab/flowctl reload
RestartSec=100ms
`

// install installs flowctl.service by a name with a pipeline, the arguments given, and
// more lines for its [Service] section.
func (l *lab) install(t *testing.T, name string, components []Component, args, more string) *unit {
	t.Helper()
	l.pipeline(t, name, name, components...)
	l.write(t, "/etc/systemd/system/"+name+".service", page(t, "flowctl.service"))
	l.write(t, "/etc/systemd/system/"+name+".service.d/test.conf", fmt.Sprintf(dropIn, name, args)+more)
	l.run(t, "systemctl", "daemon-reload")
	return l.unit(t, name)
}

// pipeline writes /etc/flowctl/FILE.json.
func (l *lab) pipeline(t *testing.T, file, name string, components ...Component) {
	t.Helper()
	for i := range components {
		if components[i].Env[roleVar] != "" {
			components[i].Command = []string{"/lab/actor"}
		}
	}
	text := get(os.ReadFile(writePipeline(t, components...)))(t)
	l.write(t, "/etc/flowctl/"+file+".json", strings.Replace(string(text), `"name":"test"`, `"name":"`+name+`"`, 1))
}

// unit is a unit that is stopped when the test ends.
func (l *lab) unit(t *testing.T, name string) *unit {
	u := &unit{l, t, name}
	t.Cleanup(func() {
		if t.Failed() {
			status, _ := l.try("systemctl", "status", "--no-pager", "-n0", name)
			log, _ := l.try("journalctl", "-u", name, "--no-pager", "-n60")
			t.Logf("%s\n%s", status, log)
		}
		_, _ = l.try("systemctl", "stop", name)
	})
	return u
}

func (u *unit) start() {
	u.t.Helper()
	u.run(u.t, "systemctl", "start", u.name)
}

func (u *unit) stop() {
	u.t.Helper()
	u.run(u.t, "systemctl", "stop", u.name)
}

// show is a property of the unit.
func (u *unit) show(property string) string {
	u.t.Helper()
	return u.run(u.t, "systemctl", "show", "--value", "-p", property, u.name)
}

// is waits until a property has a value.
func (u *unit) is(property, want string) {
	u.t.Helper()
	got := ""
	u.eventually(func() bool { got = u.show(property); return got == want }, func() string { return fmt.Sprintf("%s=%s, want %s", property, got, want) })
}

// restarted waits until systemd has restarted the unit. How often is not to be told:
// a daemon-reload meanwhile, of another test, counts the same restart again.
func (u *unit) restarted() {
	u.t.Helper()
	u.eventually(func() bool { return u.show("NRestarts") != "0" }, func() string { return "it is not restarted" })
}

// eventually waits for what systemd and its journal do in their own time, and tell
// nobody of here.
func (u *unit) eventually(done func() bool, why func() string) {
	u.t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			u.t.Fatal(why())
		}
	}
}

// record is a record of the journal: a field is text, or bytes where it is none.
type record map[string]any

func (r record) text(name string) string {
	switch v := r[name].(type) {
	case string:
		return v
	case []any:
		var data []byte
		for _, b := range v {
			data = append(data, byte(b.(float64)))
		}
		return string(data)
	}
	return ""
}

// journal returns the records of the unit that fit the matches.
func (u *unit) journal(matches ...string) []record {
	u.t.Helper()
	out := u.run(u.t, append([]string{"journalctl", "-u", u.name, "-o", "json", "--all", "--no-pager"}, matches...)...)
	var records []record
	for dec := json.NewDecoder(strings.NewReader(out)); ; {
		var r record
		if err := dec.Decode(&r); errors.Is(err, io.EOF) {
			return records
		} else if err != nil {
			u.t.Fatal(err)
		}
		records = append(records, r)
	}
}

// logged waits for a record that fits the matches and whose message contains text.
func (u *unit) logged(text string, matches ...string) record {
	u.t.Helper()
	var found record
	u.eventually(func() bool {
		for _, r := range u.journal(matches...) {
			if strings.Contains(r.text("MESSAGE"), text) {
				found = r
				return true
			}
		}
		return false
	}, func() string { return fmt.Sprintf("%q is not in the journal (%v)", text, matches) })
	return found
}

// mainPID is flowctl's, as the lab counts.
func (u *unit) mainPID() string { u.t.Helper(); return u.show("MainPID") }

// processes is what runs in the unit's cgroup.
func (u *unit) processes() string {
	out, _ := u.try("sh", "-c", `find /sys/fs/cgroup/system.slice -path "*/$0.service/*cgroup.procs" -exec cat {} + 2>/dev/null || true`, u.name)
	return strings.Join(strings.Fields(out), " ")
}

func TestSystemd(t *testing.T) {
	l := openLab(t)
	l.installShipped(t)
	// Alone: a journal that is new no longer knows the unit of a process that has ended.
	t.Run("journal restarts", func(t *testing.T) { testUnitJournalRestarts(t, l) })
	// Alone: others ask for the one pipeline that runs here.
	t.Run("template", func(t *testing.T) { testUnitTemplate(t, l) })
	for _, test := range []struct {
		name string
		test func(*testing.T, *lab)
	}{
		{"start and stop", testUnitStartStop},
		{"not ready", testUnitNotReady},
		{"failure", testUnitFailure},
		{"on-failure", testUnitOnFailure},
		{"usage", testUnitUsage},
		{"killed", testUnitKilled},
		{"watchdog", testUnitWatchdog},
		{"reload", testUnitReload},
		{"journal", testUnitJournal},
		{"flood", testUnitFlood},
		{"streams", testUnitStreams},
		{"socket", testUnitSocket},
		{"socket elsewhere", testUnitSocketElsewhere},
		{"inherited", testUnitInherited},
		{"old systemd", testUnitOldSystemd},
		{"why it failed", testUnitWhy},
		{"engine", testUnitEngine},
		{"credentials", testUnitCredentials},
		{"folders", testUnitFolders},
		{"identity", testUnitIdentity},
		{"attacked", testUnitAttacked},
		{"delegated", testUnitDelegated},
		{"user unit", testUserUnit},
		{"verify", testUnitVerify},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.test(t, l)
		})
	}
}

// A flowctl that hangs is ended by the watchdog, with all that it started, and the
// unit comes back.
func testUnitWatchdog(t *testing.T, l *lab) {
	u := l.install(t, "hung", []Component{shell("a", "exec sleep 300")}, "-control-plane-port 0", "WatchdogSec=2s\n")
	u.start()
	first, before := u.mainPID(), u.processes()
	l.run(t, "kill", "-STOP", first)
	u.restarted()
	u.is("ActiveState", "active")
	if got := u.mainPID(); got == first {
		t.Errorf("MainPID=%s, as before", got)
	}
	for pid := range strings.FieldsSeq(before) {
		if slices.Contains(strings.Fields(u.processes()), pid) {
			t.Errorf("process %s is left", pid)
		}
	}
	u.logged("Watchdog timeout", "_PID=1")
	// One that turns is not, for longer than WatchdogSec=.
	pid := u.mainPID()
	number := func(property string) int {
		n := get(strconv.Atoi(u.show(property)))(t)
		return n
	}
	u.eventually(func() bool {
		return number("WatchdogTimestampMonotonic") > number("ActiveEnterTimestampMonotonic")+3_000_000
	}, func() string { return "no WATCHDOG=1 came" })
	if got := u.mainPID(); got != pid {
		t.Errorf("MainPID=%s, %s before", got, pid)
	}
}

// A reload touches what has changed, and fails where the file is wrong.
func testUnitReload(t *testing.T, l *lab) {
	kept, changed := actor("kept", role{Dialect: "v1"}), shell("changed", "exec sleep 300")
	u := l.install(t, "reloaded", []Component{kept, changed}, "-control-plane-port 0", "")
	u.start()
	pids := func(id string) []string {
		var out []string
		for _, r := range u.journal("COMPONENT=" + id) {
			if strings.HasPrefix(r.text("MESSAGE"), "started") {
				out = append(out, r.text("PID"))
			}
		}
		return out
	}
	const file = "/etc/flowctl/reloaded.json"
	good := l.run(t, "cat", file)
	l.write(t, file, strings.Replace(good, `"command"`, `"comand"`, 1))
	if out, err := l.try("systemctl", "reload", u.name); err == nil {
		t.Errorf("systemctl reload of a wrong file: %s", out)
	}
	u.logged(`did you mean "command"?`)
	u.is("ActiveState", "active")
	l.write(t, file, strings.ReplaceAll(good, `"changed"`, `"new"`))
	l.run(t, "systemctl", "reload", u.name)
	u.logged("ready", "COMPONENT=new")
	u.logged("ended", "COMPONENT=changed")
	u.is("StatusText", "2 of 2 ready")
	u.is("ActiveState", "active")
	if got := pids("kept"); len(got) != 1 {
		t.Errorf("kept was started as %v", got)
	}
	// The signal does the same.
	l.write(t, file, good)
	l.run(t, "systemctl", "kill", "--kill-who=main", "-s", "HUP", u.name)
	u.eventually(func() bool { return len(pids("changed")) == 2 }, func() string { return "SIGHUP did not reload" })
	u.is("StatusText", "2 of 2 ready")
	u.is("ActiveState", "active")
	if got := pids("kept"); len(got) != 1 {
		t.Errorf("kept was started as %v", got)
	}
	registered := 0
	for _, r := range u.journal("SYSLOG_IDENTIFIER=kept") {
		registered += strings.Count(r.text("MESSAGE"), "registered")
	}
	if registered != 1 {
		t.Errorf("kept has registered %d times", registered)
	}
}

func testUnitStartStop(t *testing.T, l *lab) {
	gate := actor("gate", role{Dialect: "v1", Gate: true})
	sink := actor("sink", role{Dialect: "v1"})
	sink.Inputs = []string{"gate"}
	u := l.install(t, "order", []Component{gate, sink}, "-control-plane-port 0", "")
	started := make(chan error, 1)
	go func() { _, err := l.try("systemctl", "start", u.name); started <- err }()
	u.logged("waiting", "COMPONENT=gate")
	wantEqual(t, "ActiveState", u.show("ActiveState"), "activating")
	wantEqual(t, "StatusText", u.show("StatusText"), "0 of 2 ready, waiting for gate, sink")
	pid := u.logged("started", "COMPONENT=gate").text("PID")
	l.run(t, "kill", "-USR2", pid)
	must(t, <-started)
	wantEqual(t, "StatusText", u.show("StatusText"), "2 of 2 ready")
	u.stop()
	wantEqual(t, "ActiveState Result", u.show("ActiveState")+" "+u.show("Result"), "inactive success")
	var ended []string
	for _, r := range u.journal("REASON=exit status 0") {
		ended = append(ended, r.text("COMPONENT"))
	}
	wantEqual(t, "ended", strings.Join(ended, " "), "gate sink")
	wantEqual(t, "left in the cgroup", u.processes(), "")
}

func testUnitNotReady(t *testing.T, l *lab) {
	u := l.install(t, "late", []Component{actor("good", role{Dialect: "v1"}), actor("mute", role{})},
		"-control-plane-port 0 -start-timeout 3s", "Restart=no\n")
	if out, err := l.try("systemctl", "start", u.name); err == nil {
		t.Fatalf("start succeeds: %s", out)
	}
	wantEqual(t, "Result ExecMainStatus", u.show("Result")+" "+u.show("ExecMainStatus"), "exit-code 4")
	status, _ := l.try("systemctl", "status", "--no-pager", u.name)
	if !strings.Contains(status, "component mute failed: not ready within its start timeout of 3s") {
		t.Errorf("systemctl status does not say why:\n%s", status)
	}
}

func testUnitFailure(t *testing.T, l *lab) {
	u := l.install(t, "crash", []Component{actor("store", role{Dialect: "v1", OnUSR1: "exit", Code: 7, Out: []byte("cannot write\n")})}, "-control-plane-port 0", "")
	u.start()
	l.run(t, "kill", "-USR1", u.logged("started", "COMPONENT=store").text("PID"))
	u.restarted()
	u.is("ActiveState", "active")
	u.logged("code=exited, status=1")
	report := u.logged("component store failed: exit status 7", "COMPONENT=store", "PRIORITY=3")
	if text := report.text("MESSAGE"); !strings.Contains(text, "store.log):\n  cannot write\n  registered\ntry: ") {
		t.Errorf("report: %q", text)
	}
}

func testUnitOnFailure(t *testing.T, l *lab) {
	c := actor("store", role{Dialect: "v1", OnUSR1: "exit", Code: 7})
	c.RestartPolicy = restartOnFailure
	u := l.install(t, "again", []Component{c}, "-control-plane-port 0", "")
	u.start()
	pid := u.mainPID()
	l.run(t, "kill", "-USR1", u.logged("started", "COMPONENT=store").text("PID"))
	u.logged("restarting", "COMPONENT=store", "PRIORITY=4")
	u.is("StatusText", "1 of 1 ready")
	if got := u.mainPID(); got != pid || u.show("NRestarts") != "0" {
		t.Errorf("flowctl was restarted: pid %s, then %s", pid, got)
	}
}

func testUnitUsage(t *testing.T, l *lab) {
	u := l.install(t, "usage", []Component{actor("a", role{})}, "-control-plane-port 70000", "")
	if out, err := l.try("systemctl", "start", u.name); err == nil {
		t.Fatalf("start succeeds: %s", out)
	}
	wantEqual(t, "ExecMainStatus NRestarts ActiveState", u.show("ExecMainStatus")+" "+u.show("NRestarts")+" "+u.show("ActiveState"), "2 0 failed")
	u.logged("-control-plane-port \"70000\": it must be a number from 0 to 65535", "PRIORITY=3")
}

func testUnitKilled(t *testing.T, l *lab) {
	u := l.install(t, "killed", []Component{actor("a", role{Dialect: "v1", Deaf: true}), shell("b", "setsid sleep 1000 & exec sleep 1000")}, "-control-plane-port 0 -stop-timeout 500ms", "")
	u.start()
	first := strings.Fields(u.processes())
	if len(first) < 5 { // flowctl, its guard, and three
		t.Fatalf("processes: %v", first)
	}
	l.run(t, "kill", "-KILL", u.mainPID())
	u.restarted()
	u.is("ActiveState", "active")
	for _, pid := range first {
		if strings.Contains(" "+u.processes()+" ", " "+pid+" ") {
			t.Errorf("%s of the first run is still there", pid)
		}
	}
}

func testUnitJournal(t *testing.T, l *lab) {
	u := l.install(t, "fields", []Component{
		actor("a", role{
			Dialect: "v1", Environ: true, Long: 1 << 16, // 1 MiB
			Out: []byte("plain\n\n<0>panic\n<7>detail\n<9>odd\n\x00nul\xff\xfebytes\n\x1b[31mred\n"), Err: []byte("trouble\n<6>fine\n"),
		}),
	}, "-control-plane-port 0", "")
	u.start()
	u.logged("registered", "COMPONENT=a")
	u.stop()
	u.logged("no newline", "COMPONENT=a") // what is printed without one comes last
	for message, want := range map[string]string{
		"plain": "6", "": "6", "panic": "3", "detail": "7", "<9>odd": "6", "\x00nul\xff\xfebytes": "6", "\x1b[31mred": "6", "trouble": "4", "fine": "6", "no newline": "4",
	} {
		var found record
		for _, r := range u.journal("COMPONENT=a", "SYSLOG_IDENTIFIER=a") {
			if r.text("MESSAGE") == message {
				found = r
			}
		}
		switch {
		case found == nil:
			t.Errorf("%q is not in the journal as it was printed", message)
		case found.text("PRIORITY") != want || found.text("PIPELINE") != "fields" || found.text("_SYSTEMD_UNIT") != "fields.service":
			t.Errorf("%q: priority %s, want %s; pipeline %s, unit %s", message, found.text("PRIORITY"), want, found.text("PIPELINE"), found.text("_SYSTEMD_UNIT"))
		}
	}
	long := ""
	for i, r := range u.journal("COMPONENT=a", "LINE_PIECES=16") {
		if long += r.text("MESSAGE"); r.text("LINE_PIECE") != strconv.Itoa(i+1) {
			t.Errorf("piece %d is marked as %s", i+1, r.text("LINE_PIECE"))
		}
	}
	if long != strings.Repeat(longPiece, 1<<16) {
		t.Errorf("of a line of 1 MiB, %d bytes are in the journal in pieces", len(long))
	}
	own := u.logged("started component=a pid=", "COMPONENT=a", "SYSLOG_IDENTIFIER=flowctl")
	if own.text("PRIORITY") != "6" || own.text("PID") == "" || strings.Contains(own.text("MESSAGE"), "level=") || strings.Contains(own.text("MESSAGE"), "time=") {
		t.Errorf("flowctl's own record: %v", own)
	}
	for _, r := range u.journal("COMPONENT=a", "SYSLOG_IDENTIFIER=a") {
		if text := r.text("MESSAGE"); strings.HasPrefix(text, `env "LISTEN_`) || strings.HasPrefix(text, `env "NOTIFY_SOCKET`) || strings.HasPrefix(text, `env "WATCHDOG_`) {
			t.Errorf("the component has %s", text)
		}
	}
	line := l.run(t, "journalctl", "-u", u.name, "--no-pager", "-o", "short", "SYSLOG_IDENTIFIER=a", "PRIORITY=3")
	if !regexp.MustCompile(`^\S+ +\d+ [\d:]+ \S+ a\[\d+\]: panic$`).MatchString(line) {
		t.Errorf("journalctl shows %q", line)
	}
}

func testUnitFlood(t *testing.T, l *lab) {
	const count = 10000
	u := l.install(t, "flood", []Component{actor("a", role{Dialect: "v1", Flood: count})}, "-control-plane-port 0", "")
	begun := time.Now()
	u.start()
	took := time.Since(begun)
	var got []record
	u.eventually(func() bool {
		got = u.journal("COMPONENT=a", "SYSLOG_IDENTIFIER=a")
		return len(got) > 0 && got[len(got)-1].text("MESSAGE") == "registered"
	}, func() string { return fmt.Sprintf("%d records", len(got)) })
	i := 0
	for _, r := range got {
		if strings.HasPrefix(r.text("MESSAGE"), fmt.Sprintf("line %d of a ", i)) {
			i++
		}
	}
	if i != count {
		t.Errorf("%d of %d lines are in the journal", i, count)
	}
	first, _ := strconv.ParseInt(got[0].text("__REALTIME_TIMESTAMP"), 10, 64)
	last, _ := strconv.ParseInt(got[len(got)-1].text("__REALTIME_TIMESTAMP"), 10, 64)
	t.Logf("%d lines: %s from the first to the last in the journal, %s from systemctl start to its end", i, time.Duration(last-first)*time.Microsecond, took.Round(time.Millisecond))
}

func testUnitJournalRestarts(t *testing.T, l *lab) {
	const count = 300
	u := l.install(t, "steady", []Component{shell("a", fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo $i; i=$((i+1)); sleep 0.005; done; echo end; exec sleep 1000", count))}, "-control-plane-port 0", "")
	u.start()
	u.logged("10", "COMPONENT=a")
	l.run(t, "systemctl", "restart", "systemd-journald")
	u.logged("end", "COMPONENT=a", "SYSLOG_IDENTIFIER=a")
	seen := make(map[string]int)
	for _, r := range u.journal("COMPONENT=a", "SYSLOG_IDENTIFIER=a") {
		seen[r.text("MESSAGE")]++
	}
	for i := range count {
		if seen[strconv.Itoa(i)] != 1 {
			t.Errorf("line %d is %d times in the journal", i, seen[strconv.Itoa(i)])
		}
	}
}

func testUnitCredentials(t *testing.T, l *lab) {
	c := actor("a", role{Dialect: "v1", Environ: true})
	c.EnvFiles = map[string]string{"TOKEN": "${CREDENTIALS_DIRECTORY}/token"}
	u := l.install(t, "secret", []Component{c}, "-control-plane-port 0", "LoadCredential=token:/etc/flowctl/token\n")
	l.write(t, "/etc/flowctl/token", "hush\n")
	l.run(t, "chmod", "600", "/etc/flowctl/token")
	u.start()
	u.logged(`env "TOKEN=hush"`, "COMPONENT=a")
}

func testUnitFolders(t *testing.T, l *lab) {
	u := l.install(t, "folders", []Component{
		shell("a", `for d in / /etc /usr /var /var/lib /home /root /lab /sys/fs/cgroup $STATE_DIRECTORY $RUNTIME_DIRECTORY $LOGS_DIRECTORY /tmp; do (echo x >$d/probe) 2>/dev/null && echo "writes $d"; done; echo tried; exec sleep 1000`),
	}, "-control-plane-port 0", "")
	u.start()
	u.logged("tried", "COMPONENT=a")
	var writes []string
	for _, r := range u.journal("SYSLOG_IDENTIFIER=a") {
		if dir, ok := strings.CutPrefix(r.text("MESSAGE"), "writes "); ok {
			writes = append(writes, dir)
		}
	}
	wantEqual(t, "a component can write to", strings.Join(writes, " "), "/var/lib/folders /run/folders /var/log/folders /tmp")
	l.run(t, "test", "-s", "/var/lib/folders/folders.json")
	if out := l.run(t, "cat", "/var/log/folders/a.log"); !strings.HasSuffix(out, " tried") {
		t.Errorf("log file: %q", out)
	}
	// Anybody finds the run.
	out := l.run(t, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "RUNTIME_DIRECTORY=/run/folders", "/lab/flowctl", "list")
	if !strings.HasPrefix(out, "folders: 1 of 1 ready") {
		t.Errorf("list of another user: %s", out)
	}
}

// With all its hardening flowctl still knows components by their processes, and finds
// what has left them.
func testUnitIdentity(t *testing.T, l *lab) {
	u := l.install(t, "nameless", []Component{actor("a", role{Dialect: "legacy", Anonymous: true}), shell("b", "(setsid sleep 1000 &) ; exec sleep 1000")}, "-control-plane-port 0", "")
	u.start()
	endpoint := u.logged("listening", "SYSLOG_IDENTIFIER=flowctl").text("ENDPOINT")
	if out, err := l.try("env", "FLOWCTL_ENDPOINT="+endpoint, "FLOWCTL_COMPONENT_ID=a", roleVar+`={"Dialect":"v1","End":"registered"}`, "/lab/actor"); err == nil || !strings.Contains(err.Error(), "PermissionDenied") {
		t.Errorf("a stranger registers as a: %v\n%s", err, out)
	}
	u.stop()
	wantEqual(t, "left in the cgroup", u.processes(), "")
	if got := u.logged("ending what left its process group").text("PROCESSES"); !strings.HasSuffix(got, " (sleep)") {
		t.Errorf("ended %q", got)
	}
	u.logged("all components have ended")
	wantEqual(t, "Result", u.show("Result"), "success")
}

// In the unit nobody but components gets in beside TLS, nobody but root operates, and what a
// component puts in the place of a log file is not followed. Without netlink it does not start.
func testUnitAttacked(t *testing.T, l *lab) {
	ca := newCA(t)
	cert := issue(t, ca, nil)
	for name, text := range map[string]string{"pem": cert.cert, "key": cert.key, "ca": ca.cert} {
		l.write(t, "/etc/flowctl/attacked."+name, text)
	}
	pose := []string{"FLOWCTL_COMPONENT_ID=a", roleVar + "=" + actorRole(t, role{Dialect: "v1", End: "registered"}), "/lab/actor"}
	evil := `cd $LOGS_DIRECTORY; echo precious >$STATE_DIRECTORY/other; rm -f late.log; ln -s $STATE_DIRECTORY/other late.log; touch placed
env '` + strings.Join(pose, "' '") + `' 2>&1; /lab/flowctl reload 2>&1; exec sleep 1000`
	late := `until [ -e $LOGS_DIRECTORY/placed ]; do sleep 0.02; done; echo from late; exec sleep 1000`
	u := l.install(t, "attacked", []Component{actor("a", role{Dialect: "v1"}), shell("evil", evil), shell("late", late)},
		"-control-plane-port 0 -tls-cert /etc/flowctl/attacked.pem -tls-key ${CREDENTIALS_DIRECTORY}/key -tls-ca-cert /etc/flowctl/attacked.ca", "LoadCredential=key:/etc/flowctl/attacked.key\n")
	u.start()
	u.logged("component evil cannot speak for component a", "SYSLOG_IDENTIFIER=evil")
	u.logged("only an operator may do that", "SYSLOG_IDENTIFIER=evil")
	u.logged("from late", "SYSLOG_IDENTIFIER=late")
	l.run(t, "systemctl", "restart", u.name) // which opens the files anew
	u.logged("/var/log/attacked/late.log is a link, a pipe or a socket", "COMPONENT=late")
	wantEqual(t, "what the link leads to", l.run(t, "cat", "/var/lib/attacked/other"), "precious")
	other := []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "RUNTIME_DIRECTORY=/run/attacked"}
	private := ""
	for _, r := range u.journal() { // the latest is of the restart
		if strings.HasPrefix(r.text("MESSAGE"), "listening for components, without TLS") {
			private = r.text("ENDPOINT")
		}
	}
	for name, as := range map[string][]string{"root": {"env"}, "another user": other, "another pid namespace": append([]string{"unshare", "--pid", "--fork"}, other...)} {
		if out, err := l.try(slices.Concat(as, []string{"FLOWCTL_ENDPOINT=" + private}, pose)...); err == nil || !strings.Contains(err.Error(), "Unavailable") {
			t.Errorf("%s without TLS: %v\n%s", name, err, out)
		}
	}
	if out, err := l.try(append(other, "/lab/flowctl", "reload")...); err == nil {
		t.Errorf("another user reloads: %s", out)
	}
	l.run(t, "systemctl", "reload", u.name)
	l.write(t, "/etc/systemd/system/attacked.service.d/wrong.conf", "[Service]\nRestart=no\nRestrictAddressFamilies=\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n")
	l.run(t, "systemctl", "daemon-reload")
	if _, err := l.try("systemctl", "restart", u.name); err == nil {
		t.Error("it starts without netlink")
	}
	wantEqual(t, "ExecMainStatus", u.show("ExecMainStatus"), "3")
	u.logged("no listener without TLS for a, evil, late: flowctl could not tell who calls there")
}

func testUnitDelegated(t *testing.T, l *lab) {
	u := l.install(t, "delegated", []Component{actor("a", role{Dialect: "v1"})}, "-control-plane-port 0",
		"Delegate=yes\nProtectControlGroups=no\nRestrictNamespaces=no\n")
	u.start()
	folder := "/sys/fs/cgroup/system.slice/delegated.service"
	if out := l.run(t, "sh", "-c", "cat "+folder+"/flowctl-*/component-*-a/cgroup.procs"); len(strings.Fields(out)) != 1 {
		t.Errorf("in the cgroup of the components: %q", out)
	}
	l.run(t, "kill", "-KILL", u.mainPID())
	u.restarted()
	u.is("ActiveState", "active")
	u.stop()
	wantEqual(t, "left in the cgroup", u.processes(), "")
}

func testUserUnit(t *testing.T, l *lab) {
	pipeline := get(os.ReadFile(writePipeline(t, Component{ID: "a", Command: []string{"/lab/actor"}, Env: actor("a", role{Dialect: "v1"}).Env})))(t)
	l.write(t, "/root/.config/systemd/user/flowctl.service", "[Service]\nType=notify\nKillMode=mixed\nStateDirectory=flowctl\nRuntimeDirectory=flowctl\nExecStart=/usr/bin/env -u SYSTEMD_EXEC_PID /lab/flowctl run %h/pipeline.json -control-plane-port 0\n")
	l.write(t, "/root/pipeline.json", string(pipeline))
	l.run(t, "systemctl", "start", "user@0.service")
	user := func(args ...string) (string, error) {
		return l.try(append([]string{"env", "XDG_RUNTIME_DIR=/run/user/0"}, args...)...)
	}
	if out, err := user("systemctl", "--user", "start", "flowctl"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := user("/lab/flowctl", "list"); err != nil || !strings.HasPrefix(out, "test: 1 of 1 ready") {
		t.Errorf("list: %v\n%s", err, out)
	}
	if out, err := user("journalctl", "--user-unit=flowctl", "-o", "cat", "--no-pager", "COMPONENT=a"); err != nil || !strings.Contains(out, "registered") {
		t.Errorf("journal: %v\n%s", err, out)
	}
	if out, err := user("systemctl", "--user", "stop", "flowctl"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// A journal that takes nothing gets what came meanwhile counted, once it takes again.
func TestJournal_CountsLostLines(t *testing.T) {
	var mu sync.Mutex
	var got []string
	gone := true
	j := &journalLog{base: map[string]string{}, send: func(message string, _ journald.Priority, _ map[string]string) error {
		mu.Lock()
		defer mu.Unlock()
		if gone {
			return syscall.ECONNREFUSED
		}
		got = append(got, message)
		return nil
	}}
	j.failingSince.Store(time.Now().Add(-journalTimeout).UnixNano())
	j.lines("a", "stdout", []byte("one\ntwo\n"))
	mu.Lock()
	gone = false
	mu.Unlock()
	j.lines("a", "stdout", []byte("three\nfour\n"))
	want := "three|2 lines are lost: the journal did not take them|four"
	if text := strings.Join(got, "|"); text != want {
		t.Errorf("got %s, want %s", text, want)
	}
}

func TestJournal_FieldNames(t *testing.T) {
	for key, want := range map[string]string{
		"component": "COMPONENT", "pid": "PID", "stop-timeout": "STOP_TIMEOUT", "a.b": "A_B", "_pid": "FLOWCTL_PID", "message": "FLOWCTL_MESSAGE",
		"1st": "FLOWCTL_1ST", "": "FLOWCTL_", "é": "FLOWCTL_", "unit": "FLOWCTL_UNIT", "syslog_pid": "FLOWCTL_SYSLOG_PID", strings.Repeat("x", 70): strings.Repeat("X", 64),
	} {
		if got := fieldName(key); got != want {
			t.Errorf("fieldName(%q) = %q, want %q", key, got, want)
		}
	}
}

func TestNotify_LifeOfARun(t *testing.T) {
	t.Parallel()
	for name, address := range map[string]string{
		"path":     filepath.Join(shortDir(t), "notify"),
		"abstract": fmt.Sprintf("@flowctl-test-%d-%d", os.Getpid(), marks.Add(1)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := actor("store", role{Dialect: "v1", Gate: true})
			store.Inputs = []string{"ledgers"}
			file := writePipeline(t, actor("ledgers", role{Dialect: "legacy", Gate: true}), store)
			p := start(t, []string{"run", file, "-control-plane-port", "0", "-start-timeout", "25s"}, notifySocket(t, address))
			p.waitOut("ledgers | waiting")
			p.wait(p.notified, "STATUS=0 of 2 ready, waiting for ledgers, store\nEXTEND_TIMEOUT_USEC=", 1)
			p.tell("ledgers", syscall.SIGUSR2)
			p.waitOut("store   | waiting")
			p.wait(p.notified, "STATUS=1 of 2 ready, waiting for store\nEXTEND_TIMEOUT_USEC=", 1)
			p.hasNot(p.notified, "READY=1")
			p.tell("store", syscall.SIGUSR2)
			p.wait(p.notified, "READY=1\n\n", 1)
			p.wait(p.notified, "STATUS=2 of 2 ready\n\n", 1)
			p.stop()
			p.wait(p.notified, "STATUS=stopping, waiting for store\n\n", 1)
			p.has(p.notified, "STOPPING=1\nEXTEND_TIMEOUT_USEC=", "STATUS=stopping, waiting for ledgers, store\n\n")
			if n := strings.Count(p.notified.String(), "READY=1"); n != 1 {
				t.Errorf("READY=1 came %d times\n%s", n, p)
			}
			p.checkExtensions()
		})
	}
}

// Where nobody reads what systemd is told, a run ends all the same.
func TestNotify_RunEndsThoughNobodyReads(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "notify")
	conn := get(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}))(t)
	defer conn.Close()
	var components []Component
	for i := range 15 { // more than the kernel queues
		components = append(components, shell(fmt.Sprint("c", i), "exec sleep 300"))
	}
	p := start(t, runArgs(writePipeline(t, components...)), withEnv("NOTIFY_SOCKET="+path), asService)
	for buf := make([]byte, 4096); ; {
		n := get(conn.Read(buf))(t)
		if strings.HasPrefix(string(buf[:n]), "READY=1") {
			break
		}
	}
	p.stop()
}

// fullNotifySocket returns the address of a socket for notifications that takes no more until
// the connection is read.
func fullNotifySocket(t *testing.T) (string, *net.UnixConn) {
	t.Helper()
	addr := &net.UnixAddr{Name: filepath.Join(shortDir(t), "notify"), Net: "unixgram"}
	conn := get(net.ListenUnixgram("unixgram", addr))(t)
	t.Cleanup(func() { conn.Close() })
	for err := error(nil); err == nil; {
		filler := get(net.DialUnix("unixgram", nil, addr))(t)
		_ = filler.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = filler.Write([]byte("FILLER=1"))
		filler.Close()
	}
	return addr.Name, conn
}

// readNotified reads messages until one begins with last, and returns those that are no
// fillers.
func readNotified(t *testing.T, conn *net.UnixConn, last string) []string {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
	var got []string
	for buf := make([]byte, 4096); ; {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("%v, after %q", err, got)
		}
		message := string(buf[:n])
		if message != "FILLER=1" {
			got = append(got, message)
		}
		if strings.HasPrefix(message, last) {
			return got
		}
	}
}

// While systemd reads nothing a run goes on, and systemd gets what matters later.
func TestNotify_RunGoesOnThoughSystemdDoesNotRead(t *testing.T) {
	t.Parallel()
	address, conn := fullNotifySocket(t)
	args := append(runArgs(writePipeline(t, shell("a", "exec sleep 300"))), "--", "sh", "-c", "echo started; exec sleep 300")
	p := start(t, args, withEnv("NOTIFY_SOCKET="+address), asService)
	p.waitOut("started")
	readNotified(t, conn, "READY=1")
	p.signal(syscall.SIGTERM)
	readNotified(t, conn, "STOPPING=1")
	<-p.done
}

func TestNotify_KeepsOrderAndWhatMatters(t *testing.T) {
	address, conn := fullNotifySocket(t)
	n := openNotifier(address, slog.New(slog.NewTextHandler(t.Output(), nil)))
	n.send("READY=1")
	for i := range 10 * maxPending {
		n.send(fmt.Sprint("STATUS=", i))
		n.send("WATCHDOG=1")
	}
	n.send("STOPPING=1")
	read := make(chan []string, 1)
	go func() { read <- readNotified(t, conn, "STOPPING=1") }()
	n.close()
	got := <-read
	if len(got) > maxPending+1 || got[0] != "READY=1" || got[len(got)-1] != "STOPPING=1" || got[len(got)-3] != fmt.Sprint("STATUS=", 10*maxPending-1) {
		t.Errorf("%d messages: %q", len(got), got)
	}
}

func TestNotify_NeverReadyIsNotTold(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, actor("ledgers", role{Dialect: "legacy"}), actor("store", role{}))
	p := start(t, []string{"run", file, "-control-plane-port", "0", "-start-timeout", "1s"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	p.exit(exitNotReady)
	p.wait(p.notified, "STOPPING=1", 1)
	p.hasNot(p.notified, "READY=1")
	p.checkExtensions()
}

// One is ready, turns unhealthy, and only then the other becomes ready: nothing is
// starting and yet the pipeline is not ready.
func TestNotify_ReadyOnlyWhenAllAreHealthy(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, actor("ledgers", role{Dialect: "v1", OnUSR1: "unhealthy"}), actor("store", role{Dialect: "v1", Gate: true}))
	p := start(t, []string{"run", file, "-control-plane-port", "0"}, notifySocket(t, filepath.Join(shortDir(t), "notify")))
	p.waitErr("msg=ready component=ledgers")
	p.waitOut("store   | waiting")
	p.tell("ledgers", syscall.SIGUSR1)
	p.waitErr("msg=unhealthy id=ledgers")
	p.tell("store", syscall.SIGUSR2)
	p.wait(p.notified, "STATUS=1 of 2 ready, unhealthy: ledgers (it declared itself UNHEALTHY)\n", 1)
	p.hasNot(p.notified, "READY=1")
	p.tell("ledgers", syscall.SIGUSR2)
	p.wait(p.notified, "READY=1", 1)
	p.stop()
	p.checkExtensions()
}

// systemd hears twice in each interval that flowctl turns.
func TestNotify_WatchdogTwiceAnInterval(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{runArgs(writePipeline(t, shell("a", "exec sleep 300"))), {"server", "-control-plane-port", "0"}} {
		t.Run(args[0], func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			p := start(t, args, notifySocket(t, filepath.Join(shortDir(t), "notify")), withEnv("WATCHDOG_USEC=200000"))
			p.wait(p.notified, "WATCHDOG=1\n", 10)
			if took := time.Since(begun); took < 800*time.Millisecond {
				t.Errorf("ten within %s, which is too often", took)
			}
			p.stop()
		})
	}
}
