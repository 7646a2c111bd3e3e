// Package firewall owns the one nftables table in which knocks are decided, windows open and expire, and the reach of
// the tunnel and of the daemon itself is bounded. The kernel does all of it by itself: the daemon compiles the table,
// writes tokens ahead of time and observes. Killed, it leaves the door exactly as closed as before.
//
// What stands against whom:
//
//   - A stranger gets no answer from the gate's ports, whatever he sends, until a knock opens a window for his address.
//   - A token opens once. The limit inside the spent element is atomic on every CPU, where a delete from the map is not;
//     the element stays as a tombstone longer than the token lives.
//   - A scan completes no sequence: any other new packet puts its source back to the start, and knock ports answer as
//     every other port does, so that silence tells nothing.
//   - A flood is paced per source before any map is written; sequences have windows of their own, so that whoever knows
//     one cannot fill those of the tokens.
//   - Another tool that flushes the ruleset leaves the gate deaf (Interlock) until Watch repairs the table.
//   - What the daemon dials is judged again by its group on the way out, whatever the proxy's code forgot.
//
// The table as a person would write it, with example values (gate 1194/tcp, tunnel and tokens 1194/udp, network
// 10.77.0.0/16, group 65534, proxy 3128, console 80). A test loads this very text with nft and compares listing and
// bytecode with what Apply builds.
//
//	table inet perimeterd {
//		# Token knock: 16-byte tokens -> credential id, written ahead, each with its own timeout. One-time is the limit
//		# inside the spent element: atomic per element where a delete is not. The element is also the tombstone.
//		map tokens { typeof @th,64,128 : meta mark; flags timeout; size 1048576; timeout 90s; }
//		set spent { typeof @th,64,128; flags dynamic,timeout; size 1048576; timeout 3m; }
//
//		# Windows: source -> credential id. The kernel expires them; the daemon keeps no timer. A window opened by a
//		# sequence lives apart, so that nobody who knows a sequence can fill the tokens' windows.
//		map open4 { type ipv4_addr : mark; flags dynamic,timeout; size 65536; timeout 1m; }
//		map open6 { type ipv6_addr : mark; flags dynamic,timeout; size 65536; timeout 1m; }
//		map seq4 { type ipv4_addr : mark; flags dynamic,timeout; size 65536; timeout 1m; }
//		map seq6 { type ipv6_addr : mark; flags dynamic,timeout; size 65536; timeout 1m; }
//
//		# Authenticated outer endpoints of live tunnels, address and port: UDP outlives the window, TCP never does.
//		set peer4 { type ipv4_addr . inet_service; flags timeout; size 65536; }
//		set peer6 { type ipv6_addr . inet_service; flags timeout; size 65536; }
//
//		# Tunnel addresses of live sessions, and services beyond proxy and console that a session may reach.
//		# Each element's timeout is its session's expiry.
//		set admitted { type ipv4_addr; flags timeout; size 65536; }
//		set service { type ipv4_addr . inet_service; flags timeout; size 65536; }
//
//		# Sequence knock: where each source is, and how fast it may go on.
//		map progress4 { type ipv4_addr : mark; flags dynamic,timeout; size 65536; timeout 10s; }
//		map progress6 { type ipv6_addr : mark; flags dynamic,timeout; size 65536; timeout 10s; }
//		set pace4 { type ipv4_addr; flags dynamic,timeout; size 65536; timeout 10s; }
//		set pace6 { type ipv6_addr; flags dynamic,timeout; size 65536; timeout 10s; }
//
//		# Every sequence compiled to one automaton: state . protocol . port -> next state.
//		# Bit 31 set: complete, the low bits are the credential id. Ports already hit are self-loops.
//		map step { type mark . inet_proto . inet_service : mark; size 65536; }
//		set knockports { type inet_proto . inet_service; size 65536; }
//
//		# Sources that need no knock, which the configuration names.
//		set trusted4 { type ipv4_addr; flags interval; }
//		set trusted6 { type ipv6_addr; flags interval; }
//
//		# Private destinations that the daemon may still dial: proxy.allow_private, etcd.
//		set reach { type ipv4_addr . inet_service; flags interval; }
//
//		chain input {
//			type filter hook input priority filter - 5; policy accept;
//			iif "lo" accept
//			iifname "perimeter0" goto tunnel
//			ip daddr 10.77.0.0/16 drop
//			ip saddr 10.77.0.0/16 drop
//			tcp dport 1194 goto gate
//			udp dport 1194 udp length 24 goto token
//			udp dport 1194 goto gate
//			ct state established,related accept
//			meta l4proto . th dport @knockports goto knock
//			tcp flags & (fin | syn | rst | ack) == syn jump stray
//			meta l4proto udp jump stray
//		}
//
//		# A map is looked up for its data only: kernel 6.1 takes no map for a set. So the credential is the mark for a moment.
//		# The mark is an interlock: the gate's sockets filter out what does not carry it, so that a flushed table
//		# leaves them deaf instead of open.
//		chain gate {
//			ct state established meta mark set 0x67617465 accept
//			ct state invalid drop
//			meta mark set ip saddr map @open4 meta mark set 0x67617465 accept
//			meta mark set ip6 saddr map @open6 meta mark set 0x67617465 accept
//			meta mark set ip saddr map @seq4 meta mark set 0x67617465 accept
//			meta mark set ip6 saddr map @seq6 meta mark set 0x67617465 accept
//			ip saddr @trusted4 meta mark set 0x67617465 accept
//			ip6 saddr @trusted6 meta mark set 0x67617465 accept
//			ip saddr . udp sport @peer4 meta mark set 0x67617465 accept
//			ip6 saddr . udp sport @peer6 meta mark set 0x67617465 accept
//			drop
//		}
//
//		# No WireGuard message is as short as a token, so both share a port, a flow and a NAT mapping: what follows a token
//		# from the same socket never overtakes it.
//		chain token {
//			ct state invalid drop
//			fib daddr type != local drop
//			@th,64,128 @spent goto refused
//			meta mark set @th,64,128 map @tokens add @spent { @th,64,128 limit rate 1/day burst 1 packets } goto open
//			goto refused
//		}
//
//		# What opened nothing is told by a prefix, at a rate that no stranger can raise: the limit comes first, so that a
//		# flood costs no lookup more. A token of these steps that did not open was spent before.
//		chain refused {
//			limit rate over 5/second burst 5 packets drop
//			meta mark set @th,64,128 map @tokens log prefix "token-replayed" group 1194 queue-threshold 1 drop
//			log prefix "token-refused" group 1194 queue-threshold 1 drop
//		}
//
//		# Logged in the rule that adds, so the log never reports an opening that a full map refused. Who comes past it had no
//		# room.
//		# update refreshes a timeout but never a map element's data, hence delete and add.
//		chain open {
//			delete @open4 { ip saddr : meta mark }
//			delete @open6 { ip6 saddr : meta mark }
//			add @open4 { ip saddr : meta mark } log group 1194 queue-threshold 1 drop
//			add @open6 { ip6 saddr : meta mark } log group 1194 queue-threshold 1 drop
//			limit rate 1/second burst 5 packets log prefix "windows-full" group 1194 queue-threshold 1
//			drop
//		}
//
//		# A knock port answers like any other port of this host: every path returns to the policy, none drops, or a
//		# prober could read the sequence off the silence, step by step.
//		chain knock {
//			ct state invalid return
//			tcp flags & (fin | syn | rst | ack) != syn return
//			update @pace4 { ip saddr limit rate 20/second burst 20 packets } goto knock_step
//			update @pace6 { ip6 saddr limit rate 20/second burst 20 packets } goto knock_step
//		}
//
//		chain knock_step {
//			meta mark set 0x00000000
//			meta mark set ip saddr map @progress4
//			meta mark set ip6 saddr map @progress6
//			delete @progress4 { ip saddr : meta mark }
//			delete @progress6 { ip6 saddr : meta mark }
//			meta mark set meta mark . meta l4proto . th dport map @step goto knock_hit
//			meta mark != 0x00000000 limit rate 5/second burst 5 packets log prefix "sequence-reset" group 1194 queue-threshold 1
//			meta mark set 0x00000000
//		}
//
//		chain knock_hit {
//			meta mark & 0x80000000 != 0x00000000 goto seq_open
//			add @progress4 { ip saddr : meta mark }
//			add @progress6 { ip6 saddr : meta mark }
//			meta mark set 0x00000000
//		}
//
//		chain seq_open {
//			delete @seq4 { ip saddr : meta mark }
//			delete @seq6 { ip6 saddr : meta mark }
//			add @seq4 { ip saddr : meta mark } goto seq_opened
//			add @seq6 { ip6 saddr : meta mark } goto seq_opened
//			limit rate 1/second burst 5 packets log prefix "windows-full" group 1194 queue-threshold 1
//			meta mark set 0x00000000
//		}
//
//		chain seq_opened {
//			limit rate 50/second burst 100 packets log group 1194 queue-threshold 1
//			meta mark set 0x00000000
//		}
//
//		# Any other new packet resets a sequence in progress. It never writes the packet's mark: other tools route by it.
//		chain stray {
//			delete @progress4 { ip saddr : meta mark }
//			delete @progress6 { ip6 saddr : meta mark }
//		}
//
//		# Inside the tunnel a session reaches the proxy, the console and what its groups allow; positive matches only.
//		chain tunnel {
//			ip daddr != 10.77.0.1 drop
//			ip saddr @admitted tcp dport { 80, 3128 } accept
//			ip saddr . tcp dport @service accept
//			ip saddr @admitted icmp type echo-request accept
//			ip saddr @admitted ct state established accept
//			drop
//		}
//
//		chain forward {
//			type filter hook forward priority filter - 5; policy accept;
//			iifname "perimeter0" drop
//			oifname "perimeter0" drop
//		}
//
//		# Backstop under the proxy's own checks: whatever the daemon dials, in whatever code.
//		chain output {
//			type filter hook output priority filter - 5; policy accept;
//			oifname "perimeter0" ip daddr != @admitted drop
//			oifname "perimeter0" meta nfproto ipv6 drop
//			meta skgid 65534 tcp flags & (fin | syn | rst | ack) == syn goto egress
//		}
//
//		chain egress {
//			ip daddr . tcp dport @reach accept
//			fib daddr type != unicast reject
//			oifname "perimeter0" reject
//			ip daddr { 0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.0.0.0/24, 192.168.0.0/16, 198.18.0.0/15, 224.0.0.0/3 } reject
//			meta nfproto ipv6 reject
//		}
//	}
//
// In host mode the policy of input is drop and its last rule is "goto host". With firewall.allow = ["22/tcp", "8000-8010/udp
// from 198.51.100.0/24 on eth1", "icmp", "443/tcp from 2001:db8::/32"]:
//
//	chain host {
//		ct state invalid drop
//		ip6 hoplimit 255 icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept
//		icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept
//		udp sport 67 udp dport 68 accept
//		ip6 saddr fe80::/10 udp sport 547 udp dport 546 accept
//		tcp dport 22 accept
//		iifname "eth1" ip saddr 198.51.100.0/24 udp dport 8000-8010 accept
//		meta l4proto icmp accept
//		meta l4proto ipv6-icmp accept
//		ip6 saddr 2001:db8::/32 tcp dport 443 accept
//	}
package firewall
