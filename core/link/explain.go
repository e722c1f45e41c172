// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"strings"

	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Explain says what is known of the engine that reports id: the state of the link, its transport and why each other one was not taken,
// the proof of a shared host, what the session says of itself, the data connections, the last failure. It returns "" for an id that
// was never met.
func (m *Manager) Explain(id uint64) string {
	told, lines := m.askSession(id)
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.records[id]
	if r == nil {
		return ""
	}
	var b strings.Builder
	switch {
	case r.link == nil && r.ended != "":
		fmt.Fprintf(&b, "cluster %d: not linked (%s)\n", id, r.ended)
	case r.link == nil:
		fmt.Fprintf(&b, "cluster %d: never linked\n", id)
	default:
		if r.link != told {
			lines = nil // of a link that was replaced in between
		}
		r.link.describe(&b, lines)
	}
	if r.failure != "" {
		fmt.Fprintf(&b, "last failure: %s\n", r.failure)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// askSession returns the link to id, and what its session says. m.mu is not held meanwhile: a session that reports a failure waits
// for it.
func (m *Manager) askSession(id uint64) (*Link, []string) {
	m.mu.Lock()
	var l *Link
	if r := m.records[id]; r != nil {
		l = r.link
	}
	m.mu.Unlock()
	if l == nil {
		return nil, nil
	}
	if session, ok := l.session.(transport.Explainer); ok {
		return l, session.Explain()
	}
	return l, nil
}

// describe writes what is known of l, with lines of its session. The caller holds manager.mu.
func (l *Link) describe(b *strings.Builder, lines []string) {
	state := "linked"
	if !l.lives() {
		state = "dead (" + l.ending() + ")"
	} else if l.farewell != "" {
		state = "being unlinked"
	}
	end := "accepted from"
	if l.peer.Dialed {
		end = "dialed at"
	}
	fmt.Fprintf(b, "cluster %d: %s, %s %s\n", l.peer.ClusterID, state, end, l.peer.Address)
	if l.transport != "" {
		fmt.Fprintf(b, "transport: %s\n", l.transport)
	}
	for _, reason := range l.rejected {
		fmt.Fprintf(b, "not taken: %s\n", printable(reason))
	}
	sameHost := "not shown"
	if l.peer.SameHost {
		sameHost = "shown"
	}
	fmt.Fprintf(b, "same host: %s: %s\n", sameHost, l.peer.SameHostReason)
	for _, line := range lines {
		fmt.Fprintln(b, printable(line))
	}
	for i, path := range l.paths {
		fmt.Fprintf(b, "data connection %d: %s\n", i, path)
	}
}
