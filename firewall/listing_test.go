package firewall

import (
	"strings"
	"testing"

	"perimeterd/knock"
)

func TestScriptLoadsToTheSameTable(t *testing.T) {
	cfg := hostMode(t, "22/tcp from 198.51.100.0/24", "icmp")
	cfg.Sequences = []knock.Sequence{sequence(t, "7102", "19044/udp", "33127")}
	cfg.Trusted = prefixes("198.51.100.0/24", "2001:db8:5::/48")
	cfg.AllowPrivate = prefixes("10.1.0.0/16")
	planned, err := PlannedScript(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := PlannedScript(t.Context(), cfg); err != nil || strings.Join(again, "\n") != strings.Join(planned, "\n") {
		t.Errorf("planned twice, it differs: %v\n%s", err, strings.Join(again, "\n"))
	}
	private(t)
	if none, err := Script(t.Context()); err != nil || none != nil {
		t.Errorf("without a table: %v %v", none, err)
	}
	// Chains first, since rules jump to them.
	var declared, rest strings.Builder
	declared.WriteString("add table inet perimeterd\n")
	for _, c := range planned {
		if strings.HasPrefix(c, "add rule ") || strings.HasPrefix(c, "add element ") {
			rest.WriteString(c + "\n")
		} else {
			declared.WriteString(c + "\n")
		}
	}
	run(t, declared.String()+rest.String(), "nft", "-f", "-")
	is, err := Script(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	diff(t, "script", strings.Join(planned, "\n"), strings.Join(is, "\n"))
}
