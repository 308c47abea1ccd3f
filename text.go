// What makes a text safe to show, or short; and the forms of lines, JSON and durations
// that several files write.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	maxCell   = 60 // characters of a text in a table
	maxListed = 5  // ids in a line
	maxQuoted = 80 // characters of a text that is quoted
)

// clean is printable for a table: a long text is cut.
func clean(text string) string {
	text = printable(text)
	if utf8.RuneCountInString(text) > maxCell {
		text = string([]rune(text)[:maxCell-3]) + "..."
	}
	return text
}

// printable makes text that a component chose fit to be shown: control characters
// and bytes that are no UTF-8 become a mark.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == utf8.RuneError || r == '\u2028' || r == '\u2029' {
			return '\uFFFD'
		}
		return r
	}, text)
}

// printableLines is printable for a text of several lines.
func printableLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	return strings.Join(lines, "\n")
}

// enumerate lists ids, of many only the first few.
func enumerate(ids []string) string {
	if len(ids) > maxListed {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:maxListed], ", "), len(ids)-maxListed)
	}
	return strings.Join(ids, ", ")
}

// quote puts a text into quotation marks, escaped and not too long.
func quote(s string) string { return strconv.Quote(clip(s)) }

// clip shortens a text to maxQuoted characters, the last of which tells that.
func clip(s string) string {
	count := 0
	for i := range s {
		if count == maxQuoted {
			return s[:i] + "…"
		}
		count++
	}
	return s
}

// shellWord quotes s for a shell if that is needed.
func shellWord(s string) string {
	if plainWord().MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// pattern gives a regular expression that is compiled when it is first used: all of them took a quarter of
// what each start allocates, and most commands, and the guard, use none.
func pattern(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}

var plainWord = pattern(`^[\w./-]+$`)

// nearest returns the known name that is most like name, "" if none is like it.
func nearest(name string, known []string) string {
	plain := func(s string) string { return strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(s)) }
	want := plain(clip(name))
	best, limit := "", min(len(want)/2, 3)+1
	for _, k := range known {
		if k := plain(k); max(len(want)-len(k), len(k)-len(want)) >= limit {
			continue
		}
		if d := distance(want, plain(k)); d < limit {
			best, limit = k, d
		}
	}
	return best
}

// unknownError is of an id that no component has.
type unknownError struct {
	id    string
	known []string
}

func (e *unknownError) Error() string {
	text := fmt.Sprintf("no component %q is in the pipeline", clip(e.id))
	if near := nearest(e.id, e.known); near != "" {
		return fmt.Sprintf("%s, did you mean %q?", text, near)
	}
	return fmt.Sprintf("%s: there is %s", text, enumerate(e.known))
}

// distance is the number of bytes to insert, delete and replace to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// dash is value, or a dash where there is none.
func dash(ok bool, value any) string {
	if !ok {
		return "-"
	}
	return fmt.Sprint(value)
}

// ago says how long ago something was, shorter for a longer time.
func ago(d time.Duration) string {
	if d < 10*time.Second {
		return max(d, 0).Round(100*time.Millisecond).String() + " ago"
	}
	return d.Round(time.Second).String() + " ago"
}

// writeJSON writes v as JSON, indented or in a line. Characters that could do something
// to a terminal are escaped. Where v cannot be JSON nothing is written.
func writeJSON(w io.Writer, v any, indented bool) error {
	enc := json.NewEncoder(jsonEscaper{w})
	enc.SetEscapeHTML(false)
	if indented {
		enc.SetIndent("", "  ")
	}
	return enc.Encode(v)
}

// jsonEscaper writes JSON to w, whole characters at a time, by way of escapeJSON.
type jsonEscaper struct{ w io.Writer }

func (e jsonEscaper) Write(text []byte) (int, error) {
	_, err := e.w.Write(escapeJSON(text))
	return len(text), err
}

// escapeJSON escapes the control and format characters that encoding/json leaves as they
// are. They can only be in strings.
func escapeJSON(text []byte) []byte {
	control := func(r rune) bool { return r >= 0x7f && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r)) }
	if i := slices.IndexFunc(text, func(b byte) bool { return b >= 0x7f }); i < 0 || !bytes.ContainsFunc(text[i:], control) {
		return text
	}
	var out []byte
	for _, r := range string(text) {
		high, low := utf16.EncodeRune(r)
		switch {
		case !control(r):
			out = utf8.AppendRune(out, r)
		case high == unicode.ReplacementChar: // it needs no pair
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		}
	}
	return out
}

// cut shortens a line to width characters, without a mark.
func cut(line string, width int) string {
	count := 0
	for i := range line {
		if count == width {
			return line[:i]
		}
		count++
	}
	return line
}

// cutLine takes the first line off lines, without its newline and a CR before that. Each line that a
// component prints passes it: bytes.Cut and bytes.TrimSuffix take a tenth of all processor time.
func cutLine(lines []byte) (line, rest []byte) {
	line = lines
	if end := bytes.IndexByte(lines, '\n'); end >= 0 {
		line, rest = lines[:end], lines[end+1:]
	}
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	return line, rest
}

// durationText has slog write durations as Go does, such as 1.5s, in JSON too.
func durationText(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}
