package firewall

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

func benchFirewall(b *testing.B) *Firewall {
	b.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		b.Fatal(err)
	}
	f := New(testLog(b), 0)
	if _, err := f.Apply(example()); err != nil {
		b.Fatal(err)
	}
	return f
}

func BenchmarkApply(b *testing.B) {
	f := benchFirewall(b)
	for b.Loop() {
		if _, err := f.Apply(example()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAdmitAndDismiss(b *testing.B) {
	f := benchFirewall(b)
	until := time.Now().Add(time.Hour)
	a := netip.MustParseAddr("10.77.0.2")
	for b.Loop() {
		if err := f.Admit(a, nil, until); err != nil {
			b.Fatal(err)
		}
		if err := f.Dismiss(a); err != nil {
			b.Fatal(err)
		}
		a = a.Next()
	}
}

// A step of 1,000 users.
func BenchmarkAddTokens4000(b *testing.B) {
	f := benchFirewall(b)
	var n uint64
	for b.Loop() {
		list := make([]Token, 4000)
		for i := range list {
			n++
			t := knock.Token{}
			binary.BigEndian.PutUint64(t[:], n)
			list[i] = Token{t, uint32(n), time.Now().Add(time.Second)}
		}
		if err := f.AddTokens(list); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCheckForDrift(b *testing.B) {
	f := benchFirewall(b)
	for b.Loop() {
		f.gen = 0 // as if another tool had changed something
		if r, err := f.check(time.Now(), false); err != nil || r.took != 0 {
			b.Fatal(r, err)
		}
	}
}
