//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/internal/console"
	"perimeterd/internal/lab"
	"perimeterd/internal/lab/roster"
	"perimeterd/vpn/client"
)

const (
	gatePort = 1194 // TCP: the gate; UDP: tunnel and tokens
	window   = 2 * time.Second
	friends  = 20
)

// stage is a lab with a running daemon, an attacker, and friends who knock by token meanwhile, each at a host of his own.
type stage struct {
	*lab.Lab
	ctx      context.Context
	daemon   *lab.Daemon
	attacker *lab.Namespace
	spoofer  *lab.Spoofer // at the attacker
	honest   *lab.Spoofer // at the client: packets of its own addresses, in an order of ours
	friends  []*friend
	walkers  []netip.Addr // addresses of the client for whoever knocks
	walked   int
	ports    []uint16       // of the sequence
	crowd    *roster.Roster // whose tokens the attacks use up
	source   uint16
}

type friend struct {
	*lab.User
	addr netip.Addr
}

func newStage(ctx context.Context) (_ *stage, err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return nil, err
	}
	s := &stage{Lab: l, ctx: ctx, source: 20000}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if s.daemon, err = l.NewDaemon(ctx, lab.Setting{Key: "window", Value: strconv.Quote(window.String())},
		lab.Setting{Key: "metrics", Value: `"127.0.0.1:9617"`}); err != nil {
		return nil, err
	}
	if err := s.addFriends(); err != nil {
		return nil, err
	}
	if s.crowd, err = roster.New(s.daemon, 200); err != nil {
		return nil, err
	}
	for _, p := range s.crowd.Config.Firewall.Sequences[0].Ports { // all TCP: init drew them
		s.ports = append(s.ports, p.Number)
	}
	if err := s.daemon.Start(ctx); err != nil {
		return nil, err
	}
	if s.walkers, err = l.Strangers(ctx, 1024); err != nil {
		return nil, err
	}
	if s.attacker, err = l.AddHost(ctx, "attacker"); err != nil {
		return nil, err
	}
	// What the bastion answers to a spoofed source goes the way to the internet, and is lost there.
	if out, err := l.Bastion.Command(ctx, "ip", "route", "add", "default", "via", s.attacker.Addr.String()).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("route: %w: %s", err, out)
	}
	if s.spoofer, err = l.NewSpoofer(s.attacker); err != nil {
		return nil, err
	}
	s.honest, err = l.NewSpoofer(l.Client)
	return s, err
}

// addFriends enrols them, with profiles that lack the sequence, so that only a token can open.
func (s *stage) addFriends() error {
	for i := range friends {
		profile, err := s.daemon.AddUser(s.ctx, fmt.Sprintf("friend%d", i))
		if err != nil {
			return err
		}
		text, err := os.ReadFile(profile)
		if err != nil {
			return err
		}
		var p client.Profile
		if err := toml.Unmarshal(text, &p); err != nil {
			return err
		}
		p.Sequence = nil
		if text, err = toml.Marshal(p); err != nil {
			return err
		}
		if err := os.WriteFile(profile, text, 0o600); err != nil {
			return err
		}
		host, err := s.AddHost(s.ctx, fmt.Sprintf("friend%d", i))
		if err != nil {
			return err
		}
		u, err := s.NewUser(s.ctx, host, profile)
		if err != nil {
			return err
		}
		s.friends = append(s.friends, &friend{u, host.Addr})
	}
	return nil
}

// walker is an address of the client that has not knocked for long.
func (s *stage) walker() netip.Addr {
	s.walked++
	return s.walkers[s.walked%len(s.walkers)]
}

// from is an address with another port each time.
func (s *stage) from(a netip.Addr) netip.AddrPort {
	if s.source++; s.source < 20000 {
		s.source = 20000
	}
	return netip.AddrPortFrom(a, s.source)
}

func (s *stage) to(port uint16) netip.AddrPort { return netip.AddrPortFrom(s.Bastion.Addr, port) }

// datagram sends a payload to the tunnel's port.
func (s *stage) datagram(from netip.Addr, payload []byte) error {
	return s.honest.Send(lab.Datagram4(s.from(from), s.to(gatePort), payload))
}

// hit sends a SYN each.
func (s *stage) hit(from netip.Addr, ports ...uint16) error {
	for _, p := range ports {
		if err := s.honest.Send(lab.SYN4(s.from(from), s.to(p))); err != nil {
			return err
		}
	}
	return nil
}

// How long to wait for what must not come, and for what should; the kernel sends a SYN again after a second.
const (
	briefly  = 300 * time.Millisecond
	patience = 1500 * time.Millisecond
)

// accepted counts the client's addresses from which the gate takes a connection in time. They all try at once.
func (s *stage) accepted(within time.Duration, from ...netip.Addr) (n int, err error) {
	ctx, cancel := context.WithTimeout(s.ctx, within)
	defer cancel()
	errs := make(chan error, len(from))
	for _, a := range from {
		go func() {
			c, err := s.Client.DialFrom(ctx, a, "tcp", s.to(gatePort).String())
			if err == nil {
				c.Close()
			}
			errs <- err
		}()
	}
	for range from {
		var timeout net.Error
		switch e := <-errs; {
		case e == nil:
			n++
		case s.ctx.Err() != nil:
			err = s.ctx.Err()
		case !errors.As(e, &timeout) || !timeout.Timeout():
			err = fmt.Errorf("the gate answers with %w: it must be silent", e)
		}
	}
	return n, err
}

// metrics are the daemon's figures, by name and labels as they are written.
func (s *stage) metrics() (map[string]int, error) {
	c := http.Client{Transport: &http.Transport{DialContext: s.Bastion.Dial, DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := c.Get("http://127.0.0.1:9617/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	m := map[string]int{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if f, err := strconv.ParseFloat(value, 64); err == nil {
			m[name] = int(f)
		}
	}
	return m, nil
}

// fill is how many elements each set has.
type fill map[string]int

func (s *stage) fill() (fill, error) {
	m, err := s.metrics()
	f := fill{}
	for name, n := range m {
		if set, ok := strings.CutPrefix(name, console.SetElements+`{set="`); ok {
			f[strings.TrimSuffix(set, `"}`)] = n
		}
	}
	return f, err
}

// empty waits until sets have no element.
func (s *stage) empty(sets ...string) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		f, err := s.fill()
		if err != nil {
			return err
		}
		n := 0
		for _, set := range sets {
			n += f[set]
		}
		if n == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d elements of %v do not expire", n, sets)
		}
	}
}

// closed waits until no window is open: one from before would hide what an attack opens, or does not.
func (s *stage) closed() error { return s.empty("open4", "seq4") }

// gained counts the windows that open while fn runs, by token and by sequence.
func (s *stage) gained(fn func() error) (tokens, sequences int, err error) {
	t, q, err := s.opened()
	if err != nil {
		return 0, 0, err
	}
	if err := fn(); err != nil {
		return 0, 0, err
	}
	tokens, sequences, err = s.opened()
	return tokens - t - 1, sequences - q, err // one is opened's own
}

// opened counts the windows that the kernel's log has told of so far. It tells them in order, so the last is a token's that
// is sent here.
func (s *stage) opened() (tokens, sequences int, err error) {
	token, err := s.crowd.Next(s.ctx)
	if err != nil {
		return 0, 0, err
	}
	from := s.walker()
	told := func() bool {
		return slices.ContainsFunc(s.daemon.Entries("window opened"), func(e map[string]any) bool { return e["source"] == from.String() })
	}
	for deadline := time.Now().Add(20 * time.Second); !told(); time.Sleep(20 * time.Millisecond) {
		if err := s.datagram(from, token[:]); err != nil { // a second one opens nothing
			return 0, 0, err
		}
		if time.Now().After(deadline) {
			return 0, 0, errors.New("a token of our own opens nothing")
		}
	}
	m, err := s.metrics()
	return m[console.WindowsOpened+`{kind="token"}`], m[console.WindowsOpened+`{kind="sequence"}`], err
}

// knocks has every friend knock by token and connect, as our client does, and tells how many got in.
func (s *stage) knocks() (in int, why string) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	turn := make(chan struct{}, 2)
	for _, f := range s.friends {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			out, err := f.Knock(s.ctx).CombinedOutput()
			mu.Lock()
			defer mu.Unlock()
			if err == nil && bytes.HasPrefix(out, []byte("open")) {
				in++
			} else {
				why = fmt.Sprintf("; a friend is told %q", bytes.TrimSpace(out))
			}
		})
	}
	wg.Wait()
	return in, why
}
