package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// nameServer answers over UDP and TCP as its function says, and counts the questions.
type nameServer struct {
	udp    *net.UDPConn
	tcp    net.Listener
	answer func(m *dnsmessage.Message, overTCP bool)

	mu    sync.Mutex
	asked []string // "a.test. TypeA", and " tcp"
}

func startNameServer(t testing.TB, answer func(m *dnsmessage.Message, overTCP bool)) *nameServer {
	s := &nameServer{answer: answer}
	var err error
	if s.udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	if s.tcp, err = net.Listen("tcp", s.udp.LocalAddr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.udp.Close(); s.tcp.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := s.udp.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			for _, out := range s.replies(b[:n], false) {
				s.udp.WriteToUDPAddrPort(out, from)
			}
		}
	}()
	go func() {
		for {
			c, err := s.tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var size [2]byte
				io.ReadFull(c, size[:])
				b := make([]byte, binary.BigEndian.Uint16(size[:]))
				io.ReadFull(c, b)
				for _, out := range s.replies(b, true) {
					c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
				}
			}()
		}
	}()
	return s
}

// replies are the answer, after two that a forger might send: another id, another question, both good for a day.
func (s *nameServer) replies(query []byte, overTCP bool) (all [][]byte) {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	word := q.Name.String() + " " + q.Type.String()
	if overTCP {
		word += " tcp"
	}
	s.mu.Lock()
	s.asked = append(s.asked, word)
	s.mu.Unlock()
	if !overTCP {
		for _, forge := range []func(m *dnsmessage.Message){
			func(m *dnsmessage.Message) { m.ID++ },
			func(m *dnsmessage.Message) { m.Questions[0].Name = dnsmessage.MustNewName("forged.test.") },
		} {
			f := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true}, Questions: []dnsmessage.Question{q},
				Answers: []dnsmessage.Resource{address(q.Name.String(), metadataHost, 86400)}}
			forge(&f)
			out, _ := f.Pack()
			all = append(all, out)
		}
	}
	m.Response, m.Additionals = true, nil
	s.answer(&m, overTCP)
	out, err := m.Pack()
	if err != nil {
		return all
	}
	return append(all, out)
}

func (s *nameServer) questions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *nameServer) resolver() *resolver {
	r := newResolver()
	r.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, s.udp.LocalAddr().String())
	}
	return r
}

func address(name, a string, ttl uint32) dnsmessage.Resource {
	h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: ttl}
	if ip := netip.MustParseAddr(a); ip.Is6() {
		return dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: ip.As16()}}
	}
	return dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: netip.MustParseAddr(a).As4()}}
}

func alias(name, to string, ttl uint32) dnsmessage.Resource {
	return dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: ttl},
		Body: &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to)}}
}

func authority(ttl, minimum uint32) []dnsmessage.Resource {
	root := dnsmessage.MustNewName(".")
	return []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: root, Class: dnsmessage.ClassINET, TTL: ttl}, Body: &dnsmessage.SOAResource{NS: root, MBox: root, MinTTL: minimum}}}
}

func TestNamesAreRememberedAsLongAsTheirServersSay(t *testing.T) {
	const v4, v6 = outsideHost, "2001:db8:18::2"
	var long []dnsmessage.Resource
	for i := range 100 {
		long = append(long, address("long.test.", fmt.Sprintf("198.18.7.%d", i), 50))
	}
	s := startNameServer(t, func(m *dnsmessage.Message, overTCP bool) {
		q := m.Questions[0]
		six := q.Type == dnsmessage.TypeAAAA
		switch q.Name.String() {
		case "plain.test.":
			m.Answers = []dnsmessage.Resource{address("plain.test.", v4, 60)}
		case "two.test.":
			if m.Answers = []dnsmessage.Resource{address("two.test.", v4, 60)}; six {
				m.Answers = []dnsmessage.Resource{address("two.test.", v6, 20)}
			}
		case "one.test.": // no address of the other kind
			if m.Answers = []dnsmessage.Resource{address("one.test.", v4, 60)}; six {
				m.Answers, m.Authorities = nil, authority(900, 10)
			}
		case "mute.test.": // the zone does not say how long there is none
			if m.Answers = []dnsmessage.Resource{address("mute.test.", v4, 60)}; six {
				m.Answers = nil
			}
		case "alias.test.":
			m.Answers = []dnsmessage.Resource{alias("alias.test.", "b.test.", 300), alias("b.test.", "c.test.", 5), address("c.test.", v4, 60)}
		case "never.test.":
			m.Answers = []dnsmessage.Resource{address("never.test.", v4, 0)}
		case "negative.test.":
			m.Answers = []dnsmessage.Resource{address("negative.test.", v4, 1<<31+60)}
		case "day.test.":
			m.Answers = []dnsmessage.Resource{address("day.test.", v4, 86400)}
		case "long.test.":
			if m.Answers = slices.Clone(long); !overTCP {
				m.Truncated, m.Answers = true, m.Answers[:1]
			}
		case "gone.test.":
			m.RCode, m.Authorities = dnsmessage.RCodeNameError, authority(900, 20)
		case "gone-day.test.":
			m.RCode, m.Authorities = dnsmessage.RCodeNameError, authority(86400, 86400)
		case "gone-alias.test.":
			m.RCode, m.Answers, m.Authorities = dnsmessage.RCodeNameError, []dnsmessage.Resource{alias("gone-alias.test.", "gone.test.", 7)}, authority(900, 20)
		case "gone-mute.test.":
			m.RCode = dnsmessage.RCodeNameError
		case "broken.test.":
			m.RCode = dnsmessage.RCodeServerFailure
		}
	})
	for _, tt := range []struct {
		network, name string
		life          time.Duration
		addrs         int
		reason        Reason
	}{
		{"ip4", "plain.test", 60 * time.Second, 1, ""},
		{"ip", "two.test", 20 * time.Second, 2, ""},
		{"ip4", "two.test", 60 * time.Second, 1, ""},
		{"ip", "one.test", 10 * time.Second, 1, ""},
		{"ip", "mute.test", 0, 1, ""},
		{"ip4", "alias.test", 5 * time.Second, 1, ""},
		{"ip4", "never.test", 0, 1, ""},
		{"ip4", "negative.test", 0, 1, ""},
		{"ip4", "day.test", namesLongest, 1, ""},
		{"ip4", "long.test", 50 * time.Second, addressesMost, ""},
		{"ip4", "gone.test", 20 * time.Second, 0, DNSNotFound},
		{"ip4", "gone-day.test", absentLongest, 0, DNSNotFound},
		{"ip4", "gone-alias.test", 7 * time.Second, 0, DNSNotFound},
		{"ip4", "gone-mute.test", 0, 0, DNSNotFound},
		{"ip4", "broken.test", 0, 0, DNSFailed},
	} {
		r := s.resolver()
		now := time.Now()
		check := func(what string, at time.Time, asks bool) {
			t.Helper()
			before := len(s.questions())
			addrs, err := r.resolve(t.Context(), tt.network, tt.name, at)
			var refused *refusal
			if len(addrs) != tt.addrs || (err != nil) != (tt.reason != "") || err != nil && (!errors.As(err, &refused) || refused.reason != tt.reason) {
				t.Errorf("%s %s, %s: %v, %v", tt.network, tt.name, what, addrs, err)
			}
			if asked := s.questions()[before:]; (len(asked) > 0) != asks {
				t.Errorf("%s %s, %s: asked %v", tt.network, tt.name, what, asked)
			}
			if slices.Contains(addrs, netip.MustParseAddr(metadataHost)) {
				t.Errorf("%s: a forged answer was taken", tt.name)
			}
		}
		check("new", now, true)
		if tt.life > 0 {
			check("in its last moment", now.Add(tt.life-time.Nanosecond), false)
		}
		check("after it", now.Add(tt.life), true)
	}
}

func TestMemoryOfNamesIsBounded(t *testing.T) {
	s := startNameServer(t, func(m *dnsmessage.Message, _ bool) {
		m.Answers = []dnsmessage.Resource{address(m.Questions[0].Name.String(), outsideHost, 60)}
	})
	r := s.resolver()
	now := time.Now()
	for i := range namesMost + 100 {
		r.remember(question{"ip4", fmt.Sprintf("n%d.test", i)}, finding{expires: now.Add(time.Minute)}, now)
	}
	if _, err := r.resolve(t.Context(), "ip4", "last.test", now); err != nil {
		t.Fatal(err)
	}
	if n := len(r.known); n != namesMost {
		t.Errorf("%d names are remembered, want %d", n, namesMost)
	}
	if _, err := r.resolve(t.Context(), "ip4", "last.test", now); err != nil || len(s.questions()) != 1 {
		t.Errorf("the last name was forgotten: %v, %v", err, s.questions())
	}
	// What is over makes room first.
	r.remember(question{"ip4", "later.test"}, finding{expires: now.Add(time.Hour)}, now.Add(2*time.Minute))
	if n := len(r.known); n >= namesMost {
		t.Errorf("%d names, of which all but one are over", n)
	}
}

// At every moment of a rebinding the address is judged, remembered or not.
func TestRememberedAddressesAreJudgedAtEveryUse(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	now := time.Now()
	known := func(a string) {
		l.dialer.names.remember(question{"ip4", "www.lab.test"}, finding{addrs: []netip.Addr{netip.MustParseAddr(a)}, expires: now.Add(time.Hour)}, now)
	}
	raw := fmt.Sprintf("CONNECT www.lab.test:%d HTTP/1.0\r\n\r\n", at.Port())
	known(metadataHost)
	if status, body := ask(t, l.from("10.77.0.2"), raw); status != 403 || !strings.Contains(body, string(Metadata)) {
		t.Errorf("%d %s", status, body)
	}
	known(outsideHost)
	if status, body := ask(t, l.from("10.77.0.2"), raw); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	cfg := openConfig()
	cfg.Rules = append(cfg.Rules, Rule{Deny: []string{outsideHost + "/32"}})
	if err := l.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if status, body := ask(t, l.from("10.77.0.2"), raw); status != 403 || !strings.Contains(body, string(DeniedByRule)) {
		t.Errorf("%d %s", status, body)
	}
}

func TestManyAskAtOnce(t *testing.T) {
	s := startNameServer(t, func(m *dnsmessage.Message, _ bool) {
		m.Answers = []dnsmessage.Resource{address(m.Questions[0].Name.String(), outsideHost, 60)}
	})
	r := s.resolver()
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			if addrs, err := r.resolve(t.Context(), "ip4", fmt.Sprintf("n%d.test", i%4), time.Now()); err != nil || len(addrs) != 1 {
				t.Errorf("%v, %v", addrs, err)
			}
		})
	}
	all.Wait()
	before := len(s.questions())
	for i := range 4 {
		r.resolve(t.Context(), "ip4", fmt.Sprintf("n%d.test", i), time.Now())
	}
	if asked := s.questions()[before:]; len(asked) > 0 {
		t.Errorf("asked again: %v", asked)
	}
}

// Whatever a server sends, and in whatever pieces, no answer is good for longer than the sum of its parts.
func FuzzNameServersAnswer(f *testing.F) {
	q := dnsmessage.Question{Name: dnsmessage.MustNewName("a.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	for _, m := range []dnsmessage.Message{
		{Header: dnsmessage.Header{ID: 7, Response: true}, Questions: []dnsmessage.Question{q}, Answers: []dnsmessage.Resource{address("a.test.", outsideHost, 60)}},
		{Header: dnsmessage.Header{ID: 7, Response: true, RCode: dnsmessage.RCodeNameError}, Questions: []dnsmessage.Question{q}, Authorities: authority(60, 60)},
		{Header: dnsmessage.Header{ID: 7, Response: true}, Questions: []dnsmessage.Question{q}, Answers: []dnsmessage.Resource{alias("a.test.", "b.test.", 1), address("b.test.", outsideHost, 60)}},
	} {
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint8(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, piece uint8) {
		n := &note{lives: map[dnsmessage.Type]time.Duration{}}
		whole := talk{note: n, id: 7, question: q}
		whole.heard(b)
		life := n.life("ip4")
		// Slowly and obviously.
		var m dnsmessage.Message
		want := time.Duration(0)
		if m.Unpack(b) == nil && m.ID == 7 && m.Response && !m.Truncated && (m.RCode == 0 || m.RCode == dnsmessage.RCodeNameError) && len(m.Questions) > 0 &&
			strings.EqualFold(m.Questions[0].Name.String(), "a.test.") && m.Questions[0].Type == q.Type && m.Questions[0].Class == q.Class {
			found := false
			var ttls []uint32
			for _, a := range m.Answers {
				ttls = append(ttls, a.Header.TTL)
				found = found || a.Header.Type != dnsmessage.TypeCNAME
			}
			for _, a := range m.Authorities {
				if soa, ok := a.Body.(*dnsmessage.SOAResource); ok && !found {
					ttls = append(ttls, a.Header.TTL, soa.MinTTL)
					found = true
				}
			}
			if found && slices.Min(ttls) < 1<<31-1 {
				want = min(time.Duration(slices.Min(ttls))*time.Second, namesLongest)
			}
			// Lengths that do not add up are no answer here; the package unpacks some of them.
			if life != want && life != 0 {
				t.Errorf("%v, want %v or none: %v", life, want, m)
			}
			if again, err := m.Pack(); err == nil {
				proper := talk{note: &note{lives: map[dnsmessage.Type]time.Duration{}}, id: 7, question: q}
				if proper.heard(again); proper.note.life("ip4") != want {
					t.Errorf("packed again %v, want %v: %v", proper.note.life("ip4"), want, m)
				}
			}
		}
		// Over TCP, in pieces.
		in := append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
		if len(b) > 1<<16-1 {
			return
		}
		tcp := &stream{Conn: &trickle{b: in, most: int(piece)%7 + 1}, talk: talk{note: &note{lives: map[dnsmessage.Type]time.Duration{}}, id: 7, question: q}}
		io.Copy(io.Discard, struct{ io.Reader }{tcp})
		if got := tcp.note.life("ip4"); got != life {
			t.Errorf("over TCP %v, over UDP %v", got, life)
		}
	})
}

// trickle is a connection that gives a few bytes a read.
type trickle struct {
	net.Conn
	b    []byte
	most int
}

func (c *trickle) Read(b []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), c.most)], c.b)
	c.b = c.b[n:]
	return n, nil
}
