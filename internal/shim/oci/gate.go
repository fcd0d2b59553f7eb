package oci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch/fork"
)

// messageError is the kind of a report of package fork that ends the child.
const messageError = 3

// readGateStatus reads what the child says after its barrier: nothing, if its
// program runs; else the step that failed. The names of the steps were
// recorded by create.
func (c *container) readGateStatus(status *os.File, p *specs.Process) error {
	var message [16]byte
	for {
		_, err := io.ReadFull(status, message[:])
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("%s: the child's report: %w", c.ID, err)
		}
		kind := binary.NativeEndian.Uint32(message[0:])
		if kind != messageError {
			continue
		}
		name := "start"
		if i := int(binary.NativeEndian.Uint32(message[4:])) - c.FirstStep; i >= 0 && i < len(c.Steps) {
			name = c.Steps[i]
		}
		return explain(&fork.StepError{Step: name, Errno: unix.Errno(binary.NativeEndian.Uint64(message[8:]))}, p)
	}
}
