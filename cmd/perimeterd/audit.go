package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/audit"
	"perimeterd/internal/control"
)

func newAuditCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Look through the audit, or check that nobody changed it",
		Long: `Examples:
  perimeterd audit query --user alice --since 7d
  perimeterd audit verify

The files lie in state_dir/audit/, one JSON record a line. Root reads them with the daemon running or stopped; members of the
groups perimeterd and perimeterd-audit are sent them by the running daemon.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usageError{errors.New("audit: verify or query?\nhint: `perimeterd audit --help` shows how it is used")}
		},
	}
	cmd.AddCommand(newAuditVerifyCommand(), newAuditQueryCommand())
	return cmd
}

// auditFiles is where the audit can be read: in its directory, or else from the daemon.
func auditFiles(ctx context.Context, p configs.Paths) (fs.FS, error) {
	dir := p.AuditDir()
	if dir == "" {
		return nil, errors.New("where is the audit? Correct state_dir in the configuration")
	}
	_, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrPermission):
		_, err := control.NewClient(p.ControlSocket()).Status(ctx)
		if errors.Is(err, control.ErrNotRunning) {
			return nil, fmt.Errorf("%s: only root may read it while the daemon does not run", dir)
		}
		return control.NewClient(p.ControlSocket()).AuditFiles(ctx), err
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s is not there: the daemon has not run yet, or has another state_dir", dir)
	}
	return os.DirFS(dir), err
}

// filterFlags are those that say which records are meant.
type filterFlags struct {
	user, session, since, until string
	kinds                       []string
}

func (f *filterFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.user, "user", "", "of this `USER`")
	cmd.Flags().StringVar(&f.session, "session", "", "of the session with this `ID`")
	cmd.Flags().StringVar(&f.since, "since", "", "from this `TIME` on: 2h, 7d, 2026-01-02, \"2026-01-02 15:04\", 2026-01-02T15:04:05Z")
	cmd.Flags().StringArrayVar(&f.kinds, "kind", nil, "of this `KIND`; may be repeated")
}

func (f *filterFlags) filter(now time.Time) (to audit.Filter, err error) {
	to = audit.Filter{User: f.user, Session: f.session}
	for _, k := range f.kinds {
		if !slices.Contains(audit.Kinds(), audit.Kind(k)) {
			return to, usageError{fmt.Errorf("--kind %q: want one of %v", k, audit.Kinds())}
		}
		to.Kinds = append(to.Kinds, audit.Kind(k))
	}
	if to.Since, err = parseMoment("--since", f.since, now); err != nil {
		return to, err
	}
	to.Until, err = parseMoment("--until", f.until, now)
	return to, err
}

// parseMoment reads a time, or how long ago it is. Without a zone it is local.
func parseMoment(flag, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := configs.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.DateOnly, "2006-01-02 15:04", time.DateTime, time.RFC3339} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, usageError{fmt.Errorf(`%s %q: want how long ago, as in 2h or 7d, or a time, as in 2026-01-02, "2026-01-02 15:04" or 2026-01-02T15:04:05Z`, flag, s)}
}

func newAuditQueryCommand() *cobra.Command {
	var f filterFlags
	var asJSON, asCSV bool
	cmd := &cobra.Command{
		Use:   "query",
		Short: "Print records of the audit, oldest first",
		Long: `Examples:
  perimeterd audit query --user alice --since 7d
  perimeterd audit query --kind connection --since 2026-01-01 --until 2026-02-01 --csv > january.csv
  perimeterd audit query --kind operator --json | jq -r .by
  perimeterd audit query --session 5f3a...

A connection's time is that of its end. --json prints the records as they are written, one a line.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON && asCSV {
				return usageError{errors.New("--json and --csv: leave one of them off")}
			}
			filter, err := f.filter(time.Now())
			if err != nil {
				return err
			}
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			files, err := auditFiles(cmd.Context(), p)
			if err != nil {
				return err
			}
			print, flush := recordPrinter(cmd.OutOrStdout(), asJSON, asCSV)
			broken, err := audit.Query(files, filter, print)
			if err := errors.Join(err, flush()); err != nil {
				return err
			}
			if broken > 0 {
				stderrf("warning: lines that are no records: %d: `perimeterd audit verify` says where", broken)
			}
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.until, "until", "", "before this `TIME`")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&asCSV, "csv", false, "print a table for spreadsheets")
	return cmd
}

// recordPrinter prints records; flush must follow.
func recordPrinter(out io.Writer, asJSON, asCSV bool) (print func(*audit.Record) error, flush func() error) {
	switch {
	case asCSV:
		w := csv.NewWriter(out)
		_ = w.Write(audit.Columns()) // Flush and Error tell
		return func(r *audit.Record) error {
			row := r.Row()
			for i := range row {
				row[i] = harmless(row[i])
			}
			return w.Write(row)
		}, func() error { w.Flush(); return w.Error() }
	case asJSON:
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		return func(r *audit.Record) error { return e.Encode(r) }, func() error { return nil }
	}
	return func(r *audit.Record) error {
		_, err := fmt.Fprintln(out, r.Text())
		return err
	}, func() error { return nil }
}

// harmless keeps spreadsheets from taking a stranger's text for a formula (https://owasp.org/www-community/attacks/CSV_Injection).
func harmless(s string) string {
	if s != "" && strings.ContainsRune("=+-@", rune(s[0])) {
		return "'" + s
	}
	return s
}

func newAuditVerifyCommand() *cobra.Command {
	var heads []string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check that no record was changed, removed, moved or cut off",
		Long: `Examples:
  perimeterd audit verify
  perimeterd audit verify --head 4711:9f86d081884c7d65...     as a log server kept it

Every record carries a hash over itself and the one before. Who can write the files can also compute all hashes anew, or cut
off the end; the head, which is the newest record's number and hash, shows that. The daemon logs it at its start, its end and
every hour ("audit head"); verify compares those that it finds in this host's journal, or those that are given.

Exit status: 0 every record is as it was written, 1 something is not, or the audit cannot be read.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var known []audit.Known
			for _, s := range heads {
				h, err := audit.ParseHead(strings.ToLower(s))
				if err != nil {
					return usageError{fmt.Errorf("--%w", err)}
				}
				known = append(known, audit.Known{Head: h, From: "--head"})
			}
			p, err := findPaths(cmd)
			if err != nil {
				return err
			}
			files, err := auditFiles(cmd.Context(), p)
			if err != nil {
				return err
			}
			where := "given"
			if len(known) == 0 {
				where = "in the journal"
				if known, err = journalHeads(cmd.Context(), p.AuditDir()); err != nil {
					stderrf("warning: no heads from the journal: %v", err)
				}
			}
			r, err := audit.Verify(files, known)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = printReport(cmd.OutOrStdout(), r, len(known), where)
			}
			if n := len(r.Problems) + r.More; n > 0 && err == nil {
				return fmt.Errorf("the audit is not as it was written: problems: %d", n)
			}
			return err
		},
	}
	cmd.Flags().StringArrayVar(&heads, "head", nil, "`SEQ:HASH` of a record, from wherever the log went; may be repeated; the journal is not asked then")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printReport(out io.Writer, r *audit.Report, known int, where string) error {
	var b strings.Builder
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "problem  %v\n", p)
	}
	if r.More > 0 {
		fmt.Fprintf(&b, "problem  and %d more\n", r.More)
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "note     %v\n", n)
	}
	if r.Records > 0 {
		moment := func(t time.Time) string { return t.Local().Format(time.DateTime) }
		fmt.Fprintf(&b, "records %d to %s in %d files, from %s to %s\n", r.Begins, strings.Split(r.Head, ":")[0], r.Files, moment(r.First), moment(r.Last))
		fmt.Fprintf(&b, "head %s\n", r.Head)
	} else {
		fmt.Fprintln(&b, "no records")
	}
	switch {
	case known == 0:
		fmt.Fprintln(&b, "No head is known: an end that was cut off, or files written anew, would not show. The log server has heads for --head.")
	default:
		fmt.Fprintf(&b, "heads %s: %d, of which these records have %d\n", where, known, r.Heads)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// journalHeads asks the journal of this host for the heads that the service logged. No journal is no error.
func journalHeads(ctx context.Context, dir string) ([]audit.Known, error) {
	journalctl, err := exec.LookPath("journalctl")
	if err != nil {
		return nil, nil
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	// The unit is journald's word, which nobody else's lines have (systemd.journal-fields(7)).
	c := exec.CommandContext(ctx, journalctl, "--quiet", "--no-pager", "--output=cat", "--grep="+audit.HeadMessage, "_SYSTEMD_UNIT="+control.Unit)
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var complaint strings.Builder
	c.Stderr = &complaint
	if err := c.Start(); err != nil {
		return nil, err
	}
	known, err := audit.LoggedHeads(out, dir)
	_, _ = io.Copy(io.Discard, out)
	// It ends with 1 where nothing matches, and where there is no journal.
	if e := c.Wait(); e != nil && complaint.Len() > 0 {
		err = errors.Join(err, errors.New(strings.TrimSpace(complaint.String())))
	}
	return known, err
}
