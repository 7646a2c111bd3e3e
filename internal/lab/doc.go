// Package lab is a machine room made of network namespaces, in which the built binaries meet real sockets, a real
// kernel firewall and a real HTTPS server. End-to-end tests, the demo and the benchmarks stand on it. It needs root.
//
//	      client ────────────── internet ────────────── bastion ──────────── cloud
//	198.18.1.2 (.3 a stranger)  (a bridge)       198.18.1.1 │ 198.19.1.1     198.19.1.2
//	2001:db8:18:1::2                │          2001:db8:18:1::1 198.19.1.10   2001:db8:19:1::2
//	                            more hosts                    (the egress)   DNS, HTTP, HTTPS
//	                             AddHost
//
// Interfaces are called outside (client, bastion, added hosts), egress (bastion) and eth0 (cloud). The client has no
// way to the cloud unless Options.RouteViaBastion gives it one. With Options.LongLink the client's cable is a program
// that holds packets; names and addresses stay the same.
//
// A person can look inside while a lab runs: `ip netns list`, `ip netns exec perimeter-lab-PID-N-bastion nft list ruleset`.
//
// Nothing stays behind. Close kills what runs inside and removes every namespace; it is also called when New's context
// ends, and Start calls it at the end of the test, on SIGINT and on SIGTERM. What a killed run leaves (names carry the
// PID of their owner) is removed by the next New. While a lab runs, it is all of this:
//
//	/run/netns/perimeter-lab-PID-N-HOST    the namespace, as `ip netns` keeps it
//	/etc/netns/perimeter-lab-PID-N-HOST/   its resolv.conf, hosts and nsswitch.conf, as `ip netns exec` reads them
//	/run/perimeter-lab-PID-N/              Lab.Dir: files that last as long as the lab
package lab
