package proxy

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

// Whatever is taken here, net/http must read the same way: the same method, target, Host and framing. (The other direction
// is TestRefusals.)
func FuzzHead(f *testing.F) {
	for _, s := range []string{
		"CONNECT a.b:443 HTTP/1.1\r\nHost: a.b:443\r\n\r\n", "GET http://a.b/ HTTP/1.0\r\n\r\n",
		"POST http://a.b/ HTTP/1.1\r\nHost: a.b\r\nContent-Length: 3\r\n\r\nabc", "POST http://a.b/ HTTP/1.1\r\nHost: a.b\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"GET http://a.b/ HTTP/1.1\r\nHost: a.b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nAccept: application/json\r\n\r\n",
		"GET http://a.b/ HTTP/1.1\r\nhost:a.b\r\n\r\nGET / HTTP/1.1\n\n", "GET http://a.b/ HTTP/1.1\r\nHost: a.b\r\nX: y\r\n z\r\n\r\n",
	} {
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, step uint8) {
		n, err := headEnd(b, 0)
		// In pieces it must come out the same.
		for at, seen := 0, 0; at < len(b); {
			at = min(at+int(step)+1, len(b))
			pn, perr := headEnd(b[:at], seen)
			if seen = at; pn > 0 || perr != nil || at == len(b) {
				if pn != n || (perr == nil) != (err == nil) {
					t.Fatalf("whole: %d, %v; in pieces: %d, %v", n, err, pn, perr)
				}
				break
			}
		}
		if n == 0 || err != nil {
			return
		}
		h, err := parseHead(b[:n])
		if err != nil {
			return
		}
		d, err := h.destination()
		if err != nil {
			return
		}
		body := b[n:]
		br := bufio.NewReader(io.MultiReader(bytes.NewReader(b[:n]), bytes.NewReader(body)))
		r, err := http.ReadRequest(br)
		if err != nil {
			return // net/http may refuse more
		}
		if r.Method != h.method || r.RequestURI != h.target || r.ProtoAtLeast(1, 1) == h.http10 {
			t.Errorf("%q: %+v, but net/http reads %s %s %s", b[:n], h, r.Method, r.RequestURI, r.Proto)
		}
		if chunked := len(r.TransferEncoding) > 0; chunked != h.chunked || !chunked && r.ContentLength != h.length {
			t.Errorf("%q: %+v, but net/http frames %v %d", b[:n], h, r.TransferEncoding, r.ContentLength)
		}
		host := r.Host
		if !strings.Contains(host[strings.LastIndexByte(host, ']')+1:], ":") {
			host += ":" + strconv.Itoa(int(d.Port))
		}
		if same, err := ParseAuthority(host); err != nil || same != d {
			t.Errorf("%q: %v, but net/http goes to %q", b[:n], d, r.Host)
		}
	})
}
