package firewall

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"perimeterd/knock"
)

// Windows of both kinds and families keep their credential and what is left of their time, whatever the daemon does to
// the table that holds them.
func TestWindowsKeepTheirTime(t *testing.T) {
	other := example() // what a reload may bring
	other.Mode, other.Window, other.Trusted = Host, 10*time.Minute, prefixes("203.0.113.0/24", "2001:db8:9::/48")
	other.Allow = []Allow{{Proto: ICMP}} // the siege listens for echoes
	secret(&other)
	for name, change := range map[string]func(s *siege) (Config, *Firewall){
		"applied again": func(s *siege) (Config, *Firewall) { return s.cfg, s.fw },
		"reloaded":      func(s *siege) (Config, *Firewall) { return other, s.fw },
		"restarted":     func(s *siege) (Config, *Firewall) { return s.cfg, New(testLog(s.t), s.netns) },
		"upgraded": func(s *siege) (Config, *Firewall) {
			// An earlier version's table: rules fewer and otherwise, a chain and sets that are no more, some that are missing,
			// one whose definition has changed since.
			s.nft(`flush table inet perimeterd
				delete chain inet perimeterd refused
				delete chain inet perimeterd seq_opened
				delete map inet perimeterd step
				delete set inet perimeterd trusted4
				delete set inet perimeterd trusted6
				add map inet perimeterd step { type mark . inet_service : mark; size 1024; }
				add set inet perimeterd blocked { type ipv4_addr; flags timeout; }
				add chain inet perimeterd earlier
				add rule inet perimeterd earlier ip saddr @blocked drop
				add rule inet perimeterd input jump earlier
				add rule inet perimeterd input tcp dport 1194 drop`)
			return s.cfg, New(testLog(s.t), s.netns)
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := example()
			cfg.Window = 20 * time.Second
			secret(&cfg)
			s := besiege(t, cfg)
			me6 := netip.MustParseAddr("2001:db8::80")
			s.load(Token{tok(1), 42, soon()}, Token{tok(2), 43, soon()})
			s.knock(guest(80), tok(1))
			s.knock(me6, tok(2))
			s.hits(guest(81), cfg.Sequences[0].Ports...)
			s.hits(me6, cfg.Sequences[0].Ports...)
			list := func(f *Firewall) []Window {
				w, err := f.Windows()
				if err != nil {
					t.Fatal(err)
				}
				slices.SortFunc(w, func(a, b Window) int { return a.Source.Compare(b.Source)*2 + int(a.Credential) - int(b.Credential) })
				return w
			}
			before := list(s.fw)
			next, fw := change(s)
			fw.plain = true
			if fresh, err := fw.Apply(next); err != nil || fresh {
				t.Fatalf("fresh %v, %v", fresh, err)
			}
			if _, err := fw.check(time.Now(), false); err != nil { // as Watch does ten times a second
				t.Fatal(err)
			}
			s.fw = fw
			after := list(fw)
			if len(before) != 4 || len(after) != len(before) {
				t.Fatalf("windows before %+v, after %+v", before, after)
			}
			for i, w := range after {
				late := w.Expires.Sub(before[i].Expires)
				if w.Expires = before[i].Expires; w != before[i] || late.Abs() > 2*time.Second {
					t.Errorf("window before %+v, after %+v, %v later", before[i], w, late)
				}
			}
			for _, from := range []netip.Addr{guest(80), guest(81), me6} {
				if !s.accepted(from) {
					t.Errorf("%v is not let in any more", from)
				}
			}
			if s.accepted(guest(82)) {
				t.Error("a stranger is let in")
			}
			// What the daemon takes out is out, in both kinds and families, and comes back with no later apply.
			for id, tokens := range map[uint32][]knock.Token{42: {tok(1)}, 43: {tok(2)}, 9: nil} {
				if err := fw.Revoke(id, tokens); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := fw.Apply(next); err != nil {
				t.Fatal(err)
			}
			for _, from := range []netip.Addr{guest(80), guest(81), me6} {
				if s.accepted(from) {
					t.Errorf("%v is let in after the revocation", from)
				}
			}
		})
	}
}

// By IPv6 the door does what it does by IPv4.
func TestIPv6IsNoOtherDoor(t *testing.T) {
	cfg := example()
	cfg.Trusted = prefixes("2001:db8:9::/48")
	secret(&cfg)
	s := besiege(t, cfg)
	a := func(n byte) netip.Addr { return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: n}) }
	ports := cfg.Sequences[0].Ports
	s.hits(a(2), ports[0], ports[2], ports[1])
	s.hits(a(3), ports[:2]...)
	s.send(s.tcp(a(3), 4242, flagSYN)) // a stray
	s.hits(a(3), ports[2])
	s.hits(a(4), ports[0], ports[0], ports[1], ports[0], ports[1], ports[2]) // repeated SYNs
	for range 200 {
		s.hits(a(5), ports[0]) // beyond its pace
	}
	s.hits(a(5), ports[1:]...)
	s.load(Token{tok(1), 42, soon()}, Token{tok(2), 43, soon()})
	s.knock(a(6), tok(1))
	s.knock(a(7), tok(1)) // a replay
	if err := s.fw.AddPeer(netip.AddrPortFrom(a(8), 51820), soon()); err != nil {
		t.Fatal(err)
	}
	for from, want := range map[netip.Addr]bool{
		a(1): false, a(2): false, a(3): false, a(4): true, a(5): false, a(6): true, a(7): false, a(8): false,
		netip.MustParseAddr("2001:db8:9::1"): true, netip.MustParseAddr("2001:db8:a::1"): false,
	} {
		if got := s.accepted(from); got != want {
			t.Errorf("%v is let in: %v", from, got)
		}
	}
	// A peer's endpoint is address and port, for UDP alone.
	tunnel := s.listenUDP()
	s.source = 51818
	for _, text := range []string{"another port", "the peer's own", "one port on"} {
		s.send(s.udp(a(8), 1194, []byte(text)))
	}
	s.send(udpPacket(a(9), benchHost6, 51820, 1194, []byte("another address")))
	if got := tunnel(); !slices.Equal(got, []string{"the peer's own"}) {
		t.Errorf("the tunnel heard %q", got)
	}
	if err := s.fw.RemovePeer(netip.AddrPortFrom(a(8), 51820)); err != nil {
		t.Fatal(err)
	}
	s.send(udpPacket(a(8), benchHost6, 51820, 1194, []byte("after its end")))
	if got := tunnel(); len(got) != 0 {
		t.Errorf("the tunnel heard %q", got)
	}
}
