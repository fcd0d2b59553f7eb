package cli

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/client"
)

// testApp is an app that writes into a buffer.
func testApp(t *testing.T) (*app, *bytes.Buffer) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	var out bytes.Buffer
	return newApp(Env{In: strings.NewReader(""), Out: &out, Err: &out, Version: "test"}), &out
}

func TestListings(t *testing.T) {
	a, out := testApp(t)
	now := time.Now()
	ago := func(d time.Duration) int64 { return now.Add(-d).Unix() }
	ip := netip.MustParseAddr("0.0.0.0")
	list := []container.Summary{
		{
			ID: strings.Repeat("ab", 32), Names: []string{"/web", "/other/alias"}, Image: "nginx:1", Command: "nginx -g 'daemon off;' and more",
			Created: ago(2 * time.Hour), State: container.StateRunning, Status: "Up 2 hours", Labels: map[string]string{"com.x": "1", "a": "2"},
			Ports:  []container.PortSummary{{IP: ip, PrivatePort: 80, PublicPort: 8080, Type: "tcp"}, {IP: ip, PrivatePort: 81, PublicPort: 8081, Type: "tcp"}, {PrivatePort: 443, Type: "tcp"}},
			Mounts: []container.MountPoint{{Name: "data", Driver: "local"}, {Source: "/a/very/long/host/path"}}, SizeRw: 1234, SizeRootFs: 5_000_000,
		},
		{ID: strings.Repeat("cd", 32), Names: []string{"/job"}, Image: "sha256:" + strings.Repeat("1", 64), Command: "true", Created: ago(25 * time.Hour), State: container.StateExited, Status: "Exited (0) 1 day ago"},
	}
	images := []image.Summary{
		{ID: "sha256:" + strings.Repeat("e", 64), RepoTags: []string{"busybox:latest", "reg:5000/bb:1"}, RepoDigests: []string{"busybox@sha256:" + strings.Repeat("d", 64)}, Created: ago(time.Hour), Size: 1982000, SharedSize: -1, Containers: -1},
		{ID: "sha256:" + strings.Repeat("f", 64), Created: ago(48 * time.Hour), Size: 12_345_678, SharedSize: 1_000_000, Containers: 2},
	}
	show := func(title string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", title, err)
		}
	}
	run := func(title string, f func() error) {
		out.WriteString("== " + title + "\n")
		show(title, f())
	}
	run("ps", func() error { return a.printContainers(list, "", false, false, false) })
	run("ps -s", func() error { return a.printContainers(list, "table", false, false, true) })
	run("ps -q", func() error { return a.printContainers(list, "", true, false, false) })
	run("ps -q --no-trunc", func() error { return a.printContainers(list, "", true, true, false) })
	run("ps --format table", func() error {
		return a.printContainers(list, `table {{.Names}}\t{{.Mounts}}\t{{.Label "com.x"}}\t{{upper .Image}}`, false, false, false)
	})
	run("ps --format", func() error {
		return a.printContainers(list, `{{.Names}} {{.Labels}} {{.LocalVolumes}} {{.Size}} {{json .Names}} {{truncate .ID 3}}`, false, true, false)
	})
	run("ps, nothing", func() error { return a.printContainers(nil, "", false, false, false) })
	run("images", func() error { return a.printImages(images, "", false, false, false) })
	run("images --digests", func() error { return a.printImages(images, "", true, false, false) })
	run("images --format", func() error {
		return a.printImages(images, "{{.Repository}}:{{.Tag}} {{.Containers}} {{.SharedSize}} {{.UniqueSize}}", false, false, false)
	})
	got := strings.ReplaceAll(out.String(), "\u00a0", " ")
	golden(t, "listings.golden", []byte(got))

	out.Reset()
	if err := a.printContainers(list[:1], "json", false, false, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"ID":"abababababab"`, `"Names":"web"`, `"Ports":"0.0.0.0:8080-8081-\u003e80-81/tcp, 443/tcp"`, `"State":"running"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("JSON lacks %s:\n%s", want, out)
		}
	}
	if err := a.printContainers(list, "{{.Nope}}", false, false, false); err == nil {
		t.Error("an unknown field is no error")
	}
	if err := a.printContainers(list, "{{", false, false, false); err == nil {
		t.Error("a broken template is no error")
	}
}

func TestInspectTemplates(t *testing.T) {
	a, out := testApp(t)
	raw := `{"Id":"abc","Name":"/web","State":{"Status":"running","ExitCode":0},"New":{"Field":"<x>"},"NetworkSettings":{"Ports":{"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"8080"}]}}}`
	typed := &container.InspectResponse{ID: "abc", Name: "/web", State: &container.State{Status: "running"}, NetworkSettings: &container.NetworkSettings{
		Ports: network.PortMap{network.MustParsePort("80/tcp"): {{HostPort: "8080"}}},
	}}
	for _, x := range []struct{ format, want string }{
		{"{{.ID}} {{.Id}}", ""},
		{"{{.ID}}", "abc\n"},
		{"{{.Id}}", "abc\n"},
		{"{{.New.Field}}", "<x>\n"},
		{"{{json .New}}", `{"Field":"<x>"}` + "\n"},
		{"{{json .}}", raw + "\n"},
		{"json", "[" + raw + "]\n"},
		{"{{range $p, $c := .NetworkSettings.Ports}}{{$p}}={{(index $c 0).HostPort}}{{end}}", "80/tcp=8080\n"},
		{"{{.Nope}}", ""},
	} {
		out.Reset()
		err := a.printInspected([]inspected{{[]byte(raw), typed}}, x.format)
		if (err != nil) != (x.want == "") || out.String() != x.want {
			t.Errorf("%s: got %q, %v; want %q", x.format, out, err, x.want)
		}
	}
	out.Reset()
	if err := a.printInspected([]inspected{{[]byte(`{"A":"<>"}`), nil}, {[]byte(`{}`), nil}}, ""); err != nil {
		t.Fatal(err)
	}
	if want := "[\n    {\n        \"A\": \"<>\"\n    },\n    {}\n]\n"; out.String() != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

func TestDisplayPorts(t *testing.T) {
	v4, v6, lo := netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("::"), netip.MustParseAddr("127.0.0.1")
	p := func(ip netip.Addr, public, private uint16, proto string) container.PortSummary {
		return container.PortSummary{IP: ip, PublicPort: public, PrivatePort: private, Type: proto}
	}
	none := netip.Addr{}
	for _, x := range []struct {
		in   []container.PortSummary
		want string
	}{
		{nil, ""},
		{[]container.PortSummary{p(none, 0, 80, "tcp")}, "80/tcp"},
		{[]container.PortSummary{p(none, 0, 81, "tcp"), p(none, 0, 80, "tcp"), p(none, 0, 82, "udp")}, "80-81/tcp, 82/udp"},
		{[]container.PortSummary{p(v4, 8080, 80, "tcp"), p(v6, 8080, 80, "tcp")}, "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp"},
		{[]container.PortSummary{p(lo, 1, 1, "tcp"), p(lo, 2, 2, "tcp"), p(lo, 4, 3, "tcp")}, "127.0.0.1:1-2->1-2/tcp, 127.0.0.1:4->3/tcp"},
		{[]container.PortSummary{p(v4, 80, 80, "tcp"), p(v4, 81, 80, "tcp")}, "0.0.0.0:80->80/tcp, 0.0.0.0:81->80/tcp"},
	} {
		if got := displayPorts(x.in); got != x.want {
			t.Errorf("%v: got %q, want %q", x.in, got, x.want)
		}
	}
}

func TestProgress(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out, false)
	in := `{"status":"Pulling from library/busybox","id":"latest"}
{"status":"Pulling fs layer","progressDetail":{},"id":"abc"}
{"status":"Downloading","progressDetail":{"current":1,"total":4},"id":"abc"}
{"status":"Downloading","progressDetail":{"current":2,"total":4},"id":"abc"}
{"status":"Pull complete","progressDetail":{},"id":"abc"}
{"aux":{"Digest":"x"}}
{"stream":"Loaded image: busybox\n"}
{"status":"Status: done"}
{"errorDetail":{"message":"no space"},"error":"no space"}
`
	var aux string
	err := p.copy(strings.NewReader(in), func(m json.RawMessage) { aux = string(m) })
	if aux != `{"Digest":"x"}` {
		t.Errorf("got aux %s", aux)
	}
	if err == nil || err.Error() != "no space" {
		t.Errorf("got error %v", err)
	}
	want := "latest: Pulling from library/busybox\nabc: Pulling fs layer\nabc: Pull complete\nLoaded image: busybox\nStatus: done\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}

	out.Reset()
	p = newProgress(&out, false)
	p.tty = true
	for _, m := range []jsonstream.Message{{ID: "a", Status: "Waiting"}, {ID: "b", Status: "Waiting"}, {ID: "a", Status: "Done"}} {
		p.add(m)
	}
	if want := "\n\x1b[1A\x1b[2K\ra: Waiting\r\x1b[1B\n\x1b[1A\x1b[2K\rb: Waiting\r\x1b[1B\x1b[2A\x1b[2K\ra: Done\r\x1b[2B"; out.String() != want {
		t.Errorf("got %q", out.String())
	}

	now := time.Unix(1000, 0)
	for _, x := range []struct {
		p     jsonstream.Progress
		width int
		want  string
	}{
		{jsonstream.Progress{Current: 500}, 120, "     500B"},
		{jsonstream.Progress{Current: 50, Total: 100}, 80, "      50B/100B"},
		{jsonstream.Progress{Current: 50, Total: 100}, 120, " [=========================>                        ]      50B/100B"},
		{jsonstream.Progress{Current: 100, Total: 100}, 120, " [==================================================]     100B/100B"},
		{jsonstream.Progress{Current: 500, Total: 100}, 120, " [==================================================]     500B/100B"},
		{jsonstream.Progress{Current: 5, Total: 10, Units: "files"}, 80, "        5/10 files"},
		{jsonstream.Progress{Current: 50, Total: 100, Start: 990}, 80, "      50B/100B 10s"},
	} {
		if got := drawBar(&x.p, x.width, now); got != x.want {
			t.Errorf("%+v: got %q, want %q", x.p, got, x.want)
		}
	}
}

func TestDoctorReport(t *testing.T) {
	r := client.Report{Checks: []client.Check{
		{Name: "overlay", Status: "ok", Detail: "native diff"},
		{Name: "kvm", Status: "warn", Detail: "/dev/kvm is not there", Remedy: "Switch virtualisation on in the firmware;\nuntil then virtual machines are slow."},
		{Name: "nftables", Status: "missing", Detail: "the kernel has no nf_tables", Remedy: "modprobe nf_tables"},
	}}
	var b bytes.Buffer
	writeReport(&b, r, false)
	b.WriteString("--\n")
	writeReport(&b, client.Report{Checks: r.Checks[:2]}, true)
	b.WriteString("--\n")
	writeReport(&b, client.Report{Checks: r.Checks[:1]}, false)
	golden(t, "doctor.golden", b.Bytes())
}

func TestDiskUsage(t *testing.T) {
	for name, raw := range map[string]string{
		"before": `{"LayersSize":1000,"Images":[{"Containers":1,"Size":400,"SharedSize":0},{"Containers":0,"Size":600,"SharedSize":0}],"Containers":[{"State":"running","SizeRw":5},{"State":"exited","SizeRw":7}],"Volumes":[{"Name":"v","UsageData":{"RefCount":0,"Size":9}}]}`,
		"now":    `{"ImageUsage":{"TotalCount":2,"ActiveCount":1,"TotalSize":1000,"Reclaimable":600},"ContainerUsage":{"TotalCount":2,"ActiveCount":1,"TotalSize":12,"Reclaimable":7},"VolumeUsage":{"TotalCount":1,"TotalSize":9,"Reclaimable":9}}`,
	} {
		u, err := decodeUsage([]byte(raw))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range u.rows() {
			got = append(got, strings.Join([]string{r.Type(), r.TotalCount(), r.Active(), r.Size(), r.Reclaimable()}, " "))
		}
		want := []string{"Images 2 1 1kB 600B (60%)", "Containers 2 1 12B 7B (58%)", "Local Volumes 1 0 9B 9B (100%)", "Build Cache 0 0 0B 0B"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestStatsNumbers(t *testing.T) {
	var r statsRow
	if r.CPUPerc() != "--" || r.MemUsage() != "-- / --" || r.PIDs() != "--" {
		t.Errorf("a row without numbers: %+v", r)
	}
	r.take(&container.StatsResponse{
		CPUStats:    container.CPUStats{CPUUsage: container.CPUUsage{TotalUsage: 300}, SystemUsage: 2000, OnlineCPUs: 2},
		PreCPUStats: container.CPUStats{CPUUsage: container.CPUUsage{TotalUsage: 100}, SystemUsage: 1000},
		MemoryStats: container.MemoryStats{Usage: 3 << 20, Limit: 4 << 20, Stats: map[string]uint64{"inactive_file": 1 << 20}},
		Networks:    map[string]container.NetworkStats{"eth0": {RxBytes: 1000, TxBytes: 2000}, "eth1": {RxBytes: 1}},
		BlkioStats:  container.BlkioStats{IoServiceBytesRecursive: []container.BlkioStatEntry{{Op: "Read", Value: 10}, {Op: "write", Value: 20}}},
		PidsStats:   container.PidsStats{Current: 7},
	})
	got := []string{r.CPUPerc(), r.MemUsage(), r.MemPerc(), r.NetIO(), r.BlockIO(), r.PIDs()}
	if diff := cmp.Diff([]string{"40.00%", "2MiB / 4MiB", "50.00%", "1kB / 2kB", "10B / 20B", "7"}, got); diff != "" {
		t.Error(diff)
	}
}
