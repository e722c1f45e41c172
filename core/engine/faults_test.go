// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// What is promised when things fail: docs/design.md, "Promises under failure".

var everyFabric = []way{overFabric, overDirect, overBubble, directBubble}

var bubbles = []way{overBubble, directBubble, deviceBubble}

// running is a call on a goroutine of its own.
type running struct {
	done chan struct{}
	err  error
}

func begin(call func() error) *running {
	r := &running{done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.err = call()
	}()
	return r
}

func (r *running) wait() error {
	<-r.done
	return r.err
}

func (r *running) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// slow makes bytes between two nodes take their time.
func (w *world) slow(a, b *node, bytesPerSecond uint64) {
	w.network.SetPairFaults(a.host, b.host, fabric.Faults{Latency: time.Millisecond, BytesPerSecond: bytesPerSecond})
}

func TestUnregisterDuringAPullEndsItAndHurtsNobodyElse(t *testing.T) {
	over(t, bubbles, func(w *world) {
		owner, puller := w.pair()
		const size = 8 << 20
		doomed, kept := owner.register(rows(1, 1, size), two[0]).fill(1), owner.register(rows(1, 1, size), two[1]).fill(2)
		to, other := puller.register(rows(1, 1, size)), puller.register(rows(1, 1, size))
		w.slow(puller, owner, 4<<20)
		ending := begin(func() error { return puller.pull(owner, normal(7), to, all()) })
		lasting := begin(func() error { return puller.pull(owner, normal(8), other, all()) })
		w.pass(500 * time.Millisecond)
		require.False(w.t, ending.ended())
		doomed.remove()
		doomed.fill(99) // its memory is the application's again
		requireCode(w.t, status.CacheNotExist, ending.wait())
		require.NoError(w.t, lasting.wait())
		other.requireContent(kept.content())
		to.fill(5)
		before := to.content()
		w.pass(time.Minute)
		to.requireContent(before) // nothing of the pull is in flight any more
		requireCode(w.t, status.CacheNotExist, puller.pull(owner, normal(7), to, all()))
	})
}

func TestDeallocateDuringAPullThatHoldsNothing(t *testing.T) {
	over(t, bubbles, func(w *world) {
		owner, puller := w.pair()
		const size = 8 << 20
		src := owner.allocate(blocks(1, 8, size/8), paged...).fill(1)
		dst := puller.register(blocks(1, 8, size/8))
		p := all()
		p.SrcBlocks, p.DstBlocks = []uint64{0, 1, 2, 3, 4, 5, 6, 7}, []uint64{7, 6, 5, 4, 3, 2, 1, 0}
		w.slow(puller, owner, 4<<20)
		pull := begin(func() error { return puller.pull(owner, blocksKey(3), dst, p) })
		w.pass(500 * time.Millisecond)
		require.False(w.t, pull.ended())
		require.NoError(w.t, owner.Deallocate(src.id, true))
		for range 7 {
			owner.allocate(rows(1, 1, size)).fill(99) // in its pages too
		}
		requireCode(w.t, status.CacheNotExist, pull.wait())
		requireCode(w.t, status.CacheNotExist, puller.pull(owner, blocksKey(3), dst, p))
	})
}

// Whatever a pull by a key brings is all of one cache that had the key, and never of one that was gone before the pull began.
func TestPullsDuringReplacementBringOneVersion(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair()
		const size, versions = 200_000, 40
		var newest atomic.Uint64
		src := owner.register(blocks(2, 4, size/4), paged...).fill(0)
		want := [][][]byte{src.content()}
		for version := range uint64(versions) {
			want = append(want, src.fill(version+1).content())
		}
		src.fill(0)
		dst := puller.register(blocks(2, 4, size/4))
		p := all()
		p.SrcBlocks, p.DstBlocks = []uint64{0, 1, 2, 3}, []uint64{0, 1, 2, 3}
		replacing := begin(func() error {
			for version := range uint64(versions) {
				next := owner.prepare(blocks(2, 4, size/4)).fill(version + 1)
				if err := next.enter(paged...); err != nil {
					return err
				}
				newest.Store(version + 1)
				src.remove()
				src.fill(1000) // never to be seen
				src = next
			}
			return nil
		})
		brought := 0
		for !replacing.ended() || brought == 0 {
			since := newest.Load()
			if err := puller.pull(owner, blocksKey(3), dst, p); err != nil {
				requireCode(w.t, status.CacheNotExist, err)
				continue
			}
			brought++
			until := min(newest.Load()+1, versions)
			found := false
			for version := since; version <= until && !found; version++ {
				found = dst.equals(want[version])
			}
			require.True(w.t, found, "bytes of no version from %d to %d", since, until)
		}
		require.NoError(w.t, replacing.wait())
	})
}

func TestPeerDeathDuringAPull(t *testing.T) {
	over(t, bubbles, func(w *world) {
		owner, puller := w.pair()
		const size = 8 << 20
		owner.register(rows(1, 1, size), two[0]).fill(1)
		dst := puller.register(rows(1, 1, size))
		w.slow(puller, owner, 1<<20)
		pull := begin(func() error { return puller.pull(owner, normal(7), dst, all()) })
		w.pass(time.Second)
		owner.crash()
		e := requireCode(w.t, status.Failed, pull.wait())
		require.Contains(w.t, e.Cause, "peer died")
		w.eventually(func() bool { return puller.links.LiveLinks() == 0 }, "the link is dead")
		e = requireCode(w.t, status.NotYetLink, puller.pull(owner, normal(7), dst, all()))
		require.Contains(w.t, e.Cause, "peer died")
		require.Contains(w.t, puller.Explain(1), "dead")

		again := w.node("owner", 1)
		again.address = owner.address
		require.NoError(w.t, again.SwitchRole(owner.address))
		puller.link(again)
		requireCode(w.t, status.CacheNotExist, puller.pull(again, normal(7), dst, all()))
		require.NoError(w.t, puller.unlink(again, true))
	})
}

// Over real sockets nobody can pull the plug of a host: the peer finalizes instead, at whatever moment.
func TestPeerFinalizesDuringPulls(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric, overDirect}, func(w *world) {
		owner, puller := w.pair()
		const size = 16 << 20
		owner.register(rows(1, 1, size), two[0]).fill(1)
		dst := puller.register(rows(1, 1, size))
		started := make(chan struct{}, 1)
		pulls := begin(func() error {
			for {
				if err := puller.pull(owner, normal(7), dst, all()); err != nil {
					return err
				}
				select {
				case started <- struct{}{}:
				default:
				}
			}
		})
		<-started
		owner.crash()
		err := pulls.wait()
		require.Contains(w.t, []status.Code{status.Failed, status.NotYetLink}, status.CodeOf(err), "%v", err)
		w.eventually(func() bool { return puller.links.LiveLinks() == 0 }, "the link is dead")
		requireCode(w.t, status.NotYetLink, puller.pull(owner, normal(7), dst, all()))
		require.NoError(w.t, puller.unlink(owner, false), "unlinking a dead link succeeds")
		require.NoError(w.t, puller.SwitchRole(""), "and it is in nobody's way")
	})
}

// The same cluster id, the same address, the same key and the same cache id: and not one byte of what was there before.
func TestRestartBringsNoOldBytes(t *testing.T) {
	over(t, append([]way{directBubble}, everyWay...), func(w *world) {
		owner, puller := w.pair()
		old := owner.register(rows(1, 1, 9000), two[0]).fill(1)
		dst := puller.register(rows(1, 1, 9000))
		require.NoError(w.t, puller.pull(owner, byID(old, 0), dst, all()))
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		owner.crash()
		again := w.node("owner", 1)
		require.NoError(w.t, again.SwitchRole("")) // from a port of its own to the old one
		require.NoError(w.t, again.SwitchRole(owner.address))
		again.address = again.ListenAddress()
		require.Equal(w.t, owner.address, again.address)
		now := again.register(rows(1, 1, 9000), two[0]).fill(2)
		require.Equal(w.t, old.id, now.id)
		if err := puller.pull(again, normal(7), dst, all()); err != nil {
			require.Contains(w.t, []status.Code{status.Failed, status.NotYetLink}, status.CodeOf(err), "%v", err)
		} else {
			require.Fail(w.t, "a pull over a link to an engine that is gone")
		}
		w.eventually(func() bool { return puller.links.LiveLinks() == 0 }, "the link is dead")
		puller.link(again)
		for _, key := range []int{0, 1} {
			dst.fill(5)
			if key == 0 {
				require.NoError(w.t, puller.pull(again, normal(7), dst, all()))
			} else {
				require.NoError(w.t, puller.pull(again, byID(now, 0), dst, all()))
			}
			dst.requireContent(now.content())
		}
	})
}

// A restarted puller links again although the owner has not noticed that the first one is gone.
func TestRestartedPullerReplacesItsOldLink(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair()
		src := owner.register(rows(1, 1, 100), two[0]).fill(1)
		puller.crash()
		again := w.node("puller", 2)
		again.link(owner)
		dst := again.register(rows(1, 1, 100))
		require.NoError(w.t, again.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
		require.Equal(w.t, 1, owner.links.LiveLinks())
	})
}

func TestALinkServesAfterDeadlinesCancelsAndAPausedPeer(t *testing.T) {
	over(t, everyFabric, func(w *world) {
		owner, puller := w.pair()
		src := owner.register(rows(2, 1, 300_000), two[0]).fill(1)
		dst := puller.register(rows(2, 1, 300_000))
		before := puller.Explain(1)
		for i := range 4 {
			owner.host.Pause()
			ctx, cancel := within(10 * time.Millisecond)
			if i%2 == 1 {
				var stop context.CancelFunc
				ctx, stop = context.WithCancel(context.Background())
				time.AfterFunc(5*time.Millisecond, stop)
			}
			err := puller.pullWithin(ctx, owner, normal(7), dst, all())
			cancel()
			want := status.Timeout
			if i%2 == 1 {
				want = status.Failed
			}
			requireCode(w.t, want, err)
			dst.fill(uint64(50 + i))
			left := dst.content()
			owner.host.Resume()
			dst.requireContent(left)
			require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
			dst.requireContent(src.content())
			require.Equal(w.t, before, puller.Explain(1), "the same link")
		}
	})
}

func TestADeadlineDuringTheBytesLeavesTheDestinationAlone(t *testing.T) {
	over(t, bubbles, func(w *world) {
		owner, puller := w.pair()
		const size = 8 << 20
		src := owner.allocate(rows(1, 1, size), two[0]).fill(1)
		dst := puller.register(rows(1, 1, size))
		w.slow(puller, owner, 1<<20)
		ctx, cancel := within(2 * time.Second)
		defer cancel()
		began := time.Now()
		requireCode(w.t, status.Timeout, puller.pullWithin(ctx, owner, normal(7), dst, all()))
		require.Less(w.t, time.Since(began), 3200*time.Millisecond, "at most one batch late")
		dst.fill(9)
		before := dst.content()
		w.pass(20 * time.Second) // what is in the pipe is drained
		dst.requireContent(before)
		require.Zero(w.t, owner.Stats().Leases)
		require.Equal(w.t, 1, owner.Stats().Keys, "it can be pulled again")
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()))
		dst.requireContent(src.content())
	})
}

// A puller that has stopped for good costs its lease's time, and the key can be pulled by another one.
func TestALeaseOfASilentPullerEnds(t *testing.T) {
	over(t, bubbles, func(w *world) {
		owner, puller := w.pair()
		other := w.node("other", 3)
		other.link(owner)
		const size = 4 << 20
		src := owner.allocate(rows(1, 1, size), two[0]).fill(1)
		dst, to := puller.register(rows(1, 1, size)), other.register(rows(1, 1, size))
		w.slow(puller, owner, 1<<20)
		ctx, cancel := within(2500 * time.Millisecond)
		defer cancel()
		pull := begin(func() error { return puller.pullWithin(ctx, owner, normal(7), dst, all()) })
		w.eventually(func() bool { return owner.Stats().Leases == 1 }, "the pull is under way")
		w.network.Partition(puller.host, owner.host)
		w.pass(4 * time.Second)
		require.True(w.t, pull.ended())
		require.Error(w.t, pull.wait())
		require.Zero(w.t, owner.Stats().Leases)
		require.NoError(w.t, other.pull(owner, normal(7), to, all()))
		to.requireContent(src.content())
		w.network.Heal(puller.host, owner.host)
	})
}

func TestBothSidesLinkAtOnce(t *testing.T) {
	over(t, everyWay, func(w *world) {
		a, b := w.node("a", 1), w.node("b", 2)
		src := []*memory{a.register(rows(1, 1, 100), two[0]).fill(1), b.register(rows(1, 1, 100), two[0]).fill(2)}
		dst := []*memory{b.register(rows(1, 1, 100)), a.register(rows(1, 1, 100))}
		for range 5 {
			var results [2]error
			together(2, func(i int) { results[i] = []*node{a, b}[i].tryLink([]*node{b, a}[i]) })
			for _, err := range results {
				if err != nil {
					requireCode(w.t, status.AlreadyLink, err)
				}
			}
			require.Equal(w.t, []int{1, 1}, []int{a.links.LiveLinks(), b.links.LiveLinks()})
			for i, way := range [][2]*node{{b, a}, {a, b}} {
				require.NoError(w.t, way[0].pull(way[1], normal(7), dst[i], all()))
				dst[i].requireContent(src[i].content())
			}
			require.NoError(w.t, a.unlink(b, false))
			require.Zero(w.t, b.links.LiveLinks())
		}
	})
}

func TestUnlinkWaitsForThePullsOfThePeer(t *testing.T) {
	over(t, bubbles, func(w *world) {
		owner, puller := w.pair()
		const size = 4 << 20
		src := owner.register(rows(1, 1, size), two[0]).fill(1)
		for _, way := range [][2]*node{{owner, puller}, {puller, owner}} {
			dst := puller.register(rows(1, 1, size))
			w.slow(puller, owner, 1<<20)
			pull := begin(func() error { return puller.pull(owner, normal(7), dst, all()) })
			w.pass(time.Second)
			require.NoError(w.t, way[0].unlink(way[1], false))
			require.NoError(w.t, pull.wait(), "it had the time that it needs")
			dst.requireContent(src.content())
			requireCode(w.t, status.NotYetLink, puller.pull(owner, normal(7), dst, all()))
			puller.link(owner)
		}
	})
}

func TestForcedUnlinkEndsPullsAtOnce(t *testing.T) {
	over(t, bubbles, func(w *world) {
		owner, puller := w.pair()
		const size = 8 << 20
		owner.register(rows(1, 1, size), two[0])
		dst := puller.register(rows(1, 1, size))
		w.slow(puller, owner, 1<<20)
		for _, who := range []*node{puller, owner} {
			pull := begin(func() error { return puller.pull(owner, normal(7), dst, all()) })
			w.pass(time.Second)
			began := time.Now()
			require.NoError(w.t, who.unlink(map[*node]*node{puller: owner, owner: puller}[who], true))
			requireCode(w.t, status.Failed, pull.wait())
			require.Less(w.t, time.Since(began), 2*time.Second)
			w.eventually(func() bool { return owner.links.LiveLinks()+puller.links.LiveLinks() == 0 }, "both ends are dead")
			puller.link(owner)
		}
	})
}

func TestMemoryThatVanishesDuringAPull(t *testing.T) {
	over(t, everyFabric, func(w *world) {
		owner, puller := w.pair()
		src, other := owner.register(rows(2, 1, 1<<20), two[0]).fill(1), owner.register(rows(2, 1, 1<<20), two[1]).fill(2)
		dst := puller.register(rows(2, 1, 1<<20))
		for _, n := range []*node{owner, puller} {
			gone := src.addrs[1]
			if n == puller {
				gone = dst.addrs[1]
			}
			n.host.FaultSpans(inside(gone, 1<<20))
			e := requireCode(w.t, status.ParamInvalid, puller.pull(owner, normal(7), dst, all()))
			require.Equal(w.t, status.StageTransfer, e.Stage)
			n.host.FaultSpans(nil)
			require.NoError(w.t, puller.pull(owner, normal(8), dst, all()), "the link is whole")
			dst.requireContent(other.content())
		}
	})
}
