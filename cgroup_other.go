//go:build !linux

package main

import "syscall"

type cgroup struct{}

func makeCgroup(string) *cgroup             { return nil }
func (g *cgroup) hold(*syscall.SysProcAttr) {}
func (g *cgroup) path() string              { return "" }
func (g *cgroup) remove()                   {}
func (g *cgroup) part(string) *cgroup       { return nil }
func (g *cgroup) removePart(string)         {}
