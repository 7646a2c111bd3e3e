package identity

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const killedChild = "PERIMETERD_TEST_REVOKE" // where it is set, this program is the child

func TestMain(m *testing.M) {
	if path := os.Getenv(killedChild); path != "" {
		if err := addAndRevoke(path); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	if path := os.Getenv(tracedChild); path != "" {
		if err := revokeSome(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// numbered is an enrolment with a key of its own.
func numbered(n int) Enrolment {
	e := sampleEnrolment(fmt.Sprintf("user%d", n), "mac", 0)
	binary.BigEndian.PutUint64(e.Key[8:], uint64(n)+1)
	return e
}

// addAndRevoke goes on until it is killed, and says what is done when it is done.
func addAndRevoke(path string) error {
	db, err := OpenState(path)
	if err != nil {
		return err
	}
	users := NewUsers(db)
	all, err := users.List()
	if err != nil {
		return err
	}
	for i := len(all); ; i++ {
		name := fmt.Sprintf("user%d", i)
		if _, err := users.Add(numbered(i), time.Now()); err != nil {
			return err
		}
		fmt.Println("added", name)
		if _, err := users.Revoke(name, "", time.Now()); err != nil {
			return err
		}
		fmt.Println("revoked", name)
	}
}

func TestAcknowledgedRevocationOutlivesAKillAtAnyMoment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	done := map[string]string{} // user → the last that was said of him
	const kills = 120
	for range kills {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), killedChild+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		for range rand.IntN(12) { // none: while it opens the file, too
			if !lines.Scan() {
				break
			}
			note(t, done, lines.Text())
		}
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond) // not for the test to hold, but for the kill to come anywhere
		cmd.Process.Kill()
		for lines.Scan() { // what was said before it died
			note(t, done, lines.Text())
		}
		cmd.Wait()
		stop.Stop()
		db, err := OpenState(path)
		if err != nil {
			t.Fatal(err)
		}
		users := NewUsers(db)
		for name, what := range done {
			u, err := users.Get(name)
			if err != nil || what == "revoked" && u.Active() {
				t.Fatalf("%s was %s, and is %+v, %v", name, what, u, err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills, %d users added and nearly all revoked", kills, len(done))
	if len(done) < kills {
		t.Errorf("%d users in %d runs: the kills came too early to prove anything", len(done), kills)
	}
}

func note(t *testing.T, done map[string]string, line string) {
	t.Helper()
	what, name, _ := strings.Cut(line, " ")
	if what != "added" && what != "revoked" {
		t.Fatal(line)
	}
	done[name] = what
}
