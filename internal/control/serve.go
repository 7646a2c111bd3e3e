package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Groups of this host whose members may use the daemon's sockets besides root. The kernel looks at nothing but a socket's mode
// and group, which cannot tell two groups apart: those who may only read have a socket of their own, and nobody else reaches
// either.
const (
	Group        = "perimeterd"       // may do everything
	ReadersGroup = "perimeterd-audit" // may read, see ReadersHandler
)

// ReadersSocket is where the second group asks, beside the control socket at path.
func ReadersSocket(path string) string { return filepath.Join(filepath.Dir(path), "audit.sock") }

// Serve answers on a unix socket at path until ctx ends: mode 0660 and group perimeterd where that group exists, else 0600.
// A socket that an earlier process left is replaced. Ready, if not nil, is called when the socket takes connections.
func Serve(ctx context.Context, path string, h http.Handler, ready func()) error {
	return serve(ctx, path, Group, h, ready)
}

// ServeReaders answers those who may only read, by ReadersHandler, beside the control socket at path, until ctx ends. Where
// their group does not exist there is nobody to answer.
func ServeReaders(ctx context.Context, path string, h http.Handler) error {
	if _, err := user.LookupGroup(ReadersGroup); err != nil {
		<-ctx.Done()
		return nil
	}
	return serve(ctx, ReadersSocket(path), ReadersGroup, h, nil)
}

func serve(ctx context.Context, path, group string, h http.Handler, ready func()) error {
	ln, err := listen("unix", path, group)
	if err != nil {
		return fmt.Errorf("control socket %s: %w", path, err)
	}
	made, err := os.Lstat(path)
	if err != nil {
		ln.Close()
		return fmt.Errorf("control socket %s: %w", path, err)
	}
	srv := &http.Server{
		Handler: withLogin(h), ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ConnContext: withPeer,
	}
	done := make(chan error, 1)
	each := connections
	if group == ReadersGroup {
		each = readerConnections
	}
	go func() { done <- srv.Serve(&guests{Listener: ln, seats: newSeats(connections, each)}) }()
	if ready != nil {
		ready()
	}
	select {
	case err = <-done:
	case <-ctx.Done():
		// A revocation under way finishes; an idle connection does not keep the daemon.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := srv.Shutdown(grace); err != nil {
			srv.Close()
		}
		err = nil
	}
	// The file goes only if it is still ours: the next daemon may have replaced it.
	if now, e := os.Lstat(path); e == nil && os.SameFile(made, now) {
		os.Remove(path)
	}
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return err
}

// Listen makes a socket ("unix", "unixpacket") in a directory that is ours alone, and moves it to path when its mode and
// owner are right: bind would create it with whatever the umask leaves open.
func Listen(network, path string) (net.Listener, error) { return listen(network, path, Group) }

func listen(network, path, group string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := rootsOwn(dir); err != nil {
		return nil, err
	}
	// A directory of the group's, where the package made one, gives the socket its group: the service may give nothing away.
	home := dir
	if groups := filepath.Join(dir, "."+group); os.Geteuid() != 0 {
		if st, err := os.Lstat(groups); err == nil && st.IsDir() {
			home = groups
		}
	}
	private, err := os.MkdirTemp(home, ".control.")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(private)
	tmp := filepath.Join(private, "s")
	ln, err := net.ListenUnix(network, &net.UnixAddr{Name: tmp, Net: network})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	mode := fs.FileMode(0o600)
	if g, err := user.LookupGroup(group); err == nil {
		gid, err := strconv.Atoi(g.Gid)
		st, err2 := os.Lstat(tmp)
		if err = errors.Join(err, err2); err == nil && int(st.Sys().(*syscall.Stat_t).Gid) != gid {
			err = os.Chown(tmp, -1, gid)
		}
		if err == nil {
			mode = 0o660
		}
	}
	if err := errors.Join(os.Chmod(tmp, mode), os.Rename(tmp, path)); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// rootsOwn refuses, for root, a directory whose owner or group could swap what lies in it for a link while its owner and mode
// are set.
func rootsOwn(dir string) error {
	st, err := os.Lstat(dir)
	if err != nil || os.Geteuid() != 0 {
		return err
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; !st.IsDir() || owner != 0 || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is %v of uid %d, and root makes no socket where others may write: chown root %[1]s && chmod 0755 %[1]s, or run this as its owner", dir, st.Mode(), owner)
	}
	return nil
}
