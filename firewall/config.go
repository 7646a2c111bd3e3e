package firewall

import (
	"net/netip"
	"time"

	"perimeterd/knock"
)

// TableName is the one table that is ours, in family inet.
const TableName = "perimeterd"

// GateMark is what the gate chain puts on packets that may reach the gate's sockets: "gate" in ASCII.
const GateMark = 0x67617465

// Mode says what becomes of traffic that is not ours.
type Mode string

// Guard decides the ports of the daemon only and passes everything else on.
const Guard Mode = "guard"

// Config is what the table is compiled from. Its zero value opens nothing.
type Config struct {
	Mode         Mode
	GatePorts    []uint16     // TCP, the gate's listeners
	TunnelPort   uint16       // UDP, WireGuard and token knocks
	Interface    string       // the tunnel device
	Network      netip.Prefix // of the tunnel, IPv4; its first address is the daemon's
	InnerPorts   []uint16     // TCP, proxy and console, on the daemon's tunnel address
	Window       time.Duration
	Step         time.Duration // of tokens
	Sequences    []knock.Sequence
	LogGroup     uint16         // NFLOG
	GID          uint32         // whose outgoing connections the backstop judges
	Allow        []Allow        // in host mode
	Trusted      []netip.Prefix // sources that need no knock
	AllowPrivate []netip.Prefix
	Reach        []netip.AddrPort // private destinations that the daemon itself needs, such as resolvers
	EgressIPv6   bool
}

// Server is the daemon's own tunnel address.
func (c Config) Server() netip.Addr { return c.Network.Masked().Addr().Next() }
