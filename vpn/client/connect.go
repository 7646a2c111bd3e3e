package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// helloPatience is the longest that a client may take to greet the server once it was answered ahead. It is less where the way is short.
	helloPatience = 200 * time.Millisecond
	maxHello      = 4 << 10 // a ClientHello's record, bytes, that travels with the CONNECT
)

// Answers in the proxy's place, to a client that greets a TLS server: the way is open, and it is closed after all (RFC 8446, 6).
var (
	established  = []byte("HTTP/1.1 200 Connection established\r\n\r\n")
	accessDenied = []byte{21, 3, 3, 0, 2, 2, 49}
	noWay        = []byte{21, 3, 3, 0, 2, 2, 80} // internal_error
)

// connect carries a CONNECT. It may leave before the proxy has answered to the connection, and then come there twice where packets
// are lost and the proxy has ended the first in between (RFC 7413, 2.1): that reaches for its destination twice, and no more.
//
// Where the proxy opened a way to the same destination lately, the client is answered ahead of it, and its ClientHello travels with the
// CONNECT: a round trip less for each connection. The proxy decides as ever. What it refuses after all ends with a TLS alert, since it
// is too late for a status, and the next CONNECT to there waits for the proxy's own word.
func (s *Local) connect(ctx context.Context, in *net.TCPConn, q *request) {
	known := &s.keeper.visited
	first, speech := q.head, q.rest
	var hello []byte
	roundTrip, up := s.keeper.roundTrip()
	ahead := up && known.has(q.target)
	if ahead {
		if _, err := in.Write(established); err != nil {
			return
		}
		hello, speech = readHello(in, speech, min(roundTrip, helloPatience))
		first = slices.Concat(first, hello)
	}
	dialing, cancel := context.WithTimeout(ctx, carryPatience)
	out, err := s.spares.take(dialing, first)
	cancel()
	switch {
	case err != nil && ahead:
		known.remove(q.target)
		lastWord(in, noWay)
		return
	case err != nil:
		s.fail(in, err)
		return
	}
	defer out.Close()
	defer context.AfterFunc(ctx, func() { cut(out) })()

	judged, good := make(chan struct{}), false
	var left atomic.Bool
	var sending sync.WaitGroup
	sending.Go(func() {
		switch err := forward(out, in, &speech, judged); {
		case err == io.EOF:
			endOneWay(out, in, nil)
		case errors.Is(err, os.ErrDeadlineExceeded): // it was refused
		case errors.As(err, new(takesNoMore)): // and may still say why
			if <-judged; good {
				endOneWay(out, in, err)
			}
		case err != nil:
			left.Store(true)
			cut(out)
		case good || !ahead:
			if good && isHello(speech) {
				known.add(q.target)
			}
			oneWay(out, in)
		}
	})
	reply, end, err := readHead(out)
	good = err == nil && bytes.HasPrefix(reply, []byte("HTTP/1.1 2"))
	close(judged)
	switch {
	case left.Load():
		sending.Wait()
		return
	case ahead && !good:
		known.remove(q.target)
		in.SetReadDeadline(time.Unix(1, 0)) // ends the sending
		out.SetWriteDeadline(time.Unix(1, 0))
		sending.Wait()
		s.log.Warn("the proxy refuses what it opened before", "destination", q.target, "answer", wording(out, reply, err))
		alert := noWay
		if bytes.HasPrefix(reply, []byte("HTTP/1.1 403 ")) {
			alert = accessDenied
		}
		lastWord(in, alert)
		return
	case ahead:
		known.add(q.target)
		reply = reply[end:]
	}
	_, failed := in.Write(reply)
	if failed != nil || err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, errHeadLarge) {
		cut(in)
		cut(out)
	}
	oneWay(in, out)
	sending.Wait()
}

// takesNoMore is an error of the proxy's side.
type takesNoMore struct{ error }

// forward sends speech, and what comes, until the proxy has judged and something has come since. The first that comes is speech where there
// was none. Errors: io.EOF, takesNoMore, or the client's.
func forward(out net.Conn, in *net.TCPConn, speech *[]byte, judged <-chan struct{}) error {
	if _, err := out.Write(*speech); err != nil {
		return takesNoMore{err}
	}
	buf := make([]byte, 2<<10)
	for {
		n, err := in.Read(buf)
		if len(*speech) == 0 {
			*speech = slices.Clone(buf[:n])
		}
		if _, no := out.Write(buf[:n]); no != nil {
			return takesNoMore{no}
		}
		if err != nil {
			return err
		}
		select {
		case <-judged:
			return nil
		default:
		}
	}
}

// isHello tells of a TLS record that begins with a ClientHello (RFC 8446, 4 and 5.1).
func isHello(b []byte) bool { return len(b) >= 6 && b[0] == 22 && b[1] == 3 && b[5] == 1 }

// readHello reads a record with a ClientHello that is whole and comes in time; what else came is rest.
func readHello(in net.Conn, had []byte, patience time.Duration) (hello, rest []byte) {
	in.SetReadDeadline(time.Now().Add(patience))
	defer in.SetReadDeadline(time.Time{})
	b := append(make([]byte, 0, max(maxHello, len(had))), had...)
	for {
		size := 0 // not known
		if isHello(b) {
			size = 5 + int(binary.BigEndian.Uint16(b[3:]))
		}
		if size > 0 && len(b) >= size {
			return b[:size:size], b[size:]
		}
		if len(b) >= 6 && size == 0 || size > cap(b) || len(b) == cap(b) {
			return nil, b
		}
		n, err := in.Read(b[len(b):cap(b)])
		if b = b[:len(b)+n]; err != nil {
			return nil, b // and who reads on gets it as well, unless it was late
		}
	}
}

// wording is what a refusal says.
func wording(out net.Conn, reply []byte, err error) string {
	if err != nil {
		return err.Error()
	}
	out.SetReadDeadline(time.Now().Add(localLinger))
	more, _ := io.ReadAll(io.LimitReader(out, 4<<10))
	status, _, _ := bytes.Cut(reply, []byte("\r\n"))
	_, body, _ := bytes.Cut(append(reply, more...), []byte("\r\n\r\n"))
	return printable(fmt.Sprintf("%s: %s", status, body), 1000)
}
