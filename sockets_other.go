//go:build !linux

package main

import "net/netip"

// This system has no way to tell which process holds a socket that flowctl could use.

func socketInode(local, remote netip.AddrPort) (inode uint64, ok bool) { return 0, false }
func listenerInode(addr netip.AddrPort) (inode uint64, ok bool)        { return 0, false }
func holdsSocket(pid int, inode uint64) (held, readable bool)          { return false, false }
func socketHolder(inode uint64) (pid int, name string, ok bool)        { return 0, "", false }
