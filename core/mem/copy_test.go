// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// shuffled cuts a buffer into runs of at most largest bytes and moves them, in a random order, to another one; want is what the
// other one holds then.
func shuffled(src, dst *Buffer, largest uint64, seed uint64) (moves []Move, want []byte) {
	random := rand.New(rand.NewPCG(seed, 1))
	for at := 0; at < len(src.Bytes()); at += 8 {
		binary.NativeEndian.PutUint64(src.Bytes()[at:], random.Uint64())
	}
	var runs []Move
	for at := uint64(0); at < uint64(len(src.Bytes())); {
		n := min(random.Uint64N(largest+1), uint64(len(src.Bytes()))-at) // also 0
		runs = append(runs, Move{Src: src.Addr() + uintptr(at), Bytes: n})
		at += n
	}
	random.Shuffle(len(runs), func(i, j int) { runs[i], runs[j] = runs[j], runs[i] })
	to := dst.Addr()
	for i := range runs {
		runs[i].Dst = to
		to += uintptr(runs[i].Bytes)
		from := runs[i].Src - src.Addr()
		want = append(want, src.Bytes()[from:uint64(from)+runs[i].Bytes]...)
	}
	return runs, want
}

// refused stands for a sandbox without process_vm_readv.
func refused(dst, src []Span) (uint64, error) { return 0, unix.EPERM }

func TestCopiesMoveEveryByte(t *testing.T) {
	copies := map[string]func([]Move) error{
		"direct 1":     func(m []Move) error { return CopyDirect(m, 1) },
		"direct 3":     func(m []Move) error { return CopyDirect(m, 3) },
		"direct 64":    func(m []Move) error { return CopyDirect(m, 64) },
		"host device":  func(m []Move) error { return Host().Copy(m, BackingAnonymous, BackingAnonymous, 2) },
		"kernel":       CopyKernel,
		"kernel piped": func(m []Move) error { return copyKernel(wholeOf(m), refused) },
		"kernel, short counts and interrupts": func(m []Move) error {
			calls := 0
			return copyKernel(wholeOf(m), func(dst, src []Span) (uint64, error) {
				if calls++; calls%5 == 0 {
					return 0, unix.EINTR
				}
				dst, src = dst[:1], src[:1]
				n := (dst[0].Bytes + 1) / 2
				return n, CopyDirect([]Move{{dst[0].Addr, src[0].Addr, n}}, 1)
			})
		},
		"kernel, refused half way": func(m []Move) error {
			calls := 0
			return copyKernel(wholeOf(m), func(dst, src []Span) (uint64, error) {
				if calls++; calls == 2 {
					return 0, unix.ENOSYS
				}
				n := (dst[0].Bytes + 2) / 3
				return n, CopyDirect([]Move{{dst[0].Addr, src[0].Addr, n}}, 1)
			})
		},
	}
	for name, copyMoves := range copies {
		for _, largest := range []uint64{777, 100 << 10, 5 << 20} {
			t.Run(fmt.Sprintf("%s, runs of %d", name, largest), func(t *testing.T) {
				const size = 6<<20 + 123
				total := (size + page - 1) / page
				src, dst := pages(t, total), pages(t, total)
				moves, want := shuffled(src, dst, largest, largest)
				require.NoError(t, copyMoves(moves))
				require.True(t, bytes.Equal(want, dst.Bytes()[:len(want)]))
				require.NoError(t, copyMoves(nil))
				require.NoError(t, copyMoves([]Move{{1, 1, 0}}), "no bytes touch nothing")
			})
		}
	}
}

func TestCopyKernelSplitsWhatOneSystemCallMayNotHold(t *testing.T) {
	var largest uint64
	src, dst := pages(t, (40<<20)/page), pages(t, (40<<20)/page)
	src.Bytes()[40<<20-1] = 5
	require.NoError(t, copyKernel(wholeOf([]Move{{dst.Addr(), src.Addr(), 40 << 20}}), func(d, s []Span) (uint64, error) {
		n, err := readOwnProcess(d, s)
		largest = max(largest, n)
		return n, err
	}))
	require.EqualValues(t, kernelBatchBytes, largest)
	require.Equal(t, byte(5), dst.Bytes()[40<<20-1])
}

func TestCopiesAnswerWhereAStoreWouldKill(t *testing.T) {
	good, holed := pages(t, 3), pages(t, 3)
	hole(t, holed, 1)
	truncated := fileMapping(t, 3*page, page) // of three pages mapped one is there
	cases := []struct {
		name string
		move Move
	}{
		{"unmapped source", Move{good.Addr(), holed.Addr(), 3 * page}},
		{"unmapped destination", Move{holed.Addr(), good.Addr(), 3 * page}},
		{"truncated source", Move{good.Addr(), addressOf(truncated), 3 * page}},
		{"truncated destination", Move{addressOf(truncated), good.Addr(), 3 * page}},
		{"source 1", Move{good.Addr(), 1, 8}},
		{"destination 1", Move{1, good.Addr(), 8}},
	}
	for _, c := range cases {
		for name, copyMoves := range map[string]func([]Move) error{
			"process_vm_readv": CopyKernel,
			"pipe":             func(m []Move) error { return copyKernel(wholeOf(m), refused) },
			"stores":           func(m []Move) error { return CopyDirect(m, 1) },
		} {
			if name == "stores" && (c.move.Src == 1 || c.move.Dst == 1) {
				continue // the first page is never mapped, and looked for before
			}
			t.Run(c.name+", "+name, func(t *testing.T) {
				good.Bytes()[0] = 3
				good.Bytes()[2*page] = 0
				ok := Move{good.Addr() + uintptr(2*page), good.Addr(), 1}
				err := copyMoves([]Move{ok, c.move, {good.Addr(), good.Addr() + 1, 1}})
				require.ErrorIs(t, err, status.ParamInvalid)
				require.ErrorIs(t, err, unix.EFAULT)
				require.ErrorContains(t, err, "copy ")
				require.Equal(t, byte(3), good.Bytes()[2*page], "moves before the fault are done")
			})
		}
	}
}

func TestCopyKernelEndsWhenTheKernelMovesNothing(t *testing.T) {
	b := pages(t, 1)
	err := copyKernel(wholeOf([]Move{{b.Addr(), b.Addr() + 8, 8}}), func(_, _ []Span) (uint64, error) { return 0, nil })
	require.ErrorIs(t, err, status.Failed)
}
