//go:build linux

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// testCert is a certificate with its key, as the content of files and for crypto/tls.
type testCert struct {
	cert, key string // PEM
	pair      tls.Certificate
}

var serials atomic.Int64

// issue returns a certificate that parent has signed, with nil the certificate itself. It is for
// a server on the loopback and for a client. change may change that, or be nil.
func issue(tb testing.TB, parent *testCert, change func(*x509.Certificate)) *testCert {
	tb.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serials.Add(1)), Subject: pkix.Name{CommonName: fmt.Sprintf("test %d", serials.Load())},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	key := get(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(tb)
	signer, signed := any(key), template
	if parent != nil {
		signer, signed = parent.pair.PrivateKey, parent.pair.Leaf
	}
	der := get(x509.CreateCertificate(rand.Reader, template, signed, key.Public(), signer))(tb)
	keyDER := get(x509.MarshalPKCS8PrivateKey(key))(tb)
	c := &testCert{
		cert: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		key:  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})),
	}
	c.pair = get(tls.X509KeyPair([]byte(c.cert), []byte(c.key)))(tb)
	return c
}

func newCA(tb testing.TB) *testCert {
	tb.Helper()
	return issue(tb, nil, func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
	})
}

// trust is the configuration of a client that trusts ca and shows the last of certs, if any.
func trust(ca *testCert, certs ...*testCert) *tls.Config {
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	config.RootCAs.AddCert(ca.pair.Leaf)
	for _, c := range certs {
		// A client shows none of Certificates if it knows that the server would refuse it.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c.pair, nil }
	}
	return config
}

// pemFiles is a folder with the files of TLS.
type pemFiles struct {
	tb            testing.TB
	dir           string
	cert, key, ca string // their names
}

func newFiles(tb testing.TB, cert, ca *testCert) pemFiles {
	tb.Helper()
	dir := tb.TempDir()
	f := pemFiles{tb, dir, filepath.Join(dir, "plane.pem"), filepath.Join(dir, "plane.key"), filepath.Join(dir, "ca.pem")}
	f.put(f.cert, cert.cert)
	f.put(f.key, cert.key)
	f.put(f.ca, ca.cert)
	return f
}

// put replaces a file at once, as a careful program does.
func (f pemFiles) put(name, text string) {
	f.tb.Helper()
	must(f.tb, os.Rename(writeFile(f.tb, name+".new", text), name))
}

func (f pemFiles) flags() []string { return []string{"-tls-cert", f.cert, "-tls-key", f.key} }

func (f pemFiles) mutual() []string { return append(f.flags(), "-tls-ca-cert", f.ca) }

// startServer starts a control plane alone on a free port.
func startServer(tb testing.TB, args ...string) *process {
	tb.Helper()
	return start(tb, append([]string{"server", "-control-plane-port", "0", "-log-level", "debug"}, args...))
}

// dialTLS is dialPlane with TLS. dials counts the connections.
func dialTLS(tb testing.TB, endpoint string, config *tls.Config) (client planeClient, dials *atomic.Int64) {
	tb.Helper()
	dials = new(atomic.Int64)
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			dials.Add(1)
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}))
	must(tb, err)
	tb.Cleanup(func() { conn.Close() })
	return planeClient{conn, flowctlpb.NewControlPlaneClient(conn), flowctlv1.NewControlPlaneServiceClient(conn)}, dials
}

// outsiders counts the services that tests have registered, each by another certificate.
var outsiders atomic.Int64

// registers fails unless client can register in both dialects.
func registers(tb testing.TB, client planeClient) error {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, dialect := range dialects {
		if _, err := client.register(ctx, dialect, registration{id: fmt.Sprint("outside-", outsiders.Add(1))}); err != nil {
			return err
		}
	}
	return nil
}

// serves returns what a new connection learns of the control plane.
func serves(tb testing.TB, endpoint string, config *tls.Config) (tls.ConnectionState, error) {
	tb.Helper()
	config = config.Clone()
	config.NextProtos = []string{"h2"}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", endpoint, config)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer conn.Close()
	return conn.ConnectionState(), nil
}

// componentCredentials are those of a component that plays a role.
func componentCredentials() (credentials.TransportCredentials, error) {
	ca := os.Getenv("FLOWCTL_TLS_CA")
	if ca == "" {
		return insecure.NewCredentials(), nil
	}
	roots := x509.NewCertPool()
	if data, err := os.ReadFile(ca); err != nil || !roots.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("FLOWCTL_TLS_CA: no CA in it: %v", err)
	}
	pair, err := tls.LoadX509KeyPair(os.Getenv("FLOWCTL_TLS_CERT"), os.Getenv("FLOWCTL_TLS_KEY"))
	return credentials.NewTLS(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}), err
}

func TestTLS_ServerShowsItsCertificate(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	p := startServer(t, append(files.flags(), "-control-plane-address", "0.0.0.0")...)
	client, _ := dialTLS(t, p.endpoint(), trust(ca))
	if err := registers(t, client); err != nil {
		t.Errorf("a client that knows the CA: %v", err)
	}
	for _, tt := range []struct {
		name   string
		most   uint16
		want   uint16
		refuse string
	}{
		{"the newest", 0, tls.VersionTLS13, ""},
		{"TLS 1.2", tls.VersionTLS12, tls.VersionTLS12, ""},
		{"TLS 1.1", tls.VersionTLS11, 0, "remote error: tls: protocol version not supported"},
	} {
		config := trust(ca)
		config.MinVersion, config.MaxVersion = tls.VersionTLS10, tt.most
		state, err := serves(t, p.endpoint(), config)
		if got := fmt.Sprint(err); state.Version != tt.want || (tt.refuse != "" && got != tt.refuse) {
			t.Errorf("%s: version %x, %v, want %x", tt.name, state.Version, err, tt.want)
		}
	}
	stranger, _ := dialTLS(t, p.endpoint(), trust(newCA(t)))
	if err := registers(t, stranger); err == nil || !strings.Contains(err.Error(), "certificate signed by unknown authority") {
		t.Errorf("a client that does not know the CA: %v", err)
	}
	if err := registers(t, dialPlane(t, p.endpoint())); err == nil {
		t.Error("a client without TLS can register")
	}
	p.stop()
	p.has(p.stderr, `msg="TLS is on" cert=`+files.cert+" expires=20", "client_certificates=false")
	p.has(p.stderr, `level=DEBUG msg="TLS handshake failed" addr=127.0.0.1:`, `err="tls: first record does not look like a TLS handshake"`)
	p.hasNot(p.stderr, "without TLS", "level=WARN")
}

func TestTLS_ClientsNeedACertificateOfTheCA(t *testing.T) {
	t.Parallel()
	ca, foreign := newCA(t), newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	expired := issue(t, nil, func(c *x509.Certificate) { c.IsCA, c.NotAfter = true, time.Now().Add(-time.Hour) })
	files.put(files.ca, "the former one, which is no error beside a good one:\n"+expired.cert+"\n"+ca.cert)
	p := startServer(t, files.mutual()...)
	for _, tt := range []struct {
		name  string
		certs []*testCert
		why   string // in the log, when it is refused
	}{
		{"of the CA", []*testCert{issue(t, ca, nil)}, ""},
		{"of the CA, for clients alone", []*testCert{issue(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })}, ""},
		{"none", nil, "client didn't provide a certificate"},
		{"of a foreign CA", []*testCert{issue(t, foreign, nil)}, "certificate signed by unknown authority"},
		{"self-signed", []*testCert{issue(t, nil, nil)}, "certificate signed by unknown authority"},
		{"expired", []*testCert{issue(t, ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })}, "certificate has expired or is not yet valid"},
		{"for servers alone", []*testCert{issue(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] })}, "certificate specifies an incompatible key usage"},
	} {
		for _, most := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			config := trust(ca, tt.certs...)
			config.MaxVersion = most
			client, _ := dialTLS(t, p.endpoint(), config)
			if err := registers(t, client); (err == nil) != (tt.why == "") {
				t.Errorf("%s, %s: %v", tt.name, tls.VersionName(most), err)
			}
		}
		if tt.why != "" {
			p.waitErr(tt.why)
		}
	}
	p.stop()
	p.has(p.stderr, "client_certificates=true")
}

func TestTLS_FilesAreReadAgainWhileItServes(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	former, next := issue(t, ca, nil), issue(t, ca, nil)
	files := newFiles(t, former, ca)
	p := startServer(t, files.mutual()...)
	own := issue(t, ca, nil)
	client, dials := dialTLS(t, p.endpoint(), trust(ca, own))
	want := func(when string, c *testCert) {
		t.Helper()
		for range 3 {
			state, err := serves(t, p.endpoint(), trust(ca, own))
			if err != nil || !state.PeerCertificates[0].Equal(c.pair.Leaf) {
				t.Errorf("%s: got %v, want another certificate", when, err)
			}
		}
		if err := registers(t, client); err != nil {
			t.Errorf("%s: the open connection: %v", when, err)
		}
	}
	want("at first", former)
	const wrong = `level=ERROR msg="TLS files have changed and are wrong, the former ones go on to serve"`
	failures := 0
	for _, tt := range []struct {
		name   string
		change func()
		why    string
	}{
		{"a certificate without its key", func() { files.put(files.cert, next.cert) }, "private key does not match public key"},
		{"half a certificate", func() { files.put(files.cert, next.cert[:len(next.cert)/2]) }, "it is damaged or not complete: not all of it is PEM"},
		{"an empty certificate", func() { files.put(files.cert, "") }, "it must hold a certificate in PEM"},
		{"no certificate", func() { os.Remove(files.cert) }, "no such file or directory"},
		{"no key", func() { files.put(files.cert, next.cert); os.Remove(files.key) }, "no such file or directory"},
		{"half a CA", func() { files.put(files.key, next.key); files.put(files.ca, ca.cert+ca.cert[:100]) }, "it is damaged or not complete"},
	} {
		tt.change()
		want(tt.name, former)
		failures++
		p.wait(p.stderr, wrong, failures)
		p.waitErr(tt.why)
	}
	files.put(files.ca, ca.cert)
	want("replaced", next)
	p.waitErr(`level=INFO msg="TLS files have changed" cert=` + files.cert)

	// The CA: who was let in by the former one stays and does not come again.
	ca2 := newCA(t)
	files.put(files.ca, ca2.cert)
	friend, _ := dialTLS(t, p.endpoint(), trust(ca, issue(t, ca2, nil)))
	if err := registers(t, friend); err != nil {
		t.Errorf("a client of the new CA: %v", err)
	}
	late, _ := dialTLS(t, p.endpoint(), trust(ca, own))
	if err := registers(t, late); err == nil {
		t.Error("a client of the former CA can register")
	}
	if err := registers(t, client); err != nil {
		t.Errorf("the open connection: %v", err)
	}
	wantEqual(t, "dials of the open connection", dials.Load(), 1)
	p.stop()
	if n := strings.Count(p.stderr.String(), wrong); n != failures {
		t.Errorf("%d errors, want one for each of %d changes\n%s", n, failures, p)
	}
}

// A certificate and its key serve once both have been replaced, also in place by others of the
// same size, or of the same time. Until then the former ones do, and each change is reported once.
func TestTLS_ReplacedFilesServe(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	former := issue(t, ca, nil)
	files := newFiles(t, former, ca)
	log := newTranscript()
	c := get(openCertificates(tlsFlags{cert: files.cert, key: files.key, ca: files.ca}, slog.New(slog.NewTextHandler(log, nil))))(t)
	serves := func(when string, want *testCert) {
		t.Helper()
		for range 3 {
			if got, err := c.current(nil); err != nil || !got.Certificates[0].Leaf.Equal(want.pair.Leaf) {
				t.Errorf("%s: another certificate serves: %v", when, err)
			}
		}
	}
	inPlace := func(name, text string, at time.Time) {
		t.Helper()
		must(t, os.WriteFile(name, []byte(text), 0o600))
		must(t, os.Chtimes(name, at, at))
	}
	at := time.Now().Add(-time.Minute)
	inPlace(files.cert, former.cert, at)
	inPlace(files.key, former.key, at)
	serves("the same content at another time", former)
	next := issue(t, ca, nil)
	for len(next.cert) != len(former.cert) { // the length of a signature varies
		next = issue(t, ca, nil)
	}
	inPlace(files.cert, next.cert, at.Add(time.Second))
	serves("one of two files", former)
	inPlace(files.key, next.key, at) // it is read again because it was wrong, whatever its state
	serves("both, of the same size", next)
	last := issue(t, ca, nil)
	files.put(files.key, last.key)
	must(t, os.Chtimes(files.key, at, at))
	serves("another key of the same time", next)
	files.put(files.cert, last.cert)
	serves("the last", last)
	wantEqual(t, "errors, one for each change to what is wrong,", strings.Count(log.String(), "level=ERROR"), 2)
}

func TestTLS_WrongFilesAreErrorsAtTheStart(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	good := issue(t, ca, nil)
	hour := time.Hour
	expired := issue(t, ca, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(-2*hour), time.Now().Add(-hour) })
	early := issue(t, ca, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(hour), time.Now().Add(2*hour) })
	expiredCA := issue(t, nil, func(c *x509.Certificate) { c.IsCA, c.NotAfter = true, time.Now().Add(-hour) })
	stamp := func(at time.Time) string { return at.UTC().Format(time.RFC3339) }
	encrypted := string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("secret")}))
	damaged := strings.Replace(good.cert, "\nMII", "\n?II", 1)
	for _, tt := range []struct {
		name          string
		cert, key, ca string // the content, "" for no file, "/" for a folder
		want          string // <cert>, <key> and <ca> are the files
	}{
		{"no certificate", "", good.key, ca.cert, `-tls-cert "<cert>": no such file or directory`},
		{"no key", good.cert, "", ca.cert, `-tls-key "<key>": no such file or directory`},
		{"no CA", good.cert, good.key, "", `-tls-ca-cert "<ca>": no such file or directory`},
		{"a folder for a certificate", "/", good.key, ca.cert, `-tls-cert "<cert>": it must be a plain file`},
		{"a folder for a key", good.cert, "/", ca.cert, `-tls-key "<key>": it must be a plain file`},
		{"a folder for a CA", good.cert, good.key, "/", `-tls-ca-cert "<ca>": it must be a plain file`},
		{"text for a certificate", "hello\n", good.key, ca.cert, `-tls-cert "<cert>": it must hold a certificate in PEM`},
		{"text for a key", good.cert, "hello\n", ca.cert, `-tls-key "<key>": it cannot be used for -tls-cert "<cert>": tls: failed to find any PEM data in key input`},
		{"text for a CA", good.cert, good.key, "hello\n", `-tls-ca-cert "<ca>": it must hold a certificate in PEM`},
		{"a key for a certificate", good.key, good.key, ca.cert, `-tls-cert "<cert>": it must hold a certificate, not a PRIVATE KEY`},
		{"a key for a CA", good.cert, good.key, good.key, `-tls-ca-cert "<ca>": it must hold a certificate, not a PRIVATE KEY`},
		{"a damaged certificate", damaged, good.key, ca.cert, `-tls-cert "<cert>": it is damaged or not complete: not all of it is PEM`},
		{"a damaged CA among others", good.cert, good.key, ca.cert + damaged + ca.cert, `-tls-ca-cert "<ca>": it is damaged or not complete: not all of it is PEM`},
		{"PEM of something else", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1, 2}})), good.key, ca.cert,
			`-tls-cert "<cert>": certificate 1 in it is damaged: x509: malformed certificate`},
		{"large", strings.Repeat("x", maxPEMFile+1), good.key, ca.cert, `-tls-cert "<cert>": it must have 4194304 bytes at most, not 4194305`},
		{"an encrypted key", good.cert, encrypted, ca.cert,
			`-tls-key "<key>": it is encrypted, and nobody is there to enter a passphrase; this takes it off: openssl pkey -in <key> -out NEW`},
		{"another's key", good.cert, expired.key, ca.cert, `-tls-key "<key>": it cannot be used for -tls-cert "<cert>": tls: private key does not match public key`},
		{"expired", expired.cert, expired.key, ca.cert, `-tls-cert "<cert>": it expired at ` + stamp(expired.pair.Leaf.NotAfter)},
		{"not yet valid", early.cert, early.key, ca.cert, `-tls-cert "<cert>": it is not valid before ` + stamp(early.pair.Leaf.NotBefore)},
		{"an expired CA", good.cert, good.key, expiredCA.cert, `-tls-ca-cert "<ca>": it expired at ` + stamp(expiredCA.pair.Leaf.NotAfter)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			files := newFiles(t, good, ca)
			for file, text := range map[string]string{files.cert: tt.cert, files.key: tt.key, files.ca: tt.ca} {
				files.put(file, text)
				if text == "" || text == "/" {
					os.Remove(file)
				}
				if text == "/" {
					must(t, os.Mkdir(file, 0o700))
				}
			}
			want := "flowctl: " + strings.NewReplacer("<cert>", files.cert, "<key>", files.key, "<ca>", files.ca).Replace(tt.want) + "\n"
			pipeline := writePipeline(t, shell("a", "echo started"))
			for _, command := range [][]string{{"server"}, {"run", pipeline}} {
				p := start(t, append(append(command, "-control-plane-port", "0"), files.mutual()...))
				p.exit(exitPlane)
				wantEqual(t, command[0], p.stderr.String()+p.stdout.String(), want)
			}
		})
	}
}

func TestTLS_ComponentsWithAndWithout(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	for _, tt := range []struct {
		name string
		cert *testCert
		ca   bool
	}{
		{"mutual", issue(t, ca, nil), true},
		{"self-signed", issue(t, nil, nil), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			files := newFiles(t, tt.cert, ca)
			secure, plain := actor("secure", role{Dialect: "v1", Environ: true}), actor("plain", role{Dialect: "legacy", Environ: true})
			secure.TLS = true
			args := []string{"run", writePipeline(t, secure, plain), "-control-plane-port", "0", "-tls-cert", "plane.pem", "-tls-key", "./plane.key"}
			trusted := files.cert
			config := trust(tt.cert)
			if tt.ca {
				args = append(args, "-tls-ca-cert", "../"+filepath.Base(files.dir)+"/ca.pem")
				trusted, config = files.ca, trust(ca, tt.cert)
			}
			p := start(t, args, inFolder(files.dir), withEnv("FLOWCTL_TLS_CA=/outer/ca", "FLOWCTL_TLS_CERT=/outer/cert", "FLOWCTL_TLS_KEY=/outer/key"))
			p.waitReady()
			p.wait(p.stdout, "| registered\n", 2)
			private := regexp.MustCompile(`msg="listening for components, without TLS" endpoint=(127\.0\.0\.1:\d+)\n`).FindStringSubmatch(p.stderr.String())
			if private == nil {
				t.Fatal(p)
			}
			for id, want := range map[string]map[string]string{
				"secure": {"FLOWCTL_ENDPOINT": p.endpoint(), "FLOWCTL_TLS_CA": trusted, "FLOWCTL_TLS_CERT": files.cert, "FLOWCTL_TLS_KEY": files.key, "connection_info": p.endpoint()},
				"plain":  {"FLOWCTL_ENDPOINT": private[1], "FLOWCTL_TLS_CA": "", "FLOWCTL_TLS_CERT": "", "FLOWCTL_TLS_KEY": "", "connection_info": private[1]},
			} {
				told := p.told(id)
				for name, value := range want {
					if got, set := told[name]; got != value || set != (value != "") {
						t.Errorf("%s: %s is %q, want %q", id, name, got, value)
					}
				}
			}
			if err := registers(t, dialPlane(t, p.endpoint())); err == nil {
				t.Error("a client without TLS can register where the control plane has TLS")
			}
			client, _ := dialTLS(t, p.endpoint(), config)
			ack, err := client.register(t.Context(), "v1", registration{id: fmt.Sprint("outside-", outsiders.Add(1))})
			if err != nil || ack.info["control_plane_endpoint"] != p.endpoint() {
				t.Errorf("a client from elsewhere: %v, %v", ack, err)
			}
			if _, err := serves(t, private[1], config); err == nil {
				t.Error("the private listener speaks TLS")
			}
			p.stop()
			p.hasNot(p.stderr, "level=WARN", "level=ERROR")
		})
	}
}

// Where all components speak TLS nothing is served without it. A warning comes before an error
// that they could hardly explain.
func TestTLS_AllComponentsWith(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	for _, tt := range []struct {
		name   string
		change func(*x509.Certificate)
		ready  bool
		want   string
	}{
		{"good", nil, true, ""},
		{"another host", func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = []string{"plane.example"}, nil }, false,
			`msg="components may refuse the certificate of the control plane" components="a, b" endpoint=127.0.0.1:`},
		{"for servers alone", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, false,
			`msg="components cannot use the certificate of the control plane as their own" components="a, b" cert=`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			files := newFiles(t, issue(t, ca, tt.change), ca)
			a, b := actor("a", role{Dialect: "v1"}), actor("b", role{Dialect: "legacy"})
			a.TLS, b.TLS = true, true
			p := launch(t, writePipeline(t, a, b), append(files.mutual(), "-until", "ready")...)
			if tt.ready {
				p.exit(exitOK)
				p.hasNot(p.stderr, "level=WARN")
			} else {
				p.exit(exitFailed)
				p.has(p.stderr, tt.want)
			}
			p.hasNot(p.stderr, "without TLS")
		})
	}
}

func TestList_DialsByTLSOrHintsAtFlags(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	files, own := newFiles(t, issue(t, ca, nil), ca), newFiles(t, issue(t, ca, nil), newCA(t))
	foreign := newFiles(t, issue(t, newCA(t), nil), ca)
	secure := launch(t, writePipeline(t, actor("a", role{Dialect: "v1"})), append(files.flags(), "-control-plane-address", "0.0.0.0")...)
	mutual := launch(t, writePipeline(t, actor("a", role{Dialect: "v1"})), files.mutual()...)
	plain := launch(t, writePipeline(t, actor("a", role{Dialect: "v1"})))
	for _, p := range []*process{secure, mutual, plain} {
		p.waitReady()
	}
	silent := get(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer silent.Close()
	go func() {
		for conn, err := silent.Accept(); err == nil; conn, err = silent.Accept() {
			go func() {
				_, _ = io.Copy(io.Discard, conn)
				conn.Close()
			}()
		}
	}()
	const (
		needsCA     = "\nflowctl: hint: it speaks TLS: name the CA of its certificate by -tls-ca-cert\n"
		needsName   = "\nflowctl: hint: name one that its certificate has by -tls-server-name\n"
		needsBoth   = "\nflowctl: hint: it speaks TLS: name the CA of its certificate by -tls-ca-cert, and a certificate of yours by -tls-cert and -tls-key\n"
		needsCert   = "\nflowctl: hint: it wants a certificate of yours: name it by -tls-cert and -tls-key\n"
		needsNone   = "\nflowctl: hint: it speaks no TLS: leave out the -tls flags\n"
		refusesCert = "\nflowctl: hint: it does not take the certificate of -tls-cert: tls: "
	)
	for _, tt := range []struct {
		name     string
		endpoint string
		flags    []string
		code     int
		want     string // in standard error, which else has no hint
	}{
		{"TLS", secure.endpoint(), []string{"-tls-ca-cert", files.ca}, exitOK, ""},
		{"TLS and a certificate nobody wants", secure.endpoint(), append(own.flags(), "-tls-ca-cert", files.ca), exitOK, ""},
		{"mutual TLS", mutual.endpoint(), append(own.flags(), "-tls-ca-cert", files.ca), exitOK, ""},
		{"another name", strings.Replace(secure.endpoint(), "127.0.0.1", "127.0.0.2", 1), []string{"-tls-ca-cert", files.ca}, exitPlane, needsName},
		{"the name that it has", strings.Replace(secure.endpoint(), "127.0.0.1", "127.0.0.2", 1), []string{"-tls-ca-cert", files.ca, "-tls-server-name", "localhost"}, exitOK, ""},
		{"a name that it has not", secure.endpoint(), []string{"-tls-ca-cert", files.ca, "-tls-server-name", "example.org"}, exitPlane, needsName},
		{"without flags", secure.endpoint(), nil, exitPlane, needsCA},
		{"mutual, without flags", mutual.endpoint(), nil, exitPlane, needsBoth},
		{"mutual, without a certificate", mutual.endpoint(), []string{"-tls-ca-cert", files.ca}, exitPlane, needsCert},
		{"mutual, a certificate of another CA", mutual.endpoint(), append(foreign.flags(), "-tls-ca-cert", files.ca), exitPlane, refusesCert},
		{"another CA", secure.endpoint(), []string{"-tls-ca-cert", own.ca}, exitPlane, "certificate signed by unknown authority"},
		{"the system's CAs", secure.endpoint(), own.flags(), exitPlane, "certificate signed by unknown authority"},
		{"TLS where there is none", plain.endpoint(), []string{"-tls-ca-cert", files.ca}, exitPlane, needsNone},
		{"nobody listens", "127.0.0.1:1", nil, exitPlane, "connection refused"},
		{"nobody answers", silent.Addr().String(), nil, exitPlane, "no control plane answers at " + silent.Addr().String()},
		{"no such file", secure.endpoint(), []string{"-tls-ca-cert", "/no/such"}, exitPlane, "flowctl: -tls-ca-cert \"/no/such\": no such file or directory\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			list := append([]string{"list", "-e", tt.endpoint, "-wait=false"}, tt.flags...)
			code, stdout, stderr := start(t, list, withBinary(plainFlowctl())).finish() // to read the system's CAs takes seconds with the race detector
			listed := regexp.MustCompile(`\na +source +ready .* healthy `).MatchString(stdout)
			if code != tt.code || listed != (code == exitOK) || !strings.Contains(stderr, tt.want) || strings.Contains(stderr, "hint") != strings.Contains(tt.want, "hint") {
				t.Errorf("exit %d\n%s%s", code, stdout, stderr)
			}
		})
	}
	for _, p := range []*process{secure, mutual, plain} {
		p.stop()
	}
}

// list shows its certificate to no server that has not proven to be the one that it dialled.
func TestList_KeepsItsCertificateFromAnImpostor(t *testing.T) {
	t.Parallel()
	impostor, ca := issue(t, newCA(t), nil), newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		var handshakes, shown atomic.Int64
		lis := listen(t, "127.0.0.1:0")
		go func() {
			for conn, err := lis.Accept(); err == nil; conn, err = lis.Accept() {
				go func() {
					defer conn.Close()
					server := tls.Server(conn, &tls.Config{
						Certificates: []tls.Certificate{impostor.pair}, NextProtos: []string{"h2"},
						MaxVersion: version, ClientAuth: tls.RequestClientCert,
					})
					_ = server.Handshake()
					shown.Add(int64(len(server.ConnectionState().PeerCertificates)))
					handshakes.Add(1)
				}()
			}
		}()
		code, stdout, stderr := call(t, append([]string{"list", "-e", lis.Addr().String(), "-wait=false"}, files.mutual()...)...)
		if code != exitPlane || !strings.Contains(stderr, "certificate signed by unknown authority") {
			t.Errorf("exit %d\n%s%s", code, stdout, stderr)
		}
		eventually(t, "two handshakes, one of them for a hint", func() bool { return handshakes.Load() >= 2 })
		if n := shown.Load(); n > 0 {
			t.Errorf("%s: %d certificates were shown", tls.VersionName(version), n)
		}
	}
}

// A private key that others can read is told at the start; that of a unit is read by a list that its mode does not show.
func TestTLS_ExpiryIsToldBeforeItComes(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	now := time.Now()
	for _, tt := range []struct {
		life, left time.Duration
		stage      int
		next       time.Duration // at most
	}{
		{365 * day, 31 * day, 0, day}, {365 * day, 30 * day, 1, 23 * day}, {365 * day, 7 * day, 2, 6 * day}, {365 * day, day, 3, day + 1},
		{90 * day, 23 * day, 0, day}, {90 * day, 22 * day, 1, 15 * day}, {day, 5 * time.Hour, 1, 3 * time.Hour}, {day, 2 * time.Hour, 3, 2*time.Hour + 1},
		{day, 0, 3, 1}, {day, -1, expired, 1<<63 - 1},
	} {
		stage, next := expiryStage(&x509.Certificate{NotBefore: now.Add(tt.left - tt.life), NotAfter: now.Add(tt.left)}, now)
		if stage != tt.stage || next > tt.next || next <= 0 {
			t.Errorf("life %s, left %s: stage %d for %s, want %d for at most %s", tt.life, tt.left, stage, next, tt.stage, tt.next)
		}
	}
}

func TestTLS_ExpiredCertificateIsTold(t *testing.T) {
	t.Parallel()
	_ = flowctlProgram() // to build it takes longer than the certificate lasts
	ca := newCA(t)
	short := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(8 * time.Second) } // a busy machine starts flowctl in seconds
	files, ofServer := newFiles(t, issue(t, ca, short), ca), newFiles(t, issue(t, ca, short), ca)
	p := start(t, append([]string{"run", writePipeline(t, actor("a", role{Dialect: "v1"})), "-control-plane-port", "0", "-janitor-interval", "100ms"}, files.flags()...))
	server := startServer(t, append(ofServer.flags(), "-no-persistence", "-janitor-interval", "100ms")...)
	for _, p := range []*process{p, server} {
		p.wait(p.stderr, "level=WARN msg=\"the certificate of the control plane expires soon\"", 1)
		p.wait(p.stderr, "level=ERROR msg=\"the certificate of the control plane has expired: clients refuse it\"", 1)
	}
	p.wait(p.stderr, "msg=status ready=1 total=1 certificate=\"expired at ", 1)
	list := start(t, []string{"list", "-e", p.endpoint(), "-tls-ca-cert", files.ca})
	list.exit(exitPlane)
	list.has(list.stderr, "certificate has expired")
	renewed := issue(t, ca, nil)
	files.put(files.key, renewed.key)
	files.put(files.cert, renewed.cert)
	eventually(t, "the new certificate serves", func() bool { _, err := serves(t, p.endpoint(), trust(ca)); return err == nil })
	eventually(t, "list says no more of the certificate", func() bool {
		list = start(t, []string{"list", "-e", p.endpoint(), "-tls-ca-cert", files.ca})
		list.exit(exitOK)
		return !strings.Contains(list.stdout.String(), "the certificate")
	})
	p.stop()
	if n := strings.Count(p.stderr.String(), "the certificate of the control plane "); n != 2 {
		t.Errorf("it is told %d times\n%s", n, p)
	}
}

func TestTLS_KeyThatOthersCanRead(t *testing.T) {
	t.Parallel()
	cert := issue(t, newCA(t), nil)
	for _, tt := range []struct {
		mode   os.FileMode
		ofUnit bool
		want   bool
	}{{0o600, false, false}, {0o640, false, true}, {0o604, false, true}, {0o440, true, false}} {
		files := newFiles(t, cert, cert)
		if err := os.Chmod(files.key, tt.mode); err != nil {
			t.Fatal(err)
		}
		env := withEnv()
		if tt.ofUnit {
			env = withEnv("CREDENTIALS_DIRECTORY=" + files.dir)
		}
		p := start(t, append([]string{"server", "-control-plane-port", "0"}, files.flags()...), env)
		p.waitErr("msg=listening")
		if got := strings.Contains(p.stderr.String(), `level=WARN msg="others can read the private key" file=`+files.key+" mode="+tt.mode.String()); got != tt.want {
			t.Errorf("mode %s, of a unit %t: told %t\n%s", tt.mode, tt.ofUnit, got, p)
		}
		p.stop()
	}
}

// Where the kernel can never tell who calls there is no listener without TLS: a run that needs one
// ends with 3, and says why and what helps.
func TestTLS_NoListenerWhereNobodyCanTell(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	files := newFiles(t, issue(t, ca, nil), ca)
	file := writePipeline(t, actor("a", role{Dialect: "v1"}))
	for _, tt := range []struct {
		name    string
		command []string // that runs flowctl
		why     string
	}{
		{"/proc of others", []string{"unshare", "--user", "--map-root-user", "--pid", "--fork"}, "/proc is that of another pid namespace"},
		{"no netlink", []string{get(os.Executable())(t)}, "the kernel cannot be asked about sockets: socket: address family not supported by protocol (a unit with RestrictAddressFamilies= needs AF_NETLINK)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, runArgs(file, files.mutual()...), withEnv(roleVar+"="+actorRole(t, role{NoNetlink: true})), func(p *process) {
				p.cmd.Args = slices.Concat(tt.command, []string{p.cmd.Path}, p.cmd.Args[1:])
				p.cmd.Path = get(exec.LookPath(tt.command[0]))(t)
			})
			code, stdout, stderr := p.finish()
			if strings.Contains(stderr, "unshare:") {
				t.Skip("this system does not let us have a pid namespace: ", stderr)
			}
			if want := "\nflowctl: no listener without TLS for a: flowctl could not tell who calls there: " + tt.why + "; give them \"tls\": true\n"; code != exitPlane || !strings.HasSuffix(stderr, want) {
				t.Errorf("exit %d\n%s%s", code, stdout, stderr)
			}
		})
	}
}
