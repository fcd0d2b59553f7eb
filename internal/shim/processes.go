package shim

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// psTime bounds a run of the machine's own ps.
const psTime = 10 * time.Second

func (k *kernelService) Processes(ctx context.Context, r *taskv1.ProcessesRequest) (*taskv1.ProcessesResponse, error) {
	c, err := k.s.task(r.Id)
	if err != nil {
		return nil, err
	}
	pids, err := c.group.Pids()
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", r.Id, err)
	}
	slices.Sort(pids)
	columns, ok := psColumns(r.Args)
	if !ok {
		return hostPS(ctx, r.Args, pids)
	}
	resp := &taskv1.ProcessesResponse{}
	for _, col := range columns {
		resp.Titles = append(resp.Titles, col.title)
	}
	clock := newClock()
	for _, pid := range slices.Compact(pids) {
		p, err := readProcess(pid)
		if err != nil {
			continue // it has just exited
		}
		row := &taskv1.ProcessesResponse_Row{}
		for _, col := range columns {
			row.Fields = append(row.Fields, col.value(p, clock))
		}
		resp.Rows = append(resp.Rows, row)
	}
	return resp, nil
}

// psColumns understands the usual options of ps: -e -f, aux, and -o with known
// columns. It reports false for all else.
func psColumns(args []string) (list []psColumn, ok bool) {
	if len(args) == 0 {
		args = []string{"-ef"}
	}
	format := ""
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "-ef" || a == "-f" || a == "-fe" || a == "-Af":
			format = "uid,pid,ppid,c,stime,tty,time,cmd"
		case a == "aux" || a == "-aux" || a == "axu" || a == "u":
			format = "user,pid,%cpu,%mem,vsz,rss,tty,stat,start,bsdtime,command"
		case a == "-e" || a == "-A" || a == "ax" || a == "-ax":
			if format == "" {
				format = "pid,tty,time,comm"
			}
		case (a == "-o" || a == "-eo" || a == "o" || a == "axo" || a == "--format") && i+1 < len(args):
			i++
			format = args[i]
		case strings.HasPrefix(a, "-o") && len(a) > 2:
			format = a[2:]
		default:
			return nil, false
		}
	}
	for name := range strings.FieldsFuncSeq(format, func(r rune) bool { return r == ',' || r == ' ' }) {
		i := slices.IndexFunc(psTable, func(c psColumn) bool { return slices.Contains(c.names, name) })
		if i < 0 {
			return nil, false
		}
		col := psTable[i]
		if name == "uid" && strings.HasPrefix(format, "uid,pid,ppid,c") { // -f shows names under this title
			col.value = func(p *procInfo, c *clock) string { return userName(p.uid) }
		}
		list = append(list, col)
	}
	if !slices.ContainsFunc(list, func(c psColumn) bool { return c.title == "PID" }) {
		return nil, false
	}
	return list, true
}

// hostPS runs the machine's ps and keeps the container's lines, as Docker does.
func hostPS(ctx context.Context, args []string, pids []int) (*taskv1.ProcessesResponse, error) {
	path, err := exec.LookPath("ps")
	if err != nil {
		return nil, fmt.Errorf("ps options %q: only -ef, aux and -o with the usual columns are known where there is no ps: %w", args, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, psTime)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stderr = &limited{b: &stderr, left: 1024}
	out, err := cmd.Output()
	if err != nil {
		why, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n") // how to use ps comes after it
		return nil, fmt.Errorf("ps: %s: %w", cmp.Or(why, err.Error()), errdefs.ErrInvalidArgument)
	}
	return parsePS(string(out), pids)
}

var errNoPID = errors.New("Couldn't find PID field in ps output") //nolint:staticcheck // Docker's words, which clients know

func parsePS(out string, pids []int) (*taskv1.ProcessesResponse, error) {
	head, rest, _ := strings.Cut(out, "\n")
	resp := &taskv1.ProcessesResponse{Titles: strings.Fields(head)}
	at := slices.Index(resp.Titles, "PID")
	if at < 0 {
		return nil, fmt.Errorf("%w: %w", errNoPID, errdefs.ErrInvalidArgument)
	}
	for line := range strings.Lines(rest) {
		f := strings.Fields(line)
		if len(f) <= at {
			continue
		}
		pid, err := strconv.Atoi(f[at])
		if err != nil {
			return nil, fmt.Errorf("ps: unexpected pid %q: %w", f[at], errdefs.ErrInternal)
		}
		if !slices.Contains(pids, pid) {
			continue
		}
		if n := len(resp.Titles); len(f) > n { // the last column is the command line
			f = append(f[:n-1:n-1], strings.Join(f[n-1:], " "))
		}
		resp.Rows = append(resp.Rows, &taskv1.ProcessesResponse_Row{Fields: f})
	}
	return resp, nil
}
