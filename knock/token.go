package knock

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// TokenSize is the length of a token, bytes. No WireGuard message is as short.
const TokenSize = 16

// Indexes is how many tokens a credential has in one step: a user can knock that often in it.
const Indexes = 4

// MinStep is the shortest step: what clocks and networks here can keep.
const MinStep = 5 * time.Second

// Token is a one-time knock.
type Token [TokenSize]byte

// ServerID tells bastions apart: a token for one is worth nothing at another.
type ServerID [16]byte

// Secret derives a user's knock secret (32 bytes) from the server's master. A new epoch makes all earlier ones worthless.
func Secret(master []byte, user string, epoch uint32) []byte {
	m := hmac.New(sha256.New, master)
	m.Write([]byte("perimeterd knock secret 1\x00"))
	m.Write(binary.BigEndian.AppendUint32(nil, epoch))
	m.Write([]byte(user))
	return m.Sum(nil)
}

// NewToken derives the token of a step and an index below Indexes.
func NewToken(secret []byte, server ServerID, step int64, index uint8) (t Token) {
	m := hmac.New(sha256.New, secret)
	m.Write([]byte("perimeterd knock token 1\x00"))
	m.Write(server[:])
	m.Write(append(binary.BigEndian.AppendUint64(nil, uint64(step)), index))
	copy(t[:], m.Sum(nil))
	return t
}

// StepAt is the step that now lies in.
func StepAt(now time.Time, length time.Duration) int64 { return now.UnixNano() / int64(length) }

// Start is when a step begins.
func Start(step int64, length time.Duration) time.Time { return time.Unix(0, step*int64(length)) }

// Life is how long the tokens of a step written now stay valid: until the step is two steps past. It is never more than
// four steps, for a step written two ahead; zero or less means they are past already.
func Life(step int64, length time.Duration, now time.Time) time.Duration {
	return min(Start(step+2, length).Sub(now), 4*length)
}

// Credential is a user as the kernel maps know him.
type Credential struct {
	ID     uint32 // stable across restarts, 1 to MaxCredential
	Secret []byte
}

// MaxCredential is the highest credential id: bit 31 marks a completed sequence.
const MaxCredential = 1<<31 - 1
