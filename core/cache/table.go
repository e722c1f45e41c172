// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// ErrKeyInUse is why an allocation is refused whose key another cache has.
var ErrKeyInUse = errors.New("the key is in use")

// Table is the owner's table of caches: what peers and local calls can name. Its methods may be called from any goroutine. It has no
// goroutine of its own: what a release has to clean up is done by the one who releases.
type Table struct {
	apart   bool               // DEVICE memory lies where this machine can't touch it; never changes
	leaving func(native int64) // see Leaving; never changes

	mu          sync.Mutex           // guards what follows, the pools' state, and the fields of Entry that say so; never held while waiting
	lastID      int64                // the id drawn last
	generation  uint64               // the generation drawn last
	live        map[int64]*Entry     // entries that can be found, by id
	generations map[uint64]*Entry    // the same, by generation
	keys        map[Key]*binding     // the index; every binding leads to a live entry
	retiring    map[*Entry]struct{}  // withdrawn entries that are still held, or being given back
	closed      bool                 // Close was called
	publisher   *directory.Publisher // what peers on this host read; nil: nothing, or Close was called
	pools       [2]*pool             // by Placement, nil where none is configured; the array itself never changes

	uses, leases atomic.Int64 // holds that have not ended, for Stats
}

// NewTable makes an empty table with its pools, which are reserved but not committed, both by device (nil: the host). It returns status.OutOfMemory when a pool can't be had.
func NewTable(device mem.Device, devicePool, hostPool *PoolConfig) (*Table, error) {
	if device == nil {
		device = mem.Host()
	}
	t := &Table{
		apart:       device.Apart(),
		live:        map[int64]*Entry{},
		generations: map[uint64]*Entry{},
		keys:        map[Key]*binding{},
		retiring:    map[*Entry]struct{}{},
	}
	for placement, config := range []*PoolConfig{Host: hostPool, Device: devicePool} {
		if config == nil {
			continue
		}
		reserve := device.Reserve
		if Placement(placement) == Host {
			reserve = device.ReserveHost
		}
		p, err := newPool(reserve, *config)
		if err != nil {
			_ = t.closePools()
			return nil, err
		}
		t.pools[placement] = p
		if p.shared != nil {
			p.number = uint32(len(t.SharedPools()))
		}
	}
	return t, nil
}

// onDevice says that an entry's memory is a device's, for which this machine's own copies can do nothing.
func (t *Table) onDevice(e *Entry) bool { return t.apart && e.Placement == Device }

// Announce has the table keep p true: what is registered and allocated from here on is published there while its memory is its own, and
// withdrawn from there before its memory is given back, used again, or its owner's to do with what he likes. It is called at most once,
// before anything else. p stays the caller's, who closes it after the table.
func (t *Table) Announce(p *directory.Publisher) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.publisher = p
}

// Leaving has the table call gone with the name of each entry that was enrolled in a vendor's library, when nobody holds the entry's memory
// any more and before it is given back. gone may block. Leaving is called at most once, before anything else.
func (t *Table) Leaving(gone func(native int64)) { t.leaving = gone }

// SharedPools lists the memory of those pools that a peer on this host can map; the others' caches are not published. It stays the table's,
// and goes with it. What is published of pool n is in n-1 of the list.
func (t *Table) SharedPools() []*mem.HostMemory {
	var shared []*mem.HostMemory
	for _, p := range t.pools {
		if p != nil && p.shared != nil {
			shared = append(shared, p.shared)
		}
	}
	return shared
}

// Register adds a cache in memory of the caller's, which is neither copied nor looked at. Key i names batch row i. A key that
// another cache has stays there; a blocks cache takes it over.
func (t *Table) Register(desc Desc, addrs []uintptr, keys []Key, accessible bool) (*Entry, error) {
	if err := desc.check(); err != nil {
		return nil, err
	}
	if uint64(len(addrs)) != uint64(desc.Tensors) {
		return nil, invalid("%d addresses for %d tensors", len(addrs), desc.Tensors)
	}
	addrs = slices.Clone(addrs)
	t.mu.Lock()
	e, freed, err := t.register(desc, addrs, keys, accessible)
	t.mu.Unlock()
	t.finish(freed)
	return e, err
}

func (t *Table) register(desc Desc, addrs []uintptr, keys []Key, accessible bool) (*Entry, []*Entry, error) {
	e, err := t.draw(desc)
	if err != nil {
		return nil, nil, err
	}
	if accessible && slices.Contains(addrs, 0) {
		return nil, nil, invalid("address 0 in a cache that peers can access")
	}
	e.Addrs, e.Accessible, e.wraps = addrs, accessible, wraps(addrs, e.Shape.TensorBytes)
	t.publish(e)
	var freed []*Entry
	for batch, key := range keys {
		if placeholder(e, key) {
			continue
		}
		if old := t.keys[key]; old != nil && old.entry != e {
			if e.Shape.Kind != plan.Blocks {
				continue
			}
			freed = append(freed, t.unbind(key, old)...)
		}
		t.bind(e, key, uint64(batch))
	}
	t.show(e)
	return e, freed, nil
}

// Allocate adds a cache in memory of the pool of its placement; the content is undefined. Key i names batch row i. It returns
// status.OutOfMemory when the pool has no room for all of it, and status.ParamInvalid when a key is in use or there twice.
func (t *Table) Allocate(desc Desc, keys []Key) (*Entry, error) {
	if err := desc.check(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.pools[desc.Placement]
	if p == nil {
		return nil, invalid("no memory pool for placement %s is configured", desc.Placement)
	}
	e, err := t.draw(desc)
	if err != nil {
		return nil, err
	}
	e.Owned, e.Accessible = true, true
	if e.Addrs, e.extents, err = p.take(desc.Tensors, e.Shape.TensorBytes); err != nil {
		return nil, err
	}
	if err := t.checkAllocateKeys(e, keys); err != nil {
		p.give(e.extents) // untouched, so there is nothing to discard
		return nil, err
	}
	t.publish(e)
	for batch, key := range keys {
		if !placeholder(e, key) {
			t.bind(e, key, uint64(batch))
		}
	}
	t.show(e)
	return e, nil
}

func (t *Table) checkAllocateKeys(e *Entry, keys []Key) error {
	if uint64(len(keys)) > e.batches() {
		return invalid("%d keys for %d batch rows", len(keys), e.batches())
	}
	seen := make(map[Key]struct{}, len(keys))
	for _, key := range keys {
		if placeholder(e, key) {
			continue
		}
		if _, twice := seen[key]; twice {
			return invalid("key %+v is there twice", key)
		}
		if old := t.keys[key]; old != nil {
			return invalid("%w: %s leads to cache %d", ErrKeyInUse, key, old.entry.ID)
		}
		seen[key] = struct{}{}
	}
	return nil
}

// placeholder says that a key only takes its batch index. The one key of a blocks cache has no id and is none.
func placeholder(e *Entry, key Key) bool { return e.Shape.Kind != plan.Blocks && key.ID == NoID }

// draw makes an entry with the next id, which is used up even when what follows fails (spec §8.1). Called with mu held.
func (t *Table) draw(desc Desc) (*Entry, error) {
	if t.closed {
		return nil, tableClosed()
	}
	t.lastID++
	shape, err := desc.shape()
	if err != nil {
		return nil, err
	}
	t.generation++
	life, end := context.WithCancel(context.Background())
	return &Entry{
		ID:         t.lastID,
		Generation: t.generation,
		Shape:      shape,
		Placement:  desc.Placement,
		SeqLenDim:  desc.SeqLenDim,
		holds:      holds{idle: make(chan struct{})},
		life:       life,
		end:        end,
		keys:       map[Key]*binding{},
		normalAt:   map[uint64]Key{},
		slot:       -1,
	}, nil
}

// publish makes an entry one that can be found. Called with mu held.
func (t *Table) publish(e *Entry) {
	t.live[e.ID] = e
	t.generations[e.Generation] = e
}

// show publishes an entry with the keys that it has, if there is room, and if a peer could reach it. Called with mu held.
func (t *Table) show(e *Entry) {
	if t.publisher == nil || t.onDevice(e) {
		return
	}
	r := directory.Record{
		ID: e.ID, Generation: e.Generation, Shape: e.Shape, Accessible: e.Accessible,
		HasKey: e.shown.namesBlocks(), Model: e.shown.Model, Addrs: e.Addrs,
	}
	if e.Owned {
		p := t.pools[e.Placement]
		if p.shared == nil {
			return
		}
		r.Pool, r.Addrs = p.number, p.offsets(e.Addrs)
	}
	e.slot = t.publisher.Publish(r)
}

// conceal takes a withdrawn entry out of the directory or, while a lease keeps its memory, its names. Calling it again is fine. Called
// with mu held, and before the memory goes.
func (t *Table) conceal(e *Entry) {
	if t.publisher == nil || e.slot < 0 {
		return
	}
	if word := e.holds.word.Load(); word&leaseMask != 0 && word&revoked == 0 {
		t.publisher.Unname(e.slot, true, true)
		return
	}
	t.publisher.Withdraw(e.slot)
	e.slot = -1
}

// bind puts a key, which no other entry has, into the index. Called with mu held.
func (t *Table) bind(e *Entry, key Key, batch uint64) {
	if e.Shape.Kind == plan.Blocks {
		batch = 0
	}
	b := &binding{entry: e, batch: batch}
	t.keys[key], e.keys[key] = b, b
	if e.Owned && !key.Prefix {
		e.normalAt[batch] = key
	}
	if key.namesBlocks() && !e.shown.namesBlocks() {
		e.shown = key // the first one, where there are more; for the others the owner is asked
	}
}

// unbind takes a key out of the index, and its entry out of the table where that was all that kept it. Called with mu held; the
// result is for finish.
func (t *Table) unbind(key Key, b *binding) []*Entry {
	e := b.entry
	delete(t.keys, key)
	delete(e.keys, key)
	if e.normalAt[b.batch] == key {
		delete(e.normalAt, b.batch)
	}
	if key.namesBlocks() && e.shown == key {
		e.shown = Key{}
		if t.publisher != nil {
			t.publisher.Unname(e.slot, false, true)
		}
	}
	if e.deallocated && len(e.keys) == 0 {
		return t.withdraw(e, withdrawn)
	}
	return nil
}

// withdraw takes a live entry and its keys out of the table: its generation is dead from here on. It returns the entry when nobody
// holds it, for finish. Called with mu held.
func (t *Table) withdraw(e *Entry, marks uint64) []*Entry {
	for key := range e.keys {
		delete(t.keys, key)
	}
	clear(e.keys)
	clear(e.normalAt)
	delete(t.live, e.ID)
	delete(t.generations, e.Generation)
	t.retiring[e] = struct{}{}
	before := e.holds.set(marks)
	t.conceal(e)
	if marks&revoked != 0 {
		e.revoke(before)
	}
	if before&heldMask == 0 {
		return []*Entry{e}
	}
	return nil
}

// revoke tells those who hold an entry, as before says, that it is gone for good. Once for each entry.
func (e *Entry) revoke(before uint64) {
	e.end()
	if before&busyMask == 0 {
		close(e.holds.idle)
	}
}

// finish gives the memory of entries back that are withdrawn and that nobody holds; each entry comes here once. Called without mu.
func (t *Table) finish(entries []*Entry) {
	for _, e := range entries {
		if native := e.native.Swap(noNative); native > 0 {
			t.leaving(native)
		}
		t.mu.Lock()
		t.conceal(e) // a lease may have kept it until now
		closed := t.closed
		t.mu.Unlock()
		// A closed table gives all memory back at once, at its end.
		if e.Owned && !closed {
			t.pools[e.Placement].discard(e.extents)
		}
		t.mu.Lock()
		if e.Owned {
			t.pools[e.Placement].give(e.extents)
		}
		delete(t.retiring, e)
		ended := t.closed && len(t.retiring) == 0
		t.mu.Unlock()
		if ended {
			_ = t.closePools()
		}
	}
}

// left ends a hold on an entry. Called without mu.
func (t *Table) left(e *Entry, one uint64) {
	last, quiet := e.holds.leave(one)
	if last {
		t.finish([]*Entry{e})
	}
	if quiet {
		close(e.holds.idle)
	}
}

// Unregister withdraws a cache, registered or allocated, at once: its keys are gone and no system call on it begins from here on,
// under a lease neither. Then it waits until the system calls under way and this engine's own operations on it have let go, or
// ctx ends, which is an error; the cache is withdrawn all the same. An unknown id is fine.
func (t *Table) Unregister(ctx context.Context, id int64) error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return tableClosed()
	}
	e := t.live[id]
	if e == nil {
		t.mu.Unlock()
		return nil
	}
	freed := t.withdraw(e, withdrawn|revoked)
	t.mu.Unlock()
	t.finish(freed)
	select {
	case <-e.holds.idle:
		return nil
	default:
	}
	select {
	case <-e.holds.idle:
		return nil
	case <-ctx.Done():
		return status.Newf(status.From(ctx.Err(), "").Code, status.StageClose, "cache %d is still in use by this engine: %w", id, ctx.Err()).
			Hinting("keep its memory until the transfers and copies that use it have returned")
	}
}

// Deallocate ends the owner's hold on an allocated cache, and never waits. A blocks cache is withdrawn at once; another one when no key
// is bound to it, until then it answers as before. Memory goes back to the pool when the last operation or lease lets go. An unknown
// id and a registered cache are fine. Without any pool it is status.FeatureNotEnabled.
func (t *Table) Deallocate(id int64, blocks bool) error {
	t.mu.Lock()
	freed, err := t.deallocate(id, blocks)
	t.mu.Unlock()
	t.finish(freed)
	return err
}

func (t *Table) deallocate(id int64, blocks bool) ([]*Entry, error) {
	if err := t.checkPooled(); err != nil {
		return nil, err
	}
	e := t.live[id]
	if e == nil || !e.Owned {
		return nil, nil
	}
	if isBlocks := e.Shape.Kind == plan.Blocks; isBlocks != blocks {
		return nil, invalid("cache %d is freed as the wrong kind: whether it is a blocks cache is %t", id, isBlocks)
	}
	e.deallocated = true
	if blocks || len(e.keys) == 0 {
		return t.withdraw(e, withdrawn), nil
	}
	return nil, nil
}

// RemoveKey takes a key of an allocated cache out of the index, and frees the cache where that is due. An unknown key and one of a
// registered cache are fine, the latter stays. Without any pool it is status.FeatureNotEnabled.
func (t *Table) RemoveKey(key Key) error {
	t.mu.Lock()
	freed, err := t.removeKey(key)
	t.mu.Unlock()
	t.finish(freed)
	return err
}

func (t *Table) removeKey(key Key) ([]*Entry, error) {
	if err := t.checkPooled(); err != nil {
		return nil, err
	}
	if b := t.keys[key]; b != nil && b.entry.Owned {
		return t.unbind(key, b), nil
	}
	return nil, nil
}

// checkPooled says whether calls about allocated caches make sense. Called with mu held.
func (t *Table) checkPooled() error {
	if t.closed {
		return tableClosed()
	}
	if t.pools[Host] == nil && t.pools[Device] == nil {
		return status.New(status.FeatureNotEnabled, status.StageCheck, "no memory pool is configured")
	}
	return nil
}

// Live says whether a generation's entry can still be found.
func (t *Table) Live(generation uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.generations[generation] != nil
}

// Stats is what a table holds at one moment; all of it is zero when everything has been freed, except Drawn.
type Stats struct {
	Entries   int    // live
	Retiring  int    // withdrawn, not yet given back
	Keys      int    // bound
	Uses      int64  // local operations
	Leases    int64  // consuming pulls
	PoolBytes uint64 // in both pools, whole pages
	Drawn     int64  // ids that were used up
}

// Stats counts.
func (t *Table) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Stats{
		Entries: len(t.live), Retiring: len(t.retiring), Keys: len(t.keys), Uses: t.uses.Load(), Leases: t.leases.Load(), Drawn: t.lastID,
	}
	for _, p := range t.pools {
		if p != nil {
			s.PoolBytes += p.used << p.pageShift
		}
	}
	return s
}

// Close withdraws everything for good, without waiting. What is published is marked dead first, and never written again. The pools' memory
// goes when the last hold has ended, which is now where there is none. Other calls return status.ParamInvalid afterwards. Closing twice is
// fine.
func (t *Table) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	if t.publisher != nil { // all generations end here, before any memory goes; there is nothing left to keep true
		t.publisher.MarkDead()
		t.publisher = nil
	}
	for e := range t.retiring { // what leases still keep
		if before := e.holds.set(revoked); before&revoked == 0 {
			e.revoke(before)
		}
	}
	var freed []*Entry
	for _, e := range t.live {
		freed = append(freed, t.withdraw(e, withdrawn|revoked)...)
	}
	t.mu.Unlock()
	t.finish(freed)
	t.mu.Lock()
	ended := len(t.retiring) == 0
	t.mu.Unlock()
	if !ended {
		return nil // the last hold closes the pools
	}
	return t.closePools()
}

// closePools is called when nothing can come from or go to the pools any more. Calling it again repeats the answer.
func (t *Table) closePools() error {
	var failures []error
	for _, p := range t.pools {
		if p != nil {
			failures = append(failures, p.memory.Close())
		}
	}
	return errors.Join(failures...)
}

func tableClosed() error {
	return status.New(status.ParamInvalid, status.StageCheck, "the engine is finalized, it has no caches")
}
