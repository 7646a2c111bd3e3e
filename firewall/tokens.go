package firewall

import (
	"cmp"
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// StepStore remembers, across restarts and loss of the table, the steps whose tokens were ever in the kernel.
type StepStore interface {
	// TokenStep is a step up to which none may be loaded, for reasons from outside: another state was put in place.
	TokenStep() (uint64, error)
	// TokenSteps is what SetTokenSteps kept, durably; nil before the first.
	TokenSteps() ([]byte, error)
	SetTokenSteps([]byte) error
}

// Tokens keeps the tokens of steps t-1, t and t+1 in the kernel; those of t+2 come in little by little while t lasts, so
// that no moment has to load all users at once. With it dead, knocks stop working by themselves.
//
// A token opens once. It may be written a second time, after a restart or a repair, while the kernel still remembers those
// of its step that were spent, and its life then ends before that memory does, whatever the clock says. A step that is
// neither new nor remembered stays closed.
type Tokens struct {
	fw     *Firewall
	server knock.ServerID
	length time.Duration
	store  StepStore
	boot   func() time.Duration // sinceBoot, but in tests
	log    *slog.Logger

	mu          sync.Mutex
	credentials []knock.Credential // sorted by ID
	floor       int64              // no step up to it
	past        stepHistory
	known       map[int64]*knownStep // those whose spent tokens the kernel may still remember
	behind      bool
}

// knownStep is a step whose tokens are, or were, in the kernel.
type knownStep struct {
	since time.Duration // when the first was written, after the boot: none was spent earlier
	part  int           // credentials that are loaded
	whole bool          // all are, whoever comes
}

// NewTokens begins with what an Apply left. Fresh is Apply's word: then no step that was ever loaded may be loaded again,
// since nobody knows which of its tokens were spent.
func NewTokens(fw *Firewall, fresh bool, server knock.ServerID, length time.Duration, store StepStore, log *slog.Logger) (*Tokens, error) {
	t := &Tokens{fw: fw, server: server, length: length, store: store, boot: sinceBoot, log: log, known: map[int64]*knownStep{}}
	floor, err := store.TokenStep()
	if err != nil {
		return nil, fmt.Errorf("highest token step: %w", err)
	}
	t.floor = int64(floor)
	text, err := store.TokenSteps()
	if err != nil {
		return nil, fmt.Errorf("token steps: %w", err)
	}
	if text != nil {
		if err := json.Unmarshal(text, &t.past); err != nil {
			return nil, fmt.Errorf("state: the token steps that were loaded are damaged: %w: restore a backup", err)
		}
	}
	if fresh {
		return t, nil
	}
	for _, r := range t.past.Recent {
		t.known[r.Step] = &knownStep{since: r.At}
	}
	// Users may have gone while the daemon was down.
	return t, fw.FlushTokens()
}

// CloseSteps is for who makes the table anew and loads no tokens: whoever loads them later finds a table that is not fresh, and
// must not take its empty memory of spent tokens for a whole one.
func CloseSteps(store StepStore) error {
	text, err := store.TokenSteps()
	if err != nil || text == nil {
		return err
	}
	var past stepHistory
	if err := json.Unmarshal(text, &past); err != nil {
		return fmt.Errorf("state: the token steps that were loaded are damaged: %w: restore a backup", err)
	}
	past.Recent = nil
	if text, err = json.Marshal(past); err != nil {
		return err
	}
	return store.SetTokenSteps(text)
}

// stepHistory is which steps were ever loaded. A clock that ran ahead for a moment leaves a range up there, and the steps below
// it are still to come.
type stepHistory struct {
	Ranges [][2]int64  `json:"ranges"` // first and last; in order, with a gap between any two
	Recent []addedStep `json:"recent"` // oldest first
}

type addedStep struct {
	Step int64         `json:"step"`
	At   time.Duration `json:"at"` // after the boot
}

// Bounds of the history. With a range too many the lowest two become one: what lay between them stays closed.
const (
	maxRanges = 16
	maxRecent = 8 // the steps of now twice
)

func (h *stepHistory) has(step int64) bool {
	return slices.ContainsFunc(h.Ranges, func(r [2]int64) bool { return r[0] <= step && step <= r[1] })
}

// with is the history with one more step.
func (h stepHistory) with(step int64, at time.Duration) stepHistory {
	list := append(slices.Clone(h.Ranges), [2]int64{step, step})
	slices.SortFunc(list, func(a, b [2]int64) int { return cmp.Compare(a[0], b[0]) })
	merged := list[:1]
	for _, r := range list[1:] {
		if last := &merged[len(merged)-1]; r[0] <= last[1]+1 {
			last[1] = max(last[1], r[1])
		} else {
			merged = append(merged, r)
		}
	}
	if len(merged) > maxRanges {
		merged[1][0] = merged[0][0]
		merged = merged[1:]
	}
	recent := append(slices.Clone(h.Recent), addedStep{step, at})
	return stepHistory{merged, recent[max(0, len(recent)-maxRecent):]}
}

// sinceBoot is CLOCK_BOOTTIME, which nobody sets (clock_gettime(2)).
func sinceBoot() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // fails for a clock that is not there only
	return time.Duration(t.Nano())
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
	boot, current := t.boot(), knock.StepAt(now, t.length)
	t.forget(boot)
	for step := current - 1; step <= current+2; step++ {
		k := t.known[step]
		if k == nil {
			if step <= t.floor || t.past.has(step) {
				continue
			}
			// Written first: a crash between the two closes a step, never opens it twice.
			past := t.past.with(step, boot)
			text, err := json.Marshal(past)
			if err == nil {
				err = t.store.SetTokenSteps(text)
			}
			if err != nil {
				return fmt.Errorf("token step %d: %w", step, err)
			}
			k = &knownStep{since: boot}
			t.past, t.known[step] = past, k
		}
		due := len(t.credentials)
		if step == current+2 {
			age := now.Sub(knock.Start(current, t.length))
			due = min(int(int64(due)*int64(age)/int64(t.length))+1, due)
		}
		if k.whole || due <= k.part && step == current+2 {
			continue
		}
		if err := t.load(t.credentials[k.part:due], step, k, now); err != nil {
			return err
		}
		k.part, k.whole = due, step != current+2
	}
	next := t.next(current - 1)
	if behind := next > current+3; behind != t.behind {
		t.behind = behind
		if behind {
			t.log.Warn("the clock was set back: no token opens until it is where it was", "until", knock.Start(next-2, t.length))
		}
	}
	return nil
}

// next is the first step from the given one on that is open, or can be.
func (t *Tokens) next(step int64) int64 {
	for t.known[step] == nil {
		later := max(step, t.floor+1)
		for _, r := range t.past.Ranges {
			if r[0] <= later && later <= r[1] {
				later = r[1] + 1
			}
		}
		if later == step {
			break
		}
		step = later
	}
	return step
}

// forget gives up steps whose spent tokens the kernel may have forgotten.
func (t *Tokens) forget(boot time.Duration) {
	for step, k := range t.known {
		if age := boot - k.since; age < 0 || age >= spentTimeout {
			delete(t.known, step)
		}
	}
}

// load writes the tokens of a step, a commit for every thousand. None lives longer than the kernel remembers that it was
// spent.
func (t *Tokens) load(credentials []knock.Credential, step int64, k *knownStep, now time.Time) error {
	life := min(knock.Life(step, t.length, now), k.since+spentTimeout-t.boot())
	expires := now.Add(life)
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
	t.credentials = list
	var errs []error
	for _, old := range before {
		if !holds(list, old) {
			errs = append(errs, t.fw.Revoke(old.ID, t.live(old, now)))
		}
	}
	t.forget(t.boot())
	for step, k := range t.known {
		if !k.whole {
			k.part = 0
			continue
		}
		errs = append(errs, t.load(added, step, k, now))
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
	steps := map[int64]bool{}
	for step := range t.known {
		steps[step] = true
	}
	for step := knock.StepAt(now, t.length) - 1; step <= knock.StepAt(now, t.length)+2; step++ {
		steps[step] = true
	}
	for step := range steps {
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
		clear(t.known)
	}
	for _, k := range t.known {
		k.part, k.whole = 0, false
	}
	t.mu.Unlock()
	return t.Refresh(now)
}
