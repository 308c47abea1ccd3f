// Who is at the other end of a connection to the control plane: which component, as far
// as the kernel of this machine tells. identity_linux.go asks it.

package main

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// commandID stands for the command after -- where the id of a component would stand. No
// component can have it, as an id has no spaces.
const commandID = "the command after --"

// origin is who is at the other end of a connection.
type origin struct {
	component string // the id of a component, commandID, or "" for who is of neither or cannot be told
	leader    int    // the pid of a process of component that flowctl has started; what was found ends with it
	unknown   string // why it cannot be told who calls, "" where it can
	final     bool   // another look would find no other
	believed  bool   // nobody is looked up: what a caller says of itself is believed
	owner     string // the user of this machine or the certificate by which it calls, "" for neither
	conn      int64  // the number of the connection
	address   string // the IP address from which it calls, "" for none
	certified string // the id of the component that its certificate names, or what is no id where that is of another pipeline; "" for none
	required  bool   // a component is only who has such a certificate
}

// runProcesses is what an identifier has to know of the processes of a run. Its methods may be
// called from any goroutine.
type runProcesses interface {
	leaders() map[int]string                // the id of the component, or commandID, by the pid of each process that was started and has not ended
	settledLeaders() map[int]string         // leaders, with what is being started
	leads(pid int, id string) bool          // tells whether leaders has that
	leaderOf(id string) int                 // the process of a component or of the command, and none beside it, 0 for none
	markOwner(pid int) string               // the component, or commandID, whose secret a process was started with, "" for none
	cgroupOwner(pid int) string             // the component in whose control group a process is, "" for none
	ownGroups() bool                        // tells whether components have control groups of their own that only root may join
	containers() (runningContainers, error) // of the run, as the engine knows them
}

// identifier finds the component that a process or a connection belongs to. Its methods may
// be called from any goroutine.
type identifier struct {
	processes runProcesses // nil for a control plane alone
	believes  bool         // the kernel can never tell: what a caller says of itself is believed

	asking    sync.Mutex // guards the fields below; held while the engine is asked
	asked     time.Time  // when that was done last
	answer    runningContainers
	answerErr error
}

// newIdentifier returns the identifier of a run, or of a control plane alone. It warns where the
// kernel can never tell who calls.
func newIdentifier(processes runProcesses, log *slog.Logger) *identifier {
	i := &identifier{processes: processes}
	if err := checkPeers(); err != nil {
		log.Warn("flowctl cannot tell who calls: it believes what callers say of themselves", "err", err)
		i.believes = true
	}
	return i
}

// containers returns the containers of the run as they are now. Callers that come while the
// engine is asked share its next answer.
func (i *identifier) containers() (runningContainers, error) {
	wanted := time.Now()
	i.asking.Lock()
	defer i.asking.Unlock()
	if i.asked.Before(wanted) {
		i.asked = time.Now()
		i.answer, i.answerErr = i.processes.containers()
	}
	return i.answer, i.answerErr
}

// peerCredentials are the transport credentials of the control plane's gRPC server. Each
// call that comes in by them knows its peerConn.
type peerCredentials struct {
	credentials.TransportCredentials             // of the listener that is for all
	identifier                       *identifier // nil: nobody is looked up
	operators                        []string    // names in client certificates
	pipeline                         string      // whose components certificates may name
	requireIdentity                  bool        // as required of an origin
	log                              *slog.Logger
}

// ServerHandshake makes raw ready for calls. On the listener for components there is no TLS,
// and who is not known to be of one is refused, as it could get round TLS there.
func (c peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, creds := &peerConn{conn: raw, identifier: c.identifier, number: connections.Add(1), required: c.requireIdentity}, c.TransportCredentials
	if tagged, ok := raw.(taggedConn); ok {
		if err := p.admit(tagged.purpose); err != nil {
			c.log.Debug("refused by a listener that is not for all", "addr", raw.RemoteAddr().String(), "err", err)
			return nil, nil, err
		}
		raw, creds = tagged.Conn, insecure.NewCredentials()
	}
	conn, info, err := creds.ServerHandshake(raw)
	if err != nil {
		c.log.Debug("TLS handshake failed", "addr", raw.RemoteAddr().String(), "err", err)
		return nil, nil, err
	}
	p.AuthInfo = info
	if over, ok := info.(credentials.TLSInfo); ok && len(over.State.VerifiedChains) > 0 {
		cert := over.State.PeerCertificates[0]
		p.certificate, p.operator, p.certified = cert.Subject.String(), hasName(cert, c.operators), componentsOf(cert, c.pipeline)
	}
	if _, ok := unwrap(raw).(*net.UnixConn); ok {
		_, _ = p.origin("") // now, as the pid that the kernel tells can be another process's later
	}
	return conn, p, nil
}

// admit fails for who is not to use a listener of that purpose.
func (p *peerConn) admit(purpose purpose) error {
	if purpose == forOperators { // who is none has an answer to what needs none
		if p.operator = p.identifier.mayOperate(p.conn); p.operator {
			p.found.Store(&foundOrigin{origin: origin{conn: p.number, owner: p.identifier.ownerOf(p.conn), final: true}}) // it is of no component
		}
		return nil
	}
	from, err := p.origin("")
	if err == nil && from.component == "" {
		err = errors.New("who is not known to be of a component of this pipeline has to use TLS")
	}
	return err
}

func (c peerCredentials) Clone() credentials.TransportCredentials {
	c.TransportCredentials = c.TransportCredentials.Clone()
	return c
}

// purpose is what a listener is for that is not for all.
type purpose int

const (
	forComponents purpose = iota // of a run, without TLS
	forOperators                 // a unix socket of flowctl's user alone
)

// taggedListener marks its connections for peerCredentials.
type taggedListener struct {
	net.Listener
	purpose purpose
}

type taggedConn struct {
	net.Conn
	purpose purpose
}

func (l taggedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return taggedConn{conn, l.purpose}, nil
}

// NetConn returns the connection that was marked.
func (c taggedConn) NetConn() net.Conn { return c.Conn }

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

// connections counts those that there have been.
var connections atomic.Int64

// askAgainAfter is how long it is believed that it cannot be told who calls.
const askAgainAfter = time.Second

// peerConn is a connection to the control plane. Who is at its other end is looked up when
// that is first asked for, as a connection without calls is to cost nothing, and again when
// the process that it was found for has ended. A look-up that failed is not kept.
type peerConn struct {
	credentials.AuthInfo
	conn       net.Conn
	identifier *identifier // nil: nobody is looked up
	number     int64       // tells it from all others
	// These do not change after the handshake.
	operator    bool     // by its user or its certificate
	certificate string   // the subject of the client's, "" for none
	certified   []string // the components that it names, as certified of an origin
	required    bool     // as that of an origin

	mu    sync.Mutex // held while it is looked up
	found atomic.Pointer[foundOrigin]
}

// foundOrigin is what a look-up has found.
type foundOrigin struct {
	origin
	at time.Time
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

// hasName tells whether a certificate has one of names: as its common name, DNS name, mail
// address or URI.
func hasName(c *x509.Certificate, names []string) bool {
	has := slices.Concat([]string{c.Subject.CommonName}, c.DNSNames, c.EmailAddresses)
	for _, uri := range c.URIs {
		has = append(has, uri.String())
	}
	return slices.ContainsFunc(has, func(name string) bool { return name != "" && slices.Contains(names, name) })
}

// componentsOf returns the ids of the components of a pipeline that a certificate names: by a URI
// spiffe://ANY/flowctl/PIPELINE/ID, or a DNS name ID.PIPELINE.flowctl. Where it names only those of others, it
// returns what is no id.
func componentsOf(c *x509.Certificate, pipeline string) (ids []string) {
	var others []string
	for _, uri := range c.URIs {
		switch parts := strings.Split(uri.Path, "/"); {
		case uri.Scheme != "spiffe" || len(parts) != 4 || parts[1] != "flowctl":
		case parts[2] == pipeline:
			ids = append(ids, parts[3])
		default:
			others = append(others, "component "+parts[3]+" of pipeline "+parts[2])
		}
	}
	for _, name := range c.DNSNames {
		of, ours := strings.CutSuffix(name, ".flowctl")
		switch id, known := strings.CutSuffix(of, "."+pipeline); {
		case !ours:
		case known:
			ids = append(ids, id)
		default:
			others = append(others, "component "+of+" of another pipeline")
		}
	}
	if len(ids) == 0 {
		return others
	}
	return ids
}

// byOperator tells whether an operator makes the call of ctx.
func byOperator(ctx context.Context) bool {
	p := peerConnOf(ctx)
	return p != nil && p.operator
}

// originOf returns who makes the call of ctx. claimedID is the component that the caller
// says it is, "" for none: that one's processes are looked at first. Errors: UNAVAILABLE
// where the look-up failed.
func originOf(ctx context.Context, claimedID string) (origin, error) {
	p := peerConnOf(ctx)
	if p == nil {
		return origin{believed: true}, nil
	}
	from, err := p.origin(claimedID)
	if tcp, ok := unwrap(p.conn).RemoteAddr().(*net.TCPAddr); ok {
		from.address = tcp.IP.String()
	}
	if from.required = p.required; slices.Contains(p.certified, claimedID) {
		from.certified = claimedID
	} else if len(p.certified) > 0 {
		from.certified = p.certified[0]
	}
	if err != nil {
		err = status.Errorf(codes.Unavailable, "flowctl cannot look up who calls, try again: %v", err)
	}
	return from, err
}

// origin is originOf for any call that comes by p.
func (p *peerConn) origin(claimedID string) (origin, error) {
	_, isUnix := unwrap(p.conn).(*net.UnixConn)
	if p.identifier == nil || p.identifier.believes && !isUnix {
		return origin{believed: true}, nil
	}
	if found := p.found.Load(); p.holds(found) {
		return found.origin, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.found.Load()
	if p.holds(before) {
		return before.origin, nil
	}
	if isUnix && before != nil {
		return origin{owner: before.owner, conn: p.number}, nil // its process has ended, and the pid that the kernel tells can be another one's
	}
	found, err := p.identifier.identifyPeer(p.conn, claimedID)
	if err != nil && isUnix {
		found.unknown = err.Error()
	} else if err != nil {
		return origin{}, err
	}
	found.final = found.final || isUnix // another look could find another process with its pid
	found.conn = p.number
	if p.certificate != "" {
		found.owner = "certificate " + p.certificate
	}
	p.found.Store(&foundOrigin{found, time.Now()})
	return found, nil
}

// holds tells whether found is still so.
func (p *peerConn) holds(found *foundOrigin) bool {
	switch {
	case found == nil:
		return false
	case found.component != "":
		return p.identifier.processes.leads(found.leader, found.component)
	}
	return found.final || time.Since(found.at) < askAgainAfter // a socket can be missed while it is handed on
}
