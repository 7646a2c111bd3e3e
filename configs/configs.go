// Package configs is the configuration file: its commented reference, and Parse, which turns the text into the packages'
// own types once, with every value checked. Nothing of a file with an error is used.
package configs

import (
	_ "embed"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"perimeterd/firewall"
	"perimeterd/proxy"
	"perimeterd/vpn/gate"
)

// DefaultPath is where the daemon's file lies.
const DefaultPath = "/etc/perimeterd/perimeterd.toml"

// Reference is the commented reference, which init fills in.
//
//go:embed perimeterd.toml
var Reference []byte

// Config is a file that was understood and checked. Paths are absolute.
type Config struct {
	File string // where it was read
	Dir  string // the file's directory
	Text []byte // the file
	Paths
	Endpoint string // gate.endpoint: HOST:PORT, TCP, where clients find the gate

	Gate     gate.Config
	Firewall firewall.Config // without GID and the sequences' credentials, which run gives
	Proxy    proxy.Config

	Identity Identity
	Knock    Knock
	Egress   Egress
	Console  Console
	Log      Log
}

// Identity names the files of the PKI. All but CAKey are the daemon's to read.
type Identity struct {
	CA, Cert, Key string
	CAKey         string // of the built-in CA; empty: the CA is another's
	CRL, Allowed  string // of another's CA; empty: none
	Master        string // knock master
	WireGuardKey  string
	ServerID      string
}

// External says whether the CA is another's, which issues certificates and revokes them.
func (i Identity) External() bool { return i.CAKey == "" }

// Knock is what the firewall's part does not hold.
type Knock struct {
	Tokens   bool
	Step     time.Duration
	Window   time.Duration
	LogGroup uint16
	// Users[i] is whom Firewall.Sequences[i] stands for; empty: it is shared.
	Users []string
}

// Egress is what the outside sees.
type Egress struct{ Public []netip.Prefix }

// Console is the page inside the tunnel.
type Console struct {
	Admins  []string // groups
	Metrics string   // HOST:PORT of /metrics; empty: off
}

// Log is how the daemon logs.
type Log struct {
	Level          slog.Level
	Format         string        // json or text
	SquidAccessLog string        // a path; empty: none
	AuditKeep      time.Duration // how long the audit's records stay
}

// Load reads and checks a file. Its errors are *Error.
func Load(path string) (*Config, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

func read(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		text := "cannot be read: " + err.Error()
		if errors.Is(err, fs.ErrNotExist) {
			text = "no such file: `perimeterd init` writes it, --config FILE names another"
		} else if errors.Is(err, fs.ErrPermission) {
			text = "permission denied: run it as root, or as a member of the file's group"
		}
		return nil, &Error{File: path, Problems: []Problem{{Text: text}}}
	}
	return data, nil
}
