package docker

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"

	"github.com/klauspost/compress/zstd"
	"github.com/moby/moby/api/types/container"
	"tenon.dev/tenon/internal/server/wire"
)

const pathStatHeader = "X-Docker-Container-Path-Stat"

// maxZstdWindow bounds what a compressed archive can make us allocate; zstd's
// own default for decoders is the same.
const maxZstdWindow = 128 << 20

func (c *call) archivePath() (string, error) {
	p := c.str("path")
	if p == "" {
		return "", wire.Invalid("bad parameter: path cannot be empty")
	}
	return p, nil
}

func setPathStat(h http.Header, st *container.PathStat) error {
	b, err := json.Marshal(st)
	if err != nil {
		return err
	}
	h.Set(pathStatHeader, base64.StdEncoding.EncodeToString(b))
	return nil
}

func (a *API) archiveStat(c *call) error {
	p, err := c.archivePath()
	if err != nil {
		return err
	}
	st, err := a.eng.StatPath(c.ctx, c.name(), p)
	if err != nil {
		return err
	}
	if err := setPathStat(c.w.Header(), st); err != nil {
		return err
	}
	return c.done(http.StatusOK)
}

func (a *API) archiveGet(c *call) error {
	p, err := c.archivePath()
	if err != nil {
		return err
	}
	rd, st, err := a.eng.ReadArchive(c.ctx, c.name(), p)
	if err != nil {
		return err
	}
	defer func() { _ = rd.Close() }() // read to its end, or given up
	if err := setPathStat(c.w.Header(), st); err != nil {
		return err
	}
	return c.send("application/x-tar", rd)
}

// send answers with what rd holds. An error in the middle breaks the
// connection, so that the client doesn't take a part for the whole.
func (c *call) send(contentType string, rd io.Reader) error {
	br := bufio.NewReaderSize(rd, 128<<10)
	if _, err := br.Peek(1); err != nil && err != io.EOF {
		return err
	}
	c.w.Header().Set("Content-Type", contentType)
	c.w.WriteHeader(http.StatusOK)
	if _, err := br.WriteTo(c.w); err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

func (a *API) archivePut(c *call) error {
	p, err := c.archivePath()
	if err != nil {
		return err
	}
	rd, done, err := decompress(c.r.Body)
	if err != nil {
		return err
	}
	defer done()
	err = a.eng.WriteArchive(c.ctx, c.name(), p, rd, c.flag("noOverwriteDirNonDir"), c.flag("copyUIDGID"))
	return a.then(c, http.StatusOK, err)
}

// decompress tells by the first bytes how a tar is compressed.
func decompress(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, _ := br.Peek(6) // fewer bytes are no compressed file
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 8}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, wire.Invalid("gzip: %v", err)
		}
		return z, func() { _ = z.Close() }, nil // nothing to lose
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(br), func() {}, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, nil, wire.Invalid("zstd: %v", err)
		}
		return z, z.Close, nil
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return nil, nil, wire.Invalid("xz archives are not read: decompress it, or compress it with gzip or zstd")
	}
	return br, func() {}, nil
}

func (a *API) containerExport(c *call) error {
	rd, err := a.eng.Export(c.ctx, c.name())
	if err != nil {
		return err
	}
	defer func() { _ = rd.Close() }() // read to its end, or given up
	return c.send("application/octet-stream", rd)
}
