// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"strings"
)

// Explain says what is known of the engine that reports id: the state of the link, its transport and why each other one was not taken,
// the proof of a shared host, the data connections, the last failure. It returns "" for an id that was never met.
func (m *Manager) Explain(id uint64) string {
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
		r.link.describe(&b)
	}
	if r.failure != "" {
		fmt.Fprintf(&b, "last failure: %s\n", r.failure)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// describe writes what is known of l. The caller holds manager.mu.
func (l *Link) describe(b *strings.Builder) {
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
	if len(l.peer.Transports) > 0 {
		fmt.Fprintf(b, "transport: %s\n", l.peer.Transports[0])
	}
	for _, reason := range l.rejected {
		fmt.Fprintf(b, "not taken: %s\n", reason)
	}
	sameHost := "not shown"
	if l.peer.SameHost {
		sameHost = "shown"
	}
	fmt.Fprintf(b, "same host: %s: %s\n", sameHost, l.peer.SameHostReason)
	for i, path := range l.paths {
		fmt.Fprintf(b, "data connection %d: %s\n", i, path)
	}
}
