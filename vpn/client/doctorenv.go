package client

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/net/http/httpproxy"
)

// awsNames are some that must not pass by the proxy.
var awsNames = []string{"sts.amazonaws.com", "s3.us-east-1.amazonaws.com", "ec2.eu-central-1.amazonaws.com", "lambda.us-east-1.api.aws",
	"console.aws.amazon.com", "signin.aws.amazon.com"}

// environment judges a shell's proxy variables. Proxies are the URLs that lead into the tunnel; none: it is down.
func environment(environ []string, proxies ...string) (list []Finding) {
	get := lookup(environ)
	add := func(status, code, fix, format string, a ...any) {
		list = append(list, Finding{status, "environment", code, fmt.Sprintf(format, a...), fix})
	}
	const way = `eval "$(vpn env)" sets them all, vpn exec sets them for one command`
	for _, name := range []string{"https_proxy", "http_proxy", "all_proxy"} {
		lower, upper := get(name), get(strings.ToUpper(name))
		if lower != "" && upper != "" && lower != upper {
			add(Warning, CodeVariables, way, "%s and %s differ: programs disagree on which of them counts", name, strings.ToUpper(name))
		}
		for _, v := range unique(lower, upper) {
			if other := elsewhere(v, proxies); other != "" {
				add(Problem, CodeBypass, way, "%s leads to %s, and not into the tunnel: programs of this shell go that way", name, other)
			}
		}
	}
	for _, v := range unique(get("no_proxy"), get("NO_PROXY")) {
		around := (&httpproxy.Config{HTTPSProxy: "http://proxy.invalid:1", NoProxy: v}).ProxyFunc()
		var leaks []string
		for _, name := range awsNames {
			if u, err := around(&url.URL{Scheme: "https", Host: name}); err == nil && u == nil {
				leaks = append(leaks, name)
			}
		}
		if len(leaks) > 0 {
			add(Problem, CodeLeak, way, "no_proxy=%q sends %s past the proxy: keys and requests leave from this network's address", v, strings.Join(leaks, ", "))
		}
	}
	if len(list) == 0 {
		add(Well, "", "", "nothing in it leads past the proxy")
	}
	return list
}

// lookup is a shell's variables; of equal names the last counts.
func lookup(environ []string) func(string) string {
	return func(name string) (value string) {
		for _, e := range environ {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				value = v
			}
		}
		return value
	}
}

func unique(values ...string) (out []string) {
	for _, v := range values {
		if v != "" && (len(out) == 0 || out[0] != v) {
			out = append(out, v)
		}
	}
	return out
}

// elsewhere is where a proxy variable leads, without its password; empty: into the tunnel, or, while that is down, where
// the tunnel's proxy may well be.
func elsewhere(value string, proxies []string) string {
	u, err := url.Parse(value)
	if err != nil || u.Host == "" {
		if u, err = url.Parse("http://" + value); err != nil {
			return "something that is no URL"
		}
	}
	for _, proxy := range proxies {
		if p, err := url.Parse(proxy); err == nil && p.Host == u.Host {
			return ""
		}
	}
	if len(proxies) > 0 {
		return u.Redacted()
	}
	host := u.Hostname()
	if a, err := netip.ParseAddr(host); err == nil && (a.IsPrivate() || a.IsLoopback() || sharedSpace.Contains(a)) && u.Port() == "3128" {
		return ""
	}
	return net.JoinHostPort(host, u.Port())
}

// plainKeys finds long-lived AWS keys that lie in a file. Their values are not looked at.
func plainKeys(environ []string) []Finding {
	get := lookup(environ)
	file := get("AWS_SHARED_CREDENTIALS_FILE")
	if file == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil
		}
		file = filepath.Join(home, ".aws", "credentials")
	}
	f, err := os.Open(file)
	if err != nil {
		return nil // as a rule it is not there
	}
	defer f.Close()
	text, err := readBounded(f)
	if err != nil {
		return nil
	}
	names := plainKeysIn(text)
	if len(names) == 0 {
		return nil
	}
	return []Finding{{Warning, "keys", CodeKeys, fmt.Sprintf("%s has AWS keys in plain text, of %s", file, strings.Join(names, ", ")),
		"a program that reads them has them: keep them in a keyring, and pin them to the egress address by policy"}}
}

// plainKeysIn names the profiles of a credentials file that have a long-lived key: session keys come with a token.
func plainKeysIn(text []byte) (names []string) {
	name, secret, token := "", false, false
	end := func() {
		if secret && !token {
			names = append(names, name)
		}
		secret, token = false, false
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(line, "[") {
			end()
			name = strings.Trim(line, "[]")
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		switch strings.TrimSpace(key) {
		case "aws_secret_access_key":
			secret = strings.TrimSpace(value) != ""
		case "aws_session_token":
			token = true
		}
	}
	end()
	return names
}
