package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// owners asks the kernel whose socket is at the other end of a connection on this machine (sock_diag(7)).
type owners struct{ conn *netlink.Conn }

func newOwners() (*owners, error) {
	conn, err := netlink.Dial(unix.NETLINK_INET_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	return &owners{conn}, nil
}

func (o *owners) close() { o.conn.Close() }

const (
	sockDiagByFamily = 20
	tcpEstablished   = 1
	tcpFinWait1      = 4
	tcpFinWait2      = 5
)

// of returns the user of the far socket of c, an IPv4 connection of this machine. A socket that no process holds any more
// has no user: the kernel says 0 then, which is root.
func (o *owners) of(c *net.TCPConn) (uid int, err error) {
	far, near := c.RemoteAddr().(*net.TCPAddr).AddrPort(), c.LocalAddr().(*net.TCPAddr).AddrPort()
	// struct inet_diag_req_v2 of linux/inet_diag.h.
	req := make([]byte, 56)
	req[0], req[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[4:], 1<<tcpEstablished|1<<tcpFinWait1|1<<tcpFinWait2)
	binary.BigEndian.PutUint16(req[8:], far.Port())
	binary.BigEndian.PutUint16(req[10:], near.Port())
	copy(req[12:], ip4(far.Addr()))
	copy(req[28:], ip4(near.Addr()))
	binary.NativeEndian.PutUint64(req[48:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	replies, err := o.conn.Execute(netlink.Message{Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request}, Data: req})
	if err != nil {
		return 0, fmt.Errorf("sock_diag: %w", err)
	}
	// struct inet_diag_msg.
	if len(replies) != 1 || len(replies[0].Data) < 72 {
		return 0, errors.New("sock_diag: an answer of another form")
	}
	b := replies[0].Data
	state, inode := b[1], binary.NativeEndian.Uint32(b[68:])
	if state != tcpEstablished && state != tcpFinWait1 && state != tcpFinWait2 || inode == 0 ||
		binary.BigEndian.Uint16(b[4:]) != far.Port() || binary.BigEndian.Uint16(b[6:]) != near.Port() {
		return 0, errors.New("sock_diag: nobody holds the socket any more")
	}
	return int(binary.NativeEndian.Uint32(b[64:])), nil
}

func ip4(a netip.Addr) []byte { b := a.Unmap().As4(); return b[:] }
