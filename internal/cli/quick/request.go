package quick

import (
	"tenon.dev/tenon/client/runproto"
	"tenon.dev/tenon/internal/version"
)

// request is the bytes of an HTTP request. The head ends where the body begins,
// so that its length is known when it is written.
type request struct {
	buf        [64 << 10]byte
	start, end int
	bad        bool // does not fit, or cannot be written as JSON as it is
}

// theRequest is static: it is too large for a stack, and there is no heap.
var theRequest request

// headRoom is the space for the head.
const headRoom = 1 << 10

func (r *request) bytes() []byte { return r.buf[r.start:r.end] }

// make writes the request that c stands for and tells whether it can be written.
func (r *request) make(c *command) bool {
	r.start, r.end, r.bad = headRoom, headRoom, false
	if c.exec {
		r.execBody(c)
	} else {
		r.runBody(c)
	}
	end, body := r.end, r.end-headRoom
	// The head is written to the front first, to see how long it is.
	r.end = 0
	r.add("POST ")
	if c.exec {
		r.add(runproto.ExecPath)
	} else {
		r.add(runproto.Path)
	}
	r.add(" HTTP/1.1\r\nHost: tenon\r\nUser-Agent: tenon/")
	r.add(version.Version)
	r.add("\r\nConnection: Upgrade\r\nContent-Length: ")
	r.number(body)
	r.add("\r\nContent-Type: application/json\r\nUpgrade: ")
	if c.exec {
		r.add(runproto.ExecUpgrade)
	} else {
		r.add(runproto.Upgrade)
	}
	r.add("\r\n\r\n")
	if r.bad || r.end > headRoom {
		return false
	}
	r.start = headRoom - r.end
	copy(r.buf[r.start:headRoom], r.buf[:r.end])
	r.end = end
	return true
}

// runBody is a runproto.Request. The image has to be there: a pull has progress
// and credentials.
func (r *request) runBody(c *command) {
	r.add(`{"pull":"never"`)
	r.field(`,"name":`, c.name)
	if c.detach {
		r.add(`,"detach":true`)
	} else {
		r.add(`,"attach":["stdout","stderr"]`)
	}
	r.add(`,"config":{"Image":`)
	r.quote(text(c.args[0]))
	if len(c.args) > 1 {
		r.add(`,"Cmd":`)
		r.list(c.args[1:])
	}
	if !c.detach {
		r.add(`,"AttachStdout":true,"AttachStderr":true`)
	}
	r.field(`,"Hostname":`, c.hostname)
	if c.hasEntrypoint {
		r.add(`,"Entrypoint":[`)
		r.quote(c.entrypoint)
		r.add(`]`)
	}
	r.common(c)
	r.add(`,"HostConfig":{"RestartPolicy":{"Name":"no"},"NetworkMode":`)
	if c.network == "" {
		r.add(`"default"`)
	} else {
		r.quote(c.network)
	}
	if c.autoRemove {
		r.add(`,"AutoRemove":true`)
	}
	if c.init {
		r.add(`,"Init":true`)
	}
	if c.privileged {
		r.add(`,"Privileged":true`)
	}
	r.add(`}}}`)
}

// execBody is a runproto.ExecRequest.
func (r *request) execBody(c *command) {
	r.add(`{"container":`)
	r.quote(text(c.args[0]))
	if c.detach {
		r.add(`,"detach":true`)
	}
	r.add(`,"config":{"Cmd":`)
	r.list(c.args[1:])
	if !c.detach {
		r.add(`,"AttachStdout":true,"AttachStderr":true`)
	}
	if c.privileged {
		r.add(`,"Privileged":true`)
	}
	r.common(c)
	r.add(`}}`)
}

// common is what both kinds of configuration have.
func (r *request) common(c *command) {
	r.field(`,"User":`, c.user)
	r.field(`,"WorkingDir":`, c.workdir)
	for i := 0; i < c.envs; i++ {
		if i == 0 {
			r.add(`,"Env":[`)
		} else {
			r.add(`,`)
		}
		r.quote(c.env[i])
	}
	if c.envs > 0 {
		r.add(`]`)
	}
}

// field adds key and value, unless the value is empty.
func (r *request) field(key, value string) {
	if value != "" {
		r.add(key)
		r.quote(value)
	}
}

func (r *request) list(words []*byte) {
	for i, p := range words {
		if i == 0 {
			r.add(`[`)
		} else {
			r.add(`,`)
		}
		r.quote(text(p))
	}
	r.add(`]`)
}

func (r *request) add(s string) {
	if len(s) > len(r.buf)-r.end {
		r.bad = true
		return
	}
	r.end += copy(r.buf[r.end:], s)
}

// quote adds s as a JSON string. Bytes that are not ASCII might not be UTF-8.
func (r *request) quote(s string) {
	const hex = "0123456789abcdef"
	if len(s) > (len(r.buf)-r.end-2)/6 { // as if each were escaped
		r.bad = true
		return
	}
	r.buf[r.end] = '"'
	r.end++
	for i := 0; i < len(s); i++ {
		switch b := s[i]; {
		case b >= 0x80:
			r.bad = true
			return
		case b < 0x20:
			r.end += copy(r.buf[r.end:], `\u00`)
			r.buf[r.end], r.buf[r.end+1] = hex[b>>4], hex[b&15]
			r.end += 2
		case b == '"' || b == '\\':
			r.buf[r.end], r.buf[r.end+1] = '\\', b
			r.end += 2
		default:
			r.buf[r.end] = b
			r.end++
		}
	}
	r.buf[r.end] = '"'
	r.end++
}

// number adds n, which is not negative.
func (r *request) number(n int) {
	var digits [20]byte
	i := len(digits)
	for {
		i--
		digits[i] = byte('0' + n%10)
		if n /= 10; n == 0 {
			break
		}
	}
	for ; i < len(digits); i++ {
		if r.end == len(r.buf) {
			r.bad = true
			return
		}
		r.buf[r.end] = digits[i]
		r.end++
	}
}
