//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

const (
	patience  = 20 * time.Second // of every read and accept
	replySize = 1400             // bytes that the origin says to a ClientHello
)

// caller opens tunnels, with both of their ends in its hands: bare descriptors that block, so that neither another thread's
// turn nor Go's poller is in what is measured. It is for a thread in the namespace of the clients.
type caller struct {
	To     netip.AddrPort // the proxy, or the origin
	From   netip.Addr
	Target string // host:port, by name or address; empty: no proxy
	origin int    // listening socket
	ask    []byte
	hello  []byte
}

// caller is for one thread of several, and for its namespace. Host is the origin's name or address.
func (r *room) caller(c *contender, host string, thread int) (*caller, *lab.Namespace, error) {
	k, ns := &caller{To: c.at, From: r.source, Target: fmt.Sprintf("%s:%d", host, originPort+thread), origin: r.origins[thread]}, r.Bastion
	switch {
	case c.distant:
		k.From, ns = r.distant.Address, r.Client
	case !c.at.IsValid():
		k.To, k.From, k.Target = netip.AddrPortFrom(r.Cloud.Addr, uint16(originPort+thread)), r.Egress, ""
	}
	return k, ns, k.prepare()
}

// prepare makes what the caller says.
func (k *caller) prepare() (err error) {
	if k.Target != "" {
		k.ask = []byte("CONNECT " + k.Target + " HTTP/1.1\r\nHost: " + k.Target + "\r\nUser-Agent: aws-cli/2.17 md/awscrt#0.20\r\nProxy-Connection: Keep-Alive\r\n\r\n")
	}
	host, _, _ := strings.Cut(k.Target, ":")
	k.hello, err = clientHello(host)
	return err
}

// clientHello is Go's for a host, or for none. Nobody answers it.
func clientHello(host string) ([]byte, error) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go tls.Client(a, &tls.Config{ServerName: host, InsecureSkipVerify: true}).HandshakeContext(context.Background())
	head := make([]byte, 16<<10)
	b.SetDeadline(time.Now().Add(patience))
	n, err := b.Read(head)
	return head[:n], err
}

func listen(at netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err == nil {
		if err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err == nil {
			err = unix.Listen(fd, 4096)
		}
	}
	if err == nil {
		err = bound(fd)
	}
	return fd, err
}

// bound keeps fd from waiting for ever.
func bound(fd int) error {
	t := unix.NsecToTimeval(patience.Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t)
}

// connect opens a connection to the proxy or the origin.
func (k *caller) connect() (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	for _, o := range []struct{ level, option int }{{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}, {unix.IPPROTO_TCP, unix.TCP_NODELAY}} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, 1); err != nil {
			return -1, err
		}
	}
	if err := bound(fd); err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: k.From.As4()}); err != nil {
		return -1, err
	}
	return fd, unix.Connect(fd, &unix.SockaddrInet4{Port: int(k.To.Port()), Addr: k.To.Addr().As4()})
}

// open makes a tunnel in which a ClientHello has gone up and an answer has come down, as in every one that people use.
func (k *caller) open() (client, server int, err error) {
	server = -1
	if client, err = k.connect(); err != nil {
		return -1, -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(client)
			if server >= 0 {
				unix.Close(server)
			}
		}
	}()
	if server, err = k.begin(client, nil); err != nil {
		return client, server, err
	}
	return client, server, exchange(client, server, k.hello, replySize)
}

// begin asks for the tunnel, with early data behind the request, and takes the connection that comes to the origin.
func (k *caller) begin(client int, early []byte) (server int, err error) {
	if k.ask != nil {
		if err := writeAll(client, append(k.ask[:len(k.ask):len(k.ask)], early...)); err != nil {
			return -1, err
		}
	}
	for server, err = -1, unix.EINTR; err == unix.EINTR; {
		server, _, err = unix.Accept4(k.origin, unix.SOCK_CLOEXEC)
	}
	if err != nil {
		said := make([]byte, 200)
		n, _, _ := unix.Recvfrom(client, said, unix.MSG_DONTWAIT)
		return -1, fmt.Errorf("nobody came to the origin: %w; the proxy says %q", err, said[:max(n, 0)])
	}
	if err := unix.SetsockoptInt(server, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return server, err
	}
	if err := bound(server); err != nil {
		return server, err
	}
	if k.ask == nil {
		return server, nil
	}
	answer := make([]byte, 0, 1024)
	for !bytes.HasSuffix(answer, []byte("\r\n\r\n")) {
		n, err := unix.Read(client, answer[len(answer):cap(answer)])
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return server, fmt.Errorf("the proxy's answer ends after %q: %w", answer, err)
		}
		answer = answer[:len(answer)+n]
	}
	if !bytes.HasPrefix(answer, []byte("HTTP/1.1 200 ")) && !bytes.HasPrefix(answer, []byte("HTTP/1.0 200 ")) {
		return server, fmt.Errorf("the proxy says %q", answer)
	}
	return server, nil
}

// exchange sends a question up and an answer of some bytes down.
func exchange(client, server int, question []byte, answer int) error {
	var room [16 << 10]byte
	if err := writeAll(client, question); err != nil {
		return err
	}
	if err := readAll(server, room[:len(question)]); err != nil {
		return fmt.Errorf("at the origin: %w", err)
	}
	if err := writeAll(server, room[:answer]); err != nil {
		return err
	}
	if err := readAll(client, room[:answer]); err != nil {
		return fmt.Errorf("at the client: %w", err)
	}
	return nil
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func readAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("an end, %d bytes early", len(b))
		}
		b = b[n:]
	}
	return nil
}

// finish closes a tunnel. The server closes first: the other way round the proxy's ports would wait out their time, and
// looking for a free one would be what is measured.
func finish(client, server int) error {
	unix.Close(server)
	var b [1]byte
	n, err := unix.Read(client, b[:])
	for err == unix.EINTR {
		n, err = unix.Read(client, b[:])
	}
	unix.Close(client)
	if err == nil && n != 0 {
		err = fmt.Errorf("%d bytes", n)
	}
	if err != nil {
		return fmt.Errorf("the origin's end did not come: %w", err)
	}
	return nil
}

// threads runs fn at once on threads of their own, with a caller each.
func (r *room) threads(c *contender, host string, n int, fn func(thread int, k *caller) error) error {
	errs := make(chan error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			k, ns, err := r.caller(c, host, i)
			if err == nil {
				err = ns.Do(func() error { return fn(i, k) })
			}
			errs <- err
		})
	}
	all.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// each gives every contender its turn in every round, each round beginning with another.
func each(ctx context.Context, all []*contender, rounds int, turn func(round int, c *contender) error) error {
	for round := range rounds {
		for i := range all {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := turn(round, all[(i+round)%len(all)]); err != nil {
				return err
			}
		}
	}
	return nil
}
