// How Linux tells which component is at the other end of a connection: a socket has an inode,
// /proc shows which process has it open, and which process that one descends from.

package main

import (
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
)

// identifyPeer returns which component holds the other end of conn, a connection to flowctl: a
// process that flowctl has started for it, or a descendant of one. The processes of claimedID
// are looked at first. It cannot tell
//   - for another machine, or a container that a component may be a client of,
//   - while a process that flowctl may not look into could hold the socket.
func (i *identifier) identifyPeer(conn net.Conn, claimedID string) origin {
	conn = unwrap(conn)
	if unix, ok := conn.(*net.UnixConn); ok {
		return i.processOrigin(peerPID(unix))
	}
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	remote, alsoOK := conn.RemoteAddr().(*net.TCPAddr)
	if !ok || !alsoOK {
		return origin{}
	}
	inode, uid, ok, err := socketOwner(remote.AddrPort(), local.AddrPort())
	if ok {
		if from := i.holderOf(inode, uid, claimedID); from.known {
			return from
		}
		_, _, ok, err = socketOwner(remote.AddrPort(), local.AddrPort())
	}
	// A socket that is closed is no component's: a component waits for its answer.
	return origin{known: !ok && err == nil && remote.IP.IsLoopback() && i.seesSockets()}
}

// unwrap returns the connection of the kernel that conn is made of.
func unwrap(conn net.Conn) net.Conn {
	for {
		wrapper, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return conn
		}
		conn = wrapper.NetConn()
	}
}

// seesSockets tells whether the kernel tells of sockets at all.
func (i *identifier) seesSockets() bool {
	if !i.socketsVisible.Load() && canSeeSockets() {
		i.socketsVisible.Store(true)
	}
	return i.socketsVisible.Load()
}

// holderOf is identifyPeer for the TCP socket inode, which the user uid has made.
func (i *identifier) holderOf(inode uint64, uid int, claimedID string) origin {
	for range 2 { // a process can hand its socket on and end while /proc is read
		if from, decided := i.holderBelow(inode, uid, claimedID); decided {
			return from
		}
	}
	if pid, _, ok := socketHolder(inode); ok {
		return i.processOrigin(pid)
	}
	if _, err := os.Stat("/proc/1"); err != nil && uid == os.Getuid() {
		return origin{} // hidepid= of proc(5): a component may be hidden as well
	}
	return origin{known: true, unseen: i.containers}
}

// holderBelow looks for the holder of a socket among the processes below flowctl. It is not
// decided where none of them has the socket.
func (i *identifier) holderBelow(inode uint64, uid int, claimedID string) (from origin, decided bool) {
	unreadable := false // a process that flowctl may not look into may have it
	holds := func(pid int) bool {
		held, readable := holdsSocket(pid, inode)
		unreadable = unreadable || !readable && mayHaveMade(pid, uid)
		return held
	}
	leaders := i.leaders()
	for pid, id := range leaders {
		if id == claimedID && holds(pid) {
			return origin{component: id, known: true}, true
		}
	}
	for pid, id := range leaders {
		if id != claimedID && holds(pid) {
			return origin{component: id, known: true}, true
		}
	}
	below := i.descendants()
	for _, p := range below {
		if leaders[p.pid] == "" && holds(p.pid) {
			return i.processOrigin(p.pid), true
		}
	}
	if unreadable {
		if pid, _, ok := socketHolder(inode); ok {
			return i.processOrigin(pid), true
		}
		return origin{}, true
	}
	hidden := len(below) == 0 && len(leaders) > 0 // /proc does not show even the processes that flowctl has started
	return origin{}, hidden
}

// mayHaveMade tells whether a process can have made a socket of the user uid.
func mayHaveMade(pid, uid int) bool {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false // it has ended
	}
	_, rest, _ := strings.Cut(string(status), "\nUid:")
	uids, _, _ := strings.Cut(rest, "\n")                                       // real, effective, saved and file system: proc(5)
	return uid == 0 || slices.Contains(strings.Fields(uids), strconv.Itoa(uid)) // it may have been root
}

// processOrigin is componentOf as an origin.
func (i *identifier) processOrigin(pid int) origin {
	id, known := i.componentOf(pid)
	return origin{component: id, known: known}
}

// componentOf returns the component that process pid belongs to, commandID for the command
// after --, "" for none. It belongs to the first process above it that flowctl has started,
// or that leads its group. One that has left that tree is known by its environment. known
// is false where /proc does not tell.
func (i *identifier) componentOf(pid int) (id string, known bool) {
	leaders := i.leaders()
	self := os.Getpid()
	for at := pid; at != self; {
		p, ok := readProcess(at)
		if !ok || !procIsOurs() {
			return "", false
		}
		if id, ok := leaders[p.pid]; ok {
			return id, true
		}
		if id, ok := leaders[p.group]; ok {
			return id, true
		}
		if p.parent == self { // flowctl has adopted it
			return markedComponent(pid, i.mark)
		}
		if p.parent <= 1 {
			break
		}
		at = p.parent
	}
	return i.componentOutside(pid)
}

// componentOutside is componentOf for a process that is not below flowctl: that of a
// container is below its engine and belongs to the component that its environment names,
// any other to none.
func (i *identifier) componentOutside(pid int) (id string, known bool) {
	if inPIDNamespace(pid) {
		return "", true
	}
	if id, ok := markedComponent(pid, i.mark); ok {
		return id, true
	}
	_, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	return "", err == nil
}

// inPIDNamespace tells whether a process is in flowctl's own pid namespace, and so in no
// container.
func inPIDNamespace(pid int) bool {
	own, err := os.Readlink("/proc/self/ns/pid")
	its, itsErr := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/pid")
	return err == nil && itsErr == nil && own == its
}
