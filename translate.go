package main

// What translate does for each engine alike: what cannot be moved, the environment of a component there, the file of its
// control plane, and what it says on standard error. It needs no engine, and makes the same of the same file.

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	planeName = "flowctl" // of the control plane, among the ids of components
	doneName  = "done"    // of what ends once the pipeline is done
	planePort = 8080
	firstPort = 20001 // of those for HEALTH_PORT

	defaultStart = 30 * time.Second // as the flags of run
	defaultStop  = 10 * time.Second

	planeFilePath = "/etc/flowctl/pipeline.json"
	planeState    = "/state"
	imageProgram  = "/flowctl" // in the image of flowctl
)

// A translator knows one engine.
type translator struct {
	check     func(t *translation, f findings)               // reports what the pipeline as a whole cannot have there
	checkOne  func(t *translation, f findings, c *Component) // the same of a component
	translate func(t *translation) any                       // returns what goes to standard output, as JSON
	host      func(t *translation, id string) string         // where others reach a component
}

// translation is a pipeline on its way to another engine.
type translation struct {
	translator
	p        *Pipeline
	image    string            // of flowctl
	ports    map[string]string // HEALTH_PORT by id
	warnings []warning
	advice   []string // lines of a shell script
}

// read reads the pipeline of file. What cannot be moved is among the errors of the file.
func (t *translation) read(file string, env func(string) (string, bool)) error {
	var err error
	t.p, err = readPipeline(file, env, t.checkAll)
	if err != nil {
		return err
	}
	t.warnings = slices.Clone(t.p.Notes)
	t.chooseHealthPorts()
	for _, c := range t.p.components() {
		t.warnOfVariables(c)
	}
	return nil
}

// say writes the warnings, and then the advice.
func (t *translation) say(w io.Writer, file string) {
	for _, warning := range t.warnings {
		fmt.Fprintf(w, "%s: warning: %v\n", file, warning)
	}
	for _, line := range t.advice {
		fmt.Fprintln(w, line)
	}
}

func (t *translation) warn(c *Component, field, format string, args ...any) {
	t.warnings = append(t.warnings, warning{c.ID, field, fmt.Sprintf(format, args...)})
}

// checkAll reports what cannot be moved.
func (t *translation) checkAll(p *Pipeline, f findings) {
	t.p = p
	t.check(t, f)
	for _, c := range p.components() {
		if !f.sound(c) {
			continue
		}
		f.wrong(&c.Command, "cannot be moved: build an image that has the program, and name that by image")
		if c.TLS {
			f.wrong(&c.TLS, "cannot be moved yet: the control plane has no TLS there")
		}
		if !c.registers() && !c.Oneshot {
			f.wrong(&c.Register, "cannot be moved yet: a component that does not register")
			if !f.given(&c.Register) {
				f.wrong(c, "cannot be moved yet: a service that does not register, as one with \"register\": true does")
			}
		}
		if strings.EqualFold(c.ID, planeName) || strings.EqualFold(c.ID, doneName) {
			f.wrong(&c.ID, "%s is what flowctl calls something of its own there: choose another", quote(c.ID))
		}
		if why := c.healthPortFault(); why != "" {
			f.wrong(&c.HealthCheck, "%s", why)
		}
		if u := c.healthURL("1"); u != nil && u.User != nil {
			f.wrong(&c.HealthCheck, "has a password, which all who see the manifest could read")
		}
		t.checkOne(t, f, c)
	}
}

// chooseHealthPorts gives each component a HEALTH_PORT that no other one has, and that does not change with the others.
func (t *translation) chooseHealthPorts() {
	t.ports = make(map[string]string)
	taken := make(map[string]bool)
	for _, c := range t.p.components() {
		if port := fileEnv(c, "HEALTH_PORT"); port != "" {
			t.ports[c.ID], taken[port] = port, true
		}
	}
	for _, c := range t.p.components() {
		hash := fnv.New32a()
		_, _ = io.WriteString(hash, c.ID) // never fails
		for n := hash.Sum32(); t.ports[c.ID] == ""; n++ {
			if port := strconv.Itoa(firstPort + int(n%10000)); !taken[port] {
				t.ports[c.ID], taken[port] = port, true
			}
		}
	}
}

// variables returns the environment of c, whose control plane is at endpoint, without what comes from a file.
func (t *translation) variables(c *Component, endpoint string) map[string]string {
	port := t.ports[c.ID]
	vars := map[string]string{
		"COMPONENT_ID": c.ID, "SERVICE_ID": c.ID, "HEALTH_PORT": port, "HEALTH_ENDPOINT": "http://" + net.JoinHostPort("localhost", port) + "/health",
		"PYTHONUNBUFFERED": "1", heartbeatVar: "10000ms", // a third of the TTL of the control plane
		"GRPC_ENABLE_TXT_SERVICE_CONFIG": "false", // its look-up can keep a client waiting
	}
	maps.Copy(vars, c.configEnv())
	maps.Copy(vars, c.Env)
	for _, name := range fixedVars {
		delete(vars, name)
	}
	if d, err := time.ParseDuration(vars[heartbeatVar]); err == nil {
		vars["FLOWCTL_HEARTBEAT_INTERVAL_MS"] = strconv.FormatInt(d.Milliseconds(), 10)
	}
	for name, value := range map[string]string{
		"ENABLE_FLOWCTL": "true", "FLOWCTL_ENABLED": "true", "FLOWCTL_ENDPOINT": endpoint, "FLOWCTL_COMPONENT_ID": c.ID, "FLOWCTL_SERVICE_ID": c.ID,
	} {
		vars[name] = value
	}
	for name := range c.EnvFiles {
		delete(vars, name)
	}
	return vars
}

var (
	secretName    = pattern(`(?i)passw|secret|token|credential|(api|private|access)_?key`)
	passwordInURL = pattern(`://[^/\s:@]*:[^/\s@]+@`)
	localhostName = pattern(`\b(localhost|127\.0\.0\.1)\b`)
)

// warnOfVariables warns of what seems to be secret and would stand in the manifest, and of what means another
// machine there.
func (t *translation) warnOfVariables(c *Component) {
	vars := c.configEnv()
	maps.Copy(vars, c.Env)
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		if secretName().MatchString(name) || passwordInURL().MatchString(vars[name]) {
			t.warn(c, c.fieldOf(name), "stands in the manifest as it is, for all who may read that: env_files makes a secret of it")
		}
		t.warnOfLocalhost(c, c.fieldOf(name), vars[name])
	}
	for i, arg := range c.Args {
		t.warnOfLocalhost(c, fmt.Sprintf("args[%d]", i), arg)
	}
}

func (t *translation) warnOfLocalhost(c *Component, field, text string) {
	host := localhostName().FindString(text)
	if host == "" {
		return
	}
	var others []string
	for _, other := range t.p.components() {
		if other.ID != c.ID && other.isReached() {
			others = append(others, t.host(t, other.ID))
		}
	}
	t.warn(c, field, "%s is the container itself there, the names of others are: %s", host, cmp.Or(enumerate(others), "none"))
}

// isReached tells whether c has a name on the network there: a service, which others dial, and what has ports.
func (c *Component) isReached() bool { return len(c.Ports) > 0 || c.Role == roleService && !c.Oneshot }

// waitsFor returns the ids of all that must be ready before c starts.
func (t *translation) waitsFor(c *Component) []string {
	ids := c.waitsFor()
	if c.Role != roleService {
		for _, service := range t.p.Spec.Services {
			if !slices.Contains(ids, service.ID) {
				ids = append(ids, service.ID)
			}
		}
	}
	return ids
}

// canEnd tells whether the pipeline can be done: none of its components is started again whenever it has ended.
func (t *translation) canEnd() bool {
	return t.p.Spec.Relay != relayOff && len(t.p.Spec.Sources) > 0 &&
		len(t.p.idsWhere(func(c *Component) bool { return c.Role != roleService && c.RestartPolicy == restartAlways })) == 0
}

// serverArgs are the arguments of flowctl as the control plane.
func serverArgs(more ...string) []string {
	return append([]string{"server", planeFilePath, "-control-plane-address", "0.0.0.0", "-db-path", planeState + "/registry.json", "-log-format", "json"}, more...)
}

// waitArgs are those of flowctl that waits until the control plane answers, and ids are ready.
func waitArgs(plane string, ids ...string) []string {
	if len(ids) == 0 {
		ids = []string{"-until", "up"} // without it all are waited for
	}
	return append([]string{"wait", "-e", plane}, ids...)
}

// doneArgs are those of flowctl that waits until the pipeline is done.
func doneArgs(plane string) []string { return []string{"wait", "-e", plane, "-until", "done"} }

// planeFile returns the file of the control plane. It has what that needs of the components that are to be in it, and
// none of their variables but HEALTH_PORT, by which a component is known.
func (t *translation) planeFile(in func(c *Component) bool) string {
	out := Pipeline{APIVersion: t.p.APIVersion, Kind: t.p.Kind, Metadata: Metadata{Name: t.p.Metadata.Name}, Spec: Spec{Relay: t.p.Spec.Relay}}
	known := t.p.idsWhere(in)
	listed := func(ids []string) []string {
		return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return !slices.Contains(known, id) })
	}
	lists := out.lists()
	for _, c := range t.p.components() {
		if !in(c) {
			continue
		}
		short := Component{
			ID: c.ID, Type: doubleDollars(c.Type), Labels: doubleInValues(c.Labels), Image: doubleDollars(c.Image), Env: map[string]string{"HEALTH_PORT": doubleDollars(t.ports[c.ID])},
			Inputs: listed(c.Inputs), DependsOn: listed(c.DependsOn), Register: c.Register, Oneshot: c.Oneshot, InputEventTypes: doubleInAll(c.InputEventTypes), OutputEventTypes: doubleInAll(c.OutputEventTypes),
		}
		if c.Role == roleSource {
			short.StreamParams = doubleInValues(c.streamParams())
		}
		*lists[c.Role] = append(*lists[c.Role], short)
	}
	var text strings.Builder
	_ = writeJSON(&text, out, true) // what was read from JSON can be written as JSON
	return text.String()
}

// healthURL returns the address that the health_check of c asks, where its HEALTH_PORT is port; nil for none.
func (c *Component) healthURL(port string) *url.URL {
	if c.HealthCheck == "" || strings.HasPrefix(c.HealthCheck, "exec:") {
		return nil
	}
	u, err := url.Parse(healthPortName().ReplaceAllLiteralString(c.HealthCheck, port))
	if err != nil {
		return nil // its error is told
	}
	return u
}

// healthPortFault says why nobody knows the port that the health_check of c asks, "" for nothing.
func (c *Component) healthPortFault() string {
	if !healthPortName().MatchString(c.HealthCheck) {
		return ""
	}
	if _, ok := c.EnvFiles["HEALTH_PORT"]; ok {
		return "asks a port that a file of env_files has: write it here"
	}
	port := fileEnv(c, "HEALTH_PORT")
	if n, err := strconv.ParseUint(port, 10, 16); port != "" && (err != nil || n == 0) {
		return "asks HEALTH_PORT, which is no port from 1 to 65535: " + quote(port)
	}
	return ""
}

// healthPort returns the port that u asks.
func healthPort(u *url.URL) int {
	port, _ := strconv.Atoi(cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])) // checkHealth has found it right
	return port
}

// isLoopback tells whether host is the machine itself.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && (ip.IsLoopback() || ip.IsUnspecified())
}

// doubleDollars doubles each $, by which a pipeline file, Kubernetes and compose alike mean the character itself.
func doubleDollars(text string) string { return strings.ReplaceAll(text, "$", "$$") }

func doubleInAll(texts []string) []string {
	out := slices.Clone(texts)
	for i := range out {
		out[i] = doubleDollars(out[i])
	}
	return out
}

func doubleInValues(texts map[string]string) map[string]string {
	out := maps.Clone(texts)
	for name := range out {
		out[name] = doubleDollars(out[name])
	}
	return out
}

// imageTag returns the tag of the image of a version: those that are no release have none.
func imageTag(version string) string {
	if releaseVersion().MatchString(version) {
		return version
	}
	return "latest"
}

var releaseVersion = pattern(`^v[0-9]+\.[0-9]+\.[0-9]+$`)

// seconds rounds up to whole ones, at least one.
func seconds(d time.Duration) int { return int(max(1, (d+time.Second-1)/time.Second)) }

// stopSeconds is how long c may take to stop.
func (c *Component) stopSeconds() int {
	return seconds(cmp.Or(time.Duration(c.StopTimeout), defaultStop))
}

// startSeconds is how long c may take to pass its health_check.
func (c *Component) startSeconds() int {
	return seconds(cmp.Or(time.Duration(c.StartTimeout), defaultStart))
}

// Ports of a component: 8080:80 publishes 80.
type publishedAs struct {
	outside, inside int
	protocol        string // tcp, udp or sctp
}

func parsePort(entry string) publishedAs {
	entry, protocol, _ := strings.Cut(entry, "/")
	m := portPattern().FindStringSubmatch(entry) // checkPort has found it right
	outside, _ := strconv.Atoi(m[1])
	inside, _ := strconv.Atoi(m[2])
	return publishedAs{outside, inside, cmp.Or(protocol, "tcp")}
}

// checkCollisions reports ids that are the same as name has them.
func checkCollisions(f findings, all []*Component, name func(id string) string) {
	first := make(map[string]*Component)
	for _, c := range all {
		if !f.sound(&c.ID) {
			continue
		}
		if other := first[name(c.ID)]; other == nil {
			first[name(c.ID)] = c
		} else {
			f.wrong(&c.ID, "%s and %s on line %d become the same name, %s", quote(c.ID), quote(other.ID), f.line(&other.ID), name(c.ID))
		}
	}
}
