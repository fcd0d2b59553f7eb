package ahead

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"
)

var unique uint64

// request is a message of the kernel's.
func request(op uint32, node uint64, body ...uint64) []byte {
	unique += 2
	m := make([]byte, inHeader, inHeader+64)
	binary.NativeEndian.PutUint32(m[4:], op)
	binary.NativeEndian.PutUint64(m[offUnique:], unique)
	binary.NativeEndian.PutUint64(m[offNode:], node)
	for _, v := range body {
		m = binary.NativeEndian.AppendUint64(m, v)
	}
	binary.NativeEndian.PutUint32(m, uint32(len(m)))
	return m
}

func caps(node uint64) []byte {
	return append(append(request(opGetXAttr, node, 0), capability...), 0)
}

// ask gives the body of an answer that the relay has, and its errno.
func ask(t *testing.T, r *Relay, m []byte) (body []byte, errno int32, ok bool) {
	t.Helper()
	reply, forward := r.Request(m)
	if forward == (reply != nil) && binary.NativeEndian.Uint32(m[4:]) != opRelease {
		t.Fatalf("forward %v, reply %x", forward, reply)
	}
	if reply == nil {
		return nil, 0, false
	}
	if int(binary.NativeEndian.Uint32(reply)) != len(reply) || !bytes.Equal(reply[offUnique:outHeader], m[offUnique:offUnique+8]) {
		t.Fatalf("%x", reply)
	}
	return reply[outHeader:], -int32(binary.NativeEndian.Uint32(reply[offError:])), true
}

func tell(t *testing.T, r *Relay, record []byte) {
	t.Helper()
	if r.Reply(record) {
		t.Fatal("a record is not the kernel's")
	}
}

func attr(valid time.Duration) []byte {
	b := make([]byte, attrOut)
	binary.NativeEndian.PutUint64(b, uint64(valid/time.Second))
	binary.NativeEndian.PutUint32(b[8:], uint32(valid%time.Second))
	b[50] = 7
	return b
}

func TestAttributes(t *testing.T) {
	var r Relay
	if _, _, ok := ask(t, &r, request(opGetAttr, 5, 0, 0)); ok {
		t.Error("an answer out of nothing")
	}
	tell(t, &r, AppendAttr(nil, Counts{}, 5, attr(time.Hour)))
	if _, _, ok := ask(t, &r, request(opGetAttr, 6, 0, 0)); ok {
		t.Error("another node's")
	}
	b, errno, ok := ask(t, &r, request(opGetAttr, 5, 0, 0))
	if !ok || errno != 0 || len(b) != attrOut || b[50] != 7 || binary.NativeEndian.Uint64(b) != 3599 {
		t.Errorf("%v %v %x", ok, errno, b)
	}
	if _, _, ok := ask(t, &r, request(opGetAttr, 5, 0, 0)); ok {
		t.Error("used twice")
	}
	// What is written elsewhere changes no directory; what is made does.
	tell(t, &r, AppendAttr(nil, Counts{}, 5, attr(time.Hour)))
	_, _ = r.Request(request(opWrite, 9, 0))
	if _, _, ok := ask(t, &r, request(opGetAttr, 5, 0, 0)); !ok {
		t.Error("lost by a write")
	}
	tell(t, &r, AppendAttr(nil, Counts{}, 5, attr(time.Hour)))
	_, _ = r.Request(request(opCreate, 5, 0))
	if _, _, ok := ask(t, &r, request(opGetAttr, 5, 0, 0)); ok {
		t.Error("older than a change")
	}
	tell(t, &r, AppendAttr(nil, Counts{}, 5, attr(time.Hour))) // told before that change was read
	if _, _, ok := ask(t, &r, request(opGetAttr, 5, 0, 0)); ok {
		t.Error("told too late")
	}
	tell(t, &r, AppendAttr(nil, Counts{Names: 1}, 5, attr(0)))
	if _, _, ok := ask(t, &r, request(opGetAttr, 5, 0, 0)); ok {
		t.Error("out of date")
	}
}

func TestCapabilities(t *testing.T) {
	var r Relay
	tell(t, &r, AppendNoCaps(nil, Counts{}, 5, time.Hour))
	other := append(append(request(opGetXAttr, 5, 0), "security.capabilitz"...), 0)
	if _, _, ok := ask(t, &r, other); ok {
		t.Error("another attribute")
	}
	if _, errno, ok := ask(t, &r, caps(5)); !ok || errno != enodata {
		t.Error(ok, errno)
	}
	tell(t, &r, AppendNoCaps(nil, Counts{}, 5, time.Hour))
	_, _ = r.Request(request(21, 5, 0)) // SETXATTR
	if _, _, ok := ask(t, &r, caps(5)); ok {
		t.Error("they were set meanwhile")
	}
}

func TestContent(t *testing.T) {
	var r Relay
	read := func(file, offset, size uint64) []byte { return request(opRead, 5, file, offset, size) }
	tell(t, &r, AppendContent(nil, Counts{}, 1, time.Hour, []byte("content")))
	if _, _, ok := ask(t, &r, read(1, 3, 4096)); ok {
		t.Error("not from the beginning")
	}
	if b, _, ok := ask(t, &r, read(1, 0, 4096)); !ok || string(b) != "content" {
		t.Errorf("%v %q", ok, b)
	}
	tell(t, &r, AppendContent(nil, Counts{}, 1, time.Hour, []byte("content")))
	if b, _, ok := ask(t, &r, read(1, 0, 4)); !ok || string(b) != "cont" {
		t.Errorf("%v %q", ok, b)
	}
	for what, change := range map[string][]byte{"write": request(opWrite, 5, 0), "lock": request(opSetLkw, 5, 0), "truncation": request(opOpen, 5, truncates), "size": request(opSetAttr, 5, 0),
		"look": request(opLookup, 1), "question": request(opGetAttr, 5, 0, 0), "list": request(opReadDirPlus, 1, 0, 0, 0)} {
		tell(t, &r, AppendContent(nil, r.counts, 1, time.Hour, []byte("content")))
		_, _ = r.Request(change)
		if _, _, ok := ask(t, &r, read(1, 0, 4096)); ok {
			t.Error("older than a", what)
		}
	}
	tell(t, &r, AppendContent(nil, r.counts, 1, time.Hour, []byte("content")))
	_, _ = r.Request(request(opOpen, 6, 0))
	if _, _, ok := ask(t, &r, read(1, 0, 4096)); !ok {
		t.Error("lost by an opening")
	}
	// A question that the host does not get leaves both ends with the same count.
	tell(t, &r, AppendAttr(nil, r.counts, 5, attr(time.Hour)))
	tell(t, &r, AppendContent(nil, r.counts, 1, time.Hour, []byte("content")))
	if _, _, ok := ask(t, &r, request(opGetAttr, 5, 0, 0)); !ok {
		t.Error("no attributes")
	}
	if _, _, ok := ask(t, &r, read(1, 0, 4096)); !ok {
		t.Error("lost by a question that went nowhere")
	}
}

func TestClosing(t *testing.T) {
	var r Relay
	flush := func(node, file uint64) []byte { return request(opFlush, node, file, 0, 0) }
	if _, _, ok := ask(t, &r, flush(5, 1)); ok {
		t.Error("nobody said so")
	}
	tell(t, &r, AppendSilentClose(nil, 1))
	tell(t, &r, AppendSilentClose(nil, 2))
	for range 2 { // of duplicates, too
		if _, errno, ok := ask(t, &r, flush(5, 1)); !ok || errno != 0 {
			t.Error(ok, errno)
		}
	}
	_, _ = r.Request(request(opSetLk, 5, 9)) // by any file of that node
	if _, _, ok := ask(t, &r, flush(5, 1)); ok {
		t.Error("locks would stay")
	}
	if _, _, ok := ask(t, &r, flush(6, 2)); !ok {
		t.Error("another file has no locks")
	}
	tell(t, &r, AppendSilentClose(nil, 3))
	_, _ = r.Request(request(opGetLk, 7, 9))
	if _, _, ok := ask(t, &r, flush(7, 3)); ok {
		t.Error("what the host keeps of a question would stay")
	}
	m := request(opRelease, 6, 2, 0, 0)
	if _, errno, ok := ask(t, &r, m); !ok || errno != 0 {
		t.Error("nobody waits for it")
	}
	if !Quiet(m) || Quiet(m) {
		t.Error("the host answers it too")
	}
	if _, _, ok := ask(t, &r, flush(6, 2)); ok {
		t.Error("it is not open")
	}
	for node := range uint64(2 * maxLocks) { // bounded, and never wrong
		tell(t, &r, AppendSilentClose(nil, node))
		_, _ = r.Request(request(opSetLk, node, 9))
		if _, _, ok := ask(t, &r, flush(node, node)); ok {
			t.Fatal("locks would stay")
		}
	}
	if len(r.locked) > maxLocks {
		t.Error(len(r.locked))
	}
	tell(t, &r, AppendSilentClose(nil, 1))
	if _, _, ok := ask(t, &r, flush(1<<40, 1)); ok {
		t.Error("which have locks is not known any more")
	}
}

// FuzzRelay: whatever is sent, no message is lost or made up.
func FuzzRelay(f *testing.F) {
	f.Add(request(opGetAttr, 5, 0), AppendAttr(nil, Counts{}, 5, attr(time.Hour)))
	f.Add(caps(5), AppendNoCaps(nil, Counts{}, 5, time.Hour))
	f.Add(request(opRead, 5, 1, 0, 10), AppendContent(nil, Counts{}, 1, time.Hour, []byte("content")))
	f.Add(request(opFlush, 5, 1), AppendSilentClose(nil, 1))
	f.Add(request(opRelease, 5, 1), []byte{})
	f.Fuzz(func(t *testing.T, m, record []byte) {
		var r Relay
		r.Reply(record)
		reply, forward := r.Request(m)
		if reply == nil && !forward || reply != nil && (len(reply) < outHeader || int(binary.NativeEndian.Uint32(reply)) != len(reply)) {
			t.Errorf("%x %v", reply, forward)
		}
	})
}
