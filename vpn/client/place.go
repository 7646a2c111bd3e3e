package client

import (
	"net"
	"net/netip"
	"time"
)

// place is where this machine is, as the gate sees it: the source address towards it. While a machine sleeps the wall
// clock goes on and the monotonic one does not.
type place struct {
	gate   netip.AddrPort
	source netip.Addr
	wall   time.Time
	awake  time.Duration
}

func newPlace(gate netip.AddrPort, wall time.Time, awake time.Duration) *place {
	return &place{gate, sourceTowards(gate), wall.Round(0), awake}
}

// moved tells of another network or a sleep since it was last asked. Awake is the monotonic clock's time.
func (p *place) moved(wall time.Time, awake time.Duration) bool {
	wall = wall.Round(0) // or the subtraction would use the monotonic clock
	slept := wall.Sub(p.wall)-(awake-p.awake) > 3*time.Second
	p.wall, p.awake = wall, awake
	source := sourceTowards(p.gate)
	if !source.IsValid() { // between networks: wait for the next
		return false
	}
	changed := source != p.source
	p.source = source
	return changed || slept
}

// sourceTowards asks the routes; nothing is sent.
func sourceTowards(gate netip.AddrPort) netip.Addr {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(gate))
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}
