package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"perimeterd/vpn"
)

// Limits of what a gate may answer with.
const (
	minMTU        = 1280
	maxMTU        = 1420
	maxReply      = 64 << 10
	maxAnswerHead = 16 << 10 // of an answer: net/http bounds it in no way
)

// sharedSpace may number a tunnel network as private space may (RFC 6598).
var sharedSpace = netip.MustParsePrefix("100.64.0.0/10")

// gateConn is an authenticated connection to the gate. It speaks HTTP/1.1 by itself and not through http.Transport: the
// request must leave right behind the client's Finished, and when the gate refuses the certificate its alert must be read
// although the request could not be written.
type gateConn struct {
	*tls.Conn
	replies   *bufio.Reader
	bounded   *io.LimitedReader // what replies reads from
	rest      io.Reader         // of the latest answer, to be read before the next; nil: nothing
	name      string
	date      time.Time     // by the gate's clock, when it last answered; zero: it does not say
	roundTrip time.Duration // as the handshake took it; zero: not known
	proven    bool          // the gate has answered a request: it accepts the certificate
}

// checkDates finds out before any packet what the gate would refuse.
func (p *Profile) checkDates(now time.Time) error {
	leaf := p.typed.identity.Leaf
	if now.Before(leaf.NotBefore) {
		return &RefusedError{"clock", fmt.Sprintf("the certificate is valid from %s, and this clock says %s: correct the clock",
			leaf.NotBefore.Local().Format(time.DateTime), now.Format(time.DateTime))}
	}
	if now.After(leaf.NotAfter) {
		return &RefusedError{"expired", fmt.Sprintf("the certificate expired at %s: ask the operator for a new profile",
			leaf.NotAfter.Local().Format(time.DateTime))}
	}
	return nil
}

// handshake authenticates both sides on a fresh connection; it closes the connection on error. The gate's judgement of
// our certificate arrives only with its first answer, a round trip later.
func (p *Profile) handshake(ctx context.Context, conn net.Conn) (*gateConn, error) {
	c := tls.Client(conn, p.tlsConfig(nil))
	began := time.Now()
	if err := c.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, at(conn, explainTLS(err))
	}
	g := newGateConn(c, p.ServerID)
	g.roundTrip = min(time.Since(began), tcpRoundTrip(conn))
	return g, nil
}

// tlsConfig takes the clock by which the gate's certificate must hold; nil: this machine's.
func (p *Profile) tlsConfig(now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		ServerName:   p.ServerID,
		RootCAs:      p.typed.roots,
		Certificates: []tls.Certificate{p.typed.identity},
		Time:         now,
	}
}

func newGateConn(c *tls.Conn, name string) *gateConn {
	bounded := &io.LimitedReader{R: c, N: math.MaxInt64}
	return &gateConn{Conn: c, replies: bufio.NewReader(bounded), bounded: bounded, name: name}
}

// postQuantum tells whether what travels here is safe from a later quantum computer.
func (g *gateConn) postQuantum() bool { return g.ConnectionState().CurveID == tls.X25519MLKEM768 }

// do sends a request and decodes the answer into reply, unless that is nil. A refusal is a *vpn.APIError.
func (g *gateConn) do(ctx context.Context, method, path string, body, reply any) error {
	g.SetDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { g.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+g.name+path, content)
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	var wire bytes.Buffer // one record, one segment where it fits
	if err := req.Write(&wire); err != nil {
		return err
	}
	_, writeErr := g.Write(wire.Bytes())
	if writeErr == nil && method == http.MethodPost {
		// An empty line, which a server passes over (RFC 9112, 2.2), in a segment of its own: what is lost before it is missed by
		// the gate's TCP at once, where else a timer of this one's finds out.
		_, _ = g.Write([]byte("\r\n"))
	}
	resp, err := g.answer(req)
	defer func() { g.bounded.N = math.MaxInt64 }()
	if err != nil {
		return at(g, g.explain(ctx, err, writeErr))
	}
	g.proven = true
	g.date, _ = http.ParseTime(resp.Header.Get("Date"))
	if resp.StatusCode/100 == 2 && reply != nil {
		g.rest = resp.Body
		return at(g, readJSON(resp.Body, reply))
	}
	defer resp.Body.Close()
	text, err := readReply(resp)
	if err != nil {
		return at(g, err)
	}
	if resp.StatusCode/100 != 2 {
		return apiError(resp, text)
	}
	return nil
}

// answer reads the head of the answer to req, and first what is left of the one before.
func (g *gateConn) answer(req *http.Request) (*http.Response, error) {
	g.bounded.N = maxAnswerHead + maxReply + 1
	if g.rest != nil {
		if _, err := io.Copy(io.Discard, g.rest); err != nil {
			return nil, err
		}
		g.rest = nil
	}
	return http.ReadResponse(g.replies, req)
}

// readJSON reads one JSON value, and not on to the body's end, which may be late.
func readJSON(body io.Reader, into any) error {
	bounded := &io.LimitedReader{R: body, N: maxReply + 1}
	var text json.RawMessage
	err := json.NewDecoder(bounded).Decode(&text)
	var syntax *json.SyntaxError
	switch {
	case bounded.N <= 0:
		return errTooLong
	case err == nil:
		err = json.Unmarshal(text, into)
	case !errors.As(err, &syntax):
		return fmt.Errorf("its answer broke off: %w", err)
	}
	if err != nil {
		return fmt.Errorf("its answer is not understood: %s: update the client, or ask the operator whether this is the right address", plain(err.Error()))
	}
	return nil
}

// readReply reads no more than a gate may answer with.
func readReply(resp *http.Response) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err != nil {
		return nil, fmt.Errorf("its answer broke off: %w", err)
	}
	if len(text) > maxReply {
		return nil, errTooLong
	}
	return text, nil
}

// refusedBy is what an answer that is no success says.
func refusedBy(resp *http.Response) error {
	text, err := readReply(resp)
	if err != nil {
		return err
	}
	return apiError(resp, text)
}

var errTooLong = fmt.Errorf("its answer is longer than %d bytes: this is no perimeterd gate: ask the operator whether it is the right address", maxReply)

// explain says why there is no answer.
func (g *gateConn) explain(ctx context.Context, err, writeErr error) error {
	var network net.Error
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("the gate gave no answer in time: %w: try again, or tell the operator", ctx.Err())
	case g.bounded.N <= 0:
		return errTooLong
	case errors.As(err, &network) || writeErr != nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return explainTLS(errors.Join(err, writeErr))
	}
	return fmt.Errorf("what it says is not an answer in HTTP: %s: ask the operator whether this is the right address", plain(err.Error()))
}

// at names the gate that an error is of. What it refuses is refused wherever.
func at(conn net.Conn, err error) error {
	if err == nil || permanent(err) {
		return err
	}
	return fmt.Errorf("gate %v: %w", conn.RemoteAddr(), err)
}

func apiError(resp *http.Response, text []byte) error {
	var e vpn.ErrorReply
	if json.Unmarshal(text, &e) != nil || e.Error == nil || e.Error.Code == "" {
		return fmt.Errorf("the gate answered %s, and nothing else that is understood", plain(resp.Status))
	}
	e.Error.Status = resp.StatusCode
	e.Error.Message, e.Error.Fix = plain(e.Error.Message), plain(e.Error.Fix)
	e.Error.RetryAfter, _ = strconv.Atoi(resp.Header.Get("Retry-After"))
	return e.Error
}

// plain is what a gate says as a terminal may show it.
func plain(s string) string { return printable(s, 300) }

func printable(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
	return fmt.Sprintf("%.*s", most, s)
}

// checkReply refuses what would bend routes or lengths, although it comes from the authenticated gate.
func checkReply(r *vpn.SessionReply) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("the gate's reply: "+format+": update the client, or tell the operator", a...)
	}
	switch {
	case r.ID == "" || strings.Trim(r.ID, "0123456789abcdefABCDEF") != "": // it goes into paths
		return bad("session id %q: want hexadecimal digits", r.ID)
	case !r.Address.IsValid() || !r.Address.IsSingleIP() || !r.Address.Addr().IsPrivate() && !sharedSpace.Contains(r.Address.Addr()):
		return bad("address %v is not one private address", r.Address)
	case !r.Proxy.IsValid() || r.Proxy.Port() == 0 || !r.Proxy.Addr().IsPrivate() && !sharedSpace.Contains(r.Proxy.Addr()):
		return bad("proxy %v is not on a private address", r.Proxy)
	case r.Proxy.Addr() == r.Address.Addr() || r.Proxy.Addr().Is4() != r.Address.Addr().Is4():
		return bad("proxy %v does not fit address %v", r.Proxy, r.Address)
	case len(r.ServerPublicKey) != 32:
		return bad("server_public_key has %d bytes", len(r.ServerPublicKey))
	case len(r.PresharedKey) != 32:
		return bad("preshared_key has %d bytes", len(r.PresharedKey))
	case len(r.Response) != 0 && len(r.Response) != vpn.ResponseSize:
		return bad("response has %d bytes", len(r.Response))
	case r.MTU < minMTU || r.MTU > maxMTU:
		return bad("mtu %d is not between %d and %d", r.MTU, minMTU, maxMTU)
	case r.Keepalive < 0 || r.Keepalive > 3600:
		return bad("keepalive %d s", r.Keepalive)
	}
	if _, _, err := splitEndpoint(r.Endpoint); err != nil {
		return bad("endpoint %v", err)
	}
	return nil
}

// RefusedError is a refusal that trying again does not change.
type RefusedError struct {
	Code string
	Text string
}

func (e *RefusedError) Error() string { return e.Text }

// permanent says whether only a person can help.
func permanent(err error) bool {
	var refused *RefusedError
	var api *vpn.APIError
	return errors.As(err, &refused) ||
		errors.As(err, &api) && (api.Code == vpn.CodeRevoked || api.Code == vpn.CodeForbidden || api.Code == vpn.CodePostQuantum)
}

// certificateRefused says whether the gate, or this clock, has judged the certificate: only another one changes that.
// What else is permanent may be due to the network, which changes.
func certificateRefused(err error) bool {
	var refused *RefusedError
	if errors.As(err, &refused) {
		return refused.Code == "expired" || slices.ContainsFunc(alertTexts, func(a alertText) bool { return a.code == refused.Code })
	}
	var api *vpn.APIError
	return errors.As(err, &api) && (api.Code == vpn.CodeRevoked || api.Code == vpn.CodeForbidden)
}

// forgotten says whether the gate does not know the session.
func forgotten(err error) bool {
	var api *vpn.APIError
	return errors.As(err, &api) && api.Code == vpn.CodeNotFound
}

// alertTexts says in words what a gate's TLS alert means here. crypto/tls keeps the number of a received alert to itself,
// but tells it by the text of AlertError (RFC 8446, 6.2).
var alertTexts = []alertText{
	{42, "bad_certificate", "the gate does not accept this certificate: it is revoked, or its user is unknown at this gate: ask the operator"},
	{43, "unsupported_certificate", "the gate does not accept this kind of certificate: it must be for client authentication: ask for a new profile"},
	{44, "revoked", "the certificate is revoked: ask the operator"},
	{45, "expired", "the certificate has expired by the gate's clock: ask the operator for a new profile"},
	{46, "certificate_unknown", "the gate does not accept this certificate: ask the operator"},
	{48, "unknown_ca", "the gate does not know the CA of this certificate: it is for another gate, or the CA was replaced: ask for a new profile"},
	{49, "access_denied", "the gate denies access to this certificate: ask the operator"},
	{116, "certificate_required", "the gate saw no certificate: the profile is damaged: ask for a new one"},
}

type alertText struct {
	alert tls.AlertError
	code  string
	text  string
}

const noVersion = tls.AlertError(70)

// explainTLS puts errors of the handshake, and of the first read after it, into words.
func explainTLS(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		for _, a := range alertTexts {
			if op.Err.Error() == a.alert.Error() {
				return &RefusedError{a.code, a.text}
			}
		}
		if op.Err.Error() == noVersion.Error() {
			return errors.New("it speaks no TLS 1.3: this is no perimeterd gate: ask the operator whether it is the right address")
		}
		return fmt.Errorf("the gate refuses the connection: %w", err)
	}
	var notTLS tls.RecordHeaderError
	if errors.As(err, &notTLS) {
		return errors.New("what answers there does not speak TLS: ask the operator whether this is the right address; a network may also want you to sign in first")
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("it takes connections, and says nothing: the daemon there hangs, or a network on the way swallows large packets: "+
			"tell the operator, or try another network: %w", err)
	}
	var authority x509.UnknownAuthorityError
	if errors.As(err, &authority) {
		return &RefusedError{"gate_unknown", "what answers there is not this profile's gate (its certificate is of another CA): " +
			"the profile is out of date, or someone is in between"}
	}
	var host x509.HostnameError
	if errors.As(err, &host) {
		return &RefusedError{"gate_other", "what answers there is another gate than this profile's: the profile is out of date, or a network on the way answers in its place"}
	}
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return fmt.Errorf("the gate's certificate is not valid at this clock's time, %s: correct the clock, or tell the operator: %w",
			time.Now().Format(time.DateTime), err)
	}
	return fmt.Errorf("the gate closed the connection (%w): try again; if it stays so, tell the operator", err)
}
