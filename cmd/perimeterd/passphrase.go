package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/term"
)

// readPassphrase is a file's first line.
func readPassphrase(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("--passphrase-file: %w", err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	if line = strings.TrimRight(line, "\r"); line == "" {
		return "", fmt.Errorf("--passphrase-file %s: its first line is empty: write the passphrase there", file)
	}
	return line, nil
}

func hasTerminal() bool { return term.IsTerminal(int(os.Stdin.Fd())) }

func askPassphrase(prompt string) (string, error) {
	fmt.Fprint(os.Stderr, prompt)
	b, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(os.Stderr)
	return string(b), err
}

// choosePassphrase asks twice for a new one, and once where it is empty.
func choosePassphrase(prompt string) (string, error) {
	first, err := askPassphrase(prompt)
	if err != nil || first == "" {
		return "", err
	}
	second, err := askPassphrase("The same again: ")
	if err != nil {
		return "", err
	}
	if first != second {
		return "", errors.New("the passphrases differ: nothing was done, try again")
	}
	return first, nil
}

// needPassphrase is for what is never without one.
func needPassphrase(file, prompt string, ask func(string) (string, error)) (string, error) {
	if file != "" {
		return readPassphrase(file)
	}
	if !hasTerminal() {
		return "", usageError{errors.New("no terminal to ask for the passphrase: --passphrase-file FILE names a file with it in its first line")}
	}
	p, err := ask(prompt)
	if err == nil && p == "" {
		err = errors.New("a backup holds every key of the bastion, so it is never without a passphrase: nothing was done")
	}
	return p, err
}
