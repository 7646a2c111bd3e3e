package firewall

import (
	_ "embed"
	"fmt"
	"strings"
	"testing"
)

// Rulesets in the form that the tools of Debian 12 and 13 leave behind.
const (
	ufwRules = `
table ip filter {
	chain ufw-before-input { %[2]s
		iifname "lo" counter accept
		ct state related,established counter accept
		ct state invalid counter drop
		meta l4proto icmp icmp type echo-request counter accept
		udp sport 67 udp dport 68 counter accept
		counter jump ufw-not-local
		ip daddr 224.0.0.251 udp dport 5353 counter accept
		counter jump ufw-user-input
	}
	chain ufw-not-local {
		fib daddr type local counter return
		fib daddr type multicast counter return
		limit rate 3/minute burst 10 packets counter log prefix "[UFW BLOCK] "
		counter drop
	}
	chain ufw-user-input {
		tcp dport 22 counter accept
		%[1]s
	}
	chain INPUT {
		type filter hook input priority filter; policy drop;
		counter jump ufw-before-input
		limit rate 3/minute burst 10 packets counter log prefix "[UFW BLOCK] "
	}
}`
	firewalldRules = `
table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_INPUT_ZONES {
		iifname "docker0" goto filter_IN_docker
		iifname "eth0" goto filter_IN_public
		goto filter_IN_public
	}
	chain filter_IN_docker { accept
	}
	chain filter_IN_public {
		jump filter_IN_public_deny
		jump filter_IN_public_allow
		meta l4proto { icmp, ipv6-icmp } accept
	}
	chain filter_IN_public_deny {
	}
	chain filter_IN_public_allow {
		tcp dport 22 accept
		%[1]s
	}
}`
	serverRules = `
table inet filter {
	set open { type inet_service; flags interval; elements = { 22, 80, %[1]s }; }
	chain input {
		type filter hook input priority filter; policy drop;
		ct state vmap { invalid : drop, established : accept, related : accept }
		iifname vmap { "lo" : accept, "wg*" : accept }
		ip saddr 10.0.0.0/8 accept
		tcp dport @open accept
		udp dport @open accept
		reject
	}
}`
	dockerRules = `
table ip nat {
	chain DOCKER { iifname "docker0" counter return
	}
	chain POSTROUTING { type nat hook postrouting priority srcnat; policy accept;
		oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade
	}
	chain PREROUTING { type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local counter jump DOCKER
	}
}
table ip filter {
	chain DOCKER-USER { counter return
	}
	chain FORWARD { type filter hook forward priority filter; policy drop;
		counter jump DOCKER-USER
	}
}
table inet f2b-table {
	set addr-set-sshd { type ipv4_addr; elements = { 203.0.113.9 } }
	chain f2b-chain { type filter hook input priority filter - 1; policy accept;
		tcp dport 22 ip saddr @addr-set-sshd reject with icmp port-unreachable
		ip saddr { 203.0.113.0/24, 198.51.100.7 } drop
	}
}`
	kubernetesRules = `
table ip nat {
	chain KUBE-POSTROUTING {
		meta mark & 0x00004000 != 0x00004000 counter return
		meta mark set meta mark ^ 0x00004000
		counter masquerade
	}
	chain POSTROUTING { type nat hook postrouting priority srcnat; policy accept;
		jump KUBE-POSTROUTING
	}
}
table ip filter {
	chain KUBE-FIREWALL { meta mark & 0x00008000 == 0x00008000 drop
	}
	chain INPUT { type filter hook input priority filter; policy accept;
		ct state new counter jump KUBE-FIREWALL
	}
}`
	dropByMarkRules = `
table inet mesh {
	chain in { type filter hook input priority filter; policy accept;
		meta mark & 0x00000400 == 0x00000400 drop
	}
	chain late { type filter hook input priority filter + 5; policy accept;
		meta mark set 0x00000001
	}
	chain early { type filter hook input priority filter - 20; policy accept;
		meta mark set 0x00000001
	}
	chain thief { type filter hook prerouting priority mangle; policy accept;
		ip saddr 203.0.113.9 meta mark set 0x67617465
	}
}`
)

func TestOtherFirewallsThatStandInTheWayAreFound(t *testing.T) {
	const both = "tcp dport 1194 accept\n udp dport 1194 accept"
	for _, test := range []struct {
		name, rules string
		want        []string // of each obstacle
	}{
		{"nothing", "", nil},
		{"ufw", fmt.Sprintf(ufwRules, "", ""), []string{
			"sure: chain ip filter INPUT drops 1194/tcp, 1194/udp by its policy: `ufw allow 1194/tcp; ufw allow 1194/udp`"}},
		{"ufw with the gate only", fmt.Sprintf(ufwRules, "tcp dport 1194 accept", ""), []string{"sure: chain ip filter INPUT drops 1194/udp by its policy: `ufw allow 1194/udp`"}},
		{"ufw that allows", fmt.Sprintf(ufwRules, both, ""), nil},
		{"ufw that allows a network only", fmt.Sprintf(ufwRules, "ip saddr 198.51.100.0/24 tcp dport 1194 accept\n udp dport 1000-2000 accept", ""), []string{
			"sure: chain ip filter INPUT drops 1194/tcp by its policy: `ufw allow 1194/tcp`"}},
		{"firewalld", fmt.Sprintf(firewalldRules, ""), []string{
			"sure: chain inet firewalld filter_INPUT drops 1194/tcp, 1194/udp by a rule of chain filter_INPUT: " +
				"`firewall-cmd --permanent --add-port=1194/tcp; firewall-cmd --permanent --add-port=1194/udp; firewall-cmd --reload`"}},
		{"firewalld that allows", fmt.Sprintf(firewalldRules, both), nil},
		{"a server's nftables.conf", fmt.Sprintf(serverRules, "443"), []string{
			"sure: chain inet filter input drops 1194/tcp, 1194/udp by a rule of chain input: `nft insert rule inet filter input tcp dport 1194 accept; " +
				"nft insert rule inet filter input udp dport 1194 accept`, and the same in /etc/nftables.conf or where that table comes from"}},
		{"a server's nftables.conf that allows", fmt.Sprintf(serverRules, "1190-1199"), nil},
		{"docker and fail2ban", dockerRules, nil},
		{"kubernetes", kubernetesRules, []string{
			"perhaps: chain ip nat KUBE-POSTROUTING tells packets apart by bits of the mark that the gate's packets carry (0x67617465): " +
				"harmless while net.ipv4.tcp_fwmark_accept and net.ipv4.fwmark_reflect are 0: `sysctl net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect`"}},
		{"marks", dropByMarkRules, []string{
			"sure: chain inet mesh in drops 1194/tcp, 1194/udp by a rule of chain in: `nft insert rule inet mesh in tcp dport 1194 accept; " +
				"nft insert rule inet mesh in udp dport 1194 accept`, and the same in /etc/nftables.conf or where that table comes from",
			"sure: chain inet mesh late writes the packet's mark (chain late): the gate's sockets take only packets with the mark 0x67617465, so nobody would come in: let that rule pass over 1194/tcp, 1194/udp",
			"sure: chain inet mesh thief gives packets the mark 0x67617465: that mark opens the gate to whoever has it: take another there"}},
		{"iptables for IPv6", "table ip6 filter { chain INPUT { type filter hook input priority filter; policy drop;\n}\n}", []string{
			"sure: chain ip6 filter INPUT drops 1194/tcp, 1194/udp by its policy: `ip6tables -I INPUT -p tcp --dport 1194 -j ACCEPT; ip6tables -I INPUT -p udp --dport 1194 -j ACCEPT`, " +
				"and where your rules are kept (iptables-persistent: `netfilter-persistent save`)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := New(testLog(t), private(t))
			if _, err := f.Apply(example()); err != nil { // ours is not in the way of itself
				t.Fatal(err)
			}
			run(t, test.rules, "nft", "-f", "-")
			texts, err := ForeignRules(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			compareObstacles(t, texts, test.want)
		})
	}
}

func compareObstacles(t *testing.T, texts [][]byte, want []string) {
	t.Helper()
	list, err := FindObstacles(texts, example(), []string{"eth0"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range list {
		got = append(got, map[bool]string{true: "sure: ", false: "perhaps: "}[o.Sure]+o.String())
	}
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// ufwByIptables is embedded: the test's binary also runs where the tree is not.
//
//go:embed testdata/ufw-by-iptables-nft.json
var ufwByIptables []byte

// What iptables-nft makes of ufw's rules, as nft reports it: its extensions come with a name and no more. One rule, of
// multiport, may let the gate pass.
func TestRulesOfIptablesExtensionsAreNotTakenForMore(t *testing.T) {
	text := ufwByIptables
	compareObstacles(t, [][]byte{text}, []string{
		"perhaps: chain ip filter INPUT may drop 1194/tcp, 1194/udp by its policy, unless a rule that cannot be read from here lets it pass: " +
			"look at it with `ufw status verbose`; if nothing there allows it, `ufw allow 1194/tcp; ufw allow 1194/udp`"})
	without := strings.ReplaceAll(string(text), "multiport", "comment")
	compareObstacles(t, [][]byte{[]byte(without)}, []string{
		"sure: chain ip filter INPUT drops 1194/udp by its policy: `ufw allow 1194/udp`"}) // and TCP is accepted whole
}

func FuzzFindObstacles(f *testing.F) {
	text := ufwByIptables
	f.Add(text)
	f.Add([]byte(`{"nftables":[{"chain":{"family":"inet","table":"t","name":"c","type":"filter","hook":"input","prio":0,"policy":"drop"}},` +
		`{"rule":{"family":"inet","table":"t","chain":"c","expr":[{"vmap":{"key":{"meta":{"key":"iifname"}},"data":{"set":[["lo",{"goto":{"target":"c"}}]]}}}]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := FindObstacles([][]byte{data}, example(), []string{"eth0"})
		if err != nil && list != nil {
			t.Error("a result with an error")
		}
	})
}
