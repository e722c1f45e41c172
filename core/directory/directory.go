// SPDX-License-Identifier: Apache-2.0

// Package directory is what an owner publishes of its table of caches, and how a peer reads it without the owner taking part.
//
// A direct transport resolves a key with the owner and gets a generation. A [Reader] turns that generation into addresses, and says
// after the bytes were read whether they still were that generation's. It promises that a generation is never used twice, and that
// memory is given back, or its owner may do with it what it likes, only after [Reader.Live] has become false for good. It never
// reads a cache's bytes, and it never decides what a key means: that is the owner's.
//
// Two things implement it: the owner's table itself, for engines that share a process (core/cache), and pages that the owner shares
// with its peers, for those that share a host. A [Publisher] fills the pages, [Pages] reads them. Whatever an owner has written there,
// and wherever it was stopped while it wrote, a reader neither waits, nor panics, nor allocates more than the pages are large.
package directory

import (
	"math"
	"math/bits"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
)

// Ref is where a reader has found a generation.
type Ref struct {
	Slot       uint32
	Generation uint64
}

// Space says whose addresses they are.
type Space uint8

// The spaces of addresses.
const (
	Mapped  Space = 1 // of this process
	Private Space = 2 // of the owner's process
	Distant Space = 3 // of the owner's device
)

// Located is a cache that was found: its shape, and the base of each tensor. Addrs is not changed by either side. It is the transport's
// to check that they lie in memory that it may reach.
type Located struct {
	Ref   Ref
	Shape plan.Shape
	Addrs []uintptr
	Space Space
}

// Name is what a cache can be found under, as far as a directory tells: its own id or, with ByKey, the key of the blocks caches of Model.
type Name struct {
	ByKey bool
	Model uint64
}

// Reader is a peer's view of one owner's directory. Its methods may be called from many goroutines, and never wait for the owner. A
// reader that can't tell, because what it read was being changed, says no.
type Reader interface {
	// Lookup finds the cache of a generation that is [Reader.Live].
	Lookup(generation uint64) (Located, bool)
	// Live says that the memory of what was found is its own still: what was read before was never anything else. That outlives the
	// names where a lease holds the memory, and ends before the memory is given back or withdrawn, and with the owner.
	//
	// A Reader over shared pages puts a load fence between the reads of the caller and its own.
	Live(ref Ref) bool
	// Named says that the owner would still find it under a name: what was resolved earlier may be used once more.
	Named(ref Ref, name Name) bool
}

// Record is what an owner publishes of a cache.
type Record struct {
	ID         int64
	Generation uint64 // not 0, and never used before
	Shape      plan.Shape
	Accessible bool   // reachable by peers in one-sided mode
	Pool       uint32 // 0: memory that only the owner has mapped; n: pool n-1 of those that it shares
	HasKey     bool   // the key of the blocks caches of Model leads here
	Model      uint64
	Addrs      []uintptr // of the tensors: addresses in the owner or, with a Pool, offsets in it
}

// sound says whether the sizes of a record agree: then no sum of offsets in its tensors overflows, nor that of all their bytes.
func (r *Record) sound() bool {
	s := &r.Shape
	if r.Generation == 0 || s.Kind != plan.Contiguous && s.Kind != plan.Blocks || s.Tensors == 0 || s.Tensors > arenaWords {
		return false
	}
	over, bytes := bits.Mul64(s.Stride, s.Count)
	if over != 0 || bytes != s.TensorBytes || bytes == 0 {
		return false
	}
	over, all := bits.Mul64(s.TensorBytes, uint64(s.Tensors))
	return over == 0 && all <= math.MaxInt64
}

// fits says whether a tensor of that size can be at addr without running beyond the address space.
func fits(addr, tensorBytes uint64) bool { return tensorBytes <= math.MaxUint64-addr }
