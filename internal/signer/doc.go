// Package signer is the small process that holds the CA key, so that the one which parses TLS cannot mint identities.
//
// # Who asks for what
//
// A request comes in one packet over a unix socket (SOCK_SEQPACKET), and is answered with one packet, both JSON and bounded. Who
// asks is known from the kernel (SO_PEERCRED), never from the request:
//
//	root         everything: certificates for users and for the gate
//	the daemon   to renew what is about to end, and to forget what was revoked
//	others       nothing
//
// Where the daemon runs as root too, it starts a signer of its own that does no more than renew and forget. A daemon that was
// taken over as root can read the key itself, and nothing here stands against that: it takes a user of its own.
//
// # What a renewal needs
//
// The signer judges by what it knows itself. Beside the key, in the directory renewable, it keeps a file for each user with
// the certificates that it issued to him and that may be renewed (record.go). A certificate is renewed when
//
//   - it was issued by this authority, holds now, and names clientAuth and nothing else;
//   - it stands in the record: revoking takes it out, and so does its end;
//   - less than a third of its time is left, or its authority is on the way out;
//   - its key signed the request for the new key (vpn.RenewalMessage), which signed too: who relays the two, such as a gate
//     that was taken over, gets nothing for a key of his own;
//   - it was not renewed before with another key: a certificate has one successor, so that a copy of it is worth nothing
//     after the renewal, and who finds his own used up knows that somebody else was first.
//
// The new certificate has the old one's name and device, may be a client only, and ends a year after the enrolment at the latest.
// Of the request only the key counts. The record is written before the signature: without a disk nothing is signed.
//
// A lost record costs renewals and nothing else: `perimeterd user profile` enrols anew.
package signer
