package firewall

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Before kernel 6.12 adding an element that exists leaves its timeout as it is.
func TestAdmittingAgainExtends(t *testing.T) {
	f := applied(t, example())
	a := netip.MustParseAddr("10.77.0.2")
	for _, life := range []time.Duration{10 * time.Second, time.Minute, 20 * time.Second} {
		if err := f.Admit(a, nil, time.Now().Add(life)); err != nil {
			t.Fatal(err)
		}
		f.mu.Lock()
		e, err := f.elementsLocked("admitted")
		f.mu.Unlock()
		if err != nil || len(e) != 1 || e[0].Expires > life || e[0].Expires < life-5*time.Second {
			t.Errorf("admitted for %v: %+v, %v", life, e, err)
		}
	}
	if err := f.Dismiss(a); err != nil {
		t.Fatal(err)
	}
	if err := f.Dismiss(a); err != nil {
		t.Error("twice: ", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if e, err := f.elementsLocked("admitted"); err != nil || len(e) != 0 {
		t.Errorf("after Dismiss: %+v, %v", e, err)
	}
}

func TestKnockingAgainExtendsTheWindowForTheNewCredential(t *testing.T) {
	cfg := example()
	cfg.Window = 20 * time.Second
	r := newRoom(t, cfg)
	r.load(Token{tok(1), 42, soon()}, Token{tok(2), 43, soon()})
	for i, id := range []uint32{42, 43} {
		token := tok(byte(i + 1))
		r.send(r.Client.Addr, token[:])
		if !r.accepted(r.Client.Addr) {
			t.Fatal("not open")
		}
		w, err := r.fw.Windows()
		if err != nil || len(w) != 1 || w[0].Credential != id || time.Until(w[0].Expires) < 16*time.Second {
			t.Errorf("after knock %d: %+v, %v", i+1, w, err)
		}
		time.Sleep(5 * time.Second)
	}
}

func TestResumeLeavesWhatComesBackAndNothingElse(t *testing.T) {
	f := applied(t, example())
	gone, stays := netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("10.77.0.3")
	old, back, back6 := netip.MustParseAddrPort("198.18.1.2:5000"), netip.MustParseAddrPort("198.18.1.2:6000"), netip.MustParseAddrPort("[2001:db8::1]:6000")
	for _, err := range []error{f.Admit(gone, []uint16{22}, soon()), f.AddPeer(old, soon())} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Resume(map[netip.Addr]time.Time{stays: soon(), gone.Next().Next(): time.Now()}, map[netip.Addr][]uint16{stays: {23}},
		map[netip.AddrPort]time.Time{back: soon(), back6: soon()}); err != nil {
		t.Fatal(err)
	}
	for set, want := range map[string]string{"admitted": "10.77.0.3 ", "service": "10.77.0.3 . 23 ", "peer4": "198.18.1.2 . 6000 ", "peer6": "2001:db8::1 . 6000 "} {
		out := run(t, "", "nft", "list", "set", "inet", TableName, set)
		_, elements, _ := strings.Cut(out, "elements = {")
		if !strings.Contains(elements, want) || strings.Count(elements, "expires") != 1 {
			t.Errorf("set %s holds %s, want %s alone", set, elements, want)
		}
	}
	// What is added and taken out later goes on from there, a repair included.
	if err := f.Dismiss(stays); err != nil {
		t.Fatal(err)
	}
	if err := f.AddPeer(old, soon()); err != nil {
		t.Fatal(err)
	}
	if out := run(t, "", "nft", "list", "set", "inet", TableName, "service"); strings.Contains(out, "elements") {
		t.Errorf("a service outlives its address: %s", out)
	}
	if err := f.Resume(nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := f.AddPeer(old, soon()); err != nil {
		t.Fatal(err)
	}
}
