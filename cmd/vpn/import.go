package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"perimeterd/vpn/client"
)

func importCommand() *cobra.Command {
	force, passphraseFile, keyFile := false, "", ""
	c := &cobra.Command{
		Use: "import FILE", Short: "Keep a profile, asking its passphrase where it has one", Args: oneArgument,
		Long: "Keeps a profile where the other commands find it. One without a key is joined with the key that `vpn enroll` made here, or with\n" +
			"--key, of a request that another tool made.",
		Example: "  vpn import alice.profile\n  vpn import alice.profile --key alice.key     the request was: openssl req -new -keyout alice.key ...",
		RunE: func(_ *cobra.Command, args []string) error {
			passphrase := askPassphrase
			if passphraseFile != "" {
				passphrase = func() ([]byte, error) { return readPassphrase(passphraseFile) }
			}
			open := client.OpenToOthers(args[0])
			if keyFile != "" {
				if err := client.AwaitProfile(keyFile); err != nil {
					return err
				}
			}
			p, kept, err := client.Import(args[0], passphrase, force)
			if err != nil {
				return err
			}
			fmt.Printf("profile %s kept in %s; its certificate is valid until %s\n", p.Name(), kept, p.Expires().Local().Format("2006-01-02 15:04"))
			if open != nil {
				fmt.Fprintf(os.Stderr, "warning: %s: %v: if anybody else could read it here, ask the operator for a new one\n", args[0], open)
			}
			if now := time.Now(); now.After(p.Expires()) {
				fmt.Fprintf(os.Stderr, "warning: by this clock (%s) the certificate has expired: set the clock, or ask the operator for a new profile\n", now.Format(time.DateTime))
			}
			fmt.Fprintf(os.Stderr, "%s is not needed any more: delete it, it opens the same door\n", args[0])
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace another profile of the same name")
	c.Flags().StringVar(&passphraseFile, "passphrase-file", "", "take the passphrase from the first line of `FILE`")
	c.Flags().StringVar(&keyFile, "key", "", "private key `FILE` that the request was made with, where it was not vpn enroll")
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
