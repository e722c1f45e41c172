# SPDX-License-Identifier: Apache-2.0
#
# Each thing one does with this repository is one command here; `make help` lists them.
# PYTHON selects the interpreter (3.9 to 3.13); .venv always belongs to the one that was named last.

PYTHON ?= python3
FUZZTIME ?= 30s
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=

# The least part of the lines, in per cent, that tests are to reach.
PYTHON_COVERAGE := 95
CORE_COVERAGE := 85

# A hung Go test ends with the stacks of all goroutines, well before CI gives up.
GO_TEST_TIMEOUT ?= 600s

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
LINTERS := build/tools

# The stamp carries interpreter and version in its name, so another PYTHON finds no stamp and makes a new .venv.
PYTHON_ID := $(shell $(PYTHON) -c 'import sys, zlib; print("%d.%d.%d-%08x" % (*sys.version_info[:3], zlib.crc32(sys.base_prefix.encode())))' 2>/dev/null)
VENV_STAMP := $(VENV)/.made-with-$(or $(PYTHON_ID),none)
INSTALLED := $(VENV)/.installed
PLOTTING := $(VENV)/.plotting

# What the wheel is made from. The folders are there for their times: a file that was removed changes them.
GO_FOLDERS := $(wildcard core capi pyext)
BUILD_SOURCES := setup.py pyproject.toml MANIFEST.in LICENSE go.mod go.sum \
	$(shell find $(GO_FOLDERS) -type d -o -type f ! -name '*_test.go' ! -path '*/testdata/*') \
	$(shell find python -name '__pycache__' -prune -o -name '*.egg-info' -prune -o -type f -print -o -mindepth 1 -type d -print)

.PHONY: help system venv build test lint gotest gotest-pure pytest coverage surface demo bench fuzz sdist sdist-test clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

system: # what the machine itself must have
	@PYTHON='$(PYTHON)' sh tools/system.sh

$(VENV_STAMP): requirements-dev.txt | system
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

venv: $(VENV_STAMP) ## .venv with the development tools

# setuptools copies into build/ without taking away what is gone from the sources, so it starts from nothing.
$(INSTALLED): $(VENV_STAMP) $(BUILD_SOURCES)
	rm -rf build/lib* build/bdist* build/temp* build/wheel
	mkdir -p build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	cp build/wheel/*.whl dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps build/wheel/*.whl
	touch $@

build: $(INSTALLED) ## a wheel in dist/, installed into .venv

test: ## lint, Go tests with and without cgo, Python tests, surface, sdist
	@if $(MAKE) --no-print-directory lint gotest gotest-pure pytest sdist-test; \
	then echo 'make test: all passed'; else echo 'make test: FAILED, see above'; exit 1; fi

$(LINTERS)/borders: $(wildcard tools/lint/borders/*.go) tools/lint/go.mod tools/lint/go.sum | system
	@mkdir -p $(LINTERS)
	go -C tools/lint build -o ../../$(LINTERS)/ honnef.co/go/tools/cmd/staticcheck ./borders

lint: $(LINTERS)/borders $(VENV_STAMP) ## formatting, vet, staticcheck, borders, ruff, mypy
	@bad=$$(gofmt -l $(GO_FOLDERS) benchmarks tools); if [ -n "$$bad" ]; then echo "not formatted with gofmt:"; echo "$$bad"; exit 1; fi
	go vet ./...
	$(LINTERS)/staticcheck ./...
	$(LINTERS)/borders .
	$(BIN)/ruff check --quiet python tests benchmarks examples setup.py
	$(BIN)/mypy

# Those of capi run each time: they build C++ that the go command doesn't see, so it would keep results of older sources.
gotest: | system ## Go tests with the race detector
	go test -race -timeout $(GO_TEST_TIMEOUT) ./core/... ./pyext/...
	go test -race -count=1 -timeout $(GO_TEST_TIMEOUT) ./capi/...
	go -C tools/lint test ./...

gotest-pure: | system ## Go tests without cgo, the short ones
	CGO_ENABLED=0 go test -short -timeout $(GO_TEST_TIMEOUT) ./core/...

# From inside tests/, so that nothing is imported from the source tree. A run of all of them proves each row of docs/parity.md.
pytest: $(INSTALLED) ## Python tests against the installed wheel (PYTEST_ARGS)
	cd tests && ../$(BIN)/pytest -c ../pyproject.toml --rootdir .. $(or $(PYTEST_ARGS),--parity .)

# Without the storms of signals: tracing delays the handlers that these tests are about.
coverage: $(INSTALLED) ## the part of python/ and of core/ that tests reach, and whether it is enough
	rm -rf build/coverage
	mkdir -p build/coverage
	cd tests && ../$(BIN)/coverage run --rcfile=../pyproject.toml --data-file=../build/coverage/python -m pytest -c ../pyproject.toml --rootdir .. --ignore test_living_signals.py .
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --show-missing
	go test -timeout $(GO_TEST_TIMEOUT) -coverpkg=./core/... -coverprofile=build/coverage/core ./core/... ./pyext/...
	@python=$$($(BIN)/coverage report --format=total); \
	core=$$(go tool cover -func=build/coverage/core | sed -n 's/^total:.*[^0-9.]\([0-9.]*\)%$$/\1/p'); \
	echo "reached by tests: $$python % of the lines of python/ ($(PYTHON_COVERAGE) wanted), $$core % of the statements of core/ ($(CORE_COVERAGE) wanted)"; \
	awk "BEGIN { exit !($$python >= $(PYTHON_COVERAGE) && $$core >= $(CORE_COVERAGE)) }"

surface: $(INSTALLED) ## the rows of the documented surface that do not hold
	@cd tests && ../$(BIN)/python test_surface.py

demo: $(INSTALLED) ## two processes, one transfer (DEMO_ARGS)
	@$(BIN)/python -m llm_datadist demo $(DEMO_ARGS)

# Plots are worth less than figures: where matplotlib can't be had, the benchmarks say so and go on.
$(PLOTTING): requirements-bench.txt $(VENV_STAMP)
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt; then touch $@; else echo 'no matplotlib'; fi

bench: $(INSTALLED) $(PLOTTING) ## benchmarks: tables, and JSON and plots in build/bench (BENCH_ARGS, such as --quick)
	mkdir -p build/bench
	go test -run '^$$' -bench . ./core/... | tee build/bench/go.txt
	$(BIN)/python benchmarks/run.py --go-output build/bench/go.txt $(BENCH_ARGS)

fuzz: | system ## each Go fuzz target for FUZZTIME
	@for package in $$(go list ./core/... ./pyext/...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$package; \
		done; \
	done

sdist: $(VENV_STAMP) ## a source distribution in dist/, with the Go modules in it
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .

sdist-test: $(INSTALLED) ## the source distribution builds without a network
	cd tests && ../$(BIN)/pytest -c ../pyproject.toml --rootdir .. -m slow test_packaging.py

clean: ## everything that was built
	rm -rf $(VENV) build dist vendor python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/.hypothesis
	find core examples python pyext tests -name __pycache__ -prune -exec rm -rf {} +
