//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// With -watch, a changed program or argument restarts its component, a changed pipeline file is reloaded,
// and what fails waits for a change.
func TestWatch_FilesThatHaveChanged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program := writeProgram(t, filepath.Join(dir, "program"), "#!/bin/sh\necho program 1\nexec sleep 300\n")
	script, secret := writeFile(t, filepath.Join(dir, "script"), "echo script 1; exec sleep 300\n"), writeFile(t, filepath.Join(dir, "secret"), "one")
	a, b := plainProgram("a", program), plainProgram("b", "/bin/sh")
	a.Register, b.Register, b.Args = new(false), new(false), []string{script}
	c := shell("c", "echo secret $SECRET; exec sleep 300")
	c.EnvFiles = map[string]string{"SECRET": secret}
	file := writePipeline(t, a, b, c)
	p := launch(t, file, "-watch")
	p.waitReady()
	p.has(p.stdout, "program 1")
	stays := p.pid("c")

	replace := func(path, text string, mode os.FileMode) { // as compilers and editors do
		must(t, os.WriteFile(path+".new", []byte(text), mode))
		must(t, os.Rename(path+".new", path))
	}
	replace(program, "#!/bin/sh\necho program 2\nexec sleep 300\n", 0o700)
	p.waitOut("a | program 2\n")
	writeFile(t, script, "echo script 2; exit 3\n")
	p.waitOut("b | script 2\n")
	p.waitErr("msg=\"what a reload or restart brought has failed, the others go on\" component=b ")
	must(t, os.Remove(script))
	writeFile(t, script, "echo script 3; exec sleep 300\n")
	p.waitOut("b | script 3\n")
	if p.pid("c") != stays {
		t.Error("c was restarted, too")
	}
	writeFile(t, secret, "two")
	p.waitOut("c | secret two\n")
	rewrite(t, file, a, b, c, shell("d", "echo new; exec sleep 300"))
	p.waitOut("d | new\n")
	p.stop()

	if code, _, stderr := call(t, "run", file, "-watch", "-until", "ready"); code != exitUsage || !strings.Contains(stderr, "-watch goes on until it is stopped") {
		t.Errorf("-until: exit %d\n%s", code, stderr)
	}
}

// With -watch a component that fails at the start of the run ends nothing either.
func TestWatch_FailureEndsNothing(t *testing.T) {
	t.Parallel()
	script := writeFile(t, filepath.Join(t.TempDir(), "script"), "exit 4\n")
	a := plainProgram("a", "/bin/sh")
	a.Register, a.Args = new(false), []string{script}
	p := launch(t, writePipeline(t, a), "-watch")
	p.waitErr("failed=a")
	writeFile(t, script, "echo well; exec sleep 300\n")
	p.waitOut("a | well\n")
	p.waitReady()
	p.stop()
}
