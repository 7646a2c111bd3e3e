package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	nflog "github.com/florianl/go-nflog/v2"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// Arrival is a packet of the traced source and how far it came.
type Arrival struct {
	At                  time.Time
	Source, Destination netip.AddrPort
	Proto               uint8  // knock.TCP, always a SYN, or knock.UDP
	Length              int    // UDP: of the payload, bytes
	Payload             []byte // UDP: its first bytes, a token whole
	Passed              bool   // our table let it through
	Delivered           bool   // so did every other table
}

// Rates of what Trace reports, packets a second.
const (
	traceOurs   = 20 // to the gate, the tunnel and knock ports
	traceOthers = 5
)

// traceWait is how long after its arrival a packet's fate is known.
const traceWait = 60 * time.Millisecond

// Trace calls fn for the SYNs and datagrams of one source, in order, until ctx ends; a tunnel's data is left out, and what
// comes faster than 25 packets a second. It uses a table of its own that belongs to its socket, so that the kernel
// removes it however this process ends. Ready is closed when it sees everything.
func Trace(ctx context.Context, netns int, cfg Config, source netip.Addr, ready chan<- struct{}, fn func(Arrival)) error {
	type sight struct {
		stage  byte
		packet string
	}
	sights := make(chan sight, 256)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	l, group, err := traceLog(ctx, netns, cfg.LogGroup, func(stage byte, packet []byte) {
		select {
		case sights <- sight{stage, string(packet)}:
		default: // bounded: what nobody keeps up with is not shown
		}
	})
	if err != nil {
		return err
	}
	defer l.Close()
	f := New(slog.New(slog.DiscardHandler), netns)
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.dropLocked()
	if err := f.traceTableLocked(cfg, source, group); err != nil {
		return fmt.Errorf("log the packets of %v: %w", source, err)
	}
	close(ready)

	type pending struct {
		packet string
		Arrival
	}
	var waiting []pending
	tick := time.NewTicker(traceWait / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-sights:
			if s.stage == 'a' {
				if a, ok := parseArrival([]byte(s.packet)); ok {
					a.At = time.Now()
					waiting = append(waiting, pending{s.packet, a})
				}
				break
			}
			for i := range waiting {
				w := &waiting[i]
				if w.packet == s.packet && (s.stage == 'p' && !w.Passed || s.stage == 'd' && !w.Delivered) {
					w.Passed, w.Delivered = true, w.Delivered || s.stage == 'd'
					break
				}
			}
		case now := <-tick.C:
			for len(waiting) > 0 && now.Sub(waiting[0].At) > traceWait {
				fn(waiting[0].Arrival)
				waiting = waiting[1:]
			}
		}
	}
}

// traceLog binds the next free group above the daemon's.
func traceLog(ctx context.Context, netns int, above uint16, fn func(stage byte, packet []byte)) (*nflog.Nflog, uint16, error) {
	var errs error
	for group := above + 1; group != above+9; group++ {
		l, err := nflog.Open(&nflog.Config{Group: group, Copymode: nflog.CopyPacket, Bufsize: headerBytes, QThresh: 1, NetNS: netns})
		if err != nil {
			return nil, 0, fmt.Errorf("open NFLOG: %w", err)
		}
		err = l.RegisterWithErrorFunc(ctx, func(a nflog.Attribute) int {
			if a.Payload != nil && a.Prefix != nil && *a.Prefix != "" {
				fn((*a.Prefix)[0], *a.Payload)
			}
			return 0
		}, func(error) int {
			if ctx.Err() != nil {
				return 1
			}
			return 0 // more than the buffer holds: packets are not shown
		})
		if err == nil {
			return l, group, nil
		}
		l.Close()
		errs = errors.Join(errs, fmt.Errorf("NFLOG group %d: %w", group, err))
	}
	return nil, 0, errs
}

// traceTableLocked logs packets at three places: before every firewall, behind our table, behind all others. What is
// logged at the first is remembered for a second, so that the others log the same packets and no more.
func (f *Firewall) traceTableLocked(cfg Config, source netip.Addr, group uint16) error {
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: fmt.Sprintf("%s_watch_%d", TableName, os.Getpid())}
	if err := f.batchLocked(rawMessage{kind: unix.NFT_MSG_NEWTABLE, flags: netlink.Create | netlink.Excl, attributes: []netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(table.Name + "\x00")}, {Type: unix.NFTA_TABLE_FLAGS, Data: network.PutUint32(tableOwner)}}}); err != nil {
		return err
	}
	return f.commitLocked(func(c *nftables.Conn) error {
		b := &builder{conn: c, table: table, sets: map[string]*nftables.Set{}, names: map[string]*nftables.Chain{}}
		packet := nftables.TypeInteger
		packet.Bytes = 8 // ports and sequence number, or ports, length and checksum
		b.set(&nftables.Set{Name: "seen", KeyType: packet, HasTimeout: true, Dynamic: true, Size: 4096, Timeout: time.Second})
		for name, at := range map[string]struct {
			hook     *nftables.ChainHook
			priority nftables.ChainPriority
		}{
			"arrived":   {nftables.ChainHookPrerouting, -310}, // fragments are put together at -400, raw is -300
			"passed":    {nftables.ChainHookInput, -4},        // ours is -5
			"delivered": {nftables.ChainHookInput, 400},
		} {
			b.names[name] = c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter,
				Hooknum: at.hook, Priority: &at.priority})
		}
		from := join(ipv6(), saddr6(), equal(source.AsSlice()))
		if source.Is4() {
			from = join(ipv4(), saddr4(), equal(source.AsSlice()))
		}
		id := transport(0, 8, regKey)
		log := func(stage string) match {
			return match{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_QTHRESHOLD | 1<<unix.NFTA_LOG_PREFIX,
				Group: group, QThreshold: 1, Data: []byte(stage)}}
		}
		arrive := func(perSecond uint64, which ...match) {
			b.rule("arrived", from, join(which...), match{rate(perSecond, expr.LimitTimeSecond, uint32(perSecond))}, id,
				match{&expr.Dynset{SrcRegKey: regKey, SetName: "seen", SetID: b.sets["seen"].ID, Operation: dynsetAdd}}, log("a"), accept())
		}
		udp := proto(unix.IPPROTO_UDP)
		tcpPorts, udpPorts := cfg.GatePorts, []uint16(nil)
		_, knocks, _ := knock.Compile(cfg.Sequences)
		for _, p := range knocks {
			if p.Proto == knock.TCP {
				tcpPorts = append(tcpPorts[:len(tcpPorts):len(tcpPorts)], p.Number)
			} else {
				udpPorts = append(udpPorts, p.Number)
			}
		}
		tunnel := network.PutUint16(cfg.TunnelPort)
		const data = 4 // type of WireGuard's data messages
		arrive(traceOurs, tcpSYN(expr.CmpOpEq), dport(), b.ports(tcpPorts))
		arrive(traceOurs, udp, dport(), equal(tunnel), transport(8, 1, regKey), differs([]byte{data}))
		if len(udpPorts) > 0 {
			arrive(traceOurs, udp, dport(), b.ports(udpPorts))
		}
		arrive(traceOthers, tcpSYN(expr.CmpOpEq))
		arrive(traceOthers, udp, dport(), differs(tunnel))
		b.rule("passed", from, id, b.lookup("seen"), log("p"))
		b.rule("delivered", from, id, b.lookup("seen"), log("d"))
		return b.err
	})
}

// parseArrival reads a packet's head: RFC 791, RFC 8200, RFC 768.
func parseArrival(packet []byte) (a Arrival, ok bool) {
	var rest []byte
	var from, to netip.Addr
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4:
		n := int(packet[0]&15) * 4
		if n < 20 || len(packet) < n {
			return a, false
		}
		from, to = netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
		a.Proto, rest = packet[9], packet[n:]
	case len(packet) >= 40 && packet[0]>>4 == 6:
		from, to = netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
		a.Proto, rest = packet[6], packet[40:]
	}
	if len(rest) < 8 || a.Proto != knock.TCP && a.Proto != knock.UDP {
		return a, false
	}
	a.Source = netip.AddrPortFrom(from, binary.BigEndian.Uint16(rest))
	a.Destination = netip.AddrPortFrom(to, binary.BigEndian.Uint16(rest[2:]))
	if a.Proto == knock.UDP {
		a.Length = max(int(binary.BigEndian.Uint16(rest[4:]))-8, 0)
		a.Payload = rest[8:min(len(rest), 8+a.Length)]
	}
	return a, true
}

// Present tells whether the daemon's table is in the kernel.
func (f *Firewall) Present() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, there, err := f.tableFlagsLocked()
	return there, err
}

// Spent tells whether a token was used, as long as the kernel remembers.
func (f *Firewall) Spent(t knock.Token) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	elements, err := f.elementsLocked("spent")
	for _, e := range elements {
		if string(e.Key) == string(t[:]) {
			return true, err
		}
	}
	return false, err
}
