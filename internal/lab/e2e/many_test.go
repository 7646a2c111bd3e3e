package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/swarm"
	"perimeterd/vpn"
)

// crowd is a lab with a daemon, a cloud host and many clients.
type crowd struct {
	*stage
	*swarm.Swarm
	source swarm.Source
}

func newCrowd(t *testing.T, valid []time.Duration, settings ...lab.Setting) *crowd {
	t.Helper()
	c := &crowd{stage: newStage(t, lab.Options{}, settings...)}
	c.source = swarm.Source{Proxy: netip.MustParseAddrPort("10.77.0.1:3128"), Host: cloudName, CAs: c.cloud.CAs}
	if err := c.daemon.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	c.daemon.Wait()
	var err error
	if c.Swarm, err = swarm.New(c.ctx, c.Lab, c.daemon, valid...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Swarm.Close)
	if err := c.daemon.Start(c.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Join(c.ctx, c.Members, 8); err != nil {
		t.Fatal(err)
	}
	return c
}

// days is how long certificates hold where a test does not care.
func days(n int) []time.Duration { return slices.Repeat([]time.Duration{24 * time.Hour}, n) }

// downloads has every member fetch a file that does not end, of a size of its own.
func (c *crowd) downloads() []*swarm.Download {
	c.t.Helper()
	var all []*swarm.Download
	for i, m := range c.Members {
		d, err := m.Download(c.ctx, c.source, size(i), 50_000)
		if err != nil {
			c.t.Fatalf("%s: %v", m.Name, err)
		}
		c.t.Cleanup(d.Close)
		all = append(all, d)
	}
	return all
}

func size(member int) int64 { return int64(1e12) + int64(member) }

// cut tells whether the cloud has seen the end of a member's download.
func (c *crowd) cut(member int) bool {
	for _, r := range c.cloud.Requests() {
		if r.URI == fmt.Sprintf("/bytes/%d", size(member)) {
			return r.Done
		}
	}
	return false
}

// traces are the elements and flows that the bastion's kernel has of an address.
func (c *crowd) traces(a netip.Addr, sets ...string) (found []string) {
	c.t.Helper()
	for _, set := range sets {
		if out := c.ok(c.Bastion.Command(c.ctx, "nft", "list", "set", "inet", "perimeterd", set)); strings.Contains(out, a.String()+" ") {
			found = append(found, set)
		}
	}
	if err := c.Bastion.Do(func() error {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		for _, f := range flows {
			if t := f.Forward; (t.SrcIP.String() == a.String() || t.DstIP.String() == a.String()) && !(t.Protocol == unix.IPPROTO_TCP && t.DstPort == 1194) {
				found = append(found, f.String())
			}
		}
		return err
	}); err != nil {
		c.t.Fatal(err)
	}
	return found
}

// Whatever ends a session, in the middle of a download, nothing of it is left, and nobody else notices.
func TestEveryEndOfASessionLeavesNothingOfItAndTheOthersAlone(t *testing.T) {
	t.Parallel() // it waits for an expiry
	const expires, bystanders = 4, 10
	valid := days(5 + bystanders)
	valid[expires] = 25 * time.Second
	c := newCrowd(t, valid, lab.Setting{Key: "window", Value: `"3s"`})
	all := c.downloads()
	for i, end := range []struct {
		how      string
		by       func(m *swarm.Member) error
		ownWish  bool // the caller goes on
		shutsOut bool // no window is left either
	}{
		{"kicked", func(m *swarm.Member) error {
			_, err := c.daemon.Perimeterd(c.ctx, "kick", m.Session.ID)
			return err
		}, false, false},
		{"deleted", func(m *swarm.Member) error {
			return m.Ask(c.ctx, "DELETE", vpn.SessionPath+"/"+m.Session.ID, nil, nil)
		}, true, false},
		{"its device revoked", func(m *swarm.Member) error {
			_, err := c.daemon.Perimeterd(c.ctx, "user", "revoke", m.Name, "--device", "lab")
			return err
		}, false, false},
		{"its user revoked", func(m *swarm.Member) error {
			_, err := c.daemon.Perimeterd(c.ctx, "user", "revoke", m.Name)
			return err
		}, false, true},
		{"expired", func(*swarm.Member) error { return nil }, false, true},
	} {
		m, download := c.Members[i], all[i]
		if err := m.Knock(); err != nil {
			t.Fatal(err)
		}
		var gate *tls.Conn
		var err error
		if i != expires { // the certificate is not taken any more at its end
			if gate, err = m.Call(c.ctx); err != nil {
				t.Fatal(err)
			}
			defer gate.Close()
		}
		moved := download.Bytes()
		if i != expires { // which may have come
			c.await(end.how+": its download goes on before", func() bool { return download.Bytes() > moved })
		}
		if err := end.by(m); err != nil {
			t.Fatalf("%s: %v", end.how, err)
		}
		c.await(end.how+": the cloud sees the download's end", func() bool { return c.cut(i) })
		c.await(end.how+": its inner address leaves no trace", func() bool { return len(c.traces(m.Address, "admitted", "service")) == 0 })
		if end.shutsOut {
			c.await(end.how+": its outer address leaves no trace", func() bool { return len(c.traces(m.Outer, "peer4")) == 0 })
		}
		if gate != nil && !end.ownWish {
			gate.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := gate.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && !strings.Contains(fmt.Sprint(err), "remote error: tls") {
				t.Errorf("%s: its connection to the gate says %v: want a reset", end.how, err)
			}
		}
		if out := c.sessionsJSON(); strings.Contains(out, m.Session.ID) {
			t.Errorf("%s: it is still listed", end.how)
		}
		moved = download.Bytes()
		var before []int64
		for _, d := range all[i+1:] {
			before = append(before, d.Bytes())
		}
		for j, d := range all[i+1:] {
			if j+i+1 != expires {
				c.await(end.how+": the others' downloads go on", func() bool { return d.Bytes() > before[j] })
			}
		}
		if n := download.Bytes() - moved; n > 128<<10 { // more than lay unread at the client
			t.Errorf("%s: %d bytes arrived after its end", end.how, n)
		}
	}
	for _, d := range all[len(all)-bystanders:] {
		select {
		case <-d.Done:
			t.Errorf("a bystander's download ended: %v", d.Err())
		default:
		}
	}
}

// The daemon is killed, then frozen, with clients inside who move data, and strangers outside who try.
func TestManySessionsOutliveAKillAndAFreeze(t *testing.T) {
	c := newCrowd(t, days(24))
	all := c.downloads()
	ids := func() (list []string) {
		for id := range strings.SplitSeq(c.sessionsJSON(), `"id": "`) {
			list = append(list, id[:min(len(id), 32)])
		}
		slices.Sort(list)
		return list
	}
	before := ids()
	c.await("every endpoint is noted", func() bool { return strings.Count(c.sessionsJSON(), `"endpoint"`) == len(c.Members) })
	strangers := c.Prober(c.Client, c.Bastion.Addr, 1194, c.Stranger)
	strangers.Workers = 2
	ctx, stop := context.WithCancel(c.ctx)
	defer stop()
	probed := make(chan error, 1)
	go func() { probed <- strangers.Run(ctx) }()

	if err := c.daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.daemon.Wait()
	if err := c.daemon.Start(c.ctx); err != nil {
		t.Fatal(err)
	}
	ready := time.Now()
	for _, m := range c.Members {
		if err := m.Echo(c.ctx); err != nil {
			t.Fatalf("%s: nothing comes through its tunnel after a kill: %v", m.Name, err)
		}
	}
	t.Logf("all %d tunnels carried data %v after ready", len(c.Members), time.Since(ready).Round(time.Millisecond))
	for i, d := range all {
		select {
		case <-d.Done:
			if !errors.Is(d.Err(), syscall.ECONNRESET) {
				t.Errorf("%s: its download ended with %v, want a reset", c.Members[i].Name, d.Err())
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: its download hangs", c.Members[i].Name)
		}
	}
	if after := ids(); !slices.Equal(after, before) {
		t.Errorf("the sessions were %v and are %v", before, after)
	}

	all = c.downloads()
	if err := c.daemon.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	var bytes []int64
	for _, d := range all {
		bytes = append(bytes, d.Bytes())
	}
	if err := c.daemon.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for i, d := range all {
		c.await(c.Members[i].Name+": its download goes on after a freeze", func() bool { return d.Bytes() > bytes[i] })
	}
	if after := ids(); !slices.Equal(after, before) {
		t.Errorf("the sessions were %v and are %v", before, after)
	}
	stop()
	if err := <-probed; err != nil {
		t.Fatal(err)
	}
	if tally := strangers.Tally(); tally.Accepted != 0 || tally.Refused != 0 || tally.Silent == 0 {
		t.Errorf("strangers meanwhile: %+v", tally)
	}
}
