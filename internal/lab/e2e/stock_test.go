package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/internal/lab"
	"perimeterd/vpn"
	"perimeterd/vpn/client"
)

// files lays a profile's certificate, key and CA out as stock curl wants them.
func (s *stage) files(user string) (args []string) {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.Dir, user+".profile"))
	if err != nil {
		s.t.Fatal(err)
	}
	var p client.Profile
	if err := toml.Unmarshal(text, &p); err != nil {
		s.t.Fatal(err)
	}
	for flag, pem := range map[string]string{"--cacert": p.CA, "--cert": p.Certificate, "--key": p.Key} {
		file := filepath.Join(s.Dir, user+flag+".pem")
		if err := os.WriteFile(file, []byte(pem), 0o600); err != nil {
			s.t.Fatal(err)
		}
		args = append(args, flag, file)
	}
	return args
}

var sequenceLine = regexp.MustCompile(`(?m)^ports = \[(.*?)\]`)

// sequence is the knock sequence that init drew.
func (s *stage) sequence() []string {
	s.t.Helper()
	text, err := os.ReadFile(s.daemon.Config)
	if err != nil {
		s.t.Fatal(err)
	}
	m := sequenceLine.FindStringSubmatch(string(text))
	if m == nil {
		s.t.Fatalf("no sequence in\n%s", text)
	}
	var ports []string
	for p := range strings.SplitSeq(m[1], ",") {
		ports = append(ports, strings.Trim(p, ` "`))
	}
	return ports
}

// Everything that walks the path here is from Debian: knockd's knock, curl, wg-quick with wireguard-go.
func TestStockToolsWalkTheWholePath(t *testing.T) {
	s := newStage(t, lab.Options{})
	gate := append(s.files("alice"), "-sS", "--max-time", "5", "-w", "\n%{http_code}")
	url := fmt.Sprintf("https://%v:1194", s.Bastion.Addr)
	s.fails(s.Client.Command(s.ctx, "curl", append(gate, "--max-time", "1", url+vpn.SessionPath)...))

	s.ok(s.Client.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "20", s.Bastion.Addr.String()}, s.sequence()...)...))
	if _, err := s.daemon.Await(s.ctx, "window opened", 1); err != nil {
		t.Fatal(err)
	}
	private := strings.TrimSpace(s.ok(s.Client.Command(s.ctx, "wg", "genkey")))
	pub := s.Client.Command(s.ctx, "wg", "pubkey")
	pub.Stdin = strings.NewReader(private)
	public := strings.TrimSpace(s.ok(pub))
	out := s.ok(s.Client.Command(s.ctx, "curl", append(gate, "-d", fmt.Sprintf(`{"public_key":%q}`, public), url+vpn.SessionPath)...))
	body, status, _ := strings.Cut(out, "\n\n")
	var reply vpn.SessionReply
	if err := json.Unmarshal([]byte(body), &reply); err != nil || status != "201" {
		t.Fatalf("POST: %s, %v", out, err)
	}
	conf := s.ok(s.Client.Command(s.ctx, "curl", append(gate[:len(gate)-2:len(gate)-2], url+vpn.SessionPath+"/"+reply.ID+"/wg-quick")...))
	t.Logf("the wg-quick file:\n%s", conf)
	if !strings.Contains(conf, base64.StdEncoding.EncodeToString(reply.PresharedKey)) {
		t.Error("it lacks the preshared key")
	}
	file := filepath.Join(s.Dir, "stock.conf")
	if err := os.WriteFile(file, []byte(strings.Replace(conf, "PrivateKey =", "PrivateKey = "+private, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	up := s.Client.Command(s.ctx, "wg-quick", "up", file)
	up.Env = append(os.Environ(), "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go", "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD=1")
	t.Log(s.ok(up))
	c := s.Client.Command(s.ctx, "curl", "-sS", "--max-time", "10", "--cacert", s.cloud.CAFile, "-x", "http://"+reply.Proxy.String(), "https://"+cloudName+"/")
	if got, want := s.ok(c), "seen from "+s.Egress.String()+"\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	s.ok(s.Client.Command(s.ctx, "curl", append(gate, "-X", "DELETE", url+vpn.SessionPath+"/"+reply.ID)...))
	s.fails(s.Client.Command(s.ctx, "curl", "-sS", "--max-time", "1", "-x", "http://"+reply.Proxy.String(), "https://"+cloudName+"/"))
	down := s.Client.Command(s.ctx, "wg-quick", "down", file)
	down.Env = up.Env
	s.ok(down)
}

func TestRulesetReadsLikeTheDocumentedOneAndIsAllThereIs(t *testing.T) {
	s := newStage(t, lab.Options{})
	list := func() string { return s.ok(s.Bastion.Command(s.ctx, "nft", "-s", "-t", "list", "ruleset")) }
	first := list()
	if n := strings.Count(first, "\ntable "); n != 0 || !strings.HasPrefix(first, "table inet perimeterd {") {
		t.Errorf("%d other tables in\n%s", n, first)
	}
	if err := s.daemon.Signal(hangUp); err != nil {
		t.Fatal(err)
	}
	if _, err := s.daemon.Await(s.ctx, "configuration reloaded", 1); err != nil {
		t.Fatal(err)
	}
	if again := list(); again != first {
		t.Errorf("applied again it lists otherwise:\n%s\nand before:\n%s", again, first)
	}
	t.Log(first)
}

func TestStrangersAndNeighboursDoNotReachTheInside(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	neighbour, err := s.AddHost(s.ctx, "neighbour")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := neighbour.Command(s.ctx, "ip", "route", "add", "10.77.0.0/16", "via", s.Bastion.Addr.String()).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// With an address of the tunnel's network as well.
	if err := neighbour.AddAddress(s.ctx, "outside", netip.MustParsePrefix("10.77.0.2/32")); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{neighbour.Addr.String(), "10.77.0.2"} {
		out, err := neighbour.Command(s.ctx, "curl", "-sS", "--max-time", "1", "--interface", from, "-x", "http://10.77.0.1:3128", "https://"+cloudName+"/").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "timed out") {
			t.Errorf("from %s: %v %s: want silence", from, err, out)
		}
	}
	if out := s.fails(neighbour.Command(s.ctx, "curl", "-sS", "--max-time", "1", "https://"+netip.AddrPortFrom(s.Bastion.Addr, 1194).String())); !strings.Contains(out, "timed out") {
		t.Errorf("the gate answered a neighbour: %s", out)
	}
	// Inside, a session reaches proxy and console and nothing else of the host.
	ssh, err := s.Bastion.Listen("tcp", ":22")
	if err != nil {
		t.Fatal(err)
	}
	defer ssh.Close()
	for _, to := range []string{"10.77.0.1:22", "198.19.1.1:22", "10.77.0.3:80"} {
		if out := s.fails(s.Client.Command(s.ctx, "curl", "-sS", "--max-time", "1", "--interface", "10.77.0.2", "http://"+to)); strings.Contains(out, "refused") {
			t.Errorf("%s answered through the tunnel: %s", to, out)
		}
	}
}
