package control

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

type peerKey struct{}

// withPeer notes who is at the other end of a unix socket, as the kernel had it when he connected.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var peer *unix.Ucred
	if e := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, peer)
}

// by names who asks, for the audit: the account, and where that is another's the one which logged in. Without a socket it is who
// runs this process.
func by(ctx context.Context) string {
	peer, ok := ctx.Value(peerKey{}).(*unix.Ucred)
	if !ok {
		peer = &unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Getuid())}
	}
	name := account(peer.Uid)
	// Who became root by sudo keeps this (credentials(7)); without auditing it is -1. The process may be another by now, which
	// only its owner can bring about.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/loginuid", peer.Pid))
	if login, e := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil && e == nil && login != 1<<32-1 && uint32(login) != peer.Uid {
		name += ", logged in as " + account(uint32(login))
	}
	return name
}

func account(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	u, err := user.LookupId(id)
	if err != nil {
		return "uid " + id
	}
	return u.Username + " (" + id + ")"
}
