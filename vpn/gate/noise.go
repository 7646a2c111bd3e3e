package gate

import (
	"crypto/hmac"
	"hash"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/crypto/curve25519"

	"perimeterd/vpn"
)

// initiator reads the static public key out of a handshake initiation for the server's private key: the first step of
// Noise_IKpsk2 (https://www.wireguard.com/papers/wireguard.pdf, 5.4.2). It says who made the message, not that he sent it.
func initiator(initiation []byte, private, public [32]byte) (static [32]byte, ok bool) {
	// type u32, sender u32, ephemeral 32, static 32+16, timestamp 12+16, mac1 16, mac2 16; integers little-endian
	if len(initiation) != vpn.InitiationSize || [4]byte(initiation[:4]) != [4]byte{1} {
		return static, false
	}
	ephemeral, sealed := initiation[8:40], initiation[40:88]
	chain := blake2s.Sum256([]byte("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))
	transcript := sum(chain[:], []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"))
	transcript = sum(transcript[:], public[:])
	transcript = sum(transcript[:], ephemeral)
	shared, err := curve25519.X25519(private[:], ephemeral)
	if err != nil {
		return static, false
	}
	secret := mac(chain[:], ephemeral)
	secret = mac(secret, []byte{1})
	secret = mac(secret, shared)
	first := mac(secret, []byte{1})
	key := mac(secret, append(first, 2))
	aead, err := chacha20poly1305.New(key)
	if err != nil {
		return static, false
	}
	var nonce [chacha20poly1305.NonceSize]byte
	_, err = aead.Open(static[:0], nonce[:], sealed, transcript[:])
	return static, err == nil
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
