// SPDX-License-Identifier: Apache-2.0

// Package testkit is what the tests of several packages share: what they look at at their end, a child that stands still, and whether the
// race detector is on. Tests alone import it, and it imports nothing of ours.
package testkit

import (
	"os"
	"strings"
	"syscall"
	"testing"
)

// Stop stops a child by SIGSTOP and returns when all its threads stand: the signal alone says nothing of when that will be, and until then
// the child goes on working.
func Stop(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var stopped syscall.WaitStatus
	_, err := syscall.Wait4(pid, &stopped, syscall.WUNTRACED, nil)
	for err == syscall.EINTR {
		_, err = syscall.Wait4(pid, &stopped, syscall.WUNTRACED, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	if !stopped.Stopped() {
		t.Fatalf("the child has not stopped: %#x", stopped)
	}
}

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
