// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// stores are the methods that copy with stores of our own, whether or not this machine would take them.
func stores() map[string]Method {
	methods := map[string]Method{"plain": plainStores{}}
	if haveStreams {
		methods["streaming"] = streamingStores{}
	}
	return methods
}

// arena is memory to copy inside of, with room for any alignment at both ends, and bytes around that must stay.
type arena struct{ src, dst *Buffer }

const guard = 0xa5

func newArena(t testing.TB, bytes uint64) arena {
	n := (bytes+2*streamAlign)/page + 2
	a := arena{pages(t, n), pages(t, n)}
	random := rand.New(rand.NewPCG(bytes, 1))
	for i := range a.src.Bytes() {
		a.src.Bytes()[i] = byte(random.Uint32())
	}
	for i := range a.dst.Bytes() {
		a.dst.Bytes()[i] = guard
	}
	return a
}

// check copies one run and looks at every byte near it, and leaves the destination as it was.
func (a arena) check(t testing.TB, method Method, to, from, length uint64) {
	move := Move{Dst: a.dst.Addr() + uintptr(to), Src: a.src.Addr() + uintptr(from), Bytes: length}
	if err := method.Copy([]Move{move}, 0, length); err != nil {
		require.NoError(t, err)
	}
	near := a.dst.Bytes()[:to+length+streamAlign]
	good := bytes.Equal(near[to:to+length], a.src.Bytes()[from:from+length])
	for i := range near {
		if uint64(i) < to || uint64(i) >= to+length {
			good = good && near[i] == guard
		}
		near[i] = guard
	}
	if !good {
		require.FailNow(t, "wrong bytes", "%d bytes from %d to %d", length, from, to)
	}
}

func TestStoresCopyAnyAlignmentAndLength(t *testing.T) {
	const ahead = 4096 // of the streaming loops, which change there
	lengths := []uint64{0, 1, 31, 63, 64, 65, 127, 128, streamLeast - 1}
	for _, around := range []uint64{streamLeast, streamLeast + 64, ahead, ahead + 64, ahead + 128, 3 * ahead} {
		for _, more := range []uint64{0, 1, 17, 63, 64, 127, 128, 129} {
			lengths = append(lengths, around+more)
		}
	}
	for name, method := range stores() {
		t.Run(name, func(t *testing.T) {
			a := newArena(t, 4*ahead)
			for _, length := range lengths {
				for to := range uint64(streamAlign) {
					for _, from := range []uint64{0, 1, 32, 63, to} {
						a.check(t, method, to, from, length)
					}
				}
			}
		})
		t.Run(name+", at random", func(t *testing.T) {
			a := newArena(t, 3<<20)
			random := rand.New(rand.NewPCG(4, 2))
			for range 40 {
				a.check(t, method, random.Uint64N(2*streamAlign), random.Uint64N(2*streamAlign), random.Uint64N(3<<20))
			}
		})
	}
}

func TestStoresTouchNothingBeyondTheirEnds(t *testing.T) {
	for name, method := range stores() {
		t.Run(name, func(t *testing.T) {
			src, dst := pages(t, 6), pages(t, 6)
			for _, b := range []*Buffer{src, dst} {
				hole(t, b, 0)
				hole(t, b, 5)
			}
			first, end := uintptr(page), uintptr(5*page)
			for length := uint64(0); length <= 4*page; length += 61 {
				n := uintptr(length)
				require.NoError(t, method.Copy([]Move{{dst.Addr() + first, src.Addr() + end - n, length}}, 0, length))
				require.NoError(t, method.Copy([]Move{{dst.Addr() + end - n, src.Addr() + first, length}}, 0, length))
				// What is fetched ahead may lie anywhere.
				require.NoError(t, method.Copy([]Move{{dst.Addr() + end - n, src.Addr() + first, length}, {1, 1, 0}, {2, 2, 8}}, 0, length))
			}
		})
	}
}

func TestStoresOntoTheirOwnSourceChangeNothing(t *testing.T) {
	for name, method := range stores() {
		t.Run(name, func(t *testing.T) {
			a := newArena(t, 100_000)
			want := bytes.Clone(a.src.Bytes())
			require.NoError(t, method.Copy([]Move{{a.src.Addr() + 3, a.src.Addr() + 3, 100_000}}, 0, 100_000))
			require.True(t, bytes.Equal(want, a.src.Bytes()))
		})
	}
}

func BenchmarkStores(b *testing.B) {
	const span = 128 << 20
	src, dst := pages(b, span/page), pages(b, span/page)
	for at := uint64(0); at < span; at += page {
		src.Bytes()[at], dst.Bytes()[at] = 1, 1
	}
	for _, run := range []uint64{1 << 10, streamLeast, 4 << 10, 32 << 10} {
		for _, total := range []uint64{streamTotal, 8 << 20} {
			if run > total {
				continue
			}
			for name, method := range stores() {
				b.Run(fmt.Sprintf("run=%d/total=%d/%s", run, total, name), func(b *testing.B) {
					random := rand.New(rand.NewPCG(1, 1))
					moves := make([]Move, span/run)
					to, from := random.Perm(len(moves)), random.Perm(len(moves))
					for i := range moves {
						moves[i] = Move{dst.Addr() + uintptr(to[i])*uintptr(run), src.Addr() + uintptr(from[i])*uintptr(run), run}
					}
					b.SetBytes(int64(total))
					for i := range b.N {
						first := i * int(total/run) % len(moves)
						_ = method.Copy(moves[first:], 0, total) // stores don't fail
					}
				})
			}
		}
	}
}
