package configs

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"perimeterd/knock"
)

const minimal = `[gate]
endpoint = "bastion.example.com:1194"
`

func mustParse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("/etc/perimeterd/perimeterd.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The reference is what a person reads to know the defaults, so it must say them.
func TestReferenceStatesTheDefaults(t *testing.T) {
	marked := regexp.MustCompile(`# (example|init writes)`)
	var kept []string
	skip := false
	for line := range strings.Lines(string(Reference)) {
		if strings.HasPrefix(line, "[") {
			skip = marked.MatchString(line) // a marked table goes whole
		}
		if !skip && !marked.MatchString(line) {
			kept = append(kept, line)
		}
	}
	// The one key without a default.
	text := strings.Replace(strings.Join(kept, ""), "[gate]\n", minimal, 1)
	got, want := mustParse(t, text), mustParse(t, minimal)
	got.Text, want.Text = nil, nil
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("the reference says\n%+v\nthe defaults are\n%+v", got, want)
	}
}

func TestReferenceIsValidAsItStands(t *testing.T) {
	c := mustParse(t, string(Reference))
	if c.Gate.Endpoint != "bastion.example.com:1194" || c.Gate.Proxy != netip.MustParseAddrPort("10.77.0.1:3128") ||
		c.Gate.Console != netip.MustParseAddrPort("10.77.0.1:80") || c.Gate.Keepalive != 25*time.Second ||
		c.Identity.CA != "/etc/perimeterd/pki/ca.crt" || c.StateFile() != "/var/lib/perimeterd/state.db" ||
		c.ControlSocket() != "/run/perimeterd/control.sock" || !c.Knock.Tokens || c.Knock.Step != 30*time.Second ||
		!reflect.DeepEqual(c.Firewall.InnerPorts, []uint16{3128, 80}) || !reflect.DeepEqual(c.Firewall.GatePorts, []uint16{1194}) ||
		len(c.Firewall.Sequences) != 1 || c.Firewall.Sequences[0].Ports[1] != (knock.Port{Proto: knock.TCP, Number: 19044}) ||
		c.Firewall.Sequences[0].Timeout != 10*time.Second || len(c.Proxy.Rules) != 2 || c.Proxy.Rules[1].Allow[0] != "@aws" {
		t.Fatalf("%+v", c)
	}
}

func TestStatusFileLiesBelowTheState(t *testing.T) {
	for file, want := range map[string]string{"": "", "status": "/var/lib/perimeterd/status", "/run/openvpn/server.status": "/run/openvpn/server.status"} {
		if got := mustParse(t, minimal+"[session]\nstatus_file = \""+file+"\"\n").Gate.StatusFile; got != want {
			t.Errorf("%q is %q, want %q", file, got, want)
		}
	}
}

func TestReferenceHasEveryKey(t *testing.T) {
	lines := keyLines(Reference)
	for k := range keyLines([]byte("tunnel.service.port=1\ntunnel.service.groups=1")) {
		lines[k] = 1 // commented out in the reference
	}
	commented := regexp.MustCompile(`(?m)^# (\[\[tunnel\.service\]\]|port |groups )`)
	if n := len(commented.FindAllIndex(Reference, -1)); n != 3 {
		t.Errorf("%d of the 3 lines of tunnel.service", n)
	}
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			name := strings.TrimPrefix(prefix+"."+f.Tag.Get("toml"), ".")
			switch {
			case f.Type.Kind() == reflect.Struct:
				walk(name, f.Type)
			case f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct:
				walk(name, f.Type.Elem())
			default:
				found := false
				for k := range lines {
					found = found || regexp.MustCompile(`\[\d+\]`).ReplaceAllString(k, "") == name
				}
				if !found {
					t.Errorf("the reference lacks %s", name)
				}
			}
		}
	}
	walk("", reflect.TypeFor[raw]())
}

func TestBadConfigurations(t *testing.T) {
	const f = "perimeterd.toml"
	tests := []struct{ name, text, want string }{
		{"unknown keys, all in one pass", "[gate]\nendpoint = \"b.example.com:1194\"\n\tlisen = [\":1\"]\n[proxi]\nport = 1\n[[knock.sequence]]\nnam = \"x\"\n",
			f + ":3: gate.lisen: unknown: gate has endpoint, listen, require_post_quantum\n" +
				"    \tlisen = [\":1\"]\n" +
				"    \t^^^^^\n" +
				f + ":4: proxi: unknown: the file has state_dir, run_dir, gate, tunnel, session, knock, firewall, egress, proxy, identity, console, store, log\n" +
				"    [proxi]\n" +
				"     ^^^^^\n" +
				f + ":6: knock.sequence number 1 has no name: give it one, the log shows it\n" +
				f + ":7: knock.sequence.nam: unknown: knock.sequence has name, ports, user, timeout\n" +
				"    nam = \"x\"\n" +
				"    ^^^"},
		{"not TOML", "[gate]\nendpoint = bastion\n",
			f + ":2: unexpected character U+0062 'b' at start of value\n    endpoint = bastion\n               ^"},
		{"wrong type", minimal + "listen = 1194\n",
			f + ":3: gate.listen: a TOML integer: want a list of texts, as in [\"a\", \"b\"]\n    listen = 1194\n             ^"},
		{"empty", "", f + `: gate.endpoint "": want where clients find this host, HOST:PORT, as in bastion.example.com:1194`},
		{"several at once", "state_dir = \"state\"\n[gate]\nendpoint = \"bastion\"\nlisten = [\"1194\"]\n[session]\nmax = \"forever\"\n[log]\nlevel = \"loud\"\n",
			f + ":1: state_dir \"state\": want an absolute path\n" +
				f + ":3: gate.endpoint \"bastion\": it has no port, or an address in it wants brackets, as in [2001:db8::1]:1194: want where clients find this host, HOST:PORT, as in bastion.example.com:1194\n" +
				f + ":4: gate.listen \"1194\": want \":PORT\", or \"ADDRESS:PORT\" of this host\n" +
				f + ":6: session.max \"forever\": want a duration, as in 90s, 12h or 90d\n" +
				f + ":8: log.level \"loud\": want debug, info, warn or error"},
		{"adjacent knock ports", minimal + "[[knock.sequence]]\nname = \"ops\"\nports = [\"7001\", \"7002\", \"9\"]\n",
			f + `:5: knock.sequence "ops": ports 7001,7002 are adjacent; a port scan would open it: choose ports in no order`},
		{"a second sequence on the gate's port", minimal + "[[knock.sequence]]\nname = \"a\"\nports = [\"7001\", \"19\", \"9\"]\n[[knock.sequence]]\nname = \"b\"\nports = [\"7001\", \"1194\", \"80\"]\n",
			f + `:8: knock.sequence "b": port 1194 is used by a service here, whose traffic would be a knock: choose a free port`},
		{"a sequence on the tunnel's port", minimal + "[[knock.sequence]]\nname = \"b\"\nports = [\"7001\", \"1194/udp\", \"80\"]\n",
			f + `:5: knock.sequence "b": port 1194/udp is used by a service here, whose traffic would be a knock: choose a free port`},
		{"one name twice", minimal + "[[knock.sequence]]\nname = \"a\"\nports = [\"7001\", \"19\", \"9\"]\n[[knock.sequence]]\nname = \"a\"\nports = [\"8001\", \"19\", \"9\"]\n",
			f + `:7: knock.sequence "a": the name is used twice: choose another`},
		{"a timeout that is none", minimal + "[[knock.sequence]]\nname = \"a\"\nports = [\"7001\", \"19\", \"9\"]\ntimeout = \"2m\"\n",
			f + `:6: knock.sequence "a": timeout "2m": want 1s to 1m`},
		{"what host mode does not understand", minimal + "[firewall]\nmode = \"shut\"\nallow = [\"22\", \"80/tcp near 10.0.0.1\"]\n",
			f + ":4: firewall.mode \"shut\": want guard or host\n" +
				f + ":5: firewall.allow \"22\": protocol \"\" is not tcp, udp or icmp: write it as in \"22/tcp\", \"8000-8010/udp from 198.51.100.0/24 on eth1\" or \"icmp\"\n" +
				f + ":5: firewall.allow \"80/tcp near 10.0.0.1\": \"near 10.0.0.1\" is not understood: write it as in \"22/tcp\", \"8000-8010/udp from 198.51.100.0/24 on eth1\" or \"icmp\""},
		{"a service for nobody", minimal + "[[tunnel.service]]\nport = 22\n", f + `:3: tunnel.service 1: port 22 is for no group: name some, or "*" for everybody`},
		{"a port that is none", minimal + "[[knock.sequence]]\nname = \"a\"\nports = [\"7001\", \"19/icmp\", \"0\"]\nuser = \"Al\"\n",
			f + ":5: knock.sequence \"a\": port \"19/icmp\": protocol \"icmp\" is neither tcp nor udp: write 19044 or 19044/udp\n" +
				f + ":5: knock.sequence \"a\": port \"0\": want a number from 1 to 65535, as in 19044 or 19044/udp\n" +
				f + ":6: knock.sequence \"a\": user \"Al\": not a name: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first"},
		{"no way to knock", minimal + "[knock]\ntokens = false\n",
			f + `:4: knock.tokens false: and there is no knock.sequence, so nobody could knock: allow one of the two`},
		{"a step too short for clocks", minimal + "[knock]\nstep = \"1s\"\n", f + `:4: knock.step "1s": want 5s to 45s`},
		{"an IPv6 tunnel", minimal + "[tunnel]\nnetwork = \"fd00::/64\"\n",
			f + `:4: tunnel.network "fd00::/64": want an IPv4 network from /8 to /28, as in 10.77.0.0/16`},
		{"host bits", minimal + "[tunnel]\nnetwork = \"10.77.0.1/16\"\n",
			f + `:4: tunnel.network "10.77.0.1/16": bits are set past the prefix: write 10.77.0.0/16`},
		{"a pool too small", minimal + "[tunnel]\nnetwork = \"10.77.0.0/24\"\n",
			f + `: session.limit 5000: tunnel.network 10.77.0.0/24 has 253 addresses for clients, and released ones rest a while: take a limit of at most 126, or a larger network`},
		{"numbers out of range", minimal + "[tunnel]\nport = 70000\nmtu = 9000\nkeepalive = \"1500ms\"\ninterface = \"a b\"\n",
			f + ":4: tunnel.port 70000: want 1 to 65535\n" + f + ":5: tunnel.mtu 9000: want 1280 to 1420\n" +
				f + ":6: tunnel.keepalive \"1500ms\": WireGuard counts whole seconds: round it\n" +
				f + ":7: tunnel.interface \"a b\": want 1 to 15 of A-Z a-z 0-9 _ -"},
		{"egress", minimal + "[egress]\npublic = [\"203.0.113.10\", \"203.0.113.10/24\", \"x\"]\nbind = \"eth0\"\n",
			f + ":4: egress.public \"203.0.113.10\": want a CIDR: write 203.0.113.10/32 for the one address\n" +
				f + ":4: egress.public \"203.0.113.10/24\": bits are set past the prefix: write 203.0.113.0/24, or 203.0.113.10/32 for the one address\n" +
				f + ":4: egress.public \"x\": want a CIDR, as in 203.0.113.10/32\n" +
				f + ":5: egress.bind \"eth0\": want an address of this host, or \"\" for the route's choice"},
		{"proxy", minimal + "[proxy]\nport = 80\nmode = \"off\"\nregions = [\"Frankfurt\"]\n",
			f + ": console.port 80: proxy.port has it, on the same address: choose another\n" +
				f + ":5: proxy.mode \"off\": want enforce or observe\n" +
				f + ":6: proxy.regions \"Frankfurt\" is no region: write its code, such as \"us-east-1\""},
		{"one port twice", minimal + "listen = [\":80\", \":1194\", \":1194\"]\n",
			f + ":3: gate.listen \":1194\": stands in it twice: remove one\n" +
				f + ":3: gate.listen [\":80\" \":1194\" \":1194\"]: port 80 is the proxy's or the console's too, on the tunnel address: choose another"},
		{"a link-local endpoint", "gate.endpoint = \"[fe80::1%eth0]:1\"\n",
			f + ":1: gate.endpoint \"[fe80::1%eth0]:1\": clients have no zone \"eth0\": want where clients find this host, HOST:PORT, as in bastion.example.com:1194"},
		{"rules", minimal + "[[proxy.rule]]\nallow = [\"@aws\"]\n[[proxy.rule]]\nports = [443]\n[[proxy.rule]]\nallow = [\"@aws\"]\ndeny = [\"a.example.com\"]\nports = [0]\ngroups = [\"*\", \"A B\"]\n",
			f + ":3: proxy.rule 1: it allows no port: add ports = [443]\n" +
				f + ":5: proxy.rule 2: neither deny nor allow: add the destinations, or remove the rule\n" +
				f + ":7: proxy.rule 3: both deny and allow: make two rules of it\n" +
				f + ":10: proxy.rule 3: port 0: want 1 to 65535\n" +
				f + ":11: proxy.rule 3: group \"A B\": not a name: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first"},
		{"a rule with a URL", minimal + "[[proxy.rule]]\nallow = [\"https://s3.amazonaws.com/bucket\"]\nports = [443]\n",
			f + ":3: proxy.rule 1: allow \"https://s3.amazonaws.com/bucket\": want a name, without \"https://\", as in \"s3.amazonaws.com\""},
		{"an external CA's files for the built-in one", minimal + "[identity]\ncrl = \"crl.pem\"\nallowed = \"/etc/dns\"\n",
			f + ":4: identity.crl \"crl.pem\": the built-in CA needs none, as its users are entered and revoked here: leave it empty, or write ca_key = \"\" if the CA is another's\n" +
				f + ":5: identity.allowed \"/etc/dns\": the built-in CA needs none, as its users are entered and revoked here: leave it empty, or write ca_key = \"\" if the CA is another's"},
		{"what is not in this version", minimal + `[tunnel]
backend = "kernle"
[session]
status_file = "state.db"
[proxy]
per_user_bandwidth = "200mbit"
bandwidth = "1Mbit/s"
[console]
metrics = ":9617"
[store]
etcd = ["http://127.0.0.1:2379"]
[log]
audit_keep = "10h"
`,
			f + ":4: tunnel.backend \"kernle\": want userspace or kernel\n" +
				f + ":6: session.status_file \"state.db\": want a file of its own, as in \"openvpn-status.log\"\n" +
				f + ":8: proxy.per_user_bandwidth \"200mbit\": want a number and a unit, 64kbit to 1000Gbit, as in \"200Mbit\", or \"\" for no limit\n" +
				f + ":9: proxy.bandwidth \"1Mbit/s\": want a number and a unit, 64kbit to 1000Gbit, as in \"200Mbit\", or \"\" for no limit\n" +
				f + ":11: console.metrics \":9617\": want HOST:PORT, as in 127.0.0.1:9617; it asks for no password, so keep it where only Prometheus can reach it\n" +
				f + ":13: store.etcd [\"http://127.0.0.1:2379\"]: not in this version: leave it empty: the state stays on this host\n" +
				f + ":15: log.audit_keep \"10h\": want 1d to 36500d"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c, err := Parse(f, []byte(test.text))
			var e *Error
			if !errors.As(err, &e) || c != nil {
				t.Fatalf("Parse = %v, %v; want an *Error", c, err)
			}
			if err.Error() != test.want {
				t.Errorf("got\n%s\nwant\n%s", err, test.want)
			}
		})
	}
}

func TestKeysMayBeWrittenAsTOMLAllows(t *testing.T) {
	c := mustParse(t, "gate.endpoint = \"[2001:db8::1]:443\"\n"+
		"session = {limit = 10, devices = 3}\nknock.sequence = [{name = \"a\", ports = [\"7001:tcp\", \"19/udp\", \"9\"], timeout = \"3s\", user = \"alice\"}]\n")
	if c.Gate.Endpoint != "[2001:db8::1]:1194" || c.Gate.Limit != 10 || c.Firewall.Sequences[0].Timeout != 3*time.Second || c.Knock.Users[0] != "alice" {
		t.Fatalf("%+v", c)
	}
	_, err := Parse("f", []byte("gate.endpoint = \"h:1\"\nsession = {limit = 0}\nknock.sequence = [\n{name = \"a\", ports = [\"1\"]}]\n"))
	want := "f:2: session.limit 0: want 1 to 60000\nf:3: knock.sequence \"a\": ports 1: fewer than 3, so a chance hit is likely: add more"
	if err == nil || err.Error() != want {
		t.Fatalf("got\n%v\nwant\n%s", err, want)
	}
}

func TestLoadSaysWhatToDoAboutAMissingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "perimeterd.toml")
	_, err := Load(path)
	var e *Error
	if want := path + ": no such file: `perimeterd init` writes it, --config FILE names another"; !errors.As(err, &e) || err.Error() != want {
		t.Fatalf("got  %v\nwant %s", err, want)
	}
	if err := os.WriteFile(path, []byte(minimal), 0o640); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil || c.Identity.Master != filepath.Join(filepath.Dir(path), "pki/knock.master") {
		t.Fatalf("%+v %v", c, err)
	}
}

func TestExternalCAHasNoKeyHere(t *testing.T) {
	c := mustParse(t, minimal+"[identity]\nca = \"/etc/openvpn/ca.crt\"\nca_key = \"\"\ncrl = \"pki/crl.pem\"\nallowed = \"/etc/openvpn/allowed\"\n")
	id, dir := c.Identity, c.Dir
	if !id.External() || id.CA != "/etc/openvpn/ca.crt" || id.CAKey != "" || id.CRL != filepath.Join(dir, "pki/crl.pem") || id.Allowed != "/etc/openvpn/allowed" {
		t.Fatalf("%+v", id)
	}
	if c := mustParse(t, minimal); c.Identity.External() || c.Identity.CRL != "" || c.Identity.Allowed != "" {
		t.Fatalf("%+v", c.Identity)
	}
}

func TestRenderReplacesValuesAndKeepsComments(t *testing.T) {
	text, err := Render(map[string]any{
		"gate.endpoint": "gate.example.org:443", "gate.listen": []string{":443"}, "state_dir": `/srv/a "b"`,
		"knock.sequence.ports": []string{"7", "9", "3", "1025"}, "egress.public": []string{}, "proxy.regions": []string{"us-east-1", "eu-central-1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	c := mustParse(t, string(text))
	if c.StateDir != `/srv/a "b"` || c.Gate.Listen[0] != ":443" || len(c.Firewall.Sequences[0].Ports) != 4 || len(c.Egress.Public) != 0 || len(c.Proxy.Regions) != 2 {
		t.Fatalf("%+v", c)
	}
	if !strings.Contains(string(text), "\nendpoint = \"gate.example.org:443\"       # init writes; a name is best: the address can move\n") {
		t.Error("the comment moved or went")
	}
	if same, err := Render(nil); err != nil || string(same) != string(Reference) {
		t.Errorf("nothing replaced is not the reference: %v", err)
	}
	if _, err := Render(map[string]any{"gate.nonsense": "x"}); err == nil {
		t.Error("an unknown key was taken")
	}
}

func TestDurations(t *testing.T) {
	for s, want := range map[string]time.Duration{"90d": 2160 * time.Hour, "12h": 12 * time.Hour, "1h30m": 90 * time.Minute, "0d": 0} {
		if got, err := ParseDuration(s); err != nil || got != want {
			t.Errorf("%q is %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "d", "-1d", "1.5d", "99999d", "90", "9x"} {
		if got, err := ParseDuration(s); err == nil {
			t.Errorf("%q is taken for %v", s, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add(Reference)
	f.Add([]byte("gate = {endpoint = \"a:1\"}\n[[knock.sequence]]\nports=[\"1\",\"5\",\"3\"]\nname='x'\n[[knock.sequence]]\n[knock.sequence.x]\n"))
	f.Add([]byte("[a.\"b\".c]\nd.e = [{f = 1}, [2, {g.h = 3}]]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if (c == nil) == (err == nil) {
			t.Fatalf("config %v with error %v", c, err)
		}
		if err != nil {
			_ = err.Error()
		}
		if p := scanPaths(data); p.StateDir != "" && !filepath.IsAbs(p.StateDir) || p.RunDir != "" && !filepath.IsAbs(p.RunDir) {
			t.Fatalf("%+v", p)
		}
	})
}
