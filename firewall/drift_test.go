package firewall

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"perimeterd/knock"
)

// drifting is a room with a plain table, as on kernels before 6.9, one window that is open by a token that is spent, one token
// that is not, and one admitted address.
func drifting(t *testing.T) (r *room, spent, unspent knock.Token) {
	t.Helper()
	r = newRoomWith(t, example(), true)
	spent, unspent = tok(1), tok(2)
	r.load(Token{spent, 42, soon()}, Token{unspent, 43, soon()})
	r.send(r.Client.Addr, spent[:])
	if !r.accepted(r.Client.Addr) || len(r.seen()) != 1 {
		t.Fatal("the token did not open")
	}
	if err := r.fw.Admit(netip.MustParseAddr("10.77.0.9"), []uint16{22}, soon()); err != nil {
		t.Fatal(err)
	}
	return r, spent, unspent
}

func (r *room) nft(script string) {
	r.t.Helper()
	file := filepath.Join(r.t.TempDir(), "script")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if out, err := r.Bastion.Command(r.t.Context(), "nft", "-f", file).CombinedOutput(); err != nil {
		r.t.Fatalf("nft: %v\n%s\n%s", err, out, script)
	}
}

// repaired runs the watch's check once and says what it did.
func (r *room) repaired(tokens ...Token) repair {
	r.t.Helper()
	done, err := r.fw.check(time.Now(), false)
	if err != nil {
		r.t.Fatal(err)
	}
	if done.restored && !done.lost {
		r.load(tokens...)
	}
	return done
}

// intact is what must hold after any drift was repaired.
func (r *room) intact(spent knock.Token) {
	r.t.Helper()
	if !r.accepted(r.Client.Addr) {
		r.t.Error("the friend's window did not come back")
	}
	r.send(r.Stranger, spent[:])
	if r.accepted(r.Stranger) {
		r.t.Error("the spent token opened again")
	}
	r.fw.mu.Lock()
	a, err := r.fw.elementsLocked("admitted")
	r.fw.mu.Unlock()
	if err != nil || len(a) != 1 {
		r.t.Errorf("admitted: %v, %v", a, err)
	}
	if again := r.repaired(); again.took != 0 {
		r.t.Errorf("the repaired table is repaired again: %+v", again)
	}
}

func TestDriftIsRepaired(t *testing.T) {
	for name, script := range map[string]string{
		"deleted":                "delete table inet perimeterd",
		"deleted and made empty": "delete table inet perimeterd; add table inet perimeterd",
		"rules flushed":          "flush table inet perimeterd",
		"one rule more":          "insert rule inet perimeterd gate accept",
		"set of spent replaced":  "flush table inet perimeterd; delete set inet perimeterd spent; add set inet perimeterd spent { typeof @th,64,128; flags dynamic,timeout; size 1048576; timeout 3m; }",
		"set of another kind":    "flush table inet perimeterd; delete map inet perimeterd open4; add set inet perimeterd open4 { type ipv6_addr; }",
		"set missing":            "flush table inet perimeterd; delete set inet perimeterd admitted",
		"dormant":                "add table inet perimeterd { flags dormant; }",
		"foreign chain":          "add chain inet perimeterd cut { type filter hook input priority -300; policy drop; }",
		"policy":                 "add chain inet perimeterd input { policy drop; }",
	} {
		t.Run(name, func(t *testing.T) {
			r, spent, unspent := drifting(t)
			want := r.listing()
			r.nft(strings.ReplaceAll(script, "; ", "\n"))
			if done := r.repaired(Token{unspent, 43, soon()}); done.took == 0 {
				t.Error("not noticed")
			}
			diff(t, "the repaired table", want, r.listing())
			r.intact(spent)
		})
	}
}

var owner = strings.NewReplacer("\tflags owner\n\n", "")

// listing is the table without elements and without what a table with an owner shows besides.
func (r *room) listing() string {
	r.t.Helper()
	out, err := r.Bastion.Command(r.t.Context(), "nft", "-s", "-t", "list", "table", "inet", TableName).CombinedOutput()
	if err != nil {
		r.t.Fatalf("nft: %v\n%s", err, out)
	}
	_, body, _ := strings.Cut(owner.Replace(string(out)), "\n")
	// A set that was made again stands at the end of the list.
	parts := strings.Split(strings.TrimSuffix(body, "}\n"), "\n\n")
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	slices.Sort(parts)
	return strings.Join(parts, "\n\n")
}

// A saved listing brings windows back that have expired since, and takes away what is spent.
func TestLoadedListingDoesNotRule(t *testing.T) {
	r, spent, unspent := drifting(t)
	out, err := r.Bastion.Command(t.Context(), "nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	saved := "flush ruleset\n" + strings.Replace(string(out), "elements = { "+r.Client.Addr.String(), "elements = { "+r.Stranger.String(), 1)
	if !strings.Contains(saved, r.Stranger.String()) {
		t.Fatalf("the listing has no window:\n%s", saved)
	}
	r.nft(saved)
	if done := r.repaired(Token{unspent, 43, soon()}); !done.restored {
		t.Fatalf("the loaded table was taken for ours: %+v", done)
	}
	if r.accepted(r.Stranger) {
		t.Error("a window of the saved listing is open")
	}
	r.intact(spent)
}

// Another tool's commit between ours and the look at it must not make its table the one to keep.
func TestFlushRightBehindAnApplyIsNotKept(t *testing.T) {
	r, spent, unspent := drifting(t)
	r.fw.mu.Lock()
	r.fw.print = [32]byte{} // as writeLocked leaves it when the generation moved under it
	r.fw.mu.Unlock()
	r.nft("flush ruleset")
	if done := r.repaired(Token{unspent, 43, soon()}); done.took == 0 {
		t.Fatal("the empty ruleset was kept")
	}
	r.intact(spent)
}

func TestMissedOpeningsCloseTheRunningSteps(t *testing.T) {
	r, _, _ := drifting(t)
	r.fw.missed()
	r.nft("flush ruleset")
	if done := r.repaired(); !done.lost {
		t.Errorf("%+v: want it to say that openings were missed", done)
	}
}

// A removal while the table is away must not come back with the repair.
func TestWhatIsTakenOutWhileTheTableIsAwayStaysOut(t *testing.T) {
	r, _, _ := drifting(t)
	r.nft("flush ruleset")
	if err := errors.Join(r.fw.Dismiss(netip.MustParseAddr("10.77.0.9")), r.fw.CloseWindow(Window{Source: r.Client.Addr, Credential: 42})); err != nil {
		t.Fatal(err)
	}
	if done := r.repaired(); !done.restored {
		t.Fatalf("not repaired: %+v", done)
	}
	if r.accepted(r.Client.Addr) {
		t.Error("the closed window came back")
	}
	r.fw.mu.Lock()
	defer r.fw.mu.Unlock()
	for _, set := range []string{"admitted", "service"} {
		if e, err := r.fw.elementsLocked(set); err != nil || len(e) != 0 {
			t.Errorf("%s after the repair: %v, %v", set, e, err)
		}
	}
}
