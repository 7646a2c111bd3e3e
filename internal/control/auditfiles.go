package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"time"

	"perimeterd/internal/audit"
	"perimeterd/vpn"
)

// AuditFile is one of the audit's files.
type AuditFile struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
}

// readPatience is how long a reader may take for a piece of what it is sent.
const readPatience = 10 * time.Second

func (o *Operations) auditFiles() ([]AuditFile, error) {
	entries, err := os.ReadDir(o.AuditDir)
	if err != nil {
		return nil, err
	}
	list := []AuditFile{}
	for _, e := range entries {
		if st, err := e.Info(); err == nil && audit.IsFile(e.Name()) {
			list = append(list, AuditFile{e.Name(), st.Size()})
		}
	}
	return list, nil
}

// auditFile sends a file as it is now.
func (o *Operations) auditFile(w http.ResponseWriter, r *http.Request) {
	f, err := openIn(o.AuditDir, r.PathValue("name"))
	if err != nil {
		answer(w, nil, &vpn.APIError{Status: http.StatusNotFound, Code: vpn.CodeNotFound, Message: err.Error()})
		return
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := patient{w, http.NewResponseController(w)}
	if _, err := io.CopyBuffer(out, struct{ io.Reader }{f}, make([]byte, 64<<10)); err != nil {
		panic(http.ErrAbortHandler) // what the reader has got must not look whole
	}
}

func openIn(dir, name string) (*os.File, error) {
	if !audit.IsFile(name) {
		return nil, fmt.Errorf("%q is no file of the audit", name)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.Open(name)
}

// patient gives each piece its own time, where the server has one for the whole answer.
type patient struct {
	w io.Writer
	c *http.ResponseController
}

func (p patient) Write(b []byte) (int, error) {
	if err := p.c.SetWriteDeadline(time.Now().Add(readPatience)); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

// AuditFiles is the daemon's audit, for who cannot read its files: a file system that is good for audit.Verify and
// audit.Query.
func (c *Client) AuditFiles(ctx context.Context) fs.FS { return remoteFiles{ctx, c} }

type remoteFiles struct {
	ctx context.Context
	c   *Client
}

func (r remoteFiles) ReadDir(string) (list []fs.DirEntry, err error) {
	var all []AuditFile
	if err := r.c.do(r.ctx, "GET", "/v1/audit", nil, &all); err != nil {
		return nil, err
	}
	for _, f := range all {
		list = append(list, fs.FileInfoToDirEntry(remoteInfo{f}))
	}
	return list, nil
}

func (r remoteFiles) Open(name string) (fs.File, error) {
	res, err := r.c.stream(r.ctx, "/v1/audit/"+url.PathEscape(name))
	var refused *vpn.APIError
	if errors.As(err, &refused) && refused.Status == http.StatusNotFound {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &remoteFile{res.Body, AuditFile{name, res.ContentLength}}, nil
}

type remoteFile struct {
	io.ReadCloser
	info AuditFile
}

func (f *remoteFile) Stat() (fs.FileInfo, error) { return remoteInfo{f.info}, nil }

type remoteInfo struct{ of AuditFile }

func (i remoteInfo) Name() string       { return i.of.Name }
func (i remoteInfo) Size() int64        { return i.of.Size }
func (i remoteInfo) Mode() fs.FileMode  { return 0o600 }
func (i remoteInfo) ModTime() time.Time { return time.Time{} }
func (i remoteInfo) IsDir() bool        { return false }
func (i remoteInfo) Sys() any           { return nil }
