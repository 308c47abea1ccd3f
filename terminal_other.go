//go:build !linux

package main

import "syscall"

// ioctlUnread is FIONREAD of tty(4).
const ioctlUnread = 0x4004667f

// stopSelf returns when flowctl goes on.
func stopSelf() { _ = syscall.Kill(syscall.Getpid(), syscall.SIGSTOP) }
