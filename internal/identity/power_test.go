package identity

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

const tracedChild = "PERIMETERD_TEST_TRACED" // where it is set, this program is the child that strace watches

// revokeSome adds and revokes users, and says so in a file beside the state's.
func revokeSome(path string) error {
	acks, err := os.Create(path + ".acks")
	if err != nil {
		return err
	}
	db, err := OpenState(path)
	if err != nil {
		return err
	}
	users := NewUsers(db)
	for i := range 40 {
		e := numbered(i)
		e.Groups = []string{strings.Repeat("g", 60), strings.Repeat("h", 60)} // several pages soon
		if _, err := users.Add(e, time.Now()); err != nil {
			return err
		}
		if _, err := users.Revoke(e.Name, "", time.Now()); err != nil {
			return err
		}
		if _, err := acks.WriteString(e.Name + "\n"); err != nil {
			return err
		}
	}
	return db.Close()
}

// step is one of what the child did: a write, a change of size, a sync, or a word that a revocation is done.
type step struct {
	data []byte
	at   int64
	size int64 // -1: none
	sync bool
	ack  string
}

var traced = regexp.MustCompile(`^\d+ +(pwrite64|write|ftruncate|fdatasync|fsync)\(\d+<([^>]*)>(?:, "([^"]*)")?(?:, (\d+))?(?:, (\d+))?\) += \d+$`)

func trace(t *testing.T, path string) (steps []step) {
	t.Helper()
	log := path + ".trace"
	cmd := exec.Command("strace", "-f", "-y", "-xx", "-s", "1000000", "-e", "signal=none", "-e", "trace=pwrite64,write,ftruncate,fdatasync,fsync",
		"-P", path, "-P", path+".acks", "-o", log, os.Args[0])
	cmd.Env = append(os.Environ(), tracedChild+"="+path)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("strace: %v: install it\n%s", err, out)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 8<<20)
	for lines.Scan() {
		line := lines.Text()
		m := traced.FindStringSubmatch(line)
		if m == nil {
			if !strings.Contains(line, " +++ exited with 0 +++") {
				t.Fatalf("strace says %.200s", line)
			}
			continue
		}
		data, err := hex.DecodeString(strings.ReplaceAll(m[3], `\x`, ""))
		if err != nil {
			t.Fatal(err)
		}
		s := step{size: -1}
		switch m[1] {
		case "write":
			s.ack = strings.TrimSpace(string(data))
		case "pwrite64":
			s.data = data
			s.at, err = strconv.ParseInt(m[5], 10, 64)
		case "ftruncate":
			s.size, err = strconv.ParseInt(m[4], 10, 64)
		default:
			s.sync = true
		}
		if err != nil {
			t.Fatalf("%.200s: %v", line, err)
		}
		steps = append(steps, s)
	}
	return steps
}

// disk is what has reached it for good, and what may have.
type disk struct {
	sure  []byte
	maybe []step
}

func (d *disk) do(s step) {
	if s.sync {
		for _, m := range d.maybe {
			d.sure = m.apply(d.sure, func() bool { return true })
		}
		d.maybe = nil
	} else if s.ack == "" {
		d.maybe = append(d.maybe, s)
	}
}

const sector = 512

// apply does of a step what reached tells, sector by sector: a disk writes one whole or not at all.
func (s step) apply(image []byte, reached func() bool) []byte {
	if s.size >= 0 {
		if int64(len(image)) < s.size && reached() {
			image = append(image, make([]byte, s.size-int64(len(image)))...)
		}
		return image
	}
	for off := 0; off < len(s.data); off += sector {
		if !reached() {
			continue
		}
		piece := s.data[off:min(off+sector, len(s.data))]
		if need := int(s.at) + off + len(piece); need > len(image) {
			image = append(image, make([]byte, need-len(image))...)
		}
		copy(image[int(s.at)+off:], piece)
	}
	return image
}

// crash is the disk after the power was cut.
func (d *disk) crash(r *rand.Rand) []byte {
	image := bytes.Clone(d.sure)
	often := r.Float64()
	for _, m := range d.maybe {
		image = m.apply(image, func() bool { return r.Float64() < often })
	}
	return image
}

// What the program wrote, in what order and with which syncs between, is taken from the system calls it made. Cut off anywhere,
// with any part of what was not synced on the disk, every revocation that was acknowledged is there.
func TestAcknowledgedRevocationOutlivesAPowerCutAtAnyMoment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	openState(t, path).Close()
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	steps := trace(t, path)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	d := &disk{sure: before}
	var acks []string
	cut := filepath.Join(t.TempDir(), "cut.db")
	cuts := 0
	for i, s := range steps {
		d.do(s)
		if s.ack != "" {
			acks = append(acks, s.ack)
		}
		for range 2 {
			if err := os.WriteFile(cut, d.crash(r), 0o600); err != nil {
				t.Fatal(err)
			}
			cuts++
			db, err := OpenState(cut)
			if err != nil {
				t.Fatalf("seed %d, cut after step %d of %d: %v", seed, i, len(steps), err)
			}
			users := NewUsers(db)
			for _, name := range acks {
				if u, err := users.Get(name); err != nil || u.Active() {
					t.Fatalf("seed %d, cut after step %d of %d: %s was revoked, and is %+v, %v", seed, i, len(steps), name, u, err)
				}
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	after, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(after, d.sure) {
		t.Fatalf("the file that came of it is another one, %d and %d bytes, %v: this test proves nothing", len(after), len(d.sure), err)
	}
	if len(acks) != 40 {
		t.Fatalf("%d revocations were acknowledged", len(acks))
	}
	t.Logf("%d cuts in %d steps, %d revocations", cuts, len(steps), len(acks))
}
