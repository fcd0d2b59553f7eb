package docker

import (
	"strconv"

	"github.com/moby/moby/api/types"
	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/server/wire"
)

func (a *API) containerLogs(c *call) error {
	o := engine.LogsOptions{
		Stdout: c.flag("stdout"), Stderr: c.flag("stderr"), Follow: c.flag("follow"),
		Timestamps: c.flag("timestamps"), Details: c.flag("details"), Tail: -1,
	}
	if !o.Stdout && !o.Stderr {
		return wire.Invalid("must specify at least one of 'stdout' or 'stderr'")
	}
	var err error
	if o.Since, err = c.unixTime("since"); err != nil {
		return err
	}
	if c.str("until") != "0" {
		if o.Until, err = c.unixTime("until"); err != nil {
			return err
		}
	}
	// Like Docker: what is not a number means all.
	if n, err := strconv.Atoi(c.str("tail")); err == nil && n >= 0 {
		o.Tail = n
	}
	ref := c.name()
	tty, err := a.eng.IsTTY(c.ctx, ref)
	if err != nil {
		return err
	}
	ct := types.MediaTypeRawStream
	if !tty && !c.v.before(42) {
		ct = types.MediaTypeMultiplexedStream
	}
	s := wire.NewStream(c.w, ct, o.Follow)
	if o.Follow {
		s.StartWithin(started)
	}
	if tty {
		_, err = a.eng.Logs(c.ctx, ref, o, s, s)
	} else {
		f := wire.NewFrames(s)
		_, err = a.eng.Logs(c.ctx, ref, o, f.Stream(wire.Stdout), f.Stream(wire.Stderr))
	}
	if err != nil && !s.Began() {
		s.Close(false)
		return err
	}
	if err != nil && c.ctx.Err() == nil && !tty {
		_ = wire.NewFrames(s).WriteFrame(wire.SystemError, []byte("error reading the log: "+wire.Message(err)+"\n"))
	}
	s.Close(true)
	return nil
}
