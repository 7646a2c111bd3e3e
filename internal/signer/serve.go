package signer

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/identity"
)

const (
	patience = 5 * time.Second // for a request, and for its answer to be taken
	callers  = 16              // connections of a user that are served at once
	standing = 4 * callers     // of a user at all
	nobody   = ^uint32(0)      // no user's id (POSIX: chown's -1): all who have no rights, as one user
)

// line is where a user's connections stand until they are served.
type line struct {
	served   chan struct{}
	standing atomic.Int32
}

// Become makes the process the user who owns the CA key, or where that is kept elsewhere the record, for good. A process that is not root's stays whose it is. The
// memory is closed to debuggers and core dumps.
func (s *Signer) Become() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if os.Geteuid() != 0 {
		return nil
	}
	st, err := s.keys.Stat(s.keysName)
	if errors.Is(err, fs.ErrNotExist) {
		st, err = s.keys.Stat(Renewable)
	}
	if err != nil {
		return err
	}
	owner := st.Sys().(*syscall.Stat_t)
	if owner.Uid == 0 {
		return nil
	}
	uid, gid := int(owner.Uid), int(owner.Gid)
	// For every thread: Go sees to that.
	return errors.Join(syscall.Setgroups([]int{}), syscall.Setresgid(gid, gid, gid), syscall.Setresuid(uid, uid, uid))
}

// Serve answers on a listener of the network "unixpacket" until ctx ends, one request a connection. Rights says what a
// user of this host may ask for.
func (s *Signer) Serve(ctx context.Context, ln *net.UnixListener, rights func(uid uint32) Rights) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	// One for each user, so that nobody keeps root from revoking; and one for all strangers, who are told that they are some.
	lines := map[uint32]*line{}
	for {
		c, err := ln.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		uid, err := peer(c)
		if err != nil {
			s.log.Warn("who asks is not known", "err", err)
			c.Close()
			continue
		}
		may, who := rights(uid), uid
		if may == Nothing {
			who = nobody
		}
		l := lines[who]
		if l == nil {
			l = &line{served: make(chan struct{}, callers)}
			lines[who] = l
		}
		if l.standing.Add(1) > standing {
			l.standing.Add(-1)
			c.Close()
			continue
		}
		go func() {
			defer func() { c.Close(); l.standing.Add(-1) }()
			select {
			case l.served <- struct{}{}:
				defer func() { <-l.served }()
			case <-time.After(patience):
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			if err := s.answer(c, uid, may); err != nil && !errors.Is(err, io.EOF) { // who only looks whether it is there
				s.log.Warn("request not answered", "uid", uid, "err", err)
			}
		}()
	}
}

// ServeOne answers request after request of the one process that holds the other end, until that ends.
func (s *Signer) ServeOne(c *net.UnixConn, may Rights) error {
	uid, err := peer(c)
	if err != nil {
		return err
	}
	for {
		switch err := s.answer(c, uid, may); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

func peer(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	e := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	})
	return uid, errors.Join(e, err)
}

// answer reads a packet and writes one.
func (s *Signer) answer(c *net.UnixConn, uid uint32, may Rights) error {
	packet := make([]byte, maxPacket+1) // a longer one is cut, and refused for its length
	n, err := c.Read(packet)
	if err != nil {
		return err
	}
	req, err := parse(packet[:n])
	var cert *x509.Certificate
	if err == nil {
		cert, err = s.do(req, may)
	}
	var out reply
	switch {
	case errors.As(err, &out.Refusal):
		s.log.Warn("signer refused", "op", req.Op, "uid", uid, "user", req.Name, "device", req.Device, "code", out.Refusal.Code, "err", out.Refusal.Text)
	case cert == nil:
		s.log.Info("signer forgot", "uid", uid, "user", req.Name, "device", req.Device)
	default:
		out.Certificate = cert.Raw
		key := identity.HashKey(cert)
		s.log.Info("signer signed", "op", req.Op, "uid", uid, "subject", cert.Subject.String(), "key", hex.EncodeToString(key[:]),
			"serial", cert.SerialNumber.Text(16), "until", cert.NotAfter)
	}
	text, err := json.Marshal(out)
	if err != nil {
		return err
	}
	_, err = c.Write(text)
	return err
}
