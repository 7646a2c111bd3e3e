// Package clienttest is a small gate for tests of the client: real TLS 1.3 with client certificates, the session API and
// a real WireGuard device. It has no policy and no door.
package clienttest

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"perimeterd/vpn"
	"perimeterd/vpn/client"
)

// Gate is the far end. Its fields may be changed between requests, under Lock.
type Gate struct {
	sync.Mutex
	Network        netip.Prefix                                   // the first address is the gate's
	Endpoint       string                                         // host:port, UDP
	Life           time.Duration                                  // of a session
	Refuse         *vpn.APIError                                  // the answer to every POST
	RefuseCert     bool                                           // end handshakes as for a revoked certificate
	RefuseRenewal  *vpn.APIError                                  // the answer to every request for a certificate
	Renewal        func(*vpn.CertificateReply, *x509.Certificate) // changes the answer; nil: nothing does
	LoseRenewals   int                                            // answers that do not arrive
	Renewals       int                                            // certificates issued to renew others
	NoResponse     bool                                           // sessions without a handshake in the reply
	Requests       []vpn.SessionRequest                           // POSTs, as they came
	Ended          []string                                       // ids deleted
	PostQuantum    bool                                           // of the latest connection
	Connections    int
	serverID       string
	caPEM          []byte
	ca             *x509.Certificate
	caKey          *ecdsa.PrivateKey
	cert           tls.Certificate
	private        *ecdh.PrivateKey
	profileKey     []byte // the WireGuard public key that profiles carry
	dev            *device.Device
	bind           *vpn.Bind
	next           netip.Addr
	peersOfSession map[string]string
	renews         map[[32]byte][32]byte // hash of a key → of the one whose certificate it renewed
	retired        map[[32]byte]bool
}

// NewGate makes a gate with fresh keys.
func NewGate() (*Gate, error) {
	g := &Gate{
		Network:        netip.MustParsePrefix("10.77.0.0/16"),
		Life:           12 * time.Hour,
		serverID:       hex.EncodeToString(random(16)),
		peersOfSession: map[string]string{},
		renews:         map[[32]byte][32]byte{},
		retired:        map[[32]byte]bool{},
	}
	g.next = g.Network.Addr().Next().Next()
	var err error
	if g.caKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, g.caKey.Public(), g.caKey)
	if err != nil {
		return nil, err
	}
	if g.ca, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	g.caPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	cert, key, err := g.issue(&x509.Certificate{DNSNames: []string{g.serverID}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		NotAfter: time.Now().Add(time.Hour)})
	if err != nil {
		return nil, err
	}
	if g.cert, err = tls.X509KeyPair(cert, key); err != nil {
		return nil, err
	}
	g.private, err = ecdh.X25519().GenerateKey(rand.Reader)
	g.profileKey = g.private.PublicKey().Bytes()
	return g, err
}

func random(n int) []byte { b := make([]byte, n); rand.Read(b); return b }

func (g *Gate) issue(t *x509.Certificate) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if cert, err = g.sign(t, k.Public()); err != nil {
		return nil, nil, err
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	return cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), err
}

func (g *Gate) sign(t *x509.Certificate, key any) (cert []byte, err error) {
	t.SerialNumber = new(big.Int).SetBytes(random(8))
	t.NotBefore = time.Now().Add(-time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, t, g.ca, key, g.caKey)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), err
}

// RotateWireGuard gives the gate another WireGuard key than the profiles made before have. Call it before Serve.
func (g *Gate) RotateWireGuard() (err error) {
	g.private, err = ecdh.X25519().GenerateKey(rand.Reader)
	return err
}

// Profile is a profile for the gate, valid for life.
func (g *Gate) Profile(user, endpoint string, tunnelPort uint16, life time.Duration, sequence ...string) (*client.Profile, error) {
	cert, key, err := g.issue(&x509.Certificate{Subject: pkix.Name{CommonName: user},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotAfter: time.Now().Add(life)})
	return &client.Profile{
		Version: client.ProfileVersion, User: user, Endpoints: []string{endpoint}, TunnelPort: tunnelPort, ServerID: g.serverID,
		ServerPublicKey: base64.StdEncoding.EncodeToString(g.profileKey), KnockSecret: base64.StdEncoding.EncodeToString(random(32)),
		KnockStep: "30s", Sequence: sequence, Egress: []string{"203.0.113.10/32"},
		CA: string(g.caPEM), Certificate: string(cert), Key: string(key),
	}, err
}

// Serve answers on l, with a WireGuard device on the given UDP port and tun, until ctx ends.
func (g *Gate) Serve(ctx context.Context, l net.Listener, t tun.Device, port string) error {
	g.bind = vpn.NewBind()
	g.dev = device.NewDevice(t, g.bind, device.NewLogger(device.LogLevelSilent, ""))
	defer g.dev.Close()
	if err := g.dev.IpcSet("private_key=" + hex.EncodeToString(g.private.Bytes()) + "\nlisten_port=" + port + "\n"); err != nil {
		return err
	}
	if err := g.dev.Up(); err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(g.ca)
	config := &tls.Config{
		Certificates: []tls.Certificate{g.cert}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		VerifyConnection: func(s tls.ConnectionState) error {
			g.Lock()
			defer g.Unlock()
			g.Connections++
			g.PostQuantum = s.CurveID == tls.X25519MLKEM768
			if g.RefuseCert || g.retired[sha256.Sum256(s.PeerCertificates[0].RawSubjectPublicKeyInfo)] {
				return errors.New("revoked")
			}
			return nil
		},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+vpn.SessionPath, g.post)
	mux.HandleFunc("GET "+vpn.SessionPath+"/{id}", g.get)
	mux.HandleFunc("DELETE "+vpn.SessionPath+"/{id}", g.end)
	mux.HandleFunc("GET "+vpn.StreamPath, g.stream)
	mux.HandleFunc("GET "+vpn.SessionPath, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("[]")) })
	mux.HandleFunc("POST "+vpn.CertificatePath, g.renew)
	used := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.Lock()
		if old, renewed := g.renews[sha256.Sum256(r.TLS.PeerCertificates[0].RawSubjectPublicKeyInfo)]; renewed {
			g.retired[old] = true
		}
		g.Unlock()
		mux.ServeHTTP(w, r)
	})
	srv := &http.Server{Handler: used, ErrorLog: log.New(io.Discard, "", 0)}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(tls.NewListener(l, config)); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Port is the UDP port, once Serve has begun.
func (g *Gate) Port() string {
	text, _ := g.dev.IpcGet()
	_, after, _ := strings.Cut(text, "listen_port=")
	port, _, _ := strings.Cut(after, "\n")
	return port
}

func (g *Gate) post(w http.ResponseWriter, r *http.Request) {
	g.Lock()
	defer g.Unlock()
	var req vpn.SessionRequest
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, vpn.MaxBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		refuse(w, &vpn.APIError{Code: vpn.CodeBadRequest, Message: err.Error()})
		return
	}
	g.Requests = append(g.Requests, req)
	if g.Refuse != nil {
		refuse(w, g.Refuse)
		return
	}
	psk, id, address := random(32), hex.EncodeToString(random(16)), g.next
	g.next = g.next.Next()
	peer := hex.EncodeToString(req.PublicKey)
	if err := g.dev.IpcSet("public_key=" + peer + "\npreshared_key=" + hex.EncodeToString(psk) + "\nallowed_ip=" + address.String() + "/32\n"); err != nil {
		refuse(w, &vpn.APIError{Code: vpn.CodeInternal, Message: err.Error()})
		return
	}
	g.peersOfSession[id] = peer
	gate := g.Network.Addr().Next()
	reply := vpn.SessionReply{
		ID: id, User: r.TLS.PeerCertificates[0].Subject.CommonName, Device: req.Device, Address: netip.PrefixFrom(address, 32),
		ServerPublicKey: g.private.PublicKey().Bytes(), Endpoint: g.Endpoint, PresharedKey: psk,
		Proxy: netip.AddrPortFrom(gate, 3128), Console: netip.AddrPortFrom(gate, 80), MTU: 1400, Keepalive: 25,
		Expires: time.Now().Add(g.Life).Truncate(time.Second), PostQuantum: g.PostQuantum,
	}
	if len(req.Initiation) == vpn.InitiationSize && !g.NoResponse {
		outer, _ := netip.ParseAddrPort(r.RemoteAddr)
		flight := vpn.NewFlight(outer)
		g.bind.Inject(req.Initiation, flight)
		select {
		case reply.Response = <-flight.Message():
		case <-time.After(100 * time.Millisecond): // not for this key
		}
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(reply)
}

func (g *Gate) get(w http.ResponseWriter, r *http.Request) {
	g.Lock()
	defer g.Unlock()
	if _, ok := g.peersOfSession[r.PathValue("id")]; !ok {
		refuse(w, &vpn.APIError{Code: vpn.CodeNotFound, Message: "no such session"})
		return
	}
	json.NewEncoder(w).Encode(vpn.SessionReply{ID: r.PathValue("id")})
}

// stream has none, as a gate with the kernel's WireGuard.
func (g *Gate) stream(w http.ResponseWriter, r *http.Request) {
	g.Lock()
	defer g.Unlock()
	w.Header().Set("Connection", "close")
	if _, ok := g.peersOfSession[r.URL.Query().Get("session")]; !ok {
		refuse(w, &vpn.APIError{Code: vpn.CodeNotFound, Message: "no such session"})
		return
	}
	refuse(w, &vpn.APIError{Code: vpn.CodeNoStream, Message: "no streams here"})
}

// renew issues one successor to a certificate, as the real gate does.
func (g *Gate) renew(w http.ResponseWriter, r *http.Request) {
	g.Lock()
	defer g.Unlock()
	var req vpn.CertificateRequest
	old := r.TLS.PeerCertificates[0]
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, vpn.MaxBody)).Decode(&req)
	csr, e := x509.ParseCertificateRequest(req.Request)
	if err = errors.Join(err, e); err == nil {
		err = errors.Join(csr.CheckSignature(), old.CheckSignature(x509.ECDSAWithSHA256, vpn.RenewalMessage(req.Request), req.Proof))
	}
	if err != nil {
		refuse(w, &vpn.APIError{Code: vpn.CodeBadRequest, Message: err.Error()})
		return
	}
	if g.RefuseRenewal != nil {
		refuse(w, g.RefuseRenewal)
		return
	}
	from, to := sha256.Sum256(old.RawSubjectPublicKeyInfo), sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	for key, before := range g.renews {
		if before == from && key != to {
			refuse(w, &vpn.APIError{Code: vpn.CodeRenewed, Message: "renewed before, with another key"})
			return
		}
	}
	cert, err := g.sign(&x509.Certificate{Subject: old.Subject, ExtKeyUsage: old.ExtKeyUsage, NotAfter: time.Now().Add(48 * time.Hour)}, csr.PublicKey)
	if err != nil {
		refuse(w, &vpn.APIError{Code: vpn.CodeInternal, Message: err.Error()})
		return
	}
	g.renews[to] = from
	g.Renewals++
	if g.LoseRenewals > 0 {
		g.LoseRenewals--
		panic(http.ErrAbortHandler)
	}
	reply := vpn.CertificateReply{Certificate: string(cert), CA: string(g.caPEM), Expires: time.Now().Add(48 * time.Hour)}
	if g.Renewal != nil {
		g.Renewal(&reply, old)
	}
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(reply)
}

func (g *Gate) end(w http.ResponseWriter, r *http.Request) {
	g.Lock()
	defer g.Unlock()
	peer, ok := g.peersOfSession[r.PathValue("id")]
	if !ok {
		refuse(w, &vpn.APIError{Code: vpn.CodeNotFound, Message: "no such session"})
		return
	}
	g.dev.IpcSet("public_key=" + peer + "\nremove=true\n")
	g.Ended = append(g.Ended, r.PathValue("id"))
	w.WriteHeader(http.StatusNoContent)
}

// Forget ends every session and tells nobody, as an operator's kick does.
func (g *Gate) Forget() {
	g.dev.RemoveAllPeers()
	clear(g.peersOfSession)
}

func refuse(w http.ResponseWriter, e *vpn.APIError) {
	w.WriteHeader(vpn.StatusOf(e.Code))
	json.NewEncoder(w).Encode(vpn.ErrorReply{Error: e})
}
