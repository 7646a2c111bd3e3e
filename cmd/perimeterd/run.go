package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/console"
	"perimeterd/internal/control"
	"perimeterd/internal/event"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/internal/systemd"
	"perimeterd/proxy"
	"perimeterd/vpn/gate"
)

func newRunCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Run the daemon in the foreground",
		Long: `Examples:
  perimeterd run
  perimeterd run --config /srv/bastion/perimeterd.toml

SIGHUP reads the configuration again, as perimeterd apply does; what is wrong there changes nothing. SIGTERM stops the daemon: the door stays closed,
open windows expire on time, sessions come back with the next start.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			return run(cmd.Context(), cfg)
		},
	}
}

// run wires every part: load, build, one errgroup, ready. What fails before ready leaves the door closed.
func run(ctx context.Context, cfg *configs.Config) (err error) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	hup := make(chan os.Signal, 1) // from the first moment, or one that comes early would end the daemon
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	said := newLines(os.Stderr)
	defer said.Flush()
	log := newLog(cfg.Log, said)
	service, err := systemd.Connect() // before any child, which must not inherit what is stored
	if err != nil {
		return err
	}
	limitMemory(log)
	// While this process is still root's: a signer of its own becomes another user.
	sign := newSigner(cfg, "--renewals")
	defer sign.Close()
	if err := sign.Connect(); err != nil && !cfg.Identity.External() {
		log.Warn("no certificate can be renewed", "err", err)
	}
	gid, err := daemonGroup()
	if err != nil {
		return err
	}
	keys, err := loadKeys(cfg.Identity)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return err
	}
	db, err := identity.OpenState(cfg.StateFile())
	if err != nil {
		return err
	}
	defer db.Close()
	trail := beginTrail(cfg, log)
	defer func() { trail.end(err) }()
	users, meta := identity.NewUsers(db), identity.NewMeta(db)
	if cfg, err = lastGood(cfg, meta, log); err != nil {
		return err
	}
	store, err := session.OpenBolt(db, time.Now())
	if err != nil {
		return err
	}
	store.Watch(trail.session)
	verifier, err := newVerifier(cfg.Identity, users)
	if err != nil {
		return err
	}
	// A daemon that was killed in the middle of a revocation left sessions that nobody else would end; before anything holds
	// their addresses.
	if err := endRefused(store, verifier, log); err != nil {
		return err
	}

	registry := prometheus.NewRegistry()
	metrics, err := console.NewMetrics(registry, version(), time.Now())
	if err != nil {
		return err
	}

	// The ports before the table, which would take them from a program that has one of them. Until the table is there the
	// gate's sockets are deaf.
	var gates []net.Listener
	for _, address := range cfg.Gate.Listen {
		l, err := listenGate(ctx, service, address)
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) {
			return fmt.Errorf("gate.listen %q: %w: nothing was changed on this host; run it as root", address, err)
		}
		if err != nil {
			return fmt.Errorf("gate.listen %q: %w: nothing was changed on this host; stop the program that has the port, or choose another", address, err)
		}
		defer l.Close()
		gates = append(gates, l)
	}
	if err := free(cfg.Gate); err != nil {
		return err
	}

	// The door before everything behind it: nothing of ours is reachable without a knock.
	door := firewall.New(log, 0)
	door.Count(metrics)
	names := &credentials{users: users, meta: meta, master: keys.master[:]}
	table, err := tableConfig(cfg, names, gid, log)
	if err != nil {
		return err
	}
	fresh, err := door.Apply(table)
	if err != nil {
		return err
	}
	tokens, err := firewall.NewTokens(door, fresh, keys.serverID, table.Step, meta, log)
	if err != nil {
		return err
	}
	access := &access{cfg: cfg, gid: gid, names: names, door: door, tokens: tokens, log: log}
	if err := errors.Join(access.loadTokens(), access.closeStale(table)); err != nil {
		return err
	}
	// Without knock.tokens nothing is ever loaded; who may knock is still followed, for the windows of those who are out.
	refill := func(bool) error { return nil }
	if cfg.Knock.Tokens {
		if err := tokens.Refresh(time.Now()); err != nil {
			return err
		}
		refill = func(lost bool) error { return tokens.Reload(lost, time.Now()) }
	}

	tunnel, err := gate.OpenTunnel(cfg.Gate, keys.wireguard, door, log)
	if err != nil {
		return err
	}
	defer tunnel.Close()
	api, err := gate.New(cfg.Gate, door.TokenWindow, keys.wireguardPublic, keys.gate, verifier, store, tunnel, log)
	if err != nil {
		return err
	}
	if !cfg.Identity.External() {
		api.RenewBy(gate.Renewals{Signer: sign, Users: users, CA: cfg.Identity.CA, Tell: trail.renewal})
	}
	if err := reserve(api, users); err != nil {
		return err
	}
	forward, err := proxy.New(cfg.Proxy, store, log)
	if err != nil {
		return err
	}
	api.Count(metrics.GateRequest)
	api.Track(forward.Connections)
	api.Watch(trail.refusal)
	forward.Watch(metrics.Access)
	forward.Watch(trail.access)
	forward.WatchTraffic(metrics.Traffic)
	observed := new(proxy.Observed)
	forward.Watch(observed.Access)
	var squid *proxy.SquidLog
	if path := cfg.Log.SquidAccessLog; path != "" {
		if squid, err = proxy.OpenSquidLog(path, log); err != nil {
			return err
		}
		defer squid.Close()
		forward.Watch(squid.Access)
	}
	if err := metrics.Ask(console.Sources{Sets: door, Owned: door.Owned, Pending: tunnel.Pending, Connections: forward.Live, AuditLost: trail.Lost}); err != nil {
		return err
	}
	if cfg.Identity.External() {
		if err := metrics.AskAuthority(console.Authority{CRLs: verifier.CRLs, Problems: func() int { return len(verifier.Problems()) }}); err != nil {
			return err
		}
	}
	if err := tunnel.Resume(store.List(), time.Now()); err != nil {
		return err
	}
	// The order of an end: the tunnel carries no more, the proxy resets what it has open, then the address may rest.
	store.Watch(tunnel.SessionEvent)
	store.Watch(forward.SessionEvent)
	store.Watch(api.SessionEvent)
	store.Watch(metrics.SessionEvent)
	seen := identity.NewSeen(db, log)
	store.Watch(noteSeen(seen))
	store.Watch(func(e session.Event) {
		if e.Ended != "" {
			log.Info("session ended", "session", e.Session.ID, "user", e.Session.User, "device", e.Session.Device, "reason", e.Ended)
		}
	})

	inner, err := listenProxy(ctx, service, cfg.Proxy.Listen)
	if err != nil {
		return err
	}
	if err := handTunnels(service, forward); err != nil {
		return err
	}
	orphans, err := door.Connections(cfg.Proxy.Listen)
	if err != nil {
		log.Warn("clients of an earlier run are not told that their connections are gone", "err", err)
	}

	page := &console.Page{At: cfg.Gate.Console, Proxy: cfg.Proxy.Listen, Sessions: store, Policy: forward.Policy, Log: log}
	pageListener, err := service.Listen("page", page.At.String(), net.FileListener, func() (net.Listener, error) { return page.Listen(ctx) })
	if err != nil {
		return err
	}
	if left, err := service.Sweep(); err != nil || len(left) > 0 {
		log.Info("stored by an earlier run, of no use now", "descriptors", left, "err", err)
	}

	changes := &changes{log: log, meta: meta, door: access, good: cfg, tell: trail.configuration, rest: func(c *configs.Config) error { return forward.Reload(c.Proxy) }, service: service}
	operations := &control.Operations{Users: users, Sessions: store, Now: time.Now, Log: log,
		UserChanged: func(name string) error {
			defer api.CutRefused()
			return errors.Join(reserve(api, users), access.userChanged(name))
		},
		Status:        statusOf(access.config, door, observed, changes.problems, verifier.Problems, trail.problems),
		Configuration: changes,
		Snapshot:      db.Snapshot,
		Listed:        verifier.Listed,
		Forget:        sign.Forget,
		Authority:     func() error { return takeUpAuthority(cfg.Identity, api, verifier, users, store, log) },
		Audit:         trail.Add,
		Refused:       trail.AddRefused,
		AuditDir:      cfg.AuditDir(),
		Feed:          trail.Feed,
		Decide:        decider(access.config, forward.Policy, users.Get, verifier.Listed),
	}
	if cfg.Identity.External() {
		operations.Forget = nil // nothing is renewed here
	}

	events := event.NewLog(log, event.StrangerLimits())
	g, ctx := errgroup.WithContext(ctx)
	context.AfterFunc(ctx, func() { _ = service.Stopping() })
	context.AfterFunc(ctx, trail.Feed.End) // who follows it would keep the control socket from closing
	observing, operating := make(chan struct{}), make(chan struct{})
	g.Go(func() error {
		tell := func(e event.Event) {
			written := events.Add(e)
			if metrics.Event(e, written); written {
				trail.event(e)
			}
		}
		return door.Observe(ctx, table.LogGroup, observing, func(o firewall.Opening) {
			tell(event.Event{Kind: event.Opened, Source: o.Source, Port: o.Port, User: names.name(o.Credential), Sequence: o.Sequence, For: access.config().Knock.Window, At: o.At})
		}, func(r firewall.Refusal) {
			tell(event.Event{Kind: event.Kind(r.Kind), Source: r.Source, Port: r.Port, Sequence: r.Sequence, At: r.At})
		})
	})
	g.Go(func() error { return events.Run(ctx) })
	g.Go(func() error { return seen.Run(ctx) })
	g.Go(func() error { return console.NewAlarm(door, log).Run(ctx) })
	if cfg.Console.Metrics != "" {
		g.Go(func() error { return console.Serve(ctx, cfg.Console.Metrics, registry) })
	}
	g.Go(func() error { return door.Watch(ctx, refill) })
	g.Go(func() error { return door.Forget(ctx) })
	if cfg.Knock.Tokens {
		g.Go(func() error { return tokens.Run(ctx) })
	}
	g.Go(func() error { return tunnel.Run(ctx, store.Note) })
	g.Go(func() error { return cutOrphans(ctx, tunnel.Begun(), cfg.Proxy.Listen, orphans, log) })
	g.Go(func() error { return tunnel.WriteStatus(ctx, cfg.Gate.StatusFile) })
	g.Go(func() error { return api.Run(ctx, gates...) })
	g.Go(func() error { return forward.Run(ctx, inner) })
	g.Go(func() error { return page.Run(ctx, pageListener) })
	if squid != nil {
		g.Go(func() error { return reopenSquidLog(ctx, squid, log) })
	}
	g.Go(func() error { return expire(ctx, store) })
	g.Go(func() error { return followAuthority(ctx, store, verifier, log) })
	g.Go(func() error { return settle(ctx, users, log) })
	g.Go(func() error {
		return control.Serve(ctx, cfg.ControlSocket(), control.Handler(operations), func() { close(operating) })
	})
	g.Go(func() error {
		return control.ServeReaders(ctx, cfg.ControlSocket(), control.ReadersHandler(operations))
	})
	g.Go(func() error { return changes.Run(ctx, hup) })
	g.Go(func() error {
		for _, part := range []chan struct{}{observing, operating} {
			select {
			case <-part:
			case <-ctx.Done():
				return nil
			}
		}
		parts := vitalParts(cfg, gates, inner, door, tunnel, store)
		if err := systemd.Ask(ctx, startPatience, parts...); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("not every part serves: %w", err)
		}
		log.Info("ready", "endpoint", cfg.Gate.Endpoint, "gate", cfg.Gate.Listen, "network", cfg.Gate.Network, "sessions", len(store.List()))
		if err := service.Ready(); err != nil {
			return err
		}
		return service.Watch(ctx, log, func() string {
			return statusLine(store.Len(), forward.Live(), changes.problems, verifier.Problems, trail.problems)
		}, parts...)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	log.Info("stopped: the door stays as closed as it was, open windows expire on time")
	return nil
}

// cutOrphans tells clients of an earlier run that their proxied connections are gone, once their tunnels have keys again, and
// once more a second later, for what was lost.
func cutOrphans(ctx context.Context, keys <-chan struct{}, at netip.AddrPort, clients []netip.AddrPort, log *slog.Logger) error {
	select {
	case <-ctx.Done():
		return nil
	case <-keys:
	}
	for range 2 {
		if err := proxy.CutOrphans(at, clients); err != nil {
			log.Warn("clients of an earlier run are not told that their connections are gone", "err", err)
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
	return nil
}

// free tells whether nobody else has the UDP port: WireGuard binds it on every address.
func free(cfg gate.Config) error {
	c, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(cfg.TunnelPort)})
	switch {
	case err == nil:
		return c.Close()
	case gate.HeldByUs(cfg):
		return nil
	}
	return fmt.Errorf("tunnel.port %d: %w: nothing was changed on this host; stop the program that has the port, or choose another", cfg.TunnelPort, err)
}

func newLog(c configs.Log, to io.Writer) *slog.Logger {
	o := &slog.HandlerOptions{Level: c.Level}
	if c.Format == "text" {
		return slog.New(slog.NewTextHandler(to, o))
	}
	return slog.New(slog.NewJSONHandler(to, o))
}

// expire ends sessions when their time comes, until ctx ends. The kernel's elements expire by themselves; this removes
// the peer and resets connections.
func expire(ctx context.Context, store session.Store) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			store.Expire(now.Round(0)) // the wall clock: certificates expire by it
		}
	}
}

func statusOf(config func() *configs.Config, door *firewall.Firewall, observed *proxy.Observed, problems ...func() []identity.Problem) func() control.Status {
	started := time.Now()
	return func() control.Status {
		cfg := config()
		s := control.Status{Version: version(), Started: started, Endpoint: cfg.Gate.Endpoint, Limit: cfg.Gate.Limit, Problems: []string{}}
		for _, p := range cfg.Egress.Public {
			s.Egress = append(s.Egress, p.String())
		}
		for _, of := range problems {
			for _, p := range of() {
				s.Problems = append(s.Problems, p.Text)
			}
		}
		if cfg.Proxy.Observe {
			s.Observed = observed.Most(20)
		}
		windows, err := door.Windows()
		if err != nil {
			s.Problems = append(s.Problems, err.Error())
		}
		s.Windows = len(windows)
		return s
	}
}
