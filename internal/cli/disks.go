package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/spf13/pflag"
)

// diskFlags say what becomes of a file that is a disk.
type diskFlags struct {
	format, firmware, user string
	tags, labels           list
}

func (d *diskFlags) add(f *pflag.FlagSet) {
	f.StringVar(&d.format, "disk", "", "Take the file for a disk: qcow2 or raw (by default its first bytes tell)")
	f.StringVar(&d.firmware, "firmware", "", "What boots the disk: bios or uefi (by default what the architecture has)")
	f.StringVar(&d.user, "disk-user", "", "Account that the disk's system has, for show")
	f.Var(&d.labels, "label", "Label of the disk image")
}

func (d *diskFlags) query(q url.Values) {
	for k, v := range map[string]string{"disk": d.format, "firmware": d.firmware, "disk-user": d.user} {
		if v != "" {
			q.Set(k, v)
		}
	}
	for _, l := range d.labels {
		q.Add("label", l)
	}
}

// diskName makes an image's name of a disk's file: debian-12 of /tmp/Debian-12.qcow2.xz.
func diskName(path string) string {
	name := strings.ToLower(filepath.Base(path))
	for _, ext := range []string{".gz", ".xz", ".zst", ".zstd"} {
		name = strings.TrimSuffix(name, ext)
	}
	for _, ext := range []string{".qcow2", ".qcow", ".raw", ".img", ".iso", ".tar"} {
		name = strings.TrimSuffix(name, ext)
	}
	// What a repository's name may have: parts of letters and digits, with one sign between.
	parts := strings.FieldsFunc(name, func(r rune) bool { return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.') })
	name = strings.Join(parts, "-")
	for strings.Contains(name, "..") {
		name = strings.ReplaceAll(name, "..", ".")
	}
	name = strings.NewReplacer("-.", "-", ".-", "-").Replace(name)
	return strings.Trim(name, ".-")
}

// plain is r, decompressed if it is compressed by xz, which the engine does not read:
// here it is the user's own program that does. It is to be closed.
func plain(ctx context.Context, r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 256<<10)
	if head, _ := br.Peek(6); string(head) != "\xfd7zXZ\x00" { // an error comes again
		return io.NopCloser(br), nil
	}
	prog, err := exec.LookPath("xz")
	if err != nil {
		return nil, errors.New("it is compressed by xz, and there is no program xz here: install it (xz-utils), or decompress the file first")
	}
	ctx, cancel := context.WithCancel(ctx)
	x := &unxz{cmd: exec.CommandContext(ctx, prog, "-dc"), cancel: cancel}
	x.cmd.Stdin, x.cmd.Stderr = br, &x.said
	if x.out, err = x.cmd.StdoutPipe(); err == nil {
		err = x.cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return x, nil
}

// unxz reads what xz writes. It ends with an error if xz does, so that nobody takes a
// part for the whole.
type unxz struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
	out    io.ReadCloser
	said   strings.Builder
	wait   sync.Once
	err    error
}

func (x *unxz) Read(p []byte) (int, error) {
	n, err := x.out.Read(p)
	if err == io.EOF {
		if werr := x.end(); werr != nil {
			err = werr
		}
	}
	return n, err
}

func (x *unxz) end() error {
	x.wait.Do(func() {
		if x.err = x.cmd.Wait(); x.err != nil {
			x.err = fmt.Errorf("xz: %w: %s", x.err, strings.TrimSpace(x.said.String()))
		}
	})
	return x.err
}

// Close ends xz if it has not ended.
func (x *unxz) Close() error {
	x.cancel()
	_ = x.end() // whoever read all has its error
	return nil
}
