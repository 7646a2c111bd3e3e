package client

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// firstPort is where the first profile's local listener is, as the bastion's proxy is there.
const firstPort = 3128

// portCount is how many ports are tried.
const portCount = 256

// listenLocal opens the profile's port on this machine: the one it had before, else the first that no other profile has and
// nobody listens on. It is remembered, since it stands in browsers and in shells. Lost is the one it had before, where another
// program has that now.
func listenLocal(p *Profile) (l net.Listener, lost int, err error) {
	file, err := stateFile(p, ".port")
	if err != nil {
		return nil, 0, err
	}
	own := readPort(file)
	others := []int{}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(file), "*.port"))
	if err != nil {
		return nil, 0, err
	}
	for _, f := range files {
		if f != file {
			others = append(others, readPort(f))
		}
	}
	ports := []int{}
	if own != 0 {
		ports = append(ports, own)
	}
	for port := firstPort; port < firstPort+portCount; port++ {
		if port != own && !slices.Contains(others, port) {
			ports = append(ports, port)
		}
	}
	var last error
	for _, port := range ports {
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			last = err
			continue
		}
		if port != own {
			lost, err = own, writePrivate(file, []byte(strconv.Itoa(port)+"\n"))
		}
		if err != nil {
			l.Close()
			return nil, 0, err
		}
		return l, lost, nil
	}
	return nil, 0, fmt.Errorf("local listener: none of %d ports from %d on 127.0.0.1 can be had: end a program that listens on one of them: %w", len(ports), firstPort, last)
}

// readPort returns 0 where a file holds no port.
func readPort(file string) int {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	port, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || port < 1 || port > 65535 {
		return 0
	}
	return port
}
