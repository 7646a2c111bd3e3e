//go:build linux

package lab

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A door of three lines: a datagram of seven bytes to port 7100 opens port 7000 to its source.
const smallDoor = `table inet door {
	set opened { type ipv4_addr; flags dynamic,timeout; timeout 1m; }
	chain in { type filter hook input priority 0;
		ct state invalid drop
		udp dport 7100 udp length 15 add @opened { ip saddr } drop
		tcp dport 7000 ip saddr != @opened drop
	}
}`

func TestKnockerTellsWhetherAKnockOpened(t *testing.T) {
	l := Start(t, Options{})
	nft(t, l.Bastion, smallDoor)
	listener, err := l.Bastion.Listen("tcp", ":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	next, err := l.Crowd(t.Context(), l.Bastion)
	if err != nil {
		t.Fatal(err)
	}
	k, err := l.NewKnocker()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	behind := netip.AddrPortFrom(l.Bastion.Addr, 7000)
	knock := func(from netip.Addr, payload string) Knock {
		return Knock{Packets: [][]byte{Datagram4(netip.AddrPortFrom(from, 40000), netip.AddrPortFrom(l.Bastion.Addr, 7100), []byte(payload))}}
	}
	for range 5 {
		from := next()
		o, err := k.Open(t.Context(), from, behind, knock(from, "1234567"), time.Millisecond, 5*time.Second)
		if err != nil || !o.Opened || o.SYNs < 1 || o.After <= 0 {
			t.Fatalf("a good knock of %v: %+v, %v", from, o, err)
		}
		// Its answer comes while the knock waits, so that it is seen.
		again := knock(from, "1234567")
		again.Packets, again.Gap = append(again.Packets, again.Packets[0]), 200*time.Millisecond
		// Nor is an answer that is late, to a SYN of another knock, taken for one of its own.
		var late sync.WaitGroup
		late.Go(func() {
			for range 100 {
				if err := k.Send(SYN4(netip.AddrPortFrom(from, firstPort+50), behind), l.Bastion.Addr); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Millisecond)
			}
		})
		if _, err := k.Open(t.Context(), from, behind, again, time.Millisecond, 5*time.Second); !errors.Is(err, ErrOpenBefore) {
			t.Errorf("a second knock of %v: %v, want %v", from, err, ErrOpenBefore)
		}
		late.Wait()
		from = next()
		if o, err := k.Open(t.Context(), from, behind, knock(from, "123456"), time.Millisecond, 50*time.Millisecond); err != nil || o.Opened {
			t.Errorf("a bad knock of %v: %+v, %v", from, o, err)
		}
	}
	if _, err := k.Open(t.Context(), next(), behind, Knock{}, time.Millisecond, time.Second); err == nil {
		t.Error("a knock of no packets is taken")
	}
}

func TestCrowdGivesEachAddressOnce(t *testing.T) {
	l := Start(t, Options{})
	next, err := l.Crowd(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[netip.Addr]bool{}
	for range CrowdSize {
		a := next()
		if seen[a] || !netip.MustParsePrefix("198.18.128.0/17").Contains(a) {
			t.Fatalf("%v: twice, or not of the crowd", a)
		}
		seen[a] = true
	}
}

func TestFloodEndsByCountAndByTime(t *testing.T) {
	l := Start(t, Options{})
	nft(t, l.Bastion, `table inet door { chain in { type filter hook input priority 0;
		ct state invalid counter
		ip saddr { 198.18.2.0-198.18.127.255, 198.19.2.0-198.19.255.255 } drop
	}; }`)
	before, err := l.Bastion.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	kinds := []Garbage{{Proto: unix.IPPROTO_UDP, Length: 17}, {Proto: unix.IPPROTO_TCP}, {Proto: unix.IPPROTO_UDP, Port: 1194, Length: 225, Base64: true}}
	f := &Flood{To: l.Bastion.Addr, Kinds: kinds, Max: 300, For: time.Minute}
	if err := f.Run(t.Context(), l.Client); err != nil {
		t.Fatal(err)
	}
	sent, _ := f.Sent()
	after, err := l.Bastion.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	received, delivered := after.Received-before.Received, after.Delivered-before.Delivered
	if sent != 300 || received < 300 || delivered > received-300 {
		t.Errorf("%d packets sent, %d received, %d delivered; want 300, at least 300, and none of them", sent, received, delivered)
	}
	out, err := l.Bastion.Command(t.Context(), "nft", "list", "chain", "inet", "door", "in").Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := "ct state invalid counter packets 0 "; !strings.Contains(string(out), want) {
		t.Errorf("packets with a bad checksum or header: %s", out)
	}
	f = &Flood{To: l.Bastion.Addr, Kinds: kinds, Max: 1 << 30, For: 20 * time.Millisecond}
	if err := f.Run(t.Context(), l.Client); err != nil {
		t.Fatal(err)
	}
	if sent, _ := f.Sent(); sent == 0 || sent == 1<<30 {
		t.Errorf("%d packets in 20 ms", sent)
	}
	if err := (&Flood{To: l.Bastion.Addr, Kinds: kinds}).Run(t.Context(), l.Client); err == nil {
		t.Error("a flood without bounds runs")
	}
}
