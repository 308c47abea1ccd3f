package main

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
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
	secured = &meteredConn{Conn: secured, remote: r}
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

	begun   atomic.Int32 // calls whose requests are not whole, and those that were no messages
	written atomic.Int64 // bytes
	closed  atomic.Bool
	given   int64 // bytes of answers; answers.mu guards it
}

// meteredConn is a connection that notes what becomes of it.
type meteredConn struct {
	net.Conn
	remote *remote
}

func (c *meteredConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.remote.written.Add(int64(n))
	return n, err
}

func (c *meteredConn) Close() error {
	c.remote.closed.Store(true)
	return c.Conn.Close()
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

const (
	maxAnswer = 64 << 20 // bytes of an answer that lists services
	maxUnread = 64 << 20 // bytes of all such answers that have not been read
)

// answers bounds what is kept for those who do not read: an answer is taken by grpc as a
// whole, and stays in memory until its reader's window lets it go or the connection ends.
type answers struct {
	mu   sync.Mutex           // guards given; held while an answer is made, one at a time
	gave map[*remote]struct{} // connections that were given one
}

// list makes out, an answer that lists services: f puts those in that are to be in it,
// and tells which. It fails with RESOURCE_EXHAUSTED where out would be too large, or too
// much of earlier answers has not been read.
func (r *registry) list(ctx context.Context, out proto.Message, f func(s *service, now time.Time) bool) error {
	a := &r.answers
	a.mu.Lock()
	defer a.mu.Unlock()
	if unread := a.unreadLocked(); unread > maxUnread {
		return status.Errorf(codes.ResourceExhausted, "%d bytes of earlier answers have not been read, at most %d may be", unread, maxUnread)
	}
	size := 0
	r.each(time.Now(), func(s *service, now time.Time) bool {
		if f(s, now) {
			size += s.size + recordSize
		}
		return size <= maxAnswer
	})
	if size > maxAnswer {
		return status.Errorf(codes.ResourceExhausted, "the services are too many for one message of at most %d bytes: call flowctl.operator.v1.Operator/Watch", maxAnswer)
	}
	if caller := remoteOf(ctx); caller != nil {
		if a.gave == nil {
			a.gave = make(map[*remote]struct{})
		}
		a.gave[caller] = struct{}{}
		caller.given = max(caller.given, caller.written.Load()) + int64(proto.Size(out))
	}
	return nil
}

// recordSize is what a service takes in an answer besides what it weighs, about.
const recordSize = 64

func (a *answers) unreadLocked() (bytes int64) {
	for r := range a.gave {
		unread := r.given - r.written.Load()
		if r.closed.Load() || unread <= 0 {
			delete(a.gave, r)
			continue
		}
		bytes += unread
	}
	return bytes
}
