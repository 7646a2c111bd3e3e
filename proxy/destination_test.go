package proxy

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func TestDestinationsHaveOneForm(t *testing.T) {
	for in, want := range map[string]string{
		"OK.AmazonAWS.com.:443":                 "ok.amazonaws.com:443",
		"_dmarc.example.com:1":                  "_dmarc.example.com:1",
		"r3---sn-x.example:443":                 "r3---sn-x.example:443",
		"bücher.example:443":                    "xn--bcher-kva.example:443",
		"BÜCHER.example:443":                    "xn--bcher-kva.example:443",
		"XN--BCHER-KVA.example:443":             "xn--bcher-kva.example:443",
		"faß.example:443":                       "xn--fa-hia.example:443",
		"ｗｗｗ．example．com:443":                   "www.example.com:443",
		"1.2.3.4:80":                            "1.2.3.4:80",
		"[::ffff:1.2.3.4]:80":                   "1.2.3.4:80",
		"[::FFFF:102:304]:80":                   "1.2.3.4:80",
		"[2001:DB8:0::1]:65535":                 "[2001:db8::1]:65535",
		"1.2.3.4.example:80":                    "1.2.3.4.example:80",
		"0x.example:80":                         "0x.example:80",
		"localhost:80":                          "localhost:80",
		strings.Repeat("a", 63) + ".example:80": strings.Repeat("a", 63) + ".example:80",
	} {
		d, err := ParseAuthority(in)
		if err != nil || d.String() != want || !d.Valid() {
			t.Errorf("%q: %v, %v; want %s", in, d, err, want)
		}
	}
	for in, want := range map[string]string{
		"http://a.b": "a.b:80", "HTTP://A.b./x?y": "a.b:80", "http://a.b:8080?x": "a.b:8080", "http://[::ffff:1.2.3.4]/": "1.2.3.4:80",
		"http://a.b/x@c": "a.b:80", "http://a.b/c:1": "a.b:80",
	} {
		if d, err := ParseURL(in); err != nil || d.String() != want {
			t.Errorf("%q: %v, %v; want %s", in, d, err, want)
		}
	}
}

// More than the refusals of TestRefusals.
func TestOddDestinationsAreRefused(t *testing.T) {
	long := strings.Repeat("a.", 126) + "a"
	for _, in := range []string{
		"", ":", ":80", "a", "a:", "a:0", "a:00", "a:080", "a: 80", "a:80 ", "a:8e1", "a:0x50", "a:65536", "a:-1", "a:٣", "a:80:90",
		"[::1", "[::1]", "[::1]80", "[::1]:", "[1.2.3.4]:80", "[a]:80", "[]:80", "[fe80::1%lo]:80", "::1:80", "2001:db8::1:80", "[[::1]]:80",
		"1.2.3:80", "1.2.3.4.5:80", "1.2.3.256:80", "01.2.3.4:80", "1.2.3.4.:80", "1.2.3.0x4:80", "a.1:80", "a.0x1f:80", "a.0x:80", "1:80", "0x7f000001:80",
		"a..b:80", ".a:80", "a..:80", ".:80", "-a.b:80", "a-.b:80", "a b:80", "a\tb:80", "a%2eb:80", "a/b:80", "a\\b:80", "a@b:80", "a?b:80", "a#b:80",
		"*.a:80", "a,b:80", "a;b:80", "<a>:80", "a\x00b:80", "a\x7f:80", "a\xff:80", "a\u200b:80/", "a\u202eb:80", "℀.com:80",
		"xn--:80", "xn--a:80", "xn--999999999:80", strings.Repeat("a", 64) + ".b:80", long + "b:80", strings.Repeat("a", 2000) + ":80",
	} {
		if d, err := ParseAuthority(in); err == nil {
			t.Errorf("%q: %v", in, d)
		}
	}
	if _, err := ParseAuthority(long + ":80"); err != nil {
		t.Errorf("253 characters are not too many: %v", err)
	}
	for _, in := range []string{"", "a.b", "/x", "//a.b/", "*", "http:a.b", "http:/a.b", "http:///x", "https://a.b/", "ftp://a.b/", "http://a.b:/", "http://u@a.b/",
		"http://a.b#x", "http://a.b\\@c/", "http://?x", " http://a.b/", "http://[::1/", "javascript://a.b/", "http://a.b:80:80/"} {
		if d, err := ParseURL(in); err == nil {
			t.Errorf("%q: %v", in, d)
		}
	}
}

// oracle reads ASCII destinations as slowly and obviously as possible.
func oracle(s string) (string, bool) {
	m := regexp.MustCompile(`^(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([1-9][0-9]{0,4})$`).FindStringSubmatch(s)
	if m == nil {
		return "", false
	}
	if port, _ := strconv.Atoi(m[3]); port > 65535 {
		return "", false
	}
	if m[1] != "" {
		ip := net.ParseIP(m[1])
		if ip == nil || !strings.Contains(m[1], ":") {
			return "", false
		}
		return net.JoinHostPort(ip.String(), m[3]), true // IPv4 in IPv6 prints as IPv4
	}
	if regexp.MustCompile(`^((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])(\.|$)){4}$`).MatchString(m[2]) && m[2][len(m[2])-1] != '.' {
		return m[2] + ":" + m[3], true
	}
	name := regexp.MustCompile(`\.$`).ReplaceAllString(strings.ToLower(m[2]), "")
	if len(name) > 253 || regexp.MustCompile(`(^|\.)([0-9]+|0x[0-9a-f]*)$`).MatchString(name) ||
		!regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*$`).MatchString(name) {
		return "", false
	}
	return name + ":" + m[3], true
}

func FuzzDestination(f *testing.F) {
	for _, s := range []string{"ok.example:443", "OK.example.:443", "1.2.3.4:80", "[::ffff:1.2.3.4]:80", "127.1:80", "0x7f.1:80", "①②⑦.0.0.1:80", "a_b.c:1",
		"xn--bcher-kva.de:1", "a:0443", "[fe80::1%25lo]:1", "bücher.de:443", "u:p@h:1", strings.Repeat("a.", 126) + "a:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseAuthority(s)
		ascii := regexp.MustCompile(`^[\x00-\x7f]*$`).MatchString(s)
		if want, ok := oracle(s); ascii && !strings.Contains(strings.ToLower(s), "xn--") && (ok != (err == nil) || ok && want != d.String()) {
			t.Errorf("%q: %v, %v; the oracle says %q, %v", s, d, err, want, ok)
		}
		if err != nil {
			if d.Valid() {
				t.Errorf("%q: an error and %v", s, d)
			}
			return
		}
		if _, ok := oracle(d.String()); !ok || d.Addr.Is4In6() || d.Addr.Zone() != "" {
			t.Errorf("%q became %v, which is not canonical", s, d)
		}
		if again, err := ParseAuthority(d.String()); err != nil || again != d {
			t.Errorf("%q became %v became %v, %v", s, d, again, err)
		}
		if u, err := ParseURL("http://" + d.String() + "/"); err != nil || u != d {
			t.Errorf("%v as a URL: %v, %v", d, u, err)
		}
	})
}

func TestAddressesAreJudged(t *testing.T) {
	for a, want := range map[string]Reason{
		"127.0.0.1": Loopback, "127.255.255.255": Loopback, "::1": Loopback, "0.0.0.0": Unspecified, "0.1.2.3": Unspecified, "::": Unspecified,
		"169.254.0.1": Metadata, "169.254.169.254": Metadata, "fe80::1": Metadata, "fd00:ec2::254": Metadata, "168.63.129.16": Metadata,
		"224.0.0.1": Multicast, "239.255.255.255": Multicast, "255.255.255.255": Multicast, "ff02::1": Multicast,
		"10.0.0.0": Private, "172.16.0.0": Private, "172.31.255.255": Private, "192.168.255.255": Private, "fc00::1": Private, "fdff::1": Private, "fec0::1": Private,
		"100.64.0.0": Shared, "100.127.255.255": Shared, "192.0.0.1": Reserved, "192.0.2.1": Reserved, "198.18.0.1": Reserved, "198.19.255.255": Reserved,
		"198.51.100.1": Reserved, "203.0.113.1": Reserved, "240.0.0.1": Reserved, "255.255.255.254": Reserved, "192.88.99.1": Reserved,
		"2001:db8::1": Reserved, "2001:2::1": Reserved, "100::1": Reserved, "3fff::1": Reserved, "5f00::1": Reserved, "4000::1": Reserved, "::2": Unspecified,
		"::ffff:10.0.0.1": Private, "::ffff:0:127.0.0.1": Loopback, "::127.0.0.1": Loopback, "::8.8.8.8": Reserved, "64:ff9b::127.0.0.1": Loopback,
		"64:ff9b::10.0.0.1": Private, "64:ff9b::8.8.8.8": "", "64:ff9b:1::8.8.8.8": Reserved, "64:ff9b:1:7f00:0:100::": Loopback, "64:ff9b:1:a9fe:a9:fe00::": Metadata,
		"2002:7f00:1::": Loopback, "2002:808:808::1": Reserved, "2001:0:7f00:1::1": Loopback, "2600::5efe:a9fe:a9fe": Metadata, "2600::200:5efe:a00:1": Private,
		"2600::5efe:808:808": "", "8.8.8.8": "", "2606:4700::1111": "", "172.15.255.255": "", "172.32.0.0": "", "100.63.255.255": "", "100.128.0.0": "",
		"11.0.0.0": "", "9.255.255.255": "", "223.255.255.255": "", "128.0.0.1": "", "126.255.255.255": "",
	} {
		if got := judge(netip.MustParseAddr(a), nil); got != want {
			t.Errorf("%s: %q, want %q", a, got, want)
		}
	}
	if judge(netip.Addr{}, nil) == "" {
		t.Error("no address passes")
	}
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	for a, want := range map[string]Reason{
		"10.0.0.1": "", "100.64.0.1": "", "198.18.0.1": "", "fd12::1": "", "2001:db8::1": "", "64:ff9b::10.0.0.1": "",
		"127.0.0.1": Loopback, "169.254.169.254": Metadata, "0.0.0.0": Unspecified, "224.0.0.1": Multicast, "255.255.255.255": Multicast,
		"fd00:ec2::254": Metadata, "64:ff9b::169.254.169.254": Metadata, "64:ff9b:1::169.254.169.254": Metadata, "2002:7f00:1::": Loopback, "fd12::5efe:7f00:1": Loopback,
	} {
		if got := judge(netip.MustParseAddr(a), all); got != want {
			t.Errorf("%s with all of allow_private: %q, want %q", a, got, want)
		}
	}
	// What Go itself knows to be special must be refused, wherever it is hidden.
	for range 100000 {
		b := [4]byte{byte(rand.Uint32()), byte(rand.Uint32()), byte(rand.Uint32()), byte(rand.Uint32())}
		a := netip.AddrFrom4(b)
		if a.IsGlobalUnicast() && !a.IsPrivate() {
			continue
		}
		for _, prefix := range []string{"::ffff:0:0", "64:ff9b::", "::ffff:0:0:0", "2600::5efe:0:0"} {
			h := netip.MustParseAddr(prefix).As16()
			copy(h[12:], b[:])
			if judge(netip.AddrFrom16(h), nil) == "" {
				t.Fatalf("%v passes", netip.AddrFrom16(h))
			}
		}
	}
}

func TestOwnAddressesAreKnown(t *testing.T) {
	cfg := openConfig()
	cfg.Own = []netip.Prefix{netip.MustParsePrefix("9.9.9.9/32")}
	p, err := Compile(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"9.9.9.9", "::ffff:9.9.9.9"} {
		if d := p.DecideAddress(Request{User: "u"}, netip.MustParseAddr(a)); d.Reason != OwnAddress {
			t.Errorf("%s: %+v", a, d)
		}
	}
}
