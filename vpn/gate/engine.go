package gate

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// engine is what seals and opens the packets: wireguard-go in this process, or the kernel.
type engine interface {
	// add makes the peers of sessions, or leaves those that are there: a key that is added anew has forgotten which
	// handshakes were made, and takes a recorded one for new.
	add(...newcomer) error
	remove(session.Key) error
	// keep removes the peers that are not among these.
	keep(map[session.Key]*peer) error
	// statuses are of the peers whose handshake is complete.
	statuses() (map[session.Key]status, error)
	// begin a handshake with a peer, where its endpoint is known.
	begin(session.Key)
	close()
}

// counter of handshakes, from any number on.
type counter interface {
	Handshakes() uint64 // when it moves, some peer's endpoint may have
	Responses() uint64  // to initiations of the server
}

// newcomer is a peer to be, with where it was last, if that is known.
type newcomer struct {
	session.Session
	endpoint netip.AddrPort
}

// status is what the engine says of a peer whose handshake is complete.
type status struct {
	endpoint       netip.AddrPort
	stream         bool // its packets come by TLS, from endpoint
	handshake      time.Time
	received, sent uint64 // bytes
}

// userspace is wireguard-go.
type userspace struct{ *device.Device }

func (u userspace) add(list ...newcomer) error {
	var config strings.Builder
	for _, n := range list {
		fmt.Fprintf(&config, "public_key=%x\npreshared_key=%x\nreplace_allowed_ips=true\nallowed_ip=%s/32\n", n.PublicKey, n.PresharedKey, n.Address)
		if n.endpoint.IsValid() {
			fmt.Fprintf(&config, "endpoint=%v\n", n.endpoint)
		}
	}
	return u.IpcSet(config.String()) // its errors quote no values
}

func (u userspace) remove(key session.Key) error {
	return u.IpcSet(fmt.Sprintf("public_key=%x\nremove=true\n", key))
}

// keep: a device that begins has no peers.
func (u userspace) keep(map[session.Key]*peer) error { return nil }

func (u userspace) begin(key session.Key) {
	if p := u.LookupPeer(device.NoisePublicKey(key)); p != nil {
		_ = p.SendHandshakeInitiation(false) // the device repeats it
	}
}

// close: peers go first, since closing the device closes the TUN before them.
func (u userspace) close() {
	u.RemoveAllPeers()
	u.Close()
}

// statuses reads the device's state (https://www.wireguard.com/xplatform/). The text holds private and preshared keys:
// it must never be logged.
func (u userspace) statuses() (map[session.Key]status, error) {
	text, err := u.IpcGet()
	if err != nil {
		return nil, err
	}
	list := map[session.Key]status{}
	var key session.Key
	var s status
	note := func() {
		if s.endpoint.IsValid() && !s.handshake.IsZero() {
			list[key] = s
		}
		s = status{}
	}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "=")
		switch name {
		case "public_key":
			note()
			b, err := hex.DecodeString(value)
			if err != nil || len(b) != len(key) {
				return nil, errors.New("the device lists a public key that is none")
			}
			key = session.Key(b)
		case "endpoint":
			value, s.stream = strings.CutPrefix(value, vpn.StreamMark)
			if e, err := netip.ParseAddrPort(value); err == nil {
				s.endpoint = netip.AddrPortFrom(e.Addr().Unmap().WithZone(""), e.Port())
			}
		case "last_handshake_time_sec":
			var sec int64
			if _, err := fmt.Sscan(value, &sec); err == nil && sec > 0 {
				s.handshake = time.Unix(sec, 0).UTC()
			}
		case "rx_bytes":
			_, _ = fmt.Sscan(value, &s.received)
		case "tx_bytes":
			_, _ = fmt.Sscan(value, &s.sent)
		}
	}
	note()
	return list, nil
}
