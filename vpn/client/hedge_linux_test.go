package client_test

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// relay leads to a gate. Down carries what the gate says on the nth connection on which a client spoke, counted from one.
type relay struct {
	spoke atomic.Int32
	open  sync.WaitGroup // connections that the client has not closed
}

func (r *relay) through(down func(n int, to io.Writer, from io.Reader)) func(*testing.T, string) string {
	return func(t *testing.T, gate string) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				r.open.Go(func() { r.carry(c, gate, down) })
			}
		}()
		return l.Addr().String()
	}
}

func (r *relay) carry(c net.Conn, gate string, down func(int, io.Writer, io.Reader)) {
	defer c.Close()
	first := make([]byte, 1)
	if _, err := c.Read(first); err != nil {
		return
	}
	n := int(r.spoke.Add(1))
	g, err := net.Dial("tcp", gate)
	if err != nil {
		return
	}
	defer g.Close()
	g.Write(first)
	go down(n, c, g)
	io.Copy(g, c)
}

func TestHandshakeThatIsCutShortIsBegunAgainBeside(t *testing.T) {
	var way relay
	r := newRig(t, nil, way.through(func(n int, to io.Writer, from io.Reader) {
		if n == 1 {
			io.CopyN(to, from, 1000) // of some 2000
			return
		}
		io.Copy(to, from)
	}))
	tunnel, err := r.open(20 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	r.carries(tunnel)
	if n := way.spoke.Load(); n != 2 || len(r.gate.Requests) != 1 {
		t.Errorf("%d handshakes and %d requests, want 2 and 1", n, len(r.gate.Requests))
	}
	tunnel.Close()
	closed := make(chan struct{})
	go func() { way.open.Wait(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Error("a connection stays open")
	}
}

func TestGateThatIsMerelySlowIsNotAskedTwice(t *testing.T) {
	var way relay
	r := newRig(t, nil, way.through(func(_ int, to io.Writer, from io.Reader) {
		time.Sleep(300 * time.Millisecond) // a machine with much to do
		io.Copy(to, from)
	}))
	if _, err := r.open(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	if n := way.spoke.Load(); n != 1 {
		t.Errorf("%d handshakes", n)
	}
}
