package identity

import (
	"os/exec"
	"strings"
	"testing"
)

// The oracle is wg, of wireguard-tools.
func TestPublicKeyIsWhatWgComputes(t *testing.T) {
	private := [32]byte{0: 0xff, 7: 0x2a, 31: 0xff} // not clamped: the bits that X25519 ignores are set
	cmd := exec.Command("wg", "pubkey")
	cmd.Stdin = strings.NewReader(string(EncodeKey(private)))
	want, err := cmd.Output()
	if err != nil {
		t.Fatalf("wg pubkey: %v: install wireguard-tools", err)
	}
	got, err := PublicKey(private)
	if err != nil || string(EncodeKey(got)) != string(want) {
		t.Fatalf("%s, %v; want %s", EncodeKey(got), err, want)
	}
}
