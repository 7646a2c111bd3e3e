package audit

import (
	"bufio"
	"encoding/json"
	"io"
	"regexp"
	"strconv"
	"strings"
)

// textHead is a head as log.format = "text" writes it.
var textHead = regexp.MustCompile(`^time=(\S+) level=\S+ msg="` + HeadMessage + `" dir=("(?:[^"\\]|\\.)*"|\S+) head=(\S+)$`)

// LoggedHeads finds the heads of a directory in the daemon's log, JSON or text, and passes over everything else in it.
func LoggedHeads(log io.Reader, dir string) (known []Known, err error) {
	in := bufio.NewScanner(log)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		text := in.Text()
		if !strings.Contains(text, HeadMessage) {
			continue
		}
		var l struct{ Time, Msg, Dir, Head string }
		if m := textHead.FindStringSubmatch(text); m != nil {
			l.Time, l.Msg, l.Dir, l.Head = m[1], HeadMessage, m[2], m[3]
			if d, err := strconv.Unquote(m[2]); err == nil {
				l.Dir = d
			}
		} else if json.Unmarshal([]byte(text), &l) != nil {
			continue
		}
		if h, err := ParseHead(l.Head); err == nil && l.Msg == HeadMessage && l.Dir == dir {
			known = append(known, Known{h, "the log of " + clean(l.Time)})
		}
	}
	return known, in.Err()
}
