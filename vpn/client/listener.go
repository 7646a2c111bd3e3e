package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Bounds of the local listener.
const (
	localConnections = 2048             // of the owner
	localStrangers   = 16               // of others, who wait for their refusal
	localGuests      = 256              // of others who may have the credential
	localHead        = 10 * time.Second // for a whole head
	localLinger      = time.Second      // for what a refused client still sends
	localBody        = 64 << 10         // of a request to the console, bytes
	localPage        = 4 << 20          // of the console's answer, bytes
	localPatience    = 30 * time.Second // for that answer
)

// loginName is the user of a credential; the password is the secret.
const loginName = "vpn"

// Local serves the bastion's proxy, the PAC and the console on an address of this machine, for the owner of the tunnel alone:
// every other program on it could reach the cloud in his name. Requests in proxy form are carried byte for byte.
type Local struct {
	listener net.Listener
	at       netip.AddrPort
	keeper   *Keeper
	log      *slog.Logger
	owners   *owners // nil: the kernel does not tell; the credential decides
	asked    bool    // the credential decides, whoever it is
	login    string  // "vpn:secret" in base64
	url      string  // of the proxy, for the owner
	spares   *spares
}

// newLocal serves l. With asked, every request must carry the credential, whoever sends it; else it must where the system does
// not tell whose connection it is.
func newLocal(l net.Listener, k *Keeper, asked bool) *Local {
	secret := make([]byte, 16)
	rand.Read(secret)
	login := loginName + ":" + fmt.Sprintf("%x", secret)
	s := &Local{listener: l, at: l.Addr().(*net.TCPAddr).AddrPort(), keeper: k, log: k.Log,
		login: base64.StdEncoding.EncodeToString([]byte(login)), url: "http://" + login + "@" + l.Addr().String(), asked: asked}
	s.spares = &spares{early: k.early, dial: func(ctx context.Context, first []byte) (net.Conn, error) {
		proxy, _ := k.addresses()
		return k.Dial(ctx, proxy, first)
	}}
	var err error
	s.owners, err = newOwners()
	if asked {
		return s
	}
	if err == nil {
		err = s.tryOwners()
	}
	if err != nil {
		s.log.Warn("the local listener asks for its credential: `vpn env` has it", "error", err)
		s.owners = nil
		return s
	}
	s.url = "http://" + s.at.String()
	return s
}

// tryOwners finds out on a connection of our own whether the kernel tells whose it is: some have no sock_diag.
func (s *Local) tryOwners() error {
	near, err := net.DialTimeout("tcp4", s.at.String(), time.Second)
	if err != nil {
		return err
	}
	defer near.Close()
	for {
		far, err := s.listener.Accept()
		if err != nil {
			return err
		}
		defer far.Close()
		if far.RemoteAddr().String() != near.LocalAddr().String() {
			continue // somebody was faster, and may come again
		}
		uid, err := s.owners.of(far.(*net.TCPConn))
		if err == nil && uid != os.Getuid() {
			err = fmt.Errorf("the kernel says %d of user %d", uid, os.Getuid())
		}
		return err
	}
}

// run serves until ctx ends, and then cuts what is left.
func (s *Local) run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	defer s.spares.close()
	if s.owners != nil {
		defer s.owners.close()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { s.listener.Close() })
	defer stop()
	slots, strangers, guests := make(chan struct{}, localConnections), make(chan struct{}, localStrangers), make(chan struct{}, localGuests)
	for {
		c, err := s.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // of descriptors, mostly
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-ctx.Done():
				return
			}
		}
		in := c.(*net.TCPConn)
		known, room := false, slots
		answer := func() { s.serve(ctx, in, known) }
		if s.owners != nil {
			uid, err := s.owners.of(in)
			switch mine := uid == os.Getuid(); {
			case err != nil:
			case mine:
				known = !s.asked
			case s.asked: // a program that changed its user, or somebody who only keeps the owner's places
				room = guests
			default:
				refuse := fmt.Sprintf("this is the tunnel of user %d, and of nobody else on this machine\n", os.Getuid())
				s.log.Debug("a stranger at the local listener", "uid", uid)
				room, answer = strangers, func() { respond(in, http.StatusForbidden, refuse) }
			}
		}
		select {
		case room <- struct{}{}:
		default:
			in.Close()
			continue
		}
		all.Go(func() {
			defer func() { <-room }()
			defer in.Close()
			defer context.AfterFunc(ctx, func() { in.Close() })()
			answer()
		})
	}
}

// serve answers one connection. Known: it is its owner's.
func (s *Local) serve(ctx context.Context, in *net.TCPConn, known bool) {
	in.SetReadDeadline(time.Now().Add(localHead))
	q, err := readRequest(in)
	in.SetReadDeadline(time.Time{})
	var login string
	if err == nil {
		login = q.authorization
		if !q.proxied {
			login = q.login("authorization")
		}
	}
	switch {
	case errors.Is(err, errHeadLarge):
		respond(in, http.StatusRequestHeaderFieldsTooLarge, err.Error()+"\n")
	case err != nil && hungUp(err):
	case err != nil:
		respond(in, http.StatusBadRequest, err.Error()+"\n")
	case !known && !s.knows(login):
		refuse, challenge := http.StatusProxyAuthRequired, "Proxy-Authenticate"
		if !q.proxied {
			refuse, challenge = http.StatusUnauthorized, "WWW-Authenticate"
		}
		respond(in, refuse, "the tunnel is for who raised it: `vpn env` prints the credential\n", challenge+`: Basic realm="vpn"`)
	case q.method == http.MethodConnect:
		s.connect(ctx, in, q)
	case q.proxied:
		s.carry(ctx, in, q)
	default:
		s.page(ctx, in, q)
	}
}

// knows compares a Basic credential (RFC 7617).
func (s *Local) knows(authorization string) bool {
	scheme, login, _ := strings.Cut(authorization, " ")
	return strings.EqualFold(scheme, "Basic") && subtle.ConstantTimeCompare([]byte(strings.TrimSpace(login)), []byte(s.login)) == 1
}

// carry hands a request and all that follows to the bastion's proxy, and the other way round. It might be done twice if it left with
// the first packet of its connection, as a CONNECT does, and waits.
func (s *Local) carry(ctx context.Context, in *net.TCPConn, q *request) {
	dialing, cancel := context.WithTimeout(ctx, carryPatience)
	out, err := s.spares.take(dialing, nil)
	cancel()
	if err != nil {
		s.fail(in, err)
		return
	}
	defer out.Close()
	defer context.AfterFunc(ctx, func() { cut(out) })()
	if _, err := out.Write(append(q.head, q.rest...)); err != nil {
		s.fail(in, fmt.Errorf("the bastion's proxy: %w", err))
		return
	}
	relay(in, out)
}

func (s *Local) fail(in net.Conn, err error) {
	status := http.StatusBadGateway
	var no unavailable
	if errors.As(err, &no) {
		status = http.StatusServiceUnavailable
	}
	respond(in, status, "vpn: "+err.Error()+"\n")
}

// page serves the console, which knows the session by its address and trusts whoever asks from there. So what a web page of
// somebody else's makes a browser send is refused: it comes by another name, or from another origin.
func (s *Local) page(ctx context.Context, in *net.TCPConn, q *request) {
	names := []string{s.at.String(), fmt.Sprintf("localhost:%d", s.at.Port())}
	if !slices.Contains(names, q.host) {
		respond(in, http.StatusMisdirectedRequest, "ask by address: http://"+s.at.String()+"/\n")
		return
	}
	in.SetReadDeadline(time.Now().Add(localHead))
	req, err := http.ReadRequest(bufio.NewReader(io.MultiReader(bytes.NewReader(q.head), bytes.NewReader(q.rest), in)))
	if err != nil {
		respond(in, http.StatusBadRequest, "this is no request\n")
		return
	}
	origin, site := req.Header.Get("Origin"), req.Header.Get("Sec-Fetch-Site")
	if origin != "" && origin != "http://"+q.host || site != "" && site != "none" && site != "same-origin" {
		respond(in, http.StatusForbidden, "another site's page asked for this\n")
		return
	}
	_, console := s.keeper.addresses()
	if !console.IsValid() {
		respond(in, http.StatusServiceUnavailable, "vpn: the tunnel is not up, or has no console\n")
		return
	}
	there := strings.TrimSuffix(console.String(), ":80")
	req.URL.Scheme, req.URL.Host, req.Host, req.RequestURI = "http", there, there, ""
	if origin != "" {
		req.Header.Set("Origin", "http://"+there)
	}
	for _, h := range []string{"Referer", "Authorization", "Connection"} { // of this address, and none of the console's
		req.Header.Del(h)
	}
	req.Body = http.MaxBytesReader(nil, req.Body, localBody)
	ctx, cancel := context.WithTimeout(ctx, localPatience)
	defer cancel()
	t := &http.Transport{DisableKeepAlives: true, DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return s.keeper.Dial(ctx, console, nil)
	}}
	resp, err := t.RoundTrip(req.WithContext(ctx))
	if err != nil {
		s.fail(in, err)
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, localPage+1))
	if err == nil && len(body) > localPage {
		err = fmt.Errorf("the console's answer is longer than %d bytes", localPage)
	}
	if err != nil {
		s.fail(in, err)
		return
	}
	if resp.Header.Get("Content-Type") == pacType {
		proxy, _ := s.keeper.addresses()
		body = bytes.ReplaceAll(body, fmt.Appendf(nil, `"PROXY %v"`, proxy), fmt.Appendf(nil, `"PROXY %v"`, s.at))
	}
	resp.Body, resp.ContentLength, resp.TransferEncoding, resp.Close = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil, true
	resp.Header.Del("Content-Length")
	in.SetWriteDeadline(time.Now().Add(localHead))
	resp.Write(in)
}

// pacType is that of a proxy configuration.
const pacType = "application/x-ns-proxy-autoconfig"

// respond ends a connection with an answer.
func respond(c net.Conn, status int, text string, headers ...string) {
	var b strings.Builder
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\nContent-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\nConnection: close\r\n", status, http.StatusText(status))
	for _, h := range headers {
		b.WriteString(h + "\r\n")
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", len(text), text)
	lastWord(c, []byte(b.String()))
}

// lastWord ends a connection with a word. What the client still sends is read for a moment: a reset would take the word away.
func lastWord(c net.Conn, word []byte) {
	c.SetDeadline(time.Now().Add(localLinger))
	if _, err := c.Write(word); err != nil {
		return
	}
	if half, ok := c.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		io.Copy(io.Discard, io.LimitReader(c, 1<<20))
	}
}
