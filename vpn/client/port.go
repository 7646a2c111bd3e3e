package client

import (
	"errors"
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
// nobody listens on. It is remembered, since it stands in browsers and in shells.
func listenLocal(p *Profile) (net.Listener, error) {
	file, err := stateFile(p, ".port")
	if err != nil {
		return nil, err
	}
	own := readPort(file)
	others := []int{}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(file), "*.port"))
	if err != nil {
		return nil, err
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
	var errs error
	for _, port := range ports {
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		if port != own {
			err = writePrivate(file, []byte(strconv.Itoa(port)+"\n"))
		}
		if err != nil {
			l.Close()
			return nil, err
		}
		return l, nil
	}
	return nil, fmt.Errorf("local listener: none of %d ports from %d is free: %w", len(ports), firstPort, errs)
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
