package cli

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"

	"github.com/docker/go-units"
)

// list is a flag that may be given several times; unlike pflag's string
// slices it does not split at commas.
type list []string

func (l *list) Set(s string) error { *l = append(*l, s); return nil }
func (l *list) Type() string       { return "list" }
func (l *list) String() string {
	if len(*l) == 0 {
		return ""
	}
	return fmt.Sprint([]string(*l))
}

// namedList is a list with another name in the help text.
type namedList struct {
	*list
	typ string
}

func (l namedList) Type() string { return l.typ }

// mapping is a list of key=value.
type mapping map[string]string

func (m mapping) Set(s string) error {
	k, v, _ := strings.Cut(s, "=")
	if k == "" {
		return fmt.Errorf("%q has no key", s)
	}
	m[k] = v
	return nil
}
func (m mapping) Type() string   { return "map" }
func (m mapping) String() string { return "" }

// bytesValue is a size: 512m, 2g, -1.
type bytesValue int64

func (b *bytesValue) Set(s string) error {
	if s == "-1" {
		*b = -1
		return nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil {
		return err
	}
	*b = bytesValue(n)
	return nil
}
func (b *bytesValue) Type() string { return "bytes" }
func (b *bytesValue) String() string {
	if *b == 0 {
		return ""
	}
	return strconv.FormatInt(int64(*b), 10)
}

// cpusValue is a decimal number of CPUs, kept in billionths.
type cpusValue int64

func (c *cpusValue) Set(s string) error {
	r, ok := new(big.Rat).SetString(s)
	if !ok {
		return fmt.Errorf("failed to parse %v as a rational number", s)
	}
	nano := r.Mul(r, big.NewRat(1e9, 1))
	if !nano.IsInt() || !nano.Num().IsInt64() {
		return fmt.Errorf("value is too precise")
	}
	*c = cpusValue(nano.Num().Int64())
	return nil
}
func (c *cpusValue) Type() string { return "decimal" }
func (c *cpusValue) String() string {
	if *c == 0 {
		return ""
	}
	return new(big.Rat).SetFrac64(int64(*c), 1e9).FloatString(3)
}

// ulimitValue collects ulimits (name=soft[:hard]).
type ulimitValue []*units.Ulimit

func (u *ulimitValue) Set(s string) error {
	l, err := units.ParseUlimit(s)
	if err != nil {
		return err
	}
	for i, old := range *u {
		if old.Name == l.Name {
			(*u)[i] = l
			return nil
		}
	}
	*u = append(*u, l)
	return nil
}
func (u *ulimitValue) Type() string   { return "ulimit" }
func (u *ulimitValue) String() string { return "" }

// choice is a string that must be one of a few.
type choice struct {
	value   string
	allowed []string
	typ     string
}

func (c *choice) Set(s string) error {
	for _, a := range c.allowed {
		if s == a {
			c.value = s
			return nil
		}
	}
	return fmt.Errorf("want one of %s", strings.Join(c.allowed, ", "))
}
func (c *choice) Type() string {
	if c.typ != "" {
		return c.typ
	}
	return "string"
}
func (c *choice) String() string { return c.value }
