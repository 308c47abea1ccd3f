package main

// -watch: the files that a pipeline is made of are looked at again and again. One that has changed is a
// request to the loop.

import (
	"cmp"
	"context"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	watchInterval = 200 * time.Millisecond // between two looks
	watchQuiet    = 500 * time.Millisecond // without a change, after which one counts: a build writes for a while
)

// fileWatcher looks at files in a goroutine of its own, because a disk can hang. A nil one watches nothing.
type fileWatcher struct {
	changes chan fileChange    // to the loop
	watch   chan watched       // from the loop: what to look at from now on
	stop    context.CancelFunc // of the goroutine
	looking sync.WaitGroup     // the goroutine

	// Only the goroutine uses these.
	seen     map[string]fs.FileInfo // by path, nil for one that is not there
	programs map[string]string      // by component: the file that was found last
	missing  map[string]bool        // components whose program was not there
}

// watched is what a pipeline is made of.
type watched struct {
	files      []string // whose change asks for a reload: the pipeline's, and those of -env-file
	components []*Component
}

// fileChange is what is to be done because files have changed.
type fileChange struct {
	reload bool
	ids    []string // of components that are to be restarted
}

// newWatcher returns a fileWatcher that looks at nothing before look tells it what to look at.
func newWatcher() *fileWatcher {
	ctx, cancel := context.WithCancel(context.Background())
	w := &fileWatcher{changes: make(chan fileChange), watch: make(chan watched, 1), stop: cancel, seen: make(map[string]fs.FileInfo), programs: make(map[string]string), missing: make(map[string]bool)}
	w.looking.Go(func() { w.run(ctx) })
	return w
}

// look has w look at the files of what, in place of what it was told last. It never waits.
func (w *fileWatcher) look(what watched) {
	if w == nil {
		return
	}
	select {
	case <-w.watch: // nobody has taken it yet
	default:
	}
	w.watch <- what
}

// requests returns the channel that gets changes, nil for none.
func (w *fileWatcher) requests() <-chan fileChange {
	if w == nil {
		return nil
	}
	return w.changes
}

// close ends the goroutine. One that a disk keeps is given up.
func (w *fileWatcher) close() {
	if w == nil {
		return
	}
	w.stop()
	_, _ = newDiskTurn(diskTime).do("a watched file", func() error {
		w.looking.Wait()
		return nil
	})
}

func (w *fileWatcher) run(ctx context.Context) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	var what watched
	pending := make(map[string]time.Time) // when each file changed last, of those that have not been told
	for {
		select {
		case what = <-w.watch:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		files := w.files(what)
		if w.compare(files, pending); len(pending) == 0 || slices.ContainsFunc(slices.Collect(maps.Values(pending)), func(at time.Time) bool { return time.Since(at) < watchQuiet }) {
			continue
		}
		var c fileChange
		for path := range pending {
			c.reload = c.reload || slices.Contains(files[path], "")
			c.ids = append(c.ids, files[path]...)
		}
		c.ids = slices.DeleteFunc(slices.Compact(slices.Sorted(slices.Values(c.ids))), func(id string) bool { return id == "" })
		clear(pending)
		select {
		case w.changes <- c:
		case <-ctx.Done():
			return
		}
	}
}

// compare looks at files and notes in pending which have changed. One that is away is being replaced.
func (w *fileWatcher) compare(files map[string][]string, pending map[string]time.Time) {
	for path := range files {
		info, err := os.Stat(path)
		before, known := w.seen[path]
		if err != nil {
			info = nil
		}
		if w.seen[path] = info; known && !sameFile(before, info) {
			pending[path] = time.Now()
		}
	}
	maps.DeleteFunc(w.seen, func(path string, _ fs.FileInfo) bool { _, watched := files[path]; return !watched })
	maps.DeleteFunc(pending, func(path string, _ time.Time) bool { return w.seen[path] == nil })
}

// files returns what to look at: by path, the components that are restarted for it, "" for a reload.
func (w *fileWatcher) files(what watched) map[string][]string {
	out := make(map[string][]string)
	for _, path := range what.files {
		out[path] = append(out[path], "")
	}
	for _, c := range what.components {
		for _, path := range c.EnvFiles {
			out[path] = append(out[path], "")
		}
		if len(c.Command) == 0 {
			continue // an image
		}
		if program, err := findProgram(c.Command[0], cmp.Or(c.Env["PATH"], os.Getenv("PATH")), c.WorkingDir); err == nil {
			if w.programs[c.ID] == "" && w.missing[c.ID] {
				w.seen[program] = nil // it was not there before
			}
			w.programs[c.ID] = program
		} else {
			w.missing[c.ID] = true
		}
		if program := w.programs[c.ID]; program != "" { // it may be away because it is being replaced
			out[program] = append(out[program], c.ID)
		}
		for _, arg := range slices.Concat(c.Command[1:], c.Args) {
			if strings.HasPrefix(arg, "-") {
				continue
			}
			if !filepath.IsAbs(arg) {
				arg = filepath.Join(c.WorkingDir, arg)
			}
			_, known := w.seen[arg]
			if info, err := os.Stat(arg); known || err == nil && info.Mode().IsRegular() {
				out[arg] = append(out[arg], c.ID)
			}
		}
	}
	return out
}

// sameFile tells whether nothing has changed between two looks, of which nil saw no file.
func sameFile(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode()
}
