// Package e2e drives the built binaries through the lab: real sockets, real nftables, real tunnels, stock clients.
package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// stage is a lab with a running daemon, a cloud host and one user, alice, who has her profile imported.
type stage struct {
	*lab.Lab
	t      *testing.T
	ctx    context.Context
	daemon *lab.Daemon
	cloud  *lab.CloudHost
	alice  *lab.User
}

// cloudName is a name that the default rules allow.
const cloudName = "s3.us-east-1.amazonaws.com"

func newStage(t *testing.T, o lab.Options, settings ...lab.Setting) *stage {
	t.Helper()
	return newStageIn(t, lab.Start(t, o), settings...)
}

func newStageIn(t *testing.T, l *lab.Lab, settings ...lab.Setting) *stage {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	s := &stage{Lab: l, t: t, ctx: ctx}
	var err error
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintln(w, from)
	})
	if s.cloud, err = s.StartCloud(lab.CloudOptions{Names: []string{cloudName, "evil.example.com", "*.elb.amazonaws.com", "checkip.amazonaws.com"},
		Sites: map[string]http.Handler{"checkip.amazonaws.com": echo}}); err != nil {
		t.Fatal(err)
	}
	if s.daemon, err = s.NewDaemon(ctx, settings...); err != nil {
		t.Fatal(err)
	}
	profile, err := s.daemon.AddUser(ctx, "alice", "--group", "operators")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", s.daemon.Log())
		}
	})
	if s.alice, err = s.NewUser(ctx, s.Client, profile); err != nil {
		t.Fatal(err)
	}
	return s
}

// ok runs a command that must succeed and returns what it printed.
func (s *stage) ok(c *lab.Cmd) string {
	s.t.Helper()
	out, err := c.CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", strings.Join(c.Args, " "), err, out)
	}
	return string(out)
}

// fails runs a command that must not succeed and returns what it printed.
func (s *stage) fails(c *lab.Cmd) string {
	s.t.Helper()
	out, err := c.CombinedOutput()
	if err == nil {
		s.t.Fatalf("%s succeeded, and must not:\n%s", strings.Join(c.Args, " "), out)
	}
	return string(out)
}

// curl prepares stock curl through the proxy.
func (s *stage) curl(args ...string) *lab.Cmd {
	c := s.alice.Command(s.ctx, "curl", append([]string{"-sS", "--max-time", "10", "--cacert", s.cloud.CAFile}, args...)...)
	c.Env = append(c.Env, "https_proxy=http://10.77.0.1:3128", "http_proxy=http://10.77.0.1:3128")
	return c
}

func TestKnockUpCurl(t *testing.T) {
	s := newStage(t, lab.Options{})
	if out := s.fails(s.curl("--max-time", "1", "https://"+cloudName+"/")); strings.Contains(out, "seen from") {
		t.Errorf("reached without a session: %s", out)
	}
	t.Log(s.ok(s.alice.Knock(s.ctx)))
	t.Log(s.ok(s.alice.VPN(s.ctx, "up")))
	if got, want := s.ok(s.curl("https://"+cloudName+"/")), "seen from "+s.Egress.String()+"\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if r := s.cloud.Requests(); len(r) != 1 || r[0].From.Addr() != s.Egress {
		t.Errorf("the cloud host saw %+v", r)
	}
	// One that no rule names, and one that a set denies.
	for _, name := range []string{"evil.example.com", "x.elb.amazonaws.com"} {
		if out := s.fails(s.curl("https://" + name + "/")); !strings.Contains(out, http.StatusText(http.StatusForbidden)) && !strings.Contains(out, "403") {
			t.Errorf("%s: %s", name, out)
		}
	}
	if r := s.cloud.Requests(); len(r) != 1 {
		t.Errorf("a refused request reached the cloud: %+v", r)
	}
	t.Log(s.ok(s.alice.VPN(s.ctx, "status")))
	if got := s.ok(s.alice.VPN(s.ctx, "exec", "--", "sh", "-c", "curl -sS --cacert "+s.cloud.CAFile+" https://"+cloudName+"/")); !strings.HasSuffix(got, "seen from "+s.Egress.String()+"\n") {
		t.Errorf("vpn exec: %q", got)
	}
	t.Log(s.ok(s.alice.VPN(s.ctx, "down")))
	s.fails(s.curl("--max-time", "1", "https://"+cloudName+"/"))
	t.Log(s.daemon.Log())
}
