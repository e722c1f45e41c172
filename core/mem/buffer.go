// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Buffer is scratch memory outside the Go heap: whole pages, anonymous, zero at first. System calls may hold its address for as long
// as it is not freed. It must be freed; the garbage collector doesn't know it.
type Buffer struct {
	region []byte
	once   sync.Once
	err    error // what the one munmap said
}

// NewBuffer maps bytes of scratch, rounded up to whole pages by the kernel. It returns status.OutOfMemory when there is none.
func NewBuffer(bytes int) (*Buffer, error) {
	if bytes <= 0 {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "a buffer of %d bytes", bytes)
	}
	region, err := mapPages(-1, uint64(bytes), unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, status.Newf(status.OutOfMemory, status.StageCheck, "map %d bytes of scratch: %w", bytes, err)
	}
	return &Buffer{region: region}, nil
}

// Addr returns where the buffer begins.
func (b *Buffer) Addr() uintptr { return addressOf(b.region) }

// Bytes returns the buffer's memory, which is gone after Free.
func (b *Buffer) Bytes() []byte { return b.region }

// Free unmaps the buffer. Nothing may use its memory any more. Freeing twice is fine.
func (b *Buffer) Free() error {
	b.once.Do(func() {
		b.err = unmapPages(b.region)
		b.region = nil
	})
	return b.err
}

// mapPages maps bytes of fd (or of nothing, with -1) for reading and writing.
func mapPages(fd int, bytes uint64, flags int) ([]byte, error) {
	if bytes > maxMapping {
		return nil, unix.ENOMEM
	}
	at, err := unix.MmapPtr(fd, 0, nil, uintptr(bytes), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, err
	}
	// Safe: the kernel has just mapped bytes at this address for us alone.
	return unsafe.Slice((*byte)(at), bytes), nil
}

// maxMapping keeps a size inside int, which slices and the system calls below need. No machine has that much address space.
const maxMapping = 1<<62 - 1

func unmapPages(region []byte) error {
	if region == nil {
		return nil
	}
	// Safe: region came from mapPages and is unmapped as a whole, once.
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(region)), uintptr(len(region)))
}

func addressOf(region []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(region))) }
