package proxy

import (
	"net/netip"
	"strings"
	"testing"
)

func TestPACNamesWhatAUserMayReachAndNoMore(t *testing.T) {
	p, err := Compile(Config{
		Regions: []string{"eu-west-1"},
		Rules: []Rule{
			{Deny: []string{"@customer-hosted", "denied.example.org"}},
			{Allow: []string{"*.example.org", "example.org", "bücher.example"}, Ports: []uint16{443}, Groups: []string{"*"}, TLS: true},
			{Allow: []string{"ops.example.com", "11.22.0.0/16", "8.8.8.8", "2606:4700::/32"}, Ports: []uint16{8443}, Groups: []string{"operators"}},
			{Allow: []string{"carols.example.com", "@customer-hosted"}, Ports: []uint16{443}, Users: []string{"carol"}},
			{Allow: []string{"nobodys.example.com"}, Ports: []uint16{443}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort("10.77.0.1:3128")
	const want = `// What perimeterd allows "alice" goes to the proxy, and nowhere else. All other traffic is none of its business.
function FindProxyForURL(url, host) {
	var proxy = "PROXY 10.77.0.1:3128";
	var names = {
		"example.org": 1,
		"ops.example.com": 1,
		"xn--bcher-kva.example": 1
	};
	var suffixes = {
		"example.org": 1
	};
	var has = Object.prototype.hasOwnProperty;
	host = host.toLowerCase().replace(/^\[|\]$/g, "").replace(/\.$/, "");
	if (has.call(names, host)) return proxy;
	for (var i = host.indexOf("."); i >= 0; i = host.indexOf(".", i + 1)) {
		if (has.call(suffixes, host.substring(i + 1))) return proxy;
	}
	var four = /^\d+\.\d+\.\d+\.\d+$/.test(host), six = host.indexOf(":") >= 0;
	if (four && isInNet(host, "11.22.0.0", "255.255.0.0")) return proxy;
	if (four && isInNet(host, "8.8.8.8", "255.255.255.255")) return proxy;
	return "DIRECT";
}
`
	if got := string(p.PAC("alice", []string{"operators"}, at)); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	carol, nobody := string(p.PAC("carol", nil, at)), string(p.PAC("mallory", nil, at))
	for _, line := range []string{`"carols.example.com": 1`, `(/^.+\.elb\.[^.]*\.amazonaws\.com$/.test(host)) return proxy;`} {
		if !strings.Contains(carol, line) || strings.Contains(nobody, line) {
			t.Errorf("%s: for carol and for nobody else:\n%s\n%s", line, carol, nobody)
		}
	}
	for _, text := range []string{carol, nobody} {
		if strings.Contains(text, "nobodys") || strings.Contains(text, "denied") || strings.Contains(text, "ops.") || strings.Contains(text, "; DIRECT") {
			t.Errorf("too much:\n%s", text)
		}
	}
	if got := string(p.PAC("x\"\n*/\u2028</script>", nil, at)); strings.Count(got, "\n") != strings.Count(nobody, "\n") || strings.Contains(got, "\u2028") {
		t.Errorf("a user's name leaves its comment:\n%s", got)
	}
	none, err := Compile(Config{})
	if err != nil {
		t.Fatal(err)
	}
	if got := string(none.PAC("alice", nil, at)); !strings.Contains(got, "names = {};") || strings.Contains(got, "isInNet") {
		t.Errorf("without rules:\n%s", got)
	}
}
