package identity

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

const (
	maxLine = 4 << 10
	// maxComplaints is how many bad lines of a list are named: a file that is something else entirely has many.
	maxComplaints = 5
)

// allowed is a list of subjects who may come in, and of nobody where it is empty.
type allowed struct {
	subjects map[string]bool // by dn.key
	users    map[string]bool // common names in it
	nameless []string        // lines that let nobody in, since they name nobody who can be a user here
}

// parseAllowed reads a list: a subject on each line, in any form that parseDN reads, perhaps with the "subject=" of
// `openssl x509 -subject` before it. Lines that are empty or begin with # or ; say nothing. A list with one bad line is no
// list.
func parseAllowed(file string, data []byte) (*allowed, error) {
	list := &allowed{subjects: map[string]bool{}, users: map[string]bool{}}
	var bad []error
	complaints := 0
	complain := func(n int, err error) {
		if complaints++; complaints <= maxComplaints {
			bad = append(bad, fmt.Errorf("%s:%d: %w", file, n, err))
		}
	}
	n := 0
	for raw := range bytes.Lines(bytes.TrimPrefix(data, []byte("\xEF\xBB\xBF"))) {
		n++
		line := trimLine(string(raw))
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if len(line) > maxLine {
			complain(n, fmt.Errorf("longer than %d bytes: this is no subject", maxLine))
			continue
		}
		line = strings.TrimLeft(strings.TrimPrefix(line, "subject="), " ")
		d, either, err := parseDN(line)
		if err != nil {
			complain(n, err)
			continue
		}
		name, err := d.commonName()
		if err == nil {
			err = CheckName("common name", name)
		}
		if err != nil {
			list.nameless = append(list.nameless, fmt.Sprintf("%s:%d: nobody comes in by this line: %v", file, n, err))
		} else {
			list.users[name] = true
		}
		list.subjects[d.key()] = true
		if either {
			list.subjects[d.reversed().key()] = true
		}
	}
	if complaints > maxComplaints {
		bad = append(bad, fmt.Errorf("%s: %d bad lines in all", file, complaints))
	}
	if len(bad) > 0 {
		return nil, errors.Join(bad...)
	}
	return list, nil
}

// trimLine takes off the spaces around a line, but for one that a backslash makes the value's.
func trimLine(s string) string {
	t := strings.TrimSpace(s)
	if strings.HasSuffix(t, `\`) && t[0] != '/' && strings.HasSuffix(strings.TrimRight(s, "\r\n"), " ") {
		t += " "
	}
	return t
}
