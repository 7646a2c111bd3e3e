package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Part is something of the daemon without which it is of no use. Alive returns nil soon while it works; one that hangs is dead.
type Part struct {
	Name  string
	Alive func(context.Context) error
}

// Watch pings the manager four times in the time that it waits, so that one late answer is no death, as long as every part proves to be alive, and tells the status when it
// is another, until ctx ends. A daemon whose ping stays out is killed and started anew.
func (m *Manager) Watch(ctx context.Context, log *slog.Logger, status func() string, parts ...Part) error {
	const look = 5 * time.Second // at the status, where no ping is wanted
	every := look
	if m.watchdog > 0 {
		every = min(m.watchdog/4, look)
	}
	if m.conn == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	said, dead := "", ""
	for {
		if line := status(); line != said {
			if err := m.Status(line); err != nil {
				log.Warn("status not told", "err", err)
			}
			said = line
		}
		if m.watchdog > 0 {
			err := Ask(ctx, every, parts...)
			if err == nil {
				err = m.tell("WATCHDOG=1")
			}
			switch {
			case err == nil && dead != "":
				log.Info("alive again: the watchdog hears of it")
				dead = ""
			case err != nil && ctx.Err() == nil && err.Error() != dead:
				dead = err.Error()
				log.Error("the watchdog hears nothing: a part of the daemon does not answer", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Ask waits until every part says that it is alive, for so long.
func Ask(ctx context.Context, patience time.Duration, parts ...Part) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	answers := make([]chan error, len(parts))
	for i, p := range parts {
		answers[i] = make(chan error, 1) // whoever hangs in a lock answers when nobody waits any more
		go func() { answers[i] <- p.Alive(ctx) }()
	}
	var errs []error
	for i, p := range parts {
		var err error
		select {
		case err = <-answers[i]:
		case <-ctx.Done():
			err = ctx.Err()
			select {
			case err = <-answers[i]:
			default:
			}
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = errors.New("does not answer")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.Name, err))
		}
	}
	return errors.Join(errs...)
}
