//go:build linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Query is one question that the DNS server was asked.
type Query struct {
	At   time.Time
	From netip.AddrPort
	Name string // lower case, without the last dot
	Type dnsmessage.Type
}

const (
	maxLog   = 1 << 14 // entries a log keeps; the older half goes first
	shortTTL = 1       // seconds, so that a changed record counts soon
)

// DNS answers A and AAAA questions for the records it was given, over UDP and TCP. What does not exist is told with an SOA,
// whose minimum is the TTL.
type DNS struct {
	mu      sync.Mutex
	records map[string][][]netip.Addr // answers in turn
	ttl     uint32
	queries []Query
}

// Set gives a name its addresses, of both families, replacing what it had; without addresses the name no longer exists. The
// first label may be *, for all names that have no record of their own.
func (d *DNS) Set(name string, addrs ...netip.Addr) {
	if len(addrs) == 0 {
		d.SetInTurn(name)
		return
	}
	d.SetInTurn(name, addrs)
}

// SetInTurn gives a name other addresses with every question for them; the last answer stays.
func (d *DNS) SetInTurn(name string, answers ...[]netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if len(answers) == 0 {
		delete(d.records, name)
		return
	}
	d.records[name] = slices.Clone(answers)
}

// SetTTL is for all answers from now on, in seconds. It begins as one.
func (d *DNS) SetTTL(seconds uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ttl = seconds
}

// Queries returns what was asked, oldest first.
func (d *DNS) Queries() []Query {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.queries)
}

// lookup notes the question and finds the addresses; exists is false for a name without any record.
func (d *DNS) lookup(q Query) (addrs []netip.Addr, exists bool, ttl uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queries = appendBounded(d.queries, q)
	name := q.Name
	answers, exists := d.records[name]
	if _, parent, ok := strings.Cut(name, "."); ok && !exists {
		name = "*." + parent
		answers, exists = d.records[name]
	}
	if !exists {
		return nil, false, d.ttl
	}
	if q.Type == dnsmessage.TypeA && len(answers) > 1 {
		d.records[name] = answers[1:]
	}
	return slices.Clone(answers[0]), true, d.ttl
}

func appendBounded[T any](log []T, entry T) []T {
	if len(log) >= maxLog {
		log = append(log[:0:0], log[maxLog/2:]...)
	}
	return append(log, entry)
}

// answer makes the response to a query, of at most limit bytes; if that is too few for the addresses, it says so and the
// client asks again by TCP. An error means that there is nothing to respond to.
func (d *DNS) answer(query []byte, from netip.AddrPort, limit int) ([]byte, error) {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	if h.Response {
		return nil, errors.New("a response, not a query")
	}
	reply := dnsmessage.Message{Header: dnsmessage.Header{
		ID: h.ID, Response: true, OpCode: h.OpCode, Authoritative: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true,
	}}
	q, err := p.Question()
	if err != nil || h.OpCode != 0 || q.Class != dnsmessage.ClassINET {
		reply.RCode = dnsmessage.RCodeRefused
		return reply.Pack()
	}
	reply.Questions = []dnsmessage.Question{q}
	addrs, exists, ttl := d.lookup(Query{
		At: time.Now(), From: from, Name: strings.ToLower(strings.TrimSuffix(q.Name.String(), ".")), Type: q.Type,
	})
	if !exists {
		reply.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		header := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: ttl}
		switch {
		case q.Type == dnsmessage.TypeA && a.Is4():
			reply.Answers = append(reply.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: a.As4()}})
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			reply.Answers = append(reply.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	if len(reply.Answers) == 0 {
		root := dnsmessage.MustNewName(".")
		reply.Authorities = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: root, Type: dnsmessage.TypeSOA, Class: q.Class, TTL: ttl},
			Body:   &dnsmessage.SOAResource{NS: root, MBox: root, MinTTL: ttl},
		}}
	}
	packed, err := reply.Pack()
	if err != nil || len(packed) <= limit {
		return packed, err
	}
	reply.Truncated, reply.Answers = true, nil
	return reply.Pack()
}

// start answers on port 53 of the addresses, and returns what stops it.
func (d *DNS) start(ns *Namespace, addrs ...netip.Addr) (stop func() error, err error) {
	var open []io.Closer
	var running sync.WaitGroup
	stop = func() error {
		var errs []error
		for _, c := range open {
			errs = append(errs, c.Close())
		}
		running.Wait()
		return errors.Join(errs...)
	}
	for _, a := range addrs {
		at := netip.AddrPortFrom(a, 53).String()
		udp, err := ns.ListenPacket("udp", at)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("dns: %w", err), stop())
		}
		open = append(open, udp)
		tcp, err := ns.Listen("tcp", at)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("dns: %w", err), stop())
		}
		open = append(open, tcp)
		running.Go(func() { d.serveUDP(udp.(*net.UDPConn)) })
		running.Go(func() { d.serveTCP(tcp) })
	}
	return stop, nil
}

func (d *DNS) serveUDP(c *net.UDPConn) {
	buf := make([]byte, 4096)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if reply, err := d.answer(buf[:n], from, 512); err == nil {
			c.WriteToUDPAddrPort(reply, from) // who does not get it asks again
		}
	}
}

func (d *DNS) serveTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			var size [2]byte
			for {
				if _, err := io.ReadFull(c, size[:]); err != nil {
					return
				}
				query := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(c, query); err != nil {
					return
				}
				reply, err := d.answer(query, from, 0xffff)
				if err != nil {
					return
				}
				if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)); err != nil {
					return
				}
			}
		}()
	}
}
