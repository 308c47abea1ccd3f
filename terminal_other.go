//go:build !linux

package main

// ioctlUnread is FIONREAD of tty(4).
const ioctlUnread = 0x4004667f
