package control

import (
	"context"
	"net/http"
	"strconv"

	"perimeterd/internal/audit"
)

// maxState bounds a state file's copy, bytes.
const maxState = 1 << 30

// handleBackup streams a copy of the state file. It holds preshared keys of live sessions: it is for those who may do all, not
// for those who may only read. It is recorded, unless it is taken to be looked at once.
func handleBackup(mux *http.ServeMux, o *Operations) {
	mux.HandleFunc("GET /v1/backup", func(w http.ResponseWriter, r *http.Request) {
		err := o.Users.Settle()
		if o.Audit != nil && !r.URL.Query().Has("check") {
			o.Audit(Act(r.Context(), audit.Record{Action: "backup"}, err))
		}
		if err != nil { // a copy that lacks a revocation would bring somebody back
			answer(w, nil, err)
			return
		}
		err = o.Snapshot(w, func(size int64) {
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		})
		if err != nil {
			panic(http.ErrAbortHandler) // so that what was sent is not taken for all
		}
	})
}

// Backup is a copy of the state file as it is at this moment; check says that it is not kept.
func (c *Client) Backup(ctx context.Context, check bool) ([]byte, error) {
	path := "/v1/backup"
	if check {
		path += "?check"
	}
	return c.ask(ctx, "GET", path, nil, maxState)
}
