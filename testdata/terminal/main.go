// Terminal draws docs/terminal.svg: it builds flowctl and the demo, runs them in a
// terminal, tmux(1), and writes what that shows as a picture. From the top of the
// repository:
//
//	go run ./testdata/terminal
package main

import (
	"bytes"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	picture = "docs/terminal.svg"
	command = "flowctl -f testdata/demo.json -heartbeat-ttl 3s"

	columns, rows = 98, 25
	readings      = 6 // lines of the demo's sink before the picture is taken

	// Of the picture, in pixels. A cell is as wide as in most fonts of this size.
	cellWidth, cellHeight, fontSize = 8.0, 18.0, 13
	margin, bar                     = 14.0, 30.0
)

// The terminal's own colours, and the sixteen of ANSI, all of which can be read on
// the background.
const (
	background = "#10151c"
	foreground = "#d5dae0"
)

var palette = [16]string{
	"#7d8590", "#ff7b72", "#56d364", "#e3b341", "#79b8ff", "#d2a8ff", "#56d4dd", "#d5dae0",
	"#8b949e", "#ffa198", "#7ee787", "#f2cc60", "#a5d6ff", "#e2c5ff", "#b3f0ff", "#ffffff",
}

var escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")

func main() {
	log.SetFlags(0)
	log.SetPrefix("terminal: ")
	if err := draw(); err != nil {
		log.Fatal(err)
	}
}

func draw() error {
	if out, err := exec.Command("go", "build", "-o", "bin/", ".", "./testdata/demo").CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %v\n%s", err, out)
	}
	screen, err := capture()
	if err != nil {
		return err
	}
	return os.WriteFile(picture, svg(screen), 0o644)
}

// capture runs the command in a terminal of its own and returns what it shows, with
// the escape sequences of colours.
func capture() (screen string, err error) {
	folder, err := os.MkdirTemp("", "terminal")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(folder)
	tmux := func(args ...string) (string, error) {
		cmd := exec.Command("tmux", append([]string{"-u", "-S", filepath.Join(folder, "tmux"), "-f", "/dev/null"}, args...)...)
		bin, _ := filepath.Abs("bin")
		cmd.Env = append(os.Environ(), "PS1=$ ", "ENV=", "TMUX=", "NO_COLOR=", "XDG_RUNTIME_DIR="+folder,
			"PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("tmux %s: %v\n%s", args[0], err, out)
		}
		return string(out), nil
	}
	if _, err := tmux("new-session", "-d", "-x", fmt.Sprint(columns), "-y", fmt.Sprint(rows), "/bin/sh", "-i"); err != nil {
		return "", err
	}
	defer tmux("kill-server")
	// shows waits until the terminal has a text so often.
	shows := func(text string, times int) error {
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			out, err := tmux("capture-pane", "-p", "-S", "-")
			if err != nil || strings.Count(out, text) >= times {
				return err
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%q is not there %d times:\n%s", text, times, out)
			}
		}
	}
	if err := shows("$", 1); err != nil {
		return "", err
	}
	if _, err := tmux("send-keys", command, "Enter"); err != nil {
		return "", err
	}
	err = errors.Join(shows("printer  | cpu", readings), shows("records=", 3))
	if err == nil {
		screen, err = tmux("capture-pane", "-p", "-e")
	}
	_, _ = tmux("send-keys", "C-c")
	return screen, errors.Join(err, shows("all components have ended", 1))
}

// style is how a cell of the terminal looks.
type style struct {
	colour        string // "" for the terminal's own
	bold, dim, on bool   // on: reversed
}

// apply takes in the numbers of an SGR sequence, ECMA-48 8.3.117.
func (s *style) apply(numbers string) {
	codes := strings.FieldsFunc(numbers, func(r rune) bool { return r == ';' })
	if len(codes) == 0 {
		*s = style{}
	}
	for i := 0; i < len(codes); i++ {
		switch n, _ := strconv.Atoi(codes[i]); {
		case n == 0:
			*s = style{}
		case n == 1:
			s.bold = true
		case n == 2:
			s.dim = true
		case n == 7:
			s.on = true
		case n == 22:
			s.bold, s.dim = false, false
		case n == 27:
			s.on = false
		case n >= 30 && n <= 37:
			s.colour = palette[n-30]
		case n >= 90 && n <= 97:
			s.colour = palette[n-90+8]
		case n == 39:
			s.colour = ""
		case n == 38 && i+2 < len(codes) && codes[i+1] == "5": // one of 256, of which the first are known here
			if c, _ := strconv.Atoi(codes[i+2]); c < len(palette) {
				s.colour = palette[c]
			}
			i += 2
		}
	}
}

func (s style) attributes() string {
	out := ""
	if s.colour != "" {
		out += fmt.Sprintf(` fill="%s"`, s.colour)
	}
	if s.bold {
		out += ` font-weight="bold"`
	}
	if s.dim {
		out += ` opacity="0.7"`
	}
	return out
}

// svg draws a screen. Every piece of text says where it begins and how wide it is, so
// that columns stand below each other in any font.
func svg(screen string) []byte {
	lines := strings.Split(strings.TrimRight(screen, "\n"), "\n")
	width, height := columns*cellWidth+2*margin, float64(len(lines))*cellHeight+bar+margin
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" role="img">`+"\n", width, height)
	fmt.Fprintf(&b, "<title>%s, in a terminal</title>\n", escape.Replace(command))
	fmt.Fprintf(&b, `<rect x="0.5" y="0.5" width="%g" height="%g" rx="8" fill="%s" stroke="#6e7681"/>`+"\n", width-1, height-1, background)
	for i, colour := range []string{"#ff5f57", "#febc2e", "#28c840"} {
		fmt.Fprintf(&b, `<circle cx="%g" cy="15" r="5" fill="%s"/>`+"\n", margin+5+16*float64(i), colour)
	}
	fmt.Fprintf(&b, `<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace" font-size="%d" fill="%s" xml:space="preserve">`+"\n", fontSize, foreground)
	var now style
	for row, line := range lines {
		y, column := bar+float64(row)*cellHeight+13, 0
		for len(line) > 0 {
			if rest, ok := strings.CutPrefix(line, "\x1b["); ok {
				end := strings.IndexFunc(rest, func(r rune) bool { return r >= '@' && r <= '~' })
				if end < 0 {
					break
				}
				if rest[end] == 'm' {
					now.apply(rest[:end])
				}
				line = rest[end+1:]
				continue
			}
			text, _, _ := strings.Cut(line, "\x1b[")
			line = line[len(text):]
			cells := utf8.RuneCountInString(text)
			shown := strings.TrimLeft(text, " ")
			x := margin + float64(column+cells-utf8.RuneCountInString(shown))*cellWidth
			if shown = strings.TrimRight(shown, " "); shown != "" {
				fmt.Fprintf(&b, `<text x="%g" y="%g" textLength="%g"%s>%s</text>`+"\n", x, y, float64(utf8.RuneCountInString(shown))*cellWidth, now.attributes(), escape.Replace(shown))
			}
			column += cells
		}
	}
	b.WriteString("</g>\n</svg>\n")
	return b.Bytes()
}
