package main

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/identity"
	"perimeterd/knock"
)

// fakeDoor is what the kernel says, without one; the end-to-end tests have one.
type fakeDoor struct {
	windows []firewall.Window
	spent   map[knock.Token]bool
}

func (d *fakeDoor) Present() (bool, error)              { return true, nil }
func (d *fakeDoor) Windows() ([]firewall.Window, error) { return d.windows, nil }
func (d *fakeDoor) Spent(t knock.Token) (bool, error)   { return d.spent[t], nil }
func (d *fakeDoor) open(x *explainer, at time.Time) {
	d.windows = []firewall.Window{{Source: x.source, Credential: 1, Expires: at.Add(time.Minute)}}
}
func (x *explainer) of(u int, step int64) knock.Token {
	return x.made(x.users[u].Name, x.users[u].Epoch, step)
}
func (x *explainer) made(n string, e uint32, s int64) knock.Token {
	return knock.NewToken(knock.Secret(x.master, n, e), x.server, s, 1)
}

func testExplainer(t *testing.T) (*explainer, *fakeDoor) {
	t.Helper()
	c := &configs.Config{Knock: configs.Knock{Tokens: true}, Firewall: firewall.Config{GatePorts: []uint16{1194, 443}, TunnelPort: 1194,
		Window: time.Minute, Step: 30 * time.Second}}
	for _, s := range [][]string{{"7102", "19044/udp", "33127"}, {"7102", "5000", "600"}} {
		seq := knock.Sequence{Name: s[1], Timeout: 10 * time.Second}
		for _, p := range s {
			port, err := knock.ParsePort(p)
			if err != nil {
				t.Fatal(err)
			}
			seq.Ports = append(seq.Ports, port)
		}
		c.Firewall.Sequences = append(c.Firewall.Sequences, seq)
	}
	d := &fakeDoor{spent: map[knock.Token]bool{}}
	x := &explainer{c: c, door: d, source: netip.MustParseAddr("198.51.100.7"), master: []byte("master"), users: []identity.User{
		{Name: "alice", Credential: 1, Epoch: 2}, {Name: "bob", Credential: 2, Revoked: time.Unix(1, 0)}}}
	x.begin()
	return x, d
}

func TestTokensAreExplained(t *testing.T) {
	at := time.Unix(1_800_000_010, 0)
	const now = 1_800_000_010 / 30
	for _, test := range []struct {
		name  string
		token func(x *explainer) knock.Token
		open  bool
		spent bool
		want  string
	}{
		{"slow", func(x *explainer) knock.Token { return x.of(0, now-9) }, false, false, "of alice for step t−9: the clock there is about 4m30s slow (or here: it is 08:00:10 UTC): it opens nothing; set the clock, or knock with the sequence"},
		{"fast", func(x *explainer) knock.Token { return x.of(0, now+20) }, false, false, "of alice for step t+20: the clock there is about 10m0s fast"},
		{"too far", func(x *explainer) knock.Token { return x.of(0, now+21) }, false, false, "nobody here has this one"},
		{"opened", func(x *explainer) knock.Token { return x.of(0, now-1) }, true, true, "of alice: opened for 1m0s"},
		{"spent", func(x *explainer) knock.Token { return x.of(0, now) }, false, true, "of alice, spent already: someone knocked with it before; it opens nothing"},
		{"not loaded", func(x *explainer) knock.Token { return x.of(0, now) }, false, false, "of alice, and it opened nothing: the daemon did not load it"},
		{"old profile", func(x *explainer) knock.Token { return x.made("alice", 1, now) }, true, false, "of alice, made with an old profile: it opens nothing; send the newest one"},
		{"revoked", func(x *explainer) knock.Token { return x.of(1, now) }, false, false, "of bob, who is revoked: it opens nothing"},
		{"another server", func(x *explainer) knock.Token { return knock.Token{1} }, true, true, "nobody here has this one"},
	} {
		x, d := testExplainer(t)
		token := test.token(x)
		d.spent[token] = test.spent
		if test.open {
			d.open(x, at)
		}
		a := firewall.Arrival{At: at, Proto: knock.UDP, Length: knock.TokenSize, Payload: token[:], Destination: netip.MustParseAddrPort("198.51.100.1:1194")}
		if got := x.explain(a); !strings.HasPrefix(got, "token: "+test.want) {
			t.Errorf("%s: %s", test.name, got)
		}
	}
}

func TestSequencesAreFollowedAsTheKernelDoes(t *testing.T) {
	x, d := testExplainer(t)
	at := time.Unix(1_800_000_010, 0)
	for _, step := range []struct {
		after time.Duration
		port  string
		want  string
	}{
		{0, "33127", "sequence: 33127/tcp is the first of no sequence: back to the start"},
		{0, "7102", `sequence: 7102/tcp, knock 1 of 3 of "19044/udp" or 3 of "5000"`},
		{0, "7102", "sequence: 7102/tcp again: that changes nothing"},
		{0, "443", "gate 443/tcp: a connection begins: let in; its window is closed by now"}, // decided before, resets nothing
		{0, "5000", `sequence: 5000/tcp, knock 2 of 3 of "5000"`},
		{0, "19044/udp", "sequence: 19044/udp does not follow [7102 5000]: back to the start"},
		{0, "7102", `sequence: 7102/tcp, knock 1 of`},
		{0, "22", "22/tcp: not one of our ports; passed on to the host; the sequence begins anew: nothing else may come between its knocks"},
		{0, "53/udp", "53/udp: not one of our ports; passed on to the host"},
		{0, "7102", `sequence: 7102/tcp, knock 1 of`},
		{11 * time.Second, "19044/udp", "sequence: 19044/udp is the first of no sequence: back to the start; more than 10s had gone since the one before, so it began anew"},
		{0, "7102", `sequence: 7102/tcp, knock 1 of`},
		{0, "19044/udp", `sequence: 19044/udp, knock 2 of 3 of "19044/udp"`},
		{0, "33127", `sequence: 33127/tcp, knock 3 of 3 of "19044/udp": opened, 1m0s left`},
	} {
		at = at.Add(step.after)
		if step.want[len(step.want)-4:] == "left" {
			d.open(x, at)
		}
		p, err := knock.ParsePort(step.port)
		if err != nil {
			t.Fatal(err)
		}
		a := firewall.Arrival{At: at, Proto: p.Proto, Destination: netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), p.Number), Passed: true, Delivered: true}
		if got := x.explain(a); !strings.HasPrefix(got, step.want) {
			t.Errorf("%s: %s\nwant %s", step.port, got, step.want)
		}
	}
}

type names map[string][]netip.Addr

func (n names) LookupNetIP(ctx context.Context, _, host string) ([]netip.Addr, error) {
	if list, ok := n[host]; ok {
		return list, nil
	}
	<-ctx.Done() // a name server that does not answer
	return nil, errors.Join(ctx.Err())
}

func TestVPCEndpointsAreSeen(t *testing.T) {
	began := time.Now()
	lines := checkAWSNames(t.Context(), names{
		"sts.us-east-1.amazonaws.com":    {netip.MustParseAddr("198.51.100.9")},
		"sts.eu-central-1.amazonaws.com": {netip.MustParseAddr("::ffff:10.0.3.4")},
	}, []string{"us-east-1", "eu-central-1", "eu-west-1"})
	for i, want := range []string{"ok|sts.us-east-1.amazonaws.com is public", "warning|sts.eu-central-1.amazonaws.com resolves to 10.0.3.4, a VPC endpoint",
		"warning|sts.eu-west-1.amazonaws.com is not resolvable here"} {
		if got := lines[i].status + "|" + lines[i].text; !strings.HasPrefix(got, want) {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
	if took := time.Since(began); took > 1500*time.Millisecond {
		t.Errorf("it took %v", took)
	}
}
