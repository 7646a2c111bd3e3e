package vpn

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

// A reader takes whole datagrams of allowed sizes, each as it was written, and stops at the first that is none.
func FuzzDatagrams(f *testing.F) {
	one := append([]byte{0, MinDatagram}, make([]byte, MinDatagram)...)
	f.Add(one)
	f.Add(append(one, one...))
	f.Add(append(one, 0xff, 0xff))
	f.Add([]byte{0, 0})
	f.Add(append([]byte{5, 220}, make([]byte, 1500)...))
	f.Fuzz(func(t *testing.T, wire []byte) {
		r := bytes.NewReader(wire)
		var again []byte
		for {
			var d frame
			if err := d.read(r); err != nil {
				break
			}
			if d.n < MinDatagram || d.n > MaxDatagram {
				t.Fatalf("a datagram of %d bytes", d.n)
			}
			again = binary.BigEndian.AppendUint16(again, uint16(d.n))
			again = append(again, d.datagram()...)
		}
		if !bytes.HasPrefix(wire, again) {
			t.Fatal("what was read is not what was written")
		}
		if rest := wire[len(again):]; len(rest) >= 2 {
			if n := int(binary.BigEndian.Uint16(rest)); n >= MinDatagram && n <= MaxDatagram && len(rest) >= 2+n {
				t.Fatalf("a datagram of %d bytes was left", n)
			}
		}
	})
}

// pipe is a stream of b over TCP on loopback, and its other end.
func pipe(t *testing.T, b *Bind) (*Stream, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	near, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := b.NewStream(near, bufio.NewReader(near), netip.MustParseAddrPort("127.0.0.1:1"))
	done := make(chan error, 1)
	go func() { done <- s.Run(nil, s, nil) }()
	t.Cleanup(func() { s.Close(); <-done })
	return s, far
}

// A peer that reads nothing costs what is sent to it, and nobody else anything.
func TestStuckStreamStallsNobody(t *testing.T) {
	b := NewBind()
	if _, _, err := b.Open(0); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	stuck, _ := pipe(t, b)
	live, far := pipe(t, b)
	batch := make([][]byte, 64)
	for i := range batch {
		batch[i] = bytes.Repeat([]byte{byte(i)}, 1400)
	}
	sent := make(chan struct{})
	go func() {
		for range 1000 { // 90 MB, more than any socket's buffer
			b.Send(batch, stuck)
		}
		b.Send([][]byte{bytes.Repeat([]byte{7}, 100)}, live)
		close(sent)
	}()
	select {
	case <-sent:
	case <-time.After(time.Minute):
		t.Fatal("sending waits for the peer that reads nothing")
	}
	if n := len(stuck.out); n != streamQueue {
		t.Errorf("%d datagrams wait, want a full queue of %d", n, streamQueue)
	}
	got := make([]byte, 102)
	far.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(far, got); err != nil || got[1] != 100 || got[101] != 7 {
		t.Errorf("the other stream: %v %v", err, got)
	}
}

// What a peer sends faster than the device takes waits in its own connection, in order, and handshakes in requests pass by.
func TestFloodOfAStreamDoesNotShutOutHandshakes(t *testing.T) {
	b := NewBind()
	fns, _, err := b.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	_, far := pipe(t, b)
	const many = 2000
	go func() {
		d := append([]byte{0, 100}, make([]byte, 100)...)
		for i := range uint32(many) {
			binary.BigEndian.PutUint32(d[2:], i)
			if _, err := far.Write(d); err != nil {
				return
			}
		}
	}()
	for len(b.streams) < cap(b.streams) {
		time.Sleep(time.Millisecond)
	}
	if err := b.Inject(make([]byte, InitiationSize), NewFlight(netip.AddrPort{})); err != nil {
		t.Fatal(err)
	}
	receive := fns[len(fns)-1]
	bufs, sizes, eps := make([][]byte, 128), make([]int, 128), make([]conn.Endpoint, 128)
	for i := range bufs {
		bufs[i] = make([]byte, 2000)
	}
	handshakes, next := 0, uint32(0)
	for next < many || handshakes == 0 {
		n, err := receive(bufs, sizes, eps)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if sizes[i] == InitiationSize {
				handshakes++
				continue
			}
			if got := binary.BigEndian.Uint32(bufs[i]); got != next {
				t.Fatalf("datagram %d in the place of %d", got, next)
			}
			next++
		}
	}
}

func TestStreamThatSendsNonsenseEnds(t *testing.T) {
	b := NewBind()
	s, far := pipe(t, b)
	far.Write([]byte{0xff, 0xff, 1})
	select {
	case <-s.Ended():
	case <-time.After(time.Minute):
		t.Error("a datagram of 65535 bytes is waited for")
	}
}
