package e2e

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/roster"
)

func TestEveryUserOfManyOpensWithEachTokenOfAStep(t *testing.T) {
	s := newStage(t, lab.Options{})
	if err := s.daemon.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	s.daemon.Wait()
	users, err := roster.New(s.daemon, 50)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	next, err := s.Crowd(s.ctx, s.Bastion)
	if err != nil {
		t.Fatal(err)
	}
	k, err := s.NewKnocker()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	for range users.PerStep() {
		from := next()
		token, err := users.Next(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		o, err := k.Open(s.ctx, from, netip.AddrPortFrom(s.Bastion.Addr, 1194), users.TokenKnock(from, s.Bastion.Addr, token), time.Millisecond, 5*time.Second)
		if err != nil || !o.Opened {
			t.Fatalf("a token opened nothing: %v", err)
		}
	}
}
