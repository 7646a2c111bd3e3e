package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	dialTimeout = 10 * time.Second // from the name to the connection
	dialStagger = 250 * time.Millisecond
	dialMost    = 8           // addresses of a name; its owner could list a thousand of other people's
	ownMaxAge   = time.Second // how long a new address of the host may go unnoticed; the firewall's backstop has no such gap
)

// refusal is the error of a dial that was not, or could not be, done.
type refusal struct {
	reason Reason
	rule   int
	cause  error // for the log; may be nil
}

func (e *refusal) Error() string {
	if e.cause == nil {
		return string(e.reason)
	}
	return string(e.reason) + ": " + e.cause.Error()
}

func (e *refusal) Unwrap() error { return e.cause }

// dialer connects to judged addresses and to no others.
type dialer struct {
	names *resolver
	own   ownAddresses
}

func newDialer() *dialer {
	return &dialer{names: newResolver()}
}

// dial, which ctx limits to dialTimeout, resolves q's destination once, judges every address, and connects to the first judged one that answers. The error is
// a *refusal. The Decision is the last one taken on an address: in observe mode it may say what would have been refused.
func (d *dialer) dial(ctx context.Context, p *Policy, bind netip.Addr, q Request) (*net.TCPConn, Decision, error) {
	addrs, err := d.resolve(ctx, p, q.Destination)
	if err != nil {
		return nil, Decision{}, err
	}
	var judged []netip.Addr
	var refused, verdict Decision
	for _, a := range addrs {
		v := d.judge(p, q, a)
		if v.Allow && len(judged) < dialMost {
			judged = append(judged, a)
			if v.Observed || len(judged) == 1 {
				verdict = v
			}
		} else if !v.Allow && refused.Reason == "" {
			refused = v
		}
	}
	if len(judged) == 0 {
		return nil, refused, &refusal{reason: refused.Reason, rule: refused.Rule}
	}
	// The socket's own address is judged again, so that nothing in between can matter.
	control := func(_ context.Context, _, address string, c syscall.RawConn) error {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		if v := d.judge(p, q, to.Addr()); !v.Allow {
			return &refusal{reason: v.Reason, rule: v.Rule}
		}
		cerr := c.Control(func(fd uintptr) {
			if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil || !to.Addr().Is4() {
				return
			}
			if bind.Is4() {
				err = os.NewSyscallError("bind", unix.Bind(int(fd), &unix.SockaddrInet4{Addr: bind.As4()}))
			}
			if err == nil {
				err = os.NewSyscallError("connect", connectNow(fd, to)) // net's own finds it begun, or done
			}
		})
		return errors.Join(cerr, err)
	}
	conn, err := race(ctx, judged, func(ctx context.Context, a netip.Addr) (*net.TCPConn, error) {
		nd := net.Dialer{ControlContext: control, FallbackDelay: -1, KeepAlive: -1} // a tunnel is kept alive once it is silent
		if q.Plain {
			nd.KeepAliveConfig = keepAlive
		}
		nd.SetMultipathTCP(false)
		if bind.Is6() && a.Is6() {
			nd.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(bind, 0))
		}
		c, err := nd.DialContext(ctx, "tcp", netip.AddrPortFrom(a, q.Destination.Port).String())
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	})
	if err != nil {
		return nil, verdict, connectRefusal(err)
	}
	return conn, verdict, nil
}

// judge is DecideAddress, and knows the host's own addresses.
func (d *dialer) judge(p *Policy, q Request, a netip.Addr) Decision {
	v := p.DecideAddress(q, a)
	if v.Allow {
		if why := d.own.judge(a, time.Now()); why != "" {
			v = Decision{Reason: why}
		}
	}
	return v
}

// resolve returns the addresses of a kind that may be dialed.
func (d *dialer) resolve(ctx context.Context, p *Policy, to Destination) ([]netip.Addr, error) {
	switch {
	case to.Addr.IsValid():
		return []netip.Addr{to.Addr}, nil
	case p.ipv6:
		return d.names.resolve(ctx, "ip", to.Name, time.Now())
	}
	return d.names.resolve(ctx, "ip4", to.Name, time.Now())
}

// race starts a dial every dialStagger, or at once when one has failed, and keeps the first connection.
func race(ctx context.Context, addrs []netip.Addr, dial func(context.Context, netip.Addr) (*net.TCPConn, error)) (*net.TCPConn, error) {
	if len(addrs) == 1 {
		return dial(ctx, addrs[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		c   *net.TCPConn
		err error
	}
	results := make(chan result)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var first error
	for next, running := 0, 0; ; {
		select {
		case <-timer.C:
			if next == len(addrs) {
				continue
			}
			a := addrs[next]
			next, running = next+1, running+1
			timer.Reset(dialStagger)
			go func() {
				c, err := dial(ctx, a)
				select {
				case results <- result{c, err}:
				case <-ctx.Done(): // another was faster
					if c != nil {
						c.Close()
					}
				}
			}()
		case r := <-results:
			if r.err == nil {
				return r.c, nil
			}
			if first == nil {
				first = r.err
			}
			if running--; running == 0 && next == len(addrs) {
				return nil, first
			}
			timer.Reset(0)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func connectRefusal(err error) error {
	var r *refusal
	var ne net.Error
	switch {
	case errors.As(err, &r):
		return r
	case errors.Is(err, unix.ECONNREFUSED):
		return &refusal{reason: ConnectRefused, cause: err}
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &ne) && ne.Timeout():
		return &refusal{reason: ConnectTimeout, cause: err}
	}
	return &refusal{reason: ConnectFailed, cause: err}
}

// ownAddresses knows the host's addresses. A connection to one of them would come from the host itself and pass what
// guards its ports.
type ownAddresses struct {
	mu    sync.Mutex
	read  time.Time
	addrs map[netip.Addr]bool
}

func (o *ownAddresses) judge(a netip.Addr, now time.Time) Reason {
	o.mu.Lock()
	defer o.mu.Unlock()
	if age := now.Sub(o.read); o.addrs == nil || age < 0 || age > ownMaxAge {
		list, err := net.InterfaceAddrs()
		if err != nil {
			return OwnAddress // unknown is closed
		}
		o.addrs, o.read = make(map[netip.Addr]bool, len(list)), now
		for _, l := range list {
			if p, err := netip.ParsePrefix(l.String()); err == nil {
				o.addrs[p.Addr().Unmap()] = true
			}
		}
	}
	if o.addrs[a.Unmap()] {
		return OwnAddress
	}
	return ""
}
