// SPDX-License-Identifier: Apache-2.0

package cache

import "github.com/llm-datadist-open/llm-datadist/core/directory"

// Directory shows the table to direct readers in the same process, whose addresses the entries' are. As for any other reader, only pools
// are memory that is known to be there.
func (t *Table) Directory() directory.Reader { return published{t} }

type published struct{ table *Table }

// Lookup implements directory.Reader.
func (p published) Lookup(generation uint64) (directory.Located, bool) {
	p.table.mu.Lock()
	defer p.table.mu.Unlock()
	e := p.table.intact(generation)
	if e == nil {
		return directory.Located{}, false
	}
	found := directory.Located{Ref: directory.Ref{Generation: generation}, Shape: e.Shape, Addrs: e.Addrs, Space: directory.Private}
	switch {
	case p.table.onDevice(e):
		found.Space = directory.Distant
	case e.Owned:
		found.Space = directory.Mapped
	}
	return found, true
}

// Live implements directory.Reader.
func (p published) Live(ref directory.Ref) bool {
	p.table.mu.Lock()
	defer p.table.mu.Unlock()
	return p.table.intact(ref.Generation) != nil
}

// Named implements directory.Reader.
func (p published) Named(ref directory.Ref, name directory.Name) bool {
	p.table.mu.Lock()
	defer p.table.mu.Unlock()
	e := p.table.generations[ref.Generation]
	if e == nil || !name.ByKey {
		return e != nil
	}
	b := p.table.keys[Key{ID: NoID, Model: name.Model}]
	return b != nil && b.entry == e
}

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
