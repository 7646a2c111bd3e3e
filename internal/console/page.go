package console

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"golang.org/x/net/netutil"

	"perimeterd/internal/session"
	"perimeterd/proxy"
)

// Bounds of the page's server.
const (
	pageConnections = 256 // of all sessions; more wait in the listener's queue
	pageTimeout     = 10 * time.Second
	pageHead        = 16 << 10
)

// Page is what a session sees on the tunnel address: its proxy configuration, /proxy.pac. Who asks is known by the
// source address, which WireGuard binds to one session.
type Page struct {
	At       netip.AddrPort // the page's own address
	Proxy    netip.AddrPort
	Sessions interface {
		ByAddress(netip.Addr) (session.Session, bool)
	}
	Policy func() *proxy.Policy // the one in force
	Log    *slog.Logger
}

// Listen opens the page's port.
func (p *Page) Listen(ctx context.Context) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", p.At.String())
	if err != nil {
		return nil, fmt.Errorf("console.port %d: %w: choose another, or stop the program that has it on %v", p.At.Port(), err, p.At.Addr())
	}
	return l, nil
}

// Run serves l until ctx ends.
func (p *Page) Run(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler: p.handler(), ReadTimeout: pageTimeout, WriteTimeout: pageTimeout, MaxHeaderBytes: pageHead,
		ErrorLog: slog.NewLogLogger(p.Log.Handler(), slog.LevelDebug),
	}
	// One request a connection: none outlives the session that it came from by more than a moment.
	srv.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(netutil.LimitListener(l, pageConnections)); ctx.Err() == nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("console.port %d: %w", p.At.Port(), err)
	}
	return nil
}

func (p *Page) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /proxy.pac", p.pac)
	// The address alone lets in, so a name that somebody else's page leads here must not (DNS rebinding).
	hosts := []string{p.At.String()}
	if p.At.Port() == 80 {
		hosts = append(hosts, p.At.Addr().String())
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		if !slices.Contains(hosts, r.Host) {
			http.Error(w, "ask by address: http://"+p.At.String()+"/", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func (p *Page) pac(w http.ResponseWriter, r *http.Request) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s, ok := p.Sessions.ByAddress(from.Addr().Unmap())
	if !ok {
		http.Error(w, proxy.NoSession.Sentence(), http.StatusForbidden)
		return
	}
	body := p.Policy().PAC(s.User, s.Groups, p.Proxy)
	w.Header().Set("Content-Type", "application/x-ns-proxy-autoconfig")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}
