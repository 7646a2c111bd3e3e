package firewall

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"perimeterd/knock"
)

// What is accepted: spoofed packets, and a neighbour behind the same address, keep sequence knocks from opening. Tokens
// open all the same, which is why our client sends them first. Each attack is shown to take effect.
func TestSequencesCanBeDeniedAndTokensCannot(t *testing.T) {
	me := guest(50)
	for _, test := range []struct {
		name  string
		knock func(s *siege, ports []knock.Port)
	}{
		{"maps of progress filled from spoofed sources", func(s *siege, ports []knock.Port) {
			const room = 1000
			stuff(s.t, s.fw, "progress4", setSize-room) // others of the same kind, which spares most of the flood
			s.flood(2*room, func(i int) []byte { return s.tcp(spoofed(1<<20+i), ports[0].Number, flagSYN) })
			s.hits(me, ports...)
		}},
		{"a stray packet in the knocker's name", func(s *siege, ports []knock.Port) {
			s.hits(me, ports[:2]...)
			s.send(s.tcp(me, 4242, flagSYN))
			s.hits(me, ports[2:]...)
		}},
		{"two with sequences of their own, at once, behind one address", func(s *siege, ports []knock.Port) {
			for i, other := range s.cfg.Sequences[1].Ports {
				s.hits(me, ports[i], other)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := example()
			secret(&cfg)
			cfg.Sequences = append(cfg.Sequences, sequence(t, "2001", "1001", "3001"))
			s := besiege(t, cfg)
			ports := cfg.Sequences[0].Ports
			s.hits(guest(51), ports...)
			if !s.accepted(guest(51)) {
				t.Fatal("the sequence opens nothing even in peace")
			}
			test.knock(s, ports)
			if s.accepted(me) {
				t.Error("the sequence opened: say so in docs/door.md, which says that this denies it")
			}
			s.load(Token{tok(1), 42, soon()})
			s.knock(me, tok(1))
			if !s.accepted(me) {
				t.Error("the same source's token did not open")
			}
			if in := s.friends(20); in != 20 {
				t.Errorf("%d of 20 token knocks got in", in)
			}
		})
	}
}

// The same packets from two are one sequence with repetitions, which are no mistake.
func TestTwoWithTheSharedSequenceBehindOneAddressBothGetIn(t *testing.T) {
	cfg := example()
	secret(&cfg)
	s := besiege(t, cfg)
	p := cfg.Sequences[0].Ports
	for i, order := range [][]knock.Port{
		{p[0], p[0], p[1], p[1], p[2], p[2]},
		{p[0], p[1], p[0], p[2], p[1], p[2]},
		{p[0], p[0], p[1], p[2], p[1], p[2]},
	} {
		from := guest(byte(60 + i))
		s.hits(from, order...)
		if !s.accepted(from) {
			t.Errorf("%v opened nothing", order)
		}
	}
}

// The kernel makes room in its table of connections at the cost of those that nobody has answered.
func TestFullConnectionTrackingKeepsNoFriendOut(t *testing.T) {
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		t.Fatal(err)
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	s := besiege(t, example())
	deaf, err := net.ListenPacket("udp", ":5353")
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	s.flood(most, func(i int) []byte { return s.udp(spoofed(i), 5353, []byte("unreplied")) })
	entries := s.tracked()
	in := s.friends(20)
	t.Logf("%d of 20 token knocks got in, with %d of %d entries taken by unreplied datagrams", in, entries, most)
	if entries < most*98/100 {
		t.Error("the flood did not fill the table: the attack is none")
	}
	if in != 20 {
		t.Errorf("%d of 20 got in", in)
	}
}

// What another tool's flush leaves: the gate is deaf by its sockets' filter, and a listener without one answers strangers.
func TestFlushedRulesetOpensOnlyASocketWithoutTheFilter(t *testing.T) {
	cfg := example()
	cfg.GatePorts = []uint16{1194, 1195}
	s := besiege(t, cfg)
	s.listen(":1195")
	answers := func(port uint16) (n int) {
		for i := range 20 {
			from := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
			n += len(s.replies(s.tun, s.tcp(from, port, flagSYN)))
		}
		return n
	}
	if filtered, bare := answers(1194), answers(1195); filtered+bare != 0 {
		t.Fatalf("with the table %d and %d of 20 strangers are answered", filtered, bare)
	}
	s.nft("flush ruleset")
	if n := answers(1194); n != 0 {
		t.Errorf("%d of 20 strangers are answered by the gate", n)
	}
	if n := answers(1195); n != 20 {
		t.Errorf("%d of 20 strangers are answered without the filter: the attack is none", n)
	}
}
