//go:build linux

package container

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"perimeterd/internal/lab"
)

// probers ask for what should not answer, from alice's address and a stranger's, in both versions of IP, until they are stopped: the gate,
// the proxy, the console, a port where nothing listens, and SSH's, which the configuration lets in and where nothing listens either. The
// machine need not be there yet: they know its hardware's address.
type probers struct {
	end context.CancelFunc
	all sync.WaitGroup
	tcp []*lab.Prober

	mu        sync.Mutex
	err       error
	datagrams int
}

func (i *installation) probe() *probers {
	i.t.Helper()
	ctx, cancel := context.WithCancel(i.ctx)
	p := &probers{end: cancel}
	i.t.Cleanup(func() {
		p.stop()
		if p.err != nil {
			i.t.Error(p.err)
		}
	})
	for _, at := range []struct {
		to   netip.Addr
		from []netip.Addr
		echo []byte // request, for a raw socket (RFC 792; the kernel fills in the checksum of RFC 4443)
		icmp string
	}{
		{i.Bastion.Addr, []netip.Addr{i.Client.Addr, i.Stranger}, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}, "ip4:icmp"},
		{i.Bastion.Addr6, []netip.Addr{i.Client.Addr6, i.Stranger6}, []byte{128, 0, 0, 0, 0, 0, 0, 0}, "ip6:ipv6-icmp"},
	} {
		if out, err := i.Client.Command(ctx, "ip", "neighbour", "replace", at.to.String(), "lladdr", outsideMAC, "dev", "outside", "nud", "permanent").CombinedOutput(); err != nil {
			i.t.Fatalf("ip neighbour: %v %s", err, out)
		}
		for _, port := range []uint16{1194, 3128, 80, 9, 22} {
			prober := i.Prober(i.Client, at.to, port, at.from...)
			prober.Workers, prober.Pace = 1, 25*time.Millisecond
			p.tcp = append(p.tcp, prober)
			p.all.Go(func() { p.fail(prober.Run(ctx)) })
		}
		datagram := func(port uint16, payload []byte) {
			conn, err := i.Client.DialFrom(ctx, at.from[1], "udp", netip.AddrPortFrom(at.to, port).String())
			if err != nil {
				i.t.Fatal(err)
			}
			p.all.Go(func() { p.repeat(ctx, conn, payload) })
		}
		// As long as a token, as a handshake of WireGuard, and neither.
		datagram(1194, make([]byte, 16))
		datagram(1194, append([]byte{1, 0, 0, 0}, make([]byte, 144)...))
		datagram(9, []byte("knock"))
		echo, err := i.Client.ListenPacket(at.icmp, at.from[1].String())
		if err != nil {
			i.t.Fatal(err)
		}
		p.all.Go(func() { p.repeat(ctx, to{echo, &net.IPAddr{IP: at.to.AsSlice()}}, at.echo) })
	}
	return p
}

// to is a connection of datagrams to one address.
type to struct {
	net.PacketConn
	addr net.Addr
}

func (t to) Write(b []byte) (int, error) { return t.WriteTo(b, t.addr) }

// repeat sends a datagram each 25 ms. That a port is unreachable is told to the sender of the next one, and is the witness' to judge.
func (p *probers) repeat(ctx context.Context, conn interface {
	Write([]byte) (int, error)
	Close() error
}, payload []byte) {
	defer conn.Close()
	pace := time.NewTicker(25 * time.Millisecond)
	defer pace.Stop()
	for ctx.Err() == nil {
		if _, err := conn.Write(payload); err == nil {
			p.mu.Lock()
			p.datagrams++
			p.mu.Unlock()
		}
		select {
		case <-pace.C:
		case <-ctx.Done():
		}
	}
}

func (p *probers) stop() {
	p.end()
	p.all.Wait()
}

func (p *probers) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = cmp.Or(p.err, err)
}

// sent is how many connections were tried and datagrams sent so far.
func (p *probers) sent() (tried, datagrams int) {
	for _, prober := range p.tcp {
		tried += prober.Tally().Total()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return tried, p.datagrams
}

func (i *installation) witness() *witness {
	i.t.Helper()
	w, err := newWitness(i.Bastion, "vm-outside")
	if err != nil {
		i.t.Fatal(err)
	}
	i.t.Cleanup(func() {
		if err := w.Close(); err != nil {
			i.t.Error(err)
		}
	})
	return w
}

// What a host answers to the probes that has no door: of closed ports a reset or an error, and echoes.
var answersWithoutDoor = []string{
	"tcp4/1194 RA", "tcp4/3128 RA", "tcp4/80 RA", "tcp4/9 RA", "tcp4/22 RA", "icmp4 3/3", "icmp4 0/0",
	"tcp6/1194 RA", "tcp6/3128 RA", "tcp6/80 RA", "tcp6/9 RA", "tcp6/22 RA", "icmp6 1/4", "icmp6 129/0",
}

// doorless boots the machine without the units that close the door: the witness sees an answer to each probe.
func (i *installation) doorless() {
	i.vpn("down")
	i.ok("sed", "-i", `s|^backend .*|backend = "kernel"|; s|^mode  *= "guard"|mode = "host"|`, "/etc/perimeterd/perimeterd.toml")
	i.checked()
	i.ok("systemctl", "disable", "perimeterd.service") // and those that come with it
	if err := i.m.(*vm).Reboot(i.ctx); err != nil {
		i.t.Fatal(err)
	}
	for _, unit := range []string{"perimeterd.service", "perimeterd-early.service"} {
		i.fails("systemctl", "is-active", unit)
	}
	w, p := i.witness(), i.probe()
	i.eventually("each probe is answered", func() error {
		seen := w.seen()
		for _, kind := range answersWithoutDoor {
			if seen[kind] == 0 {
				return fmt.Errorf("no %s of %v", kind, seen)
			}
		}
		return nil
	})
	tried, datagrams := p.sent()
	i.t.Logf("of %d connections and %d datagrams: %v", tried, datagrams, w.seen())
}

// closedFromTheFirst boots it with them, after its power went, under the same probes.
func (i *installation) closedFromTheFirst() {
	i.ok("systemctl", "enable", "perimeterd.service")
	i.ok("sync")
	i.powerOff()
	w, p := i.witness(), i.probe()
	i.powerOn()
	silent := func() error {
		seen := w.seen()
		for _, kind := range []string{"tcp4/22 RA", "tcp6/22 RA"} { // allowed
			if seen[kind] == 0 {
				return fmt.Errorf("no %s of %v", kind, seen)
			}
			delete(seen, kind)
		}
		if len(seen) > 0 {
			return fatal{fmt.Errorf("it answered: %v", seen)}
		}
		return nil
	}
	i.eventually("only what is allowed is answered", silent)
	up, _ := p.sent()
	i.eventually("as many probes again as while it booted", func() error {
		if tried, _ := p.sent(); tried < up+1000 {
			return fmt.Errorf("%d connections were tried, %d of them by the time it was up", tried, up)
		}
		return silent()
	})
	tried, datagrams := p.sent()
	i.t.Logf("of %d connections and %d datagrams: %v", tried, datagrams, w.seen())
	i.t.Logf("since the kernel began: the door was closed after %v, the network was let up after %v, the daemon was ready after %v",
		i.moment("perimeterd-early.service", "ActiveEnterTimestampMonotonic"), i.moment("network-pre.target", "ActiveEnterTimestampMonotonic"),
		i.moment("perimeterd.service", "ActiveEnterTimestampMonotonic"))
	i.t.Log(strings.TrimSpace(i.ok("systemd-analyze", "time")))
	i.figures()

	p.stop() // from alice's address they would break her sequence, which opens: tokens of before the boot do not
	if out, err := i.alice.Knock(i.ctx).CombinedOutput(); err != nil {
		i.t.Fatalf("knock: %v\n%s", err, out)
	}
	i.vpn("up")
	i.fetch()
	i.want(i.ok("ip", "-details", "link", "show", "perimeter0"), "wireguard")
	i.want(i.ok("lsmod"), "wireguard")
	if seen := w.seen(); seen["tcp4/1194 SA"] == 0 || seen["udp4/1194"] == 0 {
		i.t.Errorf("the witness saw no gate and no tunnel of alice's: %v", seen)
	}
}
