package main

import (
	"os"
	"strconv"
	"strings"
)

// takesEarly is the bit of net.ipv4.tcp_fastopen that lets listeners which ask for it take data with a SYN
// (https://docs.kernel.org/networking/ip-sysctl.html).
const takesEarly = 2

// checkEarly says whether this host's kernel lets requests come with the first packet of their connection, as the proxy asks it to.
func checkEarly() line {
	const name, setting = "requests with the first packet", "net.ipv4.tcp_fastopen"
	text, err := os.ReadFile("/proc/sys/net/ipv4/tcp_fastopen")
	if err != nil {
		return line{"warning", name, err.Error()}
	}
	value, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return line{"warning", name, setting + ": " + err.Error()}
	}
	if value&takesEarly == 0 {
		return line{"warning", name, setting + " = " + strconv.Itoa(value) + ": each request from the tunnel takes a round trip more: run: sysctl -w " + setting +
			"=" + strconv.Itoa(value|takesEarly)}
	}
	return line{"ok", name, setting + " = " + strconv.Itoa(value)}
}
