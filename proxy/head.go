package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// maxHead bounds a request's head, bytes.
const maxHead = 16 << 10

// head is what matters of a request before anything else reads it. net/http is kinder than a proxy may be: it takes bare
// LF, joins equal Content-Lengths, lets Transfer-Encoding win over one, and for CONNECT forgets the Host line. So each
// head is read here first, with one meaning or none.
type head struct {
	method, target string
	host           string
	hasHost        bool
	http10         bool
	chunked        bool
	length         int64 // of the body, unless chunked
	json           bool  // the client would rather read JSON
	upgrade        bool  // to WebSocket
}

// errLarge is returned by headEnd when no end is in sight within maxHead.
var errLarge = fmt.Errorf("the request's head is larger than %d bytes", maxHead)

// headEnd finds the end of the head in what has arrived so far, 0 when there is more to come. From is where to go on
// looking; everything before it has been looked at.
func headEnd(b []byte, from int) (int, error) {
	for i := from; i < len(b) && i < maxHead; i++ {
		switch c := b[i]; {
		case c == '\n' && (i == 0 || b[i-1] != '\r'):
			return 0, errors.New("a line ends without CR")
		case c != '\n' && i > 0 && b[i-1] == '\r':
			return 0, errors.New("a CR stands inside a line")
		case c == '\n' && i >= 3 && b[i-2] == '\n':
			return i + 1, nil
		case c == '\n' && i == 1:
			return 0, errors.New("an empty line stands before the request")
		case c < ' ' && c != '\t' && c != '\r' && c != '\n', c == 0x7f:
			return 0, fmt.Errorf("control byte %#02x in the head", c)
		}
	}
	if len(b) >= maxHead {
		return 0, errLarge
	}
	return 0, nil
}

// parseHead reads a head that headEnd has found whole.
func parseHead(b []byte) (h head, err error) {
	text := string(bytes.TrimSuffix(b, []byte("\r\n\r\n")))
	line, rest, _ := strings.Cut(text, "\r\n")
	method, rest2, ok1 := strings.Cut(line, " ")
	target, version, ok2 := strings.Cut(rest2, " ")
	if !ok1 || !ok2 || !isToken(method) || target == "" || strings.ContainsAny(target, "\t") {
		return h, errors.New("the request line is not method, target and version, one space apart")
	}
	h.method, h.target = method, target
	switch version {
	case "HTTP/1.1":
	case "HTTP/1.0":
		h.http10 = true
	default:
		return h, fmt.Errorf("version %s: want HTTP/1.1", quote(version))
	}
	var lengths, codings int
	var connection, upgrade, accept string
	for rest != "" {
		line, rest, _ = strings.Cut(rest, "\r\n")
		name, value, ok := strings.Cut(line, ":")
		if !ok || !isToken(name) { // a folded line begins with a space, and is no token
			// Never shown: it may hold a password.
			return h, errors.New("a header line is not a name, a colon and a value")
		}
		value = strings.Trim(value, " \t")
		is := func(n string) bool { return strings.EqualFold(name, n) }
		switch {
		case is("host"):
			if h.hasHost {
				return h, errors.New("more than one Host")
			}
			h.host, h.hasHost = value, true
		case is("content-length"):
			lengths++
			if h.length, err = strconv.ParseInt(value, 10, 63); err != nil || strings.Trim(value, "0123456789") != "" {
				return h, fmt.Errorf("Content-Length %s: want one number", quote(value))
			}
		case is("transfer-encoding"):
			codings++
			if h.chunked = strings.EqualFold(value, "chunked"); !h.chunked {
				return h, fmt.Errorf("Transfer-Encoding %s: only chunked is understood", quote(value))
			}
		case is("accept"):
			accept += "," + value
		case is("connection"):
			connection += "," + value
		case is("upgrade"):
			upgrade += "," + value
		}
	}
	switch {
	case lengths > 1:
		return h, errors.New("more than one Content-Length")
	case codings > 1:
		return h, errors.New("more than one Transfer-Encoding")
	case lengths > 0 && codings > 0:
		return h, errors.New("both Content-Length and Transfer-Encoding")
	case codings > 0 && h.http10:
		return h, errors.New("Transfer-Encoding in HTTP/1.0")
	case !h.http10 && !h.hasHost:
		return h, errors.New("no Host")
	case h.method == "CONNECT" && (h.chunked || h.length > 0):
		return h, errors.New("CONNECT has no body")
	}
	h.json = prefersJSON(accept)
	h.upgrade = hasToken(connection, "upgrade") && hasToken(upgrade, "websocket")
	return h, nil
}

// destination is where the request wants to go. A Host line must say the same, if there is one: whoever sends two answers
// to one question has no good reason to.
func (h *head) destination() (d Destination, err error) {
	if h.method == "CONNECT" {
		d, err = ParseAuthority(h.target)
	} else {
		d, err = ParseURL(h.target)
	}
	if err != nil || !h.hasHost {
		return d, err
	}
	// Host carries no port where it is the default, and some clients leave it out anywhere.
	host := h.host
	if strings.LastIndexByte(host, ':') <= strings.LastIndexByte(host, ']') {
		host += ":" + strconv.Itoa(int(d.Port))
	}
	if same, err := ParseAuthority(host); err != nil || same != d {
		return Destination{}, fmt.Errorf("%w %s: Host is another: %s", errDestination, quote(d.String()), quote(h.host))
	}
	return d, nil
}

func isToken(s string) bool {
	for _, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != ""
}

// hasToken looks for a token in a comma-separated list.
func hasToken(list, token string) bool {
	for t := range strings.SplitSeq(list, ",") {
		if strings.EqualFold(strings.Trim(t, " \t"), token) {
			return true
		}
	}
	return false
}

// reasonOf names an error of reading a head.
func reasonOf(err error) Reason {
	switch {
	case errors.Is(err, errLarge):
		return HeadTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		return HeadTimeout
	case errors.Is(err, errScheme):
		return BadScheme
	case errors.Is(err, errDestination):
		return BadDestination
	}
	return Malformed
}
