//go:build linux

package swarm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

const mtu = 1420

func prefix(a netip.Addr) *net.IPNet { return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)} }

// tun is a member's end of the shared TUN device. One packet at a time keeps a device's buffers at a quarter of a megabyte:
// there are thousands.
type tun struct {
	member *Member
	once   sync.Once
	closed chan struct{}
}

func (t *tun) File() *os.File { return nil }

func (t *tun) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p := <-t.member.in:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	case <-t.closed:
		return 0, os.ErrClosed
	}
}

func (t *tun) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		if isEcho(b[offset:]) {
			select {
			case t.member.echoes <- struct{}{}:
			default:
			}
			continue
		}
		if _, err := t.member.swarm.tun.Write(b[offset:]); err != nil {
			return 0, err
		}
	}
	return len(bufs), nil
}

// echoID tells our echoes from the kernel's.
const echoID = 0xec40

// echo is an ICMP echo request.
func echo(from, to netip.Addr) []byte {
	p := make([]byte, 28)
	p[0], p[3], p[8], p[9] = 0x45, 28, 64, unix.IPPROTO_ICMP
	copy(p[12:], from.AsSlice())
	copy(p[16:], to.AsSlice())
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	p[20] = 8
	binary.BigEndian.PutUint16(p[24:], echoID)
	binary.BigEndian.PutUint16(p[22:], checksum(p[20:]))
	return p
}

// isEcho tells whether a packet answers one.
func isEcho(p []byte) bool {
	return len(p) >= 28 && p[0] == 0x45 && p[9] == unix.IPPROTO_ICMP && p[20] == 0 && binary.BigEndian.Uint16(p[24:]) == echoID
}

// checksum is RFC 1071's, of an even number of bytes.
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum>>16 + sum&0xffff
	return ^uint16(sum>>16 + sum)
}

func (t *tun) MTU() (int, error)     { return mtu, nil }
func (t *tun) Name() (string, error) { return link, nil }
func (t *tun) BatchSize() int        { return 1 }

func (t *tun) Events() <-chan wgtun.Event {
	none := make(chan wgtun.Event)
	close(none)
	return none
}

func (t *tun) Close() error {
	t.once.Do(func() { close(t.closed) })
	return nil
}

// bind is one UDP socket on the member's outer address.
type bind struct {
	member   *Member
	injected chan []byte

	mu   sync.Mutex
	conn *net.UDPConn // nil while closed
}

func (b *bind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	p, err := b.member.swarm.lab.Client.ListenPacket("udp4", netip.AddrPortFrom(b.member.Outer, 0).String())
	if err != nil {
		return nil, 0, err
	}
	c := p.(*net.UDPConn)
	b.mu.Lock()
	b.conn = c
	b.mu.Unlock()
	server := &conn.StdNetEndpoint{AddrPort: b.member.swarm.gate}
	return []conn.ReceiveFunc{func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		eps[0] = server
		for {
			n, _, err := c.ReadFromUDPAddrPort(bufs[0])
			if errors.Is(err, os.ErrDeadlineExceeded) {
				c.SetReadDeadline(time.Time{})
				select {
				case m := <-b.injected:
					sizes[0] = copy(bufs[0], m)
					return 1, nil
				default:
					continue
				}
			}
			sizes[0] = n
			return 1, err
		}
	}}, uint16(c.LocalAddr().(*net.UDPAddr).Port), nil
}

// inject hands the device a message as if the server had sent it.
func (b *bind) inject(m []byte) error {
	b.injected <- m
	return b.socket().SetReadDeadline(time.Unix(1, 0))
}

func (b *bind) socket() *net.UDPConn {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.conn
}

// knock sends a token from the tunnel's socket.
func (b *bind) knock() error {
	t := b.member.token()
	_, err := b.socket().WriteToUDPAddrPort(t[:], b.member.swarm.gate)
	return err
}

func (b *bind) Send(bufs [][]byte, ep conn.Endpoint) error {
	if f, ok := ep.(*firstMessage); ok {
		select {
		case f.out <- append([]byte(nil), bufs[0]...):
		default:
		}
		return nil
	}
	c := b.socket()
	if c == nil {
		return net.ErrClosed
	}
	for _, d := range bufs {
		if _, err := c.WriteToUDPAddrPort(d, ep.(*conn.StdNetEndpoint).AddrPort); err != nil {
			return err
		}
	}
	return nil
}

func (b *bind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == nil {
		return nil
	}
	err := b.conn.Close()
	b.conn = nil
	return err
}

func (b *bind) SetMark(uint32) error { return nil }
func (b *bind) BatchSize() int       { return 1 }

func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	a, err := netip.ParseAddrPort(s)
	return &conn.StdNetEndpoint{AddrPort: a}, err
}

// firstMessage is where the initiation goes that travels in the request.
type firstMessage struct {
	conn.StdNetEndpoint
	out chan []byte
}

// LastHandshake is when the member's device had its last complete handshake.
func (m *Member) LastHandshake() time.Time {
	dev := m.out.Load()
	if dev == nil {
		return time.Time{}
	}
	text, err := dev.IpcGet()
	if err != nil {
		return time.Time{}
	}
	var sec, nsec int64
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		switch name, value, _ := strings.Cut(lines.Text(), "="); name {
		case "last_handshake_time_sec":
			sec, _ = strconv.ParseInt(value, 10, 64)
		case "last_handshake_time_nsec":
			nsec, _ = strconv.ParseInt(value, 10, 64)
		}
	}
	return time.Unix(sec, nsec)
}
