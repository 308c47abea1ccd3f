package main

// The files of -env-file, whose variables fill references of the pipeline file and are passed on to components.

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

const maxEnvFile = 1 << 20 // bytes

// variables are those of -env-file. flowctl's own environment wins over them.
type variables map[string]string

// readVariables reads files of NAME=value lines, of which a later one wins. Its errors show no value.
func readVariables(files []string) (variables, error) {
	out := make(variables)
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("-env-file: %w", err)
		}
		data, err := io.ReadAll(io.LimitReader(f, maxEnvFile+1))
		f.Close()
		switch {
		case err != nil:
			return nil, fmt.Errorf("-env-file: %w", err)
		case len(data) > maxEnvFile:
			return nil, fmt.Errorf("-env-file: %s has more than 1 MiB", file)
		}
		number := 0
		for line := range strings.Lines(strings.TrimPrefix(string(data), "\ufeff")) {
			number++
			name, value, err := parseVariable(line)
			if err != nil {
				return nil, fmt.Errorf("-env-file: %s:%d: %v", file, number, err)
			}
			if name != "" {
				out[name] = value
			}
		}
	}
	return out, nil
}

// parseVariable reads a line such as NAME=value, export NAME='a value' or NAME="a\nvalue" # comment.
// The name of a line that sets nothing is "".
func parseVariable(line string) (name, value string, err error) {
	line = strings.TrimSpace(line)
	if line == "" || line[0] == '#' {
		return "", "", nil
	}
	if rest, ok := strings.CutPrefix(line, "export"); ok && strings.TrimLeft(rest, " \t") != rest {
		line = strings.TrimLeft(rest, " \t")
	}
	name, value, found := strings.Cut(line, "=")
	switch {
	case !found || !variableName().MatchString(name):
		return "", "", fmt.Errorf("must be NAME=value, without spaces around the =")
	case strings.ContainsRune(value, 0):
		return "", "", fmt.Errorf("the value of %s has a NUL, which no variable can have", clip(name))
	}
	switch value = strings.TrimLeft(value, " \t"); {
	case strings.HasPrefix(value, "'") || strings.HasPrefix(value, `"`):
		value, err = unquoteVariable(value)
		if err != nil {
			return "", "", fmt.Errorf("the value of %s %v", clip(name), err)
		}
	default:
		if i := strings.Index(" "+value, " #"); i >= 0 {
			value = value[:max(0, i-1)]
		}
		value = strings.TrimRight(value, " \t")
	}
	return name, value, nil
}

// unquoteVariable returns what is in the quotes that text begins with. Between double quotes a backslash
// makes \n, \r and \t, and takes any other character as it is.
func unquoteVariable(text string) (string, error) {
	var b strings.Builder
	for i := 1; i < len(text); i++ {
		switch c := text[i]; {
		case c == text[0]:
			if rest := strings.TrimSpace(text[i+1:]); rest != "" && rest[0] != '#' {
				return "", fmt.Errorf("goes on after its closing %c", c)
			}
			return b.String(), nil
		case c == '\\' && text[0] == '"' && i+1 < len(text):
			i++
			if special := strings.IndexByte("nrt", text[i]); special >= 0 {
				b.WriteByte("\n\r\t"[special])
			} else {
				b.WriteByte(text[i])
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", fmt.Errorf("has no closing %c in its line", text[0])
}

// lookup returns a variable of flowctl's own environment, else of v.
func (v variables) lookup(name string) (string, bool) {
	if value, ok := os.LookupEnv(name); ok {
		return value, true
	}
	value, ok := v[name]
	return value, ok
}

// environ returns v as an environment, in which another one is to follow.
func (v variables) environ() (out []string) {
	for _, name := range slices.Sorted(maps.Keys(v)) {
		out = append(out, name+"="+v[name])
	}
	return out
}

// addTo gives the components of p the variables that their files do not set. Those by which flowctl
// tells a component what it is are its own.
func (v variables) addTo(p *Pipeline) {
	for _, c := range p.components() {
		config := c.configEnv()
		for _, name := range slices.Sorted(maps.Keys(v)) {
			_, isEnv := c.Env[name]
			_, isFile := c.EnvFiles[name]
			_, isConfig := config[name]
			if isEnv || isFile || isConfig || slices.Contains(fixedVars, name) || slices.Contains(ownVars, name) || slices.Contains(componentVars, name) {
				continue
			}
			if c.Env == nil {
				c.Env = make(map[string]string)
			}
			c.Env[name], _ = v.lookup(name)
		}
	}
}
