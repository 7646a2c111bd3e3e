package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"perimeterd/configs"
	"perimeterd/internal/audit"
	"perimeterd/internal/control"
	"perimeterd/internal/event"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/proxy"
	"perimeterd/vpn/gate"
)

// trail turns what happens in the daemon into the audit's records.
type trail struct {
	*audit.Recorder
	started time.Time
	stop    func()
	done    chan error
}

// beginTrail records from now on, until end. It outlives every other part, whose last words it takes.
func beginTrail(cfg *configs.Config, log *slog.Logger) *trail {
	t := &trail{Recorder: audit.NewRecorder(cfg.AuditDir(), audit.Options{Keep: cfg.Log.AuditKeep}, log), started: time.Now(), done: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	t.stop = cancel
	t.Add(audit.Record{Time: t.started, Kind: audit.DaemonStarted, Detail: "version " + version()})
	go func() { t.done <- t.Run(ctx) }()
	return t
}

// end records why the daemon stops, and returns when all is on the disk.
func (t *trail) end(why error) {
	stopped := audit.Record{Kind: audit.DaemonStopped}
	if why != nil {
		stopped.Reason, stopped.Detail = "failed", why.Error()
	}
	t.Add(stopped)
	t.stop()
	<-t.done
}

// problems is what an operator should know of the audit.
func (t *trail) problems() []identity.Problem {
	if p := t.Problem(); p != "" {
		return []identity.Problem{{Text: "the audit is not written: " + p, Soon: true}}
	}
	return nil
}

// event takes what internal/event found worth a line.
func (t *trail) event(e event.Event) {
	r := audit.Record{Time: e.At, Kind: audit.Kind(e.Kind), User: e.User, Source: e.Source.String(), Sequence: e.Sequence}
	if e.Kind == event.Opened {
		r.Expires = e.At.Add(e.For)
		if !e.Sequence {
			t.Add(r) // it took a token that was handed to him
			return
		}
	}
	t.AddStranger(r)
}

// session is a session.Store watcher. Those of an earlier run are in the audit already.
func (t *trail) session(e session.Event) {
	s := e.Session
	r := audit.Record{Kind: audit.SessionBegan, User: s.User, Device: s.Device, Session: s.ID.String(), Source: s.Outer.String(), Address: s.Address.String()}
	switch {
	case e.Ended != "":
		r.Kind, r.Reason, r.DurationMS = audit.SessionEnded, string(e.Ended), time.Since(s.Created).Milliseconds()
	case s.Created.Before(t.started):
		return
	default:
		r.Expires = s.Expires
		if s.PostQuantum {
			r.Detail = "post-quantum"
		}
	}
	t.Add(r)
}

// refusal is a watcher of the gate.
func (t *trail) refusal(g gate.Refusal) {
	r := audit.Record{ID: g.ID, User: g.User, Device: g.Device, Source: g.Source, Method: g.Method, Destination: g.Path, Decision: "deny", Reason: g.Code, Status: g.Status, Detail: g.Text}
	switch g.Stage {
	case gate.Handshake:
		r.Kind = audit.HandshakeFailed
	case gate.Certificate:
		r.Kind = audit.CertificateRefused
	default:
		r.Kind = audit.RequestRefused
		t.AddRefused("", r)
		return
	}
	t.AddStranger(r)
}

// renewal hears of each renewed certificate.
func (t *trail) renewal(id identity.Identity, source netip.AddrPort, until time.Time) {
	t.Add(audit.Record{Kind: audit.CertificateRenewed, User: id.User, Device: id.Device, Source: source.String(), Expires: until})
}

// access is a watcher of the proxy.
func (t *trail) access(a proxy.Access) {
	r := audit.Record{Time: a.Began.Add(a.Duration), Kind: audit.Connection, ID: a.ID, User: a.User, Device: a.Device, Source: a.Source.String(), Method: a.Method, Destination: a.Target,
		Decision: "allow", Reason: string(a.Decision.Reason), Rule: a.Decision.Rule, Status: a.Status, Up: a.Up, Down: a.Down, DurationMS: a.Duration.Milliseconds(),
		End: string(a.End), Detail: a.Detail}
	if a.Session != (session.ID{}) {
		r.Session = a.Session.String()
	}
	if a.Destination.Valid() {
		r.Destination = a.Destination.String()
	}
	if a.Dialed.IsValid() {
		r.Dialed = a.Dialed.String()
	}
	switch {
	case a.Decision.Observed:
		r.Decision = "observe"
	case !a.Decision.Allow:
		r.Kind, r.Decision = audit.ProxyRefused, "deny"
		t.AddRefused("", r)
		return
	}
	t.Add(r)
}

// configuration records a change that no operator's command made.
func (t *trail) configuration(action string, err error) {
	r := audit.Record{Kind: audit.Configuration, Action: action, Decision: "done"}
	if err != nil {
		r.Decision, r.Detail = "failed", err.Error()
	}
	t.Add(r)
}

// audited is a stopped daemon's users: what is done to them is recorded too.
type audited struct {
	users users // not embedded: what they learn to do must be recorded here too
	dir   string
}

func (a audited) ListUsers(ctx context.Context) ([]identity.User, error) {
	return a.users.ListUsers(ctx)
}

func (a audited) SetUser(ctx context.Context, name string, c identity.Change) (control.Changed, error) {
	done, err := a.users.SetUser(ctx, name, c)
	text, _ := json.Marshal(c) // it goes to the daemon so
	a.record(ctx, audit.Record{Action: "user-set", User: name, Detail: string(text)}, err)
	return done, err
}

func (a audited) AddUser(ctx context.Context, e identity.Enrolment) (identity.User, error) {
	u, err := a.users.AddUser(ctx, e)
	r := audit.Record{Action: "user-add", User: e.Name, Device: e.Device}
	if e.Replace {
		r.Action = "user-profile"
	}
	if len(e.Groups) > 0 {
		r.Detail = "groups " + strings.Join(e.Groups, ",")
	}
	a.record(ctx, r, err)
	return u, err
}

func (a audited) TakeUpAuthority(ctx context.Context, act string) error {
	err := a.users.TakeUpAuthority(ctx, act)
	a.record(ctx, audit.Record{Action: "ca-" + act}, err)
	return err
}

func (a audited) RevokeUser(ctx context.Context, name, device string) (identity.User, error) {
	u, err := a.users.RevokeUser(ctx, name, device)
	a.record(ctx, audit.Record{Action: "user-revoke", User: name, Device: device}, err)
	return u, err
}

// record writes one record. What was done stands, also where this fails.
func (a audited) record(ctx context.Context, r audit.Record, done error) {
	w, err := audit.OpenWriter(a.dir, audit.Options{})
	if err == nil {
		defer w.Close()
		r.Time = time.Now()
		if err = w.Append(r.Time, control.Act(ctx, r, done)); err == nil {
			err = w.Sync()
		}
	}
	if err != nil {
		stderrf("warning: this is not in the audit: %v", err)
	}
}
