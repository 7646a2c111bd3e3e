// Package proxy is the forward proxy: it listens on the tunnel address, takes the source address for the identity, judges
// every destination against an access list that denies by default, and relays.
package proxy

import (
	"net/netip"
	"time"
)

// Rule denies or allows destinations. A rule with both, or with neither, is a configuration error. Patterns are exact
// names, "*.suffix", addresses and CIDRs, and sets: "@aws", "@customer-hosted", "@terraform", "@github".
type Rule struct {
	Deny   []string
	Except []string // names that a deny rule's sets would catch but should not
	Allow  []string
	Ports  []uint16 // empty with Deny: every port; empty with Allow: none
	Groups []string // "*" is every user; with Allow, empty Groups and Users is nobody; with Deny, everybody
	Users  []string
	TLS    bool // the tunnel must open with a ClientHello whose SNI is the destination
}

// Config is the proxy's part of the configuration. Its zero value allows nothing.
type Config struct {
	Listen             netip.AddrPort // the daemon's tunnel address and port
	Regions            []string       // AWS regions that sets expand to
	Observe            bool           // log what rules would refuse instead of refusing it
	Rules              []Rule
	AllowPrivate       []netip.Prefix // the only way past the always-refused ranges
	Bind               netip.Addr     // source of outgoing connections; zero: the route's choice
	IPv6               bool           // dial IPv6 too
	Idle               time.Duration
	Lifetime           time.Duration
	PerUserConnections int
}
