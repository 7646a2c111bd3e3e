package client

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
)

func TestOfTwoHandshakesThatFailTheOneIsToldThatNoTryHelps(t *testing.T) {
	refused, cut := fmt.Errorf("dial: %w", syscall.ECONNREFUSED), errors.New("cut short")
	stranger, other := &RefusedError{"gate_unknown", "another CA"}, &RefusedError{"gate_other", "another gate"}
	for _, c := range []struct{ before, now, want error }{
		{nil, refused, refused},
		{nil, stranger, stranger},
		{refused, cut, refused},
		{refused, stranger, stranger},
		{stranger, refused, stranger},
		{stranger, other, stranger},
	} {
		if got := telling(c.before, c.now); got != c.want {
			t.Errorf("%v, then %v: %v is told", c.before, c.now, got)
		}
	}
}
