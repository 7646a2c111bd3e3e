package proxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

const (
	helloTimeout   = 10 * time.Second
	observeTimeout = time.Second // observing must not stall protocols whose server speaks first
	lingerTimeout  = time.Second
)

// connect serves CONNECT. Src may hold what the client has sent already.
func (s *Server) connect(l *link, h head, src *source) {
	a := s.begin(l, h.method, "")
	t, err := s.open(l, h, a)
	if err != nil {
		src.release()
		s.refuse(l, a, h, "", err)
		return
	}
	cutWithUs(t.server)
	fail := func(why Reason) { // after the 200, or without anybody to hear
		src.release()
		l.end(why)
		if a.End = l.why(); a.End == NotTLS || a.End == SNIMismatch || a.End == SNIMissing || a.End == SNITimeout {
			a.Decision.Allow, a.Decision.Reason = false, a.End
		}
		s.done(a) // before Run may find no link left and return
		s.links.remove(l)
	}
	if _, err := send(l.client, []byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
		fail(ClientReset)
		return
	}
	a.Status = http.StatusOK
	if a.Decision.TLS {
		if why, detail := s.checkHello(l, a, src); why != "" {
			a.Detail = detail
			if !s.state.Load().Observe || why == ClientReset {
				fail(why)
				return
			}
			a.Decision.Observed, a.Decision.Reason = true, why
			l.unproved()
		}
	}
	fromServer, err := newSource(t.server, s.buffers)
	if err != nil {
		fail(ServerReset)
		return
	}
	t.access, t.finish = a, s.finished
	t.start(src, fromServer)
	t.up.run()
}

// finished is for a tunnel whose sockets are closed.
func (s *Server) finished(t *tunnel) {
	t.access.Up, t.access.Down, t.access.End = t.up.moved.Load(), t.down.moved.Load(), t.link.why()
	s.account(t, 0)
	s.settleUp(t)
	s.done(t.access)
	s.links.remove(t.link)
}

// open decides and dials. The error is a *refusal.
func (s *Server) open(l *link, h head, a *Access) (*tunnel, error) {
	to, err := h.destination()
	if err != nil {
		a.Target = quote(h.target)
		return nil, &refusal{reason: reasonOf(err), cause: err}
	}
	a.Destination = to
	switch {
	case l.extra != "":
		return nil, &refusal{reason: l.extra}
	case !s.alive(l):
		return nil, &refusal{reason: NoSession}
	}
	q := Request{User: l.who.user, Groups: l.who.groups, Destination: to, Plain: h.method != "CONNECT"}
	var st *state
	if a.Decision, st = l.serve(&q, &s.state); !a.Decision.Allow {
		return nil, &refusal{reason: a.Decision.Reason, rule: a.Decision.Rule}
	}
	ctx, done := l.dialing()
	defer done()
	server, verdict, err := s.dialer.dial(ctx, st.policy, st.Bind, q)
	if err != nil {
		return nil, err
	}
	if verdict.Observed {
		a.Decision.Observed, a.Decision.Reason, a.Decision.Rule = true, verdict.Reason, verdict.Rule
	}
	a.Dialed = remote(server)
	t := newTunnel(l, server)
	t.parking, t.crew = s.parking, s.crew
	if !l.attach(t) {
		return nil, &refusal{reason: l.why()}
	}
	s.first(st, l)
	// A reload during the dial did not know the address yet.
	if now := s.state.Load(); now != st && !now.policy.DecideAddress(q, a.Dialed.Addr()).Allow {
		l.end(PolicyChanged)
		return nil, &refusal{reason: PolicyChanged}
	}
	return t, nil
}

// checkHello reads until the ClientHello is whole, and compares its name. All that was read stays in src, to be relayed.
func (s *Server) checkHello(l *link, a *Access, src *source) (Reason, string) {
	wait := helloTimeout
	if s.state.Load().Observe {
		wait = observeTimeout
	}
	l.client.SetReadDeadline(time.Now().Add(wait))
	defer l.client.SetReadDeadline(time.Time{})
	for {
		sni, err := serverName(src.bytes())
		switch {
		case err == nil:
			if why := checkName(sni, a.Destination); why != "" {
				return why, "server name " + quote(sni)
			}
			return "", ""
		case !errors.Is(err, errMore):
			return NotTLS, err.Error()
		case len(src.bytes()) == bufferSize:
			return NotTLS, errHelloBig.Error()
		}
		switch err := src.more(); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return SNITimeout, ""
		case err == io.EOF:
			return NotTLS, "the client has ended its side"
		case err != nil:
			return ClientReset, ""
		}
	}
}

// refuse logs a refusal, then tells the client, and closes. Why may be empty if err is a *refusal.
func (s *Server) refuse(l *link, a *Access, h head, why Reason, err error) {
	status := s.settle(l, a, why, err)
	if status == 0 {
		s.drop(l, Shutdown) // it has ended already, and keeps its reason
		return
	}
	body, kind := a.body(h.json)
	l.client.SetDeadline(time.Now().Add(lingerTimeout))
	// The id is in the status line too, which is all that most clients show of an answer to CONNECT.
	fmt.Fprintf(l.client, "HTTP/1.1 %d %s: %s, id %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n"+reasonHeader+": %s\r\n"+idHeader+": %s\r\nConnection: close\r\n\r\n",
		status, http.StatusText(status), a.Decision.Reason, a.ID, kind, len(body), a.Decision.Reason, a.ID)
	if h.method != http.MethodHead {
		l.client.Write(body)
	}
	// Closed with bytes unread, the socket would send RST, and the client might lose the answer.
	l.client.CloseWrite()
	io.CopyN(io.Discard, l.client, 1<<20)
	s.drop(l, Closed)
}

// settle completes and logs the record of a request that is not served. It returns the status to answer with, 0 if nobody
// is there to be answered.
func (s *Server) settle(l *link, a *Access, why Reason, err error) int {
	var r *refusal
	if errors.As(err, &r) {
		if why = r.reason; r.rule != 0 {
			a.Decision.Rule = r.rule
		}
		err = r.cause
	}
	if err != nil {
		a.Detail = err.Error()
	}
	a.Decision.Observed = false
	// A failure on the way is no denial.
	a.Decision.Allow = a.Decision.Allow && why.Status() >= http.StatusInternalServerError
	a.Decision.Reason, a.Status = why, why.Status()
	if ended := l.why(); ended != "" {
		a.Decision.Allow, a.Decision.Reason, a.Status, a.End = false, ended, 0, ended
	}
	if !a.Destination.Valid() {
		a.Destination = Destination{}
	}
	s.done(a)
	return a.Status
}
