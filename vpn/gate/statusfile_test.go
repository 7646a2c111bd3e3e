package gate

import (
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// As OpenVPN 2.6 writes it.
func TestStatusIsInOpenVPNsFormat(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.ParseInLocation(time.DateTime, s, time.Local)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	got := string(statusText([]connected{
		{user: "alice", outer: netip.MustParseAddrPort("198.51.100.7:51820"), inner: netip.MustParseAddr("10.77.0.5"), received: 1903, sent: 1 << 40,
			since: at("2026-01-02 03:04:05"), last: at("2026-01-02 03:06:05")},
		{user: "Bob, the\n2nd", outer: netip.MustParseAddrPort("[2001:db8::7]:4000"), inner: netip.MustParseAddr("10.77.0.6"), since: at("2026-01-02 03:05:05"), last: at("2026-01-02 03:05:06")},
	}, at("2026-01-02 03:06:07")))
	want := `OpenVPN CLIENT LIST
Updated,2026-01-02 03:06:07
Common Name,Real Address,Bytes Received,Bytes Sent,Connected Since
alice,198.51.100.7:51820,1903,1099511627776,2026-01-02 03:04:05
Bob_ the_2nd,[2001:db8::7]:4000,0,0,2026-01-02 03:05:05
ROUTING TABLE
Virtual Address,Common Name,Real Address,Last Ref
10.77.0.5,alice,198.51.100.7:51820,2026-01-02 03:06:05
10.77.0.6,Bob_ the_2nd,[2001:db8::7]:4000,2026-01-02 03:05:06
GLOBAL STATS
Max bcast/mcast queue length,0
END
`
	if got != want {
		t.Errorf("got\n%s", got)
	}
}

func TestStatusFileIsReplacedAndKeepsItsOwner(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "status")
	for i, step := range []struct {
		mode     os.FileMode
		uid, gid uint32
	}{{0o600, 0, uint32(os.Getegid())}, {0o644, 4711, 4712}} {
		if i > 0 {
			if err := os.Chmod(path, step.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(path, int(step.uid), int(step.gid)); err != nil {
				t.Fatal(err)
			}
		}
		old, _ := os.Open(path)
		if err := replace(path, []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
		if old != nil { // who reads the old one reads it to its end
			var b [2]byte
			if n, _ := old.Read(b[:]); n != 1 || b[0] != byte(i-1) {
				t.Errorf("%d %v", n, b)
			}
			old.Close()
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		is := st.Sys().(*syscall.Stat_t)
		if st.Mode() != step.mode || is.Uid != step.uid || is.Gid != step.gid {
			t.Errorf("%v %d %d, want %+v", st.Mode(), is.Uid, is.Gid, step)
		}
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("%v %v", list, err)
	}
	if err := replace(dir, nil); err == nil {
		t.Error("a directory was replaced")
	}
	if err := replace(filepath.Join(dir, "missing", "status"), nil); err == nil {
		t.Error("written where there is no directory")
	}
}
