package firewall

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"perimeterd/knock"
)

// many draws sequences of TCP and UDP ports that pass Validate.
func many(t *testing.T, n int) (list []knock.Sequence) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 4))
	for len(list) < n {
		s := knock.Sequence{Name: "s" + string(rune('a'+len(list)%26)) + strings.Repeat("x", len(list)/26), Credential: uint32(1000 + len(list)), Timeout: knock.DefaultTimeout}
		for range 3 + r.IntN(3) {
			s.Ports = append(s.Ports, knock.Port{Proto: []uint8{knock.TCP, knock.UDP}[r.IntN(2)], Number: uint16(2000 + r.IntN(400))})
		}
		if knock.Validate(append(slices.Clone(list), s), nil) == nil {
			list = append(list, s)
		}
	}
	return list
}

func TestHundredsOfSequencesEachOpenForTheirOwn(t *testing.T) {
	const n = 400
	one, all := example(), example()
	one.Sequences, all.Sequences = many(t, 1), many(t, n)
	s := besiege(t, all)
	list := func() string { return run(t, "", "nft", "-s", "-t", "list", "table", "inet", TableName) }
	before := list()
	if _, err := s.fw.Apply(one); err != nil {
		t.Fatal(err)
	}
	diff(t, "the table with one sequence", before, list())
	if _, err := s.fw.Apply(all); err != nil {
		t.Fatal(err)
	}
	for i, seq := range all.Sequences {
		from, from6 := spoofed(i), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 5, 14: byte(i >> 8), 15: byte(i)})
		wrong := slices.Clone(seq.Ports)
		slices.Reverse(wrong)
		s.hits(spoofed(1<<16+i), wrong...)
		s.hits(from, seq.Ports...)
		s.hits(from6, seq.Ports...)
	}
	windows, err := s.fw.Windows()
	if err != nil {
		t.Fatal(err)
	}
	got := map[uint32]int{}
	for _, w := range windows {
		if !w.Sequence {
			t.Fatalf("%+v was opened by a sequence", w)
		}
		got[w.Credential]++
	}
	for _, seq := range all.Sequences {
		if got[seq.Credential] != 2 { // by IPv4 and by IPv6
			t.Errorf("%s %v opened %d windows, want 2", seq.Name, seq.Ports, got[seq.Credential])
		}
	}
	if len(windows) != 2*n {
		t.Errorf("%d windows of %d sequences, each by two families", len(windows), n)
	}
}

// A step's time is over for one sequence and not for another whose ports differ, in both families.
func TestEachSequenceHasItsOwnTimeBetweenKnocks(t *testing.T) {
	cfg := example()
	quick, slow := sequence(t, "7102", "19044/udp", "33127"), sequence(t, "2001", "1001", "3001")
	quick.Name, quick.Credential, quick.Timeout = "quick", 8, time.Second
	slow.Timeout = time.Minute
	cfg.Sequences = []knock.Sequence{quick, slow}
	s := besiege(t, cfg)
	sources := func(n byte) []netip.Addr {
		return []netip.Addr{guest(n), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: n})}
	}
	begin := func(from byte, seq knock.Sequence, knocks int) {
		for _, a := range sources(from) {
			s.hits(a, seq.Ports[:knocks]...)
		}
	}
	begin(70, quick, 1)
	begin(71, quick, 2)
	begin(72, slow, 1)
	// The time is counted anew from each knock on.
	time.Sleep(20 * time.Millisecond)
	left := func() (most time.Duration) {
		for _, e := range s.elements("progress4") {
			most = max(most, e.Expires)
		}
		return most
	}
	before := left()
	s.hits(sources(72)[0], slow.Ports[1])
	if after := left(); after <= before {
		t.Errorf("the second knock left %v, of %v before it", after, before)
	}
	s.hits(sources(72)[1], slow.Ports[1])
	for deadline := time.Now().Add(10 * time.Second); len(s.elements("progress4")) > 1 || len(s.elements("progress6")) > 1; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the quick sequence's progress does not expire")
		}
	}
	for i := range 2 {
		s.hits(sources(70)[i], quick.Ports[1:]...)
		s.hits(sources(71)[i], quick.Ports[2])
		s.hits(sources(72)[i], slow.Ports[2])
		for n, want := range map[byte]bool{70: false, 71: false, 72: true} {
			if from := sources(n)[i]; s.accepted(from) != want {
				t.Errorf("from %v, which waited too long for the quick sequence and not for the slow: want it open: %v", from, want)
			}
		}
	}
}
