package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"testing"
	"time"
)

const connectHead = "CONNECT s3.example:443 HTTP/1.1\r\nHost: s3.example:443\r\n\r\n"

// hello is a record as a ClientHello's.
func hello(size int) []byte {
	return append([]byte{22, 3, 1, byte(size >> 8), byte(size)}, bytes.Repeat([]byte{1}, size)...)
}

// tunnelled is a local listener's connection: the client's end, and the end of what it dials, with what came there at once.
type tunnelled struct {
	client, proxy *net.TCPConn
	first         []byte
	done          chan struct{}
}

func (c *tunnelled) close() {
	c.client.Close()
	c.proxy.Close()
	<-c.done
}

// expect reads as many bytes as want has.
func expect(t *testing.T, what string, c net.Conn, want string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, len(want))
	n, err := io.ReadFull(c, got)
	if err != nil || string(got) != want {
		t.Fatalf("%s: %q, %v; want %q", what, got[:n], err, want)
	}
}

func TestClientIsAnsweredAheadWhereTheProxyOpenedBefore(t *testing.T) {
	var said bytes.Buffer
	s := &Local{keeper: &Keeper{}, log: slog.New(slog.NewTextHandler(&said, nil))}
	s.keeper.tunnel, s.keeper.state = &Tunnel{roundTrip: time.Minute}, Up // so long that a hello in time is the test's to say
	s.keeper.visited.begin(nil)
	var dialed chan *tunnelled
	broken := false
	s.spares = &spares{closed: true, early: func() earliness { return never }, dial: func(_ context.Context, first []byte) (net.Conn, error) {
		if broken {
			return nil, errors.New("no way there")
		}
		near, far := pair(t)
		dialed <- &tunnelled{proxy: far, first: first}
		return near, nil
	}}
	ask := func() (client *net.TCPConn, done chan struct{}) {
		dialed = make(chan *tunnelled, 1)
		near, far := pair(t)
		q, err := parseRequest([]byte(connectHead), nil)
		if err != nil {
			t.Fatal(err)
		}
		done = make(chan struct{})
		go func() { defer close(done); defer far.Close(); s.connect(t.Context(), far, q) }()
		return near, done
	}
	reached := func(client *net.TCPConn, done chan struct{}) *tunnelled {
		c := <-dialed
		c.client, c.done = client, done
		return c
	}
	first := func(speech []byte) {
		t.Helper()
		c := reached(ask())
		defer c.close()
		if string(c.first) != connectHead {
			t.Fatalf("the first: %q", c.first)
		}
		c.client.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if n, err := c.client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("before the proxy spoke: %d bytes, %v", n, err)
		}
		io.WriteString(c.proxy, "HTTP/1.1 200 OK\r\n\r\n")
		expect(t, "the proxy's answer", c.client, "HTTP/1.1 200 OK\r\n\r\n")
		c.client.Write(speech)
		expect(t, "the client's speech", c.proxy, string(speech))
		c.client.Write([]byte("more"))
		expect(t, "more", c.proxy, "more")
	}
	ahead := func(speech []byte) *tunnelled {
		t.Helper()
		client, done := ask()
		expect(t, "ahead", client, string(established))
		client.Write(speech)
		return reached(client, done)
	}

	first([]byte("EHLO")) // no TLS: an alert would say nothing there
	first(hello(500))

	c := ahead(hello(600))
	if want := connectHead + string(hello(600)); string(c.first) != want {
		t.Fatalf("with the CONNECT: %d bytes, want %d", len(c.first), len(want))
	}
	io.WriteString(c.proxy, "HTTP/1.1 200 OK\r\nX: y\r\n\r\nserver")
	expect(t, "what follows the answer, which was given", c.client, "server")
	c.client.Write([]byte("client"))
	expect(t, "from the client", c.proxy, "client")
	c.client.CloseWrite()
	if more, err := io.ReadAll(c.proxy); err != nil || len(more) > 0 {
		t.Fatalf("after the client's end: %q, %v", more, err)
	}
	io.WriteString(c.proxy, "late")
	expect(t, "after its own end", c.client, "late")
	c.close()

	// What comes with the hello, or is more than one, follows.
	large := append(hello(700), hello(20)...)
	c = ahead(large)
	if string(c.first) != connectHead+string(hello(700)) {
		t.Fatalf("with the CONNECT: %d bytes", len(c.first))
	}
	expect(t, "the rest", c.proxy, string(hello(20)))
	io.WriteString(c.proxy, "HTTP/1.1 200 OK\r\n\r\nserver")
	expect(t, "after the rest", c.client, "server")
	c.close()
	huge := hello(maxHello)
	c = ahead(huge)
	if string(c.first) != connectHead {
		t.Fatalf("with the CONNECT: %d bytes", len(c.first))
	}
	expect(t, "the huge", c.proxy, string(huge))
	io.WriteString(c.proxy, "HTTP/1.1 200 OK\r\n\r\nserver")
	expect(t, "after the huge", c.client, "server")
	c.close()

	for _, refusal := range []struct {
		answer string
		alert  []byte
		logged string
	}{
		{"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\nno: x\n", accessDenied, "403 Forbidden: no: x"},
		{"HTTP/1.1 502 Bad Gateway\r\n\r\n", noWay, "502 Bad Gateway"},
		{"HTTP/1.1 2", noWay, "EOF"},
		{"", noWay, "EOF"},
	} {
		said.Reset()
		c = ahead(hello(500))
		io.WriteString(c.proxy, refusal.answer)
		c.proxy.CloseWrite()
		c.client.SetReadDeadline(time.Now().Add(10 * time.Second))
		if got, err := io.ReadAll(c.client); err != nil || !bytes.Equal(got, refusal.alert) {
			t.Errorf("%q: %v, %v; want %v", refusal.answer, got, err, refusal.alert)
		}
		c.close()
		if !bytes.Contains(said.Bytes(), []byte(refusal.logged)) || !bytes.Contains(said.Bytes(), []byte("s3.example:443")) {
			t.Errorf("%q: logged %q", refusal.answer, said.String())
		}
		first(hello(500)) // asks, and learns again
	}
	broken = true
	client, done := ask()
	expect(t, "ahead", client, string(established))
	client.Write(hello(500))
	if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, noWay) {
		t.Errorf("no way: %v, %v", got, err)
	}
	client.Close()
	<-done
	if s.keeper.visited.has("s3.example:443") {
		t.Error("no way there, and still known")
	}

	// While there is no tunnel, nothing is promised.
	s.keeper.visited.add("s3.example:443")
	s.keeper.state = Retrying
	client, done = ask()
	client.SetReadDeadline(time.Now().Add(10 * time.Second))
	if got, err := io.ReadAll(client); err != nil || !bytes.HasPrefix(got, []byte("HTTP/1.1 502 ")) {
		t.Errorf("no tunnel: %q, %v", got, err)
	}
	client.Close()
	<-done
}

func TestLateHelloWaitsForNobody(t *testing.T) {
	client, in := pair(t)
	if hello, rest := readHello(in, nil, 10*time.Millisecond); hello != nil || len(rest) > 0 {
		t.Fatalf("%q %q", hello, rest)
	}
	client.Write(hello(300)[:100])
	if hello, rest := readHello(in, nil, 10*time.Millisecond); hello != nil || len(rest) != 100 {
		t.Fatalf("a part: %q, %d", hello, len(rest))
	}
	client.Write([]byte("x"))
	expect(t, "afterwards", in, "x")
}

func TestDestinationsOpenedAreFewAndTheLatest(t *testing.T) {
	var o visited
	names := make([]string, maxVisited+5)
	for i := range names {
		names[i] = fmt.Sprintf("%d.example:443", i)
	}
	o.begin(names)
	if got := o.list(); !slices.Equal(got, append([]string{}, names[:maxVisited]...)) {
		t.Errorf("from a file: %v", got)
	}
	o.add("new.example:443")
	o.add(names[3])
	o.add(string(make([]byte, maxVisitedName+1)))
	if got := o.list(); len(got) != maxVisited || got[0] != names[3] || got[1] != "new.example:443" || o.has(names[maxVisited-1]) {
		t.Errorf("%v", got)
	}
	if len(o.changed) != 1 {
		t.Error("nobody was told")
	}
	o.remove(names[3])
	if o.has(names[3]) || !o.has(names[0]) {
		t.Error("the wrong one was removed")
	}
}

// attacked is a connection of a local listener to a destination that is known, or not, and a proxy that says nothing by itself.
func attacked(t *testing.T, known bool) *tunnelled {
	s := &Local{keeper: &Keeper{}, log: slog.New(slog.DiscardHandler)}
	s.keeper.tunnel, s.keeper.state = &Tunnel{roundTrip: time.Minute}, Up
	if s.keeper.visited.begin(nil); known {
		s.keeper.visited.add("s3.example:443")
	}
	dialed := make(chan *net.TCPConn, 1)
	s.spares = &spares{closed: true, early: func() earliness { return never }, dial: func(context.Context, []byte) (net.Conn, error) {
		near, far := pair(t)
		dialed <- far
		return near, nil
	}}
	client, in := pair(t)
	q, err := parseRequest([]byte(connectHead), nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &tunnelled{client: client, done: make(chan struct{})}
	go func() { defer close(c.done); defer in.Close(); s.connect(t.Context(), in, q) }()
	client.Write(hello(500))
	c.proxy = <-dialed
	if known {
		expect(t, "ahead", client, string(established))
	} else {
		expect(t, "the hello", c.proxy, string(hello(500)))
	}
	return c
}

// over waits for a connection's goroutines.
func (c *tunnelled) over(t *testing.T, what string) {
	t.Helper()
	select {
	case <-c.done:
	case <-time.After(20 * time.Second):
		t.Errorf("%s: the connection is still held", what)
	}
}

// A proxy that dials says nothing for long, and one behind a tunnel that broke never does.
func TestClientThatLeavesBeforeTheAnswerIsNotWaitedFor(t *testing.T) {
	for _, known := range []bool{false, true} {
		c := attacked(t, known)
		c.client.CloseWrite()
		c.proxy.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.ReadAll(c.proxy); err != nil {
			t.Errorf("known %v: the client's end does not reach the proxy: %v", known, err)
		}
		io.WriteString(c.proxy, "HTTP/1.1 200 OK\r\n\r\nlate")
		c.proxy.CloseWrite()
		if got, err := io.ReadAll(c.client); err != nil || !bytes.HasSuffix(got, []byte("late")) {
			t.Errorf("known %v: after its end the client got %q, %v", known, got, err)
		}
		c.over(t, fmt.Sprintf("known %v, ended", known))
		c.close()

		c = attacked(t, known)
		cut(c.client)
		c.over(t, fmt.Sprintf("known %v, reset", known))
		c.close()
	}
}

func TestRefusalEndsAClientWhoseProxyReadsNoMore(t *testing.T) {
	c := attacked(t, true)
	defer c.close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		c.client.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)) // until nothing goes any further
		io.Copy(c.client, neverending{})
	}()
	<-sent
	io.WriteString(c.proxy, "HTTP/1.1 403 Forbidden\r\n\r\n")
	c.client.SetReadDeadline(time.Now().Add(20 * time.Second))
	expect(t, "refused", c.client, string(accessDenied))
	c.over(t, "refused")
}

type neverending struct{}

func (neverending) Read(b []byte) (int, error) { return len(b), nil }

func TestAnswerInPiecesIsOne(t *testing.T) {
	c := attacked(t, true)
	defer c.close()
	for _, b := range []byte("HTTP/1.1 200 OK\r\nA: b\r\n\r\nserver") {
		c.proxy.Write([]byte{b})
	}
	expect(t, "what follows", c.client, "server")
}
