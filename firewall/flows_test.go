package firewall

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgetting runs Forget until the test ends.
func (r *room) forgetting() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.fw.Forget(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Error("Forget: ", err)
		}
	})
}

// tracked tells whether the kernel tracks a flow from an address.
func (r *room) tracked(from netip.Addr) bool {
	r.t.Helper()
	h, err := r.fw.netlink(unix.NETLINK_NETFILTER)
	if err != nil {
		r.t.Fatal(err)
	}
	defer h.Close()
	family := netlink.InetFamily(unix.AF_INET)
	if from.Is6() {
		family = unix.AF_INET6
	}
	all, err := h.ConntrackTableList(netlink.ConntrackTable, family)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, flow := range all {
		if endpoint(flow.Forward.SrcIP, 0).Addr() == from {
			return true
		}
	}
	return false
}

// What is established passes without an element, for as long as somebody sends.
func TestRemovedEndpointIsForgotten(t *testing.T) {
	r := newRoom(t, example())
	tunnel, err := r.Bastion.ListenPacket("udp", ":1194")
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Close()
	b := make([]byte, 100)
	heard := func(c net.Conn, wait time.Duration) bool {
		t.Helper()
		if _, err := c.Write([]byte("datagram")); err != nil {
			t.Fatal(err)
		}
		tunnel.SetReadDeadline(time.Now().Add(wait))
		n, from, err := tunnel.ReadFrom(b)
		if err != nil {
			return false
		}
		if _, err := tunnel.WriteTo(b[:n], from); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := c.Read(b); err != nil { // the answer makes the flow established
			t.Fatal(err)
		}
		return true
	}
	var clients []net.Conn
	for _, at := range []netip.Addr{r.Bastion.Addr, r.Bastion.Addr6} {
		c, err := r.Client.Dial(context.Background(), "udp", netip.AddrPortFrom(at, 1194).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
		if heard(c, 100*time.Millisecond) {
			t.Fatal("heard without element or window")
		}
		me := c.LocalAddr().(*net.UDPAddr).AddrPort()
		if err := r.fw.AddPeer(me, soon()); err != nil {
			t.Fatal(err)
		}
		if !heard(c, 20*time.Second) {
			t.Fatal("an endpoint in the set is not heard")
		}
		if err := r.fw.RemovePeer(me); err != nil {
			t.Fatal(err)
		}
		if !heard(c, 20*time.Second) {
			t.Fatal("the flow ended with its element: this test shows nothing")
		}
	}
	r.forgetting()
	for _, c := range clients {
		r.eventually("the flow is forgotten", func() bool { return !r.tracked(c.LocalAddr().(*net.UDPAddr).AddrPort().Addr()) })
		if heard(c, 100*time.Millisecond) {
			t.Errorf("%v is heard after its end", c.LocalAddr())
		}
	}
}

func TestDismissedAddressLosesTheHostsConnections(t *testing.T) {
	r := newRoom(t, example())
	run(t, "", "ip", "-n", r.Bastion.Name, "link", "add", "perimeter0", "type", "veth", "peer", "name", "tunnel", "netns", r.Client.Name)
	for _, s := range [][]string{{r.Bastion.Name, "perimeter0", "10.77.0.1/16"}, {r.Client.Name, "tunnel", "10.77.0.2/16"}, {r.Client.Name, "tunnel", "10.77.0.3/16"}} {
		run(t, "", "ip", "-n", s[0], "address", "add", s[2], "dev", s[1])
		run(t, "", "ip", "-n", s[0], "link", "set", s[1], "up")
	}
	service, err := r.Bastion.Listen("tcp", "10.77.0.1:22")
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	connect := func(from string) (hosts net.Conn) {
		a := netip.MustParseAddr(from)
		if err := r.fw.Admit(a, []uint16{22}, soon()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		c, err := r.Client.DialFrom(ctx, a, "tcp", "10.77.0.1:22")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		hosts, err = service.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { hosts.Close() })
		return hosts
	}
	gone, stays := connect("10.77.0.2"), connect("10.77.0.3")
	r.forgetting()
	if err := r.fw.Dismiss(netip.MustParseAddr("10.77.0.2")); err != nil {
		t.Fatal(err)
	}
	gone.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := gone.Read(make([]byte, 1)); err == nil || err.(net.Error).Timeout() {
		t.Errorf("the host's connection to an address that was dismissed lives: %d, %v", n, err)
	}
	r.eventually("its flow is forgotten", func() bool { return !r.tracked(netip.MustParseAddr("10.77.0.2")) })
	if !r.tracked(netip.MustParseAddr("10.77.0.3")) {
		t.Error("another session's flow was forgotten too")
	}
	stays.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := stays.Read(make([]byte, 1)); err == nil || !err.(net.Error).Timeout() {
		t.Errorf("another session's connection: %v", err)
	}
}
