// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"encoding/binary"
	"sync"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// listed reads a table as a forked child does: descriptor -> device and inode.
func listed(t *descriptorTable) map[int64][2]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := map[int64][2]int64{}
	for _, entry := range t.entries {
		if entry.fd != -1 {
			out[entry.fd] = [2]int64{entry.dev, entry.ino}
		}
	}
	return out
}

func newTable(t testing.TB) *descriptorTable {
	table := &descriptorTable{}
	require.NoError(t, table.ready())
	whole := table.entries
	t.Cleanup(func() {
		require.NoError(t, unmapPages(View(uintptr(unsafe.Pointer(unsafe.SliceData(whole))), descriptorTableBytes)))
	})
	return table
}

func identity(t testing.TB, fd int) [2]int64 {
	var stat unix.Stat_t
	require.NoError(t, unix.Fstat(fd, &stat))
	return [2]int64{int64(stat.Dev), int64(stat.Ino)}
}

func TestDescriptorTableIsReadableAsDocumented(t *testing.T) {
	a, _ := socketPair(t)
	require.NoError(t, Track(a))
	addr, entries := DescriptorTable()
	require.NotZero(t, addr)
	require.Greater(t, entries, 43000)
	again, _ := DescriptorTable()
	require.Equal(t, addr, again)
	find := func() (found [][2]int64) {
		words := View(addr, uint64(entries)*24)
		for i := range entries {
			at := words[i*24:]
			if int64(binary.LittleEndian.Uint64(at)) == int64(a) {
				found = append(found, [2]int64{int64(binary.LittleEndian.Uint64(at[8:])), int64(binary.LittleEndian.Uint64(at[16:]))})
			}
		}
		return found
	}
	require.Equal(t, [][2]int64{identity(t, a)}, find())
	Untrack(a)
	require.Empty(t, find())
}

func TestDescriptorSlotsAreReused(t *testing.T) {
	table := newTable(t)
	table.entries = table.entries[:2]
	a, b := socketPair(t)
	c, d := socketPair(t)
	require.NoError(t, table.track(a))
	require.NoError(t, table.track(b))
	err := table.track(c)
	require.ErrorIs(t, err, status.OutOfMemory)
	require.ErrorContains(t, err, "full")
	table.untrack(a)
	table.untrack(a)
	table.untrack(d)
	require.NoError(t, table.track(c))
	require.Equal(t, map[int64][2]int64{int64(b): identity(t, b), int64(c): identity(t, c)}, listed(table))
	require.ErrorIs(t, table.track(d), status.OutOfMemory, "untracking twice frees one slot")
}

func TestANumberListedAgainIsWhatItIsNow(t *testing.T) {
	table := newTable(t)
	a, b := socketPair(t)
	c, _ := socketPair(t)
	require.NoError(t, table.track(b))
	require.NoError(t, unix.Dup3(c, b, unix.O_CLOEXEC))
	require.NotEqual(t, identity(t, a), identity(t, b))
	require.NoError(t, table.track(b))
	require.Equal(t, map[int64][2]int64{int64(b): identity(t, c)}, listed(table))
	require.ErrorIs(t, table.track(-1), status.Failed)
}

func TestDescriptorsFromManyGoroutines(t *testing.T) {
	table := newTable(t)
	var all sync.WaitGroup
	for range 16 {
		a, _ := socketPair(t)
		all.Go(func() {
			for range 200 {
				require.NoError(t, table.track(a))
				table.untrack(a)
			}
		})
	}
	all.Wait()
	require.Empty(t, listed(table))
	require.LessOrEqual(t, table.used, 16)
}
