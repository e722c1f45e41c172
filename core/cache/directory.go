// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
)

// Directory shows the table to direct readers in the same process.
func (t *Table) Directory() directory.Reader { return published{t} }

type published struct{ table *Table }

// Lookup implements directory.Reader.
func (p published) Lookup(generation uint64) (plan.Shape, []uintptr, bool) {
	p.table.mu.Lock()
	defer p.table.mu.Unlock()
	e := p.table.intact(generation)
	if e == nil {
		return plan.Shape{}, nil, false
	}
	return e.Shape, e.Addrs, true
}

// Live implements directory.Reader.
func (p published) Live(generation uint64) bool {
	p.table.mu.Lock()
	defer p.table.mu.Unlock()
	return p.table.intact(generation) != nil
}

// Named implements directory.Reader.
func (p published) Named(generation uint64) bool { return p.table.Live(generation) }

// intact returns the entry of a generation whose memory is still its own: it can be found, or it was withdrawn and somebody holds it
// whom a withdrawal does not end. Nobody can begin to hold a withdrawn entry, so who holds it now has held it all the time.
// Called with mu held.
func (t *Table) intact(generation uint64) *Entry {
	if e := t.generations[generation]; e != nil {
		return e
	}
	for e := range t.retiring {
		if word := e.holds.word.Load(); e.Generation == generation && word&leaseMask != 0 && word&revoked == 0 {
			return e
		}
	}
	return nil
}
