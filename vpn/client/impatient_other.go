//go:build !linux

package client

import (
	"math"
	"net"
	"syscall"
	"time"
)

// impatient has nothing to ask for on other systems.
func impatient(_, _ string, _ syscall.RawConn) error { return nil }

// merelySlow is not known.
func merelySlow(net.Conn) bool { return false }

// tcpRoundTrip is not known.
func tcpRoundTrip(net.Conn) time.Duration { return math.MaxInt64 }
