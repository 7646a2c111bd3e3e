package firewall

import (
	"context"
	"fmt"
	"time"
)

// Alive returns nil when Watch has looked at the table once more, which it does ten times a second.
func (f *Firewall) Alive(ctx context.Context) error {
	tick := time.NewTicker(watchEvery / 4)
	defer tick.Stop()
	for seen := f.turns.Load(); f.turns.Load() == seen; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("nobody watches the table: %w", ctx.Err())
		}
	}
	return nil
}
