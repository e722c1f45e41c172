// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// What [MapShared] is told to ask of a peer's file. Seals are never taken off again.
const (
	// PoolSeals: what is mapped stays there, so that a load is never SIGBUS.
	PoolSeals = unix.F_SEAL_SHRINK
	// PagesSeals: and nobody but the owner, by the mapping that it made before, writes into it.
	PagesSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_FUTURE_WRITE
)

// populatePages is how many pages [Mapping.Populate] looks at in one step: with pages of 4 KiB 2 MiB, some 0.1 ms.
const populatePages = 512

// Mapping is memory of a peer's, which can be read here and nothing else. Its owner may change it at any time. A forked child doesn't
// have it.
type Mapping struct {
	region []byte // not memory any more once fd is -1
	sparse bool   // pages that are in memory can be told from holes

	mu sync.RWMutex // held for reading by steps of Populate, for writing by Close
	fd int          // a descriptor of our own, for Populate; -1 when closed
}

// MapShared maps the file of fd, which has bytes, for reading. It trusts nothing about it: a file that is not a memfd, has another
// size, or lacks one of seals (such as [PoolSeals]) is status.LinkFailed, and not mapped. The descriptor stays the caller's.
func MapShared(fd int, bytes uint64, seals int) (*Mapping, error) {
	// Comes first: it answers for memory files alone, without asking a file system, which could be a peer's own and never answer.
	has, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, notShared("it has no seals, as a memfd would: %w", err)
	}
	if has&seals != seals {
		return nil, notShared("it is sealed with %#x, and %#x is needed", has, seals)
	}
	own, err := ReadOnly(fd)
	if err != nil {
		return nil, err
	}
	m := &Mapping{fd: own}
	if err := m.prepare(bytes); err != nil {
		_ = m.Close() // nothing was read
		return nil, err
	}
	return m, nil
}

func (m *Mapping) prepare(bytes uint64) error {
	if err := Track(m.fd); err != nil {
		return err
	}
	var system unix.Statfs_t
	if err := unix.Fstatfs(m.fd, &system); err != nil {
		return notShared("fstatfs: %w", err)
	}
	if magic := uint32(system.Type); magic != unix.TMPFS_MAGIC && magic != unix.HUGETLBFS_MAGIC {
		return notShared("its file system is of type %#x, which is not memory", magic)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(m.fd, &stat); err != nil {
		return notShared("fstat: %w", err)
	}
	if bytes == 0 || bytes > maxMapping || stat.Size != int64(bytes) {
		return notShared("it has %d bytes, and %d were announced", stat.Size, bytes)
	}
	at, err := unix.MmapPtr(m.fd, 0, nil, uintptr(bytes), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return notShared("map %d bytes: %w", bytes, err)
	}
	// Safe: the kernel has just mapped bytes at this address for us alone, and the seals keep all of them there.
	m.region = unsafe.Slice((*byte)(at), bytes)
	keepFromChildren(m.region)
	// mincore tells the truth to the file's owner; a file of huge pages looks whole to it and to SEEK_DATA.
	m.sparse = uint32(system.Type) == unix.TMPFS_MAGIC && int(stat.Uid) == os.Geteuid()
	return nil
}

func notShared(form string, arguments ...any) error {
	return status.Newf(status.LinkFailed, status.StageHandshake, "a descriptor from the peer can't be mapped: "+form, arguments...)
}

// Addr returns where the memory is mapped.
func (m *Mapping) Addr() uintptr { return addressOf(m.region) }

// Bytes is how much is mapped.
func (m *Mapping) Bytes() uint64 { return uint64(len(m.region)) }

// Words shows the memory as words, to be loaded only.
func (m *Mapping) Words() []atomic.Uint64 { return words(m.region) }

// Populate enters what the owner has in memory of a range into this process's page table, so that the first load of each page doesn't
// fault. What it finds to be a hole stays one: a load of it would commit memory of the owner's. (One that the owner makes while the
// 2 MiB around it are populated may be filled again, with zeros.) Where the system can't populate (Linux before 5.14), or holes can't
// be told, it does nothing. It may run beside Close, which ends it.
func (m *Mapping) Populate(offset, bytes uint64) error {
	if total := m.Bytes(); offset > total || bytes > total-offset {
		return status.Newf(status.ParamInvalid, status.StageCheck, "populate %d bytes at %d of a mapping of %d", bytes, offset, total)
	}
	if !m.sparse {
		return nil
	}
	pageBytes := uint64(os.Getpagesize())
	for at, end := offset-offset%pageBytes, offset+bytes; at < end; {
		next, err := m.populateStep(at, end, pageBytes)
		if err == unix.EINVAL { // this system can't
			return nil
		}
		if err != nil {
			return status.Newf(status.Failed, status.StageRegister, "populate the mapping at %d: %w", at, err)
		}
		at = next
	}
	return nil
}

// populateStep goes on from the page at, past a hole if there is one, and returns how far it came.
func (m *Mapping) populateStep(at, end, pageBytes uint64) (next uint64, err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.fd < 0 {
		return end, nil
	}
	// Quick over what was never touched. There is no SEEK_HOLE beside it, since that walks along all pages up to the next hole, in each
	// step anew, and says nothing about the pages that are gone a moment later.
	data, err := unix.Seek(m.fd, int64(at), unix.SEEK_DATA)
	if err == unix.ENXIO { // holes only
		return end, nil
	}
	if err != nil {
		return 0, err
	}
	if at = max(at, uint64(data)); at >= end {
		return end, nil
	}
	next = min(end, at+populatePages*pageBytes)
	var resident [populatePages]byte
	step := m.region[at:next]
	if err := mincore(step, &resident); err != nil {
		return 0, err
	}
	pages := (uint64(len(step)) + pageBytes - 1) / pageBytes
	for first := uint64(0); first < pages; first++ {
		last := first
		for last < pages && resident[last]&1 != 0 {
			last++
		}
		if last == first {
			continue
		}
		if err := populate(step[first*pageBytes : min(last*pageBytes, uint64(len(step)))]); err != nil {
			return 0, err
		}
		first = last
	}
	return next, nil
}

// mincore says in the lowest bit of each byte of resident whether a page of region, which has at most populatePages, is in memory.
func mincore(region []byte, resident *[populatePages]byte) error {
	for {
		// Safe: the kernel writes one byte for each page of region, and looks at region's address only.
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(region))), uintptr(len(region)),
			uintptr(unsafe.Pointer(resident)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR, unix.EAGAIN: // the latter: no memory for a moment
		default:
			return errno
		}
	}
}

func populate(region []byte) error {
	for {
		if err := unix.Madvise(region, unix.MADV_POPULATE_READ); err != unix.EINTR {
			return err
		}
	}
}

// Close unmaps the memory, after the step of Populate under way. Nothing may use the memory any more. Closing twice is fine.
func (m *Mapping) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fd < 0 {
		return nil
	}
	Untrack(m.fd)
	err := unmapPages(m.region)
	if closed := unix.Close(m.fd); err == nil {
		err = closed
	}
	m.fd = -1
	return err
}
