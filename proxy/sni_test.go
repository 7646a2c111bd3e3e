package proxy

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"time"
)

// hello is what crypto/tls sends first.
func hello(t testing.TB, c *tls.Config) []byte {
	ours, theirs := net.Pipe()
	go tls.Client(theirs, c).Handshake()
	defer ours.Close()
	ours.SetDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 1<<14)
	n, err := ours.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// split spreads the handshake over records of at most size bytes.
func split(b []byte, size int) (out []byte) {
	for body := b[5:]; len(body) > 0; {
		n := min(size, len(body))
		out = append(out, 22, 3, 1, byte(n>>8), byte(n))
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}

func TestServerNameIsFoundHoweverItIsSplit(t *testing.T) {
	for _, c := range []*tls.Config{
		{ServerName: "www.lab.test"},
		{ServerName: "www.lab.test", MaxVersion: tls.VersionTLS12},
		{ServerName: strings.Repeat("a.", 126) + "a", NextProtos: []string{"h2", strings.Repeat("x", 200)}},
		{InsecureSkipVerify: true},
	} {
		whole := hello(t, c)
		for _, size := range []int{1, 2, 3, 4, 5, 100, 1 << 14} {
			b := split(whole, size)
			name, err := serverName(b)
			if name != c.ServerName || err != nil {
				t.Errorf("records of %d: %q, %v", size, name, err)
			}
			if name, err := serverName(append(bytes.Clone(b), "early data or the next flight"...)); name != c.ServerName || err != nil {
				t.Errorf("records of %d with more after: %q, %v", size, name, err)
			}
			for i := range b {
				if _, err := serverName(b[:i]); !errors.Is(err, errMore) {
					t.Fatalf("records of %d, %d of %d bytes: %v", size, i, len(b), err)
				}
			}
		}
	}
}

// seen is the server name that crypto/tls's server sees, if it gets as far as looking.
func seen(b []byte) (name string, ok bool) {
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		tls.Server(theirs, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			name, ok = h.ServerName, true
			return nil, errors.New("that is all")
		}}).Handshake()
		theirs.Close()
	}()
	ours.SetDeadline(time.Now().Add(5 * time.Second))
	go func() {
		b := make([]byte, 1024) // alerts
		for {
			if _, err := ours.Read(b); err != nil {
				return
			}
		}
	}()
	ours.Write(b)
	ours.Close()
	<-done
	return name, ok
}

// What is accepted here must be read the same by a real server, and what a real server reads as a hello for some name must
// never pass as one for another.
func FuzzServerName(f *testing.F) {
	for _, c := range []*tls.Config{{ServerName: "www.lab.test"}, {InsecureSkipVerify: true}, {ServerName: "a.b", MaxVersion: tls.VersionTLS12}} {
		b := hello(f, c)
		f.Add(b)
		f.Add(split(b, 50))
		f.Add(split(b, 3))
	}
	f.Add([]byte("\x16\x03\x01\x00\x04\x01\x00\x00\x00"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name, err := serverName(b)
		theirs, ok := seen(b)
		if err == nil && ok && name != theirs {
			t.Errorf("%q here, %q at a server", name, theirs)
		}
		if errors.Is(err, errMore) && ok {
			t.Errorf("more wanted here, enough (%q) for a server", theirs)
		}
	})
}
