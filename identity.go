// Who is at the other end of a connection to the control plane: which component, as far
// as the kernel of this machine tells. identity_linux.go asks it.

package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
)

// commandID stands for the command after -- where the id of a component would stand. No
// component can have it.
const commandID = "--"

// origin is who is at the other end of a connection.
type origin struct {
	component string // the id of a component, commandID, or "" for a process that is of neither
	known     bool   // false where the kernel cannot tell, as for another machine
	unseen    bool   // flowctl cannot see the process: it may be in a container of the pipeline
}

// identifier finds the component that a process or a connection belongs to. It holds what
// the rest of flowctl knows of the processes of a run. Its methods may be called from any
// goroutine.
type identifier struct {
	leaders     func() map[int]string // the id of the component, or commandID, by the pid of each process that was started and has not ended
	descendants func() []procInfo     // all processes below flowctl that a component can have started
	mark        string                // the variable that each process of the run was started with, as NAME=value
	containers  bool                  // an engine may have started processes of the run

	socketsVisible atomic.Bool // the kernel has told of a socket before
}

// peerCredentials are the transport credentials of the control plane's gRPC server. Each
// call that comes in by them knows its peerConn.
type peerCredentials struct {
	credentials.TransportCredentials                                              // of all listeners but a componentListener
	identify                         func(conn net.Conn, claimedID string) origin // nil: nobody is looked up
	log                              *slog.Logger
}

// ServerHandshake makes raw ready for calls. On a componentListener there is no TLS, and a
// process that is known to be of no component is refused, as it could get round TLS there.
// A process that cannot be seen is let in: the container engine may be another user's, and
// then flowctl sees none of its processes.
func (c peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, creds := &peerConn{conn: raw, identify: c.identify}, c.TransportCredentials
	if own, ok := raw.(componentConn); ok {
		if from := p.origin(""); from.known && from.component == "" && !from.unseen {
			return nil, nil, errors.New("a process that is of no component of this pipeline has to use TLS")
		}
		raw, creds = own.Conn, insecure.NewCredentials()
	}
	conn, info, err := creds.ServerHandshake(raw)
	if err != nil {
		c.log.Debug("TLS handshake failed", "addr", raw.RemoteAddr().String(), "err", err)
		return nil, nil, err
	}
	p.AuthInfo = info
	return conn, p, nil
}

func (c peerCredentials) Clone() credentials.TransportCredentials {
	c.TransportCredentials = c.TransportCredentials.Clone()
	return c
}

// componentListener is a listener for the components of a run alone. It marks its
// connections for peerCredentials.
type componentListener struct{ net.Listener }

type componentConn struct{ net.Conn }

func (l componentListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return componentConn{conn}, nil
}

// NetConn returns the connection that was marked.
func (c componentConn) NetConn() net.Conn { return c.Conn }

// peerConn is a connection to the control plane. Who is at its other end is looked up
// once, when that is first asked for: a connection without calls costs nothing.
type peerConn struct {
	credentials.AuthInfo
	conn     net.Conn
	identify func(conn net.Conn, claimedID string) origin // nil: nobody is looked up

	mu    sync.Mutex // held while it is looked up
	found atomic.Pointer[origin]
}

// peerConnOf returns the connection that the call of ctx came by, nil if it came by none.
func peerConnOf(ctx context.Context) *peerConn {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	p, _ := caller.AuthInfo.(*peerConn)
	return p
}

// originOf returns who makes the call of ctx. claimedID is the component that the caller
// says it is, "" for none: that one's processes are looked at first.
func originOf(ctx context.Context, claimedID string) origin {
	if p := peerConnOf(ctx); p != nil {
		return p.origin(claimedID)
	}
	return origin{}
}

// origin is originOf for any call that comes by p.
func (p *peerConn) origin(claimedID string) origin {
	if p.identify == nil {
		return origin{}
	}
	if found := p.found.Load(); found != nil {
		return *found
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if found := p.found.Load(); found != nil {
		return *found
	}
	found := p.identify(p.conn, claimedID)
	p.found.Store(&found)
	return found
}
