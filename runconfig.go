package main

// How a pipeline is run: what the command line says, and the pipeline that is read by that.

import (
	"cmp"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// planeFlags are the flags of a control plane, with a pipeline or alone.
type planeFlags struct {
	listen          listenConfig
	advertise       string // what the control plane says of where it is, "" for where it listens
	requireIdentity bool   // a component is only who has a certificate that names it
	tls             tlsFlags
	ttl             time.Duration // of a heartbeat
	interval        time.Duration // of the janitor
	forget          time.Duration // after so long a stale service that is not of the pipeline is forgotten
	logLevel        slog.Level
	format          string // of the log
	dbPath          string
	noState         bool
}

// runConfig says how a pipeline is run.
type runConfig struct {
	planeFlags
	file           string    // the pipeline file
	envFiles       []string  // of -env-file
	records        string    // the folder with the record of runs, "" for none
	variables      variables // of those files, as they were read last
	version        string    // of flowctl
	state          stateConfig
	logDir         string // one file per component, "" for none
	logDirOptional bool   // it is only a warning that logDir cannot be used
	showStatus     bool
	times          procTimes
	sandbox        bool // run the services alone
	servicesOf     int  // process of the sandbox whose services are used, 0 for none
	until          string
	timeout        time.Duration // of the whole run, 0 for none
	maxEvent       int           // bytes of one event that is moved
	watch          bool          // reload and restart what has changed
	engine         *engine       // nil for none
	command        []string      // after --
	operators      []string      // names in client certificates of who may do what operators may
}

// read reads the pipeline file. It fails also for a pipeline that cannot be run in this way.
func (c *runConfig) read() (*Pipeline, error) { return c.readFile(c.file) }

// readFile is read for another file.
func (c *runConfig) readFile(file string) (*Pipeline, error) {
	env, err := readVariables(c.envFiles)
	if err != nil {
		return nil, err
	}
	p, err := readPipeline(file, env.lookup)
	if err != nil {
		return nil, err
	}
	env.addTo(p)
	c.variables = env
	switch {
	case c.sandbox:
		err = p.sandbox()
	case c.servicesOf != 0:
		err = p.dropServices()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %v", file, err)
	}
	if err := cmp.Or(c.tls.checkComponents(p.speakTLS(true)), c.engine.checkImages(p)); err != nil {
		return nil, fmt.Errorf("%s: %v", file, err)
	}
	return p, nil
}

// absolute returns c with paths that do not depend on the folder of flowctl, by $PWD: a link in that may
// lead elsewhere later, to another release.
func (c runConfig) absolute() (runConfig, error) {
	files := append([]string{c.file}, c.envFiles...)
	for i, file := range files {
		if fromStandardInput(file) {
			continue
		}
		var err error
		if files[i], err = filepath.Abs(file); err != nil {
			return c, err
		}
	}
	c.file, c.envFiles = files[0], files[1:]
	return c, nil
}

// inContainers returns where a container that is not on the host's network reaches one of listeners, "" for nowhere.
func inContainers(listeners []planeListener) (endpoint string) {
	for _, lis := range listeners {
		endpoint = cmp.Or(endpoint, containerEndpoint(lis.Addr(), lis.endpoint))
	}
	return endpoint
}

// pipelineFiles returns which of the first small JSON files of a folder are pipelines.
func pipelineFiles(folder string) []string {
	const mostFiles, mostBytes = 20, 256 << 10
	entries, _ := os.ReadDir(folder) // what could be read will do
	entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return filepath.Ext(e.Name()) != ".json" || !e.Type().IsRegular() })
	var out []string
	for _, e := range entries[:min(len(entries), mostFiles)] {
		var head struct{ Kind string }
		if info, err := e.Info(); err != nil || info.Size() > mostBytes {
			continue
		}
		data, err := os.ReadFile(filepath.Join(folder, e.Name()))
		if err == nil && json.Unmarshal(data, &head) == nil && head.Kind == "Pipeline" {
			out = append(out, printable(e.Name()))
		}
	}
	return out
}
