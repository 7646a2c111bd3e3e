package control

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The service sees no other user's processes, so the command says itself who logged in. Only root is believed.
func TestWhoLoggedInIsRootsWord(t *testing.T) {
	const gone = 1 << 30 // no process has it
	for _, test := range []struct {
		uid  uint32
		said string
		want string
	}{
		{0, "65534", ", logged in as "},
		{0, "4294967295", ""}, // nobody logged in
		{0, "mallory", ""},
		{0, "", ""},
		{65534, "0", ""},
	} {
		var got string
		h := withLogin(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = by(r.Context()) }))
		r := httptest.NewRequest("GET", "/v1/status", nil)
		r = r.WithContext(context.WithValue(r.Context(), peerKey{}, &unix.Ucred{Pid: gone, Uid: test.uid}))
		if test.said != "" {
			r.Header.Set(loginHeader, test.said)
		}
		h.ServeHTTP(httptest.NewRecorder(), r)
		if want := account(test.uid); !strings.HasPrefix(got, want) || strings.Contains(got, "logged in") != (test.want != "") {
			t.Errorf("uid %d, %q: by %q", test.uid, test.said, got)
		}
	}
}
