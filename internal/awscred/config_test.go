package awscred

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const written = "# mine\n[default]\nregion = eu-central-1\n\n[profile production]\nrole_arn = arn:aws:iam::123456789012:role/Admin\n" +
	"s3 =\n  max_concurrent_requests = 20\nSource_Profile=bastion\n\n# of another tool\n[sso-session corp]\nsso_region = eu-central-1\n"

func TestEditingLeavesEveryOtherByte(t *testing.T) {
	for name, c := range map[string]struct {
		text, profile string
		settings      []Setting
		want          string
	}{
		"an empty file":        {"", "a", []Setting{{"region", "eu-west-1"}}, "[profile a]\nregion = eu-west-1\n"},
		"the default profile":  {"", "default", []Setting{{"region", "eu-west-1"}}, "[default]\nregion = eu-west-1\n"},
		"a new profile":        {written, "b", []Setting{{"a", "1"}, {"b", "2"}}, written + "\n[profile b]\na = 1\nb = 2\n"},
		"no newline at end":    {"[default]\na = 1", "default", []Setting{{"b", "2"}}, "[default]\na = 1\nb = 2\n"},
		"the other line end":   {"[default]\r\na = 1\r\n", "default", []Setting{{"a", "2"}, {"b", "3"}}, "[default]\r\na = 2\r\nb = 3\r\n"},
		"a key that is there":  {written, "production", []Setting{{"source_profile", "x"}}, strings.Replace(written, "Source_Profile=bastion", "source_profile = x", 1)},
		"a key that is not":    {written, "production", []Setting{{"region", "x"}}, strings.Replace(written, "bastion\n", "bastion\nregion = x\n", 1)},
		"a value of two lines": {written, "production", []Setting{{"s3", "x"}}, strings.Replace(written, "s3 =\n  max_concurrent_requests = 20\n", "s3 = x\n", 1)},
		"quotes":               {"[profile 'a']\n", "a", []Setting{{"x", "1"}}, "[profile 'a']\nx = 1\n"},
	} {
		got, err := edit([]byte(c.text), c.profile, c.settings...)
		if err != nil || string(got) != c.want {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
}

func TestWhatIsNoConfigurationIsRefusedUnshown(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"a line of nothing":    {"[default]\nAKIASECRET\n", "line 2: want [SECTION], then KEY = VALUE"},
		"before any section":   {"aws_secret_access_key = s\n", "line 1: want"},
		"a section twice":      {"[profile a]\n[profile b]\n[profile a]\n", "line 3: [profile a] is there twice"},
		"an open section":      {"[profile a\n", "line 1: want"},
		"two for the same one": {"[default]\n[profile default]\n", "line 2: [profile default] is there twice"},
	} {
		if _, err := parse([]byte(c.text), configTitle); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// files makes both of the files that AWS tools read.
func files(t *testing.T, config, keys string) *Config {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(dir, "sub", "config"))
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(dir, "credentials"))
	for _, name := range append(credentialVariables, "AWS_REGION", "AWS_DEFAULT_REGION") {
		t.Setenv(name, "")
	}
	if config != "" {
		if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "sub", "config"), []byte(config), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "credentials"), []byte(keys), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := ReadConfig(os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSavingIsPrivateFollowsALinkAndRefusesToOverwriteOthersWork(t *testing.T) {
	c := files(t, "[default]\n", "")
	real := filepath.Join(t.TempDir(), "real")
	if err := os.Rename(c.File, real); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, c.File); err != nil {
		t.Fatal(err)
	}
	if err := c.Set("a", Setting{"region", "eu-west-1"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(real)
	st, err2 := os.Stat(real)
	if string(text) != "[default]\n\n[profile a]\nregion = eu-west-1\n" || err != nil || err2 != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%q %v, %v %v", text, st, err, err2)
	}
	if link, err := os.Lstat(c.File); err != nil || link.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link: %v %v", link, err)
	}
	if err := os.WriteFile(real, []byte("[profile b]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(); err == nil || !strings.Contains(err.Error(), "changed meanwhile") {
		t.Errorf("changed: %v", err)
	}
	for _, s := range []Setting{{"region", "a\nrole_arn = x"}, {"region", "a\x1b"}} {
		if err := c.Set("a", s); err == nil {
			t.Errorf("%q was taken", s.Value)
		}
	}
	for _, name := range []string{"", "a b", "a]", "../x", "-x", "a;id", strings.Repeat("x", 65)} {
		if err := c.Set(name, Setting{"region", "x"}); err == nil {
			t.Errorf("name %q was taken", name)
		}
	}
}

func TestSavingMakesTheFile(t *testing.T) {
	c := files(t, "", "")
	if err := c.Set("a", Setting{"region", "eu-west-1"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(); err != nil {
		t.Fatal(err)
	}
	if again, err := ReadConfig(os.Environ()); err != nil || again.Profiles["a"]["region"] != "eu-west-1" {
		t.Errorf("%+v %v", again, err)
	}
}

// What the editor writes reads back, and the sections that it was not asked for stay as they were.
func FuzzEdit(f *testing.F) {
	f.Add([]byte(written), "production", "source_profile", "x")
	f.Add([]byte("[default]\r\na=1\r\n  b"), "default", "a", "2")
	f.Fuzz(func(t *testing.T, text []byte, profile, key, value string) {
		before, err := parse(text, configTitle)
		if err != nil || CheckName(profile) != nil || key == "" || strings.Trim(key, "abcdefghijklmnopqrstuvwxyz_") != "" ||
			strings.TrimSpace(value) != value || strings.ContainsAny(value, "\r\n") {
			return
		}
		edited, err := edit(text, profile, Setting{key, value})
		if err != nil {
			t.Fatalf("%v\n%q", err, text)
		}
		after, err := parse(edited, configTitle)
		if err != nil || after[profile][key] != value {
			t.Fatalf("%v: %q became %q", err, text, edited)
		}
		for name, p := range before {
			for k, v := range p {
				if (name != profile || k != key) && after[name][k] != v {
					t.Fatalf("[%s] %s: %q became %q: %q", name, k, text, edited, v)
				}
			}
		}
		again, err := edit(edited, profile, Setting{key, value})
		if err != nil || !bytes.Equal(again, edited) {
			t.Fatalf("%v: once more %q became %q", err, edited, again)
		}
	})
}

func FuzzProcess(f *testing.F) {
	f.Add([]byte(`{"Version":1,"AccessKeyId":"AKIA","SecretAccessKey":"s","SessionToken":"t","Expiration":"2026-01-02T03:04:05Z"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseProcess(text)
		if err != nil {
			return
		}
		if c.AccessKeyID == "" || c.SecretAccessKey == "" {
			t.Fatalf("%q gave nothing", text)
		}
		if printed, err := c.Process(); err == nil {
			if again, err := parseProcess(printed); err != nil || again.SecretAccessKey != c.SecretAccessKey || !again.Expiration.Equal(c.Expiration) {
				t.Fatalf("%q: %q, %v", text, printed, err)
			}
		}
	})
}
