package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// The exit codes, as docs/commands.md lists them.
const (
	exitOK       = 0
	exitFailed   = 1 // a component failed
	exitUsage    = 2 // the command line or the pipeline file is wrong
	exitPlane    = 3 // the control plane could not start, the pipeline runs already, what can pass by itself, or for list: none answered
	exitNotReady = 4 // a component was not ready within its start timeout
)

// exitError ends flowctl with an exit code. Where err is nil everything has been said.
type exitError struct {
	code int
	err  error
	try  string // a command that may help, "" for none
}

func (e *exitError) Unwrap() error { return e.err }

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

// usageErrorf returns the error of a wrong command line. The help of command explains
// what is right; "" is the overview.
func usageErrorf(command, format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...), strings.TrimSpace("flowctl help " + command)}
}

// errNoAnswer is of a disk that hangs.
var errNoAnswer = errors.New("no answer from the disk")

// exitFor is the exit code for an error about what the command line or the pipeline file names. What can
// pass by itself is not exitUsage, after which a unit is not started again.
func exitFor(err error) int {
	for _, passing := range []error{
		errNoAnswer, syscall.EAGAIN, syscall.EDQUOT, syscall.EIO, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOSPC, syscall.ESTALE, syscall.ETIMEDOUT,
	} {
		if errors.Is(err, passing) {
			return exitPlane
		}
	}
	return exitUsage
}

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
