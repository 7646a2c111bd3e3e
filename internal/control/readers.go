package control

import (
	"fmt"
	"net/http"

	"perimeterd/internal/audit"
	"perimeterd/vpn"
)

// readable are the operations of those who may only read. An operation that is not here is not theirs.
var readable = []string{"GET /v1/status", "GET /v1/users", "GET /v1/sessions", "GET /v1/events", "GET /v1/decide", "GET /v1/audit", "GET /v1/audit/{name}"}

// ReadersHandler serves the operations that show, and refuses those that act.
func ReadersHandler(o *Operations) http.Handler {
	h, mux := o.handler(newSeats(readerSeats, readerSeatsEach)), http.NewServeMux()
	for _, pattern := range readable {
		mux.Handle(pattern, h)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		err := &vpn.APIError{Status: http.StatusForbidden, Code: vpn.CodeForbidden,
			Message: fmt.Sprintf("the group %s may only read", ReadersGroup), Fix: "run it as root, or as a member of the group " + Group}
		if o.Refused != nil {
			o.Refused(account(peer(r.Context()).Uid), Act(r.Context(), audit.Record{Action: r.Method + " " + r.URL.Path}, err))
		}
		w.Header().Set("Connection", "close")
		answer(w, nil, err)
	})
	return mux
}
