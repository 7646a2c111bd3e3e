package console

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/session"
	"perimeterd/proxy"
)

type people map[netip.Addr]session.Session

func (p people) ByAddress(a netip.Addr) (session.Session, bool) { s, ok := p[a]; return s, ok }

func TestPageServesASessionItsProxyConfiguration(t *testing.T) {
	policy, err := proxy.Compile(proxy.Config{Rules: []proxy.Rule{
		{Allow: []string{"ops.example.com"}, Ports: []uint16{443}, Groups: []string{"operators"}},
		{Allow: []string{"all.example.com"}, Ports: []uint16{443}, Groups: []string{"*"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	p := &Page{
		Proxy:    netip.MustParseAddrPort("10.77.0.1:3128"),
		Sessions: people{netip.MustParseAddr("127.0.0.2"): {User: "alice", Groups: []string{"operators"}}, netip.MustParseAddr("127.0.0.3"): {User: "bob"}},
		Policy:   func() *proxy.Policy { return policy },
		Log:      slog.New(slog.DiscardHandler),
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.At = l.Addr().(*net.TCPAddr).AddrPort()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx, l) }()
	ask := func(from, raw string) (status int, header http.Header, body string) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(c, raw)
		br := bufio.NewReader(c)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := br.ReadByte(); err != io.EOF {
			t.Errorf("%q: the connection stays: %v", raw, err)
		}
		return resp.StatusCode, resp.Header, string(b)
	}
	get := func(path, host string) string { return "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n" }

	status, header, body := ask("127.0.0.2", get("/proxy.pac", p.At.String()))
	if status != 200 || header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" || body != string(policy.PAC("alice", []string{"operators"}, p.Proxy)) {
		t.Errorf("%d %v %s", status, header, body)
	}
	if _, _, body := ask("127.0.0.3", get("/proxy.pac", p.At.String())); strings.Contains(body, "ops.example.com") || !strings.Contains(body, "all.example.com") {
		t.Errorf("bob's: %s", body)
	}
	for _, tt := range []struct {
		from, raw string
		want      int
	}{
		{"127.0.0.4", get("/proxy.pac", p.At.String()), 403},
		{"127.0.0.2", get("/proxy.pac", "evil.example.com"), 421},
		{"127.0.0.2", get("/proxy.pac", p.At.Addr().String()), 421}, // that is port 80
		{"127.0.0.2", get("/proxy.pac", p.At.String()+"."), 421},
		{"127.0.0.2", get("/", p.At.String()), 404},
		{"127.0.0.2", get("/metrics", p.At.String()), 404},
		{"127.0.0.2", fmt.Sprintf("POST /proxy.pac HTTP/1.1\r\nHost: %v\r\nContent-Length: 0\r\n\r\n", p.At), 405},
	} {
		if status, _, body := ask(tt.from, tt.raw); status != tt.want {
			t.Errorf("%.60q from %s: %d %s, want %d", tt.raw, tt.from, status, body, tt.want)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
