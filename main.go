// Flowctl runs a data pipeline: the programs that its file names, and the gRPC
// control plane that they register with, in one process.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
)

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate --template proto/buf.gen.yaml

// version is set at link time: -ldflags "-X main.version=v1.2.3".
var version string

// The exit codes that README promises.
const (
	exitOK       = 0
	exitFailed   = 1 // a component failed
	exitUsage    = 2 // the command line or the pipeline file is wrong
	exitPlane    = 3 // the control plane could not start, or for list: none answered
	exitNotReady = 4 // a component was not ready within its start timeout
)

// exitError carries an exit code to main. Without err everything has been said.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

// usageError is a command line that is wrong; command is the help to read.
type usageError struct {
	command string
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }

// command is one of flowctl's commands. Its run gets the arguments after its name.
type command struct {
	name, args, summary, examples string
	hidden                        bool
	run                           func(args []string) error
}

// commands returns them in the order of help. It is a function because help, one
// of them, needs them all.
func commands() []command {
	return []command{
		{name: "check", args: "[pipeline.json]", summary: "read and validate a pipeline file, start nothing", run: checkCommand, examples: `
  flowctl check pipeline.json
`},
		{name: "version", summary: "print the version", run: versionCommand},
		{name: "help", args: "[command]", summary: "explain flowctl, or one command", run: helpCommand},
	}
}

func main() {
	os.Exit(exitCode(dispatch(os.Args[1:])))
}

// exitCode says on standard error what err has to say and returns its code.
func exitCode(err error) int {
	var exit *exitError
	var usage *usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		if exit.err != nil {
			fmt.Fprintln(os.Stderr, "flowctl:", exit.err)
		}
		return exit.code
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "flowctl: %v\nTry: %s\n", usage.err, strings.TrimSpace("flowctl help "+usage.command))
		return exitUsage
	}
	fmt.Fprintln(os.Stderr, "flowctl:", err)
	return exitFailed
}

// dispatch runs the command that args name.
func dispatch(args []string) error {
	if len(args) > 0 && slices.Contains([]string{"-h", "-help", "--help"}, args[0]) {
		return helpCommand(nil)
	}
	if len(args) == 0 {
		return &usageError{err: errors.New("no command")}
	}
	names := []string{}
	for _, c := range commands() {
		if c.name == args[0] {
			return c.run(args[1:])
		}
		if !c.hidden {
			names = append(names, c.name)
		}
	}
	return &usageError{err: fmt.Errorf("unknown command %q: it must be one of %s", args[0], strings.Join(names, ", "))}
}

// parseFlags parses args by fs, flags before and after the other arguments, of
// which there may be so many as most. Help that was asked for is printed.
func parseFlags(fs *flag.FlagSet, args []string, most int) ([]string, error) {
	fs.SetOutput(io.Discard)
	var rest []string
	for {
		if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
			printHelp(os.Stdout, fs)
			return nil, &exitError{code: exitOK}
		} else if err != nil {
			return nil, &usageError{fs.Name(), err}
		}
		if fs.NArg() == 0 {
			return rest, nil
		}
		rest = append(rest, fs.Arg(0))
		if len(rest) > most {
			return nil, &usageError{fs.Name(), fmt.Errorf("%s: unexpected argument %q", fs.Name(), fs.Arg(0))}
		}
		args = fs.Args()[1:]
	}
}

// fileArgument is the pipeline file: named by -f or as an argument, not by both.
func fileArgument(fs *flag.FlagSet, file string, rest []string) (string, error) {
	set := false
	fs.Visit(func(f *flag.Flag) { set = set || f.Name == "f" })
	switch {
	case len(rest) == 0:
		return file, nil
	case set:
		return "", &usageError{fs.Name(), fmt.Errorf("two pipeline files are named: %q by -f, and %q", file, rest[0])}
	}
	return rest[0], nil
}

func checkCommand(args []string) error {
	fs := flag.NewFlagSet("check", flag.ContinueOnError)
	named := fs.String("f", "flow.json", "pipeline `file`")
	rest, err := parseFlags(fs, args, 1)
	if err != nil {
		return err
	}
	file, err := fileArgument(fs, *named, rest)
	if err != nil {
		return err
	}
	p, err := readPipeline(file, os.LookupEnv)
	if err != nil {
		return &exitError{exitUsage, err}
	}
	fmt.Printf("%s: ok: pipeline %s, %d sources, %d processors, %d sinks\n", file, p.Metadata.Name, len(p.Spec.Sources), len(p.Spec.Processors), len(p.Spec.Sinks))
	return nil
}

func versionCommand(args []string) error {
	if _, err := parseFlags(flag.NewFlagSet("version", flag.ContinueOnError), args, 0); err != nil {
		return err
	}
	info, _ := debug.ReadBuildInfo()
	v, commit := version, ""
	if info != nil {
		if v == "" {
			v = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = ", commit " + s.Value[:min(12, len(s.Value))]
			}
		}
		fmt.Printf("flowctl %s (%s%s)\n", v, info.GoVersion, commit)
	}
	return nil
}

func helpCommand(args []string) error {
	if len(args) == 0 {
		printOverview(os.Stdout)
		return nil
	}
	for _, c := range commands() {
		if c.name == args[0] && c.name != "help" {
			return c.run([]string{"-h"})
		}
	}
	return &usageError{err: fmt.Errorf("there is no help for %q", args[0])}
}

func printOverview(w io.Writer) {
	fmt.Fprint(w, "flowctl runs a data pipeline: its programs, and the control plane that they register with.\n\n")
	fmt.Fprint(w, "Usage:\n")
	for _, c := range commands() {
		if !c.hidden {
			fmt.Fprintf(w, "  %-38s %s\n", strings.TrimSpace("flowctl "+c.name+" "+c.args), c.summary)
		}
	}
	fmt.Fprint(w, "\nThe pipeline file is explained in README.md.\n")
}

func printHelp(w io.Writer, fs *flag.FlagSet) {
	for _, c := range commands() {
		if c.name != fs.Name() {
			continue
		}
		fmt.Fprintf(w, "%s: %s\n\nUsage:\n  %s\n", c.name, c.summary, strings.TrimSpace("flowctl "+c.name+" "+c.args))
		if c.examples != "" {
			fmt.Fprintf(w, "\nExamples:%s", c.examples)
		}
	}
	some := false
	fs.VisitAll(func(*flag.Flag) { some = true })
	if some {
		fmt.Fprint(w, "\nFlags:\n")
		fs.SetOutput(w)
		fs.PrintDefaults()
	}
}
