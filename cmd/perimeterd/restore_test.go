package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	bolt "go.etcd.io/bbolt"

	"perimeterd/configs"
	"perimeterd/internal/backup"
	"perimeterd/internal/identity"
	"perimeterd/internal/statefile"
)

// bastion makes one below a new directory, with alice.
func bastion(t *testing.T) (dir, config string) {
	t.Helper()
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	dir = filepath.Join(t.TempDir(), "d")
	config = filepath.Join(dir, "perimeterd.toml")
	must(t, "init", "--dir", dir, "--endpoint", "bastion.example.com")
	addUser(t, config, "alice", 1)
	return dir, config
}

func must(t *testing.T, args ...string) {
	t.Helper()
	if err := execute(context.Background(), args); err != nil {
		t.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
}

func onState(t *testing.T, config string, fn func(*identity.Users, *identity.Meta) error) {
	t.Helper()
	c, err := configs.Load(config)
	if err != nil {
		t.Fatal(err)
	}
	db, err := identity.OpenState(c.StateFile())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(fn(identity.NewUsers(db), identity.NewMeta(db)), db.Close()); err != nil {
		t.Fatal(err)
	}
}

func addUser(t *testing.T, config, name string, key byte) {
	t.Helper()
	onState(t, config, func(users *identity.Users, _ *identity.Meta) error {
		_, err := users.Add(identity.Enrolment{Name: name, Device: "mac", Key: identity.KeyHash{key}, NotAfter: time.Now().Add(time.Hour)}, time.Now())
		return err
	})
}

const words = "correct horse"

// pack writes a backup of what is at config, after change, with a key that is quick to derive; and a file with its passphrase.
func pack(t *testing.T, config string, withAudit bool, change func(m *backup.Manifest, content map[string][]byte)) (file, passphrase string) {
	t.Helper()
	c, err := configs.Load(config)
	if err != nil {
		t.Fatal(err)
	}
	s, err := gather(context.Background(), c, withAudit)
	if err != nil {
		t.Fatal(err)
	}
	content := map[string][]byte{}
	for _, e := range s.manifest.Entries {
		if e.Dir {
			continue
		}
		r, err := s.open[e.Name]()
		if err != nil {
			t.Fatal(err)
		}
		if content[e.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	if change != nil {
		change(&s.manifest, content)
	}
	for i, e := range s.manifest.Entries {
		s.manifest.Entries[i].Size = int64(len(content[e.Name]))
	}
	recipient, err := age.NewScryptRecipient(words)
	if err != nil {
		t.Fatal(err)
	}
	recipient.SetWorkFactor(8)
	var b bytes.Buffer
	err = backup.Write(&b, recipient, &s.manifest, func(e backup.Entry) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content[e.Name])), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file, passphrase = filepath.Join(dir, "b"), filepath.Join(dir, "p")
	if err := errors.Join(os.WriteFile(file, b.Bytes(), 0o600), os.WriteFile(passphrase, []byte(words+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return file, passphrase
}

func restore(file, passphrase, dir string, args ...string) error {
	return execute(context.Background(), append([]string{"restore", file, "--passphrase-file", passphrase, "--dir", dir}, args...))
}

func TestRestoreRefusesWhatItCannotVouchForAndWritesNothing(t *testing.T) {
	_, config := bastion(t)
	for name, test := range map[string]struct {
		change func(m *backup.Manifest, content map[string][]byte)
		want   string
	}{
		"a configuration that is not understood": {func(_ *backup.Manifest, content map[string][]byte) {
			content[backup.ConfigFile] = append(content[backup.ConfigFile], "\n[newer]\nkey = 1\n"...)
		}, "is not understood by this one"},
		"a state of a newer program": {func(_ *backup.Manifest, content map[string][]byte) {
			content[backup.StateFile] = newerState(t)
		}, "schema 3 was written by a newer perimeterd"},
		"a damaged state": {func(_ *backup.Manifest, content map[string][]byte) {
			i := bytes.Index(content[backup.StateFile], []byte("alice"))
			content[backup.StateFile][i] ^= 1
		}, "the state in "},
		"a state cut short": {func(_ *backup.Manifest, content map[string][]byte) {
			content[backup.StateFile] = content[backup.StateFile][:8192]
		}, "it is cut short"},
		"a lost key": {func(m *backup.Manifest, _ map[string][]byte) {
			m.Entries = slices.DeleteFunc(m.Entries, func(e backup.Entry) bool { return e.Name == "config/pki/gate.key" })
		}, "it lacks identity.key, config/pki/gate.key"},
		"a file that nothing names": {func(m *backup.Manifest, content map[string][]byte) {
			m.Entries, content["config/evil"] = append(m.Entries, backup.Entry{Name: "config/evil"}), []byte("evil")
		}, "it holds config/evil, which its configuration does not name"},
		"a directory that nothing names": {func(m *backup.Manifest, _ map[string][]byte) {
			m.Entries = append(m.Entries, backup.Entry{Name: "config/state", Dir: true})
		}, "it holds config/state, which its configuration does not name"},
	} {
		t.Run(name, func(t *testing.T) {
			file, passphrase := pack(t, config, false, test.change)
			target := filepath.Join(t.TempDir(), "target")
			err := restore(file, passphrase, target)
			if err == nil || !strings.HasPrefix(err.Error(), "nothing was restored: ") || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s was made", target)
			}
		})
	}
}

func newerState(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	db, err := statefile.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *statefile.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("schema"), []byte("3")) })
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// A restore that fails half way leaves what was there.
func TestRestoreThatFailsLeavesWhatWasHere(t *testing.T) {
	dir, config := bastion(t)
	file, passphrase := pack(t, config, false, nil)
	addUser(t, config, "bob", 2)
	// The name that what is in the way gets is taken, where the state lies, which comes after configuration and keys.
	for i := range 600 {
		taken := "replaced-" + time.Now().Add(time.Duration(i)*time.Second).UTC().Format("20060102T150405Z")
		if err := os.Mkdir(filepath.Join(dir, "state", taken), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	before := files(t, dir)
	if err := restore(file, passphrase, dir, "--force"); err == nil || !strings.HasPrefix(err.Error(), "nothing was restored: mkdir ") {
		t.Errorf("%v", err)
	}
	if got := files(t, dir); got != before {
		t.Errorf("it left\n%s\nof\n%s", got, before)
	}
}

// files are all below a directory, with a hash.
func files(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			fmt.Fprintln(&b, path)
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(&b, "%s %x\n", path, sha256.Sum256(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestStateOfAnotherBastionIsMovedAsideAndNothingOfItKept(t *testing.T) {
	_, config := bastion(t)
	file, passphrase := pack(t, config, false, nil)
	other, otherConfig := bastion(t)
	onState(t, otherConfig, func(users *identity.Users, _ *identity.Meta) error {
		_, err := users.Revoke("alice", "", time.Now()) // the same name, another person
		return err
	})
	if err := restore(file, passphrase, other); err == nil || !strings.Contains(err.Error(), "what is here is another bastion, with keys of its own") {
		t.Errorf("%v", err)
	}
	if err := restore(file, passphrase, other, "--force"); err != nil {
		t.Fatal(err)
	}
	onState(t, otherConfig, func(users *identity.Users, _ *identity.Meta) error {
		if u, err := users.Get("alice"); err != nil || !u.Active() {
			t.Errorf("%+v %v", u, err)
		}
		return nil
	})
}

func TestRestoreOverADamagedStateSaysWhatIsLost(t *testing.T) {
	dir, config := bastion(t)
	file, passphrase := pack(t, config, false, nil)
	state := filepath.Join(dir, "state", "state.db")
	if err := os.Truncate(state, 5000); err != nil {
		t.Fatal(err)
	}
	if err := restore(file, passphrase, dir); err == nil || !strings.Contains(err.Error(), "the state here cannot be read, so revocations made since the backup will be lost: "+state+": it is cut short") {
		t.Errorf("%v", err)
	}
	if err := restore(file, passphrase, dir, "--force"); err != nil {
		t.Fatal(err)
	}
	onState(t, config, func(users *identity.Users, _ *identity.Meta) error {
		_, err := users.Get("alice")
		return err
	})
}

// An older state in a backup is brought up on its way in; one that was never made is made.
func TestRestoreOfAnOlderStateAndOfNone(t *testing.T) {
	_, config := bastion(t)
	for name, change := range map[string]func(*backup.Manifest, map[string][]byte){
		"none": func(m *backup.Manifest, _ map[string][]byte) {
			m.Entries = slices.DeleteFunc(m.Entries, func(e backup.Entry) bool { return e.Name == backup.StateFile || e.Name == "state" })
		},
		"as it is": nil,
		"schema 1": func(m *backup.Manifest, content map[string][]byte) {
			m.Schema, content[backup.StateFile] = 1, olderState(t, content[backup.StateFile])
		},
	} {
		file, passphrase := pack(t, config, false, change)
		target := filepath.Join(t.TempDir(), "target")
		if err := restore(file, passphrase, target); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		onState(t, filepath.Join(target, "perimeterd.toml"), func(users *identity.Users, meta *identity.Meta) error {
			all, err := users.List()
			if want := map[string]int{"none": 0, "as it is": 1, "schema 1": 1}[name]; len(all) != want {
				t.Errorf("%s: %d users, want %d", name, len(all), want)
			}
			if step, err := meta.TokenStep(); err != nil || step == 0 {
				t.Errorf("%s: token step %d, %v", name, step, err)
			}
			return err
		})
	}
}

// olderState has the records of a state as perimeterd had them before there was a seal.
func olderState(t *testing.T, state []byte) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := statefile.Check(bytes.NewReader(state), int64(len(state)), func(bucket string, k, v []byte) error {
			b, err := tx.CreateBucketIfNotExists([]byte(bucket))
			if err != nil {
				return err
			}
			if string(k) == "schema" {
				v = []byte("1")
			}
			return b.Put(bytes.Clone(k), bytes.Clone(v))
		})
		return err
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestUnconfirmedConfigurationStaysSoElsewhere(t *testing.T) {
	dir, config := bastion(t)
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	onState(t, config, func(_ *identity.Users, meta *identity.Meta) error {
		return meta.SetUnconfirmed(&identity.Unconfirmed{File: sha256.Sum256(text), Good: append([]byte("# good\n"), text...)})
	})
	file, passphrase := pack(t, config, false, nil)
	target := filepath.Join(t.TempDir(), "target")
	if err := restore(file, passphrase, target); err != nil {
		t.Fatal(err)
	}
	moved := filepath.Join(target, "perimeterd.toml")
	c, err := configs.Load(moved)
	if err != nil {
		t.Fatal(err)
	}
	onState(t, moved, func(_ *identity.Users, meta *identity.Meta) error {
		u, err := meta.Unconfirmed()
		if err != nil || u == nil || u.File != sha256.Sum256(c.Text) || !bytes.Contains(u.Good, []byte("# good\n")) || bytes.Contains(u.Good, []byte(dir)) {
			t.Errorf("%+v %v", u, err)
		}
		return nil
	})
}

func TestAuditComesAlongWhenAskedFor(t *testing.T) {
	dir, config := bastion(t)
	audit := filepath.Join(dir, "state", "audit")
	must(t, "user", "revoke", "alice", "--config", config) // the first record
	before := files(t, audit)
	file, passphrase := pack(t, config, true, nil)
	target := filepath.Join(t.TempDir(), "target")
	if err := restore(file, passphrase, target); err != nil {
		t.Fatal(err)
	}
	after := strings.ReplaceAll(files(t, filepath.Join(target, "state", "audit")), target, dir)
	for line := range strings.Lines(before) {
		if !strings.Contains(after, strings.Fields(line)[0]) {
			t.Errorf("%s is missing", line)
		}
	}
	must(t, "audit", "verify", "--config", filepath.Join(target, "perimeterd.toml")) // the restore is in it
}
