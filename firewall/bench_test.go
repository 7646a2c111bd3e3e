package firewall

import (
	"encoding/binary"
	"log/slog"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
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

type repairs struct {
	uncounted
	done chan time.Duration
}

func (r repairs) Repaired(took time.Duration) { r.done <- took }

// From the end of nft flush ruleset until the table stands again: the wait for Watch's next look and the repair. What stands
// in between is the socket filter of Interlock.
func BenchmarkFlushedUntilRepaired(b *testing.B) {
	runtime.LockOSThread() // and never unlocked: the namespace goes with the thread
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		b.Fatal(err)
	}
	ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(ns)
	f := New(slog.New(slog.DiscardHandler), ns)
	f.plain = true // an owned table would not be flushed
	f.Count(repairs{done: make(chan time.Duration, 1)})
	repaired := f.counter.(repairs).done
	if _, err := f.Apply(example()); err != nil {
		b.Fatal(err)
	}
	watched := make(chan error, 1)
	go func() { watched <- f.Watch(b.Context(), func(bool) error { return nil }) }()
	var gaps, took []time.Duration
	for b.Loop() {
		if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
			b.Fatalf("nft: %v\n%s", err, out)
		}
		flushed := time.Now()
		select {
		case d := <-repaired:
			gaps, took = append(gaps, time.Since(flushed)), append(took, d)
		case err := <-watched:
			b.Fatal("Watch ended: ", err)
		case <-time.After(10 * time.Second):
			b.Fatal("not repaired in ten seconds")
		}
	}
	slices.Sort(gaps)
	slices.Sort(took)
	b.ReportMetric(float64(gaps[len(gaps)/2].Microseconds())/1000, "median-ms")
	b.ReportMetric(float64(gaps[len(gaps)-1].Microseconds())/1000, "worst-ms")
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "repair-ms")
}
