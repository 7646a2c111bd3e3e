package gate

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"
)

const (
	statusEvery = 5 * time.Second // if anything but the time is another
	statusFresh = 2 * statusEvery // in any case: readers tell by it that the daemon lives
)

// WriteStatus keeps a file in OpenVPN's status format, version 1 (multi_print_status in OpenVPN's multi.c), until ctx ends, for
// the tools that read it. A path of "" is none. The file is replaced whole, and keeps owner and mode; a new one is 0600, as
// OpenVPN's.
func (t *Tunnel) WriteStatus(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	tick := time.NewTicker(statusEvery)
	defer tick.Stop()
	var before []connected
	var written time.Time
	failed := ""
	for {
		now := time.Now()
		list, err := t.clients()
		if err == nil && (now.Sub(written) >= statusFresh || !slices.Equal(list, before)) {
			if err = replace(path, statusText(list, now)); err == nil {
				before, written = list, now
			}
		}
		switch {
		case err != nil && failed != err.Error():
			failed = err.Error()
			t.log.Error("session.status_file not written", "file", path, "err", err)
		case err == nil && failed != "":
			failed = ""
			t.log.Info("session.status_file is written again", "file", path)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// connected is one whose tunnel is up.
type connected struct {
	user           string
	outer          netip.AddrPort
	inner          netip.Addr
	received, sent uint64 // bytes, WireGuard's own included, since the daemon's start
	since, last    time.Time
}

// clients lists those who have completed a handshake, by the time they came.
func (t *Tunnel) clients() ([]connected, error) {
	device, err := t.engine.statuses()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []connected
	for key, p := range t.peers {
		s := p.session
		c := connected{user: s.User, inner: s.Address, since: s.Created, outer: s.Seen.Endpoint, last: s.Seen.Handshake}
		if now, ok := device[key]; ok {
			c.outer, c.last, c.received, c.sent = now.endpoint, now.handshake, now.received, now.sent
		}
		if c.outer.IsValid() {
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b connected) int { return cmp.Or(a.since.Compare(b.since), a.inner.Compare(b.inner)) })
	return list, nil
}

func statusText(list []connected, now time.Time) []byte {
	moment := func(t time.Time) string { return t.Local().Format(time.DateTime) }
	var b bytes.Buffer
	fmt.Fprintf(&b, "OpenVPN CLIENT LIST\nUpdated,%s\nCommon Name,Real Address,Bytes Received,Bytes Sent,Connected Since\n", moment(now))
	for _, c := range list {
		fmt.Fprintf(&b, "%s,%v,%d,%d,%s\n", commonName(c.user), c.outer, c.received, c.sent, moment(c.since))
	}
	fmt.Fprintf(&b, "ROUTING TABLE\nVirtual Address,Common Name,Real Address,Last Ref\n")
	for _, c := range list {
		fmt.Fprintf(&b, "%v,%s,%v,%s\n", c.inner, commonName(c.user), c.outer, moment(c.last))
	}
	fmt.Fprintf(&b, "GLOBAL STATS\nMax bcast/mcast queue length,0\nEND\n")
	return b.Bytes()
}

// commonName keeps a name of an external CA from being more than one field.
func commonName(s string) string {
	return strings.Map(func(r rune) rune {
		if r == ',' || !unicode.IsPrint(r) {
			return '_'
		}
		return r
	}, s)
}

// replace writes a file whole or not at all, in its owner's name and with its mode where it was there.
func replace(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if st, err := os.Stat(path); err == nil {
		if !st.Mode().IsRegular() {
			return fmt.Errorf("%s is no file", path)
		}
		if was, ok := st.Sys().(*syscall.Stat_t); ok {
			_ = f.Chown(int(was.Uid), int(was.Gid)) // who is not root owns it already, or may not
		}
		if err := f.Chmod(st.Mode().Perm()); err != nil {
			return err
		}
	}
	if _, err := f.Write(text); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
