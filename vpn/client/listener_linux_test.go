package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// pair is a connection on this machine: the end that connected and the end that was reached.
func pair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); a.Close() })
	return c.(*net.TCPConn), a.(*net.TCPConn)
}

func TestSocketThatNobodyHoldsIsNotRoots(t *testing.T) {
	o, err := newOwners()
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	near, far := pair(t)
	if uid, err := o.of(far); err != nil || uid != os.Getuid() {
		t.Errorf("user %d, %v", uid, err)
	}
	if err := near.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if uid, err := o.of(far); err != nil || uid != os.Getuid() {
		t.Errorf("half closed: user %d, %v", uid, err)
	}
	near.Close()
	if uid, err := o.of(far); err == nil {
		t.Errorf("closed by its owner: user %d", uid)
	}
}

func TestDeadSpareIsNotUsed(t *testing.T) {
	dials := 0
	var fars []*net.TCPConn
	s := &spares{closed: true, early: func() earliness { return never }, dial: func(context.Context, []byte) (net.Conn, error) { // closed: it makes none by itself
		dials++
		near, far := pair(t)
		fars = append(fars, far)
		return near, nil
	}}
	for _, kill := range []bool{false, true} {
		dials, fars = 0, nil
		s.closed, s.coming = false, 1
		s.make()
		s.closed = true
		if kill {
			fars[0].Close()
			for { // its watch has seen it
				s.mu.Lock()
				n := len(s.ready)
				s.mu.Unlock()
				if n == 0 {
					break
				}
				time.Sleep(time.Millisecond)
			}
		}
		c, err := s.take(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]int{false: 1, true: 2}[kill]; dials != want {
			t.Errorf("killed %v: %d dials, want %d", kill, dials, want)
		}
		go io.WriteString(fars[len(fars)-1], "word")
		word := make([]byte, 4)
		if _, err := io.ReadFull(c, word); err != nil || string(word) != "word" {
			t.Errorf("killed %v: %q %v", kill, word, err)
		}
	}
}

func TestRequestTakesAConnectionThatIsOnItsWay(t *testing.T) {
	early := never
	spare, far := make(chan bool), make(chan *net.TCPConn, 1) // whether the next spare comes; the other end of what was dialed
	s := &spares{early: func() earliness { return early }, dial: func(ctx context.Context, first []byte) (net.Conn, error) {
		if len(first) == 0 && !<-spare || ctx.Err() != nil {
			return nil, errors.New("no way there")
		}
		a, b := pair(t)
		far <- b
		a.Write(first)
		return a, nil
	}}
	defer close(spare)
	took := make(chan error)
	take := func(ctx context.Context) { _, err := s.take(ctx, []byte("first")); took <- err }
	waits := func() {
		for n := 0; n == 0; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			n = len(s.waiting)
			s.mu.Unlock()
		}
	}
	heard := func(what string) {
		t.Helper()
		b := make([]byte, 5)
		if _, err := io.ReadFull(<-far, b); err != nil || string(b) != "first" {
			t.Errorf("%s: %q, %v", what, b, err)
		}
	}
	s.fill()
	for _, comes := range []bool{true, false} {
		go take(t.Context())
		waits()
		spare <- comes
		if err := <-took; err != nil {
			t.Fatal(err)
		}
		heard(map[bool]string{true: "one that came", false: "one that did not come"}[comes])
	}
	// Nobody waits longer than he wants to, nor where the request can leave at once.
	ctx, cancel := context.WithCancel(t.Context())
	go take(ctx)
	waits()
	cancel()
	if err := <-took; err == nil || err.Error() != "no way there" {
		t.Errorf("who does not wait any more: %v", err)
	}
	early = likely
	go take(t.Context())
	if err := <-took; err != nil {
		t.Fatal(err)
	}
	heard("at once")
	s.close()
}

func TestEndOfOneDirectionIsCarriedOver(t *testing.T) {
	client, in := pair(t)
	out, server := pair(t)
	done := make(chan struct{})
	go func() { relay(in, out); close(done) }()
	io.WriteString(client, "question")
	client.CloseWrite()
	if got, err := io.ReadAll(server); err != nil || string(got) != "question" {
		t.Fatalf("%q %v", got, err)
	}
	io.WriteString(server, "answer")
	server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "answer" {
		t.Fatalf("%q %v", got, err)
	}
	<-done
}

func TestWhatBreaksOffDoesNotLookWhole(t *testing.T) {
	client, in := pair(t)
	out, server := pair(t)
	go relay(in, out)
	io.WriteString(server, "half")
	half := make([]byte, 4)
	if _, err := io.ReadFull(client, half); err != nil {
		t.Fatal(err)
	}
	server.SetLinger(0)
	server.Close()
	if _, err := client.Read(half); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("after a reset: %v", err)
	}
}

func TestFormsOfRequests(t *testing.T) {
	for text, want := range map[string]string{
		"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\nProxy-Authorization: Basic eA==\r\nX: y\r\n\r\nhello": "proxied Basic eA==",
		"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n":                                                     "proxied ",
		"GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:3128\r\n\r\n":                                                       "page ",
		"OPTIONS * HTTP/1.0\r\n\r\n":                                           "page ",
		"GET a.example:80 HTTP/1.1\r\nHost: a\r\n\r\n":                         "neither a URL nor a path",
		"GET  / HTTP/1.1\r\nHost: a\r\n\r\n":                                   "request line",
		"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n":                                  "request line",
		"GET / HTTP/2\r\n\r\n":                                                 "request line",
		"GET / HTTP/1.1\r\nHost: a\nHost: b\r\n\r\n":                           "header line",
		"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n":                         "more than one Host",
		"GET / HTTP/1.1\r\nHost : a\r\n\r\n":                                   "header line",
		"GET / HTTP/1.1\r\n folded: a\r\n\r\n":                                 "header line",
		"GET / HTTP/1.1\r\nX: " + strings.Repeat("x", maxHead) + "\r\n\r\n":    "larger than",
		strings.Repeat("x", maxHead+1):                                         "larger than",
		"GET / HTTP/1.1\r\nHost: a\r\n":                                        "EOF",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n":                 "request line",
		"GET http://a/ HTTP/1.1\r\nHost: a\r\nproxy-authorization:x\r\n\r\nzz": "proxied x",
	} {
		q, err := readRequest(iotest{strings.NewReader(text)})
		got := ""
		switch {
		case err != nil:
			got = err.Error()
		case q.proxied:
			got = "proxied " + q.authorization
		default:
			got = "page " + q.authorization
		}
		if err == nil && got != want || err != nil && !strings.Contains(got, want) {
			t.Errorf("%.60q: %s, want %s", text, got, want)
		}
		if err == nil && bytes.Contains(bytes.ToLower(q.head), []byte("proxy-authorization")) {
			t.Errorf("%.60q: the credential goes on: %q", text, q.head)
		}
	}
}

// iotest gives one byte at a time.
type iotest struct{ io.Reader }

func (r iotest) Read(b []byte) (int, error) { return r.Reader.Read(b[:min(len(b), 1)]) }

// FuzzRequest: what is passed on is read again as the same, and holds no credential.
func FuzzRequest(f *testing.F) {
	f.Add([]byte("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\nProxy-Authorization: Basic eA==\r\n\r\nhello"))
	f.Add([]byte("GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := readRequest(bytes.NewReader(b))
		if err != nil {
			return
		}
		if len(q.head) > maxHead || q.login("proxy-authorization") != "" || !bytes.HasSuffix(b, q.rest) {
			t.Fatalf("%q: %+v", b, q)
		}
		again, err := readRequest(io.MultiReader(bytes.NewReader(q.head), bytes.NewReader(q.rest)))
		if err != nil || again.method != q.method || again.target != q.target || again.host != q.host || again.proxied != q.proxied ||
			!bytes.Equal(again.head, q.head) || bytes.Count(q.head, []byte("\r\n\r\n")) != 1 {
			t.Fatalf("%q: %+v, then %+v, %v", b, q, again, err)
		}
	})
}
