package configs

import (
	"reflect"
	"strings"
)

// raw is the file as it is written. Slices whose default is not empty are set only where the file lacks the key, since
// decoding into a filled slice would mix the two.
type raw struct {
	StateDir string      `toml:"state_dir"`
	RunDir   string      `toml:"run_dir"`
	Gate     rawGate     `toml:"gate"`
	Tunnel   rawTunnel   `toml:"tunnel"`
	Session  rawSession  `toml:"session"`
	Knock    rawKnock    `toml:"knock"`
	Firewall rawFirewall `toml:"firewall"`
	Egress   rawEgress   `toml:"egress"`
	Proxy    rawProxy    `toml:"proxy"`
	Identity rawIdentity `toml:"identity"`
	Console  rawConsole  `toml:"console"`
	Store    rawStore    `toml:"store"`
	Log      rawLog      `toml:"log"`
}

type rawGate struct {
	Endpoint           string   `toml:"endpoint"`
	Listen             []string `toml:"listen"`
	RequirePostQuantum bool     `toml:"require_post_quantum"`
}

type rawTunnel struct {
	Port      int64        `toml:"port"`
	Network   string       `toml:"network"`
	Interface string       `toml:"interface"`
	Backend   string       `toml:"backend"`
	MTU       int64        `toml:"mtu"`
	Keepalive string       `toml:"keepalive"`
	Service   []rawService `toml:"service"`
}

type rawService struct {
	Port   int64    `toml:"port"`
	Groups []string `toml:"groups"`
}

type rawSession struct {
	Max        string `toml:"max"`
	Limit      int64  `toml:"limit"`
	Devices    int64  `toml:"devices"`
	StatusFile string `toml:"status_file"`
}

type rawKnock struct {
	Window   string        `toml:"window"`
	Tokens   bool          `toml:"tokens"`
	Step     string        `toml:"step"`
	LogGroup int64         `toml:"log_group"`
	Trusted  []string      `toml:"trusted"`
	Sequence []rawSequence `toml:"sequence"`
}

type rawSequence struct {
	Name    string   `toml:"name"`
	Ports   []string `toml:"ports"`
	User    string   `toml:"user"`
	Timeout string   `toml:"timeout"`
}

type rawFirewall struct {
	Mode  string   `toml:"mode"`
	Allow []string `toml:"allow"`
}

type rawEgress struct {
	Public []string `toml:"public"`
	Bind   string   `toml:"bind"`
	IPv6   bool     `toml:"ipv6"`
}

type rawProxy struct {
	Port               int64     `toml:"port"`
	Regions            []string  `toml:"regions"`
	Mode               string    `toml:"mode"`
	AllowPrivate       []string  `toml:"allow_private"`
	Idle               string    `toml:"idle"`
	Lifetime           string    `toml:"lifetime"`
	Connections        int64     `toml:"connections"`
	PerUserConnections int64     `toml:"per_user_connections"`
	Bandwidth          string    `toml:"bandwidth"`
	PerUserBandwidth   string    `toml:"per_user_bandwidth"`
	Rule               []rawRule `toml:"rule"`
}

type rawRule struct {
	Deny   []string `toml:"deny"`
	Except []string `toml:"except"`
	Allow  []string `toml:"allow"`
	Ports  []int64  `toml:"ports"`
	Groups []string `toml:"groups"`
	Users  []string `toml:"users"`
	TLS    bool     `toml:"tls"`
}

type rawIdentity struct {
	CA      string `toml:"ca"`
	CAKey   string `toml:"ca_key"`
	Cert    string `toml:"cert"`
	Key     string `toml:"key"`
	CRL     string `toml:"crl"`
	Allowed string `toml:"allowed"`
}

type rawConsole struct {
	Port    int64    `toml:"port"`
	Admins  []string `toml:"admins"`
	Metrics string   `toml:"metrics"`
}

type rawStore struct {
	Etcd []string `toml:"etcd"`
}

type rawLog struct {
	Level          string `toml:"level"`
	Format         string `toml:"format"`
	SquidAccessLog string `toml:"squid_access_log"`
	AuditKeep      string `toml:"audit_keep"`
}

// defaults are the values of keys that a file leaves out, except those of setSliceDefaults.
func defaults() raw {
	return raw{
		StateDir: "/var/lib/perimeterd",
		RunDir:   "/run/perimeterd",
		Tunnel: rawTunnel{Port: 1194, Network: "10.77.0.0/16", Interface: "perimeter0", Backend: "userspace",
			MTU: 1420, Keepalive: "25s"},
		Session:  rawSession{Max: "12h", Limit: 5000, Devices: 5},
		Knock:    rawKnock{Window: "60s", Tokens: true, Step: "30s", LogGroup: 1194},
		Firewall: rawFirewall{Mode: "guard"},
		Proxy:    rawProxy{Port: 3128, Mode: "enforce", Idle: "15m", Lifetime: "24h", Connections: 10000, PerUserConnections: 512},
		Identity: rawIdentity{CA: "pki/ca.crt", CAKey: "pki/ca.key", Cert: "pki/gate.crt", Key: "pki/gate.key"},
		Console:  rawConsole{Port: 80},
		Log:      rawLog{Level: "info", Format: "json", AuditKeep: "400d"},
	}
}

// defaultTimeout is knock.sequence's timeout.
const defaultTimeout = "10s"

// setSliceDefaults fills what the file leaves out. Has says whether it names a key.
func (r *raw) setSliceDefaults(has func(key string) bool) {
	for _, d := range []struct {
		key   string
		slice *[]string
		value string
	}{
		{"gate.listen", &r.Gate.Listen, ":1194"},
		{"firewall.allow", &r.Firewall.Allow, "22/tcp"},
		{"proxy.regions", &r.Proxy.Regions, "us-east-1"},
		{"console.admins", &r.Console.Admins, "operators"},
	} {
		if !has(d.key) {
			*d.slice = []string{d.value}
		}
	}
	for i := range r.Knock.Sequence {
		if !has(key("knock.sequence", i, "timeout")) {
			r.Knock.Sequence[i].Timeout = defaultTimeout
		}
	}
}

// keysOf says which keys a table of the file has, or the innermost of its parents that exists.
func keysOf(table []string) string {
	t, known := reflect.TypeFor[raw](), []string{}
walk:
	for _, name := range table {
		for i := range t.NumField() {
			f := t.Field(i)
			inner := f.Type
			if inner.Kind() == reflect.Slice {
				inner = inner.Elem()
			}
			if f.Tag.Get("toml") == name && inner.Kind() == reflect.Struct {
				t, known = inner, append(known, name)
				continue walk
			}
		}
		break
	}
	keys := make([]string, t.NumField())
	for i := range keys {
		keys[i] = t.Field(i).Tag.Get("toml")
	}
	if len(known) == 0 {
		return "the file has " + strings.Join(keys, ", ")
	}
	return strings.Join(known, ".") + " has " + strings.Join(keys, ", ")
}
