package quota

import (
	"testing"
	"time"
)

func TestEachHasHisShareAndWhatIsLeftOutIsTold(t *testing.T) {
	q, at := New[string](time.Second, 3), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := range 10 {
		if _, ok := q.Take("mallory", at); ok != (i < 3) {
			t.Fatalf("%d: %v", i, ok)
		}
	}
	if before, ok := q.Take("alice", at); !ok || before != (Left{}) {
		t.Errorf("another's: %v %v", before, ok)
	}
	if before, ok := q.Take("mallory", at.Add(time.Second)); !ok || before != (Left{7, at}) {
		t.Errorf("%+v %v", before, ok)
	}
	q.Take("mallory", at.Add(time.Second))
	if all := q.Untold(at.Add(time.Minute)); len(all) != 1 || all["mallory"] != (Left{1, at.Add(time.Second)}) {
		t.Errorf("%+v", all)
	}
	if all := q.Untold(at.Add(time.Minute)); len(all) != 0 || len(q.shares) != 0 {
		t.Errorf("told twice %+v, or kept %d", all, len(q.shares))
	}
}

func TestFewAreKeptHoweverManyThereAre(t *testing.T) {
	q, at := New[int](time.Second, 3), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	written := 0
	for who := range 10 * most {
		if _, ok := q.Take(who+1, at); ok {
			written++
		}
	}
	if len(q.shares) > most+1 || written != most+3 {
		t.Errorf("%d kept, %d written", len(q.shares), written)
	}
	if _, ok := q.Take(5*most, at.Add(time.Minute)); !ok || len(q.shares) > 2 {
		t.Errorf("%v, %d kept after a minute", ok, len(q.shares))
	}
}
