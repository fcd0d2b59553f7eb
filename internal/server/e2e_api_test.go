package server

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// TestWaitHeader: docker run starts a container only after it has seen the
// header of wait.
func TestWaitHeader(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["sh","-c","exit 6"]}`)
	req, err := http.NewRequestWithContext(limited(t), "POST", "http://d/containers/"+id+"/wait?condition=next-exit", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := d.http.Do(req) // returns with the header
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	d.start(t, id)
	var res container.WaitResponse
	if err := json.NewDecoder(resp.Body).Decode(&res); err != nil || res.StatusCode != 6 || res.Error != nil {
		t.Errorf("got %+v %v", res, err)
	}
	if s, b := d.call(t, "POST", "/containers/nothing/wait", "", nil); s != 404 || !strings.Contains(b, "No such container: nothing") {
		t.Errorf("got %d %s", s, b)
	}
}

func TestNotModified(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["sleep","1000"]}`)
	d.start(t, id)
	if s, b := d.call(t, "POST", "/containers/"+id+"/start", "", nil); s != 304 || b != "" {
		t.Errorf("second start: %d %s", s, b)
	}
	if s, b := d.call(t, "POST", "/containers/"+id+"/stop?t=0", "", nil); s != 204 {
		t.Errorf("stop: %d %s", s, b)
	}
	if s, b := d.call(t, "POST", "/containers/"+id+"/stop", "", nil); s != 304 || b != "" {
		t.Errorf("second stop: %d %s", s, b)
	}
}

func TestLogsStream(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox","Cmd":["sh","-c","echo one; echo two >&2; sleep 1000"]}`)
	follow := func() *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(limited(t), "GET", "http://d/v1.50/containers/"+id+"/logs?stdout=1&stderr=1&follow=1", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := d.http.Do(req) // the header comes though there is no line yet
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	d.start(t, id)
	resp := follow()
	defer func() { _ = resp.Body.Close() }()
	if ct := resp.Header.Get("Content-Type"); ct != "application/vnd.docker.multiplexed-stream" {
		t.Errorf("content type %q", ct)
	}
	want := "\x01\x00\x00\x00\x00\x00\x00\x04one\n"
	b := make([]byte, len(want)+12)
	if _, err := io.ReadFull(resp.Body, b); err != nil || !strings.Contains(string(b), want) || !strings.Contains(string(b), "\x02\x00\x00\x00\x00\x00\x00\x04two\n") {
		t.Errorf("got %q %v", b, err)
	}
	if s, b := d.call(t, "POST", "/containers/"+id+"/kill", "", nil); s != 204 {
		t.Errorf("kill: %d %s", s, b)
	}
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) != 0 {
		t.Errorf("after the end: %q %v", rest, err)
	}
	if s, b := d.call(t, "GET", "/containers/"+id+"/logs?stdout=1&tail=1&since=17e9", "", nil); s != 400 {
		t.Errorf("bad since: %d %s", s, b)
	}
	if s, b := d.call(t, "GET", "/containers/nothing/logs?stdout=1", "", nil); s != 404 {
		t.Errorf("no container: %d %s", s, b)
	}
}

func TestEvents(t *testing.T) {
	d := sharedDaemon(t)
	since := time.Now().Add(-time.Second).Unix()
	id := d.create(t, `{"Image":"busybox","Cmd":["true"]}`)
	d.start(t, id)
	d.wait(t, id)
	read := func(version, accept string, n int) []string {
		t.Helper()
		req, err := http.NewRequestWithContext(limited(t), "GET", "http://d"+version+"/events?since="+
			time.Unix(since, 0).Format(time.RFC3339)+`&filters={"container":{"`+id+`":true}}`, nil)
		if err != nil {
			t.Fatal(err)
		}
		if accept != "" {
			req.Header.Set("Accept", accept)
		}
		resp, err := d.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		br := bufio.NewReader(resp.Body)
		lines := []string{resp.Header.Get("Content-Type")}
		for range n {
			l, err := br.ReadString('\n')
			if err != nil {
				t.Fatalf("%v after %q", err, lines)
			}
			lines = append(lines, l)
		}
		return lines
	}
	got := read("/v1.50", "", 3)
	if got[0] != "application/json" || !strings.Contains(got[1], `"status":"create","id":"`+id) || !strings.Contains(got[1], `"from":"busybox`) {
		t.Errorf("1.50: %q", got)
	}
	got = read("/v1.56", "", 3)
	if got[0] != "application/jsonl" || strings.Contains(got[1], `"status"`) || !strings.Contains(got[1], `"Action":"create"`) {
		t.Errorf("1.56: %q", got)
	}
	if got = read("", "application/json-seq", 2); got[0] != "application/json-seq" || !strings.HasPrefix(got[1], "\x1e{") {
		t.Errorf("json-seq: %q", got)
	}
	if s, b := d.call(t, "GET", "/events?since=20&until=10", "", nil); s != 400 {
		t.Errorf("until before since: %d %s", s, b)
	}
}

func TestArchive(t *testing.T) {
	d := sharedDaemon(t)
	id := d.create(t, `{"Image":"busybox"}`)
	var plain bytes.Buffer
	tw := tar.NewWriter(&plain)
	_ = tw.WriteHeader(&tar.Header{Name: "f", Mode: 0o640, Size: 5, Typeflag: tar.TypeReg})
	_, _ = tw.Write([]byte("hello"))
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	var gz, zs bytes.Buffer
	gw := gzip.NewWriter(&gz)
	_, _ = gw.Write(plain.Bytes())
	_ = gw.Close()
	zw, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = zw.Write(plain.Bytes())
	_ = zw.Close()
	for name, body := range map[string]*bytes.Buffer{"plain": &plain, "gzip": &gz, "zstd": &zs} {
		if s, b := d.call(t, "PUT", "/containers/"+id+"/archive?path=/tmp", body.String(), nil); s != 200 {
			t.Fatalf("%s: put: %d %s", name, s, b)
		}
		req, err := http.NewRequestWithContext(limited(t), "HEAD", "http://d/containers/"+id+"/archive?path=/tmp/f", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := d.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var st container.PathStat
		raw, err := base64.StdEncoding.DecodeString(resp.Header.Get("X-Docker-Container-Path-Stat"))
		if err == nil {
			err = json.Unmarshal(raw, &st)
		}
		if err != nil || st.Name != "f" || st.Size != 5 || st.Mode.Perm() != 0o640 {
			t.Errorf("%s: stat %+v %v", name, st, err)
		}
		_, b := d.call(t, "GET", "/containers/"+id+"/archive?path=/tmp/f", "", nil)
		tr := tar.NewReader(strings.NewReader(b))
		h, err := tr.Next()
		if err != nil || h.Name != "f" {
			t.Fatalf("%s: get: %+v %v", name, h, err)
		}
		if content, err := io.ReadAll(tr); err != nil || string(content) != "hello" {
			t.Errorf("%s: got %q %v", name, content, err)
		}
	}
	for path, want := range map[string]int{
		"/containers/" + id + "/archive?path=/nothing": 404,
		"/containers/nothing/archive?path=/tmp":        404,
		"/containers/" + id + "/archive":               400,
	} {
		if s, b := d.call(t, "GET", path, "", nil); s != want {
			t.Errorf("%s: %d %s", path, s, b)
		}
	}
	if s, b := d.call(t, "PUT", "/containers/"+id+"/archive?path=/nothing", plain.String(), nil); s != 404 {
		t.Errorf("put to nothing: %d %s", s, b)
	}
	if s, b := d.call(t, "PUT", "/containers/"+id+"/archive?path=/tmp", "\xfd7zXZ\x00junk", nil); s != 400 || !strings.Contains(b, "xz") {
		t.Errorf("xz: %d %s", s, b)
	}
}

func TestDiskUsage(t *testing.T) {
	d := sharedDaemon(t)
	for v, want := range map[string][]string{
		"/v1.50":           {`"LayersSize":`, `"Images":[`, `"Containers":[`, `"Volumes":[`, `"BuildCache":[`},
		"/v1.56":           {`"Images":[`, `"ImageUsage":{`, `"ContainerUsage":{`, `"VolumeUsage":{`},
		"/v1.56?verbose=1": {`"ImageUsage":{`, `"Items":[`},
	} {
		version, query, _ := strings.Cut(v, "?")
		s, b := d.call(t, "GET", version+"/system/df?"+query, "", nil)
		for _, w := range want {
			if s != 200 || !strings.Contains(b, w) {
				t.Errorf("%s: %d without %s: %s", v, s, w, b)
			}
		}
		if query != "" && strings.Contains(b, `"LayersSize"`) {
			t.Errorf("%s: legacy fields", v)
		}
	}
	if s, b := d.call(t, "GET", "/system/df?type=x", "", nil); s != 400 {
		t.Errorf("type=x: %d %s", s, b)
	}
}

// TestKeepAlive: a request with a body that nobody reads (SDKs repeat the query in
// it) leaves its connection to the next request, and so does an archive.
func TestKeepAlive(t *testing.T) {
	d := sharedDaemon(t)
	c, err := net.Dial("unix", d.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	br := bufio.NewReader(c)
	empty := make([]byte, 20<<10) // an archive's end and more
	for _, r := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/images/create?fromImage=127.0.0.1:1/x", `{"fromImage":"127.0.0.1:1/x"}`, 503},
		{"POST", "/images/127.0.0.1:1/x/push", `{"auths":null}`, 404},
		{"POST", "/images/create?fromSrc=-&repo=keepalive", string(empty), 200},
		{"DELETE", "/images/keepalive", `{}`, 200},
		{"GET", "/_ping", "", 200},
	} {
		if _, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", r.method, r.path, len(r.body), r.body); err != nil {
			t.Fatalf("%s: %v", r.path, err)
		}
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatalf("%s: %v", r.path, err)
		}
		b, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || res.StatusCode != r.status || res.Close {
			t.Fatalf("%s: %s %q %v, closed %v", r.path, res.Status, b, err, res.Close)
		}
	}
}

// TestSDK walks a container's life with the Go SDK.
func TestSDK(t *testing.T) {
	d := sharedDaemon(t)
	cli, err := client.New(client.WithHost("unix://" + d.Socket))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cli.Close() }()
	ctx := limited(t)
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	res, err := cli.ContainerCreate(ctx, client.ContainerCreateOptions{Image: "busybox", Config: &container.Config{Cmd: []string{"sleep", "1000"}, Labels: map[string]string{"sdk": "1"}}})
	check("create", err)
	t.Cleanup(func() { d.remove(t, res.ID) })
	_, err = cli.ContainerStart(ctx, res.ID, client.ContainerStartOptions{})
	check("start", err)
	list, err := cli.ContainerList(ctx, client.ContainerListOptions{Filters: client.Filters{}.Add("label", "sdk=1")})
	check("list", err)
	if len(list.Items) != 1 || list.Items[0].ID != res.ID || list.Items[0].State != "running" {
		t.Errorf("list %+v", list.Items)
	}
	in, err := cli.ContainerInspect(ctx, res.ID[:12], client.ContainerInspectOptions{Size: true})
	check("inspect", err)
	if in.Container.SizeRw == nil || !in.Container.NetworkSettings.Networks["bridge"].IPAddress.IsValid() {
		t.Errorf("inspect %+v", in.Container.NetworkSettings.Networks["bridge"])
	}
	top, err := cli.ContainerTop(ctx, res.ID, client.ContainerTopOptions{Arguments: []string{"-o", "pid,args"}})
	check("top", err)
	if len(top.Processes) != 1 || len(top.Titles) != 2 {
		t.Errorf("top %+v", top)
	}
	st, err := cli.ContainerStats(ctx, res.ID, client.ContainerStatsOptions{})
	check("stats", err)
	var stats container.StatsResponse
	check("stats", json.NewDecoder(st.Body).Decode(&stats))
	_ = st.Body.Close()
	if stats.ID != res.ID || stats.PidsStats.Current == 0 || stats.MemoryStats.Usage == 0 || stats.OSType != "linux" {
		t.Errorf("stats %+v", stats)
	}
	_, err = cli.ContainerRename(ctx, res.ID, client.ContainerRenameOptions{NewName: "sdk-renamed"})
	check("rename", err)
	_, err = cli.ContainerPause(ctx, "sdk-renamed", client.ContainerPauseOptions{})
	check("pause", err)
	_, err = cli.ContainerUnpause(ctx, "sdk-renamed", client.ContainerUnpauseOptions{})
	check("unpause", err)
	up, err := cli.ContainerUpdate(ctx, res.ID, client.ContainerUpdateOptions{Resources: &container.Resources{Memory: 64 << 20, MemorySwap: 128 << 20}})
	check("update", err)
	if len(up.Warnings) != 0 {
		t.Errorf("update warns %q", up.Warnings)
	}
	diff, err := cli.ContainerDiff(ctx, res.ID, client.ContainerDiffOptions{})
	check("diff", err)
	_ = diff
	_, err = cli.ContainerKill(ctx, res.ID, client.ContainerKillOptions{})
	check("kill", err)
	_, err = cli.ContainerRemove(ctx, res.ID, client.ContainerRemoveOptions{Force: true})
	check("remove", err)
	if _, err := cli.ContainerInspect(ctx, res.ID, client.ContainerInspectOptions{}); err == nil {
		t.Error("inspect of a removed container")
	}
	im, err := cli.ImageInspect(ctx, "busybox")
	check("image inspect", err)
	images, err := cli.ImageList(ctx, client.ImageListOptions{})
	check("image list", err)
	if len(images.Items) == 0 || images.Items[0].ID != im.ID {
		t.Errorf("images %+v", images.Items)
	}
	_, err = cli.ImageTag(ctx, client.ImageTagOptions{Source: "busybox", Target: "a.example:5000/b/c:d"})
	check("tag", err)
	hist, err := cli.ImageHistory(ctx, "a.example:5000/b/c:d")
	check("history", err)
	if len(hist.Items) == 0 {
		t.Error("no history")
	}
	rm, err := cli.ImageRemove(ctx, "a.example:5000/b/c:d", client.ImageRemoveOptions{})
	check("untag", err)
	if len(rm.Items) != 1 || rm.Items[0].Untagged != "a.example:5000/b/c:d" {
		t.Errorf("untag %+v", rm.Items)
	}
	save, err := cli.ImageSave(ctx, []string{"busybox"})
	check("save", err)
	archive, err := io.ReadAll(save)
	check("save", err)
	_ = save.Close()
	load, err := cli.ImageLoad(ctx, bytes.NewReader(archive))
	check("load", err)
	text, err := io.ReadAll(load)
	check("load", err)
	_ = load.Close()
	if !strings.Contains(string(text), `{"stream":"Loaded image: busybox:latest\n"}`) {
		t.Errorf("load: %s", text)
	}
}
