package proxy

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
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

// grease makes a ClientHello as Chromium does: values nobody knows in every list (RFC 8701), an encrypted ClientHello that is
// none, and the name anywhere among the extensions.
func grease(name string, at int) []byte {
	extension := func(kind uint16, body ...byte) []byte {
		return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, kind), uint16(len(body))), body...)
	}
	list := append(binary.BigEndian.AppendUint16([]byte{0}, uint16(len(name))), name...)
	sni := extension(0, append(binary.BigEndian.AppendUint16(nil, uint16(len(list))), list...)...)
	others := [][]byte{extension(0x0a0a), extension(0x002b, 4, 0x7a, 0x7a, 3, 4), extension(0xfe0d, make([]byte, 186)...), extension(0x0033, 0, 5, 0x8a, 0x8a, 0, 1, 0), extension(0xdada, 0)}
	extensions := bytes.Join(slices.Insert(others, at, sni), nil)
	body := append([]byte{3, 3}, make([]byte, 32)...)
	body = append(body, 0, 0, 4, 0x1a, 0x1a, 0x13, 0x01, 1, 0)
	body = append(binary.BigEndian.AppendUint16(body, uint16(len(extensions))), extensions...)
	hello := append([]byte{1, 0, byte(len(body) >> 8), byte(len(body))}, body...)
	return append([]byte{22, 3, 1, byte(len(hello) >> 8), byte(len(hello))}, hello...)
}

func TestServerNameIsFoundAmongWhatNobodyKnows(t *testing.T) {
	for at := range 6 {
		for _, size := range []int{1, 50, 1 << 14} {
			if name, err := serverName(split(grease("www.lab.test", at), size)); name != "www.lab.test" || err != nil {
				t.Errorf("name %d of the extensions, records of %d: %q, %v", at, size, name, err)
			}
		}
	}
}

// encrypted is the configuration of an encrypted ClientHello whose cover is public (draft-ietf-tls-esni, 4).
func encrypted(t *testing.T, public string) []byte {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var b cryptobyte.Builder
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(0xfe0d)
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint8(7)     // its id
			b.AddUint16(0x20) // X25519
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(key.PublicKey().Bytes()) })
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddUint16(1); b.AddUint16(1) }) // HKDF-SHA256, AES-128-GCM
			b.AddUint8(32)
			b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(public)) })
			b.AddUint16(0)
		})
	})
	return b.BytesOrPanic()
}

// Of two names the one in the open counts, since it is all that can be known. A server that is reached under an allowed name
// may then show another of its sites, as it may after any handshake; another server is not reached.
func TestAnEncryptedHelloIsJudgedByItsOuterName(t *testing.T) {
	to := Destination{Name: "www.lab.test", Port: 443}
	for _, tt := range []struct {
		outer, inner string
		want         Reason
	}{
		{"www.lab.test", "hidden.lab.test", ""},
		{"cover.example", "www.lab.test", SNIMismatch},
		{"cover.example", "hidden.lab.test", SNIMismatch},
	} {
		name, err := serverName(hello(t, &tls.Config{ServerName: tt.inner, EncryptedClientHelloConfigList: encrypted(t, tt.outer), MinVersion: tls.VersionTLS13}))
		if why := checkName(name, to); err != nil || name != tt.outer || why != tt.want {
			t.Errorf("%s around %s: %q, %v, %q; want %q", tt.outer, tt.inner, name, err, why, tt.want)
		}
	}
}

// slowServerName reads a whole ClientHello as slowly and obviously as possible. It panics on anything else.
func slowServerName(b []byte) (name string) {
	b = slices.Clip(b) // or what lies past its end could be read
	var hello []byte
	number := func(b []byte) (n int) {
		for _, c := range b {
			n = n<<8 | int(c)
		}
		return n
	}
	must := func(ok bool) {
		if !ok {
			panic("not a ClientHello")
		}
	}
	for len(hello) < 4 || len(hello) < 4+number(hello[1:4]) {
		must(b[0] == 22 && b[1] == 3)
		size := number(b[3:5])
		must(size > 0 && size <= 16384)
		hello = append(hello, b[5:5+size]...)
		b = b[5+size:]
	}
	hello = slices.Clip(hello)
	must(hello[0] == 1 && number(hello[1:4]) <= maxHello && len(hello) == 4+number(hello[1:4]))
	at := 4 + 2 + 32
	at += 1 + number(hello[at:at+1])
	at += 2 + number(hello[at:at+2])
	at += 1 + number(hello[at:at+1])
	if at == len(hello) {
		return ""
	}
	must(at+2+number(hello[at:at+2]) == len(hello))
	seen := map[int]bool{}
	for at += 2; at < len(hello); {
		kind, size := number(hello[at:at+2]), number(hello[at+2:at+4])
		body := hello[at+4 : at+4+size]
		must(!seen[kind])
		seen[kind] = true
		if at += 4 + size; kind == 0 {
			must(number(body[:2]) == size-2 && body[2] == 0 && number(body[3:5]) == size-5 && size > 5)
			name = string(body[5:])
		}
	}
	return name
}

// seen is the server name that crypto/tls's server sees, if it gets as far as looking.
func seen(b []byte) (name string, ok bool) {
	tls.Server(recorded{in: bytes.NewReader(b)}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		name, ok = h.ServerName, true
		return nil, errors.New("that is all")
	}}).Handshake()
	return name, ok
}

// recorded is a connection of which one side has been said already.
type recorded struct {
	net.Conn
	in *bytes.Reader
}

func (c recorded) Read(b []byte) (int, error)  { return c.in.Read(b) }
func (c recorded) Write(b []byte) (int, error) { return len(b), nil }
func (c recorded) Close() error                { return nil }

// What is accepted here must be read the same by a real server, and what a real server reads as a hello for some name must
// never pass as one for another.
func FuzzServerName(f *testing.F) {
	for _, c := range []*tls.Config{{ServerName: "www.lab.test"}, {InsecureSkipVerify: true}, {ServerName: "a.b", MaxVersion: tls.VersionTLS12}} {
		b := hello(f, c)
		f.Add(b)
		f.Add(split(b, 50))
		f.Add(split(b, 3))
	}
	f.Add(grease("www.lab.test", 3))
	f.Add([]byte("\x16\x03\x01\x00\x04\x01\x00\x00\x00"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name, err := serverName(b)
		slow, whole := func() (name string, ok bool) {
			defer func() { recover() }()
			name = slowServerName(b)
			return name, true
		}()
		if whole != (err == nil) || whole && name != slow {
			t.Errorf("%q, %v; slowly %q, %v", name, err, slow, whole)
		}
		// What has come decides; what comes later changes nothing but a wish for more.
		for i := range min(len(b), 600) {
			early, eerr := serverName(b[:i])
			if !errors.Is(eerr, errMore) && (early != name || (eerr == nil) != (err == nil)) {
				t.Fatalf("after %d bytes %q, %v; after all %q, %v", i, early, eerr, name, err)
			}
		}
		theirs, ok := seen(b)
		if err == nil && ok && name != theirs {
			t.Errorf("%q here, %q at a server", name, theirs)
		}
		if errors.Is(err, errMore) && ok {
			t.Errorf("more wanted here, enough (%q) for a server", theirs)
		}
	})
}

func TestATunnelOpensWithAHelloForItsName(t *testing.T) {
	cfg := openConfig()
	cfg.Rules[0].TLS = true
	l := startLab(t, cfg)
	server := &tls.Config{Certificates: []tls.Certificate{certificate(t, "www.lab.test")}}
	got := make(chan int, 100)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) {
		tc := tls.Server(c, server)
		if err := tc.Handshake(); err != nil {
			got <- 0
			return
		}
		n, _ := io.Copy(tc, tc)
		got <- int(n)
	})
	p := ":" + strconv.Itoa(int(at.Port()))
	for _, tt := range []struct {
		name, target, sni string
		piece             int
		want              Reason
	}{
		{"the name", "www.lab.test" + p, "www.lab.test", 0, ""},
		{"the name, in capitals", "www.lab.test" + p, "WWW.lab.TEST", 0, ""},
		{"the name, in pieces", "www.lab.test" + p, "www.lab.test", 7, ""},
		{"another name", "www.lab.test" + p, "evil.test", 0, SNIMismatch},
		{"no name", "www.lab.test" + p, "", 0, SNIMissing},
		{"an address and no name", at.String(), "", 0, ""},
		{"an address and a name", at.String(), "www.lab.test", 0, SNIMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l.t = t
			c := l.tunnel("10.77.0.2", tt.target)
			tc := tls.Client(pieces{c, tt.piece}, &tls.Config{ServerName: tt.sni, InsecureSkipVerify: true})
			err := tc.Handshake()
			if tt.want != "" {
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("handshake: %v, want a reset", err)
				}
				if a := l.next(); a.Decision.Allow || a.Decision.Reason != tt.want || a.End != tt.want {
					t.Errorf("logged %+v", a)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(tc, "hello")
			tc.CloseWrite()
			if b, err := io.ReadAll(tc); string(b) != "hello" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
			c.Close()
			if a := l.next(); !a.Decision.Allow || a.Decision.Reason != Allowed {
				t.Errorf("logged %+v", a)
			}
		})
	}
	l.t = t
	for raw, want := range map[string]Reason{
		"GET / HTTP/1.1\r\n\r\n": NotTLS, "SSH-2.0-x\r\n": NotTLS, "\x16\x03\x01\x00\x00": NotTLS,
		"\x16\x03\x01\x40\x01": NotTLS, "\x16\x03\x01\x00\x04\x01\x00\x50\x00": NotTLS,
	} {
		c := l.tunnel("10.77.0.2", "www.lab.test"+p)
		io.WriteString(c, raw)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%q: %v", raw, err)
		}
		if a := l.next(); a.Decision.Reason != want {
			t.Errorf("%q: logged %+v", raw, a)
		}
	}
	// Nothing at all, or only the beginning: ten seconds, and not a byte from the server before.
	c := l.tunnel("10.77.0.2", "www.lab.test"+p)
	io.WriteString(c, "\x16\x03\x01\x01\x00\x01")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("half a hello: %v", err)
	}
	if a := l.next(); a.Decision.Reason != SNITimeout || a.Duration < 9*time.Second {
		t.Errorf("logged %+v", a)
	}
	// Plain HTTP is no way around.
	if status, _ := ask(t, l.from("10.77.0.2"), "GET http://www.lab.test"+p+"/ HTTP/1.1\r\nHost: www.lab.test"+p+"\r\n\r\n"); status != 403 {
		t.Errorf("plain: %d", status)
	}
	if a := l.next(); a.Decision.Reason != TLSRequired {
		t.Errorf("plain: %+v", a)
	}
}
