//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// More of what TestSystemd runs: whose sockets are whose, and what systemd is told of a failure.

// sockets installs flowctl.socket for u with lines in the place of its own ListenStream=.
func (u *unit) sockets(name, lines string) {
	u.t.Helper()
	socket := get(os.ReadFile("flowctl.socket"))(u.t)
	u.write(u.t, "/etc/systemd/system/"+name+".socket", strings.Replace(string(socket), "ListenStream=127.0.0.1:8080", lines, 1))
	u.run(u.t, "systemctl", "daemon-reload")
	u.run(u.t, "systemctl", "start", name+".socket")
	u.t.Cleanup(func() { _, _ = u.try("systemctl", "stop", name+".socket") })
}

// All sockets are served, of each kind. What registers by them is known again after a restart.
func testUnitSocket(t *testing.T, l *lab) {
	u := l.install(t, "socket", []Component{actor("a", role{Dialect: "v1", Environ: true}), shell("fds", "for f in /proc/self/fd/*; do readlink $f; done; exec sleep 1000")}, "", "")
	u.sockets("socket", "ListenStream=/run/socket-plane\nListenStream=[::1]:8180\nListenStream=127.0.0.1:8180\n")
	register := func(endpoint, id string) {
		t.Helper()
		if out, err := l.try("env", "FLOWCTL_ENDPOINT="+endpoint, "FLOWCTL_COMPONENT_ID="+id, roleVar+`={"Dialect":"v1","End":"registered"}`, "/lab/actor"); err != nil {
			t.Errorf("%s by %s: %v\n%s", id, endpoint, err, out)
		}
	}
	register("127.0.0.1:8180", "early") // a component of another unit comes first, and dials once
	u.is("ActiveState", "active")
	u.logged(`env "FLOWCTL_ENDPOINT=127.0.0.1:8180"`, "COMPONENT=a")
	register("[::1]:8180", "six")
	register("unix:///run/socket-plane", "file")
	for _, r := range u.journal("SYSLOG_IDENTIFIER=fds") {
		if strings.HasPrefix(r.text("MESSAGE"), "socket:") {
			t.Errorf("a component has a socket of flowctl's")
		}
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for _, endpoint := range []string{"127.0.0.1:8180", "[::1]:8180"} {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					register(endpoint, "other") // nobody is refused while flowctl is restarted
				}
			}
		})
	}
	l.run(t, "systemctl", "restart", u.name)
	close(stop)
	wg.Wait()
	out, _ := l.try("/lab/flowctl", "list", "-e", "127.0.0.1:8180")
	for _, id := range []string{"early", "six", "file", "other"} {
		if !strings.Contains(out, "\n"+id+" (not in the pipeline) ") {
			t.Errorf("%s is not known after a restart:\n%s", id, out)
		}
	}
	wrong := func(what, code, why string) {
		t.Helper()
		if _, err := l.try("systemctl", "restart", u.name); err == nil {
			t.Errorf("%s is not refused", what)
		}
		wantEqual(t, what+": ExecMainStatus", u.show("ExecMainStatus"), code)
		u.logged(why)
	}
	const drop = "/etc/systemd/system/socket.service.d/wrong.conf"
	l.write(t, drop, "[Service]\nRestart=no\nExecStart=\nExecStart=/lab/flowctl run /etc/flowctl/socket.json -control-plane-port 0\n")
	l.run(t, "systemctl", "daemon-reload")
	wrong("a port beside a passed socket", "2", "-control-plane-port 0: systemd has passed a socket named control-plane")
	l.write(t, drop, "[Service]\nRestart=no\nSockets=socket-other.socket\n")
	u.sockets("socket-other", "ListenStream=127.0.0.1:8181\nService=socket.service\nFileDescriptorName=web")
	wrong("a socket of another name", "3", `systemd has passed a socket named "web", which nobody would serve: its FileDescriptorName= must be control-plane`)
	l.run(t, "systemctl", "stop", "socket-other.socket")
	u.sockets("socket-other", "ListenSequentialPacket=/run/socket-packets\nService=socket.service\n")
	wrong("a socket of packets", "3", `is of the network "unixpacket": it must be tcp or unix`)
}

// Root finds a unit whose socket is anywhere: it asks at that of its operators.
func testUnitSocketElsewhere(t *testing.T, l *lab) {
	for name, address := range map[string]string{"elsewhere-path": "/run/plane-elsewhere", "elsewhere-abstract": "@plane-elsewhere"} {
		u := l.install(t, name, []Component{shell("a", "exec sleep 1000")}, "", "")
		u.sockets(name, "ListenStream="+address)
		u.start()
		if out := l.run(t, "env", "RUNTIME_DIRECTORY=/run/"+name, "/lab/flowctl", "list", "-pipeline", name); !strings.HasPrefix(out, name+": 1 of 1 ready") {
			t.Errorf("%s: %s", address, out)
		}
	}
}

// A job of another service tells systemd nothing, and stops by SIGHUP.
func testUnitInherited(t *testing.T, l *lab) {
	u := l.install(t, "inherited", []Component{shell("a", "kill -HUP $PPID; exec sleep 300")}, "", "NotifyAccess=all\nExecStart=\nExecStart=/bin/sh /lab/runner\n")
	l.write(t, "/lab/runner", "systemd-notify --ready --status=running\n/lab/flowctl run /etc/flowctl/inherited.json -control-plane-port 0\necho job ended $?\nexec sleep 1000\n")
	u.start()
	u.logged("job ended 0")
	u.logged("stop requested signal=hangup")
	u.logged("NOTIFY_SOCKET is another process's: systemd is told nothing, and SIGHUP stops service=" + u.mainPID())
	wantEqual(t, "SubState StatusText", u.show("SubState")+" "+u.show("StatusText"), "running running")
}

// Before version 248 systemd does not say whom it has started: its parent tells.
func testUnitOldSystemd(t *testing.T, l *lab) {
	u := l.install(t, "old", []Component{shell("a", "exec sleep 300")}, "", "ExecStart=\nExecStart=/usr/bin/env -u SYSTEMD_EXEC_PID /lab/flowctl run /etc/flowctl/old.json -control-plane-port 0\n")
	u.start()
	wantEqual(t, "StatusText", u.show("StatusText"), "1 of 1 ready")
	l.run(t, "systemctl", "kill", "--kill-who=main", "-s", "HUP", u.name)
	u.logged("reloaded")
}

// The last that systemd is told says why flowctl has failed, and the journal what helps in a unit.
func testUnitWhy(t *testing.T, l *lab) {
	l.write(t, "/etc/flowctl/private", "hush\n")
	l.run(t, "chmod", "600", "/etc/flowctl/private")
	const start = "-control-plane-port 0 "
	ok := shell("api", "exec sleep 300")
	secret := changed(ok, func(c *Component) { c.EnvFiles = map[string]string{"TOKEN": "/etc/flowctl/private"} })
	for name, tt := range map[string]struct {
		c              Component
		args           string
		code           int
		status, advice string
	}{
		"file":   {changed(ok, func(c *Component) { c.Inputs = []string{"nobody"} }), start, exitUsage, `failed: /etc/flowctl/why-file.json:1:`, ""},
		"flag":   {ok, start + "-until never", exitUsage, `failed: -until "never": it must be stopped, ready or done`, ""},
		"plane":  {ok, "-control-plane-address 192.0.2.1", exitPlane, `failed: -control-plane-address "192.0.2.1": it is no address of this machine`, ""},
		"secret": {secret, start, exitFailed, "failed: api: env_files.TOKEN: open /etc/flowctl/private: permission denied", unitAccess},
		"folder": {changed(ok, func(c *Component) { c.WorkingDir = "/root" }), start, exitFailed, `failed: api: cannot enter its working_dir "/root": permission denied`, unitAccess},
		"write":  {shell("api", "echo x >/srv/out"), start, exitFailed, "failed: api: exit status 2", unitAccess},
		"logs":   {ok, start + "-log-dir /srv/logs", exitUsage, "failed: -log-dir: mkdir /srv/logs: read-only file system", unitAccess},
		"state":  {ok, start + "-db-path /srv/state.json -until ready", exitOK, "", unitAccess},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := l.install(t, "why-"+name, []Component{tt.c}, tt.args, "Restart=no\n")
			if _, err := l.try("systemctl", "start", u.name); (err == nil) != (tt.code == exitOK) {
				t.Errorf("start: %v", err)
			}
			u.is("ExecMainStatus", fmt.Sprint(tt.code))
			if got := u.show("StatusText"); !strings.HasPrefix(got, tt.status) || strings.Contains(got, "\n") {
				t.Errorf("StatusText=%s, want %s", got, tt.status)
			}
			if tt.advice != "" {
				u.logged(tt.advice)
			}
		})
	}
}

// What nobody can run is no matter of the unit's user.
func TestService_HintForAProgram(t *testing.T) {
	t.Parallel()
	plain := writeFile(t, filepath.Join(t.TempDir(), "plain"), "#!/bin/sh\n")
	p := start(t, runArgs(writePipeline(t, Component{ID: "a", Command: []string{plain}, Register: new(false)})), asService)
	p.exit(exitFailed)
	p.has(p.stderr, "it is not executable (chmod +x)")
	p.hasNot(p.stderr, unitAccess)
}

// A container engine that is not up yet is waited for by starting again.
func testUnitEngine(t *testing.T, l *lab) {
	l.write(t, "/lab/engine", "#!/bin/sh\necho 'Cannot connect to the daemon. Is it running?' >&2; exit 1\n")
	l.run(t, "chmod", "755", "/lab/engine")
	u := l.install(t, "engine", []Component{{ID: "a", Image: "demo:1"}}, "-control-plane-port 0 -orchestrator container -engine /lab/engine", "")
	if out, err := l.try("systemctl", "start", u.name); err == nil {
		t.Errorf("start succeeds: %s", out)
	}
	u.restarted()
	u.logged("code=exited, status=3")
}

// Where the socket for notifications is another process's it gets nothing, and SIGHUP is a terminal's.
func TestNotify_OfAnotherProcess(t *testing.T) {
	t.Parallel()
	for name, told := range map[string]option{
		"another's": withEnv("SYSTEMD_EXEC_PID=1"), "empty": withEnv("SYSTEMD_EXEC_PID="), "not told": afterCommand("unset SYSTEMD_EXEC_PID;"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(writePipeline(t, shell("a", "exec sleep 300"))), notifySocketOf(t, filepath.Join(shortDir(t), "notify")), withEnv("WATCHDOG_USEC=2000"), told)
			p.waitReady()
			p.signal(syscall.SIGHUP)
			p.exit(exitOK)
			wantEqual(t, "told", p.notified.String(), "")
			wantEqual(t, "said", strings.Count(p.stderr.String(), "NOTIFY_SOCKET is another process's"), 1)
		})
	}
}
