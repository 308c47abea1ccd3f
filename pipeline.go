package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/bits"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

// What a pipeline file may hold. Errors are collected up to maxErrors, so that a
// hostile file costs little, and shown up to maxShown.
const (
	maxFileSize   = 4 << 20
	maxComponents = 1000
	maxDepth      = 100
	maxErrors     = 1000
	maxShown      = 100

	minDuration = time.Millisecond
	maxDuration = 24 * time.Hour
)

// Pipeline is a pipeline file that has been read and found right. In the tags of
// the model, a field without omitempty is required, and check names its rule.
type Pipeline struct {
	Schema     string   `json:"$schema,omitempty"` // for editors
	APIVersion string   `json:"apiVersion" check:"version"`
	Kind       string   `json:"kind" check:"kind"`
	Metadata   Metadata `json:"metadata"`
	Spec       Spec     `json:"spec"`
}

type Metadata struct {
	Name   string            `json:"name" check:"name"`
	Labels map[string]string `json:"labels,omitempty"`
}

type Spec struct {
	Description string      `json:"description,omitempty"`
	Sources     []Component `json:"sources,omitempty"`
	Processors  []Component `json:"processors,omitempty"`
	Sinks       []Component `json:"sinks,omitempty"`
}

// Component is one program of a pipeline. A zero value is a field that the file
// does not give: it can give neither a zero duration nor an empty string where
// those could be taken for a value.
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

	Role          Role     `json:"-"` // which list of the file it is in
	HealthCommand []string `json:"-"` // program and arguments of an exec: health_check
}

type Role int

const (
	roleSource Role = iota
	roleProcessor
	roleSink
)

func (r Role) String() string {
	return [...]string{"source", "processor", "sink"}[r]
}

// Duration is a time.Duration that JSON holds as a string such as "5s".
type Duration time.Duration

func (d Duration) MarshalJSON() ([]byte, error) {
	return json.Marshal(time.Duration(d).String())
}

const (
	restartNo        = "no"
	restartOnFailure = "on-failure"
	restartAlways    = "always"
)

var (
	stopSignalNames = []string{"SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"}
	stopSignals     = []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGKILL}
)

func (c *Component) registers() bool { return c.Register == nil || *c.Register }

// readyOnceRunning is for a container of which nothing else tells: its engine may take
// long to start it, or fail to, while the engine's command line already runs.
func (c *Component) readyOnceRunning() bool {
	return c.Image != "" && !c.registers() && c.HealthCheck == ""
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

// waitsFor returns the ids that must be ready before c starts: its inputs, then
// what else it depends on, each once.
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

// components returns the sources, processors and sinks, each list in the order of
// the file. The pointers are into p.
func (p *Pipeline) components() []*Component {
	var all []*Component
	for _, list := range [][]Component{p.Spec.Sources, p.Spec.Processors, p.Spec.Sinks} {
		for i := range list {
			all = append(all, &list[i])
		}
	}
	return all
}

// A stopEdge names a component that must have stopped before another one is told to.
type stopEdge struct {
	id    string
	input bool // the other one reads from it; else it depends on the other one
}

// stopAfter is stopOrder for all components.
func (p *Pipeline) stopAfter() map[string][]stopEdge { return stopOrder(p.components()) }

// stopOrder returns, for each id, the components that must stop before it: those
// that it reads from, and those that depend on it. The two can contradict each
// other, as when X reads from A, A reads from D, and X depends on D. Then what is
// depended on stops last, and what would close a cycle is left out. An id that is not
// among all, which is so while a file is reloaded, orders nothing.
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

// readPipeline reads the pipeline file at path; env is asked for the variables
// that the file refers to. Relative paths in the file become absolute, from the
// folder that path is in, or from the working directory when path is no file on a
// disk (a pipe, /dev/stdin). What is wrong with the file's content is a *fileErrors.
func readPipeline(path string, env func(string) (string, bool)) (*Pipeline, error) {
	if ext := filepath.Ext(path); strings.EqualFold(ext, ".yaml") || strings.EqualFold(ext, ".yml") {
		return nil, fmt.Errorf("%s: a pipeline file is JSON; this turns YAML into it: %s",
			path, yamlCommand(path, strings.TrimSuffix(path, ext)+".json"))
	}
	data, regular, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read pipeline file: %w", err)
	}
	p, err := parsePipeline(data, path, env)
	if err != nil {
		return nil, err
	}
	folder := filepath.Dir(path)
	if !regular || strings.HasPrefix(path, "/dev/") {
		folder = "."
	}
	if folder, err = filepath.Abs(folder); err != nil {
		return nil, fmt.Errorf("cannot find the folder of %s: %v", path, err)
	}
	p.resolve(folder)
	return p, nil
}

func yamlCommand(from, to string) string {
	return "python3 -c 'import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin.buffer), sys.stdout, indent=2, default=str)' < " +
		shellWord(from) + " > " + shellWord(to)
}

// shellWord quotes s for a shell, where that is needed.
func shellWord(s string) string {
	if plainWord.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

var plainWord = regexp.MustCompile(`^[\w./-]+$`)

// pipelineFiles returns those of the first files in a folder that are JSON and say that
// they are pipelines.
func pipelineFiles(folder string) []string {
	const (
		mostEntries = 1000
		mostFiles   = 20
		mostBytes   = 256 << 10
	)
	dir, err := os.Open(folder)
	if err != nil {
		return nil
	}
	defer dir.Close()
	entries, _ := dir.ReadDir(mostEntries) // what could be read will do
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return filepath.Ext(e.Name()) != ".json" || !e.Type().IsRegular() })
	var out []string
	for _, e := range entries[:min(len(entries), mostFiles)] {
		var head struct{ Kind string }
		if info, err := e.Info(); err != nil || info.Size() > mostBytes {
			continue
		}
		data, err := os.ReadFile(filepath.Join(folder, e.Name()))
		if err == nil && json.Unmarshal(data, &head) == nil && head.Kind == "Pipeline" {
			out = append(out, printable(e.Name()))
		}
	}
	return out
}

// readFile reads one byte more than a pipeline file may have, at most.
func readFile(path string) (data []byte, regular bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if info.IsDir() {
		return nil, false, fmt.Errorf("%s is a folder", path)
	}
	data, err = io.ReadAll(io.LimitReader(f, maxFileSize+1))
	return data, info.Mode().IsRegular(), err
}

// resolve makes the paths in p absolute, also that of the program of an exec: check.
// The name of a program without a slash stays: it is looked up in PATH when the program
// starts.
func (p *Pipeline) resolve(folder string) {
	absolute := func(path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(folder, path)
	}
	for _, c := range p.components() {
		if len(c.Command) > 0 && strings.Contains(c.Command[0], "/") {
			c.Command[0] = absolute(c.Command[0])
		}
		if line, ok := strings.CutPrefix(c.HealthCheck, "exec:"); ok {
			c.HealthCommand, _ = words(line) // checkHealth has found it right
			if c.Image == "" && strings.Contains(c.HealthCommand[0], "/") {
				c.HealthCommand[0] = absolute(c.HealthCommand[0])
			}
		}
		if c.Image == "" { // else it is one of the container
			c.WorkingDir = absolute(c.WorkingDir)
		}
		for i, volume := range c.Volumes {
			if host, rest, isPath := volumeHost(volume); isPath {
				c.Volumes[i] = absolute(host) + ":" + rest
			}
		}
		for name, path := range c.EnvFiles {
			c.EnvFiles[name] = absolute(path)
		}
	}
}

// parsePipeline reads a pipeline from the content of a file. The name is for the
// errors, which are all returned at once as a *fileErrors; paths stay as written.
func parsePipeline(data []byte, name string, env func(string) (string, bool)) (*Pipeline, error) {
	r := &reader{data: data, env: env, nodes: make(map[*Component]*node)}
	r.errs.name = name
	p := new(Pipeline)
	if r.checkSyntax() {
		r.dec = json.NewDecoder(bytes.NewReader(data))
		r.dec.UseNumber()
		if root := new(node); r.tree(root, 0) && r.checkSize(root) {
			r.bind(root, p)
			r.check(p, root)
		}
	}
	if len(r.errs.list) > 0 {
		return nil, r.sortedErrors()
	}
	return p, nil
}

// A fileError is one thing that is wrong in a pipeline file.
type fileError struct {
	offset       int
	line, column int    // from 1; the column counts characters
	path         string // such as spec.sources[0].id; empty for the file as a whole
	msg          string
}

// fileErrors is all that is wrong with a pipeline file, in the order of the file.
// Its text has a line for each error.
type fileErrors struct {
	name string
	list []fileError
	more int // errors that are not in the list
}

func (e *fileErrors) Error() string {
	var lines []string
	for _, err := range e.list {
		line := fmt.Sprintf("%s:%d:%d: ", e.name, err.line, err.column)
		if err.path != "" {
			line += err.path + ": "
		}
		lines = append(lines, line+err.msg)
	}
	if e.more > 0 {
		lines = append(lines, fmt.Sprintf("%s: and %d more errors", e.name, e.more))
	}
	return strings.Join(lines, "\n")
}

// entries are the errors in the form of JSON.
func (e *fileErrors) entries() []checkError {
	var out []checkError
	for _, err := range e.list {
		out = append(out, checkError{err.line, err.column, err.path, err.msg})
	}
	return out
}

// A node is a value of the file with its place. Its text is the string, with the
// references to the environment filled in once it is bound, or the literal.
type node struct {
	kind   kind
	text   string
	kids   []*node // elements or members
	parent *node
	key    string // in an object
	index  int    // in a list
	offset int    // of the value, and of the key in an object
	keyAt  int
	bad    bool // an error names it: nothing more need be said
}

// A kind of value, as errors name it.
type kind string

const (
	kindObject kind = "an object"
	kindList   kind = "a list"
	kindString kind = "a string"
	kindNumber kind = "a number"
	kindBool   kind = "true or false"
	kindNull   kind = "null"
)

// child returns the member of that name, or nil.
func (n *node) child(name string) *node {
	for _, kid := range n.kids {
		if n.kind == kindObject && kid.key == name {
			return kid
		}
	}
	return nil
}

// sound returns the member of that name if it is there and nothing is wrong with it.
func (n *node) sound(name string) *node {
	if kid := n.child(name); kid != nil && !kid.bad {
		return kid
	}
	return nil
}

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func (n *node) path() string {
	switch {
	case n.parent == nil:
		return ""
	case n.parent.kind == kindList:
		return fmt.Sprintf("%s[%d]", n.parent.path(), n.index)
	case !variableName.MatchString(n.key) || len(n.key) > maxQuoted:
		return fmt.Sprintf("%s[%s]", n.parent.path(), quote(n.key))
	}
	return strings.TrimPrefix(n.parent.path()+"."+n.key, ".")
}

// A reader turns one file into a Pipeline: syntax, then a tree of nodes, then the
// model, then what the model must keep to.
type reader struct {
	data  []byte
	env   func(string) (string, bool)
	dec   *json.Decoder
	nodes map[*Component]*node
	added int // bytes that the environment has added
	errs  fileErrors
}

func (r *reader) errorf(n *node, format string, args ...any) {
	n.bad = true
	if r.full() {
		r.errs.more++
		return
	}
	r.errorAt(n.offset, n.path(), format, args...)
}

func (r *reader) missing(n *node, name, format string, args ...any) {
	r.errorAt(n.offset, (&node{parent: n, key: name}).path(), format, args...)
}

func (r *reader) errorAt(offset int, path, format string, args ...any) {
	if r.full() {
		r.errs.more++
		return
	}
	r.errs.list = append(r.errs.list, fileError{offset: offset, path: path, msg: fmt.Sprintf(format, args...)})
}

func (r *reader) full() bool { return len(r.errs.list) >= maxErrors }

func (r *reader) sortedErrors() *fileErrors {
	e := &r.errs
	slices.SortStableFunc(e.list, func(a, b fileError) int { return cmp.Compare(a.offset, b.offset) })
	if n := len(e.list) - maxShown; n > 0 {
		e.list, e.more = e.list[:maxShown], e.more+n
	}
	for i := range e.list {
		before := r.data[:e.list[i].offset]
		e.list[i].line = bytes.Count(before, []byte("\n")) + 1
		e.list[i].column = utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1
	}
	return e
}

func (r *reader) line(offset int) int {
	if r.full() {
		return 0 // nobody sees it
	}
	return bytes.Count(r.data[:offset], []byte("\n")) + 1
}

const maxQuoted = 80

// quote makes text from the file safe and short enough to show.
func quote(s string) string { return strconv.Quote(clip(s)) }

func clip(s string) string {
	count := 0
	for i := range s {
		if count == maxQuoted {
			return s[:i] + "…"
		}
		count++
	}
	return s
}

// checkSyntax leaves to encoding/json what JSON is.
func (r *reader) checkSyntax() bool {
	switch {
	case len(r.data) > maxFileSize:
		r.errorAt(0, "", "the file is larger than 4 MiB")
	case bytes.HasPrefix(r.data, []byte("\ufeff")):
		r.errorAt(0, "", "the file begins with a byte order mark, save it as UTF-8 without one")
	case !utf8.Valid(r.data):
		r.errorAt(bytes.IndexRune(r.data, utf8.RuneError), "", "the file is not UTF-8")
	case len(bytes.TrimSpace(r.data)) == 0:
		r.errorAt(0, "", "the file is empty")
	default:
		var syntax *json.SyntaxError
		if err := json.Unmarshal(r.data, new(json.RawMessage)); errors.As(err, &syntax) {
			at, msg := r.explain(syntax)
			r.errorAt(at, "", "%s", msg)
		}
	}
	return len(r.errs.list) == 0
}

// explain returns where a syntax error is, and its text with the usual cause.
func (r *reader) explain(syntax *json.SyntaxError) (at int, msg string) {
	msg = syntax.Error()
	if strings.HasPrefix(msg, "unexpected end") {
		return len(r.data), "unexpected end of file: a closing bracket or quote is missing"
	}
	at = int(syntax.Offset) - 1
	before := bytes.TrimSpace(r.data[:at])
	c, _ := utf8.DecodeRune(r.data[at:])
	if _, rest, ok := strings.Cut(msg, "' "); ok && c >= utf8.RuneSelf {
		msg = fmt.Sprintf("invalid character %q %s", c, rest) // encoding/json shows its first byte
	}
	switch {
	case strings.Contains(msg, " in "): // a string, a number, true: the text says it
	case c == '/' || c == '#':
		msg += ": JSON has no comments"
	case c == '\'' || c == '“' || c == '”' || c == '‘' || c == '’':
		msg += `: strings are in "double quotes"`
	case (c == '}' || c == ']') && bytes.HasSuffix(before, []byte(",")):
		msg += ": remove the comma before it"
	case strings.HasSuffix(msg, "after top-level value"):
		msg += ": the file must be one object"
	case strings.HasSuffix(msg, "after array element"), strings.HasSuffix(msg, "after object key:value pair"):
		msg += ": is a comma missing?"
	case len(before) == 0:
		msg += ": a pipeline file is JSON and begins with {"
	}
	return at, msg
}

// tree reads the next value into n, whose place in its parent is known. It is
// false after an error that ends the reading.
func (r *reader) tree(n *node, depth int) bool {
	n.offset = r.nextOffset()
	token, err := r.dec.Token()
	if err == nil && depth > maxDepth {
		err = fmt.Errorf("more than %d levels of lists and objects", maxDepth)
	}
	if err != nil {
		r.errorAt(n.offset, "", "%v", err)
		return false
	}
	switch t := token.(type) {
	case string:
		n.kind, n.text = kindString, t
	case json.Number:
		n.kind, n.text = kindNumber, t.String()
	case bool:
		n.kind, n.text = kindBool, strconv.FormatBool(t)
	case nil:
		n.kind = kindNull
	case json.Delim:
		n.kind = kindObject
		if t == '[' {
			n.kind = kindList
		}
		return r.members(n, depth)
	}
	return true
}

func (r *reader) members(n *node, depth int) bool {
	first := make(map[string]int) // key to offset
	for i := 0; r.dec.More(); i++ {
		kid := &node{parent: n, index: i, keyAt: r.nextOffset()}
		if n.kind == kindObject {
			token, _ := r.dec.Token() // checkSyntax has seen that it is a string
			kid.key, _ = token.(string)
		}
		if !r.tree(kid, depth+1) {
			return false
		}
		if n.kind == kindObject {
			if offset, ok := first[kid.key]; ok {
				r.errorAt(kid.keyAt, kid.path(), "duplicate key, first on line %d", r.line(offset))
				continue
			}
			first[kid.key] = kid.keyAt
		}
		n.kids = append(n.kids, kid)
	}
	_, _ = r.dec.Token()
	return true
}

// nextOffset is where the next token begins.
func (r *reader) nextOffset() int {
	at := int(r.dec.InputOffset())
	return len(r.data) - len(bytes.TrimLeft(r.data[at:], " \t\r\n,:"))
}

// checkSize comes before the model is made, which costs more than the tree.
func (r *reader) checkSize(root *node) bool {
	spec := root.child("spec")
	if spec == nil {
		return true
	}
	count := 0
	for _, name := range []string{"sources", "processors", "sinks"} {
		if list := spec.child(name); list != nil && list.kind == kindList {
			count += len(list.kids)
		}
	}
	if count > maxComponents {
		r.errorf(spec, "%d components, at most %d are allowed", count, maxComponents)
	}
	return count <= maxComponents
}

// bind sets what target points to, and reports what does not fit. Empty lists and
// maps stay nil, as if they were not in the file.
func (r *reader) bind(n *node, target any) {
	switch t := target.(type) {
	case *string:
		*t = r.text(n)
	case *int:
		*t = r.number(n)
	case *bool:
		*t = r.want(n, kindBool) && n.text == "true"
	case **bool:
		if r.want(n, kindBool) {
			*t = new(n.text == "true")
		}
	case *Duration:
		*t = r.duration(n)
	case *[]string:
		if r.wantStrings(n) && len(n.kids) > 0 {
			*t = make([]string, len(n.kids))
			for i, kid := range n.kids {
				(*t)[i] = r.text(kid)
			}
		}
	case *[]Component:
		if r.want(n, kindList) && len(n.kids) > 0 {
			*t = make([]Component, len(n.kids))
			for i, kid := range n.kids {
				r.nodes[&(*t)[i]] = kid
				r.bind(kid, &(*t)[i])
			}
		}
	case *map[string]string:
		bindMap(r, n, t, r.text)
	case *map[string]any:
		bindMap(r, n, t, r.config)
	default:
		r.object(n, reflect.ValueOf(target).Elem())
	}
}

func bindMap[T any](r *reader, n *node, target *map[string]T, value func(*node) T) {
	if !r.want(n, kindObject) || len(n.kids) == 0 {
		return
	}
	*target = make(map[string]T, len(n.kids))
	for _, kid := range n.kids {
		(*target)[kid.key] = value(kid)
	}
}

func (r *reader) want(n *node, k kind) bool {
	switch {
	case n.kind == k:
		return true
	case k == kindString && (n.kind == kindNumber || n.kind == kindBool):
		r.errorf(n, "must be %s, not %s: write %s", k, n.kind, quote(n.text))
	default:
		r.errorf(n, "must be %s, not %s", k, n.kind)
	}
	return false
}

func (r *reader) wantStrings(n *node) bool {
	switch n.kind {
	case kindList:
		return true
	case kindString:
		words := strings.Fields(n.text)
		if len(words) == 0 || len(words) > 10 {
			words = []string{"..."}
		}
		for i := range words {
			words[i] = quote(words[i])
		}
		r.errorf(n, "must be a list of strings, such as [%s]", strings.Join(words, ", "))
	default:
		r.errorf(n, "must be a list of strings, not %s", n.kind)
	}
	return false
}

func (r *reader) number(n *node) int {
	if !r.want(n, kindNumber) {
		return 0
	}
	i, err := strconv.ParseInt(n.text, 10, 32)
	if errors.Is(err, strconv.ErrRange) {
		r.errorf(n, "%s is out of range", clip(n.text))
	} else if err != nil {
		r.errorf(n, "must be a whole number such as 3, not %s", clip(n.text))
	}
	return int(i)
}

func (r *reader) duration(n *node) Duration {
	if n.kind == kindNumber {
		r.errorf(n, "must be a string with a unit, such as \"5s\", not a number")
		return 0
	}
	text := r.text(n)
	if n.bad {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		r.errorf(n, "bad duration %s, write it like \"500ms\", \"5s\" or \"1m30s\"", quote(text))
	} else if d < minDuration || d > maxDuration {
		r.errorf(n, "must be from 1ms to 24h, not %s", quote(text))
	}
	return Duration(d)
}

// config keeps the value as it is, with the strings in it filled in.
func (r *reader) config(n *node) any {
	switch n.kind {
	case kindString:
		return r.text(n)
	case kindNumber:
		return json.Number(n.text)
	case kindBool:
		return n.text == "true"
	case kindList:
		list := make([]any, len(n.kids))
		for i, kid := range n.kids {
			list[i] = r.config(kid)
		}
		return list
	case kindObject:
		object := make(map[string]any, len(n.kids))
		for _, kid := range n.kids {
			object[kid.key] = r.config(kid)
		}
		return object
	}
	return nil
}

// A level is an object of the file that has fields.
type level struct {
	name   string
	model  reflect.Type
	fields []string // by index in the struct, where what JSON does not know comes last
}

var levels = []level{
	newLevel[Pipeline]("at the top level"),
	newLevel[Metadata]("in metadata"),
	newLevel[Spec]("in spec"),
	newLevel[Component]("in a component"),
}

func newLevel[T any](name string) level {
	l := level{name: name, model: reflect.TypeFor[T]()}
	for i := range l.model.NumField() {
		if field, _, _ := strings.Cut(l.model.Field(i).Tag.Get("json"), ","); field != "-" {
			l.fields = append(l.fields, field)
		}
	}
	return l
}

// object binds the fields of a struct and applies the rules in its tags.
func (r *reader) object(n *node, v reflect.Value) {
	if !r.want(n, kindObject) {
		return
	}
	l := &levels[slices.IndexFunc(levels, func(l level) bool { return l.model == v.Type() })]
	for _, kid := range n.kids {
		i := slices.Index(l.fields, kid.key)
		if i < 0 {
			r.unknownField(n, kid, l)
			continue
		}
		r.bind(kid, v.Field(i).Addr().Interface())
		if rule := rules[l.model.Field(i).Tag.Get("check")]; rule != nil {
			r.apply(rule, kid)
		}
	}
	for i, name := range l.fields {
		tag := l.model.Field(i).Tag
		if strings.HasSuffix(tag.Get("json"), ",omitempty") || n.child(name) != nil {
			continue
		}
		if rule := rules[tag.Get("check")]; rule != nil {
			r.missing(n, name, "is missing, it %v", rule(""))
		} else {
			r.missing(n, name, "is missing")
		}
	}
}

func (r *reader) apply(rule func(string) error, n *node) {
	if n.bad {
		return
	}
	if n.kind == kindList || n.kind == kindObject {
		for _, kid := range n.kids {
			r.apply(rule, kid)
		}
	} else if err := rule(n.text); err != nil {
		r.errorf(n, "%v", err)
	}
}

// unknownField reports kid and gives it its right name, if there is one, so that
// this field is not reported as missing too.
func (r *reader) unknownField(n, kid *node, l *level) {
	kid.bad = true
	if r.full() {
		r.errs.more++
		return
	}
	right, place := suggest(kid.key, l)
	hint := ""
	if right != "" {
		hint = fmt.Sprintf(", did you mean %q?", right)
	} else if place != "" {
		hint = ", it belongs " + place
	}
	r.errorAt(kid.keyAt, kid.path(), "unknown field %s%s", quote(kid.key), hint)
	if right != "" && n.child(right) == nil {
		kid.key = right
	}
}

// suggest returns the field of l that name stands for, or where a field of that
// name belongs, or nothing.
func suggest(name string, l *level) (right, place string) {
	if name == "name" && l.model == reflect.TypeFor[Component]() {
		return "id", ""
	}
	var places []string
	for _, other := range levels {
		if slices.Contains(other.fields, name) {
			places = append(places, other.name)
		}
	}
	if places != nil {
		return "", strings.Join(places, " or ")
	}
	return nearest(name, l.fields), ""
}

// nearest returns the known name that is most like name, if one is like it at all.
func nearest(name string, known []string) string {
	plain := func(s string) string { return strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(s)) }
	want := plain(clip(name))
	best, limit := "", min(len(want)/2, 3)+1
	for _, k := range known {
		if k := plain(k); max(len(want)-len(k), len(k)-len(want)) >= limit {
			continue
		}
		if d := distance(want, plain(k)); d < limit {
			best, limit = k, d
		}
	}
	return best
}

// distance is the number of bytes to insert, delete and replace to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// text returns the string of n with ${NAME}, ${NAME:-default} and ${NAME:?message}
// filled in and $$ made $. Any other $ stays, so that a shell command can be
// written as it is. The default and the message are literal up to the next }.
func (r *reader) text(n *node) string {
	if !r.want(n, kindString) {
		return ""
	}
	if r.added > maxFileSize {
		n.bad = true // an error that says so is there
		return ""
	}
	var b strings.Builder
	rest := n.text
	for {
		before, after, found := strings.Cut(rest, "$")
		b.WriteString(before)
		if !found {
			break
		}
		switch {
		case strings.HasPrefix(after, "$"):
			b.WriteByte('$')
			rest = after[1:]
		case strings.HasPrefix(after, "{"):
			var ref string
			if ref, rest, found = strings.Cut(after[1:], "}"); !found {
				r.errorf(n, "%s has no closing }, write $${ for the text itself", quote("$"+after))
				return ""
			}
			b.WriteString(r.lookup(n, ref))
		default:
			b.WriteByte('$')
			rest = after
		}
	}
	n.text = b.String()
	if strings.Contains(n.text, "\x00") {
		r.errorf(n, "must not contain a NUL character")
	}
	return n.text
}

var reference = regexp.MustCompile(`(?s)^([A-Za-z_][A-Za-z0-9_]*)(?:(:-|:\?)(.*))?$`)

func (r *reader) lookup(n *node, ref string) string {
	m := reference.FindStringSubmatch(ref)
	if m == nil || strings.Contains(m[3], "${") {
		why := "is not a reference"
		if m != nil {
			why = "holds another reference"
		}
		r.errorf(n, "%s %s, write ${NAME}, ${NAME:-default}, ${NAME:?message}, or $${ for the text itself", quote("${"+ref+"}"), why)
		return ""
	}
	name, op, arg := m[1], m[2], m[3]
	if r.added > maxFileSize {
		return ""
	}
	value, ok := r.env(name)
	switch {
	case op == ":-" && value == "":
		value = arg
	case op == ":?" && value == "":
		if arg != "" {
			arg = ": " + quote(arg)
		}
		r.errorf(n, "${%s} is not set or empty%s", clip(name), arg)
	case !ok:
		r.errorf(n, "${%s} is not set in the environment, write ${%[1]s:-default} for a default, $${%[1]s} for the text itself", clip(name))
	}
	if r.added += len(value); r.added > maxFileSize {
		r.errorf(n, "the environment adds more than 4 MiB to the file")
	}
	return value
}

// rules are what the text of a field must keep to. Their errors end a sentence
// that begins with the field's path.
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

var namePattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,63}$`)

func checkName(text string) error {
	switch {
	case text == "":
		return errors.New("must be a name of letters, digits, dots, _ and -")
	case text == "." || text == ".." || !namePattern.MatchString(text):
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

// checkImage refuses what the engine's command line would take for something else.
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

var portPattern = regexp.MustCompile(`^(?:(?:[0-9.]+|\[[0-9A-Fa-f:.]+\]):)?([0-9]+):([0-9]+)(?:/(?:tcp|udp|sctp))?$`)

func checkPort(text string) error {
	m := portPattern.FindStringSubmatch(text)
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

// healthPortName is what stands in a health_check for the component's HEALTH_PORT.
var healthPortName = regexp.MustCompile(`\$(HEALTH_PORT\b|\{HEALTH_PORT\})`)

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
	text = healthPortName.ReplaceAllLiteralString(text, "1") // which any port is
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

// words splits a line at its spaces. What is in single or double quotes stays together
// and as it is.
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

// check reports what the fields must keep to among themselves. It passes over
// what bind has found to be wrong.
func (r *reader) check(p *Pipeline, root *node) {
	all := p.components()
	if spec := root.sound("spec"); spec != nil && len(all) == 0 &&
		!slices.ContainsFunc(spec.kids, func(kid *node) bool { return kid.bad }) {
		r.errorf(spec, "needs at least one component in sources, processors or sinks")
	}
	for role, list := range [][]Component{p.Spec.Sources, p.Spec.Processors, p.Spec.Sinks} {
		for i := range list {
			list[i].Role = Role(role)
		}
	}
	for _, c := range all {
		if n := r.nodes[c]; n.kind == kindObject {
			r.checkCommand(n)
			r.checkEnv(n)
			r.checkPolicies(n)
		}
	}
	r.checkCycles(all, r.checkReferences(all))
}

func (r *reader) checkCommand(n *node) {
	command, image := n.child("command"), n.child("image")
	switch {
	case command == nil && image == nil:
		r.missing(n, "command", "is missing")
	case command != nil && image != nil:
		r.errorf(image, "cannot be given beside command")
	case image != nil:
		if dir := n.sound("working_dir"); dir != nil && !strings.HasPrefix(dir.text, "/") {
			r.errorf(dir, "must be an absolute path in the container, not %s", quote(dir.text))
		}
		return
	case command.bad:
	case len(command.kids) == 0:
		r.errorf(command, "must not be empty")
	default:
		r.apply(checkPath, command.kids[0])
	}
	for _, name := range []string{"volumes", "ports", "user"} {
		if kid := n.sound(name); kid != nil && image == nil {
			r.errorf(kid, "has no effect without image")
		}
	}
}

func (r *reader) checkPolicies(n *node) {
	if n.child("health_check") == nil {
		for _, name := range []string{"health_interval", "health_timeout", "health_retries"} {
			if kid := n.sound(name); kid != nil {
				r.errorf(kid, "has no effect without health_check")
			}
		}
	}
	policy, most := n.child("restart_policy"), n.sound("max_restarts")
	if most != nil && (policy == nil || policy.text == restartNo) {
		r.errorf(most, "has no effect unless restart_policy is on-failure or always")
	}
}

// checkEnv refuses what is no variable, what flowctl sets, and what is set twice.
// Only config may repeat a variable of the others, as it gives way to them.
func (r *reader) checkEnv(n *node) {
	offsets := make(map[string]int)
	for _, list := range []string{"env", "env_files", "config"} {
		vars := n.sound(list)
		if vars == nil {
			continue
		}
		if list == "config" {
			clear(offsets)
		}
		for _, kid := range vars.kids {
			name := kid.key
			if list == "config" {
				name = strings.ToUpper(name)
			}
			offset, taken := offsets[name]
			switch {
			case r.full():
				r.errs.more++
			case !variableName.MatchString(kid.key):
				r.errorAt(kid.keyAt, kid.path(), "%s", notVariable(kid.key))
			case strings.HasPrefix(name, "FLOWCTL_") && name != "FLOWCTL_HEARTBEAT_INTERVAL":
				r.errorAt(kid.keyAt, kid.path(), "%s is set by flowctl", clip(name))
			case taken:
				r.errorAt(kid.keyAt, kid.path(), "%s is set on line %d already", clip(name), r.line(offset))
			case list == "config" && kid.kind == kindNull:
				r.errorf(kid, "must not be null")
			default:
				offsets[name] = kid.keyAt
			}
		}
	}
}

func notVariable(key string) string {
	msg := quote(key) + " is no name for a variable: use letters, digits and _, with no digit first"
	if better := strings.NewReplacer("-", "_", ".", "_").Replace(key); len(key) <= maxQuoted && variableName.MatchString(better) {
		msg += fmt.Sprintf(", such as %q", better)
	}
	return msg
}

// A waitEdge is an entry of inputs or depends_on.
type waitEdge struct {
	on int   // index of the component
	at *node // the entry
}

// checkReferences returns what each component waits for.
func (r *reader) checkReferences(all []*Component) [][]waitEdge {
	index := make(map[string]int, len(all))
	sure := true // false when an id is wrong: what refers to it may be right
	for i, c := range all {
		id := r.nodes[c].sound("id")
		if id == nil {
			sure = false
		} else if first, ok := index[c.ID]; ok {
			r.errorf(id, "duplicate id %s, first on line %d", quote(c.ID), r.line(r.nodes[all[first]].child("id").offset))
		} else {
			index[c.ID] = i
		}
	}
	edges := make([][]waitEdge, len(all))
	for i, c := range all {
		for _, name := range []string{"inputs", "depends_on"} {
			list := r.nodes[c].sound(name)
			if list == nil {
				continue
			}
			if name == "inputs" && c.Role == roleSource && len(list.kids) > 0 {
				r.errorf(list, "a source has no inputs")
				continue
			}
			listed := make(map[string]bool)
			for _, kid := range list.kids {
				on, known := index[kid.text]
				switch {
				case kid.bad:
				case listed[kid.text]:
					r.errorf(kid, "%s is listed twice", quote(kid.text))
				case kid.text == c.ID:
					r.errorf(kid, "%s is this component itself", quote(kid.text))
				case !known && sure:
					r.errorf(kid, "unknown component %s%s", quote(kid.text), r.likely(kid.text, all))
				case known && name == "inputs" && all[on].Role == roleSink:
					r.errorf(kid, "%s is a sink, which has no output", quote(kid.text))
				case known:
					edges[i] = append(edges[i], waitEdge{on, kid})
				}
				listed[kid.text] = true
			}
		}
	}
	return edges
}

func (r *reader) likely(id string, all []*Component) string {
	if r.full() {
		return ""
	}
	var ids []string
	for _, c := range all {
		ids = append(ids, c.ID)
	}
	if near := nearest(id, ids); near != "" {
		return fmt.Sprintf(", did you mean %q?", near)
	}
	return ""
}

// checkCycles reports each entry that closes a cycle when the components are
// walked in the order of the file.
func (r *reader) checkCycles(all []*Component, edges [][]waitEdge) {
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
				r.errorf(edge.at, "cycle, each waits for the next: %s", r.cycle(all, path[place[edge.on]-1:]))
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

func (r *reader) cycle(all []*Component, members []int) string {
	if r.full() {
		return ""
	}
	var b strings.Builder
	for _, i := range members {
		fmt.Fprintf(&b, "%s -> ", clip(all[i].ID))
	}
	return b.String() + clip(all[members[0]].ID)
}
