package proxy

import (
	"fmt"
	"reflect"
	"testing"
	"time"
)

func TestObservedCountsWhatWouldBeRefused(t *testing.T) {
	var o Observed
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	see := func(user, name string, d Decision) {
		at = at.Add(time.Second)
		o.Access(Access{Began: at, User: user, Destination: Destination{Name: name, Port: 443}, Decision: d})
	}
	noRule := Decision{Allow: true, Observed: true, Reason: NoRule}
	see("alice", "b.example", noRule)
	see("alice", "a.example", noRule)
	see("bob", "a.example", noRule)
	see("alice", "a.example", noRule)
	see("alice", "a.example", Decision{Allow: true, Observed: true, Reason: DeniedByRule, Rule: 3})
	see("alice", "c.example", Decision{Allow: true, Reason: Allowed})
	see("alice", "d.example", Decision{Reason: Metadata})
	want := []Observation{
		{"a.example:443", NoRule, 0, 3, []string{"alice", "bob"}, at.Add(-3 * time.Second)},
		{"a.example:443", DeniedByRule, 3, 1, []string{"alice"}, at.Add(-2 * time.Second)},
	}
	if got := o.Most(2); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	if n := len(o.Most(10)); n != 3 {
		t.Errorf("%d in all", n)
	}
	for i := range 3 * observedMost {
		see(fmt.Sprint("user", i), fmt.Sprintf("n%d.example", i), noRule)
	}
	all := o.Most(1 << 20)
	if rest := all[0]; len(all) != observedMost+1 || rest.Destination != "" || rest.Requests != 2*observedMost+3 || len(rest.Users) != observedUsers {
		t.Errorf("%d, the first %+v", len(all), rest)
	}
}
