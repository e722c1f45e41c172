// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"context"
	"errors"
	"os"
	"sync"
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
	// kernelBatchBytes bounds one system call of CopyKernel: 16 MiB are some 10 ms even where every page is a fault, so that
	// no call on a caller's memory comes near 100 ms.
	kernelBatchBytes = 16 << 20
	// kernelBatchSpans is how many moves one system call takes: enough to hide its cost, few enough for the stack.
	kernelBatchSpans = 64
	// pipeChunk is what a pipe holds by default; writing more than that at once would block.
	pipeChunk = 64 << 10
)

// CopyDirect copies with stores of our own. Memory that is not there is status.ParamInvalid.
// With one thread moves are done in their order; with more they are done in any order, side by side, when there is enough to copy:
// a caller whose moves depend on each other asks for one. It returns when everything is copied.
func CopyDirect(moves []Move, threads int) error {
	crew := NewCrew(threads)
	defer crew.Close()
	total := totalOf(moves)
	if err := crew.Copy(context.Background(), moves, total, plainStores{}); err != nil {
		return status.Newf(status.ParamInvalid, status.StageTransfer, "copy %d bytes: %w", total, err)
	}
	return nil
}

func totalOf(moves []Move) (total uint64) {
	for _, m := range moves {
		total += m.Bytes
	}
	return total
}

// CopyKernel copies, in order, by system calls that can't fault: memory that is not there, on either end, is status.ParamInvalid
// with its addresses. What was copied until then stays copied.
func CopyKernel(moves []Move) error {
	return copyKernel(wholeOf(moves), readOwnProcess)
}

// kernelCall is what one system call of copyKernel is given.
type kernelCall struct {
	dst, src [kernelBatchSpans]Span
}

var kernelCalls = sync.Pool{New: func() any { return new(kernelCall) }}

// copyKernel is CopyKernel with the call that it tries first: read copies as many bytes as it can from src into dst, which are
// lists of equal lengths.
func copyKernel(left pieces, read func(dst, src []Span) (uint64, error)) error {
	call := kernelCalls.Get().(*kernelCall)
	defer kernelCalls.Put(call)
	for {
		ahead := left
		spans, asked := ahead.fill(&call.dst, &call.src)
		if spans == 0 {
			return nil
		}
		copied, err := read(call.dst[:spans], call.src[:spans])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EPERM || err == unix.ENOSYS:
			return copyPiped(left.list())
		case err == nil && (copied == 0 || copied > asked):
			err = unix.EIO
		}
		if err != nil {
			return copyFailed(Move{Dst: call.dst[0].Addr, Src: call.src[0].Addr, Bytes: call.src[0].Bytes}, err)
		}
		// A short count is no error by itself: the next call begins where this one ended, and says why.
		left.skip(copied)
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
