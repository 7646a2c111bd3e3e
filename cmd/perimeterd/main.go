// Command perimeterd is the daemon on the bastion host, and its operators' commands.
//
// Exit status: 0 done, 1 failed, 2 the command line or the configuration is wrong.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/cmdline"
	"perimeterd/vpn/client"
)

const (
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	if err := execute(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "perimeterd: %v\n", err)
		os.Exit(exitStatus(err))
	}
}

// usageError is a command line that was not understood.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// exitStatus is documented: see the package's comment and --help.
func exitStatus(err error) int {
	var usage usageError
	var config *configs.Error
	if errors.As(err, &usage) || errors.As(err, &config) {
		return exitUsage
	}
	return exitFailure
}

func execute(ctx context.Context, args []string) error {
	root := newRootCommand()
	understood := false
	root.PersistentPreRun = func(*cobra.Command, []string) { understood = true }
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	err = hinted(cmd, err)
	if err != nil && !understood {
		return usageError{fmt.Errorf("%w\nhint: `%s --help` shows how it is used", err, cmd.CommandPath())}
	}
	return err
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "perimeterd",
		Short: "A gate that shows nothing, and one pinned way to AWS behind it",
		Long: `Examples:
  perimeterd init --endpoint bastion.example.com     keys, certificates, configuration
  perimeterd user add alice --group operators        writes alice.profile, which is sent to alice
  perimeterd user revoke alice --device mac          that laptop is out within a second
  perimeterd sessions                                who is inside now
  perimeterd check                                   what is wrong, and what to do about it

One daemon on a bastion host. Strangers see nothing of it; who knocks and shows a certificate gets a tunnel to a proxy.

Exit status: 0 done, 1 failed, 2 the command line or the configuration is wrong.`,
		Version:           version(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(cmdline.FlagError)
	root.PersistentFlags().String("config", configs.DefaultPath, "configuration `FILE`")
	root.AddCommand(newBackupCommand(), newRestoreCommand())
	root.AddCommand(newInitCommand(), newCheckCommand(), newRunCommand(), newUserCommand(),
		newStatusCommand(), newSessionsCommand(), newKickCommand(), newWatchCommand(),
		newDiffCommand(), newApplyCommand(), newConfirmCommand(), newRollbackCommand(), newCloseCommand())
	root.AddCommand(newSignerCommand(), newCACommand(), newAuditCommand(), newEventsCommand(), newWhyCommand(), newDecideCommand(), newAWSCommand())
	addManual(root)
	return root
}

// loadConfig reads the file that --config names.
func loadConfig(cmd *cobra.Command) (*configs.Config, error) {
	path, err := cmd.Flags().GetString("config")
	if err != nil {
		return nil, err
	}
	return configs.Load(path)
}

// findPaths is loadConfig for commands that need only the daemon's socket and state: a file with errors, as a refused
// reload leaves it, keeps nobody from them.
func findPaths(cmd *cobra.Command) (configs.Paths, error) {
	path, err := cmd.Flags().GetString("config")
	if err != nil {
		return configs.Paths{}, err
	}
	p, err := configs.FindPaths(path)
	if err != nil && p.RunDir != "" {
		stderrf("warning: going on with run_dir %s; the configuration has errors:\n%v", p.RunDir, err)
		err = nil
	}
	return p, err
}

// noArguments is for commands that take flags only.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no argument: %q is one too many", commandName(cmd), args[0])
	}
	return nil
}

// oneArgument is for commands about one thing, as in example.
func oneArgument(what, example string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%s wants one %s: %s %s", commandName(cmd), what, cmd.CommandPath(), example)
		}
		return nil
	}
}

func commandName(cmd *cobra.Command) string {
	return strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")
}

func version() string {
	if client.Release != "" {
		return client.Release
	}
	info, _ := debug.ReadBuildInfo()
	return versionOf(info)
}

// versionOf is the main module's, else the revision it was built from, as the build recorded it.
func versionOf(info *debug.BuildInfo) string {
	if info == nil {
		return "devel"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel" // without the repository, or with -buildvcs=false
}
