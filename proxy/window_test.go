package proxy

import (
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWhatASlowReaderHasNotTakenDoesNotPileUp(t *testing.T) {
	l := startLab(t, openConfig())
	flood := func(c *net.TCPConn) {
		for b := make([]byte, 1<<20); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}
	sip := func(c *net.TCPConn) { // 6 MB a second at most, of which much is there at once
		for range 600 {
			if _, err := io.ReadFull(c, make([]byte, 64<<10)); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	for _, c := range []struct {
		what           string
		client, server func(*net.TCPConn)
		fast           func(*link) *net.TCPConn
	}{
		{"down", sip, flood, func(l *link) *net.TCPConn { return l.tunnel.server }},
		{"up", flood, sip, func(l *link) *net.TCPConn { return l.client }},
	} {
		over := make(chan struct{})
		once := func(fn func(*net.TCPConn)) func(*net.TCPConn) {
			return func(c *net.TCPConn) { defer close(over); fn(c); c.Close() }
		}
		client, server := c.client, once(c.server)
		if c.what == "down" {
			client, server = once(c.client), c.server
		}
		at := serveOutside(t, outsideHost+":0", server)
		go client(l.tunnel("10.77.0.2", at.String()))
		last, most := 0, 0
		for done := false; !done; {
			select {
			case <-over:
				done = true
			case <-time.After(50 * time.Millisecond):
				for _, link := range l.links.appendAll(nil) {
					link.mu.Lock()
					if link.tunnel != nil {
						if raw, err := c.fast(link).SyscallConn(); err == nil {
							raw.Control(func(fd uintptr) { last, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
							most = max(most, last)
						}
					}
					link.mu.Unlock()
				}
			}
		}
		if last == 0 || last > 4*windowLeast { // twice for what the kernel counts, and less than twice for what is not changed
			t.Errorf("%s: %d bytes wait for a slow reader, %d at most before", c.what, last, most)
		}
		l.next()
	}
}

func TestWindowFollowsTheWayAndTheReader(t *testing.T) {
	for _, c := range []struct {
		roundTrip time.Duration
		rate      float64
		want      int
	}{
		{0, 0, windowLeast}, {time.Millisecond, 1e6, windowLeast}, {8 * time.Millisecond, 0, 1e6}, {time.Millisecond, 64e6, 2e6},
		{time.Second, 0, windowMost}, {0, 2e9, windowMost},
	} {
		if got := window(c.roundTrip, c.rate); got != c.want {
			t.Errorf("%v, %g a second: %d, want %d", c.roundTrip, c.rate, got, c.want)
		}
	}
}
