package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/vpn/client"
)

func browserCommand(profile *string) *cobra.Command {
	timeout, program := defaultTimeout, ""
	c := &cobra.Command{
		Use: "browser [URL]...", Short: "Open a browser of its own through the tunnel",
		Long: "Brings the tunnel up where it is down, for as long as the browser runs, and opens Chromium, Chrome, Edge or Firefox with a\n" +
			"profile of its own: other windows, cookies and extensions than yours. All its connections go to the proxy, names are\n" +
			"resolved by the proxy, and WebRTC cannot go around it.",
		Example: "  vpn browser https://console.aws.amazon.com/",
		RunE: func(_ *cobra.Command, urls []string) error {
			for _, u := range urls {
				if parsed, err := url.Parse(u); err != nil || parsed.Scheme != "http" && parsed.Scheme != "https" || parsed.Host == "" {
					return usageError{fmt.Errorf("%q: want a URL, as in https://console.aws.amazon.com/", u)}
				}
			}
			path, err := findBrowser(program)
			if err != nil {
				return err
			}
			return through(*profile, []string{path}, timeout, func(p *client.Profile, _ client.Status) (arguments, env []string, err error) {
				// The profile's own port, not the one held, which asks for a password.
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				s, err := client.AskStatus(ctx, p)
				if err == nil {
					arguments, err = browse(p, s, path, urls)
				}
				return arguments, nil, err
			})
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", timeout, "give up after so long")
	c.Flags().StringVar(&program, "program", "", "`NAME|FILE` of the browser (default: the first of those that is installed)")
	return c
}

// browsers in the order in which they are looked for.
var browsers = map[string][]string{
	"linux": {"chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge", "firefox", "firefox-esr"},
	"darwin": {"/Applications/Chromium.app/Contents/MacOS/Chromium", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
		"/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge", "/Applications/Firefox.app/Contents/MacOS/firefox"},
	"windows": {`C:\Program Files\Google\Chrome\Application\chrome.exe`, `C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe`,
		`C:\Program Files\Mozilla Firefox\firefox.exe`},
}

func findBrowser(program string) (string, error) {
	if program != "" {
		return exec.LookPath(program)
	}
	for _, b := range browsers[runtime.GOOS] {
		if path, err := exec.LookPath(b); err == nil {
			return path, nil
		}
	}
	return "", errors.New("no Chromium, Chrome, Edge or Firefox is found here: name yours: vpn browser --program FILE")
}

// browse gives a browser a profile directory of its own, and the settings that keep everything on the proxy.
func browse(p *client.Profile, s client.Status, path string, urls []string) ([]string, error) {
	firefox := strings.Contains(strings.ToLower(filepath.Base(path)), "firefox")
	dir, err := client.BrowserDir(p, map[bool]string{true: "firefox", false: "chromium"}[firefox])
	if err != nil {
		return nil, err
	}
	if u, err := url.Parse(s.URL); err == nil && u.User != nil { // no browser takes it from a setting
		secret, _ := u.User.Password()
		fmt.Fprintf(os.Stderr, "the browser will ask: user %s, password %s\n", u.User.Username(), secret)
	}
	if firefox {
		settings := firefoxSettings(s)
		return append([]string{"--no-remote", "--profile", dir}, urls...), os.WriteFile(filepath.Join(dir, "user.js"), []byte(settings), 0o600)
	}
	return append([]string{
		"--user-data-dir=" + dir, "--no-first-run", "--no-default-browser-check",
		fmt.Sprintf("--proxy-server=http://%v", s.Listen),
		"--proxy-bypass-list=<-loopback>", // not even this machine's names go around it
		"--force-webrtc-ip-handling-policy=disable_non_proxied_udp", "--webrtc-ip-handling-policy=disable_non_proxied_udp",
		"--disable-quic", "--dns-prefetch-disable", "--disable-background-networking", "--disable-features=AsyncDns,DnsOverHttps",
	}, urls...), nil
}

func firefoxSettings(s client.Status) string {
	var b strings.Builder
	for _, line := range [][2]string{
		{"network.proxy.type", "1"},
		{"network.proxy.http", fmt.Sprintf("%q", s.Listen.Addr())}, {"network.proxy.http_port", fmt.Sprint(s.Listen.Port())},
		{"network.proxy.ssl", fmt.Sprintf("%q", s.Listen.Addr())}, {"network.proxy.ssl_port", fmt.Sprint(s.Listen.Port())},
		{"network.proxy.share_proxy_settings", "true"}, {"network.proxy.no_proxies_on", `""`},
		{"network.proxy.allow_hijacking_localhost", "true"}, {"network.proxy.failover_direct", "false"},
		{"network.trr.mode", "5"}, {"network.dns.disablePrefetch", "true"}, {"network.dns.disablePrefetchFromHTTPS", "true"},
		{"network.http.http3.enable", "false"}, {"network.captive-portal-service.enabled", "false"},
		{"network.connectivity-service.enabled", "false"}, {"media.peerconnection.ice.proxy_only", "true"},
		{"browser.shell.checkDefaultBrowser", "false"}, {"browser.aboutwelcome.enabled", "false"},
	} {
		fmt.Fprintf(&b, "user_pref(%q, %s);\n", line[0], line[1])
	}
	return b.String()
}
