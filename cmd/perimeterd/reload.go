package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"syscall"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/proxy"
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
		if err == nil && !sameButRules(cfg, next) {
			err = errors.New("only [knock], [firewall], [egress] and [proxy] can change under a running daemon (not proxy.port): restart it for the rest")
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

// sameButRules tells whether two configurations differ in nothing but what reload can change.
func sameButRules(a, b *configs.Config) bool {
	x, y := *a, *b
	for _, c := range []*configs.Config{&x, &y} {
		c.Proxy = proxy.Config{Listen: c.Proxy.Listen}
		c.Firewall = firewall.Config{GatePorts: c.Firewall.GatePorts, TunnelPort: c.Firewall.TunnelPort, Step: c.Firewall.Step, LogGroup: c.Firewall.LogGroup}
		c.Knock = configs.Knock{Tokens: c.Knock.Tokens, Step: c.Knock.Step, LogGroup: c.Knock.LogGroup}
		c.Egress = configs.Egress{}
	}
	return reflect.DeepEqual(x, y)
}
