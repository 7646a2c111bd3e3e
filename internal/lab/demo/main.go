// Command demo shows the whole path in network namespaces, with the built binaries and stock clients: a filtered port, a
// knock, the tunnel, an HTTPS page of the cloud host through the proxy, the same request refused from outside, and where
// the time went. `make demo` runs it as root.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"perimeterd/internal/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := demo(ctx)
	switch {
	case ctx.Err() != nil:
		fmt.Println("\ninterrupted: everything is cleaned up")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

const (
	// delay is one way: a round trip of 50 ms, as between cities.
	delay = 25 * time.Millisecond
	site  = "s3.us-east-1.amazonaws.com"
)

// stage prints what happens, and keeps the time of what a person waits for.
type stage struct {
	ctx                context.Context
	bold, dim, ok, off string
}

func (s *stage) title(format string, a ...any) {
	fmt.Printf("\n%s%s%s\n", s.bold, fmt.Sprintf(format, a...), s.off)
}

// show runs a command as a person would type it, and prints what it printed.
func (s *stage) show(typed string, c *lab.Cmd) (out string, took time.Duration, err error) {
	fmt.Printf("  %s$ %s%s\n", s.dim, typed, s.off)
	start := time.Now()
	b, err := c.CombinedOutput()
	took = time.Since(start)
	for line := range strings.Lines(string(b)) {
		fmt.Printf("    %s\n", strings.TrimRight(line, "\r\n"))
	}
	if s.ctx.Err() != nil {
		err = s.ctx.Err()
	}
	return string(b), took, err
}

// proved prints a fact that this run has just seen.
func (s *stage) proved(format string, a ...any) {
	fmt.Printf("  %s✓ %s%s\n", s.ok, fmt.Sprintf(format, a...), s.off)
}

func demo(ctx context.Context) error {
	s := &stage{ctx: ctx}
	if term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == "" {
		s.bold, s.dim, s.ok, s.off = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[0m"
	}
	s.title("Three hosts in network namespaces: client ── %v round trip ── bastion ── cloud", 2*delay)
	l, err := lab.New(ctx, lab.Options{Delay: delay, RouteViaBastion: true}) // so that the laptop has a way past the proxy
	if err != nil {
		return err
	}
	defer l.Close()
	pinned := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		if from != l.Egress.String() {
			http.Error(w, "AccessDenied: explicit deny, aws:SourceIp "+from+" is not "+l.Egress.String()+"/32", http.StatusForbidden)
			return
		}
		fmt.Fprintf(w, "seen from %s\n", from)
	})
	cloud, err := l.StartCloud(lab.CloudOptions{Names: []string{site}, Sites: map[string]http.Handler{site: pinned}})
	if err != nil {
		return err
	}
	if err := l.Bastion.Sysctl("net.ipv4.tcp_fastopen", "3"); err != nil { // as the package does
		return err
	}
	daemon, err := l.NewDaemon(ctx)
	if err != nil {
		return err
	}
	profile, err := daemon.AddUser(ctx, "alice", "--group", "operators")
	if err != nil {
		return err
	}
	if err := daemon.Start(ctx); err != nil {
		return err
	}
	alice, err := l.NewUser(ctx, l.Client, profile)
	if err != nil {
		return err
	}
	stranger, err := l.AddHost(ctx, "stranger")
	if err != nil {
		return err
	}
	fmt.Printf("  client %v, bastion %v, its egress address %v, cloud %v (DNS leads %s there)\n", l.Client.Addr, l.Bastion.Addr, l.Egress, l.Cloud.Addr, site)
	fmt.Printf("  perimeterd runs on the bastion: one nftables table, one gate, one proxy inside the tunnel\n")

	s.title("1. Before the knock there is nothing")
	out, _, err := s.show(fmt.Sprintf("nmap -Pn -n -p 1194 %v", l.Bastion.Addr),
		alice.Command(ctx, "nmap", "-Pn", "-n", "-p", "1194", l.Bastion.Addr.String()))
	if err != nil {
		return err
	}
	if !strings.Contains(out, "filtered") {
		return errors.New("the gate's port is not filtered")
	}
	s.proved("the gate's port is filtered: the kernel drops, nothing answers")

	s.title("2. knock && vpn up")
	out, knocked, err := s.show("knock", alice.Knock(ctx))
	if err != nil {
		return err
	}
	if !strings.HasPrefix(out, "open") {
		return errors.New("the gate did not open")
	}
	if _, _, err = s.show("vpn up", alice.VPN(ctx, "up")); err != nil {
		return err
	}
	s.proved("one datagram opened the port for %v alone; TLS 1.3 took the certificate; WireGuard's handshake rode inside", l.Client.Addr)

	s.title("3. An HTTPS page through the proxy, with plain curl")
	const typed = "https_proxy=http://127.0.0.1:3128 curl https://" + site + "/"
	fetch := curl(ctx, alice, cloud, "https://"+site+"/")
	if out, _, err = s.show(typed, fetch); err != nil {
		return err
	}
	if want := fmt.Sprintf("seen from %v", l.Egress); !strings.Contains(out, want) {
		return fmt.Errorf("the cloud host did not answer %q", want)
	}
	s.proved("the cloud host saw %v, the one egress address", l.Egress)

	s.title("4. The same from outside")
	out, _, err = s.show("curl https://"+site+"/          (alice's laptop, past the proxy; the cloud has a policy)",
		alice.Command(ctx, "curl", "-sS", "--fail-with-body", "--max-time", "5", "--cacert", cloud.CAFile, "--resolve", site+":443:"+l.Cloud.Addr.String(), "https://"+site+"/"))
	if err == nil || !strings.Contains(out, "AccessDenied") {
		return fmt.Errorf("past the proxy the cloud host did not refuse: %v", err)
	}
	route := stranger.Command(ctx, "ip", "route", "add", "10.77.0.0/16", "via", l.Bastion.Addr.String())
	if out, err := route.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	outside := stranger.Command(ctx, "curl", "-sS", "--max-time", "2", "-x", "http://10.77.0.1:3128", "https://"+site+"/")
	if _, _, err = s.show("curl --max-time 2 -x http://10.77.0.1:3128 https://"+site+"/          (a stranger who routes to the proxy)", outside); err == nil {
		return errors.New("the stranger was let through")
	}
	out, _, err = s.show(fmt.Sprintf("nmap -Pn -n -p 1194 %v          (a stranger, while alice's window is open)", l.Bastion.Addr),
		stranger.Command(ctx, "nmap", "-Pn", "-n", "-p", "1194", l.Bastion.Addr.String()))
	if err != nil {
		return err
	}
	through := 0
	for _, r := range cloud.Requests() {
		if r.From.Addr() == l.Egress {
			through++
		}
	}
	if through != 1 || !strings.Contains(out, "filtered") {
		return fmt.Errorf("%d requests left the egress address, not alice's alone", through)
	}
	s.proved("refused every time: by the cloud's policy, by the tunnel's address, by the closed port; one request left %v, alice's", l.Egress)

	s.title("5. What the bastion's log says of it")
	for _, msg := range []string{"window opened", "session began", "proxy"} {
		for _, e := range daemon.Entries(msg) {
			fmt.Printf("  %-14s user %v, source %v", msg, e["user"], e["source"])
			if d, ok := e["destination"]; ok {
				fmt.Printf(", %v: %v (%v)", d, e["decision"], e["reason"])
			}
			fmt.Println()
		}
	}

	if _, _, err = s.show("vpn down", alice.VPN(ctx, "down")); err != nil {
		return err
	}
	return timeline(s, alice, cloud, knocked)
}

func curl(ctx context.Context, u *lab.User, cloud *lab.CloudHost, args ...string) *lab.Cmd {
	c := u.Command(ctx, "curl", append([]string{"-sS", "--cacert", cloud.CAFile}, args...)...)
	c.Env = append(c.Env, "https_proxy=http://127.0.0.1:3128") // as `vpn env` says
	return c
}

// timeline measures from nothing to the first byte once more, cold, with nothing printed in between.
func timeline(s *stage, alice *lab.User, cloud *lab.CloudHost, knocked time.Duration) error {
	s.title("6. Where the time goes, cold, at %v round trip", 2*delay)
	start := time.Now()
	up, err := alice.VPN(s.ctx, "up").CombinedOutput()
	if err != nil {
		return fmt.Errorf("vpn up: %w: %s", err, up)
	}
	tunnel := time.Since(start)
	stats, err := curl(s.ctx, alice, cloud, "-o", os.DevNull, "-w", "%{time_connect} %{time_appconnect} %{time_starttransfer}", "https://"+site+"/").Output()
	if err != nil {
		return err
	}
	total := time.Since(start)
	var connect, tls, first float64 // seconds
	if _, err := fmt.Sscan(string(stats), &connect, &tls, &first); err != nil {
		return fmt.Errorf("curl's times %q: %w", stats, err)
	}
	row := func(what string, at time.Duration) {
		trips := float64(at) / float64(2*delay)
		fmt.Printf("  %8.1f ms  %s%s%s  %s\n", float64(at.Microseconds())/1000, s.dim, strings.Repeat("▪", int(trips*4+0.5)), s.off, what)
	}
	for line := range strings.Lines(string(up)) {
		var ms float64
		i := strings.LastIndex(strings.TrimSuffix(strings.TrimSpace(line), " ms"), " ")
		if i < 0 {
			continue
		}
		if _, err := fmt.Sscanf(line[i+1:], "%f ms", &ms); err == nil {
			row(line[:i], time.Duration(ms*float64(time.Millisecond)))
		}
	}
	at := func(sec float64) time.Duration { return tunnel + time.Duration(sec*float64(time.Second)) }
	row("vpn up returned", tunnel)
	row("curl: TCP to the client's listener", at(connect))
	row("curl: CONNECT with the connection to the proxy, then TLS with the cloud host: two round trips", at(tls))
	row("curl: GET, first byte of the page", at(first))
	fmt.Printf("\n  %sfrom nothing to the first HTTPS byte: %d ms, %.1f round trips%s (each ▪ is a quarter of one; `knock` alone took %d ms)\n",
		s.bold, total.Milliseconds(), float64(at(first))/float64(2*delay), s.off, knocked.Milliseconds())
	if out, err := alice.VPN(s.ctx, "down").CombinedOutput(); err != nil {
		return fmt.Errorf("vpn down: %w: %s", err, out)
	}
	return nil
}
