package client

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"time"

	"perimeterd/vpn"
)

// kept is a session on disk, for the next time that the tunnel comes up while it stands: knock and WireGuard's initiation then
// leave in one flight, and nothing is asked by TLS. It holds what the profile's file holds too, a key that opens the tunnel, and
// has the same mode.
type kept struct {
	Bound       string           `json:"bound"` // to the profile: see binding
	Private     []byte           `json:"private_key"`
	Session     vpn.SessionReply `json:"session"` // with its preshared key
	PostQuantum bool             `json:"post_quantum"`
	Gate        netip.AddrPort   `json:"gate"` // by UDP
	RoundTrip   time.Duration    `json:"round_trip"`
	Visited     []string         `json:"visited,omitempty"`
}

const (
	// maxKept bounds the file.
	maxKept = 16 << 10
	// keptLeft is what a session must have left to be worth it.
	keptLeft = time.Minute
	// The gate's answer is missed a round trip after the initiation was sent for the second time (resends), and a little more.
	warmMargin = 45 * time.Millisecond
	warmAtMost = 400 * time.Millisecond
)

// errStale says that the gate does not know the kept session's key any more. Its connection is open, to ask for another.
type errStale struct{ gate *gateConn }

func (errStale) Error() string { return "the kept session has ended" }

// binding tells profiles apart by what a session depends on: the gate, and whose certificate it is.
func (p *Profile) binding() string {
	h := sha256.Sum256([]byte(p.ServerID + "\n" + p.ServerPublicKey + "\n" + p.User + "\n" + p.Certificate))
	return base64.StdEncoding.EncodeToString(h[:])
}

func keptFile(p *Profile) (string, error) { return stateFile(p, ".session") }

// loadKept is nil where nothing of use is kept for the profile.
func loadKept(p *Profile, now time.Time) *kept {
	file, err := keptFile(p)
	if err != nil {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	if checkPrivate(f) != nil {
		return nil
	}
	if st, err := f.Stat(); err != nil || st.Size() > maxKept {
		return nil
	}
	var k kept
	if json.NewDecoder(f).Decode(&k) != nil || k.Bound != p.binding() || len(k.Private) != 32 || checkReply(&k.Session) != nil ||
		!k.Gate.IsValid() || k.Session.Expires.Sub(now) < keptLeft {
		return nil
	}
	return &k
}

func (k kept) save(p *Profile) error {
	k.Bound = p.binding()
	file, err := keptFile(p)
	if err != nil {
		return err
	}
	text, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return writePrivate(file, text)
}

// dropKept forgets what is kept for the profile.
func dropKept(p *Profile) error {
	file, err := keptFile(p)
	if err != nil {
		return err
	}
	if err := os.Remove(file); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// patience is how long the answer to the flight may take.
func (k *kept) patience() time.Duration {
	return min(k.RoundTrip*9/8+warmMargin, warmAtMost)
}

// privateKey is the kept session's, or a new one: the gate takes no key for a second session.
func (k *kept) privateKey() (*ecdh.PrivateKey, error) {
	if k == nil {
		return ecdh.X25519().GenerateKey(rand.Reader)
	}
	return ecdh.X25519().NewPrivateKey(k.Private)
}

// warm knocks and shakes hands in one flight, and says whether the tunnel is up. If not, the device goes on trying.
func (t *Tunnel) warm(ctx context.Context, o Options, k *kept) (bool, error) {
	t.Session, t.PostQuantum, t.Gate, t.roundTrip, t.visited = k.Session, k.PostQuantum, k.Gate, k.RoundTrip, k.Visited
	key := wgKey(k.Session.ServerPublicKey)
	if err := t.addPeer(key); err != nil {
		return false, err
	}
	if err := t.dev.IpcSet(peerConfig(&t.Session)); err != nil {
		return false, err
	}
	t.shared = k.Session.PresharedKey
	var err error
	if t.endpoint, err = t.wire.ParseEndpoint(t.Gate.String()); err != nil {
		return false, err
	}
	t.wire.gate.Store(&t.Gate)
	t.peer.SetEndpointFromPacket(t.endpoint)
	began := time.Now()
	_ = t.knock(o.Tokens, o.Profile.TunnelPort) // where it cannot, the window may be open
	if err := t.peer.SendHandshakeInitiation(false); err != nil {
		return false, nil // no network, it seems: the longer way says so
	}
	if o.Progress != nil {
		o.Progress("knock and handshake sent")
	}
	if err := t.link.Configure(t.Session.Address.Addr(), t.Session.Proxy.Addr(), t.Session.MTU, false); err != nil {
		return false, err
	}
	t.configured = true
	select {
	case <-t.wire.keyed:
		t.roundTrip = time.Since(began)
		return true, t.welcome(o)
	case <-time.After(time.Until(began.Add(k.patience()))):
	case <-ctx.Done():
		return false, ctx.Err()
	}
	// The knock was lost, or the answer. A token that came already opens nothing more, so the same may go again; not before, or
	// the gate would tell of a replay whenever the way is long.
	_ = t.knock(o.Tokens, o.Profile.TunnelPort)
	_ = t.rekey()
	return false, nil
}

// welcome is what is left to do when the kept session has answered.
func (t *Tunnel) welcome(o Options) error {
	o.Tokens.Answered()
	t.proven = true
	t.Session.PresharedKey = nil
	return t.keepAlive()
}

// keep writes the session down for the next time.
func (t *Tunnel) keep(p *Profile, visited []string) error {
	k := kept{Private: t.private.Bytes(), Session: t.Session, PostQuantum: t.PostQuantum, Gate: t.Gate, RoundTrip: t.roundTrip, Visited: visited}
	k.Session.PresharedKey = t.shared
	return k.save(p)
}

// peerConfig is what the device must know of the gate for a session.
func peerConfig(s *vpn.SessionReply) string {
	config := "public_key=" + wgKey(s.ServerPublicKey).hex() + "\nupdate_only=true\npreshared_key=" + hex.EncodeToString(s.PresharedKey) + "\n"
	for _, a := range []netip.AddrPort{s.Proxy, s.Console} {
		if a.IsValid() {
			config += "allowed_ip=" + netip.PrefixFrom(a.Addr(), a.Addr().BitLen()).String() + "\n"
		}
	}
	return config
}
