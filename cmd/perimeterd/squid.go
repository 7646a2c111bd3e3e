package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"perimeterd/proxy"
)

// reopenSquidLog opens the access log again on SIGHUP, as after a rotation, until ctx ends.
func reopenSquidLog(ctx context.Context, l *proxy.SquidLog, log *slog.Logger) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			if err := l.Reopen(); err != nil {
				log.Error("squid access log not reopened: the old file goes on", "err", err)
			}
		}
	}
}
