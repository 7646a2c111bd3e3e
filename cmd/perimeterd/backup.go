package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/audit"
	"perimeterd/internal/backup"
	"perimeterd/internal/identity"
)

func newBackupCommand() *cobra.Command {
	var passphraseFile string
	var withAudit bool
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Write all that another host needs to be this bastion, encrypted",
		Long: `Examples:
  perimeterd backup bastion.backup
  perimeterd backup --passphrase-file /root/words /mnt/bastion-$(date +%F).backup
  perimeterd backup --with-audit bastion.backup

It takes along the configuration, everything in pki/ (the CA's key too, where it lies there) and the state: users,
revocations, the highest token step. The daemon may run meanwhile. Whoever has the file and its passphrase can be this bastion
and let anybody in: keep the two apart. Nothing is overwritten. A passphrase is asked for, or read from --passphrase-file.`,
		Args: oneArgument("FILE", "bastion.backup"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			if _, err := os.Lstat(args[0]); err == nil {
				return fmt.Errorf("%s exists and is not overwritten: name another file", args[0])
			}
			if at, err := filepath.Abs(args[0]); err != nil || strings.HasPrefix(at, filepath.Join(c.Dir, "pki")+"/") {
				return fmt.Errorf("%s lies in pki/, which every later backup takes along: name a file elsewhere", args[0])
			}
			passphrase, err := needPassphrase(passphraseFile, "Passphrase for the backup: ", choosePassphrase)
			if err != nil {
				return err
			}
			s, err := gather(cmd.Context(), c, withAudit)
			if err != nil {
				return fmt.Errorf("nothing was backed up: %w", asRoot(err))
			}
			if err := s.save(args[0], passphrase); err != nil {
				return fmt.Errorf("nothing was backed up: %w", err)
			}
			if s.state != nil && !s.held { // a daemon has recorded it
				audited{dir: c.AuditDir()}.record(cmd.Context(), audit.Record{Action: "backup"}, nil)
			}
			s.report(cmd.OutOrStdout(), args[0])
			return nil
		},
	}
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "`FILE` whose first line protects the backup")
	cmd.Flags().BoolVar(&withAudit, "with-audit", false, "take the audit's files along")
	return cmd
}

// asRoot adds the way out where this user may not.
func asRoot(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: run it as root", err)
	}
	return err
}

// stock is what goes into a backup.
type stock struct {
	c        *configs.Config
	manifest backup.Manifest
	state    *identity.Contents // nil: there is none yet
	held     bool               // by a daemon
	outside  []configs.File     // named by the configuration, and not beside it
	open     map[string]func() (io.ReadCloser, error)
}

func gather(ctx context.Context, c *configs.Config, withAudit bool) (*stock, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	if _, err := loadKeys(c.Identity); err != nil { // what could not run is no backup
		return nil, err
	}
	s := &stock{c: c, open: map[string]func() (io.ReadCloser, error){}, manifest: backup.Manifest{
		Format: backup.Format, Program: version(), Made: time.Now().UTC().Truncate(time.Second), Host: host, Endpoint: c.Endpoint}}
	if err := s.add("config", c.Dir); err != nil {
		return nil, err
	}
	if err := s.addBytes(backup.ConfigFile, c.File, c.Text); err != nil {
		return nil, err
	}
	if err := s.addTree(backup.PKI, filepath.Join(c.Dir, "pki")); err != nil {
		return nil, err
	}
	if err := s.addNamed(); err != nil {
		return nil, err
	}
	if err := s.addState(ctx, withAudit); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *stock) add(name, path string) error {
	e, err := backup.NewEntry(name, path)
	if err != nil {
		return err
	}
	s.manifest.Entries = append(s.manifest.Entries, e)
	s.open[name] = func() (io.ReadCloser, error) { return os.Open(path) }
	return nil
}

// addFile adds a file as it is now: others may put another in its place at any time.
func (s *stock) addFile(name, path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return s.addBytes(name, path, content)
}

// addBytes adds a file whose content is known already.
func (s *stock) addBytes(name, path string, content []byte) error {
	if err := s.add(name, path); err != nil {
		return err
	}
	s.manifest.Entries[len(s.manifest.Entries)-1].Size = int64(len(content))
	s.open[name] = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }
	return nil
}

func (s *stock) addTree(name, dir string) error {
	if strings.Count(name, "/") > 8 {
		return fmt.Errorf("%s: too deep: does a link lead back?", dir)
	}
	if err := s.add(name, dir); err != nil {
		return err
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range list {
		name, at := path.Join(name, f.Name()), filepath.Join(dir, f.Name())
		st, err := os.Stat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist) && f.Type().IsRegular(): // gone since: one that was about to take another's place
		case err != nil:
			return err
		case st.IsDir():
			err = s.addTree(name, at)
		case !st.Mode().IsRegular():
			return fmt.Errorf("%s is neither a file nor a directory, but %v: move it elsewhere", at, st.Mode().Type())
		default:
			err = s.addFile(name, at)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// addNamed adds what the configuration names beside itself and not in pki/.
func (s *stock) addNamed() error {
	for _, f := range s.c.Identity.Files() {
		name, beside := nameOf(s.c.Dir, f.Path)
		switch {
		case f.Path == "" || s.manifest.Has(name):
			continue
		case !beside:
			s.outside = append(s.outside, f)
			continue
		}
		if _, err := os.Stat(f.Path); errors.Is(err, fs.ErrNotExist) && f.Key == "identity.ca_key" {
			continue // kept elsewhere, which is better
		}
		for i, r := range name {
			if dir := name[:i]; r == '/' && !s.manifest.Has(dir) {
				if err := s.add(dir, filepath.Join(s.c.Dir, strings.TrimPrefix(dir, "config/"))); err != nil {
					return err
				}
			}
		}
		if err := s.addFile(name, f.Path); err != nil {
			return err
		}
	}
	return nil
}

// nameOf is a file's name in a backup, if it lies below the configuration's directory.
func nameOf(dir, file string) (name string, beside bool) {
	rel, err := filepath.Rel(dir, file)
	if err != nil || !filepath.IsLocal(rel) {
		return "", false
	}
	return path.Join("config", filepath.ToSlash(rel)), true
}

func (s *stock) addState(ctx context.Context, withAudit bool) error {
	data, held, err := copyState(ctx, s.c, false)
	none := errors.Is(err, fs.ErrNotExist)
	if err != nil && !none {
		return err
	}
	if _, e := os.Stat(s.c.StateDir); none && errors.Is(e, fs.ErrNotExist) {
		return nil
	}
	if err := s.add("state", s.c.StateDir); err != nil {
		return err
	}
	if !none {
		contents, err := identity.ReadContents(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return fmt.Errorf("state file %s: %w", s.c.StateFile(), err)
		}
		s.state, s.manifest.Schema, s.held = &contents, contents.Schema, held
		if err := s.addBytes(backup.StateFile, s.c.StateFile(), data[:contents.Size]); err != nil {
			return err
		}
	}
	if !withAudit {
		return nil
	}
	dir := s.c.AuditDir()
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("--with-audit: %w: there is no audit: leave the flag off", err)
	}
	if err != nil {
		return err
	}
	if err := s.add(backup.Audit, dir); err != nil {
		return err
	}
	for _, f := range list {
		if f.Type().IsRegular() {
			if err := s.add(path.Join(backup.Audit, f.Name()), filepath.Join(dir, f.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// save writes the file, 0600, whole or not at all.
func (s *stock) save(file, passphrase string) (err error) {
	dir := filepath.Dir(file)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	recipient, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return err
	}
	err = backup.Write(tmp, recipient, &s.manifest, func(e backup.Entry) (io.ReadCloser, error) { return s.open[e.Name]() })
	if err != nil {
		return err
	}
	if err := errors.Join(tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp.Name(), file); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (s *stock) report(out io.Writer, file string) {
	fmt.Fprintf(out, "%s holds %s, encrypted with the passphrase:\n", file, size(s.manifest.Size()))
	fmt.Fprintf(out, "    configuration  %s\n    keys           %s, %s\n    state          %s\n    audit          %s\n",
		s.c.File, filepath.Join(s.c.Dir, "pki")+"/", caKeyText(&s.manifest, s.c), stateText(s.state), auditText(&s.manifest, "no: --with-audit takes it along"))
	for _, f := range s.outside {
		fmt.Fprintf(out, "It does not hold %s, %s, which lies elsewhere: take it along yourself.\n", f.Key, f.Path)
	}
	fmt.Fprintf(out, "\nWhoever has it and its passphrase can be this bastion and let anybody in: keep the two apart.\n\nOn another host:\n    perimeterd restore %s\n", filepath.Base(file))
}

func caKeyText(m *backup.Manifest, c *configs.Config) string {
	if name, beside := nameOf(c.Dir, c.Identity.CAKey); beside && c.Identity.CAKey != "" && m.Has(name) {
		return "the CA's key among them"
	}
	return "without the CA's key, which is kept elsewhere"
}

func stateText(s *identity.Contents) string {
	if s == nil {
		return "none: no user was ever entered"
	}
	active, revoked, devices := s.Count()
	return fmt.Sprintf("users: %d, revoked ones: %d, revoked devices of others: %d", active, revoked, devices)
}

func auditText(m *backup.Manifest, none string) string {
	files, total := 0, int64(0)
	for _, e := range m.Entries {
		if path.Dir(e.Name) == backup.Audit {
			files, total = files+1, total+e.Size
		}
	}
	if !m.Has(backup.Audit) {
		return none
	}
	return fmt.Sprintf("files: %d, %s", files, size(total))
}
