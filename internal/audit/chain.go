package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Hash is a link of the chain.
type Hash [sha256.Size]byte

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// next is the hash of the record after h.
func (h Hash) next(body []byte) Hash {
	sum := sha256.New()
	sum.Write([]byte(h.String()))
	sum.Write(body)
	return Hash(sum.Sum(nil))
}

// Head is the newest record of a chain: its number and hash. The zero Head is that of a chain without records.
type Head struct {
	Seq  uint64
	Hash Hash
}

func (h Head) String() string { return fmt.Sprintf("%d:%v", h.Seq, h.Hash) }

// ParseHead reads what String wrote.
func ParseHead(s string) (h Head, err error) {
	seq, sum, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(sum)
	if h.Seq, err = number(seq, err); err != nil || len(raw) != len(h.Hash) {
		return Head{}, fmt.Errorf("head %q: want SEQ:HASH, a number and 64 hexadecimal digits", s)
	}
	h.Hash = Hash(raw)
	return h, nil
}

func number(s string, err error) (uint64, error) {
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(s, 10, 64)
}

// maxLine bounds a line, bytes; records keep well below.
const maxLine = 64 << 10

const (
	lineStart = `{"seq":`
	lineHash  = `,"hash":"`
	lineEnd   = `"}`
)

// append adds r to the text as the line after head, and returns the new head.
func (h Head) append(text []byte, r *Record) ([]byte, Head, error) {
	r.Seq, r.Time = h.Seq+1, r.Time.UTC()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(r); err != nil {
		return text, h, err
	}
	body := bytes.TrimSuffix(b.Bytes(), []byte("}\n"))
	h = Head{r.Seq, h.Hash.next(body)}
	text = append(append(text, body...), lineHash...)
	text = hex.AppendEncode(text, h.Hash[:])
	return append(append(text, lineEnd...), '\n'), h, nil
}

var errNoRecord = errors.New("not a record")

// split takes a line apart, with its newline or without: the part that is hashed, and what the line says of itself. It looks at the
// ends only.
func split(line []byte) (body []byte, says Head, err error) {
	line = bytes.TrimSuffix(line, []byte("\n"))
	at := len(line) - len(lineEnd) - hex.EncodedLen(len(says.Hash)) - len(lineHash)
	rest, ok := bytes.CutPrefix(line, []byte(lineStart))
	if !ok || at < len(lineStart) || len(line) > maxLine {
		return nil, Head{}, errNoRecord
	}
	body, tail := line[:at], line[at:]
	if !bytes.HasPrefix(tail, []byte(lineHash)) || !bytes.HasSuffix(tail, []byte(lineEnd)) {
		return nil, Head{}, errNoRecord
	}
	sum := tail[len(lineHash) : len(tail)-len(lineEnd)]
	digits := 0
	for digits < len(rest) && '0' <= rest[digits] && rest[digits] <= '9' {
		digits++
	}
	// One spelling, or a changed byte would change nothing.
	if says, err = ParseHead(string(rest[:digits]) + ":" + string(sum)); err != nil || rest[0] == '0' || bytes.ContainsAny(sum, "ABCDEF") {
		return nil, Head{}, errNoRecord
	}
	return body, says, nil
}

// parse reads a line whole.
func parse(line []byte) (r Record, body []byte, says Head, err error) {
	if body, says, err = split(line); err != nil {
		return Record{}, nil, Head{}, err
	}
	d := json.NewDecoder(bytes.NewReader(append(bytes.Clone(body), '}')))
	if err := d.Decode(&r); err != nil || r.Seq != says.Seq {
		return Record{}, nil, Head{}, errNoRecord
	}
	return r, body, says, nil
}
