//go:build linux

package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestParseVariable(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"":                            "=",
		"  # A=b":                     "=",
		"A=":                          "A=",
		" A=b c \r\n":                 "A=b c",
		"export  A=b":                 "A=b",
		"export=b":                    "export=b",
		"A=b#c":                       "A=b#c",
		"A=b # c":                     "A=b",
		"A= # c":                      "A=",
		"A=a=b":                       "A=a=b",
		`A='b # \n "c"' # d`:          `A=b # \n "c"`,
		`A="b\n\t\"\\\$c" `:           "A=b\n\t\"\\$c",
		`A=b"c"`:                      `A=b"c"`,
		"A":                           "must be NAME=value, without spaces around the =",
		"A = b":                       "must be NAME=value, without spaces around the =",
		"1A=secret":                   "must be NAME=value, without spaces around the =",
		`A="secret`:                   `the value of A has no closing " in its line`,
		`A='secret' secret`:           "the value of A goes on after its closing '",
		"A=secret\x00":                "the value of A has a NUL, which no variable can have",
		strings.Repeat("A", 99):       "must be NAME=value, without spaces around the =",
		"A=" + strings.Repeat("b", 9): "A=bbbbbbbbb",
	} {
		name, value, err := parseVariable(line)
		got := name + "=" + value
		if err != nil {
			got = err.Error()
		}
		wantEqual(t, line, got, want)
	}
}

// The variables of -env-file are for references and for components, below flowctl's own environment and
// the file's. A reload reads them again.
func TestEnvFile_IsBelowAllElse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := writeFile(t, filepath.Join(dir, "first.env"), "ONE=first\nTWO=first\nTHREE=first\nFOUR=first\nFLOWCTL_ENDPOINT=nowhere\nHEALTH_PORT=1\n")
	second := writeFile(t, filepath.Join(dir, "second.env"), "export TWO=\"second\"\n")
	a := shell("a", `echo "$ONE $TWO $THREE $FOUR $REFERS $HEALTH_PORT $FLOWCTL_ENDPOINT" | sed "s/ $HEALTH_PORT $FLOWCTL_ENDPOINT/ own/; s/ 1 .*/ bad/"; exec sleep 300`)
	a.Env = map[string]string{"FOUR": "file", "REFERS": "${ONE}-${THREE}"}
	b := shell("b", "exec sleep 300")
	b.Env = map[string]string{"ONE": "", "TWO": "", "THREE": "", "FOUR": ""}
	file := writePipeline(t, a, b)
	p := start(t, runArgs(file, "-env-file", first, "-env-file", second), withEnv("THREE=outer"))
	p.waitOut("a | first second outer file first-outer own\n")
	p.reload("reloaded: nothing has changed\n")
	writeFile(t, second, "TWO=third\n")
	p.reload("reloaded: restarted a; 1 unchanged\n")
	p.waitOut("a | first third outer file first-outer own\n")
	writeFile(t, second, "TWO='secret\n")
	if code, _, stderr := p.callReload(); code != exitUsage || !strings.Contains(stderr, "flowctl: -env-file: "+second+":1: the value of TWO has no closing ' in its line\n") {
		t.Errorf("reload: exit %d\n%s", code, stderr)
	}
	p.stop()
	if code, _, stderr := call(t, "check", "-env-file", first, file); code != exitOK {
		t.Errorf("check: exit %d\n%s", code, stderr)
	}
	if code, _, stderr := call(t, "check", "-env-file", filepath.Join(dir, "none"), file); code != exitUsage || !strings.Contains(stderr, "flowctl: -env-file: open ") {
		t.Errorf("check without the file: exit %d\n%s", code, stderr)
	}
}

func TestRun_Timeout(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		c    Component
		args string
		want string
	}{
		{"not ready", actor("a", role{Dialect: "v1", Gate: true}), "", "0 of 1 ready, waiting for a"},
		{"not ended", shell("a", "exec sleep 300"), "", "it was not stopped"},
		{"not done", shell("a", "exec sleep 300"), "-until done", "not completed: a"},
		{"command", shell("a", "exec sleep 300"), "-- sleep 300", `the command "sleep" after -- had not ended`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			p := launch(t, writePipeline(t, tt.c), strings.Fields("-timeout 3s "+tt.args)...)
			p.exit(exitFailed)
			p.has(p.stderr, "flowctl: -timeout 3s is over: "+tt.want+"\n")
			if took := time.Since(begun); took < 3*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}
