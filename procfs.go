package main

import (
	"fmt"
	"net"
	"slices"
)

// namesOf lists processes for people, of many only the first few.
func namesOf(processes []procInfo) string {
	var names []string
	for _, p := range processes {
		names = append(names, fmt.Sprintf("%d (%s)", p.pid, printable(p.name)))
	}
	return enumerate(names)
}

// runningContainers are the containers of a run, as their engine knows them: the component of
// each, by the pid of its first process and by its IP address on networks of its own.
type runningContainers struct {
	byPID  map[int]string
	byAddr map[string]string
}

// isOwnAddress tells whether an address is of this machine.
func isOwnAddress(ip net.IP) bool {
	if ip.IsLoopback() {
		return true
	}
	all, _ := net.InterfaceAddrs()
	return slices.ContainsFunc(all, func(a net.Addr) bool {
		own, ok := a.(*net.IPNet)
		return ok && own.IP.Equal(ip)
	})
}
