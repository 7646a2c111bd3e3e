//go:build linux

package swarm

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Transfer is a download or an upload that moves slowly, and whose every byte is compared.
type Transfer struct {
	Done chan struct{} // closed when it ended

	conn  *tls.Conn
	body  []byte // what the lab's cloud has from byte 0 on, and what it is sent
	moved atomic.Int64
	once  sync.Once
	hurry chan struct{}
	err   error
}

// NewTransfer begins to move size bytes, rate of them in a second, from or to the source to which conn leads, and which is its own
// from then on.
func NewTransfer(ctx context.Context, conn *tls.Conn, with Source, upload bool, size, rate int64) *Transfer {
	t := &Transfer{Done: make(chan struct{}), conn: conn, body: make([]byte, 251*256), hurry: make(chan struct{})}
	for i := range t.body {
		t.body[i] = byte(i % 251)
	}
	go func() {
		defer close(t.Done)
		defer conn.Close()
		if upload {
			t.err = t.upload(ctx, with.Host, size, rate)
		} else {
			t.err = t.download(ctx, with.Host, size, rate)
		}
	}()
	return t
}

// Moved is how many bytes were moved so far.
func (t *Transfer) Moved() int64 { return t.moved.Load() }

// Hurry lets it move as fast as it can.
func (t *Transfer) Hurry() {
	t.once.Do(func() {
		if c, ok := t.conn.NetConn().(*net.TCPConn); ok {
			c.SetReadBuffer(1 << 20) // the little one waits for delayed acknowledgements
		}
		close(t.hurry)
	})
}

// Err is nil when every byte came, the right one; to be asked after Done.
func (t *Transfer) Err() error { return t.err }

// Close ends it.
func (t *Transfer) Close() { t.conn.Close(); <-t.Done }

// slow moves a piece ten times in each second of its length.
func (t *Transfer) slow(ctx context.Context, n, rate int64, move func(int64) error) error {
	for n > 0 && ctx.Err() == nil {
		k := min(n, max(rate/10, 1), int64(len(t.body)))
		select {
		case <-t.hurry:
			k = min(n, int64(len(t.body)))
		case <-time.After(100 * time.Millisecond):
		}
		if err := move(k); err != nil {
			return err
		}
		n -= k
		t.moved.Add(k)
	}
	return ctx.Err()
}

// download compares the hash of what came with that of what was sent.
func (t *Transfer) download(ctx context.Context, host string, n, rate int64) error {
	if _, err := fmt.Fprintf(t.conn, "GET /bytes/%d HTTP/1.1\r\nHost: %s\r\n\r\n", n, host); err != nil {
		return err
	}
	answer, err := http.ReadResponse(bufio.NewReaderSize(t.conn, 4096), nil)
	if err != nil {
		return err
	}
	got, want := sha256.New(), sha256.New()
	if err := t.slow(ctx, n, rate, func(k int64) error { _, err := io.CopyN(got, answer.Body, k); return err }); err != nil {
		return err
	}
	for left := n; left > 0; left -= int64(len(t.body)) {
		want.Write(t.body[:min(left, int64(len(t.body)))])
	}
	if !slices.Equal(got.Sum(nil), want.Sum(nil)) {
		return errors.New("other bytes than the cloud sent")
	}
	return nil
}

// upload has the bytes counted by the cloud, and guarded by TLS.
func (t *Transfer) upload(ctx context.Context, host string, n, rate int64) error {
	if _, err := fmt.Fprintf(t.conn, "POST /upload HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n", host, n); err != nil {
		return err
	}
	if err := t.slow(ctx, n, rate, func(k int64) error { _, err := t.conn.Write(t.body[:k]); return err }); err != nil {
		return err
	}
	answer, err := http.ReadResponse(bufio.NewReaderSize(t.conn, 4096), nil)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(answer.Body)
	if err == nil && string(b) != fmt.Sprintf("got %d bytes\n", n) {
		err = fmt.Errorf("the cloud says %q", b)
	}
	return err
}
