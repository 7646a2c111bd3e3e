//go:build linux

package container

import (
	"testing"
	"time"
)

// TestPackagesInAVM goes through the life of an installation on a release of Debian that $RELEASE names, on its own kernel and with that kernel's
// WireGuard.
func TestPackagesInAVM(t *testing.T) {
	i := begin(t, 40*time.Minute, 1500)
	img, err := prepareImage(i.ctx, cache(t, "vm-image"), release())
	if err != nil {
		t.Fatal(err)
	}
	m, err := newVM(i.ctx, img, t.TempDir(), i.Bastion)
	if err != nil {
		t.Fatal(err)
	}
	i.goThrough(m, []part{
		{"installed, it lies still", (*installation).install},
		{"three commands let the first administrator in", (*installation).first},
		{"a host without a door answers", (*installation).doorless},
		{"closed from the first packet on", (*installation).closedFromTheFirst},
		{"the daemon is nobody's root", (*installation).unprivileged},
		{"kill -9", (*installation).kill},
		{"an upgrade", (*installation).upgrade},
		{"a daemon that hangs", (*installation).frozen},
		{"a crash", (*installation).crash},
		{"stopped for good", (*installation).stopped},
		{"other rules are loaded", (*installation).reloadRules},
		{"remove keeps what purge removes", (*installation).purge},
	})
}
