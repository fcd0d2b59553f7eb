package seccomp

import "encoding/binary"

// bigEndian says in which order the halves of an argument lie.
var bigEndian = binary.NativeEndian.Uint16([]byte{0, 1}) == 1
