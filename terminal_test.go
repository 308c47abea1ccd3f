//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
	"unsafe"
)

// terminal is a real one, tmux(1), with a shell in it that runs flowctl as ./run, and
// ./go is the file that components wait for.
type terminal struct {
	tb   testing.TB
	dir  string
	fine string // its modes before flowctl has run
}

// openTerminal starts a terminal of that size, in a folder of its own in which the
// components run too. What flowctl leaves behind is an error.
func openTerminal(tb testing.TB, width, height int, components []Component, args ...string) *terminal {
	tb.Helper()
	p := start(tb, []string{"--version"}) // for its environment and its cleanup
	<-p.done
	t := &terminal{tb: tb, dir: shortDir(tb)}
	for i := range components {
		components[i].WorkingDir = t.dir
	}
	file := writePipeline(tb, components...)
	command := "exec " + flowctlProgram() + " " + strings.Join(runArgs(file, "-log-dir", "''"), " ")
	for _, arg := range args {
		command += " '" + arg + "'"
	}
	if !slices.Contains(args, "--") {
		command += ` "$@"`
	}
	writeFile(tb, filepath.Join(t.dir, "run"), "#!/bin/sh\n"+command+"\n")
	must(tb, os.Chmod(filepath.Join(t.dir, "run"), 0o700))
	conf := writeFile(tb, filepath.Join(t.dir, "conf"), "set -g history-limit 200000\nset -g default-terminal screen\nset -g escape-time 0\n")
	env := slices.DeleteFunc(slices.Clone(p.cmd.Env), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.Contains([]string{"TERM", "TMUX", "ENV", "NO_COLOR", "LANG", "LC_CTYPE"}, name)
	})
	cmd := exec.Command("tmux", "-u", "-S", t.socket(), "-f", conf, "new-session", "-d", "-x", fmt.Sprint(width), "-y", fmt.Sprint(height), "-c", t.dir, "/bin/sh", "-i")
	cmd.Env = append(env, "TERM=screen", "LC_ALL=C.UTF-8", "SHELL=/bin/sh", "PS1=$ ", "NO_COLOR=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("tmux: %v\n%s", err, out)
	}
	tb.Cleanup(func() {
		if text := t.tmux("capture-pane", "-p", "-S", "-"); strings.Contains(text, "DATA RACE") {
			tb.Errorf("the race detector has found something:\n%s", text)
		}
		t.tmux("kill-server")
	})
	t.shows("$")
	t.fine = t.modes()
	return t
}

func (t *terminal) socket() string { return filepath.Join(t.dir, "tmux") }

func (t *terminal) tmux(args ...string) string {
	t.tb.Helper()
	out, err := exec.Command("tmux", append([]string{"-S", t.socket()}, args...)...).CombinedOutput()
	if err != nil {
		t.tb.Fatalf("tmux %s: %v\n%s", args, err, out)
	}
	return string(out)
}

// keys types: each is a name of tmux(1), such as C-c, or a text.
func (t *terminal) keys(keys ...string) {
	t.tb.Helper()
	t.tmux(append([]string{"send-keys"}, keys...)...)
}

func (t *terminal) run() { t.tb.Helper(); t.keys("./run", "Enter") }

func (t *terminal) resize(width, height int) {
	t.tb.Helper()
	t.tmux("resize-window", "-x", fmt.Sprint(width), "-y", fmt.Sprint(height))
}

// let has the components that wait for ./go go on.
func (t *terminal) let() { t.tb.Helper(); writeFile(t.tb, filepath.Join(t.dir, "go"), "") }

// pid is flowctl's: the program that the shell has started.
func (t *terminal) pid() int {
	t.tb.Helper()
	var pid int
	shell := strings.TrimSpace(t.tmux("display-message", "-p", "#{pane_pid}"))
	children, _ := os.ReadFile("/proc/" + shell + "/task/" + shell + "/children")
	if _, err := fmt.Sscan(string(children), &pid); err != nil {
		t.tb.Fatalf("no flowctl runs: %v", err)
	}
	return pid
}

// modes are all of the terminal that a program could leave changed.
func (t *terminal) modes() string {
	t.tb.Helper()
	tty := strings.TrimSpace(t.tmux("display-message", "-p", "#{pane_tty}"))
	line, err := exec.Command("stty", "-F", tty, "-g").CombinedOutput()
	if err != nil {
		t.tb.Fatalf("stty: %v\n%s", err, line)
	}
	return t.tmux("display-message", "-p", "cursor #{cursor_flag} alternate #{alternate_on} insert #{insert_flag} wrap #{wrap_flag} "+
		"keypad #{keypad_flag} #{keypad_cursor_flag} mouse #{mouse_any_flag} origin #{origin_flag} region #{scroll_region_upper} title #{pane_title}") + string(line)
}

// changing is what differs each time, and what it is replaced by.
var changing = []struct {
	pattern *regexp.Regexp
	by      string
}{
	{regexp.MustCompile(`\d\d:\d\d:\d\d`), "15:04:05"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:8080"},
	{regexp.MustCompile(`pid=\d+`), "pid=1"},
	{regexp.MustCompile(`pid \d+, ran for [^)]+`), "pid 1, ran for 1s"},
	{regexp.MustCompile(`(after|lived|at_most)=\S+`), "$1=1s"},
	{regexp.MustCompile(`(?m)^ID +STATE +HEALTH +PID +UPTIME +LAST SEEN +RESTARTS +METRICS$`), "ID STATE HEALTH PID ..."},
	{regexp.MustCompile(`(?m)^(\w+) +(waiting|starting|ready|stopping|completed) +(\w+) +\d+ +[\dms]+ +[\d.ms]+ ago +(\d+) +`), "$1 $2 $3 1 1s 1s-ago $4 "},
	{regexp.MustCompile(`(?m)^(\w+) +(waiting|starting) +(\w+) +\d+ +[\dms]+ +- +(\d+) +`), "$1 $2 $3 1 1s - $4 "},
	{regexp.MustCompile(`(?m) lag=3$`), " -"}, // of an actor, once it has sent a heartbeat
	{regexp.MustCompile(`(?m) +$`), ""},
}

// text is all that is on the terminal and has been, without what differs each time.
func (t *terminal) text() string {
	t.tb.Helper()
	text := t.tmux("capture-pane", "-p", "-S", "-")
	for _, v := range changing {
		text = v.pattern.ReplaceAllString(text, v.by)
	}
	return strings.TrimRight(text, "\n")
}

// shows waits until the lines are all that is on the terminal, and has been.
func (t *terminal) shows(lines ...string) {
	t.tb.Helper()
	want := strings.Join(lines, "\n")
	t.until("all of it is this:\n"+want, func(text string) bool { return text == want })
}

// ends waits until these are the last lines.
func (t *terminal) ends(lines ...string) {
	t.tb.Helper()
	want := strings.Join(lines, "\n")
	t.until("it ends with:\n"+want, func(text string) bool { return strings.HasSuffix("\n"+text, "\n"+want) })
}

func (t *terminal) until(what string, ok func(text string) bool) {
	t.tb.Helper()
	deadline := time.Now().Add(patience)
	for text := t.text(); !ok(text); text = t.text() {
		if time.Now().After(deadline) {
			t.tb.Fatalf("the terminal does not come to this: %s\n--- but is\n%s", what, text)
		}
		time.Sleep(10 * time.Millisecond) // a screen has no event for us
	}
}

// restored checks that flowctl has left the terminal as it was.
func (t *terminal) restored() {
	t.tb.Helper()
	if modes := t.modes(); modes != t.fine {
		t.tb.Errorf("the terminal was\n%s\nand is left as\n%s", t.fine, modes)
	}
}

// onGo is a component that runs first, then second once there is a file go.
func onGo(id, first, second string) Component {
	return shell(id, first+"\nuntil [ -e go ]; do sleep 0.02; done\n"+second+"\nexec sleep 300")
}

// footerOf are the rows of a footer for components that are ready.
func footerOf(ids ...string) []string {
	rows := []string{"", fmt.Sprintf("test (127.0.0.1:8080): %d of %[1]d ready", len(ids)), "ID STATE HEALTH PID ..."}
	for _, id := range ids {
		rows = append(rows, id+" ready healthy 1 1s 1s-ago 0 -")
	}
	return rows
}

func TestFooter_FollowsTheRun(t *testing.T) {
	t.Parallel()
	b := shell("b", "exec sleep 300")
	b.Inputs, b.HealthCheck, b.HealthInterval = []string{"a"}, "exec:test -e go", Duration(20*time.Millisecond)
	c := openTerminal(t, 120, 24, []Component{shell("a", "exec sleep 300"), b})
	c.run()
	log := []string{
		"$ ./run",
		"time=15:04:05 level=INFO msg=listening endpoint=127.0.0.1:8080",
		"time=15:04:05 level=INFO msg=started component=a pid=1",
		"time=15:04:05 level=INFO msg=ready component=a after=1s",
		"time=15:04:05 level=INFO msg=started component=b pid=1",
	}
	c.shows(slices.Concat(log, []string{"",
		"test (127.0.0.1:8080): 1 of 2 ready, waiting for b",
		"ID STATE HEALTH PID ...",
		"a ready healthy 1 1s 1s-ago 0 -",
		"b starting unregistered 1 1s - 0 -"})...)
	c.let()
	log = append(log,
		"time=15:04:05 level=INFO msg=ready component=b after=1s",
		`time=15:04:05 level=INFO msg="pipeline ready" components=2 endpoint=127.0.0.1:8080 after=1s`,
		`time=15:04:05 level=INFO msg="in another terminal" see="flowctl list" reload="flowctl reload"`)
	c.shows(slices.Concat(log, footerOf("a", "b"))...)
	c.keys("C-c")
	c.shows(append(log,
		`time=15:04:05 level=INFO msg="stop requested" signal=interrupt at_most=1s`,
		"time=15:04:05 level=INFO msg=stopping component=a pid=1 signal=terminated",
		`time=15:04:05 level=INFO msg=ended component=a pid=1 reason="killed by signal 15 (terminated)" lived=1s`,
		"time=15:04:05 level=INFO msg=stopping component=b pid=1 signal=terminated",
		`time=15:04:05 level=INFO msg=ended component=b pid=1 reason="killed by signal 15 (terminated)" lived=1s`,
		`time=15:04:05 level=INFO msg="all components have ended" after=1s`,
		"$")...)
	c.restored()
}

// What a component shows of itself is in the footer too, and cannot leave its row.
func TestFooter_ShowsMetrics(t *testing.T) {
	t.Parallel()
	c := openTerminal(t, 120, 24, []Component{actor("a", role{Dialect: "legacy"})}, "-log-level", "warn", "-heartbeat-ttl", "1s")
	c.run()
	c.ends("", "test (127.0.0.1:8080): 1 of 1 ready", "ID STATE HEALTH PID ...", "a ready healthy 1 1s 1s-ago 0 records=7")
}

// The footer stands below lines of any width.
func TestFooter_BelowAnyText(t *testing.T) {
	t.Parallel()
	exact := strings.Repeat("x", 80-13)
	long := strings.Repeat("0123456789", 20)
	script := "cat lines"
	c := openTerminal(t, 80, 24, []Component{onGo("a", script, script)}, "-log-level", "warn")
	writeFile(t, filepath.Join(c.dir, "lines"), strings.Join([]string{
		"wide 日本語 한국어 🚀🚀", strings.Repeat("宽", 40), "combining e\u0301 a\u0308o\u0302", "tab\tone\ttwo\t\t\t\t\t\t\t\t\tthree", exact, long, "half\rwhole", "",
	}, "\n"))
	lines := []string{
		"15:04:05 a | wide 日本語 한국어 🚀🚀",
		"15:04:05 a | " + strings.Repeat("宽", 33), strings.Repeat("宽", 7),
		"15:04:05 a | combining e\u0301 a\u0308o\u0302",
		"15:04:05 a | tab        one     two                                            t", "hree",
		"15:04:05 a | " + exact,
		"15:04:05 a | " + long[:67], long[67:147], long[147:],
		"15:04:05 a | whole",
	}
	c.run()
	c.shows(slices.Concat([]string{"$ ./run"}, lines, footerOf("a"))...)
	c.let()
	c.shows(slices.Concat([]string{"$ ./run"}, lines, lines, footerOf("a"))...)
}

// What a component prints to rule a terminal changes nothing but its own line.
func TestFooter_BelowEscapeCodes(t *testing.T) {
	t.Parallel()
	codes := []string{
		"\x1b[31;44mleft on", "plain", "\x1b[2J\x1b[Hcleared", "\x1b[5A\x1b[10Bmoved", "\x1b]0;title\x07titled", "\x1b]2;unterminated",
		"\x1bPq#0\x1b\\sixel", "\x1b[?1049h\x1b[?25l\x1b[?1000h\x1b[?7lmodes", "\x1b[1;5r\x1b[?6hregion", "\x0e\x1b(0lqk", "\u009b2Jsecond set",
		"\x1b7\x1b8\x1bc\x1bD\x1bMshort", "\x1b[8mconceal", "cut \x1b[31", "£° und \u00a0 so", "last \x1b", "",
	}
	c := openTerminal(t, 80, 40, []Component{onGo("a", "cat lines", "cat lines")}, "-log-level", "warn")
	writeFile(t, filepath.Join(c.dir, "lines"), strings.Join(codes, "\n"))
	var lines []string
	for _, text := range []string{
		"left on", "plain", "cleared", "moved", "titled", "2;unterminated", "sixel", "modes", "region", "lqk", "second set", "short", "conceal", "cut", "£° und \u00a0 so", "last",
	} {
		lines = append(lines, "15:04:05 a | "+text)
	}
	c.run()
	c.shows(slices.Concat([]string{"$ ./run"}, lines, footerOf("a"))...)
	c.let()
	c.shows(slices.Concat([]string{"$ ./run"}, lines, lines, footerOf("a"))...)
	text := c.tmux("capture-pane", "-p", "-e")
	if !strings.Contains(text, "\x1b[31m\x1b[44mleft on") || !regexp.MustCompile(`\n(\x1b\[39m|\x1b\[49m|\x1b\[0?m)*[\d:]+ a \| plain\n`).MatchString(text) {
		t.Errorf("a colour is not where it should be:\n%q", text)
	}
	c.restored()
}

func TestFooter_SurvivesResize(t *testing.T) {
	t.Parallel()
	c := openTerminal(t, 80, 16, []Component{onGo("a", "seq 20", "echo more"), shell("b", "exec sleep 300")}, "-log-level", "warn")
	log := []string{"$ ./run"}
	for i := range 20 {
		log = append(log, fmt.Sprintf("15:04:05 a | %d", i+1))
	}
	c.run()
	c.shows(slices.Concat(log, footerOf("a", "b"))...)
	narrow := func() {
		t.Helper()
		c.resize(40, 16)
		c.until("a footer that is cut", func(text string) bool {
			return strings.HasPrefix(text, strings.Join(log, "\n")+"\n\ntest (127.0.0.1:8080): 2 of 2 ready\nID  STATE  HEALTH ") &&
				strings.Count(text, "\n") == len(log)+4 && !strings.Contains(text, "METRICS")
		})
	}
	for range 3 {
		narrow()
		c.resize(100, 30)
		c.shows(slices.Concat(log, footerOf("a", "b"))...)
		c.resize(100, 9)
		c.shows(slices.Concat(log, footerOf("a", "b")[:2])...)
		c.resize(80, 16)
		c.shows(slices.Concat(log, footerOf("a", "b"))...)
	}
	c.resize(40, 16)
	c.let()
	log = append(log, "15:04:05 a | more")
	narrow()
	c.resize(80, 16)
	c.shows(slices.Concat(log, footerOf("a", "b"))...)
}

func TestFooter_OfManyIsFolded(t *testing.T) {
	t.Parallel()
	var many []Component
	for i := range 30 {
		many = append(many, shell(fmt.Sprintf("c%d", i), "exec sleep 300"))
	}
	c := openTerminal(t, 80, 24, many, "-log-level", "warn")
	c.run()
	c.shows("$ ./run", "", "test (127.0.0.1:8080): 30 of 30 ready")
	c.resize(80, 70)
	c.until("a row for each", func(text string) bool { return strings.HasSuffix(text, "\nc29 ready healthy 1 1s 1s-ago 0 -") })
}

// Ctrl-Z stops flowctl, which leaves the terminal to the shell, and what components
// did meanwhile is not held against them: TTL and janitor's interval pass.
func TestFooter_CtrlZLeavesTheTerminalToTheShell(t *testing.T) {
	t.Parallel()
	c := openTerminal(t, 80, 24, []Component{actor("a", role{Dialect: "v1"}), onGo("b", "", "echo more")}, "-log-level", "warn", "-heartbeat-ttl", "1s", "-janitor-interval", "200ms")
	c.run()
	c.shows(slices.Concat([]string{"$ ./run", "15:04:05 a | registered"}, footerOf("a", "b"))...)
	modes := c.modes()
	c.keys("C-z")
	stopped := []string{"$ ./run", "15:04:05 a | registered", "[1] + Stopped (signal)           ./run", "$"}
	c.shows(stopped...)
	c.restored()
	c.let()
	time.Sleep(2500 * time.Millisecond) // it is time itself that passes here
	c.shows(stopped...)
	c.keys("bg", "Enter")
	log := append(stopped[:3], "$ bg", "[1] ./run")
	c.until("its lines come in the background", func(text string) bool {
		return strings.HasPrefix(text, strings.Join(log, "\n")) && strings.Contains(text, "15:04:05 b | more") && !strings.Contains(text, "1 of")
	})
	c.keys("fg", "Enter")
	c.ends(footerOf("a", "b")...)
	if again := c.modes(); again != modes {
		t.Errorf("with a footer the modes were\n%s\nand then\n%s", modes, again)
	}
	c.keys("C-c")
	c.until("the shell is back", func(text string) bool { return strings.HasSuffix(text, "./run\n$") })
}

// Where no shell could continue it, Ctrl-Z does not stop flowctl.
func TestFooter_CtrlZWithoutAShellStopsNothing(t *testing.T) {
	t.Parallel()
	c := openTerminal(t, 80, 24, []Component{onGo("a", "echo up", "echo more")}, "-log-level", "warn")
	c.keys("exec ./run", "Enter") // in the place of the shell
	log := []string{"$ exec ./run", "15:04:05 a | up"}
	c.shows(slices.Concat(log, footerOf("a"))...)
	c.keys("C-z")
	c.let()
	c.shows(slices.Concat(log, []string{"15:04:05 a | more"}, footerOf("a"))...)
}

// What the user types is no part of the log.
func TestFooter_KeysAreNoLines(t *testing.T) {
	t.Parallel()
	c := openTerminal(t, 80, 24, []Component{onGo("a", "echo up", "echo more")}, "-log-level", "warn")
	c.run()
	log := []string{"$ ./run", "15:04:05 a | up"}
	c.shows(slices.Concat(log, footerOf("a"))...)
	c.keys("Enter", "Enter", "Enter")
	c.shows(slices.Concat(log, footerOf("a"))...)
	c.keys("Enter", "typed", "Enter", "Enter", "and more")
	c.let()
	log = append(log, "15:04:05 a | more")
	c.shows(slices.Concat(log, footerOf("a"))...)
	c.keys("C-c")
	c.shows(append(log, "$")...) // for Ctrl-C has the kernel drop what nobody has read
}

// However flowctl ends, the terminal is as before, and the footer is not on it: only
// SIGKILL leaves its rows, below the prompt.
func TestFooter_IsGoneAtTheEnd(t *testing.T) {
	t.Parallel()
	deaf := shell("a", `trap "" TERM; echo up; while :; do sleep 0.05; done`)
	fails := onGo("a", "echo up", `printf 'boom \033[31m\033[?25l'; exit 3`)
	for _, tt := range []struct {
		name      string
		component Component
		end       func(c *terminal)
		want      []string
	}{
		{"SIGTERM", shell("a", "echo up; exec sleep 300"), func(c *terminal) { _ = syscall.Kill(c.pid(), syscall.SIGTERM) }, nil},
		{"a second Ctrl-C", deaf, func(c *terminal) {
			c.keys("C-c")
			c.until("it stops", func(text string) bool { return strings.Contains(text, "): stopping, waiting for a") })
			c.keys("C-c")
		}, []string{`time=15:04:05 level=WARN msg="another signal, killing what still runs" signal=interrupt`}},
		{"failure", fails, func(c *terminal) { c.let() }, []string{
			"15:04:05 a | boom",
			"flowctl: component a failed: exit status 3 (pid 1, ran for 1s)",
			"flowctl: the last lines of a:",
			"  up",
			"  boom",
			`flowctl: try: if it may fail and be started again, give it "restart_policy": "on-failure"`,
		}},
		{"SIGKILL", shell("a", "echo up; exec sleep 300"), func(c *terminal) { _ = syscall.Kill(c.pid(), syscall.SIGKILL) }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := openTerminal(t, 100, 24, []Component{tt.component}, "-log-level", "warn")
			c.run()
			log := []string{"$ ./run", "15:04:05 a | up"}
			c.shows(slices.Concat(log, footerOf("a"))...)
			tt.end(c)
			if tt.name == "SIGKILL" {
				c.until("the shell goes on", func(text string) bool { return strings.Contains(text, "\nKilled") })
			} else {
				c.shows(slices.Concat(log, tt.want, []string{"$"})...)
			}
			c.restored()
			c.keys("echo usable", "Enter")
			c.until("the shell is there", func(text string) bool {
				return strings.Contains(text, "\n$ echo usable") && strings.Count(text, "usable") > 1
			})
		})
	}
}

// The command after -- has the terminal for itself.
func TestFooter_IsGoneForACommand(t *testing.T) {
	t.Parallel()
	c := openTerminal(t, 80, 24, []Component{onGo("a", "echo up", "echo more")}, "-log-level", "warn", "--", "sh", "-c", "until [ -e shown ]; do sleep 0.02; done; stty -g >modes; printf Name:; read name; echo $name; exec sleep 1.2")
	c.run()
	c.shows("$ ./run", "15:04:05 a | up")
	writeFile(t, filepath.Join(c.dir, "shown"), "")
	c.shows("$ ./run", "15:04:05 a | up", "Name:")
	c.let()
	c.shows("$ ./run", "15:04:05 a | up", "Name:15:04:05 a | more")
	c.keys("me", "Enter")
	c.shows("$ ./run", "15:04:05 a | up", "Name:15:04:05 a | more", "me", "me", "$")
	c.restored()
	if modes, _ := os.ReadFile(filepath.Join(c.dir, "modes")); !strings.HasSuffix(c.fine, string(modes)) {
		t.Errorf("the command found the terminal as %s, and it was %s", modes, c.fine)
	}
}

// The footer changes four times a second at most, whatever happens, and is written
// over and not erased when it does.
func TestFooter_ChangesFourTimesASecond(t *testing.T) {
	t.Parallel()
	var many []Component
	for i := range 8 {
		c := shell(fmt.Sprintf("c%d", i), "exec sleep 300")
		c.RestartPolicy, c.Command = restartAlways, []string{"sh", "-c", "exec sleep 0.3"}
		many = append(many, c)
	}
	screen := newTranscript()
	p := start(t, runArgs(writePipeline(t, many...), "-log-dir", "", "-log-level", "error"), onPty(screen))
	began := time.Now()
	if !screen.contains("\x1b7", 6, p.done) {
		t.Fatalf("no footer\n%q", screen)
	}
	text, _ := screen.text()
	if frames, most := strings.Count(text, "\x1b7"), 2+int(time.Since(began)/footerTime); frames > most {
		t.Errorf("%d footers, of which there should be %d at most", frames, most)
	}
	if strings.Contains(text, "\r \x1b[J") {
		t.Errorf("the footer is erased: %q", text)
	}
	p.stop()
}

// onPty has flowctl run on a terminal of its own, in its foreground. What it writes is
// in screen.
func onPty(screen io.Writer) option {
	return func(p *process) {
		p.tb.Helper()
		master := get(os.OpenFile("/dev/ptmx", os.O_RDWR, 0))(p.tb)
		var unlock, number int32
		size := struct{ rows, columns, x, y uint16 }{40, 120, 0, 0}
		for request, arg := range map[uintptr]unsafe.Pointer{syscall.TIOCSPTLCK: unsafe.Pointer(&unlock), syscall.TIOCGPTN: unsafe.Pointer(&number), syscall.TIOCSWINSZ: unsafe.Pointer(&size)} {
			if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, master.Fd(), request, uintptr(arg)); errno != 0 {
				p.tb.Fatal(errno)
			}
		}
		slave := get(os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0))(p.tb)
		p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		p.cmd.Env = append(p.cmd.Env, "TERM=xterm", "NO_COLOR=1")
		go func() {
			_, _ = io.Copy(screen, master) // until no one has the terminal open
			master.Close()
		}()
		p.tb.Cleanup(func() { slave.Close() })
	}
}

// In a flood no line is lost or torn, and the footer is there at its end.
func TestFooter_BelowAFlood(t *testing.T) {
	t.Parallel()
	const lines = 30_000
	c := openTerminal(t, 80, 24, []Component{shell("a", fmt.Sprintf("seq %d; exec sleep 300", lines))}, "-log-level", "warn")
	want := []string{"$ ./run"}
	for i := range lines {
		want = append(want, fmt.Sprintf("15:04:05 a | %d", i+1))
	}
	c.run()
	c.until("the end", func(string) bool {
		return strings.Contains(c.tmux("capture-pane", "-p"), fmt.Sprintf("a | %d\n\ntest (", lines))
	})
	c.shows(slices.Concat(want, footerOf("a"))...)
}

// A standard output that is a file gets the lines as they are, and the terminal the rest.
func TestFooter_StandardOutputElsewhere(t *testing.T) {
	t.Parallel()
	c := openTerminal(t, 80, 24, []Component{shell("a", `printf 'red \033[31m\033[2J\n'; exec sleep 300`)}, "-log-level", "warn")
	c.keys("./run >out", "Enter")
	c.shows(append([]string{"$ ./run >out"}, footerOf("a")...)...)
	c.keys("C-c")
	c.shows("$ ./run >out", "$")
	if out, err := os.ReadFile(filepath.Join(c.dir, "out")); err != nil || !strings.HasSuffix(string(out), " a | red \x1b[31m\x1b[2J\n") {
		t.Errorf("standard output is %q, %v", out, err)
	}
}

// heldWriter takes nothing until let is closed.
type heldWriter struct {
	began, let chan struct{}
	got        bytes.Buffer
}

func (w *heldWriter) Write(p []byte) (int, error) {
	select {
	case w.began <- struct{}{}:
	default:
	}
	<-w.let
	return w.got.Write(p)
}

// A terminal that is held gets all that components printed, however long it is held,
// and what they print takes no room from flowctl's own log.
func TestLogWriter_HeldTerminalGetsAll(t *testing.T) {
	t.Parallel()
	w := &heldWriter{began: make(chan struct{}, 1), let: make(chan struct{})}
	l := newLogWriter(w, formatText, nil, nil)
	_, _ = l.writeWaiting([]byte("first\n"))
	<-w.began // it is in hand, and what follows is queued
	long := strings.Repeat("x", maxQueued) + "\n"
	_, _ = l.writeWaiting([]byte(long))
	_, _ = l.Write([]byte("report\n"))
	written := make(chan struct{})
	go func() { l.await(context.Background()); close(written) }()
	select {
	case <-written:
		t.Error("await returns although nothing is written")
	case <-time.After(20 * time.Millisecond): // time in which it could
	}
	close(w.let)
	<-written
	if got := w.got.String(); got != "first\n"+long+"report\n" {
		t.Errorf("%d bytes are written, beginning with %.20q and ending in %.20q", len(got), got, got[max(0, len(got)-20):])
	}
	l.close()
}

// Where there is no footer the status is in the log.
func TestFooter_StatusIsLoggedWithoutOne(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, command string
		status        bool
	}{
		{"dumb", "TERM=dumb ./run", true},
		{"to a pipe, which may lead back here", "./run | cat", true},
		{"turned off", "./run -show-status=false", false},
		{"json", "./run -log-format json", true},
		{"background", "./run &", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := openTerminal(t, 100, 24, []Component{shell("a", "exec sleep 300")})
			c.keys(tt.command, "Enter")
			c.until("the pipeline is ready", func(text string) bool {
				return strings.Contains(text, "pipeline ready") && (!tt.status || regexp.MustCompile(`msg"?[:=]"?status"?[ ,]"?ready"?[:=]1`).MatchString(text))
			})
			if text := c.text(); strings.Contains(text, "UPTIME") || !tt.status && strings.Contains(text, "status ") {
				t.Errorf("this should not be there:\n%s", text)
			}
			if tt.name == "background" {
				c.keys("fg", "Enter")
				c.ends(footerOf("a")...)
			}
		})
	}
}

// What a component prints leaves its prefix alone, with a footer and without, and in the report.
func TestTerminal_PrefixStays(t *testing.T) {
	t.Parallel()
	for _, flag := range []string{"-show-status", "-show-status=false"} {
		t.Run(flag, func(t *testing.T) {
			t.Parallel()
			c := openTerminal(t, 100, 24, []Component{shell("a", `printf '10%%\r20%%\rover\rwritten\nb\b\b\b\b\b\b\b\b\bs\nu\033[1A\033[1Gp\n'; exit 3`)}, "-log-level", "error", flag)
			c.run()
			c.until("its lines and its end", func(text string) bool {
				return strings.Contains(text, "$ ./run\n15:04:05 a | written\n15:04:05 a | bs\n15:04:05 a | up\n") &&
					strings.Contains(text, "flowctl: the last lines of a:\nwritten\n  bs\n  up\n")
			})
		})
	}
}

// What a component prints keeps its text and its colours on a terminal, and nothing else.
func TestSanitize_KeepsOnlyColours(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ in, want string }{
		{"plain\n", "plain\n"},
		{"\x1b[31mred\nplain\n", "\x1b[31mred\x1b[0m\nplain\n"},
		{"\x1b[1;38:5:3mred\x1b[0m\n\x1b[4mu\x1b[m\n", "\x1b[1;38:5:3mred\x1b[0m\n\x1b[4mu\x1b[m\n"},
		{"a\x1b[>4;2mb\x1b[?4mc\x1b[1 md\n", "abcd\n"},
		{"a\x1b[2Jb\x1b[10;20Hc\x1b[!pd\n", "abcd\n"},
		{"a\x1b[31\nb\n", "a\nb\n"},
		{"a\x1b[3\u00e4b\n", "a\u00e4b\n"},
		{"a\x1b]8;;http://x\x1b\\link\x1b]8;;\x07b\n", "alinkb\n"},
		{"a\x1b]0;not ended\nb\x07\n", "a0;not ended\nb\n"},
		{"a\x1bPq\x07#1\x1b\\b\x1b_x\u009cc\x1bXno\x1b[1mend\n", "abcno\x1b[1mend\x1b[0m\n"},
		{"a\x1b(0b\x1b#8c\x1bcd\x1b=e\x1b\x1bMf\n", "abcdef\n"},
		{"a\x0eb\x0fc\u0085d\u009b2Je\u009d0;t\u009cf\n", "abcdef\n"},
		{"£\té 日本 \xc2\n\xff\x9b\n", "£\té 日本 \ufffd\n\ufffd\n"},
		{"\xc2\x0e\x9b2J\xc2\x1b[1G\x9dx\xc2\x1b\xc2\x1b\x9b\n", "\ufffd\ufffd2J\ufffd\ufffdx\ufffd\ufffd\ufffd\n"},
		{"10%\r\x1b[32m20%\r\x1b[K30%\r\r\nover\rwritten\n\r\n", "30%\nwritten\n\n"},
		{"a\bb\vc\fd\x05e\x00f\x7fg\n", "abcdefg\n"},
		{"a\x1b\nb\x1b[\nc\x1b]\n", "a\nb\nc\n"},
	} {
		wantEqual(t, fmt.Sprintf("%q", tt.in), fmt.Sprintf("%q", appendSanitized(nil, []byte(tt.in))), fmt.Sprintf("%q", tt.want))
	}
}

// Whatever the bytes are: what is left of control sequences is colours, no colour goes on
// behind its line, no line is lost, and to do it again changes nothing.
func FuzzSanitize(f *testing.F) {
	for _, seed := range []string{"plain\n", "\x1b[31mred\nplain\n", "a\x1b]8;;x\x1b\\b\x1b]8;;\a\n", "a\u009b2Jb\xc2\n", "\x1b\x1b[0m[2J\n", "\x1b[\x1b[1m2J\n", "\xc2\x1b\x9b2J\n", "a\rb\b\r\n", "\x1b[3\r1m\n"} {
		f.Add(seed)
	}
	colour := regexp.MustCompile(`\x1b\[[0-9:;]*m`)
	f.Fuzz(func(t *testing.T, in string) {
		out := string(appendSanitized(nil, []byte(in)))
		if again := string(appendSanitized(nil, []byte(out))); again != out {
			t.Errorf("%q becomes %q, and that %q", in, out, again)
		}
		if !utf8.ValidString(out) {
			t.Errorf("%q becomes %q, of which bytes are no UTF-8", in, out)
		}
		if strings.Count(out, "\n") != strings.Count(in, "\n") {
			t.Errorf("%q has other lines: %q", in, out)
		}
		for line := range strings.Lines(out) {
			colours := colour.FindAllString(line, -1)
			if n := len(colours); n > 0 && colours[n-1] != "\x1b[0m" && colours[n-1] != "\x1b[m" {
				t.Errorf("%q: a colour goes on behind %q", in, line)
			}
			for _, r := range colour.ReplaceAllString(line, "") {
				if unicode.IsControl(r) && r != '\t' && r != '\n' {
					t.Errorf("%q: %q is left in %q", in, r, line)
				}
			}
		}
	})
}

// No control reaches a terminal that is put together of what is left out between its bytes, nor of what
// two writes have brought.
func TestTerminal_NothingIsPutTogether(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("no script(1) here, which makes a terminal")
	}
	var evil []string
	for _, control := range []string{"\xc2\x9b", "\xc2\x9d", "\x1b[", "\x1b]"} { // CSI and OSC
		for _, between := range []string{"", "\x0e", "\x1b[1G", "\x1b", "\r", "\b", "\xc2", control[:1], control} {
			evil = append(evil, control[:1]+between+control[1:]+"2J52;c;ZXZpbA==\a")
		}
	}
	dir := t.TempDir()
	lines := writeFile(t, filepath.Join(dir, "lines"), strings.Join(evil, "\n")+"\nsplit \xc2")
	a := shell("a", "cat "+lines+"; sleep 1.3; printf '\\2332J\\nlast\\n'") // a pause after which what is not a line is shown
	for _, flag := range []string{"-show-status", "-show-status=false"} {
		t.Run(flag, func(t *testing.T) {
			t.Parallel()
			p := start(t, []string{"--version"}) // for its harness alone
			<-p.done
			command := "stty rows 40 cols 200; exec " + flowctlProgram() + " " + strings.Join(runArgs(writePipeline(t, a), "-log-dir", "''", flag), " ")
			cmd := exec.Command("script", "-qec", command, "/dev/null")
			cmd.Env = append(p.cmd.Env, "TERM=xterm", "NO_COLOR=1")
			out, err := cmd.Output()
			if err != nil || !bytes.Contains(out, []byte("a | last")) {
				t.Fatalf("%v\n%s", err, out)
			}
			if found := regexp.MustCompile(`[\x{80}-\x{9f}]|\x1b\]|\x1b\[2J|\x07|\x0e`).FindAllIndex(out, -1); found != nil {
				t.Errorf("%d controls reach the terminal: %q", len(found), out[max(0, found[0][0]-20):min(len(out), found[0][1]+20)])
			}
		})
	}
}
