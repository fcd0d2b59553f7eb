package quick

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/client/runproto"
)

const agreed = "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\n\r\n"

func frame(typ byte, payload string) string {
	var b bytes.Buffer
	_ = runproto.NewWriter(&b).Write(typ, []byte(payload)) // memory takes all
	return b.String()
}

// memory is a file without a name.
func memory(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("t", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	t.Cleanup(func() { f.Close() })
	return f
}

func contents(t testing.TB, f *os.File) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// drive lets s read stream in pieces of the sizes that size returns, and returns
// what it leaves.
func drive(s *session, stream string, size func() int) (ending, string) {
	s.conn, s.signals = -1, -1
	end := more
	for stream != "" && end == more && s.end < len(s.buf) {
		n := min(max(size(), 1), len(stream), len(s.buf)-s.end)
		s.end += copy(s.buf[s.end:], stream[:n])
		stream = stream[n:]
		end = s.feed()
	}
	if end == more { // talk sees the end of the stream, or a full buffer
		end = leave
	}
	if end != leave {
		return end, ""
	}
	var l leftover
	s.handOver(&l)
	return end, string(bytes.Join(l.parts[:], nil)) + stream
}

func TestFrames(t *testing.T) {
	const id = "0123abcd"
	created := frame(runproto.Created, `{"id":"`+id+`"}`)
	out, errs, exit := frame(runproto.Stdout, "out\n"), frame(runproto.Stderr, "err\n"), frame(runproto.Exit, `{"code":7}`)
	big := frame(runproto.Stdout, strings.Repeat("0123456789", 50000))
	for _, c := range []struct {
		name, stream string
		detach, exec bool
		want         ending
		code         int
		out, err     string
		left         string // behind the head
	}{
		{name: "a run", stream: agreed + created + out + errs + out + exit, want: done, code: 7, out: "out\nout\n", err: "err\n"},
		{name: "a large frame", stream: agreed + created + big + out + exit, want: done, code: 7, out: strings.Repeat("0123456789", 50000) + "out\n"},
		{name: "detached", stream: agreed + created + frame(runproto.Exit, `{"id":"`+id+`","code":0}`), detach: true, want: done, out: id + "\n"},
		{name: "detached exec", stream: agreed + frame(runproto.Exit, `{"id":"`+id+`","code":0}`), detach: true, exec: true, want: done},
		{name: "not detached", stream: agreed + exit, detach: true, want: leave, left: exit},
		{name: "no image", stream: agreed + frame(runproto.Error, `{"status":404,"message":"no","kind":"image"}`), want: again},
		{name: "an exec has no image", stream: agreed + frame(runproto.Error, `{"kind":"image"}`), exec: true, want: leave, left: frame(runproto.Error, `{"kind":"image"}`)},
		{name: "a message like no image", stream: agreed + frame(runproto.Error, `{"message":"\"kind\":\"image\""}`), want: leave, left: frame(runproto.Error, `{"message":"\"kind\":\"image\""}`)},
		{name: "a warning", stream: agreed + frame(runproto.Created, `{"id":"a","warnings":["b"]}`) + out, want: leave, left: frame(runproto.Created, `{"id":"a","warnings":["b"]}`) + out},
		{name: "an error", stream: agreed + created + out + frame(runproto.Error, `{}`), want: leave, out: "out\n", left: frame(runproto.Error, `{}`)},
		{name: "a wait that failed", stream: agreed + frame(runproto.Exit, `{"code":0,"error":"x"}`), want: leave, left: frame(runproto.Exit, `{"code":0,"error":"x"}`)},
		{name: "codes", stream: agreed + frame(runproto.Exit, `{"code":-1}`), want: leave, left: frame(runproto.Exit, `{"code":-1}`)},
		{name: "cut", stream: agreed + created + out[:10], want: leave, out: out[8:10], left: frame(runproto.Stdout, "xx")[:7] + "\x02"},
		{name: "cut in a header", stream: agreed + created + out + errs[:3], want: leave, out: "out\n", left: errs[:3]},
		{name: "a bad header", stream: agreed + "\x01\x01\x00\x00\x00\x00\x00\x00", want: leave, left: "\x01\x01\x00\x00\x00\x00\x00\x00"},
		{name: "an unknown frame", stream: agreed + frame(9, "x") + exit, want: leave, left: frame(9, "x") + exit},
	} {
		for _, size := range []int{1, 5, 100, 1 << 20} {
			s := &session{detach: c.detach, exec: c.exec}
			stdout, stderr := memory(t), memory(t)
			s.to = [3]int{runproto.Stdout: int(stdout.Fd()), runproto.Stderr: int(stderr.Fd())}
			got, left := drive(s, c.stream, func() int { return size })
			if got != c.want || s.code != c.code {
				t.Errorf("%s: ending %d, code %d", c.name, got, s.code)
			}
			if o, e := contents(t, stdout), contents(t, stderr); o != c.out || e != c.err {
				t.Errorf("%s, %d bytes at a time: %.100q, %.100q", c.name, size, o, e)
			}
			if got == leave && left != agreed+c.left {
				t.Errorf("%s, %d bytes at a time: left %q", c.name, size, left)
			}
		}
	}
	for _, head := range []string{"HTTP/1.1 404 Not Found\r\n\r\n{}", "HTTP/1.1 101 ", "HTTP", "x", "HTTP/1.1 101 " + strings.Repeat("x", 9000)} {
		if got, left := drive(new(session), head, func() int { return 3 }); got != leave || left != head {
			t.Errorf("%.20s: ending %d, left %q", head, got, left)
		}
	}
}

// TestWriteFails: what cannot be written is handed over, in front of the rest.
func TestWriteFails(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, size := range []int{1, 60, 1 << 20} {
		s := &session{to: [3]int{1: int(full.Fd()), 2: int(full.Fd())}}
		stream := agreed + frame(runproto.Stdout, "abc") + frame(runproto.Stdout, "def") + frame(runproto.Stderr, "ghi") + frame(runproto.Exit, `{"code":0}`)
		end, left := drive(s, stream, func() int { return size })
		o, e, rest := flatten(t, strings.TrimPrefix(left, agreed))
		if end != leave || o != "abcdef" || e != "ghi" || rest != string([]byte{runproto.Exit})+`{"code":0}` {
			t.Errorf("ending %d, %q %q %q", end, o, e, rest)
		}
	}
}

// flatten returns the streams and everything else of some frames, up to an exit
// or the first that is no frame.
func flatten(t testing.TB, frames string) (out, errs, rest string) {
	r := runproto.NewReader(strings.NewReader(frames))
	for {
		typ, p, err := r.Next()
		if err != nil {
			return out, errs, rest
		}
		switch typ {
		case runproto.Stdout:
			out += string(p)
		case runproto.Stderr:
			errs += string(p)
		default:
			rest += string([]byte{typ}) + string(p)
			if typ == runproto.Exit {
				return out, errs, rest
			}
		}
	}
}

// FuzzFrames: whatever comes in whatever pieces, what was written and what is
// left are together what came.
func FuzzFrames(f *testing.F) {
	f.Add(frame(runproto.Created, `{"id":"a"}`)+frame(runproto.Stdout, "a")+frame(runproto.Stderr, "b")+frame(runproto.Exit, `{"code":1}`), uint64(1))
	f.Add(frame(runproto.Stdout, strings.Repeat("x", 100000))+frame(runproto.Error, `{"message":"m"}`), uint64(2))
	f.Add(frame(runproto.Stdout, "")+frame(runproto.Stderr, ""), uint64(3))
	f.Fuzz(func(t *testing.T, frames string, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 0))
		largest := 1 << rng.IntN(18)
		stdout, stderr := memory(t), memory(t)
		defer stdout.Close()
		defer stderr.Close()
		s := &session{to: [3]int{1: int(stdout.Fd()), 2: int(stderr.Fd())}}
		end, left := drive(s, agreed+frames, func() int { return rng.IntN(largest) })
		o, e, rest := flatten(t, strings.TrimPrefix(left, agreed))
		o, e = contents(t, stdout)+o, contents(t, stderr)+e
		wantOut, wantErr, wantRest := flatten(t, frames)
		if end == again {
			return
		}
		// A frame that is cut off is written as far as it came.
		if !strings.HasPrefix(o, wantOut) || !strings.HasPrefix(e, wantErr) || end == done && (o != wantOut || e != wantErr) {
			t.Errorf("ending %d: %q %q, want %q %q", end, o, e, wantOut, wantErr)
		}
		if end == leave && !strings.HasSuffix(wantRest, rest) {
			t.Errorf("left %q, of %q", rest, wantRest)
		}
	})
}
