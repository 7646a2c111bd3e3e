package identity

import (
	"context"
	"encoding/binary"
	"log/slog"
	"sync"
	"time"

	"perimeterd/internal/statefile"
)

// bucketSeen says when a certificate was last inside: key hash → Unix seconds, uint64. It is missing from files where nobody
// was noted yet.
var bucketSeen = []byte("seen")

// seenEvery is how often what was noted is written: nobody waits for it, and a crash loses no more.
const seenEvery = time.Minute

// Seen remembers when certificates were last inside.
type Seen struct {
	db  *statefile.DB
	log *slog.Logger

	mu    sync.Mutex
	fresh map[KeyHash]time.Time
}

// NewSeen writes into db, which OpenState opened.
func NewSeen(db *statefile.DB, log *slog.Logger) *Seen {
	return &Seen{db: db, log: log, fresh: map[KeyHash]time.Time{}}
}

// Note is told of a certificate that is, or was just, inside. It does not wait for the disk.
func (s *Seen) Note(key KeyHash, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at.After(s.fresh[key]) {
		s.fresh[key] = at
	}
}

// Run writes what was noted, until ctx ends, and the rest then.
func (s *Seen) Run(ctx context.Context) error {
	tick := time.NewTicker(seenEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.write()
			return nil
		case <-tick.C:
			s.write()
		}
	}
}

func (s *Seen) write() {
	s.mu.Lock()
	fresh := s.fresh
	s.fresh = map[KeyHash]time.Time{}
	s.mu.Unlock()
	if len(fresh) == 0 {
		return
	}
	err := s.db.Update(func(tx *statefile.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucketSeen)
		if err != nil {
			return err
		}
		for key, at := range fresh {
			if at.After(lastSeen(tx, key)) {
				if err := b.Put(key[:], binary.BigEndian.AppendUint64(nil, uint64(at.Unix()))); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		s.log.Warn("when users were last seen is not written", "err", err)
		for key, at := range fresh {
			s.Note(key, at)
		}
	}
}

func lastSeen(tx *statefile.Tx, key KeyHash) time.Time {
	b := tx.Bucket(bucketSeen)
	if b == nil {
		return time.Time{}
	}
	v := b.Get(key[:])
	if len(v) != 8 {
		return time.Time{}
	}
	return time.Unix(int64(binary.BigEndian.Uint64(v)), 0)
}
