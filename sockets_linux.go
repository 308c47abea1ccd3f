package main

import (
	endian "encoding/binary" // binary is the name of a function of the tests
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// Which process holds a TCP socket. The kernel finds one by its two addresses and
// gives its inode (sock_diag(7)), and /proc shows whose open files have that inode.
// The tables in /proc/net would say the same, but the kernel walks all of its hash
// for them, which takes milliseconds on a machine without a single connection.

const (
	netlinkSockDiag  = 4  // NETLINK_SOCK_DIAG
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY

	// States of a TCP socket.
	tcpEstablished = 1
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
	tcpListen      = 10
)

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

// socketOwner returns the inode of the TCP socket in this network namespace whose own
// address is local and whose peer is remote, and the user who made it. It is not ok when
// there is none, when no process holds it (any more, or before it was accepted), and when
// the kernel cannot tell: without its tcp_diag, or for an address with a zone. It fails
// when the kernel could not be asked, for want of a descriptor or of memory.
func socketOwner(local, remote netip.AddrPort) (inode uint64, uid int, ok bool, err error) {
	local, remote = unmap(local), unmap(remote)
	found, ok, err := lookUpSocket(local, remote)
	if !ok || found.local() != local || found.remote() != remote {
		return 0, 0, false, err // that was a listener
	}
	switch found.State {
	case tcpEstablished, tcpCloseWait, tcpFinWait1, tcpFinWait2:
		return uint64(found.Inode), int(found.UID), found.Inode != 0, nil
	}
	return 0, 0, false, nil
}

// socketsSeen is whether socketsVisible was ever true.
var socketsSeen atomic.Bool

// socketsVisible tells whether the kernel can be asked at all, by a connection of
// flowctl to itself.
func socketsVisible() bool {
	if socketsSeen.Load() {
		return true
	}
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
	socketsSeen.CompareAndSwap(false, ok)
	return ok
}

// listenerInode returns the inode of a listening TCP socket that keeps others from
// listening on addr: its address is addr, or one of the two is that of all interfaces.
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

// lookUpSocket asks the kernel for the one socket that a packet from remote to local
// reaches: where there is no connection, that is a listener. It fails where it could not
// ask.
func lookUpSocket(local, remote netip.AddrPort) (found diagAnswer, ok bool, err error) {
	family := uint8(syscall.AF_INET) // finds the IPv6 sockets of mapped addresses too
	if local.Addr().Is6() {
		family = syscall.AF_INET6
	}
	if local.Addr().Is6() != remote.Addr().Is6() {
		return found, false, nil
	}
	request := diagRequest{Family: family, Protocol: syscall.IPPROTO_TCP, States: ^uint32(0)}
	request.Header = syscall.NlMsghdr{Len: uint32(endian.Size(request)), Type: sockDiagByFamily, Flags: syscall.NLM_F_REQUEST}
	request.ID.Cookie = [2]uint32{^uint32(0), ^uint32(0)} // INET_DIAG_NOCOOKIE: whichever it is
	endian.BigEndian.PutUint16(request.ID.LocalPort[:], local.Port())
	endian.BigEndian.PutUint16(request.ID.RemotePort[:], remote.Port())
	copy(request.ID.Local[:], local.Addr().AsSlice())
	copy(request.ID.Remote[:], remote.Addr().AsSlice())
	message, err := endian.Append(nil, endian.NativeEndian, request)
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
	_, err = endian.Decode(answers[0].Data, endian.NativeEndian, &found)
	return found, err == nil, err
}

func (a *diagAnswer) local() netip.AddrPort  { return a.addr(a.ID.Local, a.ID.LocalPort) }
func (a *diagAnswer) remote() netip.AddrPort { return a.addr(a.ID.Remote, a.ID.RemotePort) }

func (a *diagAnswer) addr(ip [16]byte, port [2]byte) netip.AddrPort {
	addr := netip.AddrFrom16(ip)
	if a.Family == syscall.AF_INET {
		addr = netip.AddrFrom4([4]byte(ip[:4]))
	}
	return unmap(netip.AddrPortFrom(addr, endian.BigEndian.Uint16(port[:])))
}

// unmap makes the IPv4 address of one that is mapped into IPv6, as either end of the
// same connection may report it.
func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// holdsSocket tells whether process pid has the socket with this inode open. Where
// that cannot be seen although the process lives, it is not readable: it may be
// another user's, or one that has raised its privileges.
func holdsSocket(pid int, inode uint64) (held, readable bool) {
	if !procIsOurs() {
		return false, false
	}
	folder := "/proc/" + strconv.Itoa(pid)
	link := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	held, some, err := hasOpen(folder+"/fd", link)
	if !some && err == nil {
		// Its main thread has ended and has no files any more. The others may.
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

// hasOpen tells whether a folder of file descriptors, if there is some in it, has one
// that links to what link names.
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
		if err == nil && !errors.Is(linkErr, fs.ErrNotExist) { // that one was closed meanwhile
			err = linkErr
		}
	}
	return false, len(names) > 0, err
}

// portHolder returns the process that listens on a port, or that keeps others from it.
// It is not ok where that cannot be known: of another user's, only root can.
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

// socketHolder returns the first process that can be seen to have the socket with
// this inode open.
func socketHolder(inode uint64) (pid int, name string, ok bool) {
	for _, p := range processes() {
		if held, _ := holdsSocket(p.pid, inode); held {
			return p.pid, p.name, true
		}
	}
	return 0, "", false
}
