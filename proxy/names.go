package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	namesMost     = 4096             // that are remembered; a full memory forgets any of them
	namesLongest  = time.Hour        // a name is remembered, whatever its TTL says
	absentLongest = 30 * time.Second // the same of a name that does not exist: somebody is just making it
	addressesMost = 64               // of one name
)

// resolver is Go's own, with a memory. Go's reads /etc/hosts, follows resolv.conf and its options, asks one server after the
// other and goes over to TCP where an answer is long; only how long an answer is good for, it keeps to itself. So what passes
// on its connections is read here too. What is remembered is judged at every use, like what is new.
type resolver struct {
	system *net.Resolver
	dial   func(ctx context.Context, network, address string) (net.Conn, error)

	mu    sync.Mutex
	known map[question]finding
}

type question struct{ network, name string }

// finding is what a question led to: addresses, or a *refusal.
type finding struct {
	addrs   []netip.Addr
	err     error
	expires time.Time
}

func newResolver() *resolver {
	r := &resolver{dial: new(net.Dialer).DialContext, known: map[question]finding{}}
	r.system = &net.Resolver{PreferGo: true, Dial: r.listen}
	return r
}

// resolve returns the addresses of a name, network "ip4" or "ip". The error is a *refusal.
func (r *resolver) resolve(ctx context.Context, network, name string, now time.Time) ([]netip.Addr, error) {
	q := question{network, name}
	r.mu.Lock()
	f, ok := r.known[q]
	r.mu.Unlock()
	if ok && now.Before(f.expires) {
		return f.addrs, f.err
	}
	n := &note{lives: map[dnsmessage.Type]time.Duration{}}
	addrs, err := r.lookup(context.WithValue(ctx, noteKey{}, n), network, name)
	for i, a := range addrs {
		addrs[i] = a.Unmap().WithZone("")
	}
	f = finding{addrs: addrs[:min(len(addrs), addressesMost)], err: lookupRefusal(ctx, err)}
	life := n.life(network)
	var refused *refusal
	if errors.As(f.err, &refused) {
		if life = min(life, absentLongest); refused.reason != DNSNotFound {
			life = 0
		}
	}
	if life > 0 {
		f.expires = now.Add(life)
		r.remember(q, f, now)
	}
	return f.addrs, f.err
}

func (r *resolver) remember(q question, f finding, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.known, q)
	if len(r.known) == namesMost {
		for old, of := range r.known {
			// All that are over, or at least one.
			if delete(r.known, old); now.Before(of.expires) {
				break
			}
		}
	}
	r.known[q] = f
}

// lookup asks for the name and no longer one: the last dot keeps resolv.conf's search list out, of which the policy knows
// nothing. Written so, Go does not find a single label in /etc/hosts, hence the first look.
func (r *resolver) lookup(ctx context.Context, network, name string) ([]netip.Addr, error) {
	if !strings.Contains(name, ".") {
		hosts := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("only /etc/hosts is asked")
		}}
		if addrs, err := hosts.LookupNetIP(ctx, network, name); err == nil {
			return addrs, nil
		}
	}
	return r.system.LookupNetIP(ctx, network, name+".")
}

func lookupRefusal(ctx context.Context, err error) error {
	var de *net.DNSError
	var ae *net.AddrError // no address of the network asked for
	switch {
	case err == nil:
		return nil
	case errors.As(err, &de) && de.IsNotFound, errors.As(err, &ae):
		return &refusal{reason: DNSNotFound, cause: err}
	case errors.As(err, &de) && de.IsTimeout || ctx.Err() != nil:
		return &refusal{reason: DNSTimeout, cause: err}
	}
	return &refusal{reason: DNSFailed, cause: err}
}

// note takes down, by type of the question, how long the last answer to it is good for.
type note struct {
	mu    sync.Mutex
	lives map[dnsmessage.Type]time.Duration
}

type noteKey struct{}

func (n *note) put(t dnsmessage.Type, life time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lives[t] = life
}

// life is the shortest of all questions that a lookup asks. It is zero if one has no answer: from /etc/hosts, or from a
// lookup that another one began.
func (n *note) life(network string) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	life := min(n.lives[dnsmessage.TypeA], namesLongest)
	if network == "ip" {
		life = min(life, n.lives[dnsmessage.TypeAAAA])
	}
	return life
}

// listen is the system resolver's way to a name server.
func (r *resolver) listen(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := r.dial(ctx, network, address)
	n, ok := ctx.Value(noteKey{}).(*note)
	if err != nil || !ok {
		return c, err
	}
	if u, ok := c.(*net.UDPConn); ok {
		return &datagrams{UDPConn: u, talk: talk{note: n}}, nil
	}
	return &stream{Conn: c, talk: talk{note: n}}, nil
}

// talk is one question to a server and the answers to it. Go looks for the same two things in an answer: id and question.
type talk struct {
	note     *note
	id       uint16
	question dnsmessage.Question
}

func (t *talk) asked(query []byte) {
	var p dnsmessage.Parser
	if h, err := p.Start(query); err == nil {
		t.id = h.ID
		t.question, _ = p.Question()
	}
}

func (t *talk) heard(answer []byte) {
	var p dnsmessage.Parser
	h, err := p.Start(answer)
	if err != nil || !h.Response || h.ID != t.id {
		return
	}
	q, err := p.Question()
	if err != nil || q.Type != t.question.Type || q.Class != t.question.Class || !strings.EqualFold(q.Name.String(), t.question.Name.String()) {
		return
	}
	life := time.Duration(0)
	if !h.Truncated && (h.RCode == dnsmessage.RCodeSuccess || h.RCode == dnsmessage.RCodeNameError) {
		life = lifeOf(&p)
	}
	t.note.put(q.Type, life)
}

// lifeOf is the shortest TTL of the answers, the aliases on the way included; without any, what the zone's SOA says of names
// that do not exist (RFC 2308, 5). Zero is an answer not to be remembered, or not to be understood.
func lifeOf(p *dnsmessage.Parser) time.Duration {
	if p.SkipAllQuestions() != nil {
		return 0
	}
	seconds, found := uint32(1<<31-1), false
	for {
		h, err := p.AnswerHeader()
		if err == dnsmessage.ErrSectionDone {
			break
		}
		if err != nil || p.SkipAnswer() != nil {
			return 0
		}
		seconds = min(seconds, h.TTL)
		found = found || h.Type != dnsmessage.TypeCNAME
	}
	for !found {
		h, err := p.AuthorityHeader()
		switch {
		case err != nil:
			return 0
		case h.Type != dnsmessage.TypeSOA:
			if p.SkipAuthority() != nil {
				return 0
			}
			continue
		}
		soa, err := p.SOAResource()
		if err != nil {
			return 0
		}
		seconds, found = min(seconds, h.TTL, soa.MinTTL), true
	}
	if seconds >= 1<<31-1 { // RFC 2181, 8: the first bit set is zero
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// datagrams is a talk over UDP: one message a call (net.Resolver's Dial, RFC 1035, 4.2.1).
type datagrams struct {
	*net.UDPConn
	talk
}

func (d *datagrams) Write(b []byte) (int, error) {
	d.asked(b)
	return d.UDPConn.Write(b)
}

func (d *datagrams) Read(b []byte) (int, error) {
	n, err := d.UDPConn.Read(b)
	d.heard(b[:n])
	return n, err
}

// stream is a talk over TCP: messages after their lengths (RFC 1035, 4.2.2).
type stream struct {
	net.Conn
	talk
	in []byte
}

func (s *stream) Write(b []byte) (int, error) {
	if len(b) > 2 {
		s.asked(b[2:])
	}
	return s.Conn.Write(b)
}

func (s *stream) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	for s.in = append(s.in, b[:n]...); len(s.in) >= 2; {
		end := 2 + int(binary.BigEndian.Uint16(s.in))
		if len(s.in) < end {
			break
		}
		s.heard(s.in[2:end])
		s.in = s.in[end:]
	}
	return n, err
}
