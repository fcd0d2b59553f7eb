package engine

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// failpoints are set by the environment variable TENON_FAILPOINT, a comma
// separated list of name:action, in tests of what happens when the daemon dies
// or a step fails there. Actions: "kill" ends this process by SIGKILL, "error"
// makes the step fail.
var failpoints = parseFailpoints(os.Getenv("TENON_FAILPOINT"))

func parseFailpoints(text string) map[string]string {
	if text == "" {
		return nil
	}
	m := map[string]string{}
	for _, f := range strings.Split(text, ",") {
		if name, action, ok := strings.Cut(f, ":"); ok {
			m[name] = action
		}
	}
	return m
}

func failpoint(name string) error {
	if failpoints == nil {
		return nil
	}
	switch failpoints[name] {
	case "kill":
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL) // does not return
		select {}
	case "error":
		return fmt.Errorf("failpoint %s", name)
	}
	return nil
}
