package audit

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"tenon.dev/tenon/client/imageapi"
)

// WrittenLimits bound the reading of what a container has written.
var WrittenLimits = Limits{Time: 20 * time.Second, Bytes: 1 << 30, File: 1 << 20, Files: 200_000, Finds: 200}

// Written reads a layer's tar: what a container has written since it was made. The tar
// comes from a container, and what is read of it is bounded by l, and by ctx if its end
// closes r. packaged tells which files are of the packages in the container's image.
func Written(ctx context.Context, r io.Reader, l Limits, packaged func(string) bool) (f Files) {
	l.defaults()
	in := &io.LimitedReader{R: r, N: l.Bytes}
	w := &written{limits: l, tar: tar.NewReader(in), buf: make([]byte, l.File), owned: map[string]bool{}}
	err := w.read(ctx)
	switch {
	case ctx.Err() != nil:
		w.files.Incomplete = fmt.Sprintf("what it has written was not all read after %v", l.Time)
	case in.N <= 0:
		w.files.Incomplete = fmt.Sprintf("it has written more than is read of one container (%d MiB)", l.Bytes>>20)
	case errors.Is(err, errEnough):
		w.files.Incomplete = fmt.Sprintf("it has written more than %d files", l.Files)
	case err != nil:
		w.files.Incomplete = fmt.Sprintf("what it has written was not all read: %v", err)
	}
	claimed := packagedIn(w.owned)
	is := func(p string) bool { return packaged != nil && packaged(p) }
	for i := range w.files.Special {
		s := &w.files.Special[i]
		s.Packaged, s.Claimed = is(s.Path), claimed(s.Path)
	}
	for i := range w.files.Secrets {
		s := &w.files.Secrets[i]
		s.Packaged, s.Claimed = is(s.Path), claimed(s.Path)
	}
	return w.files
}

type written struct {
	limits Limits
	tar    *tar.Reader
	buf    []byte
	files  Files
	owned  map[string]bool // of packages that were installed in the container, if its root doesn't lie
	left   int             // bytes of lists of packages that are still read
}

func (w *written) read(ctx context.Context) error {
	w.left = maxOwnedText
	for n := 0; ; n++ {
		h, err := w.tar.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if n >= w.limits.Files {
			return errEnough
		}
		if h.Typeflag != tar.TypeReg || strings.HasPrefix(path.Base(h.Name), ".wh.") {
			continue
		}
		if err := w.file(path.Clean("/"+h.Name), h); err != nil {
			return err
		}
	}
}

func (w *written) file(name string, h *tar.Header) error {
	const setuid, setgid, others, exec, groupExec = 0o4000, 0o2000, 0o002, 0o111, 0o010
	s := Special{Path: name, UID: uint32(h.Uid), GID: uint32(h.Gid)}
	s.Setuid, s.Setgid = h.Mode&setuid != 0, h.Mode&setgid != 0 && h.Mode&groupExec != 0
	// What a program leaves for others to write is its own affair, unless it is executed.
	s.Others = h.Mode&others != 0 && h.Mode&exec != 0
	if (s.Setuid || s.Setgid || s.Others) && len(w.files.Special) < w.limits.Finds {
		w.files.Special = append(w.files.Special, s)
	}
	list := strings.HasPrefix(name, "/var/lib/dpkg/info/") && strings.HasSuffix(name, ".list")
	if list && w.left > 0 {
		sc := bufio.NewScanner(io.LimitReader(w.tar, int64(w.left)))
		for sc.Scan() && len(w.owned) < maxOwned {
			w.left -= len(sc.Bytes()) + 1
			w.owned[sc.Text()] = true
		}
		return nil
	}
	if h.Size == 0 || list || isDull(name) || len(w.files.Secrets) >= w.limits.Finds {
		return nil
	}
	n, err := io.ReadFull(w.tar, w.buf)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) || int64(n) < min(h.Size, int64(len(w.buf))) {
		return errors.Join(err, io.ErrUnexpectedEOF)
	}
	if isProgram(w.buf[:n]) {
		return nil
	}
	if name == "/etc/shadow" {
		w.files.Shadow = shadow(w.buf[:n])
	}
	for _, x := range Secrets(w.buf[:n]) {
		w.files.Secrets = append(w.files.Secrets, FileSecret{Path: name, Secret: x})
	}
	return nil
}

// written judges what a container has written into its root file system.
func (c *collector) written(f Container) {
	nnp := noNewPrivileges(f.SecurityOpt)
	for _, s := range f.Files.Special {
		fix := "a new container of its image; if it is to be so, in the image, where it is seen: RUN chmod"
		switch {
		case s.Setuid || s.Setgid:
			severity := imageapi.High
			switch {
			case s.Packaged || nnp:
				severity = imageapi.Low
			case s.Others:
				severity = imageapi.Critical
			case s.Claimed:
				severity = imageapi.Medium
			}
			who := fmt.Sprintf("user %d", s.UID)
			if !s.Setuid {
				who = fmt.Sprintf("group %d", s.GID)
			}
			c.add("setuid-file", severity, s.Path, "made in the container: whoever executes it has the rights of "+who,
				"--security-opt no-new-privileges, and --read-only; for this one: tenon exec "+f.Name+" chmod ug-s "+word(s.Path))
		case !s.Packaged:
			c.add("writable-by-all", imageapi.Medium, s.Path, "made in the container: a program that every user may change", fix+" o-w "+word(s.Path))
		}
	}
	for _, s := range f.Files.Secrets {
		severity := imageapi.High
		switch {
		case s.Packaged:
			severity = imageapi.Low
		case s.Claimed:
			severity = imageapi.Medium
		}
		c.add("secret-file", severity, s.Path, fmt.Sprintf("%s (%s) was written into its root file system: it stays there when the process ends, and goes into what is committed or exported of it", s.Secret.What, s.Secret.Shown),
			"--tmpfs "+word(path.Dir(s.Path))+", a volume, or a file mounted in /run/secrets; --read-only keeps it out")
	}
	for _, a := range f.Files.Shadow {
		c.add("empty-password", imageapi.High, "/etc/shadow", fmt.Sprintf("the account %s has no password", a), "tenon exec "+f.Name+" passwd -l "+word(a))
	}
}
