//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the files of testdata/translate anew")

// The files of testdata/translate become what its folders for each engine have: NAME.json goes to standard output,
// and NAME.txt to standard error.
func TestTranslate(t *testing.T) {
	t.Parallel()
	for _, file := range get(filepath.Glob("testdata/translate/*.json"))(t) {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		for _, engine := range []string{"compose", "kubernetes"} {
			t.Run(name+" "+engine, func(t *testing.T) {
				t.Parallel()
				args := []string{"translate", "-to", engine, "-image", "flowctl:v1", name + ".json"}
				folder := inFolder(filepath.Dir(file))
				code, out, stderr := start(t, args, folder).finish()
				if _, again, _ := start(t, args, folder).finish(); again != out {
					t.Errorf("another output the second time:\n%s", again)
				}
				if want := map[bool]int{true: exitUsage, false: exitOK}[out == ""]; code != want {
					t.Errorf("exit %d with %d bytes, want %d\n%s", code, len(out), want, stderr)
				}
				golden := filepath.Join(filepath.Dir(file), engine, name)
				wantGolden(t, golden+".json", out)
				wantGolden(t, golden+".txt", stderr)
				if out != "" {
					checkTranslated(t, engine, out)
				}
			})
		}
	}
}

// wantGolden fails unless file is as got, where "" is no file. With -update it becomes so.
func wantGolden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		must(t, os.RemoveAll(file))
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		if got != "" {
			must(t, os.WriteFile(file, []byte(got), 0o644))
		}
	}
	want, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if !bytes.Equal(want, []byte(got)) {
		t.Errorf("%s is not what translate prints (go test -run TestTranslate -update writes it anew):\n%s", file, got)
	}
}

// checkTranslated fails where a manifest has a control plane that would not read its file, a name that is too long, or a
// secret.
func checkTranslated(t *testing.T, engine, text string) {
	var manifest struct {
		Items []struct {
			Kind     string
			Metadata struct{ Name string }
			Data     map[string]string
		}
		Configs map[string]struct{ Content string }
	}
	must(t, json.Unmarshal([]byte(text), &manifest))
	pipeline := strings.ReplaceAll(manifest.Configs["pipeline"].Content, "$$", "$")
	var names []string
	for _, item := range manifest.Items {
		names = append(names, item.Kind+" "+item.Metadata.Name)
		if len(item.Metadata.Name) > 63 {
			t.Errorf("the name of %s is too long", names[len(names)-1])
		}
		if item.Kind == "ConfigMap" {
			pipeline = item.Data["pipeline.json"]
		}
	}
	slices.Sort(names)
	if len(names) != len(slices.Compact(slices.Clone(names))) {
		t.Errorf("two objects have one name: %q", names)
	}
	file := writeFile(t, filepath.Join(t.TempDir(), "plane.json"), pipeline)
	if code, _, stderr := call(t, "check", "-strict", "-orchestrator", "container", file); code != exitOK {
		t.Errorf("%s: the control plane would not read its file:\n%s%s", engine, stderr, pipeline)
	}
}

func TestTranslate_CommandLine(t *testing.T) {
	t.Parallel()
	folder := inFolder("testdata/translate")
	for _, tt := range []struct{ args, want string }{
		{"demo.json", "-to is missing: it must be compose or kubernetes"},
		{"-to nomad demo.json", `-to "nomad": it must be compose or kubernetes`},
		{"-to compose -image -x demo.json", `-image must be the name of an image such as redis:7, not "-x"`},
		{"-to compose none.json", "cannot read pipeline file: open none.json: no such file or directory"},
	} {
		code, out, stderr := start(t, append([]string{"translate"}, strings.Fields(tt.args)...), folder).finish()
		if code != exitUsage || out != "" || !strings.HasPrefix(stderr, "flowctl: "+tt.want+"\n") {
			t.Errorf("%s: exit %d\n%s%swant %s", tt.args, code, out, stderr, tt.want)
		}
	}
}

// A reference is filled as run fills it, by a file of -env-file, too.
func TestTranslate_References(t *testing.T) {
	t.Parallel()
	vars := writeFile(t, filepath.Join(t.TempDir(), "vars"), "TRANSLATED_NETWORK=public\n")
	args := []string{"translate", "-to", "compose", "-f", "testdata/translate/secrets.json", "-env-file", vars}
	_, out, _ := start(t, args).finish()
	if !strings.Contains(out, `"NETWORK": "public"`) {
		t.Errorf("the reference is not filled:\n%s", out)
	}
	_, out, _ = start(t, args, withEnv("TRANSLATED_NETWORK=futurenet")).finish()
	if !strings.Contains(out, `"NETWORK": "futurenet"`) {
		t.Errorf("the environment does not win:\n%s", out)
	}
}
