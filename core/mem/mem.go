// SPDX-License-Identifier: Apache-2.0

// Package mem owns memory as the engine sees it: addresses that a caller gave us, scratch and pools that we map ourselves, the
// copies between them, and the list of descriptors that a forked child has to close.
//
// It is the only package of core where a number becomes a pointer, which happens in one function. It promises that memory of
// others is looked up before it is written directly ([ProbeWritable]), that what may vanish is only touched by system calls that
// answer EFAULT ([CopyKernel], [ReceiveSpans], [SendSpans]), and that garbage collection never waits for more than 1 MiB of
// copying. It never keeps an address longer than the call that brought it, never knows what a cache or a peer is, and never hands
// memory out that the Go heap owns.
package mem

import "unsafe"

// pointer is the one place where a number becomes a pointer.
//
// It is safe because addr never points into the Go heap or a goroutine's stack for longer than its caller holds the object: it is
// memory that this package mapped, or memory outside Go that the caller of the API keeps alive while a call is under way, so the
// garbage collector neither moves nor frees it and need not know of the pointer. (The detour over &addr is the shape that go vet
// accepts for exactly this case: no arithmetic is hidden in it.)
func pointer(addr uintptr) unsafe.Pointer {
	return *(*unsafe.Pointer)(unsafe.Pointer(&addr))
}

// View shows bytes of memory at addr as a slice. The caller guarantees that all of it is mapped, and stays so while the slice is
// used. A view of no bytes is empty and touches nothing.
func View(addr uintptr, bytes uint64) []byte {
	if bytes == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(pointer(addr)), bytes)
}
