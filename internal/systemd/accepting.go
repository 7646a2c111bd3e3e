package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// Accepting is a listener that can tell whether somebody accepts: it wakes him, and waits until he comes round. Connections
// do not notice.
type Accepting struct {
	net.Listener
	turn chan struct{}
}

// NewAccepting makes one of a listener that knows deadlines, as TCP's and Unix's do.
func NewAccepting(l net.Listener) *Accepting { return &Accepting{l, make(chan struct{}, 1)} }

type deadline interface{ SetDeadline(time.Time) error }

// Accept is the listener's.
func (a *Accepting) Accept() (net.Conn, error) {
	for {
		c, err := a.Listener.Accept()
		d, ok := a.Listener.(deadline)
		if !ok || !errors.Is(err, os.ErrDeadlineExceeded) {
			return c, err
		}
		if err := d.SetDeadline(time.Time{}); err != nil {
			return nil, err
		}
		select {
		case a.turn <- struct{}{}:
		default:
		}
	}
}

// Alive returns nil when somebody is in Accept, or comes there before ctx ends.
func (a *Accepting) Alive(ctx context.Context) error {
	d, ok := a.Listener.(deadline)
	if !ok {
		return fmt.Errorf("%T knows no deadline", a.Listener)
	}
	select {
	case <-a.turn: // of an earlier question that nobody waited for
	default:
	}
	if err := d.SetDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	select {
	case <-a.turn:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("nobody accepts on %v: %w", a.Addr(), ctx.Err())
	}
}
