package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"perimeterd/vpn/client"
)

func importCommand() *cobra.Command {
	force, passphraseFile := false, ""
	c := &cobra.Command{
		Use: "import FILE", Short: "Keep a profile, asking its passphrase where it has one", Args: oneArgument,
		RunE: func(_ *cobra.Command, args []string) error {
			passphrase := askPassphrase
			if passphraseFile != "" {
				passphrase = func() ([]byte, error) { return readPassphrase(passphraseFile) }
			}
			open := client.OpenToOthers(args[0])
			p, kept, err := client.Import(args[0], passphrase, force)
			if err != nil {
				return err
			}
			fmt.Printf("profile %s kept in %s; its certificate is valid until %s\n", p.Name(), kept, p.Expires().Local().Format("2006-01-02 15:04"))
			if open != nil {
				fmt.Fprintf(os.Stderr, "warning: %s: %v: if anybody else could read it here, ask the operator for a new one\n", args[0], open)
			}
			fmt.Fprintf(os.Stderr, "%s is not needed any more: delete it, it opens the same door\n", args[0])
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace another profile of the same name")
	c.Flags().StringVar(&passphraseFile, "passphrase-file", "", "take the passphrase from the first line of `FILE`")
	return c
}

// askPassphrase asks on the terminal, also when input and output are redirected.
func askPassphrase() ([]byte, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		if tty = os.Stdin; !term.IsTerminal(int(tty.Fd())) {
			return nil, errors.New("it is protected by a passphrase, and there is no terminal to ask at: give --passphrase-file FILE")
		}
	} else {
		defer tty.Close()
	}
	fmt.Fprint(os.Stderr, "Passphrase: ")
	defer fmt.Fprintln(os.Stderr)
	return term.ReadPassword(int(tty.Fd()))
}

func readPassphrase(file string) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 {
		return nil, fmt.Errorf("passphrase: the first line of %s is empty", file)
	}
	return line, nil
}
