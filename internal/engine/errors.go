package engine

import "errors"

// ErrNotModified says that the container is in the state asked for already.
// The server answers 304.
var ErrNotModified = errors.New("not modified")
