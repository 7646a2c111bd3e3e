package main

import (
	"context"
	"log/slog"
	"time"

	"perimeterd/internal/identity"
)

// settle writes revocations that the disk refused, as soon as it takes them, until ctx ends.
func settle(ctx context.Context, users *identity.Users, log *slog.Logger) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			late := users.Unwritten()
			if len(late) > 0 && users.Settle() == nil {
				log.Info("revocations written that the disk had refused", "users", late)
			}
		}
	}
}
