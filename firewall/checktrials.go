package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

func (b *bench) silent(context.Context) (string, error) {
	if b.tun.answers(b.syn(guest(2))) {
		return "", errors.New("the gate answers a stranger")
	}
	return "the gate answers no stranger", nil
}

func benchToken(n byte) knock.Token { return knock.Token{n, 'c', 'h', 'e', 'c', 'k'} }

func (b *bench) token(context.Context) (string, error) {
	expires := time.Now().Add(time.Minute)
	var tokens []Token
	for n := byte(1); n <= 5; n++ {
		tokens = append(tokens, Token{benchToken(n), 7, expires})
	}
	if err := b.fw.AddTokens(tokens); err != nil {
		return "", err
	}
	if err := b.knockFrom(guest(3), benchToken(1)); err != nil {
		return "", err
	}
	if err := b.opened(guest(3), false, 7); err != nil {
		return "", err
	}
	select {
	case o := <-b.openings:
		if o.Source != guest(3) || o.Credential != 7 || o.Token != benchToken(1) {
			return "", fmt.Errorf("the log says %+v of a token of credential 7 from %v", o, guest(3))
		}
	case <-time.After(patience):
		return "", errors.New("the log does not report it")
	}
	return "opens, and the log says whose it was", nil
}

func (b *bench) knockFrom(from netip.Addr, t knock.Token) error {
	to := benchHost
	if from.Is6() {
		to = benchHost6
	}
	return b.tun.send(udpPacket(from, to, 40000, b.cfg.TunnelPort, t[:]))
}

// opened is nil when the kernel has the window. The packet was judged before its write returned.
func (b *bench) opened(from netip.Addr, sequence bool, credential uint32) error {
	windows, err := b.fw.Windows()
	if err != nil {
		return err
	}
	for _, w := range windows {
		if w.Source == from && w.Sequence == sequence && w.Credential == credential {
			return nil
		}
	}
	return errNoWindow
}

var errNoWindow = errors.New("opens no window")

// shut is nil when the source has no window.
func (b *bench) shut(from netip.Addr, what string) (string, error) {
	windows, err := b.fw.Windows()
	if err == nil && slices.ContainsFunc(windows, func(w Window) bool { return w.Source == from }) {
		err = errors.New("opens a window")
	}
	return what, err
}

func (b *bench) replay(context.Context) (string, error) {
	if err := b.knockFrom(guest(4), benchToken(1)); err != nil {
		return "", err
	}
	return b.shut(guest(4), "refused")
}

func (b *bench) wrong(context.Context) (string, error) {
	if err := b.knockFrom(guest(5), benchToken(99)); err != nil {
		return "", err
	}
	return b.shut(guest(5), "refused")
}

func (b *bench) accept(context.Context) (string, error) {
	for _, n := range []byte{2, 4, 5} { // on a busy machine the short window may be over before the SYN
		if err := b.knockFrom(guest(6), benchToken(n)); err != nil {
			return "", err
		}
		p := b.syn(guest(6))
		if !b.tun.answers(p) {
			continue
		}
		if err := p.establish(); err != nil {
			return "", err
		}
		b.conn = p
		return "answers whoever knocked", nil
	}
	return "", errors.New("the gate does not answer whoever knocked")
}

func (b *bench) sequence(context.Context) (string, error) {
	for i, p := range b.cfg.Sequences[0].Ports {
		if err := b.hit(guest(7), p, uint16(41000+i)); err != nil {
			return "", err
		}
	}
	return "opens", b.opened(guest(7), true, 9)
}

func (b *bench) hit(from netip.Addr, p knock.Port, source uint16) error {
	if p.Proto == knock.UDP {
		return b.tun.send(udpPacket(from, benchHost, source, p.Number, nil))
	}
	return b.tun.send(tcpPacket(from, benchHost, source, p.Number, 1000, 0, flagSYN, nil))
}

func (b *bench) disorder(context.Context) (string, error) {
	ports := slices.Clone(b.cfg.Sequences[0].Ports)
	slices.Reverse(ports)
	for i, p := range ports {
		if err := b.hit(guest(8), p, uint16(42000+i)); err != nil {
			return "", err
		}
	}
	return b.shut(guest(8), "refused")
}

// expiry waits for the windows that opened last.
func (b *bench) expiry(ctx context.Context) (string, error) {
	for deadline := time.Now().Add(benchWindow + patience); ; {
		windows, err := b.fw.Windows()
		switch {
		case err != nil:
			return "", err
		case len(windows) == 0:
			return "the kernel closes it on time", nil
		case time.Now().After(deadline):
			return "", fmt.Errorf("a window of %v is open after %v", benchWindow, benchWindow+patience)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// established comes when all windows are closed.
func (b *bench) established(context.Context) (string, error) {
	if b.conn == nil {
		return "", errors.New("not tried, since the gate took no connection")
	}
	b.gate.SetDeadline(time.Now().Add(patience))
	c, err := b.gate.Accept()
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := b.conn.data("still here"); err != nil {
		return "", err
	}
	c.SetDeadline(time.Now().Add(patience))
	text := make([]byte, 64)
	if n, err := c.Read(text); err != nil || string(text[:n]) != "still here" {
		return "", fmt.Errorf("a connection breaks when its window closes: read %q: %w", text[:n], err)
	}
	return "outlive the window", nil
}

func (b *bench) token6(context.Context) (string, error) {
	from := netip.MustParseAddr("2001:db8::2")
	if err := b.knockFrom(from, benchToken(3)); err != nil {
		return "", err
	}
	return "opens", b.opened(from, false, 7)
}

// ownership tries what an owner is for: others cannot delete the table, and it outlives its owner.
func (b *bench) ownership(context.Context) (string, error) {
	if !b.fw.Owned() {
		return "no: another tool can flush the table; the daemon watches and repairs it (kernel 6.9 and newer has it)", nil
	}
	other, err := nftables.New(nftables.WithNetNSFd(b.netns))
	if err != nil {
		return "", err
	}
	other.DelTable(newTable())
	if err := other.Flush(); err == nil {
		return "", errors.New("the kernel lets others delete an owned table")
	}
	b.fw.mu.Lock()
	b.fw.dropLocked() // as when the daemon dies
	_, there, err := b.fw.tableFlagsLocked()
	b.fw.mu.Unlock()
	if err == nil && !there {
		err = errors.New("the table does not outlive its owner")
	}
	return "yes: no other tool can flush the table, and it outlives the daemon", err
}

func (b *bench) bindNoPort(context.Context) (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return "", err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: benchHost.As4()}); err != nil {
		return "", err
	}
	name, err := unix.Getsockname(fd)
	if a, ok := name.(*unix.SockaddrInet4); err == nil && (!ok || a.Port != 0) {
		err = errors.New("binding an address takes a port")
	}
	return "a bound address takes no port before it connects", err
}
