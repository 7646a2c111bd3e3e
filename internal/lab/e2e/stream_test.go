package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

// isUDP tells what goes to the tunnel's port by UDP, or comes from it.
func isUDP(p lab.Packet) bool {
	b := p.Data
	return len(b) >= 28 && b[0] == 0x45 && b[9] == unix.IPPROTO_UDP && (binary.BigEndian.Uint16(b[20:]) == 1194 || binary.BigEndian.Uint16(b[22:]) == 1194)
}

func (s *stage) awaitTransport(want string) {
	s.t.Helper()
	s.patiently("packets go by "+want, func() bool { return s.status(s.alice).Transport == want })
}

// stretch is a page of many bytes on its way to alice.
type stretch struct {
	cmd  *lab.Cmd
	size int64

	mu    sync.Mutex
	sum   hash.Hash
	got   int64
	last  time.Time
	pause time.Duration // the longest without a byte since the last mark
	log   bytes.Buffer
}

func (s *stage) fetch(size int64, rate string) *stretch {
	s.t.Helper()
	d := &stretch{size: size, sum: sha256.New(), last: time.Now()}
	d.cmd = s.curl("--max-time", "90", "--limit-rate", rate, fmt.Sprintf("https://%s/bytes/%d", cloudName, size))
	d.cmd.Stdout, d.cmd.Stderr = d, &d.log
	if err := d.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return d
}

func (d *stretch) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	d.pause, d.last = max(d.pause, now.Sub(d.last)), now
	d.got += int64(len(b))
	return d.sum.Write(b)
}

// mark begins a measure of the longest pause, and returns the last one.
func (d *stretch) mark() (pause time.Duration, got int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	pause, d.pause = d.pause, 0
	return pause, d.got
}

// more waits for so many bytes beyond those that are there.
func (s *stage) more(d *stretch, n int64) {
	s.t.Helper()
	_, from := d.mark()
	s.patiently("the download goes on", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.got >= from+n || d.got == d.size
	})
}

// whole waits for the end and compares every byte.
func (s *stage) whole(d *stretch) {
	s.t.Helper()
	if err := d.cmd.Wait(); err != nil {
		s.t.Fatalf("download: %v after %d bytes: %s\n%s", err, d.got, d.log.String(), s.ok(s.alice.VPN(s.ctx, "status")))
	}
	want := sha256.New()
	line := make([]byte, 251*256)
	for i := range line {
		line[i] = byte(i % 251)
	}
	for left := d.size; left > 0; left -= int64(len(line)) {
		want.Write(line[:min(left, int64(len(line)))])
	}
	if !bytes.Equal(d.sum.Sum(nil), want.Sum(nil)) {
		s.t.Errorf("%d of %d bytes came, and they are others", d.got, d.size)
	}
}

// Neither token nor tunnel passes by UDP: the sequence opens, and the packets go by TLS at once.
func TestTunnelComesUpWhereUDPIsBlocked(t *testing.T) {
	s := newStage(t, lab.Options{Delay: 10 * time.Millisecond}, lab.Setting{Key: "window", Value: `"5s"`})
	s.Link.SetLoss(isUDP)
	t.Log(s.ok(s.alice.VPN(s.ctx, "up")))
	start := time.Now()
	s.ok(s.curl("https://" + cloudName + "/"))
	t.Logf("first page %v after vpn up", time.Since(start).Round(time.Millisecond))
	s.awaitTransport("tls")
	s.whole(s.fetch(20<<20, "200M"))
	// The endpoint of a stream is no place of UDP's.
	if out := s.ok(s.Bastion.Command(s.ctx, "nft", "list", "set", "inet", "perimeterd", "peer4")); strings.Contains(out, "elements") {
		t.Errorf("the door lets a place of UDP in: %s", out)
	}
	// It outlives the window, and moves to UDP once that passes.
	s.patiently("the window closes", func() bool {
		return !strings.Contains(s.ok(s.Bastion.Command(s.ctx, "nft", "list", "map", "inet", "perimeterd", "seq4")), "198.18.1.2 ")
	})
	s.ok(s.curl("https://" + cloudName + "/"))
	s.Link.SetLoss(nil)
	start = time.Now()
	s.awaitTransport("udp")
	t.Logf("UDP was taken up %v after it was let through", time.Since(start).Round(time.Millisecond))
	s.ok(s.curl("https://" + cloudName + "/"))
	if st := s.status(s.alice); st.State != "up" || st.Problem != "" {
		t.Errorf("%s: %s", st.State, st.Problem)
	}
	s.ok(s.alice.VPN(s.ctx, "down"))
}

// UDP dies under a running download, comes back and dies again: every byte arrives, on one connection.
func TestDownloadOutlivesUDP(t *testing.T) {
	s := newStage(t, lab.Options{Delay: 10 * time.Millisecond})
	s.ok(s.alice.VPN(s.ctx, "up"))
	d := s.fetch(200<<20, "6M")
	s.more(d, 6<<20)
	s.awaitTransport("udp")
	for range 2 {
		d.mark()
		s.Link.SetLoss(isUDP)
		start := time.Now()
		s.awaitTransport("tls")
		noticed := time.Since(start)
		s.more(d, 4<<20)
		pause, _ := d.mark()
		t.Logf("UDP died: noticed after %v, the download stood still for %v", noticed.Round(10*time.Millisecond), pause.Round(10*time.Millisecond))
		s.Link.SetLoss(nil)
		start = time.Now()
		s.awaitTransport("udp")
		s.more(d, 4<<20)
		pause, _ = d.mark()
		t.Logf("UDP came back: taken up after %v, longest pause %v", time.Since(start).Round(10*time.Millisecond), pause.Round(10*time.Millisecond))
	}
	d.mu.Lock()
	d.size = d.got
	d.mu.Unlock()
	d.cmd.Process.Kill()
	d.cmd.Wait()
	// And as a whole, with UDP gone in its middle.
	d = s.fetch(40<<20, "10M")
	s.more(d, 10<<20)
	s.Link.SetLoss(isUDP)
	s.whole(d)
	if n := len(s.daemon.Entries("session began")); n != 1 {
		t.Errorf("%d sessions began", n)
	}
}

// Another address in the middle of a download, and the old one is gone.
func TestDownloadOutlivesAnAddress(t *testing.T) {
	for name, blocked := range map[string]bool{"UDP": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, lab.Options{Delay: 10 * time.Millisecond})
			if blocked {
				s.Link.SetLoss(isUDP)
			}
			s.ok(s.alice.VPN(s.ctx, "up"))
			s.ok(s.curl("https://" + cloudName + "/"))
			d := s.fetch(60<<20, "10M")
			s.more(d, 10<<20)
			d.mark()
			s.ok(s.Client.Command(s.ctx, "ip", "addr", "add", "198.18.1.77/24", "dev", "outside"))
			s.ok(s.Client.Command(s.ctx, "ip", "addr", "del", "198.18.1.2/24", "dev", "outside")) // and all others
			s.ok(s.Client.Command(s.ctx, "ip", "addr", "replace", "198.18.1.77/24", "dev", "outside"))
			s.more(d, 10<<20)
			pause, _ := d.mark()
			t.Logf("the download stood still for %v", pause.Round(10*time.Millisecond))
			s.whole(d)
			if n := len(s.daemon.Entries("session began")); n != 1 {
				t.Errorf("%d sessions began", n)
			}
		})
	}
}

// Whoever is thrown out learns it by the end of his stream, and others' go on.
func TestStreamEndsWithItsSession(t *testing.T) {
	s := newStage(t, lab.Options{LongLink: true})
	s.Link.SetLoss(isUDP)
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	before := s.status(s.alice).Session
	start := time.Now()
	if out, err := s.daemon.Perimeterd(s.ctx, "kick", "alice"); err != nil {
		t.Fatal(out)
	}
	s.patiently("another session", func() bool { now := s.status(s.alice).Session; return now != before && now != "" })
	t.Logf("an idle client had another session %v after the kick began", time.Since(start).Round(time.Millisecond))
	s.ok(s.curl("https://" + cloudName + "/"))
	start = time.Now()
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatal(out)
	}
	s.patiently("a refusal", func() bool { return s.status(s.alice).State == "refused" })
	t.Logf("an idle client knew that it is revoked %v after the command began", time.Since(start).Round(time.Millisecond))
}

// A second port of the gate's stands in the profile, and is tried after the first.
func TestSecondPortOfTheGate(t *testing.T) {
	s := newStage(t, lab.Options{LongLink: true}, lab.Setting{Key: "listen", Value: `[":1194", ":443"]`})
	gate := netip.AddrPortFrom(s.Bastion.Addr, 443).String()
	if p := s.profile(s.kept(s.alice, "alice")); len(p.Endpoints) != 2 || p.Endpoints[1] != gate {
		t.Fatalf("endpoints %v", p.Endpoints)
	}
	var there atomic.Bool
	s.Link.SetLoss(func(p lab.Packet) bool {
		b := p.Data
		there.Store(there.Load() || len(b) >= 40 && b[9] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(b[22:]) == 443)
		return isUDP(p) || len(b) >= 40 && b[9] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(b[22:]) == 1194
	})
	t.Log(s.ok(s.alice.VPN(s.ctx, "up")))
	s.ok(s.curl("https://" + cloudName + "/"))
	s.awaitTransport("tls")
	if !there.Load() {
		t.Error("nothing went to port 443")
	}
}

// wild ends alice's client without a word, as a power cut would.
func (s *stage) wild() {
	s.t.Helper()
	s.ok(s.Client.Command(s.ctx, "kill", "-9", fmt.Sprint(s.status(s.alice).PID)))
	s.patiently("the client is gone", func() bool { return s.status(s.alice).State == "down" })
}

// A session that stands is taken up again with nothing asked by TLS; one that was kicked is not, and a revoked one is said.
func TestKeptSessionIsTakenUpAgain(t *testing.T) {
	s := newStage(t, lab.Options{Delay: 10 * time.Millisecond})
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("https://" + cloudName + "/"))
	first := s.status(s.alice)
	s.wild()
	var connects atomic.Int32
	count := func(p lab.Packet) {
		b := p.Data
		if p.Direction == lab.FromClient && len(b) >= 40 && b[9] == unix.IPPROTO_TCP && b[33]&0x12 == 2 {
			connects.Add(1)
		}
	}
	s.Link.OnPacket(count)
	t.Log(s.ok(s.alice.VPN(s.ctx, "up")))
	if n := connects.Load(); n != 0 {
		t.Errorf("%d connects to the gate", n)
	}
	s.Link.OnPacket(nil)
	s.ok(s.curl("https://" + cloudName + "/"))
	if st := s.status(s.alice); st.Session != first.Session || st.Address != first.Address || !st.PostQuantum {
		t.Errorf("%+v, want the session of before: %+v", st, first)
	}
	// UDP is blocked: the same session by TLS.
	s.wild()
	s.Link.SetLoss(isUDP)
	t.Log(s.ok(s.alice.VPN(s.ctx, "up")))
	s.ok(s.curl("https://" + cloudName + "/"))
	if st := s.status(s.alice); st.Session != first.Session {
		t.Errorf("session %s, want %s", st.Session, first.Session)
	}
	s.Link.SetLoss(nil)
	// Kicked meanwhile.
	s.wild()
	if out, err := s.daemon.Perimeterd(s.ctx, "kick", "alice"); err != nil {
		t.Fatal(out)
	}
	t.Log(s.ok(s.alice.VPN(s.ctx, "up")))
	s.ok(s.curl("https://" + cloudName + "/"))
	second := s.status(s.alice)
	if second.Session == first.Session {
		t.Error("a kicked session was taken up again")
	}
	// A command's tunnel leaves it, `down` ends it.
	s.ok(s.alice.VPN(s.ctx, "down"))
	if kept, _ := filepath.Glob(filepath.Join(s.alice.Home, ".config", "perimeter", "*.session")); len(kept) != 0 {
		t.Errorf("kept after down: %v", kept)
	}
	s.ok(s.alice.VPN(s.ctx, "exec", "--", "true"))
	s.patiently("the command's tunnel is gone", func() bool { return s.status(s.alice).State == "down" })
	kept, _ := filepath.Glob(filepath.Join(s.alice.Home, ".config", "perimeter", "*.session"))
	if len(kept) != 1 {
		t.Fatalf("kept after exec: %v", kept)
	}
	if st, err := os.Stat(kept[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v: mode %v", err, st.Mode())
	}
	if out, err := s.daemon.Perimeterd(s.ctx, "user", "revoke", "alice"); err != nil {
		t.Fatal(out)
	}
	if out := s.fails(s.alice.VPN(s.ctx, "up")); !strings.Contains(out, "revoked") {
		t.Errorf("a revoked user is told: %s", out)
	}
	if kept, _ := filepath.Glob(filepath.Join(s.alice.Home, ".config", "perimeter", "*.session")); len(kept) != 0 {
		t.Errorf("kept after a refusal: %v", kept)
	}
}

// Whichever packet of a warm flight is lost, the session is taken up.
func TestWarmFlightOutlivesALostPacket(t *testing.T) {
	s := newStage(t, lab.Options{Delay: 25 * time.Millisecond}, lab.Setting{Key: "window", Value: `"1s"`})
	s.ok(s.alice.VPN(s.ctx, "up"))
	session := s.status(s.alice).Session
	for n := 1; n <= 4; n++ {
		s.wild()
		s.patiently("the window closes", func() bool {
			return !strings.Contains(s.ok(s.Bastion.Command(s.ctx, "nft", "list", "map", "inet", "perimeterd", "open4")), "198.18.1.2 ")
		})
		rule, lost := lab.Only(n)
		s.Link.SetLoss(rule)
		start := time.Now()
		s.ok(s.alice.VPN(s.ctx, "up"))
		t.Logf("packet %d lost: %v", n, time.Since(start).Round(time.Millisecond))
		s.Link.SetLoss(nil)
		if st := s.status(s.alice); !lost() || st.Session != session {
			t.Errorf("packet %d lost (%v): session %s, want %s", n, lost(), st.Session, session)
		}
	}
}
