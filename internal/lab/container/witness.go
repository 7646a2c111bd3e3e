//go:build linux

package container

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

// witness sees every frame that comes out of a machine at the host's end of its cable (packet(7)), and keeps what of it is an answer:
// whatever is IP, but neighbour discovery and what IPv6 says to its own wire by itself.
type witness struct {
	fd    int
	ended chan struct{}

	mu      sync.Mutex
	closing bool
	err     error
	answers map[string]int // by kind: "tcp4/1194 SA" has the port that answered and TCP's flags
}

// newWitness begins to look at an interface.
func newWitness(ns *lab.Namespace, dev string) (*witness, error) {
	w := &witness{ended: make(chan struct{}), answers: map[string]int{}}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	err := ns.Do(func() error {
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("socket", err)
		}
		err = unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
		err = errors.Join(err, unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20))
		if err = errors.Join(err, unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index})); err != nil {
			return errors.Join(err, unix.Close(w.fd))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("witness at %s: %w", dev, err)
	}
	go w.watch()
	return w, nil
}

func (w *witness) watch() {
	defer close(w.ended)
	frame := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(w.fd, frame, 0)
		w.mu.Lock()
		switch at, ours := from.(*unix.SockaddrLinklayer); {
		case w.closing: // before an error: nothing came for a while, or the machine was turned off
			w.mu.Unlock()
			return
		case err == unix.EAGAIN || err == unix.EINTR:
		case err != nil:
			w.err = errors.Join(w.err, err)
		case ours && at.Pkttype == unix.PACKET_OUTGOING: // to the machine
		default:
			if kind := kindOf(frame[:n]); kind != "" {
				w.answers[kind]++
			}
		}
		w.mu.Unlock()
	}
}

// kindOf is empty for what is no answer.
func kindOf(frame []byte) string {
	const ethernet = 14
	if len(frame) < ethernet {
		return ""
	}
	p := frame[ethernet:]
	var proto, version byte
	var body []byte
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		if len(p) < 20 || len(p) < int(p[0]&15)*4 {
			return "short"
		}
		proto, version, body = p[9], '4', p[int(p[0]&15)*4:]
	case unix.ETH_P_IPV6:
		if len(p) < 40 {
			return "short"
		}
		proto, version, body = p[6], '6', p[40:]
		if p[24] == 0xff && p[25]&0x0f <= 2 { // to all on the wire: reports of groups, solicitations
			return ""
		}
	default:
		return ""
	}
	if len(body) < 8 || proto == unix.IPPROTO_TCP && len(body) < 20 {
		return fmt.Sprint("protocol ", proto)
	}
	switch proto {
	case unix.IPPROTO_TCP:
		var flags strings.Builder
		for i, f := range "FSRPA" {
			if body[13]&(1<<i) != 0 {
				flags.WriteRune(f)
			}
		}
		return fmt.Sprintf("tcp%c/%d %s", version, binary.BigEndian.Uint16(body), flags.String())
	case unix.IPPROTO_UDP:
		return fmt.Sprintf("udp%c/%d", version, binary.BigEndian.Uint16(body))
	case unix.IPPROTO_ICMP:
		return fmt.Sprintf("icmp4 %d/%d", body[0], body[1])
	case unix.IPPROTO_ICMPV6:
		if body[0] >= 133 && body[0] <= 137 {
			return ""
		}
		return fmt.Sprintf("icmp6 %d/%d", body[0], body[1])
	}
	return fmt.Sprint("protocol ", proto)
}

// seen are how many answers of each kind there were so far.
func (w *witness) seen() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.answers)
}

// Close ends it. A frame that found no room in its buffer is an error: it may have been an answer.
func (w *witness) Close() error {
	w.mu.Lock()
	w.closing = true
	w.mu.Unlock()
	<-w.ended
	stats, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err == nil && stats.Drops > 0 {
		err = fmt.Errorf("%d frames of %d were not seen", stats.Drops, stats.Packets)
	}
	return errors.Join(w.err, err, unix.Close(w.fd))
}
