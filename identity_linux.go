package main

import (
	"bytes"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
)

// componentAt tells which component holds the other end of a connection to flowctl:
// it, or what it has started. claim is the one to begin with. known is false where
// the kernel cannot tell: for another machine, a container, which a component may be
// the client of, or a process of a component that flowctl may not look into. With an id
// of "" it is known that the other end is of no component, unless it is hidden: a process
// that cannot be seen, and could be that of a container.
func (s *supervisor) componentAt(conn net.Conn, claim string) (id string, known, hidden bool) {
	switch conn := conn.(type) {
	case *net.UnixConn:
		id, known = s.componentOf(peerPID(conn))
		return id, known, false
	default:
		local, ok := conn.LocalAddr().(*net.TCPAddr)
		remote, alsoOK := conn.RemoteAddr().(*net.TCPAddr)
		if !ok || !alsoOK {
			return "", false, false
		}
		inode, uid, ok, err := socketOwner(remote.AddrPort(), local.AddrPort())
		if ok {
			if id, known, hidden := s.componentHolding(inode, uid, claim); known {
				return id, true, hidden
			}
			_, _, ok, err = socketOwner(remote.AddrPort(), local.AddrPort())
		}
		// Who has closed it did not wait for an answer, as components do.
		return "", !ok && err == nil && remote.IP.IsLoopback() && socketsVisible(), false
	}
}

// componentHolding is componentAt for the TCP socket inode of the user uid.
func (s *supervisor) componentHolding(inode uint64, uid int, claim string) (id string, known, hidden bool) {
	leaders := s.leaders.now()
	for pid, id := range leaders {
		if id != claim {
			continue
		}
		if held, _ := holdsSocket(pid, inode); held {
			return id, true, false
		}
	}
	for range 2 { // a process can hand its socket on and end while /proc is read
		blind := false
		for pid, id := range leaders {
			held, readable := holdsSocket(pid, inode)
			if held {
				return id, true, false
			}
			blind = blind || !readable && mayHaveMade(pid, uid)
		}
		below := s.descendants()
		for _, p := range below {
			if leaders[p.pid] != "" {
				continue
			}
			held, readable := holdsSocket(p.pid, inode)
			if held {
				id, known = s.componentOf(p.pid)
				return id, known, false
			}
			blind = blind || !readable && mayHaveMade(p.pid, uid)
		}
		if pid, _, ok := socketHolder(inode); ok && blind {
			id, known = s.componentOf(pid)
			return id, known, false
		}
		if blind || len(below) == 0 && len(leaders) > 0 { // a /proc that shows not even those hides them
			return "", false, false
		}
	}
	if pid, _, ok := socketHolder(inode); ok {
		id, known = s.componentOf(pid)
		return id, known, false
	}
	if _, err := os.Stat("/proc/1"); err != nil && uid == os.Getuid() {
		return "", false, false // hidepid= of proc(5): a component's may be hidden, too
	}
	return "", true, s.settings.engine != nil
}

// mayHaveMade tells whether a process can have made a socket that is of the user uid.
func mayHaveMade(pid, uid int) bool {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false // it has ended
	}
	_, rest, _ := strings.Cut(string(status), "\nUid:")
	uids, _, _ := strings.Cut(rest, "\n")                                       // real, effective, saved and file system: proc(5)
	return uid == 0 || slices.Contains(strings.Fields(uids), strconv.Itoa(uid)) // it may have been root
}

// componentOutside tells which component a process is of that is not below flowctl:
// none, or in a container, whose processes are below its engine, the one that its
// environment names. known is false where that cannot be read.
func (s *supervisor) componentOutside(pid int) (id string, known bool) {
	if inPIDNamespace(pid) {
		return "", true
	}
	if id, known = s.markedComponent(pid); known {
		return id, true
	}
	_, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	return "", err == nil
}

// inPIDNamespace tells whether a process is in flowctl's own pid namespace, and not in
// a container.
func inPIDNamespace(pid int) bool {
	own, err := os.Readlink("/proc/self/ns/pid")
	its, itsErr := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/pid")
	return err == nil && itsErr == nil && own == its
}

// componentOf tells which component process pid is of, as componentAt does. One that
// has left the tree of its leader is known by its environment.
func (s *supervisor) componentOf(pid int) (id string, known bool) {
	leaders := s.leaders.now()
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
		if p.parent == self { // adopted
			return s.markedComponent(pid)
		}
		if p.parent <= 1 {
			break
		}
		at = p.parent
	}
	return s.componentOutside(pid)
}

// markedComponent is the component of this run that the environment of a process
// names. What a flowctl starts that is itself a component has a mark of its own.
func (s *supervisor) markedComponent(pid int) (id string, known bool) {
	env := environ(pid)
	_, rest, ok := bytes.Cut(env, []byte("\x00FLOWCTL_COMPONENT_ID="))
	name, _, _ := bytes.Cut(rest, []byte{0})
	if !ok || !bytes.Contains(env, []byte("\x00"+runMark+"="+s.run+"\x00")) {
		return "", false
	}
	return string(name), true
}
