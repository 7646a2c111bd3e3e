package gate

import (
	"crypto/hmac"
	"encoding/binary"
	"hash"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/crypto/curve25519"

	"perimeterd/vpn"
)

// initiation is a handshake initiation, opened as far as the server's private key alone opens it: the first step of
// Noise_IKpsk2 (https://www.wireguard.com/papers/wireguard.pdf, 5.4.2).
type initiation struct {
	static            [32]byte // the public key of who made it, which does not say that he sent it
	chain, transcript [blake2s.Size]byte
	sealed            []byte // its timestamp
}

// openInitiation reads a message for the server's keys. Its layout: type u32, sender u32, ephemeral 32, static 32+16,
// timestamp 12+16, mac1 16, mac2 16; integers little-endian.
func openInitiation(message []byte, private, public [32]byte) (i initiation, ok bool) {
	if len(message) != vpn.InitiationSize || [4]byte(message[:4]) != [4]byte{messageInitiation} || !mac1(message, public) {
		return i, false
	}
	ephemeral, sealed := message[8:40], message[40:88]
	i.sealed = message[88:116]
	i.chain = blake2s.Sum256([]byte("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))
	i.transcript = sum(i.chain[:], []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"))
	i.transcript = sum(i.transcript[:], public[:])
	i.transcript = sum(i.transcript[:], ephemeral)
	i.chain = [32]byte(mac(mac(i.chain[:], ephemeral), []byte{1}))
	shared, err := curve25519.X25519(private[:], ephemeral)
	if err != nil || !i.unseal(i.static[:], shared, sealed) {
		return i, false
	}
	i.transcript = sum(i.transcript[:], sealed)
	return i, true
}

// stamp is when it was made by its maker's clock: TAI64N, in the order of bytes. Shared is the secret of both static keys:
// only who has one of the private ones can have sealed it.
func (i initiation) stamp(shared [32]byte) (stamp [12]byte, ok bool) {
	ok = i.unseal(stamp[:], shared[:], i.sealed)
	return stamp, ok
}

// madeAt is the time of a stamp (https://cr.yp.to/libtai/tai64.html), to the second and without its leap seconds.
func madeAt(stamp [12]byte) time.Time {
	return time.Unix(int64(binary.BigEndian.Uint64(stamp[:])-1<<62), 0)
}

// unseal mixes a shared secret into the chain, and opens what is sealed by the key that follows.
func (i *initiation) unseal(to, shared, sealed []byte) bool {
	secret := mac(i.chain[:], shared)
	next := mac(secret, []byte{1})
	i.chain = [32]byte(next)
	aead, err := chacha20poly1305.New(mac(secret, append(next, 2)))
	if err != nil {
		return false
	}
	var nonce [chacha20poly1305.NonceSize]byte
	_, err = aead.Open(to[:0], nonce[:], sealed, i.transcript[:])
	return err == nil
}

// mac1 tells whether a handshake message was made for this public key, without the cost of a curve (5.4.4).
func mac1(message []byte, public [32]byte) bool {
	key := sum([]byte("mac1----"), public[:])
	m, err := blake2s.New128(key[:])
	if err != nil {
		return false
	}
	end := len(message) - 2*blake2s.Size128
	m.Write(message[:end])
	return hmac.Equal(m.Sum(nil), message[end:end+blake2s.Size128])
}

func sum(a, b []byte) [blake2s.Size]byte {
	return blake2s.Sum256(append(append([]byte(nil), a...), b...))
}

// mac is HMAC-BLAKE2s-256.
func mac(key, data []byte) []byte {
	m := hmac.New(func() hash.Hash {
		h, _ := blake2s.New256(nil) // fails for a key that is too long only, and there is none
		return h
	}, key)
	m.Write(data)
	return m.Sum(nil)
}
