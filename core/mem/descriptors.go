// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// descriptorEntry is one slot of the table as a forked child reads it: three little-endian int64.
type descriptorEntry struct {
	fd  int64 // -1: free
	dev int64 // st_dev and st_ino of what fd was when it was tracked
	ino int64
}

const (
	descriptorTableBytes = 1 << 20 // some 43k descriptors, twice the usual limit of a process
	descriptorEntries    = descriptorTableBytes / int(unsafe.Sizeof(descriptorEntry{}))
)

// descriptors is the table of the process: a forked child has the descriptors of every engine, so there is one for all of them.
// It is mapped at the first need and stays for good, since Python keeps its address.
var descriptors descriptorTable

type descriptorTable struct {
	mu      sync.Mutex // guards everything below, and orders the writes into entries
	entries []descriptorEntry
	slots   map[int]int // tracked descriptor -> slot
	free    []int       // slots that were used and are free again
	used    int         // slots from here on were never used
}

// Track lists a descriptor of ours, so that a forked child closes it. It returns status.OutOfMemory when the table is full. A number
// that is already listed is listed anew, as what it is now.
func Track(fd int) error { return descriptors.track(fd) }

// Untrack takes a descriptor from the list. Call it before close: afterwards the number may already be somebody else's.
func Untrack(fd int) { descriptors.untrack(fd) }

// DescriptorTable returns where the table is and how many entries it has, used or not; both 0 where it could not be mapped. Each entry
// is three little-endian int64: descriptor (-1: free), st_dev, st_ino. A child closes a number only where fstat still matches. The
// address stays valid for the life of the process and of its forked children.
func DescriptorTable() (addr uintptr, entries int) {
	t := &descriptors
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ready() != nil {
		return 0, 0
	}
	return uintptr(unsafe.Pointer(unsafe.SliceData(t.entries))), len(t.entries)
}

// ready maps the table if that has not been done. Called with mu held.
func (t *descriptorTable) ready() error {
	if t.entries != nil {
		return nil
	}
	region, err := mapPages(-1, descriptorTableBytes, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return status.Newf(status.OutOfMemory, status.StageCheck, "map the table of descriptors: %w", err)
	}
	// Safe: the region is page-aligned, large enough for descriptorEntries entries, and never unmapped.
	t.entries = unsafe.Slice((*descriptorEntry)(unsafe.Pointer(unsafe.SliceData(region))), descriptorEntries)
	for i := range t.entries {
		t.entries[i].fd = -1
	}
	t.slots = map[int]int{}
	return nil
}

func (t *descriptorTable) track(fd int) error {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return status.Newf(status.Failed, status.StageCheck, "fstat of descriptor %d: %w", fd, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.ready(); err != nil {
		return err
	}
	slot, listed := t.slots[fd]
	switch {
	case listed:
	case len(t.free) > 0:
		slot = t.free[len(t.free)-1]
		t.free = t.free[:len(t.free)-1]
	case t.used < len(t.entries):
		slot = t.used
		t.used++
	default:
		return status.Newf(status.OutOfMemory, status.StageCheck, "the table of %d descriptors is full", len(t.entries))
	}
	// A fork may happen between any two of these stores. In this order the child sees a free slot or a whole entry.
	entry := &t.entries[slot]
	atomic.StoreInt64(&entry.fd, -1)
	atomic.StoreInt64(&entry.dev, int64(stat.Dev))
	atomic.StoreInt64(&entry.ino, int64(stat.Ino))
	atomic.StoreInt64(&entry.fd, int64(fd))
	t.slots[fd] = slot
	return nil
}

func (t *descriptorTable) untrack(fd int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	slot, listed := t.slots[fd]
	if !listed {
		return
	}
	atomic.StoreInt64(&t.entries[slot].fd, -1)
	delete(t.slots, fd)
	t.free = append(t.free, slot)
}
