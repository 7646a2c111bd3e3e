package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"syscall"

	"perimeterd/configs"
)

// reload applies the configuration again on SIGHUP, until ctx ends. All or nothing: a file with an error, or with a change
// that takes a restart, leaves everything as it is.
func reload(ctx context.Context, log *slog.Logger, cfg *configs.Config, apply func(old, next *configs.Config) error) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
		}
		next, err := configs.Load(cfg.File)
		if err == nil {
			if what := needsRestart(cfg, next); what != "" {
				err = fmt.Errorf("%s changed, which takes a restart", what)
			}
		}
		if err == nil {
			err = apply(cfg, next)
		}
		if err != nil {
			log.Error("configuration not reloaded: the old one goes on", "file", cfg.File, "err", err)
			continue
		}
		log.Info("configuration reloaded", "file", cfg.File)
		cfg = next
	}
}

// needsRestart names the first part of the configuration that differs and that a running daemon cannot follow.
func needsRestart(a, b *configs.Config) string {
	for _, part := range []struct {
		name string
		of   func(*configs.Config) any
	}{
		{"state_dir or run_dir", func(c *configs.Config) any { return [2]string{c.StateDir, c.RunDir} }},
		{"[gate], [tunnel] or [session]", func(c *configs.Config) any { return c.Gate }},
		{"knock.tokens, knock.step or knock.log_group", func(c *configs.Config) any {
			return configs.Knock{Tokens: c.Knock.Tokens, Step: c.Knock.Step, LogGroup: c.Knock.LogGroup}
		}},
		{"proxy.port", func(c *configs.Config) any { return c.Proxy.Listen }},
		{"[identity]", func(c *configs.Config) any { return c.Identity }},
		{"[console]", func(c *configs.Config) any { return c.Console }},
		{"[log]", func(c *configs.Config) any { return c.Log }},
	} {
		if !reflect.DeepEqual(part.of(a), part.of(b)) {
			return part.name
		}
	}
	return ""
}
