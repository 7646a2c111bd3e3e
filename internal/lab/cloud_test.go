//go:build linux

package lab

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

func startCloud(t *testing.T, names ...string) (*Lab, *CloudHost) {
	t.Helper()
	l := Start(t, Options{})
	cloud, err := l.StartCloud(CloudOptions{Names: names})
	if err != nil {
		t.Fatal(err)
	}
	return l, cloud
}

// curl runs on the bastion.
func curl(t *testing.T, l *Lab, cloud *CloudHost, args ...string) (string, error) {
	t.Helper()
	out, err := l.Bastion.Command(t.Context(), "curl", append([]string{"-sS", "--max-time", "10", "--cacert", cloud.CAFile}, args...)...).Output()
	return string(out), err
}

func TestCloudSeesTheSourceAddress(t *testing.T) {
	l, cloud := startCloud(t, "console.aws.amazon.com", "sts.amazonaws.com")
	for _, tt := range []struct{ want, url, from string }{
		{"seen from 198.19.1.10\n", "https://console.aws.amazon.com/", "198.19.1.10"},
		{"seen from 198.19.1.1\n", "https://sts.amazonaws.com/", "198.19.1.1"},
		{"seen from 198.19.1.10\n", "http://sts.amazonaws.com/", "198.19.1.10"},
		{"seen from 2001:db8:19:1::10\n", "https://[2001:db8:19:1::2]/", "2001:db8:19:1::10"},
	} {
		if got, err := curl(t, l, cloud, "--interface", tt.from, tt.url); err != nil || got != tt.want {
			t.Errorf("%s from %s: %q, want %q: %v", tt.url, tt.from, got, tt.want, err)
		}
	}
	if _, err := curl(t, l, cloud, "--resolve", "evil.example:443:198.19.1.2", "https://evil.example/"); err == nil || !strings.Contains(err.Error(), "exit status 60") {
		t.Errorf("for a name outside the certificate, curl says %v", err)
	}
	requests := cloud.Requests()
	if len(requests) != 4 {
		t.Fatalf("requests: %v", requests)
	}
	if r := requests[0]; r.From.Addr() != l.Egress || r.ServerName != "console.aws.amazon.com" || r.Proto != "HTTP/2.0" ||
		r.Method != "GET" || r.Host != r.ServerName || r.URI != "/" || r.Sent != 22 || !r.Done {
		t.Errorf("first request: %+v", r)
	}
	if r := requests[2]; r.ServerName != "" || r.Proto != "HTTP/1.1" {
		t.Errorf("request to port 80: %+v", r)
	}
}

func TestCloudServesAndCountsBytes(t *testing.T) {
	l, cloud := startCloud(t, "s3.amazonaws.com")
	const size = 1_000_003
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i % 251)
	}
	file := filepath.Join(t.TempDir(), "file")
	if _, err := curl(t, l, cloud, "-o", file, fmt.Sprintf("https://s3.amazonaws.com/bytes/%d", size)); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes with sum %x, %v", len(got), sha256.Sum256(got), err)
	}
	if out, err := curl(t, l, cloud, "-T", file, "https://s3.amazonaws.com/upload"); err != nil || out != "got 1000003 bytes\n" {
		t.Errorf("upload: %q, %v", out, err)
	}
	for _, bad := range []string{"x", "-1", "99999999999999999999"} {
		if out, err := curl(t, l, cloud, "-o", "/dev/null", "-w", "%{http_code}", "https://s3.amazonaws.com/bytes/"+bad); err != nil || out != "400" {
			t.Errorf("/bytes/%s: %q, %v", bad, out, err)
		}
	}
	if r := cloud.Requests(); r[0].Sent != size || r[1].Received != size {
		t.Errorf("requests: %+v", r)
	}
}

func TestTransferIsCountedWhileItRuns(t *testing.T) {
	l, cloud := startCloud(t, "s3.amazonaws.com")
	client := http.Client{Transport: &http.Transport{DialContext: l.Bastion.Dial}}
	resp, err := client.Get("http://198.19.1.2/bytes/1000000000")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	if r := cloud.Requests()[0]; r.Sent < 1<<20-int64(len(cloud.pattern)) || r.Done {
		t.Errorf("in mid-transfer: %+v", r)
	}
	resp.Body.Close()
	soon(t, "unfinished", func() []string {
		if r := cloud.Requests()[0]; !r.Done {
			return []string{fmt.Sprintf("%+v", r)}
		}
		return nil
	})
}

func TestLongAnswersComeByTCP(t *testing.T) {
	l, cloud := startCloud(t, "one.example")
	var many []netip.Addr
	for a := netip.MustParseAddr("198.19.2.1"); len(many) < 100; a = a.Next() {
		many = append(many, a)
	}
	cloud.DNS.Set("many.example", many...)
	c := l.Bastion.Command(t.Context(), "/proc/self/exe", "many.example")
	c.Env = append(os.Environ(), "LAB_TEST_CHILD=lookup", "GODEBUG=netdns=go")
	out, err := c.Output()
	if got := strings.Fields(string(out)); err != nil || len(got) != len(many) {
		t.Errorf("%d addresses, %v: %s", len(got), err, out)
	}
}

func question(t testing.TB, name string, kind dnsmessage.Type) []byte {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}
	packed, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

func TestDNSAnswersWhatItWasGivenAndNoMore(t *testing.T) {
	d := &DNS{records: map[string][][]netip.Addr{}}
	four, six := netip.MustParseAddr("198.19.1.2"), netip.MustParseAddr("2001:db8::2")
	d.Set("Both.Example.", four, six)
	d.Set("four.example", four)
	d.Set("gone.example", four)
	d.Set("gone.example")
	for _, tt := range []struct {
		name  string
		kind  dnsmessage.Type
		rcode dnsmessage.RCode
		count int
	}{
		{"both.example.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, 1},
		{"BOTH.example.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, 1},
		{"both.example.", dnsmessage.TypeMX, dnsmessage.RCodeSuccess, 0},
		{"four.example.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, 0},
		{"gone.example.", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0},
		{"sub.both.example.", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0},
		{".", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0},
	} {
		packed, err := d.answer(question(t, tt.name, tt.kind), netip.AddrPort{}, 512)
		if err != nil {
			t.Fatal(err)
		}
		var m dnsmessage.Message
		if err := m.Unpack(packed); err != nil {
			t.Fatal(err)
		}
		if m.ID != 7 || !m.Response || m.RCode != tt.rcode || len(m.Answers) != tt.count {
			t.Errorf("%s %v: %v", tt.name, tt.kind, m.GoString())
		}
	}
	if q := d.Queries(); len(q) != 7 || q[1].Name != "both.example" || q[1].Type != dnsmessage.TypeAAAA || time.Since(q[1].At) > time.Minute {
		t.Errorf("queries: %v", q)
	}
}

func FuzzDNSAnswer(f *testing.F) {
	d := &DNS{records: map[string][][]netip.Addr{}}
	var many []netip.Addr
	for a := netip.MustParseAddr("198.19.1.2"); len(many) < 50; a = a.Next() {
		many = append(many, a)
	}
	d.Set("many.example", many...)
	f.Add(question(f, "many.example.", dnsmessage.TypeA))
	f.Add(question(f, "other.example.", dnsmessage.TypeAAAA))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, query []byte) {
		packed, err := d.answer(query, netip.AddrPort{}, 512)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(packed); err != nil || !m.Response || len(packed) > 512 {
			t.Errorf("query %x is answered by %d bytes %x: %v", query, len(packed), packed, err)
		}
	})
}
