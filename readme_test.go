//go:build linux

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// The tests of this file do what README.md and the pages in docs/ say, with the commands
// and the files as they stand there.

// block is a fenced piece of a page.
type block struct {
	language, text string
	before         string // the last line of prose
}

// page reads README.md or one of docs/.
func page(t *testing.T, name string) string {
	t.Helper()
	data := get(os.ReadFile(name))(t)
	return string(data)
}

// section returns the blocks under a heading of a page, up to the next of its level.
func section(t *testing.T, name, heading string) []block {
	t.Helper()
	_, text, found := strings.Cut(page(t, name), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("%s has no section %q", name, heading)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	return blocks(text)
}

func blocks(text string) []block {
	var out []block
	var prose string
	in := false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "```") && in:
			in = false
		case in:
			out[len(out)-1].text += line
		case strings.HasPrefix(line, "```"):
			in = true
			out = append(out, block{language: strings.TrimSpace(line[3:]), before: prose})
		case strings.TrimSpace(line) != "":
			prose = line
		}
	}
	return out
}

// typed is a command of a console with the lines that it prints. An interrupt, of the
// one that still runs, has none.
type typed struct {
	command string
	lines   []string
	runs    bool // it goes on until it is interrupted
}

func typedIn(text string) []typed {
	var out []typed
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		rest, interrupt := strings.CutPrefix(line, "^C")
		command, prompt := strings.CutPrefix(line, "$ ")
		switch {
		case prompt:
			out = append(out, typed{command: command, runs: strings.HasPrefix(command, "bin/flowctl -f ")})
		case interrupt:
			out = append(out, typed{lines: []string{rest}})
		case line != "...":
			out[len(out)-1].lines = append(out[len(out)-1].lines, line)
		}
	}
	return out
}

var (
	amounts = regexp.MustCompile(`(\d+(\.\d+)?(ns|µs|ms|m|s)?)+`)
	spaces  = regexp.MustCompile(` +`)
)

// shape is a text without what differs from run to run: numbers and times, and the
// width of a column.
func shape(text string) string {
	return spaces.ReplaceAllString(amounts.ReplaceAllString(text, "0"), " ")
}

// newcomer is who follows a page, in a folder of their own and a bare environment.
type newcomer struct {
	t      *testing.T
	folder string
	env    []string
	screen *transcript // of what runs, nil for nothing
	cmd    *exec.Cmd
	done   chan struct{}
}

func newNewcomer(t *testing.T, folder string) *newcomer {
	n := &newcomer{t: t, folder: folder, env: []string{"XDG_RUNTIME_DIR=" + t.TempDir()}}
	for _, entry := range os.Environ() {
		// Where Go and npm find their modules is the machine's own.
		if name, _, _ := strings.Cut(entry, "="); name == "PATH" || name == "HOME" || strings.HasPrefix(name, "NODE_") ||
			strings.HasPrefix(strings.ToLower(name), "npm_") || strings.HasPrefix(name, "GO") && name != "GORACE" {
			n.env = append(n.env, entry)
		}
	}
	t.Cleanup(func() {
		if n.cmd != nil {
			_ = syscall.Kill(-n.cmd.Process.Pid, syscall.SIGKILL)
			<-n.done
		}
	})
	return n
}

func (n *newcomer) command(script string) *exec.Cmd {
	cmd := exec.Command("sh", "-e", "-c", script)
	cmd.Dir, cmd.Env = n.folder, n.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run runs a script to its end, which has to be a good one, and returns what it printed.
func (n *newcomer) run(script string) string {
	n.t.Helper()
	out, err := n.command(script).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s\n%v\n%s", script, err, out)
	}
	return string(out)
}

// launch leaves a script running.
func (n *newcomer) launch(script string) {
	n.t.Helper()
	n.screen, n.done = newTranscript(), make(chan struct{})
	n.cmd = n.command(script)
	n.cmd.Stdout, n.cmd.Stderr = n.screen, n.screen
	must(n.t, n.cmd.Start())
	go func(cmd *exec.Cmd, done chan struct{}) {
		_ = cmd.Wait() // how it ended is in its state
		close(done)
	}(n.cmd, n.done)
}

// interrupt is Ctrl-C, after which what runs ends with 0.
func (n *newcomer) interrupt() {
	n.t.Helper()
	_ = syscall.Kill(-n.cmd.Process.Pid, syscall.SIGINT)
	select {
	case <-n.done:
	case <-time.After(patience):
		n.t.Fatalf("it still runs\n%s", n.screen)
	}
	if code := n.cmd.ProcessState.ExitCode(); code != 0 {
		n.t.Errorf("%v\n%s", n.cmd.ProcessState, n.screen)
	}
	n.cmd = nil
}

// sees waits until what runs has printed a line of that shape.
func (n *newcomer) sees(line string) {
	n.t.Helper()
	for deadline := time.After(patience); ; {
		text, grown := n.screen.text()
		if strings.Contains(shape(text), shape(line)) {
			return
		}
		select {
		case <-grown:
			continue
		case <-n.done:
			if text := n.screen.String(); strings.Contains(shape(text), shape(line)) {
				return
			}
		case <-deadline:
		}
		n.t.Fatalf("the page has %q\n%s", line, n.screen)
	}
}

// follow does what a section says.
func (n *newcomer) follow(blocks []block) {
	n.t.Helper()
	for _, b := range blocks {
		switch b.language {
		case "sh":
			n.run(b.text)
		case "go", "python", "js":
			name := regexp.MustCompile("`([^`]+\\.(?:go|py|js))`").FindStringSubmatch(b.before)
			if name == nil {
				n.t.Fatalf("the page does not say where this goes: %q", b.before)
			}
			file := filepath.Join(n.folder, name[1])
			must(n.t, os.MkdirAll(filepath.Dir(file), 0o777))
			writeFile(n.t, file, b.text)
		case "console":
			for _, e := range typedIn(b.text) {
				n.enter(e)
			}
		}
	}
	if n.cmd != nil {
		n.interrupt()
	}
}

// enter does one of them and compares what comes with what the page has. A command that
// looks at what runs is repeated until it shows that; it may show other pipelines of
// this machine too.
func (n *newcomer) enter(e typed) {
	n.t.Helper()
	if e.runs {
		n.launch("exec " + e.command)
	} else if e.command == "" {
		n.interrupt()
	}
	if e.runs || e.command == "" {
		for _, line := range e.lines {
			n.sees(line)
		}
		return
	}
	for deadline := time.Now().Add(patience); ; {
		want := strings.Join(e.lines, "\n") + "\n"
		out, err := n.command(e.command).CombinedOutput()
		if n.cmd != nil && strings.Contains(shape(string(out)), shape(want)) || err == nil && shape(string(out)) == shape(want) {
			return
		}
		if n.cmd == nil || time.Now().After(deadline) {
			n.t.Fatalf("$ %s\n%v\n%s\nthe page has\n%s", e.command, err, out, want)
		}
	}
}

// clone copies this repository, as it is now, to a fresh folder.
func clone(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	folder := t.TempDir()
	for _, name := range strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		data, err := os.ReadFile(name)
		if os.IsNotExist(err) {
			continue // deleted, and not committed
		} else if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(folder, name)
		must(t, os.MkdirAll(filepath.Dir(to), 0o777))
		writeFile(t, to, string(data))
	}
	return folder
}

// From a clone to the demo, to a pipeline of three scripts, to components that
// register.
func TestReadmeNewcomer(t *testing.T) {
	t.Parallel()
	first := regexp.MustCompile(`(?m)^\$ (.*)$`).FindStringSubmatch(page(t, "README.md"))
	n := newNewcomer(t, clone(t))
	build, demo, found := strings.Cut(first[1], " && ")
	if !found {
		t.Fatalf("README begins with %q, which does not build and run", first[1])
	}
	n.run(build)
	n.launch("exec " + demo)
	n.sees(`msg="pipeline ready" components=3 `)
	n.interrupt()
	n.follow(section(t, "README.md", "Your first pipeline"))
	n.follow(section(t, "README.md", "A component in 20 lines"))
	n.follow(section(t, "README.md", "Events that flowctl moves"))
	n.follow(section(t, "docs/components.md", "In Go"))
}

// The components in each language, at all forms of the control plane's address, where this machine has what they need: Debian's
// packages for Python, and with FLOWCTL_LANGUAGES=must also npm, which asks its registry.
func TestReadmeLanguages(t *testing.T) {
	t.Parallel()
	must := os.Getenv("FLOWCTL_LANGUAGES") == "must"
	n := newNewcomer(t, clone(t))
	for i, variable := range n.env {
		if path, found := strings.CutPrefix(variable, "PATH="); found {
			n.env[i] = "PATH=/usr/bin:" + path // another python3 does not know those packages
		}
	}
	n.run("go build -o bin/ .")
	for _, b := range section(t, "README.md", "Your first pipeline") {
		if b.language == "sh" {
			n.run(b.text)
		}
	}
	programs := make(map[string][]string) // by language
	for _, tt := range []struct {
		language, needs string
		program         []string // nil for one that sends no metrics
	}{
		{"Go", "go version", []string{n.folder + "/first/count"}},
		{"Python", "python3 -c 'import grpc, grpc_tools.protoc'", []string{"python3", n.folder + "/first/count.py"}},
		{"Python, a sink of events", "python3 -c 'import grpc, grpc_tools.protoc'", nil},
		{"Node.js", "node --version && npm --version", []string{"node", n.folder + "/first/count.js"}},
	} {
		t.Run(tt.language, func(t *testing.T) {
			n.t = t
			out, err := n.command(tt.needs).CombinedOutput()
			switch {
			case err != nil && must:
				t.Fatalf("%s: %v\n%s", tt.needs, err, out)
			case err != nil || tt.language == "Node.js" && !must:
				t.Skip("not on this machine")
			}
			n.follow(slices.DeleteFunc(section(t, "docs/components.md", "In "+tt.language), func(b block) bool {
				return tt.language == "Go" && b.language == "console" // TestReadmeNewcomer has those
			}))
			if tt.program != nil {
				programs[tt.language] = tt.program
			}
		})
	}
	atAddress := func(t *testing.T, address string) {
		clientsPastProxy(t, address, programs)
		clientsSurviveRestart(t, address, programs)
	}
	planeAddresses(t, atAddress)
	t.Run("localhost", func(t *testing.T) { t.Parallel(); atAddress(t, "localhost") })
}

// clients is a pipeline of programs, which get more variables.
func clients(t *testing.T, register bool, programs map[string][]string, vars ...string) string {
	var components []Component
	for id, program := range programs {
		command := slices.Concat([]string{"env", "PATH=/usr/bin:" + os.Getenv("PATH")}, vars, program)
		components = append(components, Component{ID: id, Command: command, Register: &register, WorkingDir: t.TempDir()})
	}
	return writePipeline(t, components...)
}

// awaitBeats waits until each of programs is healthy by its own name at the control plane of p, and has sent metrics with
// more records than before, which it then returns.
func awaitBeats(t *testing.T, p *process, programs map[string][]string, before map[string]int) map[string]int {
	plane, records := dialPlane(t, p.endpoint()), make(map[string]int)
	eventually(t, "heartbeats of all", func() bool {
		time.Sleep(50 * time.Millisecond) // they come once a second
		out, err := plane.v1.ListComponents(t.Context(), &flowctlv1.ListComponentsRequest{})
		if err != nil {
			t.Fatalf("%v\n%s", err, p)
		}
		for _, c := range out.Components {
			if n, err := strconv.Atoi(c.Metrics["records"]); err == nil && n > before[c.Component.Id] && programs[c.Component.Id] != nil {
				records[c.Component.Id] = n
			}
		}
		return len(records) == len(programs)
	})
	return records
}

// What sends no id is known by its process, and a proxy that is nowhere is not asked.
func clientsPastProxy(t *testing.T, address string, programs map[string][]string) {
	file := clients(t, true, programs, "FLOWCTL_COMPONENT_ID=")
	for _, past := range []string{"", "localhost.example,.example.org"} {
		p := start(t, runArgs(file, "-control-plane-address", address, "-heartbeat-ttl", "3s"),
			withEnv("http_proxy=http://127.0.0.1:9", "https_proxy=http://127.0.0.1:9", "grpc_proxy=http://127.0.0.1:9", "no_proxy="+past))
		p.waitReady()
		awaitBeats(t, p, programs, nil)
		p.stop()
	}
}

// They go on when flowctl server is started anew, with its state and without.
func clientsSurviveRestart(t *testing.T, address string, programs map[string][]string) {
	args := []string{"server", "-control-plane-address", address}
	if !strings.HasPrefix(address, "unix:") {
		args = append(args, "-control-plane-port", freePort(t))
	}
	kept, forgotten := slices.Concat(args, []string{"-db-path", t.TempDir() + "/state.json"}), slices.Concat(args, []string{"-no-persistence"})
	server := start(t, kept)
	launch(t, clients(t, false, programs, "FLOWCTL_ENDPOINT="+server.endpoint(), "FLOWCTL_HEARTBEAT_INTERVAL=100ms")).waitReady()
	records := awaitBeats(t, server, programs, nil)
	for _, again := range [][]string{kept, forgotten} {
		server.stop()
		server = start(t, again)
		records = awaitBeats(t, server, programs, records)
	}
	server.stop()
}

// README is a first page.
func TestReadmeSize(t *testing.T) {
	t.Parallel()
	const most = 10_000
	if size := len(page(t, "README.md")); size > most {
		t.Errorf("README.md has %d bytes, %d at most: docs/ is the place for more", size, most)
	}
}

// anchor is how the heading of a page is linked to.
func anchor(heading string) string {
	heading = strings.ToLower(strings.TrimSpace(strings.TrimLeft(heading, "#")))
	return strings.ReplaceAll(regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(heading, ""), " ", "-")
}

// Links of the pages to files here, and to headings in them, lead somewhere, and README
// leads to every page.
func TestReadmeLinks(t *testing.T) {
	t.Parallel()
	pages := get(filepath.Glob("docs/*.md"))(t)
	readme := page(t, "README.md")
	for _, name := range pages {
		if !strings.Contains(readme, "]("+name+")") {
			t.Errorf("README.md does not link to %s", name)
		}
	}
	fenced := regexp.MustCompile("(?ms)^```.*?^```$")
	link := regexp.MustCompile(`\]\(([^)\s]*)\)`)
	for _, name := range append(pages, "README.md", "CHANGELOG.md") {
		for _, m := range link.FindAllStringSubmatch(fenced.ReplaceAllString(page(t, name), ""), -1) {
			path, fragment, _ := strings.Cut(m[1], "#")
			if strings.Contains(path, "://") {
				continue
			}
			target := name
			if path != "" {
				target = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", name, m[1], err)
				continue
			}
			if fragment == "" {
				continue
			}
			found := false
			for line := range strings.Lines(fenced.ReplaceAllString(page(t, target), "")) {
				found = found || strings.HasPrefix(line, "#") && anchor(line) == fragment
			}
			if !found {
				t.Errorf("%s links to %s: there is no such heading", name, m[1])
			}
		}
	}
}

// A job of CI fails when the tests do, or a component, and leaves its logs. It is long because
// it is a table, and the program that it runs.
func TestReadmeCI(t *testing.T) {
	t.Parallel()
	var lines, steps, short []string
	for _, b := range blocks(page(t, "docs/ci.md")) {
		for line := range strings.Lines(b.text) {
			line = strings.TrimSpace(line)
			if step, found := strings.CutPrefix(line, "- run: "); found {
				steps = append(steps, step)
			} else if b.language == "sh" {
				lines = append(lines, line)
			}
		}
	}
	for _, b := range section(t, "README.md", "CI in five lines") {
		for line := range strings.Lines(b.text) {
			if step, found := strings.CutPrefix(strings.TrimSpace(line), "- run: "); found {
				short = append(short, step)
			}
		}
	}
	if !slices.Equal(short, steps) {
		t.Errorf("README.md has the steps %q, docs/ci.md %q", short, steps)
	}
	if len(lines) != 3 || len(steps) != 2 {
		t.Fatalf("docs/ci.md has the lines %q and the steps %q", lines, steps)
	}
	bin := t.TempDir()
	// What the first step downloads is this.
	n := newNewcomer(t, clone(t))
	n.env = append(n.env, "GOBIN="+bin)
	n.run(strings.Replace(steps[0], "github.com/withobsrvr/flowctl@latest", ".", 1))

	const neverReady = "exec sleep 301"
	for _, tt := range []struct {
		name, line, component, test string
		code                        int
		want                        string // in what it prints
	}{
		{"the job, tests pass", steps[1], "exec sleep 300", "", 0, "ok  \te2e/e2e"},
		{"the job, tests fail", steps[1], "exec sleep 300", `t.Fatal("not as it should be")`, 1, "not as it should be"},
		{"the job, a component fails", steps[1], "while [ ! -e fail ]; do sleep 0.05; done; echo no disk; exit 3",
			`os.WriteFile("../fail", nil, 0o600); select {}`, 1, "flowctl: component a failed: exit status 3"},
		{"tests pass", lines[0], "exec sleep 300", "", 0, "ok  \te2e/e2e"},
		{"tests fail", lines[0], "exec sleep 300", "t.Fail()", 1, "FAIL"},
		{"comes up", lines[1], "exec sleep 300", "", 0, `msg="pipeline ready"`},
		{"does not come up", lines[1], neverReady, "", exitNotReady, "flowctl: component a failed: not ready within"},
		{"runs to its end", lines[2], "echo done", "", 0, `"line":"done"`},
		{"does not run to its end", lines[2], "sleep 0.2; exit 3", "", 1, "exit status 3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			n := newNewcomer(t, dir)
			for i, variable := range n.env {
				if path, found := strings.CutPrefix(variable, "PATH="); found {
					n.env[i] = "PATH=" + bin + ":" + path
				}
			}
			writeFile(t, filepath.Join(dir, "go.mod"), "module e2e\n")
			must(t, os.Mkdir(filepath.Join(dir, "e2e"), 0o700))
			writeFile(t, filepath.Join(dir, "e2e", "e2e_test.go"), `package e2e

import (
	"net"
	"os"
	"testing"
)

func TestPipeline(t *testing.T) {
	conn, err := net.Dial("tcp", os.Getenv("FLOWCTL_ENDPOINT"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	`+tt.test+`
}
`)
			c := shell("a", tt.component)
			if tt.component == neverReady {
				c.HealthCheck, c.StartTimeout = "exec:false", Duration(time.Second)
			}
			n.run("mv " + writePipeline(t, c) + " pipeline.json")
			cmd := n.command(tt.line)
			out, _ := cmd.CombinedOutput() // its end is in its state
			if code := cmd.ProcessState.ExitCode(); code != tt.code || !strings.Contains(string(out), tt.want) {
				t.Errorf("$ %s\nexit %d, want %d, and %q\n%s", tt.line, code, tt.code, tt.want, out)
			}
			_, err := os.Stat(filepath.Join(dir, "logs", "a.log"))
			if logs := strings.Contains(tt.line, "-log-dir logs"); logs != (err == nil) {
				t.Errorf("logs: %v", err)
			}
		})
	}
}

// The page about a database: the files as they stand there, a sandbox, a run that uses it, and a change
// of the program meanwhile.
func TestReadmeServices(t *testing.T) {
	t.Parallel()
	flowctl, bin := plainFlowctl(), filepath.Dir(databaseProgram(t, "initdb"))
	dir := t.TempDir()
	port := freePort(t)
	for _, b := range blocks(page(t, "docs/services.md")) {
		name, _, found := strings.Cut(strings.TrimPrefix(b.before, "`"), "`")
		if !found || !strings.HasPrefix(b.before, "`") {
			continue
		}
		writeFile(t, filepath.Join(dir, name), strings.ReplaceAll(b.text, "5433", port))
	}
	must(t, os.Mkdir(filepath.Join(dir, "run"), 0o777))
	if os.Getuid() == 0 { // PostgreSQL does not run as root
		if out, err := exec.Command("chown", "-R", "postgres", dir).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		must(t, os.Chmod(filepath.Dir(dir), 0o711))
	}
	must(t, os.Chmod(filepath.Join(dir, "run"), 0o700))
	command := func(args ...string) *process {
		argv := slices.Concat(asPostgres(t), []string{flowctl, args[0], "-control-plane-port", "0"}, args[1:])
		return start(t, nil, inFolder(dir), withEnv("XDG_RUNTIME_DIR="+filepath.Join(dir, "run"), "PATH="+bin+":"+os.Getenv("PATH")),
			func(p *process) { p.cmd.Path, p.cmd.Args = get(exec.LookPath(argv[0]))(t), argv })
	}
	box := command("sandbox", "-env-file", "db.env")
	box.waitReady()
	p := command("run", "-env-file", "db.env", "-watch")
	p.waitErr("the services are those of the sandbox that runs")
	p.waitOut("feed | wrote event 2\n")
	feed := filepath.Join(dir, "feed.sh")
	must(t, os.WriteFile(feed, []byte(strings.ReplaceAll(string(get(os.ReadFile(feed))(t)), "wrote", "stored")), 0o600))
	p.waitErr(`msg="its files have changed, restarting" component=feed`)
	p.waitOut("feed | stored event 1\n")
	p.stop()
	box.stop()
	p = command("run", "-env-file", "db.env", "--", "psql", "-Atc", "select count(*) > 2 from events")
	p.exit(exitOK)
	wantEqual(t, "what the database keeps", p.stdout.String(), "t\n")
	p.has(p.stderr, "msg=ended component=files ", "msg=ready component=db ", "msg=ended component=schema ", "msg=started component=feed ")
}

// The page for who comes from the predecessor: each converter that this machine has, and with FLOWCTL_LANGUAGES=must all of
// them; what check says then; a file with several documents; and paths.
func TestReadmeMigrating(t *testing.T) {
	t.Parallel()
	must := os.Getenv("FLOWCTL_LANGUAGES") == "must"
	const name = "docs/migrating.md"
	n, bin := newNewcomer(t, t.TempDir()), t.TempDir()
	if err := os.Symlink(plainFlowctl(), filepath.Join(bin, "flowctl")); err != nil {
		t.Fatal(err)
	}
	n.env = append(n.env, "PATH="+bin+":/usr/bin:"+os.Getenv("PATH")) // another python3 may lack yaml
	has := func(needs string) bool {
		out, err := n.command(needs).CombinedOutput()
		if err != nil && must {
			t.Fatalf("%s: %v\n%s", needs, err, out)
		}
		return err == nil
	}
	if !has("python3 -c 'import yaml'") {
		t.Skip("no python3 with yaml here")
	}
	from, to := filepath.Join(n.folder, "flow.yaml"), filepath.Join(n.folder, "flow.json")
	converters := slices.DeleteFunc(section(t, name, "Turn it into JSON"), func(b block) bool { return b.language != "sh" })
	wantEqual(t, "the first command", converters[0].text, yamlCommand("flow.yaml", "flow.json")+"\n")
	yaml := blocks(page(t, name))[0].text
	writeFile(t, from, strings.Replace(yaml, "yes", `"yes"`, 1)) // which they do not agree on
	var first any
	for _, b := range converters {
		program, _, _ := strings.Cut(b.text, " ")
		if !has("command -v " + program) {
			continue
		}
		n.run(b.text)
		var got any
		if err := json.Unmarshal(get(os.ReadFile(to))(t), &got); err != nil || first != nil && !reflect.DeepEqual(got, first) {
			t.Errorf("%s%v\ngot  %v\nwant %v", b.text, err, got, first)
		}
		first = got
	}
	writeFile(t, from, yaml)
	n.run(converters[0].text)
	n.prints(section(t, name, "What YAML takes for something else"), "")
	n.prints(section(t, name, "Check it"), "")

	writeFile(t, from, yaml+"---\n"+yaml)
	if out, err := n.command(converters[0].text).CombinedOutput(); err == nil || !strings.Contains(string(out), "expected a single document in the stream") {
		t.Errorf("of two documents: %v\n%s", err, out)
	}
	n.run(section(t, name, "Several documents in a file")[0].text + "cmp flow-1.json flow-2.json")

	for _, folder := range []string{"bin", "pipelines"} {
		if err := os.Mkdir(filepath.Join(n.folder, folder), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	writeProgram(t, filepath.Join(n.folder, "bin", "sink"), "#!/bin/sh\n")
	writeFile(t, filepath.Join(n.folder, "pipelines", "flow.json"),
		`{"apiVersion": "flowctl/v1", "kind": "Pipeline", "metadata": {"name": "transfers"}, "spec": {"sinks": [{"id": "store", "command": ["./bin/sink"]}]}}`)
	n.prints(section(t, name, "Paths"), "/srv/transfers")
}

// prints does the commands of consoles, which may fail, and compares what they print. The page has the folder as place.
func (n *newcomer) prints(blocks []block, place string) {
	n.t.Helper()
	for _, b := range slices.DeleteFunc(blocks, func(b block) bool { return b.language != "console" }) {
		for _, e := range typedIn(b.text) {
			out, _ := n.command(e.command).CombinedOutput()
			got := string(out)
			if place != "" {
				got = strings.ReplaceAll(got, n.folder, place)
			}
			wantEqual(n.t, e.command, got, strings.Join(e.lines, "\n")+"\n")
		}
	}
}
