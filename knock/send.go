package knock

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Gap is the pause between two knocks of a sequence: long enough that the network does not swap them.
const Gap = 15 * time.Millisecond

// Send knocks at addr's ports in order, gap apart, from source (the zero Addr: the route's choice). A refused or
// unanswered connection is what a knock looks like, so only what keeps a packet from being sent is an error.
func Send(ctx context.Context, source, addr netip.Addr, ports []Port, gap time.Duration) error {
	for i, p := range ports {
		if i > 0 {
			select {
			case <-time.After(gap):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		to := netip.AddrPortFrom(addr, p.Number)
		if p.Proto == UDP {
			if err := sendUDP(ctx, source, to); err != nil {
				return fmt.Errorf("knock at %v: %w", p, err)
			}
			continue
		}
		d := net.Dialer{}
		if source.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
		}
		// The SYN leaves at once; nobody waits for an answer. The socket lives past the first retransmission timeout
		// (RFC 6298: 1 s) only if the caller's context does, and a repeated SYN is a self-loop at the door.
		go func() {
			ctx, cancel := context.WithTimeout(ctx, 900*time.Millisecond)
			defer cancel()
			if c, err := d.DialContext(ctx, "tcp", to.String()); err == nil {
				c.Close()
			}
		}()
	}
	// Let the last SYN leave before the caller's context ends.
	select {
	case <-time.After(gap):
	case <-ctx.Done():
	}
	return nil
}

func sendUDP(ctx context.Context, source netip.Addr, to netip.AddrPort) error {
	d := net.Dialer{}
	if source.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	c, err := d.DialContext(ctx, "udp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write(nil)
	return err
}
