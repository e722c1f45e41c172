// SPDX-License-Identifier: Apache-2.0

// Package testkit is what the tests of several packages look at: what they have left behind, and whether the race detector is on.
// Tests alone import it, and it imports nothing of ours.
package testkit

import (
	"os"
	"strings"
	"testing"
)

// Descriptors counts the open descriptors of this process, that of the look among them.
func Descriptors(t testing.TB) int {
	t.Helper()
	return len(descriptors(t))
}

// Files says what the open descriptors of this process lead to, without those of Go's own poller, which opens them at its first use.
func Files(t testing.TB) (out []string) {
	t.Helper()
	for _, fd := range descriptors(t) {
		to, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err != nil || strings.Contains(to, "eventpoll") || strings.Contains(to, "eventfd") {
			continue // the directory itself is gone
		}
		out = append(out, to)
	}
	return out
}

func descriptors(t testing.TB) []os.DirEntry {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// Mappings counts the mappings of this process whose names have text in them.
func Mappings(t testing.TB, text string) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(maps), text)
}
