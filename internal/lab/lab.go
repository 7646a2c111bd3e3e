//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Options says how a lab differs from the plain one. The zero value is a lab with cables without delay.
type Options struct {
	LongLink        bool          // the client's cable is a Link, which can delay, drop and show packets
	Delay           time.Duration // one way, so a round trip takes twice as long; above zero it implies LongLink
	QueuePackets    int           // of the Link, in each direction; 0: 16384, over 100 ms of 1 Gb/s in full packets
	RouteViaBastion bool          // client and cloud route to each other through a forwarding bastion: what must be refused
}

// Lab is the machine room. Its methods may be called from several goroutines.
type Lab struct {
	Name                   string // perimeter-lab-PID-N
	Dir                    string // for files that last as long as the lab; readable by all, so that clients without root can read
	Client, Bastion, Cloud *Namespace
	Stranger, Stranger6    netip.Addr // the client's second address, for someone who has not knocked
	Egress                 netip.Addr // the bastion's second address towards the cloud
	Link                   *Link      // the client's cable; nil without Options.LongLink

	internet *Namespace // the bridge that joins client, bastion and added hosts

	mu        sync.Mutex
	hosts     int
	spaces    []*Namespace
	servers   []func() error
	stopWatch func() bool // of New's context
	closed    bool

	closing  sync.Once
	closeErr error
}

// TB is what Start needs of a testing.TB.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Start is New for a test: the lab closes when the test ends, and on SIGINT and SIGTERM, which then take their effect.
func Start(t TB, o Options) *Lab {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	built, ended := make(chan struct{}), make(chan struct{})
	var l *Lab
	go func() {
		defer signal.Stop(signals)
		select {
		case s := <-signals:
			cancel()
			<-built
			if l != nil {
				l.Close()
			}
			// Each lab of this process does the same; the last one to stop listening lets the signal through.
			signal.Stop(signals)
			syscall.Kill(os.Getpid(), s.(syscall.Signal))
		case <-ended:
		}
	}()
	t.Cleanup(func() {
		close(ended)
		cancel()
		if l == nil {
			return
		}
		if err := l.Close(); err != nil {
			t.Errorf("lab: %v", err)
		}
	})
	var err error
	l, err = New(ctx, o)
	close(built)
	if err != nil {
		t.Fatalf("lab: %v", err)
	}
	return l
}

// New sweeps what killed labs left and builds a lab, which closes when ctx ends; a program passes a context that ends on
// signals. If it fails, nothing is left.
func New(ctx context.Context, o Options) (_ *Lab, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab makes network namespaces, which takes root: run it with sudo")
	}
	if o.Delay < 0 || o.QueuePackets < 0 {
		return nil, fmt.Errorf("lab: delay %v and queue %d: neither can be negative", o.Delay, o.QueuePackets)
	}
	if err := sweep(); err != nil {
		return nil, fmt.Errorf("sweep what killed labs left: %w", err)
	}
	l := &Lab{
		Stranger:  netip.MustParseAddr("198.18.1.3"),
		Stranger6: netip.MustParseAddr("2001:db8:18:1::3"),
		Egress:    netip.MustParseAddr("198.19.1.10"),
	}
	if l.Name, l.Dir, err = claim(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if err := l.build(ctx, o); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopWatch = context.AfterFunc(ctx, func() { l.Close() })
	return l, nil
}

func (l *Lab) build(ctx context.Context, o Options) error {
	var err error
	if l.internet, err = l.add(ctx, "internet", "", ""); err != nil {
		return err
	}
	if l.Client, err = l.add(ctx, "client", "198.18.1.2", "2001:db8:18:1::2"); err != nil {
		return err
	}
	if l.Bastion, err = l.add(ctx, "bastion", "198.18.1.1", "2001:db8:18:1::1"); err != nil {
		return err
	}
	if l.Cloud, err = l.add(ctx, "cloud", "198.19.1.2", "2001:db8:19:1::2"); err != nil {
		return err
	}
	// Snooping would learn who listens to which multicast, a second too late for neighbour discovery.
	if err := l.internet.ip(ctx, `
		link add bridge type bridge forward_delay 0 stp_state 0 mcast_snooping 0
		link set bridge up`); err != nil {
		return err
	}
	// Frames across the bridge are nobody's business but the hosts' own: no firewall hooks, no conntrack there.
	for _, k := range []string{"iptables", "ip6tables", "arptables"} {
		if err := l.internet.Sysctl("net.bridge.bridge-nf-call-"+k, "0"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if o.LongLink || o.Delay > 0 {
		if l.Link, err = newLink(l.Client, l.internet, o.Delay, o.QueuePackets); err != nil {
			return err
		}
		if err := l.internet.ip(ctx, "link set client txqueuelen 10000 master bridge up"); err != nil {
			return err
		}
		if err := l.Client.ip(ctx, "link set outside txqueuelen 10000"); err != nil {
			return err
		}
	} else if err := l.plug(ctx, l.Client, "client"); err != nil {
		return err
	}
	if err := l.plug(ctx, l.Bastion, "bastion"); err != nil {
		return err
	}
	if err := l.Bastion.ip(ctx, "link add egress type veth peer name eth0 netns "+l.Cloud.Name); err != nil {
		return err
	}
	for _, step := range []struct {
		ns     *Namespace
		script string
	}{
		{l.Client, `
			addr add 198.18.1.2/24 dev outside
			addr add 198.18.1.3/24 dev outside
			addr add 2001:db8:18:1::2/64 dev outside
			addr add 2001:db8:18:1::3/64 dev outside
			link set outside up`},
		// The wider route lets Strangers have thousands of addresses.
		{l.Bastion, `
			addr add 198.18.1.1/24 dev outside
			addr add 2001:db8:18:1::1/64 dev outside
			link set outside up
			route add 198.18.0.0/16 dev outside
			addr add 198.19.1.1/24 dev egress
			addr add 198.19.1.10/24 dev egress
			addr add 2001:db8:19:1::1/64 dev egress
			addr add 2001:db8:19:1::10/64 dev egress
			link set egress up`},
		{l.Cloud, `
			addr add 198.19.1.2/24 dev eth0
			addr add 2001:db8:19:1::2/64 dev eth0
			link set eth0 up`},
	} {
		if err := step.ns.ip(ctx, step.script); err != nil {
			return err
		}
	}
	for _, ns := range []*Namespace{l.Client, l.Bastion, l.Cloud} {
		if err := ns.awaitAddresses(ctx); err != nil {
			return err
		}
	}
	if !o.RouteViaBastion {
		return nil
	}
	for _, err := range []error{
		l.Client.ip(ctx, "route add 198.19.1.0/24 via 198.18.1.1\nroute add 2001:db8:19:1::/64 via 2001:db8:18:1::1"),
		l.Cloud.ip(ctx, "route add 198.18.0.0/16 via 198.19.1.1\nroute add 2001:db8:18:1::/64 via 2001:db8:19:1::1"),
		l.Bastion.Sysctl("net.ipv4.ip_forward", "1"),
		l.Bastion.Sysctl("net.ipv6.conf.all.forwarding", "1"),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

// plug joins ns to the bridge with a cable: outside at its own end, port at the bridge's.
func (l *Lab) plug(ctx context.Context, ns *Namespace, port string) error {
	return l.internet.ip(ctx, "link add "+port+" type veth peer name outside netns "+ns.Name+
		"\nlink set "+port+" master bridge up")
}

var hostName = regexp.MustCompile(`^[a-z][a-z0-9]{0,13}$`)

// AddHost puts one more machine on the outside segment, with its own MAC address and the next free addresses from
// 198.18.1.20 and 2001:db8:18:1::14. Its name is up to 14 lower-case letters and digits.
func (l *Lab) AddHost(ctx context.Context, name string) (*Namespace, error) {
	if !hostName.MatchString(name) || name == "bridge" {
		return nil, fmt.Errorf("lab host %q: a name is 1 to 14 lower-case letters and digits, and not bridge", name)
	}
	l.mu.Lock()
	n := 20 + l.hosts
	l.hosts++
	l.mu.Unlock()
	if n > 250 {
		return nil, fmt.Errorf("lab host %q: the segment holds 231 added hosts; take Strangers for more addresses", name)
	}
	h, err := l.add(ctx, name, fmt.Sprintf("198.18.1.%d", n), fmt.Sprintf("2001:db8:18:1::%x", n))
	if err != nil {
		return nil, err
	}
	if err := l.plug(ctx, h, name); err != nil {
		return nil, err
	}
	return h, h.ip(ctx, fmt.Sprintf("addr add %v/24 dev outside\naddr add %v/64 dev outside\nlink set outside up", h.Addr, h.Addr6))
}

// Strangers gives the client n addresses besides its own, 198.18.64.0 and on, at most 16384.
func (l *Lab) Strangers(ctx context.Context, n int) ([]netip.Addr, error) {
	if n < 0 || n > 1<<14 {
		return nil, fmt.Errorf("lab: %d strangers: there are addresses for 0 to %d", n, 1<<14)
	}
	addrs := make([]netip.Addr, 0, n)
	var script strings.Builder
	for a := netip.MustParseAddr("198.18.64.0"); len(addrs) < n; a = a.Next() {
		addrs = append(addrs, a)
		fmt.Fprintf(&script, "addr replace %v/32 dev outside\n", a)
	}
	return addrs, l.Client.ip(ctx, script.String())
}

// add makes the namespace of one host and remembers it for Close.
func (l *Lab) add(ctx context.Context, host, addr, addr6 string) (*Namespace, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, fmt.Errorf("lab %s is closed", l.Name)
	}
	ns, err := newNamespace(ctx, l.Name+"-"+host)
	if err != nil {
		return nil, err
	}
	l.spaces = append(l.spaces, ns)
	if addr != "" {
		ns.Addr, ns.Addr6 = netip.MustParseAddr(addr), netip.MustParseAddr(addr6)
	}
	return ns, nil
}

// onClose has stop called by Close; at once, if the lab is already closed.
func (l *Lab) onClose(stop func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.Join(fmt.Errorf("lab %s is closed", l.Name), stop())
	}
	l.servers = append(l.servers, stop)
	return nil
}

// Close kills every process inside the lab, those started by hand included, and removes all of it. It may be called
// more than once, and returns only when all is gone.
func (l *Lab) Close() error {
	l.closing.Do(func() {
		l.mu.Lock()
		l.closed = true
		spaces, servers, stopWatch := l.spaces, l.servers, l.stopWatch
		l.mu.Unlock()
		if stopWatch != nil {
			stopWatch()
		}
		var errs []error
		for _, ns := range spaces {
			errs = append(errs, ns.stop())
		}
		for _, stop := range servers {
			errs = append(errs, stop())
		}
		if l.Link != nil {
			l.Link.close()
		}
		for _, ns := range spaces {
			errs = append(errs, ns.file.Close())
		}
		l.closeErr = errors.Join(append(errs, remove(l.Name))...)
	})
	return l.closeErr
}
