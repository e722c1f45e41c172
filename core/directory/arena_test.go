// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

func newArena() *arena {
	a := new(arena)
	a.clear()
	return a
}

// requireWhole checks that everything is free and has been joined.
func requireWhole(t testing.TB, a *arena) {
	first, ok := a.take(arenaWords)
	require.True(t, ok)
	require.Zero(t, first)
	_, ok = a.take(1)
	require.False(t, ok)
	a.give(first, arenaWords)
}

func TestArenaTakesWholeBlocks(t *testing.T) {
	a := newArena()
	for _, c := range []struct{ words, first uint32 }{
		{1, 0}, {64, 64}, {65, 128}, {1, 256}, {256, 512}, {arenaWords / 2, arenaWords / 2}, {arenaWords / 4, arenaWords / 4},
	} {
		first, ok := a.take(c.words)
		require.True(t, ok)
		require.Equal(t, c.first, first)
	}
	for _, words := range []uint32{arenaWords / 4, arenaWords, arenaWords + 1, 1<<32 - 1} {
		_, ok := a.take(words)
		require.False(t, ok)
	}
}

func TestArenaGivesNoWordTwiceAndLosesNone(t *testing.T) {
	for seed := range uint64(5) {
		random := rand.New(rand.NewPCG(seed, 0))
		a := newArena()
		var owner [blocks]uint32 // by the first word of those who have it, plus one
		held := []run{}
		own := func(r run, before, after uint32) {
			for block := r.first >> blockShift; block <= (r.first+r.tensors-1)>>blockShift; block++ {
				if owner[block] != before {
					require.FailNow(t, "given twice, or lost")
				}
				owner[block] = after
			}
		}
		for range 3000 {
			if random.IntN(5) < 2 && len(held) > 0 {
				i := random.IntN(len(held))
				own(held[i], held[i].first+1, 0)
				a.give(held[i].first, held[i].tensors)
				held[i] = held[len(held)-1]
				held = held[:len(held)-1]
				continue
			}
			words := 1 + random.Uint32N(1<<random.IntN(19))
			first, ok := a.take(words)
			if !ok {
				continue
			}
			require.LessOrEqual(t, first+words, uint32(arenaWords))
			held = append(held, run{first, words})
			own(held[len(held)-1], 0, first+1)
		}
		for _, r := range held {
			a.give(r.first, r.tensors)
		}
		requireWhole(t, a)
	}
}

func TestCachesOfUsualSizeAlwaysFindRoom(t *testing.T) {
	a := newArena()
	random := rand.New(rand.NewPCG(1, 2))
	held := make([]run, 0, slots)
	for range 100_000 {
		if len(held) == slots || random.IntN(20) == 0 && len(held) > 0 {
			i := random.IntN(len(held))
			a.give(held[i].first, held[i].tensors)
			held[i] = held[len(held)-1]
			held = held[:len(held)-1]
		}
		words := 1 + random.Uint32N(arenaWords/slots)
		first, ok := a.take(words)
		require.True(t, ok)
		held = append(held, run{first, words})
	}
}
