package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// maxHead bounds a request's head, bytes, as the bastion's proxy does.
const maxHead = 16 << 10

var errHeadLarge = fmt.Errorf("the request's head is larger than %d bytes", maxHead)

// request is what the local listener must know of a request: which of its three forms it has (RFC 9112, 3.2), who asks, and
// its bytes.
type request struct {
	method, target, host string
	proxied              bool   // CONNECT or absolute form: for the proxy
	authorization        string // of Proxy-Authorization
	head, rest           []byte // the head without Proxy-Authorization; what came behind it
}

// readHead reads until a head ends, and returns what came and how much of it the head is.
func readHead(r io.Reader) (b []byte, end int, err error) {
	b = make([]byte, 0, 4<<10)
	for {
		if len(b) == cap(b) {
			b = append(b, make([]byte, min(len(b), maxHead+1-len(b)))...)[:len(b)]
		}
		n, err := r.Read(b[len(b):cap(b)])
		seen := max(len(b)-3, 0)
		b = b[:len(b)+n]
		if i := bytes.Index(b[seen:], []byte("\r\n\r\n")); i >= 0 {
			return b, seen + i + 4, nil
		}
		if len(b) > maxHead {
			return b, 0, errHeadLarge
		}
		if err != nil {
			return b, 0, err
		}
	}
}

// readRequest reads a head and parses it. What it has one meaning for the proxy has the same here, or is refused.
func readRequest(r io.Reader) (*request, error) {
	b, end, err := readHead(r)
	if err != nil {
		return nil, err
	}
	return parseRequest(b[:end], b[end:])
}

// badRequest is a head that is refused.
type badRequest string

func (b badRequest) Error() string { return string(b) }

func parseRequest(head, rest []byte) (*request, error) {
	if len(head) > maxHead {
		return nil, errHeadLarge
	}
	q := &request{rest: rest}
	line, lines, _ := strings.Cut(string(head), "\r\n")
	parts := strings.Split(line, " ")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] != "HTTP/1.1" && parts[2] != "HTTP/1.0" || dirty(line) {
		return nil, badRequest("the request line is not method, target and HTTP/1.1, one space apart")
	}
	q.method, q.target = parts[0], parts[1]
	var kept strings.Builder
	kept.WriteString(line + "\r\n")
	hosts, logins := 0, 0
	for lines != "\r\n" {
		if line, lines, _ = strings.Cut(lines, "\r\n"); lines == "" {
			return nil, badRequest("the head does not end")
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || name == "" || strings.ContainsAny(name, " \t") || dirty(line) {
			return nil, badRequest("a header line is not a name, a colon and a value")
		}
		value = strings.Trim(value, " \t")
		switch strings.ToLower(name) {
		case "host":
			hosts, q.host = hosts+1, value
		case "proxy-authorization":
			logins, q.authorization = logins+1, value
			continue
		}
		kept.WriteString(line + "\r\n")
	}
	if hosts > 1 || logins > 1 {
		return nil, badRequest("more than one Host or Proxy-Authorization")
	}
	kept.WriteString("\r\n")
	q.head = []byte(kept.String())
	switch {
	case q.method == "CONNECT":
		q.proxied = true
	case q.target[0] == '/' || q.target == "*":
	case strings.Contains(q.target, "://"):
		q.proxied = true
	default:
		return nil, badRequest("the target is neither a URL nor a path")
	}
	return q, nil
}

// login is the value of a header that names who asks; empty: there is none, or more than one.
func (q *request) login(header string) (value string) {
	for line := range strings.SplitSeq(string(q.head), "\r\n") {
		if name, v, ok := strings.Cut(line, ":"); ok && strings.EqualFold(name, header) {
			if value != "" {
				return ""
			}
			value = strings.Trim(v, " \t")
		}
	}
	return value
}

// dirty tells of bytes that could end a line for one reader and not for another.
func dirty(line string) bool {
	return strings.IndexFunc(line, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) >= 0
}

// hungUp tells of a client that went away, or never said anything.
func hungUp(err error) bool {
	var bad badRequest
	return !errors.As(err, &bad) && !errors.Is(err, errHeadLarge)
}
