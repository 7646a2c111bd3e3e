package firewall

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"perimeterd/knock"
)

func FuzzParseOpening(f *testing.F) {
	v4 := udp4(netip.MustParseAddr("198.18.1.2"), netip.MustParseAddr("198.18.1.1"), 1194, bytes.Repeat([]byte{7}, knock.TokenSize))
	f.Add(v4, uint32(7))
	f.Add(v4[:30], uint32(7))
	f.Add(append([]byte{0x60, 39: 0}, v4[20:]...), uint32(knock.Complete|9))
	f.Add([]byte{0x4f}, uint32(0))
	f.Fuzz(func(t *testing.T, packet []byte, mark uint32) {
		o, ok := parseOpening(packet, mark, time.Unix(0, 0))
		if !ok {
			return
		}
		if !o.Source.IsValid() || o.Credential > knock.MaxCredential || o.Sequence && o.Token != (knock.Token{}) {
			t.Errorf("%x: %+v", packet, o)
		}
		if o.Token != (knock.Token{}) && !bytes.Contains(packet, o.Token[:]) {
			t.Errorf("%x has no token %x", packet, o.Token)
		}
	})
}
