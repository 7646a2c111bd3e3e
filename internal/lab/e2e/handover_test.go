package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/swarm"
)

// newManagedCrowd is a crowd whose daemon has a manager from its second start on.
func newManagedCrowd(t *testing.T, members int) *crowd {
	t.Helper()
	c := newCrowd(t, days(members))
	for _, m := range c.Members { // a session that nobody has used yet would have to begin anew
		if err := m.Echo(c.ctx); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if c.daemon.Manager, err = c.NewManager(); err != nil {
		t.Fatal(err)
	}
	c.daemon.Environment = []string{"WATCHDOG_USEC=4000000"}
	c.restart()
	return c
}

// restart is what systemctl restart does. It returns how long the daemon took to end, and to be ready again.
func (c *crowd) restart() (stop, start time.Duration) {
	c.t.Helper()
	began := time.Now()
	if err := c.daemon.Signal(syscall.SIGTERM); err != nil {
		c.t.Fatal(err)
	}
	if err := c.daemon.Wait(); err != nil {
		c.t.Fatalf("the daemon's end: %v", err)
	}
	ended := time.Now()
	if err := c.daemon.Start(c.ctx); err != nil {
		c.t.Fatal(err)
	}
	return ended.Sub(began), time.Since(ended)
}

// transfer begins one of a member's, to be ended with the test.
func (c *crowd) transfer(m *swarm.Member, upload bool, n, rate int64) *swarm.Transfer {
	c.t.Helper()
	conn, err := m.Tunnel(c.ctx, c.source)
	if err != nil {
		c.t.Fatal(err)
	}
	t := swarm.NewTransfer(c.ctx, conn, c.source, upload, n, rate)
	c.t.Cleanup(t.Close)
	return t
}

// descriptors counts what the daemon has open, by kind.
func (c *crowd) descriptors() map[string]int {
	c.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", c.daemon.Pid())
	list, err := os.ReadDir(dir)
	if err != nil {
		c.t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, f := range list {
		to, err := os.Readlink(dir + f.Name())
		if err != nil { // closed meanwhile
			continue
		}
		kind, _, _ := strings.Cut(to, "[")
		kinds[kind]++
	}
	delete(kinds, "pipe:") // those of splices are in a pool until the next collection of garbage
	return kinds
}

// backAt waits until no more is open than was.
func (c *crowd) backAt(baseline map[string]int) {
	c.t.Helper()
	var now map[string]int
	for start := time.Now(); time.Since(start) < 30*time.Second; time.Sleep(100 * time.Millisecond) {
		more := false
		now = c.descriptors()
		for kind, n := range now {
			more = more || n > baseline[kind]
		}
		if !more {
			return
		}
	}
	c.t.Errorf("open were %v, and are %v", baseline, now)
}

func TestPlannedRestartsCutNoTransferAndLoseNoByte(t *testing.T) {
	const members, each, restarts, size, rate = 4, 30, 3, 1_500_000, 100_000
	c := newManagedCrowd(t, members)
	baseline, kept := c.descriptors(), c.daemon.Manager.Kept()
	var all []*swarm.Transfer
	for i := range members * each {
		all = append(all, c.transfer(c.Members[i%members], i%3 == 0, size, rate))
	}
	for n := range restarts {
		c.await("every transfer moves", func() bool {
			return !slices.ContainsFunc(all, func(t *swarm.Transfer) bool { return t.Moved() <= int64(n)*rate/2 })
		})
		running := 0
		for _, t := range all {
			if t.Moved() < size {
				running++
			}
		}
		stop, start := c.restart()
		c.t.Logf("restart under %d transfers: ended in %v, ready in %v", running, stop.Round(time.Millisecond), start.Round(time.Millisecond))
	}
	for i, tr := range all {
		<-tr.Done
		if tr.Err() != nil {
			t.Errorf("transfer %d after %d bytes: %v", i, tr.Moved(), tr.Err())
		}
	}
	for _, e := range c.daemon.Entries("proxied connections taken over") {
		t.Logf("taken over %v, refused %v", e["connections"], e["refused"])
	}
	for _, e := range c.daemon.Entries("proxied connections handed over") {
		t.Logf("handed over %v, reset %v, in %v ms", e["connections"], e["reset"], e["took_ms"])
		if e["reset"] != float64(0) {
			t.Errorf("connections were reset: %v", e)
		}
	}
	c.backAt(baseline)
	if now := c.daemon.Manager.Kept(); !slices.Equal(now, kept) {
		t.Errorf("the manager kept %q, and keeps %q", kept, now)
	}
	if c.await("the watchdog is told", func() bool { return slices.Contains(c.daemon.Manager.Said(), "WATCHDOG=1") }); t.Failed() {
		t.Logf("said %q", c.daemon.Manager.Said())
	}
}

func TestKilledUnderAManagerItResetsAndNeverEndsATransfer(t *testing.T) {
	const members, each = 3, 10
	c := newManagedCrowd(t, members)
	var all []*swarm.Transfer
	for i := range members * each {
		all = append(all, c.transfer(c.Members[i%members], i%3 == 0, 1e9, 200_000))
	}
	c.await("every transfer moves", func() bool {
		return !slices.ContainsFunc(all, func(t *swarm.Transfer) bool { return t.Moved() == 0 })
	})
	if err := c.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.daemon.Wait()
	if err := c.daemon.Start(c.ctx); err != nil {
		t.Fatal(err)
	}
	for i, tr := range all {
		if <-tr.Done; !errors.Is(tr.Err(), syscall.ECONNRESET) && !errors.Is(tr.Err(), syscall.EPIPE) {
			t.Errorf("transfer %d after %d bytes: %v, want a reset", i, tr.Moved(), tr.Err())
		}
	}
}

// A stop that is no restart: the manager gives up what it keeps, and the far side is told.
func TestStoppedForGoodItResetsWhatNobodyTakes(t *testing.T) {
	c := newManagedCrowd(t, 1)
	tr := c.transfer(c.Members[0], true, 1e9, 200_000)
	c.await("it moves", func() bool { return tr.Moved() > 0 })
	if err := c.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	c.daemon.Wait()
	said := c.daemon.Manager.Said()
	if !slices.Contains(said, "STOPPING=1") {
		t.Errorf("said %q", said)
	}
	for _, r := range c.cloud.Requests() {
		if r.URI == "/upload" && r.Done {
			t.Error("the upload ended before the manager gave it up")
		}
	}
	if err := c.daemon.Manager.GiveUp(); err != nil {
		t.Fatal(err)
	}
	c.await("the cloud's side ends", func() bool {
		return slices.ContainsFunc(c.cloud.Requests(), func(r lab.Request) bool { return r.URI == "/upload" && r.Done })
	})
	if err := c.daemon.Start(c.ctx); err != nil {
		t.Fatal(err)
	}
	if <-tr.Done; !errors.Is(tr.Err(), syscall.ECONNRESET) && !errors.Is(tr.Err(), syscall.EPIPE) {
		t.Errorf("the client's side: %v, want a reset", tr.Err())
	}
}

func TestTwentyRestartsUnderAClientWhoNeverRests(t *testing.T) {
	const restarts = 20
	c := newManagedCrowd(t, 2)
	baseline := c.descriptors()
	ctx, cancel := context.WithCancel(c.ctx)
	var wg sync.WaitGroup
	client := func(what string, ask func() error) (passed *atomic.Int64, report func()) {
		passed = new(atomic.Int64)
		var longest time.Duration
		n, failed, refused := 0, 0, 0
		wg.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				err := ask()
				longest = max(longest, time.Since(began))
				if n++; err == nil || ctx.Err() != nil {
					passed.Add(1)
					continue
				}
				if failed++; errors.Is(err, syscall.ECONNREFUSED) {
					refused++
				}
				t.Logf("%s: %v", what, err)
			}
		})
		return passed, func() {
			t.Logf("%s: %d requests over %d restarts, %d refused, %d failed, the longest took %v", what, n, restarts, refused, failed, longest.Round(time.Millisecond))
			if refused > 0 || failed > 0 || n < restarts {
				t.Errorf("%s: %d of %d failed, %d refused", what, failed, n, refused)
			}
		}
	}
	proxied, through := client("new connections through the proxy", func() error {
		conn, err := c.Members[0].Tunnel(c.ctx, c.source)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", c.source.Host); err != nil {
			return err
		}
		b, err := io.ReadAll(conn)
		if err == nil && !strings.Contains(string(b), "seen from "+c.Egress.String()) {
			err = fmt.Errorf("the answer is %q", b)
		}
		return err
	})
	asked, atGate := client("requests at the gate", func() error {
		var reply any
		return c.Members[1].Ask(c.ctx, "GET", "/v1/session", nil, &reply)
	})
	var longest time.Duration
	for range restarts {
		stop, start := c.restart()
		longest = max(longest, stop+start)
		for _, passed := range []*atomic.Int64{proxied, asked} {
			before := passed.Load()
			c.await("requests pass again", func() bool { return passed.Load() > before+1 })
		}
	}
	cancel()
	wg.Wait()
	through()
	atGate()
	t.Logf("the longest restart took %v", longest.Round(time.Millisecond))
	c.backAt(baseline)
}

func TestManagerHearsOfEveryReload(t *testing.T) {
	c := newManagedCrowd(t, 1)
	if err := c.daemon.Manager.Await(c.ctx, "READY=1", 1); err != nil {
		t.Fatal(err)
	}
	if err := c.daemon.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := c.daemon.Manager.Await(c.ctx, "READY=1", 2); err != nil {
		t.Fatal(err)
	}
	said := strings.Join(c.daemon.Manager.Said(), "\n")
	if i := strings.Index(said, "RELOADING=1\nMONOTONIC_USEC="); i < 0 || !strings.Contains(said[i:], "READY=1") {
		t.Errorf("said %s", said)
	}
	if err := c.daemon.Manager.Await(c.ctx, "STATUS=1 sessions, 0 proxied connections", 1); err != nil {
		t.Errorf("%v; said %s", err, said)
	}
}
