package firewall

import (
	"net/netip"
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
