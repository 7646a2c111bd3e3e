package gate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"perimeterd/internal/session"
)

// kernel is the kernel's WireGuard, set by generic netlink (include/uapi/linux/wireguard.h). It takes handshakes by its own
// socket only and shows no packet, so with it there is no handshake in the first flight, no stream for who has no UDP, and no
// filter on its socket while the table is being repaired. Its peers outlive the daemon's death, with what they know of replays.
type kernel struct {
	name    string
	control *wgctrl.Client
	calls   atomic.Uint64
}

// NewKernelTunnel makes the device, or takes up that of an earlier run. The private key is the server's static one.
func NewKernelTunnel(cfg Config, private session.Key, door Door, log *slog.Logger) (*Tunnel, error) {
	k, err := openKernel(cfg, private)
	if err != nil {
		return nil, err
	}
	t := newTunnel(cfg, door, log)
	t.engine, t.count = k, k
	return t, nil
}

// OpenTunnel makes the tunnel by the backend of the configuration.
func OpenTunnel(cfg Config, private session.Key, door Door, log *slog.Logger) (*Tunnel, error) {
	if cfg.Kernel {
		return NewKernelTunnel(cfg, private, door, log)
	}
	dev, err := OpenTUN(cfg)
	if err != nil {
		return nil, err
	}
	return NewTunnel(cfg, private, dev, door, log)
}

// HasKernel tells whether the kernel has WireGuard, by making a device in a network namespace that goes with its thread.
func HasKernel() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- tryKernel()
	}()
	if err := <-done; err != nil {
		return fmt.Errorf(`this kernel makes no WireGuard device: %w: load its module by "modprobe wireguard", or write "userspace"`, err)
	}
	return nil
}

// tryName is a device's that is there for a moment.
const tryName = "perimeter-try"

// tryKernel leaves the thread in another namespace, unless it may make none, as the service may not: then the device is made here, and
// removed.
func tryKernel() error {
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	try := &netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: tryName}}
	if err := netlink.LinkAdd(try); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return netlink.LinkDel(try)
}

// HeldByUs tells whether a device of an earlier run, which the kernel keeps, has the UDP port.
func HeldByUs(cfg Config) bool {
	control, err := wgctrl.New()
	if err != nil {
		return false
	}
	defer control.Close()
	d, err := control.Device(cfg.Interface)
	return err == nil && d.Type == wgtypes.LinuxKernel && d.ListenPort == int(cfg.TunnelPort)
}

func openKernel(cfg Config, private session.Key) (_ *kernel, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf(`tunnel.backend "kernel": %w`, err)
		}
	}()
	if err := HasKernel(); err != nil { // before the other backend's device is taken away
		return nil, err
	}
	if err := removeUnless("wireguard", cfg.Interface); err != nil {
		return nil, err
	}
	err = netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: cfg.Interface}})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("tunnel.interface %q: %w", cfg.Interface, err)
	}
	link, err := netlink.LinkByName(cfg.Interface)
	if err != nil {
		return nil, fmt.Errorf("tunnel.interface %q: %w", cfg.Interface, err)
	}
	if link.Type() != "wireguard" {
		return nil, fmt.Errorf("tunnel.interface %q: there is one, of type %s: choose another name, or remove it", cfg.Interface, link.Type())
	}
	if err := netlink.LinkSetMTU(link, cfg.MTU); err != nil {
		return nil, fmt.Errorf("tunnel.mtu %d: %w", cfg.MTU, err)
	}
	control, err := wgctrl.New()
	if err != nil {
		return nil, err
	}
	k := &kernel{name: cfg.Interface, control: control}
	port := int(cfg.TunnelPort)
	// Before the link is up, so that a port that is taken is told here: tunnel.Resume brings the peers.
	err = control.ConfigureDevice(k.name, wgtypes.Config{PrivateKey: (*wgtypes.Key)(&private), ListenPort: &port})
	if err == nil {
		err = addressed(cfg)
	}
	if err != nil {
		control.Close()
		return nil, fmt.Errorf("tunnel.interface %q, tunnel.port %d: %w: does another program use it?", cfg.Interface, port, err)
	}
	return k, nil
}

// batch is how many peers go in one message of netlink; wgctrl splits none.
const batch = 64

func (k *kernel) add(list ...newcomer) error {
	there := map[session.Key]struct{}{} // whose endpoint the kernel knows better
	if slices.ContainsFunc(list, func(n newcomer) bool { return n.endpoint.IsValid() }) {
		device, err := k.control.Device(k.name)
		if err != nil {
			return err
		}
		for _, p := range device.Peers {
			there[session.Key(p.PublicKey)] = struct{}{}
		}
	}
	var config []wgtypes.PeerConfig
	for _, n := range list {
		_, known := there[n.PublicKey]
		shared := wgtypes.Key(n.PresharedKey)
		c := wgtypes.PeerConfig{PublicKey: wgtypes.Key(n.PublicKey), PresharedKey: &shared, ReplaceAllowedIPs: true,
			AllowedIPs: []net.IPNet{{IP: n.Address.AsSlice(), Mask: net.CIDRMask(32, 32)}}}
		if n.endpoint.IsValid() && !known {
			c.Endpoint = net.UDPAddrFromAddrPort(n.endpoint)
		}
		config = append(config, c)
	}
	return k.set(config)
}

// keep removes the peers that are no session's: they ended while no daemon was there.
func (k *kernel) keep(live map[session.Key]*peer) error {
	device, err := k.control.Device(k.name)
	if err != nil {
		return err
	}
	var config []wgtypes.PeerConfig
	for _, p := range device.Peers {
		if _, ok := live[session.Key(p.PublicKey)]; !ok {
			config = append(config, wgtypes.PeerConfig{PublicKey: p.PublicKey, Remove: true})
		}
	}
	return k.set(config)
}

func (k *kernel) set(config []wgtypes.PeerConfig) error {
	for len(config) > 0 {
		n := min(batch, len(config))
		if err := k.control.ConfigureDevice(k.name, wgtypes.Config{Peers: config[:n]}); err != nil {
			return err
		}
		config = config[n:]
	}
	return nil
}

func (k *kernel) remove(key session.Key) error {
	return k.set([]wgtypes.PeerConfig{{PublicKey: wgtypes.Key(key), Remove: true}})
}

// begin: a keepalive that is turned on is sent at once, and needs keys first. Then it is turned off, since it is the client's.
func (k *kernel) begin(key session.Key) {
	for _, interval := range []time.Duration{25 * time.Second, 0} {
		_ = k.set([]wgtypes.PeerConfig{{PublicKey: wgtypes.Key(key), UpdateOnly: true, PersistentKeepaliveInterval: &interval}})
	}
}

func (k *kernel) statuses() (map[session.Key]status, error) {
	device, err := k.control.Device(k.name)
	if err != nil {
		return nil, err
	}
	list := make(map[session.Key]status, len(device.Peers))
	for _, p := range device.Peers {
		if p.Endpoint == nil || p.LastHandshakeTime.Unix() <= 0 {
			continue
		}
		at := p.Endpoint.AddrPort()
		list[session.Key(p.PublicKey)] = status{endpoint: netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port()),
			handshake: time.Unix(p.LastHandshakeTime.Unix(), 0).UTC(), received: uint64(p.ReceiveBytes), sent: uint64(p.TransmitBytes)}
	}
	return list, nil
}

// close takes the link down, which forgets the keys of every session and closes the socket, and keeps the peers: a key that
// is added anew has forgotten which handshakes were made.
func (k *kernel) close() {
	if link, err := netlink.LinkByName(k.name); err == nil {
		_ = netlink.LinkSetDown(link)
	}
	k.control.Close()
}

// Handshakes and Responses: the kernel counts none. One more each time makes Run look once a second, and begin one a millisecond.
func (k *kernel) Handshakes() uint64 { return k.calls.Add(1) }
func (k *kernel) Responses() uint64  { return k.calls.Add(1) }

// Whose first handshake is awaited is looked for this often, and less often once he has let it wait.
const (
	proofEvery    = 20 * time.Millisecond
	proofPatience = 10 * time.Second
	proofLater    = time.Second
)

// admitProven lets in who has proven his key, where no packet can be watched: the kernel notes a handshake once the first packet
// under its keys has come.
func (t *Tunnel) admitProven(ctx context.Context) {
	tick := time.NewTicker(proofEvery)
	defer tick.Stop()
	failed := ""
	for looked := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		waiting, newest := t.inner.waiting()
		if len(waiting) == 0 || time.Since(newest) > proofPatience && time.Since(looked) < proofLater {
			continue
		}
		looked = time.Now()
		list, err := t.engine.statuses()
		if err != nil {
			if failed != err.Error() {
				failed = err.Error()
				t.log.Error("peers of the tunnel not read", "err", err)
			}
			continue
		}
		for _, s := range waiting {
			if _, proven := list[s.PublicKey]; proven {
				t.inner.prove(s)
			}
		}
	}
}
