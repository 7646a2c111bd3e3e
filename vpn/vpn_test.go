package vpn

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

func TestPoolKeepsAnAddressForItsOwnerAndRestsItForOthers(t *testing.T) {
	p := NewPool(netip.MustParsePrefix("10.77.0.0/29")) // .2 to .6
	now := time.Unix(0, 0)
	alice, bob, carol := "alice", "bob", "carol"
	take := func(who string, at time.Time) string {
		a, err := p.Take(who, at)
		if err != nil {
			return err.Error()
		}
		return a.String()
	}
	for i, want := range []string{"10.77.0.2", "10.77.0.3", "10.77.0.4"} {
		if got := take(alice, now); got != want {
			t.Fatalf("take %d: %s, want %s", i, got, want)
		}
	}
	p.Release(netip.MustParseAddr("10.77.0.3"), now)
	if got := take(bob, now); got != "10.77.0.5" {
		t.Fatalf("bob got %s, want one that was never used", got)
	}
	if got := take(alice, now.Add(time.Second)); got != "10.77.0.3" {
		t.Fatalf("alice got %s back, want hers", got)
	}
	take(bob, now)
	if got := take(carol, now); got != ErrPoolEmpty.Error() {
		t.Fatalf("carol got %s from an empty pool", got)
	}
	p.Release(netip.MustParseAddr("10.77.0.3"), now.Add(2*time.Second))
	if got := take(carol, now.Add(Quarantine)); got != ErrPoolEmpty.Error() {
		t.Fatalf("carol got %s: the quarantine counts from the last release", got)
	}
	if got := take(carol, now.Add(Quarantine+2*time.Second)); got != "10.77.0.3" {
		t.Fatalf("carol got %s after the quarantine", got)
	}
	if got := take(alice, now.Add(Quarantine+3*time.Second)); got != ErrPoolEmpty.Error() {
		t.Fatalf("alice got %s, which is another's now", got)
	}
}

func TestPoolHoldsWhatCameBack(t *testing.T) {
	p := NewPool(netip.MustParsePrefix("10.77.0.0/29"))
	p.Hold(netip.MustParseAddr("10.77.0.2"), "alice")
	if a, err := p.Take("bob", time.Now()); err != nil || a.String() != "10.77.0.3" {
		t.Errorf("got %v, %v", a, err)
	}
}

func TestPoolGoesOnWithTheQuarantinesOfAnEarlierOne(t *testing.T) {
	p := NewPool(netip.MustParsePrefix("10.77.0.0/29"))
	now := time.Unix(1e9, 0)
	for i, a := range []string{"10.77.0.2", "10.77.0.3", "10.77.0.4", "10.77.0.5", "10.77.0.6", "10.77.0.1", "10.77.0.7", "192.0.2.1"} {
		p.Rest(netip.MustParseAddr(a), "alice", now.Add(time.Duration(i-8)*time.Minute))
	}
	p.Hold(netip.MustParseAddr("10.77.0.3"), "carol") // live again
	take := func(who string, at time.Time) string {
		a, err := p.Take(who, at)
		if err != nil {
			return err.Error()
		}
		return a.String()
	}
	if got := take("bob", now); got != ErrPoolEmpty.Error() {
		t.Fatalf("bob got %s, which rests", got)
	}
	if got := take("alice", now); got != "10.77.0.2" {
		t.Fatalf("alice got %s, want one of hers", got)
	}
	if got := take("bob", now.Add(Quarantine-6*time.Minute)); got != "10.77.0.4" {
		t.Fatalf("bob got %s, want what rested longest and is free", got)
	}
}

func TestInjectedDatagramReachesTheDeviceAndItsAnswerTheFlight(t *testing.T) {
	b := NewBind()
	fns, _, err := b.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	flight := NewFlight(netip.MustParseAddrPort("192.0.2.1:5"))
	if err := b.Inject([]byte("hello"), flight); err != nil {
		t.Fatal(err)
	}
	bufs, sizes, eps := [][]byte{make([]byte, 2000)}, make([]int, 1), make([]conn.Endpoint, 1)
	n, err := fns[len(fns)-1](bufs, sizes, eps)
	if n != 1 || err != nil || string(bufs[0][:sizes[0]]) != "hello" || eps[0] != conn.Endpoint(flight) {
		t.Fatalf("%d, %v, %q from %v", n, err, bufs[0][:sizes[0]], eps[0])
	}
	buf := bytes.Repeat([]byte{2}, ResponseSize)
	if err := b.Send([][]byte{make([]byte, 32), buf, make([]byte, ResponseSize)}, flight); err != nil {
		t.Fatal(err)
	}
	buf[0] = 9 // the device reuses its buffers
	select {
	case m := <-flight.Message():
		if len(m) != ResponseSize || m[0] != 2 {
			t.Errorf("got %d bytes that begin with %d", len(m), m[0])
		}
	default:
		t.Error("the answer did not reach the flight")
	}
	select {
	case m := <-flight.Message():
		t.Errorf("a second message of %d bytes", len(m))
	default:
	}
	for range injectQueue {
		if err := b.Inject(nil, flight); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Inject(nil, flight); err != ErrBusy {
		t.Errorf("a full queue: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
