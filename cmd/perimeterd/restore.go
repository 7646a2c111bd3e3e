package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/audit"
	"perimeterd/internal/backup"
	"perimeterd/internal/control"
	"perimeterd/internal/identity"
	"perimeterd/internal/session"
	"perimeterd/internal/signer"
	"perimeterd/internal/statefile"
	"perimeterd/knock"
)

func newRestoreCommand() *cobra.Command {
	r := &restoration{}
	var passphraseFile, dir string
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make this host the bastion that a backup was made of",
		Long: `Examples:
  perimeterd restore bastion.backup
  perimeterd restore --passphrase-file /root/words --dir ./try bastion.backup
  perimeterd restore --force bastion.backup       in the place of what is here

Everything is checked before anything is written: passphrase, completeness, configuration, state, room on the disk. Where the
daemon runs, or a file is in the way, nothing happens. With --force what is in the way is moved aside, and its revocations
are kept. Sessions do not come back: clients make new ones by themselves. Stop the old host for good before this one
starts: the two have the same keys.`,
		Args: oneArgument("FILE", "bastion.backup"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			r.file = args[0]
			if r.config, err = cmd.Flags().GetString("config"); err != nil {
				return err
			}
			if dir != "" {
				if cmd.Flags().Changed("config") {
					return usageError{errors.New("--dir and --config: --dir DIR keeps the configuration at DIR/perimeterd.toml: leave one of them off")}
				}
				if r.dir, err = filepath.Abs(dir); err != nil {
					return err
				}
				r.config = filepath.Join(r.dir, "perimeterd.toml")
			}
			if r.config, err = filepath.Abs(r.config); err != nil {
				return err
			}
			f, err := os.Open(r.file)
			if err != nil {
				return err
			}
			defer f.Close()
			passphrase, err := needPassphrase(passphraseFile, "Passphrase of the backup: ", askPassphrase)
			if err != nil {
				return err
			}
			if r.archive, err = backup.New(f, passphrase); err != nil {
				return err
			}
			r.now = time.Now() // not when the passphrase was asked for
			if err := r.run(cmd.Context()); err != nil {
				return fmt.Errorf("nothing was restored: %w", asRoot(err))
			}
			audited{dir: r.c.AuditDir()}.record(cmd.Context(), audit.Record{Action: "restore", Detail: fmt.Sprintf("made at %s on %s",
				r.manifest.Made.Format(time.RFC3339), r.manifest.Host)}, nil)
			r.report(cmd.OutOrStdout())
			return nil
		},
	}
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "`FILE` whose first line the backup was protected with")
	cmd.Flags().StringVar(&dir, "dir", "", "keep configuration, keys, state and socket below `DIR`")
	cmd.Flags().BoolVar(&r.force, "force", false, "move aside what is here")
	return cmd
}

// restoration is a backup on its way into a host. The archive is gone through twice: to check it, and to write it.
type restoration struct {
	file, config, dir string // dir is --dir, or empty
	force             bool
	now               time.Time
	archive           *backup.Archive

	manifest *backup.Manifest
	text     []byte          // of the configuration, as it will be
	c        *configs.Config // the same, understood
	serverID []byte          // that makes a bastion this one
	state    []byte          // state.db, or nil
	contents *identity.Contents

	here  []here // states that this one takes the place of
	aside string // name of the directories for what is in the way
	moved []string
	kept  identity.Kept
	other bool  // what is here is of another bastion: nothing of it is kept
	lost  error // why the state here could not be read
}

const serverIDName = backup.PKI + "/server.id"

// here is a state on this host, which nobody writes as long as file is open.
type here struct {
	file     *os.File
	size     int64
	contents identity.Contents
}

func (r *restoration) run(ctx context.Context) error {
	if err := r.check(); err != nil {
		return err
	}
	if err := r.look(ctx); err != nil {
		return err
	}
	defer func() {
		for _, h := range r.here {
			h.file.Close()
		}
	}()
	if err := r.mayReplace(); err != nil {
		return err
	}
	if err := r.write(); err != nil {
		return err
	}
	service, err := serviceOf(r.config)
	if err != nil {
		return err
	}
	return service.own(r.c.StateDir)
}

// check goes through the whole archive and writes nothing.
func (r *restoration) check() error {
	var text bytes.Buffer
	err := r.archive.Read(func(m *backup.Manifest) error { r.manifest = m; return nil }, func(e backup.Entry, content io.Reader) (err error) {
		switch e.Name {
		case backup.ConfigFile:
			_, err = text.ReadFrom(content)
		case serverIDName:
			r.serverID, err = io.ReadAll(content)
		case backup.StateFile:
			r.state, err = io.ReadAll(content)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", r.file, err)
	}
	r.text = text.Bytes()
	if r.dir != "" {
		r.text, r.c, err = configs.Move(r.config, r.text, filepath.Join(r.dir, "state"), filepath.Join(r.dir, "run"))
	} else {
		r.c, err = configs.Parse(r.config, r.text)
	}
	if err != nil {
		return fmt.Errorf("the configuration in %s, made by perimeterd %s, is not understood by this one, %s: %w", r.file, r.manifest.Program, version(), err)
	}
	if err := r.checkNames(); err != nil {
		return fmt.Errorf("%s: %w", r.file, err)
	}
	if r.state != nil {
		contents, err := identity.ReadContents(bytes.NewReader(r.state), int64(len(r.state)))
		if err != nil {
			return fmt.Errorf("the state in %s: %w", r.file, err)
		}
		r.contents = &contents
	}
	return nil
}

// checkNames holds the manifest against the configuration: what that names beside itself is there, and nothing is that it does
// not name.
func (r *restoration) checkNames() error {
	named := map[string]bool{"config": true, backup.ConfigFile: true}
	for _, f := range r.c.Identity.Files() {
		name, beside := nameOf(r.c.Dir, f.Path)
		if f.Path == "" || !beside {
			continue
		}
		if !r.manifest.Has(name) && f.Key != "identity.ca_key" {
			return fmt.Errorf("it lacks %s, %s", f.Key, name)
		}
		for ; name != "config"; name = path.Dir(name) {
			named[name] = true
		}
	}
	for _, e := range r.manifest.Entries {
		if !named[e.Name] && strings.HasPrefix(e.Name, "config/") && e.Name != backup.PKI && !strings.HasPrefix(e.Name, backup.PKI+"/") {
			return fmt.Errorf("it holds %s, which its configuration does not name", e.Name)
		}
	}
	return nil
}

// look finds out what is on this host, and keeps a daemon from starting on it.
func (r *restoration) look(ctx context.Context) error {
	at := []configs.Paths{r.c.Paths}
	if p, _ := configs.FindPaths(r.config); p.StateDir != "" && p != at[0] { // with errors in the file, too
		at = append(at, p)
	}
	for _, p := range at {
		if p.RunDir == "" {
			continue
		}
		if _, err := control.NewClient(p.ControlSocket()).Status(ctx); !errors.Is(err, control.ErrNotRunning) {
			return fmt.Errorf("a daemon runs here and answers at %s: stop it first", p.ControlSocket())
		}
	}
	id, err := os.ReadFile(filepath.Join(r.c.Dir, "pki", "server.id"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	r.other = err == nil && !bytes.Equal(bytes.TrimSpace(id), bytes.TrimSpace(r.serverID))
	for i, p := range at {
		if i > 0 && p.StateDir == at[0].StateDir {
			continue
		}
		f, err := statefile.Hold(p.StateFile(), true) // as long as anything is done here
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		h := here{file: f}
		st, err := f.Stat()
		if err == nil {
			h.size = st.Size()
			h.contents, err = identity.ReadContents(f, h.size)
		}
		if err != nil {
			r.lost = fmt.Errorf("%s: %w", p.StateFile(), err)
		}
		r.here = append(r.here, h)
	}
	return nil
}

// targets are where things go: the configuration first.
func (r *restoration) targets() (list []target) {
	for _, e := range r.manifest.Entries {
		rel, isConfig := strings.CutPrefix(e.Name, "config/")
		switch {
		case e.Name == backup.ConfigFile:
			list = slices.Insert(list, 0, target{e, r.config})
		case e.Name == backup.PKI:
			list = append(list, target{e, filepath.Join(r.c.Dir, "pki")})
		case isConfig && !e.Dir && !strings.HasPrefix(e.Name, backup.PKI+"/"):
			list = append(list, target{e, filepath.Join(r.c.Dir, filepath.FromSlash(rel))})
		case e.Name == backup.Audit:
			list = append(list, target{e, r.c.AuditDir()})
		}
	}
	return append(list, target{backup.Entry{Name: backup.StateFile}, r.c.StateFile()})
}

type target struct {
	entry backup.Entry
	path  string
}

func (r *restoration) mayReplace() error {
	var there []string
	for _, t := range r.targets() {
		is, err := backup.InTheWay(t.path)
		if err != nil {
			return err
		}
		if is {
			there = append(there, t.path)
		}
	}
	if len(there) == 0 || r.force {
		return nil
	}
	text := fmt.Sprintf("this host was set up before: %s\nthe backup is of %s; %s", strings.Join(there, " "), r.age(), stateText(r.contents))
	if r.other {
		return fmt.Errorf("%s\nwhat is here is another bastion, with keys of its own\nhint: --force puts the backup in its place and moves aside what is here", text)
	}
	for _, h := range r.here {
		if h.contents.Schema > 0 {
			text += fmt.Sprintf("\nthe state here: %s", stateText(&h.contents))
		}
	}
	if r.lost != nil {
		text += fmt.Sprintf("\nthe state here cannot be read, so revocations made since the backup will be lost: %v", r.lost)
	}
	return fmt.Errorf("%s\nhint: --force puts the backup in its place, moves aside what is here, and keeps its revocations", text)
}

func (r *restoration) age() string {
	made := r.manifest.Made.Local().Format("2006-01-02 15:04")
	switch d := r.now.Sub(r.manifest.Made); {
	case d < -time.Minute:
		return made + ", which is in the future: is a clock wrong?"
	case d < time.Hour:
		return fmt.Sprintf("%s, %d minutes ago", made, int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%s, %d hours ago", made, int(d.Hours()))
	default:
		return fmt.Sprintf("%s, %d days ago", made, int(d.Hours()/24))
	}
}

// write puts everything beside its place, and then into it.
func (r *restoration) write() (err error) {
	var made []string
	defer func() {
		if err != nil {
			slices.Reverse(made) // children first
			for _, dir := range made {
				os.Remove(dir)
			}
		}
	}()
	tops := []struct {
		name, path string
		perm       fs.FileMode
	}{{"config", r.c.Dir, 0o755}, {"state", r.c.StateDir, 0o700}}
	for _, d := range tops {
		if err := r.fits(d.name, d.path); err != nil {
			return err
		}
	}
	for _, d := range tops {
		before := len(made)
		if made, err = mkdirAll(d.path, d.perm, made); err != nil {
			return err
		}
		if i := slices.IndexFunc(r.manifest.Entries, func(e backup.Entry) bool { return e.Name == d.name }); i >= 0 && len(made) > before {
			if err := r.manifest.Entries[i].Own(d.path); err != nil {
				return err
			}
		}
	}
	for _, d := range tops {
		giveBack, e := take(d.path)
		if e != nil {
			return e
		}
		defer func() { err = errors.Join(err, giveBack()) }()
	}
	targets := r.targets()
	for _, t := range targets { // files that the configuration names in directories of their own
		if made, err = mkdirAll(filepath.Dir(t.path), 0o755, made); err != nil {
			return err
		}
	}
	// Beside the places, since nothing is renamed across file systems.
	ready := map[string]string{}
	for name, dir := range map[string]string{"config": r.c.Dir, "state": r.c.StateDir} {
		if ready[name], err = os.MkdirTemp(dir, ".restore-*"); err != nil {
			return err
		}
		defer os.RemoveAll(ready[name])
	}
	at := func(name string) string {
		top, rest, _ := strings.Cut(name, "/")
		return filepath.Join(ready[top], filepath.FromSlash(rest))
	}
	if err := r.unpack(at); err != nil {
		return err
	}
	if err := r.finishState(at(backup.StateFile)); err != nil {
		return err
	}
	if err := r.finishRecord(at); err != nil {
		return err
	}
	if err := r.finishOwners(at, ready["state"]); err != nil {
		return err
	}
	places := make([]backup.Place, len(targets))
	for i, t := range targets {
		places[i] = backup.Place{Ready: at(t.entry.Name), Path: t.path}
		if is, err := backup.InTheWay(t.path); err != nil {
			return err
		} else if is {
			r.moved = append(r.moved, t.path)
		}
	}
	r.aside = "replaced-" + r.now.UTC().Format("20060102T150405Z")
	return backup.Swap(places, r.aside)
}

// fits says whether a file system has room for what goes there, and some more.
func (r *restoration) fits(top, dir string) error {
	need := int64(leastFree)
	for _, e := range r.manifest.Entries {
		if strings.HasPrefix(e.Name, top+"/") {
			need += e.Size
		}
	}
	if free, err := room(dir, false); err != nil {
		return err
	} else if free < need {
		return fmt.Errorf("%s has %s free, and the backup needs %s: make room", dir, size(free), size(need))
	}
	return nil
}

// unpack writes every entry where at says.
func (r *restoration) unpack(at func(name string) string) error {
	err := r.archive.Read(func(m *backup.Manifest) error {
		for _, e := range m.Entries {
			if e.Dir && strings.Contains(e.Name, "/") {
				if err := os.Mkdir(at(e.Name), 0o700); err != nil {
					return err
				}
			}
		}
		return nil
	}, func(e backup.Entry, content io.Reader) error {
		if e.Name == backup.ConfigFile {
			content, e.Size = bytes.NewReader(r.text), int64(len(r.text))
		}
		return e.WriteFile(at(e.Name), content)
	})
	if err != nil {
		return err
	}
	for _, e := range slices.Backward(r.manifest.Entries) { // a directory after what is in it
		if !e.Dir || !strings.Contains(e.Name, "/") {
			continue
		}
		if err := errors.Join(e.Own(at(e.Name)), syncDir(at(e.Name))); err != nil {
			return err
		}
	}
	return nil
}

// finishState makes the state one that opens no more than the last state of the bastion would. Nobody knows what happened after
// the backup: tokens may have been spent until now, sessions have ended.
func (r *restoration) finishState(file string) error {
	db, err := identity.OpenState(file)
	if err != nil {
		return err
	}
	defer db.Close()
	meta := identity.NewMeta(db)
	// The daemon loads up to two steps ahead.
	if err := meta.RaiseTokenStep(uint64(knock.StepAt(r.now, r.c.Knock.Step) + 2)); err != nil {
		return err
	}
	if err := session.Carry(db, r.now, nil, 0); err != nil {
		return err
	}
	for _, h := range r.here {
		if h.contents.Schema == 0 || r.other {
			continue
		}
		kept, err := identity.Carry(db, h.contents, r.now)
		if err != nil {
			return err
		}
		r.kept.Revoked, r.kept.Missing = append(r.kept.Revoked, kept.Revoked...), append(r.kept.Missing, kept.Missing...)
		r.kept.Renewed = append(r.kept.Renewed, kept.Renewed...)
		if err := session.Carry(db, r.now, h.file, h.size); err != nil {
			return err
		}
	}
	if err := r.moveUnconfirmed(meta); err != nil {
		return err
	}
	if err := db.Close(); err != nil {
		return err
	}
	if i := slices.IndexFunc(r.manifest.Entries, func(e backup.Entry) bool { return e.Name == backup.StateFile }); i >= 0 {
		return r.manifest.Entries[i].Own(file)
	}
	return nil
}

// finishRecord tells the signer's record of revocations, and makes it the signer's where this host has one and the old one had not.
func (r *restoration) finishRecord(at func(name string) string) error {
	key, beside := nameOf(r.c.Dir, r.c.Identity.CAKey)
	record := path.Join(path.Dir(key), signer.Renewable)
	if !beside || !r.manifest.Has(key) || !r.manifest.Has(record) {
		return nil
	}
	for _, who := range slices.Concat(r.kept.Revoked, r.kept.Missing, r.kept.Renewed) {
		user, _, _ := strings.Cut(who, "/")
		user, _, _ = strings.Cut(user, " ")
		// A lost record costs renewals and nothing else.
		if err := os.Remove(at(path.Join(record, user))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return giveToSigner(at(key))
}

// finishOwners gives the service's user what a host that ran the daemon as another made.
func (r *restoration) finishOwners(at func(name string) string, state string) error {
	service, err := serviceOf(r.config)
	if err != nil || service == nil {
		return err
	}
	for _, path := range []string{r.c.Identity.Key, r.c.Identity.Master, r.c.Identity.WireGuardKey} {
		if name, beside := nameOf(r.c.Dir, path); beside && r.manifest.Has(name) {
			if err := service.own(at(name)); err != nil {
				return err
			}
		}
	}
	return errors.Join(service.read(at(backup.ConfigFile)), service.ownTree(state))
}

// moveUnconfirmed has a configuration that nobody confirmed stay so in another directory.
func (r *restoration) moveUnconfirmed(meta *identity.Meta) error {
	u, err := meta.Unconfirmed()
	if err != nil || u == nil || r.dir == "" {
		return err
	}
	good, _, err := configs.Move(r.config, u.Good, r.c.StateDir, r.c.RunDir)
	if err != nil {
		return err
	}
	return meta.SetUnconfirmed(&identity.Unconfirmed{File: sha256.Sum256(r.text), Good: good})
}

func (r *restoration) report(out io.Writer) {
	flag := ""
	if r.config != configs.DefaultPath {
		flag = " --config " + r.config
	}
	fmt.Fprintf(out, "This host is %s now, as it was on %s (host %s, perimeterd %s):\n", r.c.Endpoint, r.age(), r.manifest.Host, r.manifest.Program)
	fmt.Fprintf(out, "    configuration  %s\n    keys           %s, %s\n    state          %s, %s\n    audit          %s\n\n",
		r.config, filepath.Join(r.c.Dir, "pki")+"/", caKeyText(r.manifest, r.c), r.c.StateFile(), stateText(r.contents), auditText(r.manifest, "not in the backup"))
	if len(r.moved) > 0 {
		fmt.Fprintf(out, "What was here lies in a directory %s beside it; delete it when all is well: %s\n", r.aside, strings.Join(r.moved, " "))
	}
	list := func(what string, names []string) {
		if len(names) > 0 {
			slices.Sort(names)
			fmt.Fprintf(out, "%s: %s\n", what, strings.Join(slices.Compact(names), " "))
		}
	}
	list("Revoked since the backup, and still", r.kept.Revoked)
	list("Not in the backup, or revoked there, so they stay out until they are added again", r.kept.Missing)
	list("Renewed since the backup: the new certificates hold, and cannot be renewed again before `perimeterd user profile`", r.kept.Renewed)
	list("Not known on this host, so root owns what was theirs", r.manifest.Unknown())
	for _, f := range r.c.Identity.Files() {
		if _, beside := nameOf(r.c.Dir, f.Path); f.Path != "" && !beside {
			fmt.Fprintf(out, "Not in the backup, as it lies elsewhere: %s, %s\n", f.Key, f.Path)
		}
	}
	if r.other {
		fmt.Fprintf(out, "What was here was another bastion: nothing of it was kept.\n")
	}
	if r.lost != nil {
		fmt.Fprintf(out, "The state that was here could not be read (%v).\n", r.lost)
	}
	if r.other || r.lost != nil || len(r.here) == 0 {
		fmt.Fprintf(out, "Whoever was revoked after the backup was made is let in again: `perimeterd user list%s` shows who is; revoke him now.\n", flag)
	}
	fmt.Fprintf(out, "No session comes back: clients make new ones. Knocks by token open again at %s, by sequence at once.\n"+
		"Stop the old host for good before this one starts: both have the same keys. %s and the address that AWS sees must lead here.\n\n",
		clock(knock.Start(knock.StepAt(r.now, r.c.Knock.Step)+3, r.c.Knock.Step)), r.c.Endpoint)
	start := "perimeterd run" + flag
	if r.config == configs.DefaultPath && control.HasService() {
		start = "systemctl enable --now " + control.Unit
	}
	fmt.Fprintf(out, "Next:\n    perimeterd check%s\n    %s\n", flag, start)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
