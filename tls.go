package main

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// maxPEMFile is far more than all the CAs of a system take.
const maxPEMFile = 4 << 20

// tlsFlags name the files of TLS, PEM each. Without any there is no TLS.
type tlsFlags struct{ cert, key, ca string }

// checkComponents fails where components, withTLS by their ids, are to speak TLS and there
// is none.
func (f tlsFlags) checkComponents(withTLS []string) error {
	if len(withTLS) > 0 && f.cert == "" {
		return fmt.Errorf("\"tls\": true of %s needs -tls-cert and -tls-key", enumerate(withTLS))
	}
	return nil
}

// tlsFiles is what the files hold.
type tlsFiles struct {
	cert  tls.Certificate
	chain []*x509.Certificate // of cert, itself first; empty without one
	ca    *x509.CertPool      // nil without one
}

// load reads the files and finds out whether they can be used at the time now. Its
// error names the flag, the file and the reason.
func (f tlsFlags) load(now time.Time) (files tlsFiles, err error) {
	fail := func(name, file string, err error) (tlsFiles, error) {
		return tlsFiles{}, fmt.Errorf("%s %q: %v", name, file, cause(err))
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

func checkValid(c *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(c.NotBefore):
		return fmt.Errorf("it is not valid before %s", c.NotBefore.Format(time.RFC3339))
	case now.After(c.NotAfter):
		return fmt.Errorf("it expired at %s", c.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// readCertificates returns the content of a file and the certificates in it, one at
// least. A part that is damaged is an error: the file may be half written.
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

// readPEM takes nothing but plain files: another kind could not be read again when
// it changes, or would not end.
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

// certificates is the TLS of a control plane, by files that may be replaced while it
// runs: each handshake looks whether they were. Connections that are open go on.
type certificates struct {
	flags tlsFlags
	log   *slog.Logger

	mu     sync.Mutex // guards the fields below
	files  tlsFiles
	config *tls.Config
	read   fileStates // of the files as config has them
	failed fileStates // of those that were found wrong and reported
}

// openCertificates reads the files for the first time, when what is wrong with them
// is an error. It returns nil without TLS.
func openCertificates(flags tlsFlags, log *slog.Logger) (*certificates, error) {
	if flags.cert == "" {
		return nil, nil
	}
	c := &certificates{flags: flags, log: log}
	if err := c.readLocked(flags.states(), time.Now()); err != nil {
		return nil, err
	}
	c.log.Info("TLS is on", c.attrsLocked()...)
	return c, nil
}

// current returns the configuration for a handshake, by the files as they are now.
// Those that are wrong, because only one of them has been replaced yet, are passed
// over in favour of what they were, and read again at the next handshake.
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

// readLocked reads the files, which were in the state of before.
func (c *certificates) readLocked(before fileStates, now time.Time) error {
	files, err := c.flags.load(now)
	if err != nil {
		return err
	}
	c.files, c.read, c.failed = files, before, nil
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

func (c *certificates) attrsLocked() []any {
	return []any{"cert", c.flags.cert, "expires", c.files.chain[0].NotAfter.Format(time.RFC3339), "client_certificates", c.files.ca != nil}
}

// fileStates tells whether the files of TLS are those that they were: nil for one
// that is not there.
type fileStates []os.FileInfo

func (f tlsFlags) states() fileStates {
	states := make(fileStates, 3)
	for i, file := range []string{f.cert, f.key, f.ca} {
		if info, err := os.Stat(file); err == nil {
			states[i] = info
		}
	}
	return states
}

func (s fileStates) same(other fileStates) bool {
	return slices.EqualFunc(s, other, func(a, b os.FileInfo) bool {
		if a == nil || b == nil {
			return a == b
		}
		return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
	})
}

// credentials are those of the plane's gRPC server. There may be no certificates.
func (c *certificates) credentials() credentials.TransportCredentials {
	if c == nil {
		return insecure.NewCredentials()
	}
	return credentials.NewTLS(&tls.Config{GetConfigForClient: c.current, MinVersion: tls.VersionTLS12})
}

// componentAccess is how the components of a run reach the control plane.
type componentAccess struct {
	endpoint string       // of components without "tls": true
	listener net.Listener // at endpoint; nil where that is the control plane's own
	tlsEnv   []string     // the variables of components with "tls": true; nil without TLS
}

// openComponentAccess has the components of a run reach the control plane at endpoint: where
// that has TLS, there is a listener without it for those that do not speak it. withTLS and
// without are the ids of the components with "tls": true and of the others.
func openComponentAccess(c *certificates, endpoint string, withTLS, without []string, log *slog.Logger) (componentAccess, error) {
	if c == nil {
		return componentAccess{endpoint: endpoint}, nil
	}
	env, err := c.componentEnv(endpoint)
	if err != nil {
		return componentAccess{}, err
	}
	if len(withTLS) > 0 {
		c.warn(withTLS, endpoint)
	}
	if len(without) == 0 {
		return componentAccess{endpoint: endpoint, tlsEnv: env}, nil
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

// warn says beforehand what those with "tls": true would fail by and could hardly
// explain: that the certificate is not for the endpoint that they are given, or not
// one that the plane takes from a client, as which they show it.
func (c *certificates) warn(ids []string, endpoint string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	host, _, _ := net.SplitHostPort(endpoint)
	chain := c.files.chain
	options := x509.VerifyOptions{Roots: c.files.ca, Intermediates: x509.NewCertPool(), DNSName: host}
	for _, other := range chain[1:] {
		options.Intermediates.AddCert(other)
	}
	if options.Roots == nil {
		options.Roots = x509.NewCertPool()
		options.Roots.AddCert(chain[0])
	}
	if _, err := chain[0].Verify(options); err != nil {
		c.log.Warn("components may refuse the certificate of the control plane", "components", enumerate(ids), "endpoint", endpoint, "cert", c.flags.cert, "err", err)
	}
	if c.files.ca == nil {
		return
	}
	options.DNSName, options.KeyUsages = "", []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if _, err := chain[0].Verify(options); err != nil {
		c.log.Warn("components cannot use the certificate of the control plane as their own", "components", enumerate(ids), "cert", c.flags.cert, "ca", c.flags.ca, "err", err)
	}
}

// clientCredentials are those by which to dial a control plane.
func (f tlsFlags) clientCredentials() (credentials.TransportCredentials, error) {
	if f == (tlsFlags{}) {
		return insecure.NewCredentials(), nil
	}
	files, err := f.load(time.Now())
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: files.ca}
	if f.cert != "" {
		config.Certificates = []tls.Certificate{files.cert}
	}
	return credentials.NewTLS(config), nil
}

// hint is a line on the flags that may help where endpoint was dialled without
// success: it speaks TLS and was not dialled so, or the reverse, or it wants a client
// certificate, or another one. It is "" where none would.
func (f tlsFlags) hint(endpoint string) string {
	const most = time.Second
	raw, err := net.DialTimeout("tcp", endpoint, most)
	if err != nil {
		return ""
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(most)) // that of a connection that is open works
	wanted := false
	files, _ := f.load(time.Now()) // what is wrong with them has been said before
	conn := tls.Client(raw, &tls.Config{
		InsecureSkipVerify: true, // nothing is sent, and nothing is believed
		NextProtos:         []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			wanted = true
			return &files.cert, nil
		},
	})
	if err = conn.Handshake(); err == nil && wanted && f.cert != "" {
		_, err = conn.Read(make([]byte, 1)) // since TLS 1.3 the certificate is judged after the handshake
	}
	plain, dialled, refused := tls.RecordHeaderError{}, f != (tlsFlags{}), new(net.OpError)
	switch {
	case wanted && f.cert != "" && errors.As(err, &refused) && refused.Op == "remote error": // an alert of TLS
		return fmt.Sprintf("\nhint: it does not take the certificate of -tls-cert: %v", refused.Err)
	case errors.As(err, &plain) && dialled:
		return "\nhint: it speaks no TLS: leave out the -tls flags"
	case err != nil && !wanted: // before TLS 1.3 the handshake fails without what is wanted
	case !dialled && wanted:
		return "\nhint: it speaks TLS: name the CA of its certificate by -tls-ca-cert, and a certificate of yours by -tls-cert and -tls-key"
	case !dialled:
		return "\nhint: it speaks TLS: name the CA of its certificate by -tls-ca-cert"
	case wanted && f.cert == "":
		return "\nhint: it wants a certificate of yours: name it by -tls-cert and -tls-key"
	}
	return ""
}
