package proxy

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rawPair is a client and a server of bare descriptors: what these benchmarks count of Go's memory is the proxy's alone.
type rawPair struct {
	proxy  unix.SockaddrInet4
	origin int
	ask    []byte
}

func newRawPair(b testing.TB, l *lab) *rawPair {
	p := &rawPair{}
	at := netip.MustParseAddrPort(l.addr)
	p.proxy = unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	var err error
	outside(func() {
		if p.origin, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			if err = unix.Bind(p.origin, &unix.SockaddrInet4{Addr: netip.MustParseAddr(outsideHost).As4()}); err == nil {
				err = unix.Listen(p.origin, 4096)
			}
		}
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(p.origin) })
	name, err := unix.Getsockname(p.origin)
	if err != nil {
		b.Fatal(err)
	}
	host := net.TCPAddr{IP: net.ParseIP(outsideHost), Port: name.(*unix.SockaddrInet4).Port}
	p.ask = []byte("CONNECT " + host.String() + " HTTP/1.1\r\nHost: " + host.String() + "\r\nUser-Agent: aws-cli/2.17 md/awscrt#0.20\r\nProxy-Connection: Keep-Alive\r\n\r\n")
	return p
}

func (p *rawPair) open(b testing.TB) (client, server int) {
	var buf [256]byte
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.SetsockoptInt(client, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	}
	if err == nil {
		err = unix.Bind(client, &unix.SockaddrInet4{Addr: [4]byte{10, 77, 0, 2}})
	}
	if err == nil {
		err = unix.Connect(client, &p.proxy)
	}
	if err == nil {
		_, err = unix.Write(client, p.ask)
	}
	if err == nil {
		server, _, err = unix.Accept4(p.origin, unix.SOCK_CLOEXEC)
	}
	n := 0
	if err == nil {
		n, err = unix.Read(client, buf[:])
	}
	if err != nil || n < 12 || string(buf[9:12]) != "200" {
		b.Fatalf("%v: %s", err, buf[:n])
	}
	return client, server
}

func cpu() time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func quietLab(b testing.TB) *lab {
	cfg := openConfig()
	cfg.Connections, cfg.PerUserConnections = 1<<20, 1<<20
	l := newLab(b, cfg)
	l.Server.log = slog.New(slog.NewJSONHandler(io.Discard, nil))
	l.run()
	return l
}

// BenchmarkConnect opens a tunnel, exchanges a byte each way, and closes it. CPU includes the client's and server's calls.
// The server closes first: the other way round thousands of ports would wait out their time with the proxy, and looking for a
// free one would be all that is measured.
func BenchmarkConnect(b *testing.B) {
	l := quietLab(b)
	p := newRawPair(b, l)
	b.ReportAllocs()
	began := cpu()
	for b.Loop() {
		c, s := p.open(b)
		var buf [1]byte
		unix.Write(c, buf[:])
		unix.Read(s, buf[:])
		unix.Write(s, buf[:])
		unix.Read(c, buf[:])
		unix.Close(s)
		unix.Read(c, buf[:])
		unix.Close(c)
	}
	b.ReportMetric(float64((cpu()-began).Microseconds())/float64(b.N), "cpu-µs/op")
}

// BenchmarkRelay moves bytes down one tunnel in pieces.
func BenchmarkRelay(b *testing.B) {
	for _, size := range []int{100, 16 << 10, 1 << 20} {
		b.Run(map[int]string{100: "100B", 16 << 10: "16KB", 1 << 20: "1MB"}[size], func(b *testing.B) {
			l := quietLab(b)
			p := newRawPair(b, l)
			c, s := p.open(b)
			defer unix.Close(c)
			defer unix.Close(s)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			out, in := make([]byte, size), make([]byte, size)
			began := cpu()
			for b.Loop() {
				go func() {
					for sent := 0; sent < size; {
						n, err := unix.Write(s, out[sent:])
						if err != nil {
							return
						}
						sent += n
					}
				}()
				for got := 0; got < size; {
					n, err := unix.Read(c, in)
					if err != nil || n == 0 {
						b.Fatal(n, err)
					}
					got += n
				}
			}
			b.ReportMetric((cpu()-began).Seconds()/(float64(b.N)*float64(size)/1e9), "cpu-s/GB")
		})
	}
}

// TestIdleTunnelsAreCheap holds two thousand of them.
func TestIdleTunnelsAreCheap(t *testing.T) {
	const tunnels = 2000
	l := quietLab(t)
	p := newRawPair(t, l)
	files := func() int {
		entries, _ := os.ReadDir("/proc/self/fd")
		return len(entries)
	}
	memory := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	c, s := p.open(t)
	defer unix.Close(c)
	defer unix.Close(s)
	open := make([]int, 0, 2*tunnels)
	defer func() {
		for _, fd := range open {
			unix.Close(fd)
		}
	}()
	m, f := memory(), files()
	for range tunnels {
		c, s := p.open(t)
		open = append(open, c, s)
		var buf [1]byte
		unix.Write(c, buf[:]) // used once, then silent
		unix.Read(s, buf[:])
	}
	fresh := float64(memory()-m) / tunnels / 1024
	l.awaitParked(2*tunnels + 2)
	each := float64(memory()-m) / tunnels / 1024
	fds := float64(files()-f)/tunnels - 2 // the test's own two
	t.Logf("%.1f KB and %.2f descriptors a tunnel, %.1f KB before it parked", each, fds, fresh)
	if limit := 6.0; each > limit && !raceEnabled {
		t.Errorf("%.1f KB a tunnel, more than %v", each, limit)
	}
	if fds > 2.05 {
		t.Errorf("%.2f descriptors a tunnel, more than 2", fds)
	}
}

// The pieces of a CONNECT that are no system calls, as they come.

func BenchmarkHead(b *testing.B) {
	head := []byte("CONNECT s3.us-east-1.amazonaws.com:443 HTTP/1.1\r\nHost: s3.us-east-1.amazonaws.com:443\r\nUser-Agent: aws-cli/2.17 md/awscrt#0.20\r\nProxy-Connection: Keep-Alive\r\n\r\n")
	b.ReportAllocs()
	for b.Loop() {
		n, err := headEnd(head, 0)
		if err != nil {
			b.Fatal(err)
		}
		h, err := parseHead(head[:n])
		if err != nil {
			b.Fatal(err)
		}
		if _, err := h.destination(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkServerName(b *testing.B) {
	hello := hello(b, &tls.Config{ServerName: "s3.us-east-1.amazonaws.com"})
	b.ReportAllocs()
	for b.Loop() {
		if name, err := serverName(hello); name == "" || err != nil {
			b.Fatal(name, err)
		}
	}
}

// BenchmarkResolve asks for a name that is remembered.
func BenchmarkResolve(b *testing.B) {
	r, now := newResolver(), time.Now()
	r.remember(question{"ip4", "www.lab.test"}, finding{addrs: []netip.Addr{netip.MustParseAddr(outsideHost)}, expires: now.Add(time.Hour)}, now)
	b.ReportAllocs()
	for b.Loop() {
		if addrs, err := r.resolve(b.Context(), "ip4", "www.lab.test", now); len(addrs) != 1 || err != nil {
			b.Fatal(addrs, err)
		}
	}
}

// BenchmarkLogLine writes the line of a tunnel.
func BenchmarkLogLine(b *testing.B) {
	l := newLab(b, openConfig())
	l.Server.log = slog.New(slog.NewJSONHandler(io.Discard, nil))
	a := l.begin(&link{who: identity{l.alice.ID, "alice", "laptop", l.alice.Groups}, source: netip.MustParseAddrPort("10.77.0.2:40000")}, "CONNECT", "")
	a.Destination = Destination{Name: "s3.us-east-1.amazonaws.com", Port: 443}
	a.Decision = Decision{Allow: true, Reason: Allowed, Rule: 2, TLS: true}
	a.Status, a.Dialed, a.Up, a.Down, a.End = 200, netip.MustParseAddrPort("198.18.0.2:443"), 1500, 30000, Closed
	b.ReportAllocs()
	for b.Loop() {
		l.done(a)
	}
}

// BenchmarkShare is a look of the pacer at a thousand silent tunnels.
func BenchmarkShare(b *testing.B) {
	cfg := openConfig()
	cfg.Connections, cfg.PerUserConnections, cfg.PerUserBandwidth = 1<<20, 1<<20, 100<<20
	l := newLab(b, cfg)
	l.Server.log = slog.New(slog.DiscardHandler)
	l.run()
	p := newRawPair(b, l)
	for range 1000 {
		client, server := p.open(b)
		b.Cleanup(func() { unix.Close(client); unix.Close(server) })
	}
	st := l.state.Load()
	var sh sharing
	b.ReportAllocs()
	for b.Loop() {
		l.share(st, paceEvery, &sh)
	}
}
