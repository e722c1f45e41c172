// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// The life of keys and of the memory behind them (spec §8.5.5, §8.15, §14 rows 8 and 17).

func TestAConsumedKeyIsGoneWhenThePullReturns(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair()
		src := owner.allocate(rows(2, 1, 5000), two[0]).fill(1)
		dst := puller.register(rows(2, 1, 5000))
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
		require.Zero(w.t, owner.Stats().Keys)
		requireCode(w.t, status.CacheNotExist, puller.pull(owner, normal(7), dst, all()))
		require.NoError(w.t, puller.pull(owner, byID(src, 0), dst, all()), "the cache itself is there still")
		other, err := owner.tryAllocate(rows(1, 1, 10), two[0])
		require.NoError(w.t, err, "the key is free")
		require.NotEqual(w.t, src.id, other.id)
	})
}

func TestLayerPullsReleaseAKeyWhenItHasBeenPulledWhole(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair()
		src := owner.allocate(rows(6, 2, 700), two...).fill(1)
		dst := puller.register(rows(6, 1, 700))
		layer := func(key uint64, first uint32) error {
			p := all()
			p.SrcTensors = plan.Range{First: first, Count: 2}
			p.DstTensors = p.SrcTensors
			return puller.pull(owner, normal(key), dst, p)
		}
		for _, first := range []uint32{4, 0, 4} {
			require.NoError(w.t, layer(7, first))
			require.Equal(w.t, 2, owner.Stats().Keys, "tensors 2 and 3 have not been pulled")
		}
		require.NoError(w.t, layer(8, 2))
		require.Equal(w.t, 2, owner.Stats().Keys, "each key has an account of its own")
		require.NoError(w.t, layer(7, 2))
		require.Equal(w.t, 1, owner.Stats().Keys)
		requireCode(w.t, status.CacheNotExist, layer(7, 0))
		require.NoError(w.t, puller.pull(owner, normal(8), dst, all()))
		require.Zero(w.t, owner.Stats().Keys)
		want := src.content()
		for i := range want {
			want[i] = want[i][700:]
		}
		dst.requireContent(want)
	})
}

func TestDeallocationWaitsForTheLastKey(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair()
		src := owner.allocate(rows(2, 2, 4096), two...).fill(1)
		dst := puller.register(rows(2, 1, 4096))
		require.NoError(w.t, owner.Deallocate(src.id, false))
		require.NoError(w.t, owner.Deallocate(src.id, false), "twice is fine")
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		require.NotZero(w.t, owner.Stats().PoolBytes)
		require.NoError(w.t, puller.pull(owner, byID(src, 1), dst, all()), "by the id where the other key is bound")
		require.Equal(w.t, cache.Stats{Drawn: 1}, owner.Stats(), "all is free when the pull returns")
		requireCode(w.t, status.CacheNotExist, puller.pull(owner, byID(src, 0), dst, all()))
	})
}

func TestAnEndedPullReleasesNothing(t *testing.T) {
	over(t, []way{overFabric, overBubble, overDirect, directBubble}, func(w *world) {
		owner, puller := w.pair()
		src := owner.allocate(rows(2, 1, 100_000), two[0]).fill(1)
		dst := puller.register(rows(2, 1, 100_000))
		owner.host.Pause()
		ctx, cancel := within(30 * time.Millisecond)
		e := requireCode(w.t, status.Timeout, puller.pullWithin(ctx, owner, normal(7), dst, all()))
		cancel()
		require.NotEmpty(w.t, e.Hint)
		ctx, cancel = context.WithCancel(context.Background())
		time.AfterFunc(20*time.Millisecond, cancel)
		requireCode(w.t, status.Failed, puller.pullWithin(ctx, owner, normal(7), dst, all()))
		dst.fill(9)
		before := dst.content()
		owner.host.Resume()
		// The owner reads what was left for it: requests, and that nobody wants them any more.
		w.eventually(func() bool { return owner.Stats().Leases == 0 }, "the owner drops the leases")
		require.Equal(w.t, 1, owner.Stats().Keys)
		dst.requireContent(before)
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
		require.Zero(w.t, owner.Stats().Keys)
	})
}

func TestAPullThatHasEndedNeverStarts(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair()
		owner.allocate(rows(2, 1, 100), two[0])
		dst := puller.register(rows(2, 1, 100)).fill(3)
		before := dst.content()
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		requireCode(w.t, status.Failed, puller.pullWithin(ctx, owner, normal(7), dst, all()))
		late, cancel := within(-time.Second)
		defer cancel()
		requireCode(w.t, status.Timeout, puller.pullWithin(late, owner, normal(7), dst, all()))
		dst.requireContent(before)
		require.Equal(w.t, 1, owner.Stats().Keys)
	})
}

func TestTwoPullersOfOneKeyReleaseItOnce(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric, overDirect, overBubble, directBubble}, func(w *world) {
		owner, first := w.pair()
		second := w.node("second", 3)
		second.link(owner)
		pullers := []*node{first, second}
		to := []*memory{first.register(rows(2, 1, 300_000)), second.register(rows(2, 1, 300_000))}
		for round := range uint64(10) {
			src := owner.allocate(rows(2, 1, 300_000), two[0]).fill(round)
			want := src.content()
			require.NoError(w.t, owner.Deallocate(src.id, false))
			var results [2]error
			together(2, func(i int) { results[i] = pullers[i].pull(owner, normal(7), to[i], all()) })
			succeeded := 0
			for i, err := range results {
				if err == nil {
					succeeded++
					to[i].requireContent(want)
				} else {
					requireCode(w.t, status.CacheNotExist, err)
				}
			}
			require.NotZero(w.t, succeeded)
			w.eventually(func() bool { return owner.Stats().PoolBytes == 0 }, "the memory goes back")
			require.Zero(w.t, owner.Stats().Keys)
		}
	})
}

// A cache that is freed while it is being pulled under a key stays until the pull has ended, and its pages are nobody else's.
func TestDeallocateAndRemoveKeyDuringAPullThatHoldsALease(t *testing.T) {
	over(t, []way{overBubble, directBubble}, func(w *world) {
		owner, puller := w.pair()
		const size = 4 << 20
		src := owner.allocate(rows(2, 1, size), two[0]).fill(1)
		dst := puller.register(rows(2, 1, size))
		want := src.content()
		w.slow(puller, owner, 1<<20)
		pull := begin(func() error { return puller.pull(owner, normal(7), dst, all()) })
		w.eventually(func() bool { return owner.Stats().Leases == 1 }, "the pull is under way")
		w.pass(time.Second)
		require.NoError(w.t, owner.Deallocate(src.id, false))
		require.NoError(w.t, owner.RemoveKey(two[0]))
		require.Zero(w.t, owner.Stats().Entries)
		require.NotZero(w.t, owner.Stats().PoolBytes, "the lease holds the pages")
		for range 6 {
			owner.allocate(rows(1, 1, size)).fill(77) // and nobody else is given them
		}
		require.NoError(w.t, pull.wait())
		dst.requireContent(want)
		require.Equal(w.t, 6, owner.Stats().Entries)
		require.Zero(w.t, owner.Stats().Retiring)
	})
}

// What a link knows of an id ends with the id.
func TestAnIDThatIsGoneIsNotFoundThoughItWasPulledBefore(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair()
		dst := puller.register(rows(2, 1, 100))
		registered, allocated := owner.register(rows(2, 1, 100)).fill(1), owner.allocate(rows(2, 1, 100)).fill(2)
		for _, src := range []*memory{registered, allocated} {
			for range 3 {
				require.NoError(w.t, puller.pull(owner, byID(src, 0), dst, all()))
				dst.requireContent(src.content())
			}
			if src.owned {
				require.NoError(w.t, owner.Deallocate(src.id, false))
			} else {
				src.remove()
			}
			requireCode(w.t, status.CacheNotExist, puller.pull(owner, byID(src, 0), dst, all()))
		}
	})
}

// A blocks key that another cache takes over means that cache at once, although the first one lives on.
func TestABlocksKeyFollowsTheCacheThatTookItOver(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair()
		dst := puller.register(blocks(2, 4, 100))
		p := all()
		p.SrcBlocks, p.DstBlocks = []uint64{0, 1, 2, 3}, []uint64{0, 1, 2, 3}
		for version := range uint64(4) {
			src := owner.prepare(blocks(2, 4, 100)).fill(version)
			require.NoError(w.t, src.enter(paged...))
			for range 2 {
				require.NoError(w.t, puller.pull(owner, blocksKey(3), dst, p))
				dst.requireContent(src.content())
			}
		}
	})
}
