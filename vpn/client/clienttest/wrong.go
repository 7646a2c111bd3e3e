package clienttest

import (
	"context"
	"crypto/tls"
	"net"
)

// ServeWrong accepts on l until ctx ends, and gives each connection to talk, which speaks no session API: it may hold, break
// and flood it. The connection ends with talk.
func ServeWrong(ctx context.Context, l net.Listener, talk func(net.Conn)) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			return ctx.Err()
		}
		go func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			talk(c)
		}()
	}
}

// Authenticated is talk after the gate's own handshake, which asks for the client's certificate and judges nothing.
func (g *Gate) Authenticated(talk func(net.Conn)) func(net.Conn) {
	config := &tls.Config{Certificates: []tls.Certificate{g.cert}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert}
	return func(c net.Conn) {
		t := tls.Server(c, config)
		defer t.Close()
		if t.Handshake() == nil {
			talk(t)
		}
	}
}

// Old is talk after a handshake of TLS 1.2, as gates of others have it.
func (g *Gate) Old(talk func(net.Conn)) func(net.Conn) {
	config := &tls.Config{Certificates: []tls.Certificate{g.cert}, MaxVersion: tls.VersionTLS12}
	return func(c net.Conn) {
		t := tls.Server(c, config)
		defer t.Close()
		if t.Handshake() == nil {
			talk(t)
		}
	}
}
