package proxy

import (
	"context"
	"crypto/rand"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"perimeterd/internal/quota"
	"perimeterd/internal/session"
)

// Access is one request and what became of it: what the log line says, for those who keep it otherwise (audit, metrics, a
// person's last refusals).
type Access struct {
	ID          string // names it, for `perimeterd why`
	Began       time.Time
	User        string
	Session     session.ID
	Device      string
	Source      netip.AddrPort
	Method      string
	Destination Destination // zero if the request names none
	Target      string      // what the client sent, quoted, if Destination is zero
	Decision    Decision
	Status      int            // sent to the client; 0: none
	Dialed      netip.AddrPort // zero: none
	Up, Down    int64          // bytes to and from the destination
	Duration    time.Duration
	End         Reason // why the connection ended; empty when it goes on, and when nothing was relayed
	Detail      string // for people
}

// begin opens the record of a request. Method and target are the client's words, and go no further unquoted.
func (s *Server) begin(l *link, method, target string) *Access {
	a := &Access{
		ID: rand.Text()[:10], Began: time.Now(),
		User: l.who.user, Session: l.who.session, Device: l.who.device, Source: l.source,
	}
	switch {
	case method == http.MethodConnect:
		a.Method = http.MethodConnect
	case isToken(method) && len(method) <= 32:
		a.Method = strings.Clone(method) // not the head that it is a piece of
	}
	if target != "" {
		a.Target = quote(target)
	}
	return a
}

// done writes the request's one line, and tells the watchers. Of a user's refusals, which cost him nothing, lines
// may be left out.
func (s *Server) done(a *Access) {
	a.Duration = time.Since(a.Began)
	if left, ok := s.line(a); ok {
		s.write(a, left.Count)
	}
	for _, watch := range s.watchers {
		watch(*a)
	}
}

// line says whether a request gets its line, and what was left out before it.
func (s *Server) line(a *Access) (quota.Left, bool) {
	if a.Decision.Allow || a.Decision.Observed {
		return quota.Left{}, true
	}
	return s.lines.Take(a.User, a.Began.Add(a.Duration))
}

func (s *Server) write(a *Access, left uint64) {
	ctx, handler := context.Background(), s.log.Handler()
	if !handler.Enabled(ctx, slog.LevelInfo) {
		return
	}
	verdict := "deny"
	switch {
	case a.Decision.Observed:
		verdict = "observe"
	case a.Decision.Allow:
		verdict = "allow"
	}
	destination := a.Target
	if a.Destination.Valid() {
		destination = a.Destination.String()
	}
	attrs := make([]slog.Attr, 0, 20)
	attrs = append(attrs, slog.String("id", a.ID), slog.String("user", a.User))
	if a.Session != (session.ID{}) {
		attrs = append(attrs, slog.String("session", a.Session.String()), slog.String("device", a.Device))
	}
	attrs = append(attrs,
		slog.String("source", a.Source.String()), slog.String("method", a.Method), slog.String("destination", destination),
		slog.String("decision", verdict), slog.String("reason", string(a.Decision.Reason)), slog.Int("rule", a.Decision.Rule),
		slog.Int("status", a.Status))
	if a.Dialed.IsValid() {
		attrs = append(attrs, slog.String("dialed", a.Dialed.String()), slog.Int64("up", a.Up), slog.Int64("down", a.Down))
	}
	attrs = append(attrs, slog.Float64("duration_ms", float64(a.Duration.Microseconds())/1000))
	if a.End != "" {
		attrs = append(attrs, slog.String("end", string(a.End)))
	}
	if a.Detail != "" {
		attrs = append(attrs, slog.String("detail", a.Detail))
	}
	if left > 0 {
		attrs = append(attrs, slog.Uint64("left_out", left))
	}
	r := slog.NewRecord(a.Began.Add(a.Duration), slog.LevelInfo, "proxy", 0) // the Logger's own way looks for its caller on the stack
	r.AddAttrs(attrs...)
	handler.Handle(ctx, r)
}

// Watch has fn called with every request after its line, if it gets one, has been logged, from the request's goroutine: fn must be quick. It
// is for the time before Run.
func (s *Server) Watch(fn func(Access)) { s.watchers = append(s.watchers, fn) }

// WatchTraffic has fn told what a user's connections have moved, in bytes, while they last and at their end. It is for the
// time before Run.
func (s *Server) WatchTraffic(fn func(user string, up, down int64)) {
	s.traffic = append(s.traffic, fn)
}

// account tells what the tunnel has moved since it was last told, passed ago.
func (s *Server) account(t *tunnel, passed time.Duration) {
	t.link.mu.Lock()
	up, down := t.up.untold(), t.down.untold()
	if t.lull += passed; up != 0 || down != 0 {
		t.lull = 0
	}
	t.link.mu.Unlock()
	if up == 0 && down == 0 {
		return
	}
	for _, tell := range s.traffic {
		tell(t.link.who.user, up, down)
	}
}
