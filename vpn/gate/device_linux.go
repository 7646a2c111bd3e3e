package gate

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// OpenTUN makes the tunnel device, or takes it up again: it is persistent, so index, address and other processes'
// connections live through a restart of the daemon. `ip link delete` removes it for good. One of the kernel's WireGuard is removed.
func OpenTUN(cfg Config) (tun.Device, error) {
	if err := removeUnless("tuntap", cfg.Interface); err != nil {
		return nil, err
	}
	dev, err := tun.CreateTUN(cfg.Interface, cfg.MTU)
	if err != nil {
		return nil, fmt.Errorf("tunnel.interface %q: %w: is /dev/net/tun there, and is another daemon using the name?", cfg.Interface, err)
	}
	fail := func(err error) (tun.Device, error) {
		dev.Close()
		return nil, fmt.Errorf("tunnel.interface %q: %w", cfg.Interface, err)
	}
	// SyscallConn, not Fd: Fd would make the shared descriptor blocking, and stopping would hang.
	raw, err := dev.File().SyscallConn()
	if err != nil {
		return fail(fmt.Errorf("descriptor: %w", err))
	}
	var ioctl error
	if err := raw.Control(func(fd uintptr) { ioctl = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1) }); err != nil || ioctl != nil {
		return fail(fmt.Errorf("make it persistent: %v %v", err, ioctl))
	}
	if err := addressed(cfg); err != nil {
		return fail(err)
	}
	return dev, nil
}

// removeUnless removes a link of that name that is of another type, as the other backend left it.
func removeUnless(kind, name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil && link.Type() != kind && (link.Type() == "tuntap" || link.Type() == "wireguard") {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("tunnel.interface %q: take away what another tunnel.backend left: %w", name, err)
	}
	return nil
}

// addressed gives the device the server's address, and brings it up.
func addressed(cfg Config) error {
	link, err := netlink.LinkByName(cfg.Interface)
	if err != nil {
		return err
	}
	server := cfg.Network.Masked().Addr().Next()
	address := &netlink.Addr{IPNet: &net.IPNet{IP: server.AsSlice(), Mask: net.CIDRMask(cfg.Network.Bits(), 32)}}
	if err := netlink.AddrReplace(link, address); err != nil {
		return fmt.Errorf("give it the address %v: %w", address.IPNet, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	return nil
}
