package qemu

import (
	"slices"
	"time"
)

func rdtsc() uint64

// TSCkHz measures the rate of the host's time-stamp counter, which an emulated
// guest's runs at too. It takes 30 ms.
func TSCkHz() int {
	var rates []int
	for range 3 {
		// Reading the clock between two readings of the counter bounds what an
		// interruption can spoil.
		read := func() (t time.Time, c uint64) {
			best := ^uint64(0)
			for range 20 {
				a := rdtsc()
				now := time.Now()
				if b := rdtsc(); b-a < best {
					best, t, c = b-a, now, a+(b-a)/2
				}
			}
			return t, c
		}
		t0, c0 := read()
		time.Sleep(10 * time.Millisecond)
		t1, c1 := read()
		if d := t1.Sub(t0); d > 0 {
			rates = append(rates, int(float64(c1-c0)/d.Seconds()/1000+0.5))
		}
	}
	slices.Sort(rates)
	return rates[len(rates)/2]
}
