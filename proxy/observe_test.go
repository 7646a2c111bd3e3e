package proxy

import (
	"fmt"
	"io"
	"net"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestObservedCountsWhatWouldBeRefused(t *testing.T) {
	var o Observed
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	see := func(user, name string, d Decision) {
		at = at.Add(time.Second)
		o.Access(Access{Began: at, User: user, Destination: Destination{Name: name, Port: 443}, Decision: d})
	}
	noRule := Decision{Allow: true, Observed: true, Reason: NoRule}
	see("alice", "b.example", noRule)
	see("alice", "a.example", noRule)
	see("bob", "a.example", noRule)
	see("alice", "a.example", noRule)
	see("alice", "a.example", Decision{Allow: true, Observed: true, Reason: DeniedByRule, Rule: 3})
	see("alice", "c.example", Decision{Allow: true, Reason: Allowed})
	see("alice", "d.example", Decision{Reason: Metadata})
	want := []Observation{
		{"a.example:443", NoRule, 0, 3, []string{"alice", "bob"}, at.Add(-3 * time.Second)},
		{"a.example:443", DeniedByRule, 3, 1, []string{"alice"}, at.Add(-2 * time.Second)},
	}
	if got := o.Most(2); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	if n := len(o.Most(10)); n != 3 {
		t.Errorf("%d in all", n)
	}
	for i := range 3 * observedMost {
		see(fmt.Sprint("user", i), fmt.Sprintf("n%d.example", i), noRule)
	}
	all := o.Most(1 << 20)
	if rest := all[0]; len(all) != observedMost+1 || rest.Destination != "" || rest.Requests != 2*observedMost+3 || len(rest.Users) != observedUsers {
		t.Errorf("%d, the first %+v", len(all), rest)
	}
}

func TestObserveRefusesOnlyWhatIsNeverAllowed(t *testing.T) {
	cfg := openConfig()
	cfg.Observe = true
	cfg.Rules = []Rule{{Deny: []string{outsideSecond}}, {Allow: []string{outsideHost}, Groups: []string{"*"}, Ports: allPorts(), TLS: true}}
	l := startLab(t, cfg)
	for _, tt := range []struct {
		host string
		want Reason
		rule int
	}{{outsideHost, NotTLS, 2}, {outsideSecond, DeniedByRule, 1}, {"denied.lab.test", DeniedByRule, 1}, {"www.lab.test", NoRule, 0}} {
		listen := outsideHost
		if tt.want == DeniedByRule {
			listen = outsideSecond
		}
		at := serveOutside(t, listen+":0", func(c *net.TCPConn) { io.Copy(c, c) })
		c := l.tunnel("10.77.0.2", net.JoinHostPort(tt.host, strconv.Itoa(int(at.Port()))))
		io.WriteString(c, "plain text")
		c.CloseWrite()
		if b, err := io.ReadAll(c); string(b) != "plain text" || err != nil {
			t.Errorf("%s: %q, %v", tt.host, b, err)
		}
		if a := l.next(); !a.Decision.Observed || a.Decision.Reason != tt.want || a.Decision.Rule != tt.rule {
			t.Errorf("%s: logged %+v", tt.host, a.Decision)
		}
	}
	for target, want := range map[string]Reason{"169.254.169.254:80": Metadata, "private.lab.test:80": Private} {
		if status, _ := ask(t, l.from("10.77.0.2"), "CONNECT "+target+" HTTP/1.0\r\n\r\n"); status != 403 {
			t.Errorf("%s: %d", target, status)
		}
		if a := l.next(); a.Decision.Reason != want || a.Decision.Allow || a.Decision.Observed {
			t.Errorf("%s: logged %+v", target, a.Decision)
		}
	}
	if !strings.Contains(l.logged(), `"decision":"observe"`) {
		t.Error("no line says observe")
	}
}
