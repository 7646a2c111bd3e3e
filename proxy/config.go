// Package proxy is the forward proxy: it listens on the tunnel address, takes the source address for the identity, judges
// every destination against an access list that denies by default, and relays.
//
// A request passes through one file after the other: head (strict reading of the request), destination (its one canonical
// form), acl (may this user go there), names, address and dial (where the name leads, judged), sni (is it TLS for that name),
// relay, park (where silent tunnels wait) and pace (who may have how much of the bandwidth), track (what lives, and what ends
// it early), log. Plain HTTP takes plain instead of sni and relay. Who is refused reads answer; pac tells browsers beforehand.
package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Rule denies or allows destinations. A rule with both, or with neither, is a configuration error. Patterns are exact
// names, "*.suffix", addresses and CIDRs, and sets: "@aws", "@customer-hosted", "@terraform", "@github".
//
// A CIDR that allows is meant for destinations given as an address; one that denies also catches every name that resolves
// into it.
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
	Own                []netip.Prefix // this host's addresses that no interface shows (EC2's public one); never dialed
	Bind               netip.Addr     // source of outgoing connections; zero: the route's choice
	IPv6               bool           // dial IPv6 too
	Idle               time.Duration
	Lifetime           time.Duration
	Connections        int // of all users together
	PerUserConnections int
	Bandwidth          uint64 // of all users together, bits a second each way; 0 is no limit
	PerUserBandwidth   uint64
}

// limits checks what Compile does not look at.
func (c Config) limits() error {
	var errs []error
	if c.Idle <= 0 {
		errs = append(errs, fmt.Errorf("proxy.idle %v: every connection would end at once: set a time, such as 15m", c.Idle))
	}
	if c.Lifetime <= 0 {
		errs = append(errs, fmt.Errorf("proxy.lifetime %v: every connection would end at once: set a time, such as 24h", c.Lifetime))
	}
	if c.Connections <= 0 {
		errs = append(errs, fmt.Errorf("proxy.connections %d: nobody could connect: set a number, such as 10000", c.Connections))
	}
	if c.PerUserConnections <= 0 {
		errs = append(errs, fmt.Errorf("proxy.per_user_connections %d: nobody could connect: set a number, such as 512", c.PerUserConnections))
	}
	if c.Bind.IsValid() && (c.Bind.IsUnspecified() || c.Bind.IsLoopback() || c.Bind.Zone() != "") {
		errs = append(errs, fmt.Errorf("egress.bind %v: not an address to reach others from: name one of this host's, or leave it empty", c.Bind))
	}
	return errors.Join(errs...)
}
