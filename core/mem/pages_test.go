// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bufio"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func newPages(t testing.TB, bytes uint64) *Pages {
	p, err := NewPages("llm_datadist test", bytes)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

// playPages writes the words of shared pages as it is told.
func playPages(orders *bufio.Scanner) {
	p := must(NewPages("llm_datadist test", 2*page))
	say(p.FD())
	for i := 0; orders.Scan(); i++ {
		p.Words()[i].Store(uint64(len(orders.Text())))
		say("stored")
	}
}

func TestPagesAreSharedWithAnotherProcess(t *testing.T) {
	leaves(t)
	owner := start(t, "pages")
	m := owner.mapped(owner.hear()[0], 2*page, PagesSeals)
	require.Len(t, m.Words(), int(2*page/8))
	for i, order := range []string{"four", "seven  "} {
		require.Zero(t, m.Words()[i].Load())
		owner.tell(order)
		owner.hear()
		require.EqualValues(t, len(order), m.Words()[i].Load())
	}
	owner.end(unix.SIGKILL)
	require.EqualValues(t, 4, m.Words()[0].Load(), "what is mapped stays after its owner")
}

func TestOnlyTheOwnerWritesPages(t *testing.T) {
	leaves(t)
	p := newPages(t, 3*page)
	require.EqualValues(t, 3*page, p.Bytes())
	require.Contains(t, areaFacts(t, p.Addr())["VmFlags"], "dc", "not copied into a forked child")
	p.Words()[0].Store(7)
	require.Equal(t, byte(7), View(p.Addr(), 8)[0])

	writable, err := unix.Open("/proc/self/fd/"+itoa(p.FD()), unix.O_RDWR|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Close(writable)) }()
	_, err = mapPages(writable, page, unix.MAP_SHARED)
	require.Equal(t, unix.EPERM, err)
	_, err = unix.Pwrite(writable, []byte{1}, 0)
	require.Equal(t, unix.EPERM, err)
	for _, bytes := range []int64{0, int64(page), int64(9 * page)} {
		require.Equal(t, unix.EPERM, unix.Ftruncate(writable, bytes))
	}
	_, err = unix.FcntlInt(uintptr(writable), unix.F_ADD_SEALS, unix.F_SEAL_WRITE)
	require.Equal(t, unix.EPERM, err, "the seals are final")
	p.Words()[0].Store(8)
}

func TestASecondDescriptorIsForReading(t *testing.T) {
	leaves(t)
	p := newPages(t, page)
	p.Words()[0].Store(9)
	fd, err := ReadOnly(p.FD())
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Close(fd)) }()
	require.NotContains(t, listed(&descriptors), int64(fd))
	require.Equal(t, identity(t, p.FD()), identity(t, fd))
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	require.NoError(t, err)
	require.Equal(t, unix.O_RDONLY, flags&unix.O_ACCMODE)
	flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	require.NoError(t, err)
	require.NotZero(t, flags&unix.FD_CLOEXEC)
	_, err = unix.Seek(fd, 100, 0)
	require.NoError(t, err)
	at, err := unix.Seek(p.FD(), 0, 1)
	require.NoError(t, err)
	require.Zero(t, at, "the two have offsets of their own")
	m, err := MapShared(fd, page, PagesSeals)
	require.NoError(t, err)
	require.EqualValues(t, 9, m.Words()[0].Load())
	require.NoError(t, m.Close())
	_, err = ReadOnly(-1)
	require.ErrorIs(t, err, unix.ENOENT)
}

func TestClosedPagesLeaveNothing(t *testing.T) {
	leaves(t)
	p, err := NewPages("llm_datadist test", page)
	require.NoError(t, err)
	fd, addr := p.FD(), p.Addr()
	require.Contains(t, listed(&descriptors), int64(fd))
	require.NoError(t, p.Close())
	require.NoError(t, p.Close())
	_, err = ProbeWritable([]Span{{addr, page}})
	require.ErrorIs(t, err, status.ParamInvalid)
	var stat unix.Stat_t
	require.Equal(t, unix.EBADF, unix.Fstat(fd, &stat))
}

func TestPagesThatCannotBeHad(t *testing.T) {
	leaves(t)
	for _, bytes := range []uint64{0, math.MaxUint64, 1 << 62} {
		_, err := NewPages("none", bytes)
		require.ErrorIs(t, err, status.ParamInvalid)
	}
	_, err := NewPages("none", 1<<60)
	require.ErrorIs(t, err, status.OutOfMemory)
	_, err = NewPages(strings.Repeat("long", 100), page)
	require.ErrorIs(t, err, unix.EINVAL)
	p := newPages(t, 19)
	require.Len(t, p.Words(), 2, "whole words")
}
