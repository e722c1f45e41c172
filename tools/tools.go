// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package tools keeps in go.mod and go.sum (and in an sdist's vendor/) what only generated code imports.
package tools

import (
	_ "github.com/go-python/gopy/gopyh" // imported by the C boundary that `go tool gopy gen` writes
)
