//go:build linux

package swarm

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"
)

// received is the most that may lie unread in a socket.
const received = 8 << 10

// Download is a file that a member fetches through tunnel and proxy, slowly.
type Download struct {
	Done chan struct{} // closed when it ended

	conn  net.Conn
	bytes atomic.Int64
	last  atomic.Int64 // when the last byte came, Unix nanoseconds
	ended time.Time
	err   error
}

// Source is what downloads are fetched from.
type Source struct {
	Proxy netip.AddrPort
	Host  string // by HTTPS
	CAs   *x509.CertPool
}

// Download begins to fetch size bytes of the source at a rate in bytes a second. It goes on until the end of the file, an
// error, or Close.
func (m *Member) Download(ctx context.Context, from Source, size int64, rate int) (*Download, error) {
	conn, err := m.Tunnel(ctx, from)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(conn, "GET /bytes/%d HTTP/1.1\r\nHost: %s\r\n\r\n", size, from.Host); err != nil {
		conn.Close()
		return nil, err
	}
	r := bufio.NewReaderSize(conn, 4096)
	answer, err := http.ReadResponse(r, nil)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = errors.New(answer.Status)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	d := &Download{Done: make(chan struct{}), conn: conn}
	go func() {
		defer close(d.Done)
		defer conn.Close()
		piece := make([]byte, max(rate/20, 1))
		for {
			n, err := answer.Body.Read(piece)
			if n > 0 {
				d.last.Store(time.Now().UnixNano())
				d.bytes.Add(int64(n))
			}
			if err != nil {
				d.err, d.ended = err, time.Now()
				return
			}
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
		}
	}()
	return d, nil
}

// Tunnel is a TLS connection to the source through the proxy.
func (m *Member) Tunnel(ctx context.Context, from Source) (*tls.Conn, error) {
	c, err := m.Dial(ctx, from.Proxy)
	if err != nil {
		return nil, err
	}
	return Connect(ctx, c, from)
}

// Connect makes of a connection to the proxy one to the source, by TLS.
func Connect(ctx context.Context, c net.Conn, from Source) (*tls.Conn, error) {
	if t, ok := c.(*net.TCPConn); ok {
		t.SetReadBuffer(received) // what is in it comes to be read after the last byte arrived
	}
	if deadline, ok := ctx.Deadline(); ok {
		c.SetDeadline(deadline)
	}
	fail := func(err error) (*tls.Conn, error) {
		c.Close()
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "CONNECT %s:443 HTTP/1.1\r\nHost: %[1]s:443\r\n\r\n", from.Host); err != nil {
		return fail(err)
	}
	answer := make([]byte, 1024)
	n, err := c.Read(answer)
	if err != nil {
		return fail(err)
	}
	if line := string(answer[:min(n, 13)]); line != "HTTP/1.1 200 " {
		return fail(fmt.Errorf("the proxy says %q", answer[:n]))
	}
	secure := tls.Client(c, &tls.Config{RootCAs: from.CAs, ServerName: from.Host, NextProtos: []string{"http/1.1"}})
	if err := secure.HandshakeContext(ctx); err != nil {
		return fail(err)
	}
	return secure, nil
}

// Bytes is how many came so far.
func (d *Download) Bytes() int64 { return d.bytes.Load() }

// Last is when the last one came.
func (d *Download) Last() time.Time { return time.Unix(0, d.last.Load()) }

// Err is how it ended; to be asked after Done.
func (d *Download) Err() error { return d.err }

// Ended is when it ended; to be asked after Done.
func (d *Download) Ended() time.Time { return d.ended }

// Close ends it.
func (d *Download) Close() { d.conn.Close() }
