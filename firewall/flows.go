package firewall

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// departed is what was taken out of the table, and what the kernel still tracks of it: a flow that is established passes
// without an element.
type departed struct {
	addresses map[netip.Addr]bool // of sessions; true: other services of the host than ours were within its reach
	endpoints map[netip.AddrPort]bool
	signal    chan struct{}
}

func newDeparted() departed {
	return departed{map[netip.Addr]bool{}, map[netip.AddrPort]bool{}, make(chan struct{}, 1)}
}

func (d *departed) wake() {
	select {
	case d.signal <- struct{}{}:
	default:
	}
}

// flowPause is between two looks through the kernel's whole list of flows, for all that left meanwhile.
const flowPause = 300 * time.Millisecond

// Forget makes the kernel forget the flows of dismissed addresses and removed endpoints, and resets connections of other
// processes of the host to dismissed addresses, soon after each, until ctx ends. It is apart from the change of the table, which
// ends a session at once: the kernel gives all its flows or none, and with a hundred thousand that takes a while.
func (f *Firewall) Forget(ctx context.Context) error {
	failed := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.gone.signal:
		}
		err := f.forget()
		if err != nil && err.Error() != failed {
			f.log.Warn("flows of ended sessions are still tracked", "err", err)
		}
		failed = ""
		if err != nil {
			failed = err.Error()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(flowPause):
		}
	}
}

func (f *Firewall) forget() error {
	f.mu.Lock()
	gone := departed{addresses: f.gone.addresses, endpoints: f.gone.endpoints}
	f.gone.addresses, f.gone.endpoints = map[netip.Addr]bool{}, map[netip.AddrPort]bool{}
	port := f.cfg.TunnelPort
	server := f.cfg.Server()
	f.mu.Unlock()
	h, err := f.netlink(unix.NETLINK_NETFILTER, unix.NETLINK_INET_DIAG)
	if err != nil {
		return err
	}
	defer h.Close()
	families := []netlink.InetFamily{unix.AF_INET}
	for e := range gone.endpoints {
		if e.Addr().Is6() {
			families = append(families, unix.AF_INET6)
			break
		}
	}
	var errs []error
	for _, family := range families {
		_, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, family, flows{gone, port})
		if errors.Is(err, netlink.ErrDumpInterrupted) { // the rest at the next look
			f.mu.Lock()
			maps.Copy(f.gone.addresses, gone.addresses)
			maps.Copy(f.gone.endpoints, gone.endpoints)
			f.mu.Unlock()
			f.gone.wake()
			err = nil
		}
		errs = append(errs, err)
	}
	f.mu.Lock()
	for a := range gone.addresses {
		if _, again := f.state.admitted[a]; again { // its owner came back
			delete(gone.addresses, a)
		}
	}
	f.mu.Unlock()
	return errors.Join(append(errs, resetAll(h, server, gone.addresses))...)
}

// flows matches what is tracked of those who left.
type flows struct {
	departed
	tunnelPort uint16
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (m flows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	t := &flow.Forward
	from, to := endpoint(t.SrcIP, t.SrcPort), endpoint(t.DstIP, t.DstPort)
	for _, a := range []netip.Addr{from.Addr(), to.Addr()} {
		if _, left := m.addresses[a]; left {
			return true
		}
	}
	// Either side may have begun.
	return t.Protocol == unix.IPPROTO_UDP && (m.endpoints[from] && to.Port() == m.tunnelPort || m.endpoints[to] && from.Port() == m.tunnelPort)
}

// resetAll ends the host's TCP connections to addresses whose reach went beyond our own sockets: they would live until their
// address has another owner.
func resetAll(h *netlink.Handle, server netip.Addr, addresses map[netip.Addr]bool) error {
	wide := false
	for _, w := range addresses {
		wide = wide || w
	}
	if !wide {
		return nil
	}
	sockets, err := h.SocketDiagTCP(unix.AF_INET)
	errs := []error{err}
	for _, s := range sockets {
		local, remote := endpoint(s.ID.Source, s.ID.SourcePort), endpoint(s.ID.Destination, s.ID.DestinationPort)
		if local.Addr() != server || !addresses[remote.Addr()] {
			continue
		}
		if err := h.SocketDestroy(net.TCPAddrFromAddrPort(local), net.TCPAddrFromAddrPort(remote)); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("reset the host's connection from %v to %v: %w", local, remote, err))
		}
	}
	return errors.Join(errs...)
}

// Connections lists the clients that had TCP connections to an address of this host, as the kernel tracks them: those whose
// process died are known for ten seconds more.
func (f *Firewall) Connections(to netip.AddrPort) (list []netip.AddrPort, err error) {
	h, err := f.netlink(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	flows, err := h.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list tracked connections: %w", err)
	}
	for _, flow := range flows {
		t := &flow.Forward
		if t.Protocol == unix.IPPROTO_TCP && endpoint(t.DstIP, t.DstPort) == to {
			list = append(list, endpoint(t.SrcIP, t.SrcPort))
		}
	}
	return list, nil
}

func endpoint(ip []byte, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

func (f *Firewall) netlink(families ...int) (h *netlink.Handle, err error) {
	if f.netns == 0 {
		h, err = netlink.NewHandle(families...)
	} else {
		h, err = netlink.NewHandleAt(netns.NsHandle(f.netns), families...)
	}
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return h, nil
}
