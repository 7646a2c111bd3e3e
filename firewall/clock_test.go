package firewall

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"perimeterd/knock"
)

// clockRoom is a token loader on a real table, whose clocks a test sets.
type clockRoom struct {
	t      *testing.T
	fw     *Firewall
	store  *steps
	tokens *Tokens
	boot   time.Duration
	list   []knock.Credential
}

const testStep = 30 * time.Second

func newClockRoom(t *testing.T) *clockRoom {
	t.Helper()
	r := &clockRoom{t: t, fw: New(testLog(t), private(t)), store: &steps{}, boot: time.Hour, list: users(3)}
	if _, err := r.fw.Apply(example()); err != nil {
		t.Fatal(err)
	}
	r.start(true)
	return r
}

// start is a start of the daemon.
func (r *clockRoom) start(fresh bool) {
	r.t.Helper()
	var err error
	if r.tokens, err = NewTokens(r.fw, fresh, knock.ServerID{}, testStep, r.store, testLog(r.t)); err != nil {
		r.t.Fatal(err)
	}
	r.tokens.boot = func() time.Duration { return r.boot }
	if err := r.tokens.Set(r.list, time.Now()); err != nil {
		r.t.Fatal(err)
	}
}

// refresh loads what is due in a step that is so old.
func (r *clockRoom) refresh(step int64, age time.Duration) {
	r.t.Helper()
	if err := r.tokens.Refresh(knock.Start(step, testStep).Add(age)); err != nil {
		r.t.Fatal(err)
	}
}

// has tells which of these steps the kernel has the first user's tokens of, and the longest life of any.
func (r *clockRoom) has(steps ...int64) (found []int64, life time.Duration) {
	r.t.Helper()
	r.fw.mu.Lock()
	defer r.fw.mu.Unlock()
	elements, err := r.fw.elementsLocked("tokens")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, step := range steps {
		token := knock.NewToken(r.list[0].Secret, knock.ServerID{}, step, 0)
		for _, e := range elements {
			if bytes.Equal(e.Key, token[:]) {
				found = append(found, step)
				life = max(life, e.Expires)
			}
		}
	}
	return found, life
}

func (r *clockRoom) want(what string, steps []int64, among ...int64) {
	r.t.Helper()
	if got, _ := r.has(among...); !slices.Equal(got, steps) {
		r.t.Errorf("%s: tokens of steps %v are loaded, want %v", what, got, steps)
	}
}

func TestClockThatRanAheadForAMomentStopsNoLaterKnock(t *testing.T) {
	r := newClockRoom(t)
	now := knock.StepAt(time.Now(), testStep)
	far := now + 1_000_000
	r.refresh(now, 20*time.Second)
	r.refresh(far, 0)
	for _, restart := range []bool{false, true} {
		if restart {
			r.start(false)
		}
		r.boot += time.Second
		r.refresh(now, 29*time.Second)
		r.want("the clock is right again", []int64{now - 1, now, now + 1, now + 2}, now-1, now, now+1, now+2)
	}
	r.boot += testStep
	r.refresh(now+1, 29*time.Second)
	r.want("a step later", []int64{now + 3}, now+3)
	// When that time comes, what was loaded then stays closed, and the next step is open.
	r.boot += time.Hour
	if err := r.fw.FlushTokens(); err != nil {
		t.Fatal(err)
	}
	r.refresh(far, 0)
	r.want("the far time is there", nil, far-1, far, far+1, far+2)
	r.refresh(far+1, 0)
	r.want("a step later", []int64{far + 3}, far-1, far, far+1, far+2, far+3)
}

// A token that was spent is remembered for three minutes by the kernel's own clock. With the daemon down for longer and the
// clock set back as much, it must not come in again.
func TestClockSetBackWhileTheDaemonWasDownOpensNothingAgain(t *testing.T) {
	r := newClockRoom(t)
	now := knock.StepAt(time.Now(), testStep)
	r.refresh(now, 0)
	r.boot += 100 * time.Second
	r.start(false)
	r.refresh(now, 0)
	r.want("down for less", []int64{now - 1, now, now + 1, now + 2}, now-1, now, now+1, now+2)
	if _, life := r.has(now + 1); life > spentTimeout-100*time.Second {
		t.Errorf("a token lives for %v more, longer than the kernel remembers that it was spent", life)
	}
	r.boot += 100 * time.Second
	r.start(false)
	r.refresh(now, 0)
	r.want("down for more", nil, now-1, now, now+1, now+2)
	r.refresh(now+1, 0)
	r.want("the next step", []int64{now + 3}, now-1, now, now+1, now+2, now+3)
	// After a reboot the clock of the boot begins anew.
	r.boot = time.Minute
	r.start(false)
	r.refresh(now+1, 0)
	r.want("after a reboot", nil, now-1, now, now+1, now+2, now+3)
}

func TestClockSetBackWhileItRunsOpensNothingAgain(t *testing.T) {
	r := newClockRoom(t)
	now := knock.StepAt(time.Now(), testStep)
	for i := range int64(10) {
		r.refresh(now+i, 0)
		r.boot += testStep
	}
	if err := r.fw.FlushTokens(); err != nil {
		t.Fatal(err)
	}
	for _, back := range []int64{9, 7, 5} { // minutes or more
		r.refresh(now+10-back, 0)
	}
	among := []int64{}
	for i := int64(-1); i < 8; i++ {
		among = append(among, now+i)
	}
	r.want("the clock was set back", nil, among...)
	// A repair writes what is remembered, and no more.
	if err := r.tokens.Reload(false, knock.Start(now+2, testStep)); err != nil {
		t.Fatal(err)
	}
	r.want("a repair with the clock set back", nil, among...)
	// And after one that lost openings, nothing that was there.
	r.refresh(now+10, 0)
	if err := errors.Join(r.fw.FlushTokens(), r.tokens.Reload(true, knock.Start(now+10, testStep))); err != nil {
		t.Fatal(err)
	}
	r.want("a repair that lost openings", nil, now+9, now+10, now+11, now+12)
	r.refresh(now+11, 0)
	r.want("and a step later", []int64{now + 13}, now+10, now+11, now+12, now+13)
}

func TestStepsBarredFromOutsideStayOut(t *testing.T) {
	r := newClockRoom(t)
	now := knock.StepAt(time.Now(), testStep)
	r.store.floor = uint64(now + 1)
	r.start(true)
	r.refresh(now, 29*time.Second)
	r.want("another state was put in place", []int64{now + 2}, now-1, now, now+1, now+2)
}

// The history never forgets a step, whatever order they come in.
func TestHistoryKnowsEveryStepThatWasAdded(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var h stepHistory
		added := map[int64]bool{}
		for i := range 200 {
			step := random.Int64N(50)
			if random.IntN(4) == 0 {
				step += random.Int64N(40) * 100
			}
			h = h.with(step, time.Duration(i))
			added[step] = true
			for s := range added {
				if !h.has(s) {
					t.Fatalf("step %d was added and is not in %v", s, h.Ranges)
				}
			}
		}
		if len(h.Ranges) > maxRanges || len(h.Recent) > maxRecent {
			t.Fatalf("%d ranges, %d recent", len(h.Ranges), len(h.Recent))
		}
		for i, r := range h.Ranges {
			if r[0] > r[1] || i > 0 && h.Ranges[i-1][1]+1 >= r[0] {
				t.Fatalf("ranges %v", h.Ranges)
			}
		}
	}
}
