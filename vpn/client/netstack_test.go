package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// cabled are two stacks, 10.77.0.1 and 10.77.0.2, with packets carried between them as a WireGuard device does.
func cabled(t *testing.T, mtu int) (a, b *netstack) {
	t.Helper()
	ends := [2]*netstack{}
	for i := range ends {
		l, err := NewNetstack()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = l.(*netstack)
		if err := l.Configure(netip.AddrFrom4([4]byte{10, 77, 0, byte(i + 1)}), netip.Addr{}, mtu, false); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	for i := range ends {
		from, to := ends[i], ends[1-i]
		go func() {
			bufs, sizes := make([][]byte, from.BatchSize()), make([]int, from.BatchSize())
			for i := range bufs {
				bufs[i] = make([]byte, 2048)
			}
			for {
				n, err := from.Read(bufs, sizes, 16)
				if err != nil {
					return
				}
				for j := range n {
					if sizes[j] > mtu {
						t.Errorf("a packet of %d bytes, MTU %d", sizes[j], mtu)
					}
					to.Write([][]byte{bufs[j][:16+sizes[j]]}, 16)
				}
			}
		}()
	}
	return ends[0], ends[1]
}

func TestStackCarriesBothWaysAndEndsInOrder(t *testing.T) {
	a, b := cabled(t, 1400)
	l, err := gonet.ListenTCP(a.stack, tcpip.FullAddress{NIC: stackNIC, Addr: tcpip.AddrFrom4([4]byte{10, 77, 0, 1}), Port: 3128}, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // an echo that answers only when the question has ended
				defer c.Close()
				all, err := io.ReadAll(c)
				if err == nil {
					c.Write(all)
				}
			}()
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := b.DialContext(ctx, "tcp", "10.77.0.1:3128")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	question := bytes.Repeat([]byte("perimeter"), 1<<17)
	go func() {
		c.Write(question)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, question) {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(question), err)
	}
	if _, err := b.DialContext(ctx, "tcp", "10.77.0.1:9"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("where nobody listens: %v", err)
	}
	// With the link what it carried ends, at once.
	if c, err = b.DialContext(ctx, "tcp", "10.77.0.1:3128"); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); read <- err }()
	b.Close()
	if err := <-read; err == nil || errors.Is(err, io.EOF) {
		t.Errorf("after the link's end: %v", err)
	}
	if b.Close() != nil || b.DialError(ctx) == nil {
		t.Error("a closed link connects")
	}
}

// DialError is of a connect that cannot succeed.
func (n *netstack) DialError(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := n.DialContext(ctx, "tcp", "10.77.0.1:3128")
	if err == nil {
		c.Close()
	}
	return err
}
