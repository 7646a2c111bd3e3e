//go:build linux

// Package roster enters many users into a daemon's state at once, as `perimeterd user add` does one by one, and makes the
// knocks of all of them.
package roster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"perimeterd/configs"
	"perimeterd/internal/identity"
	"perimeterd/internal/lab"
	"perimeterd/knock"
)

// Roster is the users that New entered.
type Roster struct {
	Credentials []knock.Credential
	Config      *configs.Config

	server knock.ServerID

	mu    sync.Mutex
	steps map[int64]int // step → how many of its tokens are handed out
}

// New enters n users into the state of a daemon that does not run, by their names alone: they knock, and get as far as the gate,
// for which they have no certificate.
func New(d *lab.Daemon, n int) (*Roster, error) {
	cfg, err := configs.Load(d.Config)
	if err != nil {
		return nil, err
	}
	master, err := identity.ReadKey(cfg.Identity.Master)
	if err != nil {
		return nil, err
	}
	server, err := identity.ReadServerID(cfg.Identity.ServerID)
	if err != nil {
		return nil, err
	}
	r := &Roster{Config: cfg, server: server, steps: map[int64]int{}}
	db, err := identity.OpenState(cfg.StateFile())
	if err != nil {
		return nil, err
	}
	db.SyncLate() // once at the end, instead of for each
	users := identity.NewUsers(db)
	now := time.Now()
	for i := range n {
		u, err := users.Add(identity.Enrolment{Name: fmt.Sprintf("user%05d", i)}, now)
		if err != nil {
			return nil, errors.Join(err, db.Close())
		}
		r.Credentials = append(r.Credentials, knock.Credential{ID: u.Credential, Secret: knock.Secret(master[:], u.Name, u.Epoch)})
	}
	return r, errors.Join(db.Sync(), db.Close())
}

// Token is a user's of a step.
func (r *Roster) Token(user int, step int64, index uint8) knock.Token {
	return knock.NewToken(r.Credentials[user].Secret, r.server, step, index)
}

// PerStep is how many tokens all users have in one step.
func (r *Roster) PerStep() int { return len(r.Credentials) * knock.Indexes }

// Next hands out each token once: of the step before, which ends first, of the present one, then of the one to come. When all are
// out it waits for the next step.
func (r *Roster) Next(ctx context.Context) (knock.Token, error) {
	for {
		now := time.Now()
		step := knock.StepAt(now, r.Config.Knock.Step)
		// At the very end of a step it is not sure which one the daemon is in.
		oldest := step
		if now.Sub(knock.Start(step, r.Config.Knock.Step)) < r.Config.Knock.Step*3/4 {
			oldest--
		}
		if token, ok := r.take(oldest, step+1); ok {
			return token, nil
		}
		select {
		case <-time.After(time.Until(knock.Start(step+1, r.Config.Knock.Step))):
		case <-ctx.Done():
			return knock.Token{}, ctx.Err()
		}
	}
}

func (r *Roster) take(first, last int64) (knock.Token, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for step := first; step <= last; step++ {
		if n := r.steps[step]; n < r.PerStep() {
			r.steps[step]++
			return r.Token(n%len(r.Credentials), step, uint8(n/len(r.Credentials))), true
		}
	}
	return knock.Token{}, false
}

// TokenKnock is one datagram to the tunnel's port.
func (r *Roster) TokenKnock(from, to netip.Addr, token knock.Token) lab.Knock {
	return lab.Knock{Packets: [][]byte{
		lab.Datagram4(netip.AddrPortFrom(from, sourcePort), netip.AddrPortFrom(to, r.Config.Gate.TunnelPort), token[:]),
	}}
}

// SequenceKnock is the packets to the ports of the configuration's first sequence.
func (r *Roster) SequenceKnock(from, to netip.Addr) lab.Knock {
	return SequenceKnock(from, to, r.Config.Firewall.Sequences[0].Ports)
}

// SequenceKnock is packets to ports, as far apart as our client sends them.
func SequenceKnock(from, to netip.Addr, ports []knock.Port) lab.Knock {
	k := lab.Knock{Gap: knock.Gap}
	for _, p := range ports {
		source, destination := netip.AddrPortFrom(from, sourcePort), netip.AddrPortFrom(to, p.Number)
		if p.Proto == knock.UDP {
			k.Packets = append(k.Packets, lab.Datagram4(source, destination, nil))
		} else {
			k.Packets = append(k.Packets, lab.SYN4(source, destination))
		}
	}
	return k
}

const sourcePort = 40000
