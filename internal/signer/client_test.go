package signer

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/identity"
)

// FuzzAnswer is a gate that was taken over: whatever it sends, no certificate comes back.
func FuzzAnswer(f *testing.F) {
	b := newBench(f)
	key, err := identity.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	der := csr(f, key, "alice")
	cert, err := b.do(request{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 3600, Request: der}, Everything)
	if err != nil {
		f.Fatal(err)
	}
	for _, req := range []request{
		{Op: opEnrol, Name: "alice", Device: "mac", Seconds: 3600, Request: der},
		{Op: opRenew, Certificate: cert.Raw, Request: der, Proof: []byte{1}},
		{Op: opForget, Name: "bob"},
	} {
		f.Add(mustJSON(f, req))
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		req, err := parse(packet)
		if err != nil {
			wantCode(t, err, BadRequest)
			return
		}
		if cert, err := b.do(req, Renewals); cert != nil || err == nil && req.Op != opForget {
			t.Errorf("%v, %v", cert, err)
		}
	})
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// A daemon that was taken over listens in the signer's place.
func TestOthersAtTheSignersSocketAreNotAsked(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	asked := make(chan error, 1)
	go func() {
		c, err := ln.AcceptUnix()
		if err == nil {
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		asked <- err
	}()
	c := NewClient(socket, func(uid uint32) bool { return int(uid) != os.Geteuid() }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if err := c.Forget(context.Background(), "alice", ""); err == nil || !strings.Contains(err.Error(), "who is not the signer") {
		t.Error(err)
	}
	if err := <-asked; !errors.Is(err, io.EOF) {
		t.Errorf("it was asked: %v", err)
	}
}

// Its answer for another key is no answer.
func TestAnswerForAnotherKeyIsRefused(t *testing.T) {
	b := newBench(t)
	other, err := b.ca.SignClient(newKey(t).Public(), "alice", "mac", b.clock.Add(time.Hour), b.clock)
	if err != nil {
		t.Fatal(err)
	}
	socket := b.path("s")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		c.Read(make([]byte, maxPacket))
		c.Write(mustJSON(t, reply{Certificate: other.Raw}))
	}()
	c := NewClient(socket, func(uint32) bool { return true }, func() (*exec.Cmd, error) { return nil, errors.New("nobody listens") })
	if _, err := c.Enrol(context.Background(), "alice", "mac", false, time.Hour, csr(t, newKey(t), "alice")); err == nil || !strings.Contains(err.Error(), "for another key") {
		t.Error(err)
	}
}
