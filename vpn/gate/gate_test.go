package gate

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/vpn"
)

func TestSessionFromPostToDelete(t *testing.T) {
	b := newBench(t, nil)
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	_, public := keyPair(t)
	reply := b.post(alice, public)
	if reply.User != "alice" || reply.Address.String() != "10.77.0.2/32" || !reply.PostQuantum || len(reply.PresharedKey) != 32 ||
		!bytes.Equal(reply.ServerPublicKey, b.serverWG[:]) || time.Until(reply.Expires) > time.Hour {
		t.Errorf("reply %+v: want alice's first address, post-quantum, at most as long as the certificate", reply)
	}
	if again := b.post(alice, public); again.ID != reply.ID || !bytes.Equal(again.PresharedKey, reply.PresharedKey) {
		t.Error("the same request again made another session")
	}
	path := vpn.SessionPath + "/" + reply.ID
	if status, answer, _ := b.do(alice, "GET", path+"/wg-quick", ""); status != 200 || !strings.Contains(string(answer), "\nPrivateKey =\nAddress = 10.77.0.2/32\nMTU = 1420\n") ||
		!strings.Contains(string(answer), base64.StdEncoding.EncodeToString(reply.PresharedKey)) {
		t.Errorf("wg-quick: %d\n%s", status, answer)
	}
	for _, p := range []string{path, vpn.SessionPath} {
		if status, answer, _ := b.do(alice, "GET", p, ""); status != 200 || !strings.Contains(string(answer), reply.ID) || strings.Contains(string(answer), "preshared_key") {
			t.Errorf("GET %s: %d %s: want the session without its key", p, status, answer)
		}
	}
	if status, answer, _ := b.do(bob, "GET", vpn.SessionPath, ""); status != 200 || string(answer) != "[]\n" {
		t.Errorf("bob's list: %d %s", status, answer)
	}
	for _, c := range []struct{ method, path string }{{"GET", path}, {"DELETE", path}, {"GET", path + "/wg-quick"}} {
		if status, answer, _ := b.do(bob, c.method, c.path, ""); status != 404 {
			t.Errorf("bob's %s of alice's session: %d %s", c.method, status, answer)
		}
	}
	if status, answer, _ := b.do(alice, "DELETE", path, ""); status != 204 || len(answer) != 0 {
		t.Errorf("DELETE: %d %s", status, answer)
	}
	if status, _, _ := b.do(alice, "DELETE", path, ""); status != 404 {
		t.Errorf("second DELETE: %d", status)
	}
	if n := len(b.store.List()); n != 0 {
		t.Errorf("%d sessions left", n)
	}
	if e, err := b.tunnel.engine.statuses(); err != nil || len(e) != 0 {
		t.Errorf("peers left: %v, %v", e, err)
	}
}

func TestOneDeviceTooManyReplacesTheOldest(t *testing.T) {
	b := newBench(t, nil) // two devices
	alice := b.user("alice", "mac", time.Hour)
	var ids []string
	for range 3 {
		_, public := keyPair(t)
		ids = append(ids, b.post(alice, public).ID)
	}
	var live []string
	for _, s := range b.store.List() {
		live = append(live, s.ID.String())
	}
	if len(live) != 2 || slices.Contains(live, ids[0]) {
		t.Errorf("live %v of %v: want the last two", live, ids)
	}
}

func TestRefusals(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limit = 1; c.Devices = 5 })
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	_, public := keyPair(t)
	key := base64.StdEncoding.EncodeToString(public[:])
	ok := fmt.Sprintf(`{"public_key":%q}`, key)
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		code, says               string
	}{
		{"not JSON", "POST", "/v1/session", "public_key=x", 400, "bad_request", "invalid character"},
		{"empty", "POST", "/v1/session", "", 400, "bad_request", "EOF"},
		{"unknown field", "POST", "/v1/session", `{"public_key":"` + key + `","role":"root"}`, 400, "bad_request", `unknown field "role"`},
		{"two objects", "POST", "/v1/session", ok + ok, 400, "bad_request", "something follows"},
		{"short key", "POST", "/v1/session", `{"public_key":"AAAA"}`, 400, "bad_request", "public_key has 3 bytes: want 32"},
		{"low-order key", "POST", "/v1/session", `{"public_key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`, 400, "bad_request", "low order"},
		{"short initiation", "POST", "/v1/session", `{"public_key":"` + key + `","initiation":"AAAA"}`, 400, "bad_request", "initiation has 3 bytes: want 148"},
		{"control byte in device", "POST", "/v1/session", `{"public_key":"` + key + `","device":"a\u001bb"}`, 400, "bad_request", "device"},
		{"huge body", "POST", "/v1/session", `{"device":"` + strings.Repeat("x", 5000) + `"}`, 413, "too_large", "more than 4096 bytes"},
		{"wrong method", "PUT", "/v1/session", ok, 405, "method", "PUT"},
		{"no such path", "GET", "/v1/nothing", "", 404, "not_found", "/v1/nothing"},
		{"foreign id", "GET", "/v1/session/" + strings.Repeat("0", 32), "", 404, "not_found", "no session"},
		{"no id", "DELETE", "/v1/session/..%2f", "", 404, "not_found", "no session"},
	} {
		status, answer, err := b.do(alice, c.method, c.path, c.body)
		var e vpn.ErrorReply
		if err != nil || json.Unmarshal(answer, &e) != nil || e.Error == nil || status != c.status || e.Error.Code != c.code || !strings.Contains(e.Error.Message, c.says) {
			t.Errorf("%s: %d %s %v: want %d %s …%s…", c.name, status, answer, err, c.status, c.code, c.says)
		}
	}
	if n := len(b.store.List()); n != 0 {
		t.Fatalf("%d sessions came of refused requests", n)
	}
	b.post(alice, public)
	if status, answer, _ := b.do(bob, "POST", vpn.SessionPath, ok); status != 503 || !strings.Contains(string(answer), "session_limit") {
		t.Errorf("over the limit: %d %s", status, answer)
	}
}

func TestKeyBelongsToOneCertificateForEver(t *testing.T) {
	b := newBench(t, nil)
	alice, bob := b.user("alice", "mac", time.Hour), b.user("bob", "mac", time.Hour)
	_, public := keyPair(t)
	reply := b.post(alice, public)
	body := fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(public[:]))
	if status, answer, _ := b.do(bob, "POST", vpn.SessionPath, body); status != 409 || !strings.Contains(string(answer), "key_bound") {
		t.Errorf("alice's key in bob's hands: %d %s", status, answer)
	}
	b.do(alice, "DELETE", vpn.SessionPath+"/"+reply.ID, "")
	if status, answer, _ := b.do(alice, "POST", vpn.SessionPath, body); status != 409 {
		t.Errorf("a key whose session ended: %d %s", status, answer)
	}
}

func TestCertificatesThatDoNotOpen(t *testing.T) {
	b := newBench(t, nil)
	other, err := identity.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := other.IssueClient("alice", "mac", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	server, err := b.ca.IssueServer(strings.Repeat("cd", 16), "alice", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := b.ca.IssueClient("nobody", "mac", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	revoked := b.user("eve", "mac", time.Hour)
	if _, err := b.users.Revoke("eve", "", time.Now()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*http.Client{
		"another CA": b.client(foreign.Certificate, foreign.Key), "a server's": b.client(server.Certificate, server.Key),
		"unknown user": b.client(stranger.Certificate, stranger.Key), "revoked": revoked,
	} {
		status, answer, err := b.do(c, "GET", vpn.SessionPath, "")
		if err == nil || !strings.Contains(err.Error(), "remote error: tls: ") {
			t.Errorf("%s: %d %s, %v: want a TLS alert", name, status, answer, err)
		}
	}
	if conn, err := tls.Dial("tcp", b.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		conn.Close()
		t.Error("TLS 1.2 was accepted")
	}
}

func TestRevokedOnALiveConnectionGets403(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	if status, _, err := b.do(alice, "GET", vpn.SessionPath, ""); status != 200 {
		t.Fatal(status, err)
	}
	if _, err := b.users.Revoke("alice", "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if status, answer, err := b.do(alice, "GET", vpn.SessionPath, ""); status != 403 || !strings.Contains(string(answer), `"revoked"`) {
		t.Errorf("%d %s %v", status, answer, err)
	}
	b.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	if status, answer, err := b.do(alice, "GET", vpn.SessionPath, ""); status != 403 {
		t.Errorf("expired on a live connection: %d %s %v", status, answer, err)
	}
}

func TestRefusedRequestReplacesNothing(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Devices = 1 })
	alice := b.user("alice", "mac", time.Hour)
	_, first := keyPair(t)
	old := b.post(alice, first)
	b.do(alice, "DELETE", vpn.SessionPath+"/"+old.ID, "")
	_, second := keyPair(t)
	live := b.post(alice, second)
	if status, answer, _ := b.do(alice, "POST", vpn.SessionPath, fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(first[:]))); status != 409 {
		t.Fatalf("%d %s", status, answer)
	}
	if l := b.store.List(); len(l) != 1 || l[0].ID.String() != live.ID {
		t.Errorf("live after the refusal: %v", l)
	}
}

func TestSessionsOfOneCertificateArePaced(t *testing.T) {
	p := pace{next: map[[32]byte]time.Time{}}
	now := time.Unix(1e9, 0)
	begun := 0
	for range 100 {
		if p.wait([32]byte{1}, now) == 0 {
			begun++
		}
	}
	if begun != sessionBurst+1 {
		t.Errorf("%d at once, want %d", begun, sessionBurst+1)
	}
	if w := p.wait([32]byte{1}, now); w <= 0 || w > sessionEvery {
		t.Errorf("wait %v", w)
	}
	if p.wait([32]byte{2}, now) != 0 || p.wait([32]byte{1}, now.Add(sessionEvery)) != 0 {
		t.Error("want another certificate, and the same later, to go on")
	}
}

func TestConnectionsAreCappedAndSomeReservedForTokens(t *testing.T) {
	l := newCapped(nil, func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.1") }, &callers{})
	took := func(a string) bool { return l.take(netip.MustParseAddr(a)) }
	n := 0
	for took("192.0.2.9") {
		n++
	}
	if n != perSource {
		t.Errorf("one source holds %d connections, want %d", n, perSource)
	}
	for i := 0; l.pending < unfinished-reserved; i++ {
		took(fmt.Sprintf("2001:db8::%x", i/perSource))
	}
	if took("198.51.100.1") {
		t.Error("who did not knock by token got a reserved handshake")
	}
	if !took("192.0.2.1") {
		t.Error("who knocked by token got none")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"public_key":"AAAA"}`))
	f.Add([]byte(`{"public_key":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=","initiation":null,"device":"x"}`))
	f.Add([]byte(`{}{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		req, err := decode(bytes.NewReader(body))
		var api *vpn.APIError
		switch {
		case err != nil && (!errors.As(err, &api) || vpn.StatusOf(api.Code) >= 500):
			t.Errorf("%q: %v is not the caller's fault", body, err)
		case err == nil && (len(body) > vpn.MaxBody || len(req.PublicKey) != 32 || len(req.Initiation)%vpn.InitiationSize != 0 || !json.Valid(body)):
			t.Errorf("%q was taken", body)
		}
	})
}
