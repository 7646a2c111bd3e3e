package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

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

// The firewall's table says so too, as long as another tool leaves it there.
func TestListenerHearsTheTunnelsDeviceAlone(t *testing.T) {
	inner, err := net.InterfaceByName("inner")
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(context.Background(), netip.MustParseAddrPort(bastion+":0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	outside(func() { err = ip("route add " + bastion + "/32 via 198.18.0.1") })
	if err != nil {
		t.Fatal(err)
	}
	defer outside(func() { ip("route del " + bastion + "/32") })
	reach := func(patience time.Duration) (net.Conn, error) {
		var c net.Conn
		outside(func() { c, err = net.DialTimeout("tcp", l.Addr().String(), patience) })
		return c, err
	}
	var timeout net.Error
	if c, err := reach(300 * time.Millisecond); err == nil {
		c.Close()
		t.Error("a connection comes in by another device")
	} else if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("by another device: %v, want silence", err)
	}
	local, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	local.Close()

	// As if that were the tunnel's: then it is heard; and on when the device is another.
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { err = hearOnly(int(fd), inner.Index) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	far, err := reach(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	var near net.Conn
	for near == nil || near.RemoteAddr().String() != far.LocalAddr().String() {
		if near, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		defer near.Close()
	}
	control(near.(*net.TCPConn), func(fd int) { err = hearOnly(fd, loopback) })
	if err != nil {
		t.Fatal(err)
	}
	near.SetDeadline(time.Now().Add(time.Minute))
	if _, err := far.Write([]byte("on")); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 2)
	if _, err := io.ReadFull(near, said); err != nil || string(said) != "on" {
		t.Errorf("a connection whose device is another: %q, %v", said, err)
	}
}

func TestListenerWithoutItsDeviceIsNone(t *testing.T) {
	if l, err := Listen(context.Background(), netip.MustParseAddrPort("10.99.0.1:3128")); err == nil {
		l.Close()
		t.Error("it listens")
	} else if !strings.Contains(err.Error(), "no device has the address 10.99.0.1: is the tunnel device up") {
		t.Error(err)
	}
}
