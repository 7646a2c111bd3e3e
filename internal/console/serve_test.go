package console

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

func listening(t *testing.T, sets Sets) (address string) {
	t.Helper()
	_, reg := newMetrics(t, sets)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, l, reg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("serve: ", err)
		}
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			c.Close()
			t.Error("the listener outlives its context")
		}
	})
	return l.Addr().String()
}

func ask(t *testing.T, method, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	reply, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer reply.Body.Close()
	body, err := io.ReadAll(reply.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply.StatusCode, string(body)
}

func TestServeAnswersScrapesAndNothingElse(t *testing.T) {
	url := "http://" + listening(t, &table{fill: map[string]Fill{"open4": {1, 4}}})
	status, body := ask(t, http.MethodGet, url+"/metrics")
	for _, want := range []string{"\nperimeterd_set_fill_ratio{set=\"open4\"} 0.25\n", "\nperimeterd_build_info{go_version=\"go", "\ngo_goroutines ", "\nprocess_open_fds "} {
		if status != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%d, and no %q in\n%s", status, want, body)
		}
	}
	for _, r := range []struct {
		method, path string
		status       int
	}{
		{http.MethodGet, "/", http.StatusNotFound}, {http.MethodGet, "/metrics/x", http.StatusNotFound},
		{http.MethodGet, "/debug/pprof/", http.StatusNotFound}, {http.MethodPost, "/metrics", http.StatusMethodNotAllowed},
	} {
		if status, _ := ask(t, r.method, url+r.path); status != r.status {
			t.Errorf("%s %s: %d, want %d", r.method, r.path, status, r.status)
		}
	}
}

func TestScrapeWithoutTheTableHasTheRest(t *testing.T) {
	url := "http://" + listening(t, &table{err: errors.New("no table")}) + "/metrics"
	ask(t, http.MethodGet, url)
	status, body := ask(t, http.MethodGet, url)
	if status != http.StatusOK || !strings.Contains(body, "\nperimeterd_sessions_live 0\n") || strings.Contains(body, "fill_ratio{") ||
		!strings.Contains(body, "promhttp_metric_handler_errors_total{cause=\"gathering\"} 1\n") {
		t.Errorf("%d\n%s", status, body)
	}
}

func TestServeNamesTheKeyOfAnAddressItCannotHave(t *testing.T) {
	_, reg := newMetrics(t, &table{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := Serve(t.Context(), l.Addr().String(), reg); err == nil || !strings.Contains(err.Error(), `console.metrics "`+l.Addr().String()+`": `) {
		t.Errorf("Serve: %v", err)
	}
}
