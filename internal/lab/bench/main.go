//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Main runs a measuring program until it is done, fails or has taken longer than limit (exit status 1), or is interrupted (130).
// Measure cleans up before it returns.
func Main(name string, limit time.Duration, measure func(context.Context) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := measure(ctx)
	switch {
	case err == nil:
		return
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		fmt.Fprintf(os.Stderr, "%s: not done after %v, and given up: everything is cleaned up: %v\n", name, limit, err)
	case ctx.Err() != nil:
		fmt.Fprintf(os.Stderr, "%s: interrupted: everything is cleaned up\n", name)
		os.Exit(130)
	default:
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	}
	os.Exit(1)
}
