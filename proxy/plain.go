package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/elazarl/goproxy"
)

const (
	plainIdle        = time.Minute // between two requests of a kept connection
	plainHeadTimeout = 5 * time.Minute
)

// plain serves absolute-form http requests and WebSocket with goproxy, behind net/http's server. Goproxy only transports:
// it gets a request that has been decided and a connection that has been dialed, and has no way to make another.
type plain struct {
	server  *Server
	http    *http.Server
	proxy   *goproxy.ProxyHttpServer
	conns   chan net.Conn
	stopped chan struct{}
	once    sync.Once
}

func newPlain(s *Server) *plain {
	p := &plain{server: s, conns: make(chan net.Conn), stopped: make(chan struct{})}
	p.http = &http.Server{
		Handler:           http.HandlerFunc(p.serve),
		ReadHeaderTimeout: headTimeout,
		IdleTimeout:       plainIdle,
		MaxHeaderBytes:    maxHead,
		ErrorLog:          log.New(debugWriter{s.log}, "", 0),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, plainConnKey{}, c)
		},
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				s.drop(c.(*plainConn).link, Closed)
			}
		},
	}
	p.proxy = goproxy.NewProxyHttpServer()
	p.proxy.Logger = log.New(debugWriter{s.log}, "", 0)
	p.proxy.KeepAcceptEncoding = true
	p.proxy.NonproxyHandler = http.NotFoundHandler()
	// As made, these two follow the environment's proxy variables, past every decision.
	p.proxy.ConnectDial = nil
	p.proxy.Tr = &http.Transport{
		// No connection serves a second request: it might be another user's.
		DisableKeepAlives:      true,
		DisableCompression:     true,
		ResponseHeaderTimeout:  plainHeadTimeout,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 256 << 10,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if x, ok := ctx.Value(exchangeKey{}).(*exchange); ok {
				if c := x.conn.Swap(nil); c != nil {
					return c, nil
				}
			}
			return nil, errors.New("no connection was dialed for this request")
		},
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("the proxy makes no TLS connections of its own")
		},
	}
	p.proxy.OnRequest().HandleConnect(goproxy.AlwaysReject) // none arrives here
	p.proxy.OnRequest().DoFunc(func(r *http.Request, ctx *goproxy.ProxyCtx) (*http.Request, *http.Response) {
		ctx.RoundTripper = goproxy.RoundTripperFunc(p.roundTrip)
		return r, nil
	})
	return p
}

type (
	plainConnKey struct{}
	exchangeKey  struct{}
)

// exchange is one request in goproxy's hands.
type exchange struct {
	conn   atomic.Pointer[countedConn]
	access *Access
	json   bool
	last   bool        // of its connection
	bad    atomic.Bool // the request's body ended with an error
	broken atomic.Bool // the answer's did
	bare   bool        // the origin switched protocols
}

func (p *plain) run() {
	p.http.Serve(listener{p})
}

func (p *plain) close() {
	p.once.Do(func() { close(p.stopped) })
	p.http.Close()
}

// take hands a link to net/http, with the head that was read and what followed.
func (p *plain) take(l *link, h head, src *source) {
	c := &plainConn{Conn: l.client, plain: p, link: l, pending: bytes.Clone(src.bytes())}
	src.release()
	select {
	case p.conns <- c:
	case <-p.stopped:
		p.server.drop(l, Shutdown)
	}
}

func (p *plain) serve(w http.ResponseWriter, r *http.Request) {
	s := p.server
	c := r.Context().Value(plainConnKey{}).(*plainConn)
	l, h := c.link, c.head
	a := s.begin(l, r.Method, r.RequestURI)
	// Where a chunked body ends is net/http's finding, and what follows would be read without our own look at it.
	last := h.chunked || h.upgrade
	refuse := func(err error) {
		status := s.settle(l, a, "", err)
		if status == 0 {
			panic(http.ErrAbortHandler)
		}
		body, kind := a.body(h.json)
		if last {
			w.Header().Set("Connection", "close")
		}
		w.Header().Set("Content-Type", kind)
		a.name(w.Header())
		w.WriteHeader(status)
		w.Write(body)
	}
	t, err := s.open(l, h, a)
	if err != nil {
		l.detach()
		refuse(err)
		return
	}
	x := &exchange{access: a, json: h.json, last: last}
	x.conn.Store(&countedConn{Conn: t.server, up: &t.up.moved, down: &t.down.moved})
	defer func() {
		if r.Context().Err() != nil {
			l.end(ClientReset)
		} else if x.broken.Load() {
			l.end(ServerReset) // a chunked answer would otherwise look whole
		}
		l.detach()
		if x.bare {
			// Goproxy leaves the client's side open.
			l.close()
		}
		a.Up, a.Down, a.End = t.up.moved.Load(), t.down.moved.Load(), l.why()
		s.account(t, 0)
		s.settleUp(t)
		s.done(a)
		if x.bare {
			s.links.remove(l)
		}
	}()
	if h.upgrade {
		c.bare.Store(true)
	}
	if r.Body != http.NoBody {
		r.Body = &watchedBody{r.Body, &x.bad}
	}
	cleanRequest(r, h.upgrade)
	// One canonical form for the origin too.
	r.URL.Host = a.Destination.String()
	r.Host = strings.TrimSuffix(r.URL.Host, ":80")
	p.proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x)))
}

// roundTrip is where goproxy would use its transport.
func (p *plain) roundTrip(r *http.Request, _ *goproxy.ProxyCtx) (*http.Response, error) {
	x := r.Context().Value(exchangeKey{}).(*exchange)
	resp, err := p.proxy.Tr.RoundTrip(r)
	upgrade := r.Header.Get("Upgrade") != ""
	if err == nil {
		switch {
		case resp.StatusCode == http.StatusProxyAuthRequired:
			// A browser would ask for a password and send it to the origin.
			err = errors.New("the origin asks for a proxy password")
		case resp.StatusCode == http.StatusSwitchingProtocols && !(upgrade && hasToken(resp.Header.Get("Upgrade"), "websocket")):
			err = errors.New("the origin switches protocols unasked")
		}
		if err != nil {
			resp.Body.Close()
		}
	}
	if err != nil {
		why := UpstreamFailed
		if x.bad.Load() {
			why, x.access.Decision.Allow = Malformed, false
		}
		x.access.Decision.Reason, x.access.Detail = why, err.Error()
		body, kind := x.access.body(x.json)
		resp = goproxy.NewResponse(r, kind, why.Status(), string(body))
		x.access.name(resp.Header)
		resp.Header.Set("Connection", "close")
	} else {
		resp.Header.Del(reasonHeader) // an origin does not speak for the proxy
		resp.Header.Del(idHeader)
	}
	x.access.Status = resp.StatusCode
	if x.bare = resp.StatusCode == http.StatusSwitchingProtocols; x.bare {
		return resp, nil
	}
	stripHops(resp.Header)
	if x.last {
		resp.Header.Set("Connection", "close")
	}
	resp.Body = &watchedBody{resp.Body, &x.broken}
	return resp, nil
}

// cleanRequest removes what concerns one hop only, and what the transport would add.
func cleanRequest(r *http.Request, upgrade bool) {
	stripHops(r.Header)
	if upgrade {
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "websocket")
	}
	if _, ok := r.Header["User-Agent"]; !ok {
		r.Header["User-Agent"] = nil
	}
}

func stripHops(h http.Header) {
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			h.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
		"Te", "Upgrade"} {
		h.Del(name)
	}
}

// plainConn shows net/http one request at a time, each head read strictly before: net/http never sees a head that parseHead
// has not.
type plainConn struct {
	net.Conn // the interface: a *net.TCPConn would lend its WriteTo, past Read
	plain    *plain
	link     *link
	bare     atomic.Bool // a WebSocket: bytes only
	head     head        // of the request being served
	pending  []byte      // read and not delivered
	given    int         // bytes of the coming head that are delivered already
	looked   int         // bytes of pending that headEnd has seen
	passed   int         // length of the coming head once it is known to be good
	body     int64       // bytes of the body still to come; negative: chunked, to the connection's end
}

func (c *plainConn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if c.bare.Load() || c.body != 0 {
		n, err := c.deliver(b)
		if c.body > 0 {
			c.body -= int64(n)
		}
		return n, err
	}
	if c.passed == 0 {
		if len(b) == 1 {
			// Net/http listens for one byte while a request is served, to learn whether the client is still there. The
			// head that it begins is judged when the rest is asked for.
			if len(c.pending) == 0 {
				if err := c.fill(); err != nil {
					return 0, err
				}
			}
			if c.given == 0 {
				c.given, b[0] = 1, c.pending[0]
				return 1, nil
			}
		}
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, c.pending[c.given:c.passed])
	if c.given += n; c.given == c.passed {
		c.pending = c.pending[c.passed:]
		c.given, c.passed, c.looked = 0, 0, 0
		if c.body = c.head.length; c.head.chunked {
			c.body = -1
		}
	}
	return n, nil
}

// Close implements net.Conn. A link that has ended is closed already, with its reset.
func (c *plainConn) Close() error {
	finish(c.link.client)
	return nil
}

// deliver gives bytes of a body, from pending first.
func (c *plainConn) deliver(b []byte) (int, error) {
	if c.body > 0 && int64(len(b)) > c.body && !c.bare.Load() {
		b = b[:c.body]
	}
	if rest := c.pending[c.given:]; len(rest) > 0 {
		n := copy(b, rest)
		c.pending, c.given = rest[n:], 0
		return n, nil
	}
	c.pending, c.given = nil, 0
	return c.Conn.Read(b)
}

// next collects a head and judges its form. A bad one is answered here, where no answer is under way any more.
func (c *plainConn) next() error {
	for timed := false; ; {
		n, err := headEnd(c.pending, c.looked)
		var h head
		if n > 0 {
			if h, err = parseHead(c.pending[:n]); err == nil && h.method == http.MethodConnect {
				return io.EOF // a tunnel begins on a connection of its own
			}
			// Net/http answers some targets by itself.
			if err == nil {
				_, err = h.destination()
			}
			if _, uerr := url.ParseRequestURI(h.target); err == nil && uerr != nil {
				err = errors.New("the target is not a URL")
			}
			if err == nil {
				c.head, c.passed = h, n
				return nil
			}
		}
		if err != nil {
			return c.refuse(h, err)
		}
		c.looked = len(c.pending)
		// Once, from the first byte on: a head that comes in drops is a head that does not come. Until then net/http's own
		// limit for a silent connection holds.
		if !timed && len(c.pending) > 0 {
			timed = true
			c.Conn.SetReadDeadline(time.Now().Add(headTimeout))
		}
		if err := c.fill(); timed && errors.Is(err, os.ErrDeadlineExceeded) {
			return c.refuse(h, err)
		} else if err != nil {
			return err
		}
	}
}

// refuse answers a head that net/http does not get to see, and ends the connection.
func (c *plainConn) refuse(h head, err error) error {
	s := c.plain.server
	s.refuse(c.link, s.begin(c.link, h.method, h.target), h, reasonOf(err), err)
	return io.EOF
}

func (c *plainConn) fill() error {
	var b [4096]byte
	n, err := c.Conn.Read(b[:])
	c.pending = append(c.pending, b[:n]...)
	if n > 0 {
		return nil
	}
	return err
}

// countedConn counts what goes through the server's side.
type countedConn struct {
	net.Conn
	up, down *atomic.Int64
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.down.Add(int64(n))
	return n, err
}

func (c *countedConn) Write(b []byte) (int, error) {
	// Before, or the answer may be there, and logged, sooner than the count.
	c.up.Add(int64(len(b)))
	n, err := c.Conn.Write(b)
	c.up.Add(int64(n - len(b)))
	return n, err
}

// watchedBody notices a body that breaks off.
type watchedBody struct {
	io.ReadCloser
	broken *atomic.Bool
}

func (w *watchedBody) Read(b []byte) (int, error) {
	n, err := w.ReadCloser.Read(b)
	if err != nil && err != io.EOF {
		w.broken.Store(true)
	}
	return n, err
}

// listener gives net/http the connections that turned out to be its own.
type listener struct{ *plain }

func (l listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.stopped:
		return nil, net.ErrClosed
	}
}

func (l listener) Close() error { return nil }

func (l listener) Addr() net.Addr { return &net.TCPAddr{} }

// debugWriter takes what libraries log: words of clients and origins, quoted.
type debugWriter struct{ log *slog.Logger }

func (w debugWriter) Write(b []byte) (int, error) {
	w.log.Debug("proxy: plain http", "said", quote(strings.TrimSpace(string(b))))
	return len(b), nil
}
