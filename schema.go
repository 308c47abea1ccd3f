package main

// The JSON Schema of a pipeline file, for editors.

import (
	"maps"
	"math"
	"reflect"
	"strings"
)

// pipelineSchema is the JSON Schema (draft 2020-12) of a pipeline file, made from the
// model. It allows everything that reading allows. It does not say the range of a duration
// or of a port, what else is wrong in a URL, nor what depends on other fields.
func pipelineSchema() map[string]any {
	out := structSchema(reflect.TypeFor[Pipeline]())
	out["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	out["title"] = "flowctl pipeline"
	out["$defs"] = map[string]any{"Component": structSchema(reflect.TypeFor[Component]())}
	return out
}

func structSchema(t reflect.Type) map[string]any {
	properties, required := make(map[string]any), []string{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		properties[name] = typeSchema(f.Type, f.Tag.Get("check"))
		if options != "omitempty" {
			required = append(required, name)
		}
	}
	for name, instead := range formerFields[t] {
		properties[name] = map[string]any{"deprecated": true, "description": instead}
	}
	return map[string]any{"type": "object", "properties": properties, "required": required, "additionalProperties": false}
}

// typeSchema is the schema of a value of type t that keeps to rule.
func typeSchema(t reflect.Type, rule string) map[string]any {
	switch {
	case t == reflect.TypeFor[Duration]():
		rule = "duration"
	case t == reflect.TypeFor[Component]():
		return map[string]any{"$ref": "#/$defs/Component"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return typeSchema(t.Elem(), rule)
	case reflect.Struct:
		return structSchema(t)
	case reflect.Slice:
		return map[string]any{"type": "array", "items": typeSchema(t.Elem(), rule)}
	case reflect.Map:
		out := map[string]any{"type": "object"}
		if t.Elem().Kind() != reflect.Interface {
			out["additionalProperties"] = typeSchema(t.Elem(), rule)
		}
		return out
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Int:
		return map[string]any{"type": "integer", "minimum": map[string]int{"from1": 1}[rule], "maximum": math.MaxInt32}
	}
	out := map[string]any{"type": "string"}
	maps.Copy(out, textSchema(rule))
	return out
}

// anyReference matches a text with a ${...}, of which a schema knows nothing.
const anyReference = `\$\{`

func allow(values ...string) []any {
	return []any{map[string]any{"enum": values}, map[string]any{"pattern": anyReference}}
}

// textSchema is the schema of a string that keeps to the rule.
func textSchema(rule string) map[string]any {
	return map[string]map[string]any{
		"version":  {"anyOf": allow("flowctl/v1")},
		"kind":     {"anyOf": allow("Pipeline")},
		"policy":   {"anyOf": allow(restartNo, restartOnFailure, restartAlways)},
		"relay":    {"anyOf": allow("auto", relayOff)},
		"signal":   {"anyOf": allow(stopSignalNames...)},
		"duration": {"pattern": `^\+?(([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$|` + anyReference}, // both ways to write µ
		"name":     {"pattern": namePattern().String() + "|" + anyReference, "not": map[string]any{"enum": []string{".", ".."}}},
		"health":   {"pattern": `^/|^https?://[^/?#]|^(tcp|grpc)://[^/?#]+:[0-9$]|^exec:[\s\S]|` + anyReference},
		"image":    {"pattern": `^[^- \t\r\n][^ \t\r\n]*$|` + anyReference},
		"volume":   {"pattern": `^[^:]+:/[^:]*(:[^:]*)?$|` + anyReference, "not": map[string]any{"pattern": `^~[/:]`}},
		"port":     {"pattern": portPattern().String() + "|" + anyReference},
		"path":     {"minLength": 1, "not": map[string]any{"pattern": `^~(/|$)`}},
		"filled":   {"minLength": 1},
	}[rule]
}
