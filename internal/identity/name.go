package identity

import (
	"fmt"
	"regexp"
)

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// CheckName refuses what is not a name of a user, device or group. What names the thing in the error.
func CheckName(what, name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("%s %q: %w: want 1 to 64 of a-z 0-9 . _ - with a letter or digit first", what, name, ErrName)
	}
	return nil
}
