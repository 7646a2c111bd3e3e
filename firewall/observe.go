package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	nflog "github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// Opening is a window that the kernel opened. It is a claim: someone on the path can spend a token that he held back.
type Opening struct {
	Source     netip.Addr
	Port       uint16 // the source's; for a token sent from a WireGuard socket, the tunnel's outer port
	Credential uint32
	Sequence   bool
	Token      knock.Token // zero for a sequence
	At         time.Time
}

// headerBytes of a packet are enough for IPv6, UDP and a token.
const headerBytes = 96

// Observe calls opened for every opening and refused for some of what opened nothing, in order, until ctx ends. Ready is
// closed when the kernel's log is connected. Neither may block: what the log's buffer cannot hold is lost (and, after a flush by another tool, so are the unspent
// tokens of the running steps, since they can no longer be told from spent ones).
func (f *Firewall) Observe(ctx context.Context, group uint16, ready chan<- struct{}, opened func(Opening), refused func(Refusal)) error {
	l, err := nflog.Open(&nflog.Config{Group: group, Copymode: nflog.CopyPacket, Bufsize: headerBytes, QThresh: 1, NetNS: f.netns})
	if err != nil {
		return fmt.Errorf("open NFLOG group %d: %w", group, err)
	}
	defer l.Close()
	if err := l.Con.SetReadBuffer(4 << 20); err != nil {
		return fmt.Errorf("NFLOG group %d: %w", group, err)
	}
	broken := make(chan error, 1)
	var lately openedLately
	err = l.RegisterWithErrorFunc(ctx, func(a nflog.Attribute) int {
		if a.Payload == nil {
			return 0
		}
		var mark uint32
		if a.Mark != nil { // a mark of 0 is not reported
			mark = *a.Mark
		}
		o, ok := parseOpening(*a.Payload, mark, time.Now())
		switch {
		case !ok:
		case a.Prefix != nil && *a.Prefix != "":
			if r, ok := refusalOf(*a.Prefix, o); ok && !(r.Kind == TokenReplayed && lately.doubles(o)) {
				refused(r)
			}
		case mark != 0:
			f.opened(o)
			lately.add(o)
			opened(o)
		}
		return 0
	}, func(err error) int {
		switch {
		case ctx.Err() != nil:
			return 1
		case errors.Is(err, unix.ENOBUFS):
			f.missed()
			f.counter.Missed()
			f.log.Warn("openings were missed: the kernel's log outran the daemon", "group", group)
			return 0
		}
		select {
		case broken <- err:
		default:
		}
		return 1
	})
	if err != nil {
		return fmt.Errorf("NFLOG group %d: %w: is another program bound to it? set knock.log_group to a free number", group, err)
	}
	// What opened before the log was connected.
	f.mu.Lock()
	err = f.readBackLocked(time.Now())
	f.mu.Unlock()
	if err != nil {
		return err
	}
	close(ready)
	select {
	case <-ctx.Done():
		return nil
	case err := <-broken:
		return fmt.Errorf("NFLOG group %d: %w", group, err)
	}
}

// parseOpening reads source and token from the packet that opened a window. Offsets: RFC 791, RFC 8200, RFC 768.
func parseOpening(packet []byte, mark uint32, at time.Time) (o Opening, ok bool) {
	if len(packet) < 20 {
		return o, false
	}
	var proto byte
	var rest []byte
	switch packet[0] >> 4 {
	case 4:
		n := int(packet[0]&15) * 4
		if n < 20 || len(packet) < n {
			return o, false
		}
		o.Source, proto, rest = netip.AddrFrom4([4]byte(packet[12:16])), packet[9], packet[n:]
	case 6:
		if len(packet) < 40 {
			return o, false
		}
		// Behind extension headers the port and the token stay unknown; the source is what counts.
		o.Source, proto, rest = netip.AddrFrom16([16]byte(packet[8:24])), packet[6], packet[40:]
	default:
		return o, false
	}
	o.Credential, o.Sequence, o.At = mark&^knock.Complete, mark&knock.Complete != 0, at
	if len(rest) >= 2 && (proto == knock.TCP || proto == knock.UDP) {
		o.Port = binary.BigEndian.Uint16(rest)
	}
	if !o.Sequence && proto == knock.UDP && len(rest) >= 8+knock.TokenSize {
		o.Token = knock.Token(rest[8:])
	}
	return o, true
}
