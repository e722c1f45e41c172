// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var page = uint64(unix.Getpagesize())

// pages maps n pages of scratch for one test.
func pages(t testing.TB, n uint64) *Buffer {
	b, err := NewBuffer(int(n * page))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.Free()) })
	return b
}

// hole makes one page of b inaccessible, for loads too. (Unmapping it would let the runtime map something of its own there.)
func hole(t testing.TB, b *Buffer, index uint64) {
	require.NoError(t, unix.Mprotect(b.Bytes()[index*page:(index+1)*page], unix.PROT_NONE))
}

// fileMapping maps bytes of a new memfd, shared, of which only size bytes are there.
func fileMapping(t testing.TB, bytes, size uint64) []byte {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Close(fd)) }()
	require.NoError(t, unix.Ftruncate(fd, int64(size)))
	region, err := mapPages(fd, bytes, unix.MAP_SHARED)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unmapPages(region)) })
	return region
}

func TestViewShowsTheMemoryAtAnAddress(t *testing.T) {
	b := pages(t, 2)
	b.Bytes()[page+3] = 7
	view := View(b.Addr()+uintptr(page), 8)
	require.Equal(t, []byte{0, 0, 0, 7, 0, 0, 0, 0}, view)
	view[0] = 9
	require.Equal(t, byte(9), b.Bytes()[page])
	require.Len(t, View(1, 0), 0, "no bytes anywhere are an empty view")
}

func TestBuffer(t *testing.T) {
	b, err := NewBuffer(100)
	require.NoError(t, err)
	require.Len(t, b.Bytes(), 100)
	require.Zero(t, uint64(b.Addr())%page)
	require.NoError(t, b.Free())
	require.NoError(t, b.Free(), "freeing twice is fine")
	for _, bytes := range []int{0, -1} {
		_, err = NewBuffer(bytes)
		require.Error(t, err)
	}
	_, err = NewBuffer(1 << 61)
	require.ErrorContains(t, err, "LLM_OUT_OF_MEMORY")
}
