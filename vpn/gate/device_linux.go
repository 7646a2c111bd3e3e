package gate

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// OpenTUN makes the tunnel device, or takes it up again: it is persistent, so index, address and other processes'
// connections live through a restart of the daemon. `ip link delete` removes it for good.
func OpenTUN(cfg Config) (tun.Device, error) {
	dev, err := tun.CreateTUN(cfg.Interface, cfg.MTU)
	if err != nil {
		return nil, fmt.Errorf("tunnel.interface %q: %w: is /dev/net/tun there, and is another daemon using the name?", cfg.Interface, err)
	}
	fail := func(what string, err error) (tun.Device, error) {
		dev.Close()
		return nil, fmt.Errorf("tunnel.interface %q: %s: %w", cfg.Interface, what, err)
	}
	// SyscallConn, not Fd: Fd would make the shared descriptor blocking, and stopping would hang.
	raw, err := dev.File().SyscallConn()
	if err != nil {
		return fail("descriptor", err)
	}
	var ioctl error
	if err := raw.Control(func(fd uintptr) { ioctl = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1) }); err != nil || ioctl != nil {
		return fail("make it persistent", fmt.Errorf("%v %v", err, ioctl))
	}
	link, err := netlink.LinkByName(cfg.Interface)
	if err != nil {
		return fail("find it", err)
	}
	server := cfg.Network.Masked().Addr().Next()
	address := &netlink.Addr{IPNet: &net.IPNet{IP: server.AsSlice(), Mask: net.CIDRMask(cfg.Network.Bits(), 32)}}
	if err := netlink.AddrReplace(link, address); err != nil {
		return fail("give it the address "+address.IPNet.String(), err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fail("bring it up", err)
	}
	return dev, nil
}
