// Package client is the administrator's side: the profile, the knock, the session request and the tunnel. It imports
// nothing of the daemon.
package client

// ProfileVersion is the one format this package reads and writes.
const ProfileVersion = 1

// Profile is everything a user needs, in one TOML file, mode 0600.
type Profile struct {
	Version         int      `toml:"version"`
	User            string   `toml:"user"`
	Device          string   `toml:"device,omitempty"`
	Endpoints       []string `toml:"endpoints"`              // the gate, host:port, TCP; tried in order
	TunnelPort      uint16   `toml:"tunnel_port"`            // UDP: WireGuard and token knocks, on the endpoint's host
	ServerID        string   `toml:"server_id"`              // 32 hexadecimal digits; also the name in the gate's certificate
	ServerPublicKey string   `toml:"server_public_key"`      // base64, WireGuard
	KnockSecret     string   `toml:"knock_secret,omitempty"` // base64, 32 bytes; empty: no token knock
	KnockStep       string   `toml:"knock_step,omitempty"`   // e.g. "30s"
	Sequence        []string `toml:"sequence,omitempty"`     // "7102", "19044/udp"
	Egress          []string `toml:"egress"`                 // CIDRs that the cloud sees
	CA              string   `toml:"ca"`                     // PEM
	Certificate     string   `toml:"certificate"`            // PEM
	Key             string   `toml:"key"`                    // PEM, PKCS #8
}
