package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"perimeterd/internal/lab"
)

// answer is what a TCP connection attempt from a host meets: "open", "refused" or "silent".
func (s *stage) answer(from *lab.Namespace, source, to string, port int) string {
	s.t.Helper()
	args := []string{"-sS", "--max-time", "1", fmt.Sprintf("telnet://%s:%d", to, port)}
	if source != "" {
		args = append([]string{"--interface", source}, args...)
	}
	c := from.Command(s.ctx, "curl", args...)
	c.Stdin = strings.NewReader("")
	out, err := c.CombinedOutput()
	switch text := string(out); {
	case err == nil, strings.Contains(text, "Time-out"), strings.Contains(text, "transfer closed"):
		return "open"
	case strings.Contains(text, "refused"), strings.Contains(text, "Couldn't connect"), strings.Contains(text, "Failed to connect"):
		return "refused"
	case strings.Contains(text, "timed out"):
		return "silent"
	default:
		s.t.Fatalf("curl %s: %v %s", strings.Join(args, " "), err, text)
	}
	return ""
}

func (s *stage) listenOnBastion(ports ...int) {
	s.t.Helper()
	for _, p := range ports {
		l, err := s.Bastion.Listen("tcp", fmt.Sprintf(":%d", p))
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { l.Close() })
	}
}

func TestHostModeShowsOnlyWhatIsAllowed(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "mode", Value: `"host"`},
		lab.Setting{Key: "allow", Value: `["22/tcp from 198.18.1.2", "8000-8002/tcp", "9000/tcp on egress", "icmp"]`})
	s.listenOnBastion(22, 23, 8001, 9000)
	sequence := s.sequence()
	for _, c := range []struct {
		source, to string
		port       int
		want       string
	}{
		{"198.18.1.2", "198.18.1.1", 22, "open"},
		{"198.18.1.3", "198.18.1.1", 22, "silent"},
		{"", "198.18.1.1", 23, "silent"},
		{"", "198.18.1.1", 24, "silent"}, // nothing listens there: the same silence
		{"", "198.18.1.1", 8001, "open"},
		{"", "198.18.1.1", 8002, "refused"},
		{"", "198.18.1.1", 9000, "silent"},
		{"", "198.18.1.1", 1194, "silent"},
		{"2001:db8:18:1::2", "[2001:db8:18:1::1]", 8001, "open"}, // neighbour discovery lives
		{"2001:db8:18:1::2", "[2001:db8:18:1::1]", 22, "silent"},
	} {
		if got := s.answer(s.Client, c.source, c.to, c.port); got != c.want {
			t.Errorf("port %d of %s from %q: %s, want %s", c.port, c.to, c.source, got, c.want)
		}
	}
	s.ok(s.Client.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "20", s.Bastion.Addr.String()}, sequence...)...))
	if _, err := s.daemon.Await(s.ctx, "window opened", 1); err != nil {
		t.Fatal(err)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	t.Log(s.ok(s.Bastion.Command(s.ctx, "nft", "list", "chain", "inet", "perimeterd", "host")))
}

func TestTrustedNetworkNeedsNoKnock(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "trusted", Value: `["198.18.1.3/32", "2001:db8:18:1::3/128", "198.18.64.0/24", "198.18.64.0/25"]`})
	gate := netip.AddrPortFrom(s.Bastion.Addr, 1194)
	for source, want := range map[string]string{"198.18.1.3": "open", "198.18.1.2": "silent"} {
		if got := s.answer(s.Client, source, gate.Addr().String(), 1194); got != want {
			t.Errorf("from %s: %s, want %s", source, got, want)
		}
	}
	if got := s.answer(s.Client, "2001:db8:18:1::3", "[2001:db8:18:1::1]", 1194); got != "open" {
		t.Errorf("by IPv6: %s", got)
	}
	if n := len(s.daemon.Entries("window opened")); n != 0 {
		t.Errorf("%d windows opened", n)
	}
}

func TestServiceIsForItsGroups(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "keepalive", Value: "\"25s\"\n[[tunnel.service]]\nport = 22\ngroups = [\"operators\"]\n[[tunnel.service]]\nport = 23\ngroups = [\"auditors\"]"})
	s.listenOnBastion(22, 23)
	s.ok(s.alice.VPN(s.ctx, "up")) // alice is an operator
	s.ok(s.curl("https://" + cloudName + "/"))
	for port, want := range map[int]string{22: "open", 23: "silent"} {
		if got := s.answer(s.Client, "", "10.77.0.1", port); got != want {
			t.Errorf("port %d: %s, want %s", port, got, want)
		}
	}
	s.ok(s.alice.VPN(s.ctx, "down"))
	if out := s.ok(s.Bastion.Command(s.ctx, "nft", "list", "set", "inet", "perimeterd", "service")); strings.Contains(out, "elements") {
		t.Errorf("left behind: %s", out)
	}
}

// A start that fails for a port must not have taken that port from the program that has it.
func TestFailedStartLeavesTheHostAsItWas(t *testing.T) {
	s := newStage(t, lab.Options{})
	if err := s.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	s.ok(s.Bastion.Command(s.ctx, "nft", "delete", "table", "inet", "perimeterd"))
	s.listenOnBastion(22)
	for key, value := range map[string]string{"listen": `[":1194", ":22"]`, "port": "53"} {
		before, err := os.ReadFile(s.daemon.Config)
		if err != nil {
			t.Fatal(err)
		}
		if key == "port" {
			c, err := s.Bastion.ListenPacket("udp", ":53")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		if err := s.daemon.Set(lab.Setting{Key: key, Value: value}); err != nil {
			t.Fatal(err)
		}
		err = s.daemon.Start(s.ctx)
		if err == nil || !strings.Contains(err.Error(), "nothing was changed on this host") {
			t.Errorf("%s = %s: %v", key, value, err)
		}
		if out := s.ok(s.Bastion.Command(s.ctx, "nft", "list", "tables")); out != "" {
			t.Errorf("%s = %s left a table: %s", key, value, out)
		}
		if got := s.answer(s.Client, "", "198.18.1.1", 22); got != "open" {
			t.Errorf("%s = %s: port 22 is %s", key, value, got)
		}
		if err := os.WriteFile(s.daemon.Config, before, 0o640); err != nil {
			t.Fatal(err)
		}
	}
}
