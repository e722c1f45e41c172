// SPDX-License-Identifier: Apache-2.0

// Package device is a device for tests whose memory this process can't touch: its addresses are mapped without any right, so that a load or
// a store there is a fault and a system call answers EFAULT. Its own copies, and the test by [Fake.View], see the same pages through a second
// mapping elsewhere. Tests alone import it.
package device

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Hook looks at a copy before it is made. An error is what the copy then returns, with nothing copied.
type Hook func(moves []mem.Move, to, from mem.Backing) error

// Fake implements mem.Device. Its methods may be called from many goroutines.
type Fake struct {
	hook   atomic.Pointer[Hook]
	copies atomic.Int64

	mu   sync.RWMutex // guards held; copies hold it for reading
	held []*reservation
}

var _ mem.Device = (*Fake)(nil)

// New returns a device that holds nothing.
func New() *Fake { return new(Fake) }

// Interpose sets what looks at each copy from or to the device; nil: nothing.
func (f *Fake) Interpose(hook Hook) {
	if hook == nil {
		f.hook.Store(nil)
		return
	}
	f.hook.Store(&hook)
}

// Copies counts the calls of Copy from or to the device.
func (f *Fake) Copies() int64 { return f.copies.Load() }

// Held counts the reservations of device memory that were not closed.
func (f *Fake) Held() int {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return len(f.held)
}

// View shows bytes of device memory at addr, which are reserved, and stay so for as long as the slice is used.
func (f *Fake) View(addr uintptr, bytes uint64) []byte {
	f.mu.RLock()
	defer f.mu.RUnlock()
	seen, err := f.seen(addr, bytes)
	if err != nil {
		panic(err) // a mistake in the test
	}
	return mem.View(seen, bytes)
}

// Name implements mem.Device.
func (f *Fake) Name() string { return "fake" }

// Apart implements mem.Device.
func (f *Fake) Apart() bool { return true }

// Copy implements mem.Device. Device memory that is not reserved is status.ParamInvalid.
func (f *Fake) Copy(moves []mem.Move, to, from mem.Backing, threads int) error {
	if to != mem.BackingDevice && from != mem.BackingDevice {
		return mem.Host().Copy(moves, to, from, threads)
	}
	f.copies.Add(1)
	if hook := f.hook.Load(); hook != nil {
		if err := (*hook)(moves, to, from); err != nil {
			return err
		}
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, m := range moves {
		dst, err := f.side(m.Dst, m.Bytes, to)
		if err != nil {
			return err
		}
		src, err := f.side(m.Src, m.Bytes, from)
		if err != nil {
			return err
		}
		copy(mem.View(dst, m.Bytes), mem.View(src, m.Bytes))
	}
	return nil
}

// side returns where one end of a move can be touched. Called with mu held.
func (f *Fake) side(addr uintptr, bytes uint64, backing mem.Backing) (uintptr, error) {
	switch backing {
	case mem.BackingDevice:
		return f.seen(addr, bytes)
	case mem.BackingAnonymous:
		return addr, nil
	}
	return 0, status.Newf(status.Failed, status.StageTransfer, "a device was given host memory at %#x that may not be there", addr)
}

// seen translates an address of the device. Called with mu held.
func (f *Fake) seen(addr uintptr, bytes uint64) (uintptr, error) {
	for _, r := range f.held {
		if addr >= r.addr && uint64(addr-r.addr) <= r.bytes && bytes <= r.bytes-uint64(addr-r.addr) {
			return r.seen + (addr - r.addr), nil
		}
	}
	return 0, status.Newf(status.ParamInvalid, status.StageTransfer, "no %d bytes of the device are at %#x", bytes, addr)
}

// reservation is device memory.
type reservation struct {
	fake       *Fake
	addr, seen uintptr // of the mapping without rights and of the one that can be touched
	bytes      uint64
	unmap      func() error
}

// Reserve implements mem.Device.
func (f *Fake) Reserve(bytes uint64) (mem.Memory, error) {
	r := &reservation{fake: f, bytes: bytes}
	if err := r.open(); err != nil {
		return nil, status.Newf(status.OutOfMemory, status.StageCheck, "reserve %d bytes of the device: %w", bytes, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = append(f.held, r)
	return r, nil
}

func (r *reservation) open() error {
	fd, err := unix.MemfdCreate("llm_datadist test device", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }() // the mappings keep the file
	if err := unix.Ftruncate(fd, int64(r.bytes)); err != nil {
		return err
	}
	apart, err := unix.MmapPtr(fd, 0, nil, uintptr(r.bytes), unix.PROT_NONE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	seen, err := unix.MmapPtr(fd, 0, nil, uintptr(r.bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		_ = unix.MunmapPtr(apart, uintptr(r.bytes))
		return err
	}
	r.addr, r.seen = uintptr(apart), uintptr(seen)
	r.unmap = func() error {
		if err := unix.MunmapPtr(apart, uintptr(r.bytes)); err != nil {
			return err
		}
		return unix.MunmapPtr(seen, uintptr(r.bytes))
	}
	return nil
}

// Addr implements mem.Memory.
func (r *reservation) Addr() uintptr { return r.addr }

// Bytes implements mem.Memory.
func (r *reservation) Bytes() uint64 { return r.bytes }

// Discard implements mem.Memory: like many a device, this one has no pages to give back.
func (r *reservation) Discard(_, _ uint64) error { return nil }

// Close implements mem.Memory.
func (r *reservation) Close() error {
	f := r.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, held := range f.held {
		if held == r {
			f.held = append(f.held[:i], f.held[i+1:]...)
			return r.unmap()
		}
	}
	return nil
}

// ReserveHost implements mem.Device, with memory that is no mem.HostMemory, as pinned memory isn't.
func (f *Fake) ReserveHost(bytes uint64) (mem.Memory, error) {
	b, err := mem.NewBuffer(int(bytes))
	if err != nil {
		return nil, err
	}
	return pinned{b, bytes}, nil
}

type pinned struct {
	*mem.Buffer
	bytes uint64
}

// Bytes implements mem.Memory.
func (p pinned) Bytes() uint64 { return p.bytes }

// Discard implements mem.Memory.
func (p pinned) Discard(_, _ uint64) error { return nil }

// Close implements mem.Memory.
func (p pinned) Close() error { return p.Free() }
