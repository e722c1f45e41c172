// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Device says where memory of a placement lives, and who obtains and copies it.
type Device interface {
	// Name is the value of the option open.Device that selects it.
	Name() string
	// Reserve obtains bytes of memory, committed when first touched where the device can do that. It returns
	// status.OutOfMemory when there is none.
	Reserve(bytes uint64) (Memory, error)
	// Copy copies moves with at most threads threads, under the rules of [CopyDirect], and returns when it is done.
	Copy(moves []Move, threads int) error
}

// Memory is one reservation of a device. Its methods may be called from several goroutines; Close comes last.
type Memory interface {
	// Addr is where it begins, in the address space that the device's copies understand.
	Addr() uintptr
	// Bytes is how much was asked for.
	Bytes() uint64
	// Discard gives the pages of a range back, whose content is then undefined. The range stays usable.
	Discard(offset, bytes uint64) error
	// Close gives everything back. Closing twice is fine.
	Close() error
}

// Host returns the device whose memory is the machine's. A reservation is a [*HostMemory].
func Host() Device { return hostDevice{} }

type hostDevice struct{}

func (hostDevice) Name() string { return "host" }

func (hostDevice) Copy(moves []Move, threads int) error {
	CopyDirect(moves, threads)
	return nil
}

func (hostDevice) Reserve(bytes uint64) (Memory, error) {
	if bytes == 0 {
		return nil, status.New(status.ParamInvalid, status.StageCheck, "a reservation of 0 bytes")
	}
	memory, err := reserveHost(bytes)
	if err != nil {
		return nil, status.Newf(status.OutOfMemory, status.StageCheck, "reserve %d bytes of host memory: %w", bytes, err)
	}
	return memory, nil
}

// poolSeals make the size final, so that whoever maps the file may read all of it without fear of SIGBUS.
const poolSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

func reserveHost(bytes uint64) (*HostMemory, error) {
	if bytes > maxMapping {
		return nil, unix.ENOMEM
	}
	fd, err := createMemfd("llm_datadist pool")
	if err != nil {
		return nil, err
	}
	m := &HostMemory{fd: fd, bytes: bytes}
	if err := m.prepare(); err != nil {
		_ = m.Close()
		return nil, err
	}
	return m, nil
}

// createMemfd asks for a file that can never be executed, which hardened systems require, and does without where the kernel
// (before 6.3) doesn't know of that.
func createMemfd(name string) (int, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL {
		fd, err = unix.MemfdCreate(name, flags)
	}
	return fd, err
}

// HostMemory is a sealed memfd, mapped shared: reserved, and committed page by page when touched.
type HostMemory struct {
	fd     int
	bytes  uint64
	region []byte
	once   sync.Once
	err    error // what the one Close said
}

func (m *HostMemory) prepare() error {
	if err := Track(m.fd); err != nil {
		return err
	}
	if err := unix.Ftruncate(m.fd, int64(m.bytes)); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(m.fd), unix.F_ADD_SEALS, poolSeals); err != nil {
		return err
	}
	region, err := mapPages(m.fd, m.bytes, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	m.region = region
	// Huge pages are a wish; machines that don't grant them to shared memory refuse it or do nothing.
	_ = unix.Madvise(region, unix.MADV_HUGEPAGE)
	return nil
}

// Addr returns where the memory is mapped.
func (m *HostMemory) Addr() uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(m.region))) }

// Bytes returns how much was asked for.
func (m *HostMemory) Bytes() uint64 { return m.bytes }

// FD returns the memfd, for a transport to send to a peer of the same uid. It stays ours, and is gone after Close.
func (m *HostMemory) FD() int { return m.fd }

// Discard punches a hole: whole pages go back to the system, the rest of the range is zeroed.
func (m *HostMemory) Discard(offset, bytes uint64) error {
	if offset > m.bytes || bytes > m.bytes-offset {
		return status.Newf(status.ParamInvalid, status.StageCheck, "discard %d bytes at %d of a reservation of %d", bytes, offset, m.bytes)
	}
	if bytes == 0 {
		return nil
	}
	for {
		err := unix.Fallocate(m.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(offset), int64(bytes))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return status.Newf(status.Failed, status.StageClose, "give %d bytes of host memory back: %w", bytes, err)
		}
		return nil
	}
}

// Close gives all pages back, also where a peer or a forked child still maps them, and unmaps and closes the memfd.
func (m *HostMemory) Close() error {
	m.once.Do(func() {
		_ = m.Discard(0, m.bytes) // memory that can't be given back now goes when the last mapping does
		Untrack(m.fd)
		m.err = unmapPages(m.region)
		if err := unix.Close(m.fd); m.err == nil {
			m.err = err
		}
		m.region, m.fd = nil, -1
	})
	return m.err
}
