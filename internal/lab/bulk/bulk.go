//go:build linux

// Package bulk moves bytes as fast as a way carries them, down or up, over one connection or many, and counts what arrives.
package bulk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Words that a client begins with.
const (
	Down = "d"
	Up   = "u"
)

// block is how many bytes are written at once, and what an uploader hears of at a time.
const block = 128 << 10

// Serve sends to who says Down, and takes from who says Up, who hears of every block that has arrived. It returns when l is closed.
func Serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			word, buf := make([]byte, 1), make([]byte, block)
			_, err := io.ReadFull(c, word)
			for err == nil {
				if string(word) == Down {
					_, err = c.Write(buf)
				} else if _, err = io.ReadFull(c, buf); err == nil {
					_, err = c.Write(word)
				}
			}
		}()
	}
}

// Connect asks the proxy at the other end of c for target, with these header lines besides. It reads no byte behind the answer.
func Connect(c net.Conn, target, header string) error {
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	defer c.SetReadDeadline(time.Time{})
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n%s\r\n", target, header); err != nil {
		return err
	}
	var answer []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(answer), "\r\n\r\n") && len(answer) < 4096; answer = append(answer, b...) {
		if _, err := io.ReadFull(c, b); err != nil {
			return fmt.Errorf("the proxy says %q: %w", answer, err)
		}
	}
	if !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
		return fmt.Errorf("the proxy says %q", answer)
	}
	return nil
}

// Flows are connections to a server of Serve's, all of which move what they can.
type Flows struct {
	conns []net.Conn
	moved atomic.Int64
	all   sync.WaitGroup
}

// Start dials so many, and begins. The word is Down or Up.
func Start(ctx context.Context, count int, word string, dial func(context.Context) (net.Conn, error)) (*Flows, error) {
	f := &Flows{conns: make([]net.Conn, count)}
	var dials errgroup.Group
	for i := range f.conns {
		dials.Go(func() (err error) {
			if f.conns[i], err = dial(ctx); err == nil {
				_, err = io.WriteString(f.conns[i], word)
			}
			return err
		})
	}
	if err := dials.Wait(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	for _, c := range f.conns {
		f.all.Go(func() {
			for buf := make([]byte, block); ; {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				if word == Up {
					n *= block
				}
				f.moved.Add(int64(n))
			}
		})
		if word == Up {
			f.all.Go(func() {
				for buf, err := make([]byte, block), error(nil); err == nil; {
					_, err = c.Write(buf)
				}
			})
		}
	}
	return f, nil
}

// Moved is how many bytes have arrived.
func (f *Flows) Moved() int64 { return f.moved.Load() }

// Close ends them all.
func (f *Flows) Close() error {
	for _, c := range f.conns {
		if c != nil {
			c.Close()
		}
	}
	f.all.Wait()
	return nil
}

// Wait is for d, or until ctx ends.
func Wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
