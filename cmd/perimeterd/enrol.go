package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"filippo.io/age/armor"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"perimeterd/configs"
	"perimeterd/internal/identity"
	"perimeterd/knock"
	"perimeterd/vpn/client"
)

// defaultDevice is the name of a device that was given none.
const defaultDevice = "default"

type addOptions struct {
	name, device, out, passphraseFile, requestFile string
	groups                                         []string
	valid                                          time.Duration
	replace                                        bool // what the device has

	deviceGiven bool
	request     *identity.Request // of the key's holder; nil: the key is made here
}

// read takes the command line and the configuration.
func (o *addOptions) read(cmd *cobra.Command, valid string) (c *configs.Config, err error) {
	if o.valid, err = configs.ParseDuration(valid); err != nil {
		return nil, usageError{fmt.Errorf("--valid %w", err)}
	}
	if o.valid <= 0 {
		return nil, usageError{fmt.Errorf("--valid %q: want more than nothing, as in 12h or 90d", valid)}
	}
	o.deviceGiven = cmd.Flags().Changed("device")
	if o.requestFile != "" {
		if err := o.readRequest(); err != nil {
			return nil, err
		}
	}
	if err := o.checkNames(); err != nil {
		return nil, usageError{err}
	}
	if o.out == "" {
		o.out = o.name + ".profile"
	}
	return loadConfig(cmd)
}

// flags are those of every command that writes a profile.
func (o *addOptions) flags(cmd *cobra.Command, valid *string) {
	f := cmd.Flags()
	f.StringVar(&o.device, "device", defaultDevice, "`NAME` that tells the user's devices apart")
	f.StringVar(valid, "valid", "90d", "`TIME` that the certificate holds, as in 90d or 12h")
	f.StringVar(&o.out, "out", "", "profile `FILE` to write (default NAME.profile)")
	f.StringVar(&o.requestFile, "request", "", "sign the key of this request, `FILE` (PKCS #10), instead of making one")
	f.StringVar(&o.passphraseFile, "passphrase-file", "", "`FILE` whose first line protects the profile")
}

// readRequest takes the key, and where no other was named the device, from --request. Other names in it are a mistake.
func (o *addOptions) readRequest() error {
	f, err := os.Open(o.requestFile)
	if err != nil {
		return fmt.Errorf("--request: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, identity.MaxRequest+1))
	if err == nil {
		o.request, err = identity.ParseRequest(text)
	}
	if err != nil {
		return fmt.Errorf("--request %s: %w", o.requestFile, err)
	}
	if n := o.request.Name; n != "" && n != o.name {
		return fmt.Errorf("--request %s: it is %q's, not %q's: is it the right file? Else add %s, or have it made anew: vpn enroll %s",
			o.requestFile, n, o.name, n, o.name)
	}
	switch d := o.request.Device; {
	case d == "":
	case !o.deviceGiven:
		o.device, o.deviceGiven = d, true
	case d != o.device:
		return fmt.Errorf("--request %s: it is for the device %q, not %q: leave --device off, or have it made anew: vpn enroll %s --device %s",
			o.requestFile, d, o.device, o.name, o.device)
	}
	return nil
}

// run issues a certificate, enters its key in the state, and writes the profile, in this order. The private key is nowhere
// but in the profile, or on the laptop that made the request, so a record without a profile lets nobody in, and is revoked
// besides; a profile is never written for a record that was not.
func (o *addOptions) run(cmd *cobra.Command, c *configs.Config) (err error) {
	if c.Identity.External() {
		return o.enterName(cmd, c)
	}
	if _, err := os.Lstat(o.out); err == nil {
		return o.exists()
	}
	passphrase, err := o.passphrase()
	if err != nil {
		return err
	}
	p, master, err := serverProfile(c)
	if err != nil {
		return err
	}
	csr, secret := o.request, []byte(nil)
	if csr == nil {
		key, err := identity.NewKey()
		if err != nil {
			return err
		}
		if secret, err = identity.EncodePrivateKey(key); err != nil {
			return err
		}
		if csr, err = identity.NewRequest(key, o.name, o.device); err != nil {
			return err
		}
	}
	sign := newSigner(c, "--quiet")
	defer sign.Close()
	cert, err := sign.Enrol(cmd.Context(), o.name, o.device, o.replace, o.valid, csr.DER)
	if err != nil {
		return err
	}
	// Made before anybody is entered: a file that cannot be made must leave no record.
	file, err := os.OpenFile(o.out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return o.exists()
	}
	if err != nil {
		return fmt.Errorf("the profile cannot be written, so nobody was entered: %w: name another file with --out", err)
	}
	defer func() {
		file.Close()
		if err != nil {
			os.Remove(o.out)
		}
	}()
	return withUsers(cmd.Context(), c, func(us users) error {
		u, err := us.AddUser(cmd.Context(), identity.Enrolment{
			Name: o.name, Groups: o.groups, Device: o.device, Key: csr.Key, Issuer: identity.IssuerOf(cert), NotAfter: cert.NotAfter, Replace: o.replace,
		})
		if err != nil {
			return err
		}
		p.User = o.name
		if o.device != defaultDevice { // a profile is called by both; a lone device needs no name
			p.Device = o.device
		}
		p.Certificate, p.Key = string(identity.EncodeCertificate(cert)), string(secret)
		if secret == nil {
			p.KeyID = hex.EncodeToString(csr.Key[:])
		}
		if c.Knock.Tokens {
			p.KnockSecret = base64.StdEncoding.EncodeToString(knock.Secret(master[:], u.Name, u.Epoch))
			p.KnockStep = c.Knock.Step.String()
		}
		p.Sequence = sequenceOf(c, o.name)
		text, err := encodeProfile(p, passphrase)
		if err == nil {
			_, err = file.Write(text)
		}
		if err == nil {
			err = file.Sync()
		}
		if err != nil {
			return errors.Join(fmt.Errorf("the profile could not be written, so %s's device %s is revoked again: %w", o.name, o.device, err),
				o.takeBack(cmd, us, u))
		}
		o.report(cmd, cert.NotAfter, passphrase != "")
		return nil
	})
}

func (o *addOptions) exists() error {
	return fmt.Errorf("%s exists and is not overwritten: name another file with --out", o.out)
}

func (o *addOptions) checkNames() error {
	for _, g := range o.groups {
		if err := identity.CheckName("group", g); err != nil {
			return err
		}
	}
	return cmp.Or(identity.CheckName("user", o.name), identity.CheckName("device", o.device))
}

// takeBack undoes AddUser: the user goes too where he has no other device.
func (o *addOptions) takeBack(cmd *cobra.Command, us users, u identity.User) error {
	device := ""
	for _, d := range u.Devices {
		if d.Name != o.device && d.Revoked.IsZero() {
			device = o.device
		}
	}
	_, err := us.RevokeUser(cmd.Context(), o.name, device)
	return err
}

func (o *addOptions) report(cmd *cobra.Command, end time.Time, protected bool) {
	out := cmd.OutOrStdout()
	if o.replace {
		fmt.Fprintf(out, "%s's device %s has a new certificate until %s. What it had opens nothing any more.\n\n", o.name, o.device, end.Local().Format(time.DateOnly))
	} else {
		fmt.Fprintf(out, "%s may come in until %s, with device %s.\n\n", o.name, end.Local().Format(time.DateOnly), o.device)
	}
	if o.request != nil {
		fmt.Fprintf(out, "The key is %x: `vpn enroll` printed the same, or somebody changed the request on its way.\n\n", o.request.Key)
	}
	fmt.Fprintf(out, "Send %s to %s by a way that nobody else reads", o.out, o.name)
	if protected {
		fmt.Fprint(out, ", the passphrase by another")
	}
	file := o.out[strings.LastIndexByte(o.out, '/')+1:]
	fmt.Fprintf(out, ", then delete it here. There, next:\n    vpn import %s\n    knock && vpn up\n", file)
	switch {
	case protected:
	case o.request != nil:
		stderrf("%s has no passphrase: whoever reads the file can knock, and no more: the key is not in it.", o.out)
	default:
		stderrf("%s has no passphrase: whoever reads the file is %s. A terminal asks for one, --passphrase-file gives one.", o.out, o.name)
	}
}

// passphrase is empty where the profile stays unprotected.
func (o *addOptions) passphrase() (string, error) {
	if o.passphraseFile != "" {
		return readPassphrase(o.passphraseFile)
	}
	if !hasTerminal() {
		return "", nil
	}
	return choosePassphrase("Passphrase for the profile (empty: none): ")
}

// serverProfile is the part of a profile that all users have in common, and the knock master.
func serverProfile(c *configs.Config) (p client.Profile, master [32]byte, err error) {
	fail := func(err error) (client.Profile, [32]byte, error) {
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: run it as root", err)
		}
		return client.Profile{}, [32]byte{}, err
	}
	if master, err = identity.ReadKey(c.Identity.Master); err != nil {
		return fail(err)
	}
	raw, err := identity.ReadKey(c.Identity.WireGuardKey)
	if err != nil {
		return fail(err)
	}
	public, err := identity.PublicKey(raw)
	if err != nil {
		return fail(err)
	}
	id, err := identity.ReadServerID(c.Identity.ServerID)
	if err != nil {
		return fail(err)
	}
	ca, err := os.ReadFile(c.Identity.CA)
	if err != nil {
		return fail(err)
	}
	host, port, err := net.SplitHostPort(c.Endpoint)
	if err != nil {
		return fail(err)
	}
	p = client.Profile{
		Version:         client.ProfileVersion,
		Endpoints:       []string{c.Endpoint},
		TunnelPort:      c.Gate.TunnelPort,
		ServerID:        hex.EncodeToString(id[:]),
		ServerPublicKey: base64.StdEncoding.EncodeToString(public[:]),
		KnockWindow:     c.Knock.Window.String(),
		Egress:          []string{},
		CA:              string(ca),
	}
	for _, n := range c.Firewall.GatePorts {
		if other := strconv.Itoa(int(n)); other != port {
			p.Endpoints = append(p.Endpoints, net.JoinHostPort(host, other))
		}
	}
	for _, e := range c.Egress.Public {
		p.Egress = append(p.Egress, e.String())
	}
	return p, master, nil
}

// sequenceOf is the user's own knock sequence, else the first shared one, else none.
func sequenceOf(c *configs.Config, name string) (ports []string) {
	i := slices.Index(c.Knock.Users, name)
	if i < 0 {
		i = slices.Index(c.Knock.Users, "")
	}
	if i < 0 {
		return nil
	}
	for _, p := range c.Firewall.Sequences[i].Ports {
		ports = append(ports, p.String())
	}
	return ports
}

// encodeProfile writes the profile as TOML, and with a passphrase as an armored age file around it.
func encodeProfile(p client.Profile, passphrase string) ([]byte, error) {
	text, err := toml.Marshal(p)
	if err != nil || passphrase == "" {
		return text, err
	}
	recipient, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	armored := armor.NewWriter(&b)
	w, err := age.Encrypt(armored, recipient)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(text); err != nil {
		return nil, err
	}
	if err := errors.Join(w.Close(), armored.Close()); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
