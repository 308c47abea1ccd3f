// What the kernel tells of processes, by /proc, and of the TCP sockets that they hold, by
// netlink (sock_diag(7)).

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

const (
	netlinkSockDiag  = 4  // NETLINK_SOCK_DIAG
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY
	diagCgroup       = 21 // INET_DIAG_CGROUP_ID of linux/inet_diag.h, since Linux 5.9

	// States of a TCP socket, of net/tcp_states.h.
	tcpEstablished = 1
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
	tcpListen      = 10
)

// procInfo is what /proc says of a process.
type procInfo struct {
	pid, parent, group, session int
	zombie                      bool
	begun                       uint64 // in clock ticks since boot: tells it from a later one with its pid
	name                        string
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

// childPIDs returns the children of a process, zombies included. It can miss some while
// others end.
func childPIDs(pid int) []int {
	var pids []int
	tasks := "/proc/" + strconv.Itoa(pid) + "/task/"
	threads, _ := os.ReadDir(tasks)
	for _, thread := range threads {
		pids = append(pids, childrenIn(tasks+thread.Name()+"/children")...)
	}
	return pids
}

// eachBelow calls f with each process below pid, so many at most, and goes on below it where f returns
// true. It can miss some while others end.
func eachBelow(pid int, most *int, f func(procInfo) bool) {
	for _, child := range childPIDs(pid) {
		if *most <= 0 {
			return
		}
		*most--
		if p, ok := readProcess(child); ok && p.parent == pid && f(p) {
			eachBelow(child, most, f)
		}
	}
}

// adoptedBy returns the children of a process's main thread, the one that gets its orphans
// (find_new_reaper in the kernel's exit.c), zombies included.
func adoptedBy(pid int) []int { return childrenIn(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid)) }

func childrenIn(list string) (pids []int) {
	data, _ := os.ReadFile(list)
	for _, field := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(field); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
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
	p.session, _ = strconv.Atoi(fields[3])
	p.begun, _ = strconv.ParseUint(fields[19], 10, 64)
	return p, true
}

// dropProgram gives back the memory of the program itself, most of what the guard has resident
// after its start: what is needed again is read from the file again. A mapping in which some
// page has been written to, before it was made read-only, stays as it is.
func dropProgram() {
	smaps, _ := os.ReadFile("/proc/self/smaps")
	var from, to uintptr
	var mode string
	own := 0 // kB
	for line := range strings.Lines(string(smaps)) {
		fields := strings.Fields(line)
		switch fields[0] {
		default:
			if !strings.HasSuffix(fields[0], ":") { // the first line of a mapping
				_, _ = fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode)
				own = 0
				if len(fields) < 6 || fields[5][0] != '/' {
					own = 1
				}
			}
		case "Anonymous:":
			kB, _ := strconv.Atoi(fields[1])
			own += kB
		case "Swap:":
			kB, _ := strconv.Atoi(fields[1])
			if own += kB; own == 0 && mode[1] != 'w' {
				_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, from, to-from, syscall.MADV_DONTNEED)
			}
		}
	}
}

// procIsOurs tells whether /proc is of flowctl's own pid namespace. The pids of another
// namespace mean other processes.
func procIsOurs() bool {
	self, _ := os.Readlink("/proc/self")
	return self == strconv.Itoa(os.Getpid())
}

// peerProcess returns the process that connected to a unix socket, 0 for one of a pid namespace
// that is not below flowctl's, and its user (SO_PEERCRED of unix(7)).
func peerProcess(conn *net.UnixConn) (pid, uid int) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, -1
	}
	uid = -1
	_ = raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			pid, uid = int(cred.Pid), int(cred.Uid)
		}
	})
	return pid, uid
}

// processCgroup returns the folder of the control group that a process is in, "" without
// cgroup v2.
func processCgroup(pid int) string {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	groups, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	path, found := "", false
	for line := range strings.Lines(string(groups)) {
		if path, found = strings.CutPrefix(strings.TrimSpace(line), "0::"); found {
			break
		}
	}
	for line := range strings.Lines(string(mounts)) {
		mount, kind, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(mount); found && strings.HasPrefix(kind, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return filepath.Join(fields[4], path)
		}
	}
	return ""
}

// fileInode returns the inode of a file, 0 for none.
func fileInode(path string) uint64 {
	var stat syscall.Stat_t
	if syscall.Stat(path, &stat) != nil {
		return 0
	}
	return stat.Ino
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

// tcpSocket is a TCP socket that some process holds.
type tcpSocket struct {
	inode  uint64
	uid    int    // who has made it
	cgroup uint64 // inode of the control group in which it was made, 0 where the kernel does not tell
}

// findSocket returns the TCP socket from local to remote in this network namespace. It is nil
//   - without such a socket,
//   - while no process holds it: it was not accepted yet, or is closed,
//   - where the kernel has no tcp_diag, or the address has a zone.
//
// It fails if the kernel cannot be asked, for lack of a descriptor or of memory.
func findSocket(local, remote netip.AddrPort) (*tcpSocket, error) {
	local, remote = unmap(local), unmap(remote)
	found, cgroup, ok, err := lookUpSocket(local, remote)
	if !ok || found.local() != local || found.remote() != remote || found.Inode == 0 {
		return nil, err // what was found is a listener
	}
	switch found.State {
	case tcpEstablished, tcpCloseWait, tcpFinWait1, tcpFinWait2:
		return &tcpSocket{uint64(found.Inode), int(found.UID), cgroup}, nil
	}
	return nil, nil
}

// spareFiles are descriptors that are kept for look-ups, as there may be none left when one
// is needed.
var spareFiles struct {
	sync.RWMutex // held by who uses them, and for reading by who looks without them and would take them away
	files        [4]*os.File
}

// withSpareFiles calls f while there are descriptors for it, for one caller at a time. It fails,
// and what f has found means nothing, where others have taken them.
func withSpareFiles(f func()) error {
	spareFiles.Lock()
	defer spareFiles.Unlock()
	for n := range spareFiles.files {
		spareFiles.files[n].Close() // which a nil one refuses
	}
	f()
	for n := range spareFiles.files {
		var err error
		if spareFiles.files[n], err = os.Open(os.DevNull); err != nil {
			return err
		}
	}
	return nil
}

// withoutSpareFiles calls f, which may find no descriptors, for any number of callers at a time.
func withoutSpareFiles(f func()) {
	spareFiles.RLock()
	defer spareFiles.RUnlock()
	f()
}

// checkPeers fails where the kernel can never tell who is at the other end of a connection. It
// looks for a connection of flowctl to itself. Where there can be none, as others hold all ports,
// it does not fail: nobody is believed for that, and each look-up tells.
func checkPeers() error {
	if !procIsOurs() {
		return errors.New("/proc is that of another pid namespace")
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil
	}
	defer lis.Close()
	conn, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		return nil
	}
	defer conn.Close()
	socket, err := findSocket(conn.LocalAddr().(*net.TCPAddr).AddrPort(), conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	switch {
	case err != nil:
		return fmt.Errorf("the kernel cannot be asked about sockets: %v (a unit with RestrictAddressFamilies= needs AF_NETLINK)", err)
	case socket == nil:
		return errors.New("the kernel does not tell of sockets")
	}
	if held, _ := holdsSocket(os.Getpid(), socket.inode); !held {
		return errors.New("/proc does not show who holds a socket")
	}
	return nil
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
		found, _, ok, _ := lookUpSocket(want, netip.AddrPortFrom(none, 0))
		if ok && found.State == tcpListen && found.Inode != 0 && found.local().Port() == want.Port() &&
			(found.local().Addr() == want.Addr() || found.local().Addr().IsUnspecified()) {
			return uint64(found.Inode), true
		}
	}
	return 0, false
}

// diagSocket is the netlink socket by which the kernel is asked. It is kept open, as there may
// be no descriptor left when it is needed.
var diagSocket = struct {
	sync.Mutex // held while the kernel is asked
	fd         int
}{fd: -1}

// askKernel sends a netlink message and returns the first answer, nil where there is none.
func askKernel(message []byte) ([]byte, error) {
	diagSocket.Lock()
	defer diagSocket.Unlock()
	if diagSocket.fd < 0 {
		fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, netlinkSockDiag)
		if err != nil {
			return nil, os.NewSyscallError("socket", err)
		}
		diagSocket.fd = fd
	}
	if err := syscall.Sendto(diagSocket.fd, message, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	var buf [1024]byte
	n, _, err := syscall.Recvfrom(diagSocket.fd, buf[:], syscall.MSG_DONTWAIT) // the kernel answers before Sendto returns
	if err != nil {
		return nil, os.NewSyscallError("recvfrom", err)
	}
	answers, err := syscall.ParseNetlinkMessage(buf[:n])
	if err != nil || len(answers) == 0 || answers[0].Header.Type != sockDiagByFamily { // that is NLMSG_ERROR: there is none
		return nil, err
	}
	return answers[0].Data, nil
}

// lookUpSocket asks the kernel for the socket that a packet from remote to local would reach,
// that of a connection, or else a listener, and for the inode of its control group. It fails
// if it cannot ask.
func lookUpSocket(local, remote netip.AddrPort) (found diagAnswer, cgroup uint64, ok bool, err error) {
	family := uint8(syscall.AF_INET) // finds IPv6 sockets with mapped addresses as well
	if local.Addr().Is6() {
		family = syscall.AF_INET6
	}
	if local.Addr().Is6() != remote.Addr().Is6() {
		return found, 0, false, nil
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
		return found, 0, false, err
	}
	answer, err := askKernel(message)
	if err != nil || answer == nil {
		return found, 0, false, err
	}
	n, err := binary.Decode(answer, binary.NativeEndian, &found)
	if err != nil {
		return found, 0, false, err
	}
	// Attributes follow, each with its length and its type, at steps of four bytes.
	for rest := answer[n:]; len(rest) >= 4; {
		size, kind := int(binary.NativeEndian.Uint16(rest)), binary.NativeEndian.Uint16(rest[2:])
		if size < 4 || size > len(rest) {
			break
		}
		if kind == diagCgroup && size >= 12 {
			cgroup = binary.NativeEndian.Uint64(rest[4:])
		}
		rest = rest[min(len(rest), (size+3)&^3):]
	}
	return found, cgroup, true, nil
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

// shortPath returns another path of a folder or socket, which is short enough for the address
// of a socket, until done is called. A link is refused.
func shortPath(path string) (short string, done func(), err error) {
	const oPath = 0x200000 // O_PATH of open(2)
	fd, err := syscall.Open(path, oPath|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var info syscall.Stat_t
	if err := syscall.Fstat(fd, &info); err != nil || info.Mode&syscall.S_IFMT == syscall.S_IFLNK {
		syscall.Close(fd)
		return "", nil, fmt.Errorf("%s must not be a link", path)
	}
	return "/proc/self/fd/" + strconv.Itoa(fd), func() { syscall.Close(fd) }, nil
}
