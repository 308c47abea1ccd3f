package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
)

// The exit codes that README promises.
const (
	exitOK       = 0
	exitFailed   = 1 // a component failed
	exitUsage    = 2 // the command line or the pipeline file is wrong
	exitPlane    = 3 // the control plane could not start, the pipeline runs already, or for list: none answered
	exitNotReady = 4 // a component was not ready within its start timeout
)

// exitError carries an exit code to main. Without err everything has been said.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Unwrap() error { return e.err }

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

// hintedError is an error that a command may help against.
type hintedError struct {
	err error
	try string
}

func (e *hintedError) Unwrap() error { return e.err }

func (e *hintedError) Error() string { return e.err.Error() }

// cause drops what os and exec put before the reason: the path is named already.
func cause(err error) error {
	var path *fs.PathError
	var lookup *exec.Error
	var call *os.SyscallError
	switch {
	case errors.As(err, &call):
		return call.Err
	case errors.As(err, &path):
		return path.Err
	case errors.As(err, &lookup):
		return lookup.Err
	}
	return err
}
