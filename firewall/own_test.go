package firewall

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOwnedTableBouncesOtherToolsAndIsAdopted(t *testing.T) {
	r := newRoom(t, example())
	if r.fw.Owned() != kernelHasPersist(t) {
		t.Fatalf("owned: %v; kernel with persist: %v", r.fw.Owned(), kernelHasPersist(t))
	}
	if !r.fw.Owned() {
		// An older kernel: the table is plain, and what is done to it is repaired, which the tests of drift show.
		if out := r.listing(); strings.Contains(out, "flags") && strings.Contains(out, "owner") {
			t.Errorf("not owned, and listed as such:\n%s", out)
		}
		return
	}
	token := tok(1)
	r.load(Token{token, 42, soon()})
	r.send(r.Client.Addr, token[:])
	if !r.accepted(r.Client.Addr) {
		t.Fatal("the token did not open")
	}
	for _, c := range []string{"flush ruleset", "delete table inet perimeterd", "flush table inet perimeterd", "add element inet perimeterd open4 { 198.18.1.3 : 1 }"} {
		out, err := r.Bastion.Command(t.Context(), "nft", c).CombinedOutput()
		t.Logf("nft %s: %v %s", c, err, out)
		if r.accepted(r.Stranger) || !r.accepted(r.Client.Addr) {
			t.Errorf("nft %s took effect", c)
		}
	}
	second := New(testLog(t), r.fw.netns)
	if _, err := second.Apply(example()); err == nil || !strings.Contains(err.Error(), "belongs to another process") {
		t.Errorf("a second daemon: %v", err)
	}
	r.fw.mu.Lock()
	r.fw.dropLocked() // as when the daemon dies
	r.fw.mu.Unlock()
	if fresh, err := second.Apply(example()); err != nil || fresh || !second.Owned() {
		t.Fatalf("adopt the orphan: fresh %v, owned %v, %v", fresh, second.Owned(), err)
	}
	if !r.accepted(r.Client.Addr) || r.accepted(r.Stranger) {
		t.Error("the window did not survive the change of owners")
	}
	if w, err := second.Windows(); err != nil || len(w) != 1 {
		t.Errorf("windows %v, %v", w, err)
	}
}

func TestLostSocketOwnsTheTableAgain(t *testing.T) {
	f := New(testLog(t), private(t))
	if _, err := f.Apply(example()); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	f.dropLocked()
	f.mu.Unlock()
	if err := f.AddTokens([]Token{{tok(1), 1, soon()}}); err != nil {
		t.Fatal(err)
	}
	if out := run(t, "", "nft", "list", "table", "inet", TableName); strings.Contains(out, "flags owner") != kernelHasPersist(t) {
		t.Errorf("owned again only where the kernel has persist:\n%.200s", out)
	}
}

// kernelHasPersist: 6.9 and newer.
func kernelHasPersist(t *testing.T) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 9
}
