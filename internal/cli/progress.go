package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/term"
)

// progress shows a stream of Docker JSON messages: on a terminal one line per
// layer, each rewritten in place; elsewhere one line per change of status.
type progress struct {
	w     io.Writer
	tty   bool
	fd    uintptr
	quiet bool
	lines map[string]int
	last  map[string]string
	now   func() time.Time
}

func newProgress(w io.Writer, quiet bool) *progress {
	p := &progress{w: w, quiet: quiet, lines: map[string]int{}, last: map[string]string{}, now: time.Now}
	p.fd, p.tty = terminal(w)
	return p
}

// copy shows all messages of r. onAux, if not nil, gets the auxiliary data.
// The error is the last one that the stream itself reported.
func (p *progress) copy(r io.Reader, onAux func(json.RawMessage)) error {
	dec := json.NewDecoder(r)
	for {
		var m jsonstream.Message
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the daemon's progress: %w", err)
		}
		if m.Error != nil {
			return errors.New(m.Error.Message)
		}
		if m.Aux != nil {
			if onAux != nil {
				onAux(*m.Aux)
			}
			continue
		}
		p.add(m)
	}
}

// add shows one message.
func (p *progress) add(m jsonstream.Message) {
	if p.quiet {
		return
	}
	switch {
	case m.Stream != "":
		fmt.Fprint(p.w, m.Stream)
	case m.ID == "" || !p.tty:
		p.plain(m)
	default:
		p.inPlace(m)
	}
}

func (p *progress) plain(m jsonstream.Message) {
	if m.ID == "" {
		// Lines that follow belong to another block of layers.
		clear(p.lines)
		fmt.Fprintln(p.w, m.Status)
		return
	}
	// Without a terminal every status is said once, and no bar is drawn.
	if m.Progress != nil && m.Progress.Current > 0 || p.last[m.ID] == m.Status {
		return
	}
	p.last[m.ID] = m.Status
	fmt.Fprintf(p.w, "%s: %s\n", m.ID, m.Status)
}

func (p *progress) inPlace(m jsonstream.Message) {
	n, known := p.lines[m.ID]
	if !known {
		n = len(p.lines)
		p.lines[m.ID] = n
		fmt.Fprintln(p.w)
	}
	up := len(p.lines) - n
	fmt.Fprintf(p.w, "\x1b[%dA\x1b[2K\r%s: %s%s\r\x1b[%dB", up, m.ID, m.Status, p.bar(m), up)
}

// bar draws "[====>    ]  1.2MB/3.4MB" into the width that is left.
func (p *progress) bar(m jsonstream.Message) string {
	pr := m.Progress
	if pr == nil || pr.Current <= 0 && pr.Total <= 0 {
		return ""
	}
	width := 80
	if ws, err := term.GetWinsize(p.fd); err == nil && ws.Width > 0 {
		width = int(ws.Width)
	}
	return drawBar(pr, width, p.now())
}

func drawBar(pr *jsonstream.Progress, width int, now time.Time) string {
	size := func(n int64) string {
		if pr.Units != "" {
			return fmt.Sprintf("%d", n)
		}
		return units.HumanSize(float64(n))
	}
	if pr.Total <= 0 {
		if pr.Units != "" {
			return fmt.Sprintf(" %8v %s", pr.Current, pr.Units)
		}
		return fmt.Sprintf(" %8v", size(pr.Current))
	}
	share := min(int(float64(pr.Current)/float64(pr.Total)*100)/2, 50)
	out := " "
	if width > 110 {
		head := ""
		if share < 50 {
			head = ">"
		}
		out = " [" + strings.Repeat("=", share) + head + strings.Repeat(" ", 50-share-len(head)) + "] "
	}
	if !pr.HideCounts {
		out += fmt.Sprintf("%8v/%v", size(pr.Current), size(pr.Total))
		if pr.Units != "" {
			out += " " + pr.Units
		}
	}
	if pr.Start > 0 && share < 50 && pr.Current > 0 {
		past := now.Sub(time.Unix(pr.Start, 0))
		left := past / time.Duration(pr.Current) * time.Duration(pr.Total-pr.Current)
		if width > 50 {
			out += " " + left.Round(time.Second).String()
		}
	}
	return out
}
