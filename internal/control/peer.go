package control

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

type peerKey struct{}

// withPeer notes who is at the other end of a unix socket, as the kernel had it when he connected.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	if p, ok := c.(*guest); ok {
		return context.WithValue(ctx, peerKey{}, p.peer)
	}
	return ctx
}

// loginHeader is what a command reads of its own login uid. The service sees no other user's processes.
const loginHeader = "Perimeterd-Login"

type loginKey struct{}

// withLogin takes root's word for the account that logged in, which root could set anyway, and nobody else's.
func withLogin(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if said := r.Header.Get(loginHeader); said != "" && peer(r.Context()).Uid == 0 {
			r = r.WithContext(context.WithValue(r.Context(), loginKey{}, said))
		}
		h.ServeHTTP(w, r)
	})
}

func peerOf(c *net.UnixConn) (peer *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if e := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return nil, e
	}
	return peer, err
}

// peer is who asks. Without a socket it is who runs this process.
func peer(ctx context.Context) *unix.Ucred {
	if p, ok := ctx.Value(peerKey{}).(*unix.Ucred); ok {
		return p
	}
	return &unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Getuid())}
}

// by names who asks, for the audit: the account, and where that is another's the one which logged in.
func by(ctx context.Context) string {
	peer := peer(ctx)
	name := account(peer.Uid)
	// Who became root by sudo keeps this (credentials(7)); without auditing it is -1. The process may be another by now, which
	// only its owner can bring about.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/loginuid", peer.Pid))
	if said, ok := ctx.Value(loginKey{}).(string); err != nil && ok {
		text, err = []byte(said), nil
	}
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
