package oci

import (
	"fmt"
	"strconv"
	"strings"
)

// flagSet parses a command line as runc and crun take it: --name value,
// --name=value, -n value, -n; booleans without value or with =true/false.
type flagSet struct {
	command string
	flags   []*flagDef
	args    []string // what is no flag
	inOrder bool     // the first argument that is no flag ends the flags
	any     bool     // unknown flags are let through
}

type flagDef struct {
	name, short, about string
	isBool             bool
	set                func(string) error
	given              bool
}

func newFlagSet(command string) *flagSet { return &flagSet{command: command} }

func (f *flagSet) add(name, short, about string, isBool bool, set func(string) error) {
	f.flags = append(f.flags, &flagDef{name: name, short: short, about: about, isBool: isBool, set: set})
}

// str adds a flag with a text value. about may begin with a default, which is
// set at once.
func (f *flagSet) str(to *string, name, value, about string) {
	*to = value
	f.add(name, "", about, false, func(s string) error { *to = s; return nil })
}

// short gives the flag that was added last a one-letter name.
func (f *flagSet) short(letter string) { f.flags[len(f.flags)-1].short = letter }

func (f *flagSet) boolean(to *bool, name, short, about string) {
	f.add(name, short, about, true, func(s string) (err error) { *to, err = strconv.ParseBool(s); return err })
}

func (f *flagSet) list(to *[]string, name, short, about string) {
	f.add(name, short, about, false, func(s string) error { *to = append(*to, s); return nil })
}

func (f *flagSet) number(to **int64, name, about string) {
	f.add(name, "", about, false, func(s string) error {
		n, err := parseBytes(s)
		if err != nil {
			return err
		}
		*to = &n
		return nil
	})
}

// given tells whether a flag was on the command line.
func (f *flagSet) given(name string) bool {
	for _, d := range f.flags {
		if d.name == name {
			return d.given
		}
	}
	return false
}

func (f *flagSet) find(name string, short bool) *flagDef {
	for _, d := range f.flags {
		if d.name == name || short && d.short == name && name != "" {
			return d
		}
	}
	return nil
}

func (f *flagSet) parse(args []string) error {
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			f.args = append(f.args, args[i+1:]...)
			return nil
		}
		if len(arg) < 2 || arg[0] != '-' || isNumber(arg[1:]) {
			if f.inOrder {
				f.args = append(f.args, args[i:]...)
				return nil
			}
			f.args = append(f.args, arg)
			continue
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(arg[1:], "-"), "=")
		d := f.find(name, true)
		if d == nil {
			if f.any {
				continue
			}
			return fmt.Errorf("%s: unknown flag %s", f.command, arg)
		}
		if !hasValue {
			if d.isBool {
				value = "true"
			} else {
				i++
				if i == len(args) {
					return fmt.Errorf("%s: flag %s needs a value", f.command, arg)
				}
				value = args[i]
			}
		}
		if err := d.set(value); err != nil {
			return fmt.Errorf("%s: flag %s: %w", f.command, arg, err)
		}
		d.given = true
	}
	return nil
}

func isNumber(s string) bool {
	_, err := strconv.Atoi(s)
	return err == nil
}

func (f *flagSet) usage() string {
	var b strings.Builder
	for _, d := range f.flags {
		name := "--" + d.name
		if d.short != "" {
			name = "-" + d.short + ", " + name
		}
		fmt.Fprintf(&b, "  %-28s %s\n", name, d.about)
	}
	return b.String()
}

// id is the container's name, the first argument.
func (f *flagSet) id() (string, error) {
	if len(f.args) == 0 {
		return "", fmt.Errorf("%s: no container named", f.command)
	}
	return f.args[0], checkID(f.args[0])
}

// parseBytes reads a size with an optional suffix k, m, g, t (powers of 1024).
func parseBytes(s string) (int64, error) {
	digits := strings.TrimRight(strings.ToLower(s), "ib")
	shift := 0
	if digits != "" {
		switch digits[len(digits)-1] {
		case 'k':
			shift = 10
		case 'm':
			shift = 20
		case 'g':
			shift = 30
		case 't':
			shift = 40
		}
	}
	if shift > 0 {
		digits = digits[:len(digits)-1]
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n<<shift>>shift != n {
		return 0, fmt.Errorf("%q is no number of bytes", s)
	}
	return n << shift, nil
}
