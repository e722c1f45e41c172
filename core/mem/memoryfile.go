// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"sync"

	"golang.org/x/sys/unix"
)

// memoryFile is memory with a file, which others can be given: mapped shared, reserved, and committed page by page when touched.
type memoryFile struct {
	fd     int
	bytes  uint64
	region []byte
	once   sync.Once
	err    error // what the one close said
}

// open makes the file and maps it; name is what the system shows for it. Where it fails nothing is left.
func (m *memoryFile) open(name string, bytes uint64) error {
	if bytes > maxMapping {
		return unix.ENOMEM
	}
	fd, err := createMemfd(name)
	if err != nil {
		return err
	}
	m.fd, m.bytes = fd, bytes
	if err = m.prepare(); err != nil {
		_ = m.close(nil) // nobody has seen it
	}
	return err
}

func (m *memoryFile) prepare() (err error) {
	if err = Track(m.fd); err != nil {
		return err
	}
	if err = unix.Ftruncate(m.fd, int64(m.bytes)); err != nil {
		return err
	}
	m.region, err = mapPages(m.fd, m.bytes, unix.MAP_SHARED|unix.MAP_NORESERVE)
	return err
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

func (m *memoryFile) seal(seals int) error {
	_, err := unix.FcntlInt(uintptr(m.fd), unix.F_ADD_SEALS, seals)
	return err
}

// Addr returns where the memory is mapped.
func (m *memoryFile) Addr() uintptr { return addressOf(m.region) }

// Bytes returns how much was asked for.
func (m *memoryFile) Bytes() uint64 { return m.bytes }

// FD returns the memfd, for [ReadOnly]. It stays ours, and is gone after Close.
func (m *memoryFile) FD() int { return m.fd }

// close does what comes first, if anything, and then unmaps the memory and closes the file. Closing twice is fine.
func (m *memoryFile) close(first func()) error {
	m.once.Do(func() {
		if first != nil {
			first()
		}
		Untrack(m.fd)
		m.err = unmapPages(m.region)
		if err := unix.Close(m.fd); m.err == nil {
			m.err = err
		}
		m.region, m.fd = nil, -1
	})
	return m.err
}
