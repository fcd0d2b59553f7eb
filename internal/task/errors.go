package task

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// classes pairs errdefs classes with status codes; going to a code the first
// match counts, coming from one too.
var classes = []struct {
	class error
	code  codes.Code
}{
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrConflict, codes.FailedPrecondition},
	{errdefs.ErrNotModified, codes.FailedPrecondition},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrOutOfRange, codes.OutOfRange},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrInternal, codes.Internal},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{errdefs.ErrDataLoss, codes.DataLoss},
	{errdefs.ErrUnauthenticated, codes.Unauthenticated},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// ErrorCode is the status code of err's outermost errdefs class.
func ErrorCode(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	class := errdefs.Resolve(err)
	for _, c := range classes {
		if class == c.class {
			return c.code
		}
	}
	return codes.Unknown
}

// ToStatus is what a shim sends for err: text and class. It is the shim's one
// place of mapping, used by ServerInterceptor and for streams.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(ErrorCode(err), err.Error())
}

// ReplyOf is ToStatus for a stream connection.
func ReplyOf(err error) *taskv1.StreamReply {
	return &taskv1.StreamReply{Error: err.Error(), Code: int32(ErrorCode(err))}
}

// remoteError is an error that a shim sent: its text and its class.
type remoteError struct {
	text  string
	class error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.class }

func fromCode(code codes.Code, text string) error {
	for _, c := range classes {
		if code == c.code {
			// The class's own words are already part of the text, or add nothing.
			text = strings.TrimSuffix(text, ": "+c.class.Error())
			return &remoteError{text, c.class}
		}
	}
	return &remoteError{text, errdefs.ErrUnknown}
}

// fromStatus is the daemon's one place of mapping.
func fromStatus(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, ttrpc.ErrServerClosed) {
		return &remoteError{"shim: connection closed", errdefs.ErrUnavailable}
	}
	if s, ok := status.FromError(err); ok {
		return fromCode(s.Code(), s.Message())
	}
	return err
}

func replyError(r *taskv1.StreamReply) error {
	return fromCode(codes.Code(r.Code), r.Error)
}

// ClientInterceptor gives the errors of unary calls the classes that the server
// gave them (ServerInterceptor), also for services beside the Task API.
func ClientInterceptor(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	if err := invoke(ctx, req, resp); err != nil {
		return fromStatus(err)
	}
	if s := resp.Status; s != nil && s.Code != int32(codes.OK) { // ttrpc looks at it only after us
		return fromCode(codes.Code(s.Code), s.Message)
	}
	return nil
}

// ServerInterceptor maps the errors of a shim's unary calls.
func ServerInterceptor(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	deepen()
	resp, err := method(ctx, unmarshal)
	return resp, ToStatus(err)
}

// deepen gives a call's goroutine the stack that most calls need while there is
// little on it: growing it later, step by step, means moving all frames each time,
// which takes an emulated machine a third of a million instructions in a start.
//
//go:noinline
func deepen() byte {
	var room [9 << 10]byte
	return room[deepest.Load()]
}

// deepest is nothing that the compiler knows: 0.
var deepest atomic.Uint32

// kernelClient maps the errors of the one streaming call.
type kernelClient struct{ taskv1.KernelClient }

func (k kernelClient) Events(ctx context.Context, r *taskv1.EventsRequest) (taskv1.Kernel_EventsClient, error) {
	s, err := k.KernelClient.Events(ctx, r)
	if err != nil {
		return nil, fromStatus(err)
	}
	return eventsClient{s}, nil
}

type eventsClient struct{ taskv1.Kernel_EventsClient }

func (e eventsClient) Recv() (*taskv1.Event, error) {
	ev, err := e.Kernel_EventsClient.Recv()
	return ev, fromStatus(err)
}
