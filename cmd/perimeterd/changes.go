package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/systemd"
)

// changes takes up other configurations while the daemon runs: all or nothing. A file with an error, or with a change that
// takes a restart, leaves everything as it is.
//
// One on trial is recorded as unconfirmed before the kernel hears of it. So whatever ends the daemon meanwhile, the next one
// takes the last good configuration; the kernel has gone back to it by then, or soon will.
type changes struct {
	log  *slog.Logger
	meta *identity.Meta
	door *access
	rest func(*configs.Config) error    // takes up what is not the door's; refuses whole, or not at all
	tell func(action string, err error) // hears of changes that no command made

	service *systemd.Manager // hears of reloads; may be nil

	mu    sync.Mutex
	good  *configs.Config
	next  *configs.Config // on trial, or nil
	until time.Time       // the trial's end, or of the last one that was not confirmed
	end   *time.Timer
}

// Bounds of a trial: a person must be able to confirm it, and nobody waits longer for a door that is shut.
const (
	minTrial = 5 * time.Second
	maxTrial = time.Hour
)

// Run reloads on every SIGHUP, until ctx ends.
func (c *changes) Run(ctx context.Context, hup <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.end != nil {
				c.end.Stop() // the kernel's own timeout goes on
			}
			return nil
		case <-hup:
			told := c.service.Reloading()
			_, err := c.apply(0, false) // it says itself what went wrong
			c.tell("reload", err)
			if err := errors.Join(told, c.service.Ready()); err != nil {
				c.log.Warn("reload", "err", err)
			}
		}
	}
}

// Apply takes up the file as it is now; with a positive trial, only until that is over, unless Confirm is called.
func (c *changes) Apply(trial time.Duration) (control.Applied, error) { return c.apply(trial, true) }

// apply is Apply; asked for by a signal, as after every rotation of a log, it does not take up what nobody confirmed.
func (c *changes) apply(trial time.Duration, asked bool) (a control.Applied, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		if err != nil {
			c.log.Error("configuration not taken up: the old one goes on", "file", c.good.File, "err", err)
		}
	}()
	next, err := c.loadLocked()
	if err != nil {
		return a, err
	}
	if trial != 0 {
		return c.tryLocked(next, trial)
	}
	if !asked {
		u, err := c.meta.Unconfirmed()
		if err != nil {
			return a, err
		}
		if u != nil && u.File == sha256.Sum256(next.Text) {
			return a, fmt.Errorf("%s was tried and not confirmed: change it, or `perimeterd apply` takes it up as it is", next.File)
		}
	}
	if err := c.takeLocked(c.good, next); err != nil {
		return a, err
	}
	c.good = next
	c.log.Info("configuration reloaded", "file", next.File)
	if err := c.meta.SetUnconfirmed(nil); err != nil {
		return a, fmt.Errorf("the configuration rules now, but a restart may take an older one: %w", err)
	}
	return control.Applied{File: next.File}, nil
}

// loadLocked reads the file for a change.
func (c *changes) loadLocked() (*configs.Config, error) {
	if c.next != nil {
		return nil, fmt.Errorf("a configuration is on trial until %s: `perimeterd confirm` or `perimeterd rollback` first", clock(c.until))
	}
	next, err := configs.Load(c.good.File)
	if err != nil {
		return nil, err
	}
	if what := needsRestart(c.good, next); what != "" {
		return nil, fmt.Errorf("%s: %s changed, which takes a restart of the daemon", next.File, what)
	}
	return next, nil
}

func (c *changes) tryLocked(next *configs.Config, trial time.Duration) (a control.Applied, err error) {
	if trial < minTrial || trial > maxTrial {
		return a, fmt.Errorf("a trial of %v: want from %v to %v", trial, minTrial, maxTrial)
	}
	before, err := c.meta.Unconfirmed()
	if err != nil {
		return a, err
	}
	if err := c.meta.SetUnconfirmed(&identity.Unconfirmed{File: sha256.Sum256(next.Text), Good: c.good.Text}); err != nil {
		return a, err
	}
	c.until = time.Now().Add(trial)
	if err = c.door.try(next, c.until); err == nil {
		if err = c.rest(next); err != nil {
			err = errors.Join(err, c.door.configure(c.good))
		}
	}
	if err != nil {
		return a, errors.Join(err, c.meta.SetUnconfirmed(before))
	}
	c.next = next
	c.end = time.AfterFunc(trial, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.next == next {
			c.log.Error("configuration on trial was not confirmed in time: the last good one is back", "file", next.File)
			err := c.rollbackLocked()
			if err != nil {
				c.log.Error("last good configuration not taken up whole", "err", err)
			}
			c.tell("end of a trial", err)
		}
	})
	c.log.Warn("configuration on trial", "file", next.File, "until", c.until)
	return control.Applied{File: next.File, Until: c.until}, nil
}

// Confirm keeps what is on trial, which is not what the file says if that was edited since.
func (c *changes) Confirm() (a control.Applied, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next == nil {
		return a, c.noTrialLocked()
	}
	if err := c.takeLocked(c.next, c.next); err != nil {
		return a, fmt.Errorf("not confirmed, the trial goes on: %w", err)
	}
	c.end.Stop()
	c.good, c.next = c.next, nil
	c.log.Info("configuration confirmed", "file", c.good.File)
	if err := c.meta.SetUnconfirmed(nil); err != nil {
		return a, fmt.Errorf("confirmed, but a restart will go back: %w", err)
	}
	return control.Applied{File: c.good.File, Until: c.until}, nil
}

// Rollback ends a trial before its time.
func (c *changes) Rollback() (a control.Applied, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next == nil {
		return a, c.noTrialLocked()
	}
	c.log.Warn("configuration on trial rolled back", "file", c.next.File)
	return control.Applied{File: c.good.File}, c.rollbackLocked()
}

func (c *changes) noTrialLocked() error {
	if c.until.IsZero() {
		return errors.New("no configuration is on trial: `perimeterd apply --confirm 60s` begins one")
	}
	return fmt.Errorf("no configuration is on trial any more: the last one ended at %s", clock(c.until))
}

// rollbackLocked leaves the record: the file on disk is still the one that nobody confirmed.
func (c *changes) rollbackLocked() error {
	c.end.Stop()
	c.next, c.until = nil, time.Now()
	return errors.Join(c.door.configure(c.good), c.rest(c.good))
}

// takeLocked makes next rule, or leaves old.
func (c *changes) takeLocked(old, next *configs.Config) error {
	if err := c.door.configure(next); err != nil {
		return err
	}
	if err := c.rest(next); err != nil {
		return errors.Join(err, c.door.configure(old))
	}
	return nil
}

// Table is what the file as it is now would make of the table.
func (c *changes) Table() (firewall.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next, err := c.loadLocked()
	if err != nil {
		return firewall.Config{}, err
	}
	return c.door.table(next)
}

// problems are what an operator should know of the configuration that rules.
func (c *changes) problems() (all []identity.Problem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next != nil {
		return []identity.Problem{{Text: fmt.Sprintf("a configuration is on trial until %s: `perimeterd confirm` keeps it", clock(c.until)), Soon: true}}
	}
	if u, err := c.meta.Unconfirmed(); err != nil || u != nil {
		return []identity.Problem{{Text: c.good.File + " was tried and not confirmed, the last good configuration rules: change the file, or `perimeterd apply` takes it up as it is"}}
	}
	return nil
}

// lastGood is the configuration to start with: the file's, unless that was tried and not confirmed.
func lastGood(cfg *configs.Config, meta *identity.Meta, log *slog.Logger) (*configs.Config, error) {
	u, err := meta.Unconfirmed()
	if err != nil || u == nil {
		return cfg, err
	}
	if u.File != sha256.Sum256(cfg.Text) {
		return cfg, meta.SetUnconfirmed(nil)
	}
	good, err := configs.Parse(cfg.File, u.Good)
	if err != nil {
		return nil, fmt.Errorf("%s was tried and not confirmed, and the last good configuration is not understood any more: %w: change the file", cfg.File, err)
	}
	log.Warn("configuration file was tried and not confirmed: the last good configuration rules", "file", cfg.File)
	return good, nil
}

func clock(t time.Time) string { return t.Local().Format(time.TimeOnly) }

// needsRestart names what differs in the configuration and a running daemon cannot follow: the keys, where the files tell.
func needsRestart(a, b *configs.Config) string {
	for _, part := range []struct {
		name string
		keys string // prefixes of them
		of   func(*configs.Config) any
	}{
		{"state_dir or run_dir", "state_dir run_dir", func(c *configs.Config) any { return [2]string{c.StateDir, c.RunDir} }},
		{"[gate], [tunnel] or [session]", "gate. tunnel. session.", func(c *configs.Config) any { return c.Gate }},
		{"knock.tokens, knock.step or knock.log_group", "knock.tokens knock.step knock.log_group", func(c *configs.Config) any {
			return configs.Knock{Tokens: c.Knock.Tokens, Step: c.Knock.Step, LogGroup: c.Knock.LogGroup}
		}},
		{"proxy.port", "proxy.port", func(c *configs.Config) any { return c.Proxy.Listen }},
		{"[identity]", "identity.", func(c *configs.Config) any { return c.Identity }},
		{"[console]", "console.", func(c *configs.Config) any { return c.Console }},
		{"[log]", "log.", func(c *configs.Config) any { return c.Log }},
	} {
		if !reflect.DeepEqual(part.of(a), part.of(b)) {
			return cmp.Or(strings.Join(changedKeys(a.Text, b.Text, strings.Fields(part.keys)), ", "), part.name)
		}
	}
	return ""
}

// changedKeys are those of two files that differ and begin in one of these ways. One that is in neither file by its name, as
// where a path is relative to the file, is not found.
func changedKeys(a, b []byte, prefixes []string) (changed []string) {
	x, y := flatten(a), flatten(b)
	all := maps.Clone(x)
	maps.Copy(all, y)
	for key := range all {
		if !reflect.DeepEqual(x[key], y[key]) && slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(key, p) }) {
			changed = append(changed, key)
		}
	}
	slices.Sort(changed)
	return changed
}

// flatten gives a file's values by their whole names.
func flatten(text []byte) map[string]any {
	var tree map[string]any
	flat := map[string]any{}
	if toml.Unmarshal(text, &tree) != nil { // it was read before
		return flat
	}
	for name, value := range tree {
		section, ok := value.(map[string]any)
		if !ok {
			flat[name] = value
		}
		for key, v := range section {
			flat[name+"."+key] = v
		}
	}
	return flat
}
