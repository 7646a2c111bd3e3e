package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"perimeterd/vpn/client"
)

func enrollCommand() *cobra.Command {
	device, out := "", ""
	c := &cobra.Command{
		Use: "enroll NAME", Short: "Make a key here, and a request for its certificate", Args: oneArgument,
		Long: "Makes a private key, which never leaves this machine, and a request that the operator signs: perimeterd user add --request.\n" +
			"`vpn import` joins the profile that comes back with the key. Asked again before that, it writes a request for the same key.",
		Example: "  vpn enroll alice                     writes alice.csr\n  vpn enroll alice --device mac --out -",
		RunE: func(_ *cobra.Command, args []string) error {
			e, err := client.Enroll(args[0], device)
			if err != nil {
				return err
			}
			if out == "-" {
				_, err := os.Stdout.Write(e.Request)
				return err
			}
			if out == "" {
				out = e.Name + ".csr"
			}
			if err := writeRequest(out, e.Request); err != nil {
				return err
			}
			waits := "is kept in"
			if !e.Fresh {
				waits = "was made before, and waits in"
			}
			fmt.Printf("The key %s %s %s\n\n", e.KeyID, waits, e.Key)
			fmt.Printf("Send %s to the operator, who runs, and compares the key:\n    perimeterd user add %s --request %s\n", out, args[0], out)
			fmt.Printf("Here, with what comes back:\n    vpn import %s.profile\n", args[0])
			return nil
		},
	}
	c.Flags().StringVar(&device, "device", "", "`NAME` that tells your devices apart")
	c.Flags().StringVar(&out, "out", "", "request `FILE` to write, - for standard output (default NAME.csr)")
	return c
}

// writeRequest writes a new file, or leaves one that asks for the same key already.
func writeRequest(file string, request []byte) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		if old, err := os.ReadFile(file); err == nil && client.SameKey(old, request) {
			return nil
		}
		return fmt.Errorf("%s exists, with something else in it, and is not overwritten: name another file with --out", file)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(request)
	if err = errors.Join(err, f.Close()); err != nil { // half a request is none
		return errors.Join(fmt.Errorf("%s is not written: %w", file, err), os.Remove(file))
	}
	return nil
}
