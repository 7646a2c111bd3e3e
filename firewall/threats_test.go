package firewall

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// What was attacked on earlier drafts of the table. Each attack runs twice: against the table as it is, where it must gain
// nothing, and against one in which the rule that stands against it is as it was, where it must gain something: else the
// attack is none, and its failure proves nothing.
var threats = []struct {
	name    string
	cfg     func(*Config)
	earlier func(*siege)
	attack  func(*siege) (gained int, what string)
}{
	{
		// Knock ports that stay silent, beside others that send resets.
		name: "the sequence read off the silence, step by step",
		cfg:  secret,
		earlier: func(s *siege) {
			for _, chain := range []string{"knock_hit", "seq_opened"} { // a knock that is right is dropped
				s.nft("add rule inet perimeterd " + chain + " drop")
			}
		},
		attack: readOff,
	},
	{
		name: "one source repeats the first knock port",
		cfg:  secret,
		earlier: func(s *siege) { // no pace before the maps are written
			s.nft("insert rule inet perimeterd knock goto knock_step")
		},
		attack: repeatTheFirst,
	},
	{
		name:    "a token that the daemon loads again",
		earlier: func(s *siege) { s.nft(deleteOnUse) },
		attack: func(s *siege) (int, string) {
			s.load(Token{tok(1), 42, soon()})
			s.knock(guest(10), tok(1))
			s.load(Token{tok(1), 42, soon()})
			s.knock(guest(11), tok(1))
			return len(s.windows(guest(11))), "windows by the replayed token"
		},
	},
	{
		name: "a neighbour addresses the inside",
		earlier: func(s *siege) {
			s.without("input", "ip daddr 10.77.0.0/16 drop")
			s.without("input", "ip saddr 10.77.0.0/16 drop")
		},
		attack: func(s *siege) (gained int, what string) {
			s.openInside()
			s.listen("10.77.0.1:3128")
			session := netip.MustParseAddr("10.77.0.2")
			if err := s.fw.Admit(session, nil, soon()); err != nil {
				s.t.Fatal(err)
			}
			for _, from := range []netip.Addr{guest(12), session} {
				if got := s.replies(s.tun, tcpPacket(from, s.cfg.Server(), s.port(), 3128, 1000, 0, flagSYN, nil)); len(got) > 0 {
					gained++
				}
			}
			return gained, "of a neighbour's own and a borrowed address are answered by the proxy's port"
		},
	},
	{
		name: "spoofed sequences fill the windows",
		cfg:  secret,
		earlier: func(s *siege) { // one set of windows for both kinds of knock
			s.nft("flush chain inet perimeterd seq_open\nadd rule inet perimeterd seq_open goto open")
		},
		attack: func(s *siege) (int, string) {
			const room = 2000
			stuff(s.t, s.fw, "open4", setSize-room) // many friends are in already, which spares most of the flood
			for i := range 2 * room {
				s.hits(spoofed(1<<20+i), s.cfg.Sequences[0].Ports...)
			}
			windows, err := s.fw.Windows()
			if err != nil {
				s.t.Fatal(err)
			}
			if got := len(windows) - (setSize - room); got < room {
				s.t.Errorf("%d spoofed sequences opened %d windows: the attack is none", 2*room, got)
			}
			return 20 - s.friends(20), fmt.Sprintf("of 20 token knocks kept out by %d spoofed sequences", 2*room)
		},
	},
	{
		name: "an opening is told that a full set refused",
		earlier: func(s *siege) { // the log ahead of the rule that adds
			s.nft("insert rule inet perimeterd open log group 1194 queue-threshold 1")
		},
		attack: func(s *siege) (int, string) {
			stuff(s.t, s.fw, "open4", setSize)
			s.load(Token{tok(1), 42, soon()})
			s.knock(guest(13), tok(1))
			if len(s.windows(guest(13))) != 0 {
				s.t.Fatal("the set had room")
			}
			return len(s.told()), "openings told that were none"
		},
	},
	{
		name: "a mark of another tool is erased",
		earlier: func(s *siege) {
			s.nft("add rule inet perimeterd stray meta mark set 0")
		},
		attack: func(s *siege) (int, string) {
			s.nft(`table inet other {
				chain early { type filter hook prerouting priority -150; tcp dport 8080 meta mark set 0x99; }
				chain late { type filter hook input priority 0; meta mark 0x99 drop; }
			}`)
			return len(s.replies(s.tun, s.tcp(guest(14), 8080, flagSYN))), "answers to a packet that was marked for drop"
		},
	},
	{
		name: "TCP from behind a peer's address",
		earlier: func(s *siege) { // peers by address alone
			s.nft("insert rule inet perimeterd gate ip saddr " + guest(15).String() + " meta mark set 0x67617465 accept")
		},
		attack: func(s *siege) (int, string) {
			if err := s.fw.AddPeer(netip.AddrPortFrom(guest(15), 51820), soon()); err != nil {
				s.t.Fatal(err)
			}
			s.source = 51819 // the first is from the peer's own port
			return len(s.replies(s.tun, s.tcp(guest(15), 1194, flagSYN), s.tcp(guest(15), 1194, flagSYN))), "SYN-ACKs to a peer's address without a window"
		},
	},
	{
		name: "the host's outer address, and IPv6, through the tunnel",
		earlier: func(s *siege) { // what is not admitted is dropped, the rest goes by its port
			s.nft(`flush chain inet perimeterd tunnel
				add rule inet perimeterd tunnel ip saddr != @admitted drop
				add rule inet perimeterd tunnel tcp dport { 80, 3128 } accept
				add rule inet perimeterd tunnel drop`)
		},
		attack: func(s *siege) (gained int, what string) {
			s.openInside()
			s.listen(":3128")
			me, me6 := netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("2001:db8:77::2")
			if err := s.fw.Admit(me, nil, soon()); err != nil {
				s.t.Fatal(err)
			}
			syn := func(from, to netip.Addr) []reply {
				return s.replies(s.inside, tcpPacket(from, to, s.port(), 3128, 1000, 0, flagSYN, nil))
			}
			if got := syn(me, s.cfg.Server()); len(got) != 1 || got[0].flags != synAck {
				s.t.Errorf("the proxy answers a session with %v", got)
			}
			return len(syn(me, benchHost)) + len(syn(me6, benchHost6)), "of the two are answered"
		},
	},
	{
		name: "tokens with a bad checksum, to broadcast, to multicast",
		earlier: func(s *siege) {
			s.without("token", "ct state invalid drop")
			s.without("token", "fib daddr type != local drop")
		},
		attack: func(s *siege) (gained int, what string) {
			bad := func(p []byte) []byte { p[len(p)-knock.TokenSize-1] ^= 0x55; return p }
			for i, p := range []func(from netip.Addr, t []byte) []byte{
				func(from netip.Addr, t []byte) []byte { return bad(s.udp(from, 1194, t)) },
				func(from netip.Addr, t []byte) []byte {
					return udpPacket(from, netip.MustParseAddr("192.0.2.255"), s.port(), 1194, t)
				},
				func(from netip.Addr, t []byte) []byte {
					return udpPacket(from, netip.MustParseAddr("224.0.0.1"), s.port(), 1194, t)
				},
				func(_ netip.Addr, t []byte) []byte {
					return bad(s.udp(netip.MustParseAddr("2001:db8::10"), 1194, t))
				},
				func(_ netip.Addr, t []byte) []byte {
					return udpPacket(netip.MustParseAddr("2001:db8::11"), netip.MustParseAddr("ff02::1"), s.port(), 1194, t)
				},
			} {
				t := tok(byte(i + 1))
				s.load(Token{t, 42, soon()})
				s.send(p(guest(byte(20+i)), t[:]))
				s.knock(guest(byte(30+i)), t)
				if len(s.windows(guest(byte(30+i)))) == 0 {
					gained++ // it is spent
				}
			}
			return gained, "of 5 tokens spent by such a packet"
		},
	},
	{
		// A subnet of a cloud is one /64.
		name: "a window for a whole /64",
		earlier: func(s *siege) {
			s.nft(`add set inet perimeterd open64 { type ipv6_addr; flags dynamic,timeout; timeout 1m; }
				insert rule inet perimeterd open add @open64 { ip6 saddr & ffff:ffff:ffff:ffff:: }
				insert rule inet perimeterd gate ip6 saddr & ffff:ffff:ffff:ffff:: @open64 meta mark set 0x67617465 accept`)
		},
		attack: func(s *siege) (gained int, what string) {
			s.load(Token{tok(1), 42, soon()})
			s.knock(netip.MustParseAddr("2001:db8:5::2"), tok(1))
			if !s.accepted(netip.MustParseAddr("2001:db8:5::2")) {
				s.t.Error("the knock opened nothing")
			}
			for _, from := range []string{"2001:db8:5::3", "2001:db8:5:0:ffff::2", "2001:db8:5:1::2"} {
				if s.accepted(netip.MustParseAddr(from)) {
					gained++
				}
			}
			return gained, "neighbours let in"
		},
	},
	{
		// Loose is what the kernel is by default: it takes up connections in the middle.
		name: "segments that begin no connection, to the gate",
		earlier: func(s *siege) { // the classic list's "established": whatever is no first SYN
			s.nft("insert rule inet perimeterd gate tcp flags & (fin | syn | rst | ack) != syn meta mark set 0x67617465 accept")
		},
		attack: func(s *siege) (int, string) {
			for _, name := range []string{"nf_conntrack_tcp_loose", "nf_conntrack_tcp_be_liberal"} {
				run(s.t, "1", "tee", "/proc/sys/net/netfilter/"+name)
			}
			if s.accepted(guest(17)) {
				s.t.Error("the gate answers a SYN")
			}
			before := s.tracked()
			var packets [][]byte
			for _, flags := range []byte{flagACK, synAck, flagFIN, 0, flagFIN | flagPSH | 0x20, flagSYN | flagFIN, flagRST, flagACK | flagFIN} {
				packets = append(packets, s.tcp(guest(16), 1194, flags), s.tcp(netip.MustParseAddr("2001:db8::16"), 1194, flags))
			}
			replies := s.replies(s.tun, packets...)
			entries := s.tracked() - before
			return len(replies) + entries, fmt.Sprintf("replies and entries in conntrack (%d and %d)", len(replies), entries)
		},
	},
	{
		name: "tokens of another length",
		earlier: func(s *siege) {
			s.nft("insert rule inet perimeterd input udp dport 1194 goto token")
		},
		attack: func(s *siege) (gained int, what string) {
			for i, payload := range [][]byte{append(token16(1), 0), append(token16(2), make([]byte, 1200)...), token16(3)[:15]} {
				s.load(Token{tok(byte(i + 1)), 42, soon()})
				s.send(s.udp(guest(byte(40+i)), 1194, payload))
				gained += len(s.windows(guest(byte(40 + i))))
			}
			return gained, "of 15, 17 and 1216 bytes open"
		},
	},
	{
		name: "tokens by UDP-Lite",
		earlier: func(s *siege) {
			s.nft("insert rule inet perimeterd input meta l4proto { udp, udplite } th dport 1194 goto token")
		},
		attack: func(s *siege) (int, string) {
			s.load(Token{tok(1), 42, soon()})
			for _, pseudo := range []byte{unix.IPPROTO_UDPLITE, unix.IPPROTO_UDP} { // conntrack sums as for UDP
				segment := s.udp(guest(43), 1194, token16(1))[20:]
				copy(segment[4:], []byte{0, 0, 0, 0}) // all of it is covered by the checksum (RFC 3828)
				p := ipPacket(guest(43), benchHost, pseudo, 6, segment)
				changeHeader(p, func() { p[9] = unix.IPPROTO_UDPLITE })
				s.send(p)
			}
			return len(s.windows(guest(43))), "windows"
		},
	},
	{
		name: "a fragment alone",
		earlier: func(s *siege) { // a table that judges before fragments are put together
			s.nft(`add chain inet perimeterd early { type filter hook prerouting priority -450; }
				add rule inet perimeterd early udp dport 1194 udp length 24 meta mark set @th,64,128 map @tokens goto open`)
		},
		attack: func(s *siege) (int, string) {
			s.load(Token{tok(1), 42, soon()})
			p := s.udp(guest(44), 1194, token16(1))
			changeHeader(p, func() { p[6] |= 0x20 }) // more fragments
			s.send(p)
			return len(s.windows(guest(44))), "windows"
		},
	},
	{
		name: "a token under a bad IP checksum",
		earlier: func(s *siege) { // a table at the device, before the kernel has looked at the header
			s.nft(`add chain inet perimeterd early { type filter hook ingress device "outside" priority 0; }
				add rule inet perimeterd early udp dport 1194 meta mark set @th,64,128 map @tokens goto open`)
		},
		attack: func(s *siege) (int, string) {
			s.load(Token{tok(1), 42, soon()})
			p := s.udp(guest(45), 1194, token16(1))
			p[10] ^= 0x55
			s.send(p)
			return len(s.windows(guest(45))), "windows"
		},
	},
}

func TestThreats(t *testing.T) {
	for _, threat := range threats {
		for _, earlier := range []bool{false, true} {
			name := threat.name
			if earlier {
				name += ", on the earlier draft"
			}
			t.Run(name, func(t *testing.T) {
				cfg := example()
				if threat.cfg != nil {
					threat.cfg(&cfg)
				}
				s := besiege(t, cfg)
				if earlier {
					threat.earlier(s)
				}
				start := time.Now()
				gained, what := threat.attack(s)
				t.Logf("gained %d: %s (in %v)", gained, what, time.Since(start).Round(time.Millisecond))
				if (gained > 0) != earlier {
					t.Errorf("the attack gained %d (%s); on the earlier draft: %v", gained, what, earlier)
				}
			})
		}
	}
}

// secret is a configuration with a sequence of three TCP ports.
func secret(cfg *Config) {
	tcp := func(n uint16) knock.Port { return knock.Port{Proto: knock.TCP, Number: n} }
	cfg.Sequences = []knock.Sequence{{Name: "ops", Credential: 9, Ports: []knock.Port{tcp(33127), tcp(7102), tcp(19044)}, Timeout: knock.DefaultTimeout}}
}

// deleteOnUse is the earlier rule of tokens: what is taken out is spent.
const deleteOnUse = `flush chain inet perimeterd token
add rule inet perimeterd token meta mark set @th,64,128 map @tokens delete @tokens { @th,64,128 : meta mark } goto open
add rule inet perimeterd token drop`

func token16(n byte) []byte { t := tok(n); return t[:] }

// changeHeader changes an IPv4 header and mends its checksum.
func changeHeader(p []byte, change func()) {
	change()
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
}

// readOff tries every port of some thousands as the next knock, each from an address that has knocked what is known so far.
func readOff(s *siege) (int, string) {
	var candidates []uint16
	for _, p := range s.cfg.Sequences[0].Ports {
		for n := p.Number - 300; n < p.Number+300; n++ {
			candidates = append(candidates, n)
		}
	}
	var known []uint16
	source := 0
	for len(known) < 4 {
		silent := candidates
		for range 2 { // what is silent is asked twice
			var still []uint16
			for part := range slices.Chunk(silent, 50) {
				asked := map[uint16]bool{}
				var packets [][]byte
				for _, p := range part {
					if slices.Contains(known, p) {
						continue
					}
					from := spoofed(source)
					source++
					for _, k := range known {
						packets = append(packets, s.tcp(from, k, flagSYN))
					}
					packets = append(packets, s.tcp(from, p, flagSYN))
					asked[p] = true
				}
				for _, r := range s.replies(s.tun, packets...) {
					delete(asked, r.from.Port())
				}
				for p := range asked {
					still = append(still, p)
				}
			}
			silent = still
		}
		if len(silent) != 1 {
			break
		}
		known = append(known, silent[0])
	}
	return len(known), fmt.Sprintf("ports read off: %v", known)
}

// repeatTheFirst counts how many of a source's knocks come as far as the maps, where each leaves a dead element behind.
func repeatTheFirst(s *siege) (int, string) {
	const packets = 5000
	s.nft("insert rule inet perimeterd knock_step counter")
	start := time.Now()
	first := s.cfg.Sequences[0].Ports[0].Number
	s.flood(packets, func(int) []byte { return s.tcp(guest(9), first, flagSYN) })
	took := time.Since(start)
	var writes int
	text := run(s.t, "", "nft", "list", "chain", "inet", TableName, "knock_step")
	if _, err := fmt.Sscanf(text[strings.Index(text, "packets"):], "packets %d", &writes); err != nil {
		s.t.Fatal(err, text)
	}
	paced := 20 + int(20*took.Seconds()) + 1
	fill, err := s.fw.Fill()
	if err != nil {
		s.t.Fatal(err)
	}
	return max(writes-paced, 0), fmt.Sprintf("writes of %d packets beyond a pace of %d; progress4 counts %d elements; %.0f packets a second",
		packets, paced, fill["progress4"].Elements, packets/took.Seconds())
}

// tracked is how many connections the kernel tracks here.
func (s *siege) tracked() (n int) {
	s.t.Helper()
	if _, err := fmt.Sscan(run(s.t, "", "cat", "/proc/sys/net/netfilter/nf_conntrack_count"), &n); err != nil {
		s.t.Fatal(err)
	}
	return n
}

// told are the openings that the log has told. Behind the last that matters comes one of a token of the test's own.
func (s *siege) told() (list []Opening) {
	s.t.Helper()
	last := tok(255)
	s.load(Token{last, 255, soon()})
	s.knock(netip.MustParseAddr("2001:db8::255"), last)
	for {
		select {
		case o := <-s.openings:
			if o.Credential == 255 {
				return list
			}
			list = append(list, o)
		case <-time.After(10 * time.Second):
			s.t.Fatal("the log does not tell of an opening")
		}
	}
}
