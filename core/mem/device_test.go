// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func reserve(t testing.TB, bytes uint64) *HostMemory {
	memory, err := Host().Reserve(bytes)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, memory.Close()) })
	return memory.(*HostMemory)
}

// committed is what the memfd's pages take.
func committed(t testing.TB, m *HostMemory) uint64 {
	var stat unix.Stat_t
	require.NoError(t, unix.Fstat(m.FD(), &stat))
	return uint64(stat.Blocks) * 512
}

func residentBytes(t testing.TB) uint64 {
	text, err := os.ReadFile("/proc/self/statm")
	require.NoError(t, err)
	resident, err := strconv.ParseUint(strings.Fields(string(text))[1], 10, 64)
	require.NoError(t, err)
	return resident * page
}

func TestReservedMemoryIsNotCommitted(t *testing.T) {
	before := residentBytes(t)
	m := reserve(t, 1<<30)
	require.EqualValues(t, 1<<30, m.Bytes())
	require.Zero(t, committed(t, m))
	require.Less(t, residentBytes(t), before+64<<20)
	View(m.Addr(), m.Bytes())[1<<30-1] = 1
	require.NotZero(t, committed(t, m))
	require.LessOrEqual(t, committed(t, m), uint64(2<<20), "one page, perhaps a huge one")
}

func TestDiscardGivesPagesBack(t *testing.T) {
	m := reserve(t, 64<<20)
	view := View(m.Addr(), m.Bytes())
	for i := range view[:32<<20] {
		view[i] = 1
	}
	full := committed(t, m)
	require.GreaterOrEqual(t, full, uint64(32<<20))
	require.NoError(t, m.Discard(8<<20, 16<<20))
	require.Equal(t, full-16<<20, committed(t, m))
	require.Equal(t, byte(1), view[8<<20-1], "nothing beside the range is touched")
	require.Equal(t, byte(0), view[8<<20])
	require.Equal(t, byte(1), view[24<<20])
	require.NoError(t, m.Discard(3, 0))
	for _, r := range [][2]uint64{{0, 64<<20 + 1}, {64<<20 + 1, 0}, {1, 64 << 20}, {1 << 63, 1 << 63}} {
		require.ErrorIs(t, m.Discard(r[0], r[1]), status.ParamInvalid)
	}
}

func TestHostMemoryIsSealedAndNotInherited(t *testing.T) {
	m := reserve(t, 1<<20)
	seals, err := unix.FcntlInt(uintptr(m.FD()), unix.F_GET_SEALS, 0)
	require.NoError(t, err)
	require.Equal(t, poolSeals, seals&poolSeals)
	require.Equal(t, unix.EPERM, unix.Ftruncate(m.FD(), 0))
	flags, err := unix.FcntlInt(uintptr(m.FD()), unix.F_GETFD, 0)
	require.NoError(t, err)
	require.NotZero(t, flags&unix.FD_CLOEXEC)
}

func TestClosedMemoryLeavesNothing(t *testing.T) {
	memory, err := Host().Reserve(4 << 20)
	require.NoError(t, err)
	m := memory.(*HostMemory)
	fd := m.FD()
	require.Contains(t, listed(&descriptors), int64(fd))
	peer, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	require.NoError(t, err)
	defer func() { _ = unix.Close(peer) }()
	View(m.Addr(), 1)[0] = 1
	addr := m.Addr()
	require.NoError(t, m.Close())
	require.NoError(t, m.Close())
	require.NotContains(t, listed(&descriptors), int64(fd))
	_, err = ProbeWritable([]Span{{addr, 4 << 20}})
	require.ErrorIs(t, err, status.ParamInvalid)
	var stat unix.Stat_t
	require.NoError(t, unix.Fstat(peer, &stat))
	require.Zero(t, stat.Blocks, "pages go back although somebody else has the file")
}

func TestMemoryThatCannotBeHad(t *testing.T) {
	before := listed(&descriptors)
	for _, bytes := range []uint64{1 << 60, 1<<63 - 1, 1<<64 - 1} {
		_, err := Host().Reserve(bytes)
		require.ErrorIs(t, err, status.OutOfMemory)
	}
	require.Equal(t, before, listed(&descriptors))
	_, err := Host().Reserve(0)
	require.ErrorIs(t, err, status.ParamInvalid)
	require.Equal(t, "host", Host().Name())
}

func TestDiscardAndCloseFromManyGoroutines(t *testing.T) {
	m := reserve(t, 1<<20)
	var all sync.WaitGroup
	for i := range uint64(8) {
		all.Go(func() {
			View(m.Addr(), m.Bytes())[i*128<<10] = 1
			require.NoError(t, m.Discard(i*128<<10, 128<<10))
		})
	}
	all.Wait()
	require.Zero(t, committed(t, m))
}
