package task

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/status"
)

func TestErrorsRoundTrip(t *testing.T) {
	for _, class := range []error{
		errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrPermissionDenied,
		errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrAborted, errdefs.ErrOutOfRange,
		errdefs.ErrNotImplemented, errdefs.ErrInternal, errdefs.ErrUnavailable, errdefs.ErrDataLoss,
		errdefs.ErrUnauthenticated, context.DeadlineExceeded, context.Canceled,
	} {
		err := fmt.Errorf("task x: %w", fmt.Errorf("because: %w", class))
		got := fromStatus(ToStatus(err))
		if !errors.Is(got, class) || got.Error() != "task x: because" {
			t.Errorf("%v became %v", err, got)
		}
		r := replyError(ReplyOf(err))
		if !errors.Is(r, class) {
			t.Errorf("%v became %v in a reply", err, r)
		}
	}
	plain := fromStatus(ToStatus(errors.New("plain")))
	if !errdefs.IsUnknown(plain) || plain.Error() != "plain" {
		t.Errorf("plain error: %v", plain)
	}
	if ToStatus(nil) != nil || fromStatus(nil) != nil {
		t.Error("nil is an error")
	}
	if s, _ := status.FromError(ToStatus(ToStatus(errdefs.ErrNotFound))); s.Message() != "not found" {
		t.Errorf("mapped twice: %v", s)
	}
}

func frame(stream byte, text string) string {
	return string([]byte{stream, 0, 0, 0, 0, 0, 0, byte(len(text))}) + text
}

func TestDemux(t *testing.T) {
	for _, c := range []struct{ name, in, out, errs, err string }{
		{"both", frame(1, "a") + frame(2, "b") + frame(1, "c"), "ac", "b", ""},
		{"empty", "", "", "", ""},
		{"torn head", frame(1, "a") + "\x01\x00", "a", "", "unexpected EOF"},
		{"torn body", frame(1, "abc")[:9], "a", "", "unexpected EOF"},
		{"unknown stream", frame(7, "a"), "", "", "stream 7"},
		{"huge", "\x01\x00\x00\x00\xff\xff\xff\xff", "", "", "4294967295"},
	} {
		var out, errs bytes.Buffer
		err := Demux(strings.NewReader(c.in), &out, &errs)
		if out.String() != c.out || errs.String() != c.errs || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %q, %v", c.name, out.String(), errs.String(), err)
		}
	}
}

func FuzzDemux(f *testing.F) {
	f.Add([]byte(frame(1, "a") + frame(2, "b")))
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		_ = Demux(bytes.NewReader(b), &out, nil)
		if out.Len() > len(b) {
			t.Error("more came out than went in")
		}
	})
}
