package proxy

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// squidLooks is how often the file's name is looked at: a rotation takes it away and says nothing.
const squidLooks = time.Second

// SquidLog writes a file in Squid's native format, for the tools that people have for it: a line a request, once it is over.
type SquidLog struct {
	path string
	log  *slog.Logger

	mu     sync.Mutex
	file   *os.File
	looked time.Time
	failed error // of the last write or opening
	lost   int   // lines, since then
}

// OpenSquidLog opens or makes the file, 0640.
func OpenSquidLog(path string, log *slog.Logger) (*SquidLog, error) {
	l := &SquidLog{path: path, log: log}
	if err := l.Reopen(); err != nil {
		return nil, fmt.Errorf("log.squid_access_log: %w: make its directory, or leave it empty", err)
	}
	return l, nil
}

// Reopen opens the file by its name again, as after a rotation. If that fails, the old one goes on.
func (l *SquidLog) Reopen() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.openLocked()
}

func (l *SquidLog) openLocked() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file = f
	return nil
}

// moved reports whether the name leads elsewhere now.
func (l *SquidLog) movedLocked() bool {
	named, err := os.Stat(l.path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	open, err := l.file.Stat()
	return err != nil || !os.SameFile(named, open)
}

// Access is a watcher of the proxy. A line that cannot be written is lost, and said to be: nobody waits for a full disk.
func (l *SquidLog) Access(a Access) {
	now := a.Began.Add(a.Duration)
	line := squidLine(a)
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	if age := now.Sub(l.looked); age < 0 || age >= squidLooks {
		if l.looked = now; l.movedLocked() {
			err = l.openLocked()
		}
	}
	if _, werr := l.file.WriteString(line); werr != nil {
		err = werr
		l.lost++
	}
	switch {
	case err != nil && l.failed == nil:
		l.log.Error("squid access log", "err", err)
	case err == nil && l.failed != nil:
		l.log.Warn("squid access log is written again", "lost", l.lost)
		l.lost = 0
	}
	l.failed = err
}

// Close closes the file.
func (l *SquidLog) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}

// squidLine is a request in the words of Squid's native format:
//
//	%ts.%03tu %6tr %>a %Ss/%03>Hs %<st %rm %ru %[un %Sh/%<a %mt
//
// (https://wiki.squid-cache.org/Features/LogFormat). The size is of what came from the destination, the type is never known.
func squidLine(a Access) string {
	end := a.Began.Add(a.Duration)
	method, url, hierarchy := a.Method, "error:invalid-request", "HIER_NONE/-"
	if method == "" {
		method = "NONE"
	}
	switch target, err := strconv.Unquote(a.Target); {
	case a.Destination.Valid() && a.Method == http.MethodConnect:
		url = a.Destination.String()
	case err == nil && a.Destination.Valid(): // else it may be anything
		url = squidEscape(strings.TrimSuffix(target, "…"))
	}
	if a.Dialed.IsValid() {
		hierarchy = "HIER_DIRECT/" + a.Dialed.Addr().String()
	}
	return fmt.Sprintf("%d.%03d %6d %s %s/%03d %d %s %s %s %s -\n", end.Unix(), end.Nanosecond()/1e6, a.Duration.Milliseconds(),
		a.Source.Addr(), squidTag(a), a.Status, a.Down, method, url, squidEscape(a.User), hierarchy)
}

func squidTag(a Access) string {
	tag := "TCP_MISS"
	switch {
	case a.Decision.Reason == Malformed, a.Decision.Reason == BadDestination, a.Decision.Reason == HeadTooLarge, a.Decision.Reason == HeadTimeout:
		return "NONE_NONE"
	case !a.Decision.Allow:
		return "TCP_DENIED"
	case a.Method == http.MethodConnect:
		tag = "TCP_TUNNEL"
	}
	switch a.End {
	case "", Closed:
		return tag
	case ClientReset, ServerReset:
		if a.Method == http.MethodConnect { // how many programs end theirs
			return tag
		}
	case Idle, Lifetime:
		return tag + "_TIMEDOUT"
	}
	return tag + "_ABORTED"
}

// squidEscape keeps a field one field of one line.
func squidEscape(s string) string {
	if s == "" {
		return "-"
	}
	var b strings.Builder
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f || c == '"' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
