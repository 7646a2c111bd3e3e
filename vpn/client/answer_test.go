package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"perimeterd/vpn"
)

// Whatever a gate answers, the client has a reply that it may act on, or a short sentence, and has read no more than it said.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 403 Forbidden\r\nRetry-After: 9\r\nContent-Length: 57\r\n\r\n{\"error\":{\"code\":\"revoked\",\"message\":\"\\u001b[31mred\"}}    ",
		"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"id\"\r\n0\r\n\r\n", "SSH-2.0-x\r\n", "HTTP/1.1 201 Created\r\nContent-Length: 99999999999\r\n\r\n{",
		"HTTP/1.1 201 Created\r\nContent-Length: 233\r\n\r\n" + `{"id":"00","address":"10.77.0.2/32","server_public_key":"AAAA","endpoint":"h:1","preshared_key":"AAAA","proxy":"10.77.0.1:3128","mtu":1400,"expires":"2030-01-01T00:00:00Z"}`,
		"HTTP/1.1 " + strings.Repeat("9", 5000) + "\r\n\r\n", "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 20000),
	} {
		f.Add([]byte(s))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		f.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	f.Fuzz(func(t *testing.T, answer []byte) {
		ours, theirs := net.Pipe()
		defer ours.Close()
		go func() {
			defer theirs.Close()
			s := tls.Server(theirs, config)
			req := make([]byte, 4096)
			if _, err := s.Read(req); err == nil {
				go io.Copy(io.Discard, s) // what follows the request
				s.Write(answer)
				s.Close()
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		c := tls.Client(ours, &tls.Config{InsecureSkipVerify: true})
		if err := c.HandshakeContext(ctx); err != nil {
			t.Fatal(err)
		}
		g := newGateConn(c, "gate")
		var reply vpn.SessionReply
		err := g.do(ctx, http.MethodPost, vpn.SessionPath, vpn.SessionRequest{}, &reply)
		if err == nil {
			err = checkReply(&reply)
		}
		if ctx.Err() != nil {
			t.Error("it waits for what cannot come")
		}
		if err == nil {
			if !reply.Proxy.Addr().IsPrivate() && !sharedSpace.Contains(reply.Proxy.Addr()) || len(reply.PresharedKey) != 32 {
				t.Errorf("taken: %+v", reply)
			}
			return
		}
		if text := err.Error(); len(text) > 1000 || strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) && r != '\n' }) {
			t.Errorf("%d bytes: %.300q", len(text), text)
		}
	})
}
