// Package clients has the programs that people use meet the built binaries: Chromium, the AWS CLI, curl, Go, Python, Node and
// npm, each with its own way to a proxy, and a reader of Squid's log. `make test-full` installs what it takes.
package clients

import (
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// sts answers who the caller is, as far as the AWS CLI wants to know it.
func sts(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil || r.Form.Get("Action") != "GetCallerIdentity" || !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ") {
		http.Error(w, "want a signed GetCallerIdentity", http.StatusBadRequest)
		return
	}
	key, _, _ := strings.Cut(strings.TrimPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential="), "/")
	w.Header().Set("Content-Type", "text/xml")
	fmt.Fprintf(w, `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>`+
		`<Arn>arn:aws:iam::123456789012:user/%s</Arn><UserId>%s</UserId><Account>123456789012</Account></GetCallerIdentityResult></GetCallerIdentityResponse>`, key, key)
}

// bucket keeps what is put into it: objects, and lists of them. Nothing is signed for, or encrypted.
type bucket struct {
	mu      sync.Mutex
	objects map[string][]byte
}

func (b *bucket) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := strings.TrimPrefix(r.URL.Path, "/")
	b.mu.Lock()
	defer b.mu.Unlock()
	switch object, ok := b.objects[key]; {
	case r.Method == http.MethodPut && key != "":
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		b.objects[key] = body
	case key == "" && r.URL.Query().Get("list-type") == "2":
		type content struct {
			Key          string
			LastModified string
			Size         int
		}
		list := struct {
			XMLName     xml.Name `xml:"ListBucketResult"`
			IsTruncated bool
			Contents    []content
		}{}
		for k, o := range b.objects {
			list.Contents = append(list.Contents, content{k, "2026-01-02T03:04:05.000Z", len(o)})
		}
		slices.SortFunc(list.Contents, func(a, b content) int { return strings.Compare(a.Key, b.Key) })
		w.Header().Set("Content-Type", "application/xml")
		xml.NewEncoder(w).Encode(list)
	case !ok:
		w.WriteHeader(http.StatusNotFound)
	default:
		w.Header().Set("Content-Length", strconv.Itoa(len(object)))
		w.Header().Set("Last-Modified", time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Format(http.TimeFormat))
		w.Header().Set("ETag", `"1"`)
		if r.Method == http.MethodGet {
			w.Write(object)
		}
	}
}
