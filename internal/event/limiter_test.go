package event

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

var began = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

// oracle is the limiter as one would write it without a thought for time or memory.
type oracle struct {
	limits  Limits
	global  level
	sources []*known // least recently seen first
	others  uint64
}

type known struct {
	name       string
	level      level
	suppressed uint64
}

// level of a bucket, in nanoseconds of filling; the zero level is one that is full.
type level struct {
	used bool
	has  time.Duration
	at   time.Time
}

func (l *level) fill(r Rate, now time.Time) {
	size := time.Duration(r.Burst) * r.Every
	if !l.used {
		l.used, l.has, l.at = true, size, now
	}
	l.has = min(max(l.has+now.Sub(l.at), 0), size)
	l.at = now
}

func (o *oracle) allow(a netip.Addr, now time.Time) bool {
	name := a.Unmap().String()
	if a.Unmap().Is6() {
		name = netip.PrefixFrom(a.Unmap(), 64).Masked().String()
	}
	i := slices.IndexFunc(o.sources, func(k *known) bool { return k.name == name })
	k := &known{name: name}
	if i >= 0 {
		k = o.sources[i]
		o.sources = slices.Delete(o.sources, i, i+1)
	} else if len(o.sources) == o.limits.Sources {
		o.others += o.sources[0].suppressed
		o.sources = o.sources[1:]
	}
	o.sources = append(o.sources, k)
	before, beforeGlobal := k.level, o.global
	k.level.fill(o.limits.Source, now)
	o.global.fill(o.limits.Global, now)
	if k.level.has < o.limits.Source.Every || o.global.has < o.limits.Global.Every {
		k.suppressed++
		// A refusal leaves the buckets as they were seen before: they fill by the clock of what passes.
		k.level, o.global = before, beforeGlobal
		return false
	}
	k.level.has -= o.limits.Source.Every
	o.global.has -= o.limits.Global.Every
	return true
}

// total of what was suppressed, and the counts of the sources in the order of a report.
func (o *oracle) report() (list []string, total uint64) {
	all := slices.Clone(o.sources)
	slices.SortStableFunc(all, func(a, b *known) int { return cmp.Compare(b.suppressed, a.suppressed) })
	for _, k := range all {
		if k.suppressed > 0 {
			list = append(list, fmt.Sprint(k.suppressed))
		}
		total += k.suppressed
		k.suppressed = 0
	}
	total += o.others
	o.others = 0
	return list[:min(len(list), reported)], total
}

// agree plays a script of events against both: each takes three bytes, for the source and the time since the last.
func agree(t *testing.T, limits Limits, script []byte) {
	l, o, now := NewLimiter(limits), &oracle{limits: limits}, began
	for i := 0; i+3 <= len(script); i += 3 {
		b := script[i : i+3]
		a := netip.AddrFrom4([4]byte{198, 51, 100, b[0] % 40})
		switch b[0] >> 6 {
		case 1:
			a = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 7: b[0] % 8, 15: b[1]})
		case 2:
			a = netip.AddrFrom16(a.As16())
		}
		step := time.Duration(b[1]) * limits.Global.Every / 8
		if b[2]&7 == 0 {
			step = -step * 4 // a clock that is set back
		} else if b[2]&7 == 1 {
			step *= time.Duration(b[2])
		}
		now = now.Add(step)
		if got, want := l.Allow(a, now), o.allow(a, now); got != want {
			t.Fatalf("event %d, %v at %v: %v, the oracle says %v", i/3, a, now.Sub(began), got, want)
		}
		if len(l.index) > limits.Sources || len(l.table) > limits.Sources+1 {
			t.Fatalf("%d sources in the index, %d in the table, of %d at most", len(l.index), len(l.table)-1, limits.Sources)
		}
		if b[2] == 255 || i+6 > len(script) {
			want, total := o.report()
			var got []string
			for _, s := range l.Report() {
				if total -= s.Count; s.Source.IsValid() {
					got = append(got, fmt.Sprint(s.Count))
				}
			}
			if !slices.Equal(got, want) || total != 0 {
				t.Fatalf("event %d: reported %v, the oracle %v; %d are missing", i/3, got, want, int64(total))
			}
		}
	}
}

func TestLimiterAgreesWithTheSlowOne(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		limits := Limits{Source: Rate{1 + rng.IntN(4), time.Duration(1+rng.IntN(9)) * time.Second},
			Global: Rate{1 + rng.IntN(30), time.Duration(1+rng.IntN(900)) * time.Millisecond}, Sources: 1 + rng.IntN(45)}
		script := make([]byte, 3*1000)
		for i := range script {
			script[i] = byte(rng.Uint32())
		}
		agree(t, limits, script)
	}
}

func FuzzLimiter(f *testing.F) {
	f.Add(uint8(1), uint8(3), uint8(2), []byte{1, 0, 5, 1, 0, 5, 2, 9, 0, 1, 255, 1, 70, 1, 255})
	f.Add(uint8(4), uint8(9), uint8(1), []byte("abcabcdefabcxyzabcabc"))
	f.Fuzz(func(t *testing.T, burst, global, sources uint8, script []byte) {
		agree(t, Limits{Source: Rate{1 + int(burst), time.Second}, Global: Rate{1 + int(global), 100 * time.Millisecond}, Sources: 1 + int(sources)}, script)
	})
}

func TestLoudSourceDoesNotSilenceAnother(t *testing.T) {
	l, loud, quiet := NewLimiter(StrangerLimits()), netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("192.0.2.1")
	written := 0
	for i := range 60_000 { // a thousand a second, for a minute
		if l.Allow(loud, began.Add(time.Duration(i)*time.Millisecond)) {
			written++
		}
	}
	if written != 10+9 {
		t.Errorf("%d lines of the loud source in a minute, want its 10 at once and 9 more", written)
	}
	if !l.Allow(quiet, began.Add(time.Minute)) {
		t.Error("the quiet source was not heard")
	}
	if got, want := fmt.Sprint(l.Report()), "[{198.51.100.7/32 59981}]"; got != want {
		t.Errorf("reported %s, want %s", got, want)
	}
	if again := l.Report(); len(again) != 0 {
		t.Errorf("reported again: %v", again)
	}
}

func TestAnyNumberOfSourcesWritesOnlyTheGlobalShare(t *testing.T) {
	l, rng, written := NewLimiter(StrangerLimits()), rand.New(rand.NewPCG(3, 4)), 0
	for i := range 500_000 { // a day of six a second, each of an address never seen
		a := netip.AddrFrom4([4]byte{byte(1 + rng.IntN(220)), byte(rng.Uint32()), byte(rng.Uint32()), byte(rng.Uint32())})
		if l.Allow(a, began.Add(time.Duration(i)*(24*time.Hour/500_000))) {
			written++
		}
	}
	if written > 86_500 || written < 86_400 {
		t.Errorf("%d lines in a day, want 86,400 and the burst of 100 at most", written)
	}
	var sum uint64
	list := l.Report()
	for _, s := range list {
		sum += s.Count
	}
	if len(list) > reported+1 || sum != uint64(500_000-written) {
		t.Errorf("%d entries report %d, want at most %d and %d", len(list), sum, reported+1, 500_000-written)
	}
}

func TestLimiterAllocatesNothing(t *testing.T) {
	l, i := full(), 0
	if n := testing.AllocsPerRun(20_000, func() { l.Allow(stranger(i), began.Add(time.Duration(i)*time.Millisecond)); i++ }); n != 0 {
		t.Errorf("%v allocations an event", n)
	}
}

func stranger(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

func full() *Limiter {
	l := NewLimiter(StrangerLimits())
	for i := range 3 * l.limits.Sources {
		l.Allow(stranger(1<<20+i), began)
	}
	return l
}

func BenchmarkAllow(b *testing.B) {
	for name, sources := range map[string]int{"one source": 1, "all known": 4000, "always another": 1 << 24} {
		b.Run(name, func(b *testing.B) {
			l, i := full(), 0
			b.ReportAllocs()
			for b.Loop() {
				l.Allow(stranger(i%sources), began.Add(time.Duration(i)*time.Microsecond))
				i++
			}
		})
	}
}
