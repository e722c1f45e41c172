// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"encoding/json"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// mostEvents bounds the lines that wait for Python; older ones are dropped first.
const mostEvents = 1024

// Python drains lines for its log from a queue behind an eventfd: Go never calls Python.
var events = struct {
	mu    sync.Mutex // guards lines and fd
	lines []string
	fd    int // -1: nobody listens
}{fd: -1}

// OpenEvents returns the descriptor that becomes readable when there are lines. Closing it is CloseEvents's.
func OpenEvents() (int64, error) {
	events.mu.Lock()
	defer events.mu.Unlock()
	if events.fd >= 0 {
		return int64(events.fd), nil
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return 0, status.Newf(status.Failed, status.StageCheck, "open the queue of log lines: %w", err)
	}
	if err := mem.Track(fd); err != nil {
		_ = unix.Close(fd)
		return 0, err
	}
	events.fd = fd
	if len(events.lines) > 0 {
		signalEvents()
	}
	return int64(fd), nil
}

// CloseEvents closes the queue's descriptor. Lines go on being kept, within their bound.
func CloseEvents() {
	events.mu.Lock()
	defer events.mu.Unlock()
	if events.fd >= 0 {
		mem.Untrack(events.fd)
		_ = unix.Close(events.fd)
		events.fd = -1
	}
}

// WakeEvents makes the descriptor readable, so that a thread that waits on it looks up.
func WakeEvents() {
	events.mu.Lock()
	defer events.mu.Unlock()
	signalEvents()
}

// signalEvents makes the descriptor readable. The caller holds mu.
func signalEvents() {
	if events.fd < 0 {
		return
	}
	one := [8]byte{1}
	_, _ = unix.Write(events.fd, one[:]) // full means that it is readable already
}

// TakeEvents returns the waiting lines as a JSON array of objects (level, text, engine, cluster, cause) and forgets them; "" for none.
func TakeEvents() string {
	events.mu.Lock()
	defer events.mu.Unlock()
	if events.fd >= 0 {
		var count [8]byte
		_, _ = unix.Read(events.fd, count[:]) // empty is fine: another thread was faster
	}
	if len(events.lines) == 0 {
		return ""
	}
	out := []byte{'['}
	for i, line := range events.lines {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, line...)
	}
	events.lines = nil
	return string(append(out, ']'))
}

// post queues a line. It never blocks.
func post(e link.Event) { postOf(nil, e) }

// postOf is post for one of several engines, named by its cluster id.
func postOf(engine *uint64, e link.Event) {
	line := struct {
		Level   uint8   `json:"level"`
		Text    string  `json:"text"`
		Engine  *uint64 `json:"engine"`
		Cluster *uint64 `json:"cluster"`
		Cause   *string `json:"cause"`
	}{Level: uint8(e.Level), Text: e.Text, Engine: engine}
	if e.HasClusterID {
		line.Cluster = &e.ClusterID
	}
	if e.Cause != nil {
		text := e.Cause.Error()
		line.Cause = &text
	}
	text, err := json.Marshal(line)
	if err != nil {
		return // strings and numbers always marshal
	}
	events.mu.Lock()
	defer events.mu.Unlock()
	if len(events.lines) >= mostEvents {
		events.lines = events.lines[1:]
	}
	events.lines = append(events.lines, string(text))
	signalEvents()
}
