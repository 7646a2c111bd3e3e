package control

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	"perimeterd/internal/audit"
	"perimeterd/vpn"
)

// codeLate is the code of the last line that a reader gets who fell behind, and codeBusy that of one too many.
const (
	codeLate = "late"
	codeBusy = "busy"
)

// events sends what matches of what the daemon remembers, one audit.Record a line, and with follow=1 what comes. A reader who
// falls behind gets an error's line, and no more: nobody waits for him.
func (o *Operations) events(w http.ResponseWriter, r *http.Request) {
	follow, filter, err := parseEvents(r.URL.Query())
	if err != nil {
		answer(w, nil, &vpn.APIError{Status: http.StatusBadRequest, Code: vpn.CodeBadRequest, Message: err.Error()})
		return
	}
	if o.Feed == nil {
		answer(w, nil, &vpn.APIError{Status: http.StatusNotFound, Code: vpn.CodeNotFound, Message: "this daemon has no events"})
		return
	}
	list, reader := o.Feed.Recent(), (*audit.Reader)(nil)
	if follow {
		if list, reader = o.Feed.Follow(); reader == nil {
			answer(w, nil, &vpn.APIError{Status: http.StatusServiceUnavailable, Code: codeBusy, Message: "too many follow the events already, or the daemon is stopping"})
			return
		}
		defer reader.Close()
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	control := http.NewResponseController(w)
	e := json.NewEncoder(patient{w, control})
	e.SetEscapeHTML(false)
	for i := range list {
		if filter.Match(&list[i]) && e.Encode(&list[i]) != nil {
			return
		}
	}
	if !follow {
		return
	}
	// The server's time to read a request would end the context of this one, and that of the last piece its end.
	if control.SetReadDeadline(time.Time{}) != nil || control.Flush() != nil {
		return
	}
	defer func() { _ = control.SetWriteDeadline(time.Now().Add(readPatience)) }()
	for {
		select {
		case <-r.Context().Done():
			return
		case next, more := <-reader.C:
			if !more {
				if reader.Late() {
					_ = e.Encode(vpn.ErrorReply{Error: &vpn.APIError{Code: codeLate, Message: "the events came faster than they were read: ask for less, by --user or --kind"}})
				}
				return
			}
			if filter.Match(&next) && e.Encode(&next) != nil {
				return
			}
			if len(reader.C) == 0 && control.Flush() != nil {
				return
			}
		}
	}
}

func parseEvents(q url.Values) (follow bool, f audit.Filter, err error) {
	for key, values := range q {
		value := values[len(values)-1]
		switch key {
		case "follow":
			follow = value == "1"
		case "user":
			f.User = value
		case "session":
			f.Session = value
		case "since":
			if f.Since, err = time.Parse(time.RFC3339Nano, value); err != nil {
				return false, f, fmt.Errorf("since=%q: want RFC 3339", value)
			}
		case "kind":
			for _, k := range values {
				if !slices.Contains(audit.Kinds(), audit.Kind(k)) {
					return false, f, fmt.Errorf("kind=%q: want one of %v", k, audit.Kinds())
				}
				f.Kinds = append(f.Kinds, audit.Kind(k))
			}
		default:
			return false, f, fmt.Errorf("%q is no parameter: there are follow, user, session, since and kind", key)
		}
	}
	return follow, f, nil
}

// Events calls fn for what the daemon remembers, oldest first, and with follow for what comes, until ctx ends. It returns nil
// at the end of what is remembered and when ctx ends; io.EOF when the daemon stopped.
func (c *Client) Events(ctx context.Context, follow bool, f audit.Filter, fn func(*audit.Record) error) error {
	q := url.Values{}
	set := func(key, value string) {
		if value != "" {
			q.Set(key, value)
		}
	}
	set("user", f.User)
	set("session", f.Session)
	if !f.Since.IsZero() {
		set("since", f.Since.Format(time.RFC3339Nano))
	}
	for _, k := range f.Kinds {
		q.Add("kind", string(k))
	}
	if follow {
		set("follow", "1")
	}
	res, err := c.stream(ctx, "/v1/events?"+q.Encode())
	if err != nil {
		return err
	}
	defer res.Body.Close()
	for d := json.NewDecoder(res.Body); ; {
		var line struct {
			Error *vpn.APIError `json:"error"`
			audit.Record
		}
		switch err := d.Decode(&line); {
		case ctx.Err() != nil, err == io.EOF && !follow:
			return nil
		case err == io.EOF:
			return err
		case err != nil:
			return fmt.Errorf("%s: %w", c.path, err)
		case line.Error != nil:
			return line.Error
		}
		if err := fn(&line.Record); err != nil {
			return err
		}
	}
}
