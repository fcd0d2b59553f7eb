package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRemoveTree removes deep trees, and the rest of a removal that was cut off.
func TestRemoveTree(t *testing.T) {
	top := filepath.Join(t.TempDir(), "c")
	for _, d := range []string{"upper" + strings.Repeat("/a", 50), "upper/b/c/d/e", ".tenon-1/rest", ".tenon-3/rest", ".tenon-3/more/and/more"} {
		if err := os.MkdirAll(filepath.Join(top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"upper/b/c/file", ".tenon-2"} {
		if err := os.WriteFile(filepath.Join(top, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeTree(top); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(top); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	if err := removeTree(top); err != nil {
		t.Errorf("what is not there: %v", err)
	}
}
