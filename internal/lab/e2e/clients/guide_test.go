package clients

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"perimeterd/internal/lab"
)

// Every command in the guide to AWS, as far as AWS's own command line can judge it without AWS: that it knows the command, and
// each option with its value, of the policies that ours printed before.
func TestTheAWSGuidesCommandsAreUnderstood(t *testing.T) {
	text, err := os.ReadFile("../../../../docs/aws.md")
	if err != nil {
		t.Fatal(err)
	}
	perimeterd, err := lab.Bin("perimeterd")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	sh := func(script string) (string, error) {
		cmd := exec.Command("/bin/sh", "-ec", script)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(perimeterd)+":/usr/bin:/bin", "AWS_REGION=us-east-1", "AWS_EC2_METADATA_DISABLED=true", "HOME="+dir)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := sh("perimeterd init --endpoint bastion.example.com --egress 203.0.113.10/32 --dir d"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ofQuestion := regexp.MustCompile(`(?m)^(Missing|Unknown|Invalid)(.*input|.*parameter [^.\n]*,)`)
	asked := 0
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		for line := range strings.Lines(block[1]) {
			line = strings.TrimPrefix(strings.TrimSpace(line), "vpn exec -- ")
			switch {
			case strings.HasPrefix(line, "perimeterd ") && !strings.HasPrefix(line, "perimeterd aws test"):
				if out, err := sh(strings.Replace(line, "perimeterd aws", "perimeterd --config d/perimeterd.toml aws", 1)); err != nil {
					t.Fatalf("%s\n%v: %s", line, err, out)
				}
			case strings.HasPrefix(line, "aws "):
				asked++
				line, _, _ = strings.Cut(line, " | ")
				out, err := sh(line + " --generate-cli-skeleton output")
				// The answer that it makes up can be too short for its own model, in parts of it, which have a dot in their names;
				// and a command with --outfile makes none up.
				answered := strings.Contains(out, "Parameter validation failed") && !ofQuestion.MatchString(out) ||
					strings.Contains(out, "\nUnknown options: --generate-cli-skeleton, output\n")
				if err != nil && !answered {
					t.Errorf("%s\n%v: %s", line, err, out)
				}
			}
		}
	}
	if asked < 10 {
		t.Errorf("%d commands in the guide", asked)
	}
}
