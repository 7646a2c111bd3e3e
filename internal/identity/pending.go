package identity

import (
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"perimeterd/internal/statefile"
)

// pending are revocations that the disk refused. They hold from memory, and every later change takes them along: who was
// revoked stays out while the state cannot be written.
type pending struct {
	mu    sync.RWMutex
	since map[string]map[string]time.Time // user → device, or "" for the user → when
}

func (p *pending) add(name, device string, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since == nil {
		p.since = map[string]map[string]time.Time{}
	}
	if p.since[name] == nil {
		p.since[name] = map[string]time.Time{}
	}
	p.since[name][device] = now
}

// overlay makes a record what it would be, had the disk taken it.
func (p *pending) overlay(u *User) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for device, when := range p.since[u.Name] {
		u.revoke(device, when)
	}
}

// user is since when a whole user is revoked.
func (p *pending) user(name string) (since time.Time, is bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	since, is = p.since[name][""]
	return since, is
}

func (p *pending) names() []string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return slices.Sorted(maps.Keys(p.since))
}

// update commits fn together with the revocations that were not written so far.
func (s *Users) update(fn func(*statefile.Tx) error) error {
	s.ordering.Lock()
	defer s.ordering.Unlock()
	return s.updateLocked(fn)
}

func (s *Users) updateLocked(fn func(*statefile.Tx) error) error {
	late := s.pending.names() // ordering keeps others from adding to them
	err := s.db.Update(func(tx *statefile.Tx) error {
		for _, name := range late {
			u, err := mustGet(tx, name)
			if errors.Is(err, ErrNoUser) {
				if since, is := s.pending.user(name); is && CheckName("user", name) == nil {
					_, err := forbid(tx, name, since)
					if err != nil {
						return err
					}
				}
				continue
			}
			if err != nil {
				return err
			}
			s.pending.overlay(&u)
			if err := put(tx, u); err != nil {
				return err
			}
		}
		return fn(tx)
	})
	if err == nil && len(late) > 0 {
		s.pending.mu.Lock()
		clear(s.pending.since)
		s.pending.mu.Unlock()
	}
	return err
}

// Unwritten are the users with a revocation that the disk refused, so that it would be lost with this process.
func (s *Users) Unwritten() []string { return s.pending.names() }

// Settle writes such revocations, if there are any.
func (s *Users) Settle() error {
	if len(s.Unwritten()) == 0 {
		return nil
	}
	return s.update(func(*statefile.Tx) error { return nil })
}
