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

// What v1 mode needs of the engine (spec §9), over every way that bytes can go.

func older(o *Options) { o.CacheManager = false }

func TestAKeyMovesTheWholeRowAndOffsetsExactlyWhatTheySay(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair(older)
		src := owner.allocate(rows(2, 2, 900), two...).fill(1)
		dst := puller.register(rows(2, 1, 1000)).fill(2)
		want := dst.content()
		pull := func(key uint64, exact bool, size int64, from, to uint64) error {
			p := all()
			p.Size, p.Exact, p.SrcOffset, p.DstOffset = size, exact, from, to
			return puller.pull(owner, normal(key), dst, p)
		}
		require.NoError(w.t, pull(8, true, 100, 30, 600))
		require.Equal(w.t, 2, owner.Stats().Keys, "offsets keep the key")
		for i, tensor := range src.content() {
			copy(want[i][600:700], tensor[930:1030])
		}
		dst.requireContent(want)
		requireCode(w.t, status.ParamInvalid, pull(8, true, 100, 801, 0))
		require.NoError(w.t, pull(8, false, 1, 0, 0))
		require.Equal(w.t, 1, owner.Stats().Keys)
		for i, tensor := range src.content() {
			copy(want[i], tensor[900:])
		}
		dst.requireContent(want)
	})
}

func TestACacheWithItsSequenceBehindTheBatchMovesWhatIsAskedFor(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair(older)
		described := rows(1, 1, 900)
		described.SeqLenDim = 1
		src := owner.allocate(described, two[0]).fill(1)
		dst := puller.register(rows(1, 1, 1000)).fill(2)
		want := dst.content()
		p := all()
		p.Size = 7
		require.NoError(w.t, puller.pull(owner, normal(7), dst, p))
		copy(want[0][:7], src.content()[0])
		dst.requireContent(want)
	})
}

func TestAPullByIdThatKeepsAKeyIsNotRememberedForOneThatConsumesIt(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair(older)
		src := owner.allocate(rows(1, 1, 900), two[0]).fill(1)
		dst := puller.register(rows(1, 1, 900))
		exact := all()
		exact.Exact = true
		require.NoError(w.t, puller.pull(owner, byID(src, 0), dst, exact))
		require.Equal(w.t, 1, owner.Stats().Keys)
		require.NoError(w.t, puller.pull(owner, byID(src, 0), dst, all()))
		require.Zero(w.t, owner.Stats().Keys)
		dst.requireContent(src.content())
	})
}

// A cache has the tensors of one device behind those of another: 4 of each at the owner, 2 of each at the puller.
func TestARangeIsOfEachDeviceAndReleasesAKeyThatWasPulledWhole(t *testing.T) {
	const devices = 2
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair(older)
		src := owner.allocate(rows(4*devices, 1, 900), two[0]).fill(1)
		dst := puller.register(rows(2*devices, 1, 900)).fill(2)
		want := dst.content()
		pull := func(from, to uint32) error {
			p := all()
			p.SrcTensors = plan.Range{First: from, Count: 1, Parts: devices}
			p.DstTensors = plan.Range{First: to, Count: 1, Parts: devices}
			ctx, stop := within(patient)
			defer stop()
			return puller.Pull(ctx, &PullCall{Cluster: owner.id, Key: normal(7), Cache: dst.id, Plan: p, TensorsPerLayer: 1})
		}
		requireCode(w.t, status.ParamInvalid, pull(4, 0))
		requireCode(w.t, status.ParamInvalid, pull(0, 2))
		for from := range uint32(4) {
			require.Equal(w.t, 1, owner.Stats().Keys)
			to := from % 2
			require.NoError(w.t, pull(from, to))
			for device := range uint32(devices) {
				want[2*device+to] = src.content()[4*device+from]
			}
			dst.requireContent(want)
		}
		require.Zero(w.t, owner.Stats().Keys)
	})
}

func TestALinkIsCheckedWhenNothingIsUnderWay(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair(older)
		ctx, stop := within(10 * time.Second)
		defer stop()
		require.NoError(w.t, puller.CheckLink(ctx, owner.clusterID))
		requireCode(w.t, status.NotYetLink, puller.CheckLink(ctx, 77))
		require.Equal(w.t, owner.clusterID, puller.Links()[0].Cluster)
		owner.stop()
		w.eventually(func() bool { return len(puller.Links()) == 0 }, "the link is dead")
		requireCode(w.t, status.NotYetLink, puller.CheckLink(ctx, owner.clusterID))
	})
}

// unlinking is a puller that begins to unlink from its owner while a pull of its own is under way, which takes some 8 s more.
type unlinking struct {
	owner, puller *node
	src, dst      *memory
	pull, unlink  *running
}

func (w *world) unlinking(patience time.Duration, change ...func(*Options)) *unlinking {
	const size = 4 << 20
	u := &unlinking{}
	u.owner, u.puller = w.pair(change...)
	u.src, u.dst = u.owner.allocate(rows(1, 1, size)).fill(1), u.puller.allocate(rows(1, 1, size))
	w.slow(u.puller, u.owner, size/16)
	u.pull = begin(func() error { return u.puller.pull(u.owner, byID(u.src, 0), u.dst, all()) })
	w.pass(time.Second)
	u.unlink = begin(func() error {
		ctx, stop := within(patience)
		defer stop()
		return u.puller.UnlinkClusters(ctx, []Cluster{u.owner.cluster()}, false)[0]
	})
	w.pass(time.Millisecond)
	return u
}

// calls are those that need a link, each within so long.
func (u *unlinking) calls(patience time.Duration) map[string]func() error {
	to, from := u.puller.allocate(rows(1, 1, 10)), u.owner.allocate(rows(1, 1, 10)).fill(3)
	bounded := func(call func(ctx context.Context) error) func() error {
		return func() error {
			ctx, stop := within(patience)
			defer stop()
			return call(ctx)
		}
	}
	return map[string]func() error{
		"pull": bounded(func(ctx context.Context) error { return u.puller.pullWithin(ctx, u.owner, byID(from, 0), to, all()) }),
		"push": bounded(func(ctx context.Context) error {
			return u.puller.Push(ctx, &PushCall{Cluster: u.owner.id, Addrs: []uint64{uint64(from.addrs[0])}, Cache: to.id, Plan: all(), TensorsPerLayer: 1})
		}),
		"check": bounded(func(ctx context.Context) error { return u.puller.CheckLink(ctx, u.owner.id) }),
	}
}

func TestALinkThatIsBeingUnlinkedIsBusyAtTheDeadline(t *testing.T) {
	over(t, bubbles, func(w *world) {
		u := w.unlinking(patient, older)
		for name, call := range u.calls(time.Second / 2) {
			began := time.Now()
			e := requireCode(w.t, status.LinkBusy, call())
			require.Equal(w.t, time.Second/2, time.Since(began), name)
			require.Equal(w.t, u.owner.id, e.Peer)
			require.Equal(w.t, u.owner.address, e.Address)
		}
		require.NoError(w.t, u.pull.wait())
		require.NoError(w.t, u.unlink.wait())
		u.dst.requireContent(u.src.content())
	})
}

func TestCallsThatWaitForAnUnlinkHaveNoLinkAfterIt(t *testing.T) {
	over(t, bubbles, func(w *world) {
		u := w.unlinking(patient, older)
		waiting := map[string]*running{}
		for name, call := range u.calls(patient) {
			waiting[name] = begin(call)
		}
		w.pass(time.Second)
		for name, call := range waiting {
			require.False(w.t, call.ended(), name)
		}
		require.NoError(w.t, u.pull.wait())
		require.NoError(w.t, u.unlink.wait())
		for _, call := range waiting {
			requireCode(w.t, status.NotYetLink, call.wait())
		}
	})
}

func TestCallsThatWaitForAnUnlinkGoOnWhereTheLinkStays(t *testing.T) {
	over(t, bubbles, func(w *world) {
		u := w.unlinking(time.Second, older)
		waiting := map[string]*running{}
		for name, call := range u.calls(patient) {
			waiting[name] = begin(call)
		}
		requireCode(w.t, status.LinkBusy, u.unlink.wait())
		require.NoError(w.t, u.pull.wait())
		for name, call := range waiting {
			require.NoError(w.t, call.wait(), name)
		}
		require.NoError(w.t, u.puller.unlink(u.owner, false))
	})
}

func TestAnEngineEndsWithoutThoseThatWaitForItsLinks(t *testing.T) {
	over(t, bubbles, func(w *world) {
		u := w.unlinking(patient, older)
		waiting := begin(u.calls(patient)["pull"])
		w.pass(time.Millisecond)
		require.NoError(w.t, u.puller.Close())
		for _, call := range []*running{waiting, u.pull, u.unlink} {
			require.Error(w.t, call.wait())
		}
		u.puller.crash()
	})
}

func TestInCacheManagerModeALinkThatIsBeingUnlinkedIsNone(t *testing.T) {
	over(t, bubbles, func(w *world) {
		u := w.unlinking(patient)
		for name, call := range u.calls(time.Second) {
			began := time.Now()
			requireCode(w.t, status.NotYetLink, call())
			require.Equal(w.t, time.Now(), began, name)
		}
		require.NoError(w.t, u.pull.wait())
		require.NoError(w.t, u.unlink.wait())
	})
}

func TestDeallocationKnowsTheKindAndWhatIsUnknown(t *testing.T) {
	over(t, everyWay[:1], func(w *world) {
		node := w.node("older", 1, older)
		ids := []int64{node.allocate(rows(1, 1, 100)).id, node.allocate(blocks(1, 4, 100)).id}
		for _, id := range ids {
			require.NoError(w.t, node.Deallocate(id, false))
			requireCode(w.t, status.CacheNotExist, node.Deallocate(id, false))
		}
		_, err := node.tryAllocate(rows(1, 1, 100), two[0])
		require.NoError(w.t, err)
		_, err = node.tryAllocate(rows(1, 1, 100), two[0])
		requireCode(w.t, status.Failed, err)
		require.ErrorIs(w.t, err, cache.ErrKeyInUse)
	})
}
