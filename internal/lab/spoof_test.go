//go:build linux

package lab

import (
	"net/netip"
	"testing"
	"time"
)

func TestSpoofedPacketsArriveAsTheyWereMade(t *testing.T) {
	l := Start(t, Options{})
	mallory, err := l.AddHost(t.Context(), "mallory")
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.NewSpoofer(mallory)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	heard, err := l.Bastion.ListenPacket("udp4", ":5000")
	if err != nil {
		t.Fatal(err)
	}
	defer heard.Close()
	from, to := netip.MustParseAddrPort("203.0.113.7:1234"), netip.AddrPortFrom(l.Bastion.Addr, 5000)
	broken := Datagram4(from, to, []byte("with a checksum that does not hold"))
	broken[26] ^= 1
	header := Datagram4(from, to, []byte("under a header checksum that does not hold"))
	header[10], header[11] = 1, 2
	for _, p := range [][]byte{broken, header} {
		if err := s.Send(p); err != nil {
			t.Fatal(err)
		}
	}
	const n = 20
	sent, err := s.Flood(t.Context(), 1000, n, func(i int) []byte { return Datagram4(from, to, []byte{byte(i)}) })
	if err != nil || sent != n {
		t.Fatalf("%d packets were sent: %v", sent, err)
	}
	b := make([]byte, 100)
	for i := range n {
		heard.SetReadDeadline(time.Now().Add(10 * time.Second))
		size, source, err := heard.ReadFrom(b)
		if err != nil || size != 1 || b[0] != byte(i) || source.String() != from.String() {
			t.Fatalf("datagram %d: %q from %v, %v", i, b[:size], source, err)
		}
	}
}
