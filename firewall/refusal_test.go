package firewall

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"perimeterd/knock"
)

// told lists what was refused since the last call.
func (r *room) told() []Refusal {
	time.Sleep(50 * time.Millisecond)
	r.mu.Lock()
	defer r.mu.Unlock()
	list := r.refusals
	r.refusals = nil
	return list
}

func (r *room) wantTold(kind RefusalKind, source netip.Addr, sequence bool) {
	r.t.Helper()
	list := r.told()
	if len(list) != 1 || list[0].Kind != kind || list[0].Source != source || list[0].Sequence != sequence || list[0].Port == 0 || time.Since(list[0].At) > time.Minute {
		r.t.Errorf("told %+v, want one %s of %v", list, kind, source)
	}
}

func TestRefusedAndReplayedTokensAreTold(t *testing.T) {
	r := newRoom(t, example())
	for _, me := range []netip.Addr{r.Client.Addr, r.Client.Addr6} {
		good, bad := tok(byte(me.BitLen())), tok(1)
		r.load(Token{good, 42, soon()})
		r.send(me, bad[:])
		r.wantTold(TokenRefused, me, false)
		r.send(me, good[:])
		if list := r.told(); len(list) != 0 || !r.accepted(me) {
			t.Errorf("a good token is told as %+v", list)
		}
		r.send(me, good[:])
		r.wantTold(TokenReplayed, me, false)
	}
	if o := r.seen(); len(o) != 2 {
		t.Errorf("observed %+v, want the two openings", o)
	}
}

func TestTokenThatComesTwiceOnOneWayIsNoReplay(t *testing.T) {
	r := newRoom(t, example())
	for _, me := range []netip.Addr{r.Client.Addr, r.Client.Addr6} {
		good := tok(byte(me.BitLen()))
		r.load(Token{good, 42, soon()})
		r.send(me, good[:], good[:]) // few: what is told has a limit
		if list := r.told(); len(list) != 0 || !r.accepted(me) {
			t.Errorf("told %+v of copies", list)
		}
		r.send(me, good[:]) // from another port
		r.wantTold(TokenReplayed, me, false)
	}
	if o := r.seen(); len(o) != 2 {
		t.Errorf("observed %+v, want the two openings", o)
	}
}

func TestCopyIsToldWhenItIsLateOrNotOfThatWay(t *testing.T) {
	first := Opening{Source: netip.MustParseAddr("192.0.2.1"), Port: 40000, Token: tok(1), At: time.Unix(1_800_000_000, 0)}
	var l openedLately
	if l.doubles(Opening{At: first.At}) {
		t.Error("a copy of nothing")
	}
	l.add(first)
	for _, test := range []struct {
		name   string
		change func(*Opening)
		want   bool
	}{
		{"a copy", func(o *Opening) { o.At = o.At.Add(doubledWithin - 1) }, true},
		{"late", func(o *Opening) { o.At = o.At.Add(doubledWithin) }, false},
		{"another source", func(o *Opening) { o.Source = netip.MustParseAddr("192.0.2.2") }, false},
		{"another port", func(o *Opening) { o.Port++ }, false},
		{"another token", func(o *Opening) { o.Token = tok(2) }, false},
	} {
		o := first
		if test.change(&o); l.doubles(o) != test.want {
			t.Errorf("%s: taken for the same datagram: %v", test.name, !test.want)
		}
	}
	for range l.list { // so many others
		l.add(Opening{Token: tok(3)})
	}
	if l.doubles(first) {
		t.Error("more is remembered than there is room for")
	}
}

// sequenceRoom has the sequence 7001, 19/udp, 9.
func sequenceRoom(t *testing.T) *room {
	cfg := example()
	cfg.Sequences = []knock.Sequence{{Name: "ops", Credential: 7, Ports: []knock.Port{{Proto: knock.TCP, Number: 7001}, {Proto: knock.TCP, Number: 19044}, {Proto: knock.TCP, Number: 9}}}}
	return newRoom(t, cfg)
}

func TestResetSequencesAreTold(t *testing.T) {
	r := sequenceRoom(t)
	// 198.18/15 addresses of the client's network; stock knock does not choose its source.
	for _, test := range []struct {
		ports []string
		reset bool
	}{
		{[]string{"7001", "8080"}, false},       // a stray: it resets too, but every scan is full of them
		{[]string{"7001", "9"}, true},           // a knock port out of its turn
		{[]string{"8080", "9", "19044"}, false}, // nothing had begun
		{[]string{"7001", "19044", "9"}, false}, // opens
	} {
		r.stockKnock(test.ports...)
		list := r.told()
		if got := len(list) == 1 && list[0].Kind == SequenceReset && list[0].Source == r.Client.Addr; got != test.reset || !test.reset && len(list) != 0 {
			t.Errorf("%v told %+v, want a reset: %v", test.ports, list, test.reset)
		}
		if opened := len(r.seen()) == 1; opened != slices.Equal(test.ports, []string{"7001", "19044", "9"}) {
			t.Errorf("%v observed %+v", test.ports, r.seen())
		}
	}
}

func (r *room) stuff(set string) { r.t.Helper(); stuff(r.t, r.fw, set, setSize) }

// stuff puts n sources of 100.64.0.0/10 into a map, to stay there.
func stuff(t *testing.T, f *Firewall, set string, n int) {
	t.Helper()
	elements := make([]nftables.SetElement, n)
	for i := range elements {
		elements[i] = nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, 100<<24|64<<16+uint32(i)), Val: native.PutUint32(1), Timeout: 10 * time.Minute}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for part := range slices.Chunk(elements, chunk) {
		if err := f.sendLocked(set, part); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKnockThatFindsNoRoomIsToldAndOpensNothing(t *testing.T) {
	r := sequenceRoom(t)
	r.stuff("open4")
	token := tok(1)
	r.load(Token{token, 42, soon()})
	r.send(r.Client.Addr, token[:])
	r.wantTold(WindowsFull, r.Client.Addr, false)
	if r.accepted(r.Client.Addr) || len(r.seen()) != 0 {
		t.Errorf("a full set of windows opened; observed %+v", r.seen())
	}
	r.stuff("seq4")
	r.stockKnock("7001", "19044", "9")
	r.wantTold(WindowsFull, r.Client.Addr, true)
	if r.accepted(r.Client.Addr) || len(r.seen()) != 0 {
		t.Errorf("a full set of sequences' windows opened; observed %+v", r.seen())
	}
}

func TestFloodOfGuessesIsToldAtItsRateAndHidesNoOpening(t *testing.T) {
	r := newRoom(t, example())
	token, bad := tok(1), tok(2)
	r.load(Token{token, 42, soon()})
	start := time.Now()
	for range 2000 {
		r.send(r.Stranger, bad[:])
	}
	r.send(r.Client.Addr, token[:])
	took := time.Since(start)
	most := 6 + int(5*took.Seconds())
	if n := len(r.told()); n < 5 || n > most {
		t.Errorf("%d of 2000 guesses in %v were told, want 5 to %d", n, took, most)
	}
	if o := r.seen(); len(o) != 1 || o[0].Source != r.Client.Addr {
		t.Errorf("observed %+v, want the client's opening", o)
	}
}

func TestPrefixesOfTheTableAreTheKinds(t *testing.T) {
	text := documented(t)
	kinds := []RefusalKind{TokenRefused, TokenReplayed, SequenceReset, WindowsFull}
	for _, part := range strings.Split(text, `log prefix "`)[1:] {
		prefix, _, _ := strings.Cut(part, `"`)
		if _, ok := refusalOf(prefix, Opening{}); !ok {
			t.Errorf("prefix %q is no kind", prefix)
		}
	}
	for _, k := range kinds {
		if !strings.Contains(text, `log prefix "`+string(k)+`"`) {
			t.Errorf("no rule logs %s", k)
		}
	}
	if _, ok := refusalOf("another tool's", Opening{}); ok {
		t.Error("what another tool logs is taken for ours")
	}
}

func FuzzRefusal(f *testing.F) {
	packet := udp4(netip.MustParseAddr("198.18.1.2"), netip.MustParseAddr("198.18.1.1"), 1194, bytes.Repeat([]byte{7}, knock.TokenSize))
	f.Add("token-refused", packet, uint32(0))
	f.Add("windows-full", packet[:21], uint32(knock.Complete|9))
	f.Add("", []byte{0x60}, uint32(7))
	f.Fuzz(func(t *testing.T, prefix string, packet []byte, mark uint32) {
		o, ok := parseOpening(packet, mark, time.Unix(0, 0))
		if !ok {
			return
		}
		if r, ok := refusalOf(prefix, o); ok && (!r.Source.IsValid() || string(r.Kind) != prefix || r.Sequence && r.Kind != WindowsFull) {
			t.Errorf("%q %x: %+v", prefix, packet, r)
		}
	})
}
