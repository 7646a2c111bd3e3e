package firewall

import (
	"cmp"
	"context"
	"crypto/hmac"
	"errors"
	"fmt"
	"log/slog"
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

// Tokens keeps the tokens of steps t-1, t and t+1 in the kernel; those of t+2 come in little by little while t lasts, so
// that no moment has to load all users at once. With it dead, knocks stop working by themselves.
type Tokens struct {
	fw     *Firewall
	server knock.ServerID
	length time.Duration
	store  StepStore
	log    *slog.Logger

	mu          sync.Mutex
	credentials []knock.Credential // sorted by ID
	floor       int64              // no step below it may be loaded: its spent tokens are forgotten
	next        int64              // the lowest step that is not loaded whole
	part        int                // credentials of step next that are loaded
	behind      bool
}

// NewTokens begins with what an Apply left. Fresh is Apply's word: then no step that was ever loaded may be loaded again,
// since nobody knows which of its tokens were spent. Else spent tokens are in the kernel for four steps back, which is as
// far as a clock may have been set back.
func NewTokens(fw *Firewall, fresh bool, server knock.ServerID, length time.Duration, store StepStore, log *slog.Logger) (*Tokens, error) {
	recorded, err := store.TokenStep()
	highest := int64(recorded)
	if err != nil {
		return nil, fmt.Errorf("highest token step: %w", err)
	}
	t := &Tokens{fw: fw, server: server, length: length, store: store, log: log}
	if fresh {
		t.floor = highest + 1
	} else {
		t.floor = highest - 3
		// Users may have gone while the daemon was down.
		if err := fw.FlushTokens(); err != nil {
			return nil, err
		}
	}
	t.next = t.floor
	return t, nil
}

// Run loads each step when its turn comes, until ctx ends. It looks at the clock every half second, since clocks jump.
func (t *Tokens) Run(ctx context.Context) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	failed := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			err := t.Refresh(now.Round(0)) // Round: the wall clock, not the monotonic one
			if err != nil && err.Error() != failed {
				t.log.Error("tokens not loaded: knocks by token will stop", "err", err)
			}
			failed = ""
			if err != nil {
				failed = err.Error()
			}
		}
	}
}

// Refresh loads what is due now: all of the steps up to t+1, and of t+2 as large a part as t is old.
func (t *Tokens) Refresh(now time.Time) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	current := knock.StepAt(now, t.length)
	if behind := current+2 < t.next-2; behind != t.behind {
		t.behind = behind
		if behind {
			t.log.Warn("the clock was set back: no token opens until it is where it was", "until", knock.Start(t.next-2, t.length))
		}
	}
	if t.next < current-1 {
		t.next, t.part = current-1, 0
	}
	for ; t.next <= current+2; t.next, t.part = t.next+1, 0 {
		due := len(t.credentials)
		if t.next == current+2 {
			age := now.Sub(knock.Start(current, t.length))
			due = min(int(int64(due)*int64(age)/int64(t.length))+1, due)
		}
		if t.part == 0 {
			// Written first: a crash between the two closes a step, never opens it twice.
			if err := t.store.RaiseTokenStep(uint64(t.next)); err != nil {
				return fmt.Errorf("highest token step %d: %w", t.next, err)
			}
		}
		if due > t.part {
			if err := t.load(t.credentials[t.part:due], t.next, now); err != nil {
				return err
			}
			t.part = due
		}
		if t.next == current+2 {
			return nil
		}
	}
	return nil
}

// load writes the tokens of a step, a commit for every thousand.
func (t *Tokens) load(credentials []knock.Credential, step int64, now time.Time) error {
	expires := now.Add(knock.Life(step, t.length, now))
	for some := range slices.Chunk(credentials, chunk/knock.Indexes) {
		list := make([]Token, 0, chunk)
		for _, c := range some {
			for i := range uint8(knock.Indexes) {
				list = append(list, Token{knock.NewToken(c.Secret, t.server, step, i), c.ID, expires})
			}
		}
		start := time.Now()
		if err := t.fw.AddTokens(list); err != nil {
			return err
		}
		t.fw.counter.Loaded(len(list), step, time.Since(start))
	}
	return nil
}

// Set makes list the credentials that may knock. New ones can at once; the tokens and the windows of those that are gone
// are taken out before it returns.
func (t *Tokens) Set(list []knock.Credential, now time.Time) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	list = slices.SortedFunc(slices.Values(list), func(a, b knock.Credential) int { return cmp.Compare(a.ID, b.ID) })
	var added []knock.Credential
	for _, c := range list {
		if !holds(t.credentials, c) {
			added = append(added, c)
		}
	}
	// Who is out is out of the list before anything can fail: no later step loads him again. Positions have moved: the step
	// that was loaded in part begins anew, which writes what is there already once more.
	before := t.credentials
	t.credentials, t.part = list, 0
	var errs []error
	for _, old := range before {
		if !holds(list, old) {
			errs = append(errs, t.fw.Revoke(old.ID, t.live(old, now)))
		}
	}
	current := knock.StepAt(now, t.length)
	for step := max(current-1, t.floor); step < t.next; step++ {
		errs = append(errs, t.load(added, step, now))
	}
	return errors.Join(errs...)
}

// holds tells whether a sorted list has the credential with the same secret.
func holds(list []knock.Credential, c knock.Credential) bool {
	i, found := slices.BinarySearchFunc(list, c.ID, func(x knock.Credential, id uint32) int { return cmp.Compare(x.ID, id) })
	return found && hmac.Equal(list[i].Secret, c.Secret)
}

// live are the tokens of a credential that may be in the kernel.
func (t *Tokens) live(c knock.Credential, now time.Time) (tokens []knock.Token) {
	for step := knock.StepAt(now, t.length) - 1; step <= t.next; step++ {
		for i := range uint8(knock.Indexes) {
			tokens = append(tokens, knock.NewToken(c.Secret, t.server, step, i))
		}
	}
	return tokens
}

// Reload writes every step again after a repair made a new table. Lost says that openings were missed: then the steps
// that were in the old one stay closed, since what was spent of them is not known.
func (t *Tokens) Reload(lost bool, now time.Time) error {
	t.mu.Lock()
	if lost {
		t.floor = t.next + 1
	}
	t.next, t.part = max(t.floor, knock.StepAt(now, t.length)-1), 0
	t.mu.Unlock()
	return t.Refresh(now)
}
