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
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		for b := make([]byte, 1<<20); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	waiting := func() (n int) {
		for _, link := range l.links.appendAll(nil) {
			link.mu.Lock()
			raw, err := link.tunnel.server.SyscallConn()
			link.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
			if err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	c := l.tunnel("10.77.0.2", at.String())
	most := 0
	for range 300 { // 6 MB a second at most, of which much is there at once
		if _, err := io.ReadFull(c, make([]byte, 64<<10)); err != nil {
			t.Fatal(err)
		}
		most = max(most, waiting())
		time.Sleep(10 * time.Millisecond)
	}
	if n := waiting(); n == 0 || n > 3*windowLeast {
		t.Errorf("%d bytes wait for a slow reader, %d at most before", n, most)
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
