package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
)

func TestPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(file, []byte("name = 'fromfile'\nroot = '/f'\n[log]\ndriver = 'json-file'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, _, err := FromArgs([]string{"--config", file, "--root", "/flag", "--host", "unix:///a", "--host", "unix:///b",
		"--default-address-pool", "base=10.9.0.0/16,size=26", "--default-address-pool", "base=fd00:1::/48,size=64"})
	if err != nil {
		t.Fatal(err)
	}
	c := p.Config
	if c.Name != "fromfile" || c.Root != "/flag" || c.Log.Driver != "json-file" || c.Log.MaxSize != "32m" {
		t.Errorf("got %+v", c)
	}
	if diff := cmp.Diff([]string{"unix:///a", "unix:///b"}, c.Hosts); diff != "" {
		t.Error(diff)
	}
	if c.Network.AddressPools[0].Size != 26 || c.Network.AddressPools6[0].Base != "fd00:1::/48" {
		t.Errorf("pools %+v", c.Network)
	}
}

func TestPrintedSettingsCanBeReadBack(t *testing.T) {
	p, _, err := FromArgs([]string{"--config", "/dev/null", "--name", "x1"})
	if err != nil {
		t.Fatal(err)
	}
	again := Default()
	if _, err := toml.Decode(p.Config.String(), again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p.Config.String(), again.String()); diff != "" {
		t.Error(diff)
	}
}

func TestRefused(t *testing.T) {
	for name, args := range map[string][]string{
		"name":      {"--name", "Much-Too-Long"},
		"tcp":       {"--host", "tcp://0.0.0.0:2375"},
		"scheme":    {"--host", "http://x"},
		"isolation": {"--default-isolation", "machine=A b"},
		"accel":     {"--accel", "xen"},
		"driver":    {"--log-driver", "carrier-pigeon"},
		"pool":      {"--default-address-pool", "base=10.0.0.0/16,size=8"},
		"same":      {"--root", "/x", "--run-root", "/x"},
		"argument":  {"serve"},
	} {
		if _, _, err := FromArgs(append([]string{"--config", "/dev/null"}, args...)); err == nil {
			t.Errorf("%s: %v accepted", name, args)
		}
	}
}

func TestMaxDiskSize(t *testing.T) {
	for size, ok := range map[string]bool{"0": true, "1g": true, "1t": true, "1025g": false, "2t": false, "-1": false, "x": false} {
		file := filepath.Join(t.TempDir(), "tenond.toml")
		if err := os.WriteFile(file, []byte("[limits]\nmax-disk-size = '"+size+"'\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := FromArgs([]string{"--config", file}); (err == nil) != ok {
			t.Errorf("%s: %v", size, err)
		}
	}
}

func TestFileErrorsSayWhere(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.toml")
	for text, want := range map[string]string{
		"nmae = 'x'":     "nmae is not a setting",
		"\n\nname = ":    "line 3",
		"[log]\nx = 'y'": "log.x",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := FromArgs([]string{"--config", file}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add("name = 'x'\n[runtimes.crun]\npath='/usr/bin/crun'")
	f.Fuzz(func(t *testing.T, text string) {
		c := Default()
		if _, err := toml.Decode(text, c); err == nil {
			_ = c.Validate() // must not panic
		}
	})
}

func TestPolicyOfImages(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.toml")
	for text, want := range map[string]string{
		"prefix = 'reg.lan/prod'\nrequire = 'signed'\nkeys = ['/k.pem']\nidentity = 'any'":                      "",
		"prefix = '*'\nrequire = 'reject'":                                                                      "",
		"prefix = 'debian'\nrequire = 'accept'":                                                                 "registry's host",
		"require = 'reject'":                                                                                    "prefix",
		"prefix = 'reg.lan'\nrequire = 'signed'":                                                                "signed by whom",
		"prefix = 'reg.lan'\nrequire = 'maybe'":                                                                 "use accept, reject or signed",
		"prefix = 'reg.lan'\nrequire = 'accept'\nkeys = ['/k.pem']":                                             "keys and identity",
		"prefix = 'reg.lan'\nrequire = 'signed'\nkeys = ['k.pem']":                                              "absolute",
		"prefix = 'reg.lan'\nrequire = 'accept'\n[[registries.policy]]\nprefix = 'reg.lan'\nrequire = 'reject'": "twice",
	} {
		if err := os.WriteFile(file, []byte("[[registries.policy]]\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		p, _, err := FromArgs([]string{"--config", file})
		if want != "" {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: got %v, want %q", text, err, want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		again := Default()
		if _, err := toml.Decode(p.Config.String(), again); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(p.Config.Registries.Policy, again.Registries.Policy); diff != "" {
			t.Errorf("printed and read again: %s", diff)
		}
	}
}
