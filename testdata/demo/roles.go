package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
	"github.com/withobsrvr/flowctl/testdata/demo/feed"
)

// Event types, as the control plane knows them.
const (
	countersType = "demo.counters"
	ratesType    = "demo.rates"
)

// Counters: of a file, and of a machine since it was booted.
const (
	lineCount = "lines"
	byteCount = "bytes"

	cpuBusy   = "cpu_busy_ticks" // of the kernel's clock, all processors together
	cpuIdle   = "cpu_idle_ticks"
	switches  = "context_switches"
	forks     = "processes_forked"
	netInput  = "net_received_bytes"
	netOutput = "net_sent_bytes"
)

const (
	// maxLine, in bytes, keeps a record well below gRPC's limit of 4 MiB.
	maxLine = 1 << 20

	// rateWindow is the shortest time that rates are measured over; between
	// two lines of a file they would mean nothing.
	rateWindow = 100 * time.Millisecond
)

// parse reads a role's flags. It ends the program if they are wrong.
func parse(flags *flag.FlagSet, args []string) {
	_ = flags.Parse(args) // flag.ExitOnError
	if flags.NArg() > 0 {
		fmt.Fprintf(flags.Output(), "unexpected argument %q\n", flags.Arg(0))
		os.Exit(2)
	}
}

func source(stop context.Context, args []string) error {
	flags := flag.NewFlagSet("demo source", flag.ExitOnError)
	path := flags.String("file", "", "read the lines of this file, then end, instead of the machine's counters for ever")
	interval := flags.Duration("interval", time.Second, "from one reading of the machine's counters to the next")
	parse(flags, args)
	var file *os.File
	var err error
	if *path != "" {
		if file, err = os.Open(*path); err != nil {
			return err
		}
		defer file.Close()
	} else if _, err = machineCounters("/proc"); err != nil {
		return fmt.Errorf("cannot read this machine's counters (-file PATH works without them): %w", err)
	} else if *interval <= 0 {
		return fmt.Errorf("-interval must be above 0, not %v", *interval)
	}

	info := &flowctlv1.ComponentInfo{
		Type:             flowctlv1.ComponentType_COMPONENT_TYPE_SOURCE,
		OutputEventTypes: []string{countersType},
	}
	return serve(stop, info, func(member *membership, out *outlet) error {
		sequence := int64(0)
		emit := func(record *feed.Record) error {
			sequence++
			record.Sequence, record.Time = sequence, timestamppb.Now()
			if !record.End {
				member.records.Add(1)
			}
			return out.send(record)
		}
		if file != nil {
			return readFile(stop, file, emit)
		}
		return readMachine(stop, *interval, out.stream.Context().Done(), emit)
	})
}

// readFile emits the lines of file until it ends or stop is done, then the end.
func readFile(stop context.Context, file *os.File, emit func(*feed.Record) error) error {
	lines, size := 0, 0
	counters := func() map[string]float64 {
		return map[string]float64{lineCount: float64(lines), byteCount: float64(size)}
	}
	scanner := bufio.NewScanner(file)
	scanner.Buffer(nil, maxLine+len("\n"))
	scanner.Split(scanLine)
	for stop.Err() == nil && scanner.Scan() {
		lines++
		size += len(scanner.Bytes())
		line := strings.TrimSuffix(scanner.Text(), "\n")
		if !utf8.ValidString(line) { // neither protobuf's strings nor JSON's could carry it
			return fmt.Errorf("%s: line %d is not valid UTF-8", file.Name(), lines)
		}
		if err := emit(&feed.Record{Line: &line, Counters: counters()}); err != nil {
			return err
		}
	}
	switch err := scanner.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return fmt.Errorf("%s: line %d is longer than %d bytes", file.Name(), lines+1, maxLine)
	case err != nil:
		return fmt.Errorf("%s: after line %d: %w", file.Name(), lines, err)
	}
	return emit(&feed.Record{Counters: counters(), End: true})
}

// scanLine is bufio.ScanLines without the loss of a byte: a line keeps its \r,
// and its \n to be counted.
func scanLine(data []byte, atEOF bool) (int, []byte, error) {
	n := bytes.IndexByte(data, '\n') + 1
	if n == 0 && atEOF {
		n = len(data)
	}
	if n == 0 {
		return 0, nil, nil
	}
	return n, data[:n], nil
}

// readMachine emits the machine's counters each interval until stop is done,
// then the end. It returns errReaderGone when gone is closed.
func readMachine(stop context.Context, interval time.Duration, gone <-chan struct{}, emit func(*feed.Record) error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		counters, err := machineCounters("/proc")
		if err != nil {
			return err
		}
		end := stop.Err() != nil
		if err := emit(&feed.Record{Counters: counters, End: end}); err != nil || end {
			return err
		}
		select {
		case <-tick.C:
		case <-stop.Done():
		case <-gone:
			return errReaderGone
		}
	}
}

// machineCounters reads the counters below the folder proc, which is /proc
// outside tests.
func machineCounters(proc string) (map[string]float64, error) {
	stat, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return nil, err
	}
	network, err := os.ReadFile(filepath.Join(proc, "net/dev"))
	if err != nil {
		return nil, err
	}
	counters := map[string]float64{}
	add := func(name string, values ...string) {
		for _, value := range values {
			n, e := strconv.ParseFloat(value, 64)
			if e != nil {
				err = fmt.Errorf("%s: %s: %w", proc, name, e)
			}
			counters[name] += n
		}
	}
	for line := range strings.Lines(string(stat)) {
		switch f := strings.Fields(line); {
		case len(f) < 2:
		case f[0] == "cpu" && len(f) > 8: // user nice system idle iowait irq softirq steal, then what user includes
			add(cpuBusy, f[1], f[2], f[3], f[6], f[7], f[8])
			add(cpuIdle, f[4], f[5])
		case f[0] == "ctxt":
			add(switches, f[1])
		case f[0] == "processes":
			add(forks, f[1])
		}
	}
	for line := range strings.Lines(string(network)) {
		name, rest, _ := strings.Cut(line, ":")
		if f := strings.Fields(rest); len(f) > 8 && strings.TrimSpace(name) != "lo" {
			add(netInput, f[0])
			add(netOutput, f[8])
		}
	}
	return counters, err
}

func processor(stop context.Context, args []string) error {
	parse(flag.NewFlagSet("demo processor", flag.ExitOnError), args)
	info := &flowctlv1.ComponentInfo{
		Type:             flowctlv1.ComponentType_COMPONENT_TYPE_PROCESSOR,
		InputEventTypes:  []string{countersType},
		OutputEventTypes: []string{ratesType},
	}
	return serve(stop, info, func(member *membership, out *outlet) error {
		in, err := member.open(stop, inputGrace)
		if err != nil {
			return err
		}
		defer in.close()
		defer context.AfterFunc(out.stream.Context(), func() { in.cancel(errReaderGone) })()
		var m meter
		for {
			record, err := in.next()
			if err != nil {
				return err
			}
			record.Rates = m.rates(record)
			if err := out.send(record); err != nil {
				return err
			}
			if record.End {
				// Not before the reader has it all. So a source that
				// ended with 0 knows that its records are in the sink's file.
				in.acknowledge()
				return nil
			}
			member.records.Add(1)
		}
	})
}

// meter turns counters into rates.
type meter struct {
	base    *feed.Record // what the next rates are measured from
	current map[string]float64
}

// rates returns what the counters grew by per second, measured over rateWindow
// or more; until that has passed again it returns the same rates, at first none.
// A counter that shrank was reset: it has no rate.
func (m *meter) rates(record *feed.Record) map[string]float64 {
	if m.base == nil {
		m.base = record
	}
	elapsed := record.Time.AsTime().Sub(m.base.Time.AsTime())
	if elapsed < 0 { // the clock was set back
		m.base = record
	}
	if elapsed < rateWindow {
		return m.current
	}
	m.current = map[string]float64{}
	for name, value := range record.Counters {
		if base, ok := m.base.Counters[name]; ok && value >= base {
			m.current[name] = (value - base) / elapsed.Seconds()
		}
	}
	m.base = record
	return m.current
}

func sink(stop context.Context, args []string) error {
	flags := flag.NewFlagSet("demo sink", flag.ExitOnError)
	path := flags.String("out", os.DevNull, "write the records to this file, created anew, as JSON lines")
	parse(flags, args)
	file, err := os.Create(*path)
	if err != nil {
		return err
	}
	defer file.Close()
	member, err := join(&flowctlv1.ComponentInfo{
		Type:            flowctlv1.ComponentType_COMPONENT_TYPE_CONSUMER,
		InputEventTypes: []string{ratesType},
	})
	if err != nil {
		return err
	}
	defer member.leave()
	in, err := member.open(stop, outputGrace)
	if err != nil {
		return err
	}
	defer in.close()

	p := &printer{buffer: bufio.NewWriterSize(file, 64<<10)}
	// An error of this flush comes back from the next print.
	quit := every(time.Second, func(context.Context) { _ = p.flush() })
	defer quit()
	for {
		record, err := in.next()
		if err != nil {
			return errors.Join(err, p.flush())
		}
		if record.End {
			quit()
			p.line = nil // the last line below tells of it
			if err := errors.Join(p.flush(), file.Close()); err != nil {
				return err
			}
			in.acknowledge()
			fmt.Println("done:", progress(record))
			return nil
		}
		if err := p.print(record); err != nil {
			return err
		}
		member.records.Add(1)
	}
}

// printer writes records as JSON lines, and tells of them on standard output.
type printer struct {
	mu     sync.Mutex // print and flush run side by side
	buffer *bufio.Writer
	line   *feed.Record // the newest line of a file, until flush has told of it
}

func (p *printer) print(record *feed.Record) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if record.Line != nil {
		p.line = record
	} else {
		fmt.Println(describe(record.Rates))
	}
	encoder := json.NewEncoder(p.buffer)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(struct {
		Sequence int64              `json:"sequence"`
		Time     time.Time          `json:"time"`
		Line     *string            `json:"line,omitempty"`
		Rates    map[string]float64 `json:"rates,omitempty"`
		Counters map[string]float64 `json:"counters"`
	}{record.Sequence, record.Time.AsTime(), record.Line, record.Rates, record.Counters})
}

// flush writes out what the buffer holds, and says how far in a file that is.
func (p *printer) flush() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.line != nil {
		fmt.Println(progress(p.line))
		p.line = nil
	}
	return p.buffer.Flush()
}

func progress(record *feed.Record) string {
	if lines, ok := record.Counters[lineCount]; ok {
		return fmt.Sprintf("%.0f lines, %.0f bytes", lines, record.Counters[byteCount])
	}
	return fmt.Sprintf("%d records", record.Sequence-1)
}

// describe puts a machine's rates into words.
func describe(rates map[string]float64) string {
	if len(rates) == 0 {
		return "first reading, no rates yet"
	}
	cpu := 0.0
	if all := rates[cpuBusy] + rates[cpuIdle]; all > 0 {
		cpu = 100 * rates[cpuBusy] / all
	}
	return fmt.Sprintf("cpu %.1f%%  ctxt %.0f/s  forks %.0f/s  net in %.1f kB/s out %.1f kB/s",
		cpu, rates[switches], rates[forks], rates[netInput]/1000, rates[netOutput]/1000)
}
