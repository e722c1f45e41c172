// SPDX-License-Identifier: Apache-2.0

// Package plan turns a request and two cache descriptions into a short list of segments.
//
// It is pure: no memory is touched, nothing is looked up, and the same inputs give the same list on both ends of a link (rule 2 of
// docs/design.md), which is why a peer never has to send offsets that would have to be trusted. It promises that every segment lies
// inside the tensors that the two descriptions describe, or returns LLM_PARAM_INVALID (LLM_KV_CACHE_NOT_EXIST where the owner has no
// such batch row), whatever the inputs are: they may come from a hostile peer.
//
// [CheckLocal] is what the initiator knows before it asks anybody, [CheckRemote] what can be said once the owner's cache is known,
// [Build] both and then the list, [Hash] what the two ends compare.
package plan

// Kind says how a cache is addressed.
type Kind uint8

// The kinds of spec §8.1.
const (
	Contiguous Kind = 1 // batch rows: Count batches of Stride bytes
	Blocks     Kind = 2 // blocks: Count blocks of Stride bytes
)

// Shape is what planning needs to know of a cache: all its tensors have this same shape.
type Shape struct {
	Kind        Kind
	Tensors     uint32 // tensors in the cache
	TensorBytes uint64 // bytes of one tensor
	Stride      uint64 // bytes of one batch row (Contiguous) or one block (Blocks): TensorBytes / Count, rounded down
	Count       uint64 // shape[0]: batch rows or blocks
}

// Range is a run of tensors, by index (not by layer). All stands for every tensor of a cache; without it a Count of 0 is an error.
// Where Parts is above 1 a cache's tensors are that many equal parts, one behind the other (the devices of v1 mode), and the run is one
// of each part, in which First counts.
type Range struct {
	First, Count uint32
	Parts        uint32
	All          bool
}

// Tensors is how many tensors the range takes from a cache of this shape.
func (r Range) Tensors(of Shape) uint64 {
	if r.All {
		return uint64(of.Tensors)
	}
	return uint64(r.Count) * uint64(r.parts())
}

// Nth returns the tensor that is k-th in the range, which lies inside a cache of this shape.
func (r Range) Nth(k uint32, of Shape) uint32 {
	switch {
	case r.All:
		return k
	case r.Parts <= 1:
		return r.First + k
	}
	return k/r.Count*(of.Tensors/r.Parts) + r.First + k%r.Count
}

// Inside says whether the range names tensors that a cache of this shape has.
func (r Range) Inside(of Shape) bool {
	if r.All {
		return true
	}
	parts := r.parts()
	return r.Count > 0 && of.Tensors%parts == 0 && uint64(r.First)+uint64(r.Count) <= uint64(of.Tensors/parts)
}

func (r Range) parts() uint32 { return max(1, r.Parts) }

// Request is what a pull asks for, in terms of the initiator ("dst") and the owner ("src").
type Request struct {
	SrcTensors, DstTensors Range
	SrcBatch, DstBatch     uint64   // batch rows; 0 where a side is addressed by blocks
	Size                   int64    // bytes of a contiguous pull; -1: one destination row; not looked at where DstBlocks is set
	SrcBlocks, DstBlocks   []uint64 // block ids; SrcBlocks empty and DstBlocks set: contiguous to blocks
	OneSided               bool     // the laxer kind rules of spec §8.6
	// Bytes from the starts of the two batch rows (spec §9.5); not looked at where DstBlocks is set. Exact says that the caller gave
	// them, even as 0: such a pull consumes nothing, and moves what it says.
	SrcOffset, DstOffset uint64
	Exact                bool
	// Whole, which the owner decides as it does SrcBatch: the source's whole batch row moves, and neither Size nor offsets count. Not
	// looked at where DstBlocks is set.
	Whole bool
}

// Parts is how many parts the ranges of the request are of; 0 stands for 1.
func (r *Request) Parts() uint32 { return max(r.SrcTensors.Parts, r.DstTensors.Parts) }

// Segment is one run of bytes to move. In a plan, segments are ordered as the stream of bytes is.
type Segment struct {
	SrcTensor, DstTensor uint32
	SrcOffset, DstOffset uint64 // bytes from the start of the tensor
	Bytes                uint64
}
