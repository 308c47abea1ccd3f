//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What is installed: the units as they are shipped, the packages that .ci/package makes, and
// what an operator does with them.

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

// An operator's week: two pipelines, each with a secret and data, are installed from the package, have
// six troubles that are mended by what the journal says, are upgraded, rebooted, removed and purged.
// Nothing is lost before, and nothing is left after.
func TestOperatorsWeek(t *testing.T) {
	t.Parallel()
	l := openLab(t)
	first, second := l.pack(t, "1.0.0-rc.1"), l.pack(t, "1.0.0")
	files := func() string {
		return l.run(t, "find", "/etc", "/usr", "/var", "/run", "/srv", "-xdev", "-name", "*flowctl*")
	}
	before := files()
	dpkg := func(args ...string) { // in haste: the index of all man pages is not made anew
		t.Helper()
		l.run(t, append([]string{"dpkg", "--no-triggers", "--path-include=/usr/share/*"}, args...)...)
	}
	dpkg("-i", first)
	wantEqual(t, "files that are not as packaged", l.run(t, "dpkg", "-V", "flowctl"), "")
	if out := l.run(t, "man", "--warnings", "-P", "cat", "-l", "/usr/share/man/man1/flowctl.1.gz"); !strings.Contains(out, "-control-plane-port port") || !strings.Contains(out, "FLOWCTL RESTART") {
		t.Errorf("man page: %s", out)
	}
	l.write(t, "/etc/systemd/system/flowctl@.service.d/week.conf", "[Service]\nLoadCredential=token:/etc/flowctl/%i.token\n")
	one, two := l.weekly(t, "one"), l.weekly(t, "two")
	lines := func(name string) []string {
		return strings.Fields(l.run(t, "cat", "/var/lib/flowctl-"+name+"/data"))
	}
	data := slices.Concat(lines("one"), lines("two"))
	for _, tr := range l.troubles(t) {
		l.meet(t, tr)
	}

	processes := one.processes() + two.processes()
	dpkg("-i", second)
	wantEqual(t, "processes after the upgrade", one.processes()+two.processes(), processes)
	wantEqual(t, "versions", l.versions(t), "v1.0.0, running v1.0.0-rc.1 v1.0.0-rc.1")
	l.run(t, "systemctl", "reload", one.name)
	l.run(t, "systemctl", "restart", one.name)
	wantEqual(t, "versions", l.versions(t), "v1.0.0, running v1.0.0 v1.0.0-rc.1")

	// The PID 1 of the lab cannot be started again: all services end, and what is enabled starts.
	l.run(t, "systemctl", "isolate", "lab.target")
	wantEqual(t, "ActiveState", one.show("ActiveState")+" "+two.show("ActiveState"), "inactive inactive")
	l.run(t, "systemctl", "start", "multi-user.target")
	wantEqual(t, "versions", l.versions(t), "v1.0.0, running v1.0.0 v1.0.0")

	dpkg("-r", "flowctl")
	wantEqual(t, "ActiveState", one.show("ActiveState")+" "+two.show("ActiveState"), "inactive inactive")
	wantEqual(t, "data", strings.Join([]string{lines("one")[0], lines("two")[0]}, " "), strings.Join(data, " "))
	dpkg("-P", "flowctl")
	l.run(t, "test", "-s", "/etc/flowctl/one.json") // the administrator's
	l.run(t, "sh", "-c", "rm -r /etc/flowctl /etc/systemd/system/flowctl@*.service.d")
	wantEqual(t, "left after the purge", files(), before)
	wantEqual(t, "units", l.run(t, "systemctl", "list-units", "--all", "--plain", "--no-legend", "flowctl*"), "")
	if out, err := l.try("sh", "-c", "getent passwd | grep flowctl"); err == nil {
		t.Errorf("users: %s", out)
	}

	// Of an administrator's own units nothing goes with the package, nor what can be theirs.
	dpkg("-i", second)
	for name, folder := range map[string]string{"flowctl": "%N", "flowctl@": "%p-%i"} {
		l.write(t, "/etc/systemd/system/"+name+".service", "[Service]\nExecStart=sleep infinity\nStateDirectory="+folder+"\n[Install]\nWantedBy=multi-user.target\n")
	}
	l.run(t, "systemctl", "daemon-reload")
	l.run(t, "systemctl", "enable", "--now", "flowctl", "flowctl@own")
	dpkg("-P", "flowctl")
	for _, what := range []string{"is-active", "is-enabled"} {
		l.run(t, "systemctl", what, "flowctl", "flowctl@own")
	}
	l.run(t, "ls", "-d", "/var/lib/flowctl", "/var/lib/flowctl-own")
	l.run(t, "systemctl", "stop", "flowctl", "flowctl@own")
}

// pack makes the packages of this tree as a version, and returns where the Debian one is in the lab.
func (l *lab) pack(t *testing.T, version string) string {
	t.Helper()
	return "/lab/" + filepath.Base(packages(t, version, runtime.GOARCH, l.folder))
}

// packages makes the packages in a folder, and returns the Debian one without its suffix.
func packages(t *testing.T, version, arch, folder string) string {
	t.Helper()
	cmd := exec.Command(".ci/package", "v"+version, arch, folder)
	cmd.Env = append(os.Environ(), "DPKG_DEB_COMPRESSOR_TYPE=none") // which takes no time
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return filepath.Join(folder, fmt.Sprintf("flowctl_%s_%s.deb", version, arch))
}

// weekly starts and enables a pipeline with a secret, and data to which each start adds a line.
func (l *lab) weekly(t *testing.T, name string) *unit {
	t.Helper()
	source := actor("source", role{Dialect: "v1", Environ: true})
	source.EnvFiles = map[string]string{"TOKEN": "${CREDENTIALS_DIRECTORY}/token"}
	data := Component{ID: "data", Command: []string{"sh", "-c", "echo $$FLOWCTL_RUN_ID >>$$STATE_DIRECTORY/data"}, Oneshot: true}
	l.pipeline(t, name, name, source, data)
	l.write(t, "/etc/flowctl/"+name+".token", "secret of "+name+"\n")
	l.run(t, "chmod", "600", "/etc/flowctl/"+name+".token")
	u := l.unit(t, "flowctl@"+name)
	l.run(t, "systemctl", "enable", "--now", u.name)
	u.logged(`env "TOKEN=secret of `+name+`"`, "COMPONENT=source")
	return u
}

// versions is that of the program, and those that run.
func (l *lab) versions(t *testing.T) string {
	t.Helper()
	program := strings.Fields(l.run(t, "flowctl", "version"))[1]
	var list []struct{ Version string }
	must(t, json.Unmarshal([]byte(l.run(t, "flowctl", "list", "-json")), &list))
	out := program + ", running"
	for _, p := range list {
		out += " " + p.Version
	}
	return out
}

// A trouble is what an operator runs into.
type trouble struct {
	name, unit string
	script     string // makes it
	command    string // of systemctl, by which it shows
	says       string // what the journal has then, a regular expression
	mend       string // a script that gets what its groups have found as $1, $2
}

func (l *lab) troubles(t *testing.T) []trouble {
	ca := newCA(t)
	expired := issue(t, ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	renewed := issue(t, ca, nil)
	for name, text := range map[string]string{"pem": expired.cert, "key": expired.key, "pem.new": renewed.cert, "key.new": renewed.key} {
		l.write(t, "/etc/flowctl/two."+name, text)
	}
	return []trouble{
		{"a typing error", "one", `sed -i s/env_files/env_file/ one.json`, "reload",
			`cannot reload err="(\S+?):\d+:\d+: .* unknown field \\"(\w+)\\", did you mean \\"(\w+)\\"`, `sed -i "s/$2/$3/" "$1"`},
		{"a secret that only root can read", "one", `sed -i 's,[$]{CREDENTIALS_DIRECTORY}/token,/etc/flowctl/one.token,' one.json`, "restart",
			`/etc/flowctl/one.token: permission denied`, `sed -i 's,/etc/flowctl/one.token,${CREDENTIALS_DIRECTORY}/token,' one.json`},
		{"a program that is missing", "one", `mv /lab/actor /lab/gone`, "restart",
			`cannot run "(\S+)": no such file or directory`, `mv /lab/gone "$1"`},
		{"a port that is taken", "one", `systemd-run -q -p Type=notify -p RuntimeDirectory=other flowctl server -no-persistence -control-plane-port 8099
			printf "[Service]\nExecStart=\nExecStart=/usr/bin/flowctl -f /etc/flowctl/one.json -control-plane-port 8099\n" >$unit/port.conf`, "restart",
			`cannot listen on 127.0.0.1:(\d+): the address is in use`, `sed -i "s/$1/8098/" $unit/port.conf`},
		{"a folder that is read-only", "two", `mkdir -m 1777 /srv/data; sed -i 's,[$][$]STATE_DIRECTORY/data,/srv/data/two,' two.json`, "restart",
			`cannot create (\S+)/two: Read-only file system`, `printf "[Service]\nReadWritePaths=$1\n" >$unit/data.conf`},
		{"a certificate that has expired", "two", `printf "[Service]\nLoadCredential=key:/etc/flowctl/two.key\nExecStart=\nExecStart=/usr/bin/flowctl -f /etc/flowctl/two.json \
			-tls-cert /etc/flowctl/two.pem -tls-key \${CREDENTIALS_DIRECTORY}/key\n" >$unit/tls.conf`, "restart",
			`"(/etc/\S+).pem": it expired at`, `mv "$1.pem.new" "$1.pem"; mv "$1.key.new" "$1.key"`},
	}
}

// meet makes a trouble, sees that it is told, mends it, and sees that it has gone.
func (l *lab) meet(t *testing.T, tr trouble) {
	t.Helper()
	u := &unit{l, t, "flowctl@" + tr.unit}
	do := func(script string, args ...string) {
		t.Helper()
		// Days have passed since the last one: what counts starts is set back.
		script = "set -e; cd /etc/flowctl; unit=/etc/systemd/system/$0.service.d; mkdir -p $unit; " + script + "\nsystemctl daemon-reload; systemctl reset-failed $0"
		l.run(t, append([]string{"sh", "-c", script, u.name}, args...)...)
	}
	do(tr.script)
	if _, err := l.try("systemctl", tr.command, u.name); err == nil {
		t.Fatalf("%s: systemctl %s succeeds", tr.name, tr.command)
	}
	var found []string
	log := ""
	u.eventually(func() bool {
		log = l.run(t, "journalctl", "-u", u.name, "-p", "err", "-o", "cat", "--no-pager")
		found = regexp.MustCompile(tr.says).FindStringSubmatch(log)
		return found != nil
	}, func() string { return tr.name + ": the journal does not say " + tr.says + "\n" + log })
	do(tr.mend, found[1:]...)
	l.run(t, "systemctl", tr.command, u.name)
	u.is("ActiveState", "active")
}

// Each architecture has its packages, whose units fit their places.
func TestPackages(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip(err)
	}
	folder := t.TempDir()
	deb := packages(t, "1.2.3-rc.1", "arm64", folder)
	wantEqual(t, "fields", string(get(exec.Command("dpkg-deb", "-f", deb, "Version", "Architecture").Output())(t)), "Version: 1.2.3~rc.1\nArchitecture: arm64\n")
	inDeb := readTar(t, get(exec.Command("dpkg-deb", "--fsys-tarfile", deb).Output())(t))
	zipped := get(gzip.NewReader(bytes.NewReader(get(os.ReadFile(filepath.Join(folder, "flowctl_1.2.3-rc.1_linux_arm64.tar.gz")))(t))))(t)
	inTarball := readTar(t, get(io.ReadAll(zipped))(t))
	program := get(elf.NewFile(strings.NewReader(inTarball["bin/flowctl"])))(t)
	if libraries, _ := program.ImportedLibraries(); program.Machine != elf.EM_AARCH64 || len(libraries) > 0 {
		t.Errorf("%v, linked with %q", program.Machine, libraries)
	}
	for _, name := range unitFiles {
		name = "lib/systemd/system/" + name
		wantEqual(t, name, inTarball[name], page(t, filepath.Base(name)))
		wantEqual(t, name+" in the package", inDeb["./usr/"+name], strings.ReplaceAll(inTarball[name], "/usr/local/bin/flowctl", "/usr/bin/flowctl"))
	}
	for _, name := range []string{"share/man/man1/flowctl.1.gz", "share/bash-completion/completions/flowctl", "share/doc/flowctl/changelog.gz", "share/doc/flowctl/README.md"} {
		if text := inTarball[name]; text == "" || text != inDeb["./usr/"+name] {
			t.Errorf("%s has %d bytes, and %d in the package", name, len(text), len(inDeb["./usr/"+name]))
		}
	}
	if text := inDeb["./usr/share/doc/flowctl/copyright"]; !strings.HasPrefix(text, "MIT License") || strings.Count(text, "\n-- ") < 8 {
		t.Errorf("copyright: %s", text)
	}
}

func readTar(t *testing.T, data []byte) map[string]string {
	t.Helper()
	files := make(map[string]string)
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		must(t, err)
		files[header.Name] = string(get(io.ReadAll(r))(t))
	}
}

// go install in a clone of a tag knows the tag.
func TestVersion_OfAClone(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sh", "-ec", `git init -q; git add -A; git -c user.name=t -c user.email=t@t.example commit -qm t; git tag v1.2.3; go install .; bin/flowctl version`)
	cmd.Dir = clone(t)
	cmd.Env = append(os.Environ(), "GOBIN="+filepath.Join(cmd.Dir, "bin"), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "flowctl v1.2.3 (go1") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	p := start(t, runArgs(writePipeline(t, shell("a", "exec sleep 300"), shell("b", "exec sleep 300"))), runsIn(dir))
	p.waitReady()
	for _, id := range []string{"guest", "$(touch " + dir + "/evil)"} { // an id is shown to whoever presses Tab
		cmd := exec.Command(get(os.Executable())(t))
		cmd.Env = append(baseEnv(), "FLOWCTL_ENDPOINT="+p.endpoint(), "FLOWCTL_COMPONENT_ID="+id, roleVar+"="+actorRole(t, role{Dialect: "v1", End: "registered"}))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	const script = `source ./flowctl.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _flowctl "$0" "${@: -1}" "${@: -2:1}"; echo "${COMPREPLY[@]}"`
	for line, want := range map[string]string{
		"flowctl re": "restart reload", "flowctl help s": "stop sandbox", "flowctl run -un": "-unhealthy-timeout -until", "flowctl -un": "-unhealthy-timeout -until",
		"flowctl server -db": "-db-path", "flowctl restart ": "a b", "flowctl list ": "a b guest", "flowctl logs -f ": "a b", "flowctl logs -n ": "", "flowctl list -pipeline te": "test", "flowctl reload te": "test",
		"flowctl run ": "", "flowctl run -f ": "", "flowctl run p.json -- -": "",
	} {
		cmd := exec.Command("bash", append([]string{"-c", script, flowctlProgram()}, strings.Split(line, " ")...)...)
		cmd.Env = append(baseEnv(), "XDG_RUNTIME_DIR="+dir)
		out, err := cmd.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%q: %v, %q, want %q", line, err, got, want)
		}
	}
	if _, err := os.Stat(dir + "/evil"); err == nil {
		t.Error("an id has been run")
	}
	p.stop()
}
