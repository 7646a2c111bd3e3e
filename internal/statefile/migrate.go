package statefile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
)

// Schema is the version of the file that this program reads and writes. Every one has buckets without buckets in them, and its
// number in the bucket meta under "schema".
const Schema = 2

// steps[n] brings a file from schema n to n+1.
var steps = [Schema]func(*Tx) error{
	// A seal, which the transaction writes, over what is there.
	1: func(*Tx) error { return nil },
}

// migrate brings an older file to Schema, in one transaction, after a copy beside it that the older program can read.
func (db *DB) migrate(path string, from Info) error {
	if from.Schema == Schema {
		return nil
	}
	if err := db.copyTo(fmt.Sprintf("%s.schema%d", path, from.Schema)); err != nil {
		return fmt.Errorf("schema %d is left as it is, since no copy could be made before the change to %d: %w", from.Schema, Schema, err)
	}
	err := db.Update(func(tx *Tx) error {
		tx.seal = from.seal
		for n := from.Schema; n < Schema; n++ {
			if err := steps[n](tx); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMeta).Put(keySchema, []byte(strconv.Itoa(Schema)))
	})
	if err != nil {
		return fmt.Errorf("schema %d is left as it is: the change to %d: %w", from.Schema, Schema, err)
	}
	return nil
}

// copyTo writes the whole file, in the place of one of that name.
func (db *DB) copyTo(path string) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = io.Copy(tmp, io.NewSectionReader(db.file, 0, 1<<62))
	if err := errors.Join(err, own(tmp, filepath.Dir(path)), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
