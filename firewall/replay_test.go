package firewall

import (
	"errors"
	"testing"
	"time"

	"perimeterd/knock"
)

// A token that was spent must not open again, whatever became of the table in between. Each case has its counterpart, in
// which what the door remembers is forgotten, as an earlier draft did: there the replay opens.
func TestSpentTokenStaysSpent(t *testing.T) {
	const length = 30 * time.Second
	now := time.Now()
	user := users(1)
	load := func(s *siege, fresh bool, store StepStore) {
		s.t.Helper()
		tokens, err := NewTokens(s.fw, fresh, knock.ServerID{7}, length, store, testLog(s.t))
		if err == nil {
			err = errors.Join(tokens.Set(user, now), tokens.Refresh(now))
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	apply := func(s *siege) (fresh bool) {
		s.t.Helper()
		fresh, err := s.fw.Apply(s.cfg)
		if err != nil {
			s.t.Fatal(err)
		}
		return fresh
	}
	// restart is another daemon on what this one left.
	restart := func(s *siege) {
		s.t.Helper()
		s.fw.mu.Lock()
		s.fw.dropLocked()
		s.fw.mu.Unlock()
		s.fw = New(testLog(s.t), s.netns)
		s.fw.plain = true
	}
	forget := func(s *siege) { s.nft("flush set inet perimeterd spent") }

	for _, test := range []struct {
		name    string
		between func(s *siege, store *steps, earlier bool)
	}{
		{"the table is applied again", func(s *siege, store *steps, earlier bool) {
			if apply(s); earlier { // an apply that deletes the table and makes it anew
				forget(s)
			}
			load(s, false, store)
		}},
		{"the daemon is restarted", func(s *siege, store *steps, earlier bool) {
			restart(s)
			if apply(s); earlier {
				forget(s)
			}
			load(s, false, store)
		}},
		{"the table is lost with the daemon", func(s *siege, store *steps, earlier bool) {
			restart(s)
			s.nft("delete table inet perimeterd")
			if !apply(s) {
				s.t.Error("a new table is not told as such")
			}
			if earlier { // nobody wrote down which steps were ever loaded
				store = &steps{}
			}
			load(s, true, store)
		}},
		{"the table is lost with the daemon, and made anew before the next one", func(s *siege, store *steps, earlier bool) {
			restart(s)
			s.nft("delete table inet perimeterd")
			if there, err := s.fw.Exists(); there || err != nil {
				s.t.Errorf("the table is there: %v %v", there, err)
			}
			if !earlier { // without it the next daemon takes the table for its own
				if err := CloseSteps(store); err != nil {
					s.t.Fatal(err)
				}
			}
			apply(s)
			restart(s)
			load(s, apply(s), store)
		}},
		{"another tool made the table, and ours is lost with the daemon", func(s *siege, store *steps, earlier bool) {
			restart(s)
			s.nft("delete table inet perimeterd\nadd table inet perimeterd")
			load(s, apply(s) && !earlier, store) // taken for the one that was there before
		}},
	} {
		for _, earlier := range []bool{false, true} {
			name := test.name
			if earlier {
				name += ", on an earlier draft"
			}
			t.Run(name, func(t *testing.T) {
				s := besiege(t, example())
				store := &steps{}
				load(s, true, store)
				token := knock.NewToken(user[0].Secret, knock.ServerID{7}, knock.StepAt(now, length), 2)
				s.knock(guest(2), token)
				if !s.accepted(guest(2)) {
					t.Fatal("the token did not open")
				}
				test.between(s, store, earlier)
				s.knock(guest(3), token)
				if got := s.accepted(guest(3)); got != earlier {
					t.Errorf("the replay opened: %v", got)
				}
			})
		}
	}
}
