package session

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"time"

	"perimeterd/internal/statefile"
)

// Carry is for a state that was brought back from a backup: its sessions end, since some of them ended before, for reasons that it
// does not know, and all addresses rest from now on, since when they were released is told by another host's clock. What it is put in
// the place of, a state file that nobody writes, had keys and addresses that it may not know: no session may have those again
// either, or too soon. From is nil where there is none.
func Carry(db *statefile.DB, now time.Time, from io.ReaderAt, size int64) error {
	boot := sinceBoot()
	return db.Update(func(tx *statefile.Tx) error {
		buckets := map[string]*statefile.Bucket{}
		for _, name := range [][]byte{bucketSessions, bucketKeys, bucketAddresses} {
			b, err := tx.CreateBucketIfNotExists(name)
			if err != nil {
				return err
			}
			buckets[string(name)] = b
		}
		var live []Session
		err := buckets[string(bucketSessions)].ForEach(func(_, v []byte) error {
			var r record
			err := json.Unmarshal(v, &r)
			live = append(live, r.Session)
			return err
		})
		if err != nil {
			return err
		}
		for _, s := range live {
			if err := erase(tx, ended{s, now, boot}); err != nil {
				return err
			}
		}
		keys, addresses := buckets[string(bucketKeys)], buckets[string(bucketAddresses)]
		rest := map[string]lastHolder{}
		note := func(address, v []byte) error {
			var h lastHolder
			err := json.Unmarshal(v, &h)
			rest[string(address)] = h
			return err
		}
		if from != nil {
			_, err := statefile.Check(from, size, func(bucket string, k, v []byte) error {
				switch bucket {
				case string(bucketKeys):
					if keys.Get(k) != nil || len(v) < 32 {
						return nil
					}
					bound := bytes.Clone(v)
					if len(bound) == 32 { // of a session that was live there
						bound = binary.BigEndian.AppendUint64(bound, uint64(now.Unix()))
					}
					return keys.Put(bytes.Clone(k), bound)
				case string(bucketAddresses):
					return note(k, v)
				case string(bucketSessions):
					var r record
					err := json.Unmarshal(v, &r)
					rest[string(r.Address.AsSlice())] = lastHolder{User: r.User, Device: r.Device}
					return err
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		if err := addresses.ForEach(note); err != nil {
			return err
		}
		for address, h := range rest {
			h.Since = boot
			text, err := json.Marshal(h)
			if err != nil {
				return err
			}
			if err := addresses.Put([]byte(address), text); err != nil {
				return err
			}
		}
		return nil
	})
}
