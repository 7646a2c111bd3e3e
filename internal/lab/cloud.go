//go:build linux

package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// CloudOptions says what the cloud host pretends to be.
type CloudOptions struct {
	Names []string                // in its certificate and in DNS; the first label may be *
	IPv6  bool                    // give the names AAAA records too
	Sites map[string]http.Handler // what a name serves instead, of Names, and spelled as there
	Bare  bool                    // no web server: another program serves the names, with CertFile and KeyFile
}

// Request is one HTTP request that the cloud host got.
type Request struct {
	At             time.Time
	From           netip.AddrPort
	ServerName     string // of TLS; empty on port 80
	Method         string
	Host           string
	URI            string
	Proto          string
	Received, Sent int64 // bytes of body so far; a client may be one block of 64 KB ahead of Sent
	Done           bool
}

// CloudHost is an HTTPS server on port 443 and the same on port 80, with a DNS server that leads its names to it. Both
// serve every address of the cloud's namespace.
//
//	/bytes/N   N bytes, of which byte i is i mod 251
//	/upload    reads the body, then says `got N bytes`
//	any other  `seen from 198.19.1.10`
type CloudHost struct {
	CAFile string         // certificate of the authority made for this run, PEM: for curl --cacert
	CAs    *x509.CertPool // the same
	DNS    *DNS

	CertFile, KeyFile string // of all names, PEM, where another program serves them

	pattern []byte // of /bytes, a multiple of 251 long
	sites   map[string]http.Handler

	mu       sync.Mutex
	requests []*Request
}

// StartCloud starts the cloud host's servers, which run until the lab closes. A lab has one cloud host.
func (l *Lab) StartCloud(o CloudOptions) (*CloudHost, error) {
	if len(o.Names) == 0 {
		return nil, errors.New("cloud host: no names: give those it stands for, such as console.aws.amazon.com")
	}
	h := &CloudHost{
		CAFile: filepath.Join(l.Dir, "cloud-ca.pem"), CAs: x509.NewCertPool(), DNS: &DNS{records: map[string][][]netip.Addr{}, ttl: shortTTL},
		pattern: make([]byte, 251*256), sites: o.Sites,
	}
	for i := range h.pattern {
		h.pattern[i] = byte(i % 251)
	}
	addrs := []netip.Addr{l.Cloud.Addr}
	if o.IPv6 {
		addrs = append(addrs, l.Cloud.Addr6)
	}
	for _, n := range o.Names {
		h.DNS.Set(n, addrs...)
	}
	cert, ca, err := certify(o.Names, l.Cloud.Addr, l.Cloud.Addr6)
	if err != nil {
		return nil, fmt.Errorf("cloud host: %w", err)
	}
	h.CAs.AppendCertsFromPEM(ca)
	if err := os.WriteFile(h.CAFile, ca, 0o644); err != nil {
		return nil, fmt.Errorf("cloud host: %w", err)
	}
	stopDNS, err := h.DNS.start(l.Cloud, l.Cloud.Addr, l.Cloud.Addr6)
	if err != nil {
		return nil, fmt.Errorf("cloud host: %w", err)
	}
	if err := l.onClose(stopDNS); err != nil {
		return nil, err
	}
	if o.Bare {
		h.CertFile, h.KeyFile = filepath.Join(l.Dir, "cloud.pem"), filepath.Join(l.Dir, "cloud.key")
		key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
		if err == nil {
			err = errors.Join(os.WriteFile(h.CertFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o644),
				os.WriteFile(h.KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))
		}
		if err != nil {
			return nil, fmt.Errorf("cloud host: %w", err)
		}
		return h, nil
	}
	plain, err := l.Cloud.Listen("tcp", ":80")
	if err != nil {
		return nil, fmt.Errorf("cloud host: %w", err)
	}
	secure, err := l.Cloud.Listen("tcp", ":443")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cloud host: %w", err), plain.Close())
	}
	// Two servers, since one that serves plain HTTP first never learns HTTP/2.
	var servers [2]*http.Server
	for i := range servers {
		servers[i] = &http.Server{
			Handler:           h,
			TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}},
			ReadHeaderTimeout: 10 * time.Second,
			// Probes that end in mid-handshake are the lab's daily bread.
			ErrorLog: log.New(io.Discard, "", 0),
		}
	}
	go servers[0].Serve(plain)
	go servers[1].ServeTLS(secure, "", "")
	return h, l.onClose(func() error {
		err := errors.Join(servers[0].Close(), servers[1].Close())
		// A server that is closed before Serve has begun does not know its listener yet.
		plain.Close()
		secure.Close()
		return err
	})
}

// Requests returns the requests so far, oldest first; the last 8,000 at least are kept.
func (h *CloudHost) Requests() []Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	copies := make([]Request, len(h.requests))
	for i, r := range h.requests {
		copies[i] = *r
	}
	return copies
}

func (h *CloudHost) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	req := &Request{
		At: time.Now(), From: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()),
		Method: r.Method, Host: r.Host, URI: r.RequestURI, Proto: r.Proto,
	}
	if r.TLS != nil {
		req.ServerName = r.TLS.ServerName
	}
	h.mu.Lock()
	h.requests = appendBounded(h.requests, req)
	h.mu.Unlock()
	// The counts move while a transfer runs, so that a test can wait for half of one.
	defer h.note(func() { req.Done = true })
	sent := func(n int) { h.note(func() { req.Sent += int64(n) }) }
	count, isBytes := strings.CutPrefix(r.URL.Path, "/bytes/")
	site := h.site(r.Host)
	switch {
	case site != nil:
		site.ServeHTTP(w, r)
	case isBytes:
		n, err := strconv.ParseInt(count, 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "want /bytes/N", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Content-Length", count)
		for n > 0 {
			k, err := w.Write(h.pattern[:min(n, int64(len(h.pattern)))])
			sent(k)
			if err != nil {
				return
			}
			n -= int64(k)
		}
	case r.URL.Path == "/upload":
		got, err := io.Copy(counter(func(n int) { h.note(func() { req.Received += int64(n) }) }), r.Body)
		if err != nil {
			return
		}
		k, _ := fmt.Fprintf(w, "got %d bytes\n", got)
		sent(k)
	default:
		k, _ := fmt.Fprintf(w, "seen from %v\n", req.From.Addr())
		sent(k)
	}
}

func (h *CloudHost) site(host string) http.Handler {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	if s, ok := h.sites[name]; ok {
		return s
	}
	_, parent, _ := strings.Cut(name, ".")
	return h.sites["*."+parent]
}

func (h *CloudHost) note(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
}

// counter is an io.Writer that is told how much was written.
type counter func(n int)

func (c counter) Write(b []byte) (int, error) {
	c(len(b))
	return len(b), nil
}

// certify makes an authority that lives in memory only, and a certificate for the names and addresses.
func certify(names []string, addrs ...netip.Addr) (cert tls.Certificate, ca []byte, err error) {
	now := time.Now()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, err
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "perimeter lab cloud CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(0, 0, 7),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, authority, authority, &caKey.PublicKey, caKey)
	if err != nil {
		return cert, nil, err
	}
	// Parsed again, it has the key identifier by which the leaf refers to it.
	if authority, err = x509.ParseCertificate(raw); err != nil {
		return cert, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: names[0]},
		NotBefore: authority.NotBefore, NotAfter: authority.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: names,
	}
	for _, a := range addrs {
		leaf.IPAddresses = append(leaf.IPAddresses, net.IP(a.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, authority, &key.PublicKey, caKey)
	cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}), err
}
