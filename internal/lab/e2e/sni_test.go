package e2e

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/proxy"
)

// A tunnel is there, and the server's side of it too; not a byte goes through before the client has said whom it means.
func TestATunnelBeginsWithTLSForItsNameOrIsReset(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.addRules(temptingRules)
	s.perimeterd("apply")
	s.cloud.DNS.Set("tls.example.com", s.Cloud.Addr)
	l, err := s.Cloud.Listen("tcp", ":8443")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan []byte, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.WriteString(c, "220 a server that speaks first\r\n")
				b, _ := io.ReadAll(c)
				got <- b
			}()
		}
	}()
	s.ok(s.alice.VPN(s.ctx, "up"))
	hello := clientHello(t, "tls.example.com")
	records := func(b []byte, size int) (out []byte) {
		for body := b[5:]; len(body) > 0; {
			n := min(size, len(body))
			out = append(append(out, 22, 3, 1, byte(n>>8), byte(n)), body[:n]...)
			body = body[n:]
		}
		return out
	}
	for _, l := range []struct {
		name, target, said string
		reason             proxy.Reason
	}{
		{"the name", "tls.example.com:8443", string(hello), proxy.Allowed},
		{"the name in capitals", "TLS.example.com.:8443", string(clientHello(t, "TLS.Example.COM")), proxy.Allowed},
		{"in records of 3 bytes", "tls.example.com:8443", string(records(hello, 3)), proxy.Allowed},
		{"another name", "tls.example.com:8443", string(clientHello(t, "evil.example.com")), proxy.SNIMismatch},
		{"another name in small records", "tls.example.com:8443", string(records(clientHello(t, "evil.example.com"), 7)), proxy.SNIMismatch},
		{"a longer name", "tls.example.com:8443", string(clientHello(t, "tls.example.com.evil")), proxy.SNIMismatch},
		{"no name", "tls.example.com:8443", string(clientHello(t, "")), proxy.SNIMissing},
		{"an address for a name", "tls.example.com:8443", string(clientHello(t, "198.19.1.2")), proxy.SNIMissing}, // no client sends one
		{"HTTP", "tls.example.com:8443", "GET / HTTP/1.1\r\nHost: tls.example.com\r\n\r\n", proxy.NotTLS},
		{"SSH", "tls.example.com:8443", "SSH-2.0-OpenSSH_9.2\r\n", proxy.NotTLS},
		{"an alert first", "tls.example.com:8443", "\x15\x03\x01\x00\x02\x01\x00" + string(hello), proxy.NotTLS},
		{"an empty record first", "tls.example.com:8443", "\x16\x03\x01\x00\x00" + string(hello), proxy.NotTLS},
		{"a server's hello", "tls.example.com:8443", string(hello[:5]) + "\x02" + string(hello[6:]), proxy.NotTLS},
		{"SSL 2", "tls.example.com:8443", "\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10", proxy.NotTLS},
		{"an early end", "tls.example.com:8443", string(hello[:40]), proxy.NotTLS},
	} {
		before := len(s.daemon.Entries("proxy"))
		c, err := s.Client.Dial(s.ctx, "tcp", "10.77.0.1:3128")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		io.WriteString(c, "CONNECT "+l.target+" HTTP/1.0\r\n\r\n"+l.said)
		c.(*net.TCPConn).CloseWrite()
		resp, err := http.ReadResponse(bufio.NewReader(iotest.OneByteReader(c)), nil)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %v, %v", l.name, resp, err)
			continue
		}
		heard, end := io.ReadAll(c)
		passed := <-got
		e, err := s.daemon.Await(s.ctx, "proxy", before+1)
		if err != nil {
			t.Fatal(err)
		}
		if e[before]["reason"] != string(l.reason) {
			t.Errorf("%s: logged %v, want %s", l.name, e[before], l.reason)
		}
		if l.reason == proxy.Allowed {
			if string(passed) != l.said || end != nil {
				t.Errorf("%s: %d of %d bytes arrived, %v", l.name, len(passed), len(l.said), end)
			}
		} else if len(passed) > 0 || len(heard) > 0 || !errors.Is(end, syscall.ECONNRESET) {
			t.Errorf("%s: %d bytes arrived, %d came back, %v: want none and a reset", l.name, len(passed), len(heard), end)
		}
	}
}

// clientHello is what crypto/tls sends first.
func clientHello(t *testing.T, name string) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()
	go tls.Client(theirs, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	b := make([]byte, 1<<14)
	n, err := ours.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}
