package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// schemaAllows evaluates the keywords that the schema uses for a value without parts.
func schemaAllows(t *testing.T, schema map[string]any, value any) bool {
	t.Helper()
	text, isText := value.(string)
	number, isNumber := value.(float64)
	for keyword, want := range schema {
		ok := true
		switch keyword {
		case "type":
			ok = want == "string" && isText || want == "integer" && isNumber && number == float64(int64(number))
		case "pattern":
			ok = !isText || regexp.MustCompile(want.(string)).MatchString(text)
		case "enum":
			ok = slices.Contains(want.([]any), value)
		case "minLength":
			ok = !isText || utf8.RuneCountInString(text) >= int(want.(float64))
		case "minimum":
			ok = !isNumber || number >= want.(float64)
		case "maximum":
			ok = !isNumber || number <= want.(float64)
		case "not":
			ok = !schemaAllows(t, want.(map[string]any), value)
		case "anyOf":
			ok = slices.ContainsFunc(want.([]any), func(s any) bool { return schemaAllows(t, s.(map[string]any), value) })
		default:
			t.Fatalf("unknown keyword %s", keyword)
		}
		if !ok {
			return false
		}
	}
	return true
}

// The schema allows each value that reading takes, and refuses what reading refuses but
// for what its comment names: those rows are lax.
func TestSchema_AgreesWithReading(t *testing.T) {
	t.Parallel()
	var schema struct {
		Defs struct {
			Component struct{ Properties map[string]map[string]any }
		} `json:"$defs"`
	}
	data, err := json.Marshal(pipelineSchema())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &schema); err != nil {
		t.Fatal(err)
	}
	const check = `"command": ["x"], "health_check": "exec:x", `
	for _, tt := range []struct {
		field, beside string // another field that it needs
		takes         []string
		refuses       []string
		lax           []string // reading refuses them, the schema does not
	}{
		{"id", `"command": ["x"], `,
			[]string{"a", "A.b_c-9", ".a", "a.", "...", "..a", "-", strings.Repeat("x", 63), "${ID}", "x${EMPTY}"},
			[]string{"", ".", "..", "a b", "a/b", "é", "a\n", "$ID", "a$$b", strings.Repeat("x", 64)},
			[]string{"${HOME}", "${NOPE}", "${", "$${ID}"}},
		{"start_timeout", `"command": ["x"], `,
			[]string{"5s", ".5s", "5.s", "0.5s", "5.0s", "+5s", "+.5s", "1h30m", "1h30m.5s", "1.5h30m", "500ms", "1ms", "24h", "1000us", "1000µs", "1000μs", "1000000ns", "007s", "${WAIT}", "${NOPE:-1s}"},
			[]string{"", "5", "0", "-5s", "-.5s", "--5s", "++5s", "s", ".s", "+", ".", "5 s", " 5s", "5s ", "5s\n", "1e3s", "1,5s", "5S", "1d", "1h-30m", "5ss", "5s30", "$WAIT", "٣s", "Inf"},
			[]string{"0s", "+0s", "1us", "24h1ns", "25h", "99999999999999999999h", "${HOME}"}},
		{"stop_signal", `"command": ["x"], `, []string{"SIGTERM", "SIGKILL", "${NOPE:-SIGINT}"}, []string{"", "TERM", "sigterm", "15", "SIGTERM ", "$SIG"}, []string{"${HOME}"}},
		{"restart_policy", `"command": ["x"], `, []string{"no", "on-failure", "always", "${NOPE:-no}"}, []string{"", "No", "never", "on-failure\n"}, []string{"${HOME}"}},
		{"working_dir", `"command": ["x"], `, []string{"/a", "a", ".", "~a", "a~/", "a/~", "${HOME}", " "}, []string{"", "~", "~/", "~/a", "~/${ID}"}, []string{"${EMPTY}", "~${EMPTY}"}},
		{"user", `"image": "i", `, []string{"0", "a:b", "${ID}"}, []string{""}, []string{"${EMPTY}"}},
		{"image", "", []string{"redis:7", "a/b@sha256:0", "x-", "${ID}:1", "${NOPE:-a}"}, []string{"", "-x", "--privileged", "a b", " a", "a\n", "a\tb", "-"}, []string{"-${ID}", "a ${ID}", "${EMPTY}"}},
		{"volumes", `"image": "i", `,
			[]string{"./a:/b", "/a:/b:ro", "name:/b", "a:/", "a:/b:", "${HOME}:/b", "~a:/b", "a b:/c d"},
			[]string{"", "a", ":/b", "a:b", "./a:b", "~:/b", "~/a:/b", "a:/b:ro:z", "a::/b"},
			[]string{"${HOME}", "${EMPTY}:/b", "${HOME}:b", "${ID}:/b:ro:z"}},
		{"ports", `"image": "i", `,
			[]string{"80:80", "127.0.0.1:8080:80", "[::1]:1:2", "53:53/udp", "53:53/tcp", "1:1/sctp", "080:080", "65535:65535", "${PORT}:80"},
			[]string{"", "80", ":80", "80:", "a:80", "80:80/", "80:80/icmp", "80:80/UDP", "::1:80:80", "x:80:80", " 80:80", "80:80\n", "-1:80", "+80:80", "80-81:80-81"},
			[]string{"0:80", "80:0", "65536:80", "80:99999999999999999999", "${HOME}:80"}},
		{"health_check", `"command": ["x"], `,
			[]string{"http://h", "http://h/", "https://[::1]:443/x?y=z#f", "http://u@h", "http://h:$HEALTH_PORT/x", "http://h:$${HEALTH_PORT}/x", "http://$HEALTH_PORT", "tcp://h:1", "tcp://[::1]:65535",
				"tcp://h:$HEALTH_PORT", "grpc://h:1", "grpc://h:1/", "grpc://h:1/a.B/c", "grpc://h:$HEALTH_PORT/s", "exec:x", "exec: x y", "exec:'a b' \"c\"", "exec:\nx", "exec:\n\nx", "exec:$x", "http://${ID}:1/"},
			[]string{"", "h", "h:80", "/health", "http:", "http:h", "http://", "http:///x", "http://?x", "HTTP://h", "ftp://h", " http://h", "tcp:h:1", "tcp://", "tcp://h", "tcp://:1/", "tcp://h/:1", "grpc://h", "grpc://h:", "grpc://h/s", "exec", "exec:", "Exec:x"},
			[]string{"http://:80", "http://h:0", "http://h:65536", "http://h:$PORT/", "http://a b/", "http://h/%zz", "tcp://h:1/x", "tcp://u@h:1", "tcp://h:1?x", "grpc://h:1?x", "grpc://h:0", "exec: ", "exec:\n", "exec:''", "exec:'x", "${HOME}"}},
		{"env_files", `"command": ["x"], `, []string{"a", "/a", "${HOME}/a"}, []string{"", "~", "~/a"}, nil},
		{"output_event_types", `"command": ["x"], `, []string{"a", " ", "é"}, []string{""}, []string{"${EMPTY}"}},
		{"health_interval", check, []string{".5s"}, []string{"5"}, []string{"0s"}},
		{"type", `"command": ["x"], `, []string{"", "anything", "${HOME}"}, nil, []string{"${NOPE}", "a\x00"}},
	} {
		test := func(value string, taken, allowed bool) {
			quoted, _ := json.Marshal(value)
			given, property := string(quoted), schema.Defs.Component.Properties[tt.field]
			switch property["type"] {
			case "array":
				given, property = "["+given+"]", property["items"].(map[string]any)
			case "object":
				given, property = `{"A": `+given+"}", property["additionalProperties"].(map[string]any)
			}
			in := specFile(fmt.Sprintf(`"sources": [{"id": "x", %s"%s": %s}]`, tt.beside, tt.field, given))
			if tt.field == "id" {
				in = specFile(fmt.Sprintf(`"sources": [{%s"id": %s}]`, tt.beside, given))
			}
			if _, err := parsePipeline([]byte(in), "p.json", pipelineEnv); (err == nil) != taken {
				t.Errorf("%s %q: reading it, %v", tt.field, value, err)
			}
			if got := schemaAllows(t, property, value); got != allowed {
				t.Errorf("%s %q: the schema allows it: %t", tt.field, value, got)
			}
		}
		for _, value := range tt.takes {
			test(value, true, true)
		}
		for _, value := range tt.refuses {
			test(value, false, false)
		}
		for _, value := range tt.lax {
			test(value, false, true)
		}
	}
}

// Whole numbers are the same to the schema and to reading, but for 1.0 and 1e3.
func TestSchema_NumbersAgreeWithReading(t *testing.T) {
	t.Parallel()
	for rule, rows := range map[string]map[string]bool{
		"health_retries": {"1": true, "3": true, "2147483647": true, "0": false, "-1": false, "1.5": false, "2147483648": false},
		"max_restarts":   {"0": true, "1": true, "2147483647": true, "-1": false, "2147483648": false},
	} {
		for value, want := range rows {
			in := commandFile(`"health_check": "exec:x", "restart_policy": "always", "` + rule + `": ` + value)
			if _, err := parsePipeline([]byte(in), "p.json", pipelineEnv); (err == nil) != want {
				t.Errorf("%s %s: reading it, %v", rule, value, err)
			}
			var number any
			data, _ := json.Marshal(pipelineSchema()["$defs"].(map[string]any)["Component"].(map[string]any)["properties"].(map[string]any)[rule])
			var schema map[string]any
			if err := json.Unmarshal(data, &schema); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(value), &number); err != nil {
				t.Fatal(err)
			}
			if got := schemaAllows(t, schema, number); got != want {
				t.Errorf("%s %s: the schema allows it: %t", rule, value, got)
			}
		}
	}
}
