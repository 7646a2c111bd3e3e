package client

import (
	"context"
	"net"
	"time"
)

// What TCP loses of a handshake at the end of a flight it finds out by a timer, two round trips later and more: how many more depends on
// the system. So when the gate's answer is late, the handshake is begun a second time, on another connection, and the first that is
// complete wins. That costs the gate the work of one handshake, and leaves nothing behind there: what changes something is asked for
// afterwards, on the winner.

// hedgeMargin is what the gate may take to answer, and the network to waver.
const hedgeMargin = 20 * time.Millisecond

// hedgeAfter is when an answer is late, from a connect that took so long on.
func hedgeAfter(conn net.Conn, took time.Duration) time.Duration {
	return min(tcpRoundTrip(conn), took)*9/8 + hedgeMargin
}

// handshakeHedged authenticates both sides on what was dialed, or on a connection beside it.
func (p *Profile) handshakeHedged(ctx context.Context, r dialed) (*gateConn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // it ends the other handshake, and not what has finished
	results := make(chan reached, 2)
	begin := func(conn net.Conn) {
		g, err := p.handshake(ctx, conn)
		results <- reached{g, err}
	}
	go begin(r.conn)
	running := 1
	var failed error
	late := time.NewTimer(hedgeAfter(r.conn, r.took))
	defer late.Stop()
	for {
		select {
		case done := <-results:
			running--
			switch {
			case done.err == nil && running > 0:
				go func() {
					if other := <-results; other.gate != nil {
						other.gate.Close()
					}
				}()
				fallthrough
			case done.err == nil:
				return done.gate, nil
			default:
				failed = telling(failed, done.err)
			}
			if running == 0 {
				return nil, failed
			}
		case <-late.C:
			if merelySlow(r.conn) {
				late.Reset(hedgeMargin)
				continue
			}
			running++
			go func() {
				conn, err := r.another(ctx)
				if err != nil {
					results <- reached{err: err}
					return
				}
				begin(conn)
			}()
		}
	}
}

// telling is which of two failures is told: the first, unless only the other changes nothing by being tried again. That the second
// connection was refused must not hide that on the first there was another gate than the profile's. Before may be nil.
func telling(before, now error) error {
	if before == nil || permanent(now) && !permanent(before) {
		return now
	}
	return before
}

// another is a second connection to where the first leads: the one in reserve, or a new one.
func (r dialed) another(ctx context.Context) (net.Conn, error) {
	select {
	case conn := <-r.reserve:
		return conn, nil
	default:
	}
	source := *r.conn.LocalAddr().(*net.TCPAddr) // the door is open for it alone
	source.Port = 0
	return (&net.Dialer{LocalAddr: &source, Control: impatient}).DialContext(ctx, "tcp", r.conn.RemoteAddr().String())
}

// reserve offers the next connection that comes, until ctx ends, and has those behind it closed.
func reserve(ctx context.Context, enough func(), results <-chan dialed) <-chan net.Conn {
	to := make(chan net.Conn)
	go func() {
		defer enough()
		for {
			select {
			case r := <-results:
				if r.conn == nil {
					continue
				}
				enough()
				select {
				case to <- r.conn:
				case <-ctx.Done():
					r.conn.Close()
				}
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	return to
}
