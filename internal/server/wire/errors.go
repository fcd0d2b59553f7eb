// Package wire holds what both of the server's APIs need on the wire: errors
// to statuses (the only place), JSON bodies in and out, upgraded connections
// with half-close and hang-up detection, and multiplexed output frames.
package wire

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/common"
	"tenon.dev/tenon/internal/engine"
)

// StatusClientGone is what is logged for a request whose client went away.
const StatusClientGone = 499

// Status maps an error to the HTTP status that Docker's clients expect; the
// outermost class decides.
func Status(err error) int {
	var tooBig *http.MaxBytesError
	switch {
	case err == nil:
		return http.StatusOK
	case errors.Is(err, engine.ErrNotModified):
		return http.StatusNotModified
	case errors.As(err, &tooBig):
		return http.StatusRequestEntityTooLarge
	}
	switch errdefs.Resolve(err) {
	case errdefs.ErrNotFound:
		return http.StatusNotFound
	case errdefs.ErrInvalidArgument, errdefs.ErrOutOfRange:
		return http.StatusBadRequest
	case errdefs.ErrAlreadyExists, errdefs.ErrConflict, errdefs.ErrFailedPrecondition, errdefs.ErrAborted:
		return http.StatusConflict
	case errdefs.ErrUnauthenticated:
		return http.StatusUnauthorized
	case errdefs.ErrPermissionDenied:
		return http.StatusForbidden
	case errdefs.ErrUnavailable:
		return http.StatusServiceUnavailable
	case errdefs.ErrNotImplemented:
		return http.StatusNotImplemented
	case errdefs.ErrNotModified:
		return http.StatusNotModified
	case context.Canceled:
		return StatusClientGone
	}
	return http.StatusInternalServerError
}

// Message is the sentence that a user reads. Wrapping leaves the bare name of
// a class at an error's end ("…: failed precondition"); it says nothing to a
// user and is cut off, unless it is the kernel's own word or the only one that
// tells what is wrong.
func Message(err error) string {
	msg := err.Error()
	class := errdefs.Resolve(err)
	cut, ok := strings.CutSuffix(msg, ": "+class.Error())
	if !ok || cut == "" {
		return msg
	}
	var errno syscall.Errno
	if errors.As(err, &errno) && errno.Error() == class.Error() {
		return msg
	}
	for _, c := range redundant {
		if class != c.class {
			continue
		}
		if len(c.said) == 0 {
			return cut
		}
		l := strings.ToLower(cut)
		for _, phrase := range c.said {
			if strings.Contains(l, phrase) {
				return cut
			}
		}
	}
	return msg
}

// redundant lists the classes whose name at an error's end says nothing new: to
// anybody, or if one of the phrases has been said before.
var redundant = []struct {
	class error
	said  []string
}{
	{errdefs.ErrFailedPrecondition, nil},
	{errdefs.ErrConflict, nil},
	{errdefs.ErrInvalidArgument, nil},
	{errdefs.ErrUnavailable, nil},
	{errdefs.ErrAlreadyExists, []string{"already", "in use", "exists"}},
	{errdefs.ErrPermissionDenied, []string{"denied", "not permitted", "cannot", "can't", "refused", "not allowed"}},
	{errdefs.ErrNotImplemented, []string{"not ", "n't ", "no "}},
	{errdefs.ErrNotFound, []string{"not found", "no such", "not known", "unknown", "could not find", "does not exist"}},
}

// WriteError answers a request with an error, as {"message": …}. It must not
// be called when the answer has begun already.
func WriteError(w http.ResponseWriter, err error) {
	WriteMessage(w, Status(err), Message(err))
}

// WriteMessage answers with a status and {"message": msg}.
func WriteMessage(w http.ResponseWriter, status int, msg string) {
	if status == http.StatusNotModified || status == http.StatusNoContent {
		w.WriteHeader(status)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(ErrorBody(msg)) // the client may be gone
}

// ErrorBody is the JSON body of an error answer.
func ErrorBody(msg string) []byte {
	b, _ := json.Marshal(common.ErrorResponse{Message: msg}) // a string always encodes
	return append(b, '\n')
}
