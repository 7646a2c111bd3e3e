package gate

import (
	"bytes"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/identity"
	"perimeterd/internal/quota"
	"perimeterd/vpn"
)

func TestRefusalsOfOneUserFillNoLog(t *testing.T) {
	var text bytes.Buffer
	watched := 0
	g := &Gate{log: slog.New(slog.NewTextHandler(&text, nil)), lines: quota.New[string](time.Hour, 20), count: func(string) {}, watch: func(Refusal) { watched++ }}
	for _, user := range []string{"mallory", "alice"} {
		for range map[string]int{"mallory": 1000, "alice": 3}[user] {
			w := httptest.NewRecorder()
			if g.refuse(w, httptest.NewRequest("GET", "/x", nil), identity.Identity{User: user}, &vpn.APIError{Code: vpn.CodeNotFound}); w.Code != 404 {
				t.Fatal(w.Code)
			}
		}
	}
	if m, a := strings.Count(text.String(), "user=mallory"), strings.Count(text.String(), "user=alice"); m != 20 || a != 3 || watched != 1003 {
		t.Errorf("%d lines of mallory, %d of alice, %d watched", m, a, watched)
	}
}
