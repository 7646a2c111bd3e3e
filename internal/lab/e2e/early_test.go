package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"perimeterd/internal/lab"
	"perimeterd/vpn/client"
)

// unprivileged may make no device.
var unprivileged = []string{"setpriv", "--bounding-set=-net_admin"}

// localProxy is where the client listens.
const localProxy = "127.0.0.1:3128"

// counted is one of the kernel's counters of TCP in a host.
func (s *stage) counted(ns *lab.Namespace, name string) (n int) {
	s.t.Helper()
	lines := strings.Split(s.ok(ns.Command(s.ctx, "cat", "/proc/net/netstat")), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for j := range names {
			if names[j] == name {
				fmt.Sscan(values[j], &n)
				return n
			}
		}
	}
	s.t.Fatalf("/proc/net/netstat has no %s", name)
	return 0
}

// half sends all that it has to say in one piece to the client's listener, ends its side, and reads what comes until the end.
func (s *stage) half(text string) (string, error) {
	conn, err := s.Client.Dial(s.ctx, "tcp", localProxy)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, text); err != nil {
		return "", err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	got, err := io.ReadAll(conn)
	return string(got), err
}

func TestRequestLeavesWithTheFirstPacketWhereTheBastionsKernelTakesPart(t *testing.T) {
	t.Parallel()
	const echoPort = 7007
	s := newStage(t, lab.Options{LongLink: true}, lab.Setting{Key: "keepalive", Value: fmt.Sprintf("\"25s\"\n"+
		"[[proxy.rule]]\nallow = [\"198.19.1.2/32\"]\nports = [%d]\ngroups = [\"*\"]\ntls = false", echoPort)})
	l, err := s.Cloud.Listen("tcp", fmt.Sprintf(":%d", echoPort))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var reached atomic.Int32
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			reached.Add(1)
			go func() {
				defer c.Close()
				said, _ := io.ReadAll(c)
				fmt.Fprintf(c, "heard %s", said)
			}()
		}
	}()
	s.Link.SetDelay(20 * time.Millisecond) // so that answers are given before handshakes are complete
	connect := fmt.Sprintf("CONNECT %v:%d HTTP/1.1\r\nHost: %[1]v:%[2]d\r\n\r\n", s.Cloud.Addr, echoPort)
	vpn, err := lab.Bin("vpn")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		mode, takes string
		prefix      []string
	}{{client.ModeTUN, "1", nil}, {client.ModeTUN, "3", nil}, {client.ModeRootless, "1", unprivileged}, {client.ModeRootless, "3", unprivileged}} {
		name := c.mode + ", tcp_fastopen " + c.takes
		s.ok(s.Bastion.Command(s.ctx, "sysctl", "-w", "net.ipv4.tcp_fastopen="+c.takes))
		up := append(slices.Clone(c.prefix), vpn, "up")
		s.ok(s.alice.Command(s.ctx, up[0], up[1:]...))
		if mode := s.status(s.alice).Mode; mode != c.mode {
			t.Fatalf("%s: the tunnel is %s", name, mode)
		}
		// Spare connections serve the first, until one has left early: so many come at once that some must.
		crowd := func(text string, good func(string) bool) {
			t.Helper()
			var all errgroup.Group
			for range 12 {
				all.Go(func() error {
					got, err := s.half(text)
					if err == nil && !good(got) {
						err = errors.New(got)
					}
					return err
				})
			}
			if err := all.Wait(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		before := s.counted(s.Bastion, "TCPFastOpenPassive")
		for round := 0; ; round++ {
			// What is sent along, and a side that ends at once: nothing is lost.
			crowd(connect+"at once", func(got string) bool {
				return strings.HasPrefix(got, "HTTP/1.1 200 ") && strings.HasSuffix(got, "\r\n\r\nheard at once")
			})
			if early := s.counted(s.Bastion, "TCPFastOpenPassive") - before; early > 0 == (c.takes == "3") {
				break
			} else if early > 0 || round == 10 {
				t.Fatalf("%s: %d requests came with a SYN", name, early)
			}
		}
		// A refusal is whole, although it was written and its side ended before the client had answered.
		crowd("CONNECT evil.example.com:443 HTTP/1.1\r\nHost: evil.example.com:443\r\n\r\n", func(got string) bool {
			resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(got)), nil)
			if err != nil {
				return false
			}
			body, err := io.ReadAll(resp.Body)
			return err == nil && resp.StatusCode == http.StatusForbidden && strings.Contains(string(body), "perimeterd why")
		})
		// An ordinary client's page, by name and with TLS, by both ways in.
		for _, proxy := range []string{localProxy, "10.77.0.1:3128"} {
			if proxy != localProxy && c.mode == client.ModeRootless {
				continue
			}
			if got := s.ok(s.curl("--proxy", "http://"+proxy, "https://"+cloudName+"/")); got != "seen from "+s.Egress.String()+"\n" {
				t.Errorf("%s, by %s: %q", name, proxy, got)
			}
		}

		// The answers to it are lost, and the client's kernel sends its SYN again: it reaches for its destination once.
		was := reached.Load()
		lost := 0
		s.Link.SetLoss(func(p lab.Packet) bool {
			gone := p.Direction == lab.ToClient && lost < 4
			if gone {
				lost++
			}
			return gone
		})
		if got, err := s.half(connect + "again"); err != nil || !strings.HasSuffix(got, "heard again") {
			t.Errorf("%s, answers lost: %q, %v", name, got, err)
		}
		s.Link.SetLoss(nil)
		if lost == 0 {
			t.Errorf("%s: no packet was lost", name)
		}
		if n := reached.Load() - was; n != 1 {
			t.Errorf("%s: the destination was reached %d times", name, n)
		}
		s.ok(s.alice.VPN(s.ctx, "down"))
	}
}

// What the proxy opened before, the client's own listener answers ahead of it. When a rule is taken away since, the program that asks is
// told by TLS, and the next by the proxy.
func TestRefusalBehindAnAnswerAheadIsATLSAlertOnce(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.Options{})
	config, err := os.ReadFile(s.daemon.Config)
	if err != nil {
		t.Fatal(err)
	}
	s.cloud.DNS.Set("gone.example.com", s.Cloud.Addr)
	ask := func() *lab.Cmd { return s.curl("-k", "--proxy", "http://"+localProxy, "https://gone.example.com/") }
	vpn, err := lab.Bin("vpn")
	if err != nil {
		t.Fatal(err)
	}
	for mode, prefix := range map[string][]string{client.ModeTUN: nil, client.ModeRootless: unprivileged} {
		s.addRules(allowRule("gone.example.com"))
		s.perimeterd("apply")
		up := append(slices.Clone(prefix), vpn, "up")
		s.ok(s.alice.Command(s.ctx, up[0], up[1:]...))
		if st := s.status(s.alice); st.Mode != mode {
			t.Fatalf("the tunnel is %s, not %s", st.Mode, mode)
		}
		for range 2 {
			if out := s.ok(ask()); !strings.HasPrefix(out, "seen from ") {
				t.Errorf("%s: %s", mode, out)
			}
		}
		if err := os.WriteFile(s.daemon.Config, config, 0o640); err != nil {
			t.Fatal(err)
		}
		s.perimeterd("apply")
		if out := s.fails(ask()); !strings.Contains(out, "alert access denied") {
			t.Errorf("%s, the first: %s", mode, out)
		}
		if out := s.fails(ask()); !strings.Contains(out, "403") {
			t.Errorf("%s, the second: %s", mode, out)
		}
		logs, _ := filepath.Glob(filepath.Join(s.alice.Home, ".config", "perimeter", "*.log"))
		if len(logs) != 1 {
			t.Fatalf("%s: the client's logs: %v", mode, logs)
		}
		log, err := os.ReadFile(logs[0])
		if err != nil || !strings.Contains(string(log), "gone.example.com:443") || !strings.Contains(string(log), "perimeterd why") {
			t.Errorf("%s: the client's log: %v %s", mode, err, log)
		}
		s.ok(s.alice.VPN(s.ctx, "down"))
	}
}
