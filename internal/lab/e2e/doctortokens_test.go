package e2e

import (
	"encoding/base64"
	"encoding/hex"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"perimeterd/knock"
	"perimeterd/vpn/client"
)

// Where nothing answers, whoever is on the way sees all that the doctor sends, and could knock with it later: so none of it may open
// the gate at a time to come.
func TestDoctorGivesNoTokensOfTimesToComeAway(t *testing.T) {
	s := newClinic(t)
	host, err := s.AddHost(s.ctx, "hotel")
	if err != nil {
		t.Fatal(err)
	}
	s.ok(host.Command(s.ctx, "nft", "add table inet hotel; add chain inet hotel in { type filter hook input priority 0; }; add rule inet hotel in meta l4proto tcp drop"))
	tap, err := host.ListenPacket("udp", ":1194")
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	var seen []knock.Token
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b := make([]byte, 2048)
		for {
			n, _, err := tap.ReadFrom(b)
			if err != nil {
				return
			}
			if n == len(knock.Token{}) {
				seen = append(seen, knock.Token(b[:n]))
			}
		}
	}()
	if _, err := s.daemon.AddUser(s.ctx, "guest"); err != nil {
		t.Fatal(err)
	}
	there := s.edited("guest", func(p *client.Profile) {
		p.Endpoints, p.TunnelPort, p.Sequence = []string{netip.AddrPortFrom(host.Addr, 1194).String()}, 1194, nil
	})
	began := time.Now()
	s.diagnosed("a network that swallows all", s.doctor(there, nil), client.CodeUnanswered)
	tap.Close()
	<-ended
	p := s.profile(filepath.Join(s.Dir, "guest.profile"))
	length, err := time.ParseDuration(p.KnockStep)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := base64.StdEncoding.DecodeString(p.KnockSecret)
	if err != nil {
		t.Fatal(err)
	}
	server, err := hex.DecodeString(p.ServerID)
	if err != nil {
		t.Fatal(err)
	}
	known := map[knock.Token]int64{}
	for step := knock.StepAt(began.Add(-15*time.Hour), length); step <= knock.StepAt(time.Now().Add(15*time.Hour), length); step++ {
		for index := range uint8(knock.Indexes) {
			known[knock.NewToken(secret, knock.ServerID(server), step, index)] = step
		}
	}
	here := knock.StepAt(time.Now(), length)
	for _, token := range seen {
		if step, ok := known[token]; !ok || step > here+1 { // what a client of this time sends
			t.Errorf("known %v: a token of %v from now", ok, time.Duration(step-here)*length)
		}
	}
	if len(seen) < 50 {
		t.Errorf("%d tokens were seen, and a fast clock was looked for", len(seen))
	}
}
