//go:build linux

package container

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"perimeterd/internal/lab/swarm"
	"perimeterd/vpn"
	"perimeterd/vpn/client"
)

// some transfers are enough where it is not their number that counts.
const some = 50

// transfers are n slow ones of alice's, a third of them uploads, all of which move.
func (i *installation) transfers(n int) (all []*swarm.Transfer) {
	i.t.Helper()
	var mu sync.Mutex
	var errs []error
	var opening sync.WaitGroup
	slots := make(chan struct{}, 16)
	for k := range n {
		slots <- struct{}{}
		opening.Go(func() {
			defer func() { <-slots }()
			conn, err := i.through()
			mu.Lock()
			defer mu.Unlock()
			if errs = append(errs, err); err == nil {
				all = append(all, swarm.NewTransfer(i.ctx, conn, i.source(), k%3 == 0, int64(100+k%8*50)<<10, i.rate))
			}
		})
	}
	opening.Wait()
	i.t.Cleanup(func() {
		for _, t := range all {
			t.Close()
		}
	})
	if err := errors.Join(errs...); err != nil {
		i.t.Fatal(err)
	}
	i.eventually("every transfer moves", func() error {
		if k := slices.IndexFunc(all, func(t *swarm.Transfer) bool { return t.Moved() == 0 }); k >= 0 {
			return fmt.Errorf("transfer %d does not", k)
		}
		return nil
	})
	return all
}

func (i *installation) source() swarm.Source {
	return swarm.Source{Proxy: netip.MustParseAddrPort("10.77.0.1:3128"), Host: cloudName, CAs: i.cloud.CAs}
}

// through is a new connection through tunnel and proxy.
func (i *installation) through() (*tls.Conn, error) {
	c, err := i.Client.Dial(i.ctx, "tcp", i.source().Proxy.String())
	if err != nil {
		return nil, err
	}
	return swarm.Connect(i.ctx, c, i.source())
}

// running is how many have not ended.
func running(all []*swarm.Transfer) (n int) {
	for _, t := range all {
		select {
		case <-t.Done:
		default:
			n++
		}
	}
	return n
}

// whole waits for the ends of transfers that nothing may have cut.
func (i *installation) whole(all []*swarm.Transfer) {
	i.t.Helper()
	cut, bytes, began := 0, int64(0), time.Now()
	for _, t := range all {
		t.Hurry()
	}
	for k, t := range all {
		<-t.Done
		if bytes += t.Moved(); t.Err() != nil {
			cut++
			i.t.Errorf("transfer %d after %d bytes: %v", k, t.Moved(), t.Err())
		}
	}
	i.t.Logf("%d transfers, %d MiB, %d cut; the rest took %v", len(all), bytes>>20, cut, time.Since(began).Round(time.Millisecond))
}

// reset waits for the ends of transfers, each of which must be told that it was cut.
func (i *installation) reset(all []*swarm.Transfer) {
	i.t.Helper()
	for k, t := range all {
		select {
		case <-t.Done:
			if !errors.Is(t.Err(), syscall.ECONNRESET) && !errors.Is(t.Err(), syscall.EPIPE) {
				i.t.Errorf("transfer %d after %d bytes: %v, want a reset", k, t.Moved(), t.Err())
			}
		case <-time.After(time.Minute):
			i.t.Fatalf("transfer %d after %d bytes goes on, want a reset", k, t.Moved())
		}
	}
}

// journal has what the service has said since the cursor that an earlier call returned.
func (i *installation) journal(since string) (text, cursor string) {
	i.t.Helper()
	args := []string{"--unit=perimeterd.service", "--output=cat", "--no-pager", "--show-cursor"}
	if since != "" {
		args = append(args, "--after-cursor="+since)
	}
	text, cursor, _ = strings.Cut(i.ok("journalctl", args...), "-- cursor: ")
	return text, strings.TrimSpace(cursor)
}

// stored is how many descriptors systemd keeps for the service.
func (i *installation) stored() string { i.t.Helper(); return i.show("NFileDescriptorStore") }

// another waits for a daemon that is not of this process, and whom systemd calls ready.
func (i *installation) another(pid string) {
	i.t.Helper()
	i.eventually("another daemon runs", func() error {
		if now := i.show("MainPID"); now == pid || now == "0" || i.show("ActiveState") != "active" {
			return fmt.Errorf("main process %s, was %s, %s", now, pid, i.show("ActiveState"))
		}
		return nil
	})
}

// resumes says that alice is where she was, without a command of hers.
func (i *installation) resumes(session string) {
	i.t.Helper()
	i.fetch()
	if now := i.session(); now != session {
		i.t.Errorf("session %s, was %s", now, session)
	}
}

// taken are the times that the log's lines about a handover tell.
var taken = regexp.MustCompile(`"msg":"proxied connections (?:handed|taken) over".*`)

// upgrade is under $TRANSFERS.
func (i *installation) upgrade() {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("TRANSFERS"), "100"))
	if err != nil {
		i.t.Fatal(err)
	}
	session, pid, stored, all := i.session(), i.show("MainPID"), i.stored(), i.transfers(n)
	_, cursor := i.journal("")
	began := time.Now()
	said := i.apt(append([]string{"install"}, i.debs(newer)...)...)
	took := time.Since(began)
	n = running(all)
	if strings.Contains(said, "Next:") {
		i.t.Errorf("an upgrade is no first time:\n%s", said)
	}
	if i.show("MainPID") == pid || i.show("ActiveState") != "active" {
		i.t.Errorf("main process %s, was %s, %s", i.show("MainPID"), pid, i.show("ActiveState"))
	}
	if now := i.stored(); now != stored || n < len(all)/2 {
		i.t.Errorf("%s descriptors are kept, were %s; %d transfers of %d still move", now, stored, n, len(all))
	}
	i.want(i.ok("perimeterd", "status"), newer)
	i.whole(all)
	i.resumes(session)
	text, _ := i.journal(cursor)
	i.t.Logf("apt took %v, under %d transfers; %s", took.Round(time.Millisecond), n, strings.Join(taken.FindAllString(text, -1), " "))
	i.want(text, `"reset":0`)
	handed := 0 // those that ended since are not in n
	if at := strings.Index(text, `"connections":`); at >= 0 {
		fmt.Sscanf(text[at:], `"connections":%d,"reset":0`, &handed)
	}
	if handed < n {
		i.t.Errorf("%d were handed over, and %d still moved", handed, n)
	}
	i.want(text, fmt.Sprintf(`"connections":%d,"refused":0`, handed))
	i.ok("perimeterd", "user", "add", "bob") // the signer answers
}

// restless asks again and again until ctx ends. It says how often it passed, and, at the end, what it met.
func (i *installation) restless(ctx context.Context, all *sync.WaitGroup, what string, ask func() error) (passed *atomic.Int64, report func()) {
	passed = new(atomic.Int64)
	var longest time.Duration
	var failed []error
	n, refused := 0, 0
	all.Go(func() {
		for ctx.Err() == nil {
			began := time.Now()
			err := ask()
			longest = max(longest, time.Since(began))
			if n++; err == nil {
				passed.Add(1)
			} else if failed = append(failed, err); errors.Is(err, syscall.ECONNREFUSED) {
				refused++
			}
		}
	})
	return passed, func() {
		i.t.Helper()
		i.t.Logf("%s: %d, %d refused, %d failed, the longest took %v", what, n, refused, len(failed), longest.Round(time.Millisecond))
		if len(failed) > 0 {
			i.t.Errorf("%s: %v", what, errors.Join(failed[:min(len(failed), 5)]...))
		}
	}
}

// atGate asks the gate as alice, on a new connection.
func (i *installation) atGate() (ask func() error) {
	i.t.Helper()
	p, err := client.ParseProfile([]byte(i.ok("cat", "alice.profile")))
	if err != nil {
		i.t.Fatal(err)
	}
	pair, err := tls.X509KeyPair([]byte(p.Certificate), []byte(p.Key))
	if err != nil {
		i.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(p.CA))
	web := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{ServerName: p.ServerID, RootCAs: roots, Certificates: []tls.Certificate{pair}},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return i.Client.Dial(ctx, network, address)
		},
	}}
	return func() error {
		answer, err := web.Get("https://" + p.Endpoints[0] + vpn.SessionPath)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		b, err := io.ReadAll(answer.Body)
		if err == nil && answer.StatusCode != http.StatusOK {
			err = fmt.Errorf("the gate says %s: %s", answer.Status, b)
		}
		return err
	}
}

func (i *installation) restarts() {
	const restarts = 20
	session, stored := i.session(), i.stored()
	if out, err := i.alice.Knock(i.ctx).CombinedOutput(); err != nil {
		i.t.Fatalf("knock: %v\n%s", err, out)
	}
	ctx, cancel := context.WithCancel(i.ctx)
	var clients sync.WaitGroup
	defer func() { cancel(); clients.Wait() }()
	var reports []func()
	var passing []*atomic.Int64
	for what, ask := range map[string]func() error{
		"new connections through the proxy": func() error {
			conn, err := i.through()
			if err != nil {
				return err
			}
			defer conn.Close()
			if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", cloudName); err != nil {
				return err
			}
			b, err := io.ReadAll(conn)
			if err == nil && !strings.Contains(string(b), "seen from 198.19.1.") {
				err = fmt.Errorf("the answer is %q", b)
			}
			return err
		},
		"requests at the gate": i.atGate(),
	} {
		passed, report := i.restless(ctx, &clients, what, ask)
		passing, reports = append(passing, passed), append(reports, report)
	}
	var took []time.Duration
	for range restarts {
		if out, err := i.alice.Knock(i.ctx).CombinedOutput(); err != nil { // the window of the one before may end
			i.t.Fatalf("knock: %v\n%s", err, out)
		}
		began := time.Now()
		i.ok("systemctl", "restart", "perimeterd.service")
		took = append(took, time.Since(began))
		for _, passed := range passing {
			before := passed.Load()
			i.eventually("requests pass again", func() error {
				if passed.Load() < before+2 {
					return errors.New("none does")
				}
				return nil
			})
		}
	}
	cancel()
	clients.Wait()
	for _, report := range reports {
		report()
	}
	slices.Sort(took)
	memory := i.ok("grep", "-E", "^VmRSS", "/proc/"+i.show("MainPID")+"/status")
	i.t.Logf("%d restarts, each %v to %v, the median %v; then %s", restarts, took[0].Round(time.Millisecond), took[restarts-1].Round(time.Millisecond),
		took[restarts/2].Round(time.Millisecond), strings.Join(strings.Fields(memory), " "))
	if now := i.stored(); now != stored {
		i.t.Errorf("%s descriptors are kept, were %s", now, stored)
	}
	i.resumes(session)
}

// reload takes up what changed, leaves what is wrong, and drops nothing.
func (i *installation) reload() {
	const file = "/etc/perimeterd/perimeterd.toml"
	pid, all := i.show("MainPID"), i.transfers(some)
	change := func(sed, says string) {
		i.t.Helper()
		_, cursor := i.journal("")
		i.ok("sed", "-i", sed, file)
		i.ok("systemctl", "reload", "perimeterd.service")
		i.eventually("the daemon says "+says, func() error { // systemctl waits for the signal alone
			if text, _ := i.journal(cursor); !strings.Contains(text, says) {
				return errors.New(text)
			}
			return nil
		})
	}
	change("s|^per_user_connections = .*|per_user_connections = 1|", "configuration reloaded")
	if c, err := i.through(); err == nil {
		c.Close()
		i.t.Error("a connection more than the new configuration has")
	}
	change("1i nonsense = 1", "configuration not taken up: the old one goes on")
	change("1d; s|^per_user_connections = .*|per_user_connections = 2000|", "configuration reloaded")
	i.fetch()
	if now := i.show("MainPID"); now != pid || i.show("ActiveState") != "active" {
		i.t.Errorf("main process %s, was %s, %s", now, pid, i.show("ActiveState"))
	}
	i.whole(all)
}

// frozen is a daemon that hangs: the watchdog ends it. Meanwhile the door stays as it is.
func (i *installation) frozen() {
	session, pid, stored, all := i.session(), i.show("MainPID"), i.stored(), i.transfers(some)
	began := time.Now()
	i.ok("systemctl", "kill", "--kill-who=main", "--signal=STOP", "perimeterd.service")
	i.want(i.ok("nft", "list", "table", "inet", "perimeterd"), "chain gate")
	i.another(pid)
	i.t.Logf("frozen, and ready again after %v", time.Since(began).Round(100*time.Millisecond))
	i.reset(all)
	i.resumes(session)
	i.want(i.ok("journalctl", "--unit=perimeterd.service", "--output=cat", "--no-pager"), "Watchdog timeout")
	if now := i.stored(); now != stored {
		i.t.Errorf("%s descriptors are kept, were %s", now, stored)
	}
}

// crash is a bug that ends the daemon with the status of Go's runtime, which is the one of a wrong configuration too.
func (i *installation) crash() {
	session, pid, all := i.session(), i.show("MainPID"), i.transfers(some)
	i.ok("systemctl", "kill", "--kill-who=main", "--signal=QUIT", "perimeterd.service")
	i.another(pid)
	i.reset(all)
	i.resumes(session)
}

// stopped is for good: what was kept is given up, and both sides of every connection are told.
func (i *installation) stopped() {
	session, all, before := i.session(), i.transfers(some), len(i.cloud.Requests())
	i.ok("systemctl", "stop", "perimeterd.service")
	i.eventually("nothing is kept", func() error {
		if n := i.stored(); n != "0" {
			return fmt.Errorf("%s descriptors are", n)
		}
		return nil
	})
	i.eventually("the cloud's side ends", func() error {
		for _, r := range i.cloud.Requests()[max(before-len(all), 0):] {
			if !r.Done {
				return fmt.Errorf("%s %s goes on", r.Method, r.URI)
			}
		}
		return nil
	})
	i.ok("systemctl", "start", "perimeterd.service")
	i.reset(all)
	i.resumes(session)
}
