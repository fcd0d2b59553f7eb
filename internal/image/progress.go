package image

import "sync"

// serial makes the calls of a ProgressFunc one at a time.
func serial(f ProgressFunc) ProgressFunc {
	if f == nil {
		return nil
	}
	var mu sync.Mutex
	return func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		f(p)
	}
}

func (f ProgressFunc) say(p Progress) {
	if f != nil {
		f(p)
	}
}
