package cli

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// script writes a program.
func script(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFindCompose(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", filepath.Join(dir, "path"))
	packaged := []string{filepath.Join(dir, "packaged")}
	a, _ := testApp(t)
	a.config = filepath.Join(dir, "config")
	find := func(want, complaint string) {
		t.Helper()
		got, err := a.findCompose(t.Context(), packaged)
		if complaint != "" {
			if err == nil || !strings.Contains(err.Error(), complaint) || !strings.Contains(err.Error(), "install it") {
				t.Errorf("found %q, %v; want %q", got, err, complaint)
			}
			return
		}
		if err != nil || got != want {
			t.Errorf("found %q, %v; want %s", got, err, want)
		}
	}
	// From the last place to the first.
	find("", "nor docker-compose in PATH")
	inPath := filepath.Join(dir, "path/docker-compose")
	script(t, inPath, "echo 'No such command: docker-cli-plugin-metadata' >&2; exit 1")
	find("", inPath+" is not version 2")
	script(t, inPath, `[ "$1" = docker-cli-plugin-metadata ] && echo '{"SchemaVersion":"0.1.0","Version":"v5.5.1"}'`)
	find(inPath, "")
	find(script(t, filepath.Join(packaged[0], "docker-compose"), ""), "")
	extra := script(t, filepath.Join(dir, "extra/docker-compose"), "")
	if err := os.MkdirAll(filepath.Join(dir, "config"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config/config.json"), []byte(`{"cliPluginsExtraDirs":["`+filepath.Dir(extra)+`"]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	find(extra, "")
	own := script(t, filepath.Join(dir, "config/cli-plugins/docker-compose"), "")
	find(own, "")
	if err := os.Chmod(own, 0o644); err != nil {
		t.Fatal(err)
	}
	find(extra, "")
}

func TestComposeEnv(t *testing.T) {
	t.Setenv("TENON_HOST", "unix:///from/env")
	a, _ := testApp(t)
	a.host, a.config = "", ""
	env, err := a.composeEnv([]string{"DOCKER_HOST=unix:///other", "DOCKER_CONTEXT=remote", "A=b"})
	slices.Sort(env)
	if want := []string{"A=b", "DOCKER_HOST=unix:///from/env"}; err != nil || !slices.Equal(env, want) {
		t.Errorf("%v, %v; want %v", env, err, want)
	}
	a.host, a.config, a.tls = "tcp://h:1", "/c", true
	env, err = a.composeEnv([]string{"DOCKER_CONFIG=/d"})
	slices.Sort(env)
	if want := []string{"DOCKER_CONFIG=/c", "DOCKER_HOST=tcp://h:1", "DOCKER_TLS_VERIFY=1"}; err != nil || !slices.Equal(env, want) {
		t.Errorf("%v, %v; want %v", env, err, want)
	}
	a.host = "nonsense"
	if _, err := a.composeEnv(nil); err == nil {
		t.Error("an address that is none is taken")
	}
}
