//go:build !linux

package main

import (
	"net/netip"
	"syscall"
)

// procInfo is a process. This system does not tell flowctl of any.
type procInfo struct {
	pid  int
	name string
}

func (p procInfo) send(syscall.Signal) {}

// portHolder is never ok: this system does not tell which process holds a socket.
func portHolder(address string, port int) (pid int, name string, ok bool) { return 0, "", false }

// listenerInode is never ok, either.
func listenerInode(addr netip.AddrPort) (inode uint64, ok bool) { return 0, false }

// shortPath returns path: this system has no shorter one.
func shortPath(path string) (short string, done func(), err error) { return path, func() {}, nil }
