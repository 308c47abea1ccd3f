//go:build !linux

package main

import "syscall"

type procInfo struct {
	pid  int
	name string
}

func (p procInfo) send(syscall.Signal) {}

// portHolder is never ok: this system has no way to tell which process holds a socket
// that flowctl could use.
func portHolder(address string, port int) (pid int, name string, ok bool) { return 0, "", false }
