package e2e

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/knock"
)

// isToken tells a token on its way to the tunnel's port.
func isToken(p lab.Packet) bool {
	b := p.Data
	return p.Direction == lab.FromClient && len(b) == 28+knock.TokenSize && b[0] == 0x45 && b[9] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(b[22:]) == 1194
}

// isKnock tells a SYN to a port that is not the gate's.
func isKnock(p lab.Packet) bool {
	b := p.Data
	return p.Direction == lab.FromClient && len(b) >= 40 && b[0] == 0x45 && b[9] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(b[22:]) != 1194
}

// spentTokens is how many of her tokens alice's client has used up in the latest step.
func (s *stage) spentTokens() int {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.alice.Home, ".config", "perimeter", "*.tokens"))
	if err != nil || len(files) != 1 {
		s.t.Fatalf("token state: %v, %v", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		s.t.Fatal(err)
	}
	var step int64
	var mask uint8
	if _, err := fmt.Sscanf(string(text), "%d %x\n", &step, &mask); err != nil {
		s.t.Fatalf("%q: %v", text, err)
	}
	return bits.OnesCount8(mask)
}

// Two of two tokens are lost, and the sequence as a whole: the third try opens, and it is the same token.
func TestLostTokenIsSentAgainAndNoOtherIsUsedUp(t *testing.T) {
	s := newStage(t, lab.Options{LongLink: true})
	var tokens atomic.Int32
	s.Link.SetLoss(func(p lab.Packet) bool { return isKnock(p) || isToken(p) && tokens.Add(1) <= 2 })
	t.Log(s.ok(s.alice.Knock(s.ctx, "-v", "--timeout", "30s")))
	e, err := s.daemon.Await(s.ctx, "window opened", 1)
	if err != nil || e[0]["sequence"] != false || e[0]["user"] != "alice" {
		t.Errorf("%v, %v", e, err)
	}
	if n := s.spentTokens(); n != 1 || tokens.Load() < 3 {
		t.Errorf("%d tokens were used up, %d were sent, want one that is sent at least three times", n, tokens.Load())
	}
}

// The token comes behind the connects that it should open for.
func TestTokenThatIsOvertakenOpensAllTheSame(t *testing.T) {
	s := newStage(t, lab.Options{LongLink: true})
	late := make(chan []byte, 1)
	var tokens atomic.Int32
	s.Link.SetLoss(func(p lab.Packet) bool {
		if isKnock(p) {
			return true
		}
		if isToken(p) && tokens.Add(1) == 1 {
			late <- slices.Clone(p.Data)
			return true
		}
		return false
	})
	behind, err := s.NewSpoofer(s.Client)
	if err != nil {
		t.Fatal(err)
	}
	defer behind.Close()
	sent := make(chan error, 1)
	go func() {
		token := <-late
		time.Sleep(100 * time.Millisecond) // behind three of the four first connects
		sent <- behind.Send(token)
	}()
	s.ok(s.alice.Knock(s.ctx, "--timeout", "30s"))
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if e := s.daemon.Entries("window opened"); len(e) != 1 || e[0]["sequence"] != false {
		t.Errorf("openings: %v", e)
	}
	if n := s.spentTokens(); n != 1 {
		t.Errorf("%d tokens were used up", n)
	}
}

// A gate that stays silent for several dials costs half of a step's tokens at most, and the knock after it has one left.
func TestSilentGateDoesNotUseUpTheTokens(t *testing.T) {
	s := newStage(t, lab.Options{LongLink: true})
	s.Link.SetLoss(func(p lab.Packet) bool { return p.Direction == lab.FromClient })
	s.fails(s.alice.Knock(s.ctx, "--timeout", "5s"))
	if n := s.spentTokens(); n > knock.Indexes/2 {
		t.Errorf("5 s of silence used up %d of %d tokens", n, knock.Indexes)
	}
	s.Link.SetLoss(isKnock)
	s.ok(s.alice.Knock(s.ctx))
	if e, err := s.daemon.Await(s.ctx, "window opened", 1); err != nil || e[0]["sequence"] != false {
		t.Errorf("%v, %v", e, err)
	}
}

// tcpData is how much a segment to the gate's port, or from it, carries; SYN tells one that begins a connection.
func tcpData(p lab.Packet) (size int, syn bool) {
	b := p.Data
	if len(b) < 40 || b[0] != 0x45 || b[9] != unix.IPPROTO_TCP || binary.BigEndian.Uint16(b[22-2*p.Direction:]) != 1194 {
		return 0, false
	}
	return int(binary.BigEndian.Uint16(b[2:])) - 20 - int(b[32]>>4)*4, b[33]&2 != 0
}

// Whichever packet of a cold start is lost, it comes up, there is one session, nothing of the exchange stays open, and nobody is told
// of a refusal.
func TestColdStartOutlivesALostPacket(t *testing.T) {
	s := newStage(t, lab.Options{Delay: 25 * time.Millisecond}, lab.Setting{Key: "window", Value: `"1s"`})
	users := []*lab.User{s.alice}
	for _, name := range []string{"bob", "carol", "dave"} { // each has few tokens in half a minute
		profile, err := s.daemon.AddUser(s.ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		u, err := s.NewUser(s.ctx, s.Client, profile)
		if err != nil {
			t.Fatal(err)
		}
		users = append(users, u)
	}
	nth := func(d lab.Direction, n int) func(lab.Packet) bool {
		return func(p lab.Packet) bool {
			if size, _ := tcpData(p); size > 0 && p.Direction == d {
				n--
				return n == 0
			}
			return false
		}
	}
	first := func(is func(lab.Packet) bool) func(lab.Packet) bool {
		done := false
		return func(p lab.Packet) bool {
			lost := !done && is(p)
			done = done || lost
			return lost
		}
	}
	syn := func(d lab.Direction) func(lab.Packet) bool {
		return first(func(p lab.Packet) bool { _, syn := tcpData(p); return syn && p.Direction == d })
	}
	for i, lost := range []struct {
		what string
		rule func(lab.Packet) bool
	}{
		{"the token", first(isToken)}, {"the SYN", syn(lab.FromClient)}, {"the answer to a SYN", syn(lab.ToClient)},
		{"the hello's head", nth(lab.FromClient, 1)}, {"the hello's tail", nth(lab.FromClient, 2)},
		{"the head of the gate's flight", nth(lab.ToClient, 1)}, {"its tail", nth(lab.ToClient, 2)},
		{"the certificate", nth(lab.FromClient, 3)}, {"the request", nth(lab.FromClient, 4)}, {"its tail", nth(lab.FromClient, 5)},
		{"the answer", nth(lab.ToClient, 3)}, {"its end", nth(lab.ToClient, 4)}, {"the request for a stream", nth(lab.FromClient, 6)},
	} {
		u := users[i%len(users)]
		s.patiently("the window closes", func() bool {
			return !strings.Contains(s.ok(s.Bastion.Command(s.ctx, "nft", "list", "map", "inet", "perimeterd", "open4")), "198.18.1.2 ")
		})
		before, _ := s.Link.Drops()
		s.Link.SetLoss(lost.rule)
		start := time.Now()
		s.ok(u.VPN(s.ctx, "up"))
		t.Logf("%s lost: %v", lost.what, time.Since(start).Round(time.Millisecond))
		s.patiently("it is lost", func() bool { after, _ := s.Link.Drops(); return after == before+1 })
		s.Link.SetLoss(nil)
		if list := s.sessionsJSON(); strings.Count(list, `"id"`) != 1 || !strings.Contains(list, s.status(u).Session) {
			t.Errorf("%s lost: sessions %s, want one, %s", lost.what, list, s.status(u).Session)
		}
		s.ok(u.VPN(s.ctx, "down"))
	}
	for _, ns := range []*lab.Namespace{s.Client, s.Bastion} {
		s.patiently("nothing is open", func() bool {
			return strings.TrimSpace(s.ok(ns.Command(s.ctx, "ss", "-Htn", "state", "established", "state", "close-wait", "( sport = :1194 or dport = :1194 )"))) == ""
		})
	}
	for _, told := range []string{"token refused", "handshake failed", "certificate refused", "request refused"} {
		if strings.Contains(s.daemon.Log(), told) {
			t.Errorf("somebody is told: %s", told)
		}
	}
}
