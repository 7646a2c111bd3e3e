package firewall

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/knock"
)

// steps is a StepStore in memory.
type steps struct {
	mu    sync.Mutex
	floor uint64
	text  []byte
}

func (s *steps) TokenStep() (uint64, error) { return s.floor, nil }

func (s *steps) TokenSteps() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text, nil
}

func (s *steps) SetTokenSteps(text []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text = text
	return nil
}

func users(n int) (list []knock.Credential) {
	for i := range n {
		list = append(list, knock.Credential{ID: uint32(i + 1), Secret: knock.Secret([]byte("master"), "user", uint32(i))})
	}
	return list
}

func TestTenThousandUsersOpenAtTheFirstTry(t *testing.T) {
	const all, some = 10000, 1000
	r := newRoom(t, example())
	tokens, err := NewTokens(r.fw, true, knock.ServerID{7}, 30*time.Second, &steps{}, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	list := users(all)
	now := time.Now()
	start := time.Now()
	if err := tokens.Set(list, now); err != nil {
		t.Fatal(err)
	}
	if err := tokens.Refresh(now); err != nil {
		t.Fatal(err)
	}
	t.Logf("three steps of %d users loaded in %v", all, time.Since(start).Round(time.Millisecond))
	var raw int
	if err := r.Client.Do(func() (err error) {
		raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(raw)
	chosen := rand.New(rand.NewPCG(1, 2)).Perm(all)[:some]
	source := netip.MustParseAddr("198.18.64.0")
	for _, index := range []uint8{0, 1} { // twice in the same step
		for _, u := range chosen {
			token := knock.NewToken(list[u].Secret, knock.ServerID{7}, knock.StepAt(now, 30*time.Second), index)
			if err := unix.Sendto(raw, udp4(source, r.Bastion.Addr, 1194, token[:]), 0, &unix.SockaddrInet4{Addr: r.Bastion.Addr.As4()}); err != nil {
				t.Fatal(err)
			}
			source = source.Next()
			time.Sleep(20 * time.Microsecond)
		}
	}
	times := map[uint32]int{}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && len(times) < some; time.Sleep(50 * time.Millisecond) {
		windows, err := r.fw.Windows()
		if err != nil {
			t.Fatal(err)
		}
		clear(times)
		for _, w := range windows {
			times[w.Credential]++
		}
	}
	for _, u := range chosen {
		if times[uint32(u+1)] != 2 {
			t.Fatalf("user %d opened %d windows, want 2 (%d users opened some)", u+1, times[uint32(u+1)], len(times))
		}
	}
	if len(times) != some {
		t.Errorf("%d users opened windows, want %d", len(times), some)
	}
}

func TestTenThousandSessionsComeBackAtAStartAndAfterAnotherToolsFlush(t *testing.T) {
	f := applied(t, example())
	admitted, services, peers := map[netip.Addr]time.Time{}, map[netip.Addr][]uint16{}, map[netip.AddrPort]time.Time{}
	inner, outer, outer6 := netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("198.18.64.0"), netip.MustParseAddr("2001:db8::1")
	for range 10_000 {
		inner, outer, outer6 = inner.Next(), outer.Next(), outer6.Next()
		admitted[inner], services[inner] = soon(), []uint16{22, 23}
		peers[netip.AddrPortFrom(outer, 5000)], peers[netip.AddrPortFrom(outer6, 5000)] = soon(), soon()
	}
	counts := func(what string) {
		t.Helper()
		fill, err := f.Fill()
		if err != nil {
			t.Fatal(err)
		}
		for set, want := range map[string]int{"admitted": 10_000, "service": 20_000, "peer4": 10_000, "peer6": 10_000} {
			if got := fill[set].Elements; got != want {
				t.Errorf("%s: set %s holds %d, want %d", what, set, got, want)
			}
		}
	}
	start := time.Now()
	if err := f.Resume(admitted, services, peers); err != nil {
		t.Fatal(err)
	}
	t.Logf("written in %v", time.Since(start).Round(time.Millisecond))
	counts("at a start")
	run(t, "", "nft", "flush", "ruleset")
	repair, err := f.check(time.Now(), false)
	if err != nil || !repair.restored {
		t.Fatalf("%+v, %v", repair, err)
	}
	t.Logf("repaired in %v", repair.took.Round(time.Millisecond))
	counts("after a flush")
}

// What is loaded of a step grows with the time, is whole when the step before it begins, and never loaded below the floor.
func TestStepsAreLoadedLittleByLittle(t *testing.T) {
	f := New(testLog(t), private(t))
	if _, err := f.Apply(example()); err != nil {
		t.Fatal(err)
	}
	const length = 30 * time.Second
	store := &steps{}
	tokens, err := NewTokens(f, true, knock.ServerID{}, length, store, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	step := knock.StepAt(now, length)
	list := users(100)
	if err := tokens.Set(list, now); err != nil {
		t.Fatal(err)
	}
	loaded := func() int {
		f.mu.Lock()
		defer f.mu.Unlock()
		e, err := f.elementsLocked("tokens")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	at := func(step int64, age time.Duration) time.Time { return knock.Start(step, length).Add(age) }
	const whole = 100 * knock.Indexes
	for _, c := range []struct {
		age  time.Duration
		want int
	}{{0, 3*whole + knock.Indexes}, {15 * time.Second, 3*whole + 51*knock.Indexes}, {29 * time.Second, 3*whole + 97*knock.Indexes}} {
		if err := tokens.Refresh(at(step, c.age)); err != nil {
			t.Fatal(err)
		}
		if got := loaded(); got != c.want {
			t.Errorf("%v into the step %d tokens are loaded, want %d", c.age, got, c.want)
		}
	}
	if want := (stepHistory{}).with(step-1, 0).with(step, 0).with(step+1, 0).with(step+2, 0).Ranges; !reflect.DeepEqual(tokens.past.Ranges, want) {
		t.Errorf("recorded as loaded %v, want %v", tokens.past.Ranges, want)
	}
	// One user leaves: his tokens of every step are gone, and nobody else's.
	if err := tokens.Set(list[1:], at(step, 29*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := tokens.Refresh(at(step, 29*time.Second)); err != nil {
		t.Fatal(err)
	}
	if got, want := loaded(), 3*99*knock.Indexes+96*knock.Indexes; got != want {
		t.Errorf("after one left %d tokens are loaded, want %d", got, want)
	}
	// The clock is set back an hour: nothing of then is loaded again.
	if err := tokens.Refresh(at(step-120, 0)); err != nil {
		t.Fatal(err)
	}
	if got, want := loaded(), 3*99*knock.Indexes+96*knock.Indexes; got != want {
		t.Errorf("with the clock set back %d tokens are loaded, want %d", got, want)
	}
	// A table that is lost with the daemon: what was loaded before stays out.
	again, err := NewTokens(f, true, knock.ServerID{}, length, store, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.FlushTokens(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Set(list, now), again.Refresh(at(step, 0))); err != nil {
		t.Fatal(err)
	}
	if got := loaded(); got != 0 {
		t.Errorf("%d tokens of steps that were loaded before are loaded again", got)
	}
	if err := again.Refresh(at(step+1, 29*time.Second)); err != nil {
		t.Fatal(err)
	}
	if got := loaded(); got == 0 {
		t.Error("the next step does not come in")
	}
}

func BenchmarkRefreshTenThousandUsers(b *testing.B) {
	f := benchFirewall(b)
	tokens, err := NewTokens(f, true, knock.ServerID{}, 30*time.Second, &steps{}, testLog(b))
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	if err := errors.Join(tokens.Set(users(10000), now), tokens.Refresh(now)); err != nil {
		b.Fatal(err)
	}
	longest := time.Duration(0)
	for b.Loop() {
		now = now.Add(500 * time.Millisecond) // as Run does
		start := time.Now()
		if err := tokens.Refresh(now); err != nil {
			b.Fatal(err)
		}
		longest = max(longest, time.Since(start))
	}
	b.ReportMetric(float64(longest.Microseconds())/1000, "ms-longest")
}
