// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func itoa(n int) string { return strconv.Itoa(n) }

// memfd is a file of bytes with seals, for one test.
func memfd(t testing.TB, bytes uint64, seals int) int {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Close(fd)) })
	require.NoError(t, unix.Ftruncate(fd, int64(bytes)))
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	require.NoError(t, err)
	return fd
}

// opened opens a file for one test.
func opened(t testing.TB, path string, flags int) int {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Close(fd)) })
	return fd
}

func mapShared(t testing.TB, fd int, bytes uint64) *Mapping {
	m, err := MapShared(fd, bytes, PoolSeals)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func TestAPoolIsMappedForReading(t *testing.T) {
	leaves(t)
	pool := reserve(t, 4*page)
	m := mapShared(t, pool.FD(), 4*page)
	View(pool.Addr(), 4*page)[3*page] = 5
	require.EqualValues(t, 4*page, m.Bytes())
	require.Equal(t, byte(5), View(m.Addr(), m.Bytes())[3*page])
	require.EqualValues(t, 5, m.Words()[3*page/8].Load())
	_, err := ProbeWritable([]Span{{m.Addr(), 1}})
	require.ErrorContains(t, err, "is not writable")
	require.Contains(t, areaFacts(t, m.Addr())["VmFlags"], "dc", "not copied into a forked child")
	require.Contains(t, listed(&descriptors), int64(m.fd))
	require.NotEqual(t, pool.FD(), m.fd)
	addr := m.Addr()
	require.NoError(t, m.Close())
	require.NoError(t, m.Close())
	_, err = ProbeWritable([]Span{{addr, 1}})
	require.ErrorContains(t, err, "is not mapped")
}

func TestADescriptorIsNotTrusted(t *testing.T) {
	leaves(t)
	regular := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(regular, make([]byte, page), 0o600))
	var pipe [2]int
	require.NoError(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	t.Cleanup(func() { _, _ = unix.Close(pipe[0]), unix.Close(pipe[1]) })
	socket, _ := socketPair(t)
	sealed := memfd(t, page, PagesSeals)
	cases := []struct {
		name  string
		fd    int
		bytes uint64
		seals int
		what  string
	}{
		{"no descriptor", -1, page, PoolSeals, "no seals"},
		{"regular file", opened(t, regular, unix.O_RDWR), page, PoolSeals, "no seals"},
		{"regular file, no seals asked", opened(t, regular, unix.O_RDWR), page, 0, "no seals"},
		{"directory", opened(t, "/", unix.O_RDONLY), page, PoolSeals, "no seals"},
		{"pipe", pipe[0], page, PoolSeals, "no seals"},
		{"socket", socket, page, PoolSeals, "no seals"},
		{"device", opened(t, "/dev/zero", unix.O_RDWR), page, PoolSeals, "no seals"},
		{"path only", opened(t, regular, unix.O_PATH), page, PoolSeals, "no seals"},
		{"unsealed memfd", memfd(t, page, 0), page, PoolSeals, "sealed with 0x0"},
		{"memfd sealed against growing", memfd(t, page, unix.F_SEAL_GROW), page, PoolSeals, "sealed with 0x4"},
		{"pool for pages", memfd(t, page, PoolSeals|unix.F_SEAL_SEAL), page, PagesSeals, "0x12 is needed"},
		{"smaller than said", sealed, page + 1, PagesSeals, "announced"},
		{"larger than said", sealed, page - 1, PagesSeals, "announced"},
		{"nothing said", sealed, 0, PagesSeals, "announced"},
		{"too much said", sealed, 1<<64 - 1, PagesSeals, "announced"},
		{"negative said", sealed, 1 << 63, PagesSeals, "announced"},
		{"empty", memfd(t, 0, PoolSeals), 0, PoolSeals, "announced"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			leaves(t)
			_, err := MapShared(c.fd, c.bytes, c.seals)
			require.ErrorIs(t, err, status.LinkFailed)
			require.Equal(t, status.StageHandshake, status.From(err, "").Stage)
			require.ErrorContains(t, err, "descriptor from the peer")
			require.ErrorContains(t, err, c.what)
		})
	}
	m, err := MapShared(sealed, page, PagesSeals)
	require.NoError(t, err)
	require.NoError(t, m.Close())
}

func TestAFileInSharedMemoryIsNoMemfd(t *testing.T) {
	leaves(t)
	path := fmt.Sprintf("/dev/shm/llm_datadist_test_%d", os.Getpid())
	if err := os.WriteFile(path, make([]byte, page), 0o600); err != nil {
		t.Skipf("no shared memory here: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, os.Remove(path)) })
	_, err := MapShared(opened(t, path, unix.O_RDWR), page, PoolSeals)
	require.ErrorIs(t, err, status.LinkFailed, "somebody may truncate it")
}

// kibCommitted is what the pages of a file take.
func kibCommitted(t testing.TB, fd int) int {
	var stat unix.Stat_t
	require.NoError(t, unix.Fstat(fd, &stat))
	return int(stat.Blocks / 2)
}

func TestPopulateLeavesHoles(t *testing.T) {
	leaves(t)
	const size, part = 64 << 20, 1 << 20
	pool := reserve(t, size)
	view := View(pool.Addr(), size)
	// Data in the middle of nothing, single pages apart from each other, and the last page.
	for at := uint64(20 << 20); at < 20<<20+part; at += page {
		view[at] = 1
	}
	for at := uint64(40 << 20); at < 40<<20+64*page; at += 3 * page {
		view[at] = 1
	}
	view[size-1] = 1
	before := kibCommitted(t, pool.FD())
	m := mapShared(t, pool.FD(), size)
	require.NoError(t, m.Populate(0, 20<<20), "nothing but a hole")
	require.Zero(t, residentKiB(t, m.Addr()))
	require.NoError(t, m.Populate(0, size))
	require.Equal(t, before, kibCommitted(t, pool.FD()), "no hole was committed")
	if err := unix.Madvise(view[20<<20:20<<20+page], unix.MADV_POPULATE_READ); err == unix.EINVAL {
		t.Skip("this system can't populate")
	}
	require.Equal(t, before, residentKiB(t, m.Addr()), "all data is there")

	// What the owner gave back later is a hole, too.
	again := mapShared(t, pool.FD(), size)
	require.NoError(t, pool.Discard(20<<20, part/2))
	before = kibCommitted(t, pool.FD())
	require.NoError(t, again.Populate(20<<20+5, part-9))
	require.Equal(t, before, kibCommitted(t, pool.FD()))
	require.Equal(t, part/2>>10, residentKiB(t, again.Addr()))
}

func TestPopulateOfOddRanges(t *testing.T) {
	leaves(t)
	size := 5*page + 100
	pool := reserve(t, size)
	view := View(pool.Addr(), size)
	for at := range view {
		view[at] = 1
	}
	m := mapShared(t, pool.FD(), size)
	for _, r := range [][2]uint64{{0, 0}, {size, 0}, {size - 1, 1}, {page - 1, 2}, {3, 9}, {0, size}} {
		require.NoError(t, m.Populate(r[0], r[1]))
	}
	for _, r := range [][2]uint64{{0, size + 1}, {size + 1, 0}, {1, size}, {1 << 63, 1 << 63}} {
		require.ErrorIs(t, m.Populate(r[0], r[1]), status.ParamInvalid)
	}
}

func TestPopulateIsEndedByClose(t *testing.T) {
	leaves(t)
	pool := reserve(t, 32<<20)
	view := View(pool.Addr(), pool.Bytes())
	for at := uint64(0); at < pool.Bytes(); at += page {
		view[at] = 1
	}
	for range 10 {
		m, err := MapShared(pool.FD(), pool.Bytes(), PoolSeals)
		require.NoError(t, err)
		begun := make(chan struct{})
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() {
				begun <- struct{}{}
				require.NoError(t, m.Populate(0, pool.Bytes()))
			})
			<-begun
		}
		require.NoError(t, m.Close())
		all.Wait()
	}
}

func TestHugePagesAreMappedAndNotPopulated(t *testing.T) {
	leaves(t)
	const size = 2 << 20
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil || unix.Ftruncate(fd, size) != nil {
		t.Skipf("no huge pages here: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, unix.Close(fd)) })
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, PoolSeals)
	require.NoError(t, err)
	m := mapShared(t, fd, size)
	require.NoError(t, m.Populate(0, size))
	require.Zero(t, kibCommitted(t, fd))
}
