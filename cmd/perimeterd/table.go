package main

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/identity"
	"perimeterd/knock"
)

// tableConfig completes the firewall's part of a configuration with what only the running daemon knows.
func tableConfig(cfg *configs.Config, names *credentials, gid uint32) (firewall.Config, error) {
	table := cfg.Firewall
	table.GID = gid
	table.Reach = resolvers("/etc/resolv.conf")
	table.Sequences = append([]knock.Sequence(nil), table.Sequences...)
	for i := range table.Sequences {
		s := &table.Sequences[i]
		id, err := names.sequence(s.Name, cfg.Knock.Users[i])
		if err != nil {
			return table, fmt.Errorf("knock.sequence %q: %w", s.Name, err)
		}
		s.Credential = id
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
	if err != nil {
		return 0, err
	}
	if !u.Active() {
		return 0, fmt.Errorf("user %q is revoked: give the sequence to another, or take it out", user)
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
