package firewall

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// siege is a host alone with whoever attacks it: a plain table, which nft may edit, the gate behind its interlock, and a
// device whose other end is the test. A packet has been judged when its send returns, so nothing here waits for time.
type siege struct {
	*bench
	t      *testing.T
	inside *testTUN // the other end of the tunnel's device, after openInside
	source uint16   // of the last packet made
	echo   uint16   // of the last echo request
}

func besiege(t *testing.T, cfg Config) *siege {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread, which is in a namespace of its own, dies with the test
	s := &siege{bench: &bench{cfg: cfg, plain: true}, t: t, source: 20000}
	t.Cleanup(s.close)
	for _, step := range []func() (string, error){
		func() (string, error) { return s.enter(t.Context()) },
		func() (string, error) { return s.openTUN(t.Context()) },
		func() (string, error) { return s.interlock(t.Context()) },
		func() (string, error) { return s.apply(t.Context()) },
		func() (string, error) { return s.observe(t.Context()) },
	} {
		if what, err := step(); err != nil {
			t.Fatal(what, err)
		}
	}
	// Sources from anywhere, and an answer for each of them.
	run(t, "", "ip", "route", "add", "default", "dev", "outside")
	run(t, "", "ip", "-6", "route", "add", "default", "dev", "outside")
	// The kernel takes up an IPv6 address in a work queue of its own.
	for deadline := time.Now().Add(10 * time.Second); len(s.replies(s.tun, s.tcp(netip.MustParseAddr("2001:db8::250"), 9, flagSYN))) == 0; {
		if time.Now().After(deadline) {
			t.Fatal("the host does not answer over IPv6")
		}
	}
	return s
}

// openInside makes the tunnel's device, with the daemon's address.
func (s *siege) openInside() {
	s.t.Helper()
	tun, err := openTestTUN(s.cfg.Interface)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(tun.fd) })
	s.inside = tun
	link, err := netlink.LinkByName(s.cfg.Interface)
	if err == nil {
		err = netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: s.cfg.Server().AsSlice(), Mask: net.CIDRMask(s.cfg.Network.Bits(), 32)}})
	}
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *siege) listen(address string) {
	s.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
}

// listenUDP is the tunnel's socket; the function gives what it has heard since the last call.
func (s *siege) listenUDP() func() []string {
	s.t.Helper()
	c, err := net.ListenPacket("udp", ":1194")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return func() (heard []string) {
		b := make([]byte, 2048)
		for {
			c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // what was sent is there already
			n, _, err := c.ReadFrom(b)
			if err != nil {
				return heard
			}
			heard = append(heard, string(b[:n]))
		}
	}
}

// nft edits the table.
func (s *siege) nft(script string) {
	s.t.Helper()
	run(s.t, script, "nft", "-f", "-")
}

var handle = regexp.MustCompile(` # handle (\d+)$`)

// without takes a rule out of a chain, which must have it once.
func (s *siege) without(chain, rule string) {
	s.t.Helper()
	taken := 0
	for line := range strings.Lines(run(s.t, "", "nft", "-a", "list", "chain", "inet", TableName, chain)) {
		line = strings.TrimSpace(line)
		if m := handle.FindStringSubmatch(line); m != nil && handle.ReplaceAllString(line, "") == rule {
			s.nft("delete rule inet " + TableName + " " + chain + " handle " + m[1])
			taken++
		}
	}
	if taken != 1 {
		s.t.Fatalf("chain %s has %d rules %q", chain, taken, rule)
	}
}

// into sends packets in at a device.
func (s *siege) into(tun *testTUN, packets ...[]byte) {
	s.t.Helper()
	for _, p := range packets {
		if err := tun.send(p); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *siege) send(packets ...[]byte) { s.t.Helper(); s.into(s.tun, packets...) }

// flood sends many packets, whose answers nobody reads.
func (s *siege) flood(n int, packet func(i int) []byte) {
	s.t.Helper()
	for i := range n {
		s.send(packet(i))
	}
}

// to is a port of the host in the family of a source.
func (s *siege) to(from netip.Addr) netip.Addr {
	if from.Is6() {
		return benchHost6
	}
	return benchHost
}

func (s *siege) port() uint16 {
	if s.source++; s.source == 0 {
		s.source = 20000
	}
	return s.source
}

func (s *siege) tcp(from netip.Addr, port uint16, flags byte) []byte {
	return tcpPacket(from, s.to(from), s.port(), port, 1000, 0, flags, nil)
}

func (s *siege) udp(from netip.Addr, port uint16, payload []byte) []byte {
	return udpPacket(from, s.to(from), s.port(), port, payload)
}

// knock sends a token.
func (s *siege) knock(from netip.Addr, t knock.Token) {
	s.t.Helper()
	s.send(s.udp(from, s.cfg.TunnelPort, t[:]))
}

// hits sends the knocks of a sequence.
func (s *siege) hits(from netip.Addr, ports ...knock.Port) {
	s.t.Helper()
	for _, p := range ports {
		if p.Proto == knock.UDP {
			s.send(s.udp(from, p.Number, nil))
		} else {
			s.send(s.tcp(from, p.Number, flagSYN))
		}
	}
}

func (s *siege) load(tokens ...Token) {
	s.t.Helper()
	if err := s.fw.AddTokens(tokens); err != nil {
		s.t.Fatal(err)
	}
}

// reply is a TCP segment that the host sends.
type reply struct {
	from, to netip.AddrPort
	flags    byte
}

func parseReply(b []byte) (r reply, ok bool) {
	var from, to netip.Addr
	switch {
	case len(b) >= 40 && b[0] == 0x45 && b[9] == knock.TCP:
		from, to, b = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[20:]
	case len(b) >= 60 && b[0]>>4 == 6 && b[6] == knock.TCP:
		from, to, b = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[40:]
	default:
		return r, false
	}
	return reply{netip.AddrPortFrom(from, binary.BigEndian.Uint16(b)), netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[2:])), b[13]}, true
}

// watcher asks for the echo behind which nothing comes that was sent before.
var watcher = netip.MustParseAddr("192.0.2.250")

// ping sends an echo request (RFC 792) and returns what is in its answer too.
func (s *siege) ping(n uint16) (echo []byte) {
	s.t.Helper()
	p := ipPacket(watcher, benchHost, unix.IPPROTO_ICMP, 2, []byte{8, 0, 0, 0, 0xec, 0x40, byte(n >> 8), byte(n)})
	icmp := p[20:]
	copy(icmp[2:], []byte{0, 0})
	binary.BigEndian.PutUint16(icmp[2:], checksum(icmp)) // without a pseudo header
	s.send(p)
	return icmp[4:]
}

// replies are the TCP segments that packets are answered with, from whichever device they were sent in and come out.
func (s *siege) replies(tun *testTUN, packets ...[]byte) (list []reply) {
	s.t.Helper()
	devices := []*testTUN{s.tun}
	if s.inside != nil {
		devices = append(devices, s.inside)
	}
	s.read(devices, nil)                           // what was left there
	for part := range slices.Chunk(packets, 100) { // a device holds 500 packets
		s.into(tun, part...)
		s.echo++
		list = append(list, s.read(devices, s.ping(s.echo))...)
	}
	return list
}

// read takes what the host sent out, until an echo reply comes, or, without one, what is there.
func (s *siege) read(devices []*testTUN, echo []byte) (list []reply) {
	s.t.Helper()
	buf := make([]byte, 4096)
	for deadline := time.Now().Add(10 * time.Second); ; {
		idle := true
		for _, d := range devices {
			n, err := unix.Read(d.fd, buf)
			if err != nil {
				continue
			}
			idle = false
			b := buf[min(n, vnetHeader):n]
			if r, ok := parseReply(b); ok {
				list = append(list, r)
			}
			if len(b) == 28 && b[0] == 0x45 && b[9] == unix.IPPROTO_ICMP && echo != nil && bytes.Equal(b[24:], echo) {
				// The other device may hold more; what is there is there.
				return append(list, s.read(devices, nil)...)
			}
		}
		switch {
		case idle && echo == nil:
			return list
		case idle && time.Now().After(deadline):
			s.t.Fatal("the host does not answer an echo request")
		}
	}
}

const synAck = flagSYN | flagACK

// accepted tells whether the gate answers a source's SYN.
func (s *siege) accepted(from netip.Addr) bool {
	s.t.Helper()
	return slices.ContainsFunc(s.replies(s.tun, s.tcp(from, s.cfg.GatePorts[0], flagSYN)), func(r reply) bool { return r.flags == synAck })
}

// windows of the kernel for one source.
func (s *siege) windows(from netip.Addr) (list []Window) {
	s.t.Helper()
	all, err := s.fw.Windows()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, w := range all {
		if w.Source == from {
			list = append(list, w)
		}
	}
	return list
}

// elements of a set.
func (s *siege) elements(set string) []nftables.SetElement {
	s.t.Helper()
	s.fw.mu.Lock()
	defer s.fw.mu.Unlock()
	e, err := s.fw.elementsLocked(set)
	if err != nil {
		s.t.Fatal(err)
	}
	return e
}

// friends knock by token, each from his own address with one of his own tokens, and connect: it tells how many of n got in.
func (s *siege) friends(n int) (in int) {
	s.t.Helper()
	for i := range n {
		from := netip.AddrFrom4([4]byte{198, 51, 100, byte(i)})
		token := knock.NewToken([]byte(s.t.Name()), knock.ServerID{}, int64(i), 0)
		s.load(Token{token, uint32(1000 + i), soon()})
		s.knock(from, token)
		if s.accepted(from) {
			in++
		}
	}
	return in
}

// spoofed is the nth spoofed source: of 100.64.0.0/10, so some four million.
func spoofed(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{100, 64 | byte(i>>16), byte(i >> 8), byte(i)})
}
