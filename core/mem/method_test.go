// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// piped is what Kernel does in a sandbox that refuses process_vm_readv.
type piped struct{}

func (piped) Copy(moves []Move, offset, bytes uint64) error {
	part := pieces{moves, offset, bytes}
	return copyPiped(part.list())
}

// methods are all that copy inside of this process.
func methods() map[string]Method {
	all := stores()
	all["kernel"] = Kernel
	all["kernel piped"] = piped{}
	return all
}

func TestMethodsCopyAnyPartOfAList(t *testing.T) {
	for name, method := range methods() {
		for _, largest := range []uint64{300, 9000, 500 << 10} {
			t.Run(fmt.Sprintf("%s, runs of %d", name, largest), func(t *testing.T) {
				const size = 1<<20 + 123
				src, dst := pages(t, size/page+1), pages(t, size/page+1)
				moves, want := shuffled(src, dst, largest, largest)
				random := rand.New(rand.NewPCG(largest, 3))
				for at, first, before := uint64(0), 0, uint64(0); at < uint64(len(want)); {
					n := min(random.Uint64N(200<<10), uint64(len(want))-at)
					for before+moves[first].Bytes <= at { // also over moves of no bytes
						before += moves[first].Bytes
						first++
					}
					clear(dst.Bytes())
					require.NoError(t, method.Copy(moves[first:], at-before, n))
					require.True(t, bytes.Equal(want[at:at+n], dst.Bytes()[at:at+n]))
					clear(dst.Bytes()[at : at+n])
					require.Equal(t, len(dst.Bytes()), bytes.Count(dst.Bytes(), []byte{0}), "nothing else is written")
					at += n
				}
				require.NoError(t, method.Copy(nil, 0, 0))
				require.NoError(t, method.Copy([]Move{{1, 1, 8}}, 3, 0), "no bytes touch nothing")
			})
		}
	}
}

func TestKernelAnswersWhereAStoreWouldKill(t *testing.T) {
	good, holed := pages(t, 3), pages(t, 3)
	hole(t, holed, 1)
	for name, method := range map[string]Method{"kernel": Kernel, "kernel piped": piped{}} {
		for what, bad := range map[string]Move{
			"source":      {good.Addr() + uintptr(page), holed.Addr(), 2 * page},
			"destination": {holed.Addr(), good.Addr() + uintptr(page), 2 * page},
		} {
			t.Run(name+", "+what, func(t *testing.T) {
				good.Bytes()[0], good.Bytes()[5] = 3, 0
				moves := []Move{{good.Addr() + 5, good.Addr(), 1}, bad, {good.Addr() + 5, good.Addr() + 1, 1}}
				err := method.Copy(moves, 0, 2*page+2)
				require.ErrorIs(t, err, status.ParamInvalid)
				require.ErrorIs(t, err, unix.EFAULT)
				require.ErrorContains(t, err, "copy ")
				require.Equal(t, byte(3), good.Bytes()[5], "moves before the fault are done, and none after it")
				require.NoError(t, method.Copy(moves, 0, 1), "what is not asked for isn't touched")
			})
		}
	}
}

func TestKernelTakesMoreMovesAndBytesThanOneSystemCallMay(t *testing.T) {
	const size = kernelBatchBytes + 3<<20
	src, dst := pages(t, size/page), pages(t, size/page)
	src.Bytes()[size-1] = 5
	require.NoError(t, Kernel.Copy([]Move{{dst.Addr(), src.Addr(), size}}, 0, size))
	require.Equal(t, byte(5), dst.Bytes()[size-1])
	moves, want := shuffled(src, dst, size/(10*kernelBatchSpans), 7)
	require.Greater(t, len(moves), 5*kernelBatchSpans)
	require.NoError(t, Kernel.Copy(moves, 0, uint64(len(want))))
	require.True(t, bytes.Equal(want, dst.Bytes()[:len(want)]))
}

func TestSmallTotalsAreNotStreamed(t *testing.T) {
	for _, total := range []uint64{0, 1, 16 << 10, streamTotal - 1} {
		require.Equal(t, plainStores{}, Stores(total), "whatever was measured")
	}
	want := Method(plainStores{})
	if haveStreams && Calibrate().prefersStreams() {
		want = streamingStores{}
	}
	require.Equal(t, want, Stores(streamTotal))
	require.Equal(t, want, Stores(1<<40))
}

func TestMethodsAllocateNothing(t *testing.T) {
	src, dst := pages(t, 16), pages(t, 16)
	moves := []Move{{dst.Addr() + 3, src.Addr(), 3 * page}, {dst.Addr() + uintptr(8*page), src.Addr() + 1, 7 * page}}
	for name, method := range methods() {
		if name == "kernel piped" {
			continue
		}
		require.Zero(t, testing.AllocsPerRun(100, func() { _ = method.Copy(moves, 1, 9*page) }), name)
	}
	require.Zero(t, testing.AllocsPerRun(100, func() { _, _ = Stores(5), Stores(1<<30) }))
}

func TestStoresOutlastMemoryThatIsTakenAway(t *testing.T) {
	const pages = 64
	size := pages * os.Getpagesize()
	take := func(gone bool) ([]byte, uintptr) {
		region, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		require.NoError(t, err)
		if gone {
			require.NoError(t, unix.Mprotect(region[size/2:], unix.PROT_NONE))
		}
		t.Cleanup(func() { require.NoError(t, unix.Munmap(region)) })
		return region, addressOf(region)
	}
	_, wholeAt := take(false)
	_, halfAt := take(true)
	for name, method := range map[string]Method{"plain": plainStores{}, "streaming": streamingStores{}} {
		for _, m := range []Move{{Dst: halfAt, Src: wholeAt, Bytes: uint64(size)}, {Dst: wholeAt, Src: halfAt, Bytes: uint64(size)}} {
			err := method.Copy([]Move{m}, 0, m.Bytes)
			require.ErrorIs(t, err, unix.EFAULT, name)
			var at uintptr
			_, scanned := fmt.Sscanf(err.Error(), "memory at %v is not there", &at)
			require.NoError(t, scanned, err)
			require.True(t, at >= halfAt+uintptr(size/2) && at < halfAt+uintptr(size), "%s: %#x", name, at)
			require.False(t, debug.SetPanicOnFault(false), "as it was")
		}
		crew := newCrew(t, 2)
		moves := make([]Move, 50)
		for i := range moves {
			moves[i] = Move{Dst: halfAt, Src: wholeAt, Bytes: uint64(size)}
		}
		require.ErrorIs(t, crew.Copy(t.Context(), moves, 50*uint64(size), method), unix.EFAULT, name)
	}
}
