package firewall

import (
	"net/netip"
	"testing"
	"time"

	"perimeterd/internal/console"
)

var _ console.Sets = (*Firewall)(nil)

func TestFillCountsElementsAndKnowsSizes(t *testing.T) {
	f := applied(t, example())
	var list []Token
	for i := range 2500 {
		list = append(list, Token{[16]byte{byte(i), byte(i >> 8)}, 7, soon()})
	}
	if err := f.AddTokens(list); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := f.Admit(netip.AddrFrom4([4]byte{10, 77, 1, byte(i)}), nil, soon()); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	fill, err := f.Fill()
	t.Log("Fill took ", time.Since(start))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]console.Fill{"tokens": {Elements: 2500, Size: tokenSize}, "spent": {Size: tokenSize}, "admitted": {Elements: 3, Size: setSize}, "open4": {Size: setSize}, "reach": {}}
	for name, w := range want {
		if fill[name] != w {
			t.Errorf("%s: %+v, want %+v", name, fill[name], w)
		}
	}
	if len(fill) != 19 {
		t.Errorf("%d sets: %v", len(fill), fill)
	}
}
