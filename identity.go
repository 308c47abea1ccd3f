package main

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// tracer finds the process at the other end of a connection. claim is the component
// that it says it is, with which to begin.
type tracer func(conn net.Conn, claim string) origin

// tracing are transport credentials under which each call knows the connection that
// it came by, and so whose it is, unless trace is nil.
type tracing struct {
	credentials.TransportCredentials
	trace tracer
}

// ServerHandshake refuses a process that is of no component on the listener that is
// there for components alone: it would go round TLS. One that could be in a container of
// the pipeline is let in, though it may be another's: the engine may be of another user,
// and then flowctl cannot see whose its processes are.
func (t tracing) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := t.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		return nil, nil, err
	}
	r := &remote{AuthInfo: info, conn: conn, trace: t.trace}
	if _, private := conn.(privateConn); private && t.trace != nil {
		if from := r.origin(""); from.known && from.component == "" && !from.hidden {
			return nil, nil, errors.New("a process that is no component of this pipeline is to use TLS")
		}
	}
	return secured, r, nil
}

func (t tracing) Clone() credentials.TransportCredentials {
	return tracing{t.TransportCredentials.Clone(), t.trace}
}

// remote is the other end of one connection. Whose it is is looked up once, when it
// is first asked for, so that a connection on which nothing is said costs nothing.
type remote struct {
	credentials.AuthInfo
	conn  net.Conn
	trace tracer
	found atomic.Pointer[origin]
	mu    sync.Mutex // held while it is looked up

	begun atomic.Int32 // calls whose requests are not whole, and those that were no messages
}

// remoteOf is who makes the call of ctx, nil where it is not from a connection.
func remoteOf(ctx context.Context) *remote {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	r, _ := caller.AuthInfo.(*remote)
	return r
}

// originOf tells who makes the call of ctx. claim is who the caller says it is.
func originOf(ctx context.Context, claim string) origin {
	if r := remoteOf(ctx); r != nil && r.trace != nil {
		return r.origin(claim)
	}
	return origin{}
}

func (r *remote) origin(claim string) origin {
	if found := r.found.Load(); found != nil {
		return *found
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if found := r.found.Load(); found != nil {
		return *found
	}
	found := r.trace(r.conn, claim)
	r.found.Store(&found)
	return found
}

// origin is who is at the other end of a connection, as far as the kernel tells.
type origin struct {
	component string // its id in the pipeline, guestID, or "" for a process that is of none
	known     bool   // false where the kernel cannot tell, as for another machine
	hidden    bool   // flowctl cannot see the process, which could be one in a container
}

// guestID stands for the command after -- where an id of a component would. No component
// can have it.
const guestID = "--"
