package client

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
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
}

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
		return token, fmt.Errorf("token state: %w", err)
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
		return token, fmt.Errorf("token state: %w", err)
	}
	return knock.NewToken(t.secret, t.server, s.step, index), nil
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
