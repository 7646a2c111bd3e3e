package client

import (
	"bytes"
	"errors"
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
			other := *k // each opens the file for itself, as a process does
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
	k := newTestTokens(t)
	k.secret = nil
	if _, err := k.Next(time.Now()); !errors.Is(err, ErrNoTokens) {
		t.Errorf("error %v", err)
	}
}
