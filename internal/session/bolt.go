package session

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
)

var (
	bucketSessions = []byte("sessions") // ID → Session, JSON; live ones only
	bucketKeys     = []byte("keys")     // public key → SHA-256 of the certificate's key, and 1 where its session ended; for ever
)

// Bolt is the store of one bastion: a bbolt file holds the truth, an index in memory answers.
type Bolt struct {
	db *bolt.DB

	// change orders everything that changes the set of sessions, and the watchers' calls with it. It is held across the
	// write to disk; readers never take it.
	change   sync.Mutex
	watchers []func(Event)
	// unwritten are sessions that ended here while the disk refused to hear of it. Every later write takes them along,
	// so that they do not come back at the next start.
	unwritten map[ID]Session

	index     sync.RWMutex
	byID      map[ID]Session
	byAddress map[netip.Addr]ID
}

var _ Store = (*Bolt)(nil)

// OpenBolt reads the sessions in db, a state file that identity.OpenState opened. Those expired by now are dropped, with
// no event: nothing of them is left in a process that just began.
func OpenBolt(db *bolt.DB, now time.Time) (*Bolt, error) {
	b := &Bolt{db: db, unwritten: map[ID]Session{}, byID: map[ID]Session{}, byAddress: map[netip.Addr]ID{}}
	err := db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketSessions, bucketKeys} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		var expired []Session
		err := tx.Bucket(bucketSessions).ForEach(func(k, v []byte) error {
			var s Session
			if err := json.Unmarshal(v, &s); err != nil || string(k) != string(s.ID[:]) {
				return fmt.Errorf("state: the record of session %x is damaged: restore a backup", k)
			}
			if !now.Before(s.Expires) {
				expired = append(expired, s)
				return nil
			}
			if other, taken := b.byAddress[s.Address]; taken {
				return fmt.Errorf("state: sessions %v and %v both hold %v: restore a backup", other, s.ID, s.Address)
			}
			b.byID[s.ID], b.byAddress[s.Address] = s, s.ID
			return nil
		})
		if err != nil {
			return err
		}
		for _, s := range expired {
			if err := erase(tx, s); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// Put implements Store. A key that holds a live session now is refused as ErrKeyUsed too: the peer it would add exists.
func (b *Bolt) Put(s Session) error {
	s.Groups = slices.Clone(s.Groups)
	b.change.Lock()
	defer b.change.Unlock()
	if _, exists := b.byID[s.ID]; exists {
		return fmt.Errorf("session %v exists already", s.ID)
	}
	if _, taken := b.byAddress[s.Address]; taken {
		return ErrAddressTaken
	}
	record, err := json.Marshal(s)
	if err != nil {
		return err
	}
	err = b.update(func(tx *bolt.Tx) error {
		keys := tx.Bucket(bucketKeys)
		if bound := keys.Get(s.PublicKey[:]); bound != nil {
			if len(bound) < 32 || [32]byte(bound[:32]) != s.Certificate {
				return ErrKeyBound
			}
			return ErrKeyUsed
		}
		if err := keys.Put(s.PublicKey[:], s.Certificate[:]); err != nil {
			return err
		}
		return tx.Bucket(bucketSessions).Put(s.ID[:], record)
	})
	if err != nil {
		return err
	}
	b.index.Lock()
	b.byID[s.ID], b.byAddress[s.Address] = s, s.ID
	b.index.Unlock()
	b.tell(Event{Session: s})
	return nil
}

// End implements Store.
func (b *Bolt) End(id ID, why Reason) error {
	b.change.Lock()
	defer b.change.Unlock()
	s, ok := b.byID[id]
	if !ok {
		return ErrNotFound
	}
	return b.end([]Session{s}, why)
}

// Expire implements Store.
func (b *Bolt) Expire(now time.Time) (next time.Time) {
	b.change.Lock()
	defer b.change.Unlock()
	var due []Session
	for _, s := range b.byID {
		if !now.Before(s.Expires) {
			due = append(due, s)
		} else if next.IsZero() || s.Expires.Before(next) {
			next = s.Expires
		}
	}
	if len(due) > 0 {
		slices.SortFunc(due, func(x, y Session) int {
			return cmp.Or(x.Expires.Compare(y.Expires), slices.Compare(x.ID[:], y.ID[:]))
		})
		// An expiry that could not be written needs no report: OpenBolt finds it expired again.
		_ = b.end(due, Expired)
	}
	return next
}

// end takes sessions out of the index, tells the watchers, and then writes: a slow or failing disk delays nobody's end.
// The caller holds change.
func (b *Bolt) end(sessions []Session, why Reason) error {
	b.index.Lock()
	for _, s := range sessions {
		delete(b.byID, s.ID)
		delete(b.byAddress, s.Address)
		b.unwritten[s.ID] = s
	}
	b.index.Unlock()
	for _, s := range sessions {
		b.tell(Event{Session: s, Ended: why})
	}
	if err := b.update(func(*bolt.Tx) error { return nil }); err != nil {
		return fmt.Errorf("the session ended, but the state file could not be told: %w", err)
	}
	return nil
}

// update commits fn together with the ends not yet written. The caller holds change.
func (b *Bolt) update(fn func(*bolt.Tx) error) error {
	err := b.db.Update(func(tx *bolt.Tx) error {
		for _, s := range b.unwritten {
			if err := erase(tx, s); err != nil {
				return err
			}
		}
		return fn(tx)
	})
	if err == nil {
		clear(b.unwritten)
	}
	return err
}

func erase(tx *bolt.Tx, s Session) error {
	if err := tx.Bucket(bucketSessions).Delete(s.ID[:]); err != nil {
		return err
	}
	return tx.Bucket(bucketKeys).Put(s.PublicKey[:], append(s.Certificate[:], 1))
}

// Note implements Store. It does not hold change over the write, which would delay an end.
func (b *Bolt) Note(seen map[ID]Seen) error {
	records := make(map[ID][]byte, len(seen))
	b.index.Lock()
	for id, at := range seen {
		s, live := b.byID[id]
		if !live {
			continue
		}
		s.Seen = at
		record, err := json.Marshal(s)
		if err != nil {
			b.index.Unlock()
			return err
		}
		b.byID[id], records[id] = s, record
	}
	b.index.Unlock()
	return b.db.Update(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(bucketSessions)
		for id, record := range records {
			if bucket.Get(id[:]) == nil { // ended since
				continue
			}
			if err := bucket.Put(id[:], record); err != nil {
				return err
			}
		}
		return nil
	})
}

// Get implements Store.
func (b *Bolt) Get(id ID) (Session, bool) {
	b.index.RLock()
	defer b.index.RUnlock()
	s, ok := b.byID[id]
	return s, ok
}

// ByAddress implements Store.
func (b *Bolt) ByAddress(a netip.Addr) (Session, bool) {
	b.index.RLock()
	defer b.index.RUnlock()
	id, ok := b.byAddress[a]
	return b.byID[id], ok
}

// List implements Store, oldest first.
func (b *Bolt) List() []Session {
	b.index.RLock()
	all := make([]Session, 0, len(b.byID))
	for _, s := range b.byID {
		all = append(all, s)
	}
	b.index.RUnlock()
	slices.SortFunc(all, func(x, y Session) int {
		return cmp.Or(x.Created.Compare(y.Created), slices.Compare(x.ID[:], y.ID[:]))
	})
	return all
}

// Watch implements Store.
func (b *Bolt) Watch(fn func(Event)) {
	b.change.Lock()
	defer b.change.Unlock()
	for _, s := range b.List() {
		fn(Event{Session: s})
	}
	b.watchers = append(b.watchers, fn)
}

// tell runs the watchers. The caller holds change and not index, so that a watcher may read.
func (b *Bolt) tell(e Event) {
	for _, fn := range b.watchers {
		fn(e)
	}
}
