package firewall

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Connections lists the clients that had TCP connections to an address of this host, as the kernel tracks them: those whose
// process died are known for ten seconds more.
func (f *Firewall) Connections(to netip.AddrPort) (list []netip.AddrPort, err error) {
	h, err := f.conntrack()
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

func (f *Firewall) conntrack() (h *netlink.Handle, err error) {
	if f.netns == 0 {
		h, err = netlink.NewHandle(unix.NETLINK_NETFILTER)
	} else {
		h, err = netlink.NewHandleAt(netns.NsHandle(f.netns), unix.NETLINK_NETFILTER)
	}
	if err != nil {
		return nil, fmt.Errorf("netlink socket to conntrack: %w", err)
	}
	return h, nil
}
