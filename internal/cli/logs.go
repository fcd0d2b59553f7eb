package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) logsCmd() *cobra.Command {
	var details, follow, timestamps, safe bool
	var since, until, tail string
	cmd := &cobra.Command{
		Use:   "logs [OPTIONS] CONTAINER",
		Short: "Fetch the logs of a container",
		Long: `Show what a container wrote to its standard output and error.
The bytes are the container's own; --safe shows control codes instead of
sending them to the terminal.`,
		Example:           "tenon logs web\ntenon logs -f --tail 100 web\ntenon logs --since 10m -t web",
		Args:              exactArgs(1),
		ValidArgsFunction: a.completeFirst(a.containerNames(all)),
	}
	f := cmd.Flags()
	f.BoolVar(&details, "details", false, "Show extra details provided to logs")
	f.BoolVarP(&follow, "follow", "f", false, "Follow log output")
	f.BoolVar(&safe, "safe", false, "Escape control codes")
	f.StringVar(&since, "since", "", `Show logs since timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)`)
	f.StringVarP(&tail, "tail", "n", "all", "Number of lines to show from the end of the logs")
	f.BoolVarP(&timestamps, "timestamps", "t", false, "Show timestamps")
	f.StringVar(&until, "until", "", `Show logs before a timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)`)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		q := url.Values{"stdout": {"1"}, "stderr": {"1"}, "tail": {tail}}
		for k, on := range map[string]bool{"details": details, "follow": follow, "timestamps": timestamps} {
			if on {
				q.Set(k, "1")
			}
		}
		for k, v := range map[string]string{"since": since, "until": until} {
			if v == "" {
				continue
			}
			ts, err := parseTimestamp(v, time.Now())
			if err != nil {
				return fmt.Errorf("invalid value for %q: %w", k, err)
			}
			q.Set(k, ts)
		}
		return a.logs(ctx, c, args[0], q, safe)
	})
	return cmd
}

func (a *app) logs(ctx context.Context, c *client.Client, name string, q url.Values, safe bool) error {
	resp, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: containerPath(name, "/logs"), Query: q})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	out, errOut := a.out, a.err
	if safe {
		so, se := &safeWriter{w: out}, &safeWriter{w: errOut}
		defer so.flush()
		defer se.flush()
		out, errOut = so, se
	}
	raw := false
	switch ct := resp.Header.Get("Content-Type"); {
	case strings.HasPrefix(ct, "application/vnd.docker.raw-stream"):
		raw = true
	case strings.HasPrefix(ct, "application/vnd.docker.multiplexed-stream"):
	default:
		// A server before API 1.42 does not tell: ask for the container.
		var info container.InspectResponse
		if err := c.Get(ctx, containerPath(name, "/json"), nil, &info); err != nil {
			return err
		}
		raw = info.Config != nil && info.Config.Tty
	}
	if raw {
		_, err = io.Copy(out, resp.Body)
	} else {
		err = demux(out, errOut, resp.Body)
	}
	return err
}

// parseTimestamp turns RFC 3339 (also cut short), Unix seconds or a duration
// before now into the API's seconds[.nanoseconds].
func parseTimestamp(s string, now time.Time) (string, error) {
	if d, err := time.ParseDuration(s); err == nil {
		t := now.Add(-d)
		return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()), nil
	}
	if sec, nano, _ := strings.Cut(s, "."); allDigits(strings.TrimPrefix(sec, "-")) && (nano == "" || allDigits(nano)) {
		return s, nil
	}
	for _, layout := range []string{
		time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02", "2006-01-02Z07:00",
		"2006-01-02T15:04Z07:00", "2006-01-02T15Z07:00",
	} {
		if t, err := time.ParseInLocation(layout, s, now.Location()); err == nil {
			return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()), nil
		}
	}
	return "", fmt.Errorf("%q is neither a time (2006-01-02T15:04:05Z), nor Unix seconds, nor a duration (10m)", s)
}

func allDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// safeWriter escapes everything that a terminal could take for a command:
// control codes but newline and tab, and bytes that are not UTF-8.
type safeWriter struct {
	w    io.Writer
	rest []byte // the begin of a character whose end has not come yet
}

func (s *safeWriter) Write(p []byte) (int, error) {
	in := append(s.rest, p...)
	out := make([]byte, 0, len(in)+16)
	for len(in) > 0 {
		if !utf8.FullRune(in) {
			break
		}
		r, n := utf8.DecodeRune(in)
		switch {
		case r == utf8.RuneError && n == 1:
			out = fmt.Appendf(out, `\x%02x`, in[0])
		case r == '\n' || r == '\t':
			out = append(out, in[0])
		case r == '\r' && len(in) > 1 && in[1] == '\n':
			// a terminal's line end
		case unicode.IsControl(r), unicode.Is(unicode.Bidi_Control, r):
			q := strconv.QuoteRuneToASCII(r)
			out = append(out, q[1:len(q)-1]...)
		default:
			out = append(out, in[:n]...)
		}
		in = in[n:]
	}
	s.rest = append(s.rest[:0:0], in...)
	if _, err := s.w.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// flush writes what is left of a character that never ended.
func (s *safeWriter) flush() {
	for _, b := range s.rest {
		fmt.Fprintf(s.w, `\x%02x`, b)
	}
	s.rest = nil
}
