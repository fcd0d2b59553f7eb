package ahead

import (
	"encoding/binary"
	"sync"
	"time"
)

const (
	maxKept  = 16      // answers of each kind
	maxFiles = 1 << 16 // of which closing is silent
	maxLocks = 4096
)

type answer struct {
	count uint64
	until time.Time
	data  []byte
}

// Relay is the guest's end of one mount. Requests and replies may be given by two
// goroutines at once. The zero value is ready.
type Relay struct {
	mu     sync.Mutex
	counts Counts
	attrs  map[uint64]answer // by node
	caps   map[uint64]answer
	reads  map[uint64]answer   // by open file
	silent map[uint64]struct{} // open files
	locked map[uint64]struct{} // nodes whose locks somebody had, or asked for
	many   bool                // more of them than are noted: any may have some
	reply  []byte
}

// Request takes a request of the kernel's. A reply is to be written to it, and is
// valid until the next call; forward says whether the request is to go to the
// host, and may have been changed for that.
func (r *Relay) Request(m []byte) (reply []byte, forward bool) {
	if len(m) < inHeader {
		return nil, true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	names, content := Changes(m)
	if names {
		r.counts.Names++
	}
	if content {
		r.counts.Content++
	}
	node, body := binary.NativeEndian.Uint64(m[offNode:]), m[inHeader:]
	switch binary.NativeEndian.Uint32(m[4:]) {
	case opGetAttr: // struct fuse_getattr_in: flags
		if a, ok := take(r.attrs, node, r.counts.Names); ok && len(body) >= 4 && binary.NativeEndian.Uint32(body) == 0 {
			r.counts.Content-- // the host does not see it
			return r.answer(m, 0, a.aged()), false
		}
	case opGetXAttr: // struct fuse_getxattr_in: size, padding; name
		if len(body) == 8+len(capability)+1 && string(body[8:8+len(capability)]) == capability {
			if _, ok := take(r.caps, node, r.counts.Names); ok {
				return r.answer(m, enodata, nil), false
			}
		}
	case opRead: // struct fuse_read_in: file, offset, size
		if len(body) < 20 || binary.NativeEndian.Uint64(body[8:]) != 0 {
			break
		}
		if a, ok := take(r.reads, binary.NativeEndian.Uint64(body), r.counts.Content); ok {
			return r.answer(m, 0, a.data[:min(len(a.data), int(binary.NativeEndian.Uint32(body[16:])))]), false
		}
	case opGetLk, opSetLk, opSetLkw: // the host keeps something of each
		if r.locked == nil {
			r.locked = map[uint64]struct{}{}
		}
		if r.many = r.many || len(r.locked) >= maxLocks; !r.many {
			r.locked[node] = struct{}{}
		}
	case opFlush: // struct fuse_flush_in: file
		if len(body) < 8 {
			break
		}
		_, silent := r.silent[binary.NativeEndian.Uint64(body)]
		if _, locked := r.locked[node]; silent && !locked && !r.many {
			return r.answer(m, 0, nil), false
		}
	case opRelease: // struct fuse_release_in: file. Nobody waits for it.
		if len(body) < 8 {
			break
		}
		file := binary.NativeEndian.Uint64(body)
		delete(r.silent, file)
		delete(r.reads, file)
		reply = r.answer(m, 0, nil)
		binary.NativeEndian.PutUint32(m[offPadding:], quiet)
		return reply, true
	}
	return nil, true
}

const enodata = 61

// answer makes a reply.
func (r *Relay) answer(m []byte, errno int32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(r.reply[:0], uint32(outHeader+len(body)))
	b = binary.NativeEndian.AppendUint32(b, uint32(-errno))
	b = append(b, m[offUnique:offUnique+8]...)
	r.reply = append(b, body...)
	return r.reply
}

// take uses an answer up.
func take(from map[uint64]answer, id, count uint64) (answer, bool) {
	a, ok := from[id]
	if !ok {
		return answer{}, false
	}
	delete(from, id)
	return a, a.count == count && time.Now().Before(a.until)
}

// aged is a struct fuse_attr_out that is valid for no longer than the answer.
func (a answer) aged() []byte {
	left := max(time.Until(a.until), 0)
	binary.NativeEndian.PutUint64(a.data, uint64(left/time.Second))
	binary.NativeEndian.PutUint32(a.data[8:], uint32(left%time.Second))
	return a.data
}

// Reply takes a message of the host's, and says whether it is the kernel's.
func (r *Relay) Reply(m []byte) bool {
	if len(m) < outHeader || binary.NativeEndian.Uint64(m[offUnique:]) != 0 || int32(binary.NativeEndian.Uint32(m[offError:])) != told {
		return true
	}
	if len(m) < record {
		return false
	}
	kind, count, id, payload := binary.NativeEndian.Uint32(m[outHeader:]), binary.NativeEndian.Uint64(m[outHeader+8:]), binary.NativeEndian.Uint64(m[outHeader+16:]), m[record:]
	r.mu.Lock()
	defer r.mu.Unlock()
	keep := func(in *map[uint64]answer, now uint64, valid time.Duration, data []byte) {
		if count != now {
			return
		}
		if *in == nil || len(*in) >= maxKept {
			*in = map[uint64]answer{}
		}
		(*in)[id] = answer{count, time.Now().Add(valid), append([]byte(nil), data...)}
	}
	switch {
	case kind == kindAttr && len(payload) == attrOut:
		valid := time.Duration(binary.NativeEndian.Uint64(payload))*time.Second + time.Duration(binary.NativeEndian.Uint32(payload[8:]))
		keep(&r.attrs, r.counts.Names, valid, payload)
	case kind == kindCaps && len(payload) == 8:
		keep(&r.caps, r.counts.Names, time.Duration(binary.NativeEndian.Uint64(payload)), nil)
	case kind == kindRead && len(payload) >= 8:
		keep(&r.reads, r.counts.Content, time.Duration(binary.NativeEndian.Uint64(payload)), payload[8:])
	case kind == kindClose:
		if r.silent == nil {
			r.silent = map[uint64]struct{}{}
		}
		if len(r.silent) < maxFiles {
			r.silent[id] = struct{}{}
		}
	}
	return false
}
