package firewall

import (
	"context"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Interlock is for net.ListenConfig.Control: it attaches, before bind, a socket filter that passes only packets that the
// gate chain marked. Accepted sockets inherit it. So when another tool flushes the ruleset, the gate is deaf until the
// table is back, instead of open. Classic BPF: linux/filter.h, SKF_AD_OFF + SKF_AD_MARK.
func Interlock(_, _ string, c syscall.RawConn) error {
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0xfffff000 + 20},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: GateMark},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	}); e != nil {
		return e
	}
	return err
}

// Listen opens a TCP listener that is deaf without the table.
func Listen(ctx context.Context, address string) (*net.TCPListener, error) {
	lc := net.ListenConfig{Control: Interlock}
	// A multipath socket would not hand the filter to its subflows.
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}
