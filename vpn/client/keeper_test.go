package client

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"perimeterd/vpn"
)

func TestKeeperDecides(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	far := now.Add(time.Hour)
	for _, c := range []struct {
		name string
		v    vitals
		want action
	}{
		{"answered", vitals{asked: ago(10 * time.Second), answered: ago(9 * time.Second), renewAt: far}, nothing},
		{"asked just now", vitals{asked: ago(500 * time.Millisecond), answered: ago(time.Minute), renewAt: far}, nothing},
		{"unanswered", vitals{asked: ago(2 * time.Second), answered: ago(time.Minute), renewAt: far}, revive},
		{"unanswered, too early to try again", vitals{asked: ago(2 * time.Second), answered: ago(time.Minute), renewAt: far, nextTry: now.Add(1)}, nothing},
		{"unanswered after all revivals", vitals{asked: ago(2 * time.Second), answered: ago(time.Minute), renewAt: far, revived: reviveLimit}, renew},
		{"answered after a revival", vitals{asked: ago(2 * time.Second), answered: ago(time.Second), renewAt: far, revived: 2}, healthy},
		{"data unanswered, too early to say", vitals{unheard: ago(dataPatience / 2), answered: ago(time.Minute), renewAt: far}, nothing},
		{"data unanswered", vitals{unheard: ago(2 * time.Second), asked: ago(time.Hour), answered: ago(time.Minute), renewAt: far}, shake},
		{"data and then an initiation unanswered", vitals{unheard: ago(3 * time.Second), asked: ago(1500 * time.Millisecond), answered: ago(time.Minute), renewAt: far}, revive},
		{"data unanswered, the last handshake was before", vitals{unheard: ago(dataPatience / 2), asked: ago(time.Minute), answered: ago(time.Minute), renewAt: far, revived: 1}, nothing},
		{"the stream broke", vitals{answered: ago(time.Minute), renewAt: far, cut: true}, revive},
		{"the stream broke, too early to try again", vitals{answered: ago(time.Minute), renewAt: far, cut: true, nextTry: now.Add(1)}, nothing},
		{"data stopped", vitals{answered: ago(time.Minute), renewAt: far, stopped: true}, shake},
		{"another network", vitals{answered: ago(time.Second), renewAt: far, moved: true, nextTry: far}, revive},
		{"near its end", vitals{answered: ago(time.Second), renewAt: now}, renew},
		{"near its end, just refused", vitals{answered: ago(time.Second), renewAt: now, nextTry: now.Add(1)}, nothing},
	} {
		c.v.now = now
		if got := c.v.decide(); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestSilenceAfterMuchIsSeenOnce(t *testing.T) {
	var f flow
	heard := uint64(0)
	for i, c := range []struct {
		came uint64
		want bool
	}{{0, false}, {0, false}, {100, false}, {0, false}, {0, false}, {0, false}, {many, false}, {0, false}, {1, false}, {0, false}, {0, true}, {0, false}, {0, false}, {many, false}, {0, false}, {0, true}} {
		heard += c.came
		if got := f.stopped(heard); got != c.want {
			t.Errorf("beat %d: %v, want %v", i, got, c.want)
		}
	}
}

func TestRenewalIsBeforeTheEnd(t *testing.T) {
	began := time.Unix(1_800_000_000, 0)
	for _, life := range []time.Duration{time.Second, time.Minute, time.Hour, 12 * time.Hour} {
		at := renewTime(began, began.Add(life))
		if !at.After(began) || !at.Before(began.Add(life)) {
			t.Errorf("life %v: renewed %v after the beginning", life, at.Sub(began))
		}
	}
}

func TestPauseGrowsAndIsBounded(t *testing.T) {
	for attempt := range 40 {
		if d := pause(attempt, time.Minute); d < 750*time.Millisecond || d > 75*time.Second {
			t.Errorf("attempt %d: %v", attempt, d)
		}
	}
}

func TestUnansweredInitiationIsSentAgain(t *testing.T) {
	peer, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	for _, answer := range []bool{false, true} {
		w := newWire()
		receive, _, err := w.Open(0)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range receive {
			go func() {
				bufs, sizes, eps := make([][]byte, w.BatchSize()), make([]int, w.BatchSize()), make([]conn.Endpoint, w.BatchSize())
				for i := range bufs {
					bufs[i] = make([]byte, 2048)
				}
				for {
					if _, err := f(bufs, sizes, eps); err != nil {
						return
					}
				}
			}()
		}
		initiation := make([]byte, vpn.InitiationSize)
		initiation[0] = messageInitiation
		ep, err := w.ParseEndpoint(peer.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Send([][]byte{initiation}, ep); err != nil {
			t.Fatal(err)
		}
		got := 0
		peer.SetReadDeadline(time.Now().Add(400 * time.Millisecond))
		for {
			n, from, err := peer.ReadFromUDPAddrPort(make([]byte, 2048))
			if err != nil {
				break
			}
			if n == vpn.InitiationSize {
				got++
			}
			if answer && got == 1 {
				response := make([]byte, vpn.ResponseSize)
				response[0] = messageResponse
				peer.WriteToUDPAddrPort(response, from)
			}
		}
		if want := map[bool]int{false: 1 + len(resends), true: 1}[answer]; got != want {
			t.Errorf("answered %v: %d initiations arrived, want %d", answer, got, want)
		}
		w.Close()
	}
}

func TestOnlyDataThatAreSentAgainAreMissed(t *testing.T) {
	w := newWire()
	if _, _, err := w.Open(0); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ep, err := w.ParseEndpoint("127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	send := func(size int) {
		m := make([]byte, size)
		m[0] = messageTransport
		w.Send([][]byte{m}, ep) // refused or not, it has left
	}
	send(keepaliveSize)
	time.Sleep(repeatedAfter)
	send(keepaliveSize)
	if !w.unheard().IsZero() {
		t.Error("keepalives ask for no answer")
	}
	send(96)
	if !w.unheard().IsZero() {
		t.Error("one packet may be an acknowledgement")
	}
	time.Sleep(repeatedAfter)
	send(96)
	if d := time.Since(w.unheard()); d < repeatedAfter || d > time.Second {
		t.Errorf("unheard for %v", d)
	}
}

func TestSleepCountsAsAMove(t *testing.T) {
	now := time.Now()
	p := newPlace(netip.MustParseAddrPort("127.0.0.1:1194"), now, 0)
	if p.moved(now.Add(time.Second), time.Second) {
		t.Error("a second later, in the same place: moved")
	}
	if !p.moved(now.Add(time.Minute), 2*time.Second) {
		t.Error("after a sleep: not moved")
	}
	if p.moved(now.Add(time.Minute+time.Second), 3*time.Second) {
		t.Error("a second after that: moved again")
	}
}
