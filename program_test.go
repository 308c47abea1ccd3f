//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A bare name is looked up in the component's own PATH, whoever sets that, and so is that of its check.
func TestRun_ProgramIsFoundInItsOwnPath(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "venv", "bin"), 0o700))
	for _, name := range []string{"tool", "ls"} {
		writeProgram(t, filepath.Join(dir, "venv", "bin", name), "#!/bin/sh\necho "+name+" of the venv in $1\n")
	}
	path := filepath.Join(dir, "venv", "bin") + ":" + os.Getenv("PATH")
	inFile := writeFile(t, filepath.Join(dir, "path"), path+"\n")
	file := writePipeline(t,
		Component{ID: "env", Command: []string{"tool", "env"}, Register: new(false), Env: map[string]string{"PATH": path}},
		Component{ID: "hides", Command: []string{"ls", "hides"}, Register: new(false), Env: map[string]string{"PATH": path}},
		Component{ID: "config", Command: []string{"tool", "config"}, Register: new(false), Config: map[string]any{"path": path}},
		Component{ID: "files", Command: []string{"tool", "files"}, Register: new(false), EnvFiles: map[string]string{"PATH": inFile}},
		Component{ID: "relative", Command: []string{"tool", "relative"}, Register: new(false), WorkingDir: dir, Env: map[string]string{"PATH": "venv/bin:" + os.Getenv("PATH")}},
		Component{ID: "checked", Command: []string{"sleep", "300"}, Register: new(false), Env: map[string]string{"PATH": path}, HealthCheck: "exec:tool checked"},
	)
	code, _, stderr := call(t, "check", "-strict", file)
	wantEqual(t, "check", fmt.Sprint(code, stderr), "0")
	p := launch(t, file)
	p.waitReady() // with the check
	p.waitOut("ls of the venv in hides\n")
	for _, id := range []string{"env", "config", "files", "relative"} {
		p.waitOut("tool of the venv in " + id + "\n")
	}
	p.stop()
}

// A program that flowctl's PATH has and the component's has not is not found.
func TestRun_ProgramIsNotFoundInFlowctlsPath(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, Component{ID: "a", Command: []string{"true"}, Register: new(false), Env: map[string]string{"PATH": "/nowhere"}})
	p := launch(t, file)
	p.exit(exitFailed)
	p.has(p.stderr, `flowctl: component a failed: cannot run "true": it is not found in PATH`)
}

// elfWithout returns a program of this machine whose loader is missing.
func elfWithout(t *testing.T, loader string) string {
	t.Helper()
	data := get(os.ReadFile("/bin/true"))(t)
	at := bytes.Index(data, []byte("/lib"))
	if at < 0 || !bytes.HasPrefix(data, []byte("\x7fELF")) {
		t.Skip("/bin/true names no loader")
	}
	end := at + bytes.IndexByte(data[at:], 0)
	if end-at < len(loader) {
		t.Skip("the name of its loader is short")
	}
	copy(data[at:end+1], loader+strings.Repeat("\x00", end+1-at-len(loader)))
	return writeProgram(t, filepath.Join(t.TempDir(), "program"), string(data))
}

// The kernel says "no such file" of a program that is there where its loader is not, of an interpreter too.
func TestRun_SaysThatALoaderIsMissing(t *testing.T) {
	t.Parallel()
	program := elfWithout(t, "/no/loader")
	script := writeProgram(t, filepath.Join(t.TempDir(), "script"), "#!"+program+"\n")
	for path, want := range map[string]string{
		program: `its loader, "/no/loader", does not exist: it was built for another system or C library`,
		script:  fmt.Sprintf("the interpreter that it names, %q, cannot be run: its loader, \"/no/loader\", does not exist", program),
	} {
		file := writePipeline(t, plainProgram("a", path))
		code, _, stderr := call(t, "check", file)
		if want := fmt.Sprintf("%s: warning: component a: command: cannot run %q: %s", file, path, want); code != exitOK || !strings.HasPrefix(stderr, want) {
			t.Errorf("exit %d\n%swant\n%s", code, stderr, want)
		}
		p := launch(t, file)
		p.exit(exitFailed)
		p.has(p.stderr, fmt.Sprintf("flowctl: component a failed: cannot run %q: %s", path, want))
	}
}

// The kernel takes 128 KiB of an argument or a variable, its name and a NUL included, and of all what the
// stack allows.
func TestRun_SaysWhatIsTooLargeForTheKernel(t *testing.T) {
	t.Parallel()
	program := func(fields ...func(*Component)) Component {
		c := plainProgram("a", "true")
		for _, f := range fields {
			f(&c)
		}
		return c
	}
	most := strings.Repeat("x", 128<<10-1) // with its NUL
	args := func(texts ...string) func(*Component) { return func(c *Component) { c.Args = texts } }
	env := func(value string) func(*Component) {
		return func(c *Component) { c.Env = map[string]string{"BIG": value} }
	}
	var many []string
	for range 20 {
		many = append(many, most)
	}
	secret := writeFile(t, filepath.Join(t.TempDir(), "secret"), most)
	for _, tt := range []struct {
		name string
		c    Component
		want string // "" for a program that can be run
	}{
		{"argument", program(args("y", most+"x")), "its argument 2 has 131072 bytes, and the kernel takes 131071 at most of one"},
		{"largest argument", program(args(most)), ""},
		{"variable", program(env(most[3:])), "the variable BIG has 131072 bytes, and the kernel takes 131071 at most of one"},
		{"largest variable", program(env(most[4:])), ""},
		{"file", program(func(c *Component) { c.EnvFiles = map[string]string{"KEY": secret} }), "the variable KEY has 131075 bytes"},
		{"all", program(args(many...)), "bytes in all, and the kernel takes 2097152 (a quarter of ulimit -s)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			file := writePipeline(t, tt.c)
			limit := limited("-s 8192")
			check := start(t, []string{"check", file}, limit)
			check.exit(exitOK)
			p := start(t, runArgs(file), limit)
			if tt.want == "" {
				p.exit(exitOK)
				wantEqual(t, "check", check.stderr.String(), "")
				return
			}
			p.exit(exitFailed)
			check.has(check.stderr, "warning: component a: command: cannot be run: ", tt.want)
			p.has(p.stderr, `level=WARN msg="check warns" component=a field=command`, `flowctl: component a failed: cannot run "true": `, tt.want)
		})
	}
}

func TestPastProxy(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ env, endpoint, want string }{
		{"", "127.0.0.1:80", ""},
		{"http_proxy=", "127.0.0.1:80", ""},
		{"http_proxy=p", "unix:///s", ""},
		{"http_proxy=p", "127.0.0.1:80", "no_proxy=127.0.0.1 NO_PROXY=127.0.0.1 no_grpc_proxy=127.0.0.1"},
		{"GRPC_PROXY=p", "[::1]:80", "no_proxy=::1 NO_PROXY=::1 no_grpc_proxy=::1"},
		{"HTTPS_PROXY=p no_proxy=a,b", "127.0.0.1:80", "no_proxy=a,b,127.0.0.1 NO_PROXY=a,b,127.0.0.1 no_grpc_proxy=a,b,127.0.0.1"},
		{"https_proxy=p NO_PROXY=a no_grpc_proxy=c", "h:80", "no_proxy=a,h NO_PROXY=a,h no_grpc_proxy=c,h"},
		{"https_proxy=p no_proxy=* NO_PROXY=h", "h:80", "no_proxy=* NO_PROXY=h no_grpc_proxy=*"},
	} {
		if got := strings.Join(pastProxy(strings.Fields(tt.env), tt.endpoint), " "); got != tt.want {
			t.Errorf("%s at %s: got %s, want %s", tt.env, tt.endpoint, got, tt.want)
		}
	}
}

// A path that is right in the folder where flowctl is started, and not in the file's, is told with the one to write.
func TestCheck_PathsAreRelativeToTheFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "bin"), 0o700))
	must(t, os.Mkdir(filepath.Join(dir, "pipelines"), 0o700))
	writeProgram(t, filepath.Join(dir, "bin", "mine"), "#!/bin/sh\n")
	c := changed(plainProgram("a", "./bin/mine"), func(c *Component) {
		c.Args = []string{"bin/none", "bin/mine", "mine", "../bin/mine", "--f=bin/mine", "/bin"}
	})
	file := filepath.Join(dir, "pipelines", "p.json")
	must(t, os.Rename(writePipeline(t, c, plainProgram("b", "sh", "./bin/mine")), file))
	check := start(t, []string{"check", file}, inFolder(dir))
	check.exit(exitOK)
	const arg = `"%sbin/mine" exists in the folder that flowctl was started in, but the component runs in %q: write "../bin/mine"`
	wantEqual(t, "what check says", strings.ReplaceAll(check.stderr.String(), file+": warning: component ", ""),
		fmt.Sprintf("a: command: cannot run %q: no such file or directory; there is one in the folder that flowctl was started in, but paths are relative to the pipeline file's: write \"../bin/mine\"\n",
			filepath.Join(filepath.Dir(file), "bin", "mine"))+
			fmt.Sprintf("a: args[1]: "+arg+"\nb: command[1]: "+arg+"\n", "", filepath.Dir(file), "./", filepath.Dir(file)))
}
