package statefile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"strconv"
)

// The layout is bbolt's, file format version 2, in the machine's byte order: go.etcd.io/bbolt/internal/common.
const (
	pageHeader   = 16 // id uint64, flags uint16, count uint16, overflow uint32
	elementSize  = 16 // branch: pos, ksize uint32, page uint64; leaf: flags, pos, ksize, vsize uint32
	bucketHeader = 16 // root page uint64, sequence uint64; a root of 0: the one page follows
	metaSize     = 64

	branchFlag, leafFlag, metaFlag, freelistFlag = 0x01, 0x02, 0x04, 0x10 // of a page
	bucketFlag                                   = 1                      // of a leaf's element

	magic, version   = 0xED0CDAED, 2
	noFreelist       = math.MaxUint64
	minPage, maxPage = 1 << 10, 1 << 16
	maxDepth         = 64
	maxKey           = 1 << 15
	manyFreePages    = 0xFFFF // or more: the number stands before the list
)

// Info is what Check found.
type Info struct {
	Schema    int
	Size      int64             // bytes in use from the start; the rest of the file is room to grow
	Sequences map[string]uint64 // of buckets
	seal      seal
}

// Check reads a file that nobody writes meanwhile, every page that is in use, without trust in a byte of it. It calls visit,
// unless nil, for every record, with slices that are good for the call; what it was told is worth nothing where Check returns
// an error. Errors say what is wrong and what to do.
func Check(file io.ReaderAt, size int64, visit func(bucket string, key, value []byte) error) (Info, error) {
	c := &checker{file: file, visit: visit, info: Info{Sequences: map[string]uint64{}}}
	m, err := c.header(size)
	if err != nil {
		return Info{}, err
	}
	c.info.Size = int64(m.pages) * c.pageSize
	if size < c.info.Size {
		return Info{}, fmt.Errorf("it is cut short, %d of %d bytes: restore a backup", size, c.info.Size)
	}
	c.used = make([]bool, m.pages)
	if err := c.tree("", m.root, nil, nil, 0); err != nil {
		return Info{}, err
	}
	if err := c.freelist(m.freelist); err != nil {
		return Info{}, err
	}
	return c.info, c.verdict()
}

type checker struct {
	file     io.ReaderAt
	visit    func(string, []byte, []byte) error
	pageSize int64
	used     []bool // by page: reached by one way already
	info     Info
	schema   []byte // as they stand in the file
	sealed   []byte
}

func damaged(format string, a ...any) error {
	return fmt.Errorf("it is damaged (%s): restore a backup", fmt.Sprintf(format, a...))
}

// verdict is for the whole file.
func (c *checker) verdict() error {
	n, err := strconv.Atoi(string(c.schema))
	switch {
	case c.schema == nil:
		return errors.New("it has no schema: it is not ours, or damaged: restore a backup")
	case err != nil || n < 1:
		return fmt.Errorf("its schema reads %q: it is not ours, or damaged: restore a backup", c.schema)
	case n > Schema:
		return fmt.Errorf("schema %d was written by a newer perimeterd, this one knows up to %d: "+
			"install the newer one again, or restore a backup made before it", n, Schema)
	case n > 1 && !bytes.Equal(c.sealed, c.info.seal[:]):
		return damaged("its records are not those that were written")
	}
	c.info.Schema = n
	return nil
}

type header struct {
	pageSize                      int64
	root, freelist, pages, change uint64
}

// header is the newer one of the two, which must both be good: where the newer one is damaged, the older one is the state before
// the last change.
func (c *checker) header(size int64) (header, error) {
	if size == 0 {
		return header{}, errors.New("it is empty: restore a backup")
	}
	first, err := c.readHeader(0)
	if err != nil {
		return header{}, err
	}
	c.pageSize = first.pageSize
	if least := 2 * c.pageSize; size < least {
		return header{}, fmt.Errorf("it is cut short, %d bytes, not even the %d of its headers: restore a backup", size, least)
	}
	second, err := c.readHeader(c.pageSize)
	switch {
	case err != nil:
		return header{}, err
	case second.pageSize != c.pageSize:
		return header{}, damaged("its headers disagree about pages")
	}
	h := first
	if second.change > first.change {
		h = second
	}
	if h.pages < 4 || h.pages > math.MaxInt64/uint64(maxPage) {
		return header{}, damaged("%d pages", h.pages)
	}
	return h, nil
}

func (c *checker) readHeader(at int64) (header, error) {
	buf := make([]byte, pageHeader+metaSize)
	if _, err := c.file.ReadAt(buf, at); err != nil && err != io.EOF {
		return header{}, err
	}
	m := buf[pageHeader:]
	sum := fnv.New64a()
	sum.Write(m[:metaSize-8])
	u64 := binary.NativeEndian.Uint64
	h := header{int64(binary.NativeEndian.Uint32(m[8:])), u64(m[16:]), u64(m[32:]), u64(m[40:]), u64(m[48:])}
	if binary.NativeEndian.Uint32(m) != magic || binary.NativeEndian.Uint32(m[4:]) != version || u64(m[56:]) != sum.Sum64() ||
		binary.NativeEndian.Uint16(buf[8:]) != metaFlag || h.pageSize < minPage || h.pageSize > maxPage || h.pageSize&(h.pageSize-1) != 0 {
		return header{}, damaged("its header at byte %d; the last change may be missing from the other one", at)
	}
	return h, nil
}

// page reads a page with what flows over from it, and takes it as reached.
func (c *checker) page(id uint64) (page []byte, flags uint16, err error) {
	if id < 2 || id >= uint64(len(c.used)) {
		return nil, 0, damaged("page %d of %d", id, len(c.used))
	}
	head := make([]byte, pageHeader)
	if _, err := c.file.ReadAt(head, int64(id)*c.pageSize); err != nil {
		return nil, 0, err
	}
	n := uint64(binary.NativeEndian.Uint32(head[12:])) + 1
	if binary.NativeEndian.Uint64(head) != id || n > uint64(len(c.used))-id {
		return nil, 0, damaged("the head of page %d", id)
	}
	for i := range n {
		if c.used[id+i] {
			return nil, 0, damaged("two ways lead to page %d", id+i)
		}
		c.used[id+i] = true
	}
	page = make([]byte, int64(n)*c.pageSize)
	if _, err := c.file.ReadAt(page, int64(id)*c.pageSize); err != nil {
		return nil, 0, err
	}
	return page, binary.NativeEndian.Uint16(head[8:]), nil
}

// element is one of a page: of a branch's, child leads on.
type element struct {
	flags      uint32
	child      uint64
	key, value []byte
}

// elements takes a page apart. Its keys must rise, from low on and below high, which are open where they are nil.
func elements(page []byte, flags uint16, low, high []byte) ([]element, error) {
	if len(page) < pageHeader || flags != branchFlag && flags != leafFlag {
		return nil, damaged("a page of no kind")
	}
	n := int(binary.NativeEndian.Uint16(page[10:]))
	table := pageHeader + n*elementSize
	if table > len(page) || n == 0 && flags == branchFlag {
		return nil, damaged("a page with %d elements", n)
	}
	list := make([]element, n)
	for i := range list {
		at := pageHeader + i*elementSize
		raw := page[at:]
		u32 := func(i int) uint64 { return uint64(binary.NativeEndian.Uint32(raw[i:])) }
		e := &list[i]
		var pos, ksize, vsize uint64
		if flags == branchFlag {
			pos, ksize, e.child = u32(0), u32(4), binary.NativeEndian.Uint64(raw[8:])
		} else {
			e.flags, pos, ksize, vsize = binary.NativeEndian.Uint32(raw), u32(4), u32(8), u32(12)
		}
		start := uint64(at) + pos
		if ksize == 0 || ksize > maxKey || start < uint64(table) || start+ksize+vsize > uint64(len(page)) {
			return nil, damaged("an element that is not within its page")
		}
		e.key, e.value = page[start:start+ksize], page[start+ksize:start+ksize+vsize]
		if low != nil && bytes.Compare(e.key, low) < 0 || high != nil && bytes.Compare(e.key, high) >= 0 ||
			i > 0 && bytes.Compare(e.key, list[i-1].key) <= 0 {
			return nil, damaged("keys out of order")
		}
	}
	return list, nil
}

// tree follows a bucket from a page on; the one without a name holds the buckets.
func (c *checker) tree(bucket string, id uint64, low, high []byte, depth int) error {
	page, flags, err := c.page(id)
	if err != nil {
		return err
	}
	list, err := elements(page, flags, low, high)
	if err != nil {
		return err
	}
	if flags == leafFlag {
		return c.leaf(bucket, list)
	}
	if depth == maxDepth {
		return damaged("a tree of more than %d levels", maxDepth)
	}
	for i, e := range list {
		next := high
		if i+1 < len(list) {
			next = list[i+1].key
		}
		if err := c.tree(bucket, e.child, e.key, next, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) leaf(bucket string, list []element) error {
	for _, e := range list {
		switch {
		case e.flags&^bucketFlag != 0 || (e.flags == bucketFlag) != (bucket == ""):
			return damaged("a record among buckets, or a bucket among records")
		case bucket != "":
			if err := c.record(bucket, e); err != nil {
				return err
			}
		default:
			if err := c.bucket(string(e.key), e.value); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) bucket(name string, value []byte) error {
	if len(value) < bucketHeader {
		return damaged("bucket %q", name)
	}
	root, n := binary.NativeEndian.Uint64(value), binary.NativeEndian.Uint64(value[8:])
	c.info.Sequences[name] = n
	c.info.seal.toggleSequence([]byte(name), n)
	if root != 0 {
		return c.tree(name, root, nil, nil, 0)
	}
	page := value[bucketHeader:]
	if len(page) < pageHeader || binary.NativeEndian.Uint16(page[8:]) != leafFlag {
		return damaged("bucket %q", name)
	}
	list, err := elements(page, leafFlag, nil, nil)
	if err != nil {
		return err
	}
	return c.leaf(name, list)
}

func (c *checker) record(bucket string, e element) error {
	meta := bucket == string(bucketMeta)
	if meta && bytes.Equal(e.key, keySeal) {
		c.sealed = bytes.Clone(e.value)
		return nil
	}
	if meta && bytes.Equal(e.key, keySchema) {
		c.schema = bytes.Clone(e.value)
	}
	c.info.seal.toggle([]byte(bucket), e.key, e.value)
	if c.visit == nil {
		return nil
	}
	return c.visit(bucket, e.key, e.value)
}

// freelist is for files of before schema 2: bbolt would write to the pages it names.
func (c *checker) freelist(id uint64) error {
	if id == noFreelist {
		return nil
	}
	page, flags, err := c.page(id)
	if err != nil {
		return err
	}
	count := binary.NativeEndian.Uint16(page[10:])
	list, n := page[pageHeader:], uint64(count)
	if count == manyFreePages {
		n, list = binary.NativeEndian.Uint64(list), list[8:]
	}
	if flags != freelistFlag || n > uint64(len(list)/8) {
		return damaged("its list of free pages")
	}
	for i := range n {
		free := binary.NativeEndian.Uint64(list[8*i:])
		if free < 2 || free >= uint64(len(c.used)) || c.used[free] {
			return damaged("its list of free pages names page %d", free)
		}
		c.used[free] = true
	}
	return nil
}
