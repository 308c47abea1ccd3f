//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// Each reader gets what it names, of all that it reads from.
func TestRelay_FilterFanOutAndMerge(t *testing.T) {
	t.Parallel()
	const count = 300
	folder := t.TempDir()
	file := func(name string) string { return filepath.Join(folder, name) }
	p := launch(t, writePipeline(t,
		flowing("a", eventRole{Kind: "source", Count: count, Types: []string{"even", "odd", "rest"}}),
		flowing("b", eventRole{Kind: "source", Count: count, Types: []string{"odd"}}),
		flowing("copy", eventRole{Kind: "processor", Types: []string{"odd", "rest"}}, "a", "b"),
		flowing("all", eventRole{Kind: "sink", File: file("all")}, "copy", "a"),
		flowing("odd", eventRole{Kind: "sink", File: file("odd"), Types: []string{"odd"}}, "copy"),
	), "-until", "done")
	p.exit(exitOK)
	all, odd := linesBy(t, file("all")), linesBy(t, file("odd"))
	wantEqual(t, "ways to all", slices.Sorted(maps.Keys(all)), []string{"a even", "a odd", "a rest", "a>copy odd", "a>copy rest", "b>copy odd"})
	wantEqual(t, "ways to odd", slices.Sorted(maps.Keys(odd)), []string{"a>copy odd", "b>copy odd"})
	for way, ids := range all {
		if want := count / 3; len(ids) != want && way != "b>copy odd" || !slices.IsSorted(ids) {
			t.Errorf("all got by %q %d events, want %d in order: %v", way, len(ids), want, ids)
		}
	}
	wantEqual(t, "events of b to odd", odd["b>copy odd"], numbers(1, count))
	p.has(p.stderr, "msg=moved component=a in=0 out=300\n", "msg=moved component=copy in=500 out=500\n", "msg=moved component=odd in=400 out=0\n")
}

// Events of a type that no reader wants are counted.
func TestRelay_UnwantedTypesAreTold(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t,
		flowing("a", eventRole{Kind: "source", Count: 10, Types: []string{"even", "odd"}}),
		flowing("odd", eventRole{Kind: "sink", Types: []string{"odd"}}, "a"),
	))
	p.exit(exitOK)
	p.has(p.stderr, "msg=moved component=a in=0 out=10 unmatched=5\n", "msg=moved component=odd in=5 out=0\n")
}

// A sink that says that events failed is a warning, and with -until done a failure.
func TestRelay_FailedEvents(t *testing.T) {
	t.Parallel()
	for until, code := range map[string]int{untilStopped: exitOK, untilDone: exitFailed} {
		t.Run(until, func(t *testing.T) {
			t.Parallel()
			p := launch(t, writePipeline(t,
				flowing("a", eventRole{Kind: "source", Count: 10}),
				flowing("store", eventRole{Kind: "sink", Fail: 2}, "a"),
			), "-until", until)
			p.exit(code)
			p.has(p.stderr, `level=WARN msg="events failed" component=store failed=2 `, `errors="row is too long, row is too long"`, "msg=moved component=store in=10 out=0 failed=2\n")
		})
	}
}

// A reader that ends its stream has had enough: the others go on, and a source of which nobody wants more ends.
func TestRelay_ReaderHasEnough(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	few, more := filepath.Join(folder, "few"), filepath.Join(folder, "more")
	p := launch(t, writePipeline(t,
		flowing("endless", eventRole{Kind: "source"}),
		flowing("head", eventRole{Kind: "processor", Enough: 500}, "endless"),
		flowing("few", eventRole{Kind: "sink", File: few, Enough: 5}, "endless"),
		flowing("more", eventRole{Kind: "sink", File: more}, "head"),
	))
	p.exit(exitOK)
	wantEvents(t, few, "endless", "", 1, 5)
	wantEvents(t, more, "endless>head", "", 1, 500)
}

// Who answers GetInfo and does not implement its stream moves its own data, too.
func TestRelay_UnimplementedStreamIsLeftAlone(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, flowing("a", eventRole{Kind: "source"}), flowing("own", eventRole{Kind: "sink", Hollow: true}, "a")), "-unhealthy-timeout", "1s")
	p.waitErr(`msg="these components move their own data" components=own`)
	p.stop()
	p.has(p.stderr, `level=WARN msg="its events are not moved: it answers GetInfo, but its stream by UNIMPLEMENTED" component=own`)
	p.hasNot(p.stderr, "its stream broke\"")
}

// What is no server of gRPC is told of once, makes nobody ill, and is asked less and less.
func TestRelay_WhatIsNoServerIsLeftAlone(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	n := newRelay(maxWindow, slog.New(slog.NewTextHandler(&log, nil))).newNode(relayMember{id: "a", endpoint: "127.0.0.1:1"})
	now, asked := time.Now(), 0
	for end := now.Add(time.Hour); now.Before(end); asked++ {
		pause, over := n.judge(errors.New("this is HTTP/1.1"), now)
		if now = now.Add(pause); over || pause > time.Minute || n.cause != "" {
			t.Fatalf("pause %s, over %v, cause %q", pause, over, n.cause)
		}
	}
	if told := strings.Count(log.String(), "its events cannot be moved yet"); told != 1 || asked > 75 {
		t.Errorf("was asked %d times in an hour, told %d times: %s", asked, told, &log)
	}
}

// Who moves its own data, or registers by the legacy dialect, is left alone, and so is everybody with relay off.
func TestRelay_OthersAreLeftAlone(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t,
		flowing("serves", eventRole{Kind: "source", Count: 1}),
		flowing("own", eventRole{Kind: "sink", Unserved: true}, "serves"),
		actor("legacy", role{Dialect: "legacy"}),
	))
	p.waitErr(`msg="these components move their own data" components="serves, own"`)
	p.stop()
	p.hasNot(p.stdout, "streams")
	p.hasNot(p.stderr, "msg=moved", "moving events")

	file := writePipeline(t, flowing("serves", eventRole{Kind: "source", Count: 1}), flowing("store", eventRole{Kind: "sink"}, "serves"))
	text := strings.Replace(string(get(os.ReadFile(file))(t)), `"spec":{`, `"spec":{"relay":"off",`, 1)
	p = launch(t, writeFile(t, file, text))
	p.waitReady()
	wantEqual(t, "edges", len(p.listed(t).Edges), 0)
	p.stop()
	p.hasNot(p.stderr, "moving events", "their own data")
}

// A smoke test moves nothing, and the command after -- runs beside a pipeline however soon that has moved all.
func TestRelay_UntilReadyAndCommand(t *testing.T) {
	t.Parallel()
	file := writePipeline(t, flowing("a", eventRole{Kind: "source", Count: 1}), flowing("store", eventRole{Kind: "sink"}, "a"))
	p := launch(t, file, "-until", untilReady)
	p.exit(exitOK)
	p.hasNot(p.stdout, "streams", "consumes")
	start(t, runArgs(file, "--", "sh", "-c", "exit 7")).exit(7)
}

// A source is asked for what the file says, and a server may listen a while after it registered.
func TestRelay_ParamsAndLateServer(t *testing.T) {
	t.Parallel()
	source := flowing("ledgers", eventRole{Kind: "source", Count: 3})
	source.Env["START_LEDGER"] = "10"
	source.Config = map[string]any{"end_ledger": "20"}
	source.StreamParams = map[string]string{"start_ledger": "11", "network": "testnet"}
	p := launch(t, writePipeline(t, source, flowing("store", eventRole{Kind: "sink", Late: "300ms"}, "ledgers")))
	p.exit(exitOK)
	p.has(p.stdout, `streams resume=false token="" params=map[end_ledger:20 network:testnet start_ledger:11]`, "store   | consumed 4\n")
}

// A source that refuses to stream is ill, and the run fails by that.
func TestRelay_RefusalIsIllness(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, flowing("ledgers", eventRole{Kind: "source", Refuse: true}), flowing("store", eventRole{Kind: "sink"}, "ledgers")), "-unhealthy-timeout", "1s")
	p.exit(exitFailed)
	p.has(p.stderr, "its events cannot be moved: FailedPrecondition: it has no ledger to begin with")
}

// An event above the bound is refused by name, and one below passes.
func TestRelay_LargeEvents(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	large := []Component{flowing("a", eventRole{Kind: "source", Count: 3, Bytes: 50 << 20}), flowing("b", eventRole{Kind: "processor"}, "a"), flowing("store", eventRole{Kind: "sink", File: out}, "b")}
	launch(t, writePipeline(t, large...)).exit(exitOK)
	wantEvents(t, out, "a>b", "", 1, 3)
	p := launch(t, writePipeline(t, large...), "-max-event-bytes", "1000000", "-unhealthy-timeout", "1s")
	p.exit(exitFailed)
	p.has(p.stderr, "its events cannot be moved: ResourceExhausted:", "-max-event-bytes")
}

// A component that is killed is connected again. No more is lost than was told, and nothing comes twice from a
// source that knows what it has sent.
func TestRelay_KilledComponentsAreConnectedAgain(t *testing.T) {
	t.Parallel()
	for _, killed := range []string{"a", "b", "store"} {
		t.Run(killed, func(t *testing.T) {
			t.Parallel()
			folder, count := t.TempDir(), 20_000
			out := filepath.Join(folder, "out")
			all := []Component{
				flowing("a", eventRole{Kind: "source", Count: count, Bytes: 1000, State: filepath.Join(folder, "state"), Each: "20us"}),
				flowing("b", eventRole{Kind: "processor"}, "a"),
				flowing("store", eventRole{Kind: "sink", File: out}, "b"),
			}
			for i := range all {
				all[i].RestartPolicy = restartAlways
			}
			p := launch(t, writePipeline(t, all...))
			eventually(t, "some events", func() bool { data, _ := os.ReadFile(out); return len(data) > 10_000 })
			p.tell(killed, syscall.SIGKILL)
			p.exit(exitOK)
			ids := linesBy(t, out)["a>b "]
			told := 0
			for _, m := range regexp.MustCompile(`in_flight="up to (\d+) events"`).FindAllStringSubmatch(p.stderr.String(), -1) {
				told += get(strconv.Atoi(m[1]))(t)
			}
			if !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) {
				t.Errorf("events came twice, or not in order")
			}
			if lost := count - len(ids); lost > told || told == 0 {
				t.Errorf("%d events were lost, and at most %d told\n%s", lost, told, p)
			}
			p.has(p.stderr, `msg="its events are moved again" component=`+killed)
		})
	}
}

// A restart that an operator asks for loses nothing: what is on its way is moved first.
func TestRelay_RestartLosesNothing(t *testing.T) {
	t.Parallel()
	folder, count := t.TempDir(), 30_000
	out := filepath.Join(folder, "out")
	p := launch(t, writePipeline(t,
		flowing("a", eventRole{Kind: "source", Count: count, Bytes: 1000, State: filepath.Join(folder, "state"), Each: "20us"}),
		flowing("b", eventRole{Kind: "processor"}, "a"),
		flowing("store", eventRole{Kind: "sink", File: out}, "b"),
	))
	eventually(t, "some events", func() bool { data, _ := os.ReadFile(out); return len(data) > 10_000 })
	for _, id := range []string{"b", "store"} {
		if code, _, stderr := p.ask("restart", "-pipeline", "test", id); code != exitOK {
			t.Fatalf("restart %s: %d\n%s\n%s", id, code, stderr, p)
		}
	}
	p.exit(exitOK)
	wantEvents(t, out, "a>b", "", 1, count)
}

// A source that had ended moves its events again when an operator restarts it, to a sink that had ended, too.
func TestRelay_RestartAfterTheEnd(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	p := launch(t, writePipeline(t,
		flowing("a", eventRole{Kind: "source", Count: 5}),
		flowing("store", eventRole{Kind: "sink", File: out}, "a"),
		flowing("endless", eventRole{Kind: "source", Each: "1h"}),
		flowing("other", eventRole{Kind: "sink"}, "endless"),
	), "-stop-timeout", "1s")
	p.waitOut("consumed 6\n")
	if code, _, stderr := p.ask("restart", "-pipeline", "test", "a"); code != exitOK {
		t.Fatalf("restart: %d\n%s\n%s", code, stderr, p)
	}
	p.wait(p.stdout, "consumed 6\n", 2)
	p.stop()
	if got := linesBy(t, out)["a "]; !slices.Equal(got, slices.Concat(numbers(1, 5), numbers(1, 5))) {
		t.Errorf("the sink got %v", got)
	}
}

// A source that is restarted after its last event goes on by its token.
func TestRelay_RestartGoesOnByToken(t *testing.T) {
	t.Parallel()
	folder, count := t.TempDir(), 20
	out := filepath.Join(folder, "out")
	p := launch(t, writePipeline(t,
		flowing("a", eventRole{Kind: "source", Count: count, State: filepath.Join(folder, "state")}),
		flowing("store", eventRole{Kind: "sink", File: out, Each: "100ms"}, "a"),
	))
	eventually(t, "all sent", func() bool { edges := p.listed(t).Edges; return len(edges) > 0 && edges[0].Events == int64(count) })
	if code, _, stderr := p.ask("restart", "-pipeline", "test", "a"); code != exitOK {
		t.Errorf("restart: %d\n%s", code, stderr)
	}
	p.exit(exitOK)
	wantEvents(t, out, "a", "", 1, count)
}

// grows waits until a sink has written more to its file.
func grows(t *testing.T, file string) {
	t.Helper()
	size := func() int64 {
		info, err := os.Stat(file)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	before := size()
	eventually(t, "more events in "+filepath.Base(file), func() bool { return size() > before })
}

// A reload that replaces the only reader of a source by another has the source wait for that one.
func TestRelay_ReloadReplacesAReader(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	one, two := filepath.Join(folder, "one"), filepath.Join(folder, "two")
	a := flowing("a", eventRole{Kind: "source", Each: "1ms"})
	file := writePipeline(t, a, flowing("one", eventRole{Kind: "sink", File: one}, "a"))
	p := launch(t, file)
	grows(t, one)
	rewrite(t, file, a, flowing("two", eventRole{Kind: "sink", File: two}, "a"))
	p.reload("reloaded: added two, removed one; 1 unchanged\n")
	grows(t, two)
	p.stop()
	last := func(file string) []int { return linesBy(t, file)["a "] }
	lost := 0
	for _, m := range regexp.MustCompile(`msg="events were not delivered[^\n]* events=(\d+)`).FindAllStringSubmatch(p.stderr.String(), -1) {
		lost += get(strconv.Atoi(m[1]))(t)
	}
	if before, after := last(one), last(two); after[0]-before[len(before)-1] > 2+lost { // one may have been about to be put
		t.Errorf("after %d came %d, and %d were told\n%s", before[len(before)-1], after[0], lost, p)
	}
}

// A reader that a reload breaks is waited for until another reload mends it.
func TestRelay_ReloadBreaksAReader(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	out, other := filepath.Join(folder, "out"), filepath.Join(folder, "other")
	a, store := flowing("a", eventRole{Kind: "source", Each: "1ms"}), flowing("store", eventRole{Kind: "sink", File: out}, "a")
	b, beside := flowing("b", eventRole{Kind: "source", Each: "1ms"}), flowing("beside", eventRole{Kind: "sink", File: other}, "b")
	beside.RestartPolicy = restartAlways
	file := writePipeline(t, a, b, store, beside)
	p := launch(t, file)
	grows(t, out)
	bad := store
	bad.Command = []string{"false"}
	rewrite(t, file, a, b, bad, beside)
	if code, _, _ := p.callReload(); code != exitFailed {
		t.Errorf("reload: exit %d", code)
	}
	p.tell("beside", syscall.SIGKILL)
	p.waitErr(`msg="its events are moved again" component=beside`)
	rewrite(t, file, a, b, store, beside)
	p.reload("reloaded: restarted store; 3 unchanged\n")
	grows(t, out)
	p.stop()
}

// Who moved its own data may serve events once a reload has brought another program, and who had nobody to send to then has.
func TestRelay_ReloadBringsEvents(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	a := flowing("a", eventRole{Kind: "source", Each: "1ms"})
	file := writePipeline(t, a, flowing("store", eventRole{Kind: "sink", Unserved: true}, "a"))
	p := launch(t, file)
	p.waitErr(`msg="these components move their own data" components="a, store"`)
	rewrite(t, file, a, flowing("store", eventRole{Kind: "sink", File: out}, "a"))
	p.reload("reloaded: restarted store; 1 unchanged\n")
	grows(t, out)
	p.stop()
}

// With "relay": "off" brought by a reload the streams end.
func TestRelay_ReloadTurnsItOff(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	file := writePipeline(t, flowing("a", eventRole{Kind: "source", Each: "1ms", Linger: true}), flowing("store", eventRole{Kind: "sink", File: out}, "a"))
	p := launch(t, file)
	grows(t, out)
	writeFile(t, file, strings.Replace(string(get(os.ReadFile(file))(t)), `"spec":{`, `"spec":{"relay":"off",`, 1))
	p.reload("reloaded: nothing has changed\n")
	p.waitOut("store | consumed ")
	p.stop()
	p.hasNot(p.stderr, "SIGKILL")
}

// A reader that is away has not forgotten which types it wants.
func TestRelay_KilledReaderGetsItsTypesAlone(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	odd := flowing("odd", eventRole{Kind: "sink", File: out, Types: []string{"odd"}}, "a")
	odd.RestartPolicy = restartAlways
	p := launch(t, writePipeline(t, flowing("a", eventRole{Kind: "source", Each: "1ms", Types: []string{"even", "odd"}}), odd))
	grows(t, out)
	p.tell("odd", syscall.SIGKILL)
	p.waitErr(`msg="its events are moved again" component=odd`)
	grows(t, out)
	p.stop()
	wantEqual(t, "ways", slices.Sorted(maps.Keys(linesBy(t, out))), []string{"a odd"})
}

// What sources have sent is moved before those that read it are stopped.
func TestRelay_StopDrains(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	out, state := filepath.Join(folder, "out"), filepath.Join(folder, "state")
	p := launch(t, writePipeline(t,
		flowing("a", eventRole{Kind: "source", Bytes: 1000, State: state, Each: "100us"}),
		flowing("b", eventRole{Kind: "processor", Each: "300us"}, "a"),
		flowing("store", eventRole{Kind: "sink", File: out}, "b"),
	))
	eventually(t, "some events", func() bool { data, _ := os.ReadFile(out); return len(data) > 1000 })
	p.stop()
	sent := get(strconv.Atoi(strings.TrimSpace(string(get(os.ReadFile(state))(t)))))(t)
	wantEvents(t, out, "a>b", "", 1, sent)
}

// A source whose server waits for its streams ends with the stream, not by SIGKILL.
func TestRelay_LingeringSourceIsLeft(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, flowing("a", eventRole{Kind: "source", Each: "1h", Linger: true}), flowing("store", eventRole{Kind: "sink", Linger: true}, "a")))
	p.waitOut("store | consumes")
	p.stop()
	p.hasNot(p.stderr, "SIGKILL")
}

// A slow sink slows its source, and what is on its way takes little memory.
func TestRelay_SlowSinkSlowsItsSource(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t,
		flowing("a", eventRole{Kind: "source", Bytes: 10_000}),
		flowing("slow", eventRole{Kind: "sink", Each: "1s"}, "a"),
		flowing("fast", eventRole{Kind: "sink"}, "a"),
	), "-stop-timeout", "1s")
	p.waitReady()
	eventually(t, "an edge that waits", func() bool {
		for _, e := range p.listed(t).Edges {
			if e.To == "slow" && e.WaitingSeconds > 0 {
				return true
			}
		}
		return false
	})
	p.stop()
}

// listed returns what list -json prints.
func (p *process) listed(t *testing.T) (out listedPipeline) {
	t.Helper()
	_, stdout, _ := p.ask("list", "-json", "-pipeline", "test")
	var all []listedPipeline
	must(t, json.Unmarshal([]byte(stdout), &all))
	return all[0]
}

// linesBy returns the ids of events in the file of a sink, by where they came by and their type.
func linesBy(t *testing.T, file string) map[string][]int {
	t.Helper()
	out := make(map[string][]int)
	for line := range strings.Lines(string(get(os.ReadFile(file))(t))) {
		way, id, _ := cutLast(strings.TrimSuffix(line, "\n"))
		out[way] = append(out[way], get(strconv.Atoi(id))(t))
	}
	return out
}

// cutLast cuts text at its last space.
func cutLast(text string) (before, after string, found bool) {
	i := strings.LastIndexByte(text, ' ')
	return text[:i], text[i+1:], i >= 0
}

func numbers(first, last int) (out []int) {
	for i := first; i <= last; i++ {
		out = append(out, i)
	}
	return out
}

// A reload that puts one sink in the place of another leaves the stream of their source open, and what the source
// sends meanwhile waits.
func TestRelay_ReloadReplacesTheReader(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	one, two := filepath.Join(folder, "one"), filepath.Join(folder, "two")
	source := flowing("a", eventRole{Kind: "source", Each: "1ms"})
	file := writePipeline(t, source, flowing("one", eventRole{Kind: "sink", File: one}, "a"))
	p := launch(t, file)
	has := func(file string) bool { data, _ := os.ReadFile(file); return len(data) > 100 }
	eventually(t, "some events", func() bool { return has(one) })
	next := writePipeline(t, source, flowing("two", eventRole{Kind: "sink", File: two}, "a"))
	must(t, os.Rename(next, file))
	if code, _, stderr := p.callReload(); code != exitOK {
		t.Fatalf("reload: %d\n%s\n%s", code, stderr, p)
	}
	eventually(t, "events at the other sink", func() bool { return has(two) })
	p.stop()
	before, after := linesBy(t, one)["a "], linesBy(t, two)["a "]
	last, first, undelivered := before[len(before)-1], after[0], 0
	if m := regexp.MustCompile(`the edge was taken out" from=a to=one events=(\d+)`).FindStringSubmatch(p.stderr.String()); m != nil {
		undelivered = get(strconv.Atoi(m[1]))(t)
	}
	if first > last+undelivered+1 || !slices.Equal(after, numbers(first, first+len(after)-1)) {
		t.Errorf("one got up to %d, %d were told as not delivered, and two got from %d on\n%s", last, undelivered, first, p)
	}
	p.has(p.stdout, "a   | streams resume=false")
	p.hasNot(p.stderr, "moved again", "unmatched")
}

// A component that a reload adds and that turns out to move its own data holds nobody up.
func TestRelay_ReloadAddsWhoMovesItsOwn(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	all := []Component{flowing("a", eventRole{Kind: "source", Bytes: 100_000, Each: "1ms"}), flowing("store", eventRole{Kind: "sink", File: out}, "a")}
	file := writePipeline(t, all...)
	p := launch(t, file)
	size := func() int { data, _ := os.ReadFile(out); return len(data) }
	eventually(t, "some events", func() bool { return size() > 0 })
	legacy := actor("legacy", role{Dialect: "legacy"})
	legacy.Role, legacy.Inputs = roleSink, []string{"a"}
	must(t, os.Rename(writePipeline(t, append(all, legacy, flowing("own", eventRole{Kind: "sink", Unserved: true}, "a"))...), file))
	if code, _, stderr := p.callReload(); code != exitOK {
		t.Fatalf("reload: %d\n%s\n%s", code, stderr, p)
	}
	p.waitErr(`move their own data" components=own`)
	before := size()
	eventually(t, "more events than a window has room for", func() bool { return size() > before+500 })
	p.stop()
}

// A reader that has got all and does not end its stream holds up a finite pipeline: that is told.
func TestRelay_ReaderThatDoesNotEnd(t *testing.T) {
	t.Parallel()
	p := launch(t, writePipeline(t, flowing("a", eventRole{Kind: "source", Count: 3}), flowing("store", eventRole{Kind: "sink", Holds: true}, "a")), "-stop-timeout", "1s")
	p.waitErr(`msg="it has got all its events, and does not end its stream" component=store`)
	p.stop()
}

// What a component says of an error is bounded, as all that it says of itself.
func TestStreamError_IsBounded(t *testing.T) {
	t.Parallel()
	err := &brokenStream{status.Error(codes.ResourceExhausted, strings.Repeat("é\n", 1<<20)), 3}
	if got := streamError(err); len(got) > 2*maxText || !strings.HasPrefix(got, "ResourceExhausted: é\uFFFDé") || !strings.HasSuffix(got, " (see -max-event-bytes)") {
		t.Errorf("%d bytes: %.40q", len(got), got)
	}
}
