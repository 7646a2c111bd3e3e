package proxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// Headers of what the proxy answers itself, and of nothing else. Their values, and what it says in a status line, are its own words:
// names of reasons, and letters and digits of an id.
const (
	reasonHeader = "X-Perimeter-Reason"
	idHeader     = "X-Perimeter-Id"
)

// name puts the request's id and the reason into an answer's head.
func (a *Access) name(h http.Header) {
	h.Set(reasonHeader, string(a.Decision.Reason))
	h.Set(idHeader, a.ID)
}

// body is what a refused client gets to read: what was refused, why, what to do, and the id by which the operator finds it.
func (a *Access) body(asJSON bool) (body []byte, contentType string) {
	where := ""
	if a.Destination.Valid() {
		where = a.Destination.String()
	}
	sentence := a.Decision.Reason.Sentence()
	if asJSON {
		type e struct {
			Code        string `json:"code"`
			Message     string `json:"message"`
			Destination string `json:"destination,omitempty"`
			User        string `json:"user"`
			ID          string `json:"id"`
		}
		body, _ = json.Marshal(struct { // strings only
			Error e `json:"error"`
		}{e{string(a.Decision.Reason), sentence, where, a.User, a.ID}})
		return append(body, '\n'), "application/json"
	}
	if where == "" {
		where = "A request"
	}
	return fmt.Appendf(nil, "%s was not let through by the proxy (perimeterd).\n\n%s\n\nreason  %s\nuser    %s\nid      %s\n\nThe operator finds it with: perimeterd why %s\n",
		where, sentence, a.Decision.Reason, a.User, a.ID, a.ID), "text/plain; charset=utf-8"
}

// prefersJSON reads Accept: whichever of JSON and text has the higher weight, of equals the one named first (RFC 9110,
// 12.5.1). Who does not say gets text.
func prefersJSON(accept string) bool {
	var json, text float64
	for r := range strings.SplitSeq(accept, ",") {
		kind, parameters, _ := strings.Cut(strings.ToLower(r), ";")
		weight := 1.0
		for p := range strings.SplitSeq(parameters, ";") {
			if q, ok := strings.CutPrefix(strings.TrimSpace(p), "q="); ok {
				if w, err := strconv.ParseFloat(q, 64); err == nil && w >= 0 && w <= 1 {
					weight = w
				}
			}
		}
		switch kind = strings.TrimSpace(kind); {
		case kind == "application/json" || strings.HasSuffix(kind, "+json"):
			if weight > text {
				json = max(json, weight)
			}
		case strings.HasPrefix(kind, "text/"):
			if weight > json {
				text = max(text, weight)
			}
		}
	}
	return json > text
}
