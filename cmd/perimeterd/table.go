package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/identity"
	"perimeterd/knock"
)

// access keeps the door in step with users and configuration.
type access struct {
	gid    uint32
	names  *credentials
	door   *firewall.Firewall
	tokens *firewall.Tokens
	log    *slog.Logger

	mu    sync.Mutex // over reading users and writing what follows from them, or an older list might be written last
	cfg   *configs.Config
	trial *configs.Config // rules until the time below, or nil
	until time.Time
}

// userChanged follows a user who was added or revoked: tokens and windows of who is out are gone when it returns.
func (a *access) userChanged(string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return errors.Join(a.loadTokens(), a.write(a.cfg, a.trial))
}

// configure makes another configuration the door's, and ends a trial. What only the one before would have opened is shut.
func (a *access) configure(cfg *configs.Config) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	table, err := a.table(cfg)
	if err != nil {
		return err
	}
	if err := a.write(cfg, nil); err != nil {
		return err
	}
	a.cfg, a.trial = cfg, nil
	return a.closeStale(table)
}

// try makes another configuration the door's until the time given.
func (a *access) try(next *configs.Config, until time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.until
	a.until = until
	if err := a.write(a.cfg, next); err != nil {
		a.until = before
		return err
	}
	a.trial = next
	return nil
}

// config is the configuration in force.
func (a *access) config() *configs.Config {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.trial != nil && time.Now().Before(a.until) {
		return a.trial
	}
	return a.cfg
}

// write makes the table of a configuration, and of one on trial while there is time left to speak of.
func (a *access) write(cfg, trial *configs.Config) error {
	good, err := a.table(cfg)
	if err != nil {
		return err
	}
	if trial == nil || time.Until(a.until) < time.Second {
		_, err := a.door.Apply(good)
		return err
	}
	next, err := a.table(trial)
	if err != nil {
		return err
	}
	return a.door.Try(good, next, a.until)
}

func (a *access) table(cfg *configs.Config) (firewall.Config, error) {
	return tableConfig(cfg, a.names, a.gid, a.log)
}

// loadTokens closes the door for users who are out, and gives new ones their tokens.
func (a *access) loadTokens() error {
	list, err := a.names.load()
	if err != nil {
		return err
	}
	return a.tokens.Set(list, time.Now())
}

// closeStale ends windows that the table kept for users who are out since, or of sequences that are gone.
func (a *access) closeStale(table firewall.Config) error {
	list, err := a.names.load()
	if err != nil {
		return err
	}
	in := map[uint32]bool{}
	for _, c := range list {
		in[c.ID] = true
	}
	for _, s := range table.Sequences {
		in[s.Credential] = true
	}
	windows, err := a.door.Windows()
	errs := []error{err}
	for _, w := range windows {
		if !in[w.Credential] {
			errs = append(errs, a.door.CloseWindow(w))
		}
	}
	return errors.Join(errs...)
}

// tableConfig completes the firewall's part of a configuration with what only the running daemon knows. A sequence of a
// user who is out is left out.
func tableConfig(cfg *configs.Config, names *credentials, gid uint32, log *slog.Logger) (firewall.Config, error) {
	table := cfg.Firewall
	table.GID = gid
	table.Reach = resolvers("/etc/resolv.conf")
	table.Sequences = nil
	for i, s := range cfg.Firewall.Sequences {
		id, err := names.sequence(s.Name, cfg.Knock.Users[i])
		switch {
		case errors.Is(err, errUserOut):
			log.Warn("knock sequence left out", "sequence", s.Name, "err", err)
			continue
		case err != nil:
			return table, fmt.Errorf("knock.sequence %q: %w", s.Name, err)
		}
		s.Credential = id
		table.Sequences = append(table.Sequences, s)
	}
	return table, nil
}

// resolvers are the name servers that the Go resolver asks: over TCP too, where an answer is long.
func resolvers(file string) (list []netip.AddrPort) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil // no file: the resolver asks 127.0.0.1, which is not the backstop's to refuse over UDP
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil {
				list = append(list, netip.AddrPortFrom(a, 53))
			}
		}
	}
	return list
}

var errUserOut = errors.New("is revoked or not known")

// credentials names what the kernel knows by number.
type credentials struct {
	users  *identity.Users
	meta   *identity.Meta
	master []byte

	mu    sync.Mutex
	known map[uint32]string
}

// load reads who may knock by token.
func (c *credentials) load() (list []knock.Credential, err error) {
	users, err := c.users.List()
	if err != nil {
		return nil, err
	}
	for _, u := range users {
		c.note(u.Credential, u.Name)
		if u.Active() {
			list = append(list, knock.Credential{ID: u.Credential, Secret: knock.Secret(c.master, u.Name, u.Epoch)})
		}
	}
	return list, nil
}

// sequence is the number of a sequence's user, or of its own where it is shared.
func (c *credentials) sequence(name, user string) (uint32, error) {
	if user == "" {
		id, err := c.meta.SequenceCredential(name)
		c.note(id, "sequence "+name)
		return id, err
	}
	u, err := c.users.Get(user)
	if errors.Is(err, identity.ErrNoUser) || err == nil && !u.Active() {
		return 0, fmt.Errorf("user %q %w: give the sequence to another, or take it out", user, errUserOut)
	}
	if err != nil {
		return 0, err
	}
	c.note(u.Credential, u.Name)
	return u.Credential, nil
}

func (c *credentials) note(id uint32, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.known = map[uint32]string{}
	}
	c.known[id] = name
}

func (c *credentials) name(id uint32) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known[id]
}
