package signer

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/identity"
)

// askPatience is how long an answer may take: one disk write and a signature, behind those of a few others.
const askPatience = 10 * time.Second

// Client asks a signer.
type Client struct {
	dial func() (c net.Conn, lasts bool, err error)

	mu   sync.Mutex
	conn net.Conn // that lasts; nil: to be dialed
}

// NewClient asks the signer at a socket, or where nobody listens there, one of its own that command makes, with the socket as
// its file descriptor 3. That one starts when it is first needed, again after it ended, and ends with this process or Close.
//
// Trusted says of whom a signer at the socket may be: one who can put a socket there, such as a daemon that was taken over,
// would swallow revocations.
func NewClient(socket string, trusted func(uid uint32) bool, command func() (*exec.Cmd, error)) *Client {
	return &Client{dial: func() (net.Conn, bool, error) {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
		if err == nil {
			uid, err := peer(c) // who made it listen
			if err == nil && !trusted(uid) {
				err = fmt.Errorf("%s: user %d listens there, who is not the signer: remove it", socket, uid)
			}
			if err != nil {
				return nil, false, errors.Join(err, c.Close())
			}
			return c, false, nil
		}
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			cmd, err := command()
			if err != nil {
				return nil, false, err
			}
			c, err := start(cmd)
			return c, true, err
		}
		return nil, false, err
	}}
}

func start(cmd *exec.Cmd) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "signer"), os.NewFile(uintptr(fds[1]), "signer")
	defer ours.Close()
	defer theirs.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{theirs}
	// An interrupt at the terminal is for this process; the signer ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the signer: %w", err), c.Close())
	}
	go cmd.Wait()
	return c, nil
}

// Connect starts or finds the signer now, and not when it is first needed.
func (c *Client) Connect() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn, lasts, err := c.dial()
	if err != nil {
		return err
	}
	if lasts {
		c.conn = conn
		return nil
	}
	return conn.Close()
}

// Close ends a signer of its own.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	return err
}

// Enrol issues a user's certificate for one device. Of the request (PKCS #10, DER or PEM) only the key counts. With replace the
// device's certificates so far are not renewed any more.
func (c *Client) Enrol(ctx context.Context, name, device string, replace bool, validity time.Duration, csr []byte) (*x509.Certificate, error) {
	return c.sign(ctx, request{Op: opEnrol, Name: name, Device: device, Replace: replace, Seconds: int64(validity / time.Second), Request: csr})
}

// Server issues the gate's certificate.
func (c *Client) Server(ctx context.Context, serverID, host string, csr []byte) (*x509.Certificate, error) {
	return c.sign(ctx, request{Op: opServer, ServerID: serverID, Host: host, Request: csr})
}

// Renew issues the successor of a certificate, for the key of the request. Proof is the old key's signature of
// vpn.RenewalMessage.
func (c *Client) Renew(ctx context.Context, old *x509.Certificate, csr, proof []byte) (*x509.Certificate, error) {
	return c.sign(ctx, request{Op: opRenew, Certificate: old.Raw, Request: csr, Proof: proof})
}

// Forget makes that nothing of the user's is renewed, or nothing of his device's.
func (c *Client) Forget(ctx context.Context, name, device string) error {
	_, err := c.ask(ctx, request{Op: opForget, Name: name, Device: device})
	return err
}

func (c *Client) sign(ctx context.Context, req request) (*x509.Certificate, error) {
	out, err := c.ask(ctx, req)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(out.Certificate)
	if err != nil {
		return nil, fmt.Errorf("the signer's answer: %w", err)
	}
	if csr, err := identity.ParseRequest(req.Request); err != nil || csr.Key != identity.HashKey(cert) {
		return nil, errors.New("the signer's answer is for another key")
	}
	return cert, nil
}

// ask sends a request. A refusal is a *Refusal.
func (c *Client) ask(ctx context.Context, req request) (out reply, err error) {
	packet, err := json.Marshal(req)
	if err != nil {
		return out, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	conn := c.conn
	if conn == nil {
		lasts := false
		if conn, lasts, err = c.dial(); err != nil {
			return out, err
		}
		if lasts {
			c.conn = conn
		} else {
			defer conn.Close()
		}
	}
	conn.SetDeadline(time.Now().Add(askPatience))
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	answer := make([]byte, maxPacket)
	n := 0
	if _, err = conn.Write(packet); err == nil {
		n, err = conn.Read(answer)
	}
	if !stop() || err != nil {
		if c.conn != nil { // an answer that comes late must not be the next request's
			c.conn.Close()
			c.conn = nil
		}
	}
	if err != nil {
		return out, fmt.Errorf("the signer gave no answer: %w", err)
	}
	if err := json.Unmarshal(answer[:n], &out); err != nil {
		return out, fmt.Errorf("the signer's answer: %w", err)
	}
	if out.Refusal != nil {
		return out, out.Refusal
	}
	return out, nil
}
