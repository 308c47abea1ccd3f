package main

import (
	"os"
	"os/signal"
	"syscall"
	"unsafe"
)

// isTerminal takes any character device but /dev/null for one.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	null, nullErr := os.Stat(os.DevNull)
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && (nullErr != nil || !os.SameFile(info, null))
}

// useColours tells whether f is a terminal whose user wants colours (no-color.org).
func useColours(f *os.File) bool {
	return isTerminal(f) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// inForeground tells whether flowctl is in the foreground process group of its
// terminal f, which reads from it and gets its signals (tty_ioctl(4)).
func inForeground(f *os.File) bool {
	var group int32
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), syscall.TIOCGPGRP, uintptr(unsafe.Pointer(&group)))
	return errno == 0 && int(group) == syscall.Getpgrp()
}

// takesInterrupts tells whether Ctrl-C and Ctrl-\ in flowctl's terminal reach its process group.
func takesInterrupts() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	return inForeground(tty)
}

// canBeSuspended tells whether a shell with job control has started flowctl, which can continue it
// after Ctrl-Z: such a shell gives each job a process group that is not the leader's of the session.
// Other process groups the kernel does not stop by Ctrl-Z.
func canBeSuspended() bool {
	session, _, errno := syscall.Syscall(syscall.SYS_GETSID, 0, 0, 0)
	return errno == 0 && int(session) != syscall.Getpgrp() && !signal.Ignored(syscall.SIGTSTP)
}

// stopSelf stops flowctl as Ctrl-Z would. It may return a moment before. SIGCONT ends it.
func stopSelf() { _ = syscall.Kill(syscall.Getpid(), syscall.SIGSTOP) }

// terminalSize is 80 by 24 where the terminal does not tell.
func terminalSize(f *os.File) (width, height int) {
	var size struct{ Rows, Columns, X, Y uint16 }
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
	if errno != 0 || size.Rows == 0 || size.Columns == 0 {
		return 80, 24
	}
	return int(size.Columns), int(size.Rows)
}

// unread is how many bytes of whole lines were typed on terminal f and not read.
func unread(f *os.File) int {
	var n int32
	_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), ioctlUnread, uintptr(unsafe.Pointer(&n))) // it fails for no terminal
	return int(n)
}
