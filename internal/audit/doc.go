// Package audit keeps what happened: every knock, session, refusal, proxied connection and operator's act as one JSON
// record a line, in append-only files whose records are chained by hash.
//
// A file is NUMBER-DAY.jsonl, eight digits and the day (UTC) on which it was begun, so that `cat *.jsonl` has them in order. A
// new one begins with the day, or after 32 MiB. A line is
//
//	{"seq":17,"time":"2026-01-02T03:04:05.6Z","kind":"session-began",…,"hash":"64 hexadecimal digits"}
//
// Seq counts from 1 through all files. Hash is SHA-256 over the hash of the record before, as its 64 digits, and the line up to
// `,"hash":`; before the first record stand 64 zeros. So a shell can follow the chain:
//
//	printf %s%s "$previous" "${line%,\"hash\":*}" | sha256sum
//
// The first record of each file is a file-began; its prev repeats the hash of the record before, which may be in a file that is
// gone: when files are older than they are kept, a files-expired record says which records go with them (through, and that
// one's hash as prev) before they are removed.
//
// # What the chain shows
//
// A changed, removed, inserted or moved record breaks it, and Verify names the place. Whoever can write the files can also
// compute a new chain, or cut off its end. Against that stands the head, seq:hash of the newest record, which is logged when it
// is on the disk: at the start, at the end, and every hour. The journal and wherever it is forwarded to hold what the files held;
// Verify compares all heads it is given. What was cut off in less than an hour after it was written may go unseen.
//
// # Crashes
//
// Records are handed to the kernel in the order in which they came, within milliseconds, so a killed daemon loses next to
// nothing; they are on the disk after a second at most, acts of operators and revocations at once. A machine that loses power
// may leave the last line torn. It is not touched: the next start begins a new file whose file-began names the torn end (file,
// bytes, their SHA-256), and the chain goes on from the last whole record. Verify takes exactly these bytes for a tear, as long
// as no whole record stands among them; anything else that is no record it takes for a change. Records of connections are
// written at their end, so those of connections that a kill cut off are missing; a daemon-started without a daemon-stopped
// before it says that this may be so.
//
// # A disk that is full or slow
//
// Nobody waits for the audit: what is added goes into a bounded queue, and what finds it full, or the disk full, is counted. The
// first record after that is a records-lost with count and span. The last 32 MiB of the file system are left alone: they are the
// state's, whose revocations must be durable.
package audit
