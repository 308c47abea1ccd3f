package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/bits"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// The model of a pipeline, what it must keep to, and the order in which components start and stop.

const (
	maxComponents = 1000
	minDuration   = time.Millisecond
	maxDuration   = 24 * time.Hour
)

// Pipeline is a pipeline file that has been read and found right. In the tags of
// the model, a field without omitempty is required, and check names its rule.
type Pipeline struct {
	Schema     string   `json:"$schema,omitempty"` // for editors
	APIVersion string   `json:"apiVersion" check:"version"`
	Kind       string   `json:"kind" check:"kind"`
	Metadata   Metadata `json:"metadata"`
	Spec       Spec     `json:"spec"`

	Notes []warning `json:"-"` // what reading it has noted
	Text  string    `json:"-"` // of the file
}

// warning is something that is right in the file, and hardly meant or about to fail on this machine.
type warning struct {
	Component string `json:"component"` // "" for what is of none
	Field     string `json:"field"`
	Message   string `json:"message"`
}

func (w warning) String() string {
	if w.Component == "" {
		return w.Field + ": " + w.Message
	}
	return fmt.Sprintf("component %s: %s: %s", w.Component, w.Field, w.Message)
}

type Metadata struct {
	Name   string            `json:"name" check:"name"`
	Labels map[string]string `json:"labels,omitempty"`
}

type Spec struct {
	Description string      `json:"description,omitempty"`
	Relay       string      `json:"relay,omitempty" check:"relay"` // whether flowctl moves events: auto or off
	Sources     []Component `json:"sources,omitempty"`
	Processors  []Component `json:"processors,omitempty"`
	Sinks       []Component `json:"sinks,omitempty"`
	Services    []Component `json:"services,omitempty"` // what the others lean on: they wait for all of these
}

// Component is one program of a pipeline. It is long because each field of the file is one
// of it. A field that the file does not give is zero; the file cannot give
// a zero duration, nor an empty string where that would mean something.
type Component struct {
	ID               string            `json:"id" check:"name"`
	Type             string            `json:"type,omitempty"`
	Labels           map[string]string `json:"labels,omitempty"`
	Command          []string          `json:"command,omitempty"`
	Args             []string          `json:"args,omitempty"`
	Image            string            `json:"image,omitempty" check:"image"`
	Volumes          []string          `json:"volumes,omitempty" check:"volume"`
	Ports            []string          `json:"ports,omitempty" check:"port"`
	User             string            `json:"user,omitempty" check:"filled"`
	Env              map[string]string `json:"env,omitempty"`
	EnvFiles         map[string]string `json:"env_files,omitempty" check:"path"`
	Config           map[string]any    `json:"config,omitempty"` // string, json.Number, bool, []any or map[string]any
	WorkingDir       string            `json:"working_dir,omitempty" check:"path"`
	Inputs           []string          `json:"inputs,omitempty"`
	DependsOn        []string          `json:"depends_on,omitempty"`
	Register         *bool             `json:"register,omitempty"`
	Oneshot          bool              `json:"oneshot,omitempty"`
	TLS              bool              `json:"tls,omitempty"`
	HealthCheck      string            `json:"health_check,omitempty" check:"health"`
	HealthInterval   Duration          `json:"health_interval,omitempty"`
	HealthTimeout    Duration          `json:"health_timeout,omitempty"`
	HealthRetries    int               `json:"health_retries,omitempty" check:"from1"`
	RestartPolicy    string            `json:"restart_policy,omitempty" check:"policy"`
	MaxRestarts      int               `json:"max_restarts,omitempty" check:"from0"`
	StartTimeout     Duration          `json:"start_timeout,omitempty"`
	StopTimeout      Duration          `json:"stop_timeout,omitempty"`
	StopSignal       string            `json:"stop_signal,omitempty" check:"signal"`
	InputEventTypes  []string          `json:"input_event_types,omitempty" check:"filled"`
	OutputEventTypes []string          `json:"output_event_types,omitempty" check:"filled"`
	StreamParams     map[string]string `json:"stream_params,omitempty"`

	Role          Role     `json:"-"` // which list of the file it is in
	HealthCommand []string `json:"-"` // program and arguments of an exec: health_check
}

type Role int

const (
	roleSource Role = iota
	roleProcessor
	roleSink
	roleService
)

func (r Role) String() string {
	return [...]string{"source", "processor", "sink", "service"}[r]
}

// Duration is a time.Duration that JSON holds as a string such as "5s".
type Duration time.Duration

func (d Duration) MarshalJSON() ([]byte, error) {
	return json.Marshal(time.Duration(d).String())
}

// parseDuration fails for what is no duration that a field may have.
func parseDuration(text string) (Duration, error) {
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		return 0, fmt.Errorf("bad duration %s, write it like \"500ms\", \"5s\" or \"1m30s\"", quote(text))
	case d < minDuration || d > maxDuration:
		return 0, fmt.Errorf("must be from 1ms to 24h, not %s", quote(text))
	}
	return Duration(d), nil
}

const (
	restartNo        = "no"
	restartOnFailure = "on-failure"
	restartAlways    = "always"
)

// relayOff is spec.relay of a pipeline whose events flowctl does not move.
const relayOff = "off"

var (
	stopSignalNames = []string{"SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"}
	stopSignals     = []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGKILL}
)

// registers tells whether c is ready once it has registered.
func (c *Component) registers() bool {
	if c.Register == nil {
		return !c.Oneshot && c.Role != roleService
	}
	return *c.Register
}

// readyOnceRunning tells whether c is ready once its container runs, because it neither registers nor
// has a check, nor is ready once it has ended. The engine's command line runs before that: the container may take long, or fail.
func (c *Component) readyOnceRunning() bool {
	return c.Image != "" && !c.registers() && c.HealthCheck == "" && !c.Oneshot
}

func (c *Component) healthInterval() time.Duration {
	return cmp.Or(time.Duration(c.HealthInterval), 5*time.Second)
}

func (c *Component) healthTimeout() time.Duration {
	return cmp.Or(time.Duration(c.HealthTimeout), 2*time.Second)
}

func (c *Component) healthRetries() int { return cmp.Or(c.HealthRetries, 3) }

func (c *Component) stopSignal() syscall.Signal {
	return stopSignals[max(0, slices.Index(stopSignalNames, c.StopSignal))]
}

// waitsFor returns the ids that c itself names as what must be ready before it starts, each once: inputs first.
func (c *Component) waitsFor() []string {
	ids := slices.Clone(c.Inputs)
	for _, id := range c.DependsOn {
		if !slices.Contains(c.Inputs, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// configEnv returns the environment variables that config stands for; Env and
// EnvFiles win over them. Lists and objects are compact JSON.
func (c *Component) configEnv() map[string]string {
	vars := make(map[string]string, len(c.Config))
	for key, value := range c.Config {
		text, ok := value.(string)
		if !ok {
			var b strings.Builder
			enc := json.NewEncoder(&b)
			enc.SetEscapeHTML(false)
			_ = enc.Encode(value) // what was read from JSON can be written as JSON
			text = strings.TrimSuffix(b.String(), "\n")
		}
		vars[strings.ToUpper(key)] = text
	}
	return vars
}

// variableNames returns the names of the variables that the file sets for c.
func (c *Component) variableNames() map[string]bool {
	names := make(map[string]bool)
	for name := range c.Env {
		names[name] = true
	}
	for name := range c.EnvFiles {
		names[name] = true
	}
	for key := range c.Config {
		names[strings.ToUpper(key)] = true
	}
	return names
}

// lists returns the lists of components, by role.
func (p *Pipeline) lists() []*[]Component {
	return []*[]Component{roleSource: &p.Spec.Sources, roleProcessor: &p.Spec.Processors, roleSink: &p.Spec.Sinks, roleService: &p.Spec.Services}
}

// components returns the sources, processors, sinks and services, in the order of the file. They are those of p.
func (p *Pipeline) components() []*Component {
	var all []*Component
	for _, list := range p.lists() {
		for i := range *list {
			all = append(all, &(*list)[i])
		}
	}
	return all
}

// sandboxSuffix ends the name of a pipeline of services alone.
const sandboxSuffix = "-sandbox"

// sandbox leaves the services of p alone. It fails where there are none.
func (p *Pipeline) sandbox() error {
	if len(p.Spec.Services) == 0 {
		return errors.New("has no services that a sandbox could run")
	}
	p.Metadata.Name += sandboxSuffix
	p.Spec.Sources, p.Spec.Processors, p.Spec.Sinks = nil, nil, nil
	return nil
}

// dropServices takes the services out of p, because they run already. It fails where nothing would be left.
func (p *Pipeline) dropServices() error {
	services := p.idsWhere(func(c *Component) bool { return c.Role == roleService })
	p.Spec.Services = nil
	for _, c := range p.components() {
		c.DependsOn = slices.DeleteFunc(c.DependsOn, func(id string) bool { return slices.Contains(services, id) })
	}
	if len(p.components()) == 0 {
		return errors.New("has services alone, and they run already")
	}
	return nil
}

// ids returns the ids of all components, in their order.
func (p *Pipeline) ids() []string { return p.idsWhere(func(*Component) bool { return true }) }

// idsWhere returns the ids of the components that are so.
func (p *Pipeline) idsWhere(is func(c *Component) bool) []string {
	var ids []string
	for _, c := range p.components() {
		if is(c) {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// images returns the images of p, each once.
func (p *Pipeline) images() []string {
	var images []string
	for _, c := range p.components() {
		if c.Image != "" && !slices.Contains(images, c.Image) {
			images = append(images, c.Image)
		}
	}
	return images
}

// usersOf returns the ids of the components that have the image.
func (p *Pipeline) usersOf(image string) []string {
	return p.idsWhere(func(c *Component) bool { return c.Image == image })
}

// speakTLS returns the ids of the components whose tls is yes.
func (p *Pipeline) speakTLS(yes bool) []string {
	return p.idsWhere(func(c *Component) bool { return c.TLS == yes })
}

// unheardEvents returns the event types that c reads and none of its inputs puts out. There
// are none where an input does not say what it puts out.
func (p *Pipeline) unheardEvents(c *Component) []string {
	if len(c.Inputs) == 0 {
		return nil
	}
	var heard []string
	for _, in := range p.components() {
		if !slices.Contains(c.Inputs, in.ID) {
			continue
		}
		if len(in.OutputEventTypes) == 0 {
			return nil
		}
		heard = append(heard, in.OutputEventTypes...)
	}
	return slices.DeleteFunc(slices.Clone(c.InputEventTypes), func(event string) bool { return slices.Contains(heard, event) })
}

// volumeHost splits a volume into the part of the host and the rest. The part is a path
// where it has a slash or begins with a dot, else the name of a volume of the engine.
func volumeHost(volume string) (host, rest string, isPath bool) {
	host, rest, _ = strings.Cut(volume, ":")
	return host, rest, strings.HasPrefix(host, ".") || strings.Contains(host, "/")
}

// publishedPort returns what an entry of ports takes of the host, such as 8080 or 5353/udp.
func publishedPort(entry string) string {
	entry, protocol, _ := strings.Cut(entry, "/")
	port := entry[:strings.LastIndexByte(entry, ':')] // checkPort has found it right
	if protocol != "" && protocol != "tcp" {
		port += "/" + protocol
	}
	return port
}

// leaving says what becomes of a component, of its own will or not. A later one is more.
type leaving int

const (
	staying     leaving = iota
	leavingOnce         // it ends, and another process may take its place
	leavingOut          // it ends, and a reload takes it out of the pipeline
	leavingEver         // it ends, or has ended, and is not started again
)

// A stopEdge names a component that must have stopped before another one is told to.
type stopEdge struct {
	id    string
	input bool // the other one reads from it; else it depends on the other one
}

// stopOrder returns, for each id, the components that must stop before it: those
// that it reads from, and those that depend on it. The two can contradict each
// other, as when X reads from A, A reads from D, and X depends on D. Then what is
// depended on stops last, and what would close a cycle is left out. An id that is not
// among all, which is so while a file is reloaded, orders nothing. Services stop after all else.
func stopOrder(all []*Component) map[string][]stopEdge {
	index := make(map[string]int, len(all))
	before, after := make([]bitset, len(all)), make([]bitset, len(all)) // of a component, itself included
	for i, c := range all {
		index[c.ID] = i
		before[i].add(i)
		after[i].add(i)
	}
	edges := make(map[string][]stopEdge)
	add := func(first, then int, input bool) {
		if after[then].has(first) {
			return
		}
		edges[all[then].ID] = append(edges[all[then].ID], stopEdge{all[first].ID, input})
		for earlier := range before[first].minus(&before[then]) {
			for later := range after[then].minus(&after[earlier]) {
				after[earlier].add(later)
				before[later].add(earlier)
			}
		}
	}
	for i, c := range all {
		for on, service := range all {
			if c.Role != roleService && service.Role == roleService {
				add(i, on, false)
			}
		}
		for _, id := range c.DependsOn {
			if on, ok := index[id]; ok {
				add(i, on, false)
			}
		}
	}
	for i, c := range all {
		for _, id := range c.Inputs {
			if in, ok := index[id]; ok {
				add(in, i, true)
			}
		}
	}
	return edges
}

// A bitset is a set of components by index.
type bitset [(maxComponents + 63) / 64]uint64

func (b *bitset) add(i int)      { b[i/64] |= 1 << (i % 64) }
func (b *bitset) has(i int) bool { return b[i/64]>>(i%64)&1 == 1 }

// minus yields what is in b and not in c; both may change meanwhile.
func (b *bitset) minus(c *bitset) iter.Seq[int] {
	return func(yield func(int) bool) {
		for i := range b {
			for word := b[i] &^ c[i]; word != 0; word &= word - 1 {
				if !yield(i*64 + bits.TrailingZeros64(word)) {
					return
				}
			}
		}
	}
}

// rules check the text of a field, whose tag check names one. Their errors follow its path.
var rules = map[string]func(text string) error{
	"version": oneOf("flowctl/v1"),
	"kind":    oneOf("Pipeline"),
	"name":    checkName,
	"path":    checkPath,
	"image":   checkImage,
	"volume":  checkVolume,
	"port":    checkPort,
	"filled":  checkFilled,
	"health":  checkHealth,
	"policy":  oneOf(restartNo, restartOnFailure, restartAlways),
	"relay":   oneOf("auto", relayOff),
	"signal":  oneOf(stopSignalNames...),
	"from0":   atLeast(0),
	"from1":   atLeast(1),
}

func oneOf(allowed ...string) func(string) error {
	list := strings.Join(allowed, " or ")
	return func(text string) error {
		switch {
		case text == "":
			return fmt.Errorf("must be %s", list)
		case !slices.Contains(allowed, text):
			return fmt.Errorf("must be %s, not %s", list, quote(text))
		}
		return nil
	}
}

func atLeast(least int) func(string) error {
	return func(text string) error {
		if n, err := strconv.Atoi(text); err != nil || n < least {
			return fmt.Errorf("must be at least %d", least)
		}
		return nil
	}
}

var namePattern = pattern(`^[A-Za-z0-9._-]{1,63}$`)

func checkName(text string) error {
	switch {
	case text == "":
		return errors.New("must be a name of letters, digits, dots, _ and -")
	case text == "." || text == ".." || !namePattern().MatchString(text):
		return fmt.Errorf("must be a name of letters, digits, dots, _ and -, at most 63, not %s", quote(text))
	}
	return nil
}

func checkFilled(text string) error {
	if text == "" {
		return errors.New("must not be empty")
	}
	return nil
}

func checkPath(text string) error {
	if text == "~" || strings.HasPrefix(text, "~/") {
		return errors.New("~ is not the home folder here, write ${HOME}")
	}
	return checkFilled(text)
}

// checkImage refuses what the engine's command line would take for a flag, or for two arguments.
func checkImage(text string) error {
	if strings.HasPrefix(text, "-") || strings.ContainsAny(text, " \t\r\n") {
		return fmt.Errorf("must be the name of an image such as redis:7, not %s", quote(text))
	}
	return checkFilled(text)
}

func checkVolume(text string) error {
	host, rest, _ := strings.Cut(text, ":")
	inside, options, _ := strings.Cut(rest, ":")
	if host == "" || !strings.HasPrefix(inside, "/") || strings.Contains(options, ":") {
		return fmt.Errorf("must be like ./folder:/path, /folder:/path:ro or name:/path, not %s", quote(text))
	}
	return checkPath(host)
}

var portPattern = pattern(`^(?:(?:[0-9.]+|\[[0-9A-Fa-f:.]+\]):)?([0-9]+):([0-9]+)(?:/(?:tcp|udp|sctp))?$`)

func checkPort(text string) error {
	m := portPattern().FindStringSubmatch(text)
	if m == nil {
		return fmt.Errorf("must be like 8080:80, 127.0.0.1:8080:80 or 5353:53/udp, not %s", quote(text))
	}
	for _, number := range m[1:] {
		if port, err := strconv.ParseUint(number, 10, 16); err != nil || port == 0 {
			return fmt.Errorf("port %s is not from 1 to 65535", clip(number))
		}
	}
	return nil
}

const healthForms = "http://, https://, tcp://, grpc:// or exec:"

// healthPortName matches what stands for the component's HEALTH_PORT in a health_check.
var healthPortName = pattern(`\$(HEALTH_PORT\b|\{HEALTH_PORT\})`)

func checkHealth(text string) error {
	scheme, rest, _ := strings.Cut(text, ":")
	switch argv, err := words(rest); {
	case scheme == "exec" && err != nil:
		return err
	case scheme == "exec" && (len(argv) == 0 || argv[0] == ""):
		return errors.New("exec: needs a command after it")
	case scheme == "exec":
		return nil
	case !slices.Contains([]string{"http", "https", "tcp", "grpc"}, scheme) || !strings.HasPrefix(rest, "//"):
		return fmt.Errorf("must begin with %s, not %s", healthForms, quote(text))
	}
	text = healthPortName().ReplaceAllLiteralString(text, "1") // which any port is
	u, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("bad URL: %s", clip(err.(*url.Error).Err.Error()))
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	switch {
	case u.Hostname() == "":
		return fmt.Errorf("%s has no host", quote(text))
	case u.Port() != "" && (err != nil || port == 0):
		return fmt.Errorf("port %s is not from 1 to 65535", clip(u.Port()))
	case scheme == "http" || scheme == "https":
		return nil
	case u.Port() == "":
		return fmt.Errorf("%s has no port", quote(text))
	case scheme == "tcp" && text != "tcp://"+u.Host:
		return fmt.Errorf("must be tcp://host:port, not %s", quote(text))
	case scheme == "grpc" && text != "grpc://"+u.Host+u.EscapedPath():
		return fmt.Errorf("must be grpc://host:port or grpc://host:port/service, not %s", quote(text))
	}
	return nil
}

// words splits a line at its spaces. What is in single or double quotes stays as it is.
func words(line string) ([]string, error) {
	var out []string
	var word strings.Builder
	var quote rune // that is open, 0 for none
	begun := false
	for _, c := range line + " " {
		switch {
		case c == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(c)
		case c == '\'' || c == '"':
			quote, begun = c, true
		case !unicode.IsSpace(c):
			word.WriteRune(c)
			begun = true
		case begun:
			out, begun = append(out, word.String()), false
			word.Reset()
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("has no closing %c", quote)
	}
	return out, nil
}

// findings tells the rules what a pipeline file gives, and takes in what is wrong with it. A field is
// a pointer into the model. wrong and wrongEntry ignore what is not in the file, or has an error already.
type findings interface {
	given(field any) bool // it is in the file
	sound(field any) bool // it is in the file, and nothing is wrong with it
	line(field any) int   // on which it is given
	wrong(field any, format string, args ...any)
	wrongEntry(list any, i int, format string, args ...any)
	wrongKey(object any, key, format string, args ...any)
	missing(object any, name string)
}

// lazy is a text that is made when it is shown: most errors of a hostile file are not.
type lazy func() string

func (l lazy) String() string { return l() }

// check reports to f what the fields must keep to among themselves, and sets the roles.
func (p *Pipeline) check(f findings) {
	all := p.components()
	lists := p.lists()
	unsound := func(list *[]Component) bool { return f.given(list) && !f.sound(list) }
	if len(all) == 0 && !slices.ContainsFunc(lists, unsound) {
		f.wrong(&p.Spec, "needs at least one component in sources, processors, sinks or services")
	}
	for role, list := range lists {
		for i := range *list {
			(*list)[i].Role = Role(role)
		}
	}
	for _, c := range all {
		if f.sound(c) {
			c.checkCommand(f)
			c.checkPolicies(f)
			c.checkVariables(f)
		}
	}
	checkCycles(f, all, p.checkReferences(f))
}

func (c *Component) checkCommand(f findings) {
	command, image := f.given(&c.Command), f.given(&c.Image)
	switch {
	case !command && !image:
		f.missing(c, "command")
	case command && image:
		f.wrong(&c.Image, "cannot be given beside command: what a container is to run goes into args, after the entrypoint of its image")
	case image:
		if !strings.HasPrefix(c.WorkingDir, "/") {
			f.wrong(&c.WorkingDir, "must be an absolute path in the container, not %s", quote(c.WorkingDir))
		}
	case len(c.Command) == 0:
		f.wrong(&c.Command, "must not be empty")
	default:
		if err := checkPath(c.Command[0]); err != nil {
			f.wrongEntry(&c.Command, 0, "%v", err)
		}
	}
	if !image {
		for _, field := range []any{&c.Volumes, &c.Ports, &c.User} {
			f.wrong(field, "has no effect without image")
		}
	}
}

func (c *Component) checkPolicies(f findings) {
	if !f.given(&c.HealthCheck) {
		for _, field := range []any{&c.HealthInterval, &c.HealthTimeout, &c.HealthRetries} {
			f.wrong(field, "has no effect without health_check")
		}
	}
	if c.Role != roleSource {
		f.wrong(&c.StreamParams, "is for sources, which are asked to stream")
	}
	if c.Oneshot {
		for _, field := range []any{&c.HealthCheck, &c.Register} {
			f.wrong(field, "cannot be given beside oneshot, which is ready once it has ended with 0")
		}
		if c.RestartPolicy == restartAlways {
			f.wrong(&c.RestartPolicy, "must be no or on-failure beside oneshot, which ends once it is ready")
		}
	}
	if !f.given(&c.RestartPolicy) || c.RestartPolicy == restartNo {
		f.wrong(&c.MaxRestarts, "has no effect unless restart_policy is on-failure or always")
	}
}

// checkVariables refuses what is no variable, and what is set twice.
// Only config may repeat a variable of env and env_files, which win over it.
func (c *Component) checkVariables(f findings) {
	valid := func(object any, key string) bool {
		if variableName().MatchString(key) {
			return true
		}
		f.wrongKey(object, key, "%v", lazy(func() string { return notVariable(key) }))
		return false
	}
	for _, key := range slices.Sorted(maps.Keys(c.Env)) {
		valid(&c.Env, key)
	}
	for _, key := range slices.Sorted(maps.Keys(c.EnvFiles)) {
		if _, taken := c.Env[key]; valid(&c.EnvFiles, key) && taken {
			f.wrongKey(&c.EnvFiles, key, "%s is set by env already", clip(key))
		}
	}
	keys := make(map[string]string) // by variable
	for _, key := range slices.Sorted(maps.Keys(c.Config)) {
		variable := strings.ToUpper(key)
		if first, taken := keys[variable]; valid(&c.Config, key) && taken {
			f.wrongKey(&c.Config, key, "%s is set by %s already", clip(variable), clip(first))
		}
		keys[variable] = key
	}
}

var variableName = pattern(`^[A-Za-z_][A-Za-z0-9_]*$`)

// notVariable says that key is no name for a variable, and what would be one.
func notVariable(key string) string {
	msg := quote(key) + " is no name for a variable: use letters, digits and _, with no digit first"
	if better := strings.NewReplacer("-", "_", ".", "_").Replace(key); len(key) <= maxQuoted && variableName().MatchString(better) {
		msg += fmt.Sprintf(", such as %q", better)
	}
	return msg
}

// A waitEdge is an entry of inputs or depends_on.
type waitEdge struct {
	on    int       // index of the component that it names
	list  *[]string // which it is in
	entry int
}

// checkReferences returns what each component waits for.
func (p *Pipeline) checkReferences(f findings) [][]waitEdge {
	all := p.components()
	index := make(map[string]int, len(all))
	sure := true // false when an id is wrong: what refers to it may be right
	for i, c := range all {
		if !f.sound(&c.ID) {
			sure = false
		} else if first, ok := index[c.ID]; ok {
			f.wrong(&c.ID, "duplicate id %s, first on line %d", quote(c.ID), f.line(&all[first].ID))
		} else {
			index[c.ID] = i
		}
	}
	edges := make([][]waitEdge, len(all))
	for i, c := range all {
		if f.sound(&c.Inputs) && c.Role == roleSource && len(c.Inputs) > 0 {
			f.wrong(&c.Inputs, "a source has no inputs")
		}
		if f.sound(&c.Inputs) && c.Role == roleService && len(c.Inputs) > 0 {
			f.wrong(&c.Inputs, "a service has no inputs, name what it needs in depends_on")
		}
		for _, list := range []*[]string{&c.Inputs, &c.DependsOn} {
			if !f.sound(list) {
				continue
			}
			listed := make(map[string]bool)
			for entry, id := range *list {
				on, known := index[id]
				switch {
				case listed[id]:
					f.wrongEntry(list, entry, "%s is listed twice", quote(id))
				case id == c.ID:
					f.wrongEntry(list, entry, "%s is this component itself", quote(id))
				case !known && sure:
					f.wrongEntry(list, entry, "unknown component %s%v", quote(id), lazy(func() string { return p.likelyID(id) }))
				case known && list == &c.Inputs && all[on].Role == roleSink:
					f.wrongEntry(list, entry, "%s is a sink, which has no output", quote(id))
				case known && list == &c.Inputs && all[on].Role == roleService && c.Role != roleService:
					f.wrongEntry(list, entry, "%s is a service, which all wait for: name it in depends_on, or nowhere", quote(id))
				case known && list == &c.DependsOn && c.Role == roleService && all[on].Role != roleService:
					f.wrongEntry(list, entry, "%s is no service, and waits for all services: a service can only depend on other services", quote(id))
				case known:
					edges[i] = append(edges[i], waitEdge{on, list, entry})
				}
				listed[id] = true
			}
		}
	}
	return edges
}

func (p *Pipeline) likelyID(id string) string {
	if near := nearest(id, p.ids()); near != "" {
		return fmt.Sprintf(", did you mean %q?", near)
	}
	return ""
}

// checkCycles reports each entry that closes a cycle, in a walk in the order of the file.
func checkCycles(f findings, all []*Component, edges [][]waitEdge) {
	var path []int
	place := make([]int, len(all)) // 1 + index in path; -1 once left; 0 if not seen
	var visit func(i int)
	visit = func(i int) {
		path = append(path, i)
		place[i] = len(path)
		for _, edge := range edges[i] {
			if place[edge.on] == 0 {
				visit(edge.on)
			} else if place[edge.on] > 0 {
				cycle := lazy(func() string {
					var b strings.Builder
					for _, i := range path[place[edge.on]-1:] {
						fmt.Fprintf(&b, "%s -> ", clip(all[i].ID))
					}
					return b.String() + clip(all[edge.on].ID)
				})
				f.wrongEntry(edge.list, edge.entry, "cycle, each waits for the next: %v", cycle)
			}
		}
		path = path[:len(path)-1]
		place[i] = -1
	}
	for i := range all {
		if place[i] == 0 {
			visit(i)
		}
	}
}
