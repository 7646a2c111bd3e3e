package identity

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestAPipeThatTookAFilesPlaceIsNotWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "crl")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readFile(path); !errors.Is(err, errNotFile) {
		t.Error(err)
	}
}

func TestFollowTellsEachChangeOnce(t *testing.T) {
	o := newOutside(t, true, true)
	o.swap(o.Allowed, []byte("CN=alice\n"))
	var b bytes.Buffer
	log, calls := slog.New(slog.NewTextHandler(&b, nil)), 0
	var f follower
	step := func(wantCalls int, want ...string) {
		t.Helper()
		b.Reset()
		calls = 0
		f.step(o.Verifier, log, func() { calls++ })
		lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
		if b.Len() == 0 {
			lines = nil
		}
		if calls != wantCalls || len(lines) != len(want) {
			t.Fatalf("%d calls, want %d; %d lines, want %d:\n%s", calls, wantCalls, len(lines), len(want), b.String())
		}
		for i := range want {
			if !strings.Contains(lines[i], want[i]) {
				t.Fatalf("line %q, want %q", lines[i], want[i])
			}
		}
	}
	step(1, "allowed list in force", "level=ERROR msg=\"problem of an identity file\" err=\""+o.CRL+": no such file", "no CRL of CN=Example VPN CA")
	step(0)
	o.swap(o.CRL, list(t, o.ca, now, 4*week))
	step(1, "level=INFO msg=\"CRL in force\" file="+o.CRL+" issuer=\"CN=Example VPN CA\"", "identity files are in order again")
	step(0)
	for _, at := range []struct {
		left time.Duration
		want string
	}{{week, "level=WARN msg=\"problem of an identity file\" err=\"" + o.CRL + ": the CRL of CN=Example VPN CA expires within a week"}, {24 * time.Hour, "within a day"}, {time.Hour, "within an hour"}} {
		o.clock = now.Add(4*week - at.left)
		step(0, at.want)
		step(0)
	}
	o.clock = now.Add(4 * week)
	step(1, "level=ERROR") // whoever is inside must be looked at
	step(0)
	o.swap(o.CRL, list(t, o.ca, o.clock, 4*week))
	step(1, "CRL in force", "in order again")
	o.write(o.CRL, []byte("torn"))
	o.settle()
	step(0, "cut short")
	o.swap(o.Allowed, []byte("CN=bob\n"))
	step(1, "allowed list in force")
}

func TestFollowActsWithinASecondAndEndsWithItsContext(t *testing.T) {
	o := newOutside(t, false, true)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		calls, done := make(chan struct{}, 10), make(chan error)
		go func() { done <- o.Follow(ctx, slog.New(slog.DiscardHandler), func() { calls <- struct{}{} }) }()
		<-calls
		o.write(o.Allowed, []byte("CN=alice\n"))
		began := time.Now()
		<-calls
		if took := time.Since(began); took > time.Second {
			t.Errorf("after %v", took)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	f := newFixture(t)
	if err := f.Follow(context.Background(), slog.New(slog.DiscardHandler), nil); err != nil || f.Problems() != nil || f.CRLs() != nil || f.Listed("alice") {
		t.Error("the built-in authority has files to follow")
	}
}
