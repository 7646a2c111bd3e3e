package client

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"perimeterd/knock"
)

// Tokens hands out a profile's knock tokens, each once, across processes. A file remembers which indexes of the latest
// step are spent.
type Tokens struct {
	file   string
	secret []byte
	server knock.ServerID
	step   time.Duration

	mu      sync.Mutex
	pending map[netip.Addr]*pending // by the address of the gate
}

// pending is a token that was sent and has brought no answer.
type pending struct {
	token knock.Token
	step  int64 // when it was taken
	sends int
	taken int // tokens of that step, this one included
}

const (
	// repeats is how often a token is sent before another is taken: a datagram that is lost leaves it as good as new, and one
	// that is late is no different.
	repeats = 4
	// mostSilent is how many tokens of a step may be taken while no answer comes.
	mostSilent = 2
)

// NewTokens opens the profile's token state. The file is named after the credential and not after the profile's file, so
// that the same credential imported twice does not spend the same token twice.
func NewTokens(p *Profile) (*Tokens, error) {
	dir, err := makeDir()
	if err != nil {
		return nil, err
	}
	return &Tokens{
		file:   filepath.Join(dir, p.User+"-"+p.ServerID[:8]+".tokens"),
		secret: p.typed.secret,
		server: p.typed.serverID,
		step:   p.typed.step,
	}, nil
}

// ErrNoTokens is returned when the profile has no knock secret.
var ErrNoTokens = errors.New("the profile has no knock secret")

// ExhaustedError says that every token the gate would take now is spent.
type ExhaustedError struct{ Wait time.Duration }

func (e *ExhaustedError) Error() string {
	return fmt.Sprintf("all knock tokens of this and the next step are used: wait %d seconds", int((e.Wait+time.Second-1)/time.Second))
}

// Next spends a token at now. The gate holds the tokens of the step before, this one and the next; this step's go first.
func (t *Tokens) Next(now time.Time) (token knock.Token, err error) {
	if len(t.secret) == 0 {
		return token, ErrNoTokens
	}
	f, err := os.OpenFile(t.file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return token, fmt.Errorf("token state: %w", unwritable(err))
	}
	defer f.Close()
	if err := lockFile(f, true); err != nil {
		return token, fmt.Errorf("token state %s: %w", t.file, err)
	}
	var s spent
	// What cannot be read is a fresh start: at worst a spent token is sent, which opens nothing.
	fmt.Fscanf(f, "%d %x\n", &s.step, &s.mask)
	s.mask &= allSpent
	s, index, ok := s.next(knock.StepAt(now, t.step), rand.IntN(knock.Indexes))
	if !ok {
		return token, &ExhaustedError{Wait: knock.Start(s.step, t.step).Sub(now)}
	}
	// Fixed width: a shorter line over a longer one leaves no tail. Written before the token leaves.
	if _, err := f.WriteAt(fmt.Appendf(nil, "%020d %02x\n", s.step, s.mask), 0); err != nil {
		return token, fmt.Errorf("token state: %w", unwritable(err))
	}
	return knock.NewToken(t.secret, t.server, s.step, index), nil
}

// Repeated spends a token, or gives the one again that was sent to this address of the gate before and has brought no answer. So silence,
// however long, uses up half of a step's tokens, and leaves some for when the way is open.
func (t *Tokens) Repeated(to netip.Addr, now time.Time) (knock.Token, error) {
	if len(t.secret) == 0 { // and no step
		return knock.Token{}, ErrNoTokens
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p, step := t.pending[to], knock.StepAt(now, t.step)
	if p == nil || step < p.step || step > p.step+1 { // none, or one that the gate does not hold any more
		p = &pending{step: step}
	}
	if p.step != step {
		p.taken = 0
	}
	if p.sends > 0 && (p.sends < repeats || p.taken >= mostSilent) {
		p.sends++
		return p.token, nil
	}
	token, err := t.Next(now)
	switch {
	case err == nil:
		*p = pending{token, step, 1, p.taken + 1}
	case p.sends == 0:
		return token, err
	}
	if t.pending == nil {
		t.pending = map[netip.Addr]*pending{}
	}
	t.pending[to] = p
	return p.token, nil
}

// Answered says that the gate is open: what was sent to it may be spent.
func (t *Tokens) Answered() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.pending)
}

// spent is the latest step of which tokens were used, and a bit for each index used of it.
type spent struct {
	step int64
	mask uint8
}

const allSpent = 1<<knock.Indexes - 1

// next picks an unused token at step now, trying from index start: another machine with the same profile, or the same
// person under sudo, should not begin with the token that is spent already. A state ahead of the next step comes from a
// clock that was wrong; it is dropped, or a corrected clock would lock its owner out.
func (s spent) next(now int64, start int) (after spent, index uint8, ok bool) {
	if s.step < now || s.step > now+1 {
		s = spent{step: now}
	}
	if s.mask == allSpent {
		if s.step == now+1 {
			return s, 0, false
		}
		s = spent{step: now + 1}
	}
	for i := range knock.Indexes {
		index = uint8((start + i) % knock.Indexes)
		if s.mask&(1<<index) == 0 {
			break
		}
	}
	s.mask |= 1 << index
	return s, index, true
}
