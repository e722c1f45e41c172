// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
	"testing/fstest"
)

const spdx = "// SPDX-License-Identifier: Apache-2.0\n\n"

// goFile writes a Go file that imports the given paths; those of this module are given without its name.
func goFile(imports ...string) string {
	text := spdx + "package some\n"
	for _, imported := range imports {
		if strings.HasPrefix(imported, "core") || strings.HasPrefix(imported, "capi") || strings.HasPrefix(imported, "pyext") {
			imported = module + imported
		}
		text += "import _ \"" + imported + "\"\n"
	}
	return strings.ReplaceAll(text, "import _ \"C\"", "import \"C\"")
}

// napping writes a Go file that runs body and imports time.
func napping(body string) string {
	return goFile() + "import \"time\"\nfunc f() {\n\t" + body + "\n}\n"
}

func findingsOf(t *testing.T, name, text string) string {
	t.Helper()
	findings, err := check(fstest.MapFS{name: &fstest.MapFile{Data: []byte(text)}})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(findings, "\n")
}

func TestEachRuleCanFail(t *testing.T) {
	pySPDX := strings.Replace(spdx, "//", "#", 1)
	for _, c := range []struct{ rule, name, text, want string }{
		{"status imports nothing of ours", "core/status/a.go", goFile("core/mem"), "may not import core/mem"},
		{"mem imports only status", "core/mem/a.go", goFile("core/plan"), "may not import core/plan"},
		{"plan stays below cache", "core/plan/a.go", goFile("core/cache"), "may not import core/cache"},
		{"directory stays below transport", "core/directory/a.go", goFile("core/transport"), "may not import core/transport"},
		{"directory stays below link", "core/directory/a.go", goFile("core/link"), "may not import core/link"},
		{"directory stays below engine", "core/directory/a.go", goFile("core/engine"), "may not import core/engine"},
		{"cache knows no transport", "core/cache/a.go", goFile("core/transport/tcp"), "may not import core/transport/tcp"},
		{"cache knows no link", "core/cache/a.go", goFile("core/link"), "may not import core/link"},
		{"cache knows no engine", "core/cache/a.go", goFile("core/engine"), "may not import core/engine"},
		{"transport's root knows no transport", "core/transport/a.go", goFile("core/transport/tcp"), "may not import core/transport/tcp"},
		{"a transport knows no engine", "core/transport/tcp/a.go", goFile("core/engine"), "may not import core/engine"},
		{"a transport knows no link", "core/transport/shm/a.go", goFile("core/link"), "may not import core/link"},
		{"a transport knows no cache", "core/transport/fabric/deep/a.go", goFile("core/cache"), "may not import core/cache"},
		{"a transport's test keeps the rule", "core/transport/tcp/a_test.go", goFile("core/link"), "may not import core/link"},
		{"link knows no engine", "core/link/a.go", goFile("core/engine"), "may not import core/engine"},
		{"core knows no capi", "core/engine/a.go", goFile("capi/ucx"), "only pyext/backend may"},
		{"core's tests know no capi", "core/engine/a_test.go", goFile("capi/ucx"), "only pyext/backend may"},
		{"testkit is for tests", "core/mem/a.go", goFile("core/testkit"), "imports core/testkit outside a test"},
		{"testkit imports nothing of ours", "core/testkit/a.go", goFile("core/mem"), "may not import core/mem"},
		{"a device for tests is for tests", "core/engine/a.go", goFile("core/testkit/device"), "imports core/testkit/device outside a test"},
		{"a library for tests is for tests", "core/transport/a.go", goFile("core/testkit/library"), "outside a test"},
		{"a device for tests knows no cache", "core/testkit/device/a.go", goFile("core/cache"), "may not import core/cache"},
		{"core knows no pyext", "core/engine/a.go", goFile("pyext"), "may not import pyext"},
		{"pyext knows no capi", "pyext/a.go", goFile("capi/cann"), "only pyext/backend may"},
		{"capi knows no cache", "capi/cann/a.go", goFile("core/cache"), "may not import core/cache"},
		{"capi knows no engine", "capi/cann/a.go", goFile("core/engine"), "may not import core/engine"},
		{"benchmarks know no capi", "benchmarks/pull/a.go", goFile("capi/cann"), "only pyext/backend may"},
		{"backend stays below pyext", "pyext/backend/a.go", goFile("pyext"), "may not import pyext"},
		{"a package of core has a rule", "core/util/a.go", goFile(), "has no rule"},
		{"unsafe stays in mem", "core/transport/shm/a.go", goFile("unsafe"), "imports unsafe"},
		{"unsafe stays out of backend", "pyext/backend/a.go", goFile("unsafe"), "imports unsafe"},
		{"tests use no unsafe either", "core/plan/a_test.go", goFile("unsafe"), "imports unsafe"},
		{"cgo stays in capi", "core/mem/a.go", goFile("C"), "uses cgo"},
		{"cgo stays out of pyext", "pyext/a.go", goFile("C"), "uses cgo"},
		{"testify is for tests", "core/plan/a.go", goFile("github.com/stretchr/testify/require"), "imports testify"},
		{"no sleep", "core/link/a.go", goFile() + "import \"time\"\nfunc f() { time.Sleep(1) }\n", "a.go:5: time.Sleep"},
		{"no sleep by another name", "core/link/a.go", goFile() + "import clock \"time\"\nvar nap = clock.Sleep\n", "time.Sleep"},
		{"no sleep in tests", "core/link/a_test.go", goFile() + "import \"time\"\nfunc f() { time.Sleep(1) }\n", "time.Sleep"},
		{"no sleep in tests with another comment", "core/link/a_test.go", napping("time.Sleep(1) // a little"), "a_test.go:6: time.Sleep"},
		{"no sleep in tests by a comment above", "core/link/a_test.go", napping("// virtual time: so it goes\n\ttime.Sleep(1)"), "a_test.go:7: time.Sleep"},
		{"no sleep in tests by a comment below", "core/link/a_test.go", napping("time.Sleep(1)\n\t// virtual time: so it goes"), "a_test.go:6: time.Sleep"},
		{"no sleep in tests by a string", "core/link/a_test.go", napping("time.Sleep(1); println(\"virtual time\")"), "a_test.go:6: time.Sleep"},
		{"no hidden sleep in tests", "core/link/a_test.go", napping("nap := time.Sleep // virtual time: so it goes"), "a_test.go:6: time.Sleep"},
		{"each sleep needs its own comment", "core/link/a_test.go", napping("time.Sleep(1) // virtual time: so it goes\n\ttime.Sleep(1)"), "a_test.go:7: time.Sleep"},
		{"virtual time is for tests", "core/link/a.go", napping("time.Sleep(1) // virtual time: so it goes"), "a.go:6: time.Sleep"},
		{"Go carries the licence", "core/plan/a.go", "package plan\n", "a.go:1: no line"},
		{"Python carries the licence", "python/a.py", "import os\n", "a.py:1: no line"},
		{"C carries the licence", "capi/ucx/a.c", "int x;\n", "a.c:1: no line"},
		{"the Makefile carries the licence", "Makefile", "all:\n", "Makefile:1: no line"},
		{"the licence stands near the top", "python/a.py", strings.Repeat("\n", 6) + pySPDX, "no line"},
		{"no swallowed exception", "python/a.py", pySPDX + "try:\n    f()\nexcept Exception:\n    pass\n", "a.py:5: catches every"},
		{"no swallowed exception with a name", "tests/a.py", pySPDX + "try:\n    f()\nexcept Exception as e:  # why\n    pass\n", "catches every"},
		{"no swallowed exception in a tuple", "tests/a.py", pySPDX + "try:\n    f()\nexcept (OSError, Exception): pass\n", "catches every"},
		{"no bare swallow", "tests/a.py", pySPDX + "try:\n    f()\nexcept:\n    pass\n", "catches every"},
		{"Go parses", "core/plan/a.go", spdx + "package\n", "does not parse"},
	} {
		t.Run(c.rule, func(t *testing.T) {
			if got := findingsOf(t, c.name, c.text); !strings.Contains(got, c.want) {
				t.Errorf("findings %q, want one with %q", got, c.want)
			}
		})
	}
}

func TestWhatIsAllowedIsNotReported(t *testing.T) {
	pySPDX := strings.Replace(spdx, "//", "#", 1)
	for _, c := range []struct{ what, name, text string }{
		{"mem", "core/mem/a.go", goFile("unsafe", "core/status", "golang.org/x/sys/unix")},
		{"transport's root", "core/transport/a.go", goFile("core/plan", "core/mem", "core/status")},
		{"a transport", "core/transport/shm/a.go", goFile("core/transport", "core/directory", "core/mem")},
		{"link's test over fabric", "core/link/a_test.go", goFile("core/link", "core/transport/fabric", "github.com/stretchr/testify/require")},
		{"a test and what tests share", "core/mem/a_test.go", goFile("core/testkit")},
		{"a library for tests and its device", "core/testkit/library/a.go", goFile("core/testkit/device")},
		{"a test and a device for tests", "core/engine/a_test.go", goFile("core/testkit/device")},
		{"an external test imports its own package", "core/status/a_test.go", goFile("core/status")},
		{"engine", "core/engine/a.go", goFile("core/link", "core/cache", "core/transport/tcp", "core/status")},
		{"backend", "pyext/backend/a.go", goFile("capi/ucx", "core/engine")},
		{"pyext", "pyext/a.go", goFile("unsafe", "pyext/backend", "core/engine")},
		{"capi", "capi/ucx/a.go", goFile("C", "core/transport")},
		{"capi and the transport that it moves the bytes of", "capi/cann/a.go", goFile("core/transport/native")},
		{"another package's Sleep", "core/link/a.go", goFile() + "import \"time\"\nvar t time.Time\nfunc f(c clock) { c.Sleep(1) }\n"},
		{"a sleep of virtual time", "core/link/a_test.go", napping("time.Sleep(1) // virtual time: it passes")},
		{"a sleep of virtual time by another name", "core/link/a_test.go", goFile() + "import clock \"time\"\nfunc f() { clock.Sleep(1) } // virtual time: it passes\n"},
		{"a sleep of virtual time in a block comment", "core/link/a_test.go", napping("time.Sleep(1) /* virtual time: it passes */")},
		{"sleep outside core", "benchmarks/a.go", goFile() + "import \"time\"\nfunc f() { time.Sleep(1) }\n"},
		{"a narrow except", "python/a.py", pySPDX + "try:\n    f()\nexcept OSError:\n    pass\n"},
		{"a told exception", "python/a.py", pySPDX + "try:\n    f()\nexcept Exception as e:\n    log(e)\n"},
		{"an empty file", "python/a/__init__.py", ""},
		{"vendor", "vendor/a/a.go", "package a\n"},
		{"hidden folders", ".venv/a.py", "import os\n"},
		{"a shebang before the licence", "tools/a.py", "#!/usr/bin/env python3\n" + pySPDX},
	} {
		t.Run(c.what, func(t *testing.T) {
			if got := findingsOf(t, c.name, c.text); got != "" {
				t.Errorf("findings %q, want none", got)
			}
		})
	}
}
