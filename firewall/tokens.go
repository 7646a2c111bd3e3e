package firewall

import (
	"context"
	"crypto/hmac"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"perimeterd/knock"
)

// StepStore remembers, across restarts and loss of the table, the highest step whose tokens were ever in the kernel.
type StepStore interface {
	TokenStep() (uint64, error)
	RaiseTokenStep(uint64) error
}

// Tokens keeps the tokens of steps t-1, t and t+1 in the kernel. With it dead, knocks stop working by themselves.
type Tokens struct {
	fw     *Firewall
	server knock.ServerID
	length time.Duration
	store  StepStore
	log    *slog.Logger

	mu          sync.Mutex
	credentials map[uint32]knock.Credential
	floor       int64 // no step below it may be loaded: its spent tokens are forgotten
	next        int64 // the lowest step that is not loaded yet
	behind      bool
}

// NewTokens begins with what an Apply left. Fresh is Apply's word: then no step that was ever loaded may be loaded again,
// since nobody knows which of its tokens were spent. Else spent tokens are in the kernel for three steps back, which is
// as far as a clock may have been set back.
func NewTokens(fw *Firewall, fresh bool, server knock.ServerID, length time.Duration, store StepStore, log *slog.Logger) (*Tokens, error) {
	recorded, err := store.TokenStep()
	highest := int64(recorded)
	if err != nil {
		return nil, fmt.Errorf("highest token step: %w", err)
	}
	t := &Tokens{fw: fw, server: server, length: length, store: store, log: log, credentials: map[uint32]knock.Credential{}}
	if fresh {
		t.floor = highest + 1
	} else {
		t.floor = highest - 2
		// Users may have gone while the daemon was down.
		if err := fw.FlushTokens(); err != nil {
			return nil, err
		}
	}
	t.next = t.floor
	return t, nil
}

// Run loads each step when its turn comes, until ctx ends. It looks at the clock every second, since clocks jump.
func (t *Tokens) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			if err := t.Refresh(now.Round(0)); err != nil { // Round: the wall clock, not the monotonic one
				t.log.Error("tokens not loaded: knocks by token will stop", "err", err)
			}
		}
	}
}

// Refresh loads the steps around now that are not loaded yet.
func (t *Tokens) Refresh(now time.Time) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	current := knock.StepAt(now, t.length)
	if behind := current+1 < t.next-3; behind != t.behind {
		t.behind = behind
		if behind {
			t.log.Warn("the clock was set back: no token opens until it is where it was", "until", knock.Start(t.next-1, t.length))
		}
	}
	for step := max(current-1, t.next); step <= current+1; step++ {
		// Written first: a crash between the two closes a step, never opens it twice.
		if err := t.store.RaiseTokenStep(uint64(step)); err != nil {
			return fmt.Errorf("highest token step %d: %w", step, err)
		}
		if err := t.load(maps.Values(t.credentials), step, now); err != nil {
			return err
		}
		t.next = step + 1
	}
	return nil
}

func (t *Tokens) load(credentials iter.Seq[knock.Credential], step int64, now time.Time) error {
	expires := now.Add(knock.Life(step, t.length, now))
	var list []Token
	for c := range credentials {
		for i := range uint8(knock.Indexes) {
			list = append(list, Token{knock.NewToken(c.Secret, t.server, step, i), c.ID, expires})
		}
	}
	return t.fw.AddTokens(list)
}

// Set makes list the credentials that may knock. New ones can at once; the tokens and the windows of those that are gone
// are taken out before it returns.
func (t *Tokens) Set(list []knock.Credential, now time.Time) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	wanted := map[uint32]knock.Credential{}
	var added []knock.Credential
	for _, c := range list {
		wanted[c.ID] = c
		if old, ok := t.credentials[c.ID]; !ok || !hmac.Equal(old.Secret, c.Secret) {
			added = append(added, c)
		}
	}
	for id, old := range t.credentials {
		if c, ok := wanted[id]; !ok || !hmac.Equal(old.Secret, c.Secret) {
			if err := t.fw.Close(id); err != nil {
				return err
			}
		}
	}
	t.credentials = wanted
	current := knock.StepAt(now, t.length)
	for step := max(current-1, t.floor); step < t.next && step <= current+1; step++ {
		if err := t.load(slices.Values(added), step, now); err != nil {
			return err
		}
	}
	return nil
}
