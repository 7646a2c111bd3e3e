package client

import "runtime/debug"

// Release is the version of the Debian package, which its build sets (go build -ldflags "-X perimeterd/vpn/client.Release=..."),
// and nobody else. Empty elsewhere.
var Release string

// Version is the package's, else the main module's, as the build recorded it.
func Version() string {
	if Release != "" {
		return Release
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
