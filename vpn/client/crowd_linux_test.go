package client

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// crowd opens connections whose sockets are another user's.
func crowd(t *testing.T, to string, count int) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		unix.SetfsuidRetUid(65534)
		for range count {
			c, err := net.Dial("tcp4", to)
			if err != nil {
				done <- err
				return
			}
			t.Cleanup(func() { c.Close() })
		}
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestStrangersTakeNoPlacesOfTheOwner(t *testing.T) {
	for _, asked := range []bool{false, true} {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := newLocal(l, &Keeper{Options: Options{Log: slog.New(slog.DiscardHandler)}}, asked)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { s.run(ctx); close(ended) }()
		crowd(t, l.Addr().String(), localConnections+localGuests+localStrangers)
		proxy, err := url.Parse(s.url)
		if err != nil {
			t.Fatal(err)
		}
		tr := &http.Transport{Proxy: http.ProxyURL(proxy), DisableKeepAlives: true}
		resp, err := (&http.Client{Transport: tr}).Get("http://cloud.example/")
		if err != nil {
			t.Errorf("asked for its credential, %v: the owner is turned away: %v", asked, err)
		} else {
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("asked for its credential, %v: %s %s", asked, resp.Status, text)
			}
		}
		cancel()
		<-ended
	}
}
