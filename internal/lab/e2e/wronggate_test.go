package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/prometheus/procfs"

	"perimeterd/internal/lab"
	"perimeterd/vpn/client"
	"perimeterd/vpn/client/clienttest"
)

// answer reads a request and says this.
func answer(status, header, body string) func(net.Conn) {
	return func(c net.Conn) {
		if req, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
			return
		} else {
			io.Copy(io.Discard, req.Body)
		}
		fmt.Fprintf(c, "HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s", status, len(body), header, body)
	}
}

// endless says begin, and then the same again and again.
func endless(begin, again string) func(net.Conn) {
	return func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
			return
		}
		io.WriteString(c, begin)
		for _, err := io.WriteString(c, again); err == nil; _, err = io.WriteString(c, again) {
		}
	}
}

func silent(c net.Conn) { io.Copy(io.Discard, c) }

const aSession = `{"id":"00112233445566778899aabbccddeeff","user":"alice","address":"10.77.0.2/32","server_public_key":"%s","endpoint":"198.18.1.20:1194",` +
	`"preshared_key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","proxy":"%s","console":"10.77.0.1:80","mtu":%d,"keepalive":25,"expires":"2030-01-01T00:00:00Z","post_quantum":true}`

// Whatever a gate answers, the client says in a sentence what it met and what to do, in time and in bounded memory, and leaves
// nothing behind.
func TestWrongGateIsSaidAndNothingIsLeft(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	l := lab.Start(t, lab.Options{})
	host, err := l.AddHost(ctx, "gate")
	if err != nil {
		t.Fatal(err)
	}
	gate, err := clienttest.NewGate()
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := clienttest.NewGate()
	if err != nil {
		t.Fatal(err)
	}
	p, err := gate.Profile("alice", host.Addr.String()+":1194", 1194, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	key := p.ServerPublicKey
	text, err := toml.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(l.Dir, "alice.profile")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	alice, err := l.NewUser(ctx, l.Client, file)
	if err != nil {
		t.Fatal(err)
	}
	ours := gate.Authenticated
	for _, tt := range []struct {
		name string
		talk func(net.Conn)
		want string
		code string // of `vpn doctor`; empty: not asked
	}{
		{"another protocol", func(c net.Conn) { io.WriteString(c, "SSH-2.0-OpenSSH_9.2p1\r\n") }, "what answers there does not speak TLS", client.CodeGateOther},
		{"plain HTTP", func(c net.Conn) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n") }, "what answers there does not speak TLS", client.CodeGateOther},
		{"hangs up", func(net.Conn) {}, "closed the connection", client.CodeGateOther},
		{"takes connections and says nothing", silent, "takes connections, and says nothing", client.CodeGateSilent},
		{"another CA", foreign.Authenticated(silent), "another gate than this profile's", client.CodeGateOther},
		{"TLS 1.2", gate.Old(silent), "TLS 1.3", client.CodeGateOther},
		{"hangs up after TLS", ours(func(net.Conn) {}), "closed the connection", ""},
		{"never answers", ours(silent), "gave no answer in time", client.CodeGateSilent},
		{"garbage after TLS", ours(func(c net.Conn) { io.WriteString(c, "\x00\xff\x17 what?\r\n\r\n") }), "not an answer in HTTP", client.CodeGateOther},
		{"a head without end", ours(endless("HTTP/1.1 201 Created\r\n", "X-More: "+strings.Repeat("x", 8000)+"\r\n")), "longer than", client.CodeGateOther},
		{"a line without end", ours(endless("HTTP/1.1 201 Created\r\nX-More: ", strings.Repeat("x", 8000))), "longer than", ""},
		{"a body without end", ours(endless("HTTP/1.1 201 Created\r\n\r\n", strings.Repeat(" ", 8000))), "longer than", ""},
		{"interim answers without end", ours(endless("", "HTTP/1.1 103 Early Hints\r\n\r\n")), "longer than|answered 103", ""},
		{"half a body", ours(answer("201 Created\r\nTransfer-Encoding: chunked", "", "{")), "broke off", ""},
		{"a page", ours(answer("200 OK", "Content-Type: text/html\r\n", "<html>Sign in to the network</html>")), "not understood", client.CodeGateOther},
		{"a redirect", ours(answer("302 Found", "Location: https://portal.example/\r\n", "")), "302 Found", ""},
		{"another type", ours(answer("201 Created", "", `{"id":7}`)), "not understood", ""},
		{"null", ours(answer("201 Created", "", "null")), `session id ""`, ""},
		{"a proxy in the open", ours(answer("201 Created", "", fmt.Sprintf(aSession, key, "198.51.100.1:3128", 1400))), "proxy 198.51.100.1:3128 is not on a private address", ""},
		{"an MTU of nothing", ours(answer("201 Created", "", fmt.Sprintf(aSession, key, "10.77.0.1:3128", 7))), "mtu 7 is not between", ""},
		{"a session, and then it knows nobody", ours(answer("201 Created", "", fmt.Sprintf(aSession, key, "10.77.0.1:3128", 1400))), "UDP port 1194", ""},
		{"full", ours(answer("503 Service Unavailable", "Retry-After: 60\r\n", `{"error":{"code":"session_limit","message":"5000 sessions are live","fix":"try again later"}}`)), "5000 sessions are live: try again later", client.CodeRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			serving, stop := context.WithCancel(ctx)
			defer stop()
			listener, err := host.Listen("tcp", ":1194")
			for range 100 { // the one before is on its way out
				if err == nil {
					break
				}
				time.Sleep(50 * time.Millisecond)
				listener, err = host.Listen("tcp", ":1194")
			}
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() { clienttest.ServeWrong(serving, listener, tt.talk); close(ended) }()
			defer func() { stop(); <-ended }()
			args := []string{"up", "--timeout", "4s"}
			if strings.HasSuffix(tt.name, "without end") {
				args = append(args, "--foreground") // whose memory is looked at
			}
			up := alice.VPN(ctx, args...)
			var text bytes.Buffer
			up.Stdout, up.Stderr = &text, &text
			if err := up.Start(); err != nil {
				t.Fatal(err)
			}
			peak := peakMemory(up.Process.Pid)
			err = up.Wait()
			out, used := text.Bytes(), peak()
			last := strings.TrimSpace(string(out))
			last = last[strings.LastIndexByte(last, '\n')+1:]
			matched := false
			for _, w := range strings.Split(tt.want, "|") {
				matched = matched || strings.Contains(last, w)
			}
			if err == nil || up.ProcessState.ExitCode() != 1 || !matched || !strings.HasPrefix(last, "vpn: ") || len(last) > 600 {
				t.Errorf("%v: it says %q, and not %q\n%s", err, last, tt.want, out)
			} else {
				t.Log(last)
			}
			if used > 64<<20 {
				t.Errorf("it took %d KiB", used>>10)
			}
			if tt.code != "" {
				var r client.Report
				out, _ := alice.VPN(ctx, "doctor", "--json").Output()
				if err := json.Unmarshal(out, &r); err != nil || r.Healthy || !slices.ContainsFunc(r.Findings, func(f client.Finding) bool { return f.Code == tt.code }) {
					t.Errorf("the doctor does not say %s: %s", tt.code, out)
				}
			}
			links, _ := l.Client.Command(ctx, "ip", "-br", "link").CombinedOutput()
			status, _ := alice.VPN(ctx, "status").CombinedOutput()
			if strings.Contains(string(links), "pvpn") || !strings.Contains(string(status), "tunnel       down") {
				t.Errorf("left behind:\n%s%s", links, status)
			}
		})
	}
}

// peakMemory follows a process until it ended, and then gives what it took of memory, bytes. Its rusage begins with that of the
// process that forked it.
func peakMemory(pid int) func() uint64 {
	peak := make(chan uint64, 1)
	go func() {
		var most uint64
		defer func() { peak <- most }()
		p, err := procfs.NewProc(pid)
		for ; err == nil; time.Sleep(5 * time.Millisecond) {
			var s procfs.ProcStatus
			if s, err = p.NewStatus(); err == nil {
				if s.VmHWM == 0 { // it ended and is not waited for yet
					return
				}
				most = max(most, s.VmHWM)
			}
		}
	}()
	return func() uint64 { return <-peak }
}
