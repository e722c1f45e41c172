// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"sync/atomic"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Lookup is how a peer names what it wants to pull.
type Lookup struct {
	Key     Key
	ByID    bool  // by CacheID and Batch, where the mode allows that; see Open for ids that are none
	CacheID int64 // with ByID
	Batch   uint64
	// Generation, with ByID, is the only one that will do: what the cache's owner pushes, which consumes nothing. 0: any.
	Generation uint64
	// OneSided is the mode of the link: nothing is consumed, and the cache has to be accessible.
	OneSided bool
	// BlocksToBlocks pulls never consume a key, nor do Exact ones.
	BlocksToBlocks, Exact bool
	// Lease has the memory stay until the pull ends, whether it consumes a key or not.
	Lease bool
}

// Source is a peer's pull, resolved. It ends with Done or Drop, whichever comes first. A source that consumes a key, or for which that was
// asked, is a lease: the memory stays until it ends.
type Source struct {
	table    *Table
	entry    *Entry
	batch    uint64
	binding  *binding // the key that a success releases; nil: none
	key      Key
	consumes bool
	leased   bool
	ended    atomic.Bool
}

// Open resolves a peer's pull (spec §8.5.3, §8.6, §14).
//
// In two-sided mode an id below 0 stands for the blocks cache of model 0; in one-sided mode an id of 0 or less falls back to Key, and
// prefix keys are looked up as the blocks cache of their model. What is not there, a batch row too, is status.CacheNotExist; a cache
// that one-sided mode may not touch is status.ParamInvalid.
func (t *Table) Open(l Lookup) (*Source, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, tableClosed()
	}
	s := &Source{table: t}
	if err := t.resolve(l, s); err != nil {
		return nil, err
	}
	e := s.entry
	if s.batch >= e.batches() {
		return nil, missing("cache %d has %d batch rows, not one at index %d", e.ID, e.batches(), s.batch)
	}
	if l.OneSided && !e.Accessible {
		return nil, inaccessible(e)
	}
	if e.wraps {
		return nil, status.Newf(status.ParamInvalid, status.StageLookup, "a tensor of cache %d runs beyond the address space", e.ID)
	}
	if e.detained.Load() > 0 {
		return nil, detained(e, status.StageLookup)
	}
	s.consumes = s.binding != nil && s.consumable(l)
	if s.leased = s.consumes || l.Lease; s.leased {
		e.holds.add(oneLease)
		t.leases.Add(1)
	}
	return s, nil
}

func inaccessible(e *Entry) error {
	return status.Newf(status.ParamInvalid, status.StageLookup, "cache %d is not accessible to peers", e.ID).
		Hinting("register it with remote_accessible=True")
}

// resolve finds entry, batch and key. Called with mu held.
func (t *Table) resolve(l Lookup, s *Source) error {
	byID := l.ByID && (l.CacheID > 0 || l.CacheID == 0 && !l.OneSided)
	if byID {
		if s.entry = t.live[l.CacheID]; s.entry == nil || l.Generation != 0 && s.entry.Generation != l.Generation {
			return missing("no cache has the id %d", l.CacheID)
		}
		if s.batch = l.Batch; l.Generation != 0 {
			return nil
		}
		if key, bound := s.entry.normalAt[l.Batch]; bound {
			s.key, s.binding = key, t.keys[key]
		}
		return nil
	}
	s.key = l.Key
	switch {
	case l.ByID && !l.OneSided:
		s.key = Key{ID: NoID}
	case l.OneSided && l.Key.Prefix:
		s.key = Key{ID: NoID, Model: l.Key.Model}
	}
	s.binding = t.keys[s.key]
	if s.binding == nil {
		return missing("no cache has the key of %s", s.key)
	}
	s.entry, s.batch = s.binding.entry, s.binding.batch
	if l.ByID && l.OneSided {
		s.batch = l.Batch // the caller named a row, and this mode honours it
	}
	return nil
}

// consumable says whether a success releases the key (spec §8.5.5, §9.5).
func (s *Source) consumable(l Lookup) bool {
	return !l.OneSided && !l.BlocksToBlocks && !l.Exact && s.entry.Owned && s.entry.Shape.Kind == plan.Contiguous && !s.key.Prefix
}

// Entry returns what was found. It may be withdrawn at any time.
func (s *Source) Entry() *Entry { return s.entry }

// Batch returns the batch row that the pull reads.
func (s *Source) Batch() uint64 { return s.batch }

// Consumes says whether a success releases a key. Such a source is a lease.
func (s *Source) Consumes() bool { return s.consumes }

// OnDevice says that the memory lies where only a device's copies reach it.
func (s *Source) OnDevice() bool { return s.table.onDevice(s.entry) }

// Acquire comes before every system call that reads the memory. False: the cache has been withdrawn, and nothing may be read. The memory
// stays until Release.
func (s *Source) Acquire() bool {
	return !s.ended.Load() && s.entry.holds.enter(s.leased)
}

// Release ends one Acquire that said true.
func (s *Source) Release() { s.table.left(s.entry, oneBusy) }

// Done ends the source after the initiator has confirmed that it has the given tensors: the key is released when that was the last of
// them, if it still leads to this entry. False says that the cache was revoked before: who has read under the lease alone has read what may
// be anybody's.
func (s *Source) Done(tensors plan.Range) (own bool) {
	own = s.entry.holds.word.Load()&revoked == 0
	if !s.ended.CompareAndSwap(false, true) || !s.leased {
		return own
	}
	if s.consumes {
		s.release(tensors)
	}
	s.table.endLease(s.entry)
	return own
}

func (s *Source) release(tensors plan.Range) {
	t := s.table
	t.mu.Lock()
	var freed []*Entry
	// A binding is made for one entry and one key, and never comes back: being in the index it is the one that was opened.
	if t.keys[s.key] == s.binding && s.binding.pulled(tensors) {
		freed = t.unbind(s.key, s.binding)
	}
	t.mu.Unlock()
	t.finish(freed) // none while this lease lives
}

// Drop ends the source without success: nothing is released.
func (s *Source) Drop() {
	if s.ended.CompareAndSwap(false, true) && s.leased {
		s.table.endLease(s.entry)
	}
}

func (t *Table) endLease(e *Entry) {
	t.leases.Add(-1)
	t.left(e, oneLease)
	if e.holds.word.Load()&(withdrawn|leaseMask) == withdrawn { // it was the last one, whatever else holds the memory
		t.mu.Lock()
		t.conceal(e)
		t.mu.Unlock()
	}
}

// Use is a local operation's hold on a cache: the destination of a pull, or an end of a copy.
type Use struct {
	table *Table
	entry *Entry
	ended atomic.Bool
}

// Use holds a cache's memory until Release. An unknown id is status.CacheNotExist.
func (t *Table) Use(id int64) (*Use, error) {
	u := new(Use)
	if err := t.Hold(id, u); err != nil {
		return nil, err
	}
	return u, nil
}

// Hold is Use into a Use of the caller's, new or released.
func (t *Table) Hold(id int64, u *Use) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return tableClosed()
	}
	e := t.live[id]
	if e == nil {
		return status.Newf(status.CacheNotExist, status.StageCheck, "no cache has the id %d", id)
	}
	if e.detained.Load() > 0 {
		return detained(e, status.StageCheck)
	}
	t.hold(e, u)
	return nil
}

// hold begins a hold on an entry that is live. Called with mu held.
func (t *Table) hold(e *Entry, u *Use) {
	e.holds.add(oneBusy)
	t.uses.Add(1)
	u.table, u.entry = t, e
	u.ended.Store(false)
}

// Entry returns the cache, which stays usable until Release.
func (u *Use) Entry() *Entry { return u.entry }

// Backing says how the cache's memory may be written. Registered memory is looked up, once: status.ParamInvalid where it can't be
// written, which is asked anew the next time. A pool is our own, sealed, and can't vanish. A device's memory is in no map to look at.
func (u *Use) Backing() (mem.Backing, error) {
	e := u.entry
	if u.table.onDevice(e) {
		return mem.BackingDevice, nil
	}
	if e.Owned {
		return mem.BackingAnonymous, nil
	}
	e.probe.Lock()
	defer e.probe.Unlock()
	if e.backing != mem.BackingNone {
		return e.backing, nil
	}
	spans := make([]mem.Span, 0, len(e.Addrs))
	for _, addr := range e.Addrs {
		spans = append(spans, mem.Span{Addr: addr, Bytes: e.Shape.TensorBytes})
	}
	backing, err := mem.ProbeWritable(spans)
	if err != nil {
		return mem.BackingNone, err
	}
	e.backing = backing
	return backing, nil
}

// Native returns the cache's name in a vendor's library; 0: it has none there. See [Entry.Enroll].
func (u *Use) Native() int64 { return u.entry.Native() }

// Detain keeps the memory beyond the Use, while something that can't be called off may still write there: until the function that it returns
// is called, the cache can be withdrawn and nothing else, and everything else is refused.
func (u *Use) Detain() (release func()) {
	e, t := u.entry, u.table
	e.holds.add(oneBusy) // the Use has not ended, so that the memory has not been given back
	t.uses.Add(1)
	e.detained.Add(1)
	return func() {
		e.detained.Add(-1)
		t.uses.Add(-1)
		t.left(e, oneBusy)
	}
}

func detained(e *Entry, stage status.Stage) error {
	return status.Newf(status.Failed, stage, "a transfer into cache %d has outlived its deadline, and may still write there", e.ID).
		Hinting("use the cache again when the transfer has ended, or free it: its memory stays until then")
}

// Release ends the hold. Releasing twice is fine.
func (u *Use) Release() {
	if u.ended.CompareAndSwap(false, true) {
		u.table.uses.Add(-1)
		u.table.left(u.entry, oneBusy)
	}
}

func missing(format string, args ...any) error {
	return status.Newf(status.CacheNotExist, status.StageLookup, format, args...).
		Hinting("it was never bound, or released, removed or deallocated on the owner; ask its prefill for a new one")
}
