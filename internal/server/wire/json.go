package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"

	"github.com/containerd/errdefs"
)

// MaxJSON bounds the JSON body of a request in bytes. The largest honest ones
// are create requests with long lists of mounts and labels: some 100 KiB.
const MaxJSON = 8 << 20

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

// Invalid makes an InvalidArgument error with the given words.
func Invalid(format string, args ...any) error { return invalid(format, args...) }

// ReadJSON decodes a request's JSON body into v. An empty body leaves v as it
// is. Errors: InvalidArgument; a *http.MaxBytesError for too large a body.
func ReadJSON(w http.ResponseWriter, r *http.Request, v any) error {
	b, err := ReadBody(w, r)
	if err != nil || len(b) == 0 {
		return err
	}
	return DecodeJSON(b, v)
}

// ReadBody returns a request's JSON body, undecoded; nil if there is none.
func ReadBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	ct := r.Header.Get("Content-Type")
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		return nil, nil
	}
	if r.ContentLength > MaxJSON {
		return nil, &http.MaxBytesError{Limit: MaxJSON}
	}
	var buf bytes.Buffer
	if r.ContentLength > 0 {
		buf.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	if _, err := buf.ReadFrom(http.MaxBytesReader(w, r.Body, MaxJSON)); err != nil {
		var big *http.MaxBytesError
		if errors.As(err, &big) {
			return nil, fmt.Errorf("the request's body exceeds %d MiB: %w", MaxJSON>>20, err)
		}
		return nil, invalid("read the request's body: %v", err)
	}
	if buf.Len() == 0 {
		return nil, nil
	}
	if mt, _, err := mime.ParseMediaType(ct); err != nil {
		return nil, invalid("malformed Content-Type header (%s): %v", ct, err)
	} else if mt != "application/json" {
		return nil, invalid("unsupported Content-Type header (%s): must be 'application/json'", ct)
	}
	return buf.Bytes(), nil
}

// DecodeJSON decodes exactly one JSON value.
func DecodeJSON(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(v); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return invalid("invalid JSON: got EOF while reading request body")
		}
		return invalid("invalid JSON: %v", err)
	}
	if dec.More() {
		return invalid("unexpected content after JSON")
	}
	return nil
}

// WriteJSON answers with v as JSON.
func WriteJSON(w http.ResponseWriter, status int, v any) error {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(buf.Bytes()) // the client may be gone
	return nil
}
