package gate

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"perimeterd/vpn"
)

// The response may be lost: whoever sends the same from the same place gets the same, and no end of it.
func TestInitiationThatComesAgainGetsTheSameResponse(t *testing.T) {
	b := newBench(t, nil)
	private, public := keyPair(t)
	b.post(b.user("alice", "mac", time.Hour), public)
	s := b.stranger()
	var initiation []byte
	hear := func(wait time.Duration) []byte {
		if _, err := s.Write(initiation); err != nil {
			t.Fatal(err)
		}
		s.SetReadDeadline(time.Now().Add(wait))
		response := make([]byte, 2000)
		n, _ := s.Read(response)
		return response[:n]
	}
	for try := 0; ; try++ {
		initiation = craft(t, private, b.serverWG, time.Now())
		first := hear(answer)
		if len(first) != vpn.ResponseSize {
			t.Fatalf("a response of %d bytes", len(first))
		}
		again := hear(silence)
		if bytes.Equal(again, first) {
			break
		}
		if try == 10 || len(again) > 0 { // a machine that is slow may take longer than a response is kept
			t.Fatalf("the second time %x, want %x", again, first)
		}
	}
	times := 0
	for times < 2*answerRepeats && len(hear(silence)) > 0 {
		times++
	}
	if times > answerRepeats-1 {
		t.Errorf("it is answered %d times and more", times+2)
	}
}

func TestResponsesAreRepeatedForAMomentAndOnTheirWayAlone(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	here, there := netip.MustParseAddrPort("192.0.2.1:4000"), netip.MustParseAddrPort("192.0.2.1:4001")
	message := func(kind, size, at int, index byte) []byte {
		m := make([]byte, size)
		m[0], m[at], m[size-1] = byte(kind), index, index
		return m
	}
	initiation := func(index byte) []byte { return message(messageInitiation, vpn.InitiationSize, 4, index) }
	response := func(index byte) []byte { return message(messageResponse, vpn.ResponseSize, 8, index) }
	var a answers
	a.note(response(1), here) // to nothing
	for range 2 {
		if a.again(initiation(1), here, now) != nil {
			t.Error("a response to what was not answered")
		}
	}
	a.note(response(1), there)
	if a.again(initiation(1), here, now) != nil {
		t.Error("the response to another place")
	}
	a.note(response(1), here)
	other := initiation(1)
	other[50] = 1
	switch late := now.Add(answerLife); {
	case a.again(initiation(1), there, now) != nil:
		t.Error("repeated to another place")
	case a.again(other, here, now) != nil:
		t.Error("repeated for another initiation")
	case !bytes.Equal(a.again(initiation(1), here, late.Add(-1)), response(1)):
		t.Error("not repeated, after others had come to its slot")
	case a.again(initiation(2), here, now) != nil:
		t.Error("repeated for another index")
	case a.again(initiation(1), here, late) != nil:
		t.Error("repeated later")
	}
	a.again(initiation(3), here, now)
	a.note(response(3), here)
	a.forget()
	if a.again(initiation(3), here, now) != nil {
		t.Error("repeated after a session's end")
	}
}
