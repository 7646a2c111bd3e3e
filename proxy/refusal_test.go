package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"
)

// ask sends raw bytes and reads the answer; "" is a connection that was ended without one.
func ask(t testing.TB, c *net.TCPConn, raw string) (status int, body string) {
	t.Helper()
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(iotest.OneByteReader(c)), nil) // not a byte of the tunnel is taken
	if err != nil {
		return 0, ""
	}
	if resp.StatusCode == http.StatusOK {
		return resp.StatusCode, "" // the body is the caller's
	}
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

// Curl, Go and Python show no body of an answer to CONNECT, but its status line or its headers.
func TestARefusalIsNamedInItsHead(t *testing.T) {
	l := startLab(t, openConfig())
	plain := regexp.MustCompile(`^[A-Z2-7]{10}$`) // whatever the client wrote
	for _, raw := range []string{
		"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: 169.254.169.254:80\r\n\r\n",
		"CONNECT \x1b[2J%0d%0aX-Evil:1 HTTP/1.1\r\n\r\n",
		"CONNECT a\tb HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET http://169.254.169.254/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
	} {
		c := l.from("10.77.0.2")
		io.WriteString(c, raw)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		a := l.next()
		id, why := resp.Header.Get("X-Perimeter-Id"), resp.Header.Get("X-Perimeter-Reason")
		if id != a.ID || !plain.MatchString(id) || why != string(a.Decision.Reason) {
			t.Errorf("%q: id %q, reason %q, logged %+v", raw, id, why, a)
		}
		if want := strconv.Itoa(a.Status) + " " + http.StatusText(a.Status) + ": " + why + ", id " + id; strings.HasPrefix(raw, "CONNECT") && resp.Status != want {
			t.Errorf("%q: status line %q, want %q", raw, resp.Status, want)
		}
	}
	host, _ := origin(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Perimeter-Reason", "allowed")
		w.Header().Set("X-Perimeter-Id", "AAAAAAAAAA")
	})
	c := l.from("10.77.0.2")
	io.WriteString(c, "GET http://"+host+"/ HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 200 || resp.Header.Get("X-Perimeter-Id")+resp.Header.Get("X-Perimeter-Reason") != "" {
		t.Errorf("an origin speaks for the proxy: %v, %v", resp, err)
	}
}

func TestRefusals(t *testing.T) {
	l := startLab(t, openConfig())
	reached := make(chan string, 100)
	heard := func(c *net.TCPConn) { reached <- c.LocalAddr().String() }
	for _, host := range []string{metadataHost, privateHost} {
		serveOutside(t, host+":80", heard)
	}
	connect := func(target string) string { return "CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n\r\n" }
	get := func(url string) string { return "GET " + url + " HTTP/1.1\r\nHost: www.lab.test\r\n\r\n" }
	_, port, _ := net.SplitHostPort(l.addr)
	for _, tt := range []struct {
		name, raw string
		status    int
		reason    Reason
	}{
		{"metadata", connect("169.254.169.254:80"), 403, Metadata},
		{"metadata, plain", "PUT http://169.254.169.254/latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 0\r\n\r\n", 403, Metadata},
		{"metadata by IPv6", connect("[fd00:ec2::254]:80"), 403, Metadata},
		{"container credentials", connect("169.254.170.2:80"), 403, Metadata},
		{"unspecified", connect("0.0.0.0:443"), 403, Unspecified},
		{"no host", connect(":80"), 400, BadDestination},
		{"star", connect("*:443"), 400, BadDestination},
		{"mapped", connect("[::ffff:169.254.169.254]:80"), 403, Metadata},
		{"mapped, in hexadecimal", connect("[::ffff:a9fe:a9fe]:80"), 403, Metadata},
		{"NAT64", connect("[64:ff9b::a9fe:a9fe]:80"), 403, Metadata},
		{"local NAT64", connect("[64:ff9b:1::a9fe:a9fe]:80"), 403, Metadata},
		{"6to4", connect("[2002:a9fe:a9fe::]:80"), 403, Metadata},
		{"Teredo", connect("[2001:0:7f00:1::1]:80"), 403, Loopback},
		{"Teredo's client", connect("[2001:0:808:808::5601:5601]:80"), 403, Metadata},
		{"ISATAP", connect("[2600::5efe:7f00:1]:80"), 403, Loopback},
		{"IPv4-compatible", connect("[::7f00:1]:80"), 403, Loopback},
		{"loopback", connect("127.0.0.1:80"), 403, Loopback},
		{"loopback by IPv6", connect("[::1]:80"), 403, Loopback},
		{"loopback by name", connect("localhost:80"), 403, NoRule},
		{"unspecified by IPv6", connect("[::]:80"), 403, Unspecified},
		{"private", connect("192.168.50.5:80"), 403, Private},
		{"unique local", connect("[fd12::1]:80"), 403, Private},
		{"shared", connect("100.64.1.1:80"), 403, Shared},
		{"multicast", connect("224.0.0.1:80"), 403, Multicast},
		{"broadcast", connect("255.255.255.255:80"), 403, Multicast},
		{"benchmarking", connect("198.19.0.1:80"), 403, Reserved},
		{"class E", connect("240.0.0.1:80"), 403, Reserved},
		{"zone", connect("[fe80::1%25lo]:80"), 400, BadDestination},
		{"one number", connect("2130706433:80"), 400, BadDestination},
		{"hexadecimal", connect("0x7f.1:80"), 400, BadDestination},
		{"octal", connect("0177.0.0.1:80"), 400, BadDestination},
		{"short", connect("127.1:80"), 400, BadDestination},
		{"circled digits", connect("①②⑦.0.0.1:80"), 400, BadDestination},
		{"fullwidth digits", connect("１２７.0.0.1:80"), 400, BadDestination},
		{"ideographic dots", connect("127。0。0。1:80"), 400, BadDestination},
		{"the proxy itself", connect(l.addr), 403, Private},
		{"the bastion's other address", connect("198.18.0.1:" + port), 403, OwnAddress},
		{"a name for the bastion", connect("self.lab.test:" + port), 403, OwnAddress},
		{"a name for a private address", connect("private.lab.test:80"), 403, Private},
		{"a name for metadata", connect("meta.lab.test:80"), 403, Metadata},
		{"no such name", connect("none.lab.test:80"), 502, DNSNotFound},
		{"prefix lookalike", connect("evillab.test:443"), 403, NoRule},
		{"suffix lookalike", connect("www.lab.test.evil:443"), 403, NoRule},
		{"the apex", connect("lab.test:443"), 403, NoRule},
		{"user information", connect("ok:443@169.254.169.254:80"), 400, BadDestination},
		{"path for a target", "CONNECT /x HTTP/1.1\r\nHost: www.lab.test\r\n\r\n", 400, BadDestination},
		{"no port", connect("www.lab.test"), 400, BadDestination},
		{"leading zero", connect("www.lab.test:0443"), 400, BadDestination},
		{"large port", connect("www.lab.test:99999"), 400, BadDestination},
		{"port zero", connect("www.lab.test:0"), 400, BadDestination},
		{"signed port", connect("www.lab.test:+80"), 400, BadDestination},
		{"another Host", "CONNECT www.lab.test:443 HTTP/1.1\r\nHost: evil.test\r\n\r\n", 400, BadDestination},
		{"another port in Host", "CONNECT www.lab.test:443 HTTP/1.1\r\nHost: www.lab.test:80\r\n\r\n", 400, BadDestination},
		{"another Host, plain", "GET http://www.lab.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n", 400, BadDestination},
		{"two Hosts", "CONNECT www.lab.test:443 HTTP/1.1\r\nHost: www.lab.test:443\r\nHost: www.lab.test:443\r\n\r\n", 400, Malformed},
		{"no Host", "CONNECT www.lab.test:443 HTTP/1.1\r\n\r\n", 400, Malformed},
		{"no Host, plain", "GET http://www.lab.test/ HTTP/1.1\r\n\r\n", 400, Malformed},
		{"a body", "CONNECT www.lab.test:443 HTTP/1.1\r\nHost: www.lab.test:443\r\nContent-Length: 3\r\n\r\nabc", 400, Malformed},
		{"a chunked body", "CONNECT www.lab.test:443 HTTP/1.1\r\nHost: www.lab.test:443\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, Malformed},
		{"bare LF", "CONNECT www.lab.test:443 HTTP/1.1\nHost: www.lab.test:443\n\n", 400, Malformed},
		{"bare LF at the end", "GET http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\n\n", 400, Malformed},
		{"bare CR", "GET http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\rX: y\r\n\r\n", 400, Malformed},
		{"https", get("https://www.lab.test/"), 403, BadScheme},
		{"ftp", get("ftp://www.lab.test/"), 403, BadScheme},
		{"user information in a URL", get("http://user:pw@www.lab.test/"), 400, BadDestination},
		{"a user's name in a URL", get("http://user@www.lab.test/"), 400, BadDestination},
		{"backslash", get(`http://www.lab.test\@169.254.169.254/`), 400, BadDestination},
		{"fragment", get("http://www.lab.test#@169.254.169.254/"), 400, BadDestination},
		{"origin form", get("/"), 400, BadDestination},
		{"asterisk form", "OPTIONS * HTTP/1.1\r\nHost: www.lab.test\r\n\r\n", 400, BadDestination},
		{"CL.TE", "POST http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, Malformed},
		{"TE.CL", "POST http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400, Malformed},
		{"an odd coding", "POST http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nTransfer-Encoding: xchunked\r\n\r\n", 400, Malformed},
		{"two codings", "POST http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, Malformed},
		{"two lengths", "POST http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", 400, Malformed},
		{"a list of lengths", "POST http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nContent-Length: 0, 0\r\n\r\n", 400, Malformed},
		{"a signed length", "POST http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nContent-Length: +0\r\n\r\n", 400, Malformed},
		{"space before the colon", "GET http://www.lab.test/ HTTP/1.1\r\nHost : www.lab.test\r\n\r\n", 400, Malformed},
		{"folded line", "GET http://www.lab.test/ HTTP/1.1\r\nHost: www.lab.test\r\nX: a\r\n b\r\n\r\n", 400, Malformed},
		{"escaped line break", connect("www.lab.test%0d%0aX:443"), 400, BadDestination},
		{"escaped line break in a URL", get("http://www.lab.test%0d%0a/"), 400, BadDestination},
		{"ESC in a name", connect("www\x1b[31m.lab.test:443"), 400, Malformed},
		{"NUL in a header", "CONNECT www.lab.test:443 HTTP/1.1\r\nHost: www.lab.test:443\r\nX: \x00\r\n\r\n", 400, Malformed},
		{"two spaces", "CONNECT  www.lab.test:443 HTTP/1.1\r\nHost: www.lab.test:443\r\n\r\n", 400, Malformed},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\n", 400, Malformed},
		{"HTTP/0.9", "GET http://www.lab.test/\r\n\r\n", 400, Malformed},
		{"bad escape in a path", get("http://www.lab.test/%zz"), 400, Malformed},
		{"not HTTP", "\x16\x03\x01\x02\x00\x01", 400, Malformed},
		{"a large head", "GET http://www.lab.test/ HTTP/1.1\r\nX: " + strings.Repeat("a", maxHead) + "\r\n\r\n", 431, HeadTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l.t = t
			c := l.from("10.77.0.2")
			status, body := ask(t, c, tt.raw)
			a := l.next()
			if status != tt.status || a.Decision.Reason != tt.reason || a.Decision.Allow && status < 500 {
				t.Errorf("status %d, %+v; want %d, %s; %q", status, a.Decision, tt.status, tt.reason, body)
			}
			if !strings.Contains(body, string(tt.reason)) || !strings.Contains(body, a.ID) {
				t.Errorf("the answer names neither reason nor id: %q", body)
			}
			if a.Status != status || a.User != "alice" {
				t.Errorf("logged %+v", a)
			}
			if !strings.HasPrefix(tt.raw, "CONNECT") {
				return
			}
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the refused connection did not end properly: %v", err)
			}
		})
	}
	l.t = t
	select {
	case a := <-reached:
		t.Errorf("%s was reached", a)
	default:
	}
	select {
	case a := <-l.seen:
		t.Errorf("more than one line a request: %+v", a)
	default:
	}
	if strings.Contains(l.logged(), "pw") {
		t.Error("a password in the log")
	}
	for _, b := range []byte(l.logged()) {
		if b != '\n' && (b < ' ' || b > 0x7e) {
			t.Fatalf("byte %#x in the log", b)
		}
	}
	for _, m := range l.lines() {
		for _, k := range []string{"id", "user", "session", "device", "source", "method", "destination", "decision", "reason", "rule", "status", "duration_ms"} {
			if _, ok := m[k]; !ok {
				t.Fatalf("no %q in %v", k, m)
			}
		}
	}
}

func TestSpellingsOfAnAllowedNameAreOne(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.WriteString(c, "hi") })
	p := ":" + strconv.Itoa(int(at.Port()))
	for _, raw := range []string{
		"CONNECT WWW.Lab.TEST." + p + " HTTP/1.1\r\nHost: www.lab.test" + p + "\r\n\r\n",
		"CONNECT www.lab.test" + p + " HTTP/1.1\r\nHost: WWW.lab.test\r\n\r\n",
		"CONNECT www.lab.test" + p + " HTTP/1.0\r\n\r\n",
		"CONNECT ｗｗｗ.lab.test" + p + " HTTP/1.0\r\n\r\n",
	} {
		c := l.from("10.77.0.2")
		if status, body := ask(t, c, raw); status != 200 {
			t.Errorf("%q: %d %s", raw, status, body)
			continue
		}
		c.Close()
		if a := l.next(); a.Destination.String() != "www.lab.test"+p || a.Dialed != at {
			t.Errorf("%q: logged %v, dialed %v", raw, a.Destination, a.Dialed)
		}
	}
}

func TestOnlyJudgedAddressesAreDialed(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	p := ":" + strconv.Itoa(int(at.Port()))
	serveOutside(t, privateHost+p, func(*net.TCPConn) { t.Error("the private address was dialed") })
	serveOutside(t, metadataHost+p, func(*net.TCPConn) { t.Error("the metadata address was dialed") })
	for _, name := range []string{"mixed.lab.test", "rebind.lab.test"} {
		c := l.from("10.77.0.2")
		if status, body := ask(t, c, "CONNECT "+name+p+" HTTP/1.0\r\n\r\n"); status != 200 {
			t.Fatalf("%s: %d %s", name, status, body)
		}
		c.Close()
		if a := l.next(); a.Dialed != at {
			t.Errorf("%s: dialed %v", name, a.Dialed)
		}
	}
	// The name has moved on: the next request resolves it anew, and is refused.
	if status, _ := ask(t, l.from("10.77.0.2"), "CONNECT rebind.lab.test"+p+" HTTP/1.0\r\n\r\n"); status != 403 {
		t.Errorf("after rebinding: %d", status)
	}
}

func TestOneSilentAddressDoesNotDelayTheOther(t *testing.T) {
	l := startLab(t, openConfig())
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	began := time.Now()
	if status, _ := ask(t, l.from("10.77.0.2"), "CONNECT slow.lab.test:"+strconv.Itoa(int(at.Port()))+" HTTP/1.0\r\n\r\n"); status != 200 {
		t.Fatal(status)
	}
	if d := time.Since(began); d < dialStagger || d >= dialTimeout {
		t.Errorf("connected after %v, want about %v", d, dialStagger)
	}
}

func TestADenyRuleByAddressCatchesNames(t *testing.T) {
	cfg := openConfig()
	cfg.Rules = append(cfg.Rules, Rule{Deny: []string{outsideSecond + "/32"}})
	l := startLab(t, cfg)
	for _, target := range []string{"denied.lab.test:80", outsideSecond + ":80"} {
		if status, _ := ask(t, l.from("10.77.0.2"), "CONNECT "+target+" HTTP/1.0\r\n\r\n"); status != 403 {
			t.Errorf("%s: %d", target, status)
		}
		if a := l.next(); a.Decision.Reason != DeniedByRule || a.Decision.Rule != 2 {
			t.Errorf("%s: %+v", target, a.Decision)
		}
	}
}

func TestOthersGetNothing(t *testing.T) {
	l := startLab(t, openConfig())
	if status, _ := ask(t, l.from("10.77.0.3"), "CONNECT www.lab.test:80 HTTP/1.0\r\n\r\n"); status != 403 {
		t.Errorf("another group: %d", status)
	}
	if a := l.next(); a.Decision.Reason != NoRule || a.User != "bob" {
		t.Errorf("logged %+v", a)
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("10.77.0.1")}} // no session
	c, err := d.Dial("tcp", l.addr)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("without a session: %v, want a reset", err)
	}
	if a := l.next(); a.Decision.Reason != NoSession || a.Decision.Allow {
		t.Errorf("logged %+v", a)
	}
}

func TestPrefersJSON(t *testing.T) {
	for accept, want := range map[string]bool{
		"": false, "*/*": false, "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8": false,
		"application/json": true, "APPLICATION/JSON; charset=utf-8": true, "application/json, text/plain, */*": true, "application/problem+json": true,
		"text/html, application/json": false, "text/html;q=0.5, application/json": true, "application/json;q=0.1, text/plain;q=0.2": false,
		"application/json;q=0": false, "application/json;q=x": true, "application/json;q=NaN, text/html;q=0.1": true, "jsonp, image/json": false,
	} {
		if got := prefersJSON(accept); got != want {
			t.Errorf("%q: %v", accept, got)
		}
	}
}

func TestRefusalIsReadByPeople(t *testing.T) {
	l := startLab(t, openConfig())
	_, body := ask(t, l.from("10.77.0.2"), "CONNECT evil.test:443 HTTP/1.0\r\n\r\n")
	id := l.next().ID
	want := "evil.test:443 was not let through by the proxy (perimeterd).\n\nNo rule allows you this destination. Ask the operator to add it.\n\n" +
		"reason  no-rule\nuser    alice\nid      " + id + "\n\nThe operator finds it with: perimeterd why " + id + "\n"
	if body != want {
		t.Errorf("got\n%s\nwant\n%s", body, want)
	}
}

func TestRefusalIsJSONForThoseWhoAsk(t *testing.T) {
	l := startLab(t, openConfig())
	_, body := ask(t, l.from("10.77.0.2"), "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\nAccept: application/json\r\n\r\n")
	want := `{"error":{"code":"no-rule","message":"` + NoRule.Sentence() + `","destination":"evil.test:443","user":"alice","id":"` + l.next().ID + `"}}` + "\n"
	if body != want {
		t.Errorf("got %s, want %s", body, want)
	}
}

func TestRefusalReachesAClientThatSentEarly(t *testing.T) {
	l := startLab(t, openConfig())
	status, _ := ask(t, l.from("10.77.0.2"), "CONNECT evil.test:443 HTTP/1.0\r\n\r\n"+strings.Repeat("early", 20000))
	if status != 403 {
		t.Errorf("status %d", status)
	}
}

func TestSlowHeadIsCutOff(t *testing.T) {
	l := startLab(t, openConfig())
	c, silent, kept := l.from("10.77.0.2"), l.from("10.77.0.2"), l.from("10.77.0.2")
	host, _ := origin(t, func(http.ResponseWriter, *http.Request) {})
	raw := "GET http://" + host + "/ HTTP/1.1\r\nHost: " + host + "\r\n\r\n"
	if status, _ := ask(t, kept, raw); status != 200 {
		t.Fatal(status)
	}
	l.next()
	kept.SetDeadline(time.Now().Add(2 * time.Minute))
	stopped := make(chan struct{})
	go func() { // the second head in drops, never silent for long
		for _, b := range []byte(raw[:len(raw)-2] + "X: " + strings.Repeat("a", 100)) {
			kept.Write([]byte{b})
			select {
			case <-stopped:
				return
			case <-time.After(time.Second):
			}
		}
	}()
	io.WriteString(c, "CONNECT www.lab")
	began := time.Now()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != http.StatusRequestTimeout {
		t.Fatalf("%v, %v", resp, err)
	}
	if d := time.Since(began); d < headTimeout-time.Second {
		t.Errorf("after %v", d)
	}
	resp, err = http.ReadResponse(bufio.NewReader(kept), nil)
	close(stopped)
	if err != nil || resp.StatusCode != http.StatusRequestTimeout {
		t.Fatalf("on a kept connection: %v, %v", resp, err)
	}
	for range 2 {
		if a := l.next(); a.Decision.Reason != HeadTimeout {
			t.Errorf("logged %+v", a)
		}
	}
	if _, err := silent.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a silent connection: %v", err)
	}
}

func TestAUserHasSoManyConnections(t *testing.T) {
	cfg := openConfig()
	cfg.PerUserConnections = 3
	l := startLab(t, cfg)
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	raw := "CONNECT " + at.String() + " HTTP/1.0\r\n\r\n"
	var open []*net.TCPConn
	for range 3 {
		c := l.from("10.77.0.2")
		if status, _ := ask(t, c, raw); status != 200 {
			t.Fatal(status)
		}
		open = append(open, c)
	}
	fourth := l.from("10.77.0.2")
	if status, _ := ask(t, fourth, raw); status != http.StatusTooManyRequests {
		t.Errorf("the fourth: %d", status)
	}
	fourth.Close()
	l.people.put("10.77.0.3", "bob", "operators")
	if status, _ := ask(t, l.from("10.77.0.3"), raw); status != 200 {
		t.Errorf("another user: %d", status)
	}
	open[0].Close()
	eventually(t, "two connections", func() bool { return l.Connections(l.alice.ID) == 2 })
	if status, _ := ask(t, l.from("10.77.0.2"), raw); status != 200 {
		t.Errorf("after one has gone: %d", status)
	}
}

func TestAllUsersTogetherHaveSoManyConnections(t *testing.T) {
	cfg := openConfig()
	cfg.Connections = 2
	l := startLab(t, cfg)
	l.people.put("10.77.0.3", "bob", "operators")
	at := serveOutside(t, outsideHost+":0", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	raw := "CONNECT " + at.String() + " HTTP/1.0\r\n\r\n"
	first := l.from("10.77.0.2")
	for _, c := range []*net.TCPConn{first, l.from("10.77.0.3")} {
		if status, _ := ask(t, c, raw); status != 200 {
			t.Fatal(status)
		}
	}
	if status, _ := ask(t, l.from("10.77.0.3"), raw); status != http.StatusServiceUnavailable {
		t.Errorf("the third: %d", status)
	}
	if a := l.next(); a.Decision.Reason != Full || a.Decision.Allow || a.User != "bob" {
		t.Errorf("logged %+v", a)
	}
	eventually(t, "two connections", func() bool { return l.Live() == 2 })
	// Some are still told so; those after them are not heard.
	for range excess {
		l.from("10.77.0.3")
	}
	eventually(t, "all of them accepted", func() bool { return l.Live() == 2+excess })
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("10.77.0.3")}}
	c, err := d.Dial("tcp", l.addr)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one more: %v", err)
	}
	cfg.Connections = 3 + excess
	if err := l.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if status, _ := ask(t, l.from("10.77.0.2"), raw); status != 200 {
		t.Errorf("with room: %d", status)
	}
}
