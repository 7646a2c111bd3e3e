//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Tally is what became of connection attempts.
type Tally struct {
	Accepted int // the handshake was completed
	Refused  int // a reset came
	Silent   int // nothing came within Wait
	Failed   int // could not be sent, or was answered by an ICMP error

	FirstAccepted, LastAccepted time.Time
	LastFailure                 error
}

// Total is the number of attempts.
func (t Tally) Total() int { return t.Accepted + t.Refused + t.Silent + t.Failed }

// Prober is someone who tries to connect again and again. A connection that is accepted is reset at once.
type Prober struct {
	From    []netip.Addr  // source addresses in turn; none: the route's choice
	Workers int           // attempts at a time
	Wait    time.Duration // after which an attempt counts as silent; above the round trip
	Pace    time.Duration // between two attempts of one worker, at least
	Max     int           // attempts in all

	ns *Namespace
	to netip.AddrPort

	mu    sync.Mutex
	tally Tally
}

// Prober makes one that connects from ns to a port: 16 attempts at a time, up to 3,200 a second while they are answered, 800 while
// they are not, 100,000 in all. Its fields can be changed until it runs.
func (l *Lab) Prober(ns *Namespace, to netip.Addr, port uint16, from ...netip.Addr) *Prober {
	return &Prober{
		From: from, Workers: 16, Wait: 20 * time.Millisecond, Pace: 5 * time.Millisecond, Max: 100_000,
		ns: ns, to: netip.AddrPortFrom(to, port),
	}
}

// Tally returns the result so far.
func (p *Prober) Tally() Tally {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tally
}

// Run probes until ctx ends or Max attempts were made, and returns nil on both.
func (p *Prober) Run(ctx context.Context) error {
	if p.Workers < 1 || p.Wait <= 0 || p.Max < 1 {
		return fmt.Errorf("prober of %v: %d workers, wait %v, max %d: each must be above zero", p.to, p.Workers, p.Wait, p.Max)
	}
	var (
		workers sync.WaitGroup
		mu      sync.Mutex
		begun   int
		errs    []error
	)
	next := func() (netip.Addr, bool) {
		mu.Lock()
		defer mu.Unlock()
		if begun == p.Max || ctx.Err() != nil {
			return netip.Addr{}, false
		}
		begun++
		if len(p.From) == 0 {
			return netip.Addr{}, true
		}
		return p.From[begun%len(p.From)], true
	}
	for range p.Workers {
		workers.Go(func() {
			err := p.ns.Do(func() error {
				pace := time.NewTicker(max(p.Pace, time.Microsecond))
				defer pace.Stop()
				for from, ok := next(); ok; from, ok = next() {
					p.count(connect(from, p.to, p.Wait))
					select {
					case <-pace.C:
					case <-ctx.Done():
					}
				}
				return nil
			})
			mu.Lock()
			errs = append(errs, err)
			mu.Unlock()
		})
	}
	workers.Wait()
	return errors.Join(errs...)
}

func (p *Prober) count(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := &p.tally
	switch {
	case err == nil:
		t.Accepted++
		t.LastAccepted = time.Now()
		if t.FirstAccepted.IsZero() {
			t.FirstAccepted = t.LastAccepted
		}
	case errors.Is(err, unix.ECONNREFUSED):
		t.Refused++
	case errors.Is(err, unix.ETIMEDOUT):
		t.Silent++
	default:
		t.Failed++
		t.LastFailure = err
	}
}

// connect makes one attempt with bare system calls, on the calling thread, so that nothing retries and one socket costs no goroutine.
func connect(from netip.Addr, to netip.AddrPort, wait time.Duration) error {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	// A reset at close leaves no TIME_WAIT behind, of which the ports would run out.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return fmt.Errorf("linger: %w", err)
	}
	if from.IsValid() {
		// The port is chosen at connect, by the whole four-tuple.
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return fmt.Errorf("bind without port: %w", err)
		}
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(from, 0))); err != nil {
			return fmt.Errorf("bind %v: %w", from, err)
		}
	}
	if err := unix.Connect(fd, sockaddr(to)); err != unix.EINPROGRESS {
		return err
	}
	deadline := time.Now().Add(wait)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return unix.ETIMEDOUT
		}
		timeout := unix.NsecToTimespec(int64(left))
		n, err := unix.Ppoll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, &timeout, nil)
		if err == unix.EINTR || err == nil && n == 0 {
			continue
		}
		if err != nil {
			return fmt.Errorf("poll: %w", err)
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			return fmt.Errorf("outcome of connect: %w", err)
		}
		if code != 0 {
			return unix.Errno(code)
		}
		return nil
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
