// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Move is one run of bytes to copy. Its two ends don't overlap, unless they are the same.
type Move struct {
	Dst, Src uintptr
	Bytes    uint64
}

const (
	// copyChunk bounds how long garbage collection waits for a copy, which can't be preempted: 1 MiB takes about 0.1 ms.
	copyChunk = 1 << 20
	// parallelBytes is the total from which more threads pay off: starting and joining them costs some 10 us, about what one
	// thread needs to copy 128 KiB; below 2 MiB they could save less than that is worth.
	parallelBytes = 2 << 20
	// kernelBatchBytes bounds one system call of CopyKernel: 16 MiB are some 10 ms even where every page is a fault, so that
	// no call on a caller's memory comes near 100 ms.
	kernelBatchBytes = 16 << 20
	// kernelBatchSpans is how many moves one system call takes: enough to hide its cost, few enough for the stack.
	kernelBatchSpans = 64
	// pipeChunk is what a pipe holds by default; writing more than that at once would block.
	pipeChunk = 64 << 10
)

// CopyDirect copies with stores of our own. The caller guarantees that all memory of moves is mapped and can't vanish.
// With one thread moves are done in their order; with more they are done in any order, side by side, when there is enough to copy:
// a caller whose moves depend on each other asks for one. It returns when everything is copied.
func CopyDirect(moves []Move, threads int) {
	var total uint64
	for _, m := range moves {
		total += m.Bytes
	}
	if threads <= 1 || total < parallelBytes {
		for _, m := range moves {
			copyPart(m, 0, m.Bytes)
		}
		return
	}
	threads = int(min(uint64(threads), total/copyChunk))
	var claimed atomic.Uint64 // bytes of the moves, laid end to end, that some thread has taken
	var others sync.WaitGroup
	for range threads - 1 {
		others.Go(func() { copyClaimed(moves, total, &claimed) })
	}
	copyClaimed(moves, total, &claimed)
	others.Wait()
}

// copyClaimed takes one chunk after the other of what nobody has taken. Claims only grow, so one walk along moves serves all of them.
func copyClaimed(moves []Move, total uint64, claimed *atomic.Uint64) {
	var index int
	var before uint64 // bytes of the moves before index
	for {
		end := claimed.Add(copyChunk)
		from := end - copyChunk
		if from >= total {
			return
		}
		for end = min(end, total); from < end; {
			for before+moves[index].Bytes <= from {
				before += moves[index].Bytes
				index++
			}
			part := min(end, before+moves[index].Bytes) - from
			copyPart(moves[index], from-before, part)
			from += part
		}
	}
}

// copyPart copies bytes of m from offset on, in chunks.
func copyPart(m Move, offset, bytes uint64) {
	for bytes > 0 {
		n := min(bytes, copyChunk)
		copy(View(m.Dst+uintptr(offset), n), View(m.Src+uintptr(offset), n))
		offset += n
		bytes -= n
	}
}

// CopyKernel copies, in order, by system calls that can't fault: memory that is not there, on either end, is status.ParamInvalid
// with its addresses. What was copied until then stays copied.
func CopyKernel(moves []Move) error {
	return copyKernel(moves, readOwnProcess)
}

// copyKernel is CopyKernel with the call that it tries first: read copies as many bytes as it can from src into dst, which are
// lists of equal lengths.
func copyKernel(moves []Move, read func(dst, src []Span) (uint64, error)) error {
	var dst, src [kernelBatchSpans]Span
	next := cursor{moves: moves}
	for {
		spans, bytes := next.fill(&dst, &src)
		if spans == 0 {
			return nil
		}
		copied, err := read(dst[:spans], src[:spans])
		if err == unix.EINTR {
			continue
		}
		if err == unix.EPERM || err == unix.ENOSYS {
			return copyPiped(next.rest())
		}
		if err != nil {
			return copyFailed(next.here(), err)
		}
		// A short count is no error by itself: the next call begins where this one ended, and says why.
		if copied == 0 || copied > bytes {
			return copyFailed(next.here(), unix.EIO)
		}
		next.advance(copied)
	}
}

// readOwnProcess reads the own process's memory with process_vm_readv, which pins the source's pages and copies to the destination
// with checks, and so answers EFAULT for either.
func readOwnProcess(dst, src []Span) (uint64, error) {
	// Safe: both lists are alive and in the layout of struct iovec (asserted at Span); the kernel checks the addresses in them.
	n, _, errno := unix.Syscall6(unix.SYS_PROCESS_VM_READV, uintptr(os.Getpid()),
		uintptr(unsafe.Pointer(unsafe.SliceData(dst))), uintptr(len(dst)),
		uintptr(unsafe.Pointer(unsafe.SliceData(src))), uintptr(len(src)), 0)
	if errno != 0 {
		return 0, errno
	}
	return uint64(n), nil
}

// cursor is a place in a list of moves.
type cursor struct {
	moves []Move
	done  uint64 // bytes of moves[0] that are copied
}

// fill writes what comes next into the two lists and returns how many spans and bytes that is.
func (c *cursor) fill(dst, src *[kernelBatchSpans]Span) (spans int, bytes uint64) {
	done := c.done
	for _, m := range c.moves {
		if spans == len(dst) || bytes == kernelBatchBytes {
			break
		}
		n := min(m.Bytes-done, kernelBatchBytes-bytes)
		if n > 0 {
			dst[spans] = Span{Addr: m.Dst + uintptr(done), Bytes: n}
			src[spans] = Span{Addr: m.Src + uintptr(done), Bytes: n}
			spans++
		}
		bytes += n
		done = 0
	}
	return spans, bytes
}

func (c *cursor) advance(bytes uint64) {
	c.done += bytes
	for len(c.moves) > 0 && c.done >= c.moves[0].Bytes {
		c.done -= c.moves[0].Bytes
		c.moves = c.moves[1:]
	}
}

// here is what is left of the first move that is not done.
func (c *cursor) here() Move {
	for _, m := range c.rest() {
		if m.Bytes > 0 {
			return m
		}
	}
	return Move{}
}

func (c *cursor) rest() []Move {
	if c.done == 0 {
		return c.moves
	}
	m := c.moves[0]
	rest := append([]Move{}, c.moves...)
	rest[0] = Move{Dst: m.Dst + uintptr(c.done), Src: m.Src + uintptr(c.done), Bytes: m.Bytes - c.done}
	return rest
}

// copyPiped copies through a pipe: slow (every byte twice), but write and read on a pipe are allowed wherever a process may run,
// and both answer EFAULT.
func copyPiped(moves []Move) error {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return status.Newf(status.Failed, status.StageTransfer, "process_vm_readv is refused here, and no pipe to copy through: %w", err)
	}
	defer func() { _, _ = unix.Close(pipe[0]), unix.Close(pipe[1]) }()
	for _, m := range moves {
		for done := uint64(0); done < m.Bytes; {
			at := Move{Dst: m.Dst + uintptr(done), Src: m.Src + uintptr(done), Bytes: min(m.Bytes-done, pipeChunk)}
			n, err := pipeOnce(unix.SYS_WRITE, pipe[1], at.Src, at.Bytes)
			for drained := uint64(0); err == nil && drained < n; {
				var r uint64
				r, err = pipeOnce(unix.SYS_READ, pipe[0], at.Dst+uintptr(drained), n-drained)
				drained += r
			}
			if err != nil {
				return copyFailed(at, err)
			}
			done += n
		}
	}
	return nil
}

// pipeOnce is one read or write that moved something, or an error.
func pipeOnce(call uintptr, fd int, addr uintptr, bytes uint64) (uint64, error) {
	for {
		n, _, errno := unix.Syscall(call, uintptr(fd), addr, uintptr(bytes))
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return 0, errno
		case n == 0:
			return 0, unix.EIO
		default:
			return uint64(n), nil
		}
	}
}

func copyFailed(at Move, err error) error {
	code := status.Failed
	if errors.Is(err, unix.EFAULT) {
		code = status.ParamInvalid
	}
	return status.Newf(code, status.StageTransfer, "copy %d bytes from %#x to %#x: %w", at.Bytes, at.Src, at.Dst, err)
}
