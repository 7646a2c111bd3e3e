package client_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"filippo.io/age/armor"
	"github.com/pelletier/go-toml/v2"

	"perimeterd/vpn/client"
	"perimeterd/vpn/client/clienttest"
)

func profileText(t testing.TB, change func(*client.Profile)) []byte {
	t.Helper()
	g, err := clienttest.NewGate()
	if err != nil {
		t.Fatal(err)
	}
	p, err := g.Profile("alice", "bastion.example.com:1194", 1194, time.Hour, "7102", "19044/udp", "33127")
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(p)
	}
	text, err := toml.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestProfileRefusesWhatCannotWork(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*client.Profile)
		want   string
	}{
		{"newer version", func(p *client.Profile) { p.Version = 2 }, "version = 2: this client reads version 1"},
		{"user that is a path", func(p *client.Profile) { p.User = "../../etc/passwd" }, `user = "../../etc/passwd"`},
		{"user that is an option", func(p *client.Profile) { p.User = "-rf" }, `user = "-rf"`},
		{"device with a slash", func(p *client.Profile) { p.Device = "a/b" }, `device = "a/b"`},
		{"no endpoint", func(p *client.Profile) { p.Endpoints = nil }, "endpoints: 0 of them"},
		{"endpoint without port", func(p *client.Profile) { p.Endpoints = []string{"bastion"} }, `"bastion": want HOST:PORT`},
		{"endpoint with port 0", func(p *client.Profile) { p.Endpoints = []string{"bastion:0"} }, "want HOST:PORT"},
		{"no tunnel port", func(p *client.Profile) { p.TunnelPort = 0 }, "tunnel_port = 0"},
		{"short server id", func(p *client.Profile) { p.ServerID = "abcd" }, `server_id = "abcd"`},
		{"server id in capitals", func(p *client.Profile) { p.ServerID = strings.Repeat("AB", 16) }, "lower case"},
		{"bad server key", func(p *client.Profile) { p.ServerPublicKey = "AAAA" }, "server_public_key: want 32 bytes"},
		{"short secret", func(p *client.Profile) { p.KnockSecret = "c2VjcmV0" }, "knock_secret: want 32 bytes"},
		{"no step", func(p *client.Profile) { p.KnockStep = "" }, `knock_step = ""`},
		{"step too short", func(p *client.Profile) { p.KnockStep = "1s" }, `knock_step = "1s"`},
		{"endless window", func(p *client.Profile) { p.KnockWindow = "48h" }, `knock_window = "48h"`},
		{"window of no time", func(p *client.Profile) { p.KnockWindow = "sixty" }, `knock_window = "sixty"`},
		{"port of a wrong protocol", func(p *client.Profile) { p.Sequence = []string{"1/icmp"} }, "sequence: "},
		{"egress that is no CIDR", func(p *client.Profile) { p.Egress = []string{"203.0.113.10"} }, `egress = "203.0.113.10"`},
		{"no CA", func(p *client.Profile) { p.CA = "" }, "ca: no certificate"},
		{"key of another certificate", func(p *client.Profile) {
			g, _ := clienttest.NewGate()
			o, _ := g.Profile("bob", "b:1", 1, time.Hour)
			p.Key = o.Key
		}, "certificate and key: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := client.ParseProfile(profileText(t, c.change))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q in it", err, c.want)
			}
			if strings.Contains(err.Error(), "c2VjcmV0") {
				t.Error("the error shows the secret")
			}
		})
	}
}

func TestKnockWindowIsAMinuteWhereTheProfileDoesNotSay(t *testing.T) {
	for said, want := range map[string]time.Duration{"": time.Minute, "90s": 90 * time.Second} {
		p, err := client.ParseProfile(profileText(t, func(p *client.Profile) { p.KnockWindow = said }))
		if err != nil || p.Window() != want {
			t.Errorf("knock_window %q: %v, want %v", said, err, want)
		}
	}
}

func TestCutProfileIsSaidToBeCut(t *testing.T) {
	text := profileText(t, nil)
	for n := range len(text) - 2 { // without the last quotes' ends at least
		_, err := client.ParseProfile(text[:n])
		if err == nil || !strings.Contains(err.Error(), "line ") || !strings.Contains(err.Error(), "truncated or not a profile: ask the operator for it again") ||
			strings.Contains(err.Error(), "client.") {
			t.Fatalf("cut at %d of %d, after %q: %v", n, len(text), text[max(0, n-20):n], err)
		}
	}
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	src := filepath.Join(t.TempDir(), "sent")
	locked := encrypted(t, text, "x", 10, true)
	for _, n := range []int{40, 200, len(locked) / 2, len(locked) - 40} {
		os.WriteFile(src, locked[:n], 0o600)
		_, _, err := client.Import(src, func() ([]byte, error) { return []byte("x"), nil }, false)
		if err == nil || !strings.Contains(err.Error(), "truncated or not a profile: ask the operator for it again") {
			t.Errorf("an encrypted one cut at %d of %d: %v", n, len(locked), err)
		}
	}
}

func TestUnknownProfileKeyIsAnErrorThatShowsNoSecret(t *testing.T) {
	text := append([]byte("colour = 'blue'\n"), profileText(t, nil)...)
	_, err := client.ParseProfile(text)
	if err == nil || !strings.Contains(err.Error(), "colour (line 1)") || strings.Contains(err.Error(), "blue") {
		t.Fatalf("error %v", err)
	}
}

func TestProfileThatOthersCanReadIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "alice.profile")
	text := profileText(t, nil)
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o400: true, 0o640: false, 0o604: false, 0o660: false, 0o602: false} {
		if err := errors.Join(os.WriteFile(file, text, 0o600), os.Chmod(file, mode)); err != nil {
			t.Fatal(err)
		}
		_, err := client.LoadProfile(file)
		if ok != (err == nil) {
			t.Errorf("mode %v: error %v", mode, err)
		}
		if !ok && !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("mode %v: error %v does not say what to do", mode, err)
		}
		os.Remove(file)
	}
}

func never() ([]byte, error) { return nil, errors.New("asked for a passphrase") }

func TestImportKeepsAProfilePrivatelyAndReplacesNoOther(t *testing.T) {
	config := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", config)
	src := filepath.Join(t.TempDir(), "sent")
	text := profileText(t, func(p *client.Profile) { p.Device = "laptop" })
	if err := os.WriteFile(src, text, 0o644); err != nil {
		t.Fatal(err)
	}
	p, kept, err := client.Import(src, never, false)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(config, "perimeter", "alice-laptop.profile"); kept != want {
		t.Errorf("kept in %s, want %s", kept, want)
	}
	for path, want := range map[string]os.FileMode{kept: 0o600, filepath.Dir(kept): 0o700} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v", path, st.Mode(), err)
		}
	}
	if _, err := client.LoadProfile(""); err != nil {
		t.Errorf("the only profile is not the default: %v", err)
	}
	if _, _, err := client.Import(src, never, false); err != nil {
		t.Errorf("the same again: %v", err)
	}
	other := profileText(t, func(p *client.Profile) { p.Device = "laptop" })
	os.WriteFile(src, other, 0o600)
	if _, _, err := client.Import(src, never, false); !errors.Is(err, client.ErrExists) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("another of the same name: %v", err)
	}
	if now, _ := os.ReadFile(kept); !bytes.Equal(now, text) {
		t.Error("the refused import changed the kept profile")
	}
	if _, _, err := client.Import(src, never, true); err != nil {
		t.Errorf("with force: %v", err)
	}
	if now, _ := client.LoadProfile("alice-laptop"); now == nil || now.Certificate == p.Certificate {
		t.Error("with force the old one is still there")
	}
}

func TestTwoProfilesNeedAChoice(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	if _, err := client.LoadProfile(""); err == nil || !strings.Contains(err.Error(), "vpn import") {
		t.Errorf("with none: %v", err)
	}
	src := filepath.Join(t.TempDir(), "sent")
	for _, user := range []string{"alice", "bob"} {
		os.WriteFile(src, profileText(t, func(p *client.Profile) { p.User = user }), 0o600)
		if _, _, err := client.Import(src, never, false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.LoadProfile(""); err == nil || !strings.Contains(err.Error(), "vpn use NAME (alice, bob)") {
		t.Errorf("with two: %v", err)
	}
	if err := client.Use("carol"); err == nil {
		t.Error("a profile that is not there became the default")
	}
	if err := client.Use("bob"); err != nil {
		t.Fatal(err)
	}
	if p, err := client.LoadProfile(""); err != nil || p.User != "bob" {
		t.Errorf("default: %v, %v", p, err)
	}
}

func encrypted(t *testing.T, text []byte, passphrase string, work int, armored bool) []byte {
	t.Helper()
	r, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	r.SetWorkFactor(work)
	var out bytes.Buffer
	if !armored {
		w, err := age.Encrypt(&out, r)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(text)
		w.Close()
		return out.Bytes()
	}
	a := armor.NewWriter(&out)
	w, err := age.Encrypt(a, r)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(text)
	if err := errors.Join(w.Close(), a.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestImportOpensAPassphrase(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	src := filepath.Join(t.TempDir(), "sent")
	text := profileText(t, nil)
	say := func(s string) func() ([]byte, error) { return func() ([]byte, error) { return []byte(s), nil } }
	for _, armored := range []bool{true, false} {
		os.WriteFile(src, encrypted(t, text, "correct horse", 10, armored), 0o600)
		if _, err := client.LoadProfile(src); err == nil && armored || err != nil && !strings.Contains(err.Error(), "vpn import") {
			t.Errorf("used without import: %v", err)
		}
		if _, _, err := client.Import(src, say("wrong"), false); err == nil || !strings.Contains(err.Error(), "wrong passphrase") {
			t.Errorf("wrong passphrase: %v", err)
		}
		if _, _, err := client.Import(src, never, false); err == nil || !strings.Contains(err.Error(), "asked for a passphrase") {
			t.Errorf("no passphrase: %v", err)
		}
		_, kept, err := client.Import(src, say("correct horse"), false)
		if err != nil {
			t.Fatal(err)
		}
		if now, _ := os.ReadFile(kept); !bytes.Equal(now, text) {
			t.Error("what is kept is not what was sent")
		}
	}
}

func TestImportDoesNotWorkForHours(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	src := filepath.Join(t.TempDir(), "sent")
	text := encrypted(t, profileText(t, nil), "x", 10, false)
	// The work factor stands in the header: "-> scrypt SALT 10". A forged one is refused before the work begins.
	os.WriteFile(src, bytes.Replace(text, []byte(" 10\n"), []byte(" 30\n"), 1), 0o600)
	start := time.Now()
	_, _, err := client.Import(src, func() ([]byte, error) { return []byte("x"), nil }, false)
	if err == nil || time.Since(start) > time.Second {
		t.Errorf("error %v after %v", err, time.Since(start))
	}
}

func TestOversizedProfileIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "big.profile")
	os.WriteFile(file, append(profileText(t, nil), bytes.Repeat([]byte("#\n"), 40<<10)...), 0o600)
	if _, err := client.LoadProfile(file); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("error %v", err)
	}
}

func FuzzParseProfile(f *testing.F) {
	text := profileText(f, nil)
	f.Add(text)
	f.Add(bytes.Replace(text, []byte("alice"), []byte("../x"), 1))
	f.Add([]byte("version = 1\nuser = 'a'\nendpoints = ['a:1']\ncolour = 1\n"))
	f.Add([]byte("endpoints = 1"))
	f.Add([]byte("= = ="))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := client.ParseProfile(text)
		if err != nil {
			return
		}
		if strings.ContainsAny(p.Name(), "/\\\x00") || strings.HasPrefix(p.Name(), ".") {
			t.Errorf("name %q is no file's", p.Name())
		}
		again, err := toml.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.ParseProfile(again); err != nil {
			t.Errorf("what was accepted is refused when written again: %v", err)
		}
	})
}
