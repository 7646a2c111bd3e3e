package gate

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// only makes a client offer these key exchanges and no other.
func only(c *http.Client, curves ...tls.CurveID) *http.Client {
	tr := c.Transport.(*http.Transport).Clone()
	tr.TLSClientConfig.CurvePreferences = curves
	return &http.Client{Transport: tr, Timeout: c.Timeout}
}

// weak wants a refusal that names the weakness and the way out.
func (b *bench) weak(c *http.Client, method, path, body string) {
	b.t.Helper()
	status, answer, err := b.do(c, method, path, body)
	var e vpn.ErrorReply
	if err != nil || status != http.StatusForbidden || json.Unmarshal(answer, &e) != nil || e.Error.Code != vpn.CodePostQuantum ||
		!strings.Contains(e.Error.Message, "X25519 is none") || !strings.Contains(e.Error.Fix, "X25519MLKEM768") {
		b.t.Errorf("%s %s: %d %s %v: want a refusal of X25519", method, path, status, answer, err)
	}
}

func TestPostQuantumIsWantedOfEveryRequestWhereItIsRequired(t *testing.T) {
	b := newBench(t, func(c *Config) { c.RequirePostQuantum = true })
	alice := b.user("alice", "mac", time.Hour)
	classical := only(alice, tls.X25519)
	_, public := keyPair(t)
	body := fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(public[:]))
	b.weak(classical, "POST", vpn.SessionPath, body)
	if n := b.store.Len(); n != 0 {
		t.Fatalf("%d sessions", n)
	}
	reply := b.post(only(alice, tls.X25519MLKEM768), public)
	if !reply.PostQuantum {
		t.Error("the reply does not say that it is post-quantum")
	}
	for _, path := range []string{vpn.SessionPath, vpn.SessionPath + "/" + reply.ID, vpn.SessionPath + "/" + reply.ID + "/wg-quick"} {
		b.weak(classical, "GET", path, "")
	}
	b.weak(classical, "DELETE", vpn.SessionPath+"/"+reply.ID, "")
}

func TestPresharedKeyTravelsNoWeakerThanTheFirstTime(t *testing.T) {
	b := newBench(t, nil)
	alice := b.user("alice", "mac", time.Hour)
	classical := only(alice, tls.X25519)
	_, public := keyPair(t)
	strong := b.post(alice, public)
	b.weak(classical, "GET", vpn.SessionPath+"/"+strong.ID+"/wg-quick", "")
	b.weak(classical, "POST", vpn.SessionPath, fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(public[:])))
	if status, answer, err := b.do(alice, "GET", vpn.SessionPath+"/"+strong.ID+"/wg-quick", ""); status != 200 {
		t.Errorf("%d %s %v", status, answer, err)
	}
	// A session that was classical from the start says so, and is its owner's to fetch.
	_, public = keyPair(t)
	weak := b.post(classical, public)
	if weak.PostQuantum {
		t.Error("a classical session says it is post-quantum")
	}
	if status, answer, err := b.do(classical, "GET", vpn.SessionPath+"/"+weak.ID+"/wg-quick", ""); status != 200 {
		t.Errorf("%d %s %v", status, answer, err)
	}
	for id, want := range map[string]string{strong.ID: "X25519MLKEM768", weak.ID: "X25519"} {
		sid, err := session.ParseID(id)
		if err != nil {
			t.Fatal(err)
		}
		if s, ok := b.store.Get(sid); !ok || s.KeyExchange != want || s.PostQuantum != (want != "X25519") {
			t.Errorf("recorded as %q, %v, want %s", s.KeyExchange, s.PostQuantum, want)
		}
	}
}
