package proxy

import (
	"io"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDivide(t *testing.T) {
	inf := math.Inf(1)
	for _, tt := range []struct {
		limit       float64
		wants, want []float64
	}{
		{100, nil, nil},
		{100, []float64{0}, []float64{100}},
		{100, []float64{inf}, []float64{100}},
		{100, []float64{0, 0, 0, 0}, []float64{25, 25, 25, 25}},
		{100, []float64{inf, inf}, []float64{50, 50}},
		{100, []float64{inf, 0, 0, 0}, []float64{100, 25, 25, 25}},
		{100, []float64{10, inf}, []float64{10, 90}},
		{100, []float64{10, 40, inf, inf}, []float64{10, 30, 30, 30}},
		{100, []float64{10, 20}, []float64{45, 55}},
		{100, []float64{60, 70}, []float64{50, 50}},
		{inf, []float64{0, 5, inf}, []float64{inf, inf, inf}},
	} {
		got := divide(tt.limit, tt.wants, nil)
		for i := range got {
			if math.Abs(got[i]-tt.want[i]) > 1e-9 && got[i] != tt.want[i] {
				t.Errorf("%v of %v: %v, want %v", tt.limit, tt.wants, got, tt.want)
				break
			}
		}
	}
	for range 20000 {
		limit, wants := rand.Float64()*1e9+1, make([]float64, 1+rand.IntN(20))
		sending := 0.0
		for i := range wants {
			switch rand.IntN(3) {
			case 0:
				wants[i] = math.Inf(1)
				sending++
			case 1:
				wants[i] = rand.Float64() * limit / 5
				sending++
			}
		}
		silent, loud := 0.0, 0.0
		for i, r := range divide(limit, wants, nil) {
			if wants[i] == 0 {
				silent += r
				continue
			}
			loud += r
			if r < min(wants[i], limit/sending)*(1-1e-9) {
				t.Fatalf("%v of %v: %v is less than a fair part", limit, wants, r)
			}
		}
		if silent > limit*(1+1e-9) || loud > limit*(1+1e-9) || sending > 0 && loud < limit*(1-1e-9) {
			t.Fatalf("%v of %v: %v to silent ones, %v to the others", limit, wants, silent, loud)
		}
	}
}

// A slow machine moves less, which passes: more than the limit is what fails.
func TestBandwidthIsKeptBothWaysAndStaysSpliced(t *testing.T) {
	const second = 10 << 20 // bytes
	cfg := openConfig()
	cfg.PerUserBandwidth = second * 8
	l := startLab(t, cfg)
	var up atomic.Int64
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		go io.Copy(c, endless{})
		b := make([]byte, 64<<10)
		for {
			n, err := c.Read(b)
			if up.Add(int64(n)); err != nil {
				return
			}
		}
	})
	var down atomic.Int64
	var all sync.WaitGroup
	began := time.Now()
	for range 3 {
		c := l.tunnel("10.77.0.2", at.String())
		go io.Copy(c, endless{})
		all.Go(func() {
			b := make([]byte, 64<<10)
			for time.Since(began) < 3*time.Second {
				n, _ := c.Read(b)
				down.Add(int64(n))
			}
		})
	}
	spliced := false
	for time.Since(began) < 2*time.Second {
		spliced = spliced || pipes(t) > 0
		time.Sleep(10 * time.Millisecond)
	}
	all.Wait()
	passed := time.Since(began).Seconds()
	t.Logf("%.1f MB/s down, %.1f MB/s up, of %d MB/s", float64(down.Load())/passed/(1<<20), float64(up.Load())/passed/(1<<20), second>>20)
	// Three that begin have up to twice the limit before it is shared for the first time.
	for _, n := range []int64{down.Load(), up.Load()} {
		if most := 1.1*second*passed + 2*second*paceEvery.Seconds(); float64(n) > most || n == 0 {
			t.Errorf("%d bytes in %.2f s, want at most %.0f", n, passed, most)
		}
	}
	if !spliced {
		t.Error("nothing was spliced")
	}
	for _, link := range l.links.of(l.alice.ID) {
		link.end(Shutdown)
	}
}

// Each connection that begins has a part of the limit at once, and its socket's first burst. Whoever opens fifty new ones a second
// gains half of the limit by it, and no more.
func TestReconnectingGivesHalfALimitAtMost(t *testing.T) {
	const second = 10 << 20 // bytes
	cfg := openConfig()
	cfg.PerUserBandwidth = second * 8
	l := startLab(t, cfg)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		go io.Copy(io.Discard, c)
		io.Copy(c, endless{})
	})
	var down atomic.Int64
	var all sync.WaitGroup
	read := func(c *net.TCPConn, until time.Time) {
		c.SetReadDeadline(until)
		b := make([]byte, 64<<10)
		for {
			n, err := c.Read(b)
			if down.Add(int64(n)); err != nil {
				c.Close()
				return
			}
		}
	}
	began := time.Now()
	end := began.Add(4 * time.Second)
	stays := l.tunnel("10.77.0.2", at.String())
	all.Go(func() { read(stays, end) })
	for time.Now().Before(end) {
		for range 8 {
			c := l.tunnel("10.77.0.2", at.String())
			all.Go(func() { read(c, time.Now().Add(150*time.Millisecond)) })
		}
		time.Sleep(150 * time.Millisecond)
	}
	all.Wait()
	passed := time.Since(began).Seconds()
	t.Logf("%.1f MB/s of %d MB/s", float64(down.Load())/passed/(1<<20), second>>20)
	// What is owed at the end is what they may be ahead.
	if most := 1.6*second*passed + 2*second*paceRepay.Seconds(); float64(down.Load()) > most {
		t.Errorf("%d bytes in %.2f s, want at most %.0f", down.Load(), passed, most)
	}
	eventually(t, "nothing is owed for ever", func() bool {
		l.debts.mu.Lock()
		defer l.debts.mu.Unlock()
		return len(l.debts.users) == 0
	})
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

func (l *lab) rates(user string) (down []uint64) {
	for _, link := range l.links.all() {
		link.mu.Lock()
		if link.who.user == user && link.tunnel != nil {
			raw, _ := link.client.SyscallConn()
			raw.Control(func(fd uintptr) {
				rate, err := unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE)
				if err != nil {
					l.t.Error(err)
				}
				down = append(down, rate)
			})
		}
		link.mu.Unlock()
	}
	return down
}

func TestBandwidthGoesToThoseWhoUseIt(t *testing.T) {
	const alices, everybodys = 8 << 20, 12 << 20 // bytes a second
	cfg := openConfig()
	cfg.PerUserBandwidth, cfg.Bandwidth = alices*8, everybodys*8
	l := startLab(t, cfg)
	l.people.put("10.77.0.3", "bob", "operators")
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			io.Copy(c, endless{})
		}
	})
	about := func(rate uint64, want float64) bool {
		return float64(rate) > 0.7*want && float64(rate) < 1.3*want
	}
	idle, first := l.tunnel("10.77.0.2", at.String()), l.tunnel("10.77.0.2", at.String())
	defer idle.Close()
	begin := func(c *net.TCPConn) {
		io.WriteString(c, "x")
		go io.Copy(io.Discard, c)
	}
	begin(first)
	eventually(t, "all of it for the one who sends, half for who may begin", func() bool {
		r := l.rates("alice")
		return len(r) == 2 && about(max(r[0], r[1]), alices) && about(min(r[0], r[1]), alices/2)
	})
	begin(l.tunnel("10.77.0.2", at.String()))
	eventually(t, "half for each of two who send", func() bool {
		n := 0
		for _, r := range l.rates("alice") {
			if about(r, alices/2) {
				n++
			}
		}
		return n == 2
	})
	begin(l.tunnel("10.77.0.3", at.String()))
	eventually(t, "half of what is there for each of two users", func() bool {
		r := l.rates("bob")
		return len(r) == 1 && about(r[0], everybodys/2)
	})
	cfg.PerUserBandwidth, cfg.Bandwidth = 0, 0
	if err := l.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no limit any more", func() bool {
		for _, r := range append(l.rates("alice"), l.rates("bob")...) {
			if r != paceFreely {
				return false
			}
		}
		return true
	})
}
