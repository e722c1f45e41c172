// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// CopyCall is one copy_cache: from a batch row of one local cache to a row of another, or of the same.
type CopyCall struct {
	Dst, Src           int64 // cache ids
	DstBatch, SrcBatch uint64
	Offset             uint64 // bytes from the start of both rows
	Size               int64  // bytes of each tensor; -1: what is left of the source row
}

// CopyCache copies a row of every tensor, see spec §8.11. Errors: CacheNotExist, ParamInvalid.
func (e *Engine) CopyCache(call CopyCall) error {
	src, err := e.table.Use(call.Src)
	if err != nil {
		return err
	}
	defer src.Release()
	dst, err := e.table.Use(call.Dst)
	if err != nil {
		return err
	}
	defer dst.Release()
	bytes, err := copyBytes(call, dst.Entry(), src.Entry())
	if err != nil {
		return err
	}
	to, from := dst.Entry(), src.Entry()
	moves := make([]mem.Move, from.Shape.Tensors)
	for t := range moves {
		moves[t] = mem.Move{
			Dst:   to.Addrs[t] + uintptr(call.DstBatch*to.Shape.Stride+call.Offset),
			Src:   from.Addrs[t] + uintptr(call.SrcBatch*from.Shape.Stride+call.Offset),
			Bytes: bytes,
		}
	}
	return e.copy(moves, dst, src)
}

// copyBytes checks a CopyCall and returns how many bytes of each tensor it moves.
func copyBytes(call CopyCall, dst, src *cache.Entry) (uint64, error) {
	invalid := func(format string, args ...any) (uint64, error) {
		return 0, status.Newf(status.ParamInvalid, status.StageCheck, format, args...)
	}
	if dst.Shape.Tensors != src.Shape.Tensors {
		return invalid("the destination has %d tensors, the source %d", dst.Shape.Tensors, src.Shape.Tensors)
	}
	if call.SrcBatch >= src.Shape.Count {
		return invalid("source batch %d is outside a cache of %d", call.SrcBatch, src.Shape.Count)
	}
	if call.DstBatch >= dst.Shape.Count {
		return invalid("destination batch %d is outside a cache of %d", call.DstBatch, dst.Shape.Count)
	}
	if call.Offset > 0 && (call.Offset >= src.Shape.Stride || call.Offset >= dst.Shape.Stride) {
		return invalid("offset %d is beyond a row of %d or %d bytes", call.Offset, src.Shape.Stride, dst.Shape.Stride)
	}
	bytes := uint64(call.Size)
	if call.Size < 0 {
		bytes = src.Shape.Stride - call.Offset
	}
	if bytes == 0 || bytes > src.Shape.Stride-call.Offset || bytes > dst.Shape.Stride-call.Offset {
		return invalid("%d bytes from offset %d do not fit rows of %d and %d bytes", bytes, call.Offset, src.Shape.Stride, dst.Shape.Stride)
	}
	return bytes, nil
}

// CopyBlocks copies blocks of a local cache onto others, pairs of (source, destination) in their order. See spec §8.12.
func (e *Engine) CopyBlocks(id int64, pairs []uint64) error {
	use, err := e.table.Use(id)
	if err != nil {
		return err
	}
	defer use.Release()
	entry := use.Entry()
	for _, block := range pairs {
		if block >= entry.Shape.Count {
			return status.Newf(status.ParamInvalid, status.StageCheck, "block %d is outside a cache of %d blocks", block, entry.Shape.Count)
		}
	}
	return e.copyOrdered(blockMoves(entry.Addrs, entry.Addrs, entry.Shape.Stride, pairs), use)
}

// SwapBlocks copies blocks between two caches that are given by the addresses of their tensors and where those lie. See spec §8.13. The
// addresses need not belong to any cache, so that only kernel copies may touch them: host memory that is not mapped is ParamInvalid.
func (e *Engine) SwapBlocks(dst, src []uintptr, dstPlacement, srcPlacement cache.Placement, blockBytes uint64, pairs []uint64) error {
	return e.copyBetween(blockMoves(dst, src, blockBytes, pairs), e.unknown(dstPlacement), e.unknown(srcPlacement), 1)
}

// unknown is how memory of a placement may be copied of which nothing else is known.
func (e *Engine) unknown(placement cache.Placement) mem.Backing {
	if placement == cache.Device && e.parts.Device.Apart() {
		return mem.BackingDevice
	}
	return mem.BackingFile
}

func blockMoves(dst, src []uintptr, blockBytes uint64, pairs []uint64) []mem.Move {
	moves := make([]mem.Move, 0, len(src)*len(pairs)/2)
	for t := range src {
		for i := 0; i+1 < len(pairs); i += 2 {
			from, to := src[t]+uintptr(pairs[i]*blockBytes), dst[t]+uintptr(pairs[i+1]*blockBytes)
			if from != to {
				moves = append(moves, mem.Move{Dst: to, Src: from, Bytes: blockBytes})
			}
		}
	}
	return moves
}

// copyOrdered copies moves of which a later one may read what an earlier one wrote.
func (e *Engine) copyOrdered(moves []mem.Move, use *cache.Use) error {
	return e.copyUses(moves, use, use, 1)
}

func (e *Engine) copy(moves []mem.Move, dst, src *cache.Use) error {
	return e.copyUses(moves, dst, src, e.options.CopyThreads)
}

// copyUses copies between two caches, whose memory says how.
func (e *Engine) copyUses(moves []mem.Move, dst, src *cache.Use, threads int) error {
	to, err := dst.Backing()
	if err != nil {
		return err
	}
	from, err := src.Backing()
	if err != nil {
		from = mem.BackingFile // it may be read-only memory, which Backing rejects: kernel copies tell
	}
	return e.copyBetween(moves, to, from, threads)
}

// copyBetween has the device copy, as is safe for the two kinds of memory.
func (e *Engine) copyBetween(moves []mem.Move, to, from mem.Backing, threads int) error {
	if len(moves) == 0 {
		return nil
	}
	if err := mem.CopyBetween(e.parts.Device, moves, to, from, threads); err != nil {
		return status.From(err, status.StageTransfer)
	}
	return nil
}
