// Package client is the administrator's side: the profile, the knock, the session request and the tunnel. It imports
// nothing of the daemon.
package client

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/knock"
)

// ProfileVersion is the one format this package reads and writes.
const ProfileVersion = 1

// DefaultWindow is how long a knock opens the door where the profile does not say.
const DefaultWindow = 60 * time.Second

// maxProfile bounds a profile file, bytes; a real one has about 3,000.
const maxProfile = 64 << 10

// Profile is everything a user needs, in one TOML file, mode 0600.
type Profile struct {
	Version         int      `toml:"version"`
	User            string   `toml:"user"`
	Device          string   `toml:"device,omitempty"`
	Endpoints       []string `toml:"endpoints"`               // the gate, host:port, TCP; tried in order
	TunnelPort      uint16   `toml:"tunnel_port"`             // UDP: WireGuard and token knocks, on the endpoint's host
	ServerID        string   `toml:"server_id"`               // 32 hexadecimal digits; also the name in the gate's certificate
	ServerPublicKey string   `toml:"server_public_key"`       // base64, WireGuard
	KnockSecret     string   `toml:"knock_secret,omitempty"`  // base64, 32 bytes; empty: no token knock
	KnockStep       string   `toml:"knock_step,omitempty"`    // e.g. "30s"
	KnockWindow     string   `toml:"knock_window,omitempty"`  // how long a knock opens the door, e.g. "60s"; empty: DefaultWindow
	Sequence        []string `toml:"sequence,omitempty"`      // "7102", "19044/udp"
	Egress          []string `toml:"egress"`                  // CIDRs that the cloud sees
	CA              string   `toml:"ca,multiline"`            // PEM
	Certificate     string   `toml:"certificate,multiline"`   // PEM
	Key             string   `toml:"key,multiline,omitempty"` // PEM, PKCS #8; empty until Import joins it, where it was made by Enroll
	KeyID           string   `toml:"key_id,omitempty"`        // of the key that is missing: SHA-256 of its public key, 64 hexadecimal digits

	typed typed  // what ParseProfile made of the texts above
	file  string // where LoadProfile found it
}

type typed struct {
	serverID  knock.ServerID
	serverKey wgKey
	secret    []byte // empty: no token knock
	step      time.Duration
	window    time.Duration
	sequence  []knock.Port
	roots     *x509.CertPool
	identity  tls.Certificate
}

// safeName says whether s may become a file's name and an argument.
func safeName(s string) bool {
	for i := range len(s) {
		c := s[i] | 0x20 // lower case
		if !('a' <= c && c <= 'z' || '0' <= s[i] && s[i] <= '9' || strings.IndexByte("_@+", s[i]) >= 0 ||
			i > 0 && (s[i] == '.' || s[i] == '-')) {
			return false
		}
	}
	return 0 < len(s) && len(s) <= 64
}

// Name is the profile's name in lists and on disk: user, or user-device.
func (p *Profile) Name() string {
	if p.Device == "" {
		return p.User
	}
	return p.User + "-" + p.Device
}

// Expires is when the certificate ends.
func (p *Profile) Expires() time.Time { return p.typed.identity.Leaf.NotAfter }

// Window is how long a knock opens the door.
func (p *Profile) Window() time.Duration { return p.typed.window }

// errNotWhole is all that a person can do about a file that is no profile, or a part of one.
var errNotWhole = errors.New("truncated or not a profile: ask the operator for it again")

// ParseProfile reads a profile's text. An unknown key, a missing value and one that cannot work are errors.
func ParseProfile(text []byte) (*Profile, error) {
	p := &Profile{}
	dec := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := dec.Decode(p); err != nil {
		// Keys and positions only: the decoder's picture of the place could show lines of the private key.
		var unknown *toml.StrictMissingError
		if errors.As(err, &unknown) {
			var keys []string
			for _, e := range unknown.Errors {
				row, _ := e.Position()
				keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(e.Key(), "."), row))
			}
			return nil, fmt.Errorf("unknown keys: %s: correct them, or update this client", strings.Join(keys, ", "))
		}
		var syntax *toml.DecodeError
		if errors.As(err, &syntax) {
			row, _ := syntax.Position()
			if key := strings.Join(syntax.Key(), "."); key != "" {
				return nil, fmt.Errorf("line %d, %s: %w", row, key, errNotWhole)
			}
			return nil, fmt.Errorf("line %d: %w", row, errNotWhole)
		}
		return nil, errNotWhole
	}
	if p.Key == "" && p.KeyID == "" { // the last ones written: a file cut off between two keys is good TOML
		return nil, fmt.Errorf("line %d: it ends without a key: %w", 1+bytes.Count(text, []byte("\n")), errNotWhole)
	}
	if err := p.decode(); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Profile) decode() error {
	if p.Version != ProfileVersion {
		return fmt.Errorf("version = %d: this client reads version %d: update the client, or ask for a new profile", p.Version, ProfileVersion)
	}
	if !safeName(p.User) {
		return fmt.Errorf("user = %q: want 1 to 64 letters, digits and . _ @ + -, not beginning with . or -", p.User)
	}
	if p.Device != "" && !safeName(p.Device) {
		return fmt.Errorf("device = %q: want 1 to 64 letters, digits and . _ @ + -, not beginning with . or -", p.Device)
	}
	if len(p.Endpoints) == 0 || len(p.Endpoints) > 8 {
		return fmt.Errorf("endpoints: %d of them: want 1 to 8, as in [\"bastion.example.com:1194\"]", len(p.Endpoints))
	}
	for _, e := range p.Endpoints {
		if _, _, err := splitEndpoint(e); err != nil {
			return fmt.Errorf("endpoints: %w", err)
		}
	}
	if p.TunnelPort == 0 {
		return errors.New("tunnel_port = 0: want the gate's UDP port, usually 1194")
	}
	id, err := hex.DecodeString(p.ServerID)
	if err != nil || len(id) != len(p.typed.serverID) || strings.ToLower(p.ServerID) != p.ServerID {
		return fmt.Errorf("server_id = %q: want 32 hexadecimal digits in lower case", p.ServerID)
	}
	p.typed.serverID = knock.ServerID(id)
	if p.typed.serverKey, err = parseKey(p.ServerPublicKey); err != nil {
		return fmt.Errorf("server_public_key: %w", err)
	}
	if err := p.decodeKnock(); err != nil {
		return err
	}
	for _, e := range p.Egress {
		if _, err := netip.ParsePrefix(e); err != nil {
			return fmt.Errorf("egress = %q: want a CIDR, as in 203.0.113.10/32", e)
		}
	}
	p.typed.roots = x509.NewCertPool()
	if !p.typed.roots.AppendCertsFromPEM([]byte(p.CA)) {
		return errors.New("ca: no certificate in it: want the gate's CA in PEM")
	}
	if p.Key == "" {
		return p.decodeKeyless()
	}
	if p.KeyID != "" {
		return errors.New("key and key_id: want one of them: ask the operator for the profile again")
	}
	// A pair that does not match would only show at the gate, as a refused certificate.
	if p.typed.identity, err = tls.X509KeyPair([]byte(p.Certificate), []byte(p.Key)); err != nil {
		return fmt.Errorf("certificate and key: %w", err)
	}
	return nil
}

func (p *Profile) decodeKnock() (err error) {
	if p.KnockSecret != "" {
		key, err := parseKey(p.KnockSecret)
		if err != nil {
			return errors.New("knock_secret: want 32 bytes in base64") // never its value
		}
		p.typed.secret = key[:]
		p.typed.step, err = time.ParseDuration(p.KnockStep)
		if err != nil || p.typed.step < knock.MinStep || p.typed.step > time.Hour {
			return fmt.Errorf("knock_step = %q: want a duration from %v to 1h, as in 30s", p.KnockStep, knock.MinStep)
		}
	}
	p.typed.window = DefaultWindow
	if p.KnockWindow != "" {
		p.typed.window, err = time.ParseDuration(p.KnockWindow)
		if err != nil || p.typed.window < time.Second || p.typed.window > 24*time.Hour {
			return fmt.Errorf("knock_window = %q: want a duration from 1s to 24h, as in 60s", p.KnockWindow)
		}
	}
	if len(p.Sequence) > 32 {
		return fmt.Errorf("sequence: %d ports: want at most 32", len(p.Sequence))
	}
	for _, s := range p.Sequence {
		port, err := knock.ParsePort(s)
		if err != nil {
			return fmt.Errorf("sequence: %w", err)
		}
		p.typed.sequence = append(p.typed.sequence, port)
	}
	return nil
}

func splitEndpoint(s string) (host string, port uint16, err error) {
	host, digits, err := net.SplitHostPort(s)
	n, err2 := strconv.ParseUint(digits, 10, 16)
	if err != nil || err2 != nil || n == 0 || host == "" || len(host) > 253 {
		return "", 0, fmt.Errorf("%q: want HOST:PORT, as in bastion.example.com:1194", s)
	}
	return host, uint16(n), nil
}

// wgKey is a WireGuard key or a preshared key.
type wgKey [32]byte

func parseKey(s string) (k wgKey, err error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(k) {
		return k, errors.New("want 32 bytes in base64")
	}
	return wgKey(b), nil
}

func (k wgKey) hex() string { return hex.EncodeToString(k[:]) }

// LoadProfile reads the profile of that name in Dir, or the file, if what is given has a path separator or ends in
// .profile. Empty means the default: the one that `vpn use` chose, else the only one. Others than the owner must not be
// able to read the file: it holds a key.
func LoadProfile(nameOrFile string) (*Profile, error) {
	file, err := findProfile(nameOrFile)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, profileMissing(nameOrFile, err)
	}
	defer f.Close()
	if err := checkPrivate(f); err != nil {
		return nil, fmt.Errorf("profile %s: %w: run: chmod 600 %s", file, err, shellQuote(file))
	}
	text, err := readBounded(f)
	if err != nil {
		return nil, fmt.Errorf("profile %s: %w", file, err)
	}
	if isEncrypted(text) {
		return nil, fmt.Errorf("profile %s is protected by a passphrase: run: vpn import %s", file, shellQuote(file))
	}
	p, err := ParseProfile(text)
	if err != nil {
		return nil, fmt.Errorf("profile %s: %w", file, err)
	}
	if p.Key == "" {
		return nil, fmt.Errorf("profile %s: its key is with who made the request: there, run: vpn import %s", file, shellQuote(file))
	}
	if p.file, err = filepath.Abs(file); err == nil { // a renewal replaces the file, and no link to it
		p.file, err = filepath.EvalSymlinks(p.file)
	}
	return p, err
}

func readBounded(r io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxProfile+1))
	if err == nil && len(text) > maxProfile {
		err = fmt.Errorf("longer than %d bytes: this is no profile", maxProfile)
	}
	return text, err
}

func findProfile(nameOrFile string) (string, error) {
	if strings.ContainsRune(nameOrFile, filepath.Separator) || strings.HasSuffix(nameOrFile, ".profile") {
		return nameOrFile, nil
	}
	dir, err := Dir()
	if err != nil {
		return "", err
	}
	name := nameOrFile
	if name == "" {
		if name, err = defaultName(dir); err != nil {
			return "", err
		}
	}
	if !safeName(name) {
		return "", fmt.Errorf("profile %q: want a name as in `vpn import` printed it, or a file", name)
	}
	return filepath.Join(dir, name+".profile"), nil
}

func profileMissing(name string, err error) error {
	if !errors.Is(err, os.ErrNotExist) || name == "" {
		return fmt.Errorf("profile: %w", err)
	}
	return fmt.Errorf("no profile %q: import it: vpn import FILE", name)
}

// shellQuote makes s one word of a POSIX shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
