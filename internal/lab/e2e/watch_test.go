package e2e

import (
	"bytes"
	"encoding/base64"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/internal/identity"
	"perimeterd/internal/lab"
	"perimeterd/knock"
	"perimeterd/vpn/client"
)

// output keeps what a running command prints.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// watching starts `perimeterd watch` of the client's address.
func (s *stage) watching() (*lab.Cmd, *output) {
	s.t.Helper()
	bin, err := lab.Bin("perimeterd")
	if err != nil {
		s.t.Fatal(err)
	}
	c, out := s.Bastion.Command(s.ctx, bin, "--config", s.daemon.Config, "watch", s.Client.Addr.String(), "--for", "30s"), &output{}
	c.Stdout, c.Stderr = out, out
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.says(out, "^watching 198.18.1.2 for 30s; it is .*; Ctrl-C ends it$")
	return c, out
}

// says waits until a line of the output matches.
func (s *stage) says(out *output, line string) {
	s.t.Helper()
	re := regexp.MustCompile("(?m)" + line)
	for deadline := time.Now().Add(5 * time.Second); !re.MatchString(out.String()); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("no line %q in\n%s", line, out)
		}
	}
}

// token is one of alice's, some steps from now.
func (s *stage) token(away int64, index uint8) []byte {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.Dir, "alice.profile"))
	if err != nil {
		s.t.Fatal(err)
	}
	var p client.Profile
	if err := toml.Unmarshal(text, &p); err != nil {
		s.t.Fatal(err)
	}
	secret, err := base64.StdEncoding.DecodeString(p.KnockSecret)
	if err != nil {
		s.t.Fatal(err)
	}
	server, err := identity.ReadServerID(filepath.Join(s.daemon.Dir, "pki/server.id"))
	if err != nil {
		s.t.Fatal(err)
	}
	const length = 30 * time.Second
	t := knock.NewToken(secret, server, knock.StepAt(time.Now(), length)+away, index)
	return t[:]
}

func (s *stage) datagram(payload []byte) {
	s.t.Helper()
	c, err := s.Client.DialFrom(s.ctx, s.Client.Addr, "udp", netip.AddrPortFrom(s.Bastion.Addr, 1194).String())
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(payload); err != nil {
		s.t.Fatal(err)
	}
}

func TestWatchTellsWhatBecameOfEachKnock(t *testing.T) {
	s := newStage(t, lab.Options{})
	c, out := s.watching()
	const at = `^\d\d:\d\d:\d\d\.\d{3}  `

	s.fails(s.Client.Command(s.ctx, "curl", "-sSk", "--max-time", "0.5", "https://198.18.1.1:1194/"))
	s.says(out, at+`gate 1194/tcp: a connection begins: dropped: no window is open; a knock must come first$`)
	s.datagram(s.token(-9, 0))
	s.says(out, at+`token: of alice for step t−(9|10): the clock there is about (4m30s|5m0s) slow .*: it opens nothing; set the clock`)
	s.datagram(make([]byte, knock.TokenSize))
	s.says(out, at+`token: nobody here has this one: it is for another server`)

	// A wrong order, then the right one.
	ports := s.sequence()
	knockAt := func(ports ...string) {
		s.ok(s.Client.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "30", s.Bastion.Addr.String()}, ports...)...))
	}
	knockAt(ports[0], ports[2])
	s.says(out, at+`sequence: `+ports[0]+`/tcp, knock 1 of 4 of "default"$`)
	s.says(out, at+`sequence: `+ports[2]+`/tcp does not follow \[`+ports[0]+`\]: back to the start$`)
	knockAt(ports[0], "22")
	s.says(out, at+`22/tcp: not one of our ports; passed on to the host; the sequence begins anew`)
	knockAt(ports...)
	s.says(out, at+`sequence: `+ports[3]+`/tcp, knock 4 of 4 of "default": opened, (1m0s|59s) left$`)
	s.fails(s.Client.Command(s.ctx, "curl", "-sSk", "--max-time", "0.5", "https://198.18.1.1:1194/"))
	s.says(out, at+`gate 1194/tcp: a connection begins: let in; window of the shared sequence, (1m0s|\d+s) left$`)

	// Tokens.
	token := s.token(0, 3)
	s.datagram(token)
	s.says(out, at+`token: of alice: opened for 1m0s$`)
	s.datagram(token)
	s.says(out, at+`token: of alice, spent already: the same packet came before; it opens nothing$`)
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))

	// Another firewall behind ours.
	s.ok(s.Bastion.Command(s.ctx, "nft", "add table inet other; add chain inet other in { type filter hook input priority 0; policy drop; }"))
	s.fails(s.Client.Command(s.ctx, "curl", "-sSk", "--max-time", "0.5", "https://198.18.1.1:1194/"))
	s.says(out, at+`gate 1194/tcp: a connection begins: we let it in, and another firewall of this host dropped it: .perimeterd check. says which rule to add$`)
	if got, err := s.daemon.Perimeterd(s.ctx, "check"); err == nil || !strings.Contains(got, "problem  other firewalls: chain inet other in drops 1194/tcp, 1194/udp by its policy: `nft insert rule") {
		t.Errorf("check: %v\n%s", err, got)
	}
	s.ok(s.Bastion.Command(s.ctx, "nft", "delete table inet other"))

	// Nothing stays, even of one that is killed.
	tables := func() string { return s.ok(s.Bastion.Command(s.ctx, "nft", "list", "tables")) }
	if got := tables(); !strings.Contains(got, "perimeterd_watch_") {
		t.Errorf("tables while watching:\n%s", got)
	}
	if err := c.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	if got := strings.TrimSpace(tables()); got != "table inet perimeterd" {
		t.Errorf("tables after the end:\n%s", got)
	}
	t.Logf("\n%s", out)
}

func TestWatchSaysWhatToLookAtWhenNothingArrives(t *testing.T) {
	s := newStage(t, lab.Options{})
	out, err := s.daemon.Perimeterd(s.ctx, "watch", "198.18.1.99", "--for", "300ms")
	if err != nil || !strings.Contains(out, "nothing arrived from 198.18.1.99. Does the user come from another address") {
		t.Errorf("%v\n%s", err, out)
	}
	t.Log(out)
}

func TestCheckFindsTheHostsTroubles(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.Bastion.Command(s.ctx, "nft", "add table inet docker; add chain inet docker forward { type filter hook forward priority 0; policy drop; }"))
	start := time.Now()
	out, err := s.daemon.Perimeterd(s.ctx, "check")
	t.Logf("%v\n%s", time.Since(start).Round(time.Millisecond), out)
	if err != nil || strings.Contains(out, "problem") {
		t.Errorf("a sound host: %v\n%s", err, out)
	}
	for _, want := range []string{"ok       ports: the running daemon has them\n", "ok       tunnel.network: 10.77.0.0/16 overlaps no route of this host\n",
		"ok       egress.bind: 198.19.1.10 is an address of this host\n", "ok       other firewalls: none stands in the way\n", "ok       kernel, token knock: opens", "ok       kernel, ownership: yes"} {
		if !strings.Contains(out, want) {
			t.Errorf("no line %q", want)
		}
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
	if got := s.ok(s.alice.Knock(s.ctx)); got == "" {
		t.Error("the knock says nothing")
	}

	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	for _, network := range []string{"tcp", "tcp4"} {
		l, err := s.Bastion.Listen(network, map[string]string{"tcp": ":1194", "tcp4": "0.0.0.0:" + s.sequence()[1]}[network])
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	u, err := s.Bastion.ListenPacket("udp", ":1194")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	s.ok(s.Bastion.Command(s.ctx, "ip", "route", "add", "10.77.32.0/20", "dev", "egress"))
	if err := s.daemon.Set(lab.Setting{Key: "bind", Value: `"203.0.113.5"`}); err != nil {
		t.Fatal(err)
	}
	out, err = s.daemon.Perimeterd(s.ctx, "check")
	t.Log(out)
	if err == nil {
		t.Error("check found nothing")
	}
	for _, want := range []string{
		"problem  gate.listen \":1194\": another program has 1194/tcp: `ss -ltnp sport = :1194` names it: stop it, or choose another port\n",
		"problem  tunnel.port: another program has 1194/udp: `ss -lunp sport = :1194` names it",
		"problem  knock.sequence: a program here listens on port " + s.sequence()[1] + ", so its clients would be knocking: choose a free port\n",
		"problem  tunnel.network: 10.77.0.0/16 overlaps the route 10.77.32.0/20 dev egress of this host",
		"problem  egress.bind: 203.0.113.5 is not an address of this host (it has 198.18.1.1, ",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no line %q", want)
		}
	}
}
