package gate

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// streamOf asks for a stream as c, and returns the connection and the answer.
func (b *bench) streamOf(c *http.Client, query string) (*tls.Conn, *bufio.Reader, *http.Response) {
	b.t.Helper()
	conn, err := tls.Dial("tcp", b.address, c.Transport.(*http.Transport).TLSClientConfig)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprintf(conn, "GET %s%s HTTP/1.1\r\nHost: gate\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", vpn.StreamPath, query, vpn.StreamProtocol)
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return conn, in, resp
}

func (b *bench) say(conn io.Writer, datagram []byte) {
	b.t.Helper()
	if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(datagram))), datagram...)); err != nil {
		b.t.Fatal(err)
	}
}

func hear(conn *tls.Conn, in *bufio.Reader, wait time.Duration) ([]byte, error) {
	conn.SetReadDeadline(time.Now().Add(wait))
	var length [2]byte
	if _, err := io.ReadFull(in, length[:]); err != nil {
		return nil, err
	}
	d := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(in, d)
	return d, err
}

func TestStreamCarriesItsSessionsHandshakeAndNoOther(t *testing.T) {
	b := newBench(t, nil)
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	mine, public := keyPair(t)
	his, hisPublic := keyPair(t)
	reply, other := b.post(alice, public), b.post(bob, hisPublic)
	for query, want := range map[string]int{"?session=" + other.ID: 404, "?session=nonsense": 404} {
		if _, _, resp := b.streamOf(alice, query); resp.StatusCode != want {
			t.Errorf("%s: %s", query, resp.Status)
		}
	}
	if status, answer, _ := b.do(alice, "GET", vpn.StreamPath, ""); status != 400 || !strings.Contains(string(answer), "Upgrade: perimeter-wg/1") {
		t.Errorf("without an upgrade: %d %s", status, answer)
	}
	conn, in, resp := b.streamOf(alice, "")
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp.Status)
	}
	b.say(conn, craft(t, his, b.serverWG, time.Now()))
	if d, err := hear(conn, in, silence); err == nil {
		t.Errorf("bob's initiation on alice's stream is answered with %d bytes", len(d))
	}
	conn, in, resp = b.streamOf(alice, "?session="+reply.ID)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp.Status)
	}
	b.say(conn, craft(t, mine, b.serverWG, time.Now()))
	if d, err := hear(conn, in, answer); err != nil || len(d) != vpn.ResponseSize {
		t.Errorf("alice's own: %d bytes, %v", len(d), err)
	}
	if s := b.stranger(); !s.answered(craft(t, his, b.serverWG, time.Now().Add(time.Second)), answer) {
		t.Error("bob is not answered by UDP")
	}
}

func TestSessionHasOneStream(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	_, public := keyPair(t)
	b.post(alice, public)
	first, in, _ := b.streamOf(alice, "")
	for range 3 * perSource { // they do not use up what a source may have, either
		_, _, resp := b.streamOf(alice, "")
		if resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatal(resp.Status)
		}
	}
	if _, err := hear(first, in, answer); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the first stream: %v, want a reset", err)
	}
	b.gate.streams.mu.Lock()
	defer b.gate.streams.mu.Unlock()
	if n := len(b.gate.streams.by); n != 1 {
		t.Errorf("%d streams", n)
	}
}

func TestStreamIsResetWithItsSession(t *testing.T) {
	for _, why := range []session.Reason{session.Deleted, session.Kicked, session.Revoked, session.Expired, session.Replaced} {
		b := newBench(t, nil)
		alice := b.user("alice", "mac", time.Hour)
		_, public := keyPair(t)
		reply := b.post(alice, public)
		conn, in, _ := b.streamOf(alice, "")
		id, err := session.ParseID(reply.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.store.End(id, why); err != nil {
			t.Fatal(err)
		}
		if _, err := hear(conn, in, answer); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v, want a reset", why, err)
		}
	}
}

func TestStreamIsResetWithItsCertificate(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	_, public := keyPair(t)
	b.post(alice, public)
	conn, in, _ := b.streamOf(alice, "")
	b.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	b.gate.CutRefused()
	if _, err := hear(conn, in, answer); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}
