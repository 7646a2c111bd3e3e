package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/internal/systemd"
	"perimeterd/proxy"
	"perimeterd/vpn/gate"
)

// startPatience bounds how long the parts may take to say that they serve. It is below systemd's TimeoutStartSec.
const startPatience = 30 * time.Second

// listenGate opens a gate's listener, or takes up the one of before the restart: deaf without the table either way.
func listenGate(ctx context.Context, service *systemd.Manager, address string) (net.Listener, error) {
	adopt := func(f *os.File) (net.Listener, error) {
		raw, err := f.SyscallConn()
		if err != nil {
			return nil, err
		}
		if err := firewall.Interlock("", "", raw); err != nil {
			return nil, err
		}
		return net.FileListener(f)
	}
	l, err := service.Listen("gate", address, adopt, func() (net.Listener, error) {
		l, err := firewall.Listen(ctx, address)
		if err != nil {
			return nil, err
		}
		return l, nil
	})
	if err != nil {
		return nil, err
	}
	return systemd.NewAccepting(l), nil
}

func listenProxy(ctx context.Context, service *systemd.Manager, at netip.AddrPort) (net.Listener, error) {
	l, err := service.Listen("proxy", at.String(), proxy.Adopt, func() (net.Listener, error) { return proxy.Listen(ctx, at) })
	if err != nil {
		return nil, err
	}
	return systemd.NewAccepting(l), nil
}

// handTunnels has proxied connections outlive a restart, where somebody keeps them meanwhile.
func handTunnels(service *systemd.Manager, forward *proxy.Server) error {
	const in, out = "passage-in", "passage-out"
	a, b := service.Take(in), service.Take(out)
	if a != nil && b != nil {
		if p, err := proxy.OpenPassage(a, b); err == nil {
			forward.Hand(p)
			return nil
		}
	}
	for _, f := range []*os.File{a, b} { // what lies in them is reset with their end
		if f != nil {
			f.Close()
		}
	}
	if !service.Stores() {
		return nil
	}
	p, err := proxy.NewPassage()
	if err != nil {
		return err
	}
	near, far := p.Ends()
	if err := errors.Join(service.Drop(in), service.Drop(out), service.Store(in, near), service.Store(out, far)); err != nil {
		return err
	}
	forward.Hand(p)
	return nil
}

// vitalParts are those without which the daemon is of no use: one that hangs ends it, by the watchdog.
func vitalParts(cfg *configs.Config, gates []net.Listener, proxy net.Listener, door *firewall.Firewall, tunnel *gate.Tunnel, store session.Store) []systemd.Part {
	parts := []systemd.Part{
		{Name: "table", Alive: door.Alive},
		{Name: "tunnel", Alive: tunnel.Alive},
		{Name: "sessions", Alive: func(context.Context) error { store.Len(); return nil }},
		{Name: "control socket", Alive: func(ctx context.Context) error { return answers(ctx, cfg.ControlSocket()) }},
	}
	for _, l := range append(gates, proxy) {
		if a, ok := l.(*systemd.Accepting); ok {
			parts = append(parts, systemd.Part{Name: a.Addr().String(), Alive: a.Alive})
		}
	}
	return parts
}

// answers says whether the control socket does. A refusal, as when too many ask, is an answer.
func answers(ctx context.Context, socket string) error {
	_, err := control.NewClient(socket).Status(ctx)
	if errors.Is(err, control.ErrNotRunning) || ctx.Err() != nil {
		return err
	}
	return nil
}

// statusLine is what systemctl status shows.
func statusLine(sessions, connections int, problems ...func() []identity.Problem) string {
	line := fmt.Sprintf("%d sessions, %d proxied connections", sessions, connections)
	var all []string
	for _, of := range problems {
		for _, p := range of() {
			all = append(all, p.Text)
		}
	}
	if len(all) == 0 {
		return line
	}
	const most = 500 // characters, of a line
	last := []rune(strings.ToValidUTF8(all[len(all)-1], "?"))
	return fmt.Sprintf("%s, %d problems, the last: %s", line, len(all), string(last[:min(len(last), most)]))
}
