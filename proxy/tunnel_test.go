package proxy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// tunnel opens one through the proxy. The connection is past the answer.
func (l *lab) tunnel(from, target string) *net.TCPConn {
	l.t.Helper()
	c := l.from(from)
	if status, body := ask(l.t, c, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n\r\n"); status != 200 {
		l.t.Fatalf("CONNECT %s: %d %s", target, status, body)
	}
	return c
}

func TestHalfCloseIsKeptBothWays(t *testing.T) {
	l := startLab(t, openConfig())
	// The server answers only after the client has ended its side, and the other way round.
	late := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		c.Write(bytes.ToUpper(b))
	})
	c := l.tunnel("10.77.0.2", late.String())
	io.WriteString(c, "question")
	c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "QUESTION" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	if a := l.next(); a.Up != 8 || a.Down != 8 || a.End != Closed || a.Decision.Reason != Allowed {
		t.Errorf("logged %+v", a)
	}
	got := make(chan string, 1)
	early := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		io.WriteString(c, "greeting")
		c.CloseWrite()
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	c = l.tunnel("10.77.0.2", early.String())
	if b, err := io.ReadAll(c); string(b) != "greeting" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	io.WriteString(c, "afterwards")
	c.CloseWrite()
	if s := <-got; s != "afterwards" {
		t.Errorf("the server got %q", s)
	}
}

// A long tunnel is counted while it lasts, and to the byte at its end.
func TestTrafficIsToldWhileItMoves(t *testing.T) {
	cfg := openConfig()
	cfg.Idle = 10 * time.Second // and looked at every second
	l := newLab(t, cfg)
	var up, down atomic.Int64
	l.WatchTraffic(func(user string, u, d int64) {
		if up.Add(u); user != "alice" || u < 0 || d < 0 {
			t.Errorf("%s: %d up, %d down", user, u, d)
		}
		down.Add(d)
	})
	l.run()
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(c, c) })
	c := l.tunnel("10.77.0.2", at.String())
	for n := int64(1); n <= 2; n++ {
		io.WriteString(c, "hello")
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "what has moved so far is told", func() bool { return up.Load() == 5*n && down.Load() == 5*n })
	}
	if l.Live() != 1 {
		t.Error("it was told at the end only")
	}
	io.WriteString(c, "!")
	c.CloseWrite()
	io.Copy(io.Discard, c)
	eventually(t, "the rest is told", func() bool { return up.Load() == 11 && down.Load() == 11 })
}

func TestAResetIsNeverTurnedIntoAnEnd(t *testing.T) {
	l := startLab(t, openConfig())
	results := make(chan error, 1)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		b := make([]byte, 1)
		io.ReadFull(c, b)
		switch b[0] {
		case 'r': // the server resets
			io.WriteString(c, "half")
			time.Sleep(50 * time.Millisecond)
			c.SetLinger(0)
		default: // it reads on and says how that ended
			_, err := io.Copy(io.Discard, c)
			for err == nil { // an end came first; what follows it?
				if _, err = c.Write([]byte("x")); err == nil {
					time.Sleep(20 * time.Millisecond)
				}
			}
			results <- err
		}
	})
	c := l.tunnel("10.77.0.2", at.String())
	io.WriteString(c, "r")
	if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server's reset: %q, %v", b, err)
	}
	if a := l.next(); a.End != ServerReset {
		t.Errorf("logged %+v", a)
	}
	c = l.tunnel("10.77.0.2", at.String())
	io.WriteString(c, "c")
	c.SetLinger(0)
	c.Close()
	if err := <-results; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client's reset: %v", err)
	}
	if a := l.next(); a.End != ClientReset {
		t.Errorf("logged %+v", a)
	}
	// A reset after an end.
	c = l.tunnel("10.77.0.2", at.String())
	io.WriteString(c, "c")
	c.CloseWrite()
	time.Sleep(50 * time.Millisecond)
	c.SetLinger(0)
	c.Close()
	if err := <-results; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("client's late reset: %v", err)
	}
	if a := l.next(); a.End != ClientReset && a.End != ServerReset {
		t.Errorf("logged %+v", a)
	}
}

func TestEarlyDataArrivesOnceAndFirst(t *testing.T) {
	l := startLab(t, openConfig())
	got := make(chan string, 1)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { b, _ := io.ReadAll(c); got <- string(b) })
	for _, n := range []int{1, 1000, 20000, 100000} {
		early := strings.Repeat("0123456789", n/10+1)[:n]
		c := l.from("10.77.0.2")
		if status, _ := ask(t, c, "CONNECT "+at.String()+" HTTP/1.0\r\n\r\n"+early); status != 200 {
			t.Fatal(status)
		}
		io.WriteString(c, "later")
		c.CloseWrite()
		if s := <-got; s != early+"later" {
			t.Errorf("%d early bytes: %d arrived", n, len(s))
		}
		if a := l.next(); a.Up != int64(n+5) {
			t.Errorf("counted %d up", a.Up)
		}
	}
}

func TestBulkIsWholeBothWays(t *testing.T) {
	const size = 64 << 20
	l := startLab(t, openConfig())
	sum := make(chan [32]byte, 2)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		go func() {
			h := sha256.New()
			io.Copy(h, c)
			sum <- [32]byte(h.Sum(nil))
		}()
		writePattern(c, size, 1)
		c.CloseWrite()
		<-time.After(30 * time.Second)
	})
	c := l.tunnel("10.77.0.2", at.String())
	want := make(chan [32]byte, 1)
	go func() {
		want <- writePattern(c, size, 2)
		c.CloseWrite()
	}()
	h := sha256.New()
	if n, err := io.Copy(h, c); n != size || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if [32]byte(h.Sum(nil)) != writePattern(io.Discard, size, 1) {
		t.Error("what came down is not what was sent")
	}
	if <-want != <-sum {
		t.Error("what went up is not what was sent")
	}
	if a := l.next(); a.Up != size || a.Down != size {
		t.Errorf("counted %d up, %d down", a.Up, a.Down)
	}
}

// writePattern writes in odd pieces, with pauses that make a relay change its ways, and returns the hash.
func writePattern(w io.Writer, size int, seed byte) [32]byte {
	h := sha256.New()
	b := make([]byte, 300001)
	for i := range b {
		b[i] = byte(i*int(seed)) ^ byte(i>>8)
	}
	for i := 0; size > 0; i++ {
		n := min(size, 1+i*7919%len(b))
		h.Write(b[:n])
		w.Write(b[:n])
		size -= n
		if i%40 == 39 && w != io.Discard {
			time.Sleep(20 * time.Millisecond)
		}
	}
	return [32]byte(h.Sum(nil))
}

func TestAStalledBulkTransferHoldsNoPipe(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		c.Write(make([]byte, 20<<20))
		io.Copy(io.Discard, c)
	})
	runtime.GC() // Go keeps idle pipes until the second garbage collection
	runtime.GC()
	before := pipes(t)
	c := l.tunnel("10.77.0.2", at.String())
	if _, err := io.ReadFull(c, make([]byte, 20<<20)); err != nil {
		t.Fatal(err)
	}
	if pipes(t) == before {
		t.Error("nothing was spliced")
	}
	eventually(t, "no more pipes than before", func() bool {
		runtime.GC()
		return pipes(t) <= before
	})
	io.WriteString(c, "still there")
	c.CloseWrite()
	if a := l.next(); a.Down != 20<<20 || a.Up != 11 || a.End != Closed {
		t.Errorf("logged %+v", a)
	}
}

func pipes(t *testing.T) (n int) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

func certificate(t *testing.T, names ...string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// pieces writes a few bytes at a time.
type pieces struct {
	net.Conn
	size int
}

func (p pieces) Write(b []byte) (n int, err error) {
	if p.size == 0 {
		return p.Conn.Write(b)
	}
	for n < len(b) && err == nil {
		var m int
		m, err = p.Conn.Write(b[n:min(n+p.size, len(b))])
		n += m
		time.Sleep(time.Millisecond)
	}
	return n, err
}
