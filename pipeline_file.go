package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"
)

// Reading a pipeline file: strict JSON, references to the environment, and the list of
// all errors with their places.

// Bounds of a file. Errors are collected up to maxErrors, so that a hostile file costs
// little; then the first maxShown in the order of the file are shown.
const (
	maxFileSize = 4 << 20 // bytes, and as many again from the environment
	maxDepth    = 100     // of lists and objects in each other
	maxErrors   = 1000
	maxShown    = 100
)

// A fileError is one thing that is wrong in a pipeline file.
type fileError struct {
	offset int

	Line    int    `json:"line,omitempty"`   // from 1; 0 where the file could not be read
	Column  int    `json:"column,omitempty"` // from 1, in characters
	Path    string `json:"path,omitempty"`   // such as spec.sources[0].id; "" for the file as a whole
	Message string `json:"message"`
}

// fileErrors is all that is wrong with a pipeline file, in its order. Its text has a line for each.
type fileErrors struct {
	name string
	list []fileError
	more int // errors that are not in the list

	warnings []warning // of fields that have no effect
}

func (e *fileErrors) Error() string {
	var lines []string
	for _, err := range e.list {
		line := fmt.Sprintf("%s:%d:%d: ", e.name, err.Line, err.Column)
		if err.Path != "" {
			line += err.Path + ": "
		}
		lines = append(lines, line+err.Message)
	}
	if e.more > 0 {
		lines = append(lines, fmt.Sprintf("%s: and %d more errors", e.name, e.more))
	}
	return strings.Join(lines, "\n")
}

// readPipeline reads the pipeline file at path; env is asked for the variables
// that the file refers to, and may give a value to assume for one that is not set. Relative paths in the file become absolute, from the
// folder that path is in, or from the working directory when path is no file on a
// disk (a pipe, /dev/stdin). What is wrong with the file's content is a *fileErrors;
// more rules than those of the model may add to it.
func readPipeline(path string, env func(string) (string, bool), more ...func(p *Pipeline, f findings)) (*Pipeline, error) {
	if ext := filepath.Ext(path); strings.EqualFold(ext, ".yaml") || strings.EqualFold(ext, ".yml") {
		return nil, fmt.Errorf("%s: a pipeline file is JSON; this turns YAML into it: %s",
			path, yamlCommand(path, strings.TrimSuffix(path, ext)+".json"))
	}
	data, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read pipeline file: %w", err)
	}
	p, err := parsePipeline(data, path, env, more...)
	if err != nil {
		return nil, err
	}
	folder, err := filepath.Abs(folderOf(path))
	if err != nil {
		return nil, fmt.Errorf("cannot find the folder of %s: %v", path, err)
	}
	p.resolve(folder)
	p.Text = string(data)
	return p, nil
}

// standardInput is the file that - stands for on the command line.
const standardInput = "/dev/stdin"

// folderOf returns the folder that the paths in a pipeline file are relative to.
func folderOf(file string) string {
	if strings.HasPrefix(file, "/dev/") || fromStandardInput(file) {
		return "."
	}
	return filepath.Dir(file)
}

// readFile reads at most one byte more than maxFileSize, by which parsePipeline sees that
// there is more.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, syscall.ENXIO) && path == standardInput { // a socket, which cannot be opened
		return io.ReadAll(io.LimitReader(os.Stdin, maxFileSize+1))
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return nil, fmt.Errorf("%s is a folder", path)
	}
	return io.ReadAll(io.LimitReader(f, maxFileSize+1))
}

// resolve makes the paths in p absolute, also that of the program of an exec: check. The name of a
// program without a slash stays: it is looked up in PATH at each start.
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

// fromStandardInput tells whether file is no plain file, and cannot be read a second time.
func fromStandardInput(file string) bool {
	info, err := os.Stat(file)
	return err == nil && !info.Mode().IsRegular()
}

// A reader turns one file into a Pipeline: syntax, then a tree of nodes, then the model and its rules.
type reader struct {
	data   []byte
	env    func(string) (string, bool)
	dec    *json.Decoder
	nodes  map[any]*node // by pointer into the model
	added  int           // bytes that the environment has added
	taken  []assumption
	former []formerNote
	errs   fileErrors
}

// A formerNote says what takes the place of a field that has no effect.
type formerNote struct {
	node    *node
	instead string
}

// An assumption is that a variable which is not set has a value in a unit of systemd.
type assumption struct {
	node        *node
	name, value string
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
	offset int    // of the value
	keyAt  int    // offset of the key, in an object
	bad    bool   // an error names it already
	raw    string // text as it is in the file, of a string
	ref    string // raw where that has references; their values can be secrets, which no error shows
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

// literal returns the text of n as it is in the file, "" for none.
func (n *node) literal() string {
	if n == nil {
		return ""
	}
	return n.text
}

// path returns the JSON path of n, "" for the root and for none.
func (n *node) path() string {
	switch {
	case n == nil || n.parent == nil:
		return ""
	case n.parent.kind == kindList:
		return fmt.Sprintf("%s[%d]", n.parent.path(), n.index)
	case !variableName().MatchString(n.key) || len(n.key) > maxQuoted:
		return fmt.Sprintf("%s[%s]", n.parent.path(), quote(n.key))
	}
	return strings.TrimPrefix(n.parent.path()+"."+n.key, ".")
}

// parsePipeline reads a pipeline from the content of a file. The name is for the
// errors, which are all returned at once as a *fileErrors; paths stay as written.
func parsePipeline(data []byte, name string, env func(string) (string, bool), more ...func(p *Pipeline, f findings)) (*Pipeline, error) {
	r := &reader{data: data, env: env, nodes: make(map[any]*node)}
	r.errs.name = name
	p := new(Pipeline)
	if r.checkSyntax() {
		r.dec = json.NewDecoder(bytes.NewReader(data))
		r.dec.UseNumber()
		if root := new(node); r.tree(root, 0) && r.checkSize(root) {
			r.bind(root, p)
			p.check(r)
			for _, check := range more {
				check(p, r)
			}
		}
	}
	former := r.formerWarnings()
	if len(r.errs.list) > 0 {
		r.errs.warnings = former
		return nil, r.sortedErrors()
	}
	p.Notes = append(former, r.notes(p)...)
	return p, nil
}

// checkSyntax reports what keeps the file from being JSON; encoding/json knows the syntax.
func (r *reader) checkSyntax() bool {
	switch {
	case len(r.data) > maxFileSize:
		r.errorAt(0, nil, "the file is larger than 4 MiB")
	case bytes.HasPrefix(r.data, []byte("\ufeff")):
		r.errorAt(0, nil, "the file begins with a byte order mark, save it as UTF-8 without one")
	case !utf8.Valid(r.data):
		r.errorAt(bytes.IndexRune(r.data, utf8.RuneError), nil, "the file is not UTF-8")
	case len(bytes.TrimSpace(r.data)) == 0:
		r.errorAt(0, nil, "the file is empty")
	default:
		if syntax, wrong := errors.AsType[*json.SyntaxError](json.Unmarshal(r.data, new(json.RawMessage))); wrong {
			at, msg := r.explain(syntax)
			r.errorAt(at, nil, "%s", msg)
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

// tree reads the next value into n. It is false after an error that ends the reading.
func (r *reader) tree(n *node, depth int) bool {
	n.offset = r.nextOffset()
	token, err := r.dec.Token()
	if err == nil && depth > maxDepth {
		err = fmt.Errorf("more than %d levels of lists and objects", maxDepth)
	}
	if err != nil {
		r.errorAt(n.offset, nil, "%v", err)
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
				r.errorAt(kid.keyAt, kid, "duplicate key, first on line %d", r.lineOf(offset))
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

// checkSize reports too many components, before a model of them takes memory.
func (r *reader) checkSize(root *node) bool {
	spec := root.child("spec")
	if spec == nil {
		return true
	}
	count := 0
	for _, name := range []string{"sources", "processors", "sinks", "services"} {
		if list := spec.child(name); list != nil && list.kind == kindList {
			count += len(list.kids)
		}
	}
	if count > maxComponents {
		r.errorf(spec, "%d components, at most %d are allowed", count, maxComponents)
	}
	return count <= maxComponents
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
		if r.withoutEffect(kid, l) {
			continue
		}
		i := slices.Index(l.fields, kid.key)
		if i < 0 {
			if right := r.unknownField(n, kid, l); right >= 0 {
				r.nodes[v.Field(right).Addr().Interface()] = kid
			}
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
			r.missingField(n, name, "is missing, it %v", rule(""))
		} else {
			r.missingField(n, name, "is missing")
		}
	}
}

// withoutEffect tells whether kid is a field of the predecessor that had no effect there, which is a warning.
func (r *reader) withoutEffect(kid *node, l *level) bool {
	instead, former := formerFields[l.model][kid.key]
	if l.model == reflect.TypeFor[Component]() {
		switch kid.key {
		case "replicas": // one ran of each component, whatever it said
			former = kid.text == "1" || kid.parent.parent.parent.child("driver") != nil
		case "health_check":
			if former = strings.HasPrefix(kid.text, "/"); former {
				instead = wholeHealthCheck(kid.text, kid.parent.child("health_port").literal())
			}
		}
	}
	if former && len(r.former) < maxErrors {
		r.former = append(r.former, formerNote{kid, instead})
	}
	return former
}

// unknownField reports kid. Where n lacks the field that it seems to stand for, kid gets
// its name, so that it is not reported as missing too; the result is its index, else -1.
func (r *reader) unknownField(n, kid *node, l *level) int {
	kid.bad = true
	if r.full() {
		r.errs.more++
		return -1
	}
	right, hint := suggest(kid.key, l)
	if right != "" {
		hint = fmt.Sprintf(", did you mean %q?", right)
	}
	r.errorAt(kid.keyAt, kid, "unknown field %s%s", quote(kid.key), hint)
	if right == "" || n.child(right) != nil {
		return -1
	}
	kid.key = right
	return slices.Index(l.fields, right)
}

// suggest returns the field of l that name stands for, or else a hint where name belongs, or nothing.
func suggest(name string, l *level) (right, hint string) {
	plain := strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(clip(name)))
	if l.model == reflect.TypeFor[Component]() {
		for field, names := range foreignFields {
			if slices.Contains(names, plain) {
				return field, ""
			}
		}
	}
	if hint := foreignHints[l.model][plain]; hint != "" {
		return "", hint
	}
	var places []string
	for _, other := range levels {
		if slices.Contains(other.fields, name) {
			places = append(places, other.name)
		}
	}
	if places != nil {
		return "", ", it belongs " + strings.Join(places, " or ")
	}
	return nearest(name, l.fields), ""
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
		r.errorf(n, "%v", n.withoutValue(err, rule))
	}
}

// bind sets what target points to, and reports what does not fit. Empty lists and
// maps stay nil, as if they were not in the file.
func (r *reader) bind(n *node, target any) {
	r.nodes[target] = n
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
				r.bind(kid, &(*t)[i])
			}
		}
	case *map[string]string:
		bindMap(r, n, t, r.text)
	case *map[string]any:
		bindMap(r, n, t, r.configVariable)
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
	case k == kindString && n.kind == kindObject && n.parent.kind == kindList && n.entry() != "":
		r.errorf(n, "must be %s, not %s: write %s", k, n.kind, quote(n.entry()))
	default:
		r.errorf(n, "must be %s, not %s", k, n.kind)
	}
	return false
}

// entry returns the text that n, an object of the predecessor in a list, stands for, "" for none.
func (n *node) entry() string {
	return entryOf(n.parent.key, func(name string) string { return n.child(name).literal() })
}

func (r *reader) wantStrings(n *node) bool {
	switch n.kind {
	case kindList:
		return true
	case kindString:
		r.errorf(n, "must be a list of strings, such as [%s]", likelyList(n))
	default:
		r.errorf(n, "must be a list of strings, not %s", n.kind)
	}
	return false
}

// likelyList returns the strings, quoted, of the list that the text of n is written in the place of.
func likelyList(n *node) string {
	command := n.parent.child("command")
	if n.key == "args" && command != nil && len(command.kids) > 0 && shellCommand().MatchString(command.kids[len(command.kids)-1].text) {
		return quote(n.text)
	}
	return listOf(n.text, n.key == "command")
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
	d, err := parseDuration(text)
	if err != nil {
		r.errorf(n, "%v", n.withoutValue(err, func(text string) error { _, err := parseDuration(text); return err }))
	}
	return d
}

// withoutValue returns err, of rule, in the words that rule has for the references themselves, if
// it has any.
func (n *node) withoutValue(err error, rule func(string) error) error {
	if n.ref == "" || n.text == "" {
		return err
	}
	if err := rule(n.ref); err != nil && strings.Contains(err.Error(), quote(n.ref)) {
		return err
	}
	return fmt.Errorf("the value of %s cannot be used here", quote(n.ref))
}

// configVariable is config for what becomes an environment variable.
func (r *reader) configVariable(n *node) any {
	if n.kind == kindNull {
		r.errorf(n, "must not be null")
	}
	return r.config(n)
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
	n.raw = n.text
	referring := false
	n.text = dollars().ReplaceAllStringFunc(n.raw, func(text string) string {
		ref, whole := strings.CutSuffix(text, "}")
		switch {
		case text == "$$":
			return "$"
		case !whole:
			r.errorf(n, "%s has no closing }, write $${ for the text itself", quote(text))
			return ""
		}
		referring = true
		return r.lookup(n, ref[len("${"):])
	})
	if referring {
		n.ref = n.raw
	}
	if strings.Contains(n.text, "\x00") {
		r.errorf(n, "must not contain a NUL character")
	}
	return n.text
}

var (
	dollars   = pattern(`\$(?:\$|\{[^}]*\}?)`) // $$, and a reference, which may lack its end
	reference = pattern(`(?s)^([A-Za-z_][A-Za-z0-9_]*)(?:(:-|:\?)(.*))?$`)
)

func (r *reader) lookup(n *node, ref string) string {
	m := reference().FindStringSubmatch(ref)
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
	case op == ":-" && (value == "" || !ok):
		value = arg
	case !ok && value != "":
		r.taken = append(r.taken, assumption{n, name, value})
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

// notes returns what is right in p and hardly meant: variables without braces, which nothing fills in. It
// says as well which values are assumptions.
func (r *reader) notes(p *Pipeline) []warning {
	var out []warning
	for _, c := range p.components() {
		argv := slices.Concat(c.Command, c.Args)
		texts := slices.Clip(slices.Concat(r.texts(&c.Command), r.texts(&c.Args))[:shellScript(argv)])
		for _, field := range []any{&c.WorkingDir, &c.Env, &c.EnvFiles, &c.Volumes} {
			texts = append(texts, r.texts(field)...)
		}
		if argv, _ := words(strings.TrimPrefix(c.HealthCheck, "exec:")); shellScript(argv) == len(argv) {
			texts = append(texts, r.texts(&c.HealthCheck)...)
		}
		note := func(n *node, text string) {
			if field, of := strings.CutPrefix(n.path(), r.nodes[c].path()+"."); of && text != "" && len(out) < maxErrors {
				out = append(out, warning{c.ID, field, text})
			}
		}
		own := c.variableNames()
		for _, n := range texts {
			note(n, r.unfilled(n.raw, own))
		}
		for _, a := range r.taken {
			note(a.node, fmt.Sprintf("${%s} is not set here: it is taken to be %s, as in flowctl.service", a.name, a.value))
		}
	}
	return out
}

// formerWarnings returns what is noted of fields that have no effect.
func (r *reader) formerWarnings() []warning {
	var out []warning
	for _, f := range r.former {
		w := warning{Field: f.node.path(), Message: f.instead}
		if id := f.node.parent.child("id"); id != nil && id.kind == kindString && !id.bad {
			w.Component, w.Field = id.text, f.node.key
		}
		out = append(out, w)
	}
	return out
}

// texts returns the nodes of a field that is a text, or a list or a map of texts.
func (r *reader) texts(field any) []*node {
	switch n := r.nodes[field]; {
	case n == nil:
		return nil
	case n.kind == kindString:
		return []*node{n}
	default:
		return n.kids
	}
}

// Variables without braces, and those of them that flowctl gives: no reference can stand for these.
var (
	unbraced     = pattern(`\$(?:\$|([A-Za-z_][A-Za-z0-9_]*))`) // $$ is a dollar
	givenByUs    = pattern(`^(FLOWCTL_\w+|ENABLE_FLOWCTL|(COMPONENT|SERVICE)_ID|HEALTH_(PORT|ENDPOINT))$`)
	shells       = []string{"ash", "bash", "dash", "fish", "ksh", "sh", "zsh"}
	shellCommand = pattern(`^-[A-Za-z]*c$`)
)

// unfilled says which variable in a text was hardly meant to stay as it is, because it is in flowctl's
// environment or among own, those of the component. It returns "" for none.
func (r *reader) unfilled(text string, own map[string]bool) string {
	for _, m := range unbraced().FindAllStringSubmatch(text, -1) {
		name := m[1]
		if name == "" || givenByUs().MatchString(name) {
			continue
		}
		stays := fmt.Sprintf("$%s stays as it is, because no shell reads it: ", clip(name))
		if _, set := r.env(name); set {
			return stays + fmt.Sprintf("write ${%s}, or $$%[1]s for the text itself", clip(name))
		}
		if own[name] {
			return stays + fmt.Sprintf(`have one read it, by ["sh", "-c", "..."], or write $$%s for the text itself`, clip(name))
		}
	}
	return ""
}

// shellScript returns the index of the first of argv that is read by a shell, len(argv) for none.
func shellScript(argv []string) int {
	shell := false
	for i, arg := range argv {
		if shell && shellCommand().MatchString(arg) {
			return i + 1
		}
		shell = shell || slices.Contains(shells, filepath.Base(arg))
	}
	return len(argv)
}

// The methods from given to missing are the findings of the rules.

func (r *reader) given(field any) bool { return r.nodes[field] != nil }

func (r *reader) sound(field any) bool { return r.given(field) && !r.nodes[field].bad }

func (r *reader) line(field any) int { return r.lineOf(r.nodes[field].offset) }

func (r *reader) wrong(field any, format string, args ...any) {
	if r.sound(field) {
		r.errorf(r.nodes[field], format, args...)
	}
}

func (r *reader) wrongEntry(list any, i int, format string, args ...any) {
	if kid := r.nodes[list].kids[i]; !kid.bad {
		r.errorf(kid, format, args...)
	}
}

func (r *reader) wrongKey(object any, key, format string, args ...any) {
	if r.full() {
		r.errs.more++ // to find the key takes time
		return
	}
	kid := r.nodes[object].child(key)
	r.errorAt(kid.keyAt, kid, format, args...)
}

func (r *reader) missing(object any, name string) {
	n := r.nodes[object]
	if kid := n.child("type"); name == "command" && kid != nil && !kid.bad {
		if instead := insteadOfDownload(kid.raw); instead != "" {
			r.errorf(kid, "%s", instead)
			return
		}
	}
	r.missingField(n, name, "is missing")
}

// errorf reports an error at the value n, and marks n as bad.
func (r *reader) errorf(n *node, format string, args ...any) {
	n.bad = true
	for i, arg := range args {
		if n.ref != "" && arg == any(quote(n.text)) {
			args[i] = quote(n.ref)
		}
	}
	r.errorAt(n.offset, n, format, args...)
}

// missingField reports an error for the field name that the object n lacks.
func (r *reader) missingField(n *node, name, format string, args ...any) {
	r.errorAt(n.offset, &node{parent: n, key: name}, format, args...)
}

// errorAt adds an error of n, nil for the file as a whole, or counts it where there are many already.
func (r *reader) errorAt(offset int, n *node, format string, args ...any) {
	if r.full() {
		r.errs.more++
		return
	}
	r.errs.list = append(r.errs.list, fileError{offset: offset, Path: n.path(), Message: fmt.Sprintf(format, args...)})
}

func (r *reader) full() bool { return len(r.errs.list) >= maxErrors }

func (r *reader) lineOf(offset int) int {
	if r.full() {
		return 0 // nobody sees it
	}
	return bytes.Count(r.data[:offset], []byte("\n")) + 1
}

// sortedErrors returns the errors in the order of the file, with lines and columns.
func (r *reader) sortedErrors() *fileErrors {
	e := &r.errs
	slices.SortStableFunc(e.list, func(a, b fileError) int { return cmp.Compare(a.offset, b.offset) })
	if n := len(e.list) - maxShown; n > 0 {
		e.list, e.more = e.list[:maxShown], e.more+n
	}
	for i := range e.list {
		before := r.data[:e.list[i].offset]
		e.list[i].Line = bytes.Count(before, []byte("\n")) + 1
		e.list[i].Column = utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1
	}
	return e
}
