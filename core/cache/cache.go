// SPDX-License-Identifier: Apache-2.0

// Package cache owns what an engine knows of its own caches: descriptions, the pools that allocated caches live in, the table of
// live entries with their keys, and who holds an entry's memory at the moment.
//
// It promises that a generation is live for exactly as long as its entry can be found, that pool memory is used again only when the
// last operation, lease and system call on it has let go, that a key is released at most once and only where a pull has been
// confirmed, and that nothing is left behind when the table is closed. It never reads or writes a cache's bytes, never waits while it
// holds its lock, and knows nothing of links and peers.
package cache

import (
	"context"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Placement says which of the two memories of the API a cache lives in.
type Placement uint8

// The placements of spec §2.2.
const (
	Host   Placement = 0
	Device Placement = 1
)

// String returns the documented name.
func (p Placement) String() string {
	if p == Device {
		return "DEVICE"
	}
	return "HOST"
}

// Desc describes a cache as the caller does: all tensors have the same shape and element type.
type Desc struct {
	Kind         plan.Kind
	Tensors      uint32
	Dims         []int64
	ElementBytes uint64
	Placement    Placement
	SeqLenDim    int32 // which dimension is the sequence; -1: not said
}

// maxRank is the largest number of dimensions of a tensor (spec §8.1).
const maxRank = 31

// check finds what is refused before an id is drawn.
func (d Desc) check() error {
	switch {
	case d.Kind != plan.Contiguous && d.Kind != plan.Blocks:
		return invalid("a cache of kind %d", d.Kind)
	case d.Placement > Device:
		return invalid("placement %d", uint8(d.Placement))
	case d.Tensors == 0:
		return invalid("a cache without tensors")
	case len(d.Dims) < 1 || len(d.Dims) > maxRank:
		return invalid("a shape of %d dimensions, 1 to %d are possible", len(d.Dims), maxRank)
	}
	return nil
}

// shape computes the sizes. The bytes of all tensors together fit an int64, so that no sum of offsets overflows.
func (d Desc) shape() (plan.Shape, error) {
	size := d.ElementBytes
	for _, dim := range d.Dims {
		if dim <= 0 {
			return plan.Shape{}, invalid("dimension %d in shape %v", dim, d.Dims)
		}
		high, low := bits.Mul64(size, uint64(dim))
		if high != 0 {
			return plan.Shape{}, invalid("shape %v of elements of %d bytes is too large", d.Dims, d.ElementBytes)
		}
		size = low
	}
	high, all := bits.Mul64(size, uint64(d.Tensors))
	if size == 0 || high != 0 || all > math.MaxInt64 {
		return plan.Shape{}, invalid("%d tensors of shape %v and elements of %d bytes have no usable size", d.Tensors, d.Dims, d.ElementBytes)
	}
	count := uint64(d.Dims[0])
	return plan.Shape{Kind: d.Kind, Tensors: d.Tensors, TensorBytes: size, Stride: size / count, Count: count}, nil
}

// NoID stands for "no id" in a key.
const NoID = math.MaxUint64

// Key names a batch row of a cache, or a blocks cache. BlocksCacheKey(c, m) is Key{ID: NoID, Model: m}. Keys are equal when all
// three fields are.
type Key struct {
	ID, Model uint64
	Prefix    bool
}

// namesBlocks says whether the key is one that a directory shows.
func (k Key) namesBlocks() bool { return k.ID == NoID && !k.Prefix }

// String names the key as its caller did.
func (k Key) String() string {
	switch {
	case k.Prefix:
		return fmt.Sprintf("prefix %d of model %d", k.ID, k.Model)
	case k.ID == NoID:
		return fmt.Sprintf("the blocks of model %d", k.Model)
	}
	return fmt.Sprintf("request %d of model %d", k.ID, k.Model)
}

// Entry is one registration or allocation. Its exported fields never change; an entry that is withdrawn stays readable, but its
// memory is not to be touched except between Acquire and Release, or under a Use.
type Entry struct {
	ID         int64
	Generation uint64
	Shape      plan.Shape
	Placement  Placement
	SeqLenDim  int32
	Addrs      []uintptr
	Owned      bool // allocated from a pool
	Accessible bool // reachable by peers in one-sided mode

	holds       holds
	native      atomic.Int64    // the name in a vendor's library; 0: none, noNative: none any more
	detained    atomic.Int64    // transfers into it that may still write, see Use.Detain
	life        context.Context // ends when the entry is revoked: for those who write its memory on a peer's behalf
	end         context.CancelFunc
	wraps       bool             // a tensor runs beyond the address space
	extents     []extent         // owned: the pages under Addrs, sorted and joined
	keys        map[Key]*binding // guarded by Table.mu: keys in the index that lead here
	normalAt    map[uint64]Key   // guarded by Table.mu: batch index -> the normal key bound there; owned entries only
	deallocated bool             // guarded by Table.mu: the owner let go, keys keep the entry
	slot        int32            // guarded by Table.mu: where the entry is published; -1: nowhere
	shown       Key              // guarded by Table.mu: the blocks key that is published with it; the zero Key: none
	probe       sync.Mutex       // guards backing, and makes concurrent first uses look the memory up once
	backing     mem.Backing      // what a successful look-up found
}

// noNative is the name of an entry that is gone.
const noNative = -1

// Native returns the entry's name in a vendor's library; 0: it has none there.
func (e *Entry) Native() int64 { return max(0, e.native.Load()) }

// Enroll gives the entry its name in a vendor's library, for Table.Leaving to take it back. It returns false where the entry is gone
// already: then nobody does.
func (e *Entry) Enroll(native int64) bool { return e.native.CompareAndSwap(0, native) }

// batches is how many batch rows a pull can address: a blocks cache counts as one.
func (e *Entry) batches() uint64 {
	if e.Shape.Kind == plan.Blocks {
		return 1
	}
	return e.Shape.Count
}

// wraps says that a tensor would run beyond the address space: accepted at registration, but never a source.
func wraps(addrs []uintptr, tensorBytes uint64) bool {
	return slices.ContainsFunc(addrs, func(addr uintptr) bool { return tensorBytes > math.MaxUint64-uint64(addr) })
}

// binding is one key in the index.
type binding struct {
	entry   *Entry
	batch   uint64
	pending []uint64 // bit set of the tensors not yet pulled through this key; nil: all of them
}

// pulled takes tensors out of the pending set and says whether it is empty now.
func (b *binding) pulled(tensors plan.Range) bool {
	if tensors.All {
		return true
	}
	shape := b.entry.Shape
	if b.pending == nil {
		b.pending = make([]uint64, (uint64(shape.Tensors)+63)/64)
		for tensor := range shape.Tensors {
			b.pending[tensor/64] |= 1 << (tensor % 64)
		}
	}
	if tensors.Inside(shape) {
		for k := range uint32(tensors.Tensors(shape)) {
			tensor := tensors.Nth(k, shape)
			b.pending[tensor/64] &^= 1 << (tensor % 64)
		}
	}
	for _, word := range b.pending {
		if word != 0 {
			return false
		}
	}
	return true
}

func invalid(format string, args ...any) *status.Error {
	return status.Newf(status.ParamInvalid, status.StageCheck, format, args...)
}
