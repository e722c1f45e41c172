// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"fmt"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// Method copies a part of a list of moves.
type Method interface {
	// Copy copies bytes bytes of moves, laid end to end, from offset of moves[0] on. It may be called from several goroutines at
	// once, for different parts.
	Copy(moves []Move, offset, bytes uint64) error
}

// streamTotal is the least total that is streamed. From memory, streaming was faster from 16 KiB on; but it leaves nothing in the caches,
// where a small cache block is used next, and what it saves of 256 KiB, some 15 us, is about what reading that from memory costs its user.
const streamTotal = 256 << 10

// Stores returns the method that copies with stores of our own: plain or streaming, whichever was measured to be faster for total
// bytes. Memory that is not there, on either end, is an error that is unix.EFAULT.
func Stores(total uint64) Method {
	if total >= streamTotal && haveStreams && Calibrate().prefersStreams() {
		return streamingStores{}
	}
	return plainStores{}
}

// Kernel copies as [CopyKernel] does: memory that is not there, on either end, is status.ParamInvalid with its addresses.
var Kernel Method = kernelCopy{}

// pieces walks along a part of a list of moves.
type pieces struct {
	moves  []Move
	offset uint64 // bytes of moves[0] that are behind
	bytes  uint64 // that are left
}

func wholeOf(moves []Move) pieces { return pieces{moves: moves, bytes: totalOf(moves)} }

// next returns the run that comes next, of at most limit bytes and at least 1; false at the end.
func (p *pieces) next(limit uint64) (Move, bool) {
	for p.bytes > 0 {
		m := p.moves[0]
		n := min(m.Bytes-p.offset, p.bytes, limit)
		piece := Move{Dst: m.Dst + uintptr(p.offset), Src: m.Src + uintptr(p.offset), Bytes: n}
		p.offset += n
		p.bytes -= n
		if p.offset == m.Bytes {
			p.moves, p.offset = p.moves[1:], 0
		}
		if n > 0 {
			return piece, true
		}
	}
	return Move{}, false
}

// following is where the source of the next run begins; 0 at the end.
func (p *pieces) following() uintptr {
	if p.bytes == 0 {
		return 0
	}
	return p.moves[0].Src + uintptr(p.offset)
}

type plainStores struct{}

func (plainStores) Copy(moves []Move, offset, bytes uint64) (err error) {
	defer catchFault(debug.SetPanicOnFault(true), &err)
	part := pieces{moves, offset, bytes}
	for piece, ok := part.next(copyChunk); ok; piece, ok = part.next(copyChunk) {
		copy(View(piece.Dst, piece.Bytes), View(piece.Src, piece.Bytes))
	}
	return nil
}

type streamingStores struct{}

func (streamingStores) Copy(moves []Move, offset, bytes uint64) (err error) {
	defer catchFault(debug.SetPanicOnFault(true), &err)
	part := pieces{moves, offset, bytes}
	for piece, ok := part.next(copyChunk); ok; piece, ok = part.next(copyChunk) {
		stream(piece, part.following())
	}
	// Where this goroutine has moved to another core since, its thread has gone through the scheduler's locked instructions there,
	// which order streaming stores as this does.
	streamFence()
	return nil
}

// catchFault is deferred around stores and loads of memory that a caller may have taken away although it is registered. The runtime turns
// the fault of this goroutine into a panic, and this one into an error that is unix.EFAULT; was is what debug.SetPanicOnFault had been.
func catchFault(was bool, err *error) {
	debug.SetPanicOnFault(was)
	switch fault := recover().(type) {
	case nil:
	case interface {
		error
		Addr() uintptr
	}:
		*err = fmt.Errorf("memory at %#x is not there: %w", fault.Addr(), unix.EFAULT)
	default:
		panic(fault)
	}
}

type kernelCopy struct{}

func (kernelCopy) Copy(moves []Move, offset, bytes uint64) error {
	return copyKernel(pieces{moves, offset, bytes}, readOwnProcess)
}

// fill moves on over what one system call takes, and writes it into the two lists.
func (p *pieces) fill(dst, src *[kernelBatchSpans]Span) (spans int, bytes uint64) {
	for spans < len(dst) && bytes < kernelBatchBytes {
		piece, ok := p.next(kernelBatchBytes - bytes)
		if !ok {
			break
		}
		dst[spans] = Span{Addr: piece.Dst, Bytes: piece.Bytes}
		src[spans] = Span{Addr: piece.Src, Bytes: piece.Bytes}
		spans++
		bytes += piece.Bytes
	}
	return spans, bytes
}

func (p *pieces) skip(bytes uint64) {
	for bytes > 0 {
		piece, _ := p.next(bytes)
		bytes -= piece.Bytes
	}
}

// list moves on to the end and returns what was left.
func (p *pieces) list() (moves []Move) {
	for piece, ok := p.next(p.bytes); ok; piece, ok = p.next(p.bytes) {
		moves = append(moves, piece)
	}
	return moves
}
