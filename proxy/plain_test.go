package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"perimeterd/internal/session"
)

// origin is a web server outside.
func origin(t testing.TB, fn http.HandlerFunc) (host string, conns *atomic.Int64) {
	conns = new(atomic.Int64)
	s := httptest.NewUnstartedServer(fn)
	s.Listener.Close()
	s.Listener = listenOutside(t, outsideHost+":0")
	s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			conns.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), conns
}

func TestPlainRequestsShareTheClientsConnectionOnly(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://192.0.2.1:9")
	l := startLab(t, openConfig())
	host, conns := origin(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Saw", strings.Join([]string{r.Host, r.RequestURI, r.Header.Get("Proxy-Authorization"), r.Header.Get("X-Hop") + r.Header.Get("Upgrade") + r.Header.Get("HTTP2-Settings"), r.Header.Get("User-Agent"), string(b)}, "|"))
		fmt.Fprint(w, "answer")
	})
	c := l.from("10.77.0.2")
	br := bufio.NewReader(c)
	do := func(raw string) *http.Response {
		t.Helper()
		io.WriteString(c, raw)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatalf("%q: %v; log %s", raw, err, l.logged())
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode == 200 && string(b) != "answer" {
			t.Fatalf("%q: %d %q, %v", raw, resp.StatusCode, b, err)
		}
		return resp
	}
	head := " HTTP/1.1\r\nHost: " + host + "\r\n"
	for raw, saw := range map[string]string{
		"GET http://" + host + "/a?b=c" + head + "Connection: X-Hop\r\nX-Hop: 1\r\nProxy-Authorization: Basic eA==\r\n\r\n": host + "|/a?b=c||||",
		// Another protocol is not asked for on the client's behalf (h2c smuggling).
		"GET http://" + host + "/h2c" + head + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n": host + "|/h2c||||",
		"POST http://" + host + "/" + head + "Content-Length: 4\r\nUser-Agent: u\r\n\r\nbody":                                                            host + "|/|||u|body",
	} {
		if got := do(raw).Header.Get("X-Saw"); got != saw {
			t.Errorf("%q: the origin saw %q, want %q", raw, got, saw)
		}
		if a := l.next(); a.Status != 200 || !a.Decision.Allow || a.Down == 0 || a.Up == 0 || a.Dialed.String() != host {
			t.Errorf("logged %+v", a)
		}
	}
	// Two in one write, the second malformed: the first is answered, the second refused.
	io.WriteString(c, "GET http://"+host+"/"+head+"\r\nGET http://"+host+"/"+head+"Host: evil\r\n\r\n")
	for _, want := range []int{200, 400} {
		resp, err := http.ReadResponse(br, nil)
		if err != nil || resp.StatusCode != want {
			t.Fatalf("%v, %v; want %d", resp, err, want)
		}
		io.Copy(io.Discard, resp.Body)
		if a := l.next(); a.Status != want {
			t.Errorf("logged %+v", a)
		}
	}
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("after the refusal: %v", err)
	}
	if n := conns.Load(); n != 4 {
		t.Errorf("%d connections to the origin for 4 requests", n)
	}
	// A chunked body is the last: what follows it is not looked at.
	c = l.from("10.77.0.2")
	br = bufio.NewReader(c)
	resp := do("POST http://" + host + "/" + head + "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\nGET http://" + host + "/ HTTP/1.1\nHost: evil\n\n")
	if !resp.Close || !strings.HasSuffix(resp.Header.Get("X-Saw"), "|body") {
		t.Errorf("chunked: %v, saw %q", resp.Close, resp.Header.Get("X-Saw"))
	}
	if b, err := io.ReadAll(br); len(b) > 0 {
		t.Errorf("after it: %q, %v", b, err)
	}
}

func TestKeptConnectionLosesItsSession(t *testing.T) {
	l := startLab(t, openConfig())
	host, _ := origin(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "answer") })
	c := l.from("10.77.0.2")
	raw := "GET http://" + host + "/ HTTP/1.1\r\nHost: " + host + "\r\n\r\n"
	if status, _ := ask(t, c, raw); status != 200 {
		t.Fatal(status)
	}
	buf := make([]byte, 6)
	io.ReadFull(c, buf)
	l.people.put("10.77.0.2", "mallory", "operators")
	if status, _ := ask(t, c, raw); status != 403 {
		t.Errorf("after the address changed hands: %d", status)
	}
	l.next()
	if a := l.next(); a.Decision.Reason != NoSession || a.User != "alice" {
		t.Errorf("logged %+v", a)
	}
	c = l.from("10.77.0.2")
	if status, _ := ask(t, c, raw); status != 200 {
		t.Fatal(status)
	}
	io.ReadFull(c, buf)
	s, _ := l.people.ByAddress(netip.MustParseAddr("10.77.0.2"))
	l.people.drop("10.77.0.2")
	l.SessionEvent(session.Event{Session: s, Ended: session.Kicked})
	if _, err := c.Read(buf); err == nil || err == io.EOF {
		t.Errorf("an idle kept connection: %v, want a reset", err)
	}
}

func TestWebSocketPasses(t *testing.T) {
	l := startLab(t, openConfig())
	ended := make(chan error, 1)
	host, _ := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" || r.URL.Path == "/no" {
			w.WriteHeader(http.StatusUpgradeRequired)
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, err = io.Copy(c, rw)
		ended <- err
	})
	raw := func(path string) string {
		return "GET http://" + host + path + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	}
	c := l.from("10.77.0.2")
	io.WriteString(c, raw("/")+"\x81\x05early") // a frame in the same write as the request
	resp, err := http.ReadResponse(bufio.NewReader(iotestOne{c}), nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("%v, %v; %s", resp, err, l.logged())
	}
	io.WriteString(c, "\x81\x05later")
	b := make([]byte, 14)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "\x81\x05early\x81\x05later" {
		t.Errorf("%q, %v", b, err)
	}
	c.Close()
	select {
	case <-ended:
	case <-time.After(15 * time.Second):
		t.Error("the origin's side stays open")
	}
	if a := l.next(); a.Status != 101 || a.Down < 14 {
		t.Errorf("logged %+v", a)
	}
	// Declined: an answer like any other, and the last on this connection.
	c = l.from("10.77.0.2")
	io.WriteString(c, raw("/no"))
	resp, err = http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != http.StatusUpgradeRequired || !resp.Close {
		t.Fatalf("%+v, %v", resp, err)
	}
	eventually(t, "no connection tracked", func() bool { return l.Connections(l.alice.ID) == 0 })
	// A session's end reaches the WebSocket.
	c = l.from("10.77.0.2")
	io.WriteString(c, raw("/"))
	if resp, err = http.ReadResponse(bufio.NewReader(iotestOne{c}), nil); err != nil || resp.StatusCode != 101 {
		t.Fatal(err)
	}
	l.people.drop("10.77.0.2")
	l.SessionEvent(session.Event{Session: l.alice, Ended: session.Expired})
	if _, err := c.Read(b); err == nil || err == io.EOF {
		t.Errorf("ended with %v", err)
	}
}

type iotestOne struct{ io.Reader }

func (r iotestOne) Read(b []byte) (int, error) { return r.Reader.Read(b[:1]) }

func TestABrokenAnswerIsNotWhole(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		switch r.URL.Path {
		case "/chunked":
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
			time.Sleep(20 * time.Millisecond)
		case "/length":
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
		case "/407":
			io.WriteString(c, "HTTP/1.1 407 x\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n")
		case "/101":
			io.WriteString(c, "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nboo")
		case "/garbage":
			io.WriteString(c, "garbage\r\n\r\n")
		}
	})
	for path, want := range map[string]int{"/chunked": 200, "/length": 200, "/407": 502, "/101": 502, "/garbage": 502, "/nothing": 502} {
		c := l.from("10.77.0.2")
		io.WriteString(c, "GET http://"+at.String()+path+" HTTP/1.1\r\nHost: "+at.String()+"\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			if want == 200 {
				l.next() // reset before the head was read
				continue
			}
			t.Errorf("%s: %v", path, err)
			continue
		}
		_, err = io.ReadAll(resp.Body)
		if resp.StatusCode != want || want == 200 && err == nil {
			t.Errorf("%s: %d, %v", path, resp.StatusCode, err)
		}
		a := l.next()
		if want == 502 && (a.Decision.Reason != UpstreamFailed || resp.Header.Get("X-Perimeter-Reason") != string(UpstreamFailed)) {
			t.Errorf("%s: logged %+v", path, a)
		}
		if want == 200 && a.End != ServerReset {
			t.Errorf("%s: logged %+v", path, a)
		}
	}
}

func TestGoproxyDialsNothingByItself(t *testing.T) {
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"} { // which it reads as it is made
		t.Setenv(name, "http://192.0.2.1:9")
	}
	s, err := New(openConfig(), &people{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := s.plain.proxy
	if p.ConnectDial != nil || p.ConnectDialWithReq != nil || p.Tr.Proxy != nil || !p.Tr.DisableKeepAlives || p.CertStore != nil {
		t.Error("a trap of goproxy's is open")
	}
	if _, err := p.Tr.DialContext(context.Background(), "tcp", outsideHost+":80"); err == nil {
		t.Error("the transport dials")
	}
	if _, err := p.Tr.DialTLSContext(context.Background(), "tcp", outsideHost+":443"); err == nil {
		t.Error("the transport dials TLS")
	}
	if _, err := p.Tr.RoundTrip(httptest.NewRequest("GET", "http://"+outsideHost+"/", nil)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("round trip: %v", err)
	}
}
