package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/configs"
	"perimeterd/firewall"
	"perimeterd/internal/control"
	"perimeterd/knock"
	"perimeterd/vpn/gate"
)

// checkHost looks at what else is on this host. It changes nothing.
func checkHost(ctx context.Context, c *configs.Config) (lines []line) {
	_, err := control.NewClient(c.ControlSocket()).Status(ctx)
	if errors.Is(err, fs.ErrPermission) {
		lines = append(lines, line{"problem", "ports", "not tried: only root and operators are told whether the daemon runs, and has them: run it with sudo"})
	} else {
		lines = append(lines, checkPorts(ctx, c, err == nil)...)
	}
	text, err := checkNetwork(c)
	lines = append(lines, found("tunnel.network", text, err))
	text, err = checkBind(c.Proxy.Bind)
	lines = append(lines, found("egress.bind", text, err))
	lines = append(lines, checkEarly())
	lines = append(lines, checkAWSNames(ctx, net.DefaultResolver, c.Proxy.Regions)...)
	return append(lines, checkFirewalls(ctx, c.Firewall)...)
}

// checkPorts listens for a moment where the daemon will, deaf as the gate is without the table.
func checkPorts(ctx context.Context, c *configs.Config, running bool) (lines []line) {
	if running {
		return []line{{"ok", "ports", "the running daemon has them"}}
	}
	try := func(name, network, address string, listen func() error) {
		err := listen()
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			_, port, _ := net.SplitHostPort(address)
			flag := map[string]string{"tcp": "-ltnp", "udp": "-lunp"}[network]
			lines = append(lines, line{"problem", name, fmt.Sprintf("another program has %s/%s: `ss %s sport = :%s` names it: stop it, or choose another port", port, network, flag, port)})
		case err != nil:
			lines = append(lines, line{"problem", name, err.Error()})
		}
	}
	tcp := func(address string, listen func() (net.Listener, error)) func() error {
		return func() error {
			l, err := listen()
			if err == nil {
				l.Close()
			}
			return err
		}
	}
	for _, address := range c.Gate.Listen {
		try(fmt.Sprintf("gate.listen %q", address), "tcp", address, tcp(address, func() (net.Listener, error) {
			l, err := firewall.Listen(ctx, address)
			if err != nil {
				return nil, err
			}
			return l, nil
		}))
	}
	tunnel := fmt.Sprintf(":%d", c.Firewall.TunnelPort)
	try("tunnel.port", "udp", tunnel, func() error {
		l, err := net.ListenPacket("udp", tunnel)
		if err == nil {
			l.Close()
		}
		return err
	})
	if c.Gate.Kernel {
		if err := gate.HasKernel(); err != nil {
			lines = append(lines, line{"problem", "tunnel.backend", err.Error()})
		} else {
			lines = append(lines, line{"ok", "tunnel.backend", "the kernel's WireGuard: no handshake in the first flight, no way in for who has no UDP, no filter on its socket while the table is repaired"})
		}
	}
	// The tunnel's address is not there yet.
	free := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(e, err)
	}}
	inner := c.Proxy.Listen.String()
	try("proxy.port", "tcp", inner, tcp(inner, func() (net.Listener, error) { return free.Listen(ctx, "tcp", inner) }))
	_, knocks, _ := knock.Compile(c.Firewall.Sequences)
	for _, p := range knocks {
		address := fmt.Sprintf(":%d", p.Number)
		var err error
		if p.Proto == knock.UDP {
			var l net.PacketConn
			if l, err = net.ListenPacket("udp", address); err == nil {
				l.Close()
			}
		} else {
			err = tcp(address, func() (net.Listener, error) { return firewall.Listen(ctx, address) })()
		}
		if errors.Is(err, unix.EADDRINUSE) {
			lines = append(lines, line{"problem", "knock.sequence", fmt.Sprintf("a program here listens on port %v, so its clients would be knocking: choose a free port", p)})
		}
	}
	if len(lines) == 0 {
		lines = []line{{"ok", "ports", "free"}}
	}
	return lines
}

// checkNetwork looks for routes of this host that lead where the tunnel's addresses are.
func checkNetwork(c *configs.Config) (string, error) {
	own := -1
	if l, err := netlink.LinkByName(c.Gate.Interface); err == nil {
		own = l.Attrs().Index
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return "", fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil || r.LinkIndex == own {
			continue
		}
		a, _ := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		p := netip.PrefixFrom(a.Unmap(), bits)
		if bits == 0 || !p.Overlaps(c.Gate.Network) {
			continue
		}
		dev := ""
		if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
			dev = " dev " + l.Attrs().Name
		}
		return "", fmt.Errorf("%v overlaps the route %v%s of this host: one of the two could not be reached: choose another network, such as 10.%d.0.0/16",
			c.Gate.Network, p, dev, unusedTen(routes))
	}
	return fmt.Sprintf("%v overlaps no route of this host", c.Gate.Network), nil
}

// unusedTen is an n such that no route touches 10.n.0.0/16.
func unusedTen(routes []netlink.Route) int {
	for n := 78; n < 255; n++ {
		candidate := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n), 0, 0}), 16)
		if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
			if r.Dst == nil {
				return false
			}
			a, _ := netip.AddrFromSlice(r.Dst.IP)
			bits, _ := r.Dst.Mask.Size()
			return bits > 0 && netip.PrefixFrom(a.Unmap(), bits).Overlaps(candidate)
		}) {
			return n
		}
	}
	return 255
}

func checkBind(bind netip.Addr) (string, error) {
	if !bind.IsValid() {
		return "empty: the route chooses", nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return "", err
	}
	var own []string
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && p.Addr() == bind {
			return bind.String() + " is an address of this host", nil
		}
		if err == nil && p.Addr().Is4() == bind.Is4() && !p.Addr().IsLoopback() {
			own = append(own, p.Addr().String())
		}
	}
	return "", fmt.Errorf("%v is not an address of this host (it has %s): no connection would leave: write one of them, or leave it empty (on EC2: empty)", bind, strings.Join(own, ", "))
}

type resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// checkAWSNames looks for VPC endpoints: through them AWS does not see the egress address, and the pins do not hold.
func checkAWSNames(ctx context.Context, r resolver, regions []string) []line {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	lines := make([]line, len(regions))
	var wg sync.WaitGroup
	for i, region := range regions {
		wg.Go(func() {
			name := "sts." + region + ".amazonaws.com"
			lines[i] = line{"ok", "AWS names", name + " is public"}
			list, err := r.LookupNetIP(ctx, "ip", name)
			if err != nil {
				lines[i] = line{"warning", "AWS names", name + " is not resolvable here: the proxy could not reach it either; see /etc/resolv.conf"}
			}
			for _, a := range list {
				if a = a.Unmap(); a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsLoopback() {
					lines[i] = line{"warning", "AWS names", fmt.Sprintf("%s resolves to %v, a VPC endpoint: the proxy refuses private addresses, and AWS would not see "+
						"the egress address: turn off the endpoint's private DNS, or allow it in proxy.allow_private and pin by aws:VpcSourceIp", name, a)}
				}
			}
		})
	}
	wg.Wait()
	return lines
}

// checkFirewalls reads the rules of other tools.
func checkFirewalls(ctx context.Context, cfg firewall.Config) (lines []line) {
	const name = "other firewalls"
	if os.Geteuid() != 0 {
		return []line{{"warning", name, "not read: that takes root"}}
	}
	for _, f := range []struct{ file, tool string }{{"ip_tables_names", "iptables-legacy"}, {"ip6_tables_names", "ip6tables-legacy"}} {
		text, err := os.ReadFile("/proc/thread-self/net/" + f.file)
		if err == nil && slices.Contains(strings.Fields(string(text)), "filter") {
			lines = append(lines, line{"warning", name, fmt.Sprintf("%s has a filter table, which cannot be read from here: see `%s -S INPUT`; it must accept %d/tcp and %d/udp",
				f.tool, f.tool, cfg.GatePorts[0], cfg.TunnelPort)})
		}
	}
	texts, err := firewall.ForeignRules(ctx)
	if err != nil {
		return append(lines, line{"warning", name, err.Error()})
	}
	obstacles, err := firewall.FindObstacles(texts, cfg, outerInterfaces())
	if err != nil {
		return append(lines, line{"warning", name, err.Error()})
	}
	for _, o := range obstacles {
		status := "warning"
		if o.Sure {
			status = "problem"
		}
		lines = append(lines, line{status, name, o.String()})
	}
	if len(lines) == 0 {
		lines = []line{{"ok", name, "none stands in the way"}}
	}
	return lines
}

// outerInterfaces are those of default routes.
func outerInterfaces() (names []string) {
	routes, _ := netlink.RouteList(nil, netlink.FAMILY_ALL) // unknown: the rules are followed without an interface
	for _, r := range routes {
		if r.Dst != nil {
			if bits, _ := r.Dst.Mask.Size(); bits > 0 {
				continue
			}
		}
		if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil && !slices.Contains(names, l.Attrs().Name) {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}
