package e2e

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
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
