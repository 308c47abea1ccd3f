package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"unsafe"
)

// tcpPair is a connection whose two ends are both in this process.
type tcpPair struct {
	lis            *net.TCPListener
	server, client *net.TCPConn // accepted, and dialled
}

// connectPair listens on host and connects to dial there, "" for the listener's address.
func connectPair(tb testing.TB, network, host, dial string) *tcpPair {
	tb.Helper()
	lis, err := net.Listen(network, net.JoinHostPort(host, "0"))
	if err != nil {
		tb.Skip("this system has no such address:", err)
	}
	tb.Cleanup(func() { lis.Close() })
	p := &tcpPair{lis: lis.(*net.TCPListener)}
	p.connect(tb, dial)
	return p
}

// connect makes a further connection to the same listener.
func (p *tcpPair) connect(tb testing.TB, dial string) {
	tb.Helper()
	to := p.lis.Addr().String()
	if dial != "" {
		to = net.JoinHostPort(dial, fmt.Sprint(p.lis.Addr().(*net.TCPAddr).Port))
	}
	client := get(net.Dial("tcp", to))(tb)
	server := get(p.lis.AcceptTCP())(tb)
	p.server, p.client = server, client.(*net.TCPConn)
	tb.Cleanup(func() { server.Close(); client.Close() })
}

// inodeBetween is the inode of the socket between two addresses.
func inodeBetween(local, remote netip.AddrPort) (inode uint64, ok bool) {
	socket, _ := findSocket(local, remote)
	if socket == nil {
		return 0, false
	}
	return socket.inode, true
}

// inodeOf returns the inode of a connection by fstat(2).
func inodeOf(tb testing.TB, conn syscall.Conn) uint64 {
	tb.Helper()
	raw := get(conn.SyscallConn())(tb)
	var info syscall.Stat_t
	must(tb, raw.Control(func(fd uintptr) { must(tb, syscall.Fstat(int(fd), &info)) }))
	return info.Ino
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

// mapped returns an IPv4 address mapped into IPv6.
func mapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
}

func TestSocketOwner_FindsEitherEnd(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, network, host, dial string }{
		{"IPv4", "tcp4", "127.0.0.1", ""},
		{"IPv4 of all interfaces", "tcp4", "0.0.0.0", "127.0.0.1"},
		{"IPv6", "tcp6", "::1", ""},
		{"dual stack by IPv4", "tcp", "::", "127.0.0.1"},
		{"dual stack by IPv6", "tcp", "::", "::1"},
		{"mapped", "tcp", "::ffff:127.0.0.1", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := connectPair(t, test.network, test.host, test.dial)
			for range 100 {
				p.connect(t, test.dial)
				server, client := addrPort(p.server.LocalAddr()), addrPort(p.client.LocalAddr())
				for _, end := range []struct {
					conn          *net.TCPConn
					local, remote netip.AddrPort
				}{
					{p.server, server, client}, {p.client, client, server},
					{p.server, mapped(server), mapped(client)}, {p.client, mapped(client), server}, {p.server, server, mapped(client)},
				} {
					got, ok := inodeBetween(end.local, end.remote)
					if want := inodeOf(t, end.conn); !ok || got != want {
						t.Fatalf("inodeBetween(%s, %s) = %d, %t, want %d", end.local, end.remote, got, ok, want)
					}
					if held, readable := holdsSocket(os.Getpid(), got); !held || !readable {
						t.Fatalf("holdsSocket = %t, %t", held, readable)
					}
				}
				// What would be the listener, and what is nobody's.
				for _, none := range []netip.AddrPort{netip.AddrPortFrom(client.Addr(), 1), server, {}} {
					if got, ok := inodeBetween(server, none); ok {
						t.Fatalf("inodeBetween(%s, %s) = %d", server, none, got)
					}
				}
				inode := inodeOf(t, p.client)
				p.client.Close()
				awaitNone(t, func() (uint64, bool) { return inodeBetween(client, server) })
				if held, readable := holdsSocket(os.Getpid(), inode); held || !readable {
					t.Fatalf("holdsSocket of a closed socket = %t, %t", held, readable)
				}
				if got, ok := inodeBetween(server, client); !ok || got != inodeOf(t, p.server) {
					t.Fatalf("inodeBetween of the end that is still open = %d, %t", got, ok)
				}
				p.server.Close()
				awaitNone(t, func() (uint64, bool) { return inodeBetween(server, client) })
			}
		})
	}
}

func TestSocketOwner_NobodyBeforeAccept(t *testing.T) {
	t.Parallel()
	p := connectPair(t, "tcp4", "127.0.0.1", "")
	client := get(net.Dial("tcp", p.lis.Addr().String()))(t)
	defer client.Close()
	if got, ok := inodeBetween(addrPort(p.lis.Addr()), addrPort(client.LocalAddr())); ok {
		t.Errorf("inodeBetween = %d", got)
	}
}

func TestListenerInode_FindsWhoKeepsOthersFromAnAddress(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		network, host string
		found, not    []string
	}{
		{"tcp4", "127.0.0.1", []string{"127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0", "::"}, []string{"127.0.0.2", "::1"}},
		{"tcp4", "0.0.0.0", []string{"127.0.0.1", "127.0.0.2", "0.0.0.0", "::"}, []string{"::1"}},
		{"tcp6", "::1", []string{"::1", "::"}, []string{"127.0.0.1", "0.0.0.0"}},
		{"tcp", "::", []string{"127.0.0.1", "::1", "0.0.0.0", "::"}, nil},
		{"tcp6", "::", []string{"::1", "::"}, []string{"127.0.0.1", "0.0.0.0"}},
	} {
		t.Run(test.network+" "+test.host, func(t *testing.T) {
			t.Parallel()
			p := connectPair(t, test.network, test.host, "")
			want := inodeOf(t, p.lis)
			port := addrPort(p.lis.Addr()).Port()
			for _, host := range test.found {
				if got, ok := listenerInode(netip.AddrPortFrom(netip.MustParseAddr(host), port)); !ok || got != want {
					t.Errorf("%s: got %d, %t, want %d", host, got, ok, want)
				}
			}
			for _, host := range test.not {
				if got, ok := listenerInode(netip.AddrPortFrom(netip.MustParseAddr(host), port)); ok {
					t.Errorf("%s: got %d", host, got)
				}
			}
			p.lis.Close()
			awaitNone(t, func() (uint64, bool) { return listenerInode(addrPort(p.server.LocalAddr())) })
		})
	}
}

// handOver starts a process that has conn open and does nothing with it.
func handOver(t *testing.T, conn interface{ File() (*os.File, error) }, attr *syscall.SysProcAttr) *exec.Cmd {
	t.Helper()
	file := get(conn.File())(t)
	defer file.Close()
	cmd := exec.Command("sleep", "300")
	cmd.ExtraFiles = []*os.File{file}
	cmd.SysProcAttr = attr
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

func TestHoldsSocket_OfAnotherProcess(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, network, host, dial string }{
		{"IPv4", "tcp4", "127.0.0.1", ""},
		{"IPv6", "tcp6", "::1", ""},
		{"dual stack by IPv4", "tcp", "::", "127.0.0.1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := connectPair(t, test.network, test.host, test.dial)
			server, client := addrPort(p.server.LocalAddr()), addrPort(p.client.LocalAddr())
			want := inodeOf(t, p.client)
			cmd := handOver(t, p.client, nil)
			p.client.Close()
			got, ok := inodeBetween(client, server)
			if !ok || got != want {
				t.Fatalf("inodeBetween = %d, %t, want %d", got, ok, want)
			}
			if held, readable := holdsSocket(cmd.Process.Pid, got); !held || !readable {
				t.Errorf("the child: held %t, readable %t", held, readable)
			}
			if held, readable := holdsSocket(os.Getpid(), got); held || !readable {
				t.Errorf("this process: held %t, readable %t", held, readable)
			}
			eventually(t, "socketHolder finds the child", func() bool { // alone, as of awaitNone
				pid, name, ok := socketHolder(got)
				return ok && pid == cmd.Process.Pid && name == "sleep"
			})
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if held, readable := holdsSocket(cmd.Process.Pid, got); held || !readable {
				t.Errorf("the child that has ended: held %t, readable %t", held, readable)
			}
		})
	}
}

// awaitNone waits until a closed socket is not found. A child that another test was forking at
// the time has it until it becomes another program.
func awaitNone(t *testing.T, find func() (inode uint64, ok bool)) {
	t.Helper()
	eventually(t, "a closed socket is not found", func() bool {
		_, ok := find()
		return !ok
	})
}

// A process that flowctl may not look into is not readable. Root of a container may read the
// folder of its descriptors, but none of the links in it.
func TestHoldsSocket_UnreadableProcess(t *testing.T) {
	t.Parallel()
	const dacOverride, dacReadSearch, sysPtrace = 1 << 1, 1 << 2, 1 << 19 // CAP_* of capabilities(7)
	if os.Getuid() != 0 {
		t.Skip("needs root, to start a process of another user")
	}
	p := connectPair(t, "tcp4", "127.0.0.1", "")
	cmd := handOver(t, p.client, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	inode := inodeOf(t, p.client)
	for _, test := range []struct {
		name    string
		without uint32
	}{{"links", sysPtrace}, {"folder", sysPtrace | dacOverride | dacReadSearch}} {
		t.Run(test.name, func(t *testing.T) {
			var held, readable bool
			done := make(chan error)
			go func() {
				runtime.LockOSThread() // for good: this thread ends with the goroutine
				err := dropCapabilities(test.without)
				held, readable = holdsSocket(cmd.Process.Pid, inode)
				done <- err
			}()
			must(t, <-done)
			if held || readable {
				t.Errorf("held %t, readable %t", held, readable)
			}
		})
	}
}

// dropCapabilities takes capabilities from this thread.
func dropCapabilities(some uint32) error {
	header := struct {
		version uint32
		pid     int32
	}{version: 0x20080522} // _LINUX_CAPABILITY_VERSION_3
	var data [2]struct{ effective, permitted, inheritable uint32 }
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CAPGET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data)), 0); errno != 0 {
		return errno
	}
	data[0].effective &^= some
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data)), 0); errno != 0 {
		return errno
	}
	return nil
}
