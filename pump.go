package main

// How the output of a process is read: in whole lines, and what waits for the end of its line.

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	minBuffer = 16 << 10 // bytes of an output pump; it grows while a line does not fit
	pipeSize  = 64 << 10 // bytes that a pipe holds, pipe(7): the pump of one that is found full grows to it
	tailSize  = 4 << 10  // bytes of a component's last output that are kept for a report

	partTime  = time.Second // that text waits for the end of its line before it is passed on as a part
	fullWrite = 4096        // bytes of which the buffers of programs are multiples: output that ends so is no pause, a buffer was full
)

// emitter takes what a component has printed: whole lines, each with its newline, or, without a
// newline at its end, the beginning of a line that goes on later. It has had the first shown bytes
// as such a beginning before. It must not keep the bytes. The pumps call it, one call at a time
// per stream.
type emitter func(id, stream string, text []byte, shown int)

// pump passes on what comes from r, in whole lines, until r ends. Of a line that has not ended after
// partTime it passes on what there is.
type pump struct {
	id, stream string
	r          *os.File
	emit       emitter
	tail       *tail
	caughtUp   chan struct{} // closed when what r held when that was asked for was passed on, or at the end

	mu    sync.Mutex // guards the fields below, and the deadline of r
	ended bool       // the process has ended: what r holds is all, because a process that lives on may hold the other end
	asked bool       // somebody waits for caughtUp
	woken bool       // run has not seen that one of them was set

	// Only the goroutine of run uses these.
	buf   []byte    // what was not passed on, but for its first shown bytes
	shown int       // bytes of buf that were passed on as a part of a line
	since time.Time // when the first byte came that can be passed on as a part, zero for none
	armed bool      // r has a deadline
	total int       // bytes that were read
}

func newPump(id, stream string, r *os.File, emit emitter, tail *tail) *pump {
	return &pump{id: id, stream: stream, r: r, emit: emit, tail: tail, caughtUp: make(chan struct{}), buf: make([]byte, 0, minBuffer)}
}

// wake sets one of the flags that mu guards, and has run look at them.
func (p *pump) wake(flag *bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	*flag, p.woken = true, true
	_ = p.r.SetReadDeadline(time.Unix(1, 0))
}

// arm has run look at the unfinished line at the time at, unless it is to wake up at once.
func (p *pump) arm(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.woken {
		_ = p.r.SetReadDeadline(at)
	}
	p.armed = true
}

// disarm takes the deadline away that has woken run up, and returns the flags.
func (p *pump) disarm() (ended, asked bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.woken, p.armed = false, false
	_ = p.r.SetReadDeadline(time.Time{})
	return p.ended, p.asked
}

// run passes on all that comes, and closes r.
func (p *pump) run() {
	var ended, asked, caughtUp, leftover bool // leftover: only what the pipe holds is read
	defer func() {
		p.r.Close()
		if !caughtUp {
			close(p.caughtUp)
		}
	}()
	read := p.r.Read
	for {
		room := min(cap(p.buf), max(len(p.buf), maxLine)+1) - len(p.buf) // no more of a line than tells whether it is too long
		n, err := read(p.buf[len(p.buf) : len(p.buf)+room])
		p.total += n
		p.buf = passLines(p.buf[:len(p.buf)+n], p.passOn)
		if n == room && cap(p.buf) < pipeSize {
			p.buf = slices.Grow(p.buf, pipeSize-len(p.buf))
		}
		if n > 0 && p.since.IsZero() && len(p.buf) > p.shown {
			if p.since = time.Now(); !p.armed {
				p.arm(p.since.Add(partTime))
			}
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			ended, asked = p.disarm()
			read, leftover = readLeftover(p.r), true
		case err != nil && (ended || !leftover):
			if len(p.buf) > 0 {
				p.passOn(append(p.buf, '\n'))
			}
			return
		case err != nil:
			read, leftover = p.r.Read, false
			if asked && !caughtUp {
				caughtUp = true
				close(p.caughtUp)
			}
			p.passOnPart(time.Now())
		}
	}
}

// passOn passes on whole lines, the first of buf.
func (p *pump) passOn(lines []byte) {
	p.tail.add(lines)
	p.emit(p.id, p.stream, lines, p.shown)
	p.shown, p.since = 0, time.Time{}
}

// passOnPart passes on what can be shown of a line that has waited for its end for long enough.
func (p *pump) passOnPart(now time.Time) {
	switch {
	case p.since.IsZero():
		return
	case now.Sub(p.since) < partTime:
		if !p.armed {
			p.arm(p.since.Add(partTime))
		}
		return
	}
	p.since = time.Time{} // until more comes
	if part := showable(p.buf); len(part) > p.shown && p.total%fullWrite != 0 {
		p.emit(p.id, p.stream, part, p.shown)
		p.shown = len(part)
	}
}

// showable returns what can be shown of a line that goes on later: no half of a character, and no CR
// at its end, which the next byte may make a part of that end.
func showable(line []byte) []byte {
	for n := 1; n < utf8.UTFMax && n <= len(line); n++ {
		if last := line[len(line)-n:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				line = line[:len(line)-n]
			}
			break
		}
	}
	return bytes.TrimRight(line, "\r")
}

// passLines calls passOn with the whole lines of buf, or with the first maxLine bytes of a
// line that is longer, and returns the rest with room to read more. A CR behind maxLine bytes
// is waited with until the next byte shows whether it belongs to the end of the line.
func passLines(buf []byte, passOn func([]byte)) []byte {
	if i := bytes.LastIndexByte(buf, '\n'); i >= 0 {
		passOn(buf[:i+1])
		buf = buf[:copy(buf, buf[i+1:])]
	}
	switch {
	case len(buf) > maxLine && (len(buf) > maxLine+1 || buf[maxLine] != '\r'):
		n := maxLine
		if buf[n-1] == '\r' { // which would be taken for the end of a line
			n--
		}
		passOn(append(slices.Clip(buf[:n]), '\n'))
		buf = buf[:copy(buf, buf[n:])]
	case len(buf) == cap(buf):
		grown := make([]byte, len(buf), min(2*cap(buf), maxLine+2))
		copy(grown, buf)
		buf = grown
	}
	return buf
}

// readLeftover returns a function that reads what a pipe without a deadline holds, with EOF where a reader
// would have to wait. It reads no more than a pipe can hold, so that a writer cannot go on for ever.
func readLeftover(r *os.File) func([]byte) (int, error) {
	left := 16 << 20 // pipe(7): a pipe holds 1 MiB at most, unless root has enlarged it
	return func(p []byte) (n int, err error) {
		raw, err := r.SyscallConn()
		if err != nil || left <= 0 {
			return 0, io.EOF
		}
		rawErr := raw.Read(func(fd uintptr) bool {
			n, err = syscall.Read(int(fd), p)
			return true
		})
		if errors.Is(rawErr, os.ErrDeadlineExceeded) {
			return 0, rawErr
		}
		if rawErr != nil || err != nil || n <= 0 {
			return 0, io.EOF
		}
		left -= n
		return n, nil
	}
}

// tail keeps the last tailSize bytes that a process has printed.
type tail struct {
	mu  sync.Mutex
	buf []byte
	cut bool // something came before
}

func (t *tail) add(lines []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(lines); n > tailSize {
		lines, t.cut, t.buf = lines[n-tailSize:], true, t.buf[:0]
	}
	if over := len(t.buf) + len(lines) - tailSize; over > 0 {
		t.buf, t.cut = t.buf[:copy(t.buf, t.buf[over:])], true
	}
	t.buf = append(t.buf, lines...)
}

// Write is add, for the output of a command.
func (t *tail) Write(p []byte) (int, error) {
	t.add(p)
	return len(p), nil
}

// lines returns the last lines, ten at most.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSuffix(string(t.buf), "\n"), "\n")
	if len(t.buf) == 0 {
		return nil
	}
	if t.cut && len(lines) > 1 {
		lines = lines[1:]
	}
	return lines[max(0, len(lines)-10):]
}
