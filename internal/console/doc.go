// Package console shows the running daemon: to those who run it metrics for Prometheus, and an alarm before a set of the
// firewall's table is full; to a session, on the tunnel address, its browser's proxy configuration. It only looks: nothing
// here opens, ends or changes anything.
package console
