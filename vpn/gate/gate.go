// Package gate is the server's side of a session: the mutual TLS API that makes sessions out of certificates, and the
// WireGuard device whose peers follow the sessions.
//
// Nobody reaches it without an open window, and nobody passes TLS without a certificate of the gate's CA that states
// clientAuth and belongs to a known user; every request checks that again. What is left to an outsider inside a window is
// Go's TLS stack, with few connections and seconds to use them.
package gate

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"perimeterd/internal/identity"
	"perimeterd/internal/quota"
	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// Timeouts of the API: its requests and answers are single small segments.
const (
	handshakeTimeout = 5 * time.Second // net/http bounds the TLS handshake by it too
	requestTimeout   = 10 * time.Second
	idleTimeout      = 30 * time.Second
	maxHeader        = 8 << 10
	lastRequests     = time.Second // at the end
)

// Verifier says who a connection's certificate stands for, or an *identity.Refusal. TLSConfig refuses the same at the
// handshake already.
type Verifier interface {
	TLSConfig(server tls.Certificate) *tls.Config
	Identify(tls.ConnectionState) (identity.Identity, error)
}

// Gate serves the session API.
type Gate struct {
	cfg       Config
	serverKey [32]byte // WireGuard, public
	cert      atomic.Pointer[tls.Certificate]
	verifier  Verifier
	store     session.Store
	tunnel    *Tunnel
	pool      *vpn.Pool
	log       *slog.Logger
	lines     *quota.Quota[string] // of refused requests, by user

	begin   sync.Mutex // limits and addresses are judged and taken in one step
	pace    pace
	known   func(netip.Addr) bool
	callers *callers
	streams *streams
	count   func(code string)
	watch   func(Refusal)

	connections func(session.ID) int
	rest        sync.Mutex
	ended       map[session.ID]session.Session // whose address is still somewhere in use

	renewals Renewals
	renewed  pace
}

// New wires a gate. The store's watchers must include tunnel.SessionEvent before the first request. Known tells sources that
// hold a window opened by a token, for whom part of the handshakes is reserved.
func New(cfg Config, known func(netip.Addr) bool, serverKey [32]byte, cert tls.Certificate, v Verifier, store session.Store, tunnel *Tunnel, logger *slog.Logger) (*Gate, error) {
	if n := vpn.Size(cfg.Network); n < 2*cfg.Limit {
		return nil, fmt.Errorf("tunnel.network %v has %d addresses for session.limit %d; released ones rest for %v: "+
			"take a larger network or a limit of %d", cfg.Network, n, cfg.Limit, vpn.Quarantine, n/2)
	}
	g := &Gate{cfg: cfg, serverKey: serverKey, verifier: v, store: store, tunnel: tunnel, pool: vpn.NewPool(cfg.Network), log: logger, lines: quota.New[string](quota.Every, quota.Burst), count: func(string) {}, watch: func(Refusal) {},
		pace: pace{next: map[[32]byte]time.Time{}}, renewed: pace{next: map[[32]byte]time.Time{}}, known: known, callers: &callers{by: map[*counted]caller{}},
		streams:     &streams{by: map[session.ID]*stream{}},
		connections: func(session.ID) int { return 0 }, ended: map[session.ID]session.Session{}}
	g.cert.Store(&cert)
	released, err := store.Released()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	for _, r := range released {
		g.pool.Rest(r.Address, owner(r.User, r.Device), now.Add(-r.Ago))
	}
	for _, s := range store.List() {
		g.pool.Hold(s.Address, owner(s.User, s.Device))
	}
	return g, nil
}

// Present makes the gate show another certificate from now on.
func (g *Gate) Present(cert tls.Certificate) { g.cert.Store(&cert) }

// Count makes fn hear of every request: the code of its refusal, or "". It must be called before Run.
func (g *Gate) Count(fn func(code string)) { g.count = fn }

// Track makes the address of an ended session wait for its quarantine until connections, which counts a session's proxied
// connections, says 0. It must be called before the first event.
func (g *Gate) Track(connections func(session.ID) int) { g.connections = connections }

// SessionEvent gives back the address of a session that ended, and resets the connections of a caller who was thrown out. It is
// a session.Store watcher; what uses the address must hear of the end before.
func (g *Gate) SessionEvent(e session.Event) {
	if e.Ended == "" {
		return
	}
	g.rest.Lock()
	g.ended[e.Session.ID] = e.Session
	g.rest.Unlock()
	g.release(time.Now())
	g.streams.cut(e.Session.ID)
	switch e.Ended { // else the request that ended it waits for its answer
	case session.Revoked, session.Kicked, session.Expired:
		g.callers.cut(func(who caller) bool { return who.certificate == e.Session.Certificate })
	}
}

// release begins the quarantine of addresses that nothing uses any more.
func (g *Gate) release(now time.Time) {
	g.rest.Lock()
	defer g.rest.Unlock()
	for id, s := range g.ended {
		if g.connections(id) == 0 {
			g.pool.Release(s.Address, now)
			delete(g.ended, id)
		}
	}
}

// CutRefused resets the connections of callers who would not be let in any more.
func (g *Gate) CutRefused() {
	g.callers.cut(func(who caller) bool {
		_, err := g.verifier.Identify(who.state)
		return err != nil
	})
}

// Run serves on listeners until ctx ends.
func (g *Gate) Run(ctx context.Context, listeners ...net.Listener) error {
	// Made for each handshake: certificate and authorities may be others by then.
	current := func() *tls.Config {
		c := g.verifier.TLSConfig(*g.cert.Load())
		c.NextProtos = []string{"http/1.1"}
		c.SessionTicketsDisabled = true // over TCP they save no round trip, and resumption would skip checks
		return c
	}
	config := current()
	few := &fewLines{log: g.log, limit: rate.NewLimiter(1, 20), watch: g.watch}
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		// For who is refused, and where he comes from, in one line.
		c := current()
		c.VerifyConnection = func(cs tls.ConnectionState) error {
			id, err := g.verifier.Identify(cs)
			if c, ok := hello.Conn.(*counted); ok && err == nil {
				g.callers.note(c, caller{id.Certificate, cs})
			}
			var refusal *identity.Refusal
			if errors.As(err, &refusal) {
				id := refusalID()
				g.watch(Refusal{ID: id, Stage: Certificate, User: refusal.User, Source: addrPort(hello.Conn.RemoteAddr()).String(), Code: string(refusal.Code), Text: refusal.Text})
				few.line(slog.LevelInfo, "certificate refused", "id", id, "user", refusal.User, "source", addrPort(hello.Conn.RemoteAddr()), "reason", refusal.Code, "err", refusal.Text)
			}
			return err
		}
		return c, nil
	}
	var open atomic.Int64 // connections
	srv := &http.Server{
		Handler:           g.routes(),
		ReadHeaderTimeout: handshakeTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(few, "", 0),
		ConnState: func(c net.Conn, s http.ConnState) {
			switch finished(c, s); s {
			case http.StateNew:
				open.Add(1)
			case http.StateHijacked, http.StateClosed:
				open.Add(-1)
			}
		},
	}
	srv.Protocols = new(http.Protocols)
	srv.Protocols.SetHTTP1(true)
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- srv.Serve(tls.NewListener(newCapped(l, g.known, g.callers), config)) }()
	}
	defer g.streams.close()
	defer srv.Close()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			// Not by Shutdown, which drops a request that comes on a connection accepted before.
			for _, l := range listeners {
				l.Close()
			}
			for range listeners {
				<-failed // and what it accepted last is counted
			}
			srv.SetKeepAlivesEnabled(false)
			for until := time.Now().Add(lastRequests); open.Load() > 0 && time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
			}
			return nil
		case now := <-tick.C:
			g.release(now)
		case err := <-failed:
			return fmt.Errorf("gate: %w", err)
		}
	}
}

func (g *Gate) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(vpn.SessionPath, g.method(map[string]handler{http.MethodPost: g.post, http.MethodGet: g.list}))
	mux.Handle(vpn.SessionPath+"/{id}", g.method(map[string]handler{http.MethodGet: g.get, http.MethodDelete: g.delete}))
	mux.Handle(vpn.SessionPath+"/{id}/wg-quick", g.method(map[string]handler{http.MethodGet: g.wgQuick}))
	mux.Handle(vpn.StreamPath, g.method(map[string]handler{http.MethodGet: g.stream}))
	mux.Handle(vpn.CertificatePath, g.method(map[string]handler{http.MethodPost: g.certificate}))
	mux.Handle("/", g.method(nil))
	return mux
}

// handler answers a request of an identified caller; a returned error becomes the answer.
type handler func(w http.ResponseWriter, r *http.Request, id identity.Identity) error

// method picks the handler of a request's method, after the certificate was checked again: a user may be revoked while
// his connection lives.
func (g *Gate) method(handlers map[string]handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		id, err := g.verifier.Identify(*r.TLS)
		if err == nil {
			err = g.strong(r)
		}
		if err == nil {
			g.used(id)
			switch h := handlers[r.Method]; {
			case h != nil:
				err = h(w, r, id)
			case handlers == nil:
				err = &vpn.APIError{Code: vpn.CodeNotFound, Message: fmt.Sprintf("no %q here", r.URL.Path), Fix: "see " + vpn.SessionPath}
			default:
				err = &vpn.APIError{Code: vpn.CodeMethod, Message: r.Method + " is not a method of " + r.URL.Path}
			}
		}
		if err != nil {
			g.refuse(w, r, id, err)
			return
		}
		g.count("")
	})
}

// refuse writes an error as JSON. What is not an APIError stays in the log: the caller learns that it failed, not how.
func (g *Gate) refuse(w http.ResponseWriter, r *http.Request, id identity.Identity, err error) {
	var api *vpn.APIError
	var refusal *identity.Refusal
	switch {
	case errors.As(err, &api):
	case errors.As(err, &refusal):
		api = &vpn.APIError{Code: vpn.CodeForbidden, Message: refusal.Error(), Fix: "ask the operator of this gate"}
		if refusal.Code == identity.RevokedCert {
			api.Code = vpn.CodeRevoked
		}
	default:
		api = &vpn.APIError{Code: vpn.CodeInternal, Message: "the gate failed", Fix: "ask its operator, whose log says why"}
	}
	g.count(api.Code)
	status := vpn.StatusOf(api.Code)
	refused := Refusal{ID: refusalID(), Stage: Request, User: id.User, Device: id.Device, Source: r.RemoteAddr, Method: r.Method, Path: r.URL.Path, Status: status, Code: api.Code, Text: err.Error()}
	if refusal != nil {
		refused.User = refusal.User
	}
	g.watch(refused)
	if left, ok := g.lines.Take(refused.User, time.Now()); ok {
		args := []any{"id", refused.ID, "user", refused.User, "source", r.RemoteAddr, "method", r.Method, "path", r.URL.Path, "status", status, "code", api.Code, "err", err}
		if left.Count > 0 {
			args = append(args, "left_out", left.Count)
		}
		g.log.Info("request refused", args...)
	}
	w.Header().Set("Content-Type", "application/json")
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", strconv.Itoa(max(api.RetryAfter, 1)))
	}
	if status == http.StatusRequestEntityTooLarge || status == http.StatusBadRequest {
		w.Header().Set("Connection", "close")
	}
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(vpn.ErrorReply{Error: api}) // an error here is the caller's connection, which is his
}

// outer is where a request came from.
func outer(r *http.Request) netip.AddrPort {
	p, _ := netip.ParseAddrPort(r.RemoteAddr)
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
