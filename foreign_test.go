//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Files of the predecessor, with other values: those that name programs are right but for warnings, and of
// those that name downloads each component has one error.
func TestCheck_FilesOfThePredecessor(t *testing.T) {
	t.Parallel()
	files := get(filepath.Glob("testdata/moved/*.json"))(t)
	wantEqual(t, "files", len(files), 9)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			name, _ := strings.CutSuffix(file, ".json")
			want, wantCode := string(get(os.ReadFile(name+".txt"))(t)), exitOK
			if strings.HasSuffix(name, "-by-type") {
				wantCode = exitUsage
			}
			code, _, stderr := call(t, "check", "-orchestrator", "container", file)
			wantEqual(t, "exit code", code, wantCode)
			wantEqual(t, "what check says", stderr, want)
		})
	}
}

// What had no effect with the predecessor is a warning that says what takes its place.
func TestParsePipeline_FormerFields(t *testing.T) {
	t.Parallel()
	const port = "has no effect: env.HEALTH_PORT takes its place, and without it flowctl chooses a free port"
	const path = "has no effect, because it is a path: write the whole address, such as "
	const replicas = "has no effect, one of it runs: each copy is a component of its own"
	head := strings.TrimSuffix(pipelineHead, `"spec": {`)
	for in, want := range map[string][]warning{
		commandFile(`"health_port": 8088, "health_endpoint": "http://localhost:8088/health"`): {{"a", "health_port", port}, {"a", "health_endpoint", "has no effect: health_check takes its place"}},
		commandFile(`"health_check": "/health", "health_port": 8088`):                         {{"a", "health_check", path + `"http://localhost:8088/health"`}, {"a", "health_port", port}},
		commandFile(`"health_check": "/${NOPE}?token=x"`):                                     {{"a", "health_check", path + `"http://localhost:$HEALTH_PORT/${NOPE}"`}},
		commandFile(`"replicas": 1`):                                                          {{"a", "replicas", replicas}},
		commandFile(`"resources": {"limits": {"cpu": 1}}`):                                    {{"a", "resources", "has no effect: limit the whole pipeline, such as by MemoryMax= and CPUQuota= of its unit"}},
		specFile(`"driver": "docker", "config": {"x": "${NOPE}"}, "sinks": [{"replicas": 3, "id": "a", "command": ["x"]}]`): {
			{"", "spec.driver", "has no effect: -orchestrator takes its place, which is process or container"},
			{"", "spec.config", "has no effect: the config of each component that needs it takes its place"},
			{"a", "replicas", replicas}},
		strings.Replace(head, `"name"`, `"description": "d", "namespace": "n", "annotations": {"a": "b"}, "name"`, 1) + `"spec": {"sinks": [{"id": "a", "command": ["x"]}]}}`: {
			{"", "metadata.description", "has no effect: spec.description takes its place"},
			{"", "metadata.namespace", "has no effect: a pipeline is known by its metadata.name alone"},
			{"", "metadata.annotations", "has no effect: metadata.labels takes its place"}},
		commandFile(`"type": "x@v1"`): nil,
	} {
		wantEqual(t, in, fmt.Sprint(mustParsePipeline(t, in).Notes), fmt.Sprint(want))
	}
}

// The warnings of a file that has errors are told beside them, also as JSON; a run tells them at its start.
func TestFormerFields_AreToldOf(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := writeFile(t, filepath.Join(dir, "p.json"), specFile(`"driver": "process", "sinks": [{"replicas": 1, "type": "org/x@v1", "health_port": 1}]`))
	code, out, _ := call(t, "check", "-json", file)
	var report checkReport
	must(t, json.Unmarshal([]byte(out), &report))
	wantEqual(t, "exit code", code, exitUsage)
	wantEqual(t, "errors", len(report.Errors), 2)
	wantEqual(t, "warnings", fmt.Sprint(report.Warnings), "[spec.driver: has no effect: -orchestrator takes its place, which is process or container "+
		"spec.sinks[0].replicas: has no effect, one of it runs: each copy is a component of its own "+
		"spec.sinks[0].health_port: has no effect: env.HEALTH_PORT takes its place, and without it flowctl chooses a free port]")

	writeFile(t, file, specFile(`"driver": "process", "sinks": [{"id": "a", "replicas": 1, "command": ["true"], "register": false}]`))
	p := launch(t, file)
	p.exit(exitOK)
	p.has(p.stderr, `level=WARN msg="check warns" field=spec.driver reason="has no effect: `, `level=WARN msg="check warns" component=a field=replicas reason=`)
}
