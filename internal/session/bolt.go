package session

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perimeterd/internal/statefile"
)

var (
	bucketSessions  = []byte("sessions")  // ID → record, JSON; live ones only
	bucketKeys      = []byte("keys")      // public key → SHA-256 of the certificate's key, and the Unix time at which its session ended
	bucketAddresses = []byte("addresses") // address → who had it last; of those that are live now, who had it before
)

// record is a session as the file has it.
type record struct {
	Session
	// Ends is when its life is over by CLOCK_BOOTTIME. Across a reboot, which sets that clock to zero, it is later than the
	// truth and never earlier; so it is of use only where the wall clock was set back.
	Ends time.Duration
}

// lastHolder is what the file has of an address.
type lastHolder struct {
	User, Device string
	Since        time.Duration // CLOCK_BOOTTIME
}

// Bolt is the store of one bastion: a bbolt file holds the truth, an index in memory answers.
type Bolt struct {
	db *statefile.DB
	// now is the time of OpenBolt's caller, and goes on from there as no one can set it.
	now func() time.Time

	// change orders everything that changes the set of sessions, and the watchers' calls with it. It is held across the
	// write to disk; readers, and Note, never take it.
	change   sync.Mutex
	watchers []func(Event)
	// unwritten are sessions that ended here while the disk refused to hear of it, and when. Every later write takes them
	// along, so that they do not come back at the next start.
	unwritten map[ID]ended

	index     sync.RWMutex
	byID      map[ID]record
	byAddress map[netip.Addr]ID
	byOwner   map[[32]byte]map[ID]struct{}

	sweep keySweep
}

type ended struct {
	Session
	at   time.Time
	boot time.Duration
}

var _ Store = (*Bolt)(nil)

// sinceBoot is CLOCK_BOOTTIME, which nobody sets (clock_gettime(2)).
func sinceBoot() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // fails for a clock that is not there only
	return time.Duration(t.Nano())
}

// OpenBolt reads the sessions in db, a state file that identity.OpenState opened. Those expired by now are dropped, with
// no event: nothing of them is left in a process that just began.
func OpenBolt(db *statefile.DB, now time.Time) (*Bolt, error) {
	opened := time.Now()
	b := &Bolt{db: db, now: func() time.Time { return now.Add(time.Since(opened)) },
		unwritten: map[ID]ended{}, byID: map[ID]record{}, byAddress: map[netip.Addr]ID{}, byOwner: map[[32]byte]map[ID]struct{}{}}
	boot := sinceBoot()
	err := db.Update(func(tx *statefile.Tx) error {
		for _, name := range [][]byte{bucketSessions, bucketKeys, bucketAddresses} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		var expired []Session
		err := tx.Bucket(bucketSessions).ForEach(func(k, v []byte) error {
			var r record
			if err := json.Unmarshal(v, &r); err != nil || string(k) != string(r.ID[:]) {
				return fmt.Errorf("state: the record of session %x is damaged: restore a backup", k)
			}
			if most := boot + r.Expires.Sub(r.Created); r.Ends == 0 || r.Ends > most {
				r.Ends = most
			}
			if !now.Before(r.Expires) || boot >= r.Ends {
				expired = append(expired, r.Session)
				return nil
			}
			if other, taken := b.byAddress[r.Address]; taken {
				return fmt.Errorf("state: sessions %v and %v both hold %v: restore a backup", other, r.ID, r.Address)
			}
			b.insert(r)
			return nil
		})
		if err != nil {
			return err
		}
		for _, s := range expired {
			if err := erase(tx, ended{s, now, boot}); err != nil {
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

// insert adds to the index. The caller holds index, or is alone.
func (b *Bolt) insert(r record) {
	b.byID[r.ID], b.byAddress[r.Address] = r, r.ID
	of := b.byOwner[r.Certificate]
	if of == nil {
		of = map[ID]struct{}{}
		b.byOwner[r.Certificate] = of
	}
	of[r.ID] = struct{}{}
}

// Put implements Store. A key that holds a live session now is refused as ErrKeyUsed too: the peer it would add exists.
func (b *Bolt) Put(s Session) error {
	s.Groups = slices.Clone(s.Groups)
	b.change.Lock()
	defer b.change.Unlock()
	if _, exists := b.Get(s.ID); exists {
		return fmt.Errorf("session %v exists already", s.ID)
	}
	if _, taken := b.ByAddress(s.Address); taken {
		return ErrAddressTaken
	}
	r := record{s, sinceBoot() + s.Expires.Sub(s.Created)}
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	err = b.update(func(tx *statefile.Tx) error {
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
		return tx.Bucket(bucketSessions).Put(s.ID[:], text)
	})
	if err != nil {
		return err
	}
	b.index.Lock()
	b.insert(r)
	b.index.Unlock()
	b.tell(Event{Session: s})
	return nil
}

// End implements Store.
func (b *Bolt) End(id ID, why Reason) error {
	b.change.Lock()
	defer b.change.Unlock()
	s, ok := b.Get(id)
	if !ok {
		return ErrNotFound
	}
	return b.end([]Session{s}, why)
}

// Expire implements Store.
func (b *Bolt) Expire(now time.Time) (next time.Time) {
	b.sweepKeys(now)
	b.change.Lock()
	defer b.change.Unlock()
	boot := sinceBoot()
	var due []Session
	b.index.RLock()
	for _, s := range b.byID {
		if !now.Before(s.Expires) || boot >= s.Ends {
			due = append(due, s.Session)
		} else if next.IsZero() || s.Expires.Before(next) {
			next = s.Expires
		}
	}
	b.index.RUnlock()
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
	now, boot := b.now(), sinceBoot()
	b.index.Lock()
	for _, s := range sessions {
		delete(b.byID, s.ID)
		delete(b.byAddress, s.Address)
		if delete(b.byOwner[s.Certificate], s.ID); len(b.byOwner[s.Certificate]) == 0 {
			delete(b.byOwner, s.Certificate)
		}
		b.unwritten[s.ID] = ended{s, now, boot}
	}
	b.index.Unlock()
	for _, s := range sessions {
		b.tell(Event{Session: s, Ended: why})
	}
	if err := b.update(func(*statefile.Tx) error { return nil }); err != nil {
		return fmt.Errorf("the session ended, but the state file could not be told: %w", err)
	}
	return nil
}

// update commits fn together with the ends not yet written. The caller holds change.
func (b *Bolt) update(fn func(*statefile.Tx) error) error {
	err := b.db.Update(func(tx *statefile.Tx) error {
		for _, e := range b.unwritten {
			if err := erase(tx, e); err != nil {
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

func erase(tx *statefile.Tx, e ended) error {
	if err := tx.Bucket(bucketSessions).Delete(e.ID[:]); err != nil {
		return err
	}
	holder, err := json.Marshal(lastHolder{e.User, e.Device, e.boot})
	if err != nil {
		return err
	}
	if err := tx.Bucket(bucketAddresses).Put(e.Address.AsSlice(), holder); err != nil {
		return err
	}
	return tx.Bucket(bucketKeys).Put(e.PublicKey[:], binary.BigEndian.AppendUint64(e.Certificate[:], uint64(e.at.Unix())))
}

// Note implements Store. It does not hold change over the write, which would delay an end.
func (b *Bolt) Note(seen map[ID]Seen) error {
	records := make(map[ID][]byte, len(seen))
	b.index.Lock()
	for id, at := range seen {
		r, live := b.byID[id]
		if !live {
			continue
		}
		r.Seen = at
		text, err := json.Marshal(r)
		if err != nil {
			b.index.Unlock()
			return err
		}
		b.byID[id], records[id] = r, text
	}
	b.index.Unlock()
	return b.db.Update(func(tx *statefile.Tx) error {
		bucket := tx.Bucket(bucketSessions)
		for id, text := range records {
			if bucket.Get(id[:]) == nil { // ended since
				continue
			}
			if err := bucket.Put(id[:], text); err != nil {
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
	r, ok := b.byID[id]
	return r.Session, ok
}

// ByAddress implements Store.
func (b *Bolt) ByAddress(a netip.Addr) (Session, bool) {
	b.index.RLock()
	defer b.index.RUnlock()
	id, ok := b.byAddress[a]
	return b.byID[id].Session, ok
}

// List implements Store, oldest first.
func (b *Bolt) List() []Session {
	b.index.RLock()
	all := make([]Session, 0, len(b.byID))
	for _, r := range b.byID {
		all = append(all, r.Session)
	}
	b.index.RUnlock()
	byAge(all)
	return all
}

// Of implements Store.
func (b *Bolt) Of(certificate [32]byte) []Session {
	b.index.RLock()
	var of []Session
	for id := range b.byOwner[certificate] {
		of = append(of, b.byID[id].Session)
	}
	b.index.RUnlock()
	byAge(of)
	return of
}

func byAge(list []Session) {
	slices.SortFunc(list, func(x, y Session) int {
		return cmp.Or(x.Created.Compare(y.Created), slices.Compare(x.ID[:], y.ID[:]))
	})
}

// Len implements Store.
func (b *Bolt) Len() int {
	b.index.RLock()
	defer b.index.RUnlock()
	return len(b.byID)
}

// Released implements Store. What could not be written yet is as true as the rest.
func (b *Bolt) Released() ([]Release, error) {
	b.change.Lock()
	unwritten := slices.Collect(maps.Values(b.unwritten))
	b.change.Unlock()
	boot := sinceBoot()
	ago := func(since time.Duration) time.Duration {
		if since > boot { // of before a reboot
			return boot
		}
		return boot - since
	}
	last := map[netip.Addr]Release{}
	err := b.db.View(func(tx *statefile.Tx) error {
		return tx.Bucket(bucketAddresses).ForEach(func(k, v []byte) error {
			a, ok := netip.AddrFromSlice(k)
			var h lastHolder
			if err := json.Unmarshal(v, &h); err != nil || !ok {
				return fmt.Errorf("state: the record of address %x is damaged: restore a backup", k)
			}
			last[a] = Release{a, h.User, h.Device, ago(h.Since)}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	for _, e := range unwritten {
		last[e.Address] = Release{e.Address, e.User, e.Device, ago(e.boot)}
	}
	b.index.RLock()
	defer b.index.RUnlock()
	maps.DeleteFunc(last, func(a netip.Addr, _ Release) bool { _, held := b.byAddress[a]; return held })
	return slices.SortedFunc(maps.Values(last), func(x, y Release) int {
		return cmp.Or(cmp.Compare(y.Ago, x.Ago), x.Address.Compare(y.Address))
	}), nil
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

// keySweep goes through the keys little by little, so that no moment has to look at all of them.
type keySweep struct {
	sync.Mutex
	next   []byte    // the key to go on with; nil: from the first
	resume time.Time // when the next round begins
}

const (
	keysAtOnce = 1000
	keysRound  = time.Hour
)

// sweepKeys forgets keys whose sessions ended longer ago than they must be known. What cannot be deleted now is found again.
func (b *Bolt) sweepKeys(now time.Time) {
	w := &b.sweep
	w.Lock()
	defer w.Unlock()
	if now.Before(w.resume) && w.resume.Sub(now) <= keysRound {
		return
	}
	forgotten := func(v []byte) bool {
		return len(v) == 40 && now.Sub(time.Unix(int64(binary.BigEndian.Uint64(v[32:])), 0)) > KeyMemory
	}
	var old [][]byte
	err := b.db.View(func(tx *statefile.Tx) error {
		c := tx.Bucket(bucketKeys).Cursor()
		k, v := c.Seek(w.next)
		for n := 0; k != nil && n < keysAtOnce; n++ {
			if forgotten(v) {
				old = append(old, bytes.Clone(k))
			}
			k, v = c.Next()
		}
		if w.next = bytes.Clone(k); k == nil {
			w.resume = now.Add(keysRound)
		}
		return nil
	})
	if err != nil || len(old) == 0 {
		return
	}
	_ = b.db.Update(func(tx *statefile.Tx) error {
		keys := tx.Bucket(bucketKeys)
		for _, k := range old {
			if forgotten(keys.Get(k)) {
				if err := keys.Delete(k); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
