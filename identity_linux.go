// How Linux tells which component is at the other end of a connection: a socket has an inode
// and a control group, /proc shows which process has it open, and which process that one
// descends from.

package main

import (
	"cmp"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
)

// identifyPeer returns who holds the other end of conn, a connection to flowctl. The processes
// of claimedID are looked at first. It fails where the kernel or the engine cannot be asked now.
func (i *identifier) identifyPeer(conn net.Conn, claimedID string) (origin, error) {
	conn = unwrap(conn)
	if unix, ok := conn.(*net.UnixConn); ok {
		pid, uid := peerProcess(unix)
		return i.withOwner(uid, func() (origin, error) {
			if pid == 0 {
				return origin{unknown: "it is in a pid namespace that flowctl does not see"}, nil
			}
			return i.originOf(pid)
		})
	}
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	remote, alsoOK := conn.RemoteAddr().(*net.TCPAddr)
	if !ok || !alsoOK {
		return origin{unknown: "it calls by no TCP and no unix socket"}, nil
	}
	socket, err := findSocket(remote.AddrPort(), local.AddrPort())
	switch {
	case err != nil:
		return origin{}, err
	case socket != nil:
		return i.withOwner(socket.uid, func() (origin, error) { return i.holderOf(socket, claimedID) })
	case isOwnAddress(remote.IP):
		return origin{}, nil // it is closed: a component waits for its answer
	}
	if i.processes == nil {
		return origin{}, nil
	}
	return i.remoteOrigin(remote.IP.String())
}

// withOwner returns what find does, for a caller that is the user uid of this machine. A control
// plane alone has no components to find.
func (i *identifier) withOwner(uid int, find func() (origin, error)) (from origin, err error) {
	if i.processes != nil {
		from, err = find()
	}
	from.owner = "user " + strconv.Itoa(uid)
	return from, err
}

// mayOperate tells whether an operator connected to a unix socket, who is of no component. The engine
// is not asked, which can take seconds: what is in a container is in another pid namespace.
func (i *identifier) mayOperate(conn net.Conn) bool {
	if !isOperator(conn) {
		return false
	}
	pid, _ := peerProcess(unwrap(conn).(*net.UnixConn))
	at := i.placeOf(pid)
	return at.unknown == "" && (at.component == "" || at.component == commandID)
}

// ownerOf returns the user that connected to a unix socket, as an owner.
func (i *identifier) ownerOf(conn net.Conn) string {
	_, uid := peerProcess(unwrap(conn).(*net.UnixConn))
	return "user " + strconv.Itoa(uid)
}

// isOperator tells whether the process that connected to a unix socket is of flowctl's own user
// or of root, and in flowctl's own pid namespace.
func isOperator(conn net.Conn) bool {
	unix, ok := unwrap(conn).(*net.UnixConn)
	if !ok {
		return false
	}
	pid, uid := peerProcess(unix)
	if pid == 0 || uid != os.Geteuid() && uid != 0 {
		return false
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return uid == 0 && os.Geteuid() != 0 // which ProtectProc= of a unit hides
	}
	_, rest, _ := strings.Cut(string(status), "\nNSpid:")
	pids, _, _ := strings.Cut(rest, "\n") // one for each namespace from flowctl's on: proc(5)
	return len(strings.Fields(pids)) == 1
}

// isOwnUser tells whether the kernel says that a process of flowctl's own user or of root is at
// the other end of conn.
func isOwnUser(conn net.Conn) bool {
	uid := -1
	switch conn := unwrap(conn).(type) {
	case *net.UnixConn:
		_, uid = peerProcess(conn)
	case *net.TCPConn:
		local, remote := conn.LocalAddr().(*net.TCPAddr), conn.RemoteAddr().(*net.TCPAddr)
		if socket, err := findSocket(remote.AddrPort(), local.AddrPort()); err == nil && socket != nil {
			uid = socket.uid
		}
	}
	return uid == 0 || uid == os.Geteuid()
}

// remoteOrigin returns who calls from an address that is not of this machine: a container on a
// network of its own, or somebody who is no component of a run here.
func (i *identifier) remoteOrigin(addr string) (origin, error) {
	containers, err := i.containers()
	if id, ok := containers.byAddr[addr]; ok {
		return i.of(id), nil
	}
	return origin{unknown: "it calls from " + addr + ", and is in no container of this pipeline"}, err
}

// of returns the origin of a component, which is none once that has ended.
func (i *identifier) of(id string) origin {
	leader := i.processes.leaderOf(id)
	if leader == 0 {
		return origin{}
	}
	return origin{component: id, leader: leader}
}

// originOf returns who process pid is of, which nobody else holds.
func (i *identifier) originOf(pid int) (origin, error) { return i.withContainers(i.placeOf(pid)) }

// holderOf returns who holds a TCP socket of this machine. What is below flowctl is looked at first, as
// it takes long to look at all processes, and without the spare descriptors, so that nobody waits
// for others who look.
func (i *identifier) holderOf(socket *tcpSocket, claimedID string) (origin, error) {
	holder := 0
	withoutSpareFiles(func() { holder, _ = i.holderInTree(socket, claimedID) })
	if holder != 0 {
		return i.originOf(holder)
	}
	containers, err := i.containers()
	if err != nil {
		return origin{}, err
	}
	var at place
	if err := withSpareFiles(func() { at = i.search(socket, len(containers.byPID) > 0) }); err != nil {
		return origin{}, err
	}
	if at.component == "" {
		if id := containerOf(socket.cgroup, containers); id != "" { // it has a control group of its own
			return i.of(id), nil
		}
	}
	return i.withContainers(at)
}

// search returns where the process is that holds a socket. Where one can hold it that flowctl may not
// look into, that cannot be told, and where none is found it is of no component's processes.
// outside tells whether a component's can be elsewhere than below flowctl.
func (i *identifier) search(socket *tcpSocket, outside bool) place {
	holder, hidden := i.holderInTree(socket, "") // again: there may have been no descriptors before
	_, err := os.Stat("/proc/1")
	switch {
	case holder != 0:
		return i.placeOf(holder)
	case err == nil && !hidden && !outside:
		return place{}
	}
	for _, p := range processes() {
		if held, _ := holdsSocket(p.pid, socket.inode); held && mayHaveMade(p.pid, socket.uid) {
			return i.placeOf(p.pid)
		}
	}
	switch {
	case hidden:
		return place{unknown: "a process that flowctl may not look into can hold its socket (only root may look into one with capabilities of its own)", final: true}
	case err != nil:
		return place{unknown: "/proc hides processes (hidepid=)"}
	}
	return place{}
}

// holderInTree returns the process below flowctl that holds a socket, 0 for none, and whether one that
// flowctl may not look into can. Those of component claimedID are looked at first.
func (i *identifier) holderInTree(socket *tcpSocket, claimedID string) (holder int, hidden bool) {
	if leader := i.processes.leaderOf(claimedID); leader != 0 {
		if holder, _ := holderBelow(leader, socket); holder != 0 {
			return holder, false
		}
	}
	for _, child := range childPIDs(os.Getpid()) {
		holder, some := holderBelow(child, socket)
		if holder != 0 {
			return holder, false
		}
		hidden = hidden || some
	}
	return 0, hidden
}

// holderBelow is holderInTree for pid and those below it. It can miss one whose parent ends meanwhile.
func holderBelow(pid int, socket *tcpSocket) (holder int, hidden bool) {
	held, readable := holdsSocket(pid, socket.inode)
	if (held || !readable) && mayHaveMade(pid, socket.uid) {
		if held {
			return pid, false
		}
		hidden = true
	}
	for _, child := range childPIDs(pid) {
		holder, some := holderBelow(child, socket)
		if holder != 0 {
			return holder, false
		}
		hidden = hidden || some
	}
	return 0, hidden
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

// place is where a process stands among those of a run.
type place struct {
	component string       // the component, or commandID, that it belongs to, "" for none
	leader    int          // the process that flowctl has started of it
	above     map[int]bool // for "": it and what is above it, below init and flowctl
	unknown   string       // why that cannot be told, "" where it can
	final     bool         // another look would find no other
}

// placeOf returns where process pid stands. It belongs to the first process above it that flowctl has
// started. What flowctl has adopted belongs to the component whose session, control group or secret
// it has: nobody can join a session.
func (i *identifier) placeOf(pid int) place {
	untold := place{unknown: fmt.Sprintf("/proc does not tell of process %d", pid)}
	if !procIsOurs() {
		return untold
	}
	leaders, self := i.processes.leaders(), os.Getpid()
	above := make(map[int]bool)
	for at := pid; at > 1 && at != self; {
		p, ok := readProcess(at)
		if !ok && (at != pid || !treeIsVisible(self)) {
			return untold // it has ended meanwhile, or /proc hides it
		} else if !ok {
			break // a process that has ended or that /proc hides, and that is not below flowctl
		}
		if id, ok := leaders[at]; ok {
			return place{component: id, leader: at}
		}
		above[at] = true
		if at = p.parent; at != self {
			continue
		}
		leaders = i.processes.settledLeaders() // it can call before flowctl has noted that it was started
		for _, leader := range []int{p.pid, p.session} {
			if id, ok := leaders[leader]; ok {
				return place{component: id, leader: leader}
			}
		}
		if id := i.adoptedOwner(p.pid); id != "" {
			return place{component: id, leader: i.processes.leaderOf(id)}
		}
		return place{unknown: "it is below flowctl, and of which component cannot be told"}
	}
	return place{above: above}
}

// withContainers returns who a process of a place is of: where it is of no component's processes it may
// be of a container. It fails where the engine does not answer.
func (i *identifier) withContainers(at place) (origin, error) {
	switch {
	case at.unknown != "":
		return origin{unknown: at.unknown, final: at.final}, nil
	case at.component != "" && at.leader == 0: // it has ended meanwhile
		return origin{}, nil
	case at.component != "":
		return origin{component: at.component, leader: at.leader}, nil
	}
	containers, err := i.containers()
	for pid, id := range containers.byPID {
		if at.above[pid] {
			return i.of(id), nil
		}
	}
	return origin{}, err
}

// componentOf returns the component that process pid belongs to, commandID for the command
// after --, "" for none. known is false where that cannot be told. It fails where the engine does
// not answer.
func (i *identifier) componentOf(pid int) (id string, known bool, err error) {
	from, err := i.originOf(pid)
	return from.component, from.unknown == "" && err == nil, err
}

// treeIsVisible tells whether /proc shows pid and all processes below it.
func treeIsVisible(pid int) bool {
	for _, child := range childPIDs(pid) {
		_, ok := readProcess(child)
		if !ok && slices.Contains(childPIDs(pid), child) || ok && !treeIsVisible(child) { // else it has ended
			return false
		}
	}
	return true
}

// adoptedOwner returns the component that a process is of by its control group or by the
// secret that it was started with, "" for none and where they contradict each other.
func (i *identifier) adoptedOwner(pid int) string {
	grouped, marked := "", i.processes.markOwner(pid)
	if i.processes.ownGroups() {
		grouped = i.processes.cgroupOwner(pid)
	}
	if marked == commandID { // who is of the command's tree may do more
		marked = ""
	}
	if grouped != "" && marked != "" && grouped != marked {
		return ""
	}
	return cmp.Or(grouped, marked)
}

// containerOf returns the component whose container has made a socket in the control group
// with that inode, "" for none.
func containerOf(cgroup uint64, containers runningContainers) string {
	own := processCgroup(os.Getpid())
	for pid, id := range containers.byPID {
		if folder := processCgroup(pid); folder != own && fileInode(folder) == cgroup {
			return id
		}
	}
	return ""
}
