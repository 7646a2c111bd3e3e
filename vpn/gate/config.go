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
	Kernel             bool // its WireGuard, instead of ours
	TunnelPort         uint16
	MTU                int
	Keepalive          time.Duration
	Max                time.Duration // a session's longest life
	Limit              int           // live sessions
	Devices            int           // live sessions of a certificate; one more replaces the oldest
	Proxy              netip.AddrPort
	Console            netip.AddrPort
	Services           []Service // besides proxy and console
	StatusFile         string    // see Tunnel.WriteStatus
}

// Service is a TCP port of the host, on the daemon's tunnel address, that members of groups reach. "*" is everybody; no group
// is nobody.
type Service struct {
	Port   uint16
	Groups []string
}
