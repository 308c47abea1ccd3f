package main

import (
	"bufio"
	"math"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// wantEqual checks that what a test has got is what it wants.
func wantEqual[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func TestOverview(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		o     overview
		line  string
		attrs []any
	}{
		{overview{ready: 2, total: 2, left: []string{"a", "b"}}, "2 of 2 ready", []any{"ready", 2, "total", 2}},
		{
			overview{ready: 1, total: 4, waiting: []string{"b"}, restarting: []string{"c"}, unhealthy: []string{"d (no heartbeat)"}},
			"1 of 4 ready, waiting for b, restarting c, unhealthy: d (no heartbeat)",
			[]any{"ready", 1, "total", 4, "waiting", "b", "restarting", "c", "unhealthy", "d (no heartbeat)"},
		},
		{overview{stopping: true, ready: 1, total: 2, waiting: []string{"b"}, left: []string{"a"}}, "stopping, waiting for a", []any{"stopping", "a"}},
		{
			overview{total: 7, waiting: []string{"a", "b", "c", "d", "e", "f", "g"}},
			"0 of 7 ready, waiting for a, b, c, d, e and 2 more", []any{"ready", 0, "total", 7, "waiting", "a, b, c, d, e and 2 more"},
		},
	} {
		wantEqual(t, "line", tt.o.String(), tt.line)
		wantEqual(t, "attributes", tt.o.attrs(), tt.attrs)
	}
}

func TestFooter_Rows(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_000_000, 0)
	f := footer{pipeline: "p\x1b[2J", endpoint: "127.0.0.1:8080", status: "1 of 2 ready", components: []footerComponent{
		{
			"a", processReport{state: "ready", pid: 12, started: now.Add(-90 * time.Second), restarts: 3},
			memberSnapshot{health: "healthy", lastSeen: now.Add(-1250 * time.Millisecond), metrics: map[string]any{"lag": 2.5, "mode": "fast\x07"}},
		},
		{"longer", processReport{state: "waiting"}, memberSnapshot{health: "unregistered"}},
	}}
	want := []string{
		"p\ufffd[2J (127.0.0.1:8080): 1 of 2 ready",
		"ID      STATE    HEALTH        PID  UPTIME  LAST SEEN  RESTARTS  METRICS",
		"a       ready    healthy       12   1m30s   1.3s ago   3         lag=2.5, mode=fast\ufffd",
		"longer  waiting  unregistered  -    -       -          0         -",
	}
	wantEqual(t, "footer", strings.Join(f.rows(now), "\n"), strings.Join(want, "\n"))
}

// A report tries to say what helps: by the last lines, by the typed hint, by how the
// process ended.
func TestFailure_Try(t *testing.T) {
	t.Parallel()
	ended := func(status int) *syscall.WaitStatus { return new(syscall.WaitStatus(status)) }
	program := &Component{ID: "a", Command: []string{"./prog"}, WorkingDir: "/dir", Register: new(false)}
	container := &Component{ID: "a", Image: "img"}
	lines := []string{"some line"}
	for _, tt := range []struct {
		name string
		f    failure
		file string
		want string // how it begins
	}{
		{"unit: own words", failure{component: program, kind: failEnded, status: ended(1 << 8), tail: []string{"open /x: Permission denied"}}, "f", unitAccess},
		{"own words without a unit", failure{component: program, kind: failEnded, status: ended(1 << 8), tail: []string{"open /x: read-only file system"}}, "f", ""},
		{"unit: a port", failure{component: program, kind: failEnded, status: ended(1 << 8), tail: []string{"bind: permission denied"}}, "f", "a port below 1024"},
		{"own words", failure{component: program, kind: failEnded, status: ended(1 << 8), tail: []string{"listen: Address already in use"}}, "f", "a port that a wants is taken"},
		{"own words before the hint", failure{component: program, kind: failNotReady, hint: hintRegister, tail: []string{"No space left on device"}}, "f", "make room"},
		{"old words", failure{component: program, kind: failEnded, status: ended(1 << 8), tail: []string{"too many open files", "1", "2", "3"}, wasReady: true}, "f", `if it may fail and be started again`},
		{"open files", failure{component: program, kind: failStart, hint: hintOpenFiles}, "f", "raise the limit of open files"},
		{"processes", failure{component: program, kind: failStart, hint: hintProcesses}, "f", "raise the limit of processes"},
		{"not registered", failure{component: program, kind: failNotReady, hint: hintRegister}, "f", "if a does not speak to flowctl"},
		{"another registered", failure{component: program, kind: failNotReady, hint: hintUnmatched}, "f", "if one of these is a"},
		{"check before ready", failure{component: program, kind: failNotReady, hint: hintCheck}, "f", `ask by hand what its health_check asks, while a runs; if it is only slow, give it a longer "start_timeout"`},
		{"check", failure{component: program, kind: failUnhealthy, hint: hintCheck}, "f", `ask by hand what its health_check asks, while a runs; if it is only slow, give it a longer "health_timeout" or more`},
		{"silent", failure{component: program, kind: failUnhealthy, hint: hintHeartbeat}, "f", "see what a did for so long"},
		{"stream", failure{component: program, kind: failUnhealthy, hint: hintStream}, "f", "it refuses the stream"},
		{"declared", failure{component: program, kind: failUnhealthy, hint: hintDeclared}, "f", "it is a that says so"},
		{"not started", failure{component: program, kind: failStart}, "my file", "flowctl check 'my file' shows"},
		{"not started, without a file", failure{component: program, kind: failStart}, "", ""},
		{"stuck", failure{component: program, kind: failStuck}, "f", "only a process that hangs in the kernel"},
		{"127", failure{component: program, kind: failEnded, status: ended(127 << 8), tail: lines}, "f", "127 is how a shell says"},
		{"signal", failure{component: program, kind: failEnded, status: ended(int(syscall.SIGKILL)), tail: lines}, "f", "flowctl did not send it; the kernel does"},
		{"silent end", failure{component: program, kind: failEnded, status: ended(1 << 8)}, "f", "it printed nothing: run ./prog by hand"},
		{"engine", failure{component: container, kind: failEnded, status: ended(125 << 8), tail: lines}, "f", "the engine has refused"},
		{"container by a signal", failure{component: container, kind: failEnded, status: ended(139 << 8), tail: lines}, "f", "it has crashed"},
		{"nothing to say", failure{component: program, kind: failEnded, status: ended(1 << 8), tail: lines}, "f", ""},
	} {
		got := tt.f.try(tt.file, strings.HasPrefix(tt.name, "unit: "))
		if !strings.HasPrefix(got, tt.want) || (got == "") != (tt.want == "") {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
		if strings.Contains(got, "%") {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
}

// systemd gets the reason in a line, and not too long a one.
func TestReport_Status(t *testing.T) {
	t.Parallel()
	a := failedComponent{Component: "a", Reason: "env_files.TOKEN: permission\ndenied"}
	for _, tt := range []struct {
		r    report
		want string
	}{
		{report{Failures: []failedComponent{a}, Error: "more"}, "failed: a: env_files.TOKEN: permission"},
		{report{Failures: []failedComponent{{Component: "a", Reason: "exit status 3"}, a}}, "failed: a: exit status 3; and 1 more failed"},
		{report{Error: "p.json:1:1: wrong\x1b\np.json:2:1: wrong, too"}, "failed: p.json:1:1: wrong\ufffd"},
		{report{ExitCode: 7}, "failed: exit status 7"},
		{report{Error: strings.Repeat("ä", 400)}, "failed: " + strings.Repeat("ä", maxStatus) + "…"},
	} {
		wantEqual(t, "status", tt.r.status(), tt.want)
	}
}

func TestReport_Text(t *testing.T) {
	t.Parallel()
	f := failedComponent{
		Component: "a", Reason: "exit status 3", PID: 7, Lived: "2s", expected: true, LastLines: []string{"one", "two"}, LogFile: "logs/a.log",
		NeverStarted: []string{"b"}, Stopped: []string{"c"}, Try: "something",
	}
	r := report{Failures: []failedComponent{f, f, f, f, f, {Component: "last", Reason: "exit status 4"}}}
	var text strings.Builder
	r.writeText(&text)
	want := "flowctl: component a failed: exit status 3 (pid 7, ran for 2s, not registered)\n" +
		"flowctl: the last lines of a (all are in logs/a.log):\n  one\n  two\n" +
		"flowctl: never started, waiting for a: b\nflowctl: stopped, needing a: c\nflowctl: try: something\n"
	wantEqual(t, "report", text.String(), strings.Repeat(want, mostShown)+"flowctl: component last failed: exit status 4\n")
	asText, asJSON, journal := r.forms()
	if string(asText) != text.String() || strings.Count(string(asJSON), "\n") != 1 || len(journal) != 6 {
		t.Errorf("forms: %s%s%v", asText, asJSON, journal)
	}
	if e := journal[0]; e.component != "a" || e.reason != f.Reason || strings.Contains(e.message, "flowctl: ") || !strings.HasPrefix(e.message, "component a failed: exit status 3") {
		t.Errorf("for the journal: %q", e)
	}
}

func TestListedComponent_Details(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_000_000, 0)
	l := &listedComponent{
		ID: "a", InPipeline: true, Type: "sink", Health: "unhealthy", Cause: "no heartbeat for 9s", State: "ready", PID: 7, Restarts: 2,
		Started: new(now.Add(-time.Minute)), LastSeen: new(now.Add(-9 * time.Second)), InputEvents: []string{"x", "y\x1b"},
		Labels: map[string]string{"b": "2", "a": "1"}, History: []listedChange{{now, "unhealthy", "no heartbeat for 9s"}},
	}
	l.setMetric("inf", math.Inf(1))
	l.setMetric("n", 3.0)
	var text strings.Builder
	w := bufio.NewWriter(&text)
	l.writeDetails(w, &listedPipeline{Pipeline: "p"}, now)
	_ = w.Flush()
	want := "id:         a\npipeline:   p\ntype:       sink\nlabels:     a=1, b=2\nstate:      ready, restarts 2, pid 7, started 1m0s ago\n" +
		"health:     unhealthy: no heartbeat for 9s\nlast seen:  9s ago\nreads:      x, y\ufffd\nmetrics:    inf=+Inf, n=3\nhistory:\n  " +
		now.Local().Format(time.DateTime) + "  unhealthy: no heartbeat for 9s\n"
	wantEqual(t, "details", text.String(), want)
}
