// Package control is the operators' way to the running daemon: HTTP over a unix socket in run_dir, whose file mode says
// who may use it. Whoever may is an administrator of this host; there is no other check. A second socket answers what only shows.
//
//	GET    /v1/status               Status
//	GET    /v1/users                []identity.User
//	POST   /v1/users                identity.Enrolment → identity.User
//	POST   /v1/users/NAME/revoke    Revocation → identity.User
//	POST   /v1/users/NAME/settings  identity.Change → Changed
//	POST   /v1/authority/rotate, /v1/authority/finish: reads the built-in CA's certificates again
//	GET    /v1/sessions             []Session
//	DELETE /v1/sessions/ID          ends it as kicked
//	POST   /v1/configuration        Trial → Applied: takes up the file
//	POST   /v1/configuration/confirm, /v1/configuration/rollback → Applied
//	GET    /v1/decide?user=&to=     Decision
//	GET    /v1/audit                []AuditFile
//	GET    /v1/audit/NAME           a file of the audit, as it is
//	GET    /v1/events?follow=1      audit.Record, one a line; user, session, since and kind choose
//	GET    /v1/configuration/table  firewall.Config: what the file would make of the table
//	GET    /v1/backup               the state file, as package statefile reads it
//
// Refusals are vpn.ErrorReply. The daemon never sees a CA key: the enrolment carries the hash of a certificate's public
// key, and the command that sends it made the certificate.
//
// Operations works without a socket too, on a state file that the daemon does not hold: one code for both.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"perimeterd/internal/audit"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/proxy"
	"perimeterd/vpn"
)

// maxBody bounds a request's body, bytes.
const maxBody = 64 << 10

// codeExists is the stable code of a 409: what should be added is there already.
const codeExists = "exists"

// Revocation is the body of a revoke: a device's name, or empty for the user.
type Revocation struct {
	Device string `json:"device,omitempty"`
}

// Session is a live session as lists show it: no keys.
type Session struct {
	ID          session.ID `json:"id"`
	User        string     `json:"user"`
	Device      string     `json:"device,omitempty"`
	Groups      []string   `json:"groups"`
	Address     netip.Addr `json:"address"`
	Outer       netip.Addr `json:"outer"`
	Created     time.Time  `json:"created"`
	Expires     time.Time  `json:"expires"`
	PostQuantum bool       `json:"post_quantum"`
	Curve       string     `json:"curve"` // of the TLS connection that began it
	// Endpoint and Handshake are of the last handshake, as far as it is noted.
	Endpoint  netip.AddrPort `json:"endpoint,omitzero"`
	Handshake time.Time      `json:"handshake,omitzero"`
}

// Status is the daemon in one look.
type Status struct {
	Version  string    `json:"version"`
	Started  time.Time `json:"started"`
	Endpoint string    `json:"endpoint"`
	Egress   []string  `json:"egress"`
	Limit    int       `json:"session_limit"`
	Windows  int       `json:"windows"`  // open now
	Problems []string  `json:"problems"` // what an operator should look at; empty is well
	Users    int       `json:"users"`    // not revoked; the server fills it in
	Sessions int       `json:"sessions"` // the server fills it in

	// Observed is, while proxy.mode is observe, what enforcing would refuse, the most frequent first.
	Observed []proxy.Observation `json:"observed,omitempty"`
}

// Operations is what operators can do, on stores that this process holds.
type Operations struct {
	Users    *identity.Users
	Sessions session.Store
	Now      func() time.Time
	Log      *slog.Logger
	// UserChanged is told of a user who was added or revoked, after it is durable. Its error is the operator's to know. Nil:
	// nobody.
	UserChanged func(name string) error
	// Forget tells the signer that nothing of a user's, or of his device's, is to be renewed. Nil: nobody is told.
	Forget func(ctx context.Context, name, device string) error
	// Authority takes up other certificates of the built-in CA, and of the gate. Nil: there is nothing to take up.
	Authority func() error
	// Status is the daemon's part of Status. Nil: none.
	Status   func() Status
	AuditDir string // of the audit's files
	// Feed has what happens. Nil: nothing is told.
	Feed *audit.Feed
	// Audit takes a record of every act. Nil: nobody does. It waits for nobody.
	Audit func(audit.Record)
	// Refused takes a record of what was refused to an account that may only read, of which there may be any number. Nil: nobody does.
	Refused func(account string, r audit.Record)
	// Configuration takes up other configurations. Nil: none can be.
	Configuration Configuration
	// Decide says what the proxy would do with a request. Nil: nobody knows.
	Decide func(user, to string) (Decision, error)
	// Listed says whether a name that is not in Users may come in all the same, by an external CA's list. Nil: none may.
	Listed func(name string) bool
	// Snapshot writes a copy of the state file, after it told its size. Nil: none can be had.
	Snapshot func(w io.Writer, size func(int64)) error
}

// AddUser enters a user or another device of one.
func (o *Operations) AddUser(_ context.Context, e identity.Enrolment) (identity.User, error) {
	u, err := o.Users.Add(e, o.Now())
	if err != nil {
		return identity.User{}, err
	}
	o.Log.Info("user added", "user", u.Name, "device", e.Device, "groups", u.Groups, "credential", u.Credential, "replaces", e.Replace)
	if e.Replace {
		err = o.endReplaced(e)
	}
	return u, errors.Join(err, o.changed(u.Name))
}

// ListUsers is every user, revoked ones included.
func (o *Operations) ListUsers(context.Context) ([]identity.User, error) {
	all, err := o.Users.List()
	return append([]identity.User{}, all...), err // an empty list is [] in JSON
}

// RevokeUser revokes a user, or one of his devices, and ends the sessions of what was revoked. The sessions end even
// where the state file could not be written.
func (o *Operations) RevokeUser(ctx context.Context, name, device string) (identity.User, error) {
	u, err := o.Users.Revoke(name, device, o.Now())
	if errors.Is(err, identity.ErrNoUser) && device == "" && o.Listed != nil && o.Listed(name) {
		u, err = o.Users.Forbid(name, o.Now())
	}
	if errors.Is(err, identity.ErrNoUser) {
		return identity.User{}, err
	}
	ended := 0
	for _, s := range o.Sessions.List() {
		if s.User != name || device != "" && s.Device != device && !revokedKey(u, s.Certificate) {
			continue
		}
		switch e := o.Sessions.End(s.ID, session.Revoked); {
		case e == nil:
			ended++
		case !errors.Is(e, session.ErrNotFound):
			err = errors.Join(err, e)
		}
	}
	o.changed(name)
	if o.Forget != nil {
		if e := o.Forget(ctx, name, device); e != nil { // the gate refuses to pass on a renewal of his besides
			o.Log.Warn("the signer was not told of a revocation", "user", name, "device", device, "err", e)
		}
	}
	if err != nil {
		o.Log.Error("user revoked in part", "user", name, "device", device, "sessions", ended, "err", err)
		return u, err
	}
	o.Log.Info("user revoked", "user", name, "device", device, "sessions", ended)
	return u, nil
}

func revokedKey(u identity.User, key [32]byte) bool {
	for _, d := range u.Devices {
		if d.ID() == key {
			return !d.Revoked.IsZero()
		}
	}
	return false
}

// Kick ends a session. Its user may begin another.
func (o *Operations) Kick(_ context.Context, id session.ID) error {
	return o.Sessions.End(id, session.Kicked)
}

func (o *Operations) changed(name string) error {
	if o.UserChanged == nil {
		return nil
	}
	if err := o.UserChanged(name); err != nil {
		return fmt.Errorf("user %q is changed, but the door does not follow: %w: restart the daemon", name, err)
	}
	return nil
}

func (o *Operations) status() (s Status, err error) {
	if o.Status != nil {
		s = o.Status()
	}
	users, err := o.Users.List()
	for _, u := range users {
		if u.Active() {
			s.Users++
		}
	}
	for _, name := range o.Users.Unwritten() {
		s.Problems = append(s.Problems, fmt.Sprintf("the revocation of %s is not on the disk: it holds, but only until the daemon ends: make room in state_dir", name))
	}
	s.Sessions = len(o.Sessions.List())
	return s, err
}

func (o *Operations) sessions() []Session {
	all := o.Sessions.List()
	list := make([]Session, len(all))
	for i, s := range all {
		list[i] = Session{s.ID, s.User, s.Device, append([]string{}, s.Groups...), s.Address, s.Outer, s.Created, s.Expires, s.PostQuantum, s.KeyExchange, s.Seen.Endpoint, s.Seen.Handshake}
	}
	return list
}

// Handler serves the operations.
func Handler(o *Operations) http.Handler { return o.handler(newSeats(operatorSeats, operatorSeats)) }

func (o *Operations) handler(s *seats) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, fn func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			reply, err := o.act(pattern, r, fn)
			answer(w, reply, err)
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return o.status() })
	handle("GET /v1/users", func(r *http.Request) (any, error) { return o.ListUsers(r.Context()) })
	handle("POST /v1/users", func(r *http.Request) (any, error) {
		var e identity.Enrolment
		if err := decode(r.Body, &e); err != nil {
			return nil, err
		}
		return o.AddUser(r.Context(), e)
	})
	handle("POST /v1/users/{name}/revoke", func(r *http.Request) (any, error) {
		var v Revocation
		if err := decode(r.Body, &v); err != nil {
			return nil, err
		}
		return o.RevokeUser(r.Context(), r.PathValue("name"), v.Device)
	})
	handle("POST /v1/users/{name}/settings", func(r *http.Request) (any, error) {
		var c identity.Change
		if err := decode(r.Body, &c); err != nil {
			return nil, err
		}
		return o.SetUser(r.Context(), r.PathValue("name"), c)
	})
	for _, act := range []string{CARotate, CAFinish} {
		handle("POST /v1/authority/"+act, func(r *http.Request) (any, error) {
			return struct{}{}, o.TakeUpAuthority(r.Context(), act)
		})
	}
	handle("GET /v1/sessions", func(*http.Request) (any, error) { return o.sessions(), nil })
	handle("DELETE /v1/sessions/{id}", func(r *http.Request) (any, error) {
		id, err := session.ParseID(r.PathValue("id"))
		if err != nil {
			return nil, &vpn.APIError{Status: http.StatusBadRequest, Code: vpn.CodeBadRequest, Message: err.Error()}
		}
		return struct{}{}, o.Kick(r.Context(), id)
	})
	if o.Configuration != nil {
		handleConfiguration(handle, o.Configuration)
	}
	if o.Decide != nil {
		handle("GET /v1/decide", o.decide)
	}
	handle("GET /v1/audit", func(*http.Request) (any, error) { return o.auditFiles() })
	mux.HandleFunc("GET /v1/audit/{name}", o.auditFile)
	mux.HandleFunc("GET /v1/events", s.bound(o.events))
	if o.Snapshot != nil {
		handleBackup(mux, o)
	}
	handle("/", func(r *http.Request) (any, error) {
		return nil, &vpn.APIError{Status: http.StatusNotFound, Code: vpn.CodeNotFound,
			Message: "no such operation: " + r.Method + " " + r.URL.Path}
	})
	return mux
}

func answer(w http.ResponseWriter, reply any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		e := apiError(err)
		w.WriteHeader(e.Status)
		reply = vpn.ErrorReply{Error: e}
	}
	_ = json.NewEncoder(w).Encode(reply) // the client hung up: nobody is left to tell
}

func decode(body io.Reader, v any) error {
	d := json.NewDecoder(body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return &vpn.APIError{Status: http.StatusBadRequest, Code: vpn.CodeBadRequest, Message: "request body: " + err.Error()}
	}
	return nil
}

func apiError(err error) *vpn.APIError {
	var e *vpn.APIError
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, identity.ErrNoUser), errors.Is(err, session.ErrNotFound):
		return &vpn.APIError{Status: http.StatusNotFound, Code: vpn.CodeNotFound, Message: err.Error()}
	case errors.Is(err, identity.ErrUserExists):
		return &vpn.APIError{Status: http.StatusConflict, Code: codeExists, Message: err.Error()}
	case errors.Is(err, identity.ErrName), errors.Is(err, identity.ErrSetting):
		return &vpn.APIError{Status: http.StatusBadRequest, Code: vpn.CodeBadRequest, Message: err.Error()}
	}
	// Operators own this host: they may read causes.
	return &vpn.APIError{Status: http.StatusInternalServerError, Code: vpn.CodeInternal, Message: err.Error()}
}
