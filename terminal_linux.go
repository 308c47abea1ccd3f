package main

import "syscall"

// ioctlUnread is FIONREAD of ioctl_tty(2).
const ioctlUnread = syscall.TIOCINQ
