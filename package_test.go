//go:build linux

package main

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// What is installed: the units as they are shipped.

var unitFiles = []string{"flowctl.service", "flowctl.socket", "flowctl@.service", "flowctl@.socket"}

// The template has the settings of the unit, but for its folders and its pipeline.
func TestTemplate_IsAsTheUnit(t *testing.T) {
	t.Parallel()
	settings := func(name string) string {
		return regexp.MustCompile(`(?m)^(#.*)?\n`).ReplaceAllString(page(t, name), "")
	}
	differs := strings.NewReplacer("/pipeline.json", "/%i.json", "Directory=%N", "Directory=%p-%i", "DynamicUser=yes", "DynamicUser=yes\nUser=%p-%i", "data pipeline", "data pipeline %i")
	wantEqual(t, "flowctl@.service without comments", settings("flowctl@.service"), differs.Replace(settings("flowctl.service")))
}

// installShipped puts flowctl and the units where the units say.
func (l *lab) installShipped(t *testing.T) {
	t.Helper()
	for _, name := range unitFiles {
		l.write(t, "/etc/systemd/system/"+name, page(t, name))
	}
	l.run(t, "cp", "/lab/flowctl", "/usr/local/bin/flowctl")
	l.run(t, "systemctl", "daemon-reload")
}

func testUnitVerify(t *testing.T, l *lab) {
	cmd := l.command("systemd-analyze", "verify", "flowctl.service", "flowctl.socket", "flowctl@x.service", "flowctl@x.socket")
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	out := l.run(t, "systemd-analyze", "security", "--offline=true", "--no-pager", "/etc/systemd/system/flowctl.service")
	level := regexp.MustCompile(`Overall exposure level for flowctl.service: (\S+)`).FindStringSubmatch(out)
	if level == nil {
		t.Fatal(out)
	}
	if exposure, err := strconv.ParseFloat(level[1], 64); err != nil || exposure > 2 {
		t.Errorf("exposure %s, want 2.0 at most", level[1])
	}
}

// Two instances run beside the plain unit: each has its own folders, which it loses to no other, reloads
// its own pipeline, and is found by every user.
func testUnitTemplate(t *testing.T, l *lab) {
	units := make(map[string]*unit) // by pipeline
	for name, file := range map[string]string{"flowctl": "pipeline", "flowctl@one": "one", "flowctl@two": "two"} {
		l.pipeline(t, file, file, actor("a", role{Dialect: "v1"}))
		units[file] = l.unit(t, name)
		units[file].start()
	}
	list := func(want ...string) {
		t.Helper()
		for _, as := range [][]string{nil, nobody} {
			out := l.run(t, slices.Concat(as, []string{"env", "-u", "RUNTIME_DIRECTORY", "/usr/local/bin/flowctl", "list"})...)
			got := regexp.MustCompile(`(?m)^(\w+): 1 of 1 ready`).FindAllStringSubmatch(out, -1)
			if len(got) != len(want) || slices.ContainsFunc(want, func(name string) bool { return !strings.Contains("\n"+out, "\n"+name+": ") }) {
				t.Errorf("list as %q has not %q\n%s", as, want, out)
			}
		}
	}
	list("pipeline", "one", "two")
	users := strings.Fields(l.run(t, "stat", "-c", "%u", "/run/flowctl", "/run/flowctl-one", "/run/flowctl-two"))
	if users[0] == users[1] || users[0] == users[2] || users[1] == users[2] {
		t.Errorf("users: %v", users)
	}
	units["two"].stop()
	list("pipeline", "one")
	for name, u := range units {
		if name == "two" {
			continue
		}
		file := "/etc/flowctl/" + name + ".json"
		l.write(t, file, strings.Replace(l.run(t, "cat", file), `"a"`, `"new"`, 1))
		l.run(t, "systemctl", "reload", u.name)
		u.logged("ready", "COMPONENT=new")
	}
	l.run(t, "test", "-s", "/var/lib/flowctl/pipeline.json")
	// With its socket an instance serves a file that outlives it, also for others.
	l.run(t, "systemctl", "start", "flowctl@two.socket", "flowctl@two")
	l.run(t, "systemctl", "restart", "flowctl@two")
	list("pipeline", "one", "two")
	endpoint := "unix:///run/flowctl-two.sock"
	units["two"].logged("listening", "ENDPOINT="+endpoint)
	l.run(t, append(slices.Clone(nobody), "env", "FLOWCTL_ENDPOINT="+endpoint, "FLOWCTL_COMPONENT_ID=other", roleVar+"="+actorRole(t, role{Dialect: "v1", End: "registered"}), "/lab/actor")...)
	l.run(t, "systemctl", "stop", "flowctl@two.socket", "flowctl@two")
	if out, err := l.try("ls", "-d", "/run/flowctl-two.sock", "/run/flowctl-two"); err == nil {
		t.Errorf("left: %s", out)
	}
}

var nobody = []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}
