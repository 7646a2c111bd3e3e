// Package awscred gets sessions of AWS roles through the tunnel, for programs that ask a credential_process. A session is
// asked for with a policy that denies it everything anywhere but at the bastion's egress, and carries the certificate's name.
// What is kept on disk is encrypted; long-lived keys are read where their owner keeps them, and written nowhere.
package awscred

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// maxFile bounds a configuration file, bytes.
const maxFile = 1 << 20

// Profile is a section of an AWS configuration file: keys in lower case.
type Profile map[string]string

// Config is what a person's AWS tools are configured by.
type Config struct {
	File     string             // of profiles: ~/.aws/config
	Profiles map[string]Profile // of File
	KeyFile  string             // ~/.aws/credentials
	Keys     map[string]Profile // of KeyFile

	region     string // of the environment
	read, text []byte // File, as it was read and as Save writes it
}

// ReadConfig reads both files, from where the AWS tools take them in an environment: a file that is not there has no profiles.
func ReadConfig(environ []string) (*Config, error) {
	c := &Config{File: variable(environ, "AWS_CONFIG_FILE"), KeyFile: variable(environ, "AWS_SHARED_CREDENTIALS_FILE")}
	if c.region = variable(environ, "AWS_REGION"); c.region == "" {
		c.region = variable(environ, "AWS_DEFAULT_REGION")
	}
	if c.File == "" || c.KeyFile == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, fmt.Errorf("AWS configuration: %w", err)
		}
		if c.File == "" {
			c.File = filepath.Join(home, ".aws", "config")
		}
		if c.KeyFile == "" {
			c.KeyFile = filepath.Join(home, ".aws", "credentials")
		}
	}
	text, err := readFile(c.File)
	if err == nil {
		c.read, c.text = text, text
		c.Profiles, err = parse(text, configTitle)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.File, err)
	}
	text, err = readFile(c.KeyFile)
	if err == nil {
		c.Keys, err = parse(text, keyTitle)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.KeyFile, err)
	}
	return c, nil
}

// variable is an environment's; "" if it is not set.
func variable(environ []string, name string) (value string) {
	for _, e := range environ { // the last one counts
		if n, v, ok := strings.Cut(e, "="); ok && n == name {
			value = v
		}
	}
	return value
}

// readFile reads a file whole; one that does not exist is empty.
func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("longer than %d bytes", maxFile)
	}
	return text, err
}

// configTitle names the profile that a section of ~/.aws/config is about, keyTitle one of ~/.aws/credentials; "" for others.
func configTitle(title string) string {
	if title == "default" {
		return title
	}
	kind, name, _ := strings.Cut(title, " ")
	if kind != "profile" {
		return ""
	}
	return strings.Trim(strings.TrimSpace(name), `"'`)
}

func keyTitle(title string) string { return title }

// section is the title in a line such as [title].
func section(line []byte) (title string, ok bool) {
	rest, ok := bytes.CutPrefix(line, []byte("["))
	if !ok {
		return "", false
	}
	in, _, ok := bytes.Cut(rest, []byte("]"))
	return string(bytes.TrimSpace(in)), ok
}

// setting is the key and the value of a line; a line that goes on with the value above has none.
func setting(line []byte) (key, value string, ok bool) {
	at := bytes.IndexAny(line, "=:")
	if at < 0 || isBlank(line) || indented(line) {
		return "", "", false
	}
	return strings.ToLower(string(bytes.TrimSpace(line[:at]))), string(bytes.TrimSpace(line[at+1:])), true
}

func isBlank(line []byte) bool {
	line = bytes.TrimSpace(line)
	return len(line) == 0 || line[0] == '#' || line[0] == ';'
}

func indented(line []byte) bool { return len(line) > 0 && (line[0] == ' ' || line[0] == '\t') }

// parse reads the sections that name finds a profile for, as the AWS CLI reads them: what goes on in an indented line is left
// out, and a section that is there twice is an error.
func parse(text []byte, name func(title string) string) (map[string]Profile, error) {
	all := map[string]Profile{}
	var p Profile
	began, n := false, 0
	for line := range bytes.Lines(text) {
		n++
		if isBlank(line) || indented(line) {
			continue
		}
		if title, ok := section(line); ok {
			began, p = true, nil
			profile := name(title)
			if profile == "" {
				continue
			}
			if all[profile] != nil {
				return nil, fmt.Errorf("line %d: [%s] is there twice: join them", n, title)
			}
			p = Profile{}
			all[profile] = p
			continue
		}
		key, value, ok := setting(line)
		if !ok || !began { // never the line itself: it may hold a key
			return nil, fmt.Errorf("line %d: want [SECTION], then KEY = VALUE", n)
		}
		if p != nil {
			p[key] = value
		}
	}
	return all, nil
}

// Setting is one line of a profile.
type Setting struct{ Key, Value string }

// edit gives settings to the profile's section of ~/.aws/config and leaves every other byte as it is. A section or a key that is
// missing is added at the end.
func edit(text []byte, profile string, settings ...Setting) ([]byte, error) {
	if _, err := parse(text, configTitle); err != nil {
		return nil, err
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	end := "\n"
	if bytes.HasSuffix(lines[0], []byte("\r\n")) {
		end = "\r\n"
	}
	if last := lines[len(lines)-1]; len(last) == 0 {
		lines = lines[:len(lines)-1]
	} else {
		lines[len(lines)-1] = append(bytes.Clone(last), end...)
	}
	from, to := -1, len(lines)
	for i, line := range lines {
		title, ok := section(line)
		if ok && from >= 0 {
			to = i
			break
		}
		if ok && configTitle(title) == profile {
			from = i
		}
	}
	if from < 0 {
		title := "profile " + profile
		if profile == "default" {
			title = profile
		}
		if len(lines) > 0 {
			lines = append(lines, []byte(end))
		}
		lines = append(lines, []byte("["+title+"]"+end))
		from, to = len(lines)-1, len(lines)
	}
	body := lines[from+1 : to : to]
	for _, s := range settings {
		line := []byte(s.Key + " = " + s.Value + end)
		at, more := len(body), 0
		for at > 0 && isBlank(body[at-1]) { // what is between two sections belongs to the next one
			at--
		}
		for i := range body {
			if key, _, ok := setting(body[i]); ok && key == s.Key {
				for at, more = i, 1; i+more < len(body) && indented(body[i+more]) && !isBlank(body[i+more]); more++ {
				}
			}
		}
		body = append(body[:at:at], append([][]byte{line}, body[at+more:]...)...)
	}
	return bytes.Join([][]byte{bytes.Join(lines[:from+1], nil), bytes.Join(body, nil), bytes.Join(lines[to:], nil)}, nil), nil
}

// Set gives a profile of File settings; Save writes them.
func (c *Config) Set(profile string, settings ...Setting) error {
	if err := CheckName(profile); err != nil {
		return err
	}
	for _, s := range settings {
		if strings.ContainsFunc(s.Value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return fmt.Errorf("%s = %q: want one line", s.Key, s.Value)
		}
	}
	text, err := edit(c.text, profile, settings...)
	if err != nil {
		return fmt.Errorf("%s: %w", c.File, err)
	}
	c.text = text
	c.Profiles, err = parse(text, configTitle)
	return err
}

// Save writes File with what was set. Every other byte of it stays; what AWS tools read meanwhile is the file before or after.
func (c *Config) Save() error {
	now, err := readFile(c.File)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(now, c.read):
		return fmt.Errorf("%s was changed meanwhile: try again", c.File)
	}
	if err := os.MkdirAll(filepath.Dir(c.File), 0o700); err != nil {
		return err
	}
	file := c.File
	if real, err := filepath.EvalSymlinks(file); err == nil { // people keep it elsewhere, and a link here
		file = real
	}
	if err := writePrivate(file, c.text); err != nil {
		return fmt.Errorf("%s: %w", c.File, err)
	}
	c.read = c.text
	return nil
}

// CheckName refuses what would not be one profile's name, one word of a shell and one file's name.
func CheckName(profile string) error {
	if !word(profile, 1, 64, "_@+.-") || profile[0] == '.' || profile[0] == '-' {
		return fmt.Errorf("AWS profile %q: want 1 to 64 letters, digits and . _ @ + -, not beginning with . or -", profile)
	}
	return nil
}

// writePrivate replaces a file whole, readable by its owner alone.
func writePrivate(file string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".new-*") // 0600 by itself
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already when all went well
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
