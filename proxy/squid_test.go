package proxy

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestSquidLine(t *testing.T) {
	began := time.Date(2026, 3, 4, 5, 6, 7, 890e6, time.UTC)
	base := Access{Began: began, Duration: 1234567 * time.Microsecond, User: "alice", Source: netip.MustParseAddrPort("10.77.0.2:4711")}
	to, dialed := Destination{Name: "s3.amazonaws.com", Port: 443}, netip.MustParseAddrPort("52.1.2.3:443")
	for want, change := range map[string]func(*Access){
		"1772600769.124   1234 10.77.0.2 TCP_TUNNEL/200 5000 CONNECT s3.amazonaws.com:443 alice HIER_DIRECT/52.1.2.3 -\n": func(a *Access) {
			a.Method, a.Destination, a.Dialed, a.Status, a.Down, a.End = "CONNECT", to, dialed, 200, 5000, Closed
			a.Decision = Decision{Allow: true, Reason: Allowed}
		},
		"1772600769.124   1234 10.77.0.2 TCP_TUNNEL_ABORTED/200 5 CONNECT s3.amazonaws.com:443 alice HIER_DIRECT/52.1.2.3 -\n": func(a *Access) {
			a.Method, a.Destination, a.Dialed, a.Status, a.Down, a.End = "CONNECT", to, dialed, 200, 5, PolicyChanged
			a.Decision = Decision{Allow: true, Reason: Allowed}
		},
		"1772600769.124   1234 10.77.0.2 TCP_TUNNEL_TIMEDOUT/200 5 CONNECT s3.amazonaws.com:443 alice HIER_DIRECT/52.1.2.3 -\n": func(a *Access) {
			a.Method, a.Destination, a.Dialed, a.Status, a.Down, a.End = "CONNECT", to, dialed, 200, 5, Idle
			a.Decision = Decision{Allow: true, Reason: Allowed}
		},
		"1772600769.124   1234 10.77.0.2 TCP_DENIED/403 0 CONNECT s3.amazonaws.com:443 alice HIER_NONE/- -\n": func(a *Access) {
			a.Method, a.Destination, a.Status = "CONNECT", to, 403
			a.Decision = Decision{Reason: NoRule}
		},
		"1772600769.124   1234 10.77.0.2 TCP_DENIED/200 0 CONNECT s3.amazonaws.com:443 alice HIER_DIRECT/52.1.2.3 -\n": func(a *Access) {
			a.Method, a.Destination, a.Dialed, a.Status, a.End = "CONNECT", to, dialed, 200, SNIMismatch
			a.Decision = Decision{Reason: SNIMismatch}
		},
		"1772600769.124   1234 10.77.0.2 TCP_TUNNEL/502 0 CONNECT s3.amazonaws.com:443 alice HIER_NONE/- -\n": func(a *Access) {
			a.Method, a.Destination, a.Status = "CONNECT", to, 502
			a.Decision = Decision{Allow: true, Reason: ConnectRefused}
		},
		"1772600769.124   1234 10.77.0.2 TCP_MISS/304 77 GET http://s3.amazonaws.com/a%20b%C3%BC Alice%20%22S HIER_DIRECT/52.1.2.3 -\n": func(a *Access) {
			a.User, a.Method, a.Destination, a.Dialed, a.Status, a.Down, a.Target = "Alice \"S", "GET", to, dialed, 304, 77, quote("http://s3.amazonaws.com/a bü?secret=1")
			a.Decision = Decision{Allow: true, Reason: Allowed}
		},
		"1772600769.124   1234 10.77.0.2 NONE_NONE/400 0 NONE error:invalid-request alice HIER_NONE/- -\n": func(a *Access) {
			a.Status, a.Target = 400, quote("a\nb 1772600769.124 forged")
			a.Decision = Decision{Reason: Malformed}
		},
		"1772600769.124   1234 10.77.0.2 TCP_DENIED/000 0 NONE error:invalid-request - HIER_NONE/- -\n": func(a *Access) {
			a.User = ""
			a.Decision = Decision{Reason: NoSession}
		},
	} {
		a := base
		change(&a)
		if got := squidLine(a); got != want {
			t.Errorf("got  %swant %s", got, want)
		}
	}
}

var squidFormat = regexp.MustCompile(`^\d{10}\.\d{3} +\d+ [0-9a-f.:]+ [A-Z_]+/\d{3} \d+ [!-~]+ [!-~]+ [!-~]+ HIER_[A-Z]+/[0-9a-f.:-]+ -\n$`)

// Ten fields and one line, whatever a client puts into a request.
func FuzzSquidLine(f *testing.F) {
	f.Add("GET", "http://a.b/x?y", "alice", true)
	f.Add("G T", "http://a.b/\n1 2 3", "x\u2028y", false)
	f.Fuzz(func(t *testing.T, method, target, user string, valid bool) {
		s := &Server{}
		a := *s.begin(&link{who: identity{user: user}, source: netip.MustParseAddrPort("[2001:db8::1]:1")}, method, target)
		if a.Status = 403; valid {
			a.Destination = Destination{Name: "a.b", Port: 80}
		}
		if line := squidLine(a); !squidFormat.MatchString(line) || len(strings.Fields(line)) != 10 {
			t.Errorf("%q", line)
		}
	})
}

func TestSquidLogOutlivesRotationAndFullDisks(t *testing.T) {
	said := new(syncBuffer)
	dir := t.TempDir()
	path := filepath.Join(dir, "access.log")
	if _, err := OpenSquidLog(filepath.Join(dir, "none", "access.log"), nil); err == nil || !strings.Contains(err.Error(), "log.squid_access_log: open "+dir+"/none/access.log: no such file or directory: make its directory") {
		t.Errorf("without a directory: %v", err)
	}
	l, err := OpenSquidLog(path, slog.New(slog.NewTextHandler(said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	now := time.Now()
	n := 0
	add := func(at time.Time) {
		n++
		l.Access(Access{Began: at, Source: netip.MustParseAddrPort("10.77.0.2:1"), Down: int64(n)})
	}
	count := func(name string) int {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "\n")
	}
	add(now)
	// Rotated, and told.
	os.Rename(path, path+".1")
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	add(now)
	// Rotated, and nobody says so.
	os.Rename(path, path+".2")
	add(now.Add(squidLooks - 1))
	add(now.Add(squidLooks))
	if a, b, c := count("access.log.1"), count("access.log.2"), count("access.log"); a != 1 || b != 2 || c != 1 {
		t.Errorf("%d, %d and %d lines", a, b, c)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o137 != 0 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// A full disk.
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	good := l.file
	l.file = full
	l.mu.Unlock()
	add(now.Add(squidLooks))
	add(now.Add(squidLooks))
	l.mu.Lock()
	l.file = good
	l.mu.Unlock()
	add(now.Add(squidLooks))
	if text := said.String(); strings.Count(text, "no space left") != 1 || !strings.Contains(text, "lost=2") {
		t.Errorf("said %s", text)
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestSquidLogOfARunningProxy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	squid, err := OpenSquidLog(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer squid.Close()
	l := newLab(t, openConfig())
	l.Watch(squid.Access)
	l.Watch(func(a Access) { l.seen <- a })
	l.run()
	host, _ := origin(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "answer") })
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.WriteString(c, "hello") })
	c := l.tunnel("10.77.0.2", at.String())
	if b, _ := io.ReadAll(c); string(b) != "hello" {
		t.Fatal(string(b))
	}
	c.Close()
	l.next()
	ask(t, l.from("10.77.0.2"), "GET http://"+host+"/a?key=secret HTTP/1.1\r\nHost: "+host+"\r\nConnection: close\r\n\r\n")
	ask(t, l.from("10.77.0.2"), "CONNECT evil.test:443 HTTP/1.0\r\n\r\n")
	ask(t, l.from("10.77.0.2"), "GET http://u:secret@x/\n\n")
	var lines []string
	eventually(t, "four lines", func() bool {
		b, err := os.ReadFile(path)
		lines = strings.SplitAfter(string(b), "\n")
		return err == nil && len(lines) == 5
	})
	for i, want := range []string{
		fmt.Sprintf(" TCP_TUNNEL/200 5 CONNECT %v alice HIER_DIRECT/198.18.0.2 -\n", at),
		"", // its size depends on its headers
		" TCP_DENIED/403 0 CONNECT evil.test:443 alice HIER_NONE/- -\n",
		" NONE_NONE/400 0 NONE error:invalid-request alice HIER_NONE/- -\n",
	} {
		if !squidFormat.MatchString(lines[i]) || !strings.HasSuffix(lines[i], want) || strings.Contains(lines[i], "secret") {
			t.Errorf("%q, want %q", lines[i], want)
		}
	}
	if !strings.Contains(lines[1], " TCP_MISS/200 ") || !strings.Contains(lines[1], " GET http://"+host+"/a alice HIER_DIRECT/198.18.0.2 -\n") {
		t.Errorf("%q", lines[1])
	}
}
