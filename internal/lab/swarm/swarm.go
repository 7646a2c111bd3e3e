//go:build linux

// Package swarm is many clients of a gate in one process: each with its own user, certificate, outer address and
// WireGuard device, all with their inner addresses on one TUN device of the lab's client, so that any socket that is bound
// to such an address goes through the right tunnel. What they do on the wire is what one client does: knock, TLS, request
// with the handshake in it, tunnel.
package swarm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/configs"
	"perimeterd/internal/identity"
	"perimeterd/internal/lab"
	"perimeterd/knock"
)

// Swarm is the clients of one lab.
type Swarm struct {
	Members []*Member

	lab    *lab.Lab
	gate   netip.AddrPort
	server [32]byte
	knock  knock.ServerID
	step   time.Duration
	roots  *x509.CertPool
	name   string // of the server in TLS
	tun    *os.File

	mu     sync.RWMutex
	inside map[[4]byte]*Member
}

// link is the name of the TUN device.
const link = "swarm"

// New enrols a user for each of the times given, which is how long his certificate holds, in the daemon's state file, which
// nobody may hold now, and prepares a client for each. Close must follow.
func New(ctx context.Context, l *lab.Lab, d *lab.Daemon, valid ...time.Duration) (*Swarm, error) {
	cfg, err := configs.Load(d.Config)
	if err != nil {
		return nil, err
	}
	s := &Swarm{lab: l, gate: netip.AddrPortFrom(l.Bastion.Addr, 1194), step: cfg.Knock.Step, roots: x509.NewCertPool(), inside: map[[4]byte]*Member{}}
	authority, err := os.ReadFile(cfg.Identity.CA)
	if err != nil || !s.roots.AppendCertsFromPEM(authority) {
		return nil, fmt.Errorf("%s: %w", cfg.Identity.CA, errors.Join(err, errors.New("no certificate")))
	}
	id, err := identity.ReadServerID(cfg.Identity.ServerID)
	if err != nil {
		return nil, err
	}
	s.knock, s.name = id, fmt.Sprintf("%x", id)
	private, err := identity.ReadKey(cfg.Identity.WireGuardKey)
	if err != nil {
		return nil, err
	}
	if s.server, err = identity.PublicKey(private); err != nil {
		return nil, err
	}
	if err := s.enrol(cfg, valid); err != nil {
		return nil, err
	}
	outer, err := l.Strangers(ctx, len(valid))
	if err != nil {
		return nil, err
	}
	for i, m := range s.Members {
		m.Outer = outer[i]
	}
	// By way of one address: the kernel has room for a thousand neighbours.
	if err := l.Bastion.Do(func() error {
		return netlink.RouteReplace(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4(198, 18, 64, 0), Mask: net.CIDRMask(18, 32)}, Gw: l.Client.Addr.AsSlice()})
	}); err != nil {
		return nil, err
	}
	if err := s.open(); err != nil {
		return nil, err
	}
	go s.route()
	return s, nil
}

// enrol writes users as `perimeterd user add` does, but all of them with one wait for the disk.
func (s *Swarm) enrol(cfg *configs.Config, valid []time.Duration) error {
	bundle, err := os.ReadFile(cfg.Identity.CA)
	if err != nil {
		return err
	}
	key, err := os.ReadFile(cfg.Identity.CAKey)
	if err != nil {
		return err
	}
	ca, err := identity.ParseCA(bundle, key)
	if err != nil {
		return err
	}
	master, err := identity.ReadKey(cfg.Identity.Master)
	if err != nil {
		return err
	}
	db, err := identity.OpenState(cfg.StateFile())
	if err != nil {
		return err
	}
	defer db.Close()
	db.SyncLate()
	users, now := identity.NewUsers(db), time.Now()
	for i, life := range valid {
		name := fmt.Sprintf("member%d", i)
		issued, err := ca.IssueClient(name, "lab", life, now)
		if err != nil {
			return err
		}
		if _, err := users.Add(identity.Enrolment{Name: name, Groups: []string{"operators"}, Device: "lab", Key: issued.KeyHash, NotAfter: issued.NotAfter}, now); err != nil {
			return err
		}
		m := &Member{Name: name, swarm: s, secret: knock.Secret(master[:], name, 0), in: make(chan []byte, 256), echoes: make(chan struct{}, 1)}
		if m.certificate, err = tls.X509KeyPair(issued.Certificate, issued.Key); err != nil {
			return err
		}
		s.Members = append(s.Members, m)
	}
	return db.Sync()
}

// open makes the TUN device.
func (s *Swarm) open() error {
	return s.lab.Client.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		r, err := unix.NewIfreq(link)
		if err == nil {
			r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
		}
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("TUN device %s: %w", link, err)
		}
		s.tun = os.NewFile(uintptr(fd), link)
		return configure(nil, netip.MustParseAddr("10.77.0.1"))
	})
}

// configure gives the device addresses, or brings it up with a route to the server. It runs in the client's namespace.
func configure(addresses []netip.Addr, server netip.Addr) error {
	dev, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		if err := netlink.AddrReplace(dev, &netlink.Addr{IPNet: prefix(a)}); err != nil {
			return err
		}
	}
	if !server.IsValid() {
		return nil
	}
	if err := errors.Join(netlink.LinkSetMTU(dev, mtu), netlink.LinkSetTxQLen(dev, 10000), netlink.LinkSetUp(dev)); err != nil {
		return err
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: dev.Attrs().Index, Dst: prefix(server), Scope: netlink.SCOPE_LINK})
}

// route hands each packet of the device to the member whose address it comes from.
func (s *Swarm) route() {
	b := make([]byte, 1<<16)
	for {
		n, err := s.tun.Read(b)
		if err != nil {
			return
		}
		if n < 20 || b[0]>>4 != 4 {
			continue
		}
		s.mu.RLock()
		m := s.inside[[4]byte(b[12:16])]
		s.mu.RUnlock()
		if m == nil {
			continue
		}
		select {
		case m.in <- append([]byte(nil), b[:n]...):
		default: // as a full queue does
		}
	}
}

// Join brings the tunnels of members up, some at a time, and gives their addresses to the client's TUN device. It returns
// how long each took from its knock to its keys.
func (s *Swarm) Join(ctx context.Context, members []*Member, atOnce int) ([]time.Duration, error) {
	took := make([]time.Duration, len(members))
	errs := make([]error, len(members))
	slots := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i, m := range members {
		slots <- struct{}{}
		all.Go(func() {
			start := time.Now()
			if errs[i] = m.join(ctx); errs[i] != nil {
				errs[i] = fmt.Errorf("%s: %w", m.Name, errs[i])
			}
			took[i] = time.Since(start)
			<-slots
		})
	}
	all.Wait()
	var addresses []netip.Addr
	s.mu.Lock()
	for i, m := range members {
		if errs[i] == nil {
			s.inside[m.Address.As4()] = m
			addresses = append(addresses, m.Address)
		}
	}
	s.mu.Unlock()
	return took, errors.Join(append(errs, s.lab.Client.Do(func() error { return configure(addresses, netip.Addr{}) }))...)
}

// Close ends every tunnel, at this end only.
func (s *Swarm) Close() {
	var all sync.WaitGroup
	for _, m := range s.Members {
		all.Go(m.close)
	}
	all.Wait()
	s.tun.Close()
}
