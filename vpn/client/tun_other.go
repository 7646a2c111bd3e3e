//go:build !linux

package client

import (
	"errors"
	"runtime"
)

func mayMakeDevice() bool { return false }

// NewSystemTUN makes a tunnel interface.
func NewSystemTUN() (Link, error) {
	return nil, errors.New("a tunnel device is not supported on " + runtime.GOOS + " by this version: it is on Linux")
}

// BecomeInvoker has nothing to do where there is no tunnel device.
func BecomeInvoker() error { return nil }

// WithoutPrivilege calls start.
func WithoutPrivilege(start func() error) error { return start() }
