// Package ahead spares a guest most of the waits for its host's file server: the
// server tells with an answer what will be asked next, and the guest's relay of
// /dev/fuse gives that answer itself.
//
// What a kernel asks about a new small file is nearly all known before: the
// attributes of the directory that was just changed, capabilities of a file that
// was just made, what closing says; and of a file that was just opened, its
// content. None of it changes what is promised: an answer that was told ahead
// is used once, is as old as attributes may be, and is dropped if the guest has
// asked for any change in between (both ends count those, in the stream's order).
//
//	ahead.go  the format, and what the server tells
//	relay.go  what the guest's relay answers
package ahead

import (
	"encoding/binary"
	"time"
)

// Of struct fuse_in_header, fuse_out_header and enum fuse_opcode
// (include/uapi/linux/fuse.h).
const (
	inHeader  = 40
	outHeader = 16

	opLookup              = 1
	opForget              = 2
	opGetAttr             = 3
	opReadlink            = 5
	opOpen                = 14
	opRead                = 15
	opWrite               = 16
	opStatFs              = 17
	opRelease             = 18
	opFsync               = 20
	opGetXAttr            = 22
	opListXAttr           = 23
	opFlush               = 25
	opOpenDir             = 27
	opReadDir             = 28
	opReleaseDir          = 29
	opFsyncDir            = 30
	opGetLk               = 31
	opSetLk               = 32
	opSetLkw              = 33
	opAccess              = 34
	opCreate              = 35
	opInterrupt           = 36
	opBatchForget         = 42
	opFallocate           = 43
	opReadDirPlus         = 44
	opLseek               = 46
	opCopyFileRange       = 47
	opSetAttr             = 4
	truncates             = 0o1000 // O_TRUNC
	offError              = 4
	offUnique             = 8
	offNode               = 16
	offPadding            = 36 // unused by kernels
	capability            = "security.capability"
	attrOut               = 104 // sizeof(struct fuse_attr_out)
	told            int32 = 1000
)

// quiet in the unused bytes of a request's header says that nobody waits for its
// answer, and that none is to be sent.
const quiet = 0x51ee

// Quiet says whether the answer to a request has been given already, and takes
// the mark of that out of it.
func Quiet(request []byte) bool {
	if binary.NativeEndian.Uint32(request[offPadding:]) != quiet {
		return false
	}
	binary.NativeEndian.PutUint32(request[offPadding:], 0)
	return true
}

// Kinds of what is told.
const (
	kindAttr  = iota + 1 // the answer to GETATTR of a node
	kindCaps             // a node has no file capabilities
	kindRead             // the content of an open file, in whole
	kindClose            // closing an open file has nothing to say
)

// record is, after a fuse_out_header of the number 0 and the error told: kind (4
// bytes), zero (4), the count of changes (8), node or open file (8), and the
// payload. Kernels refuse what they don't know.
const record = outHeader + 24

func appendRecord(b []byte, kind uint32, count, id uint64, payload []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(record+len(payload)))
	b = binary.NativeEndian.AppendUint32(b, uint32(told))
	b = binary.NativeEndian.AppendUint64(b, 0)
	b = binary.NativeEndian.AppendUint32(b, kind)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = binary.NativeEndian.AppendUint64(b, count)
	b = binary.NativeEndian.AppendUint64(b, id)
	return append(b, payload...)
}

// Counts are of requests that change something, as far as one has read the
// stream: names and attributes, and files' content. Those that the relay answers
// itself are not among them.
type Counts struct{ Names, Content uint64 }

// Changes says what a request, of which at least the header is there, may change
// or ask to be seen anew.
func Changes(request []byte) (names, content bool) {
	switch binary.NativeEndian.Uint32(request[4:]) {
	case opForget, opReadlink, opRead, opStatFs, opRelease, opFsync, opGetXAttr, opListXAttr, opFlush, opOpenDir,
		opReadDir, opReleaseDir, opFsyncDir, opGetLk, opAccess, opInterrupt, opBatchForget, opLseek:
		return false, false
	case opLookup, opGetAttr, opReadDirPlus:
		// Content must not be older than attributes that the kernel gets meanwhile: it
		// would keep it as theirs for as long as they stay.
		return false, true
	case opOpen:
		return false, len(request) < inHeader+4 || binary.NativeEndian.Uint32(request[inHeader:])&truncates != 0
	case opWrite, opFallocate, opCopyFileRange:
		return false, true
	}
	return true, true // also what is not known here
}

// AppendAttr tells the answer to the next GETATTR of a node: attr is a struct
// fuse_attr_out.
func AppendAttr(b []byte, c Counts, node uint64, attr []byte) []byte {
	return appendRecord(b, kindAttr, c.Names, node, attr)
}

// AppendNoCaps tells that a node has no file capabilities, for a time.
func AppendNoCaps(b []byte, c Counts, node uint64, valid time.Duration) []byte {
	return appendRecord(b, kindCaps, c.Names, node, binary.NativeEndian.AppendUint64(nil, uint64(valid)))
}

// AppendContent tells the whole content of an open file, for a time.
func AppendContent(b []byte, c Counts, file uint64, valid time.Duration, content []byte) []byte {
	payload := append(binary.NativeEndian.AppendUint64(make([]byte, 0, 8+len(content)), uint64(valid)), content...)
	return appendRecord(b, kindRead, c.Content, file, payload)
}

// AppendSilentClose tells that FLUSH of an open file has nothing to do, as long as
// nobody takes locks on it.
func AppendSilentClose(b []byte, file uint64) []byte {
	return appendRecord(b, kindClose, 0, file, nil)
}
