package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Case is one line of a table: a request to an Env, measured several times.
type Case struct {
	Name    string
	Env     *Env
	Request func(i int) Request
	Before  func(i int) error // not measured
	After   func(i int) error // not measured
	Err     error             // it cannot be measured, and why
	Whole   bool              // the processor time is that of all in the Env, until the command's end
}

// measure runs the cases interleaved (A B C A B C …), after warm-up rounds,
// and prints medians; the processor time is that of one command, as agent.go
// counts it. Ratios are to the case named base.
func (b *Bench) measure(base string, warm, n int, cases []*Case) {
	times := make([][]time.Duration, len(cases))
	cpu := make([][]time.Duration, len(cases))
	for round := range warm + n {
		for i, c := range cases {
			if c.Err != nil {
				continue
			}
			d, used, err := c.once(round)
			if err != nil {
				c.Err = err
			} else if round >= warm {
				times[i], cpu[i] = append(times[i], d), append(cpu[i], used)
			}
		}
	}
	var baseline time.Duration
	for i, c := range cases {
		if c.Name == base && c.Err == nil {
			baseline = quantile(times[i], 0.5)
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	whose, least := "command's CPU", time.Duration(0)
	for i, c := range cases {
		if c.Whole {
			whose = "CPU of all\tratio"
		}
		if c.Name == base && c.Whole {
			least = quantile(cpu[i], 0.5)
		}
	}
	fmt.Fprintf(w, "\tmedian\tp10\tp90\tratio to %s\t%s\t\n", base, whose)
	for i, c := range cases {
		if c.Err != nil {
			fmt.Fprintf(w, "%s\t–\t\t\t\t\t\n", c.Name)
			continue
		}
		ratio := "–"
		if baseline > 0 {
			ratio = fmt.Sprintf("%.2f", float64(quantile(times[i], 0.5))/float64(baseline))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t", c.Name,
			ms(quantile(times[i], 0.5)), ms(quantile(times[i], 0.1)), ms(quantile(times[i], 0.9)), ratio, ms(quantile(cpu[i], 0.5)))
		if least > 0 {
			fmt.Fprintf(w, "%.2f\t", float64(quantile(cpu[i], 0.5))/float64(least))
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	for _, c := range cases {
		if c.Err != nil {
			fmt.Printf("  %s: %s\n", c.Name, strings.TrimSpace(c.Err.Error()))
		}
	}
	fmt.Println()
}

func (c *Case) once(i int) (elapsed, cpu time.Duration, err error) {
	if c.Before != nil {
		if err := c.Before(i); err != nil {
			return 0, 0, err
		}
	}
	r := c.Request(i)
	r.First = i * max(r.Count, 1)
	before := c.Env.cpu()
	res, err := c.Env.must(r)
	if c.Whole {
		res.CPUNS = (c.Env.cpu() - before).Nanoseconds()
	}
	if c.After != nil {
		if aerr := c.After(i); err == nil {
			err = aerr
		}
	}
	return res.Elapsed(), time.Duration(res.CPUNS) / time.Duration(max(r.Count, 1)), err
}

func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(d))
	return s[int(q*float64(len(s)-1)+0.5)]
}

func ms(d time.Duration) string {
	if d > 10*time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}
