package configs

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/firewall"
	"perimeterd/proxy"
	"perimeterd/vpn/gate"
)

// Parse reads a file's text; name is its path, which relative paths in it go by. Its errors are *Error and hold every
// problem found, not only the first.
func Parse(name string, data []byte) (*Config, error) {
	data = bytes.Clone(data) // the decoder keeps pieces of it
	p := &parser{file: name, data: data, raw: defaults()}
	d := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	err := d.Decode(&p.raw)
	var unknown *toml.StrictMissingError
	var syntax *toml.DecodeError
	switch {
	case err == nil:
	case errors.As(err, &unknown):
		for _, e := range unknown.Errors {
			p.unknown(&e)
		}
	case errors.As(err, &syntax):
		line, column := syntax.Position()
		p.problems = append(p.problems, Problem{line, syntaxText(syntax), excerpt(data, line, column, 1)})
		return nil, p.failed() // what follows was not read
	default:
		p.problems = append(p.problems, Problem{Text: err.Error()})
		return nil, p.failed()
	}
	p.lines = keyLines(data)
	p.raw.setSliceDefaults(func(k string) bool { _, has := p.lines[k]; return has })
	p.refuseMissing()
	c := p.config()
	if len(p.problems) > 0 {
		return nil, p.failed()
	}
	return c, nil
}

type parser struct {
	file     string
	data     []byte
	raw      raw
	lines    map[string]int
	problems []Problem
}

func (p *parser) failed() error {
	slices.SortStableFunc(p.problems, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return &Error{File: p.file, Problems: p.problems}
}

func (p *parser) unknown(e *toml.DecodeError) {
	line, column := e.Position()
	k := e.Key()
	p.problems = append(p.problems, Problem{line,
		fmt.Sprintf("%s: unknown: %s", strings.Join(k, "."), keysOf(k[:len(k)-1])),
		excerpt(p.data, line, column, len(k[len(k)-1]))})
}

var wrongType = regexp.MustCompile(`^toml: cannot decode TOML (.*) into .* of type (\S+)$`)

// syntaxText says in the file's words what the decoder says in Go's.
func syntaxText(e *toml.DecodeError) string {
	text := strings.TrimPrefix(e.Error(), "toml: ")
	m := wrongType.FindStringSubmatch(e.Error())
	if m == nil {
		return text
	}
	want, known := map[string]string{
		"string": "a text in quotes", "bool": "true or false", "int64": "a number",
		"[]string": `a list of texts, as in ["a", "b"]`, "[]int64": "a list of numbers, as in [443]",
	}[m[2]]
	if !known {
		return text
	}
	return fmt.Sprintf("%s: a TOML %s: want %s", strings.Join(e.Key(), "."), m[1], want)
}

// bad notes a problem of a key, at the line of the key or of the table it is missing from.
func (p *parser) bad(key, format string, a ...any) {
	line := 0
	for k := key; ; {
		if l, known := p.lines[k]; known {
			line = l
			break
		}
		i := strings.LastIndexAny(k, ".[")
		if i < 0 {
			break
		}
		k = k[:i]
	}
	p.problems = append(p.problems, Problem{Line: line, Text: fmt.Sprintf(format, a...)})
}

func (p *parser) config() *Config {
	r := &p.raw
	dir, err := filepath.Abs(filepath.Dir(p.file))
	if err != nil {
		p.bad("", "%v", err)
	}
	c := &Config{
		File: p.file, Dir: dir, Text: p.data,
		Paths:    Paths{StateDir: p.directory("state_dir", r.StateDir), RunDir: p.directory("run_dir", r.RunDir)},
		Endpoint: r.Gate.Endpoint,
		Console:  Console{Admins: r.Console.Admins, Metrics: p.metrics(r.Console.Metrics)},
		Egress:   Egress{Public: p.prefixes("egress.public", r.Egress.Public)},
	}
	beside := func(key, path string) string {
		if path == "" {
			p.bad(key, `%s "": no path: write "pki/..." to have it beside this file`, key)
			return ""
		}
		if filepath.IsAbs(path) {
			return filepath.Clean(path)
		}
		return filepath.Join(dir, path)
	}
	c.Identity = Identity{
		CA:   beside("identity.ca", r.Identity.CA),
		Cert: beside("identity.cert", r.Identity.Cert), Key: beside("identity.key", r.Identity.Key),
		Master:       filepath.Join(dir, "pki", "knock.master"),
		WireGuardKey: filepath.Join(dir, "pki", "wireguard.key"),
		ServerID:     filepath.Join(dir, "pki", "server.id"),
	}
	if r.Identity.CAKey != "" {
		c.Identity.CAKey = beside("identity.ca_key", r.Identity.CAKey)
	}
	c.Identity.CRL, c.Identity.Allowed = r.Identity.CRL, r.Identity.Allowed
	for _, f := range []struct {
		key  string
		path *string
	}{{"identity.crl", &c.Identity.CRL}, {"identity.allowed", &c.Identity.Allowed}} {
		switch {
		case *f.path == "":
		case c.Identity.External():
			*f.path = beside(f.key, *f.path)
		default:
			p.bad(f.key, `%s %q: the built-in CA needs none, as its users are entered and revoked here: leave it empty, or write ca_key = "" if the CA is another's`,
				f.key, *f.path)
		}
	}

	network := p.network(r.Tunnel.Network)
	server := network.Addr().Next()
	if b := r.Tunnel.Backend; b != "userspace" && b != "kernel" {
		p.bad("tunnel.backend", "tunnel.backend %q: want userspace or kernel", b)
	}
	tunnelPort := p.port("tunnel.port", r.Tunnel.Port)
	proxyPort, consolePort := p.port("proxy.port", r.Proxy.Port), p.port("console.port", r.Console.Port)
	if proxyPort == consolePort {
		p.bad("console.port", "console.port %d: proxy.port has it, on the same address: choose another", consolePort)
	}
	gatePorts := p.listen(r.Gate.Listen)
	for _, inner := range []uint16{proxyPort, consolePort} {
		if slices.Contains(gatePorts, inner) {
			p.bad("gate.listen", "gate.listen %q: port %d is the proxy's or the console's too, on the tunnel address: choose another", r.Gate.Listen, inner)
		}
	}
	c.Gate = gate.Config{
		Listen:             r.Gate.Listen,
		Endpoint:           net.JoinHostPort(p.endpoint(r.Gate.Endpoint), strconv.Itoa(int(tunnelPort))),
		RequirePostQuantum: r.Gate.RequirePostQuantum,
		Network:            network,
		Interface:          r.Tunnel.Interface,
		Kernel:             r.Tunnel.Backend == "kernel",
		TunnelPort:         tunnelPort,
		MTU:                p.number("tunnel.mtu", r.Tunnel.MTU, 1280, 1420),
		Keepalive:          p.duration("tunnel.keepalive", r.Tunnel.Keepalive, time.Second, time.Hour),
		Max:                p.duration("session.max", r.Session.Max, time.Minute, 30*24*time.Hour),
		Limit:              p.number("session.limit", r.Session.Limit, 1, 60000),
		Devices:            p.number("session.devices", r.Session.Devices, 1, 1<<10),
		Proxy:              netip.AddrPortFrom(server, proxyPort),
		Console:            netip.AddrPortFrom(server, consolePort),
	}
	if f := r.Session.StatusFile; f != "" {
		if c.Gate.StatusFile = filepath.Clean(f); !filepath.IsAbs(f) {
			c.Gate.StatusFile = filepath.Join(c.StateDir, f)
		}
		// It is replaced again and again.
		if strings.HasSuffix(f, "/") || slices.Contains([]string{c.StateDir, c.StateFile(), c.File}, c.Gate.StatusFile) || filepath.Dir(c.Gate.StatusFile) == c.AuditDir() {
			p.bad("session.status_file", "session.status_file %q: want a file of its own, as in \"openvpn-status.log\"", f)
		}
	}
	if c.Gate.Keepalive%time.Second != 0 {
		p.bad("tunnel.keepalive", "tunnel.keepalive %q: WireGuard counts whole seconds: round it", r.Tunnel.Keepalive)
	}
	if !interfaceName.MatchString(r.Tunnel.Interface) {
		p.bad("tunnel.interface", "tunnel.interface %q: want 1 to 15 of A-Z a-z 0-9 _ -", r.Tunnel.Interface)
	}
	if network.IsValid() {
		// The network's own address, the broadcast address and the daemon's are nobody's.
		if pool := 1<<(32-network.Bits()) - 3; pool < 2*c.Gate.Limit {
			p.bad("session.limit", "session.limit %d: tunnel.network %v has %d addresses for clients, and released ones rest a while: "+
				"take a limit of at most %d, or a larger network", c.Gate.Limit, network, pool, pool/2)
		}
	}

	c.Firewall = firewall.Config{
		GatePorts: gatePorts, TunnelPort: tunnelPort, Interface: r.Tunnel.Interface, Network: network,
		InnerPorts:   []uint16{proxyPort, consolePort},
		Window:       p.duration("knock.window", r.Knock.Window, time.Second, time.Hour),
		LogGroup:     uint16(p.number("knock.log_group", r.Knock.LogGroup, 0, 65535)),
		AllowPrivate: p.prefixes("proxy.allow_private", r.Proxy.AllowPrivate),
		EgressIPv6:   r.Egress.IPv6,
	}
	p.firewall(c)
	p.knock(c)

	c.Proxy = proxy.Config{
		Listen:             c.Gate.Proxy,
		Regions:            r.Proxy.Regions,
		Observe:            r.Proxy.Mode == "observe",
		Rules:              p.rules(),
		AllowPrivate:       c.Firewall.AllowPrivate,
		IPv6:               r.Egress.IPv6,
		Idle:               p.duration("proxy.idle", r.Proxy.Idle, time.Second, 30*24*time.Hour),
		Lifetime:           p.duration("proxy.lifetime", r.Proxy.Lifetime, time.Minute, 30*24*time.Hour),
		Connections:        p.number("proxy.connections", r.Proxy.Connections, 1, 1<<20),
		Bandwidth:          p.rate("proxy.bandwidth", r.Proxy.Bandwidth),
		PerUserBandwidth:   p.rate("proxy.per_user_bandwidth", r.Proxy.PerUserBandwidth),
		PerUserConnections: p.number("proxy.per_user_connections", r.Proxy.PerUserConnections, 1, 1<<20),
	}
	for _, public := range c.Egress.Public {
		if public.IsSingleIP() { // a wider one is shared with hosts that are not this one
			c.Proxy.Own = append(c.Proxy.Own, public)
		}
	}
	p.oneOf("proxy.mode", r.Proxy.Mode, "enforce", "observe")
	p.policy(c.Proxy)
	if b := r.Egress.Bind; b != "" {
		if c.Proxy.Bind, err = netip.ParseAddr(b); err != nil || c.Proxy.Bind.IsUnspecified() {
			p.bad("egress.bind", "egress.bind %q: want an address of this host, or \"\" for the route's choice", b)
		}
	}

	if err := c.Log.Level.UnmarshalText([]byte(r.Log.Level)); err != nil || c.Log.Level.String() != strings.ToUpper(r.Log.Level) {
		c.Log.Level = slog.LevelInfo
		p.bad("log.level", "log.level %q: want debug, info, warn or error", r.Log.Level)
	}
	p.oneOf("log.format", r.Log.Format, "json", "text")
	c.Log.Format = r.Log.Format
	if c.Log.SquidAccessLog = r.Log.SquidAccessLog; c.Log.SquidAccessLog != "" && !filepath.IsAbs(c.Log.SquidAccessLog) {
		c.Log.SquidAccessLog = filepath.Join(c.StateDir, c.Log.SquidAccessLog)
	}
	c.Log.AuditKeep = p.duration("log.audit_keep", r.Log.AuditKeep, 24*time.Hour, 36500*24*time.Hour)
	return c
}

var (
	interfaceName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,15}$`) // IFNAMSIZ less the zero byte
	hostName      = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)
)

func (p *parser) directory(key, path string) string {
	if !filepath.IsAbs(path) {
		p.bad(key, "%s %q: want an absolute path", key, path)
	}
	return filepath.Clean(path)
}

func (p *parser) oneOf(key, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		p.bad(key, "%s %q: want %s", key, value, strings.Join(allowed, " or "))
	}
}

func (p *parser) number(key string, n, low, high int64) int {
	if n < low || n > high {
		p.bad(key, "%s %d: want %d to %d", key, n, low, high)
		return int(low)
	}
	return int(n)
}

func (p *parser) port(key string, n int64) uint16 { return uint16(p.number(key, n, 1, 65535)) }

func (p *parser) duration(key, s string, low, high time.Duration) time.Duration {
	d, err := ParseDuration(s)
	if err != nil {
		p.bad(key, "%s %v", key, err)
		return low
	}
	if d < low || d > high {
		p.bad(key, "%s %q: want %s to %s", key, s, formatDuration(low), formatDuration(high))
		return low
	}
	return d
}

// ParseDuration reads Go's durations and whole days, "90d".
func ParseDuration(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%q: want a duration, as in 90s, 12h or 90d", s)
	}
	return d, nil
}

func formatDuration(d time.Duration) string {
	switch {
	case d%(24*time.Hour) == 0:
		return strconv.Itoa(int(d/(24*time.Hour))) + "d"
	case d%time.Hour == 0:
		return strconv.Itoa(int(d/time.Hour)) + "h"
	case d%time.Minute == 0:
		return strconv.Itoa(int(d/time.Minute)) + "m"
	}
	return d.String()
}

func (p *parser) prefixes(key string, list []string) (all []netip.Prefix) {
	for _, s := range list {
		n, err := netip.ParsePrefix(s)
		switch {
		case err != nil:
			way := "want a CIDR, as in 203.0.113.10/32"
			if a, err := netip.ParseAddr(s); err == nil {
				way = fmt.Sprintf("want a CIDR: write %v/%d for the one address", a, a.BitLen())
			}
			p.bad(key, "%s %q: %s", key, s, way)
		case n != n.Masked():
			p.bad(key, "%s %q: bits are set past the prefix: write %v, or %v/%d for the one address",
				key, s, n.Masked(), n.Addr(), n.Addr().BitLen())
		default:
			all = append(all, n)
		}
	}
	return all
}

func (p *parser) network(s string) netip.Prefix {
	n, err := netip.ParsePrefix(s)
	switch {
	case err != nil || !n.Addr().Is4() || n.Bits() < 8 || n.Bits() > 28:
		p.bad("tunnel.network", "tunnel.network %q: want an IPv4 network from /8 to /28, as in 10.77.0.0/16", s)
		return netip.Prefix{}
	case n != n.Masked():
		p.bad("tunnel.network", "tunnel.network %q: bits are set past the prefix: write %v", s, n.Masked())
	}
	return n.Masked()
}

func (p *parser) endpoint(s string) (host string) {
	host, err := SplitEndpoint(s)
	if err != nil {
		p.bad("gate.endpoint", "gate.endpoint %v", err)
	}
	return host
}

// SplitEndpoint checks HOST:PORT, host a name or an address, and returns the host.
func SplitEndpoint(s string) (host string, err error) {
	const want = ": want where clients find this host, HOST:PORT, as in bastion.example.com:1194"
	bad := func(format string, a ...any) (string, error) {
		return "", fmt.Errorf("%q: "+format+want, append([]any{s}, a...)...)
	}
	if s == "" {
		return "", errors.New(`""` + want)
	}
	if scheme, _, ok := strings.Cut(s, "://"); ok {
		return bad("it is a URL: leave %s:// off", scheme)
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return bad("it has no port, or an address in it wants brackets, as in [2001:db8::1]:1194")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return bad("port %q is no number from 1 to 65535", port)
	}
	addr, err := netip.ParseAddr(host)
	switch {
	case err == nil && addr.Zone() != "":
		return bad("clients have no zone %q", addr.Zone())
	case host == "":
		return bad("the host is missing")
	case err != nil && (len(host) > 253 || !hostName.MatchString(host) || strings.Trim(host, "0123456789.") == ""):
		return bad("%q is neither a name nor an address", host)
	}
	return host, nil
}

func (p *parser) listen(list []string) (ports []uint16) {
	if len(list) == 0 {
		p.bad("gate.listen", "gate.listen []: nobody could come in: write [\":1194\"]")
	}
	for i, s := range list {
		host, port, err := net.SplitHostPort(s)
		n, perr := strconv.ParseUint(port, 10, 16)
		_, aerr := netip.ParseAddr(host)
		if err != nil || perr != nil || n == 0 || host != "" && aerr != nil {
			p.bad("gate.listen", "gate.listen %q: want \":PORT\", or \"ADDRESS:PORT\" of this host", s)
			continue
		}
		if slices.Contains(list[:i], s) {
			p.bad("gate.listen", "gate.listen %q: stands in it twice: remove one", s)
		}
		if !slices.Contains(ports, uint16(n)) {
			ports = append(ports, uint16(n))
		}
	}
	return ports
}

// metrics is where Prometheus asks. Any address the operator writes is taken; a host must stand in it, so that nobody
// opens it to every network by leaving one out.
func (p *parser) metrics(s string) string {
	if s == "" {
		return ""
	}
	host, port, err := net.SplitHostPort(s)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || host == "" || perr != nil || n == 0 {
		p.bad("console.metrics", "console.metrics %q: want HOST:PORT, as in 127.0.0.1:9617; it asks for no password, so keep it where only Prometheus can reach it", s)
	}
	return s
}
