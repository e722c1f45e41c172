// SPDX-License-Identifier: Apache-2.0

// Package main is the border linter: it reads every source file of the repository and reports what crosses a
// border that docs/design.md draws. It parses files one by one and never type-checks, so that it answers in
// well under a second and also while a package does not compile.
//
// Usage: borders [repository root]. It prints one line a finding and exits with status 1 when there are any.
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// module is the path under which the packages of this repository import one another.
const module = "github.com/llm-datadist-open/llm-datadist/"

// mayImport lists for each package of the module which others it may import. The packages stand in the order of
// the dependencies, and a name that ends in /... stands for everything below it. A package takes the rule of its
// own name or else of the nearest /... above it; one under core without a rule is a finding, so that a new package
// gets its place here on the day it is made.
var mayImport = map[string][]string{
	"core/status":          {},
	"core/testkit":         {},
	"core/mem":             {"core/status"},
	"core/testkit/...":     {"core/mem", "core/status"},
	"core/testkit/library": {"core/testkit/...", "core/transport/native", "core/plan", "core/mem", "core/status"},
	"core/plan":            {"core/mem", "core/status"},
	"core/directory":       {"core/plan", "core/mem", "core/status"},
	"core/cache":           {"core/directory", "core/plan", "core/mem", "core/status"},
	"core/transport":       {"core/directory", "core/plan", "core/mem", "core/status"},
	"core/transport/...":   {"core/transport", "core/transport/...", "core/directory", "core/plan", "core/mem", "core/status"},
	"core/link":            {"core/transport", "core/transport/...", "core/directory", "core/plan", "core/mem", "core/status"},
	"core/engine":          {"core/..."},
	"capi/...":             {"capi/...", "core/transport", "core/transport/...", "core/directory", "core/plan", "core/mem", "core/status"},
	"pyext/backend":        {"capi/...", "core/..."},
	"pyext":                {"pyext/backend", "core/..."},
	"benchmarks/...":       {"benchmarks/...", "core/..."},
	"tools/...":            {},
}

// forTests are the packages that tests of all others may import, and nothing else but one another, where the rules above let them.
var forTests = []string{"core/testkit/..."}

// Where the dangerous imports may stand. cgo itself needs no unsafe here: generated code is not in the repository.
var (
	unsafeIn = []string{"core/mem", "pyext"}
	cgoIn    = []string{"capi/..."}
)

// virtualTime is what the comment on a test's call of time.Sleep says that stands in a testing/synctest bubble: there it
// moves a clock that no machine can delay. Without these words on its own line, and outside tests, time.Sleep is a finding.
const virtualTime = "virtual time"

// licence is the line that each source file carries within its first licenceLines lines.
const (
	licence      = "SPDX-License-Identifier: Apache-2.0"
	licenceLines = 5
)

// swallowed matches a Python handler that catches everything and says nothing.
var swallowed = regexp.MustCompile(
	`(?m)^[ \t]*except[ \t]*(?:\(?[^:\n]*\b(?:Base)?Exception\b[^:\n]*)?:[ \t]*(?:#.*)?\n?[ \t]*(?:pass|\.\.\.)[ \t]*(?:#.*)?$`)

func main() {
	root := "."
	if len(os.Args) > 1 {
		root = os.Args[1]
	}
	findings, err := check(os.DirFS(root))
	if err != nil {
		fmt.Fprintln(os.Stderr, "borders:", err)
		os.Exit(2)
	}
	for _, finding := range findings {
		fmt.Println(finding)
	}
	if len(findings) > 0 {
		os.Exit(1)
	}
}

// check returns the findings of every source file under root, in the order of the files' names.
func check(root fs.FS) ([]string, error) {
	var findings []string
	err := fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			if skipped(name) {
				return fs.SkipDir
			}
			return nil
		}
		if !isSource(name) || !entry.Type().IsRegular() {
			return nil
		}
		text, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		findings = append(findings, checkFile(name, text)...)
		return nil
	})
	return findings, err
}

// skipped tells which folders hold no source of ours: hidden ones, and what tools put there.
func skipped(folder string) bool {
	base := path.Base(folder)
	if strings.HasPrefix(base, ".") && folder != "." && folder != ".ci" {
		return true
	}
	return slices.Contains([]string{"vendor", "build", "dist", "testdata", "__pycache__"}, base) || strings.HasSuffix(base, ".egg-info")
}

func isSource(name string) bool {
	return slices.Contains([]string{".go", ".py", ".c", ".h", ".cc", ".s", ".sh"}, path.Ext(name)) ||
		path.Base(name) == "Makefile" || strings.HasPrefix(name, ".ci/")
}

func checkFile(name string, text []byte) []string {
	var findings []string
	if head := strings.SplitN(string(text), "\n", licenceLines+1); len(text) > 0 &&
		!strings.Contains(strings.Join(head[:min(len(head), licenceLines)], "\n"), licence) {
		findings = append(findings, fmt.Sprintf("%s:1: no line %q near the top", name, licence))
	}
	switch path.Ext(name) {
	case ".go":
		findings = append(findings, checkGo(name, text)...)
	case ".py":
		for _, at := range swallowed.FindAllIndex(text, -1) {
			line := 1 + strings.Count(string(text[:at[0]]), "\n")
			findings = append(findings, fmt.Sprintf("%s:%d: catches every exception and says nothing", name, line))
		}
	}
	return findings
}

func checkGo(name string, text []byte) []string {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, name, text, parser.SkipObjectResolution|parser.ParseComments)
	if err != nil {
		return []string{fmt.Sprintf("%s:1: does not parse: %v", name, err)}
	}
	var findings []string
	report := func(at token.Pos, form string, arguments ...any) {
		findings = append(findings, fmt.Sprintf("%s:%d: %s", name, files.Position(at).Line, fmt.Sprintf(form, arguments...)))
	}
	folder := path.Dir(name)
	allowed, known := rule(folder)
	if !known && strings.HasPrefix(folder, "core/") {
		report(file.Package, "package %s has no rule in tools/lint/borders: give it one", folder)
	}
	for _, spec := range file.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue // the parser took it, so this is not reached
		}
		if complaint := importComplaint(name, folder, imported, allowed, known); complaint != "" {
			report(spec.Pos(), "%s", complaint)
		}
	}
	if strings.HasPrefix(folder, "core/") {
		isTest := strings.HasSuffix(name, "_test.go")
		marked := linesThatSay(virtualTime, files, file)
		for _, sleep := range sleeps(file) {
			switch {
			case !isTest:
				report(sleep.at, "time.Sleep is no synchronisation: wait for the event itself")
			case !sleep.isCall || !marked[files.Position(sleep.at).Line]:
				report(sleep.at, "time.Sleep is no synchronisation: wait for the event itself, "+
					"or say on this line where it is a call in a synctest bubble: // %s: <why>", virtualTime)
			}
		}
	}
	return findings
}

// importComplaint tells what is wrong with the import of imported by the file name in folder, or "".
func importComplaint(name, folder, imported string, allowed []string, known bool) string {
	isTest := strings.HasSuffix(name, "_test.go")
	inner, ours := strings.CutPrefix(imported, module)
	switch {
	case imported == "unsafe" && !matches(unsafeIn, folder):
		return "imports unsafe, which only " + strings.Join(unsafeIn, " and ") + " may"
	case imported == "C" && !matches(cgoIn, folder):
		return "uses cgo, which only capi may"
	case strings.HasPrefix(imported, "github.com/stretchr/testify") && !isTest:
		return "imports testify outside a test"
	case !ours || inner == folder:
		return ""
	case matches(forTests, inner) && isTest:
		return ""
	case matches(forTests, inner) && !matches(forTests, folder):
		return "imports " + inner + " outside a test"
	case matches([]string{"capi/..."}, inner) && !matches([]string{"pyext/backend", "capi/..."}, folder):
		return "imports " + inner + ", which only pyext/backend may"
	case known && !matches(allowed, inner):
		return fmt.Sprintf("%s may not import %s: dependencies run one way", folder, inner)
	}
	return ""
}

// rule finds what folder may import: its own rule, or that of the nearest /... above it.
func rule(folder string) (allowed []string, known bool) {
	if allowed, known = mayImport[folder]; known {
		return allowed, true
	}
	for above := folder; above != "."; above = path.Dir(above) {
		if allowed, known = mayImport[above+"/..."]; known {
			return allowed, true
		}
	}
	return nil, false
}

// matches tells whether folder is one of names, or lies at or below one that ends in /... .
func matches(names []string, folder string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		above, isTree := strings.CutSuffix(name, "/...")
		return name == folder || isTree && (folder == above || strings.HasPrefix(folder, above+"/"))
	})
}

// sleep is a use of time.Sleep.
type sleep struct {
	at     token.Pos
	isCall bool // and not, for example, an assignment, which hides the calls
}

// sleeps finds the uses of time.Sleep in file, under whatever name it imports time.
func sleeps(file *ast.File) []sleep {
	local := ""
	for _, spec := range file.Imports {
		if spec.Path.Value == `"time"` {
			local = "time"
			if spec.Name != nil {
				local = spec.Name.Name
			}
		}
	}
	if local == "" {
		return nil
	}
	var found []sleep
	called := map[ast.Expr]bool{}
	ast.Inspect(file, func(node ast.Node) bool {
		if call, ok := node.(*ast.CallExpr); ok {
			called[call.Fun] = true
			return true
		}
		selected, ok := node.(*ast.SelectorExpr)
		if !ok || selected.Sel.Name != "Sleep" {
			return true
		}
		if receiver, ok := selected.X.(*ast.Ident); ok && receiver.Name == local {
			found = append(found, sleep{selected.Pos(), called[selected]})
		}
		return true
	})
	return found
}

// linesThatSay finds the lines of file that carry a comment with phrase in it.
func linesThatSay(phrase string, files *token.FileSet, file *ast.File) map[int]bool {
	lines := map[int]bool{}
	for _, group := range file.Comments {
		for _, comment := range group.List {
			first := files.Position(comment.Pos()).Line
			for i, text := range strings.Split(comment.Text, "\n") {
				if strings.Contains(text, phrase) {
					lines[first+i] = true
				}
			}
		}
	}
	return lines
}
