//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// flowing returns a component that serves events.
func flowing(id string, r eventRole, inputs ...string) Component {
	c := actor(id, role{Events: &r})
	c.Inputs = inputs
	if r.Kind == "sink" {
		c.Role = roleSink
	}
	return c
}

// A finite pipeline moves all its events, each once and in order, and ends by itself.
func TestRelay_FinitePipelineCompletes(t *testing.T) {
	t.Parallel()
	const count = 1000
	out := filepath.Join(t.TempDir(), "out")
	p := launch(t, writePipeline(t,
		flowing("ledgers", eventRole{Kind: "source", Count: count, Bytes: 100}),
		flowing("upper", eventRole{Kind: "processor"}, "ledgers"),
		flowing("store", eventRole{Kind: "sink", File: out}, "upper"),
	))
	p.exit(exitOK)
	wantEvents(t, out, "ledgers>upper", "", 1, count)
}

// wantEvents wants the lines of events with those ids, each once and in order.
func wantEvents(t *testing.T, file, way, kind string, first, last int) {
	t.Helper()
	var want []byte
	for i := first; i <= last; i++ {
		want = fmt.Appendf(want, "%s %s %d\n", way, kind, i)
	}
	if got := string(get(os.ReadFile(file))(t)); got != string(want) {
		t.Errorf("%s has %d bytes, want %d: %.200q", file, len(got), len(want), got)
	}
}
