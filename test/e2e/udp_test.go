package e2e

import (
	"fmt"
	"net"
	"os"
	"testing"
	"time"
)

// TestMain lets this very program be a UDP echo server inside a container, and
// its client, since busybox has neither, and an attacker's tool (probe).
func TestMain(m *testing.M) {
	var err error
	switch {
	case os.Getenv("TENON_E2E_UDP") != "":
		err = udpServe(os.Getenv("TENON_E2E_UDP"))
	case os.Getenv("TENON_E2E_UDP_TO") != "":
		err = udpAsk(os.Getenv("TENON_E2E_UDP_TO"))
	case os.Getenv("TENON_E2E_PROBE") != "":
		err = probe(os.Getenv("TENON_E2E_PROBE"), os.Args[1:])
	default:
		code := m.Run()
		if err := dropTemplates(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		os.Exit(code)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func udpServe(addr string) error {
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo(append([]byte("echo "), buf[:n]...), from); err != nil {
			return err
		}
	}
}

func udpAsk(addr string) error {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("datagram")); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	buf := make([]byte, 1500)
	n, err := conn.Read(buf)
	if err != nil {
		return err
	}
	fmt.Println(string(buf[:n]))
	return nil
}
