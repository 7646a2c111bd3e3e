package knock

import (
	"bytes"
	"encoding/hex"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// The vector was computed with Python's hmac module over the layout of doc.go.
func TestTokenIsTheDocumentedOne(t *testing.T) {
	secret := Secret(bytes.Repeat([]byte{7}, 32), "alice", 3)
	server := ServerID{0: 1, 15: 2}
	token := NewToken(secret, server, 58_000_000, 2)
	if got := hex.EncodeToString(secret); got != "fcad81f1cd4c04d7555fc7f6cf18fc7ce298112bddb7b147e5ad85205eaec5d6" {
		t.Errorf("secret %s", got)
	}
	if got := hex.EncodeToString(token[:]); got != "090270e4df3bb31387eccdcd5e59e666" {
		t.Errorf("token %s", got)
	}
}

func TestTokensDifferInEveryInput(t *testing.T) {
	seen := map[Token]string{}
	for _, user := range []string{"alice", "bob"} {
		for epoch := range uint32(3) {
			secret := Secret([]byte("master"), user, epoch)
			for _, server := range []ServerID{{}, {1}} {
				for step := range int64(4) {
					for index := range uint8(Indexes) {
						token := NewToken(secret, server, step, index)
						if other, twice := seen[token]; twice {
							t.Fatalf("%s has a token of %s", user, other)
						}
						seen[token] = user
					}
				}
			}
		}
	}
}

func TestLifeEndsTwoStepsOn(t *testing.T) {
	const length = 30 * time.Second
	now := time.Unix(1000, 0) // in step 33, which began at 990
	for step, want := range map[int64]time.Duration{31: -10 * time.Second, 32: 20 * time.Second, 33: 50 * time.Second, 34: 80 * time.Second, 99: 120 * time.Second} {
		if got := Life(step, length, now); got != want {
			t.Errorf("step %d lives %v, want %v", step, got, want)
		}
	}
	if s := StepAt(now, length); s != 33 || !Start(s, length).Equal(time.Unix(990, 0)) {
		t.Errorf("step %d starts %v", s, Start(s, length))
	}
}

func ports(t testing.TB, list ...string) (out []Port) {
	t.Helper()
	for _, s := range list {
		p, err := ParsePort(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func TestPortsThatAreNone(t *testing.T) {
	for _, s := range []string{"", "0", "65536", "-1", "+7", "7 ", "x", "7/sctp", "7/", ":tcp", "7/udp/udp"} {
		if p, err := ParsePort(s); err == nil || !strings.Contains(err.Error(), "port") {
			t.Errorf("ParsePort(%q) = %v, %v", s, p, err)
		}
	}
}

func FuzzParsePort(f *testing.F) {
	for _, s := range []string{"7102", "19044/udp", "1:tcp", "65536", "7/", "００７"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePort(s)
		if err != nil {
			return
		}
		again, err := ParsePort(p.String())
		if err != nil || again != p || p.Number == 0 || (p.Proto != TCP && p.Proto != UDP) {
			t.Errorf("ParsePort(%q) = %v, which reads back as %v, %v", s, p, again, err)
		}
	})
}

func TestValidateRefuses(t *testing.T) {
	ok := Sequence{Name: "ok", Ports: ports(t, "7102", "19044/udp", "33127")}
	for want, seqs := range map[string][]Sequence{
		`knock.sequence number 1 has no name: give it one, the log shows it`:                                                         {{Ports: ok.Ports}},
		`knock.sequence "a": ports 7,90: fewer than 3, so a chance hit is likely: add more`:                                          {{Name: "a", Ports: ports(t, "7", "90")}},
		`knock.sequence "a": no ports: fewer than 3, so a chance hit is likely: add more`:                                            {{Name: "a"}},
		`knock.sequence "a": port 7 stands in it twice; a repeated packet would be a knock: choose distinct ports`:                   {{Name: "a", Ports: ports(t, "7", "90", "7")}},
		`knock.sequence "a": port 1194 is used by a service here, whose traffic would be a knock: choose a free port`:                {{Name: "a", Ports: ports(t, "7", "1194", "90")}},
		`knock.sequence "ops": ports 7001,7002 are adjacent; a port scan would open it: choose ports in no order`:                    {{Name: "ops", Ports: ports(t, "7001", "7002", "90")}},
		`knock.sequence "ok": the name is used twice: choose another`:                                                                {ok, {Name: "ok", Ports: ports(t, "1", "3", "5")}},
		`knock.sequence "long": ports 7102,19044/udp,33127 of "ok" begin "long", which could never be completed: change one of them`: {ok, {Name: "long", Ports: append(slices.Clone(ok.Ports), ports(t, "9")...)}},
		`knock.sequence "ok": ports 7102,19044/udp,33127 of "short" begin "ok", which could never be completed: change one of them`:  {{Name: "short", Ports: ports(t, "7102", "19044/udp", "33127")}, ok},
	} {
		err := Validate(seqs, ports(t, "1194"))
		if err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	// The same number by UDP is another port.
	if err := Validate([]Sequence{ok, {Name: "b", Ports: ports(t, "7102", "19044", "33127", "7102/udp")}}, ports(t, "1194")); err != nil {
		t.Error(err)
	}
}

// walk is the kernel's side of the automaton: what the chains knock_step and knock_hit do for one source.
func walk(steps []Transition, packets []Port) (opened []uint32) {
	state := uint32(0)
	for _, p := range packets {
		i := slices.IndexFunc(steps, func(s Transition) bool { return s.State == state && s.Port == p })
		state = 0
		if i < 0 {
			continue
		}
		if next := steps[i].Next; next&Complete != 0 {
			opened = append(opened, next&^Complete)
		} else {
			state = next
		}
	}
	return opened
}

// follow is a slow and obvious oracle: it keeps the ports hit, and compares them with every sequence.
func follow(seqs []Sequence, packets []Port) (opened []uint32) {
	var hit []Port
	for _, p := range packets {
		if slices.Contains(hit, p) {
			continue
		}
		hit = append(hit, p)
		alive := false
		for _, s := range seqs {
			if slices.Equal(hit, s.Ports) {
				opened = append(opened, s.Credential)
				alive, hit = true, nil
				break
			}
			alive = alive || len(hit) < len(s.Ports) && slices.Equal(hit, s.Ports[:len(hit)])
		}
		if !alive {
			hit = nil
		}
	}
	return opened
}

func TestAutomatonDoesWhatTheOracleDoes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	opened := 0
	for range 2000 {
		var seqs []Sequence
		for i := range 1 + r.IntN(6) {
			s := Sequence{Name: string(rune('a' + i)), Credential: uint32(i + 1), Timeout: time.Duration(1+r.IntN(3)) * time.Second}
			for range MinPorts + r.IntN(3) {
				s.Ports = append(s.Ports, Port{TCP, uint16(2 * (1 + r.IntN(6)))})
			}
			if Validate(append(slices.Clone(seqs), s), nil) == nil {
				seqs = append(seqs, s)
			}
		}
		steps, all, _ := Compile(seqs)
		if len(seqs) > 0 && len(all) == 0 {
			t.Fatal("no ports")
		}
		packets := make([]Port, 200)
		for i := range packets {
			packets[i] = Port{TCP, uint16(2 * (1 + r.IntN(6)))}
		}
		got, want := walk(steps, packets), follow(seqs, packets)
		if !slices.Equal(got, want) {
			t.Fatalf("sequences %v\npackets %v\nthe automaton opened %v, the oracle %v", seqs, packets, got, want)
		}
		opened += len(want)
	}
	if opened < 1000 {
		t.Fatalf("only %d openings: the test walks past what it is about", opened)
	}
}

func TestRetransmittedKnockIsNoMistake(t *testing.T) {
	p := ports(t, "7102", "19044", "33127")
	steps, _, _ := Compile([]Sequence{{Name: "a", Ports: p, Credential: 5}})
	if got := walk(steps, []Port{p[0], p[0], p[1], p[0], p[1], p[2]}); !slices.Equal(got, []uint32{5}) {
		t.Errorf("opened %v", got)
	}
	if got := walk(steps, []Port{p[0], p[1], {TCP, 9}, p[2]}); got != nil {
		t.Errorf("a stray packet in the middle: opened %v", got)
	}
}

func BenchmarkTokens(b *testing.B) {
	secret := Secret([]byte("master"), "alice", 0)
	for b.Loop() {
		NewToken(secret, ServerID{}, 1, 2)
	}
}
