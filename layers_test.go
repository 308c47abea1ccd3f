//go:build linux

package main

import (
	"bufio"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// room is a row of the table in docs/architecture.md.
type room struct {
	order int
	wing  string // "" for none
}

// rooms reads the table: a row begins with the name of a file.
func rooms(t *testing.T) map[string]room {
	t.Helper()
	text := get(os.ReadFile("docs/architecture.md"))(t)
	out := make(map[string]room)
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || !strings.HasSuffix(strings.TrimSpace(cells[1]), ".go") {
			continue
		}
		out[strings.TrimSpace(cells[1])] = room{len(out), strings.TrimSpace(cells[2])}
	}
	return out
}

// roomOf is the row that a file belongs to.
func roomOf(file string) string {
	name := strings.TrimSuffix(filepath.Base(file), ".go")
	for _, twin := range []string{"_linux", "_darwin", "_other"} {
		name = strings.TrimSuffix(name, twin)
	}
	return name + ".go"
}

// TestLayers fails for a reference from a file of this package to one below it in the table
// of docs/architecture.md, or from one wing to the other, and where table and files differ.
func TestLayers(t *testing.T) {
	t.Parallel()
	rooms := rooms(t)
	seen := make(map[string]bool)
	files := get(filepath.Glob("*.go"))(t)
	files = slices.DeleteFunc(files, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
	for _, name := range files {
		seen[roomOf(name)] = true
		if _, ok := rooms[roomOf(name)]; !ok {
			t.Errorf("%s: the table of docs/architecture.md has no %s", name, roomOf(name))
		}
	}
	for name := range rooms {
		if !seen[name] {
			t.Errorf("docs/architecture.md: there is no file %s", name)
		}
	}
	wrong := make(map[string]bool)
	uses, fset := typeCheck(t)
	for id, object := range uses {
		if object.Pkg() == nil || object.Pkg().Path() != "main" || object.Parent() == types.Universe {
			continue
		}
		from, to := fset.Position(id.Pos()), fset.Position(object.Pos())
		user, used := rooms[roomOf(from.Filename)], rooms[roomOf(to.Filename)]
		why := ""
		switch {
		case used.order > user.order:
			why = "which is below it"
		case user.wing != used.wing && user.wing != "" && used.wing != "":
			why = "which is of the other wing"
		default:
			continue
		}
		wrong[fmt.Sprintf("%s:%d: refers to %s of %s, %s", filepath.Base(from.Filename), from.Line, object.Name(), filepath.Base(to.Filename), why)] = true
	}
	for _, text := range slices.Sorted(maps.Keys(wrong)) {
		t.Error(text)
	}
}

// typeCheck type-checks the package as it is built here, without its tests.
func typeCheck(t *testing.T) (map[*ast.Ident]types.Object, *token.FileSet) {
	t.Helper()
	out, err := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}}\t{{.Export}}\t{{if not .DepOnly}}{{join .GoFiles \" \"}}{{end}}", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	exports := make(map[string]string)
	var files []*ast.File
	fset := token.NewFileSet()
	for scanner := bufio.NewScanner(strings.NewReader(string(out))); scanner.Scan(); {
		fields := strings.Split(scanner.Text(), "\t")
		exports[fields[0]] = fields[1]
		for _, name := range strings.Fields(fields[2]) {
			f := get(parser.ParseFile(fset, name, nil, parser.SkipObjectResolution))(t)
			files = append(files, f)
		}
	}
	info := &types.Info{Uses: make(map[*ast.Ident]types.Object), Selections: make(map[*ast.SelectorExpr]*types.Selection)}
	config := types.Config{Importer: importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })}
	get(config.Check("main", fset, files, info))(t)
	return info.Uses, fset
}

// What fits a screen, and a sitting. Beyond that a comment has to say why: "It is long
// because ...".
const (
	mostFuncLines = 70
	mostFields    = 25
	mostFileLines = 1000
	longBecause   = "It is long because"
)

// TestSizes fails for a function, a struct or a file that is too long and does not say why.
func TestSizes(t *testing.T) {
	t.Parallel()
	files := get(filepath.Glob("*.go"))(t)
	fset := token.NewFileSet()
	for _, name := range files {
		f := get(parser.ParseFile(fset, name, nil, parser.ParseComments|parser.SkipObjectResolution))(t)
		long := func(what string, n, most int, doc ...*ast.CommentGroup) {
			said := slices.ContainsFunc(doc, func(c *ast.CommentGroup) bool { return strings.Contains(c.Text(), longBecause) })
			if n > most && !said {
				t.Errorf("%s: %s has %d, which is more than %d, and no comment %q", name, what, n, most, longBecause)
			}
		}
		long("the file, in lines,", fset.File(f.Pos()).LineCount(), mostFileLines, f.Comments...)
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				long("func "+d.Name.Name+", in lines,", fset.Position(d.End()).Line-fset.Position(d.Pos()).Line+1, mostFuncLines, d.Doc)
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if s, ok := spec.(*ast.TypeSpec); ok {
						if fields, ok := s.Type.(*ast.StructType); ok {
							long("type "+s.Name.Name+", in fields,", fields.Fields.NumFields(), mostFields, d.Doc, s.Doc)
						}
					}
				}
			}
		}
	}
}
