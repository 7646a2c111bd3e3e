package gate

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// call is a connection to the gate that is kept after an answer.
func (b *bench) call(c *http.Client) *tls.Conn {
	b.t.Helper()
	conn, err := tls.Dial("tcp", b.address, c.Transport.(*http.Transport).TLSClientConfig)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: gate\r\n\r\n", vpn.SessionPath)
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || answer.StatusCode != http.StatusOK {
		b.t.Fatalf("%v %v", answer, err)
	}
	return conn
}

func wantReset(t *testing.T, c *tls.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d, %v: want a reset", n, err)
	}
}

func wantAlive(t *testing.T, c *tls.Conn) {
	t.Helper()
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: gate\r\n\r\n", vpn.SessionPath); err != nil {
		t.Error(err)
		return
	}
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Errorf("%v %v", answer, err)
	}
}

func TestWhoIsThrownOutLosesHisConnectionsToTheGateAndNobodyElseDoes(t *testing.T) {
	b := newBench(t, nil)
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	bobs := b.call(bob)
	for _, why := range []session.Reason{session.Kicked, session.Revoked, session.Expired} {
		_, public := keyPair(t)
		id, err := session.ParseID(b.post(alice, public).ID)
		if err != nil {
			t.Fatal(err)
		}
		hers := []*tls.Conn{b.call(alice), b.call(alice)}
		if err := b.store.End(id, why); err != nil {
			t.Fatal(err)
		}
		for _, c := range hers {
			wantReset(t, c)
		}
	}
	wantAlive(t, bobs)
	b.gate.callers.mu.Lock()
	if n := len(b.gate.callers.by); n > 2 { // bob's, and one that his client may keep
		t.Errorf("%d callers are remembered", n)
	}
	b.gate.callers.mu.Unlock()
}

func TestOwnEndOfASessionLeavesTheConnectionItWasAskedBy(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	_, public := keyPair(t)
	reply := b.post(alice, public)
	c := b.call(alice)
	if status, _, err := b.do(alice, "DELETE", vpn.SessionPath+"/"+reply.ID, ""); status != 204 {
		t.Fatal(status, err)
	}
	wantAlive(t, c)
}

func TestRevokedCallerWithoutASessionIsCutToo(t *testing.T) {
	b := newBench(t, nil)
	alice, bob := b.call(b.user("alice", "mac", time.Hour)), b.call(b.user("bob", "mac", time.Hour))
	if _, err := b.users.Revoke("alice", "", time.Now()); err != nil {
		t.Fatal(err)
	}
	b.gate.CutRefused()
	wantReset(t, alice)
	wantAlive(t, bob)
}

// A retransmission to an address must not reach another owner.
func TestAddressRestsOnlyOnceNothingUsesIt(t *testing.T) {
	b := newBench(t, nil)
	var open atomic.Int64
	open.Store(1)
	b.gate.Track(func(session.ID) int { return int(open.Load()) })
	_, public := keyPair(t)
	reply := b.post(b.user("alice", "mac", time.Hour), public)
	id, err := session.ParseID(reply.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.store.End(id, session.Kicked); err != nil {
		t.Fatal(err)
	}
	rests := func() bool {
		b.gate.rest.Lock()
		defer b.gate.rest.Unlock()
		return len(b.gate.ended) == 0
	}
	b.gate.release(time.Now())
	if rests() {
		t.Error("the address of a session with an open connection was given back")
	}
	open.Store(0)
	eventually(t, "the address is given back", rests)
}
