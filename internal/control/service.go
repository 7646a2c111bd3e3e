package control

import (
	"os"
	"path/filepath"
)

// Unit is the daemon's service, where it was installed as one.
const Unit = "perimeterd.service"

// serviceSocket is where the service answers with the configuration as it is shipped.
const serviceSocket = "/run/perimeterd/control.sock"

// HasService says whether systemd runs this host (sd_booted(3)) and has the daemon's unit.
func HasService() bool { return hasService("/") }

func hasService(root string) bool {
	if _, err := os.Stat(filepath.Join(root, "run/systemd/system")); err != nil {
		return false
	}
	for _, dir := range []string{"etc", "run", "usr/local/lib", "usr/lib", "lib"} { // systemd.unit(5)
		if _, err := os.Stat(filepath.Join(root, dir, "systemd/system", Unit)); err == nil {
			return true
		}
	}
	return false
}
