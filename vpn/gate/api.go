package gate

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/vpn"
)

func badRequest(format string, a ...any) error {
	return &vpn.APIError{Code: vpn.CodeBadRequest, Message: fmt.Sprintf(format, a...)}
}

// decodeBody reads strictly: one JSON object, no unknown field, at most vpn.MaxBody bytes.
func decodeBody(body io.Reader, into any, want string) error {
	data, err := io.ReadAll(io.LimitReader(body, vpn.MaxBody+1))
	if err != nil {
		return badRequest("body: %v", err)
	}
	if len(data) > vpn.MaxBody {
		return &vpn.APIError{Code: vpn.CodeTooLarge, Message: fmt.Sprintf("the body has more than %d bytes", vpn.MaxBody)}
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return badRequest("body: %v: want %s", err, want)
	}
	if _, err := d.Token(); err != io.EOF {
		return badRequest("body: something follows the JSON object")
	}
	return nil
}

func decode(body io.Reader) (req vpn.SessionRequest, err error) {
	if err := decodeBody(body, &req, `{"public_key": base64, "initiation": base64?, "device": name?}`); err != nil {
		return req, err
	}
	if len(req.PublicKey) != len(session.Key{}) {
		return req, badRequest("public_key has %d bytes: want 32, as `wg pubkey` prints them", len(req.PublicKey))
	}
	if lowOrder(req.PublicKey) {
		return req, badRequest("public_key is a point of low order: make a new key")
	}
	if n := len(req.Initiation); n != 0 && n != vpn.InitiationSize {
		return req, badRequest("initiation has %d bytes: want %d or none", n, vpn.InitiationSize)
	}
	if len(req.Device) > 64 || !utf8.ValidString(req.Device) || !printable(req.Device) {
		return req, badRequest("device %q: want at most 64 bytes of printable text", req.Device)
	}
	return req, nil
}

func printable(s string) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// lowOrder tells points that give every private key the same, known shared secret (RFC 7748, 6.1): crypto/ecdh refuses
// the all-zero result, whatever the private key.
func lowOrder(public []byte) bool {
	p, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return true
	}
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return true
	}
	_, err = k.ECDH(p)
	return err != nil
}

func (g *Gate) post(w http.ResponseWriter, r *http.Request, id identity.Identity) error {
	req, err := decode(r.Body)
	if err != nil {
		return err
	}
	s, err := g.beginSession(req, id, outer(r).Addr(), r.TLS.CurveID, time.Now())
	if err != nil {
		return err
	}
	if err := sameStrength(s, r); err != nil {
		return err
	}
	// A revocation that came between the check and the session found no session to end.
	now, err := g.verifier.Identify(*r.TLS)
	if err != nil {
		return errors.Join(err, g.store.End(s.ID, session.Revoked))
	}
	if !slices.Equal(now.Groups, id.Groups) || now.Settings != id.Settings { // the same of a change
		return errors.Join(&vpn.APIError{Code: vpn.CodeRate, Message: "what the user may do changes just now", Fix: "ask again", RetryAfter: 1},
			g.store.End(s.ID, session.Changed))
	}
	reply := g.reply(s)
	reply.PresharedKey, reply.Streams, reply.Renew = s.PresharedKey[:], g.tunnel.bind != nil, id.Leaving && g.renewals.Signer != nil
	if len(req.Initiation) != 0 {
		reply.Response = g.tunnel.Handshake(r.Context(), s.PublicKey, req.Initiation, outer(r))
	}
	return errors.Join(writeJSON(w, http.StatusCreated, reply), tailed(w))
}

// tailed sends an answer that is complete. Its end, an empty chunk, follows in a segment of its own: what the peer says of that
// tells TCP at once that the answer was lost, where else a timer does.
func tailed(w http.ResponseWriter) error { return http.NewResponseController(w).Flush() }

// postQuantum tells whether what travels under a key exchange withstands a quantum computer.
func postQuantum(curve tls.CurveID) bool {
	return curve == tls.X25519MLKEM768 || curve == tls.SecP256r1MLKEM768 || curve == tls.SecP384r1MLKEM1024
}

const strongerClient = "use a client with X25519MLKEM768 (Go 1.24, OpenSSL 3.5 or newer)"

// strong refuses a request whose key exchange is not what the configuration demands.
func (g *Gate) strong(r *http.Request) error {
	if !g.cfg.RequirePostQuantum || postQuantum(r.TLS.CurveID) {
		return nil
	}
	return &vpn.APIError{Code: vpn.CodePostQuantum, Message: "this gate wants a post-quantum key exchange, and " + r.TLS.CurveID.String() + " is none",
		Fix: strongerClient}
}

// sameStrength refuses a request that would have the preshared key of a post-quantum session travel once more, and weaker.
func sameStrength(s session.Session, r *http.Request) error {
	if !s.PostQuantum || postQuantum(r.TLS.CurveID) {
		return nil
	}
	return &vpn.APIError{Code: vpn.CodePostQuantum, Message: "the preshared key of this session came by a post-quantum key exchange, and " + r.TLS.CurveID.String() + " is none",
		Fix: strongerClient}
}

// beginSession makes a session, or finds the one that a repeated request of the same key and certificate has.
func (g *Gate) beginSession(req vpn.SessionRequest, id identity.Identity, source netip.Addr, curve tls.CurveID, now time.Time) (session.Session, error) {
	g.begin.Lock()
	defer g.begin.Unlock()
	own := g.store.Of(id.Certificate)
	for _, s := range own {
		if s.PublicKey == session.Key(req.PublicKey) {
			return s, nil
		}
	}
	if wait := g.pace.wait(id.Certificate, now); wait > 0 {
		return session.Session{}, &vpn.APIError{Code: vpn.CodeRate, Message: "too many sessions in a short time", Fix: "keep the ones you have",
			RetryAfter: int(wait.Seconds()) + 1}
	}
	if live := g.store.Len(); live >= g.cfg.Limit {
		return session.Session{}, &vpn.APIError{Code: vpn.CodeLimit, Message: fmt.Sprintf("%d sessions are live, and session.limit is %d", live, g.cfg.Limit),
			Fix: "try again later", RetryAfter: 60}
	}
	device := id.Device
	if device == "" {
		device = req.Device
	}
	address, err := g.address(id, device, now)
	if err != nil && !errors.Is(err, vpn.ErrPoolEmpty) {
		return session.Session{}, err
	}
	if err != nil {
		return session.Session{}, &vpn.APIError{Code: vpn.CodePool, Message: err.Error(), Fix: "try again later", RetryAfter: int(vpn.Quarantine.Seconds())}
	}
	expires := now.Add(id.Settings.Max(g.cfg.Max))
	if id.NotAfter.Before(expires) {
		expires = id.NotAfter
	}
	s := session.Session{ID: session.NewID(), User: id.User, Device: device, Groups: id.Groups, Credential: id.Credential, Certificate: id.Certificate, Chain: id.Chain,
		PublicKey: session.Key(req.PublicKey), Address: address, Outer: source, Created: now, Expires: expires,
		KeyExchange: curve.String(), PostQuantum: postQuantum(curve)}
	rand.Read(s.PresharedKey[:])
	switch err := g.store.Put(s); {
	case err == nil:
	case errors.Is(err, session.ErrKeyBound), errors.Is(err, session.ErrKeyUsed):
		g.pool.Release(address, now)
		return s, &vpn.APIError{Code: vpn.CodeKeyBound, Message: err.Error(), Fix: "make a new key for a new session"}
	default:
		g.pool.Release(address, now)
		return s, err
	}
	// Only now that the new one is there may it replace another.
	for own, limit := g.store.Of(id.Certificate), id.Settings.Limit(g.cfg.Devices); len(own) > limit; own = own[1:] {
		if err := g.store.End(own[0].ID, session.Replaced); err != nil && !errors.Is(err, session.ErrNotFound) {
			return s, errors.Join(err, g.store.End(s.ID, session.Deleted))
		}
	}
	g.log.Info("session began", "session", s.ID, "user", s.User, "device", s.Device, "source", source, "address", s.Address,
		"expires", s.Expires, "post_quantum", s.PostQuantum, "key_exchange", s.KeyExchange)
	return s, nil
}

// find is the caller's session of that name. Someone else's does not exist for him.
func (g *Gate) find(name string, id identity.Identity) (session.Session, error) {
	if sid, err := session.ParseID(name); err == nil {
		if s, ok := g.store.Get(sid); ok && s.Certificate == id.Certificate {
			return s, nil
		}
	}
	return session.Session{}, &vpn.APIError{Code: vpn.CodeNotFound, Message: fmt.Sprintf("no session %q of yours", name), Fix: "GET " + vpn.SessionPath + " lists yours"}
}

func (g *Gate) list(w http.ResponseWriter, _ *http.Request, id identity.Identity) error {
	list := []vpn.SessionReply{}
	for _, s := range g.store.Of(id.Certificate) {
		list = append(list, g.reply(s))
	}
	return writeJSON(w, http.StatusOK, list)
}

func (g *Gate) get(w http.ResponseWriter, r *http.Request, id identity.Identity) error {
	s, err := g.find(r.PathValue("id"), id)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, g.reply(s))
}

func (g *Gate) delete(w http.ResponseWriter, r *http.Request, id identity.Identity) error {
	s, err := g.find(r.PathValue("id"), id)
	if err != nil {
		return err
	}
	if err := g.store.End(s.ID, session.Deleted); err != nil && !errors.Is(err, session.ErrNotFound) {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (g *Gate) wgQuick(w http.ResponseWriter, r *http.Request, id identity.Identity) error {
	s, err := g.find(r.PathValue("id"), id)
	if err == nil {
		err = sameStrength(s, r)
	}
	if err != nil {
		return err
	}
	b64 := base64.StdEncoding.EncodeToString
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, err = fmt.Fprintf(w, `# Session %s of %s, until %s.
# Proxy for https_proxy: http://%s

[Interface]
# Fill in the private key whose public key is %s
PrivateKey =
Address = %s/32
MTU = %d

[Peer]
PublicKey = %s
PresharedKey = %s
AllowedIPs = %s/32
Endpoint = %s
PersistentKeepalive = %d
`, s.ID, s.User, s.Expires.UTC().Format(time.RFC3339), g.cfg.Proxy, b64(s.PublicKey[:]), s.Address, g.cfg.MTU,
		b64(g.serverKey[:]), b64(s.PresharedKey[:]), g.cfg.Proxy.Addr(), g.cfg.Endpoint, int(g.cfg.Keepalive.Seconds()))
	return err
}

// reply is a session as its owner sees it, without the preshared key.
func (g *Gate) reply(s session.Session) vpn.SessionReply {
	return vpn.SessionReply{ID: s.ID.String(), User: s.User, Device: s.Device, Address: netip.PrefixFrom(s.Address, 32), ServerPublicKey: g.serverKey[:],
		Endpoint: g.cfg.Endpoint, Proxy: g.cfg.Proxy, Console: g.cfg.Console, MTU: g.cfg.MTU, Keepalive: int(g.cfg.Keepalive.Seconds()),
		Expires: s.Expires, PostQuantum: s.PostQuantum}
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(data, '\n')) // an error here is the caller's connection, which is his
	return nil
}
