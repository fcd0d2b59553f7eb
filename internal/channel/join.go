package channel

import "io"

// Join carries bytes between two connections, each way until its end, and closes both.
func Join(a, b Conn) {
	one := make(chan struct{})
	carry := func(to, from Conn) {
		if _, err := io.Copy(to, from); err != nil || to.CloseWrite() != nil {
			a.Close() // one of them is gone
			b.Close()
		}
	}
	go func() {
		defer close(one)
		carry(a, b)
	}()
	carry(b, a)
	<-one
	a.Close()
	b.Close()
}
