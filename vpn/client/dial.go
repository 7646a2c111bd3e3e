package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"perimeterd/knock"
)

const (
	// patience is how long the token, sent again meanwhile, may bring no answer before it goes out once more and the sequence is knocked.
	patience = 400 * time.Millisecond
	// again is the pause between two knocks by token from then on.
	again = time.Second
	// stagger is the pause before a name's next address is tried as well (RFC 8305, 5).
	stagger = 250 * time.Millisecond
	// perEndpoint is what an endpoint gets while there is another after it.
	perEndpoint = 4 * time.Second
	// maxAddresses bounds what a name may make us knock at.
	maxAddresses = 4
)

// attempts are the first connects, counted from a knock. The first leaves a millisecond behind it, since on several
// queues a SYN sent at once may overtake the token; a SYN that the door dropped would cost a second. From repeatFrom on the token goes
// before each again: it was lost, or the way is long, and then the gate takes it for the copy that it is.
var attempts = [...]time.Duration{1 * time.Millisecond, 6 * time.Millisecond, 40 * time.Millisecond, 200 * time.Millisecond}

const repeatFrom = 2

// Dialer opens the way to a gate: it knocks and connects at once.
type Dialer struct {
	Profile *Profile
	Tokens  *Tokens
	// SendToken sends one datagram to the tunnel's port. Nil: from a socket of the dialer's own.
	SendToken func(token []byte, to netip.AddrPort) error
	Progress  func(step string) // nil: nobody watches
	Now       func() time.Time  // the wall clock, which tokens follow; nil: this machine's

	spare context.Context // until it ends, what connects behind the first is kept in reserve; nil: it is closed
}

func (d *Dialer) now() time.Time {
	if d.Now == nil {
		return time.Now()
	}
	return d.Now()
}

func (d *Dialer) progress(step string) {
	if d.Progress != nil {
		d.Progress(step)
	}
}

// Dial tries the profile's endpoints in order and returns the first connection. Knock and connect leave from one
// address: the window is for one source.
func (d *Dialer) Dial(ctx context.Context) (net.Conn, error) {
	r := d.dial(ctx)
	return r.conn, r.err
}

func (d *Dialer) dial(ctx context.Context) dialed {
	var errs []error
	for i, endpoint := range d.Profile.Endpoints {
		mine, cancel := context.WithCancel(ctx)
		if i < len(d.Profile.Endpoints)-1 {
			mine, cancel = context.WithTimeout(ctx, perEndpoint)
		}
		r := d.dialEndpoint(mine, endpoint)
		cancel()
		if r.err == nil {
			return r
		}
		errs = append(errs, fmt.Errorf("gate %s: %w", endpoint, r.err))
		if ctx.Err() != nil {
			break
		}
	}
	return dialed{err: errors.Join(errs...)}
}

type dialed struct {
	conn    net.Conn
	err     error
	took    time.Duration   // to connect: about a round trip
	reserve <-chan net.Conn // gets another connection, if one comes
}

func (d *Dialer) dialEndpoint(ctx context.Context, endpoint string) dialed {
	addrs, err := resolve(ctx, endpoint)
	if err != nil {
		return dialed{err: err}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan dialed, len(addrs))
	failed := make([]chan struct{}, len(addrs))
	for i, to := range addrs {
		failed[i] = make(chan struct{})
		go func() {
			if i > 0 {
				select {
				case <-time.After(time.Duration(i) * stagger):
				case <-failed[i-1]:
				case <-ctx.Done():
				}
			}
			r := d.dialAddress(ctx, to)
			if r.err != nil {
				close(failed[i])
			}
			results <- r
		}()
	}
	var last error
	for n := range addrs {
		r := <-results // at the latest when ctx ends, and then with what it was
		if r.err == nil {
			go func() {
				for range addrs[n+1:] {
					if late := <-results; late.conn != nil {
						late.conn.Close()
					}
				}
			}()
			return r
		}
		if last == nil || !errors.Is(r.err, syscall.ENETUNREACH) { // no IPv6 here is no news
			last = r.err
		}
	}
	return dialed{err: last}
}

// deliver hands a result over, or closes its connection when nobody waits any more.
func deliver(ctx context.Context, to chan<- dialed, r dialed) {
	select {
	case to <- r:
	case <-ctx.Done():
		if r.conn != nil {
			r.conn.Close()
		}
	}
}

func resolve(ctx context.Context, endpoint string) ([]netip.AddrPort, error) {
	host, port, err := splitEndpoint(endpoint)
	if err != nil {
		return nil, err
	}
	addrs := []netip.Addr{}
	if a, err := netip.ParseAddr(host); err == nil {
		addrs = append(addrs, a)
	} else if addrs, err = net.DefaultResolver.LookupNetIP(ctx, "ip", host); err != nil {
		return nil, fmt.Errorf("the name does not resolve: %w", err)
	}
	// The resolver sorts by RFC 6724; alternate the families from there on.
	var same, other, out []netip.AddrPort
	for _, a := range addrs {
		a = a.Unmap()
		if a.Is4() == addrs[0].Unmap().Is4() {
			same = append(same, netip.AddrPortFrom(a, port))
		} else {
			other = append(other, netip.AddrPortFrom(a, port))
		}
	}
	for i := range max(len(same), len(other)) {
		out = append(out, same[min(i, len(same)):min(i+1, len(same))]...)
		out = append(out, other[min(i, len(other)):min(i+1, len(other))]...)
	}
	return out[:min(len(out), maxAddresses)], nil
}

// dialAddress races connects against a token, and against the sequence where the token brings nothing.
func (d *Dialer) dialAddress(ctx context.Context, to netip.AddrPort) (first dialed) {
	tunnel := netip.AddrPortFrom(to.Addr(), d.Profile.TunnelPort)
	udp, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(tunnel)) // sends nothing: asks the route for the source
	if err != nil {
		return dialed{err: err}
	}
	defer udp.Close()
	source := udp.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()

	noToken := d.sendToken(tunnel, udp)
	if noToken == nil {
		d.progress("knock sent")
	}
	if noToken != nil && !errors.Is(noToken, ErrNoTokens) {
		d.progress("no token knock (" + noToken.Error() + ")")
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	connecting, enough := ctx, cancel // of attempts that were made; cancel ends those to come
	if d.spare != nil {
		connecting, enough = context.WithCancel(d.spare)
	}
	defer func() {
		if first.reserve == nil {
			enough()
		}
	}()
	results := make(chan dialed)
	spent := make(chan struct{}) // closed when all knocks are out, and have had time to open
	go func() {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0)), Control: impatient}
		attempt := func() {
			if ctx.Err() != nil {
				return
			}
			began := time.Now()
			conn, err := dialer.DialContext(connecting, "tcp", to.String())
			deliver(connecting, results, dialed{conn: conn, err: err, took: time.Since(began)})
		}
		burst := func(knocked time.Time) {
			for i, at := range attempts {
				if !sleepUntil(ctx, knocked.Add(at)) {
					return
				}
				if i >= repeatFrom && noToken == nil && d.sendToken(tunnel, udp) == nil && !sleepUntil(ctx, time.Now().Add(attempts[0])) {
					return
				}
				go attempt()
			}
		}
		knocked := time.Now()
		// A token that is lost is unspent, and one that is late is refused the second time: the same goes out again.
		repeat := func() {
			if ctx.Err() == nil && !errors.Is(noToken, ErrNoTokens) && d.sendToken(tunnel, udp) == nil {
				sleepUntil(ctx, time.Now().Add(attempts[0]))
			}
			go attempt()
		}
		if noToken == nil || len(d.Profile.typed.sequence) == 0 {
			burst(knocked)
			sleepUntil(ctx, knocked.Add(patience))
			repeat()
		} else {
			go attempt() // the door may be open from before; a packet to the gate disturbs no sequence
		}
		if len(d.Profile.typed.sequence) > 0 && ctx.Err() == nil {
			d.progress("sequence knocked")
			if knock.Send(ctx, source, to.Addr(), d.Profile.typed.sequence, knock.Gap) == nil {
				knocked = time.Now()
				burst(knocked)
				sleepUntil(ctx, knocked.Add(patience))
			}
		}
		close(spent)
		for next := time.Now().Add(again); sleepUntil(ctx, next); next = next.Add(again) {
			repeat()
		}
	}()

	var last error
	var hopeless <-chan struct{} // of spent, once a connect was refused
	for {
		select {
		case r := <-results:
			if r.err == nil {
				cancel() // no token more: the next would be another
				d.Tokens.Answered()
				d.progress("gate open")
				if d.spare != nil {
					r.reserve = reserve(d.spare, enough, results)
				}
				return r
			}
			if ctx.Err() == nil {
				last = r.err
			}
			if errors.Is(last, syscall.ECONNREFUSED) {
				hopeless = spent
			}
		case <-hopeless:
			return dialed{err: fmt.Errorf("%w after all knocks: they opened nothing, or the gate is not running: ask the operator", syscall.ECONNREFUSED)}
		case <-ctx.Done():
			if noToken != nil && len(d.Profile.typed.sequence) == 0 {
				return dialed{err: noToken}
			}
			if errors.Is(noToken, syscall.EPERM) {
				last = noToken
			}
			return dialed{err: d.silence(last)}
		}
	}
}

func (d *Dialer) sendToken(to netip.AddrPort, own *net.UDPConn) error {
	token, err := d.Tokens.Repeated(to.Addr(), d.now())
	if err != nil {
		return err
	}
	if d.SendToken != nil {
		err = d.SendToken(token[:], to)
	} else {
		_, err = own.Write(token[:])
	}
	return ExplainSend(err)
}

// ExplainSend says what lies behind a packet that this machine itself does not let out.
func ExplainSend(err error) error {
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("a firewall on this machine drops the knock: let UDP out to the bastion: %w", err)
	}
	return err
}

// silence says what most often lies behind a door that does not answer.
func (d *Dialer) silence(cause error) error {
	var sent []string
	if len(d.Profile.typed.secret) > 0 {
		sent = append(sent, fmt.Sprintf("a token to UDP port %d (good for about %v around the gate's time; it is %s here)",
			d.Profile.TunnelPort, d.Profile.typed.step, d.now().Format("15:04:05 MST")))
	}
	if len(d.Profile.typed.sequence) > 0 {
		sent = append(sent, "the sequence")
	}
	if len(sent) == 0 {
		sent = append(sent, "no knock, since the profile has none")
	}
	text := "no answer after " + strings.Join(sent, " and ") +
		": this clock may be off, a network on the way may block these ports, or the profile is revoked or replaced: " +
		"`vpn doctor` finds out which"
	if cause != nil {
		return fmt.Errorf("%s (%w)", text, cause)
	}
	return errors.New(text)
}

// sleepUntil returns false when ctx ended first.
func sleepUntil(ctx context.Context, at time.Time) bool {
	select {
	case <-time.After(time.Until(at)):
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
