// SPDX-License-Identifier: Apache-2.0

package cann

// #include "shim.h"
import "C"

import (
	"fmt"
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Device is one device, by the vendor's runtime. Its methods may be called from many goroutines.
type Device struct{ id C.int32_t }

var _ mem.Device = (*Device)(nil)

// NewDevice returns the device with a number. [Load] must have succeeded before it is used.
func NewDevice(id int32) *Device { return &Device{C.int32_t(id)} }

// Name implements mem.Device.
func (d *Device) Name() string { return "cann" }

// Apart implements mem.Device.
func (d *Device) Apart() bool { return true }

// Reserve implements mem.Device, with huge pages where there are some. All of it is committed at once.
func (d *Device) Reserve(bytes uint64) (mem.Memory, error) {
	return d.reserve(bytes, "device memory",
		func(address *C.uint64_t, refusal *C.cann_error) C.int32_t {
			return C.shim_malloc(d.id, C.uint64_t(bytes), C.CANN_HUGE_FIRST, address, refusal)
		},
		func(address C.uint64_t, refusal *C.cann_error) C.int32_t { return C.shim_free(d.id, address, refusal) })
}

// ReserveHost implements mem.Device, with pinned memory.
func (d *Device) ReserveHost(bytes uint64) (mem.Memory, error) {
	return d.reserve(bytes, "pinned host memory",
		func(address *C.uint64_t, refusal *C.cann_error) C.int32_t {
			return C.shim_malloc_host(d.id, C.uint64_t(bytes), address, refusal)
		},
		func(address C.uint64_t, refusal *C.cann_error) C.int32_t {
			return C.shim_free_host(d.id, address, refusal)
		})
}

func (d *Device) reserve(bytes uint64, kind string, obtain func(address *C.uint64_t, refusal *C.cann_error) C.int32_t,
	free func(address C.uint64_t, refusal *C.cann_error) C.int32_t) (mem.Memory, error) {
	if bytes == 0 {
		return nil, status.New(status.ParamInvalid, status.StageCheck, "a reservation of 0 bytes")
	}
	var address C.uint64_t
	err := call(status.StageCheck, func(refusal *C.cann_error) C.int32_t { return obtain(&address, refusal) })
	if err != nil {
		return nil, reworded(err, status.OutOfMemory, fmt.Sprintf("reserve %d bytes of %s, device %d", bytes, kind, d.id))
	}
	return &reservation{addr: uintptr(address), bytes: bytes, free: sync.OnceValue(func() error {
		return call(status.StageClose, func(refusal *C.cann_error) C.int32_t { return free(address, refusal) })
	})}, nil
}

// reservation is memory of the runtime's.
type reservation struct {
	addr  uintptr
	bytes uint64
	free  func() error // frees once, and returns what that said
}

// Addr implements mem.Memory.
func (r *reservation) Addr() uintptr { return r.addr }

// Bytes implements mem.Memory.
func (r *reservation) Bytes() uint64 { return r.bytes }

// Discard implements mem.Memory: the runtime takes back whole reservations only.
func (r *reservation) Discard(_, _ uint64) error { return nil }

// Close implements mem.Memory.
func (r *reservation) Close() error { return r.free() }

// batchMoves is how many moves cross to C at once: a copy costs microseconds, so that what crossing costs is nothing beside 64 of them, and
// they take 2 KiB.
const batchMoves = 64

// batch is what one crossing of Copy takes, outside the stack: C is given its address.
type batch struct {
	moves   [batchMoves]C.cann_copy_move
	refusal C.cann_error
}

var batches = sync.Pool{New: func() any { return new(batch) }}

// Copy implements mem.Device. Moves are made in their order by the calling thread alone, whatever threads says: the runtime's copies are
// no work of the processor's. The first failure ends them.
func (d *Device) Copy(moves []mem.Move, to, from mem.Backing, threads int) error {
	var kind C.int32_t
	switch {
	case to != mem.BackingDevice && from != mem.BackingDevice:
		return mem.Host().Copy(moves, to, from, threads)
	case to == mem.BackingDevice && from == mem.BackingDevice:
		kind = C.CANN_DEVICE_TO_DEVICE
	case to == mem.BackingDevice && from == mem.BackingAnonymous:
		kind = C.CANN_HOST_TO_DEVICE
	case to == mem.BackingAnonymous && from == mem.BackingDevice:
		kind = C.CANN_DEVICE_TO_HOST
	default:
		return status.New(status.Failed, status.StageTransfer, "a device was given host memory that may not be there")
	}
	b := batches.Get().(*batch)
	defer batches.Put(b)
	for len(moves) > 0 {
		count := b.fill(&moves)
		if count == 0 {
			break
		}
		err := refused(status.StageTransfer, C.shim_copy(d.id, kind, &b.moves[0], C.uint64_t(count), &b.refusal), &b.refusal)
		if err != nil {
			return err
		}
	}
	return nil
}

// fill takes moves, of which those of no bytes are made already: the runtime would look at their addresses.
func (b *batch) fill(moves *[]mem.Move) (count int) {
	for len(*moves) > 0 && count < batchMoves {
		m := (*moves)[0]
		*moves = (*moves)[1:]
		if m.Bytes == 0 {
			continue
		}
		b.moves[count] = C.cann_copy_move{
			dst: C.uint64_t(m.Dst), dst_bytes: C.uint64_t(m.Bytes), src: C.uint64_t(m.Src), bytes: C.uint64_t(m.Bytes),
		}
		count++
	}
	return count
}
