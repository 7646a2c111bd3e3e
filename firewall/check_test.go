package firewall

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestKernelOfThisMachineCanDoItAll(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	host, trusting := example(), withSequence(t)
	host.Mode = Host
	trusting.Trusted = prefixes("0.0.0.0/0", "::/0")
	for name, cfg := range map[string]Config{"as given": example(), "with a sequence": withSequence(t), "host mode": host, "trusting all": trusting} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			list := CheckKernel(t.Context(), cfg)
			for _, a := range list {
				t.Logf("%s: %s %v", a.Name, a.Text, a.Err)
				if a.Err != nil {
					t.Errorf("%s: %v", a.Name, a.Err)
				}
			}
			if want := len((&bench{}).trials()); len(list) != want {
				t.Errorf("%d abilities of %d were tried", len(list), want)
			}
			t.Logf("it took %v", time.Since(start).Round(time.Millisecond))
		})
	}
	if after, err := os.Readlink("/proc/self/ns/net"); err != nil || after != before {
		t.Errorf("the process was left in namespace %s, %v; it began in %s", after, err, before)
	}
}

// What the trials are worth: each fails where the table does not do its part.
func TestTrialsNoticeATableThatDoesNotItsPart(t *testing.T) {
	for _, test := range []struct{ edit, fails string }{
		{"flush chain inet perimeterd token", "token knock"},
		{"insert rule inet perimeterd input tcp dport 1194 meta mark set 0x67617465 accept", "silence without a window"},
		{"insert rule inet perimeterd token ip saddr 192.0.2.4 goto open", "replayed token"},
		{"insert rule inet perimeterd token ip saddr 192.0.2.5 goto open", "wrong token"},
		{"insert rule inet perimeterd gate drop", "gate with a window"},
		{"insert rule inet perimeterd input tcp dport 1194 accept", "gate with a window"}, // without the mark
		{"insert rule inet perimeterd knock return", "knock sequence"},
		{"insert rule inet perimeterd knock ip saddr 192.0.2.8 goto seq_open", "wrong order"},
		{"insert rule inet perimeterd gate tcp flags != syn drop", "established connections"},
		{"insert rule inet perimeterd token meta nfproto ipv6 drop", "IPv6 knock"},
		{"add element inet perimeterd open4 { 192.0.2.99 timeout 1h : 0x7 }", "window's end"},
	} {
		t.Run(test.fails, func(t *testing.T) {
			var failed []string
			alone(func() {
				b := &bench{plain: true}
				defer b.close()
				for _, tr := range b.trials() {
					if _, err := tr.run(t.Context()); err != nil {
						failed = append(failed, tr.name)
						t.Logf("%s: %v: %s", tr.name, err, tr.lacking)
						if tr.needed {
							return
						}
					}
					switch tr.name {
					case "network namespace":
						b.cfg = b.private(withSequence(t))
					case "nftables table":
						if out, err := exec.Command("nft", test.edit).CombinedOutput(); err != nil {
							t.Errorf("nft %s: %v\n%s", test.edit, err, out)
						}
					}
				}
			})
			if len(failed) == 0 || failed[0] != test.fails {
				t.Errorf("%s: what fails is %q, want %q first", test.edit, failed, test.fails)
			}
		})
	}
}
