// SPDX-License-Identifier: Apache-2.0

package mem

import (
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
	// ReserveHost is Reserve for the machine's own memory, of the kind that the device's copies are fastest with.
	ReserveHost(bytes uint64) (Memory, error)
	// Copy copies moves, all of whose destinations are made of to and sources of from, with at most threads threads, in the order that
	// [CopyDirect] promises, and returns when it is done. Where one side is [BackingDevice] the other is that too, or
	// [BackingAnonymous]: see [CopyBetween] for what is neither.
	Copy(moves []Move, to, from Backing, threads int) error
	// Apart says that the machine itself can't touch what Reserve obtains: the device's copies alone can.
	Apart() bool
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

func (hostDevice) Apart() bool { return false }

func (hostDevice) Copy(moves []Move, to, from Backing, threads int) error {
	if to == BackingAnonymous && from == BackingAnonymous {
		return CopyDirect(moves, threads)
	}
	return CopyKernel(moves)
}

func (d hostDevice) ReserveHost(bytes uint64) (Memory, error) { return d.Reserve(bytes) }

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
	m := new(HostMemory)
	if err := m.open("llm_datadist pool", bytes); err != nil {
		return nil, err
	}
	if err := m.seal(poolSeals); err != nil {
		_ = m.Close() // nobody has seen it
		return nil, err
	}
	// Huge pages are a wish; machines that don't grant them to shared memory refuse it or do nothing.
	_ = unix.Madvise(m.region, unix.MADV_HUGEPAGE)
	return m, nil
}

// HostMemory is a sealed memfd, mapped shared: reserved, and committed page by page when touched.
type HostMemory struct{ memoryFile }

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
	return m.close(func() {
		_ = m.Discard(0, m.bytes) // memory that can't be given back now goes when the last mapping does
	})
}
