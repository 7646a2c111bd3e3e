package client

import (
	"net/netip"
	"time"
)

// States of a tunnel, as status shows them.
const (
	Connecting = "connecting"
	Up         = "up"
	Retrying   = "retrying" // it was up, and does not answer
	Refused    = "refused"  // the gate refuses the certificate: nothing is tried any more, until the network changes
)

// Data says whether packets have come back through the tunnel.
const (
	DataUnknown   = "not yet confirmed"
	DataConfirmed = "confirmed"
	DataBlocked   = "no answer: UDP seems blocked"
)

// Modes of a tunnel.
const (
	ModeTUN      = "tun"      // a device of the system's
	ModeRootless = "rootless" // inside the process that keeps it
)

// Status is what `vpn status --json` prints.
type Status struct {
	State         string         `json:"state"` // connecting, up, retrying, refused; down when there is no process
	Profile       string         `json:"profile"`
	User          string         `json:"user"`
	Device        string         `json:"device,omitempty"`
	PID           int            `json:"pid,omitempty"`
	Listen        netip.AddrPort `json:"listen,omitzero"` // on this machine: proxy, PAC and console, for the user who raised the tunnel
	Mode          string         `json:"mode,omitempty"`  // tun, rootless
	Session       string         `json:"session,omitempty"`
	Interface     string         `json:"interface,omitempty"`
	Address       netip.Prefix   `json:"address,omitzero"`
	Proxy         netip.AddrPort `json:"proxy,omitzero"`
	Console       netip.AddrPort `json:"console,omitzero"`
	Gate          netip.AddrPort `json:"gate,omitzero"`
	Egress        []string       `json:"egress,omitempty"`
	PostQuantum   bool           `json:"post_quantum"`
	Data          string         `json:"data,omitempty"`
	Transport     string         `json:"transport,omitempty"` // udp; tls, where UDP does not pass
	Since         time.Time      `json:"since,omitzero"`
	Expires       time.Time      `json:"expires,omitzero"`
	LastHandshake time.Time      `json:"last_handshake,omitzero"`
	Received      uint64         `json:"received_bytes"`
	Sent          uint64         `json:"sent_bytes"`
	Problem       string         `json:"problem,omitempty"`

	URL string `json:"-"` // of the proxy on this machine, for who asked; it may hold a credential
}

// Status is a snapshot.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.Profile
	if k.profile != nil {
		p = k.profile
	}
	s := Status{State: k.state, Profile: p.Name(), User: p.User, Device: p.Device, Egress: p.Egress, Problem: k.problem}
	if s.Problem == "" {
		s.Problem = k.renewal
	}
	if s.State == "" {
		s.State = Connecting
	}
	if t := k.tunnel; t != nil {
		stats := t.Stats()
		if s.Mode = ModeTUN; t.Interface == "" {
			s.Mode = ModeRootless
		}
		s.Session, s.Interface, s.Address, s.Proxy, s.Console = t.Session.ID, t.Interface, t.Session.Address, t.Session.Proxy, t.Session.Console
		s.Gate, s.PostQuantum, s.Data, s.Since, s.Expires = t.Gate, t.PostQuantum, k.data, k.since, t.Session.Expires
		if s.Transport = "udp"; t.wire.onStream() {
			s.Transport = "tls"
		}
		s.LastHandshake, s.Received, s.Sent = stats.LastHandshake, stats.Received, stats.Sent
	}
	return s
}
