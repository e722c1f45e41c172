// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrOtherProcess says that what was read came from a process other than the one that was meant, which is gone, or has taken its canary
// away and with that ended all reading.
var ErrOtherProcess = errors.New("this process id is another process's now")

// Process is another process whose memory is read, a [Method] for moves with Src in that process. A process id proves nothing, so each
// system call, which works on one address space from its begin to its end, also reads the [Canary] of the process that is meant.
// Its methods may be called from several goroutines at once.
type Process struct {
	Pid        int // as seen in our own pid namespace
	CanaryAddr uintptr
	Canary     [16]byte
}

var _ Method = (*Process)(nil)

// Copy implements [Method] by process_vm_readv. What it has copied without an error was read from the right process. Failures wrap
// the bare unix.Errno (ESRCH: no such process any more; EPERM; EFAULT at either end, the text says which) or ErrOtherProcess; the
// content of the destinations is then undefined. It allocates nothing unless it fails.
func (p *Process) Copy(moves []Move, offset, bytes uint64) error {
	call := processCalls.Get().(*processCall)
	defer processCalls.Put(call)
	for bytes > 0 {
		for len(moves) > 0 && offset >= moves[0].Bytes {
			offset -= moves[0].Bytes
			moves = moves[1:]
		}
		spans, asked := call.fill(moves, offset, bytes)
		if spans == 0 {
			return fmt.Errorf("read memory of process %d: the list of moves ends %d bytes early", p.Pid, bytes)
		}
		copied, err := p.read(call, spans)
		switch {
		// A short count is no error by itself: the next call begins at the byte where this one ended, and then copies nothing.
		case err == unix.EFAULT || err == nil && copied == 0:
			return p.blame(call)
		case err == nil && copied > asked:
			err = unix.EIO
		}
		if err != nil {
			return p.failed(call.first(), err)
		}
		offset += copied
		bytes -= copied
	}
	return nil
}

// Probe reads the canary alone: whether reading is possible at all is only known after a real call.
func (p *Process) Probe() error {
	call := processCalls.Get().(*processCall)
	defer processCalls.Put(call)
	if _, err := p.read(call, 0); err != nil {
		return p.failed(Move{Src: p.CanaryAddr, Bytes: uint64(len(p.Canary))}, atCanary(err))
	}
	return nil
}

// processCall is what one system call needs, with room for a list of any length. It is on the heap, where nothing moves: the kernel gets
// the address of seen inside of a list.
type processCall struct {
	local, remote [MaxSpans]Span // the first of each is for the canary, so that no byte is read without it
	seen          [16]byte
	spare         [1]byte
}

var processCalls = sync.Pool{New: func() any { return new(processCall) }}

// fill writes what comes next of moves, from offset of the first one on, into the lists: at most bytes and what one call may take.
func (c *processCall) fill(moves []Move, offset, bytes uint64) (spans int, asked uint64) {
	bytes = min(bytes, kernelBatchBytes)
	for _, m := range moves {
		if spans == MaxSpans-1 || asked == bytes {
			break
		}
		if n := min(m.Bytes-offset, bytes-asked); n > 0 {
			spans++
			c.local[spans] = Span{Addr: m.Dst + uintptr(offset), Bytes: n}
			c.remote[spans] = Span{Addr: m.Src + uintptr(offset), Bytes: n}
			asked += n
		}
		offset = 0
	}
	return spans, asked
}

// first is what the call had to begin with.
func (c *processCall) first() Move {
	return Move{Dst: c.local[1].Addr, Src: c.remote[1].Addr, Bytes: c.remote[1].Bytes}
}

// read makes one system call with the first spans of the lists, and says how many of their bytes were read from the process that is
// meant. Bytes of any other one are not counted, and may be in the destinations.
func (p *Process) read(call *processCall, spans int) (copied uint64, err error) {
	call.local[0] = Span{Addr: uintptr(unsafe.Pointer(&call.seen)), Bytes: uint64(len(call.seen))}
	call.remote[0] = Span{Addr: p.CanaryAddr, Bytes: uint64(len(call.seen))}
	call.seen = [16]byte{} // what an earlier call has seen proves nothing
	for {
		// Safe: both lists are alive, on the heap, in the layout of struct iovec (asserted at Span); the kernel checks the addresses in
		// them, and of Go's memory they name only seen and spare, which live as long as the lists.
		n, _, errno := unix.Syscall6(unix.SYS_PROCESS_VM_READV, uintptr(p.Pid),
			uintptr(unsafe.Pointer(&call.local)), uintptr(1+spans), uintptr(unsafe.Pointer(&call.remote)), uintptr(1+spans), 0)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return 0, errno
		case uint64(n) < uint64(len(call.seen)) || call.seen != p.Canary:
			return 0, ErrOtherProcess
		default:
			return uint64(n) - uint64(len(call.seen)), nil
		}
	}
}

// blame says why a call has copied nothing: of whatever comes after the canary the kernel reports no error. The byte at which the call
// ended is read once more, to a place that is there.
func (p *Process) blame(call *processCall) error {
	at := call.first()
	call.local[1] = Span{Addr: uintptr(unsafe.Pointer(&call.spare)), Bytes: 1} // safe: as seen in read
	call.remote[1].Bytes = 1
	switch copied, err := p.read(call, 1); {
	case err != nil:
		return p.failed(at, atCanary(err))
	case copied == 0:
		return p.failed(at, fmt.Errorf("the source is not readable: %w", unix.EFAULT))
	default:
		return p.failed(at, fmt.Errorf("the destination here, at %#x, is not writable: %w", at.Dst, unix.EFAULT))
	}
}

// atCanary is the failure of a call in which nothing but the canary can be amiss. Memory without one is not that of the process that is
// meant, or that one has closed it: never a cache that was unmapped, which EFAULT means elsewhere.
func atCanary(err error) error {
	if err == unix.EFAULT {
		return fmt.Errorf("%w: there is no canary", ErrOtherProcess)
	}
	return err
}

func (p *Process) failed(at Move, err error) error {
	return fmt.Errorf("read %d bytes at %#x of process %d: %w", at.Bytes, at.Src, p.Pid, err)
}
