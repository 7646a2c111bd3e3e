//go:build linux

// Command overtake knocks 1,000 times cold and 1,000 times warm over a link whose receiving end spreads flows over two
// queues, and counts what overtook its token. Cold is our client's own dialing: a token, and connects that race it. Warm is a
// token and WireGuard's handshake behind it from the same socket, each time from another address. `make bench-knock` runs it as
// root; it takes about a minute and fails if a knock was lost.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"perimeterd/internal/lab"
	"perimeterd/internal/lab/roster"
	"perimeterd/vpn/client"
)

func main() {
	knocks := flag.Int("knocks", 1000, "how many of each kind")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := error(nil)
	if task := os.Getenv(taskVariable); task != "" {
		err = knocker(ctx, task)
	} else {
		err = overtake(ctx, *knocks)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "overtake:", err)
		os.Exit(1)
	}
}

// taskVariable holds the task of the process in the client's namespace.
const taskVariable = "LAB_OVERTAKE"

// task is what that process does.
type task struct {
	Profile string // of a user with a certificate, in TOML
	Secrets [][]byte
	Knocks  int
	To      netip.Addr
}

// counts are what it found.
type counts struct {
	Cold, Warm, Bare kind
}

// kind is what became of one kind of knock.
type kind struct {
	Answered int             // within a second
	Took     []time.Duration // of those
}

func overtake(ctx context.Context, knocks int) (err error) {
	if knocks < 1 || knocks > 5000 {
		return fmt.Errorf("-knocks %d: want 1 to 5000", knocks)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	daemon, err := l.NewDaemon(ctx)
	if err != nil {
		return err
	}
	all, err := roster.New(daemon, max(knocks/2, 10)) // eight tokens a user in two steps, of which three knocks take one each
	if err != nil {
		return err
	}
	file, err := daemon.AddUser(ctx, "alice")
	if err != nil {
		return err
	}
	if err := daemon.Start(ctx); err != nil {
		return err
	}
	if _, err := l.Crowd(ctx, l.Bastion); err != nil {
		return err
	}
	queues, err := twoQueues(ctx, l)
	if err != nil {
		return err
	}
	profile, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	t := task{Profile: string(profile), Knocks: knocks, To: l.Bastion.Addr}
	for _, c := range all.Credentials {
		t.Secrets = append(t.Secrets, c.Secret)
	}
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	given := filepath.Join(l.Dir, "task")
	if err := os.WriteFile(given, text, 0o600); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	load, _ := os.ReadFile("/proc/loadavg")
	start := time.Now()
	c := l.Client.Command(ctx, self)
	c.Env = append(os.Environ(), taskVariable+"="+given, "XDG_CONFIG_HOME="+filepath.Join(l.Dir, "knocker"))
	out, err := c.Output()
	if err != nil {
		return err
	}
	var n counts
	if err := json.Unmarshal(out, &n); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	fmt.Printf("%d knocks of each kind in %v; %s; load %s before\n", knocks, time.Since(start).Round(time.Second), queues, strings.Fields(string(load))[0])
	fmt.Printf("  one SYN right behind the token   %s\n", n.Bare.line(knocks))
	fmt.Printf("  cold, as our client knocks       %s\n", n.Cold.line(knocks))
	fmt.Printf("  warm, token and handshake        %s\n", n.Warm.line(knocks))
	if n.Cold.Answered < knocks || n.Warm.Answered < knocks {
		return errors.New("a knock of our client's was lost")
	}
	return nil
}

func (k kind) line(of int) string {
	if len(k.Took) == 0 {
		return fmt.Sprintf("%d of %d answered", k.Answered, of)
	}
	slices.Sort(k.Took)
	at := func(p float64) time.Duration {
		return k.Took[int(p*float64(len(k.Took)-1))].Round(10 * time.Microsecond)
	}
	late := len(k.Took) - sort.Search(len(k.Took), func(i int) bool { return k.Took[i] > 30*time.Millisecond })
	return fmt.Sprintf("%d of %d answered, %d lost, %d after more than 30 ms; median %v, 99 %% within %v, longest %v", k.Answered, of, of-k.Answered, late, at(0.5), at(0.99), at(1))
}

// twoQueues has the kernel spread what the bastion receives over the backlogs of two CPUs, by flow.
func twoQueues(ctx context.Context, l *lab.Lab) (string, error) {
	out, err := l.Bastion.Command(ctx, "sh", "-ec", "for q in /sys/class/net/outside/queues/rx-*/rps_cpus; do echo 3 > $q; cat $q; done").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("rps_cpus: %w: %s", err, out)
	}
	return "rps_cpus of the bastion's interface: " + strings.Join(strings.Fields(string(out)), ", "), nil
}

// profileOf is the profile with another user's secret, and no sequence: what opens is a token.
func profileOf(text string, n int, secret []byte) (*client.Profile, error) {
	var p client.Profile
	if err := toml.Unmarshal([]byte(text), &p); err != nil {
		return nil, err
	}
	p.User, p.KnockSecret, p.Sequence = fmt.Sprintf("user%05d", n), base64Of(secret), nil
	changed, err := toml.Marshal(p)
	if err != nil {
		return nil, err
	}
	return client.ParseProfile(changed)
}
