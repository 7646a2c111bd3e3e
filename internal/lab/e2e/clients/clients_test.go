package clients

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"perimeterd/internal/lab"
)

const rules = `
[[proxy.rule]]
allow  = ["registry.npmjs.org", "*.aws.amazon.com"]
ports  = [443]
groups = ["*"]
tls    = true

[[proxy.rule]]
allow  = ["plain.example.com"]
ports  = [80]
groups = ["*"]

[[proxy.rule]]
allow  = ["others.example.com"]
ports  = [443]
groups = ["others"]
tls    = true
`

// stage is a lab whose cloud stands for AWS, with one user, alice, whose tunnel is up.
type stage struct {
	*lab.Lab
	t      *testing.T
	ctx    context.Context
	daemon *lab.Daemon
	cloud  *lab.CloudHost
	alice  *lab.User
}

func newStage(t *testing.T, settings ...lab.Setting) *stage {
	t.Helper()
	return newStageWith(t, lab.Options{}, lab.CloudOptions{
		Names: []string{"sts.us-east-1.amazonaws.com", "s3.us-east-1.amazonaws.com", "*.s3.us-east-1.amazonaws.com", "console.aws.amazon.com", "registry.npmjs.org",
			"plain.example.com", "evil.example.com", "others.example.com", "x.elb.amazonaws.com"},
		Sites: map[string]http.Handler{
			"sts.us-east-1.amazonaws.com":  http.HandlerFunc(sts),
			"*.s3.us-east-1.amazonaws.com": &bucket{objects: map[string][]byte{}},
			"console.aws.amazon.com":       newPage(),
			"registry.npmjs.org":           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") }),
		},
	}, settings...)
}

func newStageWith(t *testing.T, o lab.Options, cloud lab.CloudOptions, settings ...lab.Setting) *stage {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	s := &stage{Lab: lab.Start(t, o), t: t, ctx: ctx}
	var err error
	if s.cloud, err = s.StartCloud(cloud); err != nil {
		t.Fatal(err)
	}
	if s.daemon, err = s.NewDaemon(ctx, settings...); err != nil {
		t.Fatal(err)
	}
	config, err := os.OpenFile(s.daemon.Config, os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = config.WriteString(rules)
		config.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	profile, err := s.daemon.AddUser(ctx, "alice", "--group", "operators")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.daemon.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", s.daemon.Log())
		}
	})
	if s.alice, err = s.NewUser(ctx, s.Client, profile); err != nil {
		t.Fatal(err)
	}
	s.run(s.alice.VPN(ctx, "up"))
	return s
}

// command is one of alice's, in the environment that `vpn env` makes.
func (s *stage) command(name string, args ...string) *lab.Cmd {
	s.t.Helper()
	c := s.alice.Command(s.ctx, name, args...)
	for line := range strings.Lines(s.run(s.alice.VPN(s.ctx, "env"))) {
		c.Env = append(c.Env, strings.ReplaceAll(strings.TrimPrefix(strings.TrimSpace(line), "export "), "'", ""))
	}
	c.Env = append(c.Env, "AWS_CA_BUNDLE="+s.cloud.CAFile, "SSL_CERT_FILE="+s.cloud.CAFile, "NODE_EXTRA_CA_CERTS="+s.cloud.CAFile, "CURL_CA_BUNDLE="+s.cloud.CAFile,
		"AWS_ACCESS_KEY_ID=AKIAALICE", "AWS_SECRET_ACCESS_KEY=secret", "AWS_REGION=us-east-1", "AWS_EC2_METADATA_DISABLED=true", "AWS_PAGER=", "NO_UPDATE_NOTIFIER=1")
	c.Dir = s.alice.Home
	return c
}

// run runs what must succeed, fails what must not; both return what it printed.
func (s *stage) run(c *lab.Cmd) string {
	s.t.Helper()
	out, err := c.CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", strings.Join(c.Args, " "), err, out)
	}
	return string(out)
}

func (s *stage) fails(c *lab.Cmd) string {
	s.t.Helper()
	out, err := c.CombinedOutput()
	if err == nil {
		s.t.Fatalf("%s succeeded, and must not:\n%s", strings.Join(c.Args, " "), out)
	}
	return string(out)
}

// reached counts what came to a host of the cloud, all of it from the egress address.
func (s *stage) reached(host string) (n int) {
	s.t.Helper()
	for _, r := range s.cloud.Requests() {
		if r.From.Addr() != s.Egress {
			s.t.Errorf("%s was reached from %v", r.Host, r.From)
		}
		if name, _, _ := strings.Cut(r.Host, ":"); name == host {
			n++
		}
	}
	return n
}

const refused = "x.elb.amazonaws.com" // @aws names it, @customer-hosted denies it

func (s *stage) file(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.Dir, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
	return path
}

func TestAWSCommandLine(t *testing.T) {
	s := newStage(t)
	t.Log(s.run(s.command("/usr/bin/aws", "--version")))
	if out := s.run(s.command("/usr/bin/aws", "sts", "get-caller-identity", "--output", "text", "--query", "Arn")); out != "arn:aws:iam::123456789012:user/AKIAALICE\n" {
		t.Errorf("sts: %s", out)
	}
	// Up and down again.
	data := make([]byte, 6<<20)
	chacha := rand.NewChaCha8([32]byte{})
	chacha.Read(data)
	file := s.file("data", string(data))
	s.run(s.command("/usr/bin/aws", "s3", "cp", "--only-show-errors", file, "s3://bucket/dir/data"))
	if out := s.run(s.command("/usr/bin/aws", "s3", "ls", "s3://bucket/dir/")); !strings.Contains(out, "6291456") {
		t.Errorf("ls: %s", out)
	}
	s.run(s.command("/usr/bin/aws", "s3", "cp", "--only-show-errors", "s3://bucket/dir/data", file+".back"))
	if back, err := os.ReadFile(file + ".back"); err != nil || !bytes.Equal(back, data) {
		t.Errorf("%d bytes came back, %v", len(back), err)
	}
	if out := s.fails(s.command("/usr/bin/aws", "--endpoint-url", "https://"+refused, "sts", "get-caller-identity")); !strings.Contains(out, "Failed to connect to proxy URL") {
		t.Errorf("refused: %s", out)
	}
	if s.reached("sts.us-east-1.amazonaws.com") == 0 || s.reached("bucket.s3.us-east-1.amazonaws.com") == 0 || s.reached(refused) != 0 {
		t.Errorf("the cloud saw %+v", s.cloud.Requests())
	}
}

func TestCurl(t *testing.T) {
	s := newStage(t)
	for url, want := range map[string]string{"https://s3.us-east-1.amazonaws.com/": "seen from 198.19.1.10\n", "http://plain.example.com/": "seen from 198.19.1.10\n"} {
		if out := s.run(s.command("curl", "-sS", url)); out != want {
			t.Errorf("%s: %q", url, out)
		}
	}
	if out := s.run(s.command("curl", "-sS", "--http1.1", "-T", s.file("up", strings.Repeat("x", 3_000_000)), "https://s3.us-east-1.amazonaws.com/upload")); out != "got 3000000 bytes\n" {
		t.Errorf("upload: %q", out)
	}
	if out := s.fails(s.command("curl", "-sS", "https://"+refused+"/")); !strings.Contains(out, "403") {
		t.Errorf("refused: %s", out)
	}
	if out := s.run(s.command("curl", "-sS", "http://s3.us-east-1.amazonaws.com/")); !strings.Contains(out, "Ask the operator to add it.") {
		t.Errorf("plain, where it is not allowed: %s", out)
	}
	if s.reached(refused) != 0 {
		t.Error("what is refused was reached")
	}
}

func TestGo(t *testing.T) {
	s := newStage(t)
	client := func() *http.Client {
		tr := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: "10.77.0.1:3128"}), DialContext: s.Client.Dial, ForceAttemptHTTP2: true,
			TLSClientConfig: &tls.Config{RootCAs: s.cloud.CAs}}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr, Timeout: time.Minute}
	}
	for _, target := range []string{"https://s3.us-east-1.amazonaws.com/", "http://plain.example.com/"} {
		c := client()
		for range 3 { // over one connection
			resp, err := c.Get(target)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if string(b) != "seen from 198.19.1.10\n" || err != nil || (resp.ProtoMajor == 2) != strings.HasPrefix(target, "https") {
				t.Errorf("%s: %s %q, %v", target, resp.Proto, b, err)
			}
		}
	}
	if _, err := client().Get("https://" + refused + "/"); err == nil || !strings.Contains(err.Error(), "Forbidden: denied-by-rule") {
		t.Errorf("refused: %v", err)
	}
}

func TestPython(t *testing.T) {
	s := newStage(t)
	get := s.file("get.py", "import sys, urllib.request\nprint(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode(), end='')\n")
	for _, url := range []string{"https://s3.us-east-1.amazonaws.com/", "http://plain.example.com/"} {
		if out := s.run(s.command("/usr/bin/python3", get, url)); out != "seen from 198.19.1.10\n" {
			t.Errorf("%s: %q", url, out)
		}
	}
	if out := s.fails(s.command("/usr/bin/python3", get, "https://"+refused+"/")); !strings.Contains(out, "Tunnel connection failed: 403") {
		t.Errorf("refused: %s", out)
	}
}

func TestNodeAndNPM(t *testing.T) {
	s := newStage(t)
	get := s.file("get.js", `
const http = require("http"), https = require("https"), proxy = new URL(process.env.https_proxy), to = new URL(process.argv[2]);
http.request({host: proxy.hostname, port: proxy.port, method: "CONNECT", path: to.hostname + ":443", headers: {Host: to.hostname + ":443"}})
	.on("connect", (answer, socket) => {
		if (answer.statusCode !== 200) { console.log(answer.statusCode, answer.headers["x-perimeter-reason"]); process.exit(1); }
		https.get(to, {socket, agent: false, servername: to.hostname}, (r) => r.pipe(process.stdout));
	})
	.on("error", (e) => { console.log(e); process.exit(2); })
	.end();
`)
	if out := s.run(s.command("node", get, "https://s3.us-east-1.amazonaws.com/")); out != "seen from 198.19.1.10\n" {
		t.Errorf("%q", out)
	}
	if out := s.fails(s.command("node", get, "https://"+refused+"/")); out != "403 denied-by-rule\n" {
		t.Errorf("refused: %q", out)
	}
	if out := s.run(s.command("npm", "ping", "--cafile", s.cloud.CAFile)); s.reached("registry.npmjs.org") == 0 {
		t.Errorf("npm: %s", out)
	}
}

// newPage is a page that says in its text what a script of its own found: a request, and a WebSocket's echo. The page is
// loaded when a picture has come, which waits for the script.
func newPage() http.Handler {
	mux, said := http.NewServeMux(), make(chan string, 10)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, `<p id="saw">nothing yet</p><img src="/wait"><script>
			fetch("/who").then(r => r.text()).then(who => {
				const ws = new WebSocket("wss://" + location.host + "/echo");
				ws.onopen = () => ws.send("hello");
				ws.onmessage = (m) => { document.getElementById("saw").textContent = who + ", " + m.data; fetch("/done") };
			});
		</script>`)
	})
	// What WebRTC finds out about this machine, with a server to ask that is not behind the proxy.
	mux.HandleFunc("/webrtc", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, `<p id="saw">nothing yet</p><img src="/wait"><script>
			const pc = new RTCPeerConnection({iceServers: [{urls: "stun:198.18.1.1:3478"}]});
			const found = [];
			const end = () => { document.getElementById("saw").textContent = "gathered: " + found.join(" | "); fetch("/done") };
			pc.onicecandidate = (e) => { if (e.candidate && e.candidate.candidate) found.push(e.candidate.candidate); else if (!e.candidate) end() };
			pc.createDataChannel("x");
			pc.createOffer().then(o => pc.setLocalDescription(o));
		</script>`)
	})
	mux.HandleFunc("/who", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "seen from %s", strings.Split(r.RemoteAddr, ":")[0])
	})
	mux.Handle("/echo", websocket.Handler(func(c *websocket.Conn) { io.Copy(c, c) }))
	mux.HandleFunc("/done", func(http.ResponseWriter, *http.Request) { said <- "" })
	mux.HandleFunc("/wait", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-said:
		case <-r.Context().Done():
		}
	})
	return mux
}

func TestChromiumFollowsThePAC(t *testing.T) {
	s := newStage(t)
	database := "sql:" + filepath.Join(s.alice.Home, ".pki/nssdb")
	if err := os.MkdirAll(filepath.Join(s.alice.Home, ".pki/nssdb"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.run(s.alice.Command(s.ctx, "certutil", "-d", database, "-N", "--empty-password"))
	s.run(s.alice.Command(s.ctx, "certutil", "-d", database, "-A", "-n", "cloud", "-t", "C,,", "-i", s.cloud.CAFile))
	pac := strings.TrimSpace(s.run(s.alice.VPN(s.ctx, "pac", "--url")))
	open := func(url string) string {
		t.Helper()
		c := s.alice.Command(s.ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
			"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--user-data-dir="+filepath.Join(s.alice.Home, "chromium"),
			"--proxy-pac-url="+pac, "--timeout=90000", "--dump-dom", url)
		out, err := c.Output()
		if err != nil {
			t.Fatalf("%s: %v", url, err)
		}
		return string(out)
	}
	if page := open("https://console.aws.amazon.com/"); !strings.Contains(page, "seen from 198.19.1.10, hello") {
		t.Errorf("what is allowed:\n%s", page)
	}
	if page := open("https://" + refused + "/"); strings.Contains(page, "seen from") {
		t.Errorf("what is refused:\n%s", page)
	}
	if page := open("http://plain.example.com/"); !strings.Contains(page, "seen from 198.19.1.10") {
		t.Errorf("what is allowed without TLS:\n%s", page)
	}
	// What the PAC does not name goes its own way, of which this client has none.
	if page := open("https://evil.example.com/"); strings.Contains(page, "seen from") {
		t.Errorf("what no rule names:\n%s", page)
	}
	if s.reached("console.aws.amazon.com") == 0 || s.reached(refused) != 0 || s.reached("evil.example.com") != 0 {
		t.Errorf("the cloud saw %+v", s.cloud.Requests())
	}
	asked := 0
	for _, e := range s.daemon.Entries("proxy") {
		switch to, _, _ := strings.Cut(e["destination"].(string), ":"); to {
		case refused:
			if asked++; e["decision"] != "deny" || e["reason"] != "denied-by-rule" {
				t.Errorf("not refused: %v", e)
			}
		case "evil.example.com":
			t.Errorf("sent to the proxy: %v", e)
		}
	}
	if asked == 0 {
		t.Errorf("nobody asked the proxy for %s", refused)
	}
}

// The PAC in a JavaScript engine: for each host it must say what the rules say.
func TestPACSaysWhatTheRulesSay(t *testing.T) {
	s := newStage(t)
	program := s.file("pac.js", `
const text = require("fs").readFileSync(0, "utf8");
const number = (a) => a.split(".").reduce((n, p) => n * 256 + +p, 0);
const isInNet = (host, net, mask) => (number(host) & number(mask)) === (number(net) & number(mask));
const find = new Function("isInNet", text + "; return FindProxyForURL")(isInNet);
for (const host of process.argv.slice(2)) console.log(host + " " + find("https://" + host + "/", host));
`)
	const through, direct = "PROXY 127.0.0.1:3128", "DIRECT"
	want := map[string]string{
		"console.aws.amazon.com": through, "CONSOLE.AWS.amazon.com.": through, "a.b.aws.amazon.com": through, "aws.amazon.com": direct, "evilaws.amazon.com": direct,
		"sts.us-east-1.amazonaws.com": through, "amazonaws.com": direct, "evilamazonaws.com": direct, "amazonaws.com.evil": direct, refused: through,
		"us-east-1.signin.aws": through, "eu-west-1.signin.aws": direct, "plain.example.com": through, "others.example.com": direct, "example.com": direct,
		"localhost": direct, "169.254.169.254": direct, "10.77.0.1": direct, "__proto__": direct, "constructor": direct, "tostring.com": direct,
	}
	var hosts []string
	for h := range want {
		hosts = append(hosts, h)
	}
	c := s.command("node", append([]string{program}, hosts...)...)
	c.Stdin = strings.NewReader(s.run(s.alice.VPN(s.ctx, "pac")))
	for line := range strings.Lines(s.run(c)) {
		host, says, _ := strings.Cut(strings.TrimSpace(line), " ")
		if says != want[host] {
			t.Errorf("%s: %s, want %s", host, says, want[host])
		}
		delete(want, host)
	}
	if len(want) > 0 {
		t.Errorf("no word about %v", want)
	}
}

func TestSquidsLogIsReadByItsTools(t *testing.T) {
	s := newStage(t, lab.Setting{Key: "squid_access_log", Value: `"access.log"`})
	for range 3 {
		s.run(s.command("curl", "-sS", "https://s3.us-east-1.amazonaws.com/bytes/100000", "-o", "/dev/null"))
	}
	s.run(s.command("curl", "-sS", "http://plain.example.com/bytes/50000", "-o", "/dev/null"))
	s.fails(s.command("curl", "-sS", "https://"+refused+"/"))
	path := filepath.Join(s.daemon.Dir, "state", "access.log")
	var text []byte
	for bytes.Count(text, []byte("\n")) < 5 {
		if s.ctx.Err() != nil {
			t.Fatalf("%s", text)
		}
		time.Sleep(10 * time.Millisecond)
		text, _ = os.ReadFile(path)
	}
	c := s.Bastion.Command(s.ctx, "calamaris", "-a")
	c.Stdin = bytes.NewReader(text)
	report := s.run(c)
	for _, want := range []string{`lines parsed: +lines +5\b`, `invalid lines: +lines +0\b`, `TCP_TUNNEL +3\b`, `TCP_MISS +1\b`, `TCP_DENIED +1\b`, `HIER_DIRECT +4\b`,
		`\*\.amazonaws\.com +3\b`, `10\.77\.0\.2 +5\b`} {
		if !regexp.MustCompile(want).MatchString(report) {
			t.Errorf("the report has no %s", want)
		}
	}
	if t.Failed() {
		t.Logf("%s\n%s", text, report)
	}
}
