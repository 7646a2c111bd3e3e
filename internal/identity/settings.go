package identity

import (
	"fmt"
	"net/netip"
	"time"

	"perimeterd/internal/statefile"
)

// Settings are what a user has of his own; zero fields are as everybody's.
type Settings struct {
	Address    netip.Addr `json:"address,omitzero"`              // of the tunnel, nobody else's
	Sessions   int        `json:"session_devices,omitempty"`     // live ones of a certificate; 0: session.devices
	SessionMax int64      `json:"session_max_seconds,omitempty"` // 0: session.max
}

// Max is how long a session of his lasts at most, where everybody's lasts so long.
func (s Settings) Max(everybodys time.Duration) time.Duration {
	if s.SessionMax == 0 {
		return everybodys
	}
	return time.Duration(s.SessionMax) * time.Second
}

// Limit is how many live sessions a certificate of his may hold, where everybody's may hold so many.
func (s Settings) Limit(everybodys int) int {
	if s.Sessions == 0 {
		return everybodys
	}
	return s.Sessions
}

// Change is what of a user is to be another; nil fields stay.
type Change struct {
	Groups     []string    `json:"groups,omitzero"` // all of them; empty and not nil: none
	Address    *netip.Addr `json:"address,omitempty"`
	Sessions   *int        `json:"session_devices,omitempty"`
	SessionMax *int64      `json:"session_max_seconds,omitempty"`
}

// What settings may be.
const (
	minSession  = time.Minute
	maxSession  = 30 * 24 * time.Hour
	maxSessions = 1 << 10
	maxGroups   = 64
)

func (c Change) check(user string) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("user %q: %w: "+format, append([]any{user, ErrSetting}, a...)...)
	}
	if err := checkGroups(user, c.Groups); err != nil {
		return err
	}
	switch {
	case c.Address != nil && c.Address.IsValid() && !c.Address.Is4():
		return bad("address %v: want one of the tunnel's network", *c.Address)
	case c.Sessions != nil && (*c.Sessions < 0 || *c.Sessions > maxSessions):
		return bad("%d live sessions: want 1 to %d, or 0 for session.devices", *c.Sessions, maxSessions)
	case c.SessionMax != nil && *c.SessionMax != 0 && (*c.SessionMax < int64(minSession/time.Second) || *c.SessionMax > int64(maxSession/time.Second)):
		return bad("sessions of %d s: want %v to %v, or 0 for session.max", *c.SessionMax, minSession, maxSession)
	}
	return nil
}

func checkGroups(user string, groups []string) error {
	if len(groups) > maxGroups {
		return fmt.Errorf("user %q: %w: %d groups, at most %d", user, ErrName, len(groups), maxGroups)
	}
	for _, g := range groups {
		if err := CheckName("group", g); err != nil {
			return err
		}
	}
	return nil
}

// Set changes a user, revoked ones too. Afresh says whether sessions that live now are not what they would be with the
// change. Errors: ErrNoUser, ErrUserExists where the address is another's, ErrName, ErrSetting, or of the medium.
func (s *Users) Set(name string, c Change) (u User, afresh bool, err error) {
	if err := c.check(name); err != nil {
		return User{}, false, err
	}
	err = s.update(func(tx *statefile.Tx) error {
		if u, err = mustGet(tx, name); err != nil {
			return err
		}
		if c.Groups != nil {
			afresh = !sameSet(u.Groups, c.Groups)
			u.Groups = append([]string{}, c.Groups...)
		}
		if c.Address != nil {
			if err := freeAddress(tx, name, *c.Address); err != nil {
				return err
			}
			afresh = afresh || u.Address != *c.Address
			u.Address = *c.Address
		}
		if c.SessionMax != nil {
			afresh = afresh || u.SessionMax != *c.SessionMax
			u.SessionMax = *c.SessionMax
		}
		if c.Sessions != nil { // counts at the next session
			u.Sessions = *c.Sessions
		}
		return put(tx, u)
	})
	if err != nil {
		return User{}, false, err
	}
	return u, afresh, nil
}

// freeAddress refuses an address that another user has.
func freeAddress(tx *statefile.Tx, user string, a netip.Addr) error {
	if !a.IsValid() {
		return nil
	}
	return each(tx, func(u User) error {
		if u.Name != user && u.Address == a {
			return fmt.Errorf("address %v %w, as user %q's own: choose another, or free it: perimeterd user set %s --address none", a, ErrUserExists, u.Name, u.Name)
		}
		return nil
	})
}
