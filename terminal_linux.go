package main

import (
	"runtime"
	"syscall"
	"unsafe"
)

// ioctlUnread is FIONREAD of ioctl_tty(2).
const ioctlUnread = syscall.TIOCINQ

// stopSelf stops flowctl as Ctrl-Z stops a program that does not catch SIGTSTP, and
// returns when it goes on. os/signal has no way back to that: after Reset the signal
// is ignored. In a process group that no shell could continue nothing happens.
func stopSelf() {
	const setSize = 8                // of a sigset_t, rt_sigaction(2)
	var byDefault, before [8]uintptr // have room for a struct sigaction; zero is SIG_DFL
	action := func(act, old *[8]uintptr) {
		syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(syscall.SIGTSTP), uintptr(unsafe.Pointer(act)), uintptr(unsafe.Pointer(old)), setSize, 0, 0)
	}
	runtime.LockOSThread() // the signal is to this thread, so that it has come when the call returns
	defer runtime.UnlockOSThread()
	action(&byDefault, &before)
	syscall.RawSyscall(syscall.SYS_TGKILL, uintptr(syscall.Getpid()), uintptr(syscall.Gettid()), uintptr(syscall.SIGTSTP))
	action(&before, nil)
}
