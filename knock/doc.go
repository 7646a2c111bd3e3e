// Package knock says what the kernel's maps must hold so that a knock opens a window, and sends knocks. Nothing here
// touches the kernel's tables: time and secrets come in as arguments, map elements go out.
//
// # Token
//
// One UDP datagram to the tunnel's port whose 16-byte payload is a one-time token:
//
//	secret = HMAC-SHA-256(master, "perimeterd knock secret 1" 0 ‖ uint32 epoch ‖ user)
//	token  = HMAC-SHA-256(secret, "perimeterd knock token 1" 0 ‖ server id [16] ‖ uint64 step ‖ uint8 index)[:16]
//
// with integers in network byte order and step = floor(unix time / step length). The daemon writes the tokens of steps
// t-1, t and t+1 into the kernel ahead of time; each may be spent once, and expires by itself when its step is two steps
// past. An outsider guesses one of N live tokens with probability N/2^128 a packet. Someone on the path who holds a token
// back may spend it himself: a knock hides the gate, it does not authenticate; certificates do.
//
// # Sequence
//
// TCP SYN or UDP packets to ports in an agreed order, as knockd has it. It is a fixed secret that anyone on the path can
// read and repeat: it hides the gate from scans, no more.
package knock
