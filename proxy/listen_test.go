package proxy

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// A listener outlives the process that made it, and what its connections have must not depend on whose it is.
func TestConnectionsOfAnotherProcessesListenerAreAsThoseOfOurs(t *testing.T) {
	ours, err := Listen(context.Background(), netip.MustParseAddrPort(bastion+":0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	f, err := ours.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	theirs, err := Adopt(f)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	type options struct{ on, idle, interval, count, linger int }
	want := options{on: 1, idle: 60, interval: 15, count: 4, linger: 1}
	for name, l := range map[string]net.Listener{"ours": ours, "another's": theirs} {
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var got options
		control(c.(*net.TCPConn), func(fd int) {
			for _, o := range []struct {
				to            *int
				level, option int
			}{
				{&got.on, unix.SOL_SOCKET, unix.SO_KEEPALIVE}, {&got.idle, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE},
				{&got.interval, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL}, {&got.count, unix.IPPROTO_TCP, unix.TCP_KEEPCNT},
				{&got.linger, unix.SOL_SOCKET, unix.SO_LINGER},
			} {
				if *o.to, err = unix.GetsockoptInt(fd, o.level, o.option); err != nil {
					t.Error(err)
				}
			}
		})
		if got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}
