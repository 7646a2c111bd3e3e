package gate

import (
	"net/netip"
	"time"
)

// Config is the gate's and the tunnel's part of the configuration.
type Config struct {
	Listen             []string // TCP addresses as net.Listen takes them
	Endpoint           string   // host:port that clients are told, UDP
	RequirePostQuantum bool
	Network            netip.Prefix // of the tunnel, IPv4; the first address is the daemon's
	Interface          string
	TunnelPort         uint16
	MTU                int
	Keepalive          time.Duration
	Max                time.Duration // a session's longest life
	Limit              int           // live sessions
	Devices            int           // live sessions of a certificate; one more replaces the oldest
	Proxy              netip.AddrPort
	Console            netip.AddrPort
}
