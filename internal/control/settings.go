package control

import (
	"context"
	"errors"
	"fmt"
	"net/url"

	"perimeterd/internal/identity"
	"perimeterd/internal/session"
)

// Changed is a user whom SetUser changed, and how many of his sessions it ended.
type Changed struct {
	User  identity.User `json:"user"`
	Ended int           `json:"ended"`
}

// SetUser changes a user's groups and settings. Sessions that would be others now end, and his client begins new ones: nobody
// keeps what a group gave him, and what he has newly he has at once.
func (o *Operations) SetUser(_ context.Context, name string, c identity.Change) (Changed, error) {
	if c.Address != nil && c.Address.IsValid() {
		if s, held := o.Sessions.ByAddress(*c.Address); held && s.User != name {
			return Changed{}, fmt.Errorf("address %v %w, in a session of user %q: choose another, or first: perimeterd kick %s",
				*c.Address, identity.ErrUserExists, s.User, s.User)
		}
	}
	u, afresh, err := o.Users.Set(name, c)
	if err != nil {
		return Changed{}, err
	}
	done := Changed{User: u}
	err = o.changed(name) // the gate must know of an address before it is asked for it
	if afresh {
		for _, s := range o.Sessions.List() {
			if s.User != name {
				continue
			}
			if e := o.Sessions.End(s.ID, session.Changed); e == nil {
				done.Ended++
			} else if !errors.Is(e, session.ErrNotFound) {
				err = errors.Join(err, e)
			}
		}
	}
	o.Log.Info("user changed", "user", name, "groups", u.Groups, "settings", u.Settings, "sessions", done.Ended)
	return done, err
}

// endReplaced ends the sessions of a device that got another certificate.
func (o *Operations) endReplaced(e identity.Enrolment) (err error) {
	for _, s := range o.Sessions.List() {
		if s.User == e.Name && s.Device == e.Device && s.Certificate != e.Key {
			if e := o.Sessions.End(s.ID, session.Revoked); e != nil && !errors.Is(e, session.ErrNotFound) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

// SetUser is Operations.SetUser.
func (c *Client) SetUser(ctx context.Context, name string, change identity.Change) (done Changed, err error) {
	err = c.do(ctx, "POST", "/v1/users/"+url.PathEscape(name)+"/settings", change, &done)
	return done, err
}
