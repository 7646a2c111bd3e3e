package e2e

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"perimeterd/internal/lab"
)

// openWindow is one of the kernel's.
type openWindow struct {
	credential string
	left       time.Duration
}

// windows are those of a map, by source.
func (s *stage) windows(set string) map[string]openWindow {
	s.t.Helper()
	var listing struct {
		Nftables []struct {
			Map struct {
				Elem [][2]json.RawMessage `json:"elem"`
			} `json:"map"`
		} `json:"nftables"`
	}
	out := s.ok(s.Bastion.Command(s.ctx, "nft", "-j", "list", "map", "inet", "perimeterd", set))
	if err := json.Unmarshal([]byte(out), &listing); err != nil {
		s.t.Fatalf("%v in %s", err, out)
	}
	open := map[string]openWindow{}
	for _, part := range listing.Nftables {
		for _, pair := range part.Map.Elem {
			var e struct {
				Elem struct {
					Val     string `json:"val"`
					Expires int    `json:"expires"` // s
				} `json:"elem"`
			}
			if err := json.Unmarshal(pair[0], &e); err != nil {
				s.t.Fatalf("%v in %s", err, out)
			}
			open[e.Elem.Val] = openWindow{string(pair[1]), time.Duration(e.Elem.Expires) * time.Second}
		}
	}
	return open
}

// Windows of both kinds and families outlive reload, restart and kill of the daemon, with their credential and with what
// was left of their time, even where new ones last longer; those of a revoked user end at once.
func TestWindowsOutliveTheDaemonAndNotTheirUser(t *testing.T) {
	s := newStage(t, lab.Options{})
	gate6 := netip.AddrPortFrom(s.Bastion.Addr6, 1194)
	s.datagram(s.token(0, 0))
	c, err := s.Client.DialFrom(s.ctx, s.Client.Addr6, "udp", gate6.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(s.token(0, 1)); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{s.Bastion.Addr.String(), s.Bastion.Addr6.String()} {
		s.ok(s.Client.Command(s.ctx, "/usr/bin/knock", append([]string{"-d", "20", to}, s.sequence()...)...))
	}
	if _, err := s.daemon.Await(s.ctx, "window opened", 4); err != nil {
		t.Fatal(err)
	}
	sets := map[string]string{"open4": s.Client.Addr.String(), "open6": s.Client.Addr6.String(), "seq4": s.Client.Addr.String(), "seq6": ""}
	for a := range s.windows("seq6") {
		sets["seq6"] = a // which of its addresses stock knock takes is the route's choice
	}
	before := map[string]openWindow{}
	for set, source := range sets {
		before[set] = s.windows(set)[source]
		if before[set].left <= 0 {
			t.Fatalf("no window in %s", set)
		}
	}
	at := time.Now()
	unchanged := func(after string) {
		t.Helper()
		for set, source := range sets {
			w := s.windows(set)[source]
			spent := before[set].left - w.left - time.Since(at)
			if w.credential != before[set].credential || spent.Abs() > 5*time.Second {
				t.Errorf("after %s the window in %s is %+v; %v before it was %+v", after, set, w, time.Since(at), before[set])
			}
		}
		s.ok(s.Client.Command(s.ctx, "curl", append(s.files("alice"), "-sS", "--max-time", "5", "https://198.18.1.1:1194/v1/session")...))
	}

	if err := s.daemon.Set(lab.Setting{Key: "window", Value: `"10m"`}); err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Signal(hangUp); err != nil {
		t.Fatal(err)
	}
	if _, err := s.daemon.Await(s.ctx, "configuration reloaded", 1); err != nil {
		t.Fatal(err)
	}
	unchanged("a reload")
	for what, signal := range map[string]syscall.Signal{"a restart": syscall.SIGTERM, "a kill": syscall.SIGKILL} {
		if err := s.daemon.Signal(signal); err != nil {
			t.Fatal(err)
		}
		s.daemon.Wait()
		if err := s.daemon.Start(s.ctx); err != nil {
			t.Fatal(err)
		}
		unchanged(what)
	}

	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, set := range []string{"open4", "open6"} {
		if w := s.windows(set); len(w) != 0 {
			t.Errorf("alice's windows in %s outlive her revocation: %v", set, w)
		}
	}
	if w := s.windows("seq4"); len(w) != 1 {
		t.Errorf("the shared sequence's window is not hers to lose: %v", w)
	}
}

func TestWholePathOverIPv6(t *testing.T) {
	s := newStage(t, lab.Options{}, lab.Setting{Key: "endpoint", Value: `"[2001:db8:18:1::1]:1194"`})
	t.Log(s.ok(s.alice.Knock(s.ctx)))
	s.ok(s.alice.VPN(s.ctx, "up"))
	if got, want := s.ok(s.curl("https://"+cloudName+"/")), "seen from "+s.Egress.String()+"\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	e := s.daemon.Entries("window opened")
	if len(e) == 0 {
		t.Fatal("no window opened")
	}
	for _, e := range e {
		if a, err := netip.ParseAddr(e["source"].(string)); err != nil || !a.Is6() || e["sequence"] != false {
			t.Errorf("opened: %v", e)
		}
	}
	s.patiently("the tunnel's endpoint is a peer", func() bool {
		return strings.Contains(s.ok(s.Bastion.Command(s.ctx, "nft", "list", "set", "inet", "perimeterd", "peer6")), "2001:db8:18:1::")
	})
	s.ok(s.alice.VPN(s.ctx, "down"))
}

// Flushing the kernel's connections revokes nothing, as an earlier draft had it: what flows goes on. Revoking resets it.
func TestConnectionsOutliveAConntrackFlushAndNotARevocation(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.ok(s.alice.VPN(s.ctx, "up"))
	file := filepath.Join(s.Dir, "download")
	download := s.curl("-o", file, "--max-time", "100", "--limit-rate", "20M", "https://"+cloudName+"/bytes/1000000000")
	if err := download.Start(); err != nil {
		t.Fatal(err)
	}
	received := func() int64 {
		st, err := os.Stat(file)
		if err != nil {
			return 0
		}
		return st.Size()
	}
	s.await("the download runs", func() bool { return received() > 1<<20 })
	if err := s.Bastion.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
		t.Fatal(err)
	}
	flushed := received()
	took := s.await("the download goes on after the flush", func() bool { return received() > flushed+4<<20 })
	t.Logf("4 MB in %v after the flush", took.Round(time.Millisecond))
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.await("the download ends", func() bool { return s.cloud.Requests()[0].Done })
}
