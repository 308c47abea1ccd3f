//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runsOf returns what flowctl runs -json prints with the state folder home.
func runsOf(t *testing.T, home string) []runRecord {
	t.Helper()
	p := start(t, []string{"runs", "-json"}, withEnv("XDG_STATE_HOME="+home))
	p.exit(exitOK)
	var records []runRecord
	must(t, json.Unmarshal([]byte(p.stdout.String()), &records))
	return records
}

func TestRuns_SayHowTheyEnded(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	in := withEnv("XDG_STATE_HOME=" + home)
	for _, tt := range []struct {
		component Component
		args      []string
		end       func(p *process)
		code      int
		state     string
		reason    string
	}{
		{shell("a", "exit 0"), nil, nil, exitOK, runCompleted, ""},
		{shell("a", "exec sleep 300"), nil, (*process).stop, exitOK, runStopped, ""},
		{shell("a", "exec sleep 300"), []string{"-until", "ready"}, nil, exitOK, runStopped, ""},
		{shell("a", "sleep 0.1; exit 7"), nil, nil, exitFailed, runFailed, "a: exit status 7"},
		{shell("a", "exec sleep 300"), nil, func(p *process) { p.signal(syscall.SIGKILL); <-p.done; p.awaitGuard() }, -1, runKilled, ""},
	} {
		p := start(t, runArgs(writePipeline(t, tt.component), tt.args...), in)
		if tt.end != nil {
			p.waitReady()
			eventually(t, "it is recorded as running", func() bool {
				all := runsOf(t, home)
				return len(all) > 0 && all[len(all)-1].State == runRunning && all[len(all)-1].PID == p.cmd.Process.Pid
			})
			tt.end(p)
		}
		<-p.done
		all := runsOf(t, home)
		last := all[len(all)-1]
		if last.State != tt.state || !strings.HasPrefix(last.Reason, tt.reason) || last.Pipeline != "test" || last.ID == "" {
			t.Errorf("want %s %q, got %+v", tt.state, tt.reason, last)
		}
		if tt.state != runKilled && (last.ExitCode == nil || *last.ExitCode != tt.code || last.Ended == nil) {
			t.Errorf("want exit code %d and an end, got %+v", tt.code, last)
		}
	}
	table := start(t, []string{"runs"}, in)
	table.exit(exitOK)
	if lines := strings.Split(table.stdout.String(), "\n"); len(lines) != 7 || !strings.HasPrefix(lines[0], "STARTED ") || !strings.Contains(lines[4], " failed ") || !strings.Contains(lines[5], " killed ") {
		t.Errorf("got\n%s", table.stdout)
	}
}

// The last records are kept, but none goes whose run goes on; and many runs at once lose none.
func TestRuns_LastAreKept(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	folder := filepath.Join(home, "flowctl")
	must(t, os.Mkdir(folder, 0o700))
	first := start(t, runArgs(sleeper(t)), withEnv("XDG_STATE_HOME="+home))
	first.waitReady()
	var all []runRecord
	eventually(t, "it is recorded as running", func() bool {
		all = runsOf(t, home)
		return len(all) == 1 && all[0].State == runRunning
	})
	for number := int64(2); number <= maxRuns; number++ {
		all = append(all, runRecord{Number: number, ID: fmt.Sprint(number), Pipeline: "old", State: runStopped, Started: time.Now(), Ended: new(time.Now())})
	}
	writeFile(t, filepath.Join(folder, runsName), string(get(json.Marshal(runsFile{runsFormat, all}))(t)))
	var more []*process
	for range 5 {
		more = append(more, start(t, append(runArgs(sleeper(t)), "-until", "ready"), withEnv("XDG_STATE_HOME="+home)))
	}
	for _, p := range more {
		p.exit(exitOK)
	}
	all = runsOf(t, home)
	if len(all) != maxRuns || all[0].PID != first.cmd.Process.Pid || all[1].ID != "7" {
		t.Fatalf("%d records, the first %+v, %+v", len(all), all[0], all[1])
	}
	var numbers, want []int64 // of those that began at once in any order
	for i, r := range all[1:] {
		numbers, want = append(numbers, r.Number), append(want, int64(7+i))
	}
	wantEqual(t, "numbers", fmt.Sprint(slices.Sorted(slices.Values(numbers))), fmt.Sprint(want))
	first.stop()
	if all = runsOf(t, home); all[0].State != runStopped {
		t.Errorf("the first is %+v", all[0])
	}
}

// What cannot be written or read changes nothing of a run, and a damaged file stays as it is.
func TestRuns_FolderThatIsOfNoUse(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	damaged := filepath.Join(home, "damaged")
	must(t, os.MkdirAll(filepath.Join(damaged, "flowctl"), 0o700))
	file := writeFile(t, filepath.Join(damaged, "flowctl", runsName), `[{"number": 1, "id"`)
	newer := filepath.Join(home, "newer")
	must(t, os.MkdirAll(filepath.Join(newer, "flowctl"), 0o700))
	writeFile(t, filepath.Join(newer, "flowctl", runsName), `{"format": "flowctl-runs/2", "runs": []}`)
	for state, want := range map[string]string{damaged: "is kept as it is", newer: `it has the format`, writeFile(t, filepath.Join(home, "file"), ""): "not a directory"} {
		p := start(t, append(runArgs(sleeper(t)), "-until", "ready"), withEnv("XDG_STATE_HOME="+state))
		p.exit(exitOK)
		p.has(p.stderr, `level=WARN msg="this run is not recorded as it is"`, want)
	}
	wantEqual(t, "the damaged file", string(get(os.ReadFile(file))(t)), `[{"number": 1, "id"`)
	runs := start(t, []string{"runs"}, withEnv("XDG_STATE_HOME="+damaged))
	runs.exit(exitPlane)
	runs.has(runs.stderr, file+" cannot be read")
	// Once it can be written the run is recorded.
	mended := start(t, runArgs(sleeper(t)), withEnv("XDG_STATE_HOME="+damaged))
	mended.waitReady()
	mended.waitErr(`msg="this run is not recorded as it is"`)
	must(t, os.Remove(file))
	mended.stop()
	if all := runsOf(t, damaged); len(all) != 1 || all[0].PID != mended.cmd.Process.Pid || all[0].State != runStopped {
		t.Errorf("recorded later: %+v", all)
	}
	homeless := withEnv("XDG_STATE_HOME=", "HOME=")
	for _, args := range [][]string{nil, {"-no-persistence"}} {
		p := start(t, append(append(runArgs(sleeper(t)), "-until", "ready"), args...), homeless)
		p.exit(exitOK)
		said := strings.Count(p.stderr.String(), `level=WARN msg="this run is not recorded: this user has no folder for state" try="set XDG_STATE_HOME or HOME; `)
		wantEqual(t, fmt.Sprint("said without a home ", args), said, 1-len(args))
	}
	none := start(t, append(runArgs(sleeper(t)), "-until", "ready", "-no-persistence"), withEnv("XDG_STATE_HOME="+filepath.Join(home, "none")))
	none.exit(exitOK)
	if _, err := os.Stat(filepath.Join(home, "none")); !os.IsNotExist(err) {
		t.Errorf("with -no-persistence there is a folder: %v", err)
	}
}
