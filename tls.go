// The files of TLS: the certificates that the control plane shows and asks for, read again
// when they change, and those of a client of it.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	maxPEMFile = 4 << 20         // bytes; all the CAs of a system take far less
	hintTime   = 2 * time.Second // for all that hint asks of an endpoint
)

// tlsFlags are the values of -tls-cert, -tls-key and -tls-ca-cert, the names of PEM files, and of a
// client's -tls-server-name. Without any there is no TLS.
type tlsFlags struct{ cert, key, ca, serverName string }

// tlsFiles is what the files hold.
type tlsFiles struct {
	cert  tls.Certificate
	chain []*x509.Certificate // of cert, itself first; empty without one
	ca    *x509.CertPool      // nil without one
}

// fileStates are the states of the files of tlsFlags, nil for one that is not there.
type fileStates []os.FileInfo

// certificates is the TLS of a control plane. Its files may be replaced while it runs: each
// handshake looks whether they were. Open connections go on.
type certificates struct {
	flags tlsFlags
	log   *slog.Logger

	mu     sync.Mutex // guards the fields below
	files  tlsFiles
	config *tls.Config
	read   fileStates // of the files as config has them
	failed fileStates // of those that were found wrong and reported
	stage  int        // of expiryStage that was told
	expiry string     // when the certificate expires, or expired, in words; "" where that is far

	expiryChanged chan struct{} // holds one when expiry is another
}

// componentAccess is how the components of a run reach the control plane.
type componentAccess struct {
	endpoint string       // of components without "tls": true
	listener net.Listener // at endpoint; nil where that is the control plane's own
	tlsEnv   []string     // the variables of components with "tls": true; nil without TLS
}

// openCertificates reads the files for the first time. It returns nil without TLS.
func openCertificates(flags tlsFlags, log *slog.Logger) (*certificates, error) {
	if flags.cert == "" {
		return nil, nil
	}
	c := &certificates{flags: flags, log: log, expiryChanged: make(chan struct{}, 1)}
	if err := c.readLocked(flags.states(), time.Now()); err != nil {
		return nil, err
	}
	c.log.Info("TLS is on", c.attrsLocked()...)
	// The bits of a group mean something else in systemd's folder, where access is by lists.
	if info, err := os.Stat(flags.key); err == nil && info.Mode().Perm()&0o044 != 0 && filepath.Dir(flags.key) != os.Getenv("CREDENTIALS_DIRECTORY") {
		c.log.Warn("others can read the private key", "file", flags.key, "mode", info.Mode().String(), "try", "chmod 600 "+shellWord(flags.key))
	}
	return c, nil
}

// checkComponents fails if components are to speak TLS, withTLS by their ids, and there is
// no certificate.
func (f tlsFlags) checkComponents(withTLS []string) error {
	if len(withTLS) > 0 && f.cert == "" {
		return fmt.Errorf("\"tls\": true of %s needs -tls-cert and -tls-key", enumerate(withTLS))
	}
	return nil
}

// credentials are those of the control plane's gRPC server. c may be nil.
func (c *certificates) credentials() credentials.TransportCredentials {
	if c == nil {
		return insecure.NewCredentials()
	}
	return credentials.NewTLS(&tls.Config{GetConfigForClient: c.current, MinVersion: tls.VersionTLS12})
}

// current returns the configuration for a handshake, by the files as they are now. If they
// are wrong, as while only one of them has been replaced, it returns the former one, and
// tries again at the next handshake.
func (c *certificates) current(*tls.ClientHelloInfo) (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.flags.states()
	if !now.same(c.read) {
		err := c.readLocked(now, time.Now())
		switch {
		case err == nil:
			c.log.Info("TLS files have changed", c.attrsLocked()...)
		case !now.same(c.failed):
			c.failed = now
			c.log.Error("TLS files have changed and are wrong, the former ones go on to serve", "err", err)
		}
	}
	return c.config, nil
}

// openComponentAccess returns how components reach the control plane at endpoint. Where that
// has TLS, it opens a listener on the loopback for components that do not speak TLS. withTLS
// and without are the ids of the components with "tls": true and of the others. c may be nil.
func openComponentAccess(c *certificates, endpoint string, withTLS, without []string, log *slog.Logger) (componentAccess, error) {
	if c == nil {
		return componentAccess{endpoint: endpoint}, nil
	}
	env, err := c.componentEnv(endpoint)
	if err != nil {
		return componentAccess{}, err
	}
	if len(withTLS) > 0 {
		c.warnComponents(withTLS, endpoint)
	}
	if len(without) == 0 {
		return componentAccess{endpoint: endpoint, tlsEnv: env}, nil
	}
	if err := checkPeers(); err != nil {
		return componentAccess{}, fmt.Errorf("no listener without TLS for %s: flowctl could not tell who calls there: %v; give them \"tls\": true", enumerate(without), err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return componentAccess{}, fmt.Errorf("cannot listen for the components: %v", err)
	}
	log.Info("listening for components, without TLS", "endpoint", lis.Addr().String())
	return componentAccess{lis.Addr().String(), lis, env}, nil
}

// componentEnv returns the variables of components with "tls": true.
func (c *certificates) componentEnv(endpoint string) ([]string, error) {
	env := []string{"FLOWCTL_ENDPOINT=" + endpoint}
	ca := cmp.Or(c.flags.ca, c.flags.cert) // its own CA where it is self-signed
	for _, v := range [][2]string{{"FLOWCTL_TLS_CA", ca}, {"FLOWCTL_TLS_CERT", c.flags.cert}, {"FLOWCTL_TLS_KEY", c.flags.key}} {
		file, err := filepath.Abs(v[1])
		if err != nil {
			return nil, fmt.Errorf("cannot find the folder of %s: %v", v[1], err)
		}
		env = append(env, v[0]+"="+file)
	}
	return env, nil
}

// warnComponents warns of what components with "tls": true will fail by and could hardly
// explain: the certificate is not for their endpoint, or the control plane does not take it
// from a client, although they show it as their own.
func (c *certificates) warnComponents(ids []string, endpoint string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	host, _, _ := net.SplitHostPort(endpoint)
	roots := c.files.ca
	if roots == nil {
		roots = x509.NewCertPool()
		roots.AddCert(c.files.chain[0])
	}
	if err := verifyChain(c.files.chain, host, roots, x509.ExtKeyUsageServerAuth); err != nil {
		c.log.Warn("components may refuse the certificate of the control plane", "components", enumerate(ids), "endpoint", endpoint, "cert", c.flags.cert, "err", err)
	}
	if c.files.ca == nil {
		return
	}
	if err := verifyChain(c.files.chain, "", roots, x509.ExtKeyUsageClientAuth); err != nil {
		c.log.Warn("components cannot use the certificate of the control plane as their own", "components", enumerate(ids), "cert", c.flags.cert, "ca", c.flags.ca, "err", err)
	}
}

// clientCredentials are those of a client of a control plane.
func (f tlsFlags) clientCredentials() (credentials.TransportCredentials, error) {
	if f == (tlsFlags{}) {
		return insecure.NewCredentials(), nil
	}
	files, err := f.load(time.Now())
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: files.ca, ServerName: f.serverName}
	if f.cert != "" {
		config.Certificates = []tls.Certificate{files.cert}
	}
	return credentials.NewTLS(config), nil
}

// hint is a line about the flags that may help where endpoint could not be dialled, "" for
// none: it speaks TLS and the flags are not given, or the reverse, or it wants a client
// certificate, or another one. The certificate of -tls-cert is shown only to an endpoint that
// has proven to be endpoint.
func (f tlsFlags) hint(endpoint string) string {
	raw, err := net.DialTimeout("tcp", endpoint, hintTime)
	if err != nil {
		return ""
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(hintTime)) // works on an open connection
	files, _ := f.load(time.Now())                // what is wrong with them was said before
	host, _, _ := net.SplitHostPort(endpoint)
	host = cmp.Or(f.serverName, host)
	proven, wanted, shown, misnamed := false, false, false, false
	conn := tls.Client(raw, &tls.Config{
		InsecureSkipVerify: true, // the handshake is to go on and tell more; VerifyConnection verifies
		ServerName:         host,
		NextProtos:         []string{"h2"},
		VerifyConnection: func(state tls.ConnectionState) error {
			proven = verifyChain(state.PeerCertificates, host, files.ca, x509.ExtKeyUsageServerAuth) == nil
			misnamed = !proven && verifyChain(state.PeerCertificates, "", files.ca, x509.ExtKeyUsageServerAuth) == nil
			return nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			wanted, shown = true, proven && f.cert != ""
			if !shown {
				return new(tls.Certificate), nil // none
			}
			return &files.cert, nil
		},
	})
	if err = conn.Handshake(); err == nil && shown {
		_, err = conn.Read(make([]byte, 1)) // since TLS 1.3 the certificate is judged after the handshake
	}
	plain, dialled, refused := tls.RecordHeaderError{}, f != (tlsFlags{}), new(net.OpError)
	switch {
	case shown && errors.As(err, &refused) && refused.Op == "remote error": // an alert of TLS
		return fmt.Sprintf("\nhint: it does not take the certificate of -tls-cert: %v", refused.Err)
	case errors.As(err, &plain) && dialled:
		return "\nhint: it speaks no TLS: leave out the -tls flags"
	case err != nil && !wanted: // before TLS 1.3 the handshake fails without what is wanted
	case !dialled && wanted:
		return "\nhint: it speaks TLS: name the CA of its certificate by -tls-ca-cert, and a certificate of yours by -tls-cert and -tls-key"
	case !dialled:
		return "\nhint: it speaks TLS: name the CA of its certificate by -tls-ca-cert"
	case misnamed:
		return "\nhint: name one that its certificate has by -tls-server-name"
	case wanted && f.cert == "":
		return "\nhint: it wants a certificate of yours: name it by -tls-cert and -tls-key"
	}
	return ""
}

// readLocked reads the files, whose states before that were before. c.mu is held.
func (c *certificates) readLocked(before fileStates, now time.Time) error {
	files, err := c.flags.load(now)
	if err != nil {
		return err
	}
	c.files, c.read, c.failed, c.stage = files, before, nil, 0
	c.config = &tls.Config{
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2"},
		Certificates: []tls.Certificate{files.cert},
		// A ticket would outlive the CA that let its client in.
		SessionTicketsDisabled: true,
	}
	if files.ca != nil {
		c.config.ClientAuth, c.config.ClientCAs = tls.RequireAndVerifyClientCert, files.ca
	}
	return nil
}

// watchExpiry tells of the end of the control plane's certificate before it comes, until ctx ends. It
// looks at least once in interval. c may be nil.
func (c *certificates) watchExpiry(ctx context.Context, interval time.Duration) {
	for c != nil {
		next := c.checkExpiry(time.Now())
		select {
		case <-time.After(min(interval, next)):
		case <-ctx.Done():
			return
		}
	}
}

// checkExpiry tells of a stage of expiry that was not told, and returns when the next one begins, from now.
func (c *certificates) checkExpiry(now time.Time) time.Duration {
	_, _ = c.current(nil) // the files may be new; what is wrong with them is logged
	c.mu.Lock()
	defer c.mu.Unlock()
	cert := c.files.chain[0]
	stage, next := expiryStage(cert, now)
	before, end := c.expiry, cert.NotAfter.Format(time.RFC3339)
	switch {
	case stage == 0:
		c.expiry = ""
	case stage < expired:
		c.expiry = "expires at " + end
	default:
		c.expiry = "expired at " + end
	}
	if c.expiry != before {
		select {
		case c.expiryChanged <- struct{}{}:
		default:
		}
	}
	switch {
	case stage <= c.stage:
	case stage < expired:
		c.log.Warn("the certificate of the control plane expires soon", "cert", c.flags.cert, "expires", end)
	default:
		c.log.Error("the certificate of the control plane has expired: clients refuse it", "cert", c.flags.cert, "expired", end)
	}
	c.stage = stage
	return next
}

// expired is the last stage of a certificate.
const expired = 4

// expiryStage returns 0 for a certificate that is good for long, 1 to 3 for one that has 30 days, 7 days
// and 1 day left, or, where that is shorter, a quarter and a tenth of its life, and expired. next is how
// long it stays so.
func expiryStage(c *x509.Certificate, now time.Time) (stage int, next time.Duration) {
	const day = 24 * time.Hour
	left, life := c.NotAfter.Sub(now), c.NotAfter.Sub(c.NotBefore)
	for _, margin := range []time.Duration{min(30*day, life/4), min(7*day, life/10), min(day, life/10)} {
		if left > margin {
			return stage, left - margin
		}
		stage++
	}
	if left >= 0 {
		return stage, left + time.Nanosecond // checkValid takes it at its last moment
	}
	return expired, time.Duration(math.MaxInt64)
}

// expiryText says when the certificate expires, or expired, "" where that is far. c may be nil.
func (c *certificates) expiryText() string {
	if c == nil {
		return ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.expiry
}

// expiryTold is ready to be received from when expiryText is another. c may be nil.
func (c *certificates) expiryTold() <-chan struct{} {
	if c == nil {
		return nil
	}
	return c.expiryChanged
}

// attrsLocked describes the certificates for a line of the log. c.mu is held.
func (c *certificates) attrsLocked() []any {
	return []any{"cert", c.flags.cert, "expires", c.files.chain[0].NotAfter.Format(time.RFC3339), "client_certificates", c.files.ca != nil}
}

// states returns the states of the files now.
func (f tlsFlags) states() fileStates {
	states := make(fileStates, 3)
	for i, file := range []string{f.cert, f.key, f.ca} {
		if info, err := os.Stat(file); err == nil {
			states[i] = info
		}
	}
	return states
}

// same tells whether no file has changed from one state to the other.
func (s fileStates) same(other fileStates) bool {
	return slices.EqualFunc(s, other, func(a, b os.FileInfo) bool {
		if a == nil || b == nil {
			return a == b
		}
		return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
	})
}

// load reads the files and checks that they can be used at the time now. Its error names
// the flag, the file and the reason.
func (f tlsFlags) load(now time.Time) (files tlsFiles, err error) {
	fail := func(name, file string, err error) (tlsFiles, error) {
		return tlsFiles{}, fmt.Errorf("%s %q: %w", name, file, cause(err))
	}
	if f.cert != "" {
		var cert, key []byte
		if cert, files.chain, err = readCertificates(f.cert); err == nil {
			err = checkValid(files.chain[0], now) // the rest of a chain may be there for old clients
		}
		if err != nil {
			return fail("-tls-cert", f.cert, err)
		}
		if key, err = readKey(f.key); err != nil {
			return fail("-tls-key", f.key, err)
		}
		if files.cert, err = tls.X509KeyPair(cert, key); err != nil {
			return fail("-tls-key", f.key, fmt.Errorf("it cannot be used for -tls-cert %q: %v", f.cert, err))
		}
	}
	if f.ca != "" {
		_, list, err := readCertificates(f.ca)
		if err == nil && !slices.ContainsFunc(list, func(c *x509.Certificate) bool { return checkValid(c, now) == nil }) {
			err = checkValid(list[0], now)
		}
		if err != nil {
			return fail("-tls-ca-cert", f.ca, err)
		}
		files.ca = x509.NewCertPool()
		for _, c := range list {
			files.ca.AddCert(c)
		}
	}
	return files, nil
}

// readCertificates returns the content of a file and the certificates in it, at least one.
// A damaged part is an error: the file may be half written.
func readCertificates(file string) (data []byte, list []*x509.Certificate, err error) {
	if data, err = readPEM(file); err != nil {
		return nil, nil, err
	}
	blocks, other := 0, ""
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		blocks++
		if block.Type != "CERTIFICATE" {
			other = block.Type
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %d in it is damaged: %v", len(list)+1, err)
		}
		list = append(list, c)
	}
	switch {
	case blocks < bytes.Count(data, []byte("-----BEGIN ")):
		return nil, nil, errors.New("it is damaged or not complete: not all of it is PEM")
	case len(list) == 0 && other != "":
		return nil, nil, fmt.Errorf("it must hold a certificate, not a %s", other)
	case len(list) == 0:
		return nil, nil, errors.New("it must hold a certificate in PEM")
	}
	return data, list, nil
}

// readKey returns the content of a file with a private key. An encrypted key is an error.
func readKey(file string) ([]byte, error) {
	data, err := readPEM(file)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" {
			return nil, fmt.Errorf("it is encrypted, and nobody is there to enter a passphrase; this takes it off: openssl pkey -in %s -out NEW", file)
		}
	}
	return data, nil
}

// readPEM returns the content of a plain file. Any other kind is an error: it might not end,
// or could not be read again when it changes.
func readPEM(file string) ([]byte, error) {
	info, err := os.Stat(file)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it must be a plain file")
	case info.Size() > maxPEMFile:
		return nil, fmt.Errorf("it must have %d bytes at most, not %d", maxPEMFile, info.Size())
	}
	return os.ReadFile(file)
}

// checkValid fails if a certificate is not valid at the time now.
func checkValid(c *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(c.NotBefore):
		return fmt.Errorf("it is not valid before %s", c.NotBefore.Format(time.RFC3339))
	case now.After(c.NotAfter):
		return fmt.Errorf("it expired at %s", c.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// verifyChain fails unless the first certificate of chain is good for usage and for host, ""
// for any, by roots, nil for the CAs of the system.
func verifyChain(chain []*x509.Certificate, host string, roots *x509.CertPool, usage x509.ExtKeyUsage) error {
	options := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), DNSName: host, KeyUsages: []x509.ExtKeyUsage{usage}}
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(options)
	return err
}
