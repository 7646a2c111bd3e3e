package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"perimeterd/internal/lab"
	"perimeterd/proxy"
)

// temptingRules allow every address, and names that lead anywhere: what is refused is refused for what it is.
const temptingRules = `
[[proxy.rule]]
allow  = ["ok.example.com", "*.ok.example.com", "localhost", "metadata.google.internal", "0.0.0.0/0", "::/0"]
ports  = [22, 53, 80, 443, 1194, 3128, 8080]
groups = ["*"]

[[proxy.rule]]
allow  = ["tls.example.com"]
ports  = [80, 443, 8443]
groups = ["*"]
tls    = true
`

// addRules puts text at the end of the configuration. The daemon reads it with the next apply or start.
func (s *stage) addRules(text string) {
	s.t.Helper()
	f, err := os.OpenFile(s.daemon.Config, os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(text)
		f.Close()
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// listener notes who comes.
type listener struct {
	net.Listener
	came chan netip.AddrPort
}

func (s *stage) listen(ns *lab.Namespace, address string) *listener {
	s.t.Helper()
	l, err := ns.Listen("tcp", address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
	n := &listener{l, make(chan netip.AddrPort, 1000)}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.came <- c.RemoteAddr().(*net.TCPAddr).AddrPort()
			c.Close()
		}
	}()
	return n
}

// spy counts the connections that programs on the bastion begin, before any other rule judges them.
func (s *stage) spy() (syns func() string) {
	s.t.Helper()
	s.ok(s.Bastion.Command(s.ctx, "nft", "add table inet spy; add chain inet spy out { type filter hook output priority -300; }; "+
		"add rule inet spy out oifname != \"perimeter0\" tcp flags & (syn | ack) == syn counter"))
	return func() string {
		s.t.Helper()
		_, after, _ := strings.Cut(s.ok(s.Bastion.Command(s.ctx, "nft", "list", "chain", "inet", "spy", "out")), "packets ")
		n, _, _ := strings.Cut(after, " ")
		return n
	}
}

func addresses(list ...string) (addrs []netip.Addr) {
	for _, a := range list {
		addrs = append(addrs, netip.MustParseAddr(a))
	}
	return addrs
}

// Every line goes through a real tunnel to the daemon. Answers are the statuses in order, the reason is the last one's;
// what is refused makes the daemon send nobody a packet, nor ask a name server for a name that no rule allows.
func TestWhatTheProxyRefuses(t *testing.T) {
	s := newStage(t, lab.Options{})
	s.addRules(temptingRules)
	s.perimeterd("apply")
	for name, answers := range map[string][][]string{
		"ok.example.com":           {{"198.19.1.2"}},
		"tls.example.com":          {{"198.19.1.2"}},
		"mixed.ok.example.com":     {{"10.1.2.3", "198.19.1.2", "169.254.169.254"}},
		"rebind.ok.example.com":    {{"198.19.1.2"}, {"169.254.169.254"}},
		"meta.ok.example.com":      {{"169.254.169.254"}},
		"metadata.google.internal": {{"169.254.169.254"}},
		"loop.ok.example.com":      {{"127.0.0.1"}},
		"private.ok.example.com":   {{"192.168.50.5"}},
		"self.ok.example.com":      {{"198.19.1.1"}},
		"inner.ok.example.com":     {{"10.77.0.1"}},
		"zero.ok.example.com":      {{"0.0.0.0"}},
		"six.ok.example.com":       {{"::ffff:169.254.169.254", "fd00:ec2::254"}},
		"evilok.example.com":       {{"198.19.1.2"}},
		"ok.example.com.evil":      {{"198.19.1.2"}},
	} {
		var turns [][]netip.Addr
		for _, a := range answers {
			turns = append(turns, addresses(a...))
		}
		s.cloud.DNS.SetInTurn(name, turns...)
	}
	// Where a slip would land: on the bastion itself, metadata and private networks included, and behind it.
	for _, address := range []string{"127.0.0.1/8", "169.254.169.254/32", "169.254.170.2/32", "192.168.50.5/32", "100.100.100.200/32", "100.64.1.1/32", "168.63.129.16/32", "fd00:ec2::254/128"} {
		if err := s.Bastion.AddAddress(s.ctx, "lo", netip.MustParsePrefix(address)); err != nil {
			t.Fatal(err)
		}
	}
	var listeners []*listener
	for _, address := range []string{"127.0.0.1", "[::1]", "169.254.169.254", "169.254.170.2", "192.168.50.5", "100.100.100.200", "100.64.1.1", "168.63.129.16", "[fd00:ec2::254]", "198.18.1.1", "198.19.1.1", "198.19.1.10"} {
		for _, port := range []string{":80", ":443", ":8080"} {
			listeners = append(listeners, s.listen(s.Bastion, address+port))
		}
	}
	s.ok(s.alice.VPN(s.ctx, "up"))
	s.ok(s.curl("http://ok.example.com/"))
	if n := len(s.cloud.Requests()); n != 1 {
		t.Fatalf("%d requests reached the cloud to begin with", n)
	}
	syns := s.spy()

	connect := func(target string) string { return "CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n\r\n" }
	get := func(url string) string { return "GET " + url + " HTTP/1.1\r\nHost: ok.example.com\r\n\r\n" }
	// with is a POST that is in order but for the lines given.
	with := func(lines string) string {
		return "POST http://ok.example.com/ HTTP/1.1\r\nHost: ok.example.com\r\n" + lines + "\r\n\r\n"
	}
	type line struct {
		name, raw, answers string
		reason             proxy.Reason
	}
	lines := []line{
		// The design's own.
		{"metadata", connect("169.254.169.254:80"), "403", proxy.Metadata},
		{"metadata's token", "PUT http://169.254.169.254/latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n\r\n", "403", proxy.Metadata},
		{"metadata by IPv6", connect("[fd00:ec2::254]:80"), "403", proxy.Metadata},
		{"container credentials", connect("169.254.170.2:80"), "403", proxy.Metadata},
		{"unspecified", connect("0.0.0.0:443"), "403", proxy.Unspecified},
		{"no host", connect(":80"), "400", proxy.BadDestination},
		{"a star", connect("*:443"), "400", proxy.BadDestination},
		{"mapped", connect("[::ffff:169.254.169.254]:80"), "403", proxy.Metadata},
		{"NAT64", connect("[64:ff9b::a9fe:a9fe]:80"), "403", proxy.Metadata},
		{"6to4", connect("[2002:a9fe:a9fe::]:80"), "403", proxy.Metadata},
		{"one decimal number", connect("2130706433:80"), "400", proxy.BadDestination},
		{"hexadecimal and short", connect("0x7f.1:80"), "400", proxy.BadDestination},
		{"octal", connect("0177.0.0.1:80"), "400", proxy.BadDestination},
		{"short", connect("127.1:80"), "400", proxy.BadDestination},
		{"circled digits", connect("①②⑦.0.0.1:80"), "400", proxy.BadDestination},
		{"the proxy", connect("10.77.0.1:3128"), "403", proxy.Private},
		{"the console", connect("10.77.0.1:80"), "403", proxy.Private},
		{"the gate", connect("198.18.1.1:1194"), "403", proxy.Reserved},
		{"the egress address", connect("198.19.1.10:22"), "403", proxy.OwnAddress},
		{"one good address among bad ones", connect("mixed.ok.example.com:80"), "200", proxy.Allowed},
		{"a name before it changes", connect("rebind.ok.example.com:80"), "200", proxy.Allowed},
		{"a longer name", connect("evilok.example.com:443"), "403", proxy.NoRule},
		{"a name behind it", connect("ok.example.com.evil:443"), "403", proxy.NoRule},
		{"evilamazonaws.com", connect("evilamazonaws.com:443"), "403", proxy.NoRule},
		{"amazonaws.com.evil", connect("amazonaws.com.evil:443"), "403", proxy.NoRule},
		{"user information", connect("ok.example.com:443@169.254.169.254:80"), "400", proxy.BadDestination},
		{"a path, and a good Host", "CONNECT /x HTTP/1.1\r\nHost: ok.example.com\r\n\r\n", "400", proxy.BadDestination},
		{"no port", connect("ok.example.com"), "400", proxy.BadDestination},
		{"a leading zero", connect("ok.example.com:0443"), "400", proxy.BadDestination},
		{"too large a port", connect("ok.example.com:99999"), "400", proxy.BadDestination},
		{"another Host", "CONNECT ok.example.com:443 HTTP/1.1\r\nHost: evil.test\r\n\r\n", "400", proxy.BadDestination},
		{"two Hosts", "CONNECT ok.example.com:443 HTTP/1.1\r\nHost: ok.example.com:443\r\nHost: ok.example.com:443\r\n\r\n", "400", proxy.Malformed},
		{"CONNECT with a body", "CONNECT ok.example.com:443 HTTP/1.1\r\nHost: ok.example.com:443\r\nContent-Length: 3\r\n\r\nabc", "400", proxy.Malformed},
		{"bare LF", "CONNECT ok.example.com:443 HTTP/1.1\nHost: ok.example.com:443\n\n", "400", proxy.Malformed},
		{"https without CONNECT", get("https://ok.example.com/"), "403", proxy.BadScheme},
		{"ftp", get("ftp://ok.example.com/"), "403", proxy.BadScheme},
		{"a password", get("http://user:pw@ok.example.com/"), "400", proxy.BadDestination},
		{"CL.TE", with("Content-Length: 4\r\nTransfer-Encoding: chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"TE.CL", with("Transfer-Encoding: chunked\r\nContent-Length: 4") + "0\r\n\r\n", "400", proxy.Malformed},
		{"one length twice", with("Content-Length: 0\r\nContent-Length: 0"), "400", proxy.Malformed},
		{"escaped line break", connect("ok.example.com%0d%0aX:443"), "400", proxy.BadDestination},
		{"ESC in a name", connect("ok\x1b[31m.example.com:443"), "400", proxy.Malformed},
		{"capitals and a last dot", connect("OK.Example.Com.:443"), "200", proxy.Allowed},
		{"HTTP/1.0 without Host", "CONNECT ok.example.com:443 HTTP/1.0\r\n\r\n", "200", proxy.Allowed},

		// Addresses that are never reached.
		{"loopback", connect("127.0.0.1:80"), "403", proxy.Loopback},
		{"the last of loopback", connect("127.255.255.254:80"), "403", proxy.Loopback},
		{"the stub resolver", connect("127.0.0.53:53"), "403", proxy.Loopback},
		{"loopback by IPv6", connect("[::1]:80"), "403", proxy.Loopback},
		{"unspecified by IPv6", connect("[::]:80"), "403", proxy.Unspecified},
		{"this network", connect("0.1.2.3:80"), "403", proxy.Unspecified},
		{"private, a", connect("10.1.2.3:80"), "403", proxy.Private},
		{"private, b", connect("172.31.255.255:80"), "403", proxy.Private},
		{"private, c", connect("192.168.50.5:80"), "403", proxy.Private},
		{"another client", connect("10.77.0.9:80"), "403", proxy.Private},
		{"shared", connect("100.64.1.1:80"), "403", proxy.Shared},
		{"Azure's metadata", connect("168.63.129.16:80"), "403", proxy.Metadata},
		{"Alibaba's metadata", connect("100.100.100.200:80"), "403", proxy.Metadata},
		{"Oracle's metadata", connect("192.0.0.192:80"), "403", proxy.Metadata},
		{"Google's metadata by IPv6", connect("[fd20:ce::254]:80"), "403", proxy.Metadata},
		{"EC2's clock", connect("169.254.169.123:80"), "403", proxy.Metadata},
		{"multicast", connect("224.0.0.1:80"), "403", proxy.Multicast},
		{"broadcast", connect("255.255.255.255:80"), "403", proxy.Multicast},
		{"class E", connect("240.0.0.1:80"), "403", proxy.Reserved},
		{"documentation", connect("203.0.113.1:80"), "403", proxy.Reserved},
		{"benchmarking", connect("198.18.99.1:80"), "403", proxy.Reserved},
		{"6to4 relay", connect("192.88.99.1:80"), "403", proxy.Reserved},
		{"link-local by IPv6", connect("[fe80::1]:80"), "403", proxy.Metadata},
		{"site-local", connect("[fec0::1]:80"), "403", proxy.Private},
		{"unique local", connect("[fd12:3456::1]:80"), "403", proxy.Private},
		{"multicast by IPv6", connect("[ff02::1]:80"), "403", proxy.Multicast},
		{"discard-only", connect("[100::1]:80"), "403", proxy.Reserved},
		{"a public address by IPv6", connect("[2606:4700::1111]:443"), "403", proxy.IPv6Off},
		// The same, hidden.
		{"mapped, in hexadecimal", connect("[::ffff:7f00:1]:80"), "403", proxy.Loopback},
		{"mapped, written out", connect("[0:0:0:0:0:ffff:169.254.169.254]:80"), "403", proxy.Metadata},
		{"compatible", connect("[::127.0.0.1]:80"), "403", proxy.Loopback},
		{"translated", connect("[::ffff:0:169.254.169.254]:80"), "403", proxy.Metadata},
		{"NAT64, dotted", connect("[64:ff9b::127.0.0.1]:80"), "403", proxy.Loopback},
		{"NAT64 to a private address", connect("[64:ff9b::10.1.2.3]:80"), "403", proxy.Private},
		{"local NAT64", connect("[64:ff9b:1::a9fe:a9fe]:80"), "403", proxy.Metadata},
		{"local NAT64, prefix of 48 bits", connect("[64:ff9b:1:a9fe:a9:fe00::]:80"), "403", proxy.Metadata},
		{"6to4 of loopback", connect("[2002:7f00:1::1]:80"), "403", proxy.Loopback},
		{"Teredo's server", connect("[2001:0:a9fe:a9fe::1]:80"), "403", proxy.Metadata},
		{"Teredo's client", connect("[2001:0:808:808::5601:5601]:80"), "403", proxy.Metadata},
		{"ISATAP", connect("[2600::5efe:169.254.169.254]:80"), "403", proxy.Metadata},
		// Spellings that some resolver takes for an address.
		{"decimal metadata", connect("2852039166:80"), "400", proxy.BadDestination},
		{"hexadecimal metadata", connect("0xa9fea9fe:80"), "400", proxy.BadDestination},
		{"dotted hexadecimal", connect("0xa9.0xfe.0xa9.0xfe:80"), "400", proxy.BadDestination},
		{"dotted octal", connect("0251.0376.0251.0376:80"), "400", proxy.BadDestination},
		{"mixed bases", connect("169.0376.0xa9.254:80"), "400", proxy.BadDestination},
		{"three parts", connect("169.254.43518:80"), "400", proxy.BadDestination},
		{"two parts", connect("169.16689662:80"), "400", proxy.BadDestination},
		{"octets that wrap around", connect("425.510.425.510:80"), "400", proxy.BadDestination},
		{"padded with zeros", connect("000127.0.0.1:80"), "400", proxy.BadDestination},
		{"an address and a dot", connect("169.254.169.254.:80"), "400", proxy.BadDestination},
		{"zero", connect("0:80"), "400", proxy.BadDestination},
		{"fullwidth digits", connect("１６９.254.169.254:80"), "400", proxy.BadDestination},
		{"ideographic dots", connect("169。254。169。254:80"), "400", proxy.BadDestination},
		{"mathematical digits", connect("𝟏𝟐𝟕.0.0.1:80"), "400", proxy.BadDestination},
		{"soft hyphen in an address", connect("127.0.0.\u00ad1:80"), "400", proxy.BadDestination},
		{"zone", connect("[fe80::1%25lo]:80"), "400", proxy.BadDestination},
		{"zone of a mapped address", connect("[::ffff:127.0.0.1%25lo]:80"), "400", proxy.BadDestination},
		{"IPv4 in brackets", connect("[169.254.169.254]:80"), "400", proxy.BadDestination},
		{"a name in brackets", connect("[ok.example.com]:80"), "400", proxy.BadDestination},
		{"IPv6 without brackets", connect("::1:80"), "400", proxy.BadDestination},
		{"IPv6 without a port", connect("[::1]"), "400", proxy.BadDestination},
		// Names that lead there.
		{"localhost", connect("localhost:80"), "403", proxy.Loopback},
		{"localhost and a dot", connect("localhost.:80"), "403", proxy.Loopback},
		{"a name for loopback", connect("loop.ok.example.com:80"), "403", proxy.Loopback},
		{"a name for metadata", connect("meta.ok.example.com:80"), "403", proxy.Metadata},
		{"Google's name for metadata", "GET http://metadata.google.internal/computeMetadata/v1/ HTTP/1.1\r\nHost: metadata.google.internal\r\nMetadata-Flavor: Google\r\n\r\n", "403", proxy.Metadata},
		{"a name for this host", connect("self.ok.example.com:443"), "403", proxy.OwnAddress},
		{"a name for the proxy", connect("inner.ok.example.com:3128"), "403", proxy.Private},
		{"a name for a private address", connect("private.ok.example.com:80"), "403", proxy.Private},
		{"a name for nowhere", connect("zero.ok.example.com:80"), "403", proxy.Unspecified},
		{"a name with IPv6 addresses only", connect("six.ok.example.com:80"), "502", proxy.DNSNotFound},
		{"no such name", connect("none.ok.example.com:80"), "502", proxy.DNSNotFound},
		// Names that look like an allowed one.
		{"a Cyrillic letter", connect("оk.example.com:443"), "403", proxy.NoRule},
		{"the suffix alone", connect("example.com:443"), "403", proxy.NoRule},
		{"a set's suffix alone", connect("amazonaws.com:443"), "403", proxy.NoRule},
		{"another port", connect("ok.example.com:25"), "403", proxy.NoRule},
		{"what a set denies", connect("x.elb.amazonaws.com:443"), "403", proxy.DeniedByRule},
		{"what a set denies, otherwise spelled", connect("X.ELB.amazonaws.com.:443"), "403", proxy.DeniedByRule},
		{"a fullwidth dot before it", connect("x．elb．amazonaws．com:443"), "403", proxy.DeniedByRule},
		{"NUL in a name", connect("169.254.169.254\x00.ok.example.com:80"), "400", proxy.Malformed},
		{"an escaped NUL", connect("169.254.169.254%00.ok.example.com:80"), "400", proxy.BadDestination},
		{"an escaped dot", connect("evil%2eok.example.com:80"), "400", proxy.BadDestination},
		{"an escaped at sign", connect("ok.example.com%40169.254.169.254:80"), "400", proxy.BadDestination},
		{"a backslash", connect(`169.254.169.254\.ok.example.com:80`), "400", proxy.BadDestination},
		{"a hash", connect("169.254.169.254#.ok.example.com:80"), "400", proxy.BadDestination},
		{"a question mark", connect("169.254.169.254?.ok.example.com:80"), "400", proxy.BadDestination},
		{"a semicolon", connect("169.254.169.254;.ok.example.com:80"), "400", proxy.BadDestination},
		{"a comma", connect("ok.example.com,169.254.169.254:80"), "400", proxy.BadDestination},
		{"an empty label", connect("ok..example.com:80"), "400", proxy.BadDestination},
		{"a dot first", connect(".ok.example.com:80"), "400", proxy.BadDestination},
		{"a label of 64", connect(strings.Repeat("a", 64) + ".ok.example.com:80"), "400", proxy.BadDestination},
		{"a name of 256", connect(strings.Repeat("a.", 121) + "ok.example.com:80"), "400", proxy.BadDestination},
		{"right-to-left override", connect("ok\u202e.example.com:80"), "400", proxy.BadDestination},
		{"broken punycode", connect("xn--a.ok.example.com:80"), "400", proxy.BadDestination},
		// Targets.
		{"two ports", connect("ok.example.com:80:443"), "400", proxy.BadDestination},
		{"port zero", connect("ok.example.com:0"), "400", proxy.BadDestination},
		{"an empty port", connect("ok.example.com:"), "400", proxy.BadDestination},
		{"a signed port", connect("ok.example.com:+443"), "400", proxy.BadDestination},
		{"a port that wraps around", connect("ok.example.com:65616"), "400", proxy.BadDestination},
		{"Arabic digits", connect("ok.example.com:٤٤٣"), "400", proxy.BadDestination},
		{"a path behind the port", connect("ok.example.com:443/x"), "400", proxy.BadDestination},
		{"a URL for CONNECT", connect("http://ok.example.com:443/"), "400", proxy.BadDestination},
		{"another port in Host", "CONNECT ok.example.com:443 HTTP/1.1\r\nHost: ok.example.com:80\r\n\r\n", "400", proxy.BadDestination},
		{"an empty Host", "CONNECT ok.example.com:443 HTTP/1.1\r\nHost:\r\n\r\n", "400", proxy.BadDestination},
		{"no Host", "CONNECT ok.example.com:443 HTTP/1.1\r\n\r\n", "400", proxy.Malformed},
		{"Host twice, in two cases", "GET http://ok.example.com/ HTTP/1.1\r\nHost: ok.example.com\r\nhOST: evil.test\r\n\r\n", "400", proxy.Malformed},
		{"Host with a user", "GET http://ok.example.com/ HTTP/1.1\r\nHost: ok.example.com@evil.test\r\n\r\n", "400", proxy.BadDestination},
		{"metadata as Host", "GET http://ok.example.com/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", "400", proxy.BadDestination},
		{"connect in small letters", "connect ok.example.com:443 HTTP/1.1\r\nHost: ok.example.com:443\r\n\r\n", "400", proxy.BadDestination},
		{"origin form", get("/"), "400", proxy.BadDestination},
		{"origin form, two slashes", get("//169.254.169.254/"), "400", proxy.BadDestination},
		{"asterisk form", "OPTIONS * HTTP/1.1\r\nHost: ok.example.com\r\n\r\n", "400", proxy.BadDestination},
		{"one slash", get("http:/169.254.169.254/"), "400", proxy.BadDestination},
		{"three slashes", get("http:///169.254.169.254/"), "400", proxy.BadDestination},
		{"backslash for slash", get(`http://ok.example.com\@169.254.169.254/`), "400", proxy.BadDestination},
		{"fragment before the host", get("http://ok.example.com#@169.254.169.254/"), "400", proxy.BadDestination},
		{"a user that looks like the host", get("http://ok.example.com@169.254.169.254/"), "400", proxy.BadDestination},
		{"decimal in a URL", get("http://2852039166/"), "400", proxy.BadDestination},
		{"octal in a URL", get("http://0251.0376.0251.0376/"), "400", proxy.BadDestination},
		{"escaped line break in a URL", get("http://ok.example.com%0d%0aHost:%20evil/"), "400", proxy.BadDestination},
		{"bad escape in a path", get("http://ok.example.com/%zz"), "400", proxy.Malformed},
		{"gopher", get("gopher://127.0.0.1:6379/_INFO"), "403", proxy.BadScheme},
		{"file", get("file:///etc/passwd"), "403", proxy.BadScheme},
		{"dict", get("dict://127.0.0.1:11211/stats"), "403", proxy.BadScheme},
		{"ws", get("ws://ok.example.com/"), "403", proxy.BadScheme},
		{"a scheme with a space", get("http ://ok.example.com/"), "400", proxy.Malformed},
		// Framing.
		{"another coding", with("Transfer-Encoding: xchunked"), "400", proxy.Malformed},
		{"a list of codings", with("Transfer-Encoding: gzip, chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"chunked twice", with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"chunked, then identity", with("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity") + "0\r\n\r\n", "400", proxy.Malformed},
		{"chunked in quotes", with("Transfer-Encoding: \"chunked\""), "400", proxy.Malformed},
		{"vertical tab before chunked", with("Transfer-Encoding: \vchunked"), "400", proxy.Malformed},
		{"a space before the colon", with("Transfer-Encoding : chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"a tab before the colon", with("Content-Length\t: 4") + "abcd", "400", proxy.Malformed},
		{"a space before the name", with(" Transfer-Encoding: chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"a folded line", with("X: a\r\n Transfer-Encoding: chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"a hidden line behind CR", with("X: a\rTransfer-Encoding: chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"a hidden line behind LF", with("X: a\nTransfer-Encoding: chunked") + "0\r\n\r\n", "400", proxy.Malformed},
		{"NUL in a value", with("X: a\x00b"), "400", proxy.Malformed},
		{"no colon", with("Transfer-Encoding"), "400", proxy.Malformed},
		{"no name", with(": chunked"), "400", proxy.Malformed},
		{"chunked in HTTP/1.0", "POST http://ok.example.com/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", proxy.Malformed},
		{"two lengths", with("Content-Length: 0\r\nContent-Length: 5"), "400", proxy.Malformed},
		{"a list of lengths", with("Content-Length: 0, 0"), "400", proxy.Malformed},
		{"a signed length", with("Content-Length: +4") + "abcd", "400", proxy.Malformed},
		{"a negative length", with("Content-Length: -1"), "400", proxy.Malformed},
		{"a hexadecimal length", with("Content-Length: 0x4") + "abcd", "400", proxy.Malformed},
		{"a length with a space", with("Content-Length: 4 4") + "abcd", "400", proxy.Malformed},
		{"an empty length", with("Content-Length:"), "400", proxy.Malformed},
		{"a length past 64 bits", with("Content-Length: 18446744073709551616"), "400", proxy.Malformed},
		{"CONNECT with a chunked body", "CONNECT ok.example.com:443 HTTP/1.1\r\nHost: ok.example.com:443\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", proxy.Malformed},
		{"LF at the very end", "GET http://ok.example.com/ HTTP/1.1\r\nHost: ok.example.com\r\n\n", "400", proxy.Malformed},
		{"an empty line first", "\r\nGET http://ok.example.com/ HTTP/1.1\r\nHost: ok.example.com\r\n\r\n", "400", proxy.Malformed},
		{"two spaces", "GET  http://ok.example.com/ HTTP/1.1\r\nHost: ok.example.com\r\n\r\n", "400", proxy.Malformed},
		{"a tab for a space", "GET\thttp://ok.example.com/ HTTP/1.1\r\nHost: ok.example.com\r\n\r\n", "400", proxy.Malformed},
		{"a space in the target", get("http://ok.example.com/ x"), "400", proxy.Malformed},
		{"HTTP/0.9", "GET http://ok.example.com/\r\n\r\n", "400", proxy.Malformed},
		{"HTTP/1.2", "GET http://ok.example.com/ HTTP/1.2\r\nHost: ok.example.com\r\n\r\n", "400", proxy.Malformed},
		{"http in small letters", "GET http://ok.example.com/ http/1.1\r\nHost: ok.example.com\r\n\r\n", "400", proxy.Malformed},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400", proxy.Malformed},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "400", proxy.Malformed},
		{"SOCKS 5", "\x05\x01\x00\r\n\r\n", "400", proxy.Malformed},
		{"too large a head", "GET http://ok.example.com/ HTTP/1.1\r\nX: " + strings.Repeat("a", 16<<10) + "\r\n\r\n", "431", proxy.HeadTooLarge},
		{"plain where TLS is wanted", "GET http://tls.example.com/ HTTP/1.1\r\nHost: tls.example.com\r\n\r\n", "403", proxy.TLSRequired},
		// Behind a request that is in order.
		{"the next one is for metadata", with("Content-Length: 4") + "abcdGET http://169.254.169.254/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", "200 403", proxy.Metadata},
		{"the next one is malformed", with("Content-Length: 4") + "abcdGET http://ok.example.com/ HTTP/1.1\nHost: ok.example.com\n\n", "200 400", proxy.Malformed},
		{"the next one has two lengths", with("Content-Length: 0") + with("Content-Length: 0\r\nContent-Length: 5") + "GET /", "200 400", proxy.Malformed},
		{"the next one is CONNECT", with("Content-Length: 0") + connect("169.254.169.254:80"), "200 end", ""},
		{"behind a chunked body", with("Transfer-Encoding: chunked") + "4\r\nabcd\r\n0\r\n\r\n" + connect("169.254.169.254:80"), "200 end", ""},
		{"behind a chunk's extension", strings.Replace(with("Transfer-Encoding: chunked"), "com/", "com/upload", 1) + "4;a=\"\nb\"\r\nabcd\r\n0\r\n\r\nGET http://169.254.169.254/ HTTP/1.1\r\n\r\n", "400 end", proxy.Malformed},
	}

	before := len(s.daemon.Entries("proxy"))
	said := map[string]*http.Response{} // by id
	ask := func(l line) {
		t.Helper()
		answers, last := s.exchange(l.raw, len(strings.Fields(l.answers)))
		reason := string(l.reason)
		if l.reason == proxy.Allowed {
			reason = ""
		}
		if got := last.Header.Get("X-Perimeter-Reason"); answers != l.answers || got != reason {
			t.Errorf("%s: %s %s, want %s %s", l.name, answers, got, l.answers, reason)
		}
		if reason == "" {
			return
		}
		body, _ := io.ReadAll(last.Body)
		id := idOf.FindString(string(body))
		if id == "" || !strings.Contains(string(body), reason) {
			t.Errorf("%s: the answer names neither request nor reason: %q", l.name, body)
		}
		said[id] = last
	}
	for _, l := range lines {
		ask(l)
	}
	t.Logf("%d lines, %d of them refused with a reason", len(lines), len(said))
	time.Sleep(1100 * time.Millisecond) // the record's life
	ask(line{"a name after it changed", connect("rebind.ok.example.com:80"), "403", proxy.Metadata})

	// Nobody was reached but by what is allowed.
	allowed := 0
	for _, l := range lines {
		if strings.HasPrefix(l.answers, "200") {
			allowed++
		}
	}
	for _, l := range listeners {
		select {
		case who := <-l.came:
			t.Errorf("%v was reached from %v", l.Addr(), who)
		default:
		}
	}
	// One line a request. Where two requests came on one connection, both have one.
	want := len(lines) + 1
	for _, l := range lines {
		if f := strings.Fields(l.answers); len(f) > 1 && f[1] != "end" {
			want++
		}
	}
	entries, err := s.daemon.Await(s.ctx, "proxy", before+want)
	if err != nil {
		t.Fatal(err)
	}
	entries = entries[before:]
	for _, e := range entries {
		id := e["id"].(string)
		if r := said[id]; r != nil {
			if e["reason"] != r.Header.Get("X-Perimeter-Reason") || e["status"] != float64(r.StatusCode) {
				t.Errorf("answered %s %s, logged %v", r.Status, r.Header.Get("X-Perimeter-Reason"), e)
			}
			delete(said, id)
		}
	}
	if len(said) > 0 || len(entries) != want {
		t.Errorf("%d lines logged, want %d; not logged: %v", len(entries), want, said)
	}
	dialed := 0
	for _, e := range entries {
		if to, ok := e["dialed"].(string); ok {
			dialed++
			if !strings.HasPrefix(to, "198.19.1.2:") {
				t.Errorf("dialed %s: %v", to, e)
			}
		}
	}
	// A chunked body is judged as it comes: that request was under way.
	if got, want := syns(), fmt.Sprint(allowed+1); got != want || fmt.Sprint(dialed) != want {
		t.Errorf("the daemon began %s connections and logged %d, want %s", got, dialed, want)
	}
	for _, q := range s.cloud.DNS.Queries() {
		if q.Name != "ok.example.com" && !strings.HasSuffix(q.Name, ".ok.example.com") && q.Name != "metadata.google.internal" && q.Name != "tls.example.com" {
			t.Errorf("asked for %q", q.Name)
		}
	}
	for _, r := range s.cloud.Requests() {
		if r.Host != "ok.example.com" {
			t.Errorf("the cloud host got %+v", r)
		}
	}
	for _, b := range []byte(s.daemon.Log()) {
		if b != '\n' && (b < ' ' || b > 0x7e) {
			t.Fatalf("byte %#x in the log", b)
		}
	}
	if strings.Contains(s.daemon.Log(), "pw@") {
		t.Error("a password in the log")
	}
}

// idOf finds what the answer to a refusal calls the request.
var idOf = regexp.MustCompile(`\b[A-Z2-7]{10}\b`)

// exchange sends raw bytes from the client through the tunnel and reads up to n answers. Each becomes its status; "end" is
// the connection's end instead of one. Last is the last that came, with its body read.
func (s *stage) exchange(raw string, n int) (answers string, last *http.Response) {
	s.t.Helper()
	c, err := s.Client.Dial(s.ctx, "tcp", "10.77.0.1:3128")
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, raw); err != nil {
		s.t.Fatal(err)
	}
	br := bufio.NewReader(c)
	var got []string
	last = &http.Response{Body: http.NoBody}
	for range n {
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			got = append(got, "end")
			break
		}
		var body []byte
		if !strings.HasPrefix(raw, "CONNECT") || resp.StatusCode != http.StatusOK {
			body, _ = io.ReadAll(resp.Body)
		}
		resp.Body = io.NopCloser(bytes.NewReader(body))
		got, last = append(got, fmt.Sprint(resp.StatusCode)), resp
	}
	return strings.Join(got, " "), last
}
