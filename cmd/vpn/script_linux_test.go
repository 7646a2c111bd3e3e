package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/rogpeppe/go-internal/testscript"

	"perimeterd/vpn/client/clienttest"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		playRole(role)
		return
	}
	testscript.Main(built{m}, map[string]func(){"vpn": main})
}

// TestCommandLines reads like a terminal: testdata/script.
func TestCommandLines(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("XDG_CONFIG_HOME", filepath.Join(e.WorkDir, "config"))
			e.Setenv("XDG_RUNTIME_DIR", "")
			g, err := clienttest.NewGate()
			if err != nil {
				return err
			}
			for _, user := range []string{"alice", "bob"} {
				p, err := g.Profile(user, "127.0.0.1:1", 1, 100*time.Hour)
				if err != nil {
					return err
				}
				text, err := toml.Marshal(p)
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(e.WorkDir, user), text, 0o600); err != nil {
					return err
				}
			}
			return nil
		},
	})
}
