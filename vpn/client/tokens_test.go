package client

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perimeterd/knock"
)

func newTestTokens(t *testing.T) *Tokens {
	return &Tokens{
		file:   filepath.Join(t.TempDir(), "alice.tokens"),
		secret: bytes.Repeat([]byte{7}, 32),
		server: knock.ServerID{1},
		step:   30 * time.Second,
	}
}

// acceptedAt is what the gate holds at now.
func acceptedAt(k *Tokens, now time.Time) map[knock.Token]bool {
	held := map[knock.Token]bool{}
	for step := knock.StepAt(now, k.step) - 1; step <= knock.StepAt(now, k.step)+1; step++ {
		for i := range knock.Indexes {
			held[knock.NewToken(k.secret, k.server, step, uint8(i))] = true
		}
	}
	return held
}

func TestEveryKnockUsesAnotherTokenUntilTheyAreSpent(t *testing.T) {
	k := newTestTokens(t)
	now := time.Unix(1_800_000_010, 0)
	held := acceptedAt(k, now)
	for i := range 2 * knock.Indexes { // this step's and the next's
		token, err := k.Next(now)
		if err != nil {
			t.Fatalf("knock %d: %v", i, err)
		}
		if !held[token] {
			t.Fatalf("knock %d: a token that the gate does not hold, or a spent one", i)
		}
		delete(held, token)
	}
	_, err := k.Next(now)
	var exhausted *ExhaustedError
	if !errors.As(err, &exhausted) || !strings.Contains(err.Error(), "wait 20 seconds") {
		t.Fatalf("error %v, want how long to wait", err)
	}
	later := now.Add(exhausted.Wait)
	if token, err := k.Next(later); err != nil || !acceptedAt(k, later)[token] {
		t.Errorf("after the wait: %v", err)
	}
	if st, err := os.Stat(k.file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("state: %v, %v", st.Mode(), err)
	}
}

func TestKnocksOfSeveralProcessesNeverShareAToken(t *testing.T) {
	k := newTestTokens(t)
	now := time.Unix(1_800_000_010, 0)
	var mu sync.Mutex
	seen := map[knock.Token]int{}
	var group sync.WaitGroup
	for range 2 * knock.Indexes {
		group.Go(func() {
			other := Tokens{file: k.file, secret: k.secret, server: k.server, step: k.step} // each opens the file for itself, as a process does
			token, err := other.Next(now)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[token]++
		})
	}
	group.Wait()
	if len(seen) != 2*knock.Indexes {
		t.Errorf("%d tokens for %d knocks", len(seen), 2*knock.Indexes)
	}
}

func TestACorrectedClockLocksNobodyOut(t *testing.T) {
	k := newTestTokens(t)
	now := time.Unix(1_800_000_010, 0)
	if _, err := k.Next(now.Add(24 * time.Hour)); err != nil {
		t.Fatal(err)
	}
	if token, err := k.Next(now); err != nil || !acceptedAt(k, now)[token] {
		t.Errorf("after the clock was set back a day: %v", err)
	}
}

func TestTornTokenStateIsAFreshStart(t *testing.T) {
	k := newTestTokens(t)
	now := time.Unix(1_800_000_010, 0)
	for _, content := range []string{"", "\x00\x00", "x", "00000000000060000000 ff\n", "99999999999999999999999 0"} {
		os.WriteFile(k.file, []byte(content), 0o600)
		if token, err := k.Next(now); err != nil || !acceptedAt(k, now)[token] {
			t.Errorf("state %q: %v", content, err)
		}
	}
}

func TestProfileWithoutSecretHasNoTokens(t *testing.T) {
	k := &Tokens{file: newTestTokens(t).file} // no step either
	if _, err := k.Next(time.Now()); !errors.Is(err, ErrNoTokens) {
		t.Errorf("error %v", err)
	}
	if _, err := k.Repeated(netip.MustParseAddr("198.51.100.1"), time.Now()); !errors.Is(err, ErrNoTokens) {
		t.Errorf("again: error %v", err)
	}
}

// sender is a client that knocks into silence, and what the gate would make of it.
type sender struct {
	*Tokens
	t    *testing.T
	sent map[knock.Token]int
}

func (s *sender) knock(to netip.Addr, now time.Time) knock.Token {
	s.t.Helper()
	token, err := s.Repeated(to, now)
	if err != nil {
		s.t.Fatal(err)
	}
	if !acceptedAt(s.Tokens, now)[token] {
		s.t.Errorf("at %v: a token that the gate does not hold", now)
	}
	s.sent[token]++
	return token
}

func TestSilenceUsesUpHalfOfAStepsTokens(t *testing.T) {
	s := &sender{newTestTokens(t), t, map[knock.Token]int{}}
	gate := netip.MustParseAddr("198.51.100.1")
	began := time.Unix(1_800_000_000, 0) // a step's beginning
	const steps = 5
	for second := range steps * 30 {
		s.knock(gate, began.Add(time.Duration(second)*time.Second))
	}
	if len(s.sent) > mostSilent*steps || len(s.sent) < steps {
		t.Errorf("%d steps of silence used up %d tokens, want at most %d of each", steps, len(s.sent), mostSilent)
	}
	for token, n := range s.sent {
		if n < repeats {
			t.Errorf("token %x was sent %d times: once may be lost", token[:2], n)
		}
	}
	// The way is open: there are tokens left for as many knocks as a step promises besides.
	for i := range knock.Indexes {
		if _, err := s.Next(began.Add(steps*30*time.Second - time.Second)); err != nil {
			t.Errorf("knock %d after the silence: %v", i, err)
		}
	}
}

func TestAnsweredTokenIsNotSentAgain(t *testing.T) {
	s := &sender{newTestTokens(t), t, map[knock.Token]int{}}
	four, six := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::1")
	now := time.Unix(1_800_000_010, 0)
	first := s.knock(four, now)
	if again := s.knock(four, now.Add(time.Second)); again != first {
		t.Error("another token after a second of silence")
	}
	if other := s.knock(six, now); other == first {
		t.Error("one token for two addresses: it opens for one source")
	}
	s.Answered()
	if next := s.knock(four, now.Add(2*time.Second)); next == first {
		t.Error("the token that opened is sent again")
	}
	// A clock that is set back, and one that leaps.
	s.knock(four, now.Add(-time.Hour))
	s.knock(four, now.Add(time.Hour))
}

func TestExhaustedTokensAreRepeatedOrSaidToBe(t *testing.T) {
	k := newTestTokens(t)
	gate := netip.MustParseAddr("198.51.100.1")
	now := time.Unix(1_800_000_010, 0)
	first, err := k.Repeated(gate, now)
	if err != nil {
		t.Fatal(err)
	}
	for range 2*knock.Indexes - 1 {
		if _, err := k.Next(now); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 * repeats {
		if again, err := k.Repeated(gate, now); err != nil || again != first {
			t.Errorf("%x, %v: want the one that is pending", again[:2], err)
		}
	}
	var exhausted *ExhaustedError
	if _, err := k.Repeated(netip.MustParseAddr("198.51.100.2"), now); !errors.As(err, &exhausted) {
		t.Errorf("%v: want how long to wait", err)
	}
}
