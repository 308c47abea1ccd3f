// What the kernel tells of processes, by /proc, and of the TCP sockets that they hold, by
// netlink (sock_diag(7)).

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	netlinkSockDiag  = 4  // NETLINK_SOCK_DIAG
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY

	// States of a TCP socket, of net/tcp_states.h.
	tcpEstablished = 1
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
	tcpListen      = 10
)

// procInfo is what /proc says of a process.
type procInfo struct {
	pid, parent, group int
	zombie             bool
	begun              uint64 // in clock ticks since boot: tells it from a later one with its pid
	name               string
}

// diagID is struct inet_diag_sockid. Ports and addresses are in network byte order.
type diagID struct {
	LocalPort, RemotePort [2]byte
	Local, Remote         [16]byte // an IPv4 address is in the first four bytes
	Interface             uint32
	Cookie                [2]uint32
}

// diagRequest is a netlink message with struct inet_diag_req_v2.
type diagRequest struct {
	Header                            syscall.NlMsghdr
	Family, Protocol, Extensions, Pad uint8
	States                            uint32
	ID                                diagID
}

// diagAnswer is struct inet_diag_msg.
type diagAnswer struct {
	Family, State, Timer, Retransmits          uint8
	ID                                         diagID
	Expires, ReadQueue, WriteQueue, UID, Inode uint32
}

// processes returns all processes that flowctl can see, without zombies.
func processes() []procInfo {
	if !procIsOurs() {
		return nil
	}
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	var all []procInfo
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, ok := readProcess(pid); ok && !p.zombie {
			all = append(all, p)
		}
	}
	return all
}

// withDescendants adds to chosen, a set of pids, all descendants of its processes.
func withDescendants(all []procInfo, chosen map[int]bool) {
	for grew := true; grew; {
		grew = false
		for _, p := range all {
			if chosen[p.parent] && !chosen[p.pid] {
				chosen[p.pid] = true
				grew = true
			}
		}
	}
}

// send sends sig to p, unless p has ended: its pid may be another process's by then.
func (p procInfo) send(sig syscall.Signal) {
	handle, err := os.FindProcess(p.pid) // has a pidfd, which never comes to mean another process
	if err != nil {
		return
	}
	defer handle.Release()
	if now, ok := readProcess(p.pid); ok && now.begun == p.begun {
		_ = handle.Signal(sig)
	}
}

// markedComponent returns the component that the environment of a process names. It is ok
// only if mark, an entry NAME=value, is in the environment as well: each run has its own.
func markedComponent(pid int, mark string) (id string, ok bool) {
	env := environ(pid)
	_, rest, ok := bytes.Cut(env, []byte("\x00FLOWCTL_COMPONENT_ID="))
	name, _, _ := bytes.Cut(rest, []byte{0})
	if !ok || !bytes.Contains(env, []byte("\x00"+mark+"\x00")) {
		return "", false
	}
	return string(name), true
}

// environ returns the environment that a process was started with, each entry between two
// NULs, nil where it cannot be read.
func environ(pid int) []byte {
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return nil
	}
	return append([]byte{0}, env...)
}

// readProcess returns what /proc says of a process. It is false for a process that is not there
// any more.
func readProcess(pid int) (procInfo, bool) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	open, end := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if err != nil || open < 0 || end < open {
		return procInfo{}, false
	}
	fields := strings.Fields(string(data[end+1:])) // from the third of proc(5) on
	if len(fields) < 20 {
		return procInfo{}, false
	}
	p := procInfo{pid: pid, name: string(data[open+1 : end])}
	// A process looks like a zombie also while only its main thread has ended.
	p.zombie = fields[0] == "X" || fields[0] == "Z" && fields[17] <= "1"
	p.parent, _ = strconv.Atoi(fields[1])
	p.group, _ = strconv.Atoi(fields[2])
	p.begun, _ = strconv.ParseUint(fields[19], 10, 64)
	return p, true
}

// procIsOurs tells whether /proc is of flowctl's own pid namespace. The pids of another
// namespace mean other processes.
func procIsOurs() bool {
	self, _ := os.Readlink("/proc/self")
	return self == strconv.Itoa(os.Getpid())
}

// peerPID returns the process that connected to a unix socket (SO_PEERCRED of unix(7)), 0 for
// one of another pid namespace.
func peerPID(conn *net.UnixConn) int {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// portHolder returns the process that listens on a port, or keeps others from listening there.
// It is not ok where flowctl cannot know: only root sees the sockets of other users' processes.
func portHolder(address string, port int) (pid int, name string, ok bool) {
	addr, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(strings.Trim(address, "[]"), strconv.Itoa(port)))
	if err != nil {
		return 0, "", false
	}
	inode, ok := listenerInode(addr.AddrPort())
	if !ok {
		return 0, "", false
	}
	return socketHolder(inode)
}

// socketOwner returns the inode of the TCP socket from local to remote in this network
// namespace, and the user who made it. It is not ok
//   - without such a socket,
//   - while no process holds it: it was not accepted yet, or is closed,
//   - where the kernel cannot tell: it has no tcp_diag, or the address has a zone.
//
// It fails if the kernel cannot be asked, for lack of a descriptor or of memory.
func socketOwner(local, remote netip.AddrPort) (inode uint64, uid int, ok bool, err error) {
	local, remote = unmap(local), unmap(remote)
	found, ok, err := lookUpSocket(local, remote)
	if !ok || found.local() != local || found.remote() != remote {
		return 0, 0, false, err // what was found is a listener
	}
	switch found.State {
	case tcpEstablished, tcpCloseWait, tcpFinWait1, tcpFinWait2:
		return uint64(found.Inode), int(found.UID), found.Inode != 0, nil
	}
	return 0, 0, false, nil
}

// canSeeSockets tells whether the kernel tells of sockets at all. It looks for a connection of
// flowctl to itself.
func canSeeSockets() bool {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return false
	}
	defer lis.Close()
	conn, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		return false
	}
	defer conn.Close()
	_, _, ok, _ := socketOwner(conn.LocalAddr().(*net.TCPAddr).AddrPort(), conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	return ok
}

// socketHolder returns a process that has the socket with this inode open. It is not ok where
// flowctl can see none.
func socketHolder(inode uint64) (pid int, name string, ok bool) {
	for _, p := range processes() {
		if held, _ := holdsSocket(p.pid, inode); held {
			return p.pid, p.name, true
		}
	}
	return 0, "", false
}

// holdsSocket tells whether process pid has the socket with this inode open. A process that
// lives and that flowctl may not look into is not readable: it is another user's, or has more
// privileges.
func holdsSocket(pid int, inode uint64) (held, readable bool) {
	if !procIsOurs() {
		return false, false
	}
	folder := "/proc/" + strconv.Itoa(pid)
	link := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	held, some, err := hasOpen(folder+"/fd", link)
	if !some && err == nil {
		// Its main thread has ended and has no files any more. Other threads may have some.
		others, _ := filepath.Glob(folder + "/task/*/fd")
		for _, other := range others {
			if held, _, err = hasOpen(other, link); held {
				break
			}
		}
	}
	if held || err == nil {
		return held, true
	}
	p, ok := readProcess(pid)
	return false, !ok || p.zombie
}

// hasOpen tells whether a folder of file descriptors has one that links to link, and whether
// there are any.
func hasOpen(folder, link string) (held, some bool, err error) {
	dir, err := os.Open(folder)
	if err != nil {
		return false, false, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	for _, name := range names {
		to, linkErr := os.Readlink(folder + "/" + name)
		if to == link {
			return true, true, nil
		}
		if err == nil && !errors.Is(linkErr, fs.ErrNotExist) { // else it was closed meanwhile
			err = linkErr
		}
	}
	return false, len(names) > 0, err
}

// listenerInode returns the inode of a TCP socket that keeps others from listening on addr: it
// listens there, or one of the two addresses means all interfaces.
func listenerInode(addr netip.AddrPort) (inode uint64, ok bool) {
	addrs := []netip.Addr{addr.Addr()}
	if addr.Addr().IsUnspecified() {
		all, _ := net.InterfaceAddrs()
		for _, a := range all {
			if p, err := netip.ParsePrefix(a.String()); err == nil && (p.Addr().Is4() || addr.Addr().Is6()) {
				addrs = append(addrs, p.Addr())
			}
		}
	}
	for _, a := range addrs {
		want := unmap(netip.AddrPortFrom(a, addr.Port()))
		none := netip.IPv6Unspecified()
		if want.Addr().Is4() {
			none = netip.IPv4Unspecified()
		}
		found, ok, _ := lookUpSocket(want, netip.AddrPortFrom(none, 0))
		if ok && found.State == tcpListen && found.Inode != 0 && found.local().Port() == want.Port() &&
			(found.local().Addr() == want.Addr() || found.local().Addr().IsUnspecified()) {
			return uint64(found.Inode), true
		}
	}
	return 0, false
}

// lookUpSocket asks the kernel for the socket that a packet from remote to local would reach:
// that of a connection, or else a listener. It fails if it cannot ask.
func lookUpSocket(local, remote netip.AddrPort) (found diagAnswer, ok bool, err error) {
	family := uint8(syscall.AF_INET) // finds IPv6 sockets with mapped addresses as well
	if local.Addr().Is6() {
		family = syscall.AF_INET6
	}
	if local.Addr().Is6() != remote.Addr().Is6() {
		return found, false, nil
	}
	request := diagRequest{Family: family, Protocol: syscall.IPPROTO_TCP, States: ^uint32(0)}
	request.Header = syscall.NlMsghdr{Len: uint32(binary.Size(request)), Type: sockDiagByFamily, Flags: syscall.NLM_F_REQUEST}
	request.ID.Cookie = [2]uint32{^uint32(0), ^uint32(0)} // INET_DIAG_NOCOOKIE: any socket
	binary.BigEndian.PutUint16(request.ID.LocalPort[:], local.Port())
	binary.BigEndian.PutUint16(request.ID.RemotePort[:], remote.Port())
	copy(request.ID.Local[:], local.Addr().AsSlice())
	copy(request.ID.Remote[:], remote.Addr().AsSlice())
	message, err := binary.Append(nil, binary.NativeEndian, request)
	if err != nil {
		return found, false, err
	}

	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, netlinkSockDiag)
	if err != nil {
		return found, false, err
	}
	defer syscall.Close(fd)
	if err := syscall.Sendto(fd, message, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		return found, false, err
	}
	var buf [1024]byte
	n, _, err := syscall.Recvfrom(fd, buf[:], syscall.MSG_DONTWAIT) // the kernel answers before Sendto returns
	if err != nil {
		return found, false, err
	}
	answers, err := syscall.ParseNetlinkMessage(buf[:n])
	if err != nil || len(answers) == 0 || answers[0].Header.Type != sockDiagByFamily { // that is NLMSG_ERROR: there is none
		return found, false, err
	}
	_, err = binary.Decode(answers[0].Data, binary.NativeEndian, &found)
	return found, err == nil, err
}

func (a *diagAnswer) local() netip.AddrPort { return a.addr(a.ID.Local, a.ID.LocalPort) }

func (a *diagAnswer) remote() netip.AddrPort { return a.addr(a.ID.Remote, a.ID.RemotePort) }

func (a *diagAnswer) addr(ip [16]byte, port [2]byte) netip.AddrPort {
	addr := netip.AddrFrom16(ip)
	if a.Family == syscall.AF_INET {
		addr = netip.AddrFrom4([4]byte(ip[:4]))
	}
	return unmap(netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port[:])))
}

// unmap turns an IPv4 address that is mapped into IPv6 back: the two ends of a connection may
// report it differently.
func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
