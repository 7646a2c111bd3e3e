package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// mayMakeDevice says whether this process may make a tunnel device. Where it may not, a netstack does.
func mayMakeDevice() bool {
	have, err := capabilities()
	if err != nil || have[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return false
	}
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	return err == nil && f.Close() == nil
}

// systemTUN is a Link of the operating system's: every process of the machine reaches the proxy through it.
type systemTUN struct {
	tun.Device
	address  netip.Addr
	mtu      int
	earliest atomic.Int32 // an earliness: what came of the last early connection
}

// NewSystemTUN makes a tunnel interface, named by the kernel. It has no address and no route yet: nothing goes there.
func NewSystemTUN() (Link, error) {
	d, err := tun.CreateTUN("pvpn%d", maxMTU)
	switch {
	case errors.Is(err, syscall.EPERM):
		err = fmt.Errorf("it needs CAP_NET_ADMIN: %w", err)
	case errors.Is(err, syscall.EACCES):
		err = fmt.Errorf("/dev/net/tun: %w: it is root's alone here, which udev would not do: sudo chmod 0666 /dev/net/tun", err)
	}
	if err != nil {
		return nil, fmt.Errorf("tunnel device: %w", err)
	}
	t := &systemTUN{Device: d}
	t.earliest.Store(int32(perhaps))
	return t, nil
}

// Configure gives the interface its address and MTU and one route: to the proxy. It touches no DNS and no default route.
func (d *systemTUN) Configure(address, proxy netip.Addr, mtu int, takeOver bool) error {
	name, err := d.Name()
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tunnel device %s: %w", name, err)
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("tunnel device %s: MTU %d: %w", name, mtu, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("tunnel device %s: %w", name, err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: host(address)}); err != nil {
		return fmt.Errorf("tunnel device %s: address %v: %w", name, address, err)
	}
	d.address, d.mtu = address, mtu
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(proxy), Src: address.AsSlice(), Scope: netlink.SCOPE_LINK}
	set := netlink.RouteAdd
	if takeOver {
		set = netlink.RouteReplace
	}
	if err := set(route); err != nil {
		if errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("route to the proxy %v: there is one already: another tunnel is up, take it down first: vpn down", proxy)
		}
		return fmt.Errorf("route to the proxy %v: %w", proxy, err)
	}
	return nil
}

// DialContext implements Link.
func (d *systemTUN) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.address, 0))}
	return dialer.DialContext(ctx, network, address)
}

func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}
