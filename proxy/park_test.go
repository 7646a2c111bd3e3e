package proxy

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/session"

	"golang.org/x/sys/unix"
)

// rest sends who is silent to the parking, as the sweep does.
func (l *lab) rest() {
	for _, link := range l.links.all() {
		if t := link.now(); t != nil {
			t.rest()
		}
	}
}

func (l *lab) awaitParked(n int) {
	l.t.Helper()
	eventually(l.t, "so many directions parked", func() bool {
		l.rest()
		return l.parking.count() == n
	})
}

// parked opens tunnels to at, says a word on each and waits until all are parked.
func (l *lab) parked(n int, at string) (tunnels []*net.TCPConn) {
	l.t.Helper()
	for range n {
		c := l.tunnel("10.77.0.2", at)
		io.WriteString(c, "word")
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			l.t.Fatal(err)
		}
		tunnels = append(tunnels, c)
	}
	l.awaitParked(2 * n)
	return tunnels
}

func TestAParkedTunnelGoesOnAsIfNothingHadBeen(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		b := make([]byte, 4)
		for {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			switch string(b) {
			case "bulk":
				c.Write(make([]byte, 20<<20))
			case "shut":
				c.CloseWrite()
			case "kill":
				c.SetLinger(0)
				return
			default:
				c.Write(b)
			}
		}
	})
	c := l.parked(7, at.String())
	say := func(c *net.TCPConn, word string) { io.WriteString(c, word) }
	// It talks, and parks again, and talks.
	for range 2 {
		say(c[0], "more")
		b := make([]byte, 4)
		if _, err := io.ReadFull(c[0], b); err != nil || string(b) != "more" {
			t.Errorf("%q, %v", b, err)
		}
		l.awaitParked(14)
	}
	// Much comes.
	say(c[1], "bulk")
	if n, err := io.CopyN(io.Discard, c[1], 20<<20); err != nil {
		t.Errorf("%d of 20 MB, %v", n, err)
	}
	// The client ends its side, the server its own.
	c[2].CloseWrite()
	if b, err := io.ReadAll(c[2]); len(b) > 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if a := l.next(); a.End != Closed || a.Up != 4 || a.Down != 4 {
		t.Errorf("logged %+v", a)
	}
	// Half of it ends, and what is left parks and goes on.
	say(c[3], "shut")
	if b, err := io.ReadAll(c[3]); len(b) > 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	l.awaitParked(11)
	c[3].CloseWrite()
	if a := l.next(); a.End != Closed || a.Up != 8 {
		t.Errorf("logged %+v", a)
	}
	// Resets, from either side.
	say(c[4], "kill")
	if _, err := c[4].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server's reset: %v", err)
	}
	if a := l.next(); a.End != ServerReset {
		t.Errorf("logged %+v", a)
	}
	c[5].SetLinger(0)
	c[5].Close()
	if a := l.next(); a.End != ClientReset {
		t.Errorf("logged %+v", a)
	}
	// The session's end.
	l.people.drop("10.77.0.2")
	l.SessionEvent(session.Event{Session: l.alice, Ended: session.Kicked})
	for range 3 {
		if a := l.next(); a.End != Reason(session.Kicked) {
			t.Errorf("logged %+v", a)
		}
	}
	for _, i := range []int{0, 1, 6} {
		if _, err := c[i].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after the session's end: %v", err)
		}
	}
	if n := l.parking.count(); n != 0 {
		t.Errorf("%d are parked still", n)
	}
}

func TestParkedTunnelsEndWithTheServer(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	l.parked(3, at.String())
	l.stop()
	for range 3 {
		if a := l.next(); a.End != Shutdown {
			t.Errorf("logged %+v", a)
		}
	}
}

// All are sent to the parking all the time, so that everything meets everything.
func TestParkingLosesNothing(t *testing.T) {
	l := startLab(t, openConfig())
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
				l.rest()
			}
		}
	}()
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	var all sync.WaitGroup
	for i := range 16 {
		c := l.tunnel("10.77.0.2", at.String())
		all.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(i)))
			out, in := make([]byte, 100<<10), make([]byte, 100<<10)
			for range 60 {
				n := 1 + r.IntN(len(out))
				for j := range out[:n] {
					out[j] = byte(r.Uint32())
				}
				written := make(chan error, 1)
				go func() { _, err := c.Write(out[:n]); written <- err }()
				_, err := io.ReadFull(c, in[:n])
				if err := errors.Join(err, <-written); err != nil || string(in[:n]) != string(out[:n]) {
					t.Errorf("%d bytes: %v", n, err)
					return
				}
				time.Sleep(time.Duration(r.IntN(10)) * time.Millisecond)
			}
			c.CloseWrite()
			if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
				t.Errorf("after all: %q, %v", b, err)
			}
		})
	}
	all.Wait()
}

// Kept alive in step, thousands of tunnels that began at once would overrun a queue of the kernel, be unheard, and be reset.
func TestParkedTunnelsAreKeptAliveApart(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	l.parked(20, at.String())
	times := map[int]int{}
	for _, link := range l.links.all() {
		for _, c := range []*net.TCPConn{link.client, link.tunnel.server} {
			raw, err := c.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := raw.Control(func(fd uintptr) {
				on, err1 := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
				seconds, err2 := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
				if on != 1 || seconds < 60 || seconds > 120 || err1 != nil || err2 != nil {
					t.Errorf("kept alive: %d, after %d s of silence: %v, %v", on, seconds, err1, err2)
				}
				times[seconds]++
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(times) < 8 {
		t.Errorf("40 directions share %d times: %v", len(times), times)
	}
}

func TestLookingAtSilentTunnelsMakesNoGarbage(t *testing.T) {
	cfg := openConfig()
	cfg.Idle, cfg.Bandwidth = time.Hour, 1<<40
	l := startLab(t, cfg)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	l.parked(20, at.String())
	st, links, now := l.state.Load(), l.links.all(), time.Now()
	var sh sharing
	for what, look := range map[string]func(){
		"the sweep": func() { l.look(st, links, now, 0) },
		"the pacer": func() { l.share(st, paceEvery, &sh) },
	} {
		if n := testing.AllocsPerRun(20, look); n > 5 { // and what others make meanwhile
			t.Errorf("%s: %v allocations for 20 silent tunnels", what, n)
		}
	}
}
