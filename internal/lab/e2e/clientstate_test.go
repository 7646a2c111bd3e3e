package e2e

import (
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"perimeterd/internal/lab"
)

// The directory of profiles is full, read-only or somebody else's: what cannot be done is said, nothing is left half done, and once
// there is room all is well.
func TestStateThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.Options{})
	bin, err := lab.Bin("vpn")
	if err != nil {
		t.Fatal(err)
	}
	knock, err := lab.Bin("knock")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.alice.Home, ".config", "perimeter")
	const full = `head -c 1000000 /dev/zero > $D/fill 2>/dev/null`
	for _, tt := range []struct {
		name   string
		script string // in mounts of its own: $D is on a file system of 16 KiB, with the profile in it; $S is the profile as it was sent
		want   string // of the output, as a whole
	}{
		{"up on a full disk", full + `; $VPN up; echo status $?; rm $D/fill; $VPN up && $VPN down`,
			`(?s)vpn: .*no space left on device: make room there\nstatus 1\n.*tunnel up .*tunnel down\n$`},
		{"knock on a full disk", full + `; $KNOCK -v; echo status $?`, `(?s)no token knock \(token state: .*no space left on device: make room there\) .*\nsequence knocked .*open, 60 s .*status 0\n$`},
		{"import on a full disk", `rm $D/*; ` + full + `; $VPN import $S; echo status $?; ls -A $D; rm $D/fill; $VPN import $S`,
			`(?s)^vpn: .*alice.profile is not written: .*no space left on device: make room there\nstatus 1\nfill\nprofile alice kept .*$`},
		{"enroll on a full disk", full + `; $VPN enroll bob --out $D/bob.csr; echo status $?; ls -A $D; rm $D/fill; $VPN enroll bob --out $D/bob.csr`,
			`(?s)^vpn: .*bob.key is not written: .*no space left on device: make room there\nstatus 1\nalice.profile\nfill\nThe key .*$`},
		{"doctor on a full disk", full + `; $VPN doctor`, `(?s)^problem  state: .*no space left on device: make room there\nok       network.*certificate of alice\n.*environment`},
		{"read-only", `mount -o remount,ro $D; $VPN status; echo status $?; $VPN up; echo status $?; $KNOCK; echo status $?; $VPN import $S; echo status $?`,
			`(?s)^profile +alice\ntunnel +down\n.*status 1\n.*vpn: .*read-only file system: make it writable for you, or set XDG_CONFIG_HOME to a directory that is\nstatus 1\n` +
				`open, 60 s .*\nstatus 0\nprofile alice kept in .*\nstatus 0\n$`},
		{"read-only, and nothing in it", `rm $D/*; mount -o remount,ro $D; $VPN import $S; echo status $?`,
			`^vpn: .*alice.profile is not written: .*read-only file system: make it writable for you, or set XDG_CONFIG_HOME to a directory that is\nstatus 1\n$`},
		{"somebody else's", `O=$S.others; mkdir -p $O/perimeter; cp $S $O/alice.profile; chown 65534 $O/alice.profile; export XDG_CONFIG_HOME=$O XDG_RUNTIME_DIR=; ` +
			`setpriv --reuid 65534 --regid 65534 --clear-groups $VPN down --profile $O/alice.profile; echo status $?`,
			`^vpn: .*: make it writable for you, or set XDG_CONFIG_HOME to a directory that is\nstatus 1\n$`},
		{"no home", `unset HOME XDG_CONFIG_HOME; $VPN up; echo status $?`, `^vpn: no place for profiles: .*XDG_CONFIG_HOME.*HOME.*: set one of them\nstatus 1\n$`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := s.alice.Command(s.ctx, "unshare", "-m", "sh", "-c", `
				mount -t tmpfs -o size=16k,mode=700 none $D && cp $S $D/alice.profile || exit 99
				`+tt.script)
			c.Env = append(c.Env, "D="+dir, "S="+filepath.Join(s.Dir, "alice.profile"), "VPN="+bin, "KNOCK="+knock)
			out, _ := c.CombinedOutput()
			said := regexp.MustCompile(`(?m)^warning: .*\n|^.* is not needed any more.*\n`).ReplaceAllString(string(out), "")
			if !regexp.MustCompile(tt.want).MatchString(said) {
				t.Errorf("want %s, it says\n%s", tt.want, out)
			} else {
				t.Logf("\n%s", out)
			}
			if links := s.ok(s.Client.Command(s.ctx, "ip", "-br", "link")); strings.Contains(links, "pvpn") {
				t.Errorf("left behind:\n%s", links)
			}
		})
	}
}

// Two at once, and then five, are content with one tunnel.
func TestSeveralUpAtOnceShareOneTunnel(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.Options{})
	for _, n := range []int{2, 5} {
		var all sync.WaitGroup
		for range n {
			all.Go(func() {
				if out, err := s.alice.VPN(s.ctx, "up").CombinedOutput(); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
		all.Wait()
		if got := strings.Count(s.perimeterd("sessions"), "alice"); got != 1 {
			t.Errorf("%d at once made %d sessions", n, got)
		}
		if got := strings.Count(s.ok(s.Client.Command(s.ctx, "ip", "-br", "link")), "pvpn"); got != 1 {
			t.Errorf("%d at once made %d interfaces", n, got)
		}
		s.ok(s.alice.VPN(s.ctx, "down"))
	}
	// One comes while the other goes.
	s.ok(s.alice.VPN(s.ctx, "up"))
	down := s.alice.VPN(s.ctx, "down")
	if err := down.Start(); err != nil {
		t.Fatal(err)
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	if err := down.Wait(); err != nil {
		t.Error(err)
	}
	s.ok(s.alice.VPN(s.ctx, "down"))
}

// A session that the operator takes back while the client still connects, again and again: it gets another, or says why not.
func TestSessionTakenBackWhileConnecting(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.Options{Delay: 25 * time.Millisecond})
	up := s.alice.VPN(s.ctx, "up", "--timeout", "30s")
	done := make(chan error, 1)
	go func() { _, err := up.CombinedOutput(); done <- err }()
	kicked := 0
	for kicked < 3 {
		if _, err := s.daemon.Await(s.ctx, "session began", kicked+1); err != nil {
			t.Fatal(err)
		}
		s.daemon.Perimeterd(s.ctx, "kick", "alice")
		kicked++
		// What finds out that it is gone is data.
		go s.curl("--max-time", "5", "https://"+cloudName+"/").Run()
	}
	if err := <-done; err != nil {
		t.Errorf("vpn up: %v", err)
	}
	s.patiently("data after the kicks", func() bool {
		out, _ := s.curl("--max-time", "5", "https://"+cloudName+"/").CombinedOutput()
		return strings.Contains(string(out), "seen from")
	})
	s.ok(s.alice.VPN(s.ctx, "down"))
}

// The request is openssl's, in each form in which it writes keys: the profile comes back without one, and is joined here.
func TestProfileForARequestOfOpenSSL(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.Options{})
	in := func(u *lab.User, name string, args ...string) *lab.Cmd {
		c := u.Command(s.ctx, name, args...)
		c.Dir = u.Home
		return c
	}
	for name, make := range map[string]string{
		"pkcs8":  `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k.key -subj "/CN=$N" -out k.csr`,
		"sec1":   `openssl ecparam -name prime256v1 -genkey -out k.key && openssl req -new -key k.key -subj "/CN=$N" -out k.csr`,
		"rsa":    `openssl genrsa -traditional -out k.key 2048 && openssl req -new -key k.key -subj "/CN=$N" -out k.csr`,
		"ed":     `openssl req -new -newkey ed25519 -nodes -keyout k.key -subj "/CN=$N" -outform DER -out k.csr`,
		"locked": `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -passout pass:x -keyout k.key -subj "/CN=$N" -out k.csr`,
	} {
		u, err := s.NewHome(s.Client, name)
		if err != nil {
			t.Fatal(err)
		}
		sh := in(u, "sh", "-ec", "umask 077; "+make)
		sh.Env = append(sh.Env, "N="+name)
		s.ok(sh)
		profile := filepath.Join(u.Home, "sent.profile")
		s.perimeterd("user", "add", name, "--request", filepath.Join(u.Home, "k.csr"), "--out", profile)
		vpn := func(args ...string) *lab.Cmd { c := u.VPN(s.ctx, args...); c.Dir = u.Home; return c }
		if out := s.fails(vpn("import", "sent.profile")); !strings.Contains(out, "vpn import --key FILE") {
			t.Error(out)
		}
		if name == "locked" {
			if out := s.fails(vpn("import", "sent.profile", "--key", "k.key")); !strings.Contains(out, "key k.key: protected by a passphrase: write it without one: openssl pkey -in OLD -out NEW") {
				t.Error(out)
			}
			s.ok(in(u, "sh", "-ec", "umask 077; openssl pkey -passin pass:x -in k.key -out open.key && mv open.key k.key"))
		}
		s.ok(in(u, "chmod", "644", "k.key"))
		if out := s.fails(vpn("import", "sent.profile", "--key", "k.key")); !strings.Contains(out, "run: chmod 600 'k.key'") {
			t.Error(out)
		}
		s.ok(in(u, "chmod", "600", "k.key"))
		if out := s.fails(vpn("import", "sent.profile", "--key", "k.csr")); name != "ed" && !strings.Contains(out, `no private key in it, but a "CERTIFICATE REQUEST"`) && !strings.Contains(out, "chmod 600") {
			t.Error(out)
		}
		t.Log(s.ok(vpn("import", "sent.profile", "--key", "k.key")))
		if left, _ := filepath.Glob(filepath.Join(u.Home, ".config", "perimeter", "*.key")); len(left) > 0 {
			t.Errorf("%s: the key is in the profile now, and still in %v", name, left)
		}
		s.ok(vpn("up"))
		s.ok(vpn("down"))
	}
	// And one that `vpn enroll` made, twice.
	dave, err := s.NewHome(s.Client, "dave")
	if err != nil {
		t.Fatal(err)
	}
	vpn := func(args ...string) *lab.Cmd { c := dave.VPN(s.ctx, args...); c.Dir = dave.Home; return c }
	first, second := s.ok(vpn("enroll", "dave")), s.ok(vpn("enroll", "dave"))
	key := regexp.MustCompile(`key [0-9a-f]{64}`)
	if key.FindString(first) == "" || key.FindString(first) != key.FindString(second) {
		t.Errorf("a second enroll is of another key:\n%s%s", first, second)
	}
	profile := filepath.Join(dave.Home, "dave.profile")
	s.perimeterd("user", "add", "dave", "--request", filepath.Join(dave.Home, "dave.csr"), "--out", profile)
	s.ok(vpn("import", "dave.profile"))
	s.ok(vpn("import", "dave.profile"))
	s.ok(vpn("up"))
	s.ok(vpn("down"))
	if third := s.ok(vpn("enroll", "dave", "--out", "next.csr")); key.FindString(third) == key.FindString(first) {
		t.Error("after the import, enroll makes a new key")
	}
}
