package gate

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/session"
	"perimeterd/vpn"
)

// ask makes a session, or returns the refusal with its Retry-After.
func (b *bench) ask(c *http.Client) (reply vpn.SessionReply, code string, retry int) {
	b.t.Helper()
	_, public := keyPair(b.t)
	body := fmt.Sprintf(`{"public_key":%q}`, base64.StdEncoding.EncodeToString(public[:]))
	resp, err := c.Post("https://"+b.address+vpn.SessionPath, "application/json", strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusCreated {
		if err := json.NewDecoder(resp.Body).Decode(&reply); err != nil {
			b.t.Fatal(err)
		}
		return reply, "", 0
	}
	var e vpn.ErrorReply
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || e.Error == nil || e.Error.Fix == "" || vpn.StatusOf(e.Error.Code) != resp.StatusCode {
		b.t.Fatalf("%s: %+v %v", resp.Status, e.Error, err)
	}
	retry, err = strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || retry <= 0 {
		b.t.Errorf("%s: Retry-After %q", resp.Status, resp.Header.Get("Retry-After"))
	}
	return reply, e.Error.Code, retry
}

// small is a network of five addresses.
func small(c *Config) {
	c.Network, c.Limit, c.Devices = netip.MustParsePrefix("10.77.0.0/29"), 2, 5
}

func (b *bench) end(id string) {
	b.t.Helper()
	sid, err := session.ParseID(id)
	if err == nil {
		err = b.store.End(sid, session.Deleted)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

func TestLimitAndEmptyPoolSayWhenToTryAgain(t *testing.T) {
	b := newBench(t, small)
	var held []string
	for i := range 2 {
		reply, code, _ := b.ask(b.user(fmt.Sprintf("user%d", i), "mac", time.Hour))
		if code != "" {
			t.Fatal(code)
		}
		held = append(held, reply.ID)
	}
	alice := b.user("alice", "mac", time.Hour)
	if _, code, retry := b.ask(alice); code != vpn.CodeLimit || retry > 300 {
		t.Errorf("beyond the limit: %s, again in %d s", code, retry)
	}
	for i := range 3 { // until every address is held or rests
		b.end(held[i])
		reply, code, _ := b.ask(b.user(fmt.Sprintf("another%d", i), "mac", time.Hour))
		if code != "" {
			t.Fatal(code)
		}
		held = append(held, reply.ID)
	}
	b.end(held[4])
	if _, code, retry := b.ask(alice); code != vpn.CodePool || retry > int(vpn.Quarantine.Seconds()) {
		t.Errorf("with every address held or resting: %s, again in %d s", code, retry)
	}
	if n := b.store.Len(); n != 1 {
		t.Errorf("%d sessions", n)
	}
}

func TestAddressStaysWithTheDeviceOverRenewalAndRestartAndRestsForOthers(t *testing.T) {
	b := newBench(t, small)
	first, code, _ := b.ask(b.user("alice", "mac", time.Hour))
	if code != "" {
		t.Fatal(code)
	}
	b.end(first.ID)
	// The certificate of a renewal is another one.
	if _, err := b.users.Revoke("alice", "mac", time.Now()); err != nil {
		t.Fatal(err)
	}
	again, code, _ := b.ask(b.user("alice", "mac", time.Hour))
	if code != "" || again.Address != first.Address {
		t.Errorf("after a renewal %v %s, before %v", again.Address, code, first.Address)
	}
	other, code, _ := b.ask(b.user("alice", "phone", time.Hour))
	if code != "" || other.Address == first.Address {
		t.Errorf("another device has %v %s", other.Address, code)
	}
	b.end(again.ID)
	b.end(other.ID)
	b.stop()
	b.startTunnel()
	g, err := New(b.cfg, func(netip.Addr) bool { return false }, b.serverWG, *b.gate.cert.Load(), b.gate.verifier, b.store, b.tunnel, b.log)
	if err != nil {
		t.Fatal(err)
	}
	taken := map[netip.Addr]bool{}
	for range 3 {
		a, err := g.pool.Take(owner("mallory", "mac"), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		taken[a] = true
	}
	if taken[first.Address.Addr()] || taken[other.Address.Addr()] {
		t.Error("after a restart an address did not rest")
	}
	if _, err := g.pool.Take(owner("mallory", "mac"), time.Now()); err != vpn.ErrPoolEmpty {
		t.Errorf("the fourth: %v", err)
	}
	if a, err := g.pool.Take(owner("alice", "phone"), time.Now()); err != nil || a != other.Address.Addr() {
		t.Errorf("after a restart alice's phone gets %v, %v: want %v", a, err, other.Address)
	}
	if a, err := g.pool.Take(owner("mallory", "mac"), time.Now().Add(vpn.Quarantine)); err != nil || a != first.Address.Addr() {
		t.Errorf("after the quarantine: %v, %v, want %v", a, err, first.Address)
	}
}
